"""Fast paths against slow ones: merged q, k, v, grouped products, checkpointing, loss in parts."""
import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import model as model_py
from model import GPT, MoMConfig, Router, subsets
from sample import Cache, Matrix
from tests.test_model import stir, tiny
from tests.test_phi import SYSTEMS, build

MOM = {'K1S': dict(K=1, H=3), 'K2S': dict(K=2, H=3), 'K3': dict(K=3, H=2, skip=False),
       'K4S': dict(K=4, H=2), 'K4, all of all': dict(K=4, H=2, skip=False),
       'K5S, all of all': dict(K=5, H=2), 'softmax': dict(K=2, H=3, router_weights='softmax'),
       'uneven pools': dict(K=3, H=2, N_A=2, N_F=3), 'K2S of 8': dict(chunks='8', K=2, H=3),
       'tied': dict(K=2, H=2, tied=True)}
ALL = {**{name: SYSTEMS[name] for name in SYSTEMS if name != 'vanilla'}, **MOM}


def outcome(settings, double=True, keep=False, checkpointing=False):
    """Loss, logits and all gradients of a model that depends on the settings alone."""
    model = stir(GPT(tiny(**settings)), seed=5).train()
    model = model.double() if double else model
    model.checkpointing = checkpointing
    if keep:  # merge q, k, v, however few the tokens
        for chunk in model.chunks:
            chunk.pools = lambda x, pools=chunk.pools: pools(x, keep=True)
    idx = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(6))
    logits, loss = model(idx, idx.roll(-1))
    loss.backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}, model


def same(a, b, tolerance):
    assert (a[0] - b[0]).abs().max() <= tolerance * b[0].abs().max()
    for name, grad in b[1].items():
        assert (a[1][name] - grad).abs().max() <= tolerance * max(1, grad.abs().max()), name


@pytest.mark.parametrize(
    'name', [name for name in ALL if ALL[name].get('K') != 1 and 'weigh_qkv' not in ALL[name]])
def test_merging_by_subset_is_exact(name, monkeypatch):
    merged = outcome(ALL[name], keep=True)
    monkeypatch.setattr(model_py, 'MOST_SUBSETS', 0)
    plain = outcome(ALL[name])
    assert not any(chunk.S for chunk in plain[2].chunks)
    if SYSTEMS.get(name, {}).get('phi', 'mom') == 'mom':
        assert any(chunk.S for chunk in merged[2].chunks)
    same(merged, plain, 1e-10)


def test_subsets():
    assert [len(subsets(4, K, True)) for K in (2, 3, 4)] == [10, 10, 5]
    assert subsets(3, 3, False) == [(0, 1, 2)] and subsets(2, 3, True) == [(0, 1)]
    assert len(subsets(8, 2, True)) == 36 and len(subsets(6, 2, True)) == 21


class Poisoned(torch.autograd.Function):
    """F.grouped_mm by its contract: rows past the last group are anything, in the gradient, too."""

    @staticmethod
    def forward(ctx, x, w, ends):
        ctx.save_for_backward(x, w, ends)
        y = x.new_full((len(x), w.size(2)), float('nan'))
        for g, (a, b) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            y[a:b] = x[a:b] @ w[g]
        return y

    @staticmethod
    def backward(ctx, grad):
        x, w, ends = ctx.saved_tensors
        gx, gw = torch.full_like(x, float('nan')), torch.zeros_like(w)
        for g, (a, b) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            gx[a:b], gw[g] = grad[a:b] @ w[g].T, x[a:b].T @ grad[a:b]
        return gx, gw, None


@pytest.mark.parametrize('keep', [False, True], ids=['per module', 'merged'])
@pytest.mark.parametrize('name', ALL)
def test_grouped_products_that_leave_rows_uninitialised(name, keep, monkeypatch):
    loop = outcome(ALL[name], keep=keep)
    monkeypatch.setattr(model_py, 'grouped_dtype', lambda x: torch.float64)
    monkeypatch.setattr(F, 'grouped_mm', lambda x, w, offs: Poisoned.apply(x, w, offs))
    same(outcome(ALL[name], keep=keep), loop, 1e-10)


@pytest.mark.parametrize('name', ALL)
def test_torch_s_grouped_mm(name, monkeypatch):
    loop = outcome(ALL[name], double=False)
    monkeypatch.setattr(model_py, 'grouped_dtype', lambda x: torch.float32)
    same(outcome(ALL[name], double=False), loop, 1e-4)


ONE_STEP = {'one step': dict(K=3, H=1),
            'moe, one step of a GRU': dict(phi='moe', chunks='1-1', K=2, experts=3),
            'mod, one step of a GRU': dict(phi='mod', chunks='1-1', K=1, capacity=0.25)}


@pytest.mark.parametrize('name', [
    'K2S', 'K3', 'K4, all of all', 'uneven pools', 'early_exit', 'moe', 'mod', 'share', *ONE_STEP])
def test_the_grouped_path_compiles_without_graph_breaks(name, monkeypatch):
    # No other type compiles yet.
    monkeypatch.setattr(model_py, 'grouped_dtype', lambda x: torch.bfloat16)
    model = stir(GPT(tiny(**{**ALL, **ONE_STEP}[name])), seed=5).train()
    idx = torch.randint(0, 50, (2, 16))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    loss, want = compiled(idx, idx)[1], model(idx, idx)[1]
    assert torch.allclose(loss, want, rtol=1e-5)
    loss.backward()
    # With one step s_0 = 0 is the only state: weight_hh has a gradient all the same, of zeros, as
    # DDP needs it.
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', ALL)
def test_a_gpu_s_kernel_would_take_its_inputs(name, monkeypatch):
    """What F.grouped_mm asks for on a GPU, its types, strides and alignment, forward and backward.

    On the CPU it takes anything, but tensors without data, device 'meta', are looked at as a GPU's.
    """
    monkeypatch.setattr(model_py, 'grouped_dtype', lambda x: torch.bfloat16)
    # There is none for 'meta'.
    monkeypatch.setattr(torch, 'autocast', lambda *a, **kw: contextlib.nullcontext())
    with torch.device('meta'):
        model = GPT(tiny(**{**ALL[name], 'n_embd': 64})).train()
        idx = torch.zeros(3, 16, dtype=torch.int64)
    model(idx, idx, want_logits=False)[1].backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize('router', ['gru', 'mlp'])
def test_a_gpu_s_graph_does_not_break_at_a_router(router):
    """It does at torch's own GRU kernel, which has to run to say what shapes it returns."""
    made = Router(tiny(K=2, router=router), E=5, H=2)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in made.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, device='cuda')))
        graph = torch.compile(made, backend='eager', fullgraph=True)
        x = torch.empty(64, 16, device='cuda')
        r, s = graph(x, None, 0)
        assert r.shape == (64, 5) and graph(x, s, 1)[0].device.type == 'cuda'


def test_gradients_of_vectors_are_summed_in_full_precision(monkeypatch):
    def gradients(grouped, half):
        torch.manual_seed(0)
        model = GPT(MoMConfig(chunks='1-4-1', n_embd=64, n_head=2, block_size=128, vocab_size=257,
                              router_dim=16, K=2, H=1)).train()
        dtype = torch.bfloat16 if grouped else None
        monkeypatch.setattr(model_py, 'grouped_dtype', lambda x: dtype)
        idx = torch.randint(0, 257, (64, 128), generator=torch.Generator().manual_seed(1))
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            loss = model(idx, idx)[1]
        loss.backward()
        return {n: p.grad for n, p in model.chunks[1].named_parameters()
                if n.endswith(('_b', 'ln_w'))}

    full, half, grouped = gradients(False, False), gradients(False, True), gradients(True, True)
    for name, want in full.items():  # one addition after the other in bf16 is off by a third
        for got in (half, grouped):
            assert (got[name] - want).norm() < 0.03 * want.norm()


def test_bfloat16_autocast_is_near_full_precision(monkeypatch):
    full = outcome(MOM['K4, all of all'], double=False)  # no choice to flip
    for grouped in (None, torch.bfloat16):
        monkeypatch.setattr(model_py, 'grouped_dtype', lambda x: grouped)
        with torch.autocast('cpu', torch.bfloat16):
            half = outcome(MOM['K4, all of all'], double=False)
        assert (half[0].float() - full[0]).abs().mean() < 0.05 * full[0].std()


@pytest.mark.parametrize('name', ALL)
def test_checkpointing_changes_nothing(name):
    same(outcome(ALL[name], checkpointing=True), outcome(ALL[name]), 1e-12)


def test_checkpointing_keeps_less():
    kept = []
    for on in (False, True):
        model = GPT(tiny(K=2, H=6))
        model.checkpointing, count = on, [0]

        def pack(t):
            count[0] += t.nbytes
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randint(0, 50, (4, 24)), torch.randint(0, 50, (4, 24)))
        kept.append(count[0])
    assert kept[1] < kept[0] / 5


def test_the_loss_in_parts_equals_the_whole():
    model = stir(GPT(tiny(vocab_size=40_000, K=2, H=1)))
    idx = torch.randint(0, 40_000, (2, 24))
    targets = idx.roll(-1)
    targets[:, :5] = -100
    whole = model(idx, targets)[1]
    want = torch.autograd.grad(whole, list(model.parameters()))
    model.cfg.vocab_size = 2 ** 21  # in parts of 16 rows
    logits, loss = model(idx, targets, want_logits=False)
    assert logits is None and torch.allclose(loss, whole, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), want):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())
    with torch.no_grad():
        assert torch.allclose(model(idx, targets, want_logits=False)[1], whole, rtol=1e-6)
    with pytest.raises(RuntimeError, match='no second derivatives'):
        loss = model(idx, targets, want_logits=False)[1]
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_the_loss_in_parts_under_autocast_is_in_full_precision():
    model = stir(GPT(tiny(vocab_size=40_000, K=2, H=1)))
    idx = torch.randint(0, 40_000, (2, 24))
    with torch.autocast('cpu', torch.bfloat16):
        whole = model(idx, idx)[1]
        model.cfg.vocab_size = 2 ** 21
        parts = model(idx, idx, want_logits=False)[1]
    assert parts.dtype == torch.float32 and torch.allclose(parts, whole, rtol=1e-4)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (whole, parts)]
    for want, got in zip(*gradients):
        assert got.dtype == want.dtype and (got - want).norm() <= 0.02 * want.norm()


def test_the_loss_in_parts_compiles_without_graph_breaks():
    model = stir(GPT(tiny(chunks='1-1', vocab_size=500)))
    model.cfg.vocab_size = 2 ** 21
    idx = torch.randint(0, 500, (2, 24))
    torch._dynamo.reset()
    loss = torch.compile(model, backend='eager', fullgraph=True)(idx, idx, want_logits=False)[1]
    got = torch.autograd.grad(loss, list(model.parameters()))
    want = torch.autograd.grad(model(idx, idx)[1], list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want))


def poison(module):
    for p in module:
        p = p.w if isinstance(p, Matrix) else p
        p.copy_(torch.full_like(p, math.nan))


def test_a_decoding_step_reads_only_what_was_chosen():
    """Matrices are poisoned that no token of the step chose."""
    model = build('mom').float()
    idx = torch.randint(0, 50, (1, 6))
    with torch.no_grad():
        cache = Cache(model.cfg, 1, 'cpu', torch.float32)
        model.features(idx, cache)
        start, length = [t.clone() for t in cache.k], cache.length
        want, decisions = model.features(idx[:, -1:], cache)
        pools = cache.ready[1]
        for kind, modules in (('A', pools.attn.each), ('F', pools.ffn.each)):
            chosen = {i for d in decisions[1] if d.kind == kind for i in d.ids.flatten().tolist()}
            assert len(chosen - {4}) < 4
            for i in set(range(4)) - chosen:
                poison(modules[i])
        used = {int(model.chunks[1].subset[sum(1 << i for i in d.ids[0].tolist() if i < 4)])
                for d in decisions[1] if d.kind == 'A'}
        for s in set(range(model.chunks[1].S)) - used:
            poison(pools.merged.each[s])
        cache.k, cache.length = start, length
        assert torch.equal(model.features(idx[:, -1:], cache)[0], want) and want.isfinite().all()


@pytest.mark.parametrize('major, hip, width, taken', [
    (9, None, 64, True), (9, None, 68, False), (8, None, 64, False), (10, None, 64, False),
    (9, '7.0', 64, False)])  # AMD's MI300 says 9.4
def test_grouped_products_are_for_hopper(major, hip, width, taken, monkeypatch):
    card = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: card)
    monkeypatch.setattr(torch.version, 'hip', hip)
    assert model_py.has_grouped_mm(torch.device('cuda'), width) == taken
