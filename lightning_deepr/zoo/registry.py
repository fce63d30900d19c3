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
    Entry("lenet300_100.deepr_10pct_mnist", "059a62b1270aa8adb11ccdc5f9d04c3b56542153f7aed32d7dbf292ac0a5030f"),
    Entry("lenet300_100.deepr_20pct_mnist", "fe3843cf8c00d859bc6c50d4bf5369f5e0bd4cc9ea0bbcf1b078cb9f4939ed4d"),
    Entry("lenet300_100.soft_deepr_1pct_mnist", "60fceb619a5968ea010310c0aa70f576ba8d6105587d98f03b4fff65f353d2d6"),
    Entry("lenet300_100.soft_deepr_5pct_mnist", "6caf0593cb7ccf968000b4755ca0183656a97fbad695fdae73ac8b3d50b7156d"),
    Entry("cifar10_cnn.deepr_2pct_cifar10", "0e9a7c6c416d99cf7d62acc240e0e22246c9a04b795ca0b30f844c2937af7f6c"),
    Entry("cifar10_cnn.deepr_5pct_cifar10", "67c02fb4813d44eb16eab5662b59f4edcfa5cd7d4292ecd3623cd004ea17318c"),
    Entry("cifar10_cnn.deepr_10pct_cifar10", "f11d73cf97d49534a534681c694d353c673d1e6087526b61c8225a7fa6b3e373"),
    Entry(
        "cifar10_cnn.deepr_20pct_cifar10", "695997f42585a091f6e135330f0fa3bfc5034ba6310e419d4149a7ed73479cd5", in_wheel=False
    ),  # .9 MB: the wheel stays under 5 MB
    Entry("timit_blstm.deepr_1pct_timit_sample", "1badff3db1116557ca06ede9cca2fae71224fec637203da67997d4ae39a8aa86"),
    Entry("timit_blstm.deepr_2pct_timit_sample", "b47c9bb8bf249654ad03311741e1ce37aeba3193a8975d95a207834f22cff5de"),
    Entry("timit_blstm.deepr_5pct_timit_sample", "79cc35af87187377b568d84624079b8278658f9fa15577111ab079abc3369959"),
    Entry("timit_blstm.deepr_10pct_timit_sample", "419b9bc96414cd50495546898a6a34142e9a9969a92e2ab9b456e4de9b6fedd6"),
    Entry(
        "char_transformer.deepr_10pct_shakespeare",
        "43af79374ba71587a81797b8dcc8c1ddbceee2f6ace7119c2d9cdc8202c6959a",
        in_wheel=False,
    ),
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
