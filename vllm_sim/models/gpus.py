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
# The RTX 4090's bytes are what vLLM logged, GB200's and B300's about nvidia-smi's.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("t4", int(14.56 * GIB), 16, 320e9, 65e12, "NVIDIA T4 datasheet, 16 GB GDDR6"),
        GPU("v100", int(31.73 * GIB), 32, 900e9, 125e12, "NVIDIA V100 datasheet, SXM2, 32 GB"),
        GPU("l4", int(22.03 * GIB), 24, 300e9, 121e12, "NVIDIA L4 datasheet, 24 GB GDDR6"),
        GPU("l40s", int(44.39 * GIB), 48, 864e9, 362e12, "NVIDIA L40S datasheet, 48 GB GDDR6"),
        GPU("a10g", int(22.06 * GIB), 24, 600e9, 70e12, "NVIDIA A10 datasheet (A10G: AWS G5)"),
        GPU("a100-40gb", 42_298_834_944, 40, 1555e9, 312e12, "NVIDIA A100 datasheet, SXM"),
        GPU("a100-80gb", 84_987_740_160, 80, 2039e9, 312e12, "NVIDIA A100 datasheet, SXM"),
        GPU("h100", int(79.18 * GIB), 80, 3350e9, 989.5e12, "NVIDIA H100 datasheet, SXM, HBM3"),
        GPU("h20", int(95.00 * GIB), 96, 4000e9, 148e12, "NVIDIA H20 datasheet, HBM3"),
        GPU("h200", int(139.80 * GIB), 141, 4800e9, 989.5e12, "NVIDIA H200 datasheet, HBM3e"),
        GPU("b200", int(178.35 * GIB), 180, 8000e9, 2250e12, "NVIDIA DGX B200 datasheet, of 8"),
        GPU(
            "gb200", int(184.00 * GIB), 186, 8000e9, 2500e12, "NVIDIA GB200 NVL72 datasheet, of 72"
        ),
        GPU("b300", int(267.00 * GIB), 288, 8000e9, 2500e12, "NVIDIA DGX B300 datasheet, of 8"),
        GPU("mi300x", int(191.69 * GIB), 192, 5300e9, 1307.4e12, "AMD Instinct MI300X data sheet"),
        GPU("rtx3090", int(23.58 * GIB), 24, 936e9, 71e12, "NVIDIA GeForce RTX 3090 specs"),
        GPU("rtx4090", int(23.52 * GIB), 24, 1008e9, 165.2e12, "NVIDIA GeForce RTX 4090 specs"),
        GPU("rtx5090", int(31.36 * GIB), 32, 1792e9, 209.5e12, "NVIDIA GeForce RTX 5090 specs"),
        GPU("rtxpro6000", int(94.97 * GIB), 96, 1597e9, 503.8e12, "RTX PRO 6000 Server Edition"),
    )
}
