"""Making a network sparse and dense again, and looking at it: no Lightning needed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_deepr.compute import check_compute
from lightning_deepr.connections import FORMAT_KEY, Converted, KSlots, Notice, converted_tensors, install, remove
from lightning_deepr.selection import (
    Candidate,
    Connectivity,
    Distribution,
    Modules,
    allocate,
    candidates,
    check_connectivity,
    select,
)
from lightning_deepr.start import INITS, start


def sparsify(
    module: nn.Module,
    connectivity: Connectivity,
    *,
    target_modules: Modules = "all",
    exclude_modules: Modules = (),
    distribution: Distribution = "erdos_renyi",
    init: str = "module",
    seed: int = 0,
    compute: str = "auto",
    device: torch.device | str | None = None,
) -> nn.Module:
    """Convert chosen weights into K slots each, in place. Do it before the optimizer is made.

    Args:
        module: any module; layers of the meta device are materialized.
        connectivity: float in (0, 1] (a fraction), int (a number of connections) or dict {pattern: float | int}.
        target_modules: "all" | "all-linear" | list of patterns | regular expression | predicate(name, module).
        exclude_modules: the same forms.
        distribution: how the connections are shared out, see :func:`lightning_deepr.selection.allocate`.
        init: "module" | "largest" | "deepr", see :func:`lightning_deepr.start.start`.
        seed: of places, signs and (``init="deepr"``) values. The global generator is not used.
        compute: "auto" | "dense".
        device: where to put the module (None: where it is; the CPU for what is on meta).

    Returns:
        the module itself.

    Raises:
        ValueError: nothing matches, a count does not fit, a tensor is converted already, shared by two layers or has
            another parametrization. Nothing is converted then.

    Example::

        >>> from lightning_deepr.models import LeNet300100
        >>> net = sparsify(LeNet300100(), 0.01)
        >>> [tuple(p.shape) for p in net.fc1.parameters()]
        [(300,), (1810,)]
        >>> net.fc1.weight.shape, int((net.fc1.weight != 0).sum())
        (torch.Size([300, 784]), 1810)
    """
    check_connectivity(connectivity)
    chosen = select(candidates(module), target_modules, exclude_modules, connectivity)
    for candidate in chosen:
        if candidate.slots is not None:
            raise ValueError(
                f"`{candidate.name}` is converted already (K = {candidate.slots.count}). Expected a dense weight: leave it out "
                "with exclude_modules, or call densify(module) first."
            )
    if not chosen:
        raise ValueError(nothing_to_convert(module))
    counts = allocate(chosen, connectivity, distribution)
    convert(module, chosen, counts, init=init, seed=seed, compute=compute, device=device)
    return module


def convert(
    root: nn.Module,
    chosen: list[Candidate],
    counts: Mapping[str, int],
    *,
    init: str,
    seed: int,
    compute: str,
    device: torch.device | str | None = None,
) -> list[Converted]:
    """Convert the chosen tensors with the given counts; all checks come before the first change."""
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(INITS)}, found {init!r}.")
    backend = check_compute(compute)
    check_seed(seed)
    _refuse_shared(root, chosen)
    for candidate in chosen:
        if parametrize.is_parametrized(candidate.module, candidate.tensor_name):
            kind = type(candidate.module.parametrizations[candidate.tensor_name][0]).__name__  # type: ignore[index, union-attr]
            raise ValueError(
                f"`{candidate.name}` has another parametrization already ({kind}). Expected a plain weight: leave it out with "
                "exclude_modules, or remove that parametrization first."
            )
        if isinstance(candidate.module, (nn.Embedding, nn.EmbeddingBag)) and candidate.module.sparse:
            raise ValueError(
                f"`{candidate.name}` has sparse=True, whose gradient is a sparse tensor: expected sparse=False (the gradient of a "
                "converted weight has K entries anyway)."
            )
    _refuse_unmaterializable(root, chosen)
    first = 1 + max((converted.slots.index for converted in converted_tensors(root)), default=-1)
    notice, begun = Notice(), []
    for offset, candidate in enumerate(chosen):
        weight = candidate.parameter
        assert weight is not None
        target = weight.device if weight.device.type != "meta" else torch.device("cpu")
        target = torch.device(device) if device is not None else target
        begun.append(
            start(candidate, counts[candidate.name], first + offset, init=init, seed=seed, notice=notice, device=target)
        )
    for candidate, (theta, slots) in zip(chosen, begun, strict=True):
        slots.compute = backend
        install(candidate.module, candidate.tensor_name, theta, slots, candidate.name)
    _materialize(root, seed, device)
    if device is not None:
        root.to(device)
    names = {candidate.name for candidate in chosen}
    return [converted for converted in converted_tensors(root) if converted.name in names]


def check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, found {seed!r}.")


def _refuse_shared(root: nn.Module, chosen: list[Candidate]) -> None:
    holders: dict[int, list[str]] = {}
    for prefix, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{prefix}.{name}" if prefix else name)
    for candidate in chosen:
        names = holders.get(id(candidate.parameter), [])
        if len(names) > 1:
            raise ValueError(
                f"`{candidate.name}` is shared (tied): {' and '.join(f'`{name}`' for name in names)} are one tensor, and converting "
                "one of them would untie them. Leave all of them out with exclude_modules, or untie them first."
            )


def _on_meta(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None and tensor.device.type == "meta" for tensor in tensors)


def _refuse_unmaterializable(root: nn.Module, chosen: list[Candidate]) -> None:
    """What is on the meta device is converted, or has to know how to reset itself."""
    becoming = {id(candidate.module) for candidate in chosen}
    for name, module in root.named_modules():
        if not _on_meta(module) or id(module) in becoming or parametrize.is_parametrized(module):
            continue
        if not hasattr(module, "reset_parameters"):
            raise ValueError(
                f"`{name}` ({type(module).__name__}) is on the meta device and has no reset_parameters: expected a layer that can "
                "be materialized. Build it on a real device."
            )


def _materialize(root: nn.Module, seed: int, device: torch.device | str | None) -> None:
    """Give values to what is still on the meta device after conversion: biases, norm layers and unconverted weights.

    Each such module is emptied onto the device and reset by its own ``reset_parameters``; a converted module has its biases
    set as torch's layers do, since its reset would build the dense weight.
    """
    target = torch.device(device) if device is not None else torch.device("cpu")
    for module in root.modules():
        if not _on_meta(module):
            continue
        converted = parametrize.is_parametrized(module)
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is not None and tensor.device.type == "meta":
                    empty = torch.empty_like(tensor, device=target)
                    own[key] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty  # type: ignore[assignment]
        if not converted:
            module.reset_parameters()  # type: ignore[operator]
            continue
        with torch.no_grad():
            for parameter in module._parameters.values():
                if parameter is None:
                    continue
                if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
                    bound = 1 / math.sqrt(module.hidden_size)
                elif isinstance(module, nn.MultiheadAttention):
                    bound = 0.0
                else:
                    shape = next(iter(module.parametrizations.values()))[0].shape  # type: ignore[union-attr, operator]
                    bound = 1 / math.sqrt(max(math.prod(shape[1:]), 1))
                generator = torch.Generator(parameter.device).manual_seed(seed)
                parameter.copy_(torch.rand(parameter.shape, generator=generator, device=parameter.device) * (2 * bound) - bound)


def nothing_to_convert(module: nn.Module) -> str:
    """The message for a model in which nothing can be converted: what was found, and where to build the layers."""
    found = candidates(module)
    why = "; ".join(f"`{c.name}`: {c.left_out}" for c in found if c.left_out and c.slots is None)
    return (
        f"{type(module).__name__} has nothing to convert: expected at least one Linear, Conv, recurrent or attention layer with a "
        f"trainable weight, found {'only what is left out (' + why + ')' if why else 'none'}. Build the layers in `__init__` or in "
        "`configure_model`: a callback's `setup` comes before the module's own `setup`."
    )


def densify(module: nn.Module) -> nn.Module:
    """Turn converted weights back into ordinary dense parameters, in place: zeros where nothing is connected.

    The ``state_dict`` then loads without this package. Parameters are new objects: make the optimizer anew.

    Args:
        module: a module with or without converted weights.

    Returns:
        the module itself.

    Example::

        >>> net = densify(sparsify(nn.Linear(100, 10), 0.05))
        >>> type(net).__name__, int((net.weight != 0).sum()), sorted(net.state_dict())
        ('Linear', 50, ['bias', 'weight'])
    """
    for converted in list(converted_tensors(module)):
        if converted.slots.total * converted.theta.element_size() > (1 << 34):
            raise RuntimeError(
                f"`{converted.name}` of shape {tuple(converted.slots.shape)} would take more than 16 GiB as a dense weight. "
                "`connections(module)` gives its places and values."
            )
    for converted in list(converted_tensors(module)):
        remove(converted)
    return module


def connections(module: nn.Module) -> dict[str, tuple[torch.Size, Tensor, Tensor]]:
    """The connections of every converted tensor; never builds a dense tensor.

    Args:
        module: a module with converted weights.

    Returns:
        {tensor name: (shape, places int64 [K], values [K])}: the weight is ``values`` at the flat indices ``places`` of
        ``shape`` and 0 elsewhere. Places are in the order of the slots; both tensors are copies.

    Example::

        >>> shape, places, values = connections(sparsify(nn.Linear(100, 10), 0.05))["weight"]
        >>> shape, places.shape, values.shape
        (torch.Size([10, 100]), torch.Size([50]), torch.Size([50]))
    """
    return {
        c.name: (c.slots.shape, c.slots.places.clone(), (c.theta.detach() * c.slots.signs).clone())
        for c in converted_tensors(module)
    }


class ConnectivityReport:
    """What is connected in a network, tensor by tensor. Prints as a table; see :func:`connectivity_report`."""

    columns = ("name", "shape", "total", "active", "connectivity", "l1", "compute")

    def __init__(self, rows: list[dict[str, Any]], left_out: dict[str, str]) -> None:
        self.rows = rows
        self.left_out = left_out

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.rows[position]

    @property
    def total(self) -> int:
        """N of all converted tensors."""
        return sum(row["total"] for row in self.rows)

    @property
    def active(self) -> int:
        """K of all converted tensors."""
        return sum(row["active"] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Rows, sums and what was left out, in builtins only."""
        connectivity = self.active / self.total if self.total else 0.0
        return {
            "rows": [dict(row) for row in self.rows],
            "total": self.total,
            "active": self.active,
            "connectivity": connectivity,
            "left_out": dict(self.left_out),
        }

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("ConnectivityReport.to_pandas needs pandas: `pip install pandas`.") from error
        return pandas.DataFrame(self.rows, columns=list(self.columns))

    def __str__(self) -> str:
        body = [
            (
                row["name"],
                "x".join(str(size) for size in row["shape"]),
                f"{row['total']:,}",
                f"{row['active']:,}",
                f"{row['connectivity']:.3%}",
                "-" if row["l1"] is None else f"{row['l1']:g}" if isinstance(row["l1"], float) else str(row["l1"]),
                row["compute"],
            )
            for row in self.rows
        ]
        if self.rows:
            body.append(("total", "", f"{self.total:,}", f"{self.active:,}", f"{self.active / self.total:.3%}", "", ""))
        widths = [max(len(line[i]) for line in [self.columns, *body]) for i in range(len(self.columns))]
        right = {2, 3, 4}

        def line(cells: tuple[str, ...]) -> str:
            cells_ = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
            return "  ".join(cells_).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [line(self.columns), rule, *(line(row) for row in body[: len(self.rows)])]
        if self.rows:
            lines += [rule, line(body[-1])]
        lines += [f"left dense: {name} ({why})" for name, why in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__


def connectivity_report(module: nn.Module) -> ConnectivityReport:
    """Which tensors are sparse, how sparse, and what was left dense and why.

    Args:
        module: any module.

    Returns:
        rows with name, shape, total (N), active (K), connectivity (K / N), l1 (the value that a callback took, None before) and
        compute. Print it, iterate over it, or use ``.to_dict()`` and ``.to_pandas()``.

    Example::

        >>> print(connectivity_report(sparsify(nn.Linear(100, 10), 0.05)))
        name    shape   total  active  connectivity  l1  compute
        --------------------------------------------------------
        weight  10x100  1,000      50        5.000%  -   dense
        --------------------------------------------------------
        total           1,000      50        5.000%
    """
    rows = [
        {
            "name": c.name,
            "shape": tuple(c.slots.shape),
            "total": c.slots.total,
            "active": c.slots.count,
            "connectivity": c.slots.count / c.slots.total,
            "l1": c.slots.l1_taken,
            "compute": c.slots.compute,
        }
        for c in converted_tensors(module)
    ]
    left_out = {c.name: c.left_out or "not selected" for c in candidates(module) if c.slots is None}
    return ConnectivityReport(rows, left_out)


def load_state_dict(module: nn.Module, path_or_dict: str | PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Load a sparse checkpoint into a module that still is dense: converts as recorded, then loads.

    Args:
        module: of the architecture of the checkpoint; tensors that are converted already must have the recorded K.
        path_or_dict: a ``state_dict``, a Lightning checkpoint (its ``state_dict`` is taken), or a path to one of them as
            ``.ckpt``, ``.pt``, ``.pth`` (loaded with ``weights_only=True``) or ``.safetensors``.

    Returns:
        the module itself.

    Raises:
        ValueError: the file is no checkpoint, or names layers or shapes that the module does not have.
        RuntimeError: keys that are missing or left over (torch's own message). A module that was dense is unchanged then, too.
    """
    state = _read(path_or_dict) if isinstance(path_or_dict, (str, PathLike)) else path_or_dict
    state = dict(state.get("state_dict", state))
    by_name = {(c.module_name, c.tensor_name): c for c in candidates(module)}
    chosen, counts, records = [], {}, {}
    for key in state:
        if not key.endswith(".0." + FORMAT_KEY):
            continue
        head = key.removesuffix("0." + FORMAT_KEY)
        module_name, _, tensor_name = ("." + head.removesuffix(".")).rpartition(".parametrizations.")
        module_name = module_name.removeprefix(".")
        candidate = by_name.get((module_name, tensor_name))
        shape, places = tuple(state[head + "0.shape"].tolist()), state[head + "0.places"]
        name = f"{module_name}.{tensor_name}" if module_name else tensor_name
        if candidate is None:
            raise ValueError(
                f"The checkpoint has connections for `{name}`, but {type(module).__name__} has no such weight. Expected a "
                f"checkpoint of this model; its weights are: {', '.join(c.name for c in by_name.values()) or 'none'}."
            )
        if candidate.shape != shape:
            raise ValueError(f"`{name}`: expected a weight of shape {candidate.shape}, found {shape} in the checkpoint.")
        if candidate.slots is not None:
            if candidate.slots.count != places.numel():
                raise ValueError(
                    f"`{name}` is converted with K = {candidate.slots.count}, found {places.numel()} in the checkpoint. Load into "
                    "a dense model (densify(module) first), or convert with the recorded connectivity."
                )
            continue
        chosen.append(candidate)
        counts[candidate.name] = places.numel()
        records[candidate.name] = int(state[head + "0.index"])
    if chosen:
        chosen.sort(key=lambda candidate: records[candidate.name])
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        new = convert(module, chosen, counts, init="deepr", seed=0, compute="auto")
    try:
        module.load_state_dict(state)
    except RuntimeError:
        if chosen and not any(tensor.device.type == "meta" for tensor in before.values()):
            for converted in new:
                remove(converted)
            module.load_state_dict(before)
        raise
    return module


def _read(path: str | PathLike[str]) -> Mapping[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {file}.")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file}: expected a state_dict or a Lightning checkpoint, found {type(loaded).__name__}.")
    return loaded


def save_sparse(module: nn.Module, path: str | PathLike[str], **metadata: Any) -> Path:
    """Write a module's ``state_dict`` (K-sized for converted weights) as safetensors, with the recorded connectivity.

    Args:
        module: a module with converted weights.
        path: of the file to write; :func:`load_state_dict` reads it.
        metadata: JSON values to put beside it.

    Returns:
        the path.
    """
    from safetensors.torch import save_file

    record = {"format": "lightning-deepr", "connectivity": connectivity_report(module).to_dict(), **metadata}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in record.items()})
    return Path(path)


def is_converted(module: nn.Module) -> bool:
    """Whether any tensor of a module is converted."""
    return any(isinstance(submodule, KSlots) for submodule in module.modules())


def report_of_checkpoint(path_or_dict: str | PathLike[str] | Mapping[str, Any]) -> ConnectivityReport:
    """The connectivity that a sparse checkpoint records, read without its model.

    Args:
        path_or_dict: as for :func:`load_state_dict`.

    Raises:
        ValueError: the checkpoint has no sparse tensor.
    """
    state = _read(path_or_dict) if isinstance(path_or_dict, (str, PathLike)) else path_or_dict
    state = state.get("state_dict", state)
    rows = []
    for key in state:
        if key.endswith(".0." + FORMAT_KEY):
            head = key.removesuffix("0." + FORMAT_KEY)
            shape, count = tuple(state[head + "0.shape"].tolist()), state[head + "0.places"].numel()
            total = math.prod(shape)
            rows.append(
                {
                    "name": head.removesuffix(".").replace("parametrizations.", ""),
                    "shape": shape,
                    "total": total,
                    "active": count,
                    "connectivity": count / total,
                    "l1": None,
                    "compute": "-",
                }
            )
    if not rows:
        raise ValueError("expected a sparse checkpoint, found one without a converted tensor.")
    return ConnectivityReport(rows, {})
