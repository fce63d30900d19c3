"""What the callbacks with a theta for every potential connection share: how they convert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.conversion.start import STARTS
from lightning_deepr.training.callback import Rewiring, SparseTraining
from lightning_deepr.weights.dense_theta import DenseTheta
from lightning_deepr.weights.find import Converted, converted_tensors


class DenseTraining(SparseTraining):
    """Base of the callbacks that work on a :class:`lightning_deepr.weights.dense_theta.DenseTheta`.

    Under a Trainer the network is converted in ``setup``, as always. For a plain loop or Fabric call :meth:`prepare` before
    the optimizer is made: ``sparsify`` makes K slots.
    """

    kind: ClassVar[type[DenseTheta]]
    without_turnover = "Nothing is reborn in it: give a number, LinearDecay(start, end) or a function of the progress."

    @override
    def convert(self, module: nn.Module, new: list[Candidate], counts: Mapping[str, int]) -> list[Converted]:
        begin = STARTS[self.kind]
        return convert(module, new, counts, init=self.init, seed=self.seed, compute="dense", begin=begin)

    @override
    def check_kind(self, name: str, slots: Any) -> None:
        if not isinstance(slots, self.kind):
            found = f"{type(slots).__name__} ({slots.count} connections)"
            raise ValueError(
                f"`{name}` is converted already, but for another method: {type(self).__name__} expects a theta for every potential "
                f"connection ({self.kind.__name__}), found {found}. Call densify(module) and let {type(self).__name__} convert it: "
                "under a Trainer by itself, elsewhere by `callback.prepare(net)` before the optimizer is made."
            )

    @override
    def attach(self, net: nn.Module, optimizer: Optimizer, total_steps: int | None = None) -> Rewiring:
        """As :meth:`SparseTraining.attach`; the network has to be converted by :meth:`prepare`."""
        if not any(True for _ in converted_tensors(net)):
            raise ValueError(
                f"attach expects a converted network, found {type(net).__name__} without a converted tensor. Call `prepare(net)` on "
                f"the {type(self).__name__} before the optimizer is made."
            )
        return super().attach(net, optimizer, total_steps)


def on_host(value: Any) -> float | None:
    """A number as a float, or None where looking would cost a host synchronization."""
    device = getattr(value, "device", None)
    return float(value) if device is None or device.type == "cpu" else None
