"""Fine-tune a checkpoint on GLUE (Wang et al. 2018) and score it, as the paper does (4.1, Table 5).

  python finetune_glue.py --source=out/mom_demo --task=cola                            from the Hub
  python finetune_glue.py --source=out/mom_demo --task=cola,rte --data_dir=data/glue   from files
  torchrun --nproc_per_node=8 finetune_glue.py --source=gpt2-medium --seeds=3          all tasks

The paper: learning rate 2e-5, 128 tokens; CoLA, STS-B, MRPC, RTE 3 epochs of batches of 32; MNLI,
QNLI, QQP, SST-2 8,000 steps of 64. The average is over nine figures, MNLI's two among them.

The paper leaves open, and we took what is usual for BERT and GPT: Matthews correlation for CoLA,
AdamW (0.9, 0.999) with weight decay 0.01, 10% linear warm-up, then linear decay to 0, clipping at
1.0. The weights after the last step are scored, on the validation split. Each sentence is followed
by <|endoftext|>; a pair is read in one order (Radford et al. 2018 read both where the question is
how similar they are), and of one that is too long, the longer sentence is cut. One linear layer
reads the last <|endoftext|>, after the final LayerNorm. STS-B is regression with squared error.
MoD, and a balance loss, take padding for tokens in training.

Files: data_dir/rte/train.jsonl, validation.jsonl and, if there is one, test.jsonl (mnli:
validation_matched, validation_mismatched); also .parquet, .csv, .tsv, the Hub's shards, and GLUE's
own archive as it is (RTE/dev.tsv). Labels are numbers or names.

out_dir gets <task>_seed<n>.json for each result, results.md with all of them, and
predictions_seed<n>/ with the files of the GLUE server: CoLA.tsv for the test split, or
CoLA.validation.tsv where there is none (WNLI.tsv and AX.tsv are in the server's sample submission).
After a stop, the same command goes on: what has its .json is not done again.
"""
import copy
import glob
import hashlib
import itertools
import json
import math
import os
import time
from collections import namedtuple
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torchmetrics import functional as metrics
from tqdm import tqdm

import common
import finetune
import inputs
from weights import load_file

# --- what
source = 'out/mom_demo'       # a run's folder or checkpoint, a GPT-2 name, a Hugging Face folder
task = 'all'                  # or cola, sst2, mrpc, qqp, qnli, rte, mnli, stsb: some, 'cola,rte'
seed = 1337                   # of the fresh head, the order of examples, the choice of max_train
seeds = 1                     # how many seeds: seed, seed + 1, ...
out_dir = ''                  # '' is out/glue_<name of source>
save = False                  # keep each fine-tuned model as out_dir/<task>_seed<n>.pt
paper_row = ''                # a row of Table 5 to show beside ours, such as 'MoM_P small'
# --- data
data_dir = ''                 # folder of local files, see above; '' is the Hub
hub_id = 'nyu-mll/glue'       # on the Hub
max_train = 0                 # training examples, drawn at random; 0 is all
max_eval = 0                  # validation examples, the first ones, and no test ones; 0 is all
length = 128                  # tokens of an example at most; no more than the model's block_size
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
device = 'auto'               # where to run; 'auto' is the accelerator if there is one, else 'cpu'
dtype = 'auto'                # autocast: 'bfloat16', 'float32'; auto: bfloat16 if the GPU has it
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not in tests

Task = namedtuple('Task', 'metric batch_size epochs max_steps splits columns labels')
PAIR = ['sentence1', 'sentence2']
ENTAILED = ['entailment', 'not_entailment']
BRIEF, LONG = (32, 3, 0), (64, 0, 8000)  # batch size, epochs or steps
MATCHED, MISMATCHED = 'validation_matched', 'validation_mismatched'
TASKS = {  # in the order of Table 5; splits: the server's name of a figure, and the split it is of
    'sst2': Task('accuracy', *LONG, {'SST-2': 'validation'}, ['sentence'],
                 ['negative', 'positive']),
    'cola': Task('Matthews', *BRIEF, {'CoLA': 'validation'}, ['sentence'],
                 ['unacceptable', 'acceptable']),
    'mrpc': Task('F1', *BRIEF, {'MRPC': 'validation'}, PAIR, ['not_equivalent', 'equivalent']),
    'qqp': Task('F1', *LONG, {'QQP': 'validation'}, ['question1', 'question2'],
                ['not_duplicate', 'duplicate']),
    'qnli': Task('accuracy', *LONG, {'QNLI': 'validation'}, ['question', 'sentence'], ENTAILED),
    'rte': Task('accuracy', *BRIEF, {'RTE': 'validation'}, PAIR, ENTAILED),
    'mnli': Task('accuracy', *LONG, {'MNLI-m': MATCHED, 'MNLI-mm': MISMATCHED},
                 ['premise', 'hypothesis'], ['entailment', 'neutral', 'contradiction']),
    'stsb': Task('correlation', *BRIEF, {'STS-B': 'validation'}, PAIR, [])}  # regression, 0 to 5
FIGURES = [figure for t in TASKS.values() for figure in t.splits]
BY_NAME = ('qnli', 'rte', 'mnli')  # the server wants names for these and numbers for the others
# What GLUE's archive calls the columns. Its CoLA has no line of names: see local_rows.
IN_ARCHIVE = {'sentence1': ['#1 String'], 'sentence2': ['#2 String'],
              'premise': ['sentence1'], 'hypothesis': ['sentence2'],
              'label': ['gold_label', 'Quality', 'is_duplicate', 'score']}

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
broken_rows = []  # of QQP: its archive has some that are cut off, which all leave out

# ----------------------------------------------------------------------------- data

# ids: an array per example; cut: whether it lost a part; labels: a tensor, None for a test split.
Examples = namedtuple('Examples', 'ids cut labels source')


def folders_of(name):
    """The folders of data_dir that are a task's: for stsb, stsb or STS-B."""
    paths = [path[:-1] for path in glob.glob(os.path.join(glob.escape(data_dir), '*', ''))]
    return [path for path in paths if os.path.basename(path).lower().replace('-', '') == name]


def data_of(name):
    """What stands for a task's data in its results: the Hub's id, or a SHA-256 of its files."""
    if not data_dir:
        return hub_id
    digest = hashlib.sha256()
    for folder in folders_of(name):
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*'))):
            if path.endswith(finetune.TABLES) and os.path.isfile(path):
                digest.update(f'{os.path.basename(path)} {common.sha256(path)}\n'.encode())
    return digest.hexdigest()


def splits_of(name):
    """The splits of a task -> {split: (where from, rows)}. ValueError if one is missing."""
    validation, found = TASKS[name].splits.values(), {}
    folders = folders_of(name)
    if data_dir and len(folders) != 1:
        here = sorted(os.listdir(data_dir)) if os.path.isdir(data_dir) else []
        raise ValueError(f'{data_dir} must hold one folder of {name}, called {name} or as in the '
                         f'archive of GLUE; it holds {", ".join(here) or "nothing"}')
    if not data_dir:
        instead = f'a folder that holds {name}/train.jsonl and so on, --data_dir=FOLDER'
        table = inputs.hub_table(hub_id, name, None, instead)
    for split in ('train', *validation, *(v.replace('validation', 'test') for v in validation)):
        optional = split.startswith('test')
        if data_dir:
            if paths := finetune.find_split(folders[0], split, optional):
                found[split] = ', '.join(paths), local_rows(name, paths)
        elif split in table:
            where = f'{hub_id}, {name}, {split}'
            found[split] = where, finetune.hub_rows(table[split], where)
        elif not optional:
            raise ValueError(f'{hub_id}, {name} has no split {split}, only {", ".join(table)}: '
                             'take another --hub_id')
    return found


def local_rows(name, paths):
    """The rows of a split in files."""
    columns = None
    if name == 'cola' and paths[0].endswith('.tsv'):
        with open(paths[0], 'rb') as file:
            cells = file.readline().split(b'\t')
        if len(cells) == 4 and cells[1] in (b'0', b'1'):  # a row, where a line of names might be
            columns = ['source', 'label', 'mark', 'sentence']
    broken = broken_rows if name == 'qqp' else None
    return finetune.read_tables(paths, columns, ['label', *IN_ARCHIVE['label']], broken)


def join_sentences(parts, eot, length):
    """The ids of one or two sentences -> one list of at most `length`, each followed by eot.

    What is too long loses its end, of two sentences the longer one first.
    """
    room = length - len(parts)
    keep = [room]
    if len(parts) == 2:
        a, b = map(len, parts)
        first = min(a, max(room - b, (room + 1) // 2))
        keep = [first, room - first]
    return [i for part, n in zip(parts, keep) for i in (*part[:n], eot)]


def cell(name, where, row, column):
    """The value of a column of a row, under its name or that of the archive."""
    for key in (column, *IN_ARCHIVE.get(column, ())):
        if key in row:
            return row[key]
    raise ValueError(f'{where} has no {column!r}, only {", ".join(map(str, row))}: {name} needs '
                     f'the columns {", ".join(TASKS[name].columns)}, label')


def label_of(name, where, value):
    """A label, given by number or by name -> its number."""
    labels = TASKS[name].labels
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value in range(len(labels)) if labels else 0 <= value <= 5:
            return value
    allowed = ', '.join(f'{i} ({label})' for i, label in enumerate(labels))
    allowed = allowed or 'a number from 0 to 5'
    raise ValueError(f'{where}: label is {value!r} and must be {allowed}: repair or delete the row')


def encode(name, split, source, rows, tokenizer, length):
    """Rows of a split -> Examples. Raises ValueError naming source, row and fix."""
    t, ids, cut, labels = TASKS[name], [], [], []
    labelled = not split.startswith('test')
    for where, row in tqdm(rows, f'{name}, {split}', unit='row', disable=not is_main):
        texts = [cell(name, where, row, column) for column in t.columns]
        for column, text in zip(t.columns, texts):
            if not finetune.is_text(text):
                raise ValueError(f'{where}: {column} is {text!r} and must be text: repair or '
                                 'delete the row')
        if not ''.join(texts).strip():  # one half of a pair may be empty: two of QQP's are
            raise ValueError(f'{where} is empty: give it text or delete it')
        if labelled:
            labels.append(label_of(name, where, cell(name, where, row, 'label')))
        parts = [tokenizer.encode_ordinary(text) for text in texts]
        joined = join_sentences(parts, tokenizer.eot_token, length)
        ids.append(np.array(joined, dtype=np.int32))
        cut.append(len(joined) < sum(map(len, parts)) + len(parts))
    if not ids:
        raise ValueError(f'{source} has no rows: write or fetch it again')
    kind = torch.int64 if t.labels else torch.float64
    return Examples(ids, cut, torch.tensor(labels, dtype=kind) if labelled else None, source)


# ----------------------------------------------------------------------------- model, scores

def classify(model, head, rows, pad_id, width=0, bf16=False):
    """Ids of B examples, arrays of any lengths -> fp32 logits (B, outputs), the chunks' Decisions.

    Padded at the right to `width`, or to the longest. Attention is causal and all else is per
    token, but for MoD in training: padding reaches no real token, and the head reads the last one.
    """
    device = head.weight.device
    idx = finetune.pad(rows, pad_id, width).to(device)  # (B, T)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        x, decisions = model.features(idx)  # (B, T, C)
    x = x[torch.arange(len(rows), device=device), last]  # (B, C)
    return head(x.to(head.weight.dtype)), decisions


METRICS = {
    'accuracy': partial(metrics.accuracy, task='multiclass', num_classes=3),  # or fewer
    'F1': partial(metrics.f1_score, task='binary'),
    'Matthews': partial(metrics.matthews_corrcoef, task='binary'),
    'Pearson': metrics.pearson_corrcoef, 'Spearman': metrics.spearman_corrcoef}
TOGETHER = {
    'accuracy': ['accuracy'], 'F1': ['accuracy', 'F1'], 'Matthews': ['accuracy', 'Matthews'],
    'correlation': ['Pearson', 'Spearman']}


def scores(metric, predicted, labels):
    """Predictions (n,), labels (n,) -> the task's figure ('score') and its companions, in percent.

    A constant correlates with nothing: what is undefined for it is 0 here.
    """
    constant = bool((predicted == predicted[0]).all() or (labels == labels[0]).all())
    parts = {}
    for name in TOGETHER[metric]:
        undefined = constant and name in ('Matthews', 'Pearson', 'Spearman')
        parts[name] = 0.0 if undefined else round(100 * METRICS[name](predicted, labels).item(), 4)
    return {'score': parts[metric] if metric in parts else sum(parts.values()) / 2, **parts}


@torch.no_grad()
def evaluate(model, head, examples, pad_id, bf16, desc):
    """What is predicted for n examples, on the CPU of every rank: classes, int64 (n,), or with one
    output its values, fp64. Each example is done by one rank, once."""
    # Equal lengths together.
    order = sorted(range(len(examples.ids)), key=lambda i: -len(examples.ids[i]))
    batches = [order[at:at + micro_batch] for at in range(0, len(order), micro_batch)]
    logits = torch.zeros(len(order), head.out_features, device=head.weight.device)
    model.eval()
    for batch in tqdm(batches[rank::world], desc=desc, disable=not is_main, mininterval=1):
        rows = [examples.ids[i] for i in batch]
        logits[batch] = classify(model, head, rows, pad_id, bf16=bf16)[0]
    if world > 1:
        dist.all_reduce(logits)  # where one rank has an example's logits, the others have zeros
    logits = logits.cpu()
    return logits.squeeze(1).double() if head.out_features == 1 else logits.argmax(1)


# ----------------------------------------------------------------------------- training

def epoch_order(n, seed, epoch):
    """The order in which an epoch goes over n examples: a batch is a function of (seed, step)."""
    return np.random.default_rng([seed, epoch + 1]).permutation(n).tolist()


def fine_tune(model, head, ids, labels, steps, size, seed, pad_id, bf16, desc, part='', want=None):
    """Train model and head in place, for `steps` batches of `size` examples; the last batch of an
    epoch is what is left. Returns the mean loss of the last tenth of the steps.

    part: a file that keeps the state after each epoch. If it is of the settings `want`, training
    goes on from it, as if there had been no stop. Raises ValueError when the loss is not finite.
    """
    params = [*model.parameters(), *head.parameters()]
    groups = model.param_groups(weight_decay)
    groups[0]['params'].append(head.weight)
    groups[1]['params'].append(head.bias)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    state = dict(model=model, head=head, optimizer=optimizer)
    losses, per_epoch = [], math.ceil(len(ids) / size)
    if os.path.exists(part):
        saved = load_file(part)
        if saved['settings'] == want:
            losses = saved['losses']
            for key, holder in state.items():
                holder.load_state_dict(saved[key])
    common.agree(step=len(losses))
    model.train()
    bar = tqdm(total=steps, initial=len(losses), desc=desc, disable=not is_main, mininterval=1)
    for step in range(len(losses), steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            order = epoch_order(len(ids), seed, epoch)
        batch = order[at * size:(at + 1) * size]
        width = max(len(ids[i]) for i in batch)  # of all ranks: MoD sees the same on each
        piece = min(micro_batch, math.ceil(len(batch) / world))
        pieces = [batch[a:a + piece] for a in range(0, len(batch), piece)]
        loss_sum = torch.zeros((), device=head.weight.device)
        for piece in pieces[rank::world]:
            logits, decisions = classify(model, head, [ids[i] for i in piece], pad_id, width, bf16)
            share = len(piece) / len(batch)
            if logits.size(1) > 1:
                loss = share * F.cross_entropy(logits, labels[piece].to(logits.device))
            else:  # the type first: not every device has fp64
                wanted = labels[piece].to(logits.dtype).to(logits.device)
                loss = share * F.mse_loss(logits.squeeze(1), wanted)
            loss_sum += loss.detach()
            for decision in itertools.chain(*decisions):
                if decision.aux is not None:
                    loss = loss + share * decision.aux
            loss.backward()
        if world > 1:
            dist.all_reduce(loss_sum)
        losses.append(loss_sum.item())
        rate = finetune.linear_rate(step, steps, learning_rate, warmup)
        finetune.update(optimizer, params, losses[-1], rate, grad_clip, f'{desc}, step {step + 1}',
                        'finished results are kept')
        bar.set_postfix(loss=f'{losses[-1]:.3f}', refresh=False)
        bar.update()
        if part and is_main and at + 1 == per_epoch and step + 1 < steps:
            states = {key: holder.state_dict() for key, holder in state.items()}
            with common.atomic_write(part) as file:
                torch.save(dict(states, settings=want, losses=losses), file)
    bar.close()
    return float(np.mean(losses[-math.ceil(steps / 10):]))


# ----------------------------------------------------------------------------- results

def write_predictions(path, name, predicted):
    """The GLUE server's file: index and prediction, tab-separated, under a header."""
    labels = TASKS[name].labels
    if not labels:
        values = [f'{value:.5f}' for value in predicted.clamp(0, 5).tolist()]  # the scale of STS-B
    else:
        values = [labels[i] if name in BY_NAME else str(i) for i in predicted.tolist()]
    lines = ['index\tprediction', *(f'{i}\t{value}' for i, value in enumerate(values)), '']
    common.write_text(path, '\n'.join(lines))


def markdown(results, n_seeds, title, how=''):
    """Results, as in the .json files -> a Markdown table of ours, the baseline's and the paper's.

    mean ± standard deviation (n - 1) over the seeds. A figure is shown when all seeds have it, the
    average when all nine figures are shown. how: a line on what all results have in common.
    """
    lines = ['| | ' + ' | '.join(FIGURES) + ' | average |', '|---' * (len(FIGURES) + 2) + '|']
    ours = f'{title}, {n_seeds} seed{"s" * (n_seeds > 1)}'
    for title, kind in ((ours, 'figures'), ('baseline', 'baseline')):
        columns = []
        for figure in FIGURES:
            column = [r[kind][figure]['score'] for r in results if figure in r[kind]]
            columns.append(column if len(column) == n_seeds else [])
        columns.append([np.mean(of_seed) for of_seed in zip(*columns)])  # zip: empty if one is
        cells = [f'{np.mean(c):.2f}' if c else '–' for c in columns]
        for n, column in enumerate(columns):
            if len(column) > 1:
                cells[n] += f' ± {np.std(column, ddof=1):.2f}'
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    if paper_row:
        lines.append(f'| the paper, {paper_row} | ' + ' | '.join(PAPER[paper_row]) + ' |')
    lines += ['', 'Percent: accuracy; Matthews for CoLA; F1 for MRPC and QQP; mean of Pearson and '
              'Spearman for STS-B. The baseline predicts the most frequent label of the training '
              'examples, for STS-B their mean.', '', how, '']
    for r in results:
        size = r['settings']['batch_size']
        line = f'- {r["task"]}, seed {r["seed"]}: {r["steps"]} steps of {size}'
        for split, s in r['splits'].items():
            line += f'; {split}: {s["examples"]:,} from {s["source"]}, '
            line += finetune.cut_note(s['truncated'], s['examples'])
        lines.append(line)
    return '\n'.join(lines) + '\n'


def result_path(folder, want):
    return os.path.join(folder, f'{want["task"]}_seed{want["seed"]}.json')


# ----------------------------------------------------------------------------- the run

def check_settings():
    """The names of the tasks that are asked for. Raises ValueError for settings that cannot be."""
    asked = {name.strip().lower().replace('-', '') for name in task.split(',')}
    names = [name for name in TASKS if name in asked or asked == {'all'}]
    if asked != {'all'} and len(names) < len(asked):
        raise ValueError(f"task={task!r} must be 'all' or some of {','.join(TASKS)}")
    finetune.check_settings(settings, batch_size=0, max_steps=0)
    if epochs and max_steps:
        raise ValueError(f'epochs={epochs} and max_steps={max_steps} both say how long to train: '
                         'give one of them')
    finetune.check_row(paper_row, PAPER, 'Table 5')
    return names


def run_task(want, base, tokenizer, data, folder, on):
    """Fine-tune and score one (task, seed), and write what came of it."""
    name, s, size, began = want['task'], want['seed'], want['batch_size'], time.time()
    t, path = TASKS[name], result_path(folder, want)
    part = path.replace('.json', '.part.pt')
    common.if_stopped = (f'{folder} keeps what is finished, and of {name}, seed {s} its whole '
                         'epochs: the same command goes on there')
    ids, cut, labels, origin = data['train']
    if max_train:
        chosen = np.random.default_rng([s, 0]).permutation(len(ids))[:max_train].tolist()
        ids, cut, labels = [ids[i] for i in chosen], [cut[i] for i in chosen], labels[chosen]
        data = {**data, 'train': Examples(ids, cut, labels, origin)}
    steps = want['max_steps'] or want['epochs'] * math.ceil(len(ids) / size)
    finetune.say(f'\n{name}, seed {s}: {len(ids):,} examples from {origin}, '
                 f'{steps:,} steps of {size}. The first three:')
    for i in epoch_order(len(ids), s, 0)[:3]:
        label = t.labels[labels[i]] if t.labels else labels[i].item()
        finetune.say(f'  {label} | {tokenizer.decode(ids[i].tolist())}')
    for split, examples in data.items():
        finetune.say(f'  {split}: {finetune.cut_note(sum(examples.cut), len(examples.ids))}')

    torch.manual_seed(s)
    model, head = copy.deepcopy(base).to(on), torch.nn.Linear(base.cfg.n_embd, len(t.labels) or 1)
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)
    head.to(on)
    last = dict(pad_id=tokenizer.eot_token, bf16=want['dtype'] == 'bfloat16')
    loss = fine_tune(model, head, ids, labels, steps, size, s, **last,
                     desc=f'{name}, seed {s}, training', part=part, want=want)

    usual = labels.bincount().argmax() if t.labels else labels.mean()
    always = t.labels[usual] if t.labels else f'{usual:.4g}'
    figures, baseline, predictions = {}, {}, []
    for figure, split in t.splits.items():
        gold = data[split].labels
        predicted = evaluate(model, head, data[split], **last, desc=f'{name}, seed {s}, {split}')
        figures[figure] = scores(t.metric, predicted, gold)
        baseline[figure] = scores(t.metric, usual.expand(len(gold)), gold)
        shown = ', '.join(f'{part} {value:.2f}' for part, value in figures[figure].items())
        finetune.say(f'{figure}: {shown}; always predicting {always}: '
                     f'{baseline[figure]["score"]:.2f}')
        file = f'{figure}.{split}.tsv'
        if (test := split.replace('validation', 'test')) in data:
            predicted = evaluate(model, head, data[test], **last, desc=f'{name}, seed {s}, {test}')
            file = f'{figure}.tsv'  # which the server takes
        predictions.append(os.path.join(folder, f'predictions_seed{s}', file))
        if is_main:
            write_predictions(predictions[-1], name, predicted)
    if not is_main:
        return
    result = dict(
        task=name, seed=s, figures=figures, baseline=baseline, baseline_predicts=usual.item(),
        predictions=predictions, steps=steps, train_loss=loss, labels=t.labels,
        splits={split: dict(source=e.source, examples=len(e.ids), truncated=sum(e.cut))
                for split, e in data.items()},
        settings=dict(want, source=source, micro_batch=micro_batch, device=on, processes=world),
        model_config=asdict(base.cfg), torch=str(torch.__version__),
        seconds=round(time.time() - began, 1))
    if save:
        with common.atomic_write(path.replace('.json', '.pt')) as file:
            torch.save(dict(result, model=model.state_dict(), head=head.state_dict(),
                            meta=dict(tokenizer=tokenizer.name)), file)
    # Last: where this file is, the others are.
    common.write_text(path, json.dumps(result, indent=2) + '\n')
    if os.path.exists(part):
        os.unlink(part)


def main():
    common.if_stopped = 'Nothing is trained so far: give the same command again'
    names, on = check_settings(), common.find_device(device)
    precision = common.find_dtype(dtype, on)
    base, tokenizer = inputs.model_and_tokenizer(source)
    tokens = min(length, base.cfg.block_size)
    if tokens < 4 or 'length' in given and tokens < length:
        raise ValueError(f'length={length} must be from 4 to the {base.cfg.block_size} positions '
                         f'of {source}')
    folder = out_dir or os.path.join('out', f'glue_{common.run_name(source)}')
    folder = common.results_folder(folder)

    # All that decides each result, but for rounding. Results of other settings are in the way if
    # this command is to make them, and are left out of the table if not.
    shared = dict(weights=base.fingerprint()[:16], max_train=max_train, max_eval=max_eval,
                  length=tokens, learning_rate=learning_rate, warmup=warmup,
                  weight_decay=weight_decay, grad_clip=grad_clip, dtype=precision)
    plan, todo = [], []
    for name, t in TASKS.items():
        of_task = dict(task=name, data=data_of(name), batch_size=batch_size or t.batch_size,
                       epochs=0 if max_steps else epochs or t.epochs,
                       max_steps=0 if epochs else max_steps or t.max_steps)
        plan += [dict(of_task, seed=s, **shared) for s in range(seed, seed + seeds)]
    for want in plan:
        path = result_path(folder, want)
        result, other = finetune.read_result(path, want)
        if want['task'] not in names:
            continue
        if other:
            was = result['settings'].get(other)
            raise ValueError(f'{path} is a result with {other}={was!r}, but this command has '
                             f'{want[other]!r}: take another --out_dir, or delete that file')
        if result and (not save or os.path.exists(path.replace('.json', '.pt'))):
            finetune.say(f'{path} is there already')
        else:
            todo.append(want)

    data = {name: {} for name in dict.fromkeys(want['task'] for want in todo)}
    for name in data:  # all of it before any training
        for split, (where, rows) in splits_of(name).items():
            if split.startswith('test') and max_eval:
                continue  # the server takes whole ones alone
            if split != 'train' and max_eval:
                rows = itertools.islice(rows, max_eval)
            data[name][split] = encode(name, split, where, rows, tokenizer, tokens)
    if broken_rows:
        finetune.say(f'left out: {len(broken_rows)} rows of {", ".join(sorted({*broken_rows}))} '
                     'that have more or fewer values than columns')

    if is_main:
        common.lock_folder(folder)
    if world > 1:
        on = common.join_processes(on)
        common.agree(work=todo)
    finetune.say(f'{source}: chunks {base.cfg.chunks}, {base.num_params()[0]:,} parameters, '
                 f'tokenizer {tokenizer.name!r}; {on} x {world}, {precision}; '
                 f'at most {tokens} tokens')
    for want in todo:
        run_task(want, base, tokenizer, data[want['task']], folder, on)

    if is_main:
        found = [finetune.read_result(result_path(folder, want), want) for want in plan]
        how = (f'Learning rate {learning_rate}, warm-up over {warmup:.0%} of the steps, at most '
               f'{tokens} tokens, {precision}.')
        table = markdown([r for r, other in found if r and not other], seeds, source, how)
        common.write_text(os.path.join(folder, 'results.md'), table)
        finetune.say(f'\n{table}\n{folder}/results.md')
    if world > 1:
        common.leave_processes()


if __name__ == '__main__':
    main()
