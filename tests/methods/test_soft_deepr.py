"""soft-DEEP R: every step follows Algorithm 2 with any optimizer, and theta_min holds the connectivity."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from lightning_deepr import LinearDecay, LrPower, SoftDeepR, connections, connectivity_report, kernels, sparsify
from lightning_deepr.algorithm import soft_rewiring
from lightning_deepr.weights.dense_theta import SoftTheta
from lightning_deepr.weights.find import converted_tensors
from tests.helpers import oracle, oracle_soft
from tests.helpers.dense_theta import OPTIMIZERS, Make, kinds, network, sgd
from tests.helpers.optional import Optional
from tests.helpers.regression import Branches, Twin, batches, loss_of, plain_mlp, train
from tests.helpers.soft import ALPHA, SEED, TEMPERATURE, soft, thetas

stats = Optional("scipy.stats")

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def silent(net: nn.Module, optimizer: optim.Optimizer, steps: int) -> None:
    """Take steps without data: the gradients are 0."""
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


# -- the start ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["module", "deepr", "largest"])
def test_it_starts_with_the_connections_that_deepr_starts_with(init: str) -> None:
    net = soft(0.2, init=init).prepare(plain_mlp())
    expected = sparsify(plain_mlp(), 0.2, init=init, distribution="uniform", seed=SEED)
    for name, (shape, places, values) in connections(expected).items():
        found_shape, found_places, found_values = connections(net)[name]
        order = places.argsort()
        assert found_shape == shape and torch.equal(found_places, places[order])
        assert torch.equal(found_values, values[order])


def test_dormant_thetas_start_uniform_above_theta_min() -> None:
    net, optimizer = network(soft(0.2, rewire_until=0))  # frozen: dormant thetas stay where they start
    silent(net, optimizer, 1)
    for index, (theta, slots) in enumerate(zip(thetas(net), kinds(net).values(), strict=True)):
        total, count = theta.numel(), slots.wanted
        bound = oracle_soft.theta_min(TEMPERATURE, ALPHA, count, total)
        places, start = oracle_soft.start(total, count, index, SEED, bound)
        found = theta.double().view(-1).numpy()
        dormant = np.setdiff1d(np.arange(total), places)
        np.testing.assert_allclose(found[dormant], start[dormant], rtol=1e-6)
        assert (found[places] >= 0).all() and (found[dormant] < 0).all() and found.min() >= np.float32(bound)
    net = soft(0.05).prepare(nn.Sequential(nn.Linear(200, 100)))
    theta = thetas(net)[0]
    assert stats.kstest(-theta[theta < 0].double().numpy(), "uniform").pvalue > 1e-3


# -- every step ---------------------------------------------------------------------------------------------------------------


class Expected:
    """Compute the expected result of a step: a twin of the optimizer steps on copies, and the slow algorithm does the rest."""

    def __init__(self, net: nn.Module, optimizer: optim.Optimizer, make: Make, callback: SoftDeepR) -> None:
        self.net, self.optimizer, self.make, self.callback = net, optimizer, make, callback
        self.number = 0

    def step(self, batch: Any, rewires: bool) -> int:
        """Take a step and compare. Returns the number of connections that became active or dormant."""
        self.optimizer.zero_grad()
        loss_of(self.net, batch).backward()
        twin = Twin(self.net, self.optimizer, lambda named: self.make([p for _, p in named]))
        before = [theta.clone() for theta in thetas(self.net)]
        self.optimizer.step()
        names = {id(parameter): name for name, parameter in self.net.named_parameters()}
        moved = 0
        for index, (converted, was) in enumerate(zip(converted_tensors(self.net), before, strict=True)):
            slots, copied = converted.slots, twin.params[names[id(converted.theta)]]
            if math.isnan(self.bound(index, slots)):
                continue
            lr = self.optimizer.param_groups[0]["lr"]
            expected = oracle_soft.step(
                was.view(-1).numpy(),
                copied.detach().view(-1).numpy(),
                index=index,
                seed=SEED,
                number=self.number,
                lr=lr,
                alpha=ALPHA,
                temperature=TEMPERATURE,
                bound=self.bound(index, slots),
                rewires=rewires,
            )
            found = converted.theta.detach().view(-1).numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
            np.testing.assert_array_equal(found >= 0, expected >= 0)
            signs = oracle.signs(slots.sign_seed, np.arange(slots.total))
            own = getattr(converted.module, converted.tensor_name).detach().view(-1).numpy()
            np.testing.assert_array_equal(own, oracle_soft.weight(found, signs))
            self.check_state(converted.theta, copied, twin.optimizer, was)
            moved += int(((was >= 0) != (converted.theta >= 0)).sum())
        self.number += 1
        return moved

    def bound(self, index: int, slots: SoftTheta) -> float:
        return oracle_soft.theta_min(TEMPERATURE, ALPHA, slots.wanted, slots.total)

    def check_state(self, theta: Tensor, copied: Tensor, twin: optim.Optimizer, was: Tensor) -> None:
        """Active connections have the optimizer's updated state, dormant ones its starting state."""
        starts = {"sum": 0.3, "step_size": 0.01}
        kept = (was >= 0) & (theta >= 0)
        for name, value in self.optimizer.state[theta].items():
            if isinstance(value, Tensor) and value.shape == theta.shape:
                assert torch.equal(value[kept], twin.state[copied][name][kept]), name
                assert bool((value[~kept] == starts.get(name, 0.0)).all()), name


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_step_is_that_of_algorithm_2(make: Make, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "suits", lambda theta: False)
    elif not kernels.available():
        pytest.skip("no kernels here")
    callback = soft()
    net, optimizer = network(callback, make)
    data = batches(12)
    optimizer.zero_grad()
    loss_of(net, data[0]).backward()
    optimizer.step()  # scales the dormant thetas
    expected = Expected(net, optimizer, make, callback)
    expected.number = 1
    assert sum(expected.step(batch, rewires=True) for batch in data[1:]) > 20


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
def test_steps_without_rewiring_keep_the_connectivity(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "suits", lambda theta: False)
    elif not kernels.available():
        pytest.skip("no kernels here")
    callback = soft(rewire_every_n_steps=3, rewire_until=9)
    net, optimizer = network(callback)
    data = batches(15)
    train(net, optimizer, data[:1])
    expected = Expected(net, optimizer, sgd, callback)
    expected.number = 1
    for number, batch in enumerate(data[1:], start=1):
        rewires = (number + 1) % 3 == 0 and number < 9
        moved = expected.step(batch, rewires)
        assert (moved > 0) == rewires, number


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(3, 5), (300, 220)], ids=str)  # one task of the kernel, and several
def test_kernel_and_torch_agree(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    if not kernels.available():
        pytest.skip("no kernels here")
    from lightning_deepr.kernels.cpu import soft as kernel

    torch.manual_seed(0)
    before, theta = torch.randn(sizes, dtype=dtype), torch.randn(sizes, dtype=dtype)
    before.view(-1)[::3] = 0.0  # is active
    nu = soft_rewiring.deviates(theta.shape, 5, SEED, 17, theta.device)
    for bound in (-0.5, None):
        first, second = theta.clone(), theta.clone()
        births, deaths = kernel.step(first, before, 0.01, 0.3, bound, 5, SEED, 17)
        if bound is None:
            soft_rewiring.step_without_rewiring(second, before, 0.01, 0.3, nu)
        else:
            soft_rewiring.step(second, before, 0.01, 0.3, nu, bound)
        torch.testing.assert_close(
            first, second, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=1e-7 if dtype == torch.float32 else 1e-14
        )
        assert births == int(((before < 0) & (second >= 0)).sum())
        assert deaths == int(((before >= 0) & (second < 0)).sum())
    expected = oracle.normal(oracle.key(SEED, oracle.NOISE, 17), [5 * 2**40 + k for k in range(theta.numel())])
    np.testing.assert_allclose(nu.view(-1).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_at_zero_a_connection_is_active_and_has_a_gradient() -> None:
    net = soft(0.3).prepare(nn.Linear(4, 3, bias=False))
    theta, slots = thetas(net)[0], kinds(net)["weight"]
    theta.copy_(torch.tensor([[0.0, -1.0, 1.0, -0.0]]).expand(3, 4))
    net(torch.ones(1, 4)).sum().backward()
    gradient = next(converted_tensors(net)).theta.grad
    assert torch.equal(gradient, torch.where(theta >= 0, slots.signs, 0.0)) and slots.count == 9
    assert not gradient[:, 1].any() and bool((gradient[:, [0, 2, 3]] != 0).all())


def test_a_tensor_without_a_gradient_is_left_alone() -> None:
    callback = soft(0.3)
    net = callback.prepare(Branches((8, 4)))
    optimizer = sgd(net.parameters())
    callback.attach(net, optimizer)
    x = torch.randn(5, 8)
    for _ in range(3):
        optimizer.zero_grad()
        net.a(x).square().mean().backward()
        before = [theta.clone() for theta in thetas(net)]
        optimizer.step()
    assert torch.equal(before[1], thetas(net)[1]) and not torch.equal(before[0], thetas(net)[0])
    steps = {name: entry["step"] for name, entry in callback.state_dict()["tensors"].items()}
    assert steps == {"a.weight": 3, "b.weight": 0}


# -- the connectivity that theta_min holds -- -------------------------------------------------------------------------------


def without_data(ratio: float, steps: int, make: Make | None = None) -> float:
    """Measure the connectivity after steps without data from the stationary state of p = 5 %; ratio = eta * alpha^2 / T."""
    lr, alpha = 0.1, 0.01
    temperature = lr * alpha**2 / ratio
    callback = SoftDeepR(0.05, temperature=temperature, l1=alpha, seed=SEED)
    net = callback.prepare(nn.Linear(400, 50, bias=False))
    theta = thetas(net)[0]
    torch.manual_seed(0)
    active = theta >= 0
    theta[active] = torch.empty(int(active.sum())).exponential_(alpha / temperature)
    optimizer = optim.SGD(net.parameters(), lr=lr)
    callback.attach(net, optimizer)
    silent(net, optimizer, steps)
    return connectivity_report(net)[0]["connectivity"]


def test_without_data_it_holds_the_wanted_connectivity() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.046 < without_data(0.5, 600) < 0.054
    with pytest.warns(UserWarning, match=r"alpha\*\*2 / T = 200, expected at most 2 .*ends at 15 %"):
        assert 0.11 < without_data(200, 600) < 0.2


def test_where_everything_is_wanted_nothing_is_ever_dormant() -> None:
    net, optimizer = network(soft(1.0))
    train(net, optimizer, batches(10))
    assert connectivity_report(net).to_dict()["connectivity"] == 1
    assert min(float(theta.min()) for theta in thetas(net)) == 0, "nothing was reflected"


def test_theta_min_as_given() -> None:
    callback = soft(theta_min=-0.05, l1=0.0)
    net, optimizer = network(callback)
    train(net, optimizer, batches(10))
    for theta in thetas(net):
        assert float(theta.min()) == np.float32(-0.05)


def test_theta_min_is_of_each_tensors_own_p_and_of_the_current_temperature() -> None:
    callback = soft({"0": 0.1, "2": 0.5}, temperature=LrPower(1.0, 1), l1={"0": 0.2, "2": 0.1})
    net, optimizer = network(callback)
    for lr in (0.1, 0.01, 0.001):
        optimizer.param_groups[0]["lr"] = lr
        train(net, optimizer, batches(1))
        for slots, alpha in zip(kinds(net).values(), (0.2, 0.1), strict=True):
            assert slots.theta_min == pytest.approx(oracle_soft.theta_min(lr, alpha, slots.wanted, slots.total))
        assert all(
            theta.min().numpy() == np.float32(k.theta_min) for theta, k in zip(thetas(net), kinds(net).values(), strict=True)
        )


@pytest.mark.parametrize(
    "options",
    [{"temperature": LrPower(0.1, 1)}, {"l1": LinearDecay(0.2, 0.0)}, {"temperature": lambda lr: 1e-2 if lr else 1e-60}],
    ids=["T", "alpha", "underflow"],
)
@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
def test_theta_min_keeps_its_last_value_where_a_schedule_reaches_zero(
    options: dict[str, Any], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "suits", lambda theta: False)
    callback = soft(**options)
    net, optimizer = network(callback, total_steps=4)
    train(net, optimizer, batches(4))
    last = [slots.theta_min for slots in kinds(net).values()]
    active = connectivity_report(net).active
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, batches(3))
    assert [slots.theta_min for slots in kinds(net).values()] == last and max(last) < 0
    assert connectivity_report(net).active == active, "a dormant connection became active"


def test_it_warns_once_where_the_noise_is_as_long_as_theta_min() -> None:
    callback = soft(0.5, temperature=1e-5, l1=1e-2)
    net, optimizer = network(callback)
    with pytest.warns(
        UserWarning,
        match=r"one step of the random walk, sqrt\(2 \* eta \* T\) = 0\.00141, is as long as \|theta_min\| = 0\.001",
    ) as caught:
        train(net, optimizer, batches(3))
    assert len(caught) == 1
