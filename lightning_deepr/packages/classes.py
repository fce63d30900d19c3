"""Base classes that are the Lightning classes of whichever package is imported, of both if both are.

``Trainer`` asks ``isinstance(x, Callback)``, and LightningCLI ``issubclass(X, Callback)``, with the ``Callback`` of its own
package. So a class of ours has to derive from both, but must import neither. The classes here get their bases when a package
arrives: ``__bases__`` of a Python class can be assigned, and classes that derive from it follow.

In a process that imports one package, the classes are ordinary subclasses of that package's. In one that imports both, each
method of a module comes from the package of the Trainer that holds it: a Trainer takes every other code than its own
package's for an overridden method.
"""

from __future__ import annotations

import sys
import warnings
from abc import ABC
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_deepr.packages.names import PACKAGES, Package, in_use, package_of

Holder = Callable[[Any, tuple[Any, ...]], "Package | None"]


class _Method:
    """A method that comes from the package that an object belongs to at the moment."""

    def __init__(self, functions: dict[Package, Any], first: Package, holder: Holder, by_argument: bool) -> None:
        self.functions, self.first, self.holder, self.by_argument = functions, first, holder, by_argument

    def _of(self, package: Package | None) -> Any:
        return self.functions.get(package or self.first) or next(iter(self.functions.values()))

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self._of(None).__get__(None, owner)
        if self.by_argument:  # the first argument of a callback's hooks is the Trainer

            def call(*arguments: Any, **options: Any) -> Any:
                package = self.holder(instance, arguments)
                return self._of(package).__get__(instance, owner)(*arguments, **options)

            return call
        return self._of(self.holder(instance, ())).__get__(instance, owner)


class _Property(_Method):
    """The same for a property."""

    def __set__(self, instance: Any, value: Any) -> None:
        self._of(package_of(value) or self.holder(instance, ())).__set__(instance, value)

    def __delete__(self, instance: Any) -> None:
        self._of(self.holder(instance, ())).__delete__(instance)


class _Either:
    """The record of one class: where the packages have it, and those that it derives from by now."""

    def __init__(self, cls: type, module: str, name: str, holder: Holder | None = None, by_argument: bool = False) -> None:
        self.cls, self.module, self.name, self.holder, self.by_argument = cls, module, name, holder, by_argument
        self.joined: dict[Package, type] = {}

    def join(self) -> None:
        """Derive from the class of each package that is imported."""
        found = {p: kind for p in PACKAGES if p not in self.joined and (kind := p.loaded(self.module, self.name)) is not None}
        if not found:
            return
        joined, self.joined = self.joined, {**self.joined, **found}
        try:
            self.cls.__bases__ = tuple(self.joined.values())
        except TypeError as error:  # a class of the user's derives from ours and from theirs, in an order that has no solution
            if joined:
                warnings.warn(f"{self.cls.__name__} stays that of {next(iter(joined)).name} alone: {error}", stacklevel=2)
            return
        if len(self.joined) > 1 and self.holder is not None:
            self._share()

    def _share(self) -> None:
        """Let the methods come from the package of the object's Trainer."""
        assert self.holder is not None
        first = next(iter(self.joined))
        for name in sorted({name for kind in self.joined.values() for name in dir(kind)}):
            if name.startswith("__") or name in vars(self.cls):
                continue
            raw = {package: value for package, kind in self.joined.items() if (value := _raw(kind, name)) is not None}
            kinds = {type(value) for value in raw.values()}
            if kinds == {FunctionType}:
                setattr(self.cls, name, _Method(raw, first, self.holder, self.by_argument))
            elif kinds == {property}:
                setattr(self.cls, name, _Property(raw, first, self.holder, by_argument=False))


def _raw(kind: type, name: str) -> Any:
    """Return an attribute as its class has it, if it is a class of one of the packages."""
    for one in kind.__mro__:
        if name in vars(one):
            return vars(one)[name] if one.__module__.split(".")[0] in _ROOTS else None
    return None


_ROOTS = {p.trainer.split(".")[0] for p in PACKAGES} | {p.fabric.split(".")[0] for p in PACKAGES}
_EITHER: list[_Either] = []


def join_all() -> bool:
    """Derive from what is imported by now. Returns whether all classes derive from both packages'."""
    for either in _EITHER:
        either.join()
    return all(len(either.joined) == len(PACKAGES) for either in _EITHER)


class _Arrivals:
    """A finder of modules that finds nothing: it is asked while a package is imported, and sees the classes arrive."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in _ROOTS and join_all() and self in sys.meta_path:
            sys.meta_path.remove(self)


def _register(either: _Either) -> None:
    _EITHER.append(either)
    either.join()


def _need(cls: type) -> None:
    """See to it that a class has a package's behind it, before an object of it is made."""
    join_all()
    either = next(one for kind in cls.__mro__ for one in _EITHER if one.cls is kind)  # the nearest
    if either.joined:
        return
    package = in_use()
    try:
        package.get(either.module, either.name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{cls.__name__} needs {package.trainer}.{either.module}.{either.name}: {error}") from error
    join_all()


if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.callbacks import Callback, WeightAveraging
    from lightning.pytorch.loggers import WandbLogger
else:

    class _Nothing:
        """A base to begin with: Python does not let a class change from ``object`` to another base."""

    class Callback(_Nothing):
        """The ``Callback`` of either package. Without Lightning, in a plain loop, it is a class without hooks."""

        def __new__(cls, *arguments, **options):
            join_all()
            return super().__new__(cls)

    class LightningModule(nn.Module):
        """The ``LightningModule`` of either package."""

        def __new__(cls, *arguments, **options):
            _need(cls)
            return super().__new__(cls)

    class LightningDataModule(_Nothing):
        """The ``LightningDataModule`` of either package."""

        def __new__(cls, *arguments, **options):
            _need(cls)
            return super().__new__(cls)

    class WeightAveraging(Callback):
        """The ``WeightAveraging`` of either package; Lightning 2.6 and later have it."""

        def __new__(cls, *arguments, **options):
            _need(cls)
            return super().__new__(cls)

    class _NothingAbstract(ABC):  # noqa: B024
        """The same for a class that derives from ``ABC``: the new bases must have the memory layout of the old ones."""

    class WandbLogger(_NothingAbstract):
        """The ``WandbLogger`` of either package."""

        def __new__(cls, *arguments, **options):
            _need(cls)
            return super().__new__(cls)

    def _of_module(module, arguments):
        holder = module.__dict__.get("_trainer")
        return package_of(module.__dict__.get("_fabric") if holder is None else holder)

    def _of_data(data, arguments):
        return package_of(data.__dict__.get("trainer"))

    def _of_hook(callback, arguments):
        return package_of(arguments[0]) if arguments else None

    _register(_Either(Callback, "callbacks.callback", "Callback"))
    _register(_Either(LightningModule, "core.module", "LightningModule", _of_module))
    _register(_Either(LightningDataModule, "core.datamodule", "LightningDataModule", _of_data))
    _register(_Either(WeightAveraging, "callbacks.weight_averaging", "WeightAveraging", _of_hook, by_argument=True))
    _register(_Either(WandbLogger, "loggers.wandb", "WandbLogger"))
    if not join_all():
        sys.meta_path.insert(0, _Arrivals())
