"""files.py: a file is written whole or not at all, and refused before the work if it cannot be."""

import json
import os
import stat

import pytest

from vllm_sim.reporting.files import OutputError, check_writable, write_json

not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


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
