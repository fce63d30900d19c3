"""The fixtures of the tests of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lightning_deepr import kernels
from tests.helpers.kernel_steps import Run


@pytest.fixture
def pytorch(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs another one without the kernels."""

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "available", lambda: False)
            return function()

    return run
