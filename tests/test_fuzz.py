"""Malformed input: one clear line on stderr and exit code 2, and no file made or changed.

Every reader of files and every option of every script, with inputs that a seed decides (the engines
are in fuzz_tools.py): some 2,000 in `make test`, more than 15,000 behind the marker `slow`,

    python -m pytest -m slow -rP tests/test_fuzz.py -k ten_thousand

most of them here, in this process, and dozens as processes, for what only those can show: a
closed pipe, a full disk, closed or full streams. Scripts run up to the work itself, which is left
out: so input that is sound after all ends with 0, and nothing is ever slow. The last tests plant
faults, to show that the checks see them.
"""

import ast
import contextlib
import gzip
import importlib.util
import io
import json
import os
import random
import re
import resource
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from itertools import permutations, product
from pathlib import Path

import bench_beam_step
import bench_manager
import bench_serving
import fit_latency
import fuzz_tools
import make_length_tables
import pytest
from fuzz_tools import (
    ACTIONS,
    BAD_INPUTS,
    EVERY,
    HARMLESS,
    JSON_READERS,
    OPTIONS,
    PARSERS,
    READERS,
    SOUND,
    SWEPT,
    Fault,
    check,
    check_reader,
    document_of,
    fuzz_cells,
    fuzz_configs,
    fuzz_documents,
    fuzz_files_of_scripts,
    fuzz_lists,
    fuzz_logs,
    fuzz_options,
    fuzz_readers,
    fuzz_variables,
    no_longer_than,
)
from published_models import PUBLISHED

import capacity
import main
import reproduce
import sweep
from kv_cache_manager import MemoryUsage
from vllm_sim.conformance import __main__ as conformance
from vllm_sim.evaluation import pictures, runner
from vllm_sim.models.config_file import ConfigError
from vllm_sim.reporting import command_line, sweep_cells
from vllm_sim.reporting.arguments import FileName
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.sweep_cells import PATHS
from vllm_sim.scenarios import run as scenario_run
from vllm_sim.scenarios.report import ScenarioReport
from vllm_sim.sizing import answers, trace_answers
from vllm_sim.workload import data_sets, text_files
from vllm_sim.workload.data_sets import read_lengths
from vllm_sim.workload.text_files import WorkloadError

ROOT = Path(__file__).resolve().parent.parent

# ---- malformed options -------------------------------------------------------------------------


@pytest.fixture
def room():
    """(inputs, outputs): folders with what cannot be read and what cannot be written."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "in", Path(folder) / "out"
        for path in (inputs, outputs):
            path.mkdir()
            (path / "folder").mkdir()
            os.mkfifo(path / "pipe")
            (path / "loop").symlink_to("loop")
            (path / "nowhere").symlink_to("none/at/all")
            (path / "zero").symlink_to("/dev/zero")
            (path / "full").symlink_to("/dev/full")
        for name, text in SOUND.items():
            (inputs / name).write_text(text, encoding="ascii")
        (outputs / "old.json").write_text("old")
        yield inputs, outputs


def no_model(monkeypatch):
    """generate.py without a model."""
    from vllm_sim.engine import report, run, weights

    usage = MemoryUsage(1, 0, 1)
    moments = {"fullest": usage, "last": usage, "num_copies": 0, "num_forwards": 1}
    texts = {"texts": ["b"], "num_prompt_tokens": 1, "num_new_tokens": [1], "same_texts": 1}
    sizes = {"bytes_held": {"paged, blocks in use": 1}, "exact": True}
    told = report.Generated("a", **moments, **texts, **sizes)
    find = importlib.util.find_spec
    there = lambda name: None if name == weights.PACKAGE else find(name)  # noqa: E731
    monkeypatch.setattr(weights.importlib.util, "find_spec", there)
    monkeypatch.setattr(weights.Source, "model", lambda *_: None)
    monkeypatch.setattr(run, "measure", lambda *_: (told, None))
    monkeypatch.setattr(run, "write_outputs", lambda *_: None)


@pytest.fixture
def no_work(monkeypatch, room):
    """The scripts without what they are for; what they read, check and write is all there."""
    report = ScenarioReport(1, "nothing", "What?", answer="Nothing.")
    monkeypatch.setattr(scenario_run, "run_one", lambda *_: report)
    monkeypatch.setattr(scenario_run, "tune_cpu", lambda: None)
    monkeypatch.setattr(sweep_cells, "run_cell", lambda *_: 0)
    monkeypatch.setattr(answers, "survey", lambda *_: answers.Survey("Nothing.", []))
    monkeypatch.setattr(trace_answers, "answer_trace", lambda *_: answers.Survey("Nothing.", []))
    monkeypatch.setattr(runner, "reproduce", lambda *_: [])
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    monkeypatch.setattr(fit_latency, "check_software", lambda *_: [])
    monkeypatch.setattr(bench_serving, "measure", lambda *_: {"ns_per_token": 1.0})
    monkeypatch.setattr(bench_serving, "seconds_per_call", lambda: 1.0)
    ns = dict.fromkeys(("append", "call", "append_all"), 1.0)
    row = {"workload": "a", "tokens": 1, "ns_per_token": ns, "blocks": [1]}
    monkeypatch.setattr(bench_manager, "measure", lambda *_: row)
    monkeypatch.setattr(bench_beam_step.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(make_length_tables, "table_lines", lambda *_: [])
    if importlib.util.find_spec("transformers"):
        no_model(monkeypatch)
    for name in ("LENGTHS_DIR", sweep.TASK):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(room[1])


@pytest.mark.parametrize("seed", range(2))
def test_readers_refuse_malformed_files_in_one_line(tmp_path, seed):
    refused, taken = fuzz_readers(240, seed, tmp_path)
    assert set(refused) == set(READERS) and refused.total() > 3 * taken.total()


@pytest.mark.parametrize("seed", range(2))
def test_scripts_refuse_malformed_arguments_in_one_line(room, no_work, seed):
    codes = fuzz_options(3 * len(EVERY), seed, room)
    refused = {(script, option) for script, option, code in codes if code == 2}
    assert refused == {(script.__name__, option) for script, option in EVERY}


def test_sweeps_refuse_malformed_lists_in_one_line(room, no_work):
    codes = fuzz_lists(16 * len(SWEPT), 0, room)
    refused = {(script, option) for script, option, code in codes if code == 2}
    assert refused >= {(script.__name__, option) for script, option in SWEPT if option not in PATHS}


def test_variables_that_are_malformed_take_one_line(room, no_work):
    codes = fuzz_variables(90, 0, room)
    assert min(codes["LENGTHS_DIR", 2], codes[sweep.TASK, 2]) > 15


def test_an_empty_name_is_no_folder(room, no_work):
    for script, option in EVERY:
        if OPTIONS[script][option] in ("folder", "input folder"):
            for given in ([f"{option}="], [option, ""]):
                arguments = [*HARMLESS[script], *given]
                assert check(script, arguments, room[1], may_be=()) == 2


def test_every_option_that_names_a_file_says_whether_it_is_read_or_written():
    for script, actions in ACTIONS.items():
        for option, action in actions.items():
            named = re.search("FILE|DIR", action.metavar or "")
            assert bool(named) == isinstance(action.type, FileName), (script, option)


def test_names_count_in_any_case_and_are_refused_as_they_were_written(tmp_path, monkeypatch):
    for script, actions in ACTIONS.items():
        for option, action in actions.items():
            for name in action.choices or ():
                given = PARSERS[script].parse_args([option, str(name).upper()])
                assert getattr(given, action.dest) in (name, [name])
            if action.choices:
                with pytest.raises(UsageError, match=f"argument {option}: .*'None-SUCH'"):
                    PARSERS[script].parse_args([option, "None-SUCH"])
    model = ACTIONS[capacity]["--model"].type
    assert (model("OPT-66B"), model("None-SUCH")) == ("opt-66b", "None-SUCH")
    assert f"{model('OPT-66B')}" == "OPT-66B"  # in what is said of it
    (tmp_path / "OPT-66B").touch()
    monkeypatch.chdir(tmp_path)
    assert (model("OPT-66B"), model("opt-66B")) == ("OPT-66B", "opt-66b")  # a file is itself


def stand_for(kind, path):
    """What may be given to an option so that it is this file, or a folder that has it."""
    place = Path(tempfile.mkdtemp(dir=path.parent))
    name = kind.within.replace("*", "a") or "link"
    for folder in ("soft", "hard"):
        (place / folder).mkdir()
    (place / "soft" / name).symlink_to(path)
    (place / "hard" / name).hardlink_to(path)
    given = [place / "soft", place / "hard"] if kind.within else []
    if kind.kind.startswith("folder"):
        return given
    return [*given, path, f"{place}/../{path.name}", place / "soft" / name, place / "hard" / name]


@pytest.mark.parametrize("script", ACTIONS, ids=lambda script: script.__name__)
def test_no_output_is_an_input_or_another_output(script, tmp_path, refused):
    path = tmp_path / "file"
    path.write_text("kept")
    kinds = {option: action.type for option, action in ACTIONS[script].items()}
    kinds = {option: kind for option, kind in kinds.items() if isinstance(kind, FileName)}
    if script is sweep:
        del kinds["--out"]  # which knows by itself what it writes there
    for one, other in permutations(kinds, 2):
        told = "are the same file" if kinds[one].written else f"would overwrite what {one} reads"
        ways = product(stand_for(kinds[one], path), stand_for(kinds[other], path))
        for given, target in ways if kinds[other].written else ():
            assert told in refused(script, *HARMLESS[script], one, given, other, target)
    assert path.read_text() == "kept"


@pytest.mark.parametrize(
    "written",
    ["--json=new/a.png --figures=new", "--timeline=a --json=./a", "--json=new --figures=new"],
)
def test_no_two_outputs_are_one_file_that_is_not_there_yet(written, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "are the same file" in refused(main, *written.split())
    assert os.listdir(tmp_path) == []


SERVE_THE_REPOSITORY = "record", "update_readme", "what_if", "make_presets", "fit_server_latency"
# Measured ones; replay.py takes names of files without an option (tests/benchmarks/test_replay.py).
TESTED_ALONE = "bench_generate", "measure_beams", "replay", "serve"


def test_no_script_is_left_out():
    """Every script that takes arguments is fuzzed, but what serves the repository alone."""
    folders = (ROOT, ROOT / "tools", ROOT / "benchmarks")
    there = [path for folder in folders for path in folder.glob("*.py")]
    package = {Path(conformance.__file__)}  # run by -m
    scripts = {path for path in there if "__main__" in path.read_text(encoding="ascii")}
    ours = {ROOT / "tools" / f"{name}.py" for name in SERVE_THE_REPOSITORY}
    ours |= {ROOT / "benchmarks" / f"{name}.py" for name in TESTED_ALONE}
    if not importlib.util.find_spec("transformers"):
        ours.add(ROOT / "generate.py")
    assert scripts - ours == {Path(script.__file__) for script in OPTIONS} - package
    assert {str(path.relative_to(ROOT)) for path in scripts - ours} == {*SCRIPTS, *WITH_TORCH}


def test_scripts_refuse_malformed_files_in_one_line(room, no_work):
    codes = fuzz_files_of_scripts(150, 0, room)
    assert {script for script, code in codes if code == 2} >= {
        "capacity",
        "main",
        "reproduce",
        "make_length_tables",
    }


def test_a_merge_refuses_malformed_documents_in_one_line(room, no_work):
    codes = fuzz_documents(300, 5, room)
    assert codes[2] > 200 and codes[0] + codes[1] > 0


def test_a_sweep_refuses_malformed_cells_in_one_line(room, no_work):
    codes = fuzz_cells(120, 0, room)
    assert codes["merge", 2] > 20 and codes["sweep", 0] + codes["sweep", 1] > 40


def test_configurations_that_are_malformed_take_one_line(room, no_work):
    codes = fuzz_configs(100, 0, room)
    assert codes[2] > 70 and codes[0] > 0


def test_startup_logs_that_are_malformed_take_one_line(room, no_work):
    codes = fuzz_logs(200, 0, room)
    assert codes[2] > 50 and codes[0] > 20


def test_json_readers_refuse_what_is_another_file(tmp_path):
    """A trace in place of a configuration or a document, say; sound ones are in fuzz_configs."""
    refused, _ = fuzz_readers(200, 0, tmp_path, JSON_READERS)
    assert refused.total() > 190  # one line of a trace is a JSON object


# ---- what a mutation does not find -------------------------------------------------------------


def bomb(path, head, text, times):
    """A small file that unpacks to `head` and `times` times `text`."""
    path.write_bytes(gzip.compress(head) + gzip.compress(text) * times)
    return str(path)


@pytest.mark.parametrize(
    ("text", "times", "says"),
    [
        (b"x" * 2**20, 300, "line 2: the line is too long"),
        (b"\0" * 2**20, 300, "too long"),
        (b"1,2" + b" " * 60_000 + b"\n", 4600, "too long"),
        pytest.param(b"\n" * 2**20, 300, "line 2000001: the file", marks=pytest.mark.slow),
        pytest.param(b"1,1\n" * 2**18, 300, "line 2000001: the file", marks=pytest.mark.slow),
        (b"", 900_000, "the file is too long"),  # members without content
    ],
    ids=["no line", "zeros", "long lines", "blank lines", "short lines", "no content"],
)
def test_a_gzip_bomb_is_bounded(tmp_path, text, times, says):
    path = bomb(tmp_path / "sharegpt.csv.gz", b"input_len,output_len\n", text, times)
    with no_longer_than(60), pytest.raises(WorkloadError) as caught:
        read_lengths(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"\n", b"1,1\n"])
def test_a_file_of_too_many_lines_is_not_read_to_its_end(tmp_path, monkeypatch, line):
    monkeypatch.setattr(text_files, "MAX_LINES", 5000)
    path = bomb(tmp_path / "sharegpt.csv.gz", b"input_len,output_len\n1,1\n", line, 4999)
    with pytest.raises(WorkloadError, match="line 5001: the file"):
        read_lengths(path)
    assert read_lengths(bomb(tmp_path / "a", b"input_len,output_len\n1,1\n", line, 4998))


def test_a_large_file_is_not_even_read(tmp_path):
    path = tmp_path / "sharegpt.csv"
    path.write_text("input_len,output_len\n")
    os.truncate(path, 2**40)  # a hole
    for reader in READERS.values():
        with pytest.raises(WorkloadError, match="the file is too long"):
            reader(str(path))
    for reader in JSON_READERS.values():
        with pytest.raises((ConfigError, UsageError), match=r"larger than 4 |more than 64 "):
            reader(str(path))


def test_what_is_no_file_is_refused_at_once(room):
    for name in BAD_INPUTS:
        if name != "azure.csv":
            for reader in (*READERS.values(), *JSON_READERS.values()):
                path = name if not name or name.startswith("/") else str(room[0] / name)
                assert not check_reader(reader, path), name
    for reader in (read_lengths, *JSON_READERS.values()):
        assert not check_reader(reader, "a\0b")


JSON_SOUND = {"config.json": next(iter(PUBLISHED.values()))[1], "a": document_of(random.Random(0))}


@pytest.mark.parametrize("text", [*SOUND.values(), *map(json.dumps, JSON_SOUND.values())])
def test_a_pipe_is_read_as_a_file_is(tmp_path, text):
    (tmp_path / "file").write_text(text)
    taken = 0
    for reader in (*READERS.values(), *JSON_READERS.values()):
        reading, writing = os.pipe()
        with open(writing, "w") as pipe:
            pipe.write(text)
        as_file = check_reader(reader, str(tmp_path / "file"))
        assert check_reader(reader, f"/dev/fd/{reading}") == as_file
        os.close(reading)
        taken += as_file
    assert taken > 0


def readers_and_variables(text):
    """Whether a module opens anything to read, and the variables of the environment it looks at."""
    opens, variables = False, set()
    for node in ast.walk(ast.parse(text)):
        name = getattr(node, "func", None)
        name = getattr(name, "attr", getattr(name, "id", None))
        of = getattr(getattr(node, "func", None), "value", None)  # what stands before the dot
        module = getattr(of, "id", "")
        if name in ("open", "open_input", "read_bounded"):
            opens = True
        elif name in ("read_text", "read_bytes"):  # of a path; others of ours have these names too
            opens |= of is not None and module != "workload"
        elif name == "load":
            opens |= module in ("json", "np", "numpy", "torch", "pickle")
        asked = name in ("get", "getenv") and ast.unparse(node.func).startswith(
            ("os.environ", "os.getenv", "environ")
        )
        if asked:
            variables.add(ast.unparse(node.args[0]).strip("'"))
        read = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load)
        if read and ast.unparse(node.value).endswith("environ"):
            variables.add(ast.unparse(node.slice).strip("'"))
    return opens, variables


def test_no_reader_is_left_out():
    """Every place that opens a file, and every variable that is read, has its tests."""
    places, variables = set(), set()
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT)
        if name.parts[0] not in ("tests", ".venv"):
            opens, asked = readers_and_variables(path.read_text(encoding="ascii"))
            places |= {str(name)} if opens else set()
            variables |= asked
    assert places == {
        "vllm_sim/reporting/files.py",
        "vllm_sim/reporting/sweep_cells.py",  # a log, to write
        "vllm_sim/models/config_file.py",
        "vllm_sim/reporting/documents.py",
        "vllm_sim/workload/text_files.py",  # READERS and JSON_READERS
        "tools/lengths_from_pickle.py",
        "tools/update_readme.py",
        "tools/record.py",
        "vllm_sim/workload/length_tables.py",  # our own files
        "vllm_sim/models/presets.py",
        "tools/make_presets.py",
        "vllm_sim/sizing/server_log.py",  # fuzz_logs, and its own tests
        "benchmarks/measured_servers.py",
        "vllm_sim/playback/timeline.py",
        "vllm_sim/reporting/command_line.py",
        "paged_attention.py",
        "benchmarks/bench_beam_step.py",  # no input
        "benchmarks/measure_beams.py",  # our own file
        "benchmarks/serve_earlier.py",  # an earlier run's: tests/benchmarks/test_serve.py
        "vllm_sim/engine/weights.py",  # what names a model that transformers has refused
    }
    # LENGTHS_DIR and the task are in fuzz_variables; any text will do for a commit. Torchrun's
    # (`name` is of three) are in tests/engine/test_tensor_parallel.py.
    torchrun = {"name", "MASTER_ADDR", "LOCAL_WORLD_SIZE", "WORLD_SIZE"}
    assert variables == {"LENGTHS_DIR", "TASK", "COMMIT"} | torchrun


@contextlib.contextmanager
def nobody():
    """Without the rights of root, who may read and write anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_without_permission(room, no_work):
    inputs, outputs = room
    main.main(["--scenario", "1"])  # what it imports may be for root alone
    reproduce.main(["--figure", "table1"])
    for path in (inputs.parent, inputs, outputs):
        path.chmod(0o755)
    (outputs / "old.json").chmod(0o400 if os.geteuid() else 0o444)
    for path in inputs.glob("*.csv"):
        path.chmod(0)
    if os.geteuid():
        outputs.chmod(0o555)
    with nobody():
        for reader in (*READERS.values(), *JSON_READERS.values()):
            for path in inputs.glob("*.csv"):
                assert not check_reader(reader, str(path))
        path = str(inputs / "azure.csv")
        for script, arguments in (
            (capacity, ["--model", path]),
            (capacity, ["--trace", path]),
            (sweep, ["--merge", path]),
            (main, [*HARMLESS[main], "--trace", path]),
        ):
            assert check(script, arguments, outputs, may_be=()) == 2
        for script in (main, capacity, reproduce, bench_serving, bench_manager):
            for name in ("old.json", "new.json", "folder/new.json"):
                arguments = [*HARMLESS[script], "--json", str(outputs / name)]
                if name != "folder/new.json" or os.geteuid():
                    assert check(script, arguments, outputs, may_be=()) == 2
        arguments = ["--data", str(inputs), "--out", str(outputs)]
        assert check(make_length_tables, arguments, outputs, may_be=()) == 2
        arguments = [*HARMLESS[reproduce], "--lengths", str(inputs / "alpaca.csv")]
        assert check(reproduce, arguments, outputs, may_be=()) == 2
    outputs.chmod(0o755)


# ---- as processes ------------------------------------------------------------------------------

SCRIPTS = (
    "main.py",
    "capacity.py",
    "reproduce.py",
    "sweep.py",
    "tools/make_length_tables.py",
    "tools/fit_latency.py",
    "tools/lengths_from_pickle.py",
    "benchmarks/bench_manager.py",
    "benchmarks/bench_serving.py",
    "benchmarks/measured_servers.py",
)
WITH_TORCH = (
    "benchmarks/bench_attention.py",
    "benchmarks/bench_beam_step.py",
    "benchmarks/bench_paging_cost.py",
    "benchmarks/profile_attention.py",
    "benchmarks/tune_attention.py",
    *(["generate.py"] if importlib.util.find_spec("transformers") else []),
)
ALL_SCRIPTS = [*SCRIPTS, *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_TORCH)]


@pytest.fixture
def process(run_script):
    """Runs a script that buffers its output, without coverage's own."""
    unlike_users = [name for name in os.environ if name.startswith(("COVERAGE_", "PYTHONUNBUFF"))]
    return partial(run_script, env=dict.fromkeys(unlike_users))


def test_every_process_has_what_came_through_a_pipe(process):
    reading, writing = os.pipe()
    with open(writing, "w") as pipe:
        pipe.write(SOUND["sharegpt.csv"])
    arguments = ["--figure", "2", "--jobs", "2", "--lengths", f"/dev/fd/{reading}"]
    done = process("reproduce.py", *arguments, pass_fds=[reading])
    os.close(reading)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"/dev/fd/{reading} (27 pairs)" in done.stdout


def closing(*descriptors):
    return lambda: [os.close(descriptor) for descriptor in descriptors]


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_help_to_a_reader_that_is_gone_is_silent(process, script):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = process(script, "--help", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_help_to_a_full_disk_takes_one_line(process, script):
    with open("/dev/full", "wb") as full:
        done = process(script, "--help", stdout=full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: cannot write the output: No space left on device" in done.stderr


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_mistakes_that_nobody_can_be_told_of_still_give_2(process, script):
    with open("/dev/full", "wb") as full:
        assert process(script, "--bogus", stdout=full, stderr=full).returncode == 2
    assert process(script, "--bogus", preexec_fn=closing(1, 2), stderr=None).returncode == 2
    done = process(script, "--bogus", preexec_fn=closing(1))
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--lengths", "pipe"], ["--json", "pipe"], ["--figures", "pipe"]]
)
def test_a_pipe_that_nobody_writes_to_does_not_hang(process, tmp_path, arguments):
    os.mkfifo(tmp_path / "pipe")
    done = process("reproduce.py", "--figure", "table1", *arguments, cwd=tmp_path, timeout=30)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)


class Leaving(io.TextIOWrapper):
    """Standard output whose reader leaves after so many writes."""

    def __init__(self, writes):
        self.reading, writing = os.pipe()
        super().__init__(os.fdopen(writing, "wb"), encoding="ascii")
        self.left = writes

    def write(self, text):
        if text and self.left == 0:
            os.close(self.reading)
        self.left -= bool(text)  # a flush may write nothing
        return super().write(text)

    def end(self):
        if self.left >= 0:
            os.close(self.reading)
        self.close()


def until_it_leaves(script, arguments, writes, path):
    """(exit code, whether the reader stayed, stderr, what is in the file) of one run in here."""
    path.write_text("old")
    out, errors = Leaving(writes), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = script.main([*map(str, arguments), "--json", str(path)])
    stayed = out.left >= 0
    out.end()
    return code, stayed, errors.getvalue(), path.read_text()


def long_document(path):
    """A document whose table is more than a buffer, so that printing it meets the reader."""
    found = document_of(random.Random(0))
    found["tables"][0]["rows"] = [{"counted": str(i), "requests": i} for i in range(400)]
    path.write_text(json.dumps(found))
    return path


def merge_of(cell):
    return ["--merge", cell, "--table", "concurrency"]


@pytest.mark.parametrize("script", [main, capacity, reproduce, sweep], ids=lambda s: s.__name__)
def test_a_reader_that_leaves_anywhere_takes_no_half_of_a_file_along(script, tmp_path, monkeypatch):
    """After each number of writes: silence, 141, and the file whole or as it was before."""
    shown = ScenarioReport(1, "nothing", "What?", parts=["text"], answer="Nothing.")
    section = answers.Section("t", ("a",), [(1,)], name="t", answer="so")
    monkeypatch.setattr(scenario_run, "run_one", lambda *_: shown)
    monkeypatch.setattr(scenario_run, "tune_cpu", lambda: None)
    found = answers.Survey("so", [section])
    monkeypatch.setattr(answers, "survey", lambda *_: found)
    cell = long_document(tmp_path / "cell.json")
    arguments = [
        *HARMLESS[script],
        *{sweep: merge_of(cell), main: ["--scenario=1"]}.get(script, ()),
    ]
    path = tmp_path / "out.json"
    code, stayed, told, whole = until_it_leaves(script, arguments, 10**6, path)
    assert (code, stayed, told) == (0, True, "") and len(whole) > 100
    timed = re.compile(r'"elapsed_s": [0-9.]+')
    outcomes, writes, stayed = set(), 0, False
    while not stayed:
        code, stayed, told, left = until_it_leaves(script, arguments, writes, path)
        assert told == "" and code == (0 if stayed else 141)
        outcomes.add("old" if left == "old" else timed.sub("", left) == timed.sub("", whole))
        writes += 1
    assert writes > 4 and sorted(os.listdir(tmp_path)) == ["cell.json", "out.json"]
    # What is printed when all is computed loses nothing.
    assert outcomes == ({True} if script is not main else {True, "old"})


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (
            "sweep.py",
            ["--script", "capacity.py", "--workload", "30,20", "--seed", "0,1", "--quiet"],
        ),
        pytest.param("main.py", [*HARMLESS[main], "--scenario", "2"], marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_leaves_in_the_middle_of_a_run(script, arguments, tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    to = ["--out", tmp_path / "out"] if script == "sweep.py" else ["--json", path]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHONUNBUFF")}
    command = [sys.executable, str(ROOT / script), *map(str, [*arguments, *to])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, **pipes) as running:
        assert running.stdout.readline()
        running.stdout.close()
        errors = running.stderr.read()
        assert (running.wait(timeout=100), errors) == (141, b"")
    assert path.read_text() == "old"
    for left in (tmp_path / "out").glob("*.json"):
        assert json.loads(left.read_text())["tables"]  # whole


@pytest.mark.parametrize("script", ["reproduce.py", "capacity.py", "sweep.py"])
def test_a_reader_that_is_gone_loses_no_figures(process, script, tmp_path):
    path, cell = tmp_path / "out.json", long_document(tmp_path / "cell.json")
    arguments = {
        "reproduce.py": ["--figure", "table1"],
        "capacity.py": ["--workload", "30,20"],
        "sweep.py": merge_of(cell),
    }[script]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = process(script, *arguments, "--json", path, stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
    assert json.loads(path.read_text())["tables"][0]["rows"]


@pytest.mark.parametrize("script", [main, capacity, reproduce, sweep, bench_serving, bench_manager])
def test_a_document_is_alone_on_standard_output(script, no_work, tmp_path, capfd):
    cell = long_document(tmp_path / "cell.json")
    arguments = [*HARMLESS[script], *(map(str, merge_of(cell)) if script is sweep else ())]
    assert script.main(arguments) == 0
    text = capfd.readouterr().out
    assert script.main([*arguments, "--json", "-"]) == 0
    document, told = capfd.readouterr()
    assert json.loads(document)["script"].endswith(f"{script.__name__}.py")
    assert told.splitlines()[:1] == text.splitlines()[:1]


@pytest.mark.parametrize("script", ["reproduce.py", "sweep.py"])
def test_output_into_a_full_disk_leaves_the_old_file(process, tmp_path, script):
    """Unlike a reader that has gone: nobody has seen what was found."""
    path = tmp_path / "out.json"
    path.write_text("old")
    cell = long_document(tmp_path / "cell.json")
    arguments = {"reproduce.py": ["--figure", "table1"], "sweep.py": merge_of(cell)}[script]
    with open("/dev/full", "wb") as full:
        done = process(script, *arguments, "--json", path, stdout=full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert path.read_text() == "old"


def test_a_disk_that_fills_up_leaves_the_old_file(process, tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100, 100))
    done = process("reproduce.py", "--figure=table1", "--json", path, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


# ---- planted faults ----------------------------------------------------------------------------


def trip(*_, **__):
    raise KeyError("planted")


def test_a_planted_traceback_is_noticed(room, no_work, tmp_path, monkeypatch):
    monkeypatch.setattr(data_sets, "whole_number", trip)
    with pytest.raises(Fault, match="KeyError"):
        fuzz_readers(100, 0, tmp_path)
    with pytest.raises(Fault, match="KeyError"):
        fuzz_files_of_scripts(100, 0, room)


def test_a_planted_hang_is_noticed(room, monkeypatch):
    monkeypatch.setattr(fuzz_tools, "SECONDS", 1)
    with pytest.raises(Fault, match="Hang"):
        check_reader(lambda _: time.sleep(30), "x")


@pytest.mark.parametrize(
    ("print_it", "code", "match"),
    [
        (lambda text: f"a.py: error: {text}\nand a second line\n", 2, "not one clear line"),
        (lambda text: "", 2, "not one clear line"),
        (lambda text: f"a.py: error: {text}", 2, "not one clear line"),
        (lambda text: f"a.py: error: \x1b[31m{text}\n", 2, "not one clear line"),
        (lambda text: f"a.py: error: {text * 1000}\n", 2, "not one clear line"),
        (lambda text: f"a.py: error: {text}\n", 1, "not 2"),
        (lambda text: f"a.py: error: {text}\n", 0, "though"),
    ],
)
def test_a_planted_line_or_code_is_noticed(room, no_work, monkeypatch, print_it, code, match):
    def refuse(script, message):
        sys.stderr.write(print_it(message))
        return code

    monkeypatch.setattr(command_line, "_refuse", refuse)
    with pytest.raises(Fault, match=match):
        fuzz_options(50, 0, room)


@pytest.mark.parametrize("left", ["new.json", "old.json", "folder/.new-1"])
def test_a_planted_half_written_file_is_noticed(room, no_work, monkeypatch, left):
    def fail(args):
        (room[1] / left).write_text("{")
        raise UsageError("planted")

    monkeypatch.setattr(scenario_run, "make_setting", fail)
    with pytest.raises(Fault, match="files changed"):
        check(main, [], room[1])


# ---- all of it ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_malformed_inputs(room, no_work, tmp_path, figure):
    refused, _ = fuzz_readers(6000, 1000, tmp_path)
    others, _ = fuzz_readers(1000, 1009, tmp_path, JSON_READERS)
    refused += others
    codes = fuzz_options(40 * len(EVERY), 1001, room)
    lists = fuzz_lists(20 * len(SWEPT), 1002, room)
    files = fuzz_files_of_scripts(2500, 1003, room)
    files += by_script("sweep", fuzz_documents(1000, 1004, room))
    files += by_script("capacity", fuzz_configs(1000, 1005, room))
    files += by_script("capacity", fuzz_logs(1000, 1008, room))
    files += fuzz_cells(500, 1006, room)
    variables = fuzz_variables(300, 1007, room)
    kinds = {
        "files by reader": refused.total(),
        "files by script": with_code_2(files),
        "options": with_code_2(codes),
        "lists of values": with_code_2(lists),
        "variables": with_code_2(variables),
    }
    figure("malformed inputs, one line and 2 each", **kinds)
    for found, wanted in ((codes, EVERY), (lists, SWEPT)):
        options = {(script, option) for script, option, code in found if code == 2}
        # A file's name is never a list: a sweep leaves it to the script.
        left = PATHS if found is lists else ()
        assert options >= {(script.__name__, name) for script, name in wanted if name not in left}
    assert sum(kinds.values()) >= 10_000


def by_script(name, codes):
    return Counter({(name, code): n for code, n in codes.items()})


def with_code_2(codes):
    return sum(n for (*_, code), n in codes.items() if code == 2)
