"""What this code costs, and what finished runs reached.

  python bench.py runs --of=out/gpt2_demo,out/mom_demo    finished runs side by side
  python bench.py table1                                  the cost columns of the paper's Table 1
  python bench.py table1 --size=small --measure=True      ... with memory measured as well
  python bench.py train config/gpt2_small.py --micro_batch=2 --block_size=512 --compare=hf
  python bench.py forward config/mom_small_k3h1s.py       beside the vanilla model's
  python bench.py decode config/gpt2_small.py --prompt=32 --compare=hf,ct2    text, cached
  python bench.py decode config/gpt2_small.py --batch=32 --ragged=True --new=16 --compare=hf
  python bench.py tf32 config/mom_medium_k2h6s.py         routers in fp32, and in a GPU's TF32
  python bench.py route                                   a routed step against dense products
  python bench.py ablate                                  what merging, grouping, caching bring
  python bench.py scale                                   how a step grows with N, K, H, T, width
  python bench.py saved config/mom_large_k2h6s.py         bytes that training keeps per token

MODES, at the end, names the function of each mode and the settings that count in it. Of a config
file the model's settings and micro_batch count. Weights are random, or those of --weights; tokens
are random. What is compared is timed in turn within one run, after a first call that is timed apart
(it compiles and fills caches) and a second one. Figures are medians of `repeats` calls. FLOPs are
active ones: what SKIP saves does not count. route and ablate take one chunk of 4 if chunks is not
given; route takes K = 2, then 3, if K is not given.

decode reports the whole call (prompt and all new tokens), the first token, and the step, which is
the time of a further token. No text ends early: all rows get `new` tokens. --ragged=True gives the
rows of a batch prompts of different lengths, --beams=4 has all libraries search with beams, and
--top_p=0.9 or --top_k=200 adds the model as it samples, at temperature 1. If it compares with
transformers ('hf') or CTranslate2 ('ct2'), all GPT-2s have the same weights, and "same text" counts
the rows that come out as ours do: all, but for near ties.
CTranslate2 never writes the last id, which ends a text there. It is needed for nothing else: pip
install ctranslate2. What MoM reads is counted of the texts: with beams, of the best.

Peak memory is torch's on a GPU, weights and optimizer included; on the CPU it is the process's, of
the first model and only without --compare. The result is one JSON object: mode, machine, the rows
of the table, the ratios of the first row to each other in train, forward and decode, and the trace
with --profile=True. It is the last line on stdout; in a terminal it goes to out_dir/MODE.json.
"""
import dataclasses
import datetime
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import fields
from functools import partial

import torch
from torch.nn import functional as F

import common
import model as model_py
from model import GPT, MoMConfig, attn_in, has_grouped_mm
from sample import Cache
from weights import hugging_face_names, load_checkpoint, read_weights

# --- what
mode = 'runs'          # or 'table1', 'train', 'forward', 'decode', ...: the keys of MODES below
of = ''                # runs: out_dirs, with commas
size = 'small,medium,large'  # table1: which sizes
k_a = 0.0              # table1: attention modules per token and step of the MoM rows; 0 is K
k_f = 0.0              # table1: feed-forward modules likewise
measure = False        # table1: run a cached prefill of each model and measure its memory
weights = ''           # a run's directory, a GPT-2, a Hugging Face directory; '' is random
compare = ''           # 'hf', 'vanilla', in decode 'ct2'; several with commas
hf_dtype = ''          # decode: of the libraries' weights, 'float32' or 'bfloat16'; '' is dtype
profile = False        # train, forward, decode: the operators that take longest, and a trace
out_dir = 'out/bench'  # where the trace goes, and in a terminal the JSON
# --- how much
micro_batch = 4        # train, forward, tf32: sequences, of block_size tokens
batch = 0              # decode: sequences, 0 is 1; table1 with --measure: sequences, 0 is 10
length = 1024          # table1 with --measure: tokens of each
prompt = 64            # decode, ablate: tokens before the first new one
new = 64               # decode, ablate: new tokens
ragged = False         # decode: prompts of different lengths, from half of `prompt` up to it
beams = 1              # decode: more is a beam search, of all that is compared
top_k = 0              # decode: beside it the model as it samples, among the k likeliest tokens,
top_p = 1.0            # ... or the likeliest that hold this share; 0 and 1.0: no such row
tokens = 4096          # route, ablate: tokens, in sequences of block_size; scale: in one
repeats = 5            # timed calls of each thing
# --- system
device = 'auto'        # 'auto', 'cpu', 'cuda', 'mps' or 'xpu'
dtype = 'auto'         # of autocast, in decode of weights: 'bfloat16', 'float32'; auto: by device
compile = False        # train, forward: torch.compile, as train.py does it
threads = 0            # of the CPU; 0 leaves torch's choice
# ---
MODEL = {f.name for f in fields(MoMConfig)}
WIDTH = {'gpt2': (768, 12), 'gpt2-medium': (1024, 16), 'gpt2-large': (1280, 20),
         'gpt2-xl': (1600, 25)}
SHAPE = ('n_embd', 'n_head', 'block_size', 'vocab_size')  # the same for all that is compared
FILES = {}  # config files of the command line, and all that they set


def model_settings(values):
    """Of a config file's values those of MoMConfig; the rest as in the weights it starts from."""
    source, shape = values.get('init_from', 'scratch'), {}
    if source in WIDTH:
        shape = dict(zip(SHAPE, WIDTH[source]))
    elif os.path.exists(source):
        shape = read_weights(source)[1]
    return shape | {key: value for key, value in values.items() if key in MODEL}


def arguments():
    """The command line, with --key=value for what counts here of its config files."""
    for arg in sys.argv[1:]:
        if arg.startswith('--') or not arg.endswith('.py'):
            yield arg
            continue
        values = FILES[arg] = common.read_file(arg)
        kept = {key: values[key] for key in ('micro_batch',) if key in values}
        for key, value in (kept | model_settings(values)).items():
            yield f'--{key}={value}'


settings, given = common.load(globals(), arguments(), model=MoMConfig)
chunks, K, n_embd, block_size = (settings[key] for key in ('chunks', 'K', 'n_embd', 'block_size'))

# ----------------------------------------------------------------------------- clock, memory, table


def timed(call):
    """Seconds of a call, from an idle device until it has done all of it."""
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def wait():
    if on_gpu:
        torch.accelerator.synchronize(device)


def alternate(calls, warm_up=0):
    """Time functions in turn, {name: function} -> {name: seconds of each repeat, sorted}."""
    seconds = []
    for _ in range(warm_up + repeats):
        seconds.append({name: timed(call) for name, call in calls.items()})
    return {name: sorted(row[name] for row in seconds[warm_up:]) for name in calls}


def milliseconds(calls, warm_up):
    """alternate, and of each its median in milliseconds."""
    return {name: 1e3 * statistics.median(s) for name, s in alternate(calls, warm_up).items()}


def used_memory():
    """Bytes that torch has handed out on a GPU."""
    return torch.cuda.memory_allocated(device) if on_cuda else 0


def find_machine():
    name = platform.processor() or platform.machine()
    if on_cuda:
        name = torch.cuda.get_device_name(device)
    elif os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            names = [line.split(':')[1].strip() for line in f if line.startswith('model name')]
        name = names[0] if names else name
    return {'device': name, 'cores': os.cpu_count(), 'threads': torch.get_num_threads(),
            'torch': str(torch.__version__), 'dtype': dtype,
            'date': datetime.date.today().isoformat()}


def rounded(number, digits=2):
    return number if number is None else round(number, digits)


def print_table(rows):
    """Dicts with the same keys as a table, its first columns words. None is n/a."""
    left = len([*itertools.takewhile(lambda value: isinstance(value, str), rows[0].values())])
    columns = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        digits = [len(str(v).split('.')[1]) for v in values if isinstance(v, float)]
        columns.append([name, *(as_cell(v, max(digits, default=0)) for v in values)])
    widths = [max(map(len, column)) for column in columns]
    for n, row in enumerate(zip(*columns)):
        cells = [cell.ljust(w) if i < left else cell.rjust(w)
                 for i, (cell, w) in enumerate(zip(row, widths))]
        print('| ' + ' | '.join(cells) + ' |')
        if n == 0:
            print('|' + '|'.join('-' * (w + 2) for w in widths) + '|')


def as_cell(value, digits):
    if value is None:
        return 'n/a'
    return value if isinstance(value, str) else f'{value:,.{digits}f}'


# ----------------------------------------------------------------------------- models, counts

def on_meta(cfg):
    """The model without its numbers: enough to count with."""
    with torch.device('meta'):
        return GPT(cfg)


def one_chunk(**fixed):
    """The MoMConfig of a single chunk, of 4 modules if chunks is not given. Raises ValueError."""
    one = {key: settings[key] for key in MODEL} | {'chunks': chunks if 'chunks' in given else '4'}
    cfg = MoMConfig(**one | fixed)
    if len(cfg.sizes) > 1 or cfg.vanilla:
        raise ValueError(f'chunks={chunks!r}: {mode} times one chunk of several modules, such as '
                         '--chunks=4')
    if tokens % block_size:
        raise ValueError(f'tokens={tokens} must be a multiple of block_size={block_size}')
    return cfg


def modules_per_token(decisions):
    """(k_a, k_f): modules (SKIP is none) per token and decision; None where no router decides."""
    k = []
    for kinds in ('AT', 'FT'):  # MoD sends a token through both or through neither
        taken = [(d.ids < d.N).sum(1).float().mean().item()
                 for d in itertools.chain(*decisions) if d.kind in kinds]
        k.append(statistics.mean(taken) if taken else None)
    return tuple(k)


def router_weights_used(cfg, chunk):
    """How many weights of routers a token meets; those of 'linear' are of one step each."""
    names = ('router', 'predictor')
    stored = sum(p.numel() for key, p in chunk.named_parameters() if key.startswith(names))
    return stored * (1 if cfg.router == 'linear' else chunk.H)


def weights_read(model, cfg, decisions, starts, width):
    """Bytes of weights that a decoding step has to read, the mean over steps.

    decisions: those of whole sequences; starts: the first position of each that is decoded. A
    module counts if any of the sequences takes it; where subsets are merged, the qkv matrices of
    the modules that a token takes together count once. Routers count at every step, with 4 bytes a
    weight (GPT.cast leaves them in fp32), all else with `width`.
    """
    C = cfg.n_embd
    # matrices, biases and LayerNorms
    sizes = {'qkv': 3 * C * C + 5 * C, 'out': C * C + C, 'ffn': 8 * C * C + 7 * C}
    total = width * (cfg.vocab_size + 3) * C  # the head, the last LayerNorm, a position
    for chunk, decided in zip(model.chunks, decisions):
        reads = dict.fromkeys(sizes, chunk.H)
        for d in decided:
            modules, sets = modules_read(d, starts, cfg.tied)
            for part in {'A': ('qkv', 'out'), 'F': ('ffn',), 'T': sizes}[d.kind]:
                reads[part] += (sets if part == 'qkv' and chunk.S else modules) - 1
        total += 4 * router_weights_used(cfg, chunk)
        total += width * sum(sizes[part] * n for part, n in reads.items())
    return total


def modules_read(d, starts, tied):
    """How many modules, and how many sets of them, a decoding step of all sequences takes."""
    ids = d.ids.view(len(starts), -1, d.ids.size(1)).tolist()
    modules, sets = [], []
    for position in zip(*(row[start:] for row, start in zip(ids, starts))):  # to the shortest's end
        picked = {frozenset(0 if tied else i for i in token if i < d.N) for token in position}
        picked -= {frozenset()}
        modules.append(len(frozenset().union(*picked)))
        sets.append(len(picked))
    return statistics.mean(modules), statistics.mean(sets)


# ----------------------------------------------------------------------------- runs

def runs():
    """Finished runs of train.py side by side."""
    sources = [source.strip() for source in of.split(',') if source.strip()]
    if not sources:
        raise ValueError('which runs? Name their folders: --of=out/gpt2_demo,out/mom_demo')
    print('depth: assembly steps executed; active: of modules that tokens took (SKIP is none);\n'
          'steps: up to the last validation; bits/byte: of the validation, before and after them.')
    rows = []
    for source in sources:
        folder = os.path.dirname(source) if source.endswith('.pt') else source
        checkpoint = load_checkpoint(os.path.join(folder, 'last.pt'))
        cfg = MoMConfig(**checkpoint['model_config'])
        log, val = common.read_log(folder)
        first, last = val[0], val[-1]
        model = on_meta(cfg)
        n_params, n_router = model.num_params()
        flops = model.flops_per_token(cfg.block_size, float(last['k_a']), float(last['k_f']))
        speed = statistics.median(float(row['tokens_per_s']) for row in log)
        rows.append({
            'run': common.run_name(source), 'chunks': cfg.chunks,
            'assembly': cfg.assembly, 'depth': cfg.depth,
            'parameters': n_params, 'in routers': n_router,
            'active MFLOPs/token': round(flops / 1e6, 2), 'steps': int(last['step']),
            'bits/byte before': round(float(first['val_bits_per_byte']), 3),
            'bits/byte after': round(float(last['val_bits_per_byte']), 3),
            'tokens/s': round(speed)})
    return rows


# ----------------------------------------------------------------------------- table1

PAPER = {  # config file, and for small, medium and large the paper's TFLOPs and GiB
    'GPT-2': ('gpt2_{}', (2.92, 2.98), (8.28, 4.74), (17.76, 7.20)),
    'MoD': ('mod_{}', (None, None), (None, None), (None, None)),
    'MoE': ('moe_{}', (3.81, 2.98), (11.37, 4.74), (25.43, 7.20)),
    'MoE (share)': ('moe_share_{}', (3.81, 2.98), (11.37, 4.74), (25.43, 7.20)),
    'MoM_E': ('mom_{}_k3h1s', (2.45, 2.45), (6.80, 3.33), (14.84, 4.13)),
    'MoM_I': ('mom_{}_k3h2s', (3.49, 2.63), (10.20, 3.80), (20.31, 5.15)),
    'MoM_P': ('mom_{}_k2h6s', (5.04, 3.34), (16.23, 5.69), (36.07, 9.24))}


def table1():
    """The cost columns of the paper's Table 1, ours beside the paper's."""
    if length > 1024:
        raise ValueError(f'length={length} must be at most 1024')
    print('A forward pass over 10 x 1,024 tokens with logits at every position.\n'
          'k_a, k_f: modules per token and step.\n'
          "paper's K_eff: how many of both give the paper's TFLOPs by our formula.\n"
          'merged: what this code computes, one q, k, v product a token where subsets are merged.\n'
          'GiB: without the weights, fp32 logits, a K and a V per token and executed step;\n'
          "with Q: as the paper's cache comes out, see prefill_gib.")
    if measure and on_cuda:
        print("measured: torch's peak above the weights, activations included")
    elif measure:
        print('measured: the bytes of the logits and of the cached K, V of a prefill that ran here')
    return [table1_row(name, of_size) for of_size in size.split(',') for name in PAPER]


def table1_row(name, of_size):
    stem, *figures = PAPER[name]
    tflops, gib = figures[('small', 'medium', 'large').index(of_size)]
    path = os.path.join(common.ROOT, 'config', stem.format(of_size) + '.py')
    shape = model_settings(common.read_file(path))
    cfg = MoMConfig(**shape)
    model, k, k_eff = on_meta(cfg), (None, None), None

    def forward_tflops(*k, **kw):
        return 10 * 1024 * model.flops_per_token(1024, *k, **kw) / 1e12

    if name.startswith('MoM'):
        k = tuple(float(min(asked or cfg.K, cfg.K)) for asked in (k_a, k_f))
        # FLOPs are linear in the modules per token: two points give k for the paper's figure
        one, two = forward_tflops(1, 1), forward_tflops(2, 2)
        k_eff = 1 + (tflops - one) / (two - one)
    ours, ours_gib = forward_tflops(*k), prefill_gib(cfg, 10, 1024, 2)
    row = {'size': of_size, 'model': f'{name} ({cfg.assembly})' if k_eff else name,
           'depth': cfg.depth, 'k_a': rounded(k[0]), 'k_f': rounded(k[1]),
           'TFLOPs': round(ours, 2), "paper's TFLOPs": tflops,
           'TFLOPs, %': tflops and round(100 * (ours / tflops - 1), 1),
           "paper's K_eff": rounded(k_eff, 4), 'merged': round(forward_tflops(*k, merged=True), 2),
           'GiB': round(ours_gib, 3), "paper's GiB": gib,
           'GiB, %': gib and round(100 * (ours_gib / gib - 1), 1),
           'GiB with Q': round(prefill_gib(cfg, 10, 1024, 3), 3)}
    if measure:
        B = batch or 10
        cfg = MoMConfig(**shape | {'block_size': length})  # a cache has room for block_size tokens
        row |= {f'GiB at {B} x {length}': round(prefill_gib(cfg, B, length, 2), 5),
                'measured': round(measured_gib(cfg, B, length), 5)}
    return row


def prefill_gib(cfg, B, T, vectors):
    """GiB in fp32 of what a forward pass over (B, T) leaves behind: logits, and for each token and
    executed step `vectors` vectors of width C. K and V are 2; the paper's are views that keep Q
    alive, which makes 3."""
    return 4 * B * T * (cfg.vocab_size + cfg.depth * vectors * cfg.n_embd) / 2**30


@torch.no_grad()
def measured_gib(cfg, B, T):
    """GiB of a cached prefill over (B, T) with all its logits in fp32, run here. On a GPU: torch's
    peak above the weights, activations included. On the CPU: the bytes of logits, K and V."""
    with torch.device(device):
        model = GPT(cfg).eval()
    before = used_memory()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    cache = Cache(cfg, B, device, torch.float32)
    x, _ = model.features(torch.randint(cfg.vocab_size, (B, T), device=device), cache)
    logits = F.linear(x, model.wte.weight)
    if on_cuda:
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    return sum(t.nbytes for t in (logits, *cache.k, *cache.v)) / 2**30


# ----------------------------------------------------------------------- train, forward, decode

LABELS = {'sampled': 'the same, sampling', 'vanilla': 'GPT-2, ours', 'hf': 'GPT-2, transformers',
          'ct2': 'GPT-2, CTranslate2'}
PEERS = ('hf', 'ct2')  # which read the same files


def passes():
    """Training steps (forward, backward, AdamW), or forward passes with logits."""
    training = mode == 'train'
    loaded, cfgs = subjects()
    own = cfgs['model']
    x, y = torch.randint(own.vocab_size, (2, micro_batch, own.block_size), device=device)
    say_what(own, f'{x.size(0)} x {x.size(1)} tokens')
    calls, rows, flops, computed = {}, {}, {}, {}
    for name, cfg in cfgs.items():
        before = used_memory()
        model = build(name, cfg, loaded)
        calls[name] = one_pass(model, name, x, y, training)
        first, peak = first_calls([calls[name]], before, name)
        taken = modules_per_token(decisions_of(model, x) if name == 'model' else [])
        bare = on_meta(cfg)
        flops[name] = round(bare.flops_per_token(cfg.block_size, *taken) / 1e6, 3)
        computed[name] = bare.flops_per_token(cfg.block_size, *taken, merged=True) / 1e6
        rows[name] = start_row(name, bare, taken, peak, first)
    seconds = alternate(calls)
    most = common.peak_flops(device) if dtype == 'bfloat16' else None
    steps = {name: statistics.median(s) for name, s in seconds.items()}
    for name, step in steps.items():
        per_second = (3 if training else 1) * x.numel() / step
        # in percent, of the FLOPs that are computed, as train.py's
        mfu = most and 100 * 1e6 * computed[name] * per_second / most
        rows[name] |= {
            'ms': round(1e3 * step, 2), 'fastest': round(1e3 * seconds[name][0], 2),
            'slowest': round(1e3 * seconds[name][-1], 2), 'tokens/s': round(x.numel() / step, 1),
            'active MFLOPs/token': flops[name],
            'GFLOP/s': round(flops[name] * per_second / 1e3, 1), 'MFU %': rounded(mfu, 1)}
    for name in [*rows][1:]:
        took, needs = steps['model'] / steps[name], flops['model'] / flops[name]
        ratios[name] = {'tokens/s': 1 / took, 'time': took, 'active FLOPs': needs,
                        'time / active FLOPs': took / needs}
    if profile:
        show_profile(calls['model'], own)
    return [*rows.values()]


def decode():
    """Text with a cache, greedy or by beam search: the whole call, the first token, the step."""
    loaded, cfgs = subjects()
    own, B = cfgs['model'], batch or 1
    if prompt + new > own.block_size:
        raise ValueError(f'prompt={prompt} and new={new} are more than block_size='
                         f'{own.block_size}, beyond which no cache helps: take fewer')
    x = torch.randint(own.vocab_size, (B, prompt), device=device)
    lengths, starts = None, [prompt] * B
    if ragged:  # evenly spread, in any order
        lengths = torch.linspace(prompt, prompt / 2, B).ceil().long()[torch.randperm(B)].to(device)
        starts = lengths.tolist()
    say_what(own, f'{B} x {min(starts)} to {prompt}' if ragged else f'{B} x {prompt}',
             f'tokens and {new} new ones of each,', f'{beams} beams' if beams > 1 else 'greedy')
    calls, rows, texts, megabytes = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        source = write_gpt2(cfgs, folder, loaded)
        for name, cfg in cfgs.items():
            if name != 'sampled':  # the model itself, which is the row before
                before, model = used_memory(), build(name, cfg, loaded, source)
            calls[name, 'first'] = partial(write, model, name, x, 1, lengths)
            calls[name, 'call'] = partial(write, model, name, x, new, lengths)
            first, peak = first_calls([calls[name, 'first'], calls[name, 'call']], before, name)
            text, decisions = calls[name, 'call'](), [[]] * len(cfg.plans)
            texts[name] = new_tokens(text, name, x, new, lengths)
            if name in ('model', 'sampled'):
                decisions = decisions_of(model, text[:, :-1])
            bare = on_meta(cfg)
            width = getattr(torch, hf_dtype if name in PEERS and hf_dtype else dtype).itemsize
            read = weights_read(bare, cfg, decisions, starts, width)
            megabytes[name] = round(read / 1e6, 3)
            taken = modules_per_token([] if ragged else decisions)  # padding is not to count
            rows[name] = start_row(name, bare, taken, peak, first)
            same = texts[name] == texts['vanilla' if 'vanilla' in texts else 'model']
            rows[name]['same text'] = int(same.all(1).sum()) if name in PEERS else None
    bandwidth = notes['bandwidth GB/s'] = round(memory_bandwidth(), 1)
    seconds = {key: statistics.median(s) for key, s in alternate(calls).items()}
    steps = {}
    for name, row in rows.items():
        start, whole = seconds[name, 'first'], seconds[name, 'call']
        if whole <= start:
            raise ValueError(
                f'the first token took {start:.3f} s, all {new} of them {whole:.3f} s: this '
                'machine is busy with other things. Take more of --new and --repeats')
        step = steps[name] = (whole - start) / (new - 1)
        reached = megabytes[name] / step / 1e3
        row |= {'call ms': round(1e3 * whole, 2), 'call tokens/s': round(B * new / whole, 1),
                'first token ms': round(1e3 * start, 2), 'ms/step': round(1e3 * step, 3),
                'step tokens/s': round(B / step, 1), 'MB read/step': megabytes[name],
                'GB/s': round(reached, 2), '% of bandwidth': round(100 * reached / bandwidth, 1)}
    for name in [*rows][1:]:
        took, needs = steps['model'] / steps[name], megabytes['model'] / megabytes[name]
        ratios[name] = {
            'call tokens/s': seconds[name, 'call'] / seconds['model', 'call'],
            'first token time': seconds['model', 'first'] / seconds[name, 'first'],
            'step tokens/s': 1 / took, 'step time': took, 'weights read': needs,
            'step time / weights read': took / needs}
    if profile:
        show_profile(calls['model', 'call'], own)
    return [*rows.values()]


def tf32():
    """Training steps with fp32 products (under autocast: the routers') in fp32 and in TF32.

    The picks are those of the same weights and tokens; 'float32 again' says how many change by
    themselves, where a GPU does not add up in the same order twice.
    """
    loaded, cfgs = subjects()
    own = cfgs['model']
    if not on_meta(own).num_params()[1]:
        raise ValueError(f'chunks={own.chunks!r} has no routers: take a config such as '
                         'config/mom_small_k2h6s.py')
    x, y = torch.randint(own.vocab_size, (2, micro_batch, own.block_size), device=device)
    say_what(own, f'{x.size(0)} x {x.size(1)} tokens')
    model = build('model', own, loaded)
    step, bare = one_pass(model, 'model', x, y, training=True), on_meta(own)
    precisions = {'float32': 'highest', 'float32 again': 'highest', 'TF32': 'high'}

    def at(precision, call):
        torch.set_float32_matmul_precision(precision)
        return call()

    calls = {name: partial(at, precision, step) for name, precision in precisions.items()}
    ms = milliseconds(calls, warm_up=2)
    routers = 2 * sum(router_weights_used(own, chunk) for chunk in bare.chunks)
    flops = bare.flops_per_token(own.block_size, *modules_per_token(decisions_of(model, x)))
    notes["routers' share of the FLOPs, %"] = round(100 * routers / flops, 2)
    picks, rows = {}, []
    for name, precision in precisions.items():
        decisions = itertools.chain(*at(precision, partial(decisions_of, model, x)))
        picks[name] = [d.ids.sort(1)[0] for d in decisions]  # of each decision (M, K)
        other = [(mine != those).any(1).float().mean().item()
                 for mine, those in zip(picks[name], picks['float32'])]
        rows.append({'fp32 products in': name, 'ms': round(ms[name], 2),
                     'tokens/s': round(1e3 * x.numel() / ms[name], 1),
                     'time over float32': round(ms[name] / ms['float32'], 3),
                     'other picks, %': round(100 * statistics.mean(other), 3),
                     'in the last step, %': round(100 * other[-1], 3)})
    return rows


def subjects():
    """The model of `weights`, or None, and {what is timed: its MoMConfig}, 'model' first."""
    loaded = None
    if weights:
        loaded = GPT.from_pretrained(weights, **{key: settings[key] for key in MODEL & given})
    own = loaded.cfg if loaded else MoMConfig(**{key: settings[key] for key in MODEL})
    layers = '-'.join('1' * own.n_layer)
    vanilla = MoMConfig(chunks=layers, **{key: getattr(own, key) for key in SHAPE})
    beside = set(compare.split(','))
    if mode in ('forward', 'decode'):
        beside.add('vanilla')
    if own.vanilla or mode == 'tf32':
        beside.discard('vanilla')
    cfgs = {'model': own} | ({'sampled': own} if top_k or top_p < 1 else {})
    return loaded, cfgs | {name: vanilla for name in LABELS if name in beside}


def say_what(cfg, *work):
    for path, values in FILES.items():
        left = (key for key in values if key not in MODEL | {'micro_batch', 'init_from'})
        print(f'{path}: left out, for train.py alone: {", ".join(left)}')
    print(f'{cfg.assembly}, chunks {cfg.chunks}, width {cfg.n_embd}, {cfg.vocab_size:,} kinds of '
          f'token, {weights or "random"} weights; {" ".join(work)}; {machine["device"]}, '
          f'{machine["threads"]} CPU threads, {dtype}')


def build(name, cfg, loaded=None, source=''):
    """A model to time, on the device: 'model', or one of LABELS. source: weights of GPT-2s."""
    if name == 'ct2':
        return build_ct2(source)
    if name == 'hf':
        model = transformers_gpt2(cfg, source)
    elif name == 'model' and loaded:
        model = loaded
    elif source and cfg.vanilla:
        model = GPT.from_pretrained(source)
    else:
        with torch.device(device):
            model = GPT(cfg)
    model = model.to(device)
    if mode == 'decode':
        model.eval()
        model.to(getattr(torch, hf_dtype or dtype)) if name == 'hf' else model.cast(real)
    if compile:  # as train.py does it
        fused = dtype == 'bfloat16' and has_grouped_mm(torch.device(device), cfg.n_embd)
        parts = [model]
        if not (name == 'hf' or cfg.vanilla or fused):
            parts = [chunk for chunk in model.chunks if chunk.phi in ('vanilla', 'share')]
        for part in parts:
            part.compile()
    return model


def transformers_gpt2(cfg, source=''):
    """Their GPT-2 of our MoMConfig: with weights from the folder `source`, else random."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if source:
        return transformers.GPT2LMHeadModel.from_pretrained(source, attn_implementation='sdpa')
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=cfg.n_embd, n_layer=cfg.n_layer, n_head=cfg.n_head, n_positions=cfg.block_size,
        vocab_size=cfg.vocab_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0,
        eos_token_id=None, attn_implementation='sdpa'))


def write_gpt2(cfgs, folder, loaded=None):
    """A GPT-2, `loaded` or random, as Hugging Face's files for the other libraries' in cfgs ->
    folder, or '' if there are none of them."""
    theirs = [cfg for name, cfg in cfgs.items() if name in PEERS]
    if not theirs:
        return ''
    cfg = theirs[0]
    model = transformers_gpt2(cfg)
    if loaded and loaded.cfg.vanilla:
        model.load_state_dict(hugging_face_names(loaded.state_dict()), strict=False)
    model.save_pretrained(folder)
    names = {str(i): i for i in range(cfg.vocab_size - 1)}
    names['<|endoftext|>'] = cfg.vocab_size - 1  # CTranslate2's converter wants a tokenizer
    with open(os.path.join(folder, 'vocab.json'), 'w') as f:
        json.dump(names, f)
    with open(os.path.join(folder, 'merges.txt'), 'w') as f:
        f.write('#version: 0.2\n')
    return folder


CT2 = '''
import json, sys, ctranslate2
generator = ctranslate2.Generator(**json.loads(input()))
print('true', flush=True)
for line in sys.stdin:
    results = generator.generate_batch(**json.loads(line))
    print(json.dumps([result.sequences_ids[0] for result in results]), flush=True)
'''


def build_ct2(source):
    """CTranslate2's GPT-2 of the folder `source`.

    It runs in a process of its own, which is returned. In torch's it makes torch's steps 40%
    longer: the threads of both are more than the cores, and torch's sleep where they else wait.
    """
    import ctranslate2
    converter = ctranslate2.converters.TransformersConverter(source)
    process = subprocess.Popen([sys.executable, '-c', CT2], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory() as folder:
        converter.convert(folder, force=True)
        ask(process, model_path=folder, device='cuda' if on_cuda else 'cpu',
            compute_type=hf_dtype or dtype, intra_threads=torch.get_num_threads())
    return process


def ask(process, **what):
    """What a process that runs CT2 answers: lists of new tokens, once its model is loaded."""
    print(json.dumps(what), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise ValueError('CTranslate2 ended without an answer: what it said stands above')
    return json.loads(answer)


def one_pass(model, name, x, y, training):
    """What is timed, as a function: a training step, or a forward pass with logits."""
    def logits_and_loss():
        with autocast:
            if name != 'hf':
                return model(x, y, want_logits=False) if training else model(x)
            logits, loss = model(x, use_cache=False).logits, None
            if training:
                loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
            return logits, loss

    if not training:
        model.eval()
        return torch.inference_mode()(logits_and_loss)
    # lr=0: all its work, yet every step is the same
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step():
        logits_and_loss()[1].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def write(model, name, x, n, lengths=None):
    """n new tokens after the rows of x (B, T), padded on the right if of different lengths (B,) ->
    (B, T + n), rows of transformers padded on the left; of CTranslate2 lists of the new ones."""
    ends = x.new_full(x.shape[:1], x.size(1)) if lengths is None else lengths
    if name == 'ct2':
        texts = [[str(i) for i in row[:end]] for row, end in zip(x.tolist(), ends.tolist())]
        return ask(model, start_tokens=texts, max_length=n, min_length=n, beam_size=beams,
                   include_prompt_in_result=False)
    if name == 'hf':
        T = x.size(1)
        at = torch.arange(T, device=x.device) - (T - ends).unsqueeze(1)  # (B, T): below 0, padding
        return model.generate(x.gather(1, at.clamp(min=0)), attention_mask=(at >= 0).long(),
                              max_new_tokens=n, do_sample=False, num_beams=beams, pad_token_id=0)
    if name == 'sampled':
        return model.generate(x, n, top_k=top_k or None, lengths=lengths,
                              top_p=top_p if top_p < 1 else None)
    return model.generate(x, n, temperature=0, beams=beams, lengths=lengths)


def new_tokens(text, name, x, n, lengths=None):
    """The new tokens of each row (B, n) in what `write` gave."""
    if name == 'ct2':
        new = torch.tensor(text, device=x.device)
    elif name == 'hf' or lengths is None:
        new = text[:, x.size(1):]
    else:
        new = text.gather(1, lengths.unsqueeze(1) + torch.arange(n, device=x.device))
    assert new.shape == (len(x), n), f'{name} wrote {tuple(new.shape)} tokens for {len(x)} x {n}'
    return new


def first_calls(calls, before, name):
    """The last one is called, then each of them -> seconds of that first call, and of the others
    the peak memory in bytes, less `before`; None where it is not counted."""
    first = timed(calls[-1])
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for call in calls:
        timed(call)
    alone = name == 'model' and not compare  # what else the process has held counts on a CPU
    peak = common.peak_memory(device) if on_cuda or alone else None
    return first, peak and peak - before


@torch.no_grad()
def decisions_of(model, x):
    with autocast:
        return model.features(x)[1]


def start_row(name, bare, taken, peak, first):
    cfg = bare.cfg
    label = LABELS.get(name) or ('GPT-2' if cfg.vanilla else cfg.assembly)
    return {'model': label, 'parameters': bare.num_params()[0],
            'k_a': rounded(taken[0]), 'k_f': rounded(taken[1]),
            'peak GiB': rounded(peak and peak / 2**30), 'first s': round(first, 3)}


def memory_bandwidth():
    """GB/s, the best of a sum, a row times a matrix and a copy of 256 MiB."""
    W, vector = torch.randn(4096, 16384, device=device), torch.randn(1, 4096, device=device)
    best = alternate({'sum': W.sum, 'product': lambda: vector @ W, 'copy': W.clone}, warm_up=2)
    passes = {'sum': 1, 'product': 1, 'copy': 2}  # a copy reads and writes
    return max(W.nbytes * n / best[name][0] for name, n in passes.items()) / 1e9


def show_profile(call, cfg):
    with torch.profiler.profile() as profiler:
        timed(call)
    by = 'self_cuda_time_total' if on_cuda else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))
    notes['trace'] = os.path.join(out_dir, f'{mode}_{cfg.assembly}.json')
    profiler.export_chrome_trace(notes['trace'])
    print('The trace of one call is for chrome://tracing or ui.perfetto.dev.')


# ----------------------------------------------------------------------------- route

def route():
    """One routed step beside dense products of as many multiply-adds, for K = 2 and 3."""
    cfgs = [one_chunk(K=n, H=1, skip=False, vocab_size=1)
            for n in ([K] if 'K' in given else [2, 3])]
    print(f'One assembly step over {tokens:,} tokens of width {n_embd}, no SKIP, {dtype}, beside\n'
          "dense products with the method's multiply-adds, K * 12 C^2 a token.\n"
          'efficiency: dense / routed as it runs; of modules alone: attention and both routers,\n'
          'timed apart, taken off. idlest, busiest: the shares of the tokens that modules get.')
    return [row for cfg in cfgs for row in route_rows(cfg)]


def route_rows(cfg):
    """Forward, and with backward. A step that merges q, k, v leaves out some of the FLOPs."""
    B, T, C = tokens // cfg.block_size, cfg.block_size, cfg.n_embd
    M = cfg.K * tokens
    with torch.device(device):
        chunk = GPT(cfg).chunks[0]
        x = torch.randn(B, T, C, requires_grad=True)
        dense = [(torch.randn(M, i, dtype=real, requires_grad=True),
                  torch.randn(i, o, dtype=real, requires_grad=True))
                 for i, o in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C))]
        qkv = torch.randn(3, B, cfg.n_head, T, C // cfg.n_head, dtype=real, requires_grad=True)

    def routers():
        return [router(x.view(-1, C), None, 0)[0] for router in (chunk.router_a, chunk.router_f)]

    works = {'dense': lambda: [rows @ W for rows, W in dense],
             'routed': partial(assembled, chunk, x),
             'attention': lambda: [F.scaled_dot_product_attention(*qkv, is_causal=True)],
             'routers': routers}
    leaves = [x, qkv, *chunk.parameters(), *itertools.chain(*dense)]
    with torch.no_grad(), autocast:
        decisions = chunk(x)[1]
    shares = torch.stack([d.ids.flatten().bincount(minlength=d.N) / tokens for d in decisions])
    for direction, calls in directions(works, leaves):
        ms = milliseconds(calls, warm_up=2)
        rest = ms['routed'] - ms['attention'] - ms['routers']
        yield {'passes': direction, 'N': decisions[0].N, 'K': cfg.K,
               'idlest': rounded(shares.min().item()), 'busiest': rounded(shares.max().item()),
               **{f'{name} ms': round(t, 2) for name, t in ms.items()},
               'efficiency': round(ms['dense'] / ms['routed'], 3),
               'of modules alone': round(ms['dense'] / rest, 3) if rest > 0 else None}


def directions(works, leaves):
    """[(name, calls)]: functions of `works` as they are, and each with its backward pass."""
    return [('forward', {name: torch.no_grad()(call) for name, call in works.items()}),
            ('both', {name: with_backward(call, leaves) for name, call in works.items()})]


def assembled(chunk, x):
    """A chunk's output for x, as a list of one: what with_backward takes."""
    with autocast:
        return [chunk(x)[0]]


def with_backward(forward, leaves):
    """A function: forward() -> tensors, then their backward pass, into fresh gradients."""
    def call():
        outs = forward()
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
        for leaf in leaves:
            leaf.grad = None
    return call


# ----------------------------------------------------------------------------- ablate

def ablate():
    """One chunk as it is, without merged q, k, v, without grouping. Then text without a cache."""
    cfg = one_chunk(vocab_size=256)
    if prompt + new > block_size:
        raise ValueError(f'block_size={block_size}: prompt={prompt} and new={new} must fit into it')
    return [*ablate_chunk(cfg), *ablate_cache(cfg)]


def ablate_chunk(cfg):
    x = torch.randn(tokens // block_size, block_size, n_embd, device=device, requires_grad=True)
    whole, apart = (GPT(cfg).to(device).chunks[0] for _ in range(2))
    apart.S = 0
    variants = {'as it is': whole, 'q, k, v not merged': apart,
                'not grouped: all modules for all tokens': every_module(cfg)}
    works = {name: partial(assembled, chunk, x) for name, chunk in variants.items()}
    leaves = [x, *itertools.chain(*(chunk.parameters() for chunk in variants.values()))]
    for direction, calls in directions(works, leaves):
        yield from times(direction, milliseconds(calls, warm_up=1))


def ablate_cache(cfg):
    model = GPT(cfg).to(device).eval().cast(real)
    idx = torch.randint(256, (1, prompt), device=device)

    @torch.no_grad()
    def without_cache():
        text = idx
        for _ in range(new):
            text = torch.cat((text, model(text)[0][:, -1:].argmax(-1)), 1)

    calls = {'as it is': partial(write, model, 'model', idx, new), 'no cache': without_cache}
    return times(f'{new} new tokens after {prompt}', milliseconds(calls, warm_up=1))


def times(direction, ms):
    return [{'what': name, 'passes': direction, 'ms': round(t, 1),
             'times': round(t / ms['as it is'], 2)} for name, t in ms.items()]


def every_module(cfg):
    """The same chunk without any routing of rows: all modules for all tokens, then a sum weighted
    by r or 0."""
    chunk = GPT(cfg).to(device).chunks[0]

    def choose(kind, x, h, state):
        router, N = (chunk.router_a, chunk.N_A) if kind == 'A' else (chunk.router_f, chunk.N_F)
        r, state[kind] = router(x, state.get(kind), h)
        ids, weights = model_py.top_k(r, cfg.K, cfg.router_weights, cfg.tau)
        all_weights = torch.zeros(len(x), N + 1, device=device).scatter(1, ids, weights)
        all_ids = torch.arange(N + 1, device=device).expand(len(x), -1)
        return chunk.decision(kind, h, all_ids, all_weights, x)

    def qkv(pools, x, d):
        taken = d.weights != 0  # (M, N + 1)
        return sum(attn_in(m, x) * taken[:, i:i + 1] for i, m in enumerate(pools.attn.each))

    chunk.choose, chunk.qkv, chunk.S = choose, qkv, 0
    return chunk


# ----------------------------------------------------------------------------- scale

def scale():
    """A chunk with N = 4, K = 2, H = 2, T = 1,024, C = 256; then each of the five changed."""
    T, C = tokens if 'tokens' in given else 1024, n_embd if 'n_embd' in given else 256
    base = dict(N=4, K=2, H=2, T=T, C=C)
    other = dict(N=(2, 8, 12), K=(1, 3, 4), H=(1, 4, 6), T=(T // 4, T // 2, 2 * T),
                 C=(C // 2, 2 * C, 3 * C))
    points = {'base': base}
    for key, values in other.items():
        points |= {f'{key} = {value}': base | {key: value} for value in values}
    calls, flops = {}, {}
    for name, p in points.items():
        cfg = MoMConfig(chunks=str(p['N']), K=p['K'], H=p['H'], skip=False, n_embd=p['C'],
                        n_head=max(1, p['C'] // 64), block_size=p['T'], vocab_size=1)
        chunk = GPT(cfg).to(device).chunks[0]
        x = torch.randn(1, p['T'], p['C'], device=device, requires_grad=True)
        calls[name] = with_backward(partial(assembled, chunk, x), [x, *chunk.parameters()])
        head = 2 * p['C']  # of a vocabulary of 1
        flops[name] = p['T'] * (on_meta(cfg).flops_per_token(p['T']) - head)
    ms = milliseconds(calls, warm_up=1)
    return [{'step': name, **p, 'ms': round(ms[name], 1), 'time': round(ms[name] / ms['base'], 2),
             'FLOPs': round(flops[name] / flops['base'], 2)} for name, p in points.items()]


# ----------------------------------------------------------------------------- saved

def saved():
    """What autograd keeps for the backward pass, by kind of chunk, in training on a GPU: KiB of
    each token, and MiB once, of weights (bf16 copies, merged q, k, v).

    F.grouped_mm, bf16 autocast and merging are used whatever the device, as they are for the
    thousands of tokens of a micro-batch on a GPU.
    """
    model_py.grouped_dtype = lambda x: torch.bfloat16
    cfg = MoMConfig(**{key: settings[key] for key in MODEL})
    plans, rows = [*map(str, cfg.plans)], []
    for plan, many in Counter(plans).items():
        i = plans.index(plan)
        short, long = saved_bytes(cfg, i)
        rows.append({'chunk': cfg.plans[i].phi, 'N': cfg.sizes[i], 'H': cfg.plans[i].H,
                     'how many': many, 'KiB/token': round((long - short) / 64 / 1024, 1),
                     'MiB once': round((2 * short - long) / 2**20, 1)})
    KiB = sum(row['KiB/token'] * row['how many'] for row in rows)
    # checkpointing keeps the chunks' inputs, and one chunk at a time
    inputs = len(cfg.sizes) * cfg.n_embd * 4 / 1024
    KiB_again = inputs + max(row['KiB/token'] for row in rows)
    copies = sum(row['MiB once'] * row['how many'] for row in rows)
    notes.update({
        'GiB/sequence': round(KiB * cfg.block_size / 2**20, 2),
        'GiB/sequence, checkpointing': round(KiB_again * cfg.block_size / 2**20, 2),
        'GiB of weights, gradients, AdamW': round(16 * on_meta(cfg).num_params()[0] / 2**30, 2),
        'GiB of copies': round(copies / 2**10, 2),
        'GiB of copies, checkpointing': round(max(row['MiB once'] for row in rows) / 2**10, 2)})
    return rows


def saved_bytes(cfg, i):
    """Bytes that chunk i keeps for 64 and for 128 tokens, its parameters not counted."""
    with torch.device('meta'):
        bare = GPT(dataclasses.replace(cfg, vocab_size=1)).chunks[i]
    chunk = bare.to_empty(device=device)
    for p in [*chunk.parameters(), *chunk.buffers()]:
        p.data = torch.zeros_like(p.data)
    chunk.pools = partial(chunk.pools, keep=True)
    own = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    kept = []
    for T in (64, 128):
        seen = {}  # address -> bytes

        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(1, T, cfg.n_embd, device=device, requires_grad=True)
        with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = chunk(x)
        kept.append(sum(n for at, n in seen.items() if at not in own))
        del y
    return kept


# ----------------------------------------------------------------------------- modes

# mode -> its function, the settings that count in it, and those of the model
SPEED = ['weights', 'dtype', 'repeats']
CHUNK = ['chunks', 'K', 'router_dim', 'n_embd', 'n_head', 'block_size']
MODES = {
    'runs': (runs, ['of'], []),
    'table1': (table1, ['size', 'k_a', 'k_f', 'measure', 'batch', 'length'], []),
    'train': (passes, [*SPEED, 'compare', 'profile', 'micro_batch', 'compile'], MODEL),
    'forward': (passes, [*SPEED, 'compare', 'profile', 'micro_batch', 'compile'], MODEL),
    'decode': (decode, [*SPEED, 'compare', 'profile', 'batch', 'prompt', 'new', 'hf_dtype',
                        'ragged', 'beams', 'top_k', 'top_p'], MODEL),
    'tf32': (tf32, [*SPEED, 'micro_batch'], MODEL),
    'route': (route, ['tokens', 'dtype', 'repeats'], CHUNK),
    'ablate': (ablate, ['tokens', 'dtype', 'repeats', 'prompt', 'new'], [*CHUNK, 'H']),
    'scale': (scale, ['repeats', 'tokens', 'dtype'], ['n_embd']),
    'saved': (saved, [], MODEL)}
EVERYWHERE = {'mode', 'device', 'threads', 'out_dir'}
AT_LEAST = dict(micro_batch=1, length=1, prompt=1, tokens=1, repeats=1, batch=0, threads=0,
                k_a=0, k_f=0, beams=1, top_k=0,
                new=2)  # the first new token comes out of the prompt's pass
KNOWN = dict(dtype='auto bfloat16 float32', hf_dtype='bfloat16 float32', size='small medium large',
             compare='hf vanilla' + ' ct2' * (mode == 'decode'))


def check():
    """Raises ValueError, naming the fix, before anything long."""
    if mode not in MODES:
        raise ValueError(f'mode {mode!r} is not known: take {", ".join(map(repr, MODES))}')
    takes = {name: {*own, *of_model} for name, (_, own, of_model) in MODES.items()}
    with_files = [name for name in MODES if MODES[name][2] is MODEL]
    if FILES and mode not in with_files:
        raise ValueError(f'{[*FILES][0]}: config files go with {", ".join(with_files)}, '
                         f'not with {mode}')
    for key in sorted(given - takes[mode] - EVERYWHERE - ({'micro_batch'} if FILES else set())):
        fitting = ', '.join(name for name in MODES if key in takes[name])
        raise ValueError(f'--{key} does nothing in {mode}: it goes with {fitting}')
    for path, values in FILES.items():
        lacking = [f'--{key}=...' for key in ('chunks', *SHAPE) if key not in given and not weights]
        source = values.get('init_from', 'scratch')
        if lacking and source not in ('scratch', *WIDTH):
            raise ValueError(f'{path} starts from {source}, which is not here to give a shape: add '
                             + ' '.join(lacking))
    for key, least in AT_LEAST.items():
        if settings[key] < least:
            raise ValueError(f'{key}={settings[key]} must be at least {least}')
    for key, known in KNOWN.items():
        if key in ('compare', 'hf_dtype') and not settings[key]:
            continue
        several = key in ('compare', 'size')
        for value in settings[key].split(',') if several else [settings[key]]:
            if value not in known.split():
                raise ValueError(f'{key}={settings[key]!r}: {value!r} is none of '
                                 + known.replace(' ', ', '))
    if not 0 < top_p <= 1:
        raise ValueError(f'top_p={top_p} must be above 0 and at most 1')
    if beams > 1 and (top_k or top_p < 1):
        raise ValueError(f'top_k={top_k} and top_p={top_p} go without beams={beams}: leave one out')
    if ragged and batch < 2:
        raise ValueError(f'ragged=True needs rows that can differ, not batch={batch}: '
                         'add --batch=8')
    for name, package in (('hf', 'transformers'), ('ct2', 'transformers'), ('ct2', 'ctranslate2')):
        if name in compare and not importlib.util.find_spec(package):
            raise ValueError(f'--compare={compare} needs {package}: pip install {package}')


check()
device = common.find_device(device)
on_gpu, on_cuda = device != 'cpu', device.startswith('cuda')
for_person = sys.stdout.isatty()
if for_person or profile:
    out_dir = common.results_folder(out_dir)
fixed = {'runs': 'float32', 'table1': 'float32', 'saved': 'bfloat16'}
dtype = common.find_dtype(fixed.get(mode, dtype), device)
real = getattr(torch, dtype)
autocast = torch.autocast(device.split(':')[0], torch.bfloat16,
                          enabled=dtype != 'float32' and mode != 'decode')
if threads:
    torch.set_num_threads(threads)
torch.manual_seed(1337)
machine, ratios, notes = find_machine(), {}, {}

rows = MODES[mode][0]()
print_table(rows)
for name, numbers in ratios.items():
    ratios[name] = {key: round(number, 3) for key, number in numbers.items()}
    words = ', '.join(f'{key} {number}' for key, number in ratios[name].items())
    print(f'{rows[0]["model"]} over {LABELS[name]}: {words}')
for key, value in notes.items():
    print(f'{key}: {value}')
line = json.dumps({'mode': mode, 'machine': machine, 'rows': rows, 'ratios': ratios} | notes)
if for_person:
    path = os.path.join(out_dir, f'{mode}.json')
    common.write_text(path, line + '\n')
    print(f'as JSON: {path}')
else:
    print(line)
