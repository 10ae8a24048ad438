"""Everything the paper (arXiv:2309.06180v1, SOSP'23) states as a number, and its models and GPUs.

This module and `paper_figures` (re-exported here) are the only places of published numbers; all
other code imports them from here: `from paper import MODELS, DEPLOYMENTS, kv_blocks, FIG2`.

1. Models, GPUs, deployments; the memory formula (`memory_per_gpu`, `kv_blocks`); Table 1.
2. The limits and settings of the authors' artifact (`BLOCK_SIZE`, `ARTIFACT_RUNS`, ...).
3. Sec. 4.5's rules, claims in the text (`TEXT`), claims that are not in the paper (`BLOG`), and
   what contradicts itself (`DOES_NOT_ADD_UP`).
4. In `paper_figures`: `FIG1_MEMORY` to `FIG19B`, and `FIGURES` with their settings; in
   `paper_curves`: every point of the curves of Figs. 12, 14, 16 and 17.

Every number carries a provenance mark, in its record or in the comment above its table:
F-PDF printed in the paper; F-VEC read from the vector figures; F-AE the authors' artifact
(whose runs may differ from those behind the paper); F-BLOG only in the launch blog; DERIVED.
"""

from dataclasses import dataclass

from vllm_sim.paper.curves import *  # noqa: F403  (the points of the curves)
from vllm_sim.paper.figures import *  # noqa: F403  (paper_figures is the other half of this module)
from vllm_sim.paper.figures import ORCA_MAX, ORCA_ORACLE, ORCA_POW2, VLLM
from vllm_sim.paper.text import *  # noqa: F403  (what the text says)

GIB = 1 << 30

# ---- 1. Models, GPUs, memory ------------------------------------------------------------------


def _check_positive_ints(owner: str, **values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions of a decoder. `family` says what its layers are made of, for counting:

    'opt':   learned positions, biases, layer norms, two FFN matrices, tied embeddings;
    'llama': rotary positions, no biases, RMS norms, three FFN matrices, a separate output head.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    num_heads: int  # H
    num_kv_heads: int  # H_kv
    head_size: int  # D
    ffn_size: int
    vocab_size: int
    max_positions: int
    dtype_bytes: int = 2  # fp16

    def __post_init__(self) -> None:
        if self.family not in ("opt", "llama"):
            raise ValueError(f"{self.name}: family must be 'opt' or 'llama', got {self.family!r}")
        counts = {k: v for k, v in vars(self).items() if k not in ("name", "family")}
        _check_positive_ints(self.name, **counts)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.name}: {self.num_heads} query heads cannot share "
                f"{self.num_kv_heads} KV heads evenly"
            )
        if self.family == "opt" and self.num_heads * self.head_size != self.hidden_size:
            raise ValueError(
                f"{self.name}: {self.num_heads} heads of {self.head_size} do not "
                f"make a hidden size of {self.hidden_size}"
            )

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in all layers: the size of one slot."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.dtype_bytes

    @property
    def matrix_params(self) -> int:
        """Parameters in the matrices that tensor parallelism splits over the GPUs."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_size * self.hidden_size
        ffn_matrices, embeddings = (2, 1) if self.family == "opt" else (3, 2)
        return (
            self.num_layers * (attention + ffn_matrices * self.hidden_size * self.ffn_size)
            + embeddings * self.vocab_size * self.hidden_size
        )

    @property
    def replicated_params(self) -> int:
        """Parameters that every GPU holds: norms, and for OPT biases and positions."""
        if self.family == "llama":
            return (2 * self.num_layers + 1) * self.hidden_size
        qkvo_bias = 2 * (self.num_heads + self.num_kv_heads) * self.head_size
        norms = 4 * self.hidden_size
        # OPT's position table starts with two rows that no token uses.
        positions = (self.max_positions + 2) * self.hidden_size
        per_layer = norms + qkvo_bias + self.ffn_size + self.hidden_size
        return self.num_layers * per_layer + positions + 2 * self.hidden_size

    @property
    def num_params(self) -> int:
        return self.matrix_params + self.replicated_params

    @property
    def param_bytes(self) -> int:
        return self.num_params * self.dtype_bytes


def _opt(name: str, num_layers: int, hidden_size: int, num_heads: int) -> ModelConfig:
    return ModelConfig(
        name,
        "opt",
        num_layers,
        hidden_size,
        num_heads,
        num_heads,
        hidden_size // num_heads,
        4 * hidden_size,
        50_272,
        2048,
    )


MODELS = {
    model.name: model
    for model in (
        # The three below are not in the paper: real OPT models for users with less memory.
        _opt("opt-125m", 12, 768, 12),
        _opt("opt-1.3b", 24, 2048, 32),
        _opt("opt-6.7b", 32, 4096, 32),
        # The paper's (Sec. 6.1); LLaMA-13B appears in Sec. 6.4 only.
        _opt("opt-13b", 40, 5120, 40),
        _opt("opt-66b", 64, 9216, 72),
        _opt("opt-175b", 96, 12288, 96),
        ModelConfig("llama-13b", "llama", 40, 5120, 40, 40, 128, 13_824, 32_000, 2048),
    )
}


@dataclass(frozen=True)
class GPU:
    name: str
    memory_bytes: int

    def __post_init__(self) -> None:
        _check_positive_ints(self.name, memory_bytes=self.memory_bytes)


# What CUDA reports for these cards: 39.39 and 79.15 GiB. An assumption (DERIVED): the paper and
# the artifact give no byte count.
GPUS = {
    gpu.name: gpu for gpu in (GPU("a100-40gb", 42_298_834_944), GPU("a100-80gb", 84_987_740_160))
}


@dataclass(frozen=True)
class Deployment:
    """A model split over `num_gpus` equal GPUs by tensor parallelism."""

    model: ModelConfig
    gpu: GPU
    num_gpus: int

    def __post_init__(self) -> None:
        _check_positive_ints(self.model.name, num_gpus=self.num_gpus)
        if self.model.num_kv_heads % self.num_gpus:
            raise ValueError(
                f"{self.model.name}: {self.model.num_kv_heads} KV heads cannot be "
                f"split over {self.num_gpus} GPUs"
            )


DEPLOYMENTS = {  # by model; the first three are Table 1's columns, the last is Sec. 6.4's
    "opt-13b": Deployment(MODELS["opt-13b"], GPUS["a100-40gb"], 1),
    "opt-66b": Deployment(MODELS["opt-66b"], GPUS["a100-40gb"], 4),
    "opt-175b": Deployment(MODELS["opt-175b"], GPUS["a100-80gb"], 8),
    "llama-13b": Deployment(MODELS["llama-13b"], GPUS["a100-40gb"], 1),
}

# The artifact's memory plan and limits, F-AE except where said.
BLOCK_SIZE = 16  # also F-PDF, the default after Fig. 18b
MAX_MODEL_LEN = 2048  # also F-PDF
MAX_BATCHED_TOKENS = 2560  # per iteration
MAX_SEQUENCES = {VLLM: 2048, ORCA_MAX: 256, ORCA_POW2: 256, ORCA_ORACLE: 256}
WATERMARK = 0.01  # share of the blocks that vLLM's admission leaves free
GPU_MEMORY_UTILIZATION = 0.95
WORKSPACE_BYTES = GIB
SWAP_BYTES_PER_GPU = 20 * GIB


@dataclass(frozen=True)
class GpuMemory:
    """Where the bytes of each GPU go. The parts sum to the GPU's memory."""

    held_back: int
    parameters: int
    activations: int
    workspace: int
    kv_cache: int


def memory_per_gpu(
    deployment: Deployment,
    max_batched_tokens: int = MAX_BATCHED_TOKENS,
    utilization: float = GPU_MEMORY_UTILIZATION,
) -> GpuMemory:
    """The artifact's memory plan (its class `OPTMemoryAnalyzer`), in our own code. For LLaMA it
    follows a later version of the same file, so its block count (965) is less certain.

    Activations are estimated, not measured: the widest intermediate result plus the residual,
    each twice (input and output), or the logits of all batched tokens twice, whichever is more.
    Logits count whole on every GPU; the other results are split, the residual is not. Only with
    the logits does it give Table 1: without them 13B would have 16.0K slots, 66B 10.2K.
    ValueError if nothing is left for the KV cache.
    """
    _check_positive_ints(deployment.model.name, max_batched_tokens=max_batched_tokens)
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization must be in (0, 1], got {utilization!r}")
    model, gpus = deployment.model, deployment.num_gpus
    parameters = model.matrix_params // gpus + model.replicated_params
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_size
    ffn = model.ffn_size
    if model.family == "llama":
        ffn *= 2  # gate and up are computed together
        # That version keeps one rotary table per layer, of 8192 positions.
        parameters += model.num_layers * 8192 * model.head_size // gpus
    widest = max(qkv, ffn) // gpus + model.hidden_size
    activations = 2 * max_batched_tokens * max(widest, model.vocab_size)
    memory = deployment.gpu.memory_bytes
    usable = int(utilization * memory)
    parameter_bytes = parameters * model.dtype_bytes
    activation_bytes = activations * model.dtype_bytes
    kv_cache = usable - parameter_bytes - activation_bytes - WORKSPACE_BYTES
    if kv_cache <= 0:
        raise ValueError(
            f"{model.name} leaves no memory for a KV cache on {gpus} x "
            f"{deployment.gpu.name}: {-kv_cache / GIB:.1f} GiB per GPU are missing"
        )
    return GpuMemory(memory - usable, parameter_bytes, activation_bytes, WORKSPACE_BYTES, kv_cache)


def kv_blocks(
    deployment: Deployment,
    block_size: int = BLOCK_SIZE,
    max_batched_tokens: int = MAX_BATCHED_TOKENS,
    utilization: float = GPU_MEMORY_UTILIZATION,
) -> int:
    """Number of KV-cache blocks of a deployment; each GPU holds its heads' part of every block."""
    _check_positive_ints("kv_blocks", block_size=block_size)
    memory = memory_per_gpu(deployment, max_batched_tokens, utilization)
    return memory.kv_cache // (
        block_size * deployment.model.kv_bytes_per_token // deployment.num_gpus
    )


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

# ---- 2. The artifact's settings, F-AE ---------------------------------------------------------

# FasterTransformer's maximum batch size; a batch also needs max input + max output <= 2040.
FT_BATCH_SIZE = {
    "ShareGPT": {"opt-13b": 5, "opt-66b": 2, "opt-175b": 24},
    "Alpaca": {"opt-13b": 14, "opt-66b": 8, "opt-175b": 80},
}
FT_MAX_TOTAL_LEN = 2040
# Orca's buddy allocator works in blocks of BLOCK_SIZE slots, from 1 to 128 of them.
BUDDY_BLOCKS = (1, 128)
ARRIVAL_SLOT_SECONDS = 0.01  # one Poisson draw each, seed 0
SEED = 0
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
# Fig. 17: history is cut to its last 1024 tokens, outputs end at 1016 (the paper: 1024). The two
# scripts start a new conversation with different probabilities.
CHATBOT = {
    "prompt_tokens": 1024,
    "output_tokens": 1016,
    "new_conversation": {VLLM: 0.5, ORCA_MAX: 0.1, ORCA_POW2: 0.1, ORCA_ORACLE: 0.1},
}
SOFTWARE = {"torch": "2.0.0", "flash-attn": "0.2.8"}
# Preemption by default: recompute for groups of one sequence, swap for larger groups.
PREEMPTION = {"one sequence": "recompute", "several sequences": "swap"}
