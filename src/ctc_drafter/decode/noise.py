"""Random numbers without a state: a pure function of a row's seed, the emitted position and the token.

A counter instead of a generator, so that a token's draw does not depend on how many were made before it, in which
batch, or for which nodes of a tree (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). The mixing
function is splitmix64's (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def signed(word: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


STEP = signed(0x9E3779B97F4A7C15)
FIRST, SECOND = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)
BITS = 52  # half a step above every multiple of 2**-52 is a float64, and neither 0 nor 1


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64 `[R, C]`: see `uniform`."""
    return -torch.log(-torch.log(uniform(seeds, positions, tokens)))


def uniform(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Uniform on (0, 1), float64 `[R, C]`, for seeds and positions `int64 [R]` and token ids `int64 [C]`.

    All integer arithmetic, modulo 2**64: the same on every device.
    """
    streams = mix(mix(seeds) + (positions + 1) * STEP)
    words = mix(streams.unsqueeze(1) + (tokens + 1) * STEP)
    return (shifted(words, 64 - BITS).double() + 0.5) * 2.0**-BITS


def mix(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ shifted(words, 30)) * FIRST
    words = (words ^ shifted(words, 27)) * SECOND
    return words ^ shifted(words, 31)


def shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts right and fills with zeros; `>>` would repeat the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def row_seeds(seed: int, rows: Sequence[int]) -> list[int]:
    """One seed for each row of a run that has a single one."""
    return mix(mix(torch.tensor(signed(seed))) + (torch.tensor(rows, dtype=torch.long) + 1) * STEP).tolist()
