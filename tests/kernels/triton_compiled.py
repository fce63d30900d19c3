"""Compile the Triton kernels for GPUs that need not be here.

    python -m tests.kernels.triton_compiled "cuda:80 cuda:90" "fp32 bf16"

prints a line per kernel: target, type, name, bytes of machine code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_deepr.compute import sparse_gpu
from lightning_deepr.kernels.cpu.fields import MOST_STATES
from lightning_deepr.kernels.gpu import linear as triton_linear
from lightning_deepr.kernels.gpu import rewire as triton_rewire
from lightning_deepr.kernels.gpu import step as triton_step

TYPES = {
    "fp32": (tl.float32, tl.float32),
    "fp64": (tl.float64, tl.float64),
    "bf16": (tl.bfloat16, tl.float32),
    "fp16": (tl.float16, tl.float32),
}


def kernels(real: Any, wide: Any) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Yield each kernel with the types of its arguments and with its constants."""
    of_step = ("shrink", "insert", "claim", "add_living", "add_sums", "finish")
    for kernel in (getattr(triton_rewire, name) for name in of_step):
        constants = {"REAL": real, "WIDE": wide, "BLOCK": triton_step.BLOCK, "MOST": MOST_STATES}
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        types = {name: "constexpr" if name in constants else "*i64" for name in kernel.arg_names}
        if "dormant" in types:
            types["dormant"] = "*i32"
        types |= {name: "*fp64" for name in ("sums", "total") if name in types}
        types |= {name: "i32" for name in ("number", "tensors") if name in types}
        yield kernel, types, constants
    floats = {tl.float32: "*fp32", tl.float64: "*fp64", tl.bfloat16: "*bf16", tl.float16: "*fp16"}[real]
    for kernel in (triton_linear.product, triton_linear.sampled):
        for one in (False, True):  # Triton takes an argument that is 1 as a constant
            constants = {"WIDE": wide, "CONNECTIONS": sparse_gpu.CONNECTIONS, "BATCH": 16 if one else sparse_gpu.LARGEST_BATCH}
            sizes = [name for name in ("count", "columns", "batch") if name in kernel.arg_names]
            constants |= dict.fromkeys(sizes if one else [], 1)
            types = dict.fromkeys(kernel.arg_names, floats) | dict.fromkeys(("starts", "others", "slots", "places"), "*i64")
            types |= dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
            yield kernel, {name: types[name] for name in kernel.arg_names}, constants


def main(targets: str, dtypes: str) -> None:
    for target in targets.split():
        backend, arch = target.split(":")
        for dtype in dtypes.split():
            for kernel, types, constants in kernels(*TYPES[dtype]):
                source = ASTSource(kernel, signature=types, constexprs=constants)
                made = triton.compile(source, target=GPUTarget(backend, int(arch), 32), options=dict(triton_step.OPTIONS))
                print(target, dtype, kernel.__name__, len(made.asm["cubin"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
