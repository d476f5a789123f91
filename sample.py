"""Decoding: keys and values cached, greedy, sampling, beams. A script, and imported for generation.

  python sample.py --source=out/mom_demo --prompt="The state of the Union is"
  python sample.py --source=gpt2-medium --max_new_tokens=100

As a script: text from a checkpoint of train.py, or from a GPT-2.
"""
import math
import os

import torch

import common
from model import few_rows
from weights import from_pretrained

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
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not on import


class Cache:
    """What generation keeps: one K and one V per token and executed step, whatever its K modules; merged matrices."""

    def __init__(self, cfg, B, device, dtype, size=None):
        """size: most tokens of a sequence (block_size if None)."""
        shape = B, cfg.n_head, size or cfg.block_size, cfg.n_embd // cfg.n_head
        # zeros: what a mask hides is multiplied by 0 all the same, and 0 * nan is nan
        self.k, self.v = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.depth)] for _ in 'kv')
        self.used = torch.zeros(cfg.depth, B, dtype=torch.int64, device=device)  # entries, where sequences differ
        self.length = 0  # tokens of the longest sequence; GPT moves it on after all chunks have run
        self.ready = {}

    def pools(self, chunk, x, first_step):
        """Chunk.pools, once for all tokens, in the layout from which the CPU reads a matrix fastest to multiply it with
        one row: (in, out) in fp32, (out, in) in bf16."""
        if first_step not in self.ready:
            pools = chunk.pools(x, keep=True)
            if x.device.type == 'cpu' and chunk.attn.qkv_w.dtype == torch.bfloat16:
                pools = [one and ([type(m)(*(p.t().contiguous().t() if p.ndim == 2 else p for p in m)) for m in one[0]],
                                  None) for one in pools]
            self.ready[first_step] = pools
        return self.ready[first_step]

    def extend(self, step, k, v, count=None):
        """Append k, v (B, nh, T, hs) of the new tokens; or, where sequences differ, of the first count (B,) of each.

        Returns all keys and values (B, nh, S, hs), a mask of who sees whom (B, 1, T, S) or None, and whether it is
        the plain causal one instead.
        """
        T, S = k.size(2), self.length + k.size(2)
        if count is None:
            self.k[step][:, :, self.length:S], self.v[step][:, :, self.length:S] = k, v
            mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=k.device).tril(S - T)
            return self.k[step][:, :, :S], self.v[step][:, :, :S], mask, T == S > 1
        slots = self.used[step].view(-1, 1, 1, 1) + torch.arange(T, device=k.device).view(1, 1, T, 1)
        for mine, new in ((self.k[step], k), (self.v[step], v)):
            mine.scatter_(2, slots.expand_as(new), new)
        self.used[step] += count  # entries after the count-th are padding, which the next tokens overwrite
        mask = torch.arange(S, device=k.device) <= slots
        return self.k[step][:, :, :S], self.v[step][:, :, :S], mask, False

    def reorder(self, rows):  # sequence b becomes what sequence rows[b] was
        self.k, self.v = ([t.index_select(0, rows) for t in side] for side in (self.k, self.v))
        self.used = self.used[:, rows]


def pick(logits, temperature, top_k, top_p):
    """logits (B, V) -> one token of each row (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    p = (logits / temperature).softmax(-1)
    if top_p is not None:
        ranked, ids = p.sort(descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # what stands before it already holds the share
        p = torch.zeros_like(p).scatter(1, ids, ranked)
    return p.multinomial(1).squeeze(1)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, beams=1, stop=None,
             lengths=None, vocab=None):
    """What GPT.generate does, and says."""
    B, T = idx.shape
    if (T < 1 or max_new_tokens < 1 or temperature < 0 or beams < 1 or top_k is not None and top_k < 1
            or top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f'temperature={temperature} must be >= 0, top_k={top_k} >= 1 or None, top_p={top_p} above '
                         f'0 and at most 1 or None, beams={beams} and max_new_tokens={max_new_tokens} >= 1, and '
                         'idx not empty')
    size = T + max_new_tokens
    if lengths is not None and not (len(lengths) == B and 1 <= lengths.min() and lengths.max() <= T):
        raise ValueError(f'lengths={lengths.tolist()} must give each of the {B} rows a length of 1 to {T}')
    if size > model.cfg.block_size and (lengths is not None or beams > 1):
        raise ValueError(f'{T} + {max_new_tokens} tokens do not fit block_size={model.cfg.block_size}: shorten the '
                         'prompts, or take fewer new tokens')
    training = model.training
    model.eval()  # MoD must not look at the future
    cache = Cache(model.cfg, B, idx.device, model.wte.weight.dtype, min(size, model.cfg.block_size))
    if beams > 1 or lengths is not None:
        ends = torch.full((B,), T, device=idx.device) if lengths is None else lengths.to(idx.device)
        count, cache.tokens = ends, torch.zeros_like(ends)
    else:
        ends, count = torch.full((B,), T, device=idx.device), None
    head = model.wte.weight[:vocab].t()  # (C, V)
    if idx.device.type == 'cpu' and head.dtype == torch.float32:
        head = head.contiguous()  # as Cache.pools: the layout to multiply one row with
    rows = torch.arange(B, device=idx.device)
    out = torch.full((B, size), 0 if stop is None else stop, device=idx.device)
    out[:, :T] = torch.where(torch.arange(T, device=idx.device) < ends.unsqueeze(1), idx, out[:, :T])
    x = model.features(idx[:, -model.cfg.block_size:], cache if T <= model.cfg.block_size else None, count)[0]
    x = x[rows, ends.clamp(max=x.size(1)) - 1]  # (B, C)
    if beams > 1:
        out = beam_search(model, x, head, cache, out, ends, max_new_tokens, beams, stop)
        model.train(training)
        return out
    done = torch.zeros(B, dtype=torch.bool, device=idx.device)
    for n in range(max_new_tokens):
        new = pick(few_rows(x, head).float(), temperature, top_k, top_p)
        if stop is not None:
            new = new.masked_fill(done, stop)
            done |= new == stop
        out[rows, ends] = new
        ends = ends + 1
        if n == max_new_tokens - 1 or stop is not None and done.all():
            break
        if T + n < model.cfg.block_size:
            x = model.features(new.unsqueeze(1), cache, None if count is None else torch.ones_like(ends))[0][:, -1]
        else:
            x = model.features(out[:, T + n + 1 - model.cfg.block_size:T + n + 1])[0][:, -1]
    model.train(training)
    return out[:, :int(ends.max())]


def beam_search(model, x, head, cache, out, ends, max_new_tokens, beams, stop):
    """The rest of generate(beams > 1): of each row the best finished sequence by mean log-probability.

    A row ends when `beams` sequences are finished and none that still runs is better, as it stands, than the worst.
    """
    B, device = len(out), out.device
    each = torch.arange(B, device=device)
    many = each.repeat_interleave(beams)
    cache.reorder(many)
    cache.tokens = cache.tokens[many]
    start = ends
    texts = out.unsqueeze(1).repeat(1, beams, 1)                      # (B, beams, size), running
    score = torch.full((B, beams), -math.inf, device=device)          # sums of log-probabilities
    score[:, 0] = 0                                                   # all beams begin equal: let one speak
    best = torch.full((B, beams), -math.inf, device=device)           # finished: means
    kept, logp = texts.clone(), few_rows(x, head).float().log_softmax(-1)
    logp = logp[many].view(B, beams, -1)
    for n in range(1, max_new_tokens + 1):
        V = logp.size(-1)
        top, flat = (score.unsqueeze(-1) + logp).flatten(1).topk(2 * beams)  # enough, should half of them end here
        beam, token = flat // V, flat % V
        grown = texts[each.unsqueeze(1), beam]                        # (B, 2 beams, size)
        grown.scatter_(2, (start + n - 1).view(B, 1, 1).expand(-1, 2 * beams, 1), token.unsqueeze(-1))
        over = torch.zeros_like(token, dtype=torch.bool) if stop is None else token == stop
        first = torch.arange(2 * beams, device=device) < beams
        if n == max_new_tokens:
            over = over | first                                       # out of room: what runs is finished as it is
        finished = (top / n).masked_fill(~(over & first), -math.inf)
        open_row = (best.min(1).values < score.max(1).values / max(1, n - 1)) | (best.min(1).values == -math.inf)
        finished = finished.masked_fill(~open_row.unsqueeze(1), -math.inf)
        best, chosen = torch.cat((best, finished), 1).topk(beams)
        kept = torch.cat((kept, grown), 1)[each.unsqueeze(1), chosen]
        score, go = top.masked_fill(over, -math.inf).topk(beams)
        texts = grown[each.unsqueeze(1), go]
        if n == max_new_tokens or bool((best.min(1).values >= score[:, 0] / n).all()):
            break
        cache.reorder((each.unsqueeze(1) * beams + beam.gather(1, go)).flatten())
        new = token.gather(1, go).view(-1, 1)
        x = model.features(new, cache, torch.ones_like(cache.tokens))[0][:, -1]
        logp = few_rows(x, head).float().log_softmax(-1).view(B, beams, -1)
    return kept[:, 0, :int(start.max()) + n]


if __name__ == '__main__':
    for key in ('samples', 'max_new_tokens'):
        if settings[key] < 1:
            raise ValueError(f'{key}={settings[key]} must be at least 1')
    if temperature < 0 or top_k < 0:
        raise ValueError(f'temperature={temperature} and top_k={top_k} must be at least 0')
    if dtype not in ('float32', 'bfloat16'):
        raise ValueError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
    if not 0 < top_p <= 1:
        raise ValueError(f'top_p={top_p} must be above 0 and at most 1')
    device = common.find_device(device)
    torch.manual_seed(seed)

    tokenizer = common.tokenizer_of(source)
    model = from_pretrained(source).to(device).cast(getattr(torch, dtype)).eval()

    if prompt.startswith('file:'):
        if not os.path.isfile(prompt[5:]):
            raise ValueError(f'no prompt file {prompt[5:]}')
        try:
            with open(prompt[5:], encoding='utf-8') as f:
                prompt = f.read()
        except UnicodeDecodeError as error:
            raise ValueError(f'{prompt[5:]} is not UTF-8 ({error}): convert it') from error
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]  # <|endoftext|> is what stands before a document
    idx = torch.tensor([ids], device=device)
    for n in range(samples):
        text = generate(model, idx, max_new_tokens, temperature, top_k or None, top_p if top_p < 1 else None, beams,
                              tokenizer.eot_token if stop else None, vocab=tokenizer.n_vocab)[0, len(ids):].tolist()
        if stop and tokenizer.eot_token in text:
            text = text[:text.index(tokenizer.eot_token)]
        print(prompt + tokenizer.decode(text))
        if n < samples - 1:
            print('-' * 40)
