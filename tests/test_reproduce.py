"""reproduce.py as a user runs it, at a scale of seconds, and its report on made-up runs."""
import csv
import glob
import json
import lzma
import os
import pathlib
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import time

import numpy as np
import pytest
import torch
from test_train import ENV, command, text  # noqa: F401  (text is a fixture)

import common

L, C, T, B, V = 8, 16, 16, 4, 257  # the scale 'tiny': layers, width, tokens, sequences, vocabulary
STEPS = [60, 12]


def reproduce(text, out, *args, fails=False):  # noqa: F811
    done = subprocess.run(arguments(text, out, *args), cwd=common.ROOT, env=ENV,
                          capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def arguments(text, out, *args):  # noqa: F811
    return command('reproduce.py', '--scale=tiny', f'--data_dir={text}', f'--out_dir={out}',
                   '--device=cpu', f'--steps={STEPS}'.replace(' ', ''), '--workers=2', *args)


def results(out):
    return json.loads((out / 'results.json').read_text())


def log(folder):
    with open(folder / 'log.csv', newline='') as f:
        return list(csv.DictReader(f))


def make_up(out, name, loss, rate=0.01, seed=1, needs='phase_one', steps=STEPS[1],
            data_dir='data/sotu_bytes', **model):
    """The folder of a finished run that ended with this loss: settings and log, no training."""
    folder = out / f'{name}_lr{rate:g}_seed{seed}'
    folder.mkdir(parents=True)
    first = name in ('phase_one', 'scratch')
    start = {'': 'scratch', 'phase_one': str(out / 'phase_one_lr0.01_seed1' / 'last.pt'),
             'its own': str(out / f'phase_one_lr0.01_seed{seed}' / 'last.pt'),
             'scratch': str(out / f'scratch_lr{rate:g}_seed{seed}' / 'last.pt')}[needs]
    chunks = '1-1-4-1-1' if model else '1-1-1-1-1-1-1-1'
    shape = dict(chunks=chunks, n_embd=C, n_head=2, block_size=T)
    shape.update(dict(router_dim=8, **model) if model else {})
    settings = dict(shape, batch_size=B, eval_tokens=512, data_dir=str(data_dir), init_from=start,
                    seed=1000 * seed + (337 if first else 338), max_steps=steps, learning_rate=rate,
                    eval_every=-(-steps // 4))
    made_up = data_dir == 'data/sotu_bytes'
    meta = dict(train_sha256='' if made_up else common.sha256(data_dir / 'train.bin'))
    content = dict(model={}, model_config=dict(shape, vocab_size=V), settings=settings, step=steps,
                   meta=meta)
    torch.save(content, folder / 'last.pt')
    rows = ['step,loss,lr,grad_norm,ms,tokens_per_s,val_loss,val_bits_per_byte,k_a,k_f',
            '0,,,,,,5.5,8,1.5,1.25']
    rows += [f'{n},5,0.01,1.5,20,3200,,,,' for n in range(1, steps + 1)]
    rows += [f'{steps},,,,,,{loss},{loss / np.log(2)},2,1.75']
    (folder / 'log.csv').write_text('\n'.join(rows) + '\n')


def parabola(at, x, y):
    """Lagrange's polynomial of degree 2 through three points, over the logarithm of x."""
    at, x = np.log(at), np.log(x)
    return sum(y[i] * np.prod([(at - x[j]) / (x[i] - x[j]) for j in range(3) if j != i])
               for i in range(3))


def dense_flops():  # of a training step of the vanilla model
    return 3 * B * T * (L * (24 * C * C + 4 * T * C) + 2 * C * V)


@pytest.fixture(scope='module')
def run(text, tmp_path_factory):  # noqa: F811
    """Figure 5 and Table 2, with most cells there; killed in its first cells, and begun again."""
    out = tmp_path_factory.mktemp('reproduce') / 'run'
    mom = dict(K=2, H=6, skip=True, data_dir=text)
    make_up(out, 'k1h4_gru_scratch', 3.4, needs='', data_dir=text, K=1, H=4, skip=False,
            router='gru')
    make_up(out, 'k1h4_mlp', 3.5, data_dir=text, K=1, H=4, skip=False, router='mlp')
    make_up(out, 'scratch', 9.0, needs='', steps=STEPS[0], **mom)
    make_up(out, 'scratch_more', 3.5, needs='scratch', **mom)
    make_up(out, 'vanilla', 3.0, data_dir=text)
    make_up(out, 'vanilla', 3.01, seed=2, data_dir=text)
    make_up(out, 'k2h6s', 2.99, **mom)
    make_up(out, 'same', 3.021, tied=True, **mom)
    there = {path: path.stat().st_mtime_ns for path in out.glob('*/log.csv')}
    args = ['--only=fig5,table2', '--most_seeds=2']
    process = subprocess.Popen(arguments(text, out, *args), cwd=common.ROOT, env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = out / 'phase_one_lr0.01_seed1'
    while process.poll() is None and not ((first / 'log.csv').exists() and len(log(first)) > 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 130 and 'The same command goes on' in stderr, stderr
    stopped = torch.load(first / 'last.pt', weights_only=True)['step']
    stdout = reproduce(text, out, *args)
    chosen = reproduce(text, out, '--only=fig4,fig5,table2', '--cells=k1h1s', '--most_seeds=2')
    return out, stopped, stdout, there, chosen


def test_what_was_stopped_goes_on(run):
    out, stopped, *_ = run
    first = out / 'phase_one_lr0.01_seed1'
    assert 3 <= stopped < STEPS[0]
    assert f'weights at step {stopped}:' in (first / 'output.txt').read_text()
    assert [int(row['step']) for row in log(first) if row['loss']] == list(range(1, STEPS[0] + 1))
    assert (out / 'fig5.png').stat().st_size > 10_000


def test_the_report_says_what_the_logs_say(run):
    out = run[0]
    rows = {row['cell']: row for row in results(out)['rows']['fig5']}
    markdown = (out / 'results.md').read_text()
    phase_one = STEPS[0] * dense_flops()
    routers = {'k1h4_gru': 3 * 8 * (C + 8) + 8 * 4, 'k1h4_mlp_scratch': 8 * C + 8 * 4}
    for name, router in routers.items():
        folder = out / f'{name}_lr0.01_seed1'
        last = [row for row in log(folder) if row['val_loss']][-1]
        one, = rows[name]['runs']
        assert one['loss'] == float(last['val_loss'])
        assert int(last['step']) == one['steps'] == STEPS[1]
        assert one['bits_per_byte'] == float(last['val_bits_per_byte'])
        # K1H4 without SKIP does the vanilla model's work, and asks two routers four times
        flops = STEPS[1] * (dense_flops() + 3 * B * T * 2 * 4 * 2 * router)
        assert one['pflops'] * 1e15 == pytest.approx(flops)
        before = 0 if 'scratch' in name else phase_one
        assert one['pflops_in_all'] * 1e15 == pytest.approx(one['pflops'] * 1e15 + before)
        norms = [float(row['grad_norm']) for row in log(folder)
                 if row['grad_norm'] and int(row['step']) > 1]
        spikes = np.quantile(norms, 0.99) / statistics.median(norms)
        assert one['spikes'] == pytest.approx(spikes, rel=0.05)
        loss, bits = one['loss'], one['bits_per_byte']
        assert f'| 1 | {loss:.3f} | {np.exp(loss):.2f} | {bits:.3f} |' in markdown
    names = 'k1h4_mlp_scratch', 'k1h4_gru'
    scratch, two_phase = (rows[name]['runs'][0]['loss'] for name in names)
    assert rows['k1h4_mlp_scratch']['difference'][0] == pytest.approx(scratch - two_phase)
    saved = torch.load(out / 'k1h4_gru_lr0.01_seed1' / 'last.pt', weights_only=True)
    assert saved['settings']['init_from'].endswith('phase_one_lr0.01_seed1/last.pt')
    assert saved['model_config']['router'] == 'gru' and not saved['model_config']['skip']
    assert saved['settings']['seed'] == 1338  # as for all others: the same batches


def test_finished_cells_are_kept_and_close_ones_get_another_seed(run):
    out, _, stdout, there, _ = run
    now = {path: path.stat().st_mtime_ns for path in out.glob('*/log.csv')}
    assert there.items() <= now.items()
    seeds = {'phase_one': 1, 'k1h4_gru': 1, 'k1h4_mlp_scratch': 1, 'k2h6s': 2, 'k1h1s': 1}
    assert {path.parent.name for path in now.keys() - there.keys()} == {
        f'{name}_lr0.01_seed{seed}' for name, seed in seeds.items()}
    assert 'seeds for what is close: 1 trainings to do' in stdout
    assert '1/1 k2h6s_lr0.01_seed2' in stdout
    rows = {row['cell']: row for row in results(out)['rows']['table2']}
    runs = rows['k2h6s']['runs']
    assert len(runs) == 2
    assert rows['k2h6s']['std'] == pytest.approx(np.std([r['loss'] for r in runs], ddof=1))
    mean, error, n = rows['k2h6s']['difference']
    pairs = np.array([2.99 - 3.0, runs[1]['loss'] - 3.01])
    assert mean == pytest.approx(pairs.mean()) and n == 2
    assert error == pytest.approx(pairs.std(ddof=1) / np.sqrt(2))
    assert len(rows['same']['runs']) == 1  # 0.021 is not close
    # the method's FLOPs, with the mean of the modules that the log says were chosen: 1.75 and 1.5
    chunk = 6 * ((8 * 1.75 + 16 * 1.5) * C * C + 4 * T * C + 2 * 2 * (3 * 8 * (C + 8) + 8 * 5))
    per_token = 4 * (24 * C * C + 4 * T * C) + chunk + 2 * C * V
    assert runs[0]['pflops'] * 1e15 == pytest.approx(3 * B * T * per_token * STEPS[1])


def test_chosen_cells_alone_are_trained_and_all_that_is_there_is_reported(run, text):  # noqa: F811
    out, *_, stdout = run
    assert 'tables and figures: 1 trainings to do, 2 done' in stdout  # phase one, vanilla
    rows = results(out)['rows']
    assert {row['cell'] for row in rows['fig4'] if row['runs']} == {'k1h1s', 'k2h6s'}
    two_phases, = [row for row in rows['table2'] if row['cell'] == 'k2h6s']
    assert len(two_phases['runs']) == 2 and all(row['runs'] for row in rows['fig5'])
    error = reproduce(text, out, '--only=table4', '--cells=k1h4s,k1h1s', fails=True)
    assert "'k1h1s' is none of those of table4: k1h4s, cut_1-6-1_k1h6s, " in error


def test_other_settings_are_refused(run, text):  # noqa: F811
    error = reproduce(text, run[0], '--only=fig5', '--steps=[60,13]', fails=True)
    assert error.startswith('reproduce.py: error: ') and error.count('\n') == 1
    want = r'k1h4_\w+_lr0.01_seed1 holds a run with max_steps=12, not 13: ask for the same'
    assert re.search(want, error), error


def test_verdicts_and_learning_rates_on_made_up_numbers(tmp_path):
    out, mom = tmp_path / 'run', dict(K=2, H=6, skip=True)
    make_up(out, 'phase_one', 3.6, needs='', steps=STEPS[0])
    for rate, vanilla, k2h4s in ((0.01, 3.3, 3.2), (0.02, 3.1, 3.4)):
        make_up(out, 'vanilla', vanilla, rate)
        make_up(out, 'k2h4s', k2h4s, rate, K=2, H=4, skip=True)
    for seed, two_phase, scratch_more, same in (
            (1, 3.0, 3.05, 3.05), (2, 3.2, 3.30, 3.27), (3, 3.1, 3.15, 3.15)):
        make_up(out, 'k2h6s', two_phase, seed=seed, **mom)
        make_up(out, 'same', same, seed=seed, tied=True, **mom)
        make_up(out, 'scratch', 3.59, seed=seed, needs='', steps=STEPS[0], **mom)
        make_up(out, 'scratch_more', scratch_more, seed=seed, needs='scratch', **mom)
    make_up(out, 'k2h6s', 2.0, 0.02, **mom)  # not the rate that K2H4S does best with
    make_up(out, 'vanilla_x1.7', 3.02, 0.02, steps=20)
    make_up(out, 'vanilla_x3.2', 2.9, 0.02, steps=38)
    make_up(out, 'mod', 3.3, phi='mod', K=1, chunks='1-1-1-1-1-1-1-1', capacity=0.125,
            router='linear')
    make_up(out, 'k1h1s', 3.0, K=1, H=1, skip=True)
    # All its steps are taken, and it was stopped in the evaluation after them.
    unfinished = out / 'k1h1s_lr0.01_seed1' / 'log.csv'
    unfinished.write_text('\n'.join(unfinished.read_text().split('\n')[:-2]) + '\n')
    args = ['--scale=tiny', f'--out_dir={out}', f'--steps={STEPS}'.replace(' ', ''),
            '--rates=[0.01,0.02,0.01]', '--only=table1,table2,fig4', '--report=True']
    done = subprocess.run(command('reproduce.py', *args), cwd=common.ROOT, env=ENV,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verdict = {claim['claim']: claim for claim in results(out)['claims']}
    worse, two, own, even = [claim for claim in verdict.values() if claim['table'] == 'table2']
    assert worse['verdict'] == 'undecided'  # 3.6 and 3.59, one seed
    assert worse['parts'][0]['found'] == [pytest.approx(0.01), None, 1]
    # Differences of -0.05, -0.1, -0.05: a mean of -0.0667, four standard errors, which are not
    # enough of three seeds.
    assert two['verdict'] == 'undecided' and two['parts'][0]['found'] == [
        pytest.approx(-0.2 / 3), pytest.approx(np.std([.05, .1, .05], ddof=1) / np.sqrt(3)), 3]
    assert own['verdict'] == 'holds'  # eight and a half standard errors
    assert own['parts'][0]['found'][0] == pytest.approx(-0.17 / 3)
    assert even['verdict'] == 'does not hold'  # scratch's 3.59 is not below 3.05, 3.27, 3.15
    assert all(claim['verdict'] == 'not run'
               for claim in verdict.values() if claim['table'] == 'fig4')
    markdown = (out / 'results.md').read_text()
    assert 'vanilla 0.02 (0.01: 3.300, 0.02: 3.100)' in markdown
    assert 'K2H4S, 0.01 (0.01: 3.200, 0.02: 3.400)' in markdown
    rows = {row['cell']: row for row in results(out)['rows']['table2']}
    assert rows['vanilla']['mean']['loss'] == 3.1
    assert rows['k2h6s']['mean']['loss'] == pytest.approx(3.1)
    assert '| K1H1S | – |' in markdown and (out / 'fig4.png').exists()
    # As many FLOPs as the vanilla model takes in 2 to 3 times the steps: its loss there.
    times = rows['k2h6s']['runs'][0]['pflops'] * 1e15 / dense_flops()
    assert 20 < times < 38
    as_many = parabola(times, [12, 20, 38], [3.1, 3.02, 2.9])
    # Two seeds lack the longer runs.
    assert rows['k2h6s']['equal_flops'] == [pytest.approx(3.0 - as_many), None, 1]
    # In training an eighth of the tokens go through every other block, whatever the predictor lets
    # through afterwards.
    routed = (8 + 16) / 8 * C * C + 4 * T * C / 64 + 2 * C + 2 * 8 * (C + 1)
    mod = 3 * B * T * (4 * (24 * C * C + 4 * T * C) + 4 * routed + 2 * C * V)
    one, = next(row for row in results(out)['rows']['table1'] if row['cell'] == 'mod')['runs']
    assert one['pflops'] * 1e15 == pytest.approx(STEPS[1] * mod)
    assert rows['same']['equal_flops'][2] == 1 and rows['scratch_more']['equal_flops'] is None


def test_from_scratch_as_many_flops_are_those_in_all(tmp_path):
    """Without a phase one to share, GPT-2 of as many FLOPs has them in both phases together."""
    out, (one, two), mom = tmp_path / 'run', (6, 60), dict(K=2, H=6, skip=True)
    make_up(out, 'phase_one', 4.0, needs='', steps=one)
    for name, loss, n in (('vanilla', 3.0, 60), ('vanilla_x1.7', 2.8, 102),
                          ('vanilla_x3.2', 2.6, 192)):
        make_up(out, name, loss, steps=n)
    make_up(out, 'scratch', 3.5, needs='', steps=one, **mom)
    make_up(out, 'scratch_more', 2.9, needs='scratch', steps=two, **mom)
    # Seed 2 of GPT-2 starts from the phase one of seed 1, but for the one that it stands beside.
    make_up(out, 'phase_one', 4.1, seed=2, needs='', steps=one)
    make_up(out, 'vanilla', 2.5, seed=2, steps=two)
    make_up(out, 'vanilla_own', 3.3, seed=2, needs='its own', steps=two)
    make_up(out, 'scratch', 3.6, seed=2, needs='', steps=one, **mom)
    make_up(out, 'scratch_more', 3.1, seed=2, needs='scratch', steps=two, **mom)
    args = ['--scale=tiny', f'--out_dir={out}', '--steps=[6,60]', '--rates=[0.01]',
            '--only=axis', '--report=True']
    subprocess.run(command('reproduce.py', *args), cwd=common.ROOT, env=ENV, check=True)
    rows = {row['cell']: row for row in results(out)['rows']['axis']}
    per_step = rows['scratch_more']['runs'][0]['pflops'] * 1e15 / two
    as_long = per_step * (one + two) / dense_flops()  # steps of GPT-2 that cost as much
    assert one + 102 < as_long < one + 192
    as_many = parabola(as_long, [one + 60, one + 102, one + 192], [3.0, 2.8, 2.6])
    assert rows['scratch_more']['equal_flops'] == [pytest.approx(2.9 - as_many), None, 1]
    assert rows['scratch_more']['difference'] == [pytest.approx(-0.15), pytest.approx(0.05), 2]
    assert [one['loss'] for one in rows['vanilla_own']['runs']] == [3.0, 3.3]


def test_results_that_are_kept_need_no_folders(text, tmp_path):  # noqa: F811
    """--keep stores log and result of a finished run; a report from them alone is the same."""
    out, kept, other = tmp_path / 'out', tmp_path / 'kept', tmp_path / 'other'
    make_up(out, 'phase_one', 4.0, needs='', steps=STEPS[0], data_dir=text)
    make_up(out, 'vanilla', 3.0, data_dir=text)
    make_up(out, 'k2h6s', 2.5, data_dir=text, K=2, H=6, skip=True)
    args = ['--only=axis', '--report=True', f'--keep={kept}']
    reproduce(text, out, *args)
    reproduce(text, other, *args)
    first, second = results(out), results(other)
    assert first['rows'] == second['rows'] and first['claims'] == second['claims']
    losses = {row['cell']: row['runs'][0]['loss'] for row in second['rows']['axis'] if row['runs']}
    assert losses == {'vanilla': 3.0, 'vanilla_own': 3.0, 'k2h6s': 2.5}
    # A training of the same cell that was begun, and stopped, hides nothing.
    make_up(other, 'phase_one', 4.0, needs='', steps=STEPS[0], data_dir=text)
    make_up(other, 'k2h6s', 2.7, data_dir=text, K=2, H=6, skip=True)
    (other / 'k2h6s_lr0.01_seed1' / 'log.csv').write_text('step,val_loss\n')
    reproduce(text, other, *args)
    assert first['rows'] == results(other)['rows']
    with lzma.open(kept / 'k2h6s_lr0.01_seed1.csv.xz') as f:
        assert f.read() == (out / 'k2h6s_lr0.01_seed1' / 'log.csv').read_bytes()
    one = json.loads((kept / 'k2h6s_lr0.01_seed1.json').read_text())
    one['settings']['H'] = 5
    (kept / 'k2h6s_lr0.01_seed1.json').write_text(json.dumps(one))
    assert 'holds a run with H=5, not 6' in reproduce(text, other, *args, fails=True)


def test_a_phase_one_that_is_trained_again_says_what_was_kept(text, tmp_path):  # noqa: F811
    out, kept = tmp_path / 'out', f'--keep={tmp_path}/kept'
    make_up(out, 'phase_one', 4.0, needs='', steps=STEPS[0], data_dir=text)
    make_up(out, 'vanilla', 3.0, data_dir=text)
    reproduce(text, out, '--only=fig4', '--report=True', kept)
    said = reproduce(text, tmp_path / 'other', '--only=fig4', '--cells=k1h1s', kept)
    assert 'tables and figures: 2 trainings to do' in said
    assert 'phase_one_lr0.01_seed1: ' in said and 'kept has 4.0000. What starts' in said
    assert said.count('What starts') == 1  # k1h1s was not kept


def test_another_rate_of_phase_one_and_of_all_from_scratch(text, tmp_path):  # noqa: F811
    out = tmp_path / 'run'
    make_up(out, 'phase_one', 4.0, data_dir=text, needs='', steps=STEPS[0])
    make_up(out, 'phase_one', 3.9, 0.02, data_dir=text, needs='', steps=STEPS[0])
    make_up(out, 'scratch', 3.8, 0.02, data_dir=text, needs='', steps=STEPS[0], K=2, H=6, skip=True)
    for more, losses in (['--rate=0.02'], [3.8, 3.9]), ([], [[], 4.0]):
        reproduce(text, out, '--only=table2', '--report=True', *more)
        scratch, phase_one, *_ = results(out)['rows']['table2']
        assert [row['runs'] and row['mean']['loss'] for row in (scratch, phase_one)] == losses
    for wrong in '--rate=-1', '--rates=[1e999]':
        assert 'must be at least 0, and rates=' in reproduce(text, out, wrong, fails=True)


def test_what_is_damaged_or_missing_is_named(text, tmp_path):  # noqa: F811
    out, kept = tmp_path / 'run', tmp_path / 'kept'
    ask = '--only=table1', '--cells=k2h6s', '--rates=[0.01]', f'--keep={kept}', '--report=True'
    for name, needs, steps in (('phase_one', '', STEPS[0]), ('vanilla', 'phase_one', STEPS[1])):
        make_up(out, name, 4.0, needs=needs, steps=steps)
    reproduce(text, out, *ask)
    vanilla = out / 'vanilla_lr0.01_seed1'
    log, saved = (vanilla / 'log.csv').read_text(), torch.load(vanilla / 'last.pt')
    torch.save({**saved, 'val_step': saved['step']}, vanilla / 'last.pt')
    first, rest = log.split('\n', 1)
    for wrong in rest, log[:-3], '':  # without its first line, cut in its last, empty
        (vanilla / 'log.csv').write_text(wrong)
        error = reproduce(text, out, *ask, fails=True)
        assert f'{vanilla}/log.csv lacks the last validation: remove {vanilla}, and' in error
    (vanilla / 'log.csv').unlink()
    alone = [word for word in ask if 'keep' not in word]
    assert f'{vanilla}/log.csv cannot be read' in reproduce(text, out, *alone, fails=True)
    (vanilla / 'log.csv').write_text(log.replace('1.5,20', 'abc,20', 1))
    error = reproduce(text, out, *alone, fails=True)
    assert f'{vanilla}/log.csv: 1,5,0.01,abc,20,3200,,,, is no row of a log: delete' in error
    (vanilla / 'last.pt').write_bytes(b'no checkpoint')
    assert f'{vanilla} holds no run of train.py' in reproduce(text, out, *ask, fails=True)
    shutil.rmtree(vanilla)
    (kept / 'vanilla_lr0.01_seed1.json').write_text('[]')
    assert 'seed1.json holds no result' in reproduce(text, out, *ask, fails=True)


@pytest.mark.parametrize('damage', [lambda raw: raw[:-20], lambda raw: b'junk', None])
def test_a_kept_log_that_is_damaged_or_missing_is_named(damage, text, tmp_path):  # noqa: F811
    out, kept = tmp_path / 'run', tmp_path / 'kept'
    ask = '--only=fig5', '--cells=k1h4_gru_scratch', f'--keep={kept}', '--report=True'
    make_up(out, 'k1h4_gru_scratch', 3.4, needs='', K=1, H=4, skip=False, router='gru')
    reproduce(text, out, *ask)
    shutil.rmtree(out / 'k1h4_gru_scratch_lr0.01_seed1')
    reproduce(text, out, *ask)
    log = kept / 'k1h4_gru_scratch_lr0.01_seed1.csv.xz'
    raw = log.read_bytes()
    log.unlink()
    if damage:
        log.write_bytes(damage(raw))
    assert f'{log} cannot be read' in reproduce(text, out, *ask, fails=True)


def test_a_training_that_is_killed_is_named_with_the_signal(text, tmp_path):  # noqa: F811
    out = tmp_path / 'run'
    ask = '--only=table2', '--cells=phase_one', '--most_seeds=1', '--steps=[100000,12]'
    process = subprocess.Popen(arguments(text, out, *ask), cwd=common.ROOT, env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(out.glob('*/log.csv')):
        time.sleep(0.02)
    for pid in subprocess.check_output(['pgrep', '-P', str(process.pid)], text=True).split():
        os.kill(int(pid), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=60)
    assert 'phase_one_lr0.01_seed1 failed: stopped by signal 9' in stdout
    assert process.returncode == 1
    assert '1 trainings failed; the same command tries them again' in stderr
    assert 'stopped by signal 9' in (out / 'results.md').read_text()


def test_a_report_says_what_it_leaves_out(text, tmp_path):  # noqa: F811
    out = tmp_path / 'run'
    make_up(out, 'phase_one', 4.0, needs='', steps=STEPS[0])
    make_up(out, 'vanilla', 3.9)
    ask = '--only=table1', '--cells=k2h6s', '--rates=[0.01]', '--report=True'
    assert 'left out' not in reproduce(text, out, *ask)
    shutil.rmtree(out / 'phase_one_lr0.01_seed1')
    assert (f'{out}/vanilla_lr0.01_seed1 is left out: phase_one_lr0.01_seed1, which it starts '
            'from, is not there') in reproduce(text, out, *ask)


@pytest.mark.parametrize('folder', sorted(glob.glob(f'{common.ROOT}/docs/data/*/')))
def test_a_report_in_docs_follows_from_the_results_beside_it(folder, tmp_path):
    """The command of each results.md, on a copy of its folder, writes the same page again."""
    page = pathlib.Path(folder, 'results.md').read_text().splitlines()
    shutil.copytree(folder, tmp_path / 'kept')
    script, *words = shlex.split(page[2].strip('`'))[1:]
    words = [word for word in words if not word.startswith(('--out_dir=', '--keep='))]
    words += [f'--out_dir={tmp_path}/out', f'--keep={tmp_path}/kept', '--report=True']
    done = subprocess.run(command(script, *words), cwd=common.ROOT, env=ENV, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'kept' / 'results.md').read_text().splitlines()[3:] == page[3:]


def test_a_report_of_some_cells_has_all_that_are_there(tmp_path):
    """Also those of families whose rate none of the cells asked for needs."""
    kept = pathlib.Path(common.ROOT, 'docs', 'data', 'ratio_1')
    shutil.copytree(kept, tmp_path / 'kept')
    words = ['--scale=ratio', '--ratio=1', '--only=axis', '--cells=k2h6s', '--report=True',
             f'--out_dir={tmp_path}/out', f'--keep={tmp_path}/kept']
    subprocess.run(command('reproduce.py', *words), cwd=common.ROOT, env=ENV, check=True)
    found, want = [[row['runs'] for row in results(folder)['rows']['axis']]
                   for folder in (tmp_path / 'out', kept)]
    assert found == want and all(found)
