"""Deprecations: what is public keeps working, with a warning, for one minor version (``docs/versions.md``)."""

from __future__ import annotations

import warnings

from lightning_deepr._version import __version__


def gone_in(since: str) -> str:
    """Return the version that removes what ``since`` deprecates: the next minor one.

    Example::

        >>> gone_in("0.3.2")
        '0.4.0'
    """
    major, minor, *_ = since.split(".")
    return f"{major}.{int(minor) + 1}.0"


def is_overdue(since: str, now: str = __version__) -> bool:
    """Whether what ``since`` deprecates should be gone.

    Example::

        >>> is_overdue("0.3.2", "0.3.9"), is_overdue("0.3.2", "0.4.0"), is_overdue("0.9.0", "0.10.0")
        (False, True, True)
    """
    return _numbers(now) >= _numbers(gone_in(since))


def _numbers(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def deprecated(what: str, instead: str, since: str, *, stacklevel: int = 2) -> None:
    """Warn the caller's caller that something will go.

    Args:
        what: the old name or argument, as the user writes it.
        instead: what to write.
        since: the version that deprecates it.
        stacklevel: as for ``warnings.warn``, counted from the caller of this function.

    Example::

        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     deprecated("sparsity(net)", "sparsify(net)", "0.1.0")
        >>> str(caught[0].message)
        '`sparsity(net)` is deprecated since lightning-deepr 0.1.0 and goes in 0.2.0: use `sparsify(net)`.'
    """
    warnings.warn(
        f"`{what}` is deprecated since lightning-deepr {since} and goes in {gone_in(since)}: use `{instead}`.",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )
