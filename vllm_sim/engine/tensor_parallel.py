"""One model over several GPUs: one scheduler and one block table, a share of all else on each rank.

Reproduces: section 4.6. Every rank has its heads' share of the weights and of K and V, and blocks
of the same numbers. Rank 0 decides an iteration and sends it once; each layer then takes two
all-reduces. Logits are the same on every rank, and so are the tokens.

    with join("auto") as ranks:             # ranks.py; under torchrun
        shard(model, ranks)
        worker = Worker(model, num_blocks=983, block_size=16, max_len=2048)
        if ranks.rank:
            follow(worker, ranks)           # until the leader closes
        else:
            with Leader(worker, ranks) as leader:
                Server(leader, new_manager("paged", 983, 16)).serve(groups)
"""

from __future__ import annotations

import atexit
import time
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from vllm_sim.engine.block_cache import Step
from vllm_sim.engine.paged_cache import PagedCache
from vllm_sim.engine.ranks import RankLostError, Ranks, RanksDifferError
from vllm_sim.engine.support import UnsupportedModelError, heads
from vllm_sim.engine.worker import Flight, Order, Worker

FAMILIES = "opt", "llama"
BY_ROWS = {"q_proj", "k_proj", "v_proj", "fc1", "gate_proj", "up_proj"}
BY_COLUMNS = {"out_proj", "o_proj", "fc2", "down_proj"}


class SummedLinear(nn.Linear):
    """Some columns of a layer's weight: what all ranks have of the output is summed. The bias is
    whole, and rank 0 alone adds it."""

    ranks: Ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., columns) -> (..., all rows)
        out = linear(x, self.weight, None if self.ranks.rank else self.bias)
        self.ranks.sum(out)
        return out


def shard(model: PreTrainedModel, ranks: Ranks) -> None:
    """Leave this rank's share of a whole model, in place, be it on the meta device.

    Query and K/V heads, and the rows of the first layers of an MLP, are parted; embeddings and
    norms are whole. Raises UnsupportedModelError for other families, and what does not part evenly.
    """
    name, size = model.config.model_type, ranks.size
    if name not in FAMILIES:
        raise UnsupportedModelError(f"{name} is not parted over ranks: {', '.join(FAMILIES)} are")
    num_heads, num_kv_heads, _ = heads(model.config)
    inner = getattr(model.config, "ffn_dim", None) or model.config.intermediate_size
    parted = {"query heads": num_heads, "K/V heads": num_kv_heads, "rows of an MLP": inner}
    for what, count in parted.items():
        if count % size:
            raise UnsupportedModelError(
                f"{name}: {count} {what} cannot be divided among {size} ranks"
            )
    layers = [(path.rpartition(".")[2], layer) for path, layer in model.named_modules()]
    if any(type(one) is not nn.Linear for part, one in layers if part in BY_ROWS | BY_COLUMNS):
        raise UnsupportedModelError(f"{name}: it is parted, or its layers fused, already")
    for part, layer in layers:
        if part in BY_ROWS:
            layer.weight = _share(layer.weight, 0, ranks)
            layer.out_features = len(layer.weight)
            if layer.bias is not None:
                layer.bias = _share(layer.bias, 0, ranks)
        elif part in BY_COLUMNS:
            layer.weight = _share(layer.weight, 1, ranks)
            layer.in_features = layer.weight.shape[1]
            layer.__class__, layer.ranks = SummedLinear, ranks
        elif hasattr(layer, "q_proj") and hasattr(layer, "num_heads"):  # OPT's attention
            layer.num_heads //= size


def _share(whole: nn.Parameter, dim: int, ranks: Ranks) -> nn.Parameter:
    """This rank's rows (dim 0) or columns (dim 1), in memory of their own."""
    part = whole.detach().chunk(ranks.size, dim)[ranks.rank]
    return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)


# -- one scheduler --------------------------------------------------------------------------


class Leader:
    """Rank 0's worker, for whoever commands one: an order goes to all ranks, and is then run here.

    `messages`, `bytes` and `seconds` of the orders sent are counted. With `check` all ranks compare
    after each what their devices hold: RanksDifferError. All else is the worker's own.
    """

    def __init__(self, worker: Worker, ranks: Ranks, *, check: bool = False) -> None:
        self.worker, self._ranks, self._check = worker, ranks, check
        self.messages = self.bytes = 0
        self.seconds = 0.0
        _release_at_exit(worker)
        ranks.tell(check)

    def __getattr__(self, name: str):
        return getattr(self.worker, name)

    def prepare(self, *most: int) -> int:
        """As the worker's, on all ranks: a graph holds all-reduces."""
        self._ranks.tell(most)
        return self.worker.prepare(*most)

    def run(self, order: Order) -> Flight:
        """As the worker's."""
        start = time.perf_counter()
        self.bytes += self._ranks.tell(order)
        self.seconds += time.perf_counter() - start
        self.messages += 1
        return _run(self.worker, order, self._ranks, self._check)

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close, whatever happened here: unless the others are gone, or go by themselves."""
        if kind is None or not issubclass(kind, RankLostError | RanksDifferError):
            self.close()

    def close(self) -> None:
        """The others go on behind `follow`; no rank has graphs any more, as its NCCL ends next."""
        self._ranks.tell(None)
        self.worker.release()


def follow(worker: Worker, ranks: Ranks) -> None:
    """Do what the leader tells, until it closes."""
    _release_at_exit(worker)
    check = ranks.hear()
    while (told := ranks.hear()) is not None:
        if isinstance(told, Order):
            _run(worker, told, ranks, check)
        else:
            worker.prepare(*told)
    worker.release()


def _release_at_exit(worker: Worker) -> None:
    """Also a process that ends by an error ends NCCL, as its last act, and would wait for graphs;
    it does not wait for a device, which may wait for a rank that is gone."""
    atexit.register(worker.release, wait=False)


def _run(worker: Worker, order: Order, ranks: Ranks, check: bool) -> Flight:
    flight = worker.run(order)
    if check:
        ranks.check_same("tables, slots, lengths and tokens", worker.digest())
    return flight


# -- generate() -----------------------------------------------------------------------------


class RanksCache(PagedCache):
    """A PagedCache that rank 0 decides for all: it sends each forward's Step, with the blocks to
    copy. The manager of another rank is empty."""

    def __init__(
        self, model: PreTrainedModel, num_blocks: int, *args, ranks: Ranks, **options
    ) -> None:
        self._ranks, self._freed = ranks, []
        super().__init__(model, num_blocks, *args, **options)

    def make_step(self, key: torch.Tensor, mask: torch.Tensor | None) -> Step:
        """Of rank 0; what it raises is raised by all."""
        if self._ranks.rank:
            return self._heard(key)
        try:
            step = super().make_step(key, mask)
        except Exception as error:
            self._ranks.tell(error)
            raise
        self._ranks.tell((_moved(step, torch.device("cpu")), self._freed, self.copies))
        self._freed = []
        return step

    def _heard(self, key: torch.Tensor) -> Step:
        told = self._ranks.hear()
        if isinstance(told, Exception):
            raise told
        step, freed, self.copies = told
        self.pool.poison_blocks(freed)
        self.pool.copy_blocks(self.copies)
        self._seen += key.shape[2]
        self._tell()
        return _moved(step, key.device)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """A matter of tables, which rank 0 has."""
        if not self._ranks.rank:
            super().reorder_cache(beam_idx)

    def _forget(self, freed: list[int]) -> None:
        self._freed += freed
        super()._forget(freed)


def _moved(step: Step, device: torch.device) -> Step:
    """The same numbers on another device."""
    names = "slots", "tables", "lens"
    moved = {name: getattr(step, name).to(device) for name in names}
    if step.written is not None:
        moved["written"] = step.written.to(device)
    parts = (replace(part, table=part.table.to(device)) for part in step.segments)
    return replace(step, **moved, segments=tuple(parts))
