"""soft-DEEP R, the callback."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr import kernels
from lightning_deepr.algorithm import soft_rewiring
from lightning_deepr.algorithm.lr_scale import Exponents
from lightning_deepr.methods.dense_training import DenseTraining, on_host
from lightning_deepr.packages.messages import rank_zero_warn
from lightning_deepr.training import invariants
from lightning_deepr.training.arguments import RewiringArguments, ScaledArguments
from lightning_deepr.training.schedules import LinearDecay, LrPower
from lightning_deepr.training.statistics import connectivity_of
from lightning_deepr.training.tracked import Reborn, Stepped
from lightning_deepr.weights.dense_theta import SoftTheta


@dataclass(kw_only=True, eq=False, repr=False)
class SoftDeepR(RewiringArguments, ScaledArguments, DenseTraining):
    """soft-DEEP R (Algorithm 2 of the paper): a random walk of dormant connections, with no hard bound on the active ones.

    Every potential connection has a theta. Memory and time are those of the dense network, plus two numbers for each weight:
    its sign, and theta before the optimizer's step. With ``lr_scale`` it is three numbers.

    It works with any optimizer. After ``optimizer.step()``:

    - An active theta loses eta * alpha and takes a step of a random walk; eta is its parameter group's plain learning rate.
    - A dormant theta (theta < 0) returns to its value before the optimizer's step, which undoes gradient, momentum and weight
      decay. It has no L1, and takes a step of the same random walk.
    - No theta falls below theta_min.
    - The optimizer's state of dormant connections gets its starting values, if the state has an entry per weight. A state that
      an optimizer computes from a whole tensor (Adafactor's rows and columns) sees dormant thetas, with gradients of 0.

    The training starts at the wanted connectivity, with dormant thetas uniform on [theta_min, 0). (The authors' script starts
    at half of it by mistake.) Then the connectivity is free: see ``deepr/<tensor>/connectivity`` in :meth:`statistics` and in
    the Trainer's loggers. theta_min holds it in the stationary state without data, where active thetas lie within about
    T / alpha of 0. The start or the data can hold further connections far above that. At a larger T fewer connections are born
    per step, and the connectivity stays nearer to the wanted one.

    Args:
        temperature: T, required and not 0, since noise alone moves dormant connections. float | dict {pattern: ...} |
            LrPower(coefficient, power) | function of the learning rate. A good first choice is about eta * alpha**2.
        l1: alpha; float | dict {pattern: float} | LinearDecay(start, end) | function of the progress; None: by the optimizer
            (1e-4 / (1 - momentum) under SGD, .03 under Adam's family and RMSprop).
        theta_min: the least theta, below 0. None: -T * (1 - p) / (alpha * p), with each tensor's p = K / N and with its alpha
            and T of the step. If a schedule later sets T or alpha to 0, theta_min keeps its last value.
        init: the start of the active connections: "module" | "largest" | "deepr".
        rewire_every_n_steps: the number of steps between rewirings. In the other steps active thetas stay at or above 0, and
            dormant ones do not move.
        rewire_until: a step (int) or a fraction of the training (float). Then no step rewires.

    Raises:
        TypeError, ValueError: an argument is invalid, or it does not fit the model (at ``setup``).
        RuntimeError: a theta or a gradient is not finite before the step.

    Warns:
        once, if a step is too coarse for theta_min to hold the wanted connectivity: eta * alpha**2 / T is above 2 (simulated
        without data at p = 5 %: a ratio of 200 ends at 15 %, ratios up to 2 end at 4.8 to 5.1 %), or a step of the random walk,
        sqrt(2 * eta * T), is as long as \\|theta_min\\|.

    Example::

        >>> import torch
        >>> from lightning_deepr import SoftDeepR, connectivity_report
        >>> soft = SoftDeepR(0.05, temperature=1e-6, l1=1e-3)
        >>> net = soft.prepare(torch.nn.Linear(100, 10))  # under a Trainer: Trainer(callbacks=[soft]) does it
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> rewiring = soft.attach(net, optimizer)
        >>> connectivity_report(net).active
        50
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(torch.ones(4, 100)).square().sum().backward()
        ...     optimizer.step()
        >>> soft.statistics()["deepr/weight/connectivity"] <= 0.05
        True
    """

    temperature: float | LrPower | dict[str, float | LrPower] | Callable = field()  # required
    l1: float | LinearDecay | dict[str, float | LinearDecay] | Callable | None = None  # type: ignore[assignment] # it takes less
    theta_min: float | None = None
    kind = SoftTheta
    log_name = "deepr"
    lr_exponents = Exponents(normalizing=1.0, plain=0.25)  # not measured for this method
    without_turnover = (
        "Here alpha sets theta_min = -T * (1 - p) / (alpha * p), and with it the connectivity: give a number (a good pair with "
        "temperature: T of about lr * l1**2), LinearDecay(start, end) or a function of the progress."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates is not None:
            raise ValueError(
                "candidates: expected None, since soft-DEEP R has a random walk at every place, found some. Use DeepR, SET, "
                "RigL, FixedRandom or MagnitudePruning."
            )
        if self.theta_min is not None:
            if isinstance(self.theta_min, bool) or not isinstance(self.theta_min, (int, float)):
                raise TypeError(f"theta_min: expected a float below 0 or None, found {self.theta_min!r}.")
            if not (self.theta_min < 0 and math.isfinite(self.theta_min)):
                raise ValueError(f"theta_min: expected a finite value below 0, found {self.theta_min}.")
        if _is_zero(self.temperature):
            raise ValueError(
                "temperature: expected T > 0, found 0: dormant connections move by noise alone, and theta_min = -T * (1 - p) "
                "/ (alpha * p) would be 0. Set temperature to about lr * l1**2 or more (DeepR works at T = 0)."
            )
        if _is_zero(self.l1) and self.theta_min is None:
            raise ValueError(
                "l1: expected alpha > 0, found 0: theta_min = -T * (1 - p) / (alpha * p) is undefined. Set l1, or give "
                "theta_min."
            )

    # -- the algorithm ----------------------------------------------------------------------------------------------------

    @override
    def before_step(self, items: Sequence[Stepped], optimizer: Optimizer) -> None:
        for item in items:
            theta, slots = item.theta, _soft(item)
            if _is_nan(slots.theta_min):
                self._spread(item)
            if slots.before is None or slots.before.shape != theta.shape or slots.before.device != theta.device:
                slots.before = torch.empty_like(theta)
            slots.before.copy_(theta)

    def _spread(self, item: Stepped) -> None:
        """Before the first step, scale the dormant thetas from uniform on [-1, 0) to uniform on [theta_min, 0)."""
        slots, bound = _soft(item), self._bound(item)
        if _is_nan(bound) and on_host(item.lr) == 0:
            return  # the learning rate's warm-up and T begin at 0: nothing moves in this step
        if _is_nan(bound):
            raise ValueError(
                f"`{item.tensor.name}`: theta_min = -T * (1 - p) / (alpha * p) is undefined at the start, with T = "
                f"{float(item.temperature):g} and alpha = {float(item.alpha):g}. Expected both above 0: set temperature and "
                "l1, or give theta_min."
            )
        slots.theta_min = bound
        dormant = item.theta < 0
        smallest = -torch.finfo(item.theta.dtype).tiny  # must not be rounded to 0, which is active
        item.theta.copy_(torch.where(dormant, (item.theta * -bound).clamp(max=smallest), item.theta))

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> None:
        moves = []
        for item in stepped:
            slots, before = _soft(item), _soft(item).before
            if before is None:
                raise RuntimeError(
                    f"{type(self).__name__}: the optimizer took a step, but `before_step` was not called before it."
                )
            moves.append(self._soft_deep_r(item, before))
            states = item.states()
            if states:
                dormant = (before < 0).logical_or_(item.theta < 0)  # before the step or after it
                for _, value, start, _ in states:
                    value.masked_fill_(dormant, start)
            slots.steps = item.tensor.step + 1
            if slots.averages:
                slots.align_averages()
        counts = [torch.as_tensor(move, device=stepped[0].theta.device) for move in moves]
        for item, (births, deaths) in zip(stepped, torch.stack(counts).tolist(), strict=True):  # one transfer from the device
            item.reborn = Reborn(births, deaths)

    def _soft_deep_r(self, item: Stepped, before: Tensor) -> Any:
        """Run Algorithm 2 on one tensor. Returns births and deaths."""
        slots, theta, step, decrement = _soft(item), item.theta, item.tensor.step, item.lr * item.alpha
        scale = (2 * item.lr * item.temperature) ** 0.5
        bound, seed = None, cast("int", self.seed)  # known since the conversion
        if item.rewires and not _is_nan(slots.theta_min):
            slots.theta_min = bound = self._bound(item)
            self._warn_if_coarse(item, bound, scale)
        if kernels.suits(theta):
            from lightning_deepr.kernels.cpu import soft

            numbers = float(decrement), float(scale), None if bound is None else float(bound)
            return soft.step(theta, before, *numbers, slots.index, seed, step)
        nu = soft_rewiring.deviates(slots.shape, slots.index, seed, step, theta.device)
        if bound is None:
            soft_rewiring.step_without_rewiring(theta, before, decrement, scale, nu)
        else:
            soft_rewiring.step(theta, before, decrement, scale, nu, bound)
        was, now = before >= 0, theta >= 0
        return torch.stack([(now & ~was).sum(), (was & ~now).sum()])

    def _bound(self, item: Stepped) -> Any:
        """Return theta_min of this step. If T or alpha is 0: the last theta_min (nan if there was none)."""
        slots = _soft(item)
        if self.theta_min is not None:
            return self.theta_min
        if slots.wanted == slots.total:
            return 0.0
        alpha, temperature = item.alpha, item.temperature
        if on_host(alpha) == 0 or on_host(temperature) == 0:
            return slots.theta_min
        bound = soft_rewiring.theta_min(temperature, alpha, slots.wanted, slots.total)
        tiny = torch.finfo(item.theta.dtype).tiny
        if isinstance(bound, Tensor) and bound.device.type != "cpu":
            last = slots.theta_min
            return torch.where(bound <= -tiny, bound, last) if last == last else bound
        # at a bound that rounds to 0, a dormant theta could not be told from an active one: keep the last bound
        return float(bound) if bound <= -tiny else slots.theta_min

    def _warn_if_coarse(self, item: Stepped, bound: Any, scale: Any) -> None:
        if "coarse" in self._told or _soft(item).wanted == _soft(item).total:
            return
        lr, alpha, temperature = on_host(item.lr), on_host(item.alpha), on_host(item.temperature)
        bound, scale = on_host(bound), on_host(scale)
        if lr is None or alpha is None or temperature is None or bound is None or scale is None:
            return
        name, cure = f"`{item.tensor.name}`, step {item.tensor.step}", "Raise temperature, or lower l1 or the learning rate."
        if self.theta_min is None and temperature and soft_rewiring.drift_ratio(lr, alpha, temperature) > soft_rewiring.COARSE:
            self._told.add("coarse")
            rank_zero_warn(
                f"{name}: the step is too coarse for theta_min to hold the wanted connectivity: eta * alpha**2 / T = "
                f"{soft_rewiring.drift_ratio(lr, alpha, temperature):.3g}, expected at most {soft_rewiring.COARSE:g} "
                f"(simulated without data at p = 5 %: a ratio of 200 ends at 15 %, ratios up to 2 end at 4.8 to 5.1 %). {cure}"
            )
        elif scale >= -bound:
            self._told.add("coarse")
            rank_zero_warn(
                f"{name}: one step of the random walk, sqrt(2 * eta * T) = {scale:.3g}, is as long as |theta_min| = "
                f"{-bound:.3g}: the wanted connectivity will not be held. Lower the learning rate, "
                + ("or raise temperature." if self.theta_min is None else "or give a theta_min further from 0.")
            )

    # -- what it knows and checks -----------------------------------------------------------------------------------------

    @override
    def _of_network(self) -> dict[str, float]:
        found = super()._of_network()
        found.pop("turnover", None)  # births and deaths differ
        return found | {"connectivity": connectivity_of(self.tracked)}

    @override
    def _of_tensors(self) -> dict[str, float]:
        found = {}
        for tensor in self.tracked:
            turnover, slots = tensor.turnover, tensor.weight
            steps = max(turnover.steps, 1)
            found[f"{tensor.name}/connectivity"] = slots.count / slots.total
            found[f"{tensor.name}/births"] = turnover.reborn / steps
            found[f"{tensor.name}/deaths"] = turnover.newborn_deaths / steps  # `after_step` reports all deaths there
            turnover.take()
        return found

    @override
    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        slots, theta = _soft(item), item.theta
        require = invariants.requirement(item.tensor)
        require(theta.shape == slots.shape, f"expected theta of shape {tuple(slots.shape)}, found {tuple(theta.shape)}")
        require(bool(torch.isfinite(theta).all()), "theta is not finite")
        if item.rewires and not _is_nan(slots.theta_min):
            bound = theta.new_tensor(float(slots.theta_min))
            require(bool((theta >= bound).all()), f"expected theta >= theta_min = {float(bound)}, found {float(theta.min())}")
        else:
            same = slots.before is not None and torch.equal(theta < 0, slots.before < 0)
            require(same, "the connectivity has changed in a step without rewiring")
        require(torch.equal(slots.signs, slots.all_signs(slots.signs.dtype)), "a sign is not that of its place")
        dormant = theta < 0
        for name, value, start, _ in item.states():
            what = f"the optimizer's {name} of a dormant connection is not at its start, {start}"
            require(bool((value[dormant] == start).all()), what)


def _soft(item: Stepped) -> SoftTheta:
    found = item.tensor.weight
    assert isinstance(found, SoftTheta)
    return found


def _is_nan(bound: Any) -> bool:
    """Whether theta_min is still unknown."""
    return isinstance(bound, float) and math.isnan(bound)


def _is_zero(schedule: Any) -> bool:
    """Whether an argument is 0, or a dict that contains a 0. A function's values are checked in the step that uses them."""
    if isinstance(schedule, Mapping):
        return any(_is_zero(value) for value in schedule.values())
    return isinstance(schedule, (int, float)) and schedule == 0
