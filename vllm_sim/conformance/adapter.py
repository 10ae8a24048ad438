"""What a manager of KV-cache blocks shows to be searched: an adapter of at most eight methods.

Makes sections 4.2-4.5 of the paper testable in any engine. An adapter drives one engine in one
small world. It calls the engine, copies no line of it, and says what each call did to the slots.
docs/conformance.md has a complete one. Blocks are numbers 0 to `world.num_blocks` - 1, a slot is
`block * world.block_size + offset`. States are copied (`copy.deepcopy`, so `__deepcopy__` makes it
quick); a class with `replayed = True` is called again from the start instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

Tables = dict[Any, tuple[Sequence[int], Sequence[int]]]


class Fault(AssertionError):
    """Something that must hold does not. `check` names what, the message says where."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


class Forbidden(Exception):
    """The engine refuses, and may: raised by an adapter, it ends this way of going on.

    `where` is the place at which the engine says so. Without one it is reported apart from faults:
    what an engine forbids without saying so.
    """

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(what)
        self.where = where


class NotInstalledError(Exception):
    """The engine is not there, or not one that the adapter knows; the message is one line."""


class Operation(NamedTuple):
    """One call. Two of the same name and arguments are the same."""

    name: str
    arguments: tuple = ()
    refusal: type[Exception] | None = None  # must be refused with just this, and change nothing
    takes: int | None = None  # blocks that it must take, less those that it gives back
    progress: bool = False  # the one that brings all requests to their end if it is repeated

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.arguments))})"


class Pass(NamedTuple):
    """One sequence's part of a forward: K and V of `tokens[start:]` are written, then the slots of
    all positions from `first` on are read. `slots[p]` is where position p is read, `writes` where
    the new ones are written if not there."""

    sequence: Any
    tokens: Sequence[int]  # from the first of the prompt to the last that is computed
    start: int
    slots: Sequence[int]
    writes: Sequence[int] | None = None
    first: int = 0


@dataclass(slots=True)
class Step:
    """What an operation did: stages of copies, all pairs (source slot, target slot) of one at once,
    then one forward, then the names of events that its engine knows of."""

    copies: Iterable[Iterable[tuple[int, int]]] = ()
    passes: Sequence[Pass] = ()
    events: Sequence[str] = ()


NOTHING = Step()
World = Any  # has num_blocks and block_size, and may have `never`: required, and not here


class Adapter(Protocol):
    """The eight methods, what the search must have met, and the worlds by name; with
    `cache_holds = True` a cached block that nobody uses is not free."""

    worlds: ClassVar[dict[str, World]]
    required: ClassVar[tuple[str, ...]]

    # Build the engine; a Step if that writes a slot.
    def start(self, world: World) -> Step | None: ...

    # What may be called now.
    def operations(self) -> Sequence[Operation]: ...

    # Call it: a Step, or several, says which slots were copied, written and read.
    def apply(self, operation: Operation) -> Step | list[Step]: ...

    # {sequence: (its blocks in order, the tokens whose K and V they hold)}
    def tables(self) -> Tables: ...

    # The free blocks.
    def free(self) -> Sequence[int]: ...

    # A value that two states share if and only if they behave alike.
    def key(self) -> Any: ...

    # {block: references}, or None if there are none to compare.
    def ref_counts(self) -> dict[int, int] | None: ...

    # {block: all tokens up to its end, which it stands for}, if prefixes are kept.
    def cached(self) -> dict[int, Sequence[int]]: ...
