"""progress.py: what is shown when, on a terminal and in a log, and that it breaks nothing."""

import io
import os
import pty

import pytest

from kv_cache_manager import PagedKVCacheManager
from vllm_sim.reporting.progress import FIRST_S, LOG_S, NEXT_S, SILENT, Progress
from vllm_sim.serving.simulator import simulate
from vllm_sim.workload.length_tables import SHAREGPT
from vllm_sim.workload.requests import make_trace


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def test_a_log_has_a_line_every_ten_seconds_and_none_before(clock):
    log = io.StringIO()
    with Progress.on(log, "a.py", clock=clock) as progress:
        for second in range(35):
            clock.now = 100.0 + second
            progress.at(second, 50, "scenario 1")
    assert log.getvalue().splitlines() == [
        "a.py: 20 %, 10 s, scenario 1",
        "a.py: 40 %, 20 s, scenario 1",
        "a.py: 60 %, 30 s, scenario 1",
    ]


def test_a_short_run_leaves_a_log_as_it_is(clock):
    log = io.StringIO()
    with Progress.on(log, "a.py", clock=clock) as progress:
        clock.now += LOG_S - 0.001
        progress.at(9, 10)
    assert log.getvalue() == ""


def test_a_terminal_has_one_line_that_is_wiped_out(clock):
    screen = Terminal()
    with Progress.on(screen, "a.py", clock=clock, columns=80) as progress:
        clock.now += FIRST_S / 2
        progress.at(1, 4, "too soon")
        assert screen.getvalue() == ""
        clock.now += FIRST_S
        progress.at(1, 4, "first")
        clock.now += NEXT_S / 2
        progress.at(2, 4, "too soon")
        clock.now += NEXT_S
        progress.at(3, 4)
    empty, first, second, wiped, end = screen.getvalue().split("\r")
    assert (empty, end) == ("", "")
    assert first == "[######..................] 25 %, 1 s, first"
    assert second == "[##################......] 75 %, 1 s".ljust(len(first))
    assert wiped == " " * len(second.rstrip()) and "\n" not in screen.getvalue()


def test_it_is_wiped_out_when_the_run_fails(clock):
    screen = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress.on(screen, "a.py", clock=clock) as progress:
        clock.now += 5.0
        progress.at(1, 2)
        raise KeyboardInterrupt
    assert screen.getvalue().endswith("\r") and screen.getvalue().split("\r")[-2].strip() == ""


@pytest.mark.parametrize("columns", [10, 40, 80])
def test_a_line_is_no_wider_than_the_terminal(clock, columns):
    screen = Terminal()
    progress = Progress.on(screen, "a.py", clock=clock, columns=columns)
    clock.now += 5.0
    progress.at(1, 2, "words " * 50)
    assert len(screen.getvalue().strip("\r")) == columns - 1


def test_parts_make_a_whole_and_say_whose_they_are(clock):
    log = io.StringIO()
    whole = Progress.on(log, "a.py", clock=clock)
    inner = whole.part(1, 4, "scenario 2").part(1, 2, "attention")
    for done in (0, 5, 10):
        clock.now += LOG_S
        inner.at(done, 10)
    clock.now += LOG_S
    whole.part(3, 4).part(1, 2).at(1, 1)
    words = ", scenario 2, attention"
    assert [line.removeprefix("a.py: ") for line in log.getvalue().splitlines()] == [
        f"38 %, 10 s{words}",
        f"44 %, 20 s{words}",
        f"50 %, 30 s{words}",
        "100 %, 40 s",
    ]


def test_a_share_never_goes_back_nor_beyond_the_end(clock):
    """More runs may become known than there were."""
    log = io.StringIO()
    progress = Progress.on(log, "a.py", clock=clock)
    for done, total in ((5, 10), (6, 30), (0, 0), (40, 30)):
        clock.now += LOG_S
        progress.at(done, total)
    shares = [line.split()[1] for line in log.getvalue().splitlines()]
    assert shares == ["50", "50", "50", "100"]


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_silence(clock, stream):
    quiet = Progress.on(stream, "a.py", quiet=stream is not None, clock=clock)
    for progress in (quiet, quiet.part(1, 2), SILENT):
        clock.now += 1000.0
        progress.at(1, 2)
        progress.clear()
    assert stream is None or stream.getvalue() == ""


class Full(io.StringIO):
    writes = 0

    def write(self, text):
        self.writes += 1
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stream_that_fails_is_left_alone(clock, terminal):
    stream = Full()
    stream.isatty = lambda: terminal
    with Progress.on(stream, "a.py", clock=clock, columns=80) as progress:
        for _ in range(5):
            clock.now += 100.0
            progress.at(1, 2)
    assert stream.writes == 1


def test_a_closed_stream_is_no_terminal(clock):
    stream = io.StringIO()
    stream.close()
    progress = Progress.on(stream, "a.py", clock=clock)
    assert progress.display.columns is None  # a log
    clock.now += 100.0
    progress.at(1, 2)
    assert progress.display.due == float("inf")  # nothing is written to it again


def test_a_simulation_tells_how_many_requests_are_done_and_finds_the_same(clock):
    def ticking():
        clock.now += 1.0
        return clock.now

    log = io.StringIO()
    requests = make_trace(SHAREGPT, rate=2.0, duration_s=400.0, seed=0)
    shown = Progress.on(log, "a.py", clock=ticking)
    result = simulate(requests, PagedKVCacheManager(983, 16), progress=shown)
    assert result == simulate(requests, PagedKVCacheManager(983, 16))
    shares = [int(line.split()[1]) for line in log.getvalue().splitlines()]
    assert len(shares) > 3 and shares == sorted(shares) and shares[-1] > shares[0]


# ---- of the scripts --------------------------------------------------------------------------

# Log lines from the first moment on, so that a test need not wait for ten seconds.
AT_ONCE = """
import sys, {0}
from vllm_sim.reporting import progress
progress.{1} = 0.0
sys.exit({0}.main(sys.argv[1:]))
"""
SHORT = {
    "main": ("--scenario", "1", "--device", "cpu", "--model", "opt-125m", "--num-blocks", "140"),
    "capacity": ("--workload", "30,20", "--seed", "1"),
    "reproduce": ("--figure", "2", "--jobs", "2"),
}


@pytest.mark.parametrize("script", SHORT)
def test_scripts_show_it_on_stderr_alone_and_not_if_quiet(run_script, script):
    code = AT_ONCE.format(script, "LOG_S")
    shown, quiet = (run_script("-c", code, *SHORT[script], *more) for more in ([], ["--quiet"]))
    lines = shown.stderr.splitlines()
    assert (shown.returncode, quiet.returncode, quiet.stderr) == (0, 0, "")
    assert lines and all(line.startswith(f"{script}.py: ") and " %, " in line for line in lines)
    timeless = [done.stdout.rpartition(", ")[0] for done in (shown, quiet)]
    assert timeless[0] == timeless[1]


def test_a_terminal_is_left_without_a_trace(run_script):
    """stderr of a real one; what stays in its last line is nothing."""
    master, slave = pty.openpty()
    code = AT_ONCE.format("main", "FIRST_S")
    try:
        done = run_script("-c", code, *SHORT["main"], env={"COLUMNS": 60}, stderr=slave)
        os.close(slave)
        text = b""
        while True:
            try:
                text += os.read(master, 1 << 16)
            except OSError:  # all is read
                break
    finally:
        os.close(master)
    drawn = text.decode("ascii").split("\r")
    assert done.returncode == 0 and b"\x1b" not in text
    assert any(line.startswith("[") and "scenario 1" in line for line in drawn)
    assert max(map(len, drawn)) < 60 and drawn[-1] == "" and drawn[-2].strip() == ""
