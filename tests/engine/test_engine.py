"""Continuous batching of a real model: every request's text is that of the request alone."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from small_models import FAMILIES, VOCAB, on_its_own, prompts, small

from vllm_sim.engine.decoding import Decoding
from vllm_sim.engine.engine import Engine
from vllm_sim.serving.scheduler import Limits
from vllm_sim.serving.simulator import Observer

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NEEDS_CUDA])]
SAMPLES = Decoding(num_samples=3, temperature=1.0, seed=7)
BEAMS = Decoding(beam_width=4)


class Checked(Observer):
    """Recomputes the invariants in every iteration, and counts what happened."""

    def __init__(self, engine):
        self.engine = engine
        self.swaps = self.recomputations = self.copies = 0
        engine.observers.append(self)

    def on_iteration(self, iteration):
        self.engine.manager.check_invariants()
        self.swaps += iteration.num_swaps
        self.recomputations += iteration.num_recomputations
        self.copies += len(iteration.copies)

    def on_completion(self, completion):
        self.engine.manager.check_invariants()


def serve(model, requests, num_blocks=400, prefix=None, **options):
    """The outputs of requests (prompt, max_new_tokens, decoding, behind the prefix), in order."""
    engine = Engine(model, num_blocks, 4, poison=True, **options)
    checked = Checked(engine)
    prefix_id = None if prefix is None else engine.add_prefix(prefix)
    for prompt, length, decoding, behind in requests:
        engine.submit(prompt, length, decoding, prefix_id=prefix_id if behind else None)
    outputs = sorted(engine.run(), key=lambda output: output.request_id)
    if prefix_id is not None:
        engine.drop_prefix(prefix_id)
    assert engine.manager.num_free_blocks == num_blocks
    return [output.sequences for output in outputs], checked


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_it_gives_the_text_of_generate(family):
    model = small(family)
    tokens = prompts([9])["input_ids"]
    for width in (1, 4):
        on_its_own(model)
        more = {"num_beams": width, "num_return_sequences": width, "pad_token_id": 0}
        expected = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=16,
            **more,
        )
        request = tokens[0].tolist(), 16, Decoding(beam_width=width), False
        (found,), _ = serve(model, [request])
        for row, sequence in zip(expected[:, 9:].tolist(), found):
            assert row[: len(sequence)] == sequence
            assert {*row[len(sequence) :]} <= {0, 2}  # filled up


def mixed(count, seed=3):
    """Requests of all kinds, in turn: greedy, drawn, samples, beams, and these behind a prefix."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [
        Decoding(),
        Decoding(temperature=0.8, top_k=20, top_p=0.9, seed=1),
        SAMPLES,
        BEAMS,
    ]
    requests = []
    for index in range(count):
        prompt_len, new = torch.randint(2, 20, (2,), generator=generator).tolist()
        prompt = torch.randint(3, VOCAB, (prompt_len,), generator=generator).tolist()
        requests.append((prompt, new + 8, kinds[index % 4], index % 5 == 0))
    return requests


PREFIX = list(range(5, 16))  # 11 tokens: its third block of 4 slots is part-filled
PRESSED = {"num_blocks": 48, "limits": Limits(512, 64)}


@pytest.fixture(scope="module", params=DEVICES)
def alone(request):
    """A model, 100 requests, and what each gives when nothing else runs; in float32."""
    model, requests = small("llama"), mixed(100)
    if request.param == "cuda":
        model = copy.deepcopy(model).to("cuda")
    return model, requests, [serve(model, [one], prefix=PREFIX)[0][0] for one in requests]


@pytest.mark.parametrize("preemption", ["swap", "recompute", "auto"])
def test_under_pressure_100_mixed_requests_give_what_each_gives_alone(alone, preemption):
    model, requests, expected = alone
    options = {**PRESSED, "preemption": preemption, "num_cpu_blocks": 40}
    found, seen = serve(model, requests, prefix=PREFIX, **options)
    assert found == expected
    assert seen.copies > 50
    assert (seen.swaps > 5) == (preemption != "recompute")
    assert (seen.recomputations > 5) == (preemption != "swap")


def test_triton_serves_prompts_behind_a_prefix_as_the_gather_kernel_does():
    pytest.importorskip("triton", exc_type=ImportError)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(small("llama")).to(device)
    requests = [(prompt, 3, kind, True) for prompt, _, kind, _ in mixed(4)[::3]]
    found = [serve(model, requests, prefix=PREFIX, kernel=k)[0] for k in ("gather", "triton")]
    assert found[0] == found[1]
