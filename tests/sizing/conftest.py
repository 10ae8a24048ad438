"""What the tests of capacity.py share: configurations to size, and cases without a run."""

import json

import pytest
from published_models import PUBLISHED

from vllm_sim.sizing.case import make_case
from vllm_sim.sizing.options import build_parser


@pytest.fixture
def config(tmp_path):
    """config(name, **changes) writes a published configuration and returns its path."""

    def write(name, **changes):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(PUBLISHED[name][1] | changes))
        return str(path)

    return write


@pytest.fixture(scope="session")
def case_of():
    """case_of("--gpu", "h100") is the case of these options."""
    return lambda *args: make_case(build_parser().parse_args([*map(str, args)]))
