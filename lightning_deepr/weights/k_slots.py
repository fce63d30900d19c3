"""The K-slot parametrization of a converted weight.

``torch.nn.utils.parametrize`` keeps the parameter, theta, under ``<module>.parametrizations.<tensor>.original``. Here theta is
a vector of K slots. Its gradient, its optimizer state and its part of a checkpoint have size K, too. :class:`KSlots` has the
place (``places``) and the sign (``signs``) of each slot's connection.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr import kernels
from lightning_deepr.compute import build_weight
from lightning_deepr.compute.order import Order
from lightning_deepr.compute.weight import SparseWeight as _SparseWeight
from lightning_deepr.weights.averages import realign_averages
from lightning_deepr.weights.base import LARGEST_READ, Notice, Parametrization

_KERNEL_TYPES = (torch.float32, torch.float64)
_told: set[str] = set()


class KSlots(Parametrization):
    """The parametrization that computes the dense-shaped weight from a theta of K slots.

    It keeps K places and K signs. It keeps no tensor of size N.

    Args:
        shape: the weight's shape, with N potential connections.
        places: int64 [K], unique, 0 <= place < N.
        index: the tensor's position in the order of conversion.
        sign_seed: the seed of the hashed signs.
        exceptions: int64 [E], sorted: the places of a pretrained network whose sign is the opposite of the hash.
        dtype: the dtype of theta.
        notice: the warning that all tensors of one conversion share.
    """

    tensors = ("places", "born", "signs", "exceptions")
    records = ("places", "born")

    def __init__(
        self,
        shape: torch.Size,
        places: Tensor,
        index: int,
        sign_seed: int,
        exceptions: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        notice: Notice | None = None,
    ) -> None:
        super().__init__(shape, index, sign_seed, torch.empty_like(places[:0]) if exceptions is None else exceptions, notice)
        self.places = places.contiguous()
        self.born = torch.full_like(self.places, -1)
        self.signs = self.signs_at(self.places, dtype)
        self.order: Order | None = None  # made when sparse compute needs it, and kept up to date
        # the cached decision of uses_sparse, with the input size and the device that it is for
        self._asked_size, self._asked_device, self._asked = -1, torch.device("cpu"), False
        # receives the dense weight's gradient if a method needs it (RigL does in the steps that rewire)
        self.on_dense_gradient: Callable[[Tensor], None] | None = None

    @property
    def count(self) -> int:
        """K, the number of connections."""
        return self.places.numel()

    def last_birth(self) -> int:
        return int(self.born.max()) if self.count else -1

    def active(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self.places.clone(), (self.own(theta.detach()) * self.signs).clone()

    def forward(self, theta: Tensor) -> Tensor:
        sparse = self.compute == "sparse" and not self.is_watched and self.on_dense_gradient is None
        if sparse and not torch.compiler.is_dynamo_compiling():
            return _SparseWeight(self.own(theta), self)
        return super().forward(theta)

    def dense(self, theta: Tensor) -> Tensor:
        return self.weight_of(self.own(theta))

    def weight_of(self, part: Tensor) -> Tensor:
        """Compute the dense-shaped weight from this tensor's own theta [K].

        Raises:
            RuntimeError: the weight would take more than 1 GiB.
        """
        if not torch.compiler.is_dynamo_compiling() and self.total * part.element_size() > LARGEST_READ:
            raise RuntimeError(
                f"Building this weight of shape {tuple(self.shape)} takes {self.total * part.element_size() / 2**30:.1f} GiB "
                "(more than 1 GiB). `lightning_deepr.connections(module)` gives its places and values instead."
            )
        weight = build_weight(part, self.signs, self.places, self.shape)
        if self.on_dense_gradient is not None and weight.requires_grad and not torch.compiler.is_dynamo_compiling():
            weight.register_hook(self.on_dense_gradient)
        return weight

    def whole(self, theta: Tensor) -> Tensor:
        return build_weight(self.own(theta), self.signs, self.places, self.shape)

    # -- sparse compute ---------------------------------------------------------------------------------------------------

    def choose_compute(self, policy: str, capable: bool) -> None:
        """Apply the ``compute`` argument to this tensor.

        Args:
            policy: "auto" | "dense" | "sparse".
            capable: whether sparse compute supports this tensor.
        """
        self.policy = policy if capable else "dense"
        self._asked_size = -1
        sparse = self.policy == "sparse" or (self.policy == "auto" and kernels.available() and self.layer.guess(self))
        if self.policy == "auto" and self.total * self.signs.element_size() > LARGEST_READ:
            sparse = True  # the dense weight is too large
            self.policy = "sparse"
        self.compute = "sparse" if sparse else "dense"
        if sparse and self.places.device.type == "cpu" and self.signs.dtype in _KERNEL_TYPES and kernels.available():
            self.refresh_order()

    def uses_sparse(self, x: Tensor, module: nn.Module) -> bool:
        """Whether this forward pass computes sparsely.

        Args:
            x: the layer's input; under ``compute="auto"`` its size decides.
            module: the layer.
        """
        if self.policy != "auto" or torch.compiler.is_dynamo_compiling() or self.on_dense_gradient is not None:
            return self.compute == "sparse" and self.on_dense_gradient is None
        size, device = x.numel(), x.device
        if size == self._asked_size and device == self._asked_device:
            return self._asked
        chosen = kernels.available() and self.layer.prefers(self, module, x)
        self._asked_size, self._asked_device, self._asked = size, device, chosen
        if torch.is_grad_enabled():
            self.compute = "sparse" if chosen else "dense"
        return chosen

    def has_kernel(self, theta: Tensor) -> bool:
        """Whether a compiled kernel can compute with this theta. It warns once per device and dtype without a kernel."""
        if torch.compiler.is_dynamo_compiling():
            return self.order is not None  # conversion, loading and moving make the order
        if theta.device.type == "cpu" and theta.dtype in _KERNEL_TYPES and kernels.available():
            return True
        kind = f"{theta.device.type}, {theta.dtype}"
        if kind not in _told:
            _told.add(kind)
            warnings.warn(
                f"Sparse compute has no kernel for {kind}: it runs in plain PyTorch, which is slower. Kernels exist for "
                "float32 and float64 on the CPU if numba can be imported, and for CUDA if Triton can be imported. "
                'compute="dense" is the alternative.',
                stacklevel=4,
            )
        return False

    def ordered(self) -> Order:
        """Return the up-to-date order of the connections by row and by column."""
        order = self.order
        if torch.compiler.is_dynamo_compiling():
            assert order is not None
            return order
        if order is None or order.is_stale(self.places):
            return self.refresh_order()
        return order

    def ask_again(self) -> None:
        """Forget the cached dense/sparse decision."""
        self._asked_size = -1

    def refresh_order(self) -> Order:
        """Rebuild the order of the connections. If K is the same, reuse the buffer, which compiled graphs may hold."""
        if self.order is None or self.order.count != self.count:
            self.order = Order(self.places, self.signs, self.shape)
        else:
            self.order.build(self.places, self.signs)
        return self.order

    def places_changed(self) -> None:
        """Rebuild the order after a change of places. (A compiled graph cannot detect the change.)"""
        if self.order is not None:
            self.refresh_order()

    # -- invariants -------------------------------------------------------------------------------------------------------

    def problem(
        self,
        theta: Tensor,
        born: Tensor,
        states: Iterable[tuple[str, Tensor, float]],
        *,
        least: int = 0,
        signed: bool = False,
    ) -> str | None:
        """Describe the first violated invariant of a step, or return None.

        Args:
            theta: the parameter, detached.
            born: int64, the slots of this tensor that were reborn in this step.
            states: the name, tensor and starting value of each tensor of theta's shape in the optimizer's state.
            least: the least number of connections of a layer that shares its theta; unshared slots ignore it.
            signed: whether theta may be negative.
        """
        mine, places = self.own(theta), self.places
        if mine.shape != places.shape:
            return f"expected {places.numel()} slots, found theta of shape {tuple(mine.shape)}"
        if not bool(torch.isfinite(mine).all()):
            return "theta is not finite"
        if not signed and bool((mine < 0).any()):
            return f"expected theta >= 0, found {float(mine.min())}"
        if bool(((places < 0) | (places >= self.total)).any()):
            return f"a place lies outside 0 ... {self.total - 1}"
        if places.unique().numel() != places.numel():
            return "two slots are at one place"
        if not torch.equal(self.signs, self.signs_at(places)):
            return "a sign is not that of its place"
        if bool((mine[born] != 0).any()):
            return "a reborn slot does not start at theta = 0"
        for name, value, start in states:
            if bool((self.own(value)[born] != start).any()):
                return f"the optimizer's {name} of a reborn slot is not at its start, {start}"
        return None

    # -- moving, copying, saving ------------------------------------------------------------------------------------------

    def moved(self) -> None:
        self._asked_size = -1
        if self.order is not None:
            self.order = None
            if self.places.device.type == "cpu":
                self.refresh_order()

    def __deepcopy__(self, memo: dict[int, Any]) -> KSlots:
        replica = KSlots(self.shape, self.places.clone(), self.index, self.sign_seed, self.exceptions.clone(), self.signs.dtype)
        replica.born = self.born.clone()
        replica.take_after(self, memo)
        if self.order is not None:
            replica.refresh_order()
        return replica

    def take_over(self, record: dict[str, Tensor]) -> None:
        self.places.copy_(record["places"])
        self.born.copy_(record["born"])
        self.signs.copy_(self.signs_at(self.places))
        self.places_changed()
        realign_averages(self)

    def _refusal(self, record: dict[str, Tensor]) -> str | None:
        problem = super()._refusal(record) or self._count_refusal(record)
        if problem is not None:
            return problem
        places = record["places"]
        if places.numel() and (places.min() < 0 or places.max() >= self.total or places.unique().numel() != places.numel()):
            return f"expected {places.numel()} different places in 0 ... {self.total - 1}, found others: the file is damaged."
        return None

    def _count_refusal(self, record: dict[str, Tensor]) -> str | None:
        """Say why a recorded number of connections does not fit, or return None."""
        count = record["places"].numel()
        if count == self.count:
            return None
        return (
            f"expected K = {self.count} connections ({self.count / self.total:.3%}), found {count} "
            f"({count / self.total:.3%}): give the connectivity of the checkpoint, or convert as "
            "recorded with `lightning_deepr.load_state_dict(module, checkpoint)`."
        )
