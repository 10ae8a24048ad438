"""Seconds of an iteration on a server of today: CUDA graphs, kernels, no loop in Python.

Reproduces nothing of the paper: latency.py is the machine of 2023, this one was held against runs
of vLLM 0.19 (benchmarks/replay.py). On each GPU an iteration takes

    its kernels x kernel_s     what neither bytes nor FLOPs explain
    + for the dense matrices, the experts that its tokens touch and the output head, each:
      the longer of their bytes / (b x bandwidth) and their FLOPs / (f x peak)
    + what decodes read of K and V / (b x bandwidth), times 1 + the tail: where the kernel gives a
      sequence and K/V head to one multiprocessor, the last ones end late. With w of them for each
      multiprocessor that is min(`most_tail`, `tail` / w)
    + attention of prompts: FLOPs of all pairs of a token and one before it / (a x peak)
    + two messages a layer between the GPUs: a latency, and bytes / the link's bandwidth

    model = ServerLatency(work, CARDS["h100"])
    model.iteration(iteration)
    model.decode_steps(100, num_seqs=32, context_tokens=16_000)     # a hundred, in closed form

`FITTED` is what `tools/fit_server_latency.py` finds on one run (Llama 3.1 8B on an RTX 4090), and
`HOPPER` what it finds in the rows of one model on H100s; `--check` fails if they are not these. The
rest is from datasheets or was measured by others on their own (CARDS), but for PCIe (LINKS).
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sim.serving.scheduler import Completion, Iteration, Manager


@dataclass(frozen=True)
class Shares:
    """The fitted constants, the same for every model."""

    bandwidth: float  # b, of a card's bandwidth
    flops: float  # f, of its peak, by matrices
    attention_flops: float  # a, of its peak in 16 bits, by the attention of prompts
    kernel_s: float
    tail: float
    most_tail: float

    def __post_init__(self) -> None:
        if not all(one > 0.0 for one in (self.bandwidth, self.flops, self.attention_flops)):
            raise ValueError(f"shares are above 0, got {self}")
        if min(self.kernel_s, self.tail, self.most_tail) < 0.0:
            raise ValueError(f"nothing gives time back: {self}")


FITTED = Shares(0.92, 0.94, 0.94, 1e-6, 0.8, 0.7)
HOPPER = Shares(0.83, 0.94, 0.94, 7e-6, 0.0, 0.0)  # FlashAttention 3 has no tail


@dataclass(frozen=True)
class Link:
    """What joins the GPUs of a server: bytes/s of one direction as an all-reduce of one message
    gets them, those of messages below `small_bytes`, and seconds before the first byte."""

    bytes_per_s: float
    small_bytes_per_s: float
    latency_s: float
    small_bytes: int = 8 << 20  # up to here vLLM takes its own kernel, which reads its peers


# NVLink: 450 GB/s each way on Hopper (datasheet), its latency fitted with HOPPER. PCIe 5.0 without
# NVLink: half of the datasheet's 64 GB/s each way for large messages and an eighth for small ones,
# both chosen in view of the one run with tensor parallelism over PCIe; the latency is that of
# LLMServingSim's configuration of the same machine.
LINKS = {
    "nvlink": Link(450e9, 450e9, 10e-6),
    "pcie": Link(32e9, 8e9, 20e-6),
}


@dataclass(frozen=True)
class Card:
    """One GPU: its memory's bytes/s, its FLOPS in 16 bits, multiprocessors, link and constants."""

    bytes_per_s: float
    flops_per_s: float
    multiprocessors: int
    link: Link
    shares: Shares = FITTED


# FLOPS: as torch multiplies 2048 x 2048 matrices in bf16 (issues 78, 79 and 162 of
# github.com/zzc0721/torch-performance-test-data): 164.8, 257.2 and 676.6 T. The datasheets' 165.2,
# 503.8 and 989.5 T are no measure of what cards of several kinds reach. The H200 is an H100 there.
CARDS = {
    "rtx4090": Card(1008e9, 164.8e12, 128, LINKS["pcie"]),
    "rtxpro6000": Card(1597e9, 257.2e12, 188, LINKS["pcie"]),
    "h100": Card(3350e9, 676.6e12, 132, LINKS["nvlink"], HOPPER),
    "h200": Card(4800e9, 676.6e12, 132, LINKS["nvlink"], HOPPER),
}


@dataclass(frozen=True)
class CacheLayers:
    """What the attention of a token costs in layers of one window, on one GPU, all of them
    together: bytes of K and V for each token before it, and FLOPs if it decodes or is of a
    prompt."""

    slot_bytes: float
    decode_flops: float
    prompt_flops: float
    window: int | None = None


@dataclass(frozen=True)
class Matrices:
    """Weights that are read and multiplied together, on one GPU."""

    read_bytes: float
    token_flops: float  # of each token
    speedup: float = 1.0  # over the card's FLOPS in 16 bits


@dataclass(frozen=True)
class Work:
    """What a model asks of each GPU of a server, in plain numbers.

    `replicas` share the experts and have a K/V cache each (data with expert parallelism): a token's
    experts are computed on all GPUs, the rest on one. `message_bytes` are a token's.
    """

    dense: Matrices
    head: Matrices  # the output head: of each sequence that generates
    cache: tuple[CacheLayers, ...]
    kv_heads: int
    kernels: int  # a step
    experts: Matrices | None = None
    num_experts: int = 1
    active_experts: int = 1
    state_bytes: float = 0.0  # of a sequence, read and written by each step of a decode
    messages: int = 0  # a step
    message_bytes: float = 0.0
    gpus: int = 1  # of one replica: tensor parallelism
    replicas: int = 1
    block_size: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.active_experts <= self.num_experts:
            raise ValueError(f"{self.active_experts} of {self.num_experts} experts")
        if min(self.kv_heads, self.gpus, self.replicas, self.block_size) < 1:
            raise ValueError(f"at least one of each, got {self}")


@dataclass(frozen=True)
class ServerLatency:
    """Seconds of an iteration of all replicas of a server together, which step at once."""

    work: Work
    card: Card

    def iteration(self, it: Iteration) -> float:
        """One iteration, as scheduled. What v1 does not do, swapping, is not counted."""
        work, card, shares = self.work, self.card, self.card.shares
        # The fullest replica: decodes are spread evenly, a part of a prompt is on one of them.
        longest = max([tokens for _, tokens in it.parts], default=0)
        prompts = max(longest, it.prompt_tokens / work.replicas)
        decodes = it.num_decodes / work.replicas
        everywhere = it.num_decodes + it.prompt_tokens
        seconds = self._matrices(decodes + prompts, everywhere, it.num_seqs / work.replicas)
        if it.num_decodes:
            seconds += self._read(decodes, it.context_tokens / work.replicas)
        if it.parts:
            pairs = [
                layers.prompt_flops * sum([_pairs(*part, layers.window) for part in it.parts])
                for layers in work.cache
            ]
            share = prompts / it.prompt_tokens
            seconds += share * sum(pairs) / (shares.attention_flops * card.flops_per_s)
        if it.copies:
            slots = len(it.copies) * work.block_size
            slot_bytes = sum([layers.slot_bytes for layers in work.cache])
            seconds += 2 * slots * slot_bytes / (shares.bandwidth * card.bytes_per_s)
        return seconds

    def completion(self, done: Completion, manager: Manager) -> float:
        """Nothing is moved between iterations."""
        return 0.0

    def decode_steps(self, num_steps: int, num_seqs: int, context_tokens: int) -> float:
        """`num_steps` iterations of `num_seqs` sequences that first read `context_tokens`."""
        own, context = num_seqs / self.work.replicas, context_tokens / self.work.replicas
        return num_steps * self._matrices(own, num_seqs, own) + self._read(own, context, num_steps)

    def steps_until(self, wait_s: float, at_most: int, num_seqs: int, context_tokens: int) -> int:
        """How many such iterations start before `wait_s` seconds have passed, at most."""
        if wait_s <= 0.0:
            return 0
        # Step n starts after n x first + half n**2, while no window bounds what is read.
        one, two = (self.decode_steps(n, num_seqs, context_tokens) for n in (1, 2))
        half = max(0.0, two - 2.0 * one) / 2.0
        linear = one - half
        root = linear + (linear * linear + 4.0 * half * wait_s) ** 0.5
        guess = min(2.0 * wait_s, at_most * root) / root if root > 0.0 else at_most
        low, high, wide = 0, at_most, 1  # fewer than `high` are enough, `low` are not
        steps = min(at_most - 1, int(guess) + 1)
        # Rounding may be off by one, and a window by more: the test is that of the plain loop.
        while low < high:
            if self.decode_steps(steps, num_seqs, context_tokens) < wait_s:
                low = steps + 1
                steps = min(high - 1, steps + wide)
            else:
                high = steps
                steps = max(low, steps - wide)
            wide *= 2
        return low

    # -- the parts ------------------------------------------------------------------------------

    def _matrices(self, tokens: float, everywhere: float, seqs: float) -> float:
        """Dense ones for the tokens of a replica, experts for those of all, and the messages."""
        work = self.work
        seconds = work.kernels * self.card.shares.kernel_s + self._longer(work.dense, 1.0, tokens)
        seconds += self._longer(work.head, 1.0, seqs)
        if work.experts:
            idle = (1.0 - work.active_experts / work.num_experts) ** everywhere
            seconds += self._longer(work.experts, 1.0 - idle, everywhere)
        if work.messages:
            link, size = self.card.link, work.message_bytes * tokens
            speed = link.small_bytes_per_s if size < link.small_bytes else link.bytes_per_s
            # All-reduce, or gather and scatter: each byte leaves and comes but for one's own.
            others = work.gpus * work.replicas
            sent = 2.0 * (others - 1) / others * size
            seconds += work.messages * (link.latency_s + sent / speed)
        return seconds

    def _longer(self, matrices: Matrices, touched: float, tokens: float) -> float:
        card, shares = self.card, self.card.shares
        read = touched * matrices.read_bytes / (shares.bandwidth * card.bytes_per_s)
        flops = shares.flops * card.flops_per_s * matrices.speedup
        return max(read, tokens * matrices.token_flops / flops)

    def _read(self, seqs: float, context: float, num_steps: int = 1) -> float:
        """Attention of so many decodes, that first read `context` and each step a token more."""
        work, card, shares = self.work, self.card, self.card.shares
        waves = seqs * work.kv_heads / card.multiprocessors
        tail = min(shares.most_tail, shares.tail / waves)
        seconds = 2 * work.state_bytes * seqs * num_steps / (shares.bandwidth * card.bytes_per_s)
        for layers in work.cache:
            read = layers.slot_bytes / (shares.bandwidth * card.bytes_per_s)
            flops = layers.decode_flops / (shares.attention_flops * card.flops_per_s)
            tokens = _context(num_steps, seqs, context, layers.window)
            seconds += max(read * (1.0 + tail), flops) * tokens
        return seconds


def _context(num_steps: int, seqs: float, context: float, window: int | None) -> float:
    """Tokens read in so many steps. A window bounds the mean sequence: nobody knows each here."""
    growing, most = num_steps, 0.0
    if window is not None:
        most = seqs * window
        growing = min(num_steps, max(0, -int((context - most) // seqs)))
    return growing * context + seqs * growing * (growing - 1) / 2 + (num_steps - growing) * most


def _pairs(before: int, tokens: int, window: int | None) -> float:
    """Pairs of a token and one that it attends to, itself included."""
    if window is None or before + tokens <= window:
        return tokens * before + tokens * (tokens + 1) / 2
    growing = max(0, window - before)  # those that see less than a window
    return growing * before + growing * (growing + 1) / 2 + (tokens - growing) * window
