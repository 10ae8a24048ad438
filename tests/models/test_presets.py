"""Models by name, file or folder, and those of which only the sizes are given."""

import json
import sys
from dataclasses import asdict, replace

import pytest
from published_models import PUBLISHED

from vllm_sim.models import MODELS, PRESETS, load_model
from vllm_sim.models.config_file import ConfigError
from vllm_sim.models.model import EMBEDDING, IN_LAYERS, KV, MATRIX, OTHER
from vllm_sim.models.presets import PRESETS as ALL
from vllm_sim.models.presets import TODAYS, from_json, given_model, is_preset
from vllm_sim.models.transformers_model import HATCH
from vllm_sim.paper import GIB

FP8 = {"quant_method": "fp8"}


@pytest.fixture
def config(tmp_path):
    """config(text) writes a tiny Llama as config.json of a folder; returns the folder."""

    def write(name="tiny", beside=None, **changes):
        pytest.importorskip("transformers")
        from tiny_models import TINY

        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(TINY["llama"] | changes))
        if beside is not None:
            (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": beside}))
        return folder

    return write


# ---- names ------------------------------------------------------------------------------------


def test_the_file_of_presets_is_what_the_library_says():
    pytest.importorskip("transformers")
    import make_presets

    made = [*make_presets.presets()]
    assert made == json.loads(make_presets.PRESETS.read_text(encoding="ascii"))
    assert [one["name"] for one in made] == [*TODAYS] and len(made) == 10
    assert all(not one["notes"] or one["name"] == "deepseek-v3" for one in made)


@pytest.mark.parametrize("name", TODAYS)
def test_presets_of_today_need_no_library(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = load_model(name)
    assert found is PRESETS[name] is ALL[name] and not is_preset(found)
    assert from_json(json.loads(json.dumps(asdict(found)))) == found


@pytest.mark.parametrize(
    ("name", "kv_bytes", "gib", "max_len"),
    [  # bytes a token in 16 bits; the checkpoint's weights
        ("llama-3.1-8b", 131_072, 14.96, 131_072),
        ("llama-3.1-70b", 327_680, 131.42, 131_072),
        ("qwen3-8b", 147_456, 15.26, 40_960),
        ("qwen3-32b", 262_144, 61.02, 40_960),
        ("qwen3-30b-a3b", 98_304, 56.87, 40_960),
        ("mistral-small-3.2-24b", 163_840, 44.73, 131_072),
        ("gpt-oss-120b", 73_728, 60.8, 131_072),
        ("deepseek-v3", 70_272, 626.9, 163_840),
        ("gemma-3-27b", 507_904, 51.10, 131_072),
        ("phi-4", 204_800, 27.31, 16_384),
    ],
)
def test_sizes_of_todays_presets(name, kv_bytes, gib, max_len):
    found = PRESETS[name]
    assert (found.kv_bytes_per_token, found.max_len) == (kv_bytes, max_len)
    assert found.weight_bytes() / GIB == pytest.approx(gib, rel=0.002)


@pytest.mark.parametrize(("name", "released"), [("opt-125m", "OPT-125M"), ("opt-13b", "OPT-13B")])
def test_the_papers_presets_are_what_their_configurations_say(name, released, tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED[released][1]))
    found, preset = load_model(str(path)), MODELS[name]
    assert load_model(name) is preset and is_preset(preset) and not is_preset(found)
    assert not is_preset(replace(preset)) and not is_preset(PRESETS["phi-4"])
    for what in ("num_params", "layers", "max_len", "vocab_size", "widest", "tied"):
        assert getattr(found, what) == getattr(preset, what), what
    for role in (MATRIX, KV, EMBEDDING, OTHER):
        assert found.params(role) == preset.params(role), role


def test_no_such_model():
    for name in ("opt-14b", "", "a\0b", "none/none.json"):
        with pytest.raises(ConfigError, match="neither a file nor one of opt-125m, ") as info:
            load_model(name)
        assert str(info.value).endswith(HATCH) and str(info.value).isprintable()


# ---- files ------------------------------------------------------------------------------------


def test_where_a_model_may_be(config, tmp_path):
    folder = config("Tiny-3B")
    for name in (folder, folder / "config.json"):
        assert load_model(str(name)).name == "Tiny-3B"
    (tmp_path / "other.json").write_text((folder / "config.json").read_text())
    assert load_model(str(tmp_path / "other.json")).name == "other"
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="Tiny-3B: a folder without a config"):
        load_model(str(folder))


def test_a_quantisation_stands_in_the_file_beside_it_or_in_the_text_model(config, tmp_path):
    found = load_model(str(config("a", quantization_config=FP8)))
    matrices = found.params(*IN_LAYERS)
    bytes_of = found.weight_bytes()
    assert bytes_of == 2 * found.num_params - matrices
    beside = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    found = load_model(str(config("b", beside)))
    assert (found.weight_bytes(), found.kv_dtype) == (bytes_of, "fp8")
    assert found.quantisation == "modelopt, FP8"
    # Only of a file that is called config.json.
    (tmp_path / "b" / "config.json").rename(tmp_path / "b" / "other.json")
    assert load_model(str(tmp_path / "b" / "other.json")).quantisation == ""
    text = json.loads((tmp_path / "a" / "config.json").read_text())
    both = config("c", model_type="wonder", text_config=text)
    assert load_model(str(both)).weight_bytes() == bytes_of


def test_weight_bits_go_before_what_the_configuration_says(config):
    odd = str(config(quantization_config={"quant_method": "wonder"}))
    with pytest.raises(ConfigError, match="give --weight-bits"):
        load_model(odd)
    found = load_model(odd, 4.5)
    matrices = found.params(*IN_LAYERS)
    assert found.weight_bytes() == 2 * (found.num_params - matrices) + matrices * 4.5 / 8
    assert (found.quantisation, found.kv_dtype) == ("4.5-bit", "")
    preset = load_model("llama-3.1-8b", 4)
    assert preset.quantisation == "4-bit" and preset.name == "llama-3.1-8b"
    assert preset.weight_bytes() < 0.4 * PRESETS["llama-3.1-8b"].weight_bytes()


# ---- given sizes ------------------------------------------------------------------------------


def test_a_model_of_which_only_the_sizes_are_given():
    found = given_model("mine", 131_072, 15.5, 32)
    assert found.slot_bytes(1) == 131_072 and found.slot_bytes(1, 4) == 32_768
    assert found.weight_bytes() == pytest.approx(15.5 * GIB, abs=2)
    assert found.weight_bytes(2) == pytest.approx(7.75 * GIB, abs=2)
    assert (found.num_layers, found.max_len, found.family) == (32, None, "given")
    assert "hidden size of 8,192" in found.notes[0]
    with pytest.raises(ValueError, match="131072 bytes a token are not those of 30 layers"):
        given_model("mine", 131_072, 15.5, 30)
