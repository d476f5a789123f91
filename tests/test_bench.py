"""bench.py: formulas against the paper and against what runs, tables against the JSON, every mode
as a command. gpu.py, without a GPU: what it runs, and that no part costs another."""
import glob
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
import transformers

import common
import gpu
from model import GPT, Decision, MoMConfig
from tests.test_docs import SCRIPTS, load

SHAPE = dict(chunks='1-4-1', K=2, H=2, router_dim=8, n_embd=16, n_head=2, block_size=24,
             vocab_size=50)
TINY = [*(f'--{key}={value}' for key, value in SHAPE.items()), '--device=cpu', '--repeats=2',
        '--threads=1']
MACHINE = {'device', 'cores', 'threads', 'torch', 'dtype', 'date'}
# Table 1's memory column, and its TFLOPs of MoM: E, I, P
PAPER_GIB = {'small': dict(E=2.45, I=2.63, P=3.34), 'medium': dict(E=3.33, I=3.80, P=5.69),
             'large': dict(E=4.13, I=5.15, P=9.24)}
PAPER_GPT2_GIB = dict(small=2.98, medium=4.74, large=7.20)
PAPER_TFLOPS = {'small': dict(E=2.45, I=3.49, P=5.04), 'medium': dict(E=6.80, I=10.20, P=16.23),
                'large': dict(E=14.84, I=20.31, P=36.07)}
KAHB = dict(E=dict(K=3, H=1), I=dict(K=3, H=2), P=dict(K=2, H=6))
SIZES = {'small': ('1-1-4-1-4-1', 768, 12), 'medium': ('1-1-1-4-1-4-1-4-1-4-1-1', 1024, 16),
         'large': ('1-4-1-4-1-4-1-4-1-4-1-4-1-4-1', 1280, 20)}


def bench(*argv):
    """The script as a command -> what it printed, and its last line, read."""
    done = subprocess.run([sys.executable, 'bench.py', *map(str, argv)], cwd=common.ROOT, text=True,
                          capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in lines if line.startswith('| ')]
    result = json.loads(lines[-1])
    assert set(result['machine']) == MACHINE and result['machine']['torch'] == torch.__version__
    assert result['mode'] == argv[0] and all(result['machine'].values())
    header, *cells = rows
    assert len(cells) == len(result['rows'])
    for row, want in zip(cells, result['rows']):  # what is printed is what the JSON says
        assert header == list(want)
        for cell, value in zip(row, want.values()):
            if value is None or isinstance(value, str):
                same = cell == ('n/a' if value is None else value)
            else:
                same = float(cell.replace(',', '')) == value
            assert same, (cell, value)
    return done.stdout, result


def script(monkeypatch, *argv):
    """The script run in this process -> its names."""
    path = os.path.join(common.ROOT, 'bench.py')
    monkeypatch.setattr(sys, 'argv', [path, *argv])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    names = {'__name__': 'bench', '__file__': path}
    with open(path) as f:
        exec(compile(f.read(), path, 'exec'), names)
    return names


@pytest.fixture(scope='module')
def names():
    with pytest.MonkeyPatch.context() as monkeypatch:
        return script(monkeypatch, 'table1', '--size=small', '--device=cpu')


# ----------------------------------------------------------------------------- Table 1

@pytest.fixture(scope='module')
def table1():
    stdout, result = bench('table1', '--threads=2')
    assert result['machine']['threads'] == 2
    assert [(row['size'], row['model'].split(' (K')[0]) for row in result['rows']] == [
        (size, model) for size in SIZES
        for model in ('GPT-2', 'MoD', 'MoE', 'MoE (share)', 'MoM_E', 'MoM_I', 'MoM_P')]
    return {(row['size'], row['model']): row for row in result['rows']}


def paper_gib(size, name):
    if name.startswith('MoM'):
        return PAPER_GIB[size][name[4]]
    return None if name == 'MoD' else PAPER_GPT2_GIB[size]


def test_memory_of_the_paper_is_decoded_and_ours_is_less(table1):
    for (size, name), row in table1.items():
        paper = paper_gib(size, name)
        assert row["paper's GiB"] == paper
        chunks, width, _ = SIZES[size]
        steps = sum(map(int, chunks.split('-')))
        if name.startswith('MoM'):
            steps = sum(1 if N == '1' else KAHB[name[4]]['H'] for N in chunks.split('-'))
        assert row['depth'] == steps
        gib = 10_240 * 4 * (50257 + 2 * width * steps) / 2**30
        assert row['GiB'] == pytest.approx(gib, abs=1e-3)
        if paper:  # which rounds to 0.01
            assert row['GiB with Q'] == pytest.approx(paper, abs=0.025), (size, name)
            less = 100 * (row['GiB'] / paper - 1)
            assert row['GiB'] < paper and row['GiB, %'] == pytest.approx(less, abs=0.06)


def mom(size, which, **kw):
    chunks, width, heads = SIZES[size]
    cfg = MoMConfig(chunks=chunks, n_embd=width, n_head=heads, skip=True, **KAHB[which], **kw)
    with torch.device('meta'):
        return GPT(cfg)


def test_the_papers_k_put_back_gives_the_papers_flops(table1):
    for size, tflops in PAPER_TFLOPS.items():
        for which, paper in tflops.items():
            row = table1[size, f'MoM_{which} (K{KAHB[which]["K"]}H{KAHB[which]["H"]}S)']
            k, model = row["paper's K_eff"], mom(size, which)
            assert row["paper's TFLOPs"] == paper
            at_k = 10_240 * model.flops_per_token(1024, k, k) / 1e12
            assert at_k == pytest.approx(paper, rel=2e-4)
            assert (row['k_a'], row['k_f']) == (KAHB[which]['K'],) * 2  # no rate given: none skips
            ours = 10_240 * model.flops_per_token(1024) / 1e12
            assert row['TFLOPs'] == pytest.approx(ours, abs=0.006)
            assert row['merged'] < row['TFLOPs']
            assert row['TFLOPs, %'] == pytest.approx(100 * (row['TFLOPs'] / paper - 1), abs=0.3)


def test_skip_rates_come_from_the_command_line():
    _, result = bench('table1', '--size=small', '--k_a=1.5', '--k_f=2.5')
    rows = {row['model']: row for row in result['rows']}
    for which, k_f in (('E', 2.5), ('I', 2.5), ('P', 2)):  # MoM_P takes 2 of each at most
        row = next(row for name, row in rows.items() if name.startswith(f'MoM_{which}'))
        k_a = row['k_a']
        assert (k_a, row['k_f']) == (1.5, k_f)
        want = 10_240 * mom('small', which).flops_per_token(1024, k_a, k_f) / 1e12
        assert row['TFLOPs'] == pytest.approx(want, abs=0.006)
    assert rows['MoD']['k_a'] is None and rows['GPT-2']['TFLOPs'] == 2.92


@pytest.mark.parametrize('log', ['step,loss,tokens_per_s,val_loss,k_a,k_f\n',
                                 'step,loss,lr,norm\n1,2.5,0.1,1\n'])  # the second of XSUM
def test_a_run_without_an_evaluation_after_a_step(log, tmp_path, monkeypatch):
    torch.save({'model': {}, 'model_config': asdict(MoMConfig(**SHAPE)), 'step': 0},
               tmp_path / 'last.pt')
    (tmp_path / 'log.csv').write_text(log)
    with pytest.raises(ValueError, match='has no finished steps yet: resume that run'):
        script(monkeypatch, 'runs', f'--of={tmp_path}')


def test_a_run_that_was_stopped_is_at_its_last_validation(tmp_path, monkeypatch, capsys):
    torch.save({'model': {}, 'model_config': asdict(MoMConfig(**SHAPE)), 'step': 20},
               tmp_path / 'last.pt')
    log = ['step,loss,tokens_per_s,val_loss,val_bits_per_byte,k_a,k_f', '0,,,5.5,7.9,1.5,1.5',
           *(f'{n},5,100,,,,' for n in range(1, 11)), '10,,,4.5,6.5,1.5,1.5',
           *(f'{n},5,100,,,,' for n in range(11, 21))]
    (tmp_path / 'log.csv').write_text('\n'.join(log) + '\n')
    row, = script(monkeypatch, 'runs', f'--of={tmp_path}')['rows']
    assert (row['steps'], row['bits/byte before'], row['bits/byte after']) == (10, 7.9, 6.5)
    (tmp_path / 'log.csv').write_text('\n'.join(log).replace('\n3,5,', '\n3,abc,') + '\n')
    with pytest.raises(ValueError, match='3,abc,100,,,, is no row of a log: delete that line'):
        script(monkeypatch, 'runs', f'--of={tmp_path}')


SYSTEMS = [dict(chunks='1-1-1-1'), {}, dict(K=3, H=1), dict(phi='layer_skip', K=1),
           dict(phi='moe_share', skip=False),
           dict(phi='mod', chunks='1-1-1', K=1, router='linear')]


def test_measured_memory_is_that_of_the_formula(names):
    for case in SYSTEMS:
        cfg = MoMConfig(**{**SHAPE, **case, 'block_size': 20})
        assert names['measured_gib'](cfg, 3, 20) == names['prefill_gib'](cfg, 3, 20, 2) > 0, case


# --------------------------------------------------------------------- the other modes, as commands

def check_speed(result, tokens, passes):
    model, *others = result['rows']
    for row in result['rows']:
        assert 0 < row['fastest'] <= row['ms'] <= row['slowest']
        assert row['first s'] > 0 and row['MFU %'] is None
        assert row['tokens/s'] == pytest.approx(1e3 * tokens / row['ms'], rel=0.01)
        gflops = passes * row['active MFLOPs/token'] * row['tokens/s'] / 1e3
        assert row['GFLOP/s'] == pytest.approx(gflops, abs=0.06)
    for other, ratio in zip(others, result['ratios'].values(), strict=True):
        flops = model['active MFLOPs/token'] / other['active MFLOPs/token']
        assert ratio['time'] == pytest.approx(model['ms'] / other['ms'], rel=0.02)
        assert ratio['tokens/s'] == pytest.approx(1 / ratio['time'], rel=0.02)
        assert ratio['active FLOPs'] == pytest.approx(flops, rel=0.01)
        assert ratio['time / active FLOPs'] == pytest.approx(ratio['time'] / flops, rel=0.02)


def flops(**kw):
    with torch.device('meta'):
        return GPT(MoMConfig(**{**SHAPE, **kw})).flops_per_token(24) / 1e6


def test_train_beside_transformers():
    _, result = bench('train', *TINY, '--skip=False', '--compare=hf,vanilla', '--micro_batch=3')
    assert set(result) == {'mode', 'machine', 'rows', 'ratios'}
    assert list(result['ratios']) == ['vanilla', 'hf']
    mine, vanilla, hf = result['rows']
    check_speed(result, 3 * 24, passes=3)
    models = [row['model'] for row in result['rows']]
    assert models == ['K2H2', 'GPT-2, ours', 'GPT-2, transformers']
    assert mine['k_a'] == mine['k_f'] == 2.0 and hf['k_a'] is None and mine['peak GiB'] is None
    assert mine['active MFLOPs/token'] == pytest.approx(flops(skip=False), abs=1e-3)
    assert vanilla['active MFLOPs/token'] == hf['active MFLOPs/token']
    assert hf['active MFLOPs/token'] == pytest.approx(flops(chunks='1-1-1-1-1-1'), abs=1e-3)
    config = transformers.GPT2Config(n_embd=16, n_layer=6, n_head=2, n_positions=24, vocab_size=50,
                                     bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).num_parameters()
    assert theirs == hf['parameters'] == vanilla['parameters'] < mine['parameters']


def test_forward_of_a_config_file_with_a_profile(tmp_path):
    stdout, result = bench('forward', 'config/mom_demo.py', '--n_embd=16', '--n_head=2',
                           '--block_size=24', '--H=3', '--vocab_size=50', '--device=cpu',
                           '--repeats=2', '--profile=True', f'--out_dir={tmp_path}')
    check_speed(result, 4 * 24, passes=1)
    mine, vanilla = result['rows']
    assert mine['model'] == 'K2H3S' and vanilla['model'] == 'GPT-2, ours'
    assert 'router_dim' not in stdout
    assert 'left out, for train.py alone: out_dir, data_dir, max_steps, batch_size' in stdout
    assert 0 < mine['k_a'] <= 2 and 0 < mine['k_f'] <= 2 and mine['peak GiB'] > 0
    assert 'aten::addmm' in stdout and result['trace'] == str(tmp_path / 'forward_K2H3S.json')
    with open(result['trace']) as f:
        assert json.load(f)['traceEvents']


def test_forward_of_trained_weights_that_become_modules(tmp_path):
    cfg = MoMConfig(**{**SHAPE, 'chunks': '1-1-1-1-1-1'})
    torch.save({'model': GPT(cfg).state_dict(), 'model_config': asdict(cfg)}, tmp_path / 'best.pt')
    stdout, result = bench('forward', f'--weights={tmp_path}', '--chunks=1-4-1', '--K=1', '--H=3',
                           '--repeats=1', '--device=cpu', '--threads=1', '--micro_batch=2')
    with torch.device('meta'):
        want = GPT(MoMConfig(**{**SHAPE, 'K': 1, 'H': 3})).num_params()[0]
    assert result['rows'][0]['model'] == 'K1H3S' and result['rows'][0]['parameters'] == want
    assert f'{tmp_path} weights' in stdout and 0 <= result['rows'][0]['k_a'] <= 1


def test_decode_beside_transformers():
    _, result = bench('decode', *TINY, '--repeats=5', '--skip=False', '--compare=hf', '--prompt=4',
                      '--new=20', '--batch=2')
    assert set(result) == {'mode', 'machine', 'rows', 'ratios', 'bandwidth GB/s'}
    assert result['bandwidth GB/s'] > 0
    mine, vanilla, hf = result['rows']
    for row in result['rows']:
        per_step = (row['call ms'] - row['first token ms']) / 19
        assert row['ms/step'] == pytest.approx(per_step, abs=0.002)
        assert row['step tokens/s'] == pytest.approx(2e3 / row['ms/step'], rel=0.01)
        assert row['call tokens/s'] == pytest.approx(2e3 * 20 / row['call ms'], rel=0.01)
        assert row['GB/s'] == pytest.approx(row['MB read/step'] / row['ms/step'], abs=0.011)
    for row, ratio in zip((vanilla, hf), result['ratios'].values(), strict=True):
        read = ratio['weights read']
        assert read == pytest.approx(mine['MB read/step'] / row['MB read/step'], rel=0.01)
        step = ratio['step time']
        assert step == pytest.approx(mine['ms/step'] / row['ms/step'], rel=0.02)
        assert ratio['step tokens/s'] == pytest.approx(1 / step, rel=0.02)
        assert ratio['step time / weights read'] == pytest.approx(step / read, rel=0.01)
        assert ratio['call tokens/s'] == pytest.approx(row['call ms'] / mine['call ms'], rel=0.02)
        first = mine['first token ms'] / row['first token ms']
        assert ratio['first token time'] == pytest.approx(first, rel=0.02)
    # a step of a vanilla model reads all of its weights, but one position of the table
    parameters = vanilla['parameters'] - (24 - 1) * 16
    read = pytest.approx(4 * parameters / 1e6, abs=1e-3)
    assert vanilla['MB read/step'] == hf['MB read/step'] == read


def texts(names, which, tmp_path, monkeypatch, x, new, lengths=None, scale=1, **settings):
    """What the models of bench.py's decode write after x, all with the weights of one GPT-2."""
    cfg = MoMConfig('1-1', n_embd=32, n_head=2, block_size=64, vocab_size=50)
    cfgs = dict.fromkeys(['model', *which], cfg)
    for key, value in {'mode': 'decode', **settings}.items():  # models in eval mode
        monkeypatch.setitem(names, key, value)
    source = names['write_gpt2'](cfgs, str(tmp_path))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(source)
    for p in theirs.parameters():  # larger ones do not just write the last token again
        p.data *= scale
    theirs.transformer.wte.weight.data[49] = 0  # which CTranslate2 never writes
    theirs.save_pretrained(source)
    return {name: names['write'](names['build'](name, cfg, None, source), name, x, new, lengths)
            for name in cfgs}


@pytest.mark.parametrize('which', ['hf', 'ct2'])
@pytest.mark.parametrize('beams', [1, 3])
@pytest.mark.parametrize('lengths', [None, [7, 3, 5]])
def test_they_write_the_same_text_with_beams_and_after_prompts_of_different_lengths(
        which, beams, lengths, names, tmp_path, monkeypatch):
    if which == 'ct2':
        pytest.importorskip('ctranslate2')
    torch.manual_seed(2)
    x = torch.randint(49, (3, 7))
    lengths = lengths and torch.tensor(lengths)
    found = texts(names, [which], tmp_path, monkeypatch, x, 20, lengths, scale=8, beams=beams,
                  compare=which)
    mine, theirs = (names['new_tokens'](text, name, x, 20, lengths) for name, text in found.items())
    assert torch.equal(mine, theirs) and len(mine.unique()) > 6


ALIKE = [*TINY, '--repeats=5', '--chunks=1-1', '--block_size=64', '--prompt=8', '--new=40']


def test_decode_of_rows_of_different_lengths_with_beams():
    stdout, result = bench('decode', *ALIKE, '--compare=hf', '--batch=3', '--ragged=True',
                           '--beams=2')
    mine, hf = result['rows']
    assert '3 x 4 to 8 tokens and 40 new ones of each, 2 beams' in stdout
    assert hf['same text'] == 3 and mine['same text'] is None and mine['k_a'] is None
    assert mine['call tokens/s'] == pytest.approx(1e3 * 3 * 40 / mine['call ms'], rel=0.01)


def test_decode_beside_itself_as_it_samples():
    _, result = bench('decode', *ALIKE, '--chunks=1-4-1', '--skip=False', '--top_p=0.9')
    greedy, sampled, vanilla = result['rows']
    assert [*result['ratios']] == ['sampled', 'vanilla']
    assert sampled['model'] == 'the same, sampling'
    assert sampled['parameters'] == greedy['parameters']
    assert sampled['k_a'] == 2.0 and vanilla['k_a'] is None
    ratio = result['ratios']['sampled']['call tokens/s']  # the time of sampling over that of greedy
    assert ratio == pytest.approx(sampled['call ms'] / greedy['call ms'], rel=0.02)


def test_what_is_sampled_is_as_the_settings_say(monkeypatch):
    names = script(monkeypatch, 'decode', *ALIKE, '--top_k=3', '--top_p=0.8', '--repeats=1')
    asked = []
    monkeypatch.setattr(GPT, 'generate', lambda self, x, n, **settings: asked.append(settings))
    model, x = GPT(MoMConfig(**SHAPE)), torch.zeros(1, 4, dtype=torch.int64)
    for name in ('model', 'sampled'):
        names['write'](model, name, x, 2)
    assert asked == [dict(temperature=0, beams=1, lengths=None),
                     dict(top_k=3, top_p=0.8, lengths=None)]
    names['top_k'], names['top_p'] = 0, 1.0
    names['write'](model, 'sampled', x, 2)
    assert asked[-1] == dict(top_k=None, top_p=None, lengths=None)


def test_other_libraries_get_the_weights_given(names, tmp_path):
    cfg = MoMConfig(**{**SHAPE, 'chunks': '1-1'})
    model = GPT(cfg)
    source = names['write_gpt2']({'model': cfg, 'hf': cfg}, str(tmp_path), model)
    x = torch.randint(50, (2, 24))
    theirs = names['transformers_gpt2'](cfg, source)(x).logits
    assert torch.allclose(theirs, model(x)[0], atol=1e-5)
    assert names['write_gpt2']({'model': cfg}, str(tmp_path), model) == ''


def test_tf32():
    _, result = bench('tf32', *TINY, '--micro_batch=2')
    fp32, again, tf32 = result['rows']
    products = [row['fp32 products in'] for row in result['rows']]
    assert products == ['float32', 'float32 again', 'TF32']
    assert fp32['time over float32'] == 1 and fp32['other picks, %'] == again['other picks, %'] == 0
    assert 0 <= tf32['other picks, %'] <= 100
    for row in result['rows']:
        assert row['tokens/s'] == pytest.approx(1e3 * 2 * 24 / row['ms'], rel=0.01)
    with torch.device('meta'):
        model = GPT(MoMConfig(**SHAPE))
    routers = 2 * 2 * 2 * (3 * 8 * (16 + 8) + 2 * 3 * 8 + 5 * 8)  # two of H = 2, with the biases
    least, most = (100 * routers / model.flops_per_token(24, k, k) for k in (2, 0))
    assert least - 0.01 <= result["routers' share of the FLOPs, %"] <= most


def test_tf32_counts_the_tokens_whose_modules_change(names, monkeypatch):
    """Where TF32 turns the signs of the scores, the tokens take the other of two modules."""
    sign = {'highest': 1.0, 'high': -1.0}
    precision = ['highest']
    monkeypatch.setattr(torch, 'set_float32_matmul_precision',
                        lambda p: precision.__setitem__(0, p))
    cfg = MoMConfig(**{**SHAPE, 'chunks': '1-2-1', 'K': 1, 'skip': False, 'H': 1})
    monkeypatch.setitem(names, 'subjects', lambda: (None, {'model': cfg}))
    build = names['build']

    def built(*args):
        model = build(*args)
        for chunk in model.chunks:
            for router in filter(None, (chunk.router_a, chunk.router_f)):
                forward = router.forward

                def flipped(x, s, h, forward=forward):
                    r, s = forward(x, s, h)
                    return r * sign[precision[0]], s
                router.forward = flipped
        return model

    monkeypatch.setitem(names, 'build', built)
    monkeypatch.setitem(names, 'repeats', 1)
    rows = names['tf32']()
    fp32, again, tf32 = (row['other picks, %'] for row in rows)
    assert fp32 == again == 0 and 90 < tf32 <= 100  # the second router sees other tokens, too


def test_in_a_terminal_the_json_is_a_file(tmp_path):
    pty = pytest.importorskip('pty')
    ours, theirs = pty.openpty()
    command = [sys.executable, 'bench.py', 'table1', '--size=small', f'--out_dir={tmp_path}/a b']
    process = subprocess.Popen(command, cwd=common.ROOT, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    printed = b''
    try:
        while piece := os.read(ours, 65536):
            printed += piece
    except OSError:  # the end of a terminal
        pass
    assert process.wait() == 0, process.stderr.read()
    process.stderr.close()
    os.close(ours)
    *_, last = printed.decode().splitlines()
    assert last == f'as JSON: {tmp_path}/a b/table1.json' and '{' not in printed.decode()
    with open(tmp_path / 'a b' / 'table1.json') as f:
        result = json.load(f)
    assert result['mode'] == 'table1' and len(result['rows']) == 7


def test_route():
    _, result = bench('route', '--tokens=48', '--block_size=24', '--n_embd=16', '--n_head=2',
                      '--router_dim=8', '--repeats=2', '--device=cpu')
    rows = result['rows']
    assert [(row['K'], row['passes'], row['N']) for row in rows] == [
        (2, 'forward', 4), (2, 'both', 4), (3, 'forward', 4), (3, 'both', 4)]
    for row in rows:
        efficiency = row['dense ms'] / row['routed ms']
        assert row['efficiency'] == pytest.approx(efficiency, rel=0.5, abs=0.01)
        assert 0 <= row['idlest'] <= row['K'] / 4 <= row['busiest'] <= 1


def test_ablate():
    _, result = bench('ablate', '--tokens=80', '--block_size=40', '--n_embd=16', '--n_head=2',
                      '--prompt=4', '--new=8', '--H=2', '--repeats=1', '--device=cpu')
    whats = 'as it is', 'q, k, v not', 'not grouped'
    assert [(row['what'][:11], row['passes'][:4]) for row in result['rows']] == [
        *((what, passes) for passes in ('forw', 'both') for what in whats),
        ('as it is', '8 ne'), ('no cache', '8 ne')]
    assert all(row['times'] == 1 for row in result['rows'] if row['what'] == 'as it is')


def test_a_chunk_without_grouping_computes_the_same(names):
    torch.manual_seed(0)
    slow = names['every_module'](MoMConfig(**{**SHAPE, 'chunks': '4'}))
    torch.manual_seed(0)
    chunk = GPT(MoMConfig(**{**SHAPE, 'chunks': '4'})).chunks[0]
    chunk.load_state_dict(slow.state_dict())
    x = torch.randn(2, 24, 16)
    assert torch.allclose(slow(x)[0], chunk(x)[0], atol=1e-5)


def test_scale():
    _, result = bench('scale', '--tokens=32', '--n_embd=32', '--repeats=1', '--device=cpu')
    rows = {row['step']: row for row in result['rows']}
    assert rows['base']['time'] == rows['base']['FLOPs'] == 1 and rows['H = 4']['FLOPs'] == 2
    assert rows['N = 8']['FLOPs'] == pytest.approx(1, abs=0.05) and len(rows) == 16


def test_saved():
    _, result = bench('saved', *TINY[:6], '--n_embd=64', '--device=cpu')
    vanilla, mom = result['rows']
    assert (vanilla['how many'], mom['how many'], mom['N'], mom['H']) == (2, 1, 4, 2)
    # In 16 bits a block keeps 34 C bytes of a token (Korthikanti et al. 2022), of which 2 C are the
    # masks of dropout, which is none here; but the stream and its norms are in 32 bits.
    assert 32 * 64 / 1024 < vanilla['KiB/token'] < 40 * 64 / 1024
    assert 2 * vanilla['KiB/token'] < mom['KiB/token'] < 8 * vanilla['KiB/token']  # H = 2, K = 2
    assert result['GiB/sequence, checkpointing'] <= result['GiB/sequence']


# ----------------------------------------------------------------------------- counts

def test_modules_per_token_and_the_weights_that_they_read(names):
    cfg = MoMConfig(**SHAPE)
    with torch.device('meta'):
        model = GPT(cfg)
    A = [[[0, 1], [1, 0], [4, 2]],                 # two sequences of three tokens; 4 is SKIP
         [[0, 1], [2, 3], [2, 4]]]
    F = [[[4, 0], [1, 2], [3, 1]],
         [[0, 4], [1, 2], [3, 0]]]

    def decision(kind, step, ids):
        return Decision(kind, step, 4, torch.tensor(ids).view(6, 2), None, None, None)

    routed = [decision(kind, h, ids) for h in range(2) for kind, ids in (('A', A), ('F', F))]
    decisions = [[], routed, []]
    assert names['modules_per_token'](decisions) == pytest.approx((10 / 6, 10 / 6))
    assert names['modules_per_token']([[], []]) == (None, None)

    C, V = 16, 50
    qkv, out = 2 * C + C * 3 * C + 3 * C, C * C + C
    ffn = 2 * C + C * 4 * C + 4 * C + 4 * C * C + C
    router = 3 * 8 * (C + 8) + 2 * 3 * 8 + 5 * 8    # GRU, its biases, W
    # two blocks in bf16; two routers at two steps, in fp32
    always = 2 * (V * C + 2 * C + C + 2 * (qkv + out + ffn)) + 4 * 2 * 2 * router
    # Position 1: {0,1} and {2,3} are two sums of qkv and four modules; {1,2} twice are two
    # feed-forward modules.
    # Position 2: {2} twice is one sum and one module; {3,1} and {3,0} are three feed-forward
    # modules.
    last = always + 2 * 2 * (1 * qkv + 1 * out + 3 * ffn)
    both = (last + always + 2 * 2 * (2 * qkv + 4 * out + 2 * ffn)) / 2
    assert names['weights_read'](model, cfg, decisions, [2, 2], 2) == pytest.approx(last)
    assert names['weights_read'](model, cfg, decisions, [1, 1], 2) == pytest.approx(both)
    # The second sequence is one token longer: its position 2 comes with the first one's position 1.
    # {1,0} and {2} are two sums of qkv and three modules; {1,2} and {3,0} are four feed-forward
    # modules.
    apart = always + 2 * 2 * (2 * qkv + 3 * out + 4 * ffn)
    assert names['weights_read'](model, cfg, decisions, [1, 2], 2) == pytest.approx(apart)
    model.chunks[1].S = 0  # not merged: {0,1}, {2,3} are four matrices, {2} is one
    unmerged = both + 2 * 2 * 2 * qkv / 2
    assert names['weights_read'](model, cfg, decisions, [1, 1], 2) == pytest.approx(unmerged)


def test_a_config_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='config files go with train'):
        script(monkeypatch, 'table1', 'config/mom_demo.py')


def test_every_config_file_gives_the_shape_that_its_weights_have(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no run that a config could start from
    seen = 0
    for path in glob.glob(os.path.join(common.ROOT, 'config', '[a-z]*.py')):
        values = common.read_file(path)
        cfg = MoMConfig(**names['model_settings'](values))
        assert 'chunks' not in values or cfg.chunks == values['chunks']
        if values.get('init_from') in ('gpt2', 'gpt2-medium', 'gpt2-large'):
            seen += 1
            size = cfg.n_layer, cfg.n_embd, cfg.n_head
            assert size in [(12, 768, 12), (24, 1024, 16), (36, 1280, 20)]
    assert seen > 9
    shape = dict(n_embd=16, n_head=2, block_size=24, vocab_size=50)
    cfg = MoMConfig(chunks='1-1-1-1-1-1', **shape)
    torch.save({'model': {}, 'model_config': asdict(cfg)}, tmp_path / 'last.pt')
    demo = common.read_file(os.path.join(common.ROOT, 'config', 'mom_demo.py'))
    taken = MoMConfig(**names['model_settings']({**demo, 'init_from': str(tmp_path)}))
    assert taken == MoMConfig(chunks='1-4-1', K=2, H=4, skip=True, router_dim=64, **shape)
    assert names['model_settings']({'init_from': str(tmp_path)})['chunks'] == '1-1-1-1-1-1'


# ----------------------------------------------------------------------------- mistakes

MISTAKES = {
    'tablel': "take 'runs', 'table1'",
    'table1 --K=3': '--K does nothing in table1: it goes with train',
    'table1 --size=huge': "'huge' is none of small, medium, large",
    'table1 --size=': "'' is none of small, medium, large",
    'table1 --length=2000': 'at most 1024',
    'table1 config/mom_demo.py': 'go with train, forward, decode, tf32, saved, not with table1',
    'train config/mom_dema.py': 'did you mean config/mom_demo.py',
    'train --dtype=fp8': 'none of auto, bfloat16, float32',
    'train --compare=nanogpt': 'none of hf, vanilla',
    'train --micro_batch=0': 'must be at least 1',
    'decode --new=1': 'must be at least 2',
    'decode --beams=0': 'must be at least 1',
    'decode --top_p=1.5': 'at most 1',
    'train --beams=4': 'goes with decode',
    'decode --beams=4 --top_k=3': 'go without beams=4',
    'decode --ragged=True': 'add --batch=8',
    'decode --prompt=1000 --new=100': 'take fewer',
    'decode --compile=True': 'goes with train, forward',
    'forward --K=9 --chunks=4': 'take K <= 5',
    'train --weights=nowhere': 'nor a directory',
    'route --chunks=1-4-1': 'one chunk of several modules',
    'route --tokens=100': 'a multiple of block_size',
    'ablate --chunks=1-4-1': 'one chunk of several modules',
    'ablate --prompt=1000': 'fit into it',
    'train --dtype=': 'none of auto',
    'train --dtype=float32,bfloat16': 'none of auto',
    'runs --of=config': 'no checkpoint',
    'train --compare=hf': 'pip install transformers',
    'train --compare=ct2': 'none of hf, vanilla',
    'decode --compare=ct2': 'pip install transformers',
    'tf32 --compare=hf': 'does nothing in tf32',
    'tf32 --chunks=1-1': 'has no routers',
    'tf32 --out_dir=bench.py --profile=True': 'does nothing in tf32',
    'forward --out_dir=bench.py --profile=True': 'bench.py is a file, where a folder has to be'}


@pytest.mark.parametrize('argv', MISTAKES)
def test_mistakes_name_the_fix(argv, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)  # as if it were not installed
    monkeypatch.chdir(common.ROOT)
    with pytest.raises(ValueError) as error:
        script(monkeypatch, *argv.split())
    assert MISTAKES[argv] in str(error.value) and '\n' not in str(error.value)


def test_ctranslate2_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ctranslate2', None)
    with pytest.raises(ValueError, match='pip install ctranslate2$'):
        script(monkeypatch, 'decode', '--compare=hf,ct2')


def test_a_config_file_whose_weights_are_not_here(monkeypatch, tmp_path):
    config = tmp_path / 'a.py'
    config.write_text("init_from = 'out/nowhere'\nchunks = '1-4-1'\nlearning_rate = 1.0\n")
    with pytest.raises(ValueError, match='add --n_head=... --block_size=... --vocab_size=...$'):
        script(monkeypatch, 'train', str(config), '--n_embd=64')


# ----------------------------------------------------------------------------- gpu.py

def test_a_machine_without_a_gpu_is_told_so_in_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, 'gpu.py', f'--out_dir={tmp_path}/new'], cwd=common.ROOT,
                          text=True, capture_output=True,
                          env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0 and done.stderr == ''
    assert done.stdout.startswith('No GPU') and done.stdout.count('\n') == 1
    assert not os.listdir(tmp_path)


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    """gpu.py's main, with a GPU that exists by name only, on other parts -> its report."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(gpu, 'find_machine', lambda: {'card': 'none'})
    monkeypatch.setattr(gpu, 'out_dir', str(tmp_path / 'gpu'))
    monkeypatch.setattr(gpu, 'STOPPING', 0.5)
    monkeypatch.setattr(common, 'lock_folder', lambda path: None)  # as we go on after main

    def run(parts, **settings):
        for key, value in {'parts': lambda: parts, **settings}.items():
            monkeypatch.setattr(gpu, key, value)
        gpu.main()
        with open(tmp_path / 'gpu' / 'report.json') as f, open(tmp_path / 'gpu' / 'report.md') as g:
            return json.load(f), g.read()
    return run


def test_a_part_that_fails_or_hangs_costs_no_other(pretended_gpu, tmp_path):
    child = f'{tmp_path}/child'
    hangs = ('import os, signal, subprocess, sys, time;'
             'signal.signal(signal.SIGTERM, signal.SIG_IGN);'
             'p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]);'
             f'open({child!r}, "w").write(str(p.pid));'
             'print("hanging", flush=True); time.sleep(600)')
    found, page = pretended_gpu([
        ('fails', 'an error', 5, 5, [['-c', 'print(1); raise SystemExit("broken")']]),
        ('hangs', 'too long', 5, 0.1, [['-c', hangs]]),
        ('works', 'fine', 5, 5, [['-c', 'print("| a |"); print(\'{"rows": [{"x": 2}]}\')']])])
    assert [(part['part'], part['status']) for part in found['parts']] == [
        ('fails', 'failed'), ('hangs', 'out of time'), ('works', 'done')]
    failed, hung, worked = found['parts']
    assert failed['printed'] == ['1', 'broken'] and failed['result'] is None
    assert worked['result'] == {'rows': [{'x': 2}]} and worked['printed'] == ['| a |']
    assert 'broken' in page and '| a |' in page and '## works: fine' in page
    with open(child) as f:
        pid = int(f.read())
    for _ in range(100):  # what it had started has ended with it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        with open(f'/proc/{pid}/stat') as f:  # or waits to be collected
            if f.read().rsplit(')', 1)[1].split()[0] == 'Z':
                break
        time.sleep(0.1)
    else:
        raise AssertionError('a process is left')


def test_the_budget_ends_it(pretended_gpu):
    sleep = ['-c', 'import time; time.sleep(60)']
    parts = [('one', 'sleeps', 25, 25, [sleep]), ('two', 'has none left', 25, 25, [sleep])]
    found, page = pretended_gpu(parts, budget=2 / 60)
    assert [part['status'] for part in found['parts']] == ['out of time', 'no time left']
    found, page = pretended_gpu([('one', 'sleeps', 2 / 60, 25, [sleep, sleep])], budget=25.0)
    assert [part['status'] for part in found['parts']] == ['out of time', 'no time left']
    with pytest.raises(ValueError, match="'three' is none of one"):
        pretended_gpu([('one', 'sleeps', 1, 1, [])], only='three')


def test_measured_memory_stands_beside_the_predicted(pretended_gpu):
    def as_trained(name, compiled, gib):
        row = {'rows': [{'tokens/s': 5.0, 'MFU %': None, 'peak GiB': gib}]}
        words = [f'config/{name}.py', *(['--compile=True'] if compiled else [])]
        return ['-c', f'print({json.dumps(json.dumps(row))})', *words]

    found, page = pretended_gpu([
        ('speed', '', 5, 5, [as_trained('gpt2_small', False, 12.5)]),
        ('compiled', '', 5, 5, [as_trained('mom_large_k2h6s', True, 30.0)])])
    table = {(row['model'], row['size']): row for row in found['memory']}
    assert len(table) == 12
    keys = 'peak GiB', 'peak GiB, compiled', 'predicted GiB'
    assert [table['GPT-2', 'small'][key] for key in keys] == [12.5, None, 12.6]
    assert [table['MoM_P', 'large'][key] for key in keys] == [None, 30.0, 35.3]
    assert '| MoM_P | large | n/a | n/a | n/a | 5.0 | n/a | 30.0 | 35.3 |' in page


def test_what_gpu_runs_is_there(monkeypatch):
    """Every command names a script and files that exist, and settings that its script knows."""
    commands = [words for _, _, _, _, commands in gpu.parts() for words in commands]
    assert len(commands) > 30
    for words in commands:
        for word in words:
            if word.endswith('.py'):
                assert os.path.isfile(os.path.join(common.ROOT, word)), words
        if words[0] in SCRIPTS:
            files = words[0] == 'bench.py'  # which reads them itself
            load(words[0], [word for word in words[1:] if not (files and word.endswith('.py'))])
        if words[0] == 'bench.py':  # what does nothing in a mode is refused first
            with pytest.raises(ValueError, match='repeats=0 must be at least 1'):
                script(monkeypatch, *words[1:-1], '--device=cpu', '--repeats=0')
