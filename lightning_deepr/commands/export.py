"""The command ``lightning-deepr export CHECKPOINT --to dense|csr|onnx|c --out PATH`` (``--to c --train --out FOLDER``)."""

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
from lightning_deepr.export import to_c, to_csr, to_dense_state_dict, to_onnx
from lightning_deepr.files.checkpoint import load_state_dict, report_of_checkpoint
from lightning_deepr.files.container import kind_of
from lightning_deepr.monitoring.prune import prune_dead_units
from lightning_deepr.training.schedules import LinearDecay
from lightning_deepr.weights.outside import outside

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool
)}  # fmt: skip


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
        "--out",
        type=Path,
        required=True,
        help="file to write: dense: .safetensors, .pt or .pth; csr: .npz; onnx: .onnx; c: .h; with --train: a folder",
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
        "--input-dtype",
        choices=tuple(_DTYPES),
        default="float32",
        help="onnx: type of the example input, e.g. int64 for a network that begins with an embedding",
    )
    parser.add_argument(
        "--input-below",
        type=int,
        metavar="N",
        help="onnx: integers of the example input are below N (default: the rows of the smallest embedding, else 2)",
    )
    parser.add_argument("--opset", type=int, default=18, help="onnx: version of the operator set (default: 18)")
    parser.add_argument(
        "--dynamic", type=_names, default=None, metavar="0=batch,1=time", help="onnx: variable dimensions (default: 0=batch)"
    )
    parser.add_argument("--sparse", action="store_true", help="onnx: write a small file with weights as places and values")
    parser.add_argument("--weights", choices=("float32", "int16", "int8"), default="float32", help="c: type of the values")
    parser.add_argument(
        "--prune", action="store_true", help="leave out the units that nothing reaches or that reach nothing; say how many"
    )
    _add_training(parser)
    return parser


# the arguments of to_c with train=True
_TRAINING = ("prefix", "batch", "inputs", "theta", "l1", "temperature", "untrained", "ram")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", action="store_true", help="c: write a program that trains, into the folder --out")
    group = parser.add_argument_group("c with --train")
    given: dict[str, Any] = {"default": argparse.SUPPRESS}
    group.add_argument("--batch", type=int, metavar="N", help="samples of one step (default: 1)", **given)
    group.add_argument("--untrained", action="store_true", help="start from the program's seed, not where the file is", **given)
    group.add_argument("--ram", type=int, metavar="BYTES", help="refuse a network that takes more, its stack included", **given)
    group.add_argument("--l1", type=_l1, metavar="VALUE", help="alpha: auto (by turnover), .0002, or .0002:0 (linear)", **given)
    group.add_argument("--temperature", type=float, metavar="T", help="T (default: 0)", **given)
    group.add_argument("--theta", choices=("float32", "int16"), help="how theta is stored (default: float32)", **given)
    group.add_argument(
        "--inputs", choices=("uint8", "float"), help="type of an input (default: uint8, read as x / 255)", **given
    )
    group.add_argument("--prefix", metavar="NAME", help="begins all names in the files (default: deepr)", **given)


def _export(given: argparse.Namespace) -> str:
    training = {name: getattr(given, name) for name in _TRAINING if hasattr(given, name)}
    if given.train and given.to != "c":
        raise ValueError(f"--train: expected --to c, found --to {given.to}.")
    if training and not given.train:
        raise ValueError(f"--{next(iter(training))} needs --train.")
    if given.train and given.weights != "float32":
        raise ValueError(f"--weights {given.weights} is for inference: with --train, --theta int16 stores theta in 16 bits.")
    net = _load(given.checkpoint, given.module, given.module_args, given.submodule).eval()
    if given.prune:
        if given.train:
            raise ValueError("--prune is for inference: a unit that is cut off now may be reached again in training.")
        print(prune_dead_units(net))
    if given.to == "onnx":
        if given.input_shape is None:
            raise ValueError(
                "--to onnx needs --input-shape, the shape of an example input with its batch dimension, e.g. 1,28,28."
            )
        example = _example(net, given)
        return str(to_onnx(net, given.out, example, dynamic=given.dynamic, opset=given.opset, sparse=given.sparse))
    if given.to == "c":
        if given.train:
            return str(to_c(net, given.out, train=True, **training))
        return str(to_c(net, given.out, weights=given.weights))
    return _write_csr(net, given.out) if given.to == "csr" else _write_dense(net, given.out)


def _example(net: nn.Module, given: argparse.Namespace) -> Tensor:
    """Make the example input of the shape and the type that the command line gives."""
    dtype = _DTYPES[given.input_dtype]
    if given.input_below is not None and (dtype.is_floating_point or dtype == torch.bool or given.input_below < 1):
        raise ValueError(
            f"--input-below: expected a number from 1 on, with an integer --input-dtype, found {given.input_below} with "
            f"{given.input_dtype}."
        )
    if dtype.is_floating_point:
        return torch.rand(given.input_shape).to(dtype)
    rows = [part.num_embeddings for part in net.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag))]
    below = given.input_below or min(rows, default=2)
    top = 2 if dtype == torch.bool else min(below, torch.iinfo(dtype).max)
    return torch.randint(top, given.input_shape).to(dtype)


def _load(checkpoint: str, name: str | None, arguments: dict[str, Any], submodule: str) -> nn.Module:
    """Load the network with its weights, and return the part to export.

    A sparse file names the architecture, except for classes outside this package. Other checkpoints never name it.

    Args:
        checkpoint: a path, or a name of the zoo.
        name: full name of the network's class; None: the file names the architecture.
        arguments: arguments of the class.
        submodule: name of the part. The checkpoint may be that of the whole network, or that of the part alone.

    Raises:
        ValueError: the checkpoint does not name its network, and ``name`` is None.
    """
    net = _class(name)(**arguments) if name else None
    if net is not None and submodule and Path(checkpoint).is_file() and _is_of_part(checkpoint, net, submodule):
        net, submodule = net.get_submodule(submodule), ""
    if not Path(checkpoint).is_file() or kind_of(Path(checkpoint)) == "sparse":
        return zoo.load(checkpoint, module=net).get_submodule(submodule)
    if net is None:
        raise ValueError(
            f"{checkpoint} does not say which network it belongs to: give --module, e.g. lightning_deepr.models.LeNet300100."
        )
    return load_state_dict(net, checkpoint).get_submodule(submodule)


def _is_of_part(checkpoint: str, net: nn.Module, submodule: str) -> bool:
    """Whether the names in a checkpoint are those of the part: ``save_sparse(model.net, path)`` writes such a file."""
    try:
        names = {row["name"] for row in report_of_checkpoint(checkpoint)}
    except ValueError:
        return False  # whoever loads it says what is wrong with it
    whole, part = (dict(one.named_parameters()) for one in (net, net.get_submodule(submodule)))
    return not names <= whole.keys() and names <= part.keys()


def _class(name: str) -> type[nn.Module]:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute, None) if module else None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports another one that is not
        raise ValueError(
            f"--module: expected a class that can be imported, found {name!r}: there is no module {error.name!r}, neither "
            f"installed nor in the current folder ({Path.cwd()})."
        ) from error
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
        arrays[f"{name}.data"] = _as_numpy(matrix.values())
        arrays[f"{name}.shape"] = np.array(matrix.shape)
    for name, value in outside(net).values.items():
        if isinstance(value, Tensor):
            arrays[name] = _as_numpy(value)
    np.savez_compressed(out, **arrays)
    return f"{out}: {out.stat().st_size:,} bytes, {len(matrices)} sparse matrices"


def _as_numpy(value: Tensor) -> np.ndarray:
    """Return the values as an array; NumPy has no bfloat16 and no 8-bit floats, and float32 holds them exactly."""
    value = value.detach().cpu()
    known = (torch.float16, torch.float32, torch.float64)
    return (value if value.dtype in known or not value.is_floating_point() else value.float()).numpy()


def _l1(text: str) -> str | float | LinearDecay:
    """Read alpha: "auto", a number, or two numbers with a colon between them."""
    if text == "auto":
        return text
    begin, colon, end = text.partition(":")
    return LinearDecay(float(begin), float(end)) if colon else float(begin)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


def _names(text: str) -> dict[int, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {int(dimension): name or f"d{dimension}" for dimension, _, name in pairs}
