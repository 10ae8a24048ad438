"""What no other test reaches: the rarely taken side of a branch, and refusals deep inside.

Found by `make coverage`. What only a CUDA device reaches is named in pyproject.toml instead.
"""

import pytest
import torch

import main
from allocators import DuplicateSequenceError
from kv_cache_manager import BaselineCacheManager
from paged_attention import DeviceMemoryError
from sequence import BlockTable, Clock, Sequence, SequenceGroup
from vllm_sim.scenarios.report import ScenarioReport

SMALL = ["--model", "opt-125m", "--num-blocks", "140", "--device", "cpu", "--scenario", "1"]


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
