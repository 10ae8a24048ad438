"""reproduce.py as its users call it, and that it tells a broken simulator from a sound one."""

import ast
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import allocators as allocator
import kv_cache_manager as paged_tables
import reproduce
from kv_cache_manager import PagedKVCacheManager
from vllm_sim import models, paper
from vllm_sim.evaluation import experiments
from vllm_sim.evaluation import runner as reproduction
from vllm_sim.evaluation.comparison import EXPLAINED
from vllm_sim.evaluation.experiments import Outcome, Run, execute, manager_for
from vllm_sim.evaluation.figures_memory import Fig2, Fig15, Table1
from vllm_sim.evaluation.runner import choose
from vllm_sim.evaluation.runner import reproduce as regenerate
from vllm_sim.paper import FASTER_TRANSFORMER, ORCA_MAX, ORCA_ORACLE, SYSTEMS, VLLM
from vllm_sim.serving.latency import LatencyModel
from vllm_sim.workload.data_sets import Lengths, find_lengths

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
COMPACT = Lengths({})
SIMULATOR = (
    "sequence",
    "allocator",
    "copy_ledger",
    "memory_usage",
    "invariants",
    "paged_tables",
    "baseline_manager",
    "kv_cache_manager",
    "workload",
    "length_tables",
    "chat_lengths",
    "length_files",
    "beam_search",
    "scheduler",
    "serving",
    "static_batching",
    "latency",
    "experiments",
)
KEYS = ["figure", "setting", "metric", "paper", "ours", "difference", "tolerance", "held", "fitted"]


def call(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "LENGTHS_DIR"} | environment
    return subprocess.run(
        [sys.executable, "reproduce.py", *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )


# --- the command line ----------------------------------------------------------------------------


def test_help_starts_without_torch_and_without_the_simulator():
    code = (
        "import sys, reproduce\n"
        "try: reproduce.main(['--help'])\n"
        "except SystemExit as end: print(end.code)\n"
        "print({'torch', 'numpy', 'experiments'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("0\nset()\n") and "--quick" in done.stdout


def test_the_whole_of_it_never_imports_torch():
    code = "import sys, reproduction; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_table_with_its_words_as_keys(tmp_path):
    out = tmp_path / "out.json"
    done = call("--figure", "table1", "--json", out)
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(out.read_text(encoding="ascii"))
    (table,) = found["tables"]
    rows = table["rows"]
    assert all(list(row)[: len(KEYS)] == KEYS for row in rows)
    assert {row["held"] for row in rows} == {True, EXPLAINED}
    assert all(("reason" in row) == (row["held"] == EXPLAINED) for row in rows)
    held = sum(row["held"] is True for row in rows)
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"{len(rows)} rows: {held} held, {len(rows) - held} explained, 0 not")
    assert {row["fitted"] for row in rows} == {False}
    assert found["checks"] == [
        {"name": "Table 1", "ok": True, "detail": done.stdout.splitlines()[-1].rpartition(",")[0]}
    ]
    assert "compact table" in found["setting"]["lengths"]["ShareGPT"]
    assert "Lengths: ShareGPT: compact table" in done.stdout


def short(monkeypatch, module, seconds, window):
    """The artifact's Fig. 2 and 15 setting, cut to a few seconds."""
    runs = dict(paper.ARTIFACT_RUNS)
    for name in ("Fig. 2", "Fig. 15"):
        runs[name] = {**runs[name], "seconds": seconds, "window": window}
    monkeypatch.setattr(paper, "ARTIFACT_RUNS", runs)


def test_seeds_are_averaged_and_their_spread_told(monkeypatch):
    short(monkeypatch, paper, 60, (20, 60))
    (one,) = regenerate([Fig2()], COMPACT, 1, 1)
    (several,) = regenerate([Fig2()], COMPACT, 3, 1)
    assert [row.metric for row in one.rows] == [row.metric for row in several.rows]
    assert all(row.spread is None for row in one.rows)
    moved = [row for row in several.rows if row.spread]
    assert len(moved) > 10 and all("spread" in row.to_json() for row in moved)
    assert {row.tolerance for row in several.rows} == {"2.5", "inside"}


def test_several_processes_find_what_one_finds(monkeypatch):
    short(monkeypatch, paper, 60, (20, 60))
    (alone,) = regenerate([Fig2()], COMPACT, 1, 1)
    (together,) = regenerate([Fig2()], COMPACT, 1, 2)
    assert alone.rows == together.rows


def test_it_can_be_called_in_a_thread():
    """Which may set no handler of signals, and is told of none."""
    with ThreadPoolExecutor(1) as pool:
        (there,) = pool.submit(regenerate, [Table1()], COMPACT, 1, 2).result()
    (here,) = regenerate([Table1()], COMPACT, 1, 2)
    assert there.rows == here.rows and len(there.rows) == 16


def test_quick_is_a_part_of_everything():
    everything, quick = choose(reproduce.FIGURES, False), choose(reproduce.FIGURES, True)
    assert {figure.name for figure in quick} < {figure.name for figure in everything}
    for figure in quick:
        (whole,) = [other for other in everything if other.name == figure.name]
        assert set(figure.needed({}, 0)) <= set(whole.needed({}, 0))
    assert [figure.name for figure in choose(["2"], True)] == ["Fig. 2"]


def test_beam_search_runs_as_long_as_it_is_told_and_nothing_else_does():
    seconds = {}
    for beam_seconds in (600.0, 60.0, 3600.0):
        (figure,) = choose(["14"], False, beam_seconds)
        for (decoding, _), curves in figure.curves(0).items():
            for curve in curves.values():
                seconds.setdefault((beam_seconds, decoding), set()).add(curve.run.seconds)
        assert {run.seconds for run in figure.needed({}, 0)} == {beam_seconds, 3600.0}
    assert seconds == {
        (told, decoding): {3600.0 if decoding == "parallel" else told}
        for told in (600.0, 60.0, 3600.0)
        for decoding in ("parallel", "beam")
    }
    assert choose(["14"], False) == choose(["14"], False, 600.0)
    assert choose(["2", "15"], False) == choose(["2", "15"], False, 60.0)


def test_the_length_of_beam_search_goes_from_the_command_line_into_the_json(monkeypatch, tmp_path):
    """Fig. 14 with outcomes at once: how long each run was asked to be."""
    asked, out = set(), tmp_path / "out.json"

    def at_once(run, lengths, progress=None):
        asked.add((run.decoding, run.seconds))
        return Outcome(0.03 if run.rate < 15.0 else 2.0, 1, 1, 1.0)

    monkeypatch.setattr(reproduction, "execute", at_once)
    arguments = ["--figure", "14", "--jobs", "1", "--json", str(out)]
    assert reproduce.main([*arguments, "--beam-seconds", "60"]) == 1
    assert asked == {("parallel", 3600.0), ("beam", 60.0)}
    assert json.loads(out.read_text())["setting"]["beam_seconds"] == 60
    asked.clear()
    assert reproduce.main(arguments) == 1
    assert asked == {("parallel", 3600.0), ("beam", 600.0)}
    assert json.loads(out.read_text())["setting"]["beam_seconds"] == 600


def test_an_interrupt_waits_for_no_worker():
    """Each has a run before it that would outlast the test."""
    code = """if True:
        import multiprocessing, os, signal, sys, threading, time
        import reproduce
        from vllm_sim.evaluation import runner as reproduction

        def work(run, files):
            started.release()
            time.sleep(1000)

        def interrupt():
            for _ in range(2):
                started.acquire()
            os.kill(os.getpid(), signal.SIGINT)

        multiprocessing.set_start_method("fork")  # so that workers have all this
        started = multiprocessing.Semaphore(0)
        reproduction._work = work
        threading.Thread(target=interrupt).start()
        print(reproduce.main(["--figure", "2", "--jobs", "2"]))  # Python waits for them at its end
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        timeout=100,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("130\n", "")


# --- bad input -----------------------------------------------------------------------------------


def bad_files(folder):
    (folder / "empty.csv").write_text("")
    (folder / "sharegpt_bad.csv").write_text("input_len,output_len\n5,0\n")
    (folder / "unknown.csv").write_text("a,b\n1,2\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--figure", "11"], "invalid choice: '11'"),
        (["--figure"], "expected one argument"),
        (["--seeds", "0"], "'0' is not a positive integer"),
        (["--seeds", "-1"], "'-1' is not"),
        (["--jobs", "1.5"], "'1.5' is not"),
        (["--jobs", "1025"], "at most 1024"),
        (["--seeds", "9" * 5000], "is too large: at most 12 digits"),
        (["--fig", "2"], "unrecognized arguments"),
        (["--beam-seconds", "0"], "'0' is not a positive integer"),
        (["--beam-seconds", "3601"], "at most 3600"),
        (["--beam-seconds", "60"], "for figure 14, which is not among"),
        (["--lengths", "{folder}/none.csv"], "cannot be read"),
        (["--lengths", "{folder}/empty.csv"], "empty.csv"),
        (["--lengths", "{folder}/sharegpt_bad.csv"], "line 2"),
        (["--lengths", "{folder}/unknown.csv"], "no data set is known"),
        (["--json", "{folder}/none/out.json"], "out.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, says, tmp_path):
    folder = bad_files(tmp_path)
    done = call(*[argument.format(folder=folder) for argument in arguments], "--figure", "table1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("reproduce.py: error: ")
    assert says in done.stderr


def test_a_folder_that_is_not_there(tmp_path):
    done = call("--figure", "table1", LENGTHS_DIR=str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"rate": -1.0}, {"seconds": 0.0}, {"width": 0}])
def test_runs_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=r"positive|width"):
        Run(
            **(
                {
                    "system": VLLM,
                    "model": "opt-13b",
                    "dataset": "Alpaca",
                    "rate": 1.0,
                    "seconds": 1.0,
                }
                | bad
            )
        )


def test_a_request_that_never_fits_is_refused(tmp_path):
    path = tmp_path / "sharegpt.csv"
    path.write_text("input_len,output_len\n5,3000\n")
    done = call("--figure", "2", "--jobs", 1, "--lengths", path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no request for ShareGPT" in done.stderr


# --- what the simulator may know -----------------------------------------------------------------

# Of paper.py: shapes of models and GPUs, the names of the systems, and the artifact's limits.
SHAPES_AND_LIMITS = {
    "BLOCK_SIZE",
    "DEPLOYMENTS",
    "Deployment",
    "FASTER_TRANSFORMER",
    "FT_BATCH_SIZE",
    "FT_MAX_TOTAL_LEN",
    "MAX_BATCHED_TOKENS",
    "MAX_MODEL_LEN",
    "MAX_SEQUENCES",
    "ORCA_MAX",
    "ORCA_ORACLE",
    "ORCA_POW2",
    "SWAP_BYTES_PER_GPU",
    "SYSTEMS",
    "VLLM",
    "WATERMARK",
    "kv_blocks",
}


@pytest.mark.parametrize("name", SIMULATOR)
def test_the_simulator_reads_no_published_value(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="ascii"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {
                "paper",
                "paper_figures",
                "paper_curves",
                "paper_text",
            }
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("paper"):
            assert node.module == "paper"
            assert {alias.name for alias in node.names} <= SHAPES_AND_LIMITS


def test_outcomes_do_not_change_with_the_published_values(monkeypatch):
    run = Run(VLLM, "opt-13b", "ShareGPT", 2.0, 30.0)
    before = execute(run, COMPACT)
    for name in dir(paper):
        if name.startswith(("FIG", "TABLE1", "TEXT", "BLOG")):
            monkeypatch.setattr(paper, name, None)
    assert execute(run, COMPACT) == before


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_serves_all_requests(system):
    run = Run(system, "opt-13b", "ShareGPT", 1.0, 60.0)
    outcome = execute(run, COMPACT)
    arrivals = COMPACT.columns("ShareGPT", 1.0, 60.0, 0)[0]
    assert outcome.num_requests == len(arrivals) and outcome.normalized_latency > 0.02


@pytest.mark.parametrize("system", [system for system in SYSTEMS if system != FASTER_TRANSFORMER])
@pytest.mark.parametrize(("decoding", "width"), [("single", 1), ("parallel", 3), ("beam", 3)])
def test_runs_hold_all_invariants_when_checked(system, decoding, width):
    run = Run(system, "opt-13b", "Alpaca", 8.0, 4.0, decoding=decoding, width=width)
    checked, quick = execute(run, COMPACT, check=True), execute(run, COMPACT)
    assert math.isclose(checked.normalized_latency, quick.normalized_latency, rel_tol=1e-9)
    assert replace(checked, normalized_latency=0.0) == replace(quick, normalized_latency=0.0)


def test_only_vllm_holds_the_shared_prefix():
    ours = Run(VLLM, "llama-13b", "WMT16 5-shot", 1.0, 5.0)
    assert manager_for(ours).usage().tokens == 336
    theirs = Run(ORCA_ORACLE, "llama-13b", "WMT16 5-shot", 1.0, 5.0)
    columns = COMPACT.columns("WMT16 5-shot", 1.0, 5.0, 0)
    shared, stored = (experiments.groups_for(run, columns) for run in (ours, theirs))
    assert {group.own_prompt_len for group in shared} == set(columns[1])
    assert {group.own_prompt_len for group in stored} == {336 + p for p in columns[1]}


def test_memory_is_measured_in_the_window_alone():
    run = Run(ORCA_MAX, "opt-13b", "ShareGPT", 4.0, 60.0, window_s=(20.0, 60.0), memory=True)
    outcome = execute(run, COMPACT)
    assert abs(sum(outcome.shares.values()) - 1.0) < 1e-9
    assert outcome.mean_batch == 7.0, "full all the time, as seven reservations fit"


# --- a broken simulator is found -----------------------------------------------------------------


def failures(figures):
    found = regenerate(figures, COMPACT, 1, 1)
    return [row for figure in found for row in figure.rows if row.held is False]


@pytest.mark.slow
def test_a_sound_simulator_passes():
    assert failures([Fig2(), Fig15(beams=False)]) == []


def test_the_rows_that_theta_was_fitted_to_are_marked(monkeypatch):
    short(monkeypatch, paper, 10, (2, 10))
    (found,) = regenerate([Fig15()], COMPACT, 1, 1)
    assert {row.fitted for row in found.rows} == {True, False}
    assert all(row.fitted == (", beam" in row.setting) for row in found.rows)
    column = [cells[-1] for cells in found.table().rows]
    assert [cell.endswith(", fitted") for cell in column] == [row.fitted for row in found.rows]


def test_the_closing_line_counts_the_fitted_rows_apart(monkeypatch, capsys):
    sound = Table1.rows
    monkeypatch.setattr(
        Table1,
        "rows",
        lambda self, *asked: [
            replace(row, fitted=row.setting == "opt-175b") for row in sound(self, *asked)
        ],
    )
    assert reproduce.main(["--figure", "table1"]) == 0
    printed = capsys.readouterr().out
    # Of Table 1's four numbers for 175B one is explained.
    assert "16 rows: 14 held (3 of them on values that constants were fitted to), 2 exp" in printed
    assert printed.count("yes, fitted") == 3 and printed.count("D2, fitted") == 1


def test_a_wrong_buddy_size_is_found(monkeypatch):
    sound = allocator.BuddyAllocator.order_for
    monkeypatch.setattr(
        allocator.BuddyAllocator, "order_for", lambda self, n: min(7, sound(self, n) + 1)
    )
    assert any("Orca" in row.setting for row in failures([Fig2()]))


def test_no_copy_on_write_is_found(monkeypatch):
    """All samples go on writing into the prompt's last block, which they still share."""
    monkeypatch.setattr(
        paged_tables.PagedTables, "_copy_last_block", lambda self, table: (table.blocks[-1],) * 2
    )
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


def test_one_row_that_is_not_held_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(models, "kv_blocks", lambda *args, **options: 900)
    assert reproduce.main(["--figure", "table1"]) == 1
    assert " 3 not held" in capsys.readouterr().out


@pytest.mark.skipif(not DATA.exists(), reason="the authors' lengths are not here")
def test_the_authors_lengths_give_figure_2_within_a_point():
    (found,) = regenerate([Fig2()], find_lengths([], str(DATA)), 1, 1)
    assert len(found.rows) == 17 and all(row.held is True for row in found.rows)
