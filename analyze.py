"""See what the routers do: which modules, in which order, for which tokens, and whether it matters.

  python analyze.py --source=out/mom_demo                     on the validation text of its training
  python analyze.py --source=out/mom_demo --text=story.txt    on a text of your own
  python analyze.py --source=out/mom_demo --curves=out/gpt2_demo_continued   beside other runs

out_dir gets page.html, one page with all of it, which needs no network: the run beside those it
is compared with, a text with every token coloured by its route, pictures and a sample. The
pictures are there as files too (.png), each with its numbers (.json): shares of the modules by
step, transitions between modules (Figure 6), SKIP by step, token and position, loss curves
(report.py draws them). analysis.json says how far the routes depend on the token:

- off the commonest: the share of tokens that take another route through a chunk than most;
- information: what a token says about its route, in bits, and what its position says. With few
  samples chance looks like information; so 0 is the mean of five random pairings of tokens and
  routes, and the most is the entropy of the routes (adjusted mutual information);
- loss: as it is; with the routes, weights included, exchanged at random between all tokens, or
  between occurrences of the same token; and with every decision frozen to its commonest choice, at
  the mean weights of those who chose it. If routes did not matter, all would be equal; if the token
  alone decided them, the exchange between equals would cost nothing.

A route is what a token selects in all the steps of one chunk, of attention modules (A) or of
feed-forward modules (F).

Shapes: n sequences of T tokens, M = n T, N modules of a pool, K selected, H steps.
"""
import codecs
import html
import json
import os
import sys
import textwrap
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import common
import inputs
import report
from model import GPT, MoMConfig
from weights import load_checkpoint

# --- what
source = 'out/mom_demo'       # a run's directory or checkpoint; a GPT-2 has no routers
text = ''                     # a UTF-8 file; '' is val.bin of data_dir
data_dir = ''                 # a folder of prepare.py; '' is that of the training
tokens = 20_000               # of the text, at most, in sequences of block_size spread over it
curves = ''                   # runs to compare with, separated by commas; its own is among them
out_dir = ''                  # '' is <directory of source>/routes
# --- how
routes = 10                   # how many of the commonest routes are listed, and coloured
page = 1_000                  # tokens on the coloured page
seed = 1337                   # of the random pairings, and of the sample
batch = 8                     # sequences at a time
device = 'auto'               # 'auto', 'cpu', 'cuda', 'mps' or 'xpu'
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not in tests

SHUFFLES = 5
KINDS = ('space', 'word begins', 'inside a word', 'digit', 'punctuation', 'other')
PROMPT, SAMPLE = 48, 300  # tokens of the sample on the page: what is given, what the model writes


# ----------------------------------------------------------------------------- text

def token_texts(tokenizer, ids):
    """Ids -> their texts, which together are the text.

    A character that spans tokens belongs to the last of them.
    """
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    return [decoder.decode(tokenizer.decode_single_token_bytes(i)) for i in ids]


def kind_of(before, raw):
    """What kind of token the bytes `raw` are after the text `before`: an index of KINDS."""
    text = raw.decode('utf-8', errors='ignore')
    core = text.strip()
    if text in ('', common.EOT):
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
    where = text or os.path.join(folder or source, 'val.bin')
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
        raise ValueError(f'{where} holds token id {ids.max()}, but the tokenizer '
                         f'{tokenizer.name!r} of {source} knows {tokenizer.n_vocab}: prepare the '
                         'text with that one')
    room = (len(ids) - 1) // size
    n = min(room, max(1, tokens // size))
    starts = (np.arange(n) * room // n * size).tolist()
    before = [ids[max(0, start - 4):start].tolist() for start in starts]
    return np.stack([ids[start:start + size + 1] for start in starts]), before


def texts_and_kinds(tokenizer, idx, before):
    """The input tokens of what read_ids returns, idx (n, T + 1) -> texts (M), kinds (M,)."""
    texts, kinds = [], []
    for ids, lead in zip(idx[:, :-1].tolist(), before):
        its = ['', *token_texts(tokenizer, [*lead, *ids])][len(lead):]  # one more: what is before
        texts += its[1:]
        kinds += [kind_of(one, tokenizer.decode_single_token_bytes(i))
                  for one, i in zip(its, ids)]
    return texts, np.array(kinds)


# ----------------------------------------------------------------------------- routes

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
                d = d._replace(ids=d.ids.cpu(), weights=d.weights.cpu(), rows=None)
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
    """For run(): every token does at each decision what most do, with the mean weights of those."""
    usual = {}
    for key, d in decisions.items():
        ids, order = d.ids.sort(dim=1)
        sets, which, counts = ids.unique(dim=0, return_inverse=True, return_counts=True)
        best = counts.argmax()
        usual[key] = sets[best], d.weights.gather(1, order)[which == best].mean(0)
    return lambda key, rows: tuple(t.expand(rows.stop - rows.start, -1).contiguous()
                                   for t in usual[key])


def sets_of(d):
    """A Decision -> what each token selected, as bits (M,): bit i is module i, bit N is SKIP."""
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
    """What column a says about column b, in bits: their mutual information I, adjusted for chance
    as Vinh et al. 2010.

    The plug-in estimate counts chance as information, and random pairings, SHUFFLES of them, have
    chance alone; but where a decides b there is no chance, and I is the entropy of b. So it is
    (I - chance) H(b) / (H(b) - chance).
    """
    most, rest = entropy(b), entropy(a) + entropy(b)
    chance = float(np.mean([rest - entropy(a, rng.permutation(b)) for _ in range(SHUFFLES)]))
    return (rest - entropy(a, b) - chance) * most / max(most - chance, 1e-12)


def traffic(masks, N):
    """Bit masks of consecutive steps, each (M,) -> (N + 1, N + 1): of all that tokens do from one
    step to the next, the share that goes from module i to j (row N and column N: SKIP). Of k
    modules at a step, each counts 1/k. The sum is 1, or 0 if there is one step."""
    bits = [(m[:, None] >> np.arange(N + 1) & 1).astype(float) for m in masks]  # (M, N + 1)
    bits = [b / b.sum(1, keepdims=True) for b in bits]
    flow = sum((a.T @ b for a, b in zip(bits, bits[1:])), np.zeros((N + 1, N + 1)))
    return flow / max(flow.sum(), 1e-12)


def transitions(masks, N):
    """The same for each module i by itself: of the tokens that used it at a step, the share that
    used j at the next. A row that nobody started from is 0."""
    flow = traffic(masks, N)
    return flow / np.maximum(flow.sum(1, keepdims=True), 1e-15)


def another_occurrence(token, rng):
    """Tokens (M,) -> (M,), a permutation: each one's partner, another of its kind if there is."""
    order = np.lexsort((rng.random(len(token)), token))  # by kind, at random within it
    kind = token[order]
    last = np.append(kind[1:] != kind[:-1], True)        # of its kind: it takes the first
    partner = np.empty_like(order)
    partner[order] = np.where(last, order[np.searchsorted(kind, kind)], np.roll(order, -1))
    return partner


def analyse(model, idx, kinds, device, batch, seed):
    """All numbers, as a dict for JSON; and of each (chunk, kind) the tokens' routes: numbers (M,),
    the commonest is 0, and their names."""
    rng, T = np.random.default_rng(seed), idx.shape[1] - 1
    loss, decisions = run(model, idx, device, batch, name='pass 1 of 4, own routes')
    token, position = idx[:, :-1].flatten(), np.tile(np.arange(T), len(idx))
    M = len(token)
    others = {'shuffled': shuffled(decisions, rng.permutation(M)),
              'shuffled_equal': shuffled(decisions, another_occurrence(token, rng)),
              'frozen': frozen(decisions)}
    losses = {'as_it_is': loss}
    for n, (name, decide) in enumerate(others.items()):
        losses[name], _ = run(model, idx, device, batch, decide, f'pass {n + 2} of 4, {name}')
    seen = Counter(kinds.tolist())
    by_kind = {KINDS[i]: seen[i] for i in sorted(seen)}
    out = dict(tokens=M, tokens_by_kind=by_kind, loss=losses, chunks=[])
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
        # A row for each module, SKIP last; a column for each step.
        shares=[[float((m >> i & 1).mean()) for m in masks] for i in range(N + 1)],
        # The mean weight of a module, over the tokens that select it; likewise.
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

# Runs that share these had the same batches, and began with the same weights.
SAME = ('data_dir', 'init_from', 'seed', 'batch_size', 'block_size')


def read_run(folder):
    """A run of train.py -> a dict: what it is, and what its log.csv says. Losses in nats per token.

    Raises ValueError if it has no log, no finished steps or no checkpoint.
    """
    steps, val = common.read_log(folder)
    checkpoint = load_checkpoint(folder)
    cfg = MoMConfig(**checkpoint['model_config'])
    with torch.device('meta'):  # enough to count with
        model = GPT(cfg)
    flops = model.flops_per_token(cfg.block_size, float(val[-1]['k_a']), float(val[-1]['k_f']))
    same = {key: checkpoint.get('settings', {}).get(key) for key in SAME}
    return dict(folder=folder, name=common.run_name(folder), steps=int(val[-1]['step']),
                train=[(int(row['step']), float(row['loss'])) for row in steps],
                validation=[(int(row['step']), float(row['val_loss'])) for row in val],
                bits=[float(row['val_bits_per_byte']) for row in (val[0], val[-1])],
                speed=float(np.median([float(row['tokens_per_s']) for row in steps])),
                vanilla=cfg.vanilla, assembly=assembly(cfg), same=same,
                parameters=model.num_params()[0], mflops=flops / 1e6)


def assembly(cfg):
    """What a model is called: K2H4S, chunks 1-4-1."""
    size = f'{cfg.n_layer} layers' if cfg.vanilla else f'chunks {cfg.chunks}'
    return f'{cfg.assembly}, {size}'


def find_base(runs, own):
    """Of `runs`, the vanilla one with the batches and the beginnings of the run `own`, or None."""
    like = [one for one in runs if one['vanilla'] and own and one['same'] == own['same']]
    return like[0] if like else None


def read_runs(names, folder):
    """The runs in the setting `curves`, and the one in `folder`, if it has steps -> runs, its own
    or None."""
    folders = [name.strip() for name in names.split(',') if name.strip()]
    runs, here = [read_run(one) for one in folders], os.path.realpath(folder)
    own = [one for one in runs if os.path.realpath(one['folder']) == here]
    if not own:
        with suppress(ValueError):  # it has no log, no finished steps or no checkpoint
            own = [read_run(folder)]
            runs += own
    return runs, own[0] if own else None


# ----------------------------------------------------------------------------- all of it

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
            f'<p>Given: the grey beginning, {len(given)} tokens of the text. Drawn at temperature '
            '0.8 among the 200 likeliest tokens.</p>')


def main():
    for key in ('tokens', 'routes', 'page', 'batch'):
        if settings[key] < 1:
            raise ValueError(f'{key}={settings[key]} must be at least 1')
    again = common.command('python', *sys.argv)
    common.if_stopped = f'Nothing is written. Begin anew with {again}'
    where = common.find_device(device)
    model, tokenizer = inputs.model_and_tokenizer(source)
    model = model.to(where).eval()
    cfg = model.cfg
    if cfg.phi == 'share' or cfg.vanilla:
        raise ValueError(f'{source} has no routers, so there is nothing to see: '
                         'give a model of phase two')
    ours = not os.path.isfile(os.path.join(source, 'config.json'))
    saved = load_checkpoint(source) if ours else {}
    data = data_dir
    if not (data or text):
        data = saved.get('settings', {}).get('data_dir', '')
    idx, before = read_ids(tokenizer, cfg.block_size, data)
    home = source if os.path.isdir(source) else os.path.dirname(source) or '.'
    runs, own = read_runs(curves, home)
    base = find_base(runs, own)
    folder = common.results_folder(out_dir or os.path.join(home, 'routes'))

    texts, kinds = texts_and_kinds(tokenizer, idx, before)
    name, place = common.run_name(source), os.path.basename(os.path.abspath(data))
    read = os.path.basename(text) or f'the validation text in {place}'
    start = report.introduction(cfg, name, assembly(cfg), saved.get('step'), read, idx[:, 1:].size)
    numbers, named = analyse(model, idx, kinds, where, batch, seed)
    chunks, loss = numbers['chunks'], numbers['loss']
    said = report.conclusion(own, base)
    written = sample(model, tokenizer, idx[0].tolist(), where)

    print(f'{numbers["tokens"]:,} tokens. Loss {loss["as_it_is"]:.4f}; with routes shuffled '
          f'between all tokens {loss["shuffled"]:.4f}, between equal ones '
          f'{loss["shuffled_equal"]:.4f}; with every decision frozen to its commonest choice '
          f'{loss["frozen"]:.4f}')
    taken = [f'{report.NAMES[kind]} {k:.3f}' for kind, k in numbers['k_eff'].items()]
    print('Modules per token and step: ' + ', '.join(taken))
    if cfg.phi == 'mom':
        k_a, k_f = (f'{numbers["k_eff"][kind]:.3f}' for kind in 'AF')
        print(f'Table 1 with them: python bench.py table1 --k_a={k_a} --k_f={k_f}')
    print(f'\n| {" | ".join(report.ROUTES)} |\n|{"---|" * len(report.ROUTES)}')
    for row in report.routes_rows(chunks):
        print(f'| {" | ".join(row)} |')
    print(textwrap.fill(report.LEGEND, 100), end='\n\n')

    common.if_stopped = f'Some files in {folder} are new, some old. Begin anew with {again}'
    whole = dict(source=source, settings=settings, **numbers)
    report.write(folder, 'analysis.json', json.dumps(whole, indent=1).encode() + b'\n')
    is_bytes = tokenizer.name == 'bytes'
    strokes = is_bytes & (kinds == KINDS.index('word begins'))
    hint = report.hint(any(one['has_skip'] for one in chunks), is_bytes)
    shown = report.coloured(texts[:page], strokes, idx.shape[1] - 1, named, chunks)
    report.write_page(folder, name, {
        'What was run': f'{start}<p>{html.escape(said)}</p>{report.runs_table(runs)}'
                        f'{report.draw_curves(folder, runs, base)}',
        'Routes, token by token': hint + shown,
        'Do the routes matter?': report.losses_table(loss),
        'Do they depend on the token?': report.routes_table(chunks),
        'Which modules, at which step': report.draw_shares(folder, chunks),
        'What follows on what': report.draw_transitions(folder, chunks),
        'Who skips': report.draw_skips(folder, chunks, numbers['tokens_by_kind']),
        'A sample of what it writes': written}, routes)
    if said:
        print(f'\n{said}')
    print(f'\nall of it on one page: {os.path.join(folder, "page.html")}')


if __name__ == '__main__':
    main()
