"""A light installation, made of the one at hand in a second: torch, lightning, numpy, numba, safetensors, and pytest.

    python -m tests.helpers.five FOLDER [pytest's arguments]    # makes the environment, and runs the tests there
    python -m tests.helpers.five five -q                        # all of them

The environment is a real one, with its own Python and its own site-packages, which has symbolic links to the five packages, to
what these bring, and to nothing else. What it lacks is not there: no import is intercepted.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.helpers.light import FIVE, closure
from tests.helpers.paths import ROOT

TESTS = ("pytest", "pytest-xdist")


def make(folder: Path) -> Path:
    """Make the environment, and return the path of its Python."""
    venv.create(folder, symlinks=True, clear=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    there = Path(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip())
    kept = closure(*FIVE, *TESTS)
    for name in sorted(kept):
        for entry in entries(name):
            if not (there / entry.name).is_symlink():
                (there / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    # the checkout itself, as `pip install --no-deps -e .` has it: its code, and its two folders of data under their names
    (there / "checkout.pth").write_text(f"{ROOT}\nimport checkout\n")
    (there / "checkout.py").write_text(CHECKOUT.format(root=str(ROOT)))
    return python


CHECKOUT = """\
import sys
from importlib.machinery import PathFinder
from importlib.util import spec_from_file_location

FOLDERS = {{"lightning_deepr.zoo.data": "zoo", "lightning_deepr.recipes.data": "recipes"}}


class Data(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in FOLDERS:
            folder = {root!r} + "/" + FOLDERS[name]
            return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])


sys.meta_path.insert(0, Data)
"""


def entries(name: str) -> list[Path]:
    """List what a distribution has in site-packages, at the top: its packages, modules, libraries and record."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # needed on another platform only
        return []
    sites = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    found = set()
    for file in distribution.files or []:
        place = Path(os.path.normpath(str(distribution.locate_file(""))), file.parts[0])
        if file.parts[0] not in ("..", "__pycache__") and place.parent.resolve() in sites and place.exists():
            found.add(place)
    return sorted(found)


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tests with that Python."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(python), "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)


def main() -> None:
    python = make(Path(sys.argv[1]))
    sys.exit(subprocess.run([python, "-m", "pytest", *sys.argv[2:]], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
