"""Requests as in section 6.1 of the paper: two lengths and an arrival time each.

Lengths come from the small tables of length_tables.py or from a full length file:

    requests = make_trace(SHAREGPT, rate=2.0, duration_s=3600.0, seed=0)
    requests = make_trace(read_lengths("lengths.csv.gz"), 2.0, 3600.0, seed=0, total_below=2048)
    requests = join(chats, instructions)                 # two workloads together

The second, given the authors' lengths in order, is their artifact's trace, request by request.
"""

import math
import numbers
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice

import numpy as np

from vllm_sim.workload.length_tables import LengthTable

SLOT_S = 0.01  # arrivals are drawn per slot of 10 ms, as in the authors' artifact
MAX_EXPECTED = 10**8  # slots, or expected requests, that one trace may have
MAX_LENGTH = 10**7  # tokens that a file may give a prompt or an output
Pair = tuple[int, int]  # input and output length of one request


def check_integer(name: str, value: object, low: int, high: int = 2**63 - 1) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, not {value!r}")


def check_number(name: str, value: object, low: float, high: float = sys.float_info.max) -> None:
    if not isinstance(value, numbers.Real) or not low <= value <= high:  # NaN fails as well
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


@dataclass(frozen=True, slots=True)
class Request:
    """One request; lengths in tokens, `arrival_s` in seconds from the start of the trace.

    `prompt_len` leaves out the `prefix_len` tokens before it, shared with other requests (Fig.
    10); only behind these it may be 0. Every sequence generates exactly `output_len` tokens
    (section 6.1). `num_samples` outputs are sampled in parallel (Fig. 8), or `beam_width` beams
    searched (Fig. 9). Raises ValueError.
    """

    request_id: int
    arrival_s: float
    prompt_len: int
    output_len: int
    num_samples: int = 1
    beam_width: int = 1
    prefix_len: int = 0

    def __post_init__(self) -> None:
        check_integer("request_id", self.request_id, 0)
        check_number("arrival_s", self.arrival_s, 0.0)
        check_integer("prefix_len", self.prefix_len, 0)
        check_integer("prompt_len", self.prompt_len, 0 if self.prefix_len else 1)
        for name in ("output_len", "num_samples", "beam_width"):
            check_integer(name, getattr(self, name), 1)
        if self.num_samples > 1 and self.beam_width > 1:
            raise ValueError("at most one of num_samples and beam_width may be above 1")

    @property
    def num_seqs(self) -> int:
        """Sequences of the request that generate at the same time."""
        return max(self.num_samples, self.beam_width)

    @property
    def decoding(self) -> str:
        """'single', 'parallel' (sampling) or 'beam'."""
        if self.beam_width > 1:
            return "beam"
        return "parallel" if self.num_samples > 1 else "single"


def join(*workloads: Iterable[Request]) -> list[Request]:
    """One workload of several, in order of arrival, with ids given anew from 0 on."""
    requests = sorted(chain(*workloads), key=lambda request: request.arrival_s)
    return [replace(request, request_id=index) for index, request in enumerate(requests)]


def check_distinct(ids: Iterable[int], what: str = "requests") -> None:
    """ValueError that names an id which two have: one would hide the other's times."""
    seen: set[int] = set()
    for one in ids:
        if one in seen:
            raise ValueError(f"two {what} have the id {one}; join(...) gives requests ids anew")
        seen.add(one)


def poisson_arrivals(rate: float, duration_s: float, seed: int) -> np.ndarray:
    """Arrival times in seconds, ascending, float64 (requests,): Poisson at `rate` per second.

    As in the authors' artifact: numpy's legacy generator draws the number of arrivals of every
    10 ms slot, and all arrive as their slot begins; the same seed gives the same times as there.
    A rate of 0 gives no requests. Raises ValueError (section 6.1).
    """
    check_number("duration_s", duration_s, 0.0, MAX_EXPECTED * SLOT_S)
    check_number("rate", rate, 0.0, MAX_EXPECTED / max(duration_s, SLOT_S))
    check_integer("seed", seed, 0, 2**32 - 1)
    slots = int(duration_s * (1.0 / SLOT_S))
    arrivals = np.random.RandomState(seed).poisson(rate * SLOT_S, size=slots)
    return np.repeat(np.arange(slots) * SLOT_S, arrivals)


def make_trace(
    lengths: LengthTable | tuple[np.ndarray, np.ndarray],
    rate: float,
    duration_s: float,
    seed: int,
    *,
    total_below: int | None = None,
    num_samples: int = 1,
    beam_width: int = 1,
    prefix_len: int = 0,
    added_prompt_len: int = 0,
) -> list[Request]:
    """Requests in order of arrival, at `rate` per second for `duration_s` seconds.

    A LengthTable is sampled with the seed. Exact pairs (from read_lengths) are used as the
    artifact does: as many as there are arrivals, in order, from the top again if they run out,
    then shuffled; so a short trace has other means than the data. `total_below` first drops
    pairs with input + output not below it (artifact: 2048). `added_prompt_len` tokens go to
    every prompt; the other options are Request's. Raises ValueError (sections 6.1 to 6.4).
    """
    check_integer("added_prompt_len", added_prompt_len, 0)
    arrivals = poisson_arrivals(rate, duration_s, seed).tolist()
    if isinstance(lengths, LengthTable):
        if total_below is not None:
            raise ValueError("total_below is for exact pairs; a table has its own max_total")
        sampled = lengths.sample(len(arrivals), np.random.default_rng(seed))
        pairs = list(zip(*(part.tolist() for part in sampled)))
    else:
        limit = math.inf if total_below is None else total_below
        known = zip(*(np.asarray(part).tolist() for part in lengths), strict=True)
        known = [pair for pair in known if sum(pair) < limit]
        if not known:
            raise ValueError("no pairs of lengths to make a trace from")
        pairs = first_pairs(known, len(arrivals), seed)
    rest = (num_samples, beam_width, prefix_len)
    return [
        Request(index, arrivals[index], prompt + added_prompt_len, output, *rest)
        for index, (prompt, output) in enumerate(pairs)
    ]


def first_pairs(known: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """`count` pairs as the artifact takes them: in order, from the top again, then shuffled."""
    pairs = list(islice(cycle(known), count))
    random.Random(seed).shuffle(pairs)
    return pairs
