"""What was run and how: Table 1, which model runs on which GPUs, the artifact's settings.

Plain data; vllm_sim/models makes models, GPUs and memory plans of it. Every number carries a
provenance mark, in the comment above it (figures.MARKS).
"""

from vllm_sim.paper.figures import ORCA_MAX, ORCA_ORACLE, ORCA_POW2, VLLM

GIB = 1 << 30

# ---- Models, GPUs, memory ---------------------------------------------------------------------

# By model, the GPU and how many of them, F-PDF: Table 1's columns (Sec. 6.1), then Sec. 6.4's.
RUNS_ON = {
    "opt-13b": ("a100-40gb", 1),
    "opt-66b": ("a100-40gb", 4),
    "opt-175b": ("a100-80gb", 8),
    "llama-13b": ("a100-40gb", 1),
}

# Table 1, F-PDF. "GB" of KV cache are GiB, of parameters 10**9 bytes; slots in thousands.
TABLE1 = {
    "opt-13b": {"total_gb": 40, "parameters_gb": 26, "kv_cache_gb": 12, "kilo_slots": 15.7},
    "opt-66b": {"total_gb": 160, "parameters_gb": 132, "kv_cache_gb": 21, "kilo_slots": 9.7},
    "opt-175b": {"total_gb": 640, "parameters_gb": 346, "kv_cache_gb": 264, "kilo_slots": 60.1},
}
# The same by the artifact's formula and our GPU sizes, DERIVED; parameters over all GPUs, those
# that every GPU holds counted each time.
TABLE1_DERIVED = {
    "opt-13b": {"blocks": 983, "slots": 15_728, "kv_cache_gib": 12.00, "parameters_gb": 25.7},
    "opt-66b": {"blocks": 603, "slots": 9_648, "kv_cache_gib": 21.2, "parameters_gb": 131.6},
    "opt-175b": {"blocks": 3754, "slots": 60_064, "kv_cache_gib": 264.0, "parameters_gb": 349.8},
}

# ---- The artifact's settings, F-AE ------------------------------------------------------------

# Its memory plan and limits.
BLOCK_SIZE = 16  # also F-PDF, the default after Fig. 18b
MAX_MODEL_LEN = 2048  # also F-PDF
MAX_BATCHED_TOKENS = 2560  # per iteration
MAX_SEQUENCES = {VLLM: 2048, ORCA_MAX: 256, ORCA_POW2: 256, ORCA_ORACLE: 256}
WATERMARK = 0.01  # share of the blocks that vLLM's admission leaves free
GPU_MEMORY_UTILIZATION = 0.95
WORKSPACE_BYTES = GIB
SWAP_BYTES_PER_GPU = 20 * GIB

# FasterTransformer's maximum batch size; a batch also needs max input + max output <= 2040.
FT_BATCH_SIZE = {
    "ShareGPT": {"opt-13b": 5, "opt-66b": 2, "opt-175b": 24},
    "Alpaca": {"opt-13b": 14, "opt-66b": 8, "opt-175b": 80},
}
FT_MAX_TOTAL_LEN = 2040
TRACE_SECONDS = {"opt-13b": 3600, "opt-66b": 3600, "opt-175b": 900, "llama-13b": 3600}  # F-PDF
# Requests/s, trace length and averaging window in s; None where the artifact does not fix it.
ARTIFACT_RUNS = {
    "Fig. 2": {"rate": 4.0, "seconds": 900, "window": (300, 900)},
    "Fig. 12": {"rate": None, "seconds": 600, "window": None},
    "Fig. 13": {"rate": 1.5, "seconds": 900, "window": (600, None)},  # ShareGPT; the paper: 2.0
    "Fig. 15": {"rate": 20.0, "seconds": 900, "window": (300, 900)},
    "Fig. 16": {"rate": None, "seconds": 1200, "window": None},
    "Fig. 18b": {"rate": 30.1, "seconds": 600, "window": None},  # Alpaca
    "Fig. 19b": {"rate": 2.01, "seconds": 600, "window": None},
}
