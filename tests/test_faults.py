"""Faults: what happens to long runs, done to short ones. For longer, by hand: kill.py, fuzz.py."""
import csv
import functools
import itertools
import os
import platform
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
import inputs
import model
import weights
from tests import fuzz, kill
from tests.test_train import ENV, SYSTEMS, command, last

BASE = [*kill.TINY, '--log_every=1', '--eval_every=4', '--max_steps=16', '--batch_size=8',
        '--micro_batch=2']
RESUME = ['--init_from=resume']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    kill.write_data(folder)
    return folder


def train(out, *args, ranks=1, fails=False):
    training = kill.Training([*map(str, args), f'--out_dir={out}'], ranks, f'{out}.output')
    assert (training.wait() != 0) == fails, training.text()
    return training.text()


@pytest.fixture(scope='module')
def one(data, tmp_path_factory):
    """Phase one, one process."""
    out = tmp_path_factory.mktemp('one') / 'run'
    train(out, *BASE, f'--data_dir={data}')
    return out


@pytest.fixture(scope='module')
def phase_two(data, one):
    return [*BASE, *kill.MOM, f'--data_dir={data}', f'--init_from={one}']


@pytest.fixture(scope='module')
def whole(phase_two, tmp_path_factory):
    """Phase two, one process."""
    out = tmp_path_factory.mktemp('whole') / 'run'
    train(out, *phase_two)
    return out


@pytest.fixture(scope='module')
def whole_2(phase_two, tmp_path_factory):
    """Phase two, two processes."""
    out = tmp_path_factory.mktemp('whole_2') / 'run'
    train(out, *phase_two, ranks=2)
    return out


def stop_at(step, out, *args, ranks=1, by=signal.SIGTERM):
    """A training whose processes each get a signal in that step -> exit status, what it printed."""
    real, calls = torch.optim.AdamW.step, itertools.count(1)

    def counted(self, *args, **how):
        done = real(self, *args, **how)
        if next(calls) == step:
            os.kill(os.getpid(), by)
        return done

    with pytest.MonkeyPatch.context() as patch:  # what is forked keeps it
        patch.setattr(torch.optim.AdamW, 'step', counted)
        training = kill.Training([*map(str, args), f'--out_dir={out}'], ranks, f'{out}.output')
    return training.wait(), training.text()


def close(a, b, rel):
    """Two runs with the same batches: weights equal to rounding, losses of the log too."""
    for name, w in last(a)['model'].items():
        # A key's bias changes no softmax: its gradient is rounding, enlarged by AdamW.
        if not name.endswith('qkv_b'):
            assert torch.allclose(w, last(b)['model'][name], rtol=rel, atol=rel), name
    with open(a / 'log.csv') as f, open(b / 'log.csv') as g:
        for mine, other in zip(csv.DictReader(f), csv.DictReader(g), strict=True):
            for key in ('step', 'loss', 'lr', 'grad_norm', 'val_loss'):
                value, want = float(mine[key] or 0), float(other[key] or 0)
                assert value == pytest.approx(want, rel=10 * rel), (mine, other)


# ----------------------------------------------------------------------------- stop, kill, resume

def test_killed_at_any_moment_and_resumed_equals_undisturbed(data, one, tmp_path):
    args = [*kill.TINY, *kill.MOM, f'--data_dir={data}', f'--init_from={one}', '--eval_every=2',
            '--max_steps=120']
    train(tmp_path / 'whole', *args)
    kill.kill_often(args, str(tmp_path / 'killed'), 3, 1, random.Random(2))
    assert kill.differences(tmp_path / 'whole', tmp_path / 'killed') == []


def test_killed_between_its_two_files(whole, tmp_path):
    """last.pt is new, best.pt is old, or half made: resuming mends it."""
    shutil.copytree(whole, tmp_path / 'run')
    state = last(whole)
    assert state['val_loss'] == state['best_loss'] and state['val_step'] == 16  # it is the best
    (tmp_path / 'run' / 'best.pt').write_bytes(b'old')
    (tmp_path / 'run' / 'best.pt.part').write_bytes(b'half')
    for _ in range(2):
        train(tmp_path / 'run', *RESUME)
        assert kill.differences(whole, tmp_path / 'run') == []
        assert sorted(os.listdir(tmp_path / 'run')) == [
            '.lock', 'best.pt', 'last.pt', 'log.csv', 'settings.json']


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(whole, phase_two, tmp_path):
    status, text = stop_at(5, tmp_path / 'run', *phase_two, by=signal.SIGINT)
    stopped = last(tmp_path / 'run')['step']
    assert status == 0 and 5 <= stopped < 16
    assert f'python train.py --out_dir={tmp_path / "run"} --init_from=resume' in text
    assert 'Traceback' not in text
    train(tmp_path / 'run', *RESUME)
    assert kill.differences(whole, tmp_path / 'run') == []


@pytest.mark.parametrize('ranks', [1, 2])
def test_a_signal_interrupts_an_evaluation(ranks, phase_two, tmp_path):
    """It may take minutes, and torchrun kills what has not ended after half of one."""
    args = [*phase_two, '--eval_tokens=9000', '--micro_batch=1', '--max_steps=8',
            f'--fsdp={ranks > 1}']
    train(tmp_path / 'whole', *args, ranks=ranks)
    words = [*map(str, args), f'--out_dir={tmp_path / "run"}']
    training = kill.Training(words, ranks, f'{tmp_path}/output')
    # Until the evaluation after step 4 has begun, which has 281 batches to do.
    while '\n4/8 | loss' not in training.text():
        assert training.poll() is None, training.text()
    training.kill(signal.SIGTERM)
    assert training.wait() == 0
    assert last(tmp_path / 'run')['step'] == 4 and last(tmp_path / 'run')['val_step'] == 0
    train(tmp_path / 'run', *RESUME, ranks=ranks)
    assert kill.differences(tmp_path / 'whole', tmp_path / 'run') == []


def test_an_evaluation_alone_that_is_stopped_says_that_nothing_is_written(
        phase_two, tmp_path, monkeypatch):
    real, calls = model.GPT.features, itertools.count(1)

    def counted(self, *args):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(model.GPT, 'features', counted)  # what is forked keeps it
    args = [*map(str, phase_two), '--eval_tokens=9000', '--micro_batch=1', '--max_steps=0']
    training = kill.Training([*args, f'--out_dir={tmp_path / "run"}'], 1, f'{tmp_path}/output')
    assert training.wait() == 0
    assert 'Nothing is written' in training.text() and 'saved' not in training.text()
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('system', ['vanilla', 'mom', *SYSTEMS])
def test_two_processes_stopped_and_resumed_equal_two_undisturbed(system, data, phase_two, tmp_path):
    args = [*phase_two, *SYSTEMS.get(system, [])]
    if system == 'vanilla':
        args = [*BASE, f'--data_dir={data}']
    train(tmp_path / 'whole', *args, ranks=2)
    _, text = stop_at(3, tmp_path / 'run', *args, ranks=2)
    assert 3 <= last(tmp_path / 'run')['step'] < 16 and '--init_from=resume' in text, text
    train(tmp_path / 'run', *RESUME, ranks=2)
    assert kill.differences(tmp_path / 'whole', tmp_path / 'run') == []


@pytest.mark.parametrize('before, after', [(1, 2), (2, 1)])
def test_the_number_of_processes_can_change(before, after, whole, phase_two, tmp_path):
    status, _ = stop_at(5, tmp_path / 'run', *phase_two, ranks=before)
    assert status == 0 and 5 <= last(tmp_path / 'run')['step'] < 16
    train(tmp_path / 'run', *RESUME, ranks=after)
    # The same batches in the same order: another one moves the loss by 1e-2.
    close(whole, tmp_path / 'run', 1e-4)


def test_a_process_that_dies_is_started_again_by_torchrun(whole_2, phase_two, tmp_path):
    out, output = tmp_path / 'run', tmp_path / 'output'
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--max_restarts=1',
                '--nproc_per_node=2', 'train.py', *map(str, phase_two), f'--out_dir={out}']
    with open(output, 'w') as f:
        agent = subprocess.Popen(torchrun, cwd=common.ROOT, env=ENV, stdout=f,
                                 stderr=subprocess.STDOUT)
    while '\n9/16 | loss' not in output.read_text():
        assert agent.poll() is None, output.read_text()
        time.sleep(0.005)
    ps = ['ps', '-o', 'pid=', '--ppid', str(agent.pid)]
    workers = subprocess.run(ps, capture_output=True, text=True).stdout
    os.kill(int(workers.split()[-1]), signal.SIGKILL)
    assert agent.wait() == 0, output.read_text()
    assert len(re.findall('weights at step', output.read_text())) == 2
    assert kill.differences(whole_2, out) == []


def test_a_thread_that_is_still_at_work_does_not_abort_processes_that_are_done(tmp_path):
    """As one of gloo's may be: it asks for an interpreter that is no more."""
    (tmp_path / 'script.py').write_text("""
import threading, torch
import common
common.join_processes('cpu')
def work():
    a = torch.randn(100)
    while True:
        a + a
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
print('all done')
common.leave_processes()
""")
    done = subprocess.run(command(tmp_path / 'script.py', ranks=2), cwd=common.ROOT,
                          capture_output=True, text=True, env={**ENV, 'PYTHONPATH': common.ROOT})
    assert done.returncode == 0 and done.stdout.count('all done') == 2, done.stderr


@pytest.mark.parametrize('run_id, other', [('another', None), ('none', (os, 'getppid', lambda: 1)),
                                           ('none', (platform, 'node', lambda: 'container'))])
def test_a_restart_does_not_take_up_an_older_run(
        run_id, other, whole, phase_two, tmp_path, monkeypatch):
    out = tmp_path / 'run'
    if other:  # 'none' is the id of every torchrun on one machine that is told none
        monkeypatch.setenv('LOCAL_WORLD_SIZE', '1')
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', run_id)
        with monkeypatch.context() as other_torchrun:
            other_torchrun.setattr(*other)
            train(out, *phase_two)
    else:
        shutil.copytree(whole, out)
    # The first start died before it had done anything.
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', run_id)
    before = (out / 'last.pt').read_bytes()
    assert 'holds a run' in train(out, *phase_two, '--seed=9', fails=True)
    assert (out / 'last.pt').read_bytes() == before
    for steps in (4, 8):  # and this one after four steps
        text = train(out, *phase_two, f'--max_steps={steps}', '--overwrite=True', '--seed=9')
        assert f'weights at step {steps - 4}' in text and last(out)['step'] == steps


def test_a_folder_that_has_moved_and_a_best_checkpoint_alone(whole, phase_two, tmp_path):
    stop_at(5, tmp_path / 'old', *phase_two)
    (tmp_path / 'old').rename(tmp_path / 'new')
    train(tmp_path / 'new', *RESUME)
    assert kill.differences(whole, tmp_path / 'new') == [] and not (tmp_path / 'old').exists()
    (tmp_path / 'new' / 'last.pt').unlink()
    assert 'holds a run' in train(tmp_path / 'new', *phase_two, fails=True)


def test_evaluation_changes_no_step_of_phase_two(whole, phase_two, tmp_path):
    train(tmp_path / 'run', *phase_two, '--eval_every=3', '--eval_tokens=77')
    mine, other = last(tmp_path / 'run'), last(whole)
    for key in ('model', 'optimizer', 'rng'):
        assert kill.equal(mine[key], other[key]), key


def test_what_a_token_costs_is_known_after_a_stop(phase_two, tmp_path):
    found = []
    for steps, args in ((5, phase_two), (1, RESUME)):
        stop_at(steps, tmp_path / 'run', *args)
        found.append(last(tmp_path / 'run')['flops'])
    end = last(tmp_path / 'run')
    assert end['val_step'] == 4 < end['step'] and found[0] == found[1]
    cfg = model.MoMConfig(**end['model_config'])
    assert 0 < found[0] < model.GPT(cfg).flops_per_token(cfg.block_size, merged=True)


def test_a_folder_takes_one_run(phase_two, tmp_path):
    args = [*phase_two, '--max_steps=100000', '--eval_every=100000']
    words = [*map(str, args), f'--out_dir={tmp_path / "run"}']
    first = kill.Training(words, 1, f'{tmp_path}/output')
    while '\n2/100000 | loss' not in first.text():
        assert first.poll() is None, first.text()
    for more in ([*args, '--overwrite=True'], RESUME):
        text = train(tmp_path / 'run', *more, fails=True)
        assert 'another run is at work in' in text and text.count('\n') == 1
    first.kill(signal.SIGTERM)
    assert first.wait() == 0
    with open(tmp_path / 'run' / 'log.csv') as f:
        steps = [int(row['step']) for row in csv.DictReader(f) if row['loss']]
    assert steps == [*range(1, last(tmp_path / 'run')['step'] + 1)]


def test_a_terminal_that_goes_away_stops_the_run_and_saves(phase_two, tmp_path):
    """As an SSH session that drops: SIGHUP, and nowhere to print."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(common.ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        words = command('train.py', *phase_two, '--max_steps=100000', '--eval_every=100000')
        os.execve(sys.executable, [*words, f'--out_dir={tmp_path / "run"}'], ENV)
    text = b''
    while b'\n3/100000 | loss' not in text:
        text += os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert 3 <= last(tmp_path / 'run')['step'] < 100000


def test_a_run_under_nohup_outlives_the_terminal(phase_two, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_at(3, tmp_path / 'run', *phase_two, by=signal.SIGHUP)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert last(tmp_path / 'run')['step'] == 16


@pytest.mark.parametrize('what', ['data', 'weights', 'step'])
def test_processes_that_see_different_files_are_refused(what, whole, tmp_path, monkeypatch):
    def other(self, *args):
        found = real(self, *args)
        if os.environ['RANK'] == '1':
            key = dict(data='documents', step='step', weights='model')[what]
            if what == 'weights':
                found[key] = {k: w + 1 for k, w in found[key].items()}
            else:
                found[key] += 1
        return found
    module, name = (inputs, 'read_data') if what == 'data' else (weights, 'load_checkpoint')
    real = getattr(module, name)
    monkeypatch.setattr(module, name, other)
    shutil.copytree(whole, tmp_path / 'run')
    text = train(tmp_path / 'run', *RESUME, ranks=2, fails=True)
    assert f'has another {what} than process 0 on' in text and 'Traceback' not in text


# ------------------------------------------------------------------------- full disks, broken files

def test_a_full_disk_leaves_the_previous_checkpoint(whole, phase_two, tmp_path):
    """A file may grow to 300 kB, less than a checkpoint: the kernel refuses, as on a full disk."""
    out = tmp_path / 'run'
    stop_at(5, out, *phase_two)
    before = (out / 'last.pt').read_bytes()
    assert len(before) > 300_000
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    done = subprocess.run([sys.executable, 'train.py', f'--out_dir={out}', *RESUME],
                          cwd=common.ROOT, env=ENV, preexec_fn=limit, capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
    assert 'last.pt could not be written ([Errno 27] File too large; ' in done.stderr
    assert 'make room, then go on with' in done.stderr
    assert f'The checkpoint of step {last(out)["step"]}' in done.stderr
    assert (out / 'last.pt').read_bytes() == before and not (out / 'last.pt.part').exists()
    train(out, *RESUME)
    assert kill.differences(whole, out) == []


def test_damaged_files_are_refused_or_harmless():
    ends, wrong = fuzz.fuzz(72, seed=3)
    assert not wrong, '\n\n'.join(wrong)
    refused = sum(n for end, n in ends.items() if 'refused' in end)
    assert refused > 36, ends  # most damage hurts, so a run that swallowed it would be seen


def test_a_damaged_checkpoint_is_seen_though_torch_loads_it(whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'run')
    path = tmp_path / 'run' / 'last.pt'
    raw = bytearray(path.read_bytes())
    at = raw.find(last(whole)['model']['wte.weight'].numpy().tobytes()[:64])
    raw[at + 2] ^= 1
    path.write_bytes(raw)
    mine, other = (last(out)['model']['wte.weight'] for out in (tmp_path / 'run', whole))
    assert not torch.equal(mine, other)
    assert 'cannot be read (BadZipFile)' in train(tmp_path / 'run', *RESUME, fails=True)


def test_a_checkpoint_with_code_in_it_is_refused(data, whole, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/ran',)
    (tmp_path / 'run').mkdir()
    torch.save({**last(whole), 'settings': Evil()}, tmp_path / 'run' / 'last.pt')
    anew = [*BASE, f'--data_dir={data}', f'--init_from={tmp_path / "run"}', '--overwrite=True']
    for args in (RESUME, anew):
        assert 'cannot be read (UnpicklingError)' in train(tmp_path / 'run', *args, fails=True)
    assert not (tmp_path / 'ran').exists()


# ----------------------------------------------------------------------------- numbers

def test_a_gradient_that_is_not_finite_stops_the_run(phase_two, tmp_path):
    out = tmp_path / 'run'
    stop_at(5, out, *phase_two)
    state = last(out)
    name = 'chunks.1.ffn.proj_w'
    # The loss stays finite: LayerNorm divides by it. Its square does not.
    state['model'][name][0, 0, 0] = 3e38
    torch.save(state, out / 'last.pt')
    text = train(out, *RESUME, fails=True)
    step = state['step']
    assert f'step {step + 1}: loss ' in text and 'Training stops before the update' in text
    assert f'train_batches({step}) of seed=5: the sequences at tokens ' in text
    assert f'last.pt, of step {step}' in text and last(out)['step'] == step


def test_float16_saves_its_scaler_and_resumes_bit_for_bit(data, tmp_path):
    args = [*BASE, f'--data_dir={data}', '--dtype=float16']
    train(tmp_path / 'whole', *args)
    stop_at(5, tmp_path / 'run', *args)
    assert last(tmp_path / 'run')['scaler']['scale'] > 1
    train(tmp_path / 'run', *RESUME)
    assert kill.differences(tmp_path / 'whole', tmp_path / 'run') == []
    assert last(tmp_path / 'whole')['scaler']['_growth_tracker'] > 0
    # The gradients are clipped, and logged, without the factor that the loss is scaled by.
    train(tmp_path / 'full', *args[:-1], '--dtype=float32')
    norms = []
    for name in ('whole', 'full'):
        with open(tmp_path / name / 'log.csv') as f:
            norms.append([float(row['grad_norm']) for row in csv.DictReader(f) if row['grad_norm']])
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


ONE_STEP = {'mom': ['--K=3', '--H=1'], 'moe': [*SYSTEMS['moe'], '--router=gru']}


@pytest.mark.parametrize('system', ONE_STEP)
def test_the_compiled_path_of_a_hopper_leaves_no_gradient_out(
        system, phase_two, tmp_path, monkeypatch):
    """On two processes DDP waits for all. A GRU's only step uses no weights of its state."""
    def step(self, *args):
        assert all(p.grad is not None for group in self.param_groups for p in group['params'])
        return real_step(self, *args)
    real_step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    monkeypatch.setattr(model, 'has_grouped_mm', lambda device, C: True)
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))
    text = train(tmp_path / 'run', *phase_two, *ONE_STEP[system], '--max_steps=3',
                 '--dtype=bfloat16', '--compile=True', ranks=2)
    assert '3/3 | loss' in text


# ----------------------------------------------------------------------------- sharding

# Of 15 validation sequences one process has eight batches, one seven.
SHARDED = ['--fsdp=True', '--micro_batch=1']


@pytest.fixture(scope='module')
def sharded(phase_two, tmp_path_factory):
    out = tmp_path_factory.mktemp('sharded') / 'run'
    return out, train(out, *phase_two, *SHARDED, ranks=2)


def test_sharded_training_equals_the_other(whole_2, sharded):
    out, text = sharded
    close(whole_2, out, 1e-4)
    total, = re.findall(r'\n([\d,]+) parameters', text)
    mine, = re.findall(r'sharded: ([\d,]+) parameters per process', text)
    total, mine = (int(n.replace(',', '')) for n in (total, mine))
    assert total / 2 <= mine < 0.55 * total


def test_sharded_checkpoints_are_the_same_files(whole_2, sharded, phase_two, tmp_path):
    mine, other = last(sharded[0]), last(whole_2)
    assert mine.keys() == other.keys() and mine['model'].keys() == other['model'].keys()
    for i, moments in other['optimizer']['state'].items():
        for key, t in moments.items():
            own = mine['optimizer']['state'][i][key]
            assert torch.allclose(own, t, rtol=1e-3, atol=1e-6), (i, key)
    stop_at(5, tmp_path / 'run', *phase_two, *SHARDED, ranks=2)
    shutil.copytree(tmp_path / 'run', tmp_path / 'alone')
    train(tmp_path / 'run', *RESUME, ranks=2)  # sharded, and again sharded
    assert kill.differences(sharded[0], tmp_path / 'run') == []
    train(tmp_path / 'alone', *RESUME, '--fsdp=False')  # sharded, then one process
    close(whole_2, tmp_path / 'alone', 1e-4)
    stop_at(5, tmp_path / 'back', *phase_two)
    # One process, then sharded.
    train(tmp_path / 'back', *RESUME, '--fsdp=True', '--checkpointing=True', ranks=2)
    close(whole_2, tmp_path / 'back', 1e-4)


def test_sharding_needs_company(phase_two, tmp_path):
    text = train(tmp_path / 'run', *phase_two, '--fsdp=True', fails=True)
    assert 'over several processes (torchrun)' in text
