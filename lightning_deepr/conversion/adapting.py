"""What an adaptation does otherwise than a conversion: the weight stays, frozen, and the connections are a difference to it.

The difference starts at 0, so the network computes what it did. Frozen weights and tied ones can be adapted, too: the frozen
weight is the same parameter as before, and all layers that hold it share one difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr.conversion import tied
from lightning_deepr.conversion.barred import is_bias
from lightning_deepr.conversion.connectivities import Given
from lightning_deepr.conversion.selection import Candidate, names_of, nearest
from lightning_deepr.conversion.start import start
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.names import join, paths_of

WORDS = {"weight": '"weight" (the connections are the weight)', "difference": '"difference" (to a frozen weight)'}
INITS = ("module", "largest")
KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_TRAINED = "trained as it is (trainable)"
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)


def check_of(of: Any, init: str = "module") -> None:
    """Check the argument ``of``."""
    if of not in WORDS:
        raise ValueError(f"of: expected {' or '.join(WORDS.values())}, found {of!r}.")
    if of == "difference" and init not in INITS:
        raise ValueError(
            f'init: expected "module" (random places) or "largest" (the places of the largest weights) for of="difference", '
            f"which starts at 0, found {init!r}."
        )


def check_trainable(trainable: Any, of: str = "difference") -> None:
    """Check the argument ``trainable``."""
    if isinstance(trainable, str) or not isinstance(trainable, Iterable) or not all(isinstance(one, str) for one in trainable):
        raise TypeError(f'trainable: expected a list of "biases", "norms" and names of layers or tensors, found {trainable!r}.')
    if tuple(trainable) and of != "difference":
        raise ValueError('trainable: expected with of="difference", which freezes everything else, found it without.')


# -- which tensors ----------------------------------------------------------------------------------------------------------


def adaptable(root: nn.Module, found: Sequence[Candidate], target_modules: Any, trainable: Iterable[str]) -> list[Candidate]:
    """List the candidates of an adaptation: frozen and tied tensors are among them, what is trained as it is is not.

    Args:
        root: the network.
        found: its candidates.
        target_modules: the user's argument, for messages.
        trainable: patterns of what is trained as it is.

    Raises:
        ValueError: a pattern of ``trainable`` names nothing, or ``target_modules`` names a quantized weight.
    """
    _refuse_quantized(root, found, target_modules)
    trained = {id(parameter) for parameter in opened(root, trainable)}
    listed, seen = [], set[int]()
    for one in found:
        reason = one.left_out
        if one.slots is None and (reason == "requires_grad=False" or reason.startswith(tied.REASON)):
            reason = ""
        if one.slots is None and id(one.parameter) in trained:
            reason = _TRAINED
        if not reason and one.slots is None and one.parameter is not None:
            if id(one.parameter) in seen:
                reason = "adapted under another name"  # tied: once for all layers
            seen.add(id(one.parameter))
        listed.append(replace(one, left_out=reason))
    return listed


def once(chosen: Sequence[Candidate]) -> list[Candidate]:
    """Keep the first of the candidates that are one tensor."""
    kept: dict[int, Candidate] = {}
    for one in chosen:
        kept.setdefault(id(one.slots if one.slots is not None else one.parameter), one)
    return list(kept.values())


def refuse_sparse(chosen: Iterable[Candidate]) -> None:
    """Refuse weights that are converted and have no frozen weight below their connections."""
    for one in chosen:
        if one.slots is not None and not one.slots.adapts:
            raise ValueError(
                f'`{one.name}` is converted already (K = {one.slots.wanted}): of="difference" expects a dense pretrained '
                "weight. Call densify(module) first, or leave it out with exclude_modules."
            )


def refuse_trained(chosen: Iterable[Candidate]) -> None:
    """Refuse tensors that the user names twice, to be adapted and to be trained as they are."""
    for one in chosen:
        if one.left_out == _TRAINED:
            raise ValueError(
                f"`{one.name}`: target_modules and trainable both name it. Expected one: a weight is adapted (and frozen), or "
                "trained as it is."
            )


def refuse_unfit(chosen: Iterable[Candidate]) -> None:
    """Refuse weights that can't be the base of a difference.

    Raises:
        ValueError: the message names the weight, and says what was expected, what was found and what to do.
    """
    for one in chosen:
        weight = one.parameter
        assert weight is not None
        if weight.is_meta:
            raise ValueError(
                f"`{one.name}` is on the meta device and has no values: expected pretrained weights. Load "
                "them first, then adapt."
            )
        if type(weight) is not nn.Parameter or weight.dtype not in KINDS:
            found = str(weight.dtype) if type(weight) is nn.Parameter else f"a {type(weight).__name__}"
            raise ValueError(
                f"`{one.name}`: expected a plain weight in bfloat16, float16, float32 or float64, found {found}: a "
                "difference to quantized values is not supported. Load the network unquantized, or leave the layer out with "
                "exclude_modules."
            )


def _refuse_quantized(root: nn.Module, found: Sequence[Candidate], target_modules: Any) -> None:
    """Refuse quantized layers that the user names, and a network of nothing else; warn if "all" leaves some out."""
    known = {one.name for one in found}
    quantized = {name: what for name, what in _quantized(root) if name not in known}
    if not quantized:
        return
    patterns = () if isinstance(target_modules, str) or callable(target_modules) else tuple(target_modules)
    named = [name for name in quantized if any(names_of(pattern, part) for pattern in patterns for part in _parts(name))]
    if named or not any(not one.left_out or one.slots is None for one in found):
        name = (named or list(quantized))[0]
        raise ValueError(
            f"`{name}` is quantized ({quantized[name]}): expected weights in bfloat16, float16, float32 or float64. A "
            "difference to quantized values is not supported: load the network unquantized, or leave the layer out with "
            "exclude_modules."
        )
    if not patterns:
        listed = ", ".join(f"`{name}`" for name in list(quantized)[:3])
        warnings.warn(f"Quantized layers are not adapted: {listed} ({len(quantized)} in all).", stacklevel=6)


def _quantized(root: nn.Module) -> Iterable[tuple[str, str]]:
    for module, paths in paths_of(root).items():
        library = type(module).__module__
        if library.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            if hasattr(module, "weight"):
                yield join(paths[0], "weight"), type(module).__name__
            elif any("weight" in name for name in (*vars(module), *module._modules)):  # recurrent layers pack several
                yield paths[0], type(module).__name__
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            # a parameter of integers is one whatever its name (HQQ's is W_q); buffers may hold indices
            if value is None or value.dim() < 2 or ("weight" not in name and name not in module._parameters):
                continue
            if not value.is_floating_point() and not value.is_complex() and value.dtype is not torch.bool:
                yield join(paths[0], name), str(value.dtype)


def _parts(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


# -- the start --------------------------------------------------------------------------------------------------------------


def difference_start(
    candidate: Candidate, count: int, index: int, *, init: str = "module", given: Given | None = None, **options: Any
) -> tuple[Tensor, KSlots]:
    """Make the theta and the slots of a difference: all values are 0, and the signs are hashed.

    Args:
        candidate, count, index: as for :func:`lightning_deepr.conversion.start.start`.
        init: "module": random places. "largest": those of the K largest weights. Other words are refused before.
        given: the places that the user gives.
        options: the other arguments of ``start``.
    """
    weight = candidate.parameter
    assert isinstance(weight, nn.Parameter)
    if init == "largest" and given is None and options.get("places") is None:
        flat = weight.detach().reshape(-1).abs()
        allowed = options.get("allowed")
        among = None if allowed is None else allowed.places(flat.device)
        found = (flat if among is None else flat[among]).topk(count, sorted=False).indices
        options["places"] = (found if among is None else among[found]).sort().values.to(options["device"])
    given = None if given is None else given._replace(own=False)
    theta, slots = start(candidate, count, index, init="module", given=given, **options)
    slots.put_upon(weight)
    return torch.zeros_like(theta), slots


# -- what is trained --------------------------------------------------------------------------------------------------------


def freeze(root: nn.Module, trainable: Iterable[str]) -> None:
    """Freeze every parameter of a network but the differences and what the user opens.

    Args:
        root: the adapted network.
        trainable: "biases", "norms", names of layers or tensors (patterns as in ``target_modules``).
    """
    thetas = {id(one.theta) for one in converted_tensors(root)}  # (as they are: a fine-tuning callback may have frozen some)
    trained = {id(parameter) for parameter in opened(root, trainable)}
    for parameter in root.parameters():
        if id(parameter) not in thetas and parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) in trained)


def opened(root: nn.Module, trainable: Iterable[str]) -> list[nn.Parameter]:
    """List the parameters that ``trainable`` opens.

    Raises:
        ValueError: a pattern names nothing.
    """
    found: list[nn.Parameter] = []
    names: list[str] = []
    missing = dict.fromkeys(trainable)
    wanted = tuple(missing)
    for module, paths in paths_of(root).items():
        norm = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
        for tensor_name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            own = [join(path, tensor_name) for path in paths]
            names += own
            hits = [
                pattern
                for pattern in wanted
                if (pattern == "biases" and is_bias(tensor_name))
                or (pattern == "norms" and norm)
                or any(names_of(pattern, part) for name in own for part in _parts(name))
            ]
            if hits:
                found.append(parameter)
            for pattern in hits:
                missing.pop(pattern, None)
    if missing:
        pattern = next(iter(missing))
        layers = sorted({part for name in names for part in _parts(name)[1:]})
        raise ValueError(
            f'trainable: {pattern!r} names nothing: expected "biases", "norms", or the name of a layer or a tensor; '
            f"the nearest names are: {nearest(pattern, layers)}."
        )
    return found
