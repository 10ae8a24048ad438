"""Tests of workload.py, the length tables and tools/make_length_tables.py (section 6.1, Fig. 11).

Tests against the full length files look for them in the folder LENGTHS_DIR (environment), or
else in ../shared/data beside the repository, and are skipped where they are absent.
"""

import csv
import gzip
import io
import itertools
import math
import os
import random
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

from vllm_sim.workload import length_tables
from vllm_sim.workload import length_tables as chat_lengths
from vllm_sim.workload import requests as workload
from vllm_sim.workload.data_sets import chat_rounds
from vllm_sim.workload.requests import (
    ALPACA,
    CHAT,
    LENGTH_TABLES,
    SHAREGPT,
    WMT16,
    WMT16_PROMPTS,
    LengthTable,
    Request,
    WorkloadError,
    make_trace,
    poisson_arrivals,
    read_lengths,
)

REPO = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LENGTHS_DIR") or REPO.parent / "shared" / "data")
SHAREGPT_FILE = DATA / "sharegpt_sosp23_opt_lengths.csv.gz"
ALPACA_FILE = DATA / "alpaca_opt_lengths.csv.gz"
WMT16_FILE = DATA / "wmt16_ende_newstest2016_llama_lengths.csv.gz"
CHAT_FILE = DATA / "sharegpt_v3_first17671_turn_lengths.csv.gz"
FILES = (SHAREGPT_FILE, ALPACA_FILE, WMT16_FILE, CHAT_FILE)
needs_data = pytest.mark.skipif(
    not all(path.is_file() for path in FILES),
    reason=f"the length files are not in {DATA} (set LENGTHS_DIR)",
)
COUNT = 400_000  # pairs drawn where a table is compared with its data


@pytest.fixture(scope="module")
def drawn():
    """name -> (inputs, outputs), one large sample of every table."""
    return {
        name: table.sample(COUNT, np.random.default_rng(7)) for name, table in LENGTH_TABLES.items()
    }


@pytest.fixture(scope="module")
def exact():
    """name -> (inputs, outputs) of the full files, as the tables are meant to have them."""
    inputs, outputs = read_lengths(SHAREGPT_FILE)
    kept = inputs + outputs <= 2048
    with gzip.open(WMT16_FILE, "rt") as stream:
        wmt16 = list(csv.DictReader(stream))
    suffix = [int(row["suffix_tokens_after_shared_prefix_1shot"]) for row in wmt16]
    german = [int(row["output_llama_tokens"]) for row in wmt16]
    return {
        "sharegpt": (inputs[kept], outputs[kept]),
        "alpaca": read_lengths(ALPACA_FILE),
        "wmt16": (np.array(suffix), np.array(german)),
        "chat": np.array(chat_rounds(CHAT_FILE)).T,
    }


def mean_rank(values):
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def spearman(inputs, outputs):
    return np.corrcoef(mean_rank(inputs), mean_rank(outputs))[0, 1]


def largest_cdf_gap(left, right):
    size = int(max(left.max(), right.max())) + 1
    cdfs = [np.cumsum(np.bincount(part, minlength=size)) / len(part) for part in (left, right)]
    return np.abs(cdfs[0] - cdfs[1]).max()


# --- the tables ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mean_input", "mean_output", "rank_correlation"),
    [("sharegpt", 161.31, 337.99, 0.214), ("alpaca", 19.31, 58.45, -0.225)],
)
def test_sampled_means_are_those_of_fig_11(drawn, name, mean_input, mean_output, rank_correlation):
    inputs, outputs = drawn[name]
    assert inputs.mean() == pytest.approx(mean_input, rel=0.01)
    assert outputs.mean() == pytest.approx(mean_output, rel=0.01)
    assert spearman(inputs, outputs) == pytest.approx(rank_correlation, abs=0.02)


@pytest.mark.parametrize("table", LENGTH_TABLES.values(), ids=LENGTH_TABLES)
def test_averages_over_many_samples_show_no_bias(table):
    """Standard errors here are 0.1 % of ShareGPT's input mean and less elsewhere."""
    expected = {
        SHAREGPT: (161.31, 337.99),
        ALPACA: (19.31, 58.45),
        WMT16: (28.548, 36.287),
        CHAT: (772.86, 326.71),
    }
    inputs, outputs = table.sample(2_500_000, np.random.default_rng(11))
    assert inputs.mean() == pytest.approx(expected[table][0], rel=0.004)
    assert outputs.mean() == pytest.approx(expected[table][1], rel=0.003)


@needs_data
@pytest.mark.parametrize("name", LENGTH_TABLES)
def test_moments_and_rank_correlation_match_the_data(drawn, exact, name):
    (inputs, outputs), (true_inputs, true_outputs) = drawn[name], exact[name]
    for ours, true in (
        (inputs, true_inputs),
        (outputs, true_outputs),
        (inputs + outputs, true_inputs + true_outputs),
    ):
        assert ours.mean() == pytest.approx(true.mean(), rel=0.01)
        assert (ours**2).mean() == pytest.approx((true**2).mean(), rel=0.02)
    assert (inputs * outputs).mean() == pytest.approx((true_inputs * true_outputs).mean(), rel=0.02)
    # Normalized latency divides by the output length, so short outputs must be right as well.
    assert (1 / outputs).mean() == pytest.approx((1 / true_outputs).mean(), rel=0.04)
    assert abs(spearman(inputs, outputs) - spearman(true_inputs, true_outputs)) < 0.02


@needs_data
@pytest.mark.parametrize("name", LENGTH_TABLES)
def test_quantiles_match_the_data(drawn, exact, name):
    (inputs, outputs), (true_inputs, true_outputs) = drawn[name], exact[name]
    for ours, true in (
        (inputs, true_inputs),
        (outputs, true_outputs),
        (inputs + outputs, true_inputs + true_outputs),
    ):
        assert largest_cdf_gap(ours, true) < 0.008
        levels = np.arange(1, 100)
        wanted = np.percentile(true, levels)
        assert np.percentile(ours, levels) == pytest.approx(wanted, rel=0.02, abs=2)


@needs_data
def test_output_quantiles_match_the_data_given_the_input(drawn, exact):
    """A table of independent marginals passes every test above but the correlation's."""
    for name in ("sharegpt", "alpaca", "chat"):
        (inputs, outputs), (true_inputs, true_outputs) = drawn[name], exact[name]
        levels = np.percentile(true_inputs, [0, 10, 30, 50, 70, 90, 97])
        edges = np.unique(levels).tolist() + [10**7]  # most chat prompts have one length
        for low, high in itertools.pairwise(edges):
            ours = outputs[(inputs >= low) & (inputs < high)]
            true = true_outputs[(true_inputs >= low) & (true_inputs < high)]
            assert ours.mean() == pytest.approx(true.mean(), rel=0.03), (name, low)
            assert largest_cdf_gap(ours, true) < 0.03, (name, low)


def test_samples_respect_the_bounds(drawn):
    for inputs, outputs in drawn.values():
        assert inputs.dtype == outputs.dtype == np.int64
        assert inputs.shape == outputs.shape == (COUNT,)
        assert inputs.min() >= 1
        assert outputs.min() >= 1
    total = sum(drawn["sharegpt"])
    assert total.max() <= 2048
    inputs, outputs = drawn["chat"]
    assert (inputs.max(), outputs.max()) == (1024, 1016)
    # Cutting outputs to fit must stay the exception, or the statistics would bend.
    assert (total == 2048).mean() < 0.003


def test_max_total_cuts_both_lengths():
    table = LengthTable("t", "s", "1 1 90 | 1 90", max_total=20)
    inputs, outputs = table.sample(5000, np.random.default_rng(0))
    assert (inputs + outputs).max() == 20
    assert inputs.max() == 19
    assert outputs.min() == 1
    ones = LengthTable("t", "s", "1 0 0 | 0 0").sample(10, np.random.default_rng(0))
    assert {length for part in ones for length in part.tolist()} == {1}


def test_a_table_of_two_rows_is_sampled_as_written():
    table = LengthTable("t", "s", "3 5 | 10 20 / 1 7 8 | 2 2")
    inputs, outputs = table.sample(40_000, np.random.default_rng(1))
    assert (inputs == 5).mean() == pytest.approx(0.75, abs=0.01)
    assert set(inputs.tolist()) == {5, 7, 8}
    assert set(outputs[inputs > 5].tolist()) == {2}
    assert set(outputs[inputs == 5].tolist()) == set(range(10, 21))
    assert outputs[inputs == 5].mean() == pytest.approx(15.0, abs=0.1)


@pytest.mark.parametrize(
    "rows", ["", "1 2", "1 2 | x", "1 2 3 | 4 5 / 1 2 3 4 | 5 6", "1 2 | 3 | 4"]
)
def test_malformed_rows_are_refused(rows):
    with pytest.raises(ValueError):
        LengthTable("t", "s", rows)


def test_same_seed_same_sample_other_seed_another():
    for table in LENGTH_TABLES.values():
        first, again, other = (table.sample(1000, np.random.default_rng(s)) for s in (3, 3, 4))
        assert b"".join(a.tobytes() for a in first) == b"".join(a.tobytes() for a in again)
        assert any((a != b).any() for a, b in zip(first, other))
        assert [part.size for part in table.sample(0, np.random.default_rng(0))] == [0, 0]
        with pytest.raises(ValueError, match="count"):
            table.sample(-1, np.random.default_rng(0))


def test_tables_are_small_plain_text():
    text = (REPO / "length_tables.py").read_bytes() + (REPO / "chat_lengths.py").read_bytes()
    text.decode("ascii")
    assert max(len(line) for line in text.splitlines()) <= 110
    names = ("SHAREGPT", "ALPACA", "WMT16")
    tables = [getattr(length_tables, f"{name}_ROWS") for name in names]
    for rows in [*tables, chat_lengths.CHAT_ROWS]:
        assert rows.encode("ascii") in text  # stored literally, nothing unpacked on import
        assert len(rows) < 10_000


def test_workload_does_not_import_torch():
    code = "import sys, workload; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0


# --- the generator ------------------------------------------------------------------------


def generator(*arguments):
    command = [sys.executable, str(REPO / "tools" / "make_length_tables.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@needs_data
def test_regenerating_gives_the_committed_bytes(tmp_path):
    done = generator("--data", DATA, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    names = ["chat_lengths.py", "length_tables.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (REPO / name).read_bytes()


@needs_data
def test_most_chat_prompts_have_the_greatest_length(drawn, exact):
    (inputs, _), (true_inputs, _) = drawn["chat"], exact["chat"]
    longest = (true_inputs == true_inputs.max()).mean()
    assert (inputs == inputs.max()).mean() == pytest.approx(longest, abs=0.005)


@needs_data
def test_five_shot_suffix_is_the_input_plus_a_constant():
    with gzip.open(WMT16_FILE, "rt") as stream:
        rows = list(csv.DictReader(stream))
    for shots, (_, added) in WMT16_PROMPTS.items():
        one, many = (f"suffix_tokens_after_shared_prefix_{n}shot" for n in (1, shots))
        assert {int(row[many]) - int(row[one]) for row in rows} == {added}


BAD_SOURCES = {
    "missing": None,
    "not gzip": b"input_len,output_len\n1 2\n",
    "truncated": gzip.compress(b"input_len,output_len\n" + b"12,34\n" * 999)[:40],
    "column": gzip.compress(b"input_len,other\n1,2\n"),
    "value": gzip.compress(b"input_len,output_len\n1,2\n1,x\n"),
    "short row": gzip.compress(b"input_len,output_len\n1,2\n1\n"),
    "zero": gzip.compress(b"input_len,output_len\n1,0\n"),
    "binary": gzip.compress(bytes(range(256))),
    "empty": gzip.compress(b""),
    "header only": gzip.compress(b"input_len,output_len\n"),
    "all too long": gzip.compress(b"input_len,output_len\n2000,2000\n"),
}


@pytest.mark.parametrize("content", BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_generator_refuses_bad_sources_with_one_line(tmp_path, monkeypatch, capsys, content):
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import make_length_tables

    data = tmp_path / "data"
    data.mkdir()
    if content is not None:
        (data / SHAREGPT_FILE.name).write_bytes(content)
    out = tmp_path / "length_tables.py"
    out.write_text("before")
    assert make_length_tables.main(["--data", str(data), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert SHAREGPT_FILE.name in error
    assert out.read_text() == "before"


# --- arrivals and traces ------------------------------------------------------------------


def test_arrivals_are_poisson_in_slots_of_10_ms():
    arrivals = poisson_arrivals(rate=20.0, duration_s=2000.0, seed=5)
    slots = np.rint(arrivals * 100).astype(int)
    assert (arrivals == slots * 0.01).all()
    assert (np.diff(arrivals) >= 0).all()
    assert arrivals.min() >= 0.0
    assert arrivals.max() < 2000.0
    assert len(arrivals) == pytest.approx(40_000, abs=5 * math.sqrt(40_000))
    per_slot = np.bincount(slots, minlength=200_000)
    assert per_slot.var() == pytest.approx(per_slot.mean(), rel=0.02)  # Poisson: both the rate
    per_second = per_slot.reshape(-1, 100).sum(axis=1)
    assert per_second.var() == pytest.approx(20.0, rel=0.15)
    assert abs(np.corrcoef(per_slot[1:], per_slot[:-1])[0, 1]) < 0.01


def test_arrivals_of_a_seed_never_change():
    draws = np.random.RandomState(0).poisson(7.0 * 0.01, size=5000).tolist()
    one_by_one = [slot * 0.01 for slot, draw in enumerate(draws) for _ in range(draw)]
    assert poisson_arrivals(7.0, 50.0, 0).tolist() == one_by_one
    assert poisson_arrivals(2.0, 3600.0, 0).size == 7280  # the count of the authors' trace
    first, again = (poisson_arrivals(3.0, 100.0, 1).tobytes() for _ in range(2))
    assert first == again
    assert first != poisson_arrivals(3.0, 100.0, 2).tobytes()
    assert poisson_arrivals(0.0, 100.0, 0).size == poisson_arrivals(5.0, 0.0, 0).size == 0


@pytest.mark.parametrize(
    ("rate", "duration_s", "seed"),
    [
        (-1.0, 10.0, 0),
        (math.nan, 10.0, 0),
        (math.inf, 10.0, 0),
        (1e12, 10.0, 0),
        ("2", 10.0, 0),
        (1.0, -1.0, 0),
        (1.0, math.nan, 0),
        (1.0, 1e9, 0),
        (1.0, 10.0, -1),
        (1.0, 10.0, 2**32),
        (1.0, 10.0, 0.5),
    ],
)
def test_arrivals_refuse_bad_arguments(rate, duration_s, seed):
    with pytest.raises(ValueError, match=r"rate|duration_s|seed"):
        poisson_arrivals(rate, duration_s, seed)


def test_trace_of_exact_pairs_takes_the_first_ones_and_shuffles_them():
    inputs, outputs = np.arange(1, 5001), np.arange(5001, 10_001)
    requests = make_trace((inputs, outputs), 2.0, 600.0, seed=3)
    arrivals = poisson_arrivals(2.0, 600.0, seed=3)
    assert [request.arrival_s for request in requests] == arrivals.tolist()
    assert [request.request_id for request in requests] == list(range(len(arrivals)))
    wanted = list(range(1, len(arrivals) + 1))
    prompts = [request.prompt_len for request in requests]
    assert sorted(prompts) == wanted
    random.seed(3)
    random.shuffle(wanted)
    assert prompts == wanted
    assert all(request.output_len == request.prompt_len + 5000 for request in requests)


def test_trace_starts_over_when_pairs_run_out_and_drops_long_ones():
    lengths = (np.array([1, 2, 50]), np.array([7, 8, 50]))
    requests = make_trace(lengths, 5.0, 100.0, seed=0, total_below=100)
    pairs = [(request.prompt_len, request.output_len) for request in requests]
    assert set(pairs) == {(1, 7), (2, 8)}
    assert abs(pairs.count((1, 7)) - pairs.count((2, 8))) <= 1
    kept = make_trace(lengths, 5.0, 100.0, seed=0, total_below=101)
    assert any(request.prompt_len == 50 for request in kept)


@needs_data
def test_trace_of_the_artifact():
    """First N pairs below 2048: a 20-minute trace at 2 requests/s has means of its own."""
    lengths = read_lengths(SHAREGPT_FILE)
    requests = make_trace(lengths, 2.0, 3600.0, seed=0, total_below=2048)
    assert len(requests) == 7280
    keep = lengths[0] + lengths[1] < 2048
    assert keep.sum() == 79_725
    assert lengths[0][keep][:2400].mean() == pytest.approx(152.1, abs=0.05)
    assert sum(r.prompt_len for r in requests) == lengths[0][keep][:7280].sum()


def test_trace_from_a_table():
    requests = make_trace(SHAREGPT, 2.0, 600.0, seed=4)
    assert requests == make_trace(SHAREGPT, 2.0, 600.0, seed=4)
    assert requests != make_trace(SHAREGPT, 2.0, 600.0, seed=5)
    inputs, outputs = SHAREGPT.sample(len(requests), np.random.default_rng(4))
    assert [request.prompt_len for request in requests] == inputs.tolist()
    assert [request.output_len for request in requests] == outputs.tolist()
    assert all(type(request.prompt_len) is int for request in requests)


def test_trace_options_reach_the_requests():
    prefix_len, added = WMT16_PROMPTS[5]
    plain = make_trace(WMT16, 5.0, 20.0, seed=0)
    five = make_trace(WMT16, 5.0, 20.0, 0, prefix_len=prefix_len, added_prompt_len=added)
    assert [r.prompt_len + added for r in plain] == [r.prompt_len for r in five]
    assert {r.prefix_len for r in five} == {prefix_len}
    assert {r.prefix_len for r in plain} == {0}
    assert {r.decoding for r in make_trace(ALPACA, 5.0, 20.0, 0, num_samples=4)} == {"parallel"}
    assert {r.beam_width for r in make_trace(ALPACA, 5.0, 20.0, 0, beam_width=6)} == {6}


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        (SHAREGPT, {"total_below": 2048}),
        (SHAREGPT, {"added_prompt_len": -1}),
        (SHAREGPT, {"num_samples": 2, "beam_width": 2}),
        (([], []), {}),
        (([1, 2], [3]), {}),
        (([5], [5]), {"total_below": 10}),
        (([0], [5]), {}),
        (([1.5], [5]), {}),
    ],
)
def test_trace_refuses_bad_arguments(lengths, options):
    with pytest.raises(ValueError):
        make_trace(lengths, 5.0, 20.0, 0, **options)


# --- requests -----------------------------------------------------------------------------


def test_request_properties():
    single = Request(0, 0.0, 3, 4)
    assert (single.num_seqs, single.decoding, single.prefix_len) == (1, "single", 0)
    parallel = Request(1, 0.5, 3, 4, num_samples=6)
    assert (parallel.num_seqs, parallel.decoding) == (6, "parallel")
    beam = Request(2, 1, np.int64(3), 4, beam_width=4, prefix_len=80)
    assert (beam.num_seqs, beam.decoding) == (4, "beam")
    with pytest.raises(FrozenInstanceError):
        single.output_len = 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request_id", -1),
        ("request_id", 1.0),
        ("request_id", True),
        ("request_id", None),
        ("arrival_s", -0.1),
        ("arrival_s", math.nan),
        ("arrival_s", math.inf),
        ("arrival_s", "0"),
        ("prompt_len", 0),
        ("prompt_len", 2.5),
        ("output_len", 0),
        ("output_len", -3),
        ("num_samples", 0),
        ("beam_width", 0),
        ("prefix_len", -1),
        ("prefix_len", "80"),
    ],
)
def test_request_checks(name, value):
    good = {"request_id": 0, "arrival_s": 0.0, "prompt_len": 1, "output_len": 1}
    Request(**good)
    with pytest.raises(ValueError, match=name):
        Request(**(good | {name: value}))


def test_request_is_not_sampled_and_beam_searched_at_once():
    with pytest.raises(ValueError, match="at most one"):
        Request(0, 0.0, 1, 1, num_samples=2, beam_width=2)


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
    assert text.startswith(str(path))
    assert "\n" not in text
    assert text.isascii()
    assert len(text) < len(str(path)) + 120


def test_missing_file_and_directory_are_refused(tmp_path):
    for path, message in ((tmp_path / "none.csv", "No such file"), (tmp_path, "directory")):
        with pytest.raises(WorkloadError, match=message) as caught:
            read_lengths(path)
        assert str(path) in str(caught.value)


def test_size_is_bounded_after_unpacking(tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "MAX_FILE_BYTES", 1000)
    path = tmp_path / "lengths.csv.gz"
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb") as stream:
        stream.write(HEAD + b"1,2\n" * 2000)
    assert len(buffer.getvalue()) < 1000
    path.write_bytes(buffer.getvalue())
    with pytest.raises(WorkloadError, match="too long"):
        read_lengths(path)
    path.write_bytes(HEAD + b"1,2\n" * 240)
    assert read_lengths(path)[0].size == 240
