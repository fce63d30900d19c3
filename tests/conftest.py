"""Settings of all tests. Their tensors are small, so a second thread costs more time than it saves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # the processes that tests start inherit it

import pytest
import torch

from tests.helpers.processes import Processes

torch.set_num_threads(1)
pytest_plugins = ["tests.features"]

# Tests run these as programs: Triton reads the setting for its interpreter when it is imported, and may not be installed.
collect_ignore = (
    []
    if os.environ.get("TRITON_INTERPRET") == "1"
    else ["kernels/triton_interpreted.py", "kernels/triton_compiled.py", "kernels/triton_neutral.py"]
)


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Processes for the tests of several ranks. They take seconds to start, so all tests share them."""
    started = Processes(tmp_path_factory.mktemp("meetings"))
    yield started
    started.end()


@pytest.fixture(autouse=True)
def unseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget at the end what `seed_everything` of a test has set: it would be the seed of later tests."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.delenv("PL_GLOBAL_SEED")


@pytest.fixture(autouse=True)
def undetermined() -> Iterator[None]:
    """Take back `torch.use_deterministic_algorithms`: a Trainer with `deterministic=True` leaves it on for later tests."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    """Forget what a test has compiled: torch soon runs a function uncompiled that was compiled often, in later tests, too."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()
