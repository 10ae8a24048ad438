"""How a request's next tokens are chosen from a model's logits: greedily, by sampling, by beams.

Reproduces: section 4.4 (parallel sampling, beam search). A beam that survives keeps its place, as
in the authors' artifact, so that its blocks stay its own; which hypotheses end and when the search
stops is as in transformers' `generate()`, whose text it gives.

    search = BeamSearch(width=4, eos={2})
    choice = search.advance(logits, last=False)     # logits (4, V) of the beams, by place
    choice.tokens, choice.parents, choice.ended
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vllm_sim.workload.requests import check_integer, check_number

LEAST_TEMPERATURE = 1e-3  # below it the logits that it divides overflow


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to decode a request; at temperature 0 the most likely token is taken.

    `top_k` 0 and `top_p` 1 leave all tokens to be drawn. ValueError for what makes no sense.
    """

    num_samples: int = 1
    beam_width: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    length_penalty: float = 1.0  # a hypothesis' score is divided by its length to this power

    def __post_init__(self) -> None:
        check_integer("num_samples", self.num_samples, 1)
        check_integer("beam_width", self.beam_width, 1)
        check_number("temperature", self.temperature, 0.0)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"a temperature above 0 is at least {LEAST_TEMPERATURE}")
        check_integer("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, 0.0, 1.0)
        check_integer("seed", self.seed, 0)
        check_number("length_penalty", self.length_penalty, -100.0, 100.0)
        if self.num_samples > 1 and self.beam_width > 1:
            raise ValueError("at most one of num_samples and beam_width may be above 1")
        if self.num_samples > 1 and not self.temperature:
            raise ValueError("several samples need a temperature: at 0 all are the same")
        if self.beam_width > 1 and (self.temperature or self.top_k or self.top_p < 1.0):
            raise ValueError("a beam search draws nothing: no temperature, top_k or top_p")

    @property
    def num_seqs(self) -> int:
        return max(self.num_samples, self.beam_width)


@dataclass(frozen=True, slots=True)
class Choice:
    """One step of a request: for each of its sequences the next token, the place of the sequence
    that it continues (beam search; else None), and whether it ends with this token."""

    tokens: list[int]
    parents: list[int] | None
    ended: list[bool]


class Samples:
    """Sequences that go on each for itself; each draws from a generator of its own."""

    def __init__(self, decoding: Decoding, eos: frozenset[int], device: torch.device) -> None:
        self._eos = eos
        self._warp = LogitsProcessorList()
        self._generators: list[torch.Generator] = []
        if decoding.temperature:
            self._warp.append(TemperatureLogitsWarper(float(decoding.temperature)))
            if decoding.top_k:
                self._warp.append(TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1.0:
                self._warp.append(TopPLogitsWarper(float(decoding.top_p)))
            for place in range(decoding.num_samples):
                (seed,) = np.random.SeedSequence([decoding.seed, place]).generate_state(1)
                self._generators.append(torch.Generator(device).manual_seed(int(seed)))

    def advance(self, logits: torch.Tensor, places: list[int]) -> Choice:
        """The next tokens of the sequences at these places, from their logits (n, V)."""
        logits = logits.float()
        if self._generators:
            weights = self._warp(None, logits).softmax(dim=-1)
            drawn = [
                torch.multinomial(row, 1, generator=self._generators[place])
                for row, place in zip(weights, places)
            ]
            tokens = torch.cat(drawn).tolist()
        else:
            tokens = logits.argmax(dim=-1).tolist()
        return Choice(tokens, None, [token in self._eos for token in tokens])


@dataclass(slots=True)
class BeamSearch:
    """The beams of one request, by place, and the best hypotheses that have ended so far."""

    width: int
    eos: frozenset[int]
    length_penalty: float = 1.0
    scores: list[float] = field(init=False)  # summed log-probabilities
    generated: list[list[int]] = field(init=False)
    finished: list[tuple[float, list[int]]] = field(default_factory=list)  # best first

    def __post_init__(self) -> None:
        # All beams are still one prompt: only the first has candidates.
        self.scores = [0.0] + [-1e9] * (self.width - 1)
        self.generated = [[] for _ in range(self.width)]

    def advance(self, logits: torch.Tensor, last: bool) -> Choice:
        """The best continuations of all beams' logits (width, V). `last`: none may go on."""
        width, vocabulary = logits.shape
        known = torch.tensor(self.scores, device=logits.device)[:, None]
        totals = (logits.float().log_softmax(dim=-1) + known).flatten()
        # Enough that `width` of them go on whichever end.
        num_candidates = min(len(totals), max(2, 1 + len(self.eos)) * width)
        best = torch.topk(totals, num_candidates)
        candidates = [
            (score, at // vocabulary, at % vocabulary)
            for score, at in zip(best.values.tolist(), best.indices.tolist())
        ]
        length = len(self.generated[0]) + 1
        for score, beam, token in candidates[:width]:
            if last or token in self.eos:
                score /= length**self.length_penalty
                self.finished.append((score, [*self.generated[beam], token]))
        self.finished.sort(key=lambda hypothesis: -hypothesis[0])
        del self.finished[width:]
        alive = [one for one in candidates if one[2] not in self.eos][:width]
        places = _places([beam for _, beam, _ in alive], width)
        order = sorted(range(width), key=places.__getitem__)
        parents, tokens = ([alive[rank][part] for rank in order] for part in (1, 2))
        self.scores = [alive[rank][0] for rank in order]
        self.generated = [
            [*self.generated[parent], token] for parent, token in zip(parents, tokens)
        ]
        full = len(self.finished) == width
        hopeless = full and alive[0][0] / length**self.length_penalty <= self.finished[-1][0]
        return Choice(tokens, parents, [last or hopeless] * width)


def _places(beams: list[int], width: int) -> list[int]:
    """The place of each survivor, best first: its parent's, or of a beam that died if another of
    the parent's children has that."""
    dead = iter(sorted({*range(width)} - {*beams}))
    seen: set[int] = set()
    places = []
    for beam in beams:
        places.append(next(dead) if beam in seen else beam)
        seen.add(beam)
    return places
