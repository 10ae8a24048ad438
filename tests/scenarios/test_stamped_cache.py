"""Regime item 3: stamped K and V verify every run that is right, and show every way to be wrong.

Whole runs of mixed workloads on a tiny model, in pools so small that groups are preempted. Then
the same with one thing broken on purpose at a time: each must end with sequences found wrong or
with an error, or the checks of scenario 4 would prove nothing.
"""

import random
from functools import partial

import pytest
import torch

from allocators import BlockAllocator
from kv_cache_manager import BaselineCacheManager, PagedKVCacheManager
from paged_attention import BlockMapError, PagedKVCache
from sequence import BeamHistory, Sequence, SequenceGroup
from vllm_sim import models
from vllm_sim.scenarios.setting import Setting
from vllm_sim.scenarios.stamped_cache import PIECE, StampedCache, Stamps
from vllm_sim.serving.scheduler import Iteration, Limits
from vllm_sim.serving.simulator import make_groups, simulate
from vllm_sim.workload.requests import Request

TINY = models.Model("tiny", "opt", 2, 16, 2, 2, 8, 100, 256)
PREFIX_ID, PREFIX_LEN = 10**6, 7
LIMITS = Limits(400, 32)
BEHIND = {"prefix_len": PREFIX_LEN}
KINDS = ({}, {"num_samples": 3}, {"beam_width": 3}, BEHIND)
KINDS += (BEHIND | {"num_samples": 2}, BEHIND | {"beam_width": 2})


pytestmark = pytest.mark.usefixtures("few_bytes")


def setting_of(num_blocks=30, block_size=4, num_layers=2, seed=0, model=TINY):
    return Setting(model, torch.device("cpu"), num_layers, num_blocks, block_size, seed)


def requests_of(seed, count=16, most=14):
    """Single, parallel, beam search, and behind a shared prefix, arriving closely together."""
    rng = random.Random(seed)
    return [
        Request(n, n / 4, rng.randint(1, most), rng.randint(1, most), **KINDS[n % len(KINDS)])
        for n in range(count)
    ]


def paged_manager(setting, cpu):
    manager = PagedKVCacheManager(setting.num_blocks, setting.block_size, num_cpu_blocks=cpu)
    manager.allocate_prefix(PREFIX_ID, PREFIX_LEN)
    return manager


def stamped_of(manager):
    """Tensors of two layers for a manager's blocks."""
    setting = setting_of(manager.num_blocks, manager.block_size)
    return StampedCache(setting, manager, setting.new_cache())


def serve(requests, setting, mode="auto", cpu=8, policy=None, tensors=StampedCache, broken=None):
    """Run to the end; returns (StampedCache, ServingResult). `broken` may spoil both first."""
    if policy is None:
        manager = paged_manager(setting, cpu)
    else:
        manager = BaselineCacheManager(
            setting.num_blocks, setting.block_size, policy=policy, max_len=48
        )
    stamped = tensors(setting, manager, setting.new_cache(num_cpu_blocks=cpu, poison=True))
    stamped.store_prefix(PREFIX_LEN, PREFIX_ID if policy is None else None)
    if broken is not None:
        broken(stamped)
    groups = make_groups(
        requests, prefix_ids={PREFIX_LEN: PREFIX_ID} if policy is None else {}, seed=setting.seed
    )
    result = simulate(groups, manager, LIMITS, preemption=mode, observers=[stamped])
    manager.check_invariants()
    return stamped, result


def assert_all_verified(stamped, requests):
    assert stamped.wrong == []
    assert stamped.verified == sum(r.num_seqs for r in requests)
    lengths = [(r.prefix_len + r.prompt_len + r.output_len - 1) * r.num_seqs for r in requests]
    assert stamped.tokens_verified == sum(lengths)
    # Only the shared prefix is remembered after the last group: nothing piles up over a run.
    assert stamped.tokens == {}


# --- the stamps ----------------------------------------------------------------------------------

TOKENS = torch.tensor([0, 1, 2, 3, 1022, 1023, 1024, 1025, 2047, 2048, 77_777, 2**20 - 1])


@pytest.mark.parametrize("seed", range(5))
def test_stamps_are_exact_in_fp16(seed):
    stamps = Stamps(setting_of(seed=seed))
    for layer in range(2):
        for values in stamps.values(TOKENS, layer):
            assert values.shape == (len(TOKENS), 2, 8) and values.dtype == torch.float32
            assert torch.equal(values.half().float(), values)
            assert torch.equal(values.round(), values)
            assert values.min() >= 0 and values.max() < 2048


@pytest.mark.parametrize("head_size", [2, 7, 8])
def test_no_two_stamps_are_alike(head_size):
    """Over tokens, layers, K or V and heads: a vector tells all four, and so does each half."""
    model = models.Model("tiny", "llama", 3, 16, 2, 2, head_size, 100, 64)
    for seed in range(3):
        stamps = Stamps(setting_of(num_layers=3, seed=seed, model=model))
        numbers = torch.cat([torch.arange(300), 1024 * torch.arange(1, 100)])
        vectors = torch.cat(
            [part.flatten(0, 1) for layer in range(3) for part in stamps.values(numbers, layer)]
        )
        if head_size > 2:  # two elements carry a token's number, and no more than that for sure
            assert len(vectors.unique(dim=0)) == len(vectors) == 3 * 2 * 2 * len(numbers)
        one_place = stamps.values(numbers, 0)[0][:, 0]
        assert len(one_place.unique(dim=0)) == len(numbers)


def test_every_element_of_a_vector_is_its_own():
    """Taking its number away from a vector leaves a pattern in which no two elements agree much."""
    stamps = Stamps(setting_of(num_layers=2))
    zero = torch.zeros(1, dtype=torch.int64)
    patterns = torch.stack([part for layer in (0, 1) for part in stamps.values(zero, layer)])
    assert patterns.unique().numel() > 0.9 * patterns.numel()
    for first, second in ((0, 2), (1, 3), (0, 1)):  # layers of K, layers of V, K and V
        assert not torch.equal(patterns[first], patterns[second])


def test_the_same_seed_gives_the_same_stamps():
    values = [Stamps(setting_of(seed=seed)).values(TOKENS, 1)[1] for seed in (4, 4, 5)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


# --- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize("mode", ["auto", "swap", "recompute"])
def test_every_sequence_keeps_its_own_through_preemption(mode, block_size):
    num_blocks = {1: 104, 3: 42, 4: 32, 16: 14}[block_size]
    swaps = recomputations = copies = 0
    for seed in range(3):
        setting = setting_of(num_blocks, block_size, seed=seed)
        requests = requests_of(seed)
        stamped, result = serve(requests, setting, mode, cpu=num_blocks // 2)
        assert_all_verified(stamped, requests)
        assert stamped.bytes_moved == result.num_copies * stamped.cache.bytes_per_block
        swaps += result.num_swaps
        recomputations += result.num_recomputations
        copies += result.num_copies
    assert (swaps > 0) == (mode != "recompute")
    assert recomputations > 0 or mode == "swap"
    assert copies > 0 or block_size == 1


@pytest.mark.parametrize("policy", ["max", "pow2", "oracle"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_contiguous_reservations_are_verified_too(policy, block_size):
    setting = setting_of(256 // block_size, block_size)
    requests = requests_of(1)
    stamped, result = serve(requests, setting, policy=policy)
    assert_all_verified(stamped, requests)
    assert result.num_copies == 0 < stamped.bytes_moved, "beams are copied whole"


def test_prompts_longer_than_a_piece_are_written_and_read_in_pieces():
    requests = [Request(0, 0.0, 2 * PIECE + 3, 4, num_samples=2), Request(1, 0.0, PIECE, 2)]
    stamped, _ = serve(requests, setting_of(80, 4))
    assert_all_verified(stamped, requests)


class NothingFreeIsReadable(StampedCache):
    """After every iteration and every completion, free blocks hold NaN and nothing else."""

    def on_iteration(self, iteration):
        super().on_iteration(iteration)
        self.check()

    def on_completion(self, completion):
        super().on_completion(completion)
        self.check()

    def check(self):
        tables = map(self.manager.block_table, (*self.manager.running_ids, PREFIX_ID))
        held = {block for table in tables for block in table.blocks}
        free = [block for block in range(self.manager.num_blocks) if block not in held]
        assert len(free) == self.manager.num_free_blocks
        assert self.cache.pool[:, :, free].isnan().all()


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_what_is_freed_is_poisoned_at_once(mode):
    """By completion, preemption, and by beams that take the place of others."""
    requests = requests_of(2)
    stamped, result = serve(requests, setting_of(32, 4), mode, tensors=NothingFreeIsReadable)
    assert_all_verified(stamped, requests)
    assert result.num_swaps + result.num_recomputations > 0
    held = stamped.manager.block_table(PREFIX_ID).blocks
    assert stamped.manager.num_free_blocks == 32 - len(held)
    assert not stamped.cache.pool[:, :, held].flatten(2, 3)[:, :, :PREFIX_LEN].isnan().any()


# --- broken on purpose ---------------------------------------------------------------------------


def no_copies(stamped):
    stamped.cache.copy_blocks = lambda pairs: None


def copies_turned_round(stamped):
    copy = stamped.cache.copy_blocks
    stamped.cache.copy_blocks = lambda pairs: copy([(new, old) for old, new in pairs])


def copies_after_the_writes(stamped):
    copy, act, late = stamped.cache.copy_blocks, stamped.on_iteration, []
    stamped.cache.copy_blocks = late.append

    def on_iteration(iteration):
        act(iteration)
        copy(late.pop())

    stamped.on_iteration = on_iteration


def rotated(pairs):
    """Each block goes where the next one should go."""
    targets = [target for _, target in pairs]
    return [(source, target) for (source, _), target in zip(pairs, targets[1:] + targets[:1])]


def swap_in_shuffled(stamped):
    move = stamped.cache.swap_in
    stamped.cache.swap_in = lambda pairs: move(rotated(pairs))


def swap_out_shuffled(stamped):
    move = stamped.cache.swap_out
    stamped.cache.swap_out = lambda pairs: move(rotated(pairs))


def no_swap_out(stamped):
    stamped.cache.swap_out = lambda pairs: None


def no_swap_in(stamped):
    stamped.cache.swap_in = lambda pairs: None


def poison_after_the_writes(stamped):
    """A block freed in this iteration may have a new owner already."""
    poison, act = stamped.cache.poison_blocks, stamped.on_iteration

    def on_iteration(iteration):
        late = []
        stamped.cache.poison_blocks = lambda blocks, on_cpu=False: late.append((blocks, on_cpu))
        act(iteration)
        stamped.cache.poison_blocks = poison
        for blocks, on_cpu in late:
            poison(blocks, on_cpu=on_cpu)

    stamped.on_iteration = on_iteration


def reorder_ignored(stamped):
    stamped.manager.reorder = lambda parents: []


def reorder_to_the_wrong_parent(stamped):
    reorder = stamped.manager.reorder

    def one_on(parents):
        ids = sorted({*parents, *parents.values()})
        following = dict(zip(ids, ids[1:] + ids[:1]))
        return reorder({child: following[parent] for child, parent in parents.items()})

    stamped.manager.reorder = one_on


def recomputed_not_rewritten(stamped):
    prefill = stamped._prefill

    def only_the_first_time(group):
        again = group.seqs[0].seq_id in stamped.tokens
        writes = prefill(group)
        return [] if again else writes

    stamped._prefill = only_the_first_time


def recomputed_without_its_output(stamped):
    prefill = stamped._prefill

    def prompt_only(group):
        context = group.seqs[0].context_len
        return [(i, start, tokens[: context - start]) for i, start, tokens in prefill(group)]

    stamped._prefill = prompt_only


def slot_off_by_one(stamped):
    last_slot = stamped._last_slot
    stamped._last_slot = lambda seq_id: max(0, last_slot(seq_id) - 1)


def prefix_never_written(stamped):
    blocks = stamped.manager.block_table(PREFIX_ID).blocks
    stamped.cache.poison_blocks(blocks)


def one_layer_forgotten(stamped):
    write = stamped.cache.write
    stamped.cache.write = lambda layer, *rest: write(layer, *rest) if layer == 0 else None


def v_written_as_k(stamped):
    write = stamped.cache.write
    stamped.cache.write = lambda layer, slots, k, v: write(layer, slots, k, k)


def heads_swapped(stamped):
    write = stamped.cache.write
    stamped.cache.write = lambda layer, slots, k, v: write(layer, slots, k.flip(1), v.flip(1))


class Forgetful(BlockAllocator):
    __slots__ = ()

    def drop(self, blocks):
        for block in blocks[:1]:
            self.extra_refs.pop(block, None)
        return super().drop(blocks)


def a_block_freed_too_early(stamped):
    """The manager forgets one holder: the block is poisoned, and given out a second time."""
    stamped.manager._gpu.__class__ = Forgetful


# What is seen in a run that swaps, and in one that recomputes.
COPIES = (no_copies, copies_turned_round, copies_after_the_writes)
SWAPS = (swap_in_shuffled, swap_out_shuffled, no_swap_out, no_swap_in, poison_after_the_writes)
BEAMS = (reorder_ignored, reorder_to_the_wrong_parent)
WRITES = (slot_off_by_one, prefix_never_written, one_layer_forgotten, v_written_as_k, heads_swapped)
RECOMPUTED = (recomputed_not_rewritten, recomputed_without_its_output, poison_after_the_writes)
BREAKS = {
    "swap": (*COPIES, *SWAPS, *BEAMS, *WRITES),
    "recompute": (*RECOMPUTED, a_block_freed_too_early),
}


def found_wrong(run):
    """The sequences found wrong, or the error that ended the run, if a check raised it.

    Anything else would be a mistake in what breaks it.
    """
    try:
        stamped, _ = run()
    except (AssertionError, BlockMapError) as error:
        return error
    return stamped.wrong


@pytest.mark.parametrize("mode", BREAKS)
def test_what_is_broken_is_found(mode):
    run = partial(serve, requests_of(0), setting_of(30, 4), mode, cpu=30)
    assert found_wrong(run) == []
    for broken in BREAKS[mode]:
        assert found_wrong(partial(run, broken=broken)), broken.__name__


def test_a_shared_block_written_without_a_copy_is_found(monkeypatch):
    """The manager's own half of copy-on-write: tables that do not withhold their last block."""
    monkeypatch.setattr(
        PagedKVCacheManager, "_tails", property(lambda m: {}, lambda *_: None), False
    )
    requests = [Request(n, 0.0, 5, 6, num_samples=3) for n in range(4)]
    stamped = stamped_of(PagedKVCacheManager(60, 4))
    simulate(make_groups(requests), stamped.manager, LIMITS, observers=[stamped])
    # The last to write a slot still finds its own there; the others find that.
    assert len(stamped.wrong) == 4 * 2 and stamped.verified == 4


def no_moves(stamped):
    stamped._copy_slots = lambda copies: None


def moves_one_after_the_other(stamped):
    """Beams that trade places need both copies made as if at once."""
    copy = stamped._copy_slots

    def in_turn(copies):
        for one in copies:
            copy([one])

    stamped._copy_slots = in_turn


def moves_a_token_short(stamped):
    copy = stamped._copy_slots
    stamped._copy_slots = lambda copies: copy([(s, d, n - 1) for s, d, n in copies if n > 1])


def reservations_overlap(stamped):
    start = stamped.manager.start_slot
    stamped.manager.start_slot = lambda seq_id: start(seq_id) // 2


@pytest.mark.parametrize(
    "broken", [no_moves, moves_one_after_the_other, moves_a_token_short, reservations_overlap]
)
def test_what_is_broken_is_found_in_contiguous_memory(broken):
    requests = requests_of(3)
    run = partial(serve, requests, setting_of(64, 4), policy="oracle")
    if broken is moves_one_after_the_other:
        run = trading_beams
    assert found_wrong(run) == []
    assert found_wrong(partial(run, broken=broken))


def trading_beams(broken=None):
    """Three beams that change places in a circle after every token."""
    stamped = stamped_of(BaselineCacheManager(64, 4, policy="oracle", max_len=48))
    if broken is not None:
        broken(stamped)
    (group,) = make_groups([Request(0, 0.0, 3, 8, beam_width=3)])
    group.beam_parents = BeamHistory([[0, 0, 0]] + [[1, 2, 0]] * 7)
    return stamped, simulate([group], stamped.manager, LIMITS, observers=[stamped])


def test_a_wrong_length_is_found_without_a_look_at_the_tensors():
    manager = paged_manager(setting_of(), 0)
    stamped, count = stamped_of(manager), manager.num_tokens
    manager.num_tokens = lambda seq_id: count(seq_id) - 1
    simulate(make_groups([Request(0, 0.0, 5, 3)]), manager, LIMITS, observers=[stamped])
    assert stamped.wrong == [0] and stamped.verified == stamped.tokens_verified == 0


def test_a_sequence_that_ends_too_early_is_found():
    """What there is of it is right, in the tables and in the tensors: only it is too short."""
    for output_len, wrong in ((1, []), (4, [0])):
        stamped = stamped_of(paged_manager(setting_of(), 0))
        stamped.manager.allocate(0, 5)
        last = SequenceGroup(0, [Sequence(0, 5, output_len, 0, output_len - 1)])
        stamped.on_iteration(Iteration(0, 0.0, prefills=[last]))
        assert (stamped.verified, stamped.wrong) == (1 - len(wrong), wrong)


# --- other layouts -------------------------------------------------------------------------------


def test_caches_on_other_layouts_verify_the_same(monkeypatch):
    """Grouped queries: K and V have fewer heads than the model."""
    model = models.Model("tiny", "opt", 2, 32, 4, 2, 8, 100, 256)
    requests = requests_of(4)
    stamped, _ = serve(requests, setting_of(32, 4, model=model))
    assert stamped.cache.num_kv_heads == 2
    assert_all_verified(stamped, requests)
    # And without poison, as on a device where nobody wants to pay for it.
    monkeypatch.setattr(PagedKVCache, "poison_blocks", lambda self, blocks, on_cpu=False: None)
    stamped, _ = serve(requests, setting_of(32, 4), "swap")
    assert_all_verified(stamped, requests)
