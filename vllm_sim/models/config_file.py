"""A Hugging Face `config.json`, read with care.

Reproduces nothing. transformers_model.py and quantisation.py ask a `Config` for what they need;
what is missing or no number is refused by name, in one line. The file is text that anybody may have
written: its size is bounded, and so is each number in it.

    config = read_config("Llama-3-8B/config.json")
    config.count("num_hidden_layers", "n_layer")
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_sim.reporting.files import read_bounded

MAX_BYTES = 4 * 2**20
MAX_COUNT = 10**8  # of anything: no dimension of a model comes near


class ConfigError(ValueError):
    """A configuration cannot be sized; the message is one line that names file and reason."""


@dataclass(frozen=True)
class Config:
    """One JSON object of a configuration, and where it is: 'a.json' or 'a.json text_config'."""

    where: str
    values: Mapping[str, object]

    def fail(self, reason: str) -> ConfigError:
        """The error to raise; `reason` names the key."""
        return ConfigError(f"{self.where}: {reason}")

    def has(self, name: str) -> bool:
        """Whether a key is there and not null."""
        return self.values.get(name) is not None

    def optional(self, *names: str, least: int = 1) -> int | None:
        """The first of these keys that is there, a whole number; None if none is."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise self.fail(f"{name} must be a whole number, not {_shown(value)}")
            if not least <= value <= MAX_COUNT:
                raise self.fail(f"{name} must be {least} to {MAX_COUNT}, not {_shown(value)}")
            return value
        return None

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The same, but ConfigError without any of them and without a default."""
        value = self.optional(*names, least=least)
        if value is None:
            value = default
        if value is None:
            other = f" (or {', '.join(names[1:])})" if names[1:] else ""
            raise self.fail(f"has no {names[0]}{other}, so the model cannot be sized")
        return value

    def _typed(self, name: str, kind: type, what: str, default: object = None):
        """A key of that type, the default if it is not there; ConfigError says what it must be."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.fail(f"{name} must be {what}, not {_shown(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A key that is true or false."""
        return self._typed(name, bool, "true or false", default)

    def text(self, name: str) -> str:
        """A key that is text; '' if it is not there."""
        return self._typed(name, str, "text", "")

    def list(self, name: str) -> list:
        """A key that is a list; [] if it is not there."""
        return self._typed(name, list, "a list", [])

    def section(self, name: str) -> Config | None:
        """A key that is an object; None if it is not there."""
        value = self._typed(name, dict, "an object")
        return None if value is None else Config(f"{self.where} {name}", value)


def _shown(value: object) -> str:
    """A value as JSON, short."""
    if isinstance(value, int) and abs(value) > 10**40:  # too long to turn into digits
        return "a number of many digits"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def read_config(path: str | os.PathLike[str]) -> Config:
    """The object in a file. Raises ConfigError for what cannot be read or is no JSON object."""
    where = os.fspath(path)
    try:
        text = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{where}: cannot be read: {error}") from None
    if text is None:
        raise ConfigError(f"{where}: larger than {MAX_BYTES >> 20} MiB, so no config.json")
    try:
        values = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not a JSON file, it is not text") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits; nested too deeply
        raise ConfigError(f"{where}: not JSON that a configuration could be") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: holds no JSON object, so no config.json")
    return Config(where, values)
