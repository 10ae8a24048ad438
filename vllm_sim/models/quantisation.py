"""How a checkpoint's matrices are stored: bits of each weight, by the name of its module.

Reproduces nothing. A configuration says it in `quantization_config`, or NVIDIA's
`hf_quant_config.json` beside it, in as many forms as there are methods; what it does not say is
asked for (`--weight-bits`).

    stored = read_quantisation(config)              # None: in 16 bits
    stored.bits("model.layers.0.mlp.experts.gate_up_proj", experts=True)    # 4.5

Bits include a weight's share of scales and zero points. Modules are matched by names as the
checkpoint has them, which may differ from the library's in prefix (`language_model.model.`) and in
what the feed-forward part is called; both sides are brought to one form first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vllm_sim.models.config_file import Config

# Parts of module names that not all writers of a checkpoint have, and other names of the same.
LEFT_OUT = {"model", "language_model", "text_model", "transformer", "backbone"}
SAME = {"block_sparse_moe": "mlp", "ffn": "mlp", "feed_forward": "mlp", "moe": "mlp"}
SAME |= {"attn": "self_attn", "attention": "self_attn", "head": "lm_head"}
MAX_PATTERN, MAX_REPEATS = 400, 3
BY_ALGORITHM = {  # modelopt's names (github.com/NVIDIA/TensorRT-Model-Optimizer)
    "FP8": 8.0,
    "FP8_PER_CHANNEL_PER_TOKEN": 8.0,
    "FP8_PB_WO": 8.0 + 32 / 128**2,
    "FP8_PB_REAL": 8.0 + 32 / 128**2,
    "W8A8_SQ_PER_CHANNEL": 8.0,
    "INT8_SQ": 8.0,
    "W8A16": 8.0,
    "MXFP8": 8.25,
    "NVFP4": 4.5,
    "NVFP4_AWQ": 4.5,
    "W4A16_NVFP4": 4.5,
    "MXFP4": 4.25,
    "W4A8_MXFP4_FP8": 4.25,
    "W4A16": 4.0,
    "W4A16_AWQ": 4.0,
    "W4A8_AWQ": 4.0,
}
GROUPED = ("W4A16", "W4A16_AWQ", "W4A8_AWQ")  # a 16-bit scale a group, whose size is said
LIKE_GPTQ = ("gptq", "awq", "gptq_marlin", "awq_marlin", "auto-round", "auto_round", "inc")
LIKE_GPTQ += ("intel/auto-round",)
EIGHT = ("eetq", "fbgemm_fp8", "experts_int8", "ptpc_fp8")


@dataclass(frozen=True)
class Rule:
    """Modules that match any pattern are stored so; no pattern: all that are left."""

    bits: float
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantisation:
    """What a checkpoint says of itself. The first rule that fits a module decides."""

    method: str
    rules: tuple[Rule, ...]
    experts_only: bool = False
    kv_dtype: str = ""  # fp8 where it is stated

    def bits(self, name: str, experts: bool = False) -> float:
        """Of a weight of the module with this name, in the library's form."""
        if self.experts_only and not experts:
            return 16.0
        names = _variants(name)
        for rule in self.rules:
            if not rule.patterns or any(_matches(pattern, names) for pattern in rule.patterns):
                return rule.bits
        return 16.0


def read_quantisation(config: Config, beside: Config | None = None) -> Quantisation | None:
    """What `quantization_config` says, or the file `beside`; ConfigError if not how many bits, and
    for a regular expression that is none or may match for hours."""
    found = _read(config, beside)
    for pattern in (one for rule in (found.rules if found else ()) for one in rule.patterns):
        if pattern.startswith("re:") and not _usable(pattern[3:]):
            raise config.fail(
                f"quantization_config: {pattern[:40]!a} is no regular expression that is used: "
                "give --weight-bits"
            )
    return found


def _read(config: Config, beside: Config | None) -> Quantisation | None:
    section = config.section("quantization_config") or config.section("compression_config")
    if section is None and beside is not None:
        section = beside.section("quantization") or beside
        return _modelopt(section)
    if section is None:
        return None
    method = section.text("quant_method").lower() or section.text("quant_type").lower()
    if method in ("modelopt", "modelopt_fp4", "modelopt_mixed") or section.has("quant_algo"):
        return _modelopt(section)
    if method in LIKE_GPTQ:
        return _like_gptq(section, method)
    if method in ("compressed-tensors", "compressed_tensors"):
        return _grouped_config(section, "compressed-tensors")
    if method in ("fp8", "fbgemm_fp8"):
        block = section.list("weight_block_size")
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in block):
            raise section.fail("weight_block_size must be whole numbers from 1")
        bits = 8 + (32 / (block[0] * block[1]) if len(block) == 2 else 0.0)
        rules = [_left_out(section), Rule(bits)]
        if config.text("expert_dtype") == "fp4":  # DeepSeek-V4's experts are MXFP4
            rules.insert(0, Rule(4.25, ("experts",)))
        return Quantisation("fp8", tuple(rules))
    if method == "mxfp4":
        rules = _left_out(section, ("self_attn",)), Rule(4.25)
        return Quantisation("mxfp4 experts", rules, experts_only=True)
    if method == "bitsandbytes":
        return _bitsandbytes(section)
    if method == "quark":
        return _quark(section)
    if method == "hqq":
        inner = section.section("quant_config") or section
        inner = inner.section("weight_quant_params") or inner
        bits = inner.count("nbits", "bits")
        return _plain(section, "hqq", _share(inner, bits, inner.optional("group_size"), 32))
    if method == "torchao":
        return _torchao(section)
    if method in EIGHT:
        return _plain(section, f"{method}, 8 bits", 8.0, experts=method == "experts_int8")
    if method == "quanto":
        found = re.fullmatch(r"(?:int|float)(\d+)", section.text("weights"))
        if found:
            return _plain(section, f"quanto, {found[1]} bits", float(found[1]))
    shown = method[:40] or "''"
    raise section.fail(
        f"quant_method {shown} does not say how many bits a weight takes: give --weight-bits"
    )


# ---- the forms ----------------------------------------------------------------------------------


def _plain(section: Config, told: str, bits: float, experts: bool = False) -> Quantisation:
    return Quantisation(told, (_left_out(section), Rule(bits)), experts)


def _left_out(section: Config, more: tuple[str, ...] = ()) -> Rule:
    """What stays in 16 bits, under whichever key a method has for it."""
    keys = "ignore", "ignored_layers", "exclude", "exclude_modules", "modules_to_not_convert"
    keys += "llm_int8_skip_modules", "skip_modules", "modules_in_block_to_not_quantize"
    named = [name for key in keys for name in section.list(key) if isinstance(name, str)]
    # A rule without patterns would take all.
    return Rule(16.0, (*named, *more) or ("lm_head",))


def _share(section: Config, bits: int, group: int | None, extra: float) -> float:
    """Bits of one weight with its share of what each group has beside it, `extra` bits."""
    if not 1 <= bits <= 16:
        raise section.fail(f"{bits} bits a weight are not 1 to 16: give --weight-bits")
    return float(bits) if group is None or group < 1 else bits + extra / group


def _like_gptq(section: Config, method: str) -> Quantisation:
    """GPTQ, AWQ, AutoRound: bits, a group with a 16-bit scale and a zero point, exceptions."""
    method = {"auto_round": "auto-round", "inc": "auto-round"}.get(method.split("/")[-1], method)
    default = section.count("bits", "w_bit", "weight_bits")
    size = section.optional("group_size", "q_group_size", least=-1)
    rules = [_left_out(section)]
    for key in ("dynamic", "extra_config"):
        exceptions = section.section(key)
        for name in exceptions.values if exceptions else ():
            pattern = f"re:{name.lstrip('+-:')}" if key == "dynamic" else name
            own = exceptions.section(name)
            bits = own.optional("bits") or (16 if name.startswith("-") else default)
            rules.append(Rule(16.0 if bits == 16 else _share(section, bits, size, 16), (pattern,)))
    bits = _share(section, default, size, 16 + default)
    return Quantisation(f"{method}, {default} bits", (*rules, Rule(bits)))


def _scheme(section: Config) -> float:
    """Bits of a weight by a scheme of compressed-tensors: num_bits, type, strategy, group_size."""
    bits = section.count("num_bits")
    group = section.optional("group_size", least=-1)
    if section.text("type") == "float" and bits == 4:
        # NVFP4: groups of 16 with scales of a byte; MXFP4: of 32.
        return _share(section, bits, group or 16, 8)
    return _share(section, bits, group, 16)


def _grouped_config(section: Config, told: str) -> Quantisation:
    """compressed-tensors' groups, each with targets (modules, or a class: all) and a scheme."""
    groups = section.section("config_groups")
    rules, bits = [_left_out(section)], set()
    for name in groups.values if groups else ():
        group = groups.section(name)
        weights = group and group.section("weights")
        if weights is None:
            raise section.fail(
                f"config_groups {name[:40]!a}: does not say how its weights are stored: "
                "give --weight-bits"
            )
        targets = [one for one in group.list("targets") if isinstance(one, str)]
        modules = () if not targets or "Linear" in targets else tuple(targets)
        rules.append(Rule(_scheme(weights), modules))
        bits.add(weights.count("num_bits"))
    if not bits:
        raise section.fail("config_groups are not there or empty: give --weight-bits")
    rules.sort(key=lambda rule: not rule.patterns)  # what is about all modules comes last
    scheme = section.section("kv_cache_scheme")
    kv = "fp8" if scheme and scheme.optional("num_bits") == 8 else ""
    many = " and ".join(f"{n}" for n in sorted(bits))
    return Quantisation(f"{told}, {many} bits", tuple(rules), kv_dtype=kv)


def _modelopt(section: Config) -> Quantisation:
    """NVIDIA's: one algorithm, or one for each of `quantized_layers`, or groups as above."""
    algorithm = section.text("quant_algo").upper()
    kv = "fp8" if section.text("kv_cache_quant_algo").upper() == "FP8" else ""
    scheme = section.section("kv_cache_scheme")
    if scheme and scheme.optional("num_bits") == 8:
        kv = "fp8"
    layers = section.section("quantized_layers")
    rules = [_left_out(section)]
    if layers is not None and layers.values:
        found: dict[float, list[str]] = {}
        for name in layers.values:
            own = layers.section(name)
            found.setdefault(_algorithm(own, own.text("quant_algo").upper()), []).append(name)
        rules = [*(Rule(bits, tuple(names)) for bits, names in found.items()), *rules]
        rest = 8.0 if section.text("quant_method") == "fp8" else 16.0
        rules.append(Rule(rest))
        return Quantisation("modelopt, mixed", tuple(rules), kv_dtype=kv)
    if section.has("config_groups"):
        found_groups = _grouped_config(section, "modelopt")
        return Quantisation(found_groups.method, found_groups.rules, kv_dtype=kv)
    bits = _algorithm(section, algorithm)
    return Quantisation(f"modelopt, {algorithm}", (*rules, Rule(bits)), kv_dtype=kv)


def _algorithm(section: Config, name: str) -> float:
    if name not in BY_ALGORITHM:
        shown = name[:40] or "''"
        raise section.fail(
            f"quant_algo {shown} does not say how many bits a weight takes: give --weight-bits"
        )
    bits = BY_ALGORITHM[name]
    group = section.optional("group_size")
    return bits + 16 / (group or 128) if name in GROUPED else bits


def _bitsandbytes(section: Config) -> Quantisation:
    if section.flag("load_in_8bit", False):
        return _plain(section, "bitsandbytes, 8 bits", 8.0)
    if section.flag("load_in_4bit", False):
        double = section.flag("bnb_4bit_use_double_quant", False)
        scale = 8 / 64 + 32 / (64 * 256) if double else 32 / 64
        return _plain(section, "bitsandbytes, 4 bits", 4 + scale)
    raise section.fail("neither load_in_8bit nor load_in_4bit: give --weight-bits")


def _dtype_bits(section: Config, dtype: str) -> int:
    found = re.match(r"(?:u?int|fp|float|mxfp|mx_?fp|bfloat)(\d+)", dtype.lower())
    if not found:
        raise section.fail(f"dtype {dtype[:40]!a} is not one of a weight: give --weight-bits")
    return int(found[1])


def _quark(section: Config) -> Quantisation:
    """AMD's: one specification for all, others by pattern."""

    def of(owner: Config) -> float:
        value = owner.values.get("weight")
        specs = value if isinstance(value, list) else [value]
        if not specs or not all(isinstance(spec, dict) for spec in specs):
            raise owner.fail("does not say how its weights are stored: give --weight-bits")
        bits = [_share_of(Config(f"{owner.where} weight", spec)) for spec in specs]
        return min(bits)

    def _share_of(spec: Config) -> float:
        bits, group = _dtype_bits(spec, spec.text("dtype")), spec.optional("group_size")
        grouped = "group" in spec.text("qscheme")
        return _share(spec, bits, (group or 32) if grouped else None, 8 if bits == 4 else 16)

    rules, kv = [_left_out(section)], ""
    layers = section.section("layer_quant_config")
    for name in layers.values if layers else ():
        own = layers.section(name)
        out = own.section("output_tensors")
        if out is not None and name.endswith(("k_proj", "v_proj")):
            kv = "fp8" if out.text("dtype").startswith("fp8") else kv
        if own.has("weight"):
            rules.append(Rule(of(own), (name,)))
    every = section.section("global_quant_config")
    if every is None:
        raise section.fail("has no global_quant_config: give --weight-bits")
    bits = of(every)
    return Quantisation(f"quark, {bits:.3g} bits", (*rules, Rule(bits)), kv_dtype=kv)


def _torchao(section: Config) -> Quantisation:
    """A name such as int4_weight_only, or a class such as Int4WeightOnlyConfig with its values."""
    kind = section.values.get("quant_type")
    name, data = (kind, {}) if isinstance(kind, str) else ("", {})
    if isinstance(kind, dict) and isinstance(kind.get("default"), dict):
        name, data = str(kind["default"].get("_type", "")), kind["default"].get("_data")
    weight = re.findall(r"(?:u?int|float)x?(\d)_?(?:dq_)?weight", name.lower())
    weight = weight or re.findall(r"(?:u?int|float)(\d)", name.lower())
    if not weight:
        raise section.fail("quant_type does not say how many bits a weight takes: --weight-bits")
    own = Config(f"{section.where} quant_type", data if isinstance(data, dict) else {})
    bits, group = int(weight[-1]), own.optional("group_size")
    if bits == 4 and group is None:
        group = 128
    told = f"torchao, {bits} bits"
    return _plain(section, told, _share(section, bits, group if bits == 4 else None, 32))


# ---- names --------------------------------------------------------------------------------------


def _one_form(name: str) -> str:
    parts = (SAME.get(part, part) for part in name.split(".") if part not in LEFT_OUT)
    return ".".join(parts)


def _variants(name: str) -> tuple[str, ...]:
    """The name in one form first; then as others write it, for regular expressions."""
    plain = _one_form(name)
    return plain, name, f"model.{plain}", f"language_model.model.{plain}"


def _usable(pattern: str) -> bool:
    """Whether it is a regular expression that no name takes long to match: its length and what it
    repeats are bounded, numbers aside, and it repeats no group."""
    repeats = re.findall(r"(?<!\\d)(?<!\[0-9\])[*+{]", pattern)
    if len(pattern) > MAX_PATTERN or len(repeats) > MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _matches(pattern: str, names: tuple[str, ...]) -> bool:
    """Regular expression (re:), shell pattern, or a run of whole parts of the name."""
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in names)
    plain = _one_form(pattern)
    if not plain:
        return False
    if "*" in plain or "?" in plain:
        return fnmatchcase(names[0], plain) or fnmatchcase(names[0], f"{plain}.*")
    return f".{plain}." in f".{names[0]}."
