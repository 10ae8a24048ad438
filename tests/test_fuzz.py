"""Malformed input: one clear line on stderr and exit code 2, and no file made or changed.

Every reader of files and every option of every script, with inputs that a seed decides: some
1,000 in `make test`, more than 10,000 behind the marker `slow`,

    python -m pytest -m slow -rP tests/test_fuzz.py

most of them here, in this process, and dozens as processes, for what only those can show: a
closed pipe, a full disk, closed or full streams. Scripts run up to the work itself, which is left
out: so input that is sound after all ends with 0, and nothing is ever slow. The last tests plant
faults, to show that the checks see them.
"""

import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import bench_beam_step  # noqa: E402
import bench_manager  # noqa: E402
import bench_serving  # noqa: E402
import committed  # noqa: E402
import fit_latency  # noqa: E402
import make_length_tables  # noqa: E402
import record  # noqa: E402
import update_readme  # noqa: E402

import capacity  # noqa: E402
import capacity_tables  # noqa: E402
import command_line  # noqa: E402
import main  # noqa: E402
import pictures  # noqa: E402
import report  # noqa: E402
import reproduce  # noqa: E402
import reproduction  # noqa: E402
import sweep  # noqa: E402
import trace_tables  # noqa: E402
import workload  # noqa: E402
from command_line import UsageError  # noqa: E402
from json_document import document  # noqa: E402
from length_files import ALPACA_COLUMNS, DATASETS, chat_rounds, find_lengths, read_pairs  # noqa: E402
from report import ScenarioReport  # noqa: E402
from traces import read_trace  # noqa: E402
from workload import WorkloadError, read_columns, read_lengths  # noqa: E402

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
}
CELLS = (
    "nan", "NaN", "inf", "-inf", "Infinity", "-1", "0", "-0", "1.5", "1e3", "1e308", "0x10",
    "1_0", "+5", "", " ", "'", '"5"', "9" * 8, "9" * 19, "9" * 30, "9" * 5000, str(2**63),
    str(-(2**63) - 1), "true", "None", "null", "\0", "\x1b[31m", "\u0663", "\u00e9", "\u2028",
    "\U0001f600", "a\tb", "%s%n", "${HOME}", "../../etc/passwd", "5 5", "--json", "\x85", "\ufeff",
)  # fmt: skip
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
    """What lies in a folder: the bytes of files, the kind of all else."""
    return {
        path.relative_to(folder): path.read_bytes()
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
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
            contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors),
            no_longer_than(SECONDS),
        ):  # fmt: skip
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
    """Calls a reader with a file: WorkloadError with one line that names it, or a result."""
    try:
        with no_longer_than(SECONDS):
            read(path)
    except WorkloadError as error:
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
    text = rng.choice(("\n", "\n", "\r\n", "\r", "\n\n", "\0")).join(map(",".join, (head, *rows)))
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


def fuzz_readers(count, seed, folder):
    """How many of `count` calls were refused, by reader."""
    refused, taken = Counter(), Counter()
    rng = random.Random(seed)
    done = 0
    while done < count:
        name, data = mutated(rng)
        path = os.path.join(folder, name)
        Path(path).write_bytes(data)
        for reader in rng.sample(list(READERS), 3):
            (taken if check_reader(READERS[reader], path) else refused)[reader] += 1
            done += 1
        os.unlink(path)
    return refused, taken


# ---- malformed options -------------------------------------------------------------------------


@pytest.fixture
def room():
    """(inputs, outputs): folders with what cannot be read and what cannot be written."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "in", Path(folder) / "out"
        for path in (inputs, outputs):
            path.mkdir()
            (path / "folder").mkdir()
            os.mkfifo(path / "pipe")
            (path / "loop").symlink_to("loop")
            (path / "nowhere").symlink_to("none/at/all")
            (path / "zero").symlink_to("/dev/zero")
            (path / "full").symlink_to("/dev/full")
        for name, text in SOUND.items():
            (inputs / name).write_text(text, encoding="ascii")
        (outputs / "old.json").write_text("old")
        yield inputs, outputs


@pytest.fixture
def no_work(monkeypatch, room):
    """The scripts without what they are for; what they read, check and write is all there."""
    report = ScenarioReport(1, "nothing", "What?", answer="Nothing.")
    monkeypatch.setattr(main, "run_one", lambda *_: report)
    monkeypatch.setattr(main, "tune_cpu", lambda: None)
    monkeypatch.setattr(sweep, "run_cell", lambda *_: 0)
    monkeypatch.setattr(capacity_tables, "sections", lambda *_: [])
    monkeypatch.setattr(trace_tables, "answer_trace", lambda *_: [])
    monkeypatch.setattr(reproduction, "reproduce", lambda *_: [])
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    monkeypatch.setattr(fit_latency, "check_software", lambda *_: [])
    monkeypatch.setattr(bench_serving, "measure", lambda *_: {"ns_per_token": 1.0})
    monkeypatch.setattr(bench_serving, "seconds_per_call", lambda: 1.0)
    ns = dict.fromkeys(("append", "call", "append_all"), 1.0)
    row = {"workload": "a", "tokens": 1, "ns_per_token": ns, "blocks": [1]}
    monkeypatch.setattr(bench_manager, "measure", lambda *_: row)
    monkeypatch.setattr(bench_beam_step.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(make_length_tables, "table_lines", lambda *_: [])
    monkeypatch.delenv("LENGTHS_DIR", raising=False)
    monkeypatch.chdir(room[1])


BAD_OUTPUTS = (
    "", ".", "..", "folder", "pipe", "loop", "zero", "full", "/dev/null", "/dev/full", "none/x",
    "old.json/x", "/proc/none", "/proc/self/mem", "x" * 300, "y/" * 3000, "nowhere", "loop/x",
    "pipe/x",
)  # fmt: skip
BAD_INPUTS = (
    "", ".", "none.csv", "folder", "pipe", "loop", "zero", "full", "nowhere", "sharegpt.csv/x",
    "azure.csv", "/dev/zero", "/dev/null", "/proc/self/mem", "z" * 300, "two\nlines", "\udcff",
    "w/" * 3000,
)  # fmt: skip
# Options of each script by what they take; "number" wants a positive integer.
OPTIONS = {
    main: {
        "--scenario": "number", "--device": "word", "--kernel": "word", "--model": "word",
        "--layers": "number", "--num-blocks": "number", "--block-size": "number",
        "--seed": "seed", "--json": "output", "--format": "word", "--quiet": "flag",
        "--figures": "folder", "--timeline": "output", "--trace": "input",
    },
    capacity: {
        "--model": "input", "--gpu": "word", "--gpu-memory": "word", "--gpus": "number",
        "--dtype": "word", "--kv-dtype": "word", "--plan": "word", "--allowance": "word",
        "--gpu-memory-utilization": "word", "--max-model-len": "number", "--block-size": "number",
        "--workload": "word", "--prefix-len": "number", "--seed": "seed", "--json": "output",
        "--format": "word", "--trace": "input", "--preemption-rate": "word", "--rate": "word",
        "--trace-rows": "number", "--speed-of": "word", "--figures": "folder", "--quiet": "flag",
    },
    reproduce: {
        "--figure": "word", "--jobs": "number", "--seeds": "number", "--beam-seconds": "number",
        "--lengths": "input", "--json": "output", "--figures": "folder", "--format": "word",
        "--quick": "flag", "--quiet": "flag",
    },
    fit_latency: {"--check": "flag", "--model": "word"},
    make_length_tables: {"--data": "input", "--out": "folder"},
    record: {"result": "output", "script": "script"},
    update_readme: {"--check": "flag"},
    bench_serving: {"--repeats": "number", "--traces": "input", "--json": "output"},
    bench_manager: {"--repeats": "number", "--json": "output"},
    bench_beam_step: {"--repeats": "number", "--json": "output"},
    report: {"files": "document", "--json": "output", "--format": "word", "--table": "word"},
    sweep: {"--script": "word", "--out": "folder", "--cell": "number", "--seed": "seed",
            "--json": "output", "--list": "flag"},
}  # fmt: skip
HARMLESS = {main: ["--model", "opt-125m", "--num-blocks", "140", "--device", "cpu"],
            capacity: [], reproduce: ["--figure", "table1"], fit_latency: [],
            make_length_tables: [], record: [], update_readme: [], bench_serving: [],
            bench_manager: [], bench_beam_step: [], report: [],
            sweep: []}  # fmt: skip


def bad_arguments(rng, script, room):
    """Arguments of a script, at least one of them bad."""
    inputs, _ = room
    option, kind = rng.choice(list(OPTIONS[script].items()))
    if script is record:
        result, name = rng.choice((("folder", "main.py"), ("new.json", "none.py"),
                                   (rng.choice(BAD_OUTPUTS[:-3]), "main.py")))  # fmt: skip
        return rng.choice(([result, name], [name], [], ["", rng.choice(WORDS)]))
    if kind == "document":
        return [*rng.choice(([], ["--json", "new.json"])), str(inputs / rng.choice(BAD_INPUTS))]
    if kind in ("number", "seed"):
        values = [word for word in WORDS if kind == "number" or word != "0"]
        value = rng.choice((*values, "9" * rng.randint(13, 9000), f"-{rng.randint(1, 10**20)}"))
    elif kind in ("input", "script"):
        value = rng.choice((*(str(inputs / name) for name in BAD_INPUTS if name), ""))
    elif kind == "output":
        value = rng.choice(BAD_OUTPUTS)
    elif kind == "folder":
        value = rng.choice(("old.json", "old.json/x", "pipe", "loop", "full", "x" * 300,
                            "/proc/none", "/dev/null"))  # fmt: skip
    else:
        value = rng.choice(WORDS)
    bad = [f"{option}={value}"] if rng.random() < 0.8 or value.startswith("-") else [option, value]
    more = rng.choice(([], [], [], [option], ["extra"], [rng.choice(WORDS)], ["--bogus"]))
    return HARMLESS[script] + (bad + more if rng.random() < 0.7 else more + bad)


def fuzz_options(count, seed, room):
    """Exit codes of `count` calls, by script."""
    rng = random.Random(seed)
    codes = Counter()
    for _ in range(count):
        script = rng.choice(list(OPTIONS))
        arguments = bad_arguments(rng, script, room)
        codes[script.__name__, check(script, arguments, room[1])] += 1
    return codes


def fuzz_files_of_scripts(count, seed, room):
    """Exit codes of `count` calls of the scripts that read files, with one malformed file each."""
    rng = random.Random(seed)
    codes = Counter()
    data = room[0] / "data"
    data.mkdir()
    for _ in range(count):
        name, content = mutated(rng)
        script = rng.choice((reproduce, reproduce, bench_serving, make_length_tables, fit_latency,
                             capacity, capacity, main))  # fmt: skip
        if script is bench_serving and name.startswith("azure"):
            name = bench_serving.AZURE
        elif script is make_length_tables:
            name = rng.choice(make_length_tables.SPECS).filename
        (data / name).write_bytes(content)
        arguments = {
            reproduce: ["--figure", "table1", "--lengths", str(data / name)],
            bench_serving: ["--traces", str(data)], fit_latency: [],
            capacity: ["--trace", str(data / name)],
            main: [*HARMLESS[main], "--trace", str(data / name)],
            make_length_tables: ["--data", str(data), "--out", str(room[1] / "folder")],
        }[script]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            if script is fit_latency:
                patch.setenv("LENGTHS_DIR", str(data))
            with contextlib.suppress(FileNotFoundError):
                codes[script.__name__, check(script, arguments, room[1])] += 1
        (data / name).unlink()
    return codes


def document_of(rng):
    """What a script might have written with --json, small."""
    rows = [{"counted": name, "requests": rng.random()} for name in ("max", "paged")]
    table = {"id": "concurrency", "title": "t", "setting": "", "headers": [], "index": ["counted"],
             "rows": rows}  # fmt: skip
    return document(
        "capacity.py", {"model": "opt-13b", "seed": rng.randrange(3)}, seeds=[rng.randrange(3)],
        setting={}, tables=[table], checks=[{"name": "a", "ok": True, "detail": "b"}],
        exit_code=0, elapsed_s=1.0,
    )  # fmt: skip


def spoil(rng, found):
    """One value somewhere in a document replaced, or one key taken away."""
    parent, key = None, None
    while isinstance(found, dict | list) and found and (parent is None or rng.random() < 0.8):
        parent = found
        key = rng.choice(list(found)) if isinstance(found, dict) else rng.randrange(len(found))
        found = found[key]
    if rng.random() < 0.3:
        del parent[key]
    else:
        word = rng.choice(CELLS)
        parent[key] = rng.choice((None, 1, -1, 2.5, 10**400, True, word, [], [1], {}, {word: []}))


def fuzz_documents(count, seed, room):
    """Exit codes of report.py over `count` files that are spoilt documents of --json."""
    rng, codes, path = random.Random(seed), Counter(), room[0] / "one.json"
    (room[0] / "other.json").write_text(json.dumps(document_of(rng)))
    for _ in range(count):
        found = document_of(rng)
        for _ in range(rng.randint(1, 3)):
            spoil(rng, found)
        data = bytearray(json.dumps(found).encode("ascii"))
        kind = rng.randrange(6)
        if kind == 0:
            del data[rng.randrange(len(data)) :]
        elif kind == 1:
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 9)] = rng.randbytes(rng.randint(1, 9))
        elif kind == 2:
            data = bytearray(rng.choice((b"", b"[]", b"{}", b"NaN", b"[" * 10**5, b"1e999")))
        path.write_bytes(data)
        given = [str(path), *rng.choice(([], [str(room[0] / "other.json")]))]
        arguments = [*given, *rng.choice(([], ["--json", str(room[1] / "folder")]))]
        codes[check(report, arguments, room[1], may_be=(0, 1))] += 1
    return codes


def fuzz_results(count, seed, folder):
    """How many of `count` malformed files of results/ tools/update_readme.py refused."""
    rng = random.Random(seed)
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(ROOT / "results", folder / "results")
    paths = sorted((folder / "results").glob("*.json"))
    sound = {path: path.read_bytes() for path in paths}
    refused = 0
    for _ in range(count):
        path = rng.choice(paths)
        data, kind = bytearray(sound[path]), rng.randrange(6)
        at = rng.randrange(len(data))
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at : at + 5] = rng.randbytes(5)
        elif kind == 2:
            data = bytearray(rng.choice((b"", b"[]", b"{}", b"NaN", b"null", b"[" * 10**5, b"1")))
        elif kind == 3:
            whole = json.loads(data)
            del whole[rng.choice(list(whole))]
            data = bytearray(json.dumps(whole).encode())
        elif kind == 4:
            whole = json.loads(data)
            whole["output"] = rng.choice((None, 1, "x", [], {}, {"rows": [{}]}, {"rows": None}))
            data = bytearray(json.dumps(whole).encode())
        else:
            whole = json.loads(data)
            whole[rng.choice(list(whole))] = rng.choice((None, 1, [], [1], {}))
            data = bytearray(json.dumps(whole).encode())
        path.write_bytes(data)
        arguments = rng.choice(([], ["--check"]))
        try:
            refused += check(update_readme, arguments, folder, may_be=(0, 1)) == 2
        finally:
            path.write_bytes(sound[path])
    return refused


@pytest.mark.parametrize("seed", range(2))
def test_readers_refuse_malformed_files_in_one_line(tmp_path, seed):
    refused, taken = fuzz_readers(240, seed, tmp_path)
    assert set(refused) == set(READERS) and refused.total() > 3 * taken.total()


@pytest.mark.parametrize("seed", range(2))
def test_scripts_refuse_malformed_arguments_in_one_line(room, no_work, seed):
    codes = fuzz_options(240, seed, room)
    refused = {script for script, code in codes if code == 2}
    assert refused == {script.__name__ for script in OPTIONS}


def test_scripts_refuse_malformed_files_in_one_line(room, no_work):
    codes = fuzz_files_of_scripts(150, 0, room)
    assert {script for script, code in codes if code == 2} >= {
        "capacity", "main", "reproduce", "make_length_tables",
    }  # fmt: skip


def test_report_refuses_malformed_documents_in_one_line(room, no_work):
    codes = fuzz_documents(300, 5, room)
    assert codes[2] > 200 and codes[0] + codes[1] > 0


def test_results_that_are_malformed_leave_the_readme(tmp_path, monkeypatch):
    for module in (update_readme, committed):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    assert fuzz_results(60, 0, tmp_path) > 30


# ---- what a mutation does not find -------------------------------------------------------------


def bomb(path, head, text, times):
    """A small file that unpacks to `head` and `times` times `text`."""
    path.write_bytes(gzip.compress(head) + gzip.compress(text) * times)
    return str(path)


@pytest.mark.parametrize(
    ("text", "times", "says"),
    [
        (b"x" * 2**20, 300, "line 2: the file, or this line, is too long"),
        (b"\0" * 2**20, 300, "too long"),
        (b"1,2" + b" " * 60_000 + b"\n", 4600, "too long"),
        pytest.param(b"\n" * 2**20, 300, "line 2000001: the file", marks=pytest.mark.slow),
        pytest.param(b"1,1\n" * 2**18, 300, "line 2000001: the file", marks=pytest.mark.slow),
        (b"", 900_000, "the file is too long"),  # members without content
    ],
    ids=["no line", "zeros", "long lines", "blank lines", "short lines", "no content"],
)
def test_a_gzip_bomb_is_bounded(tmp_path, text, times, says):
    path = bomb(tmp_path / "sharegpt.csv.gz", b"input_len,output_len\n", text, times)
    with no_longer_than(60), pytest.raises(WorkloadError) as caught:
        read_lengths(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"\n", b"1,1\n"])
def test_a_file_of_too_many_lines_is_not_read_to_its_end(tmp_path, monkeypatch, line):
    monkeypatch.setattr(workload, "MAX_LINES", 5000)
    path = bomb(tmp_path / "sharegpt.csv.gz", b"input_len,output_len\n1,1\n", line, 4999)
    with pytest.raises(WorkloadError, match="line 5001: the file"):
        read_lengths(path)
    assert read_lengths(bomb(tmp_path / "a", b"input_len,output_len\n1,1\n", line, 4998))


def test_a_large_file_is_not_even_read(tmp_path):
    path = tmp_path / "sharegpt.csv"
    path.write_text("input_len,output_len\n")
    os.truncate(path, 2**40)  # a hole
    for reader in READERS.values():
        with pytest.raises(WorkloadError, match="the file is too long"):
            reader(str(path))


def test_what_is_no_file_is_refused_at_once(room):
    for name in BAD_INPUTS:
        if name != "azure.csv":
            for reader in READERS.values():
                path = name if not name or name.startswith("/") else str(room[0] / name)
                assert not check_reader(reader, path), name
    assert not check_reader(read_lengths, "a\0b")


@contextlib.contextmanager
def nobody():
    """Without the rights of root, who may read and write anything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_without_permission(room, no_work):
    inputs, outputs = room
    main.main(["--scenario", "1"])  # what it imports may be for root alone
    reproduce.main(["--figure", "table1"])
    for path in (inputs.parent, inputs, outputs):
        path.chmod(0o755)
    (outputs / "old.json").chmod(0o400 if os.geteuid() else 0o444)
    for path in inputs.glob("*.csv"):
        path.chmod(0)
    if os.geteuid():
        outputs.chmod(0o555)
    with nobody():
        for reader in READERS.values():
            for path in inputs.glob("*.csv"):
                assert not check_reader(reader, str(path))
        for script in (main, capacity, reproduce, bench_serving, bench_manager):
            for name in ("old.json", "new.json", "folder/new.json"):
                arguments = [*HARMLESS[script], "--json", str(outputs / name)]
                if name != "folder/new.json" or os.geteuid():
                    assert check(script, arguments, outputs, may_be=()) == 2
        assert check(make_length_tables, ["--data", str(inputs), "--out", str(outputs)], outputs,
                     may_be=()) == 2  # fmt: skip
        path = str(inputs / "alpaca.csv")
        arguments = [*HARMLESS[reproduce], "--lengths", path]
        assert check(reproduce, arguments, outputs, may_be=()) == 2
    outputs.chmod(0o755)


# ---- as processes ------------------------------------------------------------------------------

SCRIPTS = ("main.py", "capacity.py", "reproduce.py", "report.py", "sweep.py",
           "tools/make_length_tables.py",
           "tools/record.py", "tools/update_readme.py", "tools/fit_latency.py", "tools/mutants.py",
           "benchmarks/bench_manager.py",
           "benchmarks/bench_serving.py")  # fmt: skip
WITH_TORCH = ("benchmarks/bench_attention.py", "benchmarks/bench_beam_step.py",
              "benchmarks/bench_paging_cost.py", "benchmarks/profile_attention.py")  # fmt: skip
ALL_SCRIPTS = [*SCRIPTS, *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_TORCH)]


UNLIKE_USERS = ("COVERAGE_", "LENGTHS_DIR", "PYTHONUNBUFFERED")  # variables


def process(script, *arguments, **options):
    """A finished process that buffers its output, without coverage's own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(UNLIKE_USERS)}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        **({"cwd": ROOT, "env": env, "stderr": subprocess.PIPE, "timeout": 100} | options),
    )


def closing(*descriptors):
    return lambda: [os.close(descriptor) for descriptor in descriptors]


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_help_to_a_reader_that_is_gone_is_silent(script):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = process(script, "--help", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_help_to_a_full_disk_takes_one_line(script):
    with open("/dev/full", "wb") as full:
        done = process(script, "--help", stdout=full)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"error: cannot write the output: No space left on device" in done.stderr


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_mistakes_that_nobody_can_be_told_of_still_give_2(script):
    with open("/dev/full", "wb") as full:
        assert process(script, "--bogus", stdout=full, stderr=full).returncode == 2
    assert process(script, "--bogus", preexec_fn=closing(1, 2), stderr=None).returncode == 2
    done = process(script, "--bogus", preexec_fn=closing(1))
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("arguments", [["--lengths", "pipe"], ["--json", "pipe"],
                                       ["--figures", "pipe"]])  # fmt: skip
def test_a_pipe_that_nobody_writes_to_does_not_hang(tmp_path, arguments):
    os.mkfifo(tmp_path / "pipe")
    done = process("reproduce.py", "--figure", "table1", *arguments, cwd=tmp_path, timeout=30)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    done = process("reproduce.py", "--figure", "table1", "--json", path, stdout=subprocess.PIPE,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
                   )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("left", ["{", "NaN", "[" * 10_000, "\u00e9", "[Infinity]"])
def test_a_script_that_leaves_no_json_is_not_recorded(tmp_path, monkeypatch, capfd, left):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\nsys.stdout.buffer.write(bytes(range(128, 256)))\n"
        f"pathlib.Path(sys.argv[-1]).write_text({left!a}, encoding='utf-8')\n"
    )
    assert record.main([str(tmp_path / "result.json"), "script.py"]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("record.py: error: script.py: ") and errors.count("\n") == 1
    assert not (tmp_path / "result.json").exists()


# ---- planted faults ----------------------------------------------------------------------------


def trip(*_, **__):
    raise KeyError("planted")


def test_a_planted_traceback_is_noticed(room, no_work, tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "whole_number", trip)
    with pytest.raises(Fault, match="KeyError"):
        fuzz_readers(100, 0, tmp_path)
    with pytest.raises(Fault, match="KeyError"):
        fuzz_files_of_scripts(100, 0, room)


def test_a_planted_hang_is_noticed(room, monkeypatch):
    monkeypatch.setitem(globals(), "SECONDS", 1)
    with pytest.raises(Fault, match="Hang"):
        check_reader(lambda _: time.sleep(30), "x")


@pytest.mark.parametrize(
    ("print_it", "code", "match"),
    [
        (lambda text: f"a.py: error: {text}\nand a second line\n", 2, "not one clear line"),
        (lambda text: "", 2, "not one clear line"),
        (lambda text: f"a.py: error: {text}", 2, "not one clear line"),
        (lambda text: f"a.py: error: \x1b[31m{text}\n", 2, "not one clear line"),
        (lambda text: f"a.py: error: {text * 1000}\n", 2, "not one clear line"),
        (lambda text: f"a.py: error: {text}\n", 1, "not 2"),
        (lambda text: f"a.py: error: {text}\n", 0, "though"),
    ],
)
def test_a_planted_line_or_code_is_noticed(room, no_work, monkeypatch, print_it, code, match):
    def refuse(script, message):
        sys.stderr.write(print_it(message))
        return code

    monkeypatch.setattr(command_line, "_refuse", refuse)
    with pytest.raises(Fault, match=match):
        fuzz_options(50, 0, room)


@pytest.mark.parametrize("left", ["new.json", "old.json", "folder/.new-1"])
def test_a_planted_half_written_file_is_noticed(room, no_work, monkeypatch, left):
    def fail(args):
        (room[1] / left).write_text("{")
        raise UsageError("planted")

    monkeypatch.setattr(main, "make_setting", fail)
    with pytest.raises(Fault, match="files changed"):
        check(main, [], room[1])


# ---- all of it ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_thousand_malformed_inputs(room, no_work, tmp_path, monkeypatch):
    refused, taken = fuzz_readers(6000, 1000, tmp_path)
    codes = fuzz_options(4500, 1001, room)
    files = fuzz_files_of_scripts(2500, 1002, room)
    for module in (update_readme, committed):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    results = fuzz_results(400, 1003, tmp_path)
    files += Counter({("report", code): n for code, n in fuzz_documents(500, 1004, room).items()})
    print(f"files: {refused.total()} refused, {taken.total()} of use after all")
    for title, found in (("arguments", codes), ("scripts with files", files)):
        told = ", ".join(f"{name} {code}: {n}" for (name, code), n in sorted(found.items()))
        print(f"{title}: {told}")
    print(f"results: {results} refused")
    bad = (
        results + refused.total() + sum(n for (_, code), n in (codes + files).items() if code == 2)
    )
    print(f"{bad} malformed inputs, one line and 2 each")
    assert bad >= 10_000
