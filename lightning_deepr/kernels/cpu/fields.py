"""The words of the kernels' arguments and tables. Each list is defined here, and kernels and callers both use it.

A kernel is a C function of one argument, the address of an array of int64. A member of a class below is a word of such an
array, and its value is the position of the word. A kernel reads ``load_int64(a + 8 * LinearArguments.BATCH)``, where numba
takes the member as a constant. A caller writes ``BATCH=128``. Callers work without numba, so this module does not import it.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Collection
from enum import IntEnum, auto
from typing import Any

FLOATS = {"float32": 1, "float64": 2, "bfloat16": 3, "float16": 4}  # the types of averaged states, as StateRow has them
MOST_STATES = 4  # the most state tensors that a kernel resets; for an optimizer with more, PyTorch resets all of them


class Fields(IntEnum):
    """The words of an array in their order, counted from 0. A list that follows another one begins with the other's length."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[Any]) -> int:
        return last_values[-1] + 1 if last_values else 0


# -- one step of all tensors -----------------------------------------------------------------------------------------------


class StepArguments(Fields):
    """The arguments of the step (:mod:`.rewire`) and of the orders that follow it (:mod:`.orders`)."""

    TASK = auto()
    TENSORS = auto()
    TABLE = auto()  # address of one row per tensor: Row, CpuRow and the states
    STEP = auto()
    SEED = auto()
    NEWBORN_SINCE = auto()  # a slot that was born in this step or later counts as a newborn
    FINISHED = auto()  # the number of tensors that are done


class Row(Fields):
    """The words of a tensor that every step reads, on the CPU and in Triton. An address is 0 if there is nothing."""

    THETA = auto()
    PLACES = auto()
    BORN = auto()
    SIGNS = auto()
    EXCEPTIONS = auto()  # address of the places whose sign is not the hashed one, ascending
    EXCEPTION_COUNT = auto()
    COUNTER = auto()  # the counter of slot 0
    SIGN_SEED = auto()
    COUNT = auto()  # K
    TOTAL = auto()  # N
    DECREMENT = auto()  # eta * alpha, float64
    SCALE = auto()  # sqrt(2 * eta * T), float64
    REWIRES = auto()
    STATES = auto()  # the number of state tensors that follow


class CpuRow(Fields):
    """The words of a tensor that follow Row in the step on the CPU."""

    REBORN = len(Row)  # address of the numbers of the reborn slots
    REBORN_COUNT = auto()
    NEWBORN_DEATHS = auto()
    FINITE = auto()  # the answer: 1 if all of theta is finite
    SIZE = auto()  # bytes of a float of theta
    ROWS = auto()
    COLUMNS = auto()
    ROW_START = auto()
    ROW_COLUMN = auto()
    ROW_SLOT = auto()
    COLUMN_START = auto()
    COLUMN_ROW = auto()
    COLUMN_SLOT = auto()
    # a pass over the places of a large tensor; threads without a tensor of their own help
    PASS_OPEN = auto()
    PASS_CHUNK = auto()
    PASS_BUSY = auto()
    PASS_CELLS = auto()
    PASS_STATUS = auto()
    PASS_BITS = auto()
    PASS_FILTER = auto()
    PASS_FILTER_BITS = auto()
    SCRATCH = auto()  # address of working memory
    SCRATCH_SIDE = auto()  # bytes from there to the working memory of the order by columns
    ALLOWED = auto()  # address of AllowedWords; 0: connections may be everywhere
    SIGN_TABLE = auto()  # address of SignWords; 0: signs are hashed
    NOTES = auto()  # address of NotesWords; 0: nothing is noted
    MARKS = auto()  # address of a bitmap of the places; 0: there is none
    MARKS_KNOWN = auto()  # whether it is that of the present places
    STAYS = auto()  # whether each slot keeps its place: K = N, in order
    RANKED = auto()  # whether newborns get the drawn places by rank
    FIRST_STATE = auto()  # MOST_STATES times StateRow


class AllowedWords(Fields):
    """The places where the connections of a tensor may be (see :class:`lightning_deepr.algorithm.allowed.Allowed`)."""

    COUNT = auto()  # M
    SPACE = auto()  # the number of codes
    LIMIT = auto()  # a draw above it is repeated
    STRETCH = auto()  # the columns of a row's stretch or window
    ROWS = auto()
    COLUMNS = auto()
    MAJORS = auto()
    MINORS = auto()
    INNER = auto()
    TRANSPOSED = auto()
    ITEMS = auto()  # address of the list of places, or of the words of the bitmap
    ITEM_COUNT = auto()
    FORMS = auto()
    FIRST_FORM = auto()  # FORMS times FORM_WORDS: the kind and the numbers of a form


class SignWords(Fields):
    """A table of signs (see :class:`lightning_deepr.algorithm.signs.SignTable`)."""

    INNER = auto()
    LENGTH = auto()
    BLOCK = auto()
    BITS = auto()  # address


class StateRow(Fields):
    """A state tensor of the optimizer."""

    ADDRESS = auto()
    SIZE = auto()  # bytes of an entry
    START = auto()  # the optimizer's starting value: a float64, or in Triton its bits in the type of the tensor
    AVERAGED = auto()  # not 0: a newborn gets the mean of the living slots; in Triton the type of the tensor, see FLOATS


FORM_WORDS = 8
STATE_WORDS = len(StateRow)
ROW_WORDS = CpuRow.FIRST_STATE + MOST_STATES * STATE_WORDS
ORDER = slice(CpuRow.ROW_START, CpuRow.COLUMN_SLOT + 1)


class GpuHeader(Fields):
    """The words of the table in Triton that hold for all tensors."""

    STEP = auto()
    NEWBORN_SINCE = auto()
    BIRTH_STREAM = auto()  # the key of the step's births without the attempt
    NOISE_KEY = auto()


class GpuRow(Fields):
    """The words of a tensor that follow Row in the step in Triton."""

    LIMIT = len(Row)  # a draw above it is repeated
    SLOT_START = auto()  # the position of the tensor's first slot among the slots of all tensors
    LISTED = auto()  # 1 if the tensor is more than half full: PyTorch then lists its dormant places
    FIRST_STATE = auto()  # MOST_STATES times StateRow


GPU_HEADER_WORDS = len(GpuHeader)
GPU_ROW_WORDS = GpuRow.FIRST_STATE + MOST_STATES * STATE_WORDS


class NotesWords(Fields):
    """What is noted about a tensor's births (see :mod:`lightning_deepr.monitoring.record`). An address is 0 for nothing."""

    WORDS = auto()  # address of the bitmap of the places that have been tried
    STRIDE = auto()  # every so-manieth place has a bit
    TRIED = auto()  # the number of bits that are set
    LIVES = auto()  # address of the numbers of deaths by lifetime
    SINCE = auto()  # connections that were born before this step are not counted there


class StartArguments(Fields):
    """The arguments of the draw of the places that a tensor starts with."""

    RESULT = auto()  # address of int64 [K]
    COUNT = auto()  # K
    SEED = auto()
    TOTAL = auto()  # N
    COUNTER = auto()  # the counter of slot 0
    SCRATCH = auto()  # address of working memory


class FiniteArguments(Fields):
    """The arguments of the search for values that are not finite."""

    FINITE = auto()  # the answer: 1 or 0
    NUMBER = auto()
    TABLE = auto()  # address of NUMBER rows, each a ValuesRow


class ValuesRow(Fields):
    """The words of a tensor to check."""

    ADDRESS = auto()
    COUNT = auto()
    SIZE = auto()  # bytes of a value


VALUES_WORDS = len(ValuesRow)


# -- a step that is multiplied (scaled_step) -------------------------------------------------------------------------------


class ScaledArguments(Fields):
    """Arguments of :mod:`.scaled_step`."""

    TASK = auto()
    PHASE = auto()
    ROWS = auto()
    TABLE = auto()  # address of ROWS times ScaledRow


class ScaledRow(Fields):
    """A row of the table: a piece of a theta."""

    THETA = auto()
    BEFORE = auto()  # address of theta before the step
    COUNT = auto()
    SIZE = auto()  # bytes of theta's floats
    FACTOR = auto()  # the factor of the step, float64
    MOVED = auto()  # whether the optimizer took a step on this theta


class ScaledPhase(Fields):
    """The work of a call: copy theta, or multiply its step."""

    KEEP = auto()
    STRETCH = auto()


SCALED_WORDS = len(ScaledRow)


# -- one K for a whole network (shared_rewire) -----------------------------------------------------------------------------


class SharedArguments(Fields):
    """The arguments of a rewiring with one K for all layers."""

    COUNT = auto()  # K
    LAYERS = auto()
    THETA = auto()
    TABLE = auto()  # address of a LayerRow per layer
    RULE = auto()  # the number of the rule in ``shared_rewiring.RULES``
    LEAST = auto()
    NEWBORN_SINCE = auto()
    SEED = auto()
    STEP = auto()
    NEW_PLACES = auto()
    NEW_SIGNS = auto()
    NEW_BORN = auto()
    STATES = auto()  # address of STATE_COUNT times StateRow
    STATE_COUNT = auto()
    BIRTHS = auto()  # the answer: the number of reborn connections
    SCRATCH = auto()  # address of working memory


class LayerRow(Fields):
    """The words of a layer of the network."""

    KEPT = auto()  # the number of its connections before the step
    TOTAL = auto()
    COUNTER = auto()
    START = auto()  # its first place among the places of all layers
    BUDGET = auto()
    PLACES = auto()
    BORN = auto()
    SIGNS = auto()
    SIGN_SEED = auto()
    EXCEPTIONS = auto()
    EXCEPTION_COUNT = auto()
    # answers
    AFTER = auto()  # the number of its connections after the step
    BIRTHS = auto()
    DEATHS = auto()
    NEWBORN_DEATHS = auto()
    # for the kernel alone
    ALIVE = auto()
    ROOM = auto()
    MOVED = auto()  # the position where the connections of the layer begin after the step


LAYER_WORDS = len(LayerRow)


# -- dense compute, soft-DEEP R --------------------------------------------------------------------------------------------


class ScatterArguments(Fields):
    """The arguments of moving K values to their places, or back (:mod:`.scatter`)."""

    TASK = auto()
    OWN = auto()  # address of theta, or of its gradient
    SIGNS = auto()
    PLACES = auto()
    WEIGHT = auto()  # address of the weight, or of its gradient
    COUNT = auto()
    ENDLESS = auto()  # the answer of the kernels that compute a gradient: 0 if all of its values are finite


class SoftArguments(Fields):
    """The arguments of a step of soft-DEEP R (:mod:`.soft`)."""

    TASK = auto()
    THETA = auto()
    BEFORE = auto()
    COUNT = auto()  # N
    DECREMENT = auto()  # eta * alpha, float64
    SCALE = auto()  # sqrt(2 * eta * T), float64
    BOUND = auto()  # theta_min, float64
    REWIRES = auto()
    COUNTER = auto()  # the counter of place 0
    KEY = auto()  # the key of the step's noise
    BIRTHS = auto()
    DEATHS = auto()


# -- sparse compute --------------------------------------------------------------------------------------------------------


class LinearArguments(Fields):
    """The arguments of a linear layer, forward and backward (:mod:`.linear`)."""

    TASK = auto()
    PHASE = auto()
    BATCH = auto()
    TILES = auto()
    ROWS = auto()
    COLUMNS = auto()
    X = auto()
    XT = auto()  # x in tiles
    Y = auto()  # y, or its gradient
    YT = auto()  # the gradient of y in tiles
    THETA = auto()
    BIAS = auto()
    ROW_START = auto()
    ROW_COLUMN = auto()
    ROW_SLOT = auto()
    COLUMN_START = auto()
    COLUMN_ROW = auto()
    COLUMN_SLOT = auto()
    DX = auto()
    DTHETA = auto()
    DBIAS = auto()
    PARTS = auto()  # vectors of a tile, for loops that the compiler would unroll in vain if this were a constant
    TILE = auto()  # backward: the tile to multiply (with one thread, the first tile)


class LinearPhase(Fields):
    """The part of a linear layer that a call computes."""

    ALL = auto()  # one thread does everything in one call
    TRANSPOSE = auto()
    MULTIPLY = auto()


class TokenArguments(Fields):
    """The arguments of a linear layer with many rows, forward and backward (:mod:`.tokens`)."""

    TASK = auto()
    WORKER = auto()
    PHASE = auto()
    BATCH = auto()
    BLOCKS = auto()
    GROUPS = auto()
    ROWS = auto()
    COLUMNS = auto()
    COUNT = auto()
    X = auto()
    Y = auto()  # y, or its gradient
    THETA = auto()
    BIAS = auto()
    ROW_START = auto()
    ROW_COLUMN = auto()
    ROW_SLOT = auto()
    COLUMN_START = auto()
    COLUMN_ROW = auto()
    COLUMN_SLOT = auto()
    DX = auto()
    DTHETA = auto()
    DBIAS = auto()
    VALUES = auto()  # address of the K values in the order of the rows, or backward of the columns
    SUMS = auto()  # address of the sums of each group for dtheta, in the same order
    SUMS_BIAS = auto()  # address of the sums of each group for db
    SCRATCH = auto()  # address of the blocks of the first worker
    SCRATCH_BYTES = auto()  # of each worker
    NOT_FINITE = auto()  # set to 1 if a number of x, or backward of dy, is not finite


class TokenPhase(Fields):
    """The part of a linear layer with many rows that a call computes."""

    GATHER = auto()
    MULTIPLY = auto()
    REDUCE = auto()


class FullArguments(Fields):
    """The arguments of a linear layer with connections at all places (:mod:`.full`)."""

    TASK = auto()
    WORKER = auto()
    PHASE = auto()
    BATCH = auto()
    TILES = auto()  # of the batch
    ROWS = auto()
    COLUMNS = auto()
    X = auto()
    XT = auto()  # address of x in another layout
    Y = auto()  # y, or its gradient
    THETA = auto()
    BITS = auto()  # address of the signs: a bit for each place
    BITS_ROW = auto()  # bytes from the signs of a row to those of the next
    BIAS = auto()
    DX = auto()
    DTHETA = auto()
    SCRATCH = auto()  # address of the panels of the first worker
    SCRATCH_BYTES = auto()  # of each worker
    NOT_FINITE = auto()  # set to 1 if a number of dtheta is not finite


class FullPhase(Fields):
    """The part of such a layer that a call computes."""

    ALL = auto()  # one thread does everything in one call
    LAYOUT = auto()
    MULTIPLY = auto()


class ConvArguments(Fields):
    """The arguments of a convolution, forward and backward (:mod:`.conv`). "In" is the side of x, "out" the side of y."""

    TASK = auto()
    WORKER = auto()
    PHASE = auto()
    BATCH = auto()
    TILES = auto()
    COUNT = auto()
    CHANNELS_IN = auto()
    CHANNELS_OUT = auto()
    X = auto()
    XP = auto()  # x in planes
    Y = auto()
    YP = auto()  # the gradient of y in planes
    THETA = auto()
    BIAS = auto()
    ROW_START = auto()
    ROW_COLUMN = auto()
    ROW_SLOT = auto()
    COLUMN_START = auto()
    COLUMN_ROW = auto()
    COLUMN_SLOT = auto()
    DX = auto()
    DTHETA = auto()
    DBIAS = auto()
    # the size of x, the size of its planes, and the pixel of a plane at which x begins
    HEIGHT = auto()
    WIDTH = auto()
    X_ROWS = auto()
    X_COLUMNS = auto()
    TOP = auto()
    LEFT = auto()
    # the same for dy
    OUT_HEIGHT = auto()
    OUT_WIDTH = auto()
    Y_ROWS = auto()
    Y_COLUMNS = auto()
    OUT_TOP = auto()
    OUT_LEFT = auto()
    KERNEL = auto()  # positions of the kernel
    STRIDE_DOWN = auto()
    STRIDE_ACROSS = auto()
    # the sums of a worker for one band, before they are transposed
    SCRATCH = auto()
    SCRATCH_COLUMNS = auto()
    SCRATCH_BYTES = auto()
    LAST_ROW = auto()  # rows to compute, a multiple of the rows of a block
    BAND = auto()  # rows of a band
    BANDS = auto()
    SHIFT = auto()  # address of the shift of each kernel position (see compute/conv.py)
    MEETS = auto()  # address of the set of pixels that each kernel position meets
    PARTIAL = auto()  # address of the sums of each tile and band for dtheta
    PARTIAL_BIAS = auto()  # address of the sums of each tile for db


class ConvPhase(Fields):
    """The part of a convolution that a call computes."""

    LAYOUT = auto()
    MULTIPLY = auto()
    REDUCE = auto()


class ProductArguments(Fields):
    """The arguments of the products of a recurrent layer (:mod:`.products`)."""

    TASK = auto()
    PHASE = auto()
    COUNT = auto()  # rows of x
    TILES = auto()
    SHARES = auto()
    ROWS = auto()
    COLUMNS = auto()
    X = auto()
    XT = auto()
    YT = auto()
    THETA = auto()
    BIAS = auto()
    # starts, indices and slots by row or by column
    START = auto()
    INDEX = auto()
    SLOTS = auto()
    DX = auto()
    DTHETA = auto()
    DBIAS = auto()
    SKIP = auto()
    SKIPPED = auto()


class ProductPhase(Fields):
    """The part of a product that a call computes."""

    TRANSPOSE = auto()
    MULTIPLY = auto()


class RecurrentArguments(Fields):
    """The arguments of the steps of a recurrent layer (:mod:`.recurrent`)."""

    TASK = auto()
    THETA = auto()
    COUNT = auto()  # connections
    # starts, indices and slots by row or by column, and the signed values in that order
    START = auto()
    INDEX = auto()
    SLOTS = auto()
    VALUES = auto()
    STEPS = auto()
    BATCH = auto()
    PARTS = auto()
    HIDDEN = auto()
    REVERSE = auto()
    V = auto()  # rows of a tile
    VECTORS = auto()  # vectors of a part
    GATES = auto()
    CELLS = auto()
    CELL_STEP = auto()  # bytes from the cell states of one step to those of the next, or 0 if the past is not needed
    SCRATCH = auto()
    H_FIRST = auto()
    C_FIRST = auto()
    H_LAST = auto()
    C_LAST = auto()
    Y = auto()
    KEPT = auto()


# -- what callers fill -----------------------------------------------------------------------------------------------------


ORDER_NAMES = [field.name for field in CpuRow if ORDER.start <= field < ORDER.stop]
pack_order = struct.Struct(f"{len(ORDER_NAMES)}q").pack  # the addresses of an order, as a packer takes them
_ORDER_BYTES = 8 * len(ORDER_NAMES)


def packer(fields: type[Fields], floats: Collection[str] = ()) -> Callable[..., bytes]:
    """Make a function that packs words given by name. A word that is not given is 0.

    A list with the addresses of an order takes them together and packed, ``order=pack_order(*addresses)``.

    Args:
        fields: the list of the words.
        floats: the names of the words that are float64.
    """
    return _by_name(fields, floats, "pack({})")


def filler(fields: type[Fields], floats: Collection[str] = ()) -> Callable[..., ctypes.Array[ctypes.c_int64]]:
    """Make a function that takes the same words as that of :func:`packer` and fills an array to which a kernel may write."""
    return _by_name(fields, floats, "copy(pack({}))")


def writable(packed: bytes) -> ctypes.Array[ctypes.c_int64]:
    """Copy packed words to an array to which a kernel may write."""
    return (ctypes.c_int64 * (len(packed) // 8)).from_buffer_copy(packed)


def _by_name(fields: type[Fields], floats: Collection[str], body: str) -> Callable[..., Any]:
    """Make a function whose parameters are the names of a list.

    Its source is written out, as ``namedtuple`` does it: a loop over the names would take microseconds.
    """
    names = [field.name for field in fields]
    formats = ["d" if name in floats else "q" for name in names]
    given = [f"{name}=0" for name in names]
    if ORDER_NAMES[0] in names:
        first = names.index(ORDER_NAMES[0])
        there = slice(first, first + len(ORDER_NAMES))
        if names[there] != ORDER_NAMES:
            raise TypeError(f"{fields.__name__}: expected {', '.join(ORDER_NAMES)}, found {', '.join(names[there])}.")
        names[there], formats[there], given[there] = ["order"], [f"{_ORDER_BYTES}s"], [f"order=bytes({_ORDER_BYTES})"]
    scope = {"pack": struct.Struct("".join(formats)).pack, "copy": (ctypes.c_int64 * len(fields)).from_buffer_copy}
    made: Callable[..., Any] = eval(f"lambda {', '.join(given)}: {body.format(', '.join(names))}", scope)
    return made


def signed(word: int) -> int:
    """Return the int64 that has these 64 bits."""
    return word - (1 << 64) if word >> 63 else word
