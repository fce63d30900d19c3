"""How a model of the zoo wants its input: from a raw image, recording or text to what the network takes.

A model's file records it as ``metadata["input"]``, a dict of numbers and names. Files that were written before this was
recorded get it by the name of their data set. The arithmetic is that of the recipe's test set.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_deepr.recipes.characters import CHARACTERS, encode
from lightning_deepr.recipes.crops import Crops
from lightning_deepr.zoo import timit_statistics
from lightning_deepr.zoo.waves import resample, samples_of

DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class ImageInput:
    """Turn raw images into the input of a network, as a transform of torchvision does.

    Args:
        height, width, channels: the raw image's size in pixels and its number of channels, 1 (grey) or 3 (red, green, blue).
        crop: the side of the central crop; None: no crop.
        values: "unit": values in [0, 1]; "standardized": each image has mean 0 and standard deviation 1.
        classes: the names of the classes, in the order of the network's outputs.

    Example::

        >>> from lightning_deepr import zoo
        >>> net = zoo.load("lenet300_100.deepr_1pct_mnist")
        >>> net.preprocess(torch.zeros(28, 28, dtype=torch.uint8)).shape
        torch.Size([1, 28, 28])
    """

    height: int
    width: int
    channels: int
    crop: int | None = None
    values: str = "unit"
    classes: tuple[str, ...] = ()
    task: ClassVar[str] = "image-classification"  # the Hub's names
    dtype: ClassVar[torch.dtype] = torch.float32  # of the network's input

    def __post_init__(self) -> None:
        channels = {"unit": (1, 3), "standardized": (3,)}.get(self.values, ())
        if min(self.height, self.width) < max(self.crop or 1, 1) or self.channels not in channels:
            raise ValueError(
                'input: expected a size, a crop within it, and values "unit" (1 or 3 channels) or "standardized" (3 channels), '
                f"found {asdict(self)}."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one input of the network: channels, height, width."""
        return (self.channels, self.crop or self.height, self.crop or self.width)

    def __call__(self, image: Any) -> Tensor:
        """Prepare one image, or a batch of them.

        Args:
            image: a PIL image of any mode; or an array or tensor: [H, W], [C, H, W] or [H, W, C], or [batch, C, H, W], of
                uint8 in 0 to 255, or of floats in 0 to 1. A square image of another size is resized.

        Returns:
            float32 [C, H, W], or [batch, C, H, W]: what the network takes. It needs a batch: ``net(x[None])``.

        Raises:
            TypeError: ``image`` is no image.
            ValueError: its shape or its values are others than expected.
        """
        raw, is_batch = self._pixels(image)
        _, height, width = self.shape
        top, left = (self.height - height) // 2, (self.width - width) // 2
        cropped = raw[:, :, top : top + height, left : left + width]
        if self.values == "standardized":
            labels = torch.zeros(len(raw), dtype=torch.int64)
            found = next(iter(Crops(cropped, labels, len(raw), size=height)))[0].contiguous()
        else:
            found = cropped.float() / 255
        return found if is_batch else found[0]

    def _pixels(self, image: Any) -> tuple[Tensor, bool]:
        """Return the pixels [batch, C, height, width] in 0 to 255, and whether they were a batch."""
        if hasattr(image, "convert") and hasattr(image, "getbands"):  # a PIL image
            image = np.array(_opaque(image).convert("L" if self.channels == 1 else "RGB"))
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.ascontiguousarray(image))
        if not isinstance(image, Tensor):
            raise TypeError(f"expected an image: a PIL image, an array or a tensor, found {type(image).__name__}.")
        x = image.detach().cpu()
        is_batch = x.dim() == 4
        if x.dim() == 2:
            x = x[None]
        if x.dim() == 3:
            if x.shape[0] not in (1, 3) and x.shape[2] in (1, 3):
                x = x.permute(2, 0, 1)
            x = x[None]
        if x.dim() != 4 or x.shape[1] != self.channels or 0 in x.shape:
            raise ValueError(
                f"expected an image of {self.channels} channel{'s' if self.channels > 1 else ''}, [{self.channels}, "
                f"{self.height}, {self.width}] or a batch of such, found shape {list(image.shape)}."
                + (" A PIL image is converted." if x.dim() == 4 and x.shape[1] in (1, 3, 4) else "")
            )
        x = _in_bytes(x)
        if x.shape[2:] != (self.height, self.width):
            if x.shape[2] * self.width != x.shape[3] * self.height:
                raise ValueError(
                    f"expected an image of {self.height} x {self.width} pixels or of that shape in another size, found "
                    f"{x.shape[2]} x {x.shape[3]}: crop it, or pad it."
                )
            x = interpolate(x.float(), (self.height, self.width), mode="bilinear", antialias=True).clamp(0, 255)
        return x, is_batch


def _opaque(image: Any) -> Any:
    """Refuse a PIL image whose pixels can't be brought to 8 bits without a decision of the caller."""
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB"):
        raise ValueError(f'expected an image of 8 bits per channel, found mode "{image.mode}": convert it to "L" or "RGB".')
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            raise ValueError("expected an opaque image, found transparent pixels: paste it on a background first.")
    return image


def _in_bytes(x: Tensor) -> Tensor:
    """Bring pixels to 0 ... 255: uint8 as it is, floats in [0, 1] as floats."""
    if x.dtype is torch.uint8:
        return x
    if x.dtype is torch.bool:
        return x.to(torch.uint8) * 255
    if not x.is_floating_point():
        raise ValueError(f"expected pixels of uint8 (0 to 255) or floats (0 to 1), found {x.dtype}: convert them.")
    least, most = (float(v) for v in x.aminmax())
    if not (least >= 0 and most <= 1):  # NaN, too
        raise ValueError(
            f"expected floats in 0 to 1, found {least:g} to {most:g}: give the raw image, without a normalization, or uint8 "
            "for values up to 255."
        )
    scaled = x.float() * 255
    rounded = scaled.round()
    # an image that was divided by 255 gets its bytes back, so that it is the same input
    return rounded.to(torch.uint8) if bool((scaled - rounded).abs().max() < 1e-3) else scaled


@dataclass(frozen=True)
class SpeechInput:
    """Turn a recording into the features of a network: 13 MFCC, their deltas and delta-deltas, normalized.

    Needs ``kaldi-native-fbank`` (``pip install 'lightning-deepr[timit]'``). The settings of the features are those of
    :mod:`lightning_deepr.recipes.timit_features`.

    Args:
        mean, std: 39 numbers each, of the training recordings' features.
        rate: samples per second.
        classes: the names of the classes in which the network's predictions are counted.
        outputs: number of the network's outputs; 60 of them are folded to 39 classes.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rate: int = 16_000
    classes: tuple[str, ...] = ()
    outputs: int = 60
    task: ClassVar[str] = "audio-classification"
    dtype: ClassVar[torch.dtype] = torch.float32

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(math.isfinite(m) for m in self.mean) or not all(s > 0 for s in self.std):
            raise ValueError("input: expected as many means as standard deviations above 0.")

    @property
    def shape(self) -> tuple[None, int]:
        """The shape of one input of the network: frames (any number), features."""
        return (None, len(self.mean))

    def __call__(self, wave: Any, rate: int | None = None) -> Tensor:
        """Prepare one recording.

        Args:
            wave: an array or tensor [samples] or [1, samples], int16, or floats in -1 to 1 (as torchaudio and soundfile give
                them).
            rate: its samples per second; None: 16,000. A higher rate is converted; a lower one lacks high frequencies.

        Returns:
            float32 [frames, 39], a frame for each 10 ms. The network needs a batch: ``net(x[None])``.

        Raises:
            ImportError: ``kaldi-native-fbank`` is not installed.
            TypeError: ``wave`` is no recording.
            ValueError: its shape, values, rate or length are others than expected.
        """
        from lightning_deepr.recipes.timit_features import features

        samples = resample(samples_of(wave), self.rate if rate is None else rate, self.rate)
        found = torch.from_numpy(features(samples))
        if len(found) == 0:
            raise ValueError(f"expected a recording of at least 25 ms, found {1000 * len(samples) / self.rate:.1f} ms.")
        return (found - torch.tensor(self.mean)) / torch.tensor(self.std)


@dataclass(frozen=True)
class TextInput:
    """Turn a text into the numbers of its characters, of which a network predicts the next one.

    Args:
        context: the largest number of characters that the network takes. The end of a longer text is taken.
        classes: the characters, in the order of their numbers and of the network's outputs.

    Example::

        >>> TextInput(4, ("a", "b", "c"))("cabbac")
        tensor([1, 1, 0, 2])
    """

    context: int
    classes: tuple[str, ...]
    task: ClassVar[str] = "text-generation"
    dtype: ClassVar[torch.dtype] = torch.int64

    def __post_init__(self) -> None:
        if self.context < 1 or len(set(self.classes)) != len(self.classes) or any(len(one) != 1 for one in self.classes):
            raise ValueError("input: expected a context of at least 1, and different single characters.")

    @property
    def shape(self) -> tuple[None]:
        """The shape of one input of the network: characters (any number up to ``context``)."""
        return (None,)

    def __call__(self, text: Any) -> Tensor:
        """Prepare one text.

        Args:
            text: a string of the characters in ``classes``.

        Returns:
            int64 [characters], at most ``context`` of them, the last ones. The network needs a batch: ``net(x[None])``.

        Raises:
            TypeError: ``text`` is no string.
            ValueError: it is empty, or has a character that the network does not know.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected a text (a string), found {type(text).__name__}.")
        if not text:
            raise ValueError("expected a text of at least one character, found an empty one.")
        return encode(text, self.classes)[-self.context :]


Input = ImageInput | SpeechInput | TextInput

_KNOWN: dict[str, Input] = {
    "MNIST": ImageInput(28, 28, 1, classes=DIGITS),
    "CIFAR-10": ImageInput(32, 32, 3, crop=24, values="standardized", classes=CIFAR10),
}
_KINDS: dict[str, type[ImageInput] | type[SpeechInput] | type[TextInput]] = {
    "image": ImageInput,
    "speech": SpeechInput,
    "text": TextInput,
}
TASKS = frozenset(kind.task for kind in _KINDS.values())
_ARCHITECTURES = {"lenet300_100": "MNIST", "cifar10_cnn": "CIFAR-10", "timit_blstm": "TIMIT sample"}


def known(data: str) -> Input | None:
    """Return how the models of a data set want their input; None: nobody knows."""
    if data == "TIMIT sample":
        from lightning_deepr.recipes.timit_phones import PHONES39

        return SpeechInput(timit_statistics.MEAN, timit_statistics.STD, classes=PHONES39)
    if data == "Tiny Shakespeare":
        return TextInput(64, tuple(CHARACTERS))
    return _KNOWN.get(data)


def recorded(one: Input) -> dict[str, Any]:
    """Return what a file records of an input."""
    kind = next(name for name, of in _KINDS.items() if type(one) is of)
    return {"kind": kind, **{key: list(v) if isinstance(v, tuple) else v for key, v in asdict(one).items()}}


def input_of(metadata: Mapping[str, Any], architecture: str | None) -> Input | None:
    """Find out how a model wants its input.

    Args:
        metadata: the metadata of its file.
        architecture: its architecture; a file without a record of its input gets that of its data set if its architecture is
            the one that this package trains on it.

    Returns:
        the input; None: nobody knows. Metadata are free, so an "input" that is no record of this form is none; a record of
        this form with wrong entries is none either, and a warning says so.
    """
    found = metadata.get("input")
    if found is None:
        data = metadata.get("data")
        name = data.get("name") if isinstance(data, Mapping) else None
        return known(name) if name is not None and _ARCHITECTURES.get(str(architecture)) == name else None
    kind = _KINDS.get(str(found.get("kind"))) if isinstance(found, Mapping) else None
    if kind is None:
        return None
    try:
        return kind(**{str(key): tuple(v) if isinstance(v, list) else v for key, v in found.items() if key != "kind"})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"The record of the model's input can't be read, so that it has no `preprocess`: {error} Expected the entries of "
            f"{kind.__name__}, found {', '.join(map(str, found))}.",
            stacklevel=3,
        )
        return None
