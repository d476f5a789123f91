"""Weights in: GPT-2's in Hugging Face's format, our checkpoints, and layers made into pools."""
import hashlib
import itertools
import json
import os
import pickle
import zipfile
from dataclasses import asdict

import safetensors.torch
import torch

from model import GPT, MoMConfig

UNREADABLE = (RuntimeError, EOFError, KeyError, ValueError, OSError, NotImplementedError, zipfile.BadZipFile,
              pickle.UnpicklingError, safetensors.SafetensorError)  # what a broken file raises
HUB = {name: f'openai-community/{name}' for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')}
HF_NAMES = {  # Hugging Face's name inside layer h.i -> ours inside chunk i. Both store matrices (in, out)
    'ln_1.weight': 'attn.ln_w', 'ln_1.bias': 'attn.ln_b',
    'attn.c_attn.weight': 'attn.qkv_w', 'attn.c_attn.bias': 'attn.qkv_b',
    'attn.c_proj.weight': 'attn.out_w', 'attn.c_proj.bias': 'attn.out_b',
    'ln_2.weight': 'ffn.ln_w', 'ln_2.bias': 'ffn.ln_b',
    'mlp.c_fc.weight': 'ffn.fc_w', 'mlp.c_fc.bias': 'ffn.fc_b',
    'mlp.c_proj.weight': 'ffn.proj_w', 'mlp.c_proj.bias': 'ffn.proj_b'}


def from_pretrained(source, **overrides):
    """What GPT.from_pretrained does, and says."""
    state, base = read_weights(source)
    for key in ('n_embd', 'n_head', 'vocab_size'):
        if overrides.get(key, base[key]) != base[key]:
            raise ValueError(f'{key}={overrides[key]}, but {source} has {key}={base[key]}: leave it out')
    cfg = MoMConfig(**{**base, **overrides})
    have = MoMConfig(**base)
    if cfg.block_size > have.block_size:
        raise ValueError(f'block_size={cfg.block_size}, but {source} knows {have.block_size} positions at most')
    if cfg.n_layer != have.n_layer:
        raise ValueError(f'chunks {cfg.chunks} sum to {cfg.n_layer}, but {source} has {have.n_layer} layers')
    if not have.vanilla and [s._replace(H=0) for s in cfg.shapes] != [s._replace(H=0) for s in have.shapes]:
        raise ValueError(f'{source} is assembled already, with phi={have.phi!r} and chunks {have.chunks}: only a '
                         f'vanilla model can become phi={cfg.phi!r} with other pools or chunks {cfg.chunks}. Start '
                         'from its phase-one checkpoint')
    model = GPT(cfg)
    model.load_state_dict(regroup(state, model, have.vanilla, source), strict=True)
    return model



def load_checkpoint(path):
    """The dict that train.py saved, on the CPU; no code in it is ever run.

    path: the file, or a run's directory (best.pt, else last.pt). Raises ValueError if there is none or it is broken.
    """
    if os.path.isdir(path):
        path = next((p for p in (os.path.join(path, f) for f in ('best.pt', 'last.pt')) if os.path.isfile(p)), path)
    if not os.path.isfile(path):
        raise ValueError(f'no checkpoint at {path}')
    checkpoint = load_file(path)
    try:
        checkpoint['model_config'] = asdict(MoMConfig(**checkpoint['model_config']))
        if not all(w.is_floating_point() for w in checkpoint['model'].values()):
            raise TypeError('weights must be floating-point numbers')
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a checkpoint of train.py ({error!r})') from error
    return checkpoint


def load_file(path):
    """What torch.save wrote to a file, on the CPU; no code in it is ever run. Raises ValueError if it is broken.

    The file is a zip archive with a checksum of each tensor, which torch itself does not look at.
    """
    try:
        zipped = zipfile.is_zipfile(path)  # torch.save's format since 2020; GPT-2's own pickles are older
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if changed := archive.testzip():
                    raise zipfile.BadZipFile(f'the checksum of {changed} is wrong')
        return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)
    except UNREADABLE as error:
        raise ValueError(f'{path} cannot be read ({type(error).__name__}): it is broken or no checkpoint') from error


def read_weights(source):
    """Weights and shape of `source` (see GPT.from_pretrained) -> (state dict with our names, MoMConfig fields)."""
    if source in HUB and not os.path.exists(source):
        return read_hugging_face(download(source), source)
    if os.path.isfile(os.path.join(source, 'config.json')):
        return read_hugging_face(source, source)
    if os.path.exists(source):
        checkpoint = load_checkpoint(source)
        return checkpoint['model'], checkpoint['model_config']
    raise ValueError(f"{source!r} is neither one of {', '.join(HUB)}, nor a directory with Hugging Face's config.json "
                     'and weights, nor a checkpoint of train.py')


def download(name):
    """Fetch GPT-2 `name` from the Hub, or find it in the Hub's local cache -> its directory. The cache names a large
    file by its SHA-256, which is compared."""
    from huggingface_hub import hf_hub_download
    try:
        for file in ('config.json', 'model.safetensors'):
            path = hf_hub_download(HUB[name], file)
    except OSError as error:  # no network, no such file, no access: huggingface_hub derives all of them from it
        raise ValueError(f'{HUB[name]} could not be fetched from the Hugging Face Hub ({type(error).__name__}): give a '
                         'local directory with its config.json and model.safetensors instead of the name') from error
    blob = os.path.basename(os.path.realpath(path))
    if len(blob) == 64:
        with open(path, 'rb') as f:
            if hashlib.file_digest(f, 'sha256').hexdigest() != blob:
                raise ValueError(f'{path} is broken (its SHA-256 is not {blob}): delete it, and it is fetched again')
    return os.path.dirname(path)


def read_hugging_face(folder, source):
    """A GPT-2 in Hugging Face format -> (state dict of the vanilla model with our names, MoMConfig fields)."""
    path = os.path.join(folder, 'config.json')
    try:
        with open(path, encoding='utf-8') as f:
            hf = json.load(f)
        shape = dict(chunks='-'.join('1' * hf['n_layer']), n_embd=hf['n_embd'], n_head=hf['n_head'],
                     block_size=hf['n_positions'], vocab_size=hf['vocab_size'])
        if {type(n) for n in [*shape.values()][1:]} != {int}:
            raise ValueError(f'sizes must be whole numbers: {shape}')
    except (ValueError, KeyError, TypeError) as error:  # not JSON, not UTF-8, no GPT-2
        raise ValueError(f'{path} is not the config.json of a GPT-2 ({error!r}): copy it again') from error
    needed = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
              'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'tie_word_embeddings': True}
    for key, want in needed.items():
        if hf.get(key, want) != want:
            raise ValueError(f"{path} has {key}={hf[key]!r}; GPT-2's is {want!r}: it is another model")
    safe, pickled = os.path.join(folder, 'model.safetensors'), os.path.join(folder, 'pytorch_model.bin')
    if os.path.isfile(safe):
        try:
            weights = safetensors.torch.load_file(safe)
        except UNREADABLE as error:
            raise ValueError(f'{safe} cannot be read ({type(error).__name__}): copy it again') from error
    elif os.path.isfile(pickled):
        weights = load_file(pickled)
    else:
        raise ValueError(f'{folder} holds neither model.safetensors nor pytorch_model.bin')
    try:
        weights = {name.removeprefix('transformer.'): w.float() for name, w in weights.items()}
        state = {'wte.weight': weights['wte.weight'], 'wpe.weight': weights['wpe.weight'],
                 'ln_f.weight': weights['ln_f.weight'], 'ln_f.bias': weights['ln_f.bias']}
        for i in range(hf['n_layer']):
            for theirs, ours in HF_NAMES.items():
                state[f'chunks.{i}.{ours}'] = weights[f'h.{i}.{theirs}'].unsqueeze(0)  # a pool of N = 1
    except (KeyError, AttributeError, RuntimeError) as error:  # one is missing, or is no tensor of numbers
        raise ValueError(f'the weights in {folder} lack {error}: they are not those of its config.json') from error
    for name, w in state.items():
        if not w.abs().max() < 1e4:  # GPT-2's largest are about 10; these files have no checksums
            raise ValueError(f'{name} in {folder} holds {w.abs().max():.3g}: the file is broken, copy it again')
    return state, shape


def regroup(state, model, vanilla, source):
    """The weights `state` as a state dict for `model`.

    If they are a vanilla model's, consecutive layers are stacked into the pools of a chunk (its Shape says which
    layers), and what no layer has, routers, stays as `model` has it, fresh.
    """
    arranged, starts = {}, [0, *itertools.accumulate(model.cfg.sizes)]
    for name, fresh in model.state_dict().items():
        layers = [name]
        if vanilla and name.startswith('chunks.'):
            _, c, part = name.split('.', 2)
            shape = model.cfg.shapes[int(c)]
            kept = {'attn': shape.layers_A, 'ffn': shape.layers_F}.get(part.split('.')[0])
            layers = kept and [f'chunks.{starts[int(c)] + i}.{part}' for i in kept]
        if layers is None:
            arranged[name] = fresh
            continue
        if any(layer not in state for layer in layers):
            raise ValueError(f'{source} has no {name} for chunks={model.cfg.chunks}: take the settings of its training')
        parts = [state[layer][:len(fresh)] if name == 'wpe.weight' else state[layer] for layer in layers]
        want = (len(fresh) // len(parts), *fresh.shape[1:])
        for layer, w in zip(layers, parts):
            if w.shape != want:
                raise ValueError(f'{source} has {layer} of shape {tuple(w.shape)}, but this model wants {want}: take '
                                 'the settings of its training')
        arranged[name] = torch.cat(parts)
    if not vanilla and (left := state.keys() - arranged.keys()):
        raise ValueError(f'{source} has {min(left)}, for which this model has no place: take the settings of its '
                         'training')
    return arranged
