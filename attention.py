"""Scaled dot-product attention over contiguous K and V, and the merging of partial results.

What it is: the attention of section 2.1 of the paper (Eq. 3), which PagedAttention (section 4.1,
Eq. 4) must reproduce wherever the blocks of a sequence lie. The paged kernel gathers blocks and
then does exactly this; prefill uses it directly, as in the paper (section 4.3).

How to use it:
    out, lse = attention(q, k, v, causal_mask(q.shape[1], k.shape[1], device=q.device))
    out, lse = attention(q, k, v, length_mask(seq_lens, k.shape[1]))      # decode
    out, lse = merge_attention([out_a, out_b], [lse_a, lse_b])            # keys split in two

Shapes: B sequences, T_q queries, T_k key slots, H query heads, H_kv K/V heads, D head size,
G = H / H_kv query heads per K/V head. Query head h reads K/V head h // G.

For inference only: nothing here records gradients. The whole (B, H, T_q, T_k) score matrix is
held, so a long prefill needs 4 * H * T_q * T_k bytes beside its K and V.
"""

import math
from numbers import Integral

import torch

# Below this many K elements per sequence, one batched product that copies K beats a Python
# loop of products that do not (measured on two CPU cores).
LOOP_MIN_ELEMENTS = 65536
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class ShapeError(ValueError):
    """Tensors whose shapes, types or devices do not fit together; raised before any work."""


def check_shape(condition, message):
    """Raise ShapeError(message) unless condition holds."""
    if not condition:
        raise ShapeError(message)


def check_tensors(**named):
    """Raise ShapeError unless all are tensors."""
    for name, x in named.items():
        check_shape(isinstance(x, torch.Tensor), f"{name} must be a tensor, not {type(x).__name__}")


def check_lengths(seq_lens):
    """Raise ShapeError unless these are (B,) integers."""
    check_tensors(seq_lens=seq_lens)
    check_shape(
        seq_lens.dim() == 1 and seq_lens.dtype in INTEGERS,
        f"seq_lens must be (B,) integers, not {tuple(seq_lens.shape)} {seq_lens.dtype}",
    )


@torch.no_grad()
def attention(q, k, v, mask=None, scale=None, *, soft_cap=None):
    """Softmax attention, accumulated in float32 (float64 for float64 inputs).

    q: (B, T_q, H, D); k, v: (B, T_k, H_kv, D), H a multiple of H_kv; all of one floating dtype
    on one device. mask: bool, broadcastable to (B, T_q, T_k), True where a query may attend;
    None: everywhere. scale: multiplies the scores, 1 / sqrt(D) if None. soft_cap: keeps the
    scaled scores between -soft_cap and soft_cap, by soft_cap * tanh(score / soft_cap) (Gemma 2).

    Returns out: (B, T_q, H, D) in q's dtype, and lse: (B, T_q, H), the natural logarithm of
    the sum of the exponentials of a query's scaled scores, in the dtype of the accumulation.
    A query that may attend to nothing gets out = 0 and lse = -inf.

    A key slot that no query of its sequence may attend to may hold anything, NaN and infinity
    included, and so may the K of any masked slot. The V of a slot that some queries attend to
    and others do not (a causal mask) must be finite. Equal inputs give equal bits.
    Raises ShapeError.
    """
    mask = _check_inputs(q, k, v, mask)
    check_shape(
        soft_cap is None or (isinstance(soft_cap, int | float) and 0 < soft_cap < math.inf),
        f"a cap of scores is a number above 0, not {soft_cap}",
    )
    batch, num_queries, num_heads, head_size = q.shape
    num_slots, num_kv_heads = k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0 or num_slots == 0:
        lse = q.new_full((batch, num_queries, num_heads), -torch.inf, dtype=dtype)
        return torch.zeros_like(q), lse

    # The query heads that share a K/V head become rows of one product; expanding K and V to
    # H heads would copy them G times. Scaling q, not the scores, touches fewer elements.
    group = num_heads // num_kv_heads
    rows = q.to(dtype) * (head_size**-0.5 if scale is None else scale)
    rows = rows.unflatten(2, (num_kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    # rows: (B, H_kv, G * T_q, D)

    scores = _scores(rows, k).unflatten(2, (group, num_queries))  # (B, H_kv, G, T_q, T_k)
    if soft_cap is not None:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)
    if mask is not None:
        # Replaced, not added to: NaN + -inf would stay NaN.
        scores.masked_fill_(~mask[:, None, None], -torch.inf)
    top = scores.amax(dim=-1, keepdim=True)
    # A row of -inf would give -inf - -inf = NaN; against 0 it gives exp(-inf) = 0.
    top.masked_fill_(top == -torch.inf, 0.0)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    lse = total.log() + top  # log(0) = -inf is the right answer for an empty row

    # Divided after the product with V, which is the smaller tensor (D < T_k in most calls).
    live = None if mask is None else mask.any(dim=1)  # (B or 1, T_k)
    out = _weighted_values(weights.flatten(2, 3), v, live).unflatten(2, (group, num_queries))
    out = out / total.masked_fill_(total == 0, 1.0)
    # (B, H_kv, G, T_q, ...) -> (B, T_q, H, ...)
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
    return out, lse.squeeze(-1).permute(0, 3, 1, 2).flatten(2, 3)


@torch.no_grad()
def merge_attention(outs, lses):
    """Merge attention over disjoint parts of the keys into attention over all of them.

    outs: (P, ..., H, D), or P tensors (..., H, D); lses: (P, ..., H), or P tensors (..., H):
    what `attention` gives for each of P parts, same queries. Exact up to rounding, in float32
    (float64 for float64 inputs), whatever the split. A part with lse = -inf counts for
    nothing, whatever its out holds.
    Returns out (..., H, D) in the dtype of outs, and lse (..., H). Raises ShapeError.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    check_shape(
        outs.dim() >= 2 and outs.shape[:-1] == lses.shape and outs.shape[0] > 0,
        f"outs (P, ..., H, D) and lses (P, ..., H) disagree, or P = 0: "
        f"{tuple(outs.shape)} and {tuple(lses.shape)}",
    )
    dtype = torch.promote_types(outs.dtype, torch.promote_types(lses.dtype, torch.float32))
    lses = lses.to(dtype)
    top = lses.amax(dim=0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (lses - top).exp()  # (P, ..., H)
    total = weights.sum(dim=0)
    parts = outs.to(dtype).masked_fill((lses == -torch.inf).unsqueeze(-1), 0.0)
    out = (parts * weights.unsqueeze(-1)).sum(dim=0)
    out = out / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return out.to(outs.dtype), total.log() + top


def length_mask(seq_lens, num_slots, window=None):
    """The mask of decode: slot j of sequence b is live if j < seq_lens[b].

    seq_lens: (B,) integers, in tokens. window: only the newest so many of them are (Mistral); None:
    all. Returns (B, 1, num_slots) bool on seq_lens' device. Raises ShapeError.
    """
    check_lengths(seq_lens)
    ends = seq_lens[:, None, None]
    return _in_window(torch.arange(num_slots, device=seq_lens.device), ends, window)


def causal_mask(num_queries, seq_lens, num_slots=None, device=None, window=None):
    """The mask of prefill: the queries are the last num_queries tokens of their context.

    seq_lens: the length of the context in tokens, this prefill's tokens included: one int for
    all sequences, or a (B,) tensor, with num_slots key slots (default: seq_lens, if an int).
    Query i of sequence b stands at position seq_lens[b] - num_queries + i and attends to that
    position and all before it. A shorter context than num_queries leaves its first queries
    with nothing to attend to. window: it attends to the newest so many of these; None: to all.
    Returns (B or 1, num_queries, num_slots) bool on seq_lens' device, or `device` for an int.
    Raises ShapeError.
    """
    if isinstance(seq_lens, Integral):
        num_slots = seq_lens if num_slots is None else num_slots
        seq_lens = torch.tensor([int(seq_lens)], device=device)
    check_lengths(seq_lens)
    check_shape(num_slots is not None, "seq_lens as a tensor needs num_slots as well")
    steps = torch.arange(1 - num_queries, 1, device=seq_lens.device)  # 0 for the newest token
    ends = seq_lens[:, None].long() + steps  # (B, T_q): behind the last position that each may see
    return _in_window(torch.arange(num_slots, device=ends.device), ends[:, :, None], window)


def _in_window(positions, ends, window):
    """Which positions (n,) are before `ends` (..., 1), and among the last `window` that are."""
    check_shape(
        window is None
        or (isinstance(window, Integral) and not isinstance(window, bool) and window > 0),
        f"a window is a number of tokens, at least 1, not {window}",
    )
    before = positions < ends
    return before if window is None else before & (positions >= ends - window)


def _stacked(name, parts):
    """P tensors as one (P, ...); ShapeError for none at all, or where they do not fit together."""
    if isinstance(parts, torch.Tensor):
        return parts
    parts = tuple(parts)
    check_shape(parts, f"{name} is empty: there is nothing to merge")
    for part in parts:
        check_tensors(**{f"each of {name}": part})
    kinds = [(tuple(part.shape), part.dtype, part.device) for part in parts]
    check_shape(len({*kinds}) == 1, f"{name} differ in shape, dtype or device: {kinds}")
    return torch.stack(parts)


def _scores(rows, k):
    """rows (B, H_kv, R, D) times k (B, T_k, H_kv, D), transposed: (B, H_kv, R, T_k)."""
    if not _loop_over_sequences(k):
        return rows @ _by_head(k, rows.dtype).transpose(2, 3)
    scores = rows.new_empty(*rows.shape[:3], k.shape[1])
    for row, key, score in zip(rows, k, scores):
        torch.bmm(row, key.to(rows.dtype).permute(1, 2, 0), out=score)
    return scores


def _weighted_values(weights, v, live):
    """weights (B, H_kv, R, T_k) times v (B, T_k, H_kv, D): (B, H_kv, R, D).

    live: (B or 1, T_k) bool, False where v must not be read, or None. Their weight 0 is not
    enough: 0 x NaN is NaN. So such slots are left out, or set to zero in a copy.
    """
    batch, num_slots = v.shape[:2]
    live = None if live is None else live.expand(batch, num_slots)
    if not _loop_over_sequences(v):
        values = _by_head(v, weights.dtype, copy=live is not None)
        if live is not None:
            values.masked_fill_(~live[:, None, :, None], 0.0)
        return weights @ values
    ends = counts = [num_slots] * batch
    if live is not None:
        ends = (live * torch.arange(1, num_slots + 1)).amax(dim=1).tolist()
        counts = live.sum(dim=1).tolist()
    out = weights.new_empty(*weights.shape[:3], v.shape[3])
    for b, end in enumerate(ends):
        value = v[b, :end].to(weights.dtype)  # the padding behind the last live slot is left out
        if counts[b] < end:
            value = value.masked_fill(~live[b, :end, None, None], 0.0)
        torch.bmm(weights[b, :, :, :end], value.permute(1, 0, 2), out=out[b])
    return out


def _loop_over_sequences(x):
    """Whether to multiply sequence by sequence.

    The heads of one sequence are a strided batch, which bmm reads in place; heads and
    sequences together are not one, so that a product over the whole batch first copies x. On
    a CPU the copy costs many times the product. On a GPU the launches would cost more.
    """
    return x.device.type == "cpu" and x[0].numel() >= LOOP_MIN_ELEMENTS


def _by_head(x, dtype, copy=False):
    """x (B, T_k, H_kv, D) as (B, H_kv, T_k, D) in dtype, with one copy at most."""
    x = x.permute(0, 2, 1, 3)
    return x.to(dtype, copy=copy, memory_format=torch.contiguous_format)


def _check_inputs(q, k, v, mask):
    """Raise ShapeError, or return mask as (B or 1, T_q or 1, T_k or 1), None if None."""
    check_tensors(q=q, k=k, v=v, **({} if mask is None else {"mask": mask}))
    check_shape(
        q.dim() == 4 and k.dim() == 4 and k.shape == v.shape,
        f"need q (B, T_q, H, D) and k, v (B, T_k, H_kv, D), got {tuple(q.shape)}, "
        f"{tuple(k.shape)}, {tuple(v.shape)}",
    )
    check_shape(
        q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3],
        f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in B or D",
    )
    check_shape(
        k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0,
        f"{q.shape[2]} query heads are no multiple of {k.shape[2]} K/V heads",
    )
    check_shape(
        q.is_floating_point() and q.itemsize > 1 and q.dtype == k.dtype == v.dtype,
        f"q, k, v must have one floating dtype above 8 bits, not {q.dtype}, {k.dtype}, {v.dtype}",
    )
    check_shape(
        q.device == k.device == v.device and (mask is None or mask.device == q.device),
        "q, k, v and mask must be on one device",
    )
    if mask is None:
        return None
    check_shape(mask.dtype == torch.bool, f"mask must be bool, not {mask.dtype}")
    full = (q.shape[0], q.shape[1], k.shape[1])
    mask = mask[(None,) * max(0, 3 - mask.dim())]
    check_shape(
        mask.dim() == 3 and all(have in (1, want) for have, want in zip(mask.shape, full)),
        f"mask {tuple(mask.shape)} does not broadcast to (B, T_q, T_k) = {full}",
    )
    return mask
