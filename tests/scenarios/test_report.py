"""Tables, the map of the pool and JSON files: what a reader sees is what was found."""

import json
import os
import re
import stat

import pytest

from vllm_sim.reporting.tables import counted, key_of
from vllm_sim.scenarios.report import (
    FORMATS,
    Check,
    OutputError,
    ScenarioReport,
    Table,
    block_map,
    cell_text,
    check_writable,
    checks_table,
    render,
    render_scenario,
    write_json,
)


def test_one_of_a_thing_is_no_plural():
    told = ["0 blocks", "1 block", "2 blocks", "1,024 blocks"]
    assert [counted(number, "block") for number in (0, 1, 2, 1024)] == told


not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def table():
    rows = [("max", 1998, 97.56), ("oracle", 12, None)]
    headers = ("policy", "slots", "share %")
    return Table("Slots", headers, rows, "983 blocks of 16", name="slots")


@pytest.fixture
def report(table):
    made = ScenarioReport(1, "one_name", "What is lost?", [table, "map:\nTT..\n", "end"])
    made.check("holds", True, "3 of 3")
    made.check("fails", False, "2 of 3")
    made.answer = "97.6 % of it."
    return made


# ---- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (1234567, "1,234,567"),
        (1234.56, "1,234.6"),
        (0.0, "0.0"),
        (-0.5, "-0.5"),
        ("as it is", "as it is"),
        ("1e3", "1e3"),
    ],
)
def test_cell_text(value, text):
    assert cell_text(value, 1) == text


def test_decimals_are_those_of_the_table():
    text = render(Table("t", ("x",), [(0.125,)], decimals=3), "plain")
    assert text.splitlines()[-1].strip() == "0.125"


def test_plain_table(table):
    assert render(table, "plain").splitlines() == [
        "Slots",
        "(983 blocks of 16)",
        "policy      slots    share %",
        "--------  -------  ---------",
        "max         1,998       97.6",
        "oracle         12          -",
    ]


def test_github_table(table):
    lines = render(table, "github").splitlines()
    # The empty line is what makes it a table for Markdown.
    assert lines[:3] == ["Slots", "(983 blocks of 16)", ""]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:]]
    assert all(line.startswith("|") and line.endswith("|") for line in lines[3:])
    assert cells[0] == ["policy", "slots", "share %"]
    assert all(re.fullmatch(r":?-{3,}:?", cell) for cell in cells[1])
    assert cells[2:] == [["max", "1,998", "97.6"], ["oracle", "12", "-"]]


def test_latex_table(table):
    lines = render(table, "latex").splitlines()
    assert lines[:2] == ["% Slots", "% (983 blocks of 16)"]
    assert lines[2] == r"\begin{tabular}{lrr}" and lines[-1] == r"\end{tabular}"
    body = "\n".join(lines[3:-1])
    assert r"share \%" in body and not re.search(r"(?<!\\)%", body)
    assert r"\toprule" in body and r"\bottomrule" in body


def test_table_without_setting_has_no_line_for_it():
    assert render(Table("t", ("x",), [(1,)]), "plain").splitlines()[:2] == ["t", "  x"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_table_without_rows_has_its_headers(fmt):
    text = render(Table("empty", ("first", "second"), []), fmt)
    assert "first" in text and "second" in text


def test_column_with_one_word_is_set_to_the_left():
    mixed = render(Table("t", ("number", "mixed"), [(1, 2), (3, "x")]), "latex")
    assert r"{rl}" in mixed


def test_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="t: 1 cells under 2 headers"):
        Table("t", ("a", "b"), [(1, 2), (3,)])


def test_records_are_unrounded_and_have_the_words_of_the_headers_as_keys(table):
    assert table.records()[0] == {"policy": "max", "slots": 1998, "share_percent": 97.56}


def test_a_table_as_json(table):
    assert table.to_json() == {
        "id": "slots",
        "title": "Slots",
        "setting": "983 blocks of 16",
        "headers": ["policy", "slots", "share %"],
        "index": ["policy"],
        "rows": table.records(),
    }


@pytest.mark.parametrize(
    ("headers", "keys", "says"),
    [
        (("policy", ""), (), "no key for each of"),
        (("paper", "Paper"), (), "no key for each of"),
        (("a", "b"), ("a",), "no key for each of"),
        (("a", "b"), ("a", "a"), "no key for each of"),
    ],
)
def test_a_column_without_a_key_of_its_own_is_no_json(headers, keys, says):
    table = Table("t", headers, [(1, 2)], name="t", keys=keys)
    with pytest.raises(ValueError, match=says):
        table.to_json()


def test_a_table_without_a_name_is_no_json():
    with pytest.raises(ValueError, match="needs a name"):
        Table("t", ("a",), [(1,)]).to_json()


def test_lines_of_a_picture_each_say_whose_they_are():
    rows = [("max", "TT"), ("", ".."), ("oracle", "Tr"), ("", "..")]
    table = Table("map", ("policy", "T r"), rows, picture=True, keys=("policy", "line"))
    assert [row["policy"] for row in table.records()] == ["max", "max", "oracle", "oracle"]


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("external & others", "external_others"),
        ("saving %", "saving_percent"),
        ("padding, %", "padding_percent"),
        ("MiB a copy", "mib_a_copy"),
        ("", ""),
    ],
)
def test_keys_of_headers(header, key):
    assert key_of(header) == key


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


def test_check_turns_what_it_is_given_into_a_bool(report):
    import numpy as np

    report.check("of numpy", np.bool_(True), "")
    assert report.checks[-1] == Check("of numpy", True, "")
    assert report.checks[-1].ok is True
    json.dumps(report.checks_json())


def test_scenario_as_json(report, table):
    report.note("lost", slots=4711, share=0.5)
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


# ---- files ------------------------------------------------------------------------------------


def test_json_is_written_as_readable_ascii(tmp_path):
    path = tmp_path / "out.json"
    write_json(path, {"a": [1, 2.5, None, True], "b": "\u00a7"})
    assert path.read_bytes().isascii() and path.read_text().endswith("}\n")
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None, True], "b": "\u00a7"}
    assert os.listdir(tmp_path) == ["out.json"]


def test_json_gets_the_permissions_of_an_ordinary_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "out.json", 1)
        assert os.umask(0o027) == 0o027, "the umask was changed"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.json").stat().st_mode) == 0o640


@pytest.mark.parametrize("bad", [{"a": object()}, float("nan"), [float("inf")]])
def test_what_cannot_be_json_leaves_the_old_file(tmp_path, bad):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises((TypeError, ValueError)):
        write_json(path, {"good": list(range(10_000)), "bad": bad})
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("step", ["chmod", "replace"])
def test_failure_at_any_step_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "out.json"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        write_json(path, [1])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


def test_interrupted_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "chmod", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, [1])
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.json"]


def test_writing_through_a_link_keeps_the_link(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_json(link, [1])
    assert link.is_symlink() and json.loads(target.read_text()) == [1]


def test_what_can_be_written_passes(tmp_path, monkeypatch):
    check_writable(tmp_path / "new.json")
    (tmp_path / "old.json").write_text("old")
    check_writable(tmp_path / "old.json")
    monkeypatch.chdir(tmp_path)
    check_writable((tmp_path / "relative.json").relative_to(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["old.json"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (".", "directory"),
        ("no/out.json", "no directory"),
        ("file/out.json", "no directory"),
        ("x" * 300, "too long"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_run(tmp_path, name, why):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        check_writable(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path / name}: ") and "\n" not in message
    assert why in message.removeprefix(f"cannot write {tmp_path / name}: ").lower()


def test_what_is_no_file_is_refused_and_not_replaced(tmp_path):
    """Replaced by a file, /dev/null would break the machine of whoever is root."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(OutputError):
        check_writable(path)
    with pytest.raises(OutputError):
        write_json(path, [1])
    assert stat.S_ISFIFO(path.lstat().st_mode) and os.listdir(tmp_path) == ["pipe"]


@not_as_root
def test_no_permission_is_refused_before_the_run(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    read_only = tmp_path / "read_only.json"
    read_only.write_text("old")
    closed.chmod(0o500)
    read_only.chmod(0o400)
    for path in (closed / "out.json", read_only):
        with pytest.raises(OutputError, match="permission denied"):
            check_writable(path)
