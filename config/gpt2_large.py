# Phase one: GPT-2-large from scratch, 20k steps of the paper's recipe (section 4.1).
#   torchrun --nproc_per_node=8 train.py config/gpt2_large.py
# 774M parameters, 5.5e+19 FLOPs: 15 hours at 40% of the peak of 8 A100.

out_dir = 'out/gpt2_large'
chunks = '-'.join('1' * 36)
n_embd = 1280
n_head = 20
max_steps = 20_000
micro_batch = 8
