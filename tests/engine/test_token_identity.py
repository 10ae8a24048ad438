"""The tokens that transformers' generate() gives on blocks are those of its own cache.

In float32 on a CPU, the pool full of NaN wherever no token is, the manager's invariants recomputed
in every forward.
"""

import pytest
import torch

pytest.importorskip("transformers")

from small_models import FAMILIES, on_its_own, prompts, small

from vllm_sim.engine.block_cache import CACHE
from vllm_sim.engine.paged_cache import PagedCache

NUM_BLOCKS, NEW_TOKENS = 400, 14
DECODING = {
    "greedy": {"do_sample": False},
    "4 samples": {"do_sample": True, "num_return_sequences": 4, "top_k": 0},
    "4 beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 4},
    "6 beams": {"do_sample": False, "num_beams": 6},
}
PROMPTS = {
    "one prompt": prompts([9]),
    "three, left-padded": prompts([11, 3, 8]),
    "one behind padding": prompts([6], pad_to=13),
}


def width(options):
    return max(options.get("num_beams", 1), options.get("num_return_sequences", 1))


def generate(model, inputs, options, cache=None, **more):
    """The tokens; with a cache on blocks, without one on the library's own."""
    if cache is None:
        on_its_own(model)
    else:
        more[CACHE] = cache
    torch.manual_seed(1)
    more = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, **options, **more}
    return model.generate(**inputs, **more).tolist()


def paged(model, **options):
    checked = options.pop("on_step", lambda cache: cache.manager.check_invariants())
    options = {"num_blocks": NUM_BLOCKS, "block_size": 4, "poison": True, **options}
    return PagedCache(model, on_step=checked, **options)


@pytest.mark.parametrize("given", PROMPTS)
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_librarys_own_cache(family, decoding, given):
    model, options, inputs = small(family), DECODING[decoding], PROMPTS[given]
    expected = generate(model, inputs, options)
    cache = paged(model, width=width(options))
    assert generate(model, inputs, options, cache) == expected
    cache.reset()
    cache.manager.check_invariants()
    assert cache.manager.num_free_blocks == NUM_BLOCKS
