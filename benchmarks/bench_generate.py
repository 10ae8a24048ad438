"""A real model on blocks beside the library's own caches: time a token, bytes, and exactness.

    python benchmarks/bench_generate.py [--repeats 5] [--small] [--json FILE]

Serves section 4.4 and vllm_sim/engine/: transformers' generate() with PagedCache, DynamicCache and
StaticCache (which transformers compiles on a GPU). SmolLM2-135M-Instruct where its package is
installed, else random weights of its shape; float32 on a CPU, float16 with Triton's kernels on a
GPU.

    time     ms a token of a greedy batch of 8, runs in turn, the medians; `x dynamic` is the ratio
    bytes    of K and V, each cache at its largest, for that batch and for a beam search of width 4
    logits   the same tokens given to all: the largest and the mean difference from float32 without
             a cache, for blocks and for the library's own cache in the same dtype
    tokens   share of equal tokens in greedy texts; the library's own in float32 is the yardstick
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import Cache, DynamicCache, LlamaConfig, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import Row, Script, entry, options, show, table

from vllm_sim.engine.block_cache import CACHE, NAME
from vllm_sim.engine.paged_cache import PagedCache
from vllm_sim.engine.weights import SMALL, Source, find_source

BATCH, PROMPT, NEW, BEAMS = 8, 100, 64, 4
Maker = Callable[[], Cache]


class Models:
    """The model, and how each cache for it is made."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.model = source.model(device).requires_grad_(False)
        self.own = self.model.config._attn_implementation
        self.vocabulary = self.model.config.vocab_size
        self.fullest = 0  # blocks in use, the most so far

    def caches(self, rows: int, width: int, new: int) -> dict[str, Maker]:
        blocks = rows * -(-(PROMPT + new) // 16)
        return {
            "paged": lambda: PagedCache(self.model, blocks, width=width, on_step=self._watch),
            "dynamic": DynamicCache,
            "static": lambda: StaticCache(self.model.config, max_cache_len=PROMPT + new),
        }

    def _watch(self, cache: PagedCache) -> None:
        self.fullest = max(self.fullest, cache.manager.num_blocks - cache.manager.num_free_blocks)

    def prompts(self, rows: int) -> torch.Tensor:
        """Random tokens (rows, PROMPT), the same for all caches."""
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(3, self.vocabulary, (rows, PROMPT), generator=generator)
        return ids.to(self.model.device)

    def generate(self, make: Maker, rows: int, new: int, **more) -> tuple[torch.Tensor, Cache]:
        """Exactly `new` tokens for each row, and the cache that was filled."""
        self.model.set_attn_implementation(self.own)
        cache, ids = make(), self.prompts(rows)
        lengths = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        more |= {"do_sample": False, "attention_mask": torch.ones_like(ids), CACHE: cache}
        return self.model.generate(ids, **lengths, **more)[:, PROMPT:], cache


def held_bytes(models: Models, cache: Cache) -> int:
    """Bytes of K and V; of blocks, those in use at the fullest moment."""
    if isinstance(cache, PagedCache):
        return models.fullest * cache.pool.bytes_per_block
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def measure_time(models: Models, new: int, repeats: int, script: Script) -> list[Row]:
    """ms a token of each cache: a run of `new` tokens less one of a single token."""
    makers = models.caches(BATCH, 1, new)
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in script.each(range(repeats + 1), "time"):
        for name, make in makers.items():
            seconds = [timed(models, make, length) for length in (1, new)]
            times[name].append((seconds[1] - seconds[0]) / (new - 1) * 1e3)
    typical = {name: median(found[1:]) for name, found in times.items()}  # the first warms up
    return [
        {"cache": name, "ms_per_token": ms, "times_dynamic": ms / typical["dynamic"]}
        for name, ms in typical.items()
    ]


def timed(models: Models, make: Maker, new: int) -> float:
    """Seconds of a whole generation."""
    on_gpu = models.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    models.generate(make, BATCH, new)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_bytes(models: Models, new: int) -> list[Row]:
    """Bytes of each cache for the batch, and for one beam search."""
    rows: list[Row] = []
    for name, beams in ((f"batch of {BATCH}", 1), (f"{BEAMS} beams", BEAMS)):
        found, count = {}, BATCH if beams == 1 else 1
        for cache_name, make in models.caches(count * beams, beams, new).items():
            models.fullest = 0
            _, cache = models.generate(make, count, new, num_beams=beams)
            found[cache_name] = held_bytes(models, cache)
        rows.append({"decoding": name, **found})
    return rows


def forced(models: Models, cache: Cache | None, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (rows, new, V) of given tokens (rows, PROMPT + new), one by one behind the prompt."""
    models.model.set_attn_implementation(NAME if isinstance(cache, PagedCache) else models.own)
    with torch.no_grad():  # the whole of each text at once, without a cache
        if cache is None:
            return models.model(tokens[:, :-1]).logits[:, PROMPT - 1 :].float()
        found, at = [], 0
        for end in range(PROMPT, tokens.shape[1]):
            given = {CACHE: cache, "use_cache": True}
            logits = models.model(tokens[:, at:end], **given).logits
            found.append(logits[:, -1].float())
            at = end
        return torch.stack(found, dim=1)


def measure_exactness(models: Models, new: int) -> tuple[list[Row], list[Row]]:
    """Differences of logits from float32, and shares of equal tokens."""
    rows, makers = 2 * BATCH, models.caches(2 * BATCH, 1, new)
    texts = {n: models.generate(makers[n], rows, new)[0] for n in ("paged", "dynamic")}
    tokens = torch.cat([models.prompts(rows), texts["dynamic"]], dim=1)
    logits = {name: forced(models, makers[name](), tokens) for name in texts}
    half = models.model
    if half.dtype != torch.float32:
        models.model = copy.deepcopy(half).float()
    exact = forced(models, None, tokens)
    reference = models.generate(makers["dynamic"], rows, new)[0]
    models.model = half
    errors = [
        {
            "cache": name,
            "largest": (found - exact).abs().max().item(),
            "mean": (found - exact).abs().mean().item(),
            "size": exact.abs().mean().item(),
        }
        for name, found in logits.items()
    ]
    pairs = {
        "paged and dynamic": (texts["paged"], texts["dynamic"]),
        "paged and float32": (texts["paged"], reference),
        "dynamic and float32": (texts["dynamic"], reference),
    }
    shares = [
        {"texts": name, "percent_equal": 100 * (one == other).double().mean().item()}
        for name, (one, other) in pairs.items()
    ]
    return errors, shares


def run(argv: list[str] | None) -> int:
    parser = options(__doc__, repeats=5)
    parser.add_argument("--small", action="store_true", help="a small model and few tokens")
    script = Script(__file__, parser, argv, on_gpu=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = find_source()
    if source.gguf is None:
        source = find_source(random=True)
    new = NEW
    if script.args.small:
        new, source = 6, Source("a small model, random weights", LlamaConfig(**SMALL))
    script.progress.at(0, 1, "weights")
    models = Models(source, device)
    times = measure_time(models, new, script.args.repeats, script)
    sizes = measure_bytes(models, new)
    errors, shares = measure_exactness(models, new)
    script.progress.clear()
    kernel = PagedCache(models.model, 1).kernel
    dtype = str(models.model.dtype).removeprefix("torch.")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    where = f"{source.about}; {dtype} on {name}, {kernel} kernel, {PROMPT} + {new} tokens"
    columns = [("cache", "cache"), ("ms/token", "ms_per_token"), ("x dynamic", "times_dynamic")]
    show(table(f"Time a token, batch of {BATCH}", columns, times, where))
    caches = [(name, name) for name in ("decoding", "paged", "dynamic", "static")]
    show(table("Bytes of K and V", caches, sizes, where))
    columns = [(name, name) for name in ("cache", "largest", "mean", "size")]
    show(table("Logits: difference from float32, and their mean size", columns, errors, where, 6))
    show(table("Greedy texts", [("of", "texts"), ("% equal", "percent_equal")], shares, where))
    found = {"model": source.about, "dtype": dtype, "kernel": kernel, "new_tokens": new}
    found |= {"batch": BATCH, "prompt": PROMPT, "times": times, "bytes": sizes}
    found |= {"logits": errors, "tokens": shares}
    return script.write(found, {"times": 1, "bytes": 1, "logits": 1, "tokens": 1})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
