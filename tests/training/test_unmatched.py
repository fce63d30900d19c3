"""An optimizer without any theta: the message says which of the three reasons it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import SET, DeepR, sparsify
from tests.helpers.regression import batches, loss_of, plain_mlp
from tests.helpers.trainer import trainer

FROZEN = r"All 2 converted tensors \(`[net.]*0\.weight`, `[net.]*2\.weight`\) are frozen \(requires_grad=False\).*unfreeze them"
BY_NAME = (
    r"holds 2 parameters of the network, but none of its 2 converted weights.*`[net.]*0\.parametrizations\.weight\.original`"
)
EARLY = "optimizer made before sparsify"


def freeze(net: nn.Module) -> None:
    for name, parameter in net.named_parameters():
        if name.endswith("original"):
            parameter.requires_grad_(False)


CASES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], list[nn.Parameter]], str]] = {
    "frozen": (freeze, lambda net: [p for p in net.parameters() if p.requires_grad], FROZEN),
    "all frozen": (lambda net: net.requires_grad_(False), lambda net: list(nn.Linear(6, 2).parameters()), FROZEN),
    "by name": (
        lambda net: None,
        lambda net: [p for name, p in net.named_parameters() if name.endswith((".weight", ".bias"))],
        BY_NAME,
    ),
    "another network": (lambda net: None, lambda net: list(nn.Linear(6, 2).parameters()), EARLY),
}


@pytest.mark.parametrize("method", [DeepR, SET])
@pytest.mark.parametrize("case", CASES)
def test_in_a_plain_loop(case: str, method: Any) -> None:
    change, choose, message = CASES[case]
    net = sparsify(plain_mlp(), 0.3)
    change(net)
    with pytest.raises(ValueError, match=message):
        method().attach(net, torch.optim.SGD(choose(net), lr=0.1), total_steps=1000)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.feature("Optimizers: an optimizer without the converted weights", refused=True)
def test_under_the_trainer(case: str) -> None:
    change, choose, message = CASES[case]

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain_mlp()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            change(self.net)
            return torch.optim.SGD(choose(self.net), lr=0.1)

    loader = torch.utils.data.DataLoader(batches(2), batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=message):
        trainer(DeepR(0.3), max_epochs=1).fit(Module(), loader)


def test_an_optimizer_of_before_holds_the_biases_too() -> None:
    net = plain_mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsify(net, 0.3)
    with pytest.raises(ValueError, match=EARLY):
        DeepR().attach(net, optimizer)
