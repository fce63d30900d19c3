"""How the layers of one kind compute when a weight of theirs is converted: the record that a sparse forward fills in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_deepr.compute import choice

Shape = tuple[int, ...]
Hook = Callable[[Any, str], None]


class Slots(Protocol):
    """What a rule may ask about a converted weight (:class:`lightning_deepr.weights.k_slots.KSlots`)."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def total(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def signs(self) -> Tensor: ...


def never(module: nn.Module, tensor_name: str, shape: Shape) -> bool:
    return False


def matrix(module: nn.Module, tensor_name: str, shape: Shape) -> bool:
    return len(shape) == 2


def own_matrix(module: nn.Module, tensor_name: str, shape: Shape) -> bool:
    """A matrix of a layer that is none of torch's: it is taken to give the matrix to ``F.linear``."""
    # (the class that torch makes for a parametrized module says that it is torch's)
    return len(shape) == 2 and not type_before_parametrizations(module).__module__.startswith("torch.nn")


def matrix_guess(slots: Slots) -> bool:
    """What a matrix would choose for a batch of ordinary size."""
    return choice.prefers_sparse(slots.rows, slots.columns, slots.count, choice.NOMINAL_BATCH, slots.signs.dtype, "cpu")


def matrix_prefers(slots: Slots, module: Any, x: Tensor) -> bool:
    batch = x.numel() // max(slots.columns, 1)
    return choice.prefers_sparse(slots.rows, slots.columns, slots.count, batch, slots.signs.dtype, x.device.type)


def _nothing(module: Any, tensor_name: str) -> None:
    return None


@dataclass(frozen=True)
class LayerCompute:
    """How the layers of one kind compute from a converted weight. The rules are asked only where there are kernels.

    Args:
        capable: whether sparse compute may take this tensor of this module; asked before the conversion.
        guess: whether ``compute="auto"`` begins with sparse compute, before it has seen an input.
        prefers: whether ``compute="auto"`` computes this input sparsely; ``KSlots.uses_sparse`` asks it once per size of input.
        take_over: called with the module and the tensor's name after the conversion; the module's class is its own by then,
            so a hook may set ``type(module).forward``.
        give_back: the same, after the weight has become dense again.
    """

    capable: Callable[[nn.Module, str, Shape], bool] = never
    guess: Callable[[Slots], bool] = matrix_guess
    prefers: Callable[[Slots, Any, Tensor], bool] = matrix_prefers
    take_over: Hook = _nothing
    give_back: Hook = _nothing


def with_forward(
    plain: type[nn.Module],
    forward: Callable[..., Any],
    *,
    capable: Callable[[nn.Module, str, Shape], bool],
    guess: Callable[[Slots], bool] = matrix_guess,
    prefers: Callable[[Slots, Any, Tensor], bool] = matrix_prefers,
) -> LayerCompute:
    """A :class:`LayerCompute` that replaces ``plain.forward`` while ``weight`` is converted.

    A subclass that has a forward of its own keeps it.
    """

    def take_over(module: Any, tensor_name: str) -> None:
        own: Any = type(module)
        if tensor_name == "weight" and own.forward is plain.forward:
            own.forward = forward

    def give_back(module: Any, tensor_name: str) -> None:
        # torch gives the module its old class back; the class stays only while another tensor, say the bias, is parametrized
        own: Any = type(module)
        if tensor_name == "weight" and own.__dict__.get("forward") is forward:
            del own.forward

    return LayerCompute(capable, guess, prefers, take_over, give_back)


def slots_and_theta(module: Any, tensor_name: str = "weight") -> tuple[Any, Tensor] | None:
    """A converted tensor's slots and its whole parameter; None where it can only be read (a second parametrization lies over it)."""
    holder = module._modules["parametrizations"]._modules[tensor_name]
    theta = holder._parameters.get("original")
    if len(holder._modules) != 1 or theta is None:
        return None
    return holder._modules["0"], theta


# The layer reads its weight as it always did. `F.linear` with what it reads computes sparsely; anything else builds the weight.
READ = LayerCompute(own_matrix)
# The layer's weight is built for each forward pass.
DENSE = LayerCompute()
