"""What the loop over items carries, before and after Triton's passes for an H100: one line each.

Run alone, without the interpreter; needs triton and no GPU. Triton 3.6 and 3.7 once dropped a
number that this loop carried, and used its first value: on a GPU alone, and silently.
"""

import os
import re
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paged_attention_triton import _attend

SIZES = {"H_KV": 8, "G": 4, "HG": 4, "QT": 1, "ROWS": 16, "D": 64, "D_V": 64, "D_PAD": 64}
SIZES |= {"D_REST": 0, "S": 16, "CAP": False, "SAME": True, "STAGES": 2}
KINDS = {"q_ptr": "*fp16", "k_ptr": "*fp16", "v_ptr": "*fp16", "out_ptr": "*fp16"}
KINDS |= dict.fromkeys(("lse_ptr", "part_out_ptr", "part_lse_ptr"), "*fp32")
KINDS |= dict.fromkeys(("scale", "v_scale", "soft_cap"), "fp32")


def carried(planned, one_each, window, tile=32):
    """The names in TTIR, and those in TTGIR."""
    constants = SIZES | {"PLANNED": planned, "ONE_EACH": one_each, "WINDOW": window, "TILE": tile}
    constants |= {} if one_each else {"QT": 4}
    signature = {}
    for name in _attend.arg_names:
        other = "*i32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else KINDS.get(name, other)
    places = {(_attend.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(_attend, signature, constexprs=places)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    found = []
    for stage in ("ttir", "ttgir"):
        (loop,) = [x for x in built.asm[stage].split("\n") if "scf.for" in x and "num_parts" in x]
        found.append(sorted(re.findall(r"%([a-z_]+?)(?:_\d+)? = %", loop.split("iter_args")[1])))
    return found


if __name__ == "__main__":
    one_block = (True, True, False, 16), (True, False, True, 16)
    for case in ((True, True, False), (True, False, True), (False, True, False), *one_block):
        before, after = carried(*case)
        print(*before, "|", *after)
