"""Full length files: how they are read, and the lengths of Figs. 11, 16 and 17 from them.

Tests against the full length files look for them in the folder LENGTHS_DIR (environment), or
else in ../shared/data beside the repository, and are skipped where they are absent.
"""

import gzip
import os
import pickle
import random
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from vllm_sim.workload import data_sets, length_tables, text_files
from vllm_sim.workload.data_sets import (
    DATASETS,
    Lengths,
    chat_rounds,
    find_lengths,
    read_lengths,
    read_pairs,
)
from vllm_sim.workload.length_tables import WMT16_PROMPTS
from vllm_sim.workload.requests import make_trace, poisson_arrivals
from vllm_sim.workload.text_files import WorkloadError

DATA = Path(
    os.environ.get("LENGTHS_DIR") or Path(__file__).resolve().parents[3] / "shared" / "data"
)
SHAREGPT_FILE = DATA / "sharegpt_sosp23_opt_lengths.csv.gz"
FILES = {
    "ShareGPT": SHAREGPT_FILE,
    "Alpaca": DATA / "alpaca_opt_lengths.csv.gz",
    "WMT16 1-shot": DATA / "wmt16_ende_newstest2016_llama_lengths.csv.gz",
    "WMT16 5-shot": DATA / "wmt16_ende_newstest2016_llama_lengths.csv.gz",
    "chat": DATA / "sharegpt_v3_first17671_turn_lengths.csv.gz",
}
needs_data = pytest.mark.skipif(
    not all(path.is_file() for path in FILES.values()),
    reason=f"the length files are not in {DATA} (set LENGTHS_DIR)",
)
COMPACT = Lengths({})

PAIRS = "input_len,output_len\n3,4\n2000,47\n2000,48\n5,6\n"
ALPACA = "index,input_len,output_len,input_len_llama\n0,9,46,11\n1,2000,48,7\n"
SUFFIX = "suffix_tokens_after_shared_prefix"
WMT16 = (
    f"index,source_llama_tokens,output_llama_tokens,{SUFFIX}_1shot,{SUFFIX}_5shot\n"
    "0,7,9,7,12\n1,15,20,15,20\n2,900,1000,968,973\n3,901,1000,969,974\n"
)
CHAT_HEAD = "conversation,chunk_suffix,turn,from,opt_tokens_no_bos,llama_tokens_no_bos\n"
CHAT = CHAT_HEAD + "0,0,0,human,6,7\n0,0,1,gpt,16,17\n0,0,2,human,1,1\n0,0,3,gpt,2,2\n"
OTHERS = {
    "mooncake.jsonl": '{"timestamp": 0, "input_length": 5, "output_length": 6}\n',
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,374,44\n",
    "alpaca_20k.csv": "split,id,L_gt,L_t0.0\ntrain,5,160,115\n",
    "empty.csv": "",
    "README.md": "# Lengths\n",
}


@pytest.fixture
def write(tmp_path):
    """Writes a text as a file of the given name, gzipped if it ends in .gz; returns its path."""

    def file(name, text):
        content = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(tmp_path / name)

    return file


def chat_file(*turns):
    """The text of a chat file, from (conversation, chunk_suffix, from, tokens) of each turn."""
    lines = (f"{talk},{chunk},0,{speaker},{n},1\n" for talk, chunk, speaker, n in turns)
    return CHAT_HEAD + "".join(lines)


# --- reading length files -----------------------------------------------------------------


def test_reads_plain_and_gzipped_files_whatever_their_names(tmp_path):
    text = b"\xef\xbb\xbfoutput_len,index, input_len \r\n5,0,3\r\n\r\n 6 ,1,10000000\r\n1,2,007"
    for name, content in (("a.gz", text), ("b.csv", gzip.compress(text))):
        path = tmp_path / name
        path.write_bytes(content)
        for spelling in (path, str(path)):
            inputs, outputs = read_lengths(spelling)
            assert inputs.tolist() == [3, 10_000_000, 7]
            assert outputs.tolist() == [5, 6, 1]
            assert inputs.dtype == outputs.dtype == np.int64


HEAD = b"input_len,output_len\n"
MALFORMED = {
    "empty": (b"", "header"),
    "header only": (HEAD, "no rows"),
    "no header": (b"1,2\n3,4\n", "line 1: the header"),
    "column missing": (b"input_len,output\n1,2\n", "line 1: the header"),
    "column twice": (b"input_len,output_len,input_len\n1,2,3\n", "line 1: the header"),
    "cell missing": (HEAD + b"1,2\n3\n", "line 3: 1 cells"),
    "cell too many": (HEAD + b"1,2\n3,4,5\n", "line 3: 3 cells"),
    "cell empty": (HEAD + b"1,\n", "line 2: '' is not"),
    "word": (HEAD + b"1,2\nabc,4\n", "line 3: 'abc' is not"),
    "fraction": (HEAD + b"1.5,2\n", "line 2: '1.5' is not"),
    "not a number": (HEAD + b"nan,2\n", "line 2: 'nan' is not"),
    "underscore": (HEAD + b"1_0,2\n", "line 2: '1_0' is not"),
    "other digits": (HEAD + "\u0663,2\n".encode(), "line 2: .* is not"),
    "negative": (HEAD + b"1,-2\n", "line 2: '-2' is not"),
    "zero": (HEAD + b"0,2\n", "line 2: '0' is not"),
    "huge": (HEAD + b"1,10000001\n", "line 2: '10000001' is not"),
    "very long number": (HEAD + b"1," + b"9" * 5000 + b"\n", "line 2: '9+' is not"),
    "long line": (HEAD + b"1,2" + b" " * 70_000 + b"\n", "line 2: .* too long"),
    "binary": (bytes(range(256)) * 20, "header"),
    "binary after the header": (HEAD + b"\xff\xfe,\x00\n", "line 2"),
    "gzip of binary": (gzip.compress(bytes(range(256))), "header"),
    "gzip of nothing": (gzip.compress(b""), "header"),
    "truncated gzip": (gzip.compress(HEAD + b"12,34\n" * 5000)[:-30], "cannot be read"),
    "gzip magic only": (b"\x1f\x8b", "cannot be read"),
    "corrupt gzip": (gzip.compress(HEAD + b"1,2\n")[:10] + b"\xff" * 40, "cannot be read"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_are_refused_with_one_line(tmp_path, content, message):
    path = tmp_path / "lengths.csv"
    path.write_bytes(content)
    with pytest.raises(WorkloadError, match=message) as caught:
        read_lengths(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and text.isascii()
    assert len(text) < len(str(path)) + 120


def test_missing_file_and_directory_are_refused(tmp_path):
    for path, message in ((tmp_path / "none.csv", "No such file"), (tmp_path, "directory")):
        with pytest.raises(WorkloadError, match=message) as caught:
            read_lengths(path)
        assert str(path) in str(caught.value)


def test_size_is_bounded_after_unpacking(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_FILE_BYTES", 1000)
    path = tmp_path / "lengths.csv.gz"
    packed = gzip.compress(HEAD + b"1,2\n" * 2000)
    assert len(packed) < 1000
    path.write_bytes(packed)
    with pytest.raises(WorkloadError, match="too long"):
        read_lengths(path)
    path.write_bytes(HEAD + b"1,2\n" * 240)
    assert read_lengths(path)[0].size == 240


# --- recognising files --------------------------------------------------------------------


KINDS = {
    "only pairs": ("x.csv", PAIRS, {"ShareGPT": [(3, 4), (2000, 47), (5, 6)]}),
    "ShareGPT": ("My_ShareGPT.csv.gz", PAIRS, {"ShareGPT": [(3, 4), (2000, 47), (5, 6)]}),
    "Alpaca by name": (
        "alpaca.csv",
        PAIRS + "2000,49\n",
        {"Alpaca": [(3, 4), (2000, 47), (2000, 48), (5, 6)]},
    ),
    "Alpaca by header": ("sharegpt.csv", ALPACA, {"Alpaca": [(9, 46), (2000, 48)]}),
    "WMT16": (
        "lengths.csv.gz",
        WMT16,  # 80 + 968 + 1000 tokens just fit, and 336 + 973 + 1000 do not
        {"WMT16 1-shot": [(7, 9), (15, 20), (968, 1000)], "WMT16 5-shot": [(12, 9), (20, 20)]},
    ),
    "chat": ("sharegpt.csv", CHAT, {"chat": [(10, 20), (35, 6)]}),
}


@pytest.mark.parametrize(("name", "text", "wanted"), KINDS.values(), ids=KINDS)
def test_a_file_is_known_by_its_header(write, tmp_path, name, text, wanted):
    path = write(name, text)
    for lengths in (find_lengths([path], None), find_lengths([], str(tmp_path))):
        assert set(lengths.files.values()) == {path}
        assert {dataset: lengths.pairs(dataset) for dataset in lengths.files} == wanted
        for dataset in DATASETS:
            source = lengths.source(dataset)
            if dataset in wanted:
                assert source == f"{name} ({len(wanted[dataset])} pairs)"
            else:
                assert source.startswith("compact table (")


def test_a_folder_may_hold_anything(write, tmp_path):
    for name, text in OTHERS.items():
        write(name, text)
    write("damaged.csv.gz", PAIRS)
    (tmp_path / "damaged.csv.gz").write_bytes(gzip.compress(PAIRS.encode())[:12])
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 1000)
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    assert find_lengths([], str(tmp_path)) == COMPACT
    path = write("any.csv", PAIRS)
    assert find_lengths([], str(tmp_path)).files == {"ShareGPT": path}


def test_cells_in_quotes(write):
    path = write("a.csv", 'text,"input_len",output_len\n"a, b\nc",3,"4"\nd,5,6\n')
    assert find_lengths([path], None).pairs("ShareGPT") == [(3, 4), (5, 6)]
    path = write("b.csv", 'input_len,output_len\n"3,4\n5,6\n')
    with pytest.raises(WorkloadError, match=r"b\.csv, line 2: a cell in quotes does not end"):
        find_lengths([path], None)


def test_a_named_file_goes_before_the_folder(write, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in (("sharegpt.csv", PAIRS), ("alpaca.csv", PAIRS), ("more.csv", PAIRS)):
        (folder / name).write_text(text)
    path = write("mine.csv", PAIRS)
    files = find_lengths([path], str(folder)).files
    assert files == {"ShareGPT": path, "Alpaca": str(folder / "alpaca.csv")}


def test_no_file_means_the_compact_tables():
    assert find_lengths([], None) == find_lengths([], "") == COMPACT
    for dataset in DATASETS:
        assert COMPACT.source(dataset) == "compact table (length_tables.py)"


def test_source_is_one_ascii_line_without_the_folder(write):
    lengths = find_lengths([write("sharegpt\u00e9\n.csv", PAIRS)], None)
    assert lengths.source("ShareGPT") == r"sharegpt\xe9\n.csv (3 pairs)"


def test_lengths_can_be_sent_to_another_process(write):
    lengths = find_lengths([write("x.csv", PAIRS)], None)
    again = pickle.loads(pickle.dumps(lengths))
    assert again == lengths
    assert again.columns("ShareGPT", 5.0, 20.0, 0) == lengths.columns("ShareGPT", 5.0, 20.0, 0)


# --- what is refused ----------------------------------------------------------------------


BAD = {
    "empty": ("", "no data set is known"),
    "another table": ("time,tokens\n1,2\n", "no data set is known"),
    "no header": ("1,2\n3,4\n", "no data set is known"),
    "header only": ("input_len,output_len\n", "no rows"),
    "word": (PAIRS + "x,1\n", "line 6: 'x' is not"),
    "zero": (ALPACA + "2,0,1,1\n", "line 4: '0' is not"),
    "column twice": ("input_len,output_len,input_len\n1,2,3\n", "line 1: the header"),
    "all too long": ("input_len,output_len\n2000,2000\n", "no request for ShareGPT"),
    "WMT16 cell missing": (WMT16 + "4,7,9,7\n", "line 6: 4 cells"),
    "chat turn not counted": (CHAT + "0,0,4,human,,1\n", "line 6: '' is not"),
    "chat chunk": (CHAT + "1,-1,0,human,1,1\n", "line 6: '-1' is not"),
    "chat without replies": (chat_file((0, 0, "human", 5)), "no request for chat"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_a_bad_named_file_is_refused_with_one_line(write, text, message):
    path = write("lengths.csv", text)
    with pytest.raises(WorkloadError, match=message) as caught:
        find_lengths([path], None)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_what_cannot_be_read_is_refused(write, tmp_path):
    for path in (str(tmp_path / "none.csv"), str(tmp_path)):
        with pytest.raises(WorkloadError, match="cannot be read"):
            find_lengths([path], None)
    for folder in (str(tmp_path / "none"), write("file", "")):
        with pytest.raises(WorkloadError, match="cannot be listed"):
            find_lengths([], folder)


def test_a_bad_file_of_a_folder_is_refused_at_its_use(write, tmp_path):
    write("sharegpt.csv", PAIRS + "x,1\n")
    lengths = find_lengths([], str(tmp_path))
    lengths.columns("Alpaca", 5.0, 20.0, 0)
    for use in (lengths.source, lambda name: lengths.columns(name, 5.0, 20.0, 0)):
        with pytest.raises(WorkloadError, match="line 6"):
            use("ShareGPT")


@pytest.mark.parametrize("names", [("a.csv", "b.csv"), ("a.csv", "sharegpt.csv")])
def test_two_files_of_a_kind_are_refused(write, tmp_path, names):
    paths = [write(name, PAIRS) for name in names]
    for given in ((paths, None), ([], str(tmp_path))):
        with pytest.raises(WorkloadError, match=r"a\.csv could be ShareGPT as well"):
            find_lengths(*given)
    assert find_lengths(paths[:1], str(tmp_path)).files == {"ShareGPT": paths[0]}


def test_a_name_of_two_data_sets_is_refused(write, tmp_path):
    path = write("alpaca_and_sharegpt.csv", PAIRS)
    for given in (([path], None), ([], str(tmp_path))):
        with pytest.raises(WorkloadError, match="ShareGPT or Alpaca"):
            find_lengths(*given)


def test_bad_arguments_are_refused():
    for call in (
        lambda: Lengths({"alpaca": "x.csv"}),
        lambda: COMPACT.source("alpaca"),
        lambda: COMPACT.columns("alpaca", 1.0, 1.0, 0),
        lambda: COMPACT.columns("Alpaca", 1.0, 1.0, 0, -1),
        lambda: COMPACT.columns("Alpaca", -1.0, 1.0, 0),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(FrozenInstanceError):
        COMPACT.files = {}


# --- traces -------------------------------------------------------------------------------


def of_requests(requests):
    names = ("arrival_s", "prompt_len", "output_len")
    return tuple([getattr(request, name) for request in requests] for name in names)


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("added", [0, 80])
def test_columns_are_those_of_make_trace(write, seed, added):
    rng = random.Random(1)
    rows = "".join(f"{rng.randint(1, 1500)},{rng.randint(1, 1500)}\n" for _ in range(200))
    path = write("x.csv", "input_len,output_len\n" + rows)
    exact = find_lengths([path], None)
    cases = {
        "ShareGPT": (read_lengths(path), {"total_below": 2048}),
        "Alpaca": (length_tables.ALPACA, {}),
        "chat": (length_tables.CHAT, {}),
    }
    # Fewer requests than there are pairs, and more, so that the pairs are used again.
    for rate in (0.5, 20.0):
        for dataset, (source, options) in cases.items():
            wanted = make_trace(source, rate, 60.0, seed, added_prompt_len=added, **options)
            columns = exact.columns(dataset, rate, 60.0, seed, added)
            assert columns == of_requests(wanted)
            assert {type(column) for column in columns} == {list}
            assert {type(length) for length in columns[1] + columns[2]} == {int}


def test_no_requests_at_rate_zero(write):
    for lengths in (COMPACT, find_lengths([write("x.csv", PAIRS)], None)):
        assert lengths.columns("ShareGPT", 0.0, 60.0, 0) == ([], [], [])


def test_wmt16_prompts_have_what_is_left_of_the_prefix(write):
    """The tables and a file agree on it: 5 more tokens with five examples."""
    rows = "".join(f"{n},{n + 20},{n},{n + WMT16_PROMPTS[5][1]}\n" for n in range(1, 50))
    names = "source_llama_tokens,output_llama_tokens"
    path = write("wmt.csv", f"{names},{SUFFIX}_1shot,{SUFFIX}_5shot\n{rows}")
    for lengths in (COMPACT, find_lengths([path], None)):
        one, five = (lengths.columns(f"WMT16 {n}-shot", 5.0, 60.0, 2) for n in (1, 5))
        assert [prompt + WMT16_PROMPTS[5][1] for prompt in one[1]] == five[1]
        assert (one[0], one[2]) == (five[0], five[2])
    wanted = make_trace(length_tables.WMT16, 5.0, 60.0, 2, added_prompt_len=WMT16_PROMPTS[5][1])
    assert COMPACT.columns("WMT16 5-shot", 5.0, 60.0, 2) == of_requests(wanted)


# --- conversations (Fig. 17) --------------------------------------------------------------


@pytest.fixture
def rounds_of(write):
    return lambda *turns: chat_rounds(write("chat.csv", chat_file(*turns)))


def test_history_grows_and_is_cut(rounds_of):
    """Each turn costs 4 tokens more than its text; history keeps 2048, a prompt its last 1024."""
    turns = [(0, 0, speaker, 96) for _ in range(12) for speaker in ("human", "gpt")]
    assert rounds_of(*turns) == [(min(200 * n + 100, 1024), 100) for n in range(12)]
    long = [(0, 0, "human", 10), (0, 0, "gpt", 5000), (0, 0, "human", 10), (0, 0, "gpt", 0)]
    assert rounds_of(*long) == [(14, 1016), (1024, 4)]


def test_replies_join_the_history_uncut(rounds_of):
    turns = [(0, 0, "human", 1), (0, 0, "gpt", 1100), (0, 0, "human", 1), (0, 0, "gpt", 1)]
    assert rounds_of(*turns) == [(5, 1016), (1024, 5)]
    queries = [(0, 0, "human", 3000), (0, 0, "gpt", 1)]
    assert rounds_of(*queries) == [(1024, 5)]


def test_a_query_is_paired_with_the_reply_after_it(rounds_of):
    first = [("system", 7), ("human", 11), ("human", 21), ("gpt", 31), ("gpt", 41), ("human", 51)]
    first += [("system", 7), ("gpt", 61), ("human", 71)]
    turns = [(0, 0, *turn) for turn in first]
    turns += [(1, 0, *turn) for turn in (("gpt", 81), ("human", 91), ("gpt", 101))]
    assert rounds_of(*turns) == [(25, 35), (95, 105)]


def test_a_later_chunk_starts_with_a_full_history(rounds_of):
    """It repeats the last reply of the chunk before, which is not a query."""
    turns = [(4, 0, "human", 6), (4, 0, "gpt", 16)]
    turns += [(5, 1, "gpt", 16), (5, 1, "human", 6), (5, 1, "gpt", 26)]
    turns += [(6, 0, "human", 6), (6, 0, "gpt", 36)]
    assert rounds_of(*turns) == [(10, 20), (1024, 30), (10, 40)]


# --- the full files -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def full():
    return find_lengths([], str(DATA))


@needs_data
@pytest.mark.parametrize(
    ("dataset", "count", "mean_prompt", "mean_output"),
    [
        ("ShareGPT", 79_725, 161.18, 338.00),
        ("Alpaca", 52_002, 19.312, 58.452),
        ("WMT16 1-shot", 2_999, 28.548, 36.287),
        ("WMT16 5-shot", 2_999, 33.548, 36.287),
        ("chat", 61_223, 772.86, 326.71),
    ],
)
def test_counts_and_means_of_the_full_files(full, dataset, count, mean_prompt, mean_output):
    assert full.files[dataset] == str(FILES[dataset])
    assert full.source(dataset) == f"{FILES[dataset].name} ({count:,} pairs)"
    prompts, outputs = np.array(full.pairs(dataset)).T
    assert prompts.mean() == pytest.approx(mean_prompt, abs=0.006)
    assert outputs.mean() == pytest.approx(mean_output, abs=0.006)


@needs_data
@pytest.mark.parametrize("dataset", DATASETS)
def test_compact_tables_have_the_means_of_the_full_files(full, dataset):
    _, *sampled = COMPACT.columns(dataset, 100.0, 5000.0, 3)
    for ours, true in zip(sampled, np.array(full.pairs(dataset)).T):
        assert np.mean(ours) == pytest.approx(true.mean(), rel=0.01)


@needs_data
def test_most_chat_prompts_are_full(full):
    """Nearly two thirds, in the file, in the table and in the first rounds of an hour's trace."""
    full_prompts = (np.array(full.pairs("chat"))[:, 0] == 1024).mean()
    assert full_prompts == pytest.approx(0.6325, abs=0.0005)
    sampled = np.array(COMPACT.columns("chat", 100.0, 4000.0, 3)[1])
    assert (sampled == 1024).mean() == pytest.approx(full_prompts, abs=0.005)
    first = np.array(full.pairs("chat")[:5000])
    assert (first[:, 0] == 1024).mean() == pytest.approx(full_prompts, abs=0.01)
    assert first[:, 1].mean() == pytest.approx(336.1, abs=0.05)


@needs_data
def test_named_files_are_read_at_once_and_once(monkeypatch):
    lengths = find_lengths([str(SHAREGPT_FILE)], None)
    monkeypatch.setattr(data_sets, "read_columns", None)
    assert len(lengths.pairs("ShareGPT")) == 79_725
    monkeypatch.undo()
    assert lengths.pairs("ShareGPT") == read_pairs(str(SHAREGPT_FILE), "ShareGPT")


@needs_data
@pytest.mark.parametrize("dataset", ["ShareGPT", "Alpaca"])
def test_columns_are_quick(full, dataset):
    """Well under 2 us per request beside the draws of the arrivals; the bound leaves room."""
    full.columns(dataset, 30.0, 3600.0, 0)
    taken = []
    for _ in range(3):
        start = time.process_time()
        count = len(full.columns(dataset, 30.0, 3600.0, 0)[0])
        middle = time.process_time()
        poisson_arrivals(30.0, 3600.0, 0)
        taken.append(middle - start - (time.process_time() - middle))
    assert min(taken) / count < 4e-6
