# Mixture-of-Experts on gpt2-medium, a baseline of Table 1: four experts a layer, two for each
# token, routed as in Mixtral. 10k steps.
#   torchrun --nproc_per_node=8 train.py config/moe_medium.py
# 959M parameters, 98k of them in routers; 1.9e+19 FLOPs: 5 hours at 40% of the peak of 8 A100.
# To start from your own phase one: --init_from=out/gpt2_medium

out_dir = 'out/moe_medium'
init_from = 'gpt2-medium'
chunks = '-'.join('1' * 24)
phi = 'moe'
experts = 4
K = 2
skip = False
router = 'linear'
router_weights = 'softmax'
tau = 1.0
max_steps = 10_000
micro_batch = 8
seed = 1338  # other batches than phase one
