"""model.py against independent oracles: transformers' GPT-2, the MoM of dense.py, counted FLOPs."""
import itertools
import math
from functools import partial

import dense
import pytest
import safetensors.torch
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import common
from model import GPT, MoMConfig, sort_rows

transformers.logging.set_verbosity_error()
SIZES = {'gpt2': (768, 12, 12, 124_439_808), 'gpt2-medium': (1024, 24, 16, 354_823_168),
         'gpt2-large': (1280, 36, 20, 774_030_080), 'gpt2-xl': (1600, 48, 25, 1_557_611_200)}


def tiny(**kw):
    shape = dict(chunks='1-4-1', n_embd=16, n_head=2, block_size=24, vocab_size=50, router_dim=8)
    return MoMConfig(**{**shape, **kw})


def stir(model, seed=0, std=0.3):
    """Random values everywhere, LayerNorms and biases too: no mistake hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype) * std
            p.copy_(noise + ('ln' in name and 'b' not in name))
    return model


def hugging_face(folder, n_embd=64, n_layer=3, n_head=4, **kw):
    config = transformers.GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head, n_positions=32,
                                     vocab_size=211, bos_token_id=0, eos_token_id=0, **kw)
    hf = transformers.GPT2LMHeadModel(config)
    stir(hf.eval(), std=0.05).save_pretrained(folder)
    return hf


# ----------------------------------------------------------------------------- GPT-2

@pytest.mark.parametrize('name', SIZES)
def test_gpt2_equals_transformers_at_the_width_of(name, tmp_path):
    width, _, heads, _ = SIZES[name]
    hf = hugging_face(tmp_path, n_embd=width, n_layer=2, n_head=heads)
    model = GPT.from_pretrained(str(tmp_path))
    idx = torch.randint(0, 211, (2, 32))
    want = hf(idx, labels=idx)
    # transformers shifts labels itself, ours are the next tokens
    logits, loss = model(idx, torch.cat((idx[:, 1:], torch.full((2, 1), -100)), 1))
    assert (logits - want.logits).abs().max() < 1e-4
    assert abs(loss - want.loss) < 1e-5
    assert want.logits.std() > 0.1


@pytest.mark.parametrize('name', SIZES)
def test_every_size_has_the_shapes_of_transformers(name):
    width, layers, heads, count = SIZES[name]
    with torch.device('meta'):
        config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)
        hf = transformers.GPT2LMHeadModel(config)
        model = GPT(MoMConfig(chunks='-'.join('1' * layers), n_embd=width, n_head=heads))
    # Without the first axis of a chunk's parameters, which is N = 1.
    ours = [p.shape[1:] if n.startswith('chunks') else p.shape for n, p in model.named_parameters()]
    assert sorted(map(tuple, ours)) == sorted(tuple(p.shape) for p in hf.parameters())
    assert model.num_params() == (count, 0)


@pytest.mark.parametrize('file', ['bin', 'bin without prefix'])
def test_old_weight_files(file, tmp_path):
    hf = hugging_face(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    state = (hf.transformer if 'without' in file else hf).state_dict()
    torch.save(state, tmp_path / 'pytorch_model.bin')
    idx = torch.randint(0, 211, (1, 20))
    assert torch.allclose(GPT.from_pretrained(str(tmp_path))(idx)[0], hf(idx).logits, atol=1e-5)


def test_hub_names_fetch_what_a_directory_holds(tmp_path, monkeypatch):
    hf = hugging_face(tmp_path)
    asked = []

    def fetch(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', fetch)
    idx = torch.randint(0, 211, (1, 20))
    assert torch.allclose(GPT.from_pretrained('gpt2-medium')(idx)[0], hf(idx).logits, atol=1e-5)
    assert asked == [('openai-community/gpt2-medium', f)
                     for f in ('config.json', 'model.safetensors')]

    # The Hub's cache has links to files of such names.
    good = tmp_path / common.sha256(tmp_path / 'model.safetensors')
    (tmp_path / 'model.safetensors').rename(good)
    (tmp_path / 'model.safetensors').symlink_to(good)
    assert torch.allclose(GPT.from_pretrained('gpt2')(idx)[0], hf(idx).logits, atol=1e-5)
    raw = bytearray(good.read_bytes())
    raw[-2] ^= 1
    good.write_bytes(raw)
    with pytest.raises(ValueError, match='is broken .its SHA-256 is not'):
        GPT.from_pretrained('gpt2')

    def unreachable(repository, file):
        raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', unreachable)
    with pytest.raises(ValueError, match='give a local directory'):
        GPT.from_pretrained('gpt2')


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    hugging_face(tmp_path)
    (tmp_path / 'model.safetensors').unlink()

    class Evil:
        def __reduce__(self):
            return print, ('code ran',)
    torch.save({'wte.weight': Evil()}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='cannot be read'):
        GPT.from_pretrained(str(tmp_path))


def test_layers_become_modules(tmp_path):
    hf = hugging_face(tmp_path, n_layer=6)
    model = GPT.from_pretrained(str(tmp_path), chunks='1-4-1', K=2, H=3, router_dim=8, N_F=3)
    layer = hf.transformer.h
    qkv_w = torch.stack([layer[i].attn.c_attn.weight for i in (1, 2, 3, 4)])
    fc_b = torch.stack([layer[i].mlp.c_fc.bias for i in (1, 2, 3)])
    assert torch.equal(model.chunks[1].attn.qkv_w, qkv_w)
    assert torch.equal(model.chunks[1].ffn.fc_b, fc_b)
    assert torch.equal(model.chunks[2].ffn.ln_w[0], layer[5].ln_2.weight)
    assert model.chunks[0].router_a is None and model.chunks[1].router_f.E == 4
    short = GPT.from_pretrained(str(tmp_path), block_size=8)
    assert torch.equal(short.wpe.weight, hf.transformer.wpe.weight[:8])


def test_our_checkpoints_load_the_same_way(tmp_path):
    vanilla = stir(GPT(tiny(chunks='1-1-1-1-1-1')))
    torch.save({'model': vanilla.state_dict(), 'model_config': vars(vanilla.cfg)},
               tmp_path / 'last.pt')
    mom = GPT.from_pretrained(str(tmp_path), chunks='1-4-1', K=3, H=2)
    assert torch.equal(mom.chunks[1].attn.out_w[2], vanilla.chunks[3].attn.out_w[0])
    torch.save({'model': mom.state_dict(), 'model_config': vars(mom.cfg)}, tmp_path / 'mom.pt')
    again = GPT.from_pretrained(str(tmp_path / 'mom.pt'))
    idx = torch.randint(0, 50, (2, 9))
    assert again.cfg == mom.cfg and torch.equal(again(idx)[0], mom(idx)[0])
    with pytest.raises(ValueError, match='assembled already'):
        GPT.from_pretrained(str(tmp_path / 'mom.pt'), chunks='2-2-2')
    mom = GPT.from_pretrained(str(tmp_path), chunks='1-4-1', K=3, H=2, router_start='layers',
                              weigh_qkv=True)
    torch.save({'model': mom.state_dict(), 'model_config': vars(mom.cfg)}, tmp_path / 'layers.pt')
    for file, start, message in [
            ('mom', 'layers', 'has no chunks.1.router_a.bias'),
            ('layers', 'fresh', 'has chunks.1.router_a.bias, for which this model has no place')]:
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(str(tmp_path / f'{file}.pt'), router_start=start, weigh_qkv=True)


# ----------------------------------------------------------------------------- MoM

def dense_params(model):
    def router(r):
        if r is None or r.gates:  # dense.py has no Mixtral gate
            return None
        if r.gru:
            core = dict(r.gru.named_parameters())
        else:
            core = {'hidden_weight': r.mlp.weight, 'hidden_bias': r.mlp.bias}
        return {'W': r.out.weight, **core} | ({} if r.bias is None else {'bias': r.bias})
    chunks = [{'attn': dict(c.attn.named_parameters()), 'ffn': dict(c.ffn.named_parameters()),
               'router_a': router(c.router_a), 'router_f': router(c.router_f)}
              for c in model.chunks]
    return {'wte': model.wte.weight, 'wpe': model.wpe.weight, 'ln_f_w': model.ln_f.weight,
            'ln_f_b': model.ln_f.bias, 'chunks': chunks}


@pytest.mark.parametrize('case', [dict(K=1, H=3), dict(K=2, H=3), dict(K=2, H=5),
                                  dict(K=3, H=3, skip=False, router='mlp')], ids=str)
def test_routers_that_start_at_the_layers_restore_them(case, tmp_path):
    hugging_face(tmp_path)
    idx = torch.randint(0, 211, (2, 20))
    want = GPT.from_pretrained(str(tmp_path))(idx)[0]
    model = GPT.from_pretrained(str(tmp_path), chunks='3', router_dim=8, router_start='layers',
                                weigh_qkv=True, **case)
    near = (model(idx)[0] - want).std()
    with torch.no_grad():
        for router in (model.chunks[0].router_a, model.chunks[0].router_f):
            router.out.weight.zero_()
    assert torch.allclose(model(idx)[0], want, atol=1e-5)
    fresh = GPT.from_pretrained(str(tmp_path), chunks='3', router_dim=8, **case)(idx)[0]
    assert 0 < near < 0.05 * (fresh - want).std()


CASES = [dict(K=K, H=H, skip=skip)
         for K, H, skip in itertools.product((1, 2, 3, 4), (1, 2, 6), (True, False))]
CASES += [dict(K=5, H=2), dict(K=2, H=3, N_A=2, N_F=3), dict(K=4, H=2, N_A=2, skip=False),
          dict(K=3, H=4, N_A=3, N_F=1), dict(K=2, H=3, router='mlp'),
          dict(K=3, H=3, router='mlp', router_weights='softmax'),
          dict(K=2, H=4, router_weights='softmax'),
          dict(K=4, H=5, router_weights='softmax', tau=1.0, skip=False),
          dict(chunks='2-3', K=2, H=2), dict(chunks='4', K=1, H=4, router_dim=1),
          dict(chunks='1-1-2-1-3', K=2, H=2, router_dim=20),
          dict(K=2, H=2, router='mlp', router_dim=3),
          dict(chunks='3-1', K=2, H=2, router='mlp', router_dim=20),
          dict(K=1, H=5, router_start='layers'),
          dict(K=2, H=3, router_start='layers', weigh_qkv=True), dict(K=2, H=3, weigh_qkv=True),
          dict(K=4, H=2, skip=False, router='mlp', router_start='layers', weigh_qkv=True)]


@pytest.mark.parametrize(
    'case', CASES, ids=lambda case: ' '.join(f'{k}={v}' for k, v in case.items()))
def test_mom_equals_the_dense_one_in_outputs_and_gradients(case):
    cfg = tiny(**{**dict(chunks='1-4', n_embd=8, vocab_size=11, block_size=6), **case})
    model = stir(GPT(cfg).double(), seed=cfg.K * 10 + cfg.H)
    idx = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(1))
    got, _ = model(idx)
    K_a, K_f = (min(cfg.K, n + cfg.skip) for n in (cfg.N_A or 4, cfg.N_F or 4))
    want = dense.gpt(idx, dense_params(model), cfg.sizes, n_head=2, H=cfg.H, K_a=K_a, K_f=K_f,
                     skip=cfg.skip, kind=cfg.router, weights=cfg.router_weights, tau=cfg.tau,
                     weigh_qkv=cfg.weigh_qkv)
    assert (got - want).abs().max() < 1e-10 * want.abs().max()
    params = dict(model.named_parameters())
    probe = torch.randn(got.shape, dtype=torch.float64)
    ours = torch.autograd.grad((got * probe).sum(), params.values())
    theirs = torch.autograd.grad((want * probe).sum(), params.values(), materialize_grads=True)
    for name, g, w in zip(params, ours, theirs):
        assert (g - w).abs().max() <= 1e-9 * max(1, w.abs().max()), name


def test_empty_modules_and_tokens_that_skip_everything():
    model = stir(GPT(tiny(K=1, H=2, chunks='4')).double())
    for router in (model.chunks[0].router_a, model.chunks[0].router_f):
        W = router.out.weight.data
        # Module 1 is below module 2 where that is positive, and below SKIP elsewhere.
        W[1], W[4] = W[2] / 2, -W[2]
    idx = torch.randint(0, 50, (3, 20))
    logits, loss = model(idx, idx)
    loss.backward()
    picked = torch.cat([d.ids for d in model.features(idx)[1][0]])
    assert (picked == 4).any() and (picked == 2).any() and not (picked == 1).any()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    want = dense.gpt(idx, dense_params(model), [4], n_head=2, H=2, K_a=1, K_f=1, skip=True)
    assert (logits - want).abs().max() < 1e-10 * want.abs().max()


def test_sort_rows():
    # Of three tokens, two picks each. N = 3: 3 is SKIP.
    ids = torch.tensor([[2, 0], [3, 2], [0, 1]])
    rows = sort_rows(ids, 3, on_device=False)
    assert rows.token.tolist() == [0, 2, 2, 0, 1, 1] and rows.inverse.tolist() == [3, 0, 5, 4, 1, 2]
    assert rows.sizes == [2, 1, 2, 1]
    rows = sort_rows(ids, 3, on_device=True)
    assert rows.token.tolist() == [0, 2, 2, 0, 1, 1] and rows.module[:5].tolist() == [0, 0, 1, 2, 2]
    assert rows.ends.tolist() == [2, 3, 5] and rows.idle[:, 0].tolist() == [False] * 5 + [True]


def test_routing_is_in_full_precision_under_autocast():
    model = stir(GPT(tiny()))
    dtypes = []

    def note(router, args, out):
        dtypes.extend([out[0].dtype, out[1].dtype])

    model.chunks[1].router_a.register_forward_hook(note)
    with torch.autocast('cpu', torch.bfloat16):
        dtypes.extend(d.weights.dtype for d in model.features(torch.randint(0, 50, (2, 12)))[1][1])
        logits, loss = model(torch.randint(0, 50, (2, 12)), torch.randint(0, 50, (2, 12)))
    loss.backward()
    assert set(dtypes) == {torch.float32} and loss.isfinite()


# ----------------------------------------------------------------------------- costs

def test_flops_of_table_1():
    # A batch of 10 x 1,024 tokens.
    for name, tera in {'gpt2': 2.92, 'gpt2-medium': 8.28, 'gpt2-large': 17.76}.items():
        width, layers, heads, _ = SIZES[name]
        with torch.device('meta'):
            model = GPT(MoMConfig(chunks='-'.join('1' * layers), n_embd=width, n_head=heads))
        assert model.flops_per_token(1024) * 10_240 / 1e12 == pytest.approx(tera, rel=2e-3)


@pytest.mark.parametrize('case', [
    dict(skip=False), dict(skip=False, router='mlp'), dict(chunks='1-1')], ids=str)
@pytest.mark.parametrize('merged', [True, False])
def test_flops_formula_counts_what_runs(case, merged, monkeypatch):
    if not merged:
        monkeypatch.setattr('model.MOST_SUBSETS', 0)
    counted = []
    for B in (3, 8):
        torch.manual_seed(0)
        model = GPT(tiny(**case, K=3, H=9))
        for chunk in model.chunks:
            chunk.pools = partial(chunk.pools, keep=True)  # merge, however few the tokens
        with FlopCounterMode(display=False) as counter:
            model(torch.randint(0, 50, (B, 24)))
        counted.append(counter.get_total_flops())
    q = torch.zeros(1, 1, 24, 16)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    want = model.flops_per_token(24, merged=merged)
    if counter.get_total_flops() == 0:  # before torch 2.15 it does not see attention on the CPU
        want -= 4 * 24 * 16 * model.cfg.depth
    # In the difference, what does not grow with the tokens, merging, cancels.
    assert counted[1] - counted[0] == want * 5 * 24
    assert (counted[0] == want * 3 * 24) == (not merged or 'chunks' in case)
    saved = model.flops_per_token(24) - model.flops_per_token(24, merged=True)
    assert (saved > 0) == (merged and 'chunks' not in case)


def test_skip_costs_nothing():
    four, all_five = (GPT(tiny(chunks='4', K=K, H=2)) for K in (4, 5))  # of 4 modules and SKIP
    want = all_five.flops_per_token(24, k_a=4, k_f=4)
    assert four.flops_per_token(24) == all_five.flops_per_token(24) == want
    few = GPT(tiny(chunks='4', K=3, H=2, N_A=1, N_F=2))
    assert few.flops_per_token(24) == few.flops_per_token(24, k_a=1, k_f=2)


@pytest.mark.parametrize('want_logits', [True, False])
def test_the_loss_keeps_full_precision_and_an_empty_one_is_0(want_logits):
    model = stir(GPT(tiny()).double())
    idx = torch.randint(0, 50, (2, 12))
    logits, loss = model(idx, idx, want_logits)
    want = torch.nn.functional.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten())
    assert loss.dtype == torch.float64 and abs(loss - want) < 1e-14
    _, nothing = model(idx, torch.full_like(idx, -100), want_logits)
    nothing.backward()
    assert nothing == 0 and all(p.grad.abs().max() == 0 for p in model.parameters())


# ----------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize('wrong, message', [
    (dict(K=6), 'take K <= 5'), (dict(K=5, skip=False), 'take K <= 4'),
    (dict(K=3, N_A=1, N_F=1), 'take K <= 2'), (dict(K=0), 'at least 1'), (dict(H=0), 'at least 1'),
    (dict(chunks='1-x'), 'joined by'), (dict(chunks=''), 'joined by'),
    (dict(chunks='4-0'), 'joined by'), (dict(n_head=3), 'multiple of n_head'),
    (dict(router='lstm'), 'one of gru, mlp, linear'),
    (dict(router_weights='relu'), 'one of linear, softmax'),
    (dict(router_weights='softmax', K=1), 'no gradient'), (dict(chunks='1_0'), 'joined by'),
    (dict(router_weights='softmax', N_A=1, skip=False), 'no gradient'),
    (dict(tau=math.nan), 'above 0'), (dict(tau=math.inf), 'above 0'),
    (dict(balance=math.nan), 'at least 0'), (dict(balance=math.inf), 'at least 0'),
    (dict(balance=0.1, phi='mod', K=1, chunks='1-1'), "leave them out with phi='mod'"),
    (dict(balance=0.1, phi='share', K=1, c_share=[0]), "leave them out with phi='share'"),
    (dict(router_weights='softmax', phi='mod', K=1, chunks='1-1'), 'leave them out with'),
    (dict(phi='share', K=1, c_share=[0, 'a']), r"c_share=\[0, 'a'\] must be a list of whole"),
    (dict(phi='share', K=1, c_share=[[0]]), 'must be a list of whole numbers'),
    (dict(N_A=5), 'can keep 1 to 4'), (dict(N_F=-1), 'can keep 1 to 4'), (dict(tau=0.0), 'above 0'),
    (dict(router_start='x'), 'one of fresh, layers'),
    (dict(router_start='layers', router_weights='softmax'), "goes with .*not with .*'softmax'"),
    (dict(router_start='layers', K=2), 'needs weigh_qkv=True'),
    (dict(weigh_qkv=True, phi='share'), "phi='mom'"),
    (dict(router_start='layers', router='linear'), "goes with .*not with .*router='linear'")])
def test_wrong_shapes_name_the_fix(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny(**wrong)


def test_wrong_weights_name_the_fix(tmp_path):
    hugging_face(tmp_path)
    source = str(tmp_path)
    for overrides, message in [(dict(chunks='4-4'), 'sum to 8, but .* has 3 layers'),
                               (dict(n_embd=32), 'leave it out'),
                               (dict(block_size=64), '32 positions at most'),
                               (dict(vocab_size=99), 'leave it out')]:
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(source, **overrides)
    with pytest.raises(ValueError, match='neither one of gpt2'):
        GPT.from_pretrained('gpt3')
    weights = tmp_path / 'model.safetensors'
    good = safetensors.torch.load_file(weights)
    good['transformer.h.1.mlp.c_fc.weight'][3, 5] *= 2.0 ** 64  # one bit of its exponent
    safetensors.torch.save_file(good, weights)
    with pytest.raises(ValueError, match='chunks.1.ffn.fc_w in .* the file is broken'):
        GPT.from_pretrained(source)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match='cannot be read'):
        GPT.from_pretrained(source)
    weights.unlink()
    with pytest.raises(ValueError, match='neither model.safetensors nor'):
        GPT.from_pretrained(source)
    (tmp_path / 'config.json').unlink()
    with pytest.raises(ValueError, match='no checkpoint'):
        GPT.from_pretrained(source)
    (tmp_path / 'last.pt').write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match='cannot be read'):
        GPT.from_pretrained(source)


def test_other_activations_are_refused(tmp_path):
    hugging_face(tmp_path, activation_function='relu')
    with pytest.raises(ValueError, match='activation_function'):
        GPT.from_pretrained(str(tmp_path))


def test_new_weights_start_as_method_says():
    model = GPT(tiny(n_embd=64, H=3))  # six layers of modules, five steps
    std = 0.02 * math.sqrt(768 / 64)
    for name, p in model.named_parameters():
        last = name.split('.')[-1]
        if 'router' in name:
            assert p.abs().max() <= 1 / math.sqrt(8)
        elif last in ('ln_w', 'weight') and 'ln' in name or last.endswith('_b') or last == 'bias':
            assert (p == ('b' not in last)).all(), name
        else:
            want = std / math.sqrt(2 * 5) if last in ('out_w', 'proj_w') else std
            assert p.std().item() == pytest.approx(want, rel=0.08), name
