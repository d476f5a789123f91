# MoM_I-large, between the two of Table 1: gpt2-large cut into modules, with fresh routers, 10k
# steps.
#   torchrun --nproc_per_node=8 train.py config/mom_large_k3h2s.py
# 791M parameters, 16.6M of them in routers; 3.6e+19 FLOPs if no token skips: 10 hours at 40% of the
# peak of 8 A100. To start from your own phase one: --init_from=out/gpt2_large

out_dir = 'out/mom_large_k3h2s'
init_from = 'gpt2-large'
chunks = '1-4-1-4-1-4-1-4-1-4-1-4-1-4-1'
K = 3
H = 2
skip = True
max_steps = 10_000
micro_batch = 4
seed = 1338  # other batches than phase one
