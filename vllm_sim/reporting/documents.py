"""What `--json` of every script writes: one envelope around its tables (docs/json.md).

write_json(path, document("main.py", vars(args), seeds=[0], setting={...}, tables=[...],
                          exit_code=0, elapsed_s=10.2))
"""

import json
import platform
from contextlib import suppress
from importlib import metadata

Json = dict[str, object]
SCHEMA = "pagedattention-sim/1"  # the number goes up when a key goes or changes its meaning
PACKAGES = ("torch", "numpy", "triton", "flashinfer-python", "nvidia-cudnn-cu13")
# Options that say where output goes and how it looks, not what is found.
PRESENTATION = {"json", "figures", "timeline", "format", "quiet", "jobs"}


def document(script: str, options: Json, *, elapsed_s: float, **found: object) -> Json:
    """One document. `script` is its path from the root, `options` are argparse's; `found` has
    setting, tables, exit_code, seeds and checks if there are any, and keys of this script alone.
    """
    ids = [table["id"] for table in found["tables"]]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{script}: two tables have one id: {sorted(map(str, ids))}")
    head = {"schema": SCHEMA, "script": script, "options": told(options), "versions": versions()}
    lists = {key: [*found.get(key, ())] for key in ("seeds", "tables", "checks")}
    return {**head, **found, **lists, "elapsed_s": round(elapsed_s, 3)}


def told(options: Json) -> Json:
    """The options that decide what is found, as JSON; None is an option that was not given."""
    kept = {name: value for name, value in options.items() if name not in PRESENTATION}
    # A path is its name, and infinity, which JSON has not, the text inf.
    return json.loads(json.dumps(kept, default=str), parse_constant=lambda one: str(float(one)))


def rows_table(name: str, title: str, rows: list[Json], index: int = 1) -> Json:
    """A table of rows that have their keys already, and perhaps not all the same."""
    keys = [*dict.fromkeys(key for row in rows for key in row)]
    table = {"id": name, "title": title, "setting": "", "headers": keys, "index": keys[:index]}
    return {**table, "rows": [*rows]}


def measured(script: str, options: Json, found: Json, index: Json, code: int, took: float) -> Json:
    """A benchmark's document, which took so many seconds: what `index` names are tables, with the
    number of columns that say which row it is; the rest is the setting."""
    tables = [rows_table(name, name, found[name], n) for name, n in index.items() if name in found]
    rest = {key: value for key, value in found.items() if key not in index}
    what = {"seeds": [0], "setting": rest, "tables": tables, "exit_code": code}
    return document(script, options, elapsed_s=took, **what)


def versions() -> dict[str, str]:
    """Python and the packages that matter, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
