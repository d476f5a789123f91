"""Cached decoding against the full forward pass, and beam search against transformers'."""
import inspect
import itertools

import pytest
import torch

import sample
from model import GPT
from sample import Cache, alike, draw, draw_likely, forget, generate, laid_out, prepared
from tests.test_model import hugging_face, stir, tiny
from tests.test_phi import SYSTEMS, build


@pytest.fixture(params=SYSTEMS)
def system(request):
    return request.param


def test_cached_equals_full_forward_in_uneven_pieces(system):
    model = build(system)
    idx = torch.randint(0, 50, (3, 24))
    full, _ = model.features(idx)
    cache = Cache(model.cfg, 3, 'cpu', torch.float64)
    pieces = [model.features(idx[:, a:b], cache)[0]
              for a, b in itertools.pairwise((0, 7, 8, 9, 15, 24))]
    assert (torch.cat(pieces, 1) - full).abs().max() < 1e-12 * full.abs().max()


def test_greedy_takes_the_likeliest_of_the_full_forward(system):
    model = build(system).train()
    idx = torch.randint(0, 50, (2, 5))
    greedy = model.generate(idx, 8, temperature=0)
    assert model.training
    model.eval()
    want = idx
    for _ in range(8):
        want = torch.cat((want, model(want)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(greedy, want)


def test_prompts_of_different_lengths_go_on_as_if_alone(system):
    model = build(system)
    idx, lengths = torch.randint(0, 50, (4, 9)), torch.tensor([9, 1, 4, 6])
    out = model.generate(idx, 7, temperature=0, lengths=lengths, stop=13)
    for b, n in enumerate(lengths.tolist()):
        alone = model.generate(idx[b:b + 1, :n], 7, temperature=0, stop=13)[0].tolist()
        assert out[b].tolist()[:len(alone)] == alone and set(out[b].tolist()[len(alone):]) <= {13}
    padded = torch.where(torch.arange(9) < lengths.unsqueeze(1), idx, 49)
    assert torch.equal(out, model.generate(padded, 7, temperature=0, lengths=lengths, stop=13))


def test_stop():
    model = build('mom')
    idx = torch.randint(0, 50, (3, 5))
    free = model.generate(idx, 12, temperature=0)
    stop = free[0, 8].item()  # row 0 says this at its fourth token at the latest
    out = model.generate(idx, 12, temperature=0, stop=stop)
    for row, whole in zip(out.tolist(), free.tolist()):
        end = whole.index(stop, 5) if stop in whole[5:] else None
        assert row[:end] == whole[:end][:len(row)] and (end is None or set(row[end:]) == {stop})
    alone = model.generate(idx[:1], 12, temperature=0, stop=stop)
    assert alone.size(1) <= 9 and alone[0, -1] == stop  # it ends when all rows have


def test_sliding_past_the_block():
    model = stir(GPT(tiny()))
    idx = torch.randint(0, 50, (2, 5))
    greedy = model.generate(idx, 30, temperature=0)  # 35 tokens, block_size = 24
    want = idx
    for _ in range(30):
        want = torch.cat((want, model(want[:, -24:])[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(greedy, want)
    long = torch.randint(0, 50, (1, 40))
    want = model(long[:, -24:])[0][0, -1].argmax()
    assert torch.equal(model.generate(long, 1, temperature=0)[0, -1], want)


def test_sampling():
    model = stir(GPT(tiny()))
    idx = torch.randint(0, 50, (2, 5))
    greedy = model.generate(idx, 10, temperature=0)
    assert torch.equal(model.generate(idx, 10, top_k=1), greedy)
    assert torch.equal(model.generate(idx, 10, top_p=1e-6), greedy)
    p = model(idx[:1])[0][0, -1].softmax(-1)
    many = model.generate(idx[:1].repeat(4000, 1), 1)[:, -1].bincount(minlength=50) / 4000
    assert (many - p).abs().max() < 0.04
    few = model.generate(idx[:1].repeat(4000, 1), 1, top_k=5)[:, -1].unique()
    assert set(few.tolist()) == set(p.topk(5).indices.tolist())
    ranked = p.sort(descending=True)
    nucleus = ranked.indices[:int((ranked.values.cumsum(-1) < 0.6).sum()) + 1].tolist()
    drawn = model.generate(idx[:1].repeat(4000, 1), 1, top_p=0.6)[:, -1]
    some = drawn.bincount(minlength=50) / 4000
    assert set(some.nonzero().flatten().tolist()) == set(nucleus) and len(nucleus) > 1
    assert (some[nucleus] - p[nucleus] / p[nucleus].sum()).abs().max() < 0.05
    torch.manual_seed(0)
    first = model.generate(idx, 10, temperature=1.5, top_k=5)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(idx, 10, temperature=1.5, top_k=5))


def test_the_method_takes_what_the_function_takes():
    of_method, of_function = (inspect.signature(f).parameters for f in (GPT.generate, generate))
    assert [*of_method.values()][1:] == [*of_function.values()][1:]  # but for self, model


@pytest.mark.parametrize('beams', [2, 4])
def test_beam_search_equals_transformers(beams, tmp_path):
    hf = hugging_face(tmp_path, n_layer=2)
    stir(hf, std=0.3)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    same = 0
    for seed in range(12):
        idx = torch.randint(0, 211, (3, 6), generator=torch.Generator().manual_seed(seed))
        stop = hf(idx).logits[0, -1].topk(3).indices[-1].item()  # a likely one
        want = hf.generate(idx, attention_mask=torch.ones_like(idx), num_beams=beams,
                           do_sample=False, max_new_tokens=8, eos_token_id=stop, pad_token_id=stop,
                           length_penalty=1.0, early_stopping=False)
        got = model.generate(idx, 8, beams=beams, stop=stop)
        greedy = model.generate(idx, 8, temperature=0, stop=stop)
        width = max(got.size(1), want.size(1))
        got, want, greedy = (torch.nn.functional.pad(t, (0, 99), value=stop)[:, :width]
                             for t in (got, want, greedy))
        assert torch.equal(got, want), seed
        same += int(torch.equal(got, greedy))
    assert same < 12  # beams find what greedy does not


@pytest.mark.parametrize('system', ['mom', 'mod', 'early_exit'])
def test_beam_search_of_prompts_of_different_lengths(system):
    model = build(system)
    idx, lengths = torch.randint(0, 50, (3, 9)), torch.tensor([9, 2, 5])
    out = model.generate(idx, 6, beams=3, stop=7, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = model.generate(idx[b:b + 1, :n], 6, beams=3, stop=7)[0].tolist()
        assert out[b].tolist()[:len(alone)] == alone
    text = out[1, :8]  # as many as it can hold: its mean log-probability is not below greedy's
    greedy = model.generate(idx[1:2, :2], 6, temperature=0, stop=7)[0]

    def mean(text):
        after = torch.arange(1, len(text) - 1)
        logp = model(text[None, :-1])[0].log_softmax(-1)[0, after, text[2:]]
        over = (text[2:] == 7).nonzero()
        return logp[:int(over[0]) + 1 if len(over) else None].mean()
    assert mean(text) >= mean(greedy) - 1e-9


def test_bfloat16_weights_on_the_cpu(system):
    if system == 'mod':
        pytest.skip('its predictor may round to the other side')
    model = build(system).float()
    idx = torch.randint(0, 50, (2, 12))
    full = model(idx)[0]
    model.cast(torch.bfloat16)
    cache = Cache(model.cfg, 2, 'cpu', torch.bfloat16)
    pieces = [model.features(idx[:, a:b], cache)[0] for a, b in itertools.pairwise((0, 7, 8, 12))]
    pieces = torch.cat(pieces, 1)
    assert pieces.dtype == torch.bfloat16
    close = (torch.nn.functional.linear(pieces, model.wte.weight).float() - full).abs().amax(-1)
    assert close.median() < 0.1 * full.std()  # some tokens' choices flip
    assert all(p.dtype == (torch.float32 if 'router' in n or 'predictor' in n else torch.bfloat16)
               for n, p in model.named_parameters())
    assert model.generate(idx, 4, temperature=0).shape == (2, 16)


def test_ids_beyond_the_tokenizer_s_are_not_chosen():
    model = stir(GPT(tiny()))
    idx = torch.randint(0, 50, (2, 5))
    for how in (dict(temperature=0), dict(temperature=5.0), dict(beams=2)):
        free = model.generate(idx, 10, **how)[:, 5:]
        bound = model.generate(idx, 10, **how, vocab=10)[:, 5:]
        assert free.max() >= 10 > bound.max()


def test_mistakes_name_the_fix():
    model = GPT(tiny())
    idx = torch.zeros(2, 20, dtype=torch.int64)
    for args, message in [(dict(temperature=-1), 'temperature=-1'), (dict(top_k=0), 'top_k=0'),
                          (dict(top_p=1.5), 'top_p=1.5'), (dict(top_p=0.0), 'top_p=0.0'),
                          (dict(beams=0), 'beams=0'), (dict(beams=2), 'do not fit'),
                          (dict(temperature=float('inf')), 'temperature=inf'),
                          (dict(temperature=float('nan')), 'temperature=nan'),
                          (dict(vocab=0), 'vocab=0'), (dict(vocab=51), 'from 1 to 50'),
                          (dict(vocab=1, beams=2), 'at least 2 with beams'),
                          (dict(lengths=[3]), 'each of the 2 rows'),
                          (dict(lengths=torch.tensor([3, 21])), 'a length of 1 to 20'),
                          (dict(lengths=torch.tensor([3])), 'each of the 2 rows'),
                          (dict(lengths=torch.tensor([3, 20])), 'do not fit block_size=24')]:
        with pytest.raises(ValueError, match=message):
            model.generate(idx, 5, **args)
    with pytest.raises(ValueError, match='longer than block_size=24'):
        model(torch.zeros(1, 25, dtype=torch.int64))


def test_beams_of_a_row_do_not_depend_on_the_other_rows():
    """A row that has ended stays ended, however long the others go on."""
    for seed in range(60):
        torch.manual_seed(seed)
        model = stir(GPT(tiny(chunks='1-1', vocab_size=12)), seed=seed).double().eval()
        idx = torch.randint(0, 12, (6, 3))
        together = model.generate(idx, 18, beams=2, stop=2).tolist()
        for row, whole in zip(idx, together):
            alone = model.generate(row[None], 18, beams=2, stop=2)[0].tolist()
            assert whole[:len(alone)] == alone and set(whole[len(alone):]) <= {2}, seed


def test_a_generation_that_raises_leaves_the_model_in_its_mode(monkeypatch):
    model = GPT(tiny()).train()

    def fail(*args, **kwargs):
        raise RuntimeError
    monkeypatch.setattr(model, 'features', fail)
    with pytest.raises(RuntimeError):
        model.generate(torch.zeros(1, 3, dtype=torch.int64), 2)
    assert model.training


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('rows', [1, 2, 17, 65])
@pytest.mark.parametrize('shape', [(32, 48), (48, 32), (24, 203), (16, 192), (7, 100)])
@pytest.mark.parametrize('intel', [False, True])
def test_products_of_few_rows(intel, shape, rows, threads, monkeypatch):
    """In every layout they are the product: as stored, in parts, packed; under autocast, too."""
    monkeypatch.setattr('sample.is_intel', lambda: intel)
    x, w, b = torch.randn(rows, shape[0]), torch.randn(shape), torch.randn(shape[1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for stored in (w, w.t().contiguous().t()):
            for several in (False, True):
                matrix = laid_out(stored, several)
                assert torch.allclose(matrix(x), x @ w, atol=1e-4)
                assert torch.allclose(matrix(x, b), x @ w + b, atol=1e-4)
                half = laid_out(stored.bfloat16(), several)(x.bfloat16(), b.bfloat16())
                assert torch.allclose(half.float(), x @ w + b, atol=0.5)
                with torch.autocast('cpu', torch.bfloat16):
                    assert torch.allclose(matrix(x, b).float(), x @ w + b, atol=0.5)
                    assert torch.allclose(matrix(x.bfloat16(), b).float(), x @ w + b, atol=0.5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('rows', [1, 3])
def test_text_under_autocast(rows):
    model, idx = stir(GPT(tiny())).eval(), torch.randint(0, 50, (rows, 5))
    lengths = [5, 2, 3][:rows]
    for model in (model, stir(GPT(tiny(**SYSTEMS['mod']))).eval()):
        with torch.autocast('cpu', torch.bfloat16):
            assert model.generate(idx, 6, temperature=0).shape == (rows, 11)
            assert model.generate(idx, 6, temperature=0, lengths=lengths).shape == (rows, 11)


def test_one_row_and_several_share_what_is_kept():
    """A copy for several rows serves one row, too; that for one is replaced when several come."""
    idx, model = torch.randint(0, 50, (3, 5)), stir(GPT(tiny())).eval()
    one = model.generate(idx[:1], 6, temperature=0)
    assert not prepared(model)['several']
    three = model.generate(idx, 6, temperature=0)
    assert prepared(model)['several'] and torch.equal(three[:1], one)
    kept = prepared(model)
    assert torch.equal(model.generate(idx[:1], 6, temperature=0), one) and prepared(model) is kept


def change(model):
    with torch.no_grad():
        model.chunks[1].attn.qkv_w.mul_(-2)


def fused_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.zeros(1, 4, dtype=torch.int64))[0].sum().backward()
    optimizer.step()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_what_is_kept_of_the_weights_follows_them(dtype):
    """A changed weight, a cast, another state_dict, an optimizer's step: the next call sees it."""
    idx, model = torch.randint(0, 50, (2, 5)), stir(GPT(tiny())).cast(dtype).eval()
    other = {name: p.flip(-1) for name, p in model.state_dict().items() if p.is_floating_point()}
    changes = [lambda: None, lambda: change(model),
               lambda: model.load_state_dict(other, strict=False),
               lambda: model.cast(torch.float64), lambda: model.cast(dtype),
               lambda: fused_step(model)]
    for make in changes:
        make()
        with_kept = model.generate(idx, 12, temperature=0)
        forget(model)
        assert torch.equal(with_kept, model.generate(idx, 12, temperature=0))
        kept = prepared(model)
        model.generate(idx, 2)
        assert kept and prepared(model) is kept  # nothing has changed: nothing is made anew
    model.train().generate(idx, 2)
    assert model not in sample.KEPT


def test_what_is_kept_of_weights_is_not_taken_under_another_autocast():
    model = GPT(tiny(K=2, H=2)).eval()
    kept = prepared(model)
    with torch.autocast('cpu', torch.bfloat16):  # which decides whether modules are stacked
        assert prepared(model) is not kept


def test_draws_have_the_shares_of_the_likeliest():
    torch.manual_seed(0)
    for top_p in (0.02, 0.5, 0.9, 1.0):  # with 0.02 most rows come to the sorting
        p = torch.randn(40).mul(2).softmax(-1)
        ranked = p.sort(descending=True)
        nucleus = ranked.indices[:int((ranked.values.cumsum(-1) < top_p - 1e-6).sum()) + 1]
        want = torch.zeros(40).index_copy(0, nucleus, p[nucleus])
        drawn = draw_likely(p.expand(20_000, 40), top_p).squeeze(1).bincount(minlength=40) / 20_000
        assert (drawn - want / want.sum()).abs().max() < 0.02
        assert not drawn[want == 0].any()
    shares = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(10_000, 5)
    assert set(draw(shares).flatten().tolist()) == {1, 3}


def test_rows_that_end_are_dropped_and_groups_of_prompts_cover_all(monkeypatch):
    lengths = torch.randint(1, 60, (40,)).sort(descending=True).values.tolist()
    groups = alike(lengths, 32)
    assert [i for first, end in groups for i in range(first, end)] == list(range(40))
    assert len(groups) > 2
    assert all(sum(lengths[first] - n for n in lengths[first:end]) <= 32 for first, end in groups)
    rows, read = [], sample.Decoder.read

    def count(decoder):
        rows.append(len(decoder.text))
        read(decoder)
    monkeypatch.setattr(sample.Decoder, 'read', count)
    model = build('mom')
    idx = torch.randint(0, 50, (8, 5))
    stop = model.generate(idx, 6, temperature=0)[0, 7].item()  # row 0 ends at its third token
    for lengths in (None, torch.tensor([5, 4, 1, 3, 5, 2, 5, 4])):
        for beams in (1, 3):
            rows.clear()
            out = model.generate(idx, 12, temperature=0 if beams == 1 else 1.0, beams=beams,
                                 stop=stop, lengths=lengths)
            assert rows[-1] < 8 * beams  # fewer as they end
            for b, n in enumerate([5] * 8 if lengths is None else lengths.tolist()):
                how = dict(temperature=0) if beams == 1 else dict(beams=beams)
                alone = model.generate(idx[b:b + 1, :n], 12, stop=stop, **how)[0].tolist()
                assert out[b, :len(alone)].tolist() == alone
                assert set(out[b, len(alone):].tolist()) <= {stop}


def test_a_list_of_lengths_and_a_tiny_temperature():
    model = stir(GPT(tiny()))
    idx = torch.randint(0, 50, (2, 5))
    greedy = model.generate(idx, 6, temperature=0, lengths=torch.tensor([5, 3]))
    assert torch.equal(model.generate(idx, 6, temperature=1e-45, lengths=[5, 3]), greedy)
