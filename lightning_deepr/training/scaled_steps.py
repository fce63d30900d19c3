"""``lr_scale`` at work on one optimizer: theta before its step, and the step made longer afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_deepr import kernels
from lightning_deepr.algorithm import lr_scale
from lightning_deepr.training.tracked import TrackedTensor

if TYPE_CHECKING:
    from lightning_deepr.kernels.cpu.scaled_step import Table

AUTO = "auto"


def check_lr_scale(value: Any, where: str = "lr_scale") -> None:
    """Validate the ``lr_scale`` argument."""
    if value == AUTO:
        return
    if isinstance(value, Mapping) and where == "lr_scale":
        for pattern, entry in value.items():
            check_lr_scale(entry, f"{where}[{pattern!r}]")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        forms = 'a number, a dict of numbers or "auto"' if where == "lr_scale" else 'a number or "auto"'
        raise TypeError(f"{where}: expected {forms}, found {value!r}.")
    elif not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{where}: expected a finite number above 0 (1: the group's learning rate), found {value}.")


class ScaledSteps:
    """The thetas of one optimizer whose steps are multiplied.

    Attributes:
        matched: the tensors that this is about, as the run found them.

    Args:
        matched: every tensor whose theta the optimizer holds, with the index of its parameter group.
        scales: of each.
    """

    def __init__(self, matched: list[tuple[TrackedTensor, int]], scales: Sequence[float]) -> None:
        self.matched = matched
        # layers may share one theta, and have scales of their own (by a dict)
        members: dict[int, list[tuple[TrackedTensor, float]]] = {}
        for (tensor, _), scale in zip(matched, scales, strict=True):
            members.setdefault(id(tensor.theta), []).append((tensor, scale))
        self._members = [found for found in members.values() if any(scale != 1.0 for _, scale in found)]
        self.thetas: list[Tensor] = [found[0][0].theta for found in self._members]
        self._scales = [found[0][1] for found in self._members]
        self._in_parts = any(len({scale for _, scale in found}) > 1 for found in self._members)
        self._befores: list[Tensor] = []
        self._where: list[tuple[Any, ...]] = []
        self._table: Table | None = None
        self._kept = False

    def keep(self) -> None:
        """Just before the step."""
        if not self.thetas:
            return
        self._follow(afresh=True)
        if self._table is not None:
            self._table.keep()
        else:
            with torch.no_grad():
                torch._foreach_copy_(self._befores, self.thetas)
        self._kept = True

    def stretch(self) -> None:
        """Just after it, where it was really taken: what has a gradient has moved."""
        if not self.thetas:
            return
        moved = [theta.grad is not None and theta.requires_grad for theta in self.thetas]
        if not self._kept and any(moved):
            raise RuntimeError(
                "lr_scale: a step was reported that the callback had not been told of before it was taken. (Or it was reported twice: expected "
                "an optimizer whose step calls no step of a base class that has hooks of its own; there lr_scale has to be 1.)"
            )
        self._kept = False
        self._follow(afresh=False)  # an optimizer may put its result elsewhere
        if self._table is not None:
            self._table.stretch(moved)
            return
        thetas, befores, scales = list[Tensor](), list[Tensor](), list[float]()
        for theta, before, members, does in zip(self.thetas, self._befores, self._members, moved, strict=True):
            if not does:
                continue
            parts = members if self._in_parts else members[:1]
            for tensor, scale in parts:
                own = tensor.slots.own if self._in_parts else _whole
                thetas.append(own(theta.detach()))
                befores.append(own(before))
                scales.append(scale)
        if thetas:
            lr_scale.stretch(thetas, befores, scales)

    def _follow(self, afresh: bool) -> None:
        """Look where the thetas lie, and make anew what depends on it.

        Args:
            afresh: what was kept of the step before is not needed any more.
        """
        where = [(theta.data_ptr(), theta.dtype) for theta in self.thetas]
        if where == self._where:
            return
        kinds = [(theta.dtype, theta.device, theta.numel()) for theta in self.thetas]
        if kinds != [(before.dtype, before.device, before.numel()) for before in self._befores]:
            if not afresh:
                raise RuntimeError("lr_scale: theta has another type, size or device than before the optimizer's step.")
            self._befores = [torch.empty_like(theta.detach()) for theta in self.thetas]
        self._where, self._table = where, None
        if not self._in_parts and all(
            kernels.suits(value) for pair in zip(self.thetas, self._befores, strict=True) for value in pair
        ):
            from lightning_deepr.kernels.cpu.scaled_step import Table

            self._table = Table(self.thetas, self._befores, self._scales)


def _whole(theta: Tensor) -> Tensor:
    return theta
