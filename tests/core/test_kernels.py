"""kernels.py: the right kernel by default, a clear refusal by name, the same scenario with both."""

import sys

import pytest
import torch

import paged_attention
import paged_attention as kernels
from paged_attention import GATHER, TRITON, KernelError, attention_kernel, choose_kernel
from vllm_sim.paper import MODELS
from vllm_sim.scenarios import paged as scenario_paged
from vllm_sim.scenarios.setting import Setting

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def problem(monkeypatch):
    """What is wrong with Triton: None, or a text, whatever this machine has."""
    found = {"text": None}
    monkeypatch.setattr(kernels, "_problem", lambda device, group, size: found["text"])
    return found


def test_auto_takes_triton_on_a_gpu_where_it_runs(problem):
    assert choose_kernel("auto", CUDA, 8, 2, 64) == (TRITON, "")
    assert choose_kernel("auto", CPU, 8, 2, 64) == (GATHER, "triton needs a GPU")
    problem["text"] = "no compiler"
    assert choose_kernel("auto", CUDA, 8, 2, 64) == (GATHER, "no compiler")


def test_the_first_line_of_a_run_says_why(problem):
    setting = Setting(MODELS["opt-125m"], CPU, 1, 160, 16, 0, *choose_kernel("auto", CPU, 8, 2, 64))
    assert setting.describe()["kernel"] == "gather (triton needs a GPU)"
    setting = Setting(MODELS["opt-125m"], CPU, 1, 160, 16, 0, *choose_kernel(GATHER, CPU, 8, 2, 64))
    assert setting.describe()["kernel"] == "gather"


def test_a_kernel_by_name_is_taken_or_refused(problem):
    assert choose_kernel(GATHER, CUDA, 8, 2, 64) == (GATHER, "")
    assert choose_kernel(TRITON, CUDA, 8, 2, 64) == (TRITON, "")
    problem["text"] = "no compiler"
    with pytest.raises(KernelError, match="no compiler; use --kernel gather"):
        choose_kernel(TRITON, CUDA, 8, 2, 64)


def test_what_the_kernel_cannot_do_is_named():
    pytest.importorskip("triton", exc_type=ImportError)
    for heads, size in ((17, 64), (1, 257)):
        with pytest.raises(KernelError, match="16 and 256 at most"):
            choose_kernel(TRITON, CPU, heads, 1, size)


def test_without_triton_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "block_kernels", None)
    with pytest.raises(KernelError, match="--kernel triton: import of block_kernels halted"):
        choose_kernel(TRITON, CPU, 4, 4, 64)


def test_a_kernel_that_cannot_be_launched_at_this_size_is_found_before_the_run(monkeypatch):
    module = pytest.importorskip("paged_attention_triton", exc_type=ImportError)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_kernel(TRITON, device, 8, 2, 64) == (TRITON, "")

    def too_much(device, group, head_size):
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(module, "try_launch", too_much)
    with pytest.raises(KernelError, match="out of resource: shared memory; use"):
        choose_kernel(TRITON, device, 8, 2, 64)


def test_each_name_has_its_kernel():
    assert attention_kernel(GATHER) is paged_attention.paged_attention_kernel
    module = pytest.importorskip("paged_attention_triton", exc_type=ImportError)
    assert attention_kernel(TRITON) is module.paged_attention_kernel


def test_scenario_2_holds_with_either_kernel():
    """Through the interpreter where there is no GPU: a small pool, in which few requests fit."""
    pytest.importorskip("paged_attention_triton", exc_type=ImportError)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reports = {}
    for kernel in (GATHER, TRITON):
        setting = Setting(MODELS["opt-125m"], device, 1, 160, 16, 0, kernel)
        reports[kernel] = scenario_paged.run(setting)
    for kernel, report in reports.items():
        assert report.checks and all(check.ok for check in report.checks), report.checks
        told = [part for part in report.parts if isinstance(part, str) and "Kernel " in part]
        assert len(told) == 1 and told[0].startswith(f"Kernel {kernel}")
    names = [[check.name for check in report.checks] for report in reports.values()]
    assert names[0] == names[1]
