"""Startup logs of vLLM: wordings of every age, what stands around them, and files that are none.

The logs are of our own making: vLLM's wordings, our values. Some are as a user has them: coloured,
as JSON lines, of several ranks, of several starts.
"""

import contextlib
import json
import time
from dataclasses import asdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_sim.sizing import server_log
from vllm_sim.sizing.server_log import LogError, ServerLog, read_log

V02 = """
INFO 12-04 10:05:22 api_server.py:704] args: Namespace(host=None, model='/models/a (b)',\
 dtype='auto', max_model_len=None, block_size=32, swap_space=4,\
 gpu_memory_utilization=0.85, max_num_seqs=128,\
 max_num_batched_tokens=None, quantization=None, tensor_parallel_size=2)
INFO 12-04 10:05:22 llm_engine.py:7] Initializing an LLM engine with config: model='/models/a (b)',\
 tokenizer='/models/a (b)', dtype=torch.float16, max_seq_len=4096, tensor_parallel_size=2,\
 quantization=awq, enforce_eager=False, seed=0)
INFO 12-04 10:05:30 llm_engine.py:207] # GPU blocks: 3071, # CPU blocks: 2048
"""
V06 = """
INFO 10-04 09:00:01 api_server.py:528] vLLM API server version 0.6.3.post1
INFO 10-04 09:00:09 llm_engine.py:237] Initializing an LLM engine (v0.6.3.post1) with config:\
 model='org/m', speculative_config=SpeculativeConfig(draft_model='org/draft', num_spec_tokens=3),\
 dtype=torch.bfloat16, max_seq_len=8192, tensor_parallel_size=1, pipeline_parallel_size=2,\
 quantization=fp8, enforce_eager=True, kv_cache_dtype=fp8_e4m3, seed=0, served_model_name=other)
INFO 10-04 09:00:09 config.py:1005] Chunked prefill is enabled with max_num_batched_tokens=512.
INFO 10-04 09:00:20 model_runner.py:1067] Loading model weights took 8.4927 GB
INFO 10-04 09:00:25 distributed_gpu_executor.py:57] # GPU blocks: 41,234, # CPU blocks: 4096
INFO 10-04 09:00:25 distributed_gpu_executor.py:61] Maximum concurrency for 8192 tokens per\
 request: 80.54x
"""
V064 = """
INFO 12-06 17:07:09 model_runner.py:1077] Loading model weights took 3.2500 GB
INFO 12-06 17:07:09 worker.py:232] Memory profiling results: total_gpu_memory=15.75GiB\
 initial_memory_usage=3.90GiB peak_torch_memory=4.75GiB memory_usage_post_profile=4.10Gib\
 non_torch_memory=0.25GiB kv_cache_size=9.18GiB gpu_memory_utilization=0.90
"""
V07 = """
Your Tesla T4 GPU has compute capability 7.5.
INFO 03-01 10:30:40 llm_engine.py:234] Initializing a V0 LLM engine (v0.7.3) with config:\
 model='org/m', tokenizer='org/m', dtype=torch.half, max_seq_len=2048, tensor_parallel_size=1,\
 use_cached_outputs=False,
INFO 03-01 10:30:57 worker.py:267] Memory profiling takes 1.48 seconds
INFO 03-01 10:30:57 worker.py:267] the current vLLM instance can use total_gpu_memory (14.56GiB) x\
 gpu_memory_utilization (0.93) = 13.54GiB
INFO 03-01 10:30:57 worker.py:267] model weights take 2.98GiB; non_torch_memory takes -0.05GiB;\
 PyTorch activation peak memory takes 1.40GiB; the rest of the memory reserved for KV Cache is\
 9.21GiB.
INFO 03-01 10:30:57 executor_base.py:111] # cuda blocks: 21557, # CPU blocks: 9362
INFO 03-01 10:30:58 model_runner.py:1562] Graph capturing finished in 19 secs, took 0.18 GiB
"""
V08 = """
INFO 04-14 06:00:52 [api_server.py:1034] vLLM API server version 0.8.5
INFO 04-14 06:00:59 [core.py:58] Initializing a V1 LLM engine (v0.8.5) with config: model='org/m',\
 speculative_config=None, tokenizer='org/m', dtype=torch.bfloat16, max_seq_len=40960,\
 tensor_parallel_size=4, pipeline_parallel_size=1, quantization=None, kv_cache_dtype=auto, \
 device_config=cuda
WARNING [fused_moe.py:683] Using default MoE config. Config file not found at /a/b/E=128,N=192,\
device_name=NVIDIA_L40S.json
INFO 04-14 06:01:22 [gpu_model_runner.py:1347] Model loading took 14.2717 GiB and 9.123456 seconds
INFO 04-14 06:01:40 [kv_cache_utils.py:634] GPU KV cache size: 612,032 tokens
INFO 04-14 06:01:40 [kv_cache_utils.py:637] Maximum concurrency for 40,960 tokens per request:\
 14.94x
"""
LOGO = "\u2588 \u2580\u2584 \u2588  version 0.19.0\n\u2588     \u2588  model   org/m"
V19 = f"""{LOGO}
(APIServer pid=1) INFO [utils.py:233] non-default args: {{'model_tag': 'org/m', 'max_num_seqs': 64,\
 'gpu_memory_utilization': 0.925, 'speculative_config': {{'model': 'org/d', 'max_model_len': 9}},\
 'block_size': 16}}
(EngineCore pid=2) INFO [core.py:105] Initializing a V1 LLM engine (v0.19.0) with config:\
 model='org/m', dtype=torch.bfloat16, max_seq_len=8192, tensor_parallel_size=1,\
 pipeline_parallel_size=1, data_parallel_size=1, quantization=None, enforce_eager=False,\
 kv_cache_dtype=auto, compilation_config={{'mode': <Mode.ON: 3>, 'sizes': [1, 2], 'dtype': 'x'}}
(EngineCore pid=2) INFO [interface.py:1] Setting attention block size to 528 tokens to ensure that
(EngineCore pid=2) DEBUG [gpu_worker.py:284] worker init memory snapshot: torch_peak=0.0GiB,\
 free_memory=78.68GiB, total_memory=79.19GiB, torch_memory=0.0GiB, non_torch_memory=0.51GiB
(EngineCore pid=2) INFO [gpu_model_runner.py:5956] Estimated CUDA graph memory: 0.84 GiB total
(EngineCore pid=2) DEBUG [gpu_worker.py:435] Memory profiling takes 9.14 seconds. Total non KV\
 cache memory: 17.13GiB; torch peak memory increase: 1.89GiB; non-torch forward increase memory:\
 0.25GiB; weights memory: 14.99GiB.
(EngineCore pid=2) INFO [gpu_worker.py:436] Available KV cache memory: 56.12 GiB
(EngineCore pid=2) INFO [gpu_worker.py:470] In v0.19, CUDA graph memory profiling will be enabled\
 by default, increase --gpu-memory-utilization from 0.9250 to 0.9356 to maintain
(EngineCore pid=2) INFO [kv_cache_utils.py:1319] GPU KV cache size: 408,672 tokens
(EngineCore pid=2) INFO [gpu_model_runner.py:6047] Graph capturing finished in 7 secs, took 0.91 GiB
(APIServer pid=1) DEBUG [loggers.py:273] Engine 000: after num_gpu_blocks is: 774
"""
V22 = """
(EngineCore pid=2) INFO [core.py:113] Initializing a V1 LLM engine (v0.22.0) with config: model='m'
(EngineCore pid=2) INFO [gpu_model_runner.py:6366] Estimated CUDA graph memory: 0.75 GiB total
(EngineCore pid=2) INFO [gpu_worker.py:482] CUDA graph memory profiling is enabled (default since\
 v0.21.0). The current --gpu-memory-utilization=0.9200 is equivalent to\
 --gpu-memory-utilization=0.9105 without CUDA graph memory profiling.
(EngineCore pid=2) INFO [gpu_worker.py:620] CUDA graph pool memory: 0.5 GiB (actual), 0.75 GiB\
 (estimated), difference: 0.25 GiB (50.0%).
(EngineCore pid=2) INFO [gpu_worker.py:680] Free memory on device (78.7/79.19 GiB) on startup.\
 Desired GPU memory utilization is (0.92, 72.85 GiB). Actual usage is 7.63 GiB for weight, 2.25 GiB\
 for peak activation, 0.25 GiB for non-torch memory, and 0.5 GiB for CUDAGraph memory. Replace\
 gpu_memory_utilization config with `--kv-cache-memory=1` (1.0 GiB) to fit into requested memory.\
 Current kv cache memory in use is 61.97 GiB.
"""
V33 = (
    V22.replace("v0.22.0", "v0.33.0")
    .replace(
        "7.63 GiB for weight, 2.25 GiB for peak activation, 0.25 GiB for non-torch memory,",
        "8.0 GiB for consumed memory (weights + non-torch), 3.0 GiB for peak activation,",
    )
    .replace(
        " INFO [gpu_worker.py:620]", " INFO Model loading took 7.63 GiB memory and 3.1 seconds\n"
    )
)
V33 += "INFO GPU + host KV cache size: 1,234,567 tokens, Maximum concurrency for 98,304 tokens per"
V33 += " request: 12.56x\n"

SAID = {
    "0.2": (
        V02,
        "model=/models/a (b), dtype=float16, quantization=awq, tensor_parallel=2, "
        "gpu_memory_utilization=0.85, max_model_len=4096, max_num_seqs=128, block_size=32, "
        "enforce_eager=False, num_gpu_blocks=3071, num_cpu_blocks=2048",
    ),
    "0.6.3": (
        V06,
        "version=0.6.3.post1, model=org/m, dtype=bfloat16, quantization=fp8, "
        "kv_cache_dtype=fp8_e4m3, tensor_parallel=1, pipeline_parallel=2, max_model_len=8192, "
        "max_num_batched_tokens=512, enforce_eager=True, weights_gib=8.4927, num_gpu_blocks=41234, "
        "num_cpu_blocks=4096, max_concurrency=80.54, concurrency_tokens=8192",
    ),
    "0.6.4": (
        V064,
        "gpu_memory_utilization=0.9, total_gib=15.75, weights_gib=3.25, activations_gib=1.5, "
        "non_torch_gib=0.25, kv_cache_gib=9.18",
    ),
    "0.7": (
        V07,
        "version=0.7.3, model=org/m, dtype=half, tensor_parallel=1, gpu_memory_utilization=0.93, "
        "max_model_len=2048, gpu=Tesla T4, total_gib=14.56, weights_gib=2.98, activations_gib=1.4, "
        "non_torch_gib=-0.05, cuda_graphs_gib=0.18, kv_cache_gib=9.21, num_gpu_blocks=21557, "
        "num_cpu_blocks=9362",
    ),
    "0.8": (
        V08,
        "version=0.8.5, model=org/m, dtype=bfloat16, kv_cache_dtype=auto, tensor_parallel=4, "
        "pipeline_parallel=1, max_model_len=40960, gpu=NVIDIA L40S, weights_gib=14.2717, "
        "kv_tokens=612032, max_concurrency=14.94, concurrency_tokens=40960",
    ),
    "0.19": (
        V19,
        "version=0.19.0, model=org/m, dtype=bfloat16, kv_cache_dtype=auto, tensor_parallel=1, "
        "pipeline_parallel=1, data_parallel=1, gpu_memory_utilization=0.925, max_model_len=8192, "
        "max_num_seqs=64, block_size=528, enforce_eager=False, total_gib=79.19, weights_gib=14.99, "
        "activations_gib=1.89, non_torch_gib=0.25, cuda_graphs_gib=0.91, kv_cache_gib=56.12, "
        "num_gpu_blocks=774, kv_tokens=408672",
    ),
    "0.22": (
        V22,
        "version=0.22.0, model=m, gpu_memory_utilization=0.92, total_gib=79.19, weights_gib=7.63, "
        "activations_gib=2.25, non_torch_gib=0.25, cuda_graphs_gib=0.5, "
        "cuda_graphs_reserved_gib=0.75, kv_cache_gib=61.97",
    ),
    "0.33": (
        V33,
        "version=0.33.0, model=m, gpu_memory_utilization=0.92, total_gib=79.19, weights_gib=7.63, "
        "activations_gib=2.25, non_torch_gib=0.37, cuda_graphs_gib=0.5, "
        "cuda_graphs_reserved_gib=0.75, kv_cache_gib=61.97, kv_tokens=1234567, "
        "max_concurrency=12.56, concurrency_tokens=98304",
    ),
}
# Lines that a server may log beside those, and what each says.
LINES = {
    "vLLM server version 0.25.1, serving model org/m": "version=0.25.1, model=org/m",
    LOGO: "version=0.19.0, model=org/m",
    "vLLM API server version 0.8.5": "version=0.8.5",
    "Desired GPU memory utilization is (0.95, 75.23 GiB).": "gpu_memory_utilization=0.95",
    "increase --gpu-memory-utilization from 0.9250 to 0.9356": "gpu_memory_utilization=0.925",
    "Estimated CUDA graph memory: 0.75 GiB total\nCUDA graph memory profiling is enabled. "
    "The current --gpu-memory-utilization=0.9000 is equivalent to": (
        "gpu_memory_utilization=0.9, cuda_graphs_reserved_gib=0.75"
    ),
    "CUDA graph memory profiling is enabled (default since v0.21.0).\n"
    "CUDA graph pool memory: 0.5 GiB (actual), 0.75 GiB (estimated)": (
        "cuda_graphs_gib=0.5, cuda_graphs_reserved_gib=0.75"
    ),
    "CUDA graph pool memory: 0.5 GiB (actual), 0.75 GiB (estimated)": "cuda_graphs_gib=0.5",
    "memory, and 0.25 GiB for CUDAGraph memory. Replace": "cuda_graphs_gib=0.25",
    "Using max model len 8192": "max_model_len=8192",
    "Defaulting max_num_seqs to 1024 for OPENAI_API_SERVER usage context.": "max_num_seqs=1024",
    "Defaulting max_num_batched_tokens to 8192 for": "max_num_batched_tokens=8192",
    "Forcing kv cache block size to 64 for FlashMLA backend.": "block_size=64",
    "Setting kv cache block size to 32 for X backend.": "block_size=32",
    "# CUDA blocks: 0, # CPU blocks: 0": "num_gpu_blocks=0, num_cpu_blocks=0",
    "# GPU blocks: 1381": "num_gpu_blocks=1381",
    "Model loading took 5.75 GiB and 1.1 seconds\nGPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)": (
        "gpu=NVIDIA H100 80GB HBM3, weights_gib=5.75"
    ),
    "E=8,N=2,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8.json\n# GPU blocks: 7": (
        "gpu=NVIDIA H100 80GB HBM3, num_gpu_blocks=7"
    ),
    "ValueError: Free memory on device cuda:0 (5.5/79.25 GiB) on startup is less than desired GPU "
    "memory utilization (0.9, 71.32 GiB).": "gpu_memory_utilization=0.9, total_gib=79.25",
    "Initial free memory 31.17 GiB, reserved 1.62 GiB memory for KV Cache as": "kv_cache_gib=1.62",
    "larger than the available KV cache memory (4.25 GiB). Based on": "kv_cache_gib=4.25",
    "Available KV cache memory: -1.44 GiB": "kv_cache_gib=-1.44",
    "Graph capturing finished in 3 secs, took -0.42 GiB": "cuda_graphs_gib=-0.42",
    "Memory profiling takes 31.20 seconds. Total non KV cache memory: 10.50GiB; torch peak memory "
    "increase: 2.04GiB; total consumed (from mem_get_info): 8.50GiB; weights memory: 8.00GiB.": (
        "weights_gib=8.0, activations_gib=2.04, non_torch_gib=0.5"
    ),
}


def said(log):
    return ", ".join(f"{name}={value}" for name, value in asdict(log).items() if value is not None)


@pytest.fixture
def read(write):
    return lambda text: read_log(write(text, "server.log"))


@pytest.mark.parametrize("version", SAID)
def test_each_wording_is_read(version, read):
    text, facts = SAID[version]
    assert said(read(text)) == facts


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:40])
def test_each_line_alone_is_read(line, read):
    assert said(read(line)) == LINES[line]


def coloured(line):
    return f"\x1b[0;36m(EngineCore_DP0 pid=7)\x1b[0;0m \x1b[32mINFO\x1b[0m {line}\r"


AROUND = {
    "colours": coloured,
    "time": lambda line: f"2025-12-05T10:11:12.123456789Z stderr F {line}",
    "docker": lambda line: json.dumps({"log": coloured(line) + "\n", "stream": "stderr"}),
    "cloud": lambda line: json.dumps({"severity": "INFO", "message": line}),
    "journal": lambda line: json.dumps({"PRIORITY": 6, "MESSAGE": f"vllm[1]: {line}"}),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("version", SAID)
def test_what_stands_around_a_line_changes_nothing(version, around, read):
    text, facts = SAID[version]
    assert said(read("\n".join(map(AROUND[around], text.split("\n"))))) == facts


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_file_as_windows_writes_it_is_read(encoding, tmp_path):
    path = tmp_path / "server.log"
    path.write_bytes(V19.replace("\n", "\r\n").encode(encoding))
    assert said(read_log(path)) == SAID["0.19"][1]


def test_of_ranks_the_smallest_cache_counts_and_the_parts_beside_it(read):
    line = (
        "(Worker_PP{} pid=1) DEBUG Total non KV cache memory: {}GiB; torch peak memory increase: "
        "{}GiB; non-torch forward increase memory: 0.07GiB; weights memory: {}GiB."
    )
    log = read(
        "INFO Model loading took 4.26 GiB memory and 2.8 seconds\n"
        + line.format(1, 4.40, 1.05, 3.28)
        + "\n"
        + line.format(3, 6.34, 2.01, 4.26)
        + "\n"
        + line.format(0, 5.43, 1.10, 4.26)
        + "\n(Worker_PP0 pid=1) INFO Available KV cache memory: 69.80 GiB"
        "\n(Worker_PP3 pid=1) INFO Available KV cache memory: 68.89 GiB"
        "\nGPU KV cache size: 2,290,000 tokens\nGPU KV cache size: 2,257,264 tokens"
        "\nMaximum concurrency for 8,192 tokens per request: 279.54x"
        "\nMaximum concurrency for 8,192 tokens per request: 275.55x"
    )
    assert said(log) == (
        "weights_gib=4.26, activations_gib=2.01, non_torch_gib=0.07, kv_cache_gib=68.89, "
        "kv_tokens=2257264, max_concurrency=275.55, concurrency_tokens=8192"
    )


def test_blocks_of_all_engines_together_are_none_of_one(read):
    """Which says that it is alone, while its server was asked for two."""
    log = read(V19.replace("'block_size': 16", "'data_parallel_size': 2"))
    assert (log.data_parallel, log.num_gpu_blocks) == (2, None)


def test_of_several_starts_the_last_that_got_as_far_as_its_cache_is_read(read):
    start = "vLLM API server version 0.8.{}\nUsing max model len {}\n"
    good = start.format(2, 2048) + "GPU KV cache size: 9,000 tokens\n"
    failed = start.format(1, 4096) + "Available memory is not enough\n"
    earlier = start.format(0, 1024) + "GPU KV cache size: 1,000 tokens\n"
    assert said(read(earlier + good + failed)) == (
        "version=0.8.2, max_model_len=2048, kv_tokens=9000"
    )
    assert said(read(failed)) == "version=0.8.1, max_model_len=4096"


def test_what_cannot_be_is_not_said(read):
    text = "args: Namespace(model='', tensor_parallel_size=0, block_size=-1, max_model_len='x', "
    text += "gpu_memory_utilization=9, enforce_eager=maybe, dtype='a\u200bb', quantization='q'\n"
    assert said(read(text + "Using max model len " + "9" * 5000)) == "quantization=q"


@pytest.mark.parametrize(
    "content", [b"", b"\0\xff\xfe", b"hello\n", b"{}", b'{"log": 3}', b"GPU 0: NVIDIA L4\n"]
)
def test_a_file_that_is_no_log_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "odd.log"
    path.write_bytes(content)
    with pytest.raises(LogError, match=r"^odd\.log: no line of a vLLM startup log, such as .*'$"):
        read_log(path)


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(LogError, match=r"^none\.log: cannot be read: No such file or directory$"):
        read_log(tmp_path / "none.log")
    with pytest.raises(LogError, match="cannot be read: "):
        read_log(tmp_path)
    with pytest.raises(LogError, match="cannot be read: embedded null byte"):
        read_log("a\0b")
    monkeypatch.setattr(server_log, "MAX_BYTES", 2**20)
    (tmp_path / "long.log").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(LogError, match=r"^long\.log: larger than 1 MiB; "):
        read_log(tmp_path / "long.log")


@pytest.mark.parametrize(
    "wrong",
    [{"kv_tokens": -1}, {"tensor_parallel": 0}, {"gpu_memory_utilization": 1.5}, {"model": ""}],
)
def test_a_log_that_cannot_be_is_refused(wrong):
    with pytest.raises(LogError, match=next(iter(wrong))):
        ServerLog(**wrong)


TEXTS = [text for text, _ in SAID.values()]
PIECES = sorted({word for text in TEXTS for word in text.split(" ")} | set("([{'\"=:,\n\x1b"))


@settings(deadline=None)
@given(st.binary() | st.lists(st.sampled_from(PIECES)).map(" ".join).map(str.encode))
@example(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
@example(b"{x}\nUsing max model len 8")
@example(b"\xff\xfe{\0" + b"\0\xd8" * 9)
@example(b'{"log": "Model loading took 1 GiB, serving model \\ud800"}')
def test_no_bytes_raise_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.log"
    path.write_bytes(content)
    try:
        log = read_log(path)
    except LogError as error:
        assert "\n" not in str(error)
    else:
        assert any(value is not None for value in vars(log).values())
        str(log).encode()  # whoever prints it can


@given(st.sampled_from(TEXTS), st.data())
def test_no_damage_raises_anything_else(tmp_path_factory, text, data):
    content = bytearray(text.encode())
    at = data.draw(st.integers(0, len(content)))
    content[at : at + data.draw(st.integers(0, 200))] = data.draw(st.binary(max_size=20))
    path = tmp_path_factory.getbasetemp() / "any.log"
    path.write_bytes(content)
    with contextlib.suppress(LogError):  # as of a mark of UTF-16 before it
        read_log(path)


SLOW = [
    "(",
    "'",
    '"',
    "x",
    "9",
    "9,",
    "a=",
    "a='",
    "{\n",
    "\u2588 ",
    "device_name=NVIDIA_",
    "((a=1)",
]
SLOW += ["Initializing an LLM engine ", "args: {'a': ", "Free memory on device ", "GiB (actual), 1"]
SLOW += ["KV cache size: 1", "non KV cache memory: 1GiB", "vLLM server version ", "LLM engine (v"]


@pytest.mark.parametrize("piece", SLOW, ids=ascii)
def test_no_text_takes_long(piece, write):
    for before in ("", "args: {", "Initializing an LLM engine with config: "):
        start = time.process_time()
        with contextlib.suppress(LogError):
            read_log(write(before + piece * (2**20 // len(piece)), "long.log"))
        assert time.process_time() - start < 5  # 0.2 as a rule
