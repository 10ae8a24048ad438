"""What `--json` of every script writes: one envelope (docs/json.md, docs/schema.json).

Reproduces nothing. A document says which script wrote it, with which options, seeds and versions,
and holds tables (an id, a title, rows under keys that stay), checks and the exit code.

    write_json(path, document("main.py", vars(args), seeds=[0], setting={...}, tables=[...],
                              exit_code=0, elapsed_s=10.2))
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

# The number goes up when a key loses its meaning or goes; a new key or table is no new version.
SCHEMA = "pagedattention-sim/1"
PACKAGES = ("torch", "numpy", "triton", "flashinfer-python", "nvidia-cudnn-cu13")
# Options that say where output goes and how it looks, not what is found.
PRESENTATION = frozenset({"json", "figures", "timeline", "format", "quiet", "jobs"})
Json = dict[str, object]


def document(
    script: str,
    options: Mapping[str, object],
    *,
    seeds: Sequence[int] = (),
    setting: Mapping[str, object],
    tables: Sequence[Mapping[str, object]],
    checks: Sequence[Mapping[str, object]] = (),
    exit_code: int,
    elapsed_s: float,
    **more: object,
) -> Json:
    """One document. `script` is its path from the root, `options` are argparse's, `elapsed_s` is in
    seconds; `more` are keys that one script alone has. ValueError for two tables of one id."""
    ids = [table["id"] for table in tables]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{script}: two tables have one id: {sorted(map(str, ids))}")
    return {
        "schema": SCHEMA,
        "script": script,
        "options": told(options),
        "seeds": list(seeds),
        "versions": versions(),
        "setting": dict(setting),
        **more,
        "tables": list(tables),
        "checks": list(checks),
        "exit_code": exit_code,
        "elapsed_s": round(elapsed_s, 3),
    }


def told(options: Mapping[str, object]) -> Json:
    """The options that decide what is found, as JSON; None is an option that was not given."""
    return {name: _plain(value) for name, value in options.items() if name not in PRESENTATION}


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return str(value) if isinstance(value, Path) else value


def rows_table(name: str, title: str, rows: Sequence[Mapping[str, object]], index: int = 1) -> Json:
    """A table of rows that have their keys already, a benchmark's mostly. Keys may differ."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "id": name,
        "title": title,
        "setting": "",
        "headers": keys,
        "index": keys[:index],
        "rows": [dict(row) for row in rows],
    }


def measured(
    script: str,
    options: Mapping[str, object],
    found: Mapping[str, object],
    index: Mapping[str, int],
    exit_code: int,
    elapsed_s: float,
) -> Json:
    """A benchmark's document: lists of rows in `found` become tables, all else the setting.

    `index` has the ids of the tables with the number of columns that say which row it is.
    """
    tables = [rows_table(name, name, found[name], n) for name, n in index.items() if name in found]
    setting = {key: value for key, value in found.items() if key not in index}
    return document(
        script,
        options,
        seeds=[0],
        setting=setting,
        tables=tables,
        exit_code=exit_code,
        elapsed_s=elapsed_s,
    )


def versions() -> dict[str, str]:
    """Python and the packages that matter, where installed."""
    from importlib import metadata  # takes a while, and only --json asks

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
