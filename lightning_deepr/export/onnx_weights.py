"""Keep ONNX weights as places and values, with standard operators.

ONNX's own ``sparse_initializer`` does not work: onnxruntime loads it, but ONNX's shape inference takes such a weight for a
sparse tensor and rejects the file, and its places have to be int64. ``ScatterElements`` into zeros is valid everywhere, and
constant folding leaves a dense weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_deepr._needed import EXPORT, needed


def scatter_weights(proto: Any) -> tuple[str, ...]:
    """Replace initializers by places and values if that makes the file smaller. Changes ``proto``.

    Args:
        proto: an ``onnx.ModelProto``.

    Returns:
        the names of the replaced initializers.
    """
    (onnx,) = needed("onnx", purpose="sparse ONNX weights", install=EXPORT)
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes, replaced = [], []
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
    for tensor in [entry for entry in proto.graph.initializer if entry.data_type in kinds]:
        weight = numpy_helper.to_array(tensor)
        places = np.flatnonzero(weight).astype(np.int32 if weight.size < 2**31 else np.int64)
        zero = np.zeros(1, weight.dtype)
        overhead = 400  # the bytes of three nodes and their names
        if len(places) * (weight.itemsize + places.itemsize) + overhead >= weight.nbytes:
            continue
        name = tensor.name
        values = weight.reshape(-1)[places]
        proto.graph.initializer.remove(tensor)
        parts = (
            ("places", places),
            ("values", values),
            ("size", np.array([weight.size])),
            ("shape", np.array(weight.shape)),
        )
        proto.graph.initializer.extend(numpy_helper.from_array(array, f"{name}.{part}") for part, array in parts)
        nodes += [
            helper.make_node(
                "ConstantOfShape", [f"{name}.size"], [f"{name}.zeros"], f"{name}.zeros", value=numpy_helper.from_array(zero)
            ),
            helper.make_node(
                "ScatterElements",
                [f"{name}.zeros", f"{name}.places", f"{name}.values"],
                [f"{name}.flat"],
                f"{name}.flat",
                axis=0,
            ),
            helper.make_node("Reshape", [f"{name}.flat", f"{name}.shape"], [name], f"{name}.dense"),
        ]
        replaced.append(name)
    following = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *following])
    return tuple(replaced)
