"""Mixtures of experts by the `model_type` of their config.json: all experts count for memory.

Reproduces nothing of the paper. As model_families.py, for the models whose feed-forward layers are
experts that a router chooses from; DeepSeek's are among them with their latent cache (MLA).

    FAMILIES["mixtral"](read_config("config.json"), "Mixtral-8x7B")
"""

from __future__ import annotations

from collections.abc import Callable

from config_file import Config
from decoder import Decoder, Experts, Latent
from family_fields import (
    all_layers,
    every_other,
    late_layers,
    layer_windows,
    make_decoder,
    rotary,
)


def _mixtral(config: Config, name: str) -> Decoder:
    found = rotary(config, name)
    windows = layer_windows(
        config, found["num_layers"], config.optional("sliding_window"), all_layers
    )
    experts = Experts(
        found["num_layers"],
        config.count("num_local_experts"),
        config.count("num_experts_per_tok"),
        found["ffn_size"],
    )
    return make_decoder(config, **found, windows=windows, experts=experts)


def _sparse_layers(config: Config, num_layers: int) -> int:
    """Qwen's: every `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers`."""
    step = config.count("decoder_sparse_step", default=1)
    dense = config.list("mlp_only_layers")
    return sum(i not in dense and (i + 1) % step == 0 for i in range(num_layers))


def _routed(config: Config, num_layers: int) -> tuple[int, int, int, int]:
    """Qwen's: layers with experts, experts of one, how many a token takes, and their width."""
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    return _sparse_layers(config, num_layers), *(config.count(name) for name in names)


def _qwen2_moe(config: Config, name: str) -> Decoder:
    found = rotary(config, name)
    experts = Experts(
        *_routed(config, found["num_layers"]),
        config.count("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    windows = layer_windows(config, found["num_layers"], *late_layers(config))
    return make_decoder(config, **found, windows=windows, qkv_bias=True, experts=experts)


def _qwen3_moe(config: Config, name: str) -> Decoder:
    found = rotary(config, name)
    experts = Experts(
        *_routed(config, found["num_layers"]),
    )
    bias = config.flag("attention_bias", False)
    windows = layer_windows(config, found["num_layers"], *late_layers(config))
    return make_decoder(config, **found, windows=windows, qkv_bias=bias, output_bias=bias,
                    head_norms=True, experts=experts)  # fmt: skip


def _deepseek(config: Config, name: str) -> Decoder:
    """V2 and V3: a latent cache, dense layers first, then experts with shared ones."""
    for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
        config.count(key)  # named before anything else is asked for
    latent = Latent(
        config.count("kv_lora_rank"),
        config.count("qk_rope_head_dim"),
        config.count("qk_nope_head_dim"),
        config.count("v_head_dim"),
        config.optional("q_lora_rank"),
    )
    head_size = latent.nope_size + latent.rope_size
    found = rotary(config, name, head_dim=head_size)
    found |= {"head_size": head_size, "num_kv_heads": found["num_heads"]}
    experts = None
    if config.has("n_routed_experts"):
        first = config.count("first_k_dense_replace", default=0, least=0)
        step = config.count("moe_layer_freq", default=1)
        size = config.count("moe_intermediate_size")
        experts = Experts(
            sum(i >= first and i % step == 0 for i in range(found["num_layers"])),
            config.count("n_routed_experts"),
            config.count("num_experts_per_tok"),
            size,
            config.count("n_shared_experts", default=0, least=0) * size,
            router_bias=config.text("model_type") == "deepseek_v3",  # it balances the experts
        )
    notes = ()
    if config.optional("num_nextn_predict_layers", least=0):
        notes = ("the layers that predict further tokens (MTP) are not counted",)
    if config.flag("attention_bias", False):
        raise config.fail("attention_bias true cannot be sized with a latent cache")
    return make_decoder(config, **found, latent=latent, experts=experts, notes=notes)


def _gpt_oss(config: Config, name: str) -> Decoder:
    found = rotary(config, name)
    bias = config.flag("attention_bias", True)
    experts = Experts(
        found["num_layers"],
        config.count("num_local_experts"),
        config.count("num_experts_per_tok", "experts_per_token"),
        found["ffn_size"],
        router_bias=True,
        biases=True,
    )
    window = config.count("sliding_window", default=128)
    windows = layer_windows(config, found["num_layers"], window, every_other)
    return make_decoder(config, **found, windows=windows, experts=experts, qkv_bias=bias,
                    output_bias=bias, sinks=True)  # fmt: skip


FAMILIES: dict[str, Callable[[Config, str], Decoder]] = {
    "mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek, "deepseek_v3": _deepseek, "gpt_oss": _gpt_oss,
}  # fmt: skip
