"""benchmarks/profile_attention.py without a GPU: what it makes of ncu's words."""

import json

import bench_attention
import bench_paging_cost
import profile_attention as profile
import pytest
import torch

NAMES = [*profile.METRICS.values()]


def said(rows, names=tuple(NAMES)):
    """What ncu prints: its own lines, then CSV with the units in the second line."""
    lines = ["==PROF== Connected to process 7", ",".join(f'"{n}"' for n in ("ID", *names))]
    lines.append(",".join(['""', *['"unit"'] * len(names)]))
    lines += [",".join(f'"{cell}"' for cell in (number, *row)) for number, row in enumerate(rows)]
    return "\n".join(lines)


ROWS = [
    ["2,000", "8000.5", "88.2", "30", "25", "1.5", "88"],
    ["1,500", "8000", "90", "30", "26", "1.5", "88"],
    ["1e3", *["1"] * 6],
]


def test_a_launch_is_a_row_and_its_order_says_which():
    found = profile.parse(said(ROWS))
    assert len(found) == len(profile.CASES) == 3
    first = [2.0, 8000.5, 88.2, 30.0, 25.0, 1.5, 88.0]  # us, bytes, busy, warps, issue, waves, ...
    assert found[0] == dict(zip(profile.METRICS, first))
    assert found[2]["us"] == 1.0


@pytest.mark.parametrize(
    "text",
    ["", "==ERROR== no permission", said(ROWS[:2]), said(ROWS * 2), said(ROWS, NAMES[1:])]
    + [said([["n/a"] * 7] * 3), said([["1"]] * 3)],
)
def test_other_words_are_refused(text):
    with pytest.raises(profile.ProfilerError, match="ncu"):
        profile.parse(text)


def run_with(monkeypatch, tmp_path, script):
    """main with a GPU that is made up and an ncu that is a shell script."""
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\n{script}\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return profile.main(["--shape", "OPT-13B 32 x 1024", "--json", str(tmp_path / "out.json")])


def test_it_prints_what_ncu_said(monkeypatch, tmp_path, capsys):
    (tmp_path / "said").write_text(said(ROWS))
    assert run_with(monkeypatch, tmp_path, f"cat {tmp_path}/said") == 0
    out = capsys.readouterr().out
    assert "consecutive" in out and "88.2" in out
    (table,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    live = profile.SHAPES["OPT-13B 32 x 1024"].live_bytes
    assert [(row["case"], row["us"], row["read_over_live"]) for row in table["rows"]] == [
        ("random", 2.0, 8000.5 / live),
        ("consecutive", 1.5, 8000 / live),
        ("read", 1.0, 1 / live),
    ]


def test_random_blocks_are_launched_first_then_consecutive_ones_then_a_read(monkeypatch):
    kernels = pytest.importorskip("paged_attention_triton", exc_type=ImportError)
    import read_only  # needs triton as well

    launches = []
    attend = lambda q, k, v, tables, lens, plan: launches.append(tables.clone())  # noqa: E731
    monkeypatch.setattr(kernels, "paged_attention_kernel", attend)
    monkeypatch.setattr(read_only, "read_bytes", lambda source, *_: launches.append(source.nbytes))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    shape = profile.SHAPES["OPT-13B 32 x 1024"].__class__(4, 2, (100, 17, 48))
    monkeypatch.setitem(profile.SHAPES, "tiny", shape)
    monkeypatch.setattr(profile, "Data", lambda shape: bench_attention.Data(shape, "cpu"))
    profile.launch("tiny")
    random, ordered, count = launches
    assert ordered.tolist() == [[0, 1, 2, 3, 4, 5, 6], [7, 8, *[0] * 5], [9, 10, 11, *[0] * 4]]
    live = [*random[0].tolist(), *random[1, :2].tolist(), *random[2, :3].tolist()]
    assert len(set(live)) == 12 and live != sorted(live)
    assert count == shape.live_bytes


def test_an_ncu_that_fails_is_one_line(monkeypatch, tmp_path, capsys):
    assert run_with(monkeypatch, tmp_path, "echo ERR_NVGPUCTRPERM; exit 3") == 2
    error = capsys.readouterr().err
    assert error == "profile_attention.py: error: ncu ended with 3: ERR_NVGPUCTRPERM\n"
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("script", [bench_attention, bench_paging_cost, profile])
def test_no_gpu_is_one_line(script, monkeypatch, tmp_path, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(script, "--json", tmp_path / "out.json") == "needs a CUDA device\n"
    assert not list(tmp_path.iterdir())


def test_no_ncu_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profile.main([]) == 2
    assert "there is no ncu on the PATH" in capsys.readouterr().err
