"""Texts as the numbers of their characters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def encode(text: str, characters: Sequence[str] = CHARACTERS) -> Tensor:
    """Write a text as the numbers of its characters, int64 [characters].

    Raises:
        ValueError: the text has a character that is not among ``characters``.
    """
    numbers = {character: number for number, character in enumerate(characters)}
    unknown = sorted(set(text) - numbers.keys())
    if unknown:
        raise ValueError(
            f"expected a text of the characters {''.join(characters)!r}, found {', '.join(map(repr, unknown[:8]))}: leave "
            "them out, or replace them."
        )
    return torch.tensor([numbers[character] for character in text], dtype=torch.int64)
