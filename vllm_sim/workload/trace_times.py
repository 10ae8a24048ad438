"""What the times of a trace mean: numbers in some unit, dates, or times of day.

Reproduces nothing of the paper. A column is understood as a whole, by its name, its size, its
fractions and the blocks of its hash_ids; what was understood is told in words.

    told, seconds = understand(values, form, block=512)
    # 'times in milliseconds, as blocks of 512 tokens say'; a second count or a reason for each
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise

from vllm_sim.workload.text_files import WorkloadError
from vllm_sim.workload.trace_formats import SECONDS, Format

WORDS = {1.0: "seconds", 1e-3: "milliseconds", 1e-6: "microseconds", 1e-9: "nanoseconds"}
SAID = {512: 1e-3, 16: 1.0}  # by tokens of a block: Mooncake's unit, and Bailian's
EPOCH_S = 9e8, 5e9  # seconds since 1970 of any recent day
LATEST_S = 1e11  # seconds since 1970; milliseconds of today are more
HALF_DAY_S = 43_200.0
NO_TIME, ANOTHER = "the time is not one", "the time is of another kind than in the rows above"
LATE = "a time after the year 5000: in another unit? (--time-unit)"
# A date with the year first or last, or none, and a time of day.
WRITTEN = re.compile(
    r"(?:(\d{1,4})([/.-])(\d{1,2})\2(\d{2,4}),?[ T]+)?"
    r"(\d{1,2}):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?(?: ?([AaPp])\.?[Mm]\.?)?",
    re.ASCII,
)


def understand(
    values: Sequence[object],
    form: Format,
    block: int = 0,
    unit: str | None = None,
    timed: bool = True,
) -> tuple[str, list[float | str]]:
    """(what they are, seconds of each or why it has none); dates without a zone are UTC.

    `unit`, one of TIME_UNITS, is that of numbers. Raises WorkloadError if it has to be asked
    for, which it has not if times are not `timed` but only put in order.
    """
    written = [WRITTEN.fullmatch(v) for v in values if isinstance(v, str)]
    dated = [found for found in written if found and found[2] and len(found[1]) < 3]
    day_first = any(found[2] != "/" or int(found[1]) > 12 for found in dated)
    read = [_read(value, form.decimal_comma, day_first) for value in values]
    kind = next((found[0] for found in read if found), "number")
    scale, told = 1.0, {"date": "times are dates", "day": "times of day"}.get(kind)
    if dated and kind == "date":
        told += f", the {'day' if day_first else 'month'} first"
    if told is None:
        numbers = sorted(found[1] for found in read if found and found[0] == "number")
        scale, why = _unit(numbers, form, block, unit or (None if timed else "s"))
        told = f"times in {WORDS[scale]}{why}"
    elif unit is not None:
        raise WorkloadError(f"{told}: --time-unit is for numbers")
    seconds: list[float | str] = []
    for found in read:
        if found is None:
            seconds.append(NO_TIME)
        elif found[0] != kind:
            seconds.append(ANOTHER)
        else:
            seconds.append(found[1] * scale if found[1] * scale <= LATEST_S else LATE)
    return told, _past_midnight(seconds) if kind == "day" else seconds


def _past_midnight(seconds: list[float | str]) -> list[float | str]:
    """Times of day from the first day on: half a day back is the next one."""
    there = [i for i, one in enumerate(seconds) if not isinstance(one, str)]
    days, moved = 0, list(seconds)
    for before, now in pairwise(there):
        days += seconds[before] - seconds[now] > HALF_DAY_S
        moved[now] = seconds[now] + 2 * HALF_DAY_S * days
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


def _read(value: object, decimal_comma: bool, day_first: bool) -> tuple[str, float] | None:
    """(number, date or day; its count of units or of seconds), None if it is no time."""
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
        moment = datetime.fromisoformat(value.removesuffix(" UTC"))
        return "date", moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    except (ValueError, OverflowError):
        pass
    found = WRITTEN.fullmatch(value)
    if found is None:
        return None
    first, _, second, third, hour, minute, second_s, fraction, half = found.groups()
    hour = int(hour)
    if half:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * (half in "Pp")
    day = 1970, 1, 1
    if first:
        ordered = (first, second, third) if len(first) > 2 else (third, first, second)
        if day_first and len(first) < 3:
            ordered = third, second, first
        day = [int(part) for part in ordered]
        day[0] += 2000 * (day[0] < 100)
    try:
        moment = datetime(*day, hour, int(minute), int(second_s or 0), tzinfo=UTC)
    except ValueError:
        return None
    seconds = moment.timestamp() + float(f"0.{fraction or 0}")
    return "date" if first else "day", seconds
