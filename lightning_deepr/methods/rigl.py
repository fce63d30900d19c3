"""RigL on K slots: the dense gradient exists only in the steps that rewire, and is gone after them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.methods.drop_and_grow import DropAndGrow
from lightning_deepr.training.tracked import Reborn, Stepped, TrackedTensor


class DenseGradient:
    """Sums up a transient weight's gradient over the backward passes of one optimizer step.

    Args:
        theta: of the tensor: where its gradient was cleared, a new sum begins (a step that was skipped leaves none behind).
    """

    def __init__(self, theta: nn.Parameter) -> None:
        self.theta = theta
        self.sum: Tensor | None = None
        self._pass = -1

    def __call__(self, gradient: Tensor) -> None:
        this_pass = torch._C._current_graph_task_id()
        # theta's own gradient comes after the weight's, at the end of the pass
        cleared = self.theta.grad is None or not bool(self.theta.grad.any())
        if self.sum is None or (cleared and this_pass != self._pass):
            self.sum = gradient.detach().clone()
        else:
            self.sum.add_(gradient.detach())
        self._pass = this_pass


class RigL(DropAndGrow):
    """Drops the smallest weights, grows where the dense gradient is largest (Evci et al. 2020, "Rigging the lottery").

    The fraction falls as a cosine from ``drop_fraction`` to 0 at ``rewire_until`` (None: at the end of the training; it stays as it
    is where that is not known). In the forward and backward passes of a step that
    rewires, the layers run by their dense weights; the gradient of each is kept until that step is over. Everything else is K-sized.
    On several ranks the gradients are averaged over them. Not under ``torch.compile``.

    Args:
        distribution: "erk" is RigL's own.

    Raises:
        RuntimeError: in an update, no gradient of a dense weight was seen.

    Example::

        >>> from lightning_deepr import RigL, sparsify
        >>> net = sparsify(torch.nn.Linear(100, 10), 0.05)
        >>> rewiring = RigL().attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1000)
    """

    @override
    def fraction(self, item: Stepped) -> float:
        until = self.rewire_until
        end = self._total_steps if until is None else until * (self._total_steps or 0.0) if isinstance(until, float) else until
        done = item.tensor.step - item.tensor.start
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(done / end, 1.0))) if end else self.drop_fraction

    @override
    def can_update(self, item: Stepped) -> bool:
        # a layer that no backward pass of this step reached (its gradient is 0 instead of None) has nothing to go by
        collected = item.tensor.slots.on_dense_gradient
        unseen = isinstance(collected, DenseGradient) and collected.sum is None
        return not unseen or bool(item.tensor.theta.grad.any())  # type: ignore[union-attr]

    @override
    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> list[Tensor]:
        return [self._grow(item, slots) for item, slots in zip(items, weakest, strict=True)]

    def _grow(self, item: Stepped, dropped: Tensor) -> Tensor:
        tensor, slots = item.tensor, item.tensor.slots
        collected = slots.on_dense_gradient
        if not isinstance(collected, DenseGradient) or collected.sum is None:
            raise RuntimeError(
                f"RigL: `{tensor.name}` updates its connectivity in step {tensor.step}, but its dense gradient was not seen: expected "
                "a backward pass through the layer's weight in this step. (Under torch.compile it can't be seen.)"
            )
        gradient, collected.sum = collected.sum, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)  # the sum ranks as the mean does
        score = gradient.reshape(-1).abs_()
        survives = torch.ones_like(slots.places, dtype=torch.bool)
        survives[dropped] = False
        score[slots.places[survives]] = -1.0
        grown = score.topk(dropped.numel()).indices
        # a connection that is dropped and grown at once stays as it is
        again = torch.isin(slots.places[dropped], grown)
        places = grown[~torch.isin(grown, slots.places[dropped])].sort().values
        reborn = dropped[~again]
        item.theta.index_fill_(0, reborn, 0.0)
        slots.places.index_copy_(0, reborn, places)
        slots.signs.index_copy_(0, reborn, slots.signs_at(places))
        slots.born.index_fill_(0, reborn, tensor.step)
        return reborn

    # -- which steps need the dense gradient --------------------------------------------------------------------------------

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> list[Reborn]:
        reborn = super().after_step(stepped, optimizer)
        for item in stepped:
            self._expect(item.tensor, item.tensor.step + 1 - item.tensor.start)
        return reborn

    def _expect(self, tensor: TrackedTensor, done: int) -> None:
        """Have the next step's dense gradient collected if that step rewires; what was collected for another is dropped."""
        tensor.slots.on_dense_gradient = DenseGradient(tensor.theta) if self.rewires(done) else None

    @override
    def _begin_training(self) -> None:
        super()._begin_training()
        self._expect_all()

    @override
    def _apply_loaded(self) -> None:
        super()._apply_loaded()
        if self._hooks or self._at_fabric:  # a loop at work: a state is loaded, or a further network is taken charge of
            self._expect_all()

    def _expect_all(self) -> None:
        for tensor in self._tensors:
            self._expect(tensor, tensor.step - tensor.start)

    @override
    def _release(self) -> None:
        super()._release()
        for tensor in self._tensors:
            tensor.slots.on_dense_gradient = None
