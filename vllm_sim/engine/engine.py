"""Continuous batching of a real model, by the scheduler and the managers of the simulator.

Reproduces: sections 4.3 to 4.6. Every step is one iteration of the very `Scheduler` that the
simulator runs: what it decides (prompts and decodes together, blocks to swap and to copy, groups to
recompute) is done on tensors, then the model is run once over all of its tokens. Single requests,
parallel samples, beams and requests behind a shared prefix are mixed in one batch (section 4.4).

    engine = Engine(model, num_blocks=256, num_cpu_blocks=64)
    prefix = engine.add_prefix(tokenizer.encode(instruction))
    engine.submit(tokenizer.encode("A question."), 64, prefix_id=prefix)
    engine.submit(tokenizer.encode("Another."), 64, Decoding(beam_width=4))
    for output in engine.run():
        print(output.request_id, tokenizer.decode(output.sequences[0]))

Lengths are not known beforehand: a request is scheduled with `max_new_tokens` as its length, and
ends earlier with an end-of-sequence token.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kv_cache_manager import PagedKVCacheManager, RequestTooLargeError
from paged_attention import pad_block_tables, slot_mapping, upload
from sequence import BeamHistory, Sequence, SequenceGroup, check_count
from vllm_sim.engine.block_cache import CACHE, OneRowCache, Segment, Step, decode_part
from vllm_sim.engine.decoding import BeamSearch, Choice, Decoding, Samples
from vllm_sim.serving.scheduler import Iteration, Limits, Scheduler
from vllm_sim.serving.simulator import ARTIFACT_LIMITS, Observer

GREEDY = Decoding()


@dataclass(frozen=True, slots=True)
class Output:
    """What a request generated: its samples in order, or its best hypotheses, best first; each
    with the end-of-sequence token if it ended with one."""

    request_id: int
    sequences: list[list[int]]
    num_preemptions: int


class LiveBeams(BeamHistory):
    """The parents of a search that is going on: any step may move a beam."""

    def next_move(self, step: int) -> int:
        return step


class Forward:
    """The tokens of one forward, gathered sequence by sequence: decodes first, then prompts."""

    def __init__(self, manager: PagedKVCacheManager, device: torch.device) -> None:
        self._manager, self._device = manager, device
        self._ids: list[int] = []
        self._positions: list[int] = []
        self._slots: list[torch.Tensor] = []
        self._tables: list[list[int]] = []
        self._lens: list[int] = []
        self._segments: list[Segment] = []
        self._last: list[int] = []  # the tokens whose logits are wanted
        self._decode_slots: list[int] = []

    def add_decode(self, seq_id: int, token: int) -> None:
        """The newest token of a sequence."""
        table = self._manager.block_table(seq_id)
        length = table.num_tokens
        self._last.append(len(self._ids))
        self._ids.append(token)
        self._positions.append(length - 1)
        self._decode_slots.append(table.last_slot)
        self._tables.append(table.blocks)
        self._lens.append(length)

    def add_prompt(self, seq_id: int, first: int, tokens: list[int]) -> None:
        """All tokens of a sequence, or prefix, from position `first` on."""
        table = self._manager.block_table(seq_id)
        assert table.num_tokens == first + len(tokens), "the blocks hold another number of tokens"
        start = len(self._ids)
        self._ids += tokens
        self._positions += range(first, table.num_tokens)
        self._slots.append(slot_mapping(table.blocks, first, len(tokens), self._manager.block_size))
        padded = pad_block_tables([table.blocks], self._device)
        self._segments.append(Segment(start, len(self._ids), padded, table.num_tokens))
        self._last.append(len(self._ids) - 1)

    def __len__(self) -> int:
        return len(self._ids)

    def run(self, model: PreTrainedModel, cache: OneRowCache) -> torch.Tensor:
        """Logits (sequences, V) of each sequence's last token, in the order of the calls above."""
        device = self._device
        slots = torch.cat([torch.tensor(self._decode_slots, dtype=torch.int64), *self._slots])
        part = decode_part(self._tables, self._lens, device)
        cache.next_step = Step(slots.to(device), None, *part, tuple(self._segments))
        last = upload(self._last, device)
        row = {
            "input_ids": upload(self._ids, device)[None],
            "position_ids": upload(self._positions, device)[None],
            CACHE: cache,
            "use_cache": True,
        }
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            return model(**row, logits_to_keep=last).logits[0]
        return model(**row).logits[0, last]


@dataclass(slots=True)
class Live:
    """A request on its way."""

    prompt: list[int]
    tokens: dict[int, list[int]]  # sequence -> its own tokens: those of the prompt and generated
    decoder: Samples | BeamSearch

    def advance(self, group: SequenceGroup, logits: torch.Tensor) -> Choice:
        """Choose the next token of each sequence that still runs, and append them."""
        seqs = group.unfinished()
        first = seqs[0]
        if isinstance(self.decoder, BeamSearch):
            last = first.num_generated + 1 == first.output_len
            choice = self.decoder.advance(logits.expand(len(seqs), -1), last)
            group.beam_parents.append(choice.parents)
        else:
            places = [group.seqs.index(seq) for seq in seqs]
            choice = self.decoder.advance(logits.expand(len(seqs), -1), places)
        parents = choice.parents or range(len(seqs))
        before = [self.tokens[seq.seq_id] for seq in seqs]
        for seq, parent, token in zip(seqs, parents, choice.tokens):
            self.tokens[seq.seq_id] = [*before[parent], token]
        return choice

    def output(self, group: SequenceGroup) -> Output:
        if isinstance(self.decoder, BeamSearch):
            sequences = [tokens for _, tokens in self.decoder.finished]
        else:
            start = len(self.prompt)
            sequences = [self.tokens[seq.seq_id][start:] for seq in group.seqs]
        return Output(group.group_id, sequences, group.num_preemptions)


class Engine:
    """A model, its blocks and the scheduler that shares them out. `step()` is one iteration."""

    def __init__(
        self,
        model: PreTrainedModel,
        num_blocks: int,
        block_size: int = 16,
        *,
        num_cpu_blocks: int = 0,
        limits: Limits = ARTIFACT_LIMITS,
        preemption: str = "auto",
        watermark: float = 0.01,
        kernel: str = "auto",
        eos: int | Iterable[int] | None = None,
        poison: bool = False,
        observers: Seq[Observer] = (),
    ) -> None:
        """`eos`: the tokens that end a sequence, the model's own if None; an empty list: none.

        `poison` fills freed and unused slots with NaN; `observers` see every iteration. Raises
        UnsupportedModelError, KernelError, ValueError.
        """
        self.manager = PagedKVCacheManager(
            num_blocks, block_size, num_cpu_blocks=num_cpu_blocks, watermark=watermark
        )
        self.scheduler = Scheduler(self.manager, limits, preemption)
        self.cache = OneRowCache(model, self.manager, kernel, poison)
        self.observers = list(observers)
        self._model, self._device = model, model.device
        eos = model.generation_config.eos_token_id if eos is None else eos
        self._eos = frozenset([eos] if isinstance(eos, int) else eos or ())
        text = model.config.get_text_config(decoder=True)
        self._vocabulary = text.vocab_size
        self._max_len = getattr(text, "max_position_embeddings", None)
        self._live: dict[int, Live] = {}  # by group
        self._next_id = self._next_request = 0

    # -- requests ---------------------------------------------------------------------------

    def add_prefix(self, tokens: Seq[int]) -> int:
        """Compute and keep the K and V of a prefix that requests share (section 4.4); its id.

        Raises OutOfBlocksError, RequestTooLargeError where it is too long or a request that was
        accepted would not fit any more, and ValueError for tokens that the model does not have.
        """
        tokens = self._checked(tokens)
        self._check_length(len(tokens))
        prefix_id = self._new_ids(1)[0]
        self.manager.allocate_prefix(prefix_id, len(tokens))
        scheduler = self.scheduler
        try:  # the pool has less room for those that were accepted before
            for group in (*scheduler.waiting, *scheduler.running, *scheduler.swapped):
                self.manager.require_fits(group)
            forward = Forward(self.manager, self._device)
            forward.add_prompt(prefix_id, 0, tokens)
            self._run(forward)
        except BaseException:
            self.manager.free(prefix_id)
            raise
        return prefix_id

    def drop_prefix(self, prefix_id: int) -> None:
        """Give up a prefix. UnknownSequenceError for what is none, ValueError while a request
        needs it."""
        self._prefix_len(prefix_id)
        queues = self.scheduler.waiting, self.scheduler.running, self.scheduler.swapped
        if any(group.prefix_id == prefix_id for queue in queues for group in queue):
            raise ValueError(f"requests behind prefix {prefix_id} are not done")
        self.cache.pool.poison_blocks(self.manager.free(prefix_id))

    def submit(
        self,
        prompt: Seq[int],
        max_new_tokens: int,
        decoding: Decoding = GREEDY,
        *,
        prefix_id: int | None = None,
        arrival_s: float = 0.0,
    ) -> int:
        """Queue a request; its id. `prompt` are its own tokens, at least one, behind the prefix.

        Raises RequestTooLargeError for more than the model, the pool or the limits can ever hold,
        ValueError for tokens that the model does not have, UnknownSequenceError for a prefix.
        """
        prompt = self._checked(prompt)
        max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        prefix_len = 0 if prefix_id is None else self._prefix_len(prefix_id)
        self._check_length(prefix_len + len(prompt) + max_new_tokens)
        ids = self._new_ids(decoding.num_seqs)
        seqs = [Sequence(one, len(prompt), max_new_tokens, prefix_len) for one in ids]
        request_id, beams = self._next_request, None
        if decoding.beam_width > 1:
            beams = LiveBeams()
            decoder = BeamSearch(decoding.beam_width, self._eos, decoding.length_penalty)
        else:
            decoder = Samples(decoding, self._eos, self._device)
        group = SequenceGroup(request_id, seqs, arrival_s, prefix_id, beams)
        self.scheduler.add(group)
        self._next_request += 1
        self._live[request_id] = Live(prompt, dict.fromkeys(ids, prompt), decoder)
        return request_id

    # -- iterations -------------------------------------------------------------------------

    def run(self) -> Iterator[Output]:
        """Serve all that was submitted; each output as its request ends."""
        while not self.scheduler.idle:
            yield from self.step()

    def step(self, now_s: float = 0.0) -> list[Output]:
        """One iteration: decide, move blocks, run the model once, extend every sequence."""
        iteration = self.scheduler.schedule(now_s)
        if self.cache.pool is not None:
            moves = iteration.swapped_out, iteration.freed, iteration.swapped_in, iteration.copies
            self.cache.pool.move(*moves)
        for observer in self.observers:
            observer.on_iteration(iteration)
        forward, counts = self._gather(iteration)
        if len(forward):
            parts = self._run(forward).split([count for _, count in counts])
            for (group, _), logits in zip(counts, parts):
                choice = self._live[group.group_id].advance(group, logits)
                ended = [seq for seq, end in zip(group.unfinished(), choice.ended) if end]
                self.scheduler.end(group, ended)
        completion = self.scheduler.complete()
        if self.cache.pool is not None:
            for freed in (completion.freed, *completion.moves):
                self.cache.pool.poison_blocks(freed)
        for observer in self.observers:
            observer.on_completion(completion)
        return [self._live.pop(group.group_id).output(group) for group in completion.finished]

    def _gather(self, iteration: Iteration) -> tuple[Forward, list[tuple[SequenceGroup, int]]]:
        """The iteration's tokens, and for each group how many rows of logits are its own."""
        forward, counts = Forward(self.manager, self._device), []
        for group in iteration.decodes:
            seqs, tokens = group.unfinished(), self._live[group.group_id].tokens
            for seq in seqs:
                forward.add_decode(seq.seq_id, tokens[seq.seq_id][-1])
            counts.append((group, len(seqs)))
        for group in iteration.prefills:
            seqs, tokens = group.unfinished(), self._live[group.group_id].tokens
            if not seqs[0].num_generated:
                seqs = seqs[:1]  # all have its prompt, and go on from its last logits
            written: set[int] = set()
            for seq in seqs:
                # Recomputed: what an earlier one does not write into blocks that both hold.
                blocks, prefix_len = self.manager.block_table(seq.seq_id).blocks, seq.prefix_len
                shared = next(i for i, block in enumerate(blocks) if block not in written)
                first = max(prefix_len, shared * self.manager.block_size)
                forward.add_prompt(seq.seq_id, first, tokens[seq.seq_id][first - prefix_len :])
                written.update(blocks)
            counts.append((group, len(seqs)))
        return forward, counts

    def _run(self, forward: Forward) -> torch.Tensor:
        with torch.no_grad():
            return forward.run(self._model, self.cache)

    def _prefix_len(self, prefix_id: int) -> int:
        self.manager.blocks_for(0, prefix_id)  # UnknownSequenceError for a sequence of a request
        return self.manager.num_tokens(prefix_id)

    def _check_length(self, length: int) -> None:
        if self._max_len is not None and length > self._max_len:
            raise RequestTooLargeError(f"{length} tokens; the model has {self._max_len} positions")

    def _checked(self, tokens: Seq[int]) -> list[int]:
        tokens = [check_count("a token", token, least=0) for token in tokens]
        if not tokens or max(tokens) >= self._vocabulary:
            raise ValueError(f"need tokens from 0 to {self._vocabulary - 1}, at least one")
        return tokens

    def _new_ids(self, count: int) -> list[int]:
        first, self._next_id = self._next_id, self._next_id + count
        return list(range(first, first + count))
