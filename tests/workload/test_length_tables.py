"""The compact tables of lengths against the files they come from, and what makes them (Fig. 11).

The full length files are looked for as in test_data_sets.py.
"""

import csv
import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
from test_data_sets import DATA, FILES, MALFORMED, SHAREGPT_FILE, needs_data

from vllm_sim.workload import length_tables
from vllm_sim.workload.data_sets import chat_rounds, read_lengths
from vllm_sim.workload.length_tables import (
    ALPACA,
    CHAT,
    LENGTH_TABLES,
    SHAREGPT,
    WMT16,
    WMT16_PROMPTS,
    LengthTable,
)

TABLES = Path(length_tables.__file__).with_suffix(".json")
TOOLS = Path(__file__).resolve().parents[2] / "tools"
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
    with gzip.open(FILES["WMT16 1-shot"], "rt") as stream:
        wmt16 = list(csv.DictReader(stream))
    suffix = [int(row["suffix_tokens_after_shared_prefix_1shot"]) for row in wmt16]
    german = [int(row["output_llama_tokens"]) for row in wmt16]
    return {
        "sharegpt": (inputs[kept], outputs[kept]),
        "alpaca": read_lengths(FILES["Alpaca"]),
        "wmt16": (np.array(suffix), np.array(german)),
        "chat": np.array(chat_rounds(FILES["chat"])).T,
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


def with_sums(inputs, outputs):
    return inputs, outputs, inputs + outputs


# --- the tables ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "correlation"), [("sharegpt", 0.214), ("alpaca", -0.225)])
def test_rank_correlations_are_those_of_fig_11(drawn, name, correlation):
    assert spearman(*drawn[name]) == pytest.approx(correlation, abs=0.02)


@pytest.mark.parametrize("table", LENGTH_TABLES.values(), ids=LENGTH_TABLES)
def test_averages_are_those_of_fig_11_and_over_many_samples_show_no_bias(table):
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
    for ours, true in zip(with_sums(*drawn[name]), with_sums(*exact[name])):
        assert ours.mean() == pytest.approx(true.mean(), rel=0.01)
        assert (ours**2).mean() == pytest.approx((true**2).mean(), rel=0.02)
    assert (inputs * outputs).mean() == pytest.approx((true_inputs * true_outputs).mean(), rel=0.02)
    # Normalized latency divides by the output length, so short outputs must be right as well.
    assert (1 / outputs).mean() == pytest.approx((1 / true_outputs).mean(), rel=0.04)
    assert abs(spearman(inputs, outputs) - spearman(true_inputs, true_outputs)) < 0.02


@needs_data
@pytest.mark.parametrize("name", LENGTH_TABLES)
def test_quantiles_match_the_data(drawn, exact, name):
    for ours, true in zip(with_sums(*drawn[name]), with_sums(*exact[name])):
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
        assert inputs.min() >= 1 and outputs.min() >= 1
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
    text = TABLES.read_text("ascii")
    assert max(map(len, text.splitlines())) <= 300
    for table in LENGTH_TABLES.values():
        assert len(table.rows) < 10_000 and table.rows[:60] in text, "stored literally, not packed"


def test_lengths_and_requests_are_had_without_torch(run_script):
    code = "import sys, vllm_sim.workload.traces; sys.exit('torch' in sys.modules)"
    assert run_script("-c", code).returncode == 0


# --- the generator ------------------------------------------------------------------------


@needs_data
def test_regenerating_gives_the_committed_bytes(run_script, tmp_path):
    done = run_script("tools/make_length_tables.py", "--data", DATA, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == [TABLES.name]
    assert (tmp_path / TABLES.name).read_bytes() == TABLES.read_bytes()


@needs_data
def test_five_shot_suffix_is_the_input_plus_a_constant():
    with gzip.open(FILES["WMT16 1-shot"], "rt") as stream:
        rows = list(csv.DictReader(stream))
    for shots, (_, added) in WMT16_PROMPTS.items():
        one, many = (f"suffix_tokens_after_shared_prefix_{n}shot" for n in (1, shots))
        assert {int(row[many]) - int(row[one]) for row in rows} == {added}


BAD_SOURCES = {name: gzip.compress(content) for name, (content, _) in MALFORMED.items()} | {
    "missing": None,
    "not gzip": b"input_len,output_len\n1 2\n",
    "truncated": MALFORMED["truncated gzip"][0],
    "all too long": gzip.compress(b"input_len,output_len\n2000,2000\n"),
}


@pytest.mark.parametrize("content", BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_generator_refuses_bad_sources_with_one_line(tmp_path, monkeypatch, capsys, content):
    monkeypatch.syspath_prepend(str(TOOLS))
    import make_length_tables

    data = tmp_path / "data"
    data.mkdir()
    if content is not None:
        (data / SHAREGPT_FILE.name).write_bytes(content)
    out = tmp_path / TABLES.name
    out.write_text("before")
    assert make_length_tables.main(["--data", str(data), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert SHAREGPT_FILE.name in error
    assert out.read_text() == "before"
