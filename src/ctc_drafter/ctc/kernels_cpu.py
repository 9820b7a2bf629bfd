"""Sums, products and exponentials of float32 arrays for the searches on a CPU (numba)."""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit

real = np.float32


def bfloat16_bits(values: torch.Tensor) -> np.ndarray:
    """The values in bfloat16 as `uint16`, which numpy has no type for."""
    found: np.ndarray = values.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    return found


@njit(cache=True, nogil=True)
def add_bfloat16(sums, bits):  # type: ignore[no-untyped-def]
    """Adds values given as `bfloat16_bits` to float32 sums."""
    whole = np.empty(len(bits), np.uint32)
    for i in range(len(bits)):
        whole[i] = np.uint32(bits[i]) << np.uint32(16)
    values = whole.view(np.float32)
    for i in range(len(bits)):
        sums[i] += values[i]


# The order of additions is free here, so that they run in parallel lanes.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def dot(left, right):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(left)):
        total += left[i] * right[i]
    return total


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def combine(factors, rows):  # type: ignore[no-untyped-def]
    """factors `[R]` @ rows `[R, V]`, float32 or int8; eight rows at a time, to read and write the sums less often."""
    sums, whole = np.zeros(rows.shape[1], np.float32), len(factors) // 8 * 8
    for r in range(0, whole, 8):
        f, a = factors[r : r + 8], rows[r : r + 8]
        for i in range(len(sums)):
            low = f[0] * real(a[0, i]) + f[1] * real(a[1, i]) + f[2] * real(a[2, i]) + f[3] * real(a[3, i])
            high = f[4] * real(a[4, i]) + f[5] * real(a[5, i]) + f[6] * real(a[6, i]) + f[7] * real(a[7, i])
            sums[i] += low + high
    for r in range(whole, len(factors)):
        for i in range(len(sums)):
            sums[i] += factors[r] * real(rows[r, i])
    return sums


LOG2, LOG2_HIGH, LOG2_LOW = np.float32(1 / math.log(2)), np.float32(0.693359375), np.float32(-2.12194440e-4)
TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(7))


@njit(cache=True, nogil=True)
def exp(values, largest):  # type: ignore[no-untyped-def]
    """exp(values - largest) in place, to 2e-7 of it: 2^k times the series at what is left, all lanes in parallel."""
    bits = np.empty(len(values), np.int32)
    for i in range(len(values)):
        x = max(values[i] - largest, np.float32(-87))
        k = np.floor(x * LOG2 + np.float32(0.5))
        x = x - k * LOG2_HIGH - k * LOG2_LOW
        series = TAYLOR[5] + x * TAYLOR[6]
        series = TAYLOR[3] + x * (TAYLOR[4] + x * series)
        values[i] = TAYLOR[0] + x * (TAYLOR[1] + x * (TAYLOR[2] + x * series))
        bits[i] = (np.int32(k) + 127) << 23
    powers = bits.view(np.float32)
    for i in range(len(values)):
        values[i] *= powers[i]
