"""command_line.py: what each way to end means to the shell, and what the user sees of it."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_sim.reporting.command_line import (
    OneLineParser,
    UsageError,
    exit_code,
    file_name,
    folder,
    positive,
    print_then,
    raise_on_interrupt,
)
from vllm_sim.scenarios.report import OutputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    ROOT / name
    for name in (
        "main.py",
        "reproduce.py",
        "capacity.py",
        "benchmarks/bench_manager.py",
        "benchmarks/bench_serving.py",
        "benchmarks/bench_beam_step.py",
        "tools/fit_latency.py",
    )
]


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_run_that_ends_has_its_own_code(code, capsys):
    assert exit_code("a.py", lambda: code) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UsageError("no such figure"), "no such figure"),
        (UsageError("two\nlines \u00e9 \u2014"), r"two\nlines \xe9 \u2014"),
        (OutputError("cannot write out.json"), "cannot write out.json"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_2(error, line, capsys):
    assert exit_code("a.py", raising(error)) == 2
    assert capsys.readouterr() == ("", f"a.py: error: {line}\n")


def test_what_is_nobodys_mistake_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code("a.py", raising(ZeroDivisionError()))


def test_an_interrupt_is_130_without_a_word(capsys):
    assert exit_code("a.py", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "errors"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "a.py: error: cannot write the output: No space left on device\n",
        ),
    ],
)
def test_output_that_fails_is_dropped(error, code, errors, capfd):
    """What is still in the buffer would fail again when Python ends."""
    kept = os.dup(1)
    try:
        with os.fdopen(os.dup(1), "w") as out, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", out)

            def run():
                out.write("half a table")
                raise error

            assert exit_code("a.py", run) == code
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert capfd.readouterr() == ("", errors)


def test_without_any_output_a_run_still_has_its_code(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert exit_code("a.py", lambda: 1) == 1
    assert exit_code("a.py", raising(UsageError("unseen"))) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [(BrokenPipeError(errno.EPIPE, "Broken pipe"), 141), (OSError(errno.EIO, "Input/output"), 2)],
)
def test_output_that_fails_where_there_is_no_stdout(error, code, monkeypatch, capsys):
    """A file of --json, say: there is nothing to drop, and the code is the same."""
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_code("a.py", raising(error)) == code
    assert capsys.readouterr().err.count("cannot write the output: Input/output") == (code == 2)


def test_a_refusal_that_nobody_can_be_told_is_still_2(monkeypatch):
    """stderr on a full disk: what it could not take is dropped, and does not fail again at exit."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert exit_code("a.py", raising(UsageError("unseen"))) == 2
        full.flush()
        assert os.path.samestat(os.fstat(full.fileno()), os.stat(os.devnull))


def test_a_mistake_of_the_command_line_is_one_line(capsys):
    parser = OneLineParser(prog="a.py")
    parser.add_argument("--number", type=int)
    assert exit_code("a.py", lambda: parser.parse_args(["--number", "x"]).number) == 2
    assert capsys.readouterr() == ("", "a.py: error: argument --number: invalid int value: 'x'\n")


def test_interrupts_raise_again_unless_someone_else_has_them():
    old = signal.getsignal(signal.SIGINT)
    try:
        for before, after in (
            (signal.SIG_DFL, signal.default_int_handler),
            (signal.SIG_IGN, signal.SIG_IGN),
        ):
            signal.signal(signal.SIGINT, before)
            raise_on_interrupt()
            assert signal.getsignal(signal.SIGINT) is after
    finally:
        signal.signal(signal.SIGINT, old)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_refuses_a_file_that_it_cannot_write(script, tmp_path):
    target = tmp_path / "none" / "out.json"
    arguments = ["--json", target]
    if script.name == "fit_latency.py":  # it writes none: a folder that it cannot read
        arguments = ["--check"]
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"LENGTHS_DIR": str(target)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script.name}: error: ") and done.stderr.count("\n") == 1
    assert "none" in done.stderr


@pytest.mark.parametrize("error", ["UsageError('no')", "SystemExit(0)"])
def test_what_was_printed_before_a_refusal_fails_in_one_line(error):
    """And not at Python's end, in several lines and with code 120."""
    code = f"""if True:
        import sys
        from vllm_sim.reporting.command_line import UsageError, exit_code

        def run():
            print("half a table")
            raise {error}

        sys.exit(exit_code("a.py", run))
    """
    env = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=env,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "a.py: error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_into_a_full_disk_fails_however_it_is_buffered(unbuffered):
    """argparse by itself passes over it, and where nothing is buffered nobody else is told."""
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "report.py", "--help"],
            cwd=ROOT,
            env=env,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "report.py: error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("script", ["main.py", "capacity.py", "reproduce.py", "report.py"])
def test_a_package_that_is_not_there_takes_one_line(script):
    """Whoever did not install the requirements: -S leaves out all but the standard library."""
    env = {name: v for name, v in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    done = subprocess.run(
        [sys.executable, "-S", script, "--help"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        rf"{script}: error: (torch and )?(numpy and )?tabulate (is|are) not installed: pip install "
        r"-r requirements\.txt \(README, Quick start\)\n",
        done.stderr,
    )


def test_what_was_found_is_kept_where_its_reader_has_gone_but_not_on_a_full_disk(capsys):
    for error, kept in ((BrokenPipeError(), 1), (OSError(28, "full"), 0), (None, 1)):
        calls = []

        def show(error=error):
            if error is not None:
                raise error

        if error is None:
            print_then(lambda calls=calls: calls.append(1), show)
        else:
            with pytest.raises(type(error)):
                print_then(lambda calls=calls: calls.append(1), show)
        assert len(calls) == kept


def test_a_value_that_argparse_drops_is_refused(capsys):
    parser = OneLineParser(prog="a.py")
    parser.add_argument("--number", type=int)
    assert exit_code("a.py", lambda: parser.parse_args(["--number=--"]).number) == 2
    assert capsys.readouterr().err == "a.py: error: argument --number: expected one argument\n"


def test_an_empty_name_is_no_folder(capsys):
    """`--figures "$PICTURES"` with a variable that is not set would fill the current one."""
    parser = OneLineParser(prog="a.py")
    parser.add_argument("--figures", type=folder)
    assert exit_code("a.py", lambda: parser.parse_args(["--figures", ""]).figures) == 2
    told = "a.py: error: argument --figures: '' names no folder ('.' is the current one)\n"
    assert capsys.readouterr().err == told
    assert parser.parse_args(["--figures", "."]).figures == Path(".")


@pytest.mark.parametrize(
    ("value", "told"),
    [("", "argument --trace: '' names no file"), (" ", "argument --trace: ' ' names no file")],
)
def test_an_empty_name_is_no_file(capsys, value, told):
    """Path makes the current folder of it, and the mistake would be said to be there."""
    parser = OneLineParser(prog="a.py")
    parser.add_argument("--trace", type=file_name)
    assert exit_code("a.py", lambda: parser.parse_args(["--trace", value]).trace) == 2
    assert capsys.readouterr().err == f"a.py: error: {told}\n"
    assert parser.parse_args(["--trace", "a.csv"]).trace == Path("a.csv")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("0", "'0' is not a positive integer"),
        ("000", "'000' is not a positive integer"),
        ("9" * 13, "'9999999999999' is too large: at most 12 digits"),
        ("\u0663", "'\\\\u0663' is not a positive integer"),
    ],
)
def test_a_count_that_is_none_or_too_large(capsys, value, told):
    parser = OneLineParser(prog="a.py")
    parser.add_argument("--count", type=positive)
    assert exit_code("a.py", lambda: parser.parse_args(["--count", value]).count) == 2
    assert capsys.readouterr().err == f"a.py: error: argument --count: {told}\n"
    assert parser.parse_args(["--count", "9" * 12]).count == 10**12 - 1
