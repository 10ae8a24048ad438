"""comparison.py: where each kind of row stops to hold, what it says then, and means over seeds."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest

from vllm_sim.evaluation.comparison import (
    EXPLAINED,
    REASONS,
    Row,
    absolute,
    allow,
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
    "relative": lambda ours, reason="": relative(*WHERE, 8.0, ours, 12.5, reason),
    "absolute": lambda ours, reason="": absolute(*WHERE, 40.0, ours, 2.5, reason),
    "factor": lambda ours, reason="": factor(*WHERE, 8.0, ours, 2.0, reason),
    "as printed": lambda ours, reason="": as_printed(*WHERE, 15.5, ours, reason),
    "between": lambda ours, reason="": between(*WHERE, 2.0, 4.0, ours, reason),
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
D10 = "D10"  # explains up to 12 tolerances
TOLD = f"D10: {REASONS[D10][1]}"


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
    assert (row.ours, row.spread, row.reason) == (15.5, None, "")


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


# --- explanations --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_row_that_does_not_hold_is_explained(kind):
    make, outside = KINDS[kind], OUTSIDE[kind]
    failed, explained = make(outside), make(outside, D10)
    assert (failed.held, failed.reason) == (False, "")
    assert (explained.held, explained.reason) == (EXPLAINED, TOLD)
    assert explained == replace(failed, held=EXPLAINED, reason=TOLD)
    for ours in ENDS[kind]:
        assert make(ours, D10) == make(ours), "there is nothing to explain"
        assert (make(ours, D10).held, make(ours, D10).reason) == (True, "")


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_explains_no_more_than_its_bound(reason):
    most = REASONS[reason][0]
    assert 1.0 < most <= 12.0
    within = relative(*WHERE, 1.0, 1.0 + 0.0499 * most, 5.0, reason)
    assert within.held == EXPLAINED and within.reason.startswith(f"{reason}: ")
    beyond = relative(*WHERE, 1.0, 1.0 + 0.0501 * most, 5.0, reason)
    assert (beyond.held, beyond.reason) == (False, "")


def test_a_reason_that_nobody_knows_is_an_error():
    with pytest.raises(KeyError, match="D3"):
        relative(*WHERE, 1.0, 1.0, 5.0, "D3")


# A value of ours on either side that is two tolerances away; a range counts a tenth of its nearer
# end as a tolerance, after it is left.
TWICE_OFF = {
    "relative": (6.0, 10.0),
    "absolute": (35.0, 45.0),
    "factor": (2.0, 32.0),
    "as printed": (15.4, 15.6),
    "between": (1.8, 4.4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_how_far_off_in_tolerances(kind):
    make, (low, high) = KINDS[kind], ENDS[kind]
    for ours in TWICE_OFF[kind]:
        assert make(ours).excess == pytest.approx(2.0, rel=1e-6)
        assert make(ours, D10).excess == make(ours).excess
    for ours in (low, high):
        assert make(ours).excess == (0.0 if kind == "between" else pytest.approx(1.0, rel=1e-6))
    pair = [make(ours) for ours in TWICE_OFF[kind]]
    assert over_seeds(pair).excess == make((pair[0].ours + pair[1].ours) / 2).excess != 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_not_too_far_off_is_allowed(kind, monkeypatch):
    make, (below, above) = KINDS[kind], TWICE_OFF[kind]
    for ours in (below, above):
        row = make(ours)
        assert row.held is False
        monkeypatch.setitem(REASONS, "D5", (2.01, "why"))
        assert allow(row, "D5") == replace(row, held=EXPLAINED, reason="D5: why")
        monkeypatch.setitem(REASONS, "D5", (1.99, "why"))
        assert allow(row, "D5") is row
    held, explained = make(ENDS[kind][0]), make(above, D10)
    monkeypatch.setitem(REASONS, "D5", (1e9, "why"))
    assert allow(held, "D5") is held
    assert allow(explained, "D5") is explained, "it has a reason of its own"
    assert allow(make(math.nan), "D5").held is False


# --- to_json -------------------------------------------------------------------------------------

ALWAYS = ["figure", "setting", "metric", "paper", "ours", "difference", "tolerance", "held"]
ALWAYS.append("fitted")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_as_json(kind):
    make, outside = KINDS[kind], OUTSIDE[kind]
    held, failed, explained = make(ENDS[kind][0]), make(outside), make(outside, D10)
    several = over_seeds([make(outside, D10), make(outside + 1.0, D10)])
    assert list(held.to_json()) == list(failed.to_json()) == ALWAYS
    assert list(explained.to_json()) == [*ALWAYS, "reason"]
    assert list(several.to_json()) == [*ALWAYS, "reason", "spread"]
    for row in (held, failed, explained, several):
        record = row.to_json()
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        for key, value in record.items():
            assert value == getattr(row, key), key
    assert held.to_json()["held"] is True
    assert failed.to_json()["held"] is False
    assert explained.to_json()["held"] == "explained"
    assert several.to_json()["spread"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_fitted_row_says_so_and_is_judged_as_the_others(kind):
    for ours in (ENDS[kind][0], OUTSIDE[kind]):
        row = KINDS[kind](ours)
        fitted = replace(row, fitted=True)
        assert (row.fitted, fitted.held) == (False, row.held)
        assert fitted.to_json() == row.to_json() | {"fitted": True}
        assert over_seeds([fitted, fitted]).fitted and not over_seeds([row, row]).fitted
        assert allow(fitted, D10).fitted


@pytest.mark.parametrize(
    ("held", "expected", "text", "failed"),
    [
        (True, "", "yes", False),
        (False, "", "NO", True),
        (EXPLAINED, "", "D3", False),
        (False, "why", "missed", False),
        (True, "why", "NOT MISSED", True),
        (EXPLAINED, "why", "NOT MISSED", True),
    ],
)
def test_what_a_table_says_of_a_row_and_which_rows_fail(held, expected, text, failed):
    reason = "D3: a reason: so it is" if held == EXPLAINED else ""
    row = replace(relative(*WHERE, 1.0, 1.0, 5.0), held=held, reason=reason, expected=expected)
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
    assert pulled.held is not True
    assert pulled.ours == pytest.approx(middle + 4 / 3 * width)
    assert pulled.spread == pytest.approx(4 * width)
    assert pulled.difference == make(pulled.ours).difference


@pytest.mark.parametrize("kind", KINDS)
def test_a_reason_survives_the_mean_and_is_dropped_where_that_holds(kind):
    make, (low, high) = partial(KINDS[kind], reason=D10), ENDS[kind]
    middle, width = (low + high) / 2, high - low
    # The first seed holds, so its own row does not show the reason.
    failing = over_seeds([make(middle), make(middle + 4 * width)])
    assert (failing.held, failing.reason) == (EXPLAINED, TOLD)
    holding = over_seeds([make(middle + width), make(middle - width)])
    assert (holding.held, holding.reason) == (True, "")


def test_a_mean_may_have_a_tolerance_of_its_own():
    """The paper's own seed is then judged by it, too, where it has to explain the mean."""
    rows = [absolute(*WHERE, 40.0, ours, 1.0, most_of_mean=2.5) for ours in (42.0, 45.5)]
    assert [row.held for row in rows] == [False, False]
    alone = over_seeds(rows[:1])
    assert (alone, alone.tolerance, alone.spread) == (rows[0], "1", None)
    mean = over_seeds([rows[0], rows[0]])
    assert (mean.held, mean.tolerance) == (True, "2.5")
    mean = over_seeds(rows)
    assert (mean.ours, mean.held, mean.reason[:5]) == (43.75, EXPLAINED, "D15: ")


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
    assert "remake" not in repr(first)
    assert isinstance(first, Row) and first.remake(7.0) == relative(*WHERE, 8.0, 7.0, 12.5)


def test_a_seed_without_a_value_leaves_the_mean_without_one():
    one, none = relative(*WHERE, 1.0, 2.0, 5.0), relative(*WHERE, 1.0, math.nan, 5.0)
    for rows in ([one, none], [none, one]):
        row = over_seeds(rows)
        assert row.held is False and row.spread is None and row.difference == "no value"
        assert row.to_json()["ours"] is None and "spread" not in row.to_json()


def test_a_mean_that_is_off_is_explained_where_the_papers_own_seed_holds():
    first, other = relative(*WHERE, 1.0, 1.04, 5.0), relative(*WHERE, 1.0, 1.14, 5.0)
    row = over_seeds([first, other])
    assert row.held == EXPLAINED and row.reason.startswith("D15: ")
    assert row.ours == pytest.approx(1.09)
    assert over_seeds([other, first]).held is False, "the paper's seed is the first"
    far = relative(*WHERE, 1.0, 1.2, 5.0)
    assert over_seeds([first, far]).held is False, "more than twice the tolerance off"
    assert over_seeds([first, first]).held is True
