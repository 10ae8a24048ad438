"""What the families of models have in common in a config.json: dimensions, and sliding windows.

Reproduces nothing of the paper. Used by model_families.py and expert_families.py, which say what
differs; a key that a configuration may leave out has the default of the transformers library's
class, all others are required.

    found = rotary(config, "Mistral-7B")
    layer_windows(config, found["num_layers"], config.optional("sliding_window"), all_layers)
"""

from __future__ import annotations

from collections.abc import Callable

from config_file import Config
from decoder import Decoder

MAX_LAYERS = 10_000
Windows = tuple[int | None, ...]


def dimensions(config: Config, name: str, **defaults: int) -> dict:
    """What nearly every configuration says under the same names. `defaults` by key."""

    def count(key: str, *others: str) -> int:
        return config.count(key, *others, default=defaults.get(key))

    hidden = count("hidden_size", "n_embd", "n_embed")
    heads = count("num_attention_heads", "n_head")
    head_size = config.optional("head_dim") or defaults.get("head_dim")
    if head_size is None:
        if hidden % heads:
            raise config.fail(
                f"has no head_dim, and hidden_size {hidden} is no multiple of {heads} heads"
            )
        head_size = hidden // heads
    num_layers = count("num_hidden_layers", "n_layer")
    if num_layers > MAX_LAYERS:
        raise config.fail(f"{num_layers} layers are more than {MAX_LAYERS}")
    return {
        "name": name,
        "family": config.text("model_type"),
        "hidden_size": hidden,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": config.optional("num_key_value_heads", "num_kv_heads")
        or defaults.get("num_key_value_heads", heads),
        "head_size": head_size,
        "vocab_size": count("vocab_size"),
    }


def make_decoder(config: Config, **values: object) -> Decoder:
    try:
        return Decoder(**values)
    except ValueError as error:
        raise config.fail(str(error)) from None


def rotary(config: Config, name: str, tied: bool = False, **defaults: int) -> dict:
    """Dimensions of a model with rotary positions and gated feed-forward layers."""
    found = dimensions(config, name, **defaults)
    found["ffn_size"] = config.count("intermediate_size", default=defaults.get("intermediate_size"))
    found["max_len"] = config.count(
        "max_position_embeddings", default=defaults.get("max_position_embeddings")
    )
    found["tied"] = config.flag("tie_word_embeddings", tied)
    return found


def layer_windows(config: Config, num_layers: int, window: int | None, slides: Callable) -> Windows:
    """The window of each layer: as `layer_types` says, else where `slides(index)`."""
    types = config.list("layer_types")
    if types and len(types) != num_layers:
        raise config.fail(f"{len(types)} layer_types for {num_layers} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.fail(f"layer_types has {str(kind)[:40]!a}, which cannot be sized")
    sliding = [kind == "sliding_attention" for kind in types] or [
        bool(slides(index)) for index in range(num_layers)
    ]
    if window is None and types and any(sliding):
        raise config.fail("has sliding layers in layer_types, but no sliding_window")
    if window is None or not any(sliding):
        return ()
    return tuple(window if slide else None for slide in sliding)


def all_layers(index: int) -> bool:
    return True


def every_other(index: int) -> bool:
    return index % 2 == 0


def late_layers(config: Config) -> tuple[int | None, Callable]:
    """Qwen's: `use_sliding_window`, from layer `max_window_layers` on."""
    if not config.flag("use_sliding_window", False):
        return None, all_layers
    first = config.count("max_window_layers", default=28, least=0)
    return config.optional("sliding_window"), lambda index: index >= first
