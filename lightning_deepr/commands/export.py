"""The command ``lightning-deepr export CHECKPOINT --to dense|csr|onnx|c --out PATH``."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_deepr import zoo
from lightning_deepr.export import to_c_header, to_csr, to_dense_state_dict, to_onnx
from lightning_deepr.files.checkpoint import load_state_dict


def export(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: arguments after ``export``.

    Raises:
        SystemExit: something is wrong. The message says what, in one line.
    """
    given = _parser().parse_args(arguments)
    try:
        print(_export(given))
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise SystemExit(f"lightning-deepr export: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-deepr export", description="Write a sparse checkpoint in another format.")
    parser.add_argument("checkpoint", help="a .safetensors, .ckpt, .pt or .pth file, or a name of the zoo")
    parser.add_argument("--to", choices=("dense", "csr", "onnx", "c"), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="file to write: dense: .safetensors, .pt or .pth; csr: .npz; onnx: .onnx; c: .h"
    )
    parser.add_argument("--module", metavar="CLASS", help="class of the network, if the file names none, e.g. my_package.Net")
    parser.add_argument(
        "--module-args", type=json.loads, default={}, metavar="JSON", help="the class's arguments, e.g. '{\"bias\": false}'"
    )
    parser.add_argument(
        "--submodule", default="", metavar="NAME", help='part of the network to export, e.g. "net" of a LightningModule'
    )
    parser.add_argument("--input-shape", type=_sizes, metavar="2,50,39", help="onnx: shape of an example input, batch included")
    parser.add_argument(
        "--dynamic", type=_names, default=None, metavar="0=batch,1=time", help="onnx: variable dimensions (default: 0=batch)"
    )
    parser.add_argument("--sparse", action="store_true", help="onnx: write a small file with weights as places and values")
    parser.add_argument("--weights", choices=("float32", "int16", "int8"), default="float32", help="c: type of the values")
    return parser


def _export(given: argparse.Namespace) -> str:
    net = _load(given.checkpoint, given.module, given.module_args)
    net = net.get_submodule(given.submodule).eval()
    if given.to == "onnx":
        if given.input_shape is None:
            raise ValueError(
                "--to onnx needs --input-shape, the shape of an example input with its batch dimension, e.g. 1,28,28."
            )
        return str(to_onnx(net, given.out, torch.rand(given.input_shape), dynamic=given.dynamic, sparse=given.sparse))
    if given.to == "c":
        return str(to_c_header(net, given.out, weights=given.weights))
    return _write_csr(net, given.out) if given.to == "csr" else _write_dense(net, given.out)


def _load(checkpoint: str, name: str | None, arguments: dict[str, Any]) -> nn.Module:
    """Load the network with its weights.

    A sparse file names the architecture, except for classes outside this package. Other checkpoints never name it.

    Args:
        checkpoint: a path, or a name of the zoo.
        name: full name of the network's class; None: the file names the architecture.
        arguments: arguments of the class.

    Raises:
        ValueError: the checkpoint does not name its network, and ``name`` is None.
    """
    net = _class(name)(**arguments) if name else None
    if not checkpoint.endswith((".ckpt", ".pt", ".pth")):
        return zoo.load(checkpoint, module=net)
    if net is None:
        raise ValueError(
            f"{checkpoint} does not say which network it belongs to: give --module, e.g. lightning_deepr.models.LeNet300100."
        )
    return load_state_dict(net, checkpoint)


def _class(name: str) -> type[nn.Module]:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute) if module else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"--module: expected the full name of an nn.Module, e.g. lightning_deepr.models.LeNet300100, found {name!r}."
        )
    return found


def _write_dense(net: nn.Module, out: Path) -> str:
    state = to_dense_state_dict(net)
    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}, out)
    elif out.suffix in (".pt", ".pth"):
        torch.save(state, out)
    else:
        raise ValueError(f"--out: expected .safetensors, .pt or .pth for a dense state_dict, found {out.name!r}.")
    return f"{out}: {out.stat().st_size:,} bytes, {len(state)} tensors"


def _write_csr(net: nn.Module, out: Path) -> str:
    """Write ``<tensor>.indptr``, ``.indices``, ``.data`` and ``.shape`` per matrix, SciPy's names, and all other tensors."""
    if out.suffix != ".npz":
        raise ValueError(f"--out: expected .npz for CSR, found {out.name!r}.")
    arrays: dict[str, Any] = {}
    matrices = to_csr(net)
    for name, matrix in matrices.items():
        narrow = torch.int32 if max(*matrix.shape, matrix.values().numel()) < 2**31 else torch.int64
        arrays[f"{name}.indptr"] = matrix.crow_indices().to(narrow).numpy()
        arrays[f"{name}.indices"] = matrix.col_indices().to(narrow).numpy()
        arrays[f"{name}.data"] = matrix.values().numpy()
        arrays[f"{name}.shape"] = np.array(matrix.shape)
    for name, value in net.state_dict().items():
        if "parametrizations." not in name and isinstance(value, Tensor):
            arrays[name] = value.numpy()
    np.savez_compressed(out, **arrays)
    return f"{out}: {out.stat().st_size:,} bytes, {len(matrices)} sparse matrices"


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _names(text: str) -> dict[int, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {int(dimension): name or f"d{dimension}" for dimension, _, name in pairs}
