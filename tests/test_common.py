"""The settings loader, and every file in config/."""
import glob
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
import torch

import common
import inputs
import weights
from model import GPT, MoMConfig
from tests import kill
from tests.test_docs import SCRIPTS
from tests.test_model import SIZES, tiny


def load(*argv, **scope):
    scope = scope or dict(learning_rate=1e-3, max_steps=10, skip=True, chunks='1-1',
                          betas=[0.9, 0.95])
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
    assert load('--split_on=~', split_on='')[0]['split_on'] == '~'  # a mark, no folder


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
    shared = [line.split()[:3] for line in lines if '--c_share' in line]
    assert shared == [['--c_share=[]', "'share':", 'the']]


def test_two_runs_do_not_share_a_name():
    sources = 'gpt2', 'out/a', 'out/a/', 'out/b/last.pt', 'b/best.pt'
    assert [common.run_name(source) for source in sources] == ['gpt2', 'a', 'a', 'b', 'b']
    for source in ('out/xsum_gpt2/seed1', 'out/xsum_gpt2/seed1/last.pt'):
        assert common.run_name(source) == 'xsum_gpt2_seed1'
    assert common.run_name('last.pt') == os.path.basename(os.getcwd())


def pretend(monkeypatch, kind, count=2):
    there = torch.device(kind) if kind != 'cpu' else None
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available: there)
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: count if there else 0)


@pytest.mark.parametrize('kind', ['cpu', 'cuda', 'mps', 'xpu'])
def test_devices(kind, monkeypatch):
    pretend(monkeypatch, kind)
    assert common.find_device('auto') == kind and common.find_device('cpu') == 'cpu'
    assert common.find_device(kind) == kind
    if kind != 'cpu':
        assert common.find_device(f'{kind}:1') == f'{kind}:1'
    for device in {'cuda:1', 'mps', 'xpu', f'{kind}:2'} - {kind, f'{kind}:1', 'cpu:2'}:
        message = f'device={device}, but torch sees no such GPU: take --device={kind}'
        with pytest.raises(ValueError, match=message):
            common.find_device(device)
    for device in ('gpu', 'cpu:0', 'cuda:x', ''):
        with pytest.raises(ValueError, match="must be 'auto', 'cpu', 'cuda', 'mps' or 'xpu'"):
            common.find_device(device)


def test_bfloat16_is_taken_where_a_card_has_it(monkeypatch):
    assert common.find_dtype('auto', 'cpu') == common.find_dtype('auto', 'mps') == 'float32'
    assert common.find_dtype('auto', 'xpu') == common.find_dtype('bfloat16', 'cpu') == 'bfloat16'
    for native in (True, False):  # an A100, a T4: that one emulates it
        asked = lambda including_emulation: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', asked)
        assert common.find_dtype('auto', 'cuda:0') == ('bfloat16' if native else 'float32')
        assert common.find_dtype('auto', 'cuda', 'float16') == ('bfloat16' if native else 'float16')
    with pytest.raises(ValueError, match="dtype='fp8' must be 'auto', 'bfloat16'"):
        common.find_dtype('fp8', 'cpu')


@pytest.mark.parametrize('card, peak', [
    ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA A10', 125), ('NVIDIA A10G', 70),
    ('NVIDIA H100 PCIe', 756), ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H200', 989),
    ('NVIDIA B200', 2250), ('NVIDIA L40S', 362), ('NVIDIA GeForce RTX 3090', 71),
    ('NVIDIA GeForce RTX 4090', 165.2), ('Tesla T4', 65), ('NVIDIA GeForce RTX 5090', 209.5),
    ('Tesla V100-SXM2-16GB', 125), ('NVIDIA T400', None),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA GeForce RTX 4090 D', None)])
def test_peaks_of_cards(card, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: card)
    assert common.peak_flops('cuda:1') == (peak and peak * 1e12)
    assert common.peak_flops('cpu') is common.peak_flops('mps') is None


def test_peak_memory(monkeypatch):
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 1024 * kilobytes <= common.peak_memory('cpu') < 1100 * kilobytes
    monkeypatch.setattr(sys, 'platform', 'darwin')  # counts in bytes
    assert kilobytes <= common.peak_memory('cpu') < 1.1 * kilobytes
    monkeypatch.setitem(sys.modules, 'resource', None)  # as on Windows
    assert common.peak_memory('cpu') is None is common.peak_memory('mps')


def test_modules_that_windows_lacks_are_not_needed_to_start(tmp_path):
    code = (f'import runpy, sys; sys.path.insert(0, {common.ROOT!r})\n'
            'sys.modules["resource"] = sys.modules["fcntl"] = None\n'
            f'import common; common.lock_folder({str(tmp_path)!r})\n'
            'for script in "train", "prepare", "sample", "analyze":\n'
            '    sys.argv = [script, "--help"]\n'
            '    try: runpy.run_path(f"{common.ROOT}/{script}.py", run_name="__main__")\n'
            '    except SystemExit: pass')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count('--out_dir') >= 2, done.stderr


# --------------------------------------------------------------------------- how scripts are called

SCRIPT = """import sys
sys.path.insert(0, {root!r})
import common
text = 'none'  # a text
out_dir = ''   # a folder
prompt = ''    # said as it is
settings, given = common.load(globals())
"""


def script(tmp_path, rest, *args, hang_up=signal.SIG_DFL, **more):
    """A script as a process; hang_up: what it inherits for SIGHUP, whatever the tests run under."""
    (tmp_path / 'script.py').write_text(SCRIPT.format(root=common.ROOT) + rest)
    return subprocess.Popen([sys.executable, 'script.py', *args], cwd=tmp_path, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up), **more)


def test_home_and_a_terminal_that_is_not_utf8(tmp_path):
    env = {**os.environ, 'PYTHONIOENCODING': 'ascii', 'HOME': '/home/me'}
    done = script(tmp_path, 'print(out_dir, prompt, text)', '--out_dir=~/runs/a',
                  '--prompt=~/bin is', '--text=na\u00efve', env=env)
    assert done.communicate() == ('/home/me/runs/a ~/bin is na\\xefve\n', '')


@pytest.mark.parametrize('by', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_signal_ends_a_script_with_a_sentence(by, tmp_path):
    wait = 'import time\nprint(1, flush=True)\ntime.sleep(60)'
    kept = 'common.if_stopped = "Two of three are in a.csv."\n'
    for rest, sentence in ((wait, 'Nothing is kept.'), (kept + wait, 'Two of three are in a.csv.')):
        process = script(tmp_path, rest)
        assert process.stdout.readline() == '1\n'
        process.send_signal(getattr(signal, by))
        assert process.communicate()[1] == f'script.py: stopped. {sentence}\n'
        assert process.returncode == 130


def test_nohup_is_respected(tmp_path):
    process = script(tmp_path, 'print(1, flush=True)\ninput()', stdin=subprocess.PIPE,
                     hang_up=signal.SIG_IGN)
    assert process.stdout.readline() == '1\n'
    process.send_signal(signal.SIGHUP)
    assert process.communicate('go on\n') == ('', '') and process.returncode == 0


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    rest = 'common.lock_folder(common.results_folder(out_dir))\nprint(1, flush=True)\ninput()'
    first = script(tmp_path, rest, '--out_dir=runs/a', stdin=subprocess.PIPE)
    assert first.stdout.readline() == '1\n'
    _, error = script(tmp_path, rest, '--out_dir=runs/a').communicate()
    assert error == ('script.py: error: another run is at work in runs/a: let it finish, stop it, '
                     'or take another --out_dir\n')
    first.kill()
    first.wait()
    third = script(tmp_path, rest, '--out_dir=runs/a', stdin=subprocess.PIPE)
    assert third.communicate('\n') == ('1\n', '')


def test_results_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise PermissionError(13, 'Permission denied')
    assert common.results_folder(tmp_path / 'a' / 'b') == str(tmp_path / 'a' / 'b')
    assert os.listdir(tmp_path / 'a' / 'b') == []
    monkeypatch.setattr(os, 'makedirs', refuse)
    with pytest.raises(ValueError, match='cannot take results .Permission denied.: name another'):
        common.results_folder(tmp_path / 'c')


def test_commands_are_quoted_and_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(common.ROOT)
    quoted = common.command('python', 'train.py', '--out_dir=my runs')
    assert quoted == "python train.py '--out_dir=my runs'"
    monkeypatch.chdir(tmp_path)
    assert common.command('python', 'train.py') == f'python {common.ROOT}/train.py'
    assert common.command('python', 'other.py') == 'python other.py'


def test_config_files_of_all_kinds(tmp_path, monkeypatch):
    text = '\ufeffimport time\nfrom os.path import join\r\nmax_steps = 7\r\n'
    (tmp_path / 'a.py').write_bytes(text.encode())
    assert load(str(tmp_path / 'a.py'))[1] == {'max_steps'}
    monkeypatch.chdir(tmp_path)  # not there, but where the scripts are
    assert common.read_file('config/mom_demo.py')['chunks'] == '1-4-1'
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'mom_demo.py').write_text('K = 3')
    assert common.read_file('config/mom_demo.py') == {'K': 3}
    (tmp_path / 'b.py').write_bytes('# \u00e9'.encode('latin1'))
    with pytest.raises(ValueError, match='b.py is not UTF-8'):
        common.read_file('b.py')


@pytest.mark.parametrize('argument, message', [
    ('--max_step=3', "did you mean 'max_steps'"), ('--n_layer=4', "did you mean 'chunks'"),
    ('--zzz=3', 'unknown setting'),
    ('--max_steps=1.5', 'takes int'), ('--max_steps=many', "takes int .* not str 'many'"),
    ('--skip=1', 'takes bool'), ('--betas=0.9', 'takes list'),
    ('--learning_rate=True', 'takes float'), ('--skip', '--key=value'),
    ('max_steps=3', 'neither a config file'), ('--max_steps={[]:1}', 'takes int'),
    ('config/mom_dema.py', 'did you mean config/mom_demo.py'), ('zzz.py', 'config/ holds')])
def test_mistakes_name_the_fix(argument, message):
    with pytest.raises(ValueError, match=message):
        load(argument)


def test_a_seed_is_one_that_torch_takes():
    for seed in (0, 2 ** 63 - 1):
        settings, _ = load(f'--seed={seed}', seed=1)
        torch.Generator().manual_seed(settings['seed'])
    for seed in (-1, 2 ** 63):
        with pytest.raises(ValueError, match=f'seed={seed} must be at least 0 and below'):
            load(f'--seed={seed}', seed=1)


def test_an_unknown_key_in_a_file_is_an_error(tmp_path):
    (tmp_path / 'a.py').write_text('learning_rat = 1.0\n')
    message = "a.py: unknown setting 'learning_rat'; did you mean 'learning_rate'"
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / 'a.py'))


CONFIGS = sorted(glob.glob(os.path.join(common.ROOT, 'config', '[a-z]*.py')))


@pytest.mark.parametrize('path', CONFIGS, ids=os.path.basename)
def test_every_config_file_is_one_that_train_takes(path):
    scope = dict(SCRIPTS['train.py'][0])
    settings, given = common.load(scope, [path], model=MoMConfig, without=('vocab_size',))
    base = {}
    if settings['init_from'] in SIZES:  # the width comes with the weights
        n_embd, layers, n_head, _ = SIZES[settings['init_from']]
        base = dict(n_embd=n_embd, n_head=n_head)
        assert 'n_embd' not in given
    values = {f.name: settings[f.name] for f in fields(MoMConfig) if f.name in settings}
    cfg = MoMConfig(**{**values, **base})
    if base:
        assert cfg.n_layer == layers
    with torch.device('meta'):
        GPT(cfg)
    with open(path) as f:
        text = f.read()
    name = os.path.basename(path)
    assert f'train.py config/{name}' in text, 'a config opens with its launch line'
    assert settings['out_dir'] == 'out/' + name[:-3]


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_lists_every_setting_with_its_comment(script):
    done = subprocess.run([sys.executable, script, '--help'], cwd=common.ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert '-----' not in done.stdout  # no banner of the code below the settings
    lines = [line for line in done.stdout.splitlines() if line.startswith('  --')]
    kinds = bool, int, float, str, list
    own = {key for key, value in SCRIPTS[script][0].items() if isinstance(value, kinds)}
    listed = {line.split('=')[0].strip(' -') for line in lines}
    assert own and own <= listed, own - listed
    for line in lines:
        assert len(line.split(None, 1)) == 2 and len(line) > 37, done.stdout
        assert '\\' not in line.split()[0] or "=$'" in line, 'a shell reads \\n in no other quotes'


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_mistake_is_one_sentence_without_traceback(script):
    done = subprocess.run([sys.executable, script, '--nonsense=1'], cwd=common.ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f'{script}: error: --nonsense=1: unknown setting')
    assert done.stderr.count('\n') == 1


def test_a_slip_of_the_code_keeps_its_traceback():
    """Not what `raise` says, but a ValueError of Python itself, such as of unpacking."""
    slip = 'import common; common.load({}, []); common.clock(float("nan"))'
    done = subprocess.run([sys.executable, '-c', slip], cwd=common.ROOT, capture_output=True,
                          text=True)
    assert 'Traceback' in done.stderr and 'in clock' in done.stderr


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


# -------------------------------------------------------------------------- data folders, packaging

def test_advice_on_data_names_what_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, source, words in [
            ('data/openwebtext_gpt2', 'scratch', '--dataset=openwebtext --tokenizer=gpt2'),
            ('data/sotu_bytes', 'out/gpt2_demo', '--dataset=sotu --tokenizer=bytes'),
            ('/my data/sotu_gpt2/', 'gpt2', '--dataset=sotu --tokenizer=gpt2'),
            ('data/mine', 'gpt2-medium', '--dataset=FILE.txt --tokenizer=gpt2')]:
        with pytest.raises(ValueError) as error:
            inputs.read_data(folder, source)
        command = f'python {common.ROOT}/prepare.py {words} ' + shlex.quote(f'--out_dir={folder}')
        assert str(error.value).startswith(
            f'no data in {folder} (no meta.json): make it with {command}')
    torch.save(dict(model={}, model_config={}, meta=dict(tokenizer='bytes')), 'bytes.pt')
    weights.write_folder(GPT(tiny(vocab_size=257)), inputs.tokenizer('bytes'), 'hf')
    for source in 'bytes.pt', 'hf':
        assert '--tokenizer=bytes' in inputs.prepare_command('data/mine', source)
    kill.write_data('data/mine', 2000)  # whole: no advice, and no need to open what will be trained
    assert inputs.read_data('data/mine', __file__)['val_tokens'] == 200


@pytest.mark.parametrize('name', ['sotu_bytes', 'mine'])
def test_advice_spares_files_of_another_program(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    for split in 'train', 'val':
        (folder / f'{split}.bin').write_bytes(b'ab' * 500)
    with pytest.raises(ValueError, match='stay as they are') as error:
        inputs.read_data(str(folder), 'scratch')
    out, = re.findall(r'--out_dir=(\S+)', str(error.value))
    assert out == f'{folder}_prepared' and f'take --data_dir={out},' in str(error.value)


def test_pyproject_lists_every_file_that_is_imported():
    tomllib = pytest.importorskip('tomllib')  # Python 3.11
    with open(os.path.join(common.ROOT, 'pyproject.toml'), 'rb') as f:
        project = tomllib.load(f)
    here = {os.path.basename(path)[:-3] for path in glob.glob(os.path.join(common.ROOT, '*.py'))}
    assert here <= set(project['tool']['setuptools']['py-modules'])
    dynamic = project['tool']['setuptools']['dynamic']
    files = {'dependencies': 'requirements.txt', 'optional-dependencies': 'requirements-dev.txt'}
    for key, file in files.items():
        names = dynamic[key]['file'] if key == 'dependencies' else dynamic[key]['dev']['file']
        assert names == [file] and key in project['project']['dynamic']
        with open(os.path.join(common.ROOT, file)) as f:
            assert all(re.match(r'[a-z0-9-]+[=><]=', line) for line in f)
