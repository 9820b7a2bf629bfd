"""The random numbers are splitmix64's, uniform, and do not know each other."""

import math

import pytest
import torch

from ctc_drafter.decode.sampling import gumbel, row_seeds, uniform
from helpers import chi_square_p

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15


def mixed(word: int) -> int:
    """splitmix64's finaliser on Python's integers, as published."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def test_the_mixing_function_is_splitmix64():
    # The generator started at 0 steps by STEP and mixes: its first outputs are published with it.
    assert [mixed(STEP * n & MASK) for n in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    seeds, positions, tokens = [0, 7, -1, (1 << 63) - 1], [0, 1, 5, 1000], [0, 1, 150_000]
    ours = uniform(torch.tensor(seeds), torch.tensor(positions), torch.tensor(tokens))
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        stream = mixed((mixed(seed & MASK) + (position + 1) * STEP) & MASK)
        for column, token in enumerate(tokens):
            word = mixed((stream + (token + 1) * STEP) & MASK)
            assert float(ours[row, column]) == ((word >> 12) + 0.5) / 2**52


@pytest.mark.parametrize("along", ["seeds", "positions", "tokens"])
def test_uniform_and_independent_of_the_neighbour(along):
    count, one, two = torch.arange(40_000), torch.zeros(1, dtype=torch.long), torch.arange(2)
    if along == "seeds":
        values = uniform(count, torch.zeros_like(count), two[:1]).squeeze(1)
    elif along == "positions":
        values = uniform(torch.zeros_like(count), count, two[:1]).squeeze(1)
    else:
        values = uniform(one, one, count).squeeze(0)
    bins = (values * 20).long()
    pairs = bins[::2] * 20 + bins[1::2]
    for cells, size in ((bins, 20), (pairs, 400)):
        expected = torch.full((size,), len(cells) / size, dtype=torch.double)
        assert chi_square_p(torch.bincount(cells, minlength=size), expected) > 0.001


def test_noise_is_neither_zero_nor_one():
    values = uniform(torch.arange(100), torch.arange(100), torch.arange(1000))
    assert 0 < values.min() < 1e-4
    assert 1 > values.max() > 1 - 1e-4
    noise = gumbel(torch.arange(100), torch.arange(100), torch.arange(1000))
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.5772) < 4 * math.pi / math.sqrt(6 * noise.numel())


def test_seeds_of_rows_differ():
    seeds = row_seeds(3, range(1000)) + row_seeds(4, range(1000))
    assert len(set(seeds)) == 2000
    assert row_seeds(3, [999]) == seeds[999:1000]
    assert row_seeds(1 << 64, [0]) == row_seeds(0, [0])
