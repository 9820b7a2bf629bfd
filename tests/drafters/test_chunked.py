"""Gradients of a sum in chunks are those of the whole sum."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ctc_drafter.drafters.chunked import chunked_sum


class Scores(nn.Module):
    """A loss with a weight for every chunk, one that is frozen, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.frozen, self.unused = (nn.Parameter(torch.randn(5, 3)) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (states @ self.used).tanh().pow(2).sum() + (states @ self.frozen).sum()


def gradients(size: int, outer: float = 1.0) -> tuple[float, torch.Tensor, Scores]:
    scores, torch_states = Scores(), torch.linspace(-2, 2, 35).view(7, 5).requires_grad_()
    below = torch_states * 2  # states of a network, not a leaf
    total = chunked_sum(lambda states, _: scores(states), below, size, scores.parameters())
    (total * outer).backward()
    assert torch_states.grad is not None
    return float(total.detach()), torch_states.grad, scores


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("outer", [1.0, 0.25])
def test_gradients_are_those_of_the_whole_sum(size: int, outer: float) -> None:
    scores, states = Scores(), torch.linspace(-2, 2, 35).view(7, 5).requires_grad_()
    (scores(states * 2) * outer).backward()
    total, found, chunked = gradients(size, outer)
    assert total == pytest.approx(float(scores(states * 2).detach()), rel=1e-5)
    torch.testing.assert_close(found, states.grad)
    torch.testing.assert_close(chunked.used.grad, scores.used.grad)
    assert chunked.frozen.grad is None
    assert chunked.unused.grad is None  # an optimizer would decay a weight whose gradient is 0


def test_operations_of_modules_that_read_the_states_are_counted() -> None:
    """`FlopCounterMode` hooks what modules are given."""
    layer = nn.Linear(5, 3, bias=False)
    with FlopCounterMode(display=False) as counter:
        chunked_sum(lambda states, _: layer(states).sum(), torch.ones(7, 5, requires_grad=True), 3, layer.parameters())
    assert counter.get_total_flops() == 3 * 2 * 7 * 5 * 3  # forward, gradients of states, gradients of weights


def test_chunks_are_told_their_number() -> None:
    said: list[tuple[int, int]] = []

    def part(states: torch.Tensor, number: int) -> torch.Tensor:
        said.append((number, len(states)))
        return states.sum()

    chunked_sum(part, torch.zeros(5, 2, requires_grad=True), 2, []).backward()
    assert said == [(0, 2), (1, 2), (2, 1)]


def test_each_chunk_is_computed_once() -> None:
    calls = 0

    def part(states: torch.Tensor, _: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return states.sum()

    chunked_sum(part, torch.zeros(6, 2, requires_grad=True), 2, []).backward()
    assert calls == 3


def test_without_gradients_it_is_a_sum() -> None:
    with torch.no_grad():
        total = chunked_sum(lambda states, _: states.sum(), torch.ones(5, 2, requires_grad=True), 2, [])
    assert float(total) == 10
    assert not total.requires_grad
