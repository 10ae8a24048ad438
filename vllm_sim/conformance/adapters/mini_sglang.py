"""mini-sglang: its scheduler's own overlapped loop over its page table and radix cache.

Searches prefix caching in a radix tree, chunked prefill, aborts in flight, and a loop in which the
next iteration is scheduled before the results of the last are read. What is stood in for is the
model, its streams and its kernels: the forward says which slots it reads and writes.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from vllm_sim.conformance.adapter import NOTHING, Fault, Operation, Pass, Step, Tables
from vllm_sim.conformance.tools import END, Names, Requests, engine, next_token, served, version_of

STAND_INS = {name: {} for name in ("zmq", "zmq.asyncio", "msgpack", "minisgl.distributed")}
STAND_INS["minisgl.engine"] = {"EngineConfig": object}
ABORTS = ("abort", "abort in flight")
UNPINNED = (
    "scheduler",
    "cache",
    "prefill",
)  # modules that ask for pinned memory, which a CPU has not


class Unpinned(ModuleType):
    """torch, but memory is never pinned."""

    def __init__(self, torch: Any) -> None:
        super().__init__("torch")
        self.__dict__.update(torch.__dict__)
        for name in ("empty", "tensor"):
            make = getattr(torch, name)
            setattr(self, name, lambda *a, make=make, pin_memory=False, **k: make(*a, **k))


def same_length(key: Any, other: Any) -> int:
    """As its kernel: how many tokens two sequences begin with in common."""
    pairs = zip(key.tolist(), other.tolist())
    return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], pairs))


class Forward:
    """In place of the engine that runs the model: what each request reads and writes, by the page
    table of that moment, and the token that it gets."""

    def __init__(self, adapter: MiniSglang, page_table: Any) -> None:
        self.adapter, self.page_table = adapter, page_table
        self.max_seq_len = page_table.shape[1]
        self.attn_backend = self.sampler = self.graph_runner = self.stream = self
        self.passes: list[Pass] = []
        self.ending = False

    def pad_batch(self, batch: Any) -> None:
        batch.padded_reqs = batch.reqs

    def prepare_metadata(self, batch: Any) -> None: ...
    def prepare(self, batch: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def synchronize(self) -> None: ...

    def forward_batch(self, batch: Any, _: None) -> tuple:
        size, first, chosen = self.adapter.world.block_size, 0, []
        inputs, writes = batch.input_ids.tolist(), batch.out_loc.tolist()
        for req in batch.reqs:
            tokens, row = self.adapter.tokens[req.uid], self.page_table[req.table_idx].tolist()
            start, end = req.cached_len, req.device_len
            slots = [row[p // size * size] + p % size for p in range(end)]
            if inputs[first : first + end - start] != tokens[start:end]:
                raise Fault("tokens", f"{req.uid} computes other tokens than its own")
            new = writes[first : first + end - start]
            unread = end if END in tokens[:end] else 0  # its answer is thrown away
            self.passes.append(Pass(req.uid, tokens[:end], start, slots, new, unread))
            chosen.append(END if self.ending else next_token(tokens[:end]))
            if end == len(tokens):
                tokens.append(chosen[-1])
            first += end - start
            req.complete_one()
        found = self.adapter.found["torch"].tensor(chosen, dtype=self.page_table.dtype)
        return self.adapter.Output(found, found, self)


class MiniSglang:
    """The adapter; `source` says where the engine is, once for all searches of a process."""

    worlds: ClassVar = {
        "small": Requests(8, 2, "aaaab+2 aaaa+3 aab+2", 4),
        "large": Requests(9, 2, "aaaab+2 aaaa+3 aabaaab+1 b+4", 5, 3),
        "without aborts": Requests(9, 2, "aaaab+2 aaaa+3 aabaaab+1 b+4", 5, 3, False, ABORTS),
        "apart": Requests(7, 2, "aaaab+2 bbb+3 cab+2 d+4", 4, 3, False, ("prefix hit", *ABORTS)),
    }
    required = ("submit", "step", "prefix hit", "abort", "abort in flight", "eviction")
    required += ("part of a prompt",)
    cache_holds = True  # what nobody uses stays in the tree, and is not free
    found: ClassVar[dict[str, Any]] = {}

    class Output(tuple):
        """The engine's ForwardOutput, of which tokens are read by name."""

        def __new__(cls, *parts: Any) -> MiniSglang.Output:
            return super().__new__(cls, parts)

        next_tokens_gpu = property(lambda self: self[0])

        def __getnewargs__(self) -> tuple:
            return tuple(self)

    @classmethod
    def source(cls, folder: Path | None) -> str:
        """Its version, once it is found."""
        inside = folder and folder / "python"
        bare = ("minisgl", "minisgl.scheduler", "minisgl.kernel")
        names = (
            "core",
            "message",
            *(f"scheduler.{name}" for name in (*UNPINNED, "table", "decode")),
        )
        for name in names:
            module = engine(f"minisgl.{name}", inside, *bare, stand_ins=STAND_INS)
            cls.found[name.removeprefix("scheduler.")] = module
        cls.found["torch"] = torch = engine("torch", None)
        engine("minisgl.kernel", inside).fast_compare_key = same_length
        for name in UNPINNED:
            cls.found[name].torch = Unpinned(torch)
        if not torch.cuda.is_available():
            torch.Tensor.pin_memory = lambda tensor: tensor
        cls.found["core"].Req.__hash__ = lambda req: req.uid  # sets in the same order each time
        return version_of("mini-sglang", folder)

    def start(self, world: Requests) -> None:
        self.world, found, torch = world, self.found, self.found["torch"]
        found["core"]._GLOBAL_CTX = found["core"].Context(world.block_size)
        room = (world.longest // world.block_size + 2) * world.block_size
        pages = torch.zeros((world.max_seqs + 1, room), dtype=torch.int32)
        self.tokens: dict[int, list[int]] = {}
        self.inbox: list[Any] = []
        self.ended: set[int] = set()
        self.last = None
        scheduler = self.scheduler = object.__new__(found["scheduler"].Scheduler)
        sizes = world.num_blocks, world.block_size
        scheduler.engine, scheduler.device = Forward(self, pages), pages.device
        scheduler.stream, scheduler.engine_stream_ctx = None, contextlib.nullcontext()
        scheduler.table_manager = found["table"].TableManager(world.max_seqs, pages)
        scheduler.cache_manager = found["cache"].CacheManager(*sizes, pages, "radix")
        scheduler.decode_manager = found["decode"].DecodeManager(world.block_size)
        managers = (scheduler.cache_manager, scheduler.table_manager, scheduler.decode_manager)
        scheduler.prefill_manager = found["prefill"].PrefillManager(*managers)
        scheduler.finished_reqs, scheduler.eos_token_id = set(), END
        scheduler.token_pool = scheduler.table_manager.token_pool
        scheduler.prefill_budget = world.max_tokens
        scheduler.receive_msg, scheduler.send_result = self.receive, self.reply

    def receive(self, blocking: bool) -> list[Any]:
        messages, self.inbox = self.inbox, []
        return messages

    def reply(self, told: list[Any]) -> None:
        self.ended |= {one.uid for one in told if one.finished}

    def operations(self) -> list[Operation]:
        live = [n for n in self.tokens if n not in self.ended]
        busy = bool(live or self.inbox) or self.last is not None
        return served(self.world, self.tokens, live, busy, *["abort"] * self.world.aborts)

    def apply(self, operation: Operation) -> Step:
        name, args, *_ = operation
        if name == "submit":
            self.tokens[args[0]] = prompt = self.world.prompt(args[0])
            ids = self.found["torch"].tensor(prompt, dtype=self.found["torch"].int32)
            limits = self.found["core"].SamplingParams(max_tokens=self.world.count(args[0]))
            self.inbox.append(self.found["message"].UserMsg(args[0], ids, limits))
            return NOTHING
        if name == "abort":
            flying = self.last is not None and any(
                r.uid == args[0] for r in self.last[0].batch.reqs
            )
            self.inbox.append(self.found["message"].AbortBackendMsg(args[0]))
            self.ended.add(args[0])
            return Step((), (), ["abort in flight"] * flying)
        forward = self.scheduler.engine
        forward.passes, forward.ending = [], name != "step"
        self.last = self.scheduler.overlap_loop(self.last)
        parts = [one for one in forward.passes if len(one.tokens) < len(self.world.prompt(one[0]))]
        return Step((), forward.passes, ["part of a prompt"] * len(parts))

    def _requests(self) -> dict[int, Any]:
        """Those that hold pages."""
        waiting = self.scheduler.prefill_manager.pending_list
        found = {r.uid: r.chunked_req for r in waiting if r.chunked_req is not None}
        return (
            found
            | {r.uid: r for r in self.scheduler.decode_manager.running_reqs}
            | {
                r.uid: r
                for r in (self.last[0].batch.reqs if self.last is not None else ())
                if r.uid not in self.ended and type(r).__name__ == "Req"
            }
        )

    def tables(self) -> Tables:
        size, pages = self.world.block_size, self.scheduler.engine.page_table
        held = {}
        for n, req in self._requests().items():
            row = pages[req.table_idx, : req.cached_len : size].tolist()
            tokens = self.tokens[n][: req.cached_len]
            held[n] = [slot // size for slot in row], () if END in tokens else tokens
        return held

    def free(self) -> list[int]:
        slots = self.scheduler.cache_manager.free_slots.tolist()
        return [slot // self.world.block_size for slot in slots]

    def ref_counts(self) -> None:
        return None

    def _nodes(self) -> list[tuple[Any, list[int]]]:
        """Nodes of the tree, each with all tokens up to its end."""
        found, left = [], [(self.scheduler.cache_manager.prefix_cache.root_node, [])]
        while left:
            node, before = left.pop()
            for child in node.children.values():
                left.append((child, before + child._key.tolist()))
                found.append(left[-1])
        return found

    def cached(self) -> dict[int, list[int]]:
        size, found = self.world.block_size, {}
        for node, tokens in self._nodes():
            first = len(tokens) - node.length
            for at, slot in enumerate(node.value[::size].tolist()):
                found[slot // size] = tokens[: first + (at + 1) * size]
        return found

    def key(self) -> tuple:
        name, size, scheduler = Names(), self.world.block_size, self.scheduler
        tables = {n: name(blocks) for n, (blocks, _) in sorted(self.tables().items())}
        held = self._requests()
        rows = [
            (
                n,
                tuple(tokens),
                n in self.ended,
                n in held
                and (
                    held[n].table_idx,
                    held[n].cached_len,
                    held[n].device_len,
                    tables[n],
                    held[n].cache_handle.cached_len,
                ),
            )
            for n, tokens in sorted(self.tokens.items())
        ]
        order = [node for node, _ in self._nodes()]
        ranks = {id(node): at for at, node in enumerate(sorted(order, key=lambda n: n.timestamp))}
        tree = [
            (tuple(tokens), name(node.value[::size].tolist()), node.ref_count, ranks[id(node)])
            for node, tokens in self._nodes()
        ]
        flying = (
            ()
            if self.last is None
            else (
                self.last[0].batch.phase,
                tuple(r.uid for r in self.last[0].batch.reqs),
                tuple(self.last[1][0].tolist()),
            )
        )
        inbox = [(type(message).__name__, message.uid) for message in self.inbox]
        waiting = [(r.uid, r.chunked_req is None) for r in scheduler.prefill_manager.pending_list]
        queues = tuple(waiting), tuple(inbox), tuple(sorted(r.uid for r in scheduler.finished_reqs))
        sizes = scheduler.cache_manager.prefix_cache.size_info
        free = name(self.free()), tuple(scheduler.table_manager._free_slots)
        return tuple(rows), tuple(sorted(tree)), flying, queues, free, tuple(sizes)
