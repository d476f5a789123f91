# MoM_E-medium, the efficient one of Table 1: gpt2-medium cut into modules, with fresh routers, 10k
# steps.
#   torchrun --nproc_per_node=8 train.py config/mom_medium_k3h1s.py
# 363M parameters, 7.9M of them in routers; 1.1e+19 FLOPs if no token skips: 3 hours at 40% of the
# peak of 8 A100. To start from your own phase one: --init_from=out/gpt2_medium

out_dir = 'out/mom_medium_k3h1s'
init_from = 'gpt2-medium'
chunks = '1-1-1-4-1-4-1-4-1-4-1-1'
K = 3
H = 1
skip = True
max_steps = 10_000
micro_batch = 8
seed = 1338  # other batches than phase one
