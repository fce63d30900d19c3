"""Copies of a converted module whose values were mixed with those of a network that has been rewired since.

theta is a flat vector of K slots, and a slot stands for a place. ``p.lerp_(q)``, ``vector_to_parameters`` and the like combine
two thetas slot by slot: this is an average only while both have the same places. torch tells nobody of such a write. So when a
network is rewired for the first time after it was copied, each copy's theta is remembered. A copy that is used, saved or still
alive at a later rewiring has to be unchanged, follow its source (:mod:`lightning_deepr.weights.averages`), or be trained by
gradients of its own. Anything else is refused by name, before it computes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_deepr.weights.averages import link

# The places that a state_dict handed out -> the parametrization that they came from: `target.load_state_dict(net.state_dict())`
# makes a copy as `copy.deepcopy` does.
_handed_out = WeakTensorKeyDictionary()


# A parametrization -> the fingerprints in the state_dicts that it gave since its last rewiring. theta in a state_dict is the
# parameter itself, as torch's is, and the places are a copy: after a rewiring they no longer belong together.
_fingerprints: weakref.WeakKeyDictionary[Any, list[weakref.ref[Tensor]]] = weakref.WeakKeyDictionary()

STALE = (
    "expected the values and the places of one moment, found a state_dict that was kept while its network was rewired or "
    "loaded: the values in it are the network's parameters themselves, as in any state_dict, and have changed since. Keep "
    "`copy.deepcopy(net.state_dict())`."
)
MIXED = (
    "expected the values and the places of one network, found places that don't belong together, as an average of state_dicts "
    "with different connections has them. Average copies that follow the network's rewiring "
    "(`lightning_deepr.follow(copy, source)`, or AveragedModel), or dense weights (`densify`)."
)


class Doubt:
    """A copy's theta as it was when the copy's source was rewired for the first time.

    Args:
        theta: the copy's parameter.
    """

    def __init__(self, theta: Tensor) -> None:
        self.theta = theta.detach().clone()
        self.trained = theta.grad is not None
        self.rewirings = 0
        if theta.requires_grad and theta.is_leaf and not self.trained:
            mine = weakref.ref(self)

            def note(_: Tensor) -> None:
                doubt = mine()
                if doubt is not None:
                    doubt.trained = True

            theta.register_post_accumulate_grad_hook(note)

    def is_unchanged(self, theta: Tensor) -> bool:
        """Whether the copy still has its values."""
        now, then = theta.detach(), self.theta.to(theta)
        return now.shape == then.shape and bool(torch.equal(now, then) or ((now == then) | (now.isnan() & then.isnan())).all())


def note_copy(replica: Any, source: Any, memo: dict[int, Any]) -> None:
    """Record that a parametrization is a deep copy. An average and its source that are copied together stay linked.

    Args:
        replica: the copy.
        source: the original.
        memo: the memo of ``copy.deepcopy``.
    """
    derive(replica, source)
    holder = memo.get(id(source.holder()))
    if not isinstance(holder, parametrize.ParametrizationList):
        return  # its holder is not being copied, or later
    replica.hold(holder)
    followed = memo.get(id(source.followed()))
    if followed is not None:
        link(holder, replica, followed)
    for other in source.averages:
        copied, average = memo.get(id(other)), memo.get(id(other[0]))
        if copied is not None and average is not None:
            link(copied, average, replica)


def derive(replica: Any, source: Any) -> None:
    """Record that ``replica`` has its values and connections from ``source``."""
    release(replica)
    replica.copied_from = weakref.ref(source)
    if source.copies is None:
        source.copies = weakref.WeakSet()
    source.copies.add(replica)


def release(replica: Any) -> None:
    """Let a copy stand on its own."""
    source = replica.copied_from()
    if source is not None and source.copies is not None:
        source.copies.discard(replica)
    replica.copied_from, replica.doubt = nobody, None


def nobody() -> None:
    """Stand for a copy that stands on its own."""


def hand_out(slots: Any, places: Tensor, fingerprint: Tensor) -> None:
    """Record that a state_dict hands out these places, with this fingerprint."""
    _handed_out[places] = weakref.ref(slots)
    alive = [known for known in _fingerprints.get(slots, ()) if known() is not None]
    _fingerprints[slots] = [*alive, weakref.ref(fingerprint)]
    slots.has_handed_out = True


def expire(slots: Any) -> None:
    """Mark the state_dicts that a parametrization gave before its places changed: their fingerprints become NaN."""
    slots.has_handed_out = False
    with torch.no_grad():
        for known in _fingerprints.pop(slots, ()):
            fingerprint = known()
            if fingerprint is not None:
                fingerprint.fill_(torch.nan)


def places_moved(sources: list[Any]) -> None:
    """Note that tensors were rewired: for the state_dicts that they gave, and for their copies.

    Args:
        sources: as for :func:`doubt_copies`.

    Raises:
        RuntimeError: see :func:`doubt_copies`.
    """
    for source in sources:
        if source.has_handed_out:
            expire(source)
    if any(source.copies for source in sources):
        doubt_copies(sources)


def note_load(slots: Any, places: Tensor) -> None:
    """Record that a parametrization has loaded the places of a state_dict."""
    known = _handed_out.get(places)
    source = known() if known is not None else None
    release(slots)
    if source is None or source is slots or slots.followed() is source or source.total != slots.total:
        return
    derive(slots, source)
    if not torch.equal(source.places.to(slots.places.device), slots.places):
        doubt_copies([source], loaded=True)  # the source was rewired after it gave the state_dict


def doubt_copies(sources: list[Any], loaded: bool = False) -> None:
    """Remember the thetas of the sources' copies: the sources have just been rewired.

    Args:
        sources: tensors of one network; if they share a theta, all that share it.
        loaded: whether they have not been rewired, but have loaded other connections.

    Raises:
        RuntimeError: a copy was written to since the first rewiring; see :func:`check`. It is looked for at the second
            rewiring, the fourth, the eighth, ..., so that copies that are kept for long cost nothing.
    """
    seen: dict[int, Doubt] = {}
    for source in sources:
        for replica in list(source.copies or ()):
            holder = replica.holder_of_theta()
            if holder is None or replica.followed() is source:
                source.copies.discard(replica)
                continue
            theta = holder.original
            if loaded and torch.equal(replica.places, source.places.to(replica.places.device)):
                if replica.doubt is not None and replica.doubt.is_unchanged(theta):
                    replica.doubt = None
                continue  # the source has loaded the connections of its copy: an average of both is one
            if replica.doubt is None:
                if replica.owner() is not None or theta.is_meta:
                    release(replica)
                    continue
                if id(theta) not in seen:
                    seen[id(theta)] = Doubt(theta)
                replica.doubt = seen[id(theta)]
            doubt = replica.doubt
            if id(theta) in seen and seen[id(theta)] is doubt and doubt.rewirings:
                continue
            seen[id(theta)] = doubt
            doubt.rewirings += 1
            if doubt.rewirings & (doubt.rewirings - 1) == 0:
                check(replica)


def check(replica: Any) -> None:
    """Refuse a copy whose values were written while its places stayed behind those of its source.

    Raises:
        RuntimeError: the values are neither those that the copy had nor trained by gradients of its own.
    """
    doubt, holder, source = replica.doubt, replica.holder_of_theta(), replica.copied_from()
    if doubt is None or holder is None:
        return
    theta = holder.original
    if source is None or doubt.trained or theta.grad is not None or replica.owner() is not None:
        release(replica)
        return
    if doubt.is_unchanged(theta):
        return
    here, there = replica.places, source.places.to(replica.places.device)
    moved = int((here != there).sum()) if here.shape == there.shape else "some"
    raise RuntimeError(
        f"`{replica.name}` of a copy: the copy's theta was written to, and {moved} of the {here.numel()} connections of the "
        "network that it was copied from have moved since. A slot of one theta then stands for another place than the same "
        "slot of the other: an average of both (lerp_, an EMA, vector_to_parameters) mixes different connections. Call "
        "`lightning_deepr.follow(copy, source)` when the copy is made: its connections then follow each rewiring. If nothing "
        "of the network was mixed in, call `lightning_deepr.follow(copy, None)` before you write."
    )


# -- a fingerprint of the connections, for averages of state_dicts ------------------------------------------------------------


def fingerprint(places: Tensor, exceptions: Tensor, sign_seed: int) -> Tensor:
    """Compute 2 numbers from 0 to 255 that depend on the places in their order, and on their signs.

    They are floats: an average of state_dicts averages them, too, and they fit no longer if the connections differed. Small
    integers survive bfloat16.
    """
    numbers = 2 * torch.arange(places.numel(), device=places.device) + 1
    mixed = int((places * numbers).sum()) + 31 * int(exceptions.sum()) + 0x9E3779B1 * sign_seed
    for shift in (32, 16):
        mixed ^= mixed >> shift
    values = [float(mixed & 255), float(mixed >> 8 & 255)]
    return torch.tensor(values, dtype=torch.float32, device=places.device)


def fits(recorded: Tensor, expected: Tensor) -> bool:
    """Whether a recorded fingerprint is the expected one, up to rounding."""
    if recorded.shape != expected.shape:
        return False
    coarse = recorded.dtype in (torch.bfloat16, torch.float16)
    return bool(((recorded.double().cpu() - expected.double().cpu()).abs() <= (1.0 if coarse else 1e-3)).all())


def restore_integers(record: dict[str, Tensor], keys: Iterable[str]) -> bool:
    """Round the integers of a record that an average of state_dicts has made floats. Returns whether there are any."""
    averaged = [key for key in keys if key in record and record[key].is_floating_point()]
    for key in averaged:
        record[key] = record[key].round().long()
    return bool(averaged)
