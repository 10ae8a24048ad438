"""PagedCache in every way that generate() uses a cache, what it shares, and what it refuses."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from small_models import GROUPED, VOCAB, on_its_own, prompts, small
from test_token_identity import NEW_TOKENS, NUM_BLOCKS, generate, paged
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kv_cache_manager import OutOfBlocksError
from vllm_sim.engine.block_cache import CACHE, NAME
from vllm_sim.engine.paged_cache import PagedCache
from vllm_sim.engine.support import UnsupportedModelError, check_config, check_model

GREEDY = {"do_sample": False}
BEAMS = {"do_sample": False, "num_beams": 4}
SAMPLES = {"do_sample": True, "num_return_sequences": 4, "top_k": 0}
RAGGED = prompts([13, 3, 8])
MORE = {"max_new_tokens": 3}  # in the interpreter each takes seconds


def forward(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits


# ---- the ways of generate() -----------------------------------------------------------------


@pytest.mark.parametrize("decoding", [GREEDY, BEAMS, SAMPLES], ids=["greedy", "beams", "samples"])
@pytest.mark.parametrize("chunk", [1, 4, 5])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_a_prefill_in_chunks_also_where_padding_is_longer_than_one(family, chunk, decoding):
    model = small(family)
    expected = generate(model, RAGGED, decoding)  # the whole prompt at once
    rows = 1 if decoding is GREEDY else 4
    cache = paged(model, width=rows)
    found = generate(model, RAGGED, decoding, cache, prefill_chunk_size=chunk)
    assert found == expected


@pytest.mark.parametrize("decoding", [BEAMS, SAMPLES], ids=["beams", "samples"])
def test_filled_once_and_then_forked_it_goes_on_as_the_librarys_cache_does(decoding):
    model, ids = small("llama"), prompts([11])["input_ids"]

    def run(cache):
        forward(model, cache, ids[:, :-1])
        cache.batch_repeat_interleave(4)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.manual_seed(1)
        more = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, **decoding, CACHE: cache}
        return model.generate(**given, **more).tolist()

    on_its_own(model)
    expected = run(DynamicCache())
    cache = paged(model)
    assert run(cache) == expected
    assert cache.usage().physical_blocks < cache.usage().logical_blocks


def test_assisted_decoding_takes_tokens_back():
    model, assistant = small("llama"), copy.deepcopy(small("llama", num_hidden_layers=1))
    inputs, cropped = prompts([9]), []
    expected = generate(model, inputs, GREEDY)
    cache = paged(model)
    crop = cache.crop
    cache.crop = lambda count: (cropped.append(count), crop(count))
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        found = generate(model, inputs, GREEDY, cache, **options)
        assert found == expected
        cache.manager.check_invariants()
        cache.reset()
    assert min(cropped) < 0, "nothing was ever taken back"


def test_several_caches_of_one_model_do_not_mix():
    model, inputs = small("llama"), [prompts([7], seed=n)["input_ids"] for n in (3, 4)]
    caches = [paged(model), paged(model)]
    ours = [[], []]
    for at in range(7):  # in turn, token by token
        for ids, cache, logits in zip(inputs, caches, ours):
            logits.append(forward(model, cache, ids[:, at : at + 1])[:, -1])
    on_its_own(model)
    for ids, logits in zip(inputs, ours):
        want = forward(model, DynamicCache(), ids)[0]
        torch.testing.assert_close(torch.cat(logits), want, rtol=1e-4, atol=1e-4)


def test_a_conversation_goes_on_with_the_same_cache():
    model, ids = small("qwen2"), prompts([9])["input_ids"]

    def talk(cache):
        said = ids
        for _ in range(3):
            mask = torch.ones_like(said)
            more = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, CACHE: cache}
            said = model.generate(said, attention_mask=mask, do_sample=False, **more)
            said = torch.cat([said, ids[:, :3]], dim=1)
        return said.tolist()

    on_its_own(model)
    expected = talk(DynamicCache())
    assert talk(paged(model)) == expected


def test_rows_can_be_chosen_and_doubled():
    model = small("llama")
    inputs = prompts([9, 9, 9])

    def run(cache):
        forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
        cache.batch_select_indices(torch.tensor([2, 0, 2]))
        return forward(model, cache, torch.tensor([[5], [6], [7]]))[:, -1]

    on_its_own(model)
    expected = run(DynamicCache())
    cache = paged(model)
    torch.testing.assert_close(run(cache), expected, rtol=1e-4, atol=1e-4)
    cache.manager.check_invariants()
    assert len(cache.manager.running_ids) == 3
    assert cache.num_copies == 1  # the last block of the doubled row, for one of the two


def test_cropped_to_nothing_a_row_can_begin_again():
    model = small("llama")
    ids = prompts([6])["input_ids"]
    cache = paged(model)
    want = forward(model, cache, ids)
    cache.crop(0)
    cache.crop(-2)
    assert cache.get_seq_length() == 4 and cache.usage().logical_tokens == 4
    cache.crop(-4)
    assert cache.manager.running_ids == [] and cache.get_seq_length() == 0
    torch.testing.assert_close(forward(model, cache, ids), want, rtol=0, atol=0)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(1)


def test_the_models_own_attention_comes_back():
    model, inputs = small("llama"), prompts([9])
    expected = generate(model, inputs, GREEDY)
    generate(model, inputs, GREEDY, paged(model))
    assert generate(model, inputs, GREEDY) == expected


def test_bfloat16_is_within_the_error_that_the_librarys_own_cache_makes():
    model = copy.deepcopy(small("llama"))
    ids = prompts([30])["input_ids"]
    exact = forward(on_its_own(model), DynamicCache(), ids)
    half = copy.deepcopy(model).to(torch.bfloat16)
    own = (forward(on_its_own(half), DynamicCache(), ids).float() - exact).abs().max()
    ours = (forward(half, paged(half), ids).float() - exact).abs().max()
    assert ours <= 1.5 * own


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("gemma2", {"prefill_chunk_size": 5})]
)
def test_triton_gives_the_tokens_of_the_gather_kernel(family, options):
    """Gemma 2 has a window and a cap of its scores; chunks attend to those before."""
    pytest.importorskip("triton", exc_type=ImportError)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(small(family)).to(device)
    inputs, options = {name: x.to(device) for name, x in RAGGED.items()}, options | MORE
    found = [
        generate(model, inputs, BEAMS, paged(model, width=4, kernel=kernel), **options)
        for kernel in ("gather", "triton")
    ]
    assert found[0] == found[1]


# ---- what is shared ---------------------------------------------------------------------------


def test_a_prompt_is_stored_once_and_a_part_filled_block_copied_for_all_but_the_last():
    model, seen = small("llama"), []

    def watch(cache):
        seen.append((cache.usage().physical_blocks, len(cache.copies), len(cache.forked)))

    cache = paged(model, width=4, on_step=watch)
    generate(model, prompts([10]), SAMPLES, cache, max_new_tokens=4, min_new_tokens=4)
    # 10 tokens in blocks of 4: two full and one half; forked, three of four copy the half one;
    # the 13th token, the third that is stored, takes a block for each.
    assert seen == [(3, 0, 0), (6, 3, 3), (6, 0, 0), (10, 0, 0)]


def test_one_text_copies_nothing_and_padding_takes_no_slot():
    model = small("llama")
    cache = paged(model)
    generate(model, prompts([6], pad_to=50), GREEDY, cache, max_new_tokens=5, min_new_tokens=5)
    assert cache.num_copies == 0
    assert cache.usage().tokens == cache.usage().logical_tokens == 6 + 4


def test_beams_take_fewer_blocks_than_they_hold():
    model = small("llama")
    cache = paged(model, width=4)
    generate(model, prompts([21]), BEAMS, cache, max_new_tokens=30, min_new_tokens=30)
    usage = cache.usage()
    assert usage.logical_blocks == 4 * 13 and usage.physical_blocks < 0.7 * usage.logical_blocks


# ---- what is refused ----------------------------------------------------------------------------


def test_a_pool_that_is_too_small_changes_nothing():
    model = small("llama")
    cache = paged(model, num_blocks=3)
    with pytest.raises(OutOfBlocksError, match="a forward needs 4 blocks, 3 are free"):
        forward(model, cache, prompts([13])["input_ids"])
    assert cache.manager.num_free_blocks == 3 and cache.get_seq_length() == 0
    forward(model, cache, prompts([12])["input_ids"])
    before = cache.usage()
    with pytest.raises(OutOfBlocksError, match="a forward needs 1 blocks, 0 are free"):
        forward(model, cache, torch.tensor([[5]]))
    assert cache.usage() == before and cache.get_seq_length() == 12
    cache.crop(-1)
    forward(model, cache, torch.tensor([[5]]))  # and it can go on


def test_rows_that_do_not_fit_the_cache_are_refused():
    model, ids = small("llama"), prompts([5, 5])["input_ids"]
    ones = torch.ones_like(ids)
    refused = [
        ({"width": 4}, ids, ones, "2 rows are no multiple of width=4"),
        ({"width": 2}, ids, ones, "do not have one prompt"),
        ({}, ids, torch.tensor([[1, 1, 1, 1, 0]] * 2), "padding must be on the left"),
    ]
    for options, given, mask, reason in refused:
        cache = paged(model, **options)
        with pytest.raises(ValueError, match=reason):
            forward(model, cache, given, mask)
        assert cache.manager.num_free_blocks == NUM_BLOCKS
    cache = paged(model)
    forward(model, cache, ids)
    with pytest.raises(ValueError, match="1 rows, and 2 are in the cache"):
        forward(model, cache, ids[:1])
    with pytest.raises(ValueError, match="row 0 has padding behind its first token"):
        forward(model, cache, ids[:, :2], torch.tensor([[1] * 5 + [0, 1], [1] * 7]))
    with pytest.raises(ValueError, match="only padding can be masked"):
        forward(model, paged(model), ids, torch.ones(2, 1, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="width"):
        paged(model, width=0)


def test_a_mask_that_hides_more_than_padding_is_refused_in_a_decode_step_too():
    model, ids = small("llama"), prompts([5])["input_ids"]
    cache = paged(model)
    forward(model, cache, ids)
    before = cache.usage()
    for hidden in ([0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]):
        with pytest.raises(ValueError, match="row 0 has 5 tokens, its mask shows 4"):
            forward(model, cache, ids[:, :1], torch.tensor([hidden]))
    with pytest.raises(ValueError, match="only padding can be masked"):
        forward(model, cache, ids[:, :1], torch.ones(1, 1, 1, 6, dtype=torch.bool))
    assert cache.usage() == before


def test_prompts_that_differ_are_found_under_a_large_bias():
    model = copy.deepcopy(small("qwen2"))
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias[3] = 4000.0
    for ids, refused in ((prompts([5, 5])["input_ids"], True), (prompts([5])["input_ids"], False)):
        rows = ids if refused else ids.repeat(2, 1)
        if refused:
            with pytest.raises(ValueError, match="do not have one prompt"):
                forward(model, paged(model, width=2), rows)
        else:
            forward(model, paged(model, width=2), rows)


def test_gradients_are_refused():
    model, ids = copy.deepcopy(small("llama")), prompts([5])["input_ids"]
    with pytest.raises(UnsupportedModelError, match="keeps no gradients"):
        model(ids, use_cache=True, **{CACHE: paged(model)})


def test_positions_that_depend_on_the_longest_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", **{**GROUPED, "rope_parameters": rope})
    with pytest.raises(UnsupportedModelError, match="llama has dynamic positions"):
        check_config(config)


def test_a_width_that_is_not_that_of_the_beams_is_refused():
    model = small("llama")
    with pytest.raises(ValueError, match="width=2 is not the number of beams"):
        generate(model, prompts([9]), BEAMS, paged(model, width=2))


def test_another_attention_is_not_taken_for_ours():
    model, ids = small("llama"), prompts([5])["input_ids"]
    cache = paged(model)
    on_its_own(model)
    with pytest.raises(UnsupportedModelError, match=f"set_attn_implementation\\('{NAME}'\\)"):
        forward(model, cache, ids)
    model.set_attn_implementation(NAME)
    with pytest.raises(UnsupportedModelError, match="without its paged cache"):
        forward(model, DynamicCache(), ids)
    learning = copy.deepcopy(small("opt", attention_dropout=0.1)).train()
    with pytest.raises(UnsupportedModelError, match=r"call model\.eval"):
        forward(learning, paged(learning), ids)


UNSUPPORTED = {
    "t5": "an encoder",
    "bart": "an encoder",
    "qwen3_next": "linear_attention",
    "jamba": "linear_attention",
    "llama4_text": "chunked_attention",
    "gemma3n_text": "share their K and V",
    "deepseek_v3": "latent vectors",
    "mamba": "",
    "bloom": "no other attention",
    "gemma4_text": "not one number of heads",
    "hrm_text": "several times a token",
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_what_blocks_cannot_hold_is_refused_by_name(family):
    try:
        config = AutoConfig.for_model(family)
    except ValueError:
        pytest.skip(f"this version of transformers has no {family}")
    with pytest.raises(UnsupportedModelError, match=f"^{family}.*{UNSUPPORTED[family]}"):
        check_config(config)
        text = config.get_text_config(decoder=True)
        for name, value in {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 9}.items():
            setattr(text, name, value)
        check_model(AutoModelForCausalLM.from_config(config))


def test_a_model_whose_layers_run_twice_is_refused_before_a_token():
    model, ids = copy.deepcopy(small("llama")), prompts([5])["input_ids"]
    for layer in (3, 1):  # more than there are; one of them twice
        model.model.layers[2].self_attn.layer_idx = layer
        with pytest.raises(UnsupportedModelError, match=f"its layer {layer} follows layer 1"):
            forward(model, paged(model), ids)


def test_attention_sinks_are_refused_by_name():
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": VOCAB, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    config = AutoConfig.for_model("gpt_oss", **sizes, intermediate_size=32)
    config.layer_types = ["full_attention"] * 2
    with pytest.raises(UnsupportedModelError, match="attention sinks"):
        PagedCache(AutoModelForCausalLM.from_config(config), 4)
