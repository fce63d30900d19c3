"""The places of one weight where connections may be, and uniform draws from them.

:func:`bind` turns what a user gives (:mod:`.candidates`) into :class:`Allowed`. A draw works on a *code*, a number below
``space``: a code stands for one place or for none, and each allowed place has exactly one code. So a uniform code that stands
for an allowed place is a uniform allowed place, and other codes are drawn again. The first of the ``forms`` says what a code
stands for, the others are tests:

- ``WHOLE``: the code is the place (one matrix entry in one position of the kernel).
- ``BAND``, ``BLOCKS``, ``LOCAL``: the row, and a column within the stretch or the window of this row. Nothing is kept.
- ``LISTED``: the place is an entry of a list, which exists if few places are allowed.
- ``NOSELF``, ``BITMAP``: only tests. A bitmap has one bit for each of the N places.

:mod:`lightning_deepr.kernels.cpu.allowed` has the same rules compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.candidates import Band, Blocks, Candidates, Local, Mask, NoSelf, Rule, Where, near, parts_of
from lightning_deepr.algorithm.units import Units

WHOLE, BAND, BLOCKS, LOCAL, LISTED, NOSELF, BITMAP = range(7)
WORDS = 8  # of a form: its kind, and its numbers
MOST_ASKED = 1 << 32  # the most places about which a function is asked, and the most codes that are counted one by one
LISTED_FROM = 8  # with fewer places per allowed place, a mask is kept as bits: a draw then takes up to so many tries
_PIECE = 1 << 21  # places that are looked at together
_MOST_TRIES = 64  # draws that are made at once


class Form(NamedTuple):
    """One form of an :class:`Allowed`: its kind and its numbers.

    BAND: the width and the columns of a stretch. BLOCKS: the number of blocks and the columns of a stretch. LOCAL: the height
    and width of the input grid, those of the output grid, the reach, the squared radius and the columns of a window.
    """

    kind: int
    numbers: tuple[int, ...] = ()


class Allowed:
    """The places of one weight where connections may be.

    Args:
        units: the layout of the weight.
        forms: what a code stands for, and the tests.
        items: int64: the places of a LISTED form, ascending, or the words of a BITMAP; empty otherwise.
        count: M, the number of allowed places; None: it is counted.
        functions: those that were asked, for :meth:`changed`.
    """

    def __init__(
        self,
        units: Units,
        forms: Sequence[Form],
        items: Tensor,
        count: int | None = None,
        functions: Sequence[Where] = (),
        text: str = "",
    ) -> None:
        self.units, self.forms, self.items = units, tuple(forms), items
        self.functions = tuple(functions)
        self.text = text or " & ".join(describe(form, items) for form in self.forms if form.kind != WHOLE)
        self._on: dict[torch.device, Tensor] = {items.device: items}
        self.kernel_table: Any = None  # what the compiled kernels read, made at their first use
        first = self.forms[0]
        matrix = units.rows * first.numbers[-1] if first.kind in (BAND, BLOCKS, LOCAL) else 0
        self.stretch = first.numbers[-1] if matrix else 0
        self.space = items.numel() if first.kind == LISTED else units.groups * matrix * units.inner if matrix else units.total
        self.rest = incomplete(self.space)  # the size of the incomplete last block of draws
        self.count = self._counted() if count is None else count

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Allowed):
            return NotImplemented
        return self is other or (
            self.units._replace(kernel=()) == other.units._replace(kernel=())
            and self.forms == other.forms
            and torch.equal(self.items.cpu(), other.items.cpu())
        )

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{self.text}: {self.count:,} of {self.units.total:,} places"

    def __deepcopy__(self, memo: dict[int, Any]) -> Allowed:
        return self  # nothing in it changes

    @property
    def is_list(self) -> bool:
        """Whether the allowed places are kept as a list."""
        return self.forms[0].kind == LISTED

    def on(self, device: torch.device) -> Tensor:
        """Return the list or the bitmap on a device."""
        if device not in self._on:
            self._on[device] = self.items.to(device)
        return self._on[device]

    # -- codes ------------------------------------------------------------------------------------------------------------

    def decode(self, codes: Tensor) -> Tensor:
        """Return the place of each code; -1 if it stands for none, or if a test refuses the place."""
        form, units = self.forms[0], self.units
        if form.kind in (WHOLE, LISTED):
            places = codes if form.kind == WHOLE else self.on(codes.device)[codes]
            valid = torch.ones_like(codes, dtype=torch.bool)
        else:
            entry, position = codes // units.inner, codes % units.inner
            line, offset = entry // self.stretch, entry % self.stretch
            group, row = line // units.rows, line % units.rows
            column, valid = _column(form, units, row, offset)
            places = units.join(group, row, column, position)
        for test in self.forms[1:]:
            valid = valid & self._passes(test, torch.where(valid, places, 0))
        return torch.where(valid, places, -1)

    def contains(self, places: Tensor) -> Tensor:
        """Tell which places (int64, within the weight) are allowed: bool."""
        found = torch.ones_like(places, dtype=torch.bool)
        for form in self.forms:
            found &= self._passes(form, places)
        return found

    def _passes(self, form: Form, places: Tensor) -> Tensor:
        if form.kind == WHOLE:
            return torch.ones_like(places, dtype=torch.bool)
        if form.kind == BITMAP:
            word = self.on(places.device)[places >> 6]
            return ((word >> (places & 63)) & 1).bool()
        if form.kind == LISTED:
            listed = self.on(places.device)
            if not listed.numel():
                return torch.zeros_like(places, dtype=torch.bool)
            return listed[torch.searchsorted(listed, places).clamp_(max=listed.numel() - 1)] == places
        row, column = self.units.split(places)
        return permits(form, self.units, row, column)

    def pieces(self) -> Iterator[Tensor]:
        """List all allowed places, int64, in pieces."""
        for first in range(0, self.space, _PIECE):
            found = self.decode(torch.arange(first, min(first + _PIECE, self.space), device=self.items.device))
            yield found[found >= 0]

    def places(self, device: torch.device | str = "cpu") -> Tensor:
        """List all allowed places, int64, in the order of their codes. This takes 8 * M bytes."""
        if self.forms[0].kind == LISTED and len(self.forms) == 1:
            return self.on(torch.device(device))
        found = list(self.pieces())
        return torch.cat(found).to(device) if found else torch.empty(0, dtype=torch.long, device=device)

    def mask(self) -> Tensor:
        """Return the allowed places as a bool tensor [N]."""
        found = torch.zeros(self.units.total, dtype=torch.bool)
        for piece in self.pieces():
            found[piece] = True
        return found

    def _counted(self) -> int:
        kinds = [form.kind for form in self.forms]
        units = self.units
        each = units.groups * units.inner
        if kinds == [WHOLE, BITMAP] or LISTED in kinds:
            return sum(piece.numel() for piece in self.pieces())
        others = [form for form in self.forms if form.kind not in (NOSELF, WHOLE)]
        if not others:
            found = units.rows * units.columns
        elif len(others) == 1 and others[0].kind in (BAND, BLOCKS):
            found = _columns_in_all(others[0], units)
        else:
            single = Units(1, units.majors, units.minors, 1, units.transposed)
            matrix = Allowed(single, self.forms if others else (), self.items, 0)
            if matrix.space > MOST_ASKED:
                raise ValueError(
                    f"{self.text}: expected at most {MOST_ASKED} pairs of units to count, found {matrix.space}. Give a "
                    "narrower form."
                )
            return each * sum(piece.numel() for piece in matrix.pieces())
        if NOSELF in kinds:
            for first in range(0, units.rows, _PIECE):
                unit = torch.arange(first, min(first + _PIECE, units.rows))
                on = torch.ones_like(unit, dtype=torch.bool)
                for form in others:
                    on &= permits(form, units, unit, unit)
                found -= int(on.sum())
        return each * found

    # -- draws ------------------------------------------------------------------------------------------------------------

    def draw(self, words: Tensor) -> Tensor:
        """Draw an allowed place for each 64-bit word, uniformly.

        The tries of a word are the word itself and then ``bits(word, 1)``, ``bits(word, 2)``, ...: the first code that stands
        for an allowed place counts.

        Args:
            words: int64 [R], the hashes of the draws' coordinates.

        Returns:
            int64 [R], places.
        """
        return draw_codes(words, self.space, self.count, self.decode)

    # -- a function that changes its answers ----------------------------------------------------------------------------------

    def changed(self, places: Tensor) -> str | None:
        """Ask the functions again, about connections and about as many other places. Describe the first other answer.

        Args:
            places: int64, the places of connections.
        """
        if not self.functions or not places.numel():
            return None
        other = (randomness.bits(randomness.key(places.numel()), places) & randomness.LARGEST) % self.units.total
        asked = torch.cat([places, other]).cpu()
        answer, before = torch.ones_like(asked, dtype=torch.bool), self.contains(asked)
        for function in self.functions:
            answer &= function.answers(self.units, asked)
        for form in self._beside:
            answer &= permits(form, self.units, *self.units.split(asked))
        wrong = before & ~answer if self._has_mask else answer != before
        if not bool(wrong.any()):
            return None
        place = int(asked[wrong.nonzero()[0, 0]])
        return (
            f"{self.functions[0]!r} gives another answer than at the conversion at place {place}: expected a function of the "
            "indices alone"
        )

    # with functions: the forms with a rule beside them, and whether there was a mask
    _beside: Sequence[Form] = ()
    _has_mask = False

    # -- records --------------------------------------------------------------------------------------------------------------

    def record(self, lists: bool = False) -> tuple[list[int], Tensor]:
        """Return everything as whole numbers, and the list or the bitmap; :meth:`of_record` reads both.

        Args:
            lists: whether a list that takes more bytes than the bitmap is returned as it is, for who writes only its gaps.
        """
        units, items = self.units, self.items
        numbers = [units.groups, units.majors, units.minors, units.inner, int(units.transposed), int(units.grouped)]
        for form in self.forms:
            words = (form.kind, *form.numbers)
            if form.kind == LISTED and not lists and 64 * items.numel() > units.total:
                words, items = (LISTED, _AS_BITS), _bits_of(items, units.total)
            numbers += [*words, *[0] * (WORDS - len(words))]
        return numbers, items

    @classmethod
    def of_record(cls, numbers: Sequence[int], items: Tensor, total: int) -> Allowed:
        """Read a record.

        Raises:
            ValueError: it is damaged, or that of another weight.
        """
        head, rest = list(numbers[:6]), list(numbers[6:])
        forms = [_form_of_words(rest[i : i + WORDS]) for i in range(0, len(rest), WORDS)]
        if len(head) < 6 or not forms or len(rest) % WORDS or min(head[:4]) < 0 or math.prod(head[:4]) != total:
            raise ValueError(f"candidates: expected a record for {total} places, found {list(numbers)[:12]}: it is damaged.")
        units = Units(head[0], head[1], head[2], head[3], bool(head[4]), bool(head[5]))
        kinds = [form.kind for form in forms]
        if NOSELF in kinds[:1] or BITMAP in kinds[:1] or LISTED in kinds[1:] or kinds.count(BITMAP) > 1:
            raise ValueError(f"candidates: expected a form of places first, found the kinds {kinds}: the record is damaged.")
        as_bits = kinds[0] == LISTED and rest[1] == _AS_BITS
        wanted = (total + 63) // 64 if BITMAP in kinds or as_bits else items.numel() if LISTED in kinds else 0
        if items.numel() != wanted or items.dtype is not torch.int64:
            raise ValueError(f"candidates: expected {wanted} numbers, found {items.numel()}: the record is damaged.")
        if as_bits:
            items = cls(units, (Form(WHOLE), Form(BITMAP)), items, 0).places()
        ordered = LISTED not in kinds or bool((items[1:] > items[:-1]).all())
        if LISTED in kinds and items.numel() and (int(items[0]) < 0 or int(items[-1]) >= total or not ordered):
            raise ValueError(f"candidates: expected ascending places below {total}: the record is damaged.")
        for form in forms:
            problem = None if form.kind in (WHOLE, LISTED, BITMAP) else _rule(form).problem(units)
            if problem is not None:
                raise ValueError(f"candidates: {problem}: the record is damaged.")
        return cls(units, forms, items)


_AS_BITS = 1  # in the record of a LISTED form: its items are the words of a bitmap


def _bits_of(places: Tensor, total: int) -> Tensor:
    """Return the words of the bitmap of some places, int64, which are all different."""
    words = torch.zeros((total + 63) // 64, dtype=torch.long, device=places.device)
    return words.index_add_(0, places >> 6, torch.ones_like(places) << (places & 63))


def incomplete(space: int) -> int:
    """Return how many of the 63-bit draws lie in the incomplete last block of a space; they are drawn again."""
    return (randomness.LARGEST % space + 1) % space if space else 0


def draw_codes(words: Tensor, space: int, count: int, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """Draw a place for each 64-bit word (see :meth:`Allowed.draw`).

    Args:
        words: int64 [R].
        space: the number of codes.
        count: about how many of them stand for a place.
        decode: a function that returns the place of each code, or -1.

    Returns:
        int64 [R].
    """
    found = torch.full_like(words, -1)
    pending = torch.arange(words.numel(), device=words.device)
    tries = max(1, min(_MOST_TRIES, space // max(count, 1)))
    rest, first = incomplete(space), 0
    while pending.numel():
        number = torch.arange(first, first + tries, device=words.device)
        own = words[pending][:, None]
        word = torch.where(number > 0, randomness.bits_of(own, number[None, :]), own)
        draw = word & randomness.LARGEST
        code = torch.where(draw <= randomness.LARGEST - rest, draw % space, -1)
        place = torch.where(code >= 0, decode(code.clamp(min=0)), -1)
        hit = (place >= 0).to(torch.uint8).argmax(1, keepdim=True)
        place = place.gather(1, hit)[:, 0]
        done = place >= 0
        found[pending[done]] = place[done]
        pending, first = pending[~done], first + tries
    return found


def _column(form: Form, units: Units, row: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column at an offset in the stretch or the window of a row, and whether there is one."""
    if form.kind == BAND:
        width = form.numbers[0]
        column = (2 * row + 1) * units.columns // (2 * units.rows) - width + offset
        return column, (column >= 0) & (column < units.columns)
    if form.kind == BLOCKS:
        number = form.numbers[0]
        block = row * number // units.rows
        column = -(-block * units.columns // number) + offset
        return column, column * number // units.columns == block
    height, width, high, wide, reach, squared, _ = form.numbers
    side = 2 * reach + 1
    channel, spot = offset // (side * side), offset % (side * side)
    down, across = spot // side - reach, spot % side - reach
    y = (2 * (row % (high * wide) // wide) + 1) * height // (2 * high) + down
    x = (2 * (row % wide) + 1) * width // (2 * wide) + across
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (down * down + across * across <= squared)
    return (channel * height + y) * width + x, inside


def _columns_in_all(form: Form, units: Units) -> int:
    """Count the pairs of units of a band or of blocks, row by row."""
    found = 0
    for first in range(0, units.rows, _PIECE):
        row = torch.arange(first, min(first + _PIECE, units.rows))
        if form.kind == BAND:
            middle = (2 * row + 1) * units.columns // (2 * units.rows)
            low, high = (middle - form.numbers[0]).clamp(min=0), (middle + form.numbers[0] + 1).clamp(max=units.columns)
        else:
            number = form.numbers[0]
            block = row * number // units.rows
            low, high = -(-block * units.columns // number), -(-(block + 1) * units.columns // number)
        found += int((high - low).sum())
    return found


def form_of(part: Candidates, units: Units) -> Form:
    """Return the form of a part that knows its places by a rule."""
    if isinstance(part, Band):
        return Form(BAND, (min(part.width, units.columns), 2 * min(part.width, units.columns) + 1))
    if isinstance(part, Blocks):
        return Form(BLOCKS, (part.number, -(-units.columns // part.number)))
    if isinstance(part, Local):
        window = (2 * part.reach + 1) ** 2 * (units.columns // (part.grid[0] * part.grid[1]))
        return Form(LOCAL, (*part.grid, *(part.outputs or part.grid), part.reach, part.squared, window))
    assert isinstance(part, NoSelf)
    return Form(NOSELF)


def permits(form: Form, units: Units, row: Tensor, column: Tensor) -> Tensor:
    """Tell which pairs of units a form with a rule allows: bool."""
    numbers = form.numbers
    if form.kind == LOCAL:
        height, width, high, wide, _, squared, _ = numbers
        return near((height, width), (high, wide), squared, row, column)
    return _rule(form).permits(units, row, column)


def _rule(form: Form) -> Rule:
    """Return a rule that fits the same layouts as a form."""
    numbers = form.numbers
    if form.kind == LOCAL:
        return Local(numbers[:2], 0, numbers[2:4])  # type: ignore[arg-type]
    return Band(numbers[0]) if form.kind == BAND else Blocks(numbers[0]) if form.kind == BLOCKS else NoSelf()


def _form_of_words(words: Sequence[int]) -> Form:
    """Read a form of a record."""
    kind = words[0] if words else -1
    sizes = {WHOLE: 0, BAND: 2, BLOCKS: 2, LOCAL: 7, LISTED: 0, NOSELF: 0, BITMAP: 0}
    if kind not in sizes or min(words) < 0:
        raise ValueError(f"candidates: expected a kind of form from 0 to {len(sizes) - 1}, found {kind}: it is damaged.")
    return Form(int(kind), tuple(int(word) for word in words[1 : 1 + sizes[kind]]))


def describe(form: Form, items: Tensor) -> str:
    """Name a form in a few characters, for reports."""
    numbers = form.numbers
    if form.kind == LOCAL:
        return f"Local({numbers[0]}x{numbers[1]}, {math.sqrt(numbers[5]):g})"
    names = {BAND: "Band", BLOCKS: "Blocks"}
    if form.kind in names:
        return f"{names[form.kind]}({numbers[0]})"
    return "NoSelf" if form.kind == NOSELF else "Mask"


# -- from what a user gives ---------------------------------------------------------------------------------------------------


def bind(given: Any, units: Units, shape: Sequence[int], device: torch.device | None = None) -> Allowed:
    """Fit candidates to a weight.

    A mask is kept as one bit per place, or as a list of the allowed places if they are at most one in 8. So is a function,
    which is asked about every place once. The other forms keep nothing.

    Args:
        given: what the user gives, see :func:`lightning_deepr.algorithm.candidates.as_candidates`.
        units: the layout of the weight.
        shape: the weight's shape.
        device: where a mask has to be; None: anywhere.

    Raises:
        ValueError: it does not fit; the message is the end of a sentence about the tensor.
    """
    parts = parts_of(given)
    for part in parts:
        problem = part.problem(units)
        if problem is not None:
            raise ValueError(problem)
    masks = [part for part in parts if isinstance(part, Mask)]
    functions = [part for part in parts if isinstance(part, Where)]
    ruled: list[Form] = []
    for part in parts:
        if not isinstance(part, (Mask, Where)) and (form := form_of(part, units)) not in ruled:
            ruled.append(form)
    spread = [_spread(mask.mask, units, shape, device) for mask in masks]
    if spread or functions:
        if functions and units.total > MOST_ASKED:
            raise ValueError(
                f"expected at most {MOST_ASKED} places for a function, which is asked about each of them, found {units.total}. "
                "Give a form that knows its places: Band, Blocks, Local"
            )
        found = _listed(units, ruled, spread, functions)
        found._beside, found._has_mask = ruled, bool(spread)
    else:
        generators = [form for form in ruled if form.kind != NOSELF and form.numbers[-1] < units.columns]
        first = min(generators, key=lambda form: form.numbers[-1], default=Form(WHOLE))
        found = Allowed(units, (first, *(form for form in ruled if form is not first)), torch.empty(0, dtype=torch.long))
        if found.count * 32 < found.space <= MOST_ASKED:  # the forms hardly meet
            text = found.text
            found = Allowed(units, (Form(LISTED),), torch.cat(list(found.pieces())).sort().values, text=text)
    if found.count == 0:
        raise ValueError(
            f"allow none of the {units.total} places ({', '.join(map(repr, parts))}): expected one for each connection"
        )
    return found


def _spread(mask: Tensor, units: Units, shape: Sequence[int], device: torch.device | None) -> Tensor:
    """Give a mask the weight's shape."""
    whole, found = tuple(shape), tuple(mask.shape)
    one = (whole[0] // units.groups, *whole[1:]) if len(whole) >= 2 and units.groups and whole[0] % units.groups == 0 else whole
    if mask.device.type == "meta" or (device is not None and device.type != "meta" and mask.device.type != device.type):
        raise ValueError(f"expected a mask on {device or 'the device of the weight'}, found it on {mask.device}: move it there")
    if found == whole:
        return mask.reshape(-1).cpu()
    view = mask
    if units.kernel and found in (whole[:2], one[:2]):
        view = mask.reshape(*found, *[1] * len(units.kernel)).expand(*found, *whole[2:])
    if tuple(view.shape) == whole:
        return view.reshape(-1).cpu()
    if tuple(view.shape) == one:
        return view.reshape(1, *one).expand(units.groups, *one).reshape(-1).cpu()
    accepted = [whole]
    accepted += [one] if one != whole else []
    accepted += [whole[:2]] if units.kernel else []
    raise ValueError(f"expected a mask of shape {' or '.join(map(str, accepted))}, found {found}")


def _listed(units: Units, ruled: Sequence[Form], masks: Sequence[Tensor], functions: Sequence[Where]) -> Allowed:
    """Look at every place, and keep the allowed ones as bits, or as a list if they are few."""
    total = units.total
    size = (total + 63) // 64
    words, count = torch.zeros(size, dtype=torch.long), 0
    power = torch.ones(64, dtype=torch.long) << torch.arange(64)
    for first in range(0, total, _PIECE):
        places = torch.arange(first, min(first + _PIECE, total))
        found = torch.ones_like(places, dtype=torch.bool)
        for mask in masks:
            found &= mask[first : first + _PIECE]
        for form in ruled:
            found &= permits(form, units, *units.split(places))
        for function in functions:
            found &= function.answers(units, places).cpu()
        count += int(found.sum())
        padded = torch.zeros(-(-found.numel() // 64) * 64, dtype=torch.bool)
        padded[: found.numel()] = found
        part = (padded.view(-1, 64) * power).sum(1)
        words[first >> 6 : (first >> 6) + part.numel()] = part
    several = [describe(form, words) for form in ruled] + [repr(function) for function in functions] + ["Mask"] * len(masks)
    bitmap = Allowed(units, (Form(WHOLE), Form(BITMAP)), words, count, functions, text=" & ".join(several))
    if LISTED_FROM * count > total:
        return bitmap
    return Allowed(units, (Form(LISTED),), bitmap.places(), count, functions, text=bitmap.text)
