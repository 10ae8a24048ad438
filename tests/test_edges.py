"""What no other test reaches: the rarely taken side of a branch, and refusals deep inside.

Found by `make coverage`. What only a CUDA device reaches is named in pyproject.toml instead.
"""

import gc
import io
import itertools
import os
from dataclasses import replace

import pytest
import torch

import main
import reproduce
from allocators import DuplicateSequenceError
from kv_cache_manager import BaselineCacheManager, MemoryUsage, PagedKVCacheManager
from paged_attention import DeviceMemoryError
from sequence import BlockTable, Clock, Sequence, SequenceGroup
from vllm_sim.evaluation import experiments, pictures
from vllm_sim.evaluation import runner as reproduction
from vllm_sim.evaluation.comparison import EXPLAINED
from vllm_sim.evaluation.experiments import MemoryMeter, Outcome, Run, execute
from vllm_sim.paper import VLLM
from vllm_sim.reporting.progress import Progress
from vllm_sim.scenarios.report import ScenarioReport
from vllm_sim.serving.scheduler import Iteration
from vllm_sim.workload.data_sets import Lengths

COMPACT = Lengths({})
OUTCOME = Outcome(0.03, 10, 100, 8.0, 1, 1, dict.fromkeys(MemoryUsage.PARTS, 0.25), 10.0, 0.1)
SMALL = ["--model", "opt-125m", "--num-blocks", "140", "--device", "cpu", "--scenario", "1"]


# ---- reproduce.py, with runs that take no time -------------------------------------------------


def alike(run):
    """What the runs of one curve have in common."""
    return replace(run, rate=1.0, seed=0)


def at_once(figures):
    """In place of execute(): every curve rises half-way between its first rate and its last."""
    middle = {}
    for figure in figures:
        for curves in figure.curves(0).values() if hasattr(figure, "curves") else ():
            for curve in curves.values():
                rates = [rate for rate, _ in curve.paper]
                middle[alike(curve.at(rates[0]))] = (min(rates) + max(rates)) / 2.0

    def execute(run, lengths, progress=None):
        slow = run.rate > middle.get(alike(run), 15.0)
        return replace(OUTCOME, normalized_latency=2.0 if slow else 0.03)

    return execute


@pytest.mark.parametrize("seeds", [1, 2])
def test_every_figure_has_its_rows_and_notes(monkeypatch, seeds):
    figures = reproduction.choose(reproduce.FIGURES, False)
    monkeypatch.setattr(reproduction, "execute", at_once(figures))
    log, ticks = io.StringIO(), itertools.count(0.0, 20.0)
    shown = Progress.on(log, "reproduce.py", clock=lambda: next(ticks))
    found = reproduction.reproduce(figures, COMPACT, seeds, 1, shown)
    assert [one.figure.name for one in found] == [figure.name for figure in figures]
    for one in found:
        assert one.rows and all(row.held in (True, False, EXPLAINED) for row in one.rows)
        assert all(isinstance(note, str) and note for note in one.notes)
        headers = one.table().headers
        assert ("spread" in headers) == any(row.spread is not None for row in one.rows)
    lines = log.getvalue().splitlines()
    assert len(lines) > 100 and all(line.endswith(" runs so far") for line in lines)


def test_what_a_worker_does_is_what_one_process_does(monkeypatch):
    run = Run(VLLM, "opt-13b", "Alpaca", 1.0, 20.0)
    assert reproduction._work(run, ()) == execute(run, COMPACT)
    seen = []
    monkeypatch.setattr(reproduction.signal, "signal", lambda *given: seen.append(given))
    reproduction._ignore_interrupts()
    assert seen == [(reproduction.signal.SIGINT, reproduction.signal.SIG_IGN)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-12, "1e-12"), (1e15, "1e+15"), (12345.6, "12,346"), (0.12345, "0.1235")],
)
def test_numbers_have_four_digits(value, text):
    assert reproduction._number(value) == text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "1001"], "--seeds 1001: at most 1000"),
        (["--figures", "12"], "for one figure use --figure 12"),
        (["--quick", "--figure", "13"], "nothing of figure 13 is quick"),
        (["--figure", "table1", "--jobs", "1025"], "--jobs 1025: at most 1024"),
    ],
)
def test_what_reproduce_refuses_before_any_run(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(arguments) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and says in errors and errors.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("a bad length"), DuplicateSequenceError("a twin")])
def test_what_a_run_refuses_is_one_line(error, capsys, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(reproduction, "execute", refuse)
    assert reproduce.main(["--figure", "2", "--jobs", "1"]) == 2
    assert capsys.readouterr().err == f"reproduce.py: error: {error}\n"


def test_a_worker_that_is_killed_is_one_line(capsys, monkeypatch):
    from concurrent.futures.process import BrokenProcessPool

    def killed(*_):
        raise BrokenProcessPool("a process in the pool was terminated")

    monkeypatch.setattr(reproduction, "reproduce", killed)
    assert reproduce.main(["--figure", "table1"]) == 2
    assert "lower --jobs" in capsys.readouterr().err


def test_figures_are_drawn_after_the_table_is_printed(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda found, folder: drawn.append((found, folder)))
    assert reproduce.main(["--figure", "table1", "--figures", str(tmp_path / "new")]) == 0
    ((found, folder),) = drawn
    assert folder == tmp_path / "new" and [one.figure.name for one in found] == ["Table 1"]


# ---- experiments.py ----------------------------------------------------------------------------


def test_a_system_that_nobody_knows():
    for unknown in ({"system": "vllm 2"}, {"model": "gpt-2"}):
        fields = {"system": VLLM, "model": "opt-13b"} | unknown
        with pytest.raises(ValueError, match="unknown system or model"):
            Run(**fields, dataset="Alpaca", rate=1.0, seconds=1.0)


def test_a_beam_search_that_is_longer_than_any():
    with pytest.raises(ValueError, match="no beam search of 1000000 steps"):
        experiments._history(2, 0.5, 0, 10**6, 0)


@pytest.mark.parametrize("collecting", [True, False])
def test_a_run_leaves_the_garbage_collector_as_it_was(collecting):
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        execute(Run(VLLM, "opt-13b", "Alpaca", 1.0, 10.0), COMPACT)
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if was else gc.disable)()


def test_iterations_with_nothing_in_memory_say_nothing_of_sharing():
    """They count for where the slots are, and for Fig. 15's saving only those that hold blocks."""
    manager = PagedKVCacheManager(8, 4, watermark=0.0)
    meter = MemoryMeter(manager)
    meter.on_iteration(Iteration(0, 0.0))
    assert (meter.mean.shares["free"], meter.mean.saving) == (1.0, 0.0)
    manager.allocate(1, 8)
    manager.fork(1, 2)
    meter.on_iteration(Iteration(1, 1.0))
    assert meter.shares()["free"] == (1.0 + 0.75) / 2
    assert meter.mean.saving == 0.5  # four logical blocks in two


# ---- main.py -----------------------------------------------------------------------------------


def test_an_invariant_that_does_not_hold_is_a_failed_check(monkeypatch, capsys):
    from vllm_sim.scenarios import baseline as scenario_baseline

    for message, shown in (("slots\n 3 of 4", "slots 3 of 4"), ("", "assertion failed")):

        def fail(setting, progress, message=message):
            raise AssertionError(message)

        monkeypatch.setattr(scenario_baseline, "run", fail)
        assert main.main(SMALL) == 1
        printed = capsys.readouterr().out
        assert shown in printed and "0 of 1 checks held" in printed and "FAILED" in printed


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (DeviceMemoryError("cpu: 2 bytes needed, 1 available"), "2 bytes needed"),
        (torch.OutOfMemoryError("CUDA out of memory\nand more"), "out of memory: CUDA"),
        (MemoryError("of the host"), "out of memory: of the host"),
    ],
)
def test_memory_that_runs_out_during_a_run(monkeypatch, capsys, error, says):
    def fail(*_):
        raise error

    monkeypatch.setattr(main, "run_one", fail)
    assert main.main(SMALL) == 2
    errors = capsys.readouterr().err
    assert says in errors and errors.count("\n") == 1 and main.MEMORY_FLAGS in errors


def test_the_cpu_gets_half_the_cores_unless_the_user_says_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(main.ctypes, "CDLL", lambda _: object())  # no mallopt: not glibc
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    main.tune_cpu()
    assert asked == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    main.tune_cpu()
    assert asked == [3]


# ---- the rest ----------------------------------------------------------------------------------


def test_an_empty_block_table_has_no_entries():
    table = BlockTable([], 4, 0, Clock())
    assert table.entries() == [] and table.num_tokens == 0


def test_a_sequence_that_has_a_reservation_is_not_admitted_again():
    manager = BaselineCacheManager(64, 16, policy="oracle")
    manager.allocate(1, 10, 20)
    group = SequenceGroup(1, [Sequence(1, 10, 20)])
    for admit in (manager.admit, manager.try_admit):
        with pytest.raises(DuplicateSequenceError, match="sequence 1 exists already"):
            admit(group)


def test_a_report_of_nothing_that_went_wrong_has_no_checks():
    assert ScenarioReport(1, "a", "b?").checks_json() == []
