"""docs/internals.md and docs/architecture.md agree with the sources, and changes of a module are undone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_deepr import DeepR, densify, sparsify
from tests import test_layout
from tests.helpers.paths import ROOT

INTERNALS = (ROOT / "docs/internals.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")

# patterns of code that changes torch, Lightning or the process; `self.` is the package's own
CHANGES = {
    "a hook": r"\bregister_\w*hook\(",
    "a class": r"\.__class__ = ",
    "an attribute of another object's class": r"\bsetattr\((?!self\b|tensor\.turnover\b)",
    "a method of a class": r"\b(own|type\(\w+\))\.\w+ = ",
    "a parametrization": r"\bregister_parametrization\(",
    "an operator": r"\btorch\.library\.\w+\(",
    "a tensor subclass": r"\(torch\.Tensor\):",
    "a mode": r"\(Torch\w+Mode\):",
    "the environment": r"os\.environ(\.setdefault|\.update|\[[^\]]*\] =)",
    "warnings or levels": r"\bwarnings\.(filterwarnings|simplefilter)\(|\.setLevel\(",
    "a subclass of Lightning's command line": r"\(_?LightningCLI\):",
    "the import of other packages": r"sys\.meta_path\b",
    "the bases of a class": r"\.__bases__ =",
    "a method of one object": r"__dict__\[\"on_\w+\"\] =",
    "a value of another library": r"\brank_zero_only\.rank =",
    "something for the whole process": r"^_\w+: .*= (set|dict|list|\[\]|\{\}|weakref\.)|^ +global ",
    "a cache by shape": r"\blru_cache\(",
}
BELOW = ("_version", "_deprecated", "_needed", "_lazy")  # files below all folders
PUT_BACK_AT_ONCE = {"export/onnx_file.py", "export/matrices.py", "_deprecated.py"}  # inside warnings.catch_warnings()


def changing() -> dict[str, set[str]]:
    """Collect {file: the changes in it}."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "lightning_deepr").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        changed = {what for what, pattern in CHANGES.items() if re.search(pattern, text, re.MULTILINE)}
        if changed:
            found[file.relative_to(ROOT / "lightning_deepr").as_posix()] = changed
    return found


def test_the_page_names_every_file_that_changes_something() -> None:
    found = changing()
    missing = {file: what for file, what in found.items() if f"`{file}`" not in INTERNALS and file not in PUT_BACK_AT_ONCE}
    assert not missing
    for file in PUT_BACK_AT_ONCE:
        text = (ROOT / "lightning_deepr" / file).read_text(encoding="utf-8")
        assert found[file] == {"warnings or levels"} and "with warnings.catch_warnings(" in text


def test_the_search_finds_what_is_known() -> None:
    found = changing()
    known = [
        "weights/averages.py", "weights/install.py", "training/fabric_hooks.py", "training/step_ends.py",
        "compute/rnn_module.py", "compute/layer.py", "compute/weight.py", "compute/sparse.py", "recipes/loggers.py",
        "recipes/running.py", "kernels/gpu/gate.py",
    ]  # fmt: skip
    assert set(known) <= found.keys()
    assert set(CHANGES) == set().union(*found.values()), "every pattern still finds something"


@pytest.mark.parametrize("page", ["internals", "architecture"])
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w.]+/)*[\w.]+\.py)`", text):
        assert (ROOT / "lightning_deepr" / name).is_file() or (ROOT / name).is_file(), name
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / "docs" / link).is_file(), link


def test_the_table_of_folders_is_the_order_of_the_layers() -> None:
    rows = re.findall(r"^\| `([\w.]+)/?` \| (\d+) \|", ARCHITECTURE, re.MULTILINE)
    listed = [name.removesuffix(".py") for name, _ in rows]
    assert sorted(listed) == sorted(set(test_layout.ORDER) - {*BELOW, "__main__", "__init__"})
    for above, name in enumerate(listed):
        used = {
            test_layout.folder(one)
            for a, targets in test_layout.imports().items()
            if test_layout.folder(a) == name
            for one in targets
        }
        assert used <= {*listed[: above + 1], *BELOW}, name
    figures = test_layout.levels(), len(test_layout.upward()), len(test_layout.circles())
    assert "**{} levels, {} upward imports, {} circles**".format(*figures) in ARCHITECTURE
    assert max(int(level) for _, level in rows) == figures[0]


def test_the_import_brings_in_neither_torch_nor_numpy() -> None:
    code = "import sys, lightning_deepr; assert not {'torch', 'numpy', 'lightning'} & sys.modules.keys(); dir(lightning_deepr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -- undone -------------------------------------------------------------------------------------------------------------------


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(30, 20),
        lambda: Own(30, 20),
        lambda: nn.Conv2d(3, 8, 3),
        lambda: nn.LSTM(9, 7),
        lambda: nn.Bilinear(5, 4, 3),
    ],
    ids=["Linear", "subclass", "Conv2d", "LSTM", "Bilinear"],
)
def test_densify_gives_back_the_class_and_leaves_torchs_own_alone(make: Callable[[], Any]) -> None:
    layer = make()
    kind, before = type(layer), dict(vars(type(layer)))
    own = set(vars(layer))
    sparsify(layer, 0.2)
    assert type(layer) is not kind and issubclass(type(layer), kind)
    densify(layer)
    assert type(layer) is kind and dict(vars(kind)) == before
    assert set(vars(layer)) == own
    assert not any(parameter._post_accumulate_grad_hooks for parameter in layer.parameters())


def test_an_optimizer_is_left_without_hooks() -> None:
    net = sparsify(nn.Linear(30, 20), 0.2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewiring = DeepR().attach(net, optimizer)
    assert optimizer._optimizer_step_post_hooks and optimizer._optimizer_step_pre_hooks
    rewiring.remove()
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
