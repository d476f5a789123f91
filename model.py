"""Mixture-of-Modules: a Transformer whose depth is assembled per token (arXiv:2407.06677).

One idea carries this file: a Transformer is a list of chunks, and a chunk is a pool of N attention and
N feed-forward modules, two routers, and the steps in which they are assembled. At each of H steps, for
every token, a router picks the top-K modules (or SKIP). A block of vanilla GPT-2 is the chunk with N = 1:
one step, no router, weight 1. Equation numbers are the paper's.

Shapes: B batch, T time, M = B*T tokens, C width, N modules of a pool, K selected, H steps, R router state,
nh heads, hs head size, V vocabulary.
"""
import itertools
import json
import math
import os
import pickle
from collections import namedtuple
from dataclasses import dataclass

import safetensors.torch
import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class MoMConfig:
    """The shape of a model. Raises ValueError, naming the fix, for a combination that cannot be built."""
    chunks: str = '1-1-4-1-4-1'     # N of each chunk; 1 is a vanilla block. n_layer is their sum
    K: int = 2                      # modules selected per token and step, SKIP among them
    H: int = 6                      # assembly steps of a chunk
    skip: bool = True               # the "S" of K2H6S: routers may choose SKIP
    N_A: int = 0                    # attention modules kept of a chunk with N > 1, the first ones; 0 keeps all
    N_F: int = 0                    # feed-forward modules likewise. A pool with fewer than K selects all it has
    router: str = 'gru'             # 'gru' (Eq. 7) or 'mlp' (Appendix D.1: two layers, no state)
    router_dim: int = 256           # R, the width of the router's state
    router_weights: str = 'linear'  # weight of a selected module: 'linear' = r (Eq. 5, 6), or 'softmax' of r / tau
    tau: float = 0.2                # temperature of the softmax weights
    n_embd: int = 768               # C
    n_head: int = 12
    block_size: int = 1024          # longest sequence
    vocab_size: int = 50257

    def __post_init__(self):
        try:
            sizes = [int(n) for n in self.chunks.split('-')]
        except ValueError:
            sizes = []
        if not sizes or min(sizes) < 1:
            raise ValueError(f"chunks={self.chunks!r} must be positive numbers joined by '-', such as '1-1-4-1-4-1'")
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        for key in ('K', 'H', 'n_embd', 'n_head', 'block_size', 'vocab_size', 'router_dim'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)} must be at least 1')
        if self.router not in ('gru', 'mlp'):
            raise ValueError(f"router={self.router!r} must be 'gru' or 'mlp'")
        if self.router_weights not in ('linear', 'softmax'):
            raise ValueError(f"router_weights={self.router_weights!r} must be 'linear' or 'softmax'")
        if self.tau <= 0:
            raise ValueError(f'tau={self.tau} must be above 0')
        if self.N_A < 0 or self.N_F < 0:
            raise ValueError(f'N_A={self.N_A} and N_F={self.N_F} must be 0 (all modules) or more')
        if max(sizes) == 1:
            return  # vanilla: nothing is routed
        for N in (n for n in sizes if n > 1):
            if max(self.N_A, self.N_F) > N:
                raise ValueError(f'N_A={self.N_A}, N_F={self.N_F}: a chunk of {N} modules has not that many to keep')
            if self.K > max(self.N_A or N, self.N_F or N) + self.skip:
                raise ValueError(f'K={self.K} is more than a chunk of N={N} modules{" and SKIP" * self.skip} offers: '
                                 f'take K <= {max(self.N_A or N, self.N_F or N) + self.skip} or larger chunks')
        if self.router_weights == 'softmax' and self.K == 1:
            raise ValueError("router_weights='softmax' divides by the sum over the selected: with K=1 each weight is 1 "
                             "and the router gets no gradient. Take K >= 2 or router_weights='linear'")

    @property
    def sizes(self):  # N of each chunk
        return [int(n) for n in self.chunks.split('-')]

    @property
    def n_layer(self):  # layers of the vanilla model that the modules make up
        return sum(self.sizes)

    @property
    def depth(self):  # steps executed: what is deep in an assembled model
        return sum(1 if N == 1 else self.H for N in self.sizes)


# ----------------------------------------------------------------------------- modules
# A pool keeps each parameter of its N modules stacked, (N, ...); one module is a named tuple of slices.

Attention = namedtuple('Attention', 'ln_w ln_b qkv_w qkv_b out_w out_b')
FeedForward = namedtuple('FeedForward', 'ln_w ln_b fc_w fc_b proj_w proj_b')


class Pool(nn.Module):
    """N modules of one kind. Weights are stored (in, out), as GPT-2's, and used as x @ W + b."""

    def __init__(self, kind, N, *shapes):
        super().__init__()
        self.kind = kind
        for name, shape in zip(kind._fields, shapes):
            self.register_parameter(name, nn.Parameter(torch.empty(N, *shape)))

    def unbind(self):
        """The N modules. Once per forward pass: the backward of an unbind is one stack, in which a module that no
        token chose has zeros, so every parameter always gets a gradient. Data parallelism needs that."""
        return [self.kind(*one) for one in zip(*(getattr(self, name).unbind(0) for name in self.kind._fields))]


def attention_pool(N, C):
    return Pool(Attention, N, (C,), (C,), (C, 3 * C), (3 * C,), (C, C), (C,))


def ffn_pool(N, C):
    return Pool(FeedForward, N, (C,), (C,), (C, 4 * C), (4 * C,), (4 * C, C), (C,))


def norm(m, x):  # each module has its own LayerNorm ("Add & Norm" belongs to the module)
    return F.layer_norm(x, x.shape[-1:], m.ln_w, m.ln_b, eps=1e-5)


def qkv_in(m, x):  # (M, C) -> (M, 3C): the q, k and v that attention module m makes
    return torch.addmm(m.qkv_b, norm(m, x), m.qkv_w)


def attn_out(m, a):  # (M, C) -> (M, C)
    return torch.addmm(m.out_b, a, m.out_w)


def ffn(m, u):  # (M, C) -> (M, C). GPT-2's GELU is the tanh form; erf differs by up to 5e-4
    hidden = F.gelu(torch.addmm(m.fc_b, norm(m, u), m.fc_w), approximate='tanh')
    return torch.addmm(m.proj_b, hidden, m.proj_w)


# ----------------------------------------------------------------------------- router

class Router(nn.Module):
    """Scores the N modules of a pool, and SKIP, for every token (Eq. 2, 7, 8).

    The input is the residual stream itself, not normalised. The state is per token and passes from one
    assembly step to the next; nothing flows between tokens. Arithmetic stays in the weights' own type
    (fp32 in training) under autocast.
    """

    def __init__(self, cfg, N):
        super().__init__()
        self.K = min(cfg.K, N + cfg.skip)
        self.N, self.softmax, self.tau = N, cfg.router_weights == 'softmax', cfg.tau
        self.gru = nn.GRUCell(cfg.n_embd, cfg.router_dim) if cfg.router == 'gru' else None
        self.mlp = nn.Linear(cfg.n_embd, cfg.router_dim) if cfg.router == 'mlp' else None
        self.out = nn.Linear(cfg.router_dim, N + cfg.skip, bias=False)  # W of Eq. 8; its last row scores SKIP

    def forward(self, x, s):
        """x (M, C), state s (M, R) or None at the first step -> ids (M, K) int64, weights (M, K), next s.

        An id of N is SKIP. It can be among a token's K picks, at most once; nothing is renormalised then.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.out.weight.dtype)
            s = self.gru(x, s) if self.gru else F.gelu(self.mlp(x), approximate='tanh')  # Eq. 7
            r = self.out(s)                                                              # Eq. 8, (M, N+1)
            weights, ids = r.topk(self.K, dim=-1)
            if self.softmax:  # over all N+1, then divided by the sum over the selected, SKIP included
                p = (r / self.tau).softmax(-1).gather(-1, ids)
                weights = p / p.sum(-1, keepdim=True)
        return ids, weights, s


# ----------------------------------------------------------------------------- assembly

def group_by_module(ids, N):
    """Sort the M*K assignments by module. ids (M, K) -> for each of N modules, its (tokens, slots), SKIP dropped."""
    K = ids.size(1)
    order = ids.flatten().argsort(stable=True)                # assignment = token * K + slot; SKIP (id N) sorts last
    counts = ids.flatten().bincount(minlength=N + 1).tolist()
    return [(a // K, a % K) for a in order.split(counts)[:N]]


def route_by(router, x, s):
    """One decision: x (M, C), state s -> (which tokens go to which module, with what weights), next state."""
    if router is None:
        return None, None  # a vanilla block
    ids, weights, s = router(x, s)
    return (group_by_module(ids, router.N), weights), s


def assemble(module, pool, x, route, weighted):
    """Sum over each token's own selection: sum_k module_k(x), or sum_k r_k * module_k(x) if weighted.

    module: qkv_in, attn_out or ffn; pool: its N modules; x (M, C); route: what route_by returned, None for the
    vanilla chunk (N = 1, weight 1). A token that selected only SKIP gets zeros.
    """
    if route is None:
        return module(pool[0], x)
    groups, weights = route
    out = None
    for m, (token, slot) in zip(pool, groups):  # each module once, with all of its tokens, or none of them
        y = module(m, x.index_select(0, token))
        if weighted:
            y = y * weights[token, slot].unsqueeze(1).to(y.dtype)
        if out is None:
            out = y.new_zeros(x.size(0), y.size(1))
        out.index_add_(0, token, y)
    return out


def attend(qkv, n_head, B, cache=None, step=0):
    """Causal softmax attention of Eq. 5 over assembled q, k, v. (M, 3C) -> (M, C); M is B sequences of T."""
    M, C = qkv.size(0), qkv.size(1) // 3
    q, k, v = qkv.view(B, M // B, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
    if cache is not None:
        k, v = cache.extend(step, k, v)
    T, S = q.size(2), k.size(2)
    # With a cache the T queries are the last of S keys; is_causal would align them with the first.
    mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S)
    return a.transpose(1, 2).reshape(M, C)


class Chunk(nn.Module):
    """N modules of each kind, two routers, H assembly steps (Eq. 4). A vanilla block is N = 1, H = 1, no router."""

    def __init__(self, cfg, N):
        super().__init__()
        routed = N > 1
        N_A, N_F = (cfg.N_A or N, cfg.N_F or N) if routed else (1, 1)
        self.H, self.n_head = cfg.H if routed else 1, cfg.n_head
        self.attn, self.ffn = attention_pool(N_A, cfg.n_embd), ffn_pool(N_F, cfg.n_embd)
        self.router_a = Router(cfg, N_A) if routed else None
        self.router_f = Router(cfg, N_F) if routed else None

    def forward(self, x, cache=None, first_step=0):
        """x (B, T, C) -> (B, T, C). first_step: the number of this chunk's first step in the cache."""
        B, T, C = x.shape
        x = x.reshape(B * T, C)
        attns, ffns = self.attn.unbind(), self.ffn.unbind()
        s_a = s_f = None
        for h in range(self.H):
            route, s_a = route_by(self.router_a, x, s_a)
            qkv = assemble(qkv_in, attns, x, route, weighted=False)     # the sums inside Eq. 5 are unweighted
            a = attend(qkv, self.n_head, B, cache, first_step + h)
            x = x + assemble(attn_out, attns, a, route, weighted=True)  # u = x + F^A(x)
            route, s_f = route_by(self.router_f, x, s_f)
            x = x + assemble(ffn, ffns, x, route, weighted=True)        # x = u + F^F(u), Eq. 6
        return x.view(B, T, C)


class Cache:
    """Keys and values of the tokens so far, one K and one V per executed step, whatever its K modules."""

    def __init__(self, cfg, B, device, dtype):
        shape = cfg.depth, B, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in 'kv')
        self.length = 0  # tokens seen; GPT moves it on after all chunks have run

    def extend(self, step, k, v):  # (B, nh, T, hs) of the new tokens -> (B, nh, length + T, hs) of all
        end = self.length + k.size(2)
        self.k[step, :, :, self.length:end], self.v[step, :, :, self.length:end] = k, v
        return self.k[step, :, :, :end], self.v[step, :, :, :end]


# ----------------------------------------------------------------------------- the model

class GPT(nn.Module):
    """GPT-2, vanilla or assembled, with its head tied to the token embedding."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.chunks = nn.ModuleList(Chunk(cfg, N) for N in cfg.sizes)
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        embeddings, qkv_w, fc_w   normal(0, std), std = 0.02 as GPT-2, more below its width of 768: 0.02 sqrt(768 / C)
        out_w, proj_w             normal(0, std / sqrt(2 * depth)): they add to the residual stream twice a step
        LayerNorm                 weight 1, bias 0; other biases 0
        routers                   PyTorch's defaults, uniform(+-1/sqrt(R)) for the GRU (the paper: "randomly")
        """
        std = 0.02 * max(1, math.sqrt(768 / self.cfg.n_embd))
        nn.init.normal_(self.wte.weight, std=std)
        nn.init.normal_(self.wpe.weight, std=std)
        for chunk in self.chunks:
            for name, p in [*chunk.attn.named_parameters(), *chunk.ffn.named_parameters()]:
                if name == 'ln_w':
                    nn.init.ones_(p)
                elif name.endswith('_b'):
                    nn.init.zeros_(p)
                else:
                    deep = name in ('out_w', 'proj_w')
                    nn.init.normal_(p, std=std / math.sqrt(2 * self.cfg.depth) if deep else std)

    def features(self, idx, cache=None):
        """Token ids (B, T) -> what the head sees, (B, T, C), after the final LayerNorm.

        With a cache, idx holds the tokens that follow those already in it.
        Raises ValueError if the sequence is longer than block_size.
        """
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        if end > self.cfg.block_size:
            raise ValueError(f'a sequence of {end} tokens is longer than block_size={self.cfg.block_size}: cut it')
        x = self.wte(idx) + self.wpe(torch.arange(start, end, device=idx.device))
        step = 0
        for chunk in self.chunks:
            x = chunk(x, cache, step)
            step += chunk.H
        if cache is not None:
            cache.length = end
        return self.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, V) and the mean cross-entropy in nats per token (None without targets).

        targets (B, T) int64; -100 counts for nothing.
        """
        logits = F.linear(self.features(idx), self.wte.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T) by max_new_tokens sampled tokens -> (B, T + max_new_tokens).

        temperature 0 is greedy; top_k keeps the k likeliest tokens. Keys and values are cached. Positions are
        learned ones, so a text longer than block_size slides: each further token sees the last block_size
        tokens afresh, without cache.
        """
        if temperature < 0 or (top_k is not None and top_k < 1) or idx.size(1) < 1:
            raise ValueError(f'temperature={temperature} must be >= 0, top_k={top_k} >= 1 or None, idx not empty')
        cache, new = Cache(self.cfg, idx.size(0), idx.device, self.wte.weight.dtype), idx
        for _ in range(max_new_tokens):
            if idx.size(1) <= self.cfg.block_size:
                x = self.features(new, cache)
            else:
                x = self.features(idx[:, -self.cfg.block_size:])
            logits = F.linear(x[:, -1], self.wte.weight).float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = (logits / temperature).softmax(-1).multinomial(1)
            idx = torch.cat((idx, new), dim=1)
        return idx

    def num_params(self):
        """(all parameters, those of the routers); the tied head counts once."""
        routers = [p for c in self.chunks for r in (c.router_a, c.router_f) if r is not None for p in r.parameters()]
        return sum(p.numel() for p in self.parameters()), sum(p.numel() for p in routers)

    def flops_per_token(self, T, k_a=None, k_f=None):
        """Forward FLOPs per token at length T: 2 per multiply-add, attention over the full T, head included.

        k_a, k_f: attention and feed-forward modules that a token takes per routed step, on average (K if not
        given; SKIP costs nothing). Training costs three times as much. LayerNorms, GELU and sums are not counted.
        """
        C, R, total = self.cfg.n_embd, self.cfg.router_dim, 0
        for chunk in self.chunks:
            a, f = 1, 1
            for router in filter(None, (chunk.router_a, chunk.router_f)):
                state = 3 * R * (C + R) if self.cfg.router == 'gru' else R * C
                total += chunk.H * 2 * (state + R * router.out.out_features)
                a = chunk.router_a.K if k_a is None else k_a
                f = chunk.router_f.K if k_f is None else k_f
            total += chunk.H * ((8 * a + 16 * f) * C * C + 4 * T * C)
        return total + 2 * C * self.cfg.vocab_size

    def param_groups(self, weight_decay):
        """For AdamW: matrices and embeddings decay, LayerNorms and biases do not."""
        decay, keep = [], []
        for name, p in self.named_parameters():
            vector = name.endswith(('_b', 'ln_w', 'bias')) or p.ndim < 2
            (keep if vector else decay).append(p)
        return [{'params': decay, 'weight_decay': weight_decay}, {'params': keep, 'weight_decay': 0.0}]

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """A model from weights: the start of phase two, or of fine-tuning.

        source: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' (fetched from the Hub), a directory in Hugging
        Face format, or a checkpoint of train.py (its file or its directory, then best.pt). overrides: fields of
        MoMConfig. With `chunks`, the layers of a vanilla model become the modules of those chunks and fresh
        routers are added; a shorter block_size cuts the position table.
        Raises ValueError when the weights and the wanted shape do not agree, or cannot be read.
        """
        state, base = read_weights(source)
        for key in ('n_embd', 'n_head', 'vocab_size'):
            if overrides.get(key, base[key]) != base[key]:
                raise ValueError(f'{key}={overrides[key]}, but {source} has {key}={base[key]}: leave it out')
        cfg = MoMConfig(**{**base, **overrides})
        have = MoMConfig(**base)
        if cfg.block_size > have.block_size:
            raise ValueError(f'block_size={cfg.block_size}, but {source} knows {have.block_size} positions at most')
        if cfg.sizes != have.sizes and max(have.sizes) > 1:
            raise ValueError(f'{source} is assembled already, with chunks {have.chunks}: only a vanilla model can be '
                             f'cut into {cfg.chunks}. Start from its phase-one checkpoint')
        if cfg.n_layer != have.n_layer:
            raise ValueError(f'chunks {cfg.chunks} sum to {cfg.n_layer}, but {source} has {have.n_layer} layers')
        model = cls(cfg)
        model.load_state_dict(regroup(state, model, have.sizes, source), strict=True)
        return model


# ----------------------------------------------------------------------------- weights in

UNREADABLE = (RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError)  # what a broken file raises
HUB = {name: f'openai-community/{name}' for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')}
HF_NAMES = {  # Hugging Face's name inside layer h.i -> ours inside chunk i. Both store matrices (in, out)
    'ln_1.weight': 'attn.ln_w', 'ln_1.bias': 'attn.ln_b',
    'attn.c_attn.weight': 'attn.qkv_w', 'attn.c_attn.bias': 'attn.qkv_b',
    'attn.c_proj.weight': 'attn.out_w', 'attn.c_proj.bias': 'attn.out_b',
    'ln_2.weight': 'ffn.ln_w', 'ln_2.bias': 'ffn.ln_b',
    'mlp.c_fc.weight': 'ffn.fc_w', 'mlp.c_fc.bias': 'ffn.fc_b',
    'mlp.c_proj.weight': 'ffn.proj_w', 'mlp.c_proj.bias': 'ffn.proj_b'}


def load_checkpoint(path):
    """The dict that train.py saved, on the CPU; no code in it is ever run.

    path: the file, or a run's directory (best.pt, else last.pt). Raises ValueError if there is none or it is broken.
    """
    if os.path.isdir(path):
        path = next((p for p in (os.path.join(path, f) for f in ('best.pt', 'last.pt')) if os.path.isfile(p)), path)
    if not os.path.isfile(path):
        raise ValueError(f'no checkpoint at {path}')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise ValueError(f'{path} cannot be read ({type(error).__name__}): it is broken or no checkpoint') from error
    if not isinstance(checkpoint, dict) or not {'model', 'model_config'} <= checkpoint.keys():
        raise ValueError(f'{path} is not a checkpoint of train.py')
    return checkpoint


def read_weights(source):
    """Weights and shape of `source` (see GPT.from_pretrained) -> (state dict with our names, MoMConfig fields)."""
    if source in HUB and not os.path.exists(source):
        return read_hugging_face(download(source), source)
    if os.path.isfile(os.path.join(source, 'config.json')):
        return read_hugging_face(source, source)
    if os.path.exists(source):
        checkpoint = load_checkpoint(source)
        return checkpoint['model'], checkpoint['model_config']
    raise ValueError(f"{source!r} is neither one of {', '.join(HUB)}, nor a directory with Hugging Face's config.json "
                     'and weights, nor a checkpoint of train.py')


def download(name):
    """Fetch GPT-2 `name` from the Hub, or find it in the Hub's local cache -> its directory."""
    from huggingface_hub import hf_hub_download
    try:
        for file in ('config.json', 'model.safetensors'):
            path = hf_hub_download(HUB[name], file)
    except OSError as error:  # no network, no such file, no access: huggingface_hub derives all of them from it
        raise ValueError(f'{HUB[name]} could not be fetched from the Hugging Face Hub ({type(error).__name__}): give a '
                         'local directory with its config.json and model.safetensors instead of the name') from error
    return os.path.dirname(path)


def read_hugging_face(folder, source):
    """A GPT-2 in Hugging Face format -> (state dict of the vanilla model with our names, MoMConfig fields)."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        hf = json.load(f)
    needed = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
              'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'tie_word_embeddings': True}
    for key, want in needed.items():
        if hf.get(key, want) != want:
            raise ValueError(f"{folder}/config.json has {key}={hf[key]!r}; GPT-2's is {want!r}: it is another model")
    safe, pickled = os.path.join(folder, 'model.safetensors'), os.path.join(folder, 'pytorch_model.bin')
    try:
        if os.path.isfile(safe):
            weights = safetensors.torch.load_file(safe)
        elif os.path.isfile(pickled):
            weights = torch.load(pickled, map_location='cpu', weights_only=True)
        else:
            raise ValueError(f'{folder} holds neither model.safetensors nor pytorch_model.bin')
        weights = {name.removeprefix('transformer.'): w.float() for name, w in weights.items()}
        state = {'wte.weight': weights['wte.weight'], 'wpe.weight': weights['wpe.weight'],
                 'ln_f.weight': weights['ln_f.weight'], 'ln_f.bias': weights['ln_f.bias']}
        for i in range(hf['n_layer']):
            for theirs, ours in HF_NAMES.items():
                state[f'chunks.{i}.{ours}'] = weights[f'h.{i}.{theirs}'].unsqueeze(0)  # a pool of N = 1
    except KeyError as error:
        raise ValueError(f'the weights in {folder} lack {error}: they are not those of its config.json') from error
    except UNREADABLE as error:
        raise ValueError(f'the weights in {folder} cannot be read ({type(error).__name__}): copy them again') from error
    return state, dict(chunks='-'.join('1' * hf['n_layer']), n_embd=hf['n_embd'], n_head=hf['n_head'],
                       block_size=hf['n_positions'], vocab_size=hf['vocab_size'])


def regroup(state, model, sizes, source):
    """The weights `state`, of a model with chunks `sizes`, as a state dict for `model`.

    Where the chunks differ, `state` is vanilla: consecutive layers are stacked into the pools of a chunk, which keep
    the first N_A and N_F of them; the routers stay as `model` has them, fresh.
    """
    arranged, starts = {}, [0, *itertools.accumulate(model.cfg.sizes)]
    for name, fresh in model.state_dict().items():
        w = [state.get(name)]
        if name.startswith('chunks.') and sizes != model.cfg.sizes:
            _, c, part = name.split('.', 2)
            w = [state.get(f'chunks.{starts[int(c)] + i}.{part}') for i in range(len(fresh))]
            if part.startswith('router'):
                w = [fresh]
        if any(one is None for one in w):
            raise ValueError(f'{source} has no {name} for chunks={model.cfg.chunks}: take the settings of its training')
        w = torch.cat(w)[:len(fresh)] if name == 'wpe.weight' else torch.cat(w)
        if w.shape != fresh.shape:
            raise ValueError(f'{source} has {name} of shape {tuple(w.shape)}, but this model wants '
                             f'{tuple(fresh.shape)}: take the settings of its training')
        arranged[name] = w
    return arranged
