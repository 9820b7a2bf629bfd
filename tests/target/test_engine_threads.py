"""PyTorch keeps to one thread beside an engine with threads of its own, and has all of them again behind a step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from ctc_drafter.decode.generate import generate, plain_generate
from ctc_drafter.target.model import Target
from helpers import tiny_drafter, tiny_target

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


@dataclass(frozen=True)
class Watched(Target):
    """Notes how many threads PyTorch has at each forward."""

    own_threads: ClassVar[bool] = True
    seen: list[int] = field(default_factory=list, compare=False)

    def forward(self, *args, **options):
        self.seen.append(torch.get_num_threads())
        return super().forward(*args, **options)


class InOurThreads(Watched):
    own_threads: ClassVar[bool] = False


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "threads"), [(Watched, {1}), (InOurThreads, {3})])
def test_threads_of_steps(kind, threads):
    target = kind(tiny_target(0).model)
    expected = plain_generate(target, PROMPTS, max_new_tokens=6).tokens
    assert generate(target, tiny_drafter(target), PROMPTS, max_new_tokens=6, nodes=4).tokens == expected
    assert set(target.seen) == threads
    assert torch.get_num_threads() == 3


def test_all_threads_are_back_after_an_error():
    @dataclass(frozen=True)
    class Failing(Watched):
        def forward(self, *args, **options):
            assert torch.get_num_threads() == 1
            raise RuntimeError("out of order")

    target = Failing(tiny_target(0).model)
    with pytest.raises(RuntimeError, match="out of order"):
        plain_generate(target, PROMPTS, max_new_tokens=6)
    assert torch.get_num_threads() == 3
