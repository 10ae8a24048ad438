"""Models by their config.json: published counts, and what is refused by name."""

import io
import json
import math
import os
import random
from dataclasses import replace

import pytest
from published_models import PUBLISHED
from vllm_sim.models.families import FAMILIES

from vllm_sim.models import GPUS, MODELS, Deployment, Model, load_model
from vllm_sim.models.config_file import MAX_BYTES, Config, ConfigError, quantisation, read_config
from vllm_sim.models.memory_plan import PlanError
from vllm_sim.models.model import Experts
from vllm_sim.models.presets import NO_PLAIN_CACHE, model_of
from vllm_sim.reporting import files

LLAMA = PUBLISHED["Llama-3-8B"][1]


def model(values, **changes):
    """The model of a configuration with changes; a change to None drops the key."""
    values = {k: v for k, v in (values | changes).items() if k not in changes or v is not None}
    return model_of(Config("config.json", values), "a model")


def published(name, **changes):
    return model(PUBLISHED[name][1], **changes)


def refused(values, **changes):
    with pytest.raises(ConfigError) as info:
        model(values, **changes)
    message = str(info.value)
    assert message.startswith("config.json") and "\n" not in message
    return message


# ---- parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts_to_the_last_one(name):
    count, values = PUBLISHED[name]
    assert model(values).weights().total == count


def test_every_family_has_a_published_model():
    tested = {values["model_type"] for _, values in PUBLISHED.values()}
    assert tested | {"gemma3"} == set(FAMILIES)


@pytest.mark.parametrize(("name", "released"), [("opt-125m", "OPT-125M"), ("opt-13b", "OPT-13B")])
def test_a_preset_is_what_its_configuration_says(name, released):
    found = model_of(Config("config.json", PUBLISHED[released][1]), name)
    assert replace(found, embedding_size=None) == load_model(name) == MODELS[name]


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
def test_active_parameters_of_a_token(name, billions):
    """Those of the layers, the embeddings counted whole (makers leave one or both out)."""
    active = published(name).weights().active
    assert active / 1e9 == pytest.approx(billions, abs=0.05)


def test_counting_by_hand_a_small_model():
    """Each part of a decoder with everything switched on, from its tensors' shapes."""
    parts = "gated embedding_norm head_norms qkv_bias output_bias ffn_bias sinks"
    sizes = {"num_layers": 2, "hidden_size": 6, "num_heads": 4, "num_kv_heads": 2, "head_size": 3}
    sizes |= {"ffn_size": 10, "vocab_size": 7, "max_len": 8, "position_rows": 8}
    sizes |= {"norm_vectors": 2, "norms_per_layer": 2, "embedding_size": 5}
    d = Model("small", "none", **sizes, tied=False, **dict.fromkeys(parts.split(), True))
    q, kv = 4 * 3, 2 * 3
    layer = 6 * q + 2 * 6 * kv + q * 6 + (q + 2 * kv + 6)  # projections and their biases
    layer += 3 * 6 * 10 + (10 + 10 + 6)  # gate, up, down
    layer += 2 * 2 * 6 + 2 * 3 + 4  # norms, norms of the heads, sinks
    rest = 2 * 7 * 5 + 2 * 5 * 6 + 8 * 6 + 2 * 6 + 2 * 6
    assert d.weights().total == 2 * layer + rest == d.weights().active


DENSE, SPARSE = {"first_k_dense_replace": 2}, {"decoder_sparse_step": 2}


@pytest.mark.parametrize(
    ("name", "changes", "difference"),
    [
        # One change each, with the parameters that it adds.
        ("Llama-3-8B", {"tie_word_embeddings": True}, -128_256 * 4096),
        ("Llama-3-8B", {"attention_bias": True}, 32 * (4096 + 2 * 1024 + 4096)),
        ("Llama-3-8B", {"mlp_bias": True}, 32 * (2 * 14_336 + 4096)),
        ("Llama-3-8B", {"num_key_value_heads": 1}, -32 * 2 * 7 * 128 * 4096),
        ("Llama-3-8B", {"num_key_value_heads": None}, 32 * 2 * 24 * 128 * 4096),
        ("Llama-3-8B", {"head_dim": 64}, -32 * (2 * 32 + 2 * 8) * 64 * 4096),
        ("GPT-2", {"n_inner": 768}, 12 * (-3 * 768) * (2 * 768 + 1)),
        ("DeepSeek-V3", DENSE, 3 * 7168 * (257 * 2048 - 18_432) + 256 * 7169),
        ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, 3 * 2048 * (6144 - 128 * 768) - 128 * 2048),
        ("Qwen3-30B-A3B", SPARSE, 24 * (3 * 2048 * (6144 - 128 * 768) - 128 * 2048)),
        ("Falcon-7B", {"parallel_attn": False}, 32 * 2 * 4544),
        ("Falcon-7B", {"multi_query": False}, 32 * 2 * 70 * 64 * 4544),
        ("Falcon-40B", {"num_ln_in_parallel_attn": 1}, -60 * 2 * 8192),
        ("OPT-125M", {"enable_bias": False}, -12 * (4 * 768 + 3072 + 768)),
    ],
)
def test_what_an_option_adds(name, changes, difference):
    before, after = published(name), published(name, **changes)
    assert after.weights().total - before.weights().total == difference


# ---- the cache --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("Llama-2-7B", 2 * 32 * 32 * 128),
        ("Llama-3-8B", 2 * 32 * 8 * 128),  # grouped: not 32 heads, not hidden size 4096
        ("Falcon-7B", 2 * 32 * 1 * 64),  # multi-query
        ("Gemma-7B", 2 * 28 * 16 * 256),  # explicit head_dim: 4096 of a hidden size of 3072
        ("DeepSeek-V2-Lite", 27 * (512 + 64)),
        ("DeepSeek-V3", 61 * (512 + 64)),
        ("gpt-oss-20b", 2 * 24 * 8 * 64),
        ("OPT-13B", 2 * 40 * 5120),
    ],
)
def test_elements_of_a_slot(name, elements):
    assert published(name).slot_elements == elements


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Mistral-7B-v0.1", [(32, 4096)]),
        ("Mixtral-8x7B", [(32, None)]),  # its sliding_window is null
        ("Gemma-2-9B", [(21, None), (21, 4096)]),
        ("Gemma-3-1B", [(4, None), (22, 512)]),
        ("gpt-oss-120b", [(18, None), (18, 128)]),
        ("Qwen2-7B", [(28, None)]),  # use_sliding_window is false
        ("Llama-3-8B", [(32, None)]),
    ],
)
def test_which_layers_slide(name, kinds):
    layers = published(name).cache_layers
    assert [(kind.count, kind.window) for kind in layers] == kinds


def test_qwens_windows_start_late_and_layer_types_go_before_a_familys_pattern():
    values = PUBLISHED["Qwen2-7B"][1] | {"use_sliding_window": True, "sliding_window": 4096}
    assert not model(values).windows  # max_window_layers is 28, of 28
    windows = model(values, max_window_layers=20).windows
    assert windows == (None,) * 20 + (4096,) * 8
    types = ["full_attention"] * 25 + ["sliding_attention"]
    windows = published("Gemma-3-1B", layer_types=types).windows
    assert windows == (None,) * 25 + (512,)


def test_what_is_cached_by_length_token_by_token():
    decoder = published("Gemma-3-1B")
    for length in (1, 511, 512, 513, 5000):
        kept = sum(min(length, window or length) for window in decoder.windows)
        assert decoder.cached_elements(length) == kept * 2 * 1 * 256


def test_heads_are_split_or_copied():
    found = model(LLAMA)  # 32 query heads, 8 K/V heads
    split = {n: Deployment(found, GPUS["h100"], n) for n in (1, 2, 4, 8, 16, 32)}
    assert [one.kv_heads for one in split.values()] == [8, 4, 2, 1, 1, 1]
    copies = [n * one.slot_bytes() / found.kv_bytes_per_token for n, one in split.items()]
    assert copies == [1, 1, 1, 1, 2, 4]
    for num_gpus in (3, 64):
        with pytest.raises(PlanError, match=f"32 query heads cannot be split over {num_gpus}"):
            Deployment(found, GPUS["h100"], num_gpus)
    odd = model(LLAMA, num_attention_heads=48, num_key_value_heads=12, head_dim=128)
    with pytest.raises(PlanError, match="12 K/V heads can neither be split over 8 GPUs"):
        Deployment(odd, GPUS["h100"], 8)


def test_a_latent_cache_is_whole_on_every_gpu():
    found = published("DeepSeek-V3")
    assert {Deployment(found, GPUS["h200"], n).slot_bytes(1) for n in (1, 8, 16)} == {61 * 576}


# ---- bytes of the weights ---------------------------------------------------------------------


def test_bytes_of_weights_by_type():
    found = model(LLAMA)
    w = found.weights()
    assert found.weight_bytes(16) == 2 * w.total
    matrices = w.attention + w.kv_projection + w.feed_forward
    assert found.weight_bytes(8) == matrices + 2 * (w.embeddings + w.other)


def test_tensor_parallel_weights():
    """The parts over the GPUs are the whole, and more where something is on each."""
    found = model(LLAMA)
    w = found.weights()
    extra = 7 * 2 * w.other
    assert 8 * found.weight_bytes(16, 8) == pytest.approx(2 * w.total + extra, abs=16)
    copied = 31 * 2 * w.other + 3 * 2 * w.kv_projection  # 8 K/V heads on 32 GPUs: 4 copies
    assert 32 * found.weight_bytes(16, 32) == pytest.approx(2 * w.total + copied, abs=64)
    deepseek = published("DeepSeek-V3")
    w = deepseek.weights()
    extra = 7 * 2 * (w.other + w.latent)
    assert 8 * deepseek.weight_bytes(16, 8) == pytest.approx(2 * w.total + extra, abs=16)


BITSANDBYTES = {"quant_method": "bitsandbytes"}
DOUBLE = "bnb_4bit_use_double_quant"


def compressed(*weights):
    groups = {f"group_{number}": {"weights": found} for number, found in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize(
    ("section", "bytes_per_param"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 1 + 4 / 128**2),
        ({"quant_method": "fp8"}, 1.0),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1.0),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 0.5 + 2.5 / 64),
        (BITSANDBYTES | {"load_in_8bit": True}, 1.0),
        (BITSANDBYTES | {"load_in_4bit": True}, 0.5625),
        (BITSANDBYTES | {"load_in_4bit": True, DOUBLE: True}, 0.5 + 1 / 64 + 1 / 4096),
        (compressed({"num_bits": 4, "group_size": 128}), 0.5 + 2 / 128),
    ],
)
def test_quantised_checkpoints_are_sized_as_they_say(section, bytes_per_param):
    found = model(LLAMA, quantization_config=section)
    w = found.weights()
    matrices = w.attention + w.kv_projection + w.feed_forward
    expected = matrices * bytes_per_param + 2 * (w.embeddings + w.other)
    assert found.weight_bytes(16) == math.ceil(expected)


def test_mxfp4_is_for_experts_alone():
    """gpt-oss-20b's checkpoint is 12.8 GiB, as its makers say; ours is within 0.5 %: expert
    biases count as 4-bit here, and are 16-bit there."""
    found = published("gpt-oss-20b", quantization_config={"quant_method": "mxfp4"})
    assert found.weight_bytes(16) / 2**30 == pytest.approx(12.8, abs=0.07)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"quant_method": "hqq"}, 'quant_method "hqq" does not say how many bits'),
        ({}, 'quant_method "" does not say how many bits'),
        ({"quant_method": "gptq"}, "has no bits (or w_bit)"),
        ({"quant_method": "gptq", "bits": 17}, "17 bits a weight"),
        ({"quant_method": "gptq", "bits": "4"}, 'bits must be a whole number, not "4"'),
        (BITSANDBYTES, 'quant_method "bitsandbytes" does not say'),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size"),
        ({"quant_method": "compressed-tensors"}, "config_groups do not agree"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {}}}, "config_groups g"),
        (compressed({"num_bits": 4}, {"num_bits": 8}), "config_groups do not agree"),
        ([], "quantization_config must be an object"),
    ],
)
def test_quantised_checkpoints_that_do_not_say_are_refused(section, said):
    with pytest.raises(ConfigError) as info:
        quantisation(Config("config.json", {"quantization_config": section}))
    assert said in str(info.value)


# ---- nested configurations --------------------------------------------------------------------


def test_the_text_model_of_a_multimodal_configuration():
    """Gemma-3-4B as published: most of its text model comes from the class's defaults.

    Its image encoder and projector have 419,816,304 parameters in truth, the count is 2 % below.
    """
    values = {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
    }
    found = model(values)
    assert found.weights().total == 4_300_079_472 - 419_816_304
    assert found.vision_params == pytest.approx(419_816_304, rel=0.025)
    assert found.weight_bytes(16) == 2 * (found.weights().total + found.vision_params)
    assert found.slot_elements == 2 * 34 * 4 * 256
    said = " ".join(found.notes)
    assert "num_key_value_heads" in said and "image encoder" in said


def test_the_wrapper_decides_whether_the_head_is_tied():
    values = {"model_type": "llava", "text_config": LLAMA, "tie_word_embeddings": True}
    assert model(values).tied
    assert model(values).notes == ("only the text model is counted",)
    assert not model(values, tie_word_embeddings=None).tied


def test_what_is_not_counted_is_said():
    (note,) = published("DeepSeek-V3").notes
    assert "MTP" in note
    unsized = {"model_type": "llava", "text_config": LLAMA, "vision_config": {"depth": 3}}
    assert "not counted" in model(unsized).notes[0]


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("family", NO_PLAIN_CACHE)
def test_other_architectures_are_refused_by_name(family):
    message = refused({"model_type": family})
    assert f"model_type {family} cannot be sized: " in message


def test_unknown_architectures_are_refused_with_those_known():
    message = refused({"model_type": "wonder\nmodel"})
    assert r"model_type 'wonder\nmodel' is not one" in message and "gpt_neox" in message
    message = refused({"architectures": ["WonderForCausalLM"]})
    assert "has no model_type (architectures 'WonderForCausalLM')" in message
    assert "text_config: has no model_type" in refused({"text_config": {"hidden_size": 3}})
    assert "config.json text_config: model_type mamba" in refused(
        {"model_type": "x", "text_config": {"model_type": "mamba"}}
    )


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_each_key_that_is_missing_is_named_or_has_a_default(name):
    """Dropping any one key either names that key in the error or leaves a model."""
    values = PUBLISHED[name][1]
    needed = 0
    for key in set(values) - {"model_type"}:
        rest = {k: v for k, v in values.items() if k != key}
        try:
            found = model(rest).weights().total
        except ConfigError as error:
            assert key in str(error), (key, error)
            needed += 1
        else:
            assert found > 0
    assert needed >= 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers must be 1 to 100000000, not -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 10**6}, "1000000 layers are more than 10000"),
        ({"num_hidden_layers": 10**5000}, "not a number of many digits"),
        ({"num_hidden_layers": 32.0}, "num_hidden_layers must be a whole number, not 32.0"),
        ({"num_hidden_layers": "32"}, 'num_hidden_layers must be a whole number, not "32"'),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number, not true"),
        ({"num_hidden_layers": [32]}, "num_hidden_layers must be a whole number, not [32]"),
        ({"hidden_size": float("nan")}, "hidden_size must be a whole number, not NaN"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5 K/V heads evenly"),
        ({"num_key_value_heads": 64}, "32 query heads cannot share 64 K/V heads evenly"),
        ({"hidden_size": 4097}, "has no head_dim, and hidden_size 4097"),
        ({"tie_word_embeddings": "no"}, 'tie_word_embeddings must be true or false, not "no"'),
        ({"model_type": 3}, "model_type must be text, not 3"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be 1 to"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "1 layer_types for 32"),
        ({"model_type": "mistral", "layer_types": ["linear_attention"] * 32}, "linear_attention"),
        ({"model_type": "mistral", "layer_types": ["sliding_attention"] * 32}, "no sliding_window"),
        ({"model_type": "mistral", "layer_types": "all"}, "layer_types must be a list"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "3 of 2 experts a token",
        ),
        ({"text_config": "LLAMA"}, "text_config must be an object"),
    ],
)
def test_bad_values_are_named(changes, said):
    assert said in refused(LLAMA, **changes)


@pytest.mark.parametrize(
    ("name", "key", "value", "where"),
    [
        ("OPT-125M", "layer_norm_elementwise_affine", False, ""),
        ("DeepSeek-V2-Lite", "attention_bias", True, " with a latent cache"),
    ],
)
def test_what_only_one_family_can_say_and_nobody_can_size(name, key, value, where):
    said = f"config.json: {key} {json.dumps(value)} cannot be sized{where}"
    assert refused(PUBLISHED[name][1], **{key: value}) == said
    assert published(name, **{key: not value}) == published(name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"windows": (512, None)}, "2 layer types for 26 layers"),
        ({"experts": Experts(27, 8, 2, 64)}, "experts in 27 of 26 layers"),
        ({"experts": Experts(-1, 8, 2, 64)}, "experts in -1 of 26 layers"),
    ],
)
def test_a_decoder_of_layers_that_it_has_not_is_refused(changes, said):
    decoder = published("Gemma-3-1B")
    with pytest.raises(ValueError, match=said):
        replace(decoder, **changes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b"[1, 2]", "holds no JSON object"),
        (b"\xff\xfe\x00", "not a JSON file, it is not text"),
        (b"[" * 200_000, "not JSON that a configuration could be"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not JSON that a configuration could be"),
        (b" " * (MAX_BYTES + 1), "larger than 4 MiB"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as info:
        load_model(str(path))
    assert str(info.value).startswith(f"{path}: ") and said in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.json", "No such file or directory"),
        (".", "Is a directory"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(name, said, tmp_path):
    path = f"{tmp_path}/{name}"
    with pytest.raises(ConfigError) as info:
        read_config(path)
    assert str(info.value) == f"{path}: cannot be read: {said}"


class MadeUp(io.BytesIO):
    """A file that the system makes up as it is read: its size says nothing."""

    def fileno(self):
        return os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize(("length", "found"), [(4, b"xxxx"), (5, None), (10**6, None)])
def test_a_file_without_a_size_is_not_read_to_its_end(monkeypatch, length, found):
    there = MadeUp(b"x" * length)
    monkeypatch.setattr(files, "open_input", lambda _: there)
    monkeypatch.setattr(there, "close", lambda: None)
    assert files.read_bounded("a", 4) == found
    assert there.tell() <= 5


def test_a_file_that_would_have_to_be_waited_for_is_refused(monkeypatch):
    """As the kernel's log, which is a regular file and may have nothing yet."""
    there = MadeUp(b"")
    monkeypatch.setattr(there, "read", lambda _: None)
    monkeypatch.setattr(files, "open_input", lambda _: there)
    with pytest.raises(ConfigError, match="a: cannot be read: it would have to be waited for"):
        read_config("a")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    """Opening a pipe that nobody writes to would never return."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 2**40)
    for name, said in (("pipe", "nothing comes through"), ("hole", "larger than 4 MiB")):
        with pytest.raises(ConfigError, match=said):
            load_model(str(tmp_path / name))
    with pytest.raises(ConfigError, match="not a regular file"):
        read_config("/dev/zero")


def test_every_truncation_of_a_configuration_is_refused(tmp_path):
    text = json.dumps(LLAMA)
    path = tmp_path / "config.json"
    for length in range(len(text)):
        path.write_text(text[:length])
        with pytest.raises(ConfigError, match="not JSON"):
            read_config(path)


def test_where_a_model_may_be(tmp_path):
    folder = tmp_path / "Llama-3-8B"
    folder.mkdir()
    with pytest.raises(ConfigError, match="a folder without a config"):
        load_model(str(folder))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    for name in (folder, folder / "config.json"):
        assert load_model(str(name)).name == "Llama-3-8B"
    (tmp_path / "other.json").write_text(json.dumps(LLAMA))
    assert load_model(str(tmp_path / "other.json")).name == "other"
    for name in ("opt-14b", "", "a\0b", str(tmp_path / "none.json")):
        with pytest.raises(ConfigError, match="neither a file nor one of opt-125m, "):
            load_model(name)


def test_no_configuration_gets_anything_but_a_model_or_an_error():
    """Random values in random places: a ConfigError of one line, or positive sizes."""
    rng = random.Random(0)
    odd = (None, 0, 1, -1, 3, 128, 10**7, 10**30, 1.5, True, "x", [], {}, [1], {"a": 1}, "\n")
    models = errors = 0
    for _ in range(3000):
        values = dict(rng.choice(list(PUBLISHED.values()))[1])
        for _ in range(rng.randrange(1, 4)):
            values[rng.choice([*values, "quantization_config", "layer_types"])] = rng.choice(odd)
        try:
            found = model_of(Config("config.json", values), "random")
        except ConfigError as error:
            assert "\n" not in str(error)
            errors += 1
        else:
            assert 0 < found.weights().active <= found.weights().total
            assert found.weight_bytes(8, 2) > 0 and found.cached_elements(10**4) > 0
            models += 1
    assert models > 200 and errors > 200
