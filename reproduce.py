"""The paper's tables and figures that are about the loss, run again: Tables 1, 2, 4 and Figures 3, 4, 5; and, which
the paper does not have, routers that begin at the layers (`routers`).

  python reproduce.py                                       hours on 2 CPU cores: 8 layers, width 128, bytes
  python reproduce.py --scale=ratio --ratio=85 --text=books/   tokens per parameter as in the paper: width 48, bytes
  python reproduce.py --scale=gpu --text=books/             8 layers, width 512, BPE: an H100, half an hour by count
  python reproduce.py --scale=paper --size=small            the full recipe on 8 GPUs, one of its three sizes
  python reproduce.py --only=table1,fig4 --seeds=3          some of it, with more seeds
  python reproduce.py --only=fig4 --cells=k1h1s,k1h6s       of that, some cells and their baselines
  python reproduce.py --report=True                         tables, figures and verdicts of what is there, no training

A cell is one run of train.py, in its own folder of out_dir. One that is finished is not done again, one that was
stopped goes on: after Ctrl-C, or anything worse, the same command continues. results.md, results.json and the figures
are written anew after every cell.

How it is compared. Phase two starts from the same phase one and sees the same batches in the same order for as many
steps, under the same schedule. The baseline is the vanilla model continued for as many steps (the paper's GPT-2 row has
seen fewer than MoM's), and beside it one continued for as many training FLOPs: its loss is interpolated, in the
logarithm of the FLOPs, between continuations of several lengths, each with its own schedule. The peak learning rate
of phase two is tuned on the first seed: for the vanilla continuation, for K1H4S with routers that begin at the layers,
whose rate all such routers take, and for K2H4S, whose rate all other systems take. What begins from scratch takes phase
one's.
"""
import csv
import fcntl
import glob
import itertools
import json
import math
import os
import shlex
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
from model import GPT, MoMConfig
from weights import load_checkpoint

# --- what
scale = 'cpu'      # 'cpu', 'gpu', 'paper', 'ratio', or 'tiny', which takes seconds and shows nothing
ratio = 85         # at scale ratio: tokens per parameter in phase one, 1, 4, 16 or 85; half as many in phase two
only = ''          # which of table1,table2,table4,fig3,fig4,fig5,routers,axis,starts; '' is the scale's
cells = ''         # which of their cells, by name as in results.json; '' is all
size = 'medium'    # 'small', 'medium', 'large': trained at scale paper; at the others, whose Table 1 stands beside ours
report = False     # train nothing: write the report of what is there
# --- text
text = ''          # prepare.py's dataset: 'sotu', 'openwebtext', files, folders; '' is the scale's
data_dir = ''      # where its tokens are, or will be; '' is data/<text>_<tokenizer>
# --- comparison
seeds = 1          # of phase two, for every cell
most_seeds = 3     # for rows of Tables 1 and 2 and of routers that end within 0.02 of a baseline
steps = []         # of phase one and of phase two, such as [1500,1000]; [] is the scale's
rates = []         # peak learning rates to choose from in phase two; [] is the scale's, one is no choice
# --- system
out_dir = ''       # '' is out/reproduce_<scale>
workers = 0        # cells at a time; 0 is the scale's. On a CPU, two on one thread each beat one on two threads
processes = 0      # of one training, by torchrun; 0 is the scale's
device = 'auto'    # train.py's
# ---
settings, given = common.load(globals())

CLOSE = {'loss': 0.02, 'spikes': 0.2}  # with one seed a smaller difference, in nats per token for loss, decides nothing
T95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # standard errors of the mean of 2, 3, ... 10 seeds
TABLES = ('table1', 'table2', 'table4', 'fig3', 'fig4', 'fig5', 'routers', 'axis', 'starts')
# family -> who finds its learning rate
PROBES = {'vanilla': 'vanilla', 'layers': 'k1h4s_layers', 'mom': 'k2h6s' if scale == 'ratio' else 'k2h4s'}
# Multiples of phase two's steps for which the vanilla model is continued too: they span the FLOPs of Table 1's other
# systems
BUDGETS = (0.5, 2, 4) if scale == 'ratio' else (0.55, 1.7, 3.2)
EQUAL = 'vanilla for the FLOPs of '  # + a cell: the vanilla model continued for as many training FLOPs; see record
SCALES = {  # steps: phase one, phase two. rate: of phase one. fig3_H: the paper does not say which H its Figure 3 has
    'tiny': dict(text='sotu', tokenizer='bytes', steps=[6, 4], rate=0.01, rates=[0.01], batch_size=4, micro_batch=4,
                 eval_tokens=512, n_embd=16, n_head=2, block_size=16, router_dim=8, fig3_H=2, workers=1, processes=1),
    # 68 cells, 1.3 PFLOPs, and more seeds where it is close, 0.6: about 5 hours on 2 cores
    'cpu': dict(text='sotu', tokenizer='bytes', steps=[1500, 1000], rate=4e-3, rates=[1e-3, 2e-3, 4e-3], batch_size=8,
                micro_batch=8, eval_tokens=60_000, n_embd=128, n_head=4, block_size=128, router_dim=64, fig3_H=4,
                workers=os.cpu_count(), processes=1),
    # the same cells, 520 PFLOPs, 25 minutes of an H100 at 35% of its peak, and as many more seeds: 11 minutes. Four
    # share it, as one does not fill it. The 2.4M tokens of sotu are seen ten times in phase one: take more text
    'gpu': dict(text='sotu', tokenizer='gpt2', steps=[1500, 1000], rate=1e-3, rates=[5e-4, 1e-3, 2e-3], batch_size=32,
                micro_batch=32, eval_tokens=200_000, n_embd=512, n_head=8, block_size=512, router_dim=128, fig3_H=4,
                workers=4, processes=1),
    # What is held is the number of tokens per parameter, which is 85 for the paper's small model, 30 for medium, 14 for
    # large; at scale cpu it is 1. A model this small gets there in minutes. steps, rates and batches: see RATIOS
    'ratio': dict(text='sotu', tokenizer='bytes', n_embd=48, n_head=3, block_size=128,
                  router_dim=24, fig3_H=4, workers=1, processes=1),
    # config/*.py as they are, but for phase one, which is our own 20k steps as in Table 2.
    # Medium: 71 cells, 1.5e21 FLOPs, 17 days of 8 A100 at 40% of their peak
    'paper': dict(text='openwebtext', tokenizer='gpt2', steps=[20_000, 10_000], rate=1e-3, rates=[1e-3],
                  batch_size=512, micro_batch=8, eval_tokens=4_000_000, block_size=1024, router_dim=256, fig3_H=6,
                  workers=1, processes=8)}

# tokens per parameter -> sequences of a batch (at least 239 steps); how many tokens are evaluated, and how often;
# the rate of phase one, the best of 0.003, 0.006, 0.012 and 0.024 (at 85 of 0.006 and 0.012); the rates of phase two
RATIOS = {1: (8, 100_000, 4, 12e-3, [1e-3, 2e-3, 4e-3, 8e-3]), 4: (8, 100_000, 4, 6e-3, [1e-3, 2e-3, 4e-3, 8e-3]),
          16: (32, 300_000, 4, 12e-3, [1e-3, 2e-3, 4e-3, 8e-3]), 85: (32, 300_000, 8, 12e-3, [1e-3, 2e-3, 4e-3])}
for key, known in (('scale', SCALES), ('size', ('small', 'medium', 'large')), ('ratio', RATIOS)):
    if settings[key] not in known:
        raise ValueError(f'{key}={settings[key]!r} must be one of {", ".join(map(str, known))}')
if scale == 'ratio':
    size, S = 'small', SCALES[scale]
    with torch.device('meta'):
        parameters = GPT(MoMConfig('1-1-1-1-1-1-1-1', n_embd=S['n_embd'], n_head=S['n_head'],
                                   block_size=S['block_size'], vocab_size=257)).num_params()[0]
    of_batch, evaluated, evaluations, rate, its_rates = RATIOS[ratio]
    one = round(ratio * parameters / (of_batch * S['block_size']))
    S.update(batch_size=of_batch, micro_batch=of_batch, eval_tokens=evaluated, evaluations=evaluations, rate=rate,
             rates=its_rates, steps=[one, round(one / 2)])
    only = only or ('axis,table1,table2,fig4,starts' if ratio == 85 else 'axis')
only = only or ','.join(TABLES[:7])
chosen, picked = only.split(','), cells.split(',') if cells else []
for table in chosen:
    if table not in TABLES:
        raise ValueError(f'only={only!r}: {table!r} is none of {", ".join(TABLES)}')
if not 1 <= seeds or min(workers, processes) < 0:
    raise ValueError(f'seeds={seeds} must be at least 1, workers={workers} and processes={processes} at least 0')
if steps and (len(steps) != 2 or any(type(n) is not int or n < 1 for n in steps)):
    raise ValueError(f'steps={steps} must be two numbers, of phase one and of phase two, such as [1500,1000]')
if any(type(rate) not in (int, float) or rate <= 0 for rate in rates):
    raise ValueError(f'rates={rates} must be positive numbers, such as [0.002,0.004]')
S = SCALES[scale]
steps, rates, text = steps or S['steps'], list(dict.fromkeys(rates or S['rates'])), text or S['text']
workers, processes = workers or S['workers'], processes or S['processes']
out_dir = out_dir or f'out/reproduce_{scale}' + f'_{size}' * (scale == 'paper') + f'_{ratio}' * (scale == 'ratio')
if not data_dir:
    stem = os.path.splitext(os.path.basename(os.path.normpath(text.split(',')[0])))[0]
    data_dir = f'data/{stem}_{S["tokenizer"]}'

# ----------------------------------------------------------------------------- cells: what is to be trained

MIXTRAL = dict(router='linear', router_weights='softmax', tau=1.0, skip=False)
shared_settings = {k: S[k] for k in ('batch_size', 'micro_batch', 'eval_tokens', 'block_size')}
if scale == 'paper':
    one = common.read_file(f'{common.ROOT}/config/gpt2_{size}.py')
    two = common.read_file(f'{common.ROOT}/config/mom_{size}_k2h6s.py')
    shape = dict(n_embd=one['n_embd'], n_head=one['n_head'])
    LAYERS, CHUNKS, shared_settings['micro_batch'] = one['chunks'], two['chunks'], two['micro_batch']
else:
    shape = dict(n_embd=S['n_embd'], n_head=S['n_head'])
    LAYERS, CHUNKS = '1-1-1-1-1-1-1-1', '1-1-4-1-1'

# name of a cell -> what train.py is told, and: needs (the cell it starts from), family (whose learning rate it takes)
recipes = {}


def add(name, family='mom', needs='phase_one', max_steps=steps[1], **model):
    routed = family in ('mom', 'layers')
    model = dict(chunks=CHUNKS if routed else LAYERS, **shape) | model
    if routed:
        model.setdefault('router_dim', S['router_dim'])
    recipes[name] = dict(family=family, needs=needs, max_steps=max_steps, model=model)
    return name


add('phase_one', 'phase_one', '', steps[0])
add('vanilla', 'vanilla')
grid = {(K, H): add(f'k{K}h{H}s', K=K, H=H, skip=True) for K in range(1, 5) for H in range(1, 7)}
budgets = [add(f'vanilla_x{times:g}', 'vanilla', max_steps=max(1, round(times * steps[1]))) for times in BUDGETS]
budgets.insert(1, 'vanilla')
starts = {(K, H): add(f'k{K}h{H}s_layers', 'layers', K=K, H=H, skip=True, router_start='layers', weigh_qkv=True)
          for K, H in ((1, 4), (2, 4), (2, 6), (3, 1))}
longer = {times: (add(f'k2h6s_x{times}', max_steps=times * steps[1], K=2, H=6, skip=True), f'vanilla_x{times}')
          for times in (2, 4)} if scale == 'ratio' else {}
add('k1h4s_layers_narrow', 'layers', K=1, H=4, skip=True, router_start='layers', weigh_qkv=True,
    router_dim=S['router_dim'] // 4)
add('first_layers', phi='share', K=1, c_share=[0], N_A=1, N_F=1)  # nothing is routed: what is dropping layers worth?
add('mod', chunks=LAYERS, phi='mod', K=1, capacity=0.125, router='linear')
add('layer_skip', phi='layer_skip', K=1, skip=True)
add('moe', chunks=LAYERS, phi='moe', experts=4, K=2, **MIXTRAL)
add('moe_share', phi='moe_share', K=2, **MIXTRAL)
add('scratch', needs='', max_steps=steps[0], K=2, H=6, skip=True)
add('scratch_more', needs='scratch', K=2, H=6, skip=True)
add('same', K=2, H=6, skip=True, tied=True)
pools = {(a, f): add(f'na{a}_nf{f}', K=max(a, f), H=S['fig3_H'], skip=False, N_A=a, N_F=f)
         for f in range(1, 5) for a in range(1, 5)}
curves = [add(f'k1h4_{router}{suffix}', needs=needs, K=1, H=4, skip=False, router=router)
          for needs, suffix in (('', '_scratch'), ('phase_one', '')) for router in ('gru', 'mlp')]
cuts = {}  # Table 4, always of 8 layers; at scale paper those are another model, of its own phase one, for 5k steps
for cut, H in (('1-1-4-1-1', 4), ('1-6-1', 6), ('8', 8), ('4-4', 4)):
    for K in (1, 2):
        if scale != 'paper':
            cuts[cut, K] = grid[K, H] if cut == CHUNKS else add(f'cut_{cut}_k{K}h{H}s', chunks=cut, K=K, H=H, skip=True)
        else:
            cuts[cut, K] = add(f'cut_{cut}_k{K}h{H}s', needs='phase_one_8', max_steps=steps[1] // 2, chunks=cut, K=K,
                               H=H, skip=True, n_embd=768, n_head=12)
if scale == 'paper':
    add('phase_one_8', 'phase_one', '', steps[0], chunks='1-1-1-1-1-1-1-1', n_embd=768, n_head=12)

# Rows of the tables: (label, cell, its baseline, the paper's loss, its difference from the paper's baseline)
P = dict(zip(('GPT-2', 'MoD', 'MoE', 'share', 'E', 'I', 'P'), {
    'small': (3.10, 3.22, 3.07, 3.14, 3.16, 3.03, 2.98), 'medium': (2.81, 2.99, 2.80, 2.82, 2.83, 2.77, 2.72),
    'large': (2.66, 2.81, 2.64, 2.65, 2.66, 2.64, 2.60)}[size]))
FIG3 = [[.384, .555, .254, .254], [.218, .169, .116, .096], [.107, .065, .058, .056], [.031, -.005, .001, 0]]
rows = {
    'table1': [(label, cell, 'vanilla', P.get(key), P[key] - P['GPT-2'] if key else None) for label, cell, key in [
        ('GPT-2, phase one only', 'phase_one', 'GPT-2'), ('GPT-2 continued', 'vanilla', ''),
        ('MoD', 'mod', 'MoD'), ('MoD, read as K1H4S', 'layer_skip', 'MoD'), ('MoE', 'moe', 'MoE'),
        ('MoE (share)', 'moe_share', 'share'), ('MoM_E, K3H1S', 'k3h1s', 'E'), ('MoM_I, K3H2S', 'k3h2s', 'I'),
        ('MoM_P, K2H6S', 'k2h6s', 'P'), ('K2H4S', 'k2h4s', '')]],
    'table2': [('(1) MoM from scratch', 'scratch', 'phase_one', 2.85, 0.04),
               ('(2) vanilla, phase one', 'phase_one', 'phase_one', 2.81, None),
               ('vanilla continued', 'vanilla', 'vanilla', None, None),
               ('(3) MoM from scratch, continued', 'scratch_more', 'vanilla', 2.78, -0.03),
               ('(4) two phases', 'k2h6s', 'vanilla', 2.72, -0.09),
               ('(5) two phases, MoM-same', 'same', 'vanilla', 3.13, 0.32)],
    'table4': [(f'[{cut}] ' + cuts[cut, K].split('_')[-1].upper(), cuts[cut, K], cuts['1-1-4-1-1', K], loss,
                loss - losses[0])
               for K, losses in ((1, (3.27, 3.45, 4.63, 5.59)), (2, (3.22, 3.21, 3.23, 3.22)))
               for cut, loss in zip(('1-1-4-1-1', '1-6-1', '8', '4-4'), losses)],
    'fig3': [(f'N_A = {a}, N_F = {f}', name, 'na4_nf4', None, FIG3[f - 1][a - 1]) for (a, f), name in pools.items()],
    'fig4': [(f'K{K}H{H}S', name, 'vanilla', None, None) for (K, H), name in grid.items()],
    'fig5': [(f'{router}, {how}', name, 'k1h4_gru', None, None) for name, (how, router) in zip(
        curves, itertools.product(('from scratch', 'two phases'), ('GRU', 'MLP')))]}


rows['axis'] = [('GPT-2 continued', 'vanilla', 'vanilla', None, None)] + [
    (f'K{K}H{H}S, {how}', name, 'vanilla', None, None) for K, H in ((2, 6), (3, 1), (1, 4))
    for how, name in (('fresh', grid[K, H]), ('begins at the layers', starts[K, H]))]
rows['starts'] = [('GPT-2 continued', 'vanilla', 'vanilla', None, None),
                  ('K2H6S, fresh', 'k2h6s', 'vanilla', None, None)]
for times, (fresh, vanilla) in longer.items():
    rows['starts'] += [(f'GPT-2 continued, {times} times the steps', vanilla, vanilla, None, None),
                       (f'K2H6S, fresh, {times} times the steps', fresh, vanilla, None, None)]
if scale == 'ratio':
    rows['fig4'] = [row for row in rows['fig4'] if row[0][3] in '16']  # its corners: H = 1 and 6

more = [(label, name, 'vanilla', None, None) for label, name in [
    *((f'GPT-2 continued, {times:g} times the steps', f'vanilla_x{times:g}') for times in BUDGETS),
    ('GPT-2 with the first layer of each chunk only', 'first_layers')]]
rows['table1'][2:2] = more
rows['fig4'] += more
rows['axis'][1:1] = [row for row in more if row[1] in ('vanilla_x0.5', 'vanilla_x2')]
rows['routers'] = [('GPT-2 continued', 'vanilla', 'vanilla', None, None), *more] + [
    (f'K{K}H{H}S, {how}', name, 'vanilla', None, None) for (K, H), start in starts.items()
    for how, name in (('fresh', grid[K, H]), ('begin at the layers', start))] + [
    ('K1H4S, begin at the layers, routers a quarter as wide', 'k1h4s_layers_narrow', 'vanilla', None, None)]

said = {key: f'{loss:.2f}' for key, loss in P.items()}


def below(*names):  # each cell ends below the next: contrasts, sums of losses that are to be negative
    return [{a: 1, b: -1} for a, b in zip(names, names[1:])]


# (where, claim, the paper's figures, contrasts, limit): each contrast is below 0, or within +-limit if there is one
CLAIMS = [
    ('table1', 'MoM_P ends below GPT-2 continued for as many steps',
     f'{said["P"]} and {said["GPT-2"]} (of fewer steps)', below('k2h6s', 'vanilla'), 0),
    *(('table1', f'{label} ends below GPT-2 continued for as many FLOPs', 'not compared there',
       below(name, EQUAL + name), 0)
      for label, name in (('MoM_P', 'k2h6s'), ('MoM_I', 'k3h2s'), ('MoM_E', 'k3h1s'), ('MoD', 'mod'), ('MoE', 'moe'))),
    ('table1', 'MoM_P < MoM_I < MoM_E', f'{said["P"]}, {said["I"]}, {said["E"]}', below('k2h6s', 'k3h2s', 'k3h1s'), 0),
    ('table1', 'MoM_P ends below all baselines of Table 1', f'{said["P"]}, the next {min(P["GPT-2"], P["MoE"]):.2f}',
     [{'k2h6s': 1, name: -1} for name in ('vanilla', 'mod', 'moe', 'moe_share')], 0),
    ('table1', 'MoM_I ends slightly below GPT-2 continued', f'{said["I"]} and {said["GPT-2"]}',
     below('k3h2s', 'vanilla'), 0),
    ('table1', 'MoM_E is slightly surpassed by GPT-2 continued', f'{said["GPT-2"]} and {said["E"]}',
     below('vanilla', 'k3h1s'), 0),
    ('table1', 'MoM_E outperforms MoD', f'{said["E"]} and {said["MoD"]}', below('k3h1s', 'mod'), 0),
    ('table1', 'MoE, with more parameters, ends below GPT-2 continued', f'{said["MoE"]} and {said["GPT-2"]}',
     below('moe', 'vanilla'), 0),
    ('table2', 'From scratch, MoM is worse than vanilla after as many steps', '2.85 and 2.81',
     below('phase_one', 'scratch'), 0),
    ('table2', 'Two phases beat MoM from scratch of as many steps', '2.72 and 2.78', below('k2h6s', 'scratch_more'), 0),
    ('table2', 'MoM-same is worse than MoM with modules of their own', '3.13 and 2.72', below('k2h6s', 'same'), 0),
    ('table2', 'MoM-same is worse even than MoM from scratch of fewer steps', '3.13 and 2.85',
     below('scratch', 'same'), 0),
    ('table4', 'With K = 1, [1-1-4-1-1] is the best chunking', '3.27; 3.45, 4.63, 5.59',
     [{cuts['1-1-4-1-1', 1]: 1, cuts[cut, 1]: -1} for cut in ('1-6-1', '8', '4-4')], 0),
    ('table4', 'With K = 2, all chunkings end within 0.05 of [1-1-4-1-1]', '3.22; 3.21, 3.23, 3.22',
     [{cuts[cut, 2]: 1, cuts['1-1-4-1-1', 2]: -1} for cut in ('1-6-1', '8', '4-4')], 0.05),
    ('table4', 'K = 2 is better than K = 1 in every chunking', '3.22 and 3.27; 3.21, 3.45; 3.23, 4.63; 3.22, 5.59',
     [{cuts[cut, 2]: 1, cuts[cut, 1]: -1} for cut in ('1-1-4-1-1', '1-6-1', '8', '4-4')], 0),
    ('fig3', 'Every feed-forward module that is removed costs (N_A = 4)', '+0.056, +0.040, +0.158',
     below('na4_nf4', 'na4_nf3', 'na4_nf2', 'na4_nf1'), 0),
    ('fig3', 'Attention modules cost little to remove until the last: 4 to 2 costs less than 2 to 1 (N_F = 4)',
     '-0.005 and +0.036', [{'na2_nf4': 2, 'na4_nf4': -1, 'na1_nf4': -1}], 0),
    ('fig3', 'Attention is more redundant: removing two, or three, costs less of N_A than of N_F',
     '-0.005 and +0.096; +0.031 and +0.254', below('na2_nf4', 'na4_nf2') + below('na1_nf4', 'na4_nf1'), 0),
    ('fig4', 'More modules at a step are better: K = 2, 3, 4 end below K = 1, with H = 1 and with H = 6',
     'a figure without numbers', sum((below(grid[K, H], grid[1, H]) for H in (1, 6) for K in (2, 3, 4)), []), 0),
    ('fig4', 'More steps are better: H = 6 ends below H = 1, for K = 1, 2, 3, 4', 'a figure without numbers',
     sum((below(grid[K, 6], grid[K, 1]) for K in range(1, 5)), []), 0),
    ('fig4', 'Beyond K = 2, H = 1 little is gained: K1H1S to K3H2S gains more than K3H2S to K4H6S',
     'a figure without numbers', [{'k3h2s': 2, 'k1h1s': -1, 'k4h6s': -1}], 0),
    ('fig4', 'Choosing one of the modules of a chunk is better than taking the first: K1H1S', 'not compared there',
     below('k1h1s', 'first_layers'), 0),
    ('fig4', 'K3H1S is comparable to K2H6S, within 0.05', f'so the text; Table 1 has {said["E"]} and {said["P"]}',
     [{'k3h1s': 1, 'k2h6s': -1}], 0.05),
    ('fig5', 'From scratch, GRU and MLP routers end within 0.05', 'nearly identical curves',
     [{'k1h4_gru_scratch': 1, 'k1h4_mlp_scratch': -1}], 0.05),
    ('fig5', 'With two phases the gradient norm spikes more under the MLP router (99th percentile over median)',
     'spikes in a figure', below('k1h4_gru', 'k1h4_mlp'), 0),
    ('fig5', 'Two phases end below as many steps from scratch, with a GRU router', 'a figure without numbers',
     below('k1h4_gru', 'k1h4_gru_scratch'), 0)]
for (K, H), start in starts.items():
    CLAIMS += [('routers', f'K{K}H{H}S with routers that begin at the layers ends below {other}', 'not in the paper',
                below(start, name), 0) for other, name in (
                    ('fresh ones', grid[K, H]), ('GPT-2 continued for as many steps', 'vanilla'),
                    ('GPT-2 continued for as many FLOPs', EQUAL + start))]
CLAIMS.append(('routers', 'K1H4S with such routers, a quarter as wide, ends below GPT-2 continued for as many FLOPs',
               'not in the paper', below('k1h4s_layers_narrow', EQUAL + 'k1h4s_layers_narrow'), 0))

phase_two = [name for name, cell in recipes.items() if cell['family'] != 'vanilla' and cell['needs'] == 'phase_one']
known = list(dict.fromkeys(name for table in chosen for _, cell, base, _, _ in rows[table] for name in (cell, base)))
for name in picked:
    if name not in known:
        raise ValueError(f'cells={cells!r}: {name!r} is none of those of {",".join(chosen)}: {", ".join(known)}')
wanted = list(dict.fromkeys([name for table in chosen for _, cell, base, _, _ in rows[table]
                             if cell in (picked or known) for name in (base, cell)] + picked))  # a baseline by itself

# ----------------------------------------------------------------------------- cells: what is there

train_sha256 = None  # of the text; a report looks at no text
records = {}  # (name, rate, seed) -> results of a finished cell
last_seed = max(seeds, most_seeds, *(int(path.rsplit('_seed', 1)[1]) for path in glob.glob(f'{out_dir}/*_seed[0-9]*')))


def folder(name, rate, seed):
    return os.path.join(out_dir, f'{name}_lr{rate:g}_seed{seed}')


def rate_of(name):
    """The cell's peak learning rate: phase one's for what begins from scratch, else its family's best on seed 1. None
    while results to choose by are not all in; a report chooses by what is there."""
    family = recipes[name]['family']
    if not recipes[name]['needs'] or len(rates) == 1:
        return rates[0] if recipes[name]['needs'] else S['rate']
    probe = PROBES[family]
    losses = {rate: records[probe, rate, 1]['loss'] for rate in rates if (probe, rate, 1) in records}
    return min(losses, key=losses.get) if losses and (report or len(losses) == len(rates)) else None


def record(name, seed):
    """Results of a cell, None if they are not in. EQUAL + a cell is the vanilla model continued for as many FLOPs as
    that one took: linear in their logarithm between the two nearest of the vanilla model's continuations."""
    if name.startswith(EQUAL):
        name = name.removeprefix(EQUAL)
        other, two = record(name, seed), [record(one, seed) for one in around(name, seed)]
        if not two:
            return None
        x, (less, more) = math.log(other['pflops']), (math.log(r['pflops']) for r in two)
        return dict(loss=float(np.interp(x, (less, more), [r['loss'] for r in two])))
    return records.get((name, rate_of(name), seed))


def around(name, seed):
    """The nearest two continuations of the vanilla model that took fewer and more FLOPs than a cell, if they are in."""
    other = record(name, seed)
    for less, more in zip(budgets, budgets[1:]):
        if (other and (a := record(less, seed)) and (b := record(more, seed))
                and a['pflops'] <= other['pflops'] <= b['pflops']):
            return less, more
    return ()


def needed(name, seed):
    """The cells that have to be finished before this one can begin, as (name, seed). All phase two of all seeds begins
    from the same phase one; what was begun from scratch goes on from its own seed."""
    cell = recipes[name]
    return [(cell['needs'], 1 if cell['needs'].startswith('phase_one') else seed)] if cell['needs'] else []


def asked(name, rate, seed):
    """train.py's settings for a cell, without those of the system; None while what it depends on is not finished."""
    cell = recipes[name]
    if not all(record(*other) for other in needed(name, seed)):
        return None
    start = 'scratch'
    if cell['needs']:
        before = needed(name, seed)[0]
        start = os.path.join(folder(before[0], rate_of(before[0]), before[1]), 'last.pt')
    first = name == 'scratch' or cell['family'] == 'phase_one'
    batches = 1000 * seed + (337 if first else 338)  # 1337 and 1338, as in config/; 2337 and 2338; ...
    return dict(shared_settings, **cell['model'], data_dir=data_dir, init_from=start, seed=batches,
                learning_rate=float(rate), max_steps=cell['max_steps'],
                eval_every=math.ceil(cell['max_steps'] / S.get('evaluations', 4)))


def step_flops(model, k_a=None, k_f=None):
    """Training FLOPs of a step: three forward passes, by the method's count (merged=False) of GPT.flops_per_token."""
    shape = {f.name: model[f.name] for f in fields(MoMConfig) if f.name in model}
    with torch.device('meta'):
        gpt = GPT(MoMConfig(**dict(shape, block_size=S['block_size'], vocab_size=vocab_size)))
    return 3 * gpt.flops_per_token(S['block_size'], k_a, k_f) * S['batch_size'] * S['block_size']


def look(name, rate, seed):
    """'new', 'begun' or 'finished', which puts its results into records. Raises ValueError if the folder holds a run
    with other settings."""
    where, want = folder(name, rate, seed), asked(name, rate, seed)
    if want is None or not os.path.exists(os.path.join(where, 'last.pt')):
        return 'new'
    saved = load_checkpoint(os.path.join(where, 'last.pt'))
    for key, value in want.items():
        had = saved['settings'].get(key)
        if key == 'init_from':  # folders may move
            had, value = (os.path.basename(os.path.dirname(str(path))) for path in (had, value))
        if had != value and key not in ('micro_batch', 'data_dir'):
            raise ValueError(f'{where} holds a run with {key}={had!r}, not {value!r}: ask for the same, take another '
                             '--out_dir, or remove that folder')
    if train_sha256 and saved['meta']['train_sha256'] != train_sha256:
        raise ValueError(f'{where} was trained on another text than {data_dir}: take another --out_dir')
    if saved['step'] < want['max_steps']:
        return 'begun'
    with open(os.path.join(where, 'log.csv'), newline='') as f:
        log = list(csv.DictReader(f))
    val = [row for row in log if row['val_loss']]
    if not val or int(val[-1]['step']) < want['max_steps']:
        return 'begun'  # it was stopped in its last evaluation
    k_a, k_f = (np.trapezoid([float(row[k]) for row in val], [int(row['step']) for row in val]) / want['max_steps']
                for k in ('k_a', 'k_f'))  # means over the training, of what the validation text selects
    if saved['model_config']['phi'] == 'mod':  # k_a is what its predictor lets through: training takes `capacity`
        k_a = k_f = saved['model_config']['capacity']
    norms = [float(row['grad_norm']) for row in log if row['grad_norm'] and int(row['step']) > 0.1 * want['max_steps']]
    spent = step_flops(saved['model_config'], k_a, k_f) * want['max_steps'] / 1e15
    records[name, rate, seed] = dict(
        loss=float(val[-1]['val_loss']), perplexity=math.exp(float(val[-1]['val_loss'])),
        bits_per_byte=float(val[-1]['val_bits_per_byte']), steps=want['max_steps'], rate=rate, k_a=k_a, k_f=k_f,
        pflops=spent, pflops_in_all=spent + sum(record(*other)['pflops_in_all'] for other in needed(name, seed)),
        minutes=sum(float(row['ms']) for row in log if row['ms']) / 6e4,
        spikes=float(np.percentile(norms, 99) / np.median(norms)))
    return 'finished'


def closure(pairs):  # (name, seed)s with all that they depend on, in an order in which they can run
    order = {}
    for name, seed in pairs:
        order.update(dict.fromkeys(closure(needed(name, seed))))
        order[name, seed] = None
    return list(order)

# ----------------------------------------------------------------------------- report


def estimate(values):
    """Mean and standard error; None where one seed says nothing of it."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def contrast(weights, metric='loss'):
    """The weighted sum of cells' results, seed by seed: (mean, standard error or None, seeds); None if none is in."""
    by_seed = [[record(name, seed) for name in weights] for seed in range(1, last_seed + 1)]
    values = [sum(w * r[metric] for w, r in zip(weights.values(), found)) for found in by_seed if all(found)]
    return (*estimate(values), len(values)) if values else None


def judge(weights, limit, metric):
    """(verdict, contrast): undecided within the 95% interval of Student's t, or with one seed within CLOSE, which is
    meant for the difference of two losses and grows as the noise of a sum of more does."""
    found = contrast(weights, metric)
    if found is None:
        return 'not run', None
    mean, error, n = found
    noise = max(1, math.sqrt(sum(w * w for w in weights.values()) / 2))
    room = CLOSE[metric] * noise if error is None else T95[min(n, len(T95) + 1) - 2] * error
    off = (abs(mean) if limit else mean) - limit
    return 'holds' if off < -room else 'does not hold' if off > room else 'undecided', found


def signed(found):
    mean, error, _ = found
    return f'{mean:+.3f}' if error is None else f'{mean:+.4f} ± {error:.4f}'


def write_report():
    import matplotlib.pyplot as plt
    turn = open(os.path.join(out_dir, 'report_lock'), 'w')  # a --report may come while we train
    fcntl.flock(turn, fcntl.LOCK_EX)
    lines = [f'# The paper again, at scale {scale}', '', f'`python {shlex.join(sys.argv)}`', '',
             f'Phase one {steps[0]:,} steps, phase two {steps[1]:,}, of {S["batch_size"]} sequences of '
             f'{S["block_size"]} tokens ({data_dir}, {S["tokenizer"]}). Losses are of validation after the last step, '
             'in nats per token, ± the standard deviation over seeds; differences are seed by seed, ± their standard '
             "error. PFLOPs are of training, by the method's count with the modules that were chosen; for as many, the "
             "vanilla model's loss is interpolated between its continuations. The paper's figures are of "
             f'GPT-2-{size}, or as its table says.', '',
             f'Learning rates: phase one, and all from scratch, {S["rate"]:g}; phase two by the loss of seed 1 (if the '
             'best is the first or the last, --rates is too short): ' + '; '.join(
                 f'{of} {rate_of(probe) or "–"} (' + ', '.join(f'{rate:g}: ' + (f'{r["loss"]:.3f}' if (
                     r := records.get((probe, rate, 1))) else '–') for rate in rates) + ')'
                 for of, probe in zip(('vanilla', 'routers that begin at the layers, by K1H4S,',
                                       'all others, by K2H4S,'), PROBES.values())) + '.']
    result = dict(command=shlex.join(sys.argv), settings=settings, scale=dict(S, steps=steps, rates=rates), rows={},
                  claims=[], fig5_curves={}, failed=failed)
    for table in chosen:
        title = table.replace('table', 'Table ').replace('fig', 'Figure ').replace('routers', 'Where routers begin')
        title = title.replace('axis', 'Tokens per parameter').replace('starts', 'A longer phase two')
        lines += ['', f'## {title}', '',
                  '| system | seeds | loss | perplexity | bits/byte | steps | PFLOPs | in all | from the baseline '
                  "| from GPT-2 of as many FLOPs | paper: loss | paper: from its baseline |", '|' + '---|' * 12]
        result['rows'][table] = []
        for label, name, base, paper, away in rows[table]:
            found = [r for seed in range(1, last_seed + 1) if (r := record(name, seed))]
            row = dict(label=label, cell=name, baseline=base, runs=found, paper=paper, paper_difference=away)
            beside = (f'| {paper:.2f} |' if paper else '| – |') + (' – |' if away is None else f' {away:+.3f} |')
            if not found:
                lines.append(f'| {label} |' + ' – |' * 9 + beside[1:])
            else:
                mean = {k: statistics.fmean(r[k] for r in found) for k in found[0]}
                spread = statistics.stdev(r['loss'] for r in found) if len(found) > 1 else None
                row.update(mean=mean, std=spread, difference=(d := contrast({name: 1, base: -1})
                                                              if name != base else (0.0, None, len(found))),
                           equal_flops=(equal := contrast({name: 1, EQUAL + name: -1}) if name in phase_two else None))
                lines.append(f'| {label} | {len(found)} | {mean["loss"]:.3f}' + (f' ± {spread:.3f}' if spread else '')
                             + f' | {mean["perplexity"]:.2f} | {mean["bits_per_byte"]:.3f} | {mean["steps"]:,.0f} | '
                             f'{mean["pflops"]:.3g} | {mean["pflops_in_all"]:.3g} | '
                             + ('baseline | ' if name == base else f'{signed(d)} | ' if d else '– | ')
                             + (f'{signed(equal)} ' if equal else '– ') + beside)
            result['rows'][table].append(row)
    lines += ['', "## The paper's claims, at this scale", '',
              'Undecided: zero, or the limit that the claim names, is within the 95% interval of the difference '
              "(Student's t; 4.3 standard errors of three seeds); of one seed, within {loss}, more where more than two "
              'losses enter, or {spikes} of spikes. A claim of several parts holds if all hold, and does not if one '
              'does not.'.format(**CLOSE), '',
              '| where | claim | the paper | ours: difference, of each part | verdict |', '|---|---|---|---|---|']
    for table, claim, paper, contrasts, limit in CLAIMS:
        if table in chosen:
            judged = [judge(weights, limit, 'spikes' if 'spikes' in claim else 'loss') for weights in contrasts]
            verdict = min((v for v, _ in judged), key=['does not hold', 'not run', 'undecided', 'holds'].index)
            result['claims'].append(dict(table=table, claim=claim, paper=paper, verdict=verdict, limit=limit, parts=[
                dict(contrast=w, verdict=v, found=found) for w, (v, found) in zip(contrasts, judged)]))
            numbers = ', '.join(signed(found) if found else '–' for _, found in judged)
            lines.append(f'| {table} | {claim} | {paper} | {numbers} | **{verdict}** |')
    if failed:
        lines += ['', '## Not finished', ''] + [f'- {where}: {why}' for where, why in failed.items()]

    if 'fig3' in chosen:
        ours = [[(contrast({pools[a, f]: 1, 'na4_nf4': -1}) or [math.nan])[0] if (a, f) != (4, 4) else 0
                 for a in range(1, 5)] for f in range(1, 5)]
        fig, axes = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
        for ax, numbers, title in zip(axes, (ours, FIG3), ('ours', 'the paper, medium')):
            ax.imshow(np.ma.masked_invalid(np.array(numbers, float)), cmap='Blues')
            ax.set(title=title, xlabel='$N_A$', ylabel='$N_F$', xticks=range(4), yticks=range(4),
                   xticklabels=range(1, 5), yticklabels=range(1, 5))
            for f, a in np.ndindex(4, 4):
                ax.text(a, f, f'{numbers[f][a]:+.3f}', ha='center', va='center',
                        color='white' if numbers[f][a] > 0.6 * np.nanmax(numbers) else 'black')
        save_figure(fig, 'fig3')
    if 'fig4' in chosen:
        fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
        axes[0].set(xlabel='H', ylabel='loss from GPT-2 continued, nats per token', xticks=range(1, 7))
        axes[0].axhline(0, color='k', ls='--')
        axes[1].set(xlabel='PFLOPs of phase two', xscale='log')
        drawn = [*((f'K = {K}', 'o-', [grid[K, H] for H in range(1, 7)]) for K in range(1, 5)),
                 ('GPT-2 continued', 'ks--', budgets), ('first layers only', 'kx', ['first_layers'])]
        for label, style, names in drawn:
            found = [(0, 0) if name == 'vanilla' else contrast({name: 1, 'vanilla': -1}) for name in names]
            points = [(H, r['pflops'], d[0], d[1] or 0) for H, (name, d) in enumerate(zip(names, found), 1)
                      if d and (r := record(name, 1))]
            if points:  # differences seed by seed, with their standard error where there are several
                H, pflops, away, error = zip(*points)
                axes[1].errorbar(pflops, away, error, fmt=style, capsize=2, label=label)
                if label.startswith('K ='):
                    axes[0].errorbar(H, away, error, fmt=style, capsize=2)
        if axes[1].containers:
            axes[1].legend()
        save_figure(fig, 'fig4')
    if 'fig5' in chosen:
        fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
        for label, name, *_ in rows['fig5']:
            if record(name, 1):
                with open(os.path.join(folder(name, rate_of(name), 1), 'log.csv'), newline='') as f:
                    log = [row for row in csv.DictReader(f) if row['loss']]
                width = max(1, len(log) // 50)  # a mean over a fiftieth of the run
                for ax, key in zip(axes, ('loss', 'grad_norm')):
                    values = np.array([float(row[key]) for row in log])
                    x, y = np.arange(width, len(log) + 1), np.convolve(values, np.ones(width) / width, 'valid')
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
    lines += [f'\n![{name}]({name}.png)' for name in chosen if name.startswith('fig')]
    for file, body in (('results.md', '\n'.join(lines)), ('results.json', json.dumps(result, indent=1))):
        with common.atomic_write(os.path.join(out_dir, file)) as f:
            f.write(body.encode() + b'\n')
    turn.close()


def save_figure(fig, name):
    with common.atomic_write(os.path.join(out_dir, f'{name}.png')) as f:
        fig.savefig(f, format='png', dpi=120)
    matplotlib.pyplot.close(fig)

# ----------------------------------------------------------------------------- training


stop, failed = False, {}  # failed: folder -> why


def ask_to_stop(signum, frame):
    global stop
    stop = True


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


def cost(name):  # FLOPs of a cell before it has run: every decision takes all K
    return step_flops(recipes[name]['model']) * recipes[name]['max_steps']


def start(name, rate, seed, state):
    """The training of a cell as a process. It holds our lock too, so that none outlives us unnoticed."""
    where = folder(name, rate, seed)
    os.makedirs(where, exist_ok=True)
    values = dict(init_from='resume', data_dir=data_dir) if state == 'begun' else asked(name, rate, seed)
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    with open(os.path.join(where, 'output.txt'), 'ab') as output:
        return subprocess.Popen(
            [sys.executable, *launch, os.path.join(common.ROOT, 'train.py'), f'--out_dir={where}', '--log_every=50',
             f'--device={device}', *(f'--{k}={v}' for k, v in values.items())],
            stdout=output, stderr=output, start_new_session=True, pass_fds=[lock.fileno()],
            env=dict({'OMP_NUM_THREADS': str(max(1, os.cpu_count() // workers))}, **os.environ))


def last_line(path):
    with open(path, errors='replace') as f:
        lines = [line.strip() for line in f if line.strip()] or ['it wrote nothing']
    errors = [line for line in lines if ': error: ' in line]
    return errors[-1] if errors and lines[-1].startswith('===') else lines[-1]  # torchrun draws a line beneath


def train(what, todo):
    """Train (name, rate, seed)s that are not finished, `workers` at a time, each when what it depends on is; a rate of
    None is the tuned one. Cells that depend on one that failed are left out."""
    todo = [(name, rate or rate_of(name), seed) for name, rate, seed in todo]
    states = {cell: look(*cell) for cell in todo}
    todo = [cell for cell in todo if states[cell] != 'finished']
    total, done, running, began, asked_to = sum(cost(c[0]) for c in todo), 0, {}, time.time(), False
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
                    if (state := look(*cell)) != 'finished':  # now that its dependencies are there
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
                if look(*cell) == 'finished':
                    took = time.time() - began
                    print(f'{count - len(todo) - len(running)}/{count} {os.path.basename(folder(*cell))}: loss '
                          f'{records[cell]["loss"]:.4f} | {clock(took)}, about {clock(took * (total / done - 1))} left',
                          flush=True)
                    failed.pop(folder(*cell), None)
                    write_report()
                elif not stop:
                    failed[folder(*cell)] = why = last_line(os.path.join(folder(*cell), 'output.txt'))
                    print(f'{os.path.basename(folder(*cell))} failed: {why}', flush=True)
    finally:  # an error of ours leaves no training behind
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if stop:
        write_report()
        sys.exit(f'stopped. The same command goes on: python {shlex.join(sys.argv)}')


matplotlib.use('Agg')
meta_path, vocab_size = os.path.join(data_dir, 'meta.json'), {'bytes': 257, 'gpt2': 50257}[S['tokenizer']]
os.makedirs(out_dir, exist_ok=True)
probes = [(probe, rate, 1) for family, probe in PROBES.items() for rate in rates
          if len(rates) > 1 and any(recipes[name]['family'] == family for name in wanted)]
everything = closure((name, seed) for name in known for seed in range(1, last_seed + 1))


def look_at_all():
    look('phase_one', S['rate'], 1)
    for cell in probes:
        look(*cell)
    for name, seed in everything:
        if rate_of(name):
            look(name, rate_of(name), seed)


if report:
    look_at_all()
    write_report()
    print(f'{out_dir}/results.md')
    sys.exit()

lock = open(os.path.join(out_dir, 'lock'), 'w')
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    raise ValueError(f'another reproduce.py, or a training that it left behind, is at work in {out_dir}: let it '
                     'finish, stop it, or take another --out_dir') from None
if os.path.exists(meta_path):
    if 'text' in given:
        print(f'{data_dir} is there already: {text} is not read again')
else:
    if subprocess.run([sys.executable, os.path.join(common.ROOT, 'prepare.py'), f'--dataset={text}',
                       f'--tokenizer={S["tokenizer"]}', f'--out_dir={data_dir}']).returncode:
        raise ValueError(f'{text} could not be made into tokens (see above): name another --text')
try:
    with open(meta_path, encoding='utf-8') as f:
        meta = json.load(f)
    made_with, train_sha256 = meta['tokenizer'], meta['train_sha256']
except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{meta_path} is not one of prepare.py ({error!r}): remove that folder, and it is made again '
                     'from --text') from error
if made_with != S['tokenizer']:
    raise ValueError(f'{data_dir} was made with tokenizer={made_with}, and scale={scale} takes {S["tokenizer"]}: leave '
                     '--data_dir out, or name another')
signal.signal(signal.SIGTERM, ask_to_stop)
signal.signal(signal.SIGINT, ask_to_stop)

look_at_all()  # seeds that another call has trained belong into every report of this one
train('learning rates', [('phase_one', None, 1), *probes] if probes else [])
if any(cell not in records for cell in probes):
    raise ValueError('the learning rate cannot be chosen; the same command tries again, and --rates may leave one out: '
                     + '; '.join(f'{where} failed: {why}' for where, why in failed.items()))
train('tables and figures', [(name, None, seed) for name, seed in closure((n, s) for n in wanted
                                                                         for s in range(1, seeds + 1))])
close = [(n, s) for table in ('table1', 'table2', 'routers', 'axis') if table in chosen
         for _, name, base, _, _ in rows[table]
         if name in wanted and name not in (base, 'phase_one', *budgets)
         for other, compared in ((base, [base]), *([(EQUAL + name, around(name, 1))] if name in phase_two else []))
         if (d := contrast({name: 1, other: -1})) and abs(d[0]) < CLOSE['loss']
         for s in range(seeds + 1, most_seeds + 1) for n in (name, *compared)]
train('seeds for what is close', [(name, None, seed) for name, seed in closure(close)])
write_report()
print(f'{out_dir}/results.md')
if failed:
    raise ValueError(f'{len(failed)} trainings failed; the same command tries them again. They are in results.md: '
                     + ', '.join(failed))
