"""Scenario 3, parallel sampling with copy-on-write: one prompt, many samples, few blocks.

Reproduces: Fig. 8 (two samples, exactly one block copied), section 4.4's parallel sampling, and
the parallel half of Fig. 15 (blocks saved by sharing over blocks without sharing). Every sample's
K and V are read back through its block table after it diverged.

    python main.py --scenario 3
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kv_cache_manager import MemoryUsage, PagedKVCacheManager
from paged_attention import slot_mapping
from sequence import SequenceGroup
from vllm_sim import paper
from vllm_sim.playback.recorder import Recorder, Recording
from vllm_sim.reporting.progress import SILENT, Progress
from vllm_sim.reporting.tables import Table, counted
from vllm_sim.scenarios.report import Check, Saving, ScenarioReport
from vllm_sim.scenarios.setting import Setting, num_queued, sample_requests
from vllm_sim.scenarios.stamped_cache import Stamps
from vllm_sim.serving.scheduler import Scheduler
from vllm_sim.serving.steady_state import steady_state
from vllm_sim.serving.systems import PAGED, limits_of
from vllm_sim.workload.length_tables import ALPACA, SHAREGPT, LengthTable

SAMPLES = (2, 4, 6, 10)
OUTPUT_LEN = 100  # tokens that each sample generates
WARMUP, ITERATIONS = 200, 400
RECORDED = 4  # samples of the prompt that a timeline and a picture show
LONGER = {ALPACA.name: 1, SHAREGPT.name: 5}  # requests that live longer need longer means
FIG15_TOLD = {  # by lengths and number of samples; for ShareGPT a range in the text: its ends
    ALPACA.name: paper.FIG15["parallel"],
    SHAREGPT.name: dict(zip((2, 6), paper.FIG15_SHAREGPT["parallel"])),
}


@dataclass(frozen=True, slots=True)
class Figure8:
    """Two samples on the blocks that the figure draws."""

    rows: list[tuple[str, str, str, int]]  # step, blocks of each sample, references to `last`
    last: int  # block of the prompt
    copies: int
    in_place: bool  # the second sample writes into that block
    intact: bool
    recording: Recording


@dataclass(frozen=True, slots=True)
class Samples:
    """n samples of one prompt, after the last token."""

    usage: MemoryUsage
    copies: int
    intact: bool  # each sample's K and V
    recording: Recording


@dataclass(frozen=True, slots=True)
class Found:
    """What scenario 3 measured, each by the function of its name."""

    setting: Setting
    figure_8: Figure8
    one_prompt: dict[int, Samples]  # by the number of samples
    figure_15: list[Saving]


def run(setting: Setting, progress: Progress = SILENT) -> Found:
    """All of scenario 3."""
    samples = one_prompt(setting, progress.part(0, 2, "samples of one prompt"))
    savings = figure_15(setting, progress.part(1, 2, "steady states"))
    return Found(setting, figure_8(setting), samples, savings)


class SharedPrompt:
    """Samples of one prompt on tensors: a manager, its cache, and what each sample should hold."""

    def __init__(
        self, setting: Setting, manager: PagedKVCacheManager, prompt_len: int, *told: str
    ) -> None:
        """`told` is the recording's name and what it is about."""
        self.manager = manager
        sizes = {"num_blocks": manager.num_blocks, "block_size": manager.block_size}
        self.cache = replace(setting, **sizes).new_cache()
        self._stamps = Stamps(setting)
        self._next_token = prompt_len
        self.tokens = {0: list(range(prompt_len))}  # sample -> the number of each of its tokens
        self.manager.allocate(0, prompt_len)
        self._write(0, 0)
        self.recorder = Recorder(*told, self.manager)
        self.recorder.step(f"the prompt's {prompt_len} tokens")

    def fork(self, sample: int) -> None:
        """One more sample of the same prompt."""
        self.manager.fork(0, sample)
        self.tokens[sample] = self.tokens[0].copy()
        self.recorder.step(f"sample {sample + 1} shares the prompt", forked=[(0, sample)])

    def generate(self, sample: int) -> int:
        """A token of its own for one sample; returns the number of blocks copied for it."""
        copies = self.manager.append(sample)
        self.cache.copy_blocks(copies)
        self.tokens[sample].append(self._next_token)
        self._next_token += 1
        self._write(sample, len(self.tokens[sample]) - 1)
        number = len(self.tokens[sample])
        self.recorder.step(f"sample {sample + 1} writes its token {number}", copies)
        return len(copies)

    def holds(self, sample: int) -> bool:
        """Whether the sample's table leads to exactly its own tokens, in every layer."""
        return self._stamps.held(self.cache, self._slots(sample, 0), self.tokens[sample])

    def _slots(self, sample: int, start: int) -> torch.Tensor:
        blocks, count = self.manager.block_table(sample).blocks, len(self.tokens[sample]) - start
        return slot_mapping(blocks, start, count, self.manager.block_size, self.cache.device)

    def _write(self, sample: int, start: int) -> None:
        slots, tokens = self._slots(sample, start), self.tokens[sample][start:]
        self._stamps.write(self.cache, slots, tokens)


def figure_8(setting: Setting) -> Figure8:
    """Two samples of a 7-token prompt in blocks of 4, on the blocks that the figure draws."""
    fig = paper.FIG6
    size, prompt_len = fig["block_size"], fig["prompt"]
    drawn = [block for block, _ in fig["tables"][-1]]
    order = [*drawn, *(b for b in range(9) if b not in drawn)]
    told = "Scenario 3: Fig. 8", f"two samples of {prompt_len} tokens, blocks of {size} slots"
    manager = PagedKVCacheManager(9, size, free_order=order)
    both = SharedPrompt(setting, manager, prompt_len, *told)
    both.fork(1)
    last = manager.block_table(0).blocks[-1]
    rows = [("prompt shared", *_tables(both), manager.ref_count(last))]
    copies = both.generate(0)
    rows.append(("A1 writes: copy, then write", *_tables(both), manager.ref_count(last)))
    copies += both.generate(1)
    rows.append(("A2 writes in place", *_tables(both), manager.ref_count(last)))
    intact, in_place = both.holds(0) and both.holds(1), manager.block_table(1).blocks[-1] == last
    manager.check_invariants()
    return Figure8(rows, last, copies, in_place, intact, both.recorder.recording())


def _tables(prompt: SharedPrompt) -> list[str]:
    return [
        " ".join(f"{block}({filled})" for block, filled in prompt.manager.block_table(s).entries())
        for s in (0, 1)
    ]


def one_prompt(setting: Setting, progress: Progress = SILENT) -> dict[int, Samples]:
    """n samples of a ShareGPT-sized prompt, from the fork to the last token."""
    size, prompt_len = setting.block_size, prompt_len_of(setting)
    about = f"{prompt_len} tokens and {OUTPUT_LEN} of each sample, blocks of {size} slots"
    found: dict[int, Samples] = {}
    for n in SAMPLES:
        told = f"Scenario 3: {n} samples of one prompt", about
        manager = PagedKVCacheManager(closed_form(setting, n)[1] + n, size)
        samples = SharedPrompt(setting, manager, prompt_len, *told)
        for sample in range(1, n):
            samples.fork(sample)
        copies = 0
        for token in range(OUTPUT_LEN):
            progress.at(len(found) * OUTPUT_LEN + token, len(SAMPLES) * OUTPUT_LEN)
            copies += sum(samples.generate(sample) for sample in range(n))
        manager.check_invariants()
        intact, recording = all(map(samples.holds, range(n))), samples.recorder.recording()
        found[n] = Samples(manager.usage(), copies, intact, recording)
    return found


def prompt_len_of(setting: Setting) -> int:
    """Tokens of the one prompt: ShareGPT's mean, or what a short model has room for."""
    mean = round(paper.FIG11_MEANS["ShareGPT"]["input"])
    return max(1, min(mean, setting.max_len - OUTPUT_LEN))


def closed_form(setting: Setting, n: int) -> tuple[int, int, int]:
    """Copies, and physical and logical blocks, of n samples after the last token.

    All but one copy a part-filled last prompt block, and whole prompt blocks stay shared.
    """
    size, prompt_len = setting.block_size, prompt_len_of(setting)
    blocks, shared = -(-(prompt_len + OUTPUT_LEN) // size), prompt_len // size
    return (n - 1) * (prompt_len % size > 0), n * blocks - (n - 1) * shared, n * blocks


def figure_15(setting: Setting, progress: Progress = SILENT) -> list[Saving]:
    """The saving under load: a saturated queue of requests with n samples each."""
    found: list[Saving] = []
    for table in (ALPACA, SHAREGPT):
        for n in (2, 4, 6):
            found.append(saving_of(setting, table, n, progress.part(len(found), 6)))
    return found


def _shared_blocks(group: SequenceGroup, block_size: int) -> int:
    """Blocks that a running group's samples save: each but the first has no prompt of its own.

    Until the first token is written that includes the prompt's part-filled last block.
    """
    whole, part = divmod(group.seqs[0].prompt_len, block_size)
    fresh = group.seqs[0].num_generated == 0
    return (len(group.unfinished()) - 1) * (whole + (fresh and part > 0))


def saving_of(
    setting: Setting, table: LengthTable, num_samples: int, progress: Progress = SILENT
) -> Saving:
    """Requests with this many samples under a full queue."""
    manager = setting.new_manager(PAGED, num_cpu_blocks=setting.num_blocks)
    requests = sample_requests(table, num_queued(setting), setting, num_samples)
    unexplained, times = 0, LONGER[table.name]

    def each(scheduler: Scheduler) -> None:
        nonlocal unexplained
        usage = manager.usage()
        shared = sum(_shared_blocks(group, setting.block_size) for group in scheduler.running)
        unexplained += usage.logical_blocks - usage.physical_blocks != shared

    length = times * WARMUP, times * ITERATIONS
    mean = steady_state(manager, requests, limits_of(paper.VLLM), *length, each, progress=progress)
    told = FIG15_TOLD[table.name].get(num_samples)
    saving = 100.0 * mean.saving
    return Saving(table.name, num_samples, saving, told, mean.batch, unexplained)


# ---- what is shown ------------------------------------------------------------------------------


def report(found: Found) -> ScenarioReport:
    """All that is shown; with the savings of Fig. 15 and every block of two small pools."""
    recordings = [found.figure_8.recording, found.one_prompt[RECORDED].recording]
    alpaca = {s.num_samples: s for s in found.figure_15 if s.lengths == ALPACA.name}
    return ScenarioReport(
        3,
        "parallel sampling with copy-on-write",
        "What do n samples of one prompt cost when they share its blocks?",
        [*tables(found)],
        [*checks(found)],
        f"sharing the prompt saves {alpaca[2].ours:.1f} % (2 samples) to {alpaca[6].ours:.1f} % "
        "(6) of the blocks on Alpaca lengths, and n samples cost n - 1 block copies once; the "
        f"paper's Fig. 15 says {alpaca[2].paper} % to {alpaca[6].paper} %.",
        savings=found.figure_15,
        recordings=recordings,
        map=(recordings[-1], recordings[-1].last),
    )


def tables(found: Found) -> Iterator[Table]:
    """Fig. 8, what n samples cost, and Fig. 15."""
    setting, fig = found.setting, paper.FIG6
    title = "Fig. 8: two samples, physical blocks (filled slots)"
    line = f"block size {fig['block_size']}, a prompt of {fig['prompt']} tokens"
    headers = ("step", "sample A1", "sample A2", f"references to block {found.figure_8.last}")
    look = {"name": "fig8", "keys": ("step", "sample_a1", "sample_a2", "references")}
    yield Table(title, headers, found.figure_8.rows, line, **look)
    rows = []
    for n, s in found.one_prompt.items():
        counts = s.usage.logical_blocks, s.usage.physical_blocks, 100 * s.usage.saved, s.copies
        rows.append((n, *counts, closed_form(setting, n)[0]))
    title = "n samples of one prompt, after the last token"
    line = f"{setting.model.name}, a prompt of {prompt_len_of(setting)} tokens, {OUTPUT_LEN} "
    line += f"generated by each sample, block size {setting.block_size}"
    headers = ("samples", "logical blocks", "physical blocks", "saving %", "copies", "closed form")
    yield Table(title, headers, rows, line, name="one_prompt")
    rows = [(s.lengths, s.num_samples, s.batch, s.ours, s.paper) for s in found.figure_15]
    title = "Saving by sharing in percent of the blocks without it (Fig. 15)"
    low, high = FIG15_TOLD[SHAREGPT.name].values()
    line = f"{setting.line}, saturated queue, mean of {ITERATIONS} iterations "
    line += f"({LONGER[SHAREGPT.name] * ITERATIONS:,} for ShareGPT); "
    line += f"for ShareGPT the paper gives a range, {low} to {high} %"
    headers, look = ("lengths", "samples", "batch", "ours", "paper"), {"decimals": 2, "index": 2}
    yield Table(title, headers, rows, line, name="saving", **look)


def checks(found: Found) -> Iterator[Check]:
    """What must hold of each part."""
    setting, fig = found.setting, found.figure_8
    right = fig.copies == 1 and fig.intact and fig.in_place
    told = f"{fig.copies} copy; A2 keeps block {fig.last}"
    yield Check("Fig. 8: exactly one block copied, both samples intact", right, told)
    right = all(
        closed_form(setting, n) == (s.copies, s.usage.physical_blocks, s.usage.logical_blocks)
        for n, s in found.one_prompt.items()
    )
    told = f"n = {', '.join(map(str, found.one_prompt))}"
    yield Check("copies and blocks equal their closed forms", right, told)
    right = all(s.intact for s in found.one_prompt.values())
    told = f"{sum(found.one_prompt)} samples of {prompt_len_of(setting) + OUTPUT_LEN} tokens, "
    told += counted(setting.num_layers, "layer")
    yield Check("every sample's K and V intact through its table", right, told)
    # How the curve runs is for the table: a mean over so few requests may fall where it should
    # rise. What saves a block is exact.
    for name, times in LONGER.items():
        savings = [saving for saving in found.figure_15 if saving.lengths == name]
        right = not any(saving.unexplained for saving in savings)
        told = f"in all {3 * times * ITERATIONS:,} iterations; "
        told += ", ".join(f"{saving.ours:.1f} %" for saving in savings)
        yield Check(f"{name}: the blocks saved are the prompts' own", right, told)
