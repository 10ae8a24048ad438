"""The attention of a model's layers over blocks in place, by Triton's kernel.

Reproduces: sections 4.1 and 5 on a real model. All tokens of a forward attend over their sequences'
blocks where they lie: a generated one, those of a prompt, and those behind a prefix or a chunk that
came before. How the work is cut is planned once a forward, for all layers.

    attend = InPlace(device)                # in block_cache.py, where triton runs
    out = attend(step, q, k, v, keys, values, scale, window=window)

Shapes: T tokens of a forward, H heads, D head size; pools (N, S, H_kv, D).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from paged_attention_triton import Plan
    from vllm_sim.engine.block_cache import Step


class InPlace:
    """The attention of a BlockCache: in each layer a launch for decodes and one for prompts."""

    def __init__(self, device: torch.device) -> None:
        import paged_attention_triton as kernels  # triton may be missing

        self._kernels, self._workspace = kernels, kernels.Workspace(device)
        self._step: Step | None = None
        self._plans: dict[tuple[bool, int | None], Plan] = {}

    def __call__(
        self, step, q, k, v, keys, values, scale, *, window=None, soft_cap=None
    ) -> torch.Tensor:
        """Attention of all tokens, q (T, H, D), over one layer's pools; zeros for padding.

        Their own k and v are in the pools already.
        """
        if step is not self._step:
            self._begin(step)
        options = {"scale": scale, "window": window, "soft_cap": soft_cap}
        options["workspace"] = self._workspace
        attend = self._kernels.paged_attention_kernel
        count, out = step.num_decodes, torch.zeros_like(q)
        if count:
            plan = self._plan(q[:count], keys, values, step.seq_lens, None, window)
            inputs = q[:count], keys, values, step.tables, step.lens
            out[:count] = attend(*inputs, plan=plan, **options)[0]
        if step.segments:
            queries = q[self._rows]
            plan = self._plan(queries, keys, values, self._lens, self._counts, window)
            inputs = queries, keys, values, self._tables, self._device_lens
            out[self._rows] = attend(*inputs, plan=plan, **options)[0]
        return out

    def _begin(self, step: Step) -> None:
        """Another forward: the inputs of its prompts, and no plan yet."""
        self._step, self._plans = step, {}
        parts, device = step.segments, step.lens.device
        if parts:
            rows = torch.cat([torch.arange(part.start, part.end) for part in parts])
            self._rows = rows.to(device)  # of the prompts' tokens
            width = max(part.table.shape[1] for part in parts)
            tables = [pad(part.table, (0, width - part.table.shape[1])) for part in parts]
            self._tables, self._lens = torch.cat(tables), [part.num_tokens for part in parts]
            self._counts = [part.end - part.start for part in parts]
            self._device_lens = torch.tensor(self._lens, dtype=torch.int32, device=device)

    def _plan(self, q, keys, values, lens, counts, window) -> Plan:
        """How this batch is cut: made by the first layer with this window, for all of them."""
        key = counts is None, window
        if key not in self._plans:
            self._plans[key] = self._kernels.Plan(q, keys, values, lens, counts, window=window)
        return self._plans[key]
