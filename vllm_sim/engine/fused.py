"""Fewer and shorter kernels: Q, K and V in one product, a gated layer's two, a ReLU with its own.

Reproduces nothing of the paper: servers do so, as a few long products read weights faster than many
short ones. The weights are the model's, one below the other, and it calls its projections as
before. The first computes all, the others hand out their part of it. Where triton runs, LayerNorm
and Llama's RMSNorm are those of norm.py.

    fuse(model)                     # OPT, Llama and models like them; others stay as they are

Shapes: T tokens, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from paged_attention import TRITON, choose_kernel
from vllm_sim.engine.support import heads

with suppress(ImportError):  # triton may be missing
    from vllm_sim.engine.norm import normalize

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order of their calls


class _First(nn.Module):
    """Several linear layers on one input: called as the first of them, it keeps the others'."""

    def __init__(self, parts: Sequence[nn.Linear]) -> None:
        super().__init__()
        sizes = [part.out_features for part in parts]
        self.sizes, self.out_features = sizes, sizes[0]
        self.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
        self.bias = None
        if parts[0].bias is not None:
            self.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
        self.rest: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., T, E)."""
        first, *self.rest = functional.linear(hidden, self.weight, self.bias).split(self.sizes, -1)
        return first


class _Later(nn.Module):
    """One of the others."""

    def __init__(self, first: _First) -> None:
        super().__init__()
        self._first = [first]  # not a submodule: its weights are named once

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._first[0].rest.pop(0)


class _Rectified(nn.Linear):
    """A linear layer and the ReLU behind it, in one kernel on a GPU."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., T, E)."""
        rows = hidden.flatten(0, -2)
        out = torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=False)
        return out.unflatten(0, hidden.shape[:-1])


class _LayerNorm(nn.LayerNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., T, E)."""
        return normalize(hidden, self.weight, self.bias, self.eps)


class _RootMeanSquareNorm(LlamaRMSNorm):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., T, E)."""
        return normalize(hidden, self.weight, None, self.variance_epsilon)


def fuse(model: PreTrainedModel) -> int:
    """Put them together, in place, on the device where the model will run; how many products there
    are now in place of two or three."""
    count = 0
    firsts = {names[0] for names in TOGETHER}
    # Not all modules: those that are replaced are to be freed one after the other.
    holders = [one for one in model.modules() if any(hasattr(one, name) for name in firsts)]
    for module in holders:
        for names in TOGETHER:
            parts = [getattr(module, name, None) for name in names]
            if not all(type(part) is nn.Linear for part in parts):
                continue
            if len({part.bias is None for part in parts}) > 1:
                continue
            first = _First(parts)
            setattr(module, names[0], first)
            for name in names[1:]:
                setattr(module, name, _Later(first))
            del parts
            count += 1
    for module in model.modules():  # OPT's MLP
        linear, behind = getattr(module, "fc1", None), getattr(module, "activation_fn", None)
        if type(linear) is nn.Linear and linear.bias is not None and type(behind) is nn.ReLU:
            linear.__class__, module.activation_fn = _Rectified, nn.Identity()
    if choose_kernel("auto", model.device, *heads(model.config))[0] == TRITON:
        for norm in model.modules():
            if type(norm) not in (nn.LayerNorm, LlamaRMSNorm) or norm.weight is None:
                continue
            if norm.weight.dtype == model.dtype and norm.weight.dim() == 1:
                if type(norm) is LlamaRMSNorm:
                    norm.__class__ = _RootMeanSquareNorm
                elif norm.bias is not None:
                    norm.__class__ = _LayerNorm
    return count
