"""Train GPT-2, or the Mixture-of-Modules that its layers become: both phases, one flat script.

  python train.py config/gpt2_demo.py                               one process, a GPU or the CPU
  torchrun --nproc_per_node=8 train.py config/mom_medium_k2h6s.py   one process per GPU
  torchrun --nproc_per_node=2 train.py config/mom_demo.py           two: a GPU each, or the CPU
  torchrun --nproc_per_node=8 train.py config/mom_large_k2h6s.py --fsdp=True      weights sharded
  python train.py --out_dir=out/mom_demo --init_from=resume         go on where that run stopped
  python train.py --init_from=gpt2 --max_steps=0                    evaluate, and write nothing

The defaults are the paper's recipe (section 4.1). Any setting: in a config file, or as --key=value.
Settings of the model are the fields of MoMConfig (model.py), except vocab_size, which comes from
the data. Any not given come from the weights that the run starts from.
"""
import csv
import importlib.util
import itertools
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, fields

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import common
import inputs
from model import GPT, MoMConfig, has_grouped_mm, need
from weights import load_checkpoint, regroup

# --- run
out_dir = 'out/run'     # last.pt and best.pt (checkpoints), log.csv and settings.json
data_dir = 'data/openwebtext_gpt2'  # train.bin, val.bin and meta.json, made by prepare.py
init_from = 'scratch'   # or 'resume', a GPT-2 name, a Hugging Face directory, our checkpoint
overwrite = False       # start anew in an out_dir that holds a run
seed = 1337             # of the weights and of the data order; phase two takes another one
# --- optimisation
max_steps = 20_000      # optimizer steps; the paper: 20k, in phase two 10k; 0 evaluates and ends
batch_size = 512        # sequences per step, over all processes and micro-batches
micro_batch = 16        # sequences per forward pass of a process, at most
learning_rate = 1e-3    # peak
min_lr = 0.0            # where the cosine ends
warmup = 0.1            # share of the steps in which the learning rate rises
beta1 = 0.9             # AdamW
beta2 = 0.95            # AdamW
weight_decay = 0.1      # of matrices and embeddings
grad_clip = 1.0         # largest gradient norm; 0 is off
# --- evaluation and log
eval_every = 500        # steps between evaluations, each followed by a checkpoint
eval_tokens = 4_000_000  # of val.bin, evenly spread, at most
log_every = 1           # steps between printed lines; log.csv has every step
track = ''              # 'wandb', 'trackio' or 'tensorboard': a second log
# --- system
device = 'auto'         # 'auto', 'cpu', 'cuda', 'mps' or 'xpu'
dtype = 'auto'          # autocast: 'bfloat16', 'float16', 'float32'; auto: the device's best
compile = False         # torch.compile: all of a vanilla or on Hopper in bf16, else unrouted chunks
fsdp = False            # shard weights, gradients and optimizer over the processes (FSDP2)
checkpointing = False   # keep the chunks' inputs only, compute the rest again: less memory, slower
# ---
settings, given = common.load(globals(), model=MoMConfig, without=('vocab_size',))
common.if_stopped = 'Training had not begun.'

# ----------------------------------------------------------------------------- a run to go on with

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
is_main = rank == 0
writes = is_main and max_steps > 0
last_pt, best_pt = os.path.join(out_dir, 'last.pt'), os.path.join(out_dir, 'best.pt')
log_path = os.path.join(out_dir, 'log.csv')
restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0  # by torchrun --max_restarts
launch = os.environ.get('TORCHELASTIC_RUN_ID', '')  # of torchrun; the same after a restart
if os.environ.get('LOCAL_WORLD_SIZE') == str(world):  # on one machine the id is often 'none'
    launch += f' {platform.node()} {os.getppid()}'  # in a container torchrun is often process 1

if writes and os.path.isdir(out_dir):
    common.lock_folder(common.results_folder(out_dir))
checkpoint = None
if init_from == 'resume' or restarted and os.path.exists(last_pt):
    checkpoint = load_checkpoint(last_pt)
    if init_from != 'resume' and checkpoint.get('launch') != launch:
        checkpoint = None  # of another run: ours ended before its first checkpoint
if checkpoint:
    parts = dict(settings=dict, optimizer=dict, scaler=dict, step=int, val_loss=float, val_step=int,
                 best_loss=float, meta=dict, rng=torch.Tensor)
    if not (all(isinstance(checkpoint.get(k), of) for k, of in parts.items())
            and {'state', 'param_groups'} <= checkpoint['optimizer'].keys()):
        raise ValueError(f'{last_pt} holds weights, but no training to resume: begin one with '
                         f'--init_from={last_pt}')
    # Settings not given here stay as they were, except the folder, which may have moved.
    was = {k: v for k, v in checkpoint['settings'].items()
           if k in settings and k != 'out_dir' and (k not in given or k == 'init_from')}
    before = {**settings, **checkpoint['settings']}
    settings.update(was)
    globals().update((k, v) for k, v in was.items() if k in globals())
elif max_steps and (os.path.exists(last_pt) or os.path.exists(best_pt)) and not overwrite:
    raise ValueError(f'{out_dir} holds a run: go on with it (--init_from=resume), take another '
                     '--out_dir, or lose it (--overwrite=True)')
resumed = checkpoint is not None

# ----------------------------------------------------------------------------- settings

for key in ('batch_size', 'micro_batch', 'block_size', 'eval_every', 'eval_tokens', 'log_every'):
    need(settings[key] >= 1, f'{key}={settings[key]} must be at least 1')
for key in ('max_steps', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip'):
    need(0 <= settings[key] < math.inf, f'{key}={settings[key]} must be a number of at least 0')
for key in ('beta1', 'beta2'):
    need(0 <= settings[key] < 1, f'{key}={settings[key]} must be at least 0 and below 1')
need(0 <= warmup < 1, f'warmup={warmup} is a share of the steps: 0 <= warmup < 1')
need(min_lr <= learning_rate,
     f'min_lr={min_lr} is above learning_rate={learning_rate}: take a smaller one')
need(track in ('', 'wandb', 'trackio', 'tensorboard'),
     f"track={track!r} must be 'wandb', 'trackio' or 'tensorboard'")
need(not track or importlib.util.find_spec(track),
     f'track={track} needs the package: pip install {track}')
per_rank = batch_size // world
micro = min(micro_batch, per_rank)  # sequences of one forward pass
need(micro and batch_size % world == 0 and per_rank % micro == 0,
     f'batch_size={batch_size} must be a multiple of {world} processes x micro_batch={micro_batch}')
device = common.find_device(device)
dtype = common.find_dtype(dtype, device, else_='float16')
need(not fsdp or world > 1 and not compile and dtype != 'float16',
     'fsdp=True shards over several processes (torchrun), and goes with neither compile=True nor '
     'dtype=float16: change that, or take --fsdp=False')
source = last_pt if resumed else init_from
meta = inputs.read_data(data_dir, source)

# ----------------------------------------------------------------------------- processes

if world > 1:
    device = common.join_processes(device)
kind = device.partition(':')[0]
torch.manual_seed(seed)
autocast = nullcontext() if dtype == 'float32' else torch.autocast(kind, getattr(torch, dtype))
scaler = torch.amp.GradScaler(kind, enabled=dtype == 'float16')


def say(*text):
    if is_main:
        try:
            print(*text, flush=True)
        except OSError:  # the terminal is gone: training need not
            sys.stdout = open(os.devnull, 'w')


# ----------------------------------------------------------------------------- model

model_keys = [f.name for f in fields(MoMConfig) if f.name in settings]
overrides = {k: settings[k] for k in model_keys if k in given}  # of loaded weights, the rest stays
if checkpoint:
    have = checkpoint['model_config']
    for key, value in overrides.items():
        if value != have[key]:
            raise ValueError(f'{key}={value!r}, but the run in {out_dir} has {have[key]!r}: '
                             'leave it out to resume')
    raw = GPT(MoMConfig(**have))
    raw.load_state_dict(regroup(checkpoint['model'], raw, False, last_pt))
elif init_from == 'scratch':
    raw = GPT(MoMConfig(**{k: settings[k] for k in model_keys}, vocab_size=meta['vocab_size']))
else:
    raw = GPT.from_pretrained(source, **overrides)
cfg = raw.cfg
settings.update({k: getattr(cfg, k) for k in model_keys})  # what is printed and saved is resolved
block_size = cfg.block_size

for split in ('train', 'val'):
    tokens = meta[f'{split}_tokens']
    need(tokens > block_size,
         f'{data_dir}/{split}.bin has {tokens:,} tokens, not one sequence of block_size='
         f'{block_size} and its target: take a shorter block_size or more text')
padding = cfg.vocab_size - meta['vocab_size']  # many vocabularies are padded a little, some by more
need(0 <= padding < 128 or padding > 0 and meta['tokenizer'] == inputs.tokenizer_of(source).name,
     f'{data_dir} has {meta["vocab_size"]} kinds of token, the weights know {cfg.vocab_size}: '
     'prepare the text with the tokenizer of the weights')

sha256 = raw.fingerprint()
step = checkpoint['step'] if checkpoint else 0
common.agree(settings=settings, data=meta, step=step, weights=sha256)
raw.to(device)
raw.checkpointing = checkpointing
model = raw
grouped = dtype == 'bfloat16' and has_grouped_mm(torch.device(device), cfg.n_embd)
if compile and (cfg.vanilla or grouped):
    model = torch.compile(raw)
elif compile:  # else the sizes inside a routed chunk change with every batch: it stays eager
    for chunk in raw.chunks:
        if chunk.phi in ('vanilla', 'share'):
            chunk.compile()
if fsdp:  # each chunk is gathered when it runs
    def placement(p):  # cut a tensor along the longest side that can be cut evenly
        even = [side for side in range(p.ndim) if p.size(side) % world == 0]
        return Shard(max(even, key=p.size, default=0))
    mesh = init_device_mesh(kind, (world,))
    for part in (*raw.chunks, raw):
        fully_shard(part, mesh=mesh, shard_placement_fn=placement)
    register_fsdp_forward_method(raw, 'features')  # evaluation calls it
    # Nothing is done in place on the views that it warns of.
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view')
elif world > 1:  # it broadcasts a few hundred bytes of constants: torch 2.13 warns if told not to
    model = DistributedDataParallel(model, device_ids=None if device == 'cpu' else [device])
optimizer = torch.optim.AdamW(raw.param_groups(weight_decay), lr=learning_rate,
                              betas=(beta1, beta2), fused=True)

# ----------------------------------------------------------------------------- batches

def sequences(split, offsets):
    """The sequences that start at `offsets` -> inputs, targets: (len(offsets), block_size) each."""
    # It is opened anew each time: memory would grow by all that was ever read from one memmap.
    tokens = np.memmap(os.path.join(data_dir, f'{split}.bin'), dtype='<u2', mode='r')
    rows = np.stack([tokens[o:o + block_size + 1] for o in offsets]).astype(np.int64)
    rows = common.to_device(torch.from_numpy(rows), device)
    return rows[:, :-1], rows[:, 1:]


def batch_offsets(step):
    """Where in train.bin the sequences of a step start: a function of (seed, step) alone.

    It does not depend on the number of processes: a run can resume on more or fewer of them.
    """
    rng = np.random.default_rng([seed, step])
    return rng.integers(0, meta['train_tokens'] - block_size, size=batch_size)


def train_batches(step):
    """This process's micro-batches of a step."""
    offsets = batch_offsets(step)
    for at in range(rank * per_rank, (rank + 1) * per_rank, micro):
        yield sequences('train', offsets[at:at + micro])


# ----------------------------------------------------------------------------- learning rate

def lr_at(step, s=settings):
    """Linear warm-up over the first share `warmup` of the steps, then a cosine down to min_lr.

    The peak is used twice, in the last step of the rise and in the first of the fall.
    """
    peak, low, steps = s['learning_rate'], s['min_lr'], s['max_steps']
    rise = int(s['warmup'] * steps + 0.5)  # half a step is one
    if step < rise:
        return peak * (step + 1) / rise
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ----------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate():
    """Validation -> mean loss in nats per token; modules per token and step, of attention, of
    feed-forward.

    The sequences are evenly spread over val.bin and never drawn at random: no evaluation changes a
    training step. The loss is the mean over all of their tokens, however many the processes.
    Returns None if a signal interrupts it, as the sender may not wait; resuming evaluates again.
    """
    picked = dict.fromkeys('AF', 0)  # modules, SKIP is none
    asked = dict.fromkeys('AF', 0)   # tokens that they were picked for
    room = (meta['val_tokens'] - 1) // block_size
    n = max(1, min(room, eval_tokens // block_size))
    mine = (np.arange(n) * room // n * block_size)[rank::world]
    loss_sum = 0.0
    raw.eval()  # MoD chooses its tokens without looking at the future
    # Equally often in every process: all must join to gather sharded weights.
    for at in range(0, -(-n // world), micro):
        now = mine[at:at + micro]
        if common.all_sum(device, stop)[0] if fsdp else stop or not len(now):
            break
        x, y = sequences('val', now if len(now) else [0])
        with autocast:
            x, decisions = raw.features(x)
            loss = raw.loss(x, y).item() * y.numel()
        if not len(now):
            break  # this process had nothing to do but to take part
        loss_sum += loss
        for decision in itertools.chain(*decisions):
            # MoD's router, of kind T, sends a token through both or neither.
            for of in 'AF' if decision.kind == 'T' else decision.kind:
                picked[of] += (decision.ids < decision.N).sum().item()
                asked[of] += len(decision.ids)
    raw.train()
    stopping, loss_sum, a, f, a_of, f_of = common.all_sum(
        device, stop, loss_sum, *picked.values(), *asked.values())
    if stopping:
        return None
    return loss_sum / (n * block_size), a / a_of if a_of else 1.0, f / f_of if f_of else 1.0


# ----------------------------------------------------------------------------- checkpoints

def whole(tree):
    """A dict with its sharded tensors put together in the first process. All have to call this."""
    def gather(t):
        full = t.full_tensor() if isinstance(t, DTensor) else t
        return full.cpu() if is_main and full is not t else t
    return tree_map(gather, tree)


def not_written(path, error):
    if isinstance(error.__context__, OSError):  # what lies behind torch's message
        error = error.__context__
    free = f'{shutil.disk_usage(out_dir).free:,} bytes are free without it'
    return ValueError(f'{path} could not be written ({error}; {free}). The checkpoint of step '
                      f'{saved_step} in {out_dir} is untouched: make room, then go on with {go_on}')


def save():
    """Write last.pt whole or not at all; if its validation loss is the best, best.pt is that file.

    Sharded weights and moments are put together: the number of processes does not show in it.
    """
    global saved_step
    weights, moments = whole(raw.state_dict()), whole(optimizer.state_dict())
    if not writes:
        return
    state = dict(model=weights, model_config=asdict(cfg), settings=settings, optimizer=moments,
                 scaler=scaler.state_dict(), step=step, val_loss=val_loss, val_step=val_step,
                 best_loss=best_loss, flops=flops, meta=meta, rng=torch.get_rng_state(),
                 torch=str(torch.__version__), launch=launch)
    try:
        with open(log_path, 'a') as f:
            os.fsync(f.fileno())  # the log reaches the disk before the checkpoint does
        with common.atomic_write(last_pt) as f:
            torch.save(state, f)
        if val_step == step and val_loss == best_loss:
            common.link(last_pt, best_pt)
    except (OSError, RuntimeError) as error:
        raise not_written(last_pt, error) from error
    saved_step = step


launcher = ['torchrun', f'--nproc_per_node={world}'] if world > 1 else ['python']
go_on = common.command(*launcher, 'train.py', f'--out_dir={out_dir}', '--init_from=resume')
val_loss, val_step, best_loss, saved_step = math.inf, -1, math.inf, 'none'
flops = raw.flops_per_token(block_size, merged=True)  # with all K modules, till it is measured
if checkpoint:
    moments = checkpoint['optimizer']
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    for i, p in enumerate(parameters):
        its = moments['state'].get(i, {})  # empty before the first step
        if any(t.shape not in ((), p.shape) for t in its.values()):
            raise ValueError(f'{last_pt} has moments of another model in its optimizer: go on with '
                             'another checkpoint')
        if isinstance(p, DTensor):
            its.update({k: distribute_tensor(t.to(device), p.device_mesh, p.placements)
                        for k, t in its.items() if t.shape == p.shape})
    optimizer.load_state_dict(moments)
    for group, now in zip(optimizer.param_groups, raw.param_groups(weight_decay)):  # this command's
        group.update(weight_decay=now['weight_decay'], betas=(beta1, beta2))
    scaler.load_state_dict(checkpoint['scaler'])
    torch.set_rng_state(checkpoint['rng'])
    val_loss, val_step, best_loss = (checkpoint[k] for k in ('val_loss', 'val_step', 'best_loss'))
    saved_step, flops = step, checkpoint.get('flops', flops)
    need(not max_steps or checkpoint['meta'].get('train_sha256') == meta['train_sha256'],
         f'{data_dir} is not the data that the run in {out_dir} was trained on (train.bin differs)')
    if writes and val_step == step and val_loss == best_loss:
        common.link(last_pt, best_pt)  # a kill between the two leaves an older best.pt
    checkpoint = moments = None  # frees the memory

# ----------------------------------------------------------------------------- log

COLUMNS = ['step', 'loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s',
           'val_loss', 'val_bits_per_byte', 'k_a', 'k_f']
if writes:
    common.lock_folder(common.results_folder(out_dir))
    kept = []
    if resumed and os.path.exists(log_path):  # steps after the checkpoint are done again
        with open(log_path, newline='', errors='replace') as f:
            lines = common.whole_lines(f)
        for row in csv.reader(lines):
            if len(row) == len(COLUMNS) and row[0].isdigit():
                measured = row[COLUMNS.index('val_loss')]
                if int(row[0]) <= (val_step if measured else step):
                    kept.append(row)
    if not resumed:
        for path in (last_pt, best_pt):  # what another run left is not to be taken for this one's
            if os.path.exists(path):
                os.unlink(path)
    try:
        common.write_text(log_path, ''.join(','.join(row) + '\n' for row in [COLUMNS, *kept]))
        common.write_text(f'{out_dir}/settings.json', json.dumps(settings, indent=1) + '\n')
    except OSError as error:
        raise not_written(log_path, error) from error
send, end_tracking = common.tracker(track if writes else '', out_dir, settings, step)


def log(step, **row):
    if not writes:
        return
    try:
        with open(log_path, 'a', newline='') as f:
            csv.DictWriter(f, COLUMNS).writerow({'step': step, **row})
    except OSError as error:
        raise not_written(log_path, error) from error
    send(step, row)


n_params, n_router = raw.num_params()
say(common.changed(settings))
say(f'{n_params:,} parameters, {n_router:,} of them in routers; {cfg.n_layer} layers of modules, '
    f'depth {cfg.depth}')
idle = overrides.keys() - {'chunks', 'n_embd', 'n_head', 'block_size'} if cfg.vanilla else ()
if idle:
    say(f'without effect, as every chunk has one layer: {", ".join(sorted(idle))}')
say(f'weights at step {step}: SHA-256 {sha256}')
card = torch.cuda.get_device_name(device) if kind == 'cuda' else device
say(f'{card} x {world}, {dtype}; a step is {batch_size} sequences = {batch_size * block_size:,} '
    f'tokens, in {per_rank // micro} forward passes of {micro} sequences per process')
if fsdp:
    mine = sum(p.to_local().numel() for p in raw.parameters())
    say(f'sharded: {mine:,} parameters per process')
if resumed and 0 < step < max_steps and lr_at(step, before) != lr_at(step):
    say(f'the learning rate jumps: {lr_at(step - 1, before):.2e} at step {step}, '
        f'{lr_at(step):.2e} at step {step + 1}, since max_steps or another setting of its curve '
        'is not as before')

# ----------------------------------------------------------------------------- training

stop = False  # a signal lets the step finish, then the run is saved


def ask_to_stop(signum, frame):
    global stop
    stop = True


signal.signal(signal.SIGTERM, ask_to_stop)
signal.signal(signal.SIGINT, ask_to_stop)
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # by nohup
    signal.signal(signal.SIGHUP, ask_to_stop)

peak = common.peak_flops(device) if dtype != 'float32' else None
times, started, first_step, skipped, stopping = [], time.time(), step, 0, False
if not max_steps:
    val_step = -1

while not stopping:
    if (step % eval_every == 0 or step >= max_steps) and val_step != step:
        measured = evaluate()
        if measured is None:
            stopping = True
            continue
        val_loss, k_a, k_f = measured
        val_step, best_loss = step, min(best_loss, val_loss)
        bits_per_byte = val_loss / math.log(2) * meta['val_tokens'] / meta['val_bytes']
        if cfg.phi != 'mod':  # its training takes `capacity` of the tokens, whatever is predicted
            flops = raw.flops_per_token(block_size, k_a, k_f, merged=True)  # SKIP is no work
        log(step, val_loss=val_loss, val_bits_per_byte=bits_per_byte, k_a=k_a, k_f=k_f)
        perplexity = math.exp(val_loss) if val_loss < 700 else math.inf
        say(f'{step}/{max_steps} | val loss {val_loss:.4f} | perplexity {perplexity:.2f} | '
            f'bits per byte {bits_per_byte:.4f}'
            + (f' | modules per token {k_a:.2f} MHA, {k_f:.2f} FFN' if n_router else ''))
        save()
    if step >= max_steps:
        break

    began = time.perf_counter()
    for group in optimizer.param_groups:  # each gets this rate, and loses its own
        group['lr'] = lr_at(step)
    loss_sum = torch.zeros((), device=device)
    for i, (x, y) in enumerate(train_batches(step)):
        last_micro = (i + 1) * micro == per_rank  # gradients are reduced once a step
        if fsdp:
            model.set_requires_gradient_sync(last_micro)
        with nullcontext() if world == 1 or fsdp or last_micro else model.no_sync():
            with autocast:
                loss = model(x, y, want_logits=False)[1] * micro / per_rank
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), grad_clip or math.inf)
    grad_norm = (norm.full_tensor() if fsdp else norm).item()
    loss, stopping = common.all_sum(device, loss_sum.item() / world, stop)
    skipped = skipped + 1 if not math.isfinite(grad_norm) else 0
    # In fp16 the scaler skips such a step, and halves.
    if not math.isfinite(loss) or skipped > 20 * (dtype == 'float16'):
        offsets = ', '.join(map(str, batch_offsets(step)[:8])) + ', ...' * (batch_size > 8)
        raise ValueError(
            f'step {step + 1}: loss {loss}, gradient norm {grad_norm}. Training stops before the '
            f'update. The batch is train_batches({step}) of seed={seed}: the sequences at tokens '
            f'{offsets} of {data_dir}/train.bin. The last good checkpoint is {last_pt}, of step '
            f'{saved_step}')
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step += 1

    seconds = time.perf_counter() - began
    times = times[-49:] + [seconds]
    rate = batch_size * block_size / seconds
    log(step, loss=loss, lr=lr_at(step - 1), grad_norm=grad_norm, ms=round(1000 * seconds, 1),
        tokens_per_s=round(rate))
    if step % log_every == 0 or step == max_steps:
        mfu = f'MFU {3 * flops * rate / (peak * world):.1%} | ' if peak else ''
        left = common.clock((max_steps - step) * sorted(times)[len(times) // 2])
        say(f'{step}/{max_steps} | loss {loss:.4f} | lr {lr_at(step - 1):.2e} | grad norm '
            f'{grad_norm:.2f} | {1000 * seconds:.0f} ms | {rate:,.0f} tok/s | {mfu}ETA {left}')

if stopping and not max_steps:
    say('stopped. Nothing is written.')
elif stopping:
    save()
    say(f'stopped after step {step}, saved. Go on with: {go_on}')
end_tracking()
memory = common.peak_memory(device)
say(f'{step - first_step} steps in {common.clock(time.time() - started)}; best validation loss '
    f'{best_loss:.4f}'
    + (f'; peak memory {memory / 2**30:.2f} GiB' if memory else '')
    + (' per process' if memory and world > 1 else ''))
if world > 1:
    common.leave_processes()
