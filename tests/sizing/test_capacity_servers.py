"""capacity.py beside real servers: startup logs, engines, pipelines, models of any kind."""

import json
from pathlib import Path

import pytest
from tiny_models import TINY

import capacity
from vllm_sim.models.memory_plan import ENGINES
from vllm_sim.sizing import measured
from vllm_sim.sizing.log_answers import off

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--workload", "30,20")
LOG = {
    "version": "vLLM API server version 0.19.0",
    "args": "non-default args: {'model': 'meta-llama/Llama-3.1-8B-Instruct', "
    "'gpu_memory_utilization': 0.95, 'max_num_seqs': 8}",
    "engine": "Initializing a V1 LLM engine (v0.19.0) with config: "
    "model='meta-llama/Llama-3.1-8B-Instruct', dtype=torch.bfloat16, max_seq_len=8192, "
    "tensor_parallel_size=1, pipeline_parallel_size=1, kv_cache_dtype=auto",
    "gpu": "GPU 0: NVIDIA H100 80GB HBM3",
    "weights": "Model loading took 14.99 GiB memory and 3.1 seconds",
    "kv": "Available KV cache memory: 58.57 GiB",
    "tokens": "GPU KV cache size: 479,808 tokens",
    "most": "Maximum concurrency for 8,192 tokens per request: 58.57x",
}


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """(what was printed, the JSON) of a run that succeeds."""

    def run(*args):
        monkeypatch.setattr("vllm_sim.sizing.concurrency.COMPLETIONS", 100)
        monkeypatch.setattr("vllm_sim.sizing.concurrency.ENOUGH_REQUESTS", 50)
        path = tmp_path / "out.json"
        code = capacity.main([*map(str, args), "--quiet", "--json", str(path)])
        printed, errors = capfd.readouterr()
        assert (code, errors) == (0, "") and printed.isascii()
        return " ".join(printed.split()), json.loads(path.read_text(encoding="ascii"))

    return run


@pytest.fixture
def log(tmp_path):
    """log(kv="Available ...") writes the log with changes, None for a line that is not there."""

    def write(**changes):
        path = tmp_path / "server.log"
        path.write_text("\n".join(line for line in (LOG | changes).values() if line) + "\n")
        return path

    return write


@pytest.fixture
def tiny(tmp_path):
    """tiny("jamba", num_hidden_layers=2) is the path of that configuration."""
    pytest.importorskip("transformers")

    def write(name, **changes):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(TINY[name] | changes))
        return path

    return write


def table(found, name):
    """The rows of a table, by their first cell."""
    (rows,) = [one["rows"] for one in found["tables"] if one["id"] == name]
    return {next(iter(row.values())): [*row.values()][1:] for row in rows}


# ---- logs -------------------------------------------------------------------------------------


def test_each_part_beside_what_the_server_logged(run, log):
    printed, found = run("--log", log())
    setting, rows = found["setting"], table(found, "log")
    assert (setting["model"], setting["gpu"], setting["engine"]) == (
        "llama-3.1-8b",
        "h100",
        "vllm-0.19",
    )
    assert (setting["max_model_len"], setting["max_num_seqs"]) == (8192, 8)
    ours, logged, difference, percent = rows["K and V"]
    assert logged == 58.57 and ours == setting["kv_cache_bytes_per_gpu"] / 2**30
    assert difference == ours - logged and percent == 100 * (ours / logged - 1)
    assert rows["tokens"][:2] == [setting["num_slots"], 479_808]
    logged_as = "what vLLM logs as maximum concurrency, 8,192 tokens"
    assert rows[logged_as][:2] == [pytest.approx(setting["num_slots"] / 8192), 58.57]
    assert rows["activations"][1:] == [None, None, None]
    assert found["answer"].startswith(
        f"llama-3.1-8b on 1 x h100: {ours:.2f} GiB for K and V on each GPU, logged 58.57 ("
    )
    assert "on vLLM 0.19.0" in printed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": "Model loading took 20.00 GiB memory"}, "off is weights: 14.99 GiB by our"),
        (
            {
                "weights": "Model loading took 20.00 GiB memory",
                "more": "torch peak memory increase: 9.00 GiB",
            },
            "off is activations: 0.91 GiB by our plan, 9.00 in the log; then weights.",
        ),
        ({"kv": "Available KV cache memory: 40.00 GiB"}, "K and V are off, and the log does not"),
        (dict.fromkeys(("weights", "kv")), "no part is off by more"),  # K and V by its tokens
        ({"kv": "Available KV cache memory: 58.88 GiB"}, "no part is off by more than 0.1 GiB"),
    ],
)
def test_what_is_off_is_named(run, log, changes, said):
    printed, found = run("--log", log(**changes))
    assert said in printed
    assert "logged" in found["answer"]


def test_near_is_not_off():
    assert not off(1.0, 1.09) and off(1.0, 1.11)  # 0.1 GiB
    assert not off(98.1, 100.0) and off(97.9, 100.0)  # 2 %
    assert not off(None, 1.0) and not off(1.0, None)


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"gpu": None}, (), "server.log does not say which GPU: give --gpu or --gpu-memory"),
        ({"gpu": "GPU 0: Wonder 9000"}, (), "does not say which GPU"),
        (
            dict.fromkeys(("args", "engine"), "config: model='acme/Wonder', max_seq_len=8192"),
            (),
            "",
        ),
        (dict.fromkeys(LOG), (), "no line of a vLLM startup log"),
        ({}, ("--trace", "x.csv"), "--log and --trace are two questions"),
        ({}, ("--plan", "paper"), "--log and --plan are two questions"),
    ],
)
def test_what_a_log_does_not_say_is_asked_for(log, refused, changes, options, said):
    if not said:
        changes = {"args": "non-default args: {'model': 'acme/Wonder'}", "engine": None}
        said = "its model 'acme/Wonder' is no preset: give --model its config.json"
    assert said in refused(capacity, "--log", log(**changes), *options)


def test_options_go_before_what_a_log_says(run, log, tiny):
    path = log(gpu=None)
    options = ("--gpu", "h200", "--max-num-seqs", 99, "--gpu-memory-utilization", 0.5)
    _, found = run("--log", path, *options, "--engine", "vllm-0.21", "--max-model-len", 4096)
    setting = found["setting"]
    assert (setting["gpu"], setting["max_num_seqs"], setting["max_model_len"]) == ("h200", 99, 4096)
    assert setting["engine"] == "vllm-0.21" and table(found, "memory")["held back"][3] > 49.9
    _, found = run("--log", path, "--model", tiny("llama"), "--gpu-memory", 80, *options[2:4])
    assert found["setting"]["model"] == "llama" and found["setting"]["memory_bytes"] == 80 * 2**30


def test_a_pipeline_and_a_total_in_a_log(run, log):
    engine = LOG["engine"].replace("pipeline_parallel_size=1", "pipeline_parallel_size=2")
    total = "Free memory on device (78.00/79.19 GiB) on startup"
    printed, found = run("--log", log(engine=engine, total=total))
    assert found["setting"]["pipeline_parallel"] == 2 and found["setting"]["gpus"] == 2
    assert found["setting"]["memory_bytes"] == int(79.19 * 2**30)
    assert "2 stages of 1 x h100" in printed and "stage 1 of 2, which has the least" in printed


def test_windows_print_both_concurrencies_each_by_its_name(run, log, tiny):
    model = tiny("gemma3_text")
    most = "Maximum concurrency for 512 tokens per request: 999.00x"
    engine = LOG["engine"].replace("8192", "512")
    _, found = run("--log", log(most=most, engine=engine), "--model", model)
    rows = table(found, "log")
    assert rows["blocks"][0] is None and rows["tokens"][0] is None  # a server's are of groups
    kv = found["setting"]["kv_cache_bytes_per_gpu"]
    ours, logged, *_ = rows["what vLLM logs as maximum concurrency, 512 tokens"]
    assert logged == 999.0 and ours == pytest.approx(kv / (64 * 16) / (32 + 3 * 33))
    assert rows["requests of 512 tokens, windows counted"][0] == kv / (64 * (512 + 3 * 16))


# ---- engines, pipelines, limits ---------------------------------------------------------------


def test_versions_differ_in_what_they_take(run):
    args = ("--model", "llama-3.1-8b", "--gpu", "h100", *QUICK)
    found = {name: run(*args, "--engine", name) for name in ENGINES}
    kv = {name: one["setting"]["kv_cache_bytes_per_gpu"] for name, (_, one) in found.items()}
    graphs = int((0.15 + 0.018 * 32) * 2**30)
    assert kv["vllm-0.19"] - kv["vllm-0.21"] == graphs
    assert table(found["vllm-0.21"][1], "memory")["CUDA graphs"][0] == graphs
    assert kv["vllm-0.16"] < kv["vllm-0.21"]
    assert run(*args)[1]["setting"]["kv_cache_bytes_per_gpu"] == kv["vllm-0.19"]
    assert "memory as vLLM 0.21 and later plan 0.9 of it" in found["vllm-0.21"][0]


def test_limits_are_said_and_counted(run):
    args = ("--model", "llama-3.1-8b", "--gpu", "h100", *QUICK)
    printed, found = run(*args)
    assert "max_num_seqs 1,024 and max_num_batched_tokens 8,192" in printed
    assert ", of which max_num_seqs lets 1,024 run" in found["answer"]
    rows = table(found, "concurrency")
    assert rows["max_num_seqs: as many run at the most"] == [None, 1024]
    _, few = run(*args, "--max-num-seqs", 64, "--max-num-batched-tokens", 2048)
    assert few["setting"]["max_num_batched_tokens"] == 2048
    saved = few["setting"]["kv_cache_bytes_per_gpu"] - found["setting"]["kv_cache_bytes_per_gpu"]
    assert saved > 960 * 128_256 * 14
    assert "lets 64 run" in few["answer"]


def test_a_pipeline_shares_the_layers(run):
    args = ("--model", "llama-3.1-70b", "--gpu", "h100", "--gpus", 2, *QUICK)
    printed, found = run(*args, "--pipeline-parallel", 2)
    setting = found["setting"]
    assert (setting["gpus"], setting["pipeline_parallel"]) == (4, 2)
    rows = {
        row["factor"]: row
        for t in found["tables"]
        if t["id"] == "bytes_per_token"
        for row in t["rows"]
    }
    each = rows["bytes a token on each GPU"]
    assert each["value"] == 2 * 80 * 8 * 128 * 2 // 4
    assert each["remark"] == "40 of 80 layers, 4 of 8 K/V heads"
    assert "2 stages of 2 x h100" in printed and "stage 2 of 2, which has the least" in printed


# ---- any model --------------------------------------------------------------------------------


def test_sizes_alone_answer_for_anything(run):
    args = ("--kv-bytes-per-token", 131_072, "--weights-gib", 15, "--gpu", "h100", *QUICK)
    printed, found = run(*args, "--max-model-len", 8192, "--layers", 32, "--pipeline-parallel", 2)
    setting = found["setting"]
    assert (setting["model"], setting["dtype"], setting["kv_dtype"]) == (
        "given sizes",
        *["given"] * 2,
    )
    assert setting["weight_bytes_per_gpu"] == 7.5 * 2**30
    assert setting["num_slots"] == setting["kv_cache_bytes_per_gpu"] // (16 * 65_536) * 16
    assert "activations are those of a hidden size of 8,192" in printed
    _, two = run(*args, "--max-model-len", 8192, "--gpus", 2)
    assert two["setting"]["weight_bytes_per_gpu"] == 7.5 * 2**30


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--kv-bytes-per-token 9", "--kv-bytes-per-token and --weights-gib go together"),
        ("--weights-gib 9", "--kv-bytes-per-token and --weights-gib go together"),
        ("--layers 9", "--layers is for --kv-bytes-per-token and --weights-gib"),
        ("--kv-bytes-per-token 9 --weights-gib 9", "says no longest request: give --max-model-len"),
        (
            "--kv-bytes-per-token 9 --weights-gib 9 --max-model-len 99 --dtype fp8",
            "--dtype is for a model whose layers are known",
        ),
        (
            "--kv-bytes-per-token 9 --weights-gib 9 --max-model-len 99 --layers 2",
            "9 bytes a token are not those of 2 layers",
        ),
        ("--layers 1001", "--layers 1001: at most 1,000"),
        ("--pipeline-parallel 2000", "--pipeline-parallel 2000: at most 1,024"),
        ("--model opt-13b --pipeline-parallel 41", "40 layers cannot be 41 stages"),
        ("--weight-bits 17", "argument --weight-bits: '17' is not a number of bits from 1 to 16"),
        ("--weight-bits 4 --dtype fp8", "--weight-bits and --dtype are two answers"),
        ("--engine vllm-9", "argument --engine: invalid choice: 'vllm-9'"),
        ("--engine vllm-0.19 --plan paper", "--plan paper has its own utilization"),
        ("--max-num-seqs 0", "argument --max-num-seqs: "),
        ("--log none.log", "none.log: cannot be read: No such file or directory"),
    ],
)
def test_what_contradicts_itself_takes_one_line(args, said, refused):
    assert said in refused(capacity, *args.split())


def test_a_hybrid_is_answered(run, tiny):
    """Jamba, tiny: one layer of four keeps K and V, three keep states of 1,536 bytes."""
    printed, found = run("--model", tiny("jamba"), "--gpu", "t4", *QUICK)
    setting = found["setting"]
    assert (setting["kv_bytes_per_token"], setting["state_bytes_per_sequence"]) == (64, 4608)
    assert [(one["count"], one["kind"]) for one in setting["layer_kinds"]] == [
        (3, "state"),
        (1, "full"),
    ]
    fit = setting["kv_cache_bytes_per_gpu"] / (512 * 64 + 4608)
    assert table(found, "concurrency")["all at full length"] == [512, fit]
    assert "64 bytes a token in all layers, and 4,608 bytes a sequence" in printed
    assert "a state, whatever the length" in printed and "states under all" in printed


def test_a_model_of_states_alone_holds_sequences(run, tiny):
    model = tiny("mamba")
    _, found = run("--model", model, "--gpu", "t4", "--max-model-len", 4096, *QUICK)
    setting = found["setting"]
    count = setting["kv_cache_bytes_per_gpu"] // 4608
    assert (setting["num_slots"], setting["kv_bytes_per_token"]) == (0, 0)
    assert table(found, "concurrency") == {"states that fit": [count], "max_num_seqs": [256]}
    assert f": {count:,} requests of 30 + 20 tokens" in found["answer"]
    assert found["tables"][-1]["answer"].startswith(f"{count:,} states of 4,608 bytes")


def test_what_a_checkpoint_states_of_k_and_v_counts(run, tiny):
    scheme = {"num_bits": 8, "type": "float"}
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}}
    stored = {"quant_method": "compressed-tensors", "config_groups": groups}
    path = tiny("llama", quantization_config=stored | {"kv_cache_scheme": scheme})
    _, found = run("--model", path, "--gpu", "t4", *QUICK)
    assert (found["setting"]["kv_dtype"], found["setting"]["kv_bytes_per_token"]) == ("fp8", 128)
    _, found = run("--model", path, "--gpu", "t4", "--kv-dtype", "fp16", "--weight-bits", 4, *QUICK)
    assert (found["setting"]["kv_bytes_per_token"], found["setting"]["dtype"]) == (256, "4-bit")


# ---- how good it is ---------------------------------------------------------------------------


def test_the_errors_that_are_told_are_the_measured_ones():
    path = ROOT / "results" / "measured_servers.json"
    if not path.exists():
        pytest.skip("results/measured_servers.json is not there")
    found = json.loads(path.read_text(encoding="ascii"))["output"]
    rows = [row for t in found["tables"] if t["id"] == "errors" for row in t["rows"]]
    rows = {(row["engine"], row["several"]): row for row in rows if row["engine"] != "all"}
    told = {(one.engine, one.several): one for one in measured.MEASURED}
    assert set(told) == set(rows)
    for kind, row in rows.items():
        assert told[kind].logs == row["logs"]
        for what in ("median", "most"):
            assert getattr(told[kind], what) == pytest.approx(row[what], abs=0.006), (kind, what)


def test_the_first_line_says_how_good_such_answers_were(run, monkeypatch):
    args = ("--model", "llama-3.1-8b", "--gpu", "h100", *QUICK)
    errors = measured.Errors("vllm-0.19", False, 7, 0.44, 3.21)
    monkeypatch.setattr(measured, "MEASURED", (errors,))
    answer = run(*args)[1]["answer"]
    assert answer.endswith(
        "; K/V memory was 0.4 % off in the median, 3.2 % at most, on 7 logs of "
        "vLLM 0.17 to 0.20 on one GPU"
    )
    for more in (("--gpus", 2), ("--engine", "vllm-0.21")):
        assert run(*args, *more)[1]["answer"].endswith(
            "no log of this kind was at hand to hold its memory against"
        )
    assert run(*QUICK)[1]["answer"].endswith("at a time")  # the paper's plan
