"""What a network consists of beside its connections: all other entries of its ``state_dict``, under plain names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_deepr.weights.find import Converted, converted_tensors, stacked_upon
from lightning_deepr.weights.names import PlainState, join, paths_of, split_head


class Outside(NamedTuple):
    """The entries of a ``state_dict`` that do not belong to a converted tensor.

    Attributes:
        values: {plain name: value}, an ``OrderedDict`` with torch's ``_metadata``, without what describes converted tensors.
        converted: {plain name, on every path to the module: the converted tensor}.
        upon: {plain name: {rest of the name: value}}, the entries of parametrizations of others upon a converted tensor. The
            rest begins with the number that such a parametrization has without ours.
        order: the names of ``values`` and ``converted`` in the order of the ``state_dict``.
    """

    values: OrderedDict[str, Any]
    converted: dict[str, Converted]
    upon: dict[str, dict[str, Any]]
    order: list[str]

    def versions(self) -> dict[str, int]:
        """Return the versions of modules, for ``_load_from_state_dict``, except 1, which most modules have."""
        metadata: dict[str, Any] = self.values._metadata  # type: ignore[attr-defined]
        found = {path: about.get("version") for path, about in metadata.items()}
        return {path: version for path, version in found.items() if type(version) is int and version != 1}


def outside(root: nn.Module) -> Outside:
    """Collect the entries of a network's ``state_dict`` that do not belong to a converted tensor.

    Raises:
        ValueError: two different tensors have one name without the prefixes of wrappers.
    """
    paths = paths_of(root)
    converted = {
        join(path, one.tensor_name): one for one in converted_tensors(root, every=True) for path in paths.get(one.module, [])
    }
    state = PlainState(root).values
    values: OrderedDict[str, Any] = OrderedDict()
    upon: dict[str, dict[str, Any]] = {}
    order: dict[str, None] = {}
    for name, value in state.items():
        head = split_head(name)
        if head is None or join(*head[:2]) not in converted:
            values[name] = value
            order[name] = None
            continue
        order[join(*head[:2])] = None
        number, _, rest = head[2].partition(".")
        if number.isdecimal() and int(number) > 0:
            upon.setdefault(join(*head[:2]), {})[join(str(int(number) - 1), rest)] = value
    # "a.parametrizations" and "a.parametrizations.weight" describe the lists, "a.parametrizations.weight.0" our parametrization
    kept = {name for name, one in converted.items() if stacked_upon(one.holder)}
    lists = {  # these go altogether
        join(path, "parametrizations")
        for one in converted.values()
        for path in paths[one.module]
        if all(join(path, name) in converted and join(path, name) not in kept for name in one.module.parametrizations)  # type: ignore[union-attr]
    }
    metadata: OrderedDict[str, Any] = OrderedDict()
    for path, about in getattr(state, "_metadata", {}).items():
        head = split_head(f"{path}.x.")
        if path in lists:
            continue
        if head is not None and join(*head[:2]) in converted:
            number, _, rest = head[2].partition(".")
            if join(*head[:2]) not in kept or number == "0":
                continue
            if number.isdecimal():
                path = join(head[0], "parametrizations", head[1], str(int(number) - 1), rest.removesuffix("x."))
        metadata[path.removesuffix(".")] = about
    values._metadata = metadata  # type: ignore[attr-defined]
    return Outside(values, converted, upon, list(order))


def as_densified(name: str, weight: Tensor, converted: Converted, upon: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a converted tensor in the ``state_dict`` of the densified module.

    Args:
        name: the tensor's name on one path.
        weight: its dense weight.
        converted: the tensor.
        upon: the entries of parametrizations of others upon it, as in :class:`Outside`.
    """
    if not stacked_upon(converted.holder):
        return {name: weight}
    owner, _, tensor = name.rpartition(".")
    return {join(owner, "parametrizations", tensor, rest): value for rest, value in {"original": weight, **upon}.items()}


def refuse_stacked(converted: Converted, what: str) -> None:
    """Refuse a tensor with another parametrization upon ours: what computes is a function of the connections.

    Raises:
        ValueError: the message names the tensor and the parametrization.
    """
    upon = stacked_upon(converted.holder)
    if upon:
        kinds = ", ".join(type(one).__name__ for one in upon)
        raise ValueError(
            f"{what}: `{converted.name}` has another parametrization upon its connections ({kinds}), which computes the weight "
            "from them: expected none. densify(copy.deepcopy(module)) and to_dense_state_dict(module) keep it; or bake it in: "
            'densify, torch.nn.utils.parametrize.remove_parametrizations, and convert again with init="largest".'
        )
