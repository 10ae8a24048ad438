"""transformers' own continuous batching on the same model, requests and memory: a peer of serve.py.

Serves section 6: the library's `ContinuousBatchingManager` over its paged cache, with CUDA graphs
where it makes them. Prompts are random tokens; every request generates the same number.

    seconds, tokens = transformers_batching(model, prompts, new=128, num_blocks=983, block_size=16)
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from vllm_sim.paper import MAX_BATCHED_TOKENS
from vllm_sim.reporting.command_line import UsageError

PATIENCE_S = 120.0
# Slots of a block: its name until 5.17, and since.
_OPTIONS = inspect.signature(ContinuousBatchingConfig).parameters
PAGE_SIZE = "page_size" if "page_size" in _OPTIONS else "block_size"


def transformers_batching(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new: int,
    num_blocks: int,
    block_size: int,
) -> tuple[float, int]:
    """Seconds from the first request to the last result, and tokens generated in them. UsageError
    unless all requests are served. For a whole model, not a rank's share."""
    model.set_attn_implementation("sdpa")
    own = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=new)
    config = ContinuousBatchingConfig(
        **{PAGE_SIZE: block_size},
        num_blocks=num_blocks,
        max_batch_tokens=MAX_BATCHED_TOKENS,
        max_requests_per_batch=len(prompts),
    )
    started = model.continuous_batching_context_manager(
        generation_config=own, continuous_batching_config=config, block=True, timeout=5
    )
    with started as manager:
        tokens = done = 0
        begin = time.perf_counter()
        for prompt in prompts:
            manager.add_request(list(prompt), max_new_tokens=new)
        while done < len(prompts) and time.perf_counter() - begin < PATIENCE_S:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done += 1
                tokens += len(result.generated_tokens)
        seconds = time.perf_counter() - begin
    if done < len(prompts):
        told = f"{done} of {len(prompts)} requests in {seconds:.0f} s"
        raise UsageError(f"transformers' batching has served {told}")
    return seconds, tokens
