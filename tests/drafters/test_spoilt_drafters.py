"""Drafters whose weights are NaN, infinite, huge or random bits: the answer is plain decoding's."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.decode.sampling import ARGMAX, Sampled, warpers
from ctc_drafter.drafters.registry import TRAINED, trained_method
from helpers import tiny_target

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7]]
LENGTH = 16
SAMPLED = Sampled([7, 8], warpers(temperature=1.2))
VALUES = ["nan", "inf", "-inf", "1e38", "0", "bits"]


@cache
def expected(sampled: bool) -> list[list[int]]:
    sampler = SAMPLED if sampled else ARGMAX
    return plain_generate(tiny_target(), PROMPTS, max_new_tokens=LENGTH, sampler=sampler).tokens


def fresh(name: str):
    """An untrained drafter, spread out so that its parts matter."""
    target, method = tiny_target(), trained_method(name)
    torch.manual_seed(1)
    drafter = method.drafter.for_target(target.config, **{"draft_length": 3, **method.sizes})
    drafter.start_from(target.norm_scale, target.head)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return drafter.eval()


@torch.no_grad()
def spoil(weight: torch.Tensor, value: str) -> None:
    if value == "bits":
        bits = torch.randint(-(2**31), 2**31, weight.shape, dtype=torch.int64).to(torch.int32)
        weight.copy_(bits.view(torch.float32))
    else:
        weight.fill_(float(value))


def outcome(drafter, sampled: bool) -> list[list[int]]:
    sampler = SAMPLED if sampled else ARGMAX
    options = {"max_new_tokens": LENGTH, "nodes": 8, "min_probability": 0.0, "sampler": sampler}
    return generate(tiny_target(), drafter, PROMPTS, **options).tokens


@pytest.mark.sparing(3)
@pytest.mark.parametrize("name", sorted(TRAINED))
@pytest.mark.parametrize("value", VALUES)
def test_all_weights(value: str, name: str) -> None:
    drafter = fresh(name)
    for weight in drafter.parameters():
        spoil(weight, value)
    for sampled in (False, True):
        assert outcome(drafter, sampled) == expected(sampled)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nan", "inf", "1e38", "bits"])
def test_each_weight_of_ours_alone(value: str) -> None:
    names = [name for name, _ in fresh("ctc").named_parameters()]
    assert len(names) > 10
    for name in names:
        drafter = fresh("ctc")
        spoil(drafter.get_parameter(name), value)
        assert outcome(drafter, sampled=False) == expected(sampled=False), name


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 0.5])
def test_some_random_bits_in_every_weight(share: float) -> None:
    for seed in range(6):
        drafter = fresh("ctc")
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in drafter.parameters():
                other = weight.clone()
                spoil(other, "bits")
                weight.copy_(torch.where(torch.rand_like(weight) < share, other, weight))
        assert outcome(drafter, sampled=True) == expected(sampled=True)
