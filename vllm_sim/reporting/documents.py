"""What `--json` of every script writes, and reading it: one envelope around tables (docs/json.md).

write_json(path, document("main.py", vars(args), seeds=[0], setting={...}, tables=[...],
                          exit_code=0, elapsed_s=10.2))
"""

import json
import platform
import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.files import read_bounded
from vllm_sim.reporting.tables import Cell, counted

Json = dict[str, object]
SCHEMA = "pagedattention-sim/2"  # the number goes up when a key goes or changes its meaning
PACKAGES = ("torch", "numpy", "triton", "transformers", "flashinfer-python", "nvidia-cudnn-cu13")
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


@dataclass(frozen=True)
class Run:
    """What counts of one document."""

    path: Path = field(compare=False)
    script: str
    options: Json
    code: int
    told: str  # what became of it
    figures: dict[tuple[str, str, str], float]  # every number, by table, row and column
    listed: list["Run"]  # a sweep's cells, each as it is if its file is missing

    def chosen(self, names: list[str]) -> tuple[Cell, ...]:
        return tuple(ascii_cell(self.options.get(name)) for name in names)


def read_run(path: Path) -> Run:
    """One document. UsageError names the file that cannot be read, or is not what --json writes."""
    figures, listed = {}, []
    try:
        if (data := read_bounded(path, 64 << 20)) is None:
            raise ValueError("more than 64 MiB")
        found = json.loads(data, parse_int=_finite, parse_float=_finite, parse_constant=_finite)
        if found["schema"] != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        for table, row in [(one, row) for one in found["tables"] for row in one["rows"]]:
            which = ", ".join(str(ascii_cell(row[key])) for key in table["index"])
            for column in [key for key in row if key not in table["index"]]:
                where = str(ascii_cell(table["id"])), which, str(ascii_cell(column))
                if where in figures:
                    raise ValueError(f"two rows of table {where[0]} are one")
                if type(row[column]) in (int, float):
                    figures[where] = row[column]
            if found["script"] == "sweep.py":
                cell = path.parent / Path(row["file"]).name  # which leads nowhere else
                of, missing = str(found["setting"]["script"]), shlex.join(row["arguments"])
                listed.append(Run(cell, of, {**row["options"]}, 2, f"missing: {missing}", {}, []))
        failed = [f"{one['name']} ({one['detail']})" for one in found["checks"] if not one["ok"]]
        told = f"failed: {'; '.join(failed) or 'a check'}"
        if "error" in found:
            told = f"did not run: {found['error']}"
        if not (code := int(found["exit_code"] or bool(failed))):
            told = f"{counted(len(found['checks']), 'check')} held"
        return Run(path, str(found["script"]), {**found["options"]}, code, told, figures, listed)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not a document of --json: {reason}") from None


def _finite(text: str) -> int | float:
    if not abs(value := float(text)) <= 1e300:  # so that sums stay finite
        raise ValueError(f"{text[:40]} is no finite number")
    return int(text) if text.lstrip("-").isdigit() else value


def ascii_cell(value: object) -> Cell:
    """A value in a cell of ASCII."""
    if type(value) is int or value is None:
        return value
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if text.isascii() and text.isprintable() else ascii(text)
