"""The paper's tables and figures that are about the loss, run again; paper.py says what they are.

  python reproduce.py                               8 layers, width 128, bytes: hours on 2 CPU cores
  python reproduce.py --scale=ratio --text=books/   the paper's 85 tokens per parameter
  python reproduce.py --scale=gpu --text=books/     8 layers, width 512, BPE: an H100, 36 minutes
  python reproduce.py --scale=paper --size=small    one of the paper's three sizes on 8 GPUs
  python reproduce.py --only=table1,fig4 --seeds=3  some of it, with more seeds
  python reproduce.py --only=fig4 --cells=k1h1s     of that, some cells and their baselines
  python reproduce.py --report=True                 the report of what is there, no training

A cell is one run of train.py, in its own folder of out_dir. One that is finished is not done again,
one that was stopped goes on: after Ctrl-C, or anything worse, the same command continues.
results.md, results.json and the figures are written anew after every cell; with --keep, at the end
axis.png of all reports in folders beside that one.

How it is compared. Phase two starts from the same phase one and sees the same batches in the same
order for as many steps, under the same schedule. The baseline is the vanilla model continued for as
many steps (the paper's GPT-2 row has seen fewer than MoM's), and beside it one continued for as
many training FLOPs: its loss is interpolated, by the parabola over the logarithm of the FLOPs,
through the nearest three of its continuations, each with its own schedule. The peak rate of phase
two is tuned on the first seed for each family: the vanilla continuation, routers that begin at the
layers, what goes on from scratch, and all others; one cell of each finds the rate. What begins from
scratch takes phase one's, or a rate of its own if the scale has one; --rate sets both.
Seeds of phase two share one phase one, but for those that are compared with what is from scratch.
"""
import functools
import glob
import json
import lzma
import math
import os
import re
import statistics
import subprocess
import sys
import time

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
scale = 'cpu'      # 'cpu', 'ratio', 'gpu', 'paper', or 'tiny', which is for tests
ratio = 85         # of scale ratio: tokens per parameter in phase one, 1, 4, 16 or 85
only = ''          # of table1,table2,table4,fig3,fig4,fig5,routers,axis,starts; '' is the scale's
cells = ''         # which of their cells, by name as in results.json; '' is all
size = 'medium'    # 'small', 'medium', 'large': of scale paper, and of the Table 1 beside ours
report = False     # train nothing: write the report of what is there
keep = ''          # a folder for log and result of each finished cell; what is there counts as done
# --- text
text = ''          # prepare.py's dataset: 'sotu', 'openwebtext', files, folders; '' is the scale's
data_dir = ''      # where its tokens are, or will be; '' is data/<text>_<tokenizer>
# --- comparison
seeds = 1          # of phase two, for every cell
most_seeds = 3     # for rows of Tables 1, 2, routers and axis that end within 0.02 of a baseline
steps = []         # of phase one and of phase two, such as [1500,1000]; [] is the scale's
rate = 0.0         # peak of phase one, and of all from scratch; 0 is the scale's own of each
rates = []         # peaks to choose from in phase two, one is no choice; [] is the scale's
# --- system
out_dir = ''       # '' is out/reproduce_<scale>
workers = 0        # cells at a time; 0 is the scale's. On a CPU, one for each core is fastest
processes = 0      # of one training, by torchrun; 0 is the scale's
device = 'auto'    # train.py's
# ---
settings, given = common.load(globals())

EQUAL = paper.EQUAL
VOCABULARY = {'bytes': 257, 'gpt2': 50257}
# With one seed a smaller difference decides nothing; of losses in nats per token.
CLOSE = {'loss': 0.02, 'spikes': 0.2}
MORE_SEEDS = ('table1', 'table2', 'routers', 'axis')  # where losses are close
# 95% interval of Student's t, in standard errors of the mean of 2, 3, ... 10 seeds
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def unique(items):
    return list(dict.fromkeys(items))


def on_meta(model):
    """The GPT of a cell's settings, without memory for its weights."""
    shape = dict(block_size=S['block_size'], vocab_size=VOCABULARY[S['tokenizer']])
    with torch.device('meta'):
        return GPT(MoMConfig(**model | shape))


for key, known in (('scale', paper.SCALES), ('size', paper.SIZES), ('ratio', paper.RATIOS)):
    if settings[key] not in known:
        raise ValueError(f'{key}={settings[key]!r} must be one of {", ".join(map(str, known))}')
if not 1 <= seeds or min(workers, processes) < 0:
    raise ValueError(f'seeds={seeds} must be at least 1, workers={workers} and '
                     f'processes={processes} at least 0')
if steps and (len(steps) != 2 or any(type(n) is not int or n < 1 for n in steps)):
    raise ValueError(f'steps={steps} must be two numbers, of phase one and of phase two, such as '
                     '[1500,1000]')
if not (0 <= rate < math.inf
        and all(type(r) in (int, float) and 0 < r < math.inf for r in rates)):
    raise ValueError(f'rate={rate} must be at least 0, and rates={rates} positive numbers, such as '
                     '[0.002,0.004]')

if 'ratio' in given and scale != 'ratio':
    raise ValueError(f'ratio={ratio} goes with --scale=ratio: add that')
if 'size' in given and scale == 'ratio':
    raise ValueError("scale=ratio stands beside the paper's small model: leave --size out")

S = paper.at_scale(scale, size, ratio)
n_params = on_meta(dict(chunks=S['layers'], n_embd=S['n_embd'], n_head=S['n_head'])).num_params()[0]
tokens_per_step = S['batch_size'] * S['block_size']
if scale == 'ratio':  # phase two sees half as many tokens, as the paper's does
    first = round(ratio * n_params / tokens_per_step)
    S['steps'] = [first, round(first / 2)]
S['steps'] = steps = steps or S['steps']
S['scratch'] = rate or S.get('scratch', S['rate'])
S['rate'], rates = rate or S['rate'], unique(rates or S['rates'])
text, workers = text or S['text'], workers or S['workers']
processes = processes or S['processes']
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
budgets = ['vanilla', *(name for name in recipes if name.startswith('vanilla_x'))]
budgets.sort(key=lambda name: recipes[name].steps)  # and so by their FLOPs
# What stands beside GPT-2 of as many FLOPs; Table 4's at scale paper are of another size.
beside_gpt2 = [name for name, cell in recipes.items()
               if cell.family not in ('phase_one', 'vanilla') and cell.needs != 'phase_one_8']

asked_rows = [row for table in chosen for row in rows[table]]
known = unique(name for row in asked_rows for name in (row.cell, row.baseline))
for name in picked:
    if name not in known:
        raise ValueError(f'cells={cells!r}: {name!r} is none of those of {",".join(chosen)}: '
                         f'{", ".join(known)}')
wanted = [name for row in asked_rows if row.cell in (picked or known)
          for name in (row.baseline, row.cell)]
wanted = unique(wanted + picked)  # a baseline may be picked by itself

# ----------------------------------------------------------------------------- cells

# A run is (name of its cell, learning rate, seed).
train_sha256 = None  # of the text; a report looks at no text
records = {}  # run -> results, of the finished ones that finished() has looked at


def run_name(run):
    name, rate, seed = run
    return f'{name}_lr{rate:g}_seed{seed}'


def folder(run, *file):
    return os.path.join(out_dir, run_name(run), *file)


def kept(run, suffix):
    return os.path.join(keep, run_name(run) + suffix)


def rate_of(name):
    """The peak learning rate of a cell: a setting from scratch, else its family's best on seed 1.

    None while there is no result to choose by.
    """
    cell = recipes[name]
    if not cell.needs:
        return S['rate' if cell.family == 'phase_one' else 'scratch']
    if len(rates) == 1:
        return rates[0]
    probe = S['probes'][cell.family]
    tried = {rate: records[probe, rate, 1]['loss'] for rate in rates if (probe, rate, 1) in records}
    return min(tried, key=tried.get, default=None)


def probes(names):
    """The runs by which the rates of these cells' families are chosen."""
    families = {recipes[name].family for name in names} if len(rates) > 1 else ()
    return [(probe, rate, 1) for family, probe in S['probes'].items() for rate in rates
            if family in families]


def tuned(name, seed):
    """A cell's run with its rate. With seed 1 vanilla_own is vanilla."""
    name = 'vanilla' if (name, seed) == ('vanilla_own', 1) else name
    return name, rate_of(name), seed


def has_shared_start(name):
    """Whether all seeds of a cell start from one phase one, that of seed 1."""
    return recipes[name].needs.startswith('phase_one') and name != 'vanilla_own'


def parent_of(run):
    """The run that this one starts from, None from scratch."""
    name, _, seed = run
    if needs := recipes[name].needs:
        return tuned(needs, 1 if has_shared_start(name) else seed)


def with_needs(runs):
    """Runs with all that they start from, in an order in which they can be trained."""
    order = []
    for run in runs:
        if parent := parent_of(run):
            order += with_needs([parent])
        order.append(run)
    return unique(order)


def asked(run):
    """train.py's settings for a run, without those of the system.

    None while its rate is not known or what it starts from is not finished.
    """
    name, rate, seed = run
    cell, parent = recipes[name], parent_of(run)
    if rate is None or parent and parent not in records:
        return None
    first = any(other.needs == name for other in recipes.values())
    shared = {key: S[key] for key in ('batch_size', 'micro_batch', 'eval_tokens', 'block_size')}
    return dict(
        shared, **cell.model, data_dir=data_dir,
        init_from=folder(parent, 'last.pt') if parent else 'scratch',
        seed=1000 * seed + (337 if first else 338),  # 1337 and 1338, as in config/; 2337 and 2338
        max_steps=cell.steps, learning_rate=float(rate),
        eval_every=math.ceil(cell.steps / S['evaluations']))


def step_flops(model, k_a=None, k_f=None):
    """Training FLOPs of a step: three forward passes, as GPT.flops_per_token counts the method."""
    return 3 * on_meta(model).flops_per_token(S['block_size'], k_a, k_f) * tokens_per_step


@functools.cache
def cost(run):
    """Training FLOPs of a run that is still to come: every decision takes all K."""
    cell = recipes[run[0]]
    return step_flops(cell.model) * cell.steps


# ----------------------------------------------------------------------------- what is there

def finished(run):
    """Whether a run is finished, by its folder or, if it is not finished there, by `keep`.

    Its results are then in records, and in `keep`. Raises ValueError if there is a run with other
    settings or of another text.
    """
    if run in records or trained(run):
        return True
    want = asked(run)
    if not want or not keep or not os.path.exists(kept(run, '.json')):
        return False
    one = read_kept(run)
    refuse_another(kept(run, '.json'), want, one['settings'], one['train_sha256'])
    records[run] = one['result']
    return True


def trained(run):
    """Whether a run is finished and has its weights here, whatever `keep` has."""
    want = asked(run)
    if not want or not os.path.exists(folder(run, 'last.pt')):
        return False
    again = f'remove {folder(run)}, and it is trained again'
    try:
        saved = load_checkpoint(folder(run, 'last.pt'))
        had, text_had, step = saved['settings'], saved['meta']['train_sha256'], saved['step']
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{folder(run)} holds no run of train.py ({error!r}): {again}') from error
    refuse_another(folder(run), want, had, text_had)
    if step < want['max_steps']:
        return False
    log = log_of(run)
    if not any(row.get('val_loss') and int(row['step']) == want['max_steps'] for row in log):
        if saved.get('val_step') == step:
            raise ValueError(f'{folder(run, "log.csv")} lacks the last validation: {again}')
        return False  # it was stopped in its last evaluation
    records[run] = result_of(run, saved, log)
    if keep and not os.path.exists(kept(run, '.json')):
        write_kept(run, want, saved)
    return True


def read_kept(run):
    """What write_kept wrote of a run. Raises ValueError if it is something else."""
    try:
        with open(kept(run, '.json'), encoding='utf-8') as f:
            one = json.load(f)
        return {key: one[key] for key in ('settings', 'train_sha256', 'result')}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{kept(run, ".json")} holds no result ({error!r}): remove it, and that '
                         'cell is trained again') from error


def write_kept(run, want, saved):
    """Its log, and then its result with all that says what was run."""
    portable = {key: value for key, value in want.items() if key != 'data_dir'}
    portable['init_from'] = os.path.join(*want['init_from'].split(os.sep)[-2:])  # folders may move
    day = time.gmtime(os.path.getmtime(folder(run, 'last.pt')))
    one = dict(settings=portable, model_config=saved['model_config'],
               train_sha256=saved['meta']['train_sha256'], source=saved['meta'].get('source'),
               torch=saved.get('torch'), finished=time.strftime('%Y-%m-%d', day),
               result=records[run])
    with open(folder(run, 'log.csv'), 'rb') as f:
        log = f.read()
    with common.atomic_write(kept(run, '.csv.xz')) as f:
        f.write(lzma.compress(log))
    common.write_text(kept(run, '.json'), json.dumps(one, indent=1) + '\n')


def refuse_another(where, want, had, text_had):
    """Raises ValueError if a run had other settings, or another text, than those wanted."""
    for key, value in want.items():
        other = had.get(key)
        if key == 'init_from':  # folders may move
            value, other = (os.path.basename(os.path.dirname(str(path))) for path in (value, other))
        if value != other and key not in ('micro_batch', 'data_dir'):
            raise ValueError(f'{where} holds a run with {key}={other!r}, not {value!r}: ask for '
                             'the same, take another --out_dir, or remove that folder')
    if train_sha256 and text_had != train_sha256:
        raise ValueError(f'{where} was trained on another text than {data_dir}: take another '
                         '--out_dir')


def log_of(run):
    """The rows of a run's log.csv, from its folder or from `keep`; ValueError if it is broken."""
    path = folder(run, 'log.csv')
    if keep and not os.path.exists(path):
        path = kept(run, '.csv.xz')
    try:
        opened = lzma.open if path.endswith('.xz') else open
        with opened(path, 'rt', newline='', errors='replace') as file:
            return common.log_rows(file, path)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f'{path} cannot be read ({error!r}): remove it and what else there is of '
                         'that run, and it is trained again') from error


def result_of(run, saved, log):
    """What a finished training came to, from its checkpoint and the rows of its log."""
    total, model = saved['step'], saved['model_config']
    val = [row for row in log if row['val_loss']]
    at, k_a, k_f = ([float(row[key]) for row in val] for key in ('step', 'k_a', 'k_f'))
    k_a, k_f = np.trapezoid([k_a, k_f], at) / total  # their means over the training
    if model['phi'] == 'mod':  # k_a is what its predictor lets through: training takes `capacity`
        k_a = k_f = model['capacity']
    norms = [float(row['grad_norm']) for row in log
             if row['grad_norm'] and int(row['step']) > 0.1 * total]
    parent = parent_of(run)
    spent = step_flops(model, k_a, k_f) * total / 1e15
    loss = float(val[-1]['val_loss'])
    return dict(
        loss=loss, perplexity=math.exp(loss), bits_per_byte=float(val[-1]['val_bits_per_byte']),
        steps=total, rate=run[1], k_a=k_a, k_f=k_f, pflops=spent,
        pflops_in_all=spent + (records[parent]['pflops_in_all'] if parent else 0),
        minutes=sum(float(row['ms']) for row in log if row['ms']) / 6e4,
        spikes=float(np.percentile(norms, 99) / np.median(norms)))


# ----------------------------------------------------------------------------- comparison

def record(name, seed):
    """Results of a cell, None if they are not in.

    EQUAL + a cell is the vanilla model continued for as many FLOPs as that one took, by a parabola
    over their logarithm. (A straight line is off by up to 0.007: the losses lie on a curve.)
    """
    if not name.startswith(EQUAL):
        return records.get(tuned(name, seed))
    name = name.removeprefix(EQUAL)
    if seed > 1 and not has_shared_start(name):
        return None  # all those continuations share the phase one of seed 1
    nearest = [record(budget, seed) for budget in around(name, seed)]
    if nearest:
        key = flops_key(name)
        x = [math.log(found[key]) for found in nearest]
        y = [found['loss'] for found in nearest]
        at = math.log(record(name, seed)[key])
        return dict(loss=float(np.polyval(np.polyfit(x, y, len(x) - 1), at)))


def flops_key(name):
    """Which FLOPs of a cell are compared: phase two's, or all if it has no phase one to share."""
    return 'pflops' if has_shared_start(name) else 'pflops_in_all'


def around(name, seed):
    """The vanilla model's continuations of the next fewer and more FLOPs, and the one that is
    shorter still, or the next longer if there is none; () if the two are not in."""
    key = flops_key(name)
    pflops = {one: found[key] for one in [name, *budgets] if (found := record(one, seed))}
    there = [budget for budget in budgets if budget in pflops]
    for i in range(1, len(there)):
        if name in pflops and pflops[there[i - 1]] <= pflops[name] <= pflops[there[i]]:
            return there[max(0, i - 2):max(3, i + 1)]
    return ()


def contrast(factors, metric='loss'):
    """The sum of cells' results, each by its factor, seed by seed.

    Returns (mean, standard error or None with one seed, seeds); None if none is in.
    """
    values = []
    for seed in range(1, last_seed + 1):
        found = [record(name, seed) for name in factors]
        if all(found):
            values.append(sum(w * one[metric] for w, one in zip(factors.values(), found)))
    if values:
        n = len(values)
        error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
        return statistics.fmean(values), error, n


def judge(factors, limit, metric):
    """A contrast and its verdict, undecided within Student's 95% interval, or CLOSE with one seed.

    CLOSE is meant for the difference of two losses, and grows as the noise of a sum of more does.
    """
    found = contrast(factors, metric)
    if not found:
        return dict(contrast=factors, verdict='not run', found=None)
    mean, error, n = found
    if error is None:
        room = CLOSE[metric] * max(1, math.sqrt(sum(w * w for w in factors.values()) / 2))
    else:
        room = T95[min(n, len(T95) + 1) - 2] * error
    off = (abs(mean) if limit else mean) - limit
    verdict = 'holds' if off < -room else 'does not hold' if off > room else 'undecided'
    return dict(contrast=factors, verdict=verdict, found=found)


def judge_all(claim):
    """A claim of several parts holds if all hold, and does not if one does not."""
    parts = [judge(factors, claim.limit, claim.metric) for factors in claim.contrasts]
    order = ['does not hold', 'not run', 'undecided', 'holds']
    verdict = min((part['verdict'] for part in parts), key=order.index)
    return dict(table=claim.table, claim=claim.text, paper=claim.paper, verdict=verdict,
                limit=claim.limit, parts=parts)


def numbers_of(row):
    """A row of a table: the results of every seed, their mean, the differences."""
    name = row.cell
    found = [one for seed in range(1, last_seed + 1) if (one := record(name, seed))]
    numbers = dict(label=row.label, cell=name, baseline=row.baseline, runs=found, paper=row.loss,
                   paper_difference=row.away)
    if found:
        losses = [one['loss'] for one in found]
        numbers['mean'] = {key: statistics.fmean(one[key] for one in found) for key in found[0]}
        numbers['std'] = statistics.stdev(losses) if len(found) > 1 else None
        away, equal = (0.0, None, len(found)), None
        if name != row.baseline:
            away = contrast({name: 1, row.baseline: -1})
        if name in beside_gpt2:
            equal = contrast({name: 1, EQUAL + name: -1})
        numbers.update(difference=away, equal_flops=equal)
    return numbers


# ----------------------------------------------------------------------------- report

COLUMNS = ('system', 'seeds', 'loss', 'perplexity', 'bits/byte', 'steps', 'PFLOPs', 'in all',
           'from the baseline', 'from GPT-2 of as many FLOPs', 'paper: loss',
           'paper: from its baseline')


def write_report():
    """results.md, results.json and the figures, in out_dir; with `keep`, there too."""
    drawing = {'fig3': draw_fig3, 'fig4': draw_fig4, 'fig5': draw_fig5, 'starts': draw_starts}
    drawn = [table for table in chosen if table in drawing]
    for table in drawn:
        drawing[table]()
    result = dict(command=common.command('python', *sys.argv), settings=settings,
                  scale=dict(S, rates=rates),
                  rows={table: [numbers_of(row) for row in rows[table]] for table in chosen},
                  claims=[judge_all(claim) for claim in claims if claim.table in chosen],
                  failed=failed)
    lines = heading()
    for table in chosen:
        lines += ['', f'## {paper.TITLES[table]}', '', markdown(*COLUMNS), '|' + '---|' * 12]
        lines += [line_of(numbers) for numbers in result['rows'][table]]
    lines += verdicts(result['claims'])
    if failed:
        lines += ['', '## Not finished', '']
        lines += [f'- {where}: {why}' for where, why in failed.items()]
    lines += [f'\n![{table}]({table}.png)' for table in drawn]
    for name, body in (('results.md', '\n'.join(lines)),
                       ('results.json', json.dumps(result, indent=1))):
        for where in folders:
            common.write_text(os.path.join(where, name), body + '\n')


def heading():
    one, two = steps
    return [
        '# The paper again, at scale ' + (f'ratio {ratio}' if scale == 'ratio' else scale), '',
        f'`{common.command("python", *sys.argv)}`', '',
        f'Phase one {one:,} steps, phase two {two:,}, of {S["batch_size"]} sequences of '
        f'{S["block_size"]} tokens ({data_dir}, {S["tokenizer"]}). Losses are of validation after '
        'the last step, in nats per token, ± the standard deviation over seeds; differences are '
        "seed by seed, ± their standard error. PFLOPs are of training, by the method's count "
        "with the modules that were chosen; for as many, the vanilla model's loss is "
        "interpolated between its continuations: as many in phase two, or, from scratch, in all. "
        "The paper's figures are of "
        f'GPT-2-{S["size"]}, or as its table says.', '',
        f'Learning rates: phase one {S["rate"]:g}, from scratch {S["scratch"]:g}, phase two by the '
        'loss of seed 1 (if the best is the first or the last, --rates is too short): '
        + '; '.join([tuning('vanilla', 'vanilla'),
                     tuning('layers', 'routers that begin at the layers, by {},'),
                     tuning('scratch', 'what goes on from scratch'),
                     tuning('mom', 'all others, by {},')]) + '.']


def tuning(family, label):
    """Which learning rates a family has tried, and the best, in words."""
    probe, tried = S['probes'][family], []
    for rate in rates:
        found = records.get((probe, rate, 1))
        tried.append(f'{rate:g}: {found["loss"]:.3f}' if found else f'{rate:g}: –')
    label = label.format(probe.removesuffix('_layers').upper())
    return f'{label} {rate_of(probe) or "–"} ({", ".join(tried)})'


def markdown(*words):
    return '| ' + ' | '.join(map(str, words)) + ' |'


def line_of(row):
    """The line of a table, from its numbers."""
    loss, away = row['paper'], row['paper_difference']
    papers = f'{loss:.2f}' if loss else '–', '–' if away is None else f'{away:+.3f}'
    if not row['runs']:
        return markdown(row['label'], *['–'] * 9, *papers)
    mean, std, is_baseline = row['mean'], row['std'], row['cell'] == row['baseline']
    return markdown(
        row['label'], len(row['runs']), f'{mean["loss"]:.3f}' + (f' ± {std:.3f}' if std else ''),
        f'{mean["perplexity"]:.2f}', f'{mean["bits_per_byte"]:.3f}', f'{mean["steps"]:,.0f}',
        f'{mean["pflops"]:.3g}', f'{mean["pflops_in_all"]:.3g}',
        'baseline' if is_baseline else signed(row['difference']), signed(row['equal_flops']),
        *papers)


def signed(found):
    if not found:
        return '–'
    mean, error, _ = found
    return f'{mean:+.3f}' if error is None else f'{mean:+.4f} ± {error:.4f}'


def verdicts(judged):
    lines = [
        '', "## The paper's claims, at this scale", '',
        'Undecided: zero, or the limit that the claim names, is within the 95% interval of the '
        "difference (Student's t; 4.3 standard errors of three seeds); of one seed, within "
        f'{CLOSE["loss"]}, more where more than two losses enter, or {CLOSE["spikes"]} of spikes. '
        'A claim of several parts holds if all hold, and does not if one does not.', '',
        markdown('where', 'claim', 'the paper', 'ours: difference, of each part', 'verdict'),
        '|---|---|---|---|---|']
    for claim in judged:
        ours = ', '.join(signed(part['found']) for part in claim['parts'])
        lines.append(markdown(claim['table'], claim['claim'], claim['paper'], ours,
                              f'**{claim["verdict"]}**'))
    return lines


# ----------------------------------------------------------------------------- figures

def draw_fig3():
    ours = np.zeros((4, 4))
    for f, a in list(np.ndindex(4, 4))[:-1]:
        found = contrast({f'na{a + 1}_nf{f + 1}': 1, 'na4_nf4': -1})
        ours[f, a] = found[0] if found else math.nan
    fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
    for ax, numbers, title in zip(axes, (ours, paper.FIG3), ('ours', 'the paper, medium')):
        numbers = np.ma.masked_invalid(np.array(numbers, float))
        ax.imshow(numbers, cmap='Blues')
        ax.set(title=title, xlabel='$N_A$', ylabel='$N_F$', xticks=range(4), yticks=range(4),
               xticklabels=range(1, 5), yticklabels=range(1, 5))
        for f, a in np.ndindex(4, 4):
            color = 'white' if numbers[f, a] > 0.6 * numbers.max() else 'black'
            ax.text(a, f, f'{numbers.data[f, a]:+.3f}', ha='center', va='center', color=color)
    save_figure(fig, 'fig3')


def draw_fig4():
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


def draw_fig5():
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for row in rows['fig5']:
        if not record(row.cell, 1):
            continue
        log = [line for line in log_of(tuned(row.cell, 1)) if line['loss']]
        every = np.arange(1, len(log) + 1)
        for ax, key in zip(axes, ('loss', 'grad_norm')):
            values = np.array([float(line[key]) for line in log])
            width = max(1, len(log) // 50)  # a running mean over a fiftieth of the run
            x, y = every[width - 1:], np.convolve(values, np.ones(width) / width, 'valid')
            drawn, = ax.plot(x, y, label=row.label)
            if key == 'grad_norm':
                ax.plot(every, values, color=drawn.get_color(), alpha=0.2, lw=0.5)
    for ax, title in zip(axes, ('training loss, nats per token', 'gradient norm, before clipping')):
        ax.set(xlabel='step', ylabel=title)
        if ax.lines:
            ax.legend()
    axes[1].set_yscale('log')
    save_figure(fig, 'fig5')


def draw_starts():
    """When have fresh routers caught up? Validation loss against tokens per parameter."""
    fig, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    lowest = []
    for n, row in enumerate(rows['starts']):
        if record(row.cell, 1):
            log = [line for line in log_of(tuned(row.cell, 1)) if line['val_loss']]
            x = [int(line['step']) * (tokens_per_step / n_params) for line in log]
            y = [float(line['val_loss']) for line in log]
            style = '--' if recipes[row.cell].family == 'vanilla' else '-'
            ax.plot(x, y, style, color=f'C{n // 2}', marker='o', ms=3, label=row.label)  # in pairs
            lowest.append(min(y))
    if lowest and (found := record('phase_one', 1)):
        ax.axhline(found['loss'], color='k', lw=0.8, ls=':', label='phase one')
        ax.set_ylim(min(lowest) - 0.01, found['loss'] + 0.15)
    ax.set(xlabel='tokens per parameter in phase two', ylabel='validation loss, nats per token')
    if ax.lines:
        ax.legend()
    save_figure(fig, 'starts')


def axis_tables(where):
    """The reports in a folder of kept results, ours first -> {ratio: its rows, by label}.

    Those at the scale's own rates of phase one: another --rate is another axis.
    """
    tables = {}
    paths = sorted(glob.glob(os.path.join(glob.escape(where), '*', 'results.json')))
    for path in dict.fromkeys(map(os.path.realpath, [f'{keep}/results.json', *paths])):
        try:
            with open(path, encoding='utf-8') as f:
                one = json.load(f)
            its, listed = one['settings'], one['rows'].get('axis', [])
            table = {row['label']: row for row in listed
                     if row.get('difference') or row.get('equal_flops')}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f'{path} is left out of axis.png: it is no report ({error!r})')
            continue
        if table and its.get('scale') == 'ratio' and not its.get('rate'):
            if its['ratio'] in tables:
                print(f'{path} is left out of axis.png: another has its ratio, {its["ratio"]}')
            tables.setdefault(its['ratio'], table)
    return tables


def draw_axis(where):
    """axis.png in a folder of kept results: differences from GPT-2 by tokens per parameter."""
    tables = axis_tables(where)
    labels = sorted(row.label for row in rows['axis'] if 'GPT-2' not in row.label)
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained', sharey=True)
    for ax, which, as_many in zip(axes, ('difference', 'equal_flops'), ('steps', 'FLOPs')):
        for label in labels:
            found = {its_ratio: table[label][which] for its_ratio, table in sorted(tables.items())
                     if table.get(label, {}).get(which)}
            if found:
                mean, error, _ = zip(*found.values())
                assembly, start = label.split(', ')
                colors = {'K1H4S': 'C0', 'K2H6S': 'C1', 'K3H1S': 'C2', 'Layers twice': 'C3'}
                style = {'fresh': 'o-', 'begins at the layers': 'o--', 'from scratch': 'o:'}[start]
                ax.errorbar(list(found), mean, [e or 0 for e in error], fmt=style,
                            color=colors[assembly], capsize=2, label=label)
        ax.axhline(0, color='k', lw=0.8)
        ax.set(xscale='log', title=f'GPT-2 continued for as many {as_many}',
               xlabel='tokens per parameter in phase one')
        for name, its_ratio in paper.PAPER_RATIOS.items():
            ax.axvline(its_ratio, color='0.8', zorder=0)
            ax.text(its_ratio, 0.99, f'{name} ', transform=ax.get_xaxis_transform(), va='top',
                    ha='right', color='0.5', size=8)
        ax.set_xticks(list(paper.RATIOS), list(map(str, paper.RATIOS)))
        ax.minorticks_off()
    axes[0].set_ylabel('loss less that of GPT-2, nats per byte')
    if axes[0].containers:
        axes[0].legend(loc='upper left', fontsize=8)
    save_figure(fig, 'axis', [where])


def save_figure(fig, name, into=None):
    for where in into or folders:
        with common.atomic_write(os.path.join(where, f'{name}.png')) as f:
            fig.savefig(f, format='png', dpi=120)
    plt.close(fig)


# ----------------------------------------------------------------------------- training

failed = {}  # folder -> why


def train(what, runs):
    """Train the runs that are not finished, `workers` at a time, each after what it starts from.

    What starts from a run that failed is left out; `failed` says why it failed.
    """
    todo = [run for run in runs if not finished(run)]
    # What they start from is trained again if `keep` has its results and nobody its weights.
    todo = [run for run in with_needs(todo)
            if run in todo or not trained(run)]
    for run in todo:
        records.pop(run, None)
    if todo:
        print(f'{what}: {len(todo)} trainings to do, {len(runs) - len(todo)} done, '
              f'{sum(map(cost, todo)) / 1e15:,.3g} PFLOPs to do', flush=True)
    running, ended, began = {}, [], time.time()
    try:
        while todo or running:
            for run in list(todo):
                if len(running) < workers and asked(run):
                    todo.remove(run)
                    if not trained(run):  # it may be: until now its parent was not there
                        running[start(run)] = run
            if not running:
                break  # what is left depends on what failed
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                run = running.pop(process)
                ended.append(run)
                left = [*todo, *running.values()]
                if trained(run):
                    failed.pop(folder(run), None)
                    took = time.time() - began
                    to_go = took * sum(map(cost, left)) / sum(map(cost, ended))
                    print(f'{len(ended)}/{len(ended) + len(left)} {run_name(run)}: loss '
                          f'{records[run]["loss"]:.4f} | {common.clock(took)}, about '
                          f'{common.clock(to_go)} left', flush=True)
                    say_if_kept_otherwise(run)
                    write_report()
                else:
                    failed[folder(run)] = why_ended(process, folder(run, 'output.txt'))
                    print(f'{run_name(run)} failed: {failed[folder(run)]}', flush=True)
    finally:  # Ctrl-C, or an error of ours, leaves no training behind; train.py saves then
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def say_if_kept_otherwise(run):
    """Another machine rounds otherwise: a run that is trained again may end elsewhere."""
    if keep:
        before = read_kept(run)['result']['loss']
        if before != records[run]['loss']:
            print(f'{run_name(run)}: {keep} has {before:.4f}. What starts from it now goes with '
                  'what started from it now, and not with what is kept', flush=True)


def start(run):
    """The training of a run, as a process. It holds our lock too: none outlives us unnoticed."""
    values = asked(run)
    if os.path.exists(folder(run, 'last.pt')):
        values = dict(init_from='resume', data_dir=data_dir)
    os.makedirs(folder(run), exist_ok=True)
    launch = []
    if processes > 1:
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    values |= dict(out_dir=folder(run), log_every=50, device=device)
    words = [sys.executable, *launch, os.path.join(common.ROOT, 'train.py')]
    words += [f'--{key}={value}' for key, value in values.items()]
    threads = str(max(1, os.cpu_count() // (workers * processes)))
    with open(folder(run, 'output.txt'), 'ab') as output:
        return subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True,
                                pass_fds=common.locked_files(),
                                env={'OMP_NUM_THREADS': threads, **os.environ})


def why_ended(process, path):
    """Why a training ended early, from its exit status and the last that it wrote to a file."""
    if process.returncode <= 0:
        return f'stopped by signal {-process.returncode}' if process.returncode else 'stopped'
    with open(path, errors='replace') as f:
        lines = [line.strip() for line in f if line.strip()] or ['it wrote nothing']
    if lines[-1].startswith('==='):  # torchrun draws a line beneath
        for told in ': error: ', 'received by PID':  # a sentence of ours, or a signal
            if told_by := [line for line in lines if told in line]:
                return told_by[-1]
    return lines[-1]


def close_ones():
    """The runs of more seeds of rows that end close to a baseline, and of those baselines."""
    more = []
    for row in [row for table in MORE_SEEDS if table in chosen for row in rows[table]]:
        name = row.cell
        if name not in wanted or name in (row.baseline, 'phase_one', *budgets):
            continue
        compared = {row.baseline: [row.baseline]}
        if name in beside_gpt2 and has_shared_start(name):
            compared[EQUAL + name] = around(name, 1)
        for other, baselines in compared.items():
            found = contrast({name: 1, other: -1})
            if found and abs(found[0]) < CLOSE['loss']:
                more += [tuned(one, seed) for seed in range(seeds + 1, most_seeds + 1)
                         for one in (name, *baselines)]
    return more


def prepared():
    """The SHA-256 of train.bin in data_dir, which is made if it is not there."""
    meta_path = os.path.join(data_dir, 'meta.json')
    if not os.path.exists(meta_path):
        words = [f'--dataset={text}', f'--tokenizer={S["tokenizer"]}', f'--out_dir={data_dir}']
        script = os.path.join(common.ROOT, 'prepare.py')
        if subprocess.run([sys.executable, script, *words]).returncode:
            raise ValueError(f'prepare.py could not make {data_dir} of {text} (see above)')
    elif 'text' in given:
        print(f'{data_dir} is there already: {text} is not read again')
    try:
        with open(meta_path, encoding='utf-8') as f:
            meta = json.load(f)
        made_with, digest = meta['tokenizer'], meta['train_sha256']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{meta_path} is not one of prepare.py ({error!r}): remove that folder, '
                         'and it is made again from --text') from error
    if made_with != S['tokenizer']:
        raise ValueError(f'{data_dir} was made with tokenizer={made_with}, and scale={scale} takes '
                         f'{S["tokenizer"]}: leave --data_dir out, or name another')
    return digest


# ----------------------------------------------------------------------------- all of it

out_dir = common.results_folder(out_dir)
keep = common.results_folder(keep) if keep else ''
folders = [out_dir, keep] if keep else [out_dir]
seeds_there = [re.fullmatch(r'.+_lr[^_]+_seed(\d+)(\.json)?', name)
               for where in folders for name in os.listdir(where)]
last_seed = max([seeds, most_seeds, *(int(match[1]) for match in seeds_there if match)])
common.lock_folder(out_dir)
if not report:
    train_sha256 = prepared()
common.if_stopped = 'The same command goes on: ' + common.command('python', *sys.argv)

# Seeds that another call has trained belong into every report of this one.
for run in with_needs(probes(known)):
    finished(run)
there = with_needs(tuned(name, seed) for name in known for seed in range(1, last_seed + 1))
for run in there:
    finished(run)
for run in there:
    parent = parent_of(run)
    if parent and parent not in records and run[1] and os.path.exists(folder(run, 'last.pt')):
        print(f'{folder(run)} is left out: {run_name(parent)}, which it starts from, is not there')

if not report:
    train('learning rates', with_needs(probes(wanted)))
    if any(run not in records for run in probes(wanted)):
        reasons = '; '.join(f'{where} failed: {why}' for where, why in failed.items())
        raise ValueError('the learning rate cannot be chosen; the same command tries again, and '
                         f'--rates may leave one out: {reasons}')
    asked_for = [tuned(name, seed) for name in wanted for seed in range(1, seeds + 1)]
    train('tables and figures', with_needs(asked_for))
    train('seeds for what is close', with_needs(close_ones()))
write_report()
if keep and 'axis' in chosen:
    draw_axis(os.path.dirname(os.path.abspath(keep)))
print(f'{out_dir}/results.md')
if failed:
    raise ValueError(f'{len(failed)} trainings failed; the same command tries them again. They are '
                     'in results.md: ' + ', '.join(failed))
