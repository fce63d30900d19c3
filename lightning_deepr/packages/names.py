"""The two packages: where their classes are, and whose an object is. Nothing here imports one of them unasked."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

VARIABLE = "LIGHTNING_DEEPR_PACKAGE"  # the package of the command line, where both are installed


class Package(NamedTuple):
    """One of the packages.

    Attributes:
        name: what is imported and installed.
        trainer: the package that has the Trainer, the modules and the callbacks.
        fabric: the package that has Fabric.
    """

    name: str
    trainer: str
    fabric: str

    def loaded(self, module: str, name: str) -> Any:
        """Return an object of a module (``"core.module"``) if that module is imported, else None."""
        found = sys.modules.get(f"{self.trainer}.{module}")
        return None if found is None else vars(found).get(name)

    def get(self, module: str, name: str) -> Any:
        """Import a module (``"core.module"``) and return one of its objects."""
        return getattr(importlib.import_module(f"{self.trainer}.{module}" if module else self.trainer), name)

    @property
    def is_imported(self) -> bool:
        return sys.modules.get(self.trainer) is not None

    @property
    def is_installed(self) -> bool:
        if self.name in sys.modules:  # None stands for a package that may not be imported
            return sys.modules[self.name] is not None
        return find_spec(self.name) is not None


PACKAGES = (
    Package("lightning", "lightning.pytorch", "lightning.fabric"),
    Package("pytorch_lightning", "pytorch_lightning", "lightning_fabric"),
)
_BY_ROOT = {"lightning": PACKAGES[0], "pytorch_lightning": PACKAGES[1], "lightning_fabric": PACKAGES[1]}


def package_of(thing: object) -> Package | None:
    """Tell whose an object is: a Trainer, a module, a strategy or an object of a class that derives from theirs.

    Returns:
        the package; None: of neither.
    """
    try:
        kinds = thing.__class__.__mro__  # of what a weak proxy stands for, too
    except ReferenceError:  # it is gone
        return None
    for kind in kinds:
        package = _BY_ROOT.get(kind.__module__.partition(".")[0])
        if package is not None:
            return package
    return None


def in_use() -> Package:
    """Choose the package where no object says which: the imported one, else the installed one.

    Where this does not decide, the environment variable ``LIGHTNING_DEEPR_PACKAGE`` does, and else it is ``lightning``.

    Raises:
        ModuleNotFoundError: neither is installed.
        ValueError: the variable names neither.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted:
        for package in PACKAGES:
            if package.name == wanted:
                return package
        raise ValueError(f"{VARIABLE}: expected {' or '.join(p.name for p in PACKAGES)}, found {wanted!r}.")
    imported = [package for package in PACKAGES if package.is_imported]
    for package in imported or [package for package in PACKAGES if package.is_installed]:
        return package
    raise ModuleNotFoundError("Expected Lightning, found neither package: `pip install lightning` (or pytorch_lightning).")


def is_a(thing: object, module: str, name: str, fabric: bool = False) -> bool:
    """Whether an object is an instance of a class that both packages have, without importing either.

    Args:
        thing: the object.
        module: the module of the class, below the Trainer's package (``"core.optimizer"``).
        name: the class.
        fabric: the module is below Fabric's package instead.
    """
    for package in PACKAGES:
        found = sys.modules.get(f"{package.fabric if fabric else package.trainer}.{module}")
        if found is not None and isinstance(thing, getattr(found, name)):
            return True
    return False


def overrides(module: object, method: str, trainer: object) -> bool:
    """Whether a LightningModule overrides a method, as the package of its Trainer sees it."""
    package = package_of(trainer) or package_of(module)
    return package is not None and bool(package.get("utilities.model_helpers", "is_overridden")(method, module))
