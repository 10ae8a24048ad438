"""The numbers in the paper's figures.

`FIG2`, `FIG12_RATES`, ... are plain dicts in the order of the paper; the comment above each says
unit, setting and mark. Systems have the paper's names; data sets are 'ShareGPT', 'Alpaca', 'WMT16';
models have the names of settings.RUNS_ON.

Ratios are printed beside rates only where they were read or published with them; they are not
needed to use the rates, and the tests check that the two agree.
"""

from dataclasses import dataclass
from typing import Any

MARKS = {
    "F-PDF": "printed in the paper",
    "F-VEC": "read from the paper's vector figures",
    "F-AE": "read in the authors' artifact repository, sosp-ae-39/sosp-ae-astra",
    "F-BLOG": "only in the vLLM launch blog of 2023-06-20, not in the paper",
    "DERIVED": "computed by us from the others",
}


@dataclass(frozen=True)
class Published:
    """One number (or table) together with where it stands and what it holds for."""

    value: Any
    unit: str
    figure: str  # 'Fig. 2', 'Table 1', 'Sec. 6.2', ...
    setting: str
    mark: str  # one of MARKS, or several joined by ' + '

    def __post_init__(self) -> None:
        if unknown := set(self.mark.split(" + ")) - set(MARKS):
            raise ValueError(f"unknown provenance mark {sorted(unknown)}, not in {sorted(MARKS)}")
        if not self.figure:
            raise ValueError("a published number needs the figure or section it stands in")


VLLM = "vLLM"
ORCA_MAX = "Orca (Max)"
ORCA_POW2 = "Orca (Pow2)"
ORCA_ORACLE = "Orca (Oracle)"
FASTER_TRANSFORMER = "FasterTransformer"
ORCAS = (ORCA_MAX, ORCA_POW2, ORCA_ORACLE)
SYSTEMS = (FASTER_TRANSFORMER, *ORCAS, VLLM)
BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # the x axis of Fig. 18b, 19a and 19b


def _by_system(systems: tuple[str, ...], *values: float) -> dict[str, float]:
    return dict(zip(systems, values, strict=True))


def _by_block_size(*values: float) -> dict[int, float]:
    return dict(zip(BLOCK_SIZES, values, strict=True))


def _spread(*values: int | None) -> dict[str, int]:
    names = ("min", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "max", "sd")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


# Fig. 1. OPT-13B on one A100-40GB. Left: GB and shares, F-PDF (the text says "close to 30%" where
# the figure says ">30%"). Right: F-VEC; GB used at that many batched requests, and tokens/s.
FIG1_MEMORY = {"parameters_gb": 26, "parameters_percent": 65, "kv_cache_percent_over": 30}
# Both curves start at the parameters' 26 GB and end at 39 GB.
FIG1_FULL_AT = {"gb": 39, "existing_systems_requests": 8, VLLM + "_requests": 38.4}
FIG1_THROUGHPUT = dict(  # batch size -> tokens/s
    zip(range(4, 41, 4), (147, 267, 379, 483, 577, 660, 741, 811, 882, 922), strict=True)
)

# Fig. 2. % of all KV-cache slots, average; printed labels F-PDF, the drawn lengths F-VEC.
# The label-less parts of the vLLM bar are the drawn ones; Oracle's internal part has no label
# because it is zero. 'external' is the paper's "external fragmentation & others": in our words
# rounding + padding + free. For vLLM the artifact sets reservation and internal to half of
# the unallocated share each, so those 2 x 1.04 are free blocks, and 1.65 is padding.
FIG2 = {
    ORCA_MAX: {"tokens": 20.4, "reserved": 13.3, "internal": 57.3, "external": 8.9},
    ORCA_POW2: {"tokens": 26.8, "reserved": 17.9, "internal": 13.6, "external": 41.6},
    ORCA_ORACLE: {"tokens": 38.2, "reserved": 25.2, "internal": 0.0, "external": 36.6},
    VLLM: {"tokens": 96.3, "reserved": 1.04, "internal": 1.04, "external": 1.65},
}
FIG2_DRAWN = {
    ORCA_MAX: {"tokens": 20.41, "reserved": 13.35, "internal": 57.30, "external": 8.94},
    ORCA_POW2: {"tokens": 26.85, "reserved": 17.88, "internal": 13.65, "external": 41.62},
    ORCA_ORACLE: {"tokens": 38.20, "reserved": 25.24, "internal": 0.0, "external": 36.56},
    VLLM: {"tokens": 96.26, "reserved": 1.04, "internal": 1.04, "external": 1.65},
}

# Fig. 3: slots of two requests under contiguous allocation, as drawn from left to right. F-PDF.
FIG3 = {
    "A": {"max_len": 2048, "prompt": 7, "current": 1, "reserved": 2, "never_used": 2038},
    "B": {"max_len": 512, "prompt": 3, "current": 1, "reserved": 1, "never_used": 507},
}

# Fig. 6: (physical block, filled slots) for logical blocks 0, 1, ... after prefill of a 7-token
# prompt and after each of two decode steps. F-PDF.
FIG6 = {
    "block_size": 4,
    "prompt": 7,
    "tables": (((7, 4), (1, 3)), ((7, 4), (1, 4)), ((7, 4), (1, 4), (3, 1))),
}

# Fig. 9: physical blocks freed and allocated when four beam candidates take a step. F-PDF.
FIG9 = {"beam_width": 4, "freed": (2, 4, 5, 8), "allocated": (9, 10, 11, 12)}

# Fig. 11. Tokens per request with the OPT tokenizer. Means F-PDF (the figure's legend).
FIG11_MEANS = {
    "ShareGPT": {"input": 161.31, "output": 337.99},
    "Alpaca": {"input": 19.31, "output": 58.45},
}
# Mean lengths, ShareGPT over Alpaca. F-PDF.
FIG11_SHAREGPT_OVER_ALPACA = {"input": 8.4, "output": 5.8}
# The released pairs, counted. F-AE (the file and its filter) and DERIVED (the counts): keeping
# input + output <= 2048 gives Fig. 11's means; the artifact's code keeps < 2048.
FIG11_SHAREGPT_PAIRS = {
    "released": 84_226,
    "kept_at_most_2048": {"pairs": 79_731, "input": 161.310, "output": 337.988},
    "kept_below_2048": {"pairs": 79_725, "input": 161.18, "output": 338.00},
}
# All records counted with the OPT tokenizer, DERIVED; the means are the published ones.
FIG11_ALPACA_PAIRS = {"pairs": 52_002, "input": 19.312, "output": 58.452}
# Percentiles (p), standard deviation (sd), tokens. ShareGPT: DERIVED from the 79,725 pairs.
# Alpaca: F-VEC from bars 3.92 (input) and 11.48 (output) tokens wide, so no finer than those.
FIG11_SPREAD = {
    "ShareGPT": {
        "input": _spread(None, 9, 15, 35, 133, 506, 863, 1460, 2028, 299),
        "output": _spread(None, 45, 128, 271, 458, 754, 899, 1280, 2009, 284),
        "sum": {"mean": 499, "p50": 369, "p90": 1118, "p99": 1874},
    },
    "Alpaca": {
        "input": _spread(6, 11, None, 16, 22, 31, 40, 74, 508, 13),
        "output": _spread(1, 6, 15, 43, 87, 125, 159, 270, 1470, 59),
    },
}

# Fig. 12. Requests/s at which the mean normalized latency reaches 0.5 s/token, straight lines
# between the drawn points. Basic sampling, Poisson arrivals, 1 h (OPT-175B: 15 min). F-VEC.
RATE_AT_LATENCY = 0.5  # s/token: our reading point for Fig. 12, 14, 16 and 17, not the paper's
FIG12_RATES = {
    "ShareGPT": {  # panels a, b, c
        "opt-13b": _by_system(SYSTEMS, 0.231, 0.525, 0.774, 1.099, 1.929),
        "opt-66b": _by_system(SYSTEMS, 0.100, 0.203, 0.269, 0.403, 0.939),
        "opt-175b": _by_system(SYSTEMS, 0.115, 0.918, 1.277, 1.622, 2.377),
    },
    "Alpaca": {  # panels d, e, f
        "opt-13b": _by_system(SYSTEMS, 2.53, 3.85, 16.11, 21.08, 28.06),
        "opt-66b": _by_system(SYSTEMS, 1.26, 1.25, 6.29, 10.50, 18.72),
        "opt-175b": _by_system(SYSTEMS, 0.87, 5.11, 17.11, 19.17, 20.17),
    },
}
# Fig. 12. Rate of vLLM over the rate of each other system, at 0.5 s/token. F-VEC.
_OTHERS = (ORCA_ORACLE, ORCA_POW2, ORCA_MAX, FASTER_TRANSFORMER)
FIG12_VLLM_OVER = {
    "ShareGPT": {
        "opt-13b": _by_system(_OTHERS, 1.75, 2.49, 3.68, 8.4),
        "opt-66b": _by_system(_OTHERS, 2.33, 3.50, 4.63, 9.4),
        "opt-175b": _by_system(_OTHERS, 1.47, 1.86, 2.59, 20.7),
    },
    "Alpaca": {
        "opt-13b": _by_system(_OTHERS, 1.33, 1.74, 7.28, 11.1),
        "opt-66b": _by_system(_OTHERS, 1.78, 2.97, 15.0, 14.8),
        "opt-175b": _by_system(_OTHERS, 1.05, 1.18, 3.95, 23.1),
    },
}
# Fig. 12. The same at 0.2 s/token, over Oracle and Max only. F-VEC.
FIG12_VLLM_OVER_AT_02 = {
    "ShareGPT": {
        "opt-13b": {ORCA_ORACLE: 1.86, ORCA_MAX: 3.68},
        "opt-66b": {ORCA_ORACLE: 2.72, ORCA_MAX: 5.36},
        "opt-175b": {ORCA_ORACLE: 1.66, ORCA_MAX: 2.72},
    },
    "Alpaca": {
        "opt-13b": {ORCA_ORACLE: 1.33, ORCA_MAX: 8.5},
        "opt-66b": {ORCA_ORACLE: 1.83, ORCA_MAX: 17.6},
        "opt-175b": {ORCA_ORACLE: 1.01, ORCA_MAX: 3.8},
    },
}

# Fig. 13. Mean number of batched requests, OPT-13B, basic sampling. Printed labels, F-PDF.
FIG13_RATES = {"ShareGPT": 2.0, "Alpaca": 30.0}  # requests/s
FIG13 = {
    "ShareGPT": _by_system((*ORCAS, VLLM), 7.00, 9.81, 13.62, 30.42),
    "Alpaca": _by_system((*ORCAS, VLLM), 7.00, 43.24, 72.75, 132.44),
}
# ShareGPT ratios F-PDF (text), Alpaca DERIVED.
FIG13_VLLM_OVER = {
    "ShareGPT": {ORCA_ORACLE: 2.2, ORCA_MAX: 4.3},
    "Alpaca": {ORCA_ORACLE: 1.82, ORCA_MAX: 18.9},
}

# Fig. 14. Requests/s at 0.5 s/token, OPT-13B, Alpaca, by number of output sequences or beam
# width. F-VEC.
FIG14_RATES = {
    "parallel": {
        2: _by_system((*ORCAS, VLLM), 1.52, 9.03, 12.66, 18.11),
        4: _by_system((*ORCAS, VLLM), 0.51, 4.70, 7.01, 10.33),
        6: _by_system((*ORCAS, VLLM), 0.50, 3.03, 4.63, 7.11),
    },
    "beam": {
        2: _by_system((*ORCAS, VLLM), 1.27, 7.02, 9.40, 17.01),
        4: _by_system((*ORCAS, VLLM), 0.36, 3.25, 5.01, 9.59),
        6: _by_system((*ORCAS, VLLM), 0.29, 1.91, 3.16, 7.02),
    },
}
_ORCAS_BACK = (ORCA_ORACLE, ORCA_POW2, ORCA_MAX)
FIG14_VLLM_OVER = {
    "parallel": {
        2: _by_system(_ORCAS_BACK, 1.43, 2.01, 11.9),
        4: _by_system(_ORCAS_BACK, 1.47, 2.20, 20.4),
        6: _by_system(_ORCAS_BACK, 1.54, 2.34, 14.1),
    },
    "beam": {
        2: _by_system(_ORCAS_BACK, 1.81, 2.42, 13.3),
        4: _by_system(_ORCAS_BACK, 1.92, 2.95, 26.5),
        6: _by_system(_ORCAS_BACK, 2.22, 3.68, 24.0),
    },
}

# Fig. 15. % of blocks saved by sharing, OPT-13B, Alpaca. Printed labels, F-PDF.
FIG15 = {"parallel": {2: 6.09, 4: 8.53, 6: 9.79}, "beam": {2: 37.56, 4: 53.13, 6: 55.16}}
# The same on ShareGPT: only the range over 2 to 6, only in the text, F-PDF.
FIG15_SHAREGPT = {"parallel": (16.2, 30.5), "beam": (44.3, 66.3)}

# Fig. 16. LLaMA-13B, WMT16 English to German, requests share a prefix. Prefix lengths (tokens)
# and text ratios F-PDF; rates (requests/s at 0.5 s/token) and their ratios F-VEC. The artifact
# shares whole blocks only, so 336 of the 341 tokens (F-AE).
FIG16 = {
    "1-shot": {"prefix": 80, "text_ratio": 1.67, ORCA_ORACLE: 30.12, VLLM: 50.90, "ratio": 1.69},
    "5-shot": {"prefix": 341, "text_ratio": 3.58, ORCA_ORACLE: 12.05, VLLM: 42.67, "ratio": 3.54},
}

# Fig. 17. Chatbot, OPT-13B, ShareGPT, requests/s at 0.5 s/token. F-VEC. The prompt is the last
# 1024 tokens of history and query, at most 1024 are generated (F-PDF).
FIG17_RATES = _by_system((*ORCAS, VLLM), 0.552, 0.566, 0.572, 0.853)
FIG17_VLLM_OVER = (1.49, 1.54)  # lowest and highest over the three Orcas, F-VEC
FIG17_TEXT_RATIO = 2.0  # F-PDF; the curves do not show it, see DOES_NOT_ADD_UP

# Fig. 18a. Attention kernel, us: (batch size, context) -> vLLM, FasterTransformer, overhead %.
# F-VEC. The model shape, block size and layer count are not stated.
FIG18A = {
    (8, 64): {VLLM: 31.5, FASTER_TRANSFORMER: 21.9, "overhead": 44},
    (8, 128): {VLLM: 43.6, FASTER_TRANSFORMER: 34.9, "overhead": 25},
    (8, 256): {VLLM: 84.3, FASTER_TRANSFORMER: 62.3, "overhead": 35},
    (32, 64): {VLLM: 77.1, FASTER_TRANSFORMER: 61.4, "overhead": 25.6},
    (32, 128): {VLLM: 127.1, FASTER_TRANSFORMER: 106.7, "overhead": 19.0},
    (32, 256): {VLLM: 235.3, FASTER_TRANSFORMER: 194.5, "overhead": 21.0},
}
FIG18A_TEXT_OVERHEAD = (20, 26)  # %, F-PDF

# Fig. 18b. Normalized latency (s/token) by block size, basic sampling at one fixed rate. F-VEC.
FIG18B = {
    "ShareGPT": _by_block_size(2.301, 1.945, 1.976, 0.568, 0.085, 0.069, 0.086, 0.159, 1.356),
    "Alpaca": _by_block_size(3.624, 1.897, 2.117, 0.725, 0.594, 0.532, 1.897, 4.804, 18.246),
}

# Fig. 19a. ms by block size: 256 tokens of OPT-13B's KV cache recomputed or swapped. F-VEC.
# The artifact's plot multiplies the recompute times by 0.9 (F-AE); these are the drawn ones.
FIG19A_RECOMPUTE_FACTOR = 0.9
FIG19A = {
    "recompute": _by_block_size(36.3, 37.5, 36.9, 38.8, 38.6, 39.0, 38.3, 38.4, 39.1),
    "swap in": _by_block_size(82.0, 53.6, 35.1, 26.0, 21.6, 19.3, 18.2, 17.6, 17.3),
    "swap out": _by_block_size(55.5, 35.6, 25.9, 21.1, 18.5, 17.3, 16.7, 16.3, 16.1),
    "swap in + out": _by_block_size(137.4, 89.3, 61.0, 47.1, 40.1, 36.6, 34.9, 33.9, 33.4),
}
# recompute / (swap in + out)
FIG19A_RATIO = _by_block_size(0.26, 0.42, 0.61, 0.82, 0.96, 1.07, 1.10, 1.13, 1.17)

# Fig. 19b. Normalized latency (s/token) by block size, OPT-13B, ShareGPT, same rate. F-VEC.
FIG19B = {
    "recompute": _by_block_size(2.011, 1.638, 1.616, 0.510, 0.073, 0.063, 0.067, 0.169, 1.119),
    "swap": _by_block_size(2.564, 1.966, 1.791, 0.552, 0.072, 0.059, 0.064, 0.119, 0.663),
}
