"""What the kernels read of a weight's rules: the words of its allowed places and of its table of signs."""

from __future__ import annotations

import numpy as np

from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.allowed import Allowed
from lightning_deepr.algorithm.signs import SignTable
from lightning_deepr.kernels.cpu.fields import FORM_WORDS, AllowedWords, SignWords


def allowed_words(allowed: Allowed | None) -> int:
    """Return the address of the words of allowed places; 0 if everything is allowed. They live as long as ``allowed``."""
    if allowed is None:
        return 0
    if allowed.kernel_table is None:
        units, items = allowed.units, allowed.items.cpu().contiguous()
        words = np.zeros(AllowedWords.FIRST_FORM + FORM_WORDS * len(allowed.forms), np.int64)
        for word, value in (
            (AllowedWords.COUNT, allowed.count), (AllowedWords.SPACE, allowed.space),
            (AllowedWords.LIMIT, randomness.LARGEST - allowed.rest), (AllowedWords.STRETCH, allowed.stretch),
            (AllowedWords.ROWS, units.rows), (AllowedWords.COLUMNS, units.columns), (AllowedWords.MAJORS, units.majors),
            (AllowedWords.MINORS, units.minors), (AllowedWords.INNER, units.inner),
            (AllowedWords.TRANSPOSED, units.transposed), (AllowedWords.ITEMS, items.data_ptr() if items.numel() else 0),
            (AllowedWords.ITEM_COUNT, items.numel()), (AllowedWords.FORMS, len(allowed.forms)),
        ):  # fmt: skip
            words[word] = value
        for i, form in enumerate(allowed.forms):
            first = AllowedWords.FIRST_FORM + FORM_WORDS * i
            words[first], words[first + 1 : first + 1 + len(form.numbers)] = form.kind, form.numbers
        allowed.kernel_table = words, items
    return int(allowed.kernel_table[0].ctypes.data)


def sign_words(table: SignTable | None) -> int:
    """Return the address of the words of a table of signs; 0 if there is none. They live as long as ``table``."""
    if table is None:
        return 0
    if table.kernel_table is None:
        bits = table.bits.cpu().contiguous()
        words = np.zeros(len(SignWords), np.int64)
        words[SignWords.INNER], words[SignWords.LENGTH], words[SignWords.BLOCK] = table.inner, table.length, table.block
        words[SignWords.BITS] = bits.data_ptr()
        table.kernel_table = words, bits
    return int(table.kernel_table[0].ctypes.data)
