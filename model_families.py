"""Dense models by the `model_type` of their config.json: what their layers are made of.

Reproduces nothing of the paper, whose OPT and LLaMA are families like others here. Each function
reads what its family's configuration says and returns a `Decoder`; expert_families.py has the
mixtures of experts.

    FAMILIES["llama"](read_config("config.json"), "Llama-3-8B")
"""

from __future__ import annotations

from collections.abc import Callable

from config_file import Config
from decoder import Decoder
from family_fields import (
    all_layers,
    dimensions,
    every_other,
    late_layers,
    layer_windows,
    make_decoder,
    rotary,
)


def _opt(config: Config, name: str) -> Decoder:
    found = dimensions(config, name)
    bias = config.flag("enable_bias", True)
    if not config.flag("layer_norm_elementwise_affine", True):
        raise config.fail("layer_norm_elementwise_affine false cannot be sized")
    positions = config.count("max_position_embeddings")
    final = config.flag("do_layer_norm_before", True)
    return make_decoder(
        config, **found, ffn_size=config.count("ffn_dim"), max_len=positions,
        tied=config.flag("tie_word_embeddings", True), gated=False, norm_vectors=2,
        final_norm=final and not config.flag("_remove_final_layer_norm", False),
        qkv_bias=bias, output_bias=bias, ffn_bias=bias,
        position_rows=positions + 2,  # the table starts with two rows that no token uses
        embedding_size=config.optional("word_embed_proj_dim"),
    )  # fmt: skip


def _gpt2(config: Config, name: str) -> Decoder:
    found = dimensions(config, name)
    positions = config.count("n_positions", "n_ctx", "max_position_embeddings")
    return make_decoder(
        config, **found, ffn_size=config.count("n_inner", default=4 * found["hidden_size"]),
        max_len=positions, tied=config.flag("tie_word_embeddings", True), gated=False,
        norm_vectors=2, qkv_bias=True, output_bias=True, ffn_bias=True, position_rows=positions,
    )  # fmt: skip


def _gpt_neox(config: Config, name: str) -> Decoder:
    bias = config.flag("attention_bias", True)
    return make_decoder(config, **rotary(config, name), gated=False, norm_vectors=2, qkv_bias=bias,
                    output_bias=bias, ffn_bias=True)  # fmt: skip


def _bloom(config: Config, name: str) -> Decoder:
    found = dimensions(config, name)
    return make_decoder(
        config, **found, ffn_size=4 * found["hidden_size"], max_len=config.optional("seq_length"),
        tied=config.flag("tie_word_embeddings", True), gated=False, norm_vectors=2,
        embedding_norm=True, qkv_bias=True, output_bias=True, ffn_bias=True,
    )  # fmt: skip


def _falcon(config: Config, name: str) -> Decoder:
    found = dimensions(config, name)
    new = config.flag("new_decoder_architecture", False)
    if new:
        kv_heads = config.count("num_kv_heads", "n_head_kv", default=found["num_heads"])
    else:
        kv_heads = 1 if config.flag("multi_query", True) else found["num_heads"]
    one_norm = config.flag("parallel_attn", True) and not new
    norms = config.count("num_ln_in_parallel_attn", default=2) if new else 2 - one_norm
    bias = config.flag("bias", False)
    # A configuration without positions is of a rotary model with the class's 2048, or of ALiBi.
    positions = config.count("max_position_embeddings", default=2048)
    return make_decoder(
        config, **(found | {"num_kv_heads": kv_heads}),
        ffn_size=config.count("ffn_hidden_size", default=4 * found["hidden_size"]),
        max_len=positions, tied=config.flag("tie_word_embeddings", True), gated=False,
        norm_vectors=2, norms_per_layer=norms, qkv_bias=bias, output_bias=bias, ffn_bias=bias,
    )  # fmt: skip


def _llama(config: Config, name: str) -> Decoder:
    bias = config.flag("attention_bias", False)
    return make_decoder(config, **rotary(config, name), qkv_bias=bias, output_bias=bias,
                    ffn_bias=config.flag("mlp_bias", False))  # fmt: skip


def _mistral(config: Config, name: str) -> Decoder:
    found = rotary(config, name)
    windows = layer_windows(
        config, found["num_layers"], config.optional("sliding_window"), all_layers
    )
    return make_decoder(config, **found, windows=windows)


def _qwen2(config: Config, name: str) -> Decoder:
    found = rotary(config, name)
    windows = layer_windows(config, found["num_layers"], *late_layers(config))
    return make_decoder(config, **found, windows=windows, qkv_bias=True)


def _qwen3(config: Config, name: str) -> Decoder:
    found = rotary(config, name, head_dim=128)
    bias = config.flag("attention_bias", False)
    windows = layer_windows(config, found["num_layers"], *late_layers(config))
    return make_decoder(config, **found, windows=windows, qkv_bias=bias, output_bias=bias,
                    head_norms=True)  # fmt: skip


def _gemma(config: Config, name: str) -> Decoder:
    bias = config.flag("attention_bias", False)
    found = rotary(config, name, tied=True, head_dim=256)
    return make_decoder(config, **found, qkv_bias=bias, output_bias=bias)


def _gemma2(config: Config, name: str) -> Decoder:
    bias = config.flag("attention_bias", False)
    found = rotary(config, name, tied=True, head_dim=256)
    window = config.count("sliding_window", default=4096)
    windows = layer_windows(config, found["num_layers"], window, every_other)
    return make_decoder(config, **found, windows=windows, qkv_bias=bias, output_bias=bias,
                    norms_per_layer=4)  # fmt: skip


def _gemma3(config: Config, name: str) -> Decoder:
    # The published multimodal configurations leave these out where the class has them.
    class_defaults = {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "vocab_size": 262_208, "max_position_embeddings": 131_072,
    }  # fmt: skip
    bias = config.flag("attention_bias", False)
    found = rotary(config, name, tied=True, **class_defaults)
    pattern = config.count("sliding_window_pattern", "_sliding_window_pattern", default=6)
    window = config.count("sliding_window", default=4096)
    windows = layer_windows(
        config, found["num_layers"], window, lambda index: (index + 1) % pattern
    )
    missing = [key for key in class_defaults if not config.has(key)]
    notes = (f"class defaults for {', '.join(missing)}",) if missing else ()
    return make_decoder(config, **found, windows=windows, qkv_bias=bias, output_bias=bias,
                    norms_per_layer=4, head_norms=True, notes=notes)  # fmt: skip


FAMILIES: dict[str, Callable[[Config, str], Decoder]] = {
    "opt": _opt, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "bloom": _bloom, "falcon": _falcon,
    "llama": _llama, "mistral": _mistral, "phi3": _mistral, "qwen2": _qwen2, "qwen3": _qwen3,
    "gemma": _gemma, "gemma2": _gemma2, "gemma3": _gemma3, "gemma3_text": _gemma3,
}  # fmt: skip
