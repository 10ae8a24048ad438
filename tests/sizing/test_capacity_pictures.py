"""`capacity.py --figures`: what its artists say was drawn."""

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest

import capacity
from kv_cache_manager import MemoryUsage
from vllm_sim.serving.systems import POLICIES
from vllm_sim.sizing import answers, pictures
from vllm_sim.sizing.case import make_case, make_trace_case
from vllm_sim.sizing.concurrency import means
from vllm_sim.sizing.options import build_parser
from vllm_sim.sizing.trace_answers import survey

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib")
SHORT = ["--gpu-memory", "30", "--workload", "20,30"]


@pytest.fixture(scope="module")
def sections(case_of):
    case = case_of(*SHORT, "--max-model-len", 300)
    return {section.name: section for section in answers.survey(case).sections}


@needs_matplotlib
def test_slots_and_requests_by_policy(sections):
    found = pictures.figures([*sections.values()])[pictures.SLOTS]()
    left, right = found.axes
    expected = []
    for row in sections["slots"].records():
        whole = sum(row[part] for part in MemoryUsage.PARTS)
        expected += [100.0 * row[part] / whole for part in MemoryUsage.PARTS]
    assert [bar.get_height() for bar in left.patches] == pytest.approx(expected)
    running = [row for row in sections["concurrency"].rows if row[0].startswith("simulated: ")]
    assert [bar.get_height() for bar in right.patches] == [row[-1] for row in running]
    for axes in (left, right):
        assert [text.get_text() for text in axes.get_xticklabels()] == [*POLICIES]


@needs_matplotlib
def test_a_panel_for_what_each_block_size_changes(sections):
    found = pictures.figures([*sections.values()])[pictures.SIZES]()
    table = sections["block_sizes"]
    columns = ("padding, %", "prefix shared, %", "copies a fork", "table, bytes")
    for axes, column in zip(found.axes, columns, strict=True):
        at = table.headers.index(column)
        (line,) = axes.get_lines()
        assert list(map(tuple, line.get_xydata())) == [(row[0], row[at]) for row in table.rows]
        assert axes.get_xscale() == "log" and axes.get_title()


@needs_matplotlib
def test_without_a_prefix_its_panel_is_empty(case_of):
    case = replace(case_of(*SHORT), prefix_len=0)
    section = answers.block_sizes(case, means(case.workload, case.max_len, case.seed))
    found = pictures.by_block_size(section)
    assert [len(axes.get_lines()) for axes in found.axes] == [1, 0, 1, 1]
    assert "prefix" in found.axes[1].get_title()


@needs_matplotlib
def test_two_pictures_are_written(tmp_path, monkeypatch, sections, capfd):
    found = answers.Survey("so", [*sections.values()])
    monkeypatch.setattr(answers, "survey", lambda *_: found)
    assert capacity.main(["--figures", str(tmp_path / "new")]) == 0
    assert sorted(os.listdir(tmp_path / "new")) == sorted([pictures.SIZES, pictures.SLOTS])
    assert pictures.figures([sections["memory"]]) == {}


@needs_matplotlib
def test_what_a_trace_needs_is_drawn(tmp_path, capfd):
    rows = "".join(f"{i / 20},{90 + i % 7},{40 + i % 11}\n" for i in range(80))
    (tmp_path / "trace.csv").write_text("time,input_len,output_len\n" + rows)
    given = ["--trace", str(tmp_path / "trace.csv"), "--preemption-rate", "0.1"]
    assert capacity.main([*given, "--figures", str(tmp_path / "new"), "--quiet"]) == 0
    assert os.listdir(tmp_path / "new") == [pictures.TRACE]
    args = build_parser().parse_args(given)
    found = survey(make_trace_case(args, make_case(args))).sections
    (draw,) = pictures.figures(found).values()
    for axes, table in zip(draw().axes, found[-2:], strict=True):
        heights = [bar.get_height() for bars in axes.containers for bar in bars]
        assert heights == [row[3] for row in table.rows]
        assert [text.get_text() for text in axes.get_xticklabels()] == [*POLICIES]
