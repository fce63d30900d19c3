"""The parametrizations with a theta for every potential connection. They are dense.

:class:`SoftTheta` is for soft-DEEP R: dormant connections have a theta below 0. :class:`MaskedTheta` is an ordinary weight with
a mask, for pruning and l1-shrinkage. :func:`lightning_deepr.save_sparse` writes both as K slots.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.allowed import Allowed
from lightning_deepr.kernels import gate
from lightning_deepr.weights import precision
from lightning_deepr.weights.base import FORMAT_KEY, Notice, Parametrization
from lightning_deepr.weights.k_slots import KSlots


class DenseTheta(Parametrization):
    """Base of both parametrizations: theta has the weight's shape.

    Args:
        shape: the weight's shape, with N potential connections.
        wanted: K, the requested number of connections.
        index: the tensor's position in the order of conversion.
        sign_seed: the seed of the hashed signs.
        exceptions: int64 [E], sorted: the places of a pretrained network whose sign is the opposite of the hash.
        dtype: the weight's dtype. theta has float32 if it has fewer than 32 bits.
        notice: the warning that all tensors of one conversion share.
    """

    def __init__(
        self,
        shape: torch.Size,
        wanted: int,
        index: int,
        sign_seed: int,
        exceptions: Tensor,
        dtype: torch.dtype,
        notice: Notice | None = None,
    ) -> None:
        super().__init__(shape, index, sign_seed, exceptions, dtype, notice)
        self._wanted = wanted
        self.steps = 0  # number of steps that a callback has taken on the tensor

    def theta(self) -> Tensor:
        """Return theta, detached."""
        holder = self.holder()
        if holder is None:
            raise RuntimeError("This parametrization belongs to no module any more: copy or keep the module that holds it.")
        return holder.original.detach()

    @property
    def wanted(self) -> int:
        return self._wanted

    def check(self, theta: Tensor, name: str | None = None) -> bool:
        return gate.check_dense(theta, self, self.tensors, name)

    def written(self, theta: Tensor, name: str) -> list[tuple[str, Tensor]]:
        return [(f"theta of `{name}`", theta)]

    @property
    def count(self) -> int:
        return int(self.is_active(self.theta()).sum())

    def last_birth(self) -> int:
        return self.steps - 1

    @abstractmethod
    def is_active(self, theta: Tensor) -> Tensor:
        """Return which connections are active: bool, in the weight's shape."""

    @abstractmethod
    def in_full(self, theta: Tensor) -> Tensor:
        """Compute the dense-shaped weight in theta's dtype, differentiable in theta."""

    def dense(self, theta: Tensor) -> Tensor:
        return self.narrowed(self.in_full(theta))

    @torch.no_grad()
    def _active_in_full(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        places = self.is_active(theta).reshape(-1).nonzero().view(-1)
        return places, self.in_full(theta).reshape(-1)[places]

    def active(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        places, values = self._active_in_full(theta)
        return places, self.narrowed(values)

    @torch.no_grad()
    def as_slots(self, theta: Tensor) -> tuple[Tensor, KSlots]:
        """Return the active connections as K slots: theta [K] and its :class:`KSlots`.

        A tensor without active connections keeps one connection of weight 0: K is at least 1.
        """
        places, values = self._active_in_full(theta)
        if places.numel() == 0:
            places, values = places.new_zeros(1), values.new_zeros(1)
            if self.allowed is not None:
                places = next(piece[:1] for piece in self.allowed.pieces() if piece.numel()).to(places.device)
        own = values.sign()
        hashed = randomness.signs_of(self.sign_seed, places, values.dtype)
        exceptions = places[(own != 0) & (own != hashed)]
        slots = KSlots(self.shape, places, self.index, self.sign_seed, exceptions, self.weight_dtype, allowed=self.allowed)
        slots.born.fill_(self.last_birth())  # a callback continues the count, and repeats no draws
        return values.abs(), slots

    # -- copying, loading, averaging --------------------------------------------------------------------------------------

    def copied(self, replica: DenseTheta, memo: dict[int, Any]) -> None:
        replica.steps = self.steps
        replica.take_after(self, memo)

    def _refusal(self, record: dict[str, Tensor]) -> str | None:
        problem = super()._refusal(record)
        if problem is None and int(record["wanted"]) != self.wanted:
            return (
                f"expected a wanted connectivity of K = {self.wanted} ({self.wanted / self.total:.3%}), found "
                f"{int(record['wanted'])} ({int(record['wanted']) / self.total:.3%}): give the connectivity of the "
                "checkpoint, or convert as recorded with `lightning_deepr.load_state_dict(module, checkpoint)`."
            )
        return problem

    def align_averages(self) -> None:
        """Make averaged copies follow this tensor: they copy the state that must not be averaged."""
        for holder in self.averages:
            average: Any = holder[0]
            average.follow(self, holder.original.detach())

    @abstractmethod
    def follow(self, source: Any, average: Tensor) -> None:
        """Make this averaged copy follow its source, in place.

        Args:
            source: the parametrization that this one is a copy of.
            average: the averaged theta.
        """


class SoftTheta(DenseTheta):
    """The parametrization of soft-DEEP R: the weight is s * theta where theta >= 0, else 0; s is the place's constant sign.

    A connection at theta = 0 is active and has a gradient. A dormant connection has no gradient.

    Before the first step under a callback, the theta of dormant connections is uniform on [-1, 0): theta_min depends on the
    optimizer (alpha, learning rate) and is still unknown. The first step scales them to [theta_min, 0).

    An averaged copy (``AveragedModel``, Lightning's averaging callbacks) has exactly the network's active connections. An
    average covers the values of a connection since it last became active.
    """

    tensors = ("exceptions", "signs")
    records = ("wanted", "theta_min", "steps")

    def __init__(
        self,
        shape: torch.Size,
        wanted: int,
        index: int,
        sign_seed: int,
        exceptions: Tensor,
        dtype: torch.dtype,
        notice: Notice | None = None,
    ) -> None:
        super().__init__(shape, wanted, index, sign_seed, exceptions, dtype, notice)
        self.signs = self.all_signs(precision.kept(dtype))  # the weight's shape
        self.theta_min: Any = math.nan  # the last step's theta_min; nan: still unknown
        self.before: Tensor | None = None  # theta before the optimizer's step, used during that step

    def all_signs(self, dtype: torch.dtype) -> Tensor:
        places = torch.arange(self.total, device=self.exceptions.device)
        return self.signs_at(places, dtype).view(self.shape)

    def is_active(self, theta: Tensor) -> Tensor:
        return theta >= 0

    def in_full(self, theta: Tensor) -> Tensor:
        # neither relu nor clamp: at 0 a connection is active and has a gradient. (torch.where is also right, and twice as
        # slow.)
        return theta * (theta.detach() >= 0).to(theta.dtype).mul_(self.signs)

    def overwritten(self, theta: Tensor) -> bool:
        untouched = isinstance(self.theta_min, float) and math.isnan(self.theta_min)
        return untouched and int((theta >= 0).sum()) != self.wanted

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftTheta:
        replica = SoftTheta(self.shape, self.wanted, self.index, self.sign_seed, self.exceptions.clone(), self.weight_dtype)
        replica.theta_min = self.theta_min
        self.copied(replica, memo)
        return replica

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix + FORMAT_KEY in destination:
            destination[prefix + "theta_min"] = torch.tensor(float(self.theta_min), dtype=torch.float64)

    def take_over(self, record: dict[str, Tensor]) -> None:
        self.theta_min, self.steps = float(record["theta_min"]), int(record["steps"])
        self.signs.copy_(self.all_signs(self.signs.dtype))
        if self.holder() is not None:
            self.align_averages()

    def align_averages(self) -> None:
        for holder in self.averages:
            average: SoftTheta = holder[0]  # type: ignore[assignment]
            if average.sign_seed != self.sign_seed or not torch.equal(average.exceptions.cpu(), self.exceptions.cpu()):
                average.sign_seed, average.exceptions = self.sign_seed, self.exceptions.to(average.exceptions.device)
                average.signs.copy_(self.signs)
        super().align_averages()

    def follow(self, source: SoftTheta, average: Tensor) -> None:
        self.theta_min, self.steps = source.theta_min, source.steps
        current = source.theta().to(average)
        average.copy_(torch.where((current >= 0) & (average >= 0), average, current))


class MaskedTheta(DenseTheta):
    """A dense weight with a mask: theta is the signed weight, and the weight is 0 outside the mask.

    Before the mask is ``fixed``, the connections are the weights that are not 0. Afterwards they are the places of the mask.
    An averaged copy has the network's mask. If l1-shrinkage sets a weight to 0, its average restarts at 0.
    """

    tensors = ("exceptions", "signs", "mask")
    placing = ("mask",)
    records = ("wanted", "mask", "fixed", "steps")

    def __init__(
        self,
        shape: torch.Size,
        wanted: int,
        index: int,
        sign_seed: int,
        exceptions: Tensor,
        dtype: torch.dtype,
        notice: Notice | None = None,
    ) -> None:
        super().__init__(shape, wanted, index, sign_seed, exceptions, dtype, notice)
        self.signs = torch.empty(0, dtype=precision.kept(dtype), device=exceptions.device)  # free signs: theta has them
        self.mask = torch.ones(self.shape, dtype=torch.bool, device=exceptions.device)
        self.fixed = False

    def is_active(self, theta: Tensor) -> Tensor:
        return self.mask.clone() if self.fixed else self.mask & (theta != 0)

    def in_full(self, theta: Tensor) -> Tensor:
        # while nothing is masked, the weight is theta
        return torch.where(self.mask, theta, 0.0) if self.fixed or self.allowed is not None else theta.view_as(theta)

    @property
    def keeps_no_writes(self) -> bool:  # type: ignore[override]
        # in fewer bits the weight is never theta itself
        return self.fixed or self.narrow is not None or self.allowed is not None

    def overwritten(self, theta: Tensor) -> bool:
        return False  # theta is the weight, so any value is valid

    @torch.no_grad()
    def keep(self, mask: Tensor, theta: Tensor) -> None:
        """Restrict the mask to these connections, and set theta to 0 elsewhere.

        Args:
            mask: bool, in the weight's shape: the connections that may stay active.
            theta: the tensor's theta, detached; written in place.
        """
        self.mask &= mask
        self.fixed = True
        theta.masked_fill_(~self.mask, 0.0)

    def restrict(self, allowed: Allowed, theta: Tensor) -> None:
        """Keep connections out of the places that are not allowed, from the start on. theta is written in place."""
        self.allowed = allowed
        self.mask = allowed.mask().view(self.shape).to(theta.device)
        theta.masked_fill_(~self.mask, 0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedTheta:
        replica = MaskedTheta(self.shape, self.wanted, self.index, self.sign_seed, self.exceptions.clone(), self.weight_dtype)
        replica.mask, replica.fixed = self.mask.clone(), self.fixed
        self.copied(replica, memo)
        return replica

    def take_over(self, record: dict[str, Tensor]) -> None:
        self.mask.copy_(record["mask"])
        self.fixed, self.steps = bool(record["fixed"]), int(record["steps"])
        if self.holder() is not None:
            self.align_averages()

    def _refusal(self, record: dict[str, Tensor]) -> str | None:
        problem, mask = super()._refusal(record), record["mask"]
        if problem is None and (mask.shape != self.shape or mask.dtype != torch.bool):
            return f"expected a mask of shape {tuple(self.shape)}, found {mask.dtype} {tuple(mask.shape)}: the file is damaged."
        return problem

    def follow(self, source: MaskedTheta, average: Tensor) -> None:
        self.mask.copy_(source.mask)
        self.fixed, self.steps = source.fixed, source.steps
        average.masked_fill_(source.theta().to(average) == 0, 0.0)
