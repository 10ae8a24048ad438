"""How checkpoints are stored: bits of a weight by each method, and what is left out of it."""

import pytest

from vllm_sim.models.config_file import Config, ConfigError
from vllm_sim.models.quantisation import read_quantisation

UP = "model.layers.3.mlp.up_proj"
QUERY = "model.layers.3.self_attn.q_proj"
EXPERT = "model.layers.3.mlp.experts.0.up_proj"
DOUBLE = "bnb_4bit_use_double_quant"


def read(section, beside=None, **others):
    config = Config("config.json", {"quantization_config": section, **others})
    return read_quantisation(config, beside and Config("hf_quant_config.json", beside))


def groups(*weights, method="compressed-tensors", **more):
    found = {f"group_{i}": {"targets": ["Linear"], "weights": one} for i, one in enumerate(weights)}
    return {"quant_method": method, "config_groups": found, **more}


def modelopt(algorithm, **more):
    return {"quant_method": "modelopt", "quant_algo": algorithm, **more}


def quark(weight, **more):
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}, **more}


def torchao(kind, **data):
    if data or kind[:1].isupper():
        kind = {"default": {"_type": kind, "_data": data}}
    return {"quant_method": "torchao", "quant_type": kind}


@pytest.mark.parametrize(
    ("section", "bits"),
    [  # a scale of 16 bits and a zero point of so many bits a group, or as it is said beside
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "FP8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "awq_marlin", "bits": 4, "group_size": 32}, 4 + 20 / 32),
        ({"quant_method": "auto-round", "bits": 2, "group_size": 32}, 2 + 18 / 32),
        ({"quant_method": "intel/auto-round", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        (groups({"num_bits": 4, "group_size": 128}), 4 + 16 / 128),
        (groups({"num_bits": 8, "type": "float"}), 8),
        (groups({"num_bits": 4, "type": "float", "group_size": 16}), 4.5),  # NVFP4
        (groups({"num_bits": 4, "type": "float"}), 4.5),
        (groups({"num_bits": 4, "type": "float", "group_size": 32}), 4.25),  # MXFP4
        (modelopt("FP8"), 8),
        (modelopt("nvfp4"), 4.5),
        (modelopt("FP8_PB_WO"), 8 + 32 / 128**2),
        (modelopt("MXFP8"), 8.25),
        (modelopt("MXFP4"), 4.25),
        (modelopt("W4A16_AWQ"), 4 + 16 / 128),
        (modelopt("W4A8_AWQ", group_size=64), 4 + 16 / 64),
        (groups({"num_bits": 4, "type": "float", "group_size": 16}, method="modelopt"), 4.5),
        ({"quant_algo": "NVFP4"}, 4.5),  # without a method's name
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, DOUBLE: True}, 4 + 1 / 8 + 1 / 512),
        (quark({"dtype": "fp8_e4m3", "qscheme": "per_tensor"}), 8),
        (quark({"dtype": "int4", "qscheme": "per_group", "group_size": 128}), 4 + 8 / 128),
        (quark({"dtype": "fp4", "qscheme": "per_group", "group_size": 32}), 4.25),
        (quark({"dtype": "int8", "qscheme": "per_group", "group_size": 64}), 8.25),
        (quark([{"dtype": "fp8_e4m3"}, {"dtype": "int4", "qscheme": "per_group"}]), 4.25),
        ({"quant_method": "hqq", "nbits": 4, "group_size": 64}, 4.5),
        (
            {
                "quant_method": "hqq",
                "quant_config": {"weight_quant_params": {"nbits": 2, "group_size": 16}},
            },
            4,
        ),
        (torchao("int8_weight_only"), 8),
        (torchao("int4_weight_only"), 4.25),
        (torchao("Int4WeightOnlyConfig", group_size=32), 5),
        (torchao("Float8DynamicActivationFloat8WeightConfig"), 8),
        (torchao("Int8DynamicActivationInt4WeightConfig", group_size=64), 4.5),
        ({"quant_method": "eetq"}, 8),
        ({"quant_method": "fbgemm_fp8"}, 8),
        ({"quant_method": "ptpc_fp8"}, 8),
        ({"quant_method": "quanto", "weights": "int4"}, 4),
        ({"quant_method": "quanto", "weights": "float8"}, 8),
    ],
)
def test_bits_by_method(section, bits):
    stored = read(section)
    assert stored.bits(UP) == stored.bits(QUERY) == stored.bits(EXPERT, experts=True) == bits
    assert stored.bits("lm_head") == 16 and stored.kv_dtype == "" and stored.method


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_where_it_stands(key):
    stored = read_quantisation(Config("config.json", {key: {"quant_method": "fp8"}}))
    assert stored.bits(UP) == 8
    assert read_quantisation(Config("config.json", {"quantization_config": None})) is None


@pytest.mark.parametrize(
    "section",
    [{"quant_method": "mxfp4"}, {"quant_method": "experts_int8"}],
)
def test_methods_for_experts_alone(section):
    stored = read(section)
    assert stored.bits(EXPERT, experts=True) == (4.25 if "mxfp4" in stored.method else 8)
    assert stored.bits(UP) == stored.bits(QUERY) == 16


FORMS = ("ignore", "ignored_layers", "exclude", "exclude_modules", "modules_to_not_convert")
FORMS += ("llm_int8_skip_modules", "skip_modules", "modules_in_block_to_not_quantize")


@pytest.mark.parametrize("key", FORMS)
def test_what_is_left_out_is_so_under_every_key(key):
    stored = read({"quant_method": "fp8", key: ["q_proj", 7]})
    assert (stored.bits(QUERY), stored.bits(UP)) == (16, 8)


@pytest.mark.parametrize(
    ("pattern", "out", "kept"),
    [
        (QUERY, [QUERY], [UP, QUERY.replace("3", "31")]),
        ("model.layers.3", [QUERY, UP], [QUERY.replace("3", "31")]),
        ("layers.3.mlp", [UP, EXPERT], [QUERY]),
        ("q_proj", [QUERY], [QUERY.replace("q_proj", "q_proj_2"), UP]),
        ("re:.*self_attn.*", [QUERY], [UP]),
        (r"re:model\.layers\.\d+\.mlp\..*", [UP, EXPERT], [QUERY]),
        ("re:self_attn", [], [QUERY, UP]),  # from the beginning, as compressed-tensors matches
        ("*self_attn*", [QUERY], [UP]),
        ("model.layers.?.self_attn*", [QUERY], [UP, QUERY.replace("3", "31")]),
        ("model.layers.3.*", [QUERY, UP], []),
        # Other writers' names of the same modules.
        ("model.language_model.layers.3.self_attn", [QUERY], [UP]),
        ("language_model.model.layers.3.self_attn.q_proj", [QUERY], [UP]),
        ("model.layers.3.block_sparse_moe.experts", [EXPERT], [UP, QUERY]),
        ("model.layers.3.attn.q_proj", [QUERY], [UP]),
        ("re:language_model.model.layers.3.*", [QUERY, UP], []),
        ("model", [], [QUERY, UP]),  # nothing is left of it in the one form
    ],
)
def test_names_patterns_and_prefixes(pattern, out, kept):
    stored = read({"quant_method": "fp8", "ignore": [pattern]})
    assert [stored.bits(name) for name in out] == [16] * len(out)
    assert [stored.bits(name) for name in kept] == [8] * len(kept)


def test_some_modules_have_bits_of_their_own():
    """The first rule that fits decides; a group for all modules comes last, wherever it stands."""
    mixed = groups({"num_bits": 4}, {"num_bits": 8})
    mixed["config_groups"]["group_1"]["targets"] = ["re:.*self_attn.*"]
    stored = read(mixed)
    assert (stored.bits(UP), stored.bits(QUERY)) == (4, 8) and "4 and 8 bits" in stored.method
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    own = {r"+:.*q_proj": {"bits": 8}, r"-:.*layers\.3\.mlp.*": {}}
    stored = read(gptq | {"dynamic": own})
    assert (stored.bits(QUERY), stored.bits(UP)) == (8 + 16 / 128, 16)
    assert stored.bits(UP.replace("3", "4")) == 4 + 20 / 128
    stored = read(gptq | {"quant_method": "auto-round", "extra_config": {QUERY: {"bits": 16}}})
    assert (stored.bits(QUERY), stored.bits(UP)) == (16, 4 + 20 / 128)
    layers = {"*self_attn*": {"weight": {"dtype": "fp8_e4m3"}}}
    stored = read(quark({"dtype": "fp4", "qscheme": "per_group"}, layer_quant_config=layers))
    assert (stored.bits(QUERY), stored.bits(UP)) == (8, 4.25)
    layers = {QUERY: {"quant_algo": "FP8"}, UP: {"quant_algo": "NVFP4"}}
    stored = read(modelopt("MIXED_PRECISION", quantized_layers=layers))
    assert (stored.bits(QUERY), stored.bits(UP), stored.bits(EXPERT)) == (8, 4.5, 16)
    stored = read({"quant_method": "fp8"}, expert_dtype="fp4")  # DeepSeek-V4's
    assert (stored.bits(QUERY), stored.bits(EXPERT, experts=True)) == (8, 4.25)


def test_a_file_beside_says_it_where_the_configuration_does_not():
    beside = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["q_proj"]}
    for found in ({"quantization": beside}, beside):
        stored = read(None, found)
        assert (stored.bits(UP), stored.bits(QUERY), stored.kv_dtype) == (4.5, 16, "fp8")
    assert read({"quant_method": "fp8"}, {"quantization": beside}).bits(UP) == 8


FP8_SCHEME = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize(
    ("section", "kv"),
    [
        (groups({"num_bits": 8}, **FP8_SCHEME), "fp8"),
        (groups({"num_bits": 8}, kv_cache_scheme=None), ""),
        (groups({"num_bits": 8}, kv_cache_scheme={"num_bits": 16}), ""),
        (modelopt("FP8", kv_cache_quant_algo="FP8"), "fp8"),
        (modelopt("FP8", kv_cache_quant_algo=None), ""),
        (modelopt("NVFP4", **FP8_SCHEME), "fp8"),
        (groups({"num_bits": 4}, method="modelopt", **FP8_SCHEME), "fp8"),
        (
            quark(
                {"dtype": "fp8_e4m3"},
                layer_quant_config={"*k_proj": {"output_tensors": {"dtype": "fp8_e4m3"}}},
            ),
            "fp8",
        ),
    ],
)
def test_the_type_of_k_and_v_where_it_is_stated(section, kv):
    assert read(section).kv_dtype == kv


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quant_method": "wonder"}, "quant_method wonder does not say how many bits a weight"),
        ({}, "quant_method '' does not say how many bits"),
        ({"quant_method": "quanto", "weights": "x"}, "quant_method quanto does not say"),
        ({"quant_method": "gptq"}, "has no bits (or w_bit, weight_bits)"),
        ({"quant_method": "gptq", "bits": 17}, "17 bits a weight are not 1 to 16"),
        ({"quant_method": "gptq", "bits": "4"}, 'bits must be a whole number, not "4"'),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"re:(": {"bits": 8}}}, "is no pattern"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_8bit nor load_in_4bit"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size must be"),
        (groups(), "config_groups are not there or empty: give --weight-bits"),
        (groups({"num_bits": None}), "has no num_bits"),
        (groups(None), "config_groups 'group_0': does not say how its weights are stored"),
        (groups({"num_bits": 8}, ignore=["re:(.*)*x"]), "'re:(.*)*x' is no pattern"),
        (groups({"num_bits": 8}, ignore=["re:" + ".*x" * 9]), "is no pattern"),
        (groups({"num_bits": 8}, ignore=["re:" + "x" * 999]), "is no pattern"),
        (modelopt("FP5"), "quant_algo FP5 does not say how many bits"),
        (modelopt("MIXED", quantized_layers={"a": {"quant_algo": "FP5"}}), "quant_algo FP5"),
        (quark(None), "does not say how its weights are stored"),
        (quark({"dtype": "wonder"}), "dtype 'wonder' is not one of a weight"),
        ({"quant_method": "quark"}, "has no global_quant_config: give --weight-bits"),
        ({"quant_method": "hqq"}, "has no nbits"),
        (torchao("wonder"), "quant_type does not say how many bits"),
        ([], "quantization_config must be an object"),
    ],
)
def test_what_does_not_say_how_many_bits_is_refused_in_one_line(section, said):
    with pytest.raises(ConfigError) as info:
        read(section)
    message = str(info.value)
    assert message.startswith("config.json") and said in message and message.isprintable()
