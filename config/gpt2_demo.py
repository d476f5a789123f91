# Phase one of the demo: a vanilla GPT-2 of 8 layers on bytes of State of the Union messages.
#   python train.py config/gpt2_demo.py

out_dir = 'out/gpt2_demo'
data_dir = 'data/sotu_bytes'
chunks = '1-1-1-1-1-1-1-1'
n_embd = 128
n_head = 4
block_size = 256
max_steps = 600
batch_size = 16
eval_every = 200
eval_tokens = 100_000
log_every = 20
