"""beam_search.py: one search against candidates scored in plain lists, many against one.

The histories of a batch of searches are those of beam_parents, given each search's own draws.
"""

import itertools
import math
import random

import numpy as np
import pytest

from vllm_sim.serving.beam_search import (
    MAX_HISTORIES_AT_ONCE,
    beam_histories,
    beam_parents,
)


def sticks(width, theta):
    """How many are drawn: as many as hold all but about 1e-6 of the mass, after `width` spares."""
    return width + math.ceil(14.0 / math.log1p(1.0 / theta))


def one_step(draws, scores, theta):
    """(parents, new scores) of one search: every token of every beam is a candidate."""
    candidates = []
    for beam, score in enumerate(scores):
        log_left = 0.0  # what the tokens so far have left of the distribution
        for draw in draws[beam]:
            taken = -math.expm1(-draw / theta)  # Beta(1, theta) by inversion
            if score > -math.inf and taken > 0.0:
                candidates.append((score + log_left + math.log(taken), beam))
            log_left -= draw / theta
    best = sorted(candidates, reverse=True)[: len(scores)]
    parents, new_scores = [None] * len(scores), [None] * len(scores)
    later = []
    for score, beam in best:
        if parents[beam] is None:
            parents[beam], new_scores[beam] = beam, score
        else:
            later.append((score, beam))
    for score, beam in later:
        place = parents.index(None)
        parents[place], new_scores[place] = beam, score
    return parents, new_scores


class Recorded:
    """Draws that are already there, one array a step."""

    def __init__(self, draws):
        self._draws = iter(draws)

    def standard_exponential(self, shape):
        drawn = next(self._draws)
        assert drawn.shape == shape
        return drawn


# --- one search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("theta", [1e-6, 0.02, 0.25, 0.7, 5.0])
def test_beams_follow_the_best_cumulative_scores(width, theta):
    """The same draws, scored candidate by candidate with plain lists; some take nothing, or leave
    a remainder too small for a float (and at the least theta all do that by themselves)."""
    rng, scores = np.random.default_rng(9), [0.0, *[-math.inf] * (width - 1)]
    draws = [rng.standard_exponential((width, sticks(width, theta))) for _ in range(50)]
    for step in range(0, 50 if theta > 1e-6 else 0, 5):
        draws[step][:, 0] = 0.0
        draws[step + 1] *= 1e3
    parents = beam_parents(width, 50, Recorded(draws), theta)
    assert (parents.shape, parents.dtype) == ((50, width), np.int64)
    for row, drawn in zip(parents.tolist(), draws):
        wanted, scores = one_step(drawn.tolist(), scores, theta)
        assert row == wanted


def test_a_search_by_hand():
    """Two beams; theta 1, so that a draw of ln 2 takes half of what is left of a distribution.

    First tokens: 1/2 and 1/10. Then tokens of beam 0: 1/2, 1/4, 1/4, so its candidates are 1/4,
    1/8, 1/8. Tokens of beam 1: 9/10 and the rest; its best candidate is 9/100, so beam 1 dies,
    and beam 0 goes on in both places. With 1/6 instead of 1/10 that is 3/20, and it survives.
    """
    half, most, rest = math.log(2.0), math.log(10.0), [0.0] * (sticks(2, 1.0) - 3)
    for second, row in ((1 / 10, [0, 0]), (1 / 6, [0, 1])):
        first = [half, -math.log1p(-2 * second), 0.0, *rest]
        then = [[half, half, 50.0, *rest], [most, 50.0, 50.0, *rest]]
        draws = Recorded(np.array([[first, first], then]))
        assert beam_parents(2, 2, draws, 1.0).tolist() == [[0, 0], row]


def forks(width, theta, steps=500):
    parents = beam_parents(width, steps, np.random.default_rng(0), theta)
    return int((parents[1:] != np.arange(width)).sum())


def test_theta_sets_how_often_beams_fork():
    for width in (2, 4, 6):
        few, some, many = (forks(width, theta) for theta in (0.02, 0.25, 5.0))
        assert few > 0
        assert 3 * few < some
        assert 2 * some < many
    assert forks(1, 0.25) == 0


def test_beams_outlive_a_step_but_not_the_search():
    """Common ancestry: some step back, all beams descend from one, and not always from the last."""
    parents = beam_parents(4, 400, np.random.default_rng(2))
    ancestors, depths = list(range(4)), []
    for row in reversed(parents.tolist()):
        ancestors = [row[beam] for beam in ancestors]
        depths.append(len(set(ancestors)))
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > 1
    assert depths[-1] == 1


def test_beam_parents_depend_on_the_seed_alone():
    first, again, other = (beam_parents(4, 200, np.random.default_rng(s)) for s in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    longer = beam_parents(4, 300, np.random.default_rng(1))
    assert (longer[:200] == first).all()
    assert beam_parents(3, 0, np.random.default_rng(0)).shape == (0, 3)


BAD = [(0, 0.25), (2.0, 0.25), (True, 0.25)]
BAD += [(2, theta) for theta in (0.0, -1.0, math.nan, 1e9, 100.5)]


@pytest.mark.parametrize(("width", "theta"), BAD)
def test_bad_arguments_are_refused(width, theta):
    with pytest.raises(ValueError, match=r"width|theta"):
        beam_parents(width, 5, np.random.default_rng(0), theta)
    with pytest.raises(ValueError, match=r"width|theta"):
        beam_histories(width, [5], 0, theta)
    with pytest.raises(ValueError, match="num_steps"):
        beam_parents(2, -1, np.random.default_rng(0))


def test_theta_may_be_100_at_most_and_a_millionth_at_least():
    for theta in (1e-6, 100.0):
        assert beam_parents(2, 3, np.random.default_rng(0), theta).shape == (3, 2)


@pytest.mark.parametrize("theta", [0.02, 0.25, 1.0, 5.0])
def test_sticks_are_as_many_as_leave_less_than_a_millionth(theta):
    """On average each stick leaves theta / (1 + theta) of what was left; the spares aside."""
    for width in (1, 6):
        count, left = sticks(width, theta) - width, theta / (1.0 + theta)
        assert left**count <= math.exp(-14.0) < left ** (count - 1)


# --- many searches -------------------------------------------------------------------------------


def valid_rows(width):
    """All rows of parents in which whoever is a parent continues itself."""
    return {
        row
        for row in itertools.product(range(width), repeat=width)
        if all(row[parent] == parent for parent in row)
    }


@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_every_history_is_as_long_as_asked_and_begins_with_one_beam(width):
    rng = random.Random(width)
    wanted = [rng.randint(0, 9) for _ in range(2 * MAX_HISTORIES_AT_ONCE + 7)]
    histories = beam_histories(width, wanted, seed=1, theta=1.0)
    assert [len(history) for history in histories] == wanted
    valid = valid_rows(width)
    for history in histories:
        assert all(tuple(row) in valid for row in history)
        assert history[:1] in ([], [[0] * width])
    assert {type(beam) for history in histories for row in history for beam in row} == {int}


def test_no_search_and_no_step():
    assert beam_histories(4, [], seed=0) == []
    assert beam_histories(4, [0, 0, 0], seed=0) == [[], [], []]
    assert beam_histories(4, [0, 1, 0], seed=0) == [[], [[0, 0, 0, 0]], []]


def test_histories_longer_than_the_numbers_that_python_shares():
    lengths = [300, 260, 300, 10]
    assert [len(history) for history in beam_histories(2, lengths, seed=0)] == lengths


@pytest.mark.parametrize(("width", "number"), [(2, 3), (3, 10), (4, 41)])
def test_every_valid_row_comes_up_and_no_other(width, number):
    histories = beam_histories(width, [60] * 400, seed=5, theta=5.0)
    seen = {tuple(row) for history in histories for row in history}
    assert seen == valid_rows(width)
    assert len(seen) == number


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("theta", [0.02, 0.5, 5.0])
def test_a_history_is_the_search_of_its_own_draws(width, theta):
    """Whoever else is drawn at the same time, and whenever the others end."""
    seed, wanted = 8, [3, 12, 0, 7, 12, 1, 30]
    rng = np.random.default_rng([seed, width])
    draws = {index: [] for index in range(len(wanted))}
    longest_first = [6, 1, 4, 3, 0, 5, 2]
    for step in range(max(wanted)):
        running = [index for index in longest_first if wanted[index] > step]
        for index in running:
            draws[index].append(rng.standard_exponential((width, sticks(width, theta))))
    histories = beam_histories(width, wanted, seed, theta)
    for index, steps in enumerate(wanted):
        alone = beam_parents(width, steps, Recorded(draws[index]), theta)
        assert histories[index] == alone.tolist(), index


@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_one_history_alone_is_one_search(width):
    (history,) = beam_histories(width, [80], seed=3)
    assert history == beam_parents(width, 80, np.random.default_rng([3, width])).tolist()


def test_histories_depend_on_the_seed_and_differ_from_each_other():
    histories = beam_histories(4, [60] * 40, seed=1)
    assert histories == beam_histories(4, [60] * 40, seed=1)
    both = histories + beam_histories(4, [60] * 40, seed=2)
    assert len({str(history) for history in both}) == 80, "two of them are the same search"
    assert histories != beam_histories(4, [60] * 40, 1, theta=2.0)


def test_512_searches_are_drawn_together_and_those_after_them_apart():
    """Else the same seed would give other searches than those that are committed."""
    histories = beam_histories(2, [5] * 513, seed=1)
    assert histories[:512] == beam_histories(2, [5] * 512, seed=1)
    assert histories[:511] != beam_histories(2, [5] * 511, seed=1)


def test_no_search_is_drawn_twice_however_many_there_are():
    """Also not once in every batch of those that are drawn together."""
    count = 2 * MAX_HISTORIES_AT_ONCE
    histories = beam_histories(4, [60] * count, seed=1)
    assert len({str(history) for history in histories}) == count
