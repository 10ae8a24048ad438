"""What adapters share: a world of requests, slots of blocks, states without the names of blocks."""

from __future__ import annotations

import importlib
import marshal
import queue
import subprocess
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from itertools import permutations, product
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from vllm_sim.conformance.adapter import NotInstalledError, Operation

EMPTY: Mapping[str, dict] = MappingProxyType({})
END = 0  # the token that ends a sequence


@dataclass(frozen=True)
class Requests:
    """A world of engines: requests, each a prompt and how many tokens it generates at most.

    "aaaab+3 b+5" are two, a token a letter, so that prompts share what they begin with. Each is
    submitted at most once, in any order and at any time.
    """

    num_blocks: int
    block_size: int
    requests: str
    max_tokens: int = 8  # of an iteration
    max_seqs: int = 4
    aborts: bool = True  # whether a request may be given up
    never: tuple[str, ...] = ()  # what is required and cannot happen here

    def __str__(self) -> str:
        told = "" if self.aborts else ", no aborts"
        return f"{self.num_blocks} blocks of {self.block_size}, requests {self.requests}{told}"

    @property
    def numbers(self) -> range:
        return range(len(self.requests.split()))

    def prompt(self, number: int) -> list[int]:
        return [ord(letter) for letter in self.requests.split()[number].split("+")[0]]

    def count(self, number: int) -> int:
        """Tokens that it generates at most."""
        return int(self.requests.split()[number].split("+")[1])

    @property
    def longest(self) -> int:
        return max(len(self.prompt(number)) + self.count(number) for number in self.numbers)


class Queue(list):
    """Between two threads or processes of an engine, in one."""

    put = list.append

    def empty(self) -> bool:
        return not self

    def get_nowait(self) -> Any:
        if not self:
            raise queue.Empty
        return self.pop(0)


class Fields(SimpleNamespace):
    """A part of an engine's configuration: what is not set is None. Never copied."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __deepcopy__(self, _: dict) -> Fields:
        return self


def next_token(tokens: Sequence[int]) -> int:
    """What the model generates: for equal prefixes the same, and now and then what another
    prompt has there."""
    return ord("ab"[len(tokens) % 3 == 0])


def served(
    world: Requests, submitted: Iterable[int], live: Iterable[int], busy: bool, *more: str
) -> list[Operation]:
    """Submit what was not yet; one iteration, one in which all that generate end, while the engine
    is busy; and `more` for each request that lives."""
    there = {*submitted}
    new = [n for n in world.numbers if n not in there]
    found = [Operation("submit", (n,)) for n in new]
    if busy:
        found += [Operation("step", (), progress=True), Operation("step that ends them")]
    return found + [Operation(name, (n,)) for name in more for n in live]


def engine(
    name: str, source: Path | None, *bare: str, stand_ins: Mapping[str, dict] = EMPTY
) -> ModuleType:
    """An engine's module, from a checkout or where Python finds it. NotInstalledError.

    The packages `bare` are entered without what they import themselves: mostly a GPU's kernels.
    `stand_ins` are modules that are imported and not used, each with what must be real of it.
    """
    if source is not None and str(source.resolve()) not in sys.path:
        sys.path.insert(0, str(source.resolve()))
    try:
        for package in bare:
            if package not in sys.modules:
                parent, _, last = package.rpartition(".")
                path = sys.modules[parent].__path__ if parent else None
                spec = PathFinder.find_spec(last if not parent else package, path)
                if spec is None:
                    raise ModuleNotFoundError(f"No module named {package!r}")
                sys.modules[package] = ModuleType(package)
                sys.modules[package].__path__ = [*spec.submodule_search_locations]
        for module, real in stand_ins.items():  # only where the engine is found
            stand_in = MagicMock(name=module, __spec__=ModuleSpec(module, None), **real)
            sys.modules.setdefault(module, stand_in)
        return importlib.import_module(name)
    except Exception as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotInstalledError(
            f"{name} cannot be imported ({told}): --from DIR names it"
        ) from None


def version_of(package: str, source: Path | None) -> str:
    """The version installed, or the commit of a checkout."""
    if source is not None:
        git = ["git", "-C", str(source), "rev-parse", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, check=False)
        if not done.returncode:
            return f"commit {done.stdout[:12]}"
        found = [*source.glob(f"{package}-*.dist-info")]
        return found[0].stem.split("-")[1] if found else "unknown version"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise NotInstalledError(
            f"{package} is not installed: --from DIR names a checkout"
        ) from None


class Names:
    """Blocks in the order in which they are met."""

    def __init__(self) -> None:
        self._names: dict[Hashable, int] = {}

    def __call__(self, blocks: Iterable[Hashable]) -> tuple[int, ...]:
        return tuple([self._names.setdefault(block, len(self._names)) for block in blocks])


def slots_of(blocks: Sequence[int], count: int, size: int) -> list[int]:
    """The slots of a sequence's first `count` positions."""
    return [blocks[position // size] * size + position % size for position in range(count)]


def slot_pairs(pairs: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """(source, target) blocks as slots."""
    return [(old * size + at, new * size + at) for old, new in pairs for at in range(size)]


def canonical(rows: Iterable[tuple[tuple, Sequence[int]]]) -> bytes:
    """Tables without the names of blocks and sequences: rows of (what is known of it, its blocks).

    Blocks are named in the order in which they are met, going through the tables in the order of
    what is known of them; where that leaves a choice, all choices are tried and the least counts.
    """
    rows = sorted((known, tuple(blocks)) for known, blocks in rows)
    # Tables that hold the same blocks are equal in all respects: they stay together.
    ties: list[list[list]] = []
    last: tuple | None = None
    for known, blocks in rows:
        if known != last:
            ties.append([])
            last = known
        if not ties[-1] or ties[-1][-1][0] != blocks:
            ties[-1].append([blocks, 0])
        ties[-1][-1][1] += 1
    if all(len(tie) == 1 for tie in ties):
        named = _named([tie[0] for tie in ties])
    else:
        orders = product(*map(permutations, ties))
        named = min(_named([table for tie in order for table in tie]) for order in orders)
    return marshal.dumps(([known for known, _ in rows], named), 0)  # as bytes it is small


def _named(tables: list[list]) -> list[int]:
    """Tables (blocks, how many hold just these) with blocks named in order."""
    names: dict[int, int] = {}
    result = []
    for blocks, count in tables:
        result.append(count)
        result += [names.setdefault(block, len(names)) for block in blocks]
    return result
