"""experiments.py: what the simulator may know, what a run serves, and where its memory is."""

import ast
import gc
import math
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_sim import paper
from vllm_sim.evaluation.experiments import Run, execute, groups_for, latency_of, manager_for
from vllm_sim.evaluation.figures_rates import Fig14, Fig16, over
from vllm_sim.paper import FASTER_TRANSFORMER, ORCA_MAX, ORCA_ORACLE, SYSTEMS, VLLM
from vllm_sim.serving.scheduler import Scheduler
from vllm_sim.workload.data_sets import Lengths

ROOT = Path(__file__).resolve().parents[2]
COMPACT = Lengths({})
SHORT = Run(VLLM, "opt-13b", "Alpaca", 1.0, 10.0)

# --- what the simulator may know -----------------------------------------------------------------

SIMULATOR = [
    *(ROOT / f"{name}.py" for name in ("sequence", "allocators", "kv_cache_manager")),
    *(ROOT / "vllm_sim" / "serving").glob("*.py"),
    *(ROOT / "vllm_sim" / "workload").glob("*.py"),
    ROOT / "vllm_sim" / "evaluation" / "experiments.py",
]
# Of the paper: shapes of models and GPUs, the names of the systems, and the artifact's limits.
SHAPES_AND_LIMITS = (
    "BLOCK_SIZE DEPLOYMENTS Deployment FASTER_TRANSFORMER FT_BATCH_SIZE FT_MAX_TOTAL_LEN "
    "MAX_BATCHED_TOKENS MAX_MODEL_LEN MAX_SEQUENCES ORCA_MAX ORCA_ORACLE ORCA_POW2 "
    "SWAP_BYTES_PER_GPU SYSTEMS VLLM WATERMARK kv_blocks"
)


@pytest.mark.parametrize("path", SIMULATOR, ids=lambda path: path.stem)
def test_the_simulator_reads_no_published_value(path):
    read = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="ascii"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("vllm_sim.paper") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("vllm_sim.paper"):
            assert node.module == "vllm_sim.paper"
            read |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "paper":
            read.add(node.attr)
    assert read <= set(SHAPES_AND_LIMITS.split())


def test_outcomes_do_not_change_with_the_published_values(monkeypatch):
    run = Run(VLLM, "opt-13b", "ShareGPT", 2.0, 30.0)
    before = execute(run, COMPACT)
    for name in dir(paper):
        if name.startswith(("FIG", "TABLE1", "TEXT", "BLOG")):
            monkeypatch.setattr(paper, name, None)
    assert execute(run, COMPACT) == before


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_serves_all_requests(system):
    run = Run(system, "opt-13b", "ShareGPT", 1.0, 60.0)
    outcome = execute(run, COMPACT)
    arrivals = COMPACT.columns("ShareGPT", 1.0, 60.0, 0)[0]
    assert outcome.num_requests == len(arrivals) and outcome.normalized_latency > 0.02


@pytest.mark.parametrize("system", [system for system in SYSTEMS if system != FASTER_TRANSFORMER])
@pytest.mark.parametrize(("decoding", "width"), [("single", 1), ("parallel", 3), ("beam", 3)])
def test_runs_hold_all_invariants_when_checked(system, decoding, width):
    run = Run(system, "opt-13b", "Alpaca", 8.0, 4.0, decoding=decoding, width=width)
    checked, quick = execute(run, COMPACT, check=True), execute(run, COMPACT)
    assert math.isclose(checked.normalized_latency, quick.normalized_latency, rel_tol=1e-9)
    assert replace(checked, normalized_latency=0.0) == replace(quick, normalized_latency=0.0)


def test_only_vllm_holds_the_shared_prefix():
    ours = Run(VLLM, "llama-13b", "WMT16 5-shot", 1.0, 5.0)
    assert manager_for(ours).usage().tokens == 336
    columns = COMPACT.columns("WMT16 5-shot", 1.0, 5.0, 0)
    shared, stored = (groups_for(run, columns) for run in (ours, replace(ours, system=ORCA_ORACLE)))
    assert {group.own_prompt_len for group in shared} == set(columns[1])
    assert {group.own_prompt_len for group in stored} == {336 + p for p in columns[1]}


def test_memory_is_measured_in_the_window_alone():
    run = Run(ORCA_MAX, "opt-13b", "ShareGPT", 4.0, 60.0, window_s=(20.0, 60.0), memory=True)
    outcome = execute(run, COMPACT)
    assert abs(sum(outcome.shares.values()) - 1.0) < 1e-9
    assert outcome.mean_batch == 7.0, "full all the time, as seven reservations fit"


@pytest.mark.parametrize("collecting", [True, False])
def test_a_run_leaves_the_garbage_collector_as_it_was(collecting):
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        execute(SHORT, COMPACT)
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"system": "vllm 2"}, "unknown system or model"),
        ({"model": "gpt-2"}, "unknown system or model"),
        ({"rate": 0.0}, "positive"),
        ({"rate": -1.0}, "positive"),
        ({"seconds": 0.0}, "positive"),
        ({"width": 0}, "width"),
    ],
)
def test_runs_that_make_no_sense_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        replace(SHORT, **bad)


def test_a_beam_search_that_is_longer_than_any():
    beam = replace(SHORT, decoding="beam", width=2)
    with pytest.raises(ValueError, match="no beam search of 1000000 steps"):
        groups_for(beam, ([0.0], [5], [10**6]))


# --- rules on which rows rest --------------------------------------------------------------------


def rate_of(curve, latency=lambda run: None):
    done = {}
    while runs := curve.needed(done):
        done |= {run: execute(run, COMPACT, latency=latency(run)) for run in runs}
    return curve.rate_at(done)


@pytest.mark.slow
def test_without_prompts_that_hide_behind_the_weights_fig_16_is_missed():
    def adds(run):
        speed = latency_of(run)
        return replace(speed, step_s=speed.step_s + speed.weights_s, weights_s=0.0)

    panel, printed = Fig16().curves["1-shot"], paper.FIG16["1-shot"]
    for rule, held in ((latency_of, True), (adds, False)):
        rates = {system: rate_of(curve, rule) for system, curve in panel.items()}
        ratio = over("Fig. 16", "1-shot", ORCA_ORACLE, printed["ratio"], rates, 15.0)
        assert ratio.held is held


@pytest.mark.slow
def test_with_one_prompt_for_a_group_of_orcas_fig_14_is_missed(monkeypatch):
    def once(self, now_s=0.0, schedule=Scheduler.schedule):
        iteration = schedule(self, now_s)
        iteration.prompt_tokens = sum(group.own_prompt_len for group in iteration.prefills)
        return iteration

    panel, printed = Fig14().curves["parallel", 4], paper.FIG14_VLLM_OVER["parallel"][4]
    rates = {system: rate_of(panel[system]) for system in (VLLM, ORCA_ORACLE)}
    for held in (True, False):
        ratio = over("Fig. 14", "parallel 4", ORCA_ORACLE, printed[ORCA_ORACLE], rates, 10.0)
        assert ratio.held is held
        monkeypatch.setattr(Scheduler, "schedule", once)
        rates[ORCA_ORACLE] = rate_of(panel[ORCA_ORACLE])
