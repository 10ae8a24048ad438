"""The shapes of bench_attention.py, their tensors, and everyone who attends over them.

Serves section 4.1 and Fig. 18a. D = 128, fp16, blocks of 16 slots at random places of a pool half
as large again. bench_attention.py times them, profile_attention.py reads the counters.

    data = Data(SHAPES["OPT-13B 32 x 1024"])
    for key, run in contenders("OPT-13B 32 x 1024", data):
        out = run()                                             # (B, H, D)
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import paged_attention
from paged_attention import gather_blocks, pad_block_tables

D, S = 128, 16
Run = Callable[[], torch.Tensor]  # returns out (B, H, D)


@dataclass(frozen=True, slots=True)
class Shape:
    """H query heads over H_kv K/V heads, for B sequences of these lengths."""

    heads: int
    kv_heads: int
    lens: tuple[int, ...]

    @property
    def ragged(self) -> bool:
        return len(set(self.lens)) > 1

    @property
    def live_bytes(self) -> int:
        return sum(self.lens) * self.kv_heads * D * 2 * 2  # K and V in fp16


def ragged(batch: int) -> tuple[int, ...]:
    rng = random.Random(0)
    return tuple(rng.randint(128, 2048) for _ in range(batch))


SHAPES = {
    "OPT-13B 32 x 1024": Shape(40, 40, (1024,) * 32),
    "OPT-13B 64 x 128..2048": Shape(40, 40, ragged(64)),
    "OPT-13B 8 x 2000": Shape(40, 40, (2000,) * 8),
    "OPT-13B 32 x 256": Shape(40, 40, (256,) * 32),
    "Llama-3-8B 64 x 1024": Shape(32, 8, (1024,) * 64),
    "Llama-3-8B 128 x 128..2048": Shape(32, 8, ragged(128)),
    "Llama-3-70B 64 x 4096": Shape(64, 8, (4096,) * 64),
    "32/8 heads 1 x 32768": Shape(32, 8, (32768,)),
}
CAT_SHAPE = "OPT-13B 32 x 1024"


class Data:
    """One shape's tensors: q (B, H, D), two pools (N, S, H_kv, D), tables, lengths."""

    def __init__(self, shape: Shape, device: str = "cuda") -> None:
        torch.manual_seed(0)
        self.shape, batch, self.device = shape, len(shape.lens), device
        counts = [-(-length // S) for length in shape.lens]
        blocks = 3 * sum(counts) // 2
        pool = (blocks, S, shape.kv_heads, D)
        self.q = torch.randn(batch, shape.heads, D, dtype=torch.float16, device=device)
        self.k = torch.randn(pool, dtype=torch.float16, device=device)
        self.v = torch.randn(pool, dtype=torch.float16, device=device)
        order = iter(torch.randperm(blocks).tolist())
        self.tables = [[next(order) for _ in range(count)] for count in counts]
        self.padded = pad_block_tables(self.tables, device=device)
        self.lens = torch.tensor(shape.lens, dtype=torch.int32, device=device)
        self.flat = torch.tensor([*chain(*self.tables)], dtype=torch.int32, device=device)
        ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0) * S
        self.starts = ends.to(device, torch.int32)  # of each sequence's slots, packed: (B + 1,)
        self.one_each = torch.arange(batch + 1, dtype=torch.int32, device=device)

    def copied(self) -> list[torch.Tensor]:
        """K and V (B, H_kv, T, D) of equal lengths, out of the blocks."""
        length = self.shape.lens[0]
        parts = (gather_blocks(pool, self.padded)[:, :length] for pool in (self.k, self.v))
        return [part.transpose(1, 2) for part in parts]

    def sdpa(self, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
        """k, v: (B, H_kv, T, D), any strides."""
        gqa = self.shape.heads != self.shape.kv_heads
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(self.q[:, :, None], k, v, enable_gqa=gqa)[:, :, 0]

    def gathered(self, backend: SDPBackend) -> torch.Tensor:
        """Equal lengths: the blocks copied, then torch's kernel."""
        return self.sdpa(*self.copied(), backend)

    def packed(self) -> torch.Tensor:
        """Different lengths: live blocks copied behind one another, then torch's varlen kernel."""
        rows = (pool.flatten(1).index_select(0, self.flat) for pool in (self.k, self.v))
        k, v = (row.view(-1, self.shape.kv_heads, D) for row in rows)
        sequences = self.one_each, self.starts, 1, max(self.shape.lens)
        options = 0.0, False, False  # dropout, causal, mask for debugging
        flash = torch.ops.aten._flash_attention_forward
        return flash(self.q, k, v, *sequences, *options, seqused_k=self.lens)[0]

    def cat(self) -> torch.Tensor:
        """Block by block, sequence by sequence, as naively as can be."""
        rows = []
        for table, length in zip(self.tables, self.shape.lens):
            parts = (torch.cat([pool[b] for b in table])[:length] for pool in (self.k, self.v))
            k, v = (part.transpose(0, 1)[None] for part in parts)
            gqa = self.shape.heads != self.shape.kv_heads
            query = self.q[len(rows)][None, :, None]
            rows.append(F.scaled_dot_product_attention(query, k, v, enable_gqa=gqa)[0, :, 0])
        return torch.stack(rows)


def flashinfer_run(data: Data, tensor_cores: bool, backend: str = "auto") -> Run:
    """FlashInfer's batch decode over the same pools; ImportError where it is not installed."""
    import flashinfer

    buffer = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    wrapper = decode(buffer, "NHD", use_tensor_cores=tensor_cores, backend=backend)
    shape = data.shape
    last = torch.tensor([(n - 1) % S + 1 for n in shape.lens], dtype=torch.int32, device="cuda")
    sizes = shape.heads, shape.kv_heads, D, S
    types = {"q_data_type": torch.float16, "kv_data_type": torch.float16}
    wrapper.plan(data.starts // S, data.flat, last, *sizes, pos_encoding_mode="NONE", **types)
    out = torch.empty_like(data.q)
    return lambda: wrapper.run(data.q, (data.k, data.v), out=out)


def xqa_run(data: Data) -> Run:
    """TensorRT-LLM's XQA, which FlashInfer has as well."""
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache as decode

    buffer = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    longest, out = data.padded.shape[1] * S, torch.empty_like(data.q)
    inputs = data.q, (data.k, data.v), buffer, data.padded, data.lens, longest
    options = {"bmm1_scale": D**-0.5, "bmm2_scale": 1.0, "kv_layout": "NHD", "backend": "xqa"}
    return lambda: decode(*inputs, out=out, **options)


def flash_attention_run(data: Data) -> Run:
    """FlashAttention-3's paged decode, as vLLM's extension has it: see `load_flash_attention`."""
    library, shape = torch.ops._vllm_fa3_C, data.shape
    batch, longest = len(shape.lens), max(shape.lens)
    sizes = batch, 1, longest, shape.heads, shape.kv_heads, D, D
    nothing = (None,) * 4
    plan = library.get_scheduler_metadata(
        *(*sizes, torch.float16, data.lens, data.one_each, *nothing),
        *(S, 0, True, -1, -1, False, 0, None, 0),
    )
    out = torch.empty_like(data.q)
    arguments = (data.q, data.k, data.v, None, None, None, out, data.one_each, None, None, None)
    arguments += (data.lens, 1, longest, data.padded, None, None, None, None, None)
    arguments += (None, None, None, D**-0.5, True, -1, -1, 0.0, True, plan, 0, None, 0)
    arguments += (None, 1, 0, None)

    def run() -> torch.Tensor:
        library.fwd(*arguments)
        return out

    return run


def load_flash_attention(file: str | None) -> None:
    """The extension `_vllm_fa3_C`: this file, or that of an installed vLLM. Raises OSError."""
    if file:
        torch.ops.load_library(file)
    elif importlib.util.find_spec("vllm"):
        import vllm.vllm_flash_attn  # noqa: F401


def contenders(name: str, data: Data) -> Iterator[tuple[str, Run]]:
    """(key, run) of each that can run on this shape."""
    import paged_attention_triton as kernels

    arguments = data.q, data.k, data.v, data.padded, data.lens
    workspace = kernels.Workspace(data.device)
    plan = kernels.Plan(*arguments[:3], data.shape.lens)
    attend = partial(kernels.paged_attention_kernel, *arguments, workspace=workspace)
    yield "triton", lambda: attend(plan=plan)[0]
    yield "unplanned", lambda: attend()[0]
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    if data.shape.ragged:
        yield "gather", data.packed
    else:
        for key, backend in backends.items():
            yield f"gather_{key}", lambda backend=backend: data.gathered(backend)
        k, v = (part.contiguous() for part in data.copied())
        for key, backend in backends.items():
            yield key, lambda backend=backend: data.sdpa(k, v, backend)
    peers = {
        "flashinfer": lambda: flashinfer_run(data, tensor_cores=False),
        "flashinfer_tc": lambda: flashinfer_run(data, tensor_cores=True),
        "flash_attention": lambda: flash_attention_run(data),
        "xqa": lambda: xqa_run(data),
    }
    for key, prepare in peers.items():
        try:
            yield key, prepare()
        except Exception as error:  # what it raises where it cannot be built is its own
            print(f"{name}: {key}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
    yield "plain", lambda: paged_attention.paged_attention_kernel(*arguments)[0]
    if name == CAT_SHAPE:
        yield "cat", data.cat
