"""What docs/json.md shows of docs/schema.json, for tools/update_readme.py.

Reproduces nothing. `envelope` are the keys of every document, of a table and of a check; `keys
main` the setting and the tables of one script, which is named without its folder.
"""

from __future__ import annotations

import json

from committed import ROOT, table

from vllm_sim.reporting.command_line import UsageError

COLUMNS = ("key", "type", "unit", "meaning")


def schema() -> dict:
    """docs/schema.json. Raises UsageError."""
    try:
        return json.loads((ROOT / "docs" / "schema.json").read_text(encoding="ascii"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"docs/schema.json cannot be read: {error}") from None


def type_of(found: dict) -> str:
    """In words: integer or null, one of, list of."""
    if "const" in found:
        return f"`{json.dumps(found['const'])}`"
    if "enum" in found and len(found["enum"]) > 3:
        return "string"
    if "enum" in found:
        return " or ".join(f"`{json.dumps(one)}`" for one in found["enum"])
    if found.get("type") == "array":
        kind = found["items"].get("type", "object")
        return f"list of {kind}s" if isinstance(kind, str) else "list"
    kinds = found["type"]
    return kinds if isinstance(kinds, str) else " or ".join(kinds)


def rows(properties: dict, required: list[str], lead: str = "") -> list[tuple[str, str, str, str]]:
    """A line for each key; one that may be missing says so."""
    return [
        (
            f"`{lead}{key}`",
            type_of(found) + ("" if key in required else ", or left out"),
            found.get("unit", ""),
            found.get("description", ""),
        )
        for key, found in properties.items()
    ]


def envelope() -> str:
    """The keys that every document has."""
    whole = schema()
    body = rows(whole["properties"], whole["required"])
    for lead, name in (("tables[].", "table"), ("checks[].", "check")):
        found = whole["$defs"][name]
        body += rows(found["properties"], found["required"], lead)
    return table(COLUMNS, body)


def keys(name: str) -> str:
    """What one script has beyond that: its setting, keys of its own, and each table."""
    scripts = {key.split(".")[-2]: key for key in schema()["$defs"] if key.endswith(".py")}
    found = schema()["$defs"][scripts[name]]
    own = {
        key: value
        for key, value in found["properties"].items()
        if key not in ("script", "setting", "tables")
    }
    setting = found["properties"]["setting"]
    body = rows(setting["properties"], setting["required"], "setting.")
    for key, value in own.items():
        body += rows({key: value}, found["required"])
        if "properties" in value["items"]:
            body += rows(value["items"]["properties"], value["items"]["required"], f"{key}[].")
    parts = [table(COLUMNS, body)]
    for id_, one in found["$defs"].items():
        row = one["properties"]["rows"]["items"]
        also = {key: one["properties"][key] for key in one.get("required", [])}
        shown = rows(row["properties"], row["required"])
        for pattern in row.get("patternProperties", {}).values():
            shown.append(
                (
                    pattern["description"].partition(":")[0].split(",")[0],
                    pattern["type"],
                    pattern.get("unit", ""),
                    pattern["description"],
                )
            )
        beside = "".join(
            f"; beside its rows `{key}`, {value['description']}" for key, value in also.items()
        )
        parts += [f"`{id_}`: {one['description']}{beside}", table(COLUMNS, shown)]
    return "\n\n".join(parts)
