"""Damage the files a program reads, at random: it must refuse them in one sentence, or be unharmed.

  python tests/fuzz.py                     1,000 cases of train.py: six minutes on 2 CPU cores
  python tests/fuzz.py --of=prepare        1,000 cases of prepare.py: ten seconds

Data, meta.json, checkpoints (to resume, to begin from) and GPT-2 weights in Hugging Face's format
are flipped by a bit, cut, blanked, scrambled, emptied, deleted, written in another type, or
replaced by a file of the same kind. A run that goes through has to print the losses of an undamaged
one; or, where a format has no checksum (safetensors), a SHA-256 of the weights that differs from
the good one, so that the damage can be seen. Of prepare.py, texts are damaged, packed or not: it
must write the tokens of just what Python's own readers find in the file.
"""
import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import inputs
import prepare
from tests import kill

# ---
of = 'train'  # 'train' or 'prepare'
cases = 1000  # how many
seed = 1      # of what is damaged, and how
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())


def train(args, output):
    """Run train.py -> its exit status, (SHA-256s, losses) as printed, and all that it printed."""
    training = kill.Training(args, 1, output)
    status, text = training.wait(), training.text()
    return status, (re.findall(r'SHA-256 (\w+)', text), re.findall(r'loss ([\d.]+)', text)), text


def damage(path, other, rng):
    """Change the file `path` in one of many ways -> what was done. other: another of its kind."""
    with open(path, 'rb') as f:
        data = bytearray(f.read())
    at = rng.randrange(len(data))
    how = rng.choice(['bit', 'bit', 'bit', 'bits', 'cut', 'zeros', 'noise', 'more', 'empty', 'gone',
                      'type', 'swap'])
    if how == 'gone':
        os.unlink(path)
        return how
    if how == 'swap':
        shutil.copyfile(other, path)
        return how
    if how == 'type':
        return how + retype(path, rng)
    if how in ('bit', 'bits'):
        for _ in range(1 if how == 'bit' else 20):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == 'cut':
        del data[at:]
    elif how == 'zeros':
        data[at:at + 64] = bytes(len(data[at:at + 64]))
    elif how == 'noise':
        data[at:at + 64] = rng.randbytes(len(data[at:at + 64]))
    elif how == 'more':
        data += rng.randbytes(rng.randrange(1, 100))
    elif how == 'empty':
        data.clear()
    with open(path, 'wb') as f:
        f.write(data)
    return how


def retype(path, rng):
    """The same content in another type: ids of 4 bytes, weights as integers, numbers as text."""
    if path.endswith('.bin'):
        with open(path, 'rb') as f:
            data = f.read()
        with open(path, 'wb') as f:
            f.write(b''.join(data[i:i + 2] + b'\0\0' for i in range(0, len(data), 2)))
        return ' uint32'
    if path.endswith('.csv'):
        with open(path) as f:
            text = f.read()
        with open(path, 'w', encoding='utf-16') as f:
            f.write(text)
        return ' utf-16'
    if path.endswith('.json'):
        with open(path) as f:
            content = json.load(f)
        key = rng.choice(list(content))
        content[key] = rng.choice([str(content[key]), None, [content[key]], -1, 2.5])
        with open(path, 'w') as f:
            json.dump(content, f)
        return f' {key}'
    if '.txt' in path or '.jsonl' in path or path.endswith('.parquet'):
        with open(path, 'rb') as f:
            data = f.read()
        if rng.random() < 0.5:
            data = b''.join(data[i:i + 1] + b'\0' for i in range(len(data)))
            how = ' two bytes for one'
        else:
            data, how = gzip.compress(data), ' packed'
        with open(path, 'wb') as f:
            f.write(data)
        return how
    if path.endswith('.safetensors'):
        weights = safetensors.torch.load_file(path)
        name = rng.choice(list(weights))
        one = weights[name]
        weights[name] = rng.choice([one.long(), one.cfloat(), one[:1].clone()])
        safetensors.torch.save_file(weights, path)
        return f' {name}'
    content = torch.load(path, weights_only=True)
    key = rng.choice(['model', 'optimizer', 'step', 'model_config', 'meta', 'settings', 'rng',
                      'one weight', 'moment'])
    if key == 'one weight':
        name = rng.choice(list(content['model']))
        content['model'][name] = content['model'][name].long()
    elif key == 'moment':
        content['optimizer']['state'][0]['exp_avg'] = torch.zeros(3)
    else:
        content[key] = rng.choice([None, 'text', [1, 2], {}])
    torch.save(content, path)
    return f' {key}'


def files_of_training(folder):
    """Two of each kind of file -> [(name, path, other path, arguments)]."""
    data, other_data, run, other_run, hf, other_hf = (os.path.join(folder, name) for name in (
        'data', 'other_data', 'run', 'other_run', 'hf', 'other_hf'))
    kill.write_data(data, 30_000)
    kill.write_data(other_data, 32_000)
    for where, width in ((hf, 32), (other_hf, 48)):
        config = transformers.GPT2Config(n_embd=width, n_layer=4, n_head=4, n_positions=64,
                                         vocab_size=257, bos_token_id=0, eos_token_id=0)
        transformers.GPT2LMHeadModel(config).save_pretrained(where)
    base = ['--batch_size=4', '--eval_tokens=400', '--eval_every=2', '--max_steps=4',
            '--device=cpu', '--block_size=32']
    shape = ['--chunks=1-2-1', '--K=2', '--H=2', '--router_dim=8']
    for where, width in ((run, 32), (other_run, 48)):  # stopped after 4 of 6 steps, as it were
        args = [*base, *shape, f'--n_embd={width}', '--n_head=4', f'--data_dir={data}',
                f'--out_dir={where}']
        status, _, text = train(args, where + '.output')
        if status:
            raise RuntimeError(text)
    of_hf = [*base, *shape, f'--data_dir={data}', f'--init_from={hf}']
    resume = ['--init_from=resume', '--max_steps=6']
    of_run = [*base, f'--data_dir={data}', f'--init_from={run}']
    kinds = [('train.bin', f'{data}/train.bin', f'{other_data}/train.bin', of_hf),
             ('val.bin', f'{data}/val.bin', f'{data}/train.bin', of_hf),
             ('meta.json', f'{data}/meta.json', f'{other_data}/meta.json', of_hf),
             ('checkpoint, resumed', f'{run}/last.pt', f'{other_run}/last.pt', resume),
             ('checkpoint, resumed', f'{run}/last.pt', f'{hf}/model.safetensors', resume),
             ('checkpoint, begun from', f'{run}/best.pt', f'{run}/last.pt', of_run),
             ('weights', f'{hf}/model.safetensors', f'{other_hf}/model.safetensors', of_hf),
             ('config.json', f'{hf}/config.json', f'{other_hf}/config.json', of_hf),
             ('log.csv', f'{run}/log.csv', f'{data}/meta.json', resume)]
    return kinds


def fuzz(cases, seed):
    """Run that many cases -> (Counter of how they ended, descriptions of those that went wrong)."""
    rng, ends, wrong = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        kinds, good = files_of_training(folder), {}
        files = os.path.join(folder, 'copy')
        for case in range(-len(kinds), cases):  # the first ones undamaged
            name, path, other, args = kinds[case % len(kinds)]
            shutil.rmtree(files, ignore_errors=True)
            where = os.path.dirname(path)
            shutil.copytree(where, files)
            resumed = '--init_from=resume' in args
            args = [arg.replace(where, files) for arg in args]
            args.append(f'--out_dir={files if resumed else os.path.join(folder, "out")}')
            args.append('--overwrite=True')
            victim = os.path.join(files, os.path.basename(path))
            how = '' if case < 0 else damage(victim, other, rng)
            status, facts, text = train(args, os.path.join(folder, 'output'))
            if case < 0:
                if status or not all(facts):
                    raise RuntimeError(f'{name} is undamaged, but: {text}')
                good[case % len(kinds)] = facts
            elif status and text.count('\n') == 1 and text.startswith('train.py: error: '):
                ends[f'{name}: refused'] += 1
            elif not status and facts == good[case % len(kinds)]:
                ends[f'{name}: unharmed'] += 1
            elif not status and facts[0] and facts[0] != good[case % len(kinds)][0]:
                ends[f'{name}: other weights, and their SHA-256 says so'] += 1
            else:
                wrong.append(f'case {case}: {name}, {how}: status {status}\n{text[-1500:]}')
    return ends, wrong


# ----------------------------------------------------------------------------- prepare.py

WORDS = ['Wörter ', '日本 ', 'a', "it's ", '\n', '\r\n', ' ' * 30, '😀', '\x00', '\ufeff',
         '<|endoftext|>', '{"text": "', '"}\n']
TEXTS = 'a.txt', 'a.txt.gz', 'a.txt.zst', 'a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.parquet'


def write_texts(path, texts, rng):
    """Some texts in a file of that ending, a .txt in one of several encodings."""
    if path.endswith('.parquet'):
        return pq.write_table(pa.table({'text': texts}), path)
    encoding = rng.choice(['utf-8', 'utf-8', 'utf-8-sig', 'utf-16', 'utf-16le', 'utf-16be',
                           'latin1'])
    data = ''.join(texts).encode(encoding, errors='ignore')
    if '.jsonl' in path:
        ascii_only = rng.random() < 0.5
        lines = [json.dumps({'text': text}, ensure_ascii=ascii_only) + '\n' for text in texts]
        data = ''.join(lines).encode()
    if path.endswith('.gz'):
        data = gzip.compress(data)
    if path.endswith('.zst'):
        data = pa.compress(data, codec='zstd', asbytes=True)
    with open(path, 'wb') as f:
        f.write(data)


def texts_in(path):
    """The texts of a file as Python's own readers find them."""
    if path.endswith('.parquet'):
        return pq.read_table(path).column('text').to_pylist()
    with open(path, 'rb') as f:
        data = f.read()
    if path.endswith('.gz'):
        data = gzip.decompress(data)
    if path.endswith('.zst'):
        with pa.input_stream(io.BytesIO(data), compression='zstd') as f:
            data = f.read()
    if '.txt' in path:
        return [data.decode('utf-8-sig')]
    lines = [line.decode('utf-8-sig') for line in data.split(b'\n') if line.strip()]
    return [json.loads(line)['text'] for line in lines]


def fuzz_prepare(cases, seed):
    """As fuzz, of prepare.py."""
    rng, ends, wrong, tokenizer = random.Random(seed), Counter(), [], inputs.tokenizer('bytes')
    prepare.tokenizer, prepare.workers = 'bytes', 1
    with tempfile.TemporaryDirectory() as folder:
        for case in range(cases):
            name, out = rng.choice(TEXTS), os.path.join(folder, 'out')
            path, other = os.path.join(folder, name), os.path.join(folder, 'other')
            for where in (path, other + name):
                texts = [''.join(rng.choices(WORDS, k=rng.randrange(1, 60))) for _ in range(3)]
                write_texts(where, texts, rng)
            how = rng.choice(['', damage])
            how = how and how(path, other + name, rng)
            prepare.dataset, prepare.out_dir = path, out
            shutil.rmtree(out, ignore_errors=True)
            common._locks.clear()
            try:
                stderr, stdout = io.StringIO(), io.StringIO()
                with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
                    prepare.main()
            except ValueError as error:
                left = set(os.listdir(out) if os.path.isdir(out) else ()) - {'.lock'}
                if '\n' in str(error) or type(error) is not ValueError or left:
                    wrong.append(f'case {case}: {name}, {how}: {error!r}, {left}')
                ends[f'{name}: refused'] += 1
                continue
            except Exception as error:
                wrong.append(f'case {case}: {name}, {how}: {error!r}')
                continue
            bins = [os.path.join(out, f'{split}.bin') for split in ('train', 'val')]
            ids = np.concatenate([np.fromfile(file, '<u2') for file in bins])
            want = [tokenizer.encode_ordinary(text) + [tokenizer.eot_token]
                    for text in texts_in(path) if text]
            if Counter(ids.tolist()) != Counter(sum(want, [])):
                wrong.append(f'case {case}: {name}, {how}: other tokens')
            ends[f'{name}: unharmed'] += 1
    return ends, wrong


if __name__ == '__main__':
    if of not in ('train', 'prepare'):
        raise ValueError(f"of={of!r} must be 'train' or 'prepare'")
    ends, wrong = (fuzz if of == 'train' else fuzz_prepare)(cases, seed)
    table = [f'{n:5} {end}' for end, n in sorted(ends.items())]
    print('\n'.join([*table, *wrong, f'{len(wrong)} of {cases} wrong']))
    sys.exit(bool(wrong))
