"""Rows of a batch that end with their first token, before any drafter's session was given a text."""

from __future__ import annotations

import queue
from functools import cache

import pytest
import torch

import tiny_models
from ctc_drafter.decode.batch import DecodingConfig, Method
from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.hf import speculate
from ctc_drafter.decode.prefill import prefill
from ctc_drafter.drafters.base import DraftSession
from ctc_drafter.drafters.registry import TRAINED, trained_method
from ctc_drafter.serve.engine import Engine
from ctc_drafter.serve.protocol import Sampling
from ctc_drafter.serve.requests import Failure, Finish
from ctc_drafter.serve.service import Limits, Service
from ctc_drafter.target.model import Target
from helpers import tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [5, 5, 9]]
LENGTH = 10
ENDING = [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)]
FEW = [(1,), (0, 2), (0, 1, 2)]
SOME = [pytest.param(FEW, id="few"), pytest.param(ENDING, id="all", marks=pytest.mark.slow)]


def fresh(target: Target, name: str):
    method = trained_method(name)
    torch.manual_seed(1)
    sizes = {"draft_length": 3, **({"frames": 4} if "frames" in fields(method) else {})}
    drafter = method.drafter.for_target(target.config, **{**sizes, **method.usual, **method.sizes})
    drafter.start_from(target.norm_scale, target.head)
    return drafter.eval()


def fields(method) -> set[str]:
    return set(method.drafter.config_class.__dataclass_fields__)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def firsts(target) -> list[int]:
    found = [row[0] for row in plain_generate(target, PROMPTS, max_new_tokens=1).tokens]
    assert len(set(found)) == 3
    return found


@cache
def oracle(target: Target, ends: frozenset[int]) -> list[list[int]]:
    """Each row alone, by plain decoding; the same for all drafters."""
    return [plain_generate(target, [p], max_new_tokens=LENGTH, eos=ends).tokens[0] for p in PROMPTS]


@pytest.mark.parametrize("ending", SOME)
@pytest.mark.parametrize("name", TRAINED)
def test_answers_are_plain_decodings(target, firsts, name, ending):
    drafter = fresh(target, name)
    for rows in ending:
        ends = frozenset(firsts[row] for row in rows)
        expected = oracle(target, ends)
        assert {place for place, row in enumerate(expected) if len(row) == 1} >= set(rows)
        options = {"max_new_tokens": LENGTH, "eos": ends, "min_probability": 0.0}
        assert generate(target, drafter, PROMPTS, **options).tokens == expected
        for most in (2, 3):
            assert dict(generate_many(target, drafter, PROMPTS, in_flight=most, **options)) == dict(enumerate(expected))


@pytest.mark.parametrize("ending", SOME)
@pytest.mark.parametrize("name", TRAINED)
def test_speculate_is_stock_generate(target, firsts, name, ending):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    drafter = fresh(target, name)
    for rows in filter(None, ending):
        options = {"max_new_tokens": LENGTH, "eos_token_id": [firsts[row] for row in rows], "pad_token_id": 0}
        options |= {"attention_mask": mask, "do_sample": False}
        expected = target.model.generate(ids, **options)
        assert torch.equal(target.model.generate(ids, **options, custom_generate=speculate(drafter)), expected)


@pytest.mark.parametrize("name", TRAINED)
def test_rows_of_a_server(name):
    """Rows that end with their first token before, between and behind others that join the same batch."""
    model = tiny_models.tiny_llama()
    served = Target.wrap(model)
    engine = Engine({"draft": Method(served, fresh(served, name), DecodingConfig(8, 0.0))}, batch_size=3)
    service = Service(engine, served, tiny_models.tiny_tokenizer(), "tiny", Limits())
    limits = [1, LENGTH, 1, 1, LENGTH, LENGTH, 1]
    told: queue.SimpleQueue = queue.SimpleQueue()
    completions = []
    for place, limit in enumerate(limits):
        (completion,) = service.completions([PROMPTS[place % 3]], Sampling(temperature=0), limit)
        completion.deliver, completion.eos = told.put, frozenset()
        completions.append(completion)
    with engine:
        engine.submit(completions)
        ended = 0
        while ended < len(completions):
            event = told.get(timeout=120)  # the first draft may wait for a compiler
            assert not isinstance(event, Failure)
            ended += isinstance(event, Finish)
    for completion, limit in zip(completions, limits, strict=True):
        assert completion.tokens == plain_generate(served, [completion.prompt], max_new_tokens=limit, eos=()).tokens[0]


@pytest.mark.parametrize("name", TRAINED)
def test_selecting_joining_and_extending_in_any_order(target, name):
    """Drafts are those of a session whose rows came in one by one, whatever happened before the first draft."""
    drafter = fresh(target, name)
    with torch.no_grad():  # the heads of an untrained Medusa are all the same, and rounding would order equal scores
        for parameter in drafter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def state(place: int):
        return prefill(target, [PROMPTS[place]], drafter.feature_layers)

    def drafts(session: DraftSession, root: torch.Tensor) -> list:
        found = session.propose(root, 6, 0.0)
        return [found.tokens.tolist(), found.parents.tolist()]

    together = prefill(target, PROMPTS[:2], drafter.feature_layers)
    with torch.inference_mode():
        for kept in (0, 1):
            session = drafter.begin(target.embed, target.head, 2)
            session.extend(together.tokens, together.features, together.lengths)
            session.select(torch.tensor([kept]))
            session.select(torch.tensor([0]))
            other = state(2)
            session.join(other.tokens, other.features, other.lengths)
            session.select(torch.tensor([1, 0]))
            found = drafts(session, torch.tensor([5, 6]))
            alone = []
            for place, root in ((2, 5), (kept, 6)):
                begun = state(place)
                single = drafter.begin(target.embed, target.head, 1)
                single.extend(begun.tokens, begun.features, begun.lengths)
                alone.append(drafts(single, torch.tensor([root])))
            for row, (tokens, parents) in enumerate(alone):
                size = len(tokens[0])
                assert found[0][row][:size] == tokens[0]
                assert found[1][row][:size] == parents[0]
