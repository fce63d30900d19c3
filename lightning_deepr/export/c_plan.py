"""How the program for training in C lays out its memory: the fields of the struct, and the bytes that they take."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lightning_deepr.algorithm.steering import TurnoverTarget
from lightning_deepr.export.trainable import TrainableLayer

SMALLEST_TABLE = 128  # entries of the table that finds equal places
STACK_BYTES = 768  # an upper bound for gcc on Arm and x86, the caller's frame included; tests/export measures it
HEADER_BYTES = 32  # of a saved state


@dataclass(frozen=True)
class Options:
    """What :func:`lightning_deepr.export.to_c` was asked for."""

    prefix: str = "deepr"
    batch: int = 1
    floats: bool = False  # the type of an input: float instead of uint8
    narrow: bool = False  # theta in 16 bits
    target: TurnoverTarget | None = None  # alpha by turnover
    l1: tuple[float, float] = (0.0, 0.0)  # alpha at progress 0 and 1, without a target
    temperature: float = 0.0
    untrained: bool = False


@dataclass
class Plan:
    """The layers, the options, and where everything lies.

    Attributes:
        column_bits: of each layer: a packed place is ``row << column_bits | column``.
        place_bytes: of each layer: the bytes of a packed place.
        outputs: the first float of each layer's outputs in the working memory, for a batch.
        deltas: the first float of the gradient of each layer's outputs; the last layer's is the place of its outputs.
        work: the floats of the working memory, for a batch.
        table: the entries of the table that finds equal places: a power of 2. It lies in the working memory.
        slot_bytes: the bytes of an entry, which is the number of a slot.
    """

    layers: list[TrainableLayer]
    options: Options
    column_bits: list[int] = field(default_factory=list)
    place_bytes: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    deltas: list[int] = field(default_factory=list)
    work: int = 0
    table: int = SMALLEST_TABLE
    slot_bytes: int = 2

    def __post_init__(self) -> None:
        for layer in self.layers:
            self.column_bits.append((layer.columns - 1).bit_length())
            bits = self.column_bits[-1] + (layer.rows - 1).bit_length()
            self.place_bytes.append(0 if not layer.is_sparse else 2 if bits <= 16 else 4)
        floats = self._place_outputs()
        most = max(layer.count for layer in self.layers if layer.is_sparse)
        self.slot_bytes = 2 if most < 65_535 else 4
        # half of the table may be filled; no more than all slots of a layer can be reborn
        wanted = 1 << (2 * most - 1).bit_length()
        while self.table < wanted and 2 * self.table * self.slot_bytes <= 4 * floats:
            self.table *= 2
        self.work = max(floats, -(-self.table * self.slot_bytes // 4))

    def _place_outputs(self) -> int:
        """Give each layer's outputs and their gradients a place; those that are not alive together may share it.

        Returns:
            the floats of all.
        """
        last = len(self.layers) - 1
        # alive from .. to, in the order: forward of layer 0, 1, ..., backward of layer ..., 1, 0
        alive = {("output", i): (i, 2 * last + 1 - (i + 1)) for i in range(last)}
        alive["output", last] = (last, last + 1)
        alive.update({("delta", i): (2 * last + 1 - (i + 1), 2 * last + 1 - i) for i in range(last)})
        placed: dict[tuple[str, int], tuple[int, int]] = {}
        for which in sorted(alive, key=lambda one: -self.layers[one[1]].rows):
            size, (begin, end) = self.layers[which[1]].rows, alive[which]
            others = sorted(placed[one] for one in placed if alive[one][0] <= end and begin <= alive[one][1])
            at = 0
            for start, stop in others:
                if at + size <= start:
                    break
                at = max(at, stop)
            placed[which] = at, at + size
        batch = self.options.batch
        self.outputs = [batch * placed["output", i][0] for i in range(last + 1)]
        self.deltas = [batch * placed["delta", i][0] for i in range(last)] + [self.outputs[last]]
        return batch * max(stop for _, stop in placed.values())

    @property
    def theta_bytes(self) -> int:
        """The bytes of one theta of a sparse layer."""
        return 2 if self.options.narrow else 4

    @property
    def sparse(self) -> list[int]:
        """The numbers of the sparse layers."""
        return [i for i, layer in enumerate(self.layers) if layer.is_sparse]

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of the struct by what they hold. The struct begins with what needs 8 bytes, and has no gaps."""
        sizes = {
            "theta": sum(layer.count * (self.theta_bytes if layer.is_sparse else 4) for layer in self.layers),
            "places": sum(layer.count * size for layer, size in zip(self.layers, self.place_bytes, strict=True)),
            "biases": sum(4 * layer.rows for layer in self.layers if layer.bias is not None),
            "working memory": 4 * self.work,
            "counts": 8 + 4 + (16 * len(self.sparse) if self.options.target else 0) + 4 * len(self.sparse),
        }
        sizes["counts"] += -sum(sizes.values()) % 8
        return sizes

    @property
    def net_bytes(self) -> int:
        """sizeof of the struct."""
        return sum(self.parts.values())

    @property
    def state_bytes(self) -> int:
        """The bytes of a saved state."""
        parts = self.parts
        return HEADER_BYTES + 16 * len(self.sparse) + parts["theta"] + parts["places"] + parts["biases"]

    @property
    def constant_bytes(self) -> int:
        """The bytes of constants in flash: what training starts from, and the table of inputs."""
        parts = self.parts
        start = 0 if self.options.untrained else parts["theta"] + parts["places"] + parts["biases"]
        exceptions = 0 if self.options.untrained else sum(4 * len(layer.exceptions) for layer in self.layers)
        return start + exceptions + (0 if self.options.floats else 1024)

    def fits(self, ram: int) -> float | None:
        """Return the share of the present connections that fits into ``ram`` bytes; None: not even one of each layer."""
        per_connection = sum(
            layer.count * (self.theta_bytes + size)
            for layer, size in zip(self.layers, self.place_bytes, strict=True)
            if layer.is_sparse
        )
        rest = ram - (self.net_bytes - per_connection) - STACK_BYTES
        share = rest / per_connection
        return share if share * min(self.layers[i].count for i in self.sparse) >= 1 else None


def packed(plan: Plan, i: int, places: np.ndarray) -> np.ndarray:
    """Pack flat places of a layer."""
    row, column = np.divmod(places, plan.layers[i].columns)
    return np.asarray(row << plan.column_bits[i] | column)
