"""The cell of an LSTM: one unit of W = lanes * vectors batch elements at one step, and its gradients."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic

from lightning_deepr.kernels.cpu.activations import Math, blocks
from lightning_deepr.kernels.cpu.native import _Tile


@intrinsic(prefer_literal=True)
def lstm_cell(
    typingctx: Any, gates: Any, stride: Any, c: Any, new_c: Any, h: Any, kept_h: Any, size: Any, lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Compute the four gates of one unit in place (``stride`` bytes apart), and its new cell state and hidden state.

    The hidden state goes to two addresses.
    """
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        m = Math(builder, tile)
        places = blocks(builder, args[0], args[1])
        for v in range(tile.vectors):
            sums = [tile.load(place, v) for place in places]
            i, f, g, o = (m.tanh(x) if k == 2 else m.sigmoid(x) for k, x in enumerate(sums))
            state = m.add(m.multiply(f, tile.load(args[2], v)), m.multiply(i, g))
            out = m.multiply(o, m.tanh(state))
            for place, value in zip([*places, *args[3:6]], [i, f, g, o, state, out, out], strict=True):
                tile.store(value, place, v)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, int64, size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def lstm_gradient(
    typingctx: Any, gates: Any, stride: Any, c: Any, new_c: Any, dy: Any, dh: Any, dc: Any, dgates: Any, dstride: Any,
    kept: Any, size: Any, lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Compute the gradients of the sums of one unit. dc becomes the gradient of the previous cell state.

    The gradients go to ``dgates`` (``dstride`` bytes apart) and to ``kept``.
    """
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        m = Math(builder, tile)
        places, first, second = (
            blocks(builder, args[0], args[1]),
            blocks(builder, args[7], args[8]),
            blocks(builder, args[9], args[1]),
        )
        for v in range(tile.vectors):
            i, f, g, o = (tile.load(place, v) for place in places)
            c, new_c, dy, dh, dc = (tile.load(place, v) for place in args[2:7])
            t = m.tanh(new_c)
            dh = m.add(dy, dh)
            dc = m.add(dc, m.multiply(m.multiply(dh, o), m.one_minus(m.multiply(t, t))))
            di = m.multiply(m.multiply(dc, g), m.multiply(i, m.one_minus(i)))
            df = m.multiply(m.multiply(dc, c), m.multiply(f, m.one_minus(f)))
            dg = m.multiply(m.multiply(dc, i), m.one_minus(m.multiply(g, g)))
            do = m.multiply(m.multiply(dh, t), m.multiply(o, m.one_minus(o)))
            tile.store(m.multiply(dc, f), args[6], v)
            for k, value in enumerate((di, df, dg, do)):
                tile.store(value, first[k], v)
                tile.store(value, second[k], v)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(*[int64] * 10, size, lanes, vectors), codegen
