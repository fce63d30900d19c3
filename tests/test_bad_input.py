"""Bad input gets a clear error that says what was expected, what was found and what to do; and nothing is lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import FSDPStrategy as FabricFSDPStrategy
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lightning_deepr import DeepR, LinearDecay, LrPower, connections, densify, load_state_dict, sparsify
from lightning_deepr.training.guards import refuse_sharding
from tests.helpers.networks import Net, Scaled, assert_connected, batches, fit_plain, slots_by_name, theta_of, trainer


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """The module is, afterwards, what it was before: the same parameters with the same values."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in module.named_parameters()}
    yield
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == parameters


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


# -- arguments --------------------------------------------------------------------------------------------------------------------

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
    ({"seed": None}, TypeError, "seed: expected an int, found None"),
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


# -- what does not fit the network ---------------------------------------------------------------------------------------------------

UNFIT = [
    ({"connectivity": 257}, r"connectivity = 257 connections, but the 2 chosen tensors have only 256\. Give at most"),
    ({"connectivity": 1.0 / 1000}, r"gives 0 connections to 2 tensors\. Expected at least one"),
    ({"connectivity": {"0": 193}}, r"connectivity\['0'\] = 193 connections, but 0\.weight have only 192"),
    ({"connectivity": {"5": 0.1}}, r"connectivity: the pattern '5' matches no tensor.*nearest names are: .*`0`"),
    ({"connectivity": 0.1, "target_modules": ["2.wieght"]}, r"'2\.wieght' matches no tensor.*nearest names are: `2\.weight`"),
    ({"connectivity": 0.1, "target_modules": "weight"}, r"regular expression 'weight' matches no tensor \(a single string"),
    ({"connectivity": 0.1, "exclude_modules": ["conv"]}, r"exclude_modules: the pattern 'conv' matches no tensor"),
    ({"connectivity": 0.1, "exclude_modules": ["*"]}, r"Sequential has nothing to convert"),
    ({"connectivity": 0.1, "target_modules": lambda name, module: False}, "nothing to convert"),
    (
        {"connectivity": 0.1, "distribution": "deepr"},
        r'distribution="deepr" is the paper\'s for 3 layers .* found 2: 0\.weight',
    ),
    ({"connectivity": 0.1, "distribution": lambda shapes, c: [0.1]}, r"expected 2 densities in \(0, 1\], found \[0\.1\]"),
    ({"connectivity": 0.1, "distribution": lambda shapes, c: [0.1, 1.1]}, r"expected 2 densities in \(0, 1\], found"),
    ({"connectivity": 0.1, "distribution": lambda shapes, c: {"x": 0.1}}, r"expected a density for each of .* found \['x'\]"),
    ({"connectivity": 0.1, "distribution": lambda shapes, c: [0.1, float("nan")]}, r"expected 2 densities"),
    ({"connectivity": 0.1, "distribution": "random"}, r"distribution: expected one of"),
    ({"connectivity": 0.1, "init": "zeros"}, r"init: expected one of"),
    ({"connectivity": 0.1, "compute": "fast"}, r"compute: expected one of"),
]


@pytest.mark.parametrize(("arguments", "message"), UNFIT, ids=lambda value: str(value)[:50])
def test_what_does_not_fit_the_network(arguments: dict[str, Any], message: str) -> None:
    net = network()
    with unchanged(net), pytest.raises(ValueError, match=message):
        sparsify(net, **arguments)


def test_what_does_not_fit_under_the_trainer() -> None:
    net = Net()
    for callback, message in [
        (DeepR(257), "have only 256"),
        (DeepR(0.1, target_modules=["fc3"]), "'fc3' matches no tensor.*nearest names are: `fc2`, `fc1`"),
        (DeepR(0.1, distribution="deepr"), "found 2: fc1.weight, fc2.weight"),
        (DeepR(0.1, l1={"fc1": 1e-4, "fc": 1e-3}), "l1: the pattern 'fc' matches no tensor"),
        (DeepR(0.1, l1={"fc1": 1e-4}), "l1: no key matches `fc2.weight`"),
        (DeepR(), r"DeepR\(connectivity=None\) expects a converted module.*Give a connectivity"),
    ]:
        with unchanged(net), pytest.raises(ValueError, match=message):
            trainer(callback).fit(net, batches())
    trainer(DeepR(0.1)).fit(net, batches(2))  # and the same network can be trained


def test_a_tensor_is_converted_once() -> None:
    net = sparsify(network(), {"0": 0.1})
    with unchanged(net), pytest.raises(ValueError, match=r"`0\.weight` is converted already \(K = 19\).*densify"):
        sparsify(net, 0.1)
    sparsify(net, 0.1, exclude_modules=["0"])
    assert connections(net).keys() == {"0.weight", "2.weight"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_refused_by_name() -> None:
    net = Tied()
    with (
        unchanged(net),
        pytest.raises(ValueError, match=r"`head\.weight` is shared \(tied\): `embed\.weight` and `head\.weight`"),
    ):
        sparsify(net, 0.2)
    assert net.head.weight is net.embed.weight
    assert connections(sparsify(net, 0.2, exclude_modules=["head"])).keys() == {"body.weight"}


def test_another_parametrization_is_refused_by_name() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    with unchanged(net), pytest.raises(ValueError, match=r"`0\.weight` has another parametrization already \(_WeightNorm\)"):
        sparsify(net, 0.2, target_modules=["0", "1"])
    with unchanged(net), pytest.raises(ValueError, match=r"nothing to convert.*`0\.weight`: has another parametrization"):
        sparsify(net, 0.2, exclude_modules=["1"])


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_sparse_gradients(kind: Any) -> None:
    net = nn.Sequential(kind(12, 8, sparse=True))
    with unchanged(net), pytest.raises(ValueError, match=r"`0\.weight` has sparse=True.*expected sparse=False"):
        sparsify(net, {"0": 0.3})


def test_a_trained_layer_that_is_not_finite() -> None:
    net = network()
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with unchanged(net[:1]), pytest.raises(ValueError, match=r"`2\.weight` holds values that are not finite"):
        sparsify(net, 0.2, init="largest")
    assert not connections(net)


def test_a_weight_too_large_to_be_dense() -> None:
    net = nn.Sequential(nn.Linear(4, 4), sparsify(nn.Linear(100_000, 100_000, device="meta"), 10))
    sparsify(net, {"0": 3})
    with unchanged(net), pytest.raises(RuntimeError, match=r"`1\.weight` of shape .* more than 16 GiB.*connections\(module\)"):
        densify(net)


def test_a_module_on_meta_that_cannot_be_materialized() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4), Scaled())
    with pytest.raises(ValueError, match=r"`1` \(Scaled\) is on the meta device and has no reset_parameters"):
        sparsify(net, {"0": 3})
    assert not connections(net) and all(parameter.device.type == "meta" for parameter in net.parameters())


def test_a_converted_weight_cannot_be_assigned() -> None:
    net = sparsify(network(), 0.1)
    for value in (torch.zeros(16, 12), nn.Parameter(torch.zeros(16, 12))):
        with (
            unchanged(net),
            pytest.raises(NotImplementedError, match=r"\(shape \(16, 12\), \d+ connections\) can't be assigned.*densify"),
        ):
            net[0].weight = value


# -- the optimizer, and values ------------------------------------------------------------------------------------------------------


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
        rewiring.state_dict()  # told once
        DeepR(l1=LinearDecay(1e-4), temperature=LrPower()).state_dict()


# -- the Trainer: what else is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=0.1)])
def test_averaging_listed_before(averaging: Any) -> None:
    net, average = Net(), averaging()
    name = type(average).__name__
    with (
        unchanged(net),
        pytest.raises(ValueError, match=rf"{name} is listed before DeepR.*\[DeepR\(\.\.\.\), {name}\(\.\.\.\)\]"),
    ):
        trainer(average, DeepR(0.1)).fit(net, batches())


@pytest.mark.parametrize("strategy", [FSDPStrategy, FabricFSDPStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused_by_name(strategy: Any) -> None:
    with pytest.raises(ValueError, match=rf'found {strategy.__name__}, which shards them\. Use strategy="ddp"'):
        refuse_sharding(strategy())


def test_other_strategies_are_not_refused() -> None:
    refuse_sharding(DDPStrategy())
    refuse_sharding(SingleDeviceStrategy())


class BuiltIn(Net):
    """Builds its layers in the hook that is named."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook
        self.fc1 = self.fc2 = None  # type: ignore[assignment]

    def build(self, hook: str) -> None:
        if hook == self.hook and self.fc1 is None:
            self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)

    def setup(self, stage: str) -> None:
        self.build("setup")

    def configure_model(self) -> None:
        self.build("configure_model")


def test_a_model_built_in_configure_model_is_converted() -> None:
    net = BuiltIn("configure_model")
    trainer(DeepR(0.3, check_invariants=True)).fit(net, batches(3))
    assert_connected(net)
    assert len(net.losses) == 3


def test_a_model_built_in_setup_is_told_where_to_build() -> None:
    with pytest.raises(
        ValueError, match=r"BuiltIn has nothing to convert.*Build the layers in `__init__` or in `configure_model`"
    ):
        trainer(DeepR(0.3)).fit(BuiltIn("setup"), batches())


CHANGES = [
    (lambda net: setattr(net, "fc1", nn.Linear(12, 16)), "`fc1.weight` was converted .* made anew"),
    (lambda net: nn.init.xavier_uniform_(net.fc1.weight), "`fc1.weight` was written to after it was converted"),
    (lambda net: net.fc2.reset_parameters(), "`fc2.weight` was written to"),
    (lambda net: net.fc1.weight.data.normal_(), "`fc1.weight` was written to"),
    (lambda net: [nn.init.normal_(p) for p in net.parameters()], "`fc1.weight` was written to"),
    (lambda net: net.lstm.reset_parameters(), "`lstm.weight_ih_l0` was written to"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_layers_that_are_changed_after_conversion(change: Any, message: str) -> None:
    class Changes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(12, 4)

        def setup(self, stage: str) -> None:
            change(self)

    with pytest.raises(RuntimeError, match=message):
        trainer(DeepR(0.3)).fit(Changes(), batches())


def test_layers_that_are_only_read_after_conversion() -> None:
    class Reads(Net):
        def setup(self, stage: str) -> None:
            self.norm_at_start = self.fc1.weight.norm().item()
            nn.init.zeros_(self.fc1.bias)  # biases are not converted
            for parameter in self.parameters():
                if parameter.dim() > 1:  # a usual way to leave vectors out
                    nn.init.xavier_uniform_(parameter)

    net = Reads()
    trainer(DeepR(0.3)).fit(net, batches(2))
    assert net.norm_at_start > 0


def test_two_callbacks_each_rewire_their_own_tensors() -> None:
    net = Net()
    options: dict[str, Any] = {"l1": 0.05, "check_invariants": True}
    first, second = DeepR({"fc1": 0.3}, **options), DeepR({"fc2": 0.5}, rewire_until=0, **options)
    assert first.state_key != second.state_key
    loop = trainer(first, second)
    loop.fit(net, batches(4))
    assert {key: [*state["tensors"]] for key, state in ((c.state_key, c.state_dict()) for c in (first, second))} == {
        first.state_key: ["fc1.weight"],
        second.state_key: ["fc2.weight"],
    }
    start = sparsify(sparsify(Net(), {"fc1": 0.3}), {"fc2": 0.5})
    found, before = slots_by_name(net), slots_by_name(start)
    assert not torch.equal(found["fc1.weight"].places, before["fc1.weight"].places)
    assert torch.equal(found["fc2.weight"].places, before["fc2.weight"].places), "the second was frozen from the start"
    assert_connected(net, {"fc1.weight": 58, "fc2.weight": 32})


def test_two_callbacks_in_a_plain_loop() -> None:
    net = sparsify(network(), 0.3)
    start = {name: slots.places.clone() for name, slots in slots_by_name(net).items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    first = DeepR(target_modules=["0"], l1=0.05).attach(net, optimizer)
    DeepR(target_modules=["2"], l1=0.05, rewire_until=0).attach(net, optimizer)
    fit_plain(net, optimizer, 5)
    moved = {name: not torch.equal(slots.places, start[name]) for name, slots in slots_by_name(net).items()}
    assert moved == {"0.weight": True, "2.weight": False}
    assert list(first.state_dict()["tensors"]) == ["0.weight"]


def test_training_without_a_callback_warns_once() -> None:
    net = sparsify(network(), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="no callback rewires it") as told:
        fit_plain(net, optimizer, 3)
    assert len(told) == 1
    other = sparsify(network(), 0.3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback = DeepR()
        for _ in range(2):  # the second time, too
            rewiring = callback.attach(other, optimizer)
            fit_plain(other, optimizer, 3)
            rewiring.remove()
    with pytest.warns(UserWarning, match="no callback rewires it"):
        fit_plain(other, optimizer, 1)


# -- checkpoints ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch of DEEP R."""
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer(DeepR(0.3), ModelCheckpoint(folder, filename="sparse"), enable_checkpointing=True).fit(Net(), batches(3))
    return folder / "sparse.ckpt"


def test_load_from_checkpoint_of_a_class_that_builds_the_dense_model(checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match=r"lightning_deepr\.load_state_dict"):
        Net.load_from_checkpoint(checkpoint)
    net = load_state_dict(Net(), checkpoint)  # what the message says
    assert_connected(net, {"fc1.weight": 45, "fc2.weight": 32})


@pytest.mark.parametrize(
    ("callback", "net", "message"),
    [
        (DeepR(0.2), Net(), r"expected K = 30 connections .*found 45 .*lightning_deepr\.load_state_dict"),
        (DeepR(0.3, distribution="uniform"), Net(), r"expected K = 58 connections .* found 45"),
        (DeepR(77), Net(hidden=20), r"expected connections of a weight of shape \(20, 12\), found \(16, 12\)"),
        (DeepR(0.3, target_modules=["fc1"]), Net(), r"fc2\.parametrizations\.weight"),
    ],
    ids=["connectivity", "distribution", "model", "selection"],
)
def test_a_checkpoint_of_something_else(checkpoint: Path, callback: DeepR, net: Net, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        trainer(callback, max_epochs=2).fit(net, batches(3), ckpt_path=checkpoint, weights_only=True)


def test_resuming_with_another_selection_of_the_callback(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    (mine,) = [value for key, value in state.items() if key.startswith("DeepR")]
    net = sparsify(network(), {"0": 45})
    rewiring = DeepR().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with (
        unchanged(net),
        pytest.raises(ValueError, match=r"expected the tensors \['0\.weight'\], found \['fc1\.weight', 'fc2\.weight'\]"),
    ):
        rewiring.load_state_dict(mine)
    other = Net()
    sparsify(other, {"fc1": 45, "fc2": 25})
    rewiring = DeepR().attach(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"`fc2\.weight`: expected a checkpoint with K = 25, found 32"):
        rewiring.load_state_dict(mine)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 4)
        self.fc3 = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(12, 16)), r"has connections for `fc1\.weight`, but Sequential has no such weight"),
        (lambda: Net(hidden=20), r"`fc1\.weight`: expected a weight of shape \(20, 12\), found \(16, 12\)"),
        (lambda: sparsify(Net(), 0.2), r"`fc1\.weight` is converted with K = 30, found 45.*densify"),
        (Other, r"Missing key.*fc3\.weight"),
    ],
    ids=["names", "shape", "count", "missing"],
)
def test_load_state_dict_into_something_else(checkpoint: Path, make: Any, message: str) -> None:
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        load_state_dict(module, checkpoint)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_damaged_and_newer_files() -> None:
    net = sparsify(network(), 0.3)
    for key, value, message in [
        ("places", torch.zeros_like(slots_by_name(net)["0.weight"].places), "expected .* different places in 0 ... 191"),
        ("places", slots_by_name(net)["0.weight"].places + 192, "the file is damaged"),
        ("lightning_deepr.load_state_dict", torch.tensor(99), "expected format 1 or older, found 99"),
    ]:
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        state[f"0.parametrizations.weight.0.{key}"] = value
        with unchanged(net), pytest.raises(RuntimeError, match=message):
            net.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.parametrizations\.weight\.0\.places"):
        net.load_state_dict({name: value for name, value in state.items() if not name.endswith("places")})


def test_a_dense_state_dict_into_a_converted_module() -> None:
    net = sparsify(network(), 0.3)
    places = slots_by_name(net)["0.weight"].places.clone()
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*Unexpected key.*"0\.weight"'):
        net.load_state_dict(network().state_dict())
    assert torch.equal(slots_by_name(net)["0.weight"].places, places)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    net = network()
    with unchanged(net), pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*nothing\.pt"):
        load_state_dict(net, tmp_path / "nothing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with unchanged(net), pytest.raises(ValueError, match="expected a state_dict or a Lightning checkpoint, found list"):
        load_state_dict(net, tmp_path / "list.pt")
