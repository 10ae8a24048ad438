"""Models by name: the paper's as presets, others by their config.json.

Reproduces: section 6.1's models and the GPUs that they run on. What cannot be sized is refused by
name.

    model = load_model("opt-13b")
    model = load_model("Mixtral-8x7B/config.json")
    DEPLOYMENTS["opt-66b"].gpu, DEPLOYMENTS["opt-66b"].num_gpus
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import PurePath

from vllm_sim import paper
from vllm_sim.models.config_file import Config, ConfigError, quantisation, read_config
from vllm_sim.models.families import FAMILIES
from vllm_sim.models.gpus import GPUS
from vllm_sim.models.memory_plan import Deployment
from vllm_sim.models.model import Model
from vllm_sim.reporting.files import short_name


def opt(name: str, num_layers: int, hidden_size: int, num_heads: int, **sizes: int) -> Model:
    """A model of the OPT family. `sizes` (ffn_size, vocab_size, max_len) replace the family's."""
    values = {"model_type": "opt", "num_hidden_layers": num_layers, "hidden_size": hidden_size}
    values |= {"num_attention_heads": num_heads, "ffn_dim": sizes.get("ffn_size", 4 * hidden_size)}
    values |= {"vocab_size": sizes.get("vocab_size", 50_272)}
    values |= {"max_position_embeddings": sizes.get("max_len", 2048)}
    return FAMILIES["opt"](Config(name, values), name)


MODELS = {
    model.name: model
    for model in (
        # The three below are not in the paper: real OPT models for users with less memory.
        opt("opt-125m", 12, 768, 12),
        opt("opt-1.3b", 24, 2048, 32),
        opt("opt-6.7b", 32, 4096, 32),
        # The paper's (Sec. 6.1); LLaMA-13B appears in Sec. 6.4 only.
        opt("opt-13b", 40, 5120, 40),
        opt("opt-66b", 64, 9216, 72),
        opt("opt-175b", 96, 12288, 96),
        Model("llama-13b", "llama", 40, 5120, 40, 40, 128, 13_824, 32_000, 2048, tied=False),
    )
}
DEPLOYMENTS = {
    name: Deployment(MODELS[name], GPUS[gpu], num_gpus)
    for name, (gpu, num_gpus) in paper.RUNS_ON.items()
}
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp16"}  # as servers load them
# Why the best known of the others are not sized; anything else is refused as unknown.
NO_PLAIN_CACHE = {
    "mamba": "a state-space model has no K/V cache",
    "mamba2": "a state-space model has no K/V cache",
    "falcon_mamba": "a state-space model has no K/V cache",
    "rwkv": "a recurrent model has no K/V cache",
    "jamba": "state-space layers among its attention layers",
    "bamba": "state-space layers among its attention layers",
    "recurrent_gemma": "recurrent layers among its attention layers",
    "qwen3_next": "linear-attention layers among its attention layers",
    "t5": "an encoder-decoder, not a decoder",
    "bert": "an encoder, which has no K/V cache",
}


def load_model(name: str) -> Model:
    """A preset, or the model of a config.json (or of the folder that holds one).

    Raises ConfigError: no such preset or file, a file that is no configuration, an architecture
    that cannot be sized, a key that is missing or no number.
    """
    if name in MODELS:
        return MODELS[name]
    path = os.path.join(name, "config.json") if os.path.isdir(name) else name
    if not os.path.exists(path):
        if path != name:
            raise ConfigError(f"{name}: a folder without a config.json")
        raise ConfigError(f"no model {name!a}: neither a file nor one of {', '.join(MODELS)}")
    return model_of(read_config(path), _name_of(path))


def is_preset(model: Model) -> bool:
    """Whether a model is one of MODELS itself, not of a configuration that says the same."""
    return MODELS.get(model.name) is model


def _name_of(path: str) -> str:
    """The folder's name for a file called config.json, else the file's."""
    pure = PurePath(path)
    if pure.name == "config.json":
        pure = PurePath(os.path.realpath(path)).parent
        return ascii(pure.name)[1:-1] or "config.json"
    return short_name(path.removesuffix(pure.suffix))


def model_of(config: Config, name: str) -> Model:
    """The model that a configuration describes. Raises ConfigError."""
    text, vision = config, 0
    notes: tuple[str, ...] = ()
    for key in ("text_config", "language_config", "llm_config"):
        if config.has(key):
            text = config.section(key)
            vision, notes = _vision(config)
            break
    if not text.text("model_type") and text is not config:
        raise text.fail("has no model_type, so its architecture is not known")
    family = text.text("model_type")
    if family not in FAMILIES:
        raise text.fail(_why_not(text, family))
    model = FAMILIES[family](text, name)
    stored = quantisation(config) or (quantisation(text) if text is not config else None)
    # The wrapper's own flag decides whether the output head is the input embedding.
    if text is not config and config.has("tie_word_embeddings"):
        model = replace(model, tied=config.flag("tie_word_embeddings", True))
    dtypes = [one.values.get(key) for one in (text, config) for key in ("dtype", "torch_dtype")]
    dtype = next((name for name in dtypes if isinstance(name, str)), "")
    if dtype == "float32":
        notes += ("its weights are stored in 32 bits and counted in 16, as servers load them",)
    told = {"notes": model.notes + notes, "dtype": DTYPES.get(dtype, "")}
    return replace(model, **told, quantisation=stored, vision_params=vision)


def _why_not(config: Config, family: str) -> str:
    known = ", ".join(FAMILIES)
    if not family:
        classes = config.list("architectures")
        named = f" (architectures {', '.join(map(str, classes))[:60]!a})" if classes else ""
        return f"has no model_type{named}; known are {known}"
    if family in NO_PLAIN_CACHE:
        return f"model_type {family} cannot be sized: {NO_PLAIN_CACHE[family]}"
    return f"model_type {family[:40]!a} is not one that can be sized; known are {known}"


def _vision(config: Config) -> tuple[int, tuple[str, ...]]:
    """Parameters of an image encoder, about, from its matrices; 0 where it does not say."""
    vision = config.section("vision_config")
    if vision is None:
        return 0, ("only the text model is counted",)
    hidden = vision.optional("hidden_size", "embed_dim")
    layers = vision.optional("num_hidden_layers", "depth")
    ffn = vision.optional("intermediate_size")
    if not (hidden and layers and ffn):
        return 0, ("the image encoder is not counted: its configuration does not size it",)
    count = layers * (4 * hidden * hidden + 2 * hidden * ffn)
    return count, (f"the image encoder's {count / 1e6:,.0f} M parameters are about (2 %)",)
