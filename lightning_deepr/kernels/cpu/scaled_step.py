"""Keep theta before the optimizer's step, and multiply its step afterwards, for all tensors in one call.

The arithmetic is that of ``lr_scale.stretch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numba import carray
from torch import Tensor

from lightning_deepr.kernels.cpu.fields import SCALED_WORDS, ScaledPhase, ScaledRow, filler
from lightning_deepr.kernels.cpu.fields import ScaledArguments as A
from lightning_deepr.kernels.cpu.native import Kernel, fetch_add, load_float, load_int64, pointer, threads_for

PIECE = 1 << 14  # slots per task
GRAIN = 1 << 16  # slots per thread

_fill = filler(A)
_TASK, _PHASE = int(A.TASK), int(A.PHASE)
_KEEP, _STRETCH = int(ScaledPhase.KEEP), int(ScaledPhase.STRETCH)


@cache
def scaled_step_kernel() -> Kernel:
    """A task is a row of the table."""

    def scaled_step(a: int) -> None:
        phase, rows, table = load_int64(a + 8 * A.PHASE), load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.TABLE)
        task = fetch_add(a + 8 * A.TASK, 1)
        while task < rows:
            t = table + 8 * SCALED_WORDS * task
            theta, before = load_int64(t + 8 * ScaledRow.THETA), load_int64(t + 8 * ScaledRow.BEFORE)
            count, factor = load_int64(t + 8 * ScaledRow.COUNT), load_float(t + 8 * ScaledRow.FACTOR, 8)
            if load_int64(t + 8 * ScaledRow.SIZE) == 4:
                now, was = carray(pointer(theta), count, np.float32), carray(pointer(before), count, np.float32)
                if phase == ScaledPhase.KEEP:
                    for k in range(count):
                        was[k] = now[k]
                elif load_int64(t + 8 * ScaledRow.MOVED):
                    single = np.float32(factor)
                    for k in range(count):
                        now[k] = was[k] + single * (now[k] - was[k])
            else:
                wide_now, wide_was = carray(pointer(theta), count, np.float64), carray(pointer(before), count, np.float64)
                if phase == ScaledPhase.KEEP:
                    for k in range(count):
                        wide_was[k] = wide_now[k]
                elif load_int64(t + 8 * ScaledRow.MOVED):
                    for k in range(count):
                        wide_now[k] = wide_was[k] + factor * (wide_now[k] - wide_was[k])
            task = fetch_add(a + 8 * A.TASK, 1)

    return Kernel(scaled_step)


class Table:
    """The kernel's table of some thetas and of their copies. It holds memory addresses, so the tensors must not move.

    Args:
        thetas: contiguous float32 or float64 tensors on the CPU.
        befores: their copies, each with the dtype and size of its theta.
        factors: the factor of each theta's step.
    """

    def __init__(self, thetas: Sequence[Tensor], befores: Sequence[Tensor], factors: Sequence[float]) -> None:
        sizes = [theta.numel() for theta in thetas]
        pieces = [(i, first) for i, size in enumerate(sizes) for first in range(0, size, PIECE)]
        self.fields = np.zeros((len(pieces), SCALED_WORDS), np.int64)
        for row, (i, first) in zip(self.fields, pieces, strict=True):
            size = thetas[i].element_size()
            row[ScaledRow.THETA] = thetas[i].data_ptr() + first * size
            row[ScaledRow.BEFORE] = befores[i].data_ptr() + first * size
            row[ScaledRow.COUNT], row[ScaledRow.SIZE] = min(PIECE, sizes[i] - first), size
        self.owners = np.array([i for i, _ in pieces], np.int64)
        self.fields.view(np.float64)[:, ScaledRow.FACTOR] = np.array(factors, np.float64)[self.owners]
        self.moved: Sequence[bool] = ()
        self.work = sum(sizes)
        self.arguments = _fill(ROWS=len(pieces), TABLE=self.fields.ctypes.data)

    def keep(self) -> None:
        """Copy the thetas: before <- theta."""
        self._call(_KEEP)

    def stretch(self, moved: Sequence[bool]) -> None:
        """Multiply the steps: theta <- before + factor * (theta - before).

        Args:
            moved: whether the optimizer took a step on each theta. The other thetas do not change.
        """
        if moved != self.moved:
            self.moved = moved
            self.fields[:, ScaledRow.MOVED] = np.array(moved, np.int64)[self.owners]
        self._call(_STRETCH)

    def _call(self, phase: int) -> None:
        arguments = self.arguments
        arguments[_TASK], arguments[_PHASE] = 0, phase
        scaled_step_kernel()(arguments, threads_for(self.work, GRAIN))
