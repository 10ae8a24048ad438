"""One model over several GPUs: one scheduler and one block table, a share of all else on each rank.

Reproduces: section 4.6. Every rank has its heads' share of the weights and of K and V, and blocks
of the same numbers. Rank 0 decides an iteration and sends it once, over gloo; each layer then takes
two all-reduces, over NCCL on GPUs. Logits are the same on every rank, and so are the tokens.

    with join("auto") as ranks:             # under torchrun
        shard(model, ranks)
        worker = Worker(model, num_blocks=983, block_size=16, max_len=2048)
        if ranks.rank:
            follow(worker, ranks)           # until the leader closes
        else:
            leader = Leader(worker, ranks)
            Server(leader, new_manager("paged", 983, 16)).serve(groups)
            leader.close()

A rank that ends early ends the others: what waits for it on the host raises RankLostError, and a
rank that waits for its GPU is ended by a thread that watches the connection.
"""

from __future__ import annotations

import os
import pickle
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from paged_attention import choose_device
from vllm_sim.engine.block_cache import Step
from vllm_sim.engine.paged_cache import PagedCache
from vllm_sim.engine.support import UnsupportedModelError, heads
from vllm_sim.engine.weights import first_line
from vllm_sim.engine.worker import Flight, Order, Worker
from vllm_sim.reporting.command_line import UsageError

FAMILIES = "opt", "llama"
BY_ROWS = {"q_proj", "k_proj", "v_proj", "fc1", "gate_proj", "up_proj"}
BY_COLUMNS = {"out_proj", "o_proj", "fc2", "down_proj"}
ROOM = 1 << 16  # bytes of a message that take one collective; a longer one takes two
SILENT_S = 300.0  # until a rank that says nothing, and is there, is given up
GRACE_S = 5.0  # for a rank to end by itself once another is gone
BYE = b"."  # the one thing that a watching thread is told


class RankLostError(RuntimeError):
    """Another rank has ended, or says nothing any more: this one cannot go on."""


class RanksDifferError(RuntimeError):
    """Ranks that must hold the same numbers do not."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that run one model. Alone: Ranks(0, 1, device)."""

    rank: int
    size: int
    device: torch.device
    sums: dist.ProcessGroup | None = None  # whose all-reduces are the model's

    def tell(self, told: object) -> int:
        """Send it to all other ranks; how many bytes it takes."""
        body = pickle.dumps(told, protocol=pickle.HIGHEST_PROTOCOL)
        message = np.frombuffer(len(body).to_bytes(8, "little") + body, dtype=np.uint8)
        first = np.zeros(ROOM, dtype=np.uint8)
        first[: len(message)] = message[:ROOM]
        with _or_lost():
            dist.broadcast(torch.from_numpy(first), 0)
            if len(message) > ROOM:
                dist.broadcast(torch.from_numpy(message[ROOM:].copy()), 0)
        return len(message)

    def hear(self) -> object:
        """What rank 0 tells next; waits for it."""
        first = np.empty(ROOM, dtype=np.uint8)
        with _or_lost():
            dist.broadcast(torch.from_numpy(first), 0)
            end = 8 + int.from_bytes(first[:8].tobytes(), "little")
            rest = np.empty(max(0, end - ROOM), dtype=np.uint8)
            if len(rest):
                dist.broadcast(torch.from_numpy(rest), 0)
        return pickle.loads(first[8:end].tobytes() + rest.tobytes())

    def sum(self, tensor: torch.Tensor) -> None:
        """Over all ranks, in place. On a GPU it waits for nothing, and a graph can hold it."""
        if self.size > 1:
            with _or_lost():
                dist.all_reduce(tensor, group=self.sums)

    def check_same(self, what: str, digest: bytes) -> None:
        """RanksDifferError, on every rank, unless all have this digest."""
        mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with _or_lost():
            dist.all_gather(found, mine)
        others = [rank for rank, theirs in enumerate(found) if not theirs.equal(found[0])]
        if others:
            raise RanksDifferError(f"{what}: rank {others[0]} has others than rank 0")


@contextmanager
def join(device_asked: str, silent_s: float = SILENT_S) -> Iterator[Ranks]:
    """Meet the other processes that torchrun has started; at the end wait for theirs.

    Raises UsageError outside of torchrun or without a GPU for this rank, KernelError for a device
    that is not there.
    """
    rank, size, local = map(_number, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device, backend = choose_device(device_asked), "gloo"
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(f"rank {rank}: {torch.cuda.device_count()} GPUs here, one a rank")
        device, backend = torch.device("cuda", local), "nccl"
        torch.cuda.set_device(device)
    try:
        silent = timedelta(seconds=silent_s)
        dist.init_process_group("gloo", timeout=silent, rank=rank, world_size=size)
        ranks = Ranks(rank, size, device, dist.new_group(backend=backend, timeout=silent))
        ranks.sum(torch.zeros(1, device=device))  # NCCL connects now, and not in a graph
        peers = _connections(ranks, silent_s)
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"rank {rank} cannot meet the others: {first_line(error)}") from None
    leaving = threading.Event()
    options = {"target": _watch, "daemon": True}
    threads = [threading.Thread(args=(*peer, leaving), **options) for peer in peers.items()]
    for thread in threads:
        thread.start()
    try:
        yield ranks
        for peer in peers.values():
            peer.sendall(BYE)
        for thread in threads:
            thread.join()
    except RankLostError:
        raise  # it is watched on until this process has ended
    except BaseException:
        leaving.set()
        for peer in peers.values():
            peer.shutdown(socket.SHUT_RDWR)  # it need not wait until this process has ended
        raise
    dist.destroy_process_group()


def _number(name: str) -> int:
    """A variable that torchrun sets."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise UsageError(
            f"no {name} from torchrun: torchrun --nproc-per-node 2 generate.py --tensor-parallel"
        ) from None


@contextmanager
def _or_lost() -> Iterator[None]:
    """Turns what torch raises for a connection that is gone into RankLostError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        told = re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". ")[0]  # gloo adds advice
        raise RankLostError(f"another rank has ended: {told}") from None


def _connections(ranks: Ranks, seconds: float) -> dict[int, socket.socket]:
    """Between rank 0 and each other, by the other's rank: a process that ends closes its own."""
    if ranks.rank:
        place = os.environ["MASTER_ADDR"], ranks.hear()
        connection = socket.create_connection(place, timeout=seconds)
        connection.settimeout(None)
        connection.sendall(ranks.rank.to_bytes(4, "little"))
        return {0: connection}
    with socket.create_server(("", 0), backlog=ranks.size) as server:
        server.settimeout(seconds)
        ranks.tell(server.getsockname()[1])
        found = [server.accept()[0] for _ in range(1, ranks.size)]
    return {int.from_bytes(peer.recv(4), "little"): peer for peer in found}


def _watch(rank: int, peer: socket.socket, leaving: threading.Event) -> None:
    """In a thread: return when the peer says good-bye. If it is gone without, this process has
    a moment to end by itself: its main thread may wait for a GPU that waits for the peer's."""
    try:
        if peer.recv(1) == BYE:
            return
    except OSError:
        pass  # reset
    if not leaving.wait(GRACE_S):
        print(f"error: rank {rank} has ended", file=sys.stderr, flush=True)
        os._exit(2)


# -- a rank's share of a model --------------------------------------------------------------


class SummedLinear(nn.Linear):
    """Some columns of a layer's weight: what all ranks have of the output is summed, and the bias
    added once."""

    ranks: Ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., columns) -> (..., all rows)
        out = linear(x, self.weight)
        self.ranks.sum(out)
        return out if self.bias is None else out.add_(self.bias)


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
            raise UnsupportedModelError(f"{name}: {count} {what} are not parted over {size} ranks")
    for path, layer in model.named_modules():
        part = path.rpartition(".")[2]
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
    """Rank 0's worker, for a Server: an order goes to all ranks, and is then run here too.

    `messages`, `bytes` and `seconds` of the orders sent are counted. With `check` all ranks compare
    after each what their devices hold: RanksDifferError.
    """

    def __init__(self, worker: Worker, ranks: Ranks, *, check: bool = False) -> None:
        self.worker, self.model, self.most_rows = worker, worker.model, worker.most_rows
        self._ranks, self._check = ranks, check
        self.messages = self.bytes = 0
        self.seconds = 0.0
        seed = torch.initial_seed()
        ranks.tell((seed, check))
        torch.manual_seed(seed)  # of all ranks: samples are drawn alike

    def run(self, order: Order) -> Flight:
        """As the worker's."""
        start = time.perf_counter()
        self.bytes += self._ranks.tell(order)
        self.seconds += time.perf_counter() - start
        self.messages += 1
        return _run(self.worker, order, self._ranks, self._check)

    def close(self) -> None:
        """The others go on behind `follow`."""
        self._ranks.tell(None)


def follow(worker: Worker, ranks: Ranks) -> None:
    """Run what the leader orders, until it closes."""
    seed, check = ranks.hear()
    torch.manual_seed(seed)
    while (order := ranks.hear()) is not None:
        _run(worker, order, ranks, check)


def _run(worker: Worker, order: Order, ranks: Ranks, check: bool) -> Flight:
    flight = worker.run(order)
    if check:
        ranks.check_same("tables, slots, lengths and tokens", worker.digest())
    return flight


# -- generate() -----------------------------------------------------------------------------


class RanksCache(PagedCache):
    """A PagedCache that rank 0 decides for all: it sends each forward's Step, with the blocks to
    copy. The manager of another rank is empty."""

    def __init__(self, model: PreTrainedModel, num_blocks: int, *args, ranks: Ranks, **options):
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
