"""DEEP R, the callback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.algorithm.shared_rewiring import RULES
from lightning_deepr.conversion.sharing import refuse_small_total
from lightning_deepr.methods.slot_training import SlotTraining
from lightning_deepr.training import backends, guards, invariants
from lightning_deepr.training.arguments import SCOPES, RewiringArguments, check_count, check_word
from lightning_deepr.training.backends import Batch
from lightning_deepr.training.tracked import Stepped, TrackedTensor
from lightning_deepr.weights.shared import Pool, SharedSlots


@dataclass(kw_only=True, eq=False, repr=False)
class DeepR(RewiringArguments, SlotTraining):
    """DEEP R: exactly K connections at every step, rewired after each optimizer step (Algorithm 1 of the paper).

    After ``optimizer.step()``, whichever optimizer it is: theta loses eta * alpha and takes a step of a random walk, with
    the plain learning rate eta of theta's parameter group; connections with theta < 0 go dormant; as many dormant places,
    drawn uniformly, become active at theta = 0 with the state that the optimizer starts with.

    Args:
        scope: "layer": K per tensor. "global": one K for the whole network; a connection that goes dormant may come back in another
            layer. One theta serves all layers, so they have to be in one parameter group of one optimizer. ``connectivity`` gives
            K, ``distribution`` the start. (A compiled network is compiled anew when counts change, and soon runs uncompiled.)
        reactivation: under ``scope="global"``: "budget": a newborn's layer is drawn with probability proportional to the connections
            with which it started (N_l * p_l, as in the authors' script), then one of its dormant places; "uniform": one of all
            dormant places of the network. A full layer is never chosen.
        least_per_layer: under ``scope="global"``: a layer that a step leaves with fewer connections than this gets births before the
            rule is asked; 0 lets layers go empty (a chain of layers is cut then).

    Raises:
        TypeError, ValueError: an argument that makes no sense, or one that does not fit the model (at ``setup``).
        RuntimeError: a theta or gradient that is not finite, before the step.

    Note:
        With Adam a newborn has zero moments but the shared step count, so that its first step is about 3 times the learning
        rate whatever its gradient (RMSprop: 10 times): it survives by the sign of its gradient alone.
        Strategies that shard parameters are refused.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_deepr import DeepR
        >>> trainer = Trainer(callbacks=[DeepR(connectivity=0.01)], logger=False, enable_checkpointing=False)
    """

    scope: str = "layer"
    reactivation: str = "budget"
    least_per_layer: int = 1
    watches_for_collapse = True

    def __post_init__(self) -> None:
        check_word("reactivation", self.reactivation, RULES)
        check_count("least_per_layer", self.least_per_layer, least=0)
        if self.scope not in SCOPES:
            raise ValueError(f"scope: expected {' or '.join(SCOPES.values())}, found {self.scope!r}.")
        super().__post_init__()

    @override
    def begin(self, tensors: Sequence[TrackedTensor]) -> None:
        guards.warn_of_free_signs(type(self).__name__, tensors, "these connections go dormant")

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> None:
        if self.scope == "global":
            for pool in self._pools([item.tensor for item in stepped]):
                items = sorted((item for item in stepped if _shared(item.tensor).pool is pool), key=_position)
                backends.step_of_network(
                    self._batch(items, optimizer), pool, rule=self.reactivation, least=self.least_per_layer
                )
            return
        first = stepped[0]
        kind = first.tensor.step, first.theta.device, first.theta.dtype
        if all((i.tensor.step, i.theta.device, i.theta.dtype) == kind for i in stepped):  # nearly always
            backends.step(self._batch(stepped, optimizer))
            return
        groups: dict[object, list[Stepped]] = {}
        for item in stepped:
            groups.setdefault((item.tensor.step, item.theta.device, item.theta.dtype), []).append(item)
        for group in groups.values():
            backends.step(self._batch(group, optimizer))

    def _batch(self, items: Sequence[Stepped], optimizer: Optimizer) -> Batch:
        step = items[0].tensor.step
        tables = self._runs.of(optimizer).tables
        return Batch(items, self.seed, step, self.newborn_since(step), tables, look=self.check_invariants)

    # -- one K for a whole network ----------------------------------------------------------------------------------------

    @override
    def _take(self, module: nn.Module, watch: bool = False, early: bool = True) -> int:
        converted = super()._take(module, watch, early)
        if self.scope == "global":
            for pool in self._pools(self.tracked):
                refuse_small_total(pool.count, [member.total for member in pool.members], self.least_per_layer)
        return converted

    @staticmethod
    def _pools(tensors: Sequence[TrackedTensor]) -> list[Pool]:
        """One for each network; nearly always there is one."""
        return list({id(pool): pool for pool in (_shared(tensor).pool for tensor in tensors)}.values())

    @override
    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        invariants.check_invariants(item, optimizer, self._runs.of(optimizer).starts, least=self.least_per_layer)

    @override
    def statistics(self) -> dict[str, float]:
        """As of the base; under ``scope="global"`` also ``deepr/<tensor>/connectivity``, which moves."""
        found = super().statistics()
        if self.scope == "global":
            found.update({f"deepr/{t.name}/connectivity": t.slots.count / t.slots.total for t in self.tracked})
        return found


def _shared(tensor: TrackedTensor) -> SharedSlots:
    found = tensor.weight
    assert isinstance(found, SharedSlots)
    return found


def _position(item: Stepped) -> int:
    return _shared(item.tensor).position
