"""The K-slot parametrization: what a converted weight consists of.

``torch.nn.utils.parametrize`` keeps the parameter, theta, under ``<module>.parametrizations.<tensor>.original``; here it is a
vector of K slots, and so are its gradient, its optimizer state and its share of a checkpoint. :class:`KSlots` sits beside
it and knows where each slot's connection is (``places``) and what sign it has (``signs``).
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
    """theta of K slots in, the dense-shaped weight out.

    Args:
        shape: the weight's shape, N potential connections.
        places: int64 [K], unique, 0 <= place < N.
        index: the tensor's place in the order of conversion.
        sign_seed: seed of the hashed signs.
        exceptions: int64 [E], sorted: places whose sign is the opposite of the hash (of a pretrained network).
        dtype: of theta.
        notice: shared by the tensors of one conversion.
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
        # the last question of uses_sparse: nearly always the next one, too
        self._asked_size, self._asked_device, self._asked = -1, torch.device("cpu"), False
        # given the dense weight's gradient, where an algorithm wants to see it (RigL, in the steps in which it rewires)
        self.on_dense_gradient: Callable[[Tensor], None] | None = None

    @property
    def count(self) -> int:
        """K."""
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
        """The dense-shaped weight from this tensor's own theta [K].

        Raises:
            RuntimeError: it would take more than 1 GiB.
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
        """Take the ``compute`` argument for this tensor.

        Args:
            policy: "auto" | "dense" | "sparse".
            capable: whether sparse compute may take this tensor.
        """
        self.policy = policy if capable else "dense"
        self._asked_size = -1
        sparse = self.policy == "sparse" or (self.policy == "auto" and kernels.available() and self.layer.guess(self))
        if self.policy == "auto" and self.total * self.signs.element_size() > LARGEST_READ:
            sparse = True  # there is no other way
            self.policy = "sparse"
        self.compute = "sparse" if sparse else "dense"
        if sparse and self.places.device.type == "cpu" and self.signs.dtype in _KERNEL_TYPES and kernels.available():
            self.refresh_order()

    def uses_sparse(self, x: Tensor, module: nn.Module) -> bool:
        """Whether this forward pass shall be sparse.

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
        """Whether a compiled kernel can compute with this theta; says once on which device or dtype it can't."""
        if torch.compiler.is_dynamo_compiling():
            return self.order is not None  # made when the tensor was converted, loaded or moved
        if theta.device.type == "cpu" and theta.dtype in _KERNEL_TYPES and kernels.available():
            return True
        kind = f"{theta.device.type}, {theta.dtype}"
        if kind not in _told:
            _told.add(kind)
            warnings.warn(
                f"Sparse compute has no kernel for {kind}: it runs in plain PyTorch, which is slower. Kernels are there for float32 and "
                'float64 on the CPU, where numba can be imported, and for CUDA, where Triton can. compute="dense" is the alternative.',
                stacklevel=4,
            )
        return False

    def ordered(self) -> Order:
        """The connections by row and by column, up to date."""
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
        """Put the connections in order anew; the buffer stays the same while K does, for compiled graphs that hold it."""
        if self.order is None or self.order.count != self.count:
            self.order = Order(self.places, self.signs, self.shape)
        else:
            self.order.build(self.places, self.signs)
        return self.order

    def places_changed(self) -> None:
        """After somebody wrote places: what is kept about them follows (a compiled graph could not look)."""
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
        """What is not as it has to be after every step, or None.

        Args:
            theta: the parameter, detached.
            born: int64, the slots of this tensor that were reborn in this step.
            states: name, tensor and starting value of each tensor of theta's shape in the optimizer's state.
            least: how many connections this tensor has to have, if it can; K slots of its own are always as many.
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
        """Why a recorded number of connections does not fit, or None."""
        count = record["places"].numel()
        if count == self.count:
            return None
        return (
            f"expected K = {self.count} connections ({self.count / self.total:.3%}), found {count} "
            f"({count / self.total:.3%}): give the connectivity with which the checkpoint was made, or convert as "
            "recorded with `lightning_deepr.load_state_dict(module, checkpoint)`."
        )
