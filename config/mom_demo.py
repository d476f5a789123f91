# Phase two of the demo: the middle four of the eight layers become modules, assembled in H = 4 steps.
#   python train.py config/mom_demo.py

out_dir = 'out/mom_demo'
data_dir = 'data/sotu_bytes'
init_from = 'out/gpt2_demo'
chunks = '1-1-4-1-1'
K = 2
H = 4
skip = True
router_dim = 64
max_steps = 400
batch_size = 16
eval_every = 100
eval_tokens = 100_000
log_every = 20
seed = 1338
