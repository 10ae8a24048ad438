"""nano-vllm: its scheduler and its block manager, step by step as its engine's loop calls them.

Searches prefix caching, chunked prefill of the first in the queue, and preemption by recomputation.
A step is `LLMEngine.step` without the model: schedule, the slots that its runner would read and
write, postprocess with the tokens that a model would give.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from vllm_sim.conformance.adapter import NOTHING, Operation, Pass, Step, Tables
from vllm_sim.conformance.tools import (
    END,
    Names,
    Requests,
    engine,
    next_token,
    served,
    slots_of,
    version_of,
)


class NanoVllm:
    """The adapter; `source` says where the engine is, once for all searches of a process."""

    worlds: ClassVar = {
        "small": Requests(4, 2, "aaaab+3 aaaa+2 aab+4", 4),
        "large": Requests(6, 2, "aaaab+4 aaaa+3 aab+5 aaaaba+2 b+6", 5),
        "wide": Requests(8, 2, "aaaab+4 aaaa+3 aab+5 aaaaba+2 b+6 aaaabab+3", 5, 3),
    }
    required = ("submit", "step", "prefix hit", "preemption", "eviction", "part of a prompt")
    found: ClassVar[dict[str, object]] = {}

    @classmethod
    def source(cls, folder: Path | None) -> str:
        """Its version, once it is found."""
        cls.found["engine"] = engine("nanovllm.engine.scheduler", folder, "nanovllm")
        cls.found["sequence"] = engine("nanovllm.engine.sequence", folder, "nanovllm")
        return version_of("nano-vllm", folder)

    def start(self, world: Requests) -> None:
        self.world = world
        config = SimpleNamespace(
            max_num_seqs=world.max_seqs,
            max_num_batched_tokens=world.max_tokens,
            eos=END,
            kvcache_block_size=world.block_size,
            num_kvcache_blocks=world.num_blocks,
        )
        self.scheduler = self.found["engine"].Scheduler(config)
        self.found["sequence"].Sequence.block_size = world.block_size
        self.requests = {}  # number -> the engine's sequence
        self.prefixes = {}  # hash of a block -> all tokens up to its end

    def __deepcopy__(self, memo: dict) -> NanoVllm:
        """The engine's sequences copy themselves for another process, and lose what that needs
        not; so they are copied here."""
        new = object.__new__(NanoVllm)
        for seq in self.requests.values():
            twin = memo[id(seq)] = object.__new__(type(seq))
            twin.__dict__ |= seq.__dict__
            twin.token_ids, twin.block_table = seq.token_ids.copy(), seq.block_table.copy()
        new.world, new.prefixes = self.world, self.prefixes.copy()
        new.requests = {n: memo[id(seq)] for n, seq in self.requests.items()}
        new.scheduler = copy.deepcopy(self.scheduler, memo)
        return new

    def operations(self) -> list[Operation]:
        live = [n for n, seq in self.requests.items() if not seq.is_finished]
        return served(self.world, self.requests, live, bool(live))

    def apply(self, operation: Operation) -> Step:
        if operation.name == "submit":
            (number,) = operation.arguments
            limits = SimpleNamespace(
                temperature=1.0, max_tokens=self.world.count(number), ignore_eos=False
            )
            prompt = self.world.prompt(number)
            self.requests[number] = self.found["sequence"].Sequence(prompt, limits)
            self.scheduler.add(self.requests[number])
            return NOTHING
        held = {n for n, seq in self.requests.items() if seq.block_table}
        seqs, prefill = self.scheduler.schedule()
        numbers = {id(seq): n for n, seq in self.requests.items()}
        size, passes, events = self.world.block_size, [], []
        for seq in seqs:
            start = seq.num_cached_tokens if prefill else len(seq) - 1
            end = start + seq.num_scheduled_tokens
            slots = slots_of(seq.block_table, end, size)
            passes.append(Pass(numbers[id(seq)], seq.token_ids[:end], start, slots))
            events += ["part of a prompt"] * (end < len(seq))
        if any(not self.requests[n].block_table for n in held):
            events.append("preemption")
        tokens = [END if operation.name != "step" else next_token(s.token_ids) for s in seqs]
        self.scheduler.postprocess(seqs, tokens, prefill)
        manager = self.scheduler.block_manager
        for one in passes:
            code = -1
            for end in range(size, len(one.tokens) + 1, size):
                code = manager.compute_hash(one.tokens[end - size : end], code)
                self.prefixes[code] = one.tokens[:end]
        return Step((), passes, events)

    def tables(self) -> Tables:
        return {
            n: (seq.block_table, seq.token_ids[: seq.num_cached_tokens])
            for n, seq in self.requests.items()
            if seq.block_table
        }

    def free(self) -> list[int]:
        return [*self.scheduler.block_manager.free_block_ids]

    def ref_counts(self) -> dict[int, int]:
        return {b.block_id: b.ref_count for b in self.scheduler.block_manager.blocks if b.ref_count}

    def cached(self) -> dict[int, list[int]]:
        manager = self.scheduler.block_manager
        return {b: self.prefixes[code] for code, b in manager.hash_to_block_id.items()}

    def key(self) -> tuple:
        manager, name = self.scheduler.block_manager, Names()
        rows = tuple(
            (n, seq.status.value, seq.num_tokens, seq.num_cached_tokens, name(seq.block_table))
            for n, seq in sorted(self.requests.items())
        )
        order = [
            tuple(map(id, queue)) for queue in (self.scheduler.waiting, self.scheduler.running)
        ]
        numbers = {id(seq): n for n, seq in self.requests.items()}
        queues = tuple(tuple(numbers[one] for one in queue) for queue in order)
        free = name(manager.free_block_ids)
        hashes = sorted((name([b])[0], code) for code, b in manager.hash_to_block_id.items())
        blocks = sorted((name([b.block_id])[0], b.hash) for b in manager.blocks)
        return rows, queues, free, tuple(hashes), tuple(blocks)
