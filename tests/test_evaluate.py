"""evaluate.py against transformers, one token at a time, and its tasks against plain logits."""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_model import stir, tiny

import common
import evaluate
import inputs
import sample
from model import GPT

BYTES = inputs.tokenizer('bytes')
TEXT = 'The Union is strong, and it is “one”.\n  So it was, it is; it will be: 1, 2, 3.'
PHI = [dict(chunks='1-1-1'), dict(K=2, H=3), dict(chunks='1-1-1', phi='mod', K=1)]
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec('lm_eval') is None,
                                   reason='lm-eval is not installed')


def bytes_model(std=0.3, **case):
    return stir(GPT(tiny(vocab_size=257, **case)), std=std).eval()


def save(folder):  # a run that train.py could have left
    model = bytes_model(K=2, H=3, block_size=64)
    torch.save({'model': model.state_dict(), 'model_config': vars(model.cfg),
                'meta': {'tokenizer': 'bytes'}}, folder / 'last.pt')
    return model


def run(folder, *args):  # the script -> what it wrote, and what it printed
    done = subprocess.run(
        [sys.executable, 'evaluate.py', f'--source={folder}', f'--out_dir={folder}/results', *args],
        cwd=common.ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, 'HF_HOME': str(folder / 'hub'), 'HF_HUB_OFFLINE': '1'})
    written, = folder.glob('results/*/*.json')
    return json.loads(written.read_text()), done.stdout


def refused(monkeypatch, folder, message, **wrong):
    here = dict(source=str(folder), out_dir=str(folder / 'results'))
    with monkeypatch.context() as patch:
        for name, value in {**here, **wrong}.items():
            patch.setattr(evaluate, name, value)
        with pytest.raises(ValueError, match=message):
            evaluate.main()
    assert not [*folder.glob('results/*/*')]


# ----------------------------------------------------------------------------- perplexity

@pytest.mark.parametrize('length, stride', [
    (1, 8), (16, 1), (17, 5), (17, 16), (70, 1), (70, 5), (70, 16)])
def test_perplexity_is_that_of_one_token_at_a_time(length, stride, tmp_path):
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=16, vocab_size=257, bos_token_id=0,
        eos_token_id=0))
    stir(hf.eval(), std=0.3).save_pretrained(tmp_path)
    text = TEXT.encode()[:length].decode(errors='ignore')
    ids = [256, *text.encode()]
    end, nats = min(16, len(ids) - 1), 0.0
    for at in range(1, len(ids)):
        if at > end:  # the window moves on
            end = min(end + stride, len(ids) - 1)
        seen = torch.tensor([ids[max(0, end - 16):at]])
        with torch.no_grad():
            nats -= hf(seen).logits[0, -1].log_softmax(-1)[ids[at]].item()
    model = GPT.from_pretrained(str(tmp_path)).eval()
    got = evaluate.perplexity(model, BYTES, text, stride, batch_size=3)
    assert got['nats'] == pytest.approx(nats, rel=1e-5) and nats > 1
    assert (got['tokens'], got['bytes']) == (len(text.encode()), len(text.encode()))
    assert got['words'] == len(text.split())
    assert got['token_perplexity'] == pytest.approx(math.exp(nats / len(text.encode())), rel=1e-4)
    assert got['word_perplexity'] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-3)
    assert got['bits_per_byte'] == pytest.approx(nats / len(text.encode()) / math.log(2), rel=1e-5)


@pytest.mark.parametrize('case', PHI, ids=str)
def test_padding_and_order_change_nothing(case):
    model = bytes_model(**case)
    lengths = [(3, 1), (25, 24), (10, 4), (25, 1), (2, 1), (17, 16)]
    pieces = [(torch.randint(0, 200, (length,)).tolist(), n) for length, n in lengths]
    pieces[0][0][-1] = model(torch.tensor([pieces[0][0][:-1]]))[0][0, -1, :200].argmax().item()
    for batch_size in 1, 4:
        scores = evaluate.score(model, pieces, 200, batch_size)  # a tokenizer of 200 ids
        for (ids, n), (log_p, greedy) in zip(pieces, scores):
            logits = model(torch.tensor([ids[:-1]]))[0][0, -n:, :200]
            want = logits.log_softmax(-1)[range(n), ids[-n:]].sum().item()
            assert log_p == pytest.approx(want, rel=1e-4)
            assert greedy == (logits.argmax(-1).tolist() == ids[-n:])
        assert [greedy for _, greedy in scores] == [True] + 5 * [False]


def test_the_script_prints_and_writes_the_same(tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT, encoding='utf-8')
    model = save(tmp_path)
    written, printed = run(tmp_path, f'--text={tmp_path}/a.txt', '--stride=7', '--batch_size=2')
    want = evaluate.perplexity(model, BYTES, TEXT, 7, 1)
    assert written['nats'] == pytest.approx(want['nats'], rel=1e-5)
    assert f'{want["bits_per_byte"]:.4f} bits per byte' in printed
    assert written['stride'] == 7 and written['config']['model_sha'] == model.fingerprint()


def test_what_no_float_can_hold_is_null(tmp_path):
    model = save(tmp_path)
    model.ln_f.weight.data.fill_(3e4)
    torch.save({'model': model.state_dict(), 'model_config': vars(model.cfg),
                'meta': {'tokenizer': 'bytes'}}, tmp_path / 'last.pt')
    (tmp_path / 'a.txt').write_text('abcdefgh' * 20)
    written, printed = run(tmp_path, f'--text={tmp_path}/a.txt')
    assert written['nats'] > 700 * written['tokens'] and written['bits_per_byte'] > 1000
    assert written['token_perplexity'] is None and written['word_perplexity'] is None
    assert 'perplexity inf per token, inf per word' in printed


def test_mistakes_name_the_fix(tmp_path, monkeypatch):
    save(tmp_path)
    (tmp_path / 'a.txt').write_text(TEXT, encoding='utf-8')
    (tmp_path / 'empty.txt').write_text('')
    text = str(tmp_path / 'a.txt')
    for message, wrong in [
            ('say what to evaluate', {}),
            ('cannot be read .No such file or directory.: give a text file',
             dict(text='nowhere.txt')),
            ('is empty', dict(text=str(tmp_path / 'empty.txt'))),
            ('stride=65 must be 1 to block_size=64', dict(text=text, stride=65)),
            ('batch_size=0', dict(text=text, batch_size=0)),
            ('limit=-1', dict(text=text, limit=-1)),
            ("dtype='float16'", dict(text=text, dtype='float16'))]:
        refused(monkeypatch, tmp_path, message, **wrong)
    model = stir(GPT(tiny()))
    torch.save({'model': model.state_dict(), 'model_config': vars(model.cfg),
                'meta': {'tokenizer': 'bytes'}}, tmp_path / 'last.pt')
    refused(monkeypatch, tmp_path, 'knows 50 kinds of token', text=text)


def test_tasks_without_lm_eval_name_the_fix(monkeypatch):
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setitem(sys.modules, 'lm_eval.tasks', None)
    with pytest.raises(ValueError, match='pip install lm-eval'):
        evaluate.find_tasks('hellaswag')


# ----------------------------------------------------------------------------- lm-eval

@pytest.mark.parametrize('case', PHI, ids=str)
def test_texts_are_continued_until_they_should_end(case):
    model = bytes_model(**case)
    prompts = ['ab', 'The state of the Union is', '', 'x']
    got = evaluate.continue_texts(model, BYTES, prompts, {'max_gen_toks': 8, 'until': ['\0' * 9]})
    for prompt, new in zip(prompts, got):
        ids = list(prompt.encode())[-16:] or [256]  # block_size 24 less 8 new ones
        with torch.no_grad():
            for _ in range(8):
                ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        ids = ids[-8:]
        assert new == BYTES.decode(ids[:ids.index(256)] if 256 in ids else ids)
    whole = max(got, key=len)
    assert len(set(whole)) > 1
    end = whole[-1]
    cut = evaluate.continue_texts(model, BYTES, prompts, {'max_gen_toks': 8, 'until': end})
    assert cut == [new.split(end)[0] for new in got]
    with pytest.raises(ValueError, match='set max_gen_toks'):
        evaluate.continue_texts(model, BYTES, prompts, {})


def test_what_ends_early_is_not_continued_to_the_last_token(monkeypatch):
    model, prompts = bytes_model(K=2, H=3, block_size=64), ['ab', 'The Union is', 'x']
    want = []
    for prompt in prompts:
        ids = list(prompt.encode())
        with torch.no_grad():
            for _ in range(40):
                ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        ids = ids[len(prompt):]
        want.append(BYTES.decode(ids[:ids.index(256)] if 256 in ids else ids))
    sizes, real = [], sample.generate
    monkeypatch.setattr(sample, 'generate', lambda model, idx, new, **how: (
        sizes.append((len(idx), new)) or real(model, idx, new, **how)))
    how = {'max_gen_toks': 40, 'until': []}
    assert evaluate.continue_texts(model, BYTES, prompts, how) == want
    assert sum(new for _, new in sizes) == 40 and sizes[0] == (3, 16)
    sizes.clear()
    ends = [text[5] for text in want]
    got = evaluate.continue_texts(model, BYTES, prompts, {**how, 'until': ends})
    assert got == [re.split('|'.join(map(re.escape, ends)), text)[0] for text in want]
    assert sizes == [(3, 16)]


DOCUMENTS = [{'question': 'The Union is', 'choices': [' strong', ' weak', ' it'], 'answer': 1},
             {'question': 'We the people of ' * 5, 'choices': [' a', ' the States'], 'answer': 0},
             {'question': 'One and', 'choices': [' two', ' three', ' four'], 'answer': 2}]
TASKS = {
    'choose': 'output_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n'
              'doc_to_target: answer\nmetric_list: [{metric: acc}]\n',
    'read': 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: question\n'
            'metric_list: [{metric: bits_per_byte}]\n',
    'write': 'output_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n'
             'generation_kwargs: {max_gen_toks: 9, until: ["\\n"]}\n'
             'metric_list: [{metric: exact_match}]\n'}


@needs_lm_eval
def test_tasks_of_local_files(tmp_path):
    model = save(tmp_path)
    lines = [json.dumps(document) + '\n' for document in DOCUMENTS]
    (tmp_path / 'documents.jsonl').write_text(''.join(lines))
    (tmp_path / 'tasks').mkdir()
    for name, task in TASKS.items():
        (tmp_path / 'tasks' / f'{name}.yaml').write_text(
            f'task: {name}\ndataset_path: json\ntest_split: test\n{task}'
            f'dataset_kwargs: {{data_files: {{test: {tmp_path}/documents.jsonl}}}}\n')
    written, printed = run(tmp_path, f'--tasks={",".join(TASKS)}', f'--tasks_dir={tmp_path}/tasks')
    results = written['results']

    def log_p(question, answer):  # from plain logits, of the last 64 bytes
        ids = torch.tensor(list((question + answer).encode()))[-65:]
        n = len(answer.encode())
        with torch.no_grad():
            logits = model(ids[None, :-1])[0][0, -n:]
        return logits.log_softmax(-1)[range(n), ids[-n:]].sum().item()
    right = 0
    for d in DOCUMENTS:
        scores = [log_p(d['question'], choice) for choice in d['choices']]
        right += scores.index(max(scores)) == d['answer']
    assert results['choose']['acc,none'] == pytest.approx(right / 3)
    nats = sum(evaluate.perplexity(model, BYTES, d['question'], 64, 1)['nats'] for d in DOCUMENTS)
    count = sum(len(d['question']) for d in DOCUMENTS)
    bits = nats / count / math.log(2)
    assert results['read']['bits_per_byte,none'] == pytest.approx(bits, rel=1e-4)
    assert results['write']['exact_match,none'] == 0
    assert written['config']['model_sha'] == model.fingerprint()
    assert '|choose' in printed and 'texts are longer than block_size=64' in printed


@needs_lm_eval
def test_an_unknown_task_names_the_fix(monkeypatch):
    monkeypatch.setattr(sys, 'path', [*sys.path])
    with pytest.raises(ValueError, match="no task 'helaswag'; near it are .*hellaswag"):
        evaluate.find_tasks('helaswag')
    assert evaluate.find_tasks('lambada_openai, hellaswag')[1] == ['hellaswag', 'lambada_openai']


def test_the_harness_without_lm_eval(monkeypatch):
    for name in ('lm_eval', 'lm_eval.api', 'lm_eval.api.model'):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(TemplateLM=object))
    model = bytes_model(K=2, H=3)
    lm, texts = evaluate.harness(model, BYTES, 2, {}), [TEXT, 'One', TEXT[9:40]]
    rolled = lm.loglikelihood_rolling([SimpleNamespace(args=(one,)) for one in texts])
    want = [-evaluate.perplexity(model, BYTES, one, 24, 1)['nats'] for one in texts]
    assert rolled == pytest.approx(want, rel=1e-5)
    asked = [('ab', {'max_gen_toks': 5}), ('The Union', {'max_gen_toks': 3}),
             ('A text, 12', {'max_gen_toks': 5})]
    alone = [evaluate.continue_texts(model, BYTES, [prompt], how)[0] for prompt, how in asked]
    assert lm.generate_until([SimpleNamespace(args=one) for one in asked]) == alone
    found, = lm._loglikelihood_tokens([('', list(range(60)), [7, 8])])
    assert found == evaluate.score(model, [([*range(60), 7, 8][-25:], 2)], 257, 1)[0]
    assert len(set(alone)) == 3
    # lm-eval leaves no context of a blank one; the first token follows the end of a text then.
    found, = lm._loglikelihood_tokens([('', [], [32, 8])])
    assert found == evaluate.score(model, [([256, 32, 8], 2)], 257, 1)[0]
