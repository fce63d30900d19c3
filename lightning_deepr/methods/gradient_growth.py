"""Growth by the dense gradient, which exists only during the steps that need it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.methods.drop_and_grow import DropAndGrow
from lightning_deepr.training.tracked import Stepped, TrackedTensor


class DenseGradient:
    """The sum of a transient weight's gradient over the backward passes of one optimizer step.

    Args:
        theta: the tensor's parameter. If its gradient was cleared, a new sum begins, so a skipped step leaves nothing behind.
    """

    def __init__(self, theta: nn.Parameter) -> None:
        self.theta = theta
        self.sum: Tensor | None = None
        self._pass = -1

    def __call__(self, gradient: Tensor) -> None:
        this_pass = torch._C._current_graph_task_id()
        # autograd writes theta's own gradient after the weight's, at the end of the pass
        cleared = self.theta.grad is None or not bool(self.theta.grad.any())
        if self.sum is None or (cleared and this_pass != self._pass):
            self.sum = gradient.detach().clone()
        else:
            self.sum.add_(gradient.detach())
        self._pass = this_pass


class GradientGrowth(DropAndGrow):
    """Base of the methods that use the gradient of the whole weight, including dormant places.

    If :meth:`wants_gradient` is true for a step, the layers compute with dense weights in its forward and backward passes, and
    the dense gradients are summed until the step is over. Everything else has size K. This does not work under
    ``torch.compile``.
    """

    def wants_gradient(self, tensor: TrackedTensor, done: int) -> bool:
        """Whether a step needs the dense gradient. The default: a step that rewires needs it.

        Args:
            tensor: the tensor.
            done: the number of steps of this training before it.
        """
        return self.rewires(done)

    def gradient_of(self, item: Stepped) -> Tensor:
        """Return a tensor's dense gradient of this step, in the weight's shape. Call it once per step.

        In a distributed run the gradients of all ranks are summed.

        Raises:
            RuntimeError: no backward pass reached the weight in this step.
        """
        collected = item.tensor.slots.on_dense_gradient
        if not isinstance(collected, DenseGradient) or collected.sum is None:
            raise RuntimeError(
                f"{type(self).__name__}: `{item.tensor.name}` updates its connectivity in step {item.tensor.step}, but its "
                "dense gradient was not seen: expected a backward pass through the layer's weight in this step. "
                "(torch.compile hides it.)"
            )
        gradient, collected.sum = collected.sum, None
        alone = item.tensor.slots.is_block  # this rank has all of these rows
        if not alone and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)  # the sum ranks places as the mean does
        return gradient

    def regrow(self, item: Stepped, dropped: Tensor, score: Tensor) -> None:
        """Grow where a score is largest among the dormant places. A connection that would be dropped and grown again stays.

        Args:
            item: the tensor.
            dropped: the slots to drop, int64.
            score: the score of each place, in the weight's shape, at least 0. This method writes to it.
        """
        slots, score = item.tensor.slots, score.reshape(-1)
        survives = torch.ones_like(slots.places, dtype=torch.bool)
        survives[dropped] = False
        if slots.allowed is not None:
            elsewhere = torch.ones_like(score, dtype=torch.bool)
            elsewhere[slots.allowed.places(score.device)] = False
            score[elsewhere] = -1.0
        score[slots.places[survives]] = -1.0
        grown = score.topk(dropped.numel()).indices
        again = torch.isin(slots.places[dropped], grown)
        places = grown[~torch.isin(grown, slots.places[dropped])].sort().values
        self.rebirth(item, dropped[~again], places)

    @override
    def can_update(self, item: Stepped) -> bool:
        # if no backward pass of this step reached the layer (its gradient is 0 instead of None), there is no score
        collected = item.tensor.slots.on_dense_gradient
        unseen = isinstance(collected, DenseGradient) and collected.sum is None
        return not unseen or bool(item.tensor.theta.grad.any())  # type: ignore[union-attr]

    # -- which steps need the dense gradient --------------------------------------------------------------------------------

    @override
    def begin(self, tensors: Sequence[TrackedTensor]) -> None:
        for tensor in tensors:
            self._expect(tensor, tensor.done)

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> None:
        super().after_step(stepped, optimizer)
        for item in stepped:
            self._expect(item.tensor, item.tensor.done + 1)

    @override
    def end(self) -> None:
        for tensor in self.tracked:
            tensor.slots.on_dense_gradient = None

    def _expect(self, tensor: TrackedTensor, done: int) -> None:
        """Collect the next step's dense gradient if that step needs it. Drop any earlier sum."""
        tensor.slots.on_dense_gradient = DenseGradient(tensor.theta) if self.wants_gradient(tensor, done) else None
