"""report.py puts runs together: what it finds, in whatever order, and what it refuses."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import report
from vllm_sim.reporting import sweep_table
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.documents import SCHEMA
from vllm_sim.reporting.sweep_table import merge, read_document, shown

ROOT = Path(__file__).resolve().parents[2]


def run(seed=0, block_size=16, script="capacity.py", batch=1.0, ok=True, **more):
    """A document as capacity.py might write it, of few figures."""
    return {
        "schema": SCHEMA,
        "script": script,
        "options": {"model": "opt-13b", "block_size": block_size, "seed": seed},
        "seeds": [seed],
        "versions": {"python": "3.11.2"},
        "setting": {"seed": seed},
        "tables": [
            {
                "id": "concurrency",
                "title": "t",
                "setting": "",
                "headers": [],
                "index": ["counted"],
                "rows": [
                    {"counted": "paged", "tokens_per_request": None, "requests": batch + seed},
                    {
                        "counted": "max",
                        "tokens_per_request": 9,
                        "requests": 2,
                        "text": "x",
                        "right": True,
                    },
                ],
            }
        ],
        "checks": [{"name": "holds", "ok": ok, "detail": "1 of 1"}],
        "exit_code": 0 if ok else 1,
        "elapsed_s": 1.0,
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    """Writes documents as files; returns their paths."""

    def write(**documents):
        paths = []
        for name, found in documents.items():
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps(found))
            paths.append(path)
        return paths

    return write


@pytest.fixture
def four(folder):
    return folder(
        a=run(0, 8, batch=10.0),
        b=run(2, 8, batch=10.0),
        c=run(0, 16, batch=4.0),
        d=run(2, 16, batch=4.0),
    )


def figures(merged, metric="requests"):
    return {
        (one["row"]["counted"], one["parameters"].get("block_size")): one
        for one in merged.rows
        if one["metric"] == metric
    }


# ---- what it finds ------------------------------------------------------------------------------


def test_mean_and_spread_over_the_seeds_by_what_varies(four):
    merged = merge(four)
    assert (merged.script, merged.parameters, merged.seeds) == (
        "capacity.py",
        ("block_size",),
        [0, 2],
    )
    found = figures(merged)
    assert [*found] == [("paged", 8), ("paged", 16), ("max", 8), ("max", 16)]
    assert found["paged", 8] == {
        "parameters": {"block_size": 8},
        "table": "concurrency",
        "row": {"counted": "paged"},
        "metric": "requests",
        "mean": 11.0,
        "lowest": 10.0,
        "highest": 12.0,
        "spread": 2.0,
        "seeds": [0, 2],
    }
    assert {one["metric"] for one in merged.rows} == {"requests", "tokens_per_request"}
    assert [(check["name"], check["ok"]) for check in merged.checks] == [
        (f"{name}.json", True) for name in "abcd"
    ]


def test_the_order_of_the_files_and_files_given_twice_change_nothing(four):
    first = merge(four)
    for seed in range(20):
        paths = random.Random(seed).sample(four, 4)
        assert merge([*paths, paths[0]]) == first


def test_numbers_are_sorted_as_numbers_and_nothing_comes_first(folder):
    paths = folder(**{f"x{size}": run(0, size) for size in (128, 16, 8)}, none=run(0, None))
    assert [size for name, size in figures(merge(paths)) if name == "max"] == [None, 8, 16, 128]


def test_sums_do_not_depend_on_the_order(folder):
    values = [0.1, 1e16, -1e16, 0.3, 1e-9]
    for seed in range(10):
        order = random.Random(seed).sample(range(5), 5)
        paths = folder(**{f"f{at}": run(n, batch=values[n] - n) for at, n in enumerate(order)})
        means = {one["mean"] for one in merge(paths).rows if one["row"]["counted"] == "paged"}
        if seed == 0:
            first = means
        assert means == first


def test_the_same_cell_twice_counts_once_and_two_results_of_it_are_refused(four, folder):
    (again,) = folder(again=json.loads(four[0].read_text()) | {"elapsed_s": 9.0})
    assert merge([*four, again]).rows == merge(four).rows
    (other,) = folder(other=run(0, 8, batch=10.5))
    with pytest.raises(UsageError, match=r"a\.json and .*other\.json are the same cell with other"):
        merge([other, *four])


def test_a_failed_cell_and_one_that_did_not_run_are_named(four, folder, capsys):
    bad = folder(
        failed=run(3, 8, ok=False),
        broken=run(4, 8, exit_code=2, error="no\u00e9 memory", tables=[], checks=[], setting={}),
    )
    assert report.main([*map(str, [*four, *bad])]) == 1
    printed = capsys.readouterr().out
    assert "4 of 6 cells held\n" in printed and printed.isascii()
    assert "failed.json: failed: holds (1 of 1)" in printed
    assert "broken.json: 'did not run: no\\xe9 memory'" in printed
    assert figures(merge([*four, *bad]))["paged", 8]["seeds"] == [0, 2, 3]


def plan(*files):
    rows = [{"cell": n, "file": f, "arguments": f"--seed {n}"} for n, f in enumerate(files)]
    table = {
        "id": "cells",
        "title": "",
        "setting": "",
        "headers": [],
        "index": ["cell"],
        "rows": rows,
    }
    return run(
        script="sweep.py",
        options={"script": "capacity.py"},
        seeds=[],
        tables=[table],
        setting={"script": "capacity.py", "num_cells": len(files)},
        checks=[],
    )


def test_a_plan_stands_for_its_cells_and_names_those_that_are_missing(four, folder, capsys):
    (whole,) = folder(**{"sweep-1": plan("a.json", "b.json", "c.json", "d.json")})
    assert merge([whole]).rows == merge([*four, whole]).rows == merge(four).rows
    (part,) = folder(**{"sweep-2": plan("a.json", "none.json")})
    assert report.main([str(part)]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 cells held\nnone.json: missing: --seed 1\n" in printed
    (long,) = folder(**{"sweep-3": plan("x" * 300, "a.json")})
    assert [check["ok"] for check in merge([long]).checks] == [True, False]


def test_a_sweep_of_which_no_cell_is_done_yet(folder, capsys):
    (path,) = folder(**{"sweep-1": plan("none.json")})
    assert report.main([str(path)]) == 1
    assert "0 of 1 cells held\nnone.json: missing: --seed 0\n" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["../a.json", "/etc/passwd", "", None, 1, ".", ".."])
def test_a_plan_leads_nowhere_else(folder, file):
    found = plan("a.json")
    found["tables"][0]["rows"][0]["file"] = file
    (path,) = folder(**{"sweep-1": found})
    with pytest.raises(UsageError, match="a cell has no file"):
        merge([path])


# ---- what it prints -----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["plain", "github", "latex"])
def test_formats(four, fmt, capsys):
    assert report.main([*map(str, four), "--format", fmt]) == 0
    printed = capsys.readouterr().out
    assert "11.00" in printed and "4 of 4 cells held" in printed and printed.isascii()
    if fmt == "latex":
        outside = printed[: printed.index("\\begin")] + printed[printed.index("\\end{tab") :]
        assert all(line[:1] in "%\\" for line in outside.splitlines() if line)


def test_a_table_asked_for_is_shown_whole(four, capsys):
    merged = merge(four)
    assert len(shown(merged, []).rows) == 4
    assert len(shown(merged, ["concurrency"]).rows) == 6
    asked = ["--table", "concurrency"]
    assert report.main([*map(str, four), *asked, *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("concurrency: ") for line in lines) == 6
    assert report.main([*map(str, four), *asked, "--table", "slots"]) == 2
    error = "report.py: error: --table 'slots': the files have concurrency\n"
    assert capsys.readouterr() == ("", error)


def test_its_own_json_is_not_among_the_files(four, capsys):
    before = four[0].read_bytes()
    assert report.main([*map(str, four), "--json", str(four[0])]) == 2
    assert "is one of the files to merge" in capsys.readouterr().err
    assert four[0].read_bytes() == before


def test_unicode_is_shown_in_ascii(folder, capsys):
    found = [run(0, "\u00e9\U0001f600"), run(0, "a\nb")]
    assert report.main([*map(str, folder(a=found[0], b=found[1]))]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii() and "'\\xe9\\U0001f600'" in printed and "'a\\nb'" in printed


def test_an_option_with_several_values_is_shown_in_one_cell(folder):
    values = [[1, 2], [3], ["a b", "\u00e9"]]
    paths = folder(
        **{
            f"x{n}": run(script="main.py", options={"scenario": value, "seed": 0})
            for n, value in enumerate(values)
        }
    )
    table = shown(merge(paths), ["concurrency"])
    at = table.headers.index("scenario")
    assert {row[at] for row in table.rows} == {"1 2", "3", r"a b '\xe9'"}


# ---- what it refuses --------------------------------------------------------------------------


def changed(**changes):
    return json.dumps(run() | changes)


def with_row(**row):
    found = run()
    found["tables"][0]["rows"][0] |= row
    return json.dumps(found)


TEXTS = {
    "": "not JSON",
    '{"schema": "pagedatt': "not JSON",
    json.dumps(run())[:-40]: "not JSON",
    "NaN": "NaN is no JSON",
    "[" * 100_000: "not JSON",
    "9" * 5000: "not JSON",
    "[]": "it has no schema",
    "{}": "it has no schema",
    '{"setting": {}, "rows": [], "elapsed_s": 1.0}': "it has no schema",  # from before it
    changed(schema="pagedattention-sim/2"): 'its schema is "pagedattention-sim/2", not',
    changed(schema=None): "its schema is null, not",
    changed(schema="x" * 10_000): "its schema is",
    changed(script="benchmarks/bench_manager.py"): "of 'benchmarks/bench_manager.py'; main.py,",
    changed(script="\u2028" * 200): "can be merged",
    changed(script=1): "script is of another type",
    changed(options=[]): "options is of another type",
    changed(options={"a": {}}): "option 'a' is no value",
    changed(seeds=["0"]): "seeds are not integers",
    changed(tables={}): "tables is of another type",
    changed(tables=[1]): "a table has no id",
    changed(tables=[{"id": "a", "rows": []}]): "table 'a' has no index",
    changed(tables=[{"id": "a", "index": [], "rows": {}}]): "table 'a' has no rows",
    changed(tables=[{"id": "a", "index": ["b"], "rows": [{}]}]): "lacks a key of the index",
    changed(tables=[{"id": "a", "index": ["b"], "rows": [{"b": 1}] * 2}]): "two rows are [1]",
    with_row(counted=["x"]): "'counted' says not which row it is",
    with_row(requests=10**400): "'requests' is no finite number",
    with_row(requests=7).replace(": 7}", ": 1e999}"): "'requests' is no finite number",
    changed(checks=[{"name": "a"}]): "a check has no name, ok and detail",
    changed(exit_code=3): "exit_code is not 0, 1 or 2",
    changed(exit_code=True): "exit_code is not 0, 1 or 2",
    changed(error=1): "error is not text",
}


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_what_is_no_document_takes_one_line(number, tmp_path, capsys):
    text, says = [*TEXTS.items()][number]
    path, sound = tmp_path / "bad.json", tmp_path / "sound.json"
    path.write_text(text, encoding="utf-8")
    sound.write_text(json.dumps(run(1)))
    out = tmp_path / "out.json"
    for given in ([path], [path, sound], [sound, path]):
        assert report.main([*map(str, given), "--json", str(out)]) == 2
        printed, errors = capsys.readouterr()
        assert printed == "" and errors.count("\n") == 1 and len(errors) < 700
        assert errors.startswith("report.py: error: ") and says in errors and errors.isascii()
    assert not out.exists()


def test_scripts_are_not_mixed(folder, capsys):
    paths = folder(a=run(0), b=run(1, script="main.py"))
    for given in (paths, paths[::-1]):
        assert report.main([*map(str, given)]) == 2
        errors = capsys.readouterr().err
        assert "a.json is of capacity.py, " in errors and "b.json of main.py: merge one" in errors


def test_what_is_no_file_takes_one_line(tmp_path, four, capsys):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    for name, says in {
        "folder": "a directory; name its files, folder/*.json",
        "pipe": "not a regular file",
        "loop": "cannot be read",
        "none": "cannot be read",
        "a\0b": "cannot be read",
        "x" * 300: "cannot be read",
        "a.json/x": "cannot be read",
        "bytes": "not UTF-8",
        "two\nlines": "cannot be read",
    }.items():
        assert report.main([*map(str, four), str(tmp_path / name)]) == 2
        printed, errors = capsys.readouterr()
        assert printed == "" and errors.count("\n") == 1 and says in errors, name


def test_more_files_than_can_be_merged_are_not_read(monkeypatch):
    monkeypatch.setattr(sweep_table, "read_document", None)
    with pytest.raises(UsageError, match="20,001 files: at most 20,000"):
        merge([Path("a.json")] * 20_001)


def test_a_recording_is_told_from_what_it_holds(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text('{"command": "python main.py", "commit": "f", "output": {}}')
    with pytest.raises(UsageError, match="a recording: what --json wrote is under its output"):
        read_document(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="more than 64 MiB"):
        read_document(path)


def test_a_loop_of_links_takes_one_line(four, monkeypatch, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    out = str(tmp_path / "out.json")
    assert report.main([*map(str, four), str(tmp_path / "loop"), "--json", out]) == 2
    assert report.main([*map(str, four), "--json", str(tmp_path / "loop")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 2 and not os.path.exists(out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: FILE"),
        (["a.json", "--format", "html"], "argument --format"),
        (["a.json", "--bogus"], "unrecognized arguments"),
        (["a.json", "--json", "none/x.json"], "cannot write none/x.json"),
        (["a.json", "--json", "."], "cannot write ."),
    ],
)
def test_arguments_that_cannot_be_used(arguments, says, four, monkeypatch, capsys):
    monkeypatch.chdir(four[0].parent)
    assert report.main(arguments) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.count("\n") == 1 and says in errors


def test_the_script_itself(four):
    done = subprocess.run(
        [sys.executable, ROOT / "report.py", *four], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and "4 of 4 cells held" in done.stdout
