"""A light installation: torch, lightning, numpy, numba and safetensors are enough to train, save, load and export."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lightning_deepr._needed import needed
from tests.helpers import five, light
from tests.helpers.paths import ROOT

PACKAGES = ["lightning", "pytorch_lightning"]
HEAVY = (
    "torch", "lightning", "pytorch_lightning", "numpy", "numba", "llvmlite", "safetensors", "torchvision", "torchmetrics",
    "wandb", "matplotlib", "PIL", "huggingface_hub", "jsonargparse", "yaml", "platformdirs", "scipy", "pandas", "onnx",
    "triton",
)  # fmt: skip
# What `from lightning_deepr import DeepR, sparsify` must not import on top of torch and Lightning.
LATER = (
    "numba", "llvmlite", "torchvision", "wandb", "matplotlib", "PIL", "huggingface_hub", "jsonargparse", "platformdirs",
    "scipy", "pandas", "onnx", "triton", "safetensors",
)  # fmt: skip


@cache
def outcome(package: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.light", package], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("what", light.WORKS)
def test_what_works_with_five_packages(package: str, what: str) -> None:
    pytest.importorskip(package)
    assert outcome(package)["works"][what] == ""


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("what", light.REFUSED)
def test_what_needs_more_says_which_in_one_line(package: str, what: str) -> None:
    pytest.importorskip(package)
    told = outcome(package)["refused"][what]
    assert "\n" not in told and light.REFUSED[what][1] in told and "pip install" in told and "Traceback" not in told, told


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_what_was_taken_away(package: str) -> None:
    """The environment of these tests has these libraries, and the program could not import any of them."""
    pytest.importorskip(package)
    away = set(outcome(package)["away"])
    assert {"torchvision", "wandb", "matplotlib", "huggingface_hub", "jsonargparse", "platformdirs"} <= away
    assert not away & {"torch", "lightning", "numpy", "numba", "safetensors", "torchmetrics", "yaml", "lightning_utilities"}
    assert outcome(package)["loaded"] == []


@pytest.fixture(scope="module")
def python_of_five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return five.make(tmp_path_factory.mktemp("installation") / "five")


@pytest.mark.slow
def test_what_an_installation_of_five_packages_has(python_of_five: Path) -> None:
    program = (
        "import importlib.metadata, importlib.util, json\n"
        "found = [one.name for one in importlib.metadata.distributions()]\n"
        f"there = [name for name in {HEAVY!r} if importlib.util.find_spec(name)]\n"
        "print(json.dumps([found, there]))"
    )
    done = subprocess.run([python_of_five, "-I", "-c", program], capture_output=True, text=True, check=True)
    found, there = json.loads(done.stdout)
    assert {"torch", "lightning", "numpy", "numba", "safetensors", "pytest"} <= {one.lower() for one in found}
    more = {one.lower().replace("_", "-").replace(".", "-") for one in found} - light.closure(*light.FIVE, *five.TESTS)
    assert more <= {"pip", "setuptools", "lightning-deepr"}  # the last one is the checkout
    brought = {"llvmlite", "pytorch_lightning", "torchmetrics", "yaml", "triton"}
    assert set(there) <= {"torch", "lightning", "numpy", "numba", "safetensors"} | brought


@pytest.mark.slow
def test_every_test_is_collected_with_five_packages(python_of_five: Path) -> None:
    done = five.run(python_of_five, "--collect-only", "-q", "-n", "0")
    assert done.returncode == 0, done.stdout[-4000:]
    collected = int(re.search(r"^(\d+)/\d+ tests collected", done.stdout, re.M)[1])  # type: ignore[index]
    assert collected > 6000


@pytest.mark.slow
def test_the_files_that_name_a_library_pass_with_five_packages(python_of_five: Path) -> None:
    """Those of the tests that may need more than the five: each skips what is missing. (All the others need none.)"""
    words = ("helpers.optional", "importorskip")
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if any(w in file.read_text() for w in words)]
    done = five.run(python_of_five, "-q", "-n", "0", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-8000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])  # type: ignore[index]
    assert passed > 1500 and "error" not in done.stdout.splitlines()[-1]


def imported(program: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_else() -> None:
    assert not imported("import lightning_deepr, lightning_deepr.zoo, lightning_deepr.hub, lightning_deepr.pictures") & set(
        HEAVY
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["import lightning_deepr", "from lightning_deepr import DeepR, sparsify; DeepR(0.1)"])
@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_training_script_imports_first(package: str, what: str) -> None:
    pytest.importorskip(package)
    begin = f"import torch, {package}"
    assert not (imported(f"{begin}\n{what}") - imported(begin)) & set(LATER)


def test_a_library_that_is_missing_or_broken(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needed("json", "os.path", purpose="A test")[1].sep
    with pytest.raises(
        ImportError, match=r"^A test needs no_such, no_such_too, not installed here: pip install no_such json no_such_too$"
    ):
        needed("no_such", "json", "no_such_too", purpose="A test")
    with pytest.raises(ImportError, match=r"pip install 'lightning-deepr\[export\]'$"):
        needed("no_such.part", purpose="A test", install="'lightning-deepr[export]'")
    (tmp_path / "broken_library.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ImportError, match=r"broken_library, which is installed but can't be imported \(No module named 'no_such"
    ):
        needed("broken_library", purpose="A test")
