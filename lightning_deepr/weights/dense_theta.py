"""The parametrizations with a theta for every potential connection: dense, where K slots are not.

:class:`SoftTheta` is what soft-DEEP R works on: dormant connections have a theta of their own, below 0. :class:`MaskedTheta` is
an ordinary weight with a mask, for pruning and l1-shrinkage. Both become K slots when they are written by
:func:`lightning_deepr.save_sparse`.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from lightning_deepr.algorithm import randomness
from lightning_deepr.weights.base import Notice, Parametrization
from lightning_deepr.weights.k_slots import KSlots


class DenseTheta(Parametrization):
    """Base of the two: theta has the weight's shape.

    Args:
        shape: the weight's shape, N potential connections.
        wanted: the number of connections that is asked for (K).
        index: the tensor's place in the order of conversion.
        sign_seed: seed of the hashed signs.
        exceptions: int64 [E], sorted: places whose sign is the opposite of the hash (of a pretrained network).
        dtype: of theta.
        notice: shared by the tensors of one conversion.
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
        super().__init__(shape, index, sign_seed, exceptions, notice)
        self._wanted = wanted
        self.steps = 0  # that a callback has taken on it
        # theta is the holder's; a reference to theta itself would be lost in `.to` and in a deep copy
        self._holder: Callable[[], parametrize.ParametrizationList | None] = lambda: None

    def hold(self, holder: parametrize.ParametrizationList) -> None:
        """Tell where theta is: how many connections are active is a question about its values."""
        self._holder = weakref.ref(holder)

    def theta(self) -> Tensor:
        """theta, detached."""
        holder = self._holder()
        if holder is None:
            raise RuntimeError("This parametrization belongs to no module any more: copy or keep the module that holds it.")
        return holder.original.detach()

    @property
    def wanted(self) -> int:
        return self._wanted

    @property
    def count(self) -> int:
        return int(self.is_active(self.theta()).sum())

    def last_birth(self) -> int:
        return self.steps - 1

    @abstractmethod
    def is_active(self, theta: Tensor) -> Tensor:
        """bool, of the weight's shape."""

    @torch.no_grad()
    def active(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        places = self.is_active(theta).reshape(-1).nonzero().view(-1)
        return places, self.dense(theta).reshape(-1)[places]

    @torch.no_grad()
    def as_slots(self, theta: Tensor) -> tuple[Tensor, KSlots]:
        """The active connections as K slots: theta [K] and its :class:`KSlots`.

        A tensor in which nothing is active keeps one connection of weight 0: K is at least 1.
        """
        places, values = self.active(theta)
        if places.numel() == 0:
            places, values = places.new_zeros(1), values.new_zeros(1)
        own = values.sign()
        hashed = randomness.signs_of(self.sign_seed, places, values.dtype)
        exceptions = places[(own != 0) & (own != hashed)]
        slots = KSlots(self.shape, places, self.index, self.sign_seed, exceptions, values.dtype)
        slots.born.fill_(self.last_birth())  # a callback goes on counting, and repeats no draws
        return values.abs(), slots

    # -- copying, loading, averaging --------------------------------------------------------------------------------------

    def copied(self, replica: DenseTheta, memo: dict[int, Any]) -> None:
        replica.steps = self.steps
        replica.take_after(self, memo)
        copied = memo.get(id(self._holder()))
        if isinstance(copied, parametrize.ParametrizationList):  # the copy of the module is being made
            replica.hold(copied)

    def _refusal(self, record: dict[str, Tensor]) -> str | None:
        problem = super()._refusal(record)
        if problem is None and int(record["wanted"]) != self.wanted:
            return (
                f"expected a wanted connectivity of K = {self.wanted} ({self.wanted / self.total:.3%}), found "
                f"{int(record['wanted'])} ({int(record['wanted']) / self.total:.3%}): give the connectivity with which the "
                "checkpoint was made, or convert as recorded with `lightning_deepr.load_state_dict(module, checkpoint)`."
            )
        return problem

    def align_averages(self) -> None:
        """Let averages follow: what they must not average over is taken as it is."""
        for holder in self.averages:
            average: Any = holder[0]
            average.follow(self, holder.original.detach())

    @abstractmethod
    def follow(self, source: Any, average: Tensor) -> None:
        """Let this one, with its averaged theta, follow the parametrization that it is a copy of. In place."""


class SoftTheta(DenseTheta):
    """soft-DEEP R's: a connection is active where theta >= 0, with the weight s * theta and s its constant sign; else 0.

    At theta = 0 a connection is active and has a gradient; a dormant one has none.

    Before its first step under a callback, the theta of the dormant connections is uniform on [-1, 0): what theta_min is depends
    on the optimizer (its alpha, its learning rate), and they are spread over [theta_min, 0) as soon as it is known.

    In an averaged copy (``AveragedModel``, Lightning's averaging callbacks) exactly the connections of the network are
    active: an average covers the values of a connection since it became active last, and where the network is dormant, so is
    its average.
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
        self.signs = self.all_signs(dtype)  # the weight's shape
        self.theta_min: Any = math.nan  # of the last step that had one; nan: not known yet
        self.before: Tensor | None = None  # theta before the optimizer's step, for the length of that step

    def all_signs(self, dtype: torch.dtype) -> Tensor:
        places = torch.arange(self.total, device=self.exceptions.device)
        return self.signs_at(places, dtype).view(self.shape)

    def is_active(self, theta: Tensor) -> Tensor:
        return theta >= 0

    def dense(self, theta: Tensor) -> Tensor:
        # neither relu nor clamp: at 0 a connection is active and has a gradient. (where would do, and takes twice as long.)
        return theta * (theta.detach() >= 0).to(theta.dtype).mul_(self.signs)

    def overwritten(self, theta: Tensor) -> bool:
        untouched = isinstance(self.theta_min, float) and math.isnan(self.theta_min)
        return untouched and int((theta >= 0).sum()) != self.wanted

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftTheta:
        replica = SoftTheta(self.shape, self.wanted, self.index, self.sign_seed, self.exceptions.clone(), self.signs.dtype)
        replica.theta_min = self.theta_min
        self.copied(replica, memo)
        return replica

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "theta_min"] = torch.tensor(float(self.theta_min), dtype=torch.float64)

    def take_over(self, record: dict[str, Tensor]) -> None:
        self.theta_min, self.steps = float(record["theta_min"]), int(record["steps"])
        self.signs.copy_(self.all_signs(self.signs.dtype))
        if self._holder() is not None:
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
    """A dense weight with a mask: theta is the signed weight, and 0 is read where the mask does not allow a connection.

    Until the mask is ``fixed`` the connections are the weights that are not 0; from then on they are what the mask allows.
    An averaged copy has the network's mask; where l1-shrinkage has a weight at 0, its average starts anew.
    """

    tensors = ("exceptions", "signs", "mask")
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
        self.signs = torch.empty(0, dtype=dtype, device=exceptions.device)  # free: theta has them
        self.mask = torch.ones(self.shape, dtype=torch.bool, device=exceptions.device)
        self.fixed = False

    def is_active(self, theta: Tensor) -> Tensor:
        return self.mask.clone() if self.fixed else self.mask & (theta != 0)

    def dense(self, theta: Tensor) -> Tensor:
        # as long as nothing is masked the weight is theta
        return torch.where(self.mask, theta, 0.0) if self.fixed else theta.view_as(theta)

    def overwritten(self, theta: Tensor) -> bool:
        return False  # theta is the weight: who writes it writes the weight

    @torch.no_grad()
    def keep(self, mask: Tensor, theta: Tensor) -> None:
        """From now on only these connections (of those that are allowed) can be active."""
        self.mask &= mask
        self.fixed = True
        theta.masked_fill_(~self.mask, 0.0)

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedTheta:
        replica = MaskedTheta(self.shape, self.wanted, self.index, self.sign_seed, self.exceptions.clone(), self.signs.dtype)
        replica.mask, replica.fixed = self.mask.clone(), self.fixed
        self.copied(replica, memo)
        return replica

    def take_over(self, record: dict[str, Tensor]) -> None:
        self.mask.copy_(record["mask"])
        self.fixed, self.steps = bool(record["fixed"]), int(record["steps"])
        if self._holder() is not None:
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


# -- the start --------------------------------------------------------------------------------------------------------------


# -- what a checkpoint records ----------------------------------------------------------------------------------------------
