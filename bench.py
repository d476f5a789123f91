"""What runs cost and what they reached, side by side.

  python bench.py runs --of=out/gpt2_demo,out/gpt2_demo_continued,out/mom_demo

The last line on stdout is one JSON object with the same numbers.
"""
import csv
import json
import os
import statistics

import torch

import config
from model import GPT, MoMConfig, load_checkpoint

# --- what
mode = 'runs'    # 'runs': a table of training runs, read from their logs and checkpoints
of = ''          # their out_dirs, separated by commas
# ---
settings, given = config.load(globals())

if mode != 'runs':
    raise ValueError(f"mode {mode!r} is not known: take 'runs'")
if not of:
    raise ValueError('which runs? Name their folders: --of=out/gpt2_demo,out/mom_demo')


def read_run(folder):
    """One row of the table: the run's shape, its first and last validation, its speed.

    Active FLOPs per token are those of a forward pass (GPT.flops_per_token) with as many modules per token as the last
    validation saw chosen.
    """
    checkpoint = load_checkpoint(os.path.join(folder, 'last.pt'))
    cfg = MoMConfig(**checkpoint['model_config'])
    with torch.device('meta'):
        model = GPT(cfg)
    n_params, n_router = model.num_params()
    with open(os.path.join(folder, 'log.csv'), newline='') as f:
        rows = list(csv.DictReader(f))
    val = [row for row in rows if row['val_loss']]
    speed = [float(row['tokens_per_s']) for row in rows if row['tokens_per_s']]
    routed = 'vanilla' if cfg.vanilla else f'K{cfg.K}H{cfg.H}{"S" * cfg.skip}' if cfg.phi == 'mom' else cfg.phi
    flops = model.flops_per_token(cfg.block_size, float(val[-1]['k_a']), float(val[-1]['k_f']))
    return {'run': os.path.basename(os.path.normpath(folder)), 'chunks': cfg.chunks, 'assembly': routed,
            'depth': cfg.depth, 'parameters': n_params, 'in routers': n_router,
            'active MFLOPs/token': round(flops / 1e6, 2), 'steps': checkpoint['step'],
            'bits/byte before': round(float(val[0]['val_bits_per_byte']), 3),
            'bits/byte after': round(float(val[-1]['val_bits_per_byte']), 3),
            'tokens/s': round(statistics.median(speed)) if speed else 0}


table = [read_run(folder) for folder in of.split(',')]
columns = list(table[0])
cells = [columns, *([f'{v:,}' if isinstance(v, int) else str(v) for v in row.values()] for row in table)]
widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
for n, row in enumerate(cells):
    print('| ' + ' | '.join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) + ' |')
    if n == 0:
        print('|' + '|'.join('-' * (w + 2) for w in widths) + '|')
print(json.dumps({'mode': mode, 'runs': table}))
