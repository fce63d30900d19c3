"""The callbacks: DEEP R, soft-DEEP R, and what they are compared with."""

from lightning_deepr.methods.deepr import DeepR
from lightning_deepr.methods.fixed_random import FixedRandom
from lightning_deepr.methods.pruning import L1Shrinkage, MagnitudePruning
from lightning_deepr.methods.rigl import RigL
from lightning_deepr.methods.set import SET
from lightning_deepr.methods.soft_deepr import SoftDeepR

__all__ = ["SET", "DeepR", "FixedRandom", "L1Shrinkage", "MagnitudePruning", "RigL", "SoftDeepR"]
