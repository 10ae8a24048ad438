"""Models as the transformers library builds them: parameters, what layers keep, what is refused."""

import copy
import random
import sys
import time

import pytest
from published_models import PUBLISHED
from tiny_models import DEEPSEEK, GEMMA, SIZES, TINY

pytest.importorskip("transformers")

from vllm_sim.models import GPUS, Deployment, PlanError
from vllm_sim.models.config_file import Config, ConfigError
from vllm_sim.models.model import (
    EMBEDDING,
    ENCODER,
    EXPERTS,
    FULL,
    HEAD,
    KV,
    LATENT,
    MATRIX,
    NONE,
    OTHER,
    STATE,
    WHOLE,
    WINDOW,
)
from vllm_sim.models.quantisation import read_quantisation
from vllm_sim.models.transformers_model import HATCH, INSTALL, read_model

LLAMA = TINY["llama"]


def model(values, **changes):
    """The model of a configuration with changes; a change to None drops the key."""
    values = {k: v for k, v in (values | changes).items() if k not in changes or v is not None}
    config = Config("config.json", values)
    return read_model(config, "a model", read_quantisation(config))


def refused(values, **changes):
    with pytest.raises(ConfigError) as info:
        model(values, **changes)
    message = str(info.value)
    assert message.startswith("config.json") and message.isprintable() and message.isascii()
    return message


@pytest.fixture(scope="module")
def published():
    """published("Llama-3-8B"), each built once."""
    found = {}

    def get(name):
        if name not in found:
            found[name] = model(PUBLISHED[name][1])
        return found[name]

    return get


# ---- parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts_to_the_last_one(name, published):
    """DeepSeek-V3's checkpoint has a bias for each of 256 experts in the routers of 58 layers,
    14,848 numbers, which the library holds as buffers: no parameters of its model."""
    biases = 58 * 256 if name == "DeepSeek-V3" else 0
    assert published(name).num_params == PUBLISHED[name][0] - biases


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Mixtral-8x7B", 12.9),
        ("DeepSeek-V3", 37.6),
        ("Qwen3-30B-A3B", 3.4),
        ("gpt-oss-120b", 5.7),
        ("Llama-3-8B", 8.0),
    ],
)
def test_active_parameters_of_a_token(name, billions, published):
    """Those of the layers, the embeddings counted whole (makers leave one or both out)."""
    assert published(name).active_params / 1e9 == pytest.approx(billions, abs=0.05)


def test_each_role_by_hand():
    """Tiny Llama: 4 query heads and 2 K/V heads of 8, hidden 32, feed-forward 48."""
    found = model(LLAMA)
    assert found.params(MATRIX) == 4 * (2 * 32 * 32 + 3 * 32 * 48)
    assert found.params(KV) == 4 * 2 * 32 * 16
    assert found.params(EMBEDDING) == found.params(HEAD) == 100 * 32 and not found.tied
    assert found.params(OTHER) == (2 * 4 + 1) * 32 and found.widest == 2 * 48
    tied = model(LLAMA, tie_word_embeddings=True)
    assert tied.tied and tied.params(HEAD) == 0
    assert found.num_params - tied.num_params == 100 * 32


@pytest.mark.parametrize(
    ("name", "each", "count", "active", "of"),
    [  # three matrices of an expert, layers that have them
        ("mixtral", 3 * 32 * 48, 4, 2, 4),
        ("jamba", 3 * 32 * 48, 2, 2, 4),
        ("qwen3_next", 3 * 32 * 16, 4, 2, 4),
        ("deepseek_v3", 3 * 32 * 16, 1, 2, 4),
    ],
)
def test_experts_are_held_and_a_token_passes_some(name, each, count, active, of):
    found = model(TINY[name])
    assert (found.active_experts, found.num_experts) == (active, of)
    assert found.params(EXPERTS) == count * of * each
    assert found.num_params - found.active_params == count * (of - active) * each


@pytest.mark.parametrize(
    ("name", "share"),
    [("gpt2", 2 / 3), ("bloom", 2 / 3), ("falcon", 4 / 8), ("gpt_bigcode", 2 / 6), ("phi3", 4 / 8)],
)
def test_k_and_v_of_fused_projections_are_split_off(name, share):
    """Of a matrix for 4 query heads and the K/V heads; the embeddings have nothing of it."""
    found, heads = model(TINY[name]), {"gpt2": 4, "bloom": 4, "falcon": 2, "gpt_bigcode": 1}
    kv = 2 * heads.get(name, 2)
    assert kv / (4 + kv) == pytest.approx(share)
    assert found.params(KV) == found.num_layers * kv * 8 * 32


def test_latent_projections_are_whole_on_every_gpu():
    found = model(TINY["deepseek_v3"])
    assert found.params(WHOLE) == 2 * 32 * (16 + 8 + 4)  # queries down, K and V with positions
    parts = [8 * n * found.weight_bytes(n) for n in (1, 4)]
    more = 3 * 16 * (found.params(WHOLE) + found.params(OTHER))
    assert parts[1] - parts[0] == pytest.approx(more, abs=32)


# ---- what layers keep -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("Llama-2-7B", 2 * 32 * 32 * 128),
        ("Llama-3-8B", 2 * 32 * 8 * 128),  # grouped: not 32 heads, not hidden size 4096
        ("Falcon-7B", 2 * 32 * 1 * 64),  # multi-query
        ("Falcon-40B", 2 * 60 * 8 * 64),  # the library caches all 128 query heads
        ("Gemma-7B", 2 * 28 * 16 * 256),  # explicit head_dim: 4096 of a hidden size of 3072
        ("DeepSeek-V3", 61 * (512 + 64)),  # latent
        ("gpt-oss-120b", 2 * 36 * 8 * 64),
        ("OPT-350M", 2 * 24 * 1024),
        ("Phi-4", 2 * 40 * 10 * 128),
    ],
)
def test_elements_of_a_slot(name, elements, published):
    found = published(name)
    assert found.slot_elements == elements and found.kv_bytes_per_token == 2 * elements


@pytest.mark.parametrize(
    ("name", "layers"),
    [  # how many, what kind, elements a token, window, bytes of a state
        ("llama", [(4, FULL, 32, None, 0)]),
        ("mistral", [(4, WINDOW, 32, 16, 0)]),
        ("qwen2", [(1, FULL, 32, None, 0), (3, WINDOW, 32, 16, 0)]),
        ("gemma3_text", [(3, WINDOW, 32, 16, 0), (1, FULL, 32, None, 0)]),
        ("gemma3", [(3, WINDOW, 32, 16, 0), (1, FULL, 32, None, 0)]),
        # A convolution over queries, keys and values, 4 wide in 16 bits; 4 heads of 8 x 8 in 32.
        ("qwen3_next", [(2, STATE, 0, None, 64 * 4 * 2 + 256 * 4), (2, FULL, 32, None, 0)]),
        ("qwen3_5_text", [(3, STATE, 0, None, 64 * 4 * 2 + 256 * 4), (1, FULL, 32, None, 0)]),
        # 64 channels, 4 wide; of each channel a state of 4.
        ("jamba", [(3, STATE, 0, None, 64 * 4 * 2 + 64 * 4 * 4), (1, FULL, 32, None, 0)]),
        ("mamba", [(3, STATE, 0, None, 64 * 4 * 2 + 64 * 4 * 4)]),
        ("mamba2", [(3, STATE, 0, None, 72 * 4 * 2 + 64 * 4 * 4)]),
        ("rwkv", [(3, STATE, 0, None, 2 * 32 * 2 + 3 * 32 * 4)]),
        ("minimax", [(2, STATE, 0, None, 4 * 8 * 8 * 2), (2, FULL, 32, None, 0)]),
        ("lfm2", [(2, STATE, 0, None, 32 * 3 * 2), (2, FULL, 32, None, 0)]),
        ("falcon", [(2, FULL, 32, None, 0)]),  # 2 K/V heads, not the 4 that are cached
        ("gpt2", [(2, FULL, 64, None, 0)]),
        ("gpt_bigcode", [(2, FULL, 16, None, 0)]),
        ("deepseek_v3", [(2, LATENT, 12, None, 0)]),
        ("longcat_flash", [(4, LATENT, 12, None, 0)]),  # two attentions a layer
    ],
)
def test_what_each_layer_keeps(name, layers):
    found = model(TINY[name])
    told = [(k.count, k.kind, k.elements, k.window, k.state_bytes) for k in found.layers]
    assert told == layers and found.extra_elements == 0
    assert found.state_bytes == sum(count * state for count, *_, state in layers)
    states = sum(count * state for count, *_, state in layers)
    kept = sum(n * size * min(100, window or 100) for n, _, size, window, _ in layers)
    assert found.cached_bytes(100) == 2 * kept + states


def test_layers_that_share_the_cache_of_others_keep_nothing():
    more = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 50, "laurel_rank": 4}
    more |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    more |= {"hidden_size_per_layer_input": 8, "activation_sparsity_pattern": [0.0] * 4}
    more |= {"intermediate_size": [48] * 4, "model_type": "gemma3n_text"}
    found = model(SIZES | more)
    assert [(k.count, k.kind) for k in found.layers] == [(1, WINDOW), (1, FULL), (2, NONE)]
    assert found.num_layers == 4 and found.slot_elements == 2 * 32


@pytest.mark.parametrize("name", ["Gemma-3-1B", "gpt-oss-120b", "Mistral-7B-v0.1"])
def test_what_is_cached_by_length_token_by_token(name, published):
    found = published(name)
    for length in (1, 127, 128, 513, 5000):
        kept = [k.count * k.elements * min(length, k.window or length) for k in found.layers]
        assert found.cached_bytes(length) == 2 * sum(kept)


def test_heads_are_split_or_copied(published):
    found = published("Llama-3-8B")  # 32 query heads, 8 K/V heads
    split = {n: Deployment(found, GPUS["h100"], n) for n in (1, 2, 4, 8, 16, 32)}
    assert [one.kv_heads for one in split.values()] == [8, 4, 2, 1, 1, 1]
    copies = [n * one.slot_bytes() / found.kv_bytes_per_token for n, one in split.items()]
    assert copies == [1, 1, 1, 1, 2, 4]
    for num_gpus in (3, 64):
        with pytest.raises(PlanError, match=f"32 query heads cannot be split over {num_gpus}"):
            Deployment(found, GPUS["h100"], num_gpus)
    odd = model(LLAMA, hidden_size=192, num_attention_heads=24, num_key_value_heads=6)
    with pytest.raises(PlanError, match="6 K/V heads can neither be split over 4 GPUs"):
        Deployment(odd, GPUS["h100"], 4)
    latent = published("DeepSeek-V3")
    assert {Deployment(latent, GPUS["h200"], n).slot_bytes(1) for n in (1, 8, 16)} == {61 * 576}


# ---- positions --------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
LONG = {"type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}


@pytest.mark.parametrize(
    ("changes", "longest", "rows"),
    [
        ({}, 512, 512),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1024, 1024),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1024, 1024),
        ({"rope_scaling": YARN}, 512, 512),  # the maximum has it in it already
        ({"rope_scaling": YARN, "max_position_embeddings": 128}, 512, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 2048, 2048),
        ({"rope_scaling": LLAMA3}, 512, 512),
        ({"rope_scaling": LONG}, 512, 512),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 1024, 1024),
        ({"max_position_embeddings": 4096}, 4096, 4096),
    ],
)
def test_longest_sequence_and_tables_of_rotary_positions(changes, longest, rows):
    found = model(LLAMA, **changes)
    assert (found.max_len, found.rotary_bytes) == (longest, rows * 8 * 2)


def test_positions_of_other_kinds():
    linear = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    gemma = model(TINY["gemma3"], text_config=GEMMA | linear | {"model_type": "gemma3_text"})
    assert gemma.max_len == 512  # 'max_position_embeddings' of Gemma 3 counts it already
    assert gemma.rotary_bytes == (512 + 8 * 512) * 8 * 2  # windows have a table of their own
    # Only a part of each head has positions; or they are learned, or there are none.
    partial = model(SIZES | {"model_type": "stablelm", "partial_rotary_factor": 0.25})
    assert partial.rotary_bytes == 512 * 8 * 2 // 4
    found = {name: model(TINY[name]) for name in ("gpt2", "bloom", "mamba", "deepseek_v3")}
    assert [one.rotary_bytes for one in found.values()] == [0, 0, 0, 512 * 4 * 2]
    assert [one.max_len for one in found.values()] == [64, None, None, 512]


# ---- encoders, classes and notes --------------------------------------------------------------


def test_encoders_are_counted_from_the_model():
    """Gemma-3-4B's has 419,816,304 parameters; most of its text model comes from defaults."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240}
    text |= {"num_hidden_layers": 34, "sliding_window": 1024}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    vision |= {"num_attention_heads": 16, "image_size": 896, "patch_size": 14}
    vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    found = model({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    assert (found.num_params, found.params(ENCODER)) == (4_300_079_472, 419_816_304)
    assert found.slot_elements == 2 * 34 * 4 * 256 and found.notes == ()
    tiny, alone = model(TINY["llava"]), model(LLAMA)
    assert tiny.num_params == alone.num_params + tiny.params(ENCODER)
    assert tiny.params(ENCODER) > 0 and tiny.layers == alone.layers


def test_the_class_that_the_configuration_names_decides():
    """Kimi-K2 is a DeepSeek-V3 by another name."""
    known = model(TINY["deepseek_v3"])
    found = model(DEEPSEEK, model_type="kimi_k2", architectures=["DeepseekV3ForCausalLM"])
    assert (found.family, found.weights, found.layers) == ("kimi_k2", known.weights, known.layers)
    bias = model(SIZES, model_type="other", architectures=[7, "Qwen2ForCausalLM"])
    assert bias.num_params == model(LLAMA).num_params + 4 * (32 + 2 * 16)
    # A class of another type, or none of the library's, is no answer where the type is known.
    for odd in ("GPT2LMHeadModel", "Wonder", "os.path", "PreTrainedModel"):
        assert model(LLAMA, architectures=[odd]) == model(LLAMA)


def test_what_is_left_out_is_said():
    found = model({"model_type": "wonder_vl", "text_config": LLAMA, "vision_config": {"depth": 3}})
    assert found.notes == ("only its text model is known and counted",)
    assert found.weights == model(LLAMA).weights
    broken = model(
        TINY["llava"], vision_config={"model_type": "clip_vision_model", "hidden_size": 0}
    )
    assert "encoders of images and audio are not counted" in broken.notes[0]
    assert broken.params(ENCODER) == 0 and broken.num_params == model(LLAMA).num_params
    assert "(MTP) are not counted" in model(DEEPSEEK | TINY["deepseek_v3"]).notes[0]
    stored = model(LLAMA, torch_dtype="float32")
    assert "stored in 32 bits" in stored.notes[0] and stored.dtype == "fp16"
    assert [model(LLAMA, dtype=one).dtype for one in ("bfloat16", "float16")] == ["bf16", "fp16"]


def test_a_stored_checkpoint_has_the_bits_of_each_module():
    ignore = {"ignore": ["re:.*self_attn.*", "lm_head"]}
    weights = {"targets": ["Linear"], "weights": {"num_bits": 8}}
    stored = {"quant_method": "compressed-tensors", "config_groups": {"g": weights}} | ignore
    found = model(LLAMA, quantization_config=stored)
    attention = 4 * (2 * 32 * 32 + 2 * 32 * 16)
    rest = found.num_params - attention - 4 * 3 * 32 * 48
    assert found.weight_bytes() == 4 * 3 * 32 * 48 + 2 * (attention + rest)
    assert found.quantisation == "compressed-tensors, 8 bits"
    experts = model(TINY["mixtral"], quantization_config={"quant_method": "mxfp4"})
    bits = 4.25 * experts.params(EXPERTS) + 16 * (experts.num_params - experts.params(EXPERTS))
    assert experts.weight_bytes() == -(-bits // 8)


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "wonder\nmodel"}, r"model_type 'wonder\nmodel' is not one that transfor"),
        ({"model_type": "w\u00e9" * 99}, "is not one that transformers"),
        ({"architectures": ["WonderForCausalLM"]}, "no model_type (architectures 'WonderForCausal"),
        ({"text_config": {"hidden_size": 3}}, "has no model_type, so its architecture is not"),
        ({"model_type": "x", "text_config": {"model_type": "y"}}, "model_type 'x' is not one"),
        (DEEPSEEK | {"model_type": "kimi_k2"}, "model_type 'kimi_k2' is not one"),
        ({"model_type": "t5"}, "model_type 't5' is not a decoder"),
        (LLAMA | {"num_key_value_heads": 3}, "what it keeps of a sequence cannot be read"),
        (TINY["jamba"] | {"attn_layer_period": 0}, "transformers cannot read it: ZeroDivision"),
        (LLAMA | {"hidden_size": "32"}, "transformers cannot read it"),
        (LLAMA | {"hidden_size": 0}, ""),
    ],
)
def test_what_the_library_cannot_build_is_refused_with_the_way_out(values, said, capfd):
    message = refused(values)
    assert said in message and message.endswith(HATCH) and len(message) < 500
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (LLAMA | {"model_type": 3}, "model_type must be text, not 3"),
        (LLAMA | {"architectures": "x"}, "architectures must be a list"),
        (LLAMA | {"num_hidden_layers": 1001}, "num_hidden_layers must be 1 to 1000, not 1001"),
        (TINY["gpt2"] | {"n_layer": 10**7}, "n_layer must be 1 to 1000"),
        (LLAMA | {"hidden_size": 10**30}, "hidden_size must be up to 100000000"),
        (LLAMA | {"vocab_size": -(10**30)}, "vocab_size must be up to"),
        (
            {"model_type": "llava", "text_config": LLAMA, "vision_config": {"depth": 10**5}},
            "depth must be 1 to 1000",
        ),
        (LLAMA | {"any": [[{"deep": 10**9}]]}, "deep must be up to"),
    ],
)
def test_numbers_that_no_model_has_are_refused_at_once(values, said):
    start = time.perf_counter()
    assert said in refused(values)
    assert time.perf_counter() - start < 1.0


def test_sizes_that_are_only_large_take_no_memory_and_no_time():
    start = time.perf_counter()
    assert model(TINY["mixtral"], num_local_experts=10**7).num_params > 10**11
    assert model(LLAMA, hidden_size=10**7).num_params > 10**9
    assert model(LLAMA, max_position_embeddings=10**30).max_len == 10**30
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize("module", ["transformers", "torch"])
def test_without_the_library_one_line_says_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(LLAMA)
    assert message == f"config.json: no transformers, which reads it: {INSTALL}; or {HATCH}"


ODD = (None, 0, 1, -1, 3, 128, 10**7, 10**30, 1.5, True, "x", [], [1], {"a": 1}, "\n", [[0] * 3])


def test_no_configuration_gets_anything_but_a_model_or_an_error(capfd):
    """Random values in random places: a ConfigError of one line, or positive sizes."""
    rng, models, errors = random.Random(0), 0, 0
    more = ["quantization_config", "layer_types", "rope_scaling", "architectures", "sliding_window"]
    for _ in range(250):
        values = copy.deepcopy(rng.choice(list(TINY.values())))
        inner = rng.choice([one for one in (values, values.get("text_config")) if one])
        for _ in range(rng.randrange(1, 3)):
            inner[rng.choice([*inner, *more])] = rng.choice(ODD)
        try:
            found = model(values)
        except ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 600
            errors += 1
        else:
            assert 0 < found.active_params <= found.num_params
            assert found.weight_bytes(2) > 0 and found.cached_bytes(10**4) > 0
            models += 1
    assert models > 25 and errors > 100
    assert capfd.readouterr() == ("", "")
