"""The attention of a model's layers over blocks in place, by Triton's kernel.

Reproduces: sections 4.1 and 5 on a real model. All tokens of a forward attend over their sequences'
blocks where they lie: a generated one, those of a prompt, and those behind a prefix or a chunk that
came before. How the work is cut is planned once a forward, for all layers.

    attend = InPlace(device)                # in block_cache.py, where triton runs
    out = attend(step, q, k, v, keys, values, scale, window=window)

Shapes: T tokens of a forward, H heads, D head size; pools (N, S, H_kv, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from paged_attention import upload

if TYPE_CHECKING:
    from vllm_sim.engine.block_cache import Step


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of a forward that attend in one launch: the newest of each of B sequences.

    Tables and lengths are for the kernel. The plan is cut by numbers: `seq_lens`, which are `lens`,
    and `query_lens`, how many tokens of each sequence there are (None: one).
    """

    rows: slice | torch.Tensor  # which of the forward's tokens
    seq_lens: list[int] | tuple[int, ...]
    query_lens: list[int] | None
    tables: torch.Tensor  # (B, max_blocks) int32
    lens: torch.Tensor  # (B,) integers


class InPlace:
    """The attention of a BlockCache: in each layer a launch for decodes and one for prompts."""

    def __init__(self, device: torch.device) -> None:
        import paged_attention_triton as kernels  # triton may be missing

        self._kernels, self._workspace = kernels, kernels.Workspace(device)
        self._step: Step | None = None
        self._batches: tuple[Batch, ...] = ()

    def __call__(
        self, step, q, k, v, keys, values, scale, *, window=None, soft_cap=None
    ) -> torch.Tensor:
        """Attention of all tokens, q (T, H, D), over one layer's pools; zeros for padding.

        Their own k and v are in the pools already.
        """
        if step is not self._step:
            self._step, self._batches = step, step.batches or batches_of(step)
        options = {"scale": scale, "window": window, "soft_cap": soft_cap}
        options["workspace"] = self._workspace
        out = None
        for nth, batch in enumerate(self._batches):
            part = q[batch.rows], keys, values
            key = nth, window, q.shape[1]
            if key not in step.plans:  # the first layer with this window makes it for all
                lengths = batch.seq_lens, batch.query_lens
                step.plans[key] = self._kernels.Plan(*part, *lengths, window=window)
            options["plan"] = step.plans[key]
            inputs = *part, batch.tables, batch.lens
            found = self._kernels.paged_attention_kernel(*inputs, **options)[0]
            if batch.rows == slice(0, len(q)):
                return found
            out = torch.zeros_like(q) if out is None else out
            out[batch.rows] = found
        return torch.zeros_like(q) if out is None else out


def batches_of(step: Step) -> tuple[Batch, ...]:
    """A forward's decodes, and its prompts."""
    parts, device, count = step.segments, step.lens.device, step.num_decodes
    found = []
    if count:
        found.append(Batch(slice(0, count), step.seq_lens, None, step.tables, step.lens))
    if parts:
        rows = torch.cat([torch.arange(part.start, part.end) for part in parts])
        together = slice(parts[0].start, parts[-1].end)  # without padding between them
        whole = rows.equal(torch.arange(together.start, together.stop))
        width = max(part.table.shape[1] for part in parts)
        tables = [pad(part.table, (0, width - part.table.shape[1])) for part in parts]
        lens = [part.num_tokens for part in parts]
        counts = [part.end - part.start for part in parts]
        rows = together if whole else rows.to(device)
        found.append(Batch(rows, lens, counts, torch.cat(tables), upload(lens, device)))
    return tuple(found)
