"""The systems that the paper compares: how each manages memory, and what an iteration may hold.

Reproduces: section 6.1 (Orca's three ways to reserve, vLLM's blocks) with the artifact's limits.
The one place that knows which policy a system has and how a manager is built for it:

    manager = new_manager(POLICY[paper.ORCA_ORACLE], num_blocks=983, block_size=16)
    result = simulate(requests, manager, limits_of(paper.ORCA_ORACLE))

A policy is `paged`, or a contiguous one of kv_cache_manager.py: `max`, `pow2`, `oracle`.
"""

from __future__ import annotations

from kv_cache_manager import BaselineCacheManager, PagedKVCacheManager
from vllm_sim import paper
from vllm_sim.serving.scheduler import Limits, Manager

PAGED = "paged"
POLICY = {
    paper.ORCA_MAX: "max",
    paper.ORCA_POW2: "pow2",
    paper.ORCA_ORACLE: "oracle",
    paper.VLLM: PAGED,
}
CONTIGUOUS = {policy: system for system, policy in POLICY.items() if policy != PAGED}
POLICIES = (*CONTIGUOUS, PAGED)  # in the order of Fig. 2


def new_manager(
    policy: str,
    num_blocks: int,
    block_size: int,
    *,
    max_len: int = paper.MAX_MODEL_LEN,
    num_cpu_blocks: int = 0,
    watermark: float = paper.WATERMARK,
) -> Manager:
    """An empty pool under a policy. `max_len` is the model's maximum, for contiguous ones;
    swap space and the watermark are for paged. ValueError for an unknown policy or bad counts."""
    if policy == PAGED:
        return PagedKVCacheManager(
            num_blocks, block_size, num_cpu_blocks=num_cpu_blocks, watermark=watermark
        )
    return BaselineCacheManager(num_blocks, block_size, policy=policy, max_len=max_len)


def limits_of(system: str) -> Limits:
    """The artifact's limits on an iteration; a system that is not the paper's has Orca's."""
    sequences = paper.MAX_SEQUENCES.get(system, paper.MAX_SEQUENCES[paper.ORCA_MAX])
    return Limits(paper.MAX_BATCHED_TOKENS, sequences)
