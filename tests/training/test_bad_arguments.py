"""Invalid arguments, optimizers and values raise errors that say what was expected, what was found and what to do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_deepr import DeepR, LinearDecay, LrPower, sparsify
from tests.helpers.classifier import Net, batches, fit_plain
from tests.helpers.small import network, unchanged
from tests.helpers.state import theta_of
from tests.helpers.trainer import trainer

# -- arguments ----------------------------------------------------------------------------------------------------------------


CONNECTIVITY = [
    (0.0, ValueError, r"expected a fraction in \(0, 1\], found 0\.0"),
    (-0.1, ValueError, r"found -0\.1"),
    (1.5, ValueError, r"found 1\.5\. An int is a number"),
    (float("nan"), ValueError, "found nan"),
    (float("inf"), ValueError, "found inf"),
    (0, ValueError, "expected at least 1 connection, found 0"),
    (-3, ValueError, "found -3"),
    (True, TypeError, "expected a float in .* found True"),
    ("0.1", TypeError, "found '0.1'"),
    ([0.1, 0.2], TypeError, r"found \[0\.1, 0\.2\]"),
    ({}, ValueError, "expected at least one pattern"),
    ({"0": 0.1, "2": 1.2}, ValueError, r"connectivity\['2'\]: expected a fraction in \(0, 1\], found 1\.2"),
    ({"0": None}, TypeError, r"connectivity\['0'\]"),
]


@pytest.mark.parametrize(("connectivity", "error", "message"), CONNECTIVITY)
def test_connectivity(connectivity: Any, error: type[Exception], message: str) -> None:
    net = network()
    with unchanged(net), pytest.raises(error, match=message):
        sparsify(net, connectivity)
    with pytest.raises(error, match=message):
        DeepR(connectivity)


ARGUMENTS = [
    ({"target_modules": 3}, TypeError, "target_modules: expected .* found 3"),
    ({"target_modules": [0]}, TypeError, r"target_modules: expected .* found \[0\]"),
    ({"exclude_modules": None}, TypeError, "exclude_modules: expected .* found None"),
    ({"target_modules": "fc[1"}, ValueError, r"target_modules: .*fc\[1.* regular expression"),
    (
        {"distribution": "random"},
        ValueError,
        "distribution: expected one of erdos_renyi, erk, uniform, deepr .* found 'random'",
    ),
    ({"distribution": 3}, ValueError, "found 3"),
    ({"scope": "network"}, ValueError, "scope: expected .* found 'network'"),
    ({"l1": -1e-4}, ValueError, r"l1: expected a finite value of at least 0, found -0\.0001"),
    ({"l1": float("nan")}, ValueError, "l1: .* found nan"),
    ({"l1": "0.1"}, TypeError, "l1: expected a float, .* found '0.1'"),
    ({"l1": True}, TypeError, "l1: .* found True"),
    ({"l1": {"fc1": float("inf")}}, ValueError, r"l1\['fc1'\]: .* found inf"),
    ({"l1": {"fc1": None}}, TypeError, r"l1\['fc1'\]: .* found None"),
    ({"temperature": -1.0}, ValueError, r"temperature: .* found -1\.0"),
    ({"temperature": float("nan")}, ValueError, "temperature: .* found nan"),
    ({"temperature": None}, TypeError, "temperature: expected a float, LrPower .* found None"),
    ({"init": "zeros"}, ValueError, "init: expected one of module, largest, deepr, found 'zeros'"),
    ({"rewire_every_n_steps": 0}, ValueError, "rewire_every_n_steps: expected an int of at least 1, found 0"),
    ({"rewire_every_n_steps": 2.0}, ValueError, "rewire_every_n_steps: .* found 2.0"),
    ({"log_every_n_steps": True}, ValueError, "log_every_n_steps: .* found True"),
    ({"rewire_until": -1}, ValueError, r"rewire_until: expected a step \(int\) or a fraction .* found -1"),
    ({"rewire_until": 1.5}, ValueError, "rewire_until: .* found 1.5"),
    ({"rewire_until": float("nan")}, ValueError, "rewire_until: .* found nan"),
    ({"rewire_until": True}, ValueError, "rewire_until: .* found True"),
    ({"rewire_until": "end"}, (TypeError, ValueError), "rewire_until: expected .* found 'end'"),
    ({"seed": 1.0}, TypeError, "seed: expected an int, found 1.0"),
    ({"seed": "0"}, TypeError, "seed: expected an int, found '0'"),
    ({"compute": "fast"}, ValueError, "compute: expected one of .* found 'fast'"),
    ({"check_invariants": "yes"}, TypeError, "check_invariants: expected True or False, found 'yes'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS, ids=lambda value: str(value)[:50])
def test_arguments_of_the_callback(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        DeepR(0.1, **arguments)


def test_unknown_and_positional_arguments() -> None:
    for make in (lambda: DeepR(0.1, "all"), lambda: DeepR(0.1, density=0.1), lambda: sparsify(network(), 0.1, "all")):
        with pytest.raises(TypeError):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LrPower(-1.0), "LrPower: expected coefficient >= 0, found -1"),
        (lambda: LrPower(float("nan")), "found nan"),
        (lambda: LinearDecay(-1e-4), "LinearDecay: expected start >= 0 and end >= 0"),
        (lambda: LinearDecay(1e-4, float("nan")), "found 0.0001 and nan"),
    ],
)
def test_schedules(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- the optimizer, and values ------------------------------------------------------------------------------------------------


def test_an_optimizer_made_before_sparsify() -> None:
    net = network()
    early = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsify(net, 0.1)
    callback = DeepR()
    with unchanged(net), pytest.raises(ValueError, match=r"optimizer made before sparsify.*call sparsify\(net, \.\.\.\) first"):
        callback.attach(net, early)
    DeepR().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))  # the network is free for another callback


def test_an_optimizer_made_before_the_fit() -> None:
    class Early(Net):
        def __init__(self) -> None:
            super().__init__()
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> Any:
            return self.optimizer

    with pytest.raises(RuntimeError, match="optimizer made before sparsify"):
        trainer(DeepR(0.1)).fit(Early(), batches())


def test_an_optimizer_without_some_of_the_tensors() -> None:
    class Half(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.fc1.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match=r"no optimizer holds fc2\.weight"):
        trainer(DeepR(0.3)).fit(Half(), batches(2))


def test_attach_to_a_network_that_is_not_converted() -> None:
    net = network()
    with unchanged(net), pytest.raises(ValueError, match=r"expects a converted network, found Sequential.*`sparsify\(net"):
        DeepR(0.1).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))


@pytest.mark.feature("Optimizers: LBFGS", refused=True)
def test_lbfgs_is_refused() -> None:
    net = sparsify(network(), 0.1)
    with pytest.raises(ValueError, match="LBFGS"):
        DeepR().attach(net, torch.optim.LBFGS(net.parameters()))


@pytest.mark.parametrize("broken", ["theta", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_step(broken: str) -> None:
    net = sparsify(network(), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR().attach(net, optimizer)
    fit_plain(net, optimizer, 3)
    theta = theta_of(net, "2.weight")
    optimizer.zero_grad()
    net(torch.ones(2, 12)).sum().backward()
    (theta.data if broken == "theta" else theta.grad)[4] = float("inf")
    message = r"`2\.weight`, step 3: .* not finite at 1 of \d+ connections\. The step was not taken"
    with unchanged(net), pytest.raises(RuntimeError, match=message):
        optimizer.step()


@pytest.mark.feature("Optimizers: gradients that are not finite", refused=True)
def test_a_gradient_that_is_not_finite_under_the_trainer() -> None:
    class Breaks(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.before = {name: value.clone() for name, value in self.state_dict().items()}
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 5 else 1.0)

    net = Breaks()
    with pytest.raises(RuntimeError, match=r"`fc1\.weight`, step 5: the gradient of theta is not finite"):
        trainer(DeepR(0.3)).fit(net, batches())
    assert all(torch.equal(value, net.before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l1": lambda progress: float("nan")}, r"l1 of `0\.weight`: expected a finite value of at least 0, found nan"),
        ({"l1": {"0": lambda progress: -1.0, "2": 0.0}}, r"l1 of `0\.weight`: .* found -1\.0"),
        ({"temperature": lambda lr: float("nan")}, "temperature: expected a finite value of at least 0, found nan"),
        ({"temperature": LrPower(1.0, float("nan"))}, "temperature: .* found nan from LrPower"),
    ],
)
def test_a_schedule_that_gives_no_number(arguments: dict[str, Any], message: str) -> None:
    net = sparsify(network(), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(**arguments).attach(net, optimizer, total_steps=10)
    with pytest.raises(ValueError, match=message):
        fit_plain(net, optimizer, 1)


@pytest.mark.parametrize("arguments", [{"l1": LinearDecay(1e-4)}, {"l1": lambda progress: 0.0}, {"rewire_until": 0.5}])
def test_a_schedule_over_a_training_of_unknown_length(arguments: dict[str, Any]) -> None:
    net = sparsify(network(), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with (
        unchanged(net),
        pytest.raises(ValueError, match=r"its length is not known\. Give attach\(\.\.\., total_steps=\.\.\.\)"),
    ):
        DeepR(**arguments).attach(net, optimizer)
    with pytest.raises(ValueError, match="Give the Trainer max_epochs or max_steps"):
        trainer(DeepR(0.3, **arguments), max_epochs=-1).fit(Net(), batches())


def test_a_function_as_schedule_works_and_cannot_be_saved() -> None:
    net = sparsify(network(), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewiring = DeepR(temperature=lambda lr: 1e-6 * lr).attach(net, optimizer)
    fit_plain(net, optimizer, 2)
    with pytest.warns(UserWarning, match="a function as l1 or temperature can't be saved.*LinearDecay and LrPower"):
        rewiring.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewiring.state_dict()  # warned once
        DeepR(l1=LinearDecay(1e-4), temperature=LrPower()).state_dict()
