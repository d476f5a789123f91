"""The settings loader, and every file in config/."""
import glob
import os
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
import torch

import common
from model import GPT, MoMConfig
from weights import HUB

SCRIPTS = ['train.py', 'prepare.py', 'sample.py', 'bench.py', 'finetune_glue.py', 'finetune_xsum.py']


def load(*argv, **scope):
    scope = scope or dict(learning_rate=1e-3, max_steps=10, skip=True, chunks='1-1', betas=[0.9, 0.95])
    settings, given = common.load(scope, list(argv))
    assert settings == {k: scope[k] for k in settings}  # the script's names hold them too
    return settings, given


def test_values_are_typed_and_later_ones_win(tmp_path):
    file = tmp_path / 'a.py'
    file.write_text('max_steps = 7\n_width = 3\nlearning_rate = 2\nbetas = [_width, 1]\n')
    settings, given = load(str(file), '--max_steps=9', '--skip=false', '--chunks=4-4')
    assert settings == dict(learning_rate=2.0, max_steps=9, skip=False, chunks='4-4', betas=[3, 1])
    assert type(settings['learning_rate']) is float
    assert given == {'max_steps', 'learning_rate', 'betas', 'skip', 'chunks'}
    assert load('--max_steps=9', str(file))[0]['max_steps'] == 7
    assert load('--learning_rate=6e-4')[0]['learning_rate'] == 6e-4
    assert load('--chunks=8')[0]['chunks'] == '8'


def test_the_fields_of_the_model_are_settings_too(tmp_path):
    (tmp_path / 'a.py').write_text("chunks = '1-4-1'\nkeep_A = [0, 2]\n")
    scope = dict(K=3, seed=1)
    argv = [str(tmp_path / 'a.py'), '--tau=1', '--seed=2']
    settings, given = common.load(scope, argv, model=MoMConfig)
    changed = dict(seed=2, K=3, chunks='1-4-1', keep_A=[0, 2], tau=1.0)
    assert settings == {**asdict(MoMConfig()), **changed}
    assert given == {'chunks', 'keep_A', 'tau', 'seed'}
    assert scope == dict(K=3, seed=2)  # names of the script, none of the model
    with pytest.raises(ValueError, match='--tied=1: tied takes bool'):
        common.load(dict(seed=1), ['--tied=1'], model=MoMConfig)
    with pytest.raises(ValueError, match="--vocab_size=9: unknown setting 'vocab_size'"):
        common.load(dict(seed=1), ['--vocab_size=9'], model=MoMConfig, without=('vocab_size',))


def test_help_has_the_model_s_defaults_and_comments(tmp_path, capsys):
    (tmp_path / 'a.py').write_text('"""A script."""\nK = 3  # its own\nsettings, given = 1\n')
    scope = dict(__doc__='A script.', __file__=str(tmp_path / 'a.py'), K=3)
    with pytest.raises(SystemExit):
        common.load(scope, ['--help'], model=MoMConfig, without=('vocab_size',))
    own, of_model = capsys.readouterr().out.split('# --- model\n')
    assert own.split() == 'A script. --K=3 its own'.split()
    lines = of_model.splitlines()
    names = [line.split('=')[0].strip(' -') for line in lines]
    assert names == [f.name for f in fields(MoMConfig) if f.name not in ('K', 'vocab_size')]
    assert lines[0].split()[0] == "--chunks='1-1-1-1-1-1-1-1-1-1-1-1'"
    assert ['--n_head=12', 'heads,', 'nh'] in [line.split() for line in lines]
    assert [line.split()[:3] for line in lines if '--c_share' in line] == [['--c_share=[]', "'share':", 'the']]


def test_two_runs_do_not_share_a_name():
    assert [common.run_name(source) for source in ('gpt2', 'out/a', 'out/a/', 'out/b/last.pt', 'b/best.pt')] == [
        'gpt2', 'a', 'a', 'b', 'b']
    assert common.run_name('out/xsum_gpt2/seed1') == common.run_name('out/xsum_gpt2/seed1/last.pt') == 'xsum_gpt2_seed1'
    assert common.run_name('last.pt') == os.path.basename(os.getcwd())


def test_devices(monkeypatch):
    for there, auto in ((False, 'cpu'), (True, 'cuda')):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: there)
        assert common.find_device('auto') == auto and common.find_device('cpu') == 'cpu'
    assert common.find_device('cuda:1') == 'cuda:1'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for device, message in (('gpu', "device='gpu' must be 'auto'"), ('cuda:1', 'device=cuda:1, but torch sees no GPU')):
        with pytest.raises(ValueError, match=message):
            common.find_device(device)


@pytest.mark.parametrize('argument, message', [
    ('--max_step=3', "did you mean 'max_steps'"), ('--zzz=3', 'unknown setting'), ('--max_steps=1.5', 'takes int'),
    ('--max_steps=many', "takes int .* not str 'many'"), ('--skip=1', 'takes bool'), ('--betas=0.9', 'takes list'),
    ('--learning_rate=True', 'takes float'), ('--skip', '--key=value'), ('max_steps=3', 'neither a config file'),
    ('config/mom_dema.py', 'did you mean config/mom_demo.py'), ('zzz.py', 'config/ holds')])
def test_mistakes_name_the_fix(argument, message):
    with pytest.raises(ValueError, match=message):
        load(argument)


def test_an_unknown_key_in_a_file_is_an_error(tmp_path):
    (tmp_path / 'a.py').write_text('learning_rat = 1.0\n')
    with pytest.raises(ValueError, match="a.py: unknown setting 'learning_rat'; did you mean 'learning_rate'"):
        load(str(tmp_path / 'a.py'))


CONFIGS = sorted(glob.glob(os.path.join(common.ROOT, 'config', '[a-z]*.py')))


@pytest.mark.parametrize('path', CONFIGS, ids=os.path.basename)
def test_every_config_file_is_one_that_train_takes(path):
    with open(os.path.join(common.ROOT, 'train.py')) as f:
        defaults = f.read().split('# --- run')[1].split('settings, given =')[0]
    scope = {}
    exec(defaults, scope)
    scope = {k: v for k, v in scope.items() if not k.startswith('_')}
    settings, given = common.load(scope, [path], model=MoMConfig, without=('vocab_size',))
    base = {}
    if settings['init_from'] in HUB:  # the width comes with the weights
        layers, n_embd, n_head = {'gpt2': (12, 768, 12), 'gpt2-medium': (24, 1024, 16), 'gpt2-large': (36, 1280, 20)}[
            settings['init_from']]
        base = dict(n_embd=n_embd, n_head=n_head)
        assert 'n_embd' not in given
    cfg = MoMConfig(**{**{f.name: settings[f.name] for f in fields(MoMConfig) if f.name in settings}, **base})
    if base:
        assert cfg.n_layer == layers
    with torch.device('meta'):
        GPT(cfg)
    with open(path) as f:
        assert f'train.py config/{os.path.basename(path)}' in f.read(), 'a config opens with its launch line'
    assert settings['out_dir'] == 'out/' + os.path.basename(path)[:-3]


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_lists_every_setting_with_its_comment(script):
    done = subprocess.run([sys.executable, script, '--help'], cwd=common.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('  --')]
    assert len(lines) >= 2 and all(len(line.split(None, 1)) == 2 and len(line) > 37 for line in lines), done.stdout


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_mistake_is_one_sentence_without_traceback(script):
    done = subprocess.run([sys.executable, script, '--nonsense=1'], cwd=common.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f'{script}: error: --nonsense=1: unknown setting')
    assert done.stderr.count('\n') == 1


def test_bytes_round_trip():
    tokenizer = common.tokenizer('bytes')
    text = 'Four score — and seven\r\n years\t😀'
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text and max(ids) < tokenizer.n_vocab
    assert tokenizer.decode([72, 256, 105]) == 'H<|endoftext|>i'


def test_gpt2_tokens_are_those_of_transformers_files():
    tokenizer = common.tokenizer('gpt2')
    assert tokenizer.n_vocab == 50257 and tokenizer.eot_token == 50256
    assert tokenizer.encode_ordinary('Hello world') == [15496, 995]
    text = "It's  the\n\n state of the Union's — 1,024 ünïcode\t\r\n"
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    with pytest.raises(ValueError, match="'gpt2' or 'bytes'"):
        common.tokenizer('gpt4')


def test_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'a'
    path.write_bytes(b'old')
    with pytest.raises(RuntimeError), common.atomic_write(path) as f:
        f.write(b'half of the n')
        raise RuntimeError('crash')
    assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['a']
    with common.atomic_write(path) as f:
        f.write(b'new')
    assert path.read_bytes() == b'new'
