"""The wheel and the sdist: what is in them, their size, their metadata; and the types that they bring to a user's project."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from lightning_deepr import __version__, zoo
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow
LARGEST = 5_000_000  # bytes

USER = '''\
"""A user's project, checked by mypy --strict."""

from pathlib import Path

import torch
from torch import Tensor, nn

import lightning_deepr
from lightning_deepr import Band, DeepR, LinearDecay, SoftDeepR, connections, connectivity_report, densify, sparsify, zoo
from lightning_deepr import load_state_dict, save_sparse
from lightning_deepr.export import to_dense_state_dict


def train(steps: int) -> nn.Module:
    net = sparsify(nn.Sequential(nn.Linear(20, 20)), {"0": 0.1}, candidates={"0": Band(3)})
    optimizer = torch.optim.Adam(net.parameters())
    rewiring = DeepR(l1=LinearDecay(1e-4)).attach(net, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Tensor = net(torch.randn(2, 20)).sum()
        torch.autograd.backward(loss)
        optimizer.step()
    rewiring.remove()
    return net


def keep(net: nn.Module, path: Path) -> list[str]:
    file: Path = save_sparse(net, path, license="MIT")
    again: nn.Module = load_state_dict(nn.Sequential(nn.Linear(20, 20)), file)
    shape, places, values = connections(again)["0.weight"]
    size: torch.Size = shape
    total: Tensor = places.sum() + values.sum()
    print(connectivity_report(densify(again)), size, total, lightning_deepr.__version__, to_dense_state_dict(net))
    found: list[str] = zoo.list_models(task="image-classification")
    return found


callback = SoftDeepR(0.1, temperature=1e-6, seed=3)
'''
WRONG = {  # what the types of the package have to find, and the line of code
    "unexpected keyword": "DeepR(connectivty=0.1)",
    "incompatible type": "sparsify(3, 0.1)",
    "Incompatible types in assignment": "number: int = zoo.load('x')",
    "has no attribute": "zoo.info('x').shape",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build both as a release does, from what git knows."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("distribution")
    source = folder / "source"
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(source)]
    here = importlib.util.find_spec("setuptools") is not None
    done = subprocess.run([*command, *(["--no-isolation"] if here else [])], capture_output=True, text=True)
    if done.returncode and not here:
        pytest.skip(f"could not get setuptools: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return {"wheel": wheel, "sdist": sdist}


def test_both_are_small(built: dict[str, Path]) -> None:
    assert all(file.stat().st_size < LARGEST for file in built.values()), {n: f.stat().st_size for n, f in built.items()}
    assert all(f"lightning_deepr-{__version__}" in file.name for file in built.values())


def test_what_the_wheel_has(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_deepr").rglob("*.py")}
    assert code <= names and "lightning_deepr/py.typed" in names
    models = {name.rpartition("/")[2] for name in names if name.endswith(".safetensors")}
    assert models == {entry.filename for entry in zoo.ENTRIES if entry.in_wheel} | {
        f"{one}.safetensors" for one in zoo.list_adapters()
    }
    assert {f"lightning_deepr/recipes/data/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} <= names
    assert {name.split("/")[0] for name in names} == {"lightning_deepr", f"lightning_deepr-{__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)


def test_what_the_sdist_has(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"CITATION.cff", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "lightning_deepr/py.typed"} <= names
    assert {f"zoo/{entry.filename}" for entry in zoo.ENTRIES if entry.in_wheel} <= names
    assert not [name for name in names if name.startswith((".ci", "tests", "runs", "data/"))]


def test_twine_and_check_wheel_contents(built: dict[str, Path]) -> None:
    pytest.importorskip("twine")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.values())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pytest.importorskip("check_wheel_contents")
    done = subprocess.run([sys.executable, "-m", "check_wheel_contents", str(built["wheel"])], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_types_hold_in_a_users_project(built: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    with zipfile.ZipFile(built["wheel"]) as wheel:
        wheel.extractall(site)
    (site / "others.pth").write_text(str(Path(torch.__file__).parents[1]))  # torch and Lightning, as they are installed here
    project = tmp_path / "project"
    project.mkdir()
    (project / "user.py").write_text(USER)

    def strict(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), name]
        return subprocess.run(command, cwd=project, capture_output=True, text=True)

    found = strict("user.py")
    assert found.returncode == 0 and "Success" in found.stdout, found.stdout + found.stderr
    begin = "from lightning_deepr import DeepR, sparsify, zoo\n"
    (project / "wrong.py").write_text(begin + "\n".join(WRONG.values()) + "\n")
    told = strict("wrong.py").stdout
    for number, word in enumerate(WRONG, 2):
        assert re.search(rf"wrong\.py:{number}: error: .*{word}", told, re.IGNORECASE), (word, told)


def test_the_citation() -> None:
    """The file of GitHub and Zenodo: the version and the licence are the package's, the paper is that of the cards."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert found["version"] == __version__ and f'license = "{found["license"]}"' in project
    paper = found["preferred-citation"]
    from lightning_deepr.hub import cards

    text = cards.card({"name": "net", "connectivity": {}})
    assert paper["title"] in text and str(paper["year"]) in text and paper["url"] in text
    assert all(author["family-names"] in text for author in paper["authors"])
