"""Any model that the transformers library knows, sized by the library's own code for it.

Reproduces nothing: section 3's arithmetic, asked of the model itself. Its class comes from the
configuration and is built on the meta device (shapes, no memory, no weights); parameters are
counted, and what it keeps of a sequence is read off the cache that a forward pass leaves there,
layer by layer. Nothing is downloaded, and no code of a checkpoint is run.

    found = read_model(read_config("config.json"), "a name")        # ConfigError: why not

Needs requirements-models.txt; the presets do not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vllm_sim.models.config_file import MAX_COUNT, Config, ConfigError
from vllm_sim.models.model import (
    EMBEDDING,
    ENCODER,
    EXPERTS,
    FULL,
    HEAD,
    IN_LAYERS,
    KV,
    LATENT,
    MATRIX,
    NONE,
    OTHER,
    STATE,
    WHOLE,
    WINDOW,
    Layers,
    Model,
    Weights,
)
from vllm_sim.models.quantisation import Quantisation

if TYPE_CHECKING:
    import torch

INSTALL = "pip install -r requirements-models.txt"
HATCH = "--kv-bytes-per-token N --weights-gib X answers for anything"
MAX_LAYERS = 1000
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
# Tokens of a pass; where a layer keeps more than K, V and states, of two more, of which what grows
# with the length is told.
FEW, SHORT, LONG = 4, 128, 256
PLAIN = re.compile(r"\.\d+\.(keys|values|conv_states.*|recurrent_states.*|_sliding_window_tensor)")
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp16"}  # as servers load them
# Modules by the names that model code has for them.
ACTIVE_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
KV_NAMES = {"k_proj", "v_proj", "key", "value", "wk", "wv", "key_proj", "value_proj"}
FUSED_NAMES = {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "W_pack", "wqkv"}
WHOLE_NAMES = re.compile(r"_a_proj|(^|\.)indexer(s_proj)?(\.|$)|compressor")
ROUTERS = {"gate", "router", "classifier", "wg", "shared_expert_gate"}
LAST_NAMES = {"o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2"}
LAST_NAMES |= {"fc_out", "w2", "wo"}  # whose input is the layer's widest


def read_model(config: Config, name: str, stored: Quantisation | None = None) -> Model:
    """The model that a configuration describes, `stored` as its checkpoint says.

    Raises ConfigError: no such library, a type that it lacks, a configuration that it cannot build.
    """
    _check(config.values, config)
    try:
        import torch
        import transformers
    except ImportError:
        raise ConfigError(
            f"{config.where}: no transformers, which reads it: {INSTALL}; or {HATCH}"
        ) from None
    transformers.logging.set_verbosity(logging.CRITICAL)  # what is wrong with it is told below
    notes: list[str] = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        library, model = _build(config, notes)
        cache = _pass(config, model, FEW)
        more = ()
        if not all(map(PLAIN.fullmatch, _tensors([vars(c) for c in _get(cache, "layers") or ()]))):
            more = _pass(config, model, SHORT), _pass(config, model, LONG)
    text = library.get_text_config()
    layers = _layers(config, text, *(more or (cache, cache)))
    return _model(config, name, text, model, layers, stored, notes)


def _check(values: object, config: Config) -> None:
    """ConfigError for numbers that no model has: the library would build for hours."""
    if isinstance(values, dict):
        for key, value in values.items():
            number = isinstance(value, int) and not isinstance(value, bool)
            if number and abs(value) > MAX_COUNT and not key.startswith(("max_", "model_max")):
                raise config.fail(f"{key[:40]} must be up to {MAX_COUNT}")
            if key in LAYER_KEYS and number and not 0 <= value <= MAX_LAYERS:
                raise config.fail(f"{key} must be 1 to {MAX_LAYERS}, not {value}")
            _check(value, config)
    elif isinstance(values, list):
        for value in values:
            _check(value, config)


# ---- the library's model ------------------------------------------------------------------------


def _build(config: Config, notes: list[str]) -> tuple[object, torch.nn.Module]:
    """(configuration, model on the meta device) of the library."""
    import torch
    import transformers

    library, makers = _class_of(config, notes)
    problem = ""
    for maker in makers:
        try:
            with torch.device("meta"):
                model = maker(library)
        except Exception as error:  # whatever the library raises for what it cannot build
            problem = problem or _first_line(error)
        else:
            if maker is not makers[0]:
                notes.append(f"its encoders of images and audio are not counted: {problem}")
            return library, model.eval()
    kind = config.text("model_type")[:40]
    raise config.fail(
        f"model_type {kind!a}: transformers {transformers.__version__} cannot build it: {problem}; "
        f"{HATCH}"
    )


def _class_of(config: Config, notes: list[str]) -> tuple[object, list]:
    """The library's configuration, and what makes a model of it, best first.

    The class that the configuration names, with its encoders; else the one for its type; else its
    text model alone.
    """
    import torch
    import transformers

    kind = config.text("model_type")
    named = next((one for one in config.list("architectures") if isinstance(one, str)), "")
    known = transformers.CONFIG_MAPPING
    values = {
        k: v for k, v in config.values.items() if k not in ("quantization_config", "auto_map")
    }
    own = getattr(transformers, named, None) if named.isidentifier() else None
    own = own if isinstance(own, type) and issubclass(own, transformers.PreTrainedModel) else None
    if kind in known:
        made = known[kind]
    elif own is not None:  # another name for an architecture that is known, such as Kimi's
        made = own.config_class
    else:
        inner = next(
            (k for k in ("text_config", "language_config", "llm_config") if config.has(k)), ""
        )
        text = config.section(inner) if inner else None
        if text is None or text.text("model_type") not in known:
            raise config.fail(_unknown(kind, named, transformers.__version__))
        notes.append("only its text model is known and counted")
        return _class_of(Config(text.where, {**text.values, "architectures": []}), notes)
    try:
        library = made.from_dict(values)
        text = library.get_text_config()
    except Exception as error:
        raise config.fail(f"transformers cannot read it: {_first_line(error)}; {HATCH}") from None
    makers = (
        [partial(own._from_config, dtype=torch.bfloat16)]
        if own is not None and own.config_class is type(library)
        else []
    )
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"):
        auto = getattr(transformers, name, None)
        for one in (library, text) if auto is not None else ():
            if type(one) in auto._model_mapping and not (one is text and "Causal" not in name):
                makers.append(
                    lambda _, auto=auto, one=one: auto.from_config(one, dtype=torch.bfloat16)
                )
    if not makers or library.is_encoder_decoder:
        raise config.fail(
            f"model_type {kind[:40]!a} is not a decoder, which keeps K and V; {HATCH}"
        )
    return library, makers


def _unknown(kind: str, named: str, version: str) -> str:
    if not kind:
        classes = f" (architectures {named[:60]!a})" if named else ""
        return f"has no model_type{classes}, so its architecture is not known; {HATCH}"
    return f"model_type {kind[:40]!a} is not one that transformers {version} knows; {HATCH}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text.encode("ascii", "backslashreplace").decode()[:200]


def _pass(config: Config, model: torch.nn.Module, length: int) -> object:
    """The cache that a forward pass of so many tokens leaves, on the meta device."""
    import torch

    tokens = torch.ones(1, length, dtype=torch.long, device="meta")
    for module in model.modules():  # dynamic scaling asks for positions, which have no values here
        if _get(module, "rope_type") == "dynamic":
            module.rope_type = "default"
    problem = ""
    for whole in (True, False):
        runs = [model]
        with contextlib.suppress(Exception):
            runs.append(model.get_decoder())
        if not whole:  # experts whose code asks which of them are chosen, which no shape says
            for module in model.modules():
                if "moe" in type(module).__name__.lower() and hasattr(module, "experts"):
                    module.forward = lambda hidden, *_, **__: hidden
        for run in runs:
            try:
                out = run(input_ids=tokens, use_cache=True)
            except Exception as error:
                problem = problem or _first_line(error)
                continue
            for name in ("past_key_values", "cache_params", "state"):
                if getattr(out, name, None) is not None:
                    return getattr(out, name)
            problem = problem or "a forward pass leaves no cache"
    raise config.fail(f"what it keeps of a sequence cannot be read: {problem}; {HATCH}")


# ---- what it keeps ------------------------------------------------------------------------------


def _tensors(found: object, where: str = "") -> dict[str, torch.Tensor]:
    """Everything in a layer's cache, by where it is."""
    import torch

    if isinstance(found, torch.Tensor):
        return {where: found}
    if isinstance(found, dict):
        items = list(found.items())
    elif isinstance(found, (list, tuple)):
        items = list(enumerate(found))
    else:
        return {}
    return {k: t for key, one in items for k, t in _tensors(one, f"{where}.{key}").items()}


def _layers(config: Config, text: object, short: object, long: object) -> tuple[Layers, ...]:
    """Layers by what they keep, in the order in which they first occur."""
    if isinstance(long, (list, tuple)):  # RWKV: tensors whose last dimension is the layer
        bytes_each = sum(t.numel() * t.element_size() for t in long)
        count = long[0].shape[-1]
        return (Layers(count, STATE, state_bytes=bytes_each // count),)
    pairs = list(zip(short.layers, long.layers))
    if not pairs:
        raise config.fail(f"what it keeps of a sequence cannot be read: no layers; {HATCH}")
    beside = dict(enumerate(_get(long, "linear_cache") or ()))  # MiniMax's states
    found = Counter(_layer(text, *pair, beside.get(i)) for i, pair in enumerate(pairs))
    kinds = [Layers(count, **dict(kept)) for kept, count in found.items()]
    total = _first(text, "num_hidden_layers")
    if total > len(pairs):  # those that share another's K and V
        kinds.append(Layers(total - len(pairs), NONE))
    return tuple(kinds)


def _layer(text: object, short: object, long: object, beside: object) -> tuple:
    """What one layer keeps, as the fields of Layers."""
    before, after = _tensors(vars(short)), _tensors(vars(long))
    after.pop("._sliding_window_tensor", None)
    keys, values = after.pop(".keys", None), after.pop(".values", None)
    extra, state = 0.0, 0
    if beside is not None:
        state = sum(t.numel() * t.element_size() for t in _tensors(beside).values())
    for where, tensor in after.items():
        grown = tensor.numel() - (before[where].numel() if where in before else 0)
        if grown > 0:
            extra += grown / (LONG - SHORT)
        else:
            state += tensor.numel() * tensor.element_size()
    if keys is None or not keys.numel():
        kept = {"kind": STATE if state else NONE, "state_bytes": state, "extra": extra}
        return tuple(kept.items())
    heads, size, value_size = keys.shape[1], keys.shape[-1], values.shape[-1]
    rank, rope = _first(text, "kv_lora_rank"), _first(text, "qk_rope_head_dim")
    query_heads = _first(text, "num_attention_heads") or heads
    kept = {"kind": FULL, "heads": query_heads, "extra": extra, "state_bytes": state}
    if rank and rope:
        kept |= {"kind": LATENT, "elements": rank + rope}
        kept["head_sizes"] = _first(text, "qk_nope_head_dim") + rope + _first(text, "v_head_dim")
        return tuple(kept.items())
    if _get(text, "new_decoder_architecture"):
        # Falcon's: the library caches every query head, a server the heads that these share.
        heads = min(heads, _first(text, "num_kv_heads"))
    kept |= {"elements": heads * (size + value_size), "kv_heads": heads}
    kept["head_sizes"] = size + value_size
    window = _first(long, "sliding_window")
    if window:
        kept |= {"kind": WINDOW, "window": min(window, _first(text, "sliding_window") or window)}
    return tuple(kept.items())


# ---- its weights --------------------------------------------------------------------------------


def _model(
    config: Config,
    name: str,
    text: object,
    model: torch.nn.Module,
    layers: tuple[Layers, ...],
    stored: Quantisation | None,
    notes: list[str],
) -> Model:
    found = _count(text, model, stored)
    heads = max((kind.heads for kind in layers), default=0)
    kv_heads = max((kind.kv_heads for kind in layers if kind.heads), default=1)
    sizes = [kind.head_sizes // 2 for kind in layers if kind.heads]
    told = [config.values.get(key) for key in ("dtype", "torch_dtype")]
    told += [_get(text, key) for key in ("dtype", "torch_dtype")]
    dtype = next((str(one).removeprefix("torch.") for one in told if one is not None), "")
    if dtype == "float32":
        notes.append("its weights are stored in 32 bits and counted in 16, as servers load them")
    if _first(text, "num_nextn_predict_layers", "mtp_num_hidden_layers"):
        notes.append("its layers that predict further tokens (MTP) are not counted")
    active = _first(text, *ACTIVE_KEYS) or found.experts
    try:
        return Model(
            name=name,
            family=config.text("model_type") or str(text.model_type),
            num_layers=sum(kind.count for kind in layers),
            hidden_size=_first(text, "hidden_size", "n_embd", "d_model"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=sizes[0] if sizes else 0,
            vocab_size=_first(text, "vocab_size") or 1,
            max_len=longest(config, text),
            widest=found.widest,
            rotary_bytes=rotary_bytes(text, sizes[0] if sizes else 0),
            layers=layers,
            weights=tuple(Weights(role, n, bits) for (role, bits), n in found.counts.items() if n),
            num_experts=found.experts,
            active_experts=min(active, found.experts),
            tied=found.tied,
            notes=tuple(notes),
            dtype=DTYPES.get(dtype, ""),
            quantisation=stored.method if stored else "",
            kv_dtype=stored.kv_dtype if stored else "",
        )
    except ValueError as error:
        raise config.fail(f"{error}; {HATCH}") from None


def _get(owner: object, name: str) -> object:
    """An attribute, None if it is not there or, as of layers that differ, has no one value."""
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


def _first(owner: object, *names: str) -> int:
    """The first of these attributes that is a number from 1; 0 if none is."""
    for name in names:
        value = _get(owner, name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


@dataclass(frozen=True)
class _Counted:
    counts: dict[tuple[str, float], int]  # parameters by role and bits
    widest: int  # result of a layer, a token
    experts: int  # of a layer
    tied: bool


def _count(text: object, model: torch.nn.Module, stored: Quantisation | None) -> _Counted:
    """Each parameter once, by what its module is."""
    import torch

    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    decoder = model
    with contextlib.suppress(Exception):
        decoder = model.get_decoder()
    inside = {id(param) for param in decoder.parameters()}
    if head is not None:
        inside |= {id(param) for param in head.parameters()}
    if model.config.get_text_config() is model.config:  # no encoders: all of it
        inside |= {id(param) for param in model.parameters()}
    num_experts = _first(text, *EXPERT_KEYS)
    counts: Counter[tuple[str, float]] = Counter()
    results: Counter[str] = Counter()  # widths of what reads one input, by module
    seen: set[int] = set()
    places: set[str] = set()  # layers' experts
    most = 0
    for place, module in model.named_modules():
        leaf = place.rsplit(".", 1)[-1]
        for own, param in module.named_parameters(recurse=False):
            if id(param) in seen:
                continue
            seen.add(id(param))
            role = OTHER
            if id(param) not in inside:
                role = ENCODER
            elif isinstance(module, torch.nn.Embedding):
                # Of every layer too, which may know a few tokens less (Gemma 3n's).
                vocabulary = param.shape[0] >= 0.9 * (_first(text, "vocab_size") or math.inf)
                role = EMBEDDING if module is table or vocabulary else OTHER
            elif module is head:
                role = HEAD if param.ndim > 1 else OTHER
            elif _is_expert(place, param):
                role = EXPERTS
                most = max(most, param.shape[0] if param.ndim == 3 else 0)
                places.add(place.split("experts")[0])
            elif param.ndim != 2 or {leaf, own} & ROUTERS or _routes(place, param, num_experts):
                role = OTHER
            elif WHOLE_NAMES.search(place):
                role = WHOLE
            else:
                role = KV if leaf in KV_NAMES else MATRIX
            bits, number = 16.0, param.numel()
            if stored is not None and role in IN_LAYERS:
                one = place
                if role == EXPERTS and param.ndim == 3:  # the checkpoint has each by itself
                    one = f"{place}.0.{own.removesuffix('_weight')}"
                bits = stored.bits(one, experts=role == EXPERTS)
            if role == MATRIX and leaf in FUSED_NAMES:
                share = _kv_share(text, number)
                counts[KV, bits] += share
                number -= share
            counts[role, bits] += number
            if role in (MATRIX, KV) and leaf not in LAST_NAMES:
                out = param.shape[0] if isinstance(module, torch.nn.Linear) else param.shape[-1]
                results[place.rpartition(".")[0]] += out
    widest = max(results.values(), default=1)
    routed = sum(n for (role, _), n in counts.items() if role == EXPERTS)
    experts = (most or num_experts) if routed else 0
    hidden = _first(text, "hidden_size") or 1
    if routed and experts:  # gate and up of those that a token takes: two of three matrices
        active = min(_first(text, *ACTIVE_KEYS) or 1, experts)
        widest = max(widest, 2 * active * routed // (3 * hidden * experts * len(places)))
    tied = not any(role == HEAD and n for (role, _), n in counts.items())
    return _Counted(dict(counts), widest, experts, tied)


def _routes(place: str, param: torch.Tensor, num_experts: int) -> bool:
    """Whether a matrix has a row for each expert, and no other name."""
    leaf = place.rsplit(".", 1)[-1]
    other = leaf in KV_NAMES | FUSED_NAMES | LAST_NAMES or "shared" in place or "proj" in leaf
    return 0 < num_experts == param.shape[0] and not other


def _is_expert(place: str, param: torch.Tensor) -> bool:
    """Whether a weight or a bias is of routed experts, not of those that all tokens pass."""
    routed = any(part.endswith("experts") and "shared" not in part for part in place.split("."))
    return routed and param.ndim >= 2


def _kv_share(text: object, number: int) -> int:
    """Of a matrix that projects queries, keys and values at once, what is of K and V."""
    heads = _first(text, "num_attention_heads", "n_head")
    kv_heads = _first(text, "num_key_value_heads", "num_kv_heads") or heads
    if _get(text, "multi_query") and not _get(text, "new_decoder_architecture"):
        kv_heads = 1
    return number * 2 * kv_heads // max(1, heads + 2 * kv_heads)


def longest(config: Config, text: object) -> int | None:
    """The longest sequence as servers take it: `rope_scaling` of YaRN, linear and dynamic extends
    it, unless the configuration says that it has been extended already."""
    names = "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"
    found = _first(text, *names) or None
    scaling = config.values.get("rope_scaling") or config.values.get("rope_parameters")
    nested = config.values.get("text_config")
    if scaling is None and isinstance(nested, dict):
        scaling = nested.get("rope_scaling") or nested.get("rope_parameters")
    if found is None or not isinstance(scaling, dict):
        return found
    kind = scaling.get("rope_type", scaling.get("type"))
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if not _extends(factor) or kind in ("su", "longrope", "llama3", "default", "mrope", None):
        return found
    if str(_get(text, "model_type")).startswith("gemma3"):  # whose maximum has it in it already
        return found
    if kind == "yarn" and isinstance(original, int) and original > 0:
        found = original
    return int(found * factor)


def _extends(factor: object) -> bool:
    """Whether a factor of positions is one, as JSON may also have Infinity."""
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    return number and 1 <= factor <= 10**6


def rotary_bytes(text: object, head_size: int) -> int:
    """Tables of sines and cosines in 16 bits, as servers keep them: one for each kind of layer, a
    row for each position up to the longest, which linear and YaRN scaling extend."""
    found = _get(text, "rope_parameters")
    if not isinstance(found, dict) or not head_size:
        return 0
    nested = [one for one in found.values() if isinstance(one, dict)]
    rows = 0.0
    for table in {json.dumps(one, sort_keys=True, default=str) for one in nested or [found]}:
        rope = json.loads(table)
        positions = float(_first(text, "max_position_embeddings"))
        kind, factor = rope.get("rope_type"), rope.get("factor")
        if _extends(factor) and kind in ("linear", "dynamic", "yarn"):
            original = rope.get("original_max_position_embeddings")
            extended = original if kind == "yarn" and isinstance(original, int) else positions
            positions = extended * factor
        share = rope.get("partial_rotary_factor")
        rows += positions * (share if isinstance(share, float) and 0.0 < share <= 1.0 else 1.0)
    width = _first(text, "qk_rope_head_dim") or _first(text, "head_dim") or head_size
    return int(2 * width * min(rows, 1e9))
