"""Recordings as samples: from arrays of any kind to int16, and from a higher rate to a lower one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Samples = np.ndarray[Any, np.dtype[np.int16]]
_ZEROS = 24  # zero crossings of the low-pass filter on either side
_BLOCK = 4096  # output samples that are computed at a time


def samples_of(wave: Any) -> Samples:
    """Bring a recording to int16 [samples].

    Args:
        wave: an array or tensor [samples] or [1, samples], int16, or floats in -1 to 1.

    Raises:
        TypeError: it is no array and no tensor.
        ValueError: it has another shape, another type, or values out of range.
    """
    if isinstance(wave, torch.Tensor):
        wave = wave.detach().cpu().numpy()
    if not isinstance(wave, np.ndarray):
        raise TypeError(f"expected a recording: an array or a tensor of samples, found {type(wave).__name__}.")
    if wave.ndim == 2 and 1 in wave.shape:
        wave = wave.reshape(-1)
    if wave.ndim != 1:
        raise ValueError(f"expected one channel, [samples], found shape {list(wave.shape)}: take one channel or their mean.")
    if wave.dtype == np.int16:
        return wave
    if wave.dtype.kind != "f":
        raise ValueError(f"expected samples of int16, or floats in -1 to 1, found {wave.dtype}.")
    largest = float(np.abs(wave).max(initial=0))
    if not largest <= 1:  # NaN, too
        raise ValueError(f"expected floats in -1 to 1, found {largest:g}: divide them by their scale (32,768 for 16 bits).")
    return np.clip(np.round(wave.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """Convert a recording to a lower rate, through a low-pass filter (a windowed sinc).

    Args:
        samples: int16 [samples].
        rate: its samples per second.
        wanted: the samples per second to convert to.

    Raises:
        ValueError: ``rate`` is lower than ``wanted``, or no rate.

    Example::

        >>> len(resample(np.zeros(48_000, np.int16), 48_000, 16_000))
        16000
    """
    if rate == wanted:
        return samples
    if isinstance(rate, bool) or not rate > wanted:
        raise ValueError(
            f"rate: expected at least {wanted:,} samples per second, found {rate}: a recording of a lower rate lacks high "
            "frequencies that the network was trained with."
        )
    step = rate / wanted  # input samples per output sample
    reach = int(np.ceil(_ZEROS * step))
    padded = np.pad(samples.astype(np.float64), reach + 1)
    found = np.empty(int(len(samples) / step), np.float64)
    offsets = np.arange(-reach, reach + 1)
    for first in range(0, len(found), _BLOCK):
        at = np.arange(first, min(first + _BLOCK, len(found))) * step
        whole = np.floor(at).astype(np.int64)
        distance = (offsets - (at - whole)[:, None]) / step  # in output samples
        window = np.cos(np.clip(distance / (_ZEROS + 1), -1, 1) * np.pi / 2) ** 2
        kernel = np.sinc(distance) * window
        kernel /= kernel.sum(1, keepdims=True)
        found[first : first + len(at)] = (padded[whole[:, None] + offsets + reach + 1] * kernel).sum(1)
    return np.clip(np.round(found), -32768, 32767).astype(np.int16)
