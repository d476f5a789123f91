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
import hashlib
import itertools
import math
from collections import namedtuple
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MOST_SUBSETS = 40  # up to here q, k, v are merged: all K of N = 4, K2S of N = 6 (21) and of N = 8 (36)
PHI = ('mom', 'layer_skip', 'early_exit', 'share', 'moe', 'moe_share', 'mod')
Shape = namedtuple('Shape', 'phi H N_A N_F layers_A layers_F')  # of one chunk; see MoMConfig.shapes


@dataclass
class MoMConfig:
    """The shape of a model. Raises ValueError, naming the fix, for a combination that cannot be built."""
    chunks: str = '1-1-1-1-1-1-1-1-1-1-1-1'      # N of each chunk, in vanilla layers; 1 is a vanilla block
    phi: str = 'mom'                # mom, layer_skip, early_exit, share, moe, moe_share or mod
    K: int = 2                      # modules selected per token and step, SKIP among them
    H: int = 6                      # assembly steps of a chunk under 'mom'; 'share' has len(c_share), the others N
    skip: bool = True               # the "S" of K2H6S: routers may choose SKIP
    N_A: int = 0                    # attention modules kept of a chunk with N > 1, the first ones; 0 keeps all
    N_F: int = 0                    # feed-forward modules likewise. A pool with fewer than K selects all it has
    keep_A: list = field(default_factory=list)   # which attention modules to keep instead, such as [0,2]
    keep_F: list = field(default_factory=list)   # which feed-forward modules
    tied: bool = False              # all modules of a chunk are its first one ("MoM-same" of Table 2)
    c_share: list = field(default_factory=list)  # 'share': the module of each step, such as [0,0,1,1] (Eq. 10)
    experts: int = 4                # 'moe': feed-forward experts of a layer
    capacity: float = 0.125         # 'mod': share of a sequence's tokens that go through a routed block
    router: str = 'gru'             # 'gru' (Eq. 7), 'mlp' (Appendix D.1: two layers, no state) or 'linear' (Mixtral's)
    router_dim: int = 256           # R, the width of the router's state
    router_weights: str = 'linear'  # weight of a selected module: 'linear' = r (Eq. 5, 6), or 'softmax' of r / tau
    tau: float = 0.2                # temperature of the softmax weights
    router_start: str = 'fresh'     # 'fresh' (the paper's), or 'layers', which restores the layers; see Router
    balance: float = 0.0            # coefficient of the load-balancing loss; the paper found that it hurts (D.2)
    n_embd: int = 768               # width, C
    n_head: int = 12                # heads
    block_size: int = 1024          # longest sequence, in tokens
    vocab_size: int = 50257         # kinds of token

    def __post_init__(self):
        try:
            sizes = [int(n) for n in self.chunks.split('-')]
        except ValueError:
            sizes = []
        if not sizes or min(sizes) < 1:
            raise ValueError(f"chunks={self.chunks!r} must be positive numbers joined by '-', such as '1-1-4-1-4-1'")
        for key in ('K', 'H', 'experts', 'n_embd', 'n_head', 'block_size', 'vocab_size', 'router_dim'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)} must be at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}')
        for key, known in {'phi': PHI, 'router': ('gru', 'mlp', 'linear'),
                           'router_weights': ('linear', 'softmax'), 'router_start': ('fresh', 'layers')}.items():
            if getattr(self, key) not in known:
                raise ValueError(f'{key}={getattr(self, key)!r} must be one of {", ".join(known)}')
        if self.router_start == 'layers' and (
                self.phi != 'mom' or self.router == 'linear' or self.router_weights != 'linear'):
            raise ValueError("router_start='layers' begins with scores of 1 for weights: it goes with phi='mom', "
                             "router='gru' or 'mlp' and router_weights='linear', not with "
                             f"phi={self.phi!r}, router={self.router!r} and router_weights={self.router_weights!r}")
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
Merged = namedtuple('Merged', 'qkv_w qkv_b')  # q, k, v of several attention modules, summed


class Pool(nn.Module):
    """The N modules of one kind of a chunk. Weights are stored (in, out), as GPT-2's, and used as x @ W + b."""

    def __init__(self, kind, stored, N, *shapes):
        super().__init__()
        self.kind, self.N = kind, N
        for name, shape in zip(kind._fields, shapes):
            self.register_parameter(name, nn.Parameter(torch.empty(stored, *shape)))

    def stack(self):
        """All modules as one: a named tuple of (N, ...). Tied modules are stored once and expanded."""
        return self.kind(*(getattr(self, f).expand(self.N, *getattr(self, f).shape[1:]) for f in self.kind._fields))


def attention_pool(stored, N, C):
    return Pool(Attention, stored, N, (C,), (C,), (C, 3 * C), (3 * C,), (C, C), (C,))


def ffn_pool(stored, N, C):
    return Pool(FeedForward, stored, N, (C,), (C,), (C, 4 * C), (4 * C,), (4 * C, C), (C,))


# What modules do to rows x. m is one module; or, with a plan (see sort_rows), a stack of them, each for its own rows.

def norm(m, x, plan=None):  # each module has its own LayerNorm ("Add & Norm" belongs to the module)
    if plan is None:
        return F.layer_norm(x, x.shape[-1:], m.ln_w, m.ln_b, eps=1e-5)
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) * OfRows.apply(m.ln_w, plan) + OfRows.apply(m.ln_b, plan)


class OfRows(torch.autograd.Function):
    """vectors (G, D), plan -> (R, D): of each row its group's vector. The gradient sums thousands of rows, in the type
    of the vectors, fp32: as one product. Indexing would add one row after another, an embedding launch 31 kernels."""

    @staticmethod
    def forward(ctx, vectors, plan):
        ctx.save_for_backward(plan.member)
        return vectors.index_select(0, plan.group)

    @staticmethod
    def backward(ctx, grad):
        member, = ctx.saved_tensors
        return member.to(grad.dtype) @ grad, None


def few_rows(x, w):
    """x @ w, (M, in) @ (in, out). For a few rows, in decoding, a CPU in fp32 is done when it has read w; eight products
    over parts of it read at up to twice the speed of one."""
    (M, C), D = x.shape, w.size(1)
    if x.device.type == 'cpu' and 0 < M <= 16 and x.dtype == w.dtype == torch.float32:
        if C % 8 == 0 and w.is_contiguous():           # parts of the inner dimension, which add up
            return torch.bmm(x.view(M, 8, C // 8).transpose(0, 1), w.view(8, C // 8, D)).sum(0)
        if D % 8 == 0 and w.t().is_contiguous():       # stored (out, in), as torch's own layers do: parts of the outer
            parts = w.t().view(8, D // 8, C).transpose(1, 2)
            return torch.bmm(x.expand(8, M, C), parts).transpose(0, 1).reshape(M, D)
    return x @ w


def linear(x, w, b, plan=None):
    if plan is None:
        if len(x) > 16:
            return torch.addmm(b, x, w)
        y = few_rows(x, w)
        return y + b.to(y.dtype)
    # F.grouped_mm leaves the rows past its last group uninitialised, in its output and in the gradient of its input,
    # and 0 * nan is nan: they are masked on both sides, never multiplied by 0.
    y = F.grouped_mm(x.to(w.dtype).masked_fill(plan.idle, 0), w, offs=plan.ends)
    return y.add_(OfRows.apply(b, plan)).masked_fill_(plan.idle, 0)


def qkv_in(m, x, plan=None):  # (M, C) -> (M, 3C): the q, k and v that attention module m makes
    return linear(norm(m, x, plan), m.qkv_w, m.qkv_b, plan)


def qkv_merged(m, x, plan=None):  # (M, C), normalised -> (M, 3C): the sum of the q, k, v of a subset of modules
    return linear(x, m.qkv_w, m.qkv_b, plan)


def attn_out(m, a, plan=None):  # (M, C) -> (M, C)
    return linear(a, m.out_w, m.out_b, plan)


def ffn(m, u, plan=None):  # (M, C) -> (M, C). GPT-2's GELU is the tanh form; erf differs by up to 5e-4
    hidden = F.gelu(linear(norm(m, u, plan), m.fc_w, m.fc_b, plan), approximate='tanh')
    return linear(hidden, m.proj_w, m.proj_b, plan)


# ----------------------------------------------------------------------------- router

class Router(nn.Module):
    """Scores the E entries of a pool, its modules and SKIP, for every token (Eq. 2, 7, 8).

    The input is the residual stream itself, not normalised. The state is per token and passes from one
    assembly step to the next; nothing flows between tokens. 'linear' is the gate of a Mixtral layer: one matrix
    per step, on the normalised stream, no state. Arithmetic stays in the weights' own type (fp32 in training)
    under autocast.

    router_start='layers', which is not the paper's: r = W s_h + b_h with a learned b_h for each step, which begins at 1
    for the modules whose turn it is and at 0 for all others, while W begins at a hundredth of its size. So phase two
    begins as the model that phase one ended with, if H >= N; see Chunk.qkv for the rest of it.
    """

    def __init__(self, cfg, E, H, N=1):
        super().__init__()
        C, R, self.E, self.bias = cfg.n_embd, cfg.router_dim, E, None
        self.gru = nn.GRUCell(C, R) if cfg.router == 'gru' else None
        self.mlp = nn.Linear(C, R) if cfg.router == 'mlp' else None
        self.gates = nn.Linear(C, H * E, bias=False) if cfg.router == 'linear' else None
        self.out = nn.Linear(R, E, bias=False) if self.gates is None else None  # W of Eq. 8; its last row scores SKIP
        if cfg.router_start == 'layers':
            self.out.weight.data.mul_(0.01)
            self.bias = nn.Parameter(torch.zeros(H, E))
            for i in range(N):  # with H > N some steps are nobody's, with H < N several modules share one
                self.bias.data[i * H // N, i] = 1

    def forward(self, x, s, h):
        """x (M, C), state s (M, R) or None at the first step, h the step -> scores r (M, E), next s."""
        with torch.autocast(x.device.type, enabled=False):
            if self.gates:
                W = self.gates.weight.view(-1, self.E, x.size(-1))[h]
                return F.linear(F.layer_norm(x.to(W.dtype), x.shape[-1:]), W), None
            x = x.to(self.out.weight.dtype)
            s = gru(self.gru, x, s) if self.gru else F.gelu(self.mlp(x), approximate='tanh')  # Eq. 7
            r = self.out(s)                                                                   # Eq. 8
            return r if self.bias is None else r + self.bias[h], s


def gru(cell, x, s):
    """torch.nn.GRUCell for inputs x (M, C) and states s (M, R) or None. Written out where torch's own is in the way:
    its kernel on a GPU breaks torch.compile's graph (pytorch issue 191153); for few rows in decoding see few_rows."""
    if not torch.compiler.is_compiling() and (len(x) > 16 or torch.is_grad_enabled()):
        return cell(x, s)
    i_reset, i_update, i_new = (few_rows(x, cell.weight_ih.t()) + cell.bias_ih).chunk(3, dim=-1)
    h = cell.bias_hh if s is None else few_rows(s, cell.weight_hh.t()) + cell.bias_hh
    h_reset, h_update, h_new = h.chunk(3, dim=-1)
    new = torch.tanh(i_new + torch.sigmoid(i_reset + h_reset) * h_new)
    update = torch.sigmoid(i_update + h_update)
    return new - update * new if s is None else torch.lerp(new, s, update)


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
# Rows that take the same module are put side by side, so that each module is one matrix product over all of its rows.

# What a router decided for M tokens at one step. kind: 'A' attention, 'F' feed-forward, 'T' which tokens (MoD).
# ids (M, K), where N is SKIP; weights (M, K); plan: how the M*K assignments sort by module, see assemble; aux: a loss.
Decision = namedtuple('Decision', 'kind step N ids weights plan aux')
# R rows sorted by group. token (R,): sorted row -> the token it is of; inverse: row -> sorted row. Then either sizes, a
# list: the rows of each group, and last those of no group; or, if only the device knows them, the group of each sorted
# row (R,), the same as a matrix of 0 and 1 (G, R), where each group ends (G,), and which rows are in no group (R, 1).
Plan = namedtuple('Plan', 'token inverse sizes group member ends idle')


def has_grouped_mm(device, C):
    """Whether F.grouped_mm is one kernel there, which never waits for the device to say how large the groups are: in
    bf16 on Hopper (H100, H200), at widths C that are multiples of 8. On older cards it is a loop that waits at every
    call, and on Blackwell gradients of empty groups are garbage (pytorch issue 172439)."""
    return device.type == 'cuda' and C % 8 == 0 and torch.cuda.get_device_properties(device).major == 9


def grouped_dtype(x):
    """The type in which F.grouped_mm shall multiply all groups of rows of x (M, C) at once, or None for one product per
    group."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return dtype if dtype == torch.bfloat16 and has_grouped_mm(x.device, x.size(-1)) else None


def sort_rows(group, G, on_device):
    """Sort rows by group (M, K) int64, K rows of each token, where G stands for no group -> Plan. on_device: leave the
    sizes there."""
    K = group.size(1)
    group, order = group.flatten().short().sort(stable=True)  # a GPU sorts a few bits at a time: of 64, in 21 kernels
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    groups = torch.arange(G, dtype=group.dtype, device=group.device)
    ends = torch.searchsorted(group, groups, right=True, out_int32=True)
    if on_device:
        member = (group == groups.unsqueeze(1)).float()
        return Plan(order // K, inverse, None, group.clamp(max=G - 1).int(), member, ends, (group == G).unsqueeze(1))
    ends = [0, *ends.tolist(), len(order)]
    return Plan(order // K, inverse, [end - start for start, end in itertools.pairwise(ends)], *[None] * 4)


def by_group(fn, pool, x, plan, width):
    """fn(module, rows) of every group: x (R, in), in the sorted order of `plan` -> (R, width), in the same order.
    Rows of no group give zeros."""
    modules, stack = pool
    if plan.sizes is None:
        return fn(stack, x, plan)
    *parts, idle = x.split(plan.sizes)
    # In training a module that no token chose still multiplies its zero rows: its gradient is zero, not missing.
    y = [fn(m, rows) for m, rows in zip(modules, parts) if len(rows) or torch.is_grad_enabled()]
    if len(idle):
        y.append(torch.zeros(len(idle), width, dtype=y[0].dtype if y else x.dtype, device=x.device))
    return y[0] if len(y) == 1 else torch.cat(y)


def assemble(fn, pool, x, d, weighted):
    """Sum over each token's own selection: sum_k fn(module_k, x), or sum_k r_k * fn(module_k, x) if weighted.

    fn: qkv_in, attn_out or ffn; pool: its modules; x (M, in); d: the Decision, or the number of the one module that
    all tokens take with weight 1. A token that selected only SKIP gets zeros.
    """
    modules, _ = pool
    if isinstance(d, int):
        return fn(modules[d], x)
    if d.plan is None:  # every token takes every module: nothing to sort
        weights = torch.zeros_like(d.weights).scatter(1, d.ids, d.weights)  # in the order of the modules
        y = [fn(m, x) for m in modules]
        return sum(one * weights[:, i:i + 1].to(one.dtype) if weighted else one for i, one in enumerate(y))
    K, width = d.ids.size(1), 3 * x.size(1) if fn is qkv_in else x.size(1)
    if isinstance(d.plan, list):  # one token, in decoding: the modules that it takes
        y = [fn(modules[i], x) * d.weights[:, k:k + 1].to(x.dtype) if weighted else fn(modules[i], x)
             for k, i in enumerate(d.plan) if i < d.N]
        return sum(y) if y else x.new_zeros(1, width)
    y = by_group(fn, pool, x.index_select(0, d.plan.token), d.plan, width)
    y = y.index_select(0, d.plan.inverse).view(len(x), K, -1)
    return (y * d.weights.unsqueeze(-1).to(y.dtype) if weighted else y).sum(1)


def subsets(N, K, skip):
    """All sets of modules that K picks of N modules (and SKIP) can leave: K of them, or K - 1 beside SKIP."""
    return [c for k in sorted({min(K, N), K - skip}) for c in itertools.combinations(range(N), k)]


def merge(m, incidence):
    """The q, k, v of subsets of modules as one matrix each. Eq. 5 adds them up without weights, so with
    x^ = (x - mean) / std, sum_k (LN_k(x) W_k + b_k) = x^ (sum_k diag(g_k) W_k) + sum_k (c_k W_k + b_k), where g_k, c_k
    are gain and bias of LN_k. m: a stack of N attention modules; incidence (S, N) of 0 and 1 -> a stack of S."""
    with torch.autocast(m.qkv_w.device.type, enabled=False):
        w = m.ln_w.unsqueeze(-1) * m.qkv_w                                    # (N, C, 3C)
        b = m.qkv_b + (m.ln_b.unsqueeze(1) @ m.qkv_w).squeeze(1)
        return Merged((incidence @ w.flatten(1)).view(-1, *w.shape[1:]), incidence @ b)


def attend(qkv, n_head, B, cache=None, step=0, count=None):
    """Causal softmax attention of Eq. 5 over assembled q, k, v. (M, 3C) -> (M, C); M is B sequences of T."""
    M, C = qkv.size(0), qkv.size(1) // 3
    q, k, v = qkv.view(B, M // B, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
    mask, causal = None, True
    if cache is not None:
        k, v, mask, causal = cache.extend(step, k, v, count)
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
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
        self.router_a = None if self.fixed_A else Router(cfg, shape.N_A + cfg.skip, shape.H, shape.N_A)
        self.router_f = None if self.fixed_F else Router(cfg, shape.N_F + cfg.skip, shape.H, shape.N_F)
        self.router_t = Router(cfg, 1, 1) if self.phi == 'mod' else None
        self.predictor = nn.Sequential(nn.Linear(C, R), nn.GELU(), nn.Linear(R, 1)) if self.phi == 'mod' else None
        self.S, K = 0, min(cfg.K, shape.N_A + cfg.skip)
        self.weighted_qkv = cfg.router_start == 'layers'
        mergeable = self.router_a and K > 1 and not self.weighted_qkv and shape.N_A <= 16
        if mergeable and len(subsets(shape.N_A, K, cfg.skip)) <= MOST_SUBSETS:
            sets = subsets(shape.N_A, K, cfg.skip)
            self.S = len(sets)
            table = torch.full((2 ** shape.N_A,), self.S)           # a set, as bits -> its number
            table[[sum(2 ** i for i in one) for one in sets]] = torch.arange(self.S)
            self.register_buffer('subset', table, persistent=False)
            self.register_buffer('incidence', torch.tensor([[float(i in one) for i in range(shape.N_A)]
                                                            for one in sets]), persistent=False)

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
        one_or_skip = self.phi in ('layer_skip', 'early_exit')
        if one_or_skip:  # of all scores, module h's and SKIP's
            r = torch.stack((r[:, h], r[:, N]), dim=1)
        ids, weights = top_k(r, min(self.cfg.K, r.size(1)), self.cfg.router_weights, self.cfg.tau)
        aux = None
        if self.cfg.balance and self.training:
            aux = self.cfg.balance * balance_loss(r, ids, self.cfg.tau)
        if one_or_skip:
            ids = torch.where(ids == 0, h, N)
        if self.phi == 'early_exit':
            state['gone'] = (ids == N) | state.get('gone', False)
            ids = ids.masked_fill(state['gone'], N)
        on_device = grouped_dtype(x) is not None
        if ids.size(1) == N + self.cfg.skip:
            plan = None  # all tokens take all modules
        elif len(x) == 1 and not on_device and not torch.is_grad_enabled():
            plan = ids[0].tolist()
        else:
            plan = sort_rows(ids, N, on_device)
        return Decision(kind, h, N, ids, weights, plan, aux)

    def pools(self, x, keep=False):
        """The modules as one forward pass over x (M, C) uses them: attention; q, k, v merged by subset, or None;
        feed-forward. Each is a list of modules and, if F.grouped_mm is to take them, one stack in its type.

        keep: they will be used again and again without gradients, so merging always pays, and the layout matters.
        """
        stacks = [self.attn.stack(), None, self.ffn.stack()]
        K = min(self.cfg.K, self.N_A + self.cfg.skip)
        # Merging writes S matrices once; each step then multiplies every token by one matrix, not K.
        if self.S and (keep or len(x) * self.H * (K - 1) >= 256 * self.S):
            stacks[1] = merge(stacks[0], self.incidence.to(self.attn.qkv_w.dtype))
        # Once per forward pass: the backward of unbind is one stack, with zeros for a module that no token chose.
        modules = [one and [type(one)(*m) for m in zip(*(p.unbind(0) for p in one))] for one in stacks]
        dtype = grouped_dtype(x)
        if dtype is not None:
            stacks = [one and type(one)(*(p.to(dtype) if p.ndim == 3 else p for p in one)) for one in stacks]
        return [one and (one, stack) for one, stack in zip(modules, stacks)]

    def qkv(self, attn, merged, x, d):
        """The sums inside Eq. 5: x (M, C) -> (M, 3C). They are unweighted there; under router_start='layers' r weighs
        them too, or else the second module that a token takes would change its q, k, v at full strength at once."""
        if merged is None or isinstance(d, int):
            return assemble(qkv_in, attn, x, d, weighted=self.weighted_qkv)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-5)
        if self.S == 1:
            return qkv_merged(merged[0][0], x)
        if isinstance(d.plan, list):
            return qkv_merged(merged[0][int(self.subset[sum(1 << i for i in d.plan if i < d.N)])], x)
        bits = (1 << d.ids).masked_fill(d.ids == d.N, 0).sum(1, keepdim=True)
        plan = sort_rows(self.subset[bits], self.S, grouped_dtype(x) is not None)
        y = by_group(qkv_merged, merged, x.index_select(0, plan.token), plan, 3 * x.size(1))
        return y.index_select(0, plan.inverse)

    def steps(self, x, cache=None, first_step=0, count=None):
        """Eq. 4, H times: x (B, T, C) -> (B, T, C) and the routers' Decisions."""
        B, T, C = x.shape
        x = x.reshape(B * T, C)
        attn, merged, ffns = cache.pools(self, x, first_step) if cache else self.pools(x)
        state, decisions = {}, []
        for h in range(self.H):
            d = self.choose('A', x, h, state)
            a = attend(self.qkv(attn, merged, x, d), self.cfg.n_head, B, cache, first_step + h, count)
            x = x + assemble(attn_out, attn, a, d, weighted=True)  # u = x + F^A(x)
            decisions.append(d)
            d = self.choose('F', x, h, state)
            x = x + assemble(ffn, ffns, x, d, weighted=True)       # x = u + F^F(u), Eq. 6
            decisions.append(d)
        return x.view(B, T, C), [d for d in decisions if isinstance(d, Decision)]

    def on_chosen_tokens(self, x, cache=None, first_step=0, count=None):
        """Mixture-of-depths (Raposo et al. 2024): the block sees some tokens of a sequence, the others pass by.

        In training the tokens are those with the highest scores, `capacity` of the sequence. That looks at the
        future; so in eval mode, and in generation, a predictor says for each token by itself whether it would have
        been among them. It learns beside the model, from a cross-entropy that sends no gradient into it.
        """
        B, T, C = x.shape
        score = self.router_t(x.reshape(B * T, C), None, 0)[0].view(B, T, 1)
        member = self.predictor(x.detach().to(score.dtype)).squeeze(-1)            # (B, T), a logit
        if self.training:
            best = score.squeeze(-1).topk(max(1, round(self.cfg.capacity * T)), dim=1).indices
            chosen = torch.zeros_like(member, dtype=torch.bool).scatter(1, best, True)
            aux, longest = F.binary_cross_entropy_with_logits(member, chosen.to(member.dtype)), best.size(1)
        else:
            chosen, aux = member > 0, None
            if count is not None:  # what stands after the count-th token of a sequence is padding
                chosen = chosen & (torch.arange(T, device=x.device) < count.unsqueeze(1))
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

    def forward(self, x, cache=None, first_step=0, count=None):
        """x (B, T, C) -> (B, T, C) and Decisions. first_step: the number of this chunk's first step in the cache;
        count (B,): how many of the T tokens are real, if the sequences are not equally long."""
        return (self.on_chosen_tokens if self.phi == 'mod' else self.steps)(x, cache, first_step, count)


# ----------------------------------------------------------------------------- the model

class GPT(nn.Module):
    """GPT-2, vanilla or assembled, with its head tied to the token embedding."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False  # True: keep only the inputs of chunks for the backward pass, compute the rest again
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

    def features(self, idx, cache=None, count=None):
        """Token ids (B, T) -> what the head sees, (B, T, C), after the final LayerNorm, and each chunk's Decisions.

        With a cache, idx holds the tokens that follow those already in it; count (B,) says how many of each row are
        real if the sequences differ in length, and has to be given from the first call on then.
        Raises ValueError if the sequence is longer than block_size.
        """
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        if end > self.cfg.block_size:
            raise ValueError(f'a sequence of {end} tokens is longer than block_size={self.cfg.block_size}: cut it')
        at = torch.arange(start, end, device=idx.device)
        if count is not None:  # each row goes on where its own tokens end
            at = (cache.tokens.unsqueeze(1) + at - start).clamp(max=self.cfg.block_size - 1)
            cache.tokens = cache.tokens + count
        x = self.wte(idx) + self.wpe(at)
        step, decisions = 0, []
        for chunk in self.chunks:
            if self.checkpointing and torch.is_grad_enabled() and cache is None:
                x, decided = checkpoint(chunk, x, use_reentrant=False)
            else:
                x, decided = chunk(x, cache, step, count)
            decisions.append(decided)
            step += chunk.H
        if cache is not None:
            cache.length = end
        return self.ln_f(x), decisions

    def loss(self, x, targets):
        """Features (B, T, C), targets (B, T) int64 -> mean cross-entropy in nats per token; a target of -100 counts for
        nothing. Logits exist for a part of the tokens at a time, at most 2^25 of them."""
        x, targets = x.flatten(0, 1), targets.flatten()
        rows = max(1, 2 ** 25 // self.cfg.vocab_size)
        if len(x) <= rows:
            return F.cross_entropy(F.linear(x, self.wte.weight).float(), targets)
        full = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        if full and hasattr(F, 'linear_cross_entropy'):  # not in every torch; in bf16 it rounds the loss itself to bf16
            return F.linear_cross_entropy(x, self.wte.weight, targets, options=torch.nn.LinearCrossEntropyOptions(
                batch_chunk_size=rows, chunking_method=None, acc_policy='accurate'))

        def part(x, targets):
            return F.cross_entropy(F.linear(x, self.wte.weight).float(), targets, reduction='sum')
        sums = (checkpoint(part, x, t, use_reentrant=False) if torch.is_grad_enabled() else part(x, t)
                for x, t in zip(x.split(rows), targets.split(rows)))
        return sum(sums) / (targets != -100).sum()

    def forward(self, idx, targets=None, want_logits=True):
        """idx (B, T) int64 -> logits (B, T, V) and the mean cross-entropy in nats per token (None without targets).

        targets (B, T) int64; -100 counts for nothing. want_logits=False gives None for them, and saves their memory.
        In training mode the auxiliary losses (`balance`, the predictor of MoD) add their gradients to the loss, not
        their values: what is printed stays the cross-entropy.
        """
        x, decisions = self.features(idx)
        logits = F.linear(x, self.wte.weight) if want_logits else None
        if targets is None:
            return logits, None
        loss = (F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) if want_logits else
                self.loss(x, targets))
        for decision in itertools.chain(*decisions):
            if decision.aux is not None:
                loss = loss + (decision.aux - decision.aux.detach())
        return logits, loss

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, beams=1, stop=None, lengths=None,
                 vocab=None):
        """Continue each row of idx (B, T) by max_new_tokens tokens -> (B, T + max_new_tokens), or fewer if all stopped.

        temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the likeliest that hold this share of the
        probability. beams > 1 searches for the sequence of highest mean log-probability instead. A row that has
        produced the token `stop` is finished. lengths (B,): prompts of different lengths, padded on the right; the new
        tokens of a row follow its prompt at once, and the rest of a row is filled with `stop` (0 without one). vocab:
        how many ids the tokenizer has, if the model's vocabulary is padded beyond them.
        Keys and values are cached. Positions are learned, so a text longer than block_size slides: each further token
        sees the last block_size tokens afresh. That is for equally long rows without beams; ValueError for the others.
        """
        from sample import generate
        return generate(self, idx, max_new_tokens, temperature, top_k, top_p, beams, stop, lengths,
                        vocab)

    def cast(self, dtype):
        """All weights in dtype, for inference, except those of the routers, which stay as they are. Returns self."""
        for name, p in self.named_parameters():
            if '.router_' not in name and '.predictor.' not in name:
                p.data = p.data.to(dtype)
        return self

    def fingerprint(self):
        """A SHA-256 of the shape and of all weights: what to compare when two runs should have begun, or ended, alike.
        Safetensors files have no checksums, so that a flipped bit in one shows here and nowhere else."""
        digest = hashlib.sha256(repr(asdict(self.cfg)).encode())
        for w in self.state_dict().values():
            digest.update(w.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def num_params(self):
        """(all parameters, those of the routers); the tied head counts once."""
        routers = [p for name, p in self.named_parameters() if '.router_' in name or '.predictor.' in name]
        return sum(p.numel() for p in self.parameters()), sum(p.numel() for p in routers)

    def flops_per_token(self, T, k_a=None, k_f=None, merged=False):
        """Forward FLOPs per token at length T: 2 per multiply-add, attention over the full T, head included.

        k_a, k_f: modules that a token takes, on average, of each attention and feed-forward decision of a router (K if
        not given; SKIP costs nothing); under MoD, the share of the tokens that are chosen. merged: with q, k, v as this
        code computes them, by one matrix a token where subsets are merged, not by the K that the method adds up (the
        merging itself, which does not grow with the tokens, is left out). Training costs three times as much.
        LayerNorms, GELU and sums are not counted.
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
            qkv = 1 if merged and chunk.S else a
            total += chunk.H * ((6 * qkv + 2 * a + 16 * f) * C * C + 4 * seen * C)
        return total + 2 * C * self.cfg.vocab_size

    def param_groups(self, weight_decay):
        """For AdamW: matrices and embeddings decay, LayerNorms and biases do not."""
        decay, keep = [], []
        for name, p in self.named_parameters():
            vector = name.endswith(('_b', 'ln_w', 'bias')) or p.ndim < 2
            (keep if vector else decay).append(p)
        return [{'params': decay, 'weight_decay': weight_decay}, {'params': keep, 'weight_decay': 0.0}]

    @staticmethod
    def from_pretrained(source, **overrides):
        """A model from weights: the start of phase two, or of fine-tuning.

        source: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' (fetched from the Hub), a directory in Hugging
        Face format, or a checkpoint of train.py (its file or its directory, then best.pt). overrides: fields of
        MoMConfig. With `chunks`, the layers of a vanilla model become the modules of those chunks and fresh
        routers are added; a shorter block_size cuts the position table.
        Raises ValueError when the weights and the wanted shape do not agree, or cannot be read.
        """
        from weights import from_pretrained
        return from_pretrained(source, **overrides)
