"""What tests share. Without a CUDA device Triton's kernels run through its interpreter."""

import os

import pytest
import torch

# Read when a kernel is decorated, so before anything imports one. Nothing else here uses triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def few_bytes():
    """For tensors of a few bytes: a second thread only ever waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
