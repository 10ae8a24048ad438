"""Documents of --json, read back: what is not one is refused in one line.

Reproduces nothing. The whole form is in docs/schema.json; this is what merging relies on, checked
without a package for it.

    read_document(Path("results/sweep/main-seed-0-1f0c2d3e.json"))["tables"]
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NoReturn

from command_line import UsageError
from input_files import read_bounded
from json_document import SCHEMA, Json

MAX_BYTES = 64 << 20
LARGEST = 1e300  # so that sums stay finite


def read_document(path: Path) -> Json:
    """A document of this version of the schema. UsageError names the file and what is wrong."""
    try:
        found = json.loads(_text(path), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not JSON: {reason}") from None
    if not isinstance(found, dict) or "schema" not in found:
        raise UsageError(f"{path}: not what --json writes: it has no schema")
    if found["schema"] != SCHEMA:
        told = json.dumps(found["schema"])[:60]
        raise UsageError(f"{path}: its schema is {told}, not {json.dumps(SCHEMA)}")
    wrong = _wrong(found)
    if wrong:
        raise UsageError(f"{path}: not as docs/json.md has it: {wrong}")
    return found


def _text(path: Path) -> str:
    """A regular file of UTF-8. Raises UsageError, ValueError."""
    try:
        if path.is_dir():
            raise UsageError(f"{path}: a directory; name its files, {path.name or '.'}/*.json")
        data = read_bounded(path, MAX_BYTES)
        if data is None:
            raise UsageError(f"{path}: more than {MAX_BYTES >> 20} MiB")
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: cannot be read: {reason}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _wrong(found: Json) -> str:
    """What is not as the schema has it, in words; empty if all of this is."""
    for key, kind in (("script", str), ("options", dict), ("seeds", list), ("setting", dict),
                      ("tables", list), ("checks", list)):  # fmt: skip
        if not isinstance(found.get(key), kind):
            return f"no {key}" if key not in found else f"{key} is of another type"
    if found.get("exit_code") not in (0, 1, 2) or isinstance(found["exit_code"], bool):
        return "exit_code is not 0, 1 or 2"
    if not isinstance(found.get("error", ""), str):
        return "error is not text"
    if not all(type(seed) is int for seed in found["seeds"]):
        return "seeds are not integers"
    for name, value in found["options"].items():
        values = value if isinstance(value, list) else [value]
        if not all(_is_cell(one) for one in values):
            return f"option {name[:40]!a} is no value"
    for check in found["checks"]:
        if not isinstance(check, dict) or not (
            isinstance(check.get("name"), str) and isinstance(check.get("detail"), str)
            and isinstance(check.get("ok"), bool)
        ):  # fmt: skip
            return "a check has no name, ok and detail"
    return next(filter(None, map(_wrong_table, found["tables"])), "")


def _wrong_table(table: object) -> str:
    if not isinstance(table, dict) or not isinstance(table.get("id"), str):
        return "a table has no id"
    name = f"table {table['id'][:40]!a}"
    index, rows = table.get("index"), table.get("rows")
    if not isinstance(index, list) or not all(isinstance(key, str) for key in index):
        return f"{name} has no index"
    if not isinstance(rows, list):
        return f"{name} has no rows"
    seen = set()
    for row in rows:
        if not isinstance(row, dict) or not set(index) <= row.keys():
            return f"{name}: a row lacks a key of the index"
        for key, value in row.items():
            if key in index and not (isinstance(value, dict) or _is_cell(value)):
                return f"{name}: {key[:40]!a} says not which row it is"
            if isinstance(value, int | float) and not _is_cell(value):
                return f"{name}: {key[:40]!a} is no finite number"
        if index:
            which = json.dumps([row[key] for key in index])
            if which in seen:
                return f"{name}: two rows are {which[:80]}"
            seen.add(which)
    return ""


def _is_cell(value: object) -> bool:
    """Text, a finite number, true, false or null."""
    if isinstance(value, int | float):
        return abs(value) <= LARGEST and math.isfinite(value)
    return value is None or isinstance(value, str)
