"""Export to ONNX, checked with onnxruntime against PyTorch before the file is written."""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_deepr._needed import EXPORT, needed
from lightning_deepr.conversion.adapt import merged_copy
from lightning_deepr.conversion.convert import connections, densify
from lightning_deepr.export.onnx_weights import scatter_weights
from lightning_deepr.monitoring.prune import pruned_copy

_LARGEST_FILE = 2**31 - 1  # bytes, the limit of a protobuf message


@dataclass(frozen=True)
class OnnxFile:
    """The result of :func:`to_onnx`, with the agreement between onnxruntime and PyTorch."""

    path: Path
    size: int  # bytes
    opset: int
    connections: int  # K of the converted weights
    potential: int  # N of the converted weights
    sparse_weights: tuple[str, ...]  # the initializers that the file keeps as places and values
    max_error: float  # the largest absolute difference of an output
    max_output: float  # the largest absolute output, for comparison
    checked_shapes: tuple[tuple[tuple[int, ...], ...], ...]  # the shapes of the inputs of the comparison

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.size:,} bytes, opset {self.opset}, {self.connections:,} of {self.potential:,} connections, "
            f"{'sparse' if self.sparse_weights else 'dense'} weights; onnxruntime differs by at most {self.max_error:.1e} "
            f"(outputs up to {self.max_output:.3g})"
        )


def to_onnx(
    module: nn.Module,
    path: str | PathLike[str],
    example_inputs: Tensor | Sequence[Tensor],
    *,
    dynamic: Mapping[int, str] | None = None,
    opset: int = 18,
    sparse: bool = False,
    tolerance: float = 1e-5,
    prune: bool = False,
) -> OnnxFile:
    """Write a network as ONNX, in eval mode, after onnxruntime has reproduced PyTorch's outputs.

    The exported network is dense with zeros: ONNX's operators have no sparse weights. ``sparse=True`` makes the *file* small:
    it keeps weights with few connections as places and values (8 bytes per connection), and standard operators scatter them.
    onnxruntime folds these operators into dense weights when it loads the file, so its memory and speed are those of the dense
    network in either case.

    Args:
        module: a module with or without converted weights; it is not changed. For a LightningModule, pass the network inside
            it (``model.net``).
        path: the file to write; it holds everything.
        example_inputs: the positional arguments, tensors of any size along the dynamic dimensions.
        dynamic: {dimension: name} of the dimensions that can vary at run time, the same for every input. None: {0: "batch"}.
            {}: none. For sequences {0: "batch", 1: "time"}, with ``batch_first=False`` {0: "time", 1: "batch"}.
        opset: the version of the ONNX operator set.
        sparse: True to keep weights with few connections as places and values.
        tolerance: the largest allowed difference, multiplied by the largest output if that is above 1.
        prune: True to leave out the units that are cut off, as :func:`lightning_deepr.prune_dead_units` does in a copy. The
            comparison is with the outputs of the whole network.

    Returns:
        size, opset and the largest difference for the example and for two other sizes of the dynamic dimensions.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing (``pip install 'lightning-deepr[export]'``).
        ValueError: an LSTM has ``proj_size`` (ONNX's LSTM has no projection), an input lacks a dynamic dimension, or the file
            would exceed ONNX's limit of 2 GiB.
        RuntimeError: the exporter failed or does not write this opset, or onnxruntime differs by more than the tolerance.
            Nothing is written.

    Example::

        >>> from lightning_deepr import sparsify
        >>> net = sparsify(nn.Sequential(nn.Linear(100, 10), nn.ReLU()), 0.05)
        >>> file = to_onnx(net, "net.onnx", torch.randn(2, 100))  # doctest: +SKIP
        >>> file.max_error <= 1e-5  # doctest: +SKIP
        True
    """
    onnx, *_ = needed("onnx", "onnxscript", "onnxruntime", purpose="to_onnx", install=EXPORT)
    if isinstance(opset, bool) or not isinstance(opset, int) or opset < 1:
        raise ValueError(f"opset: expected the number of an ONNX operator set, found {opset!r}.")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    dynamic = {0: "batch"} if dynamic is None else dict(dynamic)
    _check_inputs(inputs, dynamic)
    module = merged_copy(module)
    _refuse(module)
    smaller = pruned_copy(module, prune)
    found = connections(smaller)
    plain = densify(copy.deepcopy(module)).cpu().eval().requires_grad_(False)
    exported = densify(copy.deepcopy(smaller)).cpu().eval().requires_grad_(False) if prune else plain
    inputs = tuple(tensor.detach().cpu() for tensor in inputs)
    failures: list[Exception] = []
    for exporter in (_by_tracing_graph, _by_torchscript):
        try:
            proto = _export(exporter, exported, inputs, dynamic, opset)
            scattered = scatter_weights(proto) if sparse else ()
            payload = proto.SerializeToString()
            _check(onnx, payload, smaller)
            shapes, error_seen, output_seen = _compare(plain, payload, inputs, dynamic)
            break
        except RuntimeError as failure:
            failures.append(failure)
    else:
        raise failures[0]
    if not error_seen <= tolerance * max(1.0, output_seen):
        raise RuntimeError(
            f"to_onnx: expected onnxruntime to agree with PyTorch to {tolerance:g} (times the largest output, "
            f"{output_seen:.3g}, if above 1), found a difference of {error_seen:.3g}. Nothing was written. Raise `tolerance` "
            "if that is acceptable, or try another `opset`."
        )
    Path(path).write_bytes(payload)
    return OnnxFile(
        path=Path(path),
        size=len(payload),
        opset=_opset_of(proto),
        connections=sum(places.numel() for _, places, _ in found.values()),
        potential=sum(shape.numel() for shape, _, _ in found.values()),
        sparse_weights=tuple(scattered),
        max_error=error_seen,
        max_output=output_seen,
        checked_shapes=shapes,
    )


def _check_inputs(inputs: tuple[Tensor, ...], dynamic: Mapping[int, str]) -> None:
    for number, tensor in enumerate(inputs):
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"example_inputs: expected a tensor or a sequence of tensors, found {type(tensor).__name__} at position "
                f"{number}."
            )
        for dimension in dynamic:
            if not 0 <= dimension < tensor.dim():
                raise ValueError(
                    f"dynamic: expected dimensions of every input, found {dimension} where input {number} has shape "
                    f"{tuple(tensor.shape)}. Give dynamic={{}} for fixed sizes."
                )


def _refuse(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.LSTM) and part.proj_size:
            raise ValueError(
                f"to_onnx: `{name or type(module).__name__}` is an LSTM with proj_size={part.proj_size}, and ONNX's LSTM has "
                "no projection. to_dense_state_dict and to_csr export it."
            )
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values() if isinstance(tensor, Tensor))
    size += sum(shape.numel() * values.element_size() for shape, _, values in connections(module).values())
    if size > _LARGEST_FILE:
        raise ValueError(
            f"to_onnx: the dense weights take {size / 2**30:.1f} GiB, and an ONNX file holds less than 2 GiB. to_csr(module) "
            "keeps them sparse."
        )


Exporter = Callable[[nn.Module, tuple[Tensor, ...], Mapping[int, str], int], Any]


def _export(exporter: Exporter, plain: nn.Module, inputs: tuple[Tensor, ...], dynamic: Mapping[int, str], opset: int) -> Any:
    # The exporter may take a size of 1 for a constant.
    traced = tuple(_resized(tensor, {d: max(2, tensor.shape[d]) for d in dynamic}) for tensor in inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about internals of PyTorch and of itself
            proto = _without_notes(exporter(plain, traced, dynamic, opset))
    except Exception as error:
        raise RuntimeError(
            f"to_onnx: PyTorch's exporter refused {type(plain).__name__} with inputs {[tuple(t.shape) for t in inputs]}, "
            f"dynamic {dict(dynamic)}: {error}"
        ) from error
    found = _opset_of(proto)
    if found != opset:
        raise RuntimeError(
            f"to_onnx: expected a file of opset {opset}, found that PyTorch's exporter writes {type(plain).__name__} in opset "
            f"{found}. Ask for opset={found}, or convert the file with onnx.version_converter."
        )
    return proto


def _opset_of(proto: Any) -> int:
    """Return the version of ONNX's own operator set that a file uses."""
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def _by_tracing_graph(plain: nn.Module, traced: tuple[Tensor, ...], dynamic: Mapping[int, str], opset: int) -> Any:
    shapes = tuple(dict(dynamic) for _ in traced) if dynamic else None
    program = torch.onnx.export(
        plain, traced, dynamo=True, dynamic_shapes=shapes, opset_version=opset, verbose=False, external_data=False
    )
    if program is None:
        raise RuntimeError("it returned nothing.")
    return program.model_proto


def _by_torchscript(plain: nn.Module, traced: tuple[Tensor, ...], dynamic: Mapping[int, str], opset: int) -> Any:
    """Export by the older exporter, which takes what some versions of the newer one do not.

    PyTorch 2.14's newer one takes the number of time steps of an LSTM for a constant.
    """
    (onnx,) = needed("onnx", purpose="to_onnx", install=EXPORT)
    names = list(inspect.signature(plain.forward).parameters)[: len(traced)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        torch.onnx.export(
            plain,
            traced,
            file,
            dynamo=False,
            input_names=names,
            dynamic_axes={name: dict(dynamic) for name in names},
            opset_version=opset,
        )
        return onnx.load(file)


def _check(onnx: Any, payload: bytes, module: nn.Module) -> None:
    try:
        onnx.checker.check_model(payload, full_check=True)
    except Exception as error:
        raise RuntimeError(f"to_onnx: PyTorch's exporter made an invalid file of {type(module).__name__}: {error}") from error


def _without_notes(proto: Any) -> Any:
    """Remove the exporter's notes about each operation: stack traces with local paths, which no runtime needs."""
    for entry in (
        *proto.graph.node,
        *proto.graph.value_info,
        *proto.graph.input,
        *proto.graph.output,
        *proto.graph.initializer,
    ):
        entry.doc_string = ""
        del entry.metadata_props[:]
    for entry in (proto, proto.graph):
        del entry.metadata_props[:]
    return proto


@torch.no_grad()
def _compare(
    plain: nn.Module, payload: bytes, inputs: tuple[Tensor, ...], dynamic: Mapping[int, str]
) -> tuple[tuple[tuple[tuple[int, ...], ...], ...], float, float]:
    """Run both, and return the shapes of the inputs, the largest difference and the largest output."""
    (runtime,) = needed("onnxruntime", purpose="to_onnx", install=EXPORT)
    try:
        session = runtime.InferenceSession(payload, providers=["CPUExecutionProvider"])
    except Exception as failure:
        raise RuntimeError(
            f"to_onnx: onnxruntime could not load the file, so nothing was written. Try another `opset`. ({failure})"
        ) from failure
    names = [entry.name for entry in session.get_inputs()]
    trials = [inputs]
    if dynamic:
        trials.append(tuple(_resized(tensor, dict.fromkeys(dynamic, 1)) for tensor in inputs))
        trials.append(tuple(_resized(tensor, {d: tensor.shape[d] + 2 for d in dynamic}) for tensor in inputs))
    error, largest = 0.0, 0.0
    for trial in trials:
        expected = [part for part in pytree.tree_leaves(plain(*trial)) if isinstance(part, Tensor)]
        try:
            given = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, trial, strict=False)})
        except Exception as failure:
            raise RuntimeError(
                f"to_onnx: onnxruntime could not run the file with inputs {[tuple(t.shape) for t in trial]}: a size became a "
                f"constant. Give dynamic={{}} or other dimensions. ({failure})"
            ) from failure
        if [tuple(part.shape) for part in given] != [tuple(part.shape) for part in expected]:
            raise RuntimeError(
                f"to_onnx: expected outputs of shapes {[tuple(part.shape) for part in expected]}, found "
                f"{[part.shape for part in given]} from onnxruntime for inputs {[tuple(t.shape) for t in trial]}: a size "
                "became a constant. Give dynamic={} or other dimensions."
            )
        for one, other in zip(given, expected, strict=True):
            wanted = other.double().numpy()
            error = _largest(error, np.abs(one.astype(np.float64) - wanted))
            largest = _largest(largest, np.abs(wanted))
    return tuple(tuple(tuple(tensor.shape) for tensor in trial) for trial in trials), error, largest


def _largest(so_far: float, values: np.ndarray) -> float:
    """Return the maximum; NaN stays NaN."""
    return float(np.max(np.append(values.reshape(-1), so_far)))


def _resized(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """Change the sizes of a tensor by repeating or leaving out its entries."""
    for dimension, size in sizes.items():
        tensor = tensor.index_select(dimension, torch.arange(size) % tensor.shape[dimension])
    return tensor
