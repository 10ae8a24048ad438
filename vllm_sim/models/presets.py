"""Models by name: the paper's and ten of today as presets, any other by its config.json.

Reproduces: section 6.1's models and the GPUs that they run on. Presets need no library; what
presets.json holds of today's is what transformers_model.py reads from their configurations, which a
test checks (`tests/models/test_presets.py`), and `tools/make_presets.py` writes.

    model = load_model("opt-13b")
    model = load_model("Mixtral-8x7B/config.json")
    DEPLOYMENTS["opt-66b"].gpu, DEPLOYMENTS["opt-66b"].num_gpus
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath

from vllm_sim import paper
from vllm_sim.models.config_file import ConfigError, read_config
from vllm_sim.models.gpus import GPUS
from vllm_sim.models.memory_plan import Deployment
from vllm_sim.models.model import (
    EMBEDDING,
    FULL,
    HEAD,
    KV,
    MATRIX,
    OTHER,
    Layers,
    Model,
    Weights,
)
from vllm_sim.models.quantisation import read_quantisation
from vllm_sim.models.transformers_model import HATCH, read_model
from vllm_sim.reporting.files import short_name


def opt(
    name: str,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    *,
    ffn_size: int | None = None,
    vocab_size: int = 50_272,
    max_len: int = 2048,
) -> Model:
    """A model of the OPT family: biases, layer norms, learned positions, a tied head."""
    h, ffn = hidden_size, ffn_size or 4 * hidden_size
    small = num_layers * (2 * 2 * h + 3 * h + h + ffn + h) + (max_len + 2) * h + 2 * h
    weights = {MATRIX: num_layers * (2 * h * h + 2 * h * ffn), KV: num_layers * 2 * h * h}
    weights |= {EMBEDDING: vocab_size * h, OTHER: small}
    found = tuple(Weights(role, count) for role, count in weights.items())
    sizes = num_layers, h, num_heads, num_heads, h // num_heads, vocab_size, max_len
    return Model(name, "opt", *sizes, widest=max(3 * h, ffn), weights=found)


def _llama_13b() -> Model:
    """LLaMA-13B: gated feed-forward layers, RMS norms, rotary positions, a head of its own."""
    layers, h, ffn, vocab = 40, 5120, 13_824, 32_000
    weights = {MATRIX: layers * (2 * h * h + 3 * h * ffn), KV: layers * 2 * h * h}
    weights |= {EMBEDDING: vocab * h, HEAD: vocab * h, OTHER: (2 * layers + 1) * h}
    found = tuple(Weights(role, count) for role, count in weights.items())
    sizes = layers, h, 40, 40, 128, vocab, 2048
    return Model("llama-13b", "llama", *sizes, widest=2 * ffn, weights=found, tied=False)


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
        _llama_13b(),
    )
}


def from_json(values: Mapping) -> Model:
    """A model as `dataclasses.asdict` writes it."""
    lists = {"layers": Layers, "weights": Weights}
    parts = {key: tuple(kind(**one) for one in values[key]) for key, kind in lists.items()}
    return Model(**{**values, **parts, "notes": tuple(values["notes"])})


TODAYS = {
    model.name: model
    for model in map(
        from_json,
        json.loads(Path(__file__).with_name("presets.json").read_text(encoding="ascii")),
    )
}
PRESETS = MODELS | TODAYS
SAYS_QUANTISED = re.compile(r"nvfp4|mxfp4|fp8|int4|int8|awq|gptq|w4a16|w8a8|4bit|8bit")
DEPLOYMENTS = {
    name: Deployment(MODELS[name], GPUS[gpu], num_gpus)
    for name, (gpu, num_gpus) in paper.RUNS_ON.items()
}


def load_model(name: str, weight_bits: float | None = None) -> Model:
    """A preset, or the model of a config.json (or of the folder that holds one), whose matrices
    have `weight_bits` bits a weight, if given, whatever the configuration says.

    Raises ConfigError: no such preset or file, a file that is no configuration, an architecture
    that cannot be sized, a quantisation that does not say how many bits.
    """
    if name in PRESETS:
        model = PRESETS[name]
        return model if weight_bits is None else with_bits(model, weight_bits)
    path = os.path.join(name, "config.json") if os.path.isdir(name) else name
    if not os.path.exists(path):
        if path != name:
            raise ConfigError(f"{name}: a folder without a config.json")
        raise ConfigError(
            f"no model {name!a}: neither a file nor one of {', '.join(PRESETS)}; {HATCH}"
        )
    config = read_config(path)
    beside = os.path.join(os.path.dirname(path), "hf_quant_config.json")
    stored = None
    if weight_bits is None:
        folder = PurePath(path).name == "config.json" and os.path.exists(beside)
        stored = read_quantisation(config, read_config(beside) if folder else None)
        text = next((k for k in ("text_config", "language_config") if config.has(k)), None)
        if stored is None and text:
            stored = read_quantisation(config.section(text))
    model = read_model(config, _name_of(path), stored)
    said = SAYS_QUANTISED.search(model.name.lower())
    if said and stored is None and weight_bits is None:
        told = f"its name says {said[0]}, its configuration states no quantisation: is "
        told += "hf_quant_config.json missing? else give --weight-bits"
        model = replace(model, notes=(*model.notes, told))
    return model if weight_bits is None else with_bits(model, weight_bits)


def with_bits(model: Model, bits: float) -> Model:
    """The model with so many bits for each weight of its matrices, as it was asked for."""
    return replace(model.with_matrix_bits(bits), quantisation=f"{bits:g}-bit", kv_dtype="")


GIVEN = "given"  # the family of a model of which only the sizes are known


def given_model(name: str, kv_bytes_per_token: int, weights_gib: float, num_layers: int) -> Model:
    """A model of which only its sizes are known: bytes that it keeps of a token, in elements of one
    byte, and GiB of its weights, on all GPUs together. ValueError if layers cannot share them."""
    if kv_bytes_per_token % num_layers:
        raise ValueError(f"{kv_bytes_per_token} bytes a token are not those of {num_layers} layers")
    elements = kv_bytes_per_token // num_layers
    layers = Layers(num_layers, FULL, elements, kv_heads=elements)
    sizes = num_layers, 8192, 0, 1, 1, 150_000, None
    weights = (Weights(MATRIX, int(weights_gib * paper.GIB / 2)),)
    notes = ("activations are those of a hidden size of 8,192 and a vocabulary of 150,000",)
    return Model(name, GIVEN, *sizes, layers=(layers,), weights=weights, notes=notes)


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
