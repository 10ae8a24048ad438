"""The formats of request traces, told by their content: Azure, BurstGPT, Mooncake, named columns.

Reproduces nothing of the paper. A file is plain or gzipped, whatever its name:

    Azure     CSV: TIMESTAMP, ContextTokens, GeneratedTokens
    BurstGPT  CSV: Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type
    Mooncake  a JSON object a line: timestamp (ms), input_length, output_length, hash_ids
    CSV, JSON lines   any other with columns, or keys, that COLUMNS knows

    form, rows = find_format(name, read_text(name))
    for place, row in rows:
        tokens_of(form, row), moment_of(form, row)      # RowError: why the row is refused

traces.py makes a Trace of the rows; docs/capacity.md lists formats, columns and reasons.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain

from vllm_sim.workload.requests import MAX_LENGTH
from vllm_sim.workload.text_files import Line, WorkloadError, read_csv

# What a column may be called, with all but letters and digits left out, in lower case.
COLUMNS = {
    role: names.split()
    for role, names in {
        "prompt": "contexttokens requesttokens inputlength inputlen inputtokens numinputtokens "
        "promptlength promptlen prompttokens numprompttokens numprefilltokens prompt input",
        "output": "generatedtokens responsetokens outputlength outputlen outputtokens "
        "numoutputtokens completiontokens numdecodetokens completion response output",
        "time": "timestamp timestamps time times arrival arrivals arrivaltime arrivaltimes "
        "arrivedat starttime",
        "time in ms": "timestampms timems arrivalms arrivaltimems",
    }.items()
}
AZURE = {"timestamp", "contexttokens", "generatedtokens"}
BURSTGPT = {"timestamp", "model", "requesttokens", "responsetokens"}
MOONCAKE = {"timestamp", "inputlength", "outputlength"}
HASH_BLOCK = 512  # tokens of one of Mooncake's prefix blocks
LATEST_S = 1e11  # seconds since 1970; milliseconds of today are more
NUMBER = re.compile(r"-?[0-9]{1,15}(\.0*)?")
FAILED = "failed: 0 response tokens"


class RowError(Exception):
    """One row cannot be served; the message is the reason, the same for all rows alike."""


# 'file, line n', and the cells or keys of the line, or why it is refused.
Row = tuple[str, Mapping[str, object] | RowError]


@dataclass(frozen=True)
class Format:
    """Which cell or key holds what. `unit_s` is the seconds of one unit of the times."""

    name: str
    prompt: str
    output: str
    time: str | None
    unit_s: float
    hashed: bool = False  # the rows may have hash_ids


def find_format(name: str, lines: Iterator[Line]) -> tuple[Format, Iterator[Row]]:
    """The format of a file's lines, and its rows. WorkloadError if it is none."""
    place, first = next(lines, (name, ""))
    if not first:
        raise WorkloadError(f"{name}: the file is empty")
    if first.startswith("{"):
        return _json_format(place, first), _json_rows(place, first, lines)
    rows = read_csv(chain([(place, first)], lines))
    place, header = next(rows)
    form = _csv_format(place, header)
    return form, _csv_rows(form, header, rows)


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _choose(place: str, names: Sequence[str], what: str) -> dict[str, str]:
    """{prompt, output, time, time in ms: the name that stands for it}. Raises WorkloadError."""
    found: dict[str, str] = {}
    for role, known in COLUMNS.items():
        named = [name for name in names if _plain(name) in known]
        if len(named) > 1:
            shown = " and ".join(f"{name[:30]!a}" for name in named[:2])
            raise WorkloadError(f"{place}: {shown} could both be the {role}: keep one {what}")
        if named:
            found[role] = named[0]
    missing = [role for role in ("prompt", "output") if role not in found]
    if missing:
        wanted = "; ".join(f"{role}: {', '.join(COLUMNS[role][:7])}" for role in missing)
        raise WorkloadError(
            f"{place}: no trace of a known format: no {what} is one of those for the {wanted} ... "
            "(capitals, blanks, _ and - do not matter)"
        )
    if "time" in found and "time in ms" in found:
        raise WorkloadError(f"{place}: a time in seconds and one in milliseconds: keep one {what}")
    return found


def _csv_format(place: str, header: list[str]) -> Format:
    found = _choose(place, header, "column")
    plain = {_plain(name) for name in header}
    name = "Azure CSV" if plain >= AZURE else "BurstGPT CSV" if plain >= BURSTGPT else "plain CSV"
    time = found.get("time") or found.get("time in ms")
    unit = 1e-3 if "time in ms" in found else 1.0
    return Format(name, found["prompt"], found["output"], time, unit)


def _json_format(place: str, first: str) -> Format:
    row = _object(first)
    if isinstance(row, RowError):
        raise WorkloadError(f"{place}: no trace of a known format: {row}")
    found = _choose(place, list(row), "key")
    mooncake = {_plain(name) for name in row} >= MOONCAKE
    time = found.get("time") or found.get("time in ms")
    unit = 1e-3 if mooncake or "time in ms" in found else 1.0
    return Format(
        "Mooncake JSON lines" if mooncake else "JSON lines",
        found["prompt"],
        found["output"],
        time,
        unit,
        hashed=True,
    )


def line_of(place: str) -> int:
    """The number at the end of a place."""
    return int(place.rpartition(" ")[2])


def _csv_rows(
    form: Format, header: list[str], rows: Iterator[tuple[str, list[str]]]
) -> Iterator[Row]:
    """(place, {column: cell} of the columns that matter, or why the row is refused)."""
    names = [name for name in (form.prompt, form.output, form.time) if name is not None]
    wanted = [(name, header.index(name)) for name in names]
    for place, cells in rows:
        if len(cells) != len(header):
            yield place, RowError("more or fewer cells than the header")
        else:
            yield place, {name: cells[index] for name, index in wanted}


def _json_rows(place: str, first: str, lines: Iterator[Line]) -> Iterator[Row]:
    yield place, _object(first)
    for place, text in lines:
        yield place, _object(text)


def _object(text: str) -> dict[str, object] | RowError:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also for a number of 5,000 digits
        return RowError("not a JSON object")
    return row if isinstance(row, dict) else RowError("not a JSON object")


def tokens_of(form: Format, row: Mapping[str, object]) -> tuple[int, int]:
    """(prompt, output); RowError unless both are whole and positive."""
    counts = []
    for role, name in (("prompt", form.prompt), ("output", form.output)):
        value = row.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str) or not NUMBER.fullmatch(text):
            raise RowError(f"the {role} is not a number of tokens")
        counts.append(int(text.partition(".")[0]))
    prompt, output = counts
    if prompt < 0 or output < 0:
        raise RowError("negative tokens")
    if output == 0:
        raise RowError(FAILED if form.name.startswith("BurstGPT") else "an output of 0 tokens")
    if prompt == 0:
        raise RowError("a prompt of 0 tokens")
    if max(counts) > MAX_LENGTH:
        raise RowError(f"more than {MAX_LENGTH:,} tokens")
    return prompt, output


def moment_of(form: Format, row: Mapping[str, object]) -> tuple[float, bool]:
    """(seconds, whether it is a date); a date without a time zone is taken for UTC."""
    if form.time is None:
        return 0.0, False
    value = row.get(form.time)
    try:
        # float() would take '1_0', digits of other scripts, and True.
        spelt = isinstance(value, str) and value.isascii() and "_" not in value
        if spelt or type(value) in (int, float):
            seconds = float(value) * form.unit_s
            if LATEST_S < seconds < math.inf:
                raise RowError("a time after the year 5000: milliseconds, under another name?")
            if abs(seconds) < math.inf:
                return seconds, False
    except (ValueError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp(), True
    except (TypeError, ValueError, OverflowError):
        raise RowError("the time is not one") from None


def hash_ids(row: Mapping[str, object]) -> tuple[int, ...]:
    """Mooncake's ids of the prompt's blocks, none if there are none; RowError."""
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise RowError("hash_ids are not whole numbers")
    return tuple(ids)
