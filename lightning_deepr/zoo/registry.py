"""The registry of the models that come with the package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Entry:
    """A model of the zoo. Its file holds everything else about it.

    Attributes:
        name: ``architecture.tag``; the file is ``zoo/<name>.safetensors``.
        sha256: checksum of the file, 64 hex digits.
        in_wheel: whether the wheel has the file, too; the repository has every file.
    """

    name: str
    sha256: str
    in_wheel: bool = True

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    @property
    def filename(self) -> str:
        return f"{self.name}.safetensors"


ENTRIES: tuple[Entry, ...] = (
    Entry("lenet300_100.deepr_0p5pct_mnist", "5f10a70085276e2c99255d3be585e5146912672e2ce1e06d39f06cb37b7203ec"),
    Entry("lenet300_100.deepr_1pct_mnist", "cce65219145a8d2662766dff75ff05b12c280053a232f5de40c9ac13ecb90a5f"),
    Entry("lenet300_100.deepr_2pct_mnist", "d17ec7b3781d18465ccb43d333420cb623ee68ffb713c3008650aa9180d0e5b3"),
    Entry("lenet300_100.deepr_5pct_mnist", "cecc154fa66f9f6f5c6c6313c18f504a289bc7a45b753af0f6a33944d12ba649"),
    Entry("lenet300_100.deepr_10pct_mnist", "5445af45fe0152fe25f37311e8100aa3a6edc39e1646cefed659fa5e78015bdf"),
    Entry("lenet300_100.deepr_20pct_mnist", "dc344c68c768c94095b3730adb2e4d6a195c0cb0db30248c6da046241918cd8f"),
    Entry("lenet300_100.soft_deepr_1pct_mnist", "22fb3a365ecb2c18abc4d72278bb58e3f113fc837124ce70fae70e6665950ae9"),
    Entry("lenet300_100.soft_deepr_5pct_mnist", "651576fc0e3b3ea71122443a5de3dbb54fa221ace36b1c3a1947f2be6dce5bf9"),
    Entry("cifar10_cnn.deepr_2pct_cifar10", "0e9a7c6c416d99cf7d62acc240e0e22246c9a04b795ca0b30f844c2937af7f6c"),
    Entry("cifar10_cnn.deepr_5pct_cifar10", "67c02fb4813d44eb16eab5662b59f4edcfa5cd7d4292ecd3623cd004ea17318c"),
    Entry("cifar10_cnn.deepr_10pct_cifar10", "f11d73cf97d49534a534681c694d353c673d1e6087526b61c8225a7fa6b3e373"),
    Entry(
        "cifar10_cnn.deepr_20pct_cifar10", "695997f42585a091f6e135330f0fa3bfc5034ba6310e419d4149a7ed73479cd5", in_wheel=False
    ),  # .9 MB: the wheel stays under 5 MB
    Entry("timit_blstm.deepr_1pct_timit_sample", "7eefb70dfce8d227813dd8bbae197c27734a8dbdecc3f00cd17912327576e9b9"),
    Entry("timit_blstm.deepr_2pct_timit_sample", "5701a0efa8e867bc904b0b123d792a023d7f3f050d6355b96ff804c4932d4448"),
    Entry("timit_blstm.deepr_5pct_timit_sample", "0fa3b7bd742ea6abac7ba105bf61261a24c2ff014a7819ce90b4a061ac73f09c"),
    Entry("timit_blstm.deepr_10pct_timit_sample", "2d70d33ba18f2721b692a103d21718bbe179b3066b9cb826ab0a46b1cba53ea9"),
)


def list_models(pattern: str = "*") -> list[str]:
    """List the names of the zoo's models, sorted, with numbers in numerical order.

    Args:
        pattern: shell wildcards, as in ``"lenet300_100.*"`` or ``"*1pct*"``.

    Example::

        >>> list_models("lenet300_100.deepr_1pct*")
        ['lenet300_100.deepr_1pct_mnist']
    """
    return sorted((entry.name for entry in ENTRIES if fnmatchcase(entry.name, pattern)), key=_by_numbers)


def _by_numbers(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def entry_of(name: str) -> Entry | None:
    return next((entry for entry in ENTRIES if entry.name == name), None)
