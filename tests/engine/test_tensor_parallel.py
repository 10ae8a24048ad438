"""A model over two ranks: the tokens of one process, from one scheduler; ranks that end early.

Each rank is a process of rank_programs.py, in float32: over gloo on the CPU, and over NCCL where
there are two GPUs. There, this file alone:

    python -m pytest -p no:benchmark tests/engine/test_tensor_parallel.py
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import rank_programs
from rank_programs import FAMILIES, serve, worker_of
from small_models import FAMILIES as CONFIGS
from small_models import small
from transformers import AutoConfig, AutoModelForCausalLM

import generate
from vllm_sim.engine import weights
from vllm_sim.engine.fused import fuse
from vllm_sim.engine.ranks import Ranks
from vllm_sim.engine.support import UnsupportedModelError
from vllm_sim.engine.tensor_parallel import SummedLinear, shard

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = Path(rank_programs.__file__)
CPU = torch.device("cpu")
LONGEST_S, LONGEST_ON_GPUS_S = 50.0, 300.0  # kernels are compiled, graphs captured
TWO_GPUS = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=TWO_GPUS)]
ON_GPUS = {"alone": True, "longest_s": LONGEST_ON_GPUS_S}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["rank_programs"])
PATHS = os.pathsep.join(map(str, (ROOT, SCRIPT.parent)))


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture
def on_ranks(tmp_path, monkeypatch):
    """Runs a part of rank_programs.py on two ranks: of each its exit code, stdout and stderr.
    `alone`: as new processes, as users have them, which takes longer. None may take longer than
    `longest_s`."""
    monkeypatch.setenv("PYTHONPATH", PATHS)  # for what FORKS imports too
    started = []

    def run(*args, alone=False, longest_s=LONGEST_S):
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        place["LOCAL_WORLD_SIZE"] = "2"
        files = [[tmp_path / f"{kind}{rank}" for kind in ("out", "errors")] for rank in "01"]
        for rank, (out, errors) in zip("01", files):
            own = {**place, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
            if alone:
                env = {**os.environ, **own}
                with open(out, "w") as stdout, open(errors, "w") as stderr:
                    pipes = {"stdout": stdout, "stderr": stderr}
                    process = subprocess.Popen([sys.executable, SCRIPT, *args], env=env, **pipes)
            else:
                process = FORKS.Process(target=rank_programs.forked, args=(own, out, errors, *args))
                process.start()
            started.append(process)
        end = time.monotonic() + longest_s
        for process in started:
            wait = process.wait if alone else process.join
            with suppress(subprocess.TimeoutExpired):  # it has no exit code then
                wait(max(0.0, end - time.monotonic()))
        codes = [process.returncode if alone else process.exitcode for process in started]
        return [(code, *(path.read_text() for path in pair)) for code, pair in zip(codes, files)]

    yield run
    for process in started:
        process.kill()


def rank(number, size=2):
    return Ranks(number, size, CPU)


# ---- one scheduler -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_two_ranks_give_the_tokens_of_one_process(on_ranks, device):
    """Under memory pressure, tables and tokens compared on both ranks after each order; drawn ones
    too, with a default generator that differs. On GPUs from CUDA graphs, and both ranks end."""
    options = ON_GPUS if device == "cuda" else {}
    (code, out, errors), follower = told = on_ranks("serve", device, **options)
    assert (code, follower[:2]) == (0, (0, "")), told
    assert device == "cuda" or errors == follower[2] == ""  # NCCL and torch may warn
    found = json.loads(out.splitlines()[-1])
    for name, temperature in FAMILIES.items():
        alone = serve(worker_of(name))
        assert min(alone["preemptions"]) > 0
        assert found[name]["preemptions"] == alone["preemptions"]
        assert found[name]["messages"] == found[name]["iterations"] == alone["iterations"]
        assert found[name]["bytes"] > 100 * found[name]["messages"]
        if not temperature:
            assert found[name]["texts"] == alone["texts"]
    assert found["opt, drawn"]["texts"] != found["opt"]["texts"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_holds_other_numbers_is_told_of_on_all_ranks(on_ranks, device):
    told = on_ranks("differ", device, **(ON_GPUS if device == "cuda" else {}))
    line = "RanksDifferError: tables, slots, lengths and tokens: rank 1 has others than rank 0\n"
    if device == "cpu":
        assert told == [(1, "", line)] * 2
    for code, _, errors in told:  # on GPUs torch may warn as well
        assert code == 1 and line in errors, told


@pytest.mark.parametrize("waits", ["host", "device", pytest.param("gpu", marks=TWO_GPUS)])
@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_that_ends_takes_the_other_along_in_one_line(on_ranks, gone, waits):
    told = on_ranks("lose", str(gone), waits, **(ON_GPUS if waits == "gpu" else {}))
    code, out, errors = told[1 - gone]
    assert told[gone][0] == 3 and out == "" and code in (1, 2), told
    if waits == "gpu":  # whichever thread sees it first; NCCL and torch may warn
        assert f"error: rank {gone} has ended" in errors or "RankLostError: another" in errors
        return
    assert told[gone] == (3, "", "")
    line = f"error: rank {gone} has ended" if waits == "device" else "RankLostError: another rank"
    assert errors.startswith(line) and errors.count("\n") == 1 and errors.isascii()


# ---- a rank's share ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_shares_of_all_ranks_make_the_model(family):
    make = partial(AutoConfig.for_model, family, **CONFIGS[family])
    whole, *parts = (AutoModelForCausalLM.from_config(make()) for _ in range(3))
    for number, part in enumerate(parts):
        part.load_state_dict(whole.state_dict())
        shard(part, rank(number))
    one, two = (dict(part.named_parameters()) for part in parts)
    for name, weight in whole.named_parameters():
        dim = 1 if isinstance(parts[0].get_submodule(name.rpartition(".")[0]), SummedLinear) else 0
        if one[name].shape == weight.shape:
            assert one[name].equal(weight) and two[name].equal(weight)
        else:
            assert torch.cat([one[name], two[name]], dim).equal(weight)
    assert sum(w.numel() for w in one.values()) < 0.7 * sum(w.numel() for w in whole.parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_random_shares_differ_and_what_is_whole_does_not(family, tied):
    config = AutoConfig.for_model(family, **{**CONFIGS[family], "tie_word_embeddings": tied})

    def made(number):
        share = partial(shard, ranks=rank(number))
        return weights.random_model(config, CPU, torch.float16, share=share, rank=number)

    one, two = made(0), made(1)
    whole = weights.random_model(config, CPU, torch.float32)
    for (name, weight), (_, other) in zip(one.named_parameters(), two.named_parameters()):
        parted = weight.shape != whole.get_parameter(name).shape and weight.ndim > 1
        assert weight.equal(other) != parted, name
    assert (one.get_input_embeddings().weight is one.lm_head.weight) == tied
    known = AutoModelForCausalLM.from_config(config)
    buffers = dict(known.named_buffers())
    assert {name for name, _ in whole.named_buffers()} == set(buffers)
    assert all(buffer.equal(buffers[name]) for name, buffer in whole.named_buffers())
    assert whole(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_models_that_do_not_part_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="gpt2 is not parted over ranks: opt, llama"):
        shard(small("gpt2"), rank(0))
    with pytest.raises(UnsupportedModelError, match="opt: 4 query heads cannot be divided among 3"):
        shard(small("opt"), rank(0, 3))
    with pytest.raises(UnsupportedModelError, match="llama: 2 K/V heads cannot be divided among 4"):
        shard(small("llama"), rank(0, 4))
    with torch.device("meta"):
        odd = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **{**CONFIGS["llama"], "intermediate_size": 81})
        )
    with pytest.raises(UnsupportedModelError, match="81 rows of an MLP cannot be divided among 2"):
        shard(odd, rank(0))
    for change in (fuse, partial(shard, ranks=rank(0))):
        model = AutoModelForCausalLM.from_config(small("llama").config)
        change(model)
        with pytest.raises(UnsupportedModelError, match="parted, or its layers fused, already"):
            shard(model, rank(0))


# ---- generate.py ---------------------------------------------------------------------------------


def test_generate_prints_the_same_text_on_two_ranks(on_ranks, tmp_path, capsys, monkeypatch):
    small("opt").save_pretrained(tmp_path)
    few = weights.Tokenizer(rank_programs.to_few, rank_programs.to_few, str)
    monkeypatch.setattr(weights.Source, "tokenizer", lambda source: few)
    asked = ["--model", str(tmp_path), "--prompt", "as it is", "--max-new-tokens", "12"]
    asked += ["--device", "cpu", "--quiet", "--beams", "3"]
    assert generate.main(asked) == 0
    alone = capsys.readouterr().out.partition("3 of 3 texts as")[0]
    (code, out, errors), follower = on_ranks("generate", *asked, "--tensor-parallel", alone=True)
    assert (code, errors, follower) == (0, "", (0, "", ""))
    assert "3 of 3 texts as with the library's own cache" in out and "on 2 ranks" in out
    texts = alone[alone.index("Text 1") :]
    assert texts.count("Text") == 3 and texts.partition("\n\n")[0] in out


def test_it_runs_under_torchrun_alone(refused, monkeypatch):
    """Variables that are missing, or not torchrun's, are refused before anything is waited for."""
    sound = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    sound["MASTER_PORT"] = str(free_port())
    for name in sound:
        for value in (None, "", "first", "-1", "9" * 5000):
            if name == "MASTER_ADDR" and value:
                continue  # a name is asked for, however long it takes
            for other, given in sound.items():
                monkeypatch.setenv(other, given)
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
            told = refused(generate, "--tensor-parallel", "--device", "cpu", "--quiet")
            assert name in told or name.startswith("MASTER"), (name, value)
    monkeypatch.delenv("RANK")
    told = refused(generate, "--tensor-parallel", "--device", "cpu")
    assert "no RANK from torchrun: torchrun --nproc-per-node 2" in told


def test_a_pool_that_is_too_small_ends_all_ranks(on_ranks, tmp_path):
    small("llama").save_pretrained(tmp_path)
    asked = ["--model", str(tmp_path), "--prompt", "as it is", "--device", "cpu", "--quiet"]
    asked += ["--samples", "6", "--num-blocks", "5", "--tensor-parallel"]
    for code, out, errors in on_ranks("generate", *asked, alone=True):
        assert (code, out) == (2, "") and errors.count("\n") == 1
        assert "the pool is too small: a forward needs" in errors
