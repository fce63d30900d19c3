"""Checkpoints of an earlier version load, give the same outputs, and continue to the same end of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_deepr import load_state_dict, sparsify
from lightning_deepr.files.checkpoint import report_of_checkpoint
from tests.data import make

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
HERE = Path(make.__file__).parent


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    return torch.load(HERE / "expected.pt", weights_only=True)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare up to the last bits, which depend on the order of sums on a CPU."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def assert_end(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert torch.equal(found["places"], expected["places"])
    assert_close(found["parameters"], expected["parameters"])
    assert_close(found["output"], expected["output"])


@pytest.mark.parametrize("name", make.CALLBACKS)
def test_a_lightning_checkpoint_gives_the_same_outputs(name: str, expected: dict[str, dict[str, Tensor]]) -> None:
    module = load_state_dict(make.Regression(), HERE / f"{name}.ckpt")
    assert_close(make.output_of(module.net), expected[name]["saved"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", make.CALLBACKS)
def test_a_lightning_checkpoint_resumes_exactly(name: str, expected: dict[str, dict[str, Tensor]]) -> None:
    assert_end(make.state_of(make.fit(make.CALLBACKS[name](), ckpt_path=HERE / f"{name}.ckpt")), expected[name])


@pytest.mark.parametrize("name", make.PLAIN)
def test_a_file_loads_and_trains_on(name: str, expected: dict[str, dict[str, Tensor]]) -> None:
    plain = make.PLAIN[name]
    loaded, end = plain.load_and_train(HERE / f"{name}.{plain.suffix}")
    assert_close(loaded, expected[name]["saved"])
    assert_end(end, expected[name])


def test_a_state_dict_loads_into_what_is_converted(expected: dict[str, dict[str, Tensor]]) -> None:
    for name in ("state_dict", "global_scope"):
        plain = make.PLAIN[name]
        net = sparsify(plain.make(), 0.3, scope=plain.scope)
        net.load_state_dict(torch.load(HERE / f"{name}.pt", weights_only=True))
        assert_close(make.output_of(net), expected[name]["saved"])


@pytest.mark.parametrize(("name", "active"), [("deepr.ckpt", 117), ("soft.ckpt", None), ("state_dict.pt", 141)])
def test_a_report_of_an_old_file(name: str, active: int | None) -> None:
    report: Any = report_of_checkpoint(HERE / name)
    assert report.total == (390 if name.endswith("ckpt") else 471)
    assert active is None or report.active == active
