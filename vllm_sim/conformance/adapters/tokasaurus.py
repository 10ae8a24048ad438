"""tokasaurus: its manager's own loop, one turn at a time, with a model that may answer late.

Searches a prefix tree whose blocks are shared before they are computed, scheduling steps ahead of
the model, cancelled requests, and sequences that are bumped: preempted, and begun anew. The queues
between its processes are lists here; what it sends to the model says which slots are read and
written.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from vllm_sim.conformance.adapter import NOTHING, Fault, Operation, Pass, Step, Tables
from vllm_sim.conformance.tools import (
    END,
    Names,
    Queue,
    Requests,
    engine,
    next_token,
    served,
    slots_of,
    version_of,
)


@dataclass(frozen=True)
class World(Requests):
    """`ahead` iterations are scheduled beyond what the model has answered; with `bumps` sequences
    are taken on until they do not fit, as its option for testing has it."""

    ahead: int = 2
    bumps: bool = False


class Quiet:
    """A log and statistics that nobody reads."""

    def info(self, *_: Any) -> None: ...

    debug = reset = add_decision = add_finished_req = add_finished_seq = info
    add_manager_idle_time = add_num_new_commands = add_num_steps_to_schedule = info

    def elapsed_time(self) -> float:
        return 0.0


class Turned(Exception):
    """One turn of the loop is over."""


def one_turn(queues: list[Queue]) -> None:
    """In place of waiting for messages: the second time ends the loop."""
    queues[0].begun = not getattr(queues[0], "begun", False)
    if not queues[0].begun:
        raise Turned


class Config(SimpleNamespace):
    """The fields of the engine's that its manager reads."""

    def kv_cache_num_blocks(self) -> int:
        return self.num_blocks

    scheduler_block_target = kv_cache_num_blocks


class Tokasaurus:
    """The adapter; `source` says where the engine is, once for all searches of a process."""

    worlds: ClassVar = {
        "small": World(6, 2, "aaaab+3 aaaa+4 aab+2", 5),
        "bumps": World(5, 2, "aaaab+3 aaaa+4 aab+4", 5, bumps=True),
        "large": World(8, 2, "aaaab+3 aaaab+2 aaaaba+4 b+5", 5),
        "large bumps": World(6, 2, "aaaab+3 aaaab+4 aaaaba+4 b+5", 5, bumps=True),
    }
    required = ("submit", "step", "step before an answer", "cancel", "prefix hit", "eviction")
    found: ClassVar[dict[str, Any]] = {}

    @classmethod
    def source(cls, folder: Path | None) -> str:
        """Its version, once it is found."""
        stands = {"flashinfer": {}, "tokasaurus.core": {}}
        for name in ("manager.manager", "manager.types", "manager.allocator", "server.types"):
            cls.found[name] = engine(f"tokasaurus.{name}", folder, "tokasaurus", stand_ins=stands)
        cls.found["manager.manager"].block_on_queues = one_turn
        # A block's last use is a time of the clock, and two uses may fall on the same.
        cls.found["manager.allocator"].time = SimpleNamespace(time=itertools.count(1).__next__)
        return version_of("tokasaurus", folder)

    def start(self, world: World) -> None:
        self.world, types = world, self.found["manager.types"]
        self.config = Config(
            num_blocks=world.num_blocks,
            page_size=world.block_size,
            pp_size=1,
            max_tokens_per_forward=world.max_tokens,
            max_seqs_per_forward=world.max_seqs,
            scheduling_steps_ahead=world.ahead,
            prefill_round_up_multiple=1,
            greedy_prefill=True,
            use_hydragen=False,
            use_cudagraphs=False,
            track_early_stopping=False,
            enable_precise_onboard=True,
            precise_onboard_batch_size=4,
            bump_city_population_me=world.bumps,
            stop_string_num_token_lookback=5,
            stats_report_seconds=1e9,
            allocator_sanity_checks=False,
        )
        blocks = {"num_blocks": world.num_blocks, "page_size": world.block_size}
        state = self.state = object.__new__(types.ManagerState)
        names = ("manager_to_model", "model_to_manager", "server_to_manager", "manager_to_server")
        for name in names:
            setattr(state, f"q_{name}", Queue())
        state.config, state.logger, state.stats_tracker = self.config, Quiet(), Quiet()
        state.scheduling_queue = types.SchedulingQueue()
        state.block_allocator = self.found["manager.allocator"].BlockAllocator(**blocks)
        state.batch_index_allocator = types.BatchIndexAllocator(world.max_seqs)
        state.generation_config = SimpleNamespace(eos_token_id=END)
        state.inflight_schedule_decisions, state.finished_seq_ids = {}, set()
        state.req_id_to_seq_ids, state.req_ids_to_cancel = {}, set()
        state.num_inflight_batches, state.sent_no_more_inputs = 0, False
        state.last_step_num_prefill, state.early_stopping_tracker = 1 << 30, None
        self.submitted: list[int] = []
        self.cancelled: set[int] = set()
        self.tokens: dict[str, list[int]] = {}  # of a sequence, by the engine's name of it
        self.answers: list[Any] = []  # of the model, on their way

    def operations(self) -> list[Operation]:
        state = self.state
        live = [
            n
            for n in self.submitted
            if n not in self.cancelled and f"{n}" in state.req_id_to_seq_ids
        ]
        queued = bool(state.q_server_to_manager or state.scheduling_queue.num_unfinished_seqs())
        busy = queued or bool(self.answers or state.req_ids_to_cancel)
        found = served(self.world, self.submitted, live, busy, *["cancel"] * self.world.aborts)
        return found + [Operation("step before an answer")] * bool(busy and self.answers)

    def apply(self, operation: Operation) -> Step | list[Step]:
        name, args, *_ = operation
        state, server = self.state, self.found["server.types"]
        if name == "submit":
            self.submitted.append(args[0])
            sampling = server.SamplingParams(temperature=0.0, top_p=1.0)
            ids, count = self.world.prompt(args[0]), self.world.count(args[0])
            asked = server.TokasaurusRequest(f"{args[0]}", ids, count, sampling, None, 1, False)
            state.q_server_to_manager.put(asked)
            return NOTHING
        if name == "cancel":
            self.cancelled.add(args[0])
            state.q_server_to_manager.put(server.CancelledRequest(f"{args[0]}"))
            return NOTHING
        if name != "step before an answer":
            state.q_model_to_manager += self.answers
            self.answers = []
        with contextlib.suppress(Turned):
            self.found["manager.manager"].manager_loop(self.config, state)
        sent, state.q_manager_to_model[:] = [*state.q_manager_to_model], []
        state.q_manager_to_server.clear()
        steps = [self._forward(one, name) for one in sent if hasattr(one, "position_ids")]
        if any("bumped" in seq.id for seq in state.scheduling_queue.unfinished_seqs()):
            steps.append(Step((), (), ["preemption"]))
        return steps

    def _forward(self, sent: Any, name: str) -> Step:
        """What the model does with what the manager sent: prompts first, then a token of each."""
        decision, size = (
            self.state.inflight_schedule_decisions[sent.schedule_id],
            self.world.block_size,
        )
        builder = sent.attention_info_builder
        first, passes, chosen = 0, [], []
        parts = [(seq, n, True) for seq, n in decision.prefill_seqs]
        parts += [(seq, 1, False) for seq in decision.decoding_seqs]
        kinds = {True: builder.prefill_builder, False: builder.decode_builder}
        turns = {True: 0, False: 0}
        for seq, count, prompt in parts:
            tokens = self.tokens.setdefault(seq.id, [*seq.input_ids])
            start = sent.position_ids[first]
            pages, at, turns[prompt] = kinds[prompt], turns[prompt], turns[prompt] + 1
            blocks = pages.kv_indices[pages.kv_indptr[at] : pages.kv_indptr[at + 1]]
            length = (len(blocks) - 1) * size + pages.kv_last_page_len[at]
            if length != start + count:
                raise Fault("tokens", f"{seq.id} reads {length} tokens, and has {start + count}")
            writes = builder.append_kv_token_indices[first : first + count]
            new = tokens[:length]
            passes.append(Pass(seq.id, new, start, slots_of(blocks, length, size), writes))
            if not prompt or length == len(seq.input_ids):
                chosen.append(END if name == "step that ends them" else next_token(new))
                if length == len(tokens):
                    tokens.append(chosen[-1])
            first += count
        tensors = SimpleNamespace(
            output_ids=np.array(chosen, dtype=int),
            chosen_logprobs=None,
            topk_indices=None,
            topk_logprobs=None,
        )
        self.answers.append(SimpleNamespace(schedule_id=sent.schedule_id, tensors=tensors))
        return Step((), passes)

    def _running(self) -> list[Any]:
        return self.state.scheduling_queue.running_seqs()

    def tables(self) -> Tables:
        found = {}
        for seq in self._running():
            stored = seq.prompt_scheduled + max(0, seq.completion_scheduled - 1)
            tokens = self.tokens.get(seq.id, seq.input_ids)
            found[seq.id] = seq.kv_indices, tokens[:stored]
        return found

    def _tree(self) -> dict[int, list[int]]:
        """Blocks of the tree, each with all tokens up to its end."""
        found, left = {}, [(self.state.block_allocator.prefix_tree, [])]
        while left:
            block, before = left.pop()
            for child in block.children.values():
                found[child.idx] = before + [*child.contents]
                left.append((child, found[child.idx]))
        return found

    def free(self) -> list[int]:
        allocator = self.state.block_allocator
        unused = [b for b in self._tree() if not allocator.all_blocks[b].seq_ids]
        return [block.idx for block in allocator.floating_blocks] + unused

    def ref_counts(self) -> dict[int, int]:
        blocks = self.state.block_allocator.all_blocks
        return {block.idx: len(block.seq_ids) for block in blocks if block.seq_ids}

    def cached(self) -> dict[int, list[int]]:
        """But what a sequence is still computing: whoever finds it computes later."""
        prefilling = self.state.scheduling_queue.prefilling_seqs
        blocks = self.state.block_allocator.all_blocks
        return {
            b: t for b, t in self._tree().items() if prefilling.keys().isdisjoint(blocks[b].seq_ids)
        }

    def key(self) -> tuple:
        """Without the numbers of blocks, in whose order the engine goes through sets of them: of a
        thousand states that are taken for one, two go on otherwise."""
        name, state = Names(), self.state
        rows = []
        for queued in ("decoding_seqs", "prefilling_seqs", "queued_seqs"):
            for seq in getattr(state.scheduling_queue, queued).values():
                blocks = None if seq.kv_indices is None else name(seq.kv_indices)
                counts = seq.prompt_scheduled, seq.completion_scheduled, seq.batch_index
                done = tuple(seq.seq_output.completion_ids)
                rows.append((queued, seq.id, blocks, counts, done))
        flying = tuple(
            (tuple(seq.id for seq, _ in d.prefill_seqs), tuple(seq.id for seq in d.decoding_seqs))
            for d in state.inflight_schedule_decisions.values()
        )
        allocator = state.block_allocator
        tree = sorted((tuple(t), name([b])[0]) for b, t in self._tree().items())
        kept = [block for block in allocator.all_blocks if block.seq_ids or block.parent]
        used = name(b.idx for b in sorted(kept, key=lambda block: block.last_used_at))
        answers = tuple(tuple(one.tensors.output_ids.tolist()) for one in self.answers)
        inbox = tuple(
            (type(one).__name__, getattr(one, "id", "")) for one in state.q_server_to_manager
        )
        floating = name(block.idx for block in allocator.floating_blocks)
        alive = tuple(sorted((r, tuple(sorted(ids))) for r, ids in state.req_id_to_seq_ids.items()))
        more = tuple(self.submitted), tuple(sorted(state.req_ids_to_cancel)), inbox, answers
        late = tuple(sorted(state.finished_seq_ids)), state.last_step_num_prefill, alive
        free = floating, used, tuple(state.batch_index_allocator.available_indices)
        return tuple(rows), flying, tuple(tree), more, late, free, tuple(sorted(self.cancelled))
