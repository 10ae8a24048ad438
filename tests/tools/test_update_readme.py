"""tools/: what the generated tables show of results/, what is recorded, what mutants run."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
import record
import update_readme

ROOT = Path(__file__).resolve().parents[2]


def row(number, held, fitted=False):
    _, figure, setting, metric = update_readme.FIVE[number]
    values = {"paper": 2.0, "ours": 1.0 + number, "held": held, "fitted": fitted}
    return {"figure": figure, "setting": f"13B {setting}", "metric": metric, **values}


def test_generated_tables_come_from_the_committed_results():
    assert update_readme.main(["--check"]) == 0, "run tools/update_readme.py"


def test_every_result_is_shown_and_the_other_way_round():
    shown = {f"{name}.json" for *_, names in update_readme.PAGES.values() for name in names}
    kept = {path.name for path in (ROOT / "results").glob("*.json")}
    assert kept - {"searches.json"} == shown


def test_the_headline_counts_held_fitted_and_missed():
    held = [row(0, True), row(1, True, fitted=True), row(2, False, fitted=True), row(3, False)]
    without = [row(0, False) | {"expected": "why"}, *(row(n, True) for n in (1, 2, 3))]
    without.append(row(4, True) | {"ours": 7.0})
    text = update_readme.headline([*held, row(4, True)], without, (0.5, 1.5, 2.5, 3.5, None))
    assert text.count("\n| ") == 5 and "| 2 | 5 | - | 7 |" in text and "| 2 | 1 | 0.5 |" in text
    told = "3 are held (1 of them fitted), 2 missed; without them 4 are held (0 of them fitted), 1"
    assert f"Of all 5 rows, with the authors' lengths {told} missed.\n" in text


def test_what_was_measured_is_read_off_the_longest_trace():
    saturated = [
        {"system": "max", "batch": 7.0, "tokens_percent": 20.0},
        {"system": "paged", "batch": 28.0, "tokens_percent": 95.0},
    ]
    rates = [
        {"system": system, "trace_s": seconds, "at_s_per_token": latency, "rate": rate * latency}
        for system, rate in (("max", 2.0), ("paged", 7.0))
        for seconds, latency in ((45, 0.5), (45, 0.1), (15, 0.1))
    ]
    rates[-1]["rate"] = 100.0
    assert update_readme.measured(saturated, rates) == (95.0, 20.0, 4.0, 3.5, None)


def test_a_page_that_differs_is_named_and_rewritten(tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "results" / "page.md"
    monkeypatch.setattr(update_readme, "ROOT", tmp_path)
    monkeypatch.setattr(update_readme, "texts", lambda: {page: "new"})
    page.parent.mkdir(parents=True)
    page.write_text("old")
    assert update_readme.main(["--check"]) == 1 and page.read_text() == "old"
    assert "docs/results/page.md" in capsys.readouterr().err
    assert update_readme.main([]) == 0 and page.read_text() == "new"


def test_a_record_holds_command_machine_output_and_lines(tmp_path):
    script, result = tmp_path / "script.py", tmp_path / "result.json"
    output = "json.dump({'versions': {'python': '3'}}, open(sys.argv[-1], 'w'))"
    script.write_text(f"import json, sys\nprint('a line')\n{output}\nsys.exit(1)\n")
    assert record.main(str(result), str(script), "--seed", "1") == 1
    found = json.loads(result.read_text())
    assert found["command"] == f"python {script} --seed 1" and found["printed"] == ["a line"]
    assert found["versions"] == {"python": "3"} and found["device"] and "commit" in found


def test_a_script_that_leaves_no_json_is_not_recorded(tmp_path):
    assert record.main(str(tmp_path / "result.json"), "-c", "print(1)") == 2


def test_what_a_command_reads_is_not_recorded_over(tmp_path):
    (tmp_path / "config.json").write_text("kept")
    with pytest.raises(SystemExit, match="is what the command reads"):
        record.main(f"{tmp_path}/./config.json", "capacity.py", str(tmp_path / "config.json"))
    assert (tmp_path / "config.json").read_text() == "kept"
    assert not (tmp_path / "result.json").exists()


def test_mutants_name_modules_and_tests_that_exist():
    listed = subprocess.run(["bash", ROOT / "tools/mutants.sh"], capture_output=True, text=True)
    tests = tomllib.loads((ROOT / "tools/mutants.toml").read_text())["tests"]
    assert listed.stdout.split() == list(tests)
    files = [f"tests/{name}.py" for names in tests.values() for name in names.split()]
    assert not [name for name in [*tests, *files] if not (ROOT / name).exists()]
