"""Train GPT-2, or the Mixture-of-Modules that its layers become: both phases, one flat script.

  python train.py config/gpt2_demo.py                                  one process, on a GPU or the CPU
  torchrun --nproc_per_node=8 train.py config/mom_medium_k2h6s.py      one process per GPU (NCCL)
  torchrun --nproc_per_node=2 train.py config/mom_demo.py              several processes on the CPU (gloo)
  torchrun --nproc_per_node=8 train.py config/mom_large_k2h6s.py --fsdp=True    weights sharded over the GPUs
  python train.py --out_dir=out/mom_demo --init_from=resume            go on where that run stopped

The defaults are the paper's recipe (section 4.1). Any setting: in a config file, or as --key=value.
Settings of the model are the fields of MoMConfig (model.py), except vocab_size, which comes from the
data. Of weights that are loaded, what is not given stays as it is.
"""
import csv
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, fields

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import common
from model import GPT, MoMConfig, has_grouped_mm
from weights import load_checkpoint, regroup

# --- run
out_dir = 'out/run'                  # checkpoints last.pt and best.pt, and log.csv
data_dir = 'data/openwebtext_gpt2'   # train.bin, val.bin and meta.json, made by prepare.py
init_from = 'scratch'                # 'scratch', 'resume', a GPT-2 name, a Hugging Face directory, our checkpoint
overwrite = False                    # start anew in an out_dir that holds a run
seed = 1337                          # of the weights and of the data order; phase two takes another one
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
compile = False                      # torch.compile: the whole model; on the CPU a MoM's vanilla chunks only
fsdp = False                         # shard weights, gradients and optimizer over the processes (FSDP2)
checkpointing = False                # keep the chunks' inputs only and compute the rest again: less memory, slower
# ---
settings, given = common.load(globals(), model=MoMConfig, without=('vocab_size',))

# ----------------------------------------------------------------------------- settings, checked before anything long

checkpoint = None
last_pt, best_pt = os.path.join(out_dir, 'last.pt'), os.path.join(out_dir, 'best.pt')
restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0  # torchrun --max_restarts started us anew
launch = os.environ.get('TORCHELASTIC_RUN_ID', '')  # of torchrun; the same after a restart
if init_from == 'resume' or restarted and os.path.exists(last_pt):
    checkpoint = load_checkpoint(last_pt)
    if init_from != 'resume' and overwrite and checkpoint.get('launch') != launch:
        checkpoint = None  # it is the run that was to be overwritten: our first start did not come that far
if checkpoint:
    parts = dict(settings=dict, optimizer=dict, scaler=dict, step=int, val_loss=float, val_step=int, best_loss=float,
                 meta=dict, rng=torch.Tensor)
    if not (all(isinstance(checkpoint.get(k), kind) for k, kind in parts.items())
            and {'state', 'param_groups'} <= checkpoint['optimizer'].keys()):
        raise ValueError(f'{last_pt} holds weights, but no training to resume: begin one with --init_from={last_pt}')
    # What this command line does not say is as it was. So `--out_dir=... --init_from=resume` is enough.
    was = {k: v for k, v in checkpoint['settings'].items()
           if k in settings and k != 'out_dir' and (k not in given or k == 'init_from')}  # a folder may have moved
    settings.update(was)
    globals().update((k, v) for k, v in was.items() if k in globals())
elif (os.path.exists(last_pt) or os.path.exists(best_pt)) and not overwrite:
    raise ValueError(f'{out_dir} holds a run: go on with it (--init_from=resume), take another --out_dir, '
                     'or lose it (--overwrite=True)')

resumed = checkpoint is not None
rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
for key in ('max_steps', 'batch_size', 'micro_batch', 'block_size', 'eval_every', 'eval_tokens', 'log_every'):
    if settings[key] < 1:
        raise ValueError(f'{key}={settings[key]} must be at least 1')
if batch_size % world or (batch_size // world) % min(micro_batch, batch_size // world):
    raise ValueError(f'batch_size={batch_size} must be a multiple of {world} processes x micro_batch={micro_batch}')
for key in ('seed', 'learning_rate', 'min_lr', 'weight_decay', 'grad_clip'):
    if settings[key] < 0:
        raise ValueError(f'{key}={settings[key]} must be at least 0')
for key in ('beta1', 'beta2'):
    if not 0 <= settings[key] < 1:
        raise ValueError(f'{key}={settings[key]} must be at least 0 and below 1')
if not 0 <= warmup < 1:
    raise ValueError(f'warmup={warmup} is a share of the steps: 0 <= warmup < 1')
device = common.find_device(device)
if dtype not in ('auto', 'bfloat16', 'float16', 'float32'):
    raise ValueError(f"dtype={dtype!r} must be 'auto', 'bfloat16', 'float16' or 'float32'")
dtype = ('bfloat16' if device.startswith('cuda') else 'float32') if dtype == 'auto' else dtype
if fsdp and (world == 1 or compile or dtype == 'float16'):
    raise ValueError('fsdp=True shards over several processes (torchrun), and goes with neither compile=True nor '
                     'dtype=float16: change that, or take --fsdp=False')
per_rank = batch_size // world
micro = min(micro_batch, per_rank)  # sequences of one forward pass

# ----------------------------------------------------------------------------- data

def read_meta():
    """meta.json of data_dir, with train.bin and val.bin checked against it. Raises ValueError with the fix."""
    path = os.path.join(data_dir, 'meta.json')
    if not os.path.isfile(path):
        raise ValueError(f'no data in {data_dir} (no meta.json): make it with python prepare.py --out_dir={data_dir}')
    again = f'make it again with python prepare.py --out_dir={data_dir}'
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        if meta.pop('seal', None) != common.seal(meta):
            raise ValueError('it was changed')
    except (ValueError, AttributeError, TypeError) as error:  # not JSON, not UTF-8, no object
        raise ValueError(f'{path} is not one of prepare.py ({type(error).__name__}: {error}): {again}') from error
    for split in ('train', 'val'):
        path = os.path.join(data_dir, f'{split}.bin')
        if not os.path.isfile(path):
            raise ValueError(f'{path} is missing: {again}')
        want = meta[f'{split}_tokens']
        if os.path.getsize(path) != 2 * want:
            raise ValueError(f'{path} has {os.path.getsize(path):,} bytes, but meta.json counts {want:,} tokens of 2 '
                             f'bytes: it is truncated or another file; {again}')
        if int(os.environ.get('LOCAL_RANK', 0)) > 0:
            continue  # one process of a machine reads it all: seconds for OpenWebText
        digest = hashlib.sha256()
        with open(path, 'rb') as f:
            while piece := f.read(1 << 25):
                digest.update(piece)
                largest = np.frombuffer(piece, '<u2').max()
                if largest >= meta['vocab_size']:
                    raise ValueError(f'{path} holds token id {largest}, but vocab_size is {meta["vocab_size"]}: '
                                     f'{again}')
        if digest.hexdigest() != meta[f'{split}_sha256']:
            raise ValueError(f'{path} is not the file that prepare.py wrote (its SHA-256 is not that of meta.json): '
                             f'{again}')
    return meta


def sequences(split, offsets):
    """Sequences of `split` that start at `offsets` -> inputs and targets, each (len(offsets), block_size) int64."""
    tokens = np.memmap(os.path.join(data_dir, f'{split}.bin'), dtype='<u2', mode='r')  # reopened: else its RSS grows
    rows = np.stack([tokens[o:o + block_size + 1] for o in offsets]).astype(np.int64)
    rows = torch.from_numpy(rows)
    if device != 'cpu':
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def batch_offsets(step):
    """Where in train.bin the sequences of a step start: a function of (seed, step) alone. It does not depend on the
    number of ranks, so a run can resume on more or fewer of them in the same order."""
    return np.random.default_rng([seed, step]).integers(0, meta['train_tokens'] - block_size, size=batch_size)


def train_batches(step):
    """This rank's micro-batches of a step."""
    offsets = batch_offsets(step)
    for at in range(rank * per_rank, (rank + 1) * per_rank, micro):
        yield sequences('train', offsets[at:at + micro])


meta = read_meta()

# ----------------------------------------------------------------------------- processes

if world > 1:
    device = common.join_processes(device)
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
autocast = torch.autocast(device.split(':')[0], getattr(torch, dtype)) if dtype != 'float32' else nullcontext()
scaler = torch.amp.GradScaler(device.split(':')[0], enabled=dtype == 'float16')

# ----------------------------------------------------------------------------- model

model_keys = [f.name for f in fields(MoMConfig) if f.name in settings]
overrides = {k: settings[k] for k in model_keys if k in given}  # only what was asked for may differ from loaded weights
if checkpoint:
    wanted = {**checkpoint['model_config'], **overrides}
    for key, value in checkpoint['model_config'].items():
        if wanted[key] != value:
            raise ValueError(f'{key}={wanted[key]!r}, but the run in {out_dir} has {value!r}: leave it out to resume')
    raw = GPT(MoMConfig(**wanted))
    raw.load_state_dict(regroup(checkpoint['model'], raw, False, last_pt))
elif init_from == 'scratch':
    raw = GPT(MoMConfig(**{k: settings[k] for k in model_keys}, vocab_size=meta['vocab_size']))
else:
    raw = GPT.from_pretrained(init_from, **overrides)
cfg = raw.cfg
settings.update({k: getattr(cfg, k) for k in model_keys})  # what is printed and saved is what was resolved
block_size = cfg.block_size

for split in ('train', 'val'):
    if meta[f'{split}_tokens'] <= block_size:
        raise ValueError(f'{data_dir}/{split}.bin has {meta[f"{split}_tokens"]:,} tokens, not one sequence of '
                         f'block_size={block_size} and its target: take a shorter block_size or more text')
if not meta['vocab_size'] <= cfg.vocab_size < meta['vocab_size'] + 128:  # some vocabularies are padded a little
    raise ValueError(f'{data_dir} has {meta["vocab_size"]} kinds of token, the weights know {cfg.vocab_size}: '
                     'prepare the text with the tokenizer of the weights')
weights_sha256 = raw.fingerprint() if is_main else ''
raw.to(device)
model = raw
raw.checkpointing = checkpointing
if compile and (cfg.vanilla or dtype == 'bfloat16' and has_grouped_mm(torch.device(device), cfg.n_embd)):
    model = torch.compile(raw)
elif compile:  # without F.grouped_mm the sizes inside a routed chunk change with every batch: it stays eager
    for chunk in raw.chunks:
        if chunk.phi in ('vanilla', 'share'):
            chunk.compile()
if fsdp:  # each chunk is gathered when it runs; every tensor is cut along its longest side that can be cut evenly
    def placement(p):
        return Shard(max((d for d in range(p.ndim) if p.size(d) % world == 0), key=p.size, default=0))
    mesh = init_device_mesh(device.split(':')[0], (world,))
    for part in (*raw.chunks, raw):
        fully_shard(part, mesh=mesh, shard_placement_fn=placement)
    register_fsdp_forward_method(raw, 'features')  # evaluation calls it
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view')  # nothing is done in place on it
elif world > 1:
    model = DistributedDataParallel(model, device_ids=None if device == 'cpu' else [device])
optimizer = torch.optim.AdamW(raw.param_groups(weight_decay), lr=learning_rate, betas=(beta1, beta2), fused=True)

# ----------------------------------------------------------------------------- learning rate, evaluation, checkpoints

def lr_at(step):
    """Linear warm-up over the first share `warmup` of the steps, then a cosine down to min_lr."""
    rise = round(warmup * max_steps)
    if step < rise:
        return learning_rate * (step + 1) / rise
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - rise) / (max_steps - rise)))


@torch.no_grad()
def evaluate():
    """Validation on all ranks -> (mean loss in nats per token, modules per token and step: attention, feed-forward).

    The sequences are evenly spread over val.bin and never drawn at random: no evaluation changes a training step,
    and the loss is the mean over all of their tokens, whatever the number of ranks. None if a signal interrupts it:
    it may take longer than who sent the signal waits, and is done again after resuming.
    """
    picks = dict.fromkeys(('A', 'A of', 'F', 'F of'), 0)  # real modules (SKIP is none), and tokens they were picked for
    room = (meta['val_tokens'] - 1) // block_size
    n = max(1, min(room, eval_tokens // block_size))
    mine = (np.arange(n) * room // n * block_size)[rank::world]
    loss_sum = 0.0
    raw.eval()  # MoD chooses its tokens without looking at the future
    for at in range(0, -(-n // world), micro):  # as often on every rank: sharded weights are gathered by all together
        now = mine[at:at + micro]
        if all_sum(float(stop))[0] if fsdp else (stop or not len(now)):
            break
        x, y = sequences('val', now if len(now) else [0])
        with autocast:
            x, decisions = raw.features(x)
            loss = raw.loss(x, y).item() * y.numel()
        if not len(now):
            break  # this rank had nothing to do but to take part
        loss_sum += loss
        for decision in itertools.chain(*decisions):
            for kind in 'AF' if decision.kind == 'T' else decision.kind:  # MoD sends a token through both or neither
                picks[kind] += (decision.ids < decision.N).sum().item()
                picks[f'{kind} of'] += len(decision.ids)
    raw.train()
    stopping, loss_sum, a, a_of, f, f_of = all_sum(float(stop), loss_sum, *picks.values())
    if stopping:
        return None
    return loss_sum / (n * block_size), a / a_of if a_of else 1.0, f / f_of if f_of else 1.0


def whole(tree):
    """A dict with its sharded tensors put together, on the CPU of the first rank. Every rank has to call this."""
    def gather(t):
        full = t.full_tensor() if isinstance(t, DTensor) else t
        return full.cpu() if is_main and full is not t else t
    return tree_map(gather, tree)


def not_written(path, error):
    error = error.__context__ if isinstance(error.__context__, OSError) else error  # what lies behind torch's message
    free = f'{shutil.disk_usage(out_dir).free:,} bytes are free without it'
    return ValueError(f'{path} could not be written ({error}; {free}). The checkpoint of step {saved_step} in '
                      f'{out_dir} is untouched: make room, then go on with --out_dir={out_dir} --init_from=resume')


def save():
    """Write last.pt whole or not at all; if this is the best validation loss so far, best.pt becomes the same file.
    Sharded weights and moments are put together: the file is the same however many processes wrote it, and how."""
    global saved_step
    weights, moments = whole(raw.state_dict()), whole(optimizer.state_dict())
    if not is_main:
        return
    state = dict(model=weights, model_config=asdict(cfg), settings=settings, optimizer=moments,
                 scaler=scaler.state_dict(), step=step, val_loss=val_loss, val_step=val_step, best_loss=best_loss,
                 meta=meta, rng=torch.get_rng_state(), torch=str(torch.__version__), launch=launch)
    try:
        with open(log_path, 'a') as f:
            os.fsync(f.fileno())  # the log reaches the disk before the checkpoint does
        with common.atomic_write(last_pt) as f:
            torch.save(state, f)
        if val_step == step and val_loss == best_loss:
            keep_best()
    except (OSError, RuntimeError) as error:
        raise not_written(last_pt, error) from error
    saved_step = step


def keep_best():
    """best.pt becomes the file that last.pt is."""
    part = best_pt + '.part'
    if os.path.exists(part):  # a kill in this place left it
        os.unlink(part)
    if os.path.exists(best_pt) and os.path.samefile(last_pt, best_pt):
        return
    try:  # a hard link costs nothing; some file systems have none
        os.link(last_pt, part)
    except OSError:
        shutil.copyfile(last_pt, part)
    os.replace(part, best_pt)


step, val_loss, val_step, best_loss, saved_step = 0, math.inf, -1, math.inf, 'none'
if checkpoint:
    moments = checkpoint['optimizer']
    for i, p in enumerate(p for group in optimizer.param_groups for p in group['params']):
        its = moments['state'].get(i, {})  # empty before the first step
        if any(t.shape not in ((), p.shape) for t in its.values()):
            raise ValueError(f'{last_pt} has moments of another model in its optimizer: go on with another checkpoint')
        if isinstance(p, DTensor):
            its.update({k: distribute_tensor(t.to(device), p.device_mesh, p.placements)
                        for k, t in its.items() if t.shape == p.shape})
    optimizer.load_state_dict(moments)
    for group, now in zip(optimizer.param_groups, raw.param_groups(weight_decay)):
        group.update(weight_decay=now['weight_decay'], betas=(beta1, beta2))  # this command's, not the checkpoint's
    scaler.load_state_dict(checkpoint['scaler'])
    torch.set_rng_state(checkpoint['rng'])
    step, val_loss, val_step, best_loss = (checkpoint[k] for k in ('step', 'val_loss', 'val_step', 'best_loss'))
    saved_step = step
    if checkpoint['meta']['train_sha256'] != meta['train_sha256']:
        raise ValueError(f'{data_dir} is not the data that the run in {out_dir} was trained on (train.bin differs)')
    if is_main and val_step == step and val_loss == best_loss:
        keep_best()  # a kill between the two files leaves an older best.pt
    checkpoint = moments = None  # frees the memory

# ----------------------------------------------------------------------------- log

COLUMNS = ['step', 'loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s', 'val_loss', 'val_bits_per_byte', 'k_a', 'k_f']
log_path = os.path.join(out_dir, 'log.csv')
if is_main:
    os.makedirs(out_dir, exist_ok=True)
    kept = []
    if resumed and os.path.exists(log_path):  # steps after the checkpoint are done again
        with open(log_path, newline='', errors='replace') as f:
            rows = csv.reader(line for line in f if line.endswith('\n'))  # a kill can leave half of the last one
            kept = [row for row in rows if len(row) == len(COLUMNS) and row[0].isdigit()
                    and int(row[0]) <= (val_step if row[COLUMNS.index('val_loss')] else step)]
    if not resumed:
        for path in (last_pt, best_pt):  # overwrite=True: what another run left is not to be taken for this one's
            if os.path.exists(path):
                os.unlink(path)
    try:
        with common.atomic_write(log_path) as f:
            f.write('\n'.join(','.join(row) for row in [COLUMNS, *kept]).encode() + b'\n')
    except OSError as error:
        raise not_written(log_path, error) from error


def log(**row):
    if is_main:
        try:
            with open(log_path, 'a', newline='') as f:
                csv.DictWriter(f, COLUMNS).writerow(row)
        except OSError as error:
            raise not_written(log_path, error) from error


def peak_flops():
    """Dense bf16 FLOP/s of this GPU by its data sheet, or None if it is not listed."""
    name = torch.cuda.get_device_name() if device != 'cpu' else ''
    return next((tflops * 1e12 for gpu, tflops in {'A100': 312, 'H100': 989, 'H200': 989}.items() if gpu in name), None)


def clock(seconds):
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


n_params, n_router = raw.num_params()
say('\n'.join(f'{k} = {v!r}' for k, v in settings.items()))
say(f'weights at step {step}: SHA-256 {weights_sha256}')
say(f'\n{n_params:,} parameters, {n_router:,} of them in routers; {cfg.n_layer} layers of modules, depth {cfg.depth}')
say(f'{device} x {world}, {dtype}; a step is {batch_size} sequences = {batch_size * block_size:,} tokens, '
    f'in {per_rank // micro} forward passes of {micro} sequences per process')
if fsdp:
    say(f'sharded: {sum(p.to_local().numel() for p in raw.parameters()):,} parameters per process')

# ----------------------------------------------------------------------------- training

stop = False  # SIGTERM and Ctrl-C let the step finish, then save


def ask_to_stop(signum, frame):
    global stop
    stop = True


signal.signal(signal.SIGTERM, ask_to_stop)
signal.signal(signal.SIGINT, ask_to_stop)
flops, peak, bits_per_byte = raw.flops_per_token(block_size, merged=True), peak_flops(), None
times, started, first_step, skipped, stopping = [], time.time(), step, 0, False

while not stopping:
    if (step % eval_every == 0 or step == max_steps) and val_step != step:
        measured = evaluate()
        if measured is None:
            stopping = True
            continue
        val_loss, k_a, k_f = measured
        val_step, best_loss = step, min(best_loss, val_loss)
        bits_per_byte = val_loss / math.log(2) * meta['val_tokens'] / meta['val_bytes']
        if cfg.phi != 'mod':  # whose training takes `capacity` of the tokens, whatever its predictor says
            flops = raw.flops_per_token(block_size, k_a, k_f, merged=True)  # what SKIP and merging save is no work done
        log(step=step, val_loss=val_loss, val_bits_per_byte=bits_per_byte, k_a=k_a, k_f=k_f)
        say(f'{step}/{max_steps} | val loss {val_loss:.4f} | perplexity {math.exp(val_loss):.2f} | bits per byte '
            f'{bits_per_byte:.4f}' + (f' | modules per token {k_a:.2f} MHA, {k_f:.2f} FFN' if n_router else ''))
        save()
    if step >= max_steps:
        break

    began = time.perf_counter()
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step)
    loss_sum = torch.zeros((), device=device)
    for i, (x, y) in enumerate(train_batches(step)):
        last_micro = (i + 1) * micro == per_rank
        if fsdp:
            model.set_requires_gradient_sync(last_micro)  # gradients are reduced once a step
        with nullcontext() if world == 1 or fsdp or last_micro else model.no_sync():
            with autocast:
                loss = model(x, y, want_logits=False)[1] * micro / per_rank
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(raw.parameters(), grad_clip or math.inf)
    grad_norm = (norm.full_tensor() if fsdp else norm).item()
    loss, stopping = all_sum(loss_sum.item() / world, float(stop))
    skipped = skipped + 1 if not math.isfinite(grad_norm) else 0
    if not math.isfinite(loss) or skipped > 20 * (dtype == 'float16'):  # in fp16 the scaler skips a step, and halves
        offsets = ', '.join(map(str, batch_offsets(step)[:8]))
        raise ValueError(f'step {step + 1}: loss {loss}, gradient norm {grad_norm}. Training stops before the update. '
                         f'The batch is train_batches({step}) of seed={seed}: the sequences at tokens {offsets}'
                         f'{", ..." if batch_size > 8 else ""} of {data_dir}/train.bin. The last good checkpoint is '
                         f'{last_pt}, of step {saved_step}')
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    step += 1

    seconds = time.perf_counter() - began
    times = times[-49:] + [seconds]
    rate = batch_size * block_size / seconds
    log(step=step, loss=loss, lr=lr_at(step - 1), grad_norm=grad_norm, ms=round(1000 * seconds, 1),
        tokens_per_s=round(rate))
    if step % log_every == 0 or step == max_steps:
        mfu = f'{3 * flops * rate / (peak * world):.1%}' if peak else 'n/a'
        left = clock((max_steps - step) * sorted(times)[len(times) // 2])
        say(f'{step}/{max_steps} | loss {loss:.4f} | lr {lr_at(step - 1):.2e} | grad norm {grad_norm:.2f} | '
            f'{1000 * seconds:.0f} ms | {rate:,.0f} tok/s | MFU {mfu} | ETA {left}')

if stopping:
    save()
    python = f'torchrun --nproc_per_node={world}' if world > 1 else 'python'
    say(f'stopped after step {step}, saved. Go on with: {python} train.py --out_dir={out_dir} --init_from=resume')
memory = (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if device == 'cpu'
          else torch.cuda.max_memory_allocated())
say(f'{step - first_step} steps in {clock(time.time() - started)}; best validation loss {best_loss:.4f}; '
    f'peak memory {memory / 2**30:.2f} GiB' + (' per process' if world > 1 else ''))
if world > 1:
    common.leave_processes()
