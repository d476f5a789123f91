"""What finetune_glue.py and finetune_xsum.py share: tables of labelled examples, checks, the
schedule."""
import csv
import difflib
import json
import math
import os
import re

# ----------------------------------------------------------------------------- labelled data

TABLES = ('.jsonl', '.parquet', '.csv', '.tsv')


def find_split(folder, split, optional=False):
    """The file of a split, or its shards (train-00000-of-00002.parquet) in order -> their paths.

    validation may be called dev. If the split is not there: [] where `optional`, else ValueError.
    Also raises ValueError for a split that is there twice, or whose shards are not each there once.
    """
    names = dict.fromkeys([split, split.replace('validation', 'dev')])
    pattern = re.compile(rf'({"|".join(names)})(-(\d+)-of-(\d+)(-\w+)?)?(\.\w+)')
    here = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = {}
    for file in here:
        part = pattern.fullmatch(file)
        if part and part[6] in TABLES:
            path, n = os.path.join(folder, file), int(part[3] or 0)
            found.setdefault((part[1], part[4], part[6]), []).append((n, path))
    if len(found) > 1:
        twice = ' and '.join(shards[0][1] for shards in found.values())
        raise ValueError(f'{twice} are the same split: keep one of them')
    for (_, count, _), shards in found.items():
        numbers, paths = zip(*sorted(shards))
        if list(numbers) != list(range(int(count or 1))):
            raise ValueError(f'{paths[0]} is one of {int(count)} shards, but those there have the '
                             f'numbers {", ".join(map(str, numbers))}: give each once')
        return list(paths)
    if optional:
        return []
    looked_for = ', '.join(name + ending for name in names for ending in TABLES)
    raise ValueError(f'{folder} has no split {split}: it holds {", ".join(here) or "nothing"}; '
                     f'give one of {looked_for}, or shards {split}-00000-of-00001.parquet')


def read_tables(paths, columns=None, numbers=(), broken=None):
    """The rows of tables -> ('a.csv, row 3', {column: value}), ... in the order of `paths`.

    A .csv has quotes, a .tsv has none: there a line is a row. What they hold is text; in the
    columns `numbers` alone, what looks like a number is a float. Blank lines are skipped, but
    counted. columns: the names, for .tsv files that have no line of them. broken: a list that gets
    the path for each row with more or fewer values than columns, which is then left out. Raises
    ValueError, naming file, row and fix, for a row that cannot be read.
    """
    for path in paths:
        n = 0
        try:
            for n, row in enumerate(_rows(path, columns, numbers, broken), 1):
                if row is not None:
                    yield f'{path}, row {n}', row
        # Not JSON, not UTF-8, not parquet; brackets without end; damaged quotes; not readable.
        except (ValueError, RuntimeError, csv.Error, OSError) as error:
            why = ' '.join(str(error).split())
            raise ValueError(f'{path}, row {n + 1} cannot be read ({why}): repair or delete it'
                             ) from error


def _rows(path, columns, numbers, broken):  # of one file; None for one that is left out
    if path.endswith('.parquet'):
        from pyarrow.parquet import ParquetFile
        for batch in ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
        return
    with open(path, 'rb') as file:
        # A line at a time, so that what is not UTF-8 has the number of its row.
        lines = (line.decode('utf-8-sig' if n == 0 else 'utf-8') for n, line in enumerate(file))
        if path.endswith('.jsonl'):
            for line in lines:
                row = json.loads(line) if line.strip() else {}
                if not isinstance(row, dict):
                    raise ValueError('it is no object with columns')
                yield row if line.strip() else None
            return
        csv.field_size_limit(2 ** 31 - 1)  # of a cell; csv allows 131,072
        if path.endswith('.csv'):
            table = csv.reader(lines, strict=True)
        else:
            table = (line.rstrip('\r\n').split('\t') for line in lines)
        columns = columns or next(table, [])
        for values in table:
            if len(values) == len(columns) and values != ['']:
                row = dict(zip(columns, values))
                for column in numbers:
                    if re.fullmatch(r'-?[0-9]+([.][0-9]*)?', row.get(column, '')):
                        row[column] = float(row[column])
                yield row
            elif values in ([], ['']):
                yield None
            elif broken is None:
                raise ValueError('it has more or fewer values than there are columns')
            else:
                broken.append(path)
                yield None


def hub_rows(table, source):
    """The rows of a table of the Hub, as read_tables gives those of files."""
    for n, row in enumerate(table, 1):
        yield f'{source}, row {n}', row


def is_text(value):
    """Whether a value is text; half of a surrogate pair, which JSON can spell, is none."""
    return isinstance(value, str) and value == value.encode(errors='ignore').decode()


# ----------------------------------------------------------------------------- fine-tuning

def say(text):
    """Print on the first process alone, above the progress bars."""
    from tqdm import tqdm
    if os.environ.get('RANK', '0') == '0':
        with tqdm.external_write_mode():
            print(text, flush=True)


def check_settings(settings, **least):
    """ValueError for a number below its least, here or in `least`; for a wrong dtype or warmup."""
    least = dict(dict(seeds=1, micro_batch=1, max_train=0, max_eval=0, epochs=0,
                      batch_size=1, learning_rate=0, weight_decay=0, grad_clip=0), **least)
    for key, value in least.items():
        if not value <= settings[key] < math.inf:  # so that nan is refused too
            raise ValueError(f'{key}={settings[key]} must be at least {value}, and finite')
    dtype = settings['dtype']
    if dtype not in ('auto', 'bfloat16', 'float32'):  # fp16 wants losses that are scaled
        raise ValueError(f"dtype={dtype!r} must be one of 'auto', 'bfloat16', 'float32'")
    if not 0 <= settings['warmup'] < 1:
        raise ValueError(f'warmup={settings["warmup"]} is a share of the steps: 0 <= warmup < 1')


def check_row(name, rows, table):
    """ValueError, with the nearest, where `name` is neither '' nor a row of a table of the
    paper."""
    if name and name not in rows:
        near, = difflib.get_close_matches(name, rows, 1, cutoff=0)
        raise ValueError(f'paper_row={name!r} is no row of {table}; did you mean {near!r}? '
                         f'There are {", ".join(rows)}')


def read_result(path, want, fix='delete it'):
    """What an earlier command left in a JSON file -> (the object, the first key of `want` of which
    its `settings` hold another value, or None); (None, None) if there is no such file.

    Raises ValueError, with `fix`, if the file is something else.
    """
    if not os.path.exists(path):
        return None, None
    try:
        with open(path, encoding='utf-8') as file:
            result = json.load(file)
        was = dict(result['settings'])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not a result of this script ({error!r}): {fix}') from error
    return result, next((key for key in want if was.get(key) != want[key]), None)


def cut_note(cut, n):
    """How many of n examples were too long and lost a part; with a warning above 10%."""
    note = f'truncated {cut:,} of {n:,}'
    if cut > n / 10:
        note += f' (warning: {cut / n:.0%}; a larger length, up to block_size, keeps more of them)'
    return note


def pad(rows, fill, width=0):
    """B lists or arrays of ids -> int64 (B, T), filled up at the right to the longest, or
    `width`."""
    import torch
    ids = torch.full((len(rows), max(width, *map(len, rows))), fill)
    for b, row in enumerate(rows):
        ids[b, :len(row)] = torch.as_tensor(row)
    return ids


def linear_rate(step, steps, peak, warmup):
    """The learning rate of a step: up over the first share `warmup` of them, then down to 0."""
    rise = round(warmup * steps)
    return peak * ((step + 1) / rise if step < rise else (steps - step) / (steps - rise))


def update(optimizer, params, loss, rate, grad_clip, where, advice):
    """One step of the optimizer, on gradients that are first summed over all processes -> the norm.

    grad_clip: the largest norm, 0 is off. Raises ValueError, with where and advice, before it would
    use a loss or a gradient that is not finite.
    """
    import torch
    import torch.distributed as dist
    params = [*params]
    # Not DDP: it waits for a process that got no example of a short last batch.
    for p in params if int(os.environ.get('WORLD_SIZE', 1)) > 1 else ():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
    for group in optimizer.param_groups:
        group['lr'] = rate
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
    if not math.isfinite(loss + norm):
        raise ValueError(f'{where}: loss {loss}, gradient norm {norm}. Take a lower '
                         f'--learning_rate or --dtype=float32; {advice}')
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
