"""Weights in: Hugging Face's format, our own checkpoints, and layers that become modules of chunks.
Weights out: a folder in Hugging Face's format.

  python weights.py --source=out/gpt2_small --out_dir=hf/gpt2_small

A vanilla model becomes a GPT-2 that AutoModelForCausalLM loads. A MoM becomes model.safetensors and
a config.json with its MoMConfig. GPT.from_pretrained, the door to this file, reads both back.
"""
import itertools
import json
import os
import zipfile
from dataclasses import asdict

import safetensors.torch
import torch

import common
import inputs
from model import GPT, MoMConfig

source = 'out/gpt2_small'  # a run's directory or checkpoint, GPT-2's name, a Hugging Face directory
out_dir = ''               # the folder to write
overwrite = False          # replace the model that was written there before
# ---
settings, given = common.load(globals()) if __name__ == '__main__' else ({}, set())  # not imported

SIZES = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'
HUB = {name: f'openai-community/{name}' for name in SIZES}
# Hugging Face's name inside layer h.i -> ours inside chunk i. Both store matrices (in, out).
HF_NAMES = {
    'ln_1.weight': 'attn.ln_w', 'ln_1.bias': 'attn.ln_b',
    'attn.c_attn.weight': 'attn.qkv_w', 'attn.c_attn.bias': 'attn.qkv_b',
    'attn.c_proj.weight': 'attn.out_w', 'attn.c_proj.bias': 'attn.out_b',
    'ln_2.weight': 'ffn.ln_w', 'ln_2.bias': 'ffn.ln_b',
    'mlp.c_fc.weight': 'ffn.fc_w', 'mlp.c_fc.bias': 'ffn.fc_b',
    'mlp.c_proj.weight': 'ffn.proj_w', 'mlp.c_proj.bias': 'ffn.proj_b'}
MASKS = '.attn.bias', '.attn.masked_bias'  # old files hold the causal mask too; it is no weight


def from_pretrained(source, **overrides):
    """A model from weights: the start of phase two, or of fine-tuning.

    source: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' (fetched from the Hub), a directory in
    Hugging Face format, or a checkpoint of train.py (its file or its directory, then best.pt).
    overrides: fields of MoMConfig. With `chunks`, the layers of a vanilla model become the modules
    of those chunks, and fresh routers are added; a shorter block_size cuts the position table.
    Raises ValueError when the weights and the wanted shape do not agree, or cannot be read.
    """
    state, base = read_weights(source)
    for key in ('n_embd', 'n_head', 'vocab_size'):
        if overrides.get(key, base[key]) != base[key]:
            raise ValueError(f'{key}={overrides[key]}, but {source} has {key}={base[key]}: '
                             'leave it out')
    cfg, have = MoMConfig(**{**base, **overrides}), MoMConfig(**base)
    if cfg.block_size > have.block_size:
        raise ValueError(f'block_size={cfg.block_size}, but {source} knows {have.block_size} '
                         'positions at most')
    if cfg.n_layer != have.n_layer:
        raise ValueError(f'chunks {cfg.chunks} sum to {cfg.n_layer}, but {source} has '
                         f'{have.n_layer} layers')
    if not have.vanilla and modules_of(cfg) != modules_of(have):
        raise ValueError(f'{source} is assembled already, with phi={have.phi!r} and chunks '
                         f'{have.chunks}: only a vanilla model can become phi={cfg.phi!r} with '
                         f'other pools or chunks {cfg.chunks}. Start from its phase-one checkpoint')
    model = GPT(cfg)
    model.load_state_dict(regroup(state, model, have.vanilla, source), strict=True)
    return model


def modules_of(cfg):  # what the weights of a model are of, whatever the number of steps
    return [plan._replace(H=0) for plan in cfg.plans]


def read_weights(source):
    """`source` (see from_pretrained) -> (state dict with our names, fields of MoMConfig)."""
    if source in HUB and not os.path.exists(source):
        return read_folder(download(source))
    if os.path.isfile(os.path.join(source, 'config.json')):
        return read_folder(source)
    if os.path.exists(source):
        checkpoint = load_checkpoint(source)
        return checkpoint['model'], checkpoint['model_config']
    raise ValueError(f"{source!r} is neither one of {', '.join(HUB)}, nor a directory with Hugging "
                     "Face's config.json and weights, nor a checkpoint of train.py")


# ----------------------------------------------------------------------------- our checkpoints

def load_checkpoint(path):
    """The dict that train.py saved, on the CPU; no code in it is ever run.

    path: the file, or a run's directory (best.pt, else last.pt). Raises ValueError if there is none
    or it is broken.
    """
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in ('best.pt', 'last.pt')]
        path = next((file for file in files if os.path.isfile(file)), path)
    if not os.path.isfile(path):
        raise ValueError(f'no checkpoint at {path}')
    checkpoint = load_file(path)
    try:
        checkpoint['model_config'] = asdict(MoMConfig(**checkpoint['model_config']))
        checkpoint['model'] = numbers(checkpoint['model'])
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a checkpoint of train.py ({error!r})') from error
    return checkpoint


def load_file(path):
    """What torch.save wrote to a file, on the CPU; no code in it is ever run.

    Raises ValueError if it is broken. The file is a zip archive with a checksum of each tensor,
    which torch itself does not look at.
    """
    try:
        zipped = zipfile.is_zipfile(path)  # torch.save's format since 2020, if not GPT-2's
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if changed := archive.testzip():
                    raise zipfile.BadZipFile(f'the checksum of {changed} is wrong')
        return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)
    except Exception as error:  # whatever an unpickler comes upon in other bytes
        raise ValueError(f'{path} cannot be read ({type(error).__name__}): it is broken or no '
                         'checkpoint. Take another, or delete it and make it again') from error


def numbers(weights):
    """Tensors by name, without what a tool put before every name, such as `_orig_mod.`, `module.`.

    Raises TypeError or AttributeError for what is not the weights of one model.
    """
    tables = [name for name in weights if name.endswith('wpe.weight')]
    before = [name.removesuffix('wpe.weight') for name in tables]
    if len(before) > 1:
        raise TypeError(f'they belong to several models, named {before}')
    for name, w in weights.items():
        if w.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f'weights must be floating-point numbers, and {name} is {w.dtype}')
    return {name.removeprefix(*before): w for name, w in weights.items()} if before else weights


# ---------------------------------------------------------------------------- Hugging Face's format

def download(name):
    """Fetch GPT-2 `name` from the Hub, or find it in the Hub's local cache -> its directory.

    The cache names a large file by its SHA-256, which is compared.
    """
    from huggingface_hub import hf_hub_download
    try:
        for file in ('config.json', 'model.safetensors'):
            path = hf_hub_download(HUB[name], file)
    except OSError as error:  # no network, no such file, no access: all are derived from it
        raise ValueError(f'{HUB[name]} could not be fetched from the Hugging Face Hub '
                         f'({type(error).__name__}): give a local directory with its config.json '
                         'and model.safetensors instead of the name') from error
    blob = os.path.basename(os.path.realpath(path))
    if len(blob) == 64 and common.sha256(path) != blob:
        raise ValueError(f'{path} is broken (its SHA-256 is not {blob}): delete it, and it is '
                         'fetched again')
    return os.path.dirname(path)


def read_folder(folder):
    """A GPT-2 in Hugging Face format, or what write_folder wrote -> see read_weights."""
    config = inputs.read_json(os.path.join(folder, 'config.json'))
    read = read_mom if config.get('model_type') == 'mom' else read_gpt2
    state, shape = read(folder, config)
    for name, w in state.items():  # these files have no checksums; GPT-2's largest are about 10
        if not (w.numel() and w.abs().max() < 1e4):
            raise ValueError(f'{name} in {folder} holds numbers that no GPT-2 has, or none: the '
                             'file is broken, copy it again')
    return state, shape


def read_mom(folder, config):
    """What write_folder wrote, with its config.json -> see read_weights."""
    try:
        return numbers(read_tensors(folder)), asdict(MoMConfig(**config['model_config']))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'config.json and the weights in {folder} are not those of a MoM '
                         f'({error!r}): copy them again') from error


def read_gpt2(folder, hf):
    """A GPT-2 in Hugging Face format, of which hf is the config.json -> see read_weights."""
    path = os.path.join(folder, 'config.json')
    try:
        sizes = dict(n_embd=hf['n_embd'], n_head=hf['n_head'], block_size=hf['n_positions'],
                     vocab_size=hf['vocab_size'])
        shape = dict(chunks='-'.join('1' * hf['n_layer']), **sizes)
        if {type(n) for n in sizes.values()} != {int}:
            raise ValueError(f'sizes must be whole numbers: {sizes}')
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not the config.json of a GPT-2 ({error!r}): copy it '
                         'again') from error
    needed = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
              'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
              'tie_word_embeddings': True, 'n_inner': 4 * hf['n_embd']}
    for key, want in needed.items():
        if hf.get(key) not in (None, want):  # null is as good as absent
            raise ValueError(f"{path} has {key}={hf[key]!r}; GPT-2's is {want!r}: it is another "
                             'model')
    tensors = read_tensors(folder)
    try:
        floats = {name: w for name, w in tensors.items() if not name.endswith(MASKS)}
        weights = {name: w.float() for name, w in numbers(floats).items()}
        heads = [w for name, w in weights.items() if name.endswith('lm_head.weight')]
        for head in heads:  # it is tied: one of the two is enough
            if not torch.equal(head, weights.setdefault('wte.weight', head)):
                raise ValueError(f'lm_head.weight and wte.weight in {folder} differ: its head is '
                                 'not tied, and it is another model')
        of_all = 'wte.weight', 'wpe.weight', 'ln_f.weight', 'ln_f.bias'
        state = {name: weights[name] for name in of_all}
        for i in range(hf['n_layer']):
            for theirs, ours in HF_NAMES.items():
                w = weights[f'h.{i}.{theirs}']
                state[f'chunks.{i}.{ours}'] = w.unsqueeze(0)  # a pool of N = 1
    except KeyError as error:
        raise ValueError(f'the weights in {folder} lack {error}: they are not those of its '
                         'config.json') from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f'the weights in {folder} cannot be used ({error}): take those of one '
                         'model, in fp32, bf16 or fp16') from error
    if any(name.startswith(f'h.{hf["n_layer"]}.') for name in weights):
        raise ValueError(f'{folder} has weights of more than the {hf["n_layer"]} layers that its '
                         'config.json says: copy both again')
    return state, shape


def read_tensors(folder):
    """The tensors by name of model.safetensors, else of pytorch_model.bin, whole or in parts."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        whole, index = os.path.join(folder, name), os.path.join(folder, f'{name}.index.json')
        if os.path.isfile(whole):
            return read_file(whole)
        if os.path.isfile(index):
            return read_parts(folder, index)
    raise ValueError(f'{folder} holds neither model.safetensors nor pytorch_model.bin')


def read_parts(folder, index):
    """The tensors of the files that an index names: {"weight_map": {tensor: file}}."""
    where = inputs.read_json(index).get('weight_map')
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ValueError(f'{index} does not say which file holds which weights: copy it again')
    tensors = {}
    for file in sorted(set(where.values())):
        tensors |= read_file(os.path.join(folder, os.path.basename(file)))
    if lacking := where.keys() - tensors.keys():
        raise ValueError(f'{where[min(lacking)]} in {folder} lacks {min(lacking)}: copy it again')
    return tensors


def read_file(path):
    """The tensors by name of a .safetensors, or of a pickle; no code in it is ever run."""
    if not path.endswith('.safetensors'):
        return load_file(path)
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # likewise
        raise ValueError(f'{path} cannot be read ({type(error).__name__}): copy it again'
                         ) from error


# ----------------------------------------------------------------------------- layers into pools

def regroup(state, model, vanilla, source):
    """The weights `state` as a state dict for `model`.

    If they are a vanilla model's, consecutive layers are stacked into the pools of a chunk (its
    Plan says which), and what no layer has, routers, stays as `model` has it, fresh.
    """
    cfg, arranged = model.cfg, {}
    starts = [0, *itertools.accumulate(cfg.sizes)]  # the first layer of each chunk
    for name, fresh in model.state_dict().items():
        layers = [name]
        if vanilla and name.startswith('chunks.'):
            _, c, part = name.split('.', 2)
            plan, start = cfg.plans[int(c)], starts[int(c)]
            kept = {'attn': plan.layers_A, 'ffn': plan.layers_F}.get(part.split('.')[0])
            if kept is None:
                arranged[name] = fresh
                continue
            layers = [f'chunks.{start + i}.{part}' for i in kept]
        parts = []
        for layer in layers:
            if layer not in state:
                raise ValueError(f'{source} has no {name}: take the settings of its training')
            w = state[layer]
            parts.append(w[:len(fresh)] if name == 'wpe.weight' and w.ndim else w)
        want = (len(fresh) // len(parts), *fresh.shape[1:])
        for layer, w in zip(layers, parts):
            if w.shape != want:
                raise ValueError(f'{source} has {layer} of shape {tuple(w.shape)}, but this model '
                                 f'wants {want}: take the settings of its training')
        arranged[name] = torch.cat(parts)
    if not vanilla and (left := state.keys() - arranged.keys()):
        raise ValueError(f'{source} has {min(left)}, for which this model has no place: take the '
                         'settings of its training')
    return arranged


# ----------------------------------------------------------------------------- weights out

def write_folder(model, tokenizer, folder):
    """A model as a folder in Hugging Face's format: its files by name, config.json last.

    A vanilla model is a GPT-2 for whoever reads it. A MoM is for GPT.from_pretrained: its tensors
    have our names. A folder without config.json is no model, so a crash leaves no half of one.
    """
    cfg, state, end = model.cfg, model.state_dict(), tokenizer.eot_token
    ends = {'bos_token_id': end, 'eos_token_id': end}
    config = {'model_type': 'mom', 'model_config': asdict(cfg)}
    if cfg.vanilla:
        state = hugging_face_names(state)
        config = {
            'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'n_embd': cfg.n_embd,
            'n_layer': cfg.n_layer, 'n_head': cfg.n_head, 'n_positions': cfg.block_size,
            'vocab_size': cfg.vocab_size, 'activation_function': 'gelu_new',
            'layer_norm_epsilon': 1e-5, 'attn_pdrop': 0.0, 'embd_pdrop': 0.0, 'resid_pdrop': 0.0,
            'tie_word_embeddings': True, 'torch_dtype': 'float32'}
    config |= ends
    if not tokenizer.added:  # else tokenizer.json says which it is
        config['tokenizer'] = tokenizer.name
    plain = {'generation_config.json': ends, 'tokenizer.json': tokenizer_json(tokenizer),
             'tokenizer_config.json': {
                 'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': cfg.block_size,
                 'bos_token': common.EOT, 'eos_token': common.EOT, 'unk_token': common.EOT,
                 'clean_up_tokenization_spaces': False}, 'config.json': config}
    if os.path.exists(os.path.join(folder, 'config.json')):
        os.unlink(os.path.join(folder, 'config.json'))
    with common.atomic_write(os.path.join(folder, 'model.safetensors')) as f:
        safetensors.torch.save_file(state, f.name, metadata={'format': 'pt'})
    for name, data in plain.items():
        with common.atomic_write(os.path.join(folder, name)) as f:
            f.write(json.dumps(data, indent=2, ensure_ascii=False).encode())


def hugging_face_names(state):  # of a vanilla model; its head is its embedding, which is there once
    theirs, named = {ours: name for name, ours in HF_NAMES.items()}, {}
    for name, w in state.items():
        if name.startswith('chunks.'):
            _, i, part = name.split('.', 2)
            name, w = f'h.{i}.{theirs[part]}', w[0]  # the only one of its pool
        named[f'transformer.{name}'] = w
    return named


def tokenizer_json(tokenizer):
    """A tokenizer as the `tokenizers` package reads it: a BPE over bytes; 'bytes' has no merges.

    The file has one letter for a byte, see inputs.byte_letters.
    """
    letters = inputs.byte_letters()
    pieces = [tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.eot_token)]
    ids = {piece: i for i, piece in enumerate(pieces)}

    def write(piece):
        return ''.join(letters[b] for b in piece)
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
                  'use_regex': True}
    merges = [[*map(write, halves(piece, ids))] for piece in pieces[256:]]
    whole = {'special': True, 'normalized': False, 'single_word': False, 'lstrip': False,
             'rstrip': False}
    added = {common.EOT: tokenizer.eot_token, **tokenizer.added}
    return {'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': None,
            'added_tokens': [{'id': i, 'content': text, **whole} for text, i in added.items()],
            'pre_tokenizer': byte_level, 'post_processor': None, 'decoder': byte_level,
            'model': {'type': 'BPE', 'merges': merges,
                      'vocab': {write(piece): i for piece, i in ids.items()}}}


def halves(piece, ids):
    """The two pieces that a merge makes `piece` of: what earlier merges leave of its bytes."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        merged = [ids.get(a + b, len(ids)) for a, b in itertools.pairwise(parts)]
        i = merged.index(min(merged))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def main():
    if not out_dir:
        raise ValueError('name the folder to write with --out_dir=FOLDER')
    folder = common.results_folder(out_dir)
    ours = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
            'tokenizer_config.json'}
    there = {name.removesuffix('.part') for name in os.listdir(folder)}  # .part: of a stopped run
    if there - ours:
        raise ValueError(f'{folder} holds {min(there - ours)}, which is not written here: name a '
                         'new folder with --out_dir=FOLDER')
    if there and not overwrite:
        raise ValueError(f'{folder} holds a model already: name a new folder, or replace it with '
                         '--overwrite=True')
    model, tokenizer = inputs.model_and_tokenizer(source)
    write_folder(model, tokenizer, folder)
    reader = 'AutoModelForCausalLM' if model.cfg.vanilla else 'GPT'
    print(f'{folder}: {reader}.from_pretrained({folder!r}) reads it')


if __name__ == '__main__':
    main()
