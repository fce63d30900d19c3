"""LSTM, GRU and RNN with converted weights: each forward builds a weight at most once, and the layer stays copyable.

An LSTM or GRU under sparse compute (:mod:`lightning_deepr.compute.recurrent`) builds no weight at all.

``nn.RNNBase`` keeps a list of its weights between forwards (for cuDNN) and compares it with the attributes at each forward.
Every read of a parametrized weight builds the tensor again, so torch builds each one about 2.5 times per forward. The list
also keeps tensors of the last graph, which ``copy.deepcopy`` refuses to copy. Here the list lives only while the layer runs.
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
    """Give a newly parametrized recurrent layer the behaviour described above."""
    parametrized = type(module)  # a class that belongs to this module alone
    if "_update_flat_weights" in parametrized.__dict__:
        _release(module)
        return
    plain: Any = parametrized.__bases__[0]

    def update_flat_weights(self: Any) -> None:
        # torch's own _init_flat_weights calls hasattr before each getattr, and so reads every weight twice.
        weights = [getattr(self, name) for name in self._flat_weights_names]
        self._flat_weights = [weight.build() if isinstance(weight, SparseWeight) else weight for weight in weights]
        self.flatten_parameters()

    def init_flat_weights(self: Any) -> None:
        _release(self)  # `.to` calls this; the list is not kept between forwards

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
    """Rebuild torch's own list when no tensor of the layer is converted any more."""
    if "_update_flat_weights" not in type(module).__dict__:
        module._init_flat_weights()


def _release(module: Any) -> None:
    # as long as torch's list, since an assignment of a parameter (load_state_dict(assign=True)) writes its entry
    module._flat_weights = [None] * len(module._flat_weights_names)
    module._flat_weight_refs = []


# (the kernels' sequences read no second weight beside the connections)
RECURRENT = LayerCompute(capable, take_over=take_over, give_back=give_back, adapts=False)
