"""An OPT model with random weights whose prefill writes K and V to a paged cache, in plain torch.

Serves Fig. 19a: recomputing a preempted sequence (section 4.5 of the paper) costs one prefill of
all its tokens. What the weights are does not matter to the time; the architecture is OPT's: layer
norms before attention and MLP, learned positions, ReLU, the embedding again as the last matrix.

    model = RandomOPT(MODELS["opt-13b"], torch.float16, "cuda")  # 26 GB
    logits = model.prefill(tokens, cache, slots)

Shapes: T tokens, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_attention import PagedKVCache
from vllm_sim.models import Model
from vllm_sim.models.model import KV, MATRIX

STD = 0.02  # of OPT's initialisation
UNUSED_POSITIONS = 2  # OPT's position table starts with two rows that no token uses


class Affine(NamedTuple):
    """A matrix (out, in) or a norm's scale (in,), and its bias."""

    weight: Tensor
    bias: Tensor


class Layer(NamedTuple):
    attention_norm: Affine
    qkv: Affine
    out: Affine
    mlp_norm: Affine
    up: Affine
    down: Affine


class RandomOPT:
    """Random weights of one OPT model on one device."""

    def __init__(
        self, model: Model, dtype: torch.dtype, device: str | torch.device, seed: int = 0
    ) -> None:
        assert model.family == "opt" and model.num_heads == model.num_kv_heads
        self.model = model
        self._rng = torch.Generator(device).manual_seed(seed)
        self._like = torch.empty(0, dtype=dtype, device=device)
        hidden = model.hidden_size
        # Of a layer's matrices four of hidden x hidden are attention's, the others up and down.
        ffn = model.params(MATRIX, KV) // (2 * hidden * model.num_layers) - 2 * hidden
        self.embedding = self._random(model.vocab_size, hidden)
        self.positions = self._random(model.max_len + UNUSED_POSITIONS, hidden)
        self.layers = [
            Layer(
                self._norm(),
                self._linear(3 * hidden, hidden),
                self._linear(hidden, hidden),
                self._norm(),
                self._linear(ffn, hidden),
                self._linear(hidden, ffn),
            )
            for _ in range(model.num_layers)
        ]
        self.final_norm = self._norm()

    def _random(self, *shape: int) -> Tensor:
        return self._like.new_empty(shape).normal_(std=STD, generator=self._rng)

    def _linear(self, size: int, inputs: int) -> Affine:
        return Affine(self._random(size, inputs), self._random(size))

    def _norm(self) -> Affine:
        size = self.model.hidden_size
        return Affine(1.0 + self._random(size), self._random(size))

    def num_params(self) -> int:
        """Numbers in all tensors: OPT's, if this is one."""
        tensors = [self.embedding, self.positions, *self.final_norm]
        tensors += [tensor for layer in self.layers for part in layer for tensor in part]
        return sum(tensor.numel() for tensor in tensors)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: PagedKVCache, slots: Tensor) -> Tensor:
        """Logits (V,) of the token after tokens (T,); their K and V go to slots (T,) int64."""
        assert tokens.shape == slots.shape
        hidden = (self.model.hidden_size,)
        heads = (self.model.num_heads, self.model.head_size)
        x = self.embedding[tokens] + self.positions[UNUSED_POSITIONS:][: len(tokens)]
        for index, layer in enumerate(self.layers):
            qkv = F.linear(F.layer_norm(x, hidden, *layer.attention_norm), *layer.qkv)
            q, k, v = qkv.unflatten(1, (3, *heads)).unbind(1)  # (T, H, D) each
            cache.write(index, slots, k, v)
            batch = [part.transpose(0, 1)[None] for part in (q, k, v)]  # (1, H, T, D)
            out = F.scaled_dot_product_attention(*batch, is_causal=True)
            x = x + F.linear(out[0].transpose(0, 1).flatten(1), *layer.out)
            up = F.relu_(F.linear(F.layer_norm(x, hidden, *layer.mlp_norm), *layer.up))
            x = x + F.linear(up, *layer.down)
        return F.linear(F.layer_norm(x[-1], hidden, *self.final_norm), self.embedding)
