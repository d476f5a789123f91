# Phase one: GPT-2-medium from scratch, 20k steps of the paper's recipe (section 4.1).
#   torchrun --nproc_per_node=8 train.py config/gpt2_medium.py
# 355M parameters, 2.5e+19 FLOPs: 7 hours at 40% of the peak of 8 A100.

out_dir = 'out/gpt2_medium'
chunks = '-'.join('1' * 24)
n_embd = 1024
n_head = 16
max_steps = 20_000
micro_batch = 16
