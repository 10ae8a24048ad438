"""`capacity.py --trace FILE` as a user meets it."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from made_up_traces import burst
from test_traces import AZURE, BURSTGPT, MOONCAKE, needs_data

import capacity
from vllm_sim.paper import GIB
from vllm_sim.reporting import progress
from vllm_sim.serving.systems import POLICIES
from vllm_sim.sizing import trace_answers
from vllm_sim.sizing.case import TraceCase
from vllm_sim.sizing.speed import speed_of
from vllm_sim.sizing.trace_needs import EXACT
from vllm_sim.sizing.trace_serving import serve
from vllm_sim.workload.traces import read_trace

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = (
    "What is in",
    "How long are",
    "How many requests run",
    "What happens on one server",
    "What seconds",
    "What is the smallest",
    "How many GPUs",
    "How many bytes",
    "Where does the memory",
    "How many blocks",
)


UNKNOWN = '{{"timestamp": {}, "input_length": 5, "output_length": 2}}\n'


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """(what was printed, the JSON) of a run that succeeds without a word on stderr."""
    monkeypatch.setattr(progress, "LOG_S", math.inf)  # a busy machine is no finding

    def run(*args):
        path = tmp_path / "out.json"
        code = capacity.main([*map(str, args), "--json", str(path)])
        printed, errors = capfd.readouterr()
        assert (code, errors) == (0, "") and printed.isascii()
        return printed, json.loads(path.read_text(encoding="ascii"))

    return run


def rows_of(found, start):
    (rows,) = [s["rows"] for s in found["tables"] if s["title"].startswith(start)]
    return rows


# ---- what capacity.py says --------------------------------------------------------------------


def test_the_answer_first_then_a_table_and_an_answer_each(run, write):
    printed, found = run("--trace", write(burst() + "9,0,5\nx,5,5\n", "my trace.csv"))
    first, _, second = printed.partition("\n\n")
    assert first.startswith("my trace.csv: ") and first.endswith("no request held up by memory")
    assert second.startswith("60 of 62 rows of my trace.csv served; at most 1 % held up")
    whole = " ".join(printed.split())
    asked = [section["title"] for section in found["tables"]]
    assert [q.startswith(start) for q, start in zip(asked, QUESTIONS, strict=True)] == [True] * 10
    assert all(told in whole for told in (found["answer"], *(t["answer"] for t in found["tables"])))
    there = {row["what"]: row for row in rows_of(found, "What is in")}
    assert there["rows read"]["number"] == 62 and there["requests served"]["number"] == 60
    assert there["refused: a prompt of 0 tokens"] == {
        "what": "refused: a prompt of 0 tokens",
        "number": 1,
        "first_line": 62,
    }
    assert there["refused: the time is not one"]["first_line"] == 63
    setting = found["setting"]
    assert setting["workload"] == "my trace.csv" and setting["trace"]["rows_read"] == 62
    assert setting["trace"]["rows_refused"] == {"a prompt of 0 tokens": 1, "the time is not one": 1}


def test_the_figures_are_those_of_the_parts(run, write, case_of):
    """Lengths by numpy, the rest by serving the trace again with what was found."""
    path = write(burst())
    printed, found = run("--trace", path, "--preemption-rate", 0.1)
    trace = read_trace(path)
    prompt, output, both = rows_of(found, "How long")
    assert prompt["mean"] == trace.prompts.mean() and output["mean"] == trace.outputs.mean()
    assert both["p100"] == (trace.prompts + trace.outputs).max()
    assert prompt["p50"] == np.sort(trace.prompts)[29]  # the smallest with half at or below it
    asked = TraceCase(case_of(), trace, speed_of(case_of().plan, "a100-40gb"), 0.1, None)
    columns, server = asked.columns, asked.server
    free = serve(columns, server, "paged", 10**6)
    one = {row["what"]: row["number"] for row in rows_of(found, "How many requests run")}
    assert (one["most requests at a time"], one["mean over time"]) == (free.peak, free.mean)
    rows = rows_of(found, "What is the small")
    needs = {(row["policy"], row["held_up_at_most_percent"]): row for row in rows}
    assert set(needs) == {(policy, share) for policy in POLICIES for share in (0.0, 10.0)}
    for (policy, share), row in needs.items():
        few = 0 if share == 0.0 else 6
        served = serve(columns, server, policy, row["blocks"], few)
        assert served.held_up == row["preempted"] + row["kept_waiting"] <= few
        less = row["blocks"] - max(1, row["blocks"] // EXACT)
        assert serve(columns, server, policy, less, few) is None
        assert row["gib_of_k_v"] == pytest.approx(row["blocks"] * 16 * 819_200 / GIB)
        assert row["x_this_server_s"] == row["blocks"] / 983
    assert needs["paged", 0.0]["blocks"] < needs["oracle", 0.0]["blocks"]
    for policy, row in zip(POLICIES, rows_of(found, "What happens")):
        served = serve(columns, server, policy, 983)
        assert (row["preempted"], row["kept_waiting"]) == (served.preemptions, served.kept_waiting)
        assert row["most_at_a_time"] == served.peak
    for row in rows_of(found, "How many GPUs"):
        few = 0 if row["held_up_at_most_percent"] == 0.0 else 6
        for servers in (row["servers"], row["servers"] - 1):
            parts = [tuple(c[i::servers] for c in columns) for i in range(servers)]
            runs = [serve(part, server, row["policy"], 983) for part in parts]
            assert (sum(r.held_up for r in runs) <= few) == (servers == row["servers"] > 0)
    paged = needs["paged", 0.0]
    assert f": {paged['blocks']:,} blocks ({paged['gib_of_k_v']:.1f} GiB) and" in printed


def test_gpus_are_those_of_all_servers(run, write):
    path = write(burst(40))
    printed, found = run("--trace", path, "--model", "opt-66b", "--gpus", 4)
    rows = rows_of(found, "How many GPUs")
    assert all(row["gpus"] == 4 * row["servers"] for row in rows)
    need = rows_of(found, "What is the smallest")[0]
    per_token = 2 * 64 * 72 * 128 * 2  # on all four GPUs together
    assert need["gib_of_k_v"] == pytest.approx(need["blocks"] * 16 * per_token / GIB)
    assert "at the speed of 4 x a100-40gb, its own constants" in printed


def test_a_preemption_rate_of_zero_asks_once(run, write):
    printed, found = run("--trace", write(burst(20)), "--preemption-rate", 0)
    assert len(rows_of(found, "What is the smallest")) == len(POLICIES)
    assert "at most" not in printed.split("\n")[0]


def test_mooncake_says_what_could_be_shared(run, write):
    printed, found = run("--trace", write(MOONCAKE), "--gpu", "h100")
    rows = rows_of(found, "How much of its prompts")
    assert [row["number"] for row in rows] == [8, 2, 25.0]
    assert "a cache without bound would find 25.0 % of the prompts' blocks" in printed
    assert found["setting"]["trace"]["format"] == "Mooncake JSON lines"
    told = "times in milliseconds, as blocks of 512 tokens say: 3 requests over 3.054 s, 0.655 requ"
    told += "ests a second"
    assert f"3 rows read, 0 refused; {told}; 3 requests served." in " ".join(printed.split())
    assert found["setting"]["trace"]["times"] == told
    args = ("--gpu", "h100", "--max-model-len", 1000)  # two are longer
    _, found = run("--trace", write(MOONCAKE), *args)
    assert rows_of(found, "How much of its prompts")[0]["number"] == 8
    assert found["setting"]["trace"]["requests"] == 1


def test_azure_and_burstgpt(run, write):
    for text, form, served in ((AZURE, "Azure CSV", 3), (BURSTGPT, "BurstGPT CSV", 3)):
        printed, found = run("--trace", write(text))
        assert found["setting"]["trace"]["format"] == form
        assert found["setting"]["trace"]["requests"] == served
    assert "refused: failed: 0 response tokens" in printed


def test_a_rate_stands_in_for_the_times(run, write):
    path = write("input_len,output_len\n" + "20,30\n50,5\n" * 40)
    printed, found = run("--trace", path, "--rate", 4, "--seed", 1)
    assert "arriving at 4/s, seed 1" in printed and found["setting"]["trace"]["arrival_rate"] == 4
    rows = {row["what"]: row["number"] for row in rows_of(found, "What is in")}
    assert rows["requests a second"] == pytest.approx(4, rel=0.4)
    printed, found = run("--trace", path, "--rate", "inf")
    assert found["setting"]["trace"]["all_at_once"]
    rows = {row["what"]: row["number"] for row in rows_of(found, "What is in")}
    assert rows["seconds from the first to the last"] == 0 and "requests a second" not in rows
    assert rows_of(found, "How many requests run")[0]["number"] == 80
    timed = write(burst(30))
    assert run("--trace", timed)[1]["tables"] != run("--trace", timed, "--rate", 9)[1]["tables"]
    since_1970 = write("time,prompt,output\n1700000000000,5,5\n1700000000500,6,5\n")  # in ms
    assert run("--trace", since_1970, "--rate", 4)[1]["setting"]["trace"]["rows_refused"] == {}


def test_only_some_rows_and_rows_out_of_order_are_told(run, write):
    printed, found = run("--trace", write("time,input_len,output_len\n5,9,9\n1,9,9\n3,9,9\n"))
    assert "rows earlier than the one before: sorted" in printed
    assert found["setting"]["trace"]["rows_sorted"] == 1
    trace = run("--trace", write(burst()), "--trace-rows", 20)[1]["setting"]["trace"]
    assert (trace["rows_read"], trace["requests"]) == (20, 20)


def test_a_server_that_falls_behind_is_told(run, write):
    text = "time,input_len,output_len\n" + "".join(f"{i / 20},500,400\n" for i in range(700))
    printed, _ = run("--trace", write(text), "--preemption-rate", 0)
    first, rest = " ".join(printed.split()).split(" What is in the trace? ")
    assert "one server falls behind whatever its memory, going on for " in first
    assert "go by the GPUs" in first and "falls behind" in rest
    for count, told in ((3, False), (4, True)):  # prompts that fill an iteration each
        text = "time,input_len,output_len\n" + "".join(f"{i / 1e5},2000,1\n" for i in range(count))
        printed, _ = run("--trace", write(text), "--preemption-rate", 0)
        assert ("falls behind" in printed) == told


def test_a_request_too_long_for_a_server_is_told(run, write, config):
    path = config("Llama-3.2-1B")
    text = "time,input_len,output_len\n0,100000,20\n1,5,5\n2,5,9\n"
    args = ("--model", path, "--gpu-memory", 5.5, "--speed-of", "l4", "--trace", write(text))
    printed, found = run(*args)
    printed = " ".join(printed.split())
    assert "no number of servers of" in printed.split(" What is in the trace? ")[0]
    assert "under paged, oracle" not in printed and "does not fit the" in printed
    assert "a request of this trace does not fit alone" in printed
    assert [row["gpus"] for row in rows_of(found, "How many GPUs")] == [None] * 8
    assert "1 x GPU of 5.50 GiB" in printed and "at the speed of 1 x l4" in printed


def test_windows_are_told(run, write, config):
    path = config("Gemma-3-1B")
    printed, found = run("--model", path, "--gpu", "t4", "--trace", write(burst(20)))
    assert "every layer whole, without windows" in printed
    assert len(found["tables"]) == 11


def test_seconds_and_the_gpus_that_meet_a_target(run, write, config):
    """A hundred prompts at once, then one by one: the first token comes late on one server."""
    model = ("--model", config("Llama-3-8B"), "--gpu", "h100", "--preemption-rate", 0)
    text = "time,input_len,output_len\n" + "0,2000,40\n" * 100 + "9,2000,1\n"
    args = ("--trace", write(text), *model)
    printed, plain = run(*args)
    ttft, tpot, whole = rows_of(plain, "What seconds")
    assert 1.0 < ttft["p50"] < ttft["p99"] < 9.0 and ttft["mean"] > ttft["p50"] / 2
    assert tpot["p50"] < 0.1 and whole["p99"] > ttft["p99"]
    assert "What seconds do its requests take" in printed and "are the seconds met" not in printed
    printed, found = run(*args, "--ttft", 1.5, "--tpot", 1)
    (row,) = rows_of(found, "With how many GPUs")
    assert 1 < row["gpus"] == row["servers"] < 20
    told = "1.5 s to the first token and 1 s for each further one for 99 of 100 requests takes "
    assert f"{told}{row['gpus']} GPUs." in " ".join(printed.split("What is in")[0].split())
    _, loose = run(*args, "--ttft", 2 * ttft["p99"])
    assert rows_of(loose, "With how many GPUs")[0]["gpus"] == 1
    printed, never = run(*args, "--tpot", 1e-6)
    assert rows_of(never, "With how many GPUs")[0]["gpus"] is None
    assert "no number of servers gives" in " ".join(printed.split())


def test_a_long_trace_is_searched_in_its_busiest_stretch_where_some_are_held_up(
    run, write, case_of, monkeypatch
):
    """The burst at its end; the answers for none held up are of all."""
    head, *rows = burst(40, 9.0).splitlines()
    late = burst(60, 0.02, 1).splitlines()[1:]
    late = [f"{1000 + float(row.split(',')[0])},{row.split(',', 1)[1]}" for row in late]
    path = write("\n".join([head, *rows, *late]) + "\n", "long.csv")
    args = ("--trace", path, "--preemption-rate", 0.1)
    _, exact = run(*args)
    monkeypatch.setattr(trace_answers, "LONGEST", 50)
    monkeypatch.setattr(trace_answers, "STRETCH", 60)
    printed, found = run(*args)
    assert "at most 10 % (its busiest 60 requests in a row) held up" in " ".join(printed.split())
    assert rows_of(found, "How many requests run") == rows_of(exact, "How many requests run")
    for start in ("What is the smallest", "How many GPUs"):
        assert rows_of(found, start)[:4] == rows_of(exact, start)[:4]
        assert len(rows_of(found, start)) == 8
    part = read_trace(path).part(40, 100, "part")
    asked = TraceCase(case_of(), part, speed_of(case_of().plan, "a100-40gb"), 0.1, None)
    served = serve(asked.columns, asked.server, "paged", 983)
    row = rows_of(found, "What happens")[-1]
    assert (row["most_at_a_time"], row["kept_waiting"]) == (served.peak, served.kept_waiting)
    assert part.arrivals[0] == 0.0 and served.kept_waiting > 0


def test_same_input_same_output(run, write):
    path = write(burst())
    first, again = (run("--trace", path, "--format", "github") for _ in range(2))
    assert first[0] == again[0] and first[1]["tables"] == again[1]["tables"]
    printed, _ = run("--trace", path, "--format", "latex")
    outside = re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", printed, flags=re.DOTALL)
    assert [line for line in outside.split("\n") if line and not line.startswith("%")] == []


def test_a_slow_run_says_which_step_it_is_at(write, capfd, monkeypatch):
    monkeypatch.setattr(progress, "LOG_S", -1.0)
    assert capacity.main(["--trace", write(burst(100))]) == 0
    steps = [line.split(" s, ", 1)[1] for line in capfd.readouterr().err.splitlines()]
    assert steps[0] == "serving the trace with unbounded memory"
    assert "searching the smallest memory, pow2, 1 % held up" in steps
    assert len(set(steps)) == 2 + 2 * 2 * len(POLICIES)
    assert len(steps) > len(set(steps))  # within a step as well
    assert capacity.main(["--trace", write(burst(12)), "--quiet"]) == 0
    assert capfd.readouterr().err == ""


# ---- input that cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("--trace none.csv", "none.csv: cannot be read: No such file or directory"),
        ("--trace .", "cannot be read: "),
        ("--trace bare", "bare: no column of times: give --rate, requests a second, or --rate inf"),
        ("--trace zeros", "zeros: no request can be served: 2 an output of 0 tokens (first in"),
        ("--trace long", "long: no request can be served: 1 longer than 2,048 tokens"),
        (
            "--trace other",
            "line 1: no trace of a known format: its columns, separated by ',': 'a', 'b'; ",
        ),
        ("--trace good --max-model-len 9", "good: no request can be served: "),
        ("--trace good --workload alpaca", "--workload and --trace are two answers"),
        ("--trace good --gpu-memory 40", "--gpu-memory says no speed, which --trace needs: give"),
        ("--trace good --speed-of t4", "--speed-of is for --gpu-memory"),
        ("--trace good --gpu-memory 40 --speed-of t5", "argument --speed-of: invalid choice: 't5'"),
        ("--rate 3", "--rate is about a trace: give --trace"),
        ("--preemption-rate 0.1", "--preemption-rate is about a trace: give --trace"),
        ("--trace-rows 3", "--trace-rows is about a trace: give --trace"),
        ("--time-unit s", "--time-unit is about a trace: give --trace"),
        ("--trace unit", "unit: are its times seconds or milliseconds? They are whole, with no ha"),
        (
            "--trace text",
            "'prompt' seems to be text: give its tokens as prompt_tokens; there are n",
        ),
        ("--speed-of t4", "--speed-of is about a trace: give --trace"),
        ("--trace", "argument --trace: expected one argument"),
        *(
            (f"--trace good --rate={text}", "argument --rate: ")
            for text in ("0", "-1", "x", "", "nan", "1e7", "1e-7", "-inf", "1_0", "\u0663")
        ),
        *(
            (f"--trace good --preemption-rate={text}", "argument --preemption-rate: ")
            for text in ("1", "-0.1", "x", "", "nan", "inf", "1e999")
        ),
        *(
            (f"--trace good --trace-rows={text}", "argument --trace-rows: ")
            for text in ("0", "-1", "1.5", "")
        ),
    ],
)
def test_what_cannot_be_had_takes_one_line(args, told, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "good": "time,input_len,output_len\n0,9,9\n1,9,9\n",
        "bare": "input_len,output_len\n9,9\n",
        "zeros": "time,input_len,output_len\n0,9,0\n1,9,0\n",
        "other": "a,b\n1,2\n",
        "unit": UNKNOWN.format(1) + UNKNOWN.format(2),
        "text": '{"prompt": "What is the capital of India?", "output_tokens": 128}',
        "long": "time,input_len,output_len\n0,2000,49\n",
    }.items():
        (tmp_path / name).write_text(text)
    before = sorted(os.listdir(tmp_path))
    reason = refused(capacity, *args.split(" "), "--json", "out.json")
    assert told in reason and len(reason) < 600
    assert sorted(os.listdir(tmp_path)) == before


def test_too_much_at_a_time_takes_one_line(write, capfd, monkeypatch):
    monkeypatch.setattr("vllm_sim.sizing.trace_serving.FIRST_POOL", 16)
    monkeypatch.setattr("vllm_sim.sizing.trace_serving.LARGEST_POOL", 64)
    assert capacity.main(["--trace", write(burst())]) == 2
    assert "the trace needs more than 64 blocks of 16 slots at a time" in capfd.readouterr().err


# ---- a real one -------------------------------------------------------------------------------


@needs_data
@pytest.mark.slow
def test_the_azure_conversations(run, capfd):
    """docs/capacity.md's example."""
    path = Path(os.environ["LENGTHS_DIR"]) / "AzureLLMInferenceTrace_conv.csv.gz"
    assert capacity.main(["--gpu", "h100", "--trace", str(path)]) == 0
    printed = capfd.readouterr().out
    page = (ROOT / "docs" / "capacity.md").read_text(encoding="ascii")
    shown = page.split("## An example")[1].split("```\n")[1].split("```")[0]
    for line in shown.strip().splitlines():
        assert line == "..." or line in printed.splitlines()
