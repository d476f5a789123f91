"""The pictures and the page of analyze.py: page.html, and .png files with their numbers beside.

All of it is drawn from what analyze.analyse and analyze.read_run return; no model runs here.
The frame of the page, its style and its script are in report.html.
"""
import html
import io
import itertools
import json
import os
import re
import string
import textwrap
from functools import partial

import matplotlib
import numpy as np

import common

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {'A': 'MHA', 'F': 'FFN', 'T': 'block'}


# ----------------------------------------------------------------------------- pictures
# A picture is a list of panels (draw, width, height), in inches: draw(axis) fills one. The .png
# shows all of them; the page takes them one by one, as SVG, so that they fit on a phone and into
# the dark.

INK, PAPER, BLUE = '#010101', '#fefefe', '#2f7ec7'  # the page has its own for ink and paper
plt.rcParams.update({key: INK for key in ('text.color', 'axes.edgecolor', 'axes.labelcolor',
                                          'xtick.color', 'ytick.color')})
plt.rcParams.update({'font.size': 9, 'axes.titlesize': 10, 'legend.frameon': False,
                     'svg.fonttype': 'none', 'svg.hashsalt': '',
                     'figure.constrained_layout.use': True})

SAID = {  # what each picture shows
    'shares': 'How many tokens take each module at each step: 1.00 is all of them. A column adds '
              'up to more than 1 where a token takes several at a step.',
    'transitions': 'What follows on what. In a node: the share of tokens that take it, as a mean '
                   'over the steps. At an arrow: of those who took the module it leaves, the share '
                   'that take the other at the next step; it is wider the larger that share, and '
                   'darker the more tokens go that way. Where a token takes k at a step, each '
                   'counts 1/k. Left out are arrows with less than 1% of all traffic, and numbers '
                   'with less than 2% or below 0.15.',
    'skips': 'Who selects SKIP: the share of tokens, by the step, by the kind of token (below it, '
             'how many of that kind were looked at), and by the place in the sequence.',
    'curves': 'Thin: the training loss, as a running mean. Points: the validation loss. Values off '
              'the picture are left out.'}


def save(folder, name, panels, numbers, columns):
    """The panels as <name>.png in folder, `columns` in a row, and their numbers as <name>.json.

    Returns the picture for the page, or '' if there are no panels.
    """
    if not panels:
        return ''
    rows = [panels[at:at + columns] for at in range(0, len(panels), columns)]
    widths = [max(row[i][1] for row in rows if i < len(row)) for i in range(len(rows[0]))]
    heights = [max(height for _, _, height in row) for row in rows]
    width, caption = sum(widths), textwrap.wrap(SAID[name], int(14 * sum(widths)))
    figure = plt.figure(figsize=(width, sum(heights) + 0.2 * len(caption)))
    grid = figure.add_gridspec(len(rows), len(widths), width_ratios=widths, height_ratios=heights)
    for n, (draw, _, _) in enumerate(panels):
        draw(figure.add_subplot(grid[n // columns, n % columns]))
    figure.supxlabel('\n'.join(caption), x=0.01, ha='left', fontsize=8)
    write(folder, f'{name}.png', image(figure, 'png', dpi=130))
    write(folder, f'{name}.json', json.dumps(numbers, indent=1).encode() + b'\n')
    drawn = ''.join(f'<div>{"".join(map(drawing, row))}</div>' for row in rows)
    return f'<figure>{drawn}<figcaption>{SAID[name]}</figcaption></figure>'


def image(figure, kind, **how):
    """A figure as the bytes of a file, and closed."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, **how)
    plt.close(figure)
    return out.getvalue()


def write(folder, name, content):
    """A file of the results, whole or not at all, and its name on the screen."""
    path = os.path.join(folder, name)
    with common.atomic_write(path) as f:
        f.write(content)
    print(path)


def drawing(panel):
    """A panel as an <svg> of the page, in the page's colours."""
    draw, width, height = panel
    figure = plt.figure(figsize=(width, height))
    draw(figure.add_subplot())
    svg = image(figure, 'svg', transparent=True, metadata={'Date': None}).decode()
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>', '', svg, flags=re.S)
    svg = svg[svg.index('>', svg.index('<svg')) + 1:]
    svg = re.sub(r'<g id="[^"]*"', '<g', svg)
    # Two decimals are enough for coordinates; what stands between tags is text.
    svg = re.sub(r'<[^>]*>', lambda tag: re.sub(r'(\.\d\d)\d+', r'\1', tag[0]), svg)
    svg = re.sub(r'\s*\n\s*', ' ', svg)
    svg = svg.replace(INK, 'currentColor').replace(PAPER, 'var(--paper)')
    return f'<svg {box} style="width:{width:.2f}in;min-width:{0.7 * width:.2f}in">{svg}'


def title(one):
    return f'{NAMES[one["kind"]]}, chunk {one["chunk"] + 1}'


def labels(one):
    """Of the modules, and of SKIP where there is one."""
    skip = ['SKIP'] * one['has_skip']
    if one['kind'] == 'T':
        return ['block', *skip]
    return [f'{NAMES[one["kind"]]} {i + 1}' for i in range(one['N'])] + skip


def draw_shares(folder, chunks):
    """A table for each chunk, steps beside each other; of chunks of one step each, one for all."""
    groups = {}
    for one in chunks:
        alone = one['chunk'] if len(one['steps']) > 1 else None
        groups.setdefault((one['kind'], one['N'], alone), []).append(one)
    panels = []
    for (kind, N, alone), its in groups.items():
        names = labels(its[0])
        if alone is None and len(its) > 1:
            head, below, columns = NAMES[kind], 'chunk', [one['chunk'] for one in its]
        else:
            head, below, columns = title(its[0]), 'step', its[0]['steps']
        table = [sum((one['shares'][i] for one in its), []) for i in range(len(names))]
        draw = partial(draw_table, table, names, head, below, columns)
        panels.append((draw, 1.1 + 0.5 * len(columns), 0.9 + 0.32 * len(names)))
    numbers = {title(one): one['shares'] for one in chunks}
    return save(folder, 'shares', panels, numbers, len({one['kind'] for one in chunks}))


def draw_table(table, names, head, below, columns, axis):
    for i, row in enumerate(table):
        for h, value in enumerate(row):
            axis.add_patch(plt.Rectangle((h, i), 1, 1, color=BLUE, alpha=value, lw=0))
            axis.text(h + 0.5, i + 0.5, f'{value:.2f}', ha='center', va='center',
                      color='white' if value > 0.6 else INK)
    axis.set(title=head, xlabel=below, xlim=(0, len(columns)), ylim=(len(names), 0))
    axis.set_xticks(np.arange(len(columns)) + 0.5, [c + 1 for c in columns])
    axis.set_yticks(np.arange(len(names)) + 0.5, names)
    axis.tick_params(length=0)


def draw_transitions(folder, chunks):
    """Figure 6. Where there is one step, nothing follows on anything."""
    chunks = [one for one in chunks if len(one['steps']) > 1]
    panels = []
    for one in chunks:
        width, height = np.ptp(places(len(labels(one))), axis=0) + 1.3
        panels.append((partial(draw_graph, one), 1.45 * width, 1.45 * height + 0.3))
    numbers = {title(one): one['transitions'] for one in chunks}
    return save(folder, 'transitions', panels, numbers, len({one['kind'] for one in chunks}))


def places(n):
    """Where n nodes of radius 0.21 stand (n, 2): on a circle, so wide that arrows show between."""
    radius = max(1, 0.55 / np.sin(np.pi / n))
    angle = np.pi / 2 - 2 * np.pi * np.arange(n) / n
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def draw_graph(one, axis):
    names, share = labels(one), np.mean(one['shares'], axis=1)
    n = len(names)
    at = places(n)                                        # (n, 2)
    out = at / np.linalg.norm(at, axis=1, keepdims=True)  # away from the middle
    nodes = [axis.add_patch(plt.Circle(xy, 0.21, fc=PAPER, ec=INK, lw=0.8, zorder=3)) for xy in at]
    most = max(map(max, one['traffic']))
    for i, j in itertools.product(range(n), repeat=2):
        p, part = one['transitions'][i][j], one['traffic'][i][j]
        if part < 0.01:
            continue
        style = dict(lw=0.5 + 4 * p, color=INK, alpha=0.12 + 0.6 * part / most)
        if i == j:  # a ring behind the node
            axis.add_patch(plt.Circle(at[i] + 0.2 * out[i], 0.2, fill=False, **style))
            place = at[i] + 0.52 * out[i]
        else:
            # To the right of the straight line, so that there and back are two arrows. The number
            # stands on its arrow, at t of the way, near the beginning: others cross the middle.
            axis.add_patch(matplotlib.patches.FancyArrowPatch(
                at[i], at[j], connectionstyle='arc3,rad=0.14', arrowstyle='-|>', mutation_scale=9,
                patchA=nodes[i], patchB=nodes[j], shrinkA=1, shrinkB=2, **style))
            way = at[j] - at[i]
            t = max(0.28, 0.4 / np.linalg.norm(way))
            place = at[i] + t * way + 0.28 * t * (1 - t) * np.array([way[1], -way[0]])
        if p >= 0.15 and part >= 0.02:
            axis.text(*place, f'{p:.2f}', fontsize=7, ha='center', va='center', zorder=2,
                      bbox=dict(boxstyle='round,pad=0.1', fc=PAPER, ec='none', alpha=0.8))
    for (x, y), s, name in zip(at, share, names):
        axis.add_patch(plt.Circle((x, y), 0.21, color=BLUE, alpha=0.75 * s, lw=0, zorder=4))
        axis.text(x, y, f'{name}\n{s:.2f}', fontsize=8, ha='center', va='center', zorder=5)
    low, high = at.min(0) - 0.65, at.max(0) + 0.65
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=title(one), aspect='equal')
    axis.axis('off')


def draw_skips(folder, chunks, seen):
    """Three views, the kinds of modules side by side. seen: how many tokens are of each kind."""
    chunks = [one for one in chunks if one['has_skip']]
    kinds = sorted({one['kind'] for one in chunks})
    views = [draw_by_step, partial(draw_by_kind, seen), draw_by_position]
    if all(len(one['steps']) == 1 for one in chunks):
        views = views[1:]
    panels = []
    for view, kind in itertools.product(views, kinds):
        its = [one for one in chunks if one['kind'] == kind]
        panels.append((partial(draw_skip, view, its), 4.8, 2.6))
    keys = 'skip_by_step', 'skip_by_kind', 'skip_by_position'
    numbers = {title(one): {key: one[key] for key in keys} for one in chunks}
    return save(folder, 'skips', panels, numbers, max(1, len(kinds)))


def draw_skip(view, chunks, axis):
    view(chunks, axis)
    name = NAMES[chunks[0]['kind']]
    axis.set(ylim=(-0.04, 1.04), ylabel='share that selects SKIP',
             title=f'{name}, every chunk' if len(chunks) > 1 else title(chunks[0]))
    if len(chunks) > 1:
        axis.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))


def draw_by_step(chunks, axis):
    for one in chunks:
        steps = [h + 1 for h in one['steps']]
        axis.plot(steps, one['skip_by_step'], 'o-', label=f'chunk {one["chunk"] + 1}')
    axis.set_xlabel('step')
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def draw_by_kind(seen, chunks, axis):
    for one in chunks:
        at = [[*seen].index(kind) for kind in one['skip_by_kind']]
        axis.plot(at, one['skip_by_kind'].values(), 'o', label=f'chunk {one["chunk"] + 1}')
    names = [f'{kind.replace(" ", chr(10), 1)}\n{n:,}' for kind, n in seen.items()]
    axis.set_xticks(range(len(seen)), names, fontsize=7)
    axis.set_xlim(-0.5, len(seen) - 0.5)
    axis.set_xlabel('kind of token, and how many')


def draw_by_position(chunks, axis):
    parts = len(chunks[0]['skip_by_position'])
    for one in chunks:
        label = f'chunk {one["chunk"] + 1}'
        axis.plot(range(1, parts + 1), one['skip_by_position'], 'o-', label=label)
    axis.set_xlabel(f'position, in {parts} equal parts of the sequence')


def draw_curves(folder, runs, base):
    """Losses of the runs, and how far those are from `base` that had its batches."""
    if not runs:
        return ''
    panels = [(partial(draw_losses, runs), 5, 3.4)]
    others = [one for one in runs if base and one is not base and one['same'] == base['same']
              and dict(one['train']).keys() & dict(base['train']).keys()]
    if others:
        panels.append((partial(draw_differences, others, base, runs), 5, 3.4))
    numbers = {one['folder']: {key: one[key] for key in ('train', 'validation')} for one in runs}
    return save(folder, 'curves', panels, numbers, 2)


def plain(name):
    """A run's name for a picture, where $ begins a formula, and _ hides a label."""
    return re.sub('^_', ' _', name.replace('$', r'\$'))


def smooth(points):
    """[(step, value)] -> steps and the running mean of the values, over a fiftieth of them."""
    width = max(1, len(points) // 50)
    mean = np.convolve([value for _, value in points], np.ones(width) / width, 'valid')
    return np.array([step for step, _ in points][width - 1:]), mean


def within(points, top):
    """Points, without those above `top`: no line comes from off the picture."""
    return zip(*[(step, value if value <= top else np.nan) for step, value in points])


def draw_losses(runs, axis):
    means = [smooth(one['train']) for one in runs]
    last = [one['validation'][-1][1] for one in runs]
    every = np.concatenate([last, *(mean for _, mean in means)])
    top = 1.1 * np.quantile(every, 0.97)
    for n, (one, (steps, mean)) in enumerate(zip(runs, means)):
        axis.plot(*within(zip(steps, mean), top), color=f'C{n}', alpha=0.6, lw=1)
        axis.plot(*within(one['validation'], top), 'o-', color=f'C{n}',
                  label=plain(one['name']))
    axis.set(xlabel='step', ylabel='nats per token', ylim=(0.97 * every.min(), top), title='loss')
    axis.legend(fontsize=8)


def draw_differences(others, base, runs, axis):
    train, val = dict(base['train']), dict(base['validation'])
    axis.axhline(0, color=INK, lw=0.8)
    for one in others:
        colour = f'C{runs.index(one)}'
        both = [(step, v - train[step]) for step, v in one['train'] if step in train]
        measured = {step: v - val[step] for step, v in one['validation'] if step in val}
        axis.plot(*smooth(both), color=colour, alpha=0.6, lw=1)
        axis.plot(measured.keys(), measured.values(), 'o-', color=colour,
                  label=plain(one['name']))
    axis.set(xlabel='step', ylabel='nats per token; below 0 is better',
             title=f'difference from {plain(base["name"])}, same batches')
    axis.legend(fontsize=8)


# ----------------------------------------------------------------------------- the page

def conclusion(own, base):
    """What a comparison with the vanilla run on the same batches comes to: two sentences, or ''."""
    if not base or own['steps'] != base['steps']:
        return ''
    a, b = own['bits'][1], base['bits'][1]
    where = f'{abs(a - b):.3f} {"below" if a < b else "above"}'
    times = own['mflops'] / base['mflops']
    return (f'After {own["steps"]:,} steps on the same batches {own["name"]} is at {a:.3f} '
            f'bits per byte, {where} vanilla ({base["name"]}, {b:.3f}). A token costs it '
            f'{own["mflops"]:.2f} MFLOPs, {times:.2f} times the {base["mflops"]:.2f} of vanilla: '
            'the steps are equal here, the cost is not.')


def write_page(folder, name, sections, colours):
    """page.html about the run `name`: headings and their HTML; a section that is empty is left out.

    colours: how many routes have one. They are spread over the hues by the golden angle, and over
    two lightnesses: no two are the same, and neighbours in rank are far apart.
    """
    themes = {}
    for theme, lightness in {'light': (0.90, 0.83), 'dark': (0.36, 0.45)}.items():
        hues = [f'oklch({lightness[i % 2]} 0.09 {137.508 * i % 360:.0f})' for i in range(colours)]
        themes[theme] = ';'.join(f'--r{i}:{hue}' for i, hue in enumerate(hues))
    style = ''.join(f'.r{i}{{background:var(--r{i})}}' for i in range(colours))
    body = ''
    for heading, part in sections.items():
        body += f'<section><h2>{heading}</h2>{part}</section>\n' if part else ''
    with open(os.path.join(common.ROOT, 'report.html'), encoding='utf-8') as f:
        template = string.Template(f.read())
    page = template.substitute(name=html.escape(name), style=style, body=body, **themes)
    write(folder, 'page.html', page.encode())


def table(rows, left=1):
    """Rows of cells, the first one the heading, as HTML; `left` columns are aligned left."""
    lines = ''
    for n, row in enumerate(rows):
        tag = 'td' if n else 'th'
        lines += '<tr>'
        for i, cell in enumerate(row):
            lines += f'<{tag}{" class=n" * (i >= left)}>{html.escape(cell)}</{tag}>'
        lines += '</tr>'
    return f'<div class="wide"><table>{lines}</table></div>'


def runs_table(runs):
    """The runs, a row each."""
    if not runs:
        return ''
    rows = [['run', 'model', 'parameters', 'MFLOPs per token', 'steps',
             'bits/byte before', 'after', 'tokens/s']]
    for one in runs:
        before, after = one['bits']
        rows.append([one['name'], one['assembly'], f'{one["parameters"]:,}',
                     f'{one["mflops"]:.2f}', f'{one["steps"]:,}', f'{before:.3f}', f'{after:.3f}',
                     f'{one["speed"]:,.0f}'])
    return table(rows, left=2)


def losses_table(loss):
    meaning = {'as_it_is': 'its own routes',
               'shuffled_equal': 'the routes of another occurrence of the same token, or its own '
                                 'if there is none',
               'shuffled': 'the routes of any other token',
               'frozen': 'one route for all: at each step the commonest choice'}
    rows = [['the same model with', 'nats per token', 'more than its own']]
    for key, name in meaning.items():
        rows.append([name, f'{loss[key]:.4f}', f'{loss[key] - loss["as_it_is"]:+.4f}'])
    return '<p>If they did not, all four losses would be equal.</p>' + table(rows)


ROUTES = ['', 'routes', 'off the commonest', 'entropy, bits', 'told by the token',
          'by the position', 'commonest']
LEGEND = ('Routes: how many different ones. Off the commonest: the share of tokens that take '
          'another one than most. Entropy: how much there is to know about a route, in bits; of '
          'these, how many the token itself tells, and how many its position.')


def short(route):
    """A route with what repeats said once: '1, 2+3, 2+3' -> '1, 2+3 ×2'."""
    runs = [(name, len([*same])) for name, same in itertools.groupby(route.split(', '))]
    return ', '.join(name if n == 1 else f'{name} ×{n}' for name, n in runs)


def routes_rows(chunks):
    """A row of ROUTES for each kind of module and chunk."""
    rows = []
    for one in chunks:
        bits = [one[key] for key in ('route_entropy', 'information_token', 'information_position')]
        rows.append([title(one), f'{one["distinct_routes"]:,}', f'{one["off_the_commonest"]:.1%}',
                     *(f'{value:.2f}' for value in bits), short(one['routes'][0]['route'])])
    return rows


def routes_table(chunks):
    return f'{table([ROUTES, *routes_rows(chunks)])}<p>{LEGEND}</p>'


def coloured(texts, strokes, T, named, chunks):
    """Tokens, once for each kind of module and chunk, coloured by route, with a line between
    sequences of T of them. named: of analyse. strokes: before which of them a stroke stands."""
    begins = np.cumsum([0, *map(len, texts)]).tolist()
    # A single space between words may vanish at a line's end, as spaces do.
    single = {found.start() for found in re.finditer(r'(?<=\S) (?=\S)', ''.join(texts))}
    classes, shown = [], []
    for text, begin, stroke in zip(texts, begins, strokes):
        classes.append(' s' * (begin in single) + ' w' * int(stroke))
        shown.append(html.escape(text).replace('\n', '<b></b>\n').replace('\r', '<i></i>'))  # marks
    parts = []
    for n, one in enumerate(chunks):
        number, names = named[one['chunk'], one['kind']]
        names, listed = [short(name) for name in names], len(one['routes'])
        spans = ''
        for at, i in enumerate(number[:len(texts)].tolist()):
            spans += '<hr>' * (at > 0 and at % T == 0)
            colour = f'r{i}' if i < listed else 'rest'
            spans += f'<span class="{colour}{classes[at]}" title="{names[i]}">{shown[at]}</span>'
        parts.append(f'<details{" open" * (n < 2)}><summary>{title(one)}</summary>'
                     f'<p class="keys">{keys(one, names)}</p><div class="text" tabindex="0" '
                     f'aria-label="{title(one)}: arrow keys go from token to token">{spans}</div>'
                     '<output></output></details>')
    return ''.join(parts)


def keys(one, names):
    """The key to the colours: what points at a route in the text."""
    listed, text = one['routes'], ''
    for i, route in enumerate(listed):
        text += (f'<button class="r{i}" value="{names[i]}">{names[i]} '
                 f'<small>{route["share"]:.1%}</small></button>')
    if others := one['distinct_routes'] - len(listed):
        rest = 1 - sum(route['share'] for route in listed)
        text += f'<span class="rest">{others:,} others <small>{rest:.1%}</small></span>'
    return text


HOW = {  # what a stranger needs to know of a model
    'mom': 'Every chunk of several layers is taken apart into attention modules (MHA) and '
           'feed-forward modules (FFN). It runs in {H} steps, and at each of them routers choose, '
           'for every token by itself, {K} of the modules of either kind.',
    'layer_skip': 'In every chunk of several layers routers decide, for every token by itself, '
                  'whether it takes the attention (MHA) and the feed-forward module (FFN) of a '
                  'layer.',
    'early_exit': 'In every chunk of several layers routers decide, for every token by itself, '
                  'whether it takes the attention (MHA) and the feed-forward module (FFN) of a '
                  'layer. Who skips one skips all that follow.',
    'moe': 'Every layer, a chunk of one, has {experts} feed-forward modules (FFN), and a router '
           'chooses {K} of them for every token by itself.',
    'moe_share': 'The feed-forward modules (FFN) of a chunk of several layers are in one pool, and '
                 'at each layer a router chooses {K} of them, for every token by itself.',
    'mod': 'At every other layer, a chunk of one, a router decides, for every token by itself, '
           'whether it goes through the block of that layer (1) or passes it by (SKIP).'}
CAN_SKIP = ' SKIP is a choice too: to take one module less.'


def introduction(cfg, name, assembly, step, where, count):
    """The first paragraph of the page. step: of training, after which the weights were saved."""
    how = HOW[cfg.phi].format(K=cfg.K, H=cfg.H, experts=cfg.experts)
    skip = CAN_SKIP * (cfg.skip and cfg.phi != 'mod')
    step = f' with the weights of step {step}' * bool(step)
    return (f'<p>{html.escape(name)} is a model of {cfg.n_layer} layers, {html.escape(assembly)}. '
            f'{how}{skip} What a token takes at the steps of one chunk is its route. This page '
            f'shows the routes of {count:,} tokens of {html.escape(where)}{step}.</p>')


def hint(has_skip, is_bytes):
    """How to read the coloured text."""
    skip = 'S is SKIP, ' * has_skip
    stroke = ' Each token is one byte; a stroke stands where a word begins.' * is_bytes
    return ('<p>Each token has the colour of its route. Modules are counted from 1, '
            f'{skip}×3 is three steps alike. Point at a token or at a route, tap it, or go with '
            'the arrow keys: all tokens of that route light up. A line is drawn where another part '
            f'of the text begins.{stroke}</p>')
