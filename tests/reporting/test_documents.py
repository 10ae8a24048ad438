"""documents.py: what every script writes with --json is as docs/json.md tells it."""

import json
import math
import re
from pathlib import Path

import bench_manager
import bench_serving
import pytest

import capacity
import main
import reproduce
from vllm_sim import paper
from vllm_sim.evaluation.experiments import Run
from vllm_sim.reporting.documents import document, measured, read_run, rows_table, told
from vllm_sim.scenarios import baseline, paged, sampling

PAGE = (Path(main.__file__).parent / "docs" / "json.md").read_text(encoding="ascii")
ENVELOPE, TABLE = (
    re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)))
    for part in PAGE.split("\n## ")[1:3]
)
SCRIPTS = {
    main: ["--device", "cpu", "--model", "opt-125m", "--num-blocks", "140", "--seed", "3"],
    capacity: ["--workload", "30,20"],
    reproduce: ["--figure", "table1", "--figure", "2", "--seeds", "2"],
    bench_manager: ["--repeats", "1"],
    bench_serving: ["--repeats", "1"],
}
OF_ONE = {main: {"scenarios"}, reproduce: {"notes"}, capacity: {"answer"}}


@pytest.fixture
def quick(monkeypatch):
    """Short steady states, and benchmarks of one small run."""
    for module, warmup, iterations in ((baseline, 50, 200), (paged, 100, 100), (sampling, 20, 30)):
        monkeypatch.setattr(module, "WARMUP", warmup)
        for name in {"ITERATIONS", "BASELINE_ITERATIONS"} & vars(module).keys():
            monkeypatch.setattr(module, name, iterations)
    monkeypatch.setattr("vllm_sim.sizing.concurrency.COMPLETIONS", 100)
    monkeypatch.setattr("vllm_sim.sizing.concurrency.ENOUGH_REQUESTS", 50)
    monkeypatch.setattr(bench_manager, "WORKLOADS", {"W1": (bench_manager.WORKLOADS["W1"][0], 2)})
    run = Run(paper.VLLM, "opt-13b", "ShareGPT", 2.0, 60.0)
    monkeypatch.setattr(bench_serving, "RUNS", {"a": (run, 1, True), "b": (run, 2, False)})
    short = {**paper.ARTIFACT_RUNS["Fig. 2"], "seconds": 60, "window": (20, 60)}
    monkeypatch.setitem(paper.ARTIFACT_RUNS, "Fig. 2", short)


def finite(value):
    """Whether no number in it is infinite or none at all."""
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_writes_what_the_page_says(script, quick, tmp_path, capsys):
    path = tmp_path / "out.json"
    code = script.main([*SCRIPTS[script], "--json", str(path)])
    found = json.loads(path.read_text(encoding="ascii"))
    assert found.keys() == {*ENVELOPE} | OF_ONE.get(script, set())
    assert found["script"].endswith(f"{script.__name__}.py") and found["exit_code"] == code
    assert finite(found) and found["seeds"] == {main: [3], reproduce: [0, 1]}.get(script, [0])
    for check in found["checks"]:
        assert check.keys() - {"scenario"} == {"name", "ok", "detail"}
    for table in found["tables"]:
        assert {*table} - {"scenario", "answer"} == {*TABLE}
        columns = dict.fromkeys(key for row in table["rows"] for key in row)
        assert len(columns) == len(table["headers"]) and table["rows"]
        for row in table["rows"]:
            assert {*table["index"]} <= row.keys() <= columns.keys()
            assert all(re.fullmatch(r"[a-z0-9_]+", key) for key in row)
    assert read_run(path).code == code  # a merge takes it


def test_options_are_those_that_decide_what_is_found(tmp_path):
    kept = {"model": "a", "seed": 1, "figure": ("1", "2"), "trace": tmp_path, "rate": math.inf}
    looks = {"json": tmp_path, "figures": None, "quiet": True, "format": "plain", "jobs": 2}
    assert told(kept | looks) == kept | {
        "figure": ["1", "2"],
        "trace": str(tmp_path),
        "rate": "inf",
    }


def test_two_tables_of_one_id_are_refused():
    with pytest.raises(ValueError, match="two tables have one id"):
        document("main.py", {}, setting={}, tables=[{"id": "a"}] * 2, exit_code=0, elapsed_s=0.0)


def test_rows_of_a_benchmark_are_tables_and_all_else_is_its_setting():
    found = measured(
        "a.py", {}, {"rows": [{"a": 1}, {"a": 2, "b": 3}], "c": 4}, {"rows": 1}, 0, 2.0
    )
    assert (found["setting"], found["seeds"], found["elapsed_s"]) == ({"c": 4}, [0], 2.0)
    assert found["tables"] == [rows_table("rows", "rows", [{"a": 1}, {"a": 2, "b": 3}])]
    assert (found["tables"][0]["headers"], found["tables"][0]["index"]) == (["a", "b"], ["a"])
