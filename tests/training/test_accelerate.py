"""accelerate: a callback on what ``prepare`` returned, and ``save_state``, which leaves out empty tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn, optim

from lightning_deepr import DeepR, SoftDeepR, sparsify
from lightning_deepr.weights.base import FORMAT_KEY
from tests.helpers.regression import batches, loss_of, plain_mlp
from tests.helpers.state import assert_equal_states, state_of

accelerate = pytest.importorskip("accelerate")


def train(accelerator: Any, net: nn.Module, optimizer: Any, data: Any) -> None:
    for batch in data:
        optimizer.zero_grad()
        accelerator.backward(loss_of(net, batch))
        optimizer.step()


@pytest.mark.slow  # importing accelerate takes long
@pytest.mark.feature("Others: accelerate, resumed by save_state and load_state")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "torch.save"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_loaded_state_goes_on_exactly(scope: str, safe: bool, tmp_path: Path) -> None:
    def prepared(seed: int) -> tuple[Any, nn.Module, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        net: nn.Module = sparsify(plain_mlp(), 0.3, scope=scope, seed=seed)
        net, optimizer = accelerator.prepare(net, optim.Adam(net.parameters(), lr=0.02))
        rewiring = DeepR(l1=0.3, scope=scope, check_invariants=True, seed=3).attach(net, optimizer)
        accelerator.register_for_checkpointing(rewiring)
        return accelerator, net, optimizer

    data = batches(20)
    accelerator, net, optimizer = prepared(3)
    train(accelerator, net, optimizer, data[:12])
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    train(accelerator, net, optimizer, data[12:])

    other, again, resumed = prepared(9)
    other.load_state(str(tmp_path))
    train(other, again, resumed, data[12:])
    assert_equal_states(state_of(again), state_of(net))


@pytest.mark.parametrize("init", ["module", "largest"])
def test_only_empty_entries_may_be_missing(init: str) -> None:
    """The fingerprint shows whether a list of exceptions that is missing was empty."""
    net = sparsify(plain_mlp(), 0.3, init=init)
    state = net.state_dict()
    for name in [name for name in state if name.endswith("sign_exceptions")]:
        del state[name]
    other = sparsify(plain_mlp(), 0.3, init=init, seed=7)
    if init == "module":
        other.load_state_dict(state)
        assert_equal_states(state_of(other), state_of(net))
    else:
        with pytest.raises(RuntimeError, match="places that don't belong together"):
            other.load_state_dict(state)


def test_places_that_are_missing_are_refused() -> None:
    net = sparsify(plain_mlp(), 0.3)
    state = net.state_dict()
    for name in [name for name in state if name.endswith(("0.places", "0.born"))]:
        del state[name]
    with pytest.raises(RuntimeError, match=r"Missing key.*places"):
        sparsify(plain_mlp(), 0.3).load_state_dict(state)
    soft = SoftDeepR(0.3, temperature=1e-4).prepare(plain_mlp())
    state = {name: value for name, value in soft.state_dict().items() if FORMAT_KEY not in name}
    with pytest.raises(RuntimeError, match="Missing key"):
        SoftDeepR(0.3, temperature=1e-4).prepare(plain_mlp()).load_state_dict(state)
