"""The argmax by blocks is torch's, whatever the logits are."""

import math

import pytest
import torch

from ctc_drafter.decode.argmax import BLOCK, most_probable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK - 7])
def test_the_same_as_torch_says(size, dtype):
    torch.manual_seed(size)
    logits = torch.randn(2, 17, size).to(dtype)
    assert torch.equal(most_probable(logits), logits.argmax(-1))
    assert torch.equal(most_probable(logits[0]), logits[0].argmax(-1))
    assert most_probable(logits[:0]).shape == (0, 17)


def test_the_first_of_equal_ones_wins():
    logits = torch.zeros(3, 4 * BLOCK - 5)
    logits[1, [BLOCK + 3, 2 * BLOCK, 3 * BLOCK]] = 2.0
    logits[2, [7, 8, 3 * BLOCK]] = 2.0
    assert most_probable(logits).tolist() == [0, BLOCK + 3, 7] == logits.argmax(-1).tolist()


def test_infinities_and_nan():
    logits = torch.full((5, 2 * BLOCK + 1), -math.inf)
    logits[1, 2 * BLOCK] = -1e30
    logits[2, BLOCK + 1] = math.nan
    logits[3, [3, BLOCK]] = math.inf
    logits[4, [3, BLOCK]] = torch.tensor([math.inf, math.nan])
    assert most_probable(logits).tolist() == logits.argmax(-1).tolist() == [0, 2 * BLOCK, BLOCK + 1, 3, BLOCK]
