"""The networks of the paper's benchmarks."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet300100(nn.Module):
    """LeNet-300-100: fully connected 784-300-100-10 with ReLU, as in Han et al. (2015) and the paper's MNIST experiment.

    266,200 weights. The authors' scripts have no biases; here they are optional and stay dense.

    Args:
        bias: whether the layers have biases.

    Shapes:
        input [batch, 1, 28, 28] or [batch, 784], output [batch, 10] (logits).

    Example::

        >>> import torch
        >>> LeNet300100()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300, bias=bias)
        self.fc2 = nn.Linear(300, 100, bias=bias)
        self.fc3 = nn.Linear(100, 10, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x.flatten(1)).relu()
        return self.fc3(self.fc2(x).relu())
