# Mixture-of-Depths on gpt2-large, a baseline of Table 1: every other block takes an eighth of the
# tokens of a sequence, the others pass by (Raposo et al. 2024). 10k steps.
#   torchrun --nproc_per_node=8 train.py config/mod_large.py
# 780M parameters, 5.9M of them in its routers and predictors; 1.6e+19 FLOPs: 5 hours at 40% of the
# peak of 8 A100. To start from your own phase one: --init_from=out/gpt2_large

out_dir = 'out/mod_large'
init_from = 'gpt2-large'
chunks = '-'.join('1' * 36)
phi = 'mod'
K = 1
capacity = 0.125
router = 'linear'
max_steps = 10_000
micro_batch = 4
seed = 1338  # other batches than phase one
