"""How far capacity.py's K/V memory was from what vLLM servers logged at their start.

Reproduces nothing. The numbers are those of results/measured_servers.json, which
`benchmarks/measured_servers.py` makes; a test holds the two together.

    errors_of(ENGINE, several=False).median     # %
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sim.models.memory_plan import Engine


@dataclass(frozen=True)
class Errors:
    """Of the K/V memory, in percent, without its sign, over so many logs."""

    engine: str
    several: bool  # GPUs
    logs: int
    median: float
    most: float

    @property
    def kind(self) -> str:
        return "several GPUs" if self.several else "one GPU"


MEASURED = (
    Errors("vllm-0.16", False, 1, 0.05, 0.05),
    Errors("vllm-0.19", False, 15, 0.07, 0.29),
    Errors("vllm-0.19", True, 10, 0.31, 3.29),
    Errors("vllm-0.21", False, 1, 0.25, 0.25),
)


def errors_of(engine: Engine, several: bool) -> Errors | None:
    """Those measured of this kind of server; None if no log was at hand."""
    kind = engine.name, several
    return next((one for one in MEASURED if (one.engine, one.several) == kind), None)
