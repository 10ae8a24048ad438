"""Regime item 10: which mutants tools/mutants.py leaves, counts and shows, on a session by hand."""

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import mutants  # noqa: E402

OUTCOMES = ["KILLED", "SURVIVED", "KILLED", "INCOMPETENT", None, None, None, None]
DIFF = "--- a\n+++ b\n@@ -1 +1 @@\n-    x = 1\n+    x = 2\n"


@pytest.fixture
def session(tmp_path):
    """Eight mutants of serving.py, of which four have been run."""
    path = tmp_path / "session.sqlite"
    with closing(sqlite3.connect(path)) as data, data:
        data.execute("create table work_items (job_id)")
        data.execute(
            "create table mutation_specs (module_path, operator_name, occurrence, start_pos_row,"
            " job_id)"
        )
        data.execute("create table work_results (worker_outcome, test_outcome, diff, job_id)")
        for row, outcome in enumerate(OUTCOMES):
            job = f"job {row}"
            data.execute("insert into work_items values (?)", (job,))
            place = ("serving.py", "core/NumberReplacer", row, 10 + row, job)
            data.execute("insert into mutation_specs values (?, ?, ?, ?, ?)", place)
            if outcome:
                result = ("NORMAL", outcome, DIFF, job)
                data.execute("insert into work_results values (?, ?, ?, ?)", result)
    return path


def test_survivors_are_counted_and_shown(session):
    assert mutants.survivors(session) == (4, 3, ["serving.py:11: NumberReplacer: x = 2"])


def test_a_sample_keeps_what_was_run_and_is_the_same_for_a_seed(session, tmp_path):
    copy = tmp_path / "copy.sqlite"
    copy.write_bytes(session.read_bytes())
    left = []
    for path in (session, copy):
        mutants.keep_sample(path, 2, seed=1)
        with closing(sqlite3.connect(path)) as data:
            left.append(data.execute("select job_id from work_items order by 1").fetchall())
            assert data.execute("select count(*) from mutation_specs").fetchone() == (6,)
        assert mutants.survivors(path)[0] == 4
    assert left[0] == left[1] and len(left[0]) == 6


def test_every_module_and_every_test_that_it_names_is_there():
    for module, tests in mutants.MODULES.items():
        assert (ROOT / module).is_file()
        for name in tests:
            text = (ROOT / "tests" / f"{name}.py").read_text(encoding="ascii")
            assert "import torch" not in text, name


@pytest.mark.parametrize(("killed", "code"), [(95, 0), (94, 1)])
def test_fewer_killed_than_the_goal_is_exit_code_1(monkeypatch, capsys, killed, code):
    monkeypatch.setattr(mutants, "prepare", lambda *_: None)
    monkeypatch.setattr(mutants, "cosmic_ray", lambda *_: None)
    monkeypatch.setattr(mutants, "survivors", lambda _: (100, killed, ["serving.py:1: a: b"]))
    assert mutants.main(["--module", "serving.py", "--fresh"]) == code
    printed = capsys.readouterr().out
    assert printed.startswith("serving.py:1: a: b\n") and f"{killed} of 100 mutants" in printed
