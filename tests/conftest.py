import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same ones, alone or after others, in whatever order."""
    torch.manual_seed(0)
