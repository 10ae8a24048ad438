"""Seconds of one iteration, from what it reads and computes.

Reproduces: the machine under section 6's experiments, as far as bytes, FLOPs and two constants per
model can. An iteration takes, on each GPU,

    c0                              software, small kernels, communication: fitted per model
    + weights / (0.8 x bandwidth)   every iteration reads all weights
    + tokens x 2 x parameters / (0.5 x peak FLOPS)
    + K/V bytes read / (0.8 x bandwidth)
    + cpre x prompts                what each prompt costs beyond its tokens: fitted per model
    + bytes copied (read and written), and what swapping takes

    model = latency_model(DEPLOYMENTS["opt-13b"], 16)
    model.iteration(iteration)                    # one iteration
    model.decode_steps(100, num_seqs=32, context_tokens=16_000)     # a hundred, in closed form

0.8 of the bandwidth and 0.5 of the FLOPS are customary round numbers, not fitted. `FITTED` is what
`tools/fit_latency.py` finds in the left ends of Fig. 12 and in Fig. 1 (right); it prints them, and
`--check` fails if they are not these. Nothing else here comes from the paper's results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler import Completion, Iteration

if TYPE_CHECKING:
    from paper import Deployment

BANDWIDTH_USED, FLOPS_USED = 0.8, 0.5


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What a GPU's data sheet says: bytes/s of its memory, FLOP/s in fp16 (dense)."""

    bytes_per_s: float
    flops_per_s: float


# NVIDIA's data sheet of the A100 (SXM): 1,555 and 2,039 GB/s, 312 TFLOPS.
ACCELERATORS = {
    "a100-40gb": Accelerator(1555e9, 312e12),
    "a100-80gb": Accelerator(2039e9, 312e12),
}


@dataclass(frozen=True, slots=True)
class Software:
    """The fitted constants of one model, in seconds (tools/fit_latency.py)."""

    step_s: float  # c0: each iteration
    prompt_s: float  # cpre: each prompt
    static_step_s: float  # c0 of FasterTransformer, from its single leftmost ShareGPT point


FITTED = {
    "opt-13b": Software(6.75e-3, 6.25e-3, 0.95e-3),
    "opt-66b": Software(25.0e-3, 5.0e-3, 5.0e-3),
    "opt-175b": Software(52.5e-3, 6.0e-3, 24.5e-3),
}


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Seconds of an iteration as a sum over what it does."""

    step_s: float  # each iteration: software and the weights
    token_s: float = 0.0  # each token computed
    context_s: float = 0.0  # each token of K/V read
    prompt_s: float = 0.0  # each prompt
    copy_s: float = 0.0  # each slot copied inside GPU memory
    swap_out_s: float = 0.0  # each block
    swap_in_s: float = 0.0
    block_size: int = 1

    def __post_init__(self) -> None:
        if not self.step_s > 0.0 or min(getattr(self, f) for f in self.__slots__) < 0.0:
            raise ValueError(f"an iteration takes time, and nothing gives time back: {self}")

    def iteration(self, it: Iteration) -> float:
        """One iteration, as scheduled."""
        seconds = (
            self.step_s
            + self.token_s * (it.num_decodes + it.prompt_tokens)
            + self.context_s * it.context_tokens
        )
        if it.prefills:
            seconds += self.prompt_s * len(it.prefills)
        if it.copies:
            seconds += self.copy_s * self.block_size * len(it.copies)
        if it.swapped_out or it.swapped_in:
            seconds += self.swap_out_s * len(it.swapped_out) + self.swap_in_s * len(it.swapped_in)
        return seconds

    def completion(self, done: Completion) -> float:
        """What a manager without sharing copies when beams change parents."""
        slots = 0
        for moves in done.moves:
            if moves and isinstance(moves[0], tuple):
                slots += sum(count for _, _, count in moves)
        return self.copy_s * slots

    def decode_steps(self, num_steps: int, num_seqs: int, context_tokens: int) -> float:
        """`num_steps` iterations of `num_seqs` sequences that first read `context_tokens`."""
        first = self.step_s + self.token_s * num_seqs + self.context_s * context_tokens
        longer = self.context_s * num_seqs  # each step reads a token more of every sequence
        return num_steps * first + longer * (num_steps * (num_steps - 1) / 2)

    def steps_until(
        self, wait_s: float, at_most: int, num_seqs: int, context_tokens: int
    ) -> int:
        """How many such iterations start before `wait_s` seconds have passed, at most."""
        if wait_s <= 0.0:
            return 0
        first = self.step_s + self.token_s * num_seqs + self.context_s * context_tokens
        half = self.context_s * num_seqs / 2.0
        linear = first - half  # half n**2 + linear n = wait, in the form that does not cancel
        root = 2.0 * wait_s / (linear + math.sqrt(linear * linear + 4.0 * half * wait_s))
        steps = min(at_most, math.ceil(root))
        # Rounding may be off by one: the test is that of the plain loop.
        while steps < at_most and self.decode_steps(steps, num_seqs, context_tokens) < wait_s:
            steps += 1
        while steps and self.decode_steps(steps - 1, num_seqs, context_tokens) >= wait_s:
            steps -= 1
        return steps


UNIT = LatencyModel(step_s=1.0)  # time counted in iterations
