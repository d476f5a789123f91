# MoM_P-small, the performant one of Table 1: gpt2 cut into modules, with fresh routers, 10k steps.
#   torchrun --nproc_per_node=8 train.py config/mom_small_k2h6s.py
# 128M parameters, 3.2M of them in routers; 8.8e+18 FLOPs if no token skips: 2 hours at 40% of the
# peak of 8 A100. To start from your own phase one: --init_from=out/gpt2_small

out_dir = 'out/mom_small_k2h6s'
init_from = 'gpt2'
chunks = '1-1-4-1-4-1'
K = 2
H = 6
skip = True
max_steps = 10_000
micro_batch = 16
seed = 1338  # other batches than phase one
