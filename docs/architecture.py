"""Draw docs/architecture.svg: a chunk of N = 4 between two blocks of a GPT-2, light or dark.

  python docs/architecture.py
"""
import os

PICKS = {'MHA': (2, 4), 'FFN': (1, 'SKIP')}  # what the routers choose for the token that is drawn
ROUTER, MODULES, SUM = 196, 340, 712         # where these begin, from the left
STYLE = '''
svg { --paper: #fff; --ink: #1b1f24; --faint: #6a737d; --line: #8b949e; --box: #f1f3f5;
      --pick: #cfe3fa; --edge: #2f7ec7; font: 13px system-ui, sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --line: #6e7681; --box: #21262d;
        --pick: #173a5e; --edge: #4f9fe8 } }
text { fill: var(--ink); text-anchor: middle } .faint { fill: var(--faint); font-size: 12px }
.left { text-anchor: start } rect, circle { fill: var(--box); stroke: var(--line) }
.paper, .chunk { fill: var(--paper) } .paper { stroke: none } .chunk { stroke-dasharray: 5 4 }
.pick { fill: var(--pick); stroke: var(--edge); stroke-width: 2 }
path { fill: none; stroke: var(--line); stroke-width: 1.5 } .way { stroke: var(--edge) }
.flow { marker-end: url(#arrow) } marker path { fill: var(--line); stroke: none }
'''


def box(x, y, width, height, *lines, kind=''):
    """A box with lines of text in its middle; the lines after the first are faint."""
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="{kind}"/>']
    for n, line in enumerate(lines):
        at = y + height / 2 + 4.5 + 17 * (n - (len(lines) - 1) / 2)
        faint = ' class="faint"' * (n > 0)
        parts.append(f'<text x="{x + width / 2}" y="{at}"{faint}>{line}</text>')
    return '\n'.join(parts)


def path(steps, kind='flow'):
    return f'<path d="{steps}" class="{kind}"/>'


def note(x, y, line, kind='faint left'):
    return f'<text x="{x}" y="{y}" class="{kind}">{line}</text>'


def half_step(name, y, router, state, result):
    """A half of a step: router, modules and the sum, on the residual stream at height y + 88."""
    stream = y + 88
    parts = [path(f'M {ROUTER - 14} {stream} H {SUM - 13}'),
             path(f'M {ROUTER + 55} {stream} V {y + 56}'),
             box(ROUTER, y, 112, 54, router, state)]
    for n, module in enumerate([1, 2, 3, 4, 'SKIP']):
        x, picked = MODULES + 70 * n, module in PICKS[name]
        number = f'<tspan dy="3" font-size="10">{module}</tspan>'
        label = module if module == 'SKIP' else name + number
        if picked:  # from the router, above the modules; and into the sum
            parts.append(path(f'M {ROUTER + 112} {y + 12} H {x + 31} V {y + 20}', 'way'))
        if picked and module != 'SKIP':
            parts.append(path(f'M {x + 31} {y + 54} V {y + 68} H {SUM} V {stream - 13}', 'way'))
        parts.append(box(x, y + 20, 62, 34, label, kind='pick' * picked))
    parts += [f'<circle cx="{SUM}" cy="{stream}" r="12"/>', note(SUM, stream + 5, '+', ''),
              note(MODULES, stream + 18, result)]
    return parts


def architecture():
    """The text of the SVG."""
    block = 'one layer', 'MHA, FFN'
    parts = [
        '<rect width="920" height="386" rx="8" class="paper"/>',
        '<rect x="160" y="14" width="600" height="336" rx="10" class="chunk"/>',
        note(176, 38, 'chunk of N = 4 layers: two pools of modules, two routers, H steps', 'left'),
        box(24, 108, 100, 64, *block), path('M 2 140 H 22'), path(f'M 124 140 H {ROUTER - 14}', ''),
        *half_step('MHA', 52, 'router A', 'GRU: x, state',
                   'u = x + Σ r · out(a), a: one attention on Σ q, Σ k, Σ v'),
        path(f'M {SUM} 152 V 172 H {ROUTER - 14} V 276', ''),
        *half_step('FFN', 188, 'router F', 'GRU: u, state',
                   'x = u + Σ r · FFN(u)'),
        path(f'M {SUM} 288 V 326 H 172 V 144'), note(MODULES, 320, 'next step: H times in all'),
        path(f'M {SUM + 12} 276 H 794'), box(796, 244, 100, 64, *block), path('M 896 276 H 916'),
        note(24, 374, 'One token, one step, K = 2: it takes MHA 2 and 4, then FFN 1 and SKIP; Σ is '
                      'over these. Other tokens, and other steps, take others.')]
    arrow = ('<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
             'markerHeight="7" orient="auto"><path d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 386" role="img" '
            f'aria-label="A chunk of Mixture-of-Modules">\n<style>{STYLE}</style>\n{arrow}\n'
            + '\n'.join(parts) + '\n</svg>\n')


if __name__ == '__main__':
    where = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'architecture.svg')
    with open(where, 'w', encoding='utf-8') as f:
        f.write(architecture())
