"""transformers' paged generation: the loop of continuous batching, over its scheduler and cache.

Searches de-duplicated blocks, forks of a prompt, chunked prefill, requests that are reset when the
cache is full, cancelled ones, and batches that are scheduled before the last has answered. What is
stood in for is the model and the tensors of a batch: which slots it reads and writes is asked of
the library's cache.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from vllm_sim.conformance.adapter import NOTHING, Fault, Operation, Pass, Step, Tables
from vllm_sim.conformance.tools import (
    END,
    Names,
    Queue,
    Requests,
    engine,
    next_token,
    served,
    slot_pairs,
    version_of,
)

NOT_YET = -1  # in place of a token that the batch before is still computing
THREE, FOUR, NONE = "aaaab+3 aaaa+3 aab+2", "aaaab+4 aaaa+3 aab+5 aaaaba+2", ("cancel",)
PARTS = "cache continuous_api distributed offloading_manager requests scheduler"


@dataclass(frozen=True)
class World(Requests):
    """`children` of each request are forked from its prompt; `late` batches are scheduled before
    the last one has answered."""

    children: tuple[int, ...] = (0, 0, 0, 0, 0)
    late: bool = False
    order: str = "fifo"


class TransformersPaged:
    """The adapter; `source` says where the library is, once for all searches of a process."""

    worlds: ClassVar = {
        "small": World(6, 2, THREE, 5, children=(0, 1, 0)),
        "late": World(6, 2, THREE, 5, children=(0, 1, 0), late=True),
        "late, no cancels": World(6, 2, THREE, 5, 4, False, NONE, (0, 1, 0), True),
        "large": World(8, 2, FOUR, 6, children=(0, 2, 0, 1)),
        "large late, no cancels": World(8, 2, FOUR, 6, 4, False, NONE, (0, 2, 0, 1), True),
        "pressed": World(6, 2, "aaaab+6 bbab+7", 5, never=("prefix hit", "copy")),
        "prefill first": World(6, 2, THREE, 5, children=(0, 1, 0), order="prefill_first"),
    }
    required = ("submit", "step", "cancel", "prefix hit", "copy", "part of a prompt", "preemption")
    required += ("eviction", "shared block")
    cache_holds = True  # blocks that nobody uses are kept for their content, and are not free
    found: ClassVar[dict[str, Any]] = {}

    @classmethod
    def source(cls, folder: Path | None) -> str:
        """Its version, once it is found."""
        for name in PARTS.split():
            cls.found[name] = engine(f"transformers.generation.continuous_batching.{name}", folder)
        allocators = "transformers.generation.continuous_batching.cache_allocators.cache_allocator"
        cls.found["hash"] = engine(allocators, folder).compute_block_hash
        cls.found["config"] = engine("transformers", folder).ContinuousBatchingConfig
        cls.found["torch"] = engine("torch", None)
        logging.getLogger("transformers").setLevel(logging.CRITICAL)
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        return version_of("transformers", folder)

    def start(self, world: World) -> None:
        self.world, found, torch = world, self.found, self.found["torch"]
        model = SimpleNamespace(
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            hidden_size=8,
            vocab_size=8,
            _attn_implementation="eager",
        )
        config = found["config"](
            page_size=world.block_size,
            num_blocks=world.num_blocks,
            use_async_batching=world.late,
            max_batch_tokens=world.max_tokens,
            max_requests_per_batch=world.max_seqs,
            max_blocks_per_request=0,
            max_memory_percent=0.9,
        )
        helper = found["distributed"].DistributedHelper(None, None)
        cache = found["cache"].PagedAttentionCache(model, config, "cpu", helper, torch.float16)
        (self.allocator,) = cache.cache_allocators.values()
        for holder in (cache, self.allocator):  # tensors are not searched, and cost time to copy
            for name, value in [*holder.__dict__.items()]:
                if isinstance(value, torch.Tensor) or name in ("_kv_token_views", "_kv_page_views"):
                    setattr(holder, name, None)
        self.first = self.allocator.blocks_per_sector * cache.pool.num_reserved_sectors
        self.cache, cache.perform_cache_copy = cache, self.copied
        self.scheduler = found["scheduler"].SCHEDULER_MAPPING[world.order](
            cache, None, world.max_seqs
        )
        offloading = object.__new__(found["offloading_manager"].OffloadingManager)
        offloading.cache, offloading.scheduler = cache, self.scheduler
        offloading._cpu_pool, offloading._request_id_to_cpu_blocks = None, {}
        self.processor = processor = object.__new__(
            found["continuous_api"].ContinuousBatchProcessor
        )
        processor.cache, processor.scheduler, processor.cb_config = cache, self.scheduler, config
        processor.offloading_manager, processor.distributed_helper = offloading, helper
        processor.input_queue, processor.cancel_queue = Queue(), Queue()
        processor.background_thread_status = found["continuous_api"].BackgroundThreadStatus()
        processor.use_async_batching, processor.max_batch_tokens = (
            world.late,
            cache.max_batch_tokens,
        )
        for name in ("inputs_and_outputs", "logit_processor", "output_router", "model_runner"):
            setattr(processor, name, self)
        self.submitted: list[int] = []
        self.cancelled: set[int] = set()
        self.tokens: dict[str, list[int]] = {}
        self.prefixes: dict[int, list[int]] = {}  # hash of a block -> all tokens up to its end
        self.batches: list[tuple[list, list[int]]] = []  # computed, and not yet answered
        self.ending, self.steps = False, []

    def __deepcopy__(self, memo: dict) -> TransformersPaged:
        new = memo[id(self)] = object.__new__(type(self))
        kept = self.processor.background_thread_status, self.processor.cb_config
        kept += self.processor.distributed_helper, self.scheduler._cancellation_lock
        memo |= {id(one): one for one in (*kept, self.cache.config)}
        new.__dict__ |= {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        return new

    # -- in place of the model, its tensors, and who waits for the answers ----------------------

    compute_stream = pad_inputs = None

    def check_kwargs(self, given: dict) -> None: ...
    def deliver_batch(self, outputs: list) -> None: ...

    def maybe_pad_inputs(self, queries: int, keys: int, decode: bool) -> tuple[int, int]:
        return queries, keys

    def prepare_batch_tensors(self, requests_in_batch: list, **_: Any) -> None:
        """Which slots the batch reads and writes, and the tokens that it gives."""
        passes, events, answers = [], [], []
        # What these compute is the answer of the batch before, which the library carries over.
        flying = self.batches[-1][0] if self.batches else ()
        carried = {future.state.request_id for future in flying if future.has_new_token}
        for future in requests_in_batch:
            state, count = future.state, future.query_length
            start, name = state.position_offset, state.request_id
            known = state.initial_tokens + state.generated_tokens
            tokens = self.tokens.setdefault(name, [*known])
            end = start + count
            inputs = state.tokens_to_process
            if name not in carried and inputs != tokens[start:end]:
                raise Fault("tokens", f"{name} computes {inputs}, not {tokens[start:end]}")
            read, written = [[]], [[]]
            self.cache.extend_read_and_write_indices(name, start, count, read, written)
            state.position_offset = end  # as the library does when it fills the tensors
            passes.append(Pass(name, tokens[:end], start, self.slots(read), self.slots(written)))
            if future.has_new_token:
                answers.append(END if self.ending else next_token(tokens[:end]))
                self.tokens[name] = tokens[:end] + answers[-1:]
                state.tokens_to_process = [NOT_YET]
            else:
                events.append("part of a prompt")
        self.batches.append((requests_in_batch, answers))
        self.steps.append(Step((), passes, events))

    def prepare_batch_update(self) -> tuple[list, list[int], None]:
        return *self.batches.pop(0), None

    def copied(self, pairs: dict[str, tuple[list[int], list[int]]]) -> None:
        for old, new in pairs.values():
            blocks = [(a - self.first, b - self.first) for a, b in zip(old, new)]
            self.steps.append(Step((slot_pairs(blocks, self.world.block_size),)))

    def slots(self, rows: list[list[int]]) -> list[int]:
        """The library's indices of rows as slots."""
        stride, size = self.allocator.block_physical_stride, self.world.block_size
        return [(row // stride - self.first) * size + row % stride for row in rows[0]]

    # -- the adapter ----------------------------------------------------------------------------

    def _there(self) -> set[str]:
        """Requests that have not ended, or a child of theirs has not."""
        names = [*self.scheduler.active_requests, *self.scheduler.waiting_requests]
        names += [request.request_id for request in self.processor.input_queue]
        return {name.split("__")[0] for name in names}

    def operations(self) -> list[Operation]:
        there, cancels = self._there(), self.processor.cancel_queue
        live = [n for n in self.submitted if f"{n}" in there and n not in self.cancelled]
        busy = bool(there or cancels or self.scheduler._requests_to_cancel)
        return served(self.world, self.submitted, live, busy, *["cancel"] * self.world.aborts)

    def apply(self, operation: Operation) -> Step | list[Step]:
        name, args, *_ = operation
        processor, scheduler = self.processor, self.scheduler
        if name == "submit":
            self.submitted.append(args[0])
            limits = {"max_new_tokens": self.world.count(args[0]), "eos_token_id": END}
            limits["num_children"] = self.world.children[args[0]]
            prompt, state = self.world.prompt(args[0]), self.found["requests"].RequestState
            processor.input_queue.put(state(f"{args[0]}", prompt, **limits))
            return NOTHING
        if name == "cancel":
            self.cancelled.add(args[0])
            processor.cancel_queue.put(f"{args[0]}")
            return NOTHING
        self.ending, self.steps = name != "step", []
        before = {*scheduler.active_requests}
        loop = SimpleNamespace(_generation_step=lambda: None, current_batch=0)
        loop.background_thread_status = processor.background_thread_status
        loop._wake_up_loop = SimpleNamespace(wait=lambda timeout: None, clear=lambda: None)
        begins = self.world.late and not self.batches
        body = self.found["continuous_api"].ContinuousBatchingManager._generation_loop_body
        body(loop, processor, bootstrapping=begins)
        again = before & scheduler.waiting_requests.keys()
        return [*self.steps, Step((), (), ["preemption"] * len(again))]

    def _state(self, name: str) -> Any:
        scheduler = self.scheduler
        return scheduler.active_requests.get(name) or scheduler.waiting_requests.get(name)

    def tables(self) -> Tables:
        found = {}
        for name, blocks in self.allocator.block_table.items():
            state = self._state(name)
            known = state and self.tokens.get(name, state.initial_tokens + state.generated_tokens)
            stored = known[: state.position_offset] if state else ()
            found[name] = [block - self.first for block in blocks], stored
        return found

    def free(self) -> list[int]:
        pool, per = self.cache.pool, self.allocator.blocks_per_sector
        blocks = [s * per + at for s in pool.free_sectors for at in range(per)]
        blocks += [block for tree in pool._free_blocks[0].trees.values() for block in tree]
        return [block - self.first for block in blocks]

    def ref_counts(self) -> dict[int, int]:
        counts = self.allocator.ledger.shared_ref_counts
        held = {block for blocks in self.allocator.block_table.values() for block in blocks}
        return {block - self.first: counts.get(block, 1) for block in held | counts.keys()}

    def cached(self) -> dict[int, list[int]]:
        size, hashed = self.world.block_size, self.found["hash"]
        for tokens in self.tokens.values():
            code = None
            for end in range(size, len(tokens) + 1, size):
                code = hashed(code, tokens[end - size : end])
                self.prefixes[code] = tokens[:end]
        ledger = self.allocator.ledger
        return {b - self.first: self.prefixes[code] for b, code in ledger.block_to_hash.items()}

    def key(self) -> tuple:
        blocks, sectors, per = Names(), Names(), self.allocator.blocks_per_sector

        def name(found: Iterable[int]) -> tuple:
            """Blocks, each with its sector: that one is free once all its blocks are."""
            return tuple((*blocks([b]), *sectors([b // per])) for b in found)

        scheduler, ledger = self.scheduler, self.allocator.ledger
        rows = []
        for queued in (scheduler.active_requests, scheduler.waiting_requests):
            for n, state in queued.items():
                tokens = state.initial_tokens, state.generated_tokens, state.tokens_to_process
                tokens += (state.remaining_prefill_tokens,)
                told = state.status, state.position_offset, state.num_children, state.max_new_tokens
                held = name(self.allocator.block_table.get(n, ()))
                rows.append((n, tuple(map(tuple, tokens)), told, held))
        left = {n: name(b) for n, b in self.allocator.block_table.items() if self._state(n) is None}
        trees = [(sectors([r]), name(t)) for r, t in self.cache.pool._free_blocks[0].trees.items()]
        known = sorted(ledger.block_to_hash.items(), key=lambda item: item[1])
        hashes = tuple((name([b]), code) for b, code in known)
        free = sectors(self.cache.pool.free_sectors), tuple(trees)
        flying = [
            tuple(
                (f.state.request_id, f.state.status, tuple(sorted(f.complete_blocks.items())))
                for f in batch
            )
            + tuple(answers)
            for batch, answers in self.batches
        ]
        inbox = tuple(r.request_id for r in self.processor.input_queue)
        more = tuple(self.submitted), inbox, tuple(self.processor.cancel_queue)
        more += tuple(scheduler.waiting_requests_order), scheduler.block_new_requests
        there = self._there()
        gone = tuple(n for n in self.submitted if n in self.cancelled and f"{n}" in there)
        kept = name(ledger.cached_blocks), tuple(sorted(left.items())), gone
        return tuple(rows), free, hashes, tuple(flying), more, kept
