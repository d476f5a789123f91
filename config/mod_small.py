# Mixture-of-Depths on gpt2, a baseline of Table 1: every other block takes an eighth of the tokens
# of a sequence, the others pass by (Raposo et al. 2024). 10k steps.
#   torchrun --nproc_per_node=8 train.py config/mod_small.py
# 126M parameters, 1.2M of them in its routers and predictors; 3.1e+18 FLOPs: 1 hour at 40% of the
# peak of 8 A100. To start from your own phase one: --init_from=out/gpt2_small

out_dir = 'out/mod_small'
init_from = 'gpt2'
chunks = '-'.join('1' * 12)
phi = 'mod'
K = 1
capacity = 0.125
router = 'linear'
max_steps = 10_000
micro_batch = 16
seed = 1338  # other batches than phase one
