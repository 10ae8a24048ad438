"""One page that plays recorded runs back, block by block, in any browser and without a network.

Reproduces nothing by itself: it shows sections 4.3 to 4.5 happen (blocks on demand, copy-on-write,
beams that move, preemption) in recorded runs, as recorder.py saw them.

    python main.py --scenario 4 --timeline run.html
    python generate.py --beams 4 --timeline run.html

The page is the files of timeline_page/ in one, with the recordings as JSON in it: their frames are
recorder.Frame. It asks for nothing from outside, and says so to the browser (its content security
policy).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vllm_sim.playback.recorder import Recording
from vllm_sim.reporting.command_line import UsageError
from vllm_sim.reporting.files import check_writable, write_whole

FORMAT = 2  # of the data in the page
MAX_BLOCKS = 4096  # of a pool: a page of more is slow to watch, and its data grows with the pool
PARTS = Path(__file__).resolve().parent / "timeline_page"


def check(path: Path, num_blocks: int) -> None:
    """UsageError unless a timeline of a pool of so many blocks can be written there."""
    if num_blocks > MAX_BLOCKS:
        raise UsageError(
            f"--timeline: {num_blocks:,} blocks are too many to watch, at most {MAX_BLOCKS:,}; "
            "lower --num-blocks"
        )
    check_writable(path)


def write(path: Path, setting: str, recordings: Iterable[Recording]) -> None:
    """Write the page, whole or not at all. Raises OutputError."""
    write_whole(path, page(setting, recordings).encode("ascii"))


def page(setting: str, recordings: Iterable[Recording]) -> str:
    """The whole page; ASCII. `setting` is the line that is printed above tables."""
    runs = [recording.to_json() for recording in recordings]
    data = {"format": FORMAT, "setting": setting, "runs": runs}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")  # or a name could end the script element
    html = (PARTS / "page.html").read_text(encoding="ascii")
    files = (PARTS / name for name in ("style.css", "replay.js", "view.js", "controls.js"))
    contents = {file.stem: file.read_text(encoding="ascii") for file in files}
    for mark, content in (*contents.items(), ("data", text)):  # last: nothing in it is a mark
        before, found, after = html.partition(f"/* {mark} */")
        assert found, f"timeline_page/page.html has no {mark}"
        html = before + content + after
    return html
