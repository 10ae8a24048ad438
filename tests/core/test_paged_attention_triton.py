"""Regime item 8: paged_attention_triton.py against a float64 oracle, however the work is cut.

On a CUDA device; through Triton's interpreter where there is none (see conftest.py). There bf16 is
left out, as the interpreter multiplies the bits of bfloat16 as if they were integers.
"""

import math
import random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import oracle
from test_paged_attention import scattered

import paged_attention
from attention import ShapeError, causal_mask, merge_attention

module = pytest.importorskip("paged_attention_triton", reason="needs triton", exc_type=ImportError)
Card, Plan, Rows, Tuning, Workspace = (
    getattr(module, name) for name in ("Card", "Plan", "Rows", "Tuning", "Workspace")
)

choose_tuning = module.choose_tuning

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
FLOATS = [torch.float32, torch.float16] + [torch.bfloat16] * ON_CUDA
SMALL = [torch.float8_e4m3fn, torch.float8_e5m2]
HEADS = [(1, 1), (4, 4), (2, 1), (6, 2), (4, 1), (5, 1), (7, 1), (16, 2), (12, 1), (16, 1)]
WIDE = [(71, 1), (48, 1), (24, 1)]
SMALL_TILES, LARGE_TILES = Tuning(16, 4, 2, 1), Tuning(32, 4, 2, 1)


@contextmanager
def on_a_card_of(programs):
    """A device that runs so many programs at once: how often the work is cut."""
    with pytest.MonkeyPatch.context() as patch:
        card = Card(1e11, programs, 1 << 20)
        patch.setattr(module, "device_limits", lambda device: (card, 1 << 20))
        yield


@contextmanager
def poisoned():
    """What torch.empty returns is NaN: an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def kernel(*args, programs=None, tuning=None, **kwargs):
    """The kernel under test; programs: with `tuning`, as on a card that runs so many at once."""
    with poisoned():
        if programs is None:
            return module.paged_attention_kernel(*args, tuning=tuning, **kwargs)
        with on_a_card_of(programs):
            return module.paged_attention_kernel(*args, tuning=tuning or SMALL_TILES, **kwargs)


class Case:
    """Sequences of `lens` in random blocks of a pool twice as large; NaN wherever nothing lives.

    heads: (H, H_kv); size: D, or (D, D_V); counts: the query tokens of each sequence, its newest;
    None: one each, without a plan. stored: the pools' dtype, where not q's, with scales.
    """

    def __init__(
        self,
        heads,
        size,
        block_size,
        lens,
        dtype,
        seed=0,
        *,
        counts=None,
        window=None,
        soft_cap=None,
        stored=None,
    ):
        rng = torch.Generator().manual_seed(seed)
        self.lens, self.counts, self.dtype = lens, counts, dtype
        self.options = {"window": window, "soft_cap": soft_cap}
        self.each = [1] * len(lens) if counts is None else counts
        sizes = size if isinstance(size, tuple) else (size, size)
        self.q = torch.randn(sum(self.each), heads[0], sizes[0], generator=rng).to(dtype)
        self.masks = [
            causal_mask(n, length, window=window)[0] for n, length in zip(self.each, lens)
        ]
        scales = (1.0, 1.0)
        if stored is not None:
            scales = 0.5, 1.25
            self.options |= {"k_scale": scales[0], "v_scale": scales[1]}
        blocks = 2 * sum(-(-length // block_size) for length in lens) + 1
        tables = scattered(lens, block_size, blocks, seed)
        pools, self.dense = [], []  # of K and of V; of each sequence, as the kernel is to see it
        for width, scale in zip(sizes, scales):
            dense = [torch.randn(n, heads[1], width, generator=rng) / scale for n in lens]
            dense = [x.to(stored or dtype).float() for x in dense]
            pool = torch.full((blocks, block_size, heads[1], width), math.nan)
            for table, rows, mask in zip(tables, dense, self.masks):
                rows = rows.where(mask.any(dim=0)[:, None, None], math.nan)
                for block, piece in zip(table, rows.split(block_size)):
                    pool[block, : len(piece)] = piece
            pools.append(pool.to(DEVICE, stored or dtype))
            self.dense.append([x * scale for x in dense])
        self.k, self.v = pools
        # The entries behind a sequence's last block lead to a block of nothing but NaN.
        dead = next(b for b in range(blocks) if all(b not in table for table in tables))
        width = max(1, *map(len, tables)) + 1
        rows = [[*table, *[dead] * (width - len(table))] for table in tables]
        self.tables = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)

    def arguments(self):
        return self.q.to(DEVICE), self.k, self.v, self.tables, self.seq_lens

    def plan(self, programs, tuning, lens=None):
        """Made on such a card; for other lengths than the case's, it is stale."""
        with poisoned(), on_a_card_of(programs):
            inputs = self.q.to(DEVICE), self.k, self.v, lens or self.lens, self.counts
            return Plan(*inputs, window=self.options["window"], tuning=tuning)

    def run(self, programs, tuning=SMALL_TILES, *, planned=None, lens=None, **options):
        """What the kernel gives, cut for such a card: with a plan, if planned or needed."""
        options |= self.options
        if planned or self.counts is not None or lens is not None:
            return kernel(*self.arguments(), plan=self.plan(programs, tuning, lens), **options)
        return kernel(*self.arguments(), programs=programs, tuning=tuning, **options)

    def check(self, result, scores=0.0):
        """Within the budget: four times the largest error of torch's own attention in the same
        dtype, and one rounding to it. Large `scores` (the largest) are themselves rounded, in an
        order of sums that differs from torch's and, in torch, from CPU to CPU: four roundings of
        each shift a weight by that share of it, and the output by twice that of V. A soft cap
        rounds scores as if they were as large as it is; torch has none, and its error without one
        counts."""
        out, lse = (x.cpu() for x in result)
        assert out.dtype == self.dtype and lse.dtype == torch.float32
        assert out.shape == (*self.q.shape[:2], self.v.shape[3]) and lse.shape == self.q.shape[:2]
        group, cap = self.q.shape[1] // self.k.shape[2], self.options["soft_cap"]
        scores = max(scores, cap or 0.0)
        wants, want_lses, error, largest = [], [], 0.0, 0.0
        for q, k, v, mask in zip(self.q.split(self.each), *self.dense, self.masks):
            one = q[None], k[None], v[None], mask[None]
            want, want_lse = oracle(*one, soft_cap=cap)
            wants.append(want[0])
            want_lses.append(want_lse[0])
            some = mask.any(dim=1)
            if some.any():
                wide = [x.to(DEVICE, self.dtype).repeat_interleave(group, dim=1) for x in (k, v)]
                plain = F.scaled_dot_product_attention(
                    *(x.transpose(0, 1)[None] for x in (q.to(DEVICE), *wide)),
                    attn_mask=mask[None, None].to(DEVICE),
                )[0].transpose(0, 1)
                plain_want = want if cap is None else oracle(*one)[0]
                error = max(error, (plain.cpu().double() - plain_want[0])[some].abs().max())
                largest = max(largest, v.abs().max())
        want, want_lse = torch.cat(wants), torch.cat(want_lses)
        rounding = torch.finfo(self.dtype).eps
        shift = 4 * torch.finfo(torch.float32).eps * scores
        budget = 4 * error + rounding * (want.abs() + 2e-3) + 2 * shift * largest
        assert ((out.double() - want).abs() <= budget).all()
        some = want_lse > -math.inf
        assert torch.equal(lse[~some], torch.full_like(lse[~some], -math.inf))
        assert not out[~some].any()
        torch.testing.assert_close(lse[some].double(), want_lse[some], rtol=0, atol=2e-5 + shift)


SHAPES = [(heads, 64, 16) for heads in HEADS]
SHAPES += [((h, 1), head_size, 16) for head_size in (4, 8, 80, 96, 128, 256) for h in (1, 4)]
SHAPES += [((4, 2), 64, block_size) for block_size in (1, 2, 3, 7, 8, 31, 32, 64)]
SHAPES += [((2, 1), 64, block_size) for block_size in (128, 256)]
SHAPES += [(heads, size, 16) for heads in WIDE for size in (64, 128)]
SHAPES += [((71, 1), 256, 16), ((40, 1), 512, 16)]  # a group that several programs share
SHAPES += [((h, 1), (576, 512), 16) for h in (16, 40)]
SHAPES += [((4, 2), sizes, 16) for sizes in ((192, 128), (48, 32), (64, 128), (100, 64), (3, 130))]
CUTS = [(4, False), (1, True), (6, True)]  # programs a head, and whether there is a plan


@pytest.mark.parametrize("turn", range(len(SHAPES)))
def test_every_number_of_queries_head_size_and_block_size(turn):
    """In each dtype on a device, and there as the card is tuned too; else each shape in one."""
    heads, size, block_size = SHAPES[turn]
    lens = [block_size, block_size + 1, 0, 61]
    for i, dtype in enumerate(FLOATS if ON_CUDA else [FLOATS[turn % 2]]):
        case = Case(heads, size, block_size, lens, dtype, seed=turn)
        programs, planned = CUTS[(turn + i) % 3]
        tuning = SMALL_TILES if case.v.shape[3] > 256 else LARGE_TILES
        case.check(case.run(programs * heads[1], tuning, planned=planned))
        if ON_CUDA:
            plan = None if planned else Plan(*case.arguments()[:3], lens)
            case.check(kernel(*case.arguments(), plan=plan))


@settings(max_examples=80 if ON_CUDA else 30, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_any_cut_any_option(data):
    """All together: lengths, query tokens, window, cap, widths, 8 bits, plans that are stale."""
    # Each of these sizes is compiled anew on a device: a few stand for all.
    draw = data.draw
    block_size = draw(st.sampled_from([3, 16]) if ON_CUDA else st.integers(1, 40))
    heads = draw(st.sampled_from([(6, 2), (24, 1)] if ON_CUDA else HEADS + WIDE))
    size = draw(st.sampled_from([64, (80, 64), (64, 128), (24, 256)][: 2 if ON_CUDA else 4]))
    longest, most = (130, 5) if ON_CUDA else (70, 2)
    lens = draw(st.lists(st.integers(0, longest), min_size=1, max_size=most))
    counts = None
    if draw(st.booleans()):
        some = st.sampled_from([0, 1, 20]) if ON_CUDA else st.integers(0, 20)
        counts = [draw(some) for _ in lens]
    case = Case(
        *(heads, size, block_size, lens, draw(st.sampled_from(FLOATS))),
        seed=draw(st.integers(0, 99)),
        counts=counts,
        window=draw(st.none() | st.sampled_from([1, 7, 16, 40, 200])),
        soft_cap=draw(st.none() | st.sampled_from([0.7, 30.0])),
        stored=draw(st.sampled_from([None, None, *SMALL])),
    )
    tuning = draw(st.sampled_from([SMALL_TILES, LARGE_TILES]))
    stale = st.lists(st.integers(0, longest), min_size=len(lens), max_size=len(lens))
    made_for = draw(st.none() | st.just(lens) | stale)
    workspace = Workspace(DEVICE)
    options = {"lens": made_for, "workspace": workspace}
    case.check(case.run(draw(st.integers(1, 12)) * heads[1], tuning, **options))
    assert not workspace.arrived.any()


@pytest.mark.parametrize(
    ("heads", "size", "lens", "counts", "options"),
    [
        (
            (4, 2),
            64,
            [70, 33, 70, 17],
            [70, 1, 40, 0],
            {},
        ),  # a whole prompt, a decode, a part, none
        ((2, 1), 64, [70, 33], [70, 20], {"window": 9, "soft_cap": 3.0}),
        ((1, 1), 64, [131, 3], [129, 5], {}),  # more than a program takes; more than there are
        ((24, 1), (192, 128), [20, 40], [20, 3], {"window": 30}),
        ((71, 1), 256, [5, 40, 9], [5, 2, 0], {}),  # a group that several programs share
        ((71, 1), 256, [90, 40], [2, 1], {"window": 60, "soft_cap": 3.0}),
    ],
)
def test_several_query_tokens_of_a_sequence_see_what_is_before_each(
    heads, size, lens, counts, options
):
    case = Case(heads, size, 16, lens, torch.float16, counts=counts, **options)
    case.check(case.run(10 * heads[1]))


@pytest.mark.parametrize("chunk", [3, 16, 33, 70])
def test_a_prompt_in_chunks_is_the_prompt(chunk):
    """Each chunk as a sequence of its own, of the same blocks."""
    whole = Case((2, 1), 64, 16, [70], torch.float32, counts=[70])
    q, k, v, tables, _ = whole.arguments()
    lens = [*range(chunk, 70, chunk), 70]
    counts = [end - begin for begin, end in zip([0, *lens], lens)]
    with poisoned(), on_a_card_of(6):
        plan = Plan(q, k, v, lens, counts, tuning=LARGE_TILES)
    tables, lens = tables.repeat(len(lens), 1), torch.tensor(lens, device=DEVICE)
    whole.check(kernel(q, k, v, tables, lens, plan=plan))


@pytest.mark.parametrize("window", [1, 5, 40, 200])
def test_outside_of_a_window_nothing_is_read(window):
    case = Case((2, 1), 64, 16, [97, 1, 0, 41], torch.float16, window=window)
    for programs, planned in ((5, True), (2, False)):
        case.check(case.run(programs, planned=planned))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("counts", [None, [1, 3, 0, 2]])
@pytest.mark.parametrize("made_for", [[1, 90, 0, 40], [300] * 4])
def test_a_stale_plan_gives_what_a_fresh_one_does(window, counts, made_for):
    """It says where the work is cut and not what it is."""
    lens = [97, 60, 33, 5]
    case = Case((2, 1), 16, 16, lens, torch.float16, counts=counts, window=window)
    case.check(case.run(7, lens=made_for))


def test_an_updated_plan_is_as_good_as_a_new_one_and_keeps_its_tensor():
    case = Case((2, 1), 64, 16, [97, 33, 64], torch.float16)
    plan = case.plan(7, SMALL_TILES, [70, 70, 70])
    table, ranges = plan.table, plan.num_ranges
    for lens in ([1, 0, 1], [0, 0, 0], [500, 33, 1]):
        plan.update(lens)
        assert (plan.table.data_ptr(), plan.num_ranges) == (table.data_ptr(), ranges)
        case.check(kernel(*case.arguments(), plan=plan))
    fewer = Case((2, 1), 64, 16, [40, 9], torch.float16)
    plan.update(fewer.lens)
    fewer.check(kernel(*fewer.arguments(), plan=plan))
    more = Case((2, 1), 64, 16, [40, 9, 33, 2], torch.float16)
    plan.update(more.lens)
    more.check(kernel(*more.arguments(), plan=plan))
    several = Case((2, 1), 64, 16, [40, 9], torch.float16, counts=[3, 2])
    plan = several.plan(7, SMALL_TILES)
    plan.update([9, 40], [2, 3])
    plan.update([40, 9], [3, 2])
    several.check(kernel(*several.arguments(), plan=plan))


def test_a_workspace_serves_one_call_after_another():
    workspace = Workspace(DEVICE)
    for seed in range(2):
        lens = random.Random(seed).choices(range(70), k=1 + seed)
        case = Case((4, 2), 64, 16, lens, torch.float16, seed)
        for programs, tuning, planned in (
            (2, LARGE_TILES, False),
            (9, SMALL_TILES, True),
            (9, SMALL_TILES, False),
        ):
            case.check(case.run(programs, tuning, planned=planned, workspace=workspace))
            assert not workspace.arrived.any(), "the next call would merge too early"


def test_a_workspace_grows_in_every_direction():
    """Rows, heads and head size each on its own: a buffer too small would be written past."""
    workspace = Workspace(DEVICE)
    shapes = ((2, 2), 128, [49, 5]), ((4, 2), 64, [49, 33, 17]), ((1, 1), 64, [5])
    for heads, size, lens in shapes:
        case = Case(heads, size, 16, lens, torch.float16)
        plan = case.plan(4 * heads[1], SMALL_TILES)
        case.check(kernel(*case.arguments(), plan=plan, workspace=workspace))
        programs = plan.num_ranges * heads[1]
        places = 2 * programs * heads[0] // heads[1]
        assert workspace.arrived.numel() >= programs
        assert workspace.lse.numel() >= places and workspace.out.numel() >= places * size


def test_a_workspace_that_grows_a_little_at_each_call_keeps_few_smaller_ones():
    workspace = Workspace(DEVICE)
    sizes = set()
    for programs in range(1, 300):
        workspace.reserve(programs, 16, 64)
        sizes.add(workspace.out.numel())
    assert len(sizes) < 12 and max(sizes) < 4 * programs * 16 * 64 * 2


@pytest.mark.parametrize(("heads", "sizes"), [((4, 1), (64, 64)), ((7, 1), (128, 128))])
def test_prompts_of_any_length_take_few_kernels(heads, sizes):
    """What a kernel is compiled for, beside what a model has: its query tokens and rows."""
    rows = [Rows.of(*heads, sizes[1], most) for most in range(1, 500)]
    assert len({(one.queries, one.padded) for one in rows}) <= 5
    assert all(one.queries >= min(most, 128 // heads[0]) for most, one in enumerate(rows, 1))


def test_a_graphs_plan_stays_where_it_is_however_its_query_tokens_are_shared_out():
    q, pool = torch.zeros(40, 1, 64, device=DEVICE), torch.zeros(3, 16, 1, 64, device=DEVICE)
    plan = Plan(q, pool, pool, [40, 5, 5, 5], [20, 0, 0, 20])
    where = plan.table.data_ptr()
    for counts in ([10] * 4, [40, 0, 0, 0], [1, 1, 19, 19], [33, 1, 3, 3]):
        plan.update([40] * 4, counts)
        assert plan.table.data_ptr() == where


def test_a_length_beyond_the_table_is_cut_and_harms_no_later_call():
    workspace = Workspace(DEVICE)
    case = Case((2, 1), 64, 16, [80, 61], torch.float16)
    q, k, v, tables, lens = case.arguments()
    narrow = tables[:, :4].contiguous()  # 64 slots
    for plan in (None, case.plan(4, SMALL_TILES)):
        options = {"programs": 2, "plan": plan}
        got = kernel(q, k, v, narrow, lens, workspace=workspace, **options)
        want = kernel(q, k, v, narrow, lens.clamp(max=64), **options)
        assert all(map(torch.equal, got, want))
        unsplit = kernel(q, k, v, narrow, lens, programs=1)
        torch.testing.assert_close(unsplit, want, rtol=0, atol=2e-3)
        assert not workspace.arrived.any()
    case.check(case.run(2, workspace=workspace))


@pytest.mark.filterwarnings("ignore:invalid value|All-NaN:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize(("programs", "soft_cap"), [(1, 5.0), (4, None)])
def test_a_nan_that_lives_shows_in_out_and_lse(programs, soft_cap):
    """What lse says decides what merging with other parts makes of out."""
    case, clean = (
        Case((2, 1), 64, 16, [97], torch.float32, seed, soft_cap=soft_cap) for seed in (0, 1)
    )
    case.k[case.tables[0, 2], 3] = math.nan
    (out, lse), other = (one.run(programs, planned=True) for one in (case, clean))
    assert out.isnan().all() and lse.isnan().all()
    assert merge_attention([out, other[0]], [lse, other[1]])[0].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value|All-NaN:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("programs", [1, 7])
def test_scores_of_minus_infinity_count_for_nothing(programs):
    """A whole tile of them, a whole part, and a whole sequence: as in attention.py."""
    case = Case((1, 1), 64, 16, [97, 97], torch.float32)
    q, k, v, tables, lens = case.arguments()
    q, k = q.abs() + 0.1, k.clone()
    for seq, blocks in ((0, range(2)), (0, range(4, 6)), (1, range(7))):
        for block in blocks:
            k[tables[seq, block]] = -math.inf
    k[tables[1, 6], 1:] = math.nan  # dead
    got = kernel(q, k, v, tables, lens, plan=case.plan(programs, SMALL_TILES))
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


def test_v_may_be_a_part_of_k():
    """As where one latent vector of a slot is both (DeepSeek's MLA)."""
    case = Case((16, 1), (96, 64), 16, [17, 40], torch.float16)
    q, k, _, tables, lens = case.arguments()
    part = k[..., :64]
    want = kernel(q, k, part.contiguous(), tables, lens)
    assert all(map(torch.equal, kernel(q, k, part, tables, lens), want))


@pytest.mark.parametrize("programs", [1, 12])
def test_scores_far_below_zero_are_weighed_like_others(programs):
    """All of them near -240: exp(-240) is no float32, the differences are."""
    case = Case((4, 2), 64, 16, [97, 5], torch.float32)
    case.q.fill_(1.0)
    for pool in (case.k, *case.dense[0]):
        pool.copy_(torch.where(pool.isnan(), pool, pool / 8 - 30.0))
    result = case.run(programs, LARGE_TILES, planned=True)
    assert (result[1] < -200).all()
    case.check(result, scores=250.0)


def test_a_block_may_span_just_less_than_32_bits():
    memory = torch.empty(16 << 27, dtype=torch.float16, device="meta")
    pool = memory.as_strided((1, 16, 2, 64), (0, (1 << 27) - 4, 64, 1))
    q = torch.empty(2, 4, 64, dtype=torch.float16, device="meta")
    tables = torch.empty(2, 1, dtype=torch.int32, device="meta")
    module._check_inputs(q, pool, pool, tables, tables[:, 0].contiguous(), None, None)


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
    no_lens = tables.sum(dim=1).int()
    for plan in (None, Plan(q, pool, pool, []), Plan(q, pool, pool, [], [])):
        out, lse = kernel(q, pool, pool, tables, no_lens, plan=plan)
        assert out.shape == (0, 4, 64) and lse.shape == (0, 4)
    lens = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    plan = Plan(q, pool, pool, [9, 5], [0, 0])
    assert kernel(q, pool, pool, tables.new_zeros(2, 2), lens, plan=plan)[0].shape == (0, 4, 64)
    no_blocks = torch.zeros(2, 0, dtype=torch.int32, device=DEVICE)
    q = q.new_ones(2, 4, 64)
    for plan in (None, Plan(q, pool, pool, [0, 0])):
        out, lse = kernel(q, pool, pool, no_blocks, lens, plan=plan)
        assert not out.any() and (lse == -math.inf).all()


def refused():
    def zeros(*shape, dtype=torch.float16, device=None):
        return torch.zeros(shape, dtype=dtype, device=device)

    def case(pool=None, **changes):
        given = {"q": zeros(2, 4, 64)} | dict.fromkeys(("k_pool", "v_pool"), zeros(3, 16, 2, 64))
        given |= {"block_tables": zeros(2, 2, dtype=torch.int32)}
        given |= {"seq_lens": zeros(2, dtype=torch.int32)}
        return given | ({} if pool is None else {"k_pool": pool, "v_pool": pool}) | changes

    for window in (0, -1, 1.5, True):
        yield case(window=window), "a window is a number of tokens, at least 1"
    for cap in (0.0, -1.0, math.inf, math.nan, "3"):
        yield case(soft_cap=cap), "a cap of scores is a number above 0"
    yield case(q=zeros(2, 4, 1, 64)), "q must be"
    yield case(k_pool=zeros(3, 16, 3, 64)), "need pools"
    yield case(k_pool=zeros(3, 16, 2, 32)), "need pools"
    yield case(zeros(3, 16, 3, 64)), "multiple"
    yield case(zeros(3, 16, 2, 1025), q=zeros(2, 4, 1025)), "need 1 to 1024"
    yield case(v_pool=zeros(3, 16, 2, 0)), "need 1 to 1024"
    yield case(q=zeros(2, 4, 64, dtype=torch.float32)), "q must have a dtype"
    double = {"dtype": torch.float64}
    yield case(zeros(3, 16, 2, 64, **double), q=zeros(2, 4, 64, **double)), "dtype"
    small = {"dtype": SMALL[0]}
    yield case(zeros(3, 16, 2, 64, **small), q=zeros(2, 4, 64, **small)), "dtype"
    yield case(v_pool=zeros(3, 16, 2, 64, **small)), "both pools the same"
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
    yield case(q=zeros(2, 4, 64, device="meta")), "on one device"
    yield case(workspace=Workspace("meta")), "the workspace is on meta"

    def plan(*query_lens, heads=4, kv_heads=2, window=None, device=None):
        q = zeros(sum(query_lens), heads, 64, device=device)
        pool = zeros(3, 16, kv_heads, 64, device=device)
        return Plan(q, pool, pool, [5] * len(query_lens), query_lens, window=window)

    another = "the plan is for another"
    yield case(plan=plan(1, 2)), another
    yield case(plan=plan(1, 1, heads=8)), another
    yield case(plan=plan(1, 1, heads=2, kv_heads=1)), another
    yield case(plan=plan(1, 1, window=5)), another
    yield case(plan=plan(1, 1, window=5), window=6), another
    yield case(plan=plan(1, 1), window=5), another
    yield case(plan=plan(1, 1, device="meta")), another
    yield case(plan=plan(1, 1, 0)), "B differs"


@pytest.mark.parametrize(("arguments", "message"), list(refused()))
def test_what_cannot_be_done_is_refused(arguments, message):
    with pytest.raises(ShapeError, match=message):
        kernel(**arguments)


def test_a_plan_of_what_cannot_be_is_refused():
    q, pool = torch.zeros(2, 4, 64), torch.zeros(3, 16, 2, 64)
    for lens, query_lens in (([5, 5], [2]), ([5], [1, 1]), ([5, 5], [3, -1])):
        with pytest.raises(ShapeError, match="need B lengths and B numbers of queries"):
            Plan(q, pool, pool, lens, query_lens)
    with pytest.raises(ShapeError, match="too many for one launch"):
        Plan(q, pool, pool, [1 << 40, 5])
    plan = Plan(q, pool, pool, [5, 5])
    plan.update([5, 5], [1, 1])
    with pytest.raises(ShapeError, match="for one query token a sequence"):
        plan.update([5], [2])


def costs(tiles, edges, tile):
    """Of each range: its tiles, and what the items that begin in it cost beside theirs."""
    begins = np.cumsum(tiles) - tiles
    parts = np.histogram(begins, [*edges[:-1], edges[-1] + 1])[0]
    return np.diff(edges) + parts * module.PART_SLOTS / tile


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=40)
    | st.builds(lambda n, count: [n] * count, st.integers(1, 300), st.integers(1, 150)),
    st.integers(1, 300),
    st.sampled_from([16, 32, 64]),
)
def test_ranges_are_equal_and_end_where_items_do(tiles, most, tile):
    tiles = np.array(tiles)
    edges = module.cut_points(tiles, most, tile)
    assert edges[0] == 0 and edges[-1] == tiles.sum() and (np.diff(edges) > 0).all()
    assert len(edges) - 1 <= most
    ranges = min(most, tiles.sum())
    begins = np.cumsum(tiles) - tiles
    of = np.searchsorted(begins, edges, side="right") - 1
    inside = edges - begins[of]  # how far in its item each range begins
    whole = ranges // len(tiles) * len(tiles)
    if len({*tiles}) == 1 and 4 * whole >= 3 * ranges:
        assert {*begins} <= {*edges}, "a range has two parts"
        assert np.diff(edges).max() <= -(-tiles.sum() // whole)
        return
    assert not ((inside == 1) | ((inside > 0) & (tiles[of] - inside == 1)))[:-1].any()
    # A cut is rounded, then moved a tile at most: back over what a part costs, or forth.
    shares, per_part = costs(tiles, edges, tile), module.PART_SLOTS / tile
    assert shares.max() <= shares.sum() / ranges + per_part + 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_plan_has_every_query_and_every_slot_once(data):
    """Read as the kernel reads it, from the numbers alone."""
    draw = data.draw
    lens = draw(st.lists(st.integers(0, 500), min_size=1, max_size=12))
    counts = [draw(st.integers(0, 70)) for _ in lens] if draw(st.booleans()) else [1] * len(lens)
    most, queries = draw(st.integers(1, 60)), draw(st.sampled_from([1, 4, 16]))
    tile, window = draw(st.sampled_from([16, 32])), draw(st.none() | st.integers(1, 600))
    least = draw(st.sampled_from([0, most]))
    ranges, numbers = module.cut_evenly(
        *(np.array(lens), np.array(counts), most, tile, queries, window, least)
    )
    assert numbers.dtype == np.int32 and least <= ranges <= most
    rows = numbers[: 16 * ranges].reshape(-1, 16).tolist()
    items = numbers[16 * ranges :].reshape(-1, 8).tolist()
    seen, places = {}, {}
    for this_range, (first, num_parts, begin, end, *of_first) in enumerate(rows):
        for nth in range(first, first + num_parts):
            assert nth > first or of_first[:8] == items[nth]
            start, tiles, first_tile, *_ = items[nth]
            part = range(max(begin - start, 0), min(end - start, tiles))
            assert part, "a range has a part with no tile"
            seen.setdefault(nth, []).extend(first_tile + t for t in part)
            places.setdefault(nth, []).append(this_range)
    tokens, before = [], np.cumsum(counts) - counts
    assert [*seen] == [*range(len(items) - 1)] or not sum(counts)
    for nth, tiles in seen.items():
        _, num_tiles, first_tile, seq, token, after, first_range, last_range = items[nth]
        assert tiles == [*range(first_tile, first_tile + num_tiles)]
        assert places[nth] == [*range(first_range, last_range + 1)]
        mine = range(token, token + min(after, queries))
        assert after == before[seq] + counts[seq] - token
        tokens += mine
        last = lens[seq] - after + len(mine) - 1  # the position of the last of them
        oldest = 0 if window is None else max(0, lens[seq] - after + 1 - window)
        assert first_tile == oldest // tile
        assert num_tiles == max(1, last // tile + 1 - first_tile)
    assert tokens == [*range(sum(counts))]


def test_a_tuning_is_checked():
    for values in ((8, 4, 2, 1), (24, 4, 2, 1), (16, 4, 0, 1)):
        with pytest.raises(ValueError, match="power of two"):
            Tuning(*values)
    for values in ((16, 3, 2, 1), (16, 16, 2, 1), (16, 4, 2, 0)):
        with pytest.raises(ValueError, match="1, 2, 4 or 8 warps"):
            Tuning(*values)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 64))
def test_programs_that_run_at_once_have_registers(num_warps, programs):
    """Each of 4 schedulers has 16,384, and takes every fourth warp."""
    registers = Tuning(16, num_warps, 2, programs).registers
    warps = math.ceil(num_warps * programs / 4)
    assert registers <= 255 and registers * 32 * warps <= 16384
    assert registers == 255 or (registers + 8) * 32 * warps > 16384


CARDS = st.builds(
    Card,
    st.floats(1e11, 1e13),
    st.integers(1, 200),
    st.sampled_from([1 << n for n in (20, 22, 26)]),
)


@settings(deadline=None)
@given(
    CARDS,
    st.sampled_from([64 << 10, 99 << 10, 163 << 10, 227 << 10]),
    st.builds(
        lambda kv, group, size, queries: Rows.of(kv * group, kv, size, queries),
        *(st.integers(1, 40), st.integers(1, 130), st.integers(1, 1024), st.integers(1, 500)),
    ),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 12),
    st.sampled_from([32 << n for n in range(9)]),
    st.sampled_from([32 << n for n in range(8)]),
)
def test_what_is_picked_fits_the_shared_memory(card, shared, rows, slots, seqs, slot_bytes, row):
    tuning = choose_tuning(card, shared, rows, slots, seqs, slot_bytes, row)
    each = max(1, tuning.num_stages - 1) * tuning.tile * slot_bytes
    each += module.SHARED_SPARE + 2 * rows.padded * row
    least = tuning.tile == 16 and tuning.programs == tuning.num_stages == 1
    assert tuning.programs * each <= shared or least
    assert tuning.registers >= 64


@given(
    *(st.integers(1, 40), st.integers(1, 200), st.integers(1, 1024), st.integers(1, 500)),
)
def test_a_programs_rows_hold_a_group_or_share_it(kv_heads, group, size, most):
    rows = Rows.of(kv_heads * group, kv_heads, size, most)
    assert rows.heads * rows.queries <= rows.padded <= 128
    assert rows.padded in (16, 32, 64, 128)
    # So many tokens or all that fit; a few more take no other kernel than so many do.
    assert rows.queries in (1, rows.padded // rows.heads) and (rows.queries == 1 or most > 1)
    if rows.heads < group:
        assert rows.queries == 1 and rows.num_heads * rows.heads >= kv_heads * group
    else:
        assert rows.num_heads == kv_heads


def test_a_card_takes_the_tunings_of_the_one_most_like_it():
    large, small = Card(5e12, 132, 60 << 20), Card(3e11, 40, 4 << 20)
    tunings = {large: (Tuning(16, 2, 3, 7),) * 4, small: (Tuning(16, 1, 2, 5),) * 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TUNINGS", tunings)
        for card in (large, small, Card(3e12, 100, 50 << 20), Card(6e11, 46, 4 << 20)):
            like = large if card.bandwidth > 1e12 else small
            got = choose_tuning(card, 227 << 10, Rows.of(4, 4, 64, 1), 1000, 10, 256, 128)
            assert got == tunings[like][0]
            assert card.distance(large) == pytest.approx(large.distance(card))
    for known in module.TUNINGS:
        assert known.distance(known) == 0


def test_what_there_is_to_read_chooses_the_tuning():
    card, found = next(iter(module.TUNINGS.items()))

    def chosen(heads, *lens):
        rows = Rows.of(heads, heads, 128, 1)
        return choose_tuning(card, 227 << 10, rows, sum(lens) * heads, len(lens), 512, 256)

    many, short, few, little = found
    assert chosen(40, *[1024] * 32) == chosen(20, 511, 513) == many
    assert chosen(40, *[256] * 32) == chosen(17, 511) == short
    assert chosen(8, *[1024] * 64) == few and chosen(8, 32768) == chosen(16, 9) == little


def test_of_a_gpus_shared_memory_the_drivers_kib_is_not_ours(monkeypatch):
    """An H200's numbers, as its properties have them."""
    told = SimpleNamespace(
        multi_processor_count=132,
        shared_memory_per_multiprocessor=228 << 10,
        memory_clock_rate=3_201_000,
        memory_bus_width=6144,
        L2_cache_size=60 << 20,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    uncached = module.device_limits.__wrapped__  # or these would be known of this machine's GPU
    card, shared = uncached(torch.device("cuda", 0))
    assert card == Card(pytest.approx(4.9e12, rel=0.01), 132, 60 << 20) and shared == 227 << 10


def test_the_compiler_keeps_all_that_the_loop_over_items_carries(run_script):
    """For a GPU it once did not, and a part behind a shorter sequence ended too early."""
    done = run_script("tests/core/carried.py", env={"TRITON_INTERPRET": None})
    assert done.returncode == 0, done.stderr
    cases = [line.split(" | ") for line in done.stdout.splitlines()]
    assert len(cases) == 5
    assert all(before == after and "item" in before for before, after in cases)


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

    @pytest.mark.parametrize("planned", [False, True])
    @pytest.mark.parametrize("heads", [(8, 8), (32, 8), (16, 1), (71, 1)])
    def test_lengths_up_to_128k(self, heads, planned):
        lens = [131072, 1, 40007, 17]
        width = 131072 // 16
        pool = torch.randn(width + 7, 16, heads[1], 128, dtype=torch.float16, device="cuda")
        tables = torch.stack([torch.randperm(width + 7)[:width] for _ in lens]).int().cuda()
        q = torch.randn(len(lens), heads[0], 128, dtype=torch.float16, device="cuda")
        plan = Plan(q, pool, pool, lens) if planned else None
        lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
        out, lse = kernel(q, pool, pool, tables, lens, plan=plan)
        for b, length in enumerate(lens.tolist()):
            kv = pool[tables[b].long()].flatten(0, 1)[:length].double()
            kv = kv.repeat_interleave(heads[0] // heads[1], dim=1)
            scores = torch.einsum("hd,thd->ht", q[b].double(), kv) / math.sqrt(128)
            want = torch.einsum("ht,thd->hd", scores.softmax(dim=1), kv)
            assert (out[b].double() - want).abs().max() <= 2e-3 * max(1.0, want.abs().max())
            torch.testing.assert_close(lse[b].double(), scores.logsumexp(dim=1), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("planned", [False, True])
    def test_a_graph_can_hold_it_and_nothing_is_gathered(self, planned):
        case = Case((8, 2), 128, 16, [5000, 33, 700], torch.float16)
        arguments, workspace = case.arguments(), Workspace("cuda")
        plan = Plan(*arguments[:3], case.lens) if planned else None
        options = {"workspace": workspace, "plan": plan}
        want = kernel(*arguments, **options)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kernel(*arguments, **options)
        assert torch.cuda.max_memory_allocated() - before < 1 << 20
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = kernel(*arguments, **options)
        for _ in range(3):
            got[0].fill_(math.nan)
            graph.replay()
            assert all(map(torch.equal, got, want))

    def test_a_graph_follows_its_plan_from_lengths_to_lengths(self):
        case = Case((8, 2), 128, 16, [2000, 33, 700], torch.float16)
        arguments, workspace = case.arguments(), Workspace("cuda")
        plan = Plan(*arguments[:3], [2000] * 3)
        kernel(*arguments, workspace=workspace, plan=plan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = kernel(*arguments, workspace=workspace, plan=plan)
        for lens in ([1, 0, 17], [2000, 1, 1], [300, 33, 700], case.lens):
            plan.update(lens)
            shorter = torch.tensor(lens, dtype=torch.int32, device="cuda")
            arguments[4].copy_(shorter)
            got[0].fill_(math.nan)
            graph.replay()
            want = paged_attention.paged_attention_kernel(*arguments)
            torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
        case.check(got)

    def test_whoever_arrives_last_thousands_of_times(self):
        """The merge in the kernel is a race by design: any order must give the same bits."""
        rng, workspace = random.Random(0), Workspace("cuda")
        cases = []
        for splits in (16, 33, 64):
            lens = [rng.randint(1, 16 * splits) for _ in range(8)] + [16 * splits]
            case = Case((8, 2), 64, 16, lens, torch.float16, seed=splits)
            for plan in (None, case.plan(2 * 8 * splits, SMALL_TILES)):
                # Where there is no plan, ranges of four tiles: the least there are.
                options = {"plan": plan, "tuning": SMALL_TILES}
                cases.append((case, options, kernel(*case.arguments(), **options)))
                case.check(cases[-1][2])
        for turn in range(3000):
            case, options, want = cases[turn % len(cases)]
            got = module.paged_attention_kernel(*case.arguments(), workspace=workspace, **options)
            assert all(map(torch.equal, got, want)), turn
        assert not workspace.arrived.any()

    def test_a_workspace_does_not_grow_under_a_graph(self):
        case = Case((8, 2), 64, 16, [5000, 33], torch.float16)
        small = Case((8, 2), 64, 16, [500], torch.float16)
        workspace = Workspace("cuda")
        kernel(*small.arguments(), workspace=workspace, tuning=SMALL_TILES)
        arguments = case.arguments()
        kernel(*arguments, tuning=SMALL_TILES)
        for one in (workspace, Workspace("cuda")):
            graph, options = torch.cuda.CUDAGraph(), {"workspace": one, "tuning": SMALL_TILES}
            with pytest.raises(ShapeError, match="cannot grow"), torch.cuda.graph(graph):
                arguments[0].clone()  # torch warns of a graph with nothing in it
                module.paged_attention_kernel(*arguments, **options)

    def test_agrees_with_the_gather_kernel_at_the_models_shapes(self):
        for heads, head_size in (((40, 40), 128), ((64, 8), 128), ((32, 8), 96), ((71, 1), 64)):
            case = Case(heads, head_size, 16, [129, 1024, 17, 301], torch.bfloat16)
            want = paged_attention.paged_attention_kernel(*case.arguments())
            for plan in (None, Plan(*case.arguments()[:3], case.lens)):
                got = kernel(*case.arguments(), plan=plan)
                torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-3)
                torch.testing.assert_close(got[1], want[1], rtol=0, atol=2e-5)
