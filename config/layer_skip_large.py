# Layer-skip on gpt2-large (Eq. 9): at step h each token takes module h or SKIP. It is "K1H4S",
# under which Table 1 lists MoD. 10k steps.
#   torchrun --nproc_per_node=8 train.py config/layer_skip_large.py
# 791M parameters, 16.6M of them in routers; 2.9e+19 FLOPs if no token skips: 8 hours at 40% of the
# peak of 8 A100. To start from your own phase one: --init_from=out/gpt2_large

out_dir = 'out/layer_skip_large'
init_from = 'gpt2-large'
chunks = '1-4-1-4-1-4-1-4-1-4-1-4-1-4-1'
phi = 'layer_skip'
K = 1
skip = True
max_steps = 10_000
micro_batch = 4
seed = 1338  # other batches than phase one
