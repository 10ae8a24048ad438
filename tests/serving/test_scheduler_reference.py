"""Regime item 7: the scheduler against a naive reference, in every iteration of random workloads.

The reference (`Naive`) goes through an iteration as section 4.5 tells it: group by group, token by
token, with nothing counted ahead. It shares no line with scheduler.py; under it is a manager of
its own that only allocates, forks, appends one token, frees and swaps.
"""

import random
from collections import Counter

from scheduler_tools import MODES, check_state, fresh, group, numbers

from kv_cache_manager import (
    OutOfBlocksError,
    OutOfSwapSpaceError,
    PagedKVCacheManager,
    RequestTooLargeError,
)
from vllm_sim.serving.scheduler import Limits, Scheduler


class Naive:
    """Section 4.5 and the artifact's rules, one group and one token at a time."""

    def __init__(self, manager, max_tokens, max_seqs, mode):
        self.manager, self.mode = manager, mode
        self.max_tokens, self.max_seqs = max_tokens, max_seqs
        self.waiting, self.running, self.swapped = [], [], []
        self.seen = Counter()  # which of the rules came to bear: the test asks for all of them

    def submit(self, one):
        self._enter(self.waiting, one)

    @staticmethod
    def _enter(groups, one):
        groups.append(one)
        groups.sort(key=lambda g: (g.arrival_s, g.group_id))

    @staticmethod
    def _alive(one):
        return [seq for seq in one.seqs if seq.num_generated < seq.output_len]

    def iterate(self):
        """One iteration; what happened, in a form to be compared."""
        m = self.manager
        log = {"recomputed": [], "out": [], "in": [], "admitted": []}
        log |= {"copies": 0, "blocks out": 0, "blocks in": 0, "prompt tokens": 0}
        preempted = []
        todo, self.running = self.running, []
        while todo:
            one = todo.pop(0)
            while self._spare(one, todo) > m.num_free_blocks:
                self.seen["itself"] += not todo
                victim = todo.pop() if todo else one
                preempted.append(victim)
                self._preempt(victim, log)
                if victim is one:
                    break
            else:
                for seq in self._alive(one):
                    log["copies"] += len(m.append(seq.seq_id))
                self.running.append(one)
        if not log["out"]:
            while self.swapped and self.swapped[0] not in preempted:
                if not self._bring_back(self.swapped[0], log):
                    break
        log["decodes"] = [g.group_id for g in self.running]
        if self.swapped and self.waiting:
            self.seen["admission waits for swapped"] += 1
        if not self.swapped:
            while self.waiting:
                if self.waiting[0] in preempted:
                    self.seen["not at once"] += 1
                    break
                if not self._admit(self.waiting[0], log):
                    break
        log["free"] = m.num_free_blocks, m.num_free_cpu_blocks
        log["stored"] = {i: m.num_tokens(i) for i in sorted(m.running_ids)}
        return log

    def _spare(self, one, todo):
        """Free blocks that it asks for: one for each of its sequences, alone only what they take,
        none where the last to write into a part-filled block does so in place."""
        ids = [seq.seq_id for seq in self._alive(one)]
        if todo or self.running:
            return len(ids)
        tables = [self.manager.block_table(i) for i in ids]
        return len(ids) - len({table.blocks[-1] for table in tables if table.unfilled})

    def _preempt(self, one, log):
        ids = [seq.seq_id for seq in self._alive(one)]
        if self.mode == "swap" or (self.mode == "auto" and len(ids) > 1):
            try:
                log["blocks out"] += len(self.manager.swap_out(ids))
            except OutOfSwapSpaceError:
                self.seen["fall back to recomputation"] += 1
            else:
                log["out"].append(one.group_id)
                self._enter(self.swapped, one)
                return
        if len(ids) < len(one.seqs):
            self.seen["finished stay finished"] += 1
        for seq_id in ids:
            self.manager.free(seq_id)
        log["recomputed"].append(one.group_id)
        self._enter(self.waiting, one)

    def _bring_back(self, one, log):
        m = self.manager
        ids = [seq.seq_id for seq in self._alive(one)]
        if len(self.running) + len(ids) > self.max_seqs:
            self.seen["cap on return"] += 1
            return False
        try:
            pairs = m.swap_in(ids)
        except OutOfBlocksError:
            return False
        left = m.num_free_blocks - self._spare(one, [])
        if left < (m.watermark_blocks if self.running else 0):  # too tight: back again
            m.swap_out(ids)
            self.seen["too tight to return"] += 1
            return False
        log["blocks in"] += len(pairs)
        for seq_id in ids:
            log["copies"] += len(m.append(seq_id))
        self.swapped.remove(one)
        self._enter(self.running, one)
        log["in"].append(one.group_id)
        return True

    def _admit(self, one, log):
        m = self.manager
        seqs = self._alive(one)
        tokens = max(seq.prompt_len + seq.num_generated for seq in seqs)
        if one.prefix_id is None:
            tokens += seqs[0].prefix_len
        # One token of each sequence that decodes, and the prompts admitted before this one.
        decoding = [g for g in self.running if g.group_id in log["decodes"]]
        in_batch = sum(len(self._alive(g)) for g in decoding) + log["prompt tokens"]
        if in_batch + tokens > self.max_tokens:
            if in_batch or not any(seq.num_generated for seq in seqs):
                self.seen["token limit"] += 1
                return False
            self.seen["recomputed by itself"] += 1
        if len(self.running) + len(seqs) > self.max_seqs:
            self.seen["cap on admission"] += 1
            return False
        first, *others = [seq.seq_id for seq in seqs]
        made, copies = [], 0
        try:
            copies += len(m.allocate(first, seqs[0].prompt_len, one.prefix_id))
            made.append(first)
            for seq_id in others:
                m.fork(first, seq_id)
                made.append(seq_id)
            for seq in seqs:
                for _ in range(seq.num_generated):
                    copies += len(m.append(seq.seq_id))
            fits = m.num_free_blocks >= m.watermark_blocks or not self.running
            self.seen["watermark"] += not fits
        except OutOfBlocksError:
            fits = False
        if not fits:
            for seq_id in made:
                m.free(seq_id)
            return False
        log["copies"] += copies
        log["prompt tokens"] += tokens
        self.waiting.remove(one)
        self._enter(self.running, one)
        log["admitted"].append(one.group_id)
        return True

    def finish_iteration(self):
        """A token each; the numbers of the groups that are complete."""
        done = []
        for one in list(self.running):
            for seq in self._alive(one):
                seq.num_generated += 1
                if seq.num_generated == seq.output_len:
                    self.manager.free(seq.seq_id)
            alive = self._alive(one)
            if not alive:
                self.running.remove(one)
                done.append(one.group_id)
            elif one.beam_parents is not None:
                ids = [seq.seq_id for seq in one.seqs]
                parents = one.beam_parents[alive[0].num_generated - 1]
                self.manager.reorder({ids[i]: ids[p] for i, p in enumerate(parents)})
        return done


def random_workload(seed):
    """(num_blocks, block size, CPU blocks, watermark, prefix, limits, mode, groups)."""
    rng = random.Random(seed)
    size = rng.randint(1, 4)
    num_blocks = rng.randint(8, 40)
    cpu = rng.choice([0, 1, rng.randint(0, num_blocks), num_blocks])
    watermark = rng.choice([0.0, 0.01, 0.1, 0.2])
    prefix = (10**6, rng.randint(1, 2 * size + 1)) if rng.random() < 0.5 else None
    limits = Limits(rng.choice([12, 20, 40, 2560]), rng.choice([3, 5, 8, 256]))
    longest = max(3, num_blocks * size // rng.choice([2, 3, 5]))
    now, groups = 0.0, []
    names = rng.sample(range(20), 9)  # numbers say nothing about who came first
    for number in names[: rng.randint(2, 9)]:
        prompt_len = rng.randint(1, longest)
        output = rng.randint(1, max(2, longest - prompt_len))
        kind = rng.choice(["single", "parallel", "uneven", "uneven", "beam"])
        width = 1 if kind == "single" else rng.randint(2, 4)
        outputs, parents = [output] * width, None
        if kind == "uneven":
            outputs = [rng.randint(1, output) for _ in range(width)]
        if kind == "beam":
            parents = [[rng.randrange(width) for _ in range(width)] for _ in range(output)]
        behind = prefix if prefix and rng.random() < 0.5 else None
        now += rng.choice([0.0, 0.0, 1.0, 3.0])
        groups.append(group(number, prompt_len, outputs, now, behind, parents))
    rng.shuffle(groups)
    return num_blocks, size, cpu, watermark, prefix, limits, rng.choice(MODES), groups


def managers_for(num_blocks, size, cpu, watermark, prefix):
    pair = []
    for order in (None, reversed(range(num_blocks))):  # not even the same block numbers
        manager = PagedKVCacheManager(
            num_blocks, size, num_cpu_blocks=cpu, watermark=watermark, free_order=order
        )
        if prefix:
            manager.allocate_prefix(*prefix)
        pair.append(manager)
    return pair


def what_happened(scheduler, before, iteration):
    """The scheduler's iteration in the form of Naive.iterate's log."""
    swapped = set(numbers(scheduler.swapped))
    was_running, was_swapped = before
    waiting = numbers(scheduler.waiting)
    manager = scheduler.manager
    return {
        "recomputed": sorted(set(waiting) & set(was_running)),
        "out": sorted(swapped - set(was_swapped)),
        "in": sorted(set(was_swapped) - swapped),
        "admitted": numbers(iteration.prefills),
        "decodes": numbers(iteration.decodes),
        "copies": len(iteration.copies),
        "blocks out": len(iteration.swapped_out),
        "blocks in": len(iteration.swapped_in),
        "free": (manager.num_free_blocks, manager.num_free_cpu_blocks),
        "stored": {i: manager.num_tokens(i) for i in sorted(manager.running_ids)},
    }


def run_beside_naive(seed, workload=random_workload):
    """Both over the same workload, compared in every iteration; the rules that came to bear."""
    *pool, limits, mode, groups = workload(seed)
    ours, theirs = managers_for(*pool)
    scheduler = Scheduler(ours, limits, mode)
    naive = Naive(theirs, limits.max_batched_tokens, limits.max_num_seqs, mode)
    accepted = []
    for one in groups:
        try:
            scheduler.check(one)
            accepted.append(one)
        except RequestTooLargeError:
            naive.seen["refused"] += 1
    accepted.sort(key=lambda one: (one.arrival_s, one.group_id))
    twins = {id(one): fresh(one) for one in accepted}
    most = sum(max(seq.output_len for seq in one.seqs) for one in accepted)
    last_arrival = accepted[-1].arrival_s if accepted else 0.0
    queue, log, finished = list(accepted), [], []
    now, iterations = 0.0, 0
    while queue or not scheduler.idle:
        while queue and (queue[0].arrival_s <= now or scheduler.idle):
            scheduler.add(queue[0])
            naive.submit(twins[id(queue.pop(0))])
        before = numbers(scheduler.running), numbers(scheduler.swapped)
        order = [(g.arrival_s, g.group_id) for g in scheduler.running]
        iteration = scheduler.schedule(now)
        check_state(scheduler)
        mine, reference = what_happened(scheduler, before, iteration), naive.iterate()
        # Who gives way is a suffix of those who ran, in order of arrival: never out of the middle.
        gone = reference["recomputed"] + reference["out"]
        assert {g for _, g in order[len(order) - len(gone) :]} == set(gone)
        naive.seen["swapped"] += len(reference["out"])
        naive.seen["recomputed"] += len(reference["recomputed"])
        naive.seen["copied"] += reference["copies"]
        for name in ("recomputed", "out", "in"):
            reference[name] = sorted(reference[name])
        reference.pop("prompt tokens")
        assert mine == reference, f"seed {seed}, iteration {iterations}"
        # What is decoded reads what it holds; what comes back as a prompt is computed anew.
        decoding = [seq for one in iteration.decodes for seq in one.unfinished()]
        assert iteration.num_decodes == len(decoding)
        assert iteration.context_tokens == sum(seq.num_tokens for seq in decoding)
        assert iteration.prompt_tokens == sum(
            one.own_prompt_len + sum(seq.num_generated for seq in one.unfinished())
            for one in iteration.prefills
        )
        assert iteration.num_swaps == len(mine["out"])
        assert iteration.num_recomputations == len(mine["recomputed"])
        assert not (mine["admitted"] and scheduler.swapped)
        assert iteration.decodes or iteration.prefills, "an iteration without any progress"
        # The first to have arrived, of those that run, never gives way.
        assert not order or order[0][1] in mine["decodes"]
        for one in scheduler.running:
            for seq in one.unfinished():
                if seq.num_generated + 1 == seq.output_len:
                    assert ours.num_tokens(seq.seq_id) == seq.final_len - 1
        done = numbers(scheduler.complete().finished)
        assert done == naive.finish_iteration()
        assert (ours.num_free_blocks, ours.usage()) == (theirs.num_free_blocks, theirs.usage())
        finished += done
        log.append(mine)
        now += 1.0
        iterations += 1
        assert iterations <= most + last_arrival, f"seed {seed}: no end in sight"
    assert sorted(finished) == sorted(numbers(accepted))
    assert sum(one.num_preemptions for one in accepted) == sum(
        len(mine["out"]) + len(mine["recomputed"]) for mine in log
    )
    ours.check_invariants()
    if pool[-1]:
        ours.free(pool[-1][0])
    assert ours.num_free_blocks == ours.num_blocks
    assert ours.num_free_cpu_blocks == ours.num_cpu_blocks
    return log, naive.seen


NUM_WORKLOADS = 600


def test_agrees_with_the_naive_reference_in_every_iteration():
    seen = Counter()
    for seed in range(NUM_WORKLOADS):
        seen += run_beside_naive(seed)[1]
    # All of this must have happened, or the comparison proved little.
    rules = ("refused", "itself", "not at once", "swapped", "recomputed", "copied", "watermark")
    rules += ("token limit", "cap on admission", "too tight to return", "finished stay finished")
    rules += ("fall back to recomputation", "admission waits for swapped")
    assert {rule: seen[rule] for rule in rules if seen[rule] < 10} == {}


def test_the_same_workload_gives_the_same_iterations():
    for seed in range(30):
        assert run_beside_naive(seed)[0] == run_beside_naive(seed)[0]
