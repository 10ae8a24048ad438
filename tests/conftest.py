"""Where there is no CUDA device, the Triton kernels under test run through its interpreter."""

import os

import torch

# Read when a kernel is decorated, so before anything imports one. Nothing else here uses triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
