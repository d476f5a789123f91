"""How well a model does: the perplexity of a text, and the tasks of EleutherAI's lm-eval.

  python evaluate.py --source=out/mom_demo --text=story.txt
  python evaluate.py --source=gpt2 --tasks=lambada_openai,hellaswag --limit=100

Perplexity: a window of block_size tokens slides over the text by `stride`. Of each window those
tokens count that no window before it has predicted. <|endoftext|> stands before the text, so that
the first token is predicted as well. Perplexity per token depends on the tokenizer. Per word (words
are what whitespace parts, as in GPT-2's figures for WikiText) and in bits per byte it does not.
WikiText, cleaned up as for published figures, is a task of lm-eval: --tasks=wikitext.

The tasks need `pip install lm-eval`. All results are written as JSON, of tasks as lm-eval has them.
"""
import difflib
import itertools
import json
import math
import os
import sys
import time

import torch
from torch.nn import functional as F
from tqdm import tqdm

import common
import inputs
import sample

# --- what
source = 'out/mom_demo'   # a run's directory or checkpoint, GPT-2's name, a Hugging Face directory
text = ''                 # a text file, for its perplexity
stride = 0                # tokens by which the window moves; 0 is half of block_size
tasks = ''                # names of lm-eval's tasks, such as lambada_openai,hellaswag
tasks_dir = ''            # a folder with task files of your own
limit = 0                 # documents of each task; 0 is all
# --- how
batch_size = 8            # sequences at a time
dtype = 'float32'         # of the weights: 'float32' or 'bfloat16'
device = 'auto'           # 'auto', 'cpu', 'cuda', 'mps' or 'xpu'
out_dir = 'out/evaluate'  # where the results go, in a folder named after the source
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not imported


def windows(ids, block, stride):
    """Cut a text for a window that moves by `stride` -> [(piece, n)]: its last n tokens count.

    ids: one token that stands before the text, and the text, as a tensor. Each token of the text
    counts once. A piece has block + 1 tokens, or all of a short text, as each of `block` tokens
    predicts the next.
    """
    ends = [*range(min(block, len(ids) - 1), len(ids) - 1, stride), len(ids) - 1]
    return [(ids[max(0, end - block):end + 1], end - before)
            for before, end in itertools.pairwise([0, *ends]) if end > before]


@torch.no_grad()
def score(model, pieces, vocab, batch_size):
    """How likely the ends of pieces are after their beginnings -> [(log-probability, greedy)].

    pieces: [(ids, n)], of at most block_size + 1 ids the last n < len(ids) are predicted; vocab:
    how many ids the tokenizer has. The log-probability is in nats, the sum of n; greedy: each of
    the n is the likeliest. A batch is padded on the right, where causal attention never looks.
    """
    where, head = model.wte.weight.device, model.wte.weight[:vocab]
    scores = [None] * len(pieces)
    longest_first = sorted(range(len(pieces)), key=lambda i: -len(pieces[i][0]))
    for first in tqdm(range(0, len(pieces), batch_size), 'texts', unit='batch', disable=None):
        batch = longest_first[first:first + batch_size]
        inputs = [torch.as_tensor(pieces[i][0][:-1]) for i in batch]
        idx = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)  # (B, T)
        x, _ = model.features(idx.to(where))                             # (B, T, C)
        for row, i in enumerate(batch):
            ids, n = pieces[i]
            end, targets = len(ids) - 1, torch.as_tensor(ids[len(ids) - n:], device=where)
            logits = F.linear(x[row, end - n:end], head).float()         # (n, V)
            nats = -F.cross_entropy(logits, targets, reduction='sum')
            scores[i] = nats.item(), bool((logits.argmax(-1) == targets).all())
    return scores


def exp(nats):
    """A perplexity; None where it is too large for a float, as JSON has no infinity."""
    return math.exp(nats) if nats < 700 else None


def perplexity(model, tokenizer, words, stride, batch_size):
    """The figures of a text, `words`, as a dict; `nats` is their sum over its tokens."""
    ids = torch.tensor([tokenizer.eot_token, *tokenizer.encode_ordinary(words)])
    pieces = windows(ids, model.cfg.block_size, stride)
    nats = -math.fsum(log_p for log_p, _ in score(model, pieces, tokenizer.n_vocab, batch_size))
    counts = {'tokens': len(ids) - 1, 'words': len(words.split()), 'bytes': len(words.encode())}
    per_token, per_word = nats / counts['tokens'], nats / max(1, counts['words'])
    return {**counts, 'nats': nats, 'token_perplexity': exp(per_token),
            'word_perplexity': exp(per_word),
            'bits_per_byte': nats / counts['bytes'] / math.log(2)}


# ----------------------------------------------------------------------------- lm-eval

def harness(model, tokenizer, batch_size, info):
    """A model as lm-eval wants it. info: what its results are to say of the model, a dict."""
    from lm_eval.api.model import TemplateLM
    block, vocab = model.cfg.block_size, tokenizer.n_vocab

    class Harness(TemplateLM):
        eot_token_id = tokenizer.eot_token

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return tokenizer.encode_ordinary(string)

        def get_model_info(self):
            return info

        def _loglikelihood_tokens(self, requests, **kwargs):
            if (longest := max(len(continuation) for *_, continuation in requests)) > block:
                raise ValueError(f'a task asks for the likelihood of {longest} tokens at once, and '
                                 f'block_size={block}: leave that task out')
            cut = sum(len(before) + len(after) > block + 1 for _, before, after in requests)
            if cut:
                print(f'{cut} of {len(requests)} texts are longer than block_size={block}: their '
                      'beginnings are left out')
            # lm-eval gives the blanks that end a context to what follows, and may leave nothing.
            pieces = [(((before or [self.eot_token_id]) + after)[-block - 1:], len(after))
                      for _, before, after in requests]
            return score(model, pieces, vocab, batch_size)

        def loglikelihood_rolling(self, requests, **kwargs):
            texts = [[self.eot_token_id, *self.tok_encode(r.args[0])] for r in requests]
            cuts = [windows(torch.tensor(ids), block, block) for ids in texts]
            scores = iter(score(model, [*itertools.chain(*cuts)], vocab, batch_size))
            return [math.fsum(log_p for log_p, _ in itertools.islice(scores, len(cut)))
                    for cut in cuts]

        def generate_until(self, requests, **kwargs):
            texts = [None] * len(requests)
            alike = {}  # requests of one task mostly want the same settings
            for i, request in enumerate(requests):
                alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            for members in alike.values():
                wanted = requests[members[0]].args[1]
                for first in range(0, len(members), batch_size):
                    batch = members[first:first + batch_size]
                    prompts = [requests[i].args[0] for i in batch]
                    written = continue_texts(model, tokenizer, prompts, wanted)
                    for i, new in zip(batch, written):
                        texts[i] = new
            return texts

    return Harness()


def continue_texts(model, tokenizer, prompts, wanted):
    """What the model writes after each prompt, up to a text of wanted['until'] -> a list of str.

    wanted: lm-eval's settings of a generation; without do_sample it is greedy. Prompts lose their
    beginning where they and the new tokens do not fit block_size.
    """
    block, new = model.cfg.block_size, wanted.get('max_gen_toks', 256)
    if new >= block:
        raise ValueError(f'a task wants {new} new tokens, and block_size={block} leaves no room '
                         'for a prompt: set max_gen_toks in a task file of your own (--tasks_dir)')
    until, eot = wanted.get('until') or [], tokenizer.eot_token
    until = [end for end in ([until] if isinstance(until, str) else until) if end]
    sampled = wanted.get('do_sample', False)
    how = dict(temperature=wanted.get('temperature', 1.0) if sampled else 0.0,
               top_k=wanted.get('top_k') or None, top_p=wanted.get('top_p'))
    ids = [tokenizer.encode_ordinary(prompt)[new - block:] or [eot] for prompt in prompts]
    texts, written, left = [''] * len(ids), [[] for _ in ids], range(len(ids))
    done, size = 0, 16
    while left:  # first a few tokens: what ends soon need not be continued to the last
        size = min(size, new - done)
        lengths = [len(ids[i]) + done for i in left]
        rows = [torch.tensor(ids[i] + written[i]) for i in left]
        idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        out = sample.generate(model, idx.to(model.wte.weight.device), size, stop=eot,
                              lengths=lengths, vocab=tokenizer.n_vocab, **how)
        done += size
        unfinished = []
        for i, row, length in zip(left, out.tolist(), lengths):
            written[i] += row[length:length + size]
            tokens = [*written[i], eot]
            text = tokenizer.decode(tokens[:tokens.index(eot)])
            texts[i] = min((text.split(end)[0] for end in until), key=len, default=text)
            if texts[i] == text and eot not in written[i] and done < new:
                unfinished.append(i)
        left, size = unfinished, 4 * size
    return texts


def find_tasks(names):
    """'name,name', * standing for anything -> lm-eval's task manager, and the names as a list.

    Raises ValueError if lm-eval is not there, or a name is not known.
    """
    # Packages go first: lm-eval needs the one that has this file's name.
    sys.path.sort(key=lambda folder: os.path.abspath(folder) == common.ROOT)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks needs EleutherAI's lm-eval ({error}): pip install lm-eval"
                         ) from error
    manager = TaskManager(include_path=tasks_dir or None)
    names = [name.strip() for name in names.split(',') if name.strip()]
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise ValueError(f'lm-eval has no task {name!r}; ' +
                             (f'near it are {", ".join(near)}' if near else 'see lm-eval ls tasks'))
    return manager, manager.match_tasks(names)


def run_tasks(model, tokenizer, manager, names, info):
    """lm-eval's results of the tasks, a dict. Raises ValueError if their data cannot be had."""
    import lm_eval
    from datasets.exceptions import DatasetNotFoundError
    lm = harness(model, tokenizer, batch_size, info)
    try:
        return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, limit=limit or None,
                                       batch_size=batch_size, device=device, log_samples=False)
    except (ConnectionError, FileNotFoundError, DatasetNotFoundError) as error:
        raise ValueError(f'the data of {", ".join(names)} could not be loaded ({error}): give '
                         'tasks of local files, with --tasks_dir=FOLDER') from error


def main():
    if not text and not tasks:
        raise ValueError('say what to evaluate: --text=FILE, or --tasks=NAME,NAME')
    if batch_size < 1 or limit < 0:
        raise ValueError(f'batch_size={batch_size} must be at least 1 and limit={limit} at least 0')
    if dtype not in ('float32', 'bfloat16'):
        raise ValueError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
    where = common.find_device(device)
    words = common.read_text(text) if text else ''
    if text and not words:
        raise ValueError(f'{text} is empty: give a text')
    manager, names = find_tasks(tasks) if tasks else (None, [])
    folder = common.results_folder(os.path.join(out_dir, common.run_name(source)))

    model, tokenizer = inputs.model_and_tokenizer(source)
    model = model.to(where).cast(getattr(torch, dtype)).eval()
    block = model.cfg.block_size
    if not 0 <= stride <= block:
        raise ValueError(f'stride={stride} must be 1 to block_size={block}, or 0 for half of it')
    info = {'model': 'mixture-of-modules', 'model_args': f'source={source},dtype={dtype}',
            'model_num_parameters': model.num_params()[0], 'model_sha': model.fingerprint()}
    if text:
        step = stride or max(1, block // 2)
        if common.EOT in words:
            print(f'{common.EOT} in {text} is read as text, not as the end of a document')
        found = perplexity(model, tokenizer, words, step, batch_size)
        counts = ', '.join(f'{found[kind]:,} {kind}' for kind in ('tokens', 'words', 'bytes'))
        print(f'{text}: {counts}, a window of {block} tokens that moves by {step}')
        print(f'perplexity {found["token_perplexity"] or math.inf:.4f} per token, '
              f'{found["word_perplexity"] or math.inf:.4f} per word; '
              f'{found["bits_per_byte"]:.4f} bits per byte')
        save({'text': text, 'stride': step, 'block_size': block, **found, 'config': info},
             folder, 'perplexity')
    if tasks:
        from lm_eval.utils import handle_non_serializable, make_table
        found = run_tasks(model, tokenizer, manager, names, info)
        print(make_table(found))
        save(found, folder, 'results', handle_non_serializable)


def save(found, folder, kind, default=None):
    """Results as JSON, under a name with the time in it, as lm-eval does; default: json.dumps's."""
    path = os.path.join(folder, f'{kind}_{time.strftime("%Y-%m-%dT%H-%M-%S")}.json')
    common.write_text(path, json.dumps(found, indent=2, default=default, ensure_ascii=False))
    print(f'written to {path}')


if __name__ == '__main__':
    main()
