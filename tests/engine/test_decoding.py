"""How tokens are chosen: samples from generators of their own, beams that keep their places."""

import pytest
import torch

pytest.importorskip("transformers")

from small_models import small

from kv_cache_manager import RequestTooLargeError, UnknownSequenceError
from vllm_sim.engine.decoding import BeamSearch, Decoding, Samples
from vllm_sim.engine.engine import Engine

CPU = torch.device("cpu")


def logits(*rows):
    """Rows whose softmax is in proportion to these weights."""
    return torch.tensor(rows, dtype=torch.float32).log()


def test_beams_fork_from_the_first_then_survivors_keep_their_places():
    search = BeamSearch(3, frozenset())
    first = search.advance(logits([5, 3, 2, 1], [5, 3, 2, 1], [5, 3, 2, 1]), last=False)
    assert (first.tokens, first.parents) == ([0, 1, 2], [0, 0, 0])
    # Beam 0's two best and beam 1's best win: beam 2 is dead, and its place is taken.
    choice = search.advance(logits([4, 4, 1, 1], [1, 1, 7, 1], [1, 1, 1, 1]), last=False)
    assert choice.parents == [0, 1, 0] and choice.tokens[1] == 2
    assert {choice.tokens[0], choice.tokens[2]} == {0, 1}
    assert not any(choice.ended)


def test_a_hypothesis_that_ends_is_kept_and_the_search_ends_when_none_can_be_better():
    search = BeamSearch(2, frozenset({0}))
    choice = search.advance(logits([8, 1, 1, 1], [8, 1, 1, 1]), last=False)
    assert search.finished[0][1] == [0] and not any(choice.ended)
    choice = search.advance(logits([97, 1, 1, 1], [97, 1, 1, 1]), last=False)
    assert len(search.finished) == 2 and all(choice.ended)
    assert search.finished[0][0] > search.finished[1][0]


def test_at_the_last_token_the_best_beams_are_the_hypotheses():
    search = BeamSearch(2, frozenset())
    search.advance(logits([4, 3, 1], [4, 3, 1]), last=False)
    choice = search.advance(logits([8, 1, 1], [8, 1, 1]), last=True)
    assert all(choice.ended) and [tokens for _, tokens in search.finished] == [[0, 0], [1, 0]]


def test_each_sample_draws_for_itself_whoever_else_is_left():
    rows = torch.zeros(3, 50)
    decoding = Decoding(num_samples=3, temperature=1.0, seed=4)
    together, alone = (Samples(decoding, frozenset({7}), CPU) for _ in range(2))
    first = [together.advance(rows, [0, 1, 2]).tokens for _ in range(20)]
    assert [row[2] for row in first] == [alone.advance(rows[:1], [2]).tokens[0] for _ in range(20)]
    assert len({tuple(row) for row in zip(*first)}) == 3
    peaked = torch.full((1, 50), -9.0)
    peaked[0, 7] = 9.0
    assert Samples(Decoding(), frozenset({7}), CPU).advance(peaked, [0]).ended == [True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 2},
        {"num_samples": 2, "beam_width": 2, "temperature": 1.0},
        {"temperature": -1.0},
        {"top_p": 1.5},
        {"num_samples": 0},
        {"seed": -1},
        {"top_k": 0.5},
        {"temperature": 1e-9},
        {"beam_width": 2, "temperature": 1.0},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        Decoding(**wrong)


def test_requests_that_can_never_run_are_refused_and_nothing_has_changed():
    engine = Engine(small("llama"), 16, 4)
    refused = [
        (([5] * 100, 29), RequestTooLargeError, "129 tokens; the model has 128 positions"),
        (([5] * 60, 30), RequestTooLargeError, "may need 23 blocks; the pool has 16"),
        (([], 5), ValueError, "at least one"),
        (([97], 5), ValueError, "need tokens from 0 to 96"),
        (([True], 5), ValueError, "a token must be an integer"),
        (([5], 0), ValueError, "max_new_tokens"),
    ]
    for arguments, error, reason in refused:
        with pytest.raises(error, match=reason):
            engine.submit(*arguments)
    with pytest.raises(UnknownSequenceError, match="3 is not the id of a shared prefix"):
        engine.submit([5], 5, prefix_id=3)
    with pytest.raises(RequestTooLargeError, match="129 tokens"):
        engine.add_prefix([5] * 129)
    assert engine.scheduler.idle and engine.manager.num_free_blocks == 16
    assert engine.submit([5] * 9, 3) == 0 and len(list(engine.run())) == 1


def test_a_prefix_that_would_starve_an_accepted_request_is_refused():
    engine = Engine(small("llama"), 10, 4)
    engine.submit([5] * 12, 24)
    with pytest.raises(RequestTooLargeError, match="request 0 may need 9 blocks; the pool has 7"):
        engine.add_prefix([6] * 12)
    assert engine.manager.num_free_blocks == 10
    prefix = engine.add_prefix([6] * 4)
    engine.submit([5], 3, prefix_id=prefix)
    with pytest.raises(ValueError, match="not done"):
        engine.drop_prefix(prefix)
    assert len(list(engine.run())) == 2
    engine.drop_prefix(prefix)
    assert engine.manager.num_free_blocks == 10
