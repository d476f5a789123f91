"""Every phi against an oracle of its own: transformers, the dense loops, or a closed form."""
import copy
import itertools

import dense
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.mixtral import modeling_mixtral as mixtral

import model as model_py
from model import GPT, MoMConfig, assemble, balance_loss, ffn, top_k
from sample import Cache
from tests.test_model import dense_params, hugging_face, stir, tiny

MIXTRAL = dict(router='linear', router_weights='softmax', tau=1.0, skip=False)
SYSTEMS = {
    'vanilla': dict(chunks='1-1-1-1-1-1'),
    'mom': dict(K=2, H=3),
    'mom, linear router': dict(K=2, H=3, router='linear'),
    'mom, kept modules': dict(K=2, H=2, keep_A=[3, 1], keep_F=[0, 2, 3]),
    'mom, tied': dict(K=2, H=3, tied=True),
    'mom, from the layers': dict(K=2, H=4, router_start='layers', weigh_qkv=True),
    'mom, q, k, v weighted': dict(K=2, H=2, weigh_qkv=True),
    'layer_skip': dict(phi='layer_skip', K=1),
    'early_exit': dict(phi='early_exit', K=1, chunks='2-4'),
    'share': dict(phi='share', K=1, c_share=[0, 0, 2, 1, 2]),
    'moe': dict(phi='moe', chunks='1-1-1-1-1-1', K=2, experts=3, **MIXTRAL),
    'moe_share': dict(phi='moe_share', K=2, **MIXTRAL),
    'moe_share, GRU and SKIP': dict(phi='moe_share', K=2, N_F=3),
    'mod': dict(phi='mod', chunks='1-1-1-1-1-1', K=1, capacity=0.25, router='linear'),
}


def build(system, **kw):
    return stir(GPT(tiny(**{**SYSTEMS[system], **kw})).double().eval(), seed=3)


@pytest.fixture(params=SYSTEMS)
def system(request):
    return request.param


# ----------------------------------------------------------------------------- all of them

def test_the_dense_loops_over_the_decisions_give_the_same(system):
    """The assembly beneath every phi: decisions carried out one token and one module at a time."""
    model = build(system, block_size=7)
    idx = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(2))
    got, decisions = model.features(idx)
    x = model.wte(idx) + model.wpe.weight[:7]
    chunks = dense_params(model)['chunks']
    for chunk, decided, params in zip(model.chunks, decisions, chunks, strict=True):
        attn, ffn = ({k: p.expand(pool.N, *p.shape[1:]) for k, p in params[kind].items()}
                     for kind, pool in (('attn', chunk.attn), ('ffn', chunk.ffn)))
        made = {(d.kind, d.step): d for d in decided}

        def routes(kind, h, b):
            d = made.get((kind, h))
            if d is None:  # all tokens take one module, which the router has no say in
                return [[(chunk.choose(kind, None, h, {}).rows[0], 1.0)]] * 7
            return [[(i, w) for i, w in zip(d.ids[t].tolist(), d.weights[t]) if i < d.N]
                    for t in range(7 * b, 7 * b + 7)]

        after = []
        for b in range(2):
            if chunk.phi == 'mod':
                # A block over the chosen tokens alone, its update times the score.
                chosen = [t for t in range(7) if made['T', 0].ids[7 * b + t] == 0]
                new = x[b].clone()
                if chosen:
                    y = dense.vanilla_block(x[b:b + 1, chosen], attn, ffn, 2)[0]
                    score = made['T', 0].weights[7 * b:][chosen]
                    new[chosen] = x[b, chosen] + score * (y - x[b, chosen])
                after.append(new)
                continue
            y = x[b]
            for h in range(chunk.H):
                y = y + dense.attention_step(y, attn, routes('A', h, b), 2, model.cfg.weigh_qkv)
                y = y + dense.ffn_step(y, ffn, routes('F', h, b))
            after.append(y)
        x = torch.stack(after)
    want = dense.layer_norm(x, model.ln_f.weight, model.ln_f.bias)
    assert (got - want).abs().max() < 1e-10 * want.abs().max()
    counts = {'vanilla': 0, 'mom': 6, 'layer_skip': 8, 'early_exit': 12, 'share': 0, 'moe': 6,
              'moe_share': 4, 'mod': 3, 'mom, linear router': 6, 'mom, kept modules': 4,
              'mom, tied': 6, 'mom, from the layers': 8, 'mom, q, k, v weighted': 4,
              'moe_share, GRU and SKIP': 4}
    assert sum(map(len, decisions)) == counts[system]


def test_every_parameter_gets_a_gradient(system):
    model = build(system).train()
    model(torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 9)))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0 or 'router' not in name and 'predictor' not in name, name


def test_no_output_depends_on_a_later_token(system):
    model = build(system)
    idx = torch.randint(0, 50, (2, 20))
    other = torch.cat((idx[:, :12], torch.randint(0, 50, (2, 8))), 1)
    a, b = model(idx)[0], model(other)[0]
    assert torch.allclose(a[:, :12], b[:, :12], rtol=0, atol=1e-12 * a.abs().max().item())
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_vanilla_layers_become_each_system(system, tmp_path):
    """Phase two begins: the pools hold the layers of phase one, whichever phi they will serve."""
    hf = hugging_face(tmp_path, n_layer=6)
    settings = {'router_dim': 8, 'chunks': '1-4-1', **SYSTEMS[system]}
    model = GPT.from_pretrained(str(tmp_path), **settings)
    layer = iter(hf.transformer.h)
    for chunk, N, plan in zip(model.chunks, model.cfg.sizes, model.cfg.plans, strict=True):
        layers = list(itertools.islice(layer, N))
        attn, ffns = chunk.attn.stack(), chunk.ffn.stack()
        assert len(attn.out_w) == plan.N_A and len(ffns.fc_b) == plan.N_F
        for w, i in zip(attn.out_w, plan.layers_A * (plan.N_A // len(plan.layers_A)), strict=True):
            assert torch.equal(w, layers[i].attn.c_proj.weight)
        for b, i in zip(ffns.fc_b, plan.layers_F * (plan.N_F // len(plan.layers_F)), strict=True):
            assert torch.equal(b, layers[i].mlp.c_fc.bias)
    torch.save({'model': model.state_dict(), 'model_config': vars(model.cfg)}, tmp_path / 'last.pt')
    again = GPT.from_pretrained(str(tmp_path / 'last.pt'))
    idx = torch.randint(0, 211, (2, 9))
    assert again.cfg == model.cfg and torch.equal(again.eval()(idx)[0], model.eval()(idx)[0])
    if system != 'vanilla':
        with pytest.raises(ValueError, match='assembled already'):
            GPT.from_pretrained(str(tmp_path / 'last.pt'), chunks='2-2-2', phi='mom', K=2,
                                tied=False, c_share=[], keep_A=[], keep_F=[], N_F=0)


def ddp_rank(rank, file, out):
    """One of two gloo processes: every system's gradients of its half batch, averaged by DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank,
                                         world_size=2)
    got = {}
    for system in SYSTEMS:
        model = build(system).train()
        idx = ddp_batch()[2 * rank:2 * rank + 2]
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel(idx, idx)[1].backward()
        got[system] = {name: p.grad for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(got, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def ddp_batch():
    return torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(4))


def test_two_processes_give_the_gradients_of_one(tmp_path):
    files = str(tmp_path / 'meet'), str(tmp_path / 'grads.pt')
    torch.multiprocessing.spawn(ddp_rank, files, nprocs=2)
    got = torch.load(tmp_path / 'grads.pt', weights_only=True)
    unused = 0
    for system in SYSTEMS:
        model = build(system).train()
        idx = ddp_batch()
        model(idx, idx)[1].backward()
        for name, p in model.named_parameters():
            off = (got[system][name] - p.grad).abs().max()
            assert off <= 1e-12 * max(1, p.grad.abs().max()), (system, name)
        for half in (idx[:2], idx[2:]):  # are there modules that no token of a process chose?
            for d in itertools.chain(*model.features(half)[1]):
                unused += d.N - len(d.ids[d.ids < d.N].unique())
    assert unused > 0


# ----------------------------------------------------------------------------- share

def test_share_equals_a_gpt2_whose_layers_are_the_same_objects(tmp_path):
    hf = hugging_face(tmp_path, n_layer=6)
    model = GPT.from_pretrained(str(tmp_path), chunks='1-4-1', phi='share', K=1,
                                c_share=[0, 3, 3, 1, 0])
    h = hf.transformer.h
    shared = [h[1:5][(0, 1, 3)[j]] for j in (0, 2, 2, 1, 0)]
    hf.transformer.h = torch.nn.ModuleList([h[0], *shared, h[5]])
    hf.config.n_layer = 7
    idx = torch.randint(0, 211, (2, 20))
    want = hf(idx, labels=idx, use_cache=False)
    logits, loss = model(idx, torch.cat((idx[:, 1:], torch.full((2, 1), -100)), 1))
    assert (logits - want.logits).abs().max() < 1e-4
    loss.backward(), want.loss.backward()
    for pool, i in itertools.product((0, 1, 2), ('qkv', 'out', 'fc', 'proj')):
        layer = h[1 + (0, 1, 3)[pool]]
        theirs = {'qkv': layer.attn.c_attn, 'out': layer.attn.c_proj, 'fc': layer.mlp.c_fc,
                  'proj': layer.mlp.c_proj}[i]
        kind = model.chunks[1].attn if i in ('qkv', 'out') else model.chunks[1].ffn
        ours = getattr(kind, i + '_w').grad[pool]
        largest = ours.abs().max().item()
        assert largest > 0 and torch.allclose(ours, theirs.weight.grad, atol=1e-5 * largest)


def test_share_stores_what_it_names():
    few = GPT(tiny(chunks='4', phi='share', K=1, c_share=[0, 0, 2, 2]))
    two = GPT(tiny(chunks='1-1'))
    assert few.num_params() == two.num_params()


def test_share_in_order_is_gpt2(tmp_path):
    hf = hugging_face(tmp_path, n_layer=6)
    model = GPT.from_pretrained(str(tmp_path), chunks='2-4', phi='share', K=1, c_share=[0, 1])
    idx = torch.randint(0, 211, (2, 20))
    hf.transformer.h = torch.nn.ModuleList([hf.transformer.h[i] for i in (0, 1, 2, 3)])
    assert (model(idx)[0] - hf(idx, use_cache=False).logits).abs().max() < 1e-4
    whole = GPT.from_pretrained(str(tmp_path), chunks='6', phi='share', K=1, c_share=list(range(6)))
    assert torch.allclose(whole(idx)[0], GPT.from_pretrained(str(tmp_path))(idx)[0], atol=1e-5)


# ------------------------------------------------------------------------ layer-skip and early exit

def constant_scores(model, scores):
    """Routers that give every token the scores of its step, scores[h] (E,), whatever it is."""
    for chunk in model.chunks:
        for router in filter(None, (chunk.router_a, chunk.router_f, chunk.router_t)):
            router.forward = lambda x, s, h, router=router: (
                torch.tensor(scores[h], dtype=x.dtype).expand(*x.shape[:-1], router.E), s)


def test_layer_skip_that_never_skips_is_vanilla_and_that_always_skips_has_no_layers():
    vanilla = stir(GPT(tiny(chunks='1-1-1-1')).double())
    for phi in ('layer_skip', 'early_exit'):
        model = GPT(tiny(chunks='4', phi=phi, K=1)).double()
        ours, theirs = model.state_dict(), vanilla.state_dict()
        stacked = {name: torch.cat([theirs[name.replace('chunks.0', f'chunks.{i}')]
                                    for i in range(4)])
                   for name in ours if 'attn' in name or 'ffn' in name}
        outside = {name: w for name, w in theirs.items() if not name.startswith('chunks')}
        model.load_state_dict({**ours, **stacked, **outside})
        idx = torch.randint(0, 50, (2, 12))
        # the scores of the modules that are not module h count for nothing
        scores = [[1.0 if i == h else 7.0 for i in range(4)] + [0.5] for h in range(4)]
        constant_scores(model, scores)
        assert torch.allclose(model(idx)[0], vanilla(idx)[0], rtol=1e-12)
        constant_scores(model, [[1.0] * 4 + [1.5]] * 4)
        straight = vanilla.ln_f(vanilla.wte(idx) + vanilla.wpe.weight[:12]) @ vanilla.wte.weight.T
        assert torch.allclose(model(idx)[0], straight, rtol=1e-12)


def test_layer_skip_compares_module_h_with_skip():
    model = build('layer_skip')
    idx = torch.randint(0, 50, (4, 24))
    _, decisions = model.features(idx)
    ids = torch.cat([d.ids for d in decisions[1]])
    assert {d.step for d in decisions[1]} == {0, 1, 2, 3}
    for d in decisions[1]:
        assert set(d.ids.unique().tolist()) <= {d.step, 4}
    assert (ids == 4).any() and (ids < 4).any()
    # replay the routers: the choice is the larger of the two scores, its weight that score
    seen = []
    model.chunks[1].router_a.register_forward_hook(lambda r, args, out: seen.append(out[0]))
    _, decisions = model.features(idx)
    for r, d in zip(seen, [d for d in decisions[1] if d.kind == 'A'], strict=True):
        assert torch.equal(d.ids[:, 0] == d.step, r[:, d.step] > r[:, 4])
        assert torch.equal(d.weights[:, 0], torch.maximum(r[:, d.step], r[:, 4]))


def test_early_exit_never_resumes():
    def stays(skipped):
        return skipped.long().cummax(0).values.bool()

    model = build('early_exit')
    _, decisions = model.features(torch.randint(0, 50, (6, 24)))
    for decided, N in zip(decisions, (2, 4), strict=True):
        order = [(d.step, d.kind) for d in decided]
        assert order == [(h, kind) for h in range(N) for kind in 'AF']
        skipped = torch.stack([d.ids[:, 0] == N for d in decided])
        assert torch.equal(stays(skipped), skipped)  # once true, true to the end
        assert skipped.any() and not skipped.all()
        assert any((a != b).any() for a, b in itertools.pairwise(skipped))   # some leave midway
    free = build('early_exit', phi='layer_skip')
    _, decisions = free.features(torch.randint(0, 50, (6, 24)))
    skipped = torch.stack([d.ids[:, 0] == 4 for d in decisions[1]])
    assert not torch.equal(stays(skipped), skipped)  # the test can fail: layer-skip resumes


# ----------------------------------------------------------------------------- mixture of experts

@pytest.mark.parametrize('phi', ['moe', 'moe_share'])
def test_moe_equals_the_block_of_mixtral(phi):
    """A biased GELU expert with its LayerNorm is an unbiased SwiGLU expert over [x, 1] whose `up`
    half is constant."""
    E, C, K = 4, 16, 2
    chunks = '1-1' if phi == 'moe' else '4'
    model = stir(GPT(tiny(phi=phi, chunks=chunks, K=K, experts=E, **MIXTRAL)), std=0.2)
    chunk, h = model.chunks[-1], 0 if phi == 'moe' else 2
    block = mixtral.MixtralSparseMoeBlock(transformers.MixtralConfig(
        hidden_size=C + 1, intermediate_size=4 * C + 1, num_local_experts=E, num_experts_per_tok=K,
        hidden_act='gelu_pytorch_tanh', router_jitter_noise=0.0, experts_implementation='eager'))
    gate = chunk.router_f.gates.weight.view(-1, E, C)[h]
    with torch.no_grad():
        block.gate.weight.copy_(F.pad(gate, (0, 1)))
        for p in block.experts.parameters():
            p.zero_()
        for e, m in enumerate(chunk.pools(torch.empty(1, C))[2][0]):
            gate_w, up_w = block.experts.gate_up_proj[e].chunk(2)
            gate_w[:-1, :-1] = (m.ln_w[:, None] * m.fc_w).T
            gate_w[:-1, -1] = m.ln_b @ m.fc_w + m.fc_b
            up_w[:, -1] = 1.0
            down_w = block.experts.down_proj[e]
            down_w[:-1, :-1] = m.proj_w.T
            # One more hidden unit, always gelu(1), carries the bias of the output.
            gate_w[-1, -1] = 1.0
            down_w[:-1, -1] = m.proj_b / F.gelu(torch.tensor(1.0), approximate='tanh')
    x = torch.randn(2, 30, C)
    hat = F.pad(F.layer_norm(x, (C,)), (0, 1), value=1.0)
    logits, weights, ids = block.gate(hat)
    d = chunk.choose('F', x.view(-1, C), h, {})
    assert torch.equal(d.ids, ids)
    assert torch.allclose(d.weights, weights, atol=1e-6)
    ours = assemble(ffn, chunk.pools(x.view(-1, C)).ffn, x.view(-1, C), d, weighted=True)
    assert torch.allclose(ours.view(2, 30, C), block(hat)[..., :-1], atol=1e-5)
    assert ours.std() > 0.1 and len(ids.unique()) == E
    # and the balance loss: Mixtral counts K picks per token as K, Switch as one
    loss = balance_loss(chunk.router_f(x.view(-1, C), None, h)[0], ids, 1.0)
    want = mixtral.load_balancing_loss_func((logits,), E, K)
    assert torch.allclose(K * loss, want, rtol=1e-5)


def test_experts_start_as_copies(tmp_path):
    hugging_face(tmp_path)
    settings = dict(phi='moe', K=2, experts=4, **MIXTRAL)
    model = GPT.from_pretrained(str(tmp_path), **settings)
    vanilla = GPT.from_pretrained(str(tmp_path))
    idx = torch.randint(0, 211, (2, 20))
    # The weights are renormalised: copies of a layer sum to that layer.
    assert torch.allclose(model(idx)[0], vanilla(idx)[0], atol=1e-5)


@pytest.mark.parametrize('system', ['layer_skip', 'early_exit'])
def test_the_balance_loss_counts_picks_as_they_are_carried_out(system, monkeypatch):
    seen = []
    monkeypatch.setattr(model_py, 'balance_loss', lambda r, ids, tau: seen.append(ids) or r.sum())
    model = build(system, balance=0.1).train()
    _, decisions = model.features(torch.randint(0, 50, (3, 10)))
    decisions = [d for decided in decisions for d in decided]
    assert len(seen) == len(decisions) > 0
    assert all(torch.equal(ids == 1, d.ids == d.N) for ids, d in zip(seen, decisions))
    assert any((d.ids == d.N).any() for d in decisions)


def test_balance_loss_by_hand():
    r = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    ids, weights = top_k(r, 2, 'softmax', 1.0)
    assert ids.tolist() == [[0, 1], [2, 1]]
    # The softmax of r, by a calculator.
    p = [[0.66524096, 0.24472847, 0.09003057], [0.04201007, 0.11419520, 0.84379473]]
    share = [1 / 4, 2 / 4, 1 / 4]
    want = 3 * sum(f * (a + b) / 2 for f, a, b in zip(share, *p))
    assert balance_loss(r, ids, 1.0).item() == pytest.approx(want, rel=1e-6)
    even = torch.zeros(3, 3) + torch.eye(3) * 1e-6
    even_ids = top_k(even, 1, 'linear', 1.0)[0]
    assert balance_loss(even, even_ids, 1.0).item() == pytest.approx(1, rel=1e-4)
    assert balance_loss(r * 20, ids, 1.0) != balance_loss(r, ids, 1.0)  # it is no constant


@pytest.mark.parametrize('system', ['mom', 'layer_skip', 'moe', 'moe_share'])
def test_the_balance_loss_moves_the_routers_and_not_the_reported_loss(system):
    idx = torch.randint(0, 50, (2, 20))
    plain, balanced = build(system).train(), build(system, balance=10.0).train()
    losses, grads = [], []
    for model in (plain, balanced):
        loss = model(idx, idx)[1]
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    last = max(i for i, c in enumerate(plain.chunks) if c.router_f)
    moved = [n for n in grads[0]
             if not torch.allclose(grads[0][n], grads[1][n], rtol=1e-6, atol=1e-12)]
    assert any(n.startswith(f'chunks.{last}.router_f') for n in moved)
    assert not any(n.startswith(f'chunks.{last + 1}') for n in moved)
    # descending it alone evens the load out
    before = [balance_loss_of(balanced, idx)]
    routers = [p for n, p in balanced.named_parameters() if 'router' in n]
    optimizer = torch.optim.Adam(routers, lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        sum(d.aux for c in balanced.features(idx)[1] for d in c).backward()
        optimizer.step()
    assert balance_loss_of(balanced, idx) < before[0]


def balance_loss_of(model, idx):
    return sum(d.aux for c in model.features(idx)[1] for d in c).item()


# ----------------------------------------------------------------------------- mixture of depths

def test_mod_at_full_capacity_with_gate_one_is_vanilla():
    vanilla = stir(GPT(tiny(chunks='1-1-1-1')).double())
    model = GPT(tiny(chunks='1-1-1-1', phi='mod', K=1, capacity=1.0)).double().train()
    model.load_state_dict({**model.state_dict(), **vanilla.state_dict()})
    constant_scores(model, [[1.0]])
    idx = torch.randint(0, 50, (2, 12))
    assert torch.allclose(model(idx)[0], vanilla(idx)[0], rtol=1e-12)


def test_mod_chooses_the_top_k_in_training_and_by_its_predictor_afterwards():
    model = build('mod').train()
    chunk, seen = model.chunks[1], []
    chunk.router_t.register_forward_hook(lambda r, args, out: seen.append((args[0], out[0])))
    idx = torch.randint(0, 50, (3, 24))
    _, decisions = model.features(idx)
    assert [len(d) for d in decisions] == [0, 1, 0, 1, 0, 1]
    (x, score), = ((x.view(3, 24, -1), score.view(3, 24)) for x, score in seen)
    want = torch.zeros(3, 24, dtype=torch.bool)
    for b in range(3):
        want[b, score[b].argsort(descending=True)[:6]] = True  # capacity 0.25 of 24
    assert torch.equal(decisions[1][0].ids.view(3, 24) == 0, want)
    hand = F.binary_cross_entropy_with_logits(chunk.predictor(x)[..., 0], want.double())
    assert torch.allclose(decisions[1][0].aux, hand)
    grads = torch.autograd.grad(decisions[1][0].aux, list(model.parameters()), allow_unused=True)
    touched = {n for (n, _), g in zip(model.named_parameters(), grads) if g is not None}
    assert touched == {n for n, _ in model.named_parameters() if n.startswith('chunks.1.predictor')}
    _, decisions = model.eval().features(idx)
    assert torch.equal(decisions[1][0].ids.view(3, 24) == 0, chunk.predictor(x)[..., 0] > 0)


def test_which_layers_are_kept(tmp_path):
    layer = hugging_face(tmp_path, n_layer=6).transformer.h[1:5]
    for kept, A, F_ in ((dict(keep_A=[3, 1], keep_F=[0, 2, 3]), [3, 1], [0, 2, 3]),
                        (dict(N_A=2, N_F=3), [0, 1], [0, 1, 2]),
                        (dict(tied=True), [0, 0, 0, 0], [0, 0, 0, 0])):
        settings = dict(chunks='1-4-1', K=2, H=2, router_dim=8, **kept)
        chunk = GPT.from_pretrained(str(tmp_path), **settings).chunks[1]
        want_A = torch.stack([layer[i].attn.c_proj.weight for i in A])
        want_F = torch.stack([layer[i].mlp.c_fc.bias for i in F_])
        assert torch.equal(chunk.attn.stack().out_w, want_A)
        assert torch.equal(chunk.ffn.stack().fc_b, want_F)


@pytest.mark.parametrize('router', ['gru', 'mlp', 'linear'])
@pytest.mark.parametrize('phi', ['mom', 'layer_skip', 'early_exit', 'moe', 'moe_share', 'mod'])
def test_any_router_goes_with_any_phi(phi, router):
    layers = dict(chunks='1-1-1') if phi in ('moe', 'mod') else {}
    K = 1 if phi in ('layer_skip', 'early_exit', 'mod') else 2
    variants = [{}]
    if phi != 'mod':
        variants.append(dict(balance=0.1))
    if K > 1:
        variants.append(dict(router_weights='softmax'))
    for kw in variants:
        model = stir(GPT(tiny(phi=phi, router=router, K=K, **layers, **kw)).double(), std=0.2)
        idx = torch.randint(0, 50, (2, 12))
        logits, loss = model.train()(idx, idx)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert sum(p.grad.abs().sum() for n, p in model.named_parameters() if 'router' in n) > 0
        assert torch.allclose(model(idx[1:])[0], logits[1:], rtol=1e-10)  # no sequence sees another
        full, cache = model.eval().features(idx)[0], Cache(model.cfg, 2, 'cpu', torch.float64)
        pieces = [model.features(part, cache)[0] for part in idx.split(5, 1)]
        assert torch.allclose(torch.cat(pieces, 1), full, rtol=1e-10)


def test_the_balance_loss_takes_the_tau_of_the_weights_and_its_coefficient(monkeypatch):
    seen, real = [], model_py.balance_loss
    monkeypatch.setattr(model_py, 'balance_loss',
                        lambda r, ids, tau: seen.append((tau, real(r, ids, tau))) or seen[-1][1])
    for weights, want in (('linear', 1.0), ('softmax', 0.5)):
        seen.clear()
        model = build('mom', balance=0.25, tau=0.5, router_weights=weights).train()
        _, decisions = model.features(torch.randint(0, 50, (2, 20)))
        assert [tau for tau, _ in seen] == [want] * 6
        assert [d.aux for d in decisions[1]] == [0.25 * loss for _, loss in seen]


def test_attention_of_moe_share_goes_through_the_layers():
    model = build('moe_share')
    picked = [model.chunks[1].choose('A', None, h, {}).rows for h in range(4)]
    assert picked == [[0], [1], [2], [3]]


def test_a_fresh_predictor_of_mod_begins_with_the_probability_of_training():
    torch.manual_seed(0)
    model = GPT(tiny(chunks='1-1-1-1', phi='mod', K=1, capacity=0.125)).eval()
    for chunk in model.chunks[1::2]:
        bias = chunk.predictor[-1].bias.item()
        assert torch.sigmoid(torch.tensor(bias)).item() == pytest.approx(0.125)
    full = GPT(tiny(chunks='1-1', phi='mod', K=1, capacity=1.0))
    assert full.chunks[1].predictor[-1].bias.isfinite()


def test_mod_where_no_token_is_chosen():
    model = build('mod')
    with torch.no_grad():
        for chunk in model.chunks[1::2]:
            chunk.predictor[2].weight.zero_()
            chunk.predictor[2].bias.fill_(-1)
    rest = copy.deepcopy(model)
    rest.chunks = rest.chunks[::2]
    idx = torch.randint(0, 50, (2, 10))
    assert torch.allclose(model(idx)[0], rest(idx)[0], rtol=1e-12)


# ----------------------------------------------------------------------------- mixture of modules

@pytest.mark.parametrize('H', [1, 3])
def test_all_of_n_equal_modules_with_weights_that_sum_to_one(H):
    """Closed form. N equal modules, all selected: q, k and v are unweighted sums, so N times those
    of one module (Eq. 5); output projections and FFNs are sums with weights of total 1, so those of
    one. Hence a step is the vanilla block with qkv_w and qkv_b times N, and H steps are H times
    that block."""
    N = 4
    settings = dict(chunks='1-4', K=N, H=H, skip=False, router_weights='softmax')
    model = stir(GPT(tiny(**settings, tied=True)).double())
    block = stir(GPT(tiny(chunks='1-1', phi='mom')).double())
    vanilla = GPT(tiny(chunks='-'.join('1' * (1 + H)))).double()
    state = {}
    for name in vanilla.state_dict():
        _, c, part = name.split('.', 2) if name.startswith('chunks') else (None, None, None)
        state[name] = model.state_dict()[name if c in (None, '0') else f'chunks.1.{part}'].clone()
        if c not in (None, '0') and 'qkv' in part:
            state[name] *= N
    vanilla.load_state_dict(state)
    idx = torch.randint(0, 50, (2, 15))
    got, want = model(idx)[0], vanilla(idx)[0]
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got, block(idx)[0])
    # the same for separately stored modules that happen to be equal
    loose = GPT(tiny(**settings)).double()
    tied = model.state_dict()
    loose.load_state_dict({n: tied[n].expand_as(p) for n, p in loose.state_dict().items()})
    assert torch.allclose(loose(idx)[0], want, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize('wrong, message', [
    (dict(phi='mixture'), 'one of mom, layer_skip'), (dict(phi='layer_skip'), 'must be K=1'),
    (dict(phi='early_exit', K=1, skip=False), 'needs skip=True'),
    (dict(phi='layer_skip', K=1, N_F=2), 'leave N_F'),
    (dict(phi='share', K=1), 'numbers from 0 to 3, such as \\[0, 0, 2, 2\\]'),
    (dict(phi='share', K=1, c_share=[0, 4]), 'numbers from 0 to 3'),
    (dict(phi='share', K=1, c_share=[0, 2], N_F=2), 'leave N_F'),
    (dict(phi='share', K=1, c_share=[0, -1]), 'numbers from 0'),
    (dict(phi='share', K=1, c_share=[.5]), 'numbers'),
    (dict(phi='share', c_share=[0]), 'must be K=1'),
    (dict(phi='moe'), "chunks='1-4-1' must be '1-1-1-1-1-1'"),
    (dict(phi='mod', K=1), "must be '1-1-1-1-1-1'"),
    (dict(phi='moe', chunks='1-1', experts=2, K=3, skip=False), 'take K <= 2'),
    (dict(phi='moe_share', K=4, N_F=2), 'take K <= 3'), (dict(phi='moe_share', N_A=2), 'leave N_A'),
    (dict(phi='layer_skip', K=1, router_weights='softmax'), 'no gradient'),
    (dict(phi='mod', K=1, chunks='1-1', capacity=0.0), '0 < capacity <= 1'),
    (dict(phi='mod', K=1, chunks='1-1', capacity=1.5), '0 < capacity <= 1'),
    (dict(phi='mod', K=1, chunks='1'), 'nothing to route'),
    (dict(phi='share', K=1, chunks='1-1'), 'nothing to route'),
    (dict(phi='moe_share', tied=True), "tied=True .MoM-same. goes with"),
    (dict(balance=-1.0), 'balance=-1.0'),
    (dict(keep_A=[0, 4]), 'different modules of a chunk of 4: 0 to 3'),
    (dict(keep_F=[1, 1]), 'different modules'), (dict(keep_A=[0], N_A=1), 'say the same thing'),
    (dict(keep_A=[0], keep_F=[1], K=3), 'take K <= 2')])
def test_combinations_that_cannot_be_name_the_fix(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)


def test_config_of_a_vanilla_model_has_no_use_for_the_rest():
    assert MoMConfig(chunks='1-1', K=7).vanilla
