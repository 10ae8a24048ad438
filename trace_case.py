"""One trace on one case of capacity.py: the requests, the server and its speed.

Reproduces nothing by itself: trace_options.py makes a TraceCase of the arguments, trace_tables.py
answers for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import paper
from capacity_case import Case
from capacity_simulation import NO_LIMIT
from iteration import Limits
from memory_plan import BATCHED_TOKENS
from server_speed import Speed
from trace_serving import Columns, Server
from traces import Trace


@dataclass(frozen=True, eq=False)
class TraceCase:
    """A case, the requests that it serves and how fast, and the share that may be held up."""

    case: Case
    trace: Trace
    speed: Speed
    rate: float
    arrival_rate: float | None  # None: the file's own times

    @property
    def server(self) -> Server:
        """The limit on an iteration's tokens is the one the memory plan leaves room for."""
        plan = self.case.plan
        batched = paper.MAX_BATCHED_TOKENS if plan.name == "paper" else BATCHED_TOKENS
        limits = Limits(max(batched, self.case.max_len), NO_LIMIT)
        return Server(plan.block_size, self.case.max_len, self.speed.latency, limits)

    @property
    def columns(self) -> Columns:
        trace = self.trace
        return trace.arrivals.tolist(), trace.prompts.tolist(), trace.outputs.tolist()

    @property
    def line(self) -> str:
        """The line above a table: the trace, the server and its speed."""
        arrivals = ""
        if self.arrival_rate is not None:
            arrivals = f", arriving at {self.arrival_rate:g}/s, seed {self.case.seed}"
        windows = "; every layer whole, without windows" if self.case.windowed else ""
        return f"{self.trace.name}{arrivals}; {self.case.line}; {self.speed.assumed}{windows}"

    def to_json(self) -> dict[str, object]:
        """For the setting."""
        trace = self.trace
        return {
            "file": trace.name,
            "format": trace.form,
            "rows_read": trace.rows_read,
            "rows_refused": {reason: found.rows for reason, found in trace.refused.items()},
            "rows_sorted": trace.rows_sorted,
            "requests": len(trace),
            "arrival_rate": None if self.arrival_rate == float("inf") else self.arrival_rate,
            "all_at_once": self.arrival_rate == float("inf"),
            "preemption_rate": self.rate,
            "speed": self.speed.assumed,
        }
