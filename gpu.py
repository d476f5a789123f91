"""Everything that only a GPU can show, in one command and within a budget of minutes.

  make gpu BUDGET=25                        the same as: python gpu.py --budget=25
  python gpu.py --only=values,tf32          some of the parts
  torchrun --nproc_per_node=1 gpu.py        the part `nccl` by itself, on one GPU or on several

The parts are in the order of what they are worth. Each runs as commands of its own, with a limit of
time, so that one that fails, hangs or runs out of memory costs no other. After each command the
results are written to out_dir: report.md and report.json, and all that a command printed as
NUMBER_PART.txt. The last part takes what is left of the budget; the same command later goes on with
its trainings. Without a GPU it says so, and that is all.
"""
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time

import torch

import common
from model import GPT, MoMConfig

# --- what
budget = 25.0        # minutes in all
only = ''            # which parts, by name, separated by commas; '' is all
out_dir = 'out/gpu'  # report.md, report.json, and what the commands printed
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not imported

MODELS = {'GPT-2': 'gpt2_{}', 'MoM_P': 'mom_{}_k2h6s', 'MoM_I': 'mom_{}_k3h2s',
          'MoM_E': 'mom_{}_k3h1s'}
# GiB of one process at the micro_batch of its config file: small, medium, large. From a dry run,
# in which torch's own allocator hands out memory and nothing is computed (tests/dry_gpu.py).
PREDICTED = {'GPT-2': (12.6, 18.9, 23.5), 'MoM_P': (21.3, 29.2, 35.3),
             'MoM_I': (11.5, 17.2, 22.7), 'MoM_E': (7.8, 12.5, 17.8)}
SIZES = ('small', 'medium', 'large')
STOPPING = 60  # seconds that a command has to end when it is asked to


def config(model, size):
    return f'config/{MODELS[model].format(size)}.py'


def bench(*words):
    return ['bench.py', *words, '--device=cuda']


def training(*words):
    """A training step of every model and size, in bf16."""
    return [bench('train', config(model, size), *words) for size in SIZES for model in MODELS]


def parts():
    """[(name, what it shows, its minutes and those of one command if budget is 25, commands)]"""
    # -v: what is cut off shows what it has done.
    pytest = ['-m', 'pytest', '-v', '-rfE', '--tb=short', 'tests/test_gpu.py', '-k']
    torchrun = ['-m', 'torch.distributed.run', '--standalone',
                f'--nproc_per_node={max(1, torch.cuda.device_count())}']
    decoding = ['decode', '--prompt=32', '--new=64']
    return [
        ('values', 'what a GPU computes against the CPU', 4, 4, [[*pytest, 'not compiles']]),
        ('speed', 'training steps in bf16', 6, 2, training()),
        ('routing', 'a routed step, of few and of many tokens, against dense products', 2, 1,
         [bench('route'), bench('route', '--tokens=65536')]),
        ('decoding', 'text with a cache', 3, 1.5, [
            bench(*decoding, config('GPT-2', 'small'), '--compare=hf'),
            *(bench(*decoding, config(model, 'small')) for model in ('MoM_P', 'MoM_E'))]),
        ('tf32', 'what routers in fp32 cost beside TF32, and whose routes TF32 changes', 2, 1, [
            bench('tf32', config('MoM_P', size)) for size in ('medium', 'small')]),
        ('nccl', 'sums and gradients by NCCL under torchrun', 1.5, 1.5, [[*torchrun, 'gpu.py']]),
        ('peers', 'beside transformers, and MoM_E beside GPT-2', 2, 1, [
            bench('train', config('GPT-2', 'small'), '--compare=hf'),
            bench('forward', config('MoM_E', 'small'))]),
        ('compiled', 'training steps in bf16 with torch.compile', 8, 3, training('--compile=True')),
        ('graphs', 'that every system compiles to one graph', 3, 3, [[*pytest, 'compiles']]),
        ('reproduce', "cells of the paper's tables; see reproduce/results.md here", 25, 25, [
            ['reproduce.py', '--scale=gpu', '--device=cuda',
             f'--out_dir={os.path.abspath(out_dir)}/reproduce']])]


# ----------------------------------------------------------------------------- one command

def run(words, path, limit):
    """`python words...` for at most `limit` seconds, its output into the file `path` -> a record.

    Its status is 'done', 'failed' or 'out of time'; its result the JSON of its last line, or None.
    """
    started = time.monotonic()
    with open(path, 'wb') as output:
        # in a process group of its own: what it has started can be ended with it
        process = subprocess.Popen([sys.executable, *words], cwd=common.ROOT, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = 'failed' if process.wait(limit) else 'done'
        except subprocess.TimeoutExpired:
            status = 'out of time'
        finally:
            end(process)
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = f.read().splitlines()
    result = None
    if status == 'done' and lines and lines[-1].startswith('{'):
        result = json.loads(lines.pop())
    return {'command': common.command('python', *words), 'status': status,
            'seconds': round(time.monotonic() - started, 1), 'result': result, 'printed': lines}


def end(process):
    """Ask a process to end (train.py and reproduce.py save then). Then end its process group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, AttributeError):  # all of it has ended; Windows has no groups
        process.kill()
    process.wait()


# ----------------------------------------------------------------------------- the report

def find_machine():
    """The card, its driver and the versions, as words."""
    card = torch.cuda.get_device_properties(0)
    words = {'card': torch.cuda.get_device_name(0), 'cards': torch.cuda.device_count(),
             'compute capability': f'{card.major}.{card.minor}',
             'memory, GiB': round(card.total_memory / 2**30, 1),
             'bf16 in hardware': card.major >= 8,
             'torch': str(torch.__version__), 'CUDA': torch.version.cuda,
             'cuDNN': torch.backends.cudnn.version(), 'python': platform.python_version(),
             'system': platform.platform()}
    if shutil.which('nvidia-smi'):
        asked = 'driver_version,power.limit,clocks.max.sm,clocks.max.mem'
        said = subprocess.run(['nvidia-smi', f'--query-gpu={asked}', '--format=csv,noheader'],
                              capture_output=True, text=True).stdout.splitlines()
        words |= dict(zip(asked.split(','), said[0].split(', '))) if said else {}
    return words


def memory_table(records):
    """Rows of tokens/s, MFU and memory, in `speed` and `compiled`, beside the memory predicted."""
    rows = []
    for model in MODELS:
        for size, predicted in zip(SIZES, PREDICTED[model]):
            row = {'model': model, 'size': size}
            for part in ('speed', 'compiled'):
                found = [record['result']['rows'][0] for record in records
                         if record['part'] == part and record['result']
                         and config(model, size) in record['command']]
                for key in ('tokens/s', 'MFU %', 'peak GiB'):
                    name = key if part == 'speed' else f'{key}, compiled'
                    row[name] = found[0][key] if found else None
            rows.append(row | {'predicted GiB': predicted})
    return rows


def as_markdown(rows):
    lines = ['| ' + ' | '.join(rows[0]) + ' |', '|' + '---|' * len(rows[0])]
    for row in rows:
        cells = ('n/a' if value is None else str(value) for value in row.values())
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def write_report(machine, records):
    """report.json and report.md of all that has been run so far."""
    memory = memory_table(records)
    everything = {'machine': machine, 'parts': records, 'memory': memory}
    common.write_text(os.path.join(out_dir, 'report.json'), json.dumps(everything, indent=1))
    facts = [{'what': key, 'is': value} for key, value in machine.items()]
    lines = ['# What a GPU shows', '', *as_markdown(facts)]
    summary = [{key: record[key] for key in ('part', 'command', 'status', 'seconds')}
               for record in records]
    lines += ['', '## Commands', '', *(as_markdown(summary) if summary else ['none yet'])]
    lines += ['', '## Training in bf16: tokens/s, MFU, memory', '',
              'The predicted memory is of a dry run without compilation; the driver takes more.',
              '', *as_markdown(memory)]
    for record in records:
        lines += ['', f'## {record["part"]}: {record["about"]}', '',
                  f'`{record["command"]}`: {record["status"]} after {record["seconds"]} s', '',
                  '```', *record['printed'][-40:], '```']
    common.write_text(os.path.join(out_dir, 'report.md'), '\n'.join(lines) + '\n')


# ----------------------------------------------------------------------------- NCCL

def nccl():
    """What a process of torchrun does here: a sum over all processes, and the gradients of DDP,
    which are those of one process, as all have the same tokens. Exits with an error if not."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    device = common.join_processes('cuda')
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.full((1 << 20,), rank + 1.0).to(device)
    dist.all_reduce(total)
    total = total.cpu()
    torch.manual_seed(1)
    cfg = MoMConfig('1-4-1', K=2, H=2, n_embd=64, n_head=2, block_size=64, vocab_size=50)
    model = GPT(cfg).to(device)
    idx = torch.randint(50, (4, 65), device=device)

    def gradients(of):
        model.zero_grad(set_to_none=True)
        of(idx[:, :-1], idx[:, 1:], want_logits=False)[1].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    alone = gradients(model)
    together = gradients(DistributedDataParallel(model, device_ids=[device]))
    apart = ((together - alone).norm() / alone.norm()).item()
    found = {'processes': world, 'NCCL': '.'.join(map(str, torch.cuda.nccl.version())),
             'sum': total.max().item(), "DDP's gradients differ by": apart}
    if rank == 0:
        print(json.dumps(found), flush=True)
    if total.min().item() != world * (world + 1) / 2 or not apart < 1e-4:
        sys.exit(f'NCCL gives something else: {found}')
    common.leave_processes()


# ----------------------------------------------------------------------------- all parts

def main():
    if not torch.cuda.is_available():
        print('No GPU here: this machine has none that torch can use, so there is nothing to show.')
        return
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        return nccl()
    known = [name for name, *_ in parts()]
    asked = only.split(',') if only else known
    for name in asked:
        if name not in known:
            raise ValueError(f'only={only!r}: {name!r} is none of {", ".join(known)}')
    if not budget > 0:
        raise ValueError(f'budget={budget} must be a number of minutes above 0')
    common.results_folder(out_dir)
    common.lock_folder(out_dir)
    common.if_stopped = f'What was found so far is in {out_dir}/report.md.'
    began, machine, records = time.monotonic(), find_machine(), []
    machine['started'] = time.strftime('%Y-%m-%d %H:%M')
    write_report(machine, records)
    print(', '.join(f'{key} {value}' for key, value in machine.items()), flush=True)
    for name, about, minutes, of_one, commands in parts():
        if name not in asked:
            continue
        part_ends = time.monotonic() + 60 * minutes * budget / 25
        for words in commands:
            now = time.monotonic()
            ends = min(part_ends, began + 60 * budget, now + 60 * of_one * budget / 25)
            path = os.path.join(out_dir, f'{len(records) + 1:02d}_{name}.txt')
            record = run(words, path, ends - now) if ends > now + 1 else {
                'command': common.command('python', *words), 'status': 'no time left', 'seconds': 0,
                'result': None, 'printed': []}
            records.append({'part': name, 'about': about} | record)
            write_report(machine, records)
            print(f'{name}: {record["command"]}: {record["status"]}, {record["seconds"]} s',
                  flush=True)
    print(f'{(time.monotonic() - began) / 60:.1f} minutes: {out_dir}/report.md')


if __name__ == '__main__':
    main()
