"""Check that a layer runs eagerly, on plain tensors, so that a kernel may be called."""

from __future__ import annotations

import torch
from torch import Tensor

transforms = torch._C._functorch.peek_interpreter_stack  # returns None outside of torch.func's transforms
dispatch_modes = torch._C._len_torch_dispatch_stack  # returns 0 if no mode watches operators


def is_plain(x: Tensor) -> bool:
    """Tell whether x is an ordinary tensor, and no dispatch mode, transform or profiler watches the operators."""
    return type(x) is Tensor and dispatch_modes() == 0 and transforms() is None and not torch.autograd._profiler_enabled()
