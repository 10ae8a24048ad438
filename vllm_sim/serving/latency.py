"""Seconds of one iteration, from what it reads and computes.

Reproduces: the machine under section 6's experiments, as far as bytes, FLOPs and a few constants
can. An iteration takes, on each GPU,

    c0                              software, small kernels, communication: fitted per model
    + the longer of reading the weights, over 0.8 x bandwidth, and
      tokens x 2 x parameters / (0.6 x peak FLOPS)
    + K/V bytes read / (0.8 x bandwidth)
    + cs x sequences                a token of each is sampled, in Python: fitted per model
    + cr x requests                 whose prompts join others that decode: fitted per model
    + bytes copied (read and written), and what swapping takes

    model = latency_model(DEPLOYMENTS["opt-13b"], 16)
    model.iteration(iteration)                    # one iteration
    model.decode_steps(100, num_seqs=32, context_tokens=16_000)     # a hundred, in closed form

0.8 of the bandwidth is a customary round number; 0.6 of the FLOPS was chosen, as the form was, with
Figs. 16 and 19a in view. `FITTED` is what `tools/fit_latency.py` finds where nothing waits for
memory: in the left ends of Figs. 12, 14 (beam search) and 16, in Fig. 1 (right) and in Fig. 19a. It
prints them, and `--check` fails if they are not these. Nothing else is from the paper's results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kv_cache_manager import BaselineCacheManager
from vllm_sim.models import Deployment
from vllm_sim.paper import BLOCK_SIZE
from vllm_sim.serving.scheduler import Completion, Iteration, Manager

BANDWIDTH_USED, FLOPS_USED = 0.8, 0.6


@dataclass(frozen=True, slots=True)
class Software:
    """The fitted constants of one model, in seconds (tools/fit_latency.py)."""

    step_s: float  # c0: each iteration
    seq_s: float  # cs: each sequence that generates a token
    request_s: float  # cr: each request whose prompt is computed beside others that decode
    static_step_s: float = 0.0  # c0 of FasterTransformer, from its leftmost ShareGPT point
    beam_s: float = 0.0  # each beam, beyond what a sample costs
    copy_call_s: float = 0.0  # each copy of a block of a moved beam, one a layer and K or V


@dataclass(frozen=True, slots=True)
class Swap:
    """Seconds to move one block over PCIe: so much for each block, and for each slot of it."""

    call_s: float
    slot_s: float


FITTED = {
    "opt-13b": Software(7.25e-3, 0.12e-3, 11e-3, 0.95e-3, 0.08e-3, 1.4e-6),
    "opt-66b": Software(25.5e-3, 0.15e-3, 11.5e-3, 5.0e-3),
    "opt-175b": Software(54.75e-3, 0.265e-3, 6.5e-3, 14.5e-3),
    # Fig. 16's, with another version of the authors' code; its left ends leave cs open.
    "llama-13b": Software(5e-3, 0.12e-3, 0.0),
}
# From Fig. 19a's microbenchmark, an input of Figs. 14 and 19b (tools/fit_latency.py).
SWAP_IN = Swap(0.268e-3, 0.0672e-3)
SWAP_OUT = Swap(0.154e-3, 0.0626e-3)


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Seconds of an iteration as a sum over what it does."""

    step_s: float  # each iteration
    token_s: float = 0.0  # each token computed
    context_s: float = 0.0  # each token of K/V read
    seq_s: float = 0.0  # each sequence that generates a token
    request_s: float = 0.0  # each request admitted to others that decode
    copy_s: float = 0.0  # each slot copied inside GPU memory
    swap_out_s: float = 0.0  # each block (measured for OPT-13B's slots)
    swap_in_s: float = 0.0
    move_s: float = 0.0  # each block copied where beams do not share, beyond its slots
    block_size: int = 1
    weights_s: float = 0.0  # reading the weights, behind which computing tokens hides

    def __post_init__(self) -> None:
        if (
            not self.step_s + self.weights_s > 0.0
            or min(getattr(self, f) for f in self.__slots__) < 0.0
        ):
            raise ValueError(f"an iteration takes time, and nothing gives time back: {self}")

    def iteration(self, it: Iteration) -> float:
        """One iteration, as scheduled."""
        tokens = it.num_decodes + it.prompt_tokens
        seconds = self.step_s + max(self.weights_s, self.token_s * tokens)
        seconds += self.seq_s * it.num_seqs + self.context_s * it.context_tokens
        if it.num_decodes:
            seconds += self.request_s * len(it.prefills)
        if it.copies:
            seconds += self.copy_s * self.block_size * len(it.copies)
        if it.swapped_out or it.swapped_in:
            seconds += self.swap_out_s * len(it.swapped_out) + self.swap_in_s * len(it.swapped_in)
        return seconds

    def completion(self, done: Completion, manager: Manager) -> float:
        """What a manager without sharing copies when beams change parents.

        As in the artifact, a beam that takes another's place copies its whole reservation.
        """
        if not isinstance(manager, BaselineCacheManager):
            return 0.0
        moved = [seq_id for reorder in done.reorders for seq_id in reorder]
        blocks = sum(manager.reservation(seq_id).num_blocks for seq_id in moved)
        return (self.copy_s * self.block_size + self.move_s) * blocks

    def decode_steps(self, num_steps: int, num_seqs: int, context_tokens: int) -> float:
        """`num_steps` iterations of `num_seqs` sequences that first read `context_tokens`."""
        first = self._decode_step(num_seqs, context_tokens)
        longer = self.context_s * num_seqs  # each step reads a token more of every sequence
        return num_steps * first + longer * (num_steps * (num_steps - 1) / 2)

    def _decode_step(self, num_seqs: int, context_tokens: int) -> float:
        work = max(self.weights_s, self.token_s * num_seqs)
        return self.step_s + work + self.seq_s * num_seqs + self.context_s * context_tokens

    def steps_until(self, wait_s: float, at_most: int, num_seqs: int, context_tokens: int) -> int:
        """How many such iterations start before `wait_s` seconds have passed, at most."""
        if wait_s <= 0.0:
            return 0
        first = self._decode_step(num_seqs, context_tokens)
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


@dataclass(frozen=True, slots=True)
class ApartLatency(LatencyModel):
    """A server that computes prompts and decodes apart, each of them reading the weights, as
    vllm_sim/engine/worker.py does: constants are fitted to what it took (benchmarks/serve.py)."""

    prompt_s: float = 0.0  # each iteration with prompts, beside the weights or the tokens' time

    def iteration(self, it: Iteration) -> float:
        """One iteration, as scheduled."""
        seconds = 0.0
        if it.num_decodes:
            seconds += self._decode_step(it.num_decodes, it.context_tokens)
        if it.prompt_tokens:
            seconds += self.prompt_s + max(self.weights_s, self.token_s * it.prompt_tokens)
        seconds += self.copy_s * self.block_size * len(it.copies)
        swaps = self.swap_out_s * len(it.swapped_out) + self.swap_in_s * len(it.swapped_in)
        return seconds + swaps or self.step_s


UNIT = LatencyModel(step_s=1.0)  # time counted in iterations


def latency_model(
    deployment: Deployment,
    block_size: int = BLOCK_SIZE,
    software: Software | None = None,
    *,
    static: bool = False,
    beams: bool = False,
) -> LatencyModel:
    """The model of a deployment; `software` as fitted unless given, `static` for
    FasterTransformer's, `beams` if every sequence is one. KeyError for a model or GPU of which
    nothing is known."""
    model, gpu, gpus = deployment.model, deployment.gpu, deployment.num_gpus
    if gpu.bytes_per_s is None or gpu.flops_per_s is None:
        raise KeyError(gpu.name)
    software = software or FITTED[model.name]
    if static:
        software = Software(software.static_step_s, 0.0, 0.0)
    params = model.split_params // gpus + model.whole_params
    bandwidth = BANDWIDTH_USED * gpu.bytes_per_s
    slot_bytes = model.kv_bytes_per_token / gpus
    return LatencyModel(
        step_s=software.step_s,
        token_s=2 * params / (FLOPS_USED * gpu.flops_per_s),
        context_s=slot_bytes / bandwidth,
        seq_s=software.seq_s + (software.beam_s if beams else 0.0),
        request_s=software.request_s,
        copy_s=2 * slot_bytes / bandwidth,
        swap_out_s=SWAP_OUT.call_s + SWAP_OUT.slot_s * block_size,
        swap_in_s=SWAP_IN.call_s + SWAP_IN.slot_s * block_size,
        move_s=2 * model.num_layers * software.copy_call_s,
        block_size=block_size,
        weights_s=2 * params / bandwidth,
    )
