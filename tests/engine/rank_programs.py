"""What test_tensor_parallel.py runs on every rank: small models served, and ranks that end early.

    torchrun --nproc-per-node 2 tests/engine/rank_programs.py serve

Tests fork most ranks from a process that has imported this.
"""

import json
import os
import sys
import time

import torch
from small_models import VOCAB, small

import generate as command
from vllm_sim.engine import ranks as ranks_module
from vllm_sim.engine import weights
from vllm_sim.engine.fused import fuse
from vllm_sim.engine.ranks import ROOM, RankLostError, RanksDifferError, join
from vllm_sim.engine.server import Server
from vllm_sim.engine.tensor_parallel import Leader, follow, shard
from vllm_sim.engine.worker import Worker
from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.simulator import make_groups
from vllm_sim.serving.systems import new_manager
from vllm_sim.workload.requests import Request

BLOCKS, HOST_BLOCKS, SIZE = 24, 12, 4
FAMILIES = {"opt": 0.0, "llama": 0.0, "opt, drawn": 0.8}  # temperatures


def to_few(text):
    """Tokens that a small model has."""
    return [3 + byte % (VOCAB - 7) for byte in text.encode()]


def requests():
    """More than the pool holds at a time, a third of them with two samples."""
    lengths = [(5 + 3 * n % 14, 9 + 5 * n % 17, 1 + (n % 3 == 2)) for n in range(12)]
    return [Request(n, 0.0, *lengths[n]) for n in range(len(lengths))]


def worker_of(name, ranks=None):
    model = small(name.partition(",")[0])
    if ranks is not None:
        shard(model, ranks)
        fuse(model.to(ranks.device))  # norms as where it is served: by triton on a GPU
    sizes = {"max_len": 64, "num_cpu_blocks": HOST_BLOCKS, "most_rows": 40}
    return Worker(model, BLOCKS, SIZE, temperature=FAMILIES[name], **sizes)


def serve(worker):
    """The texts, swaps and recomputations."""
    manager = new_manager("paged", BLOCKS, SIZE, num_cpu_blocks=HOST_BLOCKS)
    server = Server(worker, manager, Limits(200, 20))
    result = server.serve(make_groups(requests()), keep=True).result
    return {
        "texts": [server.outputs[group] for group in sorted(server.outputs)],
        "preemptions": [result.num_swaps, result.num_recomputations],
        "iterations": result.num_iterations,
    }


def serve_all(device):
    """Each family, all numbers compared after each order; on GPUs as CUDA graphs."""
    long = list(range(200_000))  # takes two collectives
    with join(device) as ranks:
        assert ranks.hear() == long if ranks.rank else ranks.tell(long) > ROOM
        found = {}
        for name in FAMILIES:
            small.cache_clear()  # the last one's was parted
            worker = worker_of(name, ranks)
            torch.manual_seed(7 + ranks.rank)  # on which no draw depends; small() has its own
            assert worker.graphs == (device == "cuda")
            if ranks.rank:
                follow(worker, ranks)
                continue
            leader = Leader(worker, ranks, check=True)
            assert leader.prepare(40, 64) == len(leader.worker._lanes)
            found[name] = serve(leader)
            leader.close()
            found[name] |= {"messages": leader.messages, "bytes": leader.bytes}
            assert 0 < leader.seconds < 60 and not worker._lanes
        if not ranks.rank:
            print(json.dumps(found))


def lose(who, where):
    """A rank ends after some orders; another waits for it on the host, or on a device, which is a
    GPU or stands for one."""
    ranks_module.GRACE_S = 20.0 if where == "host" else 0.1
    with join("cuda" if where == "gpu" else "cpu") as ranks:
        worker, told = worker_of("opt", ranks), 0
        run = worker.run

        def until(order):
            nonlocal told
            told += 1
            if told == 4 and ranks.rank == int(who):
                os._exit(3)
            if told == 4 and where == "device":
                time.sleep(60)
            return run(order)

        worker.run = until
        if ranks.rank:
            follow(worker, ranks)
        else:
            serve(Leader(worker, ranks))


def differ(device):
    """A rank whose device holds another number."""
    with join(device) as ranks:
        worker = worker_of("opt", ranks)
        worker.newest[-2] = ranks.rank  # of a row that nobody needs
        if ranks.rank:
            follow(worker, ranks)
        else:
            serve(Leader(worker, ranks, check=True))


def generate(*args):
    """generate.py with a tokenizer that a small model can use."""
    few = weights.Tokenizer(to_few, to_few, str)
    weights.Source.tokenizer = lambda source: few
    sys.exit(command.main([*args]))


def main(part, *args):
    parts = {"serve": serve_all, "lose": lose, "differ": differ, "generate": generate}
    try:
        parts[part](*args)
    except (RankLostError, RanksDifferError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def forked(variables, out, errors, *args):
    """main() in a process that has everything imported; what it prints goes to files."""
    os.environ |= variables
    for descriptor, path in ((1, out), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    torch.set_num_threads(1)
    main(*args)


if __name__ == "__main__":
    main(*sys.argv[1:])
