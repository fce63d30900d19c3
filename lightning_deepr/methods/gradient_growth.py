"""Growth by the dense gradient, which exists only in the steps that need it, and is gone after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.methods.drop_and_grow import DropAndGrow
from lightning_deepr.training.tracked import Stepped, TrackedTensor


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


class GradientGrowth(DropAndGrow):
    """Base of the methods that look at the gradient of the whole weight, dormant places included.

    In the forward and backward passes of a step for which :meth:`wants_gradient` says so, the layers run by their dense weights; the
    gradient of each is summed up until that step is over. Everything else is K-sized. Not under ``torch.compile``.
    """

    def wants_gradient(self, tensor: TrackedTensor, done: int) -> bool:
        """Whether a step needs the dense gradient, by how many steps of this training came before it: if it rewires."""
        return self.rewires(done)

    def gradient_of(self, item: Stepped) -> Tensor:
        """The dense gradient of a tensor in this step, of the weight's shape; once per step. On several ranks it is their sum.

        Raises:
            RuntimeError: none was seen.
        """
        collected = item.tensor.slots.on_dense_gradient
        if not isinstance(collected, DenseGradient) or collected.sum is None:
            raise RuntimeError(
                f"{type(self).__name__}: `{item.tensor.name}` updates its connectivity in step {item.tensor.step}, but its dense gradient "
                "was not seen: expected a backward pass through the layer's weight in this step. (Under torch.compile it can't be seen.)"
            )
        gradient, collected.sum = collected.sum, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)  # the sum ranks as the mean does
        return gradient

    def regrow(self, item: Stepped, dropped: Tensor, score: Tensor) -> None:
        """Grow where a score is largest among the dormant places; what is dropped and grown at once stays as it is.

        Args:
            item: the tensor.
            dropped: int64 slots.
            score: of the weight's shape, at least 0; written to.
        """
        slots, score = item.tensor.slots, score.reshape(-1)
        survives = torch.ones_like(slots.places, dtype=torch.bool)
        survives[dropped] = False
        score[slots.places[survives]] = -1.0
        grown = score.topk(dropped.numel()).indices
        again = torch.isin(slots.places[dropped], grown)
        places = grown[~torch.isin(grown, slots.places[dropped])].sort().values
        self.rebirth(item, dropped[~again], places)

    @override
    def can_update(self, item: Stepped) -> bool:
        # a layer that no backward pass of this step reached (its gradient is 0 instead of None) has nothing to go by
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
        """Have the next step's dense gradient collected if that step needs it; what was collected for another is dropped."""
        tensor.slots.on_dense_gradient = DenseGradient(tensor.theta) if self.wants_gradient(tensor, done) else None
