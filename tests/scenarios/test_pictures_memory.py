"""`--figures` of main.py, capacity.py and the GPU benchmarks: what is drawn, and what is refused.

The numbers in a picture are read back from its artists. Only the first tests run where there is no
matplotlib.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pictures as pictures_bench
import pytest
import torch

import capacity
import main
from kv_cache_manager import MemoryUsage
from vllm_sim import models, paper
from vllm_sim.paper.figures import BLOCK_SIZES, FASTER_TRANSFORMER, FIG18A, FIG19A, VLLM
from vllm_sim.reporting import drawing
from vllm_sim.scenarios import baseline as scenario_baseline
from vllm_sim.scenarios import mixed as scenario_mixed
from vllm_sim.scenarios import paged as scenario_paged
from vllm_sim.scenarios import pictures as pictures_memory
from vllm_sim.scenarios import sampling as scenario_sampling
from vllm_sim.scenarios.record import SERIES_LENGTH, Bar, RunRecord
from vllm_sim.scenarios.report import OutputError
from vllm_sim.scenarios.setting import Setting
from vllm_sim.sizing import answers as capacity_tables
from vllm_sim.sizing import pictures as pictures_capacity
from vllm_sim.sizing import trace_answers as trace_tables
from vllm_sim.sizing.concurrency import means
from vllm_sim.sizing.options import make_trace_case

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_attention  # noqa: E402
import bench_paging_cost  # noqa: E402

TINY = models.Model("tiny", "opt", 2, 16, 2, 2, 8, 64, 100, 2048)
PARTS = MemoryUsage.PARTS
MAIN = ["--model", "opt-125m", "--device", "cpu", "--num-blocks", "140"]

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib")
pytestmark = pytest.mark.usefixtures("few_bytes")


@pytest.fixture(scope="module")
def record():
    """All four scenarios in a small pool, and what they leave."""
    setting = Setting(TINY, torch.device("cpu"), 1, 140, 16, 0)
    found = RunRecord(setting.line)
    with pytest.MonkeyPatch.context() as patch:
        for module, iterations in ((scenario_baseline, 600), (scenario_paged, 200)):
            patch.setattr(module, "WARMUP", 100)
            for name in {"ITERATIONS", "BASELINE_ITERATIONS"} & {*vars(module)}:
                patch.setattr(module, name, iterations)
        patch.setattr(scenario_sampling, "WARMUP", 50)
        patch.setattr(scenario_sampling, "ITERATIONS", 60)
        patch.setattr(scenario_sampling, "OUTPUT_LEN", 20)
        for module in (scenario_baseline, scenario_paged, scenario_sampling, scenario_mixed):
            module.run(setting, record=found)
    return found


@pytest.fixture(scope="module")
def sections():
    return list(
        capacity_tables.sections(
            capacity.make_case(
                capacity.build_parser().parse_args(
                    ["--gpu-memory", "30", "--max-model-len", "300", "--workload", "20,30"]
                )
            )
        )
    )


def colours(bars):
    from matplotlib.colors import to_hex

    return [to_hex(bar.get_facecolor()) for bar in bars]


# ---- what cannot be drawn ---------------------------------------------------------------------


def commands(folder):
    return [(main, [*MAIN, "--figures", folder]), (capacity, ["--figures", folder])]


@pytest.fixture
def no_run(monkeypatch):
    def ran(*_):
        pytest.fail("ran")

    monkeypatch.setattr(main, "run_one", ran)
    monkeypatch.setattr(capacity_tables, "sections", ran)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_missing_matplotlib_is_told_before_anything_runs(monkeypatch, tmp_path, capfd, no_run):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    for script, arguments in commands(str(tmp_path / "new")):
        assert script.main(arguments) == 2
        printed, errors = capfd.readouterr()
        told = ".py: error: cannot draw figures: matplotlib is not installed (it is in require"
        assert printed == "" and told in errors and errors.count("\n") == 1
        assert os.listdir(tmp_path) == []


@needs_matplotlib
def test_a_folder_that_cannot_be_is_told_before_anything_runs(tmp_path, capfd, no_run):
    (tmp_path / "file").write_text("old")
    for name in ("file", "file/below", "x" * 300):
        for script, arguments in commands(str(tmp_path / name)):
            assert script.main(arguments) == 2
            printed, errors = capfd.readouterr()
            assert printed == "" and "error: cannot make " in errors and errors.count("\n") == 1
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


@needs_matplotlib
def test_bad_input_makes_no_folder(tmp_path, capfd, no_run):
    for script, arguments in (
        (main, [*MAIN[:-1], "3", "--figures", str(tmp_path / "new")]),
        (capacity, ["--model", "none.json", "--figures", str(tmp_path / "new")]),
        (capacity, ["--trace", "none.csv", "--figures", str(tmp_path / "new")]),
    ):
        assert script.main(arguments) == 2
        assert capfd.readouterr().err.count("\n") == 1 and os.listdir(tmp_path) == []


def test_modules_need_no_matplotlib():
    names = "vllm_sim.reporting.drawing, vllm_sim.scenarios.pictures, vllm_sim.sizing.pictures"
    code = f"import sys; sys.modules['matplotlib'] = None; import {names}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---- main.py ----------------------------------------------------------------------------------


@needs_matplotlib
def test_every_scenario_has_the_files_that_are_checked(record, tmp_path):
    chosen = pictures_memory.figures(record)
    assert set(chosen) == {file for files in pictures_memory.FILES.values() for file in files}
    written = pictures_memory.draw(record, tmp_path)
    assert sorted(path.name for path in written) == sorted(os.listdir(tmp_path)) == sorted(chosen)
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    again = pictures_memory.draw(RunRecord(), tmp_path)
    assert again == []


@needs_matplotlib
def test_memory_bars_are_ours_by_part_beside_the_papers(record):
    figure = pictures_memory.memory_bars(record)
    (axes,) = figure.axes
    assert [bar.system for bar in record.bars] == [*paper.ORCAS, VLLM]
    assert [text.get_text() for text in axes.get_xticklabels()] == [*paper.ORCAS, VLLM]
    drawn = [bar.get_height() for bar in axes.patches]
    expected = []
    for bar in record.bars:
        expected += [bar.ours[part] for part in PARTS]
        expected += list(paper.FIG2[bar.system].values())
        assert sum(bar.ours.values()) == pytest.approx(100.0)
    assert drawn == pytest.approx(expected)
    seen = colours(axes.patches[: len(PARTS)])
    assert seen == [drawing.PARTS[part] for part in PARTS] and len(set(seen)) == len(PARTS)
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[:-1] == list(PARTS) and words[-1].startswith("paper: external fragmentation")


@needs_matplotlib
def test_a_system_that_the_paper_has_not_stands_alone():
    ours = dict.fromkeys(PARTS, 0.0) | {"tokens": 75.0, "free": 25.0}
    found = RunRecord("a setting", [Bar("mine", ours, None), Bar(VLLM, ours, paper.FIG2[VLLM])])
    (axes,) = pictures_memory.memory_bars(found).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["mine", VLLM]
    heights = [bar.get_height() for bar in axes.patches]
    told = [*ours.values(), *ours.values(), *paper.FIG2[VLLM].values()]
    assert heights == pytest.approx(told)


def test_a_long_run_keeps_its_first_iterations():
    """As many as a picture shows: the steady states of scenario 1 are five times as long."""
    series = RunRecord().new_series(1, "max")
    usages = [
        MemoryUsage(SERIES_LENGTH + 2, tokens, SERIES_LENGTH + 2 - tokens)
        for tokens in range(SERIES_LENGTH + 2)
    ]
    for usage in usages:
        series.add(usage)
    assert series.usages == usages[:SERIES_LENGTH]


@needs_matplotlib
@pytest.mark.parametrize("number", [1, 2, 4])
def test_slots_over_time_fill_the_pool_in_every_iteration(record, number):
    runs = [series for series in record.series if series.scenario == number]
    figure = pictures_memory.over_time(runs, record)
    names = [axes.get_title(loc="left") for axes in figure.axes]
    assert names == [run.name for run in runs]
    assert (
        names
        == {1: [*paper.ORCAS], 2: [VLLM], 4: [run.name for run in scenario_mixed.RUNS]}[number]
    )
    for axes, run in zip(figure.axes, runs):
        count = len(run.usages)
        assert count > 100 and (number == 4 or count <= SERIES_LENGTH)
        total = [0.0] * count
        for part, area in zip(PARTS, axes.collections, strict=True):
            total = [below + 100.0 * u.share(part) for below, u in zip(total, run.usages)]
            # Its outline goes along the lower edge and comes back along the upper one.
            upper = dict(area.get_paths()[0].vertices[-count - 1 :].tolist())
            assert [upper[float(x)] for x in range(count)] == pytest.approx(total)
        assert total == pytest.approx([100.0] * count)
        marks = [list(line.get_xdata()) for line in axes.get_lines()]
        assert marks == ([run.preemptions] if run.preemptions else [])
    if number == 4:
        assert all(run.preemptions for run in runs[-2:])
        assert not any(run.preemptions for run in runs[:-2])


@needs_matplotlib
@pytest.mark.parametrize("number", [1, 2])
def test_the_pool_slot_by_slot_has_as_many_of_each_part_as_the_manager(record, number):
    pools = [pool for pool in record.pools if pool.scenario == number]
    figure = pictures_memory.pool_slots(pools, record)
    assert len(figure.axes) == len(pools) == {1: 3, 2: 1}[number]
    for axes, pool in zip(figure.axes, pools):
        slots = axes.images[0].get_array().flatten().tolist()
        assert sum(count for count, _ in pool.spans) == 140 * 16
        for index, part in enumerate(PARTS):
            assert slots.count(index) == sum(n for n, name in pool.spans if name == part)
        assert slots.count(PARTS.index("tokens")) > 0
    if number == 2:
        assert sum(count for count, part in pools[0].spans if part == "padding") > 0


@needs_matplotlib
def test_savings_are_ours_and_the_papers(record):
    figure = pictures_memory.saving_bars(record.savings, record)
    bars = [bar for axes in figure.axes for bar in axes.patches]
    filled = [bar.get_height() for bar in bars if bar.get_fill()]
    hollow = [bar.get_height() for bar in bars if not bar.get_fill()]
    assert filled == [one.ours for one in record.savings] and len(filled) == 6
    assert hollow == [one.paper for one in record.savings if one.paper is not None]
    assert len(hollow) == 5


@needs_matplotlib
@pytest.mark.parametrize("number", [3, 4])
def test_the_block_map_says_who_owns_who_shares_and_what_is_padding(record, number):
    from matplotlib.colors import to_hex

    recorder, moment = record.maps[number]
    size, total = recorder.manager.block_size, recorder.manager.num_blocks
    holders, filled = {}, {}
    for seq, held in moment.tables.items():
        for index, block in enumerate(held.blocks if not held.swapped else ()):
            holders.setdefault(block, []).append(seq)
            filled[block] = held.filled(index, size)
    figure = pictures_memory.block_map(recorder, moment)
    (axes,) = figure.axes
    frames = [p for p in axes.patches if to_hex(p.get_edgecolor()) == "#c8c8c8"]
    assert len(frames) == total
    shared = [p for p in axes.patches if p.get_edgecolor() == (0.0, 0.0, 0.0, 1.0)]
    assert len(shared) == sum(len(who) > 1 for who in holders.values()) > 0
    hatched = [p for p in axes.patches if p.get_hatch()]
    assert len(hatched) == len(holders)
    widths = sorted(
        p.get_width() for p in axes.patches if not p.get_hatch() and p.get_linewidth() == 0.0
    )
    assert widths == pytest.approx(sorted(0.92 * filled[b] / size for b in holders))
    assert min(widths) < 0.9, "some block has padding"
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == len(holders)
    for count in {len(who) for who in holders.values()} - {1}:
        expected = sum(len(who) == count for who in holders.values())
        assert sum(text.endswith(f"x{count}") for text in texts) == expected
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[-3:] == ["x4: shared by four", "padding", "free"]
    if number == 4:
        assert {"P: the shared prefix", "beam search", "parallel sampling"} <= {*words}


@needs_matplotlib
def test_what_is_printed_is_the_same_with_pictures(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(scenario_paged, "WARMUP", 50)
    monkeypatch.setattr(scenario_paged, "ITERATIONS", 60)
    monkeypatch.setattr(scenario_paged, "BASELINE_ITERATIONS", 100)
    printed = []
    for more in ([], ["--figures", str(tmp_path / "new")]):
        main.main([*MAIN, "--scenario", "2", *more])
        printed.append(re.sub(r", \d+\.\d s\n$", "", capfd.readouterr().out))
    assert printed[0] == printed[1] and "Scenario 2" in printed[0]
    assert sorted(os.listdir(tmp_path / "new")) == sorted(pictures_memory.FILES[2])


# ---- capacity.py ------------------------------------------------------------------------------


@needs_matplotlib
def test_capacity_draws_its_policies(sections):
    figure = pictures_capacity.figures(sections)[pictures_capacity.SLOTS]()
    left, right = figure.axes
    slots = next(s for s in sections if s.question == capacity_tables.SLOT_QUESTION).table
    running = next(s for s in sections if s.question == capacity_tables.CONCURRENCY_QUESTION).table
    expected = []
    for row in (dict(zip(slots.headers, row)) for row in slots.rows):
        whole = sum(row[part] for part in PARTS)
        expected += [100.0 * row[part] / whole for part in PARTS]
    assert [bar.get_height() for bar in left.patches] == pytest.approx(expected)
    assert [bar.get_height() for bar in right.patches] == [
        row[-1] for row in running.rows if row[0].startswith("simulated: ")
    ]
    for axes in (left, right):
        assert [t.get_text() for t in axes.get_xticklabels()] == ["max", "pow2", "oracle", "paged"]


@needs_matplotlib
def test_capacity_draws_the_sweep_of_block_sizes(sections):
    figure = pictures_capacity.figures(sections)[pictures_capacity.SIZES]()
    table = next(s for s in sections if s.question == capacity_tables.BLOCK_SIZE_QUESTION).table
    columns = ("padding, %", "prefix shared, %", "copies a fork", "table, bytes")
    for axes, column in zip(figure.axes, columns, strict=True):
        at = table.headers.index(column)
        (line,) = axes.get_lines()
        assert list(map(tuple, line.get_xydata())) == [(row[0], row[at]) for row in table.rows]
        assert axes.get_xscale() == "log" and axes.get_title()


@needs_matplotlib
def test_without_a_prefix_its_panel_is_empty():
    arguments = ["--gpu-memory", "30", "--workload", "20,30"]
    case = capacity.make_case(capacity.build_parser().parse_args(arguments))
    found = means(case.workload, case.max_len, case.seed)
    section = capacity_tables.block_sizes(replace(case, prefix_len=0), found)
    figure = pictures_capacity.by_block_size(section)
    assert [len(axes.get_lines()) for axes in figure.axes] == [1, 0, 1, 1]
    assert "prefix" in figure.axes[1].get_title()


@needs_matplotlib
def test_capacity_writes_two_pictures(tmp_path, monkeypatch, sections, capfd):
    monkeypatch.setattr(capacity_tables, "sections", lambda *_: iter(sections))
    assert capacity.main(["--figures", str(tmp_path / "new")]) == 0
    assert sorted(os.listdir(tmp_path / "new")) == [
        "capacity_block_sizes.png",
        "capacity_slots.png",
    ]
    assert pictures_capacity.figures(sections[:1]) == {}


@needs_matplotlib
def test_a_traces_needs_are_drawn(tmp_path, capfd):
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{i / 20},{90 + i % 7},{40 + i % 11}\n" for i in range(80))
    trace.write_text("time,input_len,output_len\n" + rows)
    folder = tmp_path / "new"
    arguments = ["--trace", str(trace), "--preemption-rate", "0.1"]
    assert capacity.main([*arguments, "--figures", str(folder), "--quiet"]) == 0
    assert os.listdir(folder) == ["capacity_trace.png"]
    args = capacity.build_parser().parse_args(arguments)
    case = make_trace_case(args, capacity.make_case(args))
    found = trace_tables.survey(case).sections
    (draw,) = pictures_capacity.figures(found).values()
    tables = [
        next(s for s in found if s.question == question).table
        for question in (trace_tables.POOL_QUESTION, trace_tables.GPU_QUESTION)
    ]
    for axes, table, column in zip(draw().axes, tables, (3, 3), strict=True):
        heights = [bar.get_height() for bars in axes.containers for bar in bars]
        assert heights == [row[column] for row in table.rows]
        assert [text.get_text() for text in axes.get_xticklabels()] == [*trace_tables.POLICIES]


# ---- the benchmarks ---------------------------------------------------------------------------


def kernel_rows():
    return [
        {
            "batch": batch,
            "context": context,
            "paged_us": context / 8,
            "contiguous_us": context / 9,
            "cudnn_us": None if batch == 8 else context / 10,
            "flash_us": context / 7,
        }
        for batch in (8, 32)
        for context in (64, 256, 1024)
    ]


@needs_matplotlib
def test_fig_18a_has_a_panel_for_each_batch_size():
    figure = pictures_bench.kernel_latency(kernel_rows(), "a GPU")
    assert [axes.get_title() for axes in figure.axes] == ["batch size 8", "batch size 32"]
    for axes, batch, peer in zip(figure.axes, (8, 32), (9, 10)):
        by_name = {}
        for bars in axes.containers:
            by_name.setdefault(bars.get_label(), []).append(bars[0].get_height())
            assert bars[0].get_fill() != bars.get_label().startswith("paper")
        told = [FIG18A[batch, context] for context in (64, 256)]
        expected = [
            [8.0, 32.0, 128.0],
            [64 / peer, 256 / peer, 1024 / peer],
            [one[VLLM] for one in told],
            [one[FASTER_TRANSFORMER] for one in told],
        ]
        assert by_name == dict(zip(pictures_bench.BARS, expected))
        assert axes.get_yscale() == "log" and "Context" in axes.get_xlabel()


@needs_matplotlib
def test_fig_19a_has_ours_and_the_papers_in_one_axis():
    rows = [
        {"block_size": s, "recompute_ms": 20.0 + s, "swap_in_ms": 3.0, "swap_out_ms": 2.0 + s}
        for s in (256, 1, 16)
    ]
    (axes,) = pictures_bench.swap_times(rows, "a GPU").axes
    lines = [list(map(tuple, line.get_xydata())) for line in axes.get_lines()]
    assert lines[1::2] == [
        [(s, 20.0 + s) for s in (1, 16, 256)],
        [(s, 3.0) for s in (1, 16, 256)],
        [(s, 2.0 + s) for s in (1, 16, 256)],
        [(s, 5.0 + s) for s in (1, 16, 256)],
    ]
    assert lines[:6:2] == [list(FIG19A[n].items()) for n in ("recompute", "swap in", "swap out")]
    assert [t.get_text() for t in axes.get_xticklabels()] == list(map(str, BLOCK_SIZES))


@needs_matplotlib
def test_times_over_the_floor_are_points():
    rows = {"one": {"triton": 1.1, "read": 1.0, "cat": None}, "two": {"triton": 1.2, "cat": 40.0}}
    (axes,) = pictures_bench.over_floor(rows, "a GPU").axes
    points = [tuple(line.get_xydata()[0]) for line in axes.get_lines()[:4]]
    assert points == [(1.1, 0), (1.0, 0), (1.2, 1), (40.0, 1)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["one", "two"]


@needs_matplotlib
def test_the_benchmarks_draw_what_they_measured(monkeypatch, tmp_path, capsys):
    """Without a GPU: the measurements are made up, all else is the scripts' own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    swap = [{"block_size": 16, "recompute_ms": 1.0, "swap_in_ms": 1.0, "swap_out_ms": 1.0}]
    found = {"attention": kernel_rows(), "swap": swap, "moves": []}
    monkeypatch.setattr(bench_paging_cost, "measure", lambda *_: found)
    arguments = ["--kernel", "gather", "--figures", str(tmp_path / "a")]
    assert bench_paging_cost.main(arguments) == 0
    assert sorted(os.listdir(tmp_path / "a")) == ["fig18a.png", "fig19a.png"]
    found.pop("attention")
    assert bench_paging_cost.main([*arguments[:-1], str(tmp_path / "b"), "--part", "swap"]) == 0
    assert os.listdir(tmp_path / "b") == ["fig19a.png"]
    found = {"attention": kernel_rows()}
    part = ["--part", "attention"]
    assert bench_paging_cost.main([*arguments[:-1], str(tmp_path / "d"), *part]) == 0
    assert os.listdir(tmp_path / "d") == ["fig18a.png"]

    row = {
        "shape": "OPT-13B 8 x 2000",
        "floor_us": 10.0,
        "aim": 1.1,
        "triton_us": 11.0,
        "read_us": 10.1,
        "flashinfer_us": 13.0,
        "flashinfer_tc_us": 12.0,
        "gather_share": 0.9,
    }
    monkeypatch.setattr(bench_attention, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(bench_attention, "measure", lambda *_: row)
    drawn = []
    over_floor = pictures_bench.over_floor
    monkeypatch.setattr(
        pictures_bench, "over_floor", lambda *given: drawn.append(given) or over_floor(*given)
    )
    shape = ["--shape", "OPT-13B 8 x 2000", "--figures", str(tmp_path / "c")]
    assert bench_attention.main(shape) == 0
    assert os.listdir(tmp_path / "c") == ["attention_over_floor.png"]
    times = {name: time for name, time in drawn[0][0]["OPT-13B 8 x 2000"].items() if time}
    assert times == pytest.approx({"triton": 1.1, "read": 1.01, "FlashInfer": 1.2})
    assert "a GPU" in drawn[0][1] and capsys.readouterr().err == ""


@needs_matplotlib
@pytest.mark.parametrize("script", [bench_attention, bench_paging_cost])
def test_a_benchmark_refuses_a_folder_before_it_measures(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("copy_bandwidth", "measure"):
        monkeypatch.setattr(script, name, lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("old")
    assert script.main(["--figures", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_looks_of_kernels_cover_what_is_measured():
    assert set(pictures_bench.KERNELS) == set(bench_attention.COLUMNS)
    looks = list(pictures_bench.KERNELS.values())
    assert len(set(looks)) == len(looks)


@needs_matplotlib
def test_a_failed_write_leaves_the_old_picture(record, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    (tmp_path / "memory_bars.png").write_text("old")
    with pytest.raises(OutputError, match="No space left"):
        pictures_memory.draw(record, tmp_path)
    assert os.listdir(tmp_path) == ["memory_bars.png"]
    assert (tmp_path / "memory_bars.png").read_text() == "old"


@needs_matplotlib
def test_where_an_invariant_broke_the_rest_is_shown(monkeypatch, tmp_path, capfd):
    def broken(*_):
        raise AssertionError("slot identity broken")

    monkeypatch.setattr(scenario_mixed, "run", broken)
    figures, page = tmp_path / "new", tmp_path / "run.html"
    arguments = ["--scenario", "4", "--figures", str(figures), "--timeline", str(page)]
    assert main.main([*MAIN, *arguments]) == 1
    printed, errors = capfd.readouterr()
    assert "slot identity broken" in printed and errors == ""
    assert os.listdir(figures) == [] and '"runs":[]' in page.read_text()
