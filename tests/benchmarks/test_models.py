"""The benchmarks of real models: what they count is right, and they run, on a small model."""

import json

import pytest

pytest.importorskip("transformers")

import measure_beams
from measure_beams import replay, saved


def test_a_replay_counts_blocks_as_by_hand():
    # 15 tokens, three beams: one block; the 16th fills it in place of two copies; then beam 2
    # goes on from beam 0, whose two blocks it shares, and copies the second when it writes.
    rows, end = replay(15, [[0, 1, 2], [0, 1, 2], [0, 1, 0], [0, 1, 2]], width=3)
    assert rows.tolist() == [[3, 1], [3, 3], [6, 6], [6, 5]]
    assert end == (6, 5)
    assert saved([(15, [[0, 1, 2], [0, 1, 2], [0, 1, 0], [0, 1, 2]])], 3) == pytest.approx(100 / 6)


def test_samples_share_the_full_blocks_of_their_prompt():
    history = [[0, 1, 2, 3]] * 8
    rows, _ = replay(40, history, width=4)
    assert rows[0].tolist() == [12, 3]
    assert (rows[1:] == [12, 6]).all()  # of three blocks two are shared; the third is each one's


def test_searches_that_are_kept_give_the_same_without_the_model(run_script, tmp_path):
    out, again = tmp_path / "out.json", tmp_path / "again.json"
    options = "--small", "--prompts", 2, "--quiet", "--json", out
    done = run_script("benchmarks/measure_beams.py", *options)
    assert done.returncode == 0, done.stderr  # it compares PagedCache's blocks with the replay's
    found = json.loads(out.read_text())
    for name, texts in found["setting"]["histories"].items():
        histories = [*map(measure_beams.from_text, texts)]
        assert [len(history) for history in histories] == found["setting"]["output_lens"]
        width = int(name.split()[1])
        (row,) = [row for row in found["tables"][0]["rows"] if row["decoding"] == name]
        seen = [saved(zip(measure_beams.prompt_lens(2, n), histories), width) for n in range(5)]
        assert row["measured_low"] == pytest.approx(min(seen))
        assert row["measured"] == pytest.approx(sum(seen) / 5)
    options = "--searches", out, "--quiet", "--json", again
    assert run_script("benchmarks/measure_beams.py", *options).returncode == 0
    assert json.loads(again.read_text())["tables"] == found["tables"]
    done = run_script("benchmarks/measure_beams.py", "--searches", __file__)
    assert done.returncode == 2 and "holds no searches" in done.stderr


def test_a_small_model_is_measured_beside_the_librarys_caches(run_script, tmp_path):
    out = tmp_path / "out.json"
    options = "--small", "--repeats", 1, "--quiet", "--json", out
    done = run_script("benchmarks/bench_generate.py", *options)
    assert done.returncode == 0, done.stderr
    tables = {table["id"]: table["rows"] for table in json.loads(out.read_text())["tables"]}
    assert [row["cache"] for row in tables["times"]] == ["paged", "dynamic", "static"]
    beams = tables["bytes"][1]
    assert 0 < beams["paged"] < beams["dynamic"] < beams["static"]
    assert all(row["largest"] < 1e-3 for row in tables["logits"])
    assert {row["percent_equal"] for row in tables["tokens"]} == {100.0}
