"""Converted weights decay as they did when they were dense, or a warning says that they do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_deepr import SET, DeepR, SoftDeepR, decay_groups, sparsify
from tests.helpers.regression import batches, loss_of, plain_mlp
from tests.helpers.trainer import trainer

Groups = list[dict[str, Any]]


def by_dimensions(net: nn.Module) -> Groups:
    """The rule of nanoGPT."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    decays, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    return [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def of_timm(net: nn.Module) -> Groups:
    return pytest.importorskip("timm.optim").param_groups_weight_decay(net, weight_decay=0.1)


RULES: dict[str, Callable[[nn.Module], Groups]] = {"by_dimensions": by_dimensions, "timm": of_timm}
WARNING = r"weight decay 0 on 2 converted tensors \(`0\.weight`, `2\.weight`\).*`AdamW\(lightning_deepr\.decay_groups\(model, "


def net_with_a_dense_layer(convert: bool = True) -> nn.Module:
    net = nn.Sequential(*plain_mlp(), nn.Linear(6, 6))
    return sparsify(net, 0.3, target_modules=["0", "2"]) if convert else net


class Module(lightning.LightningModule):
    def __init__(self, groups: Callable[[nn.Module], Groups]) -> None:
        super().__init__()
        self.net, self.groups = net_with_a_dense_layer(convert=False), groups

    def training_step(self, batch: Any, _: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.groups(self.net))


def plain(groups: Callable[[nn.Module], Groups]) -> None:
    net = net_with_a_dense_layer()
    DeepR().attach(net, torch.optim.AdamW(groups(net)))


def under_the_trainer(groups: Callable[[nn.Module], Groups]) -> None:
    module = Module(groups)
    batch = torch.utils.data.DataLoader(batches(2), batch_size=None)  # type: ignore[arg-type]
    trainer(DeepR({"net.0": 0.3, "net.2": 0.3}), max_epochs=1).fit(module, batch)


def under_fabric(groups: Callable[[nn.Module], Groups]) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[DeepR()])
    net = net_with_a_dense_layer()
    net, optimizer = fabric.setup(net, torch.optim.AdamW(groups(net)))
    fabric.backward(loss_of(net, batches(1)[0]))
    optimizer.step()


LOOPS = {"plain": plain, "trainer": under_the_trainer, "fabric": under_fabric}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_lost_decay_is_told(loop: str, rule: str) -> None:
    message = WARNING if loop != "trainer" else WARNING.replace("`0", "`net.0").replace("`2", "`net.2")
    with pytest.warns(UserWarning, match=message) as told:
        LOOPS[loop](RULES[rule])
    assert sum("weight decay 0" in str(one.message) for one in told) == 1


@pytest.mark.parametrize(
    "groups",
    [
        lambda net: decay_groups(net, 0.1),
        lambda net: [{"params": list(net.parameters()), "weight_decay": 0.1}],
        lambda net: [{"params": list(net.parameters()), "weight_decay": 0.0}],
        lambda net: [{"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.1}],
    ],
    ids=["decay_groups", "all", "none", "without the dense layers"],
)
@pytest.mark.parametrize("loop", LOOPS)
def test_no_warning_without_a_loss(loop: str, groups: Callable[[nn.Module], Groups]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        LOOPS[loop](groups)
    assert not [str(one.message) for one in told if "weight decay" in str(one.message)]


class Every(nn.Module):
    """What a network may have: matrices, biases, norms of one and more dimensions, tied, frozen and free parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.lstm = nn.Linear(8, 6), nn.Conv2d(3, 4, 3), nn.LSTM(5, 4)
        self.bilinear, self.embedding, self.attention = nn.Bilinear(3, 4, 5), nn.Embedding(9, 7), nn.MultiheadAttention(8, 2)
        self.norm, self.wide, self.batch = nn.LayerNorm(8), nn.LayerNorm((4, 5)), nn.BatchNorm2d(3)
        self.token, self.scale, self.bias_table = (nn.Parameter(torch.ones(*shape)) for shape in ((1, 8), (8,), (3, 4)))
        self.head = nn.Linear(7, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(5, 5).requires_grad_(False)


def names_of(net: nn.Module, groups: Groups) -> list[set[str]]:
    names = {id(p): name.replace("parametrizations.", "").removesuffix(".original") for name, p in net.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


@pytest.mark.parametrize("convert", ["dense", "layer", "global", "soft"])
def test_the_groups_are_those_of_the_dense_network(convert: str) -> None:
    net: nn.Module = Every()
    expected = names_of(net, decay_groups(net, 0.1))
    assert expected[0] == {
        *("fc.weight", "conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "bilinear.weight", "embedding.weight"),
        *("attention.in_proj_weight", "attention.out_proj.weight", "token"),
    }
    assert {"norm.weight", "wide.weight", "wide.bias", "scale", "bias_table", "batch.weight", "fc.bias"} <= expected[1]
    targets = ["fc", "conv", "lstm", "attention"]
    if convert == "soft":
        SoftDeepR(0.3, temperature=1e-3, l1=0.1, theta_min=-1e-3, target_modules=targets).prepare(net)
    elif convert != "dense":
        sparsify(net, 0.3, target_modules=targets, scope=convert)
    groups = decay_groups(net, 0.1, lr=0.5)
    assert [(g["weight_decay"], g["lr"]) for g in groups] == [(0.1, 0.5), (0.0, 0.5)]
    found = names_of(net, groups)
    if convert == "global":  # one theta, by the name of the first layer that has it
        assert expected[0] - found[0] == {"conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight"}
    else:
        assert found[0] == expected[0]
    assert found[1] == expected[1]
    torch.optim.AdamW(groups)


def test_theta_decays() -> None:
    """Under SGD with decay d and no gradient, each step multiplies theta by 1 - lr * d."""
    net = sparsify(nn.Linear(20, 10), 0.3)
    optimizer = torch.optim.SGD(decay_groups(net, 0.5), lr=0.1)
    theta = net.parametrizations.weight.original  # type: ignore[union-attr, index]
    before, bias = theta.detach().clone(), net.bias.detach().clone()  # type: ignore[union-attr, operator]
    SET(rewire_every_n_steps=100, lr_scale=1.0).attach(net, optimizer, total_steps=1000)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(theta.detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(net.bias, bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight_decay": -0.1}, ValueError, "weight_decay: expected a number of at least 0, found -0.1"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay: expected a number"),
        ({"weight_decay": "0.1"}, TypeError, "weight_decay: expected a number"),
        ({"weight_decay": 0.1, "params": []}, ValueError, "found 'params', which is filled in here"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decay_groups(nn.Linear(3, 2), **arguments)


def test_a_model_without_anything_to_train() -> None:
    with pytest.raises(ValueError, match="ReLU has no parameter that requires a gradient"):
        decay_groups(nn.ReLU(), 0.1)
