"""Put the committed results into README.md and docs/*.md, between their markers.

    python tools/update_readme.py            # rewrite them from results/
    python tools/update_readme.py --check    # exit 1 if that would change one

A marker pair is `<!-- result: NAME -->` ... `<!-- end -->`; NAME is a function of the blocks below,
a word behind it its argument. What has not been recorded yet leaves nothing between its markers.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import figure_blocks as f
import hunt_blocks as h
import json_blocks as j
import reliability_blocks as r
import scenario_blocks as s
import speed_blocks as v
from committed import ROOT, machine

from vllm_sim.reporting.command_line import OneLineParser, UsageError, exit_code
from vllm_sim.scenarios.report import write_whole

BLOCK = re.compile(r"(<!-- result: (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
PARTS = {
    part.__name__: part
    for part in (
        machine,
        s.quickstart,
        s.tail,
        s.answers,
        s.scenarios,
        s.checks,
        f.headline,
        f.ratios,
        f.figures,
        f.rows,
        f.seeds,
        f.differences,
        f.explained,
        f.beams_hour,
        f.beam_step,
        v.serving,
        v.manager,
        v.gpu,
        v.gpu_attention,
        v.gpu_aims,
        v.gpu_gaps,
        v.gpu_others,
        v.gpu_profile,
        v.gpu_paging,
        j.envelope,
        j.keys,
        s.sweep,
        h.hunts,
        h.small,
        h.coverage,
        h.reliability,
        r.mutants,
        r.survivors,
    )
}


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def from_docs(text: str) -> str:
    """Links as a file of docs/ must write them; the blocks write them as README.md does."""
    return text.replace("](docs/", "](").replace("](results/", "](../results/")


def updated(path: Path) -> str:
    """The text of a document with its blocks made anew. Raises UsageError."""

    def block(match: re.Match[str]) -> str:
        text = made(match[2], *([match[3]] if match[3] else []))
        text = from_docs(text) if path.parent.name == "docs" else text
        return match[1] + (text + "\n" if text else "") + match[4]

    try:
        old = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    return BLOCK.sub(block, old)


def made(name: str, *words: str) -> str:
    """What stands between the markers of this name. Raises UsageError."""
    try:
        return PARTS[name](*words)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"the results do not give the part {name}: {what}") from None


def main(argv: list[str] | None = None) -> int:
    """0, 1 if --check finds a difference, or 2 with one line on stderr."""
    return exit_code("update_readme.py", partial(parse_and_update, argv))


def parse_and_update(argv: list[str] | None) -> int:
    """All texts are made before the first is written. Raises UsageError."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(argv)
    texts = {path: updated(path) for path in documents()}
    changed = {p: new for p, new in texts.items() if new != p.read_text(encoding="utf-8")}
    if args.check:
        return int(bool(changed))
    for path, text in changed.items():
        write_whole(path, text.encode("utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
