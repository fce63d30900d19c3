"""The words of the kernels' arguments and tables: the caller and the kernel see the same ones."""

from __future__ import annotations

import ctypes
import inspect
import struct

import numpy as np
import pytest
import torch

from lightning_deepr import kernels
from lightning_deepr.algorithm.newborns import State
from lightning_deepr.kernels import rows
from lightning_deepr.kernels.cpu import fields
from lightning_deepr.kernels.cpu.fields import (
    CpuRow,
    Fields,
    GpuRow,
    LinearArguments,
    Row,
    SoftArguments,
    StateRow,
    StepArguments,
)

LISTS = [kind for _, kind in inspect.getmembers(fields, inspect.isclass) if issubclass(kind, Fields) and kind is not Fields]
BEHIND = {CpuRow: Row, GpuRow: Row}  # lists that follow another one
by_name = pytest.mark.parametrize("kind", LISTS, ids=lambda kind: kind.__name__)
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no numba here")


def test_all_lists_are_found() -> None:
    assert {StepArguments, Row, CpuRow, LinearArguments, StateRow} <= set(LISTS)


@by_name
def test_words_are_dense_and_names_are_unique(kind: type[Fields]) -> None:
    first = len(BEHIND[kind]) if kind in BEHIND else 0
    assert [field.value for field in kind] == list(range(first, first + len(kind)))
    assert len(kind.__members__) == len(kind)  # no second name for one word
    if kind in BEHIND:
        assert not set(kind.__members__) & set(BEHIND[kind].__members__)


def test_rows_have_room_for_all_states() -> None:
    for row, length in ((CpuRow, fields.ROW_WORDS), (GpuRow, fields.GPU_ROW_WORDS)):
        assert max(row) == row.FIRST_STATE
        assert length == row.FIRST_STATE + fields.MOST_STATES * len(StateRow)


@pytest.mark.parametrize("kind", [kind for kind in LISTS if kind not in BEHIND], ids=lambda kind: kind.__name__)
def test_words_that_are_given_by_name_lie_at_their_position(kind: type[Fields]) -> None:
    filled = fields.filler(kind)
    assert len(filled()) == len(kind) and not any(filled())
    alone = [name for name in kind.__members__ if name not in fields.ORDER_NAMES]
    for name in alone:
        arguments = filled(**{name: -7})
        assert arguments[kind[name]] == -7 and sum(map(bool, arguments)) == 1
    packed = fields.packer(kind)(**{name: 100 + kind[name] for name in alone})
    words = fields.writable(packed)
    assert [words[kind[name]] for name in alone] == [100 + kind[name] for name in alone]
    assert len(words) == len(kind)
    with pytest.raises(TypeError, match="unexpected keyword argument 'BATCHES'"):
        filled(BATCHES=1)


def test_the_addresses_of_an_order_are_given_together() -> None:
    given = {"BIAS": -1, "DX": -2, "order": fields.pack_order(*range(1, 7))}
    packed = fields.packer(LinearArguments)(**given)
    words = fields.writable(packed)
    assert bytes(fields.filler(LinearArguments)(**given)) == packed
    assert [words[LinearArguments[name]] for name in fields.ORDER_NAMES] == [1, 2, 3, 4, 5, 6]
    assert (words[LinearArguments.BIAS], words[LinearArguments.DX]) == (-1, -2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ROW_START'"):
        fields.packer(LinearArguments)(ROW_START=1)
    swapped = Fields("Swapped", list(reversed(fields.ORDER_NAMES)))
    with pytest.raises(TypeError, match="Swapped: expected ROW_START, ROW_COLUMN"):
        fields.packer(swapped)


def test_floats_keep_their_bits() -> None:
    packed = fields.packer(SoftArguments, floats=("SCALE",))(COUNT=3, SCALE=0.1)
    assert bytes(fields.filler(SoftArguments, floats=("SCALE",))(COUNT=3, SCALE=0.1)) == packed
    assert struct.unpack_from("d", packed, 8 * SoftArguments.SCALE) == (0.1,)
    assert struct.unpack_from("q", packed, 8 * SoftArguments.COUNT) == (3,)


@pytest.mark.parametrize(("word", "expected"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)])
def test_signed(word: int, expected: int) -> None:
    assert fields.signed(word) == expected


@needs_kernels
def test_a_kernel_reads_what_the_caller_wrote_under_the_same_name() -> None:
    """Compiled code reads each word by its name and copies it to the next free position of another array."""
    from lightning_deepr.kernels.cpu.native import Kernel, load_int64, store_int64

    lines, names = ["def echo(a):", "    source, target = load_int64(a), load_int64(a + 8)"], []
    offset = 0
    for kind in LISTS:
        for name in kind.__members__:
            lines.append(
                f"    store_int64(target + {8 * len(names)}, load_int64(source + {8 * offset} + 8 * {kind.__name__}.{name}))"
            )
            names.append((kind, name, offset))
        offset += max(kind) + 1
    scope = {kind.__name__: kind for kind in LISTS} | {"load_int64": load_int64, "store_int64": store_int64}
    exec("\n".join(lines), scope)
    source, target = (ctypes.c_int64 * offset)(), (ctypes.c_int64 * len(names))()
    for number, (kind, name, start) in enumerate(names):
        source[start + kind[name]] = 1000 + number
    Kernel(scope["echo"])((ctypes.c_int64 * 2)(ctypes.addressof(source), ctypes.addressof(target)))
    read = {(kind, name): value for (kind, name, _), value in zip(names, target, strict=True)}
    assert read == {(kind, name): 1000 + number for number, (kind, name, _) in enumerate(names)}


@needs_kernels
def test_the_step_on_the_cpu_finds_what_its_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test reads all words of a row as the kernel does."""
    from lightning_deepr.kernels.cpu import rewire
    from lightning_deepr.kernels.cpu.step import Table
    from lightning_deepr.weights.k_slots import KSlots

    seen: dict[str, int] = {}

    def look(arguments: ctypes.Array[ctypes.c_int64], threads: int) -> None:
        row = (ctypes.c_int64 * fields.ROW_WORDS).from_address(arguments[StepArguments.TABLE])
        seen.update({field.name: row[field] for kind in (Row, CpuRow) for field in kind})
        seen.update({f"state {field.name}": row[CpuRow.FIRST_STATE + fields.STATE_WORDS + field] for field in StateRow})
        seen.update({f"argument {field.name}": arguments[field] for field in StepArguments})

    monkeypatch.setattr(rewire, "rewire_kernel", lambda size: look)
    slots = KSlots(torch.Size((5, 7)), torch.tensor([3, 11, 30]), 2, 99, torch.tensor([4]))
    order = slots.refresh_order()
    theta, moments = torch.rand(3), [torch.rand(3), torch.rand(3)]
    table = Table([slots], 4)
    assert table.step(
        [theta], [0.5], [0.25], [True], [[State("", moments[0], 0.0), State("", moments[1], 0.75, averaged=True)]], 8, 6, 9
    ) == ([0], [0])
    word = struct.Struct("d")
    expected = {
        "THETA": theta.data_ptr(), "PLACES": slots.places.data_ptr(), "BORN": slots.born.data_ptr(),
        "SIGNS": slots.signs.data_ptr(), "EXCEPTIONS": slots.exceptions.data_ptr(), "EXCEPTION_COUNT": 1,
        "COUNTER": 2 << 40, "SIGN_SEED": 99, "COUNT": 3, "TOTAL": 35, "REWIRES": 1, "STATES": 2, "SIZE": 4, "ROWS": 5,
        "COLUMNS": 7, "REBORN": table.reborn[0].data_ptr(),
        "state ADDRESS": moments[1].data_ptr(), "state SIZE": 4, "state AVERAGED": 1,
        "argument TASK": 0, "argument TENSORS": 1, "argument STEP": 9, "argument SEED": 6, "argument NEWBORN_SINCE": 8,
        "argument FINISHED": 0, **dict(zip(fields.ORDER_NAMES, order.addresses, strict=True)),
    }  # fmt: skip
    assert {name: seen[name] for name in expected} == expected
    floats = {name: word.unpack(struct.pack("q", seen[name]))[0] for name in ("DECREMENT", "SCALE", "state START")}
    assert floats == {"DECREMENT": 0.5, "SCALE": 0.25, "state START": 0.75}


def test_states_are_written_behind_the_row() -> None:
    row = np.zeros(fields.ROW_WORDS, np.int64)
    rows.write_states(row, row.view(np.float64), CpuRow.FIRST_STATE, [(11, 4, 0.5, 1)] * fields.MOST_STATES)
    assert row[Row.STATES] == fields.MOST_STATES and row[-len(StateRow) + StateRow.ADDRESS] == 11
    assert row.view(np.float64)[-len(StateRow) + StateRow.START] == 0.5
