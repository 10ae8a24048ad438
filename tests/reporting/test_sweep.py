"""sweep.py and its cells: which they are, what runs them, and what becomes of those that fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sweep
from vllm_sim.reporting import sweep_cells
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.documents import document
from vllm_sim.reporting.sweep_cells import MAX_CELLS, write_list

SWEEP = Path(sweep.__file__)
CAPACITY = ["--script", "capacity.py", "--workload", "30,20", "--quiet"]  # a second a cell
TWO = [*CAPACITY, "--block-size", "16,32"]
MANY = ",".join(map(str, range(1, 102)))


def expand(script, arguments):
    return sweep_cells.expand(script, sweep.PARSERS[script](), arguments)


@pytest.fixture(autouse=True)
def no_task(monkeypatch):
    monkeypatch.delenv(sweep.TASK, raising=False)


def documents(folder):
    """What lies in a folder: the plan apart."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    plans = [name for name in found if name.startswith("sweep-")]
    return found.pop(plans[0]) if len(plans) == 1 else None, found


# ---- which cells ------------------------------------------------------------------------------


def test_the_first_option_varies_slowest_and_both_ways_to_give_a_value_count():
    cells = expand("main.py", ["--model=opt-13b,opt-66b", "--seed", "0,1,2", "--device", "cpu"])
    assert [cell.index for cell in cells] == [*range(6)]
    assert [(c.options["model"], c.options["seed"]) for c in cells] == [
        (model, seed) for model in ("opt-13b", "opt-66b") for seed in (0, 1, 2)
    ]
    assert cells[4].line == "--model=opt-66b --seed=1 --device=cpu"
    assert cells[4].file.startswith("main-model-opt-66b-seed-1-")
    assert len({cell.file for cell in cells}) == 6


def test_a_sweep_that_grows_keeps_the_files_of_its_cells():
    few = expand("main.py", ["--seed", "0,1", "--block-size", "8,16"])
    more = expand("main.py", ["--block-size", "8,16,32", "--seed", "0,1,2"])
    for cell in few:
        (same,) = [other for other in more if other.options == cell.options]
        assert same.file == cell.file


def test_the_list_of_a_sweep_is_named_after_its_cells(tmp_path):
    for arguments in (["--seed", "0,1"], ["--seed=0,1"], ["--seed", "0,1,2"]):
        write_list("main.py", expand("main.py", arguments), tmp_path)
    assert len(os.listdir(tmp_path)) == 2


def test_flags_repeated_options_and_workloads():
    (one,) = expand("main.py", [])
    assert one.arguments == () and one.file.startswith("main-")
    cells = expand("main.py", ["--scenario", "1", "--scenario", "2,3", "--quiet"])
    assert [cell.options["scenario"] for cell in cells] == [[1, 2], [1, 3]]
    cells = expand("capacity.py", ["--workload", "sharegpt/512,256"])
    assert [cell.options["workload"] for cell in cells] == ["sharegpt", "512,256"]
    cells = expand("capacity.py", ["--lengths", "fixed,geometric"])
    assert [cell.options["lengths"] for cell in cells] == ["fixed", "geometric"]
    cells = expand("reproduce.py", ["--figure", "2,12", "--quick", "--lengths", "a,b.csv"])
    assert [cell.options["figure"] for cell in cells] == [["2"], ["12"]]
    assert cells[0].options["lengths"] == ["a,b.csv"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seed", "0,,1"], "cell 1: argument --seed: '' is not an integer"),
        (["--seed", "0,0"], "cells 0 and 1 are the same: --seed=0"),
        (["--seed", "0,x"], "cell 1: argument --seed: 'x' is not an integer"),
        (["--seed", "0,00"], "cells 0 and 1 are the same"),
        (["--seed", "-1"], "cell 0: argument --seed: '-1' is not"),
        (["--seed", "1,-1"], "cell 1: argument --seed: '-1' is not"),
        (["--seed"], "cell 0: argument --seed: expected one argument"),
        (["--bogus", "1,2"], "cell 0: unrecognized arguments: --bogus"),
        (["extra"], "unrecognized arguments: extra"),
        (["--quiet", "extra"], "cell 0: "),
        (["--json", "x.json"], "--json is not for a sweep"),
        (["--figures=x"], "--figures is not for a sweep"),
        (["--timeline"], "--timeline is not for a sweep"),
        (["--seed", MANY, "--num-blocks", MANY], f"at most {MAX_CELLS:,}"),
        (["--model", "opt-13b,\u00e9"], "invalid choice"),
    ],
)
def test_what_is_no_sweep_is_refused_before_anything_runs(arguments, says, tmp_path, refused):
    with pytest.raises(UsageError) as caught:
        expand("main.py", arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert refused(sweep, "--out", tmp_path / "new", *arguments)
    assert os.listdir(tmp_path) == []


# ---- which cell -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "arguments", "says"),
    [
        (None, ["--cell", "2"], "--cell or SLURM_ARRAY_TASK_ID 2: the sweep has cells 0 to 1"),
        (None, ["--cell", "-1"], "argument --cell"),
        (None, ["--cell", "x"], "argument --cell: 'x' is not the number of a cell"),
        (None, ["--cell", "9" * 5000], "is not the number of a cell"),
        (None, ["--cell=\u0663"], "is not the number of a cell"),
        ("2", [], "SLURM_ARRAY_TASK_ID 2: the sweep has cells 0 to 1"),
        ("-1", [], "argument --cell: '-1' is not the number of a cell"),
        ("two\nlines", [], "argument --cell: "),
        ("1", ["--cell", "7"], "SLURM_ARRAY_TASK_ID 7: the sweep has cells 0 to 1"),
    ],
)
def test_a_cell_that_is_not_there_takes_one_line(
    task, arguments, says, monkeypatch, tmp_path, refused
):
    if task is not None:
        monkeypatch.setenv(sweep.TASK, task)
    assert says in refused(sweep, *TWO, "--out", tmp_path / "new", *arguments)
    assert os.listdir(tmp_path) == []


def test_a_list_runs_nothing(tmp_path, capsys):
    assert sweep.main([*TWO, "--out", str(tmp_path / "new"), "--list"]) == 0
    printed = capsys.readouterr().out
    assert "\n2 cells: sbatch --array=0-1 " in printed
    assert printed.count("python capacity.py") == 2 and os.listdir(tmp_path) == []
    assert sweep.main(["--list"]) == 0
    assert "\n1 cell: sbatch --array=0-0 " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["file", "file/x", "pipe", "loop", "x" * 300, "a\0b"])
def test_a_folder_that_cannot_be_had_takes_one_line(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot make" in refused(sweep, *TWO, "--out", name, "--cell", 0)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "pipe"]


# ---- running them -----------------------------------------------------------------------------


def test_a_task_of_an_array_runs_its_cell_alone(run_script, tmp_path):
    done = run_script("sweep.py", *TWO, "--out", tmp_path / "a" / "b", env={sweep.TASK: "1"})
    assert (done.returncode, done.stderr) == (0, "")
    plan, found = documents(tmp_path / "a" / "b")
    assert plan["setting"] == {"script": "capacity.py", "num_cells": 2}
    ((name, cell),) = found.items()
    assert cell["options"]["block_size"] == 32
    assert plan["tables"][0]["rows"][1] == {
        "index": 1,
        "file": name,
        "arguments": ["--workload=30,20", "--quiet", "--block-size=32"],
        "options": cell["options"],
    }
    path = tmp_path / "a" / "b" / name
    assert done.stdout == f"cell 1: done, exit code 0: {path}\n"
    assert " at a time\n" in path.with_suffix(".log").read_text()


def test_no_cell_writes_what_a_cell_reads_and_none_reads_a_pipe(tmp_path, refused):
    trace = tmp_path / "trace.csv"
    trace.write_text("kept")
    arguments = ["--script", "capacity.py", "--trace", trace, "--out", tmp_path]
    (cell,) = expand("capacity.py", ["--trace", str(trace)])
    for suffix in (".json", ".log"):
        link = (tmp_path / cell.file).with_suffix(suffix)
        link.symlink_to(trace)
        assert f"{link} would overwrite what --trace reads" in refused(sweep, *arguments)
        link.unlink()
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe" in refused(sweep, *arguments, "--model", tmp_path / "pipe")
    assert trace.read_text() == "kept" and sorted(os.listdir(tmp_path)) == ["pipe", "trace.csv"]


def test_all_in_turn_find_what_each_alone_finds_and_what_is_done_stays(
    run_script, tmp_path, refused
):
    together, alone = tmp_path / "together", tmp_path / "alone"
    assert run_script("sweep.py", *TWO, "--out", together).returncode == 0
    for cell in ("1", "0"):
        assert run_script("sweep.py", *TWO, "--out", alone, "--cell", cell).returncode == 0

    def timeless(folder):
        return {
            name: {key: value for key, value in found.items() if key != "elapsed_s"}
            for name, found in documents(folder)[1].items()
        }

    assert timeless(together) == timeless(alone) and len(timeless(alone)) == 2
    before = {path: path.read_bytes() for path in alone.iterdir()}
    done = run_script("sweep.py", *TWO, "--out", alone)
    assert done.returncode == 0 and done.stdout.count("done before, exit code 0") == 2
    assert {path: path.read_bytes() for path in alone.iterdir()} == before
    (first, *_) = documents(alone)[1]
    (alone / first).write_text('{"schema": "pagedatt')  # as a full disk might leave it
    done = run_script("sweep.py", *TWO, "--out", alone)
    assert done.returncode == 0 and done.stdout.count("done before") == 1
    assert timeless(alone) == timeless(together)
    (plan,) = alone.glob("sweep-*.json")  # which stands for its cells
    reason = refused(sweep, "--merge", plan, "--json", alone / first)
    assert reason == f"--json {alone / first} would overwrite what --merge reads\n"


def test_a_cell_that_cannot_run_says_why_in_its_file_and_stops_no_other(run_script, tmp_path):
    done = run_script("sweep.py", *CAPACITY, "--out", tmp_path, "--block-size", "5000,16")
    assert done.returncode == 2
    assert done.stderr == "cell 0: capacity.py: error: --block-size 5000: at most 4,096\n"
    _, found = documents(tmp_path)
    by_size = {one["options"]["block_size"]: one for one in found.values()}
    assert (by_size[16]["exit_code"], by_size[5000]["exit_code"]) == (0, 2)
    assert by_size[5000]["error"] in done.stderr and by_size[5000]["tables"] == []
    again = run_script("sweep.py", *CAPACITY, "--out", tmp_path, "--block-size", "5000,16")
    assert again.returncode == 2 and again.stdout.count("done before") == 1


def test_a_cell_that_cannot_run_says_why_in_its_file_where_there_is_no_stderr(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "stderr", None)
    assert sweep.main([*CAPACITY, "--out", str(tmp_path), "--block-size", "5000"]) == 2
    (found,) = documents(tmp_path)[1].values()
    assert found["error"] == "capacity.py: error: --block-size 5000: at most 4,096"


def test_a_cell_that_could_not_run_and_says_not_why_runs_again(tmp_path, monkeypatch, capfd):
    """Or the sweep would end with 2 and not a word."""
    arguments = ["--script", "capacity.py", "--seed", "3", "--out", str(tmp_path)]
    (cell,) = expand("capacity.py", ["--seed", "3"])
    found = document("capacity.py", cell.options, setting={}, tables=[], exit_code=2, elapsed_s=0.0)
    (tmp_path / cell.file).write_text(json.dumps(found))
    monkeypatch.setattr(sweep_cells, "run_cell", lambda *_: 0)
    assert sweep.main(arguments) == 0 and "done before" not in capfd.readouterr().out


STAND_IN = f"""
import json, pathlib, sys
sys.path.insert(0, {str(SWEEP.parent)!r})
from vllm_sim.reporting.documents import document
args = vars(__import__("sweep").PARSERS["main.py"]().parse_args(sys.argv[1:]))
found = {{"setting": {{}}, "tables": [], "checks": [{{"name": "a", "ok": False, "detail": "b"}}]}}
found = document("main.py", args, exit_code=1, elapsed_s=0.0, **found)
pathlib.Path(sys.argv[-1]).write_text(json.dumps(found))
sys.exit(1)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a script in the place of main.py."""

    def put(text):
        (tmp_path / "main.py").write_text(text)
        monkeypatch.setattr(sweep, "__file__", str(tmp_path / "sweep.py"))
        monkeypatch.setenv("PYTHONSAFEPATH", "1")

    return put


def test_a_cell_whose_checks_fail_is_done_with_code_1(stand_in, tmp_path, capfd):
    stand_in(STAND_IN)
    arguments = ["--seed", "0,1", "--out", str(tmp_path / "out")]
    for more, told in ([], "done"), ([], "done before"), (["--again"], "done"):
        assert sweep.main([*arguments, *more]) == 1
        assert capfd.readouterr().out.count(f"{told}, exit code 1") == 2


def test_a_cell_that_is_killed_leaves_no_file(stand_in, tmp_path, capfd):
    stand_in("import os; os.kill(os.getpid(), 9)\n")
    out = tmp_path / "out"
    assert sweep.main(["--seed", "0,1", "--out", str(out)]) == 128 + signal.SIGKILL
    plan, found = documents(out)
    assert len(plan["tables"][0]["rows"]) == 2 and found == {}


def test_an_interrupt_ends_it_silently(tmp_path):
    arguments = ["--out", tmp_path, "--seed", "0,1", "--device", "cpu", "--quiet"]
    with subprocess.Popen(
        [sys.executable, SWEEP, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as running:
        while not any(log.stat().st_size for log in tmp_path.glob("*.log")):
            time.sleep(0.05)  # until the cell is at work
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (130, b"")
    assert documents(tmp_path)[1] == {}
