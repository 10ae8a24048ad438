"""What options are made of: a parser whose mistakes take one line, files by name, whole numbers.

Every option that names a file has a FileName as its type, which says whether the script reads or
writes it: so that no parser lets an output be an input.

    parser = OneLineParser(description="...")
    parser.add_argument("--trace", type=file_name)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from vllm_sim.reporting.command_line import UsageError

STANDARD = Path("/dev/stdout")  # what `-` stands for where a file is written
Named = list[tuple[str, Path]]  # the option that names a file, and the file


class Known(str):
    """A name that a script knows; in an f-string it reads as the user wrote it."""

    def __format__(self, spec: str) -> str:
        return format(self.written, spec)

    @classmethod
    def among(cls, names: Collection[str], text: str) -> Known | None:
        """The name that is this text in any case, if one is."""
        found = [name for name in names if str(name).lower() == text.lower()]
        if not found or not isinstance(found[0], str):
            return None
        known = cls(found[0])
        known.written = text
        return known


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake takes one line, without the usage."""

    def error(self, message: str):
        raise UsageError(message)

    def _print_message(self, message: str, file=None) -> None:
        print(message, end="", file=file)  # argparse itself passes over a full disk

    def _get_value(self, action: argparse.Action, text: str):
        """One of the choices in any case; anything else is refused as it was written."""
        return Known.among(action.choices or (), text) or super()._get_value(action, text)

    def parse_known_args(self, args=None, namespace=None):  # parse_args comes here too
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word[-3:] == "=--":  # argparse would take it for no value
                self.error(f"argument {word[:-3]}: expected one argument")
        found, rest = super().parse_known_args(args, namespace)
        keep_apart(*self.files(found))
        return found, rest

    def files(self, args: argparse.Namespace) -> tuple[Named, Named]:
        """What these arguments read, and what they write; of a folder, the files in it."""
        given = []
        for action in self._actions:
            if isinstance(action.type, FileName) and (value := getattr(args, action.dest)):
                given += [(action, one) for one in (value if isinstance(value, list) else [value])]
        names = {os.path.basename(value) for _, value in given}
        found: tuple[Named, Named] = [], []
        for action, value in given:
            paths = action.type.files(value, names)
            found[action.type.written].extend((action.option_strings[-1], path) for path in paths)
        return found


@dataclass(frozen=True)
class FileName:
    """For argparse: the name of a file or folder, and whether the script reads or writes it.

    An empty one, of a variable that is not set say, is not the current folder. `within` says which
    files of a folder count ('*.png'); `known` are names that stand for no file.
    """

    kind: str
    written: bool = False
    within: str = ""
    known: Collection[str] = ()

    def __call__(self, text: str) -> Path | str:
        if not text.strip():
            raise argparse.ArgumentTypeError(f"{text[:40]!a} names no {self.kind}")
        if self.known:  # a name in any case, unless there is a file of that name
            there = text not in self.known and os.path.exists(text)
            return (None if there else Known.among(self.known, text)) or text
        return STANDARD if self.written and text == "-" else Path(text)

    def files(self, value: Path | str, names: Collection[str]) -> list[Path]:
        """The files that a value stands for: in a folder that is written, of these names too."""
        if value in self.known:
            return []
        if not self.within or not (os.path.isdir(value) or self.written):
            return [Path(value)]
        with suppress(OSError, ValueError):  # it may not be there yet
            names = [*os.listdir(value), *(names if self.written else ())]
        found = [Path(value, name) for name in names if fnmatch(name, self.within)]
        return [Path(value), *found] if self.written else found  # no file may be in its place


def keep_apart(reads: Named, writes: Named) -> None:
    """UsageError for an output that is an input, or another output, however it is spelt."""
    taken = {_identity(path): (option, False) for option, path in reads}
    for option, path in writes:
        other, written = taken.setdefault(_identity(path), (option, True))
        if not written:
            raise UsageError(f"{option} {path} would overwrite what {other} reads")
        if other != option:
            raise UsageError(f"{other} and {option} are the same file, {path}")


def _identity(path: Path) -> object:
    """The same for two names of one file, through links too, also where it is not there yet."""
    with suppress(OSError, ValueError):  # a zero byte: whoever opens it will tell
        path = os.path.realpath(path)
        found = os.stat(path)
        return found.st_dev, found.st_ino
    return str(path)


def whole(values: range, wanted: str, text: str) -> int:
    """A whole number among these values, for argparse; another text is not what is wanted."""
    if text.isascii() and text.isdigit() and len(text) < 20 and int(text) in values:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text[:40]!a} is not {wanted}")


positive = partial(whole, range(1, 10**12), "a positive integer of at most 12 digits")
seed = partial(whole, range(2**32), "an integer from 0 to 2**32 - 1")
file_name = FileName("file")
folder = FileName("folder ('.' is the current one)", within="*")
TIME_UNITS = ("s", "ms", "us", "ns")  # of --time-unit
