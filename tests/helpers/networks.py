"""Layers and networks that several tests convert: a table of one entry per kind of layer, and a small LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_deepr import connections
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots


class Scaled(nn.Module):
    """A layer of the user's own: its weight is used by ``F.linear`` and can only be converted by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 14) / 3)
        self.bias = nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """One line of the table: how to make a layer, what to feed it, and which of its tensors are converted."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    tensors: tuple[str, ...] = ("weight",)
    named: bool = False  # converted only when named

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make()

    def feed(self, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        torch.manual_seed(1)
        return to_dtype(self.inputs(), dtype)

    @property
    def target(self) -> Any:
        return list(self.tensors) if self.named else "all"


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(to_dtype(part, dtype) for part in value)
    return value.to(dtype) if value.is_floating_point() else value


def images(channels: int, *sizes: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(3, channels, *sizes),)


def sequences(features: int = 11) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(5, 3, features),)


def recurrent(layers: int, directions: int, kinds: tuple[str, ...] = ("ih", "hh")) -> tuple[str, ...]:
    ends = ("", "_reverse")[:directions]
    return tuple(f"weight_{kind}_l{layer}{end}" for layer in range(layers) for end in ends for kind in kinds)


LAYERS = [
    Layer("linear", lambda: nn.Linear(14, 9), lambda: (torch.randn(6, 14),)),
    Layer("linear_without_bias", lambda: nn.Linear(14, 9, bias=False), lambda: (torch.randn(6, 14),)),
    Layer("conv1d", lambda: nn.Conv1d(4, 6, 3), images(4, 9)),
    Layer("conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), images(4, 7, 7)),
    Layer("conv2d_groups", lambda: nn.Conv2d(4, 6, 3, groups=2), images(4, 6, 6)),
    Layer("conv3d", lambda: nn.Conv3d(2, 4, 2), images(2, 4, 4, 4)),
    Layer("conv_transpose1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), images(4, 5)),
    Layer("conv_transpose2d", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), images(4, 5, 5)),
    Layer("conv_transpose3d", lambda: nn.ConvTranspose3d(2, 4, 2), images(2, 3, 3, 3)),
    Layer("bilinear", lambda: nn.Bilinear(5, 6, 7), lambda: (torch.randn(4, 5), torch.randn(4, 6))),
    Layer(
        "lstm",
        lambda: nn.LSTM(11, 8, num_layers=2, bidirectional=True, proj_size=5),
        sequences(),
        recurrent(2, 2, ("ih", "hh", "hr")),
    ),
    Layer("gru", lambda: nn.GRU(11, 7, bidirectional=True), sequences(), recurrent(1, 2)),
    Layer("rnn", lambda: nn.RNN(11, 9, num_layers=2), sequences(), recurrent(2, 1)),
    Layer(
        "lstm_cell",
        lambda: nn.LSTMCell(11, 8),
        lambda: (torch.randn(4, 11), (torch.randn(4, 8), torch.randn(4, 8))),
        ("weight_ih", "weight_hh"),
    ),
    Layer(
        "attention",
        lambda: nn.MultiheadAttention(12, 3),
        lambda: (torch.randn(5, 2, 12), torch.randn(6, 2, 12), torch.randn(6, 2, 12)),
        ("in_proj_weight", "out_proj.weight"),
    ),
    Layer(
        "attention_kdim_vdim",
        lambda: nn.MultiheadAttention(12, 3, kdim=10, vdim=7),
        lambda: (torch.randn(5, 2, 12), torch.randn(6, 2, 10), torch.randn(6, 2, 7)),
        ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
    ),
    Layer(
        "transformer_encoder",
        lambda: nn.TransformerEncoderLayer(12, 3, dim_feedforward=20, dropout=0.0),
        lambda: (torch.randn(5, 2, 12),),
        ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"),
    ),
    Layer("embedding", lambda: nn.Embedding(20, 7), lambda: (torch.arange(20).view(4, 5),), named=True),
    Layer("embedding_bag", lambda: nn.EmbeddingBag(20, 7), lambda: (torch.arange(20).view(4, 5),), named=True),
    Layer("own_layer", Scaled, lambda: (torch.randn(6, 14),), named=True),
]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a layer's output, whatever it is made of."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors_in(part)


def flat(output: Any) -> Tensor:
    """A layer's output as one vector."""
    return torch.cat([part.reshape(-1) for part in tensors_in(output)])


def loss_of(output: Any) -> Tensor:
    """A loss in which each entry of the output has its own, fixed weight."""
    vector = flat(output)
    return (vector * torch.linspace(-1, 2, vector.numel()).to(vector)).sum()


def set_dense(plain: nn.Module, sparse: nn.Module) -> nn.Module:
    """Give a plain module the weights of a converted one; only :func:`connections` says what they are."""
    for name, (shape, places, values) in connections(sparse).items():
        weight = torch.zeros(shape.numel(), dtype=values.dtype)
        weight[places] = values
        owner, _, tensor = name.rpartition(".")
        with torch.no_grad():
            getattr(plain.get_submodule(owner), tensor).copy_(weight.view(shape))
    return plain


def theta_of(module: nn.Module, name: str) -> nn.Parameter:
    """theta of a tensor, found by the name that the public contract gives it."""
    owner, _, tensor = name.rpartition(".")
    prefix = f"{owner}." if owner else ""
    return module.get_parameter(f"{prefix}parametrizations.{tensor}.original")


def slots_by_name(module: nn.Module) -> dict[str, KSlots]:
    return {converted.name: converted.slots for converted in converted_tensors(module)}


def assert_connected(module: nn.Module, counts: dict[str, int] | None = None) -> None:
    """What must hold of every converted tensor at every moment between two steps."""
    found = slots_by_name(module)
    assert found, "nothing is converted"
    for name, slots in found.items():
        theta = theta_of(module, name).detach()
        places = slots.places
        assert places.dtype == torch.int64 and places.shape == theta.shape, name
        assert places.unique().numel() == places.numel(), f"{name}: two slots are at one place"
        assert int(places.min()) >= 0 and int(places.max()) < slots.shape.numel(), f"{name}: a place lies outside"
        assert bool((theta >= 0).all()), f"{name}: theta < 0"
        assert torch.equal(slots.signs, slots.signs_at(places)), f"{name}: a sign is not its place's"
        if counts is not None:
            assert places.numel() == counts[name], f"{name}: K was not held"


class Net(LightningModule):
    """A two-layer classifier that keeps what it has seen: enough for any test of a fit."""

    def __init__(self, lr: float = 0.3, hidden: int = 16, norm: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(12, hidden)
        self.norm: nn.Module = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, 4)
        self.lr = lr
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).relu())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def batches(count: int = 12, size: int = 8) -> DataLoader:
    """The same few batches in the same order for every run."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count * size, 12, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, :4] + x[:, 4:8]).argmax(1)), batch_size=size)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    """A Trainer that writes nothing and says nothing."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit_plain(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, each_step: Callable[[], None] | None = None
) -> None:
    """A plain PyTorch loop over the same batches."""
    data = list(batches())
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if each_step is not None:
            each_step()
