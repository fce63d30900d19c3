"""The gate in front of the kernels: it refuses tensors that a kernel must not read or write.

A kernel takes addresses. It reads and writes K entries from there, whatever tensor is there now: FSDP replaces theta's memory
by a shorter piece, ``theta.data = ...`` by anything, and a fake tensor has the address 0. So every tensor is checked before the
first write of a call. PyTorch's version of a step has the same checks.

A check of a converted weight has two parts. :func:`check` compares a few numbers of each tensor with those of the last check,
and does the rest only if one of them differs. Who writes places of his own calls :func:`note` afterwards, else the next check
reads all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_deepr.kernels.slots import PLAIN, Slots

UNNAMED = "a converted weight"  # the name of slots that belong to no network
SHARD = (
    "Sharding (FSDP, DeepSpeed) does this: leave the converted layers out of it (fully_shard: do not call it on them; FSDP: "
    "ignored_states), or use DistributedDataParallel, which needs only K values per weight."
)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
# what the gate compares of each tensor; mapped over several, they take a third of the time of the same calls in Python
_ADDRESS, _COUNT, _IS_CONTIGUOUS, _DTYPE = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous, attrgetter("dtype")
TENSORS = attrgetter("places", "born", "signs", "exceptions")
LARGE = 1 << 18  # from this number of values on, a theta that a kernel has found to be finite is not read again before the step
PLACES_COUNT = 5  # where K, as the places have it, stands among what was compared
_wide = torch.int64


def foreign(value: Any) -> str | None:
    """Say what a value is if it is not an ordinary tensor with memory of its own, else return None."""
    kind = type(value)
    if kind not in PLAIN:
        return f"a {kind.__name__}"
    if _is_wrapped(value) or torch._is_functional_tensor(value):
        return "a tensor under a transform of torch.func"
    if value.is_meta:
        return "a tensor on the meta device, which has no values"
    if value.layout is not torch.strided:
        return f"a tensor of layout {value.layout}"
    if value.is_neg() or value.is_conj():
        return "a negated or conjugated view"
    size = value.element_size()
    if value.numel():
        reach = value.storage_offset() + 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        there = value.untyped_storage().nbytes()
        if reach * size > there or not value.data_ptr():
            return f"a tensor that ends at byte {reach * size} of a storage of {there} bytes"
    return None


def fault(
    value: Any,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> str | None:
    """Say how a value differs from the ordinary tensor that is expected, or return None.

    Args:
        value: what was found.
        shape, dtype, device: what is expected. None: any.
        contiguous: whether it has to be contiguous. Otherwise its entries must only be apart from each other.
    """
    found = foreign(value)
    if found is None:
        if tuple(value.shape) != tuple(shape):
            found = f"shape {tuple(value.shape)}"
        elif dtype is not None and value.dtype is not dtype:
            found = f"{value.dtype}"
        elif device is not None and value.device != device:
            found = f"a tensor on {value.device}"
        elif not value.is_contiguous() and (contiguous or _overlaps_itself(value)):
            found = f"strides {value.stride()}"
    if found is None:
        return None
    wanted = f"a plain {'' if dtype is None else f'{dtype} '}tensor of shape {tuple(shape)}"
    return f"expected {wanted}{'' if device is None else f' on {device}'}, found {found}"


def _overlaps_itself(value: Tensor) -> bool:
    dimensions = sorted((abs(step), n) for n, step in zip(value.shape, value.stride(), strict=True) if n > 1)
    reach = 0
    for step, n in dimensions:
        if step <= reach:
            return True
        reach += step * (n - 1)
    return False


# -- a converted weight with K slots ---------------------------------------------------------------------------------------


def check(theta: Tensor, slots: Slots, name: str | None = None) -> bool:
    """Refuse a theta and slots that do not fit each other.

    Args:
        theta: [K], the slots' own part, detached or not.
        slots: the slots of theta.
        name: the tensor's name, for the message.

    Returns:
        whether anything has changed since the last check of these slots.

    Raises:
        RuntimeError: the message says which tensor does not fit, what was expected, what was found and what to do.
    """
    try:
        if type(theta) not in PLAIN:
            raise TypeError
        of = (*TENSORS(slots), theta)
        places = of[0]
        version = places._version
        now = numbers_of(of)
    except (RuntimeError, AttributeError, TypeError):  # not a tensor with an address, or an inference tensor
        now = ()
    trusted = slots.trusted
    if now and trusted is not None and trusted[0] is places and trusted[3] == version and now == slots.passed:
        return False
    problem = _problem(theta, slots) or _content_problem(slots)
    if problem is not None:
        raise RuntimeError(f"{_called(name, slots)}: {problem}")
    if now and now == slots.passed:
        return False  # a rewiring without :func:`note`
    vars(slots)["passed"] = now  # (the setattr of a module is slow)
    return True


def numbers_of(of: Sequence[Tensor]) -> tuple[Any, ...]:
    """Return what the gate compares of some tensors. It raises for a tensor without an address."""
    return (*map(_ADDRESS, of), *map(_COUNT, of), *map(_IS_CONTIGUOUS, of), *map(_DTYPE, of))


def note(slots: Slots) -> tuple[Tensor, int, int, int]:
    """Record that the places were written by a rewiring, so that they are known to be valid. Returns the record."""
    places = slots.places
    mark = places, places.data_ptr(), places.numel(), 0 if places.is_inference() else places._version
    vars(slots)["trusted"] = mark
    return mark


def note_finite(slots: Any, gradient: Tensor | None) -> None:
    """Record that a kernel has made a gradient of theta whose values are all finite; None: it has made another one."""
    # The record holds the gradient's memory: nothing else gets its address while it is known. (The alias does not keep autograd
    # from taking the gradient over as it is. The setattr of a module is slow.)
    vars(slots)["finite_gradient"] = None if gradient is None else (gradient.detach(), gradient._version)


def is_finite(slots: Any, gradient: Tensor) -> bool:
    """Tell, once, whether this is the gradient that a kernel has made and found to be finite, unwritten since."""
    record = vars(slots).pop("finite_gradient", None)
    if record is None or type(gradient) not in PLAIN:
        return False
    known, version = record
    same = known.data_ptr() == gradient.data_ptr() and known.numel() == gradient.numel()
    return same and gradient._version == version


def note_finite_thetas(tensors: Sequence[Any], thetas: Sequence[Tensor], finite: Sequence[int]) -> None:
    """Record which large thetas a kernel has found to be finite, as they are now."""
    for slots, theta, fine in zip(tensors, thetas, finite, strict=True):
        if (count := theta.numel()) >= LARGE:
            vars(slots)["finite_theta"] = (theta._version, theta.data_ptr(), count) if fine else None


def is_finite_theta(slots: Any, theta: Tensor) -> bool:
    """Tell whether a kernel has found this theta to be finite, unwritten since (a write by ``.data`` is not seen)."""
    record = slots.finite_theta
    return record is not None and record == (theta._version, theta.data_ptr(), theta.numel())


def check_places(slots: Slots) -> None:
    """Refuse places that are not different numbers in 0 ... N - 1. Only what was written since the last check is read.

    Raises:
        RuntimeError: the message says what was expected, what was found and what to do.
    """
    problem = None if is_trusted(slots) else _content_problem(slots)
    if problem is not None:
        raise RuntimeError(f"{_called(None, slots)}: {problem}")


def check_values(theta: Tensor, slots: Slots) -> None:
    """Do the part of :func:`check` that a forward pass needs: theta, signs and places have K entries each, and these are valid.

    Other tensors than plain ones pass if theta and places are alike: shapes propagate through them, and no kernel runs.
    """
    places, signs = slots.places, slots.signs
    if theta.shape == places.shape == signs.shape:
        if places.is_meta or type(places) is not Tensor:
            if foreign(theta) is not None:
                return
        elif (is_trusted(slots) and type(signs) is Tensor) or (foreign(places) is not None and foreign(theta) is not None):
            return
    problem = _content_problem(slots) or _misfit(theta, slots)
    if problem is not None:
        raise RuntimeError(f"{_called(None, slots)}: {problem}")


def _misfit(theta: Tensor, slots: Slots) -> str | None:
    """Say which of theta and the signs has another shape than the places, or return None."""
    shape = tuple(slots.places.shape)
    if tuple(theta.shape) != shape:
        return f"theta: expected K = {math.prod(shape)} values, found shape {tuple(theta.shape)}. {_CHANGED}"
    found = fault(slots.signs, shape) if foreign(theta) is None else None
    return None if found is None else f"signs: {found}. {_moved(slots)}"


_CHANGED = "Its memory was exchanged after the conversion. " + SHARD
_REPAIR = "Load a state_dict of the converted network, or convert it again."


def _problem(theta: Any, slots: Slots) -> str | None:
    """Check everything but the values of the places."""
    places = slots.places
    if foreign(places) is None and places.dim() == 1:
        found = fault(theta, places.shape, device=places.device, contiguous=False)
        if found is not None:
            return f"theta: {found}. {_CHANGED}"
    elif foreign(theta) is not None:
        return f"theta: expected a plain tensor of K values, found {foreign(theta)}. {_moved(slots)}"
    shape, device = theta.shape, theta.device
    for word, value, size, dtype in (
        ("places", places, shape, _wide),
        ("births", slots.born, shape, _wide),
        ("signs", slots.signs, shape, theta.dtype),
        ("sign exceptions", slots.exceptions, None, _wide),
    ):
        found = fault(value, getattr(value, "shape", ()) if size is None else size, dtype, device)
        if found is not None:
            return f"{word}: {found}. {_moved(slots)}"
    return None


def _moved(slots: Slots) -> str:
    if isinstance(slots.places, Tensor) and slots.places.is_meta:
        return "The module was moved to the meta device: convert a network after it has its device. " + _REPAIR
    return "Move or cast the whole module (`module.to(...)`), not single tensors of it."


def _content_problem(slots: Slots) -> str | None:
    """Check the values of the places, unless they are those of the last check."""
    places, total = slots.places, slots.total
    if getattr(slots, "lost", False):
        return f"its connections were lost on the meta device, and what is there now is arbitrary memory. {_REPAIR}"
    found = fault(places, places.shape if isinstance(places, Tensor) else (), _wide)
    if found is not None:
        return f"places: {found}. {_moved(slots)}"
    if is_trusted(slots):
        return None
    problem = None
    if places.numel():
        least, most = places.aminmax()
        if int(least) < 0 or int(most) >= total:
            wrong = int(least) if int(least) < 0 else int(most)
            problem = f"places: expected numbers in 0 ... {total - 1}, found {wrong}"
        elif places.numel() > total or not _are_different(places):
            problem = f"places: expected {places.numel()} different numbers, found equal ones"
    if problem is not None:
        return f"{problem}. They were written to (state_dict() shares memory with the network), or a file is damaged. {_REPAIR}"
    vars(slots)["trusted"] = _mark(places)
    return None


def _are_different(places: Tensor) -> bool:
    ordered = places.detach().sort().values
    return not bool((ordered[1:] == ordered[:-1]).any())


def is_trusted(slots: Slots) -> bool:
    """Tell whether the places are those of the last check, in the same memory and unchanged."""
    trusted, places = slots.trusted, slots.places
    # (the tensor is compared too, and kept: else a new one could get the address of one that was checked)
    return trusted is not None and trusted[0] is places and trusted[1:] == _mark(places)[1:]


def _mark(places: Tensor) -> tuple[Tensor, int, int, int]:
    return places, places.data_ptr(), places.numel(), _version(places)


def _version(places: Tensor) -> int:
    return 0 if places.is_inference() else places._version


def _called(name: str | None, slots: Any) -> str:
    name = name or slots.name
    if name != UNNAMED:
        return f"`{name}`"
    shape = getattr(slots, "shape", None)
    return "A converted weight" if shape is None else f"A converted weight of shape {tuple(shape)}"


# -- a converted weight with a theta for every place ---------------------------------------------------------------------------


def check_dense(theta: Tensor, slots: Any, words: Sequence[str], name: str | None = None) -> bool:
    """Do what :func:`check` does for a weight whose theta has the weight's shape.

    Args:
        theta: the parameter, in the weight's shape.
        slots: the parametrization.
        words: the names of its tensors; those with an entry per place have the weight's shape, too.
        name: the tensor's name, for the message.
    """
    shape = tuple(slots.shape)
    found = fault(theta, shape, contiguous=False)
    problem = None if found is None else f"theta: {found}. {_CHANGED}"
    if problem is None and slots.lost:
        problem = f"what is beside theta was lost on the meta device. {_REPAIR}"
    for word in words:
        value = getattr(slots, word)
        if problem is None and word != "exceptions" and (foreign(value) is not None or value.numel()):
            found = fault(value, shape, device=theta.device, contiguous=False)
            problem = None if found is None else f"{word}: {found}. {_REPAIR}"
    if problem is not None:
        raise RuntimeError(f"{_called(name, slots)}: {problem}")
    where = theta.data_ptr(), theta.stride()
    if where == slots.passed:
        return False
    vars(slots)["passed"] = where
    return True


# -- several tensors of one call -------------------------------------------------------------------------------------------


def check_apart(tensors: Iterable[tuple[str, Tensor]], others: Iterable[tuple[str, Tensor]] = ()) -> None:
    """Refuse tensors that share memory.

    Args:
        tensors: the names and the tensors that a call writes. Each needs memory of its own.
        others: further ones, which may equal each other or one of ``tensors`` as a whole (an optimizer's state), but no part.

    Raises:
        RuntimeError: two of them share memory; the message names both.
    """
    spans = sorted(
        ((*_span(value), name, own) for own, group in ((True, tensors), (False, others)) for name, value in group),
        key=lambda span: span[:2],
    )
    furthest = None
    for span in spans:
        first, end, name, own = span
        if first == end:
            continue
        if furthest is not None and first < furthest[1]:
            whole = (first, end) == furthest[:2] and not (own and furthest[3])
            if not whole:
                raise RuntimeError(
                    f"{furthest[2]} and {name} share memory: expected memory of its own for each. One of them was exchanged "
                    "after the conversion (`.data = ...`, a view): give it a clone."
                )
        if furthest is None or end > furthest[1]:
            furthest = span


def _span(value: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the byte after its last one."""
    if value.numel() == 0:
        return 0, 0
    reach = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + reach * value.element_size()


def check_states(states: Iterable[tuple[Any, ...]], theta: Tensor, slots: Any) -> None:
    """Refuse state tensors of an optimizer that a kernel must not write.

    Args:
        states: records with one tensor each.
        theta: [K], the slots' own part.
        slots: the slots of theta.

    Raises:
        RuntimeError: a tensor differs from theta in size or device, is no plain one, or shares memory.
    """
    found = [value for one in states for value in one if isinstance(value, Tensor)]
    for value in found:
        problem = fault(value, theta.shape, device=theta.device)
        if problem is not None:
            raise RuntimeError(f"{_called(None, slots)}: a tensor of the optimizer's state: {problem}.")
    name = _called(None, slots)
    check_apart(slots_of_step(name, theta, slots), [(f"the optimizer's state of `{name}`", value) for value in found])


def slots_of_step(name: str, theta: Tensor, slots: Any) -> list[tuple[str, Tensor]]:
    """Name the tensors of a converted weight that a step writes."""
    return [
        (f"theta of `{name}`", theta),
        *((f"the {word} of `{name}`", value) for word in ("places", "born", "signs") for value in (getattr(slots, word),)),
    ]
