"""`python main.py` as a user meets it: what it prints, writes and returns, and what it refuses.

Regime item 9, in part: the same seed gives the same bytes.

Arguments that argparse refuses and whole runs are processes of their own. What is refused only
once torch is loaded calls `main.main` here, to load it once.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import main
from paged_attention import DeviceMemoryError
from vllm_sim import models
from vllm_sim.scenarios import baseline
from vllm_sim.scenarios import run as scenario_run
from vllm_sim.scenarios.setting import Setting, check_setting

ROOT = Path(__file__).resolve().parent.parent
MAIN = str(ROOT / "main.py")
# The smallest pools that hold a request of 2048 tokens leave most of a run to starting Python.
MODEL = ("--model", "opt-125m", "--device", "cpu", "--quiet")  # a slow machine shows progress
SMALL = (*MODEL, "--num-blocks", "140")
ELAPSED = re.compile(r'(, \d+\.\d s\n\Z)|("elapsed_s": [\d.]+)')
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run(run_script):
    """A finished process of main.py; its output must be ASCII."""

    def run(*args, env=None, **options):
        done = run_script("main.py", *args, env=ONE_THREAD | (env or {}), **options)
        assert (done.stdout or "").isascii() and done.stderr.isascii()
        return done

    return run


def start(*args):
    return subprocess.Popen(
        [sys.executable, MAIN, *map(str, args)],
        env=os.environ | ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def failed_checks(found):
    return [
        (check["scenario"], check["name"], check["detail"])
        for check in found["checks"]
        if not check["ok"]
    ]


def rows_of(found, number):
    """The tables of one scenario."""
    return [table["rows"] for table in found["tables"] if table["scenario"] == number]


# ---- runs that succeed ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """(process, text of the JSON) of all four scenarios with seed 0."""
    path = tmp_path_factory.mktemp("whole") / "out.json"
    return run(*SMALL, "--json", path), path.read_text(encoding="ascii")


def test_json_has_exactly_the_promised_keys(whole):
    _, text = whole
    found = json.loads(text)
    assert {*found} == {
        *("schema", "script", "options", "seeds", "versions", "setting", "scenarios", "tables"),
        *("checks", "exit_code", "elapsed_s"),
    }
    assert isinstance(found["elapsed_s"], float) and 0 < found["elapsed_s"] < 100
    setting = found["setting"]
    assert (setting["model"], setting["num_blocks"], setting["block_size"]) == ("opt-125m", 140, 16)
    assert (setting["device"], setting["layers"], setting["seed"]) == ("cpu", 1, 0)
    assert [scenario["number"] for scenario in found["scenarios"]] == [1, 2, 3, 4]
    for scenario in found["scenarios"]:
        assert list(scenario) == ["number", "name", "question", "answer"]
        assert scenario["name"] and scenario["answer"].endswith(".")
    for parts in (found["tables"], found["checks"]):
        assert {part["scenario"] for part in parts} == {1, 2, 3, 4}
    for check in found["checks"]:
        assert list(check) == ["scenario", "name", "ok", "detail"]
        assert check["ok"] in (True, False) and check["name"] and check["detail"]


def test_exit_code_and_last_line_count_the_checks(whole):
    done, text = whole
    found = json.loads(text)
    total, failed = len(found["checks"]), len(failed_checks(found))
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{total - failed} of {total} checks held, ")
    assert done.stdout.count("  FAILED  ") == failed
    assert (done.returncode, done.stderr) == (1 if failed else 0, "")
    assert found["exit_code"] == done.returncode


def test_all_checks_hold(whole):
    assert failed_checks(json.loads(whole[1])) == []


def test_each_scenario_ends_with_its_answer(whole):
    done, text = whole
    printed = done.stdout
    assert re.findall(r"^Scenario (\d): ", printed, re.MULTILINE) == ["1", "2", "3", "4"]
    for scenario in json.loads(text)["scenarios"]:
        assert f" Answer: {scenario['answer']} " in " ".join(printed.split())


def test_same_seed_same_bytes_also_with_a_timeline(run, whole, tmp_path):
    path, page = tmp_path / "out.json", tmp_path / "run.html"
    done = run(*SMALL, "--seed", "0", "--json", path, "--timeline", page)
    found = path.read_text().replace(json.dumps(str(page)), "null")
    for ours, theirs in ((done.stdout, whole[0].stdout), (found, whole[1])):
        ours, count = ELAPSED.subn("", ours)
        assert count == 1 and ours == ELAPSED.sub("", theirs)
    assert page.read_text().count('"name":"Scenario 4: paged,') == 2


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "seed"),
    [(1, 2240, 1), (256, 12, 4), pytest.param(8, 280, 2, marks=pytest.mark.slow)],
)
def test_all_checks_hold_for_other_block_sizes_and_seeds(
    run, tmp_path, block_size, num_blocks, seed
):
    path = tmp_path / "out.json"
    sizes = ("--block-size", block_size, "--num-blocks", num_blocks, "--seed", seed)
    done = run(*MODEL, *sizes, "--json", path)
    assert done.stderr == ""
    assert failed_checks(json.loads(path.read_text())) == []
    assert done.returncode == 0


def test_scenarios_named_repeatedly_run_in_order_and_another_seed_differs(run, whole, tmp_path):
    path = tmp_path / "out.json"
    chosen = ("--scenario", 2, "--scenario", 1, "--scenario", 2)
    done = run(*SMALL, *chosen, "--format", "github", "--seed", 1, "--json", path)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(path.read_text())
    assert [scenario["number"] for scenario in found["scenarios"]] == [1, 2]
    for number in (1, 2):
        assert rows_of(found, number) != rows_of(json.loads(whole[1]), number)
    lines = done.stdout.split("\n")
    headings = [line.split(":")[0] for line in lines if line.startswith("## ")]
    assert headings == ["## Scenario 1", "## Scenario 2"]
    fenced = False
    for line, following in pairwise(lines):
        fenced ^= line.startswith("```")
        if not fenced and re.fullmatch(r"\|[-:|]+\|", following):
            assert line.count("|") == following.count("|")  # headers, or no table for Markdown
    assert not fenced


def test_latex_output_is_comments_and_tables(run):
    done = run(*SMALL, "--scenario", "1", "--format", "latex")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    outside = re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", text, flags=re.DOTALL)
    assert outside != text
    assert [line for line in outside.split("\n") if line and not line.startswith("%")] == []
    for table in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, flags=re.DOTALL):
        assert not re.search(r"(?<!\\)[%#_$]", table)


def test_help_has_every_option_and_an_example_that_runs(run, tmp_path):
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    options = ("scenario", "device", "model", "layers", "num-blocks", "block-size", "seed", "json")
    for option in (*options, "format", "quiet", "help"):
        assert f"--{option}" in text
    assert max(map(len, text.splitlines())) <= 100
    example = shlex.split(re.search(r"^ *python main\.py (.*)$", text, re.MULTILINE)[1])
    done = run(*example, "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    json.loads((tmp_path / "out.json").read_text())


# ---- input that cannot be used ----------------------------------------------------------------

NOT_POSITIVE = ("0", "-1", "-16", "abc", "", "1.5", "1e3", "0x10", "9" * 13, "9" * 400)
NOT_POSITIVE += (" 16", "+16", "1_6", "nan", "\u0663")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--block-size", NOT_POSITIVE),
        ("--num-blocks", NOT_POSITIVE),
        ("--layers", ("0", "-1", "all 40", "1.5", "")),
        ("--scenario", ("0", "5", "-1", "x", "1,2", "")),
        ("--seed", ("-1", "4294967296", "1.5", "x", "")),
        ("--model", ("gpt-2", "OPT-13", "", "a\nb")),
        ("--device", ("tpu", "cuda:0", "")),
        ("--format", ("html", "")),
    ],
)
def test_value_that_cannot_be_used_is_named_in_one_line(option, values, refused, tmp_path):
    for value in values:
        # With "=", as argparse takes -1 after a space for another option.
        reason = refused(main, *SMALL, f"{option}={value}", "--json", tmp_path / "out")
        assert reason.startswith(f"argument {option}: ") and len(reason) < 250, value
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--block-size", "0"], "argument --block-size: '0' is not a positive integer"),
        (["--num-blocks", "-1"], "argument --num-blocks: '-1' is not a positive integer"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--scen", "1"], "unrecognized arguments: --scen 1"),
        (["extra"], "unrecognized arguments: extra"),
        (["two\nlines"], "unrecognized arguments"),
        (["--json"], "argument --json: expected one argument"),
        (["--num-blocks", "129"], "raise --num-blocks to 130 or more"),
    ],
)
def test_mistake_takes_one_line_of_a_process(run, args, why, tmp_path):
    done = run(*SMALL, *args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    errors = done.stderr
    assert errors.startswith("main.py: error: ") and errors.count("\n") == 1 and why in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        # 2048 tokens take 128 blocks of 16; one more to grow into, one more for the watermark.
        (["--num-blocks", "1"], ["1 block of 16 is too few", "--num-blocks to 130"]),
        (["--num-blocks", "129"], ["too few", "--num-blocks to 130"]),
        (["--num-blocks", "2000", "--block-size", "1"], ["too few", "--num-blocks to 2,0"]),
        (["--num-blocks", "8", "--block-size", "256"], ["too few", "--num-blocks to 12"]),
        (["--layers", "13"], ["--layers 13", "opt-125m has 12"]),
        (["--layers", "999999999999"], ["--layers 999999999999", "opt-125m has 12"]),
        (["--num-blocks", "999999999999"], ["GiB needed", "available", "--num-blocks"]),
        (["--block-size", "999999999999"], ["GiB needed", "available", "--block-size"]),
        (["--layers", "all", "--num-blocks", "9999999"], ["GiB needed", "available", "--layers"]),
    ],
)
def test_setting_that_cannot_be_had_takes_one_line(args, told, refused, tmp_path):
    reason = refused(main, *SMALL, *args, "--json", tmp_path / "out.json")
    assert all(part in reason for part in told) and os.listdir(tmp_path) == []


def test_number_of_blocks_that_it_asks_for_is_enough():
    """The message's number is the smallest that works, for every block size."""
    for block_size in (1, 3, 16, 100, 256, 2047, 2048, 5000):
        setting = Setting(models.MODELS["opt-125m"], torch.device("cpu"), 1, 1, block_size, 0)
        with pytest.raises(ValueError) as caught:
            check_setting(setting)
        need = int(re.search(r"to ([\d,]+) or more", str(caught.value))[1].replace(",", ""))
        check_setting(replace(setting, num_blocks=need))
        with pytest.raises(ValueError):
            check_setting(replace(setting, num_blocks=need - 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(refused, tmp_path):
    reason = refused(main, *SMALL, "--device", "cuda", "--json", tmp_path / "out.json")
    assert "--device cuda" in reason and "--device cpu" in reason and os.listdir(tmp_path) == []


# ---- runs that fail -----------------------------------------------------------------------------


def test_an_invariant_that_does_not_hold_is_a_failed_check(monkeypatch, capsys):
    for message, shown in (("slots\n 3 of 4", "slots 3 of 4"), ("", "assertion failed")):

        def fail(setting, progress, message=message):
            raise AssertionError(message)

        monkeypatch.setattr(baseline, "run", fail)
        assert main.main([*SMALL, "--scenario", "1"]) == 1
        printed = capsys.readouterr().out
        assert shown in printed and "0 of 1 checks held" in printed and "FAILED" in printed


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (DeviceMemoryError("cpu: 2.00 GiB needed"), "2.00 GiB needed"),
        (torch.OutOfMemoryError("CUDA out of memory\nand more"), "out of memory: CUDA"),
        (MemoryError("of the host"), "out of memory: of the host"),
    ],
)
def test_memory_that_runs_out_during_a_run(monkeypatch, capsys, error, says):
    def fail(*_):
        raise error

    monkeypatch.setattr(scenario_run, "run_one", fail)
    assert main.main([*SMALL, "--scenario", "1"]) == 2
    errors = capsys.readouterr().err
    assert says in errors and errors.count("\n") == 1 and scenario_run.MEMORY_FLAGS in errors


def test_the_cpu_gets_half_the_cores_unless_the_user_says_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(scenario_run.ctypes, "CDLL", lambda _: object())  # no mallopt: not glibc
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    scenario_run.tune_cpu()
    assert asked == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    scenario_run.tune_cpu()
    assert asked == [3]


# ---- runs that are ended from outside ---------------------------------------------------------


def test_interrupt_during_a_run_is_silent_and_leaves_nothing(tmp_path):
    path = tmp_path / "out.json"
    with start(*SMALL, "--json", path) as process:
        assert process.stdout.readline()  # the setting: what follows is the run
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    assert os.listdir(tmp_path) == []


def test_interrupt_while_modules_load_is_obeyed_silently(run_script, tmp_path):
    """torch loads numpy from C++, where an exception that a signal raised is dropped."""
    code = """if True:
        import os, runpy, signal, sys

        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == module:
                    sys.meta_path.remove(self)
                    os.kill(os.getpid(), signal.SIGINT)

        module, *sys.argv = sys.argv[1:]
        sys.path[0] = os.path.dirname(sys.argv[0])
        sys.meta_path.insert(0, Interrupt())
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    args = [MAIN, *SMALL, "--scenario", "1", "--json", str(tmp_path / "out.json")]
    for module in ("vllm_sim.paper", "numpy", "vllm_sim.scenarios.mixed"):
        done = run_script("-c", code, module, *args, env=ONE_THREAD)
        # A shell says 130 for both.
        assert done.returncode in (130, -signal.SIGINT), module
        assert (done.stdout, done.stderr) == ("", ""), module
        assert os.listdir(tmp_path) == []


def test_reader_that_goes_away_ends_the_run_silently():
    with start(*SMALL, "--scenario", "1", "--scenario", "2") as process:
        assert process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        errors = process.stderr.read()
    assert errors == b"" and process.returncode in (0, 141, -signal.SIGPIPE)


def test_output_to_a_full_disk_takes_one_line(run):
    with open("/dev/full", "wb") as full:
        done = run(*SMALL, "--scenario", "1", stdout=full)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr
