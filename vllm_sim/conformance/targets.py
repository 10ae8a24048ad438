"""The engines that can be searched, by name.

Reproduces nothing. An engine of others is imported when a search starts, from the folder that the
user names or from where Python finds it, and nothing of it is kept here.
"""

from __future__ import annotations

from vllm_sim.conformance.adapters.buddy import Buddy
from vllm_sim.conformance.adapters.contiguous import ContiguousManager
from vllm_sim.conformance.adapters.mini_sglang import MiniSglang
from vllm_sim.conformance.adapters.nano_vllm import NanoVllm
from vllm_sim.conformance.adapters.our_scheduler import OurScheduler
from vllm_sim.conformance.adapters.paged_manager import PagedManager
from vllm_sim.conformance.adapters.tokasaurus import Tokasaurus
from vllm_sim.conformance.adapters.transformers_paged import TransformersPaged
from vllm_sim.conformance.adapters.vllm_v1 import VllmV1

TARGETS = {
    "ours": OurScheduler,
    "ours-manager": PagedManager,
    "ours-contiguous": ContiguousManager,
    "ours-buddy": Buddy,
    "transformers": TransformersPaged,
    "nano-vllm": NanoVllm,
    "mini-sglang": MiniSglang,
    "tokasaurus": Tokasaurus,
    "vllm": VllmV1,
}
