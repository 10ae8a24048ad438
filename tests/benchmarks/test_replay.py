"""benchmarks/replay.py on a run and a table of our own making, and on files that are odd."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import replay
from published_models import PUBLISHED

from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.server_latency import CARDS
from vllm_sim.sizing.measured_runs import (
    MeasuredError,
    compare,
    errors_of_requests,
    read_run,
    read_table,
    serve_requests,
    times_of,
)
from vllm_sim.sizing.speed import Precision, work_of

HEADER = "model_path,system,gemm_quant_mode,moe_quant_mode,isl,osl,batch_size,tp_size,"
HEADER += "attention_dp_size,moe_tp_size,moe_ep_size,silicon_data_source,silicon_ttft_ms,"
HEADER += "silicon_tpot_ms\n"
SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture
def configs(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "x__Llama-3-8B.json").write_text(json.dumps(PUBLISHED["Llama-3-8B"][1]))
    return folder


@pytest.fixture
def run_of(tmp_path, configs):
    """run_of() writes a run that was measured at exactly our own times, on another clock."""

    def write(name="mine", blocks=400, slower=1.0, **engine):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        kwargs = {"tensor_parallel_size": 1, "data_parallel_size": 1}
        kwargs |= {"max_num_seqs": 8, "max_num_batched_tokens": 256} | engine
        meta = {"model": "meta/Llama-3-8B", "engine_kwargs": kwargs}
        meta["kv_cache"] = {"num_gpu_blocks": blocks}
        (folder / "meta.json").write_text(json.dumps(meta))
        nodes = [{"instances": [{"hardware": "RTX4090"}]}]
        (folder / "config.json").write_text(json.dumps({"nodes": nodes}))
        requests = [(0.05 * i, 100 + 60 * i, 1 + 20 * (i % 7)) for i in range(20)]
        model = replay.finder(configs)("meta/Llama-3-8B")
        work, limits = work_of(model, Precision()), Limits(256, 8, chunked=True)
        ours = serve_requests(requests, work, CARDS["rtx4090"], limits, blocks)
        rows = [
            {"arrival_time": 1e9 + at, "queued_ts": 500.0 + at, "input_toks": prompt}
            | {"output_toks": output, "first_token_ts": 500.0 + slower * ours.firsts[i]}
            | {"last_token_ts": 500.0 + slower * ours.lasts[i]}
            for i, (at, prompt, output) in enumerate(requests)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in reversed(rows))
        (folder / "requests.jsonl").write_text(lines)
        (folder / "timeseries.csv").write_text("t,running,waiting\n1,4,0\n2,8,3\n3,6,1\n")
        return folder

    return write


def test_a_run_of_our_own_times_has_no_errors(run_of, configs):
    run = read_run(run_of(), None)
    assert run.limits.chunked and run.num_blocks == 400 and run.running_under_pressure == 7.0
    assert run.requests[0] == (0.0, 100, 1) and run.card is CARDS["rtx4090"]
    ours = replay.replay(run, work_of(replay.finder(configs)(run.model), Precision()))
    found = compare(run, ours)
    for name in ("end", "latency_mean", "latency_p99", "ttft_mean", "tpot_mean"):
        assert found[name][0] == pytest.approx(found[name][1]) and found[name][0] > 0
    assert 1.0 < found["running"][0] <= 8.0
    ratios = errors_of_requests(run, ours)
    assert all(np.allclose(ratios[name], 1.0) for name in ("latency", "ttft", "tpot"))
    assert len(ratios["tpot"]) == 17 < len(ratios["latency"]) == 20  # some have one token
    assert ours.preemptions > 0 or run.num_blocks > 300
    assert (ours.starts <= ours.firsts).all() and (ours.firsts <= ours.lasts).all()


def test_runs_are_printed_and_written(run_of, configs, tmp_path, capsys):
    run_of("one")
    run_of("two", slower=2.0)
    out = tmp_path / "found.json"
    given = [str(tmp_path / "runs"), "--configs", str(configs), "--json", str(out), "--quiet"]
    assert replay.main(given) == 0
    printed = capsys.readouterr().out
    assert "one" in printed and "two" in printed and "running while others wait" in printed
    (runs,) = (one for one in json.loads(out.read_text())["tables"] if one["id"] == "runs")
    errors = {(row["run"], row["figure"]): row["error_pct"] for row in runs["rows"]}
    assert errors["one", "end, s"] == pytest.approx(0.0, abs=1e-4)
    assert errors["two", "end, s"] == pytest.approx(-50.0)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_table_by_model(configs, tmp_path, zipped, capsys):
    row = "meta/Llama-3-8B,h100_sxm,{},,{},64,{},1,,,,plain,{},{}\n"
    path = tmp_path / ("table.csv.gz" if zipped else "table.csv")
    model = replay.finder(configs)("meta/Llama-3-8B")

    def write(text):
        path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())

    write(HEADER + row.format("", 1000, 4, 1, 1))
    (one,) = read_table(path)
    ttft, tpot = times_of(one, work_of(model, one.precision))
    text = row.format("", 1000, 4, 1e3 * ttft, 1e3 * tpot) + row.format("fp8", 90, 2, 1, 1)
    write(HEADER + text + text.replace("Llama-3-8B", "Unknown-9B").split("\n")[0] + "\n")
    plain, quick, unknown = read_table(path)
    assert plain.precision.dense_bytes == 2 * quick.precision.dense_bytes
    assert unknown.concurrency == 4 and 0 < tpot < ttft
    given = [str(path), "--configs", str(configs), "--quiet"]
    assert replay.main(given) == 0
    printed = capsys.readouterr().out
    assert "not answered: meta/Unknown-9B: meta/Unknown-9B: no preset" in printed
    assert "meta/Llama-3-8B     2" in printed


def test_more_tokens_of_the_prompt_or_requests_take_longer(configs, tmp_path):
    path = tmp_path / "table.csv"
    shapes = ((1000, 4), (4000, 4), (1000, 16))
    rows = [f"meta/Llama-3-8B,h100_sxm,,,{n},64,{c},1,,,,,1,1\n" for n, c in shapes]
    path.write_text(HEADER + "".join(rows))
    work = work_of(replay.finder(configs)("Llama-3-8B"), Precision())
    base, long, many = (times_of(row, work) for row in read_table(path))
    assert long[0] > base[0] and long[1] > base[1] and many[1] > base[1]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("meta.json", None, "cannot be read"),
        ("meta.json", "{", "not JSON"),
        ("meta.json", "[]", "not a JSON object"),
        ("meta.json", "{}", "not a run that can be read: KeyError"),
        ("config.json", '{"nodes": []}', "not a run that can be read"),
        ("config.json", '{"nodes": [{"instances": [{"hardware": "X1"}]}]}', "card 'X1'"),
        ("requests.jsonl", '{"arrival_time": 1}\n', "not a run that can be read"),
        ("requests.jsonl", "", "not a run that can be read"),
        ("timeseries.csv", "t,running\n1,2\n", "not a run that can be read"),
    ],
)
def test_odd_files_are_one_line_and_code_2(run_of, configs, name, text, told, capsys):
    folder = run_of()
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    assert replay.main([str(folder), "--configs", str(configs)]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error and "\n" not in error


ODD = HEADER + "x,h100_sxm,fp5,,1,1,1,1,,,,,1,1\n"


@pytest.mark.parametrize("text", ["", HEADER, ODD, "a\n1\n"])
def test_odd_tables_are_refused(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(MeasuredError):
        read_table(path)
    assert replay.main([str(path)]) == 2
    assert replay.main([str(tmp_path / "nothing.csv.gz")]) == 2


def test_names_are_found_whatever_their_form():
    assert replay.key_of("aic__meta-llama--Meta-Llama-3.1-8B") == "llama-3.1-8b"
    assert replay.key_of("nvidia/Llama-3.1-8B-Instruct-FP8") == "llama-3.1-8b"
    assert replay.key_of("Qwen/Qwen3-30B-A3B-Instruct-2507") == "qwen3-30b-a3b"


@pytest.mark.skipif(not (SHARED / "measured" / "llmservingsim").is_dir(), reason="no shared data")
def test_measured_runs_are_met(tmp_path):
    """What docs/capacity.md says of the four runs."""
    out = tmp_path / "found.json"
    runs = SHARED / "measured" / "llmservingsim"
    given = [str(runs), "--configs", str(SHARED / "configs"), "--json", str(out), "--quiet"]
    assert replay.main(given) == 0
    rows = next(t for t in json.loads(out.read_text())["tables"] if t["id"] == "runs")["rows"]
    errors = {(row["run"], row["figure"]): row["error_pct"] for row in rows}
    assert len({run for run, _ in errors}) == 4
    for (run, figure), error in errors.items():
        if figure in ("end, s", "latency, mean, s", "per token, mean, ms"):
            assert abs(error) < 5.0, (run, figure, error)
        if figure == "running while others wait" and run.startswith("RTX4090"):
            assert abs(error) < 1.0
