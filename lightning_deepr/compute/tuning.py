"""The choice of ``compute="tune"`` between dense and sparse: both are timed on this machine, once per shape of layer and input.

The answers are kept in a file beside the compiled kernels, in the user's cache folder. It serves one version of the package and
its sources, of torch, one CPU and one number of threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAME = "tuned.json"
ROUNDS = 5  # in each of which both are timed, after one round that compiles and allocates
BUDGET = 1.0  # seconds after which no further round begins
MOST = 4096  # answers in the file; the oldest go first

_known: dict[str, Times] = {}


class Times(NamedTuple):
    """The seconds of a layer's pass: forward and backward, or forward alone where no gradient is wanted."""

    sparse: float
    dense: float


def times(slots: Any, module: Any, x: Tensor, ask: Callable[[bool], Any]) -> Times | None:
    """Return how long a layer takes with each compute, from the memory, from the file, or by a measurement.

    Args:
        slots: the slots of the layer's weight.
        module: the layer.
        x: its input.
        ask: a function that lets the layer compute this input sparsely (True) or densely until it is called again.

    Returns:
        None: the layer can't be run on its own.
    """
    key = key_of(slots, module, x)
    if key not in _known:
        found = read().get(key)
        if found is None:
            try:
                found = measure(module, x, ask)
            except Exception:  # whatever the layer raises, it raises again in the pass itself
                return None
            write(key, found)
        _known[key] = found
    return _known[key]


def measure(module: Any, x: Tensor, ask: Callable[[bool], Any], now: Callable[[], float] = time.perf_counter) -> Times:
    """Time both ways in turn, on this input. No gradient is accumulated, and no hook of the module is called."""
    forward = type(module).forward
    theta = module.parametrizations["weight"].original
    wants = torch.is_grad_enabled() and theta.requires_grad
    best = {True: float("inf"), False: float("inf")}
    began = now()
    for turn in range(1 + ROUNDS):
        for sparse in (True, False):
            ask(sparse)
            leaf = x.detach().requires_grad_(wants and x.requires_grad)
            started = now()
            y = forward(module, leaf)
            if wants:
                torch.autograd.grad(y, [theta, leaf] if leaf.requires_grad else [theta], torch.ones_like(y))
            if turn:
                best[sparse] = min(best[sparse], now() - started)
        if turn and now() - began > BUDGET:
            break
    return Times(best[True], best[False])


def key_of(slots: Any, module: Any, x: Tensor) -> str:
    """Name what an answer depends on."""
    kind = next(base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules"))
    wants = torch.is_grad_enabled() and (bool(x.requires_grad), bool(slots.ranked))
    parts = kind, module.extra_repr(), slots.count, tuple(x.shape), x.dtype, slots.weight_dtype, x.stride(), wants
    return "; ".join(map(str, (*parts, f"{torch.get_num_threads()} threads", machine())))


@cache
def machine() -> str:
    """Name the versions and the CPU for which times hold."""
    import llvmlite.binding

    from lightning_deepr._version import __version__
    from lightning_deepr.kernels.cpu import disk_cache

    return f"{__version__} {disk_cache._sources[:12]}, torch {torch.__version__}, {llvmlite.binding.get_host_cpu_name()}"


def path() -> Path | None:
    """Return the path of the file; None: the user has no cache folder."""
    from lightning_deepr.kernels.cpu import disk_cache

    root = disk_cache.root()
    return None if root is None else root / NAME


def read() -> dict[str, Times]:
    """Read the file. What is not a pair of times is left out; without a file, or with a damaged one, there is nothing."""
    where, found = path(), dict[str, Times]()
    with contextlib.suppress(OSError, ValueError):
        if where is not None:
            entries = json.loads(where.read_text(encoding="utf-8"))
            for key, value in entries.items() if isinstance(entries, dict) else ():
                if isinstance(value, list) and len(value) == 2 and all(type(one) is float and one > 0 for one in value):
                    found[key] = Times(*value)
    return found


def write(key: str, found: Times) -> None:
    """Add an answer to the file. Another process may do so at the same time: then one of the two is measured again later."""
    where = path()
    if where is None:
        return
    entries = {**read(), key: found}
    kept = dict(list(entries.items())[-MOST:])
    own = where.with_name(f"{NAME}.{secrets.token_hex(8)}")
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(kept, indent=0), encoding="utf-8")
        os.replace(own, where)
    except OSError:  # the answer holds for this process
        with contextlib.suppress(OSError):
            own.unlink()
