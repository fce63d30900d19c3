"""Check that a layer runs eagerly, on plain tensors, so that a kernel may be called.

A kernel reads and writes memory, and nothing that watches PyTorch's operators sees it. A tracer would record the uninitialized
result as a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from lightning_deepr.kernels.gate import foreign

transforms = torch._C._functorch.peek_interpreter_stack  # returns None outside of torch.func's transforms
dispatch_modes = torch._C._len_torch_dispatch_stack  # returns 0 if no mode watches operators
function_modes = torch._C._len_torch_function_stack  # returns 0 if no mode watches calls (``torch.device(...)`` does)
is_jit_tracing = torch._C._is_tracing
_before_dispatch = torch._ops._len_torch_dispatch_stack_pre_dispatch
_PROXY = torch._C._TorchDispatchModeKey.PROXY
TRACED = (
    'Nothing may record a kernel: expected the layer\'s forward to be recorded from its beginning. Use compute="dense", or '
    "`lightning_deepr.export.to_onnx` to export a network."
)


def is_recorded() -> bool:
    """Tell whether operators are recorded to run again later: torch.jit.trace, torch.export, make_fx, the ONNX exporters.

    torch.compile does not count: a compiled layer calls the operators of this package.
    """
    if is_jit_tracing():
        return True
    if dispatch_modes() == 0 and function_modes() == 0:
        return False
    return torch.compiler.is_exporting() or torch._C._get_dispatch_mode(_PROXY) is not None or _before_dispatch() > 0


def is_watched() -> bool:
    """Tell whether a mode, a transform, a tracer or forward-mode differentiation needs to see the operators of a layer."""
    return (
        dispatch_modes() != 0
        or transforms() is not None
        or is_jit_tracing()
        or forward_ad._current_level >= 0
        or (function_modes() != 0 and is_recorded())
    )


def is_plain(x: Tensor) -> bool:
    """Tell whether x is an ordinary tensor, and no mode, transform, tracer or profiler watches the operators."""
    return type(x) is Tensor and not is_watched() and not torch.autograd._profiler_enabled()


def needs_operators(convolution: bool = False) -> bool:
    """Tell whether a layer has to run in PyTorch's own operators: they are recorded, or transformed in a way that ours are not.

    Args:
        convolution: whether it is a convolution, which has no form for the transforms of ``torch.func``.
    """
    if forward_ad._current_level >= 0 or is_recorded():
        return True
    if transforms() is None:
        return False
    return convolution or any(level.key().name not in ("Grad", "Vmap") for level in _levels())


def _levels() -> Any:
    return torch._C._functorch.get_interpreter_stack() or ()


@contextmanager
def unwatched() -> Iterator[None]:
    """Work with tensors that belong to no mode or trace: the order of the connections outlives a pass under one."""
    trace = torch._C._get_tracing_state()
    if trace is None and dispatch_modes() == 0 and function_modes() == 0:
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(trace)  # type: ignore[attr-defined]


def check_backward(dtype: torch.dtype, gradients: Sequence[Tensor], *thetas: tuple[Tensor, int]) -> None:
    """Refuse a backward pass whose tensors a kernel must not read.

    Args:
        dtype: the dtype of the layer.
        gradients: the gradients of the layer's outputs.
        thetas: each theta as it is now, and K.

    Raises:
        RuntimeError: theta was exchanged after the forward pass, or the backward pass is recorded or batched and the forward
            pass was not.
    """
    for theta, count in thetas:
        if theta.numel() != count or theta.dtype is not dtype or not theta.is_contiguous():
            raise RuntimeError(
                f"theta was exchanged between the forward and the backward pass: expected K = {count} values of {dtype}, found "
                f"shape {tuple(theta.shape)} of {theta.dtype} on {theta.device}. Exchange it between whole steps."
            )
    for gradient in gradients:
        if type(gradient) is Tensor and dispatch_modes() == 0 and transforms() is None and not is_jit_tracing():
            continue
        found = foreign(gradient)
        if found is not None or is_recorded():
            raise RuntimeError(
                f"The backward pass of a sparse layer: expected a plain gradient, found {found or 'a tracer'}. {TRACED}"
            )
