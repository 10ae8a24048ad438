"""Who descends from whom in a beam search: the model behind Figs. 14 (d-f) and 15.

Reproduces: section 4.4, Fig. 9. The paper gives no token data, so what real beams do is drawn from
a model with one parameter:

    parents = beam_parents(width=6, num_steps=60, rng=np.random.default_rng(0))
    histories = beam_histories(width=6, steps=[60, 200], seed=0)     # many at once

A beam's next-token distribution is a draw of the stick-breaking process GEM(theta), independent
per beam and step; scores are summed log-probabilities; the best `width` of all candidates survive,
as in the authors' artifact. Near 0 one token takes all and beams seldom fork.
"""

import math

import numpy as np

from vllm_sim.workload.requests import check_integer, check_number

MAX_HISTORIES_AT_ONCE = 512


def beam_parents(
    width: int, num_steps: int, rng: np.random.Generator, theta: float = 0.25
) -> np.ndarray:
    """One beam search: int64 (num_steps, width), values < width.

    Entry [t, i] is the beam, before step t, that beam i continues after it (section 4.4,
    Fig. 9). A beam that survives keeps its place: parents[t, i] == i; further children take
    the places of the beams that died. At step 0 all beams are forks of one prompt, beam 0. The
    default theta is fitted to Alpaca in Fig. 15. Rows do not depend on num_steps.
    Raises ValueError.
    """
    _check(width, theta)
    check_integer("num_steps", num_steps, 0)
    parents = np.zeros((num_steps, width), dtype=np.int64)
    scores = _first_scores(1, width)
    num_sticks = _num_sticks(width, theta)
    for step in range(num_steps):
        draws = rng.standard_exponential((width, num_sticks))
        best, scores = _survivors(draws[None], scores, theta)
        parents[step] = best[0]
    return parents


def beam_histories(
    width: int, steps: list[int], seed: int, theta: float = 0.25
) -> list[list[list[int]]]:
    """Independent beam searches, one per entry of `steps`: [history][step][beam] -> parent.

    The same model as beam_parents, all searches a step at a time.
    """
    _check(width, theta)
    histories: list[list[list[int]]] = [[] for _ in steps]
    rng = np.random.default_rng([seed, width])
    num_sticks = _num_sticks(width, theta)
    for first in range(0, len(steps), MAX_HISTORIES_AT_ONCE):
        # Longest first, so that those still running are always a leading part.
        batch = range(first, min(first + MAX_HISTORIES_AT_ONCE, len(steps)))
        order = sorted(batch, key=lambda index: -steps[index])
        scores = _first_scores(len(order), width)
        running = len(order)
        for step in range(steps[order[0]]):
            while steps[order[running - 1]] <= step:
                running -= 1
            draws = rng.standard_exponential((running, width, num_sticks))
            parents, scores = _survivors(draws, scores[:running], theta)
            for index, row in zip(order, parents.tolist()):
                histories[index].append(row)
    return histories


def _check(width: int, theta: float) -> None:
    check_integer("width", width, 1)
    check_number("theta", theta, 1e-6, 100.0)


def _first_scores(count: int, width: int) -> np.ndarray:
    """Summed log-probabilities (count, width): at step 0 only beam 0 has candidates."""
    return np.tile(np.where(np.arange(width) == 0, 0.0, -np.inf), (count, 1))


def _num_sticks(width: int, theta: float) -> int:
    """Sticks beyond these hold about 1e-6 of the mass; GEM draws are unsorted, hence the spares."""
    return width + math.ceil(14.0 / math.log1p(1.0 / theta))


def _survivors(
    draws: np.ndarray, scores: np.ndarray, theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Parents (K, width) and new scores (K, width) after one step of K searches.

    `draws` (K, width, sticks) are standard exponentials, one search's all before the next's.
    """
    count, width = scores.shape
    # log(1 - v) of v ~ Beta(1, theta); in logs, as a small theta would round v to 1.
    rest = -np.maximum(draws, 1e-300) / theta
    log_probs = np.log(-np.expm1(rest)) + np.cumsum(rest, axis=-1) - rest
    candidates = scores[:, :, None] - np.sort(-log_probs, axis=-1)[:, :, :width]
    flat = candidates.reshape(count, width * width)
    best = np.argsort(-flat, axis=1, kind="stable")[:, :width]
    beams = best // width  # (K, width), best candidate first
    won = np.take_along_axis(flat, best, axis=1)
    same = beams[:, :, None] == beams[:, None, :]
    extra = np.tril(same, -1).any(axis=2)  # a beam's second candidate and those after it
    # Each survivor keeps its place; the extra ones take the places of the dead, in order.
    alive = np.zeros((count, width), dtype=bool)
    np.put_along_axis(alive, beams, True, axis=1)
    places = beams.copy()
    ranks = np.argsort(~extra, axis=1, kind="stable")  # the extra ones first
    dead = np.argsort(alive, axis=1, kind="stable")  # the dead first
    taken = np.arange(width) < extra.sum(axis=1)[:, None]
    rows = np.nonzero(taken)[0]
    places[rows, ranks[taken]] = dead[taken]
    parents = np.empty_like(beams)
    new_scores = np.empty_like(scores)
    np.put_along_axis(parents, places, beams, axis=1)
    np.put_along_axis(new_scores, places, won, axis=1)
    return parents, new_scores
