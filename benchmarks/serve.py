"""Figs. 12, 13 and 14 by a model that runs, beside the simulator on the very same requests.

    python benchmarks/serve.py                        # steps, saturated, samples; 48 GB of a GPU
    python benchmarks/serve.py --part saturated --systems paged,oracle --seconds 30
    python benchmarks/serve.py --part poisson --rates paged=5,6 --rates max=1.5 --trace-seconds 60
    python benchmarks/serve.py --model tiny --dataset Alpaca --part saturated --seconds 3    # a CPU
    torchrun --nproc-per-node 2 benchmarks/serve.py --tensor-parallel --part saturated

Reproduces: section 6.2 and 6.3 as measured. Weights are random, output lengths forced as in the
paper, the K/V memory is Table 1's. The paper's four systems have the same memory, model, kernel and
worker (vllm_sim/engine/server.py).

    steps      a decode step over its floor (weights and live K/V at the rate of a large copy),
               what scattered blocks cost over consecutive ones; on a GPU which kernels take it
    saturated  a full queue for a fixed time: requests and tokens a second, the mean batch (Fig.
               13), slots by part (Fig. 2), the share of the time that the device computes
    poisson    seconds per token at the given rates, and the rate at two latencies (Fig. 12)
    samples    2, 4 and 6 samples a request at one rate (Fig. 14); Alpaca, as there
    peer       transformers' own continuous batching: the same model, requests and memory

The simulator's constants are fitted at the start of each run, to batches that no memory holds up.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_sim.reporting.command_line import UsageError, begin, raise_on_interrupt

if __name__ == "__main__":
    begin("serve.py", "torch", "numpy", "tabulate", "transformers")

import numpy as np
import pictures
import torch
from script import Row, Script, entry, options, show, table
from serve_earlier import (
    at_latencies,
    draw,
    earlier,
    in_window,
    limits_for,
    pool_of,
    queue_of,
    rates_at,
    requests_of,
    show_rates,
    window_of,
)
from serve_fit import calibrate, decode_steps, fit
from transformers import AutoConfig, PreTrainedModel

from kv_cache_manager import RequestTooLargeError
from paged_attention import DeviceMemoryError, check_device_memory, choose_device
from vllm_sim import paper
from vllm_sim.engine.fused import fuse
from vllm_sim.engine.ranks import RankLostError, Ranks, RanksDifferError, join
from vllm_sim.engine.server import Server
from vllm_sim.engine.support import UnsupportedModelError
from vllm_sim.engine.tensor_parallel import Leader, follow, shard
from vllm_sim.engine.weights import be_quiet, first_line, random_model
from vllm_sim.engine.worker import Worker
from vllm_sim.models import DEPLOYMENTS, MODELS, Model, kv_blocks, opt
from vllm_sim.reporting import drawing
from vllm_sim.reporting.arguments import file_name, positive, seed
from vllm_sim.reporting.progress import SILENT
from vllm_sim.serving.latency import ApartLatency
from vllm_sim.serving.scheduler import Iteration, Manager
from vllm_sim.serving.simulator import Observer, make_groups, simulate
from vllm_sim.serving.systems import PAGED, POLICIES
from vllm_sim.workload.data_sets import Lengths, find_lengths
from vllm_sim.workload.requests import Request
from vllm_sim.workload.text_files import WorkloadError

PARTS = ("steps", "saturated", "poisson", "samples", "peer")
TINY = opt("tiny", 2, 64, 4, vocab_size=512)  # for a CPU; transformers' peer has no OPT
TINY_LLAMA = Model("tiny-llama", "llama", 2, 64, 4, 4, 16, 512, 2048, widest=160)
SHAPES = {name: MODELS[name] for name in ("opt-13b", "opt-66b", "llama-13b")}
SHAPES |= {model.name: model for model in (TINY, TINY_LLAMA)}
TINY_BLOCKS = 256
BATCHES = (7, 15, 30, 60)  # of `steps`: what the four systems run
TEMPERATURE = 1.0
EVERY = 16  # iterations between two looks at where the memory is
PEER_REQUESTS, PEER_PROMPT, PEER_NEW = 64, 160, 128
SAMPLES = (2, 4, 6)
TOLD = RankLostError, RanksDifferError, RequestTooLargeError, UnsupportedModelError, WorkloadError


def columns(text: str) -> list[tuple[str, str]]:
    """Of a table: 'header=key', or a header alone that spells its key."""
    found = []
    for one in text.split(", "):
        header, told, key = one.partition("=")
        spelled = header.replace(" ", "_").replace("%", "percent").replace("/", "_per_")
        found.append((header, key if told else spelled))
    return found


BATCH = "batch, simulated=simulated_batch"
RATE = f"system, req/s=rate, requests, s/token, simulated=simulated_s_per_token, {BATCH}"
FULL = "system, req/s=requests_per_s, simulated=simulated_requests_per_s, tokens/s"
COLUMNS = {
    "steps": columns("batch, context, step ms, floor ms, over floor, paging %"),
    "kernels": columns(
        "batch, products ms, over floor=products_over_floor, attention ms,"
        " over floor=attention_over_floor, sums ms, others ms, other launches"
    ),
    "saturated": columns(f"{FULL}, {BATCH}, device busy %=busy_percent, recomputed, unserved"),
    "memory": columns(
        "system, tokens %, simulated=simulated_tokens_percent, reserved %, internal %"
    ),
    "poisson": columns(f"trace s, {RATE}, recomputed, swapped"),
    "samples": columns(f"samples, {RATE}, saved %, simulated=simulated_saved_percent"),
    "peer": columns("server, seconds, tokens, tokens/s"),
}
TITLES = {
    "steps": "A decode step over its floor, and what paging costs it",
    "kernels": "Where the time of such a step goes, by the device's trace",
    "saturated": "A full queue (Fig. 13)",
    "memory": "Where the K/V memory is then (Fig. 2)",
    "poisson": "Poisson arrivals (Fig. 12)",
    "samples": "Several samples a request, Alpaca (Fig. 14)",
    "peer": f"{PEER_REQUESTS} requests of {PEER_PROMPT} + {PEER_NEW} tokens at once",
}


@dataclass
class Bench:
    """What the parts share: the worker, the memory, the requests' lengths, the constants."""

    script: Script
    worker: Worker
    lengths: Lengths
    latency: ApartLatency
    bandwidth: float

    @property
    def args(self) -> argparse.Namespace:
        return self.script.args

    def manager(self, policy: str) -> Manager:
        return pool_of(policy, self.args.blocks, self.args.cpu_blocks)

    def requests(self, rate: float, seconds: float, dataset: str, samples: int = 1):
        return requests_of(self.lengths, dataset, rate, seconds, self.args.seed, samples)

    def both(self, policy: str, requests: Sequence[Request], **window):
        """The same requests served and simulated: totals, and where the memory was."""
        limits, parts = limits_for(policy), (Parts(), Parts())
        manager = self.manager(policy)
        parts[0].manager = manager
        server = Server(self.worker, manager, limits, observers=[parts[0]], seed=self.args.seed)
        progress = self.script.progress.part(0, 1, f"{policy}, {len(requests)} requests")
        served = server.serve(make_groups(requests), **window, progress=progress)
        self.script.progress.clear()
        parts[1].manager = manager = self.manager(policy)
        told = dict(latency=self.latency, observers=[parts[1]], ahead=True, **window)
        return served, simulate(requests, manager, limits, **told), *parts


class Parts(Observer):
    """Where the slots of a manager are, in the mean over some iterations: %."""

    def __init__(self) -> None:
        self.manager = None
        self._told = self._seen = 0
        self._sums = dict.fromkeys(("tokens", "reserved", "internal", "saved"), 0.0)

    def on_iteration(self, iteration: Iteration) -> None:
        self._told += 1
        if self._told % EVERY != 1 or not iteration.num_groups:
            return
        usage = self.manager.usage()
        self._seen += 1
        for part in self._sums:
            self._sums[part] += 100 * (usage.saved if part == "saved" else usage.share(part))

    def __getitem__(self, part: str) -> float | None:
        """None if there was nothing to see. `saved` is the % of blocks that sharing saves (Fig.
        15)."""
        return self._sums[part] / self._seen if self._seen else None


def saturated(bench: Bench) -> list[Row]:
    """A full queue for so many seconds, system by system."""
    args, rows = bench.args, []
    window = window_of(args.seconds)
    requests = queue_of(bench.lengths, args.dataset, args.queue, args.seed)
    for policy in args.systems:
        served, simulated, parts, parts_simulated = bench.both(
            policy, requests, window_s=window, until_s=args.seconds
        )
        length = window[1] - window[0]
        rows.append(
            {
                "system": policy,
                "requests_per_s": in_window(served.result, window) / length,
                "simulated_requests_per_s": in_window(simulated, window) / length,
                "tokens_per_s": served.num_tokens / length,
                "batch": served.result.mean_window_batch,
                "simulated_batch": simulated.mean_window_batch,
                # On a CPU host and device are one.
                "busy_percent": 100 * served.busy_share() if bench.worker.on_gpu else None,
                "recomputed": served.result.num_recomputations,
                "unserved": len(requests) - len(served.result.finish_s),
                **{f"{part}_percent": parts[part] for part in ("tokens", "reserved", "internal")},
                "simulated_tokens_percent": parts_simulated["tokens"],
            }
        )
    return rows


def request_alone(bench: Bench) -> Row:
    """Seconds per token of a request alone, of the data set's mean lengths."""
    requests = bench.requests(20.0, 100.0, bench.args.dataset)
    prompt, output = (
        round(float(np.mean([getattr(one, name) for one in requests])))
        for name in ("prompt_len", "output_len")
    )
    return poisson_row(bench, PAGED, 0.0, [Request(0, 0.0, prompt, output)])[0]


def poisson(bench: Bench) -> list[Row]:
    """Seconds per token of each system at each of its rates."""
    rows = []
    for policy in bench.args.systems:
        for rate, seconds in bench.args.rates.get(policy, ()):
            requests = bench.requests(rate, seconds, bench.args.dataset)
            rows.append({"trace_s": seconds} | poisson_row(bench, policy, rate, requests)[0])
    return rows


def poisson_row(bench: Bench, policy: str, rate: float, requests: Sequence[Request]):
    """The row of these requests, and where the memory was, measured and simulated."""
    served, simulated, *parts = bench.both(policy, requests)
    row = {
        "system": policy,
        "rate": rate,
        "requests": len(served.result.finish_s),
        "s_per_token": served.result.normalized_latency,
        "simulated_s_per_token": simulated.normalized_latency,
        "batch": served.result.mean_batch,
        "simulated_batch": simulated.mean_batch,
        "recomputed": served.result.num_recomputations,
        "swapped": served.result.num_swaps,
        "simulated_recomputed": simulated.num_recomputations,
    }
    return row, *parts


def samples(bench: Bench) -> list[Row]:
    """Parallel sampling on Alpaca's lengths at one rate, by number of samples."""
    rows = []
    for count in SAMPLES:
        for policy in bench.args.systems:
            rate = bench.args.sample_rate
            requests = bench.requests(rate, bench.args.trace_seconds, "Alpaca", count)
            row, parts, simulated = poisson_row(bench, policy, rate, requests)
            saved = {"saved_percent": parts["saved"], "simulated_saved_percent": simulated["saved"]}
            rows.append({"samples": count} | row | saved)
    return rows


def peer(bench: Bench) -> list[Row]:
    """Ours and transformers' continuous batching, the same requests all there from the start."""
    from serve_peer import transformers_batching

    worker, kept = bench.worker, bench.worker.model.config._attn_implementation
    batch = [Request(one, 0.0, PEER_PROMPT, PEER_NEW) for one in range(PEER_REQUESTS)]
    server = Server(worker, bench.manager(PAGED), limits_for(PAGED))
    served = server.serve(make_groups(batch))
    found = {"ours": (served.end_s, PEER_REQUESTS * PEER_NEW)}
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, 500, (PEER_REQUESTS, PEER_PROMPT)).tolist()
    memory = bench.args.blocks, worker.block_size
    found["transformers"] = transformers_batching(worker.model, prompts, PEER_NEW, *memory)
    worker.model.set_attn_implementation(kept)
    return [
        {"server": name, "seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}
        for name, (seconds, tokens) in found.items()
    ]


# -- the command line ---------------------------------------------------------------------------


def rates_of(text: str) -> tuple[str | None, tuple[tuple[float, int | None], ...]]:
    """'paged=5,6' or '5,30@15': whose, requests a second, and for how long if it is said."""
    name, _, numbers = text.rpartition("=")
    try:
        pairs = [one.partition("@") for one in numbers.split(",")]
        rates = tuple((float(rate), int(seconds) if at else None) for rate, at, seconds in pairs)
    except ValueError:
        rates = ()
    sound = all(
        0 < rate < 1e6 and (seconds is None or 0 < seconds < 1e6) for rate, seconds in rates
    )
    if not rates or not sound or name not in ("", *POLICIES):
        told = f"{text!r} is no list of rates, of {', '.join(POLICIES)}: paged=5,30@15"
        raise argparse.ArgumentTypeError(told)
    return name or None, rates


def one_rate(text: str) -> float:
    """'20': requests a second, of all systems and as long as --trace-seconds."""
    with suppress(ValueError):
        if 0 < (rate := float(text)) < 1e6:
            return rate
    raise argparse.ArgumentTypeError(f"{text!r} is not a rate")


def systems_of(text: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(text.split(",")))
    if not set(chosen) <= {*POLICIES}:
        raise argparse.ArgumentTypeError(f"{text!r}: systems are {', '.join(POLICIES)}")
    return chosen


def build_parser():
    parser = options(__doc__, drawn="poisson in Fig. 12's layout")
    add = parser.add_argument
    text = "--json of an earlier run, or its file in results/ (repeatable): nothing is measured"
    add("--earlier", type=file_name, action="append", default=[], metavar="FILE", help=text)
    text = "with --earlier: what seeds 0 to N - 1 would have given, simulated"
    add("--seeds", type=positive, metavar="N", help=text)
    add("--part", choices=PARTS, action="append", help="only this one (repeatable)")
    add("--model", choices=SHAPES, default="opt-13b", help="its shape (default opt-13b)")
    add("--layers", type=positive, metavar="N", help="only so many of its layers")
    add("--blocks", type=positive, metavar="N", help="K/V blocks (default: Table 1's)")
    add("--cpu-blocks", type=positive, default=512, metavar="N", help="for swapping (default 512)")
    text = f"of {', '.join(POLICIES)} (default: all)"
    add("--systems", type=systems_of, default=POLICIES, metavar="A,B", help=text)
    add("--dataset", choices=("ShareGPT", "Alpaca"), default="ShareGPT", help="whose lengths")
    text = "a full length file (repeatable; default: compact tables)"
    add("--lengths", type=file_name, action="append", default=[], metavar="FILE", help=text)
    text = "requests/s of poisson, for all systems or one, 30@15 for 15 s (repeatable)"
    add("--rates", type=rates_of, action="append", default=[], metavar="R,R", help=text)
    text = "requests/s of samples (default 20)"
    add("--sample-rate", type=one_rate, default=20.0, metavar="R", help=text)
    add("--trace-seconds", type=positive, default=60, metavar="N", help="of arrivals (default 60)")
    add("--seconds", type=positive, default=30, metavar="N", help="of saturated (default 30)")
    add("--queue", type=positive, default=600, metavar="N", help="of saturated (default 600)")
    text = "one model over the processes of torchrun (Sec. 4.6)"
    add("--tensor-parallel", action="store_true", help=text)
    text = "all ranks compare their tables after each iteration"
    add("--check", action="store_true", help=text)
    add("--seed", type=seed, default=0, metavar="N", help="of lengths, arrivals and weights")
    return parser


def config_of(model: Model, layers: int | None):
    """transformers' configuration of that shape."""
    h, count = model.hidden_size, layers or model.num_layers
    sizes = {"vocab_size": model.vocab_size, "hidden_size": h, "num_hidden_layers": count}
    sizes |= {"num_attention_heads": model.num_heads, "max_position_embeddings": model.max_len}
    if model.family == "opt":
        sizes |= {"ffn_dim": model.widest, "word_embed_proj_dim": h, "dropout": 0.0}
    else:
        sizes["intermediate_size"] = model.widest // 2
    return AutoConfig.for_model(model.family, **sizes)


def make_model(model: Model, layers: int | None, ranks: Ranks, seed: int) -> PreTrainedModel:
    """Random weights, made where they are used, a rank's share of them; float16 on a GPU."""
    device, share = ranks.device, None
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if ranks.size > 1:
        share = partial(shard, ranks=ranks)
    config = config_of(model, layers)
    made = random_model(config, device, dtype, seed, share, ranks.rank).requires_grad_(False)
    fuse(made)
    return made


def check(args: argparse.Namespace, lengths: Lengths) -> None:
    """Settle which parts, rates and blocks there are; UsageError for what makes no sense."""
    if not args.tensor_parallel and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("torchrun runs several processes: --tensor-parallel")
    if args.check and not args.tensor_parallel:
        raise UsageError("--check compares ranks: --tensor-parallel")
    chosen = dict.fromkeys(args.systems, ())
    for name, rates in args.rates:
        if name and name not in chosen:
            raise UsageError(f"--rates {name}=...: {name} is not among the --systems that run")
        for policy in [name] if name else chosen:
            told = {(rate, seconds or args.trace_seconds) for rate, seconds in rates}
            chosen[policy] = tuple(sorted({*chosen[policy], *told}))
    args.rates = chosen
    shape, any_rates = SHAPES[args.model], any(args.rates.values())
    if (args.layers or 0) > shape.num_layers:
        raise UsageError(f"--layers {args.layers}: {args.model} has {shape.num_layers}")
    no_peer = args.tensor_parallel or shape.family == "opt"
    left_out = {"poisson": not any_rates, "peer": no_peer}
    if "peer" in (args.part or ()) and no_peer:
        raise UsageError("--part peer: transformers batches in one process, and no OPT: llama-13b")
    if "poisson" in (args.part or ()) and not any_rates:
        raise UsageError("poisson needs --rates of the systems that run")
    args.part = list(dict.fromkeys(args.part or [one for one in PARTS if not left_out.get(one)]))
    if args.figures is not None and not ("poisson" in args.part and args.rates.get(PAGED)):
        raise UsageError("--figures draws the part poisson, relative to paged's rates")
    if args.blocks is None:
        known = args.model in DEPLOYMENTS
        args.blocks = kv_blocks(DEPLOYMENTS[args.model]) if known else TINY_BLOCKS
    if args.blocks * paper.BLOCK_SIZE < paper.MAX_MODEL_LEN:
        longest = paper.MAX_MODEL_LEN
        raise UsageError(f"--blocks {args.blocks}: a sequence of {longest} tokens needs more")
    check_fits(args, lengths)


def check_fits(args: argparse.Namespace, lengths: Lengths) -> None:
    """UsageError unless each system's pool can hold each request of `samples`; what the other parts
    serve is one sequence, no longer than the model's maximum."""
    trace = args.sample_rate, args.trace_seconds, args.seed
    for policy, count in itertools.product(args.systems, SAMPLES if "samples" in args.part else ()):
        pool = pool_of(policy, args.blocks, 0)
        try:
            for group in make_groups(requests_of(lengths, "Alpaca", *trace, count)):
                pool.require_fits(group)
        except RequestTooLargeError as error:
            raise UsageError(f"{policy}: {error}; raise --blocks") from None


def check_memory(model: Model, args: argparse.Namespace, ranks: Ranks) -> None:
    """DeviceMemoryError unless weights, K and V fit, all of them or this rank's share."""
    itemsize = 2 if ranks.device.type == "cuda" else 4
    layers = (args.layers or model.num_layers) / model.num_layers
    weights = (model.split_params / ranks.size + model.whole_params) * itemsize * layers
    slots = args.blocks * paper.BLOCK_SIZE * model.kv_bytes_per_token / 2 * itemsize * layers
    check_device_memory(int(weights + slots / ranks.size), ranks.device)


def set_up(script: Script, lengths: Lengths, ranks: Ranks, stack: ExitStack) -> Bench | None:
    """The model, the worker with its graphs, and the constants; None of a rank that has followed
    another to the end. The leader of others is closed with the stack."""
    args, num_blocks = script.args, script.args.blocks
    be_quiet()
    check_memory(SHAPES[args.model], args, ranks)
    script.progress.at(0, 3, "weights")
    model = make_model(SHAPES[args.model], args.layers, ranks, args.seed)
    worker = Worker(
        model,
        num_blocks,
        paper.BLOCK_SIZE,
        max_len=paper.MAX_MODEL_LEN,
        num_cpu_blocks=args.cpu_blocks,
        most_rows=max(SAMPLES) * num_blocks,  # of a group's sequences each may share one block
        temperature=TEMPERATURE,
        seed=args.seed,
    )
    if ranks.rank:
        follow(worker, ranks)
        return None
    if ranks.size > 1:
        worker = stack.enter_context(Leader(worker, ranks, check=args.check))
    script.progress.at(1, 3, "graphs")
    if worker.graphs:
        worker.prepare(num_blocks)
    bandwidth = copy_rate(ranks.device)
    script.progress.at(2, 3, "constants")
    latency = fit(calibrate(worker, num_blocks), worker, bandwidth)
    script.progress.clear()
    return Bench(script, worker, lengths, latency, bandwidth)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy on the device."""
    if device.type == "cuda":
        from gpu_timing import copy_bandwidth

        return copy_bandwidth()
    return 1e10  # of a CPU nothing here is held against the memory


def run(argv: list[str] | None) -> int:
    script = Script(__file__, build_parser(), argv, on_gpu=False)
    args = script.args
    raise_on_interrupt()
    try:
        if args.earlier:
            return earlier(script)
        if args.seeds:
            raise UsageError("--seeds is of runs that were kept: --earlier")
        lengths = find_lengths(args.lengths, None)
        check(args, lengths)
        if args.figures is not None:
            drawing.check_folder(args.figures, [pictures.SERVED])
        with ExitStack() as stack:
            ranks = Ranks(0, 1, choose_device("auto"))
            if args.tensor_parallel:
                ranks = stack.enter_context(join("auto"))
                script.progress = script.progress if not ranks.rank else SILENT
            bench = set_up(script, lengths, ranks, stack)
            if bench is None:
                return 0
            return measure(bench, ranks)
    except TOLD as error:
        raise UsageError(str(error)) from None
    except (DeviceMemoryError, torch.OutOfMemoryError) as error:
        told = f"{first_line(error)}; lower --layers or --blocks, or --model tiny"
        raise UsageError(told) from None


def measure(bench: Bench, ranks: Ranks) -> int:
    """All parts in turn, shown and written."""
    args, worker, script = bench.args, bench.worker, bench.script
    where = f"{args.model}, {worker.cache.num_layers} layers, {bench.args.blocks} blocks, "
    where += torch.cuda.get_device_name() if worker.on_gpu else "CPU"
    where += f", {ranks.size} ranks" if ranks.size > 1 else ""
    found: dict[str, object] = {"blocks": bench.args.blocks, "kernel": worker.cache.kernel}
    found |= {"copy_gb_per_s": bench.bandwidth / 1e9, "lengths": bench.lengths.source(args.dataset)}
    names = ApartLatency.__dataclass_fields__
    found["constants"] = {name: getattr(bench.latency, name) for name in names}
    index = {}
    measures = {"saturated": saturated, "poisson": poisson, "samples": samples, "peer": peer}
    measures["steps"] = lambda _: decode_steps(worker, args.blocks, bench.bandwidth, BATCHES)
    for part in args.part:
        found[part] = rows = measures[part](bench)
        index[part] = {"poisson": 3, "samples": 2}.get(part, 1)
        more = {"saturated": ("memory",), "steps": ("kernels",) * worker.on_gpu}
        for name in (part, *more.get(part, ())):
            show(table(TITLES[name], COLUMNS[name], rows, where, 3))
        if part == "poisson":
            found["alone"] = alone = request_alone(bench)
            found["rates_at"], index["rates_at"] = rates_at(rows, alone, at_latencies(alone)), 3
            show_rates(found["rates_at"], where)
        if part == "saturated" and not all(row["unserved"] for row in rows):
            print("A queue ran empty: its figures are too low; raise --queue.")
    if not worker.on_gpu:
        print("On a CPU all parts run, but these are no figures.")
    if ranks.size > 1:
        sent = {name: getattr(worker, name) for name in ("messages", "bytes", "seconds")}
        found["orders"] = sent | {"ranks": ranks.size, "checked": args.check}
        told = "{messages} orders sent, {bytes} bytes, {seconds:.3f} s".format(**sent)
        print(told + (", all ranks alike after each" if args.check else ""))
    code = script.write(found, index)
    if args.figures is not None:  # last, as it may be refused
        draw(found["poisson"], found["alone"], where, args.figures)
    return code


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
