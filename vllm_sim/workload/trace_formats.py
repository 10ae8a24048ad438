"""The formats of request traces, told by their content: Azure, BurstGPT, Mooncake, named columns.

Reproduces nothing of the paper. A file is plain or gzipped, whatever its name:

    Azure     CSV: TIMESTAMP, ContextTokens, GeneratedTokens
    BurstGPT  CSV: Timestamp (s), Model, Request tokens, Response tokens, Total tokens, Log Type
    Mooncake  a JSON object a line: timestamp, input_length, output_length, hash_ids
    CSV, JSON lines   any other with columns, or keys, that COLUMNS knows

    form, rows = find_format(name, read_text(name))
    for place, row in rows:
        tokens_of(form, row), row[form.time]        # RowError: why the row is refused

traces.py makes a Trace of the rows, trace_times.py understands their times; docs/capacity.md lists
formats, columns and reasons.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from vllm_sim.workload.requests import MAX_LENGTH
from vllm_sim.workload.text_files import Line, WorkloadError, find_separator, read_csv, shown

# What a column may be called; all but letters and digits, and capitals, do not matter. The first
# names in a line that a file has go before those in the lines below.
COLUMNS = {
    "prompt": (
        "prompt_tokens input_tokens ContextTokens input_length prompt_length request_tokens "
        "input_len prompt_len num_prompt_tokens num_input_tokens num_prefill_tokens "
        "prefill_tokens n_prompt_tokens isl",
        "prompt input",
    ),
    "output": (
        "completion_tokens output_tokens GeneratedTokens output_length response_tokens output_len "
        "completion_length response_length completion_len response_len num_output_tokens "
        "num_completion_tokens num_decode_tokens num_generated_tokens decode_tokens "
        "generation_tokens n_generated_tokens osl",
        "completion response output",
    ),
    "time": (
        "arrival_time arrival arrivals arrival_times arrival_timestamp arrived_at",
        "timestamp time timestamps times ts datetime request_time created_at created",
        "start_time start started_at start_timestamp",
    ),
    "total": ("total_tokens num_total_tokens total_length total_len",),
}
SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "millis", "milliseconds"), 1e-3),
    **dict.fromkeys(("us", "usec", "micros", "microseconds"), 1e-6),
    **dict.fromkeys(("ns", "nanos", "nanoseconds"), 1e-9),
}
AZURE = {"timestamp", "contexttokens", "generatedtokens"}
BURSTGPT = {"timestamp", "model", "requesttokens", "responsetokens"}
MOONCAKE = {"timestamp", "inputlength", "outputlength"}
NUMBER = re.compile(r"-?[0-9]{1,15}(\.(?!000$)0*)?")  # 1.000 may be one or, of Excel, a thousand
THOUSANDS = re.compile("[0-9]{1,3}(?:[ ,'\u00a0\u2009\u202f][0-9]{3})+")
FAILED = "failed: 0 response tokens"


class RowError(Exception):
    """One row cannot be served; the message is the reason, the same for all rows alike."""


# 'file, line n', and the cells or keys of the line, or why it is refused.
Row = tuple[str, Mapping[str, object] | RowError]


@dataclass(frozen=True)
class Format:
    """Which cell or key holds what. `unit_s`: seconds of a unit of the times, where it is named."""

    name: str
    prompt: str
    output: str | None  # None: what the total is above the prompt
    total: str | None
    time: str | None
    unit_s: float | None
    hashed: bool = False  # the rows may have hash_ids
    decimal_comma: bool = False  # the cells may be written as 0,5


def find_format(name: str, lines: Iterator[Line]) -> tuple[Format, Iterator[Row]]:
    """The format of a file's lines, and its rows. WorkloadError if it is none."""
    place, first = next(lines, (name, ""))
    if not first:
        raise WorkloadError(f"{name}: the file is empty")
    lines = chain([(place, first)], lines)
    if first.lstrip().startswith("{"):
        row = _object(first)
        if isinstance(row, RowError):
            raise WorkloadError(f"{place}: no trace of a known format: {row}: {first[:60]!a}")
        return _format(place, list(row), None), ((place, _object(text)) for place, text in lines)
    separator, lines = find_separator(lines)
    rows = read_csv(lines, separator)
    place, header = next(rows, (place, [first]))
    form = _format(place, header, separator)
    return form, _csv_rows(form, header, rows)


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


# {plain name: (role, rank, seconds of a unit or None)}; a time may be called by its unit as well.
KNOWN = {
    _plain(name) + unit: (role, rank, seconds)
    for role, ranks in COLUMNS.items()
    for rank, names in enumerate(ranks)
    for name in names.split()
    for unit, seconds in {"": None, **(SECONDS if role == "time" else {})}.items()
}


def _known(name: str) -> tuple[str, int, float | None]:
    """(role, rank, seconds of a unit) of a column, or of a key, which may lie in another."""
    return KNOWN.get(_plain(name)) or KNOWN.get(_plain(name.rpartition(".")[2])) or ("", 0, None)


def _format(place: str, names: Sequence[str], separator: str | None) -> Format:
    """The format with these columns, or keys where nothing separates. Raises WorkloadError."""
    what = "key" if separator is None else "column"
    found: dict[str, str] = {}
    for role, ranks in COLUMNS.items():
        ranked = [[n for n in names if _known(n)[:2] == (role, rank)] for rank in range(len(ranks))]
        named = next(filter(None, ranked), [])
        if len(named) > 1:
            both = " and ".join(f"{name[:30]!a}" for name in named[:2])
            raise WorkloadError(f"{place}: {both} could both be the {role}: keep one {what}")
        if named:
            found[role] = named[0]
    missing = [role for role in ("prompt", "output") if role not in found]
    if missing and not ("prompt" in found and "total" in found):
        split = "" if separator is None else f", separated by {separator!a}"
        wanted = "; ".join(f"{r}: {', '.join(COLUMNS[r][0].split()[:6])} ..." for r in missing)
        raise WorkloadError(
            f"{place}: no trace of a known format: its {what}s{split}: {shown(names)}; wanted "
            f"is one for the {wanted} (capitals, blanks, _ and - do not matter)"
        )
    plain, time = {_plain(name) for name in names}, found.get("time")
    if separator is None:
        form = "Mooncake JSON lines" if plain >= MOONCAKE else "JSON lines"
    else:
        form = "Azure" if plain >= AZURE else "BurstGPT" if plain >= BURSTGPT else "plain"
        form += " CSV"
    columns = found["prompt"], found.get("output"), found.get("total"), time
    unit_s = None if time is None else _known(time)[2]
    return Format(form, *columns, unit_s, separator is None, separator not in (None, ","))


def line_of(place: str) -> int:
    """The number at the end of a place."""
    return int(place.rpartition(" ")[2])


def _csv_rows(
    form: Format, header: list[str], rows: Iterator[tuple[str, list[str]]]
) -> Iterator[Row]:
    """(place, {column: cell} of the columns that matter, or why the row is refused)."""
    names = [name for name in (form.prompt, form.output, form.total, form.time) if name is not None]
    wanted = [(name, header.index(name)) for name in names]
    for place, cells in rows:
        if len(cells) != len(header):
            yield place, RowError("more or fewer cells than the header")
        else:
            yield place, {name: cells[index] for name, index in wanted}


def _object(text: str) -> dict[str, object] | RowError:
    """A JSON object, with what lies in an object of it under 'its key.the other's' as well."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also for a number of 5,000 digits
        return RowError("not a JSON object")
    if not isinstance(row, dict):
        return RowError("not a JSON object")
    inner = [(name, value) for name, value in row.items() if isinstance(value, dict)]
    return row | {f"{name}.{key}": one for name, value in inner for key, one in value.items()}


def tokens_of(form: Format, row: Mapping[str, object]) -> tuple[int, int]:
    """(prompt, output); RowError unless both are whole and positive."""
    prompt = _count("prompt", row.get(form.prompt))
    if form.output is not None:
        output = _count("output", row.get(form.output))
    else:
        output = _count("total", row.get(form.total)) - prompt
    if prompt < 0 or output < 0:
        raise RowError("negative tokens")
    if output == 0:
        raise RowError(FAILED if form.name.startswith("BurstGPT") else "an output of 0 tokens")
    if prompt == 0:
        raise RowError("a prompt of 0 tokens")
    if max(prompt, output) > MAX_LENGTH:
        raise RowError(f"more than {MAX_LENGTH:,} tokens")
    return prompt, output


def _count(role: str, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and THOUSANDS.fullmatch(text):
        text = re.sub("[^0-9]", "", text)
    if not isinstance(text, str) or not NUMBER.fullmatch(text):
        raise RowError(f"the {role} is not a number of tokens")
    return int(text.partition(".")[0])


def hash_ids(row: Mapping[str, object]) -> tuple[int, ...]:
    """Mooncake's ids of the prompt's blocks, none if there are none; RowError."""
    ids = row.get("hash_ids") or []
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise RowError("hash_ids are not whole numbers")
    return tuple(ids)


def block_of(prompts: Sequence[int], hashes: Sequence[Sequence[int]]) -> int:
    """Tokens of a prefix block, such that ceil(prompt / block) are the ids of nine rows in ten.

    The powers of two are tried; 0 if none is it.
    """
    pairs = [(prompt, len(ids)) for prompt, ids in zip(prompts, hashes) if ids]
    sizes = [2**power for power in range(15)]
    fits = [sum(-(-prompt // size) == count for prompt, count in pairs) for size in sizes]
    return sizes[fits.index(max(fits))] if pairs and max(fits) >= 0.9 * len(pairs) else 0
