"""What every script shares: settings, files, devices, processes.

A script declares its settings as plain assignments at its top, then calls `load(globals())`:

    learning_rate = 1e-3  # peak learning rate

    settings, given = common.load(globals())

Config files (`config/*.py`, plain assignments too) and `--key=value` arguments override them, in
the order of the command line. Every key and every type is checked.
"""
import ast
import codecs
import csv
import difflib
import errno
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import traceback
import types
from contextlib import contextmanager
from dataclasses import asdict

ROOT = os.path.dirname(os.path.abspath(__file__))
EOT = '<|endoftext|>'

# ----------------------------------------------------------------------------- settings

defaults = {}  # of the settings that load() resolved
if_stopped = 'Nothing is kept.'  # what Ctrl-C ends a script with: what is kept, and how to go on


def load(scope, argv=None, model=None, without=()):
    """Override a script's settings from config files and `--key=value` arguments.

    scope: the script's `globals()`. Its settings are the names that hold a bool, int, float, str
    or list so far and do not start with an underscore. argv: the arguments (default: `sys.argv`).
    model: a dataclass, MoMConfig. Its fields are settings too, but for those named in `without`;
    where scope has a setting of that name, scope's default counts.
    Returns (settings, given): the resolved settings as a dict, and the set of keys that the files
    or the arguments set. scope then holds the resolved values of its own settings, not the model's.
    Where a script has a setting `mode`, it may stand alone: `bench.py runs`. A value that begins
    with `~` is a path in the user's home, a prompt excepted.
    Raises ValueError for an unknown key, a value of the wrong type or a missing file; prints all
    keys with their comments and exits on `--help`. From here on an error of the user's is one
    sentence, and Ctrl-C, SIGTERM and SIGHUP end the script with `if_stopped` and the status 130.
    """
    sys.excepthook = _sentence_instead_of_traceback
    argv = sys.argv[1:] if argv is None else [*argv]
    if scope.get('__name__') == '__main__':
        for stop in ('SIGTERM', 'SIGHUP'):  # Windows has no SIGHUP; nohup ignores it
            if hasattr(signal, stop) and signal.getsignal(getattr(signal, stop)) == signal.SIG_DFL:
                signal.signal(getattr(signal, stop), signal.default_int_handler)
        if hasattr(sys.stdout, 'reconfigure'):  # what a terminal cannot show is spelt, as \\u2014
            sys.stdout.reconfigure(errors='backslashreplace')
    own = {k: v for k, v in scope.items()
           if not k.startswith('_') and isinstance(v, (bool, int, float, str, list))}
    fields = asdict(model()) if model else {}
    fields = {k: v for k, v in fields.items() if k not in own and k not in without}
    settings = own | fields
    defaults.clear()
    defaults.update(settings)
    if '--help' in argv or '-h' in argv:
        print(_help(scope, own, model, fields))
        sys.exit(0)
    given = set()
    for arg in argv:
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            if not equals:
                raise ValueError(f'{arg}: settings are written --key=value, for example --{key}=1')
            values = {key: _parse(text, settings.get(key))}
        elif arg.endswith('.py'):
            values = read_file(arg)
        elif 'mode' in settings:
            values = {'mode': arg}
        else:
            raise ValueError(f'{arg!r} is neither a config file (config/NAME.py) nor a --key=value '
                             'setting')
        for key, value in values.items():
            _check_known(key, settings, arg)
            value = _typed(key, value, settings[key], arg)
            texts = ('prompt', 'split_on', 'separator')
            if isinstance(value, str) and value.startswith('~') and key not in texts:
                value = os.path.expanduser(value)
            settings[key] = value
            given.add(key)
    seed = settings.get('seed', 0)
    if not 0 <= seed < 2 ** 63:  # torch takes no larger one
        raise ValueError(f'seed={seed} must be at least 0 and below 2^63')
    scope.update((k, settings[k]) for k in own)
    return settings, given


def read_file(path):
    """The assignments of a config file as a dict; names starting with `_` are the file's own.

    A relative path may start at the current folder or at that of the scripts.
    """
    found = path if os.path.isfile(path) else os.path.join(ROOT, path)
    if not os.path.isfile(found):
        have = sorted(f for f in os.listdir(os.path.join(ROOT, 'config')) if f.endswith('.py'))
        near = difflib.get_close_matches(os.path.basename(path), have, 1)
        raise ValueError(f'no config file {path}'
                         + (f'; did you mean config/{near[0]}?' if near else
                            f'; config/ holds {", ".join(have)}'))
    values = {}
    exec(compile(read_text(found), found, 'exec'), values)
    return {k: v for k, v in values.items()
            if not (k.startswith('_') or callable(v) or isinstance(v, types.ModuleType))}


# nanoGPT's names that are not like ours.
OF_NANOGPT = {'n_layer': 'chunks', 'gradient_accumulation_steps': 'micro_batch',
              'eval_only': 'max_steps', 'start': 'prompt', 'wandb_log': 'track'}


def _check_known(key, settings, where):
    if key not in settings:
        near = [OF_NANOGPT[key]] if OF_NANOGPT.get(key) in settings else (
            difflib.get_close_matches(key, settings, 1, cutoff=0.5))
        raise ValueError(f'{where}: unknown setting {key!r}'
                         + (f'; did you mean {near[0]!r}?' if near else '')
                         + ' (--help lists all of them)')


def _parse(text, default):
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text  # not a Python value: _typed says what was wanted


def _typed(key, value, default, where):
    if type(default) is float and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f'{where}: {key} takes {type(default).__name__} (default {default!r}), '
                         f'not {type(value).__name__} {value!r}')
    return value


def changed(settings):
    """The settings that are not as by default, as lines of words."""
    pairs = (f'{k}\0=\0{v!r}' for k, v in settings.items() if v != defaults[k])
    lines = textwrap.fill(', '.join(pairs), 100, break_long_words=False, break_on_hyphens=False)
    return lines.replace('\0', ' ')  # a line ends between pairs


def _help(scope, own, model, fields):
    def described(key, default, comment):
        default = '$' * ('\\' in default) + default  # a shell reads \n in $'\n' alone
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
    """What a `raise ValueError` of ours says is a user's mistake: its sentence alone says the fix.
    Everything else, Python's and torch's ValueErrors included, keeps its traceback."""
    script = os.path.basename(sys.argv[0])
    if kind is KeyboardInterrupt:
        if os.environ.get('RANK', '0') == '0':
            print(f'{script}: stopped. {if_stopped}', file=sys.stderr, flush=True)
        if 'RANK' in os.environ:
            os._exit(130)  # see leave_processes
        sys.exit(130)
    last = traceback.extract_tb(trace)[-1]
    folder = os.path.dirname(os.path.abspath(last.filename))
    ours = folder in (ROOT, os.path.join(ROOT, 'config')) and last.line.startswith('raise')
    if kind in (FileExistsError, NotADirectoryError):  # from makedirs
        kind, ours = ValueError, True
        error = f'{error.filename} is a file, where a folder has to be: name another'
    if kind is OSError and error.errno in (errno.ENOSPC, errno.EDQUOT):
        kind, ours = ValueError, True
        error = f'{error.strerror}: make room, then give the same command again'
    if kind is ValueError and ours:
        print(f'{script}: error: {error}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# ----------------------------------------------------------------------------- files

@contextmanager
def atomic_write(path):
    """`with atomic_write(path) as f:` writes bytes to a temporary name, flushes and renames it.

    A reader, or a crash, sees the old file or the new one, never a part. An error leaves the old
    one.
    """
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


def write_text(path, text):
    """A text file, whole or not at all."""
    with atomic_write(path) as f:
        f.write(text.encode())


def seal(facts):
    """The SHA-256 of a dict of plain values, in hexadecimal: meta.json has that of all else in
    it."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


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
    except (FileExistsError, NotADirectoryError) as error:
        there = path
        while there and not os.path.exists(there):
            there = os.path.dirname(there)
        raise ValueError(f'{there} is a file, where a folder has to be: name another') from error
    except OSError as error:
        raise ValueError(f'{path} cannot take results ({error.strerror}): name another folder with '
                         '--out_dir=FOLDER') from error
    return path


def link(path, other):
    """Make `other` the file that `path` is, at once: by a hard link, or a copy if there are
    none."""
    part = f'{other}.part'
    if os.path.exists(part):  # a kill in this place left it
        os.unlink(part)
    if os.path.exists(other) and os.path.samefile(path, other):
        return
    try:
        os.link(path, part)
    except OSError:
        shutil.copyfile(path, part)
    os.replace(part, other)


_locks = {}  # folder -> its lock file, open until this process ends


def lock_folder(path):
    """Keep other runs out of a folder until this process ends. ValueError if one is in it."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return
    where = os.path.realpath(path)
    if where in _locks:
        return
    file = open(os.path.join(path, '.lock'), 'w')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'another run is at work in {path}: let it finish, stop it, or take '
                         'another --out_dir') from None
    except OSError:  # a file system without locks
        pass
    _locks[where] = file


def locked_files():
    """File descriptors of this process's locks: a child that inherits them holds the locks too."""
    return [file.fileno() for file in _locks.values()]


def command(*words):
    """Words as a command line that a shell takes as it is, with our scripts named from any
    folder."""
    words = [str(word) for word in words]
    for i, word in enumerate(words):
        script = os.path.join(ROOT, word)
        if word.endswith('.py') and os.path.isfile(script) and not os.path.isfile(word):
            words[i] = script
    return shlex.join(words)


def read_text(path):
    """The text of a file in UTF-8, without its byte-order mark; line ends stay as they are.

    Raises ValueError if it is another encoding or cannot be read.
    """
    with open_utf8(path) as f:
        return f.read().decode('utf-8-sig')


@contextmanager
def open_utf8(path):
    """`with open_utf8(path) as f:` reads the bytes of a UTF-8 file, unpacked if it is .gz or .zst.

    Raises ValueError if it cannot be read, looks like UTF-16, or does not decode in the block.
    """
    path = os.path.expanduser(path)
    try:
        packed = {'.gz': 'gzip', '.zst': 'zstd'}.get(os.path.splitext(path)[1].lower())
        if packed:
            import pyarrow  # it tells a file that was cut, and needs no package for .zst
            file = pyarrow.input_stream(path, compression=packed)
        else:
            file = open(path, 'rb', buffering=0)
        with io.BufferedReader(file, 1 << 16) as f:
            if encoding := _utf_16_or_32(f.peek(4096)):
                fix = _convert(path, encoding)
                raise ValueError(f'{path} is {encoding.upper()}, not UTF-8: {fix}')
            yield f
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 ({error.reason}): save it as UTF-8; if it is '
                         'latin1, ' + _convert(path, 'latin1')) from error
    except OSError as error:
        told = error.strerror or ' '.join(str(error).split())
        raise ValueError(f'{path} cannot be read ({told}): give a text file that can, or fetch it '
                         'again') from error


def _utf_16_or_32(head):  # the encoding that the first bytes of a file betray, or None
    marks = {codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
             codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
    for mark, encoding in marks.items():
        if head.startswith(mark):
            return encoding
    even, odd = head[::2].count(0), head[1::2].count(0)  # no mark: every other byte of ASCII is 0
    if max(even, odd) > 1 + len(head) / 100 and min(even, odd) < max(even, odd) / 10:
        return 'utf-16be' if even > odd else 'utf-16le'
    return None


def _convert(path, encoding):
    stem, ending = os.path.splitext(path)
    if ending.lower() in ('.gz', '.zst'):
        return f'unpack it, and iconv -f {encoding} -t utf-8'
    convert = command('iconv', '-f', encoding, '-t', 'utf-8', path)
    return f'{convert} > {command(f"{stem}.utf8{ending}")}'


def run_name(source):
    """What to call a run by: mom_demo for out/mom_demo, and for a checkpoint in it,
    out/mom_demo/last.pt; of the folder of a seed, out/xsum_gpt2/seed1, xsum_gpt2_seed1."""
    folder = os.path.dirname(source) if source.endswith('.pt') else source
    above, name = os.path.split(os.path.abspath(folder))
    return f'{os.path.basename(above)}_{name}' if re.fullmatch(r'seed\d+', name) else name


def whole_lines(file):
    """The lines of a text file but for what a kill or a power cut leaves: half a line, NULs."""
    return [line for line in file if line.endswith('\n') and '\0' not in line]


def log_rows(file, path):
    """The rows of an open log.csv: dicts of words, each a number or ''. Without its head, none.

    Raises ValueError, naming path and row, for one that is damaged.
    """
    rows = list(csv.DictReader(whole_lines(file)))
    if rows and 'step' not in rows[0]:
        return []
    for row in rows:
        try:
            int(row['step'])
            [float(word) for word in row.values() if word != '']
        except (TypeError, ValueError) as error:
            raise ValueError(f'{path}: {",".join(map(str, row.values()))} is no row of a log: '
                             'delete that line') from error
    return rows


def read_log(folder):
    """log.csv of a run of train.py -> rows of its steps, and of its validations: dicts of words.

    Raises ValueError if there are none, or one is damaged.
    """
    path = os.path.join(folder, 'log.csv')
    if not os.path.isfile(path):
        raise ValueError(f'{folder} has no log.csv: name the directory of a run of train.py')
    with open(path, newline='', errors='replace') as f:
        rows = log_rows(f, path)
    steps, val = ([row for row in rows if row.get(key)] for key in ('loss', 'val_loss'))
    if not steps or not val:
        raise ValueError(f'{folder} has no finished steps yet: resume that run, or name another')
    return steps, val


def tracker(name, folder, settings, step):
    """A second log of a run in `folder`, from a step on -> send(step, {name: number}), end().

    name: 'wandb', 'trackio', 'tensorboard', or '' for none; imported only here.
    """
    if not name:
        return (lambda step, row: None), (lambda: None)
    if name == 'tensorboard':
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder, purge_step=step + 1)  # later steps are done again
        writer.add_text('settings', json.dumps(settings, indent=1))

        def send(step, row):
            for key, value in row.items():
                writer.add_scalar(key, value, step)
        return send, writer.close
    tool = importlib.import_module(name)  # the two are called alike
    tool.init(project='mixture-of-modules', name=run_name(folder), config=settings)
    return (lambda step, row: tool.log(row, step=step)), tool.finish


def clock(seconds):
    """Seconds as 1:02:03."""
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'


# ----------------------------------------------------------------------------- devices, processes

def find_device(device):
    """'auto', or a kind of device, or one of them such as 'cuda:1' -> where to run.

    The kinds are 'cpu', 'cuda' (NVIDIA's cards, and AMD's by ROCm), 'mps' (Apple's) and 'xpu'
    (Intel's); auto is what this machine has beside its CPU. Raises ValueError for others.
    """
    import torch
    there = torch.accelerator.current_accelerator(check_available=True)
    there = there.type if there else 'cpu'
    if device == 'auto':
        return there
    if not re.fullmatch(r'cpu|(cuda|mps|xpu)(:\d+)?', device):
        raise ValueError(f"device={device!r} must be 'auto', 'cpu', 'cuda', 'mps' or 'xpu'")
    kind, _, number = device.partition(':')
    if kind not in ('cpu', there) or int(number or 0) >= max(1, torch.accelerator.device_count()):
        raise ValueError(f'device={device}, but torch sees no such GPU: take --device={there}')
    return device


def find_dtype(dtype, device, else_='float32'):
    """'auto', 'bfloat16', 'float16' or 'float32' -> the type of autocast on a device.

    auto is bfloat16 on GPUs that have it, `else_` on CUDA cards that emulate it (V100, T4), and
    float32 on others. Raises ValueError for other types.
    """
    import torch
    if dtype not in ('auto', 'bfloat16', 'float16', 'float32'):
        raise ValueError(f"dtype={dtype!r} must be 'auto', 'bfloat16', 'float16' or 'float32'")
    if dtype != 'auto':
        return dtype
    if device.startswith('cuda'):
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else else_
    return 'bfloat16' if device.startswith('xpu') else 'float32'


# Dense 16-bit FLOP/s with sums in fp32, in 10^12: bf16, and fp16 of V100 and T4.
PEAKS = {
    'A10': 125, 'A100': 312, 'A40': 149.7,            # NVIDIA's data sheets of these cards
    'A10G': 70, 'L4': 121, 'L40S': 362,               # likewise; half of L4's, L40S's sparse one
    'H100': 989, 'H100 PCIe': 756, 'H100 NVL': 835,   # H100 data sheet, half of that with sparsity
    'H200': 989, 'H200 NVL': 835, 'GH200': 990,       # H200 and GH200 data sheets, likewise
    'B200': 2250, 'GB200': 2500,                      # HGX B200, GB200 NVL72 data sheets, likewise
    'RTX 3090': 71,                                   # GA102 white paper, appendix A
    'RTX 4090': 165.2,                                # Ada white paper, appendix A
    'RTX 5090': 209.5,                                # RTX Blackwell white paper, appendix A
    'V100': 125, 'V100-PCIE': 112, 'T4': 65}          # V100 and T4 data sheets


def peak_flops(device):
    """FLOP/s of a card in 16 bits by its data sheet; None for a CPU or a card not listed."""
    import torch
    if not device.startswith('cuda'):
        return None
    card = torch.cuda.get_device_name(device)
    if 'Laptop' in card or card.endswith(' D'):  # other chips of the same name
        return None
    names = [name for name in PEAKS if re.search(rf'\b{name}\b', card)]
    return PEAKS[max(names, key=len)] * 1e12 if names else None


def peak_memory(device):
    """The most bytes that this process has held on a device, or None where nobody counts."""
    import torch
    if device.startswith(('cuda', 'xpu')):
        return torch.accelerator.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None if device != 'cpu' else most if sys.platform == 'darwin' else 1024 * most


def to_device(tensor, device):
    """A tensor of the CPU on `device`. CUDA copies from pinned memory, and does not wait for it."""
    if device.startswith('cuda'):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def join_processes(device):
    """Join torchrun's other processes -> this one's device, such as 'cuda:3'.

    They talk by NCCL on CUDA, XCCL on XPU and gloo on the CPU. Raises ValueError for a kind of
    device of which a machine has one.
    """
    import torch
    import torch.distributed as dist
    kind = device.partition(':')[0]
    backend = {'cpu': 'gloo', 'cuda': 'nccl', 'xpu': 'xccl'}.get(kind)
    if not backend:
        raise ValueError(f'several processes cannot share device={kind}: start one, or take '
                         '--device=cpu')
    if kind != 'cpu':
        device = f'{kind}:{os.environ["LOCAL_RANK"]}'
        torch.accelerator.set_device_index(int(os.environ['LOCAL_RANK']))
    store, rank, world = next(dist.rendezvous('env://'))
    if os.environ.get('GROUP_WORLD_SIZE') == '1':  # torchrun on one machine
        # Its store outlives the processes: without keys of their own, those that it starts again
        # may find the addresses of the dead (github.com/pytorch/pytorch/issues/135712). On several
        # machines the counts of restarts can differ.
        store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                            device_id=None if kind == 'cpu' else torch.device(device))
    return device


def all_sum(device, *numbers):
    """Numbers summed over all processes, as floats."""
    import torch
    import torch.distributed as dist
    if not dist.is_initialized():
        return [float(number) for number in numbers]
    fp64 = device.startswith(('cpu', 'cuda'))  # some of Intel's GPUs have none
    total = torch.tensor(numbers, dtype=torch.float64 if fp64 else torch.float32, device=device)
    dist.all_reduce(total)
    return total.tolist()


def agree(**facts):
    """Raises ValueError, in all processes, if one of them has other facts than the first."""
    import socket

    import torch.distributed as dist
    if not dist.is_initialized():
        return
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), facts))
    (first_host, first), *others = everyone
    for rank, (host, other) in enumerate(others, 1):
        for name in first:
            if other[name] != first[name]:
                raise ValueError(
                    f'process {rank} on {host} has another {name} than process 0 on {first_host}: '
                    'give all machines the same command, and the same files (a shared disk)')


def leave_processes():
    """The last call of a script that joined others: wait for them, then end, with status 0.

    It ends without Python's own clearing up: gloo's threads live on in it, and one that lets go of
    a tensor while the interpreter is taken down aborts the process, though its work is done
    (github.com/pytorch/pytorch/issues/190489).
    """
    import torch.distributed as dist
    dist.barrier()  # who leaves while another still talks to it is an error to that one
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
