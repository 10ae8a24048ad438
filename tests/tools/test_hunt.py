"""tools/hunt.py: what it takes from the reports of pytest and coverage and calls held, and what
tools/hunt_blocks.py shows of it in the documents.
"""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import hunt  # noqa: E402
import hunt_blocks  # noqa: E402
import record  # noqa: E402

from vllm_sim.reporting.command_line import UsageError  # noqa: E402

TESTS = """
import os
import pytest
@pytest.mark.slow
def test_found(record_property):
    record_property("states", 1234)
    record_property("steps", os.environ["RULE_STEPS"])
    record_property("cpu_s", 1.5)
    record_property("seeds", "0 to 3")
@pytest.mark.slow
def test_nothing():
    assert {how}
@pytest.mark.slow
def test_other():
    raise AssertionError("not chosen: never run")
def test_quick_nothing():
    raise AssertionError("not slow: never run")
"""


def hunting(tmp_path, monkeypatch, how):
    """The document of a hunt over tests that we write here."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_own.py").write_text(TESTS.format(how=how), encoding="ascii")
    settings = "[pytest]\nmarkers = slow\njunit_family = xunit1\n"
    (tmp_path / "pytest.ini").write_text(settings, encoding="ascii")
    monkeypatch.setattr(hunt, "ROOT", tmp_path)
    monkeypatch.setenv("RULE_STEPS", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")
    own = {"RULE_STEPS": "9"}
    monkeypatch.setitem(hunt.CHOICES, "fuzz", hunt.Hunt(("test_own",), "found or nothing", own))
    code = hunt.main(["fuzz", "--json", str(tmp_path / "out.json")])
    return code, json.loads((tmp_path / "out.json").read_text(encoding="ascii"))


def test_figures_come_back_as_the_tests_gave_them(tmp_path, monkeypatch, capfd):
    code, found = hunting(tmp_path, monkeypatch, "True")
    (table,) = found["tables"]
    schema = json.loads((ROOT / "docs" / "schema.json").read_text(encoding="ascii"))
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(found)) == []
    assert code == found["exit_code"] == 0
    assert found["setting"] == {"RULE_STEPS": "9"} and found["options"] == {"hunt": "fuzz"}
    assert [(row["test"], row["outcome"], row["figures"]) for row in table["rows"]] == [
        (
            "test_own.py::test_found",
            "passed",
            {"states": 1234, "steps": 9, "cpu_s": 1.5, "seeds": "0 to 3"},
        ),
        ("test_own.py::test_nothing", "passed", {}),
    ]
    printed = capfd.readouterr().out
    assert "passed  test_own.py::test_found: states 1,234, steps 9, cpu_s 1.5, seeds" in printed


@pytest.mark.parametrize(
    ("how", "outcome"), [("False", "failure"), ("pytest.skip('no GPU')", "skipped")]
)
def test_what_fails_or_is_skipped_is_not_held(tmp_path, monkeypatch, capfd, how, outcome):
    code, found = hunting(tmp_path, monkeypatch, how)
    assert code == found["exit_code"] == 1
    assert [row["outcome"] for row in found["tables"][0]["rows"]] == ["passed", outcome]


def test_a_hunt_that_leaves_no_report_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hunt, "ROOT", tmp_path)
    monkeypatch.setattr(hunt.Hunt, "command", lambda *_: [sys.executable, "-c", "exit(3)"])
    assert hunt.main(["fuzz"]) == 2
    assert capfd.readouterr().err == ("hunt.py: error: pytest ended with 3 and left no report\n")


@pytest.fixture(scope="module")
def slow_tests():
    """All slow tests of the files that are hunted in, as pytest names them."""
    files = sorted({f"tests/{name}.py" for one in hunt.HUNTS.values() for name in one.files})
    command = [sys.executable, "-m", "pytest", "-m", "slow", "-p", "no:xdist", "--collect-only"]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("name", hunt.HUNTS)
def test_each_hunt_has_slow_tests_that_record_figures(slow_tests, name):
    """A test that is renamed would leave its hunt without prey."""
    one = hunt.HUNTS[name]
    files = [f"tests/{file}.py" for file in one.files]
    chosen = [test for test in slow_tests if test.split("::")[0] in files and one.chosen in test]
    assert chosen
    for test in chosen:
        file, _, function = test.partition("::")
        text = (ROOT / file).read_text(encoding="ascii")
        arguments = text.split(f"def {function.partition('[')[0]}(")[1].partition("):")[0]
        assert "record_property" in arguments, test


def test_coverage_is_told_by_module_and_in_all():
    def summary(branches, taken):
        return {"num_branches": branches, "covered_branches": taken}

    found = {
        "files": {
            "b.py": {"summary": summary(4, 2), "missing_branches": [[3, 5], [9, -7]]},
            "a.py": {"summary": summary(6, 6), "missing_branches": []},
        },
        "totals": summary(10, 8),
    }
    rows = hunt.coverage_rows(found, 7.5)
    assert [(row["test"], row["seconds"], row["figures"]) for row in rows] == [
        ("b.py", 0.0, {"branches": 4, "taken": 2, "not taken": "3 to 5, 9 to the end"}),
        ("all", 7.5, {"branches": 10, "taken": 8}),
    ]


def test_coverage_that_was_not_measured_is_refused(tmp_path, monkeypatch, capfd):
    (tmp_path / "Makefile").write_text("coverage:\n\t@exit 4\n", encoding="ascii")
    (tmp_path / ".coverage.json").write_text("{}", encoding="ascii")  # of an earlier run
    monkeypatch.setattr(hunt, "ROOT", tmp_path)
    assert hunt.main(["coverage"]) == 2
    assert "make coverage ended with 2 and left no figures" in capfd.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hunt.main(["coverage"]) == 2
    assert capfd.readouterr().err.endswith("make cannot be run: No such file or directory\n")


@pytest.mark.parametrize(("taken", "code"), [(98, 0), (97, 1)])
def test_too_few_branches_are_not_held(monkeypatch, capsys, taken, code):
    found = {"files": {}, "totals": {"num_branches": 100, "covered_branches": taken}}
    monkeypatch.setattr(hunt, "run_coverage", lambda: (hunt.coverage_rows(found, 1.0), 0))
    assert hunt.main(["coverage"]) == code


def test_a_report_that_is_cut_is_refused(monkeypatch, capfd):
    leaves = "import sys; open(sys.argv[1], 'w').write('<testsuites><testsuite')"
    monkeypatch.setattr(
        hunt.Hunt, "command", lambda _, report: [sys.executable, "-c", leaves, str(report)]
    )
    assert hunt.main(["fuzz"]) == 2
    assert capfd.readouterr().err == "hunt.py: error: pytest ended with 0 and left no report\n"


def test_small_keeps_what_is_counted_and_what_failed(monkeypatch, tmp_path, capsys):
    counted, silent = recorded_row("a", states=1), recorded_row("b")
    for failed in (False, True):
        bad = {**silent, "test": "c", "outcome": "failure"}
        rows = [counted, silent, *([bad] if failed else [])]
        monkeypatch.setattr(hunt, "run_tests", lambda _, rows=rows: (rows, 0))
        assert hunt.main(["small", "--json", str(tmp_path / "out.json")]) == int(failed)
        found = json.loads((tmp_path / "out.json").read_text(encoding="ascii"))
        kept = [row["test"] for row in found["tables"][0]["rows"]]
        assert kept == ["a", "c"] if failed else kept == ["a"]


@pytest.mark.parametrize("told", ["0123abc", None])
def test_the_commit_is_what_the_variable_says_or_git(monkeypatch, told):
    """A machine that was handed a copy may have a history that is older than its files."""
    if told:
        monkeypatch.setenv("COMMIT", told)
        assert record.commit() == told
    else:
        monkeypatch.delenv("COMMIT", raising=False)
        answers = {"rev-parse": "f" * 40, "status": " M main.py"}
        monkeypatch.setattr(record, "_git", lambda *args: answers[args[0]])
        assert record.commit() == "f" * 40 + "+"


# ---- what the documents show of them ------------------------------------------------------------


def recorded_row(test, **figures):
    return {"test": test, "outcome": "passed", "seconds": 12.6, "figures": figures}


def result_of(name, *found):
    tables = [{"id": "tests", "rows": [*found]}]
    output = {"schema": "x/1", "elapsed_s": 61.2, "exit_code": 0, "tables": tables}
    command = f"python tools/hunt.py {name}"
    return {"command": command, "device": "2 cores", "versions": {}, "output": output}


@pytest.fixture
def results(monkeypatch):
    """What is in results/, by file."""
    found = {}
    monkeypatch.setattr(hunt_blocks, "find", found.get)
    return found


def test_what_is_not_recorded_leaves_no_line(results):
    assert hunt_blocks.reliability() == ""
    assert hunt_blocks.coverage() == "Not recorded yet."
    assert len(hunt_blocks.hunts().splitlines()) == 2  # headers


def test_a_line_has_the_sums_of_a_hunts_tests(results):
    results["hunt_exhaustive.json"] = result_of(
        "exhaustive",
        recorded_row(
            "test_e.py::test_a[5 + 3 blocks, 4 sequences-7-8]",
            states=1000,
            transitions=4,
            cpu_s=9.7,
        ),
        recorded_row("test_e.py::test_b", states=234, transitions=6),
    )
    assert hunt_blocks.reliability() == (
        "* 1,234 states of the paged manager, all that small worlds can reach, and 10 calls in them"
        " (`python tools/hunt.py exhaustive`, 61 s on 2 cores)"
    )
    first, second = hunt_blocks.hunts().splitlines()[2:]
    assert [cell.strip() for cell in first.strip("|").split("|")] == [
        "`python tools/hunt.py exhaustive`",
        "5 + 3 blocks, 4 sequences",
        "1,000 states, 4 transitions",
        "10",
        "13",
        "2 cores, [`results/hunt_exhaustive.json`](results/hunt_exhaustive.json)",
    ]
    assert second.strip("|").split("|")[1].strip() == "b"


def test_a_hunt_that_failed_or_counted_something_else_is_no_result(results):
    results["hunt_exhaustive.json"] = one = result_of("exhaustive", recorded_row("a", states=1))
    with pytest.raises(KeyError, match="transitions"):  # update_readme.py refuses it in one line
        hunt_blocks.reliability()
    one["output"]["exit_code"] = 1
    for part in (hunt_blocks.reliability, hunt_blocks.hunts):
        with pytest.raises(UsageError, match="a hunt that failed"):
            part()


def test_what_make_test_goes_through_is_told_by_file(results):
    figures = {
        "states": 3,
        "transitions": 4,
        "workloads": 5,
        "contiguous workloads": 6,
        "rules": 7,
        "sequences": 8,
        "inputs": 9,
    }
    found = [recorded_row(f"{name}::test_a", **figures) for name in hunt_blocks.SMALL] * 2
    assert hunt_blocks.small() == "Not recorded yet."
    results["hunt_small.json"] = result_of("small", *found)
    assert hunt_blocks.small().startswith(
        "6 states of the paged manager, 8 calls in them; 6 states of the contiguous one and of its "
        "buddy allocator, and 8 calls; 10 workloads, 12 contiguous; 14 random calls; 16 sequences; "
        "18 malformed inputs: `python tools/hunt.py small`, 61 s on 2 cores"
    )


@pytest.mark.parametrize("name", hunt.HUNTS)
def test_every_hunt_has_a_line_for_the_readme(name):
    assert name in hunt_blocks.LINES


def test_coverage_and_mutants_are_shares(results):
    results["hunt_coverage.json"] = result_of(
        "coverage",
        recorded_row("a.py", branches=4, taken=3, **{"not taken": "3 to 5"}),
        recorded_row("all", branches=200, taken=199),
    )
    modules = [{"module": "a.py", "mutants": 40, "killed": 39}, {"mutants": 5, "killed": 5}]
    survivors = [{"reason": "none can tell"}]
    tables = [{"id": "mutants", "rows": modules}, {"id": "survivors", "rows": survivors}]
    results["mutants.json"] = {"output": {"schema": "x/1", "tables": tables}}
    changes, branches = hunt_blocks.reliability().splitlines()
    assert changes.startswith("* 44 of 45 changes to 2 modules noticed by tests, each of the")
    survivors[0]["reason"] = None
    assert "NOT ALL others explained" in hunt_blocks.reliability()
    assert branches.startswith("* 99.5% of the branches")
    text = hunt_blocks.coverage()
    assert text.startswith("199 of 200 branches, 99.5% (`python tools/hunt.py coverage`, 2 cores")
    assert text.splitlines()[-1].strip("|").split("|")[1].strip() == "3 to 5"
