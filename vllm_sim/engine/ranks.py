"""The processes that run one model, as torchrun starts them: how they meet, talk and end.

Reproduces: what section 4.6 needs of a cluster: rank 0 tells all others something once, over gloo
on the hosts, and tensors are summed, over NCCL on GPUs. tensor_parallel.py says what for.

    with join("auto") as ranks:             # UsageError outside of torchrun
        if ranks.rank:
            blocks = ranks.hear()
        else:
            ranks.tell([3, 5])
        ranks.sum(tensor)                   # in place, on every rank

A rank that ends early ends the others: what waits for it on the host raises RankLostError. Its main
thread may wait for a GPU that waits for the lost one's, for ever; so a thread of its own watches
each connection, and ends the process.
"""

from __future__ import annotations

import os
import pickle
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from paged_attention import choose_device
from vllm_sim.reporting.command_line import UsageError

ROOM = 1 << 18  # bytes of a message that take one collective; a longer one takes two
# Until a rank that says nothing, and is there, is given up: rank 0 may have something else to do.
SILENT_S = 1800.0
GRACE_S = 5.0  # for a rank to end by itself once another is gone
LOOPBACK = "lo"  # Linux's name for it
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
            with nullcontext() if tensor.is_cuda else _or_lost():
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
    if not (0 <= rank < size and local >= 0):
        raise UsageError(
            f"torchrun gives no RANK {rank} of a WORLD_SIZE of {size}, LOCAL_RANK {local}"
        )
    device, backend = choose_device(device_asked), "gloo"
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(f"rank {rank}: {torch.cuda.device_count()} GPUs here, one a rank")
        device, backend = torch.device("cuda", local), "nccl"
        torch.cuda.set_device(device)
    try:
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size) and LOOPBACK in _interfaces():
            # All are on this host, and need not look up its name: it may lead nowhere.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        silent = timedelta(seconds=silent_s)
        dist.init_process_group("gloo", timeout=silent, rank=rank, world_size=size)
        ranks = Ranks(rank, size, device, dist.new_group(backend=backend, timeout=silent))
        ranks.sum(torch.zeros(1, device=device))  # NCCL connects now, and not in a graph
        peers = _connections(ranks, silent_s)
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"rank {rank} cannot meet the others: {_first_line(error)}") from None
    leaving = threading.Event()
    options = {"target": _watch, "daemon": True}
    threads = [threading.Thread(args=(*peer, leaving), **options) for peer in peers.items()]
    for thread in threads:
        thread.start()
    try:
        yield ranks
        for peer in peers.values():
            with suppress(OSError):  # one that is gone: its thread ends this process
                peer.sendall(BYE)
        for thread in threads:
            thread.join()
    except RankLostError:
        raise  # it is watched on until this process has ended
    except BaseException:
        leaving.set()
        for peer in peers.values():
            with suppress(OSError):  # gone before
                peer.shutdown(socket.SHUT_RDWR)  # it need not wait until this process has ended
        raise
    dist.destroy_process_group()


def _interfaces() -> set[str]:
    """Names of this host's network interfaces."""
    return {name for _, name in socket.if_nameindex()}


def _number(name: str) -> int:
    """A variable that torchrun sets."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise UsageError(
            f"no {name} from torchrun: torchrun --nproc-per-node 2 SCRIPT --tensor-parallel"
        ) from None


@contextmanager
def _or_lost() -> Iterator[None]:
    """Turns what gloo raises for a connection that is gone into RankLostError."""
    try:
        yield
    except RuntimeError as error:
        told = re.sub(r"^\[\S+\] ", "", _first_line(error)).partition(". ")[0]  # gloo adds advice
        raise RankLostError(f"another rank is lost: {told}") from None


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


def _first_line(error: Exception) -> str:
    return f"{error}".partition("\n")[0]
