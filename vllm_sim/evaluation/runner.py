"""Runs what the figures ask for, over several processes, and turns the outcomes into rows.

Reproduces nothing by itself: the figures are in figures_memory.py, figures_rates.py and
figures_blocks.py. A figure is asked again and again which runs it needs, given those that are done
(a curve decides on its next rate when it knows the last), until none needs any. It names runs
without a seed; here, and only here, all of them are repeated for each seed.

    found = reproduce(choose(["2", "15"], quick=False), find_lengths([], None), num_seeds=2, jobs=4)
    found[0].rows[0].ours
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import active_children, parent_process
from threading import Thread, current_thread, main_thread

from vllm_sim.evaluation.comparison import Figure, Row, over_seeds
from vllm_sim.evaluation.expected_misses import expected, mark
from vllm_sim.evaluation.experiments import Done, Outcome, Run, execute
from vllm_sim.evaluation.figures_blocks import Fig18b, Fig19b
from vllm_sim.evaluation.figures_memory import Fig2, Fig13, Fig15, Table1
from vllm_sim.evaluation.figures_rates import Fig12, Fig14, Fig16, Fig17
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.workload.data_sets import Lengths

LOOK_S = 0.5  # between two looks at the clock and for Ctrl-C while processes work
_lengths: Lengths  # of the runs of a process that is given them
Needed = Callable[[], set[Run]]


@dataclass(frozen=True)
class Found:
    """A figure with its rows, and the outcomes of seed 0 behind them."""

    figure: Figure
    rows: list[Row]
    notes: list[str]
    done: Done


def choose(names: Iterable[str], quick: bool) -> list[Figure]:
    """The figures of these names; with `quick` what is cheap."""
    everything: dict[str, Figure] = {
        "table1": Table1(),
        "2": Fig2(),
        "12": Fig12(("ShareGPT",)) if quick else Fig12(),
        "13": Fig13(),
        "14": Fig14(),
        "15": Fig15(beams=not quick),
        "16": Fig16(),
        "17": Fig17(),
        "18b": Fig18b(alpaca=not quick),
        "19b": Fig19b(),
    }
    wanted = set(names) - ({"13", "14", "16"} if quick else set())
    return [figure for name, figure in everything.items() if name in wanted]


def reproduce(
    figures: Sequence[Figure],
    lengths: Lengths,
    num_seeds: int,
    jobs: int,
    progress: Progress = SILENT,
) -> list[Found]:
    """Simulate all that the figures need, and compare. Raises what a run raises."""
    misses = expected(lengths, num_seeds)  # which reads the files: a bad one ends nothing later
    by_seed: list[dict[Run, Outcome]] = [{} for _ in range(num_seeds)]  # runs as figures name them

    def needed() -> set[Run]:
        return {
            replace(run, seed=seed)
            for seed, done in enumerate(by_seed)
            for figure in figures
            for run in figure.needed(done)
            if run not in done
        }

    work = _one_by_one(needed, lengths, progress)
    if jobs > 1:
        work = _in_processes(needed, lengths, jobs, progress)
    with closing(work) as outcomes:
        for run, outcome in outcomes:
            by_seed[run.seed][replace(run, seed=0)] = outcome
    found = []
    for figure in figures:
        same = zip(*(figure.rows(done) for done in by_seed), strict=True)
        rows = mark([over_seeds(list(one)) for one in same], misses)
        found.append(Found(figure, rows, figure.notes(by_seed[0]), by_seed[0]))
    return found


def _one_by_one(
    needed: Needed, lengths: Lengths, progress: Progress
) -> Generator[tuple[Run, Outcome], None, None]:
    """(run, outcome) of all that is needed, in this process; then of what is needed after that."""
    num_done = 0
    while runs := needed():
        known = num_done + len(runs)
        for run in sorted(runs, key=_cost, reverse=True):
            part = progress.part(num_done, known, f"{num_done} of {known} runs so far")
            part.at(0, 1)
            yield run, execute(run, lengths, progress=part)
            num_done += 1


def _in_processes(
    needed: Needed, lengths: Lengths, jobs: int, progress: Progress
) -> Generator[tuple[Run, Outcome], None, None]:
    """(run, outcome) as they come; `needed()` is asked for more whenever one is done."""
    others = set(active_children())
    pools = ProcessPoolExecutor(jobs, initializer=_begin_work, initargs=(lengths,))
    with _interrupts_noted() as raise_if_noted, pools as pool:
        pending: dict[Future, Run] = {}
        num_done = 0
        try:
            while True:
                runs = needed() - set(pending.values())
                # Longest first; a few more than processes, so that none waits for us.
                for run in sorted(runs, key=_cost, reverse=True)[: 2 * jobs - len(pending)]:
                    pending[pool.submit(_work, run)] = run
                if not pending:
                    return
                known = num_done + len(pending) + len(runs - set(pending.values()))
                finished: set[Future] = set()
                while not finished:
                    progress.at(num_done, known, f"{num_done} of {known} runs so far")
                    finished, _ = wait(pending, LOOK_S, FIRST_COMPLETED)
                    raise_if_noted()
                for future in finished:
                    yield pending.pop(future), future.result()
                    num_done += 1
        except BaseException:  # Ctrl-C above all
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(active_children()) - others:
                worker.terminate()  # what it has begun would take seconds, for nobody
            raise


@contextmanager
def _interrupts_noted() -> Iterator[Callable[[], None]]:
    """Within, Ctrl-C is raised where the function that is given is called, and nowhere else.

    Raised inside `submit` or `wait` it could leave a lock of theirs taken, for which the pool's
    own thread would then wait for ever.
    """
    noted: list[int] = []

    def raise_if_noted() -> None:
        if noted:
            raise KeyboardInterrupt

    if current_thread() is not main_thread():  # which alone is told of signals
        yield raise_if_noted
        return
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield raise_if_noted
    finally:
        signal.signal(signal.SIGINT, before)
    raise_if_noted()


def _cost(run: Run) -> float:
    """About how long a run takes, for the order only."""
    return run.rate * run.seconds * run.width * (3.0 if run.decoding == "beam" else 1.0)


def _begin_work(lengths: Lengths) -> None:
    """In each process; Ctrl-C is for the parent."""
    global _lengths
    Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _lengths = lengths


def _end_with_parent() -> None:
    """However that ends: it may be killed, and could not tell its workers."""
    parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def _work(run: Run) -> Outcome:
    return execute(run, _lengths)
