# MoM_P-medium, the performant one of Table 1: gpt2-medium cut into modules, with fresh routers, 10k
# steps.
#   torchrun --nproc_per_node=8 train.py config/mom_medium_k2h6s.py
# 363M parameters, 7.9M of them in routers; 2.7e+19 FLOPs if no token skips: 8 hours at 40% of the
# peak of 8 A100. To start from your own phase one: --init_from=out/gpt2_medium

out_dir = 'out/mom_medium_k2h6s'
init_from = 'gpt2-medium'
chunks = '1-1-1-4-1-4-1-4-1-4-1-1'
K = 2
H = 6
skip = True
max_steps = 10_000
micro_batch = 8
seed = 1338  # other batches than phase one
