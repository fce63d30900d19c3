"""The words of the step's table that the kernels of the CPU and of Triton share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels.cpu.fields import STATE_WORDS, Row, StateRow
from lightning_deepr.kernels.slots import Slots


def write_location(row: np.ndarray, theta: Tensor, tensor: Slots) -> None:
    """Write the addresses of a tensor, and the counter and the seed that make its draws and signs its own.

    Args:
        row: the int64 words of the tensor.
        theta: [K].
        tensor: the slots of theta.
    """
    row[Row.THETA], row[Row.PLACES], row[Row.BORN] = theta.data_ptr(), tensor.places.data_ptr(), tensor.born.data_ptr()
    row[Row.SIGNS], row[Row.EXCEPTIONS] = tensor.signs.data_ptr(), tensor.exceptions.data_ptr()
    row[Row.EXCEPTION_COUNT] = tensor.exceptions.numel()
    row[Row.COUNTER], row[Row.SIGN_SEED] = tensor.index << randomness.SLOT_BITS, tensor.sign_seed


def write_states(row: np.ndarray, starts: np.ndarray, first: int, states: Sequence[tuple[int, int, float, int]]) -> None:
    """Write down the state tensors that the kernel resets.

    Args:
        row: the int64 words of the tensor.
        starts: the same words in the type of the starting values.
        first: the position of the first word of the states.
        states: (address, bytes of an entry, starting value, whether it is averaged) of each state tensor.
    """
    row[Row.STATES] = len(states)
    for i, (address, size, start, averaged) in enumerate(states):
        entry = first + STATE_WORDS * i
        row[entry + StateRow.ADDRESS], row[entry + StateRow.SIZE], row[entry + StateRow.AVERAGED] = address, size, averaged
        starts[entry + StateRow.START] = start
