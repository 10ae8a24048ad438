"""docs/schema.json against what every script really writes, and against documents that are wrong.

The benchmarks that need a GPU are held to it by rows that their own functions make on a CPU (with
clocks that say 8 us), and by what they left in results/ on one.
"""

import copy
import json
import sys
from pathlib import Path

import jsonschema
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import bench_attention  # noqa: E402
import bench_manager  # noqa: E402
import bench_paging_cost  # noqa: E402
import bench_serving  # noqa: E402
import gpu_timing  # noqa: E402
import measure_paging  # noqa: E402
from attention_contenders import CAT_SHAPE  # noqa: E402
from published_models import PUBLISHED  # noqa: E402

import capacity  # noqa: E402
import main  # noqa: E402
import report  # noqa: E402
import reproduce  # noqa: E402
import sweep  # noqa: E402
from paged_attention import paged_attention_kernel  # noqa: E402
from vllm_sim import models, paper  # noqa: E402
from vllm_sim.evaluation import figures_memory  # noqa: E402
from vllm_sim.evaluation.experiments import Run  # noqa: E402
from vllm_sim.reporting.documents import SCHEMA, document, told  # noqa: E402
from vllm_sim.reporting.sweep_table import (
    CHOSEN,
    read_document,
)
from vllm_sim.scenarios import baseline as scenario_baseline  # noqa: E402
from vllm_sim.scenarios import paged as scenario_paged  # noqa: E402
from vllm_sim.scenarios import sampling as scenario_sampling  # noqa: E402

SCHEMA_FILE = json.loads((ROOT / "docs" / "schema.json").read_text(encoding="ascii"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA_FILE)
MAIN = ("--device", "cpu", "--model", "opt-125m", "--num-blocks", "140")


def faults(found):
    """What the schema says of a document, the deepest reasons too."""
    told = []
    for error in VALIDATOR.iter_errors(found):
        parts = [error, *(part for one in error.context for part in (one, *one.context))]
        told += [f"{part.json_path}: {part.message[:200]}" for part in parts]
    return told


def checked(path):
    """The document, after the schema and what reads it here have agreed to it."""
    found = json.loads(path.read_text(encoding="ascii"))
    assert faults(found) == []
    assert read_document(path) == found
    for table in found["tables"]:
        assert table["rows"], table["id"]
    return found


@pytest.fixture
def quick(monkeypatch):
    """Short steady states."""
    for module, warmup, iterations in (
        (scenario_baseline, 50, 200),
        (scenario_paged, 100, 100),
        (scenario_sampling, 20, 30),
    ):
        monkeypatch.setattr(module, "WARMUP", warmup)
        for name in ("ITERATIONS", "BASELINE_ITERATIONS"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, iterations)
    monkeypatch.setattr("vllm_sim.sizing.concurrency.COMPLETIONS", 100)
    monkeypatch.setattr("vllm_sim.sizing.concurrency.ENOUGH_REQUESTS", 50)
    monkeypatch.delenv("LENGTHS_DIR", raising=False)
    runs = dict(paper.ARTIFACT_RUNS)
    runs["Fig. 2"] = {**runs["Fig. 2"], "seconds": 60, "window": (20, 60)}
    monkeypatch.setattr(figures_memory.paper, "ARTIFACT_RUNS", runs)
    return monkeypatch


CAPACITY_TABLES = SCHEMA_FILE["$defs"]["capacity.py"]["$defs"]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA_FILE)
    assert SCHEMA_FILE["properties"]["schema"]["const"] == SCHEMA


def nodes(part):
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from nodes(value)
    elif isinstance(part, list):
        for value in part:
            yield from nodes(value)


def test_every_key_is_described():
    keys = [
        (name, found)
        for node in nodes(SCHEMA_FILE["$defs"])
        if "properties" in node and node.get("additionalProperties") is False
        for name, found in node["properties"].items()
    ]
    assert len(keys) > 200
    assert [name for name, found in keys if not found.get("description")] == []


# ---- what the scripts write -------------------------------------------------------------------


def test_main(quick, tmp_path, capsys):
    path = tmp_path / "out.json"
    code = main.main([*MAIN, "--seed", "3", "--json", str(path)])
    found = checked(path)
    assert (found["script"], found["seeds"], found["exit_code"]) == ("main.py", [3], code)
    assert found["options"] == {
        "scenario": None,
        "device": "cpu",
        "kernel": "auto",
        "model": "opt-125m",
        "layers": 1,
        "num_blocks": 140,
        "block_size": 16,
        "seed": 3,
        "trace": None,
    }
    defined = SCHEMA_FILE["$defs"]["main.py"]["$defs"]
    assert [table["id"] for table in found["tables"]] == sorted(
        defined, key=[table["id"] for table in found["tables"]].index
    ), "every table that is defined is written"
    assert {table["scenario"] for table in found["tables"]} == {1, 2, 3, 4}
    rows = {table["id"]: table["rows"] for table in found["tables"]}
    assert len({row["policy"] for row in rows["pool_map"]}) == 3
    # What a sentence of the text says in figures.
    (pool,), (gather,) = rows["kv_pool"], rows["gather"]
    printed = capsys.readouterr().out
    assert f"K/V pool: {pool['bytes']:,} bytes for {pool['layers']} of 12 layers" in printed
    assert f"{pool['model_fp16_gib']:.2f} GiB" in printed
    assert f"takes {gather['bytes']:,}" in printed and gather["needed"] is True
    assert f"({gather['percent_of_pool']:.1f} % of the pool)" in printed


@pytest.mark.parametrize("scenarios", [(2,), (1, 3)])
def test_main_with_some_scenarios(quick, tmp_path, scenarios):
    path = tmp_path / "out.json"
    chosen = [word for number in scenarios for word in ("--scenario", str(number))]
    main.main([*MAIN, *chosen, "--json", str(path)])
    found = checked(path)
    assert found["options"]["scenario"] == list(scenarios)
    assert {check["scenario"] for check in found["checks"]} == set(scenarios)


def test_main_with_an_invariant_that_fails(quick, tmp_path):
    def broken(setting, progress):
        raise AssertionError("two\nlines")

    quick.setattr(scenario_baseline, "run", broken)
    path = tmp_path / "out.json"
    assert main.main([*MAIN, "--scenario", "1", "--json", str(path)]) == 1
    found = checked(path)
    assert found["exit_code"] == 1 and found["tables"] == []
    assert [(check["ok"], check["detail"]) for check in found["checks"]] == [(False, "two lines")]


@pytest.mark.parametrize("case", ["preset", "windows", "latent", "memory given"])
def test_capacity(quick, tmp_path, case):
    path, model = tmp_path / "out.json", tmp_path / "config.json"
    published = {"windows": "Gemma-3-1B", "latent": "DeepSeek-V2-Lite"}
    names = [name for name in PUBLISHED if name.startswith(published.get(case, " "))]
    arguments = {"preset": [], "memory given": ["--gpu-memory", "39.39"]}.get(case)
    if arguments is None:
        model.write_text(json.dumps(PUBLISHED[names[0]][1]))
        arguments = ["--model", str(model), "--gpu", "h100"]
    assert capacity.main(["--workload", "30,20", *arguments, "--json", str(path)]) == 0
    found = checked(path)
    ids = {table["id"] for table in found["tables"]}
    assert ("bytes_by_length" in ids) == (case == "windows")
    assert ids | {"bytes_by_length"} == {one for one in CAPACITY_TABLES if "trace" not in one}
    assert all(table["answer"].endswith(".") for table in found["tables"])


@pytest.mark.parametrize("hashed", [False, True])
def test_capacity_of_a_trace(tmp_path, hashed):
    trace, path = tmp_path / "trace", tmp_path / "out.json"
    if hashed:
        line = '{"timestamp": %d, "input_length": 600, "output_length": 9, "hash_ids": [1, %d]}\n'
        trace.write_text("".join(line % (1000 * i, i) for i in range(12)))
    else:
        trace.write_text("time,input_len,output_len\n" + "".join(f"{i},50,9\n" for i in range(12)))
    assert capacity.main(["--trace", str(trace), "--json", str(path), "--quiet"]) == 0
    ids = {table["id"] for table in checked(path)["tables"]}
    assert {one for one in CAPACITY_TABLES if "trace" in one} - ids == (
        set() if hashed else {"trace_prefixes"}
    )
    assert {"memory", "blocks_and_slots"} < ids


@pytest.mark.parametrize("seeds", ["1", "3"])
def test_reproduce(quick, tmp_path, seeds):
    path = tmp_path / "out.json"
    code = reproduce.main(
        [
            "--figure",
            "2",
            "--figure",
            "table1",
            "--jobs",
            "1",
            "--seeds",
            seeds,
            "--json",
            str(path),
        ]
    )
    found = checked(path)
    assert (found["exit_code"], found["seeds"]) == (code, [*range(int(seeds))])
    assert [check["name"] for check in found["checks"]] == ["Table 1", "Fig. 2"]
    (table,) = found["tables"]
    assert any("spread" in row for row in table["rows"]) == (seeds == "3")


def test_benchmarks_of_the_bookkeeping(quick, tmp_path):
    path = tmp_path / "out.json"
    fill, _ = bench_manager.WORKLOADS["W1"]
    quick.setattr(bench_manager, "WORKLOADS", {"W1": (fill, 2)})
    assert bench_manager.main(["--repeats", "1", "--json", str(path)]) == 0
    assert checked(path)["setting"] == {"block_size": 16, "repeats": 1}
    run = Run(paper.VLLM, "opt-13b", "ShareGPT", 2.0, 60.0)
    quick.setattr(bench_serving, "RUNS", {"a": (run, 1, True), "b": (run, 2, False)})
    assert bench_serving.main(["--repeats", "1", "--json", str(path)]) == 0
    assert [row["trace"] for row in checked(path)["tables"][0]["rows"]] == ["a", "b"]


def eight_us(run, repeats=1, *, graph=None, dirty=False):
    for one in [run] if callable(run) else run:
        one()
    return 8.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.filterwarnings("ignore")
def test_benchmarks_of_the_kernels(monkeypatch, tmp_path):
    pytest.importorskip("triton", exc_type=ImportError)
    path = tmp_path / "out.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for module in (bench_attention, bench_paging_cost):
        monkeypatch.setattr(module, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(bench_attention, "cold_median_us", eight_us)
    monkeypatch.setattr(bench_attention, "read_us", lambda *_: 4.0)
    shape = bench_attention.Shape(4, 2, (33, 33), 1.05)
    monkeypatch.setattr(bench_attention, "SHAPES", {CAT_SHAPE: shape})
    monkeypatch.setattr(bench_attention.measure, "__defaults__", ("cpu",))
    assert bench_attention.main(["--json", str(path)]) == 0
    (row,) = checked(path)["tables"][0]["rows"]
    assert "triton_us" in row and "cudnn_error" in row

    tiny = models.Model("tiny", "opt", 2, 32, 2, 2, 16, 64, 100, 2048)
    setting = measure_paging.Setting(
        tiny,
        torch.float32,
        "cpu",
        2,
        attention=((2, 64),),
        batch=2,
        context=64,
        block_sizes=(8, 16),
        swap_tokens=32,
        swap_runs=2,
    )
    monkeypatch.setattr(bench_paging_cost, "Setting", lambda: setting)
    limits = gpu_timing.PinnedBandwidth(5e10, 4e10)
    monkeypatch.setattr(bench_paging_cost, "pinned_bandwidth", lambda: limits)
    monkeypatch.setattr(bench_paging_cost, "attention_kernel", lambda _: paged_attention_kernel)
    attention = {
        "batch": 2,
        "context": 64,
        "block_size": 16,
        "floor_us": 1.0,
        "paged_us": 2.0,
        "contiguous_us": 1.5,
        "cudnn_us": None,
        "flash_us": 1.0,
    }
    blocks = {key: value for key, value in attention.items() if key not in ("cudnn_us", "flash_us")}
    monkeypatch.setattr(
        bench_paging_cost,
        "measure_attention",
        lambda *_, peers=True, **more: attention if peers else blocks | more,
    )
    swap = {"block_size": 8, "blocks": 4, "num_bytes": 4096}
    times = ("recompute", "swap_in", "swap_out")
    swap |= {f"{name}{kind}_ms": 1.0 for name in times for kind in ("", "_median")}
    counts = iter(setting.block_sizes)
    monkeypatch.setattr(bench_paging_cost, "RandomOPT", lambda *_: None)
    monkeypatch.setattr(
        bench_paging_cost, "measure_swap", lambda *_: swap | {"block_size": next(counts)}
    )
    moves = {
        "what": "copy",
        "layers": 2,
        "blocks": 1,
        "num_bytes": 1,
        "fused_us": 1.0,
        "plain_us": 2.0,
        "call_us": None,
        "limit_us": 0.5,
    }
    monkeypatch.setattr(bench_paging_cost, "measure_moves", lambda *_: [moves])
    monkeypatch.setattr(
        bench_paging_cost, "swap_table", lambda *_: bench_paging_cost.moves_table([moves], "")
    )
    assert bench_paging_cost.main(["--json", str(path)]) == 0
    assert [table["id"] for table in checked(path)["tables"]] == [*bench_paging_cost.PARTS]


# ---- a sweep and what report.py makes of it -----------------------------------------------------


def test_a_sweep_and_its_merge(quick, tmp_path):
    cells = tmp_path / "cells"
    arguments = ["--script", "capacity.py", "--out", str(cells), "--workload", "30,20"]
    assert sweep.main([*arguments, "--block-size", "16,5000", "--cell", "0"]) == 0
    assert sweep.main([*arguments, "--block-size", "16,5000", "--cell", "1"]) == 2
    found = {path.name: checked(path) for path in cells.iterdir()}
    (error,) = [one["error"] for one in found.values() if "error" in one]
    assert error == "capacity.py: error: --block-size 5000: at most 4,096"
    merged = tmp_path / "merged.json"
    assert report.main([*map(str, cells.iterdir()), "--json", str(merged)]) == 1
    assert [check["ok"] for check in checked(merged)["checks"]] == [True, False]


@pytest.mark.parametrize("script", CHOSEN)
def test_what_is_shown_of_a_merge_are_columns_that_there_are(script):
    tables = SCHEMA_FILE["$defs"][script]["$defs"]
    for name, _, columns in CHOSEN[script]:
        assert set(columns) <= tables[name]["properties"]["rows"]["items"]["properties"].keys()


# ---- documents that are wrong -----------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "out.json"
    assert reproduce.main(["--figure", "table1", "--json", str(path)]) == 0
    return checked(path)


def without(*path):
    def change(found):
        *way, last = path
        for key in way:
            found = found[key]
        del found[last]

    return change


def put(value, *path):
    def change(found):
        *way, last = path
        for key in way:
            found = found[key]
        found[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(
            without(key)
            for key in (
                "schema",
                "script",
                "options",
                "seeds",
                "versions",
                "setting",
                "tables",
                "checks",
                "exit_code",
                "elapsed_s",
                "notes",
            )
        ),
        put("pagedattention-sim/2", "schema"),
        put("main.py", "script"),
        put(1, "unknown"),
        put(3, "exit_code"),
        put(-1.0, "elapsed_s"),
        put("0", "seeds", 0),
        put([0, 0], "seeds"),
        put({}, "options", "figure"),
        put({}, "versions"),
        put("x", "error"),
        put(1, "setting", "unknown"),
        without("setting", "quick"),
        put("1", "setting", "seeds"),
        without("tables", 0, "id"),
        put("other", "tables", 0, "id"),
        put(1, "tables", 0, "more"),
        put([], "tables", 0, "index"),
        without("tables", 0, "rows", 0, "ours"),
        put(1, "tables", 0, "rows", 0, "more"),
        put("1", "tables", 0, "rows", 0, "ours"),
        put("maybe", "tables", 0, "rows", 0, "held"),
        without("checks", 0, "detail"),
        put("yes", "checks", 0, "ok"),
        put(1, "checks", 0, "more"),
    ],
)
def test_a_wrong_document_is_refused(sound, change):
    found = copy.deepcopy(sound)
    change(found)
    assert faults(found)


def test_two_tables_of_one_id_are_refused():
    with pytest.raises(ValueError, match="two tables have one id"):
        document("main.py", {}, setting={}, tables=[{"id": "a"}] * 2, exit_code=0, elapsed_s=0.0)


def test_options_are_those_that_decide_what_is_found(tmp_path):
    found = told(
        {
            "model": "a",
            "seed": 1,
            "json": tmp_path,
            "figures": None,
            "quiet": True,
            "format": "plain",
            "jobs": 2,
            "trace": tmp_path,
            "figure": ("1", "2"),
        }
    )
    assert found == {"model": "a", "seed": 1, "trace": str(tmp_path), "figure": ["1", "2"]}
