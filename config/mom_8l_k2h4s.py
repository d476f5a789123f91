# Table 4: the 8 layers of gpt2_8l.py cut into [1-1-4-1-1], 5k steps. Other rows: --chunks=8 --H=8,
# --chunks=4-4, ...
#   torchrun --nproc_per_node=8 train.py config/mom_8l_k2h4s.py        after config/gpt2_8l.py
# 98M parameters, 1.6M of them in routers; 2.2e+18 FLOPs if no token skips: 1 hour at 40% of the
# peak of 8 A100.

out_dir = 'out/mom_8l_k2h4s'
init_from = 'out/gpt2_8l'
chunks = '1-1-4-1-1'
K = 2
H = 4
skip = True
max_steps = 5_000
micro_batch = 16
seed = 1338  # other batches than phase one
