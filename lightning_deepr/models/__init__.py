"""The networks of the paper's benchmarks, and two more of the zoo."""

from lightning_deepr.models.paper import CIFAR10CNN, BLSTMClassifier, LeNet300100, ResponseNorm
from lightning_deepr.models.resnet import ResNet20
from lightning_deepr.models.transformer import CharTransformer

__all__ = ["CIFAR10CNN", "BLSTMClassifier", "CharTransformer", "LeNet300100", "ResNet20", "ResponseNorm"]
