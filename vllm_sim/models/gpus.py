"""GPUs by name: what the datasheet sells in GB, and what CUDA reports in bytes.

Reproduces nothing: the paper's two GPUs are in paper.py and are taken from there, the others are
not in the paper. Used by capacity.py:

    from __SELF__ import GPUS
    GPUS["h100"].memory_bytes

A datasheet's GB is marketing for what is on the board: 80 GB on an A100 are 80 GiB of memory less
what ECC and the driver keep, and a program sees 79.15 GiB = 84.99 GB. So neither 80 x 10**9 nor
80 x 2**30 bytes is the size to plan with.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sim import paper
from vllm_sim.paper import GIB


@dataclass(frozen=True)
class DataGPU:
    """One GPU. `sold_gb` as in `datasheet`; `memory_bytes` as CUDA reports it, of the whole GPU.

    `memory_bytes` differs by up to 1 % from one driver release or board to the next.
    """

    name: str
    sold_gb: int
    memory_bytes: int
    datasheet: str

    def __post_init__(self) -> None:
        if self.memory_bytes < 1 or self.sold_gb < 1:
            raise ValueError(f"{self.name}: sizes must be positive")


def _reported(name: str, sold_gb: int, gib: float, datasheet: str) -> DataGPU:
    """`gib`: the 'total capacity' that torch prints when it is out of memory, two decimals."""
    return DataGPU(name, sold_gb, int(gib * GIB), datasheet)


def _of_the_paper(name: str, sold_gb: int) -> DataGPU:
    memory = paper.GPUS[name].memory_bytes
    return DataGPU(name, sold_gb, memory, "NVIDIA A100 datasheet (bytes: paper.py)")


GPUS = {
    gpu.name: gpu
    for gpu in (
        _reported("t4", 16, 14.56, "NVIDIA T4 datasheet, 16 GB GDDR6"),
        _reported("l4", 24, 22.03, "NVIDIA L4 datasheet, 24 GB GDDR6"),
        _reported("a10g", 24, 22.06, "NVIDIA A10 datasheet, 24 GB GDDR6 (A10G: AWS G5)"),
        _of_the_paper("a100-40gb", 40),
        _of_the_paper("a100-80gb", 80),
        _reported("h100", 80, 79.18, "NVIDIA H100 datasheet, SXM, 80 GB HBM3"),
        _reported("h200", 141, 139.80, "NVIDIA H200 datasheet, 141 GB HBM3e"),
        _reported("b200", 180, 178.35, "NVIDIA DGX B200 datasheet, 1,440 GB HBM3e in 8"),
        _reported("mi300x", 192, 191.69, "AMD Instinct MI300X data sheet, 192 GB HBM3"),
        _reported("rtx4090", 24, 23.65, "NVIDIA GeForce RTX 4090 specifications, 24 GB GDDR6X"),
    )
}
