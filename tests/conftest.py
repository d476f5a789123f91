import signal

import pytest
import torch

# A shell's background jobs ignore Ctrl-C, and so would the scripts that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same ones, alone or after others, in whatever order."""
    torch.manual_seed(0)
