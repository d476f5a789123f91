"""Mixture-of-Modules (arXiv 2407.06677), straight from the equations: slow, obvious, for tests.

Plain functions over plain tensors, one token, one module, one head at a time. Nothing is batched,
merged, sorted or cached, and no tensor is changed in place, so every result can be differentiated.
Use tiny sizes, in float64.

A *route* is one token's selection: a list of (module index, weight), without SKIP. A *pool* is a
dict of tensors whose first axis is the module:
  attention: ln_w, ln_b (N,C)   qkv_w (N,C,3C)  qkv_b (N,3C)   out_w (N,C,C)    out_b (N,C)
  FFN:       ln_w, ln_b (N,C)   fc_w  (N,C,4C)  fc_b  (N,4C)   proj_w (N,4C,C)  proj_b (N,C)
"""
import math

import torch


def layer_norm(x, weight, bias, eps=1e-5):
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)  # biased: divided by C, not by C - 1
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gru_cell(x, s, p):
    """Eq. 7: s_h = GRU(x_h, s_{h-1}).

    The 3R rows of each weight are reset, update and new, as in torch.nn.GRUCell.
    """
    R = s.shape[-1]
    i = x @ p['weight_ih'].T + p['bias_ih']
    h = s @ p['weight_hh'].T + p['bias_hh']
    reset = torch.sigmoid(i[..., :R] + h[..., :R])
    update = torch.sigmoid(i[..., R:2 * R] + h[..., R:2 * R])
    new = torch.tanh(i[..., 2 * R:] + reset * h[..., 2 * R:])
    return (1 - update) * new + update * s


def router_step(p, kind, x, s, h):
    """Eq. 7 and 8 -> (r, s'). The input x is the residual stream itself, not normalised.

    'bias' (H, entries), if there is one, is added to the scores of step h (router_start='layers').
    """
    assert kind in ('gru', 'mlp')
    if kind == 'gru':
        s = gru_cell(x, s, p)
    else:  # Appendix D: two layers and no state, so the old s is not read
        s = gelu_tanh(x @ p['hidden_weight'].T + p['hidden_bias'])
    return s @ p['W'].T + (p['bias'][h] if 'bias' in p else 0), s  # Eq. 8: r = W s


def select(r, K, n_modules, skip, weights, tau):
    """TopK of section 3.2 for one token: r (n_modules + skip,) -> its route.

    SKIP, if there is one, is the last entry.
    """
    entries = n_modules + int(skip)
    assert r.shape == (entries,) and 1 <= K <= entries and weights in ('linear', 'softmax')
    largest_first = sorted(range(entries), key=lambda i: (-r[i].item(), i))  # ties: by index
    selected = largest_first[:K]
    if weights == 'linear':  # Eq. 5, 6, 8: the entry itself
        w = {i: r[i] for i in selected}
    else:
        e = torch.exp((r - r.max().detach()) / tau)
        prob = e / e.sum()  # over all entries
        total = sum(prob[i] for i in selected)  # over the selected ones, SKIP too if it is of them
        w = {i: prob[i] / total for i in selected}
    # SKIP adds nothing; the others are not rescaled for it.
    return [(i, w[i]) for i in selected if i < n_modules]


def attention_step(x, pool, routes, n_head, weigh_qkv=False):
    """Eq. 5, o = F^A(x), for one sequence x (T, C). weigh_qkv: r weighs q, k, v too."""
    T, C = x.shape
    d_head = C // n_head

    q, k, v = [], [], []  # per token: in Eq. 5 unweighted sums over the token's own selection
    for t in range(T):
        # All three stay zero if nothing was selected; others still see this key and this value.
        qkv = x.new_zeros(3 * C)
        for m, w in routes[t]:
            normed = layer_norm(x[t], pool['ln_w'][m], pool['ln_b'][m])
            one = normed @ pool['qkv_w'][m] + pool['qkv_b'][m]
            qkv = qkv + (w * one if weigh_qkv else one)
        q.append(qkv[:C])
        k.append(qkv[C:2 * C])
        v.append(qkv[2 * C:])

    out = []
    for t in range(T):
        heads = []
        for z in range(n_head):
            part = slice(z * d_head, (z + 1) * d_head)
            seen = range(t + 1)  # causal: j <= t
            scores = [(q[t][part] * k[j][part]).sum() / math.sqrt(d_head) for j in seen]
            prob = torch.softmax(torch.stack(scores), dim=0)
            heads.append(sum(prob[j] * v[j][part] for j in seen))
        a = torch.cat(heads)
        o = torch.zeros_like(x[t])
        for m, w in routes[t]:
            o = o + w * (a @ pool['out_w'][m] + pool['out_b'][m])
        out.append(o)
    return torch.stack(out)


def ffn_step(u, pool, routes):
    """Eq. 6, o = F^F(u), for one sequence u (T, C)."""
    out = []
    for t in range(u.shape[0]):
        o = torch.zeros_like(u[t])
        for m, w in routes[t]:
            normed = layer_norm(u[t], pool['ln_w'][m], pool['ln_b'][m])
            hidden = normed @ pool['fc_w'][m] + pool['fc_b'][m]
            o = o + w * (gelu_tanh(hidden) @ pool['proj_w'][m] + pool['proj_b'][m])
        out.append(o)
    return torch.stack(out)


def chunk(x, attn, ffn, router_a, router_f, *, H, K_a, K_f, skip, n_head, kind='gru',
          weights='linear', tau=0.2, weigh_qkv=False):
    """H assembly steps over one pool of modules: x (B, T, C) -> (B, T, C)."""
    B, T, _ = x.shape
    N_a, N_f = attn['ln_w'].shape[0], ffn['ln_w'].shape[0]
    out = []
    for b in range(B):
        x_h = x[b]
        s_a = [x.new_zeros(router_a['W'].shape[1]) for _ in range(T)]  # s_0 = 0, one per token
        s_f = [x.new_zeros(router_f['W'].shape[1]) for _ in range(T)]
        for h in range(H):
            routes_a = []
            for t in range(T):
                r, s_a[t] = router_step(router_a, kind, x_h[t], s_a[t], h)
                routes_a.append(select(r, K_a, N_a, skip, weights, tau))
            u_h = attention_step(x_h, attn, routes_a, n_head, weigh_qkv) + x_h  # Eq. 4, first line

            routes_f = []
            for t in range(T):
                r, s_f[t] = router_step(router_f, kind, u_h[t], s_f[t], h)
                routes_f.append(select(r, K_f, N_f, skip, weights, tau))
            x_h = ffn_step(u_h, ffn, routes_f) + u_h  # Eq. 4, second line
        out.append(x_h)
    return torch.stack(out)


def vanilla_block(x, attn, ffn, n_head):
    """A GPT-2 block of x (B, T, C): one module of each kind, one step, weight 1 and no router."""
    out = []
    for b in range(x.shape[0]):
        routes = [[(0, 1.0)] for _ in range(x.shape[1])]
        u = attention_step(x[b], attn, routes, n_head) + x[b]
        out.append(ffn_step(u, ffn, routes) + u)
    return torch.stack(out)


def gpt(idx, params, chunks, **settings):
    """idx (B, T) -> logits (B, T, V).

    chunks: each chunk's N. settings: those of chunk(); a vanilla chunk needs n_head.
    """
    B, T = idx.shape
    x = torch.stack([
        torch.stack([params['wte'][idx[b, t]] + params['wpe'][t] for t in range(T)])
        for b in range(B)])
    for n, c in zip(chunks, params['chunks'], strict=True):
        unrouted = c.get('router_a') is None
        assert (n == 1) == unrouted, 'routers belong to the chunks with N > 1, and to no other'
        if n == 1:
            x = vanilla_block(x, c['attn'], c['ffn'], settings['n_head'])
        else:
            x = chunk(x, c['attn'], c['ffn'], c['router_a'], c['router_f'], **settings)
    return layer_norm(x, params['ln_f_w'], params['ln_f_b']) @ params['wte'].T
