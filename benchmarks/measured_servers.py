"""capacity.py held against real servers: sizes of models, and the memory that vLLM logged.

    python benchmarks/measured_servers.py --configs DIR [--json FILE]
    python benchmarks/measured_servers.py --logs vllm_startup_logs.csv --configs DIR

Serves docs/capacity.md. `--configs` is a folder of config.json files with an `expected.json` beside
them: parameters and elements of K and V a token, counted elsewhere. `--logs` is a table of vLLM's
startup logs, a row each: card, model, parallelism, version, and in GiB of one GPU what weights,
activations, memory outside torch, and K and V took. The K/V memory is predicted from the
configuration, and from the row's card, version, utilization and limits alone.

    ours / logged   K/V memory of one GPU; of a pipeline, tokens, as a log prints one stage's memory
    not compared    older versions than 0.15; rows without a total, a configuration or a size
"""

from __future__ import annotations

import csv
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import Row, Script, entry, options, show, table

from vllm_sim.models import GPU, GPUS, Deployment, Model, load_model
from vllm_sim.models.config_file import ConfigError
from vllm_sim.models.memory_plan import Batch, engine_of, serving_plan
from vllm_sim.models.model import ENCODER
from vllm_sim.models.presets import TODAYS
from vllm_sim.paper import GIB
from vllm_sim.reporting.arguments import FileName
from vllm_sim.reporting.command_line import UsageError

OLDEST = (0, 15)
FP8 = {"quant_method": "fp8"}
W4A16 = {"quant_method": "gptq", "bits": 4, "group_size": 128}
W8A8 = {
    "quant_method": "compressed-tensors",
    "config_groups": {"all": {"weights": {"num_bits": 8}, "targets": ["Linear"]}},
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
# Of models that the logs name: a preset, a file of the folder, or what the published configuration
# says; and how the logged checkpoint is stored.
CONFIGS: Mapping[str, tuple[str | dict[str, object], dict[str, object] | None]] = {
    "codellama/CodeLlama-7b-hf": (
        LLAMA
        | {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "vocab_size": 32_016, "max_position_embeddings": 16_384},
        None,
    ),
    "google/gemma-2-2b-it": (
        {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256}
        | {"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
        | {"vocab_size": 256_000, "sliding_window": 4096},
        None,
    ),
    "ibm-granite/granite-3.1-2b-instruct": (
        {"model_type": "granite", "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"vocab_size": 49_155, "tie_word_embeddings": True, "max_position_embeddings": 131_072},
        None,
    ),
    "Qwen/Qwen2.5-14B-Instruct": (
        {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13_824}
        | {"num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8}
        | {"vocab_size": 152_064, "tie_word_embeddings": False},
        None,
    ),
    "RedHatAI/Llama-3.3-70B-Instruct-fp8-dynamic": ("llama-3.1-70b", FP8),
    "RedHatAI/Qwen2.5-7B-Instruct-fp8-dynamic": ("blis__qwen2.5-7b-instruct", FP8),
    "RedHatAI/Qwen2.5-7B-Instruct-quantized.w8a8": ("blis__qwen2.5-7b-instruct", W8A8),
    "RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16": ("llama-3.1-8b", W4A16),
    "RedHatAI/Mistral-Small-3.1-24B-Instruct-2503-quantized.w8a8": ("mistral-small-3.2-24b", W8A8),
    "google/gemma-3-12b-it": ("mem__gemma-3-12b", None),
    "google/gemma-3-4b-it": ("mem__gemma-3-4b", None),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama-3.1-8b", None),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (
        "blis__llama-4-scout-17b-16e-instruct-fp8-dynamic",
        {},  # the log's is in 16 bits
    ),
    "microsoft/phi-4": ("phi-4", None),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("aic__mistralai--Mixtral-8x7B-v0.1", None),
    "moonshotai/Kimi-Dev-72B": ("mem__qwen2.5-72b-instruct", None),
    "moonshotai/Kimi-VL-A3B-Instruct": ("mem__kimi-vl-a3b", None),
    "Qwen/Qwen2.5-72B-Instruct": ("mem__qwen2.5-72b-instruct", None),
    "Qwen/Qwen2.5-7B-Instruct": ("blis__qwen2.5-7b-instruct", None),
    "Qwen/Qwen3-8B": ("qwen3-8b", None),
    "Qwen/Qwen3-14B": ("blis__qwen3-14b", None),
}


# ---- configurations -----------------------------------------------------------------------------


def sizes(folder: Path, expected: Mapping[str, Mapping]) -> Iterator[Row]:
    """A row for each configuration of the folder."""
    for path in sorted(folder.glob("*.json")):
        if path.name == "expected.json":
            continue
        known = expected.get(path.stem, {})
        row = {"name": path.stem, "type": known.get("model_type")}
        row |= {"known": known.get("parameters"), "known_kv": known.get("kv_elements_per_token")}
        try:
            model = load_model(str(path))
        except ConfigError as error:
            yield row | {"refused": str(error).removeprefix(f"{path}: ")}
            continue
        kinds = ", ".join(f"{layers.count} {layers.kind}" for layers in model.layers)
        yield row | {
            "parameters": model.num_params,
            "encoders": model.params(ENCODER),
            "kv": model.slot_elements,
            "layers": kinds,
            "weights_gib": model.weight_bytes() / GIB,
            "stored": model.quantisation or model.dtype,
        }


def differs(row: Row) -> str:
    """How a row differs from what was expected; '' if it does not."""
    if "refused" in row:
        return "" if row["known"] is None else f"refused: {row['refused'][:60]}"
    told = []
    if row["known"] and abs(row["parameters"] / row["known"] - 1) > 1e-6:
        share = 100 * (row["parameters"] / row["known"] - 1)
        of = f", {row['encoders'] / 1e9:.2f} B of them encoders" if row["encoders"] else ""
        told.append(f"{share:+.1f} % parameters{of}")
    if row["known_kv"] and row["kv"] != row["known_kv"]:
        told.append(f"{row['kv'] / row['known_kv']:.3g} x K and V a token")
    return "; ".join(told)


# ---- logs ---------------------------------------------------------------------------------------


def logged_model(name: str, folder: Path) -> Model | None:
    """The model that a log names; None if no configuration of it is at hand."""
    if name not in CONFIGS:
        return None
    source, stored = CONFIGS[name]
    if isinstance(source, str) and source in TODAYS:
        model = TODAYS[source]
        if stored:
            bits = 4 + 20 / 128 if stored is W4A16 else 8
            model = model.with_matrix_bits(bits)
        return model
    if isinstance(source, str):
        path = folder / f"{source}.json"
        if not path.exists():
            return None
        source = json.loads(path.read_text(encoding="utf-8"))
    values = {k: v for k, v in source.items() if stored is None or k != "quantization_config"}
    if stored:
        values["quantization_config"] = stored
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "made.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return load_model(str(path))


def logs(rows: list[Row], folder: Path) -> Iterator[Row]:
    """A row for each log that can be compared, and for each other why not."""
    models: dict[str, Model | None] = {}
    for row in rows:
        version = re.match(r"(\d+)\.(\d+)", row["vllm_version"])
        told = {"id": row["id"], "model": row["model"], "version": row["vllm_version"]}
        told |= {"tp": int(row["tp"]), "pp": int(row["pp"])}
        total = row["total_gpu_gib"] or (
            GPUS["h100"].memory_bytes / GIB if "H100" in row["gpu"] else 0
        )
        share, logged = row["gpu_memory_utilization"], row["kv_gib_logged"]
        if not version or tuple(map(int, version.groups())) < OLDEST:
            yield told | {"why": "an older version, or none stated"}
            continue
        if not (total and share and logged):
            yield told | {"why": "no total, utilization or K/V memory"}
            continue
        name = row["model"]
        if name not in models:
            models[name] = logged_model(name, folder)
        model = models[name]
        if model is None:
            yield told | {"why": "no configuration at hand"}
            continue
        gpu = GPU("h100", int(float(total) * GIB))
        limit = re.search(r"max_num_seqs (\d+)", row["note"])
        batch = Batch.default(gpu)
        if limit:
            batch = replace(batch, seqs=int(limit[1]))
        plan = serving_plan(
            Deployment(model, gpu, told["tp"], told["pp"]),
            utilization=float(share),
            engine=engine_of(row["vllm_version"]),
            batch=batch,
        )
        ours, theirs = plan.kv_cache / GIB, float(logged)
        told |= {"ours_gib": ours, "logged_gib": theirs, "engine": plan.engine.name}
        error = ours / theirs - 1
        if told["pp"] > 1:
            error = plan.num_slots / float(row["tokens"]) - 1
        told |= {"error": 100 * error, "several": plan.num_gpus > 1}
        pairs = (
            ("weights", plan.weights, "weights_gib"),
            ("activations", plan.activations, "activation_gib"),
        )
        for what, number, key in (*pairs, ("outside", plan.outside, "non_torch_gib")):
            told[what] = number / GIB
            told[f"logged_{what}"] = float(row[key]) if row[key] else None
        yield told


def kinds(found: list[Row]) -> list[Row]:
    """Errors by version and number of GPUs, without their signs."""
    groups: dict[tuple[str, bool], list[float]] = {}
    for row in found:
        groups.setdefault((row["engine"], row["several"]), []).append(abs(row["error"]))
    every = [abs(row["error"]) for row in found]
    rows = [
        {"engine": engine, "several": several, **_errors(errors)}
        for (engine, several), errors in sorted(groups.items())
    ]
    return [*rows, {"engine": "all", "several": None, **_errors(every)}]


def _errors(errors: list[float]) -> Row:
    errors = sorted(errors)
    nine = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
    return {"logs": len(errors), "median": median(errors), "p90": nine, "most": errors[-1]}


# ---- what is shown ------------------------------------------------------------------------------


def run(argv: list[str] | None) -> int:
    """The tables of what was given. UsageError."""
    parser = options(__doc__)
    add = parser.add_argument
    text = "a folder of config.json files, and expected.json"
    add("--configs", type=FileName("folder"), metavar="DIR", required=True, help=text)
    text = "a table of startup logs"
    add("--logs", type=FileName("file"), metavar="FILE", help=text)
    script = Script(__file__, parser, argv, on_gpu=False)
    folder = Path(script.args.configs)
    try:
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'expected.json'}: {error}") from None
    told: dict[str, object] = {}
    configs = [*sizes(folder, expected)]
    odd = [row | {"difference": differs(row)} for row in configs]
    odd = [row for row in odd if row["difference"] or "refused" in row]
    told["configs"] = configs
    refused = sum("refused" in row for row in configs)
    title = (
        f"{len(configs)} configurations: {len(configs) - refused} sized, {refused} refused by name"
    )
    columns = ("configuration", "name"), ("type", "type")
    columns += (("differs", lambda row: row["difference"] or row["refused"][:70]),)
    show(table(title, columns, odd, "all others as expected"))
    if script.args.logs:
        try:
            with open(script.args.logs, encoding="utf-8", newline="") as file:
                rows = [*logs([*csv.DictReader(file)], folder)]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{script.args.logs}: not a table of startup logs: {error}") from None
        compared = [row for row in rows if "error" in row]
        told |= {"logs": rows, "errors": kinds(compared)}
        columns = ("log", "id"), ("model", lambda row: row["model"][-40:]), ("version", "version")
        columns += ("tp", "tp"), ("pp", "pp"), ("ours, GiB", "ours_gib"), ("logged", "logged_gib")
        columns += (("off, %", "error"),)
        for what in ("weights", "activations", "outside"):
            columns += (what, what), ("logged", f"logged_{what}")
        show(table(f"K/V memory of {len(compared)} logs", columns, compared, "GiB of one GPU"))
        columns = ("terms", "engine"), ("several GPUs", "several"), ("logs", "logs")
        columns += ("median, %", "median"), ("nine in ten, %", "p90"), ("most, %", "most")
        show(table("How far off, without the sign", columns, told["errors"], "K/V memory"))
    return script.write(told, {"errors": 2, "logs": 2, "configs": 2})


main = entry(__file__, run)

if __name__ == "__main__":
    sys.exit(main())
