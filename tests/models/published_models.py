"""Configurations of well-known models as published, and the parameters their makers count.

The values in published_models.jsonl are those of each model's config.json, as far as sizes depend
on them; the counts are those of the checkpoints' tensors (a tied output head counted once).
DeepSeek-V3's is without the layers that predict further tokens.
"""

import json
from pathlib import Path

LINES = Path(__file__).with_suffix(".jsonl").read_text(encoding="ascii").splitlines()
PUBLISHED = {  # name -> (parameters, config.json)
    found["name"]: (found["parameters"], found["config"]) for found in map(json.loads, LINES)
}
