"""The same tests in ``lightning`` and in ``pytorch_lightning``, here in one process that imports both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_deepr import SET, DeepR, FixedRandom, LinearDecay, MagnitudePruning, RigL, SoftDeepR, sparsify
from lightning_deepr.packages.names import PACKAGES, Package, package_of
from lightning_deepr.recipes.callbacks import RampedEMA
from lightning_deepr.recipes.classifier import DigitClassifier
from lightning_deepr.recipes.digits import DigitsDataModule
from tests.helpers.paths import ROOT

METHODS = {
    "DeepR": lambda: DeepR(0.3, l1=LinearDecay(0.05), temperature=1e-6, check_invariants=True),
    "auto": lambda: DeepR(0.3),
    "global": lambda: DeepR(0.3, scope="global"),
    "SET": lambda: SET(0.3, rewire_every_n_steps=3),
    "RigL": lambda: RigL(0.3, rewire_every_n_steps=3),
    "FixedRandom": lambda: FixedRandom(0.3),
    "SoftDeepR": lambda: SoftDeepR(0.3, temperature=1e-6),
    "MagnitudePruning": lambda: MagnitudePruning(0.3),
}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}


@pytest.fixture(params=PACKAGES, ids=lambda package: package.name)
def package(request: pytest.FixtureRequest) -> Package:
    pytest.importorskip(request.param.name)
    return request.param


def trainer(package: Package, *callbacks: Any, **options: Any) -> Any:
    given = {"callbacks": [*callbacks], "max_epochs": 2, "enable_checkpointing": False, **QUIET, **options}
    return package.get("", "Trainer")(**given)


def net(package: Package) -> Any:
    """Make the same network as a LightningModule of a package."""

    class Net(package.get("", "LightningModule")):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x).relu())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Net()


def batches(count: int = 12) -> DataLoader:
    x = torch.randn(count * 8, 12, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, (x[:, :4] + x[:, 4:8]).argmax(1)), batch_size=8)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    expected = one.state_dict()
    found = other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def other_than(package: Package) -> Package:
    other = PACKAGES[1 - PACKAGES.index(package)]
    pytest.importorskip(other.name)
    return other


@pytest.mark.feature("Packages: lightning and pytorch_lightning, every method, equal to the bit")
@pytest.mark.parametrize("method", METHODS)
def test_a_fit_is_that_of_the_other_package(method: str) -> None:
    nets = []
    for one in PACKAGES:
        pytest.importorskip(one.name)
        nets.append(net(one))
        trainer(one, METHODS[method]()).fit(nets[-1], batches())
        assert package_of(nets[-1]) is one
    assert_equal(*nets)


@pytest.mark.feature("Packages: a checkpoint of one package resumed by the other")
@pytest.mark.parametrize("method", ["DeepR", "SoftDeepR"])
def test_a_checkpoint_is_resumed_by_the_other(package: Package, method: str, tmp_path: Path) -> None:
    whole = net(package)
    save = package.get("callbacks", "ModelCheckpoint")(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer(package, METHODS[method](), save, enable_checkpointing=True).fit(whole, batches())
    other, callback = other_than(package), METHODS[method]()
    resumed = net(other)
    trainer(other, callback).fit(resumed, batches(), ckpt_path=tmp_path / "epoch=0.ckpt", **weights_only(other))
    assert_equal(whole, resumed)
    tested = net(other)
    trainer(other, METHODS[method]()).test(tested, batches(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)


def weights_only(package: Package) -> dict[str, Any]:
    """Load with ``weights_only=True``, where the Trainer can be told so (Lightning 2.6)."""
    import inspect

    return {"weights_only": True} if "weights_only" in inspect.signature(package.get("", "Trainer").fit).parameters else {}


@pytest.mark.feature("Packages: callbacks of either package beside ours")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_callbacks_of_the_package(package: Package, accumulate: int) -> None:
    nets = []
    for gradient_clip_val in (None, 1e9):  # clipping that never clips changes nothing
        nets.append(net(package))
        beside = [package.get("callbacks", "Timer")()]
        if hasattr_(package, "EMAWeightAveraging"):  # Lightning 2.6
            beside.append(package.get("callbacks", "EMAWeightAveraging")(decay=0.5))
        beside.append(package.get("callbacks", "GradientAccumulationScheduler")({0: accumulate, 1: 2}))
        trainer(package, METHODS["DeepR"](), *beside, gradient_clip_val=gradient_clip_val).fit(nets[-1], batches())
    assert_equal(*nets)


def hasattr_(package: Package, name: str) -> bool:
    return hasattr(sys.modules[f"{package.trainer}.callbacks"], name)


@pytest.mark.feature("Packages: Fabric of either package")
def test_fabric(package: Package) -> None:
    import importlib

    fabric_of = importlib.import_module(package.fabric).Fabric
    results = []
    for how in ("plain", "fabric"):
        torch.manual_seed(0)
        network = sparsify(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), 0.3)
        optimizer: Any = torch.optim.Adam(network.parameters(), lr=0.01)
        callback = DeepR(l1=0.05, check_invariants=True)
        if how == "plain":
            callback.attach(network, optimizer)
            model: Any = network
        else:
            fabric = fabric_of(accelerator="cpu", devices=1, callbacks=[callback])
            model, optimizer = fabric.setup(network, optimizer)
        for x, y in batches():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward() if how == "plain" else fabric.backward(loss)
            optimizer.step()
        results.append(network)
    assert_equal(*results)


def test_attach_takes_the_wrapped_optimizers_of_either(package: Package) -> None:
    network = sparsify(nn.Linear(12, 4), 0.3)
    wrapper = package.get("core.optimizer", "LightningOptimizer")
    callback = DeepR(l1=0.05)
    handle = callback.attach(network, wrapper(torch.optim.SGD(network.parameters(), lr=0.1)))
    assert isinstance(handle.callback, DeepR)


@pytest.mark.feature("Callbacks: two callbacks on the same tensors, in one Trainer", refused=True)
def test_two_callbacks_on_the_same_tensors(package: Package) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DeepR`"):
        trainer(package, DeepR(0.3), DeepR(0.3))
    with pytest.raises(ValueError, match=r"SET|nothing to convert"):
        trainer(package, DeepR(0.3), SET(0.3)).fit(net(package), batches())


@pytest.mark.feature("Packages: the recipes' modules, data and callbacks")
def test_the_recipes_modules(package: Package, tmp_path: Path) -> None:
    results = []
    for one in (package, other_than(package)):
        torch.manual_seed(0)
        model = DigitClassifier(lr=0.1)
        assert isinstance(model, one.get("", "LightningModule"))
        averages = [RampedEMA(0.9)] if hasattr_(one, "WeightAveraging") else []  # Lightning 2.6
        loop = trainer(one, DeepR(0.05), *averages, max_epochs=1, limit_train_batches=8, limit_val_batches=1)
        loop.fit(model, DigitsDataModule())
        assert package_of(model.trainer) is one
        assert loop.estimated_stepping_batches == 8
        loop.validate(model, DigitsDataModule(), verbose=False)
        file = tmp_path / f"{one.name}.ckpt"
        loop.save_checkpoint(file)
        results.append((model, torch.load(file, weights_only=True)["hyper_parameters"]))
    assert_equal(results[0][0], results[1][0])
    assert dict(results[0][1]) == dict(results[1][1])


def test_what_a_version_does_not_have_is_said(package: Package) -> None:
    if not hasattr_(package, "WeightAveraging"):
        with pytest.raises(ImportError, match=r"RampedEMA needs .*WeightAveraging"):
            RampedEMA(0.9)


def test_a_module_is_of_the_package_of_its_trainer(package: Package) -> None:
    """Each package takes a method with other code than its own for an overridden one."""
    model = DigitClassifier()
    trainer(package, max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(model, DigitsDataModule())
    asked = package.get("utilities.model_helpers", "is_overridden")
    base = package.get("", "LightningModule")
    names = [name for name in dir(base) if callable(getattr(base, name, None)) and not name.startswith("__")]
    names = [name for name in names if hasattr(getattr(base, name), "__code__")]
    written = {"forward", "training_step", "validation_step", "test_step", "configure_optimizers"}
    assert {name for name in names if asked(name, model, base)} - {"load_from_checkpoint"} == written


IMPORTS = """
import sys
for other in sys.argv[2].split(","):
    sys.modules[other] = None  # an import of it is an error
name, order = sys.argv[1], sys.argv[3]
if order == "before":
    import lightning_deepr.methods, lightning_deepr.recipes.classifier, lightning_deepr.recipes.callbacks
from importlib import import_module
trainer = import_module(name)
import lightning_deepr as deepr
from lightning_deepr.recipes import callbacks, classifier, digits, loggers, resumable
Callback = import_module(name + ".callbacks").Callback
for kind in (deepr.DeepR, deepr.SoftDeepR, callbacks.ConnectivityTable, callbacks.RampedEMA):
    assert issubclass(kind, Callback), kind.__mro__
assert issubclass(classifier.DigitClassifier, trainer.LightningModule)
assert issubclass(digits.DigitsDataModule, trainer.LightningDataModule)
assert issubclass(loggers.WandbLogger, import_module(name + ".loggers").Logger)
loop = trainer.Trainer(
    callbacks=deepr.DeepR(0.05), max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
)
trainer.seed_everything(0)
model = classifier.DigitClassifier(lr=0.1)
loop.fit(model, digits.DigitsDataModule())
print(sum(p.double().sum().item() for p in model.parameters()))
"""


@pytest.mark.feature("Packages: one package without the other, imported before or after ours")
@pytest.mark.slow
def test_neither_has_to_be_imported_for_the_other() -> None:
    others = {"lightning.pytorch": "pytorch_lightning,lightning_fabric", "pytorch_lightning": "lightning"}
    printed = set()
    for name, blocked in others.items():
        pytest.importorskip(name)
        for order in ("before", "after"):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", IMPORTS, name, blocked, order],
                cwd=ROOT, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            printed.add(done.stdout.split()[-1])
    assert len(printed) == 1, printed


@pytest.mark.slow
@pytest.mark.feature("Command line: lightning-deepr fit with lightning or pytorch_lightning alone")
def test_the_command_line(package: Package, tmp_path: Path) -> None:
    other = {"lightning": "pytorch_lightning", "pytorch_lightning": "lightning"}[package.name]
    code = f"import sys; sys.modules[{other!r}] = None\nfrom lightning_deepr.commands.main import main\nmain(sys.argv[1:])"
    arguments = ["fit", "--config", "mnist_quickstart", "--trainer.max_epochs=1", "--trainer.limit_train_batches=5"]
    arguments += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=900, env={**__import__("os").environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/mnist_quickstart/sparse.safetensors").is_file()
    assert "test_accuracy" in done.stdout
