"""Record the operators that run and the sizes of the tensors that they make."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_deepr.compute.weight import SparseWeight


class Recording(TorchDispatchMode):
    """A mode that records the names of operators and the number of elements of every tensor that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()
        self.names: list[str] = []

    @property
    def largest(self) -> int:
        return max(self.sizes, default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self.sizes |= {
            value.numel()
            for value in tree_leaves(result)
            if isinstance(value, Tensor) and type(value) is not SparseWeight and value.device.type != "meta"
        }
        return result
