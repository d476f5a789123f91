"""What this code costs, and what finished runs reached.

  python bench.py runs --of=out/gpt2_demo,out/mom_demo                    finished runs side by side
  python bench.py table1                                                  the cost columns of the paper's Table 1
  python bench.py table1 --size=small --measure=True --batch=1            ... with memory measured as well
  python bench.py train config/gpt2_small.py --micro_batch=2 --block_size=512 --compare=hf     training steps
  python bench.py forward config/mom_small_k3h1s.py --micro_batch=4       forward passes, beside the vanilla model's
  python bench.py decode config/mom_small_k2h6s.py --compare=hf           text, one token after the other, cached
  python bench.py route                                                   one routed step against dense products
  python bench.py ablate                                                  what merging, grouping and caching bring
  python bench.py scale                                                   how a step grows with N, K, H, T and width
  python bench.py saved config/mom_large_k2h6s.py                         bytes that training keeps per token

Of a config file the model's settings and micro_batch count. Weights are random, or those of --weights; tokens are
random. What is compared is timed in turn within one run, after a first call that is timed apart (it compiles and fills
caches) and a second one. Figures are medians of `repeats` calls. FLOPs are active ones: what SKIP saves does not count.
route and ablate take one chunk of 4 if chunks is not given; route takes K = 2, then 3, if K is not given.

Peak memory is torch's on a GPU, weights and optimizer included; on the CPU it is the process's, until the first model
has run twice. The last line on stdout is one JSON object: mode, machine, and the rows of the table ('runs' in runs,
else 'rows'); train, forward and decode add 'ratios', of the first row to each other, and 'trace' with --profile=True.
"""
import csv
import dataclasses
import datetime
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from dataclasses import fields
from functools import partial

import torch
from torch.nn import functional as F

import common
from model import GPT, MoMConfig, attn_in, has_grouped_mm, top_k
from sample import Cache
from weights import load_checkpoint, read_weights

# --- what
mode = 'runs'            # 'runs', 'table1', 'train', 'forward', 'decode', 'route', 'ablate', 'scale' or 'saved'
of = ''                  # runs: out_dirs, separated by commas; table1: runs whose last k_a and k_f their rows take
size = 'small,medium,large'    # table1: which sizes
k_a = 0.0                # table1: attention modules per token and step of the MoM rows, at most K; 0 is K
k_f = 0.0                # table1: feed-forward modules likewise
measure = False          # table1: run a cached prefill of each model and measure its memory
weights = ''             # a run's directory or checkpoint, a GPT-2 name, a Hugging Face directory; '' is random
compare = ''             # train, forward, decode: 'hf' or 'hf,vanilla'; forward and decode of a MoM always have vanilla
hf_dtype = ''            # decode: the type of transformers' weights, 'float32' or 'bfloat16'; '' is dtype
profile = False          # train, forward, decode: the operators that take longest, and a trace
trace_dir = 'out/bench'  # where the trace goes
# --- how much
micro_batch = 4          # train, forward: sequences, of block_size tokens
batch = 0                # decode: sequences, 0 is 1; table1 with --measure: sequences, 0 is 10
length = 1024            # table1 with --measure: tokens of each
prompt = 64              # decode: tokens before the first new one
new = 64                 # decode: new tokens
tokens = 4096            # route: tokens, in sequences of block_size
repeats = 5              # timed calls of each thing
# --- system
device = 'auto'          # 'auto', 'cpu', 'cuda'
dtype = 'auto'           # 'bfloat16' or 'float32', of autocast, in decode of the weights; auto: bfloat16 on a GPU
compile = False          # train, forward: torch.compile, as train.py does it
threads = 0              # of the CPU; 0 leaves torch's choice
# ---
MODEL = {f.name for f in fields(MoMConfig)}
SPEED = MODEL | {'weights', 'compare', 'profile', 'trace_dir', 'dtype', 'repeats'}
MODES = {'runs': {'of'}, 'table1': {'of', 'size', 'k_a', 'k_f', 'measure', 'batch', 'length'},
         'train': SPEED | {'micro_batch', 'compile'}, 'forward': SPEED | {'micro_batch', 'compile'},
         'decode': SPEED | {'batch', 'prompt', 'new', 'hf_dtype'},
         'route': {'tokens', 'chunks', 'K', 'router', 'router_dim', 'router_weights', 'tau', 'router_start',
                   'weigh_qkv', 'n_embd', 'n_head', 'block_size', 'dtype', 'repeats'},
         'ablate': {'tokens', 'chunks', 'K', 'H', 'n_embd', 'n_head', 'block_size', 'dtype', 'repeats', 'prompt',
                    'new'},
         'scale': {'repeats', 'tokens', 'n_embd', 'dtype'}, 'saved': MODEL}
WIDTH = {'gpt2': (768, 12), 'gpt2-medium': (1024, 16), 'gpt2-large': (1280, 20), 'gpt2-xl': (1600, 25)}
SHAPE = ('n_embd', 'n_head', 'block_size', 'vocab_size')  # what all models that share weights have in common
FILES = {}  # config files of the command line, and all that they set


def model_settings(values):
    """Of a config file's values those that MoMConfig knows; the rest is as in the weights that it starts from."""
    source, shape = values.get('init_from', 'scratch'), {}
    if source in WIDTH:
        shape = dict(zip(SHAPE, WIDTH[source]))
    elif os.path.exists(source):
        shape = read_weights(source)[1]
    return {**shape, **{key: value for key, value in values.items() if key in MODEL}}


def arguments():
    """The command line, with --key=value in the place of config files, which are train.py's, for what counts here."""
    for arg in sys.argv[1:]:
        if not arg.endswith('.py') or not os.path.isfile(arg):  # common.load has a sentence for a missing file
            yield arg
            continue
        values = FILES[arg] = common.read_file(arg)
        kept = {key: values[key] for key in ('micro_batch',) if key in values}
        yield from (f'--{key}={value}' for key, value in {**kept, **model_settings(values)}.items())


settings, given = common.load(globals(), arguments(), model=MoMConfig)
chunks, K, H = settings['chunks'], settings['K'], settings['H']
n_embd, n_head, block_size = settings['n_embd'], settings['n_head'], settings['block_size']

# ----------------------------------------------------------------------------- settings, checked before anything long

if mode not in MODES:
    raise ValueError(f'mode {mode!r} is not known: take {", ".join(map(repr, MODES))}')
if FILES and mode not in ('train', 'forward', 'decode', 'saved'):
    raise ValueError(f'{[*FILES][0]}: config files go with train, forward, decode and saved, not with {mode}')
for key in sorted(given - MODES[mode] - {'mode', 'device', 'threads', 'micro_batch' if FILES else 'mode'}):
    raise ValueError(f'--{key} does nothing in {mode}: it goes with {", ".join(m for m in MODES if key in MODES[m])}')
for path, values in FILES.items():
    lacking = ' '.join(f'--{key}=...' for key in ('chunks', *SHAPE) if key not in given and not weights)
    if lacking and values.get('init_from', 'scratch') not in ('scratch', *WIDTH):
        raise ValueError(f'{path} starts from {values["init_from"]}, which is not here to give a shape: add {lacking}')
for key, least in dict(micro_batch=1, length=1, prompt=1, tokens=1, repeats=1, new=2, batch=0, threads=0, k_a=0,
                       k_f=0).items():  # new: the first new token comes out of the prompt's pass
    if settings[key] < least:
        raise ValueError(f'{key}={settings[key]} must be at least {least}')
for key, known in dict(dtype='auto bfloat16 float32', hf_dtype='bfloat16 float32', compare='hf vanilla',
                       size='small medium large').items():
    several, may_be_empty = key in ('compare', 'size'), key in ('compare', 'size', 'hf_dtype')
    for value in settings[key].split(',') if several else [settings[key]]:
        if value not in known.split() and not (may_be_empty and not settings[key]):
            raise ValueError(f'{key}={settings[key]!r}: {value!r} is none of {known.replace(" ", ", ")}')
device = common.find_device(device)
on_gpu = device != 'cpu'
if dtype == 'auto':  # Table 1 is counted in fp32
    dtype = 'bfloat16' if mode == 'saved' or on_gpu and mode not in ('runs', 'table1') else 'float32'
real = getattr(torch, dtype)
autocast = torch.autocast(device.split(':')[0], torch.bfloat16, enabled=dtype != 'float32' and mode != 'decode')
if threads:
    torch.set_num_threads(threads)
torch.manual_seed(1337)

# ----------------------------------------------------------------------------- clock, tables, counts


def timed(call):
    """Seconds of a call, from when the device has nothing left to do until it has done all of it."""
    if on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def alternate(calls, warm_up=0):
    """Time things that are compared, in turn: {name: function} -> {name: the seconds of each repeat, sorted}."""
    seconds = [{name: timed(call) for name, call in calls.items()} for _ in range(warm_up + repeats)]
    return {name: sorted(row[name] for row in seconds[warm_up:]) for name in calls}


def print_table(rows, left=1):
    """Dicts with the same keys as a table, its first `left` columns words. None is n/a."""
    columns = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        digits = max((len(str(v).split('.')[1]) for v in values if isinstance(v, float)), default=0)
        columns.append([name, *('n/a' if v is None else v if isinstance(v, str) else f'{v:,.{digits}f}'
                                for v in values)])
    widths = [max(map(len, column)) for column in columns]
    for n, row in enumerate(zip(*columns)):
        print('| ' + ' | '.join(c.ljust(w) if i < left else c.rjust(w)
                                for i, (c, w) in enumerate(zip(row, widths))) + ' |')
        if n == 0:
            print('|' + '|'.join('-' * (w + 2) for w in widths) + '|')


def assembly(cfg):
    """What a model is called in the tables."""
    return 'vanilla' if cfg.vanilla else f'K{cfg.K}H{cfg.H}{"S" * cfg.skip}' if cfg.phi == 'mom' else cfg.phi


def on_meta(cfg):
    """The model without its numbers: enough to count with."""
    with torch.device('meta'):
        return GPT(cfg)


def rounded(number, digits=2):
    return number if number is None else round(number, digits)


machine = {'device': platform.processor() or platform.machine(), 'cores': os.cpu_count(),
           'threads': torch.get_num_threads(), 'torch': str(torch.__version__), 'dtype': dtype,
           'date': datetime.date.today().isoformat()}
if on_gpu:
    machine['device'] = torch.cuda.get_device_name(device)
elif os.path.exists('/proc/cpuinfo'):
    with open('/proc/cpuinfo') as f:
        machine['device'] = next((line.split(':')[1].strip() for line in f if line.startswith('model name')),
                                 machine['device'])
results = {'mode': mode, 'machine': machine}

# ----------------------------------------------------------------------------- runs

def read_run(folder):
    """A run's configuration, the step of its checkpoint, the rows of its log, and those of them with a validation."""
    checkpoint, path = load_checkpoint(os.path.join(folder, 'last.pt')), os.path.join(folder, 'log.csv')
    if 'step' not in checkpoint or not os.path.isfile(path):
        raise ValueError(f'{folder} is no run of train.py, which has last.pt with its step and log.csv: name another')
    with open(path, newline='') as f:
        rows = list(csv.DictReader(f))
    return MoMConfig(**checkpoint['model_config']), checkpoint['step'], rows, [row for row in rows if row['val_loss']]


if mode == 'runs':
    if not of:
        raise ValueError('which runs? Name their folders: --of=out/gpt2_demo,out/mom_demo')
    results['runs'] = []
    for folder in of.split(','):
        cfg, step, rows, val = read_run(folder)
        model = on_meta(cfg)
        n_params, n_router = model.num_params()
        flops = model.flops_per_token(cfg.block_size, float(val[-1]['k_a']), float(val[-1]['k_f']))
        speed = [float(row['tokens_per_s']) for row in rows if row['tokens_per_s']]
        results['runs'].append({
            'run': os.path.basename(os.path.normpath(folder)), 'chunks': cfg.chunks, 'assembly': assembly(cfg),
            'depth': cfg.depth, 'parameters': n_params, 'in routers': n_router,
            'active MFLOPs/token': round(flops / 1e6, 2), 'steps': step,
            'bits/byte before': round(float(val[0]['val_bits_per_byte']), 3),
            'bits/byte after': round(float(val[-1]['val_bits_per_byte']), 3),
            'tokens/s': round(statistics.median(speed)) if speed else 0})
    print_table(results['runs'], left=3)

# ----------------------------------------------------------------------------- table1

PAPER = {  # config file, and for small, medium and large the paper's TFLOPs and GiB
    'GPT-2': ('gpt2_{}', (2.92, 2.98), (8.28, 4.74), (17.76, 7.20)),
    'MoD': ('mod_{}', (None, None), (None, None), (None, None)),
    'MoE': ('moe_{}', (3.81, 2.98), (11.37, 4.74), (25.43, 7.20)),
    'MoE (share)': ('moe_share_{}', (3.81, 2.98), (11.37, 4.74), (25.43, 7.20)),
    'MoM_E': ('mom_{}_k3h1s', (2.45, 2.45), (6.80, 3.33), (14.84, 4.13)),
    'MoM_I': ('mom_{}_k3h2s', (3.49, 2.63), (10.20, 3.80), (20.31, 5.15)),
    'MoM_P': ('mom_{}_k2h6s', (5.04, 3.34), (16.23, 5.69), (36.07, 9.24))}


def prefill_gib(cfg, B, T, vectors):
    """GiB in fp32 of what a forward pass over (B, T) leaves behind: logits, and for each token and executed step
    `vectors` vectors of width C. K and V are 2; the paper's K and V are views that keep Q alive, which makes 3."""
    return 4 * B * T * (cfg.vocab_size + cfg.depth * vectors * cfg.n_embd) / 2**30


@torch.no_grad()
def measured_gib(cfg, B, T):
    """GiB of a cached prefill over (B, T) with all its logits in fp32, run here. On a GPU: torch's peak above the
    weights, activations included. On the CPU: the bytes of the logits and of the cache's keys and values."""
    with torch.device(device):
        model = GPT(cfg).eval()
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    cache = Cache(cfg, B, device, torch.float32)
    x, _ = model.features(torch.randint(cfg.vocab_size, (B, T), device=device), cache)
    logits = F.linear(x, model.wte.weight)
    if on_gpu:
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    return sum(t.nbytes for t in (logits, *cache.k, *cache.v)) / 2**30


def table1_row(name, of_size, rates):
    """rates: {assembly: (k_a, k_f)} as runs measured them."""
    stem, *figures = PAPER[name]
    path = os.path.join(common.ROOT, 'config', stem.format(of_size) + '.py')
    shape = model_settings(common.read_file(path))
    cfg, (tflops, gib) = MoMConfig(**shape), figures[['small', 'medium', 'large'].index(of_size)]
    model, k, k_eff = on_meta(cfg), (None, None), None

    def forward_tflops(*k):
        return 10 * 1024 * model.flops_per_token(1024, *k) / 1e12

    if name.startswith('MoM'):  # FLOPs are linear in the modules per token: two points give k for the paper's figure
        k = rates.get(assembly(cfg)) or tuple(float(min(wanted or cfg.K, cfg.K)) for wanted in (k_a, k_f))
        k_eff = 1 + (tflops - forward_tflops(1, 1)) / (forward_tflops(2, 2) - forward_tflops(1, 1))
    ours, ours_gib = forward_tflops(*k), prefill_gib(cfg, 10, 1024, 2)
    merged = 10 * 1024 * model.flops_per_token(1024, *k, merged=True) / 1e12
    row = {'size': of_size, 'model': f'{name} ({assembly(cfg)})' if k_eff else name, 'depth': cfg.depth,
           'k_a': rounded(k[0]), 'k_f': rounded(k[1]), 'TFLOPs': round(ours, 2), "paper's TFLOPs": tflops,
           'TFLOPs, %': tflops and round(100 * (ours / tflops - 1), 1), "paper's K_eff": rounded(k_eff, 4),
           'merged': round(merged, 2),
           'GiB': round(ours_gib, 3), "paper's GiB": gib, 'GiB, %': gib and round(100 * (ours_gib / gib - 1), 1),
           'GiB with Q': round(prefill_gib(cfg, 10, 1024, 3), 3)}
    if measure:
        B, cfg = batch or 10, MoMConfig(**{**shape, 'block_size': length})  # a cache has room for block_size tokens
        row |= {f'GiB at {B} x {length}': round(prefill_gib(cfg, B, length, 2), 5),
                'measured': round(measured_gib(cfg, B, length), 5)}
    return row


if mode == 'table1':
    if length > 1024 or not size:
        raise ValueError(f'length={length} must be at most 1024, and size={size!r} name a size')
    rates = {}
    for cfg, _, _, val in map(read_run, filter(None, of.split(','))):
        if assembly(cfg) not in ('K3H1S', 'K3H2S', 'K2H6S'):
            raise ValueError(f'--of={of}: Table 1 has K3H1S, K3H2S and K2H6S; a {assembly(cfg)} run has no row in it')
        rates[assembly(cfg)] = float(val[-1]['k_a']), float(val[-1]['k_f'])
    print('A forward pass over 10 x 1,024 tokens with logits at every position. k_a, k_f: modules per token and step.\n'
          "paper's K_eff: how many of both give the paper's TFLOPs by our formula. merged: what this code computes,\n"
          'with one q, k, v product a token where subsets are merged. GiB: without the weights, fp32\n'
          "logits, a K and a V per token and executed step; with Q: as the paper's cache comes out, see prefill_gib.")
    if measure:
        print("measured: torch's peak above the weights, activations included" if on_gpu else
              'measured: the bytes of the logits and of the cached K and V of a prefill that ran here')
    results['rows'] = [table1_row(name, of_size, rates) for of_size in size.split(',') for name in PAPER]
    print_table(results['rows'], left=2)

# ----------------------------------------------------------------------------- train, forward, decode

def build(name, cfg):
    """A model to time, on the device: 'model' itself, or the GPT-2 of its layers, ours ('vanilla') or 'hf'."""
    if name == 'model' and loaded:
        model = loaded.to(device)
    else:
        with torch.device(device):
            model = GPT(cfg) if name != 'hf' else transformers.GPT2LMHeadModel(transformers.GPT2Config(
                n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head, n_positions=cfg.block_size,
                vocab_size=cfg.vocab_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
                eos_token_id=None, attn_implementation='sdpa'))
    if compile:  # as train.py does it
        whole = cfg.vanilla or dtype == 'bfloat16' and has_grouped_mm(torch.device(device), cfg.n_embd)
        for part in [model] if name == 'hf' or whole else [
                chunk for chunk, plan in zip(model.chunks, cfg.plans) if plan.phi in ('vanilla', 'share')]:
            part.compile()
    return model


def work(model, name, x, y):
    """What is timed, as functions: {'': a training step or a forward pass}, or the parts of decoding."""
    if mode == 'decode':
        model.to(getattr(torch, hf_dtype or dtype)).eval() if name == 'hf' else model.cast(real).eval()
        how = dict(attention_mask=torch.ones_like(x), do_sample=False, pad_token_id=0) if name == 'hf' else {
            'temperature': 0}
        return {part: lambda n=n: model.generate(x, max_new_tokens=n, **how)
                for part, n in (('prompt', 1), ('text', new))}

    def logits_and_loss():
        with autocast:
            if name != 'hf':
                return model(x, y, want_logits=False) if mode == 'train' else model(x)
            logits = model(x, use_cache=False).logits
            return logits, F.cross_entropy(logits.float().flatten(0, 1), y.flatten()) if mode == 'train' else None

    def step():
        logits_and_loss()[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if mode == 'forward':
        model.eval()
        return {'': torch.inference_mode()(logits_and_loss)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # all its work, yet every step is the same
    return {'': step}


def modules_per_token(decisions):
    """(k_a, k_f): real modules (SKIP is none) per token and decision of a router; None where no router decides."""
    taken = [[(d.ids < d.N).sum(1).float().mean().item() for d in itertools.chain(*decisions) if d.kind in kinds]
             for kinds in ('AT', 'FT')]  # MoD sends a token through both or through neither
    return tuple(statistics.mean(k) if k else None for k in taken)


def weights_read(model, cfg, decisions, B, start, width):
    """How many bytes of weights a decoding step has to read, the mean over positions from `start` on.

    decisions: those of B whole sequences. A module counts if any of the sequences takes it; where subsets are merged,
    the qkv matrices of the modules that a token takes together count once. Routers count at every step, with 4 bytes a
    weight (GPT.cast leaves them in fp32), all else with `width`.
    """
    C = cfg.n_embd
    sizes = {'qkv': 3 * C * C + 5 * C, 'out': C * C + C, 'ffn': 8 * C * C + 7 * C}  # LayerNorms and biases too
    total = width * (cfg.vocab_size + 3) * C  # the head, the last LayerNorm, a position
    for chunk, decided in zip(model.chunks, decisions):
        reads = dict.fromkeys(sizes, chunk.H)
        for d in decided:
            ids = d.ids.view(B, -1, d.ids.size(1))[:, start:].transpose(0, 1).tolist()  # (positions, B, K)
            sets = [{frozenset(0 if cfg.tied else i for i in token if i < d.N) for token in position}
                    - {frozenset()} for position in ids]
            modules = statistics.mean(len(frozenset().union(*position)) for position in sets)
            for part in {'A': ('qkv', 'out'), 'F': ('ffn',), 'T': sizes}[d.kind]:
                reads[part] += (statistics.mean(map(len, sets)) if part == 'qkv' and chunk.S else modules) - 1
        routers = sum(p.numel() for key, p in chunk.named_parameters() if key.startswith(('router', 'predictor')))
        total += 4 * routers * (1 if cfg.router == 'linear' else chunk.H)
        total += width * sum(sizes[part] * n for part, n in reads.items())
    return total


if mode in ('train', 'forward', 'decode'):
    if 'hf' in compare:
        try:
            import transformers
        except ImportError as error:
            raise ValueError('--compare=hf needs transformers: pip install -r requirements-dev.txt') from error
        transformers.logging.set_verbosity_error()
    loaded = GPT.from_pretrained(weights, **{key: settings[key] for key in MODEL & given}) if weights else None
    own = loaded.cfg if loaded else MoMConfig(**{key: settings[key] for key in MODEL})
    vanilla = MoMConfig(chunks='-'.join('1' * own.n_layer), **{key: getattr(own, key) for key in SHAPE})
    if mode == 'decode' and prompt + new > own.block_size:
        raise ValueError(f'prompt={prompt} and new={new} are more than block_size={own.block_size}, beyond which no '
                         'cache helps: take fewer')
    for path, values in FILES.items():
        left = (key for key in values if key not in MODEL | {'micro_batch', 'init_from'})
        print(f'{path}: left out, for train.py alone: {", ".join(left)}')
    x, y = torch.randint(own.vocab_size, (2, *((batch or 1, prompt) if mode == 'decode' else
                                               (micro_batch, own.block_size))), device=device)
    print(f'{assembly(own)}, chunks {own.chunks}, width {own.n_embd}, {own.vocab_size:,} kinds of token, '
          f'{weights or "random"} weights; {x.size(0)} x {x.size(1)} tokens'
          + (f' and {new} new ones of each, greedy' if mode == 'decode' else '')
          + f'; {machine["device"]}, {machine["threads"]} CPU threads, {dtype}')
    labels = {'model': 'GPT-2' if own.vanilla else assembly(own), 'vanilla': 'GPT-2, ours', 'hf': 'GPT-2, transformers'}
    beside = compare.split(',') + ['vanilla'] * (mode != 'train')
    calls, rows, costs, computed = {}, {}, {}, {}
    for name in ['model', *(n for n in ('vanilla', 'hf') if n in beside and not (n == 'vanilla' and own.vanilla))]:
        before, cfg = torch.cuda.memory_allocated(device) if on_gpu else 0, own if name == 'model' else vanilla
        model = build(name, cfg)
        parts = work(model, name, x, y)
        *_, main = parts.values()
        first = timed(main)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        for call in parts.values():
            timed(call)
        peak = (torch.cuda.max_memory_allocated(device) - before if on_gpu else
                1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if name == 'model' else None)
        calls |= {(name, part): call for part, call in parts.items()}
        decisions, bare = [[]] * len(cfg.plans), on_meta(cfg)
        if name == 'model':
            with torch.no_grad(), autocast:
                decisions = model.features(main()[:, :-1] if mode == 'decode' else x)[1]
        taken = modules_per_token(decisions)
        width = getattr(torch, name == 'hf' and hf_dtype or dtype).itemsize
        costs[name] = round(weights_read(bare, cfg, decisions, x.size(0), prompt, width) / 1e6 if mode == 'decode' else
                            bare.flops_per_token(cfg.block_size, *taken) / 1e6, 3)
        computed[name] = bare.flops_per_token(cfg.block_size, *taken, merged=True) / 1e6  # for the MFU, as train.py's
        rows[name] = {'model': labels[name], 'parameters': bare.num_params()[0], 'k_a': rounded(taken[0]),
                      'k_f': rounded(taken[1]), 'peak GiB': rounded(peak and peak / 2**30), 'first s': round(first, 3)}

    if mode == 'decode':
        W, vector = torch.randn(4096, 16384, device=device), torch.randn(1, 4096, device=device)
        best = alternate({'sum': W.sum, 'product': lambda: vector @ W, 'copy': W.clone}, warm_up=2)
        bandwidth = W.nbytes * max(1 / best['sum'][0], 1 / best['product'][0], 2 / best['copy'][0]) / 1e9
        results['bandwidth GB/s'] = round(bandwidth, 1)
        print(f'memory bandwidth, the best of a sum, a row times a matrix and a copy of 256 MiB: {bandwidth:.1f} GB/s')
    tera = next((tera for gpu, tera in {'A100': 312, 'H100': 989, 'H200': 989}.items()  # dense bf16, data sheets
                 if gpu in machine['device'] and dtype == 'bfloat16'), None)
    seconds, steps, cost = alternate(calls), {}, 'weights read' if mode == 'decode' else 'active FLOPs'
    for name, row in rows.items():
        if mode == 'decode':  # the prompt's pass is taken off, with the token that it gives
            start, whole = (statistics.median(seconds[name, part]) for part in ('prompt', 'text'))
            if whole <= start:
                raise ValueError(f'the prompt took {start:.3f} s, the prompt and {new} new tokens {whole:.3f} s: this '
                                 'machine is busy with other things. Take more of --new and --repeats')
            step = steps[name] = (whole - start) / (new - 1)
            reached = costs[name] / step / 1e3
            row |= {'prompt ms': round(1e3 * start, 2), 'text ms': round(1e3 * whole, 2),
                    'ms/step': round(1e3 * step, 3), 'tokens/s': round(x.size(0) / step, 1),
                    'MB read/step': costs[name], 'GB/s': round(reached, 2),
                    '% of bandwidth': round(100 * reached / bandwidth, 1)}
        else:
            step = steps[name] = statistics.median(seconds[name, ''])
            reached = costs[name] * (3 if mode == 'train' else 1) * x.numel() / step / 1e3
            row |= {'ms': round(1e3 * step, 2), 'fastest': round(1e3 * seconds[name, ''][0], 2),
                    'slowest': round(1e3 * seconds[name, ''][-1], 2), 'tokens/s': round(x.numel() / step, 1),
                    'active MFLOPs/token': costs[name], 'GFLOP/s': round(reached, 1),
                    'MFU %': tera and round(reached * computed[name] / costs[name] / tera / 10, 1)}
    print_table([*rows.values()])
    results |= {'rows': [*rows.values()], 'ratios': {}}
    for name in [*rows][1:]:
        took, needs = steps['model'] / steps[name], costs['model'] / costs[name]
        results['ratios'][name] = {'tokens/s': round(1 / took, 3), 'time': round(took, 3), cost: round(needs, 3),
                                   f'time / {cost}': round(took / needs, 3)}
        print(f'{labels["model"]} over {labels[name]}: '
              + ', '.join(f'{key} {value}' for key, value in results['ratios'][name].items()))
    if profile:
        with torch.profiler.profile() as profiler:
            timed(calls['model', 'text' if mode == 'decode' else ''])
        print(profiler.key_averages().table(sort_by='self_cuda_time_total' if on_gpu else 'self_cpu_time_total',
                                            row_limit=15, max_name_column_width=50))
        os.makedirs(trace_dir, exist_ok=True)
        results['trace'] = os.path.join(trace_dir, f'{mode}_{assembly(own)}.json')
        profiler.export_chrome_trace(results['trace'])
        print(f'trace of one call, for chrome://tracing or ui.perfetto.dev: {results["trace"]}')

# ----------------------------------------------------------------------------- route

def with_backward(forward, leaves):
    """A function that calls forward() -> tensors, then their backward pass, into fresh gradients."""
    def call():
        outs = forward()
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
        for leaf in leaves:
            leaf.grad = None
    return call


def route_rows(cfg):
    """One step of one chunk as it runs, beside dense products with the method's multiply-adds, K * 12 C^2 a token, of
    which the step leaves some out where it merges q, k, v."""
    B, T, C = tokens // cfg.block_size, cfg.block_size, cfg.n_embd
    with torch.device(device):
        chunk = GPT(cfg).chunks[0]
        x = torch.randn(B, T, C, requires_grad=True)
        dense = [(torch.randn(cfg.K * tokens, i, dtype=real, requires_grad=True),
                  torch.randn(i, o, dtype=real, requires_grad=True))
                 for i, o in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C))]
        qkv = torch.randn(3, B, cfg.n_head, T, C // cfg.n_head, dtype=real, requires_grad=True)

    def routed():
        with autocast:
            return [chunk(x)[0]]

    works = {'dense': lambda: [rows @ W for rows, W in dense], 'routed': routed,
             'attention': lambda: [F.scaled_dot_product_attention(*qkv, is_causal=True)],
             'routers': lambda: [r(x.view(-1, C), None, 0)[0] for r in (chunk.router_a, chunk.router_f)]}
    leaves = [x, qkv, *chunk.parameters(), *itertools.chain(*dense)]
    with torch.no_grad(), autocast:
        decisions = chunk(x)[1]
    taken = modules_per_token([decisions])
    shares = torch.stack([d.ids.flatten().bincount(minlength=d.N) / tokens for d in decisions])
    for passes, calls in (('forward', {name: torch.no_grad()(call) for name, call in works.items()}),
                          ('both', {name: with_backward(call, leaves) for name, call in works.items()})):
        ms = {name: 1e3 * statistics.median(s) for name, s in alternate(calls, warm_up=2).items()}
        rest = ms['routed'] - ms['attention'] - ms['routers']
        yield {'passes': passes, 'N': decisions[0].N, 'K': cfg.K, 'k_a': taken[0], 'k_f': taken[1],
               'idlest': rounded(shares.min().item()), 'busiest': rounded(shares.max().item()),
               **{f'{name} ms': round(t, 2) for name, t in ms.items()},
               'efficiency': round(ms['dense'] / ms['routed'], 3),
               'of modules alone': round(ms['dense'] / rest, 3) if rest > 0 else None}


if mode == 'route':
    if tokens % block_size:
        raise ValueError(f'tokens={tokens} must be a multiple of block_size={block_size}')
    shape = {key: settings[key] for key in MODES['route'] & MODEL} | {'H': 1, 'skip': False, 'vocab_size': 1}
    shape['chunks'] = chunks if 'chunks' in given else '4'
    cfgs = [MoMConfig(**{**shape, 'K': n}) for n in ([K] if 'K' in given else [2, 3])]
    if len(cfgs[0].sizes) > 1 or cfgs[0].vanilla:
        raise ValueError(f'chunks={chunks!r}: this mode times one chunk of several modules, such as --chunks=4')
    print(f'One assembly step over {tokens:,} tokens of width {n_embd}, no SKIP, beside dense products with the\n'
          "method's multiply-adds, K * 12 C^2 a token. efficiency: dense / routed as it runs; of modules alone:\n"
          'attention and both routers, timed apart, taken off. idlest, busiest: the shares of the tokens that modules\n'
          f'get. {dtype}')
    results['rows'] = [row for cfg in cfgs for row in route_rows(cfg)]
    print_table(results['rows'])

# ----------------------------------------------------------------------------- ablate, scale, saved

def every_module(cfg):
    """The same chunk without any routing of rows: every module for every token, then a sum weighted by r or 0."""
    chunk = GPT(cfg).to(device).chunks[0]

    def choose(kind, x, h, state):
        router, N = (chunk.router_a, chunk.N_A) if kind == 'A' else (chunk.router_f, chunk.N_F)
        r, state[kind] = router(x, state.get(kind), h)
        ids, weights = top_k(r, cfg.K, cfg.router_weights, cfg.tau)
        all_weights = torch.zeros(len(x), N + 1, device=device).scatter(1, ids, weights)
        return chunk.decision(kind, h, torch.arange(N + 1, device=device).expand(len(x), -1), all_weights, x)

    def qkv(pools, x, d):
        return sum(attn_in(m, x) * (d.weights[:, i:i + 1] != 0) for i, m in enumerate(pools.attn.each))
    chunk.choose, chunk.qkv, chunk.S = choose, qkv, 0
    return chunk


def ablate_rows():
    """One chunk, forward and backward: as it is; without merged q, k, v; without grouping. Then text without cache."""
    cfg = MoMConfig(chunks=chunks if 'chunks' in given else '4', K=K, H=H, n_embd=n_embd, n_head=n_head,
                    block_size=block_size, vocab_size=256)
    if len(cfg.sizes) > 1 or cfg.vanilla:
        raise ValueError(f'chunks={chunks!r}: this mode times one chunk of several modules, such as --chunks=4')
    if tokens % block_size or prompt + new > block_size:
        raise ValueError(f'tokens={tokens} must be a multiple of block_size={block_size}, and prompt={prompt} and '
                         f'new={new} fit into it')
    x = torch.randn(tokens // block_size, block_size, n_embd, device=device, requires_grad=True)
    variants = {'as it is': GPT(cfg).to(device).chunks[0], 'q, k, v not merged': GPT(cfg).to(device).chunks[0],
                'not grouped: all modules for all tokens': every_module(cfg)}
    variants['q, k, v not merged'].S = 0
    for passes in ('forward', 'both'):
        calls = {name: (torch.no_grad()(autocast(lambda c=c: c(x))) if passes == 'forward' else
                        with_backward(autocast(lambda c=c: [c(x)[0]]), [x, *c.parameters()]))
                 for name, c in variants.items()}
        ms = {name: 1e3 * statistics.median(s) for name, s in alternate(calls, warm_up=1).items()}
        yield from ({'what': name, 'passes': passes, 'ms': round(t, 1), 'times': round(t / ms['as it is'], 2)}
                    for name, t in ms.items())
    model, idx = GPT(cfg).to(device).eval(), torch.randint(256, (1, prompt), device=device)

    @torch.no_grad()
    def without_cache():
        text = idx
        for _ in range(new):
            text = torch.cat((text, model(text)[0][:, -1:].argmax(-1)), 1)
    seconds = alternate({'as it is': lambda: model.generate(idx, new, temperature=0), 'no cache': without_cache}, 1)
    ms = {name: 1e3 * statistics.median(s) for name, s in seconds.items()}
    yield from ({'what': name, 'passes': f'{new} new tokens after {prompt}', 'ms': round(t, 1),
                 'times': round(t / ms['as it is'], 2)} for name, t in ms.items())


def scale_rows():
    """A chunk with N = 4, K = 2, H = 2, T = 1,024, C = 256, and each of the five changed, one at a time."""
    T, C = tokens if 'tokens' in given else 1024, n_embd if 'n_embd' in given else 256
    base = dict(N=4, K=2, H=2, T=T, C=C)
    points = [base] + [{**base, key: value} for key, values in dict(
        N=(2, 8, 12), K=(1, 3, 4), H=(1, 4, 6), T=(T // 4, T // 2, 2 * T), C=(C // 2, 2 * C, 3 * C)).items()
                       for value in values]
    calls, flops = {}, []
    for p in points:
        cfg = MoMConfig(chunks=str(p['N']), K=p['K'], H=p['H'], n_embd=p['C'], n_head=max(1, p['C'] // 64), skip=False,
                        block_size=p['T'], vocab_size=1)
        chunk, x = GPT(cfg).to(device).chunks[0], torch.randn(1, p['T'], p['C'], device=device, requires_grad=True)
        calls[tuple(p.items())] = with_backward(autocast(lambda c=chunk, x=x: [c(x)[0]]), [x, *chunk.parameters()])
        flops.append(p['T'] * (on_meta(cfg).flops_per_token(p['T']) - 2 * p['C']))
    ms = [1e3 * statistics.median(s) for s in alternate(calls, warm_up=1).values()]
    for p, took, cost in zip(points, ms, flops):
        yield {'step': 'base' if p is base else ' '.join(f'{k} = {p[k]}' for k in p if p[k] != base[k]), **p,
               'ms': round(took, 1), 'time': round(took / ms[0], 2), 'FLOPs': round(cost / flops[0], 2)}


def saved_rows(cfg):
    """What autograd keeps for the backward pass, by kind of chunk, in training on a GPU: KiB of each token, and MiB
    once, of weights (bf16 copies, merged q, k, v), told apart by counting at two lengths. F.grouped_mm, bf16 autocast
    and merging are used whatever the device, as they are for the thousands of tokens of a micro-batch on a GPU."""
    import model as model_file
    model_file.grouped_dtype = lambda x: torch.bfloat16
    for plan, many in Counter(map(str, cfg.plans)).items():
        i = [*map(str, cfg.plans)].index(plan)
        one = dataclasses.replace(cfg, vocab_size=1)
        with torch.device('meta'):
            bare = GPT(one).chunks[i]
        chunk = bare.to_empty(device=device)
        for name, p in [*chunk.named_parameters(), *chunk.named_buffers()]:
            p.data = torch.zeros_like(p.data)
        chunk.pools, kept = partial(chunk.pools, keep=True), []
        for T in (64, 128):
            seen, own = {}, {p.untyped_storage().data_ptr() for p in chunk.parameters()}

            def pack(t):
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t
            x = torch.randn(1, T, cfg.n_embd, device=device, requires_grad=True)
            with (torch.autocast(device.split(':')[0], torch.bfloat16),
                  torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)):
                y = chunk(x)
            kept.append(sum(n for at, n in seen.items() if at not in own))
            del y
        yield {'chunk': cfg.plans[i].phi, 'N': cfg.sizes[i], 'H': cfg.plans[i].H, 'how many': many,
               'KiB/token': round((kept[1] - kept[0]) / 64 / 1024, 1),
               'MiB once': round((2 * kept[0] - kept[1]) / 2**20, 1)}


if mode in ('ablate', 'scale', 'saved'):
    if mode == 'saved':
        own = MoMConfig(**{key: settings[key] for key in MODEL})
        results['rows'] = [*saved_rows(own)]
    else:
        results['rows'] = [*(ablate_rows() if mode == 'ablate' else scale_rows())]
    print_table(results['rows'], left=2 if mode == 'ablate' else 1)
    if mode == 'saved':
        plain = sum(row['KiB/token'] * row['how many'] for row in results['rows']) * own.block_size / 2**20
        copies = sum(row['MiB once'] * row['how many'] for row in results['rows']) / 2**10
        one_copy = max(row['MiB once'] for row in results['rows']) / 2**10
        inputs = len(own.sizes) * own.n_embd * 4 / 1024
        again = (inputs + max(row['KiB/token'] for row in results['rows'])) * own.block_size / 2**20
        fixed = 16 * on_meta(own).num_params()[0] / 2**30
        results |= {'GiB/sequence': round(plain, 2), 'GiB/sequence, checkpointing': round(again, 2),
                    'GiB of weights, gradients, AdamW': round(fixed, 2), 'GiB of copies': round(copies, 2),
                    'GiB of copies, checkpointing': round(one_copy, 2)}
        print(f'{plain:.2f} GiB for each sequence of a micro-batch, {again:.2f} with --checkpointing=True; weights, '
              f'gradients and AdamW take {fixed:.1f} GiB, copies of weights {copies:.1f}, or {one_copy:.1f}')

print(json.dumps(results))
