"""Algorithm 1 after the gradient step, for all tensors of a network, in Triton (see :mod:`lightning_deepr.algorithm.rewiring`).

Nothing comes back to the host. Each kernel covers the slots of all tensors, and a program takes a piece of one tensor:

1. ``shrink`` applies L1, noise and the sign test, and counts and lists the slots with theta < 0, in any order.
2. ``insert`` puts the places of the active connections into a hash table.
3. ``claim`` lets every dormant slot draw until it has a place.
4. ``add_living`` and ``add_sums`` add the living slots of averaged states, see :mod:`lightning_deepr.algorithm.newborns`.
5. ``finish`` gives the reborn slots theta 0, a place, a sign, a birth and the optimizer's starting state, or the mean.

The PyTorch version judges draws in the order (attempt, slot): a place without an active connection goes to its earliest draw.
The threads of a GPU come in any order. Here a slot therefore only *holds* a place: an earlier draw takes the place from a
later one, and the slot that loses it goes on with its next draw. This is deferred acceptance (Gale and Shapley, 1962): slots
propose to places in the order of their draws, places prefer the earlier (attempt, slot), and the outcome does not depend on
the order of the proposals. The rounds of the PyTorch version are one such order.

In the table of active places, the keys of a cluster lie in the order in which a search meets them: a cell takes the smaller of
its key and the new key, and the larger one goes on to the next cell. A cell only ever decreases, so ``atomic_min`` suffices,
and the layout does not depend on the order of the insertions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels.cpu import fields
from lightning_deepr.kernels.cpu.fields import GpuHeader, GpuRow, Row, StateRow
from lightning_deepr.kernels.gpu.draws import LARGEST, bits, extend, mix, normal


def _word(position: int) -> tl.constexpr:
    """Make a position in the table a constant. (Triton takes a plain number as a constant only in this form.)"""
    return tl.constexpr(int(position))


# Words (int64) that hold for all tensors
STEP, NEWBORN_SINCE = _word(GpuHeader.STEP), _word(GpuHeader.NEWBORN_SINCE)
BIRTH_STREAM, NOISE_KEY = _word(GpuHeader.BIRTH_STREAM), _word(GpuHeader.NOISE_KEY)
HEADER = _word(fields.GPU_HEADER_WORDS)
# Words of each tensor, after those
THETA, PLACES, BORN, SIGNS = _word(Row.THETA), _word(Row.PLACES), _word(Row.BORN), _word(Row.SIGNS)
EXCEPTIONS, EXCEPTION_COUNT = _word(Row.EXCEPTIONS), _word(Row.EXCEPTION_COUNT)
COUNT, TOTAL, COUNTER, SIGN_SEED = _word(Row.COUNT), _word(Row.TOTAL), _word(Row.COUNTER), _word(Row.SIGN_SEED)
DECREMENT, SCALE, REWIRES, STATES = _word(Row.DECREMENT), _word(Row.SCALE), _word(Row.REWIRES), _word(Row.STATES)
LIMIT, SLOT_START, LISTED = _word(GpuRow.LIMIT), _word(GpuRow.SLOT_START), _word(GpuRow.LISTED)
FIRST_STATE, STATE_WORDS, MOST_STATES = _word(GpuRow.FIRST_STATE), _word(fields.STATE_WORDS), _word(fields.MOST_STATES)
ADDRESS, SIZE, START = _word(StateRow.ADDRESS), _word(StateRow.SIZE), _word(StateRow.START)
AVERAGED = _word(StateRow.AVERAGED)
FLOAT32, FLOAT64 = _word(fields.FLOATS["float32"]), _word(fields.FLOATS["float64"])
BFLOAT16, FLOAT16 = _word(fields.FLOATS["bfloat16"]), _word(fields.FLOATS["float16"])
FIELDS = _word(fields.GPU_ROW_WORDS)

EMPTY = tl.constexpr(randomness.LARGEST)  # larger than every place and every claim
NEVER = tl.constexpr(-1)  # a value that no cell ever holds
SLOT_BITS, SLOT_MASK = tl.constexpr(randomness.SLOT_BITS), tl.constexpr((1 << randomness.SLOT_BITS) - 1)
CELLS = tl.constexpr(2)  # cells of a hash table for each slot: the table is at most half full


@triton.jit
def piece(words, pieces):
    """Return the piece that a program works on: the number and the words of its tensor, and the first slot."""
    at = pieces + 2 * tl.program_id(0)
    tensor = tl.load(at)
    return tensor, words + HEADER + tensor * FIELDS, tl.load(at + 1)


@triton.jit
def following(cell, capacity):
    return tl.where(cell + 1 == capacity, 0, cell + 1)


@triton.jit
def home(place, capacity):
    """Compute the cell at which the search for a place begins."""
    return tl.umulhi(mix(place.to(tl.uint64)), capacity.to(tl.uint64)).to(tl.int64)


@triton.jit
def shrink(words, pieces, counts, dormant, REAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Compute theta <- theta - eta * alpha + sqrt(2 * eta * T) * nu in place. Slots with theta < 0 then go dormant.

    Args:
        counts: int64 [tensors, 2], zeros before: the number of slots that go dormant, and how many of them had been newborns.
        dormant: int32 [K], the slots that go dormant. Those of a tensor begin at the position of its first slot.
        REAL, WIDE: the type of theta, and the type in which PyTorch computes with theta.
    """
    tensor, row, first = piece(words, pieces)
    slots = first + tl.arange(0, BLOCK)
    inside = slots < tl.load(row + COUNT)
    theta = tl.load(row + THETA).to(tl.pointer_type(REAL)) + slots
    value = tl.load(theta, mask=inside, other=0.0).to(WIDE)
    decrement = tl.load(row + DECREMENT).to(tl.float64, bitcast=True)
    if decrement != 0.0:
        value = (value - decrement.to(WIDE)).to(REAL).to(WIDE)
    scale = tl.load(row + SCALE).to(tl.float64, bitcast=True)
    if scale != 0.0:
        nu = normal(tl.load(words + NOISE_KEY).to(tl.uint64, bitcast=True), tl.load(row + COUNTER) + slots)
        value = (value + (nu * scale).to(WIDE).to(REAL).to(WIDE)).to(REAL).to(WIDE)
    if tl.load(row + REWIRES) == 0:
        value = tl.where(value < 0, 0.0, value)  # slots stay active at 0, with their places and signs
    tl.store(theta, value.to(REAL), mask=inside)
    died = inside & (value < 0)
    number = tl.sum(died.to(tl.int64))
    if number > 0:
        start = tl.load(row + SLOT_START) + tl.atomic_add(counts + 2 * tensor, number)
        tl.store(dormant + start + tl.cumsum(died.to(tl.int64)) - 1, slots.to(tl.int32), mask=died)
        born = tl.load(tl.load(row + BORN).to(tl.pointer_type(tl.int64)) + slots, mask=died, other=0)
        newborns = died & (born >= tl.load(words + NEWBORN_SINCE))
        tl.atomic_add(counts + 2 * tensor + 1, tl.sum(newborns.to(tl.int64)))


@triton.jit
def insert(words, pieces, counts, taken, REAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Put the places of the active connections into the hash table ``taken``, int64 [CELLS * K], all EMPTY."""
    tensor, row, first = piece(words, pieces)
    if (tl.load(counts + 2 * tensor) > 0) & (tl.load(row + LISTED) == 0):
        count = tl.load(row + COUNT)
        slots = first + tl.arange(0, BLOCK)
        inside = slots < count
        value = tl.load(tl.load(row + THETA).to(tl.pointer_type(REAL)) + slots, mask=inside, other=-1.0).to(WIDE)
        going = inside & ~(value < 0)
        key = tl.load(tl.load(row + PLACES).to(tl.pointer_type(tl.int64)) + slots, mask=going, other=0)
        table, capacity = taken + tl.load(row + SLOT_START) * CELLS, count * CELLS
        cell = home(key, capacity)
        left = tl.sum(going.to(tl.int32))
        while left > 0:
            found = tl.atomic_min(table + cell, key, mask=going, sem="relaxed")
            going = going & (found != EMPTY) & (found != key)
            key = tl.maximum(key, found)
            cell = following(cell, capacity)
            left = tl.sum(going.to(tl.int32))


@triton.jit
def claim(words, pieces, counts, dormant, taken, drawn, claims, BLOCK: tl.constexpr):
    """Let every dormant slot draw places until it holds one.

    Args:
        taken: the hash table of active places.
        drawn: int64 [CELLS * K], all EMPTY before: a hash table of the places that are held.
        claims: int64 [CELLS * K], all EMPTY before: the holder of each place, attempt * 2**SLOT_BITS + slot.
    """
    tensor, row, first = piece(words, pieces)
    number = tl.load(counts + 2 * tensor)
    if (first < number) & (tl.load(row + LISTED) == 0):
        lanes, start = first + tl.arange(0, BLOCK), tl.load(row + SLOT_START)
        pending = lanes < number
        slot = tl.load(dormant + start + lanes, mask=pending, other=0).to(tl.int64)
        attempt = tl.zeros([BLOCK], tl.int64)
        capacity = tl.load(row + COUNT) * CELLS
        known, held, holders = taken + start * CELLS, drawn + start * CELLS, claims + start * CELLS
        total, limit, counter = tl.load(row + TOTAL), tl.load(row + LIMIT), tl.load(row + COUNTER)
        stream = tl.load(words + BIRTH_STREAM).to(tl.uint64, bitcast=True)
        left = tl.sum(pending.to(tl.int32))
        while left > 0:
            draw = (bits(extend(stream, attempt.to(tl.uint64)), counter + slot) & LARGEST).to(tl.int64)
            place = draw % total
            # look for the place among those of active connections: if it is there, it is not free
            free = pending & (draw <= limit)
            cell = home(place, capacity)
            looking, looks = free, tl.sum(free.to(tl.int32))
            while looks > 0:
                found = tl.load(known + cell, mask=looking, other=EMPTY)
                free = free & ~(looking & (found == place))
                looking = looking & (found < place)
                cell = following(cell, capacity)
                looks = tl.sum(looking.to(tl.int32))
            # Hold the place, unless an earlier draw holds it. atomic_cas has no mask: a lane that takes no part expects NEVER.
            mine = (attempt << SLOT_BITS) | slot
            later = mine
            cell = home(place, capacity)
            reaching, reaches = free, tl.sum(free.to(tl.int32))
            while reaches > 0:
                expected = tl.where(reaching, EMPTY, NEVER)
                found = tl.atomic_cas(held + cell, expected, tl.where(reaching, place, NEVER), sem="relaxed")
                here = reaching & ((found == EMPTY) | (found == place))
                holder = tl.atomic_min(holders + cell, mine, mask=here, sem="relaxed")
                pending = pending & ~(here & (holder == EMPTY))
                later = tl.where(here & (holder != EMPTY), tl.maximum(mine, holder), later)
                reaching = reaching & ~here
                cell = tl.where(reaching, following(cell, capacity), cell)
                reaches = tl.sum(reaching.to(tl.int32))
            # the later of the two draws has lost: its slot draws again
            slot, attempt = later & SLOT_MASK, (later >> SLOT_BITS) + 1
            left = tl.sum(pending.to(tl.int32))


@triton.jit
def tree_sum(values, BLOCK: tl.constexpr):
    """Add BLOCK values, a power of two, by a binary tree of neighbours. (The order of ``tl.sum`` over all is not specified.)"""
    for level in tl.static_range(BLOCK.bit_length() - 1):
        values = tl.sum(tl.reshape(values, (BLOCK >> (level + 1), 2)), axis=1)
    return tl.sum(values)


@triton.jit
def add_living(words, pieces, counts, sums, MOST: tl.constexpr, REAL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Add the entries of averaged states in a piece. Reborn slots, where theta is still below 0, count as 0.

    Args:
        sums: float64 [MOST, pieces], the result.
        MOST: the largest number of states of a tensor.
    """
    tensor, row, first = piece(words, pieces)
    if tl.load(counts + 2 * tensor) > 0:
        slots = first + tl.arange(0, BLOCK)
        inside = slots < tl.load(row + COUNT)
        theta = tl.load(tl.load(row + THETA).to(tl.pointer_type(REAL)) + slots, mask=inside, other=-1.0).to(WIDE)
        living = inside & ~(theta < 0)
        states = tl.load(row + STATES)
        for i in tl.static_range(MOST):
            if i < states:
                entry = row + FIRST_STATE + STATE_WORDS * i
                kind = tl.load(entry + AVERAGED)
                if kind > 0:
                    value = state_at(tl.load(entry + ADDRESS), kind, slots, living)
                    tl.store(sums + i * tl.num_programs(0) + tl.program_id(0), tree_sum(value, BLOCK))


@triton.jit
def state_at(address, kind, slots, mask):
    """Load a state of any type as float64; 0 where the mask is False."""
    value = tl.zeros_like(slots).to(tl.float64)
    if kind == FLOAT32:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + slots, mask=mask, other=0.0).to(tl.float64)
    elif kind == FLOAT64:
        value = tl.load(address.to(tl.pointer_type(tl.float64)) + slots, mask=mask, other=0.0)
    elif kind == BFLOAT16:
        word = tl.load(address.to(tl.pointer_type(tl.int16)) + slots, mask=mask, other=0)
        value = (word.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + slots, mask=mask, other=0.0).to(tl.float64)
    return value


@triton.jit
def add_sums(groups, sums, total, number, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Add up to BLOCK sums of one tensor that follow one another. Repeated until one is left for each tensor.

    Args:
        groups: int64 [groups, 2], the first sum of each group and the number of its sums.
        sums: float64 [MOST, number].
        total: float64 [MOST, groups], the result.
    """
    at = groups + 2 * tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    for i in tl.static_range(MOST):
        values = tl.load(sums + i * number + tl.load(at) + lanes, mask=lanes < tl.load(at + 1), other=0.0)
        tl.store(total + i * tl.num_programs(0) + tl.program_id(0), tree_sum(values, BLOCK))


@triton.jit
def mean_bits(total, living, kind, start):
    """Compute the bits of what a newborn gets (``newborns.mean_of``). ``start`` has those of the starting value."""
    mean = total / tl.maximum(living, 1).to(tl.float64)
    word = mean.to(tl.int64, bitcast=True)
    use = (living > 0) & (((word >> 52) & 0x7FF) != 0x7FF)  # finite
    if kind != FLOAT64:
        short = mean.to(tl.float32)
        if kind == FLOAT16:
            word = short.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64)
        else:
            word = short.to(tl.int32, bitcast=True).to(tl.int64)
            if kind == BFLOAT16:  # to the nearest, or the even one
                word = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return tl.where(use, word, start)


@triton.jit
def finish(words, pieces, counts, drawn, claims, total, tensors, MOST: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Give the reborn slots theta 0, a place, a sign, a birth and the optimizer's starting state, or the mean.

    Args:
        total: float64 [MOST, tensors], the sums of the living slots of averaged states.
        MOST: the largest number of states of a tensor that has an averaged one; 0: none has, and there is no ``total``.
    """
    tensor, row, first = piece(words, pieces)
    if (tl.load(counts + 2 * tensor) > 0) & (tl.load(row + LISTED) == 0):
        cells = first * CELLS + tl.arange(0, CELLS * BLOCK)
        at = tl.load(row + SLOT_START) * CELLS + cells
        held = tl.load(claims + at, mask=cells < tl.load(row + COUNT) * CELLS, other=EMPTY)
        born = held != EMPTY
        slot, place = held & SLOT_MASK, tl.load(drawn + at, mask=born, other=0)
        sign = sign_of(row, place, born)
        tl.store(tl.load(row + THETA).to(tl.pointer_type(REAL)) + slot, tl.zeros_like(sign).to(REAL), mask=born)
        tl.store(tl.load(row + PLACES).to(tl.pointer_type(tl.int64)) + slot, place, mask=born)
        tl.store(tl.load(row + SIGNS).to(tl.pointer_type(REAL)) + slot, sign.to(REAL), mask=born)
        step = tl.zeros_like(place) + tl.load(words + STEP)
        tl.store(tl.load(row + BORN).to(tl.pointer_type(tl.int64)) + slot, step, mask=born)
        states = tl.load(row + STATES)
        for i in tl.static_range(MOST_STATES):
            if i < states:
                entry = row + FIRST_STATE + STATE_WORDS * i
                address, size, start = tl.load(entry + ADDRESS), tl.load(entry + SIZE), tl.load(entry + START)
                if i < MOST:
                    kind = tl.load(entry + AVERAGED)
                    if kind > 0:
                        living = tl.load(row + COUNT) - tl.load(counts + 2 * tensor)
                        start = mean_bits(tl.load(total + i * tensors + tensor), living, kind, start)
                value = tl.zeros_like(place) + start
                if size == 2:
                    tl.store(address.to(tl.pointer_type(tl.int16)) + slot, value.to(tl.int16), mask=born)
                elif size == 4:
                    tl.store(address.to(tl.pointer_type(tl.int32)) + slot, value.to(tl.int32), mask=born)
                else:
                    tl.store(address.to(tl.pointer_type(tl.int64)) + slot, value, mask=born)


@triton.jit
def sign_of(row, place, valid):
    """Compute the constant sign of each place, float32 (``KSlots.signs_at``)."""
    negative = bits(tl.load(row + SIGN_SEED).to(tl.uint64, bitcast=True), place).to(tl.int64) < 0
    number = tl.load(row + EXCEPTION_COUNT)
    if number > 0:
        exceptions = tl.load(row + EXCEPTIONS).to(tl.pointer_type(tl.int64))
        low, high = tl.zeros_like(place), tl.zeros_like(place) + number
        left = number
        while left > 0:
            open = valid & (low < high)
            middle = (low + high) >> 1
            less = open & (tl.load(exceptions + middle, mask=open, other=0) < place)
            low, high = tl.where(less, middle + 1, low), tl.where(open & ~less, middle, high)
            left = left >> 1
        found = valid & (low < number)
        negative = negative ^ (found & (tl.load(exceptions + low, mask=found, other=0) == place))
    return tl.where(negative, -1.0, 1.0)
