"""Malformed input of every kind, from a seed: the engines of tests/test_fuzz.py.

`check` calls a script's main() and `check_reader` a reader; both raise Fault for anything but one
clear line. Each fuzz_... spoils as many inputs of one kind, hands them over and counts what became
of them. OPTIONS has every option of every script, as its own parser has it.
"""

import contextlib
import copy
import gzip
import importlib.util
import io
import json
import math
import os
import random
import signal
from collections import Counter
from pathlib import Path

import bench_attention
import bench_beam_step
import bench_manager
import bench_paging_cost
import bench_serving
import fit_latency
import lengths_from_pickle
import make_length_tables
import measured_servers
import profile_attention
import pytest
import tune_attention
from tiny_models import TINY, VISION

import capacity
import generate
import main
import reproduce
import sweep
from vllm_sim.conformance import __main__ as conformance
from vllm_sim.models.config_file import ConfigError, read_config
from vllm_sim.reporting import sweep_cells
from vllm_sim.reporting.arguments import FileName, OneLineParser, positive, seed
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.documents import document, read_run, rows_table
from vllm_sim.workload.data_sets import (
    ALPACA_COLUMNS,
    DATASETS,
    chat_rounds,
    find_lengths,
    read_columns,
    read_lengths,
    read_pairs,
)
from vllm_sim.workload.text_files import WorkloadError
from vllm_sim.workload.traces import read_trace

ROOT = Path(__file__).resolve().parent.parent

SECONDS = 10  # that one input may take before it counts as a hang
LONGEST = 1200  # characters of a line that is still clear
SUFFIX = "suffix_tokens_after_shared_prefix"
AZURE_HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
SOUND = {  # one of each kind of file
    "sharegpt.csv": "input_len,output_len\n" + "3,4\n200,47\n5,6\n" * 9,
    "alpaca.csv": "index,input_len,output_len,input_len_llama\n" + "0,9,46,11\n1,20,48,7\n" * 9,
    "wmt16.csv": f"index,output_llama_tokens,{SUFFIX}_1shot,{SUFFIX}_5shot\n" + "0,9,7,12\n" * 9,
    "chat.csv": "conversation,chunk_suffix,turn,from,opt_tokens_no_bos\n"
    + "0,0,0,human,6\n0,0,1,gpt,16\n" * 9,
    "azure.csv": AZURE_HEAD + "2023-11-16 18:15:46.6805900,374,44\n" * 9,
    "burstgpt.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    + "5,ChatGPT,472,18,490,Conversation log\n9,GPT-4,417,0,417,API log\n" * 9,
    "mooncake.jsonl": '{"timestamp": 9, "input_length": 55, "output_length": 5, "hash_ids": [1]}\n'
    * 9,
    "plain.csv": "text,arrival_ms,prompt_len,output_len\n" + '"a, b",0,374,44\nc,9.5,396,9\n' * 9,
    "excel.csv": "sep=;\nzeit;ts;isl;osl\n" + "1;11/16/2023 6:15:46 PM;1 024;7\n2;9,5;3;4\n" * 9,
    "array.json": "[" + '{"usage": {"isl": 7, "osl": 6}, "start_us": 17},\n' * 9 + "{}]",
    "other.jsonl": '{"completion_tokens": 7, "prompt_tokens": 6, "time": "2023-11-16"}\n' * 9,
}
ODD = """nan NaN inf -inf Infinity -1 0 -0 1.5 1e3 1e308 0x10 1_0 +5 ' "5" true None null %s%n
${HOME} ../../etc/passwd --json " "5"" 99999999 9999999999999999999 9223372036854775808
-9223372036854775809"""
CELLS = (
    *ODD.split(),
    *("", " ", "a\tb", "5 5", '"a, b"', '"a\nb"', "9" * 30, "9" * 5000, "\0", "\x1b[31m", "\u0663"),
    *("\u00e9", "\u2028", "\U0001f600", "\x85", "\ufeff"),
)
WORDS = (*CELLS[:-1], "\udcff", "two\nlines", "=", "-", "--", "x" * 300, "y" * 100_000)


class Fault(AssertionError):
    """What is promised does not hold."""


class Hang(BaseException):
    """Not an Exception: nothing that is tried may catch it."""


@contextlib.contextmanager
def no_longer_than(seconds):
    def ring(*_):
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder):
    """What lies in a folder: the bytes of files that are not huge, the kind of all else."""
    return {
        path.relative_to(folder): path.read_bytes()
        if path.is_file()
        and not path.is_symlink()
        and os.access(path, os.R_OK)
        and path.stat().st_size < 2**30
        else path.lstat().st_mode
        for path in sorted(Path(folder).rglob("*"))
        if not path.is_relative_to("/proc")
    }


def check(script, arguments, outputs, may_be=(0,)):
    """Calls a script's main() with input that is bad, or at best sound. Returns the exit code.

    `outputs` is the folder where it might write: after a failure it must be as it was. Raises
    Fault for anything but 2 with one clear line, or one of the codes `may_be` without a word.
    """
    before = contents(outputs)
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(errors),
            no_longer_than(SECONDS),
        ):
            code = script.main(arguments)
    except SystemExit as end:
        code = end.code
    except (Exception, Hang) as error:
        what = f"{type(error).__name__}: {error}"
        raise Fault(f"{script.__name__} {arguments!a:.300}: {what}") from None
    told, shown = errors.getvalue(), f"{script.__name__} {arguments!a:.300}: {code}, "
    if code in may_be:
        if told:
            raise Fault(f"{shown}though {told!r}")
        return code
    if code != 2:
        raise Fault(f"{shown}not 2: {told!r}")
    line = told.removesuffix("\n")
    clear = line.isascii() and line.isprintable() and ": error: " in line and len(line) < LONGEST
    if not clear or told == line:
        raise Fault(f"{shown}not one clear line: {told[:400]!r}")
    if contents(outputs) != before:
        raise Fault(f"{shown}files changed: {sorted(set(contents(outputs)) ^ set(before))}")
    return 2


def check_reader(read, path):
    """Calls a reader with a file. Whether it was read; Fault unless the error is one line of it."""
    try:
        with no_longer_than(SECONDS):
            read(path)
    except (WorkloadError, ConfigError, UsageError) as error:
        text = str(error).replace(os.fspath(path), "PATH")
        if "\n" in text or not text.startswith("PATH") or len(text) > LONGEST:
            raise Fault(f"not one clear line: {text[:300]!r}") from None
        return False
    except (Exception, Hang) as error:
        raise Fault(f"{read} {path!a}: {type(error).__name__}: {error}") from None
    return True


# ---- malformed files ---------------------------------------------------------------------------


def mutated(rng):
    """(name, bytes) of a file: one of SOUND, spoilt once to four times."""
    name, text = rng.choice(list(SOUND.items()))
    head, *rows = [line.split(",") for line in text.strip().split("\n")]
    data = None
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(14)
        row = rng.choice(rows) if rows else head
        if kind < 5:
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        elif kind == 5:
            row.append(rng.choice(CELLS))
        elif kind == 6 and len(row) > 1:
            row.pop(rng.randrange(len(row)))
        elif kind == 7:
            head[rng.randrange(len(head))] = rng.choice((*CELLS, *head, "input_len"))
        elif kind == 8:
            rng.shuffle(head)
        elif kind == 9:
            rows.clear()
        elif kind == 10:
            head = row
    lines = [",".join(row) for row in (head, *rows)]
    if name.endswith(".jsonl") and rng.random() < 0.6:
        found = [json.loads(line) for line in SOUND[name].splitlines()]
        for row in rng.sample(found, rng.randint(1, 9)):
            spoil(rng, row)
        lines = [json.dumps(row) for row in found]
    text = rng.choice(("\n", "\n", "\r\n", "\r", "\n\n", "\0")).join(lines)
    data = text.encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32")))
    kind = rng.randrange(10)
    if kind == 0:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == 1:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.randbytes(rng.randint(1, 50)) + data[at:]
    elif kind == 2:
        data = rng.randbytes(rng.randrange(3000))
    elif kind == 3:
        data = b" " * rng.randrange(70_000) + data
    if rng.random() < 0.5:
        name, data = name + ".gz", packed(rng, data)
    return name, data


def packed(rng, data):
    """Gzipped, and now and then cut, flipped, prolonged, or with a header of many flags."""
    data = bytearray(gzip.compress(data, mtime=0))
    kind = rng.randrange(8)
    if kind == 0:
        del data[rng.randrange(len(data) + 1) :]
    elif kind == 1:
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(2, len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data += rng.randbytes(rng.randint(1, 30))
    elif kind == 3:
        data[3] = rng.randrange(256)
    elif kind == 4:
        data = data * rng.randint(2, 5)
    elif kind == 5:
        data[-8:] = rng.randbytes(8)
    return bytes(data)


READERS = {
    "read_lengths": read_lengths,
    "chat_rounds": chat_rounds,
    "read_columns": lambda path: read_columns(path, ALPACA_COLUMNS),
    "azure_columns": bench_serving.azure_columns,
    "read_trace": read_trace,
    "find_lengths": lambda path: find_lengths([path], None),
    **{f"read_pairs, {name}": lambda path, name=name: read_pairs(path, name) for name in DATASETS},
}
JSON_READERS = {"read_config": read_config, "read_run": lambda path: read_run(Path(path))}


def fuzz_readers(count, seed, folder, readers=READERS):
    """How many of `count` calls were refused, by reader."""
    refused, taken = Counter(), Counter()
    rng = random.Random(seed)
    done = 0
    while done < count:
        name, data = mutated(rng)
        path = os.path.join(folder, name)
        Path(path).write_bytes(data)
        for reader in rng.sample(list(readers), min(3, len(readers))):
            (taken if check_reader(readers[reader], path) else refused)[reader] += 1
            done += 1
        os.unlink(path)
    return refused, taken


PLACES = "folder pipe loop zero full nowhere /dev/null none/x loop/x pipe/x .".split()  # noqa: SIM905
BAD_OUTPUTS = (*PLACES, "", "..", "/dev/full", "old.json/x", "/proc/none", "x" * 300, "y/" * 3000)
BAD_INPUTS = (*PLACES, "", "none.csv", "sharegpt.csv/x", "azure.csv", "/dev/zero", "/proc/self/mem")
BAD_INPUTS += ("z" * 300, "two\nlines", "\udcff", "w/" * 3000)
BAD_FOLDERS = ("", "old.json", "old.json/x", "pipe", "loop", "full", "/proc/none", "/dev/null")
BAD_FOLDERS += ("x" * 300,)
SCRIPTS = (main, capacity, reproduce, sweep, fit_latency, make_length_tables, bench_serving)
SCRIPTS += (lengths_from_pickle, bench_manager, bench_beam_step, bench_attention)
SCRIPTS += (bench_paging_cost, profile_attention, measured_servers, tune_attention)
SCRIPTS += (conformance,)
if importlib.util.find_spec("transformers"):
    SCRIPTS += (generate,)


class Parsed(BaseException):
    """A script has come to parse its arguments; with its parser."""


def parser_of(script):

    def stop(parser, *_):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(OneLineParser, "parse_known_args", stop)
        script.main([])
    return caught.value.args[0]


def kind_of(action):
    """What an option takes; 'number' wants a positive integer."""
    if isinstance(kind := action.type, FileName):
        folder = kind.kind.startswith("folder")
        return ("folder" if folder else "output") if kind.written else "input" + " folder" * folder
    kind = {positive: "number", sweep.index: "number", seed: "seed"}.get(kind, "word")
    return "flag" if action.nargs == 0 else kind


PARSERS = {script: parser_of(script) for script in SCRIPTS}
ACTIONS = {
    script: {a.option_strings[-1]: a for a in parser._actions if a.dest not in ("help", "target")}
    for script, parser in PARSERS.items()
}
OPTIONS = {script: {o: kind_of(a) for o, a in found.items()} for script, found in ACTIONS.items()}
EVERY = [(script, option) for script, options in OPTIONS.items() for option in options]
HARMLESS = dict.fromkeys(OPTIONS, ()) | {
    main: ("--model", "opt-125m", "--num-blocks", "140", "--device", "cpu"),
    reproduce: ("--figure", "table1"),
    measured_servers: ("--configs", str(ROOT / "docs")),  # has none
    conformance: ("ours-buddy", "--world", "1 in 1"),
}


def values_of(rng, kind, room):
    """A value for an option of this kind: bad, or at best sound."""
    if kind in ("number", "seed"):
        values = [word for word in WORDS if kind == "number" or word != "0"]
        return rng.choice((*values, "9" * rng.randint(13, 9000), f"-{rng.randint(1, 10**20)}"))
    if kind in ("input", "input folder"):
        return rng.choice((*(str(room[0] / name) for name in BAD_INPUTS if name), ""))
    return rng.choice({"output": BAD_OUTPUTS, "folder": BAD_FOLDERS}.get(kind, WORDS))


def bad_arguments(rng, script, option, room):
    """Arguments of a script, at least one of them bad: that of `option`, mostly."""
    value = values_of(rng, OPTIONS[script][option], room)
    bad = [f"{option}={value}"] if rng.random() < 0.8 or value.startswith("-") else [option, value]
    more = rng.choice(([], [], [], [option], ["extra"], [rng.choice(WORDS)], ["--bogus"]))
    return [*HARMLESS[script], *(bad + more if rng.random() < 0.7 else more + bad)]


def fuzz_options(count, seed, room):
    """Exit codes of `count` calls, by script and option, each option as often as any other."""
    rng = random.Random(seed)
    codes = Counter()
    order = rng.sample(EVERY, len(EVERY))
    for number in range(count):
        script, option = order[number % len(order)]
        arguments = bad_arguments(rng, script, option, room)
        codes[script.__name__, option, check(script, arguments, room[1])] += 1
    return codes


SWEPT = [one for one in EVERY if f"{one[0].__name__}.py" in sweep.PARSERS]


def fuzz_lists(count, seed, room):
    """The same of sweep.py, with an option of the script that it runs: lists of values."""
    rng = random.Random(seed)
    codes = Counter()
    folder = room[1] / "folder"
    order = rng.sample(SWEPT, len(SWEPT))
    for number in range(count):
        script, option = order[number % len(order)]
        kind = OPTIONS[script][option]
        values = [values_of(rng, kind, room) for _ in range(rng.randint(1, 3))]
        values = rng.choice((values, ["1", *values], [*values, "opt-13b"], values * 2))
        listed = f"{option}={sweep_cells.SEPARATOR.get(option, ',').join(values)}"
        arguments = ["--script", f"{script.__name__}.py", "--out", str(folder), listed]
        arguments += rng.choice(([], ["--list"], ["--cell", "0"], ["--seed=0,1"], ["--again"]))
        codes[script.__name__, option, check(sweep, arguments, room[1])] += 1
        for path in folder.glob("sweep-*.json"):
            path.unlink()
    return codes


def fuzz_variables(count, seed, room):
    """Exit codes of `count` calls with a variable of the environment that is bad, by variable."""
    rng = random.Random(seed)
    codes = Counter()
    for _ in range(count):
        script = rng.choice((reproduce, fit_latency, sweep))
        name = sweep.TASK if script is sweep else "LENGTHS_DIR"
        paths = [str(room[0] / one) for one in BAD_INPUTS if one]
        value = rng.choice(WORDS if script is sweep else (*paths, *WORDS)).replace("\0", "")
        arguments = ["--seed=0,1", "--out", str(room[1] / "folder")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            arguments = arguments if script is sweep else HARMLESS[script]
            codes[name, check(script, arguments, room[1])] += 1
        for path in (room[1] / "folder").glob("sweep-*.json"):
            path.unlink()
    return codes


def fuzz_files_of_scripts(count, seed, room):
    """Exit codes of `count` calls of the scripts that read files, with one malformed file each."""
    rng = random.Random(seed)
    codes = Counter()
    data = room[0] / "data"
    data.mkdir()
    for _ in range(count):
        name, content = mutated(rng)
        readers = (reproduce, bench_serving, make_length_tables, fit_latency, capacity, main)
        script = rng.choice((*readers, reproduce, capacity))
        if script is bench_serving and name.startswith("azure"):
            name = bench_serving.AZURE
        elif script is make_length_tables:
            name = rng.choice(list(make_length_tables.SPECS.values())).filename
        (data / name).write_bytes(content)
        arguments = {
            reproduce: ["--figure", "table1", "--lengths", str(data / name)],
            bench_serving: ["--traces", str(data)],
            fit_latency: [],
            capacity: ["--trace", str(data / name)],
            main: [*HARMLESS[main], "--trace", str(data / name)],
            make_length_tables: ["--data", str(data), "--out", str(room[1] / "folder")],
        }[script]
        with pytest.MonkeyPatch.context() as patch:
            if script is fit_latency:
                patch.setenv("LENGTHS_DIR", str(data))
            with contextlib.suppress(FileNotFoundError):
                codes[script.__name__, check(script, arguments, room[1])] += 1
        (data / name).unlink()
    return codes


def document_of(rng, options=None):
    """What a script might have written with --json, small."""
    options = options or {"model": "opt-13b", "seed": rng.randrange(3)}
    rows = [{"counted": name, "requests": rng.random()} for name in ("max", "paged")]
    found = {"setting": {}, "tables": [rows_table("concurrency", "t", rows)], "exit_code": 0}
    found["checks"] = [{"name": "a", "ok": True, "detail": "b"}]
    return document("capacity.py", options, elapsed_s=1.0, seeds=[rng.randrange(3)], **found)


def spoil(rng, found):
    """One value somewhere in a document replaced, or one key taken away."""
    parent, key = None, None
    while isinstance(found, dict | list) and found and (parent is None or rng.random() < 0.8):
        parent = found
        key = rng.choice(list(found)) if isinstance(found, dict) else rng.randrange(len(found))
        found = found[key]
    if parent is None:  # nothing is left in it
        return
    if rng.random() < 0.3:
        del parent[key]
    else:
        word = rng.choice(CELLS)
        odd = (None, 0, 1, -1, 2.5, 2**53, 10**8, 10**400, 1e308, math.nan, math.inf, True, word)
        parent[key] = rng.choice((*odd, [], [1], [[[1]]], {}, {word: []}))


NO_DOCUMENTS = (b"", b"[]", b"{}", b"NaN", b"null", b"1e999", b"[" * 10**5, b"\0" * 99, b'"' * 99)
NO_DOCUMENTS += (b'{"a":' * 10**4, b"9" * 10**4, b"\xef\xbb\xbf", None)


def damaged(rng, found):
    """A document as bytes, spoilt as text now and then; None stands for a file of 1 TiB."""
    text = json.dumps(found)
    data = bytearray(text.encode("ascii"))
    kind = rng.randrange(8)
    if kind == 0:
        del data[rng.randrange(len(data)) :]
    elif kind == 1:
        at = rng.randrange(len(data))
        data[at : at + rng.randint(0, 9)] = rng.randbytes(rng.randint(1, 9))
    elif kind == 2:
        return rng.choice(NO_DOCUMENTS)
    elif kind == 3:
        coded = [text.encode(name) for name in ("utf-16", "utf-32", "utf-8-sig")]
        other = packed(rng, data), b"\xff" + bytes(data), bytes(data) * 2
        return rng.choice((*coded, *other, rng.randbytes(rng.randrange(3000))))
    return bytes(data)


def put(path, data):
    """A file of these bytes, or of 1 TiB, which takes no place, for None."""
    path.write_bytes(data or b"")
    if data is None:
        os.truncate(path, 2**40)


def fuzz_documents(count, seed, room):
    """Exit codes of a merge of `count` files that are spoilt documents of --json."""
    rng, codes, path = random.Random(seed), Counter(), room[0] / "one.json"
    (room[0] / "other.json").write_text(json.dumps(document_of(rng)))
    for _ in range(count):
        found = document_of(rng)
        for _ in range(rng.randint(1, 3)):
            spoil(rng, found)
        put(path, damaged(rng, found))
        given = ["--merge", str(path), *rng.choice(([], [str(room[0] / "other.json")]))]
        given += rng.choice(([], ["--table", "concurrency"], ["--json", str(room[1] / "folder")]))
        codes[check(sweep, given, room[1], may_be=(0, 1))] += 1
    return codes


def fuzz_cells(count, seed, room):
    """Exit codes of a sweep and its merge in a folder where one file is spoilt."""
    rng, codes, folder = random.Random(seed), Counter(), room[1] / "folder"
    parser, told = sweep.PARSERS["capacity.py"](), ["--seed=0,1"]
    cells = sweep_cells.expand("capacity.py", parser, told)
    sweep_cells.write_list("capacity.py", cells, folder)
    (plan,) = folder.glob("sweep-*.json")
    listed = plan.read_text()
    for _ in range(count):
        sound = {folder / cell.file: document_of(rng, cell.options) for cell in cells}
        sound[plan] = json.loads(listed)
        spoilt = rng.choice(list(sound))
        for path, found in sound.items():
            if path is spoilt:
                for _ in range(rng.randint(0, 2)):
                    spoil(rng, found)
            put(path, damaged(rng, found) if path is spoilt else json.dumps(found).encode())
        run = ["--script", "capacity.py", *told, "--out", str(folder)]
        what, arguments = rng.choice((("sweep", run), ("merge", ["--merge", str(plan)])))
        codes[what, check(sweep, arguments, room[1], may_be=(0, 1))] += 1
        for path in sound:
            path.unlink(missing_ok=True)
    return codes


QUANTISED = (
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "mxfp4"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}},
    },
)


def config_of(rng):
    """The config.json of a tiny model, or quantised, or of a model with an image encoder."""
    config = copy.deepcopy(rng.choice(list(TINY.values())))
    if rng.random() < 0.3:
        config["quantization_config"] = copy.deepcopy(rng.choice(QUANTISED))
    if rng.random() < 0.2:
        config = {"model_type": "both", "text_config": config, "vision_config": dict(VISION)}
    return config


def fuzz_configs(count, seed, room):
    """Exit codes of capacity.py over `count` spoilt configurations of models."""
    rng, codes, folder = random.Random(seed), Counter(), room[0] / "model"
    folder.mkdir()
    for _ in range(count):
        config = config_of(rng)
        for _ in range(rng.randint(1, 3)):
            spoil(rng, config)
        name = rng.choice(("config.json", "any"))
        put(folder / name, damaged(rng, config))
        given = folder if name == "config.json" and rng.random() < 0.5 else folder / name
        more = rng.choice(([], ["--dtype", "fp8"], ["--max-model-len", "2048"], ["--block-size=1"]))
        codes[
            check(capacity, ["--model", str(given), "--gpu=h200", "--gpus=2", *more], room[1])
        ] += 1
        (folder / name).unlink()
    return codes


SERVER_LOG = """vLLM API server version 0.19.0
non-default args: {'model': 'meta-llama/Llama-3.1-8B-Instruct', 'max_num_seqs': 8}
Initializing a V1 LLM engine (v0.19.0) with config: model='Qwen/Qwen3-8B', max_seq_len=8192
GPU 0: NVIDIA H100 80GB HBM3
Free memory on device (78.00/79.19 GiB) on startup
Model loading took 14.99 GiB memory and 3.1 seconds
Available KV cache memory: 58.57 GiB
GPU KV cache size: 479,808 tokens
Maximum concurrency for 8,192 tokens per request: 58.57x"""


def fuzz_logs(count, seed, room):
    """Exit codes of capacity.py over `count` spoilt startup logs."""
    rng, codes, path = random.Random(seed), Counter(), room[0] / "server.log"
    for _ in range(count):
        lines = [line.split(" ") for line in SERVER_LOG.split("\n")]
        for _ in range(rng.randint(1, 4)):
            line = rng.choice(lines)
            line[rng.randrange(len(line))] = rng.choice((*CELLS, "0", "0.00", "-", "9" * 12))
            if rng.random() < 0.3:
                lines.remove(rng.choice(lines))
        text = rng.choice(("\n", "\r\n", "\0")).join(map(" ".join, lines))
        data = bytearray(text.encode(rng.choice(("utf-8", "utf-8", "utf-16", "utf-32"))))
        if rng.random() < 0.2:
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 9)] = rng.randbytes(rng.randint(1, 9))
        put(path, None if rng.random() < 0.02 else data)
        more = rng.choice(([], [], ["--gpu", "l4"], ["--engine", "vllm-0.21"]))
        codes[check(capacity, ["--log", str(path), *more], room[1])] += 1
    return codes
