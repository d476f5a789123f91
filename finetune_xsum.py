"""Fine-tune on XSUM (a BBC article and its summary in one sentence), summarise, score with ROUGE.

  python finetune_xsum.py --source=gpt2                                       from the Hub
  torchrun --nproc_per_node=8 finetune_xsum.py --source=out/mom_small_k2h6s --seeds=3
  python finetune_xsum.py --source=gpt2 --data_file=pairs.jsonl --max_train=1000 --max_eval=100
  python finetune_xsum.py --source=out/xsum_gpt2/seed1 --epochs=0 --beams=4   decode what was tuned

The model reads article, separator, summary, <|endoftext|>. The loss is on the summary and its end
alone, and an article that is too long loses its tail. After a stop, the same command, without
--overwrite, goes on. out_dir gets results.md and results.json, and of each seed last.pt, log.csv
and summaries.jsonl.
"""
import glob
import hashlib
import itertools
import json
import math
import os
import re
import statistics
from collections import namedtuple
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
import finetune
import inputs
from weights import load_checkpoint

# --- run
source = 'gpt2'               # a run's folder or checkpoint, a GPT-2 name, a Hugging Face folder
out_dir = ''                  # '' is out/xsum_<name of source>
overwrite = False             # start anew in an out_dir that holds another run
# --- data (columns: document, summary and, if there is one, id)
hub_id = 'EdinburghNLP/xsum'  # on the Hugging Face Hub: 204,045 / 11,332 / 11,334 pairs
data_dir = ''                 # instead: a folder of splits, as .jsonl, .parquet, .csv or .tsv
data_file = ''                # instead: one such file, which this script cuts into the three
split = '0.8,0.1,0.1'         # shares of data_file: train, validation, test
split_seed = 1337             # of the draw that cuts data_file
eval_split = 'test'           # 'test' or 'validation': which articles are summarised and scored
max_train = 0                 # use the first rows only; 0 is all
max_eval = 0                  # likewise
skip_empty = False            # leave rows without text out; the Hub's always are, and counted
# --- training: rate, length, epochs and batch are the paper's (section 4.1), the rest is ours
separator = '\nTL;DR:'        # between article and summary, as GPT-2's authors asked for summaries
length = 1024                 # tokens of an example; no more than the model's block_size
epochs = 3                    # 0 generates without training
batch_size = 64               # examples per step, over all processes and micro-batches
micro_batch = 8               # examples per forward pass of a process, at most
learning_rate = 2e-5          # peak; AdamW (0.9, 0.999)
warmup = 0.1                  # share of the steps in which the rate rises; then it falls to 0
weight_decay = 0.01           # of matrices and embeddings
grad_clip = 1.0               # largest gradient norm; 0 is off
seed = 1                      # of the order of the examples. Nothing else is random
seeds = 1                     # how many runs: seed, seed + 1, ...
# --- generation, in the weights' own type
beams = 1                     # 1 is greedy
max_new_tokens = 64           # of a summary, at most
gen_batch = 32                # sequences generated at a time by a process, beams counted
# --- report
show = 10                     # summaries printed at the end, beside their references
paper_row = ''                # a row of the paper's Table 6 beside ours, such as 'MoM_P small'
# --- system
device = 'auto'               # where to run; 'auto' is the accelerator if there is one, else 'cpu'
dtype = 'auto'                # autocast: 'bfloat16', 'float32'; auto: bfloat16 if the GPU has it
# ---
settings, given = common.load(globals())

TABLE_6 = """
GPT2        20.80  5.05 16.92 14.26  25.07  8.35 21.00 18.14  28.16  9.92 22.98 20.35
MoD         14.45  2.89 11.80  9.71  20.89  6.04 17.52 14.81  26.08  8.38 21.41 18.62
MoE         20.56  5.26 16.71 14.18  24.58  8.20 20.49 17.75  28.54  9.89 23.47 20.63
MoE (share) 20.64  5.17 16.64 14.15  24.36  8.19 20.22 17.59  28.47  9.47 23.23 20.39
MoM_E       20.62  4.98 16.91 14.17  24.56  7.04 19.72 17.11  28.48  9.65 23.24 20.46
MoM_I       20.50  5.31 16.90 14.24  26.29  8.21 21.47 18.66  30.91 10.21 24.08 21.73
MoM_P       21.73  6.14 17.72 15.19  26.61  9.05 22.24 19.30  31.38 10.77 24.93 22.36"""
paper = {}  # 'MoM_P small': ROUGE-1, -2, -L and their mean
for line in TABLE_6.strip().splitlines():
    name, *numbers = line.rsplit(None, 12)
    for n, size in enumerate(('small', 'medium', 'large')):
        paper[f'{name.strip()} {size}'] = tuple(map(float, numbers[4 * n:4 * n + 4]))

# ----------------------------------------------------------------------------- settings, checked

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
is_main = rank == 0
common.if_stopped = 'Nothing is trained so far: give the same command again'
finetune.check_settings(settings, length=2, split_seed=0, beams=1, max_new_tokens=1, gen_batch=1,
                        show=0)
if eval_split not in ('test', 'validation'):
    raise ValueError(f'eval_split={eval_split!r} must be one of test, validation')
if data_dir and data_file:
    raise ValueError('data_dir and data_file are both given: take a folder or one file to cut')
shares = [float(share) for share in split.split(',') if re.fullmatch(r'\s*\d*\.?\d+\s*', share)]
if len(shares) != 3 or abs(sum(shares) - 1) > 1e-6:
    raise ValueError(f'split={split!r} must be three shares that sum to 1, such as 0.8,0.1,0.1')
finetune.check_row(paper_row, paper, 'Table 6')
device = common.find_device(device)
dtype = common.find_dtype(dtype, device)
autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == 'bfloat16')
out_dir = out_dir or os.path.join('out', f'xsum_{common.run_name(source)}')
if overwrite and os.path.abspath(source).startswith(os.path.abspath(out_dir) + os.sep):
    raise ValueError(f'source={source} lies in {out_dir}, which overwrite=True empties: take '
                     'another --out_dir')

model, tokenizer = inputs.model_and_tokenizer(source)
start = {name: w.clone() for name, w in model.state_dict().items()}  # what every seed starts from
sep, end = tokenizer.encode_ordinary(separator), tokenizer.eot_token
T = min(length, model.cfg.block_size)
prompt_room = T - len(sep) - max_new_tokens  # tokens of an article, where a summary is generated
if prompt_room < 1:
    raise ValueError(f'{T} tokens leave no room for an article beside the separator, {len(sep)}, '
                     f'and a summary of max_new_tokens={max_new_tokens}: '
                     'take fewer --max_new_tokens')
common.results_folder(out_dir)
# What is printed and saved is what was resolved.
settings.update(device=device, dtype=dtype, out_dir=out_dir, length=T)

# ----------------------------------------------------------------------------- data

# One pair: of its text what is shown (lead is the first sentence); the prompt of a generation; the
# ids of the whole (article, separator, summary, end), of which those from `first` on are the
# summary; and whether the article lost a part in them, and in the prompt.
Example = namedtuple('Example', 'id document lead reference prompt ids first cut prompt_cut')


def rows_of(split):
    """The rows of a split -> where they are from, ((where, row), ...)."""
    if not (data_dir or data_file):
        where = f'{hub_id}, split {split}'
        table = inputs.hub_table(hub_id, None, split,
                                 f'local files, --data_dir=FOLDER with train and {eval_split}')
        return where, finetune.hub_rows(table, where)
    if data_dir:
        paths = finetune.find_split(data_dir, split)
        return ', '.join(paths), finetune.read_tables(paths)
    if not os.path.isfile(data_file) or not data_file.endswith(finetune.TABLES):
        raise ValueError(f'data_file={data_file} is no file with one of the endings '
                         f'{", ".join(finetune.TABLES)}: name one, or rename or convert it')
    n = sum(1 for _ in finetune.read_tables([data_file]))
    cuts = [round(n * share) for share in (shares[0], shares[0] + shares[1])]
    drawn = np.split(np.random.default_rng(split_seed).permutation(n), cuts)
    drawn = set(drawn[('train', 'validation', 'test').index(split)].tolist())
    rows = enumerate(finetune.read_tables([data_file]))
    return data_file, (row for number, row in rows if number in drawn)


def encode(where, row):
    """A row with text in both columns -> an Example, without article if its summary is too long."""
    document, reference = row['document'].strip(), row['summary'].strip()
    article = tokenizer.encode_ordinary(document)
    summary = tokenizer.encode_ordinary(' ' + reference) + [end]
    room = T - len(sep) - len(summary)  # what the summary leaves to the article
    prompt = np.array(article[:prompt_room] + sep, np.uint16)  # GPT-2's 50,257 ids fit
    ids = np.array(article[:max(room, 0)] + sep + summary, np.uint16)
    name = where.split()[-1] if row.get('id') in (None, '') else str(row['id'])
    return Example(name, document[:200], first_sentence(document), reference, prompt, ids,
                   len(ids) - len(summary), len(article) > room, len(article) > prompt_room)


def read(split, most):
    """A split, checked and tokenised -> Examples (at most `most`, unless 0), how many had no text.

    Raises ValueError, naming file, row and fix, for rows without text and summaries longer than T.
    """
    examples, empty, too_long = [], 0, []
    origin, rows = rows_of(split)
    for where, row in tqdm(rows, f'{split}: reading', unit='row', disable=not is_main):
        if most and len(examples) == most:
            break
        lacking = [column for column in ('document', 'summary')
                   if not finetune.is_text(row.get(column)) or not row[column].strip()]
        if lacking and not skip_empty and (data_dir or data_file):
            raise ValueError(
                f'{where} has no text in {lacking[0]!r}, its columns are '
                f'{", ".join(map(str, row))}: call the article document and its summary summary, '
                'repair or delete the row, or leave all such rows out with --skip_empty=True')
        if lacking:
            empty += 1
            continue
        examples.append(encode(where, row))
        if examples[-1].first == len(sep):  # no room for the article
            too_long.append(f'{where}, of {len(examples[-1].ids) - len(sep)} tokens')
    if too_long:
        raise ValueError(
            f'{len(too_long)} of {len(examples)} rows do not fit into the {T} tokens that {source} '
            f'reads: their summaries are too long (the first: {too_long[0]}). '
            'Take weights with a longer block_size'
            + ', or shorten or delete these rows' * bool(data_dir or data_file))
    if not examples:
        raise ValueError(f'{origin} leaves no row for {split}: give more rows'
                         + ' or other shares' * bool(data_file))
    return examples, empty


def first_sentence(text):
    """The first line of a text, up to the first . ! or ? that ends a sentence there: a space and a
    capital, a digit or a currency sign follow."""
    return re.match(r'.*?[.!?]["\'”’)]*(?=\s+["\'“‘(]*[A-Z0-9£$€])|.*', text)[0]


held_out, empty_eval = read(eval_split, max_eval)
train, empty_train = read('train', max_train) if epochs else ([], 0)

# What results depend on. In a folder where any of it was otherwise, nothing is taken up again.
free = ('out_dir', 'overwrite', 'seeds', 'micro_batch', 'gen_batch', 'show', 'paper_row', 'device',
        'source', 'data_dir', 'data_file')  # the last three by what they hold
facts = {key: value for key, value in settings.items() if key not in free}
digest = hashlib.sha256(b'|'.join(e.ids.tobytes() for e in held_out + train)).hexdigest()
facts.update(data_sha256=digest, weights_sha256=model.fingerprint())
run_json = os.path.join(out_dir, 'run.json')
if is_main:
    common.lock_folder(out_dir)
restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0  # torchrun --max_restarts
fresh = overwrite and not restarted or not os.path.exists(run_json)
kept = ('seed*/last.pt', 'seed*/log.csv', 'seed*/summaries.jsonl', 'results.*')
old = [path for name in kept for path in glob.glob(os.path.join(glob.escape(out_dir), name))]
if fresh and old and not overwrite:
    raise ValueError(f'{old[0]} is there, and no run.json: it is of something else. Take another '
                     '--out_dir')
if not fresh:
    lose = 'take another --out_dir, or lose that run (--overwrite=True)'
    was, other = finetune.read_result(run_json, facts, lose)
    if other:
        was = was['settings'].get(other)
        raise ValueError(f'{out_dir} holds a run with {other}={was!r}, this one has '
                         f'{facts[other]!r}: {lose}')

# ----------------------------------------------------------------------------- processes

if world > 1:
    device = common.join_processes(device)
    common.agree(run=(facts, fresh))
model.to(device)


def write(name, text):
    """A file of out_dir, whole or not at all, by the first rank."""
    if is_main:
        common.write_text(os.path.join(out_dir, name), text)


if fresh and is_main:
    for path in old:
        os.unlink(path)
    write('run.json', json.dumps(dict(settings={**settings, **facts}), indent=2))
if world > 1:
    dist.barrier()

cut = f'{eval_split} {finetune.cut_note(sum(e.prompt_cut for e in held_out), len(held_out))}'
if epochs:
    cut = f'train {finetune.cut_note(sum(e.cut for e in train), len(train))}; ' + cut
ids, first = (train or held_out)[0].ids.tolist(), (train or held_out)[0].first
finetune.say(common.changed(settings))
finetune.say(f'''
{model.num_params()[0]:,} parameters; {device} x {world}, {dtype}
{len(train):,} pairs to train on, {len(held_out):,} of {eval_split} to summarise
articles: {cut}
rows left out because they have no text: {empty_train} of train, {empty_eval} of {eval_split}

--- a pair as the model sees it: {len(ids)} tokens, with a loss on the {len(ids) - first} after >>>
{tokenizer.decode(ids[:first])}>>>{tokenizer.decode(ids[first:])}
---
''')

# ----------------------------------------------------------------------------- training

steps_per_epoch = math.ceil(len(train) / batch_size)
steps = epochs * steps_per_epoch


def losses_of(examples):
    """This rank's part of the mean loss per summary token of Examples: one term a micro-batch.

    Each counts by its summary tokens, so the terms of all ranks sum to the mean, however they are
    cut. Rows are padded on the right with <|endoftext|>, which no token sees. But MoD in training
    chooses among all positions of a row, padding too: there all rows are as long as the longest.
    """
    total = sum(len(e.ids) - e.first for e in examples)
    longest = max(len(e.ids) for e in examples)
    width = longest if model.cfg.phi == 'mod' and model.training else 0
    # By length: little padding, and the same work for all ranks.
    mine = sorted(examples, key=lambda e: len(e.ids))[rank::world]
    for at in range(0, len(mine), micro_batch):
        rows = mine[at:at + micro_batch]
        ids = finetune.pad([e.ids.astype(np.int64) for e in rows], end, width)  # (B, T + 1)
        idx, targets = ids[:, :-1], ids[:, 1:].clone()  # (B, T)
        for b, e in enumerate(rows):
            targets[b, :e.first - 1] = targets[b, len(e.ids) - 1:] = -100
        counted = (targets.flatten() >= 0).nonzero().T  # (1, n): logits for these alone
        with autocast:
            x, decisions = model.features(idx.to(device))  # (B, T, C)
            x = x.flatten(0, 1)[counted.to(device)]  # (1, n, C)
            loss = model.loss(x, targets.flatten()[counted].to(device))
        # As in GPT.forward, auxiliary losses add their gradients alone; they are means over rows.
        aux = sum(d.aux - d.aux.detach() for d in itertools.chain(*decisions) if d.aux is not None)
        yield loss * (counted.numel() / total) + aux * (len(rows) / len(examples))


@torch.no_grad()
def evaluate():
    """Mean loss in nats per token of the held-out summaries, their ends included."""
    model.eval()
    batches = math.ceil(len(held_out) / world / micro_batch)
    terms = tqdm(losses_of(held_out), 'held-out loss', batches, unit='batch', leave=False,
                 disable=not is_main)
    return common.all_sum(device, sum(loss.item() for loss in terms))[0]


def train_step(batch, optimizer, seed, step):
    """One step on the global batch -> its loss in nats per summary token, rate, gradient's norm."""
    loss_sum = 0.0
    for loss in losses_of(batch):
        loss.backward()
        loss_sum += loss.item()
    loss_sum, = common.all_sum(device, loss_sum)
    rate = finetune.linear_rate(step, steps, learning_rate, warmup)
    norm = finetune.update(optimizer, model.parameters(), loss_sum, rate, grad_clip,
                           f'seed {seed}, step {step + 1}', 'begin again in another --out_dir')
    return loss_sum, rate, norm


def fine_tune(seed):
    """Train for all epochs, from `start` or this seed's last.pt -> held-out losses: before, and
    after each epoch.

    The pairs of a step are a function of (seed, step) alone. What goes on from last.pt ends like
    what was never stopped, bit for bit on one CPU process.
    """
    path, done, log, losses = os.path.join(out_dir, f'seed{seed}', 'last.pt'), 0, [], []
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay), lr=learning_rate,
                                  betas=(0.9, 0.999), fused=True)
    if os.path.exists(path):
        saved = load_checkpoint(path)
        done, log, losses = saved['epoch'], saved['log'], saved['losses']
        model.load_state_dict(saved['model'])
        if done < epochs:
            optimizer.load_state_dict(saved['optimizer'])
    common.agree(epoch=done)
    if not losses:
        losses.append(evaluate())
        finetune.say(f'seed {seed} | before | held-out loss {losses[0]:.4f}')
    bar = tqdm(total=steps, initial=len(log), desc=f'seed {seed}: training', unit='step',
               disable=not is_main or not epochs)
    for epoch in range(done, epochs):
        model.train()
        order = np.random.default_rng([seed, epoch]).permutation(len(train))
        for at in range(0, len(train), batch_size):
            batch = [train[i] for i in order[at:at + batch_size]]
            loss, rate, norm = train_step(batch, optimizer, seed, len(log))
            log.append([len(log) + 1, loss, rate, norm])
            bar.set_postfix(loss=f'{loss:.3f}', lr=f'{rate:.1e}', refresh=False)
            bar.update()
        losses.append(evaluate())
        mean = statistics.fmean(row[1] for row in log[-steps_per_epoch:])
        finetune.say(f'seed {seed} | epoch {epoch + 1}/{epochs} | training loss {mean:.4f} | '
                     f'held-out loss {losses[-1]:.4f}')
        lines = [','.join(map(str, row)) for row in [('step', 'loss', 'lr', 'norm'), *log]]
        write(f'seed{seed}/log.csv', '\n'.join(lines))
        if is_main:  # sample.py and this script take it as a source
            left = optimizer.state_dict() if epoch + 1 < epochs else None
            with common.atomic_write(path) as file:
                torch.save(dict(model=model.state_dict(), model_config=asdict(model.cfg),
                                meta={'tokenizer': tokenizer.name}, settings=settings, log=log,
                                epoch=epoch + 1, losses=losses, optimizer=left), file)
    bar.close()
    return losses

# ----------------------------------------------------------------------------- generation

def generate(prompts):
    """Lists of ids -> a summary each, as text."""
    lengths = [len(prompt) for prompt in prompts]
    idx = finetune.pad(prompts, end).to(device)  # (B, T)
    out = model.generate(idx, max_new_tokens, temperature=0, beams=beams, stop=end,
                         lengths=torch.tensor(lengths, device=device), vocab=tokenizer.n_vocab)
    texts = []
    for ids, length in zip(out.tolist(), lengths):
        new = [*ids[length:length + max_new_tokens], end]
        texts.append(tokenizer.decode(new[:new.index(end)]).strip())
    return texts


def summarise(seed):
    """Summarise all held-out articles -> the rows of summaries.jsonl, in the order of the split.

    In each round every rank generates one batch, and the first rank appends what all of them made
    to the file. What the file holds already is not made again.
    """
    name, box = f'seed{seed}/summaries.jsonl', [{}]
    path = os.path.join(out_dir, name)
    if is_main and os.path.exists(path):
        try:
            with open(path, encoding='utf-8') as file:
                lines = [json.loads(line) for line in common.whole_lines(file)]
            box = [{line['row']: line for line in lines}]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is damaged ({error!r}): delete it, and the summaries are '
                             'made again') from error
    if world > 1:
        dist.broadcast_object_list(box)
    done, = box
    write(name, ''.join(json.dumps(line) + '\n' for line in done.values()))
    model.eval()
    todo = [row for row in range(len(held_out)) if row not in done]
    # Like lengths together; what needs most memory comes first.
    todo.sort(key=lambda row: -len(held_out[row].prompt))
    n = max(1, gen_batch // beams)
    for at in tqdm(range(0, len(todo), n * world), f'seed {seed}: summaries', unit='batch',
                   disable=not is_main):
        mine = todo[at + rank * n:at + (rank + 1) * n]
        pairs = [held_out[row] for row in mine]
        texts = generate([e.prompt.tolist() for e in pairs]) if mine else []
        lines = [dict(row=row, id=e.id, document=e.document, reference=e.reference, generated=text)
                 for row, e, text in zip(mine, pairs, texts)]
        parts = [lines] * world
        if world > 1:
            dist.all_gather_object(parts, lines)
        lines = list(itertools.chain(*parts))
        done.update((line['row'], line) for line in lines)
        if is_main:
            with open(path, 'a', encoding='utf-8') as file:
                file.writelines(json.dumps(line) + '\n' for line in lines)
    rows = [done[row] for row in sorted(done)]
    write(name, ''.join(json.dumps(row) + '\n' for row in rows))
    return rows

# ----------------------------------------------------------------------------- ROUGE and the report

# torchmetrics takes the Porter stemmer from nltk, which is no requirement of ours.
STEMMING = {'no': False, 'yes': True} if find_spec('nltk') else {'no': False}


def rouge(generated, references):
    """Texts -> by stemming, ROUGE-1, -2, -L and their mean: F-measures in percent."""
    from torchmetrics.functional.text import rouge_score  # needed only here, and slow to import
    scores, keys = {}, ('rouge1', 'rouge2', 'rougeL')
    for stemming, use_stemmer in STEMMING.items():
        score = rouge_score(generated, references, use_stemmer=use_stemmer, rouge_keys=keys)
        three = [100 * score[f'{key}_fmeasure'].item() for key in keys]
        scores[stemming] = [*three, statistics.fmean(three)]
    return scores


runs = []
for seed in range(seed, seed + seeds):
    common.if_stopped = (f'{out_dir} keeps the whole epochs and the summaries that are made: the '
                         'same command goes on there' + ', without --overwrite' * overwrite)
    losses, rows = fine_tune(seed), summarise(seed)
    if is_main:
        scores = rouge([row['generated'] for row in rows], [row['reference'] for row in rows])
        runs.append(dict(seed=seed, held_out_loss=losses, rouge=scores,
                         empty=sum(not row['generated'] for row in rows)))

if is_main:
    origin = data_file or data_dir or hub_id
    decoding = 'greedy' if beams == 1 else f'{beams} beams'
    lead = rouge([e.lead for e in held_out], [e.reference for e in held_out])
    table = [("the article's first sentence", s, lead[s], []) for s in STEMMING]
    for s in STEMMING:  # mean, and standard deviation if there is one
        columns = list(zip(*(run['rouge'][s] for run in runs)))
        table.append((f'{source}, {decoding}', s, [statistics.fmean(c) for c in columns],
                      [statistics.stdev(c) for c in columns if seeds > 1]))
    if paper_row:
        table.append((f'paper, Table 6, {paper_row}', 'not said', paper[paper_row], []))
    columns = ['summaries', 'stemming', 'ROUGE-1', 'ROUGE-2', 'ROUGE-L', 'mean']
    write('results.json', json.dumps(dict(
        columns=columns, table=table, runs=runs, settings=settings, model_config=asdict(model.cfg),
        processes=world, steps=steps, train_pairs=len(train), eval_pairs=len(held_out),
        truncated=dict(train=sum(e.cut for e in train), eval=sum(e.prompt_cut for e in held_out)),
        rows_without_text=dict(train=empty_train, eval=empty_eval), data_sha256=digest,
        torch=str(torch.__version__), metric='F-measure in percent; torchmetrics: lower case, '
        'words of a-z, 0-9; Porter stemmer of nltk'), indent=2))
    cells = [columns, ['---'] * 6]
    for name, stemming, values, stds in table:
        stds = [f' ± {sd:.2f}' for sd in stds] or [''] * 4
        cells.append([name, stemming, *(f'{v:.2f}{sd}' for v, sd in zip(values, stds))])
    losses = '; '.join(' '.join(f'{loss:.3f}' for loss in run['held_out_loss']) for run in runs)
    empty = ', '.join(f'{run["empty"]} of {len(held_out):,}' for run in runs)
    report = '\n'.join(f'| {" | ".join(row)} |' for row in cells) + f'''

- ROUGE F-measure in percent, {len(held_out):,} pairs, split {eval_split} of {origin}
- {decoding}, at most {max_new_tokens} new tokens, articles cut to {prompt_room} tokens
- summaries that are empty: {empty}
- training: {epochs} x {len(train):,} pairs of at most {T} tokens, {steps:,} steps of {batch_size},
  learning rate {learning_rate}, warm-up over {warmup:.0%} of the steps, {dtype}
- articles: {cut}
- seeds {", ".join(str(run["seed"]) for run in runs)}{"; mean ± standard deviation" * (seeds > 1)}
- held-out loss, nats per token of the summaries, before and after each epoch: {losses}
''' + '- with stemming as well after pip install nltk\n' * ('yes' not in STEMMING)
    write('results.md', report)
    for row in rows[:show]:
        finetune.say(f'\n{row["id"]}: {row["document"][:80]!r}...\n'
                     f'  reference: {row["reference"]}\n  generated: {row["generated"]}')
    finetune.say(f'\n{report}\n{out_dir}: results.md, results.json, and of each seed '
                 f'{"last.pt, log.csv and " * bool(epochs)}summaries.jsonl')
if world > 1:
    common.leave_processes()
