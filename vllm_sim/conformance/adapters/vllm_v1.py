"""vLLM (v1): its engine core's own step over its scheduler and KV-cache manager.

Searches prefix caching with one group of full attention, chunked prefill, preemption by
recomputation, aborts between and during steps, and the queue of two batches of asynchronous
scheduling. What is stood in for is the executor: it keeps block tables by what each step tells it,
as a worker does, and says which slots are read and written.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vllm_sim.conformance.adapter import NOTHING, Operation, Pass, Step, Tables
from vllm_sim.conformance.tools import (
    END,
    Fields,
    Names,
    Queue,
    Requests,
    engine,
    next_token,
    served,
    slots_of,
    version_of,
)

MODULES = {
    "core": "vllm.v1.engine.core",
    "scheduler": "vllm.v1.core.sched.scheduler",
    "late": "vllm.v1.core.sched.async_scheduler",
    "kv": "vllm.v1.kv_cache_interface",
    "hashes": "vllm.v1.core.kv_cache_utils",
    "hashing": "vllm.utils.hashing",
    "outputs": "vllm.v1.outputs",
    "request": "vllm.v1.request",
    "sampling": "vllm.sampling_params",
}


@dataclass(frozen=True)
class World(Requests):
    """`late` batches are scheduled before the last one has answered."""

    late: bool = False


class Answer:
    """What a batch gives, once it is asked for."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def result(self) -> Any:
        return self.output


class VllmV1:
    """The adapter; `source` says where the engine is, once for all searches of a process."""

    worlds: ClassVar = {
        "small": World(5, 2, "aaaab+3 aaaa+3 aab+2", 4),
        "late": World(5, 2, "aaaab+3 aaaa+3 aab+2", 4, late=True),
        "large": World(6, 2, "aaaab+4 aaaa+3 aab+5 aaaaba+2", 5),
        "large late": World(6, 2, "aaaab+4 aaaa+3 aab+5 aaaaba+2", 5, late=True),
    }
    required = ("submit", "step", "abort", "prefix hit", "eviction", "preemption", "shared block")
    required += ("part of a prompt", "abort during a step")
    found: ClassVar[dict[str, Any]] = {}

    @classmethod
    def source(cls, folder: Path | None) -> str:
        """Its version, once it is found."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
        for name, module in MODULES.items():
            cls.found[name] = engine(module, folder)
        cls.found["torch"] = engine("torch", None)
        return version_of("vllm", folder)

    def start(self, world: World) -> None:
        self.world, found, torch = world, self.found, self.found["torch"]
        hashing = found["hashing"].sha256
        found["hashes"].init_none_hash(hashing)
        self.hasher = found["hashes"].get_request_block_hasher(world.block_size, hashing)
        whole = world.num_blocks + 1  # block 0 stands for none
        config = Fields(
            scheduler_config=Fields(
                max_num_seqs=world.max_seqs,
                max_num_batched_tokens=world.max_tokens,
                policy="fcfs",
                watermark=0.0,
                prefill_schedule_interval=1,
                long_prefill_token_threshold=0,
                enable_chunked_prefill=True,
                async_scheduling=world.late,
            ),
            cache_config=Fields(
                num_gpu_blocks=whole, enable_prefix_caching=True, block_size=world.block_size
            ),
            model_config=Fields(
                max_model_len=world.longest + world.block_size, runner_type="generate"
            ),
            parallel_config=Fields(
                data_parallel_index=0,
                decode_context_parallel_size=1,
                data_parallel_size=1,
                prefill_context_parallel_size=1,
                pipeline_parallel_size=1,
            ),
            observability_config=Fields(),
            aux_output_config=Fields(enabled=False),
            ec_manager_config=Fields(get_encoder_cache_manager_obj=lambda: None),
            num_speculative_tokens=0,
            num_lookahead_tokens=0,
            num_prefill_lookahead_tokens=0,
            num_hash_lookahead_tokens=0,
            max_in_flight_tokens=world.max_tokens * (1 + world.late),
            max_concurrent_batches=1 + world.late,
            use_v2_model_runner=False,
        )
        spec = found["kv"].FullAttentionSpec(
            block_size=world.block_size, num_kv_heads=1, head_size=8, dtype=torch.float16
        )
        groups = [found["kv"].KVCacheGroupSpec(["layer"], spec)]
        kv = found["kv"].KVCacheConfig(
            num_blocks=whole, kv_cache_tensors=[], kv_cache_groups=groups
        )
        kind = found["late"].AsyncScheduler if world.late else found["scheduler"].Scheduler
        texts = Fields(accept_tokens=lambda *_: True)  # no output is structured
        self.scheduler = kind(config, kv, texts, world.block_size)
        core = self.core = object.__new__(found["core"].EngineCore)
        core.scheduler, core.model_executor, core.aborts_queue = self.scheduler, self, Queue()
        core.batch_queue, core.batch_queue_size = deque() if world.late else None, 2
        core.is_mm_encoder_only = core.is_pooling_model = core.check_for_draft_tokens = False
        core._should_throttle_prefills = bool
        quiet = contextlib.nullcontext()
        core.log_error_detail = core.capture_iteration_details = lambda _, quiet=quiet: quiet
        core._attach_iteration_details = core._attach_weight_version = lambda *_: None
        self.submitted: list[int] = []
        self.gone: set[int] = set()
        self.tokens: dict[str, list[int]] = {}
        self.worker: dict[str, list[int]] = {}  # block tables, by what each step told
        self.prefixes: dict[bytes, list[int]] = {}
        self.config, self.kv, self.ending, self.steps = config, kv, False, []

    def __deepcopy__(self, memo: dict) -> VllmV1:
        new = memo[id(self)] = object.__new__(type(self))
        memo |= {id(one): one for one in (self.kv, *self.kv.kv_cache_groups, self.prefixes)}
        new.__dict__ |= {name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()}
        return new

    # -- in place of the executor and its workers -----------------------------------------------

    def execute_model(self, told: Any, non_block: bool = False) -> Answer:
        empty = self.found["outputs"].ModelRunnerOutput([], {})
        for name in told.finished_req_ids:
            self.worker.pop(name, None)
        starts = {}
        for new in told.scheduled_new_reqs:
            self.worker[new.req_id], starts[new.req_id] = (
                [*new.block_ids[0]],
                new.num_computed_tokens,
            )
        known = told.scheduled_cached_reqs
        for name, blocks, start in zip(
            known.req_ids, known.new_block_ids, known.num_computed_tokens
        ):
            if name in known.resumed_req_ids:
                self.worker[name] = []
            self.worker[name] += blocks[0] if blocks else []
            starts[name] = start
        passes, chosen, events = [], {}, []
        for name, count in told.num_scheduled_tokens.items():
            end, tokens = starts[name] + count, self.tokens[name]
            slots = slots_of([b - 1 for b in self.worker[name]], end, self.world.block_size)
            unread = end if END in tokens[:end] else 0  # its answer is thrown away
            passes.append(Pass(name, tokens[:end], starts[name], slots, None, unread))
            chosen[name] = []
            if end < len(self.scheduler.requests[name].all_token_ids):
                events.append("part of a prompt")
            else:
                chosen[name] = [END if self.ending else next_token(tokens[:end])]
                self.tokens[name] = tokens[:end] + chosen[name]
        self.steps.append(Step((), passes, events))
        order = {name: at for at, name in enumerate(chosen)}
        output = self.found["outputs"].ModelRunnerOutput([*chosen], order, [*chosen.values()])
        self.output = output if chosen else empty
        return Answer(None if chosen else empty)

    def sample_tokens(self, grammar: None, non_block: bool = False) -> Any:
        return Answer(self.output) if non_block else self.output

    # -- the adapter ----------------------------------------------------------------------------

    def operations(self) -> list[Operation]:
        there = self.scheduler.requests
        live = [n for n in self.submitted if f"{n}" in there and n not in self.gone]
        busy = bool(
            self.scheduler.has_requests() or self.core.batch_queue or self.core.aborts_queue
        )
        names = ["abort", "abort during a step"] * self.world.aborts
        return served(self.world, self.submitted, live, busy, *names)

    def apply(self, operation: Operation) -> Step | list[Step]:
        name, args, *_ = operation
        if name == "submit":
            self.submitted.append(args[0])
            prompt, count = self.world.prompt(args[0]), self.world.count(args[0])
            limits = self.found["sampling"].SamplingParams(temperature=0.0, max_tokens=count)
            limits._eos_token_id = END
            asked = self.found["request"].Request(
                f"{args[0]}", prompt, limits, None, arrival_time=0.0, block_hasher=self.hasher
            )
            self.tokens[f"{args[0]}"] = [*prompt]
            self.core.add_request(asked)
            return NOTHING
        if name.startswith("abort"):
            self.gone.add(args[0])
            if name == "abort":
                self.core.abort_requests([f"{args[0]}"])
            else:
                self.core.aborts_queue.put([f"{args[0]}"])
            return NOTHING
        self.ending, self.steps = name != "step", []
        before = {r.request_id: r.num_preemptions for r in self.scheduler.running}
        (self.core.step if self.core.batch_queue is None else self.core.step_with_batch_queue)()
        found = self.scheduler.requests
        again = [
            n for n, count in before.items() if n in found and found[n].num_preemptions > count
        ]
        return [*self.steps, Step((), (), ["preemption"] * len(again))]

    @property
    def manager(self) -> Any:
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]

    def tables(self) -> Tables:
        found = {}
        for name, blocks in self.manager.req_to_blocks.items():
            request = self.scheduler.requests.get(name)
            tokens = self.tokens[name][: request.num_computed_tokens] if request else ()
            found[name] = [b.block_id - 1 for b in blocks], () if END in tokens else tokens
        return found

    def free(self) -> list[int]:
        pool = self.scheduler.kv_cache_manager.block_pool
        return [b.block_id - 1 for b in pool.free_block_queue.get_all_free_blocks()]

    def ref_counts(self) -> dict[int, int]:
        blocks = self.scheduler.kv_cache_manager.block_pool.blocks[1:]
        return {b.block_id - 1: b.ref_cnt for b in blocks if b.ref_cnt}

    def cached(self) -> dict[int, list[int]]:
        size, of = self.world.block_size, self.found["hashes"].get_block_hash
        for name, request in self.scheduler.requests.items():
            for at, code in enumerate(request.block_hashes):
                if code not in self.prefixes:
                    self.prefixes[code] = self.tokens[name][: (at + 1) * size]
        blocks = self.scheduler.kv_cache_manager.block_pool.blocks
        held = ((b.block_id - 1, b.block_hash) for b in blocks if b.block_hash is not None)
        return {block: self.prefixes[of(code)] for block, code in held}

    def key(self) -> tuple:
        name, scheduler = Names(), self.scheduler
        rows = tuple(
            (
                n,
                r.status.value,
                tuple(r.all_token_ids),
                r.num_computed_tokens,
                r.num_output_placeholders,
                r.num_in_flight_tokens,
                r.num_stale_output_tokens,
                r.num_preemptions > 0,
                r.is_prefill_chunk,
                name(b.block_id for b in self.manager.req_to_blocks.get(n, ())),
                name(self.worker.get(n, ())),
                self.manager.num_cached_block.get(n),
            )
            for n, r in scheduler.requests.items()
        )
        queues = scheduler.waiting, scheduler.kv_holding_waiting, scheduler.running
        order = tuple(tuple(r.request_id for r in queue) for queue in queues)
        pool = scheduler.kv_cache_manager.block_pool
        free = name(b.block_id for b in pool.free_block_queue.get_all_free_blocks())
        hashes = tuple(
            sorted((name([b.block_id]), b.block_hash) for b in pool.blocks if b.block_hash)
        )
        flying = tuple(
            (tuple(told.num_scheduled_tokens.items()), str(answer.output.sampled_token_ids))
            for answer, told, _ in self.core.batch_queue or ()
        )
        more = tuple(self.submitted), str(self.core.aborts_queue), tuple(sorted(self.worker))
        late = tuple(sorted(self.gone)), tuple(sorted(scheduler.finished_req_ids))
        return rows, order, free, hashes, flying, more, late
