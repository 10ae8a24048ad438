"""Models by the `model_type` of their config.json: what their layers are made of.

Reproduces nothing of the paper, whose OPT and LLaMA are families like others here. Each function
reads what its family's configuration says and returns a `Model`. A key that a configuration may
leave out has the default of the transformers library's class, all others are required. All experts
of a mixture count for memory; DeepSeek's have a latent cache (MLA).

    FAMILIES["llama"](read_config("config.json"), "Llama-3-8B")
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_sim.models.config_file import Config
from vllm_sim.models.model import Experts, Latent, Model

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


def make_model(config: Config, **values: object) -> Model:
    try:
        return Model(**values)
    except ValueError as error:
        raise config.fail(str(error)) from None


def layer_normed(config: Config, found: dict, bias: bool, **values: object) -> Model:
    """A model with layer norms, two feed-forward matrices, and biases everywhere or nowhere."""
    usual = {"tied": config.flag("tie_word_embeddings", True), "gated": False, "norm_vectors": 2}
    biases = dict.fromkeys(("qkv_bias", "output_bias", "ffn_bias"), bias)
    return make_model(config, **(usual | biases | found | values))


def rotary(
    config: Config, name: str, tied: bool = False, biased: bool | None = None, **defaults: int
) -> dict:
    """Dimensions of a model with rotary positions and gated feed-forward layers; with biases of
    attention where the family's `attention_bias`, by default `biased`, says so (None: has none)."""
    found = dimensions(config, name, **defaults)
    found["ffn_size"] = config.count("intermediate_size", default=defaults.get("intermediate_size"))
    found["max_len"] = config.count(
        "max_position_embeddings", default=defaults.get("max_position_embeddings")
    )
    found["tied"] = config.flag("tie_word_embeddings", tied)
    if biased is not None:
        found["qkv_bias"] = found["output_bias"] = config.flag("attention_bias", biased)
    return found


def windowed(
    config: Config, found: dict, window: int | None, slides: Callable = lambda index: True, **values
) -> Model:
    """A model whose layers have this window: as `layer_types` says, else where `slides(index)`."""
    windows = layer_windows(config, found["num_layers"], window, slides)
    return make_model(config, **found, windows=windows, **values)


def layer_windows(config: Config, num_layers: int, window: int | None, slides: Callable) -> Windows:
    """Of each layer; () if none has one."""
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


def every_other(index: int) -> bool:
    return index % 2 == 0


def late_windowed(config: Config, found: dict, **values: object) -> Model:
    """Qwen's: `use_sliding_window`, from layer `max_window_layers` on."""
    if not config.flag("use_sliding_window", False):
        return windowed(config, found, None, **values)
    first = config.count("max_window_layers", default=28, least=0)
    window = config.optional("sliding_window")
    return windowed(config, found, window, lambda index: index >= first, **values)


def _mixtral(config: Config, name: str) -> Model:
    found = rotary(config, name)
    names = ("num_local_experts", "num_experts_per_tok")
    experts = Experts(found["num_layers"], *map(config.count, names), found["ffn_size"])
    return windowed(config, found, config.optional("sliding_window"), experts=experts)


def _sparse_layers(config: Config, num_layers: int) -> int:
    """Qwen's: every `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers`."""
    step = config.count("decoder_sparse_step", default=1)
    dense = config.list("mlp_only_layers")
    return sum(i not in dense and (i + 1) % step == 0 for i in range(num_layers))


def _routed(config: Config, num_layers: int) -> tuple[int, int, int, int]:
    """Qwen's: layers with experts, experts of one, how many a token takes, and their width."""
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    return _sparse_layers(config, num_layers), *(config.count(name) for name in names)


def _qwen2_moe(config: Config, name: str) -> Model:
    found = rotary(config, name)
    experts = Experts(
        *_routed(config, found["num_layers"]),
        config.count("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    return late_windowed(config, found, qkv_bias=True, experts=experts)


def _qwen3_moe(config: Config, name: str) -> Model:
    found = rotary(config, name, biased=False)
    experts = Experts(*_routed(config, found["num_layers"]))
    return late_windowed(config, found, head_norms=True, experts=experts)


def _deepseek(config: Config, name: str) -> Model:
    """V2 and V3: a latent cache, dense layers first, then experts with shared ones."""
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    latent = Latent(*map(config.count, names), config.optional("q_lora_rank"))
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
    return make_model(config, **found, latent=latent, experts=experts, notes=notes)


def _gpt_oss(config: Config, name: str) -> Model:
    found = rotary(config, name, biased=True)
    experts = Experts(
        found["num_layers"],
        config.count("num_local_experts"),
        config.count("num_experts_per_tok", "experts_per_token"),
        found["ffn_size"],
        router_bias=True,
        biases=True,
    )
    window = config.count("sliding_window", default=128)
    return windowed(config, found, window, every_other, experts=experts, sinks=True)


def _opt(config: Config, name: str) -> Model:
    found = dimensions(config, name)
    bias = config.flag("enable_bias", True)
    if not config.flag("layer_norm_elementwise_affine", True):
        raise config.fail("layer_norm_elementwise_affine false cannot be sized")
    positions = config.count("max_position_embeddings")
    final = config.flag("do_layer_norm_before", True)
    return layer_normed(
        config,
        found,
        bias,
        ffn_size=config.count("ffn_dim"),
        max_len=positions,
        final_norm=final and not config.flag("_remove_final_layer_norm", False),
        position_rows=positions + 2,  # the table starts with two rows that no token uses
        embedding_size=config.optional("word_embed_proj_dim"),
    )


def _gpt2(config: Config, name: str) -> Model:
    found = dimensions(config, name)
    positions = config.count("n_positions", "n_ctx", "max_position_embeddings")
    ffn_size = config.count("n_inner", default=4 * found["hidden_size"])
    sizes = {"ffn_size": ffn_size, "max_len": positions, "position_rows": positions}
    return layer_normed(config, found, True, **sizes)


def _gpt_neox(config: Config, name: str) -> Model:
    return layer_normed(config, rotary(config, name, biased=True), True)


def _bloom(config: Config, name: str) -> Model:
    found = dimensions(config, name)
    sizes = {"ffn_size": 4 * found["hidden_size"], "max_len": config.optional("seq_length")}
    return layer_normed(config, found, True, **sizes, embedding_norm=True)


def _falcon(config: Config, name: str) -> Model:
    found = dimensions(config, name)
    new = config.flag("new_decoder_architecture", False)
    if new:
        kv_heads = config.count("num_kv_heads", "n_head_kv", default=found["num_heads"])
    else:
        kv_heads = 1 if config.flag("multi_query", True) else found["num_heads"]
    one_norm = config.flag("parallel_attn", True) and not new
    return layer_normed(
        config,
        found,
        config.flag("bias", False),
        num_kv_heads=kv_heads,
        ffn_size=config.count("ffn_hidden_size", default=4 * found["hidden_size"]),
        # A configuration without positions is of a rotary model with the class's, or of ALiBi.
        max_len=config.count("max_position_embeddings", default=2048),
        norms_per_layer=config.count("num_ln_in_parallel_attn", default=2) if new else 2 - one_norm,
    )


def _llama(config: Config, name: str) -> Model:
    found = rotary(config, name, biased=False)
    return make_model(config, **found, ffn_bias=config.flag("mlp_bias", False))


def _mistral(config: Config, name: str) -> Model:
    return windowed(config, rotary(config, name), config.optional("sliding_window"))


def _qwen2(config: Config, name: str) -> Model:
    return late_windowed(config, rotary(config, name), qkv_bias=True)


def _qwen3(config: Config, name: str) -> Model:
    return late_windowed(config, rotary(config, name, biased=False, head_dim=128), head_norms=True)


def _gemma(config: Config, name: str) -> Model:
    return make_model(config, **rotary(config, name, tied=True, biased=False, head_dim=256))


def _gemma2(config: Config, name: str) -> Model:
    found = rotary(config, name, tied=True, biased=False, head_dim=256)
    window = config.count("sliding_window", default=4096)
    return windowed(config, found, window, every_other, norms_per_layer=4)


def _gemma3(config: Config, name: str) -> Model:
    # The published multimodal configurations leave these out where the class has them.
    class_defaults = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    }
    found = rotary(config, name, tied=True, biased=False, **class_defaults)
    pattern = config.count("sliding_window_pattern", "_sliding_window_pattern", default=6)
    window = config.count("sliding_window", default=4096)
    missing = [key for key in class_defaults if not config.has(key)]
    notes = (f"class defaults for {', '.join(missing)}",) if missing else ()
    norms = {"norms_per_layer": 4, "head_norms": True}
    slides = lambda index: (index + 1) % pattern  # noqa: E731
    return windowed(config, found, window, slides, **norms, notes=notes)


FAMILIES: dict[str, Callable[[Config, str], Model]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "falcon": _falcon,
    "llama": _llama,
    "mistral": _mistral,
    "phi3": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
}
