"""What a vLLM server said of itself when it started: a startup log, read with care.

Reproduces nothing of the paper. The wordings are those of vLLM 0.2 to 0.33, held against the source
of 19 versions. A message is found wherever in a line it stands: what is before it (time, process,
colours) does not matter.

    log = read_log("server.log")        # LogError, one line, if it is no such log
    log.kv_cache_gib, log.kv_tokens     # None where the log does not say it

Ranks differ: of blocks, tokens, K/V memory and concurrency the smallest is kept, since it decides,
with the parts of the rank that has least left; of all else the first. Of several starts in a file
the last is read that got as far as its cache. What the engine says goes before what it was asked
for, an exact number before a rounded one.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice

from vllm_sim.reporting.files import read_bounded, short_name

MAX_BYTES = 64 * 2**20


class LogError(ValueError):
    """A log cannot be used; the message is one line with its name and the reason."""


@dataclass(frozen=True)
class ServerLog:
    """What a log states, None where it does not; sizes in GiB, of one GPU.

    `activations_gib` is torch's peak above the weights, `cuda_graphs_gib` what the graphs took when
    they were captured, `cuda_graphs_reserved_gib` what was set aside for them before the cache got
    the rest (0.21 on). `max_concurrency` is of requests of `concurrency_tokens` each.
    """

    version: str | None = None
    model: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None  # 'auto': as the model's
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    data_parallel: int | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    enforce_eager: bool | None = None
    gpu: str | None = None
    total_gib: float | None = None
    weights_gib: float | None = None
    activations_gib: float | None = None
    non_torch_gib: float | None = None
    cuda_graphs_gib: float | None = None
    cuda_graphs_reserved_gib: float | None = None
    kv_cache_gib: float | None = None  # below zero where nothing was left
    num_gpu_blocks: int | None = None
    num_cpu_blocks: int | None = None
    kv_tokens: int | None = None
    max_concurrency: float | None = None
    concurrency_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not _possible(name, value):
                raise LogError(f"{name} cannot be {value!r:.50}")


NUMBER = r"-?[0-9][0-9,]{0,14}(?:\.[0-9]{1,20})?"
READ = {
    "gib": rf"({NUMBER}) ?Gi?B",
    "number": rf"({NUMBER})",
    "count": r"([0-9][0-9,]{0,14})(?![0-9,])",
    "word": r"([^\s,)]{1,300})",
    "card": r"((?:NVIDIA|AMD|Tesla|Quadro|GeForce)[ _][\w +-]{1,60})",
    "any": r"\S{1,60}",
}
# Each fact, then where it is read: the best wording first, the versions that have it behind. 'GB'
# was written until 0.7 for what had been divided by 2**30 (model_runner.py in 0.4.2 to 0.7.3).
WORDINGS = """
version: LLM engine (v<word>) | vLLM API server version <word>   0.4 on
version: vLLM server version <word> | LOGO version <word>   0.17 on
model: vLLM server version <any>, serving model <word> | LOGO model <word>
gpu_memory_utilization: Desired GPU memory utilization is (<number>,   0.10 on
gpu_memory_utilization: desired GPU memory utilization (<number>,   refused: so much is not free
gpu_memory_utilization: The current --gpu-memory-utilization=<number> is equivalent   0.18 on
gpu_memory_utilization: increase --gpu-memory-utilization from <number> to   0.18, 0.19
gpu_memory_utilization: gpu_memory_utilization (<number>)   0.7 to 0.10, rounded
gpu_memory_utilization: GiB gpu_memory_utilization=<number>   0.6.4, rounded
max_model_len: Using max model len <count>   0.9 on
max_num_seqs: Defaulting max_num_seqs to <count>   debug
max_num_batched_tokens: Chunked prefill is enabled with max_num_batched_tokens=<count>
max_num_batched_tokens: Defaulting max_num_batched_tokens to <count>   debug
block_size: Setting attention block size to <count> tokens   hybrid models
block_size: Setting kv cache block size to <count> | Forcing kv cache block size to <count>
gpu: device_name=<card> | Your <card> GPU has compute capability   a kernel sought; refused
gpu: GPU 0: <card>   nvidia-smi -L
total_gib: total_gpu_memory (<gib>) | total_gpu_memory=<gib>   0.7 to 0.10; 0.6.4
total_gib: Free memory on device (<any>/<gib>) | Free memory on device <any> (<any>/<gib>)
total_gib: total_memory=<gib>   debug
weights_gib: weights memory: <gib> | Actual usage is <gib> for weight,   0.9 on, debug; 0.10 to 0.25
weights_gib: Model loading took <gib> | Loading model weights took <gib>   0.8 on; 0.4 to 0.7
weights_gib: model weights take <gib>   0.7 to 0.10
activations_gib: torch peak memory increase: <gib>   0.9 on, debug
activations_gib: PyTorch activation peak memory takes <gib>   0.7 to 0.10
activations_gib: GiB for weight, <gib> for peak activation   0.10 to 0.25
peak_with_weights_gib: peak_torch_memory=<gib>   0.6.4
peak_with_graphs_gib: (weights + non-torch), <gib> for peak activation   0.28 on
non_torch_gib: non-torch forward increase memory: <gib>   0.9 to 0.25, debug
non_torch_gib: non_torch_memory takes <gib>   0.7 to 0.10
non_torch_gib: non_torch_memory=<gib> kv_cache_size   0.6.4
non_torch_gib: for peak activation, <gib> for non-torch memory   0.10 to 0.25
consumed_gib: total consumed (from mem_get_info): <gib> | Actual usage is <gib> for consumed memory
cuda_graphs_gib: Graph capturing finished in <any> secs, took <gib>   0.6.4 on
cuda_graphs_gib: CUDA graph pool memory: <gib> (actual) | and <gib> for CUDAGraph memory
cuda_graphs_reserved_gib: Estimated CUDA graph memory: <gib> | GiB (actual), <gib> (estimated)
kv_cache_gib: Available KV cache memory: <gib>   0.9 on
kv_cache_gib: memory reserved for KV Cache is <gib> | kv_cache_size=<gib>   0.7 to 0.10; 0.6.4
kv_cache_gib: reserved <gib> memory for KV Cache   as was asked for
kv_cache_gib: available KV cache memory (<gib>)   refused: not enough for one request
kv_cache_gib: kv cache memory in use is <gib>
num_gpu_blocks: # GPU blocks: <count> | # CUDA blocks: <count> | # cuda blocks: <count>   to 0.9
num_cpu_blocks: # CPU blocks: <count>
blocks_of_all: after num_gpu_blocks is: <count>   0.9 on
kv_tokens: KV cache size: <count> tokens
max_concurrency: Maximum concurrency for <any> tokens per request: <number>x
concurrency_tokens: Maximum concurrency for <count> tokens per request
"""
SMALLEST = {"kv_cache_gib", "num_gpu_blocks", "num_cpu_blocks", "kv_tokens", "max_concurrency"}
# Lines of settings, and how many of a kind are read: of several engines the first.
ENGINE = r"Initializing an? (?:V[01] )?LLM engine[^\n]{0,80}? with config: ", 1
ARGS = r"\bargs: (?:Namespace\(|\{)", 4  # 'non-default args: {' from 0.9 on
RENAMED = {"max_seq_len": "max_model_len", "model_tag": "model"}  # `model` may be a default then
ASKED = {"data_parallel"}  # each engine of a dense model says 1 of itself (core.py in 0.19)
CHANGED = {"max_num_batched_tokens", "block_size"}  # a message tells what became of the setting
KINDS = {str | None: "word", int | None: "count", float | None: "number", bool | None: "flag"}
# What a version tells only as a sum: the whole, the part that is no part of it, and whether that
# part is nothing where it is not told.
WORKED_OUT = (
    ("activations_gib", "peak_with_weights_gib", "weights_gib", False),
    ("activations_gib", "peak_with_graphs_gib", "cuda_graphs_reserved_gib", True),
    ("non_torch_gib", "consumed_gib", "weights_gib", False),
)
BANNER = r"vLLM (?:API )?server version |\u2588 +version "  # where a start begins
CACHE = r"KV cache (?:size|memory): |# [A-Za-z]{1,20} blocks: "  # in a start that got so far


def read_log(path: str | os.PathLike[str]) -> ServerLog:
    """The startup log in this file. Raises LogError, and nothing else whatever the file has."""
    name = short_name(os.fspath(path))
    try:
        data = read_bounded(path, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise LogError(f"{name}: cannot be read: {reason}") from None
    if data is None:
        raise LogError(f"{name}: larger than {MAX_BYTES >> 20} MiB; its first lines are enough")
    text = _fullest_first(_last_start(_plain(data)))
    wordings: dict[str, list[str]] = {}
    for line in WORDINGS.strip().splitlines():
        fact, _, said = line.partition("   ")[0].partition(": ")
        wordings.setdefault(fact, []).extend(said.split(" | "))
    found = {fact: _said(fact, said, text) for fact, said in wordings.items()}
    asked = _settings(ARGS, text)
    settings = asked | _settings(ENGINE, text) | {key: asked[key] for key in ASKED & asked.keys()}
    for field in fields(ServerLog):
        value = _value(field.name, KINDS[field.type], settings.get(field.name, ""))
        if value is not None and not (field.name in CHANGED and found[field.name]):
            found[field.name] = value
    if "CUDA graph memory profiling is enabled" not in text:  # 0.18 to 0.20 only estimate
        found["cuda_graphs_reserved_gib"] = None
    for fact, whole, part, none in WORKED_OUT:
        if found[fact] is None and found[whole] is not None and (none or found[part] is not None):
            found[fact] = round(found[whole] - (found[part] or 0.0), 4)
    if found["num_gpu_blocks"] is None and found.get("data_parallel") in (None, 1):
        found["num_gpu_blocks"] = found["blocks_of_all"]
    log = ServerLog(**{field.name: found.get(field.name) for field in fields(ServerLog)})
    if log == ServerLog(gpu=log.gpu):  # a card alone is no log of a server
        raise LogError(
            f"{name}: no line of a vLLM startup log, such as 'Initializing a V1 LLM engine', "
            "'non-default args', 'Model loading took', 'Available KV cache memory', "
            "'GPU KV cache size', '# GPU blocks'"
        )
    return log


def _plain(data: bytes) -> str:
    """The text of a log: JSON lines opened, colours gone, a line a message."""
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # as PowerShell writes it
    text = data.decode("utf-16" if wide else "utf-8-sig", "replace").replace("\r", "\n")
    if re.search(r"^\{.*\}$", text, re.MULTILINE):
        text = "\n".join(map(_opened, text.split("\n")))
    return re.sub(r"\x1b\[[0-9;]{0,20}m", "", text)


def _opened(line: str) -> str:
    """What a JSON line of Docker, journald or a cloud says; any other line as it is."""
    if line[:1] + line[-1:] != "{}":
        return line
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return line
    said = [entry.get(key) for key in ("log", "message", "msg", "MESSAGE", "textPayload")]
    return next((text for text in said if isinstance(text, str)), line)


def _last_start(text: str) -> str:
    """The text without the starts that are not read, see above; what is before the first stays."""
    starts = [match.start() for match in re.finditer(BANNER, text)]
    for start, end in zip(starts[::-1], [None, *starts[:0:-1]]):
        if re.search(CACHE, part := text[start:end]):
            return text[: starts[0]] + part
    return text


def _fullest_first(text: str) -> str:
    """The text, before it the lines of the rank that has least left for its cache."""
    for wording in ("KV Cache is <gib>", "memory in use is <gib>", "non KV cache memory: <gib>"):
        left = -1 if wording.startswith("non") else 1
        found = re.finditer(_pattern(wording), text)
        least = min(found, key=lambda match: left * float(match[1].replace(",", "")), default=None)
        if least:
            start, end = text.rfind("\n", 0, least.start()) + 1, text.find("\n", least.end())
            text = f"{text[start : end if end >= 0 else None]}\n{text}"
    return text


def _pattern(wording: str) -> str:
    parts = re.split(r"<([a-z]+)>", wording.replace("LOGO", "\u2588"))
    return "".join(
        READ[part] if place % 2 else re.escape(part).replace(r"\ ", " {1,8}")
        for place, part in enumerate(parts)
    )


def _said(fact: str, wordings: list[str], text: str) -> object:
    """The first value that these wordings give a fact, of SMALLEST the least; None without one."""

    def values() -> Iterator:
        for wording in wordings:
            kind = next(kind for kind in re.findall("<([a-z]+)>", wording) if kind != "any")
            for match in re.finditer(_pattern(wording), text):
                if (value := _value(fact, kind, match[1])) is not None:
                    yield value

    return min(values(), default=None) if fact in SMALLEST else next(values(), None)


def _settings(lines: tuple[str, int], text: str) -> dict[str, str]:
    """Keys and values of such lines, of a key the first; not those within brackets."""
    found: dict[str, str] = {}
    for match in islice(re.finditer(lines[0], text), lines[1]):
        line = text[match.end() : match.end() + 2**16].partition("\n")[0]
        for _ in range(9):  # the innermost first: a draft model, say, has settings of its own
            line = re.sub(r"('[^']*')|[(\[{][^()\[\]{}]*[)\]}]", r"\1", line)
        pairs = re.findall(r"(?<!\w)(\w{1,60})'?(?:=|: )('[^']*'|\"[^\"]*\"|[^\s,)}]+)", line)
        for key, value in (pair for pair in pairs if pair[1] != "None"):
            key = RENAMED.get(key, key.replace("parallel_size", "parallel"))
            found.setdefault(key, value.strip("'\""))
    return found


def _value(fact: str, kind: str, text: str) -> object:
    """What a text says of a fact; None for nothing, or nothing possible."""
    value: object = text.removeprefix("torch.")
    if kind == "flag":
        value = {"True": True, "False": False}.get(text)
    elif kind in ("count", "number", "gib"):
        plain = text.replace(",", "")
        number = re.fullmatch("[0-9]{1,12}" if kind == "count" else NUMBER, plain)
        value = (int if kind == "count" else float)(plain) if number else None
    elif kind == "card":
        value = text.replace("_", " ").strip()
    return value if value is not None and _possible(fact, value) else None


def _possible(fact: str, value: object) -> bool:
    if isinstance(value, str):
        said = value != "auto" or fact == "kv_cache_dtype"
        return said and 0 < len(value) <= 300 and value.isprintable()
    if value is None or isinstance(value, bool) or fact.endswith("_gib"):
        return True
    return 0 < value <= 1 if fact == "gpu_memory_utilization" else value >= (fact not in SMALLEST)
