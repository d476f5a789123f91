"""analyze.py: numbers against counting, exchanged routes against dense loops, pages that parse."""
import json
import math
import os
import re
import runpy
import signal
import time
from collections import Counter
from dataclasses import asdict
from html.parser import HTMLParser
from xml.etree import ElementTree

import dense
import numpy as np
import pytest
import torch

import analyze
import common
import inputs
import report
import weights
from model import GPT, Decision
from tests import kill
from tests.test_model import dense_params, stir, tiny
from tests.test_phi import SYSTEMS, build

ROUTED = [name for name, kw in SYSTEMS.items() if name != 'vanilla' and kw.get('phi') != 'share']


def sequences(n=5, T=12, vocab=50):
    return np.random.default_rng(0).integers(0, vocab, (n, T + 1))


# ------------------------------------------------------------------------ running with other routes

@pytest.mark.parametrize('system', ROUTED)
def test_a_run_with_its_own_routes_changes_nothing(system):
    model, idx = build(system), sequences()
    loss, decisions = analyze.run(model, idx, 'cpu', 2)
    plain = model(torch.from_numpy(idx[:, :-1]), torch.from_numpy(idx[:, 1:]))[1].item()
    assert loss == pytest.approx(plain, rel=1e-6)  # the last sum is in fp32
    own = analyze.shuffled(decisions, torch.arange(60))
    again, same = analyze.run(model, idx, 'cpu', 2, own)
    assert again == pytest.approx(loss, rel=1e-12)
    assert all(torch.equal(d.ids, same[key].ids) for key, d in decisions.items())
    assert len(decisions) == sum(len(d) for d in model.features(torch.from_numpy(idx[:1, :-1]))[1])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    other, exchanged = analyze.run(model, idx, 'cpu', 3, analyze.shuffled(decisions, order))
    assert all(torch.equal(d.ids[order], exchanged[key].ids) for key, d in decisions.items())
    if system != 'mod':  # its few chosen tokens may be the same
        assert abs(other - loss) > 1e-6
    assert analyze.run(model, idx, 'cpu', 2)[0] == loss  # nothing is left behind


def test_exchanged_routes_are_those_of_the_dense_loops():
    model = stir(GPT(tiny(K=2, H=2, block_size=7)).double().eval(), seed=3)
    idx = sequences(2, 7)
    _, decisions = analyze.run(model, idx, 'cpu', 2)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(4))
    for decide in (analyze.shuffled(decisions, order), analyze.frozen(decisions)):
        loss, _ = analyze.run(model, idx, 'cpu', 1, decide)
        params, total = dense_params(model), 0.0
        for b in range(2):
            x = torch.stack([params['wte'][i] + params['wpe'][t]
                             for t, i in enumerate(idx[b, :-1])])
            for c, chunk in enumerate(params['chunks']):
                for h in range(model.chunks[c].H):
                    routes = []
                    for kind in 'AF':
                        if (c, kind, h) not in decisions:
                            routes.append([[(0, 1.0)]] * 7)
                            continue
                        ids, weights = decide((c, kind, h), slice(7 * b, 7 * b + 7))
                        routes.append([[(i, w) for i, w in zip(one, its) if i < 4]
                                       for one, its in zip(ids.tolist(), weights)])
                    x = x + dense.attention_step(x, chunk['attn'], routes[0], 2)
                    x = x + dense.ffn_step(x, chunk['ffn'], routes[1])
            logits = dense.layer_norm(x, params['ln_f_w'], params['ln_f_b']) @ params['wte'].T
            targets = torch.from_numpy(idx[b, 1:])
            total += torch.nn.functional.cross_entropy(logits, targets, reduction='sum').item()
        assert loss == pytest.approx(total / 14, rel=1e-6)


def test_frozen_is_the_commonest_set_whatever_its_order():
    ids = torch.tensor([[0, 2], [2, 0], [1, 2], [2, 0]])
    weights = torch.tensor([[1.0, 5.0], [7.0, 3.0], [9.0, 9.0], [6.0, 2.0]])
    decide = analyze.frozen({'d': Decision('A', 0, 2, ids, weights, None, None)})
    ids, weights = decide('d', slice(0, 3))
    assert ids.tolist() == [[0, 2]] * 3 and weights.tolist() == [[2.0, 6.0]] * 3


# ----------------------------------------------------------------------------- numbers

def test_entropy_and_information():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, 4000), rng.integers(0, 4, 4000)
    assert analyze.entropy(np.arange(8)) == 3 and analyze.entropy(np.zeros(5, int)) == 0
    assert abs(analyze.information(a, b, rng)) < 0.005
    assert analyze.information(a, a // 2, rng) == pytest.approx(analyze.entropy(a // 2))
    # Many are seen once: half of the plug-in estimate is chance.
    words = np.minimum(rng.zipf(1.3, 4000), 3000)
    some = words % 500
    assert analyze.information(words, some, rng) == pytest.approx(analyze.entropy(some))
    assert analyze.information(words, b, rng) == pytest.approx(0, abs=0.02)
    assert analyze.information(a, np.zeros(4000, int), rng) == 0
    few, many = rng.integers(0, 50, 500), rng.integers(0, 50, 500)
    plain = analyze.entropy(few) + analyze.entropy(many) - analyze.entropy(few, many)
    assert plain > 2  # what the correction is for
    assert abs(analyze.information(few, many, rng)) < 0.1


def test_transitions_by_counting():
    rng = np.random.default_rng(1)
    steps = [[set(rng.choice(4, rng.integers(1, 3), replace=False).tolist()) for _ in range(50)]
             for _ in range(3)]
    masks = [np.array([sum(1 << i for i in s) for s in step]) for step in steps]
    got = analyze.transitions(masks, 3)
    flow = np.zeros((4, 4))
    for one, two in zip(steps, steps[1:]):
        for a, b in zip(one, two):
            for i in a:
                for j in b:
                    flow[i, j] += 1 / len(a) / len(b)
    assert np.allclose(got, flow / flow.sum(1, keepdims=True))
    got = analyze.transitions([np.array([1, 1]), np.array([2, 4])], 2)
    assert np.allclose(got, [[0, 0.5, 0.5], [0] * 3, [0] * 3])


def test_the_numbers_of_a_model_by_counting():
    model, idx = build('mom'), sequences(6, 20)
    kinds = np.random.default_rng(2).integers(0, 6, 120)
    out, named = analyze.analyse(model, idx, kinds, 'cpu', 4, 0)
    decisions = analyze.run(model, idx, 'cpu', 4)[1]
    assert [(one['chunk'], one['kind']) for one in out['chunks']] == [(1, 'A'), (1, 'F')]
    total = Counter()
    for one in out['chunks']:
        key = one['chunk'], one['kind']
        picked = [[set(ids) for ids in decisions[(*key, h)].ids.tolist()] for h in range(3)]
        written = [['+'.join('S' if i == 4 else str(i + 1) for i in sorted(s)) for s in step]
                   for step in picked]
        routes = Counter(', '.join(steps) for steps in zip(*written))
        assert out['tokens'] == 120 and one['distinct_routes'] == len(routes)
        assert one['off_the_commonest'] == pytest.approx(1 - max(routes.values()) / 120)
        for route in one['routes']:
            assert route['share'] == pytest.approx(routes[route['route']] / 120)
        shares = sorted((n / 120 for n in routes.values()), reverse=True)
        assert [r['share'] for r in one['routes']] == shares[:10]
        number, names = named[key]
        assert Counter(names[i] for i in number) == routes
        assert one['route_entropy'] == pytest.approx(-sum(p * math.log2(p) for p in shares))
        for i in range(5):
            shares = [np.mean([i in s for s in step]) for step in picked]
            assert one['shares'][i] == pytest.approx(shares)
            for h in range(3) if i < 4 else ():
                at_step = decisions[(*key, h)]
                pairs = zip(at_step.ids.flatten().tolist(), at_step.weights.flatten().tolist())
                its = [w for j, w in pairs if i == j]
                assert one['mean_weights'][i][h] == (pytest.approx(np.mean(its)) if its else None)
        skip = np.array([[4 in s for s in step] for step in picked])
        assert one['skip_by_step'] == pytest.approx(skip.mean(1)) == one['shares'][4]
        for k, name in enumerate(analyze.KINDS):
            assert one['skip_by_kind'][name] == pytest.approx(skip[:, kinds == k].mean())
        first = skip.reshape(3, 6, 20)[:, :, :3]  # of 8 parts of 20 positions
        assert one['skip_by_position'][0] == pytest.approx(first.mean())
        per_token = np.mean([[len(s - {4}) for s in step] for step in picked])
        assert one['modules_per_token'] == pytest.approx(per_token)
        total[key[1]] = one['modules_per_token']
    assert out['k_eff'] == pytest.approx(total)
    assert len(set(out['loss'].values())) == 4


def test_information_of_a_chunk():
    rng, M = np.random.default_rng(0), 4000
    token, position, kinds = rng.integers(0, 8, M), np.tile(np.arange(10), 400), np.zeros(M, int)
    for of, other in (('token', 'position'), ('position', 'token')):
        ids = torch.from_numpy((token if of == 'token' else position) % 2)[:, None]
        d = Decision('A', 0, 2, ids, torch.ones(M, 1), None, None)
        one, _ = analyze.of_chunk([d], token, position, kinds, 10, rng)
        assert one[f'information_{of}'] == pytest.approx(1, abs=0.01)
        assert abs(one[f'information_{other}']) < 0.01


def test_equal_tokens_exchange_their_routes(monkeypatch):
    model, idx = build('mom'), sequences(6, 20)
    orders = []

    def shuffled(decisions, order):
        orders.append(order)
        return analyze.frozen(decisions)

    monkeypatch.setattr(analyze, 'shuffled', shuffled)
    analyze.analyse(model, idx, np.zeros(120, int), 'cpu', 6, 0)
    token = idx[:, :-1].flatten()
    anyone, equal = orders
    assert sorted(anyone) == sorted(equal) == list(range(120))
    alone = np.bincount(token)[token] == 1
    assert (token[equal] == token).all() and ((equal == np.arange(120)) == alone).all()
    assert 0 < alone.sum() < 120
    assert (token[anyone] == token).mean() < 0.2


def test_kinds_of_tokens():
    raw = [b'\n', b'The', b' state', b's', b' ', b'1', b' 24', b',', b'.\n', '–'.encode(), b'\xe2',
           b'<|endoftext|>', b'']
    texts = analyze.token_texts(inputs.tokenizer('bytes'), list('Ü–ba'.encode()))
    kinds = [analyze.kind_of(before, b'b') for before in texts]
    assert kinds == [1, 2, 1, 1, 1, 2, 2]  # of \xc3, Ü, \xe2, ...
    befores = [''] + [one.decode(errors='ignore') for one in raw]
    got = [analyze.KINDS[analyze.kind_of(before, one)] for before, one in zip(befores, raw)]
    assert got == ['space', 'word begins', 'word begins', 'inside a word', 'space', 'digit',
                   'digit', 'punctuation', 'punctuation', 'other', 'other', 'other', 'other']


@pytest.mark.parametrize('size', [7, 16])
def test_the_first_token_of_a_sequence_follows_what_stands_before_it(size, monkeypatch, tmp_path):
    story = 'Über 3 œuvres, and once in a while 日本 – whatever that is.\r\nIt ends.\r\n' * 9
    (tmp_path / 'story.txt').write_bytes(story.encode())
    monkeypatch.setattr(analyze, 'text', str(tmp_path / 'story.txt'))
    monkeypatch.setattr(analyze, 'tokens', 250)  # spread, with gaps between the sequences
    idx, before = analyze.read_ids(inputs.tokenizer('bytes'), size, '')
    raw = story.encode()
    assert len(idx) == 250 // size and bytes(idx[0].tolist()) == raw[:size + 1]  # \r\n and all
    texts, kinds = analyze.texts_and_kinds(inputs.tokenizer('bytes'), idx, before)
    everything = analyze.token_texts(inputs.tokenizer('bytes'), list(raw))
    now = 0
    for ids, lead in zip(idx.tolist(), before):
        # Where the same bytes occur again, so does what is before them: the first one will do.
        start = raw.index(bytes(lead + ids)) + len(lead)
        for place in range(start, start + size):
            assert texts[now] == everything[place]
            previous = everything[place - 1] if place else ''
            assert kinds[now] == analyze.kind_of(previous, raw[place:place + 1])
            now += 1
    assert '\ufffd' not in ''.join(texts)


# ----------------------------------------------------------------------------- pictures

def numbers(model, n=6, T=20):
    """What analyse finds in a model: its chunks, and the kinds of tokens that it saw."""
    kinds = np.random.default_rng(2).integers(0, 3, n * T)
    out, _ = analyze.analyse(model, sequences(n, T), kinds, 'cpu', 4, 0)
    return out['chunks'], out['tokens_by_kind']


@pytest.fixture
def drawn(monkeypatch):
    """The figures of the .png files, in the order in which they are drawn."""
    figures, image = [], report.image

    def keep(figure, kind, **how):
        figures.extend([figure] * (kind == 'png'))
        return image(figure, kind, **how)
    monkeypatch.setattr(report, 'image', keep)
    return figures


def test_rows_of_pools_of_several_sizes_do_not_overprint(drawn, tmp_path):
    report.draw_shares(tmp_path, numbers(build('mom', chunks='2-9'))[0])
    boxes = [[label.get_window_extent() for label in axis.get_yticklabels()]
             for axis in drawn[0].axes]
    assert [len(one) for one in boxes] == [3, 3, 10, 10]
    for one in boxes:
        tops = sorted((box.y0, box.y1) for box in one)
        assert all(high < low for (_, high), (low, _) in zip(tops, tops[1:]))


def test_without_skip_nothing_is_drawn_of_it(drawn, tmp_path):
    chunks, seen = numbers(build('mom', skip=False))
    assert not any(one['has_skip'] for one in chunks) and chunks[0]['shares'][4] == [0, 0, 0]
    page = report.draw_shares(tmp_path, chunks) + report.draw_transitions(tmp_path, chunks)
    assert 'MHA 4' in page and 'SKIP' not in page
    rows = [[label.get_text() for label in axis.get_yticklabels()] for axis in drawn[0].axes]
    assert rows == [[f'{kind} {i}' for i in (1, 2, 3, 4)] for kind in ('MHA', 'FFN')]
    assert report.draw_skips(tmp_path, chunks, seen) == '' and len(drawn) == 2
    with_skip, seen = numbers(build('mom'))
    assert 'SKIP' in report.draw_transitions(tmp_path, with_skip)
    assert report.draw_skips(tmp_path, with_skip, seen)


def test_models_of_one_step_are_one_table(drawn, tmp_path):
    for system in ('moe', 'mod'):
        chunks, seen = numbers(build(system))
        page = report.draw_shares(tmp_path, chunks)
        assert page.count('<svg') == 1 and ('SKIP' in page) == (system == 'mod')
        assert len(drawn[-1].axes[0].get_xticks()) == len(chunks) > 1
        assert report.draw_transitions(tmp_path, chunks) == ''
        assert bool(report.draw_skips(tmp_path, chunks, seen)) == (system == 'mod')


def test_arrows_are_those_with_traffic(drawn, tmp_path):
    one = numbers(build('mom'))[0][0]
    assert np.sum(one['traffic']) == pytest.approx(1)
    share = np.array(one['traffic']).sum(1, keepdims=True)
    assert np.allclose(one['traffic'], share * one['transitions'])
    one['traffic'] = [[0.0] * 5 for _ in range(5)]
    one['traffic'][0][1], one['traffic'][1][1], one['traffic'][2][3] = 0.6, 0.391, 0.009
    one['transitions'] = [[0.99] * 5 for _ in range(5)]
    report.draw_transitions(tmp_path, [one])
    shapes = drawn[0].axes[0].patches
    arrows = [one for one in shapes if type(one).__name__ == 'FancyArrowPatch']
    assert len(arrows) == 1 and len(shapes) == 1 + 1 + 2 * 5  # a ring, and nodes with their colour
    assert [text.get_text() for text in drawn[0].axes[0].texts].count('0.99') == 2


def test_the_number_of_tokens_stands_under_their_kind(drawn, tmp_path):
    chunks, seen = numbers(build('mom'))
    page = report.draw_skips(tmp_path, chunks, {**seen, 'digit': 2})
    by_kind = drawn[0].axes[2]  # by step, by kind, by position; MHA beside FFN
    labels = [label.get_text() for label in by_kind.get_xticklabels()]
    assert labels[0] == f'space\n{seen["space"]}' and labels[-1] == 'digit\n2'
    assert page.count('<svg') == 6
    assert [axis.get_title()[:3] for axis in drawn[0].axes] == ['MHA', 'FFN'] * 3


def a_run(name, vanilla, losses, **same):
    val = [(100 * n, loss) for n, loss in enumerate(losses)]
    train = [(step, losses[0] if step < 5 else losses[1]) for step in range(1, val[-1][0] + 1)]
    return dict(folder=name, name=name, vanilla=vanilla, assembly=name, parameters=9,
                steps=val[-1][0], speed=9.0, mflops=2.0 if vanilla else 3.0, train=train,
                validation=val, bits=[losses[0], losses[-1]],
                same={key: 1 for key in analyze.SAME} | same)


def test_curves_and_what_they_come_to(drawn, tmp_path):
    other = a_run('first', True, [9, 2.5, 2.4], init_from='scratch')
    base, own = a_run('vanilla', True, [2.4, 2.3, 2.2]), a_run('mom', False, [2.6, 2.35, 2.1])
    runs = [other, base, own]
    assert analyze.find_base(runs, own) is base and analyze.find_base([other, own], own) is None
    report.draw_curves(tmp_path, runs, base)
    left, right = drawn[0].axes
    top = left.get_ylim()[1]
    values = np.concatenate([line.get_ydata() for line in left.lines])
    assert top < 9 and np.nanmax(values) <= top  # no line comes from above
    assert np.isnan(values).any()
    assert left.lines[1].get_ydata()[1:] == pytest.approx([2.5, 2.4])
    assert [*right.lines[-1].get_ydata()] == pytest.approx([0.2, 0.05, -0.1])
    assert len(right.lines) == 3 and right.get_title().startswith('difference from vanilla')
    said = report.conclusion(own, base)
    assert 'After 200 steps' in said
    assert 'mom is at 2.100 bits per byte, 0.100 below vanilla' in said
    assert '1.50 times the 2.00' in said and report.conclusion(own, None) == ''
    assert report.draw_curves(tmp_path, [], None) == ''


def test_numbers_and_names_on_the_page_are_those_of_the_picture(drawn, tmp_path):
    base, own = a_run('base', True, [2.4, 2.3]), a_run('lr0.0015', False, [2.4, 2.3004])
    page = report.draw_curves(tmp_path, [base, own], base)
    labels = re.findall('<text[^>]*>([^<]*)<', page)
    axis = drawn[0].axes[1]
    low, high = axis.get_ylim()
    ticks = [tick.get_text() for at, tick in zip(axis.get_yticks(), axis.get_yticklabels())
             if low <= at <= high]
    assert len({*ticks}) == len(ticks) > 2 and {*ticks, 'lr0.0015'} <= {*labels}


@pytest.mark.parametrize('name', ['c$^$', 'a$b', '_hidden', 'plain'])
def test_a_name_is_shown_as_it_is(name, drawn, tmp_path):
    runs = [a_run(name, True, [2.4, 2.3]), a_run(f'{name} 2', False, [2.4, 2.2])]
    page = report.draw_curves(tmp_path, runs, runs[0])
    labels = [text.strip() for text in re.findall('<text[^>]*>([^<]*)<', page)]
    assert labels.count(name) == 1 and labels.count(f'{name} 2') == 2
    assert f'difference from {name}, same batches' in ' '.join(' '.join(labels).split())


def test_a_run_without_a_step_in_common_has_no_difference(drawn, tmp_path):
    base, own = a_run('base', True, [2.4, 2.3]), a_run('mom', False, [2.4, 2.3])
    own['train'] = [(step + 100, loss) for step, loss in own['train']]
    report.draw_curves(tmp_path, [base, own], base)
    assert len(drawn[0].axes) == 1


def test_the_page_is_in_the_colours_of_its_reader():
    chunks = numbers(build('mom'))[0]
    svg = report.drawing((lambda axis: report.draw_graph(chunks[0], axis), 4, 4))
    assert 'currentColor' in svg and 'var(--paper)' in svg and report.INK not in svg
    assert 'id="fig' not in svg and 'w3.org' not in svg
    assert svg.startswith('<svg viewBox=') and svg.rstrip().endswith('</svg>')


def test_what_repeats_in_a_route_is_said_once():
    assert report.short('2+3, 2+3, 2+3, 2+3') == '2+3 ×4'
    assert report.short('1, 2, 2, 1') == '1, 2 ×2, 1'
    assert long('2+3 ×4') == '2+3, 2+3, 2+3, 2+3'
    assert long(report.short('1, S, S, 1')) == '1, S, S, 1'


def test_the_drawing_of_the_architecture_is_what_its_code_draws():
    drawing = runpy.run_path(os.path.join(common.ROOT, 'docs', 'architecture.py'))['architecture']()
    with open(os.path.join(common.ROOT, 'docs', 'architecture.svg'), encoding='utf-8') as f:
        assert f.read() == drawing
    texts = ElementTree.fromstring(drawing).iter('{http://www.w3.org/2000/svg}text')
    labels = [''.join(text.itertext()) for text in texts]
    modules = {f'{kind}{i}' for kind in ('MHA', 'FFN') for i in (1, 2, 3, 4)}
    assert modules < {*labels} and labels.count('SKIP') == 2


def test_each_pass_has_a_bar(monkeypatch):
    names = []

    def tqdm(batches, name, **how):
        names.append((name, len(batches)))
        return batches

    monkeypatch.setattr(analyze, 'tqdm', tqdm)
    numbers(build('mom'))
    assert names == [('pass 1 of 4, own routes', 2), ('pass 2 of 4, shuffled', 2),
                     ('pass 3 of 4, shuffled_equal', 2), ('pass 4 of 4, frozen', 2)]


# ---------------------------------------------------------------------------- the page, the command

class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.depth, self.texts, self.titles, self.linked, self.scripts = 0, [], [], [], []
        self.in_script = False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.in_script = tag == 'script'
        if attrs.get('class') == 'text':
            self.depth, self.texts, self.titles = 1, [*self.texts, ''], [*self.titles, []]
        elif tag == 'span' and self.depth:
            self.titles[-1].append(attrs['title'])
        inside = attrs.get('xlink:href', '#').startswith('#')
        linked = tag in ('link', 'img') or 'src' in attrs or 'href' in attrs or not inside
        self.linked += [tag] * linked

    def handle_endtag(self, tag):
        self.depth = 0 if tag == 'div' else self.depth
        self.in_script = False

    def handle_data(self, data):
        self.scripts += [data] * self.in_script
        if self.depth:
            self.texts[-1] += data


def long(route):
    """What report.short makes short."""
    parts = [part.partition(' ×') for part in route.split(', ')]
    return ', '.join(name for name, _, n in parts for _ in range(int(n or 1)))


def checkpoint(folder, **kw):
    """A model of one of the systems, as a run of train.py leaves it, and its data."""
    kill.write_data(folder / 'data', 30_000)
    model = stir(GPT(tiny(**{'vocab_size': 257, 'block_size': 32, **kw})), seed=1)
    (folder / 'run').mkdir()
    content = dict(model=model.state_dict(), model_config=asdict(model.cfg), step=60,
                   meta=dict(tokenizer='bytes'), settings=dict(data_dir=str(folder / 'data')))
    torch.save(content, folder / 'run' / 'last.pt')
    (folder / 'run' / 'log.csv').write_text(
        'step,loss,tokens_per_s,val_loss,val_bits_per_byte,k_a,k_f\n0,,,5.5,8,1,1\n'
        + ''.join(f'{n},{5 - n / 50},9,,,,\n' for n in range(1, 101)) + '100,,,3.25,4.7,1,1\n')
    return f'--source={folder / "run"}'


def command(folder, *args, fails=False):
    training = kill.Training(args, 1, folder / 'output', 'analyze.py')
    assert (training.wait() != 0) == fails, training.text()
    return training.text()


def test_the_command_draws_and_writes_what_it_says(tmp_path):
    story = ('He said: "a < b & c > d".\n\n\tÜber 3 œuvres, 日本 – 100%! </div>'
             '<script>alert(1)</script>\n') * 4
    (tmp_path / 'story.txt').write_text(story)
    source = checkpoint(tmp_path, K=2, H=3)
    out = command(tmp_path, source, f'--text={tmp_path / "story.txt"}',
                  f'--curves={tmp_path / "run"}', '--page=200')
    folder = tmp_path / 'run' / 'routes'
    for name in ('shares', 'transitions', 'skips', 'curves'):
        assert (folder / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
        assert f'{folder / name}.png' in out
        json.loads((folder / f'{name}.json').read_text())
    curve = json.loads((folder / 'curves.json').read_text())[str(tmp_path / 'run')]
    assert curve['validation'] == [[0, 5.5], [100, 3.25]] and curve['train'][49] == [50, 4.0]
    analysis = json.loads((folder / 'analysis.json').read_text())
    assert f'{analysis["tokens"]:,} tokens. Loss {analysis["loss"]["as_it_is"]:.4f}' in out
    page = (folder / 'page.html').read_text()
    assert 'story.txt with the weights of step 60.' in page  # of 100 that the log has
    reader = Reader()
    reader.feed(page)
    ids = list(story.encode())
    n = (len(ids) - 1) // 32 * 32  # whole sequences
    whole = bytes(ids[:min(n, 200)])
    assert reader.texts == [whole.decode(errors='ignore')] * 2 and '<' in reader.texts[0]
    assert reader.linked == [] and 'http' not in page
    assert [len(t) for t in reader.titles] == [200, 200]
    assert len(re.sub('<svg.*?</svg>', '', page)) < 100_000 and len(page) < 400_000
    with open(os.path.join(common.ROOT, 'report.html')) as f:  # the one script is the page's own
        assert len(reader.scripts) == 1 and f'<script>{reader.scripts[0]}</script>' in f.read()
    assert page.count('<hr>') == 2 * 6  # seven sequences
    for titles, one in zip(reader.titles, analysis['chunks']):
        routes = [long(title) for title in titles]
        assert all(route.count(',') == 2 for route in routes)
        assert {route['route'] for route in one['routes']} & set(routes)


def test_every_listed_route_has_a_colour_of_its_own(tmp_path):
    report.write_page(tmp_path, 'a < b', {'a': 'b', 'empty': ''}, 25)
    page = (tmp_path / 'page.html').read_text()
    colours = re.findall(r'--r\d+:([^;} ]+ [^;} ]+ [^;} ]+)', page)
    assert len(colours) == len(set(colours)) == 2 * 25 and '.r24{background:var(--r24)}' in page
    assert '<h2>a</h2>b' in page and 'empty' not in page
    assert '<title>Routes of a &lt; b</title>' in page


def test_a_page_without_skip_does_not_speak_of_it(tmp_path):
    source = checkpoint(tmp_path, K=2, H=3, skip=False) + '/last.pt'
    out = command(tmp_path, source, '--tokens=640', '--page=50')
    page = (tmp_path / 'run' / 'routes' / 'page.html').read_text()
    assert 'SKIP' not in page and 'Who skips' not in page and 'skips.png' not in out
    reader = Reader()
    reader.feed(page)
    assert [len(titles) for titles in reader.titles] == [50, 50]
    assert 'K2H3, chunks 1-4-1' in page
    assert '8.000' in page  # the run of that file, though no curves are asked for


def test_ctrl_c_is_one_sentence(tmp_path):
    args = [checkpoint(tmp_path), '--tokens=3000', '--batch=1']
    training = kill.Training(args, 1, tmp_path / 'output', 'analyze.py')
    while not (tmp_path / 'run' / 'routes').exists() and training.poll() is None:
        time.sleep(0.05)
    training.kill(signal.SIGINT)
    training.wait()
    again = common.command('python', 'analyze.py', *args)
    assert training.text() == f'analyze.py: stopped. Nothing is written. Begin anew with {again}\n'


@pytest.mark.parametrize('system', ['mod', 'moe', 'early_exit'])
def test_the_command_runs_on(system, tmp_path):
    out = command(tmp_path, checkpoint(tmp_path, **SYSTEMS[system]), '--tokens=640')
    assert '640 tokens. Loss' in out and 'told by the token' in out


def test_a_log_without_steps_is_no_mistake(tmp_path):
    source = checkpoint(tmp_path)
    (tmp_path / 'run' / 'log.csv').write_text('step,loss,val_loss\n0,,5.5\n')
    assert '128 tokens. Loss' in command(tmp_path, source, '--tokens=128')


def test_exported_weights_and_a_text_are_enough(tmp_path):
    source = checkpoint(tmp_path).removeprefix('--source=')
    model, tokenizer = inputs.model_and_tokenizer(source)
    weights.write_folder(model, tokenizer, tmp_path / 'hf')
    text = tmp_path / 'story.txt'
    text.write_text('It was a dark and stormy night. ' * 9)
    args = [f'--source={tmp_path}/hf', '--tokens=128']
    assert '128 tokens. Loss' in command(tmp_path, *args, f'--text={text}')
    wanted = f'no text at {tmp_path}/hf/val.bin: give a folder'
    assert wanted in command(tmp_path, *args, fails=True)


def test_mistakes(tmp_path):
    source = checkpoint(tmp_path)
    vanilla = tmp_path / 'vanilla'
    vanilla.mkdir()
    without = checkpoint(vanilla, chunks='1-1-1-1-1-1')
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'log.csv').write_text('step,loss,val_loss\n0,,5.5\n')
    (tmp_path / 'latin.txt').write_bytes(b'\xe9')
    for args, message in [([without], 'has no routers'),
                          ([source, '--tokens=0'], 'tokens=0 must be at least 1'),
                          ([source, f'--text={tmp_path}/empty.txt'], 'too few to look at'),
                          ([source, f'--text={tmp_path}/latin.txt'], 'is not UTF-8'),
                          ([source, f'--data_dir={tmp_path}'], 'no text at'),
                          ([source, f'--curves={tmp_path}'], 'has no log.csv'),
                          ([source, f'--curves={tmp_path}/new'], 'has no finished steps yet'),
                          ([source, '--device=gpu'], "device='gpu' must be 'auto'"),
                          ([source, '--seed=-1'], 'seed=-1 must be at least 0')]:
        stderr = command(tmp_path, *args, fails=True)
        assert message in stderr, stderr
        assert stderr.startswith('analyze.py: error: ') and stderr.count('\n') == 1, stderr
