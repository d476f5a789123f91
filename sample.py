"""Text from a checkpoint of train.py, or from a GPT-2; and decoding for whoever imports it.

  python sample.py --source=out/mom_demo --prompt="The state of the Union is"
  python sample.py --source=gpt2-medium --max_new_tokens=100

Keys and values are cached, one of each per token and executed step, however many modules made them.
GPT.generate is the door to `generate` below. Shapes: B rows, T tokens, C width, V vocabulary, nh heads,
hs head size.
"""
import math
import os

import torch

import common
from model import GPT, few_rows

# --- what
source = 'out/mom_demo'       # a run's directory or checkpoint, a GPT-2 name, or a Hugging Face directory
prompt = ''                   # text to continue; '' starts a new document; file:PATH reads it from a file
samples = 1                   # how many
max_new_tokens = 400          # tokens of each
# --- how
temperature = 0.8             # 0 is greedy
top_k = 200                   # sample among the k likeliest tokens; 0 is all
top_p = 1.0                   # and among the likeliest that hold this share of the probability
beams = 1                     # more: the likeliest text that a beam search finds, temperature or not
stop = True                   # at <|endoftext|>
seed = 1337                   # of the draws
dtype = 'float32'             # of the weights: 'float32', or 'bfloat16', which reads half as much per token
device = 'auto'               # 'auto', 'cpu', 'cuda'
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not when imported


class Cache:
    """One K and one V per token and executed step, and the weights in the layout for decoding."""

    def __init__(self, cfg, B, device, dtype, size=None):
        """size: most tokens of a row (block_size if None)."""
        self.most = size or cfg.block_size
        shape = B, cfg.n_head, self.most, cfg.n_embd // cfg.n_head
        # zeros: what a mask hides is multiplied by 0 all the same, and 0 * nan is nan
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.depth)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.depth)]
        self.length = 0  # tokens of the longest row
        # Where rows differ: the tokens of each, and the entries of each at each step. Under MoD a step
        # has fewer entries than tokens.
        self.tokens = torch.zeros(B, dtype=torch.int64, device=device)
        self.used = torch.zeros(cfg.depth, B, dtype=torch.int64, device=device)
        self.ready = {}

    def positions(self, T, count=None):
        """Where the next T tokens stand in their texts: (T,), or (B, T) if rows differ.

        To be called once per forward pass, before any step extends the cache. count (B,): the first
        `count` of the T tokens of a row are real; None: all are, and have been.
        """
        new = torch.arange(T, device=self.tokens.device)
        before, self.length = self.length, self.length + T
        if count is None:
            return before + new
        at = self.tokens.unsqueeze(1) + new
        self.tokens = self.tokens + count
        return at.clamp(max=self.most - 1)  # past the last real token, where it does not matter

    def extend(self, step, k, v, count=None):
        """Append k, v (B, nh, T, hs); with count (B,) only the first `count` of each row are real.

        Returns all keys and values (B, nh, length, hs), a mask of who sees whom (B, 1, T, length) or
        None, and whether it is the plain causal one instead.
        """
        T = k.size(2)
        if count is None:
            first = self.length - T
            self.k[step][:, :, first:self.length] = k
            self.v[step][:, :, first:self.length] = v
            mask = None
            if first > 0 and T > 1:  # several tokens after others: SDPA's own causal mask is for the first
                mask = torch.ones(T, self.length, dtype=torch.bool, device=k.device).tril(first)
            causal = first == 0
        else:
            new = torch.arange(T, device=k.device).view(1, 1, T, 1)
            slots = self.used[step].view(-1, 1, 1, 1) + new         # (B, 1, T, 1): where they go
            self.k[step].scatter_(2, slots.expand_as(k), k)
            self.v[step].scatter_(2, slots.expand_as(v), v)
            self.used[step] += count  # what follows is padding, which the next tokens overwrite
            mask = torch.arange(self.length, device=k.device) <= slots
            causal = False
        return self.k[step][:, :, :self.length], self.v[step][:, :, :self.length], mask, causal

    def reorder(self, rows):
        """Row b becomes what row rows[b] was."""
        self.k = [k.index_select(0, rows) for k in self.k]
        self.v = [v.index_select(0, rows) for v in self.v]
        self.tokens, self.used = self.tokens[rows], self.used[:, rows]

    def pools(self, chunk, x, first_step):
        """Chunk.pools, once for all tokens, in the layout from which a CPU reads a matrix fastest to
        multiply it with one row: (in, out) in fp32, (out, in) in bf16."""
        if first_step not in self.ready:
            pools = chunk.pools(x, keep=True)
            if x.device.type == 'cpu' and chunk.attn.qkv_w.dtype == torch.bfloat16:
                pools = type(pools)(*(modules and turned(modules) for modules in pools))
            self.ready[first_step] = pools
        return self.ready[first_step]


def turned(modules):  # Modules with their matrices stored (out, in)
    def turn(p):
        return p.t().contiguous().t() if p.ndim == 2 else p
    return modules._replace(each=[type(m)(*map(turn, m)) for m in modules.each])


class Decoder:
    """Rows of text in the middle of being written: the model's logits (B, V) of what comes next."""

    def __init__(self, model, idx, lengths, size, vocab, fill):
        """idx (B, T): prompts, of `lengths` (B,) if they differ; size: most tokens of a row; vocab: how
        many ids there are; fill: what stands behind a row's end."""
        B, T = idx.shape
        block, device = model.cfg.block_size, idx.device
        self.model = model
        self.ends = torch.full((B,), T, device=device) if lengths is None else lengths
        self.apart = lengths is not None  # rows have positions of their own
        self.text = torch.full((B, size), fill, device=device)
        written = torch.arange(T, device=device) < self.ends.unsqueeze(1)
        self.text[:, :T] = torch.where(written, idx, self.text[:, :T])
        self.head = model.wte.weight[:vocab].t()  # (C, V)
        if device.type == 'cpu' and self.head.dtype == torch.float32:
            self.head = self.head.contiguous()  # as Cache.pools
        self.cache = Cache(model.cfg, B, device, model.wte.weight.dtype, min(size, block))
        if T > block:
            self.slide(T)
        else:
            x, _ = model.features(idx, self.cache, lengths)
            self.score(x[torch.arange(B, device=device), self.ends - 1])

    def score(self, x):  # the last token's features (B, C)
        logits = few_rows(x, self.head)
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    def write(self, new):  # one token to the end of each row, new (B,)
        self.text[torch.arange(len(new), device=new.device), self.ends] = new
        self.ends = self.ends + 1

    def read(self):
        """Let the model see the last token of each row."""
        if not self.apart and self.cache.length == self.model.cfg.block_size:
            return self.slide(int(self.ends[0]))
        last = self.text.gather(1, self.ends.unsqueeze(1) - 1)  # (B, 1)
        count = torch.ones_like(self.ends) if self.apart else None
        self.score(self.model.features(last, self.cache, count)[0][:, -1])

    def slide(self, end):
        """Positions are learned, so a text beyond block_size is read afresh for each further token."""
        self.cache.length = self.model.cfg.block_size  # full, and of no more use
        last = self.text[:, end - self.model.cfg.block_size:end]
        self.score(self.model.features(last)[0][:, -1])

    def select(self, rows):
        """Row b becomes what row rows[b] was."""
        self.text, self.ends, self.logits = self.text[rows], self.ends[rows], self.logits[rows]
        self.cache.reorder(rows)


def pick(logits, temperature, top_k, top_p):
    """logits (B, V) -> one token of each row (B,)."""
    if temperature < 1e-6:  # where a draw takes the likeliest too
        return logits.argmax(-1)
    ids = None  # of the columns; None: they are the tokens
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))  # the likeliest first
    p = (logits / temperature).softmax(-1)
    if top_p is not None:
        if ids is None:
            p, ids = p.sort(descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # what stands before it already holds the share
    drawn = p.multinomial(1)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, beams=1, stop=None,
             lengths=None, vocab=None):
    """Continue each row of idx (B, T) by max_new_tokens tokens -> (B, T + max_new_tokens), or fewer if
    all rows stopped before.

    temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the likeliest that hold this share
    of the probability. beams > 1 searches for the sequence of highest mean log-probability instead. A row
    that has produced the token `stop` is finished. lengths (B,): prompts of different lengths, padded on
    the right; the new tokens of a row follow its prompt at once, and the rest of a row is filled with
    `stop` (0 without one). vocab: how many ids the tokenizer has, if the model's vocabulary is padded
    beyond them. A text longer than block_size slides: each further token sees the last block_size tokens
    afresh. That is for equally long rows without beams. Raises ValueError for what cannot be done.
    """
    lengths = check(model.cfg, idx, max_new_tokens, temperature, top_k, top_p, beams, lengths, vocab)
    training = model.training
    model.eval()  # MoD must not look at the future
    try:
        size, fill = idx.size(1) + max_new_tokens, 0 if stop is None else stop
        decoder = Decoder(model, idx, lengths, size, vocab, fill)
        if beams > 1:
            return beam_search(decoder, max_new_tokens, beams, stop)
        ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for n in range(max_new_tokens):
            if n > 0:
                decoder.read()
            new = pick(decoder.logits, temperature, top_k, top_p)
            if stop is not None:
                new = new.masked_fill(ended, stop)
                ended |= new == stop
            decoder.write(new)
            if stop is not None and ended.all():
                break
        return decoder.text[:, :int(decoder.ends.max())]
    finally:
        model.train(training)


def check(cfg, idx, max_new_tokens, temperature, top_k, top_p, beams, lengths, vocab):
    """The arguments of generate -> lengths as a tensor or None. Raises ValueError."""
    B, T = idx.shape
    if (B < 1 or T < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf or beams < 1
            or top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1
            or vocab is not None and not 1 <= vocab <= cfg.vocab_size):
        raise ValueError(f'temperature={temperature} must be a number >= 0, top_k={top_k} >= 1 or None, '
                         f'top_p={top_p} above 0 and at most 1 or None, beams={beams} and '
                         f'max_new_tokens={max_new_tokens} >= 1, vocab={vocab} from 1 to {cfg.vocab_size} '
                         'or None, and idx not empty')
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=idx.device)
        if lengths.shape != (B,) or not (1 <= lengths.min() and lengths.max() <= T):
            raise ValueError(f'lengths={lengths.tolist()} must give each of the {B} rows a length of 1 to {T}')
    if T + max_new_tokens > cfg.block_size and (lengths is not None or beams > 1):
        raise ValueError(f'{T} + {max_new_tokens} tokens do not fit block_size={cfg.block_size}: shorten '
                         'the prompts, or take fewer new tokens')
    return lengths


def beam_search(decoder, max_new_tokens, beams, stop):
    """Of each row the best finished text by mean log-probability, a text being new tokens only.

    A row has ended when `beams` texts are finished and none that still runs is better, as it stands, than
    the worst of them.
    """
    B, device = len(decoder.text), decoder.text.device
    row = torch.arange(B, device=device).unsqueeze(1)                # (B, 1)
    start = decoder.ends
    decoder.select(row.flatten().repeat_interleave(beams))
    running = torch.full((B, beams), -math.inf, device=device)       # sums of log-probabilities
    running[:, 0] = 0                                                # all begin equal: let one speak
    finished = torch.full((B, beams), -math.inf, device=device)      # means of log-probabilities
    kept = decoder.text.view(B, beams, -1).clone()                   # the texts that they are of
    ended = torch.zeros(B, 1, dtype=torch.bool, device=device)       # it stays so, whatever other rows do
    likeliest = torch.arange(2 * beams, device=device) < beams
    for n in range(1, max_new_tokens + 1):
        logp = decoder.logits.log_softmax(-1).view(B, beams, -1)
        V = logp.size(-1)
        top, flat = (running.unsqueeze(-1) + logp).flatten(1).topk(2 * beams)  # enough, if half end here
        beam, token = flat // V, flat % V                            # (B, 2 beams)
        texts = decoder.text.view(B, beams, -1)[row, beam]           # (B, 2 beams, size)
        here = (start + n - 1).view(B, 1, 1).expand(-1, 2 * beams, 1)
        texts.scatter_(2, here, token.unsqueeze(-1))
        over = torch.zeros_like(token, dtype=torch.bool) if stop is None else token == stop
        if n == max_new_tokens:
            over = over | likeliest                                  # out of room: finished as it is
        means = (top / n).masked_fill(~(over & likeliest) | ended, -math.inf)
        finished, chosen = torch.cat((finished, means), 1).topk(beams)
        kept = torch.cat((kept, texts), 1)[row, chosen]
        running, go = top.masked_fill(over, -math.inf).topk(beams)
        ended |= finished[:, -1:] >= running[:, :1] / n
        if n == max_new_tokens or ended.all():
            break
        decoder.select((row * beams + beam.gather(1, go)).flatten())
        decoder.write(token.gather(1, go).flatten())
        decoder.read()
    return kept[:, 0, :int(start.max()) + n]


def main():
    for key in ('samples', 'max_new_tokens'):
        if settings[key] < 1:
            raise ValueError(f'{key}={settings[key]} must be at least 1')
    if temperature < 0 or top_k < 0:
        raise ValueError(f'temperature={temperature} and top_k={top_k} must be at least 0')
    if dtype not in ('float32', 'bfloat16'):
        raise ValueError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
    if not 0 < top_p <= 1:
        raise ValueError(f'top_p={top_p} must be above 0 and at most 1')
    where = common.find_device(device)
    torch.manual_seed(seed)

    tokenizer = common.tokenizer_of(source)
    model = GPT.from_pretrained(source).to(where).cast(getattr(torch, dtype)).eval()
    common.check_vocabulary(source, tokenizer, model.cfg.vocab_size)
    text = read_prompt()
    ids = tokenizer.encode_ordinary(text) or [tokenizer.eot_token]  # it stands before a document
    idx = torch.tensor([ids], device=where)
    end = tokenizer.eot_token
    for n in range(samples):
        new = model.generate(idx, max_new_tokens, temperature, top_k or None,
                             top_p=top_p if top_p < 1 else None, beams=beams, stop=end if stop else None,
                             vocab=tokenizer.n_vocab)[0, len(ids):].tolist()
        if stop and end in new:
            new = new[:new.index(end)]
        print(text + tokenizer.decode(new))
        if n < samples - 1:
            print('-' * 40)


def read_prompt():
    """The setting `prompt`, or the text of the file that it names."""
    if not prompt.startswith('file:'):
        return prompt
    path = prompt[len('file:'):]
    if not os.path.isfile(path):
        raise ValueError(f'no prompt file {path}')
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 ({error}): convert it') from error


if __name__ == '__main__':
    main()
