"""finetune_xsum.py as a user runs it, on toy pairs: a few words, the first two are the summary."""
import csv
import fcntl
import json
import os
import random
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict

import datasets
import pytest
import torch
import transformers
from rouge_score import rouge_scorer
from test_train import shell
from torch.nn import functional as F

import common
import inputs
from model import GPT, MoMConfig
from tests import kill

SCRIPT = os.path.join(common.ROOT, 'finetune_xsum.py')
WORDS = 'cat dog sun sea tree bird rain wind fish moon'.split()
SEP = list(b'\nTL;DR:')
MODELS = {'vanilla': dict(chunks='1-1-1'), 'mom': dict(chunks='1-2', K=2, H=2, router_dim=8),
          'mod': dict(chunks='1-1', phi='mod', K=1, router='linear', router_dim=8, capacity=0.5)}
ONE = ['--epochs=1', '--max_train=21', '--max_eval=6', '--batch_size=10', '--max_new_tokens=12',
       '--learning_rate=1e-3']


def pairs(n, seed):
    rng = random.Random(seed)
    for i in range(n):
        article = [rng.choice(WORDS) for _ in range(rng.randint(2, 4))]
        yield dict(document=' '.join(article), summary=' '.join(article[:2]), id=f'{seed}-{i}')


def write(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    table = datasets.Dataset.from_list(list(rows))
    writers = {'jsonl': table.to_json, 'parquet': table.to_parquet, 'csv': table.to_csv,
               'tsv': lambda path: table.to_csv(path, sep='\t', quoting=csv.QUOTE_NONE)}
    writers[str(path).rsplit('.')[-1]](str(path))


def long_pair(n):  # too long for 96 tokens by far, with a summary longer than 12
    return dict(document='It rose! Then ' + 'moon ' * n, summary='a summary that is not short',
                id=f'long-{n}')


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Models with random weights, and toy data."""
    out = tmp_path_factory.mktemp('xsum')
    for name, shape in MODELS.items():
        torch.manual_seed(3)
        model = GPT(MoMConfig(n_embd=64, n_head=2, block_size=96, vocab_size=257, **shape))
        content = dict(model=model.state_dict(), model_config=asdict(model.cfg),
                       meta={'tokenizer': 'bytes'})
        torch.save(content, out / f'{name}.pt')
    write(out / 'toy' / 'train.jsonl', [*pairs(3, 1), long_pair(30), *pairs(600, 2)])
    write(out / 'toy' / 'test.jsonl', [*pairs(2, 4), long_pair(40), *pairs(25, 5)])
    write(out / 'toy' / 'validation.jsonl', pairs(4, 6))
    return out


def toy(folder, split, n=None):
    with open(folder / 'toy' / f'{split}.jsonl') as f:
        return [json.loads(line) for line in f][:n]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # the script's own goes with the test


def run(*args):
    """The script in this process -> its globals."""
    before, sys.argv = sys.argv, [SCRIPT, '--device=cpu', *map(str, args)]
    try:
        return runpy.run_path(SCRIPT)
    finally:
        sys.argv = before


def fails(*args):
    with pytest.raises(ValueError) as error:
        run(*args)
    assert str(error.value).count('\n') == 0
    return str(error.value)


def result(out):
    return json.loads((out / 'results.json').read_text())


def scores(out, name, stemming='no'):  # [ROUGE-1, ROUGE-2, ROUGE-L, mean] of a line of the table
    found, = [values for n, s, values, _ in result(out)['table'] if name in n and s == stemming]
    return found


def summaries(out, seed=1):
    lines = (out / f'seed{seed}' / 'summaries.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


def log(out, seed=1):
    with open(out / f'seed{seed}' / 'log.csv') as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def google(generated, references, stem):
    scorer = rouge_scorer.RougeScorer(['rouge1', 'rouge2', 'rougeL'], use_stemmer=stem)
    each = [scorer.score(r, g) for g, r in zip(generated, references, strict=True)]
    three = [100 * statistics.fmean(score[key].fmeasure for score in each)
             for key in ('rouge1', 'rouge2', 'rougeL')]
    return [*three, sum(three) / 3]


@pytest.fixture(scope='session')
def trained(folder, tmp_path_factory):
    """One run as a command, long enough to learn to copy."""
    out = tmp_path_factory.mktemp('trained') / 'run'
    stdout = shell(f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
                   f'--out_dir={out}', '--epochs=6', '--batch_size=16', '--micro_batch=16',
                   '--learning_rate=4e-3', '--max_new_tokens=24', '--paper_row=MoM_P small',
                   '--device=cpu', script='finetune_xsum.py')
    return out, stdout


# ----------------------------------------------------------------------------- the whole of it

def test_it_learns_to_summarise(trained, folder, tmp_path):
    out, stdout = trained
    loss = result(out)['runs'][0]['held_out_loss']
    assert len(loss) == 7 and loss[-1] < loss[0] / 4
    run(f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
        f'--out_dir={tmp_path}', '--epochs=0', '--max_new_tokens=24')
    assert result(tmp_path)['runs'][0]['held_out_loss'] == [pytest.approx(loss[0], rel=1e-5)]
    untrained, tuned = scores(tmp_path, 'vanilla.pt, greedy'), scores(out, 'vanilla.pt, greedy')
    assert untrained[0] < 5 and tuned[0] > 40 and tuned[3] == pytest.approx(sum(tuned[:3]) / 3)


def test_report(trained, folder):
    out, stdout = trained
    report, rows = result(out), summaries(out)
    test = toy(folder, 'test')
    # Each is there once, in the order of the split.
    assert [row['id'] for row in rows] == [pair['id'] for pair in test]
    assert [row['reference'] for row in rows] == [pair['summary'] for pair in test]
    assert all(pair['document'].startswith(row['document'].strip())
               for row, pair in zip(rows, test))
    assert (report['train_pairs'], report['eval_pairs']) == (604, 28)
    assert report['steps'] == len(log(out)) == 6 * 38
    assert report['settings']['length'] == 96 and report['settings']['eval_split'] == 'test'
    assert report['settings']['dtype'] == 'float32' and report['torch'] == str(torch.__version__)
    for stemming, stem in (('no', False), ('yes', True)):
        want = google([row['generated'] for row in rows], [row['reference'] for row in rows], stem)
        assert scores(out, 'vanilla.pt, greedy', stemming) == pytest.approx(want, abs=1e-3)
        # The others are one sentence.
        lead = ['It rose!' if pair['id'].startswith('long') else pair['document'] for pair in test]
        want = google(lead, [pair['summary'] for pair in test], stem)
        assert scores(out, 'first sentence', stemming) == pytest.approx(want, abs=1e-3)
    markdown = (out / 'results.md').read_text()
    assert '| paper, Table 6, MoM_P small | not said | 21.73 | 6.14 | 17.72 | 15.19 |\n' in markdown
    assert markdown in stdout
    assert all(f'reference: {row["reference"]}\n  generated: {row["generated"]}' in stdout
               for row in rows[:10])
    lr = [row['lr'] for row in log(out)]
    assert lr[:24] == pytest.approx([4e-3 * min(n, 23) / 23 for n in range(1, 25)])
    assert lr[-1] == pytest.approx(4e-3 / 205)


def test_the_example_shown_is_what_the_model_sees(trained, folder):
    pair, = toy(folder, 'train', 1)
    assert f'{pair["document"]}\nTL;DR:>>> {pair["summary"]}<|endoftext|>\n' in trained[1]


def test_what_was_tuned_is_a_source(trained, folder, tmp_path):
    out, _ = trained
    run(f'--source={out / "seed1"}', f'--data_dir={folder / "toy"}', f'--out_dir={tmp_path}',
        '--epochs=0', '--max_new_tokens=24', '--gen_batch=5')
    assert summaries(tmp_path) == summaries(out)
    before, again = (result(path)['runs'][0]['held_out_loss'] for path in (out, tmp_path))
    assert again[0] == pytest.approx(before[-1])


# ----------------------------------------------------------------------------- what the model sees

def by_hand(pair):
    """Inputs and targets of a pair, one list each, straight from the description."""
    summary = list((' ' + pair['summary']).encode()) + [256]
    article = list(pair['document'].strip().encode())[:96 - len(SEP) - len(summary)]
    ids = article + SEP + summary
    return ids[:-1], [-100] * (len(article) + len(SEP) - 1) + summary


def one_by_one(model, pairs):
    """Mean loss of all summary tokens, a pair at a time and without padding."""
    losses = []
    for idx, targets in map(by_hand, pairs):
        assert len(idx) <= 95
        logits = model(torch.tensor([idx]))[0][0]
        losses += [F.cross_entropy(logits[t], torch.tensor(y))
                   for t, y in enumerate(targets) if y != -100]
    return torch.stack(losses).mean()


def test_the_loss_is_that_of_summary_tokens_alone_and_training_is_adamw_on_it(folder, tmp_path):
    run(f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
        f'--out_dir={tmp_path}', '--epochs=3', '--max_train=9', '--micro_batch=2',
        '--batch_size=50', '--max_eval=5', '--max_new_tokens=2', '--grad_clip=0.5',
        '--learning_rate=1e-3', '--warmup=0.3', '--weight_decay=0.1')
    model = GPT.from_pretrained(str(folder / 'vanilla.pt'))
    # Biases are (1, n).
    matrices = [p for p in model.parameters() if p.ndim == 3 or p.ndim == 2 and p.size(0) > 1]
    vectors = [p for p in model.parameters() if all(p is not m for m in matrices)]
    adamw = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1),
                               dict(params=vectors, weight_decay=0.0)])
    held_out = [one_by_one(model, toy(folder, 'test', 5)).item()]
    for step, lr in zip(log(tmp_path), (1e-3, 1e-3, 5e-4), strict=True):  # one step up, two down
        loss = one_by_one(model, toy(folder, 'train', 9))
        adamw.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        assert step['loss'] == pytest.approx(loss.item(), rel=1e-5)
        assert step['norm'] == pytest.approx(norm, rel=1e-4)
        assert step['lr'] == pytest.approx(lr) and norm > 0.5
        for p in model.parameters():
            p.grad *= 0.5 / norm
        for group in adamw.param_groups:
            group['lr'] = lr
        adamw.step()
        held_out.append(one_by_one(model, toy(folder, 'test', 5)).item())
    assert result(tmp_path)['runs'][0]['held_out_loss'] == pytest.approx(held_out, rel=1e-4)
    tuned = torch.load(tmp_path / 'seed1' / 'last.pt', weights_only=True)['model']
    for name, p in model.state_dict().items():
        torch.testing.assert_close(tuned[name], p, rtol=1e-3, atol=2e-5)


def test_mod_trains_as_it_trains_and_is_evaluated_as_it_generates(folder, tmp_path):
    run(f'--source={folder / "mod.pt"}', f'--data_dir={folder / "toy"}', f'--out_dir={tmp_path}',
        '--epochs=1', '--max_train=9', '--batch_size=50', '--max_eval=5', '--max_new_tokens=2')
    model = GPT.from_pretrained(str(folder / 'mod.pt'))
    rows = list(map(by_hand, toy(folder, 'train', 9)))
    longest = max(len(inputs) for inputs, _ in rows)
    idx = torch.tensor([inputs + [256] * (longest - len(inputs)) for inputs, _ in rows])
    targets = torch.tensor([targets + [-100] * (longest - len(targets)) for _, targets in rows])
    training = model.train()(idx, targets)[1].item()
    held_out = one_by_one(model.eval(), toy(folder, 'test', 5)).item()
    # The two modes can be told apart.
    assert abs(model(idx, targets)[1].item() - training) > 1e-3 * training
    assert log(tmp_path)[0]['loss'] == pytest.approx(training, rel=1e-5)
    assert result(tmp_path)['runs'][0]['held_out_loss'][0] == pytest.approx(held_out, rel=1e-5)


def test_every_epoch_has_every_pair_in_an_order_of_its_own(folder, tmp_path):
    run(f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
        f'--out_dir={tmp_path}', '--epochs=2', '--max_train=8', '--batch_size=1',
        '--learning_rate=0', '--seeds=2', '--max_eval=1', '--max_new_tokens=2')
    model = GPT.from_pretrained(str(folder / 'vanilla.pt'))
    each = [one_by_one(model, [pair]).item() for pair in toy(folder, 'train', 8)]
    losses = [row['loss'] for seed in (1, 2) for row in log(tmp_path, seed)]
    # With a learning rate of 0 a loss tells its pair.
    orders = [losses[at:at + 8] for at in range(0, 32, 8)]
    for order in orders:
        assert sorted(order) == pytest.approx(sorted(each), rel=1e-5)
    assert len({tuple(order) for order in orders}) == 4


def test_the_article_is_cut_never_the_summary(folder, tmp_path):
    lengths = 1, 50, 68, 69, 70, 86, 87, 88, 500
    data = [dict(document='m' * n, summary='s' * k, id=0) for n in lengths for k in (1, 40, 85, 86)]
    write(tmp_path / 'test.jsonl', data)
    seen = run(f'--source={folder / "vanilla.pt"}', f'--data_dir={tmp_path}',
               f'--out_dir={tmp_path / "run"}', '--epochs=0', '--max_new_tokens=20')['held_out']
    for pair, example in zip(data, seen, strict=True):
        n, k = len(pair['document']), len(pair['summary'])
        # Beside it: the separator; the summary, a space before it, its end.
        article = min(n, 96 - 7 - (1 + k + 1))
        assert example.ids.tolist() == [*b'm' * article, *SEP, *b' ', *b's' * k, 256]
        assert example.first == article + 7
        # The prompt knows nothing of the summary.
        assert example.prompt.tolist() == [*b'm' * min(n, 96 - 7 - 20), *SEP]
    write(tmp_path / 'test.jsonl', [*data, dict(document='m', summary='s' * 87, id=0)])
    args = [f'--source={folder / "vanilla.pt"}', f'--data_dir={tmp_path}',
            f'--out_dir={tmp_path / "new"}', '--epochs=0', '--max_new_tokens=20']
    sentence = fails(*args)
    assert '1 of 37 rows do not fit into the 96 tokens' in sentence
    assert 'test.jsonl, row 37, of 89 tokens' in sentence
    assert 'Take weights with a longer block_size' in sentence
    too_long = dict(document='m', summary='s' * 90, id=0)
    write(tmp_path / 'test.jsonl', [too_long, *data, *data[:2]] * 3)
    sentence = fails(*args)
    assert '3 of 117 rows do not fit' in sentence and 'row 1, of 92 tokens' in sentence
    assert '1 of 5 rows do not fit' in fails(*args, '--max_eval=5')


# ---------------------------------------------------------------------------- generation and scores

def test_batches_generate_what_one_by_one_would(trained, folder):
    out, _ = trained
    model = GPT.from_pretrained(str(out / 'seed1')).eval()
    for pair, row in zip(toy(folder, 'test'), summaries(out), strict=True):
        ids, new = list(pair['document'].strip().encode())[:96 - 7 - 24] + SEP, []
        while len(new) < 24 and 256 not in new:
            with torch.no_grad():
                new.append(model(torch.tensor([ids + new]))[0][0, -1].argmax().item())
        assert row['generated'] == bytes(i for i in new if i < 256).decode(errors='replace').strip()
    assert len({len(row['generated']) for row in summaries(out)}) > 2  # they end where they want to


def test_ids_that_are_no_tokens_are_not_decoded(folder, tmp_path):
    torch.manual_seed(0)
    model = GPT(MoMConfig(n_embd=64, n_head=2, block_size=96, vocab_size=300, **MODELS['vanilla']))
    with torch.no_grad():  # a padded vocabulary, and a model that likes the last of its ids best
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[299] = 1.0
    generated = []
    for vocab in (300, 257):
        out = tmp_path / str(vocab)
        state = {**model.state_dict(), 'wte.weight': model.wte.weight[:vocab].clone()}
        content = dict(model=state, model_config={**asdict(model.cfg), 'vocab_size': vocab},
                       meta={'tokenizer': 'bytes'})
        torch.save(content, tmp_path / 'source.pt')
        run(f'--source={tmp_path / "source.pt"}', f'--data_dir={folder / "toy"}',
            f'--out_dir={out}', '--epochs=0', '--max_eval=2', '--max_new_tokens=3')
        generated.append([row['generated'] for row in summaries(out)])
    assert generated[0] == generated[1] and any(generated[0])


def test_beams(folder, tmp_path):
    source, found = str(folder / 'vanilla.pt'), []
    # With three beams: articles one by one, and seven at a time.
    for beams, batch in ((1, 12), (3, 3), (3, 21)):
        out = tmp_path / f'{beams} {batch}'
        run(f'--source={source}', f'--data_dir={folder / "toy"}', '--epochs=0',
            '--max_new_tokens=9', '--max_eval=12', f'--out_dir={out}', f'--beams={beams}',
            f'--gen_batch={batch}')
        found.append([row['generated'] for row in summaries(out)])
    assert found[0] != found[1] == found[2]
    model = GPT.from_pretrained(source)
    for pair, generated in zip(toy(folder, 'test', 12), found[1], strict=True):
        prompt = list(pair['document'].strip().encode())[:96 - 7 - 9] + SEP
        text = model.generate(torch.tensor([prompt]), 9, beams=3, stop=256)[0].tolist()
        new = text[len(prompt):] + [256]
        assert generated == bytes(new[:new.index(256)]).decode(errors='replace').strip()
    assert result(out)['table'][2][0].endswith(', 3 beams')
    assert '- 3 beams, at most 9 new tokens' in (out / 'results.md').read_text()


@pytest.fixture(scope='session')
def names(folder, tmp_path_factory):
    """The script's functions, after a short run."""
    out = tmp_path_factory.mktemp('names') / 'run'
    return run(f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
               f'--out_dir={out}', '--epochs=0', '--max_eval=2', '--max_new_tokens=2')


def test_rouge_is_that_of_google(names):
    rng = random.Random(0)
    words = ('Run running runs ran, the The cat-cats cat\'s 10,000 £5m naïve café a of ties '
             'tied').split()
    texts = [' '.join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(60)]
    texts += ['', '...', 'Same text', 'ünïcode 漢字']
    references = [*texts[1:30], *texts[:1], *rng.sample(texts[:60], 30), 'a', 'b', 'Same text',
                  'the']
    scores = names['rouge'](texts, references)
    for stemming, stem in (('no', False), ('yes', True)):
        assert scores[stemming] == pytest.approx(google(texts, references, stem), abs=1e-3)
    assert scores['no'][0] + 1 < scores['yes'][0]


@pytest.mark.parametrize('text, first', [
    ('One went. Two stayed.', 'One went.'), ('No end\nSecond line.', 'No end'),
    ('It is 3.5 m. He', 'It is 3.5 m.'), ('"Is it?" He asked. So.', '"Is it?"'),
    ('He left the U.S.A. for good. Then.', 'He left the U.S.A. for good.'),
    ('Up by £2. £3 more.', 'Up by £2.'), ('Only one.', 'Only one.'), ('“Go!” “No.”', '“Go!”'),
    ('none', 'none')])
def test_first_sentence(text, first, names):
    assert names['first_sentence'](text) == first


def test_table_6(names):
    rows = names['paper']
    assert len(rows) == 21 and rows['MoE (share) large'] == (28.47, 9.47, 23.23, 20.39)
    for three in rows.values():
        # The paper rounds now up, now down.
        assert sum(three[:3]) / 3 == pytest.approx(three[3], abs=0.011)
    best = {size: max((row for row in rows if row.endswith(size)), key=lambda row: rows[row][3])
            for size in ('small', 'medium', 'large')}
    assert set(best.values()) == {f'MoM_P {size}' for size in best}


def test_without_nltk_there_is_no_stemming(folder, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    run(f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
        f'--out_dir={tmp_path / "run"}', '--epochs=0', '--max_eval=2', '--max_new_tokens=2')
    assert [line[1] for line in result(tmp_path / 'run')['table']] == ['no', 'no']
    assert 'pip install nltk' in (tmp_path / 'run' / 'results.md').read_text()


# ------------------------------------------------------------------ processes, micro-batches, seeds

@pytest.mark.parametrize('model', MODELS)
def test_micro_batches_change_nothing_but_rounding(model, folder, tmp_path):
    args = [f'--source={folder / model}.pt', f'--data_dir={folder / "toy"}', *ONE]
    for micro in (1, 4, 10):
        run(*args, f'--micro_batch={micro}', f'--out_dir={tmp_path / str(micro)}')
    one = log(tmp_path / '1')
    assert [row['step'] for row in one] == [1, 2, 3]  # the last of one pair
    for micro in (4, 10):
        for a, b in zip(one, log(tmp_path / str(micro)), strict=True):
            assert a['loss'] == pytest.approx(b['loss'], rel=1e-4)
            assert a['norm'] == pytest.approx(b['norm'], rel=1e-3)
        a, b = (result(tmp_path / str(n))['runs'][0]['held_out_loss'] for n in (1, micro))
        # MoD's predictor decides here, and its own loss is a mean whose weights depend a little on
        # the micro-batch.
        assert a == pytest.approx(b, rel=5e-3 if model == 'mod' else 1e-4)


def test_two_processes_equal_one(folder, tmp_path):
    args = [f'--source={folder / "mom.pt"}', f'--data_dir={folder / "toy"}', *ONE]
    run(*args, f'--out_dir={tmp_path / "one"}')
    stdout = shell(*args, f'--out_dir={tmp_path / "two"}', '--gen_batch=2', '--micro_batch=3',
                   '--device=cpu', script='finetune_xsum.py', ranks=2)
    assert 'cpu x 2' in stdout and stdout.count('held-out loss, nats') == 1
    # In the last step, one rank has no pair.
    for a, b in zip(log(tmp_path / 'one'), log(tmp_path / 'two'), strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-4)
        assert a['norm'] == pytest.approx(b['norm'], rel=1e-3)
    one, two = result(tmp_path / 'one'), result(tmp_path / 'two')
    a, b = (report['runs'][0]['held_out_loss'] for report in (one, two))
    assert a == pytest.approx(b, rel=1e-4)
    assert two['processes'] == 2 and summaries(tmp_path / 'one') == summaries(tmp_path / 'two')


def test_processes_with_other_weights_are_refused(folder, tmp_path, monkeypatch):
    def other(source):
        model, tokenizer = real(source)
        with torch.no_grad():
            model.wte.weight.add_(int(os.environ['RANK']))
        return model, tokenizer
    real = inputs.model_and_tokenizer
    monkeypatch.setattr(inputs, 'model_and_tokenizer', other)
    args = [f'--source={folder / "mom.pt"}', f'--data_dir={folder / "toy"}', *ONE, '--device=cpu',
            f'--out_dir={tmp_path / "run"}']
    training = kill.Training(args, 2, tmp_path / 'output', 'finetune_xsum.py')
    assert training.wait() == 1, training.text()
    assert 'has another run than process 0 on' in training.text()


def test_seeds(folder, tmp_path, monkeypatch):
    rng, asked = random.Random(1), []

    def generate(self, idx, max_new_tokens, **how):  # as if each seed had learnt something else
        asked.append((how['temperature'], how['beams'], how['stop'], how['lengths'].tolist()))
        out = torch.full((len(idx), idx.size(1) + max_new_tokens), 256)
        for row, n in zip(out, how['lengths']):
            text = list(' '.join(rng.sample(WORDS, 2)).encode())
            row[n:n + len(text)] = torch.tensor(text)
        return out

    monkeypatch.setattr(GPT, 'generate', generate)
    args = [f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
            f'--out_dir={tmp_path}', *ONE]
    args += ['--seed=7', '--max_eval=28']
    run(*args)
    assert len(asked) == 1 and asked[0][:3] == (0, 1, 256)
    lengths = asked[0][3]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 96 - 12 and len(lengths) == 28
    first = log(tmp_path, 7)
    run(*args, '--seeds=3')  # more seeds go on in the same folder
    assert len(asked) == 3 and log(tmp_path, 7) == first
    assert first[0] != log(tmp_path, 8)[0] != log(tmp_path, 9)[0]
    report = result(tmp_path)
    assert [r['seed'] for r in report['runs']] == [7, 8, 9]
    starts = [r['held_out_loss'][0] for r in report['runs']]
    assert starts[0] == starts[1]  # all start alike
    for _, stemming, mean, std in report['table'][2:]:
        for i in range(4):
            three = [r['rouge'][stemming][i] for r in report['runs']]
            assert mean[i] == pytest.approx(sum(three) / 3)
            squares = sum((x - mean[i]) ** 2 for x in three)
            assert std[i] == pytest.approx((squares / 2) ** 0.5, abs=1e-9)
        assert f'| {mean[0]:.2f} ± {std[0]:.2f} |' in (tmp_path / 'results.md').read_text()
        assert std[0] > 0.1


# ----------------------------------------------------------------------------- what is said

def test_what_is_cut_and_what_is_empty_is_said(folder, tmp_path, monkeypatch, capsys):
    def generate(self, idx, max_new_tokens, lengths, **how):
        # All are empty, but for the first, that of the longest article.
        out = torch.full((len(idx), idx.size(1) + max_new_tokens), 256)
        out[0, lengths[0]:lengths[0] + 3] = torch.tensor([*b'cat'])
        return out

    monkeypatch.setattr(GPT, 'generate', generate)
    run(f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
        f'--out_dir={tmp_path}', *ONE, '--warmup=0.4')
    stdout, report = capsys.readouterr().out, (tmp_path / 'results.md').read_text()
    for text in (stdout, report):  # the first 21 and 6 rows hold one long pair each
        assert 'articles: train truncated 1 of 21; test truncated 1 of 6 (warning: 17%' in text
        assert '- summaries that are empty: 5 of 6\n' in text
    assert 'learning rate 0.001, warm-up over 40% of the steps, float32\n' in report
    assert 'pairs of at most 96 tokens' in report
    assert result(tmp_path)['truncated'] == dict(train=1, eval=1)
    assert result(tmp_path)['runs'][0]['empty'] == 5


def test_a_summary_leaves_less_room_in_training_than_in_a_prompt(folder, tmp_path):
    """An article can fit into the prompt and be cut beside its own summary, or the reverse."""
    rows = [dict(document='m' * 60, summary='s' * 40, id=0),
            dict(document='m' * 80, summary='s', id=1)]
    write(tmp_path / 'test.jsonl', rows)
    seen = run(f'--source={folder / "vanilla.pt"}', f'--data_dir={tmp_path}',
               f'--out_dir={tmp_path / "run"}', '--epochs=0', '--max_new_tokens=20')['held_out']
    assert [(e.cut, e.prompt_cut) for e in seen] == [(True, False), (False, True)]


# ---------------------------------------------------------------------------- stopping and going on

class Stop(Exception):
    pass


def stop_after(monkeypatch, name, calls):
    """GPT.<name> raises Stop at the call after `calls` of them -> a list with one entry a call."""
    real, seen = getattr(GPT, name), []

    def stopping(self, idx, *args, **kwargs):
        if len(seen) == calls:
            raise Stop
        seen.append(len(idx))
        return real(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, name, stopping)
    return seen


def test_stopped_in_training_and_resumed_equals_undisturbed_bit_for_bit(
        folder, tmp_path, monkeypatch):
    args = [f'--source={folder / "mom.pt"}', f'--data_dir={folder / "toy"}', *ONE, '--epochs=3']
    run(*args, f'--out_dir={tmp_path / "whole"}')
    with monkeypatch.context() as patch:
        # An evaluation of one batch, an epoch of 5 batches (2 + 2 + 1), an evaluation, 2 batches of
        # the second epoch.
        stop_after(patch, 'loss', 1 + 5 + 1 + 2)
        with pytest.raises(Stop):
            run(*args, f'--out_dir={tmp_path / "broken"}')
    saved = torch.load(tmp_path / 'broken' / 'seed1' / 'last.pt', weights_only=True)
    assert saved['epoch'] == 1 and saved['optimizer'] is not None
    run(*args, f'--out_dir={tmp_path / "broken"}')
    whole, broken = (torch.load(tmp_path / n / 'seed1' / 'last.pt', weights_only=True)
                     for n in ('whole', 'broken'))
    assert all(torch.equal(w, broken['model'][key]) for key, w in whole['model'].items())
    assert whole['losses'] == broken['losses']
    assert whole['log'] == broken['log'] and len(whole['log']) == 9
    assert log(tmp_path / 'whole') == log(tmp_path / 'broken')
    assert summaries(tmp_path / 'whole') == summaries(tmp_path / 'broken')


def test_stopped_in_generation_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    args = [f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}', *ONE,
            '--gen_batch=2']
    run(*args, f'--out_dir={tmp_path / "whole"}')
    out = tmp_path / 'broken'
    with monkeypatch.context() as patch:
        stop_after(patch, 'generate', 2)
        with pytest.raises(Stop):
            run(*args, f'--out_dir={out}')
    path = out / 'seed1' / 'summaries.jsonl'
    assert len(path.read_text().splitlines()) == 4
    # As a crash would leave it: the fourth line is cut in half.
    path.write_text(path.read_text()[:-10])
    with monkeypatch.context() as patch:
        seen, trained = stop_after(patch, 'generate', 99), stop_after(patch, 'loss', 99)
        run(*args, f'--out_dir={out}')
    assert sum(seen) == 3 and not trained  # six less the three whole lines, and no training
    assert summaries(out) == summaries(tmp_path / 'whole')
    path.write_text(path.read_text() + '{"row": 0, "id"\n')  # no crash leaves that
    with pytest.raises(ValueError, match='summaries.jsonl is damaged .* delete it'):
        run(*args, f'--out_dir={out}')


def test_another_run_in_the_same_folder_is_refused(folder, tmp_path, monkeypatch):
    data, source, out = tmp_path / 'data', tmp_path / 'source.pt', tmp_path / 'run'
    shutil.copytree(folder / 'toy', data)
    shutil.copy(folder / 'vanilla.pt', source)
    args = [f'--source={source}', f'--data_dir={data}', f'--out_dir={out}', *ONE]
    run(*args)
    first = log(out)
    for extra, message in (('--learning_rate=0.1', 'learning_rate=0.001, this one has 0.1'),
                           ('--eval_split=validation', "eval_split='test'"),
                           ('--beams=2', 'beams=1')):
        refusal = fails(*args, extra)
        assert message in refusal and '--overwrite=True' in refusal
    other = torch.load(source, weights_only=True)  # other weights at the same place
    other['model']['wte.weight'] += 1e-3
    torch.save(other, source)
    assert 'weights_sha256=' in fails(*args)
    shutil.copy(folder / 'vanilla.pt', source)
    with monkeypatch.context() as patch:  # the same files by other names
        patch.chdir(tmp_path)
        run('--source=./source.pt', '--data_dir=data', *args[2:])
    assert log(out) == first
    write(data / 'test.jsonl', pairs(6, 77))
    assert 'data_sha256=' in fails(*args)
    assert log(out) == first and summaries(out)[0]['id'] == '4-0'
    # What starts anew and does not get far leaves nothing of the old run.
    with monkeypatch.context() as patch:
        stop_after(patch, 'loss', 2)
        with pytest.raises(Stop):
            run(*args, '--overwrite=True')
    assert not (out / 'results.md').exists()
    run(*args)
    inside = f'--source={out / "seed1"}'
    assert 'overwrite=True empties' in fails(*args, inside, '--overwrite=True')
    (out / 'run.json').write_text('{')
    assert 'run.json is not a result of this script' in fails(*args)
    (out / 'run.json').unlink()  # as in a folder of something else's
    assert 'it is of something else' in fails(*args, inside)
    assert len(log(out)) == 3
    assert [row['id'] for row in summaries(out)] == [f'77-{i}' for i in range(6)]


def test_ctrl_c_keeps_whole_epochs_and_says_so(folder, tmp_path):
    args = [f'--source={folder / "mom.pt"}', f'--data_dir={folder / "toy"}', *ONE, '--epochs=30',
            '--device=cpu']
    run(*args, f'--out_dir={tmp_path / "whole"}')
    out = tmp_path / 'out'
    words = [sys.executable, SCRIPT, *args, f'--out_dir={out}', '--overwrite=True']
    process = subprocess.Popen(words, cwd=common.ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while not (out / 'seed1' / 'last.pt').exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode == 130, stderr
    assert 'Traceback' not in stderr and stderr.splitlines()[-1].endswith(
        f'{out} keeps the whole epochs and the summaries that are made: the same '
        'command goes on there, without --overwrite')
    assert 1 <= torch.load(out / 'seed1' / 'last.pt', weights_only=True)['epoch'] < 30
    run(*args, f'--out_dir={out}')
    whole, broken = (torch.load(path / 'seed1' / 'last.pt', weights_only=True)
                     for path in (tmp_path / 'whole', out))
    assert all(torch.equal(w, broken['model'][key]) for key, w in whole['model'].items())
    assert whole['losses'] == broken['losses'] and summaries(tmp_path / 'whole') == summaries(out)


def test_two_runs_do_not_share_a_folder(folder, tmp_path):
    args = [f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
            f'--out_dir={tmp_path}', *ONE]
    with open(tmp_path / '.lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process does
        assert f'another run is at work in {tmp_path}' in fails(*args)
        assert os.listdir(tmp_path) == ['.lock']
    run(*args)


def test_a_place_that_takes_no_results_is_found_first(folder, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ValueError, match='file is a file, where a folder has to be'):
        run(f'--source={folder / "vanilla.pt"}', f'--data_dir={tmp_path / "nowhere"}',
            f'--out_dir={tmp_path}/file/run')


def test_no_fp64_is_made_on_the_device(folder, tmp_path, monkeypatch):
    make = torch.tensor

    def watched(*args, **kwargs):
        assert kwargs.get('dtype') != torch.float64
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, 'tensor', watched)
    run(f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
        f'--out_dir={tmp_path}', *ONE)


# ----------------------------------------------------------------------------- data

@pytest.mark.parametrize('ending', ['parquet', 'csv', 'tsv'])
def test_every_format_is_read_alike(ending, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, 'load_dataset', None)  # local files do not need it
    text = 'A "quoted", text\nof two\tlines'
    if ending == 'tsv':  # a row is a line
        text = '"Quoted", it begins'
    rows = [dict(document=text, summary='NA', id='007'),
            dict(document='null', summary='2', id='08'),
            dict(document='"A', summary='"B', id='2019-05-01'), *pairs(3, 9)]
    for name in ('jsonl', ending):
        write(tmp_path / name / f'test.{name}', rows)
        run(f'--source={folder / "vanilla.pt"}', f'--data_dir={tmp_path / name}', '--epochs=0',
            '--max_new_tokens=2', f'--out_dir={tmp_path / name / "run"}')
    one, other = (tmp_path / name / 'run' for name in ('jsonl', ending))
    assert result(one)['data_sha256'] == result(other)['data_sha256']
    assert summaries(one) == summaries(other)
    assert [row['id'] for row in summaries(other)][:3] == ['007', '08', '2019-05-01']


def test_one_file_is_cut_into_three(folder, tmp_path):
    write(tmp_path / 'all.jsonl', pairs(40, 8))

    def ids(split, *args):
        names = run(f'--source={folder / "vanilla.pt"}', f'--data_file={tmp_path / "all.jsonl"}',
                    '--epochs=0', f'--out_dir={tmp_path / "run"}', '--overwrite=True',
                    '--max_new_tokens=2', '--split=0.7,0.1,0.2', *args)
        return [e.id for e in names['read'](split, 0)[0]]

    parts = {split: ids(split) for split in ('train', 'validation', 'test')}
    assert [len(part) for part in parts.values()] == [28, 4, 8]
    assert {i for part in parts.values() for i in part} == {f'8-{i}' for i in range(40)}
    assert ids('test') == parts['test'] and ids('test', '--split_seed=2') != parts['test']
    assert [row['id'] for row in summaries(tmp_path / 'run')] == ids('test', '--split_seed=2')


def test_the_hub(folder, tmp_path, monkeypatch):
    args = [f'--source={folder / "vanilla.pt"}', f'--out_dir={tmp_path}', *ONE]
    asked = []

    def unreachable(*args, **kwargs):
        raise ConnectionError('no route')

    def hub(name, config, split, streaming):
        assert config is None and not streaming
        asked.append((name, split))
        empty = dict(document=' ', summary='x', id='none')
        return datasets.Dataset.from_list([empty, *pairs(22, len(split))])

    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    message = 'EdinburghNLP/xsum could not be loaded (no route): give local files, --data_dir='
    assert message in fails(*args)
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(datasets, 'load_dataset', hub)
    run(*args)
    assert asked == [('EdinburghNLP/xsum', 'test'), ('EdinburghNLP/xsum', 'train')]
    report = result(tmp_path)
    assert report['rows_without_text'] == {'train': 1, 'eval': 1} and report['train_pairs'] == 21
    # The setting max_eval counts what is used.
    assert [row['id'] for row in summaries(tmp_path)] == [f'4-{i}' for i in range(6)]


def test_the_shards_of_the_hub_are_read_as_they_are(folder, tmp_path):
    rows = list(pairs(9, 9))
    for n in range(3):
        write(tmp_path / f'test-{n:05}-of-00003.parquet', rows[3 * n:3 * n + 3])
    args = [f'--source={folder / "vanilla.pt"}', f'--data_dir={tmp_path}', '--epochs=0',
            '--max_new_tokens=2']
    run(*args, f'--out_dir={tmp_path / "run"}')
    assert [row['id'] for row in summaries(tmp_path / 'run')] == [row['id'] for row in rows]


GOOD = '{"document": "a cat", "summary": "cat", "id": 1}\n'


@pytest.mark.parametrize('name, text, message', [
    ('test.jsonl', '', 'test.jsonl leaves no row for test'),
    ('test.jsonl', '\n\n', 'test.jsonl leaves no row'),
    ('test.csv', 'document,summary,id\n', 'test.csv leaves no row'),
    ('test.jsonl', GOOD + '{"document": "a', 'test.jsonl, row 2 cannot be read'),
    ('test.jsonl', '{"article": "a cat", "summary": "cat"}\n',
     "row 1 has no text in 'document', its columns are article, summary"),
    ('test.csv', 'document,text\na,b\n',
     "row 1 has no text in 'summary', its columns are document, text"),
    ('test.jsonl', GOOD + '{"document": "a cat", "summary": " "}\n',
     "row 2 has no text in 'summary'"),
    ('test.jsonl', GOOD + GOOD + '{"summary": "a cat"}\n', "row 3 has no text in 'document'"),
    ('test.jsonl', '{"document": 5, "summary": "cat"}\n', "row 1 has no text in 'document'"),
    ('test.jsonl', '{"document": "\\ud83d", "summary": "cat"}\n',
     "row 1 has no text in 'document'"),
    ('tset.jsonl', GOOD,
     'has no split test: it holds tset.jsonl; give one of test.jsonl, test.parquet, test.csv')])
def test_bad_files(name, text, message, folder, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / name).write_text(text)
    sentence = fails(f'--source={folder / "vanilla.pt"}', f'--data_dir={tmp_path / "data"}',
                     f'--out_dir={tmp_path / "run"}', '--epochs=0', '--max_new_tokens=2')
    assert message in sentence and str(tmp_path) in sentence
    assert not any((tmp_path / 'run').glob('*'))


def test_two_files_of_one_split_and_wrong_endings(folder, tmp_path):
    args = [f'--source={folder / "vanilla.pt"}', f'--out_dir={tmp_path / "run"}', '--epochs=0',
            '--max_new_tokens=2']
    for name in ('test.jsonl', 'test.csv', 'all.txt', 'one.jsonl'):
        (tmp_path / name).write_text(GOOD if name.endswith('jsonl') else 'document,summary\na,b\n')
    assert 'test.jsonl are the same split: keep one' in fails(*args, f'--data_dir={tmp_path}')
    for name, message in (
            ('all.txt', 'all.txt is no file with one of the endings .jsonl, '),
            ('nothing.csv', 'nothing.csv is no file'),
            ('one.jsonl', 'no row for test: give more rows or other shares')):
        assert message in fails(*args, f'--data_file={tmp_path / name}')


def test_rows_without_text_can_be_left_out(folder, tmp_path):
    empty = '{"document": "", "summary": "x", "id": 2}\n'
    (tmp_path / 'test.jsonl').write_text(GOOD + empty + GOOD.replace('1', '3'))
    run(f'--source={folder / "vanilla.pt"}', f'--data_dir={tmp_path}',
        f'--out_dir={tmp_path / "run"}', '--epochs=0', '--max_new_tokens=2', '--skip_empty=True')
    assert [row['id'] for row in summaries(tmp_path / 'run')] == ['1', '3']
    assert result(tmp_path / 'run')['rows_without_text'] == {'train': 0, 'eval': 1}


# ----------------------------------------------------------------------------- settings and weights

@pytest.mark.parametrize('args, message', [
    (['--batch_size=0'], 'batch_size=0 must be at least 1'), (['--warmup=1'], '0 <= warmup < 1'),
    (['--eval_split=train'], 'one of test, validation'), (['--data_file=x.csv'], 'are both given'),
    (['--split=0.5,0.5'], 'three shares'), (['--split=0.5,0.5,0.5'], 'three shares'),
    (['--split=a,1,0'], 'as 0.8,'), (['--split=0.8,0.1.0,0.1'], 'three shares'),
    (['--paper_row=MoM_P tiny'], 'MoM_P small'),
    (['--dtype=float16'], "one of 'auto', 'bfloat16', 'float32'"),
    (['--max_new_tokens=89'], 'take fewer --max_new_tokens'), (['--source=nowhere'], 'nowhere')])
def test_bad_settings(args, message, folder, tmp_path):
    assert message in fails(f'--source={folder / "vanilla.pt"}', f'--data_dir={folder / "toy"}',
                            '--max_new_tokens=2', f'--out_dir={tmp_path}', *args)
    assert not os.listdir(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    state = torch.load(folder / 'vanilla.pt', weights_only=True)
    state['model']['ln_f.weight'][0] = float('nan')
    torch.save(state, tmp_path / 'nan.pt')
    sentence = fails(f'--source={tmp_path / "nan.pt"}', f'--data_dir={folder / "toy"}',
                     f'--out_dir={tmp_path / "run"}', *ONE)
    assert 'step 1: loss nan' in sentence


def test_gpt2_in_hugging_face_format_and_in_bfloat16(folder, tmp_path):
    shape = dict(n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path / 'hf')
    run(f'--source={tmp_path / "hf"}', f'--data_dir={folder / "toy"}',
        f'--out_dir={tmp_path / "run"}', *ONE, '--dtype=bfloat16', '--max_train=8',
        '--separator= In short:')
    report = result(tmp_path / 'run')
    assert report['settings']['length'] == 64 and report['settings']['dtype'] == 'bfloat16'
    saved = torch.load(tmp_path / 'run' / 'seed1' / 'last.pt', weights_only=True)
    assert saved['meta'] == {'tokenizer': 'gpt2'}
    assert report['runs'][0]['held_out_loss'][0] == pytest.approx(10.82, abs=0.2)  # log of 50,257
    small = transformers.GPT2Config(**shape, vocab_size=300, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(small).save_pretrained(tmp_path / 'small')
    assert 'give weights that were trained with this tokenizer' in fails(
        f'--source={tmp_path / "small"}', f'--data_dir={folder / "toy"}',
        f'--out_dir={tmp_path / "new"}', *ONE)
