"""What can be searched: engines by name, and any adapter by its file and class.

Reproduces nothing. An engine of others is imported when a search starts, from the folder that the
user names or from where Python finds it, and nothing of it is kept here.

    find("vllm"), find("mine.py:MyAdapter")
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

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
NEEDED = ("worlds", "required", "start", "operations", "apply", "tables", "free", "key")


def find(name: str) -> type:
    """The adapter of this name, or the class of `FILE.py:CLASS`. ValueError says what it lacks."""
    if name.lower() in TARGETS:
        return TARGETS[name.lower()]
    file, colon, wanted = name.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ValueError(f"one of {', '.join(TARGETS)}, or FILE.py:CLASS, not {name!r}")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's: anything may come
        raise ValueError(f"{file}: {type(error).__name__}: {error}".partition("\n")[0]) from None
    target = getattr(module, wanted, None)
    lacking = [part for part in NEEDED if not hasattr(target, part)]
    if lacking or not target.worlds:
        told = f"has no {', '.join(lacking)}" if target and lacking else "is no class with worlds"
        raise ValueError(f"{wanted} of {file} {told}")
    return target
