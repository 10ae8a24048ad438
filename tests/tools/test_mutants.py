"""Regime item 10: what tools/mutants.py leaves, counts, shows, refuses, on made-up sessions."""

import json
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import equivalent_mutants  # noqa: E402
import mutant_sessions  # noqa: E402
import mutants  # noqa: E402
from mutant_sessions import Found, Session, Survivor  # noqa: E402

OUTCOMES = ["KILLED", "SURVIVED", "KILLED", "INCOMPETENT", None, None, None, None]
DIFF = "--- a\n+++ b\n@@ -1 +1 @@\n-    x = 1\n+    x = 2\n"
MODULE = "serving.py"


def fill(path, outcomes):
    """A database of mutants of serving.py; those without an outcome have not been run."""
    with closing(sqlite3.connect(path)) as data, data:
        data.execute("create table work_items (job_id)")
        data.execute(
            "create table mutation_specs (module_path, operator_name, occurrence, start_pos_row,"
            " definition_name, job_id)"
        )
        data.execute("create table work_results (worker_outcome, test_outcome, diff, job_id)")
        for row, outcome in enumerate(outcomes):
            job = f"job {row}"
            data.execute("insert into work_items values (?)", (job,))
            place = (MODULE, "core/NumberReplacer", row, 10 + row, "f", job)
            data.execute("insert into mutation_specs values (?, ?, ?, ?, ?, ?)", place)
            if outcome:
                worker = "SKIPPED" if outcome == "SKIPPED" else "NORMAL"
                result = (worker, None if outcome == "SKIPPED" else outcome, DIFF, job)
                data.execute("insert into work_results values (?, ?, ?, ?)", result)


@pytest.fixture
def database(tmp_path):
    """Eight mutants of serving.py, of which four have been run."""
    fill(tmp_path / "session.sqlite", OUTCOMES)
    return tmp_path / "session.sqlite"


class Work:
    """A root with serving.py, one file of tests, and a session of both that has been run."""

    def __init__(self, root):
        self.root, self.folder = root, root / ".mutants" / "serving"
        self.module, self.test = root / MODULE, root / "tests" / "test_serving.py"
        self.test.parent.mkdir()
        self.module.write_text("x = 1\n")
        (root / "pyproject.toml").write_text("")
        self.test.write_text("def test_x():\n    assert True\n")
        self.runs = []  # for each run, how many mutants there were to run

    def session(self):
        return Session(self.folder, MODULE)

    def begin(self, outcomes):
        self.folder.mkdir(parents=True)
        (self.folder / "first_tests").mkdir()
        (self.folder / "first_tests" / self.test.name).write_bytes(self.test.read_bytes())
        fill(self.folder / "session.sqlite", outcomes)
        hashed = mutant_sessions.digest(self.module)
        self.session().keep(module_sha256=hashed, sample=False, test_seconds={"test_serving": 1.5})


@pytest.fixture
def work(tmp_path, monkeypatch):
    made = Work(tmp_path)
    for module in (mutants, mutant_sessions):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "MODULES", {MODULE: ("test_serving",)})
    monkeypatch.setitem(mutant_sessions.MODULES, MODULE, ("test_serving",))
    monkeypatch.setattr(mutants, "REASONS", {})
    monkeypatch.setattr(Session, "run", lambda self: made.runs.append(self.found().left))
    return made


def why(*changes):
    return {MODULE: {"f": dict.fromkeys(changes, "nobody can tell")}}


# ---- a session ----------------------------------------------------------------------------------


def test_survivors_are_counted_and_shown(database):
    alive = [Survivor(11, "NumberReplacer", "f", "x = 2")]
    assert mutant_sessions.found(database) == Found(run=4, killed=3, left=4, alive=alive)


def test_operators_left_out_are_neither_run_nor_left(tmp_path):
    fill(tmp_path / "session.sqlite", ["KILLED", "SKIPPED", "SKIPPED"])
    assert mutant_sessions.found(tmp_path / "session.sqlite") == Found(1, 1, 0, [])


def test_a_mutant_that_only_takes_away_shows_what():
    assert mutant_sessions.changed_line("--- a\n+++ b\n-    @property\n") == "without @property"
    with pytest.raises(ValueError, match="changes nothing"):
        mutant_sessions.changed_line("--- a\n+++ b\n")


def test_a_sample_keeps_what_was_run_and_is_the_same_for_a_seed(database, tmp_path):
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(database.read_bytes())
    left = []
    for path in (database, copy):
        mutant_sessions.keep_sample(path, 2, seed=1)
        with closing(sqlite3.connect(path)) as data:
            left.append(data.execute("select job_id from work_items order by 1").fetchall())
            assert data.execute("select count(*) from mutation_specs").fetchone() == (6,)
        assert mutant_sessions.found(path).run == 4
    assert left[0] == left[1] and len(left[0]) == 6


def test_only_survivors_are_run_again_and_with_the_tests_of_now(work):
    work.begin(["KILLED", "SURVIVED", "INCOMPETENT", "SURVIVED"])
    (work.folder / "tests").mkdir()
    (work.folder / "tests" / "test_gone.py").write_text("")
    work.test.write_text(work.test.read_text() + "\n\ndef test_y():\n    assert True\n")
    assert mutants.main(["--again"]) == 1  # two are left, as nothing is run here
    assert work.runs == [2]
    assert [path.name for path in (work.folder / "tests").glob("*.py")] == ["test_serving.py"]
    assert (work.folder / "tests" / "test_serving.py").read_bytes() == work.test.read_bytes()
    facts = work.session().facts
    assert 0.0 < facts["test_seconds"]["test_serving"] < 60.0
    script = (work.folder / "run_tests.sh").read_text()
    assert "ulimit -v" in script and "tests/test_serving.py" in script
    assert work.session().lines_gone() == 0


@pytest.mark.parametrize(("which", "runs"), [("all", 2), ("unexplained", 0)])
def test_survivors_with_a_reason_may_be_left_alone(work, monkeypatch, which, runs):
    monkeypatch.setattr(mutants, "REASONS", why("x = 2"))
    work.begin(["KILLED"] * 98 + ["SURVIVED"] * 2)
    mutants.main(["--again", which])
    assert work.runs == [runs]


@pytest.mark.parametrize("option", ["--again", None])
def test_mutants_of_a_module_that_has_changed_are_not_run(work, capsys, option):
    work.begin(["KILLED", "SURVIVED"])
    work.module.write_text("x = 2\n")
    assert mutants.main([option] if option else []) == 2
    assert capsys.readouterr().err == (
        "mutants.py: error: serving.py is not what its mutants were made of: --fresh\n"
    )
    assert work.runs == [] and work.session().found().run == 2


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [(None, "has not been run"), (["SURVIVED", None], "has not been run to its end")],
)
def test_nothing_is_run_again_before_all_was_run(work, capsys, outcomes, message):
    if outcomes:
        work.begin(outcomes)
    assert mutants.main(["--again"]) == 2
    assert capsys.readouterr().err.endswith(f"--again: serving.py {message}\n")


def test_a_run_goes_on_with_the_module_and_not_with_a_mutant(work):
    work.begin(["KILLED", None])
    (work.folder / MODULE).write_text("x = 3\n")  # left by a run that was killed
    assert mutants.main([]) == 1 and work.runs == [1]
    assert (work.folder / MODULE).read_text() == "x = 1\n"


def test_tests_that_fail_without_a_mutant_are_refused(work, capsys):
    work.begin(["SURVIVED"])
    work.test.write_text("def test_x():\n    assert False\n")
    assert mutants.main(["--again"]) == 2
    assert "without a mutant" in capsys.readouterr().err
    assert work.session().found().run == 1 and work.runs == []


def test_tests_that_take_too_long_are_refused(work, capsys, monkeypatch):
    work.begin(["SURVIVED"])
    monkeypatch.setattr(mutant_sessions, "MOST_TEST_S", 0.0)
    assert mutants.main(["--again"]) == 2
    assert "the tests of serving.py take" in capsys.readouterr().err


def test_lines_of_the_first_tests_that_are_gone_are_told(work, capsys):
    work.begin(["KILLED"])
    work.test.write_text("import os\n\n\ndef test_x():\n    assert os\n")
    assert mutants.main(["--report"]) == 0
    assert "1 lines of the first tests gone" in capsys.readouterr().out


# ---- what it says -------------------------------------------------------------------------------


@pytest.mark.parametrize(("killed", "code"), [(95, 0), (94, 1)])
def test_fewer_killed_than_the_goal_is_exit_code_1(work, monkeypatch, capsys, killed, code):
    work.begin(["KILLED"] * killed + ["SURVIVED"] * (100 - killed))
    monkeypatch.setattr(mutants, "REASONS", why("x = 2"))
    assert mutants.main([]) == code
    printed = capsys.readouterr().out
    assert f"f: x = 2  [nobody can tell]\nserving.py: {killed} of 100 mutants killed" in printed


def test_a_survivor_without_a_reason_is_exit_code_1(work, capsys):
    work.begin(["KILLED"] * 99 + ["SURVIVED"])
    assert mutants.main(["--report"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("serving.py:109: NumberReplacer: f: x = 2  [NO REASON]\n")


def test_a_reason_whose_mutant_is_killed_or_gone_is_stale(work, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "REASONS", why("x = 2", "x = 7"))
    work.begin(["KILLED"] * 99 + ["SURVIVED"])
    assert mutants.main(["--report"]) == 1
    printed = capsys.readouterr().out
    assert re.findall("stale.*", printed) == ["stale, no survivor: f: x = 7"]
    work.session().keep(sample=True)  # the others may be among those left out
    assert mutants.main(["--report"]) == 0


def test_a_report_runs_nothing_and_tells_what_is_missing(work, capsys):
    assert mutants.main(["--report"]) == 1
    assert capsys.readouterr().out == "serving.py: not run\n"
    work.begin(["KILLED", None])
    assert mutants.main(["--report"]) == 1
    assert capsys.readouterr().out == "serving.py: not run to its end\n"
    work.module.write_text("x = 2\n")
    assert mutants.main(["--report"]) == 1
    assert capsys.readouterr().out == "serving.py: has changed since it was run\n"
    assert work.runs == []


def test_the_document_has_what_was_found_and_why(work, monkeypatch, tmp_path):
    monkeypatch.setattr(mutants, "REASONS", why("x = 2"))
    work.begin(["KILLED"] * 38 + ["SURVIVED"] * 2)
    path = tmp_path / "out.json"
    assert mutants.main(["--report", "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="ascii"))
    schema = json.loads((ROOT / "docs" / "schema.json").read_text(encoding="ascii"))
    jsonschema.Draft202012Validator(schema).validate(found)
    counts, survivors = found["tables"]
    assert counts["rows"] == [
        {
            "module": "serving.py",
            "mutants": 40,
            "killed": 38,
            "share": 0.95,
            "test_seconds": 1.5,
            "lines_gone": 0,
        }
    ]
    assert survivors["rows"] == [
        {
            "module": "serving.py",
            "function": "f",
            "change": "x = 2",
            "count": 2,
            "reason": "nobody can tell",
        }
    ]
    assert [check["ok"] for check in found["checks"]] == [True, True, True]


def test_a_document_that_cannot_be_written_is_refused_before_anything_runs(work, capsys):
    assert mutants.main(["--report", "--json", str(work.root / "no" / "out.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- the lists ----------------------------------------------------------------------------------


def test_every_module_and_every_test_that_it_names_is_there():
    for module, tests in mutant_sessions.MODULES.items():
        assert (ROOT / module).is_file()
        for name in tests:
            text = (ROOT / "tests" / f"{name}.py").read_text(encoding="ascii")
            assert "import torch" not in text, name


def test_every_reason_is_of_a_function_that_there_is():
    for module, functions in equivalent_mutants.REASONS.items():
        assert module in mutant_sessions.MODULES
        text = (ROOT / module).read_text(encoding="ascii")
        for name, changes in functions.items():
            assert not name or re.search(rf"\b(def|class) {name}\b", text), name
            assert changes and all(reason.strip() for reason in changes.values())
