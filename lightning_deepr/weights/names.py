"""The names of a network's tensors, without the prefixes of wrappers, and on every path that reaches a module.

``torch.compile``, DDP, Fabric, FSDP and activation checkpointing put a module of their own around a network or a part of it.
Its name becomes a part of the names in the ``state_dict``. What leaves this package has the names of the plain network; what
comes in may have the prefixes of wrappers that the network does not have, or lack those that it has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

WRAPPING = frozenset({"_orig_mod", "_forward_module", "_original_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names that only wrappers give to the module inside them."""
_WITH_MODULE = (nn.parallel.DistributedDataParallel, nn.DataParallel)  # wrappers whose name for it, `module`, anybody may use
_PARTS = "parametrizations"


def join(*parts: str) -> str:
    """Join the parts of a name at dots; empty parts are left out."""
    return ".".join(part for part in parts if part)


def walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over every path to every module, with plain names, in the order of ``named_modules``.

    A module that is reached on two paths comes twice.
    """
    yield from _walk(root, "", ())


def _walk(module: nn.Module, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    seen: set[tuple[str, int]] = set()  # Fabric's wrapper holds the network under two names that are both left out
    for name, child in module._modules.items():
        if child is None or id(child) in above:
            continue
        inner = path if is_wrapping(module, name) else join(path, name)
        if (inner, id(child)) not in seen:
            seen.add((inner, id(child)))
            yield from _walk(child, inner, (*above, id(module)))


def is_wrapping(module: nn.Module, name: str) -> bool:
    """Tell whether a module is a wrapper around its child of this name."""
    return name in WRAPPING or (name == "module" and isinstance(module, _WITH_MODULE))


def unwrapped(root: nn.Module) -> nn.Module:
    """Return the network inside all wrappers around it."""
    while True:
        inside = [child for name, child in root._modules.items() if child is not None and is_wrapping(root, name)]
        if not inside:
            return root
        root = inside[-1]  # Fabric's last one is the network itself, the first one what the strategy made of it


def paths_of(root: nn.Module) -> dict[nn.Module, list[str]]:
    """Collect {module: its plain paths}, in the order of ``named_modules``."""
    found: dict[nn.Module, list[str]] = {}
    for path, module in walk(root):
        paths = found.setdefault(module, [])
        if path not in paths:
            paths.append(path)
    return found


class PlainState:
    """A module's ``state_dict`` under plain names.

    Args:
        root: the module.

    Attributes:
        values: {plain name: value}, an ``OrderedDict`` with torch's ``_metadata``.
        names: {plain name: the name in the ``state_dict``}.
        paths: torch's ``_metadata`` by the paths in the ``state_dict``.

    Raises:
        ValueError: two different tensors have one plain name.
    """

    def __init__(self, root: nn.Module) -> None:
        state = root.state_dict()
        self._positions = sorted(
            {f"{join(path, 'module')}." for path, module in walk(root) if isinstance(module, _WITH_MODULE)}, key=len
        )
        self.values: OrderedDict[str, Any] = OrderedDict()
        self.names: dict[str, str] = {}
        for name, value in state.items():
            plain = self.plain(name)
            if plain in self.values and self.values[plain] is not value and not _same(self.values[plain], value):
                raise ValueError(
                    f"`{name}`: expected one tensor named `{plain}` without the prefixes of wrappers, found two. Save the "
                    "network inside the wrapper."
                )
            self.values[plain] = value
            self.names[plain] = name
        self.paths: Mapping[str, Any] = getattr(state, "_metadata", {})
        keep_metadata(self.values, state, lambda path: self.plain(f"{path}.").removesuffix("."))

    def plain(self, name: str) -> str:
        """Take the prefixes of wrappers out of a name of the module's own ``state_dict``."""
        name = without_wrappers(name)
        for position in self._positions:
            if name.startswith(position):
                name = name[: len(position) - len("module.")] + name[len(position) :]
        return name


def keep_metadata(target: Any, source: Any, rename: Callable[[str], str] = str) -> None:
    """Copy what torch keeps about each module beside the entries of a ``state_dict`` (``_metadata``): its version, above all.

    Without it, a module with a ``_load_from_state_dict`` of its own can't tell by which version of itself the state was
    written.
    """
    metadata = getattr(source, "_metadata", None)
    if metadata is not None:
        # torch writes into these dicts while it loads with assign=True, and reads that again in later loads
        target._metadata = OrderedDict(
            (rename(path), {key: value for key, value in about.items() if key != "assign_to_params_buffers"})
            for path, about in metadata.items()
        )


def _same(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def without_wrappers(name: str) -> str:
    """Take the names that only wrappers give out of a name."""
    if not name.startswith("_") and "._" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPING)


def split_head(name: str) -> tuple[str, str, str] | None:
    """Split the name of an entry of a parametrized tensor into the module's path, the tensor's name and the rest, or None.

    Example::

        >>> split_head("encoder.fc.parametrizations.weight.original")
        ('encoder.fc', 'weight', 'original')
    """
    owner, found, rest = f".{name}".rpartition(f".{_PARTS}.")
    tensor, _, rest = rest.partition(".")
    return (owner.removeprefix("."), tensor, rest) if found and rest else None


class Finder:
    """Find the names of a module that names from elsewhere mean, whatever wrappers either side has.

    Args:
        own: the module's names.
    """

    def __init__(self, own: Iterable[str]) -> None:
        self._own = dict.fromkeys(own)
        self._strict: dict[str, list[str]] = {}
        self._loose: dict[str, list[str]] = {}
        for name in self._own:
            self._strict.setdefault(without_wrappers(name), []).append(name)
            self._loose.setdefault(_without_module(name), []).append(name)

    def find(self, name: str) -> str | None:
        """Return the module's name for ``name``, or None if it has no such name.

        Raises:
            ValueError: several names of the module fit equally well.
        """
        if name in self._own:
            return name
        for table, key in ((self._strict, without_wrappers(name)), (self._loose, _without_module(name))):
            fitting = table.get(key, [])
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                listed = ", ".join(f"`{one}`" for one in fitting)
                raise ValueError(
                    f"`{name}`: expected one tensor of the module that it fits, found {listed}: they differ only by "
                    "the prefixes of wrappers. Load the network inside the wrapper."
                )
        return None


def _without_module(name: str) -> str:
    name = without_wrappers(name)
    return ".".join(part for part in name.split(".") if part != "module") if "module" in name else name


def without_root_wrapper(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """Take `module.`, DDP's name for the network inside, off a state's names, unless the module's begin with it, too."""
    own: Mapping[str, Any] | None = None
    while state and all(without_wrappers(name).startswith("module.") for name in state):
        own = PlainState(module).values if own is None else own
        if all(name.startswith("module.") for name in own):
            return state
        inner = OrderedDict((without_wrappers(name).removeprefix("module."), value) for name, value in state.items())
        keep_metadata(inner, state, lambda path: without_wrappers(path).removeprefix("module").removeprefix("."))
        state = inner
    return state


def renamed(state: Mapping[str, Any], module: nn.Module) -> OrderedDict[str, Any]:
    """Give the entries of a ``state_dict`` the names of a module, and those that it misses under the other paths of a module.

    Args:
        state: a ``state_dict``; its ``_metadata`` is kept.
        module: the module that will load it, converted as the state is.

    Raises:
        ValueError: a name fits several tensors, or several entries for one tensor differ.
    """
    own = PlainState(module)
    finder = Finder(own.values)
    result: OrderedDict[str, Any] = OrderedDict()
    for name, value in state.items():
        found = finder.find(name)
        target = own.names[found] if found is not None else name
        if target in result:
            _refuse_two(target, name, result[target], value)
        result[target] = value
    keep_metadata(result, state)
    _fit_metadata(getattr(result, "_metadata", {}), own.paths)
    for names in _same_tensors(module, own.names):
        present = [name for name in names if name in result]
        for name in present[1:]:
            _refuse_two(present[0], name, result[present[0]], result[name])
        if present:
            result.update({name: result[present[0]] for name in names if name not in result})
    return result


def _fit_metadata(metadata: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Give the modules of ``own`` what a state says about them under paths with other wrappers; the innermost path holds."""
    given = dict(metadata)
    missing = [path for path in own if path not in given]
    for shorten in (_without_module, without_wrappers) if missing else ():  # the closer one last
        by_path = {shorten(path): about for path, about in given.items()}
        metadata.update({path: by_path[shorten(path)] for path in missing if shorten(path) in by_path})
    for path, about in given.items():
        inside = without_wrappers(path)
        if inside != path and inside in own:
            metadata[inside] = about


def _refuse_two(name: str, other: str, one: Any, two: Any) -> None:
    if one is not two and not _same(one, two):
        raise ValueError(
            f"`{name}` and `{other}` are one tensor of this module, but the checkpoint has different values for them: expected "
            "a checkpoint of a network that shares them, too."
        )


def _same_tensors(module: nn.Module, names: Mapping[str, str]) -> list[list[str]]:
    """List the names of the entries that are one tensor, because their module is reached on several paths."""
    shared = {path: id(part) for part, paths in paths_of(module).items() if len(paths) > 1 for path in paths}
    groups: dict[tuple[int, str], list[str]] = {}
    for plain, name in names.items() if shared else ():
        path, _, rest = plain.rpartition(".")
        while path and path not in shared:
            path, _, last = path.rpartition(".")
            rest = f"{last}.{rest}"
        if path in shared:
            groups.setdefault((shared[path], rest), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
