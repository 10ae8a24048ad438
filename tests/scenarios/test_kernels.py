"""The kernel that a run takes, as its first line tells it, and scenario 2 with either kernel."""

import pytest
import torch

from paged_attention import GATHER, TRITON, choose_kernel
from vllm_sim.models import MODELS
from vllm_sim.scenarios import paged as scenario_paged
from vllm_sim.scenarios.setting import Setting

CPU = torch.device("cpu")


def test_the_first_line_of_a_run_says_why():
    setting = Setting(MODELS["opt-125m"], CPU, 1, 160, 16, 0, *choose_kernel("auto", CPU, 8, 2, 64))
    assert setting.describe()["kernel"] == "gather (triton needs a GPU)"
    setting = Setting(MODELS["opt-125m"], CPU, 1, 160, 16, 0, *choose_kernel(GATHER, CPU, 8, 2, 64))
    assert setting.describe()["kernel"] == "gather"


def test_scenario_2_holds_with_either_kernel():
    """Through the interpreter where there is no GPU: a small pool, in which few requests fit."""
    pytest.importorskip("paged_attention_triton", exc_type=ImportError)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reports = {}
    for kernel in (GATHER, TRITON):
        setting = Setting(MODELS["opt-125m"], device, 1, 160, 16, 0, kernel)
        reports[kernel] = scenario_paged.report(scenario_paged.run(setting))
    for kernel, report in reports.items():
        assert report.checks and all(check.ok for check in report.checks), report.checks
        told = [part for part in report.parts if isinstance(part, str) and "Kernel " in part]
        assert len(told) == 1 and told[0].startswith(f"Kernel {kernel}")
    names = [[check.name for check in report.checks] for report in reports.values()]
    assert names[0] == names[1]
