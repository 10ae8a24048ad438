"""tools/fit_latency.py finds known constants again, and those of latency.py; reproduce.py marks the
points that it used.

The fits of the models to the whole of Fig. 12 take minutes: the tool's --check is that test.
"""

import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import fit_latency
import pytest
from fit_latency import Point

from vllm_sim import models, paper
from vllm_sim.evaluation.curves import fitted_points, left_end
from vllm_sim.evaluation.experiments import Outcome, Run, execute
from vllm_sim.evaluation.figures_rates import SHORT, Fig12, Fig14
from vllm_sim.paper import FASTER_TRANSFORMER, ORCA_ORACLE, ORCA_POW2, VLLM
from vllm_sim.serving import latency
from vllm_sim.serving.latency import FITTED, LatencyModel, Software
from vllm_sim.workload.data_sets import Lengths

ROOT = Path(__file__).resolve().parents[2]

TABLES = Lengths({})
OPTS = "opt-13b", "opt-66b", "opt-175b"


def test_left_end_stops_at_the_first_point_that_is_not_below():
    curve = ((1, 0.04), (2, 0.045), (3, 0.0499), (4, 0.05), (5, 0.041))
    assert left_end(curve) == ((1, 0.04), (2, 0.045), (3, 0.0499))
    assert left_end(curve[:1]) == ((1, 0.04),)
    assert left_end(((1, 0.06), (2, 0.05), (3, 0.08))) == ((1, 0.06), (2, 0.05))


def test_of_faster_transformer_one_point_and_none_on_alpaca():
    for dataset, model in paper.FIG12_CURVES:
        points = fitted_points(dataset, model, FASTER_TRANSFORMER)
        curve = paper.FIG12_CURVES[dataset, model][FASTER_TRANSFORMER]
        assert points == (curve[:1] if dataset == "ShareGPT" else ())
    with pytest.raises(KeyError):
        fitted_points("WMT16", "opt-13b", VLLM)


def test_the_rows_marked_as_fitted_are_the_points_of_the_fit(monkeypatch):
    """Fig. 12 with outcomes made by hand: which rows there are depends on the paper alone."""
    figure, done = Fig12(), {}
    while runs := figure.needed(done):
        for run in runs:
            share = run.rate / paper.FIG12_RATES[run.dataset][run.model][run.system]
            latency = 0.03 / (1.0 - 0.9 * share) if share < 1.1 else 5.0
            done[run] = Outcome(latency, 1, 1, 1.0)
    rows = figure.rows(done)
    marked = [(row.setting, row.metric, row.paper) for row in rows if row.fitted]
    used = []
    for model in OPTS:
        used += [at for at in fit_latency.points_of(model) if isinstance(at.source, Run)]
        asked = set()  # by the fit of FasterTransformer's constant
        monkeypatch.setattr(
            fit_latency,
            "log_ratios",
            lambda points, *_, asked=asked: [0.0 for at in points if asked.add(at) is None],
        )
        fit_latency.fit_static(model, TABLES)
        used += asked
    assert sorted(marked) == sorted(
        (
            f"{SHORT[at.source.model]} {at.source.dataset}, {at.source.system}",
            f"s/token at {at.source.rate:g} requests/s",
            at.paper,
        )
        for at in used
    )
    assert len(marked) == len(set(marked)) < len(rows) / 4


def test_points_are_those_of_the_model_and_only_13b_has_figs_1_and_19a():
    for model in FITTED:
        points = fit_latency.points_of(model)
        runs = [at.source for at in points if isinstance(at.source, Run)]
        assert {run.model for run in runs} == {model}
        others = [at.source for at in points if not isinstance(at.source, Run)]
        batches = list(paper.FIG1_THROUGHPUT) if model == "opt-13b" else []
        assert others == [*batches, model] if model.endswith("-13b") else others == []
    for model in OPTS:
        runs = [at.source for at in fit_latency.points_of(model) if isinstance(at.source, Run)]
        assert {run.system for run in runs} == {*paper.ORCAS, VLLM}
        seconds = paper.TRACE_SECONDS[model]
        assert {(run.dataset, run.seconds) for run in runs} == {
            ("ShareGPT", seconds),
            ("Alpaca", 600.0),
        }
        for run in runs:  # each curve's first point is always there
            first = paper.FIG12_CURVES[run.dataset, model][run.system][0]
            point = Point(replace(run, rate=float(first[0])), first[1])
            assert point in fit_latency.points_of(model)
    llama = {at.source.dataset for at in fit_latency.points_of("llama-13b")[:-1]}
    assert llama == {"WMT16 1-shot", "WMT16 5-shot"}


def test_tokens_a_second_and_a_lone_prompt_by_hand():
    software = Software(5e-3, 0.1e-3, 1.0, 1.0)
    opt = models.MODELS["opt-13b"]
    weights, tokens = 2 * opt.num_params / (0.8 * 1555e9), 40 * 15_700 / 38.4
    step = 5e-3 + weights + 40 * 0.1e-3 + tokens * 819_200 / (0.8 * 1555e9)
    assert fit_latency.ours(40, TABLES, software) == pytest.approx(40 / step, rel=1e-4)
    lone = 5e-3 + 256 * 2 * opt.num_params / (0.6 * 312e12) + 0.1e-3
    assert fit_latency.ours("opt-13b", TABLES, software) == pytest.approx(lone)
    at = next(at for at in fit_latency.points_of("opt-13b") if at.source == "opt-13b")
    assert at.paper == pytest.approx(38.4e-3 / 0.9)


@pytest.mark.parametrize(
    "run",
    [
        Run(VLLM, "opt-13b", "ShareGPT", 2.0, 60.0),
        Run(ORCA_POW2, "opt-175b", "Alpaca", 10.0, 20.0),
        Run(FASTER_TRANSFORMER, "opt-66b", "ShareGPT", 0.1, 300.0),
    ],
    ids=lambda run: run.system,
)
def test_a_run_is_simulated_as_in_the_experiments(run):
    outcome = execute(run, TABLES)
    assert fit_latency.ours(run, TABLES, FITTED[run.model]) == outcome.normalized_latency


@pytest.mark.parametrize("known", [(6.5e-3, 0.0, 0.1e-3), (8e-3, 7.75e-3, 0.155e-3)])
def test_the_constants_that_made_the_points_are_found(known):
    names = "step_s", "request_s", "seq_s"
    software = replace(fit_latency.START, **dict(zip(names, known)))
    runs = [
        Run(VLLM, "opt-13b", "ShareGPT", 1.0, 30.0),
        Run(ORCA_POW2, "opt-13b", "Alpaca", 4.0, 15.0),
        Run(VLLM, "opt-13b", "Alpaca", 8.0, 15.0),
    ]
    sources = (*runs, 4, 40, "opt-13b")
    points = [Point(source, fit_latency.ours(source, TABLES, software)) for source in sources]
    found = fit_latency.fit(points, TABLES, fit_latency.START, names)
    assert fit_latency.rms(fit_latency.log_ratios(points, TABLES, found)) < 0.004
    for name, at in zip(names, known):
        assert abs(getattr(found, name) - at) <= 2.01 * fit_latency.GRID[name], name


@pytest.mark.slow
def test_what_beams_cost_is_found_and_the_rest_kept():
    runs = [
        Run(system, "opt-13b", "Alpaca", 4.0, 60.0, decoding="beam", width=width)
        for system in (VLLM, ORCA_ORACLE)
        for width in (2, 4)
    ]
    known = replace(fit_latency.START, beam_s=0.1e-3, copy_call_s=2e-6)
    points = [Point(run, fit_latency.ours(run, TABLES, known)) for run in runs]
    found = fit_latency.fit(points, TABLES, fit_latency.START, ("beam_s", "copy_call_s"))
    assert fit_latency.rms(fit_latency.log_ratios(points, TABLES, found)) < 0.004
    assert replace(found, beam_s=0.0, copy_call_s=0.0) == fit_latency.START
    assert found.beam_s == pytest.approx(0.1e-3, abs=0.03e-3)
    assert found.copy_call_s == pytest.approx(2e-6, rel=0.2)


def off(points, software):
    """Errors of these constants, as shares, in order."""
    return sorted(map(math.expm1, fit_latency.log_ratios(points, TABLES, software)))


@pytest.mark.slow
def test_what_docs_say_of_points_that_other_constants_miss(monkeypatch):
    """docs/differences.md, 'What was fitted': LLaMA-13B's code is another, and in Fig. 14 (a-c),
    to which nothing is fitted, it is a request that costs and not each prompt of it."""
    llama = fit_latency.points_of("llama-13b")[:-1]
    own, other = (off(llama, FITTED[name]) for name in ("llama-13b", "opt-13b"))
    assert own[0] > -0.03 and own[-1] < 0.03 and other[0] > 0.08 and other[-1] < 0.22
    points = fit_latency.left_ends(Fig14(), "parallel", 600.0)
    orcas = [at for at in points if at.source.system in (ORCA_POW2, ORCA_ORACLE)]
    assert median(off(orcas, FITTED["opt-13b"])) < 0.13

    def each_prompt(self, it, iteration=LatencyModel.iteration):
        more = sum(len(group.seqs) - 1 for group in it.prefills) if it.num_decodes else 0
        return iteration(self, it) + self.request_s * more

    monkeypatch.setattr(LatencyModel, "iteration", each_prompt)
    assert median(off(orcas, FITTED["opt-13b"])) > 0.25


def test_static_step_is_found_again(monkeypatch):
    run = Run(FASTER_TRANSFORMER, "opt-66b", "ShareGPT", 0.05, 3600.0)
    at = fit_latency.ours(run, TABLES, Software(9.0, 9.0, 9.0, 7.35e-3))
    monkeypatch.setitem(
        paper.FIG12_CURVES, ("ShareGPT", "opt-66b"), {FASTER_TRANSFORMER: ((run.rate, at),)}
    )
    assert fit_latency.fit_static("opt-66b", TABLES) == 7.35e-3


def test_swap_fit_recovers_what_made_the_times():
    drawn = {size: 256 / size * (0.2 + 0.05 * size) for size in paper.BLOCK_SIZES}
    swap, errors = fit_latency.fit_swap(drawn)
    assert swap == latency.Swap(0.2e-3, 0.05e-3)
    assert max(map(abs, errors)) < 1e-9


@pytest.mark.parametrize("name, figure", [("SWAP_IN", "swap in"), ("SWAP_OUT", "swap out")])
def test_swap_constants_are_the_fit_of_fig_19a(name, figure):
    swap, errors = fit_latency.fit_swap(paper.FIG19A[figure])
    assert getattr(latency, name) == swap
    # No neighbour has a smaller squared relative error: the fit is what it says.
    for call_us, slot_us in ((1, 0), (-1, 0), (0, 0.1), (0, -0.1)):
        call_s, slot_s = swap.call_s + call_us * 1e-6, swap.slot_s + slot_us * 1e-6
        drawn = paper.FIG19A[figure].items()
        other = [256 / size * (call_s + slot_s * size) / (ms * 1e-3) - 1.0 for size, ms in drawn]
        assert fit_latency.rms(errors) <= fit_latency.rms(other)


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Exit code and output, with the long search replaced by its result."""

    def run(*arguments, found=FITTED["opt-13b"], lengths_dir=None):
        monkeypatch.delenv("LENGTHS_DIR", raising=False)
        if lengths_dir is not None:
            monkeypatch.setenv("LENGTHS_DIR", str(lengths_dir))
        swaps = {id(paper.FIG19A["swap in"]): latency.SWAP_IN}
        results = {
            "fit_model": lambda model, lengths: found,
            "fit_swap": lambda ms: (swaps.get(id(ms), latency.SWAP_OUT), [0.0]),
            "points_of": lambda model: [Point(4, 147.0)],
        }
        for name, function in results.items():
            monkeypatch.setattr(fit_latency, name, function)
        return fit_latency.main(list(arguments)), *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path):
    for name in ("sharegpt.csv", "alpaca.csv"):
        (tmp_path / name).write_text("input_len,output_len\n10,20\n")
    return tmp_path


def test_check_passes_when_latency_has_what_is_found(run_tool, files):
    code, out, err = run_tool("--check", "--model", "opt-13b", lengths_dir=files)
    assert (code, err) == (0, "")
    assert out.endswith("\nlatency.py has what is found\n") and "(latency.py)" not in out


def test_check_names_each_constant_that_differs(run_tool, files):
    given = {"found": replace(FITTED["opt-13b"], request_s=1.0), "lengths_dir": files}
    arguments = ("--model", "opt-13b", "--model", "opt-13b")
    code, out, _ = run_tool("--check", *arguments, **given)
    lines = [line for line in out.splitlines() if ", found " in line]
    assert code == 1 and len(lines) == 1 and lines[0].startswith("FITTED['opt-13b'] is Software")
    code, out, _ = run_tool(*arguments, **given)
    assert code == 0 and "(latency.py)" in out and ", found " not in out


def test_check_without_the_length_files_and_a_bad_folder_are_one_line(run_tool, tmp_path):
    for arguments, folder, says in (
        (["--check"], None, "--check needs LENGTHS_DIR"),
        ([], tmp_path / "no", "no"),
        (["--check"], tmp_path, "--check needs LENGTHS_DIR"),
        (["--model", "opt-1"], None, "invalid choice: 'opt-1'"),
    ):
        code, out, err = run_tool(*arguments, lengths_dir=folder)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("fit_latency.py: error: ") and says in err


def test_rms_and_log_ratios():
    assert fit_latency.rms([3.0, -4.0]) == pytest.approx(math.sqrt(12.5))
    twice = fit_latency.ours(8, TABLES, FITTED["opt-13b"]) * 2.0
    assert fit_latency.log_ratios([Point(8, twice)], TABLES, FITTED["opt-13b"]) == [
        pytest.approx(-math.log(2.0))
    ]
