"""Small optimizers that hold another one, or keep their state elsewhere than in a flat dict per parameter."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import optim


class Forwarding(optim.Optimizer):
    """As accelerate's: it calls no ``Optimizer.__init__`` and has the groups and the state of the inner one."""

    def __init__(self, wrapped: optim.Optimizer) -> None:
        self.wrapped, self.accumulates = wrapped, False

    state = property(lambda self: self.wrapped.state)  # type: ignore[assignment]
    param_groups = property(lambda self: self.wrapped.param_groups)  # type: ignore[assignment]
    defaults = property(lambda self: self.wrapped.defaults)  # type: ignore[assignment]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.wrapped.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if not self.accumulates:
            return self.wrapped.step(closure)
        return None


class Lookahead(optim.Optimizer):
    """Slow weights in a dict by parameter, or in lists that are parallel to the groups. It has none of torch's hooks."""

    hooks = False

    def __init__(self, fast: optim.Optimizer, kind: str, every: int = 3) -> None:
        if self.hooks:
            super().__init__(fast.param_groups, {"every": every})
        self.param_groups, self.every, self.taken = fast.param_groups, every, 0
        self.inside = {"optimizers": [fast]}
        groups = [list(group["params"]) for group in fast.param_groups]
        self.slow: Any
        if kind == "dict":
            self.slow = {p: p.detach().clone() for group in groups for p in group}
        elif kind == "id":
            self.slow = {"weights": {id(p): [p.detach().clone()] for group in groups for p in group}}
        elif kind == "flat":
            self.slow = [p.detach().clone() for group in groups for p in group]
        else:
            self.slow = [[p.detach().clone() for p in group] for group in groups]
        self.kind = kind
        if not self.hooks:
            self.state, self.defaults = {}, {}  # type: ignore[assignment]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.fast.zero_grad(set_to_none)

    @property
    def fast(self) -> optim.Optimizer:
        return self.inside["optimizers"][0]

    def slow_of(self, p: Any) -> Any:
        if self.kind == "dict":
            return self.slow[p]
        if self.kind == "id":
            return self.slow["weights"][id(p)][0]
        flat = self.slow if self.kind == "flat" else [one for group in self.slow for one in group]
        return next(s for s, q in zip(flat, [q for g in self.param_groups for q in g["params"]], strict=True) if q is p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.fast.step(closure)
        self.taken += 1
        if self.taken % self.every == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    slow = self.slow_of(p)
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)
        return loss


class HookedLookahead(Lookahead):
    """The same, with torch's hooks."""

    hooks = True
    zero_grad = optim.Optimizer.zero_grad


class LateLookahead(Lookahead):
    """As timm's: it has lists of hooks, but calls them only after the first ``zero_grad``, with which torch hooks its step."""

    zero_grad = optim.Optimizer.zero_grad

    def __init__(self, fast: optim.Optimizer, kind: str) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        super().__init__(fast, kind)


class SAM(optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021), with a closure or by two calls."""

    def __init__(self, params: Any, lr: float, rho: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})
        self.base_optimizer = optim.Adam(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.detach().clone()
                p.add_(p.grad, alpha=group["rho"])

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


class Twice(optim.Adam):
    """A step that calls the step of the base class: torch's hooks run twice."""

    def step(self, closure: Any = None) -> Any:
        optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # an Adam exists, so that Adam.step is hooked, too
        return super().step(closure)


class Nested(optim.Optimizer):
    """A second moment in a list (starts at 2), a momentum in a dict of a dict. It draws from the global generator."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["Q"] = [torch.full_like(p, 2.0), "expression"]
                    state["more"] = {"inner": {"momentum": torch.zeros_like(p)}}
                torch.rand(1)
                second, momentum = state["Q"][0], state["more"]["inner"]["momentum"]
                second.mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                momentum.mul_(0.9).add_(p.grad)
                p.addcdiv_(momentum, second.sqrt(), value=-group["lr"])
