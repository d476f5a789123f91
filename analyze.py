"""See what the routers do: which modules, in which order, for which tokens, and whether it matters.

  python analyze.py --source=out/mom_demo                     on the validation text of its training
  python analyze.py --source=out/mom_demo --text=story.txt    on a text of your own
  python analyze.py --source=out/mom_demo --curves=out/gpt2_demo_continued   beside other runs

out_dir gets page.html, one page with all of it, which needs no network: the run beside those it is
compared with, a text with every token coloured by its route, pictures and a sample. The pictures are
there as files too (.png), each with its numbers (.json): shares of the modules by step, transitions
between modules (Figure 6), SKIP by step, token and position, loss curves. analysis.json says how far
the routes depend on the token:

- off the commonest: the share of tokens that take another route through a chunk than most;
- information: what a token says about its route, in bits, and what its position says. Few samples
  look like information; so the scale is that of 0 for the mean of five random pairings of tokens and
  routes, and of the entropy of the routes for a token that decides all (adjusted mutual information);
- loss: as it is; with the routes, weights included, exchanged at random between all tokens, or
  between occurrences of the same token; and with every decision frozen to its commonest choice, at
  the mean weights of those who chose it. If routes did not matter, all would be equal; if the token
  alone decided them, the exchange between equals were free.

A route is what a token selects in all the steps of one chunk, of attention modules (A) or of
feed-forward modules (F).

Shapes: n sequences of T tokens, M = n T, N modules of a pool, K selected, H steps.
"""
import codecs
import csv
import html
import io
import itertools
import json
import os
import re
import string
import sys
import textwrap
from collections import Counter
from contextlib import contextmanager
from functools import partial

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import common
from model import GPT, MoMConfig
from weights import load_checkpoint

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# --- what
source = 'out/mom_demo'       # a run's directory or checkpoint; a GPT-2 has no routers
text = ''                     # a UTF-8 file; '' is val.bin of data_dir
data_dir = ''                 # a folder of prepare.py; '' is that of the training
tokens = 20_000               # of the text, at most, in sequences of block_size that are spread over it
curves = ''                   # runs to compare with, separated by commas; its own is among them
out_dir = ''                  # '' is <directory of source>/routes
# --- how
routes = 10                   # how many of the commonest routes are listed, and coloured
page = 1_000                  # tokens on the coloured page
seed = 1337                   # of the random pairings, and of the sample
batch = 8                     # sequences at a time
device = 'auto'               # 'auto', 'cpu', 'cuda'
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not in tests

SHUFFLES = 5
KINDS = ('space', 'word begins', 'inside a word', 'digit', 'punctuation', 'other')
NAMES = {'A': 'MHA', 'F': 'FFN', 'T': 'block'}
files = []                # that were written
PROMPT, SAMPLE = 48, 300  # tokens of the sample on the page: what is given, what the model writes


# ----------------------------------------------------------------------------- text

def token_bytes(tokenizer, i):
    """The bytes of one token; of an id that is padding of the vocabulary, none."""
    if i >= tokenizer.n_vocab:
        return b''
    if i == tokenizer.eot_token:
        return common.EOT.encode()
    return bytes((i,)) if tokenizer.name == 'bytes' else tokenizer.decode_single_token_bytes(i)


def token_texts(tokenizer, ids):
    """Ids -> their texts, which together are the text.

    A character that spans tokens belongs to the last of them.
    """
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


def read_ids(tokenizer, block_size, folder):
    """Sequences of the setting `text`, or of val.bin in `folder`, evenly spread over it.

    Returns ids (n, T + 1) int64, and of each sequence the ids before it in the text, 4 at most: as
    many tokens as a character can span. Raises ValueError when there is no text, or too little.
    """
    where = text or os.path.join(folder, 'val.bin')
    if text:
        ids = np.array(tokenizer.encode_ordinary(common.read_text(text)), dtype=np.int64)
    elif os.path.isfile(where):
        ids = np.fromfile(where, dtype='<u2').astype(np.int64)
    else:
        raise ValueError(f'no text at {where}: give a folder of prepare.py (--data_dir=...) '
                         'or a file (--text=...)')
    size = min(block_size, len(ids) - 1, max(2, tokens))
    if size < 2:
        raise ValueError(f'{where} has {len(ids)} tokens, too few to look at: give more text')
    if ids.max() >= tokenizer.n_vocab:
        raise ValueError(f'{where} holds token id {ids.max()}, but the tokenizer {tokenizer.name!r} '
                         f'of {source} knows {tokenizer.n_vocab}: prepare the text with that one')
    room = (len(ids) - 1) // size
    n = min(room, max(1, tokens // size))
    starts = (np.arange(n) * room // n * size).tolist()
    before = [ids[max(0, start - 4):start].tolist() for start in starts]
    return np.stack([ids[start:start + size + 1] for start in starts]), before


def texts_and_kinds(tokenizer, idx, before):
    """The input tokens of sequences idx (n, T + 1), as read_ids returns them -> texts (M), kinds (M,)."""
    texts, kinds = [], []
    for ids, lead in zip(idx[:, :-1].tolist(), before):
        its = ['', *token_texts(tokenizer, [*lead, *ids])][len(lead):]  # one more: what is before
        texts += its[1:]
        kinds += [kind_of(one, token_bytes(tokenizer, i)) for one, i in zip(its, ids)]
    return texts, np.array(kinds)


# ----------------------------------------------------------------------------- routes: as they are, or as we say

@torch.no_grad()
def run(model, idx, device, batch, decide=None, name=''):
    """Loss of the sequences idx (n, T + 1) in nats per token, and the decisions:
    {(chunk, kind, step): Decision of all M tokens}, ids and weights on the CPU.

    decide(key, rows) -> (ids, weights) of the tokens `rows` (a slice): what is done instead of what
    the router says. For MoD, whose weights are scores of the moment, the ids alone. name: of the
    progress bar, which is there on a terminal.
    """
    kept, loss, T = {}, 0.0, idx.shape[1] - 1
    for at in tqdm(range(0, len(idx), batch), name, leave=False, disable=None):
        part = torch.from_numpy(idx[at:at + batch]).to(device)
        rows = slice(at * T, (at + len(part)) * T)
        with deciding(model, decide, rows):
            x, decisions = model.features(part[:, :-1])
        loss += model.loss(x, part[:, 1:]).item() * part[:, 1:].numel()
        for c, decided in enumerate(decisions):
            for d in decided:
                d = d._replace(ids=d.ids.cpu(), weights=d.weights.cpu(), route=None)
                kept.setdefault((c, d.kind, d.step), []).append(d)
    whole = {}
    for key, parts in kept.items():
        ids, weights = (torch.cat([getattr(d, name) for d in parts]) for name in ('ids', 'weights'))
        whole[key] = parts[0]._replace(ids=ids, weights=weights)  # (M, K)
    return loss / idx[:, 1:].size, whole


@contextmanager
def deciding(model, decide, rows):
    """While it lasts, `decide` (see run) stands in for the routers, for the tokens `rows`."""
    for c, chunk in enumerate(model.chunks if decide else ()):
        if chunk.phi == 'mod':
            chunk.predictor.forward = partial(predict, c, rows, decide)
        else:
            chunk.choose = partial(instead, chunk, c, rows, decide)
    try:
        yield
    finally:
        for chunk in model.chunks:
            chunk.__dict__.pop('choose', None)
            if chunk.predictor:
                chunk.predictor.__dict__.pop('forward', None)


def predict(c, rows, decide, x):
    """For Chunk.predictor of MoD, which says who goes through: x (B, T, C) -> logits (B, T, 1)."""
    ids, _ = decide((c, 'T', 0), rows)  # 0 the block, 1 SKIP
    return 1.0 - 2 * ids.to(x).view(*x.shape[:2], 1)


def instead(chunk, c, rows, decide, kind, x, h, state):
    """For Chunk.choose: a Decision with the ids and weights that `decide` says."""
    if (chunk.router_a if kind == 'A' else chunk.router_f) is None:
        return type(chunk).choose(chunk, kind, x, h, {})
    ids, weights = decide((c, kind, h), rows)
    return chunk.decision(kind, h, ids.to(x.device), weights.to(x.device), x)


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
    return lambda key, rows: tuple(t.expand(rows.stop - rows.start, -1).contiguous()
                                   for t in usual[key])


def sets_of(d):
    """A Decision -> what each token selected, as a bit mask (M,): bit i is module i, bit N is SKIP."""
    return (1 << d.ids).sum(1).numpy()


def set_name(mask, N):
    """The name of a set in a route: modules counted from 1 as in the paper, S for SKIP."""
    return '+'.join([str(i + 1) for i in range(N) if mask >> i & 1] + ['S'] * (mask >> N & 1))


def short(route):
    """A route with what repeats said once: '1, 2+3, 2+3' -> '1, 2+3 ×2'."""
    runs = [(name, len([*same])) for name, same in itertools.groupby(route.split(', '))]
    return ', '.join(name if n == 1 else f'{name} ×{n}' for name, n in runs)


# ----------------------------------------------------------------------------- numbers

def entropy(*columns):
    """Of the joint distribution of columns of whole numbers (M,), in bits."""
    counts = np.unique(np.stack(columns), axis=1, return_counts=True)[1]
    p = counts / counts.sum()
    return float((p * np.log2(1 / p)).sum())


def information(a, b, rng):
    """What column a says about column b, in bits: their mutual information I, adjusted for chance as
    Vinh et al. 2010.

    The plug-in estimate counts chance as information, and random pairings, SHUFFLES of them, have
    chance alone; but where a decides b there is no chance, and I is the entropy of b. So it is
    (I - chance) H(b) / (H(b) - chance).
    """
    most, rest = entropy(b), entropy(a) + entropy(b)
    chance = float(np.mean([rest - entropy(a, rng.permutation(b)) for _ in range(SHUFFLES)]))
    return (rest - entropy(a, b) - chance) * most / max(most - chance, 1e-12)


def traffic(masks, N):
    """Bit masks of consecutive steps, each (M,) -> (N + 1, N + 1): of all that tokens do from one step
    to the next, the share that goes from module i to j (row N and column N: SKIP). Of k modules at a
    step, each counts 1/k. The sum is 1, or 0 if there is one step."""
    bits = [(m[:, None] >> np.arange(N + 1) & 1).astype(float) for m in masks]  # (M, N + 1)
    bits = [b / b.sum(1, keepdims=True) for b in bits]
    flow = sum((a.T @ b for a, b in zip(bits, bits[1:])), np.zeros((N + 1, N + 1)))
    return flow / max(flow.sum(), 1e-12)


def transitions(masks, N):
    """The same for each module i by itself: of the tokens that used it at a step, the share that used j
    at the next. A row that nobody started from is 0."""
    flow = traffic(masks, N)
    return flow / np.maximum(flow.sum(1, keepdims=True), 1e-15)


def analyse(model, idx, kinds, device, batch, seed):
    """All numbers, as a dict for JSON; and of each (chunk, kind) the tokens' routes: numbers (M,), the
    commonest is 0, and their names."""
    rng, T = np.random.default_rng(seed), idx.shape[1] - 1
    loss, decisions = run(model, idx, device, batch, name='pass 1 of 4, own routes')
    token, position = idx[:, :-1].flatten(), np.tile(np.arange(T), len(idx))
    M = len(token)
    equal = np.empty(M, dtype=np.int64)  # each token -> another occurrence of it
    equal[np.argsort(token, kind='stable')] = np.lexsort((rng.random(M), token))
    others = {'shuffled': shuffled(decisions, rng.permutation(M)),
              'shuffled_equal': shuffled(decisions, equal),
              'frozen': frozen(decisions)}
    losses = {'as_it_is': loss}
    for n, (name, decide) in enumerate(others.items()):
        losses[name], _ = run(model, idx, device, batch, decide, f'pass {n + 2} of 4, {name}')
    seen = Counter(kinds.tolist())
    out = dict(tokens=M, tokens_by_kind={KINDS[i]: seen[i] for i in sorted(seen)}, loss=losses, chunks=[])
    named, taken, of = {}, Counter(), Counter()
    for c, kind in dict.fromkeys((c, kind) for c, kind, _ in decisions):
        its = [d for (cc, k, _), d in sorted(decisions.items()) if (cc, k) == (c, kind)]
        numbers, named[c, kind] = of_chunk(its, token, position, kinds, T, rng)
        has_skip = model.cfg.skip or kind == 'T'
        out['chunks'].append(dict(chunk=c, kind=kind, has_skip=has_skip, **numbers))
        taken[kind] += numbers['modules_per_token'] * len(its)
        of[kind] += len(its)
    out['k_eff'] = {kind: taken[kind] / of[kind] for kind in taken}
    return out, named


def of_chunk(ds, token, position, kinds, T, rng):
    """The Decisions of one kind in one chunk, one for each step -> its numbers, and its routes as
    analyse returns them. token, position, kinds (M,): of the tokens."""
    M, N = len(token), ds[0].N
    masks = [sets_of(d) for d in ds]
    skip = np.stack([m >> N & 1 for m in masks])                                      # (H, M)
    real = np.stack([(m[:, None] >> np.arange(N) & 1).sum(1) for m in masks])         # (H, M)
    table, which, counts = np.unique(np.stack(masks, 1), axis=0, return_inverse=True,
                                     return_counts=True)
    ranked = np.argsort(-counts, kind='stable')
    number = np.argsort(ranked)[which.reshape(-1)]  # (M,)
    names = [', '.join(set_name(m, N) for m in table[i].tolist()) for i in ranked]
    shares = counts[ranked] / M
    positions = np.array_split(skip.reshape(len(ds), -1, T).mean((0, 1)), min(8, T))
    return dict(
        N=N, steps=[d.step for d in ds], modules_per_token=float(real.mean()),
        # A row a module, SKIP last, a column a step.
        shares=[[float((m >> i & 1).mean()) for m in masks] for i in range(N + 1)],
        # How loud a module speaks to those that select it; likewise.
        mean_weights=[[mean_weight(d, i) for d in ds] for i in range(N)],
        transitions=transitions(masks, N).tolist(), traffic=traffic(masks, N).tolist(),
        distinct_routes=len(names),
        routes=[dict(route=name, share=float(p)) for name, p in zip(names[:routes], shares)],
        off_the_commonest=float(1 - shares[0]), route_entropy=entropy(number),
        information_token=information(token, number, rng),
        information_position=information(position, number, rng),
        skip_by_step=skip.mean(1).tolist(),
        skip_by_kind={KINDS[i]: float(skip[:, kinds == i].mean()) for i in np.unique(kinds)},
        skip_by_position=[float(part.mean()) for part in positions]), (number, names)


def mean_weight(d, i):
    """Of module i in a Decision, over those that select it, or None if nobody does."""
    its = d.weights[d.ids == i]
    return float(its.mean()) if len(its) else None


# ----------------------------------------------------------------------------- runs, side by side

SAME = ('data_dir', 'init_from', 'seed', 'batch_size', 'block_size')  # who shares these had the same batches


def read_run(folder):
    """A run of train.py -> a dict: what it is, and what its log.csv says. Losses in nats per token.

    Raises ValueError if it has no log or no finished steps.
    """
    path = os.path.join(folder, 'log.csv')
    if not os.path.isfile(path):
        raise ValueError(f'{folder} has no log.csv: name directories of runs, --curves=out/a,out/b')
    with open(path, newline='') as f:
        rows = list(csv.DictReader(f))
    steps = [row for row in rows if row['loss']]
    val = [row for row in rows if row['val_loss']]
    if not steps or not val:
        raise ValueError(f'{folder} has no finished steps yet: its curve comes later')
    checkpoint = load_checkpoint(folder)
    cfg = MoMConfig(**checkpoint['model_config'])
    with torch.device('meta'):  # enough to count with
        model = GPT(cfg)
    measured = [float(val[-1][k]) for k in ('k_a', 'k_f') if val[-1].get(k)]  # modules per token and step
    flops = model.flops_per_token(cfg.block_size, *measured)
    speed = [float(row['tokens_per_s']) for row in steps if row.get('tokens_per_s')]
    bits = [float(row['val_bits_per_byte']) for row in val if row.get('val_bits_per_byte')]
    return dict(
        folder=folder, name=common.run_name(folder), vanilla=cfg.vanilla,
        assembly=assembly(cfg), parameters=model.num_params()[0], steps=int(steps[-1]['step']),
        mflops=flops / 1e6, speed=float(np.median(speed)) if speed else None,
        train=[(int(row['step']), float(row['loss'])) for row in steps],
        validation=[(int(row['step']), float(row['val_loss'])) for row in val],
        bits=[bits[0], bits[-1]] if bits else None,
        same={key: checkpoint.get('settings', {}).get(key) for key in SAME})


def assembly(cfg):
    """What a model is called: K2H4S, chunks 1-4-1."""
    if cfg.vanilla:
        return f'vanilla, {cfg.n_layer} layers'
    name = f'K{cfg.K}H{cfg.H}{"S" * cfg.skip}' if cfg.phi == 'mom' else cfg.phi
    return f'{name}, chunks {cfg.chunks}'


def find_base(runs, own):
    """Of `runs`, the vanilla one with the batches and the beginnings of the run `own`, or None."""
    return next((one for one in runs if one['vanilla'] and own and one['same'] == own['same']), None)


def conclusion(own, base):
    """What a comparison with the vanilla run on the same batches comes to: two sentences, or ''."""
    if not base or own['steps'] != base['steps']:
        return ''
    (a, b), unit = last_losses(own, base)
    where = f'{abs(a - b):.3f} {"below" if a < b else "above"}'
    times = own['mflops'] / base['mflops']
    return (f'After {own["steps"]:,} steps on the same batches {own["name"]} is at {a:.3f} {unit}, {where} '
            f'vanilla ({base["name"]}, {b:.3f}). A token costs it {own["mflops"]:.2f} MFLOPs, {times:.2f} '
            f'times the {base["mflops"]:.2f} of vanilla: the steps are equal here, the cost is not.')


def last_losses(*runs):
    """The last validation losses of runs and their unit: bits per byte, where all logs have it."""
    if all(one['bits'] for one in runs):
        return [one['bits'][1] for one in runs], 'bits per byte'
    return [one['validation'][-1][1] for one in runs], 'nats per token'


# ----------------------------------------------------------------------------- pictures
# A picture is a list of panels (draw, width, height), in inches: draw(axis) fills one. The .png shows
# all of them; the page takes them one by one, as SVG, so that they fit on a phone and into the dark.

INK, PAPER, BLUE = '#010101', '#fefefe', '#2f7ec7'  # of ink and paper the page makes its own colours
plt.rcParams.update({key: INK for key in ('text.color', 'axes.edgecolor', 'axes.labelcolor',
                                          'xtick.color', 'ytick.color')})
plt.rcParams.update({'font.size': 9, 'axes.titlesize': 10, 'legend.frameon': False,
                     'svg.fonttype': 'none', 'svg.hashsalt': '', 'figure.constrained_layout.use': True})

SAID = {  # what each picture shows
    'shares': 'How many tokens take each module at each step: 1.00 is all of them. A column adds up to '
              'more than 1 where a token takes several at a step.',
    'transitions': 'What follows on what. In a node: the share of tokens that take it, as a mean over '
                   'the steps. At an arrow: of those who took the module it leaves, the share that take '
                   'the other at the next step; it is wider the larger that share, and darker the more '
                   'tokens go that way. Where a token takes k at a step, each counts 1/k. Left out are '
                   'arrows with less than 1% of all traffic, and numbers with less than 2% or below 0.15.',
    'skips': 'Who selects SKIP: the share of tokens, by the step, by the kind of token (below it, how '
             'many of that kind were looked at), and by the place in the sequence.',
    'curves': 'Thin: the training loss, as a running mean. Points: the validation loss. Values off the '
              'picture are left out.'}


def save(name, panels, numbers, columns):
    """The panels as out_dir/<name>.png, `columns` in a row, and their numbers as <name>.json.

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
    write(f'{name}.png', image(figure, 'png', dpi=130))
    write(f'{name}.json', json.dumps(numbers, indent=1).encode() + b'\n')
    drawn = ''.join(map(drawing, panels))
    return f'<figure><div>{drawn}</div><figcaption>{SAID[name]}</figcaption></figure>'


def image(figure, kind, **how):
    """A figure as the bytes of a file, and closed."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, **how)
    plt.close(figure)
    return out.getvalue()


def write(name, content):
    """A file of the results, whole or not at all."""
    with common.atomic_write(os.path.join(out_dir, name)) as f:
        f.write(content)
    files.append(os.path.join(out_dir, name))


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
    svg = re.sub(r'(\.\d\d)\d+', r'\1', re.sub(r'\s*\n\s*', ' ', svg))
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


def draw_shares(chunks):
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
    return save('shares', panels, numbers, len({one['kind'] for one in chunks}))


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


def draw_transitions(chunks):
    """Figure 6. Where there is one step, nothing follows on anything."""
    chunks = [one for one in chunks if len(one['steps']) > 1]
    panels = []
    for one in chunks:
        width, height = np.ptp(places(len(labels(one))), axis=0) + 1.3
        panels.append((partial(draw_graph, one), 1.45 * width, 1.45 * height + 0.3))
    numbers = {title(one): one['transitions'] for one in chunks}
    return save('transitions', panels, numbers, len({one['kind'] for one in chunks}))


def places(n):
    """Where n nodes of radius 0.21 stand (n, 2): on a circle, so wide that the arrows between them show."""
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
            # stands on its arrow, at t of the way, near the beginning: in the middle others cross it.
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


def draw_skips(chunks, seen):
    """Three views, the kinds of modules side by side. seen: how many tokens there are of each kind."""
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
    return save('skips', panels, numbers, max(1, len(kinds)))


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
        axis.plot(range(1, parts + 1), one['skip_by_position'], 'o-', label=f'chunk {one["chunk"] + 1}')
    axis.set_xlabel(f'position, in {parts} equal parts of the sequence')


def draw_curves(runs, base):
    """Losses of the runs, and how far those are from `base` that had its batches."""
    if not runs:
        return ''
    panels = [(partial(draw_losses, runs), 5, 3.4)]
    others = [one for one in runs if base and one is not base and one['same'] == base['same']]
    if others:
        panels.append((partial(draw_differences, others, base, runs), 5, 3.4))
    numbers = {one['folder']: {key: one[key] for key in ('train', 'validation')} for one in runs}
    return save('curves', panels, numbers, 2)


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
    every = np.concatenate([mean for _, mean in means] + [[one['validation'][-1][1]] for one in runs])
    top = 1.1 * np.quantile(every, 0.97)
    for n, (one, (steps, mean)) in enumerate(zip(runs, means)):
        axis.plot(*within(zip(steps, mean), top), color=f'C{n}', alpha=0.6, lw=1)
        axis.plot(*within(one['validation'], top), 'o-', color=f'C{n}', label=one['name'])
    axis.set(xlabel='step', ylabel='loss, nats per token', ylim=(0.97 * every.min(), top), title='loss')
    axis.legend(fontsize=8)


def draw_differences(others, base, runs, axis):
    train, val = dict(base['train']), dict(base['validation'])
    axis.axhline(0, color=INK, lw=0.8)
    for one in others:
        colour = f'C{runs.index(one)}'
        both = [(step, v - train[step]) for step, v in one['train'] if step in train]
        measured = [(step, v - val[step]) for step, v in one['validation'] if step in val]
        axis.plot(*smooth(both), color=colour, alpha=0.6, lw=1)
        axis.plot(*zip(*measured), 'o-', color=colour, label=one['name'])
    axis.set(xlabel='step', ylabel='nats per token; below 0 is better',
             title=f'difference from {base["name"]}, same batches')
    axis.legend(fontsize=8)


# ----------------------------------------------------------------------------- the page

def write_page(sections):
    """page.html from report.html: `sections` are its headings and their HTML; what is empty is left out.

    Colours of routes are spread over the hues by the golden angle, and over two lightnesses: no two are
    the same, and neighbours in rank are far apart.
    """
    body = [f'<section><h2>{heading}</h2>{part}</section>' for heading, part in sections.items() if part]
    hues = [f'{137.508 * i % 360:.0f}' for i in range(routes)]
    colours = {'light': (0.90, 0.83, 0.09), 'dark': (0.36, 0.45, 0.09)}
    themes = {}
    for theme, (one, other, chroma) in colours.items():
        themes[theme] = ';'.join(f'--r{i}:oklch({(one, other)[i % 2]} {chroma} {hue})'
                                 for i, hue in enumerate(hues))
    style = ''.join(f'.r{i}{{background:var(--r{i})}}' for i in range(routes))
    with open(os.path.join(common.ROOT, 'report.html'), encoding='utf-8') as f:
        template = string.Template(f.read())
    name = html.escape(common.run_name(source))
    write('page.html', template.substitute(name=name, style=style, body='\n'.join(body), **themes).encode())


def table(rows, left=1):
    """Rows of cells, the first one the heading, as an HTML table; `left` columns are aligned left."""
    lines = []
    for n, row in enumerate(rows):
        tag = 'td' if n else 'th'
        cells = [f'<{tag}{" class=n" * (i >= left)}>{html.escape(cell)}</{tag}>' for i, cell in enumerate(row)]
        lines.append(f'<tr>{"".join(cells)}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def runs_table(runs):
    if not runs:
        return ''
    bits = all(one['bits'] for one in runs)
    unit = 'bits/byte' if bits else 'nats/token'
    rows = [['run', 'model', 'parameters', 'MFLOPs per token', 'steps', f'{unit} before', 'after', 'tokens/s']]
    for one in runs:
        losses = one['bits'] if bits else [one['validation'][i][1] for i in (0, -1)]
        speed = f'{one["speed"]:,.0f}' if one['speed'] else ''
        rows.append([one['name'], one['assembly'], f'{one["parameters"]:,}', f'{one["mflops"]:.2f}',
                     f'{one["steps"]:,}', *(f'{loss:.3f}' for loss in losses), speed])
    return table(rows, left=2)


def losses_table(loss):
    meaning = {'as_it_is': 'its own routes',
               'shuffled_equal': 'the routes of another occurrence of the same token',
               'shuffled': 'the routes of any other token',
               'frozen': 'one route for all: at each step the commonest choice'}
    rows = [['the same model with', 'nats per token', 'more than its own']]
    for key, name in meaning.items():
        rows.append([name, f'{loss[key]:.4f}', f'{loss[key] - loss["as_it_is"]:+.4f}'])
    return table(rows)


ROUTES_TABLE = ['', 'routes', 'off the commonest', 'entropy, bits', 'told by the token', 'by the position',
                'commonest']
ROUTES_LEGEND = ('Routes: how many different ones. Off the commonest: the share of tokens that take another '
                 'one than most. Entropy: how much there is to know about a route, in bits; of these, how '
                 'many the token itself tells, and how many its position.')


def routes_rows(chunks):
    return [[title(one), f'{one["distinct_routes"]:,}', f'{one["off_the_commonest"]:.1%}',
             f'{one["route_entropy"]:.2f}', f'{one["information_token"]:.2f}',
             f'{one["information_position"]:.2f}', short(one['routes'][0]['route'])] for one in chunks]


def coloured(texts, kinds, T, named, chunks, mark):
    """The first `page` tokens, once for each kind of module and chunk, coloured by route, with a line
    between sequences of T tokens. mark: where words begin, for tokens that are bytes."""
    texts = texts[:page]
    begins = np.cumsum([0, *map(len, texts)]).tolist()
    # A single space between words may vanish at a line's end, as spaces do.
    single = {found.start() for found in re.finditer(r'(?<=\S) (?=\S)', ''.join(texts))}
    classes, shown = [], []
    for text, begin, kind in zip(texts, begins, kinds):
        classes.append(' s' * (begin in single) + ' w' * (mark and KINDS[kind] == 'word begins'))
        shown.append(html.escape(text).replace('\n', '<b></b>\n').replace('\r', '<i></i>'))  # marks
    parts = []
    for n, one in enumerate(chunks):
        number, names = named[one['chunk'], one['kind']]
        names = [short(name) for name in names]
        keys = [f'<button class="r{i}" value="{names[i]}">{names[i]} <small>{route["share"]:.1%}</small></button>'
                for i, route in enumerate(one['routes'])]
        if one['distinct_routes'] > routes:
            rest = 1 - sum(route['share'] for route in one['routes'])
            keys.append(f'<span class="rest">{one["distinct_routes"] - routes:,} others '
                        f'<small>{rest:.1%}</small></span>')
        spans = []
        for at, i in enumerate(number[:page].tolist()):
            line = '<hr>' * (at > 0 and at % T == 0)
            colour = f'r{i}' if i < routes else 'rest'
            spans.append(f'{line}<span class="{colour}{classes[at]}" title="{names[i]}">{shown[at]}</span>')
        parts.append(f'<details{" open" * (n < 2)}><summary>{title(one)}</summary>'
                     f'<p class="keys">{"".join(keys)}</p>'
                     f'<div class="text" tabindex="0" aria-label="{title(one)}: arrow keys go from token '
                     f'to token">{"".join(spans)}</div><output></output></details>')
    return ''.join(parts)


def sample(model, tokenizer, ids, device):
    """What the model makes of the first tokens of the text, as HTML."""
    torch.manual_seed(seed)
    given = ids[:PROMPT]
    stop = tokenizer.eot_token
    new = model.generate(torch.tensor([given], device=device), SAMPLE, 0.8, 200, stop=stop,
                         vocab=tokenizer.n_vocab)[0, len(given):].tolist()
    new = new[:new.index(stop)] if stop in new else new
    whole, start = tokenizer.decode(given + new), tokenizer.decode(given)
    return (f'<p class="sample"><i>{html.escape(start)}</i>{html.escape(whole[len(start):])}</p>'
            f'<p>Given: the grey beginning, {len(given)} tokens of the text. Drawn at temperature 0.8 '
            'among the 200 likeliest tokens.</p>')


HOW = {  # what a stranger needs to know of a model
    'mom': 'Every chunk of several layers is taken apart into attention modules (MHA) and feed-forward '
           'modules (FFN). It runs in {H} steps, and at each of them routers choose, for every token by '
           'itself, {K} of the modules of either kind.',
    'layer_skip': 'In every chunk of several layers routers decide, for every token by itself, whether '
                  'it takes the attention (MHA) and the feed-forward module (FFN) of a layer.',
    'early_exit': 'In every chunk of several layers routers decide, for every token by itself, whether '
                  'it takes the attention (MHA) and the feed-forward module (FFN) of a layer. Who skips '
                  'one skips all that follow.',
    'moe': 'Every layer, a chunk of one, has {experts} feed-forward modules (FFN), and a router chooses '
           '{K} of them for every token by itself.',
    'moe_share': 'The feed-forward modules (FFN) of a chunk of several layers are in one pool, and at '
                 'each layer a router chooses {K} of them, for every token by itself.',
    'mod': 'At every other layer, a chunk of one, a router decides, for every token by itself, whether '
           'it goes through the block of that layer or passes it by (SKIP).'}
CAN_SKIP = ' SKIP is a choice too: to take one module less.'


def introduction(cfg, where, count):
    """The first paragraph of the page."""
    name = html.escape(common.run_name(source))
    how = HOW[cfg.phi].format(K=cfg.K, H=cfg.H, experts=cfg.experts)
    skip = CAN_SKIP * (cfg.skip and cfg.phi != 'mod')
    return (f'<p>{name} is a model of {cfg.n_layer} layers, {html.escape(assembly(cfg))}. {how}{skip} What a '
            'token takes at the steps of one chunk is its route. This page shows the routes of '
            f'{count:,} tokens of {html.escape(where)}.</p>')


def read_runs(names, folder):
    """The runs in the setting `curves`, and the one in `folder`, if it has a log -> runs, its own or None."""
    folders = [name.strip() for name in names.split(',') if name.strip()]
    if os.path.isfile(os.path.join(folder, 'log.csv')):
        if not any(os.path.realpath(one) == os.path.realpath(folder) for one in folders):
            folders.append(folder)
    runs = [read_run(one) for one in folders]
    own = next((one for one in runs if os.path.realpath(one['folder']) == os.path.realpath(folder)), None)
    return runs, own


def main():
    global out_dir
    for key in ('tokens', 'routes', 'page', 'batch'):
        if settings[key] < 1:
            raise ValueError(f'{key}={settings[key]} must be at least 1')
    if seed < 0:
        raise ValueError(f'seed={seed} must be at least 0')
    again = common.command('python', *sys.argv)
    common.if_stopped = f'Nothing is written. Begin anew with {again}'
    where = common.find_device(device)
    model = GPT.from_pretrained(source).to(where).eval()
    cfg = model.cfg
    if cfg.phi == 'share' or cfg.vanilla:
        raise ValueError(f'{source} has no routers, so there is nothing to see: give a model of phase two')
    tokenizer = common.tokenizer_of(source)
    data = data_dir or load_checkpoint(source).get('settings', {}).get('data_dir', '')
    idx, before = read_ids(tokenizer, cfg.block_size, data)
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    runs, own = read_runs(curves, folder)
    base = find_base(runs, own)
    out_dir = common.results_folder(out_dir or os.path.join(folder, 'routes'))

    texts, kinds = texts_and_kinds(tokenizer, idx, before)
    numbers, named = analyse(model, idx, kinds, where, batch, seed)
    chunks, loss, k_eff = numbers['chunks'], numbers['loss'], numbers['k_eff']
    said = conclusion(own, base) if own else ''
    written = sample(model, tokenizer, idx[0].tolist(), where)

    common.if_stopped = f'Some files in {out_dir} are new, some old. Begin anew with {again}'
    write('analysis.json', json.dumps(dict(source=source, settings=settings, **numbers), indent=1).encode() + b'\n')
    T, mark = idx.shape[1] - 1, tokenizer.name == 'bytes'
    read = os.path.basename(text) if text else f'the validation text in {os.path.basename(data)}'
    skips = any(one['has_skip'] for one in chunks)
    hint = ('<p>Each token has the colour of its route. Modules are counted from 1, '
            + 'S is SKIP, ' * skips + '×3 is three steps alike. Point at a token or at a route, tap it, or '
            'go with the arrow keys: all tokens of that route light up. A line is drawn where another part '
            'of the text begins.' + ' Each token is one byte; a stroke stands where a word begins.' * mark
            + '</p>')
    write_page({
        'What was run': introduction(cfg, read, numbers['tokens']) + f'<p>{html.escape(said)}</p>'
                        + runs_table(runs) + draw_curves(runs, base),
        'Routes, token by token': hint + coloured(texts, kinds, T, named, chunks, mark),
        'Do the routes matter?': '<p>If they did not, all four losses would be equal.</p>' + losses_table(loss),
        'Do they depend on the token?': table([ROUTES_TABLE, *routes_rows(chunks)])
                                        + f'<p>{ROUTES_LEGEND}</p>',
        'Which modules, at which step': draw_shares(chunks),
        'What follows on what': draw_transitions(chunks),
        'Who skips': draw_skips(chunks, numbers['tokens_by_kind']),
        'A sample of what it writes': written})

    print(f'{numbers["tokens"]:,} tokens. Loss {loss["as_it_is"]:.4f}; with routes shuffled between all tokens '
          f'{loss["shuffled"]:.4f}, between equal ones {loss["shuffled_equal"]:.4f}; with every decision frozen to '
          f'its commonest choice {loss["frozen"]:.4f}')
    print('Modules per token and step: ' + ', '.join(f'{NAMES[k]} {v:.3f}' for k, v in k_eff.items()))
    if cfg.phi == 'mom':
        print(f'Table 1 with them: python bench.py table1 --k_a={k_eff["A"]:.3f} --k_f={k_eff["F"]:.3f}')
    print(f'\n| {" | ".join(ROUTES_TABLE)} |\n|{"---|" * len(ROUTES_TABLE)}')
    for row in routes_rows(chunks):
        print(f'| {" | ".join(row)} |')
    print(textwrap.fill(ROUTES_LEGEND, 100))
    print('\n' + '\n'.join(files))
    if said:
        print(f'\n{said}')
    print(f'\nall of it on one page: {os.path.join(out_dir, "page.html")}')


if __name__ == '__main__':
    main()
