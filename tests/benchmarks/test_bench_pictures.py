"""`--figures` of the GPU benchmarks: what is drawn, read back from the artists, without a GPU."""

import os
from importlib.util import find_spec

import bench_attention
import bench_paging_cost
import numpy as np
import pictures
import pytest
import torch

from vllm_sim.paper.figures import (
    BLOCK_SIZES,
    FASTER_TRANSFORMER,
    FIG12_RATES,
    FIG18A,
    FIG19A,
    ORCA_MAX,
    VLLM,
)

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib")


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
    figure = pictures.kernel_latency(kernel_rows(), "a GPU")
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
        assert by_name == dict(zip(pictures.BARS, expected))
        assert axes.get_yscale() == "log" and "Context" in axes.get_xlabel()


@needs_matplotlib
def test_fig_19a_has_ours_and_the_papers_in_one_axis():
    rows = [
        {"block_size": s, "recompute_ms": 20.0 + s, "swap_in_ms": 3.0, "swap_out_ms": 2.0 + s}
        for s in (256, 1, 16)
    ]
    (axes,) = pictures.swap_times(rows, "a GPU").axes
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
    (axes,) = pictures.over_floor(rows, "a GPU").axes
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
    for name, parts, files in (
        ("both", {}, ["fig18a.png", "fig19a.png"]),
        ("swap", {"attention"}, ["fig19a.png"]),
        ("attention", {"swap", "moves"}, ["fig18a.png"]),
    ):
        chosen = {part: rows for part, rows in found.items() if part not in parts}
        monkeypatch.setattr(bench_paging_cost, "measure", lambda *_, chosen=chosen: chosen)
        arguments = ["--kernel", "gather", "--figures", str(tmp_path / name)]
        arguments += ["--part", name] if parts else []
        assert bench_paging_cost.main(arguments) == 0
        assert sorted(os.listdir(tmp_path / name)) == files

    row = {"shape": "OPT-13B 8 x 2000", "floor_us": 10.0, "plan_us": 90.0, "gather_share": 0.9}
    row |= {"triton_us": 11.0, "read_0_us": 10.1, "flashinfer_us": 13.0, "flashinfer_tc_us": 12.0}
    monkeypatch.setattr(bench_attention, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(bench_attention, "load_flash_attention", lambda file: None)
    monkeypatch.setattr(bench_attention, "measure", lambda *_: row)
    drawn = []
    over_floor = pictures.over_floor
    monkeypatch.setattr(
        pictures, "over_floor", lambda *given: drawn.append(given) or over_floor(*given)
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
    assert set(pictures.KERNELS) == set(bench_attention.COLUMNS)
    looks = list(pictures.KERNELS.values())
    assert len(set(looks)) == len(looks)


@needs_matplotlib
def test_fig_12_has_three_lines_a_system_over_a_request_alone(tmp_path):
    def row(system, seconds, rate, measured, simulated):
        names = "system", "trace_s", "rate", "s_per_token", "simulated_s_per_token"
        return dict(zip(names, (system, seconds, rate, measured, simulated)))

    rows = [row("paged", 45, 9.0, 0.2, 0.22), row("paged", 45, 8.0, 0.1, 0.11)]
    rows += [row("max", 45, 2.0, 0.12, 0.11), row("paged", 15, 40.0, 0.5, 0.5)]
    alone = row("paged", 0, 0.0, 0.01, 0.011)
    figure = pictures.served_rates(rows, alone, 15.0, "a GPU")
    (axes,) = figure.axes
    lines = [line.get_xydata() for line in axes.get_lines()]
    at = 8.0 + 0.5  # where 15 times a request alone are reached
    assert lines[0].tolist() == pytest.approx(np.array([[8 / at, 10.0], [9 / at, 20.0]]))
    assert lines[1].tolist() == pytest.approx(np.array([[2 / at, 12.0]]))
    assert lines[2][:, 1].tolist() == pytest.approx([10.0, 20.0])
    papers = [line[-1].tolist() for line in lines[4:6]]
    rates = FIG12_RATES["ShareGPT"]["opt-13b"]
    assert papers == [[1.0, 15.0], [pytest.approx(rates[ORCA_MAX] / rates[VLLM]), 15.0]]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[-3:] == ["measured", "simulated", "paper"]
    (path,) = pictures.draw_serving(rows, alone, 15.0, "a GPU", tmp_path)
    assert path.stat().st_size > 10_000
