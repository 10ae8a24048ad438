"""The slot identity itself, and counts: what one moment's accounting refuses and what it tells."""

from dataclasses import FrozenInstanceError

import pytest

from kv_cache_manager import MemoryUsage
from sequence import check_count


def test_every_part_may_have_slots_at_once():
    usage = MemoryUsage(21, tokens=1, free=2, reserved=3, internal=4, rounding=5, padding=6)
    assert sum(getattr(usage, part) for part in usage.PARTS) == usage.capacity
    assert usage.share("internal") == 4 / 21
    assert usage.external_and_others == (5 + 6 + 2) / 21


@pytest.mark.parametrize("tokens", [0, 4, 6, 100])
def test_slots_lost_or_counted_twice_break_the_identity(tokens):
    MemoryUsage(10, tokens=5, free=3, padding=2)
    with pytest.raises(AssertionError, match=f"capacity 10 != tokens {tokens}, reserved 0"):
        MemoryUsage(10, tokens=tokens, free=3, padding=2)


@pytest.mark.parametrize("part", ["tokens", "reserved", "internal", "rounding", "padding"])
def test_a_part_below_zero_breaks_it_even_if_the_sum_is_right(part):
    with pytest.raises(AssertionError, match=f"{part} -1"):
        MemoryUsage(10, **({"tokens": 0} | {part: -1}), free=11)


def test_a_moment_cannot_be_rewritten():
    usage = MemoryUsage(10, tokens=4, free=6)
    with pytest.raises(FrozenInstanceError):
        usage.tokens = 5
    assert not hasattr(usage, "__dict__")  # nor anything added to it


def test_what_sharing_saves():
    usage = MemoryUsage(10, tokens=4, free=6, logical_blocks=8, physical_blocks=2)
    assert usage.saved == 0.75
    assert MemoryUsage(10, tokens=4, free=6, logical_blocks=2, physical_blocks=3).saved == -0.5
    assert MemoryUsage(10, tokens=0, free=10, physical_blocks=3).saved == 0.0


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, 0, 2])
def test_a_count_is_an_integer_that_is_large_enough(value):
    check_count("things", 1)
    check_count("things", 0, least=0)
    for least in {0: (1,), 2: (3,)}.get(value, (0, 1)):
        with pytest.raises(ValueError, match=f"things must be an integer of at least {least}, got"):
            check_count("things", value, **({} if least == 1 else {"least": least}))
