"""Text from a checkpoint of train.py, or from a GPT-2.

  python sample.py --source=out/mom_demo --prompt="The state of the Union is"
  python sample.py --source=gpt2-medium --max_new_tokens=100
"""
import os

import torch

import config
from model import GPT

# --- what
source = 'out/mom_demo'       # a run's directory or checkpoint, a GPT-2 name, or a Hugging Face directory
prompt = ''                   # text to continue; '' starts a new document; file:PATH reads it from a file
samples = 1                   # how many
max_new_tokens = 400          # tokens of each
# --- how
temperature = 0.8             # 0 is greedy
top_k = 200                   # sample among the k likeliest tokens; 0 is all
top_p = 1.0                   # and among the likeliest that hold this share of the probability
beams = 1                     # more: the likeliest text that a beam search finds, temperature or not
stop = True                   # at <|endoftext|>
seed = 1337                   # of the draws
dtype = 'float32'             # of the weights: 'float32', or 'bfloat16', which reads half as much per token
device = 'auto'               # 'auto', 'cpu', 'cuda'
# ---
settings, given = config.load(globals())

for key in ('samples', 'max_new_tokens'):
    if settings[key] < 1:
        raise ValueError(f'{key}={settings[key]} must be at least 1')
if temperature < 0 or top_k < 0:
    raise ValueError(f'temperature={temperature} and top_k={top_k} must be at least 0')
if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
if not 0 < top_p <= 1:
    raise ValueError(f'top_p={top_p} must be above 0 and at most 1')
device = config.find_device(device)
torch.manual_seed(seed)

tokenizer = config.tokenizer_of(source)
model = GPT.from_pretrained(source).to(device).cast(getattr(torch, dtype)).eval()

if prompt.startswith('file:'):
    if not os.path.isfile(prompt[5:]):
        raise ValueError(f'no prompt file {prompt[5:]}')
    try:
        with open(prompt[5:], encoding='utf-8') as f:
            prompt = f.read()
    except UnicodeDecodeError as error:
        raise ValueError(f'{prompt[5:]} is not UTF-8 ({error}): convert it') from error
ids = tokenizer.encode_ordinary(prompt) or [tokenizer.eot_token]  # <|endoftext|> is what stands before a document
idx = torch.tensor([ids], device=device)
for n in range(samples):
    text = model.generate(idx, max_new_tokens, temperature, top_k or None, top_p if top_p < 1 else None, beams,
                          tokenizer.eot_token if stop else None, vocab=tokenizer.n_vocab)[0, len(ids):].tolist()
    if stop and tokenizer.eot_token in text:
        text = text[:text.index(tokenizer.eot_token)]
    print(prompt + tokenizer.decode(text))
    if n < samples - 1:
        print('-' * 40)
