"""The public names of the package do not depend on earlier imports, and the package writes nothing into its own folder."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_deepr
from lightning_deepr import hub, zoo
from tests.helpers.optional import needs
from tests.helpers.paths import ROOT

PUBLIC = {
    "lightning_deepr": {
        *("DeepR", "SoftDeepR", "SET", "RigL", "FixedRandom", "MagnitudePruning", "L1Shrinkage", "SparseTraining"),
        *(
            "sparsify",
            "densify",
            "connections",
            "connectivity_report",
            "load_state_dict",
            "save_sparse",
            "adapt",
            "adapters",
            "save_adapter",
            "load_adapter",
            "follow",
            "decay_groups",
        ),
        *("ages", "dead_units", "prune_dead_units", "pictures"),
        *("LinearDecay", "LrPower", "TurnoverTarget", "SparseLinear", "zoo", "__version__"),
        *("Band", "Blocks", "Local", "NoSelf", "Dale", "Topology"),
    },
    "lightning_deepr.zoo": {
        *("list_models", "info", "load", "save", "publish", "verify", "connections_of", "path_of"),
        *("ENTRIES", "Entry", "FormatError", "Prediction", "Verification", "predict", "list_adapters", "load_adapter"),
    },
    "lightning_deepr.hub": {
        *("download", "load", "publish", "revision_of", "load_adapter", "publish_adapter"),
        *("WEIGHTS", "HubError", "Published", "SparseHubMixin"),
    },
}

# Import every submodule in some order, then every public name: it is the same object as in a process without other imports.
EVERYTHING = """
import importlib, pkgutil, random, sys
public, order = eval(sys.argv[1]), sys.argv[2]
import lightning_deepr
names = [found.name for found in pkgutil.walk_packages(lightning_deepr.__path__, "lightning_deepr.")]
names = [name for name in names if not name.startswith("lightning_deepr.kernels.gpu")]  # Triton is not for every platform
names = {"forwards": names, "backwards": names[::-1], "shuffled": random.Random(0).sample(names, len(names))}[order]
for name in names:
    importlib.import_module(name)
assert len(names) > 100
for package, shown in public.items():
    package = importlib.import_module(package)
    assert set(dir(package)) == set(package.__all__) == shown, (package, set(dir(package)) ^ shown)
    for name in shown:
        found = getattr(package, name)
        assert name in ("adapters", "zoo", "pictures", "__version__", "ENTRIES", "WEIGHTS") or callable(found), (name, found)
import lightning_deepr.conversion.convert as convert
assert lightning_deepr.connections is convert.connections and lightning_deepr.zoo is sys.modules["lightning_deepr.zoo"]
from lightning_deepr import *
assert connections is convert.connections and DeepR is lightning_deepr.methods.DeepR
"""


@needs("huggingface_hub")
@pytest.mark.parametrize(
    "order", ["shuffled", *(pytest.param(one, marks=pytest.mark.slow) for one in ("forwards", "backwards"))]
)
def test_the_public_names_whatever_was_imported_before(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", EVERYTHING, repr(PUBLIC), order], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@needs("huggingface_hub")
def test_every_public_function_and_class_is_documented() -> None:
    for package in (lightning_deepr, zoo, hub):
        for name in package.__all__:
            found = getattr(package, name)
            if inspect.isclass(found) or inspect.isroutine(found):
                assert found.__doc__ and not found.__doc__.startswith(f"{name}("), f"{package.__name__}.{name}"


def test_aliases_are_the_same_function() -> None:
    """One function has two names, and the docstring of the first says so."""
    assert zoo.save is lightning_deepr.save_sparse and "``zoo.save`` is an alias" in (zoo.save.__doc__ or "")
    assert hub.publish is zoo.publish and "``hub.publish`` is an alias" in (zoo.publish.__doc__ or "")
    assert "``hub.load`` is an alias" in (hub.load.__doc__ or "")


def test_a_name_that_is_not_there_lists_those_that_are() -> None:
    for package, name in ((lightning_deepr, "sparsity"), (zoo, "models"), (hub, "upload")):
        with pytest.raises(AttributeError, match=rf"{package.__name__}' has no attribute '{name}'; it has .*load"):
            getattr(package, name)


# -- an installed package -----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Lay out the package as a wheel does, in a folder of its own."""
    site = tmp_path / "site-packages"
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_deepr", site / "lightning_deepr", ignore=unwanted)
    for data in ("zoo", "recipes"):
        shutil.copytree(ROOT / data, site / "lightning_deepr" / data / "data", ignore=unwanted)
    return site


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    cwd = site.parent / "elsewhere"
    cwd.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(site.parent / "home")}
    environment |= {"XDG_CACHE_HOME": str(site.parent / "cache"), "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_makers_of_the_zoo_do_not_write_into_an_installed_package(installed: Path) -> None:
    before = contents(installed)
    for module, option in (("make", "--folder"), ("results", "--out")):
        done = run(installed, f"lightning_deepr.zoo.{module}", *(["collect"] if module == "make" else []))
        assert done.returncode == 2
        assert f"expected {option}: the package is installed, and nothing is written into it" in done.stderr
        assert str(installed) in done.stderr and "Traceback" not in done.stderr
    assert contents(installed) == before


@pytest.mark.slow  # a short training in a process that compiles its kernels
def test_nothing_is_written_into_the_package(installed: Path) -> None:
    before = contents(installed)
    main = "lightning_deepr.commands.main"
    short = ["--trainer.max_steps=2", "--trainer.limit_test_batches=1"]
    name = "lenet300_100.deepr_1pct_mnist"
    for arguments in (
        (main, "fit", "--config", "mnist_quickstart", *short),
        (main, "zoo", "verify"),
        (main, "report", "runs/mnist_quickstart/checkpoints/last.ckpt"),
        (main, "export", name, "--to", "c", "--out", "net.h"),
        ("lightning_deepr.zoo.write_cards", "cards", name),
    ):
        done = run(installed, *arguments)
        assert done.returncode == 0, (arguments, done.stderr[-2000:])
    assert (installed.parent / "elsewhere/net.h").is_file() and (installed.parent / "elsewhere/cards" / f"{name}.png").is_file()
    assert contents(installed) == before, sorted(set(contents(installed)) ^ set(before))
