"""How many connections each unit has."""

from __future__ import annotations

import numpy as np
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_deepr.conversion.kinds import kind_of
from lightning_deepr.weights.find import Converted
from lightning_deepr.weights.k_slots import KSlots


def degrees_of(converted: Converted) -> tuple[np.ndarray, np.ndarray]:
    """Count the connections of each output unit and of each input unit of a tensor.

    Returns:
        int64 [outputs] and int64 [inputs]. Each gate of a recurrent layer has output units of its own.
    """
    slots = converted.slots
    units = kind_of(type_before_parametrizations(converted.module)).units(converted.module, tuple(slots.shape))
    places = (slots.places if isinstance(slots, KSlots) else slots.active(converted.theta)[0]).cpu().numpy()
    entry = places // units.inner if units.inner > 1 else places
    rest, minor = np.divmod(entry, units.minors)
    group, major = np.divmod(rest, units.majors)
    row, column = (minor, major) if units.transposed else (major, minor)
    inputs = group * units.columns + column if units.grouped else column
    outputs = group * units.rows + row
    return np.bincount(outputs, minlength=units.groups * units.rows), np.bincount(inputs, minlength=units.inputs)
