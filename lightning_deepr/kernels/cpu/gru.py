"""The cell of a GRU: one unit of W = lanes * vectors batch elements at one step, and its gradients.

r and z are the sigmoids of their sums, n = tanh(a + r b) and h' = (1 - z) n + z h. The input contributes a to the sum of n, and
the hidden state contributes b. The reset gate r acts after the product, as in PyTorch and cuDNN, and so needs the two apart.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from lightning_deepr.kernels.cpu.activations import Math, blocks
from lightning_deepr.kernels.cpu.native import _Tile


@intrinsic(prefer_literal=True)
def gru_cell(
    typingctx: Any, gates: Any, stride: Any, h: Any, new_h: Any, kept_h: Any, size: Any, lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Compute r, z and n of one unit in place, and write the new hidden state to two addresses.

    The sums of r and z, a and b are ``stride`` bytes apart. n replaces a, and b stays.
    """
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        m = Math(builder, tile)
        places = blocks(builder, args[0], args[1])
        for v in range(tile.vectors):
            r, z, a, b = (tile.load(place, v) for place in places)
            r, z = m.sigmoid(r), m.sigmoid(z)
            n = m.tanh(m.add(a, m.multiply(r, b)))
            out = m.add(m.multiply(m.one_minus(z), n), m.multiply(z, tile.load(args[2], v)))
            for place, value in zip([*places[:3], *args[3:5]], [r, z, n, out, out], strict=True):
                tile.store(value, place, v)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def gru_gradient(
    typingctx: Any, gates: Any, stride: Any, h: Any, dy: Any, dh: Any, dgates: Any, dstride: Any, kept: Any, size: Any,
    lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Compute the gradients of the sums of one unit.

    Those of r, z and b go to ``dgates`` (``dstride`` bytes apart), those of r, z, a and b to ``kept``. dh becomes the part of
    the gradient of the previous hidden state ``h`` that does not pass through the gates.
    """
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        m = Math(builder, tile)
        places = blocks(builder, args[0], args[1])
        for_product, kept = blocks(builder, args[5], args[6], 3), blocks(builder, args[7], args[1])
        for v in range(tile.vectors):
            r, z, n, b = (tile.load(place, v) for place in places)
            h, dy, dh = (tile.load(place, v) for place in args[2:5])
            dh = m.add(dy, dh)
            da = m.multiply(m.multiply(dh, m.one_minus(z)), m.one_minus(m.multiply(n, n)))
            db = m.multiply(da, r)
            dz = m.multiply(m.multiply(dh, m.subtract(h, n)), m.multiply(z, m.one_minus(z)))
            dr = m.multiply(m.multiply(db, b), m.one_minus(r))
            tile.store(m.multiply(dh, z), args[4], v)
            for place, value in zip([*for_product, *kept], [dr, dz, db, dr, dz, da, db], strict=True):
                tile.store(value, place, v)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(*[int64] * 8, size, lanes, vectors), codegen
