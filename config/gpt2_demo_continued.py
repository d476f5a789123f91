# The demo's comparison: the vanilla model of phase one, trained on for the steps and the batches of
# mom_demo.py.
#   python train.py config/gpt2_demo_continued.py        after config/gpt2_demo.py
# 1.2M parameters, about a minute on 2 CPU cores.

out_dir = 'out/gpt2_demo_continued'
data_dir = 'data/sotu_bytes'
init_from = 'out/gpt2_demo'
max_steps = 900
batch_size = 8
learning_rate = 2e-3
eval_every = 300
eval_tokens = 60_000
log_every = 50
seed = 1338  # other batches than phase one
