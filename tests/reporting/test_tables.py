"""tables.py: a table as text in three formats, and its rows for JSON."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from vllm_sim.reporting.tables import FORMATS, Table, cell_text, counted, key_of, render


@pytest.fixture
def table():
    rows = [("max", 1998, 97.56), ("oracle", 12, None)]
    headers = ("policy", "slots", "share %")
    return Table("Slots", headers, rows, "983 blocks of 16", name="slots")


def test_one_of_a_thing_is_no_plural():
    told = ["0 blocks", "1 block", "2 blocks", "1,024 blocks"]
    assert [counted(number, "block") for number in (0, 1, 2, 1024)] == told


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
        "policy  slots  share %",
        "------  -----  -------",
        "max     1,998     97.6",
        "oracle     12        -",
    ]


def test_plain_lines_have_at_most_100_columns_and_no_word_is_lost_or_cut():
    told = [("a long sentence of words " * 4, 1234567, 0.5), ("  indented", None, 1e9)]
    headers = ("what it is", "many words above a number that is narrow", "share of it all")
    wide = Table("A title", headers, told * 2, "a setting of many words, " * 9)
    text = render(wide, "plain")
    assert max(map(len, text.splitlines())) <= 100 and "\n  indented " in text
    found = Counter(re.sub(r"-{2,}", "", text).split())
    given = [
        *headers,
        wide.title,
        f"({wide.setting})",
        *(cell_text(c, 1) for r in wide.rows for c in r),
    ]
    assert found == Counter(" ".join(given).split())
    assert max(map(len, render(replace(wide, picture=True), "plain").splitlines())) > 100


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
    assert render(Table("t", ("x",), [(1,)]), "plain").splitlines()[:2] == ["t", "x"]


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
