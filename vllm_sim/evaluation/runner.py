"""Runs what the figures ask for, over several processes, and turns the outcomes into rows.

Reproduces nothing by itself: the figures are in figures_memory.py, figures_rates.py and
figures_blocks.py. A figure is asked again and again which runs it needs, given those that are done
(a curve decides on its next rate when it knows the last), until none needs any.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import active_children
from threading import current_thread, main_thread
from typing import Protocol

from vllm_sim.evaluation import comparison as why
from vllm_sim.evaluation.comparison import EXPLAINED, Row, allow, over_seeds, verdict
from vllm_sim.evaluation.curves import Done
from vllm_sim.evaluation.experiments import Outcome, Run, execute
from vllm_sim.evaluation.figures_blocks import Fig18b, Fig19b
from vllm_sim.evaluation.figures_memory import Fig2, Fig13, Fig15, Table1
from vllm_sim.evaluation.figures_rates import Fig12, Fig14, Fig16, Fig17
from vllm_sim.evaluation.panels import BEAM_SECONDS
from vllm_sim.reporting.documents import rows_table
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import counted
from vllm_sim.scenarios.report import Table
from vllm_sim.workload.data_sets import DATASETS, Lengths

DRAW_EXCESS = 4.0  # tolerances that another draw may cost: single seeds differ by as much
LOOK_S = 0.5  # between two looks at the clock and for Ctrl-C while processes work


class Figure(Protocol):
    """What a figure must tell."""

    name: str

    def needed(self, done: Done, seed: int) -> list[Run]:
        """The runs that can be named now; those already done may be among them."""

    def rows(self, done: Done, seed: int, several: bool) -> list[Row]:
        """The comparisons, once nothing more is needed; `several` if seeds are averaged."""

    def notes(self, done: Done, seed: int) -> list[str]:
        """What else the runs show."""


@dataclass(frozen=True)
class Found:
    """A figure with its rows."""

    figure: Figure
    rows: list[Row]
    notes: list[str]
    done: Done

    def table(self) -> Table:
        headers = (
            "figure",
            "setting",
            "metric",
            "paper",
            "ours",
            "difference",
            "tolerance",
            "held",
        )
        spread = any(row.spread is not None for row in self.rows)
        if spread:
            headers = (*headers, "spread")
        cells = []
        for row in self.rows:
            held = verdict(row.held, row.reason, row.fitted)
            paper = row.paper if isinstance(row.paper, str) else _number(row.paper)
            cells.append(
                (
                    row.figure,
                    row.setting,
                    row.metric,
                    paper,
                    _number(row.ours),
                    row.difference,
                    row.tolerance,
                    held,
                    *([_number(row.spread)] if spread else []),
                )
            )
        return Table(self.figure.name, headers, cells)

    def check_json(self) -> dict[str, object]:
        """Whether all rows are held or explained, as --json has it."""
        held = sum(row.held is True for row in self.rows)
        explained = sum(row.held == EXPLAINED for row in self.rows)
        failed = len(self.rows) - held - explained
        rows = counted(len(self.rows), "row")
        detail = f"{rows}: {held} held, {explained} explained, {failed} not held"
        return {"name": self.figure.name, "ok": not failed, "detail": detail}


def rows_json(found: Iterable[Found]) -> dict[str, object]:
    """All rows as one table of --json."""
    title = "The paper's number beside ours"
    return rows_table("rows", title, [row.to_json() for one in found for row in one.rows], 3)


def _number(value: float) -> str:
    """Four significant digits, without an exponent."""
    if value == 0 or not 1e-9 < abs(value) < 1e12:
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def choose(names: Iterable[str], quick: bool, beam_seconds: float = BEAM_SECONDS) -> list[Figure]:
    """The figures of these names, Fig. 14's beam search that long; with `quick` what is cheap."""
    everything: dict[str, Figure] = {
        "table1": Table1(),
        "2": Fig2(),
        "12": Fig12(),
        "13": Fig13(),
        "14": Fig14(beam_seconds),
        "15": Fig15(),
        "16": Fig16(),
        "17": Fig17(),
        "18b": Fig18b(),
        "19b": Fig19b(),
    }
    if quick:
        everything = {
            "table1": Table1(),
            "2": Fig2(),
            "12": Fig12(("ShareGPT",)),
            "15": Fig15(beams=False),
            "17": Fig17(),
            "18b": Fig18b(alpaca=False),
            "19b": Fig19b(),
        }
    wanted = set(names)
    return [figure for name, figure in everything.items() if name in wanted]


def reproduce(
    figures: Sequence[Figure],
    lengths: Lengths,
    num_seeds: int,
    jobs: int,
    progress: Progress = SILENT,
) -> list[Found]:
    """Simulate all that the figures need, and compare. Raises what a run raises."""
    seeds = range(num_seeds)
    done: dict[Run, Outcome] = {}

    def needed() -> set[Run]:
        runs = {run for figure in figures for seed in seeds for run in figure.needed(done, seed)}
        return runs - done.keys()

    with closing(_outcomes(needed, lengths, jobs, progress)) as outcomes:
        for run, outcome in outcomes:
            done[run] = outcome
    found = []
    for figure in figures:
        by_seed = [figure.rows(done, seed, num_seeds > 1) for seed in seeds]
        rows = [over_seeds(list(same)) for same in zip(*by_seed, strict=True)]
        rows = [_judge(row, lengths) for row in rows]
        found.append(Found(figure, rows, figure.notes(done, 0), done))
    return found


def _judge(row: Row, lengths: Lengths) -> Row:
    """Without the authors' files a trace is another draw of the same lengths: it may be off."""
    setting = row.setting.lower()
    named = [name for name in DATASETS if name.split()[0].lower() in setting]
    if not lengths_matter(row) or set(named or DATASETS) & lengths.files.keys():
        return row
    return allow(row, DRAW_EXCESS, why.ANOTHER_DRAW)


def lengths_matter(row: Row) -> bool:
    """Whether the row comes from a trace: only then can another draw explain it."""
    sizes = row.figure in ("Table 1", "Fig. 1", "Sec. 4.5") or "of K/V a" in row.metric
    return not sizes and not row.setting.startswith("Fig. 19a")


def _outcomes(
    needed, lengths: Lengths, jobs: int, progress: Progress
) -> Generator[tuple, None, None]:
    """(run, outcome) as they come; `needed()` is asked for more whenever one is done."""
    if jobs == 1:
        num_done = 0
        while runs := needed():
            known = num_done + len(runs)
            for run in sorted(runs, key=_cost, reverse=True):
                part = progress.part(num_done, known, f"{num_done} of {known} runs so far")
                part.at(0, 1)
                yield run, execute(run, lengths, progress=part)
                num_done += 1
        return
    files = tuple(sorted(lengths.files.items()))
    others = set(active_children())
    pools = ProcessPoolExecutor(jobs, initializer=_ignore_interrupts)
    with _interrupts_noted() as raise_if_noted, pools as pool:
        pending: dict[Future, Run] = {}
        num_done = 0
        try:
            while True:
                runs = needed() - set(pending.values())
                # Longest first; a few more than processes, so that none waits for us.
                for run in sorted(runs, key=_cost, reverse=True)[: 2 * jobs - len(pending)]:
                    pending[pool.submit(_work, run, files)] = run
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


def _work(run: Run, files: tuple[tuple[str, str], ...]) -> Outcome:
    return execute(run, _lengths(files))


@cache
def _lengths(files: tuple[tuple[str, str], ...]) -> Lengths:
    """Read once in each process."""
    return Lengths(dict(files))


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
