"""Made-up traces for the tests of the commands that serve one."""

import numpy as np


def burst(count=60, gap=0.05, seed=0):
    """A plain CSV of requests in a burst."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(gap, count))
    tokens = rng.integers(1, 500, (count, 2))
    rows = [f"{at:.4f},{prompt},{output}" for at, (prompt, output) in zip(times, tokens)]
    return "\n".join(["time,input_len,output_len", *rows]) + "\n"
