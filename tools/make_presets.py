"""Write vllm_sim/models/presets.json: today's models, as the library reads their configurations.

    python tools/make_presets.py                # from tests/models/published_models.jsonl

Reproduces nothing. A test fails if the file is not what this writes (tests/models/test_presets.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_sim.models.config_file import Config
from vllm_sim.models.quantisation import read_quantisation
from vllm_sim.models.transformers_model import read_model

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "tests" / "models" / "published_models.jsonl"
PRESETS = ROOT / "vllm_sim" / "models" / "presets.json"


def presets() -> Iterator[dict[str, object]]:
    """Each as JSON has it, in the order of the file."""
    for line in PUBLISHED.read_text(encoding="ascii").splitlines():
        found = json.loads(line)
        if "preset" in found:
            config = Config(found["name"], found["config"])
            model = read_model(config, found["preset"], read_quantisation(config))
            yield json.loads(json.dumps(asdict(model)))


def main() -> int:
    """A line for each."""
    lines = ",\n".join(json.dumps(preset) for preset in presets())
    PRESETS.write_text(f"[\n{lines}\n]\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
