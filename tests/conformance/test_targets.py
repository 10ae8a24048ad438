"""The targets: our scheduler, transformers if it is installed, the page's example, the command."""

import importlib.util
import json
import random
import re
from collections import Counter, deque
from pathlib import Path

import pytest
from searches import search

from vllm_sim.conformance import __main__ as command
from vllm_sim.conformance.search import Search
from vllm_sim.conformance.targets import TARGETS
from vllm_sim.serving.scheduler import Scheduler

ROOT = Path(__file__).resolve().parents[2]
PINNED = ROOT / "requirements-models.txt"
OURS = {"ours", "ours-manager", "ours-contiguous", "ours-buddy"}
OTHERS = sorted(set(TARGETS) - OURS - {"transformers"})


def closed(name, world):
    target = TARGETS[name]
    found = search(target, target.worlds[world])
    assert found.closed and found.fault is None and found.missing == ()
    return found.states, found.transitions


def alike(name, world, share):
    """Holds a share of the states that were taken for one against each other: whatever may be
    called in them leads to the same."""
    target, rng, again = TARGETS[name], random.Random(0), []
    engines = Search(target, target.worlds[world])
    first = engines.begin()
    left, known = deque([(first.adapter.key(), first)]), {first.adapter.key(): None}

    def outcomes(state):
        for operation in engines.operations(state):
            trial = engines._branch(state)
            engines.take(trial, operation)
            yield operation.name, trial.adapter.key(), trial

    while left:
        key, state = left.popleft()
        known[key] = Counter()
        for call, new, trial in outcomes(state):
            known[key][call, new] += 1
            if new not in known:
                known[new] = None
                left.append((new, trial))
            elif rng.random() < share:
                again.append((new, trial))
    for key, state in again:
        assert Counter(one[:2] for one in outcomes(state)) == known[key]
    return len(again)


# ---- our scheduler and manager together ---------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "states", "transitions"), [("small", 3_540, 8_621), ("swap", 2_752, 6_900)]
)
def test_every_state_of_our_scheduler(world, states, transitions):
    assert closed("ours", world) == (states, transitions)


@pytest.mark.parametrize("world", ["small", "swap"])
def test_states_of_our_scheduler_that_are_one_behave_alike(world):
    assert alike("ours", world, 0.5) > 500


def forgets_a_copy(monkeypatch):
    grow = Scheduler._grow

    def without(scheduler, iteration):
        preempted = grow(scheduler, iteration)
        iteration.copies = iteration.copies[1:]
        return preempted

    monkeypatch.setattr(Scheduler, "_grow", without)


def swaps_back_elsewhere(monkeypatch):
    swap_in = Scheduler._swap_in

    def turned(scheduler, iteration):
        swap_in(scheduler, iteration)
        pairs = iteration.swapped_in
        iteration.swapped_in = tuple(zip([a for a, _ in pairs], [b for _, b in pairs][::-1]))

    monkeypatch.setattr(Scheduler, "_swap_in", turned)


def keeps_what_has_ended(monkeypatch):
    stop = Scheduler._take_events

    def takes(scheduler, done):
        free = scheduler.manager.free
        scheduler.manager.free = lambda seq_id: [] if seq_id % 10 else free(seq_id)
        try:
            stop(scheduler, done)
        finally:
            del scheduler.manager.free

    monkeypatch.setattr(Scheduler, "_take_events", takes)


def nobody_is_admitted_while_another_runs(monkeypatch):
    monkeypatch.setattr(Scheduler, "_admit", lambda *_: True)


@pytest.mark.parametrize(
    ("breaks", "checks"),
    [
        (forgets_a_copy, {"contents", "unwritten", "overwrite"}),
        (swaps_back_elsewhere, {"contents", "unwritten"}),
        (keeps_what_has_ended, {"partition", "end", "exception"}),
        (nobody_is_admitted_while_another_runs, {"no end", "exception"}),
    ],
)
def test_what_is_broken_between_scheduler_and_manager_is_found(breaks, checks, monkeypatch):
    breaks(monkeypatch)
    target = TARGETS["ours"]
    found = search(target, target.worlds["swap"])
    assert found.fault.check in checks, found.fault


# ---- others -------------------------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="no transformers")
@pytest.mark.parametrize(
    ("world", "states", "transitions"),
    [("small", 0, 0), ("late, no cancels", 4_755, 7_976)],
)
def test_every_state_of_transformers_paged_generation(world, states, transitions):
    """With cancels, the order in which a set is gone through differs from process to process."""
    version = TARGETS["transformers"].source(None)
    found = closed("transformers", world)
    if states and f"transformers=={version}\n" in PINNED.read_text():
        assert found == (states, transitions)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="no transformers")
def test_states_of_transformers_that_are_one_behave_alike():
    TARGETS["transformers"].source(None)
    assert alike("transformers", "late, no cancels", 0.2) > 200


@pytest.mark.parametrize("name", OTHERS)
def test_an_engine_that_is_not_there_takes_one_line(name, tmp_path, capfd):
    if name == "vllm" and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    assert command.main([name, "--from", str(tmp_path)]) == 2
    printed, errors = capfd.readouterr()
    assert printed == "" and errors.count("\n") == 1
    assert errors.startswith("conformance: error: ") and "--from" in errors


# ---- the page, and the command ------------------------------------------------------------------


def test_the_pages_example_finds_its_leak(capfd, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 60
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(code)
    assert command.main(["toy.py:ToyAdapter", "--seconds", "10"]) == 1
    printed = capfd.readouterr().out
    (told,) = re.findall(r"Saved as toy.py it gives `(.*?)`", text)
    assert printed.startswith(told) and printed.strip().endswith("blocks lost: [1]")


@pytest.mark.parametrize(
    ("code", "name", "told"),
    [
        ("1 / 0", "bad.py:Mine", "bad.py: ZeroDivisionError: division by zero"),
        (
            "class Mine: worlds = {}",
            "bad.py:Mine",
            "Mine of bad.py has no required, start, operations",
        ),
        ("Mine = None", "bad.py:Mine", "Mine of bad.py is no class with worlds"),
        ("", "none.py:Mine", "none.py: FileNotFoundError"),
        ("", "no-such-engine", "or FILE.py:CLASS, not 'no-such-engine'"),
    ],
)
def test_an_adapter_that_cannot_be_used_takes_one_line(
    code, name, told, capfd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(code)
    assert command.main([name]) == 2
    printed, errors = capfd.readouterr()
    assert (printed, errors.count("\n")) == ("", 1) and told in errors


def test_the_page_names_every_target():
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert {name for name in TARGETS if f"`{name}`" not in text} == set()


def test_the_pages_figures_are_those_of_the_results():
    text = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    for name in ("ours", "transformers", "nano_vllm", "mini_sglang", "tokasaurus", "vllm"):
        result = json.loads((ROOT / "results" / f"conformance_{name}.json").read_text())
        tables = {table["id"]: table for table in result["output"]["tables"]}
        (row,) = tables["search"]["rows"]
        version = result["output"]["setting"]["version"].removeprefix("commit ")
        version = "here" if version.startswith("as it is") else version
        assert f"| {version} | {row['states']:,} | {row['transitions']:,} |" in text, name
        assert not result["output"]["exit_code"], name


def test_the_command_tells_what_it_went_through(tmp_path, capfd):
    path = tmp_path / "out.json"
    given = ["ours", "--world", "swap", "--seconds", "60", "--json", str(path), "--quiet"]
    assert command.main(given) == 0
    printed, errors = capfd.readouterr()
    assert "no fault in 2,752 states and 6,900 transitions, all that" in printed.replace("\n", " ")
    assert errors == "" and printed.isascii() and max(map(len, printed.splitlines())) <= 100
    assert '"schema": "pagedattention-sim/2"' in path.read_text()


def test_a_fault_is_exit_code_1_and_a_history(monkeypatch, capfd):
    forgets_a_copy(monkeypatch)
    assert command.main(["ours", "--world", "swap", "--quiet"]) == 1
    printed, _ = capfd.readouterr()
    assert "Step by step" in printed and "=> " in printed.splitlines()[-2]


@pytest.mark.parametrize(
    "given",
    [["nobody"], ["ours", "--world", "none"], ["ours", "--from", "."], ["ours", "--seconds", "0"]]
    + [["ours", "--seed", "x"], ["ours", "--without", "contents"], ["ours", "--from", ""]],
)
def test_what_cannot_be_used_takes_one_line(given, capfd):
    assert command.main(given) == 2
    printed, errors = capfd.readouterr()
    assert (printed, errors.count("\n")) == ("", 1) and errors.startswith("conformance: error: ")
