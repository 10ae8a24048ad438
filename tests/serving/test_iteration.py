"""iteration.py: what limits are refused, and what an iteration is before anything is decided."""

from dataclasses import FrozenInstanceError, fields

import pytest

from sequence import Sequence, SequenceGroup
from vllm_sim.serving.scheduler import Completion, Iteration, Limits


def group(number):
    return SequenceGroup(number, [Sequence(number, 1, 1)])


def test_the_least_limits_are_one_token_and_one_sequence():
    assert Limits(1, 1).max_batched_tokens == Limits(1, 1).max_num_seqs == 1
    for tokens, seqs in ((0, 1), (1, 0), (0, 0), (-1, 5)):
        with pytest.raises(ValueError, match="limits must be positive, got Limits"):
            Limits(tokens, seqs)


def test_limits_cannot_be_changed():
    limits = Limits(1, 1)
    with pytest.raises(FrozenInstanceError):
        limits.max_num_seqs = 2


def test_an_iteration_does_nothing_until_told():
    iteration = Iteration(7, 1.5)
    assert (iteration.index, iteration.start_s, iteration.num_groups) == (7, 1.5, 0)
    others = [getattr(iteration, field.name) for field in fields(Iteration)[2:]]
    assert len(others) == 11 and not any(others)
    completion = Completion()
    assert not any(getattr(completion, field.name) for field in fields(Completion))
    completion.freed.append(1)
    assert Completion().freed == []  # a list of its own


def test_batched_requests_are_those_that_compute_a_prompt_or_a_token():
    iteration = Iteration(0, 0.0, prefills=[group(0)], decodes=[group(1), group(2)])
    assert iteration.num_groups == 3


@pytest.mark.parametrize("one", [Iteration(0, 0.0), Completion()])
def test_a_name_that_it_has_not_cannot_be_set(one):
    """A slip of the pen in a counter's name would otherwise count nothing, and nobody would see."""
    with pytest.raises(AttributeError):
        one.num_swap = 1


def test_limits_take_no_other_names():
    assert not hasattr(Limits(1, 1), "__dict__")
