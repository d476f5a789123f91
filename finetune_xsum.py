"""Fine-tune on XSUM (a BBC article and its summary in one sentence), generate summaries, score them with ROUGE.

  python finetune_xsum.py --source=out/mom_demo                               a run of ours, vanilla or assembled
  torchrun --nproc_per_node=8 finetune_xsum.py --source=gpt2 --seeds=3        a GPT-2, three seeds, one process per GPU
  python finetune_xsum.py --source=out/xsum_gpt2/seed1 --epochs=0 --beams=4   no training: decode what was fine-tuned

The model reads article, separator, summary, <|endoftext|>. The loss is on the summary and its end alone, and an article
that is too long loses its tail. A run that was stopped goes on when the same command is given again, without
--overwrite. out_dir gets results.md and results.json, and of each seed last.pt, log.csv and summaries.jsonl.
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
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from model import GPT
from weights import load_checkpoint

# --- run
source = 'out/mom_demo'       # a run's directory or checkpoint, a GPT-2 name, or a Hugging Face directory
out_dir = ''                  # '' is out/xsum_<name of source>
overwrite = False             # start anew in an out_dir that holds another run
# --- data (columns: document, summary and, if there is one, id)
hub_id = 'EdinburghNLP/xsum'  # on the Hugging Face Hub: 204,045 / 11,332 / 11,334 pairs
data_dir = ''                 # instead: a folder with train, validation and test, as .jsonl, .parquet, .csv or .tsv
data_file = ''                # instead: one such file, which this script cuts into the three
split = '0.8,0.1,0.1'         # shares of data_file: train, validation, test
split_seed = 1337             # of the draw that cuts data_file
eval_split = 'test'           # 'test' or 'validation': which articles are summarised and scored
max_train = 0                 # use the first rows only; 0 is all
max_eval = 0                  # likewise
skip_empty = False            # leave rows without text out; the Hub's always are, and counted
# --- training: learning rate, length, epochs and batch are the paper's (section 4.1), the rest is ours
separator = '\nTL;DR:'        # between article and summary; GPT-2's authors asked for summaries in this way
length = 1024                 # tokens of an example; a model with fewer positions takes its own block_size
epochs = 3                    # 0 generates without training
batch_size = 64               # examples per step, over all processes and micro-batches
micro_batch = 8               # examples per forward pass of a process, at most
learning_rate = 2e-5          # peak; AdamW (0.9, 0.999)
warmup = 0.1                  # share of the steps in which the learning rate rises; then it falls linearly to 0
weight_decay = 0.01           # of matrices and embeddings
grad_clip = 1.0               # largest gradient norm; 0 is off
seed = 1                      # of the order of the examples. Nothing else is random: there is no dropout
seeds = 1                     # how many runs: seed, seed + 1, ...
# --- generation, in the weights' own type
beams = 1                     # 1 is greedy
max_new_tokens = 64           # of a summary, at most
gen_batch = 32                # sequences generated at a time by a process, beams counted
# --- report
show = 10                     # summaries printed at the end, beside their references
paper_row = ''                # a row of the paper's Table 6 to put beside ours, such as 'MoM_P small'
# --- system
device = 'auto'               # 'auto', 'cpu', 'cuda'
dtype = 'auto'                # autocast of the loss: 'bfloat16' or 'float32'; auto is bfloat16 on a GPU
# ---
settings, given = common.load(globals())

TABLE_6 = {  # ROUGE-1, -2, -L and their mean, of small, medium and large
    'GPT2': ((20.80, 5.05, 16.92, 14.26), (25.07, 8.35, 21.00, 18.14), (28.16, 9.92, 22.98, 20.35)),
    'MoD': ((14.45, 2.89, 11.80, 9.71), (20.89, 6.04, 17.52, 14.81), (26.08, 8.38, 21.41, 18.62)),
    'MoE': ((20.56, 5.26, 16.71, 14.18), (24.58, 8.20, 20.49, 17.75), (28.54, 9.89, 23.47, 20.63)),
    'MoE (share)': ((20.64, 5.17, 16.64, 14.15), (24.36, 8.19, 20.22, 17.59), (28.47, 9.47, 23.23, 20.39)),
    'MoM_E': ((20.62, 4.98, 16.91, 14.17), (24.56, 7.04, 19.72, 17.11), (28.48, 9.65, 23.24, 20.46)),
    'MoM_I': ((20.50, 5.31, 16.90, 14.24), (26.29, 8.21, 21.47, 18.66), (30.91, 10.21, 24.08, 21.73)),
    'MoM_P': ((21.73, 6.14, 17.72, 15.19), (26.61, 9.05, 22.24, 19.30), (31.38, 10.77, 24.93, 22.36))}

# ----------------------------------------------------------------------------- settings, checked before anything long

rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
is_main = rank == 0
for key, least in dict(length=2, epochs=0, batch_size=1, micro_batch=1, seeds=1, seed=0, split_seed=0, beams=1,
                       max_new_tokens=1, gen_batch=1, max_train=0, max_eval=0, show=0).items():
    if settings[key] < least:
        raise ValueError(f'{key}={settings[key]} must be at least {least}')
for key, known in dict(eval_split=('test', 'validation'), device=('auto', 'cpu', 'cuda'),
                       dtype=('auto', 'bfloat16', 'float32')).items():
    if settings[key] not in known:
        raise ValueError(f'{key}={settings[key]!r} must be one of {", ".join(known)}')
if not 0 <= warmup < 1:
    raise ValueError(f'warmup={warmup} is a share of the steps: 0 <= warmup < 1')
if data_dir and data_file:
    raise ValueError('data_dir and data_file are both given: take a folder of splits or one file to cut')
shares = [float(share) for share in split.split(',') if re.fullmatch(r'\s*\d*\.?\d+\s*', share)]
if len(shares) != 3 or abs(sum(shares) - 1) > 1e-6:
    raise ValueError(f'split={split!r} must be three shares that sum to 1, such as 0.8,0.1,0.1')
paper = {f'{name} {size}': r for name, row in TABLE_6.items() for size, r in zip(('small', 'medium', 'large'), row)}
if paper_row and paper_row not in paper:
    raise ValueError(f'paper_row={paper_row!r} is not in Table 6: take one of {", ".join(paper)}')
device = common.find_device(device)
dtype = ('bfloat16' if device == 'cuda' else 'float32') if dtype == 'auto' else dtype
autocast = torch.autocast(device, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
out_dir = out_dir or os.path.join('out', f'xsum_{common.run_name(source)}')

if overwrite and os.path.abspath(source).startswith(os.path.abspath(out_dir) + os.sep):
    raise ValueError(f'source={source} lies in {out_dir}, which overwrite=True empties: take another --out_dir')

model, tokenizer = GPT.from_pretrained(source), common.tokenizer_of(source)
start = {name: w.clone() for name, w in model.state_dict().items()}  # what every seed starts from
if model.cfg.vocab_size < tokenizer.n_vocab:
    raise ValueError(f'{source} knows {model.cfg.vocab_size} tokens, its tokenizer {tokenizer.name!r} makes '
                     f'{tokenizer.n_vocab}: give weights that were trained with this tokenizer')
T, sep, end = min(length, model.cfg.block_size), tokenizer.encode_ordinary(separator), tokenizer.eot_token
if T <= len(sep) + max_new_tokens:
    raise ValueError(f'{T} tokens leave no room for an article beside the separator, {len(sep)}, and a summary of '
                     f'max_new_tokens={max_new_tokens}: take fewer --max_new_tokens')
settings.update(device=device, dtype=dtype, out_dir=out_dir, length=T)  # what is printed and saved is what was resolved

# ----------------------------------------------------------------------------- data

READERS = {'.jsonl': 'json', '.parquet': 'parquet', '.csv': 'csv', '.tsv': 'csv'}
AS_TEXT = dict(keep_default_na=False, converters=dict.fromkeys(('document', 'summary', 'id'), str))  # also NA and 007

# One pair: what is shown of its text (lead is the first sentence), the prompt of a generation, and the ids of the
# whole (article, separator, summary, end), of which those from `first` on are the summary.
Example = namedtuple('Example', 'id document lead reference prompt ids first')


def load_table(split):
    """A split -> its rows as a datasets.Dataset, where they are from (for messages), the number of each there."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError
    if not (data_dir or data_file):
        try:
            table = datasets.load_dataset(hub_id, split=split)
        # In turn: no network, no such id, the hub's refusals, no such split, a script instead of data.
        except (ConnectionError, FileNotFoundError, HfHubHTTPError, ValueError, RuntimeError) as error:
            raise ValueError(f'{hub_id} could not be had from the Hub ({error}): give local files, --data_dir=FOLDER '
                             f'with train and {eval_split} as {", ".join(READERS)}') from error
        return table, f'{hub_id}, split {split}', range(1, len(table) + 1)
    paths = [data_file] if data_file else [os.path.join(data_dir, split + ending) for ending in READERS]
    found = [path for path in paths if os.path.isfile(path)]
    if len(found) != 1:
        raise ValueError(f'give exactly one of {", ".join(paths)}: there is {" and ".join(found) or "none"}')
    path, ending = found[0], os.path.splitext(found[0])[1].lower()
    if ending not in READERS:
        raise ValueError(f'{path} has an unknown ending: rename or convert it to one of {", ".join(READERS)}')
    options = {**AS_TEXT, 'sep': '\t' if ending == '.tsv' else ','} if READERS[ending] == 'csv' else {}
    try:
        table = datasets.load_dataset(READERS[ending], data_files=path, split='train', **options)
    # Broken, not UTF-8, without rows; datasets says the last in three ways.
    except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
        why = str(error.__cause__ or error).strip() or type(error).__name__
        raise ValueError(f'{path} is empty or cannot be read as {ending[1:]} in UTF-8 ({why}): write it again'
                         ) from error
    if '__index_level_0__' in table.column_names:
        raise ValueError(f'{path} has rows with more fields than its header: put text that has separators into quotes')
    numbers = np.arange(len(table))
    if data_file:
        cuts = [round(len(table) * share) for share in (shares[0], shares[0] + shares[1])]
        drawn = np.split(np.random.default_rng(split_seed).permutation(len(table)), cuts)
        numbers = np.sort(drawn[('train', 'validation', 'test').index(split)])
    return table.select(numbers), path, (numbers + 1).tolist()


def read(split, most):
    """A split, checked and tokenised -> list of Examples (at most `most`, unless 0), how many rows had no text.

    Raises ValueError, naming file, row and fix, for a missing column, a row without text, a summary longer than T.
    """
    table, where, numbers = load_table(split)
    for column in ('document', 'summary'):
        if column not in table.column_names:
            raise ValueError(f'{where} has no column {column!r}, only {", ".join(table.column_names)}: call the column '
                             'with the articles document, the one with their summaries summary')
    examples, empty = [], 0
    for number, row in zip(tqdm(numbers, f'{split}: reading', unit='row', disable=not is_main), table):
        if most and len(examples) == most:
            break
        lacking = [c for c in ('document', 'summary') if not isinstance(row[c], str) or not row[c].strip()]
        if lacking and not skip_empty and (data_dir or data_file):
            raise ValueError(f'{where}, row {number} has no text in {lacking[0]!r}: repair it, delete it, or leave all '
                             'such rows out with --skip_empty=True')
        if lacking:
            empty += 1
            continue
        document, reference = row['document'].strip(), row['summary'].strip()
        article, summary = tokenizer.encode_ordinary(document), tokenizer.encode_ordinary(' ' + reference) + [end]
        room = T - len(sep) - len(summary)  # what the summary leaves to the article
        if room < 1:
            raise ValueError(f'{where}, row {number} has a summary of {len(summary)} tokens: with the separator it '
                             f'does not fit into {T}. Shorten or delete it, or take a model with a longer block_size')
        prompt, ids = article[:T - len(sep) - max_new_tokens] + sep, article[:room] + sep + summary
        name = str(number if row.get('id') in (None, '') else row['id'])
        examples.append(Example(name, document[:200], first_sentence(document), reference, np.array(prompt, np.uint16),
                                np.array(ids, np.uint16), len(ids) - len(summary)))  # GPT-2's 50,257 ids fit 16 bits
    if not examples:
        raise ValueError(f'{where} leaves no row for {split}: give more rows{" or other shares" * bool(data_file)}')
    return examples, empty


def first_sentence(text):
    """The first line of a text up to the first . ! or ? that a space and a capital, digit or currency sign follow."""
    return re.match(r'.*?[.!?]["\'”’)]*(?=\s+["\'“‘(]*[A-Z0-9£$€])|.*', text)[0]


held_out, empty_eval = read(eval_split, max_eval)
train, empty_train = read('train', max_train) if epochs else ([], 0)

# What results depend on. In a folder where any of it was otherwise, nothing is taken up again.
facts = {k: v for k, v in settings.items() if k not in ('out_dir', 'overwrite', 'seeds', 'micro_batch', 'gen_batch',
                                                        'show', 'paper_row', 'device')}
facts['data_sha256'] = hashlib.sha256(b'|'.join(e.ids.tobytes() for e in held_out + train)).hexdigest()
facts['weights_sha256'] = model.fingerprint()
run_json = os.path.join(out_dir, 'run.json')
restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0  # torchrun --max_restarts: it goes on
fresh = overwrite and not restarted or not os.path.exists(run_json)
old = [path for name in ('seed*/last.pt', 'seed*/log.csv', 'seed*/summaries.jsonl', 'results.*')
       for path in glob.glob(os.path.join(glob.escape(out_dir), name))]
if fresh and old and not overwrite:
    raise ValueError(f'{old[0]} is there, and no run.json: it is of something else. Take another --out_dir')
if not fresh:
    try:
        with open(run_json, encoding='utf-8') as f:
            was = dict(json.load(f))
    except (ValueError, TypeError) as error:
        raise ValueError(f'{run_json} is broken ({error}): lose that run (--overwrite=True), or take another '
                         '--out_dir') from error
    for key, value in facts.items():
        if was.get(key) != value:
            raise ValueError(f'{out_dir} holds a run with {key}={was.get(key)!r}, this one has {value!r}: take another '
                             '--out_dir, or lose that run (--overwrite=True)')

# ----------------------------------------------------------------------------- processes

if world > 1:
    device = common.join_processes(device)
model.to(device)


def say(text):
    if is_main:
        with tqdm.external_write_mode():  # around the progress bars
            print(text, flush=True)


def write(name, text):
    """A file of out_dir, whole or not at all, by the first rank."""
    if is_main:
        with common.atomic_write(os.path.join(out_dir, name)) as f:
            f.write(text.encode())


if fresh and is_main:
    for path in old:
        os.unlink(path)
    write('run.json', json.dumps(facts, indent=2))
if world > 1:
    dist.barrier()

ids, first = (train or held_out)[0].ids.tolist(), (train or held_out)[0].first
say('\n'.join(f'{k} = {v!r}' for k, v in settings.items()))
say(f'\n{model.num_params()[0]:,} parameters; {device} x {world}, {dtype}\n{len(train):,} pairs to train on, '
    f'{sum(len(e.ids) == T for e in train):,} of them {T} tokens long; {len(held_out):,} of {eval_split} to summarise\n'
    f'rows left out because they have no text: {empty_train} of train, {empty_eval} of {eval_split}\n\n'
    f'--- one pair as the model sees it: {len(ids)} tokens, with a loss on the {len(ids) - first} after >>>\n'
    f'{tokenizer.decode(ids[:first])}>>>{tokenizer.decode(ids[first:])}\n---\n')

# ----------------------------------------------------------------------------- training

steps_per_epoch = math.ceil(len(train) / batch_size)
steps = epochs * steps_per_epoch


def lr_at(step):
    """Linear warm-up over the first share `warmup` of the steps, then linearly down to 0."""
    rise = round(warmup * steps)
    return learning_rate * ((step + 1) / rise if step < rise else (steps - step) / (steps - rise))


def losses_of(examples):
    """This rank's part of the mean loss per summary token of Examples, all ranks' together: one term a micro-batch.

    Each counts by its summary tokens, so the terms of all ranks sum to the mean, however they are cut. Rows are padded
    on the right with <|endoftext|>, which no token sees. But MoD in training chooses among all positions of a row, the
    padding too: there every row is as long as the longest of them all, whatever the cut.
    """
    total, longest = sum(len(e.ids) - e.first for e in examples), max(len(e.ids) for e in examples)
    mine = sorted(examples, key=lambda e: len(e.ids))[rank::world]  # little padding, and the same work for all ranks
    for at in range(0, len(mine), micro_batch):
        rows = mine[at:at + micro_batch]
        shape = len(rows), (longest if model.cfg.phi == 'mod' and model.training else len(rows[-1].ids)) - 1
        idx, targets = torch.full(shape, end), torch.full(shape, -100)
        for b, e in enumerate(rows):
            ids = torch.from_numpy(e.ids.astype(np.int64))
            idx[b, :len(ids) - 1] = ids[:-1]
            targets[b, e.first - 1:len(ids) - 1] = ids[e.first:]
        counted = (targets.flatten() >= 0).nonzero().T  # (1, n): the head and the logits for these alone
        with autocast:
            x, decisions = model.features(idx.to(device))
            loss = model.loss(x.flatten(0, 1)[counted.to(device)], targets.flatten()[counted].to(device))
        # As in GPT.forward, auxiliary losses add their gradients alone; they are means over rows, not over summaries.
        aux = sum(d.aux - d.aux.detach() for d in itertools.chain(*decisions) if d.aux is not None)
        yield loss * (counted.numel() / total) + aux * (len(rows) / len(examples))


def all_sum(number):
    """A number summed over all ranks."""
    total = torch.tensor(number, dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(total)
    return total.item()


@torch.no_grad()
def evaluate():
    """Mean loss in nats per token of the held-out summaries, their ends included."""
    model.eval()
    terms = tqdm(losses_of(held_out), 'held-out loss', math.ceil(len(held_out) / world / micro_batch), unit='batch',
                 leave=False, disable=not is_main)
    return all_sum(sum(loss.item() for loss in terms))


def train_step(batch, optimizer, step):
    """One step on the global batch, a list of Examples -> its loss in nats per summary token, the gradient's norm."""
    loss_sum = 0.0
    for loss in losses_of(batch):
        loss.backward()
        loss_sum += loss.item()
    for p in model.parameters() if world > 1 else ():  # not DDP: it waits for a rank that a short last batch left out
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step)
    loss, norm = all_sum(loss_sum), torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise ValueError(f'step {step + 1}: loss {loss}, gradient norm {norm}. Training stops before the update: '
                         'begin again (--overwrite=True) with a lower --learning_rate or --dtype=float32')
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def fine_tune(seed):
    """Train for all epochs, from `start` or from this seed's last.pt -> held-out losses: before, after each epoch.

    The pairs of a step are a function of (seed, step) alone. What goes on from last.pt ends like what was never
    stopped, bit for bit on one CPU process.
    """
    path, done, log, losses = os.path.join(out_dir, f'seed{seed}', 'last.pt'), 0, [], []
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay), lr=learning_rate, betas=(0.9, 0.999), fused=True)
    if os.path.exists(path):
        saved = load_checkpoint(path)
        done, log, losses = saved['epoch'], saved['log'], saved['losses']
        model.load_state_dict(saved['model'])
        if done < epochs:
            optimizer.load_state_dict(saved['optimizer'])
    else:
        losses.append(evaluate())
        say(f'seed {seed} | before | held-out loss {losses[0]:.4f}')
    bar = tqdm(total=steps, initial=len(log), desc=f'seed {seed}: training', unit='step',
               disable=not is_main or not epochs)
    for epoch in range(done, epochs):
        model.train()
        order = np.random.default_rng([seed, epoch]).permutation(len(train))
        for at in range(0, len(train), batch_size):
            step = len(log)
            loss, norm = train_step([train[i] for i in order[at:at + batch_size]], optimizer, step)
            log.append([step + 1, loss, lr_at(step), norm])
            bar.set_postfix(loss=f'{loss:.3f}', lr=f'{lr_at(step):.1e}', refresh=False)
            bar.update()
        losses.append(evaluate())
        mean = statistics.fmean(row[1] for row in log[-steps_per_epoch:])
        say(f'seed {seed} | epoch {epoch + 1}/{epochs} | training loss {mean:.4f} | held-out loss {losses[-1]:.4f}')
        write(f'seed{seed}/log.csv', '\n'.join(','.join(map(str, r)) for r in [('step', 'loss', 'lr', 'norm'), *log]))
        if is_main:
            with common.atomic_write(path) as f:  # sample.py and this script take it as a source
                torch.save(dict(model=model.state_dict(), model_config=asdict(model.cfg), settings=settings, log=log,
                                meta={'tokenizer': tokenizer.name}, epoch=epoch + 1, losses=losses,
                                optimizer=optimizer.state_dict() if epoch + 1 < epochs else None), f)
    bar.close()
    return losses

# ----------------------------------------------------------------------------- generation

def generate(prompts):
    """Lists of ids -> a summary each, as text."""
    lengths = [len(prompt) for prompt in prompts]
    idx = torch.tensor([[*prompt, *[end] * (max(lengths) - len(prompt))] for prompt in prompts], device=device)
    out = model.generate(idx, max_new_tokens, temperature=0, beams=beams, stop=end,
                         lengths=torch.tensor(lengths, device=device), vocab=tokenizer.n_vocab).tolist()
    texts = []
    for ids, length in zip(out, lengths):
        new = [*ids[length:length + max_new_tokens], end]
        texts.append(tokenizer.decode(new[:new.index(end)]).strip())
    return texts


def summarise(seed):
    """Summarise all held-out articles -> the rows of summaries.jsonl, in the order of the split.

    In each round every rank generates one batch, and the first rank appends what all of them made to the file. What
    the file holds already is not made again.
    """
    name, box = f'seed{seed}/summaries.jsonl', [{}]
    path = os.path.join(out_dir, name)
    if is_main and os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            lines = [json.loads(line) for line in f if line.endswith('\n')]  # a crash can leave half of the last one
        box = [{line['row']: line for line in lines}]
    if world > 1:
        dist.broadcast_object_list(box)
    done, = box
    write(name, ''.join(json.dumps(line) + '\n' for line in done.values()))
    model.eval()
    todo = [row for row in range(len(held_out)) if row not in done]
    todo.sort(key=lambda row: -len(held_out[row].prompt))  # like lengths together; what needs most memory comes first
    n = max(1, gen_batch // beams)
    for at in tqdm(range(0, len(todo), n * world), f'seed {seed}: summaries', unit='batch', disable=not is_main):
        mine = todo[at + rank * n:at + (rank + 1) * n]
        pairs = [held_out[row] for row in mine]
        texts = generate([e.prompt.tolist() for e in pairs]) if mine else []
        lines = [dict(row=row, id=e.id, document=e.document, reference=e.reference, generated=text)
                 for row, e, text in zip(mine, pairs, texts)]
        parts = [lines] * world
        if world > 1:
            dist.all_gather_object(parts, lines)
        lines = [line for part in parts for line in part]
        done.update((line['row'], line) for line in lines)
        if is_main:
            with open(path, 'a', encoding='utf-8') as f:
                f.writelines(json.dumps(line) + '\n' for line in lines)
    rows = [done[row] for row in sorted(done)]
    write(name, ''.join(json.dumps(row) + '\n' for row in rows))
    return rows

# ----------------------------------------------------------------------------- ROUGE and the report

# torchmetrics takes the Porter stemmer from nltk, which is no requirement of ours: only with it are there two variants.
STEMMING = {'no': False, 'yes': True} if find_spec('nltk') else {'no': False}


def rouge(generated, references):
    """Texts -> for each variant of stemming, ROUGE-1, -2, -L and their mean: F-measures in percent, means of texts."""
    from torchmetrics.functional.text import rouge_score  # needed only here, and slow to import
    scores, keys = {}, ('rouge1', 'rouge2', 'rougeL')
    for stemming, use_stemmer in STEMMING.items():
        score = rouge_score(generated, references, use_stemmer=use_stemmer, rouge_keys=keys)
        three = [100 * score[f'{key}_fmeasure'].item() for key in keys]
        scores[stemming] = [*three, statistics.fmean(three)]
    return scores


runs = []
for seed in range(seed, seed + seeds):
    losses, rows = fine_tune(seed), summarise(seed)
    if is_main:
        scores = rouge([row['generated'] for row in rows], [row['reference'] for row in rows])
        runs.append(dict(seed=seed, held_out_loss=losses, rouge=scores))

if is_main:
    data, decoding = data_file or data_dir or hub_id, 'greedy' if beams == 1 else f'{beams} beams'
    lead = rouge([e.lead for e in held_out], [e.reference for e in held_out])
    table = [("the article's first sentence", s, lead[s], []) for s in STEMMING]  # with standard deviations, if any
    for s in STEMMING:
        columns = list(zip(*(run['rouge'][s] for run in runs)))
        table.append((f'{source}, {decoding}', s, [statistics.fmean(c) for c in columns],
                      [statistics.stdev(c) for c in columns if seeds > 1]))
    if paper_row:
        table.append((f'paper, Table 6, {paper_row}', 'not said', paper[paper_row], []))
    columns = ['summaries', 'stemming', 'ROUGE-1', 'ROUGE-2', 'ROUGE-L', 'mean']
    write('results.json', json.dumps(dict(
        columns=columns, table=table, runs=runs, settings=settings, model_config=asdict(model.cfg), processes=world,
        steps=steps, train_pairs=len(train), eval_pairs=len(held_out), data_sha256=facts['data_sha256'],
        rows_without_text=dict(train=empty_train, eval=empty_eval), torch=str(torch.__version__),
        metric='F-measure in percent; torchmetrics: lower case, words of a-z, 0-9; Porter stemmer of nltk'), indent=2))
    cells = [columns, ['---'] * 6]
    for name, stemming, values, stds in table:
        stds = [f' ± {sd:.2f}' for sd in stds] or [''] * 4
        cells.append([name, stemming, *(f'{v:.2f}{sd}' for v, sd in zip(values, stds))])
    losses = '; '.join(' '.join(f'{loss:.3f}' for loss in run['held_out_loss']) for run in runs)
    report = '\n'.join(f'| {" | ".join(row)} |' for row in cells) + f'''

- ROUGE F-measure in percent, {len(held_out):,} pairs, split {eval_split} of {data}
- {decoding}, at most {max_new_tokens} new tokens, articles cut to {T - len(sep) - max_new_tokens} tokens
- training: {epochs} x {len(train):,} pairs, {steps:,} steps of {batch_size}, learning rate {learning_rate}
- seeds {", ".join(str(run["seed"]) for run in runs)}{"; mean ± standard deviation" * (seeds > 1)}
- held-out loss, nats per token of the summaries, before and after each epoch: {losses}
''' + '- with stemming as well after pip install nltk\n' * ('yes' not in STEMMING)
    write('results.md', report)
    for row in rows[:show]:
        say(f'\n{row["id"]}: {row["document"][:80]!r}...\n  reference: {row["reference"]}\n'
            f'  generated: {row["generated"]}')
    say(f'\n{report}\n{out_dir}: results.md, results.json, and of each seed {"last.pt, log.csv and " * bool(epochs)}'
        'summaries.jsonl')
if world > 1:
    common.leave_processes()
