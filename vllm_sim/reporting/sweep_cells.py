"""The cells of a sweep: every combination of the values that options are given.

Reproduces nothing. An option with a comma list has several values (`--seed 0,1,2`); the first
option varies slowest. Each cell has a file of its own, named after what it runs, so that sweeps
share a folder and a sweep that grows keeps what is done.

    cells = expand("main.py", ["--scenario", "1", "--seed", "0,1,2"])
    cells[2].arguments, cells[2].file
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.documents import Json, told

SCRIPTS = ("main.py", "reproduce.py", "capacity.py")
SEPARATOR = {"--workload": "/"}  # whose own values have commas
PATHS = ("--lengths", "--trace")  # are never a list
OURS = ("--json", "--figures", "--timeline", "--help", "-h")  # what a cell writes is settled
MAX_CELLS = 10_000
LONGEST_NAME = 80  # characters of what varies


@dataclass(frozen=True)
class Cell:
    """One run of a script: its number in the sweep, its arguments, and the file of its result.

    `options` are what `--json` will tell of them (json_document.told).
    """

    index: int
    arguments: tuple[str, ...]
    options: Json
    file: str

    @property
    def line(self) -> str:
        """The arguments as a shell reads them."""
        return shlex.join(self.arguments)


def expand(script: str, arguments: Sequence[str]) -> list[Cell]:
    """The cells, in order. UsageError, one line, for the first that the script would refuse."""
    axes = [_values(words) for words in _options(arguments)]
    count = math.prod(len(axis) for axis in axes)
    if count > MAX_CELLS:
        raise UsageError(f"a sweep of {count:,} cells: at most {MAX_CELLS:,}")
    parser = importlib.import_module(script.removesuffix(".py")).build_parser()
    cells: list[Cell] = []
    for index, words in enumerate(product(*axes)):
        flat = tuple(word for option in words for word in option)
        try:
            options = told(vars(parser.parse_args(list(flat))))
        except UsageError as error:
            raise UsageError(f"cell {index}: {error}") from None
        varied = [option for option, axis in zip(words, axes, strict=True) if len(axis) > 1]
        name = "-".join(word.lstrip("-") for option in sorted(varied) for word in option)
        name = re.sub(r"[^A-Za-z0-9._]+", "-", name)[:LONGEST_NAME].strip("-.")
        stem = "-".join(filter(None, (script.removesuffix(".py"), name)))
        cells.append(Cell(index, flat, options, f"{stem}-{_digest([script, options])}.json"))
    found: dict[str, int] = {}
    for cell in cells:
        first = found.setdefault(_digest(cell.options), cell.index)
        if first < cell.index:
            raise UsageError(f"cells {first} and {cell.index} are the same: {cell.line}")
    return cells


def plan_file(cells: Sequence[Cell]) -> str:
    """The name of the file that lists the cells."""
    return f"sweep-{_digest([cell.file for cell in cells])}.json"


def _options(arguments: Sequence[str]) -> list[list[str]]:
    """[option] or [option, value], in order; a value may be behind "=" or a word of its own."""
    found: list[list[str]] = []
    for word in arguments:
        if word.startswith("--") or word == "-h":
            name, equals, value = word.partition("=")
            if name in OURS:
                raise UsageError(f"{name} is not for a sweep: each cell writes a file of its own")
            found.append([name, value] if equals else [name])
        elif found and len(found[-1]) == 1:
            found[-1].append(word)
        else:
            raise UsageError(f"unrecognized arguments: {word}")
    return found


def _values(words: list[str]) -> list[list[str]]:
    """One option as the words of each of its values."""
    if len(words) == 1 or words[0] in PATHS:
        return [words]
    name, text = words
    values = text.split(SEPARATOR.get(name, ","))
    if len(values) > 1 and "" in values:
        raise UsageError(f"argument {name}: {text[:40]!a} has an empty value")
    if len(set(values)) < len(values):
        raise UsageError(f"argument {name}: {text[:40]!a} has a value twice")
    return [[f"{name}={value}"] if value.startswith("-") else [name, value] for value in values]


def _digest(value: object) -> str:
    """Eight hexadecimal digits that differ for anything else."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()[:8]
