"""Settings of decoding: the same for every entry point, checked in one place; a budget in each of them."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from ctc_drafter.decode.batch import DecodingConfig
from ctc_drafter.decode.budget import Budget, Pace, StepTimes
from ctc_drafter.decode.generate import generate, generate_many, plain_generate
from ctc_drafter.decode.hf import speculate
from ctc_drafter.decode.sampling import Sampled, warpers
from ctc_drafter.drafters.base import NoDrafter
from ctc_drafter.drafters.prompt_lookup import PromptLookup
from ctc_drafter.serve.server import make_engine
from ctc_drafter.target.model import Target
from ctc_drafter.types import UserError
from helpers import ScriptedDrafter, tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
NEW = 40
DEAR = Budget(StepTimes((1,), (100,), (1, 2, 4), ((4.0,),), ((9.0,),), (((200.0, 210.0, 220.0),),)), 4)
CHEAP = Budget(StepTimes((1,), (100,), (1, 2, 4), ((4.0,),), ((0.1,),), (((4.1, 4.2, 4.3),),)), 4)


def by_generate(target, drafter, **options):
    return generate(target, drafter, PROMPTS, max_new_tokens=NEW, **options).tokens


def by_generate_many(target, drafter, **options):
    found = dict(generate_many(target, drafter, PROMPTS, in_flight=2, max_new_tokens=NEW, **options))
    return [found[place] for place in range(len(PROMPTS))]


def by_speculate(target, drafter, **options):
    ids = torch.tensor(PROMPTS)
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    found = target.model.generate(ids, **given, custom_generate=speculate(drafter, **options))
    return found[:, ids.shape[1] :].tolist()


WAYS = [by_generate, by_generate_many, by_speculate]


def stock(target):
    ids = torch.tensor(PROMPTS)
    return target.model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[:, ids.shape[1] :].tolist()


@pytest.fixture
def sizes(monkeypatch):
    """The tree sizes that a budget chose, step by step."""
    chosen, size = [], Pace.size

    def told(self, candidates, context):
        chosen.append(size(self, candidates, context))
        return chosen[-1]

    monkeypatch.setattr(Pace, "size", told)
    return chosen


@pytest.mark.parametrize("way", WAYS)
def test_a_budget_chooses_sizes_and_leaves_the_output_alone(way, sizes):
    target = tiny_target()
    expected = stock(target)
    drafter = ScriptedDrafter([p + t for p, t in zip(PROMPTS, expected, strict=True)], 4)
    for budget, largest in ((DEAR, 0), (CHEAP, 4)):
        sizes.clear()
        assert way(target, drafter, budget=replace(budget)) == expected
        assert sizes
        assert max(sizes) == largest
    sizes.clear()
    assert way(target, drafter) == expected
    assert sizes == []


@pytest.mark.parametrize("way", WAYS)
def test_a_config_says_the_same_as_keywords_and_keywords_win(way, sizes):
    target = tiny_target()
    drafter, expected = tiny_drafter(target), stock(target)
    assert way(target, drafter, config=DecodingConfig(budget=replace(CHEAP))) == expected
    first = list(sizes)
    sizes.clear()
    assert way(target, drafter, config=DecodingConfig(budget=DEAR), budget=replace(CHEAP)) == expected
    assert sizes == first != []


def test_samplers_come_with_the_config():
    target, drafter = tiny_target(), PromptLookup()
    config = DecodingConfig(sampler=Sampled([1, 2], warpers(temperature=0.9)))
    plain = plain_generate(target, PROMPTS, max_new_tokens=NEW, config=config).tokens
    assert plain != stock(target)
    assert plain == plain_generate(target, PROMPTS, max_new_tokens=NEW, sampler=config.sampler).tokens
    assert by_generate(target, drafter, config=config) == by_generate_many(target, drafter, config=config) == plain
    with pytest.raises(UserError, match="do_sample=True"):  # `generate` has settings of its own
        speculate(drafter, config=config)
    with pytest.raises(UserError, match="do_sample=True"):
        speculate(drafter, sampler=config.sampler)


WRONG = [
    ({"nodes": 0}, "nodes is 0; give at least 1, or use plain_generate"),
    ({"nodes": 2.5}, "nodes is 2.5; give a whole number"),
    ({"nodes": True}, "nodes is True; give a whole number"),
    ({"nodes": None}, "nodes is None; give a whole number"),
    ({"min_probability": 1.0}, "floor is 1.0"),
    ({"min_probability": -0.1}, "floor is -0.1"),
    ({"min_probability": math.nan}, "floor is nan"),
    ({"min_probability": "0.1"}, "floor is '0.1'"),
    ({"sampler": 0.8}, r"0.8 is no sampler; give one, such as Sampled\(seeds, warpers\(temperature=0.8\)\)"),
    ({"sampler": Sampled}, "Sampled is no sampler"),
    ({"budget": True}, r"True is no budget; give what budget_for\(target, drafter, nodes, rows\) returns"),
    ({"budget": replace(CHEAP, nodes=0)}, "the budget has 0 nodes; give at least 1, or use plain_generate"),
]


@pytest.mark.parametrize(("wrong", "why"), WRONG)
def test_bad_settings_are_refused_everywhere_before_anything_is_computed(wrong, why, monkeypatch):
    target = tiny_target()
    for name in ("forward", "check_drafter"):
        monkeypatch.setattr(Target, name, lambda *_args, **_more: pytest.fail("computed"))
    calls = [
        lambda: DecodingConfig(**wrong),
        lambda: by_generate(target, PromptLookup(), **wrong),
        lambda: by_generate_many(target, PromptLookup(), **wrong),
        lambda: speculate(PromptLookup(), **wrong),
        lambda: make_engine(target, PromptLookup(), batch_size=1, queue=1, **wrong),
    ]
    if "sampler" in wrong:
        calls.append(lambda: plain_generate(target, PROMPTS, max_new_tokens=2, **wrong))
    for call in calls:
        with pytest.raises(UserError, match=why):
            call()


@pytest.mark.parametrize("call", [by_generate, by_generate_many, by_speculate])
def test_misspelt_settings_are_no_settings(call):
    with pytest.raises(TypeError, match="node"):
        call(tiny_target(), NoDrafter(), node=4)


def test_a_config_is_one_for_all():
    assert all("config" in inspect.signature(each).parameters for each in (generate, generate_many, plain_generate))
    assert all("config" in inspect.signature(each).parameters for each in (speculate, make_engine))
    with pytest.raises(UserError, match="7 is no DecodingConfig"):
        speculate(NoDrafter(), config=7)


# End tokens: the target's own unless told otherwise.


def ending(ends):
    target = tiny_target()
    target.model.generation_config.eos_token_id = ends
    return target


@pytest.mark.parametrize("several", [False, True])
def test_answers_end_where_the_targets_do(several):
    free = stock(ending(None))
    ends = [free[0][7], free[1][11]] if several else free[0][7]
    target = ending(ends)
    listed = set(ends) if several else {ends}
    padded = stock(target)
    expected = [row[: next((i + 1 for i, t in enumerate(row) if t in listed), NEW)] for row in padded]
    assert min(map(len, expected)) <= 8
    assert plain_generate(target, PROMPTS, max_new_tokens=NEW).tokens == expected
    for way in (by_generate, by_generate_many):
        assert way(target, tiny_drafter(target)) == expected
        assert way(target, tiny_drafter(target), eos=()) == free
    assert plain_generate(target, PROMPTS, max_new_tokens=NEW, eos=()).tokens == free
    assert plain_generate(ending(None), PROMPTS, max_new_tokens=NEW).tokens == free
