# Layer-skip on gpt2-medium (Eq. 9): at step h each token takes module h or SKIP. It is "K1H4S",
# under which Table 1 lists MoD. 10k steps.
#   torchrun --nproc_per_node=8 train.py config/layer_skip_medium.py
# 363M parameters, 7.9M of them in routers; 1.4e+19 FLOPs if no token skips: 4 hours at 40% of the
# peak of 8 A100. To start from your own phase one: --init_from=out/gpt2_medium

out_dir = 'out/layer_skip_medium'
init_from = 'gpt2-medium'
chunks = '1-1-1-4-1-4-1-4-1-4-1-1'
phi = 'layer_skip'
K = 1
skip = True
max_steps = 10_000
micro_batch = 8
seed = 1338  # other batches than phase one
