"""What is deprecated works on for one minor version, says so, and is then gone."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import pytest

from lightning_deepr import __version__, _lazy
from lightning_deepr._deprecated import deprecated, gone_in, is_overdue


def test_an_old_name_works_and_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lazy, "OLD", {})
    package = ModuleType("package")
    old = {"Sparse": _lazy.Old("math:sqrt", "package.sqrt", "0.1.0")}
    package.__getattr__, package.__dir__ = _lazy.lazy("package", {"sqrt": "math"}, old=old)  # type: ignore[method-assign]
    with pytest.warns(DeprecationWarning, match="deprecated") as caught:
        assert package.Sparse(4.0) == 2.0
    assert str(caught[0].message) == (
        "`package.Sparse` is deprecated since lightning-deepr 0.1.0 and goes in 0.2.0: use `package.sqrt`."
    )
    assert caught[0].filename == __file__  # the line that asks, not one of the package
    assert dir(package) == ["sqrt"] and "package.Sparse" in _lazy.OLD
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert package.sqrt(4.0) == 2.0
    with pytest.raises(AttributeError, match=r"'package' has no attribute 'Dense'; it has sqrt"):
        package.Dense  # noqa: B018


def test_an_old_argument() -> None:
    def fit(epochs: int = 1, **old: int) -> int:
        if "rounds" in old:
            deprecated("fit(rounds=...)", "fit(epochs=...)", "0.3.0")
            epochs = old["rounds"]
        return epochs

    with pytest.warns(DeprecationWarning, match=r"`fit\(rounds=\.\.\.\)` .* 0\.3\.0 and goes in 0\.4\.0") as caught:
        assert fit(rounds=3) == 3
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("since", "now", "gone", "overdue"),
    [
        ("0.1.0", "0.1.9", "0.2.0", False), ("0.1.3", "0.2.0", "0.2.0", True), ("0.9.0", "0.10.0", "0.10.0", True),
        ("0.10.0", "0.9.0", "0.11.0", False), ("1.4.0", "2.0.0", "1.5.0", True), ("1.4.0", "1.4.7", "1.5.0", False),
    ],
)  # fmt: skip
def test_one_minor_version(since: str, now: str, gone: str, overdue: bool) -> None:
    assert gone_in(since) == gone and is_overdue(since, now) is overdue


def test_nothing_of_the_package_is_overdue() -> None:
    for package in ("lightning_deepr", "lightning_deepr.zoo", "lightning_deepr.hub", "lightning_deepr.pictures"):
        importlib.import_module(package)
    assert not {name for name, old in _lazy.OLD.items() if is_overdue(old.since)}, f"to be removed in {__version__}"
