"""A small engine, sound as it stands, and its adapter: what the planted faults are planted in.

Requests share what their prompts begin with, block by block; each may be forked once, and a block
that two hold is copied before one of them writes into it. A step computes what is not computed yet
and gives one token more to every request, until it has what it asked for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from vllm_sim.conformance.adapter import NOTHING, Forbidden, Operation, Pass, Step
from vllm_sim.conformance.tools import Requests, next_token, slot_pairs, slots_of


class NoRoomError(Exception):
    """Not enough blocks are free."""


@dataclass
class Request:
    tokens: list[int]
    left: int  # tokens that it still generates
    blocks: list[int]
    stored: int = 0


class SmallEngine:
    """Everything that a fault may be planted in is a method."""

    def __init__(self, num_blocks: int, size: int) -> None:
        self.size, self.free, self.refs = size, [*range(num_blocks)], Counter()
        self.live: dict[str, Request] = {}
        self.cache: dict[tuple[int, ...], int] = {}  # all tokens up to a block's end -> the block

    def take(self) -> int:
        block = self.free.pop(0)
        self.cache = {tokens: b for tokens, b in self.cache.items() if b != block}
        return block

    def share(self, block: int) -> None:
        self.refs[block] += 1
        if block in self.free:
            self.free.remove(block)

    def need(self, request: Request) -> int:
        """Blocks that its tokens take beyond those that it has."""
        return -(-len(request.tokens) // self.size) - len(request.blocks)

    def hits(self, tokens: list[int]) -> int:
        """Whole blocks that are computed already; the last token is always computed."""
        ends = range(self.size, len(tokens), self.size)
        return next(
            (at for at, end in enumerate(ends) if tuple(tokens[:end]) not in self.cache), len(ends)
        )

    def submit(self, name: str, tokens: list[int], count: int) -> None:
        request, hits = Request(tokens, count, []), self.hits(tokens)
        found = [self.cache[tuple(tokens[: (at + 1) * self.size])] for at in range(hits)]
        kept = sum(block in self.free for block in found)
        if self.need(request) - hits + kept > len(self.free):
            raise NoRoomError(name)
        for block in found:
            self.share(block)
        request.blocks, request.stored = found, hits * self.size
        self.grow(request)
        self.live[name] = request

    def grow(self, request: Request) -> None:
        for _ in range(self.need(request)):
            request.blocks.append(self.take())
            self.refs[request.blocks[-1]] += 1

    def fork(self, name: str, child: str) -> None:
        parent = self.live[name]
        self.live[child] = Request([*parent.tokens], parent.left, [*parent.blocks], parent.stored)
        for block in parent.blocks:
            self.share(block)

    def copy_on_write(self, request: Request) -> list[tuple[int, int]]:
        """The block that is written next, if others hold it too."""
        at = request.stored // self.size
        if at >= len(request.blocks) or self.refs[old := request.blocks[at]] == 1:
            return []
        self.drop(old)
        request.blocks[at] = new = self.take()
        self.refs[new] += 1
        return [(old, new)]

    def drop(self, block: int) -> None:
        self.refs[block] -= 1
        if not self.refs[block]:
            self.free.append(block)

    def release(self, name: str) -> None:
        for block in self.live.pop(name).blocks:
            self.drop(block)

    def step(self) -> tuple[list, list]:
        """(copies, (name, first position, tokens, blocks) of each): those that find room."""
        copies, parts, ended = [], [], []
        for name, request in [*self.live.items()]:
            shared = (
                self.refs[request.blocks[min(request.stored // self.size, len(request.blocks) - 1)]]
                > 1
            )
            if self.need(request) + shared > len(self.free):
                if len(self.live) > 1 and name == [*self.live][-1]:
                    self.release(name)  # the last gives way, and is not asked for again
                continue
            copies += self.copy_on_write(request)
            self.grow(request)
            parts.append((name, request.stored, [*request.tokens], [*request.blocks]))
            for end in range(self.size, len(request.tokens) + 1, self.size):
                self.cache.setdefault(
                    tuple(request.tokens[:end]), request.blocks[end // self.size - 1]
                )
            request.stored = len(request.tokens)
            request.left -= 1
            if request.left:
                request.tokens.append(next_token(request.tokens) + name.count("'"))
            else:
                ended.append(name)
        for name in ended:
            self.finish(name)
        return copies, parts

    def finish(self, name: str) -> None:
        self.release(name)


class SmallAdapter:
    """The adapter; `engine` is the class that is searched."""

    worlds = {  # noqa: RUF012
        "small": Requests(5, 2, "aab+3 aabb+2 b+2"),
        "tight": Requests(3, 2, "aab+3 aabb+2"),
    }
    required = ("submit", "fork", "step", "copy", "prefix hit", "eviction", "submit: NoRoomError")
    engine = SmallEngine

    def start(self, world: Requests) -> None:
        self.world, self.submitted = world, []
        self.small = self.engine(world.num_blocks, world.block_size)

    def operations(self) -> list[Operation]:
        found, small = [], self.small
        for n in self.world.numbers:
            if n not in self.submitted:
                tokens = self.world.prompt(n)
                ends = range(2, len(tokens), 2)
                hit = [small.cache.get(tuple(tokens[:end])) for end in ends]
                count = next((at for at, block in enumerate(hit) if block is None), len(hit))
                takes = -(-len(tokens) // 2) - count + sum(b in small.free for b in hit[:count])
                error = NoRoomError if takes > len(small.free) else None
                found.append(Operation("submit", (n,), error, takes))
        for name in small.live:
            if f"{name}'" not in small.live and len(name) == 1:
                found.append(Operation("fork", (name,), None, 0))
        return found + [Operation("step", progress=True)] * bool(small.live)

    def apply(self, operation: Operation) -> Step:
        name, args, *_ = operation
        if name == "submit":
            self.small.submit(f"{args[0]}", self.world.prompt(args[0]), self.world.count(args[0]))
            self.submitted.append(args[0])
            hit = self.small.live[f"{args[0]}"].stored
            return Step((), (), ["prefix hit"] * bool(hit))
        if name == "fork":
            if self.small.live[args[0]].left == 1:
                raise Forbidden("it ends at once")
            self.small.fork(args[0], f"{args[0]}'")
            return NOTHING
        copies, parts = self.small.step()
        passes = [
            Pass(who, tokens, start, slots_of(blocks, len(tokens), 2))
            for who, start, tokens, blocks in parts
        ]
        return Step((slot_pairs(copies, 2),), passes)

    def tables(self) -> dict:
        return {n: (r.blocks, r.tokens[: r.stored]) for n, r in self.small.live.items()}

    def free(self) -> list[int]:
        return self.small.free

    def ref_counts(self) -> dict[int, int]:
        return {block: count for block, count in self.small.refs.items() if count}

    def cached(self) -> dict[int, tuple[int, ...]]:
        return {block: tokens for tokens, block in self.small.cache.items()}

    def key(self) -> tuple:
        live = [
            (n, *map(tuple, (r.tokens, r.blocks)), r.left, r.stored)
            for n, r in self.small.live.items()
        ]
        cache = tuple(sorted(self.small.cache.items()))
        return tuple(live), tuple(self.small.free), cache, tuple(self.submitted)
