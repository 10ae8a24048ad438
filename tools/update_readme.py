"""Put the committed results into README.md and docs/*.md, between their markers.

    python tools/update_readme.py            # rewrite them from results/
    python tools/update_readme.py --check    # exit 1 if that would change one

A marker pair is `<!-- result: NAME -->` ... `<!-- end -->`; NAME is a function of the blocks below,
a word behind it its argument. What has not been recorded yet leaves nothing between its markers.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import figure_blocks as f
import scenario_blocks as s
import speed_blocks as v
from committed import ROOT, machine

BLOCK = re.compile(r"(<!-- result: (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
PARTS = {
    part.__name__: part
    for part in (
        machine, s.quickstart, s.tail, s.answers, s.scenarios, s.checks,
        f.headline, f.ratios, f.figures, f.rows, f.seeds, f.differences, f.explained,
        f.beams_hour, f.beam_step, v.serving, v.manager, v.gpu, v.gpu_attention, v.gpu_paging,
    )
}  # fmt: skip


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def from_docs(text: str) -> str:
    """Links as a file of docs/ must write them; the blocks write them as README.md does."""
    return text.replace("](docs/", "](").replace("](results/", "](../results/")


def updated(path: Path) -> str:
    """The text of a document with its blocks made anew. KeyError for a block that is unknown."""

    def block(match: re.Match[str]) -> str:
        text = PARTS[match[2]](*([match[3]] if match[3] else []))
        text = from_docs(text) if path.parent.name == "docs" else text
        return match[1] + (text + "\n" if text else "") + match[4]

    return BLOCK.sub(block, path.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    changed = False
    for path in documents():
        new = updated(path)
        changed |= new != path.read_text(encoding="utf-8")
        if not args.check:
            path.write_text(new, encoding="utf-8")
    return int(changed and args.check)


if __name__ == "__main__":
    sys.exit(main())
