"""What generate.py shows: the texts, where the memory went, and what others would have taken.

Reproduces: the presentation only. The parts of the memory are those of Fig. 2, the share of blocks
saved is that of Fig. 15.

    for line in lines(found, "plain"):
        print(line)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kv_cache_manager import MemoryUsage
from vllm_sim.reporting.tables import Table, counted, render, wrapped

PARTS = {
    "tokens": "slots with a token's K and V, a shared one once",
    "padding": "unfilled slots of last blocks",
    "free": "free slots",
    "logical_tokens": "tokens that the sequences hold, each for itself",
    "logical_blocks": "blocks that they would take without sharing",
    "physical_blocks": "blocks that they take",
}


@dataclass(frozen=True, slots=True)
class Generated:
    """All that one call found. Bytes are of K and V in all layers."""

    setting: str
    texts: Sequence[str]
    num_prompt_tokens: int
    num_new_tokens: Sequence[int]
    fullest: MemoryUsage  # the moment with the most blocks
    last: MemoryUsage
    num_copies: int
    num_forwards: int
    bytes_held: dict[str, int]  # by cache
    same_texts: int  # of the library's own cache
    exact: bool  # float32: all must be the same

    @property
    def ok(self) -> bool:
        return not self.exact or self.same_texts == len(self.texts)

    def check(self) -> dict:
        """As a check of the JSON document."""
        detail = f"{self.same_texts} of {counted(len(self.texts), 'text')}"
        return {"name": "the text of the library's own cache", "ok": self.ok, "detail": detail}


def tables(found: Generated) -> list[Table]:
    """Where the memory went, and the bytes that each cache takes."""
    moments = found.fullest, found.last
    rows = [(told, *(getattr(m, part) for m in moments)) for part, told in PARTS.items()]
    saved = [round(100 * m.saved, 1) for m in moments]
    rows.append(("% of blocks saved by sharing", *saved))
    headers, keys = ("", "at the fullest", "at the end"), ("what", "fullest", "last")
    where = Table("Where the memory went", headers, rows, name="memory", keys=keys)
    paged = found.bytes_held["paged, blocks in use"]
    rows = [(name, size, size / paged) for name, size in found.bytes_held.items()]
    headers, keys = ("cache", "bytes", "x paged"), ("cache", "bytes", "times_paged")
    setting = "K and V of all layers, each at its largest"
    held = Table("What it takes", headers, rows, setting, 2, name="bytes", keys=keys)
    return [where, held]


def lines(found: Generated, fmt: str) -> list[str]:
    """What is printed, in order; ASCII."""
    comment = "% " if fmt == "latex" else ""
    shown = [wrapped(found.setting, comment), ""]
    for number, (text, length) in enumerate(zip(found.texts, found.num_new_tokens), start=1):
        shown.append(f"{comment}Text {number} ({counted(length, 'new token')})")
        shown += [wrapped(line, comment + "  ") for line in ascii_text(text).split("\n")] + [""]
    for table in tables(found):
        shown += [render(table, fmt), ""]
    copies = counted(found.num_copies, "block")
    told = f"{copies} copied on write in {counted(found.num_forwards, 'forward')}. "
    check = found.check()
    result = "as" if found.ok else "FAILED: not as"
    told += f"{check['detail']} {result} with the library's own cache"
    told += "." if found.exact else " (float16: rounding may choose another token)."
    return [*shown, wrapped(told, comment)]


def ascii_text(text: str) -> str:
    """Lines stay; what is not ASCII is escaped, as batch logs may have no other."""
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    return text.encode("ascii", "backslashreplace").decode("ascii")
