"""Real configurations, where ../shared lies beside the repository: sizes counted elsewhere."""

import json
import time
from pathlib import Path

import pytest
from measured_servers import differs, sizes

from vllm_sim.models import GPU, Deployment, load_model
from vllm_sim.models.memory_plan import serving_plan
from vllm_sim.models.model import EXPERTS, WHOLE
from vllm_sim.models.transformers_model import HATCH
from vllm_sim.paper import GIB

SHARED = Path(__file__).resolve().parents[3] / "shared"
CASES, CONFIGS = SHARED / "cases" / "models", SHARED / "data" / "configs"
pytestmark = pytest.mark.skipif(not CONFIGS.exists(), reason="no ../shared beside the repository")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def case():
    """case("c_q_quark.json") is the model of that file or folder."""
    return lambda name: load_model(str(CASES / name))


# ---- cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gib", "stored"),
    [
        ("nvidia--Llama-3.1-70B-Instruct-FP8", 67.7, "modelopt, FP8"),
        ("c_q_ct_ignore_attn.json", 7.2, "compressed-tensors"),
        ("c_q_ct_nvfp4.json", 5.6, "compressed-tensors"),
        ("c_q_autoround.json", 5.3, "auto-round"),
        ("c_q_quark.json", 8.5, "quark"),
        ("c_q_eetq.json", 8.5, "eetq"),
    ],
)
def test_weights_of_stored_checkpoints(name, gib, stored, case):
    found = case(name)
    assert found.weight_bytes() / GIB == pytest.approx(gib, rel=0.03)
    assert found.quantisation.startswith(stored)


def test_types_of_k_and_v_that_checkpoints_state(case):
    for name in ("nvidia--Llama-3.1-70B-Instruct-FP8", "llama8b_kv_cache_scheme_fp8.json"):
        assert case(name).kv_dtype == "fp8"
    assert case("llama8b_kv_cache_scheme_fp8.json").slot_bytes(1) == 65_536


def test_experts_in_four_bits_and_attention_as_it_is_excluded(case):
    found = case("nvidia--DeepSeek-V3.1-NVFP4")
    assert {one.bits for one in found.weights if one.role == EXPERTS} == {4.5}
    assert found.weight_bytes() / GIB == pytest.approx(360, rel=0.02)
    config = json.loads(
        (CASES / "nvidia--DeepSeek-V3.1-NVFP4" / "hf_quant_config.json").read_text()
    )
    assert any("self_attn" in name for name in config["quantization"]["exclude_modules"])
    assert {one.bits for one in found.weights if one.role == WHOLE} == {16.0}


def test_names_that_a_newer_library_gives_and_positions_of_a_model_card(case):
    found = case("qwen3-moe-saved-by-transformers-v5")
    assert found.num_experts > 1 and found.params(EXPERTS) > 0.8 * found.num_params
    assert case("qwen2.5-7b-yarn-as-model-card.json").max_len == 131_072


def test_a_server_on_two_gpus_as_logged(case):
    deployment = Deployment(case("K037_qwen2.5-72b-tp2.json"), GPU("h100", int(79.19 * GIB)), 2)
    plan = serving_plan(deployment, utilization=0.95)
    assert plan.kv_cache / GIB == pytest.approx(3.04, rel=0.04)
    assert plan.num_slots == pytest.approx(19_920, rel=0.04)


# ---- configurations ---------------------------------------------------------------------------

QUICK = """aic__Qwen--Qwen3-1.7B aic__Qwen--Qwen3-VL-2B-Instruct aic__openai--gpt-oss-120b
blis__deepseek-v2-lite blis__qwen2.5-7b-instruct blis__mistral-nemo-instruct-2407 mem__bamba-9b
mem__bloomz-7b1 mem__falcon-40b mem__falcon-mamba-7b mem__falcon-rw-1b mem__gemma-2-9b
mem__gemma-3-4b mem__gpt-j-6b mem__gpt2 mem__granite-3.1-3b-a800m mem__lfm2-1.2b mem__opt-350m
mem__phi-2 mem__qwen2-vl-7b-instruct mem__rwkv-4-7b mem__starcoder-15b mem__starcoder2-3b
mem__tinyllama-1.1b mem__baichuan2-7b""".split()  # noqa: SIM905
# What a server keeps is less than the library caches: its query heads share 8 K/V heads.
SHARED_HEADS = {"mem__falcon-40b": 8 / 128, "mem__falcon-11b": 8 / 32}


def check():
    """A row for each configuration; AssertionError for what differs."""
    expected = json.loads((CONFIGS / "expected.json").read_text())
    rows = [*sizes(CONFIGS, expected)]
    for row in rows:
        told, known = differs(row), expected.get(row["name"], {})
        if "refused" in row:  # a type that the library lacks, or whose cache is inside
            assert "kv_elements_per_token" not in known and row["refused"].endswith(HATCH), row
        elif share := SHARED_HEADS.get(row["name"]):
            assert row["kv"] == share * row["known_kv"] and row["parameters"] == row["known"]
        elif told and not row["encoders"]:  # Gemma 3n's, whose library (timm) is not there
            assert row["known"] - row["parameters"] == known["of_which_vision_or_audio"]
        elif told:  # encoders that were not counted there, and no other parameter
            assert row.get("encoders") and "K and V" not in told, (row["name"], told)
            assert 0 < row["parameters"] - row["known"] <= row["encoders"], row
    return rows


def test_sizes_of_different_real_configurations(monkeypatch):
    paths = [CONFIGS / f"{name}.json" for name in QUICK]
    monkeypatch.setattr(type(CONFIGS), "glob", lambda *_: iter(paths))
    rows = check()
    assert len(rows) == len(QUICK) == 25 and sum("refused" in row for row in rows) == 1


@pytest.mark.slow
def test_sizes_of_all_real_configurations(figure):
    start = time.perf_counter()
    rows = check()
    refused = sum("refused" in row for row in rows)
    assert refused <= 15 and len(rows) == 135
    figure("configurations", sized=len(rows) - refused, seconds=time.perf_counter() - start)
