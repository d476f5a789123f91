"""See what the routers do: which modules, in which order, for which tokens, and whether it matters.

  python analyze.py --source=out/mom_demo                           on the validation text of its training
  python analyze.py --source=out/mom_demo --text=story.txt          on a text of your own
  python analyze.py --source=out/mom_demo --curves=out/gpt2_demo,out/mom_demo    and the loss curves of runs

out_dir gets figures (.png), each with its numbers beside it (.json): shares of the modules by step, transitions between
modules (Figure 6), SKIP by step, token and position, loss curves; page.html, a text with every token coloured by its
route; and analysis.json, which says how far the routes depend on the token:

- off the commonest: the share of tokens that take another route through a chunk than most;
- information: what a token says about its route, in bits, and what its position says. Few samples look like
  information; so the scale is that of 0 for the mean of five random pairings of tokens and routes, and of the entropy
  of the routes for a token that decides all (adjusted mutual information);
- loss: as it is; with the routes, weights included, exchanged at random between all tokens, or between occurrences of
  the same token; and with every decision frozen to its commonest choice, at the mean weights of those who chose it. If
  routes did not matter, all would be equal; if the token alone decided them, the exchange between equals were free.

A route is what a token selects in all the steps of one chunk, of attention modules (A) or of feed-forward modules (F).
"""
import codecs
import csv
import html
import json
import math
import os
from collections import Counter

import matplotlib
import numpy as np
import torch

import common
from model import GPT
from weights import load_checkpoint

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# --- what
source = 'out/mom_demo'       # a run's directory or checkpoint; a GPT-2 has no routers
text = ''                     # a UTF-8 file; '' is val.bin of data_dir
data_dir = ''                 # a folder of prepare.py; '' is that of the training
tokens = 20_000               # of the text, at most, in sequences of block_size that are spread over it
curves = ''                   # runs whose loss curves are drawn too, separated by commas
out_dir = ''                  # '' is <directory of source>/routes
# --- how
routes = 10                   # how many of the commonest routes are listed, and coloured
page = 1_000                  # tokens on the coloured page
seed = 1337                   # of the random pairings
batch = 8                     # sequences at a time
device = 'auto'               # 'auto', 'cpu', 'cuda'
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not in tests

SHUFFLES = 5
KINDS = ('space', 'word begins', 'inside a word', 'digit', 'punctuation', 'other')
NAMES = {'A': 'MHA', 'F': 'FFN', 'T': 'block'}
# Paul Tol's bright and muted colours, distinguishable for the colour-blind, as light and as dark backgrounds.
LIGHT = '#a6cbe8 #f7b6ab #a9dfb4 #f0e08a #d9b8e8 #9fe0e0 #f3c98b #c5cf9a #e8b3c8 #b8bde8'.split()
DARK = '#1f4e79 #7d2f25 #1f6137 #6b5d10 #5b2f75 #146466 #7a4a0f #49561c #75294a #353c80'.split()


# ----------------------------------------------------------------------------- text

def token_bytes(tokenizer, i):
    """The bytes of one token; of an id that is padding of the vocabulary, none."""
    if i >= tokenizer.n_vocab:
        return b''
    if tokenizer.name == 'bytes' or i == tokenizer.eot_token:
        return common.EOT.encode() if i == tokenizer.eot_token else bytes((i,))
    return tokenizer.decode_single_token_bytes(i)


def token_texts(tokenizer, ids):
    """Ids -> their texts, which together are the text: a character that spans tokens belongs to the last of them."""
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    return [decoder.decode(token_bytes(tokenizer, i)) for i in ids]


def kind_of(before, raw):
    """What kind of token the bytes `raw` are after the text `before`: an index of KINDS."""
    text = raw.decode('utf-8', errors='ignore')
    core = text.strip()
    if raw and not text or not raw or text == common.EOT:
        return 5
    if not core:
        return 0
    if core[0].isdigit():
        return 3
    if core[0].isalpha():
        return 2 if text[0].isalpha() and before[-1:].isalpha() else 1
    return 4 if core.isascii() else 5


def read_ids(tokenizer, block_size, checkpoint):
    """Sequences of the text -> (n, block_size + 1) int64. Raises ValueError when there is no text, or too little."""
    if text:
        try:
            with open(text, encoding='utf-8') as f:
                ids = np.array(tokenizer.encode_ordinary(f.read()), dtype=np.int64)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f'text={text} cannot be read as UTF-8 ({error})') from error
        where = text
    else:
        where = os.path.join(data_dir or checkpoint.get('settings', {}).get('data_dir', ''), 'val.bin')
        if not os.path.isfile(where):
            raise ValueError(f'no text at {where}: give a folder of prepare.py (--data_dir=...) or a file (--text=...)')
        ids = np.fromfile(where, dtype='<u2').astype(np.int64)
    size = min(block_size, len(ids) - 1, max(2, tokens))
    if size < 2:
        raise ValueError(f'{where} has {len(ids)} tokens, too few to look at: give more text')
    if ids.max() >= tokenizer.n_vocab:
        raise ValueError(f'{where} holds token id {ids.max()}, but the tokenizer {tokenizer.name!r} of {source} knows '
                         f'{tokenizer.n_vocab}: prepare the text with that one')
    room = (len(ids) - 1) // size
    n = min(room, max(1, tokens // size))
    return np.stack([ids[o:o + size + 1] for o in np.arange(n) * room // n * size])


# ----------------------------------------------------------------------------- routes: as they are, or as we say

@torch.no_grad()
def run(model, idx, device, batch, decide=None):
    """Loss of the sequences idx (n, T + 1) in nats per token, and the decisions: {(chunk, kind, step): Decision of all
    n T tokens}, ids and weights on the CPU.

    decide(key, rows) -> (ids, weights) of the tokens `rows` (a slice): what is done instead of what the router says.
    For MoD, whose weights are scores of the moment, the ids alone.
    """
    kept, loss, T = {}, 0.0, idx.shape[1] - 1
    for at in range(0, len(idx), batch):
        part = torch.from_numpy(idx[at:at + batch]).to(device)
        rows = slice(at * T, (at + len(part)) * T)
        for c, chunk in enumerate(model.chunks):
            if decide and chunk.phi == 'mod':  # the predictor says who goes through
                chunk.predictor.forward = lambda x, c=c: 1.0 - 2 * decide((c, 'T', 0), rows)[0].to(x).view(
                    *x.shape[:2], 1)
            elif decide:
                chunk.choose = lambda kind, x, h, state, c=c, chunk=chunk: instead(chunk, kind, x, h, c, rows, decide)
        try:
            x, decisions = model.features(part[:, :-1])
            loss += model.loss(x, part[:, 1:]).item() * part[:, 1:].numel()
        finally:
            for chunk in model.chunks if decide else ():
                (chunk.predictor if chunk.phi == 'mod' else chunk).__dict__.pop(
                    'forward' if chunk.phi == 'mod' else 'choose', None)
        for c, decided in enumerate(decisions):
            for d in decided:
                kept.setdefault((c, d.kind, d.step), []).append(d._replace(ids=d.ids.cpu(), weights=d.weights.cpu()))
    whole = {key: one[0]._replace(ids=torch.cat([d.ids for d in one]), weights=torch.cat([d.weights for d in one]),
                                  route=None) for key, one in kept.items()}
    return loss / idx[:, 1:].size, whole


def instead(chunk, kind, x, h, c, rows, decide):
    """A Decision as Chunk.choose would make it, with the ids and weights that `decide` says."""
    if (chunk.router_a if kind == 'A' else chunk.router_f) is None:
        return type(chunk).choose(chunk, kind, x, h, {})
    return chunk.decision(kind, h, *(t.to(x.device) for t in decide((c, kind, h), rows)), x)


def shuffled(decisions, order):
    """For run(): token i does what token order[i] did, in all decisions alike."""
    order = torch.as_tensor(order)
    return lambda key, rows: (decisions[key].ids[order[rows]], decisions[key].weights[order[rows]])


def frozen(decisions):
    """For run(): every token does at each decision what most do there, with the mean weights of those."""
    usual = {}
    for key, d in decisions.items():
        ids, order = d.ids.sort(dim=1)
        sets, which, counts = ids.unique(dim=0, return_inverse=True, return_counts=True)
        best = counts.argmax()
        usual[key] = sets[best], d.weights.gather(1, order)[which == best].mean(0)
    return lambda key, rows: tuple(t.expand(rows.stop - rows.start, -1).contiguous() for t in usual[key])


def sets_of(d):
    """A Decision -> what each token selected, as a bit mask (M,): bit i is module i, bit N is SKIP."""
    return (1 << d.ids).sum(1).numpy()


def set_name(mask, N):
    """The name of a set in a route: modules counted from 1 as in the paper, S for SKIP."""
    return '+'.join([str(i + 1) for i in range(N) if mask >> i & 1] + ['S'] * (mask >> N & 1))


# ----------------------------------------------------------------------------- numbers

def entropy(*columns):
    """Of the joint distribution of columns of whole numbers (M,), in bits."""
    counts = np.unique(np.stack(columns), axis=1, return_counts=True)[1]
    p = counts / counts.sum()
    return float((p * np.log2(1 / p)).sum())


def information(a, b, rng):
    """What column a says about column b, in bits: their mutual information I, adjusted for chance as Vinh et al. 2010.

    The plug-in estimate counts chance as information, and random pairings, SHUFFLES of them, have chance alone; but
    where a decides b there is no chance, and I is the entropy of b. So it is (I - chance) H(b) / (H(b) - chance).
    """
    most, rest = entropy(b), entropy(a) + entropy(b)
    chance = float(np.mean([rest - entropy(a, rng.permutation(b)) for _ in range(SHUFFLES)]))
    return (rest - entropy(a, b) - chance) * most / max(most - chance, 1e-12)


def transitions(masks, N):
    """Bit masks of consecutive steps, each (M,) -> (N + 1, N + 1): of the tokens that used module i at a step, the
    share that used j at the next (row N and column N: SKIP). Of k modules at a step, each counts 1/k. A row that
    nobody started from is 0."""
    bits = [(m[:, None] >> np.arange(N + 1) & 1).astype(float) for m in masks]
    bits = [b / b.sum(1, keepdims=True) for b in bits]
    flow = sum((a.T @ b for a, b in zip(bits, bits[1:])), np.zeros((N + 1, N + 1)))
    return flow / np.maximum(flow.sum(1, keepdims=True), 1e-12)


def analyse(model, idx, kinds, device, batch, seed):
    """All numbers, as a dict for JSON; and of each (chunk, kind) the tokens' routes: numbers (M,), and their names."""
    rng, T = np.random.default_rng(seed), idx.shape[1] - 1
    loss, decisions = run(model, idx, device, batch)
    M = idx.shape[0] * T
    token, position = idx[:, :-1].flatten(), np.tile(np.arange(T), len(idx))
    equal = np.empty(M, dtype=np.int64)  # each token -> another occurrence of it
    equal[np.argsort(token, kind='stable')] = np.lexsort((rng.random(M), token))
    others = dict(shuffled=shuffled(decisions, rng.permutation(M)), shuffled_equal=shuffled(decisions, equal),
                  frozen=frozen(decisions))
    losses = dict(as_it_is=loss, **{name: run(model, idx, device, batch, decide)[0] for name, decide in others.items()})
    out = dict(tokens=M, loss=losses, chunks=[])
    named, taken, of = {}, Counter(), Counter()
    for c, kind in dict.fromkeys((c, kind) for c, kind, _ in decisions):
        steps = sorted(h for cc, k, h in decisions if (cc, k) == (c, kind))
        ds = [decisions[c, kind, h] for h in steps]
        N = ds[0].N
        masks = [sets_of(d) for d in ds]
        skip = np.stack([m >> N & 1 for m in masks])                            # (H, M)
        table, which, counts = np.unique(np.stack(masks, 1), axis=0, return_inverse=True, return_counts=True)
        which, ranked = which.reshape(-1), np.argsort(-counts, kind='stable')
        number = np.argsort(ranked)[which]                                      # 0 is the commonest route
        names = [', '.join(set_name(m, N) for m in table[i].tolist()) for i in ranked]
        named[c, kind] = number, names
        real = np.stack([(m[:, None] >> np.arange(N) & 1).sum(1) for m in masks])
        taken[kind] += int(real.sum())
        of[kind] += real.size
        share = [[float((m >> i & 1).mean()) for m in masks] for i in range(N + 1)]
        out['chunks'].append(dict(
            chunk=c, kind=kind, N=N, steps=steps, modules_per_token=float(real.mean()),
            shares=share,  # a row a module, SKIP last, a column a step
            mean_weights=[[float(d.weights[d.ids == i].mean()) if (d.ids == i).any() else None for d in ds]
                          for i in range(N)],  # how loud a module speaks to those that select it; likewise
            transitions=transitions(masks, N).tolist(), distinct_routes=len(names),
            routes=[dict(route=names[i], share=float(counts[ranked[i]] / M)) for i in range(min(routes, len(names)))],
            off_the_commonest=float(1 - counts[ranked[0]] / M), route_entropy=entropy(number),
            information_token=information(token, number, rng), information_position=information(position, number, rng),
            skip_by_step=skip.mean(1).tolist(),
            skip_by_kind={KINDS[i]: float(skip[:, kinds == i].mean()) for i in np.unique(kinds).tolist()},
            skip_by_position=[float(s.mean()) for s in np.array_split(skip.reshape(len(ds), -1, T).mean((0, 1)),
                                                                      min(8, T))]))
    out['k_eff'] = {kind: taken[kind] / of[kind] for kind in taken}
    return out, named


# ----------------------------------------------------------------------------- pictures

def save(figure, numbers, name):
    """A figure as out_dir/<name>.png, its numbers as out_dir/<name>.json."""
    with common.atomic_write(os.path.join(out_dir, f'{name}.png')) as f:
        figure.savefig(f, format='png', dpi=130, bbox_inches='tight')
    plt.close(figure)
    with common.atomic_write(os.path.join(out_dir, f'{name}.json')) as f:
        f.write(json.dumps(numbers, indent=1).encode() + b'\n')
    print(os.path.join(out_dir, f'{name}.png'))


def title(one):
    return f'{NAMES[one["kind"]]}, chunk {one["chunk"] + 1}'


def labels(one):
    return [f'{NAMES[one["kind"]]}$_{i + 1}$' for i in range(one['N'])] + ['SKIP']


def grid(chunks, width, height):
    """Axes, one for each of `chunks`: attention and feed-forward of a chunk side by side."""
    columns = len({one['kind'] for one in chunks})
    rows = math.ceil(len(chunks) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.flat[len(chunks):]:
        axis.axis('off')
    return figure, axes.flat


def draw_shares(chunks):
    figure, axes = grid(chunks, 1.6 + 0.6 * max(len(one['steps']) for one in chunks), 0.8 + 0.4 * chunks[0]['N'])
    for axis, one in zip(axes, chunks):
        axis.imshow(one['shares'], cmap='Blues', vmin=0, vmax=1, aspect='auto')
        axis.set(title=title(one), xlabel='step', xticks=range(len(one['steps'])),
                 xticklabels=[h + 1 for h in one['steps']], yticks=range(one['N'] + 1), yticklabels=labels(one))
        for i, row in enumerate(one['shares']):
            for h, value in enumerate(row):
                axis.text(h, i, f'{value:.2f}', ha='center', va='center', fontsize=8,
                          color='white' if value > 0.6 else 'black')
    figure.tight_layout()
    save(figure, {title(one): one['shares'] for one in chunks}, 'shares')


def draw_transitions(chunks):
    """Figure 6: a node for each module, its share of the tokens in it, and arrows as wide as they are likely."""
    chunks = [one for one in chunks if len(one['steps']) > 1]
    if not chunks:
        return  # one step: nothing follows on anything
    figure, axes = grid(chunks, 5, 5)
    for axis, one in zip(axes, chunks):
        n = one['N'] + 1
        angle = np.pi / 2 - 2 * np.pi * np.arange(n) / n
        at = np.stack([np.cos(angle), np.sin(angle)], 1)
        share = np.mean(one['shares'], axis=1)
        for i in range(n):
            for j in range(n):
                p = one['transitions'][i][j]
                if p < 0.05:
                    continue
                style = dict(arrowstyle='-|>', mutation_scale=10, lw=0.5 + 4 * p, color='0.45', alpha=0.35 + 0.6 * p,
                             shrinkA=17, shrinkB=19)
                if i == j:  # a ring behind the node
                    axis.add_patch(plt.Circle(at[i] * 1.2, 0.2, fill=False, lw=style['lw'], color='0.45',
                                              alpha=style['alpha']))
                    if p >= 0.15:
                        axis.text(*(at[i] * 1.53), f'{p:.2f}', fontsize=7, ha='center', va='center')
                    continue
                # To the right of the straight line, so that there and back are two arrows. The number stands on its
                # arrow, near the beginning: in the middle others cross it.
                begin, end, d = at[i], at[j], at[j] - at[i]
                place = begin + 0.28 * d + 2 * 0.28 * 0.72 * 0.14 * np.array([d[1], -d[0]])
                axis.annotate('', end, begin, arrowprops={**style, 'connectionstyle': 'arc3,rad=0.14'})
                if p >= 0.15:
                    axis.text(*place, f'{p:.2f}', fontsize=7, ha='center', va='center',
                              bbox=dict(boxstyle='round,pad=0.1', fc='white', ec='none', alpha=0.8))
        for (x, y), s, label in zip(at, share, labels(one)):
            axis.scatter(x, y, s=1100, c=[plt.cm.Blues(0.1 + 0.6 * s)], edgecolors='0.3', zorder=3)
            axis.text(x, y, f'{label}\n{s:.2f}', fontsize=8, ha='center', va='center', zorder=4)
        axis.set(xlim=(-1.7, 1.7), ylim=(-1.5, 1.65), title=title(one), aspect='equal')
        axis.axis('off')
    figure.tight_layout()
    save(figure, {title(one): one['transitions'] for one in chunks}, 'transitions')


def draw_skips(chunks):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), sharey=True)
    for one in chunks:
        axes[0].plot([h + 1 for h in one['steps']], one['skip_by_step'], 'o-', label=title(one))
        axes[1].plot([KINDS.index(k) for k in one['skip_by_kind']], one['skip_by_kind'].values(), 'o', label=title(one))
        axes[2].plot(np.arange(1, len(one['skip_by_position']) + 1), one['skip_by_position'], 'o-', label=title(one))
    axes[0].set(xlabel='step', ylabel='share of tokens that select SKIP', ylim=(-0.03, 1.03))
    axes[0].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes[1].set_xticks(range(len(KINDS)), KINDS, rotation=30, ha='right')
    axes[2].set(xlabel=f'position, in {len(chunks[0]["skip_by_position"])} equal parts of the sequence')
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, {title(one): {k: one[k] for k in ('skip_by_step', 'skip_by_kind', 'skip_by_position')}
                  for one in chunks}, 'skips')


def draw_curves(runs):
    """Training loss, a running mean, and validation loss of each run, from its log.csv."""
    figure, axis = plt.subplots(figsize=(7, 4))
    numbers, drawn = {}, []
    for n, folder in enumerate(runs):
        path = os.path.join(folder, 'log.csv')
        if not os.path.isfile(path):
            raise ValueError(f'{folder} has no log.csv: name directories of runs, --curves=out/a,out/b')
        with open(path, newline='') as f:
            rows = list(csv.DictReader(f))
        train = [(int(r['step']), float(r['loss'])) for r in rows if r['loss']]
        val = [(int(r['step']), float(r['val_loss'])) for r in rows if r['val_loss']]
        if not train or not val:
            raise ValueError(f'{folder} has no finished steps yet: its curve comes later')
        width = max(1, len(train) // 50)
        mean = np.convolve([v for _, v in train], np.ones(width) / width, 'valid')
        axis.plot([s for s, _ in train[width - 1:]], mean, color=f'C{n}', alpha=0.5, lw=1)
        axis.plot(*zip(*val), 'o-', color=f'C{n}', label=f'{folder}: {val[-1][1]:.3f}')
        numbers[folder] = dict(train=train, validation=val)
        drawn += mean.tolist()
    axis.set(xlabel='step', ylabel='loss, nats per token (points: validation)')
    axis.set_ylim(0.97 * min(drawn), 1.1 * np.quantile(drawn, 0.97))  # where a fresh model starts is off the picture
    axis.legend(fontsize=8)
    figure.tight_layout()
    save(figure, numbers, 'curves')


def write_page(texts, T, named, chunks):
    """page.html: the first `page` tokens, once for each kind of module and chunk, coloured by route, with a line
    between sequences of T tokens. No script, no network; light or dark as the reader's system is."""
    style = ''.join(f'.r{i}{{background:var(--r{i})}}' for i in range(routes))
    light, dark = (';'.join(f'--r{i}:{colour[i % len(colour)]}' for i in range(routes)) for colour in (LIGHT, DARK))
    parts = [f'''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Routes of {html.escape(source)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">
<style>:root{{--bg:#fff;--fg:#111;--rest:#e3e3e3;{light}}}
@media(prefers-color-scheme:dark){{:root{{--bg:#151515;--fg:#e8e8e8;--rest:#3a3a3a;{dark}}}}}
body{{background:var(--bg);color:var(--fg);font:16px/1.7 system-ui,sans-serif;max-width:52rem;margin:2rem auto;
padding:0 1rem}}
.text{{white-space:pre-wrap;overflow-wrap:anywhere}}.text span,.key{{border-radius:3px;padding:1px 0}}
.key{{padding:1px 6px;display:inline-block;margin:2px}}summary{{cursor:pointer;font-weight:600;margin-top:1rem}}
.rest{{background:var(--rest)}}{style}</style></head><body>
<h1>Routes of {html.escape(source)}</h1><p>Each token has the colour of its route: what it selects at each step of a
chunk, modules counted from 1, S for SKIP. Point at a token to read its route. A line is drawn where another part of the
text begins.</p>''']
    for n, one in enumerate(chunks):
        number, names = named[one['chunk'], one['kind']]
        keys = [f'<span class="key r{i}">{route["route"]} &nbsp;{route["share"]:.1%}</span>'
                for i, route in enumerate(one['routes'])]
        rest = 1 - sum(r['share'] for r in one['routes'])
        keys.append(f'<span class="key rest">{max(0, one["distinct_routes"] - routes)} others &nbsp;{rest:.1%}</span>')
        spans = ('<hr>' * (at > 0 and at % T == 0)
                 + f'<span class="{f"r{i}" if i < routes else "rest"}" title="{names[i]}">{html.escape(t)}</span>'
                 for at, (i, t) in enumerate(zip(number.tolist(), texts[:page])))
        parts.append(f'<details{" open" * (n < 2)}><summary>{title(one)}</summary><p>{"".join(keys)}</p>'
                     f'<div class="text">{"".join(spans)}</div></details>')
    parts.append('</body></html>\n')
    with common.atomic_write(os.path.join(out_dir, 'page.html')) as f:
        f.write('\n'.join(parts).encode())
    print(os.path.join(out_dir, 'page.html'))


def main():
    global out_dir, device
    for key in ('tokens', 'routes', 'page', 'batch'):
        if settings[key] < 1:
            raise ValueError(f'{key}={settings[key]} must be at least 1')
    if seed < 0:
        raise ValueError(f'seed={seed} must be at least 0')
    device = common.find_device(device)
    checkpoint = load_checkpoint(source) if os.path.exists(source) else {}
    model = GPT.from_pretrained(source).to(device).eval()
    if model.cfg.phi == 'share' or model.cfg.vanilla:
        raise ValueError(f'{source} has no routers, so there is nothing to see: give a model of phase two')
    tokenizer = common.tokenizer(checkpoint['meta']['tokenizer'])
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    out_dir = out_dir or os.path.join(folder, 'routes')
    idx = read_ids(tokenizer, model.cfg.block_size, checkpoint)
    runs = [r.strip() for r in curves.split(',') if r.strip()]
    os.makedirs(out_dir, exist_ok=True)
    if runs:
        draw_curves(runs)

    raw = [token_bytes(tokenizer, i) for i in idx[:, :-1].flatten().tolist()]
    texts = token_texts(tokenizer, idx[:, :-1].flatten().tolist())
    kinds = np.array([kind_of(before, one) for before, one in zip([''] + texts, raw)])
    numbers, named = analyse(model, idx, kinds, device, batch, seed)
    chunks = numbers['chunks']
    draw_shares(chunks)
    draw_transitions(chunks)
    draw_skips(chunks)
    write_page(texts, idx.shape[1] - 1, named, chunks)
    with common.atomic_write(os.path.join(out_dir, 'analysis.json')) as f:
        f.write(json.dumps(dict(source=source, settings=settings, **numbers), indent=1).encode() + b'\n')
    print(os.path.join(out_dir, 'analysis.json'))

    loss = numbers['loss']
    print(f'\n{numbers["tokens"]:,} tokens. Loss {loss["as_it_is"]:.4f}; with routes shuffled between all tokens '
          f'{loss["shuffled"]:.4f}, between equal ones {loss["shuffled_equal"]:.4f}; with every decision frozen to its '
          f'commonest choice {loss["frozen"]:.4f}')
    k_eff = numbers['k_eff']
    print('Modules per token and step: ' + ', '.join(f'{NAMES[k]} {v:.3f}' for k, v in k_eff.items())
          + (f'. Table 1 with them: python bench.py table1 --k_a={k_eff["A"]:.3f} --k_f={k_eff["F"]:.3f}'
             if model.cfg.phi == 'mom' else ''))
    print('\n| | routes | off the commonest | entropy, bits | told by the token | by the position | commonest |\n'
          '|---|---|---|---|---|---|---|')
    for one in chunks:
        print(f'| {title(one)} | {one["distinct_routes"]:,} | {one["off_the_commonest"]:.1%} | '
              f'{one["route_entropy"]:.2f} | {one["information_token"]:.2f} | {one["information_position"]:.2f} | '
              f'{one["routes"][0]["route"]} |')


if __name__ == '__main__':
    main()
