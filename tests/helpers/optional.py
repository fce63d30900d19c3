"""Libraries that a light installation lacks: a test that uses one is skipped there, and the other tests of its file run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest


class Optional:
    """A library that is imported when an attribute of it is first read; where it is missing, that skips the test.

    Read no attribute of it while a test's file is imported: that would skip the whole file.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # pytest and doctest ask every object of a test's file for these
            raise AttributeError(attribute)
        return getattr(pytest.importorskip(self._name), attribute)


def needs(*libraries: str) -> pytest.MarkDecorator:
    """Mark a test, or every test of a file with ``pytestmark``, that is skipped where a library is missing."""
    missing = [name for name in libraries if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"could not import {', '.join(missing)}")
