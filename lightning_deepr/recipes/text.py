"""Tiny Shakespeare as numbers, in windows that lie in memory as tensors."""

from __future__ import annotations

import hashlib
import lzma
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.recipes.batches import ResumableBatches
from lightning_deepr.recipes.characters import encode
from lightning_deepr.recipes.resumable import ResumableDataModule
from lightning_deepr.training.run_config import digest_of

FOLDER, FILE = "tinyshakespeare", "input.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHARES = (0.9, 0.95)  # where the training part and the validation part end; nanoGPT validates on both of the last two parts

_ORDER, _OFFSET = 121, 122  # random streams, separate from the rewiring's and those of the other data


def read(root: str | Path) -> str:
    """Read the text from ``root/tinyshakespeare/input.txt``, or from ``input.txt.xz`` beside it.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: it is another text.
    """
    folder = Path(root) / FOLDER
    plain, packed = folder / FILE, folder / f"{FILE}.xz"
    if plain.is_file():
        raw = plain.read_bytes()
    elif packed.is_file():
        raw = lzma.decompress(packed.read_bytes())
    else:
        raise FileNotFoundError(
            f"Tiny Shakespeare was not found: expected {plain.resolve()}. Put the text there (it is at {URL}), or give the "
            "folder that holds it with --data.root."
        )
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise ValueError(f"{folder}: expected Tiny Shakespeare with sha256 {SHA256}, found another text. Remove the file.")
    return raw.decode()


class TextBatches(ResumableBatches):
    """An iterable over (characters int64 [B, context], the next characters int64 [B, context]).

    Args:
        text: int64 [characters].
        batch_size: B; the last batch may be smaller.
        context: characters per window. The windows of an epoch follow each other without gaps; what is left at the end, less
            than a window, is left out.
        shuffle: whether every epoch has a new order, and begins its first window at a new place in 0 ... context - 1.
        seed: seed of the order and of that place.
    """

    def __init__(self, text: Tensor, batch_size: int, context: int, *, shuffle: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.text, self.batch_size, self.context, self.shuffle, self.seed = text, batch_size, context, shuffle, seed
        # every epoch has the same number of windows, wherever the first one begins
        self.windows = (len(text) - 1 - (context - 1 if shuffle else 0)) // context
        if batch_size < 1 or context < 1 or self.windows < 1:
            raise ValueError(
                f"expected batch_size and context of at least 1 and a text of a window or more, found {batch_size}, {context} "
                f"and {len(text)} characters."
            )

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, first = torch.arange(self.windows), 0
        if self.shuffle:
            order = order[randomness.bits(randomness.key(self.seed, _ORDER, self.epoch), order).argsort()]
            first = randomness.key(self.seed, _OFFSET, self.epoch) % self.context
        within = torch.arange(self.context)
        for i in self.remaining():
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            at = first + chosen[:, None] * self.context + within
            yield self.text[at], self.text[at + 1]


class ShakespeareDataModule(ResumableDataModule):
    """Tiny Shakespeare: the first 90 % for training, the next 5 % for validation, the last 5 % for the test.

    Args:
        root: the folder that holds ``tinyshakespeare/input.txt`` (or ``input.txt.xz``); a missing file is downloaded to it.
        batch_size: windows per training batch.
        context: characters per window.
        seed: seed of the order; None: the seed of ``seed_everything``.
    """

    def __init__(self, root: str = "data", batch_size: int = 12, context: int = 64, seed: int | None = None) -> None:
        super().__init__()
        if batch_size < 1 or context < 1:
            raise ValueError(f"expected batch_size >= 1 and context >= 1, found {batch_size} and {context}.")
        self.root, self.batch_size, self.context, self.seed = root, batch_size, context, seed
        self._text: Tensor | None = None

    def prepare_data(self) -> None:
        try:
            read(self.root)
        except FileNotFoundError as error:
            target = Path(self.root) / FOLDER / FILE
            try:
                with urllib.request.urlopen(URL, timeout=30) as answer:
                    raw = answer.read()
            except OSError as reason:
                raise FileNotFoundError(f"{error} It could not be downloaded ({reason}).") from reason
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(raw)
            read(self.root)  # its checksum

    def setup(self, stage: str) -> None:
        if self._text is None:
            self._text = encode(read(self.root))

    def load(self) -> tuple[Tensor, Tensor, Tensor]:
        """Read the three parts of the text as numbers, int64: training, validation, test."""
        text = encode(read(self.root)) if self._text is None else self._text
        first, second = (int(share * len(text)) for share in SHARES)
        return text[:first], text[first:second], text[second:]

    def digest(self) -> str:
        """Hash the training text: runs on the same data have the same digest in their loggers."""
        return digest_of((self.load()[0],))

    def train_dataloader(self) -> TextBatches:
        seed = torch.initial_seed() if self.seed is None else self.seed
        return self.resuming(TextBatches(self.load()[0], self.batch_size, self.context, shuffle=True, seed=seed))

    def val_dataloader(self) -> TextBatches:
        return TextBatches(self.load()[1], 64, self.context)

    def test_dataloader(self) -> TextBatches:
        return TextBatches(self.load()[2], 64, self.context)
