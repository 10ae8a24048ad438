"""serve.py: what it counts is right, and all of it runs, with two layers of a small model."""

import json
import socket
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("transformers")

import pictures
import serve
import serve_earlier
import serve_fit

from vllm_sim.engine.server import Took
from vllm_sim.serving.latency import ApartLatency
from vllm_sim.workload.data_sets import COMPACT_SOURCE, find_lengths

SMALL = "--model", "tiny", "--blocks", 200, "--cpu-blocks", 64, "--quiet"


def test_every_part_runs(run_script, tmp_path):
    out = tmp_path / "out.json"
    options = "--dataset", "Alpaca", "--seconds", 4, "--queue", 2000, "--trace-seconds", 1
    rates = "--rates", "paged=4,2", "--rates", "pow2=9@2", "--sample-rate", 4
    systems = "--systems", "pow2,paged"
    parts = [
        word for part in ("steps", "saturated", "poisson", "samples") for word in ("--part", part)
    ]
    done = run_script(
        "benchmarks/serve.py", *SMALL, *options, *rates, *systems, *parts, "--json", out
    )
    assert done.returncode == 0, done.stderr
    assert "Where the K/V memory is then (Fig. 2)" in done.stdout
    found = json.loads(out.read_text())
    tables = {table["id"]: table["rows"] for table in found["tables"]}
    assert [row["batch"] for row in tables["steps"]] == [7, 15, 30, 60]
    assert all(row["over_floor"] > 1.0 for row in tables["steps"])
    pow2, paged = tables["saturated"]
    assert paged["batch"] > 1.5 * pow2["batch"]  # memory decides, whatever the machine's speed
    assert paged["tokens_percent"] > 60.0 > pow2["tokens_percent"]
    assert (paged["reserved_percent"], paged["internal_percent"]) == (0.0, 0.0)
    poisson = [(row["system"], row["rate"], row["trace_s"]) for row in tables["poisson"]]
    assert poisson == [("pow2", 9.0, 2), ("paged", 2.0, 1), ("paged", 4.0, 1)]
    assert all(row["requests"] > 0 and row["s_per_token"] > 0.0 for row in tables["poisson"])
    assert {(row["samples"], row["system"]) for row in tables["samples"]} == {
        (count, system) for count in (2, 4, 6) for system in ("pow2", "paged")
    }
    for row in tables["samples"]:
        assert (row["saved_percent"] > 0.0) == (row["system"] == "paged")
    constants = found["setting"]["constants"]
    assert ApartLatency(**constants).decode_steps(1, 4, 100) > 0.0


def test_two_ranks_serve_one_model_and_hold_the_same(run_script, tmp_path):
    """Orders of one scheduler, tables compared after each; both end, and one of them tells."""
    out = tmp_path / "out.json"
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    starter = "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port
    options = "--part", "saturated", "--systems", "paged", "--seconds", 2, "--queue", 2000
    done = run_script(
        *("-m", *starter, "benchmarks/serve.py", "--tensor-parallel", "--check", *SMALL, *options),
        *("--dataset", "Alpaca", "--json", out),
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all ranks alike after each") == 1
    orders = json.loads(out.read_text())["setting"]["orders"]
    assert orders["checked"] and orders["ranks"] == 2
    assert orders["bytes"] > 100 * orders["messages"] > 0


def test_the_peer_serves_the_same_requests(run_script, tmp_path):
    out = tmp_path / "out.json"
    options = "--model", "tiny-llama", "--blocks", 1300, "--part", "peer", "--quiet", "--json", out
    done = run_script("benchmarks/serve.py", *options)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(out.read_text())["tables"]
    assert [(row["server"], row["tokens"]) for row in table["rows"]] == [
        ("ours", 64 * 128),
        ("transformers", 64 * 128),
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    {
        ("--part", "poisson"): "poisson needs --rates",
        ("--rates", "paged=0"): "'paged=0' is no list of rates",
        ("--rates", "orca=1"): "'orca=1' is no list of rates",
        ("--rates", "nan"): "'nan' is no list of rates",
        ("--systems", "paged", "--rates", "max=1"): "max is not among the --systems",
        ("--layers", "3"): "tiny has 2",
        ("--sample-rate", "1,2"): "'1,2' is not a rate",
        ("--sample-rate", "5@15"): "'5@15' is not a rate",
        ("--check",): "--tensor-parallel",
        ("--seeds", "2"): "--earlier",
        ("--systems", "paged,orca"): "systems are max, pow2, oracle, paged",
        ("--seed", "-1"): "an integer from 0",
        ("--blocks", "12"): "a sequence of 2048 tokens needs more",
        ("--part", "peer"): "no OPT",
        ("--part", "samples", "--systems", "max", "--trace-seconds", "1"): "max: request 0 needs 4",
        ("--model", "opt-66b", "--part", "steps"): "or --model tiny",
        ("--figures", "out", "--part", "steps"): "draws the part poisson",
        ("--figures", "out", "--part", "poisson", "--rates", "max=1"): "relative to paged's",
        ("--lengths", "no_such.csv"): "no_such.csv",
    }.items(),
    ids=str,
)
def test_what_cannot_be_used_is_one_line(options, told, capsys):
    options = options if "--model" in options else ["--model", "tiny", *options]
    assert serve.main(["--quiet", *options]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and len(captured.err.splitlines()) == 1


def test_torchrun_without_its_option_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert serve.main(["--model", "tiny"]) == 2
    assert "--tensor-parallel" in capsys.readouterr().err


CONSTANTS = {"step_s": 2e-3, "token_s": 4e-5, "context_s": 2e-7, "seq_s": 1e-5}
CONSTANTS |= {"weights_s": 6e-3, "prompt_s": 1e-3, "block_size": 16}


def a_run(path, lengths=COMPACT_SOURCE, model="opt-13b", alone_s=0.0085, **tables):
    """A run of serve.py that was kept, as tools/record.py keeps it."""
    alone = {"rate": 0.0, "s_per_token": alone_s, "simulated_s_per_token": alone_s}
    options = {"model": model, "cpu_blocks": 0, "dataset": "ShareGPT", "seconds": 20}
    found = {"options": options | {"queue": 600}, "tables": []}
    found["setting"] = {"blocks": 983, "constants": CONSTANTS, "alone": alone}
    found["setting"]["lengths"] = lengths
    found["tables"] = [{"id": name, "rows": rows} for name, rows in tables.items()]
    path.write_text(json.dumps({"output": found, "device": "a GPU"}))
    return "--earlier", str(path)


def point(system, rate=2.6, trace_s=45, **more):
    measured = {"s_per_token": 0.12, "simulated_s_per_token": 0.13}
    return {"system": system, "rate": rate, "trace_s": trace_s} | measured | more


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib")
def test_earlier_runs_are_drawn_together(tmp_path, capsys):
    one = a_run(tmp_path / "one.json", poisson=[point("paged", 9.0)])
    two = a_run(tmp_path / "two.json", poisson=[point("max")])
    assert serve.main([*one, *two, "--figures", str(tmp_path)]) == 0
    assert (tmp_path / pictures.SERVED).stat().st_size > 10_000
    assert "Requests/s at a latency" in capsys.readouterr().out
    bad = a_run(tmp_path / "bad.json", poisson=[point("paged", None)])
    other = a_run(tmp_path / "other.json", poisson=[point("orca")])
    full = a_run(tmp_path / "full.json", saturated=[{"system": "paged"}])
    other_length = a_run(tmp_path / "short.json", poisson=[point("paged", 9.0, 15)])
    low = a_run(tmp_path / "low.json", poisson=[point("paged", s_per_token=0.1)])
    larger = a_run(tmp_path / "larger.json", model="opt-66b", poisson=[point("max")])
    words = a_run(tmp_path / "words.json", poisson=[point("paged", s_per_token="0.12")])
    readme = "--earlier", __file__
    for options, told in (
        (two, "which its traces of 45 s do not reach"),
        ((*other_length, *two), "which its traces of 45 s do not reach"),
        (low, "which its traces of 45 s do not reach"),
        ((*one, *larger), "not runs of one model"),
        (words, "has no figures of this script"),
        (bad, "has no figures of this script"),
        (other, "has no figures of this script"),
        (readme, "has no figures of this script"),
        (("--earlier", "no_such"), "No such file"),
        (full, "none of these runs has the part poisson"),
    ):
        assert serve.main([*options, "--figures", str(tmp_path)]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib")
def test_a_picture_that_is_refused_costs_no_figures(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = "--part", "poisson", "--dataset", "Alpaca", "--systems", "pow2,paged", "--json", out
    rates = "--rates", "paged=2@1", "--rates", "pow2=2@2", "--figures", tmp_path
    assert serve.main([*map(str, (*SMALL, *options, *rates))]) == 2
    error = capsys.readouterr().err
    assert "which its traces of 2 s do not reach" in error and len(error.splitlines()) == 1
    assert {table["id"] for table in json.loads(out.read_text())["tables"]} >= {"poisson"}


def test_the_order_of_runs_does_not_matter(tmp_path, capsys):
    one = a_run(tmp_path / "one.json", poisson=[point("paged", 9.0)], alone_s=0.008)
    two = a_run(tmp_path / "two.json", poisson=[point("paged", 4.0, s_per_token=0.03)])
    assert serve.main([*one, *two]) == serve.main([*two, *one]) == 0
    first, *half = capsys.readouterr().out.split("Requests/s at a latency")[1:]
    assert [first] == half and f"{serve_earlier.LONE * 0.0085:.3f}" in first


def test_lengths_of_a_file_are_named(tmp_path, capsys):
    file, out = tmp_path / "some.csv", tmp_path / "out.json"
    file.write_text("input_len,output_len\n5,9\n12,7\n")
    options = "--lengths", file, "--part", "saturated", "--seconds", 1, "--systems", "paged"
    assert serve.main([*map(str, (*SMALL, *options, "--json", out))]) == 0
    assert json.loads(out.read_text())["setting"]["lengths"] == "some.csv (2 pairs)"
    assert "these are no figures" in capsys.readouterr().out


def test_other_seeds_are_simulated(tmp_path, capsys):
    rows = [point("max"), point("paged", 9.0), point("paged", 40.0, 15)]
    full = [{"system": system} for system in ("max", "paged")]
    run = a_run(tmp_path / "run.json", poisson=rows, saturated=full)
    out = tmp_path / "out.json"
    assert serve.main([*run, "--seeds", "2", "--json", str(out)]) == 0
    (spread,) = (t for t in json.loads(out.read_text())["tables"] if t["id"] == "spread")
    assert [(row["what"], row["seed"]) for row in spread["rows"]] == [
        (what, seed) for seed in (0, 1) for what in ("full queue", "at 0.115 s/token")
    ]
    from_a_file = a_run(tmp_path / "file.json", "some.csv (9 pairs)", saturated=full)
    nothing = a_run(tmp_path / "nothing.json", peer=[])
    for options, told in ((from_a_file, "some.csv"), (nothing, "saturated or poisson")):
        assert serve.main([*options, "--seeds", "1"]) == 2
        captured = capsys.readouterr()
        assert told in captured.err and len(captured.err.splitlines()) == 1
    for row in spread["rows"]:
        assert 2.0 < row["over_max"] < 6.0 and row["over_oracle"] is None
    assert spread["rows"][0]["paged"] != spread["rows"][2]["paged"]


def test_a_rate_far_below_those_tried_is_not_read(tmp_path):
    path = a_run(tmp_path / "run.json")[1]
    with open(path, encoding="ascii") as file:
        found = json.load(file)["output"]
    machine = serve_earlier.Machine(found, find_lengths((), None))
    assert machine.rate_at("max", 40.0, 15, 0.115, 0) is None
    assert machine.rate_at("max", 2.6, 45, 0.115, 0) is not None


def test_lines_begin_with_a_request_alone_and_have_traces_of_one_length():
    def row(system, seconds, rate, measured, simulated):
        names = "system", "trace_s", "rate", "s_per_token", "simulated_s_per_token"
        return dict(zip(names, (system, seconds, rate, measured, simulated)))

    rows = [row("paged", 60, 2.0, 0.1, 0.11), row("paged", 60, 3.0, 0.3, 0.31)]
    rows += [row("paged", 15, 9.0, 0.5, 0.4), row("max", 60, 1.0, 0.09, 0.3)]
    found = serve_earlier.rates_at(rows, row("paged", 0, 0.0, 0.02, 0.02), (0.2, 0.5))
    shown = [(one["system"], one["trace_s"], one["at_s_per_token"], one["rate"]) for one in found]
    assert shown == [
        ("paged", 60, 0.2, pytest.approx(2.5)),
        ("paged", 15, 0.5, pytest.approx(9.0)),  # its run is too far above 0.2
    ]
    assert found[0]["simulated_rate"] == pytest.approx(2.45)
    assert found[1]["simulated_rate"] is None


def test_kernels_are_told_apart_by_their_names():
    kernels = [
        ("_attend", 40.0, 3000.0),
        ("nvjet_sm90_hsh_64x32_64x16_4x1_v_bz_bias_TNT", 80.0, 2800.0),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", 40.0, 100.0),
        ("ncclDevKernel_AllReduce_Sum_f16_RING_LL(x)", 80.0, 800.0),
        ("_normalize", 81.0, 150.0),
        ("Memcpy HtoD (Pinned -> Device)", 2.0, 5.0),
    ]
    row = serve_fit.by_part(kernels)
    assert row["other_launches"] == 83
    for part, ms in (("products", 2.9), ("attention", 3.0), ("sums", 0.8), ("others", 0.155)):
        assert row[f"{part}_ms"] == pytest.approx(ms)
    assert set(serve_fit.by_part([]).values()) == {0.0}


def test_constants_come_out_of_the_iterations_that_they_made(monkeypatch):
    """Of iterations with a few pauses of the host in them."""
    monkeypatch.setattr(serve_fit.Sizes, "of", lambda _: serve_fit.Sizes(26_000_000_000, 800_000))
    monkeypatch.setattr(serve_fit, "swap_seconds", lambda _: (2e-4, 3e-4))
    truth = ApartLatency(3e-3, 4e-5, 2e-7, 6e-6, weights_s=6.5e-3, prompt_s=1e-3)
    took = []
    for seqs in (1, 8, 30, 60, 128):
        for context in (100, 400, 900):
            wall = truth.decode_steps(1, seqs, seqs * context)
            took.append(Took(seqs, seqs * context, 0, 0.0, wall, wall))
    took += [Took(8, 800, 0, 0.0, 9e-3, 0.5)] * 2
    for tokens in (32, 64, 128, 600, 1024, 2048, 2560):
        seconds = 1e-3 + max(6.5e-3, 4e-5 * tokens)
        took.append(Took(0, 0, tokens, seconds, 0.0, seconds))
    found = serve_fit.fit(took, SimpleNamespace(block_size=16), 4e12)
    for name in "step_s", "token_s", "context_s", "seq_s", "weights_s", "prompt_s":
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.02), name
    assert (found.swap_out_s, found.swap_in_s) == (2e-4, 3e-4)


def test_a_least_squares_fit_has_no_negative_constant():
    shapes = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert min(serve_fit.solved(shapes, np.array([3.0, 2.0, 1.0]))) >= 0.0
