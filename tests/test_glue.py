"""finetune_glue.py: small files of sentences made here, tiny models, oracles written out below."""
import contextlib
import copy
import fcntl
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import datasets
import numpy as np
import pytest
import torch
import transformers
from test_train import shell
from test_xsum import write

import common
import finetune
import finetune_glue as glue
import inputs
from model import GPT, MoMConfig
from tests import kill
from weights import load_checkpoint, load_file

COLUMNS = {  # those of nyu-mll/glue
    'cola': ['sentence'], 'sst2': ['sentence'], 'mrpc': ['sentence1', 'sentence2'],
    'rte': ['sentence1', 'sentence2'], 'stsb': ['sentence1', 'sentence2'],
    'qqp': ['question1', 'question2'], 'qnli': ['question', 'sentence'],
    'mnli': ['premise', 'hypothesis']}
TESTS = {'cola': ['test'], 'rte': ['test'], 'stsb': ['test'],
         'mnli': ['test_matched', 'test_mismatched']}
ENDING = {'sst2': 'csv', 'cola': 'tsv', 'mrpc': 'parquet', 'qnli': 'csv'}  # the others .jsonl
GOOD, BAD = ['wonderful', 'superb', 'delightful'], ['dreadful', 'tedious', 'awful']


def sentence(rng, word):
    blanks = (['film', 'play', 'novel', 'concert'], ['by', 'about', 'from'],
              ['two old friends', 'a small town', 'the sea', 'an "honest" thief'],
              ['rather', 'simply', 'truly'])
    pick = [rng.choice(words) for words in blanks]
    return 'The {} {} {}, some say, is {} {}.'.format(*pick, word)


def rows_of(task, n, seed, labelled=True):
    """n rows; the words say which label is right, 60% of one kind. STS-B's score is 4 for equal
    words, else 1."""
    rng, rows, columns = np.random.default_rng(seed), [], COLUMNS[task]
    classes = 3 if task == 'mnli' else 2
    for i in range(n):
        kind = int(i % 5 < 3) if classes == 2 else int(rng.integers(3))
        words = [str(rng.choice((GOOD, BAD)[kind == 0])) for _ in columns]
        if task == 'stsb':
            words[-1] = words[0] if kind else str(rng.choice(BAD if words[0] in GOOD else GOOD))
        if kind == 2:
            words[-1] = 'about the weather'
        label = (4.25 if kind else 1.5) if task == 'stsb' else kind
        texts = {c: sentence(rng, word) for c, word in zip(columns, words)}
        rows.append({**texts, 'label': label, 'idx': i})
        if not labelled:
            rows[-1]['label'] = -1
    return rows


def write_task(folder, task, train=24, validation=10, test=7):
    validations = ['validation']
    if task == 'mnli':
        validations = ['validation_matched', 'validation_mismatched']
    splits = {'train': train, **{v: validation for v in validations},
              **{t: test for t in TESTS.get(task, [])}}
    for seed, (split, n) in enumerate(splits.items()):
        rows = rows_of(task, n, seed, labelled=not split.startswith('test'))
        write(folder / task / f'{split}.{ENDING.get(task, "jsonl")}', rows)


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('glue')
    for task in COLUMNS:
        write_task(folder, task)
    return folder


SHAPES = {
    'vanilla': dict(chunks='1-1-1'), 'mom': dict(chunks='1-3', K=2, H=2, router_dim=8),
    'mod': dict(chunks='1-1-1-1', phi='mod', K=1, capacity=0.3, router='linear', router_dim=8),
    'moe_share': dict(chunks='1-3', phi='moe_share', K=2, router_dim=8, balance=0.01)}


def build(system, seed=1):
    torch.manual_seed(seed)
    return GPT(MoMConfig(**SHAPES[system], n_embd=32, n_head=2, block_size=96, vocab_size=257))


@pytest.fixture(scope='session')
def sources(tmp_path_factory):
    """A checkpoint as train.py makes them, of each system: untrained, which is enough here."""
    folder = tmp_path_factory.mktemp('sources')
    for system in SHAPES:
        model = build(system)
        content = dict(model=model.state_dict(), model_config=asdict(model.cfg),
                       meta=dict(tokenizer='bytes'))
        torch.save(content, folder / f'{system}.pt')
    return {system: folder / f'{system}.pt' for system in SHAPES}


def run(*args):
    """The script in this process, which saves the time of imports -> stdout; a mistake raises."""
    argv, hook, out = sys.argv, sys.excepthook, io.StringIO()
    sys.argv = ['finetune_glue.py', *map(str, args), '--device=cpu']
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(os.path.join(common.ROOT, 'finetune_glue.py'), run_name='__main__')
    finally:
        sys.argv, sys.excepthook = argv, hook
    return out.getvalue()


def result(out, task, seed=1337):
    return json.loads((out / f'{task}_seed{seed}.json').read_text())


# ----------------------------------------------------------------------------- all of it

def test_every_task_end_to_end(data, sources, tmp_path):
    out = tmp_path / 'out'
    stdout = shell(f'--source={sources["mom"]}', f'--data_dir={data}', f'--out_dir={out}',
                   '--max_steps=2', '--learning_rate=1e-3', '--paper_row=MoM_P medium',
                   '--device=cpu', script='finetune_glue.py')
    figures = {}
    for task, columns in COLUMNS.items():
        r = result(out, task)
        figures |= {figure: parts['score'] for figure, parts in r['figures'].items()}
        assert r['steps'] == r['settings']['max_steps'] == 2 and r['torch'] == torch.__version__
        small = task in ('cola', 'stsb', 'mrpc', 'rte')
        assert r['settings']['batch_size'] == (32 if small else 64)
        assert (r['settings']['learning_rate'], r['settings']['dtype']) == (1e-3, 'float32')
        assert r['settings']['length'] == 96 and r['settings']['source'] == str(sources['mom'])
        assert r['splits']['train']['examples'] == 24
        assert str(data / task / 'train.') in r['splits']['train']['source']
        assert r['figures'].keys() == r['baseline'].keys() and math.isfinite(r['train_loss'])
        # Three examples, as the model reads them.
        shown = stdout.split(f'{task}, seed 1337:')[1].splitlines()[1:4]
        assert all(line.count('<|endoftext|>') == len(columns) for line in shown)
        sentences = [line.split(' | ')[1].split('<|endoftext|>')[0] for line in shown]
        known = [row[columns[0]] for row in rows_of(task, 24, 0)]
        assert len(set(shown)) == 3 and all(any(k.startswith(s) for k in known) for s in sentences)
    lines = (out / 'results.md').read_text().splitlines()
    header, ours, baseline, paper = ([c.strip() for c in lines[i].strip('|').split('|')]
                                     for i in (0, 2, 3, 4))
    assert header[1:] == ['SST-2', 'CoLA', 'MRPC', 'QQP', 'QNLI', 'RTE', 'MNLI-m', 'MNLI-mm',
                          'STS-B', 'average']
    scores = [*(figures[f] for f in header[1:-1]), sum(figures.values()) / 9]
    assert ours[1:] == [f'{score:.2f}' for score in scores]
    assert paper[-1] == '81.93' and lines[0] in stdout
    # 6 of 10 validation labels are 1, and so are most training labels: F1 = 2 * 0.6 / (0.6 + 1)
    assert baseline[1:7] == ['60.00', '0.00', '75.00', '75.00', '60.00', '60.00']
    assert baseline[-2] == '0.00'


def test_the_files_of_the_glue_server(data, sources, tmp_path):
    out = tmp_path / 'out'
    run(f'--source={sources["vanilla"]}', f'--data_dir={data}', f'--out_dir={out}', '--max_steps=1')
    want = {'CoLA.tsv': (7, {'0', '1'}), 'SST-2.validation.tsv': (10, {'0', '1'}),
            'MRPC.validation.tsv': (10, {'0', '1'}), 'QQP.validation.tsv': (10, {'0', '1'}),
            'STS-B.tsv': (7, None),
            'QNLI.validation.tsv': (10, {'entailment', 'not_entailment'}),
            'RTE.tsv': (7, {'entailment', 'not_entailment'}),
            'MNLI-m.tsv': (7, {'entailment', 'neutral', 'contradiction'}),
            'MNLI-mm.tsv': (7, {'entailment', 'neutral', 'contradiction'})}
    folder = out / 'predictions_seed1337'
    assert set(os.listdir(folder)) == set(want)
    for file, (n, values) in want.items():
        header, *lines = (folder / file).read_text().splitlines()
        assert header == 'index\tprediction' and len(lines) == n
        index, predicted = zip(*(line.split('\t') for line in lines))
        assert list(index) == [str(i) for i in range(n)]
        assert set(predicted) <= values if values else all(0 <= float(p) <= 5 for p in predicted)
    assert result(out, 'mnli')['predictions'] == [
        str(folder / 'MNLI-m.tsv'), str(folder / 'MNLI-mm.tsv')]
    file = tmp_path / 'a'
    glue.write_predictions(file, 'mnli', torch.tensor([2, 0, 1]))
    assert file.read_text() == 'index\tprediction\n0\tcontradiction\n1\tentailment\n2\tneutral\n'
    glue.write_predictions(file, 'stsb', torch.tensor([2.5, -0.1, 5.5]))
    assert file.read_text() == 'index\tprediction\n0\t2.50000\n1\t0.00000\n2\t5.00000\n'


@pytest.mark.parametrize('system', ['vanilla', 'mom'])
def test_it_learns_what_can_be_learnt(system, sources, tmp_path):
    write_task(tmp_path, 'sst2', train=320, validation=80)
    out = tmp_path / 'out'
    run(f'--source={sources[system]}', '--task=sst2', f'--data_dir={tmp_path}', f'--out_dir={out}',
        '--epochs=15', '--batch_size=32', '--learning_rate=5e-3')
    r = result(out, 'sst2')
    assert r['steps'] == 150 and r['baseline']['SST-2']['score'] == pytest.approx(60)
    assert r['figures']['SST-2']['score'] > 80  # other seeds reach 92 to 100


def test_regression_learns(sources, tmp_path):
    write_task(tmp_path, 'stsb', train=320, validation=80)
    for split, n in (('train', 320), ('validation', 80)):
        # Similarity is how good the second film is.
        rows = [dict(sentence1='A film.', sentence2=row['sentence'], label=1.5 + 3 * row['label'])
                for row in rows_of('sst2', n, n)]
        write(tmp_path / 'stsb' / f'{split}.jsonl', rows)
    out = tmp_path / 'out'
    run(f'--source={sources["vanilla"]}', '--task=stsb', f'--data_dir={tmp_path}',
        f'--out_dir={out}', '--epochs=12', '--learning_rate=5e-3')
    r = result(out, 'stsb')
    assert r['baseline_predicts'] == pytest.approx(1.5 + 3 * 0.6)
    assert r['baseline']['STS-B']['score'] == 0
    assert r['figures']['STS-B']['Pearson'] > 80 and r['train_loss'] < 0.9


# ----------------------------------------------------------------------- padding, batches, training

@pytest.mark.parametrize('system', SHAPES)
def test_padding_changes_no_logit(system):
    # In fp64, so that rounding is not taken for padding.
    model, head = build(system).eval().double(), torch.nn.Linear(32, 3).double()
    for p in model.parameters():  # larger weights: differences would show
        p.data.mul_(3)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 257, size=n).astype(np.int32) for n in (5, 40, 1, 17)]
    with torch.no_grad():
        alone = torch.cat([head(model.features(torch.from_numpy(row).long()[None])[0][:, -1])
                           for row in rows])
        assert (alone[0] - alone[1]).abs().max() > 0.01
        for kw in (dict(pad_id=256), dict(pad_id=7), dict(pad_id=0, width=96)):
            together = glue.classify(model, head, rows, **kw)[0]
            assert (together - alone).abs().max() < 1e-12 * alone.abs().max(), kw
        last = glue.classify(model, head, rows[::-1], 256)[0].flip(0)
        assert (last - alone).abs().max() < 1e-12 * alone.abs().max()


def by_hand(model, head, ids, labels, steps, size, seed, lr):
    """Fine-tuning written out: one example at a time, without padding; AdamW, schedule and clipping
    by formula."""
    params = dict(model.named_parameters())
    params |= {'head.' + n: p for n, p in head.named_parameters()}
    m, v = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in 'mv')
    batches = []
    for epoch in range(steps):
        order = np.random.default_rng([seed, epoch + 1]).permutation(len(ids))
        batches += [order[i:i + size] for i in range(0, len(ids), size)]
    for step, batch in enumerate(batches[:steps]):
        total = 0
        for i in batch:
            x, decisions = model.features(torch.from_numpy(ids[i]).long()[None])
            y = head(x[0, -1])
            loss = (y[0] - labels[i]) ** 2 if len(y) == 1 else -y.log_softmax(0)[labels[i]]
            total = total + loss / len(batch)
        grads = dict(zip(params, torch.autograd.grad(total, params.values())))
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in grads.values()))
        rise = round(steps / 10)
        now = lr * (step + 1) / rise if step < rise else lr * (steps - step) / (steps - rise)
        with torch.no_grad():
            for n, p in params.items():
                g = grads[n] * min(1, 1 / norm)
                m[n] = 0.9 * m[n] + 0.1 * g
                v[n] = 0.999 * v[n] + 0.001 * g * g
                if not (n.endswith(('_b', 'bias', 'ln_w', 'ln_f.weight')) or '.bias_' in n):
                    p.mul_(1 - now * 0.01)
                rms = (v[n] / (1 - 0.999 ** (step + 1))).sqrt()
                p.sub_(now * m[n] / (1 - 0.9 ** (step + 1)) / (rms + 1e-8))


@pytest.mark.parametrize('system, outputs', [('vanilla', 3), ('vanilla', 1), ('mom', 2)])
def test_training_is_the_recipe(system, outputs, monkeypatch):
    rng = np.random.default_rng(3)
    ids = [rng.integers(0, 257, size=n).astype(np.int32) for n in rng.integers(2, 30, size=11)]
    labels = rng.integers(0, outputs, size=11) if outputs > 1 else rng.random(11)
    labels = torch.from_numpy(labels)
    # In fp64, as AdamW blows up the rounding of fp32.
    model, head = build(system).double(), torch.nn.Linear(32, outputs).double()
    with torch.no_grad():
        head.weight.mul_(5)  # so that the gradient is clipped
    theirs, their_head = copy.deepcopy(model), copy.deepcopy(head)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(glue, 'learning_rate', 1e-3)
    # Batches of 4, 4, 3, 4, 4, 3, ...
    glue.fine_tune(model, head, ids, labels, 10, 4, 5, 256, False, '')
    by_hand(theirs, their_head, ids, labels, 10, 4, 5, 1e-3)
    for mine, want in ((model, theirs), (head, their_head)):
        for name, p in want.state_dict().items():
            assert (mine.state_dict()[name] - p).abs().max() < 1e-8, name
    moved = max((before[n] - p).abs().max() for n, p in model.state_dict().items())
    assert moved > 2e-3


@pytest.mark.parametrize('system', ['mom', 'mod'])
def test_micro_batches_change_nothing_but_rounding(system, data, sources, tmp_path):
    saved = []
    for micro in (64, 5):
        out = tmp_path / str(micro)
        run(f'--source={sources[system]}', '--task=sst2', f'--data_dir={data}', f'--out_dir={out}',
            '--max_steps=6', '--batch_size=16', f'--micro_batch={micro}', '--save=True',
            '--learning_rate=1e-3')
        saved.append(torch.load(out / 'sst2_seed1337.pt', weights_only=True))
    one, two = saved
    assert one['settings']['micro_batch'] != two['settings']['micro_batch']
    for name, p in one['model'].items():
        assert (p - two['model'][name]).abs().max() < 1e-4, name
    fresh = build(system).state_dict()
    if system == 'mod':  # its predictor learns from the auxiliary loss alone
        assert any((p - fresh[n]).abs().max() > 1e-3
                   for n, p in one['model'].items() if '.predictor.' in n)


def test_two_processes_equal_one(data, sources, tmp_path):
    # 10 examples = 3 + 3 + 3 + 1: one process has nothing to do in the last batch.
    args = [f'--source={sources["mom"]}', '--task=rte,stsb', f'--data_dir={data}', '--max_steps=6',
            '--max_train=10', '--batch_size=3', '--micro_batch=2', '--learning_rate=1e-3',
            '--save=True']
    run(*args, f'--out_dir={tmp_path / "one"}')
    shell(*args, f'--out_dir={tmp_path / "two"}', '--device=cpu', ranks=2,
          script='finetune_glue.py')
    for task in ('rte', 'stsb'):
        one, two = (torch.load(tmp_path / n / f'{task}_seed1337.pt', weights_only=True)
                    for n in ('one', 'two'))
        assert (one['settings']['processes'], two['settings']['processes']) == (1, 2)
        assert one['train_loss'] == pytest.approx(two['train_loss'], rel=1e-4)
        for key in ('model', 'head'):
            for name, p in one[key].items():
                assert (p - two[key][name]).abs().max() < 1e-4, name
        figure = {'rte': 'RTE', 'stsb': 'STS-B'}[task]
        score = two['figures'][figure]['score']
        assert one['figures'][figure]['score'] == pytest.approx(score, abs=0.5)
        lines = [(tmp_path / n / 'predictions_seed1337' / f'{figure}.tsv').read_text().split()
                 for n in ('one', 'two')]
        if task == 'rte':
            assert lines[0] == lines[1]
        else:
            ones, twos = ([float(x) for x in words[2:]] for words in lines)
            assert ones == pytest.approx(twos, abs=1e-3)


def test_processes_that_see_other_results_are_refused(data, sources, tmp_path, monkeypatch):
    args = [f'--source={sources["vanilla"]}', f'--data_dir={data}', f'--out_dir={tmp_path / "run"}',
            '--max_steps=1', '--max_train=5', '--max_eval=4', '--device=cpu']
    run(*args, '--task=cola')
    real = finetune.read_result
    monkeypatch.setattr(finetune, 'read_result', lambda *how: (
        (None, None) if os.environ['RANK'] == '1' else real(*how)))
    training = kill.Training([*args, '--task=cola,rte'], 2, tmp_path / 'output',
                             'finetune_glue.py')
    assert training.wait() == 1 and 'process 1 on' in training.text()
    assert 'has another work than process 0 on' in training.text()
    assert not (tmp_path / 'run' / 'rte_seed1337.json').exists()


def test_a_saved_model_predicts_what_the_file_says(data, sources, tmp_path):
    """MoD, which is another model in evaluation than in training, here on pairs."""
    run(f'--source={sources["mod"]}', '--task=stsb', f'--data_dir={data}', f'--out_dir={tmp_path}',
        '--max_steps=20', '--batch_size=8', '--learning_rate=5e-3', '--length=64', '--save=True')
    saved = load_checkpoint(tmp_path / 'stsb_seed1337.pt')
    model = GPT.from_pretrained(str(tmp_path / 'stsb_seed1337.pt')).eval()
    head = torch.nn.Linear(32, 1)
    head.load_state_dict(saved['head'])
    predicted = []
    for row in rows_of('stsb', 7, 2):  # the test split
        first, second = ([*row[c].encode()] for c in ('sentence1', 'sentence2'))
        assert min(len(first), len(second)) >= 31
        idx = torch.tensor([[*first[:31], 256, *second[:31], 256]])
        predicted.append(head(model.features(idx)[0][0, -1]).clamp(0, 5).item())
    lines = (tmp_path / 'predictions_seed1337' / 'STS-B.tsv').read_text().splitlines()[1:]
    assert [float(line.split('\t')[1]) for line in lines] == pytest.approx(predicted, abs=2e-5)
    assert saved['settings']['length'] == 64
    assert result(tmp_path, 'stsb')['splits']['test']['truncated'] == 7


def test_a_figure_is_that_of_its_split(sources, tmp_path):
    write_task(tmp_path, 'mnli', validation=30)
    for split in TESTS['mnli']:
        (tmp_path / 'mnli' / f'{split}.jsonl').unlink()
    run(f'--source={sources["vanilla"]}', '--task=mnli', f'--data_dir={tmp_path}',
        f'--out_dir={tmp_path}/out', '--max_steps=20', '--batch_size=8', '--learning_rate=5e-3')
    splits = {'MNLI-m': 'validation_matched', 'MNLI-mm': 'validation_mismatched'}
    for seed, (figure, split) in enumerate(splits.items(), 1):
        file = tmp_path / 'out' / 'predictions_seed1337' / f'{figure}.{split}.tsv'
        lines = file.read_text().splitlines()[1:]
        names = [('entailment', 'neutral', 'contradiction')[row['label']]
                 for row in rows_of('mnli', 30, seed)]
        right = [line == f'{i}\t{name}'
                 for i, (line, name) in enumerate(zip(lines, names, strict=True))]
        r = result(tmp_path / 'out', 'mnli')
        assert r['figures'][figure]['score'] == pytest.approx(100 * sum(right) / 30, abs=1e-3)
        most = max(range(3), key=[row['label'] for row in rows_of('mnli', 24, 0)].count)
        assert r['baseline_predicts'] == most
        share = [row['label'] for row in rows_of('mnli', 30, seed)].count(most) / 30
        assert r['baseline'][figure]['score'] == pytest.approx(100 * share, abs=1e-3)


def test_gpt2_in_hugging_face_format_and_bfloat16(data, tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'hf')
    stdout = run(f'--source={tmp_path / "hf"}', '--task=cola', f'--data_dir={data}',
                 f'--out_dir={tmp_path / "out"}', '--epochs=1', '--dtype=bfloat16',
                 '--batch_size=10')
    assert "tokenizer 'gpt2'" in stdout and 'cpu x 1, bfloat16' in stdout
    assert result(tmp_path / 'out', 'cola')['steps'] == 3  # 10 + 10 + 4
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0,
                                     eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / 'other')
    message = 'knows 300 kinds of token and its tokenizer .gpt2. makes 50257'
    with pytest.raises(ValueError, match=message):
        run(f'--source={tmp_path / "other"}', '--task=cola', f'--data_dir={data}',
            f'--out_dir={tmp_path / "out"}')


# ------------------------------------------------------------------------- sentences, scores, table

def test_the_longer_sentence_is_cut():
    for a in range(12):
        for b in range(12):
            for length in range(4, 16):
                first, second = list(range(a)), list(range(100, 100 + b))
                got = glue.join_sentences([first, second], -1, length)
                # One at a time goes from the end of the longer one.
                while len(first) + len(second) + 2 > length:
                    (first if len(first) > len(second) else second).pop()
                assert got == [*first, -1, *second, -1]
    assert glue.join_sentences([[1, 2, 3, 4]], -1, 4) == [1, 2, 3, -1]
    assert glue.join_sentences([[1]], -1, 4) == [1, -1]


def test_scores_against_their_definitions():
    rng = np.random.default_rng(1)
    for _ in range(5):
        x, y = rng.integers(0, 2, size=(2, 50))
        tp, tn, fp, fn = (np.sum((x == a) & (y == b)) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert glue.scores('Matthews', x, y)['score'] == pytest.approx(100 * matthews, abs=1e-3)
        f1 = 2 * tp / (2 * tp + fp + fn)
        assert glue.scores('F1', x, y)['score'] == pytest.approx(100 * f1, abs=1e-3)
        assert glue.scores('F1', x, y)['accuracy'] == pytest.approx(2 * (tp + tn), abs=1e-3)
    x, y = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 2, 2, 2, 1])
    assert glue.scores('accuracy', x, y)['score'] == pytest.approx(60)
    x, y = rng.normal(size=40), rng.integers(0, 6, size=40) / 1.0  # y has ties
    pearson = np.mean((x - x.mean()) * (y - y.mean())) / x.std() / y.std()
    # Ties have their mean rank.
    ranks = [np.array([np.sum(z < v) + (np.sum(z == v) + 1) / 2 for v in z]) for z in (x, y)]
    spearman = np.corrcoef(*ranks)[0, 1]
    got = glue.scores('correlation', torch.from_numpy(x), torch.from_numpy(y))
    assert got == pytest.approx({'score': 50 * (pearson + spearman), 'Pearson': 100 * pearson,
                                 'Spearman': 100 * spearman}, abs=1e-4)


def test_a_constant_prediction_correlates_with_nothing():
    y = torch.tensor([0, 1, 1, 1, 0, 1])
    for constant in (torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)):
        assert glue.scores('Matthews', constant, y)['score'] == 0
    assert glue.scores('correlation', torch.full((6,), 2.6).double(), y.double())['score'] == 0
    assert glue.scores('correlation', y.double(), torch.full((6,), 2.6).double())['score'] == 0
    got = glue.scores('F1', torch.zeros(6, dtype=torch.int64), y)
    assert got == pytest.approx({'score': 0, 'accuracy': 33.3333, 'F1': 0})


def test_table_5_of_the_paper():
    assert len(glue.PAPER) == 21
    for name, row in glue.PAPER.items():
        *nine, average = map(float, row)
        assert len(nine) == 9 and all(20 < figure < 95 for figure in nine)
        assert abs(sum(nine) / 9 - average) < 0.011, name


def test_the_table_needs_all_seeds_and_all_nine():
    def one(task, seed, **figures):
        figures = {name: dict(score=score) for name, score in figures.items()}
        train = dict(examples=3, source='x', truncated=0)
        return dict(task=task, seed=seed, steps=1, figures=figures, baseline=figures,
                    settings=dict(batch_size=2), splits=dict(train=train))

    results = [one('cola', s, CoLA=40 + s) for s in (1, 3)] + [one('rte', 1, RTE=70)]
    row = glue.markdown(results, 2, 'a model').splitlines()[2]
    assert row == '| a model, 2 seeds | – | 42.00 ± 1.41 | – | – | – | – | – | – | – | – |'
    nine = [one(f, s, **{f: i + s}) for i, f in enumerate(glue.FIGURES) for s in (1, 2, 6)]
    lines = glue.markdown(nine, 3, 'a model').splitlines()
    assert lines[2].endswith('| 11.00 ± 2.65 | 7.00 ± 2.65 |')
    assert len([line for line in lines if line.startswith('- ')]) == 27


# ----------------------------------------------------------------------------- seeds, going on

def test_what_is_done_is_not_done_again(data, sources, tmp_path):
    out = tmp_path / 'out'
    args = [f'--source={sources["mom"]}', '--task=cola,rte', '--seeds=2', f'--data_dir={data}',
            f'--out_dir={out}', '--max_steps=3', '--learning_rate=1e-3', '--paper_row=']
    run(*args)
    files = ['cola_seed1337.json', 'cola_seed1338.json', 'rte_seed1337.json', 'rte_seed1338.json']
    assert sorted(os.listdir(out)) == [
        '.lock', *files[:2], 'predictions_seed1337', 'predictions_seed1338', 'results.md',
        *files[2:]]
    a, b = result(out, 'cola'), result(out, 'cola', 1338)
    assert a['train_loss'] != b['train_loss']
    table = (out / 'results.md').read_text()
    mean = (a['figures']['CoLA']['score'] + b['figures']['CoLA']['score']) / 2
    assert f'| {mean:.2f} ± ' in table and 'paper' not in table
    before = {file: (out / file).stat().st_mtime_ns for file in files}
    lost = result(out, 'rte')
    (out / files[2]).unlink()  # as if the run had stopped in it
    assert run(*args).count('is there already') == 3
    assert (out / 'results.md').read_text() == table
    assert [file for file in files if (out / file).stat().st_mtime_ns != before[file]] == [files[2]]
    again = result(out, 'rte')
    assert {**again, 'seconds': 0} == {**lost, 'seconds': 0}

    message = ('cola_seed1337.json is a result with learning_rate=0.001, but this command has '
               '0.002: take another --out_dir, or delete that file')
    with pytest.raises(ValueError, match=message):
        run(*args, '--learning_rate=2e-3')
    other = torch.load(sources['mom'], weights_only=True)
    other['model']['wpe.weight'][0] += 1
    torch.save(other, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match='is a result with weights='):
        run(*args, f'--source={tmp_path / "other.pt"}')
    moved = tmp_path / 'moved'
    shutil.copytree(data, moved)
    # The same data in another place.
    assert run(*args, f'--data_dir={moved}').count('is there already') == 4
    with open(moved / 'rte' / 'train.jsonl', 'a') as f:
        f.write(json.dumps(dict(sentence1='a', sentence2='b', label=0)) + '\n')
    with pytest.raises(ValueError, match='rte_seed1337.json is a result with data='):
        run(*args, f'--data_dir={moved}')
    assert run(*args, '--task=cola', '--seeds=1', '--save=True').count('is there already') == 0
    assert (out / 'cola_seed1337.pt').exists() and result(out, 'cola')['figures'] == a['figures']
    # Tasks may be added; a result of other settings that is not asked for stays out of the table.
    run(*args, '--task=mrpc', '--max_steps=2')
    header, row = (out / 'results.md').read_text().splitlines()[:3:2]
    shown = dict(zip(header.split('|'), row.split('|')))
    assert [name.strip() for name, cell in shown.items() if '±' in cell] == ['MRPC']
    (out / files[0]).write_text('{"task": ')
    with pytest.raises(ValueError, match='not a result of this script .*: delete it'):
        run(*args)


def test_limits_and_their_seeds(data, sources, tmp_path):
    args = [f'--source={sources["vanilla"]}', '--task=sst2', f'--data_dir={data}', '--max_train=5',
            '--max_eval=4', '--epochs=2', '--batch_size=2']
    first = run(*args, f'--out_dir={tmp_path / "a"}')
    r = result(tmp_path / 'a', 'sst2')
    assert r['steps'] == 6 and r['splits']['train']['examples'] == 5
    assert r['splits']['validation']['examples'] == 4
    wanted = [row['label'] for row in rows_of('sst2', 4, 1)]
    lines = (tmp_path / 'a' / 'predictions_seed1337' / 'SST-2.validation.tsv').read_text().split()
    right = [int(p) == w for p, w in zip(lines[3::2], wanted, strict=True)]
    assert r['figures']['SST-2']['score'] == pytest.approx(25 * sum(right))
    assert first.splitlines()[2:6] == run(*args, f'--out_dir={tmp_path / "b"}').splitlines()[2:6]
    drawn = [run(*args, '--max_train=2', f'--out_dir={tmp_path / "c"}', f'--seed={s}').splitlines()
             for s in (3, 4)]
    one, two = ({line for line in lines if '<|endoftext|>' in line} for lines in drawn)
    assert len(one) == len(two) == 2 and one != two  # each seed draws its own


# ----------------------------------------------------------------------------- the Hub

def test_data_from_the_hub(sources, tmp_path, monkeypatch):
    def load_dataset(*args, split, streaming):
        assert split is None and not streaming
        asked.append(args)
        splits = {'train': 20, 'validation': 8, 'test': 6}
        return datasets.DatasetDict({
            split: datasets.Dataset.from_list(rows_of('cola', n, n, split != 'test'))
            for split, n in splits.items()})

    asked = []
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    out = tmp_path / 'out'
    run(f'--source={sources["vanilla"]}', '--task=cola', f'--out_dir={out}', '--max_steps=2')
    assert asked == [('nyu-mll/glue', 'cola')]
    r = result(out, 'cola')
    assert r['splits']['train'] == dict(source='nyu-mll/glue, cola, train', examples=20,
                                        truncated=0)
    assert r['settings']['data'] == 'nyu-mll/glue'
    predictions = (out / 'predictions_seed1337' / 'CoLA.tsv').read_text()
    assert len(predictions.splitlines()) == 7  # those of the test split

    def unreachable(*args, **how):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    with pytest.raises(ValueError, match="Couldn't reach the Hub.*--data_dir=FOLDER"):
        run(f'--source={sources["vanilla"]}', '--task=rte', f'--out_dir={out}')


# --------------------------------------------------------------------------- GLUE as people have it

# Of each task in the archive of GLUE's authors: the folder, and a line of names for train and dev.
ARCHIVE = {
    'sst2': ('SST-2', 'sentence label'), 'cola': ('CoLA', ''),
    'mrpc': ('MRPC', 'Quality/#1 ID/#2 ID/#1 String/#2 String'),
    'qqp': ('QQP', 'id qid1 qid2 question1 question2 is_duplicate'),
    'qnli': ('QNLI', 'index question sentence label'),
    'rte': ('RTE', 'index sentence1 sentence2 label'),
    'mnli': ('MNLI', 'index promptID sentence1_parse sentence1 sentence2 label1 gold_label'),
    'stsb': ('STS-B', 'index genre sentence1 sentence2 score')}
FIRST = ('#1 String', 'question1', 'question', 'sentence1')
SECOND = ('#2 String', 'question2', 'sentence', 'sentence2')
LABEL = ('label', 'Quality', 'is_duplicate', 'gold_label', 'score')


def archive_line(task, row, columns):
    """A row as the archive spells it: labels of qnli, rte and mnli by name, quotes as they are."""
    texts, label = [row[c] for c in COLUMNS[task]], row['label']
    if task in ('qnli', 'rte', 'mnli'):
        label = glue.TASKS[task].labels[label]
    if task == 'cola':
        return f'gj04\t{label}\t{"*" * (label == 0)}\t{texts[0]}'
    cells = []
    for column in columns:
        if column in LABEL:
            cells.append(str(label))
        elif column in FIRST and len(texts) == 2:
            cells.append(texts[0])
        else:
            cells.append(texts[-1] if column in SECOND else 'x')
    return '\t'.join(cells)


def archive(folder, task, splits):
    """{split: rows} as the files of the archive."""
    name, header = ARCHIVE[task]
    columns = header.split('/') if '/' in header else header.split()
    (folder / name).mkdir(parents=True)
    for split, rows in splits.items():
        shown = [c for c in columns if not (split.startswith('test') and c in LABEL)]
        lines = [archive_line(task, row, shown) for row in rows]
        if task == 'cola' and split == 'test':
            shown = ['index', 'sentence']
            lines = [f'{n}\t{row["sentence"]}' for n, row in enumerate(rows)]
        head = ['\t'.join(shown)] if shown else []
        file = folder / name / f'{split.replace("validation", "dev")}.tsv'
        file.write_text('\n'.join([*head, *lines, '']), encoding='utf-8')


def encoded(task, folder, monkeypatch):
    monkeypatch.setattr(glue, 'data_dir', str(folder))
    tokenizer = inputs.tokenizer('bytes')
    return {split: glue.encode(task, split, source, rows, tokenizer, 96)
            for split, (source, rows) in glue.splits_of(task).items()}


@pytest.mark.parametrize('task', COLUMNS)
def test_the_archive_is_read_as_it_is(task, tmp_path, monkeypatch):
    splits = [*glue.TASKS[task].splits.values()]
    splits = ['train', *splits, *(split.replace('validation', 'test') for split in splits)]
    rows = {split: rows_of(task, 9, seed) for seed, split in enumerate(splits)}
    rows['train'][2][COLUMNS[task][0]] = '"It begins with a quote, and ends without.'
    archive(tmp_path / 'archive', task, rows)
    for split in splits:
        write(tmp_path / 'plain' / task / f'{split}.jsonl', rows[split])
    theirs, ours = (encoded(task, tmp_path / name, monkeypatch) for name in ('archive', 'plain'))
    assert list(theirs) == list(ours) == splits
    for split in splits:
        assert [i.tolist() for i in theirs[split].ids] == [i.tolist() for i in ours[split].ids]
        assert 'archive' in theirs[split].source
        if split.startswith('test'):
            assert theirs[split].labels is ours[split].labels is None
        else:
            assert theirs[split].labels.tolist() == [row['label'] for row in rows[split]]
            assert theirs[split].labels.dtype == ours[split].labels.dtype


def test_rows_of_qqp_that_are_cut_off_are_left_out_and_counted(sources, tmp_path):
    archive(tmp_path, 'qqp', {split: rows_of('qqp', 9, 0) for split in ('train', 'validation')})
    with open(tmp_path / 'QQP' / 'train.tsv', 'a') as f:
        f.write('104\t1\t2\tWhat is\n')
    args = [f'--source={sources["vanilla"]}', f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/out',
            '--max_steps=1']
    stdout = run(*args, '--task=qqp')
    assert f'left out: 1 rows of {tmp_path}/QQP/train.tsv' in stdout
    assert result(tmp_path / 'out', 'qqp')['splits']['train']['examples'] == 9
    archive(tmp_path, 'rte', {split: rows_of('rte', 9, 0) for split in ('train', 'validation')})
    with open(tmp_path / 'RTE' / 'train.tsv', 'a') as f:
        f.write('104\tWhat is\n')
    with pytest.raises(ValueError, match='RTE/train.tsv, row 10 cannot be read'):
        run(*args, '--task=rte')


def test_the_shards_of_the_hub_are_read_as_they_are(sources, tmp_path):
    rows = rows_of('cola', 24, 0)
    for n in range(3):
        write(tmp_path / 'cola' / f'train-{n:05}-of-00003.parquet', rows[8 * n:8 * n + 8])
    write(tmp_path / 'cola' / 'validation-00000-of-00001.parquet', rows_of('cola', 10, 1))
    args = [f'--source={sources["vanilla"]}', f'--data_dir={tmp_path}', '--max_steps=2',
            '--task=cola']
    run(*args, f'--out_dir={tmp_path}/shards')
    write_task(tmp_path / 'plain', 'cola')
    run(*args, f'--data_dir={tmp_path}/plain', f'--out_dir={tmp_path}/plain_out')
    one, two = (result(tmp_path / name, 'cola') for name in ('shards', 'plain_out'))
    assert one['train_loss'] == two['train_loss'] and one['figures'] == two['figures']


def test_what_was_found_is_said_where_it_is_not_understood(sources, tmp_path):
    args = [f'--source={sources["vanilla"]}', f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/out']
    (tmp_path / 'SST').mkdir()
    message = ('must hold one folder of sst2, called sst2 or as in the archive of GLUE; '
               'it holds SST')
    with pytest.raises(ValueError, match=message):
        run(*args, '--task=sst2')
    write_task(tmp_path, 'rte')
    os.rename(tmp_path / 'rte', tmp_path / 'RTE')
    write_task(tmp_path, 'rte')
    message = 'must hold one folder of rte, .*; it holds RTE, SST, .*rte'
    with pytest.raises(ValueError, match=message):
        run(*args, '--task=rte')
    row = dict(question='A?', sentence='B.')
    write(tmp_path / 'qnli' / 'train.jsonl', [{**row, 'label': 'Entailment'}])
    write(tmp_path / 'qnli' / 'dev.jsonl', [{**row, 'label': 'entailment'}])
    with pytest.raises(ValueError, match="train.jsonl, row 1: label is 'Entailment' and must be 0 "
                                         r'\(entailment\), 1 \(not_entailment\)'):
        run(*args, '--task=qnli')


@pytest.mark.parametrize('task, names', [
    ('rte, RTE', ['rte']), ('STS-B,SST-2', ['sst2', 'stsb'])])  # as the server calls them, too
def test_names_of_tasks(task, names, data, sources, tmp_path):
    run(f'--source={sources["vanilla"]}', f'--task={task}', f'--data_dir={data}',
        f'--out_dir={tmp_path}', '--max_steps=1')
    files = sorted(f.name for f in tmp_path.glob('*.json'))
    assert files == [f'{name}_seed1337.json' for name in names]


# ----------------------------------------------------------------------------- what is said

def test_how_much_is_cut_or_left_out_is_said(data, sources, tmp_path):
    stdout = run(f'--source={sources["vanilla"]}', '--task=rte,cola', f'--data_dir={data}',
                 f'--out_dir={tmp_path}', '--max_steps=1', '--max_train=5', '--max_eval=4')
    splits = result(tmp_path, 'rte')['splits']
    assert [(s['examples'], s['truncated']) for s in splits.values()] == [(5, 5), (4, 4)]
    report = (tmp_path / 'results.md').read_text()
    for text in (stdout, report):
        assert 'truncated 5 of 5 (warning: 100%' in text and 'truncated 4 of 4 (warning' in text
    assert result(tmp_path, 'cola')['splits']['train']['truncated'] == 0
    assert 'truncated 0 of 5\n' in stdout
    # What the server takes is made of all test examples, or not at all.
    predictions = {path.name for path in (tmp_path / 'predictions_seed1337').iterdir()}
    assert predictions == {'RTE.validation.tsv', 'CoLA.validation.tsv'}


def test_the_report_says_how_it_was_made(data, sources, tmp_path):
    stdout = run(f'--source={sources["vanilla"]}', '--task=rte', f'--data_dir={data}',
                 f'--out_dir={tmp_path}', '--max_steps=1', '--warmup=0.25', '--learning_rate=3e-4',
                 '--length=48')
    report = (tmp_path / 'results.md').read_text()
    recipe = 'Learning rate 0.0003, warm-up over 25% of the steps, at most 48 tokens, float32.'
    assert recipe in report
    assert 'the paper' not in report and report in stdout
    most = ['entailment', 'not_entailment'][result(tmp_path, 'rte')['baseline_predicts']]
    assert f'always predicting {most}: ' in stdout


# ----------------------------------------------------------------------------- stopping, devices

def test_two_commands_do_not_share_a_folder(data, sources, tmp_path):
    args = [f'--source={sources["mom"]}', '--task=cola', f'--data_dir={data}', '--epochs=1']
    with open(tmp_path / '.lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process does
        with pytest.raises(ValueError, match='another run is at work in'):
            run(*args, f'--out_dir={tmp_path}')
    run(*args, f'--out_dir={tmp_path}')


def test_ctrl_c_keeps_whole_epochs_and_says_so(data, sources, tmp_path):
    args = [f'--source={sources["mom"]}', '--task=cola', f'--data_dir={data}', '--epochs=40',
            '--learning_rate=1e-3', '--batch_size=8', '--save=True']
    run(*args, f'--out_dir={tmp_path / "whole"}')
    out = tmp_path / 'out'
    process = subprocess.Popen([sys.executable, 'finetune_glue.py', *args, f'--out_dir={out}',
                                '--device=cpu'], cwd=common.ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    part = out / 'cola_seed1337.part.pt'
    while not part.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode == 130, stderr
    assert 'Traceback' not in stderr and stderr.splitlines()[-1].endswith(
        f'{out} keeps what is finished, and of cola, seed 1337 its whole '
        'epochs: the same command goes on there')
    done = len(load_file(part)['losses'])
    assert done in range(3, 120, 3) and not (out / 'cola_seed1337.json').exists()
    torch.manual_seed(5)
    run(*args, f'--out_dir={out}')
    assert not part.exists()
    one, two = (torch.load(tmp_path / n / 'cola_seed1337.pt', weights_only=True)
                for n in ('whole', 'out'))
    assert one['train_loss'] == two['train_loss'] and one['figures'] == two['figures']
    for key in ('model', 'head'):
        assert all(torch.equal(p, two[key][name]) for name, p in one[key].items())


def test_what_is_kept_of_other_settings_is_not_gone_on_with(data, sources, tmp_path):
    args = [f'--source={sources["vanilla"]}', '--task=rte', f'--data_dir={data}', '--epochs=2']
    run(*args, f'--out_dir={tmp_path / "a"}', '--learning_rate=1e-2')
    state = dict(settings=dict(task='rte'), losses=[0.0] * 1)
    (tmp_path / 'b').mkdir()
    torch.save(state, tmp_path / 'b' / 'rte_seed1337.part.pt')
    run(*args, f'--out_dir={tmp_path / "b"}', '--learning_rate=1e-2')
    one, two = (result(tmp_path / name, 'rte') for name in 'ab')
    assert one['train_loss'] == two['train_loss']


def test_a_place_that_takes_no_results_is_found_before_training(data, sources, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='file is a file, where a folder has to be'):
        run(f'--source={sources["vanilla"]}', '--task=rte', f'--data_dir={data}/nowhere',
            f'--out_dir={tmp_path}/file/out')


def test_no_fp64_goes_to_the_device(monkeypatch):
    to, moved = torch.Tensor.to, []

    def watched(self, *args, **kwargs):
        if args and isinstance(args[0], torch.device):
            moved.append(self.dtype)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, 'to', watched)
    ids = [np.arange(5, dtype=np.int32)] * 3
    labels = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    glue.fine_tune(build('vanilla'), torch.nn.Linear(32, 1), ids, labels, 2, 3, 0, 256, False, '')
    assert torch.float32 in moved and torch.float64 not in moved


# ----------------------------------------------------------------------------- mistakes

SPOILT = [
    ('sst2', 'train.csv', 'sentence,label\nFine.,1\nDull.,2\n',
     r'train.csv, row 2: label is 2.0 .* 0 \(negative\)'),
    ('sst2', 'train.csv', 'text,label\nFine.,1\n',
     "row 1 has no 'sentence', only text, label: sst2 needs the columns"),
    ('sst2', 'train.csv', 'sentence,label\nFine.,good\n', "row 1: label is 'good' and must be 0"),
    ('sst2', 'train.csv', 'sentence,label\nFine.,1\n ,0\n',
     'row 2 is empty: give it text or delete it'),
    ('sst2', 'train.csv', 'sentence,label\n', 'train.csv has no rows'),
    ('sst2', 'train.csv', '', 'train.csv has no rows'),
    ('cola', 'validation.tsv', 'sentence\tlabel\nFine.\t0.5\n', 'row 1: label is 0.5'),
    ('rte', 'train.jsonl',
     '{"sentence1": "A.", "sentence2": "B.", "label": 1}\n{"sentence1": "A.", "senten',
     'train.jsonl, row 2 cannot be read .*repair or delete it'),
    ('rte', 'train.jsonl', '{"sentence1": "A.", "label": 1}\n',
     "row 1 has no 'sentence2', only sentence1, label"),
    ('rte', 'train.jsonl', '{"sentence1": "A.", "sentence2": null, "label": 1}\n',
     'sentence2 is None .* must be text'),
    ('rte', 'train.jsonl', '{"sentence1": "A.", "sentence2": "\\ud83d", "label": 1}\n',
     'sentence2 is .* must be text'),
    ('rte', 'train.jsonl', '{"sentence1": "A.", "sentence2": "B.", "label": true}\n',
     'label is True and must be'),
    ('rte', 'train.jsonl', '{"sentence1": "A.", "sentence2": "B.", "label": "1"}\n',
     "label is '1' and must be"),
    ('rte', 'train.jsonl', '{"sentence1": "A.", "sentence2": "B.", "label": -1}\n',
     r'label is -1 .*0 \(entailment\)'),
    ('rte', 'train.jsonl', '{"sentence1": "A.", "sentence2": "B."}\n', "has no 'label'"),
    ('rte', 'train.jsonl', '\n', 'train.jsonl has no rows'),
    ('stsb', 'train.jsonl', '{"sentence1": "A.", "sentence2": "B.", "label": 5.1}\n',
     'must be a number from 0 to 5'),
    ('stsb', 'train.jsonl', '{"sentence1": "A.", "sentence2": "B.", "label": NaN}\n',
     'must be a number from 0 to 5'),
    ('mnli', 'validation_matched.jsonl', None, 'mnli has no split validation_matched: it holds '
     'test_matched.jsonl, .*; give one of validation_matched.jsonl, .*dev_matched.tsv, or shards')]


@pytest.mark.parametrize('task, file, text, message', SPOILT)
def test_bad_files(task, file, text, message, sources, tmp_path):
    write_task(tmp_path, task)
    path = tmp_path / task / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        run(f'--source={sources["vanilla"]}', f'--task={task}', f'--data_dir={tmp_path}',
            f'--out_dir={tmp_path}/out')
    assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)
    assert not any((tmp_path / 'out').glob('*'))


def test_what_is_not_a_mistake(sources, tmp_path):
    rows = rows_of('qqp', 12, 0)
    rows[3]['question2'] = ''  # two rows of the real QQP are like that
    for split in ('train', 'validation'):
        scored = [{**row, 'label': float(row['label'])} for row in rows]
        write(tmp_path / 'qqp' / f'{split}.jsonl', scored)
    unlabelled = [{c: row[c] for c in COLUMNS['qqp']} for row in rows]
    write(tmp_path / 'qqp' / 'test.jsonl', unlabelled)
    run(f'--source={sources["vanilla"]}', '--task=qqp', f'--data_dir={tmp_path}',
        f'--out_dir={tmp_path}/out', '--max_steps=1')
    predictions = (tmp_path / 'out' / 'predictions_seed1337' / 'QQP.tsv').read_text()
    assert len(predictions.splitlines()) == 13


def test_bad_settings(data, sources, tmp_path):
    for args, message in [
            (['--task=colla'], "must be 'all' or some of sst2,cola"),
            (['--task=cola,,rte'], "must be 'all' or some"),
            (['--epochs=2', '--max_steps=5'], 'give one of them'),
            (['--length=97'], 'from 4 to the 96 positions of'), (['--length=3'], 'from 4 to'),
            (['--seeds=0'], 'seeds=0 must be at least 1'), (['--seed=-1'], 'at least 0'),
            (['--warmup=1'], 'share of the steps'), (['--paper_row=MoM_P tiny'], 'MoM_P small'),
            (['--dtype=float16'], "must be one of 'auto', 'bfloat16'"),
            ([f'--data_dir={data}/none'], 'none must hold one folder of cola, .* it holds nothing'),
            ([f'--source={data}'], 'no checkpoint at')]:
        with pytest.raises(ValueError, match=message):
            run(f'--source={sources["vanilla"]}', '--task=cola', f'--data_dir={data}',
                f'--out_dir={tmp_path}', *args)
    assert not os.listdir(tmp_path)


def test_a_loss_that_is_not_finite_stops(data, sources, tmp_path):
    state = torch.load(sources['vanilla'], weights_only=True)
    state['model']['ln_f.weight'][0] = float('nan')
    torch.save(state, tmp_path / 'nan.pt')
    message = 'rte, seed 1337, training, step 1: loss nan.*lower --learning_rate'
    with pytest.raises(ValueError, match=message):
        run(f'--source={tmp_path / "nan.pt"}', '--task=rte', f'--data_dir={data}',
            f'--out_dir={tmp_path}/out')
    assert not any((tmp_path / 'out').glob('[!.]*'))
