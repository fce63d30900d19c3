"""DEEP R, the callback."""

# no `from __future__ import annotations`: see training/arguments.py

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.algorithm.shared_rewiring import RULES
from lightning_deepr.conversion.sharing import refuse_small_total
from lightning_deepr.methods.slot_training import SlotTraining
from lightning_deepr.training import backends, guards, invariants
from lightning_deepr.training.arguments import SCOPES, Alpha, RewiringArguments, check_count, check_word
from lightning_deepr.training.backends import Batch
from lightning_deepr.training.tracked import Stepped, TrackedTensor
from lightning_deepr.weights.shared import Pool, SharedSlots


@dataclass(kw_only=True, eq=False, repr=False)
class DeepR(RewiringArguments, SlotTraining):
    """DEEP R: exactly K connections at every step, rewired after each optimizer step (Algorithm 1 of the paper).

    It works with any optimizer. After ``optimizer.step()``:

    1. theta loses eta * alpha and takes a step of a random walk; eta is the plain learning rate of theta's parameter group.
    2. Connections with theta < 0 go dormant.
    3. The same number of dormant places, drawn uniformly, become active at theta = 0.

    Args:
        l1: alpha; "auto" (the same as ``TurnoverTarget()``) | TurnoverTarget(start, shape): alpha is steered so that the wanted
            share of the connections is reborn per step, which falls to 0 over the training | float | LinearDecay(start, end)
            | function of the progress | dict {pattern: one of these}; None: a constant by the optimizer (1e-4 /
            (1 - momentum) under SGD, .03 under Adam's family and RMSprop).
        scope: "layer": K per tensor. "global": one K for the whole network; a connection that goes dormant may be replaced by
            one in another layer. All layers share one theta, so they belong in one parameter group of one optimizer.
            ``connectivity`` sets K, ``distribution`` the start. (A compiled network is compiled again when counts change, and
            soon runs uncompiled.)
        reactivation: the choice of a newborn's layer under ``scope="global"``. "budget": the layer is drawn with probability
            proportional to its number of connections at the start (N_l * p_l, as in the authors' script), then one of its
            dormant places. "uniform": one of all dormant places of the network. A full layer is never chosen.
        least_per_layer: the least number of connections of a layer under ``scope="global"``. A layer with fewer gets births
            before the rule applies. 0: layers may become empty, which cuts a chain of layers.

    Raises:
        TypeError, ValueError: an argument is invalid, or it does not fit the model (at ``setup``).
        RuntimeError: a theta or a gradient is not finite before the step.

    Note:
        The paper's setting is ``l1=1e-4, lr_scale=1, newborn="start"``.
        Strategies that shard parameters are refused.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_deepr import DeepR
        >>> trainer = Trainer(callbacks=[DeepR(connectivity=0.01)], logger=False, enable_checkpointing=False)
    """

    l1: Alpha | dict[str, Alpha] | Callable | None = "auto"
    scope: str = "layer"
    reactivation: str = "budget"
    least_per_layer: int = 1
    watches_for_collapse = True
    log_name = "deepr"

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
        step, dtype = stepped[0].tensor.step, stepped[0].theta.dtype
        for item in stepped:
            theta = item.theta
            if item.tensor.step != step or not theta.is_cpu or theta.dtype is not dtype:
                break
        else:  # nearly always (the Python object of a device takes a microsecond)
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
        seed = cast("int", self.seed)  # known since the conversion
        return Batch(items, seed, step, self.newborn_since(step), tables, look=self.check_invariants)

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
        """List the pools, one per network. Nearly always there is one."""
        return list({id(pool): pool for pool in (_shared(tensor).pool for tensor in tensors)}.values())

    @override
    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        invariants.check_invariants(item, least=self.least_per_layer)

    @override
    def _of_tensors(self) -> dict[str, float]:
        found = super()._of_tensors()
        if self.scope == "global":
            found.update({f"{t.name}/connectivity": t.slots.count / t.slots.total for t in self.tracked})
        return found


def _shared(tensor: TrackedTensor) -> SharedSlots:
    found = tensor.weight
    assert isinstance(found, SharedSlots)
    return found


def _position(item: Stepped) -> int:
    return _shared(item.tensor).position
