"""drawing.py: `--figures` of every command, where no picture could be drawn or written.

Only the first tests run where there is no matplotlib.
"""

import os
import sys
from importlib.util import find_spec

import pytest

import capacity
import main
import reproduce
from vllm_sim.evaluation import runner
from vllm_sim.reporting import drawing
from vllm_sim.reporting.files import OutputError
from vllm_sim.scenarios import run as scenario_run
from vllm_sim.sizing import answers

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="no matplotlib")
not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
SCRIPTS = {
    main: ["--model", "opt-125m", "--device", "cpu", "--num-blocks", "140"],
    reproduce: ["--figure", "2"],
    capacity: [],
}
BAD = (
    (main, ["--device", "cpu", "--num-blocks", "3"]),
    (reproduce, ["--lengths", "none.csv"]),
    (capacity, ["--model", "none.json"]),
    (capacity, ["--trace", "none.csv"]),
)


@pytest.fixture
def early(monkeypatch, refused):
    """Why a script refuses its arguments, before it has run anything."""
    for module, name in ((scenario_run, "run_one"), (runner, "reproduce"), (answers, "survey")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("ran"))
    return lambda script, *args: refused(script, *SCRIPTS[script], *args, "--quiet")


@pytest.mark.parametrize("script", SCRIPTS)
def test_missing_matplotlib_is_told_before_anything_runs(script, early, monkeypatch, tmp_path):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    told = early(script, "--figures", tmp_path / "new")
    reason = "matplotlib is not installed (it is in requirements-dev.txt)"
    assert told == f"cannot draw figures: {reason}\n" and os.listdir(tmp_path) == []


@pytest.mark.parametrize("room", ["scenarios", "evaluation", "sizing"])
def test_modules_need_no_matplotlib(room, run_script):
    code = "import sys; sys.modules['matplotlib'] = None; import vllm_sim."
    done = run_script("-c", f"{code}{room}.pictures")
    assert (done.returncode, done.stderr) == (0, "")


@needs_matplotlib
@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_cannot_be_is_told_before_anything_runs(script, name, early, tmp_path):
    (tmp_path / "file").write_text("old")
    assert early(script, "--figures", tmp_path / name).startswith("cannot make ")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


@needs_matplotlib
@pytest.mark.parametrize("name", ["memory_bars.png", "fig2.png", "capacity_slots.png"])
def test_a_picture_that_cannot_be_written_is_told_before_anything_runs(name, early, tmp_path):
    (script,) = [one for one, start in zip(SCRIPTS, ("m", "f", "c")) if name.startswith(start)]
    (tmp_path / name).mkdir()
    told = early(script, "--figures", tmp_path)
    assert told.endswith(f"{name}: it is a directory\n") and os.listdir(tmp_path) == [name]


@needs_matplotlib
@not_as_root
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o500)
    try:
        for directory in (tmp_path, tmp_path / "below"):
            with pytest.raises(OutputError, match=r"(?i)permission denied") as error:
                drawing.check_folder(directory, ["fig2.png"])
            assert "\n" not in str(error.value)
    finally:
        tmp_path.chmod(0o700)


@needs_matplotlib
@pytest.mark.parametrize(("script", "given"), BAD)
def test_bad_input_makes_no_folder(script, given, early, tmp_path):
    early(script, *given, "--figures", tmp_path / "new")
    assert os.listdir(tmp_path) == []


@needs_matplotlib
def test_a_failed_write_leaves_the_old_picture(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    (tmp_path / "one.png").write_text("old")
    with pytest.raises(OutputError, match="No space left"):
        drawing.save({"one.png": lambda: drawing.sheet("a title", 1)[0]}, tmp_path)
    assert os.listdir(tmp_path) == ["one.png"] and (tmp_path / "one.png").read_text() == "old"
