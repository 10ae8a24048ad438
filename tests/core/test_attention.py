"""Regime item 8: attention.py against a float64 oracle, and what the paged kernels rely on."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import attention as module
from attention import ShapeError, attention, causal_mask, length_mask, merge_attention

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NEEDS_CUDA])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = [(1, 1), (4, 4), (16, 16), (4, 1), (16, 4), (16, 1)]  # (H, H_kv)
INF = math.inf

pytestmark = pytest.mark.usefixtures("few_bytes")


def random_qkv(shape_q, shape_k, dtype, device, seed):
    """q, k, v from a normal distribution, drawn on the CPU: the same on every device."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (shape_q, shape_k, shape_k)
    return [torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes]


def oracle(q, k, v, mask, soft_cap=None):
    """Dense attention in float64, one query token at a time, over its live slots only.

    Shapes as for `attention`, where V may have a width of its own; mask (B, T_q, T_k) or None;
    returns CPU tensors out and lse.
    """
    q, k, v = (x.detach().cpu().double() for x in (q, k, v))
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.full(q.shape[:3], -INF, dtype=torch.float64)
    mask = None if mask is None else mask.cpu()
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            slots = [j for j in range(k.shape[1]) if mask is None or mask[b, i, j]]
            if not slots:
                continue
            keys, values = (x[b, slots].repeat_interleave(group, dim=1) for x in (k, v))
            scores = (keys * q[b, i]).sum(dim=-1) / math.sqrt(q.shape[3])  # (slots, H)
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            lse[b, i] = scores.logsumexp(dim=0)
            weights = (scores - lse[b, i]).exp()
            out[b, i] = (weights[:, :, None] * values).sum(dim=0)
    return out, lse


def budget(q, k, v, mask, want):
    """The error allowed to each element of out: 4 times the largest that torch's own attention
    makes in float32, and one rounding to q's dtype. k and v without NaN; want: the oracle's.
    """
    group = q.shape[2] // k.shape[2]
    plain = [x.float().repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v)]
    mask = None if mask is None else mask[:, None]
    out = F.scaled_dot_product_attention(q.float().transpose(1, 2), *plain, attn_mask=mask)
    error = (out.transpose(1, 2).cpu().double() - want).abs()
    error = error.nan_to_num(0.0).max()  # torch gives NaN for a row without a live slot
    info = torch.finfo(q.dtype)
    return 4 * error + info.eps * want.abs() + info.smallest_normal * info.eps


def assert_close(result, q, k, v, mask, soft_cap=None):
    """result = (out, lse) is within the budget of the oracle; k and v without NaN."""
    out, lse = (x.cpu() for x in result)
    want, want_lse = oracle(q, k, v, mask, soft_cap)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    assert ((out.double() - want).abs() <= budget(q, k, v, mask, want)).all()
    empty = want_lse == -INF
    assert torch.equal(lse == -INF, empty) and not out[empty].any()
    # The scores are float32 sums of D products of about unit size, whatever the input dtype.
    torch.testing.assert_close(lse[~empty].double(), want_lse[~empty], rtol=0, atol=1e-5)


def poisoned(x, live, bad=math.nan):
    """x (B, T_k, H_kv, D) with `bad` in every slot where live (B, T_k) is False."""
    return x.masked_fill(~live[:, :, None, None], bad)


def refuses(error, call, cases):
    """Every case is refused with this error."""
    for case in cases:
        with pytest.raises(error):
            call(*case)
            pytest.fail(f"{case} was accepted")


@pytest.fixture(params=["loop", "batched"])
def path(request, monkeypatch):
    """Both ways of multiplying on a CPU."""
    limit = 0 if request.param == "loop" else 1 << 60
    monkeypatch.setattr(module, "LOOP_MIN_ELEMENTS", limit)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.usefixtures("path")
def test_decode_matches_the_oracle_and_never_reads_dead_slots(device, dtype, heads):
    lens = [1, 15, 16, 17, 31, 97, 0]
    q, k, v = random_qkv((7, 1, heads[0], 64), (7, 112, heads[1], 64), dtype, device, seed=1)
    mask = length_mask(torch.tensor(lens, device=device), 112)
    result = attention(q, k, v, mask)
    assert_close(result, q, k, v, mask)
    for bad in (math.nan, INF, -INF):
        dead = attention(q, poisoned(k, mask[:, 0], bad), poisoned(v, mask[:, 0], bad), mask)
        assert all(map(torch.equal, dead, result))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_queries", "context"), [(1, 1), (13, 13), (17, 17), (5, 18)])
@pytest.mark.usefixtures("path")
def test_causal_prefill_matches_the_oracle(device, dtype, num_queries, context):
    slots = context + 3
    q, k, v = random_qkv((2, num_queries, 4, 32), (2, slots, 2, 32), dtype, device, seed=2)
    mask = causal_mask(num_queries, context, slots, device=device).expand(2, -1, -1)
    live = torch.arange(slots, device=device).expand(2, -1) < context
    result = attention(q, poisoned(k, live), poisoned(v, live), mask)
    assert_close(result, q, k, v, mask)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_any_mask_with_holes_and_empty_rows(data):
    batch, num_queries, slots = (data.draw(st.integers(1, n)) for n in (3, 4, 9))
    heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    size = batch * num_queries * slots
    bits = data.draw(st.integers(0, 2**size - 1))
    mask = torch.tensor([bits >> i & 1 > 0 for i in range(size)]).view(batch, num_queries, slots)
    shapes = (batch, num_queries, heads * group, 8), (batch, slots, heads, 8)
    q, k, v = random_qkv(*shapes, torch.float32, "cpu", data.draw(st.integers(0, 99)))
    live = mask.any(dim=1)
    for limit in (0, 1 << 60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "LOOP_MIN_ELEMENTS", limit)
            result = attention(q, poisoned(k, live), poisoned(v, live), mask)
        assert_close(result, q, k, v, mask)


@pytest.mark.usefixtures("path")
def test_nan_in_the_k_of_a_slot_that_only_some_queries_may_read():
    q, k, v = random_qkv((1, 2, 2, 8), (1, 3, 2, 8), torch.float32, "cpu", seed=3)
    mask = torch.tensor([[[True, True, False], [True, False, False]]])
    want = attention(q, k, v, mask)
    k[0, 1] = math.nan  # live for query 0, masked for query 1
    out, lse = attention(q, k, v, mask)
    assert torch.equal(out[:, 1], want[0][:, 1]) and torch.equal(lse[:, 1], want[1][:, 1])
    assert out[:, 0].isnan().all(), "NaN in a live slot must not be hidden"


@pytest.mark.usefixtures("path")
def test_mask_broadcasts_and_none_means_everywhere():
    q, k, v = random_qkv((3, 2, 4, 16), (3, 5, 2, 16), torch.float32, "cpu", seed=4)
    whole = attention(q, k, v)
    shapes = [(), (5,), (1, 5), (2, 1), (2, 5), (3, 1, 1), (1, 2, 1), (3, 2, 5)]
    for shape in shapes:
        result = attention(q, k, v, torch.ones(shape, dtype=torch.bool))
        assert all(map(torch.equal, result, whole)), shape
    column = torch.tensor([True, False, True, True, False])
    assert_close(attention(q, k, v, column), q, k, v, column.expand(3, 2, 5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("path")
def test_same_inputs_same_bits_and_inputs_unchanged(device, dtype):
    q, k, v = random_qkv((3, 1, 8, 80), (3, 40, 2, 80), dtype, device, seed=5)
    mask = length_mask(torch.tensor([40, 7, 0], device=device), 40)
    before = [x.clone() for x in (q, k, v, mask)]
    for threads in (2, 1):
        torch.set_num_threads(threads)
        first = attention(q, k, v, mask)
        assert all(map(torch.equal, first, attention(q, k, v, mask)))
    assert all(map(torch.equal, (q, k, v, mask), before))


@pytest.mark.usefixtures("path")
def test_strided_inputs_give_the_values_of_contiguous_ones():
    q, k, v = random_qkv((2, 4, 3, 16), (2, 4, 9, 16), torch.float32, "cpu", seed=6)
    views = q.transpose(1, 2), k.transpose(1, 2)[..., :2, :], v.transpose(1, 2)[..., 2:, :]
    assert_close(attention(*views), *views, None)


def test_scale_replaces_the_default_and_no_gradient_is_recorded():
    q, k, v = random_qkv((1, 1, 2, 16), (1, 5, 2, 16), torch.float64, "cpu", seed=7)
    torch.testing.assert_close(attention(q * 3, k, v), attention(q, k, v, scale=0.75))
    assert not attention(q.requires_grad_(), k, v)[0].requires_grad, "inference only"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.usefixtures("path")
def test_a_cap_of_the_scores_matches_the_oracle(device, dtype, heads):
    q, k, v = random_qkv((3, 4, heads[0], 16), (3, 9, heads[1], 16), dtype, device, seed=4)
    mask = causal_mask(4, 9, device=device).expand(3, -1, -1)
    result = attention(q, k, v, mask, soft_cap=0.7)  # most scores are above it
    assert_close(result, q, k, v, mask, soft_cap=0.7)
    assert not torch.equal(result[0], attention(q, k, v, mask)[0])
    nothing = torch.zeros_like(mask)
    assert (attention(q, k, v, nothing, soft_cap=0.7)[1] == -INF).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 5, 16, 200])
@pytest.mark.usefixtures("path")
def test_outside_of_a_window_nothing_is_read(device, window):
    lens = [1, 15, 16, 97]
    q, k, v = random_qkv((4, 1, 4, 64), (4, 112, 2, 64), torch.float32, device, seed=6)
    mask = length_mask(torch.tensor(lens, device=device), 112, window)
    want = [[max(0, n - window) <= j < n for j in range(112)] for n in lens]
    assert mask[:, 0].tolist() == want
    result = attention(q, k, v, mask)
    assert_close(result, q, k, v, mask)
    for bad in (math.nan, INF, -INF):
        dead = attention(q, poisoned(k, mask[:, 0], bad), poisoned(v, mask[:, 0], bad), mask)
        assert all(map(torch.equal, dead, result))


def test_float64_is_computed_in_float64():
    q, k, v = random_qkv((2, 3, 4, 16), (2, 7, 2, 16), torch.float64, "cpu", seed=8)
    result = attention(q, k, v)
    assert result[0].dtype == result[1].dtype == torch.float64
    torch.testing.assert_close(result, oracle(q, k, v, None), rtol=1e-13, atol=1e-13)


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv((1, 1, 1, 64), (1, 9, 1, 64), torch.float32, "cpu", seed=9)
    out, lse = attention(q * 1000, k, v)
    assert lse.isfinite().all() and lse.abs().max() > 200  # exp(200) is no float32
    torch.testing.assert_close(out.double(), oracle(q * 1000, k, v, None)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_merging_any_split_equals_the_whole(device, dtype, seed):
    slots = 53
    q, k, v = random_qkv((2, 3, 8, 64), (2, slots, 4, 64), dtype, device, seed)
    part_of = torch.randint(5, (slots,), generator=torch.Generator().manual_seed(seed))
    parts = []
    for part in range(6):  # nothing is ever in part 5
        index = (part_of == part).nonzero().flatten().to(device)
        parts.append(attention(q, k[:, index], v[:, index]))
    outs, lses = map(torch.stack, zip(*parts))
    assert lses[5].eq(-INF).all()
    outs[5] = math.nan  # some kernels leave the output of an empty part undefined
    merged = merge_attention(outs, lses)
    want = oracle(q, k, v, None)[0]
    # Every part's output was rounded to dtype before it was merged.
    allowed = budget(q, k, v, None, want) + torch.finfo(dtype).eps * outs[:5].abs().max().item()
    assert ((merged[0].cpu().double() - want).abs() <= allowed).all()
    torch.testing.assert_close(merged[1], attention(q, k, v)[1], rtol=0, atol=1e-5)
    as_lists = merge_attention(list(outs), list(lses))
    assert all(map(torch.equal, merged, as_lists))


def test_merging_nothing_live_gives_zero_and_minus_infinity():
    out, lse = merge_attention(torch.full((2, 3, 4), math.nan), torch.full((2, 3), -INF))
    assert not out.any() and lse.eq(-INF).all()


def test_empty_batches_and_contexts():
    q = torch.randn(2, 3, 4, 8)
    out, lse = attention(q, torch.empty(2, 0, 2, 8), torch.empty(2, 0, 2, 8))
    assert not out.any() and out.shape == q.shape
    assert lse.eq(-INF).all() and lse.shape == (2, 3, 4)
    out, lse = attention(q[:0], torch.empty(0, 5, 2, 8), torch.empty(0, 5, 2, 8))
    assert out.shape == (0, 3, 4, 8) and lse.shape == (0, 3, 4)


def test_masks_by_hand():
    assert length_mask(torch.tensor([0, 2]), 3).int().tolist() == [[[0, 0, 0]], [[1, 1, 0]]]
    assert causal_mask(2, 3).int().tolist() == [[[1, 1, 0], [1, 1, 1]]]
    assert causal_mask(2, 3, 4).int().tolist() == [[[1, 1, 0, 0], [1, 1, 1, 0]]]
    ragged = causal_mask(2, torch.tensor([1, 3]), 3).int().tolist()
    assert ragged == [[[0, 0, 0], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]]
    assert causal_mask(3, 4, window=2).int().tolist() == [
        [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    ]
    ragged = causal_mask(2, torch.tensor([1, 3]), 3, window=1).int().tolist()
    assert ragged == [[[0, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 0, 1]]]
    lens = torch.tensor([1])
    refuses(ShapeError, length_mask, [(lens, 2, window) for window in (0, -1, 1.5, True)])
    refuses(ShapeError, causal_mask, [(1, 2, 2, None, 0)])
    bad = [lens[None], lens.float(), lens > 0, [1]]
    refuses(ShapeError, length_mask, [(one, 2) for one in bad])
    refuses(ShapeError, causal_mask, [(2, one, 2) for one in bad] + [(2, lens)])


def test_inputs_that_do_not_fit_are_refused():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8)
    ones = torch.ones(2, 3, 5, dtype=torch.bool)
    refused = [
        (q[0], k, k, None),
        (q, k, k[:, :4], None),
        (q[:1], k, k, None),
        (q[..., :4], k, k, None),
        (q[:, :, :3], k, k, None),
        (q, k[:, :, :0], k[:, :, :0], None),
        (q.half(), k, k, None),
        (q, k, k.half(), None),
        (q.int(), k.int(), k.int(), None),
        (q.to("meta"), k, k, None),
        (q, k, k, ones.to("meta")),
        (q, k, k, ones.float()),
        (q, k, k, ones[:, :2]),
        (q, k, k, ones[..., :4]),
        (q, k, k, ones[None]),
        (q.tolist(), k, k, None),
        (q, k.tolist(), k, None),
        (q, k, k.tolist(), None),
        (q, k, k, ones.tolist()),
        *([x.to(torch.float8_e5m2) for x in (q, k, k)],),
    ]
    refuses(ShapeError, attention, refused)
    for cap in (0.0, -1.0, INF, math.nan, "3"):
        with pytest.raises(ShapeError, match="a cap of scores is a number above 0"):
            attention(q, k, k, soft_cap=cap)
    shapes = [((2, 3, 4), (2, 4)), ((2, 3, 4), (3, 3)), ((0, 3, 4), (0, 3)), ((4,), ())]
    refuses(ShapeError, merge_attention, [map(torch.zeros, pair) for pair in shapes])
    out, lse = torch.zeros(3, 4), torch.zeros(3)
    parts = [([], []), ([out], []), ([out, out[:2]], [lse, lse]), ([out, out], [lse, lse.double()])]
    refuses(ShapeError, merge_attention, [*parts, (out.tolist(), lse), ([out], lse.tolist())])
