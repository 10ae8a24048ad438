"""`python main.py` as a user meets it: what it prints, writes and returns, and what it refuses.

Regime item 9, in part: the same seed gives the same bytes.

Arguments that argparse refuses and whole runs are processes of their own. What is refused only
once torch is loaded calls `main.main` here, to load it once.
"""

import json
import os
import re
import resource
import shlex
import signal
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import main
from vllm_sim import models

ROOT = Path(__file__).resolve().parent.parent
MAIN = str(ROOT / "main.py")
# The smallest pools that hold a request of 2048 tokens leave most of a run to starting Python.
MODEL = ("--model", "opt-125m", "--device", "cpu", "--quiet")  # a slow machine shows progress
SMALL = (*MODEL, "--num-blocks", "140")
ELAPSED = re.compile(rb'(, \d+\.\d s\n\Z)|("elapsed_s": [\d.]+)')

not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(*args, cwd=ROOT, env=None, **options):
    """A finished process; its output must be ASCII."""
    done = subprocess.run(
        [sys.executable, MAIN, *map(str, args)],
        cwd=cwd,
        env=env or environment(),
        capture_output=True,
        timeout=100,
        **options,
    )
    assert done.stdout.isascii() and done.stderr.isascii()
    return done


def start(*args, **options):
    return subprocess.Popen(
        [sys.executable, MAIN, *map(str, args)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
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
def whole(tmp_path_factory):
    """(process, bytes of the JSON) of all four scenarios with seed 0."""
    path = tmp_path_factory.mktemp("whole") / "out.json"
    done = run(*SMALL, "--json", path)
    return done, path.read_bytes()


def test_json_has_exactly_the_promised_keys(whole):
    _, text = whole
    found = json.loads(text.decode("ascii"))
    assert list(found) == [
        "schema",
        "script",
        "options",
        "seeds",
        "versions",
        "setting",
        "scenarios",
        "tables",
        "checks",
        "exit_code",
        "elapsed_s",
    ]
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
    assert last.startswith(b"%d of %d checks held, " % (total - failed, total))
    assert done.stdout.count(b"  FAILED  ") == failed
    assert (done.returncode, done.stderr) == (1 if failed else 0, b"")
    assert found["exit_code"] == done.returncode


def test_all_checks_hold(whole):
    assert failed_checks(json.loads(whole[1])) == []


def test_each_scenario_ends_with_its_answer(whole):
    done, text = whole
    printed = done.stdout.decode("ascii")
    assert re.findall(r"^Scenario (\d): ", printed, re.MULTILINE) == ["1", "2", "3", "4"]
    for scenario in json.loads(text)["scenarios"]:
        assert f"\nAnswer: {scenario['answer']}\n" in printed


def test_same_seed_same_bytes(whole, tmp_path):
    path = tmp_path / "out.json"
    done = run(*SMALL, "--seed", "0", "--json", path)
    for ours, theirs in ((done.stdout, whole[0].stdout), (path.read_bytes(), whole[1])):
        ours, count = ELAPSED.subn(b"", ours)
        assert count == 1 and ours == ELAPSED.sub(b"", theirs)


@pytest.mark.parametrize(
    ("block_size", "num_blocks", "seed"), [(1, 2240, 1), (8, 280, 2), (32, 70, 3), (256, 12, 4)]
)
def test_all_checks_hold_for_other_block_sizes_and_seeds(tmp_path, block_size, num_blocks, seed):
    path = tmp_path / "out.json"
    sizes = ("--block-size", block_size, "--num-blocks", num_blocks, "--seed", seed)
    done = run(*MODEL, *sizes, "--json", path)
    assert done.stderr == b""
    assert failed_checks(json.loads(path.read_text())) == []
    assert done.returncode == 0


def test_scenarios_named_repeatedly_run_in_order_and_another_seed_differs(whole, tmp_path):
    path = tmp_path / "out.json"
    done = run(
        *SMALL,
        "--scenario",
        "2",
        "--scenario",
        "1",
        "--scenario",
        "2",
        "--format",
        "github",
        "--seed",
        "1",
        "--json",
        path,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    found = json.loads(path.read_text())
    assert [scenario["number"] for scenario in found["scenarios"]] == [1, 2]
    for number in (1, 2):
        assert rows_of(found, number) != rows_of(json.loads(whole[1]), number)
    lines = done.stdout.decode("ascii").split("\n")
    headings = [line.split(":")[0] for line in lines if line.startswith("## ")]
    assert headings == ["## Scenario 1", "## Scenario 2"]
    fenced = False
    for line, following in pairwise(lines):
        fenced ^= line.startswith("```")
        if not fenced and re.fullmatch(r"\|[-:|]+\|", following):
            assert line.count("|") == following.count("|")  # headers, or no table for Markdown
    assert not fenced


def test_latex_output_is_comments_and_tables():
    done = run(*SMALL, "--scenario", "1", "--format", "latex")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("ascii")
    outside = re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", text, flags=re.DOTALL)
    assert outside != text
    assert [line for line in outside.split("\n") if line and not line.startswith("%")] == []
    for table in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, flags=re.DOTALL):
        assert not re.search(r"(?<!\\)[%#_$]", table)


def test_help_has_every_option_and_an_example_that_runs(tmp_path):
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("ascii")
    options = ("scenario", "device", "model", "layers", "num-blocks", "block-size", "seed", "json")
    for option in (*options, "format", "quiet", "help"):
        assert f"--{option}" in text
    assert max(map(len, text.splitlines())) <= 100
    example = shlex.split(re.search(r"^ *python main\.py (.*)$", text, re.MULTILINE)[1])
    done = run(*example, "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    json.loads((tmp_path / "out.json").read_text())


# ---- input that cannot be used ----------------------------------------------------------------

NOT_POSITIVE = (
    "0",
    "-1",
    "-16",
    "abc",
    "",
    "1.5",
    "1e3",
    "0x10",
    "9" * 13,
    "9" * 400,
    " 16",
    "+16",
    "1_6",
    "nan",
    "\u0663",
)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--block-size", NOT_POSITIVE),
        ("--num-blocks", NOT_POSITIVE),
        ("--layers", ("0", "-1", "ALL", "1.5", "")),
        ("--scenario", ("0", "5", "-1", "x", "1,2", "")),
        ("--seed", ("-1", "4294967296", "1.5", "x", "")),
        ("--model", ("gpt-2", "OPT-13B", "", "a\nb")),
        ("--device", ("tpu", "cuda:0", "")),
        ("--format", ("html", "")),
    ],
)
def test_value_that_cannot_be_used_is_named_in_one_line(option, values, capfd, tmp_path):
    for value in values:
        # With "=", as argparse takes -1 after a space for another option.
        code = main.main([*SMALL, f"{option}={value}", "--json", str(tmp_path / "out")])
        printed, errors = capfd.readouterr()
        assert (code, printed) == (2, ""), value
        assert errors.startswith(f"main.py: error: argument {option}: "), value
        assert errors.count("\n") == 1 and len(errors) < 250 and errors.isascii(), value
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
def test_mistake_takes_one_line_of_a_process(args, why, tmp_path):
    done = run(*SMALL, *args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    errors = done.stderr.decode("ascii")
    assert errors.startswith("main.py: error: ") and errors.count("\n") == 1 and why in errors
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        # 2048 tokens take 128 blocks of 16; one more to grow into, one more for the watermark.
        (["--num-blocks", "1"], ["too few", "--num-blocks to 130"]),
        (["--num-blocks", "129"], ["too few", "--num-blocks to 130"]),
        (["--num-blocks", "2000", "--block-size", "1"], ["too few", "--num-blocks to 2,0"]),
        (["--num-blocks", "8", "--block-size", "256"], ["too few", "--num-blocks to 12"]),
        (["--layers", "13"], ["--layers 13", "opt-125m has 12"]),
        (["--layers", "999999999999"], ["--layers 999999999999", "opt-125m has 12"]),
        (["--num-blocks", "999999999999"], ["bytes needed", "available", "--num-blocks"]),
        (["--block-size", "999999999999"], ["bytes needed", "available", "--block-size"]),
        (["--layers", "all", "--num-blocks", "9999999"], ["bytes needed", "available", "--layers"]),
    ],
)
def test_setting_that_cannot_be_had_takes_one_line(args, told, capfd, tmp_path):
    code = main.main([*SMALL, *args, "--json", str(tmp_path / "out.json")])
    printed, errors = capfd.readouterr()
    assert (code, printed) == (2, "")
    assert errors.startswith("main.py: error: ") and errors.count("\n") == 1
    assert all(part in errors for part in told), errors
    assert os.listdir(tmp_path) == []


def test_one_block_is_no_plural(capfd):
    assert main.main([*SMALL, "--num-blocks", "1"]) == 2
    assert "main.py: error: 1 block of 16 is too few for one request" in capfd.readouterr().err


def test_number_of_blocks_that_it_asks_for_is_enough(capfd):
    """The message's number is the smallest that works, for every block size."""
    from vllm_sim.scenarios import setting as scenario

    for block_size in (1, 3, 16, 100, 256, 2047, 2048, 5000):
        setting = scenario.Setting(
            models.MODELS["opt-125m"], torch.device("cpu"), 1, 1, block_size, 0
        )
        with pytest.raises(ValueError) as caught:
            scenario.check_setting(setting)
        need = int(re.search(r"to ([\d,]+) or more", str(caught.value))[1].replace(",", ""))
        fields = {
            "model": setting.model,
            "device": setting.device,
            "num_layers": 1,
            "block_size": block_size,
            "seed": 0,
        }
        scenario.check_setting(scenario.Setting(num_blocks=need, **fields))
        with pytest.raises(ValueError):
            scenario.check_setting(scenario.Setting(num_blocks=need - 1, **fields))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capfd, tmp_path):
    code = main.main([*SMALL, "--device", "cuda", "--json", str(tmp_path / "out.json")])
    printed, errors = capfd.readouterr()
    assert (code, printed) == (2, "") and os.listdir(tmp_path) == []
    assert errors.count("\n") == 1 and "--device cuda" in errors and "--device cpu" in errors


@pytest.mark.parametrize("name", [".", "no/out.json", "file/out.json", "x" * 300, "", "pipe"])
def test_output_that_cannot_be_written_is_refused_early(name, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    code = main.main([*SMALL, "--scenario", "1", "--json", name])
    printed, errors = capfd.readouterr()
    assert (code, printed) == (2, "")
    assert errors.startswith("main.py: error: cannot write ") and errors.count("\n") == 1
    assert (tmp_path / "file").read_text() == "old"
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


@not_as_root
def test_output_without_permission_is_refused_before_the_run(capfd, tmp_path):
    (tmp_path / "out.json").write_text("old")
    (tmp_path / "out.json").chmod(0o400)
    code = main.main([*SMALL, "--scenario", "1", "--json", str(tmp_path / "out.json")])
    printed, errors = capfd.readouterr()
    assert (code, printed) == (2, "")
    assert errors.count("\n") == 1 and "permission denied" in errors
    assert (tmp_path / "out.json").read_text() == "old"


def test_full_device_as_output(tmp_path):
    """/dev/full, or as root, who could replace it by a file, one of our own."""
    device = Path("/dev/full")
    if os.geteuid() == 0:
        device = tmp_path / "full"
        try:
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        except PermissionError:
            pytest.skip("no device can be made here")
    done = run(*SMALL, "--scenario", "1", "--json", device)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"cannot write" in done.stderr
    assert stat.S_ISCHR(device.lstat().st_mode)


def test_disk_that_fills_up_while_writing_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands in for the full disk; the pipes have none."""
    path = tmp_path / "out.json"
    path.write_text("old")
    # `make coverage` would write to files of its own.
    env = {name: v for name, v in environment().items() if not name.startswith("COVERAGE_")}
    done = run(
        *SMALL,
        "--scenario",
        "1",
        "--json",
        path,
        env=env,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"cannot write" in done.stderr
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


def test_failed_run_leaves_the_old_file(capfd, tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    for args in (["--num-blocks", "1"], ["--seed", "x"], ["--layers", "13"]):
        assert main.main([*SMALL, *args, "--json", str(path)]) == 2
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


# ---- runs that are ended from outside ---------------------------------------------------------


def test_interrupt_during_a_run_is_silent_and_leaves_nothing(tmp_path):
    path = tmp_path / "out.json"
    with start(*SMALL, "--json", path) as process:
        assert process.stdout.readline()  # the setting: what follows is the run
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")
    assert os.listdir(tmp_path) == []


def test_interrupt_while_modules_load_is_obeyed_silently(tmp_path):
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
        done = subprocess.run(
            [sys.executable, "-c", code, module, *args],
            env=environment(),
            capture_output=True,
            timeout=60,
        )
        # A shell says 130 for both.
        assert done.returncode in (130, -signal.SIGINT), module
        assert (done.stdout, done.stderr) == (b"", b""), module
        assert os.listdir(tmp_path) == []


def test_reader_that_goes_away_ends_the_run_silently():
    with start(*SMALL, "--scenario", "1", "--scenario", "2") as process:
        assert process.stdout.readline()
        process.stdout.close()  # as `| head -1` does
        errors = process.stderr.read()
    assert errors == b"" and process.returncode in (0, 141, -signal.SIGPIPE)


def test_output_to_a_full_disk_takes_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, MAIN, *SMALL, "--scenario", "1"],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"No space left on device" in done.stderr
