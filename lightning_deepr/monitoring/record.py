"""What is noted after each step: the places that have been tried, and how long connections lived."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.kernels.cpu.fields import NotesWords
from lightning_deepr.weights.k_slots import KSlots

BINS = 64  # lifetimes 1, 2, 3-4, 5-8, ...: the last step of bin b is 2 ** b
PLACES_PER_CONNECTION = 64  # of a tensor with more places, a sample of so many is watched: 8 bytes per connection, as a place
ALWAYS_ALL = 1 << 20  # places of a tensor that are watched in any case
_TRIED = int(NotesWords.TRIED)


def stride_of(total: int, count: int, columns: int) -> int:
    """Choose which places are watched: every so-manieth one, 1 for all of them.

    A stride shares no divisor with the columns, so that all columns are watched alike.
    """
    stride = -(-total // max(ALWAYS_ALL, PLACES_PER_CONNECTION * max(count, 1)))
    while math.gcd(stride, max(columns, 1)) > 1:
        stride += 1
    return stride


class TensorRecord:
    """The notes about one tensor. The backends of the step write them (:mod:`lightning_deepr.training.backends`).

    They take one bit for each place of a tensor of up to 2^20 places or 64 K places. Of a larger one, every so-manieth place is
    watched, which is at most 8 bytes per connection.

    Args:
        slots: the tensor's slots.
        step: the number of steps before the record.
        lives: whether to note how long connections live.
    """

    def __init__(self, slots: KSlots, step: int, lives: bool) -> None:
        self.slots, device = slots, slots.places.device
        self.stride = stride_of(slots.total, slots.count, slots.columns)
        self.watched = -(-slots.total // self.stride)
        self.words = torch.zeros(-(-self.watched // 64), dtype=torch.int64, device=device)
        self.lives = torch.zeros(BINS, dtype=torch.int64, device=device) if lives else None
        self.begun, self.since = step, step if step else -1  # the start's connections have the birth -1
        self.kernels = np.zeros(len(NotesWords), np.int64)  # the CPU kernel reads and writes it
        for word, value in (
            (NotesWords.WORDS, self.words.data_ptr()), (NotesWords.STRIDE, self.stride), (NotesWords.SINCE, self.since),
            (NotesWords.LIVES, 0 if self.lives is None else self.lives.data_ptr()),
        ):  # fmt: skip
            self.kernels[word] = value
        self.address = self.kernels.ctypes.data
        self.others: Tensor | int = 0  # bits that PyTorch has set
        self._mark(slots.places, None)
        self.first = self.last = np.sort(slots.places.cpu().numpy())
        # on a device, and for layers that share a theta: places and births before the step
        needs_before = lives and (bool(slots.shares) or not slots.places.is_cpu)
        self._before = (slots.places.clone(), slots.born.clone()) if needs_before else None

    @property
    def tried(self) -> int:
        """The number of watched places that have been tried."""
        return int(self.kernels[_TRIED]) + int(self.others)

    def _mark(self, places: Tensor, new: Tensor | None) -> None:
        """Note that different places are tried; with ``new``, bool [places], only some. The host waits for no device."""
        if self.stride > 1:
            watched = places % self.stride == 0
            new, places = watched if new is None else new & watched, places // self.stride
        word, bit = places >> 6, torch.ones_like(places) << (places & 63)
        if new is not None:
            word, bit = torch.where(new, word, 0), torch.where(new, bit, 0)
        fresh = torch.where((self.words[word] & bit) == 0, bit, 0)
        self.words.index_add_(0, word, fresh)  # places differ, so that adding a bit sets it
        self.others = self.others + (fresh != 0).sum()

    def note(self, born: Tensor, places: Tensor, step: int) -> None:
        """Note a step that is about to move some slots.

        Args:
            born: int64 [R], the births of the connections that die.
            places: int64 [R], the places of the newborns.
            step: the number of the step.
        """
        if places.device == self.words.device:
            self._mark(places, None)
            self._count_lives(step - born, born >= self.since)

    def note_on_device(self, step: int) -> None:
        """Note a step that has moved slots, of which only the device knows."""
        slots = self.slots
        if slots.places.device != self.words.device:
            return
        new = slots.born == step
        self._mark(slots.places, new)
        if self._before is not None:
            born = self._before[1]
            self._count_lives(step - born, new & (born >= self.since))
            self._before = slots.places, torch.where(new, step, born)

    def note_shared(self, step: int) -> None:
        """Note a step in which slots have moved from layer to layer: the connections are found again by their places."""
        slots = self.slots
        if slots.places.device != self.words.device:
            return
        self._mark(slots.places, slots.born == step)
        if self._before is None:
            return
        places, born = self._before
        self._before = slots.places.clone(), slots.born.clone()
        ordered, order = slots.places.sort()
        stays = torch.zeros_like(places, dtype=torch.bool)
        if len(ordered):
            at = torch.searchsorted(ordered, places).clamp_(max=len(ordered) - 1)
            stays = (ordered[at] == places) & (slots.born[order][at] == born)
        self._count_lives(step - born, ~stays & (born >= self.since))

    def _count_lives(self, lives: Tensor, which: Tensor) -> None:
        if self.lives is not None:
            kind = torch.ceil(torch.log2(lives.clamp(min=1).double())).long()
            self.lives.index_add_(0, kind.clamp_(max=BINS - 1), which.long())

    # -- what is read -----------------------------------------------------------------------------------------------------

    @property
    def explored(self) -> float:
        """The share of the (allowed) places that have ever had a connection since the record began."""
        allowed = self.slots.allowed
        among = self.watched if allowed is None else allowed.count / self.stride
        return min(self.tried / max(among, 1), 1.0)

    def overlap(self, with_first: bool) -> float:
        """Return the share of the present connections whose places had one at the start of the record, or at the last look."""
        other, places = self.first if with_first else self.last, np.sort(self.slots.places.cpu().numpy())
        return len(np.intersect1d(other, places, assume_unique=True)) / len(places) if len(places) else 1.0

    def look(self) -> None:
        """Remember the present places for the next :meth:`overlap`."""
        self.last = np.sort(self.slots.places.cpu().numpy())

    def state(self) -> dict[str, Any]:
        """Return the places that have been tried, for a checkpoint: compressed bits as text, which two states can compare."""
        bits = base64.b85encode(zlib.compress(self.words.cpu().numpy().tobytes(), 1)).decode()
        return {"bits": bits, "tried": self.tried, "stride": self.stride}

    def load(self, state: dict[str, Any]) -> None:
        """Continue with the places of a checkpoint."""
        words = torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(state["bits"]))), dtype=torch.int64)
        if state["stride"] == self.stride and words.shape == self.words.shape:
            self.words.copy_(words)
            self.others, self.kernels[_TRIED] = int(state["tried"]), 0


def _bins(lived: np.ndarray) -> np.ndarray:
    """Return the bins of some numbers of steps, without those of 0 steps."""
    return np.ceil(np.log2(lived[lived > 0])).astype(np.int64)


def survival(records: Sequence[TensorRecord], step: int) -> dict[int, float]:
    """Return {lifetime 2^b: the share of the connections that live longer}.

    It is the product over the bins up to b of 1 - deaths / at risk (Kaplan and Meier). Bin b has the lifetimes from 2^(b-1) + 1
    to 2^b steps, bin 0 the lifetime 1. At risk are the connections that died in this bin or a later one, and the living ones
    whose age is above 2^(b-1). Connections that are older than the record do not count.

    Args:
        records: the tensors.
        step: the number of steps so far.
    """
    known = [(one, one.lives) for one in records if one.lives is not None]
    if not known:
        return {}
    deaths = np.sum([lives.cpu().numpy() for _, lives in known], axis=0)
    ages = [step - 1 - born[born >= one.since] for one, _ in known for born in (one.slots.born.cpu().numpy(),)]
    alive = np.bincount(_bins(np.concatenate(ages)), minlength=BINS)
    died_since, alive_since = deaths[::-1].cumsum()[::-1], alive[::-1].cumsum()[::-1]
    observed = step - min(one.begun for one in records)
    found, share = {}, 1.0
    for number in range(BINS):
        at_risk = int(died_since[number] + alive_since[number])
        if at_risk == 0 or 2**number > observed:
            break
        share *= 1 - int(deaths[number]) / at_risk
        found[2**number] = share
    return found
