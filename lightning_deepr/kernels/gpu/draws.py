"""The draws of :mod:`lightning_deepr.algorithm.randomness` in Triton. They are the same integers."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from lightning_deepr.algorithm import randomness

GOLDEN = tl.constexpr(randomness.GOLDEN)
MULTIPLIER_1, MULTIPLIER_2 = tl.constexpr(randomness.MULTIPLIER_1), tl.constexpr(randomness.MULTIPLIER_2)
LARGEST = tl.constexpr(randomness.LARGEST)
UNIT, TURN = tl.constexpr(2.0**-32), tl.constexpr(2.0 * math.pi * 2.0**-32)


@triton.jit
def mix(word):
    """Mix the bits of a uint64 by the finalizer of SplitMix64."""
    word = (word ^ (word >> 30)) * MULTIPLIER_1
    word = (word ^ (word >> 27)) * MULTIPLIER_2
    return word ^ (word >> 31)


@triton.jit
def extend(state, coordinate):
    """Add a coordinate to a key (``randomness.key``). Both are uint64."""
    return mix(state + GOLDEN + mix(coordinate))


@triton.jit
def bits(key, counter):
    """Hash a uint64 key and an int64 counter to 64 bits (uint64)."""
    return mix(counter.to(tl.uint64) * GOLDEN + key)


@triton.jit
def normal(key, counter):
    """Draw a standard normal deviate in float64 (``randomness.normal``)."""
    word = bits(key, counter)
    radius = tl.sqrt(tl.log(((word >> 32).to(tl.float64) + 0.5) * UNIT) * -2.0)
    return radius * tl.cos(((word & 0xFFFFFFFF).to(tl.float64) + 0.5) * TURN)
