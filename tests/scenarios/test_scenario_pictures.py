"""`--figures` of main.py: what is drawn, read back from the artists."""

import os
import re
from importlib.util import find_spec

import pytest
import torch

import main
from kv_cache_manager import MemoryUsage
from vllm_sim import models, paper
from vllm_sim.paper.figures import VLLM
from vllm_sim.reporting import drawing
from vllm_sim.scenarios import baseline, mixed, paged, pictures, sampling
from vllm_sim.scenarios import run as scenario_run
from vllm_sim.scenarios.setting import SERIES_LENGTH, Setting

TINY = models.Model("tiny", "opt", 2, 16, 2, 2, 8, 100, 2048)
SETTING = Setting(TINY, torch.device("cpu"), 1, 140, 16, 0)
PARTS = MemoryUsage.PARTS
MAIN = ["--model", "opt-125m", "--device", "cpu", "--num-blocks", "140"]

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib")
pytestmark = pytest.mark.usefixtures("few_bytes")


@pytest.fixture(scope="module")
def reports():
    """All four scenarios in a small pool, by their numbers."""
    with pytest.MonkeyPatch.context() as patch:
        for module, warmup, iterations in (
            (baseline, 100, 600),
            (paged, 100, 200),
            (sampling, 50, 60),
        ):
            patch.setattr(module, "WARMUP", warmup)
            for name in {"ITERATIONS", "BASELINE_ITERATIONS"} & {*vars(module)}:
                patch.setattr(module, name, iterations)
        patch.setattr(sampling, "OUTPUT_LEN", 20)
        return {
            n: module.report(module.run(SETTING)) for n, module in scenario_run.SCENARIOS.items()
        }


def colours(bars):
    from matplotlib.colors import to_hex

    return [to_hex(bar.get_facecolor()) for bar in bars]


@needs_matplotlib
def test_every_scenario_has_the_files_that_are_checked(reports, tmp_path):
    chosen = pictures.figures(reports.values(), SETTING.line)
    assert set(chosen) == {file for files in pictures.FILES.values() for file in files}
    for number, files in pictures.FILES.items():
        assert set(pictures.figures([reports[number]], "")) == {*files}
    written = pictures.draw(reports.values(), SETTING.line, tmp_path)
    assert sorted(path.name for path in written) == sorted(os.listdir(tmp_path)) == sorted(chosen)
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert pictures.draw([], "", tmp_path) == []


@needs_matplotlib
def test_memory_bars_are_ours_by_part_beside_the_papers(reports):
    """Where both scenarios ran, Orca's are the first one's."""
    figure = pictures.figures([reports[1], reports[2]], SETTING.line)["memory_bars.png"]()
    (axes,) = figure.axes
    bars = reports[1].bars | {VLLM: reports[2].bars[VLLM]}
    assert [text.get_text() for text in axes.get_xticklabels()] == [*paper.ORCAS, VLLM]
    expected = []
    for system, ours in bars.items():
        expected += [*(ours[part] for part in PARTS), *paper.FIG2[system].values()]
        assert sum(ours.values()) == pytest.approx(100.0)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(expected)
    seen = colours(axes.patches[: len(PARTS)])
    assert seen == [drawing.PARTS[part] for part in PARTS] and len(set(seen)) == len(PARTS)
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[:-1] == list(PARTS) and words[-1].startswith("paper: external fragmentation")


def test_a_long_run_keeps_its_first_iterations(monkeypatch):
    """As many as a picture shows: the steady states of scenario 1 are five times as long."""
    for module in (baseline, paged):
        monkeypatch.setattr(module, "WARMUP", 20)
        for name in {"ITERATIONS", "BASELINE_ITERATIONS"} & {*vars(module)}:
            monkeypatch.setattr(module, name, 12)
        whole = module.report(module.run(SETTING)).series
        monkeypatch.setattr(module, "SERIES_LENGTH", 5)
        cut = module.report(module.run(SETTING)).series
        assert [run.usages[:5] for run in whole] == [run.usages for run in cut]
        assert all(len(run.usages) == 12 for run in whole)


@needs_matplotlib
@pytest.mark.parametrize("number", [1, 2, 4])
def test_slots_over_time_fill_the_pool_in_every_iteration(reports, number):
    runs = reports[number].series
    figure = pictures.over_time(reports[number], SETTING.line)
    names = [axes.get_title(loc="left") for axes in figure.axes]
    assert names == [run.name for run in runs]
    assert names == {1: [*paper.ORCAS], 2: [VLLM], 4: [run.name for run in mixed.RUNS]}[number]
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
def test_the_pool_slot_by_slot_has_as_many_of_each_part_as_the_manager(reports, number):
    pools = reports[number].pools
    figure = pictures.pool_slots(reports[number], SETTING.line)
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
def test_savings_are_ours_and_the_papers(reports):
    savings = reports[3].savings
    figure = pictures.saving_bars(reports[3], SETTING.line)
    bars = [bar for axes in figure.axes for bar in axes.patches]
    filled = [bar.get_height() for bar in bars if bar.get_fill()]
    hollow = [bar.get_height() for bar in bars if not bar.get_fill()]
    assert filled == [one.ours for one in savings] and len(filled) == 6
    assert hollow == [one.paper for one in savings if one.paper is not None]
    assert len(hollow) == 5


@needs_matplotlib
@pytest.mark.parametrize("number", [3, 4])
def test_the_block_map_says_who_owns_who_shares_and_what_is_padding(reports, number):
    from matplotlib.colors import to_hex

    recording, moment = reports[number].map
    size, total = recording.block_size, recording.num_blocks
    holders, filled = {}, {}
    for seq, held in moment.tables.items():
        for index, block in enumerate(held.blocks if not held.swapped else ()):
            holders.setdefault(block, []).append(seq)
            filled[block] = held.filled(index, size)
    figure = pictures.block_map(recording, moment)
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
    monkeypatch.setattr(paged, "WARMUP", 50)
    monkeypatch.setattr(paged, "ITERATIONS", 60)
    monkeypatch.setattr(paged, "BASELINE_ITERATIONS", 100)
    printed = []
    for more in ([], ["--figures", str(tmp_path / "new")]):
        main.main([*MAIN, "--scenario", "2", *more])
        printed.append(re.sub(r", \d+\.\d s\n$", "", capfd.readouterr().out))
    assert printed[0] == printed[1] and "Scenario 2" in printed[0]
    assert sorted(os.listdir(tmp_path / "new")) == sorted(pictures.FILES[2])


@needs_matplotlib
def test_where_an_invariant_broke_the_rest_is_shown(monkeypatch, tmp_path, capfd):
    def broken(*_):
        raise AssertionError("slot identity broken")

    monkeypatch.setattr(mixed, "run", broken)
    figures, page = tmp_path / "new", tmp_path / "run.html"
    arguments = ["--scenario", "4", "--figures", str(figures), "--timeline", str(page)]
    assert main.main([*MAIN, *arguments]) == 1
    printed, errors = capfd.readouterr()
    assert "slot identity broken" in printed and errors == ""
    assert os.listdir(figures) == [] and '"runs":[]' in page.read_text()
