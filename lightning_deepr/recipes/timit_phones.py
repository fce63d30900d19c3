"""The phones of TIMIT: 61 in the transcriptions, 60 without the glottal stop, 39 in the scores.

The folding is the common form of Lee and Hon, "Speaker-independent phone recognition using hidden Markov models" (1989): the 61
symbols of the .phn files become 39 classes, and the glottal stop ``q`` is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""Label of a frame without a phone (padding, ``q``, outside the transcription); the default ``ignore_index`` of PyTorch."""

_GLOTTAL_STOP = "q"

_GROUPS = {
    "aa": "aa ao",
    "ah": "ah ax ax-h",
    "er": "er axr",
    "hh": "hh hv",
    "ih": "ih ix",
    "l": "l el",
    "m": "m em",
    "n": "n en nx",
    "ng": "ng eng",
    "sh": "sh zh",
    "uw": "uw ux",
    "sil": "pcl tcl kcl bcl dcl gcl h# pau epi",
}
_ALONE = "ae aw ay b ch d dh dx eh ey f g iy jh k ow oy p r s t th uh v w y z"

FOLD: dict[str, str] = {
    **{phone: folded for folded, phones in _GROUPS.items() for phone in phones.split()},
    **{phone: phone for phone in _ALONE.split()},
}
"""The class, out of 39, of each of the 60 phones."""

PHONES60: tuple[str, ...] = tuple(sorted(FOLD))
PHONES39: tuple[str, ...] = tuple(sorted(set(FOLD.values())))
PHONES61: tuple[str, ...] = (*PHONES60, _GLOTTAL_STOP)
"""The symbols of the .phn files; ``q`` comes last, so that a phone has the same number in ``PHONES60`` and here."""

NUMBERS: dict[str, int] = {phone: number for number, phone in enumerate(PHONES61)}


def _folded_numbers() -> Tensor:
    """Return the class number of each of the 60 phones: int64 [60], values 0 to 38.

    Example::

        >>> PHONES39[_folded_numbers()[PHONES60.index("h#")]]
        'sil'
    """
    return torch.tensor([PHONES39.index(FOLD[phone]) for phone in PHONES60])


def folding(classes: int) -> Tensor:
    """Return the matrix that sums posteriors of the training targets to posteriors of the 39 scored classes.

    Args:
        classes: number of training targets, 60 or 39.

    Returns:
        float32 [classes, 39] with one 1 in each row, to use as ``posteriors @ folding(classes)``.

    Raises:
        ValueError: ``classes`` is neither 60 nor 39.

    Example::

        >>> folding(60).shape, folding(60).sum(1).unique().tolist(), folding(39).trace().item()
        (torch.Size([60, 39]), [1.0], 39.0)
    """
    if classes == len(PHONES39):
        return torch.eye(classes)
    if classes == len(PHONES60):
        return torch.nn.functional.one_hot(_folded_numbers(), len(PHONES39)).float()
    raise ValueError(f"expected 60 or 39 classes (phones without q, or the folded ones), found {classes}.")


def targets(labels: Tensor, classes: int) -> Tensor:
    """Convert numbers of the 61 phones to training targets.

    Args:
        labels: int64 of any shape: numbers of ``PHONES61``, negative for frames without a label.
        classes: number of training targets, 60 or 39.

    Returns:
        int64 of the same shape: 0 to ``classes - 1``; ``IGNORED`` for ``q`` and for frames without a label.

    Raises:
        ValueError: ``classes`` is neither 60 nor 39.
    """
    known = (labels >= 0) & (labels < len(PHONES60))
    folding(classes)  # raises for other numbers
    table = torch.arange(classes) if classes == len(PHONES60) else _folded_numbers()
    return torch.where(known, table[labels.clamp(0, len(PHONES60) - 1)], IGNORED)
