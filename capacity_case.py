"""One case of capacity.py: a model on GPUs under a workload, and the form of an answer about it.

Reproduces nothing by itself: capacity.py makes a Case of its arguments, capacity_tables.py asks it
one question after the other, and each answer is a Section.
"""

from __future__ import annotations

from dataclasses import dataclass

import paper
from capacity_simulation import Workload
from decoder import Decoder
from gpus import DataGPU
from memory_plan import Plan, Sizes
from model_config import Model
from paper import GIB
from report import Table

PLANS = {"paper": "the paper's memory plan", "serving": "a serving system's memory plan"}


@dataclass(frozen=True)
class Case:
    """One model on one kind of GPU under one workload. Lengths in tokens."""

    model: Model
    gpu: DataGPU | None  # None: a memory size was given
    plan: Plan
    sizes: Sizes
    weight_type: str
    kv_type: str
    max_len: int
    workload: Workload
    prefix_len: int
    seed: int

    @property
    def line(self) -> str:
        """The line above each table."""
        memory = f"{self.plan.memory / GIB:.2f} GiB"
        gpu = f"{self.gpu.name} of {memory}" if self.gpu else f"GPU of {memory}"
        return (
            f"{self.model.name}, {self.weight_type} weights, {self.kv_type} K/V, "
            f"{self.plan.num_gpus} x {gpu}, {PLANS[self.plan.name]}, "
            f"block size {self.plan.block_size}, up to {self.max_len:,} tokens"
        )

    @property
    def windowed(self) -> bool:
        """Whether a window is shorter than the longest request."""
        windows = (layers.window for layers in self.model.decoder.cache_layers)
        return any(window and window < self.max_len for window in windows)

    @property
    def workload_line(self) -> str:
        return f"{self.line}, {self.workload.name}, seed {self.seed}"


@dataclass(frozen=True)
class Section:
    """A question, the table that answers it (its title is the question), and the answer."""

    table: Table
    answer: str

    @property
    def question(self) -> str:
        return self.table.title

    def to_json(self) -> dict:
        """The table, and the answer beside it."""
        return {**self.table.to_json(), "answer": self.answer}


def is_papers(model: Model, gpu: DataGPU | None, num_gpus: int) -> bool:
    """Whether these are one of the paper's deployments."""
    deployment = paper.DEPLOYMENTS.get(model.preset.name) if model.preset and gpu else None
    return deployment is not None and (gpu.name, num_gpus) == (
        deployment.gpu.name,
        deployment.num_gpus,
    )


def describe(decoder: Decoder) -> dict[str, object]:
    """A decoder's sizes for --json."""
    weights = decoder.weights()
    return {
        "family": decoder.family,
        "parameters": weights.total,
        "active_parameters": weights.active,
        "layers": decoder.num_layers,
        "hidden_size": decoder.hidden_size,
        "heads": decoder.num_heads,
        "kv_heads": decoder.num_kv_heads,
        "head_size": decoder.head_size,
    }
