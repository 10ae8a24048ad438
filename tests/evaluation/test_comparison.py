"""comparison.py: where each kind of row stops to hold, what it says then, and means over seeds."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest

from vllm_sim.evaluation.comparison import (
    Row,
    absolute,
    as_printed,
    between,
    factor,
    over_seeds,
    relative,
    verdict,
)

WHERE = ("Fig. 12", "13B ShareGPT, vLLM", "requests/s at 0.5 s/token")
# Kinds of rows by name, without the value of ours. Those tolerances that can be are binary
# fractions, so that "exactly at it" is exact.
KINDS = {
    "relative": lambda ours: relative(*WHERE, 8.0, ours, 12.5),
    "absolute": lambda ours: absolute(*WHERE, 40.0, ours, 2.5),
    "factor": lambda ours: factor(*WHERE, 8.0, ours, 2.0),
    "as printed": lambda ours: as_printed(*WHERE, 15.5, ours),
    "between": lambda ours: between(*WHERE, 2.0, 4.0, ours),
}
# Lowest and highest value of ours that holds.
ENDS = {
    "relative": (7.0, 9.0),
    "absolute": (37.5, 42.5),
    "factor": (4.0, 16.0),
    "as printed": (15.45, 15.55),
    "between": (2.0, 4.0),
}
# Where one of them is outside, by a few tolerances.
OUTSIDE = {"relative": 12.0, "absolute": 60.0, "factor": 32.0, "as printed": 15.2, "between": 4.8}


@pytest.mark.parametrize("kind", KINDS)
def test_held_up_to_the_tolerance_and_not_beyond(kind):
    make, (low, high) = KINDS[kind], ENDS[kind]
    for ours in (low, low * 1.0001, (low + high) / 2, high * 0.9999, high):
        assert make(ours).held is True, ours
    for ours in (low * 0.9999, high * 1.0001, -high, 0.0, -math.inf, math.inf, math.nan):
        assert make(ours).held is False, ours


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_says_where_it_is_from_and_what_was_compared(kind):
    row = KINDS[kind](15.5)
    assert (row.figure, row.setting, row.metric) == WHERE
    assert (row.ours, row.spread, row.expected) == (15.5, None, None)


@pytest.mark.parametrize(
    ("row", "paper", "difference", "tolerance"),
    [
        (relative(*WHERE, 8.0, 9.0, 12.5), 8.0, "+12.5 %", "12.5 %"),
        (relative(*WHERE, 1.929, 1.98, 12), 1.929, "+2.6 %", "12 %"),
        (relative(*WHERE, 50.0, 40.0, 25.0), 50.0, "-20.0 %", "25 %"),
        (absolute(*WHERE, 40.0, 42.25, 2.5), 40.0, "+2.25", "2.5"),
        (absolute(*WHERE, 40.0, 39.0, 3), 40.0, "-1.00", "3"),
        (factor(*WHERE, 8.0, 12.0, 2.0), 8.0, "x 1.50", "factor 2"),
        (factor(*WHERE, 8.0, 4.0, 1.5), 8.0, "x 0.50", "factor 1.5"),
        (as_printed(*WHERE, 15.7, 15.73), 15.7, "+0.03", "as printed"),
        (as_printed(*WHERE, 26, 25.7), 26, "-0.3", "as printed"),
        (between(*WHERE, 2.0, 4.5, 3.0), "2 to 4.5", "inside", "inside"),
        (between(*WHERE, 2.0, 4.5, 4.75), "2 to 4.5", "0.25 outside", "inside"),
        (between(*WHERE, 2.0, 4.5, 0.5), "2 to 4.5", "1.5 outside", "inside"),
        (between(*WHERE, 3.0, math.inf, 2.5), "over 3", "0.5 outside", "inside"),
        (between(*WHERE, -math.inf, 3.0, 7.0), "up to 3", "4 outside", "inside"),
    ],
)
def test_what_a_row_prints(row, paper, difference, tolerance):
    assert (row.paper, row.difference, row.tolerance) == (paper, difference, tolerance)


def test_a_range_may_have_one_end_and_a_factor_goes_both_ways():
    over, up_to = partial(between, *WHERE, 3.0, math.inf), partial(between, *WHERE, -math.inf, 3.0)
    for ours, above in ((2.999, False), (3.001, True), (1e9, True), (-1e9, False)):
        assert over(ours).held is above
        assert up_to(ours).held is not above
    assert over(3.0).held is up_to(3.0).held is True
    for paper, ours in ((2.0, 2.9), (2.9, 2.0)):
        assert factor(*WHERE, paper, ours, 1.5).held is True
    for paper, ours in ((2.0, 3.1), (3.1, 2.0), (2.0, 0.0), (2.0, -2.0)):
        assert factor(*WHERE, paper, ours, 1.5).held is False


PRINTED = {  # the paper's: ours that it may have been rounded from, and ours that it was not
    15.7: ((15.73, 15.65, 15.75), (15.76, 15.64)),
    9.7: ((9.652,), (9.648,)),
    1.6: ((1.5625,), (1.5499,)),
    26: ((25.7, 25.5), (25.49, 26.51)),
    12: ((12,), (11.4,)),
    0.25: ((0.254,), (0.256,)),
    57.3: ((57.25, 57.35), (57.2, 57.4)),
    819_200: ((819_200.4,), (819_201,)),
}


@pytest.mark.parametrize("paper", PRINTED)
def test_ours_rounded_to_the_papers_digits(paper):
    for values, held in zip(PRINTED[paper], (True, False)):
        for ours in values:
            for printed in (paper, float(paper)):
                assert as_printed(*WHERE, printed, ours).held is held, ours


# --- to_json -------------------------------------------------------------------------------------

ALWAYS = ["figure", "setting", "metric", "paper", "ours", "difference", "tolerance", "held"]
ALWAYS.append("fitted")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_as_json(kind):
    make, outside = KINDS[kind], OUTSIDE[kind]
    held, missed = make(ENDS[kind][0]), make(outside)
    expected, several = replace(missed, expected="why"), over_seeds([missed, make(outside + 1.0)])
    assert list(held.to_json()) == list(missed.to_json()) == ALWAYS
    assert list(expected.to_json()) == [*ALWAYS, "expected"]
    assert list(several.to_json()) == [*ALWAYS, "spread"]
    for row in (held, missed, expected, several):
        record = row.to_json()
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        for key, value in record.items():
            assert value == getattr(row, key), key
    assert (held.to_json()["held"], missed.to_json()["held"]) == (True, False)
    assert several.to_json()["spread"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_row_says_so_and_is_judged_as_the_others(kind):
    for ours in (ENDS[kind][0], OUTSIDE[kind]):
        row = KINDS[kind](ours)
        fitted = replace(row, fitted=True)
        assert (row.fitted, fitted.held) == (False, row.held)
        assert fitted.to_json() == row.to_json() | {"fitted": True}
        assert over_seeds([fitted, fitted]).fitted and not over_seeds([row, row]).fitted


@pytest.mark.parametrize(
    ("held", "expected", "text", "failed"),
    [
        (True, None, "yes", False),
        (False, None, "missed", False),
        (True, "", "yes", False),
        (False, "", "MISSED", True),
        (False, "why", "missed", False),
        (True, "why", "NOT MISSED", True),
    ],
)
def test_what_a_table_says_of_a_row_and_which_rows_fail(held, expected, text, failed):
    row = replace(relative(*WHERE, 1.0, 1.0 if held else 2.0, 5.0), expected=expected)
    assert (verdict(row), row.failed) == (text, failed)
    assert verdict(replace(row, fitted=True)) == f"{text}, fitted"
    assert ("expected" in row.to_json()) == bool(expected)


def test_zero_is_a_value_and_an_open_range_is_still_json():
    """Neither a measured zero nor a spread of zero is left out."""
    record = over_seeds([absolute(*WHERE, 0.0, 0.0, 1.0)] * 2).to_json()
    assert (record["paper"], record["ours"], record["spread"]) == (0.0, 0.0, 0.0)
    record = between(*WHERE, 3.0, math.inf, 4.0).to_json()
    assert json.loads(json.dumps(record, allow_nan=False))["paper"] == "over 3"


# --- several seeds -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_seeds_is_judged(kind):
    """Not each of them: two that fail on either side can hold, one that fails can pull."""
    make, (low, high) = KINDS[kind], ENDS[kind]
    middle, width = (low + high) / 2, high - low
    either_side = over_seeds([make(middle + width), make(middle - width)])
    assert either_side.held is True
    assert either_side.ours == pytest.approx(middle, rel=1e-12)
    assert either_side.spread == pytest.approx(2 * width)
    assert either_side == replace(make(either_side.ours), spread=either_side.spread)
    pulled = over_seeds([make(middle), make(middle), make(middle + 4 * width)])
    assert pulled.held is False
    assert pulled.ours == pytest.approx(middle + 4 / 3 * width)
    assert pulled.spread == pytest.approx(4 * width)
    assert pulled.difference == make(pulled.ours).difference


def test_a_mean_may_have_a_tolerance_of_its_own():
    of_mean = absolute(*WHERE, 40.0, math.nan, 2.5)
    rows = [replace(absolute(*WHERE, 40.0, ours, 1.0), of_mean=of_mean) for ours in (42.0, 45.5)]
    assert [row.held for row in rows] == [False, False]
    alone = over_seeds(rows[:1])
    assert (alone, alone.tolerance, alone.spread) == (rows[0], "1", None)
    mean = over_seeds([rows[0], rows[0]])
    assert (mean.held, mean.tolerance) == (True, "2.5")
    mean = over_seeds(rows)
    assert (mean.ours, mean.held) == (43.75, False)


def test_means_by_hand():
    rows = [absolute(*WHERE, 10.0, ours, 1.0) for ours in (11.0, 8.5, 12.0, 9.5)]
    row = over_seeds(rows)
    assert (row.ours, row.spread, row.difference, row.held) == (10.25, 3.5, "+0.25", True)
    # Order does not matter, and a mean can be taken again.
    assert over_seeds(rows[::-1]) == row
    assert over_seeds([replace(row, spread=None)] * 2).ours == 10.25


def test_different_comparisons_have_no_mean():
    row = relative(*WHERE, 8.0, 9.0, 12.5)
    for name in ("figure", "setting", "metric"):
        with pytest.raises(ValueError, match="not one comparison"):
            over_seeds([row, replace(row, **{name: "another"})])
    with pytest.raises(ValueError, match="not one comparison"):
        over_seeds([])


def test_rows_are_compared_by_what_they_say():
    first, second = (relative(*WHERE, 8.0, 9.0, 12.5) for _ in range(2))
    assert first == second
    assert first != replace(first, ours=9.5)
    assert "measure" not in repr(first)
    assert isinstance(first, Row) and replace(first, ours=7.0) == relative(*WHERE, 8.0, 7.0, 12.5)


def test_a_seed_without_a_value_leaves_the_mean_without_one():
    one, none = relative(*WHERE, 1.0, 2.0, 5.0), relative(*WHERE, 1.0, math.nan, 5.0)
    for rows in ([one, none], [none, one]):
        row = over_seeds(rows)
        assert row.held is False and row.spread is None and row.difference == "no value"
        assert row.to_json()["ours"] is None and "spread" not in row.to_json()
