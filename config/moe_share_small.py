# MoE (share) on gpt2, a baseline of Table 1: attention in its order, and for each token two of the
# four feed-forward modules of the chunk, routed as in Mixtral. 10k steps.
#   torchrun --nproc_per_node=8 train.py config/moe_share_small.py
# 124M parameters, 25k of them in routers; 5.7e+18 FLOPs: 2 hours at 40% of the peak of 8 A100.
# To start from your own phase one: --init_from=out/gpt2_small

out_dir = 'out/moe_share_small'
init_from = 'gpt2'
chunks = '1-1-4-1-4-1'
phi = 'moe_share'
K = 2
skip = False
router = 'linear'
router_weights = 'softmax'
tau = 1.0
max_steps = 10_000
micro_batch = 16
seed = 1338  # other batches than phase one
