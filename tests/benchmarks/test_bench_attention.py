"""benchmarks/bench_attention.py where there is no GPU: its shapes, its tables, and who counts."""

import bench_attention as bench
import pytest
import torch
from attention_contenders import CAT_SHAPE

from vllm_sim.reporting.tables import render

ON_CUDA = torch.cuda.is_available()
ROW = {"shape": "one", "floor_us": 100.0, "triton_us": 110.0, "unplanned_us": 115.0}
ROW |= {"read_0_us": 103.0, "read_1_us": 101.0, "gather_us": 340.0, "plain_us": 900.0}
ROW |= {"flashinfer_us": 150.0, "flashinfer_tc_us": 125.0, "xqa_us": 160.0}


def test_the_better_of_a_family_counts_and_the_missing_show_as_missing():
    found = bench.times_tables([ROW], "where")
    times = {"triton": 1.1, "no plan": 1.15, "read": 1.01, "FlashInfer": 1.25, "XQA": 1.6}
    times |= {"gather": 3.4, "plain": 9.0, "over paged %": pytest.approx(-12)}
    missing = dict.fromkeys(("FA3", "cuDNN", "Flash", "cat", "over cuDNN %"))
    shape = {"shape": "one", "floor us": 100.0}
    cells = {}
    for table in found:
        cells |= dict(zip(table.headers, table.rows[0]))
    assert cells == shape | times | missing
    (cell,) = bench.times_tables([ROW | {"cudnn_us": 100.0}], "where")[0].rows[0][-1:]
    assert cell == pytest.approx(10)


def test_the_tables_fit_a_line():
    keys = {key for keys in bench.COLUMNS.values() for key in keys}
    rows = [
        {"shape": name, "floor_us": 1234.5} | {f"{key}_us": 12345.0 for key in keys}
        for name in bench.SHAPES
    ]
    for row in rows:
        row["triton_us"], row["cat_us"] = 4321.0, 200_000.0
    for table in bench.times_tables(rows, "NVIDIA H200"):
        assert max(map(len, render(table, "plain").splitlines())) <= 100


def test_the_shapes_are_those_of_the_models():
    for name, shape in bench.SHAPES.items():
        assert shape.heads % shape.kv_heads == 0, name
        assert shape.ragged == (".." in name)
        assert shape.live_bytes == sum(shape.lens) * shape.kv_heads * 128 * 2 * 2
    thirteen = bench.SHAPES[CAT_SHAPE]  # one of the 40 layers of 819,200 bytes a token
    assert thirteen.live_bytes == 32 * 1024 * 819_200 // 40


@pytest.mark.parametrize(("count", "programs", "tile"), [(1000, 3, 64), (64, 2, 64), (5, 4, 16)])
def test_the_read_kernel_reads_every_byte_once(count, programs, tile):
    module = pytest.importorskip("read_only", exc_type=ImportError)
    source = torch.randint(-8, 8, (count,)).to("cuda" if ON_CUDA else "cpu", torch.float16)
    sums = module.read_bytes(source, programs, tile)
    assert sums.shape == (programs,) and sums.sum().item() == source.sum(dtype=torch.float32).item()


def test_every_contender_is_checked_and_timed_and_one_that_fails_stops_no_other(
    monkeypatch, capsys
):
    """At a tiny size, on the CPU where there is no GPU; clocks run all once and say 8 us."""
    device = "cuda" if ON_CUDA else "cpu"
    pytest.importorskip("paged_attention_triton", exc_type=ImportError)

    def clock(runs, repeats, **options):
        for run in [runs] if callable(runs) else runs:
            run()
        return 8.0

    def clocks(runs, repeats):
        return {key: clock(run, repeats) for key, run in runs.items()}

    monkeypatch.setattr(bench, "replay_of", lambda run: run)
    monkeypatch.setattr(bench, "heated_medians_us", clocks)
    monkeypatch.setattr(bench, "cold_median_us", clock)
    monkeypatch.setattr(bench, "wall_times_us", lambda run, repeats: [clock(run, repeats)] * 3)
    monkeypatch.setattr(bench, "READS", ((2, 64), (3, 64)))  # few programs: they run one by one
    for lens in ((33, 33), (33, 5)):
        shape = bench.Shape(4, 2, lens)
        row = bench.measure(CAT_SHAPE, shape, 1e12, 3, device=device)
        assert [row[f"{key}_us"] for key in ("triton", "unplanned", "plain", "cat")] == [8.0] * 4
        assert (row["read_0_us"], row["plan_us"], row["gather_share"] > 0) == (8.0, 8.0, True)
        # A CPU has no cuDNN, nor a kernel for packed sequences.
        assert ON_CUDA or "cudnn_error" in row or shape.ragged
        assert ON_CUDA or "gather_error" in row or not shape.ragged
        assert not bench.wrong_keys(row)
    sound = bench.Data.cat
    monkeypatch.setattr(bench.Data, "cat", lambda self: sound(self) + 0.1)
    row = bench.measure(CAT_SHAPE, shape, 1e12, 3, device=device)
    assert row["cat_error"].startswith("WrongResult: off by") and "cat_us" not in row
    assert bench.wrong_keys(row) == ["cat_error"]
    assert "cat: WrongResult" in capsys.readouterr().err
