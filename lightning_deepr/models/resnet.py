"""ResNet-20 for images of 32 x 32."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad


class _Block(nn.Module):
    """Two convolutions of 3 x 3 and a shortcut without parameters (option A of the ResNet paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.missing:
            x = pad(x, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        return (x + y).relu()


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2): 16, 32 and 64 channels, three blocks each; 268,336 weights.

    The shortcuts have no parameters: they skip pixels and add channels of zeros (option A). Convolutions start as in He et al.
    (2015). The convolutions have 267,696 weights, the last layer has 640.

    Args:
        classes: number of classes.
        blocks: blocks per stage; 3 gives 20 layers, 5 gives 32.

    Shapes:
        input [batch, 3, H, W] (32 x 32 for CIFAR), output [batch, classes] (logits).

    Example::

        >>> import torch
        >>> ResNet20()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, outputs in enumerate((16, 32, 64), start=1):
            layers = []
            for number in range(blocks):
                layers.append(_Block(channels, outputs, stride=2 if stage > 1 and number == 0 else 1))
                channels = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x)  # type: ignore[operator] # set by setattr
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
