# Phase one: GPT-2-small from scratch, 20k steps of the paper's recipe (section 4.1).
#   torchrun --nproc_per_node=8 train.py config/gpt2_small.py
# 124M parameters, 9.0e+18 FLOPs: 2 hours at 40% of the peak of 8 A100.

out_dir = 'out/gpt2_small'
chunks = '-'.join('1' * 12)
n_embd = 768
n_head = 12
max_steps = 20_000
micro_batch = 32
