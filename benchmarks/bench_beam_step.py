"""What a beam-search step costs in software, on a GPU: microseconds per group and per copied block.

    python benchmarks/bench_beam_step.py [--repeats 100] [--json FILE]

Serves sections 5 and 6.3 (Fig. 14 d-f): what the latency model needs beyond bytes and FLOPs, so
that no constant is fitted to that figure. Needs a CUDA device. Wall time, medians, with every
synchronisation of CPU and GPU that the step has, and fp32 rows over OPT's whole vocabulary.

    sample   random sampling of one group of n sequences, as the authors' sampler does it: one
             torch.multinomial, one tolist, and one item() per sequence for its log-probability
    synced   the same with two more synchronisations: torch.multinomial had two inside until 2024
             (pytorch/pytorch pull request 134818), so also when the paper was written
    beam     the same for a beam search of width n: the scores go to the GPU and are added, one
             topk over all n rows, one tolist, one item() per sequence

The groups come one after another. Then blocks are copied inside GPU memory, all layers, K and V,
to random places, the next blocks at each repeat so that no cache helps:

    copy_    one Tensor.copy_ per block, layer, and K or V
    memcpy   one cudaMemcpyAsync instead, through ctypes; `empty` is the same call with 0 bytes
    indexed  one index_copy_ for all, the block numbers sent along (one kernel, as in section 5)
    limit    bytes read and written over the bandwidth of one large copy, in the same run

`issue` is the part of it until the CPU has issued all calls.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_timing import copy_bandwidth
from script import Script, entry, options, show

from vllm_sim.models import MODELS
from vllm_sim.reporting.tables import Table

MODEL, VOCABULARY = MODELS["opt-13b"], MODELS["opt-13b"].vocab_size
SEQUENCES, GROUPS = (1, 2, 4, 6), (16, 64)
BLOCK_SIZE, BLOCKS = 16, (1, 8, 64, 128)
DEVICE_TO_DEVICE = 3  # cudaMemcpyKind
Row = dict[str, float | int]


def sample_group(probs: Tensor, logprobs: Tensor, *checks: Tensor) -> list[float]:
    """One group's step with random sampling: rows (n, V), one token for each sequence."""
    for check in checks:
        check.item()
    tokens = torch.multinomial(probs, num_samples=1, replacement=True).squeeze(dim=-1).tolist()
    return [logprobs[row, token].item() for row, token in enumerate(tokens)]


def beam_group(logprobs: Tensor, scores: list[float]) -> list[float]:
    """One group's step of beam search: the best n of all candidates of n beams."""
    added = logprobs + torch.tensor(scores, device=logprobs.device).unsqueeze(dim=1)
    best = torch.topk(added.flatten(), len(scores))[1].tolist()
    return [logprobs[divmod(candidate, VOCABULARY)].item() for candidate in best]


def each(way: Callable[..., object], calls: Iterable[tuple[object, ...]]) -> None:
    for arguments in calls:
        way(*arguments)


def timed(run: Callable[..., object], *args: object) -> tuple[float, float]:
    """Microseconds until `run` has returned, and until the GPU has finished."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(*args)
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return (issued - start) * 1e6, (time.perf_counter() - start) * 1e6


def measure_groups(sequences: int, groups: int, repeats: int) -> Row:
    """Microseconds per group of each way, in turn, and the medians of the differences."""
    probs = torch.softmax(3.0 * torch.randn(groups * sequences, VOCABULARY, device="cuda"), dim=-1)
    logprobs = torch.log(probs).split(sequences)
    samples, check = list(zip(probs.split(sequences), logprobs)), probs.new_ones(())
    synced = [(*rows, check, check) for rows in samples]
    beams = [(rows, [-10.0 - 0.1 * beam for beam in range(sequences)]) for rows in logprobs]
    ways = ((sample_group, samples), (sample_group, synced), (beam_group, beams))
    times = [[timed(each, *way)[1] / groups for way in ways] for _ in range(repeats + 10)][10:]
    parts = zip(*((a, b, c, c - a, c - b) for a, b, c in times))
    names = ("sample_us", "synced_us", "beam_us", "beam_less_sample_us", "beam_less_synced_us")
    return {"groups": groups, "sequences": sequences, **dict(zip(names, map(median, parts)))}


def cuda_memcpy() -> Callable[..., int]:
    """cudaMemcpyAsync of the runtime library that torch has loaded."""
    loaded = Path("/proc/self/maps").read_text()
    call = ctypes.PyDLL(re.search(r"/.*libcudart.*", loaded)[0]).cudaMemcpyAsync
    call.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    return call


class Copies:
    """Blocks copied from one pool (layers x 2, blocks, elements of a block) to another."""

    def __init__(self) -> None:
        self.calls = 2 * MODEL.num_layers  # of each block
        shape = (self.calls, max(BLOCKS), BLOCK_SIZE * MODEL.num_kv_heads * MODEL.head_size)
        self.source = torch.randn(shape, dtype=torch.float16, device="cuda")
        self.target = torch.empty_like(self.source)
        self.part_bytes = self.source[0, 0].nbytes
        self.places: list[int] = torch.randperm(max(BLOCKS)).tolist()
        pairs = enumerate(self.places)
        blocks = [zip(self.target[:, new], self.source[:, old]) for old, new in pairs]
        self.views = [views for block in blocks for views in block]
        self.pointers = [(new.data_ptr(), old.data_ptr()) for new, old in self.views]
        self.memcpy = cuda_memcpy()

    def by_copy(self, first: int, last: int) -> None:
        for new, old in self.views[first * self.calls : last * self.calls]:
            new.copy_(old, non_blocking=True)

    def by_memcpy(self, first: int, last: int, empty: bool = False) -> None:
        size, stream = 0 if empty else self.part_bytes, torch.cuda.current_stream().cuda_stream
        for new, old in self.pointers[first * self.calls : last * self.calls]:
            if self.memcpy(new, old, size, DEVICE_TO_DEVICE, stream):
                raise RuntimeError("cudaMemcpyAsync failed")

    def by_empty(self, first: int, last: int) -> None:
        self.by_memcpy(first, last, empty=True)

    def by_indexed(self, first: int, last: int) -> None:
        index = torch.tensor(self.places[first:last], device="cuda")
        new, old = (pool.view(torch.complex128) for pool in (self.target, self.source))
        new.index_copy_(1, index, old[:, first:last])  # 16 bytes at a time

    def measure(self, blocks: int, repeats: int, bytes_per_s: float) -> Row:
        """Microseconds per block of each way; every repeat takes the next blocks."""
        row: Row = {"blocks": blocks}
        starts = range(0, max(BLOCKS), blocks)
        for name in ("copy", "memcpy", "empty", "indexed"):
            way = getattr(self, f"by_{name}")
            self.target.zero_()
            for at in starts:  # warms up as well
                way(at, at + blocks)
            same = torch.equal(self.target[:, self.places], self.source)
            assert same == (name != "empty"), f"{name}: wrong copies"
            runs = [starts[repeat % len(starts)] for repeat in range(repeats)]
            times = [timed(way, at, at + blocks) for at in runs]
            issued, done = (median(part) / blocks for part in zip(*times))
            row |= {f"{name}_us": done, f"{name}_issue_us": issued}
        return {**row, "limit_us": 2 * self.calls * self.part_bytes / bytes_per_s * 1e6}


def run(argv: list[str] | None) -> int:
    script = Script(__file__, options(__doc__, repeats=100), argv)
    torch.manual_seed(0)
    repeats = max(2, script.args.repeats)
    sizes = [(sequences, number) for number in GROUPS for sequences in SEQUENCES]
    groups = [measure_groups(*size, repeats) for size in script.each(sizes, "groups")]
    speed = copy_bandwidth()
    copies = Copies()
    blocks = [copies.measure(number, repeats, speed) for number in BLOCKS]
    where = f"median of {repeats}, {torch.cuda.get_device_name()}, V = {VOCABULARY:,}"
    moved = f"{copies.calls} x {copies.part_bytes:,} bytes, large copy {speed / 1e9:,.0f} GB/s"
    for title, rows, setting in (("us/group", groups, where), ("us/block copied", blocks, moved)):
        headers = tuple(key.removesuffix("_us").replace("_", " ") for key in rows[0])
        show(Table(title, headers, [tuple(row.values()) for row in rows], setting))
    found = {"model": MODEL.name, "vocabulary": VOCABULARY, "block_size": BLOCK_SIZE}
    found |= {"calls_per_block": copies.calls, "bytes_per_call": copies.part_bytes}
    found |= {"bandwidth_bytes_per_s": speed, "repeats": repeats}
    return script.write({**found, "groups": groups, "copies": blocks}, {"groups": 2, "copies": 1})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
