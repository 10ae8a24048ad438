"""The steady state of a queue that never runs dry, and which system has which policy and limits."""

import numpy as np
import pytest

from kv_cache_manager import BaselineCacheManager, MemoryUsage, PagedKVCacheManager
from vllm_sim import paper
from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.steady_state import QueueTooShortError, UsageMean, steady_state
from vllm_sim.serving.systems import CONTIGUOUS, POLICIES, POLICY, limits_of, new_manager
from vllm_sim.workload.requests import Request


def observed(warmup, iterations, *every):
    """The mean, usage and batch at each iteration that counts, and the manager at the end."""
    requests = [Request(n, 0.0, 4, 4) for n in range(60)]
    manager, seen = PagedKVCacheManager(9, 4, watermark=0.0), []

    def each(scheduler):
        seen.append((manager.usage(), len(scheduler.running)))

    mean = steady_state(manager, requests, Limits(40, 8), warmup, iterations, each, *every)
    return mean, seen, manager


@pytest.mark.parametrize(("count", "every", "after"), [(5, 1, 0), (50, 1, 28), (50, 50, 28)])
def test_a_queue_that_runs_dry_is_an_error(count, every, after):
    requests = [Request(n, 0.0, 5, 5) for n in range(count)]
    with pytest.raises(QueueTooShortError, match=f"of {count} ran dry after {after} iterations"):
        steady_state(PagedKVCacheManager(10, 8), requests, Limits(100, 100), 500, 2, every=every)


def test_means_are_taken_after_the_warmup_only():
    mean, seen, _ = observed(7, 20)
    assert seen == observed(0, 27)[1][7:] == observed(7, 20, 1)[1]
    assert len(seen) == mean.count == 20
    assert mean.batch == pytest.approx(sum(batch for _, batch in seen) / 20)
    for part in ("tokens", "padding", "free"):
        shares = [getattr(usage, part) / 36 for usage, _ in seen]
        assert mean.percent(part) == mean.percents[part] == pytest.approx(100 * sum(shares) / 20)
        assert mean.shares[part] == pytest.approx(sum(shares) / 20)
    parts = [mean.percent(part) for part in ("rounding", "padding", "free")]
    assert mean.external_and_others == pytest.approx(sum(parts))
    assert mean.saving == pytest.approx(0.0)


@pytest.mark.parametrize("iterations", range(1, 9))
def test_it_ends_within_the_last_iteration_with_all_in_place(iterations):
    _, seen, manager = observed(3, iterations)
    assert manager.usage() == seen[-1][0]


def test_iterations_with_nothing_in_memory_say_nothing_of_sharing():
    mean = UsageMean()
    assert mean.saving == 0.0
    mean.add(MemoryUsage(40, 0, 40), 0)
    mean.add(MemoryUsage(40, 8, 32, logical_tokens=16, logical_blocks=4, physical_blocks=2), 2)
    assert (mean.percent("free"), mean.batch) == (90.0, 1.0)
    assert mean.saving == 0.5  # of the one that holds blocks
    mean.add(MemoryUsage(40, 8, 32, logical_tokens=8, logical_blocks=3, physical_blocks=2), 1)
    assert mean.saving == pytest.approx(1 - 1 / 1.75)  # 2 and 1.5 times the blocks, in the mean


@pytest.mark.parametrize("policy", ["paged", "oracle"])
def test_looking_at_one_iteration_in_some_sees_what_looking_at_all_sees(policy):
    """Iterations taken at once leave the same state as iterations taken one by one."""
    lengths = np.random.default_rng(0).integers(1, 60, (900, 2)).tolist()
    requests = [Request(i, 0.0, *pair) for i, pair in enumerate(lengths)]
    seen = {1: [], 7: []}
    for every, log in seen.items():
        manager = new_manager(policy, 40, 8, max_len=128, watermark=0.01)

        def each(scheduler, manager=manager, log=log):
            running = [group.group_id for group in scheduler.running]
            log.append((running, scheduler.context_tokens, manager.usage()))

        mean = steady_state(manager, requests, Limits(10**6, 10**6), 50, 700 // every, each, every)
        assert mean.count == mean.agreed == len(log) == 700 // every
    assert seen[1][::7] == seen[7]


@pytest.mark.parametrize("tokens", [0, 1000])
def test_iterations_whose_slots_do_not_add_up_are_told(tokens):
    requests = [Request(n, 0.0, 4, 4) for n in range(60)]
    manager = PagedKVCacheManager(9, 4)
    manager.usage = lambda: MemoryUsage(36, 0, 36, logical_tokens=tokens)
    manager.check_invariants = lambda: None
    assert steady_state(manager, requests, Limits(40, 8), 0, 5).agreed == 0


def test_every_system_has_the_manager_of_its_policy():
    assert POLICIES == ("max", "pow2", "oracle", "paged") == (*CONTIGUOUS, POLICY[paper.VLLM])
    assert CONTIGUOUS["oracle"] == paper.ORCA_ORACLE and "paged" not in CONTIGUOUS
    for policy in CONTIGUOUS:
        manager = new_manager(policy, 8, 16, max_len=64)
        assert isinstance(manager, BaselineCacheManager)
        manager.allocate(0, 10, 30)
        assert manager.usage().internal == {"max": 34, "pow2": 12, "oracle": 0}[policy]


def test_swap_space_and_watermark_are_the_paged_managers():
    policy = "".join(("pag", "ed"))  # equal to the constant, and another object
    manager = new_manager(policy, 10, 4, num_cpu_blocks=3, watermark=0.5)
    assert isinstance(manager, PagedKVCacheManager)
    assert manager.can_allocate(20) and not manager.can_allocate(24)
    manager.allocate(0, 12)
    assert manager.can_swap_out([0])
    manager.append(0)  # a fourth block
    assert not manager.can_swap_out([0])
    small = new_manager("paged", 10, 4)
    small.allocate(0, 1)
    assert not small.can_swap_out([0])  # no swap space unless asked for
    with pytest.raises(ValueError):
        new_manager("fifo", 10, 4)
    with pytest.raises(TypeError):
        new_manager("paged", 10, 4, 64)


def test_limits_are_the_artifacts():
    assert limits_of(paper.VLLM) == Limits(2560, 2048)
    assert limits_of(paper.ORCA_POW2) == limits_of("mine") == Limits(2560, 256)
