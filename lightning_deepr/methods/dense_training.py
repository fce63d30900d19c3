"""The base of the callbacks with a theta for every potential connection: how they convert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.restrictions import part
from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.conversion.start import STARTS
from lightning_deepr.training.callback import Rewiring, SparseTraining
from lightning_deepr.weights.dense_theta import DenseTheta
from lightning_deepr.weights.find import Converted, converted_tensors


class DenseTraining(SparseTraining):
    """Base of the callbacks that work on a :class:`lightning_deepr.weights.dense_theta.DenseTheta`.

    Under a Trainer, ``setup`` converts the network. For a plain loop or Fabric, call :meth:`prepare` before you make the
    optimizer (``sparsify`` would make K slots).
    """

    kind: ClassVar[type[DenseTheta]]
    without_turnover = "It has no rebirths: give a number, LinearDecay(start, end) or a function of the progress."

    @override
    def convert(self, module: nn.Module, new: list[Candidate], counts: Mapping[str, int]) -> list[Converted]:
        begin = STARTS[self.kind]
        restriction = part(self.candidates, new, {candidate.name for candidate in new})
        return convert(
            module,
            new,
            counts,
            init=self.init,
            seed=cast("int", self.seed),
            compute="dense",
            begin=begin,
            given=getattr(counts, "given", None),
            restriction=restriction,
        )

    @override
    def check_kind(self, name: str, slots: Any) -> None:
        if not isinstance(slots, self.kind):
            found = f"{type(slots).__name__} ({slots.count} connections)"
            raise ValueError(
                f"`{name}` is converted already, but for another method: {type(self).__name__} expects a theta for every "
                f"potential connection ({self.kind.__name__}), found {found}. Call densify(module) and let "
                f"{type(self).__name__} convert it. A Trainer does this; elsewhere call `callback.prepare(net)` before you "
                "make the optimizer."
            )

    @override
    def attach(self, net: nn.Module, optimizer: Optimizer, total_steps: int | None = None) -> Rewiring:
        """Rewire after each step, as :meth:`SparseTraining.attach` does. Convert the network with :meth:`prepare` first."""
        if not any(True for _ in converted_tensors(net)):
            raise ValueError(
                f"attach expects a converted network, found {type(net).__name__} without a converted tensor. Call "
                f"`prepare(net)` on the {type(self).__name__} before you make the optimizer."
            )
        return super().attach(net, optimizer, total_steps)


def on_host(value: Any) -> float | None:
    """Convert a number to a float. None: the number is on a device, and reading it would cost a host synchronization."""
    device = getattr(value, "device", None)
    return float(value) if device is None or device.type == "cpu" else None
