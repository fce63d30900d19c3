"""The order of the package's folders: no import runs upwards and none runs in a circle, including hidden imports.

python -m tests.test_layout    prints the figures
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "lightning_deepr"
# From the bottom to the top: a folder imports only from folders before it. (``__init__`` names its contents lazily, by
# strings.)
ORDER = [
    "_version",
    "_deprecated",
    "_needed",
    "_lazy",
    "packages",
    "models",
    "algorithm",
    "kernels",
    "compute",
    "weights",
    "conversion",
    "monitoring",
    "training",
    "methods",
    "_environment",
    "files",
    "adapters",
    "export",
    "hub",
    "pictures",
    "recipes",
    "zoo",
    "commands",
    "__main__",
    "__init__",
]


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


@cache
def imports() -> dict[str, set[str]]:
    """Collect {module: modules of the package that it imports}, also inside functions and under TYPE_CHECKING."""
    files = {name_of(file): file for file in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        mine = found.setdefault(name, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                asked = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} has a relative import, which this test does not read"
                asked = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for one in asked:
                if one.split(".")[0] != ROOT.name:
                    continue
                while one not in files and "." in one:  # a name in a module
                    one = one.rpartition(".")[0]
                mine.add("lightning_deepr.__init__" if one == "lightning_deepr" else one)
        mine.discard(name)
    return found


def folder(module: str) -> str:
    return module.split(".")[1]


def upward() -> list[str]:
    """List the imports that run upwards: from a folder that comes later in the order."""
    pairs = [(a, b) for a, targets in imports().items() if folder(a) != "__init__" for b in targets]
    return sorted(f"{a} imports {b}" for a, b in pairs if ORDER.index(folder(b)) > ORDER.index(folder(a)))


def circles() -> list[list[str]]:
    """List the sets of modules that import each other (strongly connected components, by Tarjan's algorithm)."""
    graph = {a: sorted(targets) for a, targets in imports().items() if folder(a) != "__init__"}
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph.get(node, []):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in number:
            visit(node)
    return found


def levels() -> int:
    """Count the folders of the longest chain of imports."""
    between: dict[str, set[str]] = {name: set() for name in ORDER}
    for a, targets in imports().items():
        if folder(a) not in ("__main__", "__init__"):
            between[folder(a)] |= {folder(b) for b in targets if ORDER.index(folder(b)) < ORDER.index(folder(a))}

    @cache
    def level(name: str) -> int:
        return 1 + max((level(other) for other in between[name]), default=0)

    return max(level(name) for name in ORDER)


def test_every_folder_has_its_place() -> None:
    assert {folder(name) for name in imports()} == set(ORDER)


def test_no_import_runs_upwards() -> None:
    assert upward() == []


def test_no_imports_run_in_a_circle() -> None:
    assert circles() == []


def test_the_reader_of_imports_sees_all_of_them() -> None:
    """Without these kinds of imports the tests above would miss violations."""
    assert "lightning_deepr.kernels.cpu.step" in imports()["lightning_deepr.kernels"]  # inside a function
    assert "lightning_deepr.methods" in imports()["lightning_deepr.__init__"]  # under TYPE_CHECKING


if __name__ == "__main__":
    print(f"levels {levels()}, upward imports {len(upward())}, circles {len(circles())}")
    print(*upward(), *circles(), sep="\n")


def test_a_wheel_has_every_folder() -> None:
    """An editable install finds a folder that the list of packages lacks; an ordinary one does not."""
    listed = re.search(r"^packages = \[\n(.*?)^\]", (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    assert listed is not None
    found = {name_of(file) for file in ROOT.rglob("__init__.py")} - {"lightning_deepr.__init__"} | {"lightning_deepr"}
    assert found == {name for name in re.findall(r'"(.*?)"', listed[1]) if not name.endswith(".data")}
