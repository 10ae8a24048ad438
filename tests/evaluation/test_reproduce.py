"""reproduce.py as its users call it, and that it tells a broken simulator from a sound one."""

import io
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest

import reproduce
from allocators import BuddyAllocator, DuplicateSequenceError
from kv_cache_manager import MemoryUsage, PagedKVCacheManager
from vllm_sim import paper
from vllm_sim.evaluation import expected_misses, experiments, pictures, report, runner
from vllm_sim.evaluation.expected_misses import by_row, expected
from vllm_sim.evaluation.experiments import Outcome, Run, execute
from vllm_sim.evaluation.figures_memory import Fig2, Fig15, Table1
from vllm_sim.evaluation.options import FIGURES
from vllm_sim.evaluation.runner import choose
from vllm_sim.evaluation.runner import reproduce as regenerate
from vllm_sim.paper import VLLM
from vllm_sim.reporting.progress import Progress
from vllm_sim.serving.latency import LatencyModel
from vllm_sim.workload.data_sets import DATASETS, Lengths, find_lengths

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
COMPACT = Lengths({})
OUTCOME = Outcome(0.03, 10, 100, 8.0, 1, 1, dict.fromkeys(MemoryUsage.PARTS, 0.25), 10.0, 0.1)
KEYS = ["figure", "setting", "metric", "paper", "ours", "difference", "tolerance", "held", "fitted"]


def short(monkeypatch, seconds, window):
    """The artifact's Fig. 2 and 15 setting, cut to a few seconds."""
    runs = dict(paper.ARTIFACT_RUNS)
    for name in ("Fig. 2", "Fig. 15"):
        runs[name] = {**runs[name], "seconds": seconds, "window": window}
    monkeypatch.setattr(paper, "ARTIFACT_RUNS", runs)


# --- the command line ----------------------------------------------------------------------------


def test_help_starts_without_torch_and_without_the_simulator(run_script):
    code = (
        "import sys, reproduce\n"
        "try: reproduce.main(['--help'])\n"
        "except SystemExit as end: print(end.code)\n"
        "print({'torch', 'numpy', 'vllm_sim.evaluation.experiments'} & set(sys.modules))"
    )
    done = run_script("-c", code)
    assert done.stdout.endswith("0\nset()\n") and "--quick" in done.stdout


def test_a_table_with_its_words_as_keys(run_script, tmp_path):
    out = tmp_path / "out.json"
    done = run_script("reproduce.py", "--figure", "table1", "--json", out, cwd="/")
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(out.read_text(encoding="ascii"))
    (table,) = found["tables"]
    rows = table["rows"]
    assert all(list(row)[: len(KEYS)] == KEYS for row in rows)
    assert {row["held"] for row in rows} == {True, False}
    assert all(row["held"] != ("expected" in row) for row in rows)
    detail, _, seconds = done.stdout.splitlines()[-1].rpartition(", ")
    assert detail == "16 rows: 14 held, 2 missed, all as expected" and seconds.endswith(" s")
    assert {row["fitted"] for row in rows} == {False}
    assert found["checks"] == [{"name": "Table 1", "ok": True, "detail": detail}]
    assert "compact table" in found["setting"]["lengths"]["ShareGPT"]
    first, *_ = done.stdout.splitlines()
    assert first.startswith("Lengths: compact tables for ShareGPT, Alpaca, WMT16 1-shot, ")
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_words_of_a_table_are_told_before_it(capsys):
    assert reproduce.main(["--figure", "table1", "--format", "latex"]) == 0
    before, *_ = capsys.readouterr().out.split("\n\n")
    assert "'yes'" in before and "'MISSED'" in before and "'fitted'" in before
    assert all(line.startswith("% ") for line in before.splitlines())


def test_quick_is_a_part_of_everything():
    everything, quick = choose(FIGURES, False), choose(FIGURES, True)
    assert {figure.name for figure in quick} < {figure.name for figure in everything}
    for figure in quick:
        (whole,) = [other for other in everything if other.name == figure.name]
        assert set(figure.needed({})) <= set(whole.needed({}))
    assert [figure.name for figure in choose(["2"], True)] == ["Fig. 2"]


def test_figure_14_runs_the_papers_hour():
    (figure,) = choose(["14"], False)
    assert {run.seconds for run in figure.needed({})} == {3600.0}


def test_figures_are_drawn_after_the_table_is_printed(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda *given: drawn.append(given))
    assert reproduce.main(["--figure", "table1", "--figures", str(tmp_path / "new")]) == 0
    ((found, folder),) = drawn
    assert folder == tmp_path / "new" and [one.figure.name for one in found] == ["Table 1"]


def test_an_interrupt_waits_for_no_worker(run_script):
    """Each has a run before it that would outlast the test."""
    code = """if True:
        import multiprocessing, os, signal, sys, threading, time
        import reproduce
        from vllm_sim.evaluation import runner

        def work(run):
            started.release()
            time.sleep(1000)

        def interrupt():
            for _ in range(2):
                started.acquire()
            os.kill(os.getpid(), signal.SIGINT)

        multiprocessing.set_start_method("fork")  # so that workers have all this
        started = multiprocessing.Semaphore(0)
        runner._work = work
        threading.Thread(target=interrupt).start()
        print(reproduce.main(["--figure", "2", "--jobs", "2"]))  # Python waits for them at its end
    """
    done = run_script("-W", "ignore", "-c", code)
    assert (done.stdout, done.stderr) == ("130\n", "")


# --- seeds, processes, threads -------------------------------------------------------------------


def test_seeds_are_averaged_and_their_spread_told(monkeypatch):
    short(monkeypatch, 60, (20, 60))
    (one,) = regenerate([Fig2()], COMPACT, 1, 1)
    (several,) = regenerate([Fig2()], COMPACT, 3, 1)
    assert [row.metric for row in one.rows] == [row.metric for row in several.rows]
    assert all(row.spread is None for row in one.rows)
    moved = [row for row in several.rows if row.spread]
    assert len(moved) > 10 and all("spread" in row.to_json() for row in moved)
    assert {row.tolerance for row in one.rows} == {"1", "inside"}
    assert {row.tolerance for row in several.rows} == {"2.5", "inside"}
    assert (several.notes, several.done) == (one.notes, one.done), "they are of seed 0"


def test_several_processes_find_what_one_finds(monkeypatch):
    short(monkeypatch, 60, (20, 60))
    (alone,) = regenerate([Fig2()], COMPACT, 1, 1)
    (together,) = regenerate([Fig2()], COMPACT, 1, 2)
    assert alone.rows == together.rows


def test_what_a_worker_does_is_what_one_process_does(monkeypatch):
    run = Run(VLLM, "opt-13b", "Alpaca", 1.0, 20.0)
    seen = []
    monkeypatch.setattr(runner.signal, "signal", lambda *given: seen.append(given))
    monkeypatch.setattr(runner, "_end_with_parent", lambda: None)
    runner._begin_work(COMPACT)
    assert seen == [(runner.signal.SIGINT, runner.signal.SIG_IGN)]
    assert runner._work(run) == execute(run, COMPACT)


def test_it_can_be_called_in_a_thread():
    """Which may set no handler of signals, and is told of none."""
    with ThreadPoolExecutor(1) as pool:
        (there,) = pool.submit(regenerate, [Table1()], COMPACT, 1, 2).result()
    (here,) = regenerate([Table1()], COMPACT, 1, 2)
    assert there.rows == here.rows and len(there.rows) == 16


# --- all figures, with runs that take no time ----------------------------------------------------


def alike(run):
    """What the runs of one curve have in common."""
    return replace(run, rate=1.0, seed=0)


def at_once(figures):
    """In place of execute(): every curve rises half-way between its first rate and its last."""
    middle = {}
    for figure in figures:
        for curves in figure.curves.values() if hasattr(figure, "curves") else ():
            for curve in curves.values():
                rates = [rate for rate, _ in curve.paper]
                middle[alike(curve.run)] = (min(rates) + max(rates)) / 2.0

    def execute(run, lengths, progress=None):
        slow = run.rate > middle.get(alike(run), 15.0)
        return replace(OUTCOME, normalized_latency=2.0 if slow else 0.03)

    return execute


@pytest.mark.parametrize("seeds", [1, 2])
def test_every_figure_has_its_rows_and_notes(monkeypatch, seeds):
    figures = choose(FIGURES, False)
    monkeypatch.setattr(runner, "execute", at_once(figures))
    log, ticks = io.StringIO(), itertools.count(0.0, 20.0)
    shown = Progress.on(log, "reproduce.py", clock=lambda: next(ticks))
    found = regenerate(figures, COMPACT, seeds, 1, shown)
    assert [one.figure.name for one in found] == [figure.name for figure in figures]
    for one in found:
        assert one.rows and all(row.held in (True, False) for row in one.rows)
        assert all((row.expected is None) == (seeds == 2) for row in one.rows)
        assert all(isinstance(note, str) and note for note in one.notes)
        headers = report.table_of(one).headers
        assert ("spread" in headers) == any(row.spread is not None for row in one.rows)
    lines = log.getvalue().splitlines()
    assert len(lines) > 100 and all(line.endswith(" runs so far") for line in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-12, "1e-12"), (1e15, "1e+15"), (12345.6, "12,346"), (0.12345, "0.1235")],
)
def test_numbers_have_four_digits(value, text):
    assert report.number(value) == text


# --- bad input -----------------------------------------------------------------------------------


def bad_files(folder):
    (folder / "empty.csv").write_text("")
    (folder / "sharegpt_bad.csv").write_text("input_len,output_len\n5,0\n")
    (folder / "unknown.csv").write_text("a,b\n1,2\n")
    (folder / "sharegpt_long.csv").write_text("input_len,output_len\n5,3000\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--figure", "11"], "invalid choice: '11'"),
        (["--figure"], "expected one argument"),
        (["--seeds", "0"], "'0' is not a positive integer"),
        (["--seeds", "-1"], "'-1' is not"),
        (["--seeds", "1001"], "--seeds 1001: at most 1000"),
        (["--seeds", "9" * 5000], "at most 12 digits"),
        (["--jobs", "1.5"], "'1.5' is not"),
        (["--jobs", "1025"], "--jobs 1025: at most 1024"),
        (["--fig", "2"], "unrecognized arguments"),
        (["--figures", "12"], "for one figure use --figure 12"),
        (["--quick", "--figure", "13"], "nothing of figure 13 is quick"),
        (["--lengths", "{folder}/none.csv"], "cannot be read"),
        (["--lengths", "{folder}/empty.csv"], "empty.csv"),
        (["--lengths", "{folder}/sharegpt_bad.csv"], "line 2"),
        (["--lengths", "{folder}/sharegpt_long.csv"], "no request for ShareGPT"),
        (["--lengths", "{folder}/unknown.csv"], "no data set is known"),
        (["--json", "{folder}/none/out.json"], "out.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, refused, tmp_path, monkeypatch):
    monkeypatch.delenv("LENGTHS_DIR", raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    folder = bad_files(tmp_path)
    monkeypatch.setattr(runner, "execute", lambda *_, **__: pytest.fail("simulated"))
    arguments = [word.format(folder=folder) for word in arguments]
    assert says in refused(reproduce, "--jobs", 1, *arguments)
    assert os.listdir(tmp_path / "empty") == []


def test_a_folder_that_is_not_there(run_script, tmp_path):
    env = {"LENGTHS_DIR": tmp_path / "none"}
    done = run_script("reproduce.py", "--figure", "table1", env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("a bad length"), "a bad length"),
        (DuplicateSequenceError("a twin"), "a twin"),
        (BrokenProcessPool("terminated"), "lower --jobs"),
    ],
)
def test_what_a_run_raises_is_one_line(error, says, capsys, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(runner, "execute", refuse)
    assert reproduce.main(["--figure", "2", "--jobs", "1"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("reproduce.py: error: ") and errors.endswith(f"{says}\n")


# --- a broken simulator is found -----------------------------------------------------------------


def failures(figures):
    found = regenerate(figures, COMPACT, 1, 1)
    return [row for figure in found for row in figure.rows if row.failed]


@pytest.mark.slow
def test_a_sound_simulator_passes():
    assert failures([Fig2(), Fig15(beams=False)]) == []


def test_the_rows_that_theta_was_fitted_to_are_marked(monkeypatch):
    short(monkeypatch, 10, (2, 10))
    (found,) = regenerate([Fig15()], COMPACT, 1, 1)
    assert {row.fitted for row in found.rows} == {True, False}
    assert all(row.fitted == (", beam" in row.setting) for row in found.rows)
    column = [cells[-1] for cells in report.table_of(found).rows if cells[-1]]
    assert [cell.endswith(", fitted") for cell in column] == [row.fitted for row in found.rows]


def test_the_closing_line_counts_the_fitted_rows_apart(monkeypatch, capsys):
    sound = Table1.rows

    def fitted(self, done):
        return [replace(row, fitted=row.setting == "opt-175b") for row in sound(self, done)]

    monkeypatch.setattr(Table1, "rows", fitted)
    assert reproduce.main(["--figure", "table1"]) == 0
    printed = capsys.readouterr().out
    # Of Table 1's four numbers for 175B one is missed.
    assert "16 rows: 14 held (3 of them fitted), 2 missed, all as expected, " in printed
    assert printed.count("yes, fitted") == 3 and printed.count("missed, fitted") == 1


def test_a_wrong_buddy_size_is_found(monkeypatch):
    sound = BuddyAllocator.order_for
    monkeypatch.setattr(BuddyAllocator, "order_for", lambda self, n: min(7, sound(self, n) + 1))
    assert any("Orca" in row.setting for row in failures([Fig2()]))


def test_no_copy_on_write_is_found(monkeypatch):
    """All samples go on writing into the prompt's last block, which they still share."""
    itself = lambda self, table: (table.blocks[-1],) * 2  # noqa: E731
    monkeypatch.setattr(PagedKVCacheManager, "_copy_last_block", itself)
    failed = failures([Fig15(beams=False)])
    assert failed and all("parallel" in row.setting for row in failed)


def test_samples_that_share_nothing_are_found(monkeypatch):
    def apart(self, group, alone=False):
        seqs = group.unfinished()
        need = sum(self.blocks_for(seq.num_tokens) for seq in seqs)
        if need > self.num_free_blocks - self.watermark_blocks:
            return None
        return tuple(copy for seq in seqs for copy in self.allocate(seq.seq_id, seq.num_tokens))

    monkeypatch.setattr(PagedKVCacheManager, "try_admit", apart)
    failed = failures([Fig15(beams=False)])
    assert failed and all("parallel" in row.setting for row in failed)


def test_no_watermark_is_found(monkeypatch):
    sound = PagedKVCacheManager.__init__

    def without(self, *args, **options):
        sound(self, *args, **(options | {"watermark": 0.0}))

    monkeypatch.setattr(PagedKVCacheManager, "__init__", without)
    assert [row.figure for row in failures([Fig2()])] == ["Sec. 4.5"]


def test_a_simulator_too_slow_from_the_first_rate_on_is_found(monkeypatch, tmp_path, capsys):
    """No curve has a rate at 0.5 s/token then: that is a failure, not input that cannot be used."""
    monkeypatch.setattr(paper, "TRACE_SECONDS", dict.fromkeys(paper.TRACE_SECONDS, 5))
    slow = LatencyModel(step_s=1.0, token_s=0.1)
    monkeypatch.setattr(experiments, "latency_of", lambda run: slow)
    out = tmp_path / "rows.json"
    assert reproduce.main(["--figure", "12", "--quick", "--jobs", "1", "--json", str(out)]) == 1
    assert "no value" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["exit_code"] == 1 and [check["ok"] for check in found["checks"]] == [False]
    rows = found["tables"][0]["rows"]
    without = [row for row in rows if row["ours"] is None]
    assert without and not any(row["held"] for row in without)


# --- which rows are expected to be missed --------------------------------------------------------

GB = "parameters, GB"
SLOTS = ("D1", "Table 1", "opt-66b", "kilo slots")
SAVED = ("D14", "Fig. 15", "13B Alpaca, {parallel,beam} 6", "% of blocks saved")


@pytest.mark.parametrize(
    ("listed", "code", "failed", "closing"),
    [
        ([SLOTS, ("D2", "Table 1", "opt-175b", GB)], 0, [], "all as expected"),
        ([SLOTS], 1, [f"MISSED: Table 1, opt-175b, {GB}"], "1 of them not expected"),
        (
            [SLOTS, ("D2", "Table 1", "opt-{13b,175b}", GB)],
            1,
            [f"NOT MISSED: Table 1, opt-13b, {GB}"],
            "1 held but expected to be missed",
        ),
    ],
)
def test_a_row_missed_but_not_listed_and_one_listed_but_held_each_fail_the_run(
    monkeypatch, capsys, listed, code, failed, closing
):
    monkeypatch.setattr(expected_misses, "WITHOUT_FILES", listed)
    assert reproduce.main(["--figure", "table1", "--quiet"]) == code
    told = capsys.readouterr().out.split("Expected to be missed (docs/differences.md):\n")[1]
    _, *lines, _, last = [line for line in told.splitlines() if not line.startswith("D2: ")]
    assert lines == failed and last.startswith(f"16 rows: 14 held, 2 missed, {closing}, ")


def test_a_part_of_the_run_is_expected_to_miss_its_part(monkeypatch):
    short(monkeypatch, 10, (2, 10))
    monkeypatch.setattr(expected_misses, "WITHOUT_FILES", [SLOTS, SAVED])
    for beams, names in ((True, ["parallel", "beam"]), (False, ["parallel"])):
        (found,) = regenerate([Fig15(beams=beams)], COMPACT, 1, 1)
        told = [row.setting for row in found.rows if row.expected]
        assert told == [f"13B Alpaca, {name} 6" for name in names]


def test_of_another_run_rows_are_only_counted(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(expected_misses, "WITHOUT_FILES", [])
    (tmp_path / "sharegpt.csv").write_text("input_len,output_len\n5,7\n")
    for other in (["--seeds", "2"], ["--lengths", str(tmp_path / "sharegpt.csv")]):
        assert reproduce.main(["--figure", "table1", *other]) == 0
        printed = capsys.readouterr().out
        assert (
            "its rows are only counted" in printed and "\n16 rows: 14 held, 2 missed, " in printed
        )
        assert "MISSED:" not in printed and "expected, " not in printed


def test_the_recorded_files_are_known_by_what_is_in_them(monkeypatch):
    known = {dataset: [(5, 7), (6, 8)] for dataset in DATASETS}
    files = Lengths(dict.fromkeys(DATASETS, "any name"), known)
    assert expected(files, 1) is None
    monkeypatch.setattr(expected_misses, "CHECKSUM", expected_misses.checksum(files))
    assert expected(files, 1) == by_row(expected_misses.WITH_FILES)
    assert expected(files, 2) is None
    fewer = Lengths({name: path for name, path in files.files.items() if name != "chat"}, known)
    order = Lengths(files.files, known | {"chat": known["chat"][::-1]})
    assert expected(fewer, 1) is expected(order, 1) is None


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("reproduce", expected_misses.WITH_FILES),
        ("reproduce_without_lengths", expected_misses.WITHOUT_FILES),
    ],
)
def test_the_recorded_runs_missed_what_is_listed_and_nothing_else(name, listed):
    recorded = json.loads((ROOT / "results" / f"{name}.json").read_text())["output"]
    rows = recorded["tables"][0]["rows"]
    missed = [
        (row["figure"], row["setting"], row["metric"]) for row in rows if row["held"] is not True
    ]
    assert len(rows) == 380 and recorded["exit_code"] == 0
    assert sorted(by_row(listed)) == sorted(missed)


@pytest.mark.skipif(not DATA.exists(), reason="the authors' lengths are not here")
def test_the_authors_lengths_give_figure_2_within_a_point():
    (found,) = regenerate([Fig2()], find_lengths([], str(DATA)), 1, 1)
    assert len(found.rows) == 17 and all(row.held for row in found.rows)
    assert {row.expected for row in found.rows} == {""}, "these are the recorded run's files"
