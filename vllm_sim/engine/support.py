"""Which of transformers' models can run on blocks, and which cannot and why.

Reproduces nothing: it refuses, by name and before a token is generated, a model whose attention is
not that of section 2.1 of the paper: causal, over K and V of one head size, stored layer by layer.

    check_model(model)                      # UnsupportedModelError, or nothing
    window = window_of(model.config)        # of its layers, or of some
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

LAYER_TYPES = {"full_attention", "sliding_attention"}
# Tensors that models hand to attention although it needs none of them.
HARMLESS = {"position_ids", "cache_position", "attention_mask"}


class UnsupportedModelError(ValueError):
    """A model, or a call of one, that the paged cache cannot serve."""


def check_config(config: PretrainedConfig) -> None:
    """UnsupportedModelError for what the configuration alone shows."""
    text = config.get_text_config(decoder=True)
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} has an encoder: its cross-attention has no blocks")
    others = sorted({*(getattr(text, "layer_types", None) or ())} - LAYER_TYPES)
    if others:
        raise UnsupportedModelError(f"{name} has layers of {', '.join(others)}")
    if getattr(text, "attention_chunk_size", None):
        raise UnsupportedModelError(f"{name} attends in chunks")
    if getattr(text, "num_kv_shared_layers", None):
        raise UnsupportedModelError(f"{name} has layers that share their K and V")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{name} stores latent vectors (MLA) in place of K and V")
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):
        if isinstance(rope, Mapping) and rope.get("rope_type") in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{name} has {rope['rope_type']} positions: they depend on the longest of a batch"
            )
    if getattr(text, "num_layers_per_stack", None):
        raise UnsupportedModelError(f"{name} runs its layers several times a token")
    try:
        sizes = heads(config)
    except Exception:  # versions raise their own where each layer has another
        sizes = (None,)
    sizes += getattr(text, "num_hidden_layers", None), getattr(text, "vocab_size", None)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UnsupportedModelError(f"{name} has not one number of heads, one head size")


def check_model(model: PreTrainedModel) -> None:
    """The same, and for what only its modules show."""
    check_config(model.config)
    name = model.config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name} lets no other attention be put in")
    if any(part.endswith("sinks") for part, _ in model.named_parameters()):
        raise UnsupportedModelError(f"{name} has attention sinks")
    if not all(getattr(part, "is_causal", True) for part in model.modules()):
        raise UnsupportedModelError(f"{name} has attention that is not causal")


def window_of(config: PretrainedConfig) -> int | None:
    """The sliding window in tokens that some layer has, or None."""
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    if types and "sliding_attention" not in types:
        return None
    return getattr(text, "sliding_window", None)


def heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, K/V heads, head size."""
    text = config.get_text_config(decoder=True)
    num_heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return num_heads, getattr(text, "num_key_value_heads", None) or num_heads, head_size


def check_call(module: nn.Module, options: Mapping[str, object]) -> None:
    """UnsupportedModelError if a layer asks its attention for something it does not do."""
    where = type(module).__name__
    if options.get("dropout"):
        raise UnsupportedModelError(f"{where} drops out: call model.eval() first")
    for name, value in options.items():
        if hasattr(value, "dtype") and name not in HARMLESS:
            raise UnsupportedModelError(f"{where} wants attention with {name}")
