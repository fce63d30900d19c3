"""A sparse checkpoint and the class that builds the dense network: it works, or an error says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn

from lightning_deepr import DeepR, SoftDeepR, connections, load_state_dict, sparsify
from lightning_deepr.files.checkpoint import report_of_checkpoint
from tests.helpers.classifier import Net, batches
from tests.helpers.trainer import trainer

METHODS = {
    "layer": lambda: DeepR(0.3),
    "global": lambda: DeepR(0.3, scope="global"),
    "soft": lambda: SoftDeepR(0.3, temperature=1e-6),
}


@pytest.fixture(params=[False, True], ids=["whole", "weights_only"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Net, Path]:
    net = Net()
    save = ModelCheckpoint(tmp_path, save_weights_only=request.param, filename="one")
    trainer(DeepR(0.3), save, max_epochs=1, enable_checkpointing=True).fit(net, batches())
    return net, tmp_path / "one.ckpt"


@pytest.mark.feature("Checkpoints: Model.load_from_checkpoint of a sparse checkpoint, also strict=False", refused=True)
@pytest.mark.parametrize("strict", [True, False, None])
def test_load_from_checkpoint(saved: tuple[Net, Path], strict: bool | None) -> None:
    message = r"size mismatch for fc1.weight" if strict is False else r"lightning_deepr\.load_state_dict"
    with pytest.raises(RuntimeError, match=message):
        Net.load_from_checkpoint(saved[1], strict=strict)


@pytest.mark.feature("Checkpoints: test, validate and predict without the callback", refused=True)
@pytest.mark.parametrize("what", ["test", "validate", "predict"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_trainer_without_the_callback(saved: tuple[Net, Path], what: str, strict: bool) -> None:
    net = Testable()
    net.strict_loading = strict
    with pytest.raises(RuntimeError, match=r"lightning_deepr\.load_state_dict" if strict else "size mismatch for fc1.weight"):
        getattr(trainer(), what)(net, batches(), ckpt_path=saved[1])


class Testable(Net):
    __test__ = False

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self(batch[0])

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0])


@pytest.mark.feature("Checkpoints: test, validate and predict with the callback, or after load_state_dict")
@pytest.mark.parametrize("what", ["test", "validate", "predict"])
def test_with_the_callback_and_after_load_state_dict(saved: tuple[Net, Path], what: str) -> None:
    net, file = saved
    by_callback, by_call = Testable(), Testable()
    getattr(trainer(DeepR(0.3)), what)(by_callback, batches(), ckpt_path=file)
    load_state_dict(by_call, file)
    getattr(trainer(), what)(by_call, batches())
    expected = net.state_dict()
    for other in (by_callback, by_call):
        found = other.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_marks_hinder_nobody(method: str, tmp_path: Path) -> None:
    make: Any = METHODS[method]
    net, loop = Net(), trainer(make(), max_epochs=1)
    loop.fit(net, batches())
    loop.save_checkpoint(tmp_path / "after.ckpt")  # after the fit, the marks are off the module again
    assert "on_save_checkpoint" not in vars(net)
    file = tmp_path / "one.ckpt"
    save = ModelCheckpoint(tmp_path, filename="one")
    whole = Net()
    trainer(make(), save, max_epochs=1, enable_checkpointing=True).fit(whole, batches())
    state = torch.load(file, weights_only=True)["state_dict"]
    assert state["fc1.weight"].numel() == 0
    again = make().prepare(Net())
    again.load_state_dict(state)  # strict
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    assert len(report_of_checkpoint(file)) == 2
    dense = Net()
    load_state_dict(dense, file)
    assert connections(dense).keys() == connections(whole).keys()
    net = Net()
    trainer(make(), max_epochs=2).fit(net, batches(), ckpt_path=file)


def test_the_marks_beside_an_average(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="one", every_n_epochs=1)
    whole = Net()
    trainer(DeepR(0.3), WeightAveraging(), save, max_epochs=2, enable_checkpointing=True).fit(whole, batches())
    with pytest.raises(RuntimeError, match=r"size mismatch for fc1\.weight"):
        Net.load_from_checkpoint(tmp_path / "one.ckpt", strict=False)
    trainer(DeepR(0.3), WeightAveraging(), max_epochs=3).fit(Net(), batches(), ckpt_path=tmp_path / "one.ckpt")


def test_an_own_hook_of_the_module_is_called(tmp_path: Path) -> None:
    class Own(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = 1

    save = ModelCheckpoint(tmp_path, filename="one")
    trainer(DeepR(0.3), save, max_epochs=1, enable_checkpointing=True).fit(Own(), batches())
    found = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert found["mine"] == 1 and found["state_dict"]["fc1.weight"].numel() == 0


def test_a_converted_network_without_a_callback_loads_marks(saved: tuple[Net, Path]) -> None:
    net = sparsify(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), 0.3)
    state = torch.load(saved[1], weights_only=True)["state_dict"]
    renamed = {name.replace("fc1.", "0.").replace("fc2.", "2."): value for name, value in state.items()}
    net.load_state_dict({name: value for name, value in renamed.items() if not name.startswith("norm")})
    torch.testing.assert_close(connections(net)["0.weight"][2], connections(saved[0])["fc1.weight"][2])
