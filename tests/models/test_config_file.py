"""Reading a config.json: what is no configuration, and each number and type in it."""

import io
import json
import os

import pytest

from vllm_sim.models import load_model
from vllm_sim.models.config_file import MAX_BYTES, Config, ConfigError, read_config
from vllm_sim.reporting import files

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 9}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b"[1, 2]", "holds no JSON object"),
        (b"\xff\xfe\x00", "not a JSON file, it is not text"),
        (b"[" * 200_000, "not JSON that a configuration could be"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not JSON that a configuration could be"),
        (b" " * (MAX_BYTES + 1), "larger than 4 MiB"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as info:
        load_model(str(path))
    assert str(info.value).startswith(f"{path}: ") and said in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.json", "No such file or directory"),
        (".", "Is a directory"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(name, said, tmp_path):
    path = f"{tmp_path}/{name}"
    with pytest.raises(ConfigError) as info:
        read_config(path)
    assert str(info.value) == f"{path}: cannot be read: {said}"


class MadeUp(io.BytesIO):
    """A file that the system makes up as it is read: its size says nothing."""

    def fileno(self):
        return os.open(os.devnull, os.O_RDONLY)


@pytest.mark.parametrize(("length", "found"), [(4, b"xxxx"), (5, None), (10**6, None)])
def test_a_file_without_a_size_is_not_read_to_its_end(monkeypatch, length, found):
    there = MadeUp(b"x" * length)
    monkeypatch.setattr(files, "open_input", lambda _: there)
    monkeypatch.setattr(there, "close", lambda: None)
    assert files.read_bounded("a", 4) == found
    assert there.tell() <= 5


def test_a_file_that_would_have_to_be_waited_for_is_refused(monkeypatch):
    """As the kernel's log, which is a regular file and may have nothing yet."""
    there = MadeUp(b"")
    monkeypatch.setattr(there, "read", lambda _: None)
    monkeypatch.setattr(files, "open_input", lambda _: there)
    with pytest.raises(ConfigError, match="a: cannot be read: it would have to be waited for"):
        read_config("a")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    """Opening a pipe that nobody writes to would never return."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 2**40)
    for name, said in (("pipe", "nothing comes through"), ("hole", "larger than 4 MiB")):
        with pytest.raises(ConfigError, match=said):
            load_model(str(tmp_path / name))
    with pytest.raises(ConfigError, match="not a regular file"):
        read_config("/dev/zero")


def test_every_truncation_of_a_configuration_is_refused(tmp_path):
    text = json.dumps(LLAMA)
    path = tmp_path / "config.json"
    for length in range(len(text)):
        path.write_text(text[:length])
        with pytest.raises(ConfigError, match="not JSON"):
            read_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())  # a mark that Windows puts first
    assert read_config(path).values == LLAMA


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-2, "n must be 1 to 100000000, not -2"),
        (0, "n must be 1 to 100000000, not 0"),
        (10**8 + 1, "n must be 1 to 100000000, not 100000001"),
        (1 << 9999, "n must be 1 to 100000000, not a number of many digits"),
        (32.0, "n must be a whole number, not 32.0"),
        ("32", 'n must be a whole number, not "32"'),
        (True, "n must be a whole number, not true"),
        ([32], "n must be a whole number, not [32]"),
        (float("nan"), "n must be a whole number, not NaN"),
        ("x" * 99, 'n must be a whole number, not "' + "x" * 36 + "..."),
    ],
)
def test_a_value_that_is_no_count_is_named(value, said):
    for asked in (("n",), ("m", "n")):
        with pytest.raises(ConfigError) as info:
            Config("a.json", {"m": None, "n": value}).count(*asked)
        assert str(info.value) == f"a.json: {said}"


def test_the_first_key_that_is_there_counts():
    config = Config("a.json", {"a": None, "b": 3, "c": 5})
    assert config.count("a", "b", "c") == 3 and config.count("none", default=7) == 7
    assert config.optional("a", "none") is None and config.optional("z", least=-1) is None
    assert Config("a.json", {"g": -1}).optional("g", least=-1) == -1
    assert config.has("b") and not config.has("a")
    with pytest.raises(ConfigError, match=r"a\.json: has no a \(or d\), so the model cannot"):
        config.count("a", "d")


@pytest.mark.parametrize(
    ("read", "sound", "default", "what"),
    [
        (lambda config: config.flag("n", True), False, True, "true or false"),
        (lambda config: config.text("n"), "x", "", "text"),
        (lambda config: config.list("n"), [1], [], "a list"),
        (lambda config: config.section("n"), Config("a.json n", {"k": 1}), None, "an object"),
    ],
)
def test_a_value_of_another_type_is_named(read, sound, default, what):
    stored = sound.values if isinstance(sound, Config) else sound
    assert read(Config("a.json", {"n": stored})) == sound
    assert read(Config("a.json", {"n": None})) == read(Config("a.json", {})) == default
    for other in (False, "x", [1], {"k": 1}, 7):
        if type(other) is not type(stored):
            with pytest.raises(ConfigError, match=f"a.json: n must be {what}, not "):
                read(Config("a.json", {"n": other}))
