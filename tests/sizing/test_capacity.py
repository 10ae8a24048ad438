"""`python capacity.py` as a user meets it, and the sizes and simulations that it stands on."""

import json
import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import capacity
from kv_cache_manager import MemoryUsage
from vllm_sim import paper
from vllm_sim.models import DEPLOYMENTS, MODELS
from vllm_sim.models.memory_plan import logged_concurrency
from vllm_sim.serving.systems import POLICIES
from vllm_sim.sizing.answers import BLOCK_SIZES, FORKS, block_sizes, copies_per_fork
from vllm_sim.sizing.case import named_gpu
from vllm_sim.sizing.concurrency import (
    SAMPLE,
    WorkloadNameError,
    hold,
    longest_request,
    means,
    parse_workload,
)

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--workload", "30,20")  # short requests: simulated in no time


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """(what was printed, the JSON) of a run that succeeds."""

    def run(*args):
        if set(QUICK) <= set(args):
            monkeypatch.setattr("vllm_sim.sizing.concurrency.COMPLETIONS", 100)
            monkeypatch.setattr("vllm_sim.sizing.concurrency.ENOUGH_REQUESTS", 50)
        path = tmp_path / "out.json"
        code = capacity.main([*map(str, args), "--quiet", "--json", str(path)])
        printed, errors = capfd.readouterr()
        assert (code, errors) == (0, "") and printed.isascii()
        return printed, json.loads(path.read_text(encoding="ascii"))

    return run


def section(found, start):
    """The rows under the question that starts so."""
    (rows,) = [t["rows"] for t in found["tables"] if t["title"].startswith(start)]
    return rows


# ---- what it prints ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", paper.TABLE1)
def test_table_1_comes_out_as_published(run, name):
    deployment = DEPLOYMENTS[name]
    args = ("--model", name, "--gpu", deployment.gpu.name, "--gpus", deployment.num_gpus)
    printed, found = run(*args, *QUICK)
    setting, derived = found["setting"], paper.TABLE1_DERIVED[name]
    assert (setting["plan"], setting["num_blocks"]) == ("paper", derived["blocks"])
    told = paper.TABLE1[name]["kilo_slots"]
    # The paper cuts or rounds to a digit: within one of it.
    assert abs(setting["num_slots"] / 1000 - told) < 0.1
    assert f"(Table 1: {told}K)" in printed
    rows = section(found, "How many blocks")
    assert rows[-1]["number"] == told and rows[-2]["number"] == derived["slots"]


def test_the_formula_with_its_inputs(run):
    printed, found = run(*QUICK)
    assert "2 x 40 x 40 x 128 x 2 = 819,200 bytes a token" in printed
    rows = section(found, "How many bytes")
    assert [row["value"] for row in rows] == [2, 40, 128, 40, 2, 819_200, 819_200]


def test_the_answer_first_then_tables_with_their_settings_above_and_a_sentence_below(run):
    printed, found = run(*QUICK, "--seed", 3)
    first, *lines = printed.splitlines()
    paged = section(found, "How many requests")[-1]["requests"]
    told = f"{paged:,.0f} requests of 30 + 20 tokens (geometric lengths) at a time"
    assert first == found["answer"] == f"opt-13b on 1 x a100-40gb, fp16 K/V: {told}"
    line = r"^\(opt-13b, fp16 weights, fp16 K/V, 1 x a100-40gb of 39\.39 GiB, "
    assert len(re.findall(line, printed, re.MULTILINE)) == len(found["tables"]) == 6
    assert max(map(len, lines)) <= 100
    whole = " ".join(printed.split())
    for part in found["tables"]:
        assert f"{part['title']}\n(" in printed and f"{part['answer']} " in f"{whole} "
        assert part["title"].endswith("?") and part["rows"] and part["answer"].endswith(".")
    assert "geometric lengths of mean 30 + 20 tokens, seed 3" in whole


def test_lengths_are_fixed_if_so_asked_and_two_allocators_are_told_apart(run):
    printed, found = run(*QUICK, "--lengths", "fixed", "--max-model-len", 50)
    assert " requests of 30 + 20 tokens (fixed lengths) at a time\n" in printed
    sizes = {row["counted"]: row for row in section(found, "How many requests")}
    assert sizes["all at the workload's mean final length"]["tokens_a_request"] == 50
    # A request of 50 slots is four blocks, or a chunk of 64 slots, whatever else differs.
    full, chunks = sizes["all at full length"]["requests"], sizes["simulated: max"]["requests"]
    assert (full, chunks) == (983 / 4, 245)
    told = next(part["answer"] for part in found["tables"] if part["id"] == "concurrency")
    assert "paging would hold 245 requests if all had 50 tokens; of this workload it hol" in told
    assert f"and reservations of 64 slots, whatever the request, {chunks:.1f}" in told
    held = means(parse_workload("30,20", fixed=True), 2048, 0)
    assert (held.prompt, held.output, held.held) == (30, 20, pytest.approx(30 + 19 / 2))


def test_types_are_those_of_the_configuration_unless_given(run, config):
    for key, stored, given, weights, kept in (
        ("torch_dtype", "bfloat16", (), "bf16", "bf16"),
        ("dtype", "bfloat16", ("--dtype", "fp8"), "fp8", "bf16"),
        ("dtype", "float32", (), "fp16", "fp16"),
        ("dtype", 7, ("--kv-dtype", "fp8"), "fp16", "fp8"),
    ):
        printed, _ = run("--model", config("Llama-3.2-1B", **{key: stored}), *given, *QUICK)
        assert f"\n(Llama-3.2-1B, {weights} weights, {kept} K/V, " in printed
        assert ("stored in 32 bits" in printed) == (stored == "float32")


def test_default_run_is_the_papers_finding(run):
    """Paging holds several times as many requests as reservations, nearly all slots tokens."""
    _, found = run()
    held = {row["counted"]: row["requests"] for row in section(found, "How many requests")}
    batches = [held[f"simulated: {policy}"] for policy in POLICIES]
    assert batches == sorted(batches) and batches[0] == 7.0
    assert batches[3] > 2 * batches[2]
    assert held["all at full length"] == 983 / 128
    for row in section(found, "Where does every slot"):
        assert sum(row[part] for part in MemoryUsage.PARTS) == pytest.approx(15_728)
        assert row["padding" if row["policy"] != "paged" else "reserved"] == 0
    paged = section(found, "Where does every slot")[-1]
    assert paged["tokens_percent"] > 93


def test_same_seed_same_output_and_another_seed_differs(run):
    def stable(result):
        return result[0], {k: v for k, v in result[1].items() if k != "elapsed_s"}

    args = (*QUICK, "--block-size", 8, "--seed")
    first, again, other = (run(*args, n) for n in (0, 0, 1))
    assert stable(first) == stable(again) != stable(other)


def test_json_has_exactly_the_promised_keys(run):
    _, found = run(*QUICK)
    keys = "schema script options versions setting answer tables exit_code seeds checks elapsed_s"
    assert sorted(found) == sorted(keys.split())
    keys = "model family parameters active_parameters layers hidden_size heads kv_heads head_size"
    keys += " gpu gpus memory_bytes plan dtype kv_dtype kv_bytes_per_token weight_bytes_per_gpu"
    keys += " kv_cache_bytes_per_gpu num_blocks block_size num_slots max_model_len workload"
    keys += " prefix_len seed notes expert_parameters encoder_parameters other_bytes_per_token"
    keys += " state_bytes_per_sequence pipeline_parallel layer_kinds engine max_num_seqs"
    keys += " max_num_batched_tokens"
    assert sorted(found["setting"]) == sorted(keys.split())
    for part in found["tables"]:
        assert list(part) == ["id", "title", "setting", "headers", "index", "rows", "answer"]
    assert found["setting"]["parameters"] == MODELS["opt-13b"].num_params


def test_formats(run):
    printed, _ = run(*QUICK, "--format", "github")
    tables = 0
    for line, following in pairwise(printed.split("\n")):
        if re.fullmatch(r"\|[-:|]+\|", following):
            assert line.count("|") == following.count("|")
            tables += 1
    assert tables == 6
    printed, _ = run(*QUICK, "--format", "latex")
    outside = re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", printed, flags=re.DOTALL)
    assert [line for line in outside.split("\n") if line and not line.startswith("%")] == []


def test_grouped_heads_and_copies_of_them(run, config):
    path = config("Llama-3-70B")
    printed, found = run("--model", path, "--gpu", "H100", "--gpus", 4, *QUICK)
    assert "4 x H100 of" in printed and "not the 64 query heads that share them" in printed
    assert "it would be 8.0 times that" in printed and "2 of 8 K/V heads" in printed
    assert section(found, "How many bytes")[-1]["value"] == 2 * 80 * 2 * 128 * 2
    printed, found = run("--model", path, "--gpu", "h100", "--gpus", 16, *QUICK)
    assert "fewer K/V heads than GPUs: each is copied to 2 of them" in printed
    assert section(found, "How many bytes")[-1]["value"] == 2 * 80 * 1 * 128 * 2


def test_a_latent_cache(run, config):
    args = ("--model", "deepseek-v3", "--gpu", "b200", "--gpus", 8, *QUICK)
    printed, found = run(*args)
    assert "576 x 61 x 2 = 70,272 bytes a token" in printed
    # Real K (192) and V (128) of 128 heads would be 40,960 elements a layer, not 576.
    assert f"it would be {40_960 / 576:.1f} times that" in printed
    assert "whole on every GPU" in printed and "MTP" in printed
    assert found["setting"]["notes"]
    _, half = run(*args, "--kv-dtype", "fp8")
    assert 2 * half["setting"]["kv_bytes_per_token"] == found["setting"]["kv_bytes_per_token"]


def test_windows_by_length(run, config):
    printed, found = run("--model", config("Gemma-3-1B"), "--gpu", "t4", *QUICK)
    rows = section(found, "How do the bytes")
    by_length = {row["tokens"]: row for row in rows}
    assert by_length[512]["percent_of_it"] == 100.0
    at = by_length[32_768]
    kept = 4 * 32_768 + 22 * 512
    assert at["with_windows_mib"] == kept * 2 * 256 * 2 / 2**20
    assert at["percent_of_it"] == 100 * kept / (26 * 32_768)
    assert "22 layers keep 512 tokens, 4 layers keep all" in " ".join(printed.split())
    rows = {row["counted"]: row["requests"] for row in section(found, "How many requests")}
    setting = found["setting"]
    block = 16 * 2 * 256 * 2  # bytes of one of a layer
    needed = 4 * 2048 + 22 * 32  # blocks of a request of full length
    fit = setting["kv_cache_bytes_per_gpu"] / (needed * block)
    assert rows["all at full length"] == pytest.approx(fit)
    # Four of 26 layers to a group: seven groups, of which six have windows.
    pool = setting["kv_cache_bytes_per_gpu"] // (4 * block)
    logged = rows["what vLLM logs as maximum concurrency"]
    assert logged == pytest.approx(pool / (2048 + 6 * ((511 + 2048 + 15) // 16 + 1)))
    assert f"logs as its maximum concurrency, {logged:,.1f}, pads" in " ".join(printed.split())
    # A window as long as the longest request bounds nothing, so nothing is said of it.
    _, found = run("--model", config("Gemma-3-1B"), "--max-model-len", 512, *QUICK)
    assert len(found["tables"]) == 6


def test_quantised_checkpoints_say_so_themselves(run, config, refused):
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = config("Llama-3-8B", quantization_config=stored)
    printed, found = run("--model", path, "--gpu", "l4", *QUICK)
    assert "Llama-3-8B, fp8 weights, bf16 K/V" in printed
    assert found["setting"]["weight_bytes_per_gpu"] < 9.2e9
    assert "is quantised already, as fp8" in refused(capacity, "--model", path, "--dtype", "fp8")


def test_no_request_fits_at_full_length(run, config):
    path = config("Llama-3.2-1B")
    printed, found = run("--model", path, "--gpu-memory", 5.5, *QUICK)
    rows = section(found, "How many requests")
    assert 0 < rows[0]["requests"] < 1 and rows[3]["requests"] == 0.0
    assert "not one request fits at full length" in " ".join(printed.split())


def test_requests_that_are_cut_are_told(run):
    printed, _ = run("--workload", "1500,1500")
    printed = " ".join(printed.split())
    share = re.search(r"; (\d+\.\d) % of the requests cut to the maximum", printed)
    assert 40 < float(share[1]) < 70
    assert re.search(r"at a time, \d\d % of them cut to 2,048 tokens How many bytes", printed)
    assert re.search(r"it holds [^;]*; \d+ % of it was longer than the maximum", printed)


# ---- how it starts ----------------------------------------------------------------------------


def modules_after(run_script, code):
    done = run_script("-c", f"import sys\n{code}\nprint(*sys.modules)")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[-2].split()


def test_help_loads_next_to_nothing(run_script):
    code = "import capacity\ncapacity.build_parser().format_help()"
    loaded = {name.rpartition(".")[2] for name in modules_after(run_script, code)}
    assert not {"torch", "numpy", "tabulate", "serving", "workload"} & loaded


def test_a_whole_run_loads_no_torch(run_script):
    code = "import capacity\nassert not capacity.main(['--workload', '30,20', '--quiet'])"
    assert "torch" not in modules_after(run_script, code)


def test_help_has_every_option_from_any_folder(run_script, tmp_path):
    done = run_script("capacity.py", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.isascii()
    options = "model gpu gpu-memory gpus dtype kv-dtype plan allowance gpu-memory-utilization"
    options += " max-model-len block-size workload prefix-len seed json figures format quiet"
    options += " trace preemption-rate rate trace-rows speed-of lengths"
    assert all(f"--{option} " in done.stdout for option in options.split())
    assert "docs/capacity.md" in done.stdout


# ---- input that cannot be used ----------------------------------------------------------------

NOT_POSITIVE = ("0", "-1", "abc", "", "1.5", "1e3", "9" * 400, "nan", "\u0663")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--gpus", NOT_POSITIVE),
        ("--block-size", NOT_POSITIVE),
        ("--max-model-len", NOT_POSITIVE),
        ("--prefix-len", NOT_POSITIVE),
        ("--gpu-memory", ("0", "-1", "x", "", "nan", "inf", "1e6", "9" * 400, "\u0663")),
        ("--allowance", ("0", "-1", "x", "", "nan", "1e400")),
        ("--gpu-memory-utilization", ("0", "-0.5", "1.01", "x", "", "nan")),
        ("--gpu", ("a100", "H-100", "", "a\nb")),
        ("--dtype", ("fp32", "int4", "")),
        ("--kv-dtype", ("fp4", "")),
        ("--plan", ("mine", "")),
        ("--seed", ("-1", "4294967296", "x", "")),
        ("--format", ("html", "")),
    ],
)
def test_value_that_cannot_be_used_is_named_in_one_line(option, values, refused):
    for value in values:
        reason = refused(capacity, f"{option}={value}")
        assert reason.startswith(f"argument {option}: ") and len(reason) < 250, value


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("--model opt-14b", "no model 'opt-14b': neither a file nor one of opt-125m"),
        ("--model .", "a folder without a config.json"),
        ("--model /dev/null", "not a regular file"),
        ("--model README.md", "not JSON"),
        ("--gpu t4", "opt-13b does not fit: 0.9 of the 14.56 GiB of a GPU are 13.10 GiB, of which"),
        ("--gpu t4", "one block of 16 slots 0.01 GiB; 4 such GPUs would do"),
        ("--model opt-175b --gpus 8", "does not fit: 0.9 of the 39.39 GiB of each of 8 GPUs"),
        ("--model opt-175b --gpu-memory 2", "; no number of such GPUs up to 1,024 would do"),
        ("--lengths fixed", "--lengths fixed is for --workload P,O"),
        ("--lengths fixed --workload alpaca", "--lengths fixed is for --workload P,O"),
        ("--plan paper --gpu t4", "opt-13b does not fit: 0.95 of the 14.56 GiB of a GPU are"),
        ("--plan paper --dtype fp8", "--plan paper is for opt-125m"),
        ("--plan paper --kv-dtype fp8", "--plan paper is for opt-125m"),
        ("--plan paper --allowance 2", "--plan paper has its own"),
        ("--plan paper --gpu-memory-utilization 0.9", "--plan paper has its own"),
        ("--gpu t4 --gpu-memory 14", "--gpu and --gpu-memory are two answers"),
        ("--gpus 3", "40 query heads cannot be split over 3 GPUs"),
        ("--gpus 2000", "--gpus 2000: at most 1,024"),
        ("--block-size 5000", "--block-size 5000: at most 4,096"),
        ("--block-size 4096 --plan paper --gpu-memory 28", "one block of 4096 slots 3.12 GiB"),
        ("--max-model-len 2049", "opt-13b goes up to 2,048 tokens"),
        ("--max-model-len 1", "a longest request of 1 tokens is not 2 to"),
        ("--max-model-len 99999999", "--max-model-len 99999999: at most 16,777,216"),
        ("--prefix-len 99999999", "--prefix-len 99999999: at most"),
        ("--workload books", "workload 'books' is not sharegpt, alpaca or two means"),
        ("--bogus", "unrecognized arguments: --bogus"),
        ("--gpus", "argument --gpus: expected one argument"),
    ],
)
def test_what_cannot_be_had_takes_one_line(args, told, refused, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert told in refused(capacity, *args.split())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"model_type": "mamba"}', "says no longest request: give --max-model-len"),
        (b'{"model_type": "wonder"}', "is not one that transformers"),
        (b'{"model_type": "llama", "hidden', "not JSON"),
        (b"\xff\n", "not a JSON file"),
    ],
)
def test_a_bad_configuration_takes_one_line_of_a_process(content, told, tmp_path, run_script):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    done = run_script("capacity.py", "--model", path, "--json", tmp_path / "out.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and told in done.stderr
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_model_without_a_longest_request_asks_for_one(run, config, refused):
    path = config("BLOOM-560M")
    assert "give --max-model-len" in refused(capacity, "--model", path)
    _, found = run("--model", path, "--max-model-len", 4096, *QUICK)
    assert found["setting"]["max_model_len"] == 4096


# ---- the simulation ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sharegpt", "ALPACA", "400,100", "20,600"])
@pytest.mark.parametrize("block_size", [8, 32])
def test_paging_agrees_with_division_by_the_mean_length_held(name, block_size):
    """Little's law: a pool nearly full of tokens holds its slots over what a request holds."""
    workload = parse_workload(name)
    slots = 60_000
    found = hold(workload, "paged", slots // block_size, block_size, 2048, 0)
    expected = slots / (means(workload, 2048, 0).held + (block_size - 1) / 2)
    assert found.requests == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("policy", POLICIES)
def test_slots_sum_to_the_capacity(policy):
    found = hold(parse_workload("sharegpt"), policy, 5000, 16, 2048, 1)
    assert set(found.slots) == set(MemoryUsage.PARTS)
    assert sum(found.slots.values()) == pytest.approx(80_000)
    assert all(slots >= 0 for slots in found.slots.values())


def test_max_holds_as_many_requests_as_there_are_chunks():
    workload = parse_workload("30,20")
    assert hold(workload, "max", 100, 16, 512, 0).requests == 3  # chunks of 32 blocks
    assert hold(workload, "max", 100, 16, 513, 0).requests == 1  # of 64
    empty = hold(workload, "max", 100, 16, 2048, 0)  # of 128: none
    assert empty.requests == 0 and empty.slots["free"] == 1600
    large = hold(workload, "max", 71 * 32 + 28, 16, 512, 0)  # of which 64 chunks are simulated
    assert large.requests == 71 and large.slots["free"] == pytest.approx(28 * 16)


@pytest.mark.parametrize("policy", ["pow2", "oracle", "paged"])
def test_a_part_of_a_large_pool_stands_for_it(policy, monkeypatch):
    workload = parse_workload("60,60")
    part = hold(workload, policy, 16_000, 16, 2048, 0)
    assert part.simulated_blocks < 9000
    monkeypatch.setattr("vllm_sim.sizing.concurrency.ENOUGH_REQUESTS", 10**6)
    whole = hold(workload, policy, 16_000, 16, 2048, 0)
    assert whole.simulated_blocks == 16_000
    assert part.requests == pytest.approx(whole.requests, rel=0.06)


def test_requests_too_long_for_the_pool_are_cut(monkeypatch):
    """However small the pool, every policy but max runs what is cut to it."""
    monkeypatch.setattr("vllm_sim.sizing.concurrency.COMPLETIONS", 100)
    workload = parse_workload("5000,5000")
    for num_blocks in (1, 2, 3, 7, 8, 9, 100):
        longest = longest_request(num_blocks, 16, 10**6) if num_blocks > 1 else 0
        for policy in ("pow2", "oracle", "paged"):
            if not longest:
                with pytest.raises(ValueError, match="too few for any request"):
                    hold(workload, policy, num_blocks, 16, 10**6, 0)
                continue
            found = hold(workload, policy, num_blocks, 16, 10**6, 0)
            assert 0 < found.requests <= num_blocks and longest <= 16 * num_blocks


def test_a_queue_that_was_guessed_too_short_is_made_longer(monkeypatch):
    """Half the requests are long prompts with an answer of one token: more of them come and go
    than lengths on average say."""

    class Skewed:
        queued = ()

        def sample(self, count, max_len, seed):
            self.queued += (count,) * (count != SAMPLE)
            odd = np.arange(count) % 2
            return np.where(odd, 1, 400), np.where(odd, 60, 1)

    monkeypatch.setattr("vllm_sim.sizing.concurrency.COMPLETIONS", 1000)
    workload = Skewed()
    found = hold(workload, "paged", 1000, 16, 512, 0)
    guess, *more = workload.queued
    assert more == [guess * 2, guess * 4]
    assert sum(found.slots.values()) == pytest.approx(16_000)
    expected = 16_000 / (means(workload, 512, 0).held + 7.5)
    assert found.requests == pytest.approx(expected, rel=0.04)


def test_geometric_lengths_have_their_means():
    prompts, outputs = parse_workload("700,90").sample(40_000, 10**9, 0)
    assert prompts.mean() == pytest.approx(700, rel=0.03)
    assert outputs.mean() == pytest.approx(90, rel=0.03)
    assert min(prompts.min(), outputs.min()) == 1
    prompts, outputs = parse_workload("700,90").sample(1000, 50, 0)
    assert (prompts + outputs).max() == 50 and outputs.min() == 1


def test_means_by_hand():
    class Fixed:
        def sample(self, count, max_len, seed):
            prompts, outputs = np.full(count, 10), np.tile([1, 9], count // 2)
            return prompts, np.minimum(outputs, max_len - prompts)

    found = means(Fixed(), 15, 0)
    assert (found.prompt, found.output, found.share_cut) == (10, 3, 0.5)
    # One iteration at 10 tokens, five at 10 to 14.
    assert found.held == pytest.approx((10 + 60) / 6)
    assert found.final == 13


def test_workloads_that_are_none():
    texts = ["", ",", "1,", "a,b", "1.5,2", "+1,2", "\u0663,1", "9" * 99, "12", "0,5", "5,-1"]
    for text in (*texts, "5,1000001", "1,2,3"):
        with pytest.raises(WorkloadNameError):
            parse_workload(text)


# ---- the block size ---------------------------------------------------------------------------


def test_a_fork_copies_once_unless_the_last_block_is_full():
    for size in (1, 4, 16):
        prompts = list(range(1, 65))
        assert copies_per_fork(prompts, size) == sum(p % size > 0 for p in prompts) / 64


def test_block_sizes_by_hand(run):
    _, found = run(*QUICK, "--prefix-len", 100)
    rows = {row["block_size"]: row for row in section(found, "What does the block size")}
    assert set(rows) == set(BLOCK_SIZES)
    assert rows[16]["blocks"] == 983 and rows[16]["prefix_shared_percent"] == 96
    assert rows[32]["prefix_shared_percent"] == 96 and rows[64]["prefix_shared_percent"] == 64
    assert rows[256]["prefix_shared_percent"] == 0 and rows[256]["table_bytes"] == 4 * 8
    assert rows[1]["padding_slots"] == rows[1]["copies_a_fork"] == 0
    assert rows[16]["mib_a_copy"] == 12.5
    lengths = np.add(*parse_workload("30,20").sample(FORKS, 2048, 0))
    for size, row in rows.items():
        assert row["padding_slots"] == np.mean(np.ceil(lengths / size) * size - lengths)


def test_without_a_prefix_nothing_is_said_of_one(case_of):
    case = case_of(*QUICK)
    found = [
        block_sizes(replace(case, prefix_len=length), means(case.workload, case.max_len, 0))
        for length in (100, 0)
    ]
    (some, none) = (one.records() for one in found)
    assert "; 96 % of a 100-token prefix is in whole blocks." in found[0].answer
    assert "prefix" not in found[1].answer and found[1].answer.endswith(" 2,048 tokens.")
    assert all(row["prefix_shared_percent"] is not None for row in some)
    assert none == [row | {"prefix_shared_percent": None} for row in some]


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_gpus_by_the_names_that_logs_have(device, gpu):
    assert named_gpu(device) == gpu


def test_a_pipeline_without_windows_logs_what_fits(case_of):
    plan = case_of("--model", "llama-3.1-8b", "--gpu", "h100", "--pipeline-parallel", 4).plan
    assert logged_concurrency(plan, 8192) == pytest.approx(plan.num_slots / 8192, rel=1e-3)
