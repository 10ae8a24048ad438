"""What tests of the scheduler share: groups, a scheduler over a small pool, and what must hold."""

from kv_cache_manager import PagedKVCacheManager
from sequence import Sequence, SequenceGroup, SequenceStatus
from vllm_sim.serving.scheduler import Limits, Scheduler

SIZE = 4
WIDE = Limits(2560, 256)
MODES = ("auto", "swap", "recompute")


def group(number, prompt_len, outputs, arrival_s=0.0, prefix=None, parents=None):
    """A group of one sequence per output length; `prefix` is (id, length) of a shared prefix."""
    prefix_id, prefix_len = prefix or (None, 0)
    seqs = [
        Sequence(100 * number + i, prompt_len, output, prefix_len)
        for i, output in enumerate(outputs)
    ]
    return SequenceGroup(number, seqs, arrival_s, prefix_id, parents)


def scheduler_of(groups, num_blocks, *, mode="auto", cpu=0, watermark=0.0, limits=WIDE, size=SIZE):
    manager = PagedKVCacheManager(num_blocks, size, num_cpu_blocks=cpu, watermark=watermark)
    return submitted(groups, manager, limits, mode)


def submitted(groups, manager, limits=WIDE, mode="auto"):
    scheduler = Scheduler(manager, limits, mode)
    for one in groups:
        scheduler.add(one)
    return scheduler


def numbers(groups):
    return [one.group_id for one in groups]


def step(scheduler):
    """One whole iteration: (what was scheduled, what was completed)."""
    iteration = scheduler.schedule()
    check_state(scheduler)
    return iteration, scheduler.complete()


def run_until(scheduler, happened, at_most=200):
    """Iterate until `happened(iteration)`; stops before the iteration completes."""
    for _ in range(at_most):
        iteration = scheduler.schedule()
        check_state(scheduler)
        if happened(iteration):
            return iteration
        scheduler.complete()
    raise AssertionError("it never happened")


def finish(scheduler, at_most=1000):
    """Iterate to the end; the group numbers in the order in which they finished."""
    order = []
    for _ in range(at_most + 1):
        if scheduler.idle:
            return order
        order += numbers(step(scheduler)[1].finished)
    raise AssertionError(f"still not idle after {at_most} iterations")


def check_state(scheduler):
    """What must hold between schedule() and complete(), whatever the workload."""
    manager = scheduler.manager
    manager.check_invariants()
    waits = {
        SequenceStatus.WAITING: scheduler.waiting,
        SequenceStatus.RUNNING: scheduler.running,
        SequenceStatus.SWAPPED: scheduler.swapped,
    }
    everywhere = [one for groups in waits.values() for one in groups]
    assert len({id(one) for one in everywhere}) == len(everywhere), "a group is in two places"
    for status, groups in waits.items():
        keys = [(one.arrival_s, one.group_id) for one in groups]
        assert keys == sorted(keys), f"{status}: not in order of arrival"
        for one in groups:
            assert not one.finished
            assert {seq.status for seq in one.unfinished()} == {status}, "a group split up"
    running = [seq for one in scheduler.running for seq in one.unfinished()]
    assert sorted(manager.running_ids) == sorted(seq.seq_id for seq in running)
    for seq in running:
        # Everything but the token that this iteration generates is stored.
        assert manager.num_tokens(seq.seq_id) == seq.num_tokens
    assert scheduler.num_running_seqs == len(running)
    assert scheduler.context_tokens == sum(seq.num_tokens for seq in running)
    if isinstance(manager, PagedKVCacheManager):
        swapped = [seq.seq_id for one in scheduler.swapped for seq in one.unfinished()]
        manager.can_swap_in(swapped)  # raises for one that is not on the CPU
        assert swapped or manager.num_free_cpu_blocks == manager.num_cpu_blocks


def fresh(one):
    """The same request, never run."""
    outputs = [seq.output_len for seq in one.seqs]
    prefix = None if one.prefix_id is None else (one.prefix_id, one.seqs[0].prefix_len)
    parents = one.beam_parents
    return group(one.group_id, one.seqs[0].prompt_len, outputs, one.arrival_s, prefix, parents)
