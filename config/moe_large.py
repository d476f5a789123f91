# Mixture-of-Experts on gpt2-large, a baseline of Table 1: four experts a layer, two for each token,
# routed as in Mixtral. 10k steps.
#   torchrun --nproc_per_node=8 train.py config/moe_large.py
# 2191M parameters, 0.2M of them in routers; 4.2e+19 FLOPs: 12 hours at 40% of the peak of 8 A100.
# To start from your own phase one: --init_from=out/gpt2_large

out_dir = 'out/moe_large'
init_from = 'gpt2-large'
chunks = '-'.join('1' * 36)
phi = 'moe'
experts = 4
K = 2
skip = False
router = 'linear'
router_weights = 'softmax'
tau = 1.0
max_steps = 10_000
micro_batch = 4
seed = 1338  # other batches than phase one
