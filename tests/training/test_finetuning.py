"""Layers that are frozen for a while."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_deepr import DeepR, LinearDecay, connections, connectivity_report
from tests.helpers.classifier import batches
from tests.helpers.trainer import trainer


class Net(LightningModule):
    """A backbone and a head; ``frozen`` is frozen for good."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16))
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.frozen(self.backbone(batch[0]))), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Noting(DeepR):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.alphas: dict[str, list[float]] = {}

    def after_step(self, stepped: Sequence[Any], optimizer: torch.optim.Optimizer) -> None:
        for item in stepped:
            self.alphas.setdefault(item.tensor.name, []).append(item.alpha)
        super().after_step(stepped, optimizer)


class Own(BaseFinetuning):
    """Freezes the first layer of the backbone for one epoch, then freezes the head."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[0], optimizer)
        if epoch == 2:
            self.freeze(pl_module.head)


@pytest.mark.feature("Callbacks: BackboneFinetuning and BaseFinetuning, listed before or after")
@pytest.mark.parametrize("first", ["finetuning", "ours"])
@pytest.mark.parametrize("make", [lambda: BackboneFinetuning(1, lambda epoch: 1.5), Own], ids=["backbone", "own"])
def test_layers_that_are_unfrozen_later(make: Any, first: str) -> None:
    net, callback = Net(), Noting(0.3, l1=LinearDecay(0.1), rewire_until=0.75, check_invariants=True)
    listed = [callback, make()] if first == "ours" else [make(), callback]
    loop = trainer(*listed, max_epochs=3)
    loop.fit(net, batches())
    names = {"backbone.0.weight", "backbone.2.weight", "head.weight"}
    assert set(connections(net)) == names
    assert connectivity_report(net).left_out == {"frozen.weight": "requires_grad=False"}
    late = "backbone.0.weight"
    assert len(callback.alphas[late]) == 24  # from the second epoch on
    whole = [0.1 * (1 - step / 36) for step in range(36)]
    assert callback.alphas[late] == pytest.approx(whole[12:])  # as in all other layers at that time
    trained = 24 if isinstance(listed[0], Own) or isinstance(listed[1], Own) else 36
    assert callback.alphas["head.weight"] == pytest.approx(whole[:trained])


@pytest.mark.feature("Callbacks: BackboneFinetuning where all converted layers are frozen at first")
@pytest.mark.parametrize("first", ["finetuning", "ours"])
def test_all_converted_layers_are_frozen_at_first(first: str) -> None:
    net, callback = Net(), Noting(0.3, exclude_modules=["head"], l1=LinearDecay(0.1))
    listed = [callback, BackboneFinetuning(1)] if first == "ours" else [BackboneFinetuning(1), callback]
    trainer(*listed, max_epochs=3).fit(net, batches())
    assert callback.alphas["backbone.0.weight"] == pytest.approx([0.1 * (1 - step / 36) for step in range(12, 36)])


@pytest.mark.feature('Callbacks: BackboneFinetuning with scope="global"', refused=True)
@pytest.mark.parametrize("first", ["finetuning", "ours"])
def test_one_frozen_layer_of_a_shared_theta_is_refused(first: str) -> None:
    callback = DeepR(0.3, scope="global")
    listed = [callback, BackboneFinetuning(1)] if first == "ours" else [BackboneFinetuning(1), callback]
    with pytest.raises(
        ValueError, match=r'scope="global".*`head.weight` have one parameter.*BackboneFinetuning.*scope="layer"'
    ):
        trainer(*listed, max_epochs=2).fit(Net(), batches())


class ByHand(Callback):
    """Freezes and unfreezes in the middle of the training, without a param group."""

    def __init__(self, module: str) -> None:
        self.module = module

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.get_submodule(self.module).requires_grad_(trainer.current_epoch != 1)


@pytest.mark.feature("Callbacks: layers frozen and unfrozen by hand in the middle of a training")
def test_layers_that_are_frozen_by_hand() -> None:
    net, callback = Net(), Noting(0.3, l1=LinearDecay(0.1))
    trainer(callback, ByHand("backbone"), max_epochs=3).fit(net, batches())
    whole = [0.1 * (1 - step / 36) for step in range(36)]
    assert callback.alphas["backbone.0.weight"] == pytest.approx(whole[:12] + whole[24:])
    assert callback.alphas["head.weight"] == pytest.approx(whole)


def test_a_shared_theta_that_is_frozen_by_hand_is_told() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(DeepR(0.3, scope="global"), ByHand("head"), max_epochs=3).fit(Net(), batches())
    told = [str(one.message) for one in caught if "none of them is trained until it is unfrozen" in str(one.message)]
    assert len(told) == 1 and "`head.weight`" in told[0]
