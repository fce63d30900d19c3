"""The record that says how the layers of one kind compute from a converted weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_deepr.compute import choice
from lightning_deepr.compute.stacked import is_stacked

Shape = tuple[int, ...]
Hook = Callable[[Any, str], None]


class Slots(Protocol):
    """The part of :class:`lightning_deepr.weights.k_slots.KSlots` that the rules of a :class:`LayerCompute` may read."""

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
    @property
    def narrow(self) -> torch.dtype | None: ...


def never(module: nn.Module, tensor_name: str, shape: Shape) -> bool:
    """Refuse every tensor."""
    return False


def matrix(module: nn.Module, tensor_name: str, shape: Shape) -> bool:
    """Accept every matrix."""
    return len(shape) == 2


def own_matrix(module: nn.Module, tensor_name: str, shape: Shape) -> bool:
    """Accept a matrix of a layer from outside torch, on the assumption that the layer passes it to ``F.linear``."""
    # The class that torch makes for a parametrized module has the module name of torch.
    return len(shape) == 2 and not type_before_parametrizations(module).__module__.startswith("torch.nn")


def matrix_guess(slots: Slots) -> bool:
    """Choose between sparse and dense compute of a matrix for a batch of ``NOMINAL_BATCH``."""
    return choice.prefers_sparse(slots.rows, slots.columns, slots.count, choice.NOMINAL_BATCH, slots.signs.dtype, "cpu")


def matrix_prefers(slots: Slots, module: Any, x: Tensor) -> bool:
    """Choose between sparse and dense compute of a matrix for this input."""
    batch = x.numel() // max(slots.columns, 1)
    return choice.prefers_sparse(slots.rows, slots.columns, slots.count, batch, dense_dtype(slots, x), x.device.type)


def dense_dtype(slots: Slots, x: Tensor) -> torch.dtype:
    """Return the dtype in which a dense layer would compute: that of its weight, or of autocast."""
    own = slots.narrow or slots.signs.dtype
    casts = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, own)
    return torch.get_autocast_dtype(x.device.type) if casts else own


def _nothing(module: Any, tensor_name: str) -> None:
    return None


@dataclass(frozen=True)
class LayerCompute:
    """How the layers of one kind compute from a converted weight.

    ``guess`` and ``prefers`` are called only if there are kernels for the tensor.

    Args:
        capable: a function that tells, before the conversion, whether sparse compute can take this tensor of this module.
        guess: a function that tells whether ``compute="auto"`` starts with sparse compute, before the first input.
        prefers: a function that tells whether ``compute="auto"`` computes this input sparsely. ``KSlots.uses_sparse`` calls it
            once per size of input.
        take_over: a hook that runs after the conversion, with the module and the tensor's name. The module has a class of its
            own by then, so the hook may set ``type(module).forward``.
        give_back: a hook that runs after the weight has become dense again, with the same arguments.
        forward: the forward that ``take_over`` gives to a layer whose class has none of its own; None: there is no such
            forward.
        adapts: whether sparse compute can add the connections to a frozen weight.
        tunes: whether ``compute="tune"`` may run the layer's forward with its input alone, to time it.
        reads: True if the layer always runs its author's forward, which reads the weight.
    """

    capable: Callable[[nn.Module, str, Shape], bool] = never
    guess: Callable[[Slots], bool] = matrix_guess
    prefers: Callable[[Slots, Any, Tensor], bool] = matrix_prefers
    take_over: Hook = _nothing
    give_back: Hook = _nothing
    forward: Callable[..., Any] | None = None
    reads: bool = False
    adapts: bool = True
    tunes: bool = False

    def runs_own(self, module: nn.Module) -> bool:
        """Tell whether a converted layer runs its author's forward, which reads the weight as it likes."""
        return self.reads or (self.forward is not None and type(module).forward is not self.forward)


def with_forward(
    plain: type[nn.Module],
    forward: Callable[..., Any],
    *,
    capable: Callable[[nn.Module, str, Shape], bool],
    guess: Callable[[Slots], bool] = matrix_guess,
    prefers: Callable[[Slots, Any, Tensor], bool] = matrix_prefers,
) -> LayerCompute:
    """Make a :class:`LayerCompute` that replaces ``plain.forward`` while ``weight`` is converted.

    A subclass with a forward of its own keeps it.

    Args:
        plain: the layer's class.
        forward: the replacement of its ``forward``.
        capable, guess, prefers: the rules of the record.
    """

    def take_over(module: Any, tensor_name: str) -> None:
        own: Any = type(module)
        if tensor_name == "weight" and own.forward is plain.forward:
            own.forward = forward

    def give_back(module: Any, tensor_name: str) -> None:
        # torch restores the module's old class, unless another tensor, for example the bias, is still parametrized.
        own: Any = type(module)
        if tensor_name == "weight" and own.__dict__.get("forward") is forward:
            del own.forward

    return LayerCompute(capable, guess, prefers, take_over, give_back, forward, tunes=True)


def slots_and_theta(module: Any, tensor_name: str = "weight") -> tuple[Any, Tensor] | None:
    """Find the slots and the whole parameter of a converted tensor.

    None: a second parametrization lies over it, or ``torch.func.vmap`` maps over it (the weight of each network is built).
    """
    holder = module._modules["parametrizations"]._modules[tensor_name]
    theta = holder._parameters.get("original")
    if len(holder._modules) != 1 or theta is None or is_stacked(theta, holder._modules["0"]):
        return None
    return holder._modules["0"], theta


# The layer keeps its forward and reads its weight. `F.linear` computes sparsely with it; any other operation builds the weight.
READ = LayerCompute(own_matrix, reads=True)
# Each forward pass of the layer builds the weight.
DENSE = LayerCompute()
