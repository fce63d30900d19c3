"""LSTM, GRU and RNN with converted weights: each tensor is built once per forward or, where an LSTM or GRU is computed from its
connections (:mod:`lightning_deepr.compute.recurrent`), never; and the layer stays copyable.

``nn.RNNBase`` keeps a list of its weights between forwards (for cuDNN) and compares it with the attributes at each forward.
With a parametrized weight every read builds the tensor anew, so that torch builds each about 2.5 times per forward; and
the list keeps tensors of the last graph, on which ``copy.deepcopy`` raises. Here the list lives only while the layer runs.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lightning_deepr.compute.layer import LayerCompute
from lightning_deepr.compute.recurrent import capable, sparse_forward
from lightning_deepr.compute.weight import SparseWeight

_NAMES = ("_update_flat_weights", "forward", "_init_flat_weights", "__deepcopy__")


def take_over(module: nn.RNNBase, tensor_name: str) -> None:
    """Give a recurrent layer that has just been parametrized the behaviour described above."""
    parametrized = type(module)  # a class of its own, which torch made for this very module
    if "_update_flat_weights" in parametrized.__dict__:
        _release(module)
        return
    plain: Any = parametrized.__bases__[0]

    def update_flat_weights(self: Any) -> None:
        # (torch's own _init_flat_weights asks hasattr before each getattr, and so reads every weight twice)
        weights = [getattr(self, name) for name in self._flat_weights_names]
        self._flat_weights = [weight.build() if isinstance(weight, SparseWeight) else weight for weight in weights]
        self.flatten_parameters()

    def init_flat_weights(self: Any) -> None:
        _release(self)  # called by `.to`: nothing to keep between forwards

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = sparse_forward(plain, self, *args, **kwargs)
        if found is not None:
            return found
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            _release(self)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        _release(self)
        replica = self.__new__(type(self))
        memo[id(self)] = replica
        replica.__dict__ = copy.deepcopy(self.__dict__, memo)
        return replica

    for name, function in zip(_NAMES, (update_flat_weights, forward, init_flat_weights, deepcopy), strict=True):
        setattr(parametrized, name, function)
    _release(module)


def give_back(module: nn.RNNBase, tensor_name: str) -> None:
    """After a conversion was undone: rebuild torch's own list if no tensor of the layer is converted any more."""
    if "_update_flat_weights" not in type(module).__dict__:
        module._init_flat_weights()


def _release(module: Any) -> None:
    module._flat_weights = []
    module._flat_weight_refs = []


RECURRENT = LayerCompute(capable, take_over=take_over, give_back=give_back)
