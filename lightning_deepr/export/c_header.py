"""Export to C99 for microcontrollers: one header with the connections of a feed-forward network and a function to run it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from torch import nn

from lightning_deepr.export.c_names import check_name, guard_of
from lightning_deepr.export.encodings import ESCAPE, Encoded, Weights, encode
from lightning_deepr.export.feed_forward import read_layers
from lightning_deepr.monitoring.prune import pruned_copy

_C_TYPES = {
    "float32": "float",
    "int16": "int16_t",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
}


@dataclass(frozen=True)
class CHeader:
    """The result of :func:`to_c_header`.

    The bytes are those of the arrays. The code takes more space: ``size`` of an object file shows both.
    """

    path: Path
    inputs: int
    outputs: int
    connections: int  # K without the connections of value 0
    potential: int  # N
    constant_bytes: int  # flash: places, values, biases
    buffer_bytes: int  # RAM: the outputs of hidden layers
    weights: str  # the type of the stored values
    rounding: float  # the largest difference between a stored weight and the network's; 0 for float32
    layers: tuple[tuple[str, str, int], ...]  # name, the kind of storage, bytes

    def __str__(self) -> str:
        exact = "exact" if self.weights == "float32" else f"weights off by at most {self.rounding:.2g}"
        return (
            f"{self.path}: {self.connections:,} of {self.potential:,} connections as {self.weights} ({exact}); "
            f"{self.constant_bytes:,} bytes of constants, {self.buffer_bytes:,} bytes of buffers"
        )


def to_c_header(
    module: nn.Module, path: str | PathLike[str], *, name: str = "predict", weights: Weights = "float32", prune: bool = False
) -> CHeader:
    """Write a feed-forward network as a C99 header without dependencies: ``void predict(const float *in, float *out)``.

    The header has the number of connections of each row, and the column and the value of each connection. A column is a byte
    with the distance to the previous connection, or the column's number, whichever takes fewer bytes. A layer that is smaller
    in dense form is stored in dense form. Connections of value 0 are left out. The sum of a row runs over its connections in
    float, so outputs equal PyTorch's up to the rounding of sums in another order. The function keeps the hidden layers in
    static buffers: call it from one thread.

    Args:
        module: linear layers and ReLU in one chain (``nn.Sequential``, :class:`lightning_deepr.models.LeNet300100`). Flatten,
            Identity and Dropout are skipped. It is read in eval mode and not changed; other floating-point types are rounded to
            float32.
        path: the header to write.
        name: the name of the function, and the prefix of all other names in the header.
        weights: "float32" (exact), or "int16" or "int8" with one scale per layer. Integers are smaller, but the network is no
            longer the same: the result has the largest error of a weight, and its effect on the outputs depends on the data.
            Compare them.
        prune: True to leave out the units that are cut off, as :func:`lightning_deepr.prune_dead_units` does in a copy. The
            outputs stay the same, the shapes get smaller.

    Returns:
        the bytes of constants and of buffers, per layer and in total.

    Raises:
        ValueError: the network has another layer or function, a subclass with a forward of its own, a hook, or a
            parametrization of others (the message names it); a weight is not finite, or ``name`` is no C identifier that is
            free in C and C++.

    Example::

        >>> import tempfile
        >>> from lightning_deepr import sparsify
        >>> net = sparsify(nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)), 0.05)
        >>> header = to_c_header(net, f"{tempfile.mkdtemp()}/net.h")
        >>> header.connections, header.constant_bytes, header.buffer_bytes
        (275, 1675, 200)
    """
    check_name(name)
    encoded = [encode(layer, weights) for layer in read_layers(pruned_copy(module, prune))]
    hidden = [item.layer.rows for item in encoded[:-1]]
    buffers = [max(hidden[start::2], default=0) for start in (0, 1)]
    header = CHeader(
        path=Path(path),
        inputs=encoded[0].layer.columns,
        outputs=encoded[-1].layer.rows,
        connections=sum(len(item.layer.values) for item in encoded),
        potential=sum(item.layer.rows * item.layer.columns for item in encoded),
        constant_bytes=sum(item.size for item in encoded),
        buffer_bytes=4 * sum(buffers),
        weights=weights,
        rounding=max(item.rounding for item in encoded),
        layers=tuple((item.layer.name, item.kind, item.size) for item in encoded),
    )
    Path(path).write_text("\n".join(_lines(encoded, header, name, buffers)) + "\n", encoding="utf-8")
    return header


def _lines(encoded: list[Encoded], header: CHeader, name: str, buffers: list[int]) -> Iterator[str]:
    guard = guard_of(name)
    yield f"/* A sparse feed-forward network: {header.connections} of {header.potential} connections, {header.weights} weights."
    yield f" * {header.constant_bytes} bytes of constants, {header.buffer_bytes} bytes of buffers. Written by lightning-deepr."
    yield f" * {name}(in, out): in has {name.upper()}_INPUTS floats, out {name.upper()}_OUTPUTS; not reentrant. */"
    yield from (f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", "")
    yield f"#define {name.upper()}_INPUTS {header.inputs}"
    yield f"#define {name.upper()}_OUTPUTS {header.outputs}"
    for number, item in enumerate(encoded):
        yield from _layer(item, f"{name}_{number}")
    for number, size in enumerate(buffers):
        if size:
            yield f"static float {name}_hidden{number}[{size}];"
    yield from ("", f"static inline void {name}(const float *in, float *out)", "{")
    source = "in"
    for number in range(len(encoded)):
        target = "out" if number == len(encoded) - 1 else f"{name}_hidden{number % 2}"
        yield f"    {name}_{number}({source}, {target});"
        source = target
    yield from ("}", "", "#endif")


def _layer(item: Encoded, prefix: str) -> Iterator[str]:
    """Write the arrays and the function of one layer."""
    layer = item.layer
    yield ""
    yield (
        f"/* {_plain(layer.name)}: {layer.columns} -> {layer.rows}, {len(layer.values)} connections "
        f"({item.kind}){', ReLU' if layer.relu else ''} */"
    )
    for what, array in (("counts", item.counts), ("places", item.places), ("values", item.values), ("bias", layer.bias)):
        if array is not None:
            yield from _array(f"{prefix}_{what}", array)
    yield f"static void {prefix}(const float *in, float *out)"
    yield "{"
    if item.places is not None:
        yield f"    const {_C_TYPES[item.places.dtype.name]} *place = {prefix}_places;"
    yield f"    const {_C_TYPES[item.values.dtype.name]} *value = {prefix}_values;"
    yield f"    for ({_counter(layer.rows)} row = 0; row < {layer.rows}; row++) {{"
    yield "        float sum = 0.0f;"
    yield from (f"        {line}" for line in _row(item, prefix))
    if item.scale is not None:
        yield f"        sum *= {_number(item.scale)};"
    if layer.bias is not None:
        yield f"        sum += {prefix}_bias[row];"
    yield f"        out[row] = {'sum > 0.0f ? sum : 0.0f' if layer.relu else 'sum'};"
    yield from ("    }", "}")


def _row(item: Encoded, prefix: str) -> Iterator[str]:
    """Write the sum over one row."""
    width = _counter(item.layer.columns)
    if item.kind == "dense":
        yield f"for ({width} column = 0; column < {item.layer.columns}; column++)"
        yield "    sum += *value++ * in[column];"
        return
    assert item.counts is not None
    counter = _C_TYPES[item.counts.dtype.name]
    if item.kind == "columns":
        yield f"for ({counter} left = {prefix}_counts[row]; left > 0; left--)"
        yield "    sum += *value++ * in[*place++];"
        return
    yield f"{width} column = 0;"
    yield f"for ({counter} left = {prefix}_counts[row]; left > 0; left--) {{"
    yield f"    while (*place == {ESCAPE}) {{ column += {ESCAPE}; place++; }}"
    yield "    column += *place++;"
    yield "    sum += *value++ * in[column];"
    yield "}"


def _counter(top: int) -> str:
    return "uint16_t" if top < 2**16 - ESCAPE else "uint32_t"


def _array(name: str, array: np.ndarray) -> Iterator[str]:
    numbers = (
        [_number(value) for value in array.tolist()] if array.dtype.kind == "f" else [str(value) for value in array.tolist()]
    )
    yield f"static const {_C_TYPES[array.dtype.name]} {name}[{max(len(numbers), 1)}] = {{"  # C has no empty array
    numbers = numbers or ["0"]
    step = 8 if array.dtype.kind == "f" else 24
    for start in range(0, len(numbers), step):
        yield "    " + ", ".join(numbers[start : start + step]) + ","
    yield "};"


def _number(value: float) -> str:
    """Write a float literal: nine digits reproduce every float32."""
    text = f"{value:.9g}"
    return text + ("f" if any(mark in text for mark in ".e") else ".0f")


def _plain(text: str) -> str:
    """Replace what could end a comment in a name."""
    return re.sub(r"[^\w.]", "_", text) or "layer"
