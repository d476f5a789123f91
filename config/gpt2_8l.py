# Phase one of Table 4: a GPT-2 of 8 layers, 20k steps. The paper does not say how wide; this is as
# wide as small.
#   torchrun --nproc_per_node=8 train.py config/gpt2_8l.py
# 96M parameters, 6.8e+18 FLOPs: 2 hours at 40% of the peak of 8 A100.

out_dir = 'out/gpt2_8l'
chunks = '1-1-1-1-1-1-1-1'
n_embd = 768
n_head = 12
max_steps = 20_000
micro_batch = 32
