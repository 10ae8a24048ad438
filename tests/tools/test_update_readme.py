"""tools/update_readme.py: how rows are counted, what is not recorded yet, where links lead."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import committed  # noqa: E402
import figure_blocks  # noqa: E402
import reliability_blocks  # noqa: E402
import speed_blocks  # noqa: E402
import update_readme  # noqa: E402

D5 = "[D5](docs/differences.md#d5)"


def row(figure, held, **more):
    return {
        "figure": figure,
        "setting": "13B Alpaca, vLLM",
        "metric": "s/token",
        "paper": 1.0,
        "ours": 1.0,
        "difference": "+0.0 %",
        "tolerance": "5 %",
        "held": held,
        **more,
    }


def results(*rows):
    return {
        "command": "python reproduce.py",
        "device": "a machine",
        "versions": {"python": "3"},
        "output": {"rows": list(rows), "notes": []},
    }


NEW = results(
    row("Fig. 2", True, fitted=False),
    row("Fig. 12", True, fitted=True),
    row("Fig. 12", True, fitted=False),
    row("Fig. 12", "explained", fitted=True, reason="D5: a reason"),
    row("Fig. 12", False, fitted=True),
)
OLD = results(*({k: v for k, v in one.items() if k != "fitted"} for one in NEW["output"]["rows"]))


def cells(text):
    """The table's rows, without headers, by their first cell."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines[2:]}


@pytest.mark.parametrize(
    ("found", "columns", "counts"),
    [
        (NEW, "held | of these fitted | explained | not held", ["5", "3", "1", "1", "1"]),
        (OLD, "held | explained | not held", ["5", "3", "1", "1"]),
    ],
    ids=["new", "old"],
)
def test_fitted_rows_are_counted_where_the_results_tell_them(monkeypatch, found, columns, counts):
    monkeypatch.setattr(figure_blocks, "load", lambda name: found)
    text = figure_blocks.figures()
    (headers,) = [line for line in text.splitlines() if "where in the paper" in line]
    assert " | ".join(cell.strip() for cell in headers.strip("|").split("|")[2:]) == columns
    assert cells(text)["all"] == counts


def test_fitted_rows_are_marked_where_the_results_tell_them(monkeypatch):
    last = []
    for found in (NEW, OLD):
        monkeypatch.setattr(figure_blocks, "load", lambda name, found=found: found)
        lines = [line for line in figure_blocks.rows().splitlines() if line.startswith("| Fig.")]
        last.append([line.strip("|").split("|")[-1].strip() for line in lines])
    assert last == [
        ["yes", "yes, fitted", "yes", f"{D5}, fitted", "NO, fitted"],
        ["yes", "yes", "yes", D5, "NO"],
    ]


def test_the_headline_counts_the_fitted(monkeypatch):
    real = committed.load

    def load(name):
        found = real(name)
        if name == "reproduce.json":
            for one in found["output"]["rows"]:
                one["fitted"] = one["figure"] == "Table 1"
        return found

    monkeypatch.setattr(figure_blocks, "load", load)
    rows = load("reproduce.json")["output"]["rows"]
    fitted = sum(one["held"] is True for one in rows if one["figure"] == "Table 1")
    assert f"({fitted} of them on values that constants were fitted to)" in figure_blocks.headline()


def test_differences_counts_rows_by_figure(monkeypatch):
    monkeypatch.setattr(figure_blocks, "load", lambda name: NEW)
    table = cells(figure_blocks.differences())
    assert table[D5][0] == "1 of Fig. 12"
    assert {counts[0] for number, counts in table.items() if number != D5} == {"none here"}
    assert "12" in figure_blocks.explained("D5")
    assert figure_blocks.explained("D6") == "No row of the committed run."


def test_a_curve_without_a_value_is_shown_as_missing(monkeypatch):
    real = committed.load("reproduce.json")
    for one in real["output"]["rows"]:
        if one["setting"] == "13B ShareGPT, vLLM / Orca (Max)":
            one.update(ours=None, held=False, difference="no value")
    monkeypatch.setattr(
        figure_blocks,
        "load",
        {"reproduce.json": real, "main_cpu.json": committed.load("main_cpu.json")}.get,
    )
    assert cells(figure_blocks.ratios())["Fig. 12, 13B ShareGPT"][2] == "- / 3.68 (NO)"
    assert "| - " in figure_blocks.rows() and " neither." in figure_blocks.headline()


def hour(ratio):
    metric = "rate, ratio at 0.5 s/token"
    return results(
        row("Fig. 14", True, setting="13B Alpaca, parallel 2, vLLM", metric=metric, ours=9.0),
        row("Fig. 14", True, setting="13B Alpaca, beam 6, vLLM", metric=metric, ours=ratio),
    )


def test_an_hour_of_beam_search_stands_beside_ten_minutes(monkeypatch):
    monkeypatch.setattr(figure_blocks, "find", lambda name: None)
    assert figure_blocks.beams_hour() == ""
    monkeypatch.setattr(figure_blocks, "find", lambda name: hour(2.5))
    monkeypatch.setattr(figure_blocks, "load", lambda name: hour(1.5))
    assert cells(figure_blocks.beams_hour())["6, vLLM"][1:4] == ["1", "1.5", "2.5"]


def test_what_is_not_recorded_is_said_where_it_would_stand(monkeypatch):
    monkeypatch.setattr(speed_blocks, "find", lambda name: None)
    assert speed_blocks.gpu() == ""
    for block in (speed_blocks.gpu_attention, speed_blocks.gpu_paging):
        assert block() == "Not recorded yet."


def recorded(output):
    return {"command": "python b.py", "device": "a GPU", "versions": {}, "output": output}


ATTENTION = recorded(
    {
        "bandwidth_bytes_per_s": 1e12,
        "repeats": 3,
        "shapes": [
            {
                "shape": "small",
                "aim": 1.25,
                "floor_us": 10.0,
                "triton_us": 12.0,
                "read_us": 11.0,
                "triton_dirty_us": 15.0,
                "gather_us": 40.0,
                "gather_share": 0.9,
                "cudnn_us": 16.0,
            },
            {
                "shape": "1..9",
                "aim": 1.05,
                "floor_us": 100.0,
                "triton_us": 110.0,
                "read_us": 101.0,
                "triton_dirty_us": 104.0,
                "gather_us": 350.0,
                "gather_share": 0.95,
                "flashinfer_us": 100.0,
                "flashinfer_tc_us": 200.0,
            },
        ],
    }
)
PAGED = {
    "paged_us": 11.0,
    "floor_us": 9.0,
    "contiguous_us": 10.0,
    "cudnn_us": None,
    "flash_us": 8.0,
}
TIMES = {
    f"{way}{of}_ms": 2.0 for way in ("recompute", "swap_in", "swap_out") for of in ("", "_median")
}
PAGING = recorded(
    {
        "model": "opt-13b",
        "copy_bytes_per_s": 1e12,
        "pinned_bytes_per_s": {"to_device": 5e10, "to_host": 5e10},
        "attention": [{"batch": 8, "context": 2048, **PAGED}],
        "blocks": [{"block_size": 16, **PAGED}],
        "swap": [{"block_size": 16, "blocks": 16, "num_bytes": 1 << 20, **TIMES}],
        "moves": [
            {
                "what": "copy",
                "layers": 1,
                "blocks": 1000,
                "fused_us": 2.0,
                "limit_us": 1.0,
                "plain_us": 4.0,
                "call_us": 3.0,
            }
        ],
    }
)


def profile_keys():
    return [*speed_blocks.benchmark("profile_attention").METRICS, "read_over_live"]


def test_recorded_kernels_are_shown(monkeypatch):
    monkeypatch.setattr(
        speed_blocks, "find", {speed_blocks.ATTENTION: ATTENTION, speed_blocks.PAGING: PAGING}.get
    )
    assert cells(speed_blocks.gpu_attention())["small"][:4] == ["10.000", "1.250", "1.500", "-"]
    paging = speed_blocks.gpu_paging()
    for title in ("Fig. 18a", "Fig. 18b", "Fig. 19a", "Swapping", "Section 5"):
        assert f"\n{title}" in paging
    lines = speed_blocks.gpu()
    assert "1.10 to 1.20 times" in lines and "+10.0 to +10.0 %" in lines
    assert "kernel -25.0 to -25.0 %" in lines and "(1.04 to 1.50 with" in lines
    assert speed_blocks.gpu_aims().splitlines() == [
        "* aims (dirty): 1 of 2 met, the others missed by +20.0 to +20.0 %.",
        "* against FlashInfer's paged decode (clean): +10.0 to +10.0 %; faster on 0 of 1, level on "
        "0.",
        "* against torch's best contiguous kernel (clean): -25.0 to -25.0 %; faster on 1 of 1, "
        "level on 0.",
    ]
    others = cells(speed_blocks.gpu_others())
    assert [*others.values()] == [
        ["10.00", "10.00", "<= 1", "1 of 1"],
        ["0.90", "0.95", ">= 0.92", "1 of 2"],
        ["4.00", "4.00", "<= 3.2", "1 of 1"],
        ["3.50", "3.50", "<= 3.5", "0 of 1"],
        ["0.50", "0.50", ">= 0.85", "1 of 1"],
        ["0.01", "0.01", ">= 0.8", "2 of 2"],
    ]
    assert speed_blocks.gpu_gaps() == "Not recorded yet."
    assert speed_blocks.gpu_profile() == "Not recorded yet."
    counted = dict.fromkeys(profile_keys(), 1.0)
    launches = [
        {"shape": "small", "case": case, **counted, "memory_busy_percent": busy}
        for case, busy in (("random", 80.0), ("consecutive", 84.5), ("read", 90.0))
    ]
    monkeypatch.setattr(
        speed_blocks, "find", {speed_blocks.PROFILE: recorded({"rows": launches})}.get
    )
    assert cells(speed_blocks.gpu_gaps()) == {"small": ["90.0", "-5.5", "-4.5"]}
    assert "| small | random" in re.sub(" +", " ", speed_blocks.gpu_profile())


def test_mutants_are_counted_and_survivors_stand_in_a_table(monkeypatch):
    monkeypatch.setattr(reliability_blocks, "find", lambda name: None)
    assert reliability_blocks.mutants() == reliability_blocks.survivors() == "Not recorded yet."
    modules = [
        {
            "module": name,
            "mutants": ran,
            "killed": killed,
            "share": killed / ran,
            "test_seconds": 2.5,
            "lines_gone": 0,
        }
        for name, ran, killed in (("a.py", 10, 9), ("b.py", 30, 30))
    ]
    alive = [
        {"module": "a.py", "function": "f", "change": "a |= b  # why", "count": 2, "reason": "so"},
        {"module": "b.py", "function": "", "change": "x = 1", "count": 1, "reason": None},
    ]
    found = recorded({"mutants": modules, "survivors": alive})
    monkeypatch.setattr(reliability_blocks, "find", lambda name: found)
    counted = cells(reliability_blocks.mutants())
    assert counted["`a.py`"] == ["10", "9", "90.0%", "2.5"]
    assert counted["all"] == ["40", "39", "97.5%", "-"]
    lines = [re.sub(" +", " ", line) for line in reliability_blocks.survivors().splitlines()[2:]]
    assert lines == [
        "| `a.py`, `f` | `a \\|= b` | 2 | so |",
        "| `b.py` | `x = 1` | 1 | NO REASON |",
    ]


def test_links_are_rewritten_for_docs(tmp_path, monkeypatch):
    page = "<!-- result: origin_of x -->\nold\n<!-- end -->\n"
    monkeypatch.setitem(
        update_readme.PARTS, "origin_of", lambda name: f"[a](docs/{name}.md) [b](results/{name})"
    )
    found = []
    for folder in ("docs", "elsewhere"):
        path = tmp_path / folder / "page.md"
        path.parent.mkdir()
        path.write_text(page, encoding="utf-8")
        found.append(update_readme.updated(path).splitlines()[1])
    assert found == ["[a](x.md) [b](../results/x)", "[a](docs/x.md) [b](results/x)"]
