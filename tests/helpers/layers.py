"""A table with one entry per kind of layer, and a loss for a layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_deepr import connections


class Scaled(nn.Module):
    """A user's own layer: ``F.linear`` uses its weight, and it can only be converted by name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 14) / 3)
        self.bias = nn.Parameter(torch.randn(9))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """An entry of the table: how to make a layer, its input, and its converted tensors."""

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
    """Return the tensors of a layer's output, which may be nested."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors_in(part)


def flat(output: Any) -> Tensor:
    """Return a layer's output as one vector."""
    return torch.cat([part.reshape(-1) for part in tensors_in(output)])


def loss_of(output: Any) -> Tensor:
    """Return a loss that gives each entry of the output its own, fixed weight."""
    vector = flat(output)
    return (vector * torch.linspace(-1, 2, vector.numel()).to(vector)).sum()


def set_dense(plain: nn.Module, sparse: nn.Module) -> nn.Module:
    """Give a plain module the weights of a converted one, as :func:`connections` reports them."""
    for name, (shape, places, values) in connections(sparse).items():
        weight = torch.zeros(shape.numel(), dtype=values.dtype)
        weight[places] = values
        owner, _, tensor = name.rpartition(".")
        with torch.no_grad():
            getattr(plain.get_submodule(owner), tensor).copy_(weight.view(shape))
    return plain
