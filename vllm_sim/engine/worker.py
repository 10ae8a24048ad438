"""What one GPU does of an iteration: it moves blocks and runs the model over the tokens it is told.

Reproduces: section 4.6. A worker does no bookkeeping: once an iteration it is sent an Order, which
is numbers alone, and it never waits for its own results. Prompts and decodes are computed apart,
each padded to one of a few sizes; on a GPU every size is a CUDA graph over fixed tensors.

    worker = Worker(model, num_blocks=983, block_size=16, max_len=2048)
    worker.prepare()                        # capture all graphs now
    order = Order(prompts=[Prompt([5, 7, 9], 0, [3], [0])])   # 3 tokens into block 3, for row 0
    worker.run(order).tokens()              # {0: 1234}, once the device has them

The newest token of a sequence stays on the device, in the row that the order gives it: so the next
iteration can be ordered before this one has ended. Beams are not for this worker.

Shapes: V vocabulary, S slots per block.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import time
from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from kv_cache_manager import BlockPairs
from paged_attention import TRITON
from vllm_sim.engine.block_cache import CACHE, OneRowCache, Segment, Step
from vllm_sim.engine.in_place import Batch
from vllm_sim.engine.support import UnsupportedModelError

# Sequences of a decode forward, and tokens of a prompt forward: each is padded to the next one.
DECODE_SIZES = (1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32), 384, 512)
PROMPT_SIZES = (*range(32, 257, 32), *range(320, 513, 64), *range(640, 1025, 128), 1536, 2048, 2560)
SMALL_PROMPTS = 512  # up to so many tokens few sequences are let into one forward
MOST_ROWS = 32, 128  # sequences of a prompt forward: of a small one, of a large one


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of one sequence from position `first` on, its blocks, and which rows draw their next
    token from its last logits: its own, or those of all samples of one prompt."""

    tokens: list[int]
    first: int
    blocks: list[int]
    rows: list[int]


@dataclass(frozen=True, slots=True)
class Order:
    """An iteration in numbers: blocks to move, prompts to compute, and of each sequence that
    decodes its row, its number of tokens with the newest, and its blocks."""

    swapped_out: BlockPairs = ()
    swapped_in: BlockPairs = ()
    copies: BlockPairs = ()
    prompts: list[Prompt] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    lens: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)


class Moment:
    """When something was done on a device: a CUDA event, or the host's own time."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._host = time.perf_counter()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def until(self, other: Moment) -> float:
        """Seconds between two that are done."""
        if self._event is None:
            return other._host - self._host
        return self._event.elapsed_time(other._event) * 1e-3


@dataclass(frozen=True, slots=True)
class Flight:
    """An iteration that the device has been given: when it begins, when its prompts are done and
    when all is, and the tokens that it draws."""

    start: Moment
    between: Moment
    end: Moment
    drawn: list[tuple[list[int], torch.Tensor]]

    def tokens(self) -> dict[int, int]:
        """The token of each row; waits for them."""
        self.end.wait()
        return {
            row: token for rows, tokens in self.drawn for row, token in zip(rows, tokens.tolist())
        }


@dataclass(frozen=True, slots=True)
class _Blocks:
    """How many blocks a pool has."""

    num_blocks: int
    block_size: int
    num_cpu_blocks: int


class Worker:
    """A model, or one GPU's share of it, and its pool."""

    def __init__(
        self,
        model: PreTrainedModel,
        num_blocks: int,
        block_size: int,
        *,
        max_len: int,
        num_cpu_blocks: int = 0,
        most_rows: int = 512,
        temperature: float = 0.0,
        seed: int = 0,
        kernel: str = "auto",
    ) -> None:
        """`max_len`: tokens of the longest sequence; `most_rows`: sequences alive at a time;
        `temperature`: of all tokens, 0 for the most likely ones; draws are `seed`'s, whatever else
        draws on the device. The pool has one block more than num_blocks: padding writes there. It
        is made by the first forward, which raises DeviceMemoryError.

        Raises UnsupportedModelError, KernelError, and ValueError for a `max_len` that is beyond the
        largest prompt forward: a sequence may be computed again in one.
        """
        if not 0 < max_len <= PROMPT_SIZES[-1]:
            raise ValueError(f"max_len is 1 to {PROMPT_SIZES[-1]} tokens, got {max_len}")
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise UnsupportedModelError(f"{model.config.model_type} computes all logits")
        self.model, self.device = model, model.device
        self.most_rows, self.temperature = most_rows, temperature
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.max_len = max_len
        self.block_size, self.max_blocks = block_size, -(-max_len // block_size)
        self.spare_slot = num_blocks * block_size
        blocks = _Blocks(num_blocks + 1, block_size, num_cpu_blocks)
        self.cache = OneRowCache(model, blocks, kernel)
        self.on_gpu = self.device.type == "cuda"
        self.graphs = self.on_gpu and self.cache.kernel == TRITON
        self.memory = torch.cuda.graph_pool_handle() if self.graphs else None
        # Row most_rows is that of padding.
        self.newest = torch.zeros(most_rows + 1, dtype=torch.int64, device=self.device)
        self._lanes: dict[tuple[bool, int], Lane] = {}
        self._ran: list[Lane] = []  # of the last order

    def prepare(self, most_seqs: int | None = None, most_tokens: int = PROMPT_SIZES[-1]) -> int:
        """Make the lanes of all sizes up to these, the largest first; how many there are."""
        most_seqs = self.most_rows if most_seqs is None else most_seqs
        for prompts, sizes, most in (
            (True, PROMPT_SIZES, most_tokens),
            (False, DECODE_SIZES, min(most_seqs, DECODE_SIZES[-1])),
        ):
            for size in reversed(sizes[: bisect_left(sizes, most) + 1]):
                self._lane(prompts, size)
        return len(self._lanes)

    @torch.no_grad()
    def run(self, order: Order) -> Flight:
        """Give the device an iteration, without waiting for it."""
        start, drawn = Moment(self.device), []
        self._ran.clear()
        if order.swapped_out or order.swapped_in or order.copies:
            self.cache.pool.move(order.swapped_out, (), order.swapped_in, order.copies)
        for prompts in _batched(order.prompts):
            num_rows = sum(len(prompt.rows) for prompt in prompts)
            num_tokens = max(2 * num_rows, sum(len(prompt.tokens) for prompt in prompts))
            if num_rows > MOST_ROWS[0]:
                num_tokens = max(num_tokens, SMALL_PROMPTS + 1)
            lane = self._lane(True, num_tokens)
            drawn.append(lane.prompts(prompts))
        between = Moment(self.device)
        most = DECODE_SIZES[-1]
        for first in range(0, len(order.rows), most):
            one, end = slice(first, first + most), min(first + most, len(order.rows))
            lane = self._lane(False, end - first)
            drawn.append(lane.decodes(order.rows[one], order.lens[one], order.tables[one]))
        return Flight(start, between, Moment(self.device), drawn)

    def digest(self) -> bytes:
        """Of the numbers that the device holds, after waiting for them: tables, slots and lengths
        of the last order, and the newest tokens. Workers of one model share it."""
        found = hashlib.blake2b(digest_size=16)
        for lane in self._ran:
            found.update(lane.numbers.cpu().numpy())
        found.update(self.newest[:-1].cpu().numpy())  # padding's tokens are any
        return found.digest()

    def release(self, wait: bool = True) -> None:
        """Give up all lanes, once the device is done if `wait`. NCCL does not end while a graph
        holds one of its all-reduces: this comes first."""
        if self.on_gpu and wait:
            torch.cuda.synchronize(self.device)
        for lane in self._lanes.values():
            lane.release()
        self._lanes.clear()
        self._ran.clear()

    def _lane(self, prompts: bool, count: int) -> Lane:
        """That of the next size."""
        sizes = PROMPT_SIZES if prompts else DECODE_SIZES
        size = sizes[bisect_left(sizes, count)]
        if (prompts, size) not in self._lanes:
            with torch.no_grad():
                self._lanes[prompts, size] = Lane(self, prompts, size)
        self._ran.append(self._lanes[prompts, size])
        return self._ran[-1]


class Lane:
    """A forward of a fixed size, whose numbers lie in one fixed tensor. On a GPU a CUDA graph."""

    def __init__(self, worker: Worker, prompts: bool, size: int) -> None:
        self.worker, self.is_prompts, self.size = worker, prompts, size
        self.num_rows = size
        if prompts:
            self.num_rows = min(size // 2, MOST_ROWS[size > SMALL_PROMPTS])
        width = worker.max_blocks
        fields = {"positions": size, "slots": size, "rows": self.num_rows, "lens": self.num_rows}
        fields |= {"tables": self.num_rows * width}
        if prompts:
            fields |= {"ids": size, "last": self.num_rows}
        ends = list(itertools.accumulate(fields.values()))
        self._host = np.zeros(ends[-1], dtype=np.int32)
        self.numbers = torch.zeros(ends[-1], dtype=torch.int32, device=worker.device)
        places = {name: slice(end - fields[name], end) for name, end in zip(fields, ends)}
        self._on_host = {name: self._host[place] for name, place in places.items()}
        self._on_device = {name: self.numbers[place] for name, place in places.items()}
        for where in (self._on_host, self._on_device):
            where["tables"] = where["tables"].reshape(self.num_rows, width)
        self._drawn = torch.zeros(self.num_rows, dtype=torch.int64, device=worker.device)
        self._plans: dict = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._clear()
        if worker.graphs:
            self._capture()

    def decodes(self, rows: list[int], lens: list[int], tables: list[list[int]]):
        """One token more of each of these sequences: the rows, and their tokens to come."""
        count, size, host = len(rows), self.worker.block_size, self._on_host
        self._clear()
        host["rows"][:count], host["lens"][:count] = rows, lens
        self._set_tables(tables)
        position = host["lens"][:count] - 1
        host["positions"][:count] = position
        block = host["tables"][np.arange(count), position // size]
        host["slots"][:count] = block * size + position % size
        return self._run(rows, host["lens"].tolist(), None, ())

    def prompts(self, prompts: list[Prompt]):
        """The tokens of these prompts: the rows that draw, and their tokens to come."""
        size, host, device = self.worker.block_size, self._on_host, self.worker.device
        self._clear()
        self._set_tables([prompt.blocks for prompt in prompts])
        rows, lens, counts, segments, at = [], [], [], [], 0
        for nth, prompt in enumerate(prompts):
            count = len(prompt.tokens)
            lens.append(prompt.first + count)
            counts.append(count)
            position = np.arange(prompt.first, lens[-1], dtype=np.int32)
            here = slice(at, at + count)
            host["ids"][here], host["positions"][here] = prompt.tokens, position
            block = host["tables"][nth, position // size]
            host["slots"][here] = block * size + position % size
            host["last"][len(rows) : len(rows) + len(prompt.rows)] = at + count - 1
            rows += prompt.rows
            if not self._graph:
                table = torch.tensor([prompt.blocks], dtype=torch.int32, device=device)
                segments.append(Segment(at, at + count, table, lens[-1]))
            at += count
        host["rows"][: len(rows)], host["lens"][: len(lens)] = rows, lens
        unused = [0] * (self.num_rows - len(lens))
        return self._run(rows, lens + unused, counts + unused, tuple(segments))

    def release(self) -> None:
        """End the graph, whoever still holds this lane."""
        if self._graph:
            self._graph.reset()
            self._graph = None

    def _clear(self) -> None:
        """All is padding: no token of a sequence, and what is written goes to the spare block."""
        self._host[:] = 0
        self._on_host["slots"][:] = self.worker.spare_slot
        self._on_host["rows"][:] = self.worker.most_rows

    def _set_tables(self, tables: list[list[int]]) -> None:
        for row, blocks in zip(self._on_host["tables"], tables):
            row[: len(blocks)] = blocks

    def _run(self, rows, lens, counts, segments):
        """Send the numbers, run, and have the tokens sent back."""
        self._send()
        if self._graph:
            for plan in self._plans.values():
                table = plan.table
                plan.update(lens, counts)
                assert plan.table is table, "the plan has left the tensor that the graph reads"
            self._graph.replay()
        else:
            self._forward(tuple(lens), counts, segments)
        tokens = torch.empty(len(rows), dtype=torch.int64, pin_memory=self.worker.on_gpu)
        tokens.copy_(self._drawn[: len(rows)], non_blocking=True)
        return rows, tokens

    def _send(self) -> None:
        numbers = torch.from_numpy(self._host)
        if self.worker.on_gpu:  # a copy: the next numbers are written while this one is read
            numbers = numbers.pin_memory()  # and from pageable memory the host would wait
        self.numbers.copy_(numbers, non_blocking=True)

    def _capture(self) -> None:
        """Once as it is, which makes plans for the longest sequences, compiles kernels and takes
        memory; then as a graph."""
        longest, counts = [self.worker.max_blocks * self.worker.block_size] * self.num_rows, None
        if self.is_prompts:
            counts = [self.size - self.num_rows + 1] + [1] * (self.num_rows - 1)
        self._send()
        self._forward(tuple(longest), counts, ())
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self.worker.generator)  # each replay draws anew
        # Other threads, NCCL's among them, may ask the device for what a capture forbids.
        options = {"pool": self.worker.memory, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._graph, **options):
            self._forward(tuple(longest), counts, ())

    def _forward(self, lens: tuple[int, ...], counts: list[int] | None, segments) -> None:
        """The model over the fixed tensors. Lengths as numbers are for plans, and segments for
        the kernel that gathers: a graph has neither."""
        worker, on_device = self.worker, self._on_device
        given = on_device["tables"], on_device["lens"]
        rows = on_device["rows"].long()
        if self.is_prompts:
            ids, last = on_device["ids"].long(), on_device["last"].long()
            here = slice(0, sum(counts))
            seq_lens, tables = (), given[0][:0]
        else:
            ids, last, here = worker.newest[rows], 0, slice(0, self.size)
            seq_lens, tables = lens, given[0]
        batch = Batch(here, lens, counts, *given)
        slots = on_device["slots"].long()
        plans = self._plans if worker.graphs else {}
        worker.cache.next_step = Step(
            *(slots, None, tables, given[1][: len(seq_lens)], seq_lens),
            *(segments, (batch,), plans),
        )
        row = {"input_ids": ids[None], "position_ids": on_device["positions"].long()[None]}
        row |= {CACHE: worker.cache, "use_cache": True, "logits_to_keep": last}
        logits = worker.model(**row).logits[0]  # (rows, V)
        self._drawn.copy_(_draw(logits, worker.temperature, worker.generator))
        worker.newest[rows] = self._drawn


def _draw(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """A token of each row of logits (rows, V)."""
    if not temperature:
        return logits.argmax(dim=-1)
    weights = (logits.float() / temperature).softmax(dim=-1)
    # Of exponential times with these rates the first is the first with the rate's probability.
    times = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / times).argmax(dim=-1)


def _batched(prompts: list[Prompt]) -> list[list[Prompt]]:
    """Prompts that fit into a forward together."""
    batches: list[list[Prompt]] = []
    tokens = rows = 0
    for prompt in prompts:
        tokens, rows = tokens + len(prompt.tokens), rows + len(prompt.rows)
        few = tokens <= SMALL_PROMPTS
        if not batches or tokens > PROMPT_SIZES[-1] or rows > MOST_ROWS[not few]:
            batches.append([])
            tokens, rows = len(prompt.tokens), len(prompt.rows)
        batches[-1].append(prompt)
    return batches
