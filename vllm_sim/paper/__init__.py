# ruff: noqa: F401
"""Every number that the paper states, and the settings of the authors' artifact, as plain data.

    from vllm_sim import paper
    paper.FIG2["vLLM"]["tokens"]        # 96.3

curves.py has every point of Figs. 12, 14, 16 and 17, figures.py the other figures, text.py what
the text claims, settings.py what was run. Nothing outside this folder has a published number.

Every number carries a provenance mark, in its record or in the comment above its table: F-PDF
printed in the paper; F-VEC read from the vector figures; F-AE the authors' artifact (whose runs
may differ from those behind the paper); F-BLOG only in the launch blog; DERIVED.
"""

from vllm_sim.paper.curves import (
    FIG12_CURVES,
    FIG12_NEXT_RATES,
    FIG14_CURVES,
    FIG14_NEXT_RATES,
    FIG16_CURVES,
    FIG17_CURVES,
    FIG17_NEXT_RATES,
)
from vllm_sim.paper.figures import (
    BLOCK_SIZES,
    FASTER_TRANSFORMER,
    FIG1_FULL_AT,
    FIG1_MEMORY,
    FIG1_THROUGHPUT,
    FIG2,
    FIG2_DRAWN,
    FIG3,
    FIG6,
    FIG9,
    FIG11_ALPACA_PAIRS,
    FIG11_MEANS,
    FIG11_SHAREGPT_OVER_ALPACA,
    FIG11_SHAREGPT_PAIRS,
    FIG11_SPREAD,
    FIG12_RATES,
    FIG12_VLLM_OVER,
    FIG12_VLLM_OVER_AT_02,
    FIG13,
    FIG13_RATES,
    FIG13_VLLM_OVER,
    FIG14_RATES,
    FIG14_VLLM_OVER,
    FIG15,
    FIG15_SHAREGPT,
    FIG16,
    FIG17_RATES,
    FIG17_TEXT_RATIO,
    FIG17_VLLM_OVER,
    FIG18A,
    FIG18A_TEXT_OVERHEAD,
    FIG18B,
    FIG19A,
    FIG19A_RATIO,
    FIG19B,
    MARKS,
    ORCA_MAX,
    ORCA_ORACLE,
    ORCA_POW2,
    ORCAS,
    RATE_AT_LATENCY,
    SYSTEMS,
    VLLM,
    Published,
)
from vllm_sim.paper.settings import (
    ARTIFACT_RUNS,
    BLOCK_SIZE,
    FT_BATCH_SIZE,
    FT_MAX_TOTAL_LEN,
    GIB,
    GPU_MEMORY_UTILIZATION,
    MAX_BATCHED_TOKENS,
    MAX_MODEL_LEN,
    MAX_SEQUENCES,
    RUNS_ON,
    SWAP_BYTES_PER_GPU,
    TABLE1,
    TABLE1_DERIVED,
    TRACE_SECONDS,
    WATERMARK,
    WORKSPACE_BYTES,
)
from vllm_sim.paper.text import BLOG, DOES_NOT_ADD_UP, TEXT
