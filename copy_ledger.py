"""Which tokens are held twice because of copy-on-write.

Reproduces: the cost side of section 4.4. A copy-on-write copies the filled slots of one block, so
for as long as both blocks live their tokens take up memory twice; the accounting shows them as
`duplicates`.
"""

from __future__ import annotations

from collections.abc import Iterable


class CopyLedger:
    """Which blocks descend from which by copy-on-write: the source of `duplicates`.

    A copy of a block with f filled slots holds those f tokens a second time for as long as some
    other block that holds them lives. Copies of copies (beam search) form trees; a dead ancestor
    still tells its descendants apart, and disappears with the last of them.
    """

    __slots__ = ("nodes",)

    class Node:
        __slots__ = ("copied", "parent")

        def __init__(self, parent: CopyLedger.Node | None, copied: int) -> None:
            self.parent = parent
            self.copied = copied  # leading slots that came from the parent

    def __init__(self) -> None:
        self.nodes: dict[int, CopyLedger.Node] = {}

    def record(self, source: int, destination: int, filled: int) -> None:
        """`destination` now holds a copy of the first `filled` slots of `source`."""
        nodes = self.nodes
        parent = nodes.get(source)
        if parent is None:
            parent = nodes[source] = CopyLedger.Node(None, 0)
        nodes[destination] = CopyLedger.Node(parent, filled)

    def forget(self, blocks: Iterable[int]) -> None:
        """The blocks were freed."""
        if self.nodes:
            for block in blocks:
                self.nodes.pop(block, None)

    def move_to(self, other: CopyLedger, pairs: Iterable[tuple[int, int]]) -> None:
        """The blocks were swapped: their history goes along, here they are gone."""
        for source, destination in pairs:
            node = self.nodes.pop(source, None)
            if node is not None:
                other.nodes[destination] = node

    def duplicates(self) -> int:
        """Tokens held more than once, counting each extra holder, in slots of this pool."""
        here = set(self.nodes.values())
        seen: set[tuple[CopyLedger.Node, int]] = set()
        count = 0
        for node in here:
            for slot in range(node.copied):
                writer = node
                while slot < writer.copied:
                    assert writer.parent is not None
                    writer = writer.parent
                if writer in here or (writer, slot) in seen:
                    count += 1
                seen.add((writer, slot))
        return count
