"""FasterTransformer as the paper compares with it: static batches, padded.

Reproduces: section 6.1's first baseline. A batch takes up to B of the earliest requests that have
arrived, as long as its longest input and longest output together keep to a limit; it runs until
its longest output is complete, every sequence padded to the longest, and only then does anything
return and the next batch begin (the authors' artifact). B is a limit per model and data set, chosen
by them so that the memory suffices; no manager is asked.

    result = simulate_static(arrivals, prompts, outputs, 5, 2040, latency)
"""

from __future__ import annotations

from collections.abc import Sequence

from sequence import check_count
from vllm_sim.serving.latency import LatencyModel
from vllm_sim.serving.simulator import ServingResult


def simulate_static(
    arrivals: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    batch_size: int,
    max_total_len: int,
    latency: LatencyModel,
) -> ServingResult:
    """Serve requests, in order of arrival, to their end; lengths in tokens, times in seconds.

    Prompts are computed without their padding, decode steps read it. A request that exceeds
    `max_total_len` by itself is served alone. Raises ValueError.
    """
    check_count("batch size", batch_size)
    check_count("maximum total length", max_total_len)
    result = ServingResult()
    now, first, count = 0.0, 0, len(arrivals)
    while first < count:
        now = max(now, arrivals[first])
        longest_in, longest_out = prompts[first], outputs[first]
        end = first + 1
        while end < count and end - first < batch_size and arrivals[end] <= now:
            wider = max(longest_in, prompts[end]), max(longest_out, outputs[end])
            if sum(wider) > max_total_len:
                break
            longest_in, longest_out = wider
            end += 1
        batch = end - first
        now += latency.step_s + max(latency.weights_s, latency.token_s * sum(prompts[first:end]))
        now += latency.decode_steps(longest_out - 1, batch, batch * (longest_in + 1))
        result.count_batch(longest_out, batch, True)
        for index in range(first, end):
            result.finish_s[index] = now
            result.sum_normalized_s += (now - arrivals[index]) / outputs[index]
        first = end
    return result
