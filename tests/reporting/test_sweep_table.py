"""sweep.py --merge puts runs together: what it finds, in whatever order, and what it refuses."""

import json
import os
import random
from pathlib import Path

import pytest

import sweep
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.documents import SCHEMA, read_run
from vllm_sim.reporting.sweep_table import merge


def run(seed=0, block_size=16, script="capacity.py", batch=1.0, ok=True, **more):
    """A document as capacity.py might write it, of few figures."""
    rows = [
        {"counted": "paged", "tokens_per_request": None, "requests": batch + seed},
        {"counted": "max", "tokens_per_request": 9, "requests": 2, "text": "x", "right": True},
    ]
    table = {"id": "concurrency", "title": "t", "setting": "", "headers": []}
    return {
        "schema": SCHEMA,
        "script": script,
        "options": {"model": "opt-13b", "block_size": block_size, "seed": seed},
        "seeds": [seed],
        "versions": {"python": "3.11.2"},
        "setting": {"seed": seed},
        "tables": [table | {"index": ["counted"], "rows": rows}],
        "checks": [{"name": "holds", "ok": ok, "detail": "1 of 1"}],
        "exit_code": 0 if ok else 1,
        "elapsed_s": 1.0,
        **more,
    }


def sweep_of(*files):
    """The list of the cells of a sweep."""
    rows = [
        {"index": n, "file": file, "arguments": ["--seed", str(n)], "options": {"seed": 90 + n}}
        for n, file in enumerate(files)
    ]
    table = {"id": "cells", "title": "", "setting": "", "headers": [], "index": ["index"]}
    setting = {"script": "capacity.py", "num_cells": len(files)}
    return run(script="sweep.py", tables=[table | {"rows": rows}], setting=setting, checks=[])


@pytest.fixture
def folder(tmp_path):
    """Writes documents as files; returns their paths."""

    def write(**documents):
        paths = []
        for name, found in documents.items():
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps(found))
        return paths

    return write


@pytest.fixture
def four(folder):
    sizes = {"a": (0, 8, 10.0), "b": (2, 8, 10.0), "c": (0, 16, 4.0), "d": (2, 16, 4.0)}
    return folder(**{name: run(s, size, batch=batch) for name, (s, size, batch) in sizes.items()})


@pytest.fixture
def merged(capsys):
    """Merges by the command line: exit code, what it printed, what it wrote to stderr."""

    def call(paths, *options):
        code = sweep.main(["--merge", *map(str, paths), *options])
        printed = capsys.readouterr()
        assert printed.out.isascii() and printed.err.isascii()
        return code, printed.out, printed.err

    return call


def requests(paths):
    """The figures of one column: (row, block size) -> mean, lowest, highest, cells."""
    rows = merge(paths)[0]["concurrency"].rows
    return {(row[0], *row[2:-4]): row[-4:] for row in rows if row[1] == "requests"}


# ---- what it finds ------------------------------------------------------------------------------


def test_mean_and_spread_over_the_seeds_by_what_varies(four):
    tables, held = merge(four)
    headers = ("row", "column", "block_size", "mean", "lowest", "highest", "cells")
    assert tables["concurrency"].headers == headers and held
    found = requests(four)
    assert [*found] == [("paged", 8), ("paged", 16), ("max", 8), ("max", 16)]
    assert found["paged", 8] == (11.0, 10.0, 12.0, 2)
    assert {row[1] for row in tables["concurrency"].rows} == {"requests", "tokens_per_request"}
    assert tables["runs"].headers == ("file", "block_size", "seed", "result")
    assert tables["runs"].rows == [
        ("a.json", 8, 0, "1 check held"),
        ("b.json", 8, 2, "1 check held"),
        ("c.json", 16, 0, "1 check held"),
        ("d.json", 16, 2, "1 check held"),
    ]


def test_the_order_of_the_files_and_files_given_twice_change_nothing(four):
    for seed in range(20):
        paths = random.Random(seed).sample(four, 4)
        assert merge([*paths, paths[0]]) == merge(four)


def test_numbers_are_sorted_as_numbers_and_nothing_comes_first(folder):
    paths = folder(**{f"x{size}": run(0, size) for size in (128, 16, 8)}, none=run(0, None))
    assert [size for name, size in requests(paths) if name == "max"] == [None, 8, 16, 128]


def test_sums_do_not_depend_on_the_order(folder):
    values, means = [0.1, 1e16, -1e16, 0.3, 1e-9], set()
    for seed in range(10):
        order = random.Random(seed).sample(range(5), 5)
        paths = folder(**{f"f{at}": run(n, batch=values[n] - n) for at, n in enumerate(order)})
        means.add(requests(paths)["paged",][0])
    assert len(means) == 1


def test_the_same_cell_twice_counts_once_and_two_results_of_it_are_refused(four, folder):
    (again,) = folder(again=json.loads(four[0].read_text()) | {"elapsed_s": 9.0})
    assert merge([*four, again]) == merge(four)
    (other,) = folder(other=run(0, 8, batch=10.5))
    with pytest.raises(UsageError, match=r"a\.json and .*other\.json are the same cell with other"):
        merge([other, *four])


def test_a_failed_cell_and_one_that_did_not_run_are_named(four, folder, merged):
    error = {"exit_code": 2, "error": "no\u00e9 memory", "tables": [], "checks": []}
    bad = folder(failed=run(3, 8, ok=False), broken=run(4, 8, **error), odd=run(5, 8, exit_code=1))
    code, printed, _ = merged([*four, *bad])
    assert code == 1 and "capacity.py: 4 of 7 cells held\n" in printed
    lines = {line.split()[0]: line.partition("     ")[2] for line in printed.splitlines() if line}
    assert lines["failed.json"].endswith(" failed: holds (1 of 1)")
    assert lines["broken.json"].endswith(" 'did not run: no\\xe9 memory'")
    assert lines["odd.json"].endswith(" failed: a check")
    assert requests([*four, *bad])["paged", 8] == (8.0, 4.0, 12.0, 4)


def test_a_list_stands_for_its_cells_and_names_those_that_are_missing(four, folder, merged):
    (whole,) = folder(**{"sweep-1": sweep_of("a.json", "b.json", "c.json", "d.json")})
    assert merge([whole]) == merge([*four, whole]) == merge(four)
    (part,) = folder(**{"sweep-2": sweep_of("a.json", "none.json", "x" * 300)})
    code, printed, _ = merged([part])
    assert code == 1 and "capacity.py: 1 of 3 cells held\n" in printed
    assert "none.json" in printed and "missing: --seed 1\n" in printed
    assert "missing: --seed 2\n" in printed
    (none,) = folder(**{"sweep-3": sweep_of("none.json")})
    code, printed, _ = merged([none])
    assert code == 1 and "capacity.py: 0 of 1 cell held\n" in printed


@pytest.mark.parametrize("file", ["../a.json", "/tmp/a.json"])
def test_a_list_leads_nowhere_else(folder, tmp_path, file):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "sweep-1.json").write_text(json.dumps(sweep_of(file)))
    folder(a=run())
    (row,) = merge([tmp_path / "below" / "sweep-1.json"])[0]["runs"].rows
    assert row == ("a.json", "missing: --seed 0")


# ---- what it shows and writes -------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["plain", "github", "latex"])
def test_formats(four, fmt, merged):
    code, printed, _ = merged(four, "--format", fmt, "--table", "concurrency")
    assert code == 0 and "11.00" in printed and "4 of 4 cells held" in printed
    if fmt == "latex":
        outside = "".join(part.partition("\\begin")[0] for part in printed.split("\\end{tabular}"))
        assert all(line[:1] == "%" for line in outside.splitlines() if line)


def test_tables_are_shown_that_are_asked_for(four, merged):
    _, printed, _ = merged(four)
    assert "11.00" not in printed and "--table shows one of runs, concurrency\n" in printed
    asked = ["--table", "concurrency"]
    _, printed, _ = merged(four, *asked, *asked)
    assert sum(line.startswith(("paged ", "max ")) for line in printed.splitlines()) == 6
    found = merged(four, *asked, "--table", "slots")
    error = "sweep.py: error: --table 'slots': the files have runs, concurrency\n"
    assert found == (2, "", error)


def test_all_tables_are_written(four, folder, merged, tmp_path):
    out = tmp_path / "out.json"
    (bad,) = folder(bad=run(5, 8, ok=False))
    assert merged([*four, bad], "--json", str(out))[0] == 1
    found = json.loads(out.read_text())
    assert (found["script"], found["exit_code"], found["seeds"]) == ("sweep.py", 1, [])
    assert [table["id"] for table in found["tables"]] == ["runs", "concurrency"]
    row = next(one for one in found["tables"][1]["rows"] if one["column"] == "requests")
    means = {"mean": 28 / 3, "lowest": 6.0, "highest": 12.0, "cells": 3}
    assert row == {"row": "paged", "column": "requests", "block_size": 8} | means


def test_options_are_shown_in_a_cell_of_ascii(folder):
    values = ["\u00e9\U0001f600", "a\nb", [1, 2], [3], ["a b", "\u00e9"]]
    paths = folder(**{f"x{n}": run(options={"of": value}) for n, value in enumerate(values)})
    shown = {row[1] for row in merge(paths)[0]["runs"].rows}
    assert shown == {r"'\xe9\U0001f600'", r"'a\nb'", "1 2", "3", r"'a b \xe9'"}


# ---- what it refuses --------------------------------------------------------------------------


def changed(**changes):
    return json.dumps(run() | changes)


def with_row(**row):
    found = run()
    found["tables"][0]["rows"][0] |= row
    return json.dumps(found)


OTHER = "not a document of --json: "
TEXTS = {
    "": OTHER + "Expecting value",
    '{"schema": "pagedatt': OTHER + "Unterminated",
    json.dumps(run())[:-40]: OTHER,
    "NaN": OTHER + "NaN is no finite number",
    "[" * 100_000: OTHER + "maximum recursion",
    "9" * 5000: OTHER + "9999999999999999999999999999999999999999 is no finite number",
    "[]": OTHER,
    "{}": OTHER + "'schema'",
    '{"command": "python main.py", "output": {}}': OTHER + "'schema'",  # of results/
    changed(schema="pagedattention-sim/1"): OTHER + "its schema is not pagedattention-sim/2",
    changed(schema=None): "its schema is not",
    changed(options=[]): OTHER,
    changed(tables={"a": 1}): OTHER,
    changed(tables=[1]): OTHER,
    changed(tables=[{"id": "a", "rows": [{}]}]): OTHER + "'index'",
    changed(tables=[{"id": "a", "index": ["b"], "rows": [{}]}]): OTHER + "'b'",
    changed(
        tables=[{"id": "a", "index": ["b"], "rows": [{"b": 1, "c": 1}] * 2}]
    ): "rows of table a",
    with_row(requests=10**400): "no finite number",
    with_row(requests=7).replace(": 7}", ": 1e999}"): "1e999 is no finite number",
    changed(checks=[{"name": "a"}]): OTHER + "'ok'",
    changed(exit_code="three"): OTHER,
    json.dumps(sweep_of(None)): OTHER,
    json.dumps(sweep_of("")): OTHER,
    json.dumps(sweep_of("..")): OTHER,
}


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_what_is_no_document_takes_one_line(number, tmp_path, refused):
    text, says = [*TEXTS.items()][number]
    path, sound = tmp_path / "bad.json", tmp_path / "sound.json"
    path.write_text(text, encoding="utf-8")
    sound.write_text(json.dumps(run(1)))
    out = tmp_path / "out.json"
    for given in ([path], [path, sound], [sound, path]):
        reason = refused(sweep, "--merge", *given, "--json", out)
        assert says in reason and len(reason) < 700
    assert not out.exists()


def test_scripts_are_not_mixed(folder, refused):
    paths = folder(a=run(0), b=run(1, script="main.py"))
    for given in (paths, paths[::-1]):
        reason = refused(sweep, "--merge", *given)
        assert "a.json is of capacity.py, " in reason
        assert "b.json is of main.py: merge one script at a time" in reason


def test_what_is_no_file_takes_one_line(tmp_path, four, refused):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    names = ["folder", "pipe", "loop", "none", "a\0b", "x" * 300, "a.json/x", "bytes", "two\nlines"]
    for name in names:
        assert OTHER in refused(sweep, "--merge", *four, tmp_path / name), name
    assert refused(sweep, "--merge", *four, "--json", tmp_path / "loop")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="more than 64 MiB"):
        read_run(path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--merge"], "argument --merge: expected at least one argument"),
        (["--merge", "a.json", "--format", "html"], "argument --format"),
        (["--merge", "a.json", "--bogus"], "unrecognized arguments: --bogus"),
        (["--merge", "a.json", "--json", "none/x.json"], "cannot write none/x.json"),
        (["--merge", "a.json", "--json", "."], "cannot write ."),
        (["--json", "x.json"], "are for --merge: each cell writes a file of its own"),
        (["--table", "saving"], "are for --merge"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, says, four, monkeypatch, refused):
    monkeypatch.chdir(four[0].parent)
    assert says in refused(sweep, *arguments)


def test_the_script_itself(run_script, four):
    done = run_script("sweep.py", "--merge", *four, cwd=Path("/"))
    assert (done.returncode, done.stderr) == (0, "") and "4 of 4 cells held" in done.stdout
