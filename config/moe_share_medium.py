# MoE (share) on gpt2-medium, a baseline of Table 1: attention in its order, and for each token two
# of the four feed-forward modules of the chunk, routed as in Mixtral. 10k steps.
#   torchrun --nproc_per_node=8 train.py config/moe_share_medium.py
# 355M parameters, 66k of them in routers; 1.7e+19 FLOPs: 5 hours at 40% of the peak of 8 A100.
# To start from your own phase one: --init_from=out/gpt2_medium

out_dir = 'out/moe_share_medium'
init_from = 'gpt2-medium'
chunks = '1-1-1-4-1-4-1-4-1-4-1-1'
phi = 'moe_share'
K = 2
skip = False
router = 'linear'
router_weights = 'softmax'
tau = 1.0
max_steps = 10_000
micro_batch = 8
seed = 1338  # other batches than phase one
