# MoE (share) on gpt2-large, a baseline of Table 1: attention in its order, and for each token two
# of the four feed-forward modules of the chunk, routed as in Mixtral. 10k steps.
#   torchrun --nproc_per_node=8 train.py config/moe_share_large.py
# 774M parameters, 0.1M of them in routers; 3.9e+19 FLOPs: 11 hours at 40% of the peak of 8 A100.
# To start from your own phase one: --init_from=out/gpt2_large

out_dir = 'out/moe_share_large'
init_from = 'gpt2-large'
chunks = '1-4-1-4-1-4-1-4-1-4-1-4-1-4-1'
phi = 'moe_share'
K = 2
skip = False
router = 'linear'
router_weights = 'softmax'
tau = 1.0
max_steps = 10_000
micro_batch = 4
seed = 1338  # other batches than phase one
