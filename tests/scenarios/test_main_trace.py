"""`main.py --trace FILE`: scenario 4 on the requests of a trace."""

import json
import os
import re

import numpy as np
import pytest
from made_up_traces import burst

import main
from vllm_sim.scenarios import mixed
from vllm_sim.workload.traces import Trace

SMALL = ("--scenario", "4", "--device", "cpu", "--model", "opt-125m", "--num-blocks", "160")


def test_scenario_4_serves_a_trace(capfd, tmp_path, write):
    path = tmp_path / "out.json"
    trace = write(burst(200) + "1,5,0\n", "real.csv")
    assert main.main([*SMALL, "--trace", trace, "--json", str(path), "--quiet"]) == 0
    printed, errors = capfd.readouterr()
    printed = " ".join(printed.split())  # a line above a table is folded
    assert "dealt at random; times in seconds: 200 requests over " in printed
    found = json.loads(path.read_text())
    assert errors == "" and found["setting"]["trace"] == "real.csv"
    told = re.search(
        r"lengths, order and bursts of the first (\d+) requests of real.csv, 1 of 201 rows refused;"
        r" (\d+) cut to fit the pool, or to 320 tokens of output, from up to ([\d,]+) tokens in all"
        r" to at most 512; decoding methods dealt at random",
        printed,
    )
    kinds = re.findall(r"(\d+) (?:single|with|behind)", printed.split(told[0])[0])
    count = sum(map(int, kinds))
    assert int(told[1]) == count and 0 < int(told[2]) < count
    assert all(check["ok"] for check in found["checks"])


def test_help_names_the_page_about_traces(run_script):
    done = run_script("main.py", "--help")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.isascii()
    assert "--trace " in done.stdout and "docs/capacity.md" in done.stdout


def test_without_a_trace_nothing_is_said_of_one(capfd, tmp_path):
    path = tmp_path / "out.json"
    assert main.main([*SMALL, "--json", str(path)]) == 0
    assert "trace" not in json.loads(path.read_text())["setting"]
    assert "dealt at random" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("--scenario 1 --trace good", "--trace is for scenario 4: add --scenario 4"),
        ("--scenario 4 --trace none", "none: cannot be read: No such file"),
        ("--trace bad", "bad: no request can be served: 1 a prompt of 0 tokens"),
        ("--trace", "argument --trace: expected one argument"),
    ],
)
def test_a_trace_that_main_cannot_use_takes_one_line(args, told, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good").write_text("input_len,output_len\n9,9\n")
    (tmp_path / "bad").write_text("input_len,output_len\n0,9\n")
    assert told in refused(main, "--device", "cpu", *args.split(), "--json", "out.json")
    assert sorted(os.listdir(tmp_path)) == ["bad", "good"]


FILL = "fill 160 blocks, but end before they outgrow them: take a trace with longer outputs"


@pytest.mark.parametrize(
    ("row", "blocks", "told"),
    [
        ("1,1", 300, "of 1 + 2 tokens on average (none cut), never need all of 300 blocks: lower "),
        ("5,3", 160, f"of 5 + 3 tokens on average (none cut), {FILL}"),
        ("4000,2", 160, f"from up to 4,002 tokens in all to at most 512), {FILL}"),
    ],
)
def test_a_trace_that_no_load_preempts_takes_one_line_that_says_why(
    row, blocks, told, capfd, write, tmp_path
):
    trace = write(f"input_len,output_len\n{row}\n")
    args = [*SMALL[:-1], str(blocks), "--trace", trace, "--json", str(tmp_path / "out.json")]
    assert main.main(args) == 2
    errors = capfd.readouterr().err.split("main.py: ")[-1]
    assert "no load preempts a request" in errors and told in errors, errors
    assert errors.count("\n") == 1 and not (tmp_path / "out.json").exists()


def test_long_prompts_leave_room_for_their_output(capfd, write):
    """They filled the pool and generated next to nothing: no load preempted them."""
    trace = write("input_len,output_len\n" + "2000,500\n" * 300)
    assert main.main([*SMALL, "--trace", trace]) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "from up to 2,500 tokens in all to at most 512;" in printed


def made(trace, count=40, gap=0.5, longest=100, seed=0):
    options = [{}] * (count // 2) + [{"prefix_len": 30}] * (count // 4)
    options += [{"num_samples": 4}] * (count - len(options))
    rng = np.random.default_rng(seed)
    return mixed.requests_of(trace, options, longest, gap, rng), options


def test_lengths_and_order_are_the_traces_and_cut_to_fit(monkeypatch):
    monkeypatch.setattr(mixed, "MAX_OUTPUT", 50)
    prompts, outputs = np.array([10, 500, 20, 95, 3]), np.array([5, 5, 60, 80, 1])
    trace = Trace("t", "plain CSV", 5, prompts, outputs)
    requests, options = made(trace)
    for i, request in enumerate(requests):
        room = 100 - request.prefix_len
        wanted = max(2, min(outputs[i % 5], 50, max(room - prompts[i % 5], 25)))
        assert request.output_len == wanted
        assert request.prompt_len == min(prompts[i % 5], room - wanted)
    dealt = [{"prefix_len": r.prefix_len, "num_samples": r.num_samples} for r in requests]
    assert sum(d["prefix_len"] == 30 for d in dealt) == sum(d["num_samples"] == 4 for d in dealt)
    assert dealt != [{"prefix_len": 0, "num_samples": 1} | option for option in options]
    told = mixed.told_of(trace, requests)
    assert "the first 40 requests of t, the 5 there are from the top again; " in told
    whole, ours = prompts + outputs, [r.prompt_len + r.output_len for r in requests]
    cut = [total for i, total in enumerate(ours) if total < whole[i % 5]]
    assert f"; {len(cut)} cut to fit the pool, or to 50 tokens of output, from up to 505" in told
    assert f"tokens in all to at most {max(cut)}; " in told and 0 < len(cut) < 40
    assert made(trace)[0] == requests != made(trace, seed=1)[0]


def test_arrivals_keep_the_traces_bursts():
    lengths = np.full(100, 10)
    times = np.cumsum(np.tile([0.0, 0.0, 0.0, 12.0], 25))
    requests, _ = made(Trace("t", "plain CSV", 100, lengths, lengths, times), 100, gap=0.5)
    gaps = np.diff([request.arrival_s for request in requests])
    assert gaps.mean() == pytest.approx(0.5)
    assert (gaps > 0).tolist() == (np.diff(times) > 0).tolist()
    requests, _ = made(Trace("t", "plain CSV", 100, lengths, lengths), 4000)
    gaps = np.diff([request.arrival_s for request in requests])
    assert gaps.mean() == pytest.approx(0.5, rel=0.1) and gaps.min() > 0
    requests, _ = made(Trace("t", "plain CSV", 4, lengths[:4], lengths[:4], times[3:7]), 40)
    assert np.diff([request.arrival_s for request in requests]).max() > 0
