"""Mixture-of-Modules: a Transformer whose depth is assembled per token (arXiv:2407.06677).

A Transformer is a list of chunks. A chunk has two pools, of N attention and of N feed-forward
modules, two routers, and an assembling function phi. At each of H steps phi says, for every token,
which modules are applied and with what weights. In MoM that is the top K of the N modules and SKIP.
A block of GPT-2 is the chunk with N = 1: one step, no router, weight 1. Layer-skip, early exit,
parameter sharing, mixture-of-experts and mixture-of-depths are other choices of phi (section 3.5).

The file follows section 3 of the paper, and equation numbers are the paper's. Below the banner
"fused routing" the same numbers are computed faster, and settings are checked. tests/dense.py says
MoM again in loops over single tokens, and docs/method.md sets the equations beside the lines of
this file.

Shapes: B batch, T time, M = B*T tokens, C width (the paper's d), N modules of a pool, E = N (+ 1
with SKIP) entries of a router, K selected, H steps, R width of a router's state, S subsets of a
pool, nh heads (the paper's Z), hs head size, V vocabulary. (In the paper M is the set of modules
and R a router.)
"""
import hashlib
import itertools
import math
import re
from collections import namedtuple
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class MoMConfig:
    """The settings of a model. Raises ValueError, naming the fix, if they make no model."""
    chunks: str = '1-1-1-1-1-1-1-1-1-1-1-1'  # N of each chunk, in layers of the vanilla model
    phi: str = 'mom'                # assembling function of chunks with N > 1; see PHI
    K: int = 2                      # modules selected per token and step, SKIP among them
    H: int = 6                      # assembly steps of a chunk with N > 1 under 'mom'
    skip: bool = True               # the "S" of K2H6S: routers may choose SKIP
    N_A: int = 0                    # attention modules kept of a chunk, the first ones; 0 keeps all
    N_F: int = 0                    # feed-forward modules likewise
    keep_A: list = field(default_factory=list)   # which attention modules to keep, such as [0,2]
    keep_F: list = field(default_factory=list)   # which feed-forward modules
    tied: bool = False              # all modules of a chunk are its first one (MoM-same of Table 2)
    c_share: list = field(default_factory=list)  # 'share': the module of each step, as [0,0,2,2]
    experts: int = 4                # 'moe': feed-forward experts of a layer
    capacity: float = 0.125         # 'mod': share of the tokens that go through a routed block
    router: str = 'gru'             # 'gru' (Eq. 7), 'mlp' (Appendix D.1) or 'linear' (Mixtral's)
    router_dim: int = 256           # R, the width of the router's state
    router_weights: str = 'linear'  # weight of a module: 'linear' is r, 'softmax' is of r / tau
    tau: float = 0.2                # temperature of the softmax weights
    router_start: str = 'fresh'     # or 'layers': routers begin at the layers' order; see Router
    weigh_qkv: bool = False         # r weighs q, k and v as well; Eq. 5 adds them up unweighted
    balance: float = 0.0            # coefficient of the load-balancing loss; it hurts (D.2)
    n_embd: int = 768               # width, C
    n_head: int = 12                # heads, nh
    block_size: int = 1024          # longest sequence
    vocab_size: int = 50257         # kinds of token, V

    def __post_init__(self):
        check(self)

    @property
    def sizes(self):  # N of each chunk
        return [int(n) for n in self.chunks.split('-')]

    @property
    def n_layer(self):  # layers of the vanilla model that the modules make up
        return sum(self.sizes)

    @property
    def depth(self):  # steps executed, of all chunks; of a GPT-2 its layers
        return sum(plan.H for plan in self.plans)

    @property
    def vanilla(self):  # a GPT-2: nothing is routed
        return all(plan.phi == 'vanilla' for plan in self.plans)

    @property
    def assembly(self):  # what it is called: K2H6S, moe, vanilla
        if self.vanilla:
            return 'vanilla'
        return f'K{self.K}H{self.H}{"S" * self.skip}' if self.phi == 'mom' else self.phi

    @property
    def plans(self):  # the Plan of each chunk
        return [plan_chunk(self, i) for i in range(len(self.sizes))]


# ----------------------------------------------------------------------------- modules (3.1)
# A pool stacks each parameter of its N modules, (N, ...). One module is a named tuple of slices.

Attention = namedtuple('Attention', 'ln_w ln_b qkv_w qkv_b out_w out_b')
FeedForward = namedtuple('FeedForward', 'ln_w ln_b fc_w fc_b proj_w proj_b')


class Pool(nn.Module):
    """The N modules of one kind of a chunk. Matrices are stored (in, out), as GPT-2's are."""

    def __init__(self, kind, N, stored, C):
        super().__init__()
        self.kind, self.N = kind, N
        shapes = {Attention: [(C,), (C,), (C, 3 * C), (3 * C,), (C, C), (C,)],
                  FeedForward: [(C,), (C,), (C, 4 * C), (4 * C,), (4 * C, C), (C,)]}[kind]
        for name, shape in zip(kind._fields, shapes):
            self.register_parameter(name, nn.Parameter(torch.empty(stored, *shape)))

    def stack(self):
        """All modules as one named tuple of (N, ...). Tied ones are stored once and expanded."""
        parameters = (getattr(self, name) for name in self.kind._fields)
        return self.kind(*(p.expand(self.N, *p.shape[1:]) for p in parameters))


# Where w is not a tensor it stands for several modules at once (Grouped, see fused routing) or is
# laid out for a CPU (Matrix in sample.py). To understand MoM, pass these branches by.

def norm(x, w=None, b=None):
    """LayerNorm. Each module has its own: "Add & Norm" belongs to the module (3.1)."""
    if isinstance(w, Grouped):
        return grouped_norm(x, w, b)
    return F.layer_norm(x, x.shape[-1:], w, b, eps=1e-5)


def linear(x, w, b):
    """x w + b, for x (M, in) and w (in, out)."""
    if isinstance(w, Grouped):
        return grouped_linear(x, w, b)
    if not isinstance(w, torch.Tensor):
        return w(x, b)
    return torch.addmm(b, x, w)


# What modules do to the tokens x (M, C). m: one module.

def attn_in(m, x):  # -> (M, 3C): q, k and v
    return linear(norm(x, m.ln_w, m.ln_b), m.qkv_w, m.qkv_b)


def attn_out(m, a):  # attended values (M, C) -> (M, C)
    return linear(a, m.out_w, m.out_b)


def ffn(m, u):  # -> (M, C)
    hidden = linear(norm(u, m.ln_w, m.ln_b), m.fc_w, m.fc_b)
    hidden = F.gelu(hidden, approximate='tanh')  # GPT-2's form; erf differs by up to 5e-4
    return linear(hidden, m.proj_w, m.proj_b)


def attend(qkv, n_head, B, cache=None, step=0, count=None):
    """The causal softmax attention of Eq. 5: assembled q, k, v (M, 3C) -> (M, C).

    M is B sequences of T tokens. cache, step, count: in decoding; see sample.Cache.
    """
    M, C = qkv.size(0), qkv.size(1) // 3
    qkv = qkv.view(B, M // B, 3, n_head, C // n_head)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, nh, T, hs)
    mask, causal = None, True
    if cache is not None:
        k, v, mask, causal = cache.extend(step, k, v, count)
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return a.transpose(1, 2).reshape(M, C)


# ----------------------------------------------------------------------------- router (3.3)

class Router(nn.Module):
    """Scores the E entries of a pool, its modules and SKIP, for every token (Eq. 2, 7, 8).

    The input is the residual stream itself, not normalised. The state is per token and passes from
    one step to the next; nothing flows between tokens. 'linear' is the gate of a Mixtral layer: one
    matrix per step, on the normalised stream, no state. Under autocast the arithmetic stays in the
    weights' own type, fp32 in training.

    router_start='layers' is not the paper's: r = W s_h + b_h, with a learned b_h for each step. It
    begins at 1 for module i at step i * H // N and at 0 elsewhere, and W begins at a hundredth of
    its size. With H >= N, phase two thus begins close to the model of phase one.
    """

    def __init__(self, cfg, E, H, N=1):
        super().__init__()
        C, R, self.E, self.bias = cfg.n_embd, cfg.router_dim, E, None
        self.gru = nn.GRUCell(C, R) if cfg.router == 'gru' else None
        self.mlp = nn.Linear(C, R) if cfg.router == 'mlp' else None
        self.gates = nn.Linear(C, H * E, bias=False) if cfg.router == 'linear' else None
        # W of Eq. 8. With SKIP, its last row is SKIP's.
        self.out = nn.Linear(R, E, bias=False) if self.gates is None else None
        if cfg.router_start == 'layers':
            self.out.weight.data.mul_(0.01)
            self.bias = nn.Parameter(torch.zeros(H, E))
            # With H > N some steps are nobody's; with H < N several modules share one.
            for i in range(N):
                self.bias.data[i * H // N, i] = 1

    def forward(self, x, s, h):
        """x (M, C), state s (M, R) or None for s_0 = 0, step h -> scores r (M, E), next state."""
        with torch.autocast(x.device.type, enabled=False):
            if self.gates:
                W = self.gates.weight.view(-1, self.E, x.size(-1))[h]
                return F.linear(norm(x.to(W.dtype)), W), None
            x = x.to(self.out.weight.dtype)
            if self.gru:
                s = gru(self.gru, x, s)                       # Eq. 7
            else:
                s = F.gelu(self.mlp(x), approximate='tanh')   # Appendix D.1
            r = self.out(s)                                   # Eq. 8
            if self.bias is not None:
                r = r + self.bias[h]
            return r, s


def top_k(r, K, router_weights, tau):
    """TopK of section 3.2: scores r (M, E) -> ids (M, K) and weights (M, K), the highest first.

    SKIP can be among a token's picks, once; the weights of the others stay as they are. 'softmax'
    is over the picked scores, SKIP's included: that over all, divided by its sum over the picks.
    If K = E there is nothing to choose: all entries, in their order.
    """
    if K == r.size(1):
        weights, ids = r, torch.arange(K, device=r.device).expand_as(r)
    else:
        weights, ids = r.topk(K, dim=-1)
    if router_weights == 'softmax':
        weights = (weights / tau).softmax(-1)
    return ids, weights


# ----------------------------------------------------------------------------- phi (3.1, 3.5)
# phi -> what decides which modules a step applies, of attention and of feed-forward:
#   only    the first module               each    module h at step h
#   listed  module c_share[h]              routed  the router
PHI = {
    'vanilla': ('only', 'only'),         # a block of GPT-2
    'mom': ('routed', 'routed'),         # the top K of R^A and of R^F (Eq. 5, 6)
    'layer_skip': ('routed', 'routed'),  # module h or SKIP, by these two scores alone (Eq. 9)
    'early_exit': ('routed', 'routed'),  # the same, but who has skipped skips all that follows
    'share': ('listed', 'listed'),       # Eq. 10
    'moe': ('only', 'routed'),           # the layer's attention, the top K of its experts (Eq. 11)
    'moe_share': ('each', 'routed'),     # attention h, the top K of the chunk's pool of FFNs
    'mod': ('only', 'only'),             # GPT-2's block for some tokens; see Chunk.on_chosen_tokens
}
ONE_OR_SKIP = ('layer_skip', 'early_exit')

# What a chunk is made of. layers_A, layers_F: which layers of the chunk its modules come from
# (counted from 0). N_A, N_F: how many modules; more than layers only under `tied`.
Plan = namedtuple('Plan', 'phi H N_A N_F layers_A layers_F')


def plan_chunk(cfg, i):
    """The Plan of chunk i. 'moe' routes every chunk of 1, 'mod' every second one."""
    N = cfg.sizes[i]
    if not (N > 1 or cfg.phi == 'moe' or cfg.phi == 'mod' and i % 2):
        return Plan('vanilla', 1, 1, 1, [0], [0])
    layers_A = cfg.keep_A or list(range(cfg.N_A or N))
    layers_F = cfg.keep_F or list(range(cfg.N_F or N))
    if cfg.phi == 'share':
        layers_A = layers_F = sorted(set(cfg.c_share))
    if cfg.phi == 'moe':
        layers_F = [0] * cfg.experts  # experts begin as copies of the layer's own
    N_A, N_F = len(layers_A), len(layers_F)
    if cfg.tied:
        layers_A, layers_F = layers_A[:1], layers_F[:1]
    H = {'mom': cfg.H, 'share': len(cfg.c_share)}.get(cfg.phi, N)  # the others go layer by layer
    return Plan(cfg.phi, H, N_A, N_F, layers_A, layers_F)


# What one step applies, of attention (kind 'A') or feed-forward ('F'); under MoD, which tokens go
# through a block ('T'). N: the size of the pool; SKIP's id is N. ids (M, K), weights (M, K): the
# picks of each token, or None where all take one module with weight 1. aux: a loss of its own, or
# None. rows: how the picks are carried out; see sort_picks.
Decision = namedtuple('Decision', 'kind step N ids weights aux rows')


# ----------------------------------------------------------------------------- assembly (3.2)

def assemble(fn, modules, x, d, weighted=True):
    """The sums of Eq. 5 and 6 over each token's own picks k: sum_k r_k fn(module_k, x) -> (M, out).

    fn: attn_in, attn_out or ffn; modules: a Modules; x (M, in); d: the Decision. weighted=False
    leaves r_k out, for q, k and v. A token that picked only SKIP gets zeros.
    """
    total = None
    # y (M, out): what the tokens' k-th picks make of x
    for k, y in each_pick(fn, modules, x, d.rows, d.N):
        if weighted and d.weights is not None:
            y = y * d.weights[:, k:k + 1].to(y.dtype)
        total = y if total is None else total + y
    return total


class Chunk(nn.Module):
    """Pools of modules, routers, and H assembly steps (Eq. 4)."""

    def __init__(self, cfg, plan):
        super().__init__()
        C, R = cfg.n_embd, cfg.router_dim
        self.cfg, self.plan, self.phi, self.H = cfg, plan, plan.phi, plan.H
        self.N_A, self.N_F = plan.N_A, plan.N_F
        self.rule_A, self.rule_F = PHI[plan.phi]
        self.attn = Pool(Attention, plan.N_A, len(plan.layers_A), C)
        self.ffn = Pool(FeedForward, plan.N_F, len(plan.layers_F), C)
        # is_router finds router_a, router_f, router_t and predictor by their names.
        routed_A, routed_F = self.rule_A == 'routed', self.rule_F == 'routed'
        E_A, E_F = self.N_A + cfg.skip, self.N_F + cfg.skip
        self.router_a = Router(cfg, E_A, self.H, self.N_A) if routed_A else None
        self.router_f = Router(cfg, E_F, self.H, self.N_F) if routed_F else None
        # The paper's K_A and K_F are one K here. A pool with fewer entries offers all it has.
        self.K_A, self.K_F = min(cfg.K, E_A), min(cfg.K, E_F)
        self.router_t = self.predictor = None
        if self.phi == 'mod':
            self.router_t = Router(cfg, 1, 1)
            self.predictor = nn.Sequential(nn.Linear(C, R), nn.GELU(), nn.Linear(R, 1))
            c = min(cfg.capacity, 0.999)  # its first probability: the share to be chosen
            nn.init.constant_(self.predictor[-1].bias, math.log(c / (1 - c)))
        self.prepare_merging()

    def choose(self, kind, x, h, state):
        """phi (Eq. 3): the Decision of step h about the tokens x (M, C).

        state: a dict that lives for one pass through the chunk, with router states and who exited.
        """
        router, rule, N, K = ((self.router_a, self.rule_A, self.N_A, self.K_A) if kind == 'A' else
                              (self.router_f, self.rule_F, self.N_F, self.K_F))
        if rule != 'routed':  # all tokens take module i, with weight 1
            i = h if rule == 'each' else 0
            if rule == 'listed':
                i = self.plan.layers_A.index(self.cfg.c_share[h])
            return Decision(kind, h, N, None, None, None, [i])
        r, state[kind] = router(x, state.get(kind), h)
        if self.phi in ONE_OR_SKIP:  # of all scores two: entry 0 is module h, entry 1 is SKIP
            r = torch.stack((r[:, h], r[:, N]), dim=1)
        ids, weights = top_k(r, K, self.cfg.router_weights, self.cfg.tau)
        if self.phi == 'early_exit':
            state['gone'] = (ids == 1) | state.get('gone', False)
            ids = ids.masked_fill(state['gone'], 1)
        aux = None
        if self.cfg.balance and self.training:
            tau = self.cfg.tau if self.cfg.router_weights == 'softmax' else 1.0
            aux = self.cfg.balance * balance_loss(r, ids, tau)
        if self.phi in ONE_OR_SKIP:
            ids = torch.where(ids == 0, h, N)
        return self.decision(kind, h, ids, weights, x, aux)

    def decision(self, kind, h, ids, weights, x, aux=None):
        """The Decision that tokens x (M, C) take picks ids (M, K), with these weights (M, K)."""
        N = self.N_A if kind == 'A' else self.N_F
        rows = sort_picks(ids, N, N + self.cfg.skip, x)
        return Decision(kind, h, N, ids, weights, aux, rows)

    def steps(self, x, cache=None, first_step=0, count=None):
        """Eq. 4, H times: x (B, T, C) -> (B, T, C) and Decisions. For decoding see forward."""
        B, T, C = x.shape
        x = x.reshape(B * T, C)
        pools = cache.pools(self, x, first_step) if cache else self.pools(x)
        state, decisions = {}, []  # no state yet: s_0 = 0
        for h in range(self.H):
            d_A = self.choose('A', x, h, state)
            a = attend(self.qkv(pools, x, d_A), self.cfg.n_head, B, cache, first_step + h, count)
            u = x + assemble(attn_out, pools.attn, a, d_A)  # u = x + F^A(x), Eq. 5
            d_F = self.choose('F', u, h, state)
            x = u + assemble(ffn, pools.ffn, u, d_F)        # x = u + F^F(u), Eq. 6
            decisions += [d for d in (d_A, d_F) if d.ids is not None]
        return x.view(B, T, C), decisions

    def qkv(self, pools, x, d):
        """The inner, unweighted sums of Eq. 5: tokens x (M, C) -> their q, k, v (M, 3C).

        The first return is Eq. 5 as written. The second gets the same from merged matrices.
        """
        if pools.merged is None:
            return assemble(attn_in, pools.attn, x, d, weighted=self.cfg.weigh_qkv)
        return assemble(merged_qkv, pools.merged, norm(x), self.by_subset(x, d))

    def on_chosen_tokens(self, x, cache=None, first_step=0, count=None):
        """Mixture-of-depths (Raposo et al. 2024): the block sees some tokens, the others pass by.

        In training these are the tokens with the highest scores, `capacity` of each sequence. That
        looks at the future. So in eval mode, and in generation, a predictor says for each token by
        itself whether it would have been among them. It learns beside the model, from a
        cross-entropy that sends no gradient into it.
        """
        B, T, C = x.shape
        score = self.router_t(x.reshape(B * T, C), None, 0)[0].view(B, T, 1)
        member = self.predictor(x.detach().to(score.dtype)).squeeze(-1)  # (B, T), a logit
        aux = None
        if self.training:
            most = max(1, round(self.cfg.capacity * T))
            best = score.squeeze(-1).topk(most, dim=1).indices
            chosen = torch.zeros_like(member, dtype=torch.bool).scatter(1, best, True)
            aux = F.binary_cross_entropy_with_logits(member, chosen.to(member.dtype))
        else:
            chosen = member > 0
            if count is not None:  # what stands after the first `count` tokens is padding
                chosen = chosen & (torch.arange(T, device=x.device) < count.unsqueeze(1))
            most = max(1, int(chosen.sum(1).max()))
        # The chosen ones of each sequence in their order, then others, where it has fewer. They
        # come last, so no chosen token attends to them, and their update is multiplied by 0.
        rows = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        rows = rows.unsqueeze(-1).expand(-1, -1, C)  # (B, most, C)
        part = x.gather(1, rows)
        y, _ = self.steps(part, cache, first_step, chosen.sum(1))
        update = torch.zeros_like(x).scatter(1, rows, y - part)
        x = x + (score * chosen.unsqueeze(-1)).to(x.dtype) * update
        ids = 1 - chosen.int().view(-1, 1)  # 0 the block, 1 SKIP
        return x, [Decision('T', 0, 1, ids, score.view(-1, 1), aux, None)]

    def forward(self, x, cache=None, first_step=0, count=None):
        """x (B, T, C) -> (B, T, C) and Decisions.

        cache: in decoding, a sample.Cache; first_step: the number of this chunk's first step in it;
        count (B,): the first `count` of the T tokens of a sequence are real (None: all are).
        """
        run = self.on_chosen_tokens if self.phi == 'mod' else self.steps
        return run(x, cache, first_step, count)

    # Merging by subset: see fused routing.

    def prepare_merging(self):
        """Set self.S: how many subsets of attention modules can be picked; 0 does not merge."""
        self.S, N = 0, self.N_A
        few = N <= 16  # subset_numbers has 2^N entries
        if self.phi == 'mom' and self.K_A > 1 and not self.cfg.weigh_qkv and few:
            sets = subsets(N, self.K_A, self.cfg.skip)
            if len(sets) <= MOST_SUBSETS:
                self.S = len(sets)
                members = [[float(i in one) for i in range(N)] for one in sets]  # (S, N)
                self.register_buffer('subset', subset_numbers(sets, N), persistent=False)
                self.register_buffer('incidence', torch.tensor(members), persistent=False)

    def by_subset(self, x, d):
        """A Decision about modules -> the same about their subsets: every token takes one of S."""
        bits = (1 << d.ids).masked_fill(d.ids == d.N, 0).sum(1, keepdim=True)
        number = self.subset[bits]  # (M, 1)
        rows = sort_picks(number, self.S, self.S, x)
        return d._replace(N=self.S, ids=number, weights=None, rows=rows)

    def pools(self, x, keep=False):
        """The modules as one forward pass over x (M, C) uses them -> Pools.

        keep: they will be used again and again without gradients, so that merging always pays.
        """
        attn, merged = self.attn.stack(), None
        # Merging writes S matrices once; then each step multiplies a token by one matrix, not by K.
        # It pays, by rule of thumb, if it spares 256 products of a token and a matrix for each one
        # that is written.
        if self.S and (keep or len(x) * self.H * (self.K_A - 1) >= 256 * self.S):
            merged = merge(attn, self.incidence.to(attn.qkv_w.dtype))
        dtype = grouped_dtype(x)
        ffns = unstack(self.ffn.stack(), dtype)
        return Pools(unstack(attn, dtype), merged and unstack(merged, dtype), ffns)


# ----------------------------------------------------------------------------- the model

class GPT(nn.Module):
    """GPT-2, vanilla or assembled, with its head tied to the token embedding."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False  # True: keep the chunks' inputs only, and compute the rest again
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.chunks = nn.ModuleList(Chunk(cfg, plan) for plan in cfg.plans)
        self.ln_f = nn.LayerNorm(cfg.n_embd)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        embeddings, qkv_w, fc_w   normal(0, std): 0.02 as GPT-2; below its width 0.02 sqrt(768 / C)
        out_w, proj_w             normal(0, std / sqrt(2 * depth)): two are added at each step
        LayerNorm                 weight 1, bias 0; other biases 0
        routers                   PyTorch's defaults, uniform(+-1/sqrt(R)) for the GRU
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
                elif name in ('out_w', 'proj_w'):
                    nn.init.normal_(p, std=std / math.sqrt(2 * self.cfg.depth))
                else:
                    nn.init.normal_(p, std=std)

    def features(self, idx, cache=None, count=None):
        """Token ids (B, T) -> what the head sees, (B, T, C), and the Decisions of each chunk.

        With a cache (sample.Cache) idx holds the tokens that follow those in it. count (B,): the
        first `count` of a row's tokens are real; to be given from the first call on if rows differ
        in length. Raises ValueError if a sequence is longer than block_size.
        """
        T = idx.size(1)
        end = T + (cache.length if cache else 0)
        if end > self.cfg.block_size:
            raise ValueError(f'a sequence of {end} tokens is longer than '
                             f'block_size={self.cfg.block_size}: cut it')
        at = cache.positions(T, count) if cache else torch.arange(T, device=idx.device)
        x = self.wte(idx) + self.wpe(at)
        step, decisions = 0, []
        for chunk in self.chunks:
            if self.checkpointing and torch.is_grad_enabled() and cache is None:
                x, decided = checkpoint(chunk, x, use_reentrant=False)
            else:
                x, decided = chunk(x, cache, step, count)
            decisions.append(decided)
            step += chunk.H
        return self.ln_f(x), decisions

    def loss(self, x, targets):
        """Features x (B, T, C), targets (B, T) int64 -> mean cross-entropy in nats per token.

        A target of -100 counts for nothing; without any other the loss is 0. Logits exist for a
        part of the tokens at a time, at most 2^25 numbers.
        """
        x, targets, w = x.flatten(0, 1), targets.flatten(), self.wte.weight
        rows = max(1, 2 ** 25 // self.cfg.vocab_size)
        if torch.is_grad_enabled() and len(x) > rows:
            total = LossInParts.apply(x, w, targets, rows)
        else:
            total = sum(cross_entropy(F.linear(some, w), its)
                        for some, its in zip(x.split(rows), targets.split(rows)))
        return total / counted(targets)

    def forward(self, idx, targets=None, want_logits=True):
        """idx (B, T) int64 -> logits (B, T, V), mean cross-entropy in nats per token or None.

        targets (B, T) int64; -100 counts for nothing. want_logits=False gives None for the logits
        and saves their memory. In training mode the auxiliary losses (`balance`, the predictor of
        MoD) add their gradients to the loss, not their values: what is printed stays the
        cross-entropy.
        """
        x, decisions = self.features(idx)
        logits = F.linear(x, self.wte.weight) if want_logits else None
        if targets is None:
            return logits, None
        if want_logits:
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten()) / counted(targets)
        else:
            loss = self.loss(x, targets)
        for decision in itertools.chain(*decisions):
            if decision.aux is not None:
                loss = loss + (decision.aux - decision.aux.detach())
        return logits, loss

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, beams=1,
                 stop=None, lengths=None, vocab=None):
        """Continue each row of idx (B, T) by max_new_tokens tokens; see sample.generate."""
        from sample import generate
        return generate(self, idx, max_new_tokens, temperature, top_k, top_p, beams, stop,
                        lengths, vocab)

    @classmethod
    def from_pretrained(cls, source, **overrides):
        """A model from weights, fields of MoMConfig overridden; see weights.from_pretrained."""
        from weights import from_pretrained
        return from_pretrained(source, **overrides)

    def cast(self, dtype):
        """All weights in dtype, for inference, except those of the routers. Returns self."""
        for name, p in self.named_parameters():
            if not is_router(name):
                p.data = p.data.to(dtype)
        return self

    def fingerprint(self):
        """SHA-256 of the settings and all weights: did two runs begin, or end, alike?"""
        digest = hashlib.sha256(repr(asdict(self.cfg)).encode())
        for w in self.state_dict().values():
            digest.update(w.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def num_params(self):
        """(all parameters, those of the routers); the tied head counts once."""
        sizes = {name: p.numel() for name, p in self.named_parameters()}
        return sum(sizes.values()), sum(n for name, n in sizes.items() if is_router(name))

    def flops_per_token(self, T, k_a=None, k_f=None, merged=False):
        """Forward FLOPs per token at length T: 2 per multiply-add, attention over the full T, head
        included.

        k_a, k_f: attention and feed-forward modules that a token takes at a routed step, on average
        (K if not given; SKIP costs nothing); under MoD, the share of the tokens that are chosen.
        merged: q, k, v by one matrix a token where subsets are merged, as computed here, not by the
        K that the method adds up; the merging itself does not grow with the tokens and is left out.
        LayerNorms, GELU and sums are not counted. Training costs three times as much.
        """
        C, R, total = self.cfg.n_embd, self.cfg.router_dim, 0
        for chunk in self.chunks:
            a, f, seen = 1, 1, T  # modules of a step; tokens that attend to each other
            for router in (chunk.router_a, chunk.router_f, chunk.router_t):
                if router:
                    E = router.E
                    of_kind = {'gru': 3 * R * (C + R) + R * E, 'mlp': R * (C + E), 'linear': C * E}
                    total += 2 * chunk.H * of_kind[self.cfg.router]
            if chunk.router_a:
                a = min(chunk.K_A, chunk.N_A) if k_a is None else k_a
            if chunk.router_f:
                f = min(chunk.K_F, chunk.N_F) if k_f is None else k_f
            if chunk.router_t:
                a = f = self.cfg.capacity if k_a is None else k_a
                seen = a * a * T
                total += 2 * R * (C + 1)  # the predictor
            products = 1 if merged and chunk.S else a  # of q, k, v
            total += chunk.H * ((6 * products + 2 * a + 16 * f) * C * C + 4 * seen * C)
        return total + 2 * C * self.cfg.vocab_size

    def param_groups(self, weight_decay):
        """For AdamW: matrices and embeddings decay, LayerNorms and biases do not."""
        decay, keep = [], []
        for name, p in self.named_parameters():
            vector = name.endswith(('_b', 'ln_w', 'bias')) or p.ndim < 2
            (keep if vector else decay).append(p)
        return [{'params': decay, 'weight_decay': weight_decay},
                {'params': keep, 'weight_decay': 0.0}]


def is_router(name):  # of a parameter
    return '.router_' in name or '.predictor.' in name


class LossInParts(torch.autograd.Function):
    """cross_entropy(x w^T, targets) and its gradients, part by part: x (M, C), w (V, C).

    The gradients are computed with the loss, so that logits are not kept or made twice.
    torch 2.13's F.linear_cross_entropy does as much, but ends the graph of torch.compile.
    """

    @staticmethod
    def forward(ctx, x, w, targets, rows):
        total, grad_x, grad_w = 0, torch.empty_like(x), None
        for at in range(0, len(x), rows):
            some, its = x[at:at + rows], targets[at:at + rows, None]
            logits = some @ w.t()
            p = logits.to(torch.promote_types(logits.dtype, torch.float32))     # (rows, V)
            counts, its = its != -100, its.clamp(min=0)                         # (rows, 1)
            right = p.sub_(p.amax(-1, keepdim=True)).gather(1, its)
            sums = p.exp_().sum(-1, keepdim=True)
            total = total + ((sums.log() - right) * counts).sum()
            # The gradient of the logits is softmax - 1 at the target.
            p.mul_(counts / sums).scatter_add_(1, its, -counts.to(p.dtype))
            grad_x[at:at + rows] = p @ w
            part = (p.t() @ some).to(w.dtype)
            grad_w = part if grad_w is None else grad_w.add_(part)
        ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError('LossInParts has no second derivatives: take the loss of the logits')
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None, None


def balance_loss(r, ids, tau):
    """Switch Transformers' loss (Fedus et al. 2022): E * sum of share * probability.

    share: the part of the picks ids (M, K) that fell on an entry; probability: the mean of
    softmax(r / tau) over the tokens, r (M, E). It is 1 when all entries are picked alike, and more
    when picks and probabilities pile up on the same entries.
    """
    share = F.one_hot(ids, r.size(1)).to(r.dtype).mean(dim=(0, 1))
    return r.size(1) * (share * (r / tau).softmax(-1).mean(dim=0)).sum()


def cross_entropy(logits, targets):
    """Logits (M, V), targets (M,) -> the sum over tokens, in nats and in fp32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction='sum')  # -100 counts for nothing


def counted(targets):  # how many of them count, at least 1
    return (targets != -100).sum().clamp(min=1)


# ----------------------------------------------------------------------------- fused routing
# each_pick applies to every token the modules that it picked; nothing above depends on how. Here it
# is done fast, in two ways. Rows that take the same module are put side by side, so that each
# module is one matrix product over all of its rows. And since Eq. 5 adds q, k and v up without
# weights, the modules of a subset are merged into one matrix.

MOST_SUBSETS = 40  # for which q, k, v are merged: all K of N = 4, K2S of N = 6 (21), of N = 8 (36)

# The modules of a pool, one by one and as a stack for products that take all of them at once.
Modules = namedtuple('Modules', 'each stack')
Pools = namedtuple('Pools', 'attn merged ffn')  # of a chunk, each a Modules; merged may be None
Merged = namedtuple('Merged', 'qkv_w qkv_b')    # one for each subset of the attention modules

# P = M K rows, one for each pick, sorted by module. token (P,): sorted row -> the token it is of;
# inverse (P,): row -> sorted row; sizes: how many rows each module has, and last those of SKIP.
Sorted = namedtuple('Sorted', 'token inverse sizes')
# The same where only the device knows the sizes. module (P,): of each sorted row; member (N, P):
# that as 0 and 1; ends (N,): where the rows of each module end; idle (P, 1): which rows are SKIP's.
SortedOnDevice = namedtuple('SortedOnDevice', 'token inverse module member ends idle')
Grouped = namedtuple('Grouped', 'stack rows')  # a parameter (N, ...), its SortedOnDevice


def unstack(stack, dtype):
    """A named tuple of (N, ...) -> Modules. dtype: of the stack's matrices; None for no stack."""
    # Once per forward pass: the backward of unbind is one stack, with zeros for unchosen modules. A
    # single module is a view, whose backward copies nothing.
    apart = (p.unbind(0) if len(p) > 1 else [p.squeeze(0)] for p in stack)
    each = [type(stack)(*parameters) for parameters in zip(*apart)]
    if dtype is None:
        return Modules(each, None)
    return Modules(each, type(stack)(*(p.to(dtype) if p.ndim == 3 else p for p in stack)))


def sort_picks(ids, N, E, x):
    """How picks ids (M, K) of E entries are carried out for tokens x (M, C). N stands for SKIP.

    A list of modules, if all tokens take the same; else the rows sorted.
    """
    if ids.size(1) == E:  # all there are, in their order: see top_k
        return list(range(E))
    on_device = grouped_dtype(x) is not None
    if len(ids) == 1 and not on_device and not torch.is_grad_enabled():  # one token, in decoding
        return ids[0].tolist()
    return sort_rows(ids, N, on_device)


def sort_rows(ids, N, on_device):
    """Sort the M K picks ids by module -> Sorted, or SortedOnDevice, which does not wait for it."""
    K = ids.size(1)
    # A GPU sorts a few bits at a time: 16-bit keys, not 64, save most of 21 kernels.
    module, order = ids.flatten().short().sort(stable=True)
    rows = torch.arange(len(order), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    modules = torch.arange(N, dtype=module.dtype, device=module.device)
    ends = torch.searchsorted(module, modules, right=True, out_int32=True)
    if on_device:
        member = (module == modules.unsqueeze(1)).float()
        idle = (module == N).unsqueeze(1)
        module = module.clamp(max=N - 1).int()
        return SortedOnDevice(order // K, inverse, module, member, ends, idle)
    ends = [0, *ends.tolist(), len(order)]
    return Sorted(order // K, inverse, [end - start for start, end in itertools.pairwise(ends)])


def each_pick(fn, modules, x, rows, N):
    """[(k, y)]: y (M, out) is what fn makes of x (M, in) with the k-th picks of all tokens.

    SKIP gives zeros. Picks that are SKIP for all tokens may be left out, but for one.
    """
    if isinstance(rows, list):
        picks = [(k, fn(modules.each[i], x)) for k, i in enumerate(rows) if i < N]
        if not picks:  # one token that skips
            width = fn(modules.each[0], x[:0]).size(1)
            return [(0, x.new_zeros(len(x), width))]
        return picks
    y = by_module(fn, modules, x.index_select(0, rows.token), rows)   # (M K, out), sorted
    y = y.index_select(0, rows.inverse).view(len(x), -1, y.size(1))   # (M, K, out)
    return list(enumerate(y.unbind(1)))


def by_module(fn, modules, x, rows):
    """fn(module, its rows) of every module: x (P, in), sorted -> (P, out). SKIP's rows are 0."""
    if isinstance(rows, SortedOnDevice):
        stack = modules.stack
        return fn(type(stack)(*(Grouped(p, rows) for p in stack)), x)
    *parts, idle = x.split(rows.sizes)
    # In training a module that no token chose still multiplies its zero rows: its gradient is zero,
    # not missing. The first one always does; it says how wide the rows of SKIP are.
    y = [fn(m, part) for i, (m, part) in enumerate(zip(modules.each, parts))
         if len(part) or i == 0 or torch.is_grad_enabled()]
    if len(idle):
        y.append(y[0].new_zeros(len(idle), y[0].size(1)))
    return torch.cat(y)


# Products of several modules at once, on GPUs.

def has_grouped_mm(device, C):
    """Whether F.grouped_mm is one kernel there, which never waits to hear how large the groups are.

    So it is in bf16 on Hopper (H100, H200), at widths C that are multiples of 8. On older cards it
    is a loop that waits at every call, and on Blackwell gradients of empty groups are garbage
    (github.com/pytorch/pytorch/issues/172439).
    """
    nvidia = device.type == 'cuda' and not torch.version.hip  # AMD's MI300 is 9.4 there
    return nvidia and torch.cuda.get_device_properties(device).major == 9 and C % 8 == 0


def grouped_dtype(x):
    """The type in which F.grouped_mm multiplies rows x (M, C); None: one product per module."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return dtype if dtype == torch.bfloat16 and has_grouped_mm(x.device, x.size(-1)) else None


def grouped_norm(x, w, b):  # x (P, C), sorted by module; w, b: Grouped (N, C)
    return norm(x) * OfRows.apply(w.stack, w.rows) + OfRows.apply(b.stack, b.rows)


def grouped_linear(x, w, b):  # x (P, in), w: Grouped (N, in, out), b: Grouped (N, out) -> (P, out)
    # F.grouped_mm leaves the rows past its last group uninitialised, in its output and in the
    # gradient of its input, and 0 * nan is nan: they are masked on both sides.
    idle, x = w.rows.idle, x.to(w.stack.dtype)
    y = F.grouped_mm(x.masked_fill(idle, 0), w.stack, offs=w.rows.ends)
    return y.add_(OfRows.apply(b.stack, b.rows)).masked_fill_(idle, 0)


class OfRows(torch.autograd.Function):
    """vectors (N, D) -> (P, D): of each sorted row its module's vector.

    The gradient sums thousands of rows in fp32, as one product. That of indexing would add one row
    after another, and that of an embedding launches 31 kernels.
    """

    @staticmethod
    def forward(ctx, vectors, rows):
        ctx.save_for_backward(rows.member)
        return vectors.index_select(0, rows.module)

    @staticmethod
    def backward(ctx, grad):
        member, = ctx.saved_tensors
        return member.to(grad.dtype) @ grad, None


# Merging by subset.

def subsets(N, K, skip):
    """All sets that K picks of N modules (and SKIP) can leave: K modules, or K - 1 beside SKIP."""
    sizes = sorted({min(K, N), K - skip})
    return [one for size in sizes for one in itertools.combinations(range(N), size)]


def subset_numbers(sets, N):
    """(2^N,): a set of modules, as bits -> its place in sets, len(sets) if it is not there."""
    numbers = torch.full((2 ** N,), len(sets))
    for number, one in enumerate(sets):
        numbers[sum(2 ** i for i in one)] = number
    return numbers


def merge(m, incidence):
    """A stack of N attention modules -> a stack of S Merged: q, k, v of a subset as one matrix.

    incidence (S, N): 1 where a subset has the module, else 0.
    Eq. 5 adds them up without weights. With x^ = (x - mean) / std, and g_k, c_k the gain and bias
    of LN_k, sum_k (LN_k(x) W_k + b_k) = x^ (sum_k diag(g_k) W_k) + sum_k (c_k W_k + b_k).
    """
    with torch.autocast(m.qkv_w.device.type, enabled=False):
        w = m.ln_w.unsqueeze(-1) * m.qkv_w                              # (N, C, 3C)
        b = m.qkv_b + (m.ln_b.unsqueeze(1) @ m.qkv_w).squeeze(1)        # (N, 3C)
        return Merged((incidence @ w.flatten(1)).view(-1, *w.shape[1:]), incidence @ b)


def merged_qkv(m, x):  # x (M, C), normalised -> (M, 3C). m: a Merged, LayerNorms' gains in it
    return linear(x, m.qkv_w, m.qkv_b)


def gru(cell, x, s):
    """torch.nn.GRUCell for inputs x (M, C), states s (M, R) or None for 0 -> next states (M, R).

    It is written out where torch's own is in the way: its kernel on a GPU breaks torch.compile's
    graph (github.com/pytorch/pytorch/issues/191153), and in decoding, of few rows, it would read
    weight_hh for a state of 0.
    """
    first = s is None and len(x) <= 64 and not torch.is_grad_enabled()
    if not first and not torch.compiler.is_compiling():
        return cell(x, s)
    if s is None and torch.is_grad_enabled():
        s = x.new_zeros(1, cell.hidden_size)  # one row: so weight_hh has a gradient, of zeros
    i = F.linear(x, cell.weight_ih, cell.bias_ih)
    h = cell.bias_hh if s is None else F.linear(s, cell.weight_hh, cell.bias_hh)
    i_reset, i_update, i_new = i.chunk(3, dim=-1)
    h_reset, h_update, h_new = h.chunk(3, dim=-1)
    new = torch.tanh(i_new + torch.sigmoid(i_reset + h_reset) * h_new)
    update = torch.sigmoid(i_update + h_update)
    return new - update * new if s is None else torch.lerp(new, s, update)


# ----------------------------------------------------------------------------- checks of settings

def need(condition, sentence):
    if not condition:
        raise ValueError(sentence)


def check(cfg):
    """Raises ValueError, naming the fix, for settings that make no model."""
    def one_of(key, known):
        value = getattr(cfg, key)
        need(value in known, f'{key}={value!r} must be one of {", ".join(known)}')

    need(re.fullmatch('[1-9][0-9]*(-[1-9][0-9]*)*', cfg.chunks, re.ASCII),
         f"chunks={cfg.chunks!r} must be positive numbers joined by '-', such as '1-1-4-1-4-1'")
    for key in 'K', 'H', 'experts', 'n_embd', 'n_head', 'block_size', 'vocab_size', 'router_dim':
        need(getattr(cfg, key) >= 1, f'{key}={getattr(cfg, key)} must be at least 1')
    need(cfg.n_embd % cfg.n_head == 0,
         f'n_embd={cfg.n_embd} must be a multiple of n_head={cfg.n_head}')
    one_of('phi', [phi for phi in PHI if phi != 'vanilla'])
    one_of('router', ['gru', 'mlp', 'linear'])
    one_of('router_weights', ['linear', 'softmax'])
    one_of('router_start', ['fresh', 'layers'])
    need(0 < cfg.tau < math.inf, f'tau={cfg.tau} must be a number above 0')
    need(0 <= cfg.balance < math.inf, f'balance={cfg.balance} must be a number of at least 0')
    need(0 < cfg.capacity <= 1,
         f'capacity={cfg.capacity} is a share of the tokens: 0 < capacity <= 1')

    phi, sizes = cfg.phi, cfg.sizes
    if cfg.router_start == 'layers':
        need(phi == 'mom' and cfg.router != 'linear' and cfg.router_weights == 'linear',
             "router_start='layers' begins with scores of 1 for weights: it goes with phi='mom', "
             f"router='gru' or 'mlp' and router_weights='linear', not with phi={phi!r}, "
             f'router={cfg.router!r} and router_weights={cfg.router_weights!r}')
        need(cfg.K == 1 or cfg.weigh_qkv,
             "router_start='layers' with K > 1 needs weigh_qkv=True: unweighted, as in Eq. 5, the "
             'second module that a token takes would change its q, k, v at full strength')
    need(phi == 'mom' or not cfg.weigh_qkv, f"weigh_qkv=True goes with phi='mom', not with {phi!r}")
    need(phi == 'mom' or not cfg.tied,
         f"tied=True (MoM-same) goes with phi='mom'; to share under {phi!r}, see phi='share'")
    need(phi not in ('mod', 'share') or not cfg.balance and cfg.router_weights == 'linear',
         'balance and router_weights are for routers that choose modules: leave them out with '
         f'phi={phi!r}')
    need(phi not in ('moe', 'mod') or max(sizes) == 1,
         f"phi={phi!r} works layer by layer: chunks={cfg.chunks!r} must be "
         f"'{'-'.join('1' * sum(sizes))}'")
    if phi == 'share' and max(sizes) > 1:
        N = min(n for n in sizes if n > 1)
        need(cfg.c_share and all(type(i) is int and 0 <= i < N for i in cfg.c_share),
             f"phi='share' needs the module of each step: c_share={cfg.c_share} must be a list of "
             f'whole numbers from 0 to {N - 1}, such as {[i // 2 * 2 for i in range(N)]}')
    need(phi not in (*ONE_OR_SKIP, 'share', 'mod') or cfg.K == 1 or cfg.vanilla,
         f'phi={phi!r} applies one module at a step: K={cfg.K} must be K=1')
    need(phi not in ONE_OR_SKIP or cfg.skip,
         f'phi={phi!r} chooses between a module and SKIP: it needs skip=True')
    need(phi == 'mom' or not cfg.vanilla,
         f'phi={phi!r} finds nothing to route in chunks={cfg.chunks!r}: take a chunk of several '
         "layers, such as '1-4-1'; for 'mod', which routes every other block, more blocks")
    for plan, N in zip(cfg.plans, sizes):
        if plan.phi == 'vanilla':
            continue
        for key in 'A', 'F':
            check_pool(cfg, key, N)
        if 'routed' in PHI[phi]:
            check_picks(cfg, plan)


def check_pool(cfg, kind, N):
    """Which modules of a chunk of N are kept."""
    first, keep = getattr(cfg, f'N_{kind}'), getattr(cfg, f'keep_{kind}')
    need(not (first and keep),
         f'N_{kind}={first} and keep_{kind}={keep} say the same thing: give one of them')
    need(0 <= first <= N,
         f'N_{kind}={first}: a chunk of {N} modules can keep 1 to {N} of them, or 0 for all')
    known = all(type(i) is int and 0 <= i < N for i in keep)
    need(known and len(set(keep)) == len(keep),
         f'keep_{kind}={keep} must name different modules of a chunk of {N}: 0 to {N - 1}')
    needs_all = cfg.phi in (*ONE_OR_SKIP, 'share') or cfg.phi == 'moe_share' and kind == 'A'
    need(not needs_all or keep in ([], list(range(N))) and first in (0, N),
         f'phi={cfg.phi!r} says by itself which modules it applies: leave N_{kind} and '
         f'keep_{kind} out')


def check_picks(cfg, plan):
    """How many entries a router picks."""
    routed = [N for rule, N in zip(PHI[cfg.phi], (plan.N_A, plan.N_F)) if rule == 'routed']
    most = max(routed) + cfg.skip
    need(cfg.K <= most,
         f'K={cfg.K} is more than a pool of {max(routed)} modules{" and SKIP" * cfg.skip} offers: '
         f'take K <= {most} or larger pools')
    fewest = min(cfg.K, min(routed) + cfg.skip)
    need(cfg.router_weights != 'softmax' or fewest > 1,
         "router_weights='softmax' divides by the sum over the selected: where one entry is picked "
         'its weight is 1, and the router gets no gradient. Take K >= 2, larger pools or '
         "router_weights='linear'")
