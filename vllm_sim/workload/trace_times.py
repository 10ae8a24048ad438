"""What the times of a trace mean: numbers in some unit, dates, or times of day.

Reproduces nothing of the paper. A column is understood as a whole, by its name, its size, its
fractions and the blocks of its hash_ids; what was understood is told in words.

    told, seconds = understand(values, form, block=512)
    # 'times in milliseconds, as blocks of 512 tokens say'; a second count or a reason for each
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise

from vllm_sim.workload.text_files import WorkloadError
from vllm_sim.workload.trace_formats import SECONDS, Format

WORDS = {1.0: "seconds", 1e-3: "milliseconds", 1e-6: "microseconds", 1e-9: "nanoseconds"}
SAID = {512: 1e-3, 16: 1.0}  # by tokens of a block: Mooncake's unit, and Bailian's
EPOCH_S = 9e8, 5e9  # seconds since 1970 of any recent day
LATEST_S = 1e11  # seconds since 1970; milliseconds of today are more
DAY_S, CLOCK = 86_400.0, "times of day"
BACK_S = DAY_S / 4  # that a time of day goes back by from one day to the next; a row late, by less
NO_TIME, ANOTHER = "the time is not one", "the time is of another kind than in the rows above"
LATE = "a time after the year 5000: in another unit? (--time-unit)"
# Beside ISO 8601; of two that read a column equally well the first is taken.
DATES = ("%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%d-%m-%Y", "%Y/%m/%d", "%m/%d/%y", "%d.%m.%y")
CLOCKS = ("%H:%M:%S", "%H:%M:%S.%f", "%H:%M:%S,%f", "%H:%M", "%I:%M:%S %p", "%I:%M %p")
PATTERNS = (*CLOCKS, *(f"{date}{gap}{clock}" for date in DATES for gap in " ," for clock in CLOCKS))
SAMPLE = 300  # rows that a pattern is chosen by


def understand(
    values: Sequence[object], form: Format, block: int = 0, unit: str | None = None
) -> tuple[str, list[float | str]]:
    """(what they are, seconds of each or why it has none); dates without a zone are UTC.

    `unit`, one of TIME_UNITS, is that of numbers. Raises WorkloadError if it must be asked for.
    """
    texts = [value for value in values if isinstance(value, str)]
    texts = [text for text in texts[:: 1 + len(texts) // SAMPLE] if ":" in text]
    pattern = max(PATTERNS, key=lambda one: sum(_written(text, one) is not None for text in texts))
    read = [_read(value, form.decimal_comma, pattern) for value in values]
    kind = next((found[0] for found in read if found), "number")
    scale, told = 1.0, kind if kind == CLOCK else f"times are {kind}"
    if kind == "number":
        numbers = sorted(found[1] for found in read if found and found[0] == kind)
        scale, why = _unit(numbers, form, block, unit)
        told = f"times in {WORDS[scale]}{why}"
    seconds: list[float | str] = []
    for found in read:
        if found is None:
            seconds.append(NO_TIME)
        elif found[0] != kind:
            seconds.append(ANOTHER)
        else:
            seconds.append(found[1] * scale if found[1] * scale <= LATEST_S else LATE)
    return told, _past_midnight(seconds) if kind == CLOCK else seconds


def _past_midnight(seconds: list[float | str]) -> list[float | str]:
    """Times of day from the first day on; a night without requests lies between two days."""
    there = [i for i, one in enumerate(seconds) if not isinstance(one, str)]
    days, moved = 0, list(seconds)
    for before, now in pairwise(there):
        days += seconds[before] - seconds[now] > BACK_S
        moved[now] = seconds[now] + DAY_S * days
    return moved


def _unit(numbers: list[float], form: Format, block: int, unit: str | None) -> tuple[float, str]:
    """(seconds of one, how that is known) of numbers in order."""
    if unit is not None:
        return SECONDS[unit], ", as --time-unit says"
    if form.unit_s is not None:
        return form.unit_s, f", as {form.time[:30]!a} says"
    middle = numbers[(len(numbers) - 1) // 2] if numbers else 0.0
    for scale in WORDS:
        if EPOCH_S[0] <= middle * scale < EPOCH_S[1]:
            return scale, " since 1970"
    if not form.name.startswith("Mooncake") or not numbers or numbers[0] == numbers[-1]:
        return 1.0, ""
    whole = all(number.is_integer() for number in numbers)
    said = SAID.get(block)
    if not whole and said != 1e-3:
        return 1.0, ", as they have fractions"
    if whole and said is not None:
        return said, f", as blocks of {block} tokens say"
    blocks = f"blocks of {block} tokens" if block else "no hash_ids that fit the lengths"
    raise WorkloadError(
        f"are its times seconds or milliseconds? They are {'' if whole else 'not '}whole, with "
        f"{blocks}; Mooncake's are milliseconds with blocks of 512, Bailian's seconds with 16: "
        "give --time-unit s or --time-unit ms"
    )


def _read(value: object, decimal_comma: bool, pattern: str) -> tuple[str, float] | None:
    """(kind, count of units or seconds), None if it is no time."""
    try:
        # float() would take '1_0', digits of other scripts, and True.
        if type(value) in (int, float) or (value.isascii() and "_" not in value):
            text = value.replace(",", ".") if decimal_comma and isinstance(value, str) else value
            number = float(text)
            return ("number", number) if abs(number) < math.inf else None
    except (AttributeError, ValueError, OverflowError):
        pass
    if not isinstance(value, str):
        return None
    try:
        moment, kind = datetime.fromisoformat(value.removesuffix(" UTC")), "dates"
    except ValueError:
        moment, kind = _written(value, pattern), f"dates as {pattern}"
        if pattern in CLOCKS:
            kind = CLOCK
    try:
        return moment and (kind, moment.replace(tzinfo=moment.tzinfo or UTC).timestamp())
    except OverflowError:
        return None


def _written(text: str, pattern: str) -> datetime | None:
    try:
        return datetime.strptime(text, pattern)
    except ValueError:
        return None
