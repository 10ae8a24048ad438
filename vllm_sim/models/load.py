"""A model by the name of a preset or by its config.json: what it takes to size it.

Reproduces: section 6.1's models as presets (paper.MODELS); others come from the configuration
that Hugging Face publishes with each. What cannot be sized is refused by name.

    model = load_model("opt-13b")
    model = load_model("Mixtral-8x7B/config.json")
    model.decoder.weights().total, model.weight_bytes(16), model.decoder.slot_elements
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePath

from vllm_sim import paper
from vllm_sim.models import families
from vllm_sim.models.config_file import Config, ConfigError, Quantisation, quantisation, read_config
from vllm_sim.models.decoder import Decoder

FAMILIES = families.FAMILIES
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


@dataclass(frozen=True)
class Model:
    """A decoder, how its checkpoint is stored, and what else its GPUs must hold."""

    decoder: Decoder
    quantisation: Quantisation | None = None
    vision_params: int = 0  # of an image encoder, about: its matrices alone, 16 bits each
    preset: paper.ModelConfig | None = None

    @property
    def name(self) -> str:
        return self.decoder.name

    def weight_bytes(self, matrix_bits: int, num_gpus: int = 1) -> int:
        """Bytes of the weights on one of `num_gpus` GPUs (tensor parallelism), rounded up.

        `matrix_bits` is 16, or 8 for matrices in fp8 (`--dtype`); embeddings, norms, biases and
        routers stay in 16 bits, as serving systems keep them. A quantised checkpoint has what its
        configuration says. Matrices are split; what is small is on every GPU; K/V projections are
        split as far as there are heads.
        """
        w = self.decoder.weights()
        dense_bytes = routed_bytes = matrix_bits / 8
        if self.quantisation:
            routed_bytes = self.quantisation.bytes_per_param
            dense_bytes = 2.0 if self.quantisation.experts_only else routed_bytes
        kv_parts = min(num_gpus, self.decoder.num_kv_heads)
        split = (w.attention + w.feed_forward) / num_gpus + w.kv_projection / kv_parts
        total = (split + w.latent) * dense_bytes + w.experts / num_gpus * routed_bytes
        total += 2 * (w.embeddings / num_gpus + w.other + self.vision_params)
        return int(-(-total // 1))


def load_model(name: str) -> Model:
    """A preset, or the model of a config.json (or of the folder that holds one).

    Raises ConfigError: no such preset or file, a file that is no configuration, an architecture
    that cannot be sized, a key that is missing or no number.
    """
    if name in paper.MODELS:
        return _preset(paper.MODELS[name])
    path = os.path.join(name, "config.json") if os.path.isdir(name) else name
    if not os.path.exists(path):
        if path != name:
            raise ConfigError(f"{name}: a folder without a config.json")
        raise ConfigError(f"no model {name!a}: neither a file nor one of {', '.join(paper.MODELS)}")
    return model_of(read_config(path), _name_of(path))


def _preset(preset: paper.ModelConfig) -> Model:
    opt = preset.family == "opt"
    decoder = Decoder(
        preset.name,
        preset.family,
        preset.hidden_size,
        preset.num_layers,
        preset.num_heads,
        preset.num_kv_heads,
        preset.head_size,
        preset.ffn_size,
        preset.vocab_size,
        preset.max_positions,
        tied=opt,
        gated=not opt,
        norm_vectors=1 + opt,
        qkv_bias=opt,
        output_bias=opt,
        ffn_bias=opt,
        position_rows=preset.max_positions + 2 if opt else 0,
    )
    return Model(decoder, preset=preset)


def _name_of(path: str) -> str:
    """The folder's name for a file called config.json, else the file's."""
    pure = PurePath(path)
    if pure.name == "config.json":
        pure = PurePath(os.path.realpath(path)).parent
        return ascii(pure.name)[1:-1] or "config.json"
    return ascii(pure.stem)[1:-1]


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
    decoder = FAMILIES[family](text, name)
    stored = quantisation(config) or (quantisation(text) if text is not config else None)
    # The wrapper's own flag decides whether the output head is the input embedding.
    if text is not config and config.has("tie_word_embeddings"):
        decoder = _replaced(decoder, tied=config.flag("tie_word_embeddings", True))
    return Model(_replaced(decoder, notes=decoder.notes + notes), stored, vision)


def _replaced(decoder: Decoder, **changes: object) -> Decoder:
    return Decoder(**(vars(decoder) | changes))


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
