"""Fixed random connectivity, the control of the paper: "no rewiring"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.algorithm import rewiring
from lightning_deepr.methods.drop_and_grow import nothing_reborn
from lightning_deepr.training import guards, invariants
from lightning_deepr.training.callback import SparseTraining
from lightning_deepr.training.tracked import Reborn, Stepped


class FixedRandom(SparseTraining):
    """Fixed random connectivity: K connections at random places, which stay there. The paper's control "no rewiring".

    Args:
        signs: "fixed": theta < 0 becomes 0, so that every connection keeps the sign of its place, as in a DEEP R that does not
            rewire. "free": ordinary weights under a fixed mask, the stronger of the two.
        connectivity, target_modules, exclude_modules, distribution, init, seed, compute, check_invariants, log_every_n_steps: as
            for :class:`~lightning_deepr.DeepR`. There is no L1 and no noise.

    Example::

        >>> import torch
        >>> from lightning_deepr import FixedRandom, sparsify
        >>> net = sparsify(torch.nn.Linear(100, 10), 0.05)
        >>> rewiring = FixedRandom().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    """

    def __init__(
        self,
        connectivity: int | float | dict[str, int | float] | None = None,
        *,
        signs: str = "fixed",
        target_modules: str | list[str] | Callable = "all",
        exclude_modules: str | Iterable[str] | Callable = (),
        distribution: str | Callable = "erdos_renyi",
        init: str = "module",
        seed: int = 0,
        compute: str = "auto",
        check_invariants: bool = False,
        log_every_n_steps: int = 50,
    ) -> None:
        if signs not in ("fixed", "free"):
            raise ValueError(f'signs: expected "fixed" or "free", found {signs!r}.')
        super().__init__(
            connectivity,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            distribution=distribution,
            l1=0.0,
            init=init,
            rewire_until=0,
            seed=seed,
            compute=compute,
            check_invariants=check_invariants,
            log_every_n_steps=log_every_n_steps,
        )
        self.signs = signs

    @override
    def _begin_training(self) -> None:
        super()._begin_training()
        if self.signs == "fixed":
            guards.warn_of_free_signs(type(self).__name__, self._tensors, "they become 0")

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> list[Reborn]:
        if self.signs == "fixed":
            rewiring.keep_active([item.theta for item in stepped])
        return [nothing_reborn(item.theta) for item in stepped]

    @override
    def check(self, item: Stepped, born: Reborn, optimizer: Optimizer) -> None:
        invariants.check_invariants(item.tensor, item, born.slots, optimizer, self._starting_state, signed=self.signs == "free")
