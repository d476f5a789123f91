"""Mixture-of-Modules: a Transformer whose depth is assembled per token (arXiv:2407.06677).

One idea carries this file: a Transformer is a list of chunks, and a chunk is a pool of attention and of
feed-forward modules, two routers, and an assembling function phi that says, at each of H steps and for every
token, which modules are applied and with what weights. In MoM phi is the top K of N modules and SKIP. A block
of vanilla GPT-2 is the chunk with N = 1: one step, no router, weight 1. Layer-skip, early exit, parameter
sharing, mixture-of-experts and mixture-of-depths are other choices of phi over the same assembly (section 3.5).
Equation numbers are the paper's.

Shapes: B batch, T time, M = B*T tokens, C width, N modules of a pool, E = N (+ 1 with SKIP) entries of a router,
K selected, H steps, R router state, nh heads, hs head size, V vocabulary.
"""
import itertools
import json
import math
import os
import pickle
from collections import namedtuple
from dataclasses import dataclass, field

import safetensors.torch
import torch
import torch.nn as nn
from torch.nn import functional as F

PHI = ('mom', 'layer_skip', 'early_exit', 'share', 'moe', 'moe_share', 'mod')
Shape = namedtuple('Shape', 'phi H N_A N_F layers_A layers_F')  # of one chunk; see MoMConfig.shapes


@dataclass
class MoMConfig:
    """The shape of a model. Raises ValueError, naming the fix, for a combination that cannot be built."""
    chunks: str = '1-1-4-1-4-1'     # N of each chunk, in layers of the vanilla model; n_layer is their sum
    phi: str = 'mom'                # assembling function of chunks with N > 1 ('moe', 'mod': with N = 1); see Chunk
    K: int = 2                      # modules selected per token and step, SKIP among them
    H: int = 6                      # assembly steps of a chunk under 'mom'; 'share' has len(c_share), the others N
    skip: bool = True               # the "S" of K2H6S: routers may choose SKIP
    N_A: int = 0                    # attention modules kept of a chunk with N > 1, the first ones; 0 keeps all
    N_F: int = 0                    # feed-forward modules likewise. A pool with fewer than K selects all it has
    keep_A: list = field(default_factory=list)   # which attention modules to keep instead, such as [0, 2]
    keep_F: list = field(default_factory=list)   # which feed-forward modules
    tied: bool = False              # all modules of a chunk are its first one ("MoM-same" of Table 2)
    c_share: list = field(default_factory=list)  # 'share': the module of each step, such as [0, 0, 1, 1] (Eq. 10)
    experts: int = 4                # 'moe': feed-forward experts of a layer
    capacity: float = 0.125         # 'mod': share of a sequence's tokens that go through a routed block
    router: str = 'gru'             # 'gru' (Eq. 7), 'mlp' (Appendix D.1: two layers, no state) or 'linear' (Mixtral's)
    router_dim: int = 256           # R, the width of the router's state
    router_weights: str = 'linear'  # weight of a selected module: 'linear' = r (Eq. 5, 6), or 'softmax' of r / tau
    tau: float = 0.2                # temperature of the softmax weights
    balance: float = 0.0            # coefficient of the load-balancing loss; the paper found that it hurts (D.2)
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
        for key in ('K', 'H', 'experts', 'n_embd', 'n_head', 'block_size', 'vocab_size', 'router_dim'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)} must be at least 1')
        for key, known in {'phi': PHI, 'router': ('gru', 'mlp', 'linear'),
                           'router_weights': ('linear', 'softmax')}.items():
            if getattr(self, key) not in known:
                raise ValueError(f'{key}={getattr(self, key)!r} must be one of {", ".join(known)}')
        if self.tau <= 0 or self.balance < 0:
            raise ValueError(f'tau={self.tau} must be above 0, and balance={self.balance} at least 0')
        if not 0 < self.capacity <= 1:
            raise ValueError(f'capacity={self.capacity} is a share of the tokens: 0 < capacity <= 1')
        if self.phi in ('moe', 'mod') and max(sizes) > 1:
            raise ValueError(f"phi={self.phi!r} works layer by layer: chunks={self.chunks!r} must be "
                             f"'{'-'.join('1' * sum(sizes))}'")
        if self.phi != 'mom' and self.vanilla:
            raise ValueError(f'phi={self.phi!r} finds nothing to route in chunks={self.chunks!r}: take a chunk of '
                             "several layers, such as '1-4-1'; for 'mod', which routes every other block, more blocks")
        for shape, N in zip(self.shapes, sizes):
            if shape.phi != 'vanilla':
                self._check_chunk(shape, N)

    def _check_chunk(self, shape, N):
        for kind, first, keep in (('A', self.N_A, self.keep_A), ('F', self.N_F, self.keep_F)):
            if first and keep:
                raise ValueError(f'N_{kind}={first} and keep_{kind}={keep} say the same thing: give one of them')
            if not 0 <= first <= N:
                raise ValueError(f'N_{kind}={first}: a chunk of {N} modules can keep 1 to {N} of them, or 0 for all')
            if any(type(i) is not int or not 0 <= i < N for i in keep) or len(set(keep)) < len(keep):
                raise ValueError(f'keep_{kind}={keep} must name different modules of a chunk of {N}: 0 to {N - 1}')
        if self.phi in ('layer_skip', 'early_exit', 'moe_share') and shape.N_A < N or (
                self.phi in ('layer_skip', 'early_exit') and shape.N_F < N):
            raise ValueError(f'phi={self.phi!r} applies module h at step h, so all must be there: leave N_A, keep_A '
                             '(and, unless it is moe_share, N_F, keep_F) out')
        if self.tied and self.phi != 'mom':
            raise ValueError(f"tied=True (MoM-same) goes with phi='mom'; to share under {self.phi!r}, see phi='share'")
        if self.phi in ('layer_skip', 'early_exit', 'share', 'mod') and self.K != 1:
            raise ValueError(f'phi={self.phi!r} applies one module at a step: K={self.K} must be K=1')
        if self.phi in ('layer_skip', 'early_exit') and not self.skip:
            raise ValueError(f'phi={self.phi!r} chooses between a module and SKIP: it needs skip=True')
        if self.phi == 'share':
            fewest = min(shape.N_A, shape.N_F)
            if not self.c_share or any(type(i) is not int or not 0 <= i < fewest for i in self.c_share):
                raise ValueError(f"phi='share' needs the module of each step: c_share={self.c_share} must be a list of "
                                 f'numbers from 0 to {fewest - 1}, such as {[i // 2 % fewest for i in range(N)]}')
            return
        most = max(shape.N_F, shape.N_A if self.phi == 'mom' else 0) + self.skip
        if self.K > most and self.phi != 'mod':
            raise ValueError(f'K={self.K} is more than a pool of {most - self.skip} modules{" and SKIP" * self.skip} '
                             f'offers: take K <= {most} or larger pools')
        if self.router_weights == 'softmax' and self.K == 1:
            raise ValueError("router_weights='softmax' divides by the sum over the selected: with K=1 each weight is 1 "
                             "and the router gets no gradient. Take K >= 2 or router_weights='linear'")

    @property
    def sizes(self):  # N of each chunk
        return [int(n) for n in self.chunks.split('-')]

    @property
    def shapes(self):
        """Of each chunk: phi, steps, the sizes of its pools, and the layers of the chunk that its modules come from."""
        shapes = []
        for i, N in enumerate(self.sizes):
            if N == 1 and self.phi != 'moe' and not (self.phi == 'mod' and i % 2):  # MoD routes every other block
                shapes.append(Shape('vanilla', 1, 1, 1, [0], [0]))
                continue
            layers_A, layers_F = (keep or list(range(first or N))
                                  for first, keep in ((self.N_A, self.keep_A), (self.N_F, self.keep_F)))
            if self.phi == 'moe':
                layers_F = [0] * self.experts  # experts start as copies of the layer's own
            N_A, N_F = len(layers_A), len(layers_F)
            if self.tied:
                layers_A, layers_F = layers_A[:1], layers_F[:1]
            H = {'mom': self.H, 'share': len(self.c_share)}.get(self.phi, N)
            shapes.append(Shape(self.phi, H, N_A, N_F, layers_A, layers_F))
        return shapes

    @property
    def vanilla(self):  # a GPT-2: nothing is routed
        return all(shape.phi == 'vanilla' for shape in self.shapes)

    @property
    def n_layer(self):  # layers of the vanilla model that the modules make up
        return sum(self.sizes)

    @property
    def depth(self):  # steps executed: what is deep in an assembled model
        return sum(shape.H for shape in self.shapes)


# ----------------------------------------------------------------------------- modules
# A pool keeps each parameter of its N modules stacked, (N, ...); one module is a named tuple of slices.

Attention = namedtuple('Attention', 'ln_w ln_b qkv_w qkv_b out_w out_b')
FeedForward = namedtuple('FeedForward', 'ln_w ln_b fc_w fc_b proj_w proj_b')


class Pool(nn.Module):
    """The modules of one kind of a chunk. Weights are stored (in, out), as GPT-2's, and used as x @ W + b."""

    def __init__(self, kind, stored, N, *shapes):
        super().__init__()
        self.kind, self.times = kind, N // stored  # tied modules are stored once
        for name, shape in zip(kind._fields, shapes):
            self.register_parameter(name, nn.Parameter(torch.empty(stored, *shape)))

    def unbind(self):
        """The N modules. Once per forward pass: the backward of an unbind is one stack, in which a module that no
        token chose has zeros, so every parameter always gets a gradient. Data parallelism needs that."""
        stacks = (getattr(self, name).unbind(0) for name in self.kind._fields)
        return [self.kind(*one) for one in zip(*stacks)] * self.times


def attention_pool(stored, N, C):
    return Pool(Attention, stored, N, (C,), (C,), (C, 3 * C), (3 * C,), (C, C), (C,))


def ffn_pool(stored, N, C):
    return Pool(FeedForward, stored, N, (C,), (C,), (C, 4 * C), (4 * C,), (4 * C, C), (C,))


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
    """Scores the E entries of a pool, its modules and SKIP, for every token (Eq. 2, 7, 8).

    The input is the residual stream itself, not normalised. The state is per token and passes from one
    assembly step to the next; nothing flows between tokens. 'linear' is the gate of a Mixtral layer: one matrix
    per step, on the normalised stream, no state. Arithmetic stays in the weights' own type (fp32 in training)
    under autocast.
    """

    def __init__(self, cfg, E, H):
        super().__init__()
        C, R, self.E = cfg.n_embd, cfg.router_dim, E
        self.gru = nn.GRUCell(C, R) if cfg.router == 'gru' else None
        self.mlp = nn.Linear(C, R) if cfg.router == 'mlp' else None
        self.gates = nn.Linear(C, H * E, bias=False) if cfg.router == 'linear' else None
        self.out = nn.Linear(R, E, bias=False) if self.gates is None else None  # W of Eq. 8; its last row scores SKIP

    def forward(self, x, s, h):
        """x (M, C), state s (M, R) or None at the first step, h the step -> scores r (M, E), next s."""
        with torch.autocast(x.device.type, enabled=False):
            if self.gates:
                W = self.gates.weight.view(-1, self.E, x.size(-1))[h]
                return F.linear(F.layer_norm(x.to(W.dtype), x.shape[-1:]), W), None
            x = x.to(self.out.weight.dtype)
            s = self.gru(x, s) if self.gru else F.gelu(self.mlp(x), approximate='tanh')  # Eq. 7
            return self.out(s), s                                                        # Eq. 8


def top_k(r, K, router_weights, tau):
    """TopK of section 3.2: scores r (M, E) -> ids (M, K), the highest first, and their weights (M, K).

    SKIP can be among a token's picks, at most once; nothing is renormalised then. The softmax is over all entries,
    then divided by the sum over the selected, SKIP included.
    """
    weights, ids = r.topk(K, dim=-1)
    if router_weights == 'softmax':
        p = (r / tau).softmax(-1).gather(-1, ids)
        weights = p / p.sum(-1, keepdim=True)
    return ids, weights


def balance_loss(r, ids, tau):
    """The load-balancing loss of Switch Transformers (Fedus et al. 2022): E * sum over entries of share * probability.

    share: the part of the picks, ids (M, K), that fell on an entry; probability: the mean of softmax(r / tau) over the
    tokens, r (M, E). It is 1 when all entries are picked alike, more when picks and probabilities pile up on the same.
    """
    share = F.one_hot(ids, r.size(1)).to(r.dtype).mean(dim=(0, 1))
    return r.size(1) * (share * (r / tau).softmax(-1).mean(dim=0)).sum()


# ----------------------------------------------------------------------------- assembly

# What a router decided for M tokens at one step. kind: 'A' attention, 'F' feed-forward, 'T' which tokens (MoD).
# ids (M, K), where N is SKIP; weights (M, K); groups: ids sorted by module; aux: a loss to train with, or None.
Decision = namedtuple('Decision', 'kind step N ids weights groups aux')


def group_by_module(ids, N):
    """Sort the M*K assignments by module. ids (M, K) -> for each of N modules, its (tokens, slots), SKIP dropped."""
    K = ids.size(1)
    order = ids.flatten().argsort(stable=True)                # assignment = token * K + slot; SKIP (id N) sorts last
    counts = ids.flatten().bincount(minlength=N + 1).tolist()
    return [(a // K, a % K) for a in order.split(counts)[:N]]


def assemble(module, pool, x, route, weighted):
    """Sum over each token's own selection: sum_k module_k(x), or sum_k r_k * module_k(x) if weighted.

    module: qkv_in, attn_out or ffn; pool: its N modules; x (M, C); route: a Decision, or the number of the one module
    that all tokens take with weight 1. A token that selected only SKIP gets zeros.
    """
    if isinstance(route, int):
        return module(pool[route], x)
    out = None
    for m, (token, slot) in zip(pool, route.groups):  # each module once, with all of its tokens, or none of them
        y = module(m, x.index_select(0, token))
        if weighted:
            y = y * route.weights[token, slot].unsqueeze(1).to(y.dtype)
        if out is None:
            out = y.new_zeros(x.size(0), y.size(1))
        out.index_add_(0, token, y)
    return out


def attend(qkv, n_head, B, cache=None, step=0, count=None):
    """Causal softmax attention of Eq. 5 over assembled q, k, v. (M, 3C) -> (M, C); M is B sequences of T."""
    M, C = qkv.size(0), qkv.size(1) // 3
    q, k, v = qkv.view(B, M // B, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
    mask = None
    if cache is not None:
        k, v, mask = cache.extend(step, k, v, count)
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None)
    return a.transpose(1, 2).reshape(M, C)


class Chunk(nn.Module):
    """Pools of modules, routers, and H assembly steps (Eq. 4). Its assembling function phi is one of

    vanilla      one module, one step: a block of GPT-2
    mom          the top K of R^A, the top K of R^F (Eq. 5, 6)
    layer_skip   module h or SKIP, by the scores of these two alone (Eq. 9)
    early_exit   the same, but once a token skips, it skips all that follows in the chunk, of both kinds
    share        module c_share[h], no router (Eq. 10)
    moe          the layer's attention, the top K of its experts (Eq. 11)
    moe_share    attention h, the top K of the chunk's feed-forward modules
    mod          a vanilla block for the tokens that it chooses of a sequence: see on_chosen_tokens
    """

    def __init__(self, cfg, shape):
        super().__init__()
        C, R = cfg.n_embd, cfg.router_dim
        self.cfg, self.phi, self.H, self.N_A, self.N_F = cfg, shape.phi, shape.H, shape.N_A, shape.N_F
        self.attn = attention_pool(len(shape.layers_A), shape.N_A, C)
        self.ffn = ffn_pool(len(shape.layers_F), shape.N_F, C)
        one, each = [0], list(range(shape.H))  # the modules of the steps where no router decides
        self.fixed_A = {'vanilla': one, 'mod': one, 'moe': one, 'moe_share': each, 'share': cfg.c_share}.get(self.phi)
        self.fixed_F = {'vanilla': one, 'mod': one, 'share': cfg.c_share}.get(self.phi)
        self.router_a = None if self.fixed_A else Router(cfg, shape.N_A + cfg.skip, shape.H)
        self.router_f = None if self.fixed_F else Router(cfg, shape.N_F + cfg.skip, shape.H)
        self.router_t = Router(cfg, 1, 1) if self.phi == 'mod' else None
        self.predictor = nn.Sequential(nn.Linear(C, R), nn.GELU(), nn.Linear(R, 1)) if self.phi == 'mod' else None

    def choose(self, kind, x, h, state):
        """phi (Eq. 3): what step h applies to x (M, C), of attention (kind 'A') or feed-forward ('F').

        state: a dict that lives as long as one forward pass, with router states and with who has exited.
        Returns the number of the module that all tokens take, or a Decision.
        """
        router, fixed, N = ((self.router_a, self.fixed_A, self.N_A) if kind == 'A' else
                            (self.router_f, self.fixed_F, self.N_F))
        if router is None:
            return fixed[h]
        r, state[kind] = router(x, state.get(kind), h)
        entries = None
        if self.phi in ('layer_skip', 'early_exit'):  # of all scores, module h's and SKIP's
            entries = torch.tensor([h, N], device=r.device)
            r = r[:, entries]
        ids, weights = top_k(r, min(self.cfg.K, r.size(1)), self.cfg.router_weights, self.cfg.tau)
        aux = None
        if self.cfg.balance and self.training:
            aux = self.cfg.balance * balance_loss(r, ids, self.cfg.tau)
        if entries is not None:
            ids = entries[ids]
        if self.phi == 'early_exit':
            state['gone'] = (ids == N) | state.get('gone', False)
            ids = ids.masked_fill(state['gone'], N)
        return Decision(kind, h, N, ids, weights, group_by_module(ids, N), aux)

    def steps(self, x, cache=None, first_step=0, count=None):
        """Eq. 4, H times: x (B, T, C) -> (B, T, C) and the routers' Decisions."""
        B, T, C = x.shape
        x = x.reshape(B * T, C)
        attns, ffns, state, decisions = self.attn.unbind(), self.ffn.unbind(), {}, []
        for h in range(self.H):
            route = self.choose('A', x, h, state)
            qkv = assemble(qkv_in, attns, x, route, weighted=False)     # the sums inside Eq. 5 are unweighted
            a = attend(qkv, self.cfg.n_head, B, cache, first_step + h, count)
            x = x + assemble(attn_out, attns, a, route, weighted=True)  # u = x + F^A(x)
            decisions.append(route)
            route = self.choose('F', x, h, state)
            x = x + assemble(ffn, ffns, x, route, weighted=True)        # x = u + F^F(u), Eq. 6
            decisions.append(route)
        return x.view(B, T, C), [d for d in decisions if isinstance(d, Decision)]

    def on_chosen_tokens(self, x, cache=None, first_step=0):
        """Mixture-of-depths (Raposo et al. 2024): the block sees some tokens of a sequence, the others pass by.

        In training the tokens are those with the highest scores, `capacity` of the sequence. That looks at the
        future; so in eval mode, and in generation, a predictor says for each token by itself whether it would have
        been among them. It learns beside the model, from a cross-entropy that sends no gradient into it.
        """
        B, T, C = x.shape
        score, _ = self.router_t(x, None, 0)                                       # (B, T, 1)
        member = self.predictor(x.detach()).squeeze(-1)                            # (B, T), a logit
        if self.training:
            best = score.squeeze(-1).topk(max(1, round(self.cfg.capacity * T)), dim=1).indices
            chosen = torch.zeros_like(member, dtype=torch.bool).scatter(1, best, True)
            aux, longest = F.binary_cross_entropy_with_logits(member, chosen.to(member.dtype)), best.size(1)
        else:
            chosen, aux = member > 0, None
            longest = max(1, int(chosen.sum(1).max()))
        # The chosen ones of each sequence in their order, then some others to fill the rows: as they come last,
        # no chosen token attends to them, and what they get is dropped.
        rows = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :longest].unsqueeze(-1)  # (B, longest, 1)
        part = x.gather(1, rows.expand(-1, -1, C))
        y, _ = self.steps(part, cache, first_step, chosen.sum(1))
        weight = (score * chosen.unsqueeze(-1)).gather(1, rows)
        x = x.scatter_add(1, rows.expand(-1, -1, C), weight.to(x.dtype) * (y - part))
        ids = 1 - chosen.int().view(-1, 1)                                         # 0 the block, 1 SKIP
        return x, [Decision('T', 0, 1, ids, score.view(-1, 1), None, aux)]

    def forward(self, x, cache=None, first_step=0):
        """x (B, T, C) -> (B, T, C) and Decisions. first_step: the number of this chunk's first step in the cache."""
        return (self.on_chosen_tokens if self.phi == 'mod' else self.steps)(x, cache, first_step)


class Cache:
    """Keys and values of the tokens so far, one K and one V per executed step, whatever its K modules."""

    def __init__(self, cfg, B, device, dtype):
        shape = cfg.depth, B, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in 'kv')
        self.used = torch.zeros(cfg.depth, B, dtype=torch.int64, device=device)  # entries of each step and sequence
        self.length = 0  # tokens seen; GPT moves it on after all chunks have run

    def extend(self, step, k, v, count=None):
        """Append k, v (B, nh, T, hs) of the new tokens, or of the first count (B,) of them in each sequence.

        Returns all keys and values, (B, nh, S, hs), and which of them each new token sees, (B, 1, T, S).
        """
        B, nh, T, hs = k.shape
        S = self.length + T if count is None else int(self.used[step].max()) + T
        slots = self.used[step].unsqueeze(1) + torch.arange(T, device=k.device)  # (B, T)
        for mine, new in ((self.k, k), (self.v, v)):
            mine[step].scatter_(2, slots.view(B, 1, T, 1).expand(-1, nh, -1, hs), new)
        self.used[step] += T if count is None else count
        mask = torch.arange(S, device=k.device) <= slots.view(B, 1, T, 1)
        return self.k[step, :, :, :S], self.v[step, :, :, :S], mask


# ----------------------------------------------------------------------------- the model

class GPT(nn.Module):
    """GPT-2, vanilla or assembled, with its head tied to the token embedding."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.chunks = nn.ModuleList(Chunk(cfg, shape) for shape in cfg.shapes)
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
        """Token ids (B, T) -> what the head sees, (B, T, C), after the final LayerNorm, and each chunk's Decisions.

        With a cache, idx holds the tokens that follow those already in it.
        Raises ValueError if the sequence is longer than block_size.
        """
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        if end > self.cfg.block_size:
            raise ValueError(f'a sequence of {end} tokens is longer than block_size={self.cfg.block_size}: cut it')
        x = self.wte(idx) + self.wpe(torch.arange(start, end, device=idx.device))
        step, decisions = 0, []
        for chunk in self.chunks:
            x, decided = chunk(x, cache, step)
            decisions.append(decided)
            step += chunk.H
        if cache is not None:
            cache.length = end
        return self.ln_f(x), decisions

    def loss(self, x, targets):
        """Features (B, T, C), targets (B, T) int64 -> logits (B, T, V) and their mean cross-entropy in nats per token.
        A target of -100 counts for nothing."""
        logits = F.linear(x, self.wte.weight)
        return logits, F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1))

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, V) and the mean cross-entropy in nats per token (None without targets).

        targets (B, T) int64; -100 counts for nothing. In training mode the auxiliary losses (`balance`, the predictor
        of MoD) add their gradients to the loss, not their values: what is printed stays the cross-entropy.
        """
        x, decisions = self.features(idx)
        if targets is None:
            return F.linear(x, self.wte.weight), None
        logits, loss = self.loss(x, targets)
        for decision in itertools.chain(*decisions):
            if decision.aux is not None:
                loss = loss + (decision.aux - decision.aux.detach())
        return logits, loss

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T) by max_new_tokens sampled tokens -> (B, T + max_new_tokens).

        temperature 0 is greedy; top_k keeps the k likeliest tokens. Keys and values are cached. Positions are
        learned ones, so a text longer than block_size slides: each further token sees the last block_size
        tokens afresh, without cache.
        """
        if temperature < 0 or (top_k is not None and top_k < 1) or idx.size(1) < 1:
            raise ValueError(f'temperature={temperature} must be >= 0, top_k={top_k} >= 1 or None, idx not empty')
        training, cache = self.training, Cache(self.cfg, idx.size(0), idx.device, self.wte.weight.dtype)
        self.eval()  # MoD must not look at the future
        new = idx
        for _ in range(max_new_tokens):
            if idx.size(1) <= self.cfg.block_size:
                x, _ = self.features(new, cache)
            else:
                x, _ = self.features(idx[:, -self.cfg.block_size:])
            logits = F.linear(x[:, -1], self.wte.weight).float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = (logits / temperature).softmax(-1).multinomial(1)
            idx = torch.cat((idx, new), dim=1)
        self.train(training)
        return idx

    def num_params(self):
        """(all parameters, those of the routers); the tied head counts once."""
        routers = [p for name, p in self.named_parameters() if '.router_' in name or '.predictor.' in name]
        return sum(p.numel() for p in self.parameters()), sum(p.numel() for p in routers)

    def flops_per_token(self, T, k_a=None, k_f=None):
        """Forward FLOPs per token at length T: 2 per multiply-add, attention over the full T, head included.

        k_a, k_f: modules that a token takes, on average, of each attention and feed-forward decision of a router (K if
        not given; SKIP costs nothing); under MoD, the share of the tokens that are chosen. Training costs three times
        as much. LayerNorms, GELU and sums are not counted.
        """
        C, R, total = self.cfg.n_embd, self.cfg.router_dim, 0
        for chunk in self.chunks:
            a, f, seen = 1, 1, T  # modules per step; tokens that attend to each other
            for router, k in ((chunk.router_a, k_a), (chunk.router_f, k_f), (chunk.router_t, None)):
                if router:
                    state = {'gru': 3 * R * (C + R) + R * router.E, 'mlp': R * (C + router.E), 'linear': C * router.E}
                    total += 2 * chunk.H * state[self.cfg.router]
            if chunk.router_a:
                a = min(self.cfg.K, chunk.router_a.E) if k_a is None else k_a
            if chunk.router_f:
                f = min(self.cfg.K, chunk.router_f.E) if k_f is None else k_f
            if chunk.router_t:
                a = f = self.cfg.capacity if k_a is None else k_a
                seen = a * a * T
                total += 2 * R * (C + 1)  # the predictor
            total += chunk.H * ((8 * a + 16 * f) * C * C + 4 * seen * C)
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
        if cfg.n_layer != have.n_layer:
            raise ValueError(f'chunks {cfg.chunks} sum to {cfg.n_layer}, but {source} has {have.n_layer} layers')
        if not have.vanilla and [s._replace(H=0) for s in cfg.shapes] != [s._replace(H=0) for s in have.shapes]:
            raise ValueError(f'{source} is assembled already, with phi={have.phi!r} and chunks {have.chunks}: only a '
                             f'vanilla model can become phi={cfg.phi!r} with other pools or chunks {cfg.chunks}. Start '
                             'from its phase-one checkpoint')
        model = cls(cfg)
        model.load_state_dict(regroup(state, model, have.vanilla, source), strict=True)
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


def regroup(state, model, vanilla, source):
    """The weights `state` as a state dict for `model`.

    If they are a vanilla model's, consecutive layers are stacked into the pools of a chunk (its Shape says which
    layers), and what no layer has, routers, stays as `model` has it, fresh.
    """
    arranged, starts = {}, [0, *itertools.accumulate(model.cfg.sizes)]
    for name, fresh in model.state_dict().items():
        layers = [name]
        if vanilla and name.startswith('chunks.'):
            _, c, part = name.split('.', 2)
            shape = model.cfg.shapes[int(c)]
            kept = {'attn': shape.layers_A, 'ffn': shape.layers_F}.get(part.split('.')[0])
            layers = kept and [f'chunks.{starts[int(c)] + i}.{part}' for i in kept]
        if layers is None:
            arranged[name] = fresh
            continue
        if any(layer not in state for layer in layers):
            raise ValueError(f'{source} has no {name} for chunks={model.cfg.chunks}: take the settings of its training')
        w = torch.cat([state[layer] for layer in layers])
        if name == 'wpe.weight':
            w = w[:len(fresh)]
        if w.shape != fresh.shape:
            raise ValueError(f'{source} has {name} of shape {tuple(w.shape)}, but this model wants '
                             f'{tuple(fresh.shape)}: take the settings of its training')
        arranged[name] = w
    return arranged
