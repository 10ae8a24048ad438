"""report.py of scenarios/: a scenario and the map of the pool, as a reader sees them."""

import json

import numpy as np
import pytest

from vllm_sim.reporting.tables import FORMATS, Table, render
from vllm_sim.scenarios.report import (
    Check,
    ScenarioReport,
    block_map,
    checks_table,
    note,
    render_scenario,
)


@pytest.fixture
def table():
    return Table("Slots", ("policy", "slots"), [("max", 1998)], "983 blocks of 16", name="slots")


@pytest.fixture
def report(table):
    checks = [Check("holds", True, "3 of 3"), Check("fails", False, "2 of 3")]
    parts, data = [table, "map:\nTT..\n", "end"], [note("lost", slots=4711, share=0.5)]
    answer = "97.6 % of it."
    return ScenarioReport(1, "one_name", "What is lost?", parts, checks, answer, data)


# ---- a scenario -------------------------------------------------------------------------------


def test_plain_scenario(report):
    lines = render_scenario(report, "plain").split("\n")
    assert lines[:4] == ["Scenario 1: one_name", "=" * 20, "What is lost?", ""]
    assert lines[-2:] == ["Answer: 97.6 % of it.", ""]
    assert "TT.." in lines and "end" in lines


def test_github_scenario_fences_what_is_no_table(report):
    text = render_scenario(report, "github")
    assert text.startswith("## Scenario 1: one_name\n")
    assert "```\nmap:\nTT..\n\n```" in text and "```\nend\n```" in text
    assert text.count("```") == 4


def test_latex_scenario_is_comments_and_tables(report):
    """So that it can be put into a document as it is."""
    inside = False
    for line in render_scenario(report, "latex").split("\n"):
        if line.startswith(r"\begin{tabular}"):
            inside = True
        assert inside or not line or line.startswith("%"), line
        if line == r"\end{tabular}":
            inside = False
    assert not inside


@pytest.mark.parametrize("fmt", FORMATS)
def test_everything_is_ascii(report, fmt):
    assert render_scenario(report, fmt).isascii()
    assert render(checks_table([report]), fmt).isascii()


def test_failed_checks_stand_out(report):
    assert [row[:3] for row in checks_table([report]).rows] == [
        (1, "ok", "holds"),
        (1, "FAILED", "fails"),
    ]
    assert "FAILED" in render(checks_table([report]), "plain")


def test_a_check_of_numpy_is_a_bool_in_json():
    report = ScenarioReport(1, "one_name", "?", checks=[Check("of numpy", np.bool_(True), "")])
    assert json.loads(json.dumps(report.checks_json()))[0]["ok"] is True


def test_scenario_as_json(report, table):
    assert report.to_json() == {
        "number": 1,
        "name": "one_name",
        "question": "What is lost?",
        "answer": "97.6 % of it.",
    }
    shown, told = report.tables_json()
    assert shown == {**table.to_json(), "scenario": 1}
    assert (told["id"], told["index"]) == ("lost", [])
    assert told["rows"] == [{"slots": 4711, "share": 0.5}]
    assert report.checks_json()[1] == {
        "scenario": 1,
        "name": "fails",
        "ok": False,
        "detail": "2 of 3",
    }
    assert "4,711" not in render_scenario(report, "plain")


# ---- the map of the pool ----------------------------------------------------------------------


def test_map_shows_blocks_in_order():
    spans = [(4, "T"), (4, "r"), (8, ".")]
    assert block_map(8, 2, spans, per_char=1) == "TTrr...."
    assert block_map(8, 2, spans, per_char=2) == "Tr.."
    assert block_map(8, 2, spans, per_char=3) == "T.."  # of the second: 2 slots r, 4 free


def test_map_character_is_the_commonest_kind():
    assert block_map(4, 4, [(5, "T"), (11, ".")], per_char=2) == "T."
    assert block_map(4, 4, [(3, "T"), (13, ".")], per_char=2) == ".."
    # A last character that stands for fewer blocks than the others.
    assert block_map(5, 2, [(8, "T"), (2, ".")], per_char=4) == "T."


def test_map_breaks_lines():
    text = block_map(10, 1, [(10, "T")], per_char=1, width=4)
    assert text == "TTTT\nTTTT\nTT"


def test_map_passes_over_empty_spans():
    assert block_map(2, 2, [(0, "x"), (2, "T"), (0, "y"), (2, "."), (0, "z")], per_char=1) == "T."


@pytest.mark.parametrize("slots", [0, 7, 9])
def test_map_must_cover_the_pool(slots):
    with pytest.raises(ValueError, match=f"cover {slots} of 8 slots"):
        block_map(4, 2, [(slots, "T")], per_char=1)
