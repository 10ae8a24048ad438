"""Which points of Fig. 12 the constants of latency.py were fitted to.

Reproduces nothing. Section 6's simulation rests on a few constants per model. They were found in
the left ends of Fig. 12, where nothing waits for memory: tools/fit_latency.py fits them to the
points named here, and reproduce.py marks the rows that compare these very points, which hold
nearly by construction.

    fitted_points("ShareGPT", "opt-13b", VLLM)     # ((1, 0.0371), (1.25, 0.0401), (1.5, 0.0424))
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import paper
from curves import Point
from paper import FASTER_TRANSFORMER

LEFT_END = 1.25  # times a curve's first latency


def fitted_points(dataset: str, model: str, system: str) -> tuple[Point, ...]:
    """The points (requests/s, s/token) of one curve of Fig. 12 that the fit uses.

    Of Orca and vLLM the left end; of FasterTransformer the first point on ShareGPT, for its one
    constant. KeyError for a panel or system that the figure does not have.
    """
    curve = paper.FIG12_CURVES[dataset, model][system]
    if system == FASTER_TRANSFORMER:
        return curve[:1] if dataset == "ShareGPT" else ()
    return left_end(curve)


def left_end(curve: Sequence[Point]) -> tuple[Point, ...]:
    """The leading points whose latency is below LEFT_END times the first one's."""
    return tuple(takewhile(lambda point: point[1] < LEFT_END * curve[0][1], curve))
