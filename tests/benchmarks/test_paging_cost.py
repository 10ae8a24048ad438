"""benchmarks/bench_paging_cost.py and what it stands on, as far as they go without a GPU.

Every measurement runs here at tiny sizes, on the CPU if need be, with clocks that tell made-up
times: what is tested is that the right things are run and checked, and that the tables say what was
found.
"""

import ast
import json
from dataclasses import replace
from pathlib import Path

import bench_paging_cost as bench
import gpu_timing
import measure_paging as measure
import pytest
import torch
from opt_prefill import UNUSED_POSITIONS, RandomOPT

from attention import attention, causal_mask
from paged_attention import PagedKVCache, paged_attention_kernel, slot_mapping
from vllm_sim.models import opt
from vllm_sim.paper import figures as paper_figures

BENCHMARKS = Path(bench.__file__).parent
TINY = opt("tiny", 2, 32, 2, ffn_size=64, vocab_size=50, max_len=300)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernels run: conftest.py
SETTING = measure.Setting(
    model=TINY,
    dtype=torch.float32,
    device=DEVICE,
    attention=((8, 64), (3, 512)),
    batch=2,
    context=256,
    block_sizes=(1, 16, 256),
    swap_tokens=32,
    device_slots=1024,
    host_slots=512,
    moved_blocks=(1, 3),
    pool_blocks=8,
)


@pytest.fixture
def clock(monkeypatch):
    """Clocks that run everything once and say 8 us; returns how many runs each was given."""
    given = []

    def cold_median_us(run, repeats=50, *, graph=None):
        runs = [run] if callable(run) else run
        given.append(len(runs))
        for one in runs:
            one()
        return 8.0

    def wall_times_us(run, repeats=10):
        run()
        return [1000.0] * (repeats - 1) + [2000.0]

    monkeypatch.setattr(gpu_timing, "cold_median_us", cold_median_us)
    monkeypatch.setattr(gpu_timing, "wall_times_us", wall_times_us)
    return given


# --- the model ------------------------------------------------------------------------------


def test_the_random_model_has_opts_parameters():
    assert RandomOPT(TINY, torch.float32, "cpu").num_params() == TINY.num_params


def by_hand(model, tokens):
    """Logits of the last token and K of every layer, by attention.py, a head at a time."""

    def affine(x, part):
        return x @ part.weight.T + part.bias

    def norm(x, part):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * part.weight + part.bias

    x = model.embedding[tokens] + model.positions[torch.arange(len(tokens)) + UNUSED_POSITIONS]
    keys = []
    for layer in model.layers:
        q, k, v = affine(norm(x, layer.attention_norm), layer.qkv).chunk(3, dim=1)
        heads = [y.reshape(1, len(tokens), 2, 16) for y in (q, k, v)]
        keys.append(heads[1][0])
        out, _ = attention(*heads, causal_mask(len(tokens), len(tokens)))
        x = x + affine(out[0].flatten(1), layer.out)
        x = x + affine(affine(norm(x, layer.mlp_norm), layer.up).relu(), layer.down)
    return norm(x[-1], model.final_norm) @ model.embedding.T, keys


def test_a_prefill_is_opts_and_leaves_its_keys_where_the_slots_say():
    model = RandomOPT(TINY, torch.float64, "cpu", seed=3)
    cache = PagedKVCache(9, 4, 2, 16, num_layers=2, dtype=torch.float64, poison=True)
    tokens = torch.tensor([7, 0, 49, 7, 12, 3, 31])
    slots = slot_mapping([8, 2], 0, 7, 4)
    logits = model.prefill(tokens, cache, slots)
    want, keys = by_hand(model, tokens)
    torch.testing.assert_close(logits, want)
    for layer, key in enumerate(keys):
        torch.testing.assert_close(cache.read(layer, slots)[0], key)
    assert (~cache.pool.isnan()).sum() == 7 * 2 * 2 * 32, "and nothing else"
    # The same again is the same; another first token changes the last one's logits.
    assert torch.equal(model.prefill(tokens, cache, slots), logits)
    tokens[0] = 8
    assert not torch.allclose(model.prefill(tokens, cache, slots), logits)


# --- the measurements -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of torch, about the backends that a CPU does not have
def test_attention_is_measured_over_random_and_identity_tables(clock):
    tables, lengths = [], []

    def kernel(q, k_pool, v_pool, block_tables, seq_lens):
        tables.append(block_tables)
        return paged_attention_kernel(q, k_pool, v_pool, block_tables, seq_lens)

    def prepare(q, k_pool, v_pool, lens):
        lengths.append(lens)
        return kernel

    row = measure.measure_attention(SETTING, prepare, 1e9, 3, 64)
    assert lengths == [[64] * 3]
    # K and V of 3 sequences of 64 tokens, 2 heads of 16 in fp32, at 1 GB/s
    assert row["floor_us"] == pytest.approx(2 * 3 * 64 * 32 * 4 / 1e9 * 1e6)
    assert row["paged_us"] == row["contiguous_us"] == 8.0 and row["cudnn_us"] is None
    halves = {tuple(table.flatten().tolist()) for table in tables}
    assert {tuple(range(12)), tuple(range(12, 24))} < halves and len(halves) == 4
    assert clock[:2] == [2, 2], "two halves of the pool take turns"
    alone = measure.measure_attention(SETTING, prepare, 1e9, 3, 64, block_size=1, peers=False)
    assert alone["block_size"] == 1 and "flash_us" not in alone


def test_a_kernel_with_a_wrong_result_is_not_timed(clock):
    def kernel(q, k_pool, v_pool, block_tables, seq_lens):
        return paged_attention_kernel(q, k_pool, v_pool, block_tables, seq_lens - 1)

    with pytest.raises(measure.WrongResult, match="paged: relative error"):
        measure.measure_attention(SETTING, lambda *made_for: kernel, 1e9, 3, 64)
    with pytest.raises(measure.WrongResult):
        measure.check_close("empty", torch.full((3,), torch.nan), torch.ones(3))
    assert clock == []


def test_swaps_are_checked_and_measured(clock, monkeypatch):
    model = RandomOPT(TINY, torch.float32, DEVICE)
    row = measure.measure_swap(SETTING, model, 16)
    assert row["blocks"] == 2 and row["num_bytes"] == 32 * TINY.kv_bytes_per_token * 2
    for name in ("recompute", "swap_in", "swap_out"):
        assert row[f"{name}_ms"] == pytest.approx(1.1) and row[f"{name}_median_ms"] == 1.0
    monkeypatch.setattr(PagedKVCache, "swap_in", lambda self, pairs: None)
    with pytest.raises(measure.WrongResult, match="swapped out and in"):
        measure.measure_swap(SETTING, model, 16)
    monkeypatch.undo()
    monkeypatch.setattr(PagedKVCache, "write", lambda self, *_: None)
    with pytest.raises(measure.WrongResult, match="prefill"):
        measure.measure_swap(SETTING, model, 16)


def test_moves_are_checked_and_measured(clock, monkeypatch):
    kernels = pytest.importorskip(
        "paged_attention_triton", reason="needs triton", exc_type=ImportError
    )
    rows = measure.measure_moves(SETTING, 1e9)
    found = [(row["what"], row["layers"], row["blocks"]) for row in rows]
    copies = [("copy", layers, blocks) for layers in (1, 2) for blocks in (1, 3)]
    assert found == [("write", 1, 1), ("write", 1, 3), *copies]
    assert rows[1]["num_bytes"] == 3 * 16 * 2 * 32 * 4  # K and V of 3 blocks of 16 tokens
    assert rows[5]["num_bytes"] == 2 * rows[1]["num_bytes"]
    assert rows[1]["limit_us"] == pytest.approx(2 * rows[1]["num_bytes"] / 1e9 * 1e6)
    assert all(row["fused_us"] == row["plain_us"] == 8.0 for row in rows)
    assert [row["call_us"] for row in rows] == [1000.0, 1000.0, None, None, 1000.0, 1000.0]
    monkeypatch.setattr(kernels, "copy_blocks", lambda pool, pairs: None)
    with pytest.raises(measure.WrongResult, match="fused: wrong copy"):
        measure.measure_moves(SETTING, 1e9)
    monkeypatch.setattr(kernels, "write_slots", lambda *_: None)
    with pytest.raises(measure.WrongResult, match="fused: wrong write"):
        measure.measure_moves(SETTING, 1e9)


def test_the_settings_are_the_papers_and_the_artifacts():
    setting = measure.Setting()
    assert set(setting.attention) > set(paper_figures.FIG18A)
    assert {b for b, _ in setting.attention} == {8, 32}
    assert {t for b, t in setting.attention if b == 8} == {64 << i for i in range(8)}
    assert setting.block_sizes == tuple(paper_figures.FIG19A["swap in"])
    assert all(setting.context % size == 0 for size in setting.block_sizes)
    quick = setting.quick().model
    assert quick.num_layers == 4 and 10 * quick.slot_elements == setting.model.slot_elements
    for chosen in (setting, setting.quick()):
        assert 2 * max(chosen.moved_blocks) <= chosen.pool_blocks, "sources and destinations"
        assert chosen.swap_tokens <= chosen.host_slots <= chosen.device_slots


# --- the tables -----------------------------------------------------------------------------


def columns(table):
    return [dict(zip(table.headers, row)) for row in table.rows]


def test_fig18a_stands_beside_the_papers():
    row = {"batch": 32, "context": 128, "block_size": 16, "floor_us": 10.0, "paged_us": 12.0}
    row |= {"contiguous_us": 11.0, "cudnn_us": 10.0, "flash_us": 16.0}
    rows = [row, row | {"context": 8192, "cudnn_us": None, "flash_us": None}]
    first, second = columns(bench.attention_table(rows, "here"))
    published = paper_figures.FIG18A[32, 128]
    assert first["over floor"] == 1.2 and first["over best %"] == pytest.approx(20.0)
    assert first["paging %"] == pytest.approx(100 / 11)
    assert first["overhead %"] == published["overhead"]
    assert first["paper: vLLM us"] == published[paper_figures.VLLM]
    assert second["overhead %"] is second["over best %"] is None


def test_the_other_tables_stand_beside_the_papers():
    sizes = paper_figures.BLOCK_SIZES
    rows = [
        {"block_size": s, "paged_us": 30.0, "contiguous_us": 24.0, "floor_us": 20.0} for s in sizes
    ]
    for record, size in zip(columns(bench.blocks_table(rows, "here")), sizes, strict=True):
        assert record["over floor"] == 1.5 and record["paging %"] == pytest.approx(25.0)
        assert record["paper: Alpaca s/token"] == paper_figures.FIG18B["Alpaca"][size]
    times = {"recompute_ms": 9.0, "swap_in_ms": 2.0, "swap_out_ms": 4.0}
    times |= {"num_bytes": 1 << 20, "swap_in_median_ms": 2.0, "swap_out_median_ms": 4.0}
    rows = [{"block_size": size, "blocks": 256 // size, **times} for size in sizes]
    table = bench.swap_table(rows, "here")
    for row, size in zip(table.rows, sizes, strict=True):
        assert (row[0], row[1::2]) == (size, (9.0, 2.0, 4.0, 1.5))
        told = [paper_figures.FIG19A[name] for name in ("recompute", "swap in", "swap out")]
        assert row[2::2] == tuple(fig[size] for fig in [*told, paper_figures.FIG19A_RATIO])
    limits = gpu_timing.PinnedBandwidth(to_device=(1 << 20) * 1e3, to_host=(1 << 20) * 1e3)
    shares = bench.transfer_table(rows, limits, "here").rows
    assert shares[0][:3] == (1, 256, 4) and shares[-1][:3] == (256, 1, 1024)
    assert shares[0][4] == pytest.approx(0.5) and shares[0][6] == pytest.approx(0.25)
    row = {"what": "copy", "layers": 40, "blocks": 10, "fused_us": 10.0, "plain_us": 40.0}
    row |= {"limit_us": 9.0, "call_us": None}
    (moved,) = bench.moves_table([row], "here").rows
    assert moved == ("copy", 40, 10, 10.0, 0.9, 40.0, 0.225, None)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_prints_its_tables_and_can_be_written(clock, monkeypatch, capsys):
    pytest.importorskip("paged_attention_triton", reason="needs triton", exc_type=ImportError)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e12)
    limits = gpu_timing.PinnedBandwidth(5e10, 4e10)
    monkeypatch.setattr(bench, "pinned_bandwidth", lambda: limits)
    setting = replace(SETTING, attention=((8, 64),), block_sizes=(16, 256), swap_tokens=256)
    each = lambda points, *_: points  # noqa: E731
    found = bench.measure(setting, bench.PARTS, bench.attention_kernel("gather"), "here", each)
    assert set(bench.PARTS) < set(found) and all(found[part] for part in bench.PARTS)
    assert found["pinned_bytes_per_s"] == {"to_device": 5e10, "to_host": 4e10}
    json.dumps(found, allow_nan=False)
    text = capsys.readouterr().out
    for title in ("Fig. 18a", "Fig. 18b", "Fig. 19a", "pinned copy", "Section 5"):
        assert text.count(title) >= 1


def test_no_published_number_is_written_down_in_a_benchmark():
    figures = paper_figures.FIG18A, paper_figures.FIG19A, paper_figures.FIG18B
    told = {str(v) for figure in figures for part in figure.values() for v in part.values()}
    told = {number for number in told if "." in number and not number.endswith(".0")}
    for name in ("bench_paging_cost", "measure_paging", "opt_prefill", "gpu_timing"):
        tree = ast.parse((BENCHMARKS / f"{name}.py").read_text(encoding="ascii"))
        numbers = {str(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert not numbers & told, name


# --- the clocks, on a device ----------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graph", [False, True, None])
def test_what_is_timed_is_run_in_turn(graph):
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    runs = [lambda i=i: counts[i].add_(1) for i in (0, 1)]
    times = gpu_timing.cold_times_us(runs, 10, graph=graph)
    assert len(times) == 10 and min(times) > 0
    assert counts.min() >= 5 and counts.max() - counts.min() <= 3
    assert len(gpu_timing.wall_times_us(runs[0], 4)) == 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_limits_are_those_of_a_device():
    assert gpu_timing.copy_bandwidth(1 << 26, 3) > 0
    assert all(speed > 0 for speed in gpu_timing.pinned_bandwidth(1 << 24, 3))
