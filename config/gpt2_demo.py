# The demo's phase one: a vanilla GPT-2 of 6 layers on the bytes of the State of the Union messages.
#   python train.py config/gpt2_demo.py
# 1.2M parameters, under a minute on 2 CPU cores.

out_dir = 'out/gpt2_demo'
data_dir = 'data/sotu_bytes'
chunks = '1-1-1-1-1-1'
n_embd = 128
n_head = 4
block_size = 128
max_steps = 600
batch_size = 8
learning_rate = 2e-3
eval_every = 300
eval_tokens = 60_000
log_every = 50
