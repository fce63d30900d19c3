"""Import the names of a package on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_deepr._deprecated import deprecated


class Old(NamedTuple):
    """A public name that was replaced.

    Attributes:
        home: the module that has what it stands for, or ``module:name``.
        instead: what to write.
        since: the version that deprecates it.
    """

    home: str
    instead: str
    since: str


OLD: dict[str, Old] = {}
"""Every deprecated name of the package, by its full name; a test sees to it that none stays too long."""


def lazy(
    package: str, homes: Mapping[str, str], names: Sequence[str] | None = None, old: Mapping[str, Old] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` for a package.

    Args: package: the package's ``__name__``. homes: a dict from each name to the module that defines it, or to ``module:name``
        if the module uses another name. If the
            module is ``package.name``, the name is that submodule.
        names: the names that ``dir`` shows; None means the names of ``homes``.
        old: names that still work, with a warning, and that ``dir`` does not show.

    Example::

        >>> get, show = lazy("lightning_deepr", {"sqrt": "math", "root": "math:sqrt"})
        >>> get("root")(4.0), show()
        (2.0, ['root', 'sqrt'])
    """
    shown, replaced = sorted(homes if names is None else names), dict(old or {})
    OLD.update({f"{package}.{name}": one for name, one in replaced.items()})

    def get(name: str) -> Any:
        home = homes.get(name)
        if home is None and name in replaced:
            home = replaced[name].home
            deprecated(f"{package}.{name}", replaced[name].instead, replaced[name].since)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(shown)}.")
        module, _, other = home.partition(":")
        found = importlib.import_module(module)
        return found if module == f"{package}.{name}" else getattr(found, other or name)

    return get, lambda: shown
