"""command_line.py: what each way to end means to the shell, and what the user sees of it."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from vllm_sim.reporting.arguments import OneLineParser, file_name, folder, positive, seed
from vllm_sim.reporting.command_line import UsageError, exit_code, raise_on_interrupt
from vllm_sim.reporting.files import OutputError, print_then

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("printed", ["half a table", "a table\n" * 9999])
@pytest.mark.parametrize("full", [False, True])
def test_output_that_fails_is_dropped(full, printed, monkeypatch, capsys):
    """What is still in the buffer would fail again when Python ends."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone, open("/dev/full", "w") as disk:
        out = disk if full else gone
        monkeypatch.setattr(sys, "stdout", out)
        assert exit_code("a.py", lambda: print(printed)) == (2 if full else 141)
        out.flush()
        assert os.path.samestat(os.fstat(out.fileno()), os.stat(os.devnull))
    told = "a.py: error: cannot write the output: No space left on device\n"
    assert capsys.readouterr().err == told * full


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


@pytest.mark.parametrize("error", ["UsageError('no')", "SystemExit(0)"])
def test_what_was_printed_before_a_refusal_fails_in_one_line(run_script, error):
    """And not at Python's end, in several lines and with code 120."""
    code = f"""if True:
        import sys
        from vllm_sim.reporting.command_line import UsageError, exit_code

        def run():
            print("half a table")
            raise {error}

        sys.exit(exit_code("a.py", run))
    """
    with open("/dev/full", "w") as full:
        done = run_script("-c", code, env={"PYTHONUNBUFFERED": None}, stdout=full)
    assert done.returncode == 2
    assert done.stderr == "a.py: error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_into_a_full_disk_fails_however_it_is_buffered(run_script, unbuffered):
    """argparse by itself passes over it, and where nothing is buffered nobody else is told."""
    with open("/dev/full", "w") as full:
        done = run_script("sweep.py", "--help", env={"PYTHONUNBUFFERED": unbuffered}, stdout=full)
    assert done.returncode == 2
    assert done.stderr == "sweep.py: error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("script", ["main.py", "capacity.py", "reproduce.py", "sweep.py"])
def test_a_package_that_is_not_there_takes_one_line(run_script, script):
    """Whoever did not install the requirements: -S leaves out all but the standard library."""
    env = {name: None for name in os.environ if name.startswith(("PYTHON", "COV"))}
    done = run_script("-S", script, "--help", env=env)
    assert (done.returncode, done.stdout) == (2, "")
    told = rf"{script}: error: no (torch and )?(numpy and )?tabulate: pip install -r requirements"
    assert re.fullmatch(rf"{told}\.txt\n", done.stderr)


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


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (int, "--", "expected one argument"),  # argparse by itself drops it
        # `--figures "$PICTURES"` with a variable that is not set would fill the current folder.
        (folder, "", "'' names no folder ('.' is the current one)"),
        (file_name, "", "'' names no file"),
        (file_name, " ", "' ' names no file"),
        (positive, "0", "'0' is not a positive integer of at most 12 digits"),
        (positive, "000", "'000' is not a positive integer of at most 12 digits"),
        (positive, "9" * 13, "'9999999999999' is not a positive integer of at most 12 digits"),
        (positive, "\u0663", r"'\\u0663' is not a positive integer of at most 12 digits"),
        (seed, "1" + "0" * 5000, f"'1{'0' * 39}' is not an integer from 0 to 2**32 - 1"),
        (seed, "4294967296", "'4294967296' is not an integer from 0 to 2**32 - 1"),
        (seed, "-1", "'-1' is not an integer from 0 to 2**32 - 1"),
    ],
)
def test_values_that_are_refused(capsys, kind, value, told):
    parser = OneLineParser(prog="a.py")
    parser.add_argument("--option", type=kind)
    assert exit_code("a.py", lambda: parser.parse_args([f"--option={value}"]).option) == 2
    assert capsys.readouterr().err == f"a.py: error: argument --option: {told}\n"


def test_values_that_are_taken():
    assert (positive("1"), positive("9" * 12)) == (1, 10**12 - 1)
    assert (seed("0"), seed("4294967295")) == (0, 2**32 - 1)
    assert (folder("."), file_name("a.csv")) == (Path("."), Path("a.csv"))


def wait_until(holds):
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("not within 30 s")


def processes_of(group):
    """The states of the processes of a group that have not ended."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, of = path.read_text().rpartition(")")[2].split()[:3]
            states += [state] if int(of) == group and state not in "ZX" else []
    return states


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("script", ["reproduce.py", "sweep.py"])
def test_whatever_works_for_a_script_that_is_killed_ends_too(script, tmp_path):
    work = ["--figure=12", "--jobs=2", "--quiet"]
    swept = ["--script=reproduce.py", f"--out={tmp_path}", *work]
    command = [sys.executable, ROOT / script, *(swept if script == "sweep.py" else work)]
    wanted, silent = 4 if script == "sweep.py" else 3, {"stdout": -3, "stderr": -3}
    with subprocess.Popen(command, start_new_session=True, **silent) as running:
        try:
            wait_until(lambda: len(processes_of(running.pid)) == wanted)
            running.kill()
            wait_until(lambda: not processes_of(running.pid))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
