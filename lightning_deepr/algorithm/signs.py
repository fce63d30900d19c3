"""Signs of places by a table: Dale's law (one sign for each input unit), or signs that a user gives.

Without a table, the sign of a place is a hash of it (:func:`lightning_deepr.algorithm.randomness.signs_of`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.units import Units


@dataclass(frozen=True, eq=False)
class Dale:
    """Dale's law: all connections from one input unit have one sign.

    A tensor keeps one bit for each input unit. The gates of an LSTM share their input units.

    Args:
        excitatory: the share of excitatory units, from 0 to 1; exactly ``round(share * units)`` of them are drawn from the
            seed. Or the units themselves: a bool vector (True: excitatory), or numbers of which the sign counts.
        balanced: whether the start balances excitation and inhibition: with a share f, magnitudes are multiplied by
            sqrt((1 - f) / f) for excitatory units and by sqrt(f / (1 - f)) for inhibitory ones. The sum of the squares, and so
            the variance of the layer's output, is kept, and the mean of the weights is 0. (Song, Yang and Wang, "Training
            excitatory-inhibitory recurrent neural networks for cognitive tasks", PLOS Computational Biology 2016, balance the
            start, too.)
        seed: what the draw of the units depends on. None: the callback's seed and the tensor's number, so that tensors have
            different units. Tensors with the same seed and the same number of input units have the same excitatory ones.

    Example::

        >>> import torch
        >>> from lightning_deepr import sparsify
        >>> net = sparsify(torch.nn.Linear(50, 40), 0.2, signs=Dale(excitatory=0.8))
        >>> weight = net.weight.detach()
        >>> int(((weight > 0).any(0) & (weight < 0).any(0)).sum())  # columns with both signs
        0
    """

    excitatory: float | Any = 0.8
    balanced: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        share = self.excitatory
        if not isinstance(self.balanced, bool):
            raise TypeError(f"Dale: balanced: expected True or False, found {self.balanced!r}.")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"Dale: seed: expected an int or None, found {self.seed!r}.")
        if isinstance(share, (Tensor, np.ndarray, Sequence)) and not isinstance(share, str):
            vector = torch.as_tensor(share)
            if vector.dim() != 1 or vector.is_complex():
                raise ValueError(f"Dale: expected one sign for each input unit, a vector, found shape {tuple(vector.shape)}.")
            if vector.dtype is not torch.bool:
                if bool((vector == 0).any()) or bool((vector != vector).any()):
                    raise ValueError("Dale: expected a sign for each input unit, found 0 or NaN among them.")
                vector = vector > 0
            object.__setattr__(self, "excitatory", vector.cpu())
            return
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f"Dale: excitatory: expected a share from 0 to 1 or a vector of signs, found {share!r}.")
        if not 0 <= share <= 1:
            raise ValueError(f"Dale: excitatory: expected a share from 0 to 1, found {share}.")


class SignTable:
    """The signs of a weight's places: one bit for each input unit, or for each place.

    The entry of a place is ``place // inner % length + length * (place // block)``.

    Args:
        rule: (inner, length, block).
        bits: int64, the words of the bits, 1 for a negative sign; bit i is bit ``i & 63`` of word ``i >> 6``.
        size: the number of bits.
        scales: what the start multiplies the magnitudes of positive and of negative places by.
    """

    def __init__(
        self, rule: tuple[int, int, int], bits: Tensor, size: int, scales: tuple[float, float] = (1.0, 1.0), text: str = ""
    ) -> None:
        self.inner, self.length, self.block = rule
        self.bits, self.size, self.scales = bits, size, scales
        self.text = text
        self.kernel_table: Any = None  # what the compiled kernels read, made at their first use
        self._on: dict[torch.device, Tensor] = {bits.device: bits}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SignTable):
            return NotImplemented
        return self is other or (
            (self.inner, self.length, self.block, self.size) == (other.inner, other.length, other.block, other.size)
            and torch.equal(self.bits.cpu(), other.bits.cpu())
        )

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return self.text

    def __deepcopy__(self, memo: dict[int, Any]) -> SignTable:
        return self  # nothing in it changes

    def on(self, device: torch.device) -> Tensor:
        """Return the words on a device."""
        if device not in self._on:
            self._on[device] = self.bits.to(device)
        return self._on[device]

    def are_negative(self, places: Tensor) -> Tensor:
        """Tell which places have a negative sign: bool."""
        entry = places // self.inner % self.length + self.length * (places // self.block)
        return ((self.on(places.device)[entry >> 6] >> (entry & 63)) & 1).bool()

    def signs_of(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sign of each place, +1 or -1."""
        return torch.where(self.are_negative(places), -1.0, 1.0).to(dtype)

    def scales_of(self, places: Tensor, dtype: torch.dtype) -> Tensor | float:
        """Return the factor of the starting magnitude of each place."""
        if self.scales == (1.0, 1.0):
            return 1.0
        return torch.where(self.are_negative(places), self.scales[1], self.scales[0]).to(dtype)

    def record(self) -> tuple[list[int], Tensor]:
        """Return the rule and the size as whole numbers, and the words; :meth:`of_record` reads both."""
        return [self.inner, self.length, self.block, self.size], self.bits

    @classmethod
    def of_record(cls, numbers: Sequence[int], bits: Tensor, total: int) -> SignTable:
        """Read a record.

        Raises:
            ValueError: it is damaged, or that of another weight.
        """
        found = [int(number) for number in numbers]
        if len(found) != 4 or min(found) < 1 or bits.dtype is not torch.int64 or bits.numel() != (found[3] + 63) // 64:
            raise ValueError(f"signs: expected four numbers and a table, found {found} and {bits.numel()}: it is damaged.")
        inner, length, block, size = found
        if length * ((total - 1) // block) + min(length - 1, (total - 1) // inner) >= size:
            raise ValueError(f"signs: expected a table for {total} places, found one of {size} entries: it is damaged.")
        return cls((inner, length, block), bits, size, text="given" if size == total else "Dale")


def pack(negative: Tensor) -> Tensor:
    """Pack a bool vector into int64 words."""
    padded = torch.zeros(-(-negative.numel() // 64) * 64, dtype=torch.bool)
    padded[: negative.numel()] = negative
    power = torch.ones(64, dtype=torch.long) << torch.arange(64)
    return torch.cat([(part.view(-1, 64) * power).sum(1) for part in padded.split(1 << 22)])


def bind(given: Any, units: Units, shape: Sequence[int], seed: int, index: int) -> SignTable | None:
    """Fit what a user gives as the signs of a tensor.

    Args:
        given: "place" (the hash) | :class:`Dale` | a tensor of signs in the weight's shape.
        units: the layout of the weight.
        shape: the weight's shape.
        seed, index: what the draw of the excitatory units depends on.

    Returns:
        the table; None for the hash.

    Raises:
        ValueError: it does not fit; the message is the end of a sentence about the tensor.
    """
    if isinstance(given, str):
        return None
    if isinstance(given, Dale):
        return _dale(given, units, seed, index)
    if tuple(given.shape) != tuple(shape):
        raise ValueError(
            f"expected signs of shape {tuple(shape)}, found {tuple(given.shape)}. (One sign for each input unit: Dale(vector).)"
        )
    if given.device.type == "meta":
        raise ValueError("expected signs with values, found a tensor on the meta device")
    flat = given.detach().reshape(-1).cpu()
    positive = flat if flat.dtype is torch.bool else flat > 0
    if flat.dtype is not torch.bool and not bool(((flat > 0) | (flat < 0)).all()):
        wrong = int((~((flat > 0) | (flat < 0))).nonzero()[0])
        raise ValueError(f"expected a sign, +1 or -1, at each place, found {float(flat[wrong])} at place {wrong}")
    total = max(units.total, 1)
    return SignTable((1, total, total), pack(~positive), total, text="given")


def _dale(given: Dale, units: Units, seed: int, index: int) -> SignTable:
    inputs = units.inputs
    if isinstance(given.excitatory, Tensor):
        if given.excitatory.numel() != inputs:
            raise ValueError(f"expected Dale's signs for {inputs} input units, found {given.excitatory.numel()}")
        positive = given.excitatory
    else:
        count = round(given.excitatory * inputs)
        unit = torch.arange(inputs)
        number = index if given.seed is None else 0
        stream = randomness.key(seed if given.seed is None else given.seed, randomness.DALE)
        order = randomness.bits(stream, randomness.counters(number, unit)).argsort(stable=True)
        positive = torch.zeros(inputs, dtype=torch.bool)
        positive[order[:count]] = True
    share = int(positive.sum()) / max(inputs, 1)
    scales = 1.0, 1.0
    if given.balanced and 0 < share < 1:
        scales = math.sqrt((1 - share) / share), math.sqrt(share / (1 - share))
    return SignTable(units.input_rule, pack(~positive), inputs, scales, text=f"Dale({share:.3g})")


def check(given: Any, argument: str = "signs", words: Sequence[str] = ("place",)) -> None:
    """Check what a user gives as signs, before there is a weight.

    Args:
        given: a word, :class:`Dale`, a tensor, or a dict of these by pattern.
        argument: its name, for the message.
        words: the words that are accepted.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if isinstance(given, dict):
        if not given:
            raise ValueError(f"{argument}: expected at least one pattern, found an empty dict.")
        for pattern, value in given.items():
            check(value, f"{argument}[{pattern!r}]", words)
        return
    if isinstance(given, (Dale, Tensor)) or (isinstance(given, str) and given in words):
        return
    expected = " or ".join(f'"{word}"' for word in words)
    if given == "free":
        raise ValueError(
            f'{argument}: expected {expected}, Dale(...) or a tensor of signs, found "free": here a connection whose sign '
            "would change goes dormant, so each place has one sign for good. Signs are free in SET, RigL and "
            'FixedRandom(signs="free").'
        )
    raise ValueError(f"{argument}: expected {expected}, Dale(excitatory=0.8) or a tensor of signs, found {given!r}.")
