# Mixture-of-Experts on gpt2, a baseline of Table 1: four experts a layer, two for each token,
# routed as in Mixtral. 10k steps.
#   torchrun --nproc_per_node=8 train.py config/moe_small.py
# 295M parameters, 37k of them in routers; 6.3e+18 FLOPs: 2 hours at 40% of the peak of 8 A100.
# To start from your own phase one: --init_from=out/gpt2_small

out_dir = 'out/moe_small'
init_from = 'gpt2'
chunks = '-'.join('1' * 12)
phi = 'moe'
experts = 4
K = 2
skip = False
router = 'linear'
router_weights = 'softmax'
tau = 1.0
max_steps = 10_000
micro_batch = 16
seed = 1338  # other batches than phase one
