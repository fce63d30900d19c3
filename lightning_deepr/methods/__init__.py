"""The callbacks: DEEP R, soft-DEEP R, the methods for comparison, and the bases for your own methods."""

from lightning_deepr.methods.deepr import DeepR
from lightning_deepr.methods.drop_and_grow import DropAndGrow
from lightning_deepr.methods.fixed_random import FixedRandom
from lightning_deepr.methods.gradient_growth import GradientGrowth
from lightning_deepr.methods.pruning import L1Shrinkage, MagnitudePruning
from lightning_deepr.methods.rigl import RigL
from lightning_deepr.methods.set import SET
from lightning_deepr.methods.slot_training import SlotTraining
from lightning_deepr.methods.soft_deepr import SoftDeepR

METHODS = ("DeepR", "FixedRandom", "L1Shrinkage", "MagnitudePruning", "RigL", "SET", "SoftDeepR")

__all__ = [
    "METHODS",
    "SET",
    "DeepR",
    "DropAndGrow",
    "FixedRandom",
    "GradientGrowth",
    "L1Shrinkage",
    "MagnitudePruning",
    "RigL",
    "SlotTraining",
    "SoftDeepR",
]
