"""What the step's table holds of a tensor on the CPU and in Triton alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels.cpu.fields import STATE_WORDS, Row, StateRow
from lightning_deepr.kernels.slots import Slots


def write_location(row: np.ndarray, theta: Tensor, tensor: Slots) -> None:
    """Where a tensor lies, and what tells its draws and signs from those of others.

    Args:
        row: int64, the tensor's words.
    """
    row[Row.THETA], row[Row.PLACES], row[Row.BORN] = theta.data_ptr(), tensor.places.data_ptr(), tensor.born.data_ptr()
    row[Row.SIGNS], row[Row.EXCEPTIONS] = tensor.signs.data_ptr(), tensor.exceptions.data_ptr()
    row[Row.EXCEPTION_COUNT] = tensor.exceptions.numel()
    row[Row.COUNTER], row[Row.SIGN_SEED] = tensor.index << randomness.SLOT_BITS, tensor.sign_seed


def write_states(row: np.ndarray, starts: np.ndarray, first: int, states: Sequence[tuple[int, int, float]]) -> None:
    """The state tensors that the kernel resets.

    Args:
        row: int64, the tensor's words.
        starts: the same words as the numbers that starting values are written as.
        first: the first word of the states.
        states: address, bytes of an entry and starting value of each.
    """
    row[Row.STATES] = len(states)
    for i, (address, size, start) in enumerate(states):
        entry = first + STATE_WORDS * i
        row[entry + StateRow.ADDRESS], row[entry + StateRow.SIZE] = address, size
        starts[entry + StateRow.START] = start
