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
    """

    name: str
    sha256: str

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    @property
    def filename(self) -> str:
        return f"{self.name}.safetensors"


ENTRIES: tuple[Entry, ...] = (
    Entry("lenet300_100.deepr_0p5pct_mnist", "e3109ad21bf2b5091e521cb3d025137643e5a52d25bf8452cdfe89517dd10f1b"),
    Entry("lenet300_100.deepr_1pct_mnist", "7c55d2db2070a603e3380eba13d5404fa7059528b8d8a75b787ae8c6f9459a1a"),
    Entry("lenet300_100.deepr_2pct_mnist", "326e1267e2c1174e6f4227d9ddd8bba484c38477aea965f5f01cc37ad3e9a06d"),
    Entry("lenet300_100.deepr_5pct_mnist", "69f315a86f3fe5ccfe2369cdfdf894f3e86948e9e2bf80e911fb58dc0198c83d"),
    Entry("lenet300_100.deepr_10pct_mnist", "c5d87880b2d2a69668b4e403d5ef466c3738248304b99a397dbf43d64a3ee6f2"),
    Entry("lenet300_100.deepr_20pct_mnist", "40568f66bb5824386c950b6a738f5ef9f550c49bc79b961c35f7a3d909b034f3"),
    Entry("lenet300_100.soft_deepr_1pct_mnist", "5652d2870c0aed89f884fb826aff496d4fc636e5a5017dcd689ce366657d4102"),
    Entry("lenet300_100.soft_deepr_5pct_mnist", "3c870875a39fa91ce097952b6a9f2e84b6747732b622c236de58bf80f3b73e70"),
    Entry("cifar10_cnn.deepr_2pct_cifar10", "adffc937e1e5cf198755bbd85f64d8f3e5007d1a70c736f005f5b57c3ca5e111"),
    Entry("cifar10_cnn.deepr_5pct_cifar10", "cbed8bdb0a4d4de9519e5a2584f3a70e09dea7234eb6bd9d214e70380f06669a"),
    Entry("cifar10_cnn.deepr_10pct_cifar10", "f34f586eb1d33f6f7e80d1ac88568e7f204469eb49afd23c5e4c961fc181fc99"),
    Entry("cifar10_cnn.deepr_20pct_cifar10", "95757faa4699f897d4a561bb4a7b7f29f3b8a349c4fe55d4d0837be119f7f389"),
    Entry("timit_blstm.deepr_1pct_timit_sample", "67894629a3e7f712e91cdffd345318b9486cc32226fe3c8bc6cc1c030da8b89d"),
    Entry("timit_blstm.deepr_2pct_timit_sample", "1d1f538ea17224f88e11a99e5312654dc47737c36a7d8e1ccc33f272708026a8"),
    Entry("timit_blstm.deepr_5pct_timit_sample", "eda38ba8a4a3f896399b2eb6b5af1f27bd0ec7a8400558e403763624d25b860c"),
    Entry("timit_blstm.deepr_10pct_timit_sample", "645eafd38b087c614025cadd940bf8e7f9b652629319c053a9e5162ffb3ebe0a"),
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
