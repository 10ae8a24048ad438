"""What the four scenarios share: the setting, and requests for a queue that never runs dry.

Reproduces: section 6.1's standing conditions (OPT-13B on one A100-40GB, ShareGPT lengths, block
size 16). run.py makes one from main.py's options.

    setting = Setting(paper.MODELS["opt-13b"], torch.device("cpu"), 1, 983, 16, seed=0)
    check_setting(setting)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import paged_attention
from paged_attention import PagedKVCache, check_device_memory
from vllm_sim import models, paper
from vllm_sim.reporting.tables import counted
from vllm_sim.serving.scheduler import Manager
from vllm_sim.serving.systems import new_manager
from vllm_sim.workload.length_tables import LengthTable
from vllm_sim.workload.requests import Request
from vllm_sim.workload.traces import Trace

WARMUP, ITERATIONS = 1000, 2000  # of a paged steady state
BASELINE_ITERATIONS = 10_000  # longer: with 7 to 13 requests at a time a mean moves slowly
SERIES_LENGTH = 2000  # iterations of a steady state that a picture shows
CPU_SHARE = 4  # swap space of scenario 4: a block for every so many in the GPU pool
LARGEST_GROUP = 6  # sequences of one request, in any steady state or mix


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured on what. One K/V pool of `num_layers` layers stands for the model's."""

    model: models.Model
    device: torch.device
    num_layers: int
    num_blocks: int
    block_size: int
    seed: int
    kernel: str = paged_attention.GATHER  # what moves and reads the blocks
    no_triton: str = ""  # why it is not paged_attention.TRITON, where one might expect it
    trace: Trace | None = None  # scenario 4's requests; None: drawn

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.device.type == "cuda" else torch.float32

    @property
    def device_name(self) -> str:
        """The GPU's own name, or cpu."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def max_len(self) -> int:
        """The longest request: what the policy `max` reserves."""
        return min(paper.MAX_MODEL_LEN, self.model.max_len)

    @property
    def line(self) -> str:
        """The line above each table."""
        return (
            f"{self.model.name}, {counted(self.num_blocks, 'block')} of {self.block_size} = "
            f"{counted(self.num_slots, 'slot')}, seed {self.seed}"
        )

    def describe(self) -> dict[str, object]:
        """For --json and the first lines of the log."""
        return {
            "model": self.model.name,
            "device": self.device_name,
            "kernel": f"{self.kernel} ({self.no_triton})" if self.no_triton else self.kernel,
            "layers": self.num_layers,
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "heads": self.model.num_heads,
            "kv_heads": self.model.num_kv_heads,
            "head_size": self.model.head_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_len": self.max_len,
            "seed": self.seed,
            "torch": torch.__version__,
            **({"trace": self.trace.name} if self.trace is not None else {}),
        }

    def pool_bytes(self) -> int:
        """Bytes of one device pool: what `new_cache` allocates."""
        m = self.model
        per_token = self.num_layers * 2 * m.num_kv_heads * m.head_size * self.dtype.itemsize
        return per_token * self.num_slots

    @property
    def gathered_slots(self) -> int:
        """Slots, padding included, that one batch of attention gathers at most."""
        return min(self.num_slots, 65_536 if self.device.type == "cuda" else 2_048)

    def working_bytes(self) -> int:
        """Bytes beside the pool: a batch gathered twice (paged and contiguous), and upcast."""
        per_slot = 2 * self.model.num_kv_heads * self.model.head_size
        return self.gathered_slots * per_slot * (2 * self.dtype.itemsize + 8)

    def new_cache(self, num_cpu_blocks: int = 0, poison: bool = True) -> PagedKVCache:
        """A pool of the setting's size on its device; freed blocks are poisoned with NaN."""
        m = self.model
        shape = self.num_blocks, self.block_size, m.num_kv_heads, m.head_size
        return PagedKVCache(
            *shape,
            num_layers=self.num_layers,
            num_cpu_blocks=num_cpu_blocks,
            dtype=self.dtype,
            device=self.device,
            poison=poison,
            fused=self.kernel == paged_attention.TRITON,
        )

    def new_manager(self, policy: str, **options) -> Manager:
        """An empty pool of the setting's size (see serving.systems.new_manager)."""
        options.setdefault("max_len", self.max_len)
        return new_manager(policy, self.num_blocks, self.block_size, **options)


def check_setting(setting: Setting) -> None:
    """ValueError, one line, unless the pool holds a request of the maximum length.

    Under any policy: a contiguous chunk of a power of two blocks, and paged, with a block to
    grow into above the watermark. The same for the largest group, with a block for each of its
    sequences. DeviceMemoryError unless the tensors fit.
    """
    blocks = -(-setting.max_len // setting.block_size)
    need = 1 << (blocks - 1).bit_length()
    paged = max(blocks + 1, 2 * LARGEST_GROUP)
    while need < paged + int(paper.WATERMARK * need):
        need += 1
    if setting.num_blocks < need:
        raise ValueError(
            f"{counted(setting.num_blocks, 'block')} of {setting.block_size} "
            f"{'is' if setting.num_blocks == 1 else 'are'} too few for one request "
            f"of {setting.max_len:,} tokens or {LARGEST_GROUP} sequences: raise --num-blocks to "
            f"{need:,} or more"
        )
    swap_bytes = setting.pool_bytes() // CPU_SHARE
    on_cpu = setting.device.type == "cpu"
    needed = setting.pool_bytes() + setting.working_bytes() + (swap_bytes if on_cpu else 0)
    check_device_memory(needed, setting.device)
    check_device_memory(swap_bytes, "cpu")


def num_queued(setting: Setting) -> int:
    """Requests enough for a saturated queue in the setting's pool, whatever the policy."""
    return max(2000, setting.num_slots // 8)


def sample_requests(
    table: LengthTable, count: int, setting: Setting, num_samples: int = 1
) -> list[Request]:
    """Requests with sampled lengths, all there from the start, cut to what the pool can hold."""
    rng = np.random.default_rng([setting.seed, 6])
    prompts, outputs = table.sample(count, rng)
    spare = int(paper.WATERMARK * setting.num_blocks) + num_samples
    each = (setting.num_blocks - spare) // num_samples * setting.block_size
    longest = min(setting.max_len, each)
    requests = []
    for i, (prompt, output) in enumerate(zip(prompts.tolist(), outputs.tolist())):
        prompt = min(prompt, longest - 1)
        output = min(output, longest - prompt)
        requests.append(Request(i, 0.0, prompt, output, num_samples=num_samples))
    return requests
