# Layer-skip on gpt2 (Eq. 9): at step h each token takes module h or SKIP. It is "K1H4S", under
# which Table 1 lists MoD. 10k steps.
#   torchrun --nproc_per_node=8 train.py config/layer_skip_small.py
# 128M parameters, 3.2M of them in routers; 4.9e+18 FLOPs if no token skips: 1 hour at 40% of the
# peak of 8 A100. To start from your own phase one: --init_from=out/gpt2_small

out_dir = 'out/layer_skip_small'
init_from = 'gpt2'
chunks = '1-1-4-1-4-1'
phi = 'layer_skip'
K = 1
skip = True
max_steps = 10_000
micro_batch = 16
seed = 1338  # other batches than phase one
