"""What a GPU is: its memory as sold and as CUDA reports it, its bandwidth and its FLOPS.

Reproduces nothing: of the paper are only the names of its two A100s.

    GPUS["h100"].memory_bytes

A datasheet's GB is marketing for what is on the board: 80 GB on an A100 are 80 GiB of memory less
what ECC and the driver keep, and a program sees 79.15 GiB = 84.99 GB. So neither 80 x 10**9 nor
80 x 2**30 bytes is the size to plan with.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sim.paper import GIB


@dataclass(frozen=True)
class GPU:
    """One GPU, whole. `memory_bytes` as CUDA reports it: it differs by up to 1 % from one driver
    release or board to the next. None: not known."""

    name: str
    memory_bytes: int
    sold_gb: int | None = None
    bytes_per_s: float | None = None  # of its memory
    flops_per_s: float | None = None  # in 16 bits with tensor cores, dense
    datasheet: str = ""

    def __post_init__(self) -> None:
        if type(self.memory_bytes) is not int or self.memory_bytes < 1:
            raise ValueError(
                f"{self.name}: memory_bytes must be a whole number from 1, "
                f"not {self.memory_bytes!r}"
            )


# Bytes: `int(... * GIB)` is the 'total capacity' that torch prints when it is out of memory, with
# two decimals. The two A100s' are an assumption (DERIVED): paper and artifact give no byte count.
# FLOPS: half of what a datasheet prints where it prints them with sparsity.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("t4", int(14.56 * GIB), 16, 320e9, 65e12, "NVIDIA T4 datasheet, 16 GB GDDR6"),
        GPU("l4", int(22.03 * GIB), 24, 300e9, 121e12, "NVIDIA L4 datasheet, 24 GB GDDR6"),
        GPU("a10g", int(22.06 * GIB), 24, 600e9, 70e12, "NVIDIA A10 datasheet (A10G: AWS G5)"),
        GPU("a100-40gb", 42_298_834_944, 40, 1555e9, 312e12, "NVIDIA A100 datasheet, SXM"),
        GPU("a100-80gb", 84_987_740_160, 80, 2039e9, 312e12, "NVIDIA A100 datasheet, SXM"),
        GPU("h100", int(79.18 * GIB), 80, 3350e9, 989.5e12, "NVIDIA H100 datasheet, SXM, HBM3"),
        GPU("h200", int(139.80 * GIB), 141, 4800e9, 989.5e12, "NVIDIA H200 datasheet, HBM3e"),
        GPU("b200", int(178.35 * GIB), 180, 8000e9, 2250e12, "NVIDIA DGX B200 datasheet, of 8"),
        GPU("mi300x", int(191.69 * GIB), 192, 5300e9, 1307.4e12, "AMD Instinct MI300X data sheet"),
        GPU("rtx4090", int(23.65 * GIB), 24, 1008e9, 165.2e12, "NVIDIA GeForce RTX 4090 specs"),
    )
}
