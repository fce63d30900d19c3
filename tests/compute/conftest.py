"""Fixtures that the tests of both kinds of compute share."""

from __future__ import annotations

import pytest

from lightning_deepr import kernels as kernels_module
from lightning_deepr.weights import k_slots


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run plain PyTorch, as if numba can't be imported (the environment variable has a test of its own)."""
    monkeypatch.setattr(kernels_module, "available", lambda: False)
    monkeypatch.setattr(k_slots, "_told", {"cpu, torch.float32", "cpu, torch.float64"})
