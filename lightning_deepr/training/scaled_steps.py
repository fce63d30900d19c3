"""Apply ``lr_scale`` to the steps of one optimizer: keep theta before a step, and multiply the step afterwards."""

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
        matched: the argument ``matched``; a run compares it with its present list.

    Args:
        matched: every tensor whose theta the optimizer holds, with the index of its parameter group.
        scales: the factor of each tensor's steps.
    """

    def __init__(self, matched: list[tuple[TrackedTensor, int]], scales: Sequence[float]) -> None:
        self.matched = matched
        # layers that share one theta may have different scales (by a dict)
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
        """Copy the thetas, just before the step."""
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
        """Multiply the step just after it. Call this only if the optimizer took the step.

        Raises:
            RuntimeError: the thetas before the step were not kept, or theta's storage changed in the step.
        """
        if not self.thetas:
            return
        moved = [theta.grad is not None and theta.requires_grad for theta in self.thetas]
        if not self._kept and any(moved):
            raise RuntimeError(
                "lr_scale: a step was reported that was not announced before it was taken, or a step was reported twice. "
                "Expected an optimizer whose step calls its hooks once; the step of a subclass that calls the step of its base "
                "class calls them twice. Give lr_scale=1 with such an optimizer."
            )
        self._kept = False
        self._follow(afresh=False)  # an optimizer may write its result to other memory
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
        """Update the copies and the kernel's table if the thetas' memory has changed.

        Args:
            afresh: whether the copies may be replaced. After a step they may not: they hold the thetas before it.

        Raises:
            RuntimeError: the copies no longer fit the thetas, and may not be replaced.
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


def kept_first(chain: Sequence[ScaledSteps | None]) -> ScaledSteps | None:
    """Return the outermost of some optimizers' scaled steps that was announced, and forget what inner ones kept in this step.

    Fabric's hooks announce the step of each optimizer that calls hooks; not all that hold another one do.

    Args:
        chain: the scaled steps of an optimizer and of those that it holds, the outermost first.
    """
    there = [one for one in chain if one is not None]
    announced = [one for one in there if one._kept]
    for one in announced[1:]:
        one._kept = False
    return announced[0] if announced else next(iter(there), None)


def _whole(theta: Tensor) -> Tensor:
    return theta
