"""Counter-based randomness: every draw is an integer function of its coordinates, without a stateful generator.

The coordinates are (seed, stream, step, attempt) and a counter for the tensor and the slot. So the whole random state of a
training is (seed, step): a resumed training is exact, all ranks of a distributed run draw the same numbers without
communication, and the global generator of PyTorch is never used.

The hash is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) over
a Weyl sequence. It needs only 64-bit multiplication, xor and shift. They wrap in the same way in NumPy (uint64) and in PyTorch
on every device (int64), so the integers are the same everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
WORD = (1 << 64) - 1
LARGEST = (1 << 63) - 1
"""Largest value of a 63-bit draw."""
# bits(key, counter) hashes key + counter * golden. With the inverse of golden, one call with key 0 serves different keys.
INVERSE = pow(GOLDEN, -1, 1 << 64)

# Draws for different purposes use different streams, so that they differ at the same seed and step.
# (ROUND: a theta of 16 bits in exported C.)
START_PLACES, START_THETA, SIGN, BIRTH, NOISE, LAYER, DALE, ROUND = range(1, 9)

# A counter holds the tensor's index above the slot's number: 2**23 tensors of 2**40 slots each.
SLOT_BITS = 40


def _signed(word: int) -> int:
    """Convert a 64-bit word to the int64 with the same bits, for PyTorch."""
    return word - (1 << 64) if word >> 63 else word


def mix(word: int) -> int:
    """Apply SplitMix64's finalizer to a Python integer (64 bits, unsigned)."""
    word = ((word ^ (word >> 30)) * MULTIPLIER_1) & WORD
    word = ((word ^ (word >> 27)) * MULTIPLIER_2) & WORD
    return word ^ (word >> 31)


def key(*coordinates: int) -> int:
    """Hash any number of integers into one 64-bit key (unsigned).

    Example::

        >>> key(0, BIRTH, 17, 0) == key(0, BIRTH, 17, 0), key(0, BIRTH, 17, 0) == key(0, BIRTH, 17, 1)
        (True, False)
    """
    state = len(coordinates)
    for coordinate in coordinates:
        state = mix((state + GOLDEN + mix(coordinate & WORD)) & WORD)
    return state


def bits(stream_key: int, counter: Tensor) -> Tensor:
    """Hash each counter to 64 bits.

    Args:
        stream_key: a result of :func:`key`.
        counter: int64 tensor of any shape.

    Returns:
        int64 tensor of the same shape; all 64 bits are used, so half of the results are negative.
    """
    # PyTorch shifts int64 arithmetically; the masks make the shifts logical.
    word = counter * _signed(GOLDEN)
    word.add_(_signed(stream_key))
    word.bitwise_xor_((word >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(MULTIPLIER_1))
    word.bitwise_xor_((word >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(MULTIPLIER_2))
    return word.bitwise_xor_((word >> 31).bitwise_and_((1 << 33) - 1))


def bits_of(words: Tensor, counter: Tensor) -> Tensor:
    """Hash counters like :func:`bits`, with a key of its own for each.

    Args:
        words: int64, the keys.
        counter: int64, broadcastable.
    """
    return bits(0, counter + words * _signed(INVERSE))


def uniform_places(stream_key: int, counter: Tensor, totals: Tensor) -> Tensor:
    """Draw one place per counter, uniform on {0, ..., total - 1}, without the bias of a plain remainder.

    Args:
        stream_key: a result of :func:`key`.
        counter: int64 [R].
        totals: int64 [R] (or broadcastable), the number of places N of each counter's tensor.

    Returns:
        int64 [R]; -1 if the 63-bit draw is in the incomplete last block of N. Then the caller repeats the draw.
    """
    draw = bits(stream_key, counter).bitwise_and_(LARGEST)
    # 2**63 = blocks * N + rest; a draw in the rest would favour low places.
    rest = (LARGEST % totals + 1) % totals
    return torch.where(draw <= LARGEST - rest, draw % totals, -1)


def signs_of(sign_seed: int, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the constant sign s_k of each place, +1 or -1, without a table: the top bit of a hash of the place.

    Args:
        sign_seed: the tensor's own seed.
        places: int64 flat indices into the weight, any shape.
        dtype: the dtype of the result.

    Returns:
        a tensor of +1 and -1 with the shape of ``places``.
    """
    return torch.where(bits(sign_seed, places) < 0, -1.0, 1.0).to(dtype)


def normal(stream_key: int, counter: Tensor) -> Tensor:
    """Draw one standard normal deviate per counter (float64; the Box-Muller transform of two 32-bit uniforms).

    The tails end at 6.7 standard deviations. The integers are the same on every device; the deviates agree up to rounding.
    """
    word = bits(stream_key, counter)
    radius = ((word >> 32).bitwise_and_(0xFFFFFFFF).double() + 0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (word.bitwise_and_(0xFFFFFFFF).double() + 0.5).mul_(2.0 * math.pi * 2.0**-32)
    return radius.mul_(angle.cos_())


def counters(index: int, slots: Tensor) -> Tensor:
    """Return the counters of a tensor's slots. ``index`` is the tensor's position in the order of conversion."""
    return slots + (index << SLOT_BITS)
