"""A slow DEEP R in NumPy, as a reference for the fast one.

It follows Algorithm 1 of the paper and the documented draw rules, with a Python loop over every slot. It shares no code with
the package, not even the hash.

The draw rules. A draw has coordinates (seed, stream, step, attempt), which are hashed into a key, and a counter,
``tensor index * 2**40 + slot``. Its 64 bits are SplitMix64's finalizer of ``key + counter * golden``. A place of N is the low
63 bits modulo N, unless they lie in the incomplete last block of N. A sign is the top bit of the hash of the place. A normal
deviate is the Box-Muller transform of the two 32-bit halves.

Where K = N, the places are in the order of the slots from the start, and none ever moves.

Where connections may be only at some places, a draw is a code, which stands for a place or for none (-1). A code that stands
for none is drawn again from the same bits b: the tries are b, bits(b, 1), bits(b, 2), ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

U64 = np.uint64
GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64 - 1
START_PLACES, START_THETA, SIGN, BIRTH, NOISE = 1, 2, 3, 4, 5


def finalizer(word: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer to an array of uint64."""
    word = (word ^ (word >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> U64(27))) * U64(0x94D049BB133111EB)
    return word ^ (word >> U64(31))


def key(*coordinates: int) -> int:
    state = len(coordinates)
    for coordinate in coordinates:
        inner = int(finalizer(np.array([coordinate & WORD], U64))[0])
        state = int(finalizer(np.array([(state + GOLDEN + inner) & WORD], U64))[0])
    return state


def bits(stream_key: int, counters: Sequence[int] | np.ndarray) -> np.ndarray:
    counter = np.asarray(counters).astype(U64)
    return finalizer(counter * U64(GOLDEN) + U64(stream_key & WORD))


def place(stream_key: int, counter: int, total: int) -> int | None:
    """Return a place, or None if the draw must be repeated."""
    draw = int(bits(stream_key, [counter])[0]) % 2**63
    whole_blocks = 2**63 // total * total
    return draw % total if draw < whole_blocks else None


def allowed_place(stream_key: int, counter: int, codes: Sequence[int]) -> int:
    """Return an allowed place."""
    word, attempt = int(bits(stream_key, [counter])[0]), 0
    while True:
        draw = (word if attempt == 0 else int(bits(word, [attempt])[0])) % 2**63
        if draw < 2**63 // len(codes) * len(codes) and codes[draw % len(codes)] >= 0:
            return codes[draw % len(codes)]
        attempt += 1


def signs(sign_seed: int, places: np.ndarray) -> np.ndarray:
    return np.where(bits(sign_seed, places) >> U64(63), -1.0, 1.0)


def normal(stream_key: int, counters: Sequence[int] | np.ndarray) -> np.ndarray:
    word = bits(stream_key, counters)
    first, second = (((half & U64(0xFFFFFFFF)).astype(np.float64) + 0.5) / 2**32 for half in (word >> U64(32), word))
    return np.sqrt(-2 * np.log(first)) * np.cos(2 * math.pi * second)


def first_free(
    seed: tuple[int, ...],
    counters: Sequence[int],
    total: int,
    occupied: set[int],
    codes: Sequence[int] | None = None,
) -> list[int]:
    """Draw places in rounds: every slot without a place draws one, and takes it unless it is occupied."""
    found: dict[int, int] = {}
    waiting, attempt = list(counters), 0
    while waiting:
        stream = key(*seed, attempt)
        still = []
        for counter in waiting:
            drawn = place(stream, counter, total) if codes is None else allowed_place(stream, counter, codes)
            if drawn is None or drawn in occupied:
                still.append(counter)
            else:
                occupied.add(drawn)
                found[counter] = drawn
        waiting, attempt = still, attempt + 1
    return [found[counter] for counter in counters]


def shuffled(stream_key: int, index: int, places: Sequence[int]) -> list[int]:
    """Sort places by their hashes (as signed integers)."""
    hashes = bits(stream_key, [index * 2**40 + p for p in places]).astype(np.int64)
    return [p for _, p in sorted(zip(hashes.tolist(), places, strict=True))]


def start_places(total: int, count: int, index: int, seed: int, codes: Sequence[int] | None = None) -> list[int]:
    places = range(total) if codes is None else [p for p in codes if p >= 0]
    if count == total:
        return list(range(total))
    if 2 * count > len(places):
        return shuffled(key(seed, START_PLACES), index, places)[:count]
    return first_free((seed, START_PLACES), [index * 2**40 + slot for slot in range(count)], total, set(), codes)


@dataclass
class Tensor:
    """One weight: K slots of N places."""

    total: int
    index: int
    seed: int
    theta: np.ndarray
    places: list[int] = field(default_factory=list)
    born: list[int] = field(default_factory=list)
    codes: list[int] | None = None  # the place of each code, or -1; None: connections may be everywhere
    sign_of_place: np.ndarray | None = None  # None: hashed
    ranked: bool = False  # whether the lowest drawn place goes to the first slot that died, and so on

    def __post_init__(self) -> None:
        self.places = start_places(self.total, len(self.theta), self.index, self.seed, self.codes)
        self.born = [-1] * len(self.theta)

    @property
    def sign_seed(self) -> int:
        return key(self.seed, SIGN, self.index) % 2**63

    @property
    def signs(self) -> np.ndarray:
        if self.sign_of_place is not None:
            return self.sign_of_place[self.places]
        return signs(self.sign_seed, np.array(self.places))

    def dense(self) -> np.ndarray:
        """Return the flat weight: w_k = s_k * theta_k."""
        weight = np.zeros(self.total)
        for p, s, theta in zip(self.places, self.signs, self.theta, strict=True):
            weight[p] = s * theta
        return weight


@dataclass
class Network:
    """Several tensors and Algorithm 1."""

    tensors: list[Tensor]
    seed: int = 0

    def descend(self, gradients: Sequence[np.ndarray], lr: float) -> None:
        """theta_k <- theta_k - eta * dE/dtheta_k, rounded once."""
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            exact = tensor.theta.astype(np.float64) - np.float64(tensor.theta.dtype.type(lr)) * gradient
            tensor.theta = exact.astype(tensor.theta.dtype)

    def shrink_and_diffuse(self, step: int, lr: float, alpha: float, temperature: float = 0.0) -> None:
        """theta_k <- theta_k - eta * alpha + sqrt(2 * eta * T) * nu_k"""
        stream = key(self.seed, NOISE, step)
        for tensor in self.tensors:
            kind, slots = tensor.theta.dtype.type, range(len(tensor.theta))
            nu = normal(stream, [tensor.index * 2**40 + slot for slot in slots])
            for slot in slots:
                tensor.theta[slot] -= kind(lr * alpha)
                if temperature:
                    tensor.theta[slot] += kind(math.sqrt(2 * lr * temperature) * nu[slot])

    def rewire(self, step: int) -> list[list[int]]:
        """Connections with theta < 0 go dormant; as many dormant places, uniformly drawn, become active at theta = 0."""
        dormant = []
        for tensor in self.tensors:
            died = [slot for slot in range(len(tensor.theta)) if tensor.theta[slot] < 0]
            if len(tensor.theta) == tensor.total:  # nothing can be rewired
                tensor.theta = np.maximum(tensor.theta, 0)
                died = []
            active = {p for slot, p in enumerate(tensor.places) if slot not in died}
            allowed = range(tensor.total) if tensor.codes is None else [p for p in tensor.codes if p >= 0]
            if (4 * len(tensor.theta) <= 3 * tensor.total) if tensor.ranked else (2 * len(tensor.theta) <= len(allowed)):
                counters = [tensor.index * 2**40 + slot for slot in died]
                new = first_free((self.seed, BIRTH, step), counters, tensor.total, active, tensor.codes)
            else:
                candidates = [p for p in allowed if p not in active]
                new = shuffled(key(self.seed, BIRTH, step, 0), tensor.index, candidates)[: len(died)]
            for slot, p in zip(died, sorted(new) if tensor.ranked else new, strict=True):
                tensor.places[slot], tensor.theta[slot], tensor.born[slot] = p, 0.0, step
            dormant.append(died)
        return dormant

    def keep_active(self) -> None:
        """Take a step without rewiring: theta < 0 becomes 0."""
        for tensor in self.tensors:
            for slot in range(len(tensor.theta)):
                tensor.theta[slot] = max(tensor.theta[slot], 0.0)
