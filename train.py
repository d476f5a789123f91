"""Train GPT-2, or the Mixture-of-Modules that its layers become: both phases, one flat script.

  python train.py config/gpt2_demo.py                                  one process, on a GPU or the CPU
  torchrun --nproc_per_node=8 train.py config/mom_medium_k2h6s.py      one process per GPU (NCCL)
  torchrun --nproc_per_node=2 train.py config/mom_demo.py              several processes on the CPU (gloo)
  python train.py --out_dir=out/mom_demo --init_from=resume            go on where that run stopped

The defaults are the paper's recipe (section 4.1). Any setting: in a config file, or as --key=value.
"""
import csv
import math
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from json import load as load_json

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import config
from model import GPT, HUB, MoMConfig, load_checkpoint

# --- run
out_dir = 'out/run'                  # checkpoints last.pt and best.pt, and log.csv
data_dir = 'data/openwebtext_gpt2'   # train.bin, val.bin and meta.json, made by prepare.py
init_from = 'scratch'                # 'scratch', 'resume', a GPT-2 name, a Hugging Face directory, or a checkpoint of ours
overwrite = False                    # start anew in an out_dir that holds a run
seed = 1337                          # of the weights and of the data order; phase two takes another one
# --- model (of weights that are loaded, what is not given stays as it is)
chunks = '1-1-1-1-1-1-1-1-1-1-1-1'   # N of each chunk; 1 is a vanilla block
K = 2                                # modules selected per token and step
H = 6                                # assembly steps of a chunk with N > 1
skip = True                          # routers may choose SKIP
N_A = 0                              # attention modules kept of each chunk; 0 keeps all
N_F = 0                              # feed-forward modules likewise
router = 'gru'                       # 'gru' or 'mlp'
router_dim = 256                     # width of the routers' state
router_weights = 'linear'            # 'linear' or 'softmax'
tau = 0.2                            # temperature of the softmax weights
n_embd = 768                         # width
n_head = 12                          # heads
block_size = 1024                    # tokens of a sequence
# --- optimisation
max_steps = 20_000                   # optimizer steps; the paper: 20k in phase one, 10k in phase two
batch_size = 512                     # sequences per step, over all processes and micro-batches
micro_batch = 16                     # sequences per forward pass of a process, at most
learning_rate = 1e-3                 # peak
min_lr = 0.0                         # where the cosine ends
warmup = 0.1                         # share of the steps in which the learning rate rises
beta1 = 0.9                          # AdamW
beta2 = 0.95                         # AdamW
weight_decay = 0.1                   # of matrices and embeddings
grad_clip = 1.0                      # largest gradient norm; 0 is off
# --- evaluation and log
eval_every = 500                     # steps between evaluations, each followed by a checkpoint
eval_tokens = 4_000_000              # of val.bin, evenly spread, at most
log_every = 1                        # steps between printed lines; log.csv has every step
# --- system
device = 'auto'                      # 'auto', 'cpu', 'cuda'
dtype = 'auto'                       # autocast: 'bfloat16', 'float16' or 'float32'; auto is bfloat16 on a GPU
compile = False                      # torch.compile the model
# ---
settings, given = config.load(globals())

# ----------------------------------------------------------------------------- settings, checked before anything long

checkpoint = None
if init_from == 'resume':
    checkpoint = load_checkpoint(os.path.join(out_dir, 'last.pt'))
    # What this command line does not say is as it was. So `--out_dir=... --init_from=resume` is enough.
    settings.update({k: v for k, v in checkpoint['settings'].items() if k in settings and k not in given})
    settings['init_from'] = 'resume'
    globals().update(settings)
elif os.path.exists(os.path.join(out_dir, 'last.pt')) and not overwrite:
    raise ValueError(f'{out_dir} holds a run: go on with it (--init_from=resume), take another --out_dir, '
                     'or lose it (--overwrite=True)')

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
for key in ('max_steps', 'batch_size', 'micro_batch', 'block_size', 'eval_every', 'eval_tokens', 'log_every'):
    if settings[key] < 1:
        raise ValueError(f'{key}={settings[key]} must be at least 1')
if batch_size % world or (batch_size // world) % min(micro_batch, batch_size // world):
    raise ValueError(f'batch_size={batch_size} must be a multiple of {world} processes x micro_batch={micro_batch}')
if not 0 <= warmup < 1:
    raise ValueError(f'warmup={warmup} is a share of the steps: 0 <= warmup < 1')
if device not in ('auto', 'cpu') and not device.startswith('cuda'):
    raise ValueError(f"device={device!r} must be 'auto', 'cpu' or 'cuda'")
device = ('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device
if device.startswith('cuda') and not torch.cuda.is_available():
    raise ValueError('device=cuda, but torch sees no GPU: take --device=cpu')
if dtype not in ('auto', 'bfloat16', 'float16', 'float32'):
    raise ValueError(f"dtype={dtype!r} must be 'auto', 'bfloat16', 'float16' or 'float32'")
dtype = ('bfloat16' if device.startswith('cuda') else 'float32') if dtype == 'auto' else dtype
per_rank = batch_size // world
micro = min(micro_batch, per_rank)  # sequences of one forward pass

# ----------------------------------------------------------------------------- data

def read_meta():
    """meta.json of data_dir, with train.bin and val.bin checked against it. Raises ValueError with the fix."""
    path = os.path.join(data_dir, 'meta.json')
    if not os.path.isfile(path):
        raise ValueError(f'no data in {data_dir} (no meta.json): make it with python prepare.py --out_dir={data_dir}')
    with open(path, encoding='utf-8') as f:
        meta = load_json(f)
    again = f'make it again with python prepare.py --out_dir={data_dir}'
    for split in ('train', 'val'):
        path = os.path.join(data_dir, f'{split}.bin')
        if not os.path.isfile(path):
            raise ValueError(f'{path} is missing: {again}')
        want = meta[f'{split}_tokens']
        if os.path.getsize(path) != 2 * want:
            raise ValueError(f'{path} has {os.path.getsize(path):,} bytes, but meta.json counts {want:,} tokens of 2 bytes: '
                             f'it is truncated or another file; {again}')
        if want <= block_size:
            raise ValueError(f'{path} has {want:,} tokens, fewer than one sequence of block_size={block_size} and its '
                             'target: take a shorter block_size or more text')
        tokens = np.memmap(path, dtype='<u2', mode='r')
        for at in range(0, want, 1 << 24):
            largest = tokens[at:at + (1 << 24)].max()
            if largest >= meta['vocab_size']:
                raise ValueError(f'{path} holds token id {largest}, but vocab_size is {meta["vocab_size"]}: {again}')
    return meta


def sequences(split, offsets):
    """Sequences of `split` that start at `offsets` -> inputs and targets, each (len(offsets), block_size) int64."""
    tokens = np.memmap(os.path.join(data_dir, f'{split}.bin'), dtype='<u2', mode='r')  # reopened: else its RSS grows
    rows = np.stack([tokens[o:o + block_size + 1] for o in offsets]).astype(np.int64)
    rows = torch.from_numpy(rows)
    if device != 'cpu':
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def train_batches(step):
    """This rank's micro-batches of a step: a function of (seed, step, rank) alone. The global batch does not
    depend on the number of ranks, so a run can resume on more or fewer of them in the same order."""
    offsets = np.random.default_rng([seed, step]).integers(0, meta['train_tokens'] - block_size, size=batch_size)
    for at in range(rank * per_rank, (rank + 1) * per_rank, micro):
        yield sequences('train', offsets[at:at + micro])


meta = read_meta()

# ----------------------------------------------------------------------------- processes

if world > 1:
    if device.startswith('cuda'):
        device = f'cuda:{int(os.environ["LOCAL_RANK"])}'
        torch.cuda.set_device(device)
    dist.init_process_group('gloo' if device == 'cpu' else 'nccl')
is_main = rank == 0


def say(*text):
    if is_main:
        print(*text, flush=True)


def all_sum(*numbers):
    """Numbers summed over all ranks, as floats."""
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(total)
    return total.tolist()


torch.manual_seed(seed)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
autocast = torch.autocast(device.split(':')[0], getattr(torch, dtype)) if dtype != 'float32' else nullcontext()
scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == 'float16')

# ----------------------------------------------------------------------------- model

model_keys = [f.name for f in fields(MoMConfig) if f.name in settings]
overrides = {k: settings[k] for k in model_keys if k in given}  # only what was asked for may differ from loaded weights
if checkpoint:
    wanted = {**checkpoint['model_config'], **overrides}
    for key, value in checkpoint['model_config'].items():
        if wanted[key] != value:
            raise ValueError(f'{key}={wanted[key]!r}, but the run in {out_dir} has {key}={value!r}: leave it out, or start a new run')
    raw = GPT(MoMConfig(**wanted))
    raw.load_state_dict(checkpoint['model'])
elif init_from == 'scratch':
    raw = GPT(MoMConfig(**{k: settings[k] for k in model_keys}, vocab_size=meta['vocab_size']))
else:
    raw = GPT.from_pretrained(init_from, **overrides)
    block_size = settings['block_size'] = raw.cfg.block_size
