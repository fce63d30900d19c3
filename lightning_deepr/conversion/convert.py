"""Convert a network to sparse weights and back, and list its connections. Lightning is not needed."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_deepr.algorithm.signs import check as check_signs
from lightning_deepr.compute import check_compute
from lightning_deepr.conversion import adapting, connectivities, notebook, pruned, sharing, tied
from lightning_deepr.conversion.allocation import check_connectivity, shares
from lightning_deepr.conversion.computing import tell_own_forwards, warn_of_ddp
from lightning_deepr.conversion.connectivities import Given
from lightning_deepr.conversion.draws import first_unused, note_used
from lightning_deepr.conversion.kinds import kind_of
from lightning_deepr.conversion.materialize import materialize, refuse_unmaterializable
from lightning_deepr.conversion.restrictions import allowed_of, check_candidates, refuse_too_many, tables_of
from lightning_deepr.conversion.selection import (
    Candidate,
    Connectivity,
    Distribution,
    Modules,
    candidates,
    connectivity_of,
    select,
    takes_what_is_usual,
)
from lightning_deepr.conversion.start import INITS, start
from lightning_deepr.kernels.cpu.buffers import give_back
from lightning_deepr.packages.seeds import seed_or_default
from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.find import Converted, converted_tensors
from lightning_deepr.weights.install import install, remove
from lightning_deepr.weights.k_slots import KSlots, Notice


def sparsify(
    module: nn.Module,
    connectivity: Connectivity,
    *,
    target_modules: Modules = "all",
    exclude_modules: Modules = (),
    distribution: Distribution = "erdos_renyi",
    init: str = "module",
    seed: int | None = None,
    compute: str = "auto",
    device: torch.device | str | None = None,
    scope: str = "layer",
    candidates: Any = None,
    signs: Any = "place",
) -> nn.Module:
    """Convert chosen weights into K slots each, in place.

    Call it before the optimizer is made.

    Args:
        module: the network to convert; its layers on the meta device are materialized.
        connectivity: float in (0, 1] (a fraction), int (a number of connections), "nonzero" (the weights that are not 0, which
            keep their values and signs), or dict {pattern: float | int | "nonzero" | places}. Places are a bool mask, a list of
            flat indices, a matrix of torch or SciPy in COO or CSR format, or a dense weight with zeros (so a ``state_dict`` is
            such a dict). ``Topology(path)`` reads those of a file, a checkpoint or a model of the zoo.
        target_modules: "all" | "all-linear" | list of patterns | regular expression | predicate(name, module). "all" leaves
            out what is frozen, tied or an embedding. A pattern names a layer or a tensor, by a suffix at a dot; one that names
            none names a module, and covers what "all" takes within it. A tied tensor is named by all of its names; it becomes
            one tensor of connections for all of its layers.
        exclude_modules: the same forms.
        distribution: how the connections are shared out, see :func:`lightning_deepr.conversion.allocation.allocate`.
        init: "module" | "largest" | "deepr", see :func:`lightning_deepr.conversion.start.start`.
        seed: the seed of places, signs and (``init="deepr"``) values; None: that of ``seed_everything`` if it was called in
            this process, else 0. The global generator is not used. Networks of equal shapes that are converted with one seed
            get equal places; a second conversion of the same modules in one process does not.
        compute: "dense" (each forward pass builds the weight and throws it away), "sparse" (linear layers, LSTMs and GRUs
            compute from their connections alone), "auto" (per tensor and batch size, by a measured break-even) or "tune" (the
            same by times on this machine, see :mod:`lightning_deepr.compute.tuning`).
        device: the device to put the module on. None: the module stays where it is, and what is on meta goes to the CPU.
        scope: "layer": K per tensor. "global": one K for all tensors, in one parameter, for ``DeepR(scope="global")``;
            ``connectivity`` gives K, ``distribution`` shares it out at the start.
        candidates: where connections may be, at the start and ever after: a bool mask, ``Band(width)``, ``Blocks(number)``,
            ``NoSelf()``, ``Local(grid, radius)``, a function of (rows, columns), several of them with ``&``, or a dict
            {pattern: one of these}. None: everywhere.
        signs: the constant signs of the places: "place" (a hash of the place), ``Dale(excitatory)`` (one sign for each input
            unit), a tensor of signs, or a dict {pattern: one of these}.

    Returns:
        the module itself.

    Raises:
        TypeError, ValueError: an argument is none of its forms, or does not fit a tensor.
        ValueError: nothing matches, a count does not fit, a tensor is converted already, two layers share (tie) it, or it has
            another parametrization. In all these cases nothing is converted.

    Example::

        >>> from lightning_deepr.models import LeNet300100
        >>> net = sparsify(LeNet300100(), 0.01)
        >>> [tuple(p.shape) for p in net.fc1.parameters()]
        [(300,), (1810,)]
        >>> net.fc1.weight.shape, int((net.fc1.weight != 0).sum())
        (torch.Size([300, 784]), 1810)
    """
    connectivity = connectivities.as_mapping(connectivity)
    check_connectivity(connectivity)
    check_candidates(candidates)
    check_signs(signs)
    if scope not in ("layer", "global"):
        raise ValueError(f'scope: expected "layer" (K per tensor) or "global" (one K for all of them), found {scope!r}.')
    with pruned.made_plain(module, connectivities.asks_for_nonzero(connectivity)):
        _sparsify(
            module, connectivity, target_modules, exclude_modules, distribution, scope,
            init=init, seed=seed_or_default(seed), compute=compute, device=device, restriction=candidates, signs=signs,
        )  # fmt: skip
    return module


def _sparsify(
    module: nn.Module,
    connectivity: Connectivity,
    target_modules: Modules,
    exclude_modules: Modules,
    distribution: Distribution,
    scope: str,
    **options: Any,
) -> None:
    found = candidates(module)
    chosen = select(found, target_modules, exclude_modules, connectivity)
    chosen = tied.as_one(module, chosen, lambda candidate: connectivity_of(connectivity, candidate))
    for candidate in chosen:
        if candidate.slots is not None:
            raise ValueError(
                f"`{candidate.name}` is converted already (K = {candidate.slots.count}). Expected a dense weight: leave it out "
                "with exclude_modules, or call densify(module) first."
            )
    if not chosen:
        raise ValueError(nothing_to_convert(module))
    if takes_what_is_usual(target_modules, connectivity) and (line := tied.left_out(module, found)):
        warnings.warn(line, stacklevel=3)
    counts = shares(chosen, connectivity, distribution)
    if scope == "global":
        sharing.check(chosen, device=options["device"])
    options["seed"] = seed_or_default(options["seed"])
    new = convert(module, chosen, counts, given=counts.given, **options)
    if scope == "global":
        sharing.join(new)


def convert(
    root: nn.Module,
    chosen: list[Candidate],
    counts: Mapping[str, int],
    *,
    init: str,
    seed: int,
    compute: str,
    device: torch.device | str | None = None,
    begin: Callable[..., tuple[Tensor, Parametrization]] = start,
    upon: Collection[str] = (),
    given: Mapping[str, Given] | None = None,
    restriction: Any = None,
    signs: Any = "place",
) -> list[Converted]:
    """Convert the chosen tensors with the given counts. All checks come before the first change.

    Args:
        root: the network that holds the chosen tensors.
        chosen: the tensors to convert.
        counts: {tensor name: K}.
        init, seed, compute, device: as for :func:`sparsify`.
        begin: the function that makes theta and its parametrization; it takes the arguments of
            :func:`lightning_deepr.conversion.start.start`, the default, which makes K slots.
        upon: the names of the tensors that stay as frozen weights, to which the connections are added. ``begin`` puts the slots
            upon them.
        given: {tensor name: the places that the user gives}.
        restriction, signs: ``candidates`` and ``signs`` of :func:`sparsify`.
    """
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(INITS)}, found {init!r}.")
    policy = check_compute(compute)
    check_seed(seed)
    adapting.refuse_unfit(one for one in chosen if one.name in upon)
    tied.refuse(root, [one for one in chosen if one.name not in upon])
    for candidate in chosen:
        if parametrize.is_parametrized(candidate.module, candidate.tensor_name):
            kind = type(candidate.module.parametrizations[candidate.tensor_name][0]).__name__  # type: ignore[index, union-attr]
            raise ValueError(
                f"`{candidate.name}` has another parametrization already ({kind}). Expected a plain weight: leave it out with "
                "exclude_modules, or remove that parametrization first."
            )
        refusal = candidate.kind.refuses(candidate.module)
        if refusal:
            raise ValueError(f"`{candidate.name}` {refusal}")
    partners = tied.partners(root, chosen)
    for module, tensor_name in itertools.chain.from_iterable(partners.values()):
        if parametrize.is_parametrized(module, tensor_name) or (refusal := kind_of(type(module)).refuses(module)):
            raise ValueError(
                f"A tensor that is tied with `{tensor_name}` of {type(module).__name__} can't be converted: this one "
                f"{refusal or 'has another parametrization'}"
            )
    if policy == "sparse" and (whole := [c.name for c in chosen if c.is_whole]):
        raise ValueError(
            f'compute="sparse": `{whole[0]}` is a tied tensor, which its layers build: expected "auto" or "dense" for it.'
        )
    refuse_unmaterializable(root, chosen)
    tell_own_forwards(chosen, policy)
    warn_of_ddp(root, chosen)
    first = first_unused(root)
    allowed = allowed_of(chosen, restriction, device)
    refuse_too_many(counts, allowed)
    extra: dict[str, dict[str, Any]] = {
        "given": dict(given or {}), "allowed": dict(allowed), "sign_table": dict(tables_of(chosen, signs, seed, first))
    }  # fmt: skip
    notice, begun = Notice(), []
    for offset, candidate in enumerate(chosen):
        weight = candidate.parameter
        assert weight is not None
        target = weight.device if weight.device.type != "meta" else torch.device("cpu")
        target = torch.device(device) if device is not None else target
        more = {key: values[candidate.name] for key, values in extra.items() if candidate.name in values}
        begun.append(
            begin(candidate, counts[candidate.name], first + offset, init=init, seed=seed, notice=notice, device=target, **more)
        )
        if candidate.is_whole and not isinstance(begun[-1][1], KSlots):
            raise ValueError(
                f"`{candidate.name}` is tied with {', '.join(f'`{name}`' for name in candidate.aliases)}: expected a method on "
                "K slots (DeepR, SET, RigL, FixedRandom) for a tied tensor, or leave it out with exclude_modules."
            )
    for candidate, (theta, slots) in zip(chosen, begun, strict=True):
        slots.layer = candidate.kind.compute
        # layers of several kinds have no common order of connections: each builds the weight of a tied tensor
        capable = not candidate.is_whole and slots.layer.capable(candidate.module, candidate.tensor_name, candidate.shape)
        slots.choose_compute(policy, capable)
        install(candidate.module, candidate.tensor_name, theta, slots, candidate.name)
        holder: Any = candidate.module.parametrizations[candidate.tensor_name]  # type: ignore[index, union-attr]
        slots.hold(holder)
        if slots.adapts:
            holder[0].base.requires_grad_(False)
        slots.is_tied = candidate.is_whole
        for module, tensor_name in partners.get(candidate.name, ()):
            layer = kind_of(type(module)).compute
            install(module, tensor_name, holder.original, slots, candidate.name, tied=layer)
    materialize(root, seed, device)
    if any(candidate.total > 1 << 28 for candidate in chosen):
        give_back()  # the memory that the conversion used
    if device is not None:
        root.to(device)
    notebook.show(root)
    names = {candidate.name for candidate in chosen}
    return [converted for converted in converted_tensors(root) if converted.name in names]


def check_seed(seed: Any) -> None:
    """Refuse a seed that is not an int."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, found {seed!r}.")


def nothing_to_convert(module: nn.Module) -> str:
    """Write the message for a model that has nothing to convert: what was found, and where to build the layers."""
    found = candidates(module)
    if found and all(c.left_out.startswith(tied.REASON) for c in found):
        return tied.refusal(module, found)
    why = "; ".join(f"`{c.name}`: {c.left_out}" for c in found if c.left_out and c.slots is None)
    return (
        f"{type(module).__name__} has nothing to convert: expected at least one Linear, Conv, recurrent or attention layer "
        f"with a trainable weight, found {'only what is left out (' + why + ')' if why else 'none'}. Build the layers in "
        "`__init__` or in `configure_model`: a callback's `setup` comes before the module's own `setup`."
    )


def densify(module: nn.Module) -> nn.Module:
    """Turn converted weights back into ordinary dense parameters, in place.

    Dormant connections become zeros; an adapted weight becomes the sum of its frozen weight and the connections. The
    ``state_dict`` then loads without this package. The parameters are new objects: make a new optimizer. A parametrization of
    others that was registered upon a converted weight stays upon the dense one.

    Args:
        module: a module with or without converted weights.

    Returns:
        the module itself.

    Raises:
        RuntimeError: a dense weight would take more than 16 GiB.

    Example::

        >>> net = densify(sparsify(nn.Linear(100, 10), 0.05))
        >>> type(net).__name__, int((net.weight != 0).sum()), sorted(net.state_dict())
        ('Linear', 50, ['bias', 'weight'])
    """
    sharing.refuse_torn(converted_tensors(module))
    for converted in list(converted_tensors(module)):
        if converted.slots.total * converted.theta.element_size() > (1 << 34):
            raise RuntimeError(
                f"`{converted.name}` of shape {tuple(converted.slots.shape)} would take more than 16 GiB as a dense weight. "
                "`connections(module)` gives its places and values."
            )
    dense: dict[Parametrization, nn.Parameter] = {}
    for converted in list(converted_tensors(module, every=True)):
        note_used(converted)
        dense[converted.slots] = remove(converted, dense.get(converted.slots))
    notebook.hide(module)
    return module


def connections(module: nn.Module) -> dict[str, tuple[torch.Size, Tensor, Tensor]]:
    """List the connections of every converted tensor, without building a dense tensor.

    Args:
        module: a module with converted weights.

    Returns:
        {tensor name: (shape, places int64 [K], values [K])}: the weight is ``values`` at the flat indices ``places`` of
        ``shape`` and 0 elsewhere. Places are in the order of the slots; both tensors are copies. If another parametrization was
        registered upon the weight, these are the connections from which it computes.

    Example::

        >>> shape, places, values = connections(sparsify(nn.Linear(100, 10), 0.05))["weight"]
        >>> shape, places.shape, values.shape
        (torch.Size([10, 100]), torch.Size([50]), torch.Size([50]))
    """
    return {c.name: (c.slots.shape, *c.slots.active(c.theta)) for c in converted_tensors(module)}
