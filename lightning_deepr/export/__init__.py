"""Export trained sparse networks to other formats: dense ``state_dict``, CSR, ONNX, and C for microcontrollers.

Each function takes any module (from a callback, ``sparsify``, ``load_state_dict``, or a dense one) and leaves it unchanged.
``docs/export.md`` says how much of the sparsity each format keeps.
"""

from __future__ import annotations

from lightning_deepr.export.c_header import CHeader, to_c_header
from lightning_deepr.export.c_training import CTraining, to_c, to_c_training
from lightning_deepr.export.matrices import to_csr, to_dense_state_dict, to_scipy
from lightning_deepr.export.onnx_file import OnnxFile, to_onnx

__all__ = [
    "CHeader",
    "CTraining",
    "OnnxFile",
    "to_c",
    "to_c_header",
    "to_c_training",
    "to_csr",
    "to_dense_state_dict",
    "to_onnx",
    "to_scipy",
]
