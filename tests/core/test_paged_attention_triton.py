"""Regime item 8: paged_attention_triton.py against a float64 oracle, however the work is cut.

On a CUDA device; through Triton's interpreter where there is none (see conftest.py). There bf16 is
left out, as the interpreter multiplies the bits of bfloat16 as if they were integers.
"""

import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import oracle
from test_paged_attention import scattered

import paged_attention
from attention import ShapeError, length_mask, merge_attention
from paged_attention_triton import (
    MAX_CHUNK,
    MAX_SPLITS,
    MIN_CHUNK,
    Tuning,
    choose_tuning,
    device_limits,
)

module = pytest.importorskip("paged_attention_triton", reason="needs triton", exc_type=ImportError)
Workspace = module.Workspace

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
FLOATS = [torch.float32, torch.float16] + [torch.bfloat16] * ON_CUDA
HEADS = [(1, 1), (4, 4), (2, 1), (6, 2), (4, 1), (5, 1), (7, 1), (16, 2), (12, 1), (16, 1)]
TUNINGS = [None, Tuning(16, 16, 4, 1), Tuning(16, 48, 2, 3), Tuning(32, 32, 4, 2)]


def kernel(*args, **kwargs):
    """The kernel under test, called where what torch.empty returns is NaN: an output that is not
    written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        return module.paged_attention_kernel(*args, **kwargs)
    finally:
        torch.use_deterministic_algorithms(False)


class Case:
    """Sequences of `lens` in random blocks of a pool twice as large; NaN wherever nothing lives."""

    def __init__(self, heads, head_size, block_size, lens, dtype, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.lens, self.dtype = lens, dtype
        blocks = 2 * sum(-(-length // block_size) for length in lens) + 1
        tables = scattered(lens, block_size, blocks, seed)
        longest = max(1, *lens)
        shape = (len(lens), longest, heads[1], head_size)
        q = torch.randn(len(lens), heads[0], head_size, generator=rng)
        k, v = (torch.randn(shape, generator=rng) for _ in range(2))
        self.q, self.dense_k, self.dense_v = (x.to(dtype) for x in (q, k, v))
        pools = [torch.full((blocks, block_size, *shape[2:]), math.nan) for _ in range(2)]
        for pool, dense in zip(pools, (k, v)):
            for table, length, rows in zip(tables, lens, dense):
                for i, block in enumerate(table):
                    piece = rows[i * block_size : min(length, (i + 1) * block_size)]
                    pool[block, : len(piece)] = piece
        self.k, self.v = (pool.to(DEVICE, dtype) for pool in pools)
        # The entries behind a sequence's last block lead to a block of nothing but NaN.
        dead = next(b for b in range(blocks) if all(b not in table for table in tables))
        width = max(1, *map(len, tables)) + 1
        rows = [[*table, *[dead] * (width - len(table))] for table in tables]
        self.tables = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)

    def arguments(self):
        return self.q.to(DEVICE), self.k, self.v, self.tables, self.seq_lens

    def check(self, result, scores=0.0):
        """Within the budget: four times the largest error of torch's own attention in the same
        dtype, and one rounding to it. Large `scores` (the largest) are themselves rounded, in an
        order of sums that differs from torch's and, in torch, from CPU to CPU: four roundings of
        each shift a weight by that share of it, and the output by twice that of V."""
        out, lse = (x.cpu() for x in result)
        assert out.dtype == self.dtype and lse.dtype == torch.float32
        assert out.shape == self.q.shape and lse.shape == self.q.shape[:2]
        mask = length_mask(torch.tensor(self.lens), self.dense_k.shape[1])
        want, want_lse = oracle(self.q[:, None], self.dense_k, self.dense_v, mask)
        want, want_lse = want[:, 0], want_lse[:, 0]
        group = self.q.shape[1] // self.dense_k.shape[2]
        wide = [
            x.repeat_interleave(group, dim=2).transpose(1, 2).to(DEVICE)
            for x in (self.dense_k, self.dense_v)
        ]
        plain = F.scaled_dot_product_attention(
            self.q[:, :, None].to(DEVICE), *wide, attn_mask=mask[:, None].to(DEVICE)
        )[:, :, 0].cpu()
        some = torch.tensor(self.lens) > 0
        error = (plain.double() - want)[some].abs().max() if some.any() else 0.0
        rounding = torch.finfo(self.dtype).eps
        shift = 4 * torch.finfo(torch.float32).eps * scores
        budget = 4 * error + rounding * (want.abs() + 2e-3) + 2 * shift * self.dense_v.abs().max()
        assert ((out.double() - want).abs() <= budget).all()
        assert torch.equal(lse[~some], torch.full_like(lse[~some], -math.inf))
        assert not out[~some].any()
        torch.testing.assert_close(lse[some].double(), want_lse[some], rtol=0, atol=2e-5 + shift)


def lens_for(block_size):
    return [1, max(1, block_size - 1), block_size, block_size + 1, 0, 61]


SHAPES = [(heads, 64, 16) for heads in HEADS]
SHAPES += [((h, 1), head_size, 16) for head_size in (4, 8, 80, 96, 128, 256) for h in (1, 4)]
SHAPES += [((4, 2), 64, block_size) for block_size in (1, 2, 3, 7, 8, 16, 31, 32, 64, 128, 256)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "head_size", "block_size"), SHAPES)
def test_every_number_of_queries_head_size_and_block_size(dtype, heads, head_size, block_size):
    case = Case(heads, head_size, block_size, lens_for(min(block_size, 128)), dtype, block_size)
    some = TUNINGS[heads[0] % 4] if block_size == 16 else Tuning(32, max(32, block_size), 4, 2)
    for tuning in TUNINGS if ON_CUDA else [some]:
        case.check(kernel(*case.arguments(), tuning=tuning))


@settings(max_examples=200 if ON_CUDA else 15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_any_cut(data):
    # Each block size and number of heads is compiled anew on a device: a few stand for all.
    block_size = data.draw(st.sampled_from([1, 3, 16, 29]) if ON_CUDA else st.integers(1, 40))
    heads = data.draw(st.sampled_from(HEADS[2:4] if ON_CUDA else HEADS))
    longest, most = (130, 5) if ON_CUDA else (70, 2)
    lens = data.draw(st.lists(st.integers(0, longest), min_size=1, max_size=most))
    case = Case(
        heads,
        data.draw(st.sampled_from([64, 80, 128])),
        block_size,
        lens,
        data.draw(st.sampled_from(FLOATS)),
        seed=data.draw(st.integers(0, 99)),
    )
    tile = data.draw(st.sampled_from([16, 32]))
    chunk = data.draw(st.integers(3, 100))  # no multiple of the tile, and shorter than one
    case.check(kernel(*case.arguments(), tuning=Tuning(tile, chunk, 4, 2)))


def test_a_workspace_serves_one_call_after_another():
    workspace = Workspace(DEVICE)
    for seed in range(3):
        lens = random.Random(seed).choices(range(70), k=1 + seed)
        case = Case((4, 2), 64, 16, lens, torch.float16, seed)
        for tuning in TUNINGS[1:]:
            case.check(kernel(*case.arguments(), workspace=workspace, tuning=tuning))
            assert not workspace.arrived.any(), "the next call would merge too early"


def test_a_workspace_grows_in_every_direction():
    """Rows, heads and head size each on its own: a buffer too small would be written past."""
    workspace = Workspace(DEVICE)
    shapes = ((2, 2), 128, [49, 5]), ((4, 2), 64, [49, 33, 17]), ((1, 1), 64, [5])
    for heads, size, lens in shapes:
        case = Case(heads, size, 16, lens, torch.float16)
        case.check(kernel(*case.arguments(), workspace=workspace, tuning=TUNINGS[1]))
        rows, (num_heads, num_kv_heads) = len(lens) * -(-64 // 16), heads
        assert workspace.lse.numel() >= rows * num_heads or max(lens) < 49
        assert workspace.arrived.numel() >= len(lens) * num_kv_heads


def test_a_length_beyond_the_table_is_cut_and_harms_no_later_call():
    workspace, tuning = Workspace(DEVICE), Tuning(16, 32, 4, 2)
    case = Case((4, 2), 64, 16, [80, 61], torch.float16)
    q, k, v, tables, lens = case.arguments()
    narrow = tables[:, :4].contiguous()  # 64 slots
    got = kernel(q, k, v, narrow, lens, workspace=workspace, tuning=tuning)
    want = kernel(q, k, v, narrow, lens.clamp(max=64), tuning=tuning)
    assert all(map(torch.equal, got, want))
    unsplit = kernel(q, k, v, narrow, lens, tuning=Tuning(16, 80, 4, 2))
    torch.testing.assert_close(unsplit, want, rtol=0, atol=2e-3)
    assert not workspace.arrived.any()
    case.check(kernel(*case.arguments(), workspace=workspace, tuning=tuning))


@pytest.mark.filterwarnings("ignore:invalid value|All-NaN:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("tuning", [Tuning(16, 128, 4, 2), Tuning(16, 32, 4, 2)])
def test_a_nan_that_lives_shows_in_out_and_lse(tuning):
    """What lse says decides what merging with other parts makes of out."""
    case = Case((2, 1), 64, 16, [97], torch.float32)
    q, k, v, tables, lens = case.arguments()
    k = k.clone()
    k[tables[0, 2], 3] = math.nan
    out, lse = kernel(q, k, v, tables, lens, tuning=tuning)
    assert out.isnan().all() and lse.isnan().all()
    clean = Case((2, 1), 64, 16, [97], torch.float32, seed=1)
    other = kernel(*clean.arguments(), tuning=tuning)
    assert merge_attention([out, other[0]], [lse, other[1]])[0].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value|All-NaN:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("tuning", [Tuning(16, 128, 4, 2), Tuning(16, 32, 4, 2)])
def test_scores_of_minus_infinity_count_for_nothing(tuning):
    """A whole tile of them, a whole part, and a whole sequence: as in attention.py."""
    case = Case((1, 1), 64, 16, [97, 97], torch.float32)
    q, k, v, tables, lens = case.arguments()
    q, k = q.abs() + 0.1, k.clone()
    for seq, blocks in ((0, range(2)), (0, range(4, 6)), (1, range(7))):
        for block in blocks:
            k[tables[seq, block]] = -math.inf
    k[tables[1, 6], 1:] = math.nan  # dead
    got = kernel(q, k, v, tables, lens, tuning=tuning)
    want = paged_attention.paged_attention_kernel(q, k, v, tables, lens)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert got[1][1].item() == -math.inf and math.isfinite(got[1][0].item())


def test_views_and_wider_integers_are_read_as_they_are():
    case = Case((4, 2), 64, 16, [17, 33], torch.float16)
    want = kernel(*case.arguments())
    q, k, v, tables, lens = case.arguments()
    wide_q = torch.stack([q, q], dim=2)[:, :, 0]  # every second row of a larger tensor
    both = torch.stack([torch.full_like(k, math.nan), k, v])  # one pool in a larger one
    apart = torch.full((*k.shape[:1], 2 * k.shape[1], *k.shape[2:]), math.nan).to(k)
    apart[:, : k.shape[1]] = v
    loose_v = apart[:, : k.shape[1]]  # its blocks lie farther apart than those of K
    heads = torch.full((*k.shape[:2], 2 * k.shape[2], k.shape[3]), math.nan).to(k)
    heads[:, :, : k.shape[2]] = v
    sparse_v = heads[:, :, : k.shape[2]]  # and its slots
    for arguments in (
        (wide_q, k, v, tables, lens),
        (q, both[1], both[2], tables, lens),
        (q, k, loose_v, tables, lens),
        (q, k, sparse_v, tables, lens),
        (q, k, v, tables.long(), lens.long()),
        (q, k, v, torch.cat([tables, tables], dim=1)[:, : tables.shape[1]], lens),
    ):
        assert all(map(torch.equal, kernel(*arguments), want))
    k, v = (x[:, :, :1].contiguous() for x in (k, v))  # where there is one head, any stride will do
    other = [x.as_strided(x.shape, (x.stride(0), x.stride(1), 7, 1)) for x in (k, v)]
    want = kernel(q[:, :2], k, v, tables, lens)
    assert all(map(torch.equal, kernel(q[:, :2], *other, tables, lens), want))


@pytest.mark.parametrize("chunk", [128, 32])
def test_scores_far_below_zero_are_weighed_like_others(chunk):
    """All of them near -240: exp(-240) is no float32, the differences are."""
    case = Case((4, 2), 64, 16, [97, 5], torch.float32)
    case.q.fill_(1.0)
    for pool in (case.k, case.dense_k):
        pool.copy_(torch.where(pool.isnan(), pool, pool / 8 - 30.0))
    result = kernel(*case.arguments(), tuning=Tuning(32, chunk, 4, 2))
    assert (result[1] < -200).all()
    case.check(result, scores=250.0)


def test_a_block_may_span_just_less_than_32_bits():
    memory = torch.empty(16 << 27, dtype=torch.float16, device="meta")
    pool = memory.as_strided((1, 16, 2, 64), (0, (1 << 27) - 4, 64, 1))
    q = torch.empty(2, 4, 64, dtype=torch.float16, device="meta")
    tables = torch.empty(2, 1, dtype=torch.int32, device="meta")
    module._check_inputs(q, pool, pool, tables, tables[:, 0].contiguous())


def test_the_scale_is_passed_on():
    case = Case((4, 2), 64, 16, [33, 97], torch.float32)
    got = kernel(*case.arguments(), scale=0.5)
    want = paged_attention.paged_attention_kernel(*case.arguments(), scale=0.5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert not torch.allclose(got[1], kernel(*case.arguments())[1])


def test_nothing_to_do():
    q = torch.zeros(0, 4, 64, device=DEVICE, dtype=torch.float16)
    pool = torch.zeros(3, 16, 2, 64, device=DEVICE, dtype=torch.float16)
    tables = torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)
    out, lse = kernel(q, pool, pool, tables, tables.sum(dim=1).int())
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)
    no_blocks = torch.zeros(2, 0, dtype=torch.int32, device=DEVICE)
    lens = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    out, lse = kernel(torch.ones_like(q).new_ones(2, 4, 64), pool, pool, no_blocks, lens)
    assert not out.any() and (lse == -math.inf).all()


def refused():
    def zeros(*shape, dtype=torch.float16):
        return torch.zeros(shape, dtype=dtype)

    def case(pool=None, **changes):
        given = {"q": zeros(2, 4, 64)} | dict.fromkeys(("k_pool", "v_pool"), zeros(3, 16, 2, 64))
        given |= {"block_tables": zeros(2, 2, dtype=torch.int32)}
        given |= {"seq_lens": zeros(2, dtype=torch.int32)}
        return given | ({} if pool is None else {"k_pool": pool, "v_pool": pool}) | changes

    yield case(window=4), "no window"
    yield case(soft_cap=30.0), "no soft cap"
    yield case(q=zeros(2, 4, 1, 64)), "q must be"
    yield case(k_pool=zeros(3, 16, 3, 64)), "need pools"
    yield case(zeros(3, 16, 3, 64)), "multiple"
    yield case(q=zeros(2, 34, 64)), "up to 16"
    yield case(zeros(3, 16, 2, 512), q=zeros(2, 4, 512)), "at most 256"
    yield case(q=zeros(2, 4, 64, dtype=torch.float32)), "one dtype"
    double = {"dtype": torch.float64}
    yield case(zeros(3, 16, 2, 64, **double), q=zeros(2, 4, 64, **double)), "dtype"
    yield case(zeros(3, 2, 16, 64).transpose(1, 2)), "dense"
    yield case(q=zeros(2, 64, 4).transpose(1, 2)), "dense"
    far = torch.empty(16 << 27, dtype=torch.float16, device="meta")
    far = far.as_strided((1, 16, 2, 64), (0, 1 << 27, 64, 1))
    yield case(far), "a block spans 2147483648 elements"
    yield case(block_tables=zeros(2, 2)), "block_tables must be"
    yield case(seq_lens=zeros(3, dtype=torch.int32)), "B differs"
    yield case(seq_lens=zeros(2)), "integers"
    yield case(seq_lens=zeros(2) > 0), "integers"
    yield case(seq_lens=[0, 0]), "seq_lens must be a tensor, not list"
    yield case(block_tables=[[0], [1]]), "block_tables must be a tensor, not list"


@pytest.mark.parametrize(("arguments", "message"), list(refused()))
def test_what_cannot_be_done_is_refused(arguments, message):
    with pytest.raises(ShapeError, match=message):
        kernel(**arguments)


def test_a_tuning_is_checked():
    for values in ((8, 64, 4, 2), (24, 64, 4, 2), (16, 0, 4, 2), (16, 64, 4, 0)):
        with pytest.raises(ValueError, match="power of two"):
            Tuning(*values)


@given(
    st.integers(1, 5000),
    st.integers(0, 200_000),
    st.sampled_from([64, 128, 256, 512, 1024]),
    st.integers(1, 150),
    st.sampled_from([64 << 10, 99 << 10, 163 << 10, 227 << 10]),
)
def test_the_tuning_covers_every_length(num_items, max_len, row_bytes, multiprocessors, shared):
    tuning = choose_tuning(num_items, max_len, row_bytes, multiprocessors, shared)
    parts = -(-max_len // tuning.chunk)
    assert parts <= MAX_SPLITS
    assert tuning.chunk % tuning.tile == 0
    tiles = 2 * (tuning.num_stages - 1) * tuning.tile * row_bytes
    assert tiles + (12 << 10) <= shared or tuning.tile == 16
    if parts > 1:  # not more parts than can run, unless an item would be too long otherwise
        assert parts <= -(-max_len // MIN_CHUNK)
        assert parts * num_items <= 2 * multiprocessors or max_len > MAX_CHUNK


def test_of_a_gpus_shared_memory_the_drivers_kib_is_not_ours(monkeypatch):
    """An H100's numbers, as its properties have them."""
    told = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    uncached = device_limits.__wrapped__  # or these would be known of this machine's GPU
    assert uncached(torch.device("cuda", 0)) == (132, 227 << 10)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
class TestOnTheDevice:
    def test_a_pool_beyond_two_to_the_31_elements(self):
        blocks = (1 << 31) // (16 * 8 * 128) + 7
        k = torch.full((blocks, 16, 8, 128), math.nan, dtype=torch.float16, device="cuda")
        small = torch.randn(5, 16, 8, 128, dtype=torch.float16, device="cuda")
        ids = torch.tensor([blocks - 1, 0, blocks - 3, blocks // 2, blocks - 2], device="cuda")
        k[ids] = small
        q = torch.randn(1, 32, 128, dtype=torch.float16, device="cuda")
        lens = torch.tensor([77], dtype=torch.int32, device="cuda")
        got = kernel(q, k, k, ids[None].int(), lens)
        want = kernel(q, small, small, torch.arange(5, device="cuda")[None].int(), lens)
        assert all(map(torch.equal, got, want))

    @pytest.mark.parametrize("heads", [(8, 8), (32, 8), (16, 1)])
    def test_lengths_up_to_128k(self, heads):
        lens = [131072, 1, 40007, 17]
        width = 131072 // 16
        pool = torch.randn(width + 7, 16, heads[1], 128, dtype=torch.float16, device="cuda")
        tables = torch.stack([torch.randperm(width + 7)[:width] for _ in lens]).int().cuda()
        q = torch.randn(len(lens), heads[0], 128, dtype=torch.float16, device="cuda")
        lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
        out, lse = kernel(q, pool, pool, tables, lens)
        for b, length in enumerate(lens.tolist()):
            kv = pool[tables[b].long()].flatten(0, 1)[:length].double()
            kv = kv.repeat_interleave(heads[0] // heads[1], dim=1)
            scores = torch.einsum("hd,thd->ht", q[b].double(), kv) / math.sqrt(128)
            want = torch.einsum("ht,thd->hd", scores.softmax(dim=1), kv)
            assert (out[b].double() - want).abs().max() <= 2e-3 * max(1.0, want.abs().max())
            torch.testing.assert_close(lse[b].double(), scores.logsumexp(dim=1), rtol=0, atol=1e-4)

    def test_a_graph_can_hold_it_and_nothing_is_gathered(self):
        case = Case((8, 2), 128, 16, [5000, 33, 700], torch.float16)
        arguments, workspace = case.arguments(), Workspace("cuda")
        want = kernel(*arguments, workspace=workspace)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernel(*arguments, workspace=workspace)
        assert torch.cuda.max_memory_allocated() - before < 1 << 20
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = kernel(*arguments, workspace=workspace)
        for _ in range(3):
            got[0].fill_(math.nan)
            graph.replay()
            assert all(map(torch.equal, got, want))

    def test_whoever_arrives_last_thousands_of_times(self):
        """The merge in the kernel is a race by design: any order must give the same bits."""
        rng, workspace = random.Random(0), Workspace("cuda")
        cases = []
        for splits in (16, 33, 64):
            lens = [rng.randint(1, 16 * splits) for _ in range(8)] + [16 * splits]
            case = Case((8, 2), 64, 16, lens, torch.float16, seed=splits)
            tuning = Tuning(16, -(-case.tables.shape[1] * 16 // splits), 4, 2)
            cases.append((case, tuning, kernel(*case.arguments(), tuning=tuning)))
            case.check(cases[-1][2])
        for turn in range(3000):
            case, tuning, want = cases[turn % 3]
            got = module.paged_attention_kernel(
                *case.arguments(), workspace=workspace, tuning=tuning
            )
            assert all(map(torch.equal, got, want)), turn
        assert not workspace.arrived.any()

    def test_a_workspace_does_not_grow_under_a_graph(self):
        case = Case((8, 2), 64, 16, [5000, 33], torch.float16)
        small = Case((8, 2), 64, 16, [500], torch.float16)
        workspace = Workspace("cuda")
        kernel(*small.arguments(), workspace=workspace, tuning=Tuning(16, 64, 4, 2))
        arguments = case.arguments()
        kernel(*arguments, tuning=Tuning(16, 128, 4, 2))
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(ShapeError, match="cannot grow"), torch.cuda.graph(graph):
            arguments[0].clone()  # torch warns of a graph with nothing in it
            module.paged_attention_kernel(
                *arguments, workspace=workspace, tuning=Tuning(16, 128, 4, 2)
            )

    def test_agrees_with_the_gather_kernel_at_the_models_shapes(self):
        for heads, head_size in (((40, 40), 128), ((64, 8), 128), ((32, 8), 96)):
            case = Case(heads, head_size, 16, [129, 1024, 17, 301], torch.bfloat16)
            got = kernel(*case.arguments())
            want = paged_attention.paged_attention_kernel(*case.arguments())
            torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-3)
            torch.testing.assert_close(got[1], want[1], rtol=0, atol=2e-5)
