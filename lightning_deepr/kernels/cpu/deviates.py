"""Standard normal deviates for kernels, one block at a time (``randomness.normal``).

The logarithm and the cosine of the C library would take most of the time of a step with noise. Here both are polynomials, and
the compiler vectorizes the loop. They agree with the library's to a few units in the last place of a float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from lightning_deepr.kernels.cpu.hashing import bits

BLOCK = 1 << 9  # deviates of a block


@intrinsic
def as_float(typingctx: Any, word: Any) -> Any:
    """Return the float64 that has these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.uint64), codegen


@intrinsic
def as_word(typingctx: Any, value: Any) -> Any:
    """Return the bits of a float64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.uint64(types.float64), codegen


_EXPONENT_OF_2_52 = np.uint64(0x4330000000000000)
_MANTISSA, _ONE = np.uint64(0xFFFFFFFFFFFFF), np.uint64(0x3FF0000000000000)
_HALF_WORD = np.uint64(0xFFFFFFFF)
# sin z = z - z^3 / 3! + ... for |z| <= pi / 2, and 2 atanh(s) = 2 s (1 + s^2 / 3 + ...) for |s| <= .172.
# The remaining terms are below 1e-17.
S3, S5, S7, S9, S11, S13, S15, S17, S19, S21 = (math.cos(math.pi * i) / math.factorial(2 * i + 1) for i in range(1, 11))
L1, L3, L5, L7, L9, L11, L13, L15, L17, L19, L21 = (2.0 / (2 * i + 1) for i in range(11))


@njit(inline="always")
def small(word: np.uint64) -> float:
    """Convert an integer below 2**52 to a float64. (The compiler does not vectorize the conversion of a uint64.)"""
    return as_float(word | _EXPONENT_OF_2_52) - 2.0**52


@njit(inline="always")
def log(x: float) -> float:
    """Compute the natural logarithm of a positive, normal float64."""
    word = as_word(x)
    mantissa, exponent = as_float((word & _MANTISSA) | _ONE), small(word >> np.uint64(52)) - 1023.0
    large = mantissa > 1.4142135623730951
    mantissa, exponent = (mantissa * 0.5 if large else mantissa), (exponent + 1.0 if large else exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    q = s * s
    series = L11 + q * (L13 + q * (L15 + q * (L17 + q * (L19 + q * L21))))
    series = L1 + q * (L3 + q * (L5 + q * (L7 + q * (L9 + q * series))))
    return exponent * 0.6931471805599453 + s * series


@njit(inline="always")
def normal(word: np.uint64) -> float:
    """Compute a standard normal deviate from 64 bits (``randomness.normal``)."""
    first = (small(word >> np.uint64(32)) + 0.5) * 2.0**-32
    turn = (small(word & _HALF_WORD) + 0.5) * 2.0**-32
    z = (abs(turn - 0.5) - 0.25) * (2.0 * math.pi)  # cos(2 pi t) = sin(2 pi (|t - 1/2| - 1/4))
    q = z * z
    series = S11 + q * (S13 + q * (S15 + q * (S17 + q * (S19 + q * S21))))
    cosine = z + z * q * (S3 + q * (S5 + q * (S7 + q * (S9 + q * series))))
    return math.sqrt(log(first) * -2.0) * cosine


@njit
def deviates(key: np.uint64, counter: int, count: int, noise: np.ndarray) -> None:
    """Set ``noise[k]`` to the deviate of counter + k, for k < count."""
    start = np.uint64(counter)
    for k in range(count):
        noise[k] = normal(bits(key, start + np.uint64(k)))
