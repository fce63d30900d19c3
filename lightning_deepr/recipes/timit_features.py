"""39 features per 10 ms frame: 13 MFCC of a 25 ms window, their deltas and delta-deltas.

The MFCC are Kaldi's (``kaldi-native-fbank``), deterministic (no dither): pre-emphasis .97, Povey window, 512-point power
spectrum, 23 mel bands from 20 Hz to 8 kHz, logarithm, orthonormal DCT-II, C0 to C12 liftered by 22. The deltas are HTK's
regression over two frames on either side, with the edge frames repeated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_deepr.recipes.timit_files import INSTALL, RATE

VERSION = 1
"""Version of the features, part of the cache's key; raise it whenever the same settings give other features."""


@dataclass(frozen=True)
class FeatureSettings:
    """Settings of the features.

    Args:
        coefficients: number of MFCC per frame; a frame has three times as many features.
        mel_bands: number of mel bands in the filter bank.
        window_ms, shift_ms: length of a frame's window and distance between frames, in milliseconds.
        delta_window: number of frames on either side in the deltas' regression.
    """

    coefficients: int = 13
    mel_bands: int = 23
    window_ms: float = 25.0
    shift_ms: float = 10.0
    delta_window: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.coefficients <= self.mel_bands or self.delta_window < 1 or min(self.window_ms, self.shift_ms) <= 0:
            raise ValueError(
                "features: expected 1 <= coefficients <= mel_bands, delta_window >= 1 and positive window_ms and shift_ms, "
                f"found {asdict(self)}."
            )

    @property
    def dimension(self) -> int:
        """Features per frame."""
        return 3 * self.coefficients

    @property
    def window(self) -> int:
        """Samples in a window."""
        return round(self.window_ms * RATE / 1000)

    @property
    def shift(self) -> int:
        """Samples from frame to frame."""
        return round(self.shift_ms * RATE / 1000)

    def frames(self, samples: int) -> int:
        """Count the frames whose window lies inside ``samples`` samples of audio."""
        return 0 if samples < self.window else 1 + (samples - self.window) // self.shift

    def centres(self, samples: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the sample in the middle of each frame's window, which decides the frame's label: int64 [frames]."""
        return np.arange(self.frames(samples), dtype=np.int64) * self.shift + self.window // 2


def mfcc(samples: np.ndarray[Any, Any], settings: FeatureSettings | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Compute mel-frequency cepstral coefficients.

    Args:
        samples: int16 [samples] at 16 kHz.
        settings: settings of the features; None: the default settings.

    Returns:
        float32 [frames, coefficients].

    Raises:
        ImportError: ``kaldi-native-fbank`` is not installed.
    """
    settings = settings or FeatureSettings()
    try:
        import kaldi_native_fbank as kaldi
    except ImportError as error:
        raise ImportError(
            f"TIMIT's features need `kaldi-native-fbank`, which can't be imported ({error}): {INSTALL}"
        ) from error
    options = kaldi.MfccOptions()
    options.frame_opts.samp_freq = RATE
    options.frame_opts.frame_length_ms = settings.window_ms
    options.frame_opts.frame_shift_ms = settings.shift_ms
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = settings.mel_bands
    options.num_ceps = settings.coefficients
    options.use_energy = False
    computer = kaldi.OnlineMfcc(options)
    computer.accept_waveform(RATE, samples.astype(np.float32))
    computer.input_finished()
    count = computer.num_frames_ready
    if count == 0:
        return np.zeros((0, settings.coefficients), dtype=np.float32)
    return np.stack([np.asarray(computer.get_frame(t), dtype=np.float32) for t in range(count)])


def deltas(x: np.ndarray[Any, Any], window: int = 2) -> np.ndarray[Any, Any]:
    """Compute slopes over time by HTK's regression.

    The slope at t is sum_n n (x[t + n] - x[t - n]) / (2 sum_n n^2) over n = 1..window.

    Args:
        x: [frames, d].
        window: number of frames on either side.

    Returns:
        [frames, d], the dtype of x.

    Example::

        >>> deltas(np.arange(5.0)[:, None])[2].item()
        1.0
    """
    count = len(x)
    padded = np.pad(x, ((window, window), (0, 0)), mode="edge")
    slope = sum(
        n * (padded[window + n : window + n + count] - padded[window - n : window - n + count]) for n in range(1, window + 1)
    )
    return np.asarray(slope / (2.0 * sum(n * n for n in range(1, window + 1))), dtype=x.dtype)


def features(samples: np.ndarray[Any, Any], settings: FeatureSettings | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Compute MFCC, deltas and delta-deltas without normalization: float32 [frames, 3 * coefficients].

    The arguments and errors are those of :func:`mfcc`.
    """
    settings = settings or FeatureSettings()
    static = mfcc(samples, settings)
    if len(static) == 0:
        return np.zeros((0, settings.dimension), dtype=np.float32)
    first = deltas(static, settings.delta_window)
    return np.concatenate([static, first, deltas(first, settings.delta_window)], axis=1)
