"""What only a GPU can show; skipped without one. In a dry run, that every system gets through:

  python tests/dry_gpu.py -m pytest tests/test_gpu.py
"""
import pytest
import torch

import model as model_py
from model import GPT
from tests.test_model import tiny
from tests.test_routing import ALL

if not torch.cuda.is_available():
    pytest.skip('no GPU', allow_module_level=True)
SYSTEMS = {**ALL, 'vanilla': dict(chunks='1-1')}
DRY = 'dry run' in torch.cuda.get_device_name()
values = pytest.mark.skipif(DRY, reason='a dry run has none')
grouped = pytest.mark.skipif(not model_py.has_grouped_mm(torch.device('cuda'), 64),
                             reason='this GPU takes the loop')


def build(name, device='cuda'):
    torch.manual_seed(5)
    model = GPT(tiny(**{**SYSTEMS[name], 'n_embd': 64})).train()
    return model.to(device), torch.randint(0, 50, (8, 24)).to(device)


def step(model, idx, dtype):
    with torch.autocast(idx.device.type, dtype, enabled=dtype != torch.float32):
        loss = model(idx, idx.roll(-1), want_logits=False)[1]
    loss.backward()
    return loss.detach()


def outcome(model, idx, dtype):  # loss and all gradients as one vector
    loss = step(model, idx, dtype)
    return torch.cat([loss.view(1), *(p.grad.flatten() for p in model.parameters())]).cpu()


@values
@pytest.mark.parametrize('name', SYSTEMS)
def test_it_computes_what_the_cpu_does(name):
    want = outcome(*build(name, 'cpu'), torch.float32)
    assert (outcome(*build(name), torch.float32) - want).norm() < 1e-3 * want.norm()


@values
@grouped
@pytest.mark.parametrize('name', SYSTEMS)
def test_grouped_products_are_those_of_the_loop(name, monkeypatch):
    found = outcome(*build(name), torch.bfloat16)
    monkeypatch.setattr(model_py, 'has_grouped_mm', lambda device, C: False)
    loop = outcome(*build(name), torch.bfloat16)
    assert (found - loop).norm() < 0.02 * loop.norm()  # on the CPU 0.003 at most


@grouped
@pytest.mark.parametrize('name', SYSTEMS)
def test_no_step_waits_for_the_gpu(name):
    model, idx = build(name)
    optimizer = torch.optim.AdamW(model.param_groups(0.1), fused=True)
    torch.cuda.set_sync_debug_mode('error')
    try:
        step(model, idx, torch.bfloat16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@grouped
@pytest.mark.parametrize('name', SYSTEMS)
def test_a_system_compiles_to_one_graph(name):
    """Down to Triton's code, a minute for each."""
    model, idx = build(name)
    torch._dynamo.reset()
    found = outcome(torch.compile(model, fullgraph=True), idx, torch.bfloat16)
    if not DRY:
        eager = outcome(*build(name), torch.bfloat16)
        # Fused operations round less, and a few tokens change sides.
        assert (found - eager).norm() < 0.2 * eager.norm()
