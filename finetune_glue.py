"""Fine-tune a checkpoint on GLUE (Wang et al. 2018) and score it, by the paper's protocol (section 4.1, Table 5).

  python finetune_glue.py --source=out/mom_demo --task=cola                              data from the Hub
  python finetune_glue.py --source=out/mom_demo --task=cola,rte --data_dir=data/glue     from files
  torchrun --nproc_per_node=8 finetune_glue.py --source=gpt2-medium --task=all --seeds=3

The paper: learning rate 2e-5, 128 tokens; CoLA, STS-B, MRPC and RTE 3 epochs of batches of 32; MNLI, QNLI, QQP and
SST-2 8,000 steps of 64. Figures in percent: Matthews for CoLA, F1 for MRPC and QQP, the mean of Pearson and Spearman
for STS-B, accuracy for the rest. The average is over nine figures, MNLI's two among them.

The paper leaves open, and we took what is usual for BERT and GPT: AdamW (0.9, 0.999) with weight decay 0.01, 10%
linear warm-up, then linear decay to 0, clipping at 1.0. The weights after the last step are scored, on the validation
split: no epoch is picked by its score. A sentence is followed by <|endoftext|>, a pair is sentence <|endoftext|>
sentence <|endoftext|>; of a pair that is too long, the longer one is cut. One linear layer reads the last
<|endoftext|>, after the final LayerNorm. STS-B is regression with squared error. MoD, and a balance loss, take padding
for tokens in training.

Files: data_dir/<task>/train.*, validation.* (mnli: validation_matched.*, validation_mismatched.*) and, if there are,
test.* likewise; .jsonl, .parquet, .csv, or .tsv without quotes; columns and labels are those of nyu-mll/glue.

out_dir gets <task>_seed<n>.json for each result, results.md with all of them, and predictions_seed<n>/ with the files
of the GLUE server: CoLA.tsv for the test split, or CoLA.validation.tsv where there is no test split. The server also
wants WNLI.tsv and AX.tsv: take those of its sample submission. Run the same command again to go on after a stop: what
has its .json is not done again.
"""
import copy
import csv
import glob
import hashlib
import itertools
import json
import math
import os
import re
import time
from collections import namedtuple
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torchmetrics.functional import accuracy, f1_score, matthews_corrcoef, pearson_corrcoef, spearman_corrcoef
from tqdm import tqdm

import common
from model import GPT

# --- what
source = 'out/mom_demo'       # a run's directory or checkpoint, a GPT-2 name, or a Hugging Face directory
task = 'all'                  # cola, sst2, mrpc, qqp, qnli, rte, mnli, stsb, several as 'cola,rte', or 'all'
seed = 1337                   # of the fresh head, the order of the examples and the choice of max_train
seeds = 1                     # how many seeds: seed, seed + 1, ...
out_dir = ''                  # '' is out/glue_<name of source>
save = False                  # keep each fine-tuned model as out_dir/<task>_seed<n>.pt
paper_row = 'MoM_P small'     # row of Table 5 to show beside ours (GPT2, MoD, MoE, ... medium, large); '' for none
# --- data
data_dir = ''                 # folder of local files, see above; '' is the Hub
hub_id = 'nyu-mll/glue'       # on the Hub
max_train = 0                 # training examples, drawn at random; 0 is all
max_eval = 0                  # validation and test examples, the first ones; 0 is all
length = 128                  # tokens of an example at most; a model with a shorter block_size takes that
# --- optimisation
learning_rate = 2e-5          # peak
batch_size = 0                # examples per step, over all processes; 0 is the task's
epochs = 0                    # 0 is the task's
max_steps = 0                 # instead of epochs; 0 is the task's
micro_batch = 64              # examples per forward pass of a process, at most
warmup = 0.1                  # share of the steps in which the learning rate rises
weight_decay = 0.01           # of matrices and embeddings
grad_clip = 1.0               # largest gradient norm; 0 is off
# --- system
device = 'auto'               # 'auto', 'cpu', 'cuda'
dtype = 'auto'                # autocast: 'bfloat16' or 'float32'; auto is bfloat16 on a GPU
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not in tests

# Columns, label names, figure of Table 5, the paper's batch size, epochs or steps, and {server's name: split}.
Task = namedtuple('Task', 'columns labels metric batch_size epochs max_steps splits')
PAIR = ['sentence1', 'sentence2']
TASKS = {  # in the order of Table 5
    'sst2': Task(['sentence'], ['negative', 'positive'], 'accuracy', 64, 0, 8000, {'SST-2': 'validation'}),
    'cola': Task(['sentence'], ['unacceptable', 'acceptable'], 'Matthews', 32, 3, 0, {'CoLA': 'validation'}),
    'mrpc': Task(PAIR, ['not_equivalent', 'equivalent'], 'F1', 32, 3, 0, {'MRPC': 'validation'}),
    'qqp': Task(['question1', 'question2'], ['not_duplicate', 'duplicate'], 'F1', 64, 0, 8000, {'QQP': 'validation'}),
    'qnli': Task(['question', 'sentence'], ['entailment', 'not_entailment'], 'accuracy', 64, 0, 8000,
                 {'QNLI': 'validation'}),
    'rte': Task(PAIR, ['entailment', 'not_entailment'], 'accuracy', 32, 3, 0, {'RTE': 'validation'}),
    'mnli': Task(['premise', 'hypothesis'], ['entailment', 'neutral', 'contradiction'], 'accuracy', 64, 0, 8000,
                 {'MNLI-m': 'validation_matched', 'MNLI-mm': 'validation_mismatched'}),
    'stsb': Task(PAIR, [], 'correlation', 32, 3, 0, {'STS-B': 'validation'})}  # no label names: regression, 0 to 5
BY_NAME = ('qnli', 'rte', 'mnli')  # the server wants names for these and numbers for the others
ENDINGS = ('jsonl', 'parquet', 'csv', 'tsv')

FIGURES = [figure for t in TASKS.values() for figure in t.splits]
TABLE_5 = """
GPT2 small         92.09 26.27 85.11 83.09 87.55 62.45 79.90 78.74 82.67 75.32
MoD small          87.73 21.66 81.43 82.01 81.79 64.62 75.96 75.22 79.76 72.24
MoE small          89.68 45.87 82.05 84.09 85.94 65.52 79.46 78.74 83.87 77.25
MoE (share) small  89.53 37.29 82.01 83.49 85.21 64.94 78.49 77.99 83.43 75.82
MoM_E small        90.83 31.83 82.92 83.49 84.79 69.68 78.52 77.40 83.84 75.92
MoM_I small        90.02 47.21 82.90 84.07 85.34 66.43 79.82 79.72 84.79 77.81
MoM_P small        91.40 46.16 82.68 84.62 86.49 67.51 80.85 80.18 84.06 78.22
GPT2 medium        94.15 48.18 86.00 85.94 90.41 64.98 84.02 83.92 86.77 80.49
MoD medium         89.45 37.43 84.97 84.21 84.88 64.26 78.94 77.94 83.47 76.17
MoE medium         91.86 49.20 85.51 86.39 89.09 68.12 84.44 83.49 86.17 80.47
MoE (share) medium 92.78 49.44 84.56 86.40 89.35 66.79 84.00 83.39 86.42 80.35
MoM_E medium       91.40 48.48 87.48 86.92 89.11 67.51 83.73 83.01 86.06 80.41
MoM_I medium       92.46 50.19 87.31 86.43 89.35 68.94 84.44 83.46 86.66 81.03
MoM_P medium       92.88 53.61 87.64 86.64 89.75 71.06 84.69 83.98 87.14 81.93
GPT2 large         94.15 60.04 88.74 87.88 91.89 75.45 86.80 85.98 89.30 84.47
MoD large          91.51 52.86 87.29 87.20 89.57 67.87 85.07 84.38 87.66 81.49
MoE large          94.32 61.19 88.54 88.36 92.04 71.68 87.38 86.94 89.45 84.43
MoE (share) large  93.88 61.43 88.12 88.17 91.56 68.31 87.01 86.73 89.28 83.83
MoM_E large        93.64 59.26 88.25 87.59 91.29 72.23 85.20 84.78 88.26 83.39
MoM_I large        93.69 62.25 89.19 88.12 92.36 74.98 87.22 86.78 89.90 84.94
MoM_P large        94.42 64.49 89.56 88.68 92.94 77.69 87.68 86.98 90.70 85.90"""
PAPER = {line.rsplit(None, 10)[0]: line.split()[-10:] for line in TABLE_5.strip().splitlines()}

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
is_main = rank == 0


def say(*text):
    if is_main:
        print(*text, flush=True)


# ----------------------------------------------------------------------------- data

Examples = namedtuple('Examples', 'ids labels source truncated')  # ids: an array per example; truncated: how many were


def read_rows(path):
    """The rows of a file, as dicts. Raises ValueError naming file, row and fix for one that cannot be read."""
    n = 0  # rows so far
    try:
        if path.endswith('.parquet'):
            from pyarrow.parquet import read_table
            yield from read_table(path).to_pylist()
            return
        with open(path, encoding='utf-8-sig', newline='') as f:
            if path.endswith('.jsonl'):
                rows = map(json.loads, f)
            elif path.endswith('.csv'):
                rows = csv.DictReader(f, strict=True)
            else:
                rows = csv.DictReader(f, delimiter='\t', quoting=csv.QUOTE_NONE)
            for row in rows:
                if not isinstance(row, dict):
                    raise ValueError('it is no object with columns')
                if not path.endswith('.jsonl'):
                    if None in row or None in row.values():
                        raise ValueError('it has more or fewer values than there are columns')
                    if re.fullmatch(r'-?[0-9]+([.][0-9]*)?', row.get('label', '')):
                        row['label'] = float(row['label'])
                yield row
                n += 1
    except (ValueError, OSError, csv.Error) as error:  # not JSON, not UTF-8, not parquet, not readable
        raise ValueError(f'{path}, row {n + 1} cannot be read ({error}): repair or delete it') from error


def find_splits(name):
    """Where the splits of a task are -> {split: (source, rows)}. Raises ValueError, with the fix, if one is missing."""
    found, validation = {}, [*TASKS[name].splits.values()]
    if not data_dir:
        from datasets import load_dataset
        from huggingface_hub.errors import HfHubHTTPError
        try:
            table = load_dataset(hub_id, name)
        # In turn: no network, no such id, the Hub's refusals, no such task, a script instead of data.
        except (ConnectionError, FileNotFoundError, HfHubHTTPError, ValueError, RuntimeError) as error:
            raise ValueError(f'{hub_id}, {name} could not be loaded from the Hugging Face Hub ({error}): give a folder '
                             f'that holds {name}/train.jsonl and so on, --data_dir=FOLDER') from error
    for split in ('train', *validation, *(v.replace('validation', 'test') for v in validation)):
        if data_dir:
            paths = [os.path.join(data_dir, name, f'{split}.{ending}') for ending in ENDINGS]
            paths = [path for path in paths if os.path.isfile(path)]
            if len(paths) > 1:
                raise ValueError(f'{" and ".join(paths)} are the same split: keep one of them')
            if paths:
                found[split] = paths[0], read_rows(paths[0])
        elif split in table:
            found[split] = f'{hub_id}, {name}, {split}', table[split]
        if split not in found and not split.startswith('test'):
            raise ValueError(f'{data_dir or hub_id} has no {name}/{split}' + (
                f': put {name}/{split}.jsonl there (or .parquet, .csv, .tsv)' if data_dir else ': take another hub_id'))
    return found


def data_of(name):
    """What stands for the data of a task in its results: the Hub's id, or a SHA-256 of its local files."""
    digest = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(glob.escape(data_dir), name, '*'))) if data_dir else ():
        if path.endswith(ENDINGS):
            digest.update(f'{os.path.basename(path)} {common.sha256(path)}\n'.encode())
    return digest.hexdigest() if data_dir else hub_id


def join_sentences(parts, eot, length):
    """The ids of one or two sentences -> one list of at most `length`, each sentence followed by eot. What is too long
    loses its end, of two sentences the longer one first."""
    room = length - len(parts)
    keep = [room]
    if len(parts) == 2:
        a, b = map(len, parts)
        first = min(a, max(room - b, (room + 1) // 2))
        keep = [first, room - first]
    return [i for part, n in zip(parts, keep) for i in (*part[:n], eot)]


def encode_rows(name, split, where, rows, tokenizer, length):
    """Rows of a split -> Examples, a test split's without labels. Raises ValueError naming source, row and fix."""
    t, texts, labels, ids, truncated = TASKS[name], [], [], [], 0
    wanted = t.columns if split.startswith('test') else [*t.columns, 'label']
    allowed = ', '.join(f'{i} ({label})' for i, label in enumerate(t.labels)) or 'a number from 0 to 5'
    for n, row in enumerate(rows, 1):
        for column in wanted:
            value = row.get(column)
            if column not in row:
                raise ValueError(f'{where}, row {n} has no {column!r}, only {", ".join(map(str, row))}: {name} needs '
                                 f'the columns {", ".join(wanted)}')
            if column != 'label':  # half a surrogate pair, which JSON can spell and UTF-8 cannot, is no text either
                good, fix = isinstance(value, str) and value == value.encode(errors='ignore').decode(), 'text'
            else:
                good = isinstance(value, (int, float)) and not isinstance(value, bool)
                good, fix = good and (value in range(len(t.labels)) if t.labels else 0 <= value <= 5), allowed
            if not good:
                raise ValueError(f'{where}, row {n}: {column} is {value!r} and must be {fix}: repair or delete the row')
        texts.append([row[column] for column in t.columns])
        labels.append(row.get('label'))
        if not ''.join(texts[-1]).strip():  # one half of a pair may be empty: two of QQP's are
            raise ValueError(f'{where}, row {n} is empty: give it text or delete it')
    if not texts:
        raise ValueError(f'{where} has no rows: write or fetch it again')
    for text in tqdm(texts, desc=f'{name}, {split}, tokens', disable=not is_main, mininterval=1):
        parts = [tokenizer.encode_ordinary(part) for part in text]
        ids.append(np.array(join_sentences(parts, tokenizer.eot_token, length), dtype=np.int32))
        truncated += len(ids[-1]) < sum(map(len, parts)) + len(parts)
    labels = torch.tensor(labels, dtype=torch.int64 if t.labels else torch.float64) if 'label' in wanted else None
    return Examples(ids, labels, where, truncated)


# ----------------------------------------------------------------------------- model, scores

def classify(model, head, rows, pad_id, width=0, bf16=False):
    """Token ids of B examples, arrays of any lengths -> fp32 logits (B, outputs), and the Decisions of each chunk.

    Padded at the right to `width`, or to the longest. Attention is causal and all else is per token, so padding
    reaches no real token, and the head reads the last real one. (Only MoD in training mode compares tokens.)
    """
    device = head.weight.device
    idx = torch.full((len(rows), max(width, *map(len, rows))), pad_id)
    for i, row in enumerate(rows):
        idx[i, :len(row)] = torch.from_numpy(row)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        x, decisions = model.features(idx.to(device))
    return head(x[torch.arange(len(rows), device=device), last].to(head.weight.dtype)), decisions


def scores(metric, predicted, labels):
    """Predictions (n,), labels (n,) -> the task's figure ('score') and its companions, in percent.

    A constant correlates with nothing: Matthews, Pearson and Spearman are undefined for it, and are 0 here.
    """
    constant = bool((predicted == predicted[0]).all() or (labels == labels[0]).all())
    parts = {'Pearson': pearson_corrcoef, 'Spearman': spearman_corrcoef}
    if metric != 'correlation':
        parts = {'accuracy': partial(accuracy, task='multiclass', num_classes=3)}  # three are enough for all
        if metric == 'F1':
            parts['F1'] = partial(f1_score, task='binary')
        if metric == 'Matthews':
            parts['Matthews'] = partial(matthews_corrcoef, task='binary')
    parts = {name: 0.0 if constant and name in ('Matthews', 'Pearson', 'Spearman') else
             round(100 * metric_of(predicted, labels).item(), 4) for name, metric_of in parts.items()}
    return {'score': parts[metric] if metric in parts else sum(parts.values()) / 2, **parts}


@torch.no_grad()
def evaluate(model, head, examples, pad_id, bf16, desc):
    """What is predicted for n examples, on the CPU of every rank: classes, int64 (n,), or with one output its values,
    fp64. Each example is done by one rank, once."""
    order = sorted(range(len(examples.ids)), key=lambda i: -len(examples.ids[i]))  # equal lengths together
    batches = [order[at:at + micro_batch] for at in range(0, len(order), micro_batch)]
    logits = torch.zeros(len(order), head.out_features, device=head.weight.device)
    model.eval()
    for batch in tqdm(batches[rank::world], desc=desc, disable=not is_main, mininterval=1):
        logits[batch] = classify(model, head, [examples.ids[i] for i in batch], pad_id, bf16=bf16)[0]
    if world > 1:
        dist.all_reduce(logits)  # where one rank has an example's logits, the others have zeros
    logits = logits.cpu()
    return logits.squeeze(1).double() if head.out_features == 1 else logits.argmax(1)


# ----------------------------------------------------------------------------- training

def epoch_order(n, seed, epoch):
    """In which order an epoch goes over n examples: a function of (seed, epoch), so a batch is one of (seed, step)."""
    return np.random.default_rng([seed, epoch + 1]).permutation(n).tolist()


def fine_tune(model, head, ids, labels, steps, size, seed, pad_id, bf16, desc):
    """Train model and head in place, for `steps` batches of `size` of the examples (the last batch of an epoch is what
    is left). Returns the mean loss of the last tenth of the steps. Raises ValueError when the loss is not finite."""
    params = [*model.parameters(), *head.parameters()]
    groups = model.param_groups(weight_decay)
    groups[0]['params'].append(head.weight)
    groups[1]['params'].append(head.bias)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    rise, losses = round(warmup * steps), []
    model.train()
    with tqdm(range(steps), desc=desc, disable=not is_main, mininterval=1) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group['lr'] = learning_rate * ((step + 1) / rise if step < rise else (steps - step) / (steps - rise))
            epoch, at = divmod(step, math.ceil(len(ids) / size))
            if at == 0:
                order = epoch_order(len(ids), seed, epoch)
            batch = order[at * size:(at + 1) * size]
            width = max(len(ids[i]) for i in batch)  # of the whole batch: MoD sees the same on any number of ranks
            piece = min(micro_batch, math.ceil(len(batch) / world))
            loss_sum = torch.zeros((), device=head.weight.device)
            for part in [batch[a:a + piece] for a in range(0, len(batch), piece)][rank::world]:
                logits, decisions = classify(model, head, [ids[i] for i in part], pad_id, width, bf16)
                wanted, share = labels[part].to(logits.device), len(part) / len(batch)
                loss = share * (F.cross_entropy(logits, wanted) if logits.size(1) > 1 else
                                F.mse_loss(logits.squeeze(1), wanted.to(logits.dtype)))
                loss_sum += loss.detach()
                for decision in itertools.chain(*decisions):
                    if decision.aux is not None:
                        loss = loss + share * decision.aux
                loss.backward()
            if world > 1:
                dist.all_reduce(loss_sum)
                for p in params:
                    if p.grad is None:  # at the end of an epoch, there may be fewer examples than ranks
                        p.grad = torch.zeros_like(p)
                    dist.all_reduce(p.grad)
            norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
            losses.append(loss_sum.item())
            if not math.isfinite(losses[-1] + norm):
                raise ValueError(f'{desc}, step {step + 1}: loss {losses[-1]}, gradient norm {norm}. Take a lower '
                                 '--learning_rate, or --dtype=float32; finished results are kept')
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f'{losses[-1]:.3f}', refresh=False)
    return float(np.mean(losses[-math.ceil(steps / 10):]))


# ----------------------------------------------------------------------------- results

def write_predictions(path, name, predicted):
    """The GLUE server's file: index and prediction, tab-separated, under a header."""
    labels = TASKS[name].labels
    values = ([f'{value:.5f}' for value in predicted.clamp(0, 5).tolist()] if not labels else  # the scale of STS-B
              [labels[i] if name in BY_NAME else str(i) for i in predicted.tolist()])
    with common.atomic_write(path) as f:
        f.write('\n'.join(['index\tprediction', *(f'{i}\t{value}' for i, value in enumerate(values)), '']).encode())


def markdown(results, n_seeds, title):
    """Results, dicts as in the .json files -> a Markdown table of ours, the baseline's and the paper's figures.

    mean ± standard deviation (n - 1) over the seeds. A figure is shown when all seeds have it, the average when all
    nine figures are shown.
    """
    lines = ['| | ' + ' | '.join(FIGURES) + ' | average |', '|---' * (len(FIGURES) + 2) + '|']
    for title, kind in ((f'{title}, {n_seeds} seed{"s" * (n_seeds > 1)}', 'figures'), ('baseline', 'baseline')):
        columns = [[r[kind][figure]['score'] for r in results if figure in r[kind]] for figure in FIGURES]
        columns = [column if len(column) == n_seeds else [] for column in columns]
        columns.append([sum(nine) / 9 for nine in zip(*columns)])  # zip: empty if one is
        cells = [f'{np.mean(c):.2f}' + (f' ± {np.std(c, ddof=1):.2f}' if len(c) > 1 else '') if c else '–'
                 for c in columns]
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    if paper_row:
        lines.append(f'| the paper, {paper_row} | ' + ' | '.join(PAPER[paper_row]) + ' |')
    lines += ['', 'Percent: accuracy; Matthews for CoLA; F1 for MRPC and QQP; mean of Pearson and Spearman for STS-B. '
              'The baseline predicts the most frequent label of the training examples, for STS-B their mean.', '']
    for r in results:
        splits = '; '.join(f'{split}: {s["examples"]:,} from {s["source"]}' for split, s in r['splits'].items())
        lines.append(f'- {r["task"]}, seed {r["seed"]}: {r["steps"]} steps of {r["settings"]["batch_size"]}; {splits}')
    return '\n'.join(lines) + '\n'


def finished(folder, want):
    """What folder holds for the settings `want` of one (task, seed): the result, its path, and the name of the first
    setting in which it is another's, or None."""
    path, result = os.path.join(folder, f'{want["task"]}_seed{want["seed"]}.json'), None
    if os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as f:
                result = json.load(f)
            return result, path, next((k for k in want if result['settings'].get(k) != want[k]), None)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is not a result of this script ({error!r}): delete it') from error
    return result, path, None


def main():
    names = list(TASKS) if task == 'all' else [name for name in TASKS if name in task.split(',')]
    if task != 'all' and len(names) < len(task.split(',')):
        raise ValueError(f"task={task!r} must be 'all' or some of {','.join(TASKS)}")
    for least, keys in ((1, ('seeds', 'micro_batch')),
                        (0, ('seed', 'max_train', 'max_eval', 'batch_size', 'epochs', 'max_steps', 'learning_rate',
                             'weight_decay', 'grad_clip'))):
        for key in keys:
            if settings[key] < least:
                raise ValueError(f'{key}={settings[key]} must be at least {least}')
    if epochs and max_steps:
        raise ValueError(f'epochs={epochs} and max_steps={max_steps} both say how long to train: give one of them')
    if not 0 <= warmup < 1:
        raise ValueError(f'warmup={warmup} is a share of the steps: 0 <= warmup < 1')
    if paper_row and paper_row not in PAPER:
        raise ValueError(f"paper_row={paper_row!r} must be '' or one of {', '.join(PAPER)}")
    on = common.find_device(device)
    if dtype not in ('auto', 'bfloat16', 'float32'):
        raise ValueError(f"dtype={dtype!r} must be 'auto', 'bfloat16' or 'float32'")
    precision = ('bfloat16' if on.startswith('cuda') else 'float32') if dtype == 'auto' else dtype
    folder = out_dir or os.path.join('out', f'glue_{common.run_name(source)}')

    base, tokenizer = GPT.from_pretrained(source), common.tokenizer_of(source)
    if tokenizer.n_vocab > base.cfg.vocab_size:
        raise ValueError(f'{source} knows {base.cfg.vocab_size} kinds of token and its tokenizer {tokenizer.name!r} '
                         f'makes {tokenizer.n_vocab}: take weights that were trained with that tokenizer')
    tokens = min(length, base.cfg.block_size)
    if tokens < 4 or 'length' in given and tokens < length:
        raise ValueError(f'length={length} must be from 4 to the {base.cfg.block_size} positions of {source}')
    weights = base.fingerprint()[:16]

    # All that decides each result, but for rounding. Those that are there are kept; those of other settings are in the
    # way if this command is to make them, and are left out of the table if not.
    plan = [dict(task=name, seed=s, weights=weights, data=data_of(name), max_train=max_train,
                 max_eval=max_eval, length=tokens, learning_rate=learning_rate,
                 batch_size=batch_size or t.batch_size, epochs=0 if max_steps else epochs or t.epochs,
                 max_steps=0 if epochs else max_steps or t.max_steps, warmup=warmup, weight_decay=weight_decay,
                 grad_clip=grad_clip, dtype=precision)
            for name, t in TASKS.items() for s in range(seed, seed + seeds)]
    todo = []
    for want in plan:
        result, path, other = finished(folder, want)
        if want['task'] not in names:
            continue
        if other:
            raise ValueError(f'{path} is a result with {other}={result["settings"].get(other)!r}, but this command has '
                             f'{want[other]!r}: take another --out_dir, or delete that file')
        if result and (not save or os.path.exists(path.replace('.json', '.pt'))):
            say(f'{path} is there already')
        else:
            todo.append(want)

    data = {name: {} for name in names if any(want['task'] == name for want in todo)}
    for name in data:  # all of it before any training
        for split, (where, rows) in find_splits(name).items():
            if split != 'train' and max_eval:
                rows = itertools.islice(rows, max_eval)
            data[name][split] = encode_rows(name, split, where, rows, tokenizer, tokens)

    if world > 1:
        on = common.join_processes(on)
    say(f'{source}: chunks {base.cfg.chunks}, {base.num_params()[0]:,} parameters, tokenizer {tokenizer.name!r}; '
        f'{on} x {world}, {precision}; at most {tokens} tokens')

    for want in todo:
        name, s, size, began = want['task'], want['seed'], want['batch_size'], time.time()
        t, (ids, labels, where, _) = TASKS[name], data[name]['train']
        if max_train:
            chosen = np.random.default_rng([s, 0]).permutation(len(ids))[:max_train].tolist()
            ids, labels = [ids[i] for i in chosen], labels[chosen]
        steps = want['max_steps'] or want['epochs'] * math.ceil(len(ids) / size)
        say(f'\n{name}, seed {s}: {len(ids):,} examples from {where}, {steps:,} steps of {size}. The first three:')
        for i in epoch_order(len(ids), s, 0)[:3]:
            label = labels[i].item()
            say(f'  {t.labels[label] if t.labels else label} | {tokenizer.decode(ids[i].tolist())}')

        torch.manual_seed(s)
        model, head = copy.deepcopy(base).to(on), torch.nn.Linear(base.cfg.n_embd, len(t.labels) or 1)
        torch.nn.init.normal_(head.weight, std=0.02)
        torch.nn.init.zeros_(head.bias)
        head.to(on)
        last = dict(pad_id=tokenizer.eot_token, bf16=precision == 'bfloat16')
        loss = fine_tune(model, head, ids, labels, steps, size, s, **last, desc=f'{name}, seed {s}, training')

        usual = labels.bincount().argmax() if t.labels else labels.mean()
        result = dict(task=name, seed=s, figures={}, baseline={}, baseline_predicts=usual.item(), predictions=[])
        for figure, split in t.splits.items():
            gold = data[name][split].labels
            predicted = evaluate(model, head, data[name][split], **last, desc=f'{name}, seed {s}, {split}')
            result['figures'][figure] = scores(t.metric, predicted, gold)
            result['baseline'][figure] = scores(t.metric, usual.expand(len(gold)), gold)
            say(f'{figure}: ' + ', '.join(f'{k} {v:.2f}' for k, v in result['figures'][figure].items())
                + f'; always predicting {usual.item():.4g}: {result["baseline"][figure]["score"]:.2f}')
            if (test := split.replace('validation', 'test')) in data[name]:
                predicted = evaluate(model, head, data[name][test], **last, desc=f'{name}, seed {s}, {test}')
                split = test
            path = os.path.join(folder, f'predictions_seed{s}', figure + '.tsv' if split == test else
                                f'{figure}.{split}.tsv')  # the server takes the former
            result['predictions'].append(path)
            if is_main:
                write_predictions(path, name, predicted)
        result['splits'] = {split: dict(source=e.source, examples=len(ids if split == 'train' else e.ids),
                                        truncated=e.truncated) for split, e in data[name].items()}
        result['settings'] = {**want, 'source': source, 'micro_batch': micro_batch, 'device': on, 'processes': world}
        result.update(steps=steps, train_loss=loss, labels=t.labels, model_config=asdict(base.cfg),
                      torch=str(torch.__version__), seconds=round(time.time() - began, 1))
        if is_main and save:
            with common.atomic_write(os.path.join(folder, f'{name}_seed{s}.pt')) as f:
                torch.save(dict(result, model=model.state_dict(), head=head.state_dict(),
                                meta=dict(tokenizer=tokenizer.name)), f)
        if is_main:  # last, and whole: where this file is, the others are
            with common.atomic_write(finished(folder, want)[1]) as f:
                f.write(json.dumps(result, indent=2).encode() + b'\n')

    if is_main:
        found = [finished(folder, want) for want in plan]
        table = markdown([result for result, _, other in found if result and not other], seeds, source)
        with common.atomic_write(os.path.join(folder, 'results.md')) as f:
            f.write(table.encode())
        say(f'\n{table}\n{folder}/results.md')
    if world > 1:
        common.leave_processes()


if __name__ == '__main__':
    main()
