"""The attention of a transformers model, over blocks: what its layers call, and one forward's work.

Reproduces: sections 4.1 and 4.3 on a real model. The K and V of new tokens are written to the slots
that a manager gave them. With Triton's kernel all tokens attend over their sequence's blocks in
place. Without it those of a prompt do so over contiguous K and V, and a generated one over K and V
that the paged kernel gathers.

A subclass decides where tokens go, once a forward: `make_step` returns a Step. paged_cache.py has
that of transformers' generate(); OneRowCache is that of engine.py and worker.py (continuous
batching).

transformers gives a layer's new K and V to `update`, then calls the attention function that is
registered under NAME. `update` leaves the cache's mark on the key tensor, and by it the function
finds its cache: several may be in use at a time.

Shapes: B rows of T tokens in a forward, flattened in that order; S slots per block.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from attention import attention, causal_mask
from kv_cache_manager import PagedKVCacheManager
from paged_attention import (
    TRITON,
    PagedKVCache,
    choose_kernel,
    gather_blocks,
    pad_block_tables,
    paged_attention_kernel,
)
from vllm_sim.engine.in_place import Batch, InPlace
from vllm_sim.engine.support import UnsupportedModelError, check_call, check_model, heads, window_of

if TYPE_CHECKING:
    from paged_attention_triton import Plan

NAME = "block_tables"  # of the attention and mask functions, for transformers
# What generate() and forwards call a cache: one or the other, by version (5.24 renamed it).
CACHE = {"cache", "past_key_values"}.intersection(
    inspect.signature(create_causal_mask).parameters
).pop()
QUERIES_AT_ONCE = 512  # of a prompt: the score matrix of all would grow with its square


@dataclass(frozen=True, slots=True)
class Segment:
    """The newest tokens of one sequence: of the forward's flat order, those from start to end."""

    start: int
    end: int
    table: torch.Tensor  # (1, blocks) int32
    num_tokens: int  # of the sequence, these included


@dataclass(frozen=True, slots=True)
class Step:
    """Where one forward's tokens go and what they attend to; the same in every layer.

    The first `num_decodes` tokens, if any, are each the newest of a sequence. Tokens of no segment
    are padding: they attend to nothing and get zeros.
    """

    slots: torch.Tensor  # (written,) int64
    written: torch.Tensor | None  # (written,) int64: the tokens stored there; None: all of them
    tables: torch.Tensor  # (num_decodes, max_blocks) int32
    lens: torch.Tensor  # (num_decodes,) int64
    seq_lens: tuple[int, ...]  # the same as numbers
    segments: tuple[Segment, ...] = ()
    # For Triton's kernel: the same batch by batch (none: made from the above), and how each is cut,
    # which the first layer adds. Who gives both may replay the forward on other numbers.
    batches: tuple[Batch, ...] = ()
    plans: dict[tuple[int | None, ...], Plan] = field(default_factory=dict)

    @property
    def num_decodes(self) -> int:
        return len(self.seq_lens)


class BlockCache(Cache):
    """A transformers cache whose K and V lie in a PagedKVCache, and not in `layers`."""

    def __init__(
        self,
        model: PreTrainedModel,
        manager: PagedKVCacheManager,
        kernel: str = "auto",
        poison: bool = False,
    ) -> None:
        """Set the model's attention to this one. `kernel`: auto, gather or triton; `poison`: fill
        unused slots with NaN.

        Raises UnsupportedModelError, and KernelError for a kernel that cannot be had.
        """
        check_model(model)
        super().__init__(layers=[])
        found = choose_kernel(kernel, model.device, *heads(model.config))
        self.kernel, self.why_not_triton = found
        self._attend = self._gathered
        if self.kernel == TRITON:
            self._attend = InPlace(model.device)
        self.manager, self._poison = manager, poison
        self._config = model.config.get_text_config(decoder=True)
        self.num_layers = self._config.num_hidden_layers
        told_apart = getattr(self._config, "layer_types", None)
        self._window = None if told_apart else window_of(model.config)  # of every layer
        self.pool: PagedKVCache | None = None  # made by the first forward: its K has all sizes
        self._step: Step | None = None
        self._layer = 0  # the last one that attended
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, padding_mask)
        model.set_attn_implementation(NAME)
        self._check_attention()

    def _check_attention(self) -> None:
        """UnsupportedModelError unless layers call this attention: another would take the newest
        token's K and V for all there are."""
        if self._config._attn_implementation != NAME:
            set_to = self._config._attn_implementation
            raise UnsupportedModelError(
                f"the attention of {self._config.model_type} is {set_to!r}: "
                f"model.set_attn_implementation({NAME!r})"
            )

    # -- what a subclass gives --------------------------------------------------------------

    def make_step(self, key: torch.Tensor, mask: torch.Tensor | None) -> Step:
        """Allocate for a forward: the first layer's K (B, H_kv, T, D), and which of all tokens
        so far are no padding, bool (B, seen + T), None for all."""
        raise NotImplementedError

    # -- what transformers asks -------------------------------------------------------------

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """K and V as they are: they are written, and read, by the attention function."""
        self._check_attention()
        key_states.block_cache = self, layer_idx
        return key_states, value_states

    @property
    def is_initialized(self) -> bool:
        return self.pool is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """None is: a window is a matter of the mask, and all tokens are kept."""
        return [False] * self.num_layers

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self.num_layers

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # as much as the blocks hold

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_layers} layers)"

    # -- one layer --------------------------------------------------------------------------

    def _make_pool(self, key: torch.Tensor) -> PagedKVCache:
        """The manager's blocks for K like this (B, H_kv, T, D)."""
        manager = self.manager
        return PagedKVCache(
            *(manager.num_blocks, manager.block_size, key.shape[1], key.shape[3]),
            num_layers=self.num_layers,
            num_cpu_blocks=manager.num_cpu_blocks,
            dtype=key.dtype,
            device=key.device,
            poison=self._poison,
        )

    def attend(self, layer, q, k, v, mask, *, scale=None, window=None, soft_cap=None):
        """Store a layer's new K and V, and attend. q (B, H, T, D), k and v (B, H_kv, T, D).

        Returns (B, T, H, D). Raises UnsupportedModelError for K and V that the pool cannot hold,
        and what `make_step` raises.
        """
        if q.requires_grad and torch.is_grad_enabled():
            raise UnsupportedModelError("a paged cache keeps no gradients: use torch.no_grad()")
        if self._window is not None and window is None:
            raise UnsupportedModelError("it has a window, and its mask has none")
        if layer == 0:
            if v.shape != k.shape:
                raise UnsupportedModelError("its K and V have different head sizes")
            if self.pool is None:
                self.pool = self._make_pool(k)
            self._step = self.make_step(k, mask)
        elif layer != self._layer + 1 or layer >= self.num_layers:
            raise UnsupportedModelError(f"its layer {layer} follows layer {self._layer}")
        self._layer = layer
        step, pool = self._step, self.pool
        if (k.shape[1], k.shape[3]) != (pool.num_kv_heads, pool.head_size) or v.shape != k.shape:
            raise UnsupportedModelError(f"its layer {layer} has other K/V heads than layer 0")
        rows = q.shape[0]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, heads, D)
        if step.written is None:
            pool.write(layer, step.slots, k, v)
        else:
            pool.write(layer, step.slots, k[step.written], v[step.written])
        keys, values = pool.k_pool(layer), pool.v_pool(layer)
        options = {"window": window, "soft_cap": soft_cap}
        out = self._attend(step, q, k, v, keys, values, scale, **options)
        return out.unflatten(0, (rows, -1))

    def _gathered(self, step, q, k, v, keys, values, scale, *, window, soft_cap) -> torch.Tensor:
        """Attention of all tokens, q (T, H, D), new K and V (T, H_kv, D), pools; (T, H, D)."""
        options = {"window": window, "soft_cap": soft_cap}
        count = step.num_decodes
        if count:
            inputs = q[:count], keys, values, step.tables, step.lens
            decoded, _ = paged_attention_kernel(*inputs, scale, **options)
            if count == len(q):
                return decoded
        out = torch.zeros_like(q)
        if count:
            out[:count] = decoded
        for part in step.segments:
            length, first = part.num_tokens, part.num_tokens - (part.end - part.start)
            if first == 0:  # the whole sequence is here, contiguous
                context = k[None, part.start : part.end], v[None, part.start : part.end]
            else:
                context = (gather_blocks(pool, part.table)[:, :length] for pool in (keys, values))
            key, value = context
            for start in range(part.start, part.end, QUERIES_AT_ONCE):
                queries = q[None, start : min(start + QUERIES_AT_ONCE, part.end)]
                seen = first + start - part.start + queries.shape[1]
                seen_by = causal_mask(queries.shape[1], seen, device=q.device, window=window)
                context = key[:, :seen], value[:, :seen]
                attended, _ = attention(queries, *context, seen_by, scale, soft_cap=soft_cap)
                out[start : start + queries.shape[1]] = attended[0]
        return out


class OneRowCache(BlockCache):
    """For forwards whose tokens, of many sequences, are all in one row: who runs one says
    beforehand where they go, in `next_step`."""

    next_step: Step | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # of the row; positions are given

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def make_step(self, key: torch.Tensor, mask: torch.Tensor | None) -> Step:
        step, self.next_step = self.next_step, None
        return step


def decode_part(tables: list[list[int]], lens: list[int], device) -> tuple:
    """Padded block tables and lengths of sequences that compute one token each, for a Step."""
    padded = pad_block_tables(tables, device)
    return padded, torch.tensor(lens, dtype=torch.int64, device=device), tuple(lens)


def attend(module: nn.Module, query, key, value, attention_mask, scaling=None, **options):
    """The attention function that layers call: (B, T, H, D), and no weights."""
    mark = getattr(key, "block_cache", None)
    if mark is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs without its paged cache: give it one, or "
            "model.set_attn_implementation('sdpa')"
        )
    window, soft_cap = options.pop("sliding_window", None), options.pop("softcap", None)
    window = getattr(attention_mask, "window", window)
    check_call(module, options)
    cache, layer = mark
    names = {"scale": scaling, "window": window, "soft_cap": soft_cap}
    return cache.attend(layer, query, key, value, attention_mask, **names), None


def padding_mask(
    *, batch_size, kv_length, mask_function, device, attention_mask=None, use_vmap=False, **sizes
):
    """The mask function: which tokens are no padding (B, tokens), with the layer's window as its
    `window`. Causality is known; the window that some models hand to attention is not always
    that of their masks, and these are what transformers' own attention goes by."""
    if use_vmap or mask_function.__name__ not in ("causal_mask_function", "and_mask"):
        raise UnsupportedModelError("its mask is not a causal one, with or without a window")
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    mask = attention_mask.view_as(attention_mask)  # the same may serve layers of another window
    mask.window = sizes.get("local_size")
    return mask
