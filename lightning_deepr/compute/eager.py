"""Whether a layer runs eagerly, on plain tensors: where a kernel may be called."""

from __future__ import annotations

import torch
from torch import Tensor

transforms = torch._C._functorch.peek_interpreter_stack  # None where no transform of torch.func is at work
dispatch_modes = torch._C._len_torch_dispatch_stack  # 0 where nobody watches operators


def is_plain(x: Tensor) -> bool:
    """Whether nobody watches or transforms operators: no fake or functional tensors, transforms or profiler."""
    return type(x) is Tensor and dispatch_modes() == 0 and transforms() is None and not torch.autograd._profiler_enabled()
