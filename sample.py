"""Text from a checkpoint of train.py, or from a GPT-2; and decoding for whoever imports it.

  python sample.py --source=out/mom_demo --prompt="The state of the Union is"
  python sample.py --source=gpt2-medium --max_new_tokens=100

Keys and values are cached, one of each per token and executed step, however many modules made them.
GPT.generate is the door to `generate` below. Shapes: B rows, T tokens, C width, V vocabulary, nh
heads, hs head size.
"""
import copy
import functools
import math
import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import common
import inputs

# --- what
source = 'out/mom_demo'       # a run or its checkpoint, a GPT-2 name, a Hugging Face directory
prompt = ''                   # text to continue, or file:PATH; '' starts a new document
samples = 1                   # how many
max_new_tokens = 400          # tokens of each
# --- how
temperature = 0.8             # 0 is greedy
top_k = 200                   # sample among the k likeliest tokens; 0 is all
top_p = 1.0                   # and among the likeliest that hold this share of the probability
beams = 1                     # more: the likeliest text that a beam search finds
stop = True                   # at <|endoftext|>
seed = 1337                   # of the draws
dtype = 'float32'             # of the weights: 'float32', or 'bfloat16', half as much to read
device = 'auto'               # 'auto', 'cpu', 'cuda', 'mps' or 'xpu'
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())


KEPT = weakref.WeakKeyDictionary()  # model -> (the weights that it had, what was made of them)
# A fused optimizer changes weights without a trace in their `_version`.
register_optimizer_step_post_hook(lambda *_: KEPT.clear())


def prepared(model, several=False):
    """A dict in which decoding keeps what it makes of a model's weights, for the next call too; an
    empty one if a weight has changed since. several: for several rows at a time.

    In it are the modules of each chunk, merged by subset under MoM, and the head. On a CPU there is
    a second copy of them in another layout, as large as the model, in bf16 and for several rows;
    for one row in fp32 they are the weights themselves, and only the merged matrices take memory:
    S * 12 C^2 bytes a routed chunk. It is freed with the model, by the next call in
    training mode, by any optimizer's step, or by `forget(model)`. A change through `.data` is not
    seen.
    """
    # The tensors are kept alive, so that no new weight gets an old one's address.
    weights = [(p.detach(), object() if p.is_inference() else p._version)
               for p in model.parameters()]
    now = [torch.is_autocast_enabled(model.wte.weight.device.type)]  # it decides what is made
    now += [(p.data_ptr(), p.dtype, version) for p, version in weights]
    before, _, ready = KEPT.get(model, (None, None, None))
    if before != now or several and not ready['several']:
        ready = {'several': several}
        KEPT[model] = now, weights, ready
    return ready


def forget(model):
    """Free what `prepared` keeps of a model."""
    KEPT.pop(model, None)


class Matrix:
    """w (in, out), as a CPU multiplies a few rows by it fastest."""

    def __init__(self, w, several):
        """several: rows at a time will be more than one."""
        self.w, self.packed = w, None
        bf16 = w.dtype == torch.bfloat16
        if (bf16 or several) and has_packing(w.dtype):
            # oneDNN's layout depends on how many rows it expects; that for 16 is good for 2 to 64.
            turned = w.t().contiguous()  # (out, in)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(turned, 16 if several else 1)
        elif bf16:  # as it is stored, a row takes longer to arrange than to multiply
            self.w = w.t().contiguous().t()

    def __call__(self, x, b=None):
        """x @ w + b for x (M, in) -> (M, out)."""
        w = self.w
        if x.dtype == w.dtype and not torch.is_autocast_enabled('cpu'):
            one_row = len(x) == 1 and w.dtype == torch.float32
            if self.packed is not None and not one_row:
                return torch.ops.mkldnn._linear_pointwise(x, self.packed, b, 'none', [], '')
            if one_row and torch.get_num_threads() > 1 and not is_intel():
                y = in_parts(x, w)
                return y if b is None else y + b
        return x @ w if b is None else torch.addmm(b, x, w)


def has_packing(dtype):
    """Whether torch has oneDNN's packed products, which torch.compile takes, too, for this CPU."""
    ops = torch.ops.mkldnn
    return (torch.backends.mkldnn.is_available()
            and torch.backends.cpu.get_cpu_capability().startswith('AVX')
            and all(hasattr(ops, name) for name in ('_reorder_linear_weight', '_linear_pointwise',
                                                    '_is_mkldnn_bf16_supported'))
            and (dtype == torch.float32 or ops._is_mkldnn_bf16_supported()))


@functools.cache
def is_intel():
    """Whether the CPU is Intel's; False where Linux does not say so."""
    try:
        with open('/proc/cpuinfo') as f:
            return 'GenuineIntel' in f.read()
    except OSError:
        return False


def in_parts(x, w):
    """x @ w for one row x (1, in), w (in, out), by parts of w that several threads read.

    On CPUs that are not Intel's MKL reads w with one thread, or not much faster than with one.
    """
    C, D = w.shape
    if w.is_contiguous() and C % 8 == 0:   # eighths of the inner side are added up
        return torch.bmm(x.view(8, 1, C // 8), w.view(8, C // 8, D)).sum(0)
    if w.t().is_contiguous() and D >= 96:  # stored (out, in): parts of the outer side
        parts, rest = divmod(D, 96)
        part = w.t()[:D - rest].view(parts, 96, C).transpose(1, 2)
        y = torch.bmm(x.expand(parts, 1, C), part).view(1, D - rest)
        return torch.cat((y, x @ w[:, D - rest:]), dim=1) if rest else y
    return x @ w


def laid_out(w, several):
    """A parameter as decoding takes it: a matrix on a CPU as a Matrix."""
    for_cpu = w.device.type == 'cpu' and w.dtype in (torch.float32, torch.bfloat16)
    return Matrix(w, several) if for_cpu and w.ndim == 2 else w


class Cache:
    """One K and one V per token and executed step."""

    def __init__(self, cfg, B, device, dtype, size=None, ready=None):
        """size: most tokens of a row (block_size if None); ready: `prepared` weights, if any."""
        self.most = size or cfg.block_size
        shape = B, cfg.n_head, self.most, cfg.n_embd // cfg.n_head
        # zeros: what a mask hides is multiplied by 0 all the same, and 0 * nan is nan
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.depth)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(cfg.depth)]
        self.first = 0   # tokens of the longest row before those at hand
        self.length = 0  # and with them
        # Where rows differ: the tokens of each, and the entries of each at each step. Under MoD a
        # step has fewer entries than tokens.
        self.tokens = torch.zeros(B, dtype=torch.int64, device=device)
        self.used = torch.zeros(cfg.depth, B, dtype=torch.int64, device=device)
        self.ready = {} if ready is None else ready

    def positions(self, T, count=None):
        """Where the next T tokens stand in their texts: (T,), or (B, T) if rows differ.

        To be called once per forward pass, before any step extends the cache. count (B,): the first
        `count` of the T tokens of a row are real; None: all are, and all were.
        """
        new = torch.arange(T, device=self.tokens.device)
        self.first, self.length = self.length, self.length + T
        if count is None:
            return self.first + new
        at = self.tokens.unsqueeze(1) + new
        self.tokens += count
        return at.clamp(max=self.most - 1)  # past the last real token, where it does not matter

    def extend(self, step, k, v, count=None):
        """Append k, v (B, nh, T, hs); with count (B,) only the first `count` of each row are real.

        Returns all keys and values (B, nh, length, hs), a mask of who sees whom (B, 1, T, length)
        or None, and whether it is the plain causal one instead.
        """
        T, mask = k.size(2), None
        k, v = k.to(self.k[step].dtype), v.to(self.v[step].dtype)  # autocast has another
        if self.first == 0 or count is None:
            entries = slice(self.first, self.first + T)
            self.k[step][:, :, entries], self.v[step][:, :, entries] = k, v
        if count is not None:
            new = torch.arange(T, device=k.device).view(1, 1, T, 1)
            slots = self.used[step].view(-1, 1, 1, 1) + new  # (B, 1, T, 1): where they go
            if self.first > 0:
                self.k[step].scatter_(2, slots.expand_as(k), k)
                self.v[step].scatter_(2, slots.expand_as(v), v)
                mask = torch.arange(self.length, device=k.device) <= slots
            self.used[step] += count  # what follows is padding, which the next tokens overwrite
        if self.first == 0:
            return k, v, None, True  # no real token stands behind padding
        if count is None and T > 1:  # several tokens after others; SDPA's own causal mask has none
            mask = torch.ones(T, self.length, dtype=torch.bool, device=k.device).tril(self.first)
        return self.k[step][:, :, :self.length], self.v[step][:, :, :self.length], mask, False

    def select(self, rows):
        """Row b becomes what row rows[b] was."""
        self.k = [k.index_select(0, rows) for k in self.k]
        self.v = [v.index_select(0, rows) for v in self.v]
        self.tokens, self.used = self.tokens[rows], self.used[:, rows]

    def reorder(self, rows, since):
        """The same, where the first `since` entries are equal and the number of rows stays."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        for entries in (*self.k, *self.v):
            late = entries[:, :, since:self.length]
            late.index_copy_(0, moved, late.index_select(0, rows[moved]))
        self.tokens, self.used = self.tokens[rows], self.used[:, rows]

    def part(self, first, last):
        """A Cache of some of the rows, whose entries lie in this one's."""
        part = copy.copy(self)
        part.k, part.v = [k[first:last] for k in self.k], [v[first:last] for v in self.v]
        part.tokens, part.used = self.tokens[first:last], self.used[:, first:last]
        return part

    def pools(self, chunk, x, first_step):
        """Chunk.pools, once for all tokens, in the layout for decoding."""
        if first_step not in self.ready:
            pools = chunk.pools(x, keep=True)
            several = self.ready.get('several', False)
            pools = type(pools)(*(modules and lay_out(modules, several) for modules in pools))
            self.ready[first_step] = pools
        return self.ready[first_step]


def lay_out(modules, several):  # Modules
    each = [type(m)(*(laid_out(p, several) for p in m)) for m in modules.each]
    return modules._replace(each=each)


class Decoder:
    """Rows of text in the middle of being written: the model's logits (B, V) of what comes next.

    The rows are in an order of their own: `row` (B,) says which of the caller's each one is.
    """

    def __init__(self, model, idx, lengths, size, vocab, fill, several):
        """idx (B, T): prompts, of `lengths` (B,) if they differ; size: most tokens of a row; vocab:
        how many ids there are; fill: what stands behind a row's end; several: of rows, or beams."""
        B, T = idx.shape
        block, device = model.cfg.block_size, idx.device
        self.model, self.vocab, ready = model, vocab, prepared(model, several)
        self.apart = lengths is not None  # rows have positions of their own
        ends = lengths if self.apart else torch.full((B,), T, device=device)
        self.ends, self.row = ends.sort(descending=True, stable=True)
        self.text = torch.full((B, size), fill, device=device)
        written = torch.arange(T, device=device) < self.ends.unsqueeze(1)
        self.text[:, :T] = torch.where(written, idx[self.row], fill)
        if 'head' not in ready:
            ready['head'] = laid_out(model.wte.weight.detach().t(), several)  # (C, V)
        self.head = ready['head']
        self.cache = Cache(model.cfg, B, device, model.wte.weight.dtype, min(size, block), ready)
        if T > block:
            self.slide(T)
        else:
            self.read_prompts()

    def read_prompts(self):
        """Rows of different lengths go through the model in groups of about the same length."""
        last = []  # features of each row's last token
        most = 32 if self.text.device.type == 'cpu' else math.inf
        for first, end in alike(self.ends.tolist(), most):
            ends, cache = self.ends[first:end], self.cache.part(first, end)
            longest = int(ends[0])
            idx, count = self.text[first:end, :longest], ends if self.apart else None
            x, _ = self.model.features(idx, cache, count)
            last.append(x[torch.arange(len(x), device=x.device), ends - 1])
        self.cache.length = int(self.ends[0])
        self.score(torch.cat(last))

    def score(self, x):  # the last token's features (B, C)
        logits = self.head(x) if isinstance(self.head, Matrix) else x @ self.head
        logits = logits[:, :self.vocab]
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
        """Positions are learned, so a text beyond block_size is read afresh for each further
        token."""
        self.cache.length = self.model.cfg.block_size  # full, and of no more use
        last = self.text[:, end - self.model.cfg.block_size:end]
        self.score(self.model.features(last)[0][:, -1])

    def select(self, rows, since=None):
        """Row b becomes what row rows[b] was. since: see Cache.reorder."""
        self.row, self.text, self.ends = self.row[rows], self.text[rows], self.ends[rows]
        self.logits = self.logits[rows]
        if since is None or len(rows) < len(self.cache.tokens):  # reorder keeps their number
            self.cache.select(rows)
        else:
            self.cache.reorder(rows, since)


def alike(lengths, most):
    """Lengths, the longest first -> [(first, end)] of groups that `most` tokens of padding make
    equal."""
    groups, first, padding = [], 0, 0
    for i, length in enumerate(lengths):
        padding += lengths[first] - length
        if padding > most:
            groups.append((first, i))
            first, padding = i, 0
    return [*groups, (first, len(lengths))]


def pick(logits, temperature, top_k, top_p):
    """logits (B, V) -> one token of each row (B,)."""
    if temperature < 1e-6:  # where a draw takes the likeliest too
        return logits.argmax(-1)
    ids = None  # of the columns; None: they are the tokens
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))
    p = (logits / temperature).softmax(-1)
    drawn = draw(p) if top_p is None else draw_likely(p, top_p)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def draw(p):
    """Shares (B, V) of any sum above 0 -> a column of each row (B, 1), as likely as its share is
    large."""
    exact = torch.float32 if p.device.type == 'mps' else torch.float64  # mps has no other
    upto = p.cumsum(-1, dtype=exact)
    u = 1 - torch.rand_like(upto[:, :1])  # above 0, so that no share of 0 is drawn
    return torch.searchsorted(upto, u * upto[:, -1:])


def draw_likely(p, top_p):
    """The same among the likeliest that hold the share top_p of p (B, V), and what is as likely as
    they.

    Draw from all, and again while what is likelier than the one drawn holds the share: that needs
    no sorting of p, and 1 / top_p draws or fewer on average.
    """
    drawn = draw(p)
    for _ in range(8):
        above = p > p.gather(1, drawn)
        again = (p * above).sum(-1, keepdim=True) >= top_p  # (B, 1)
        if not again.any():
            return drawn
        drawn = torch.where(again, draw(p), drawn)
    likely, ids = p.sort(descending=True)
    # What stands before the ones left out holds the share already.
    likely = likely.masked_fill(likely.cumsum(-1) - likely >= top_p, 0)
    return torch.where(again, ids.gather(1, draw(likely)), drawn)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, beams=1,
             stop=None, lengths=None, vocab=None):
    """Continue each row of idx (B, T) by max_new_tokens tokens -> (B, T + max_new_tokens), T being
    the longest prompt, or fewer if all rows stopped before.

    temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the likeliest that hold this
    share of the probability. beams > 1 searches for the sequence of highest mean log-probability
    instead. A row that has produced the token `stop` is finished. lengths (B,): prompts of
    different lengths, padded on the right; the new tokens of a row follow its prompt at once, and
    the rest of a row is filled with `stop` (0 without one). vocab: how many ids the tokenizer has,
    if the model's vocabulary is padded beyond them. A text longer than block_size slides: each
    further token sees the last block_size tokens afresh. That is for equally long rows without
    beams. Raises ValueError for what cannot be done.
    """
    lengths = check(model.cfg, idx, max_new_tokens, temperature, top_k, top_p, beams, lengths,
                    vocab)
    training = model.training
    model.eval()  # MoD must not look at the future
    try:
        size, fill = idx.size(1) + max_new_tokens, 0 if stop is None else stop
        several = len(idx) * beams > 1
        decoder = Decoder(model, idx, lengths, size, vocab, fill, several)
        if beams > 1:
            return beam_search(decoder, max_new_tokens, beams, stop)
        out, longest = torch.full_like(decoder.text, fill), int(decoder.ends.max())
        ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for n in range(max_new_tokens):
            if n > 0:
                decoder.read()
            new = pick(decoder.logits, temperature, top_k, top_p)
            if stop is not None:
                new = new.masked_fill(ended, stop)
                ended = ended | (new == stop)
            decoder.write(new)
            # It pays to drop rows that have ended where they are a quarter.
            if n + 1 < max_new_tokens and 4 * int(ended.sum()) >= len(ended):
                out[decoder.row] = decoder.text
                if ended.all():
                    break
                decoder.select((~ended).nonzero().squeeze(1))
                ended = ended[~ended]
        out[decoder.row] = decoder.text
        return out[:, :longest + n + 1]
    finally:
        model.train(training)
        if training:
            forget(model)  # the weights are about to change


def check(cfg, idx, max_new_tokens, temperature, top_k, top_p, beams, lengths, vocab):
    """The arguments of generate -> lengths as a tensor or None. Raises ValueError."""
    (B, T), most = idx.shape, cfg.vocab_size
    if (B < 1 or T < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf or beams < 1
            or top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1
            or not 1 + (beams > 1) <= (most if vocab is None else vocab) <= most):
        raise ValueError(f'temperature={temperature} must be a number >= 0, top_k={top_k} >= 1 or '
                         f'None, top_p={top_p} above 0 and at most 1 or None, beams={beams} and '
                         f'max_new_tokens={max_new_tokens} >= 1, vocab={vocab} from 1 to {most} '
                         'or None, and of at least 2 with beams, and idx not empty')
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=idx.device)
        if lengths.shape != (B,) or not (1 <= lengths.min() and lengths.max() <= T):
            raise ValueError(f'lengths={lengths.tolist()} must give each of the {B} rows a length '
                             f'of 1 to {T}')
    if T + max_new_tokens > cfg.block_size and (lengths is not None or beams > 1):
        raise ValueError(f'{T} + {max_new_tokens} tokens do not fit block_size={cfg.block_size}: '
                         'shorten the prompts, or take fewer new tokens')
    return lengths


def beam_search(decoder, max_new_tokens, beams, stop):
    """Of each row the best finished text by mean log-probability, a text being new tokens only.

    A row has ended when `beams` texts are finished and none that still runs is better, as it
    stands, than the worst of them.
    """
    B, device = len(decoder.text), decoder.text.device
    out, longest = decoder.text.clone(), int(decoder.ends.max())
    # Beams of a row have its prompt in common. Under MoD there are fewer entries than tokens.
    since = 0 if decoder.model.cfg.phi == 'mod' else int(decoder.ends.min())
    decoder.select(torch.arange(B, device=device).repeat_interleave(beams))
    running = torch.full((B, beams), -math.inf, device=device)       # sums of log-probabilities
    finished = running.clone()                                       # means of log-probabilities
    running[:, 0] = 0                                                # all are equal: one counts
    likeliest = torch.arange(2 * beams, device=device) < beams
    for n in range(1, max_new_tokens + 1):
        row = torch.arange(len(running), device=device).unsqueeze(1)  # (B, 1), of those that go on
        logp = decoder.logits.log_softmax(-1).view(len(row), beams, -1)
        V = logp.size(-1)
        top, flat = (running.unsqueeze(-1) + logp).flatten(1).topk(2 * beams)  # half may end here
        beam, token = row * beams + flat // V, flat % V              # (B, 2 beams)
        texts = decoder.text[beam].scatter(2, decoder.ends[beam].unsqueeze(-1), token.unsqueeze(-1))
        over = torch.zeros_like(token, dtype=torch.bool) if stop is None else token == stop
        if n == max_new_tokens:
            over = over | likeliest                                  # out of room: it is finished
        means = (top / n).masked_fill(~(over & likeliest), -math.inf)
        finished, chosen = torch.cat((finished, means), 1).topk(beams)
        better = chosen[:, 0] >= beams                               # the best of the row is new
        out[decoder.row[beam[better, 0]]] = texts[better, chosen[better, 0] - beams]
        running, go = top.masked_fill(over, -math.inf).topk(beams)
        going = ~(finished[:, -1] >= running[:, 0] / n)
        if n == max_new_tokens or not going.any():
            break
        running, finished = running[going], finished[going]
        decoder.select(beam.gather(1, go)[going].flatten(), since)
        decoder.write(token.gather(1, go)[going].flatten())
        decoder.read()
    return out[:, :longest + n]


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

    model, tokenizer = inputs.model_and_tokenizer(source)
    model = model.to(where).cast(getattr(torch, dtype)).eval()
    text = common.read_text(prompt.removeprefix('file:')) if prompt.startswith('file:') else prompt
    ids = tokenizer.encode_ordinary(text) or [tokenizer.eot_token]  # it stands before a document
    idx = torch.tensor([ids], device=where)
    end = tokenizer.eot_token
    for n in range(samples):
        new = model.generate(idx, max_new_tokens, temperature, top_k or None,
                             top_p=top_p if top_p < 1 else None, beams=beams,
                             stop=end if stop else None, vocab=tokenizer.n_vocab)
        new = new[0, len(ids):].tolist()
        if stop and end in new:
            new = new[:new.index(end)]
        print(text + tokenizer.decode(new))
        if n < samples - 1:
            print('-' * 40)


if __name__ == '__main__':
    main()
