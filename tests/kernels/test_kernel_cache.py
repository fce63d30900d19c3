"""Compiled kernels are kept in a cache folder of the user. If it fails, training works, and a message says why."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import pytest

import lightning_deepr
from lightning_deepr.kernels.cpu import disk_cache as cache
from lightning_deepr.kernels.cpu.native import Kernel, store_int64

PACKAGE = Path(lightning_deepr.__file__).parent
REPOSITORY = PACKAGE.parent

# Two steps of training, with all kernels that they compile.
TRAIN = """
import torch
from lightning_deepr import DeepR, sparsify
net = sparsify(torch.nn.Linear(6, 4), 8)
optimizer = torch.optim.SGD(net.parameters(), lr=.1)
DeepR(check_invariants=True).attach(net, optimizer)
x = torch.ones(2, 6)
for step in range(2):
    net(x).sum().backward()
    optimizer.step()
print("ok")
"""

# Kernels that compile fast.
STORE = """
import ctypes, sys
from lightning_deepr.kernels.cpu.native import Kernel, load_float, store_float
def kernel(factor):
    def scale(a):
        store_float(a, factor * load_float(a, 4), 4)
    return Kernel(scale)
for factor in (2., 3., 4.):
    value = ctypes.c_float(5.)
    kernel(factor)._call(ctypes.addressof(value))
    assert abs(value.value) == 5 * factor, value
    print('negative' if value.value < 0 else 'positive', file=sys.stderr)
print("ok")
"""


def storing(value: int) -> Kernel:
    """Make a kernel that compiles fast. All such kernels have the same function; only the value in its closure differs."""

    def store(a):  # type: ignore[no-untyped-def]
        store_int64(a, value)

    return Kernel(store)


def stored_by(kernel: Kernel) -> int:
    arguments = (ctypes.c_int64 * 1)(0)
    kernel(arguments)
    return arguments[0]


def hits(kernel: Kernel) -> int:
    return int(kernel._compiled.cache_hits)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty cache folder, and forget the messages that this process has logged."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", "")
    monkeypatch.setattr(cache, "_said", set())
    monkeypatch.setattr(cache, "_gave_up", False)
    return tmp_path / "kept"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "lightning_deepr")
    return lambda: [record.getMessage() for record in caplog.records if "compiles its CPU kernels" not in record.getMessage()]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_kernel_is_compiled_once_and_then_loaded(folder: Path, lines: Callable[[], list[str]]) -> None:
    first, second = storing(11), storing(11)
    assert (hits(first), hits(second)) == (0, 1)
    assert stored_by(first) == stored_by(second) == 11
    (file,) = files(folder)
    assert file.parent.parent == folder / "lightning-deepr"
    assert file.parent.name.startswith(f"{lightning_deepr.__version__}-")
    assert lines() == []


def test_kernels_of_one_function_are_told_apart_by_what_they_close_over(folder: Path) -> None:
    assert [stored_by(storing(value)) for value in (21, 22, 21, 22)] == [21, 22, 21, 22]
    assert [hits(storing(value)) for value in (21, 22, 23)] == [1, 1, 0]
    assert len(files(folder)) == 3


def test_what_a_kernel_closes_over_may_be_a_type_or_a_function(folder: Path, lines: Callable[[], list[str]]) -> None:
    def made(kind: type, function: Callable[[int], int]) -> Kernel:
        def store(a):  # type: ignore[no-untyped-def]
            store_int64(a, int(kind(function(2))))

        return Kernel(store)

    @numba.njit
    def twice(x: int) -> int:
        return 2 * x

    @numba.njit
    def thrice(x: int) -> int:
        return 3 * x

    given = [(np.int32, twice), (np.int32, thrice), (np.float32, twice)]
    assert [stored_by(made(*both)) for both in given] == [4, 6, 4]
    assert [hits(made(*both)) for both in given] == [1, 1, 1]
    assert len(files(folder)) == 3
    assert lines() == []


def test_what_cannot_be_told_apart_is_not_kept(folder: Path, lines: Callable[[], list[str]]) -> None:
    numbers = np.arange(3)

    def store(a):  # type: ignore[no-untyped-def]
        store_int64(a, numbers[2])

    assert [stored_by(Kernel(store)) for _ in range(2)] == [2, 2]
    assert files(folder) == []
    assert len(lines()) == 1
    assert "cannot keep compiled kernels (TypeError: it closes over a ndarray)" in lines()[0]


def test_the_folder_is_the_users_unless_numba_is_told_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert cache.root() == tmp_path / "lightning-deepr"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", "")
    if sys.platform.startswith("linux"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
        assert cache.root() == tmp_path / "own" / "lightning-deepr" / "kernels"
    elsewhere = cache.root()
    assert elsewhere is not None
    assert PACKAGE not in elsewhere.parents


def cut_to(length: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(length * len(content)) if isinstance(length, float) else length]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": cut_to(0),
    "cut in its first line": cut_to(10),
    "cut in its head": cut_to(70),
    "cut after its head": cut_to(97),
    "cut in the middle": cut_to(0.5),
    "without its last byte": cut_to(-1),
    "one bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "zeros": lambda content: bytes(len(content)),
    "something else": lambda content: b"\x80\x04K\x01." * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_compiled_anew_and_replaced(folder: Path, lines: Callable[[], list[str]], damage: str) -> None:
    storing(31)
    (file,) = files(folder)
    content = file.read_bytes()
    file.write_bytes(DAMAGE[damage](content))
    again = storing(31)
    assert (hits(again), stored_by(again)) == (0, 31)
    assert len(lines()) == 1
    assert str(file) in lines()[0]
    assert "compiles it anew" in lines()[0]
    assert files(folder) == [file]
    assert hits(storing(31)) == 1
    file.write_bytes(b"")
    assert stored_by(storing(31)) == 31
    assert len(lines()) == 1, "it is said once"


def test_a_file_that_is_whole_but_no_kernel(folder: Path, lines: Callable[[], list[str]]) -> None:
    """Another build of numba may leave such a file under the same version."""
    storing(32)
    (file,) = files(folder)
    key = file.read_bytes()[len(cache.MAGIC) : len(cache.MAGIC) + 32]
    for payload in (b"no pickle", b"\x80\x04K\x01.", b"\x80\x04)."):  # the last two: 1 and ()
        file.write_bytes(cache._pack(payload, key))
        again = storing(32)
        assert (hits(again), stored_by(again)) == (0, 32)
    assert len(lines()) == 1
    assert "compiles it anew" in lines()[0]


def test_a_file_under_the_name_of_another_is_refused(folder: Path, lines: Callable[[], list[str]]) -> None:
    storing(41)
    (one,) = files(folder)
    storing(42)
    (other,) = set(files(folder)) - {one}
    shutil.copy(one, other)
    assert stored_by(storing(42)) == 42
    assert "another version, Python or CPU" in lines()[0]


@pytest.mark.parametrize("what", ["__version__", "_sources", "numba", "llvmlite", "options"])
def test_another_version_has_a_folder_of_its_own(
    folder: Path, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    storing(51)
    (old,) = files(folder)
    with monkeypatch.context() as other:
        if what in ("numba", "llvmlite"):
            other.setattr(getattr(cache, what), "__version__", "0.0.1")
        elif what == "options":
            other.setattr(numba.core.config, "LOOP_VECTORIZE", 0)
        else:
            other.setattr(cache, what, "0.0.1")
        if what == "_sources":
            other.setattr(cache, "digest_of_sources", lambda: "0.0.1")
        again = storing(51)
        assert (hits(again), stored_by(again)) == (0, 51)
        assert hits(storing(51)) == 1
    (line,) = lines()
    assert str(folder / "lightning-deepr") in line
    assert "another version, Python or CPU" in line
    assert len(files(folder)) == 2
    assert {file.parent == old.parent for file in files(folder)} == {True, False}
    assert hits(storing(51)) == 1, "the first version's is still there"


def test_folders_that_nobody_uses_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storing(61)
    (own,) = files(folder)
    root = folder / "lightning-deepr"
    now = time.time()
    for name, age in (("0.0.1-0123456789abcdef", 40), ("0.0.2-0123456789abcdef", 20), ("somebody else's", 400)):
        (root / name).mkdir()
        (root / name / "file").write_text("", encoding="utf-8")
        os.utime(root / name, (now - age * 86400, now - age * 86400))
    os.utime(own.parent, (now - 29 * 86400, now - 29 * 86400))
    assert hits(storing(61)) == 1  # marks the folder as used
    assert now - own.parent.stat().st_mtime < 86400
    monkeypatch.setattr(cache, "__version__", "0.0.3")
    storing(61)  # a new folder
    left = {path.name for path in root.iterdir()}
    assert "0.0.1-0123456789abcdef" not in left
    assert {"0.0.2-0123456789abcdef", "somebody else's", own.parent.name} < left


def test_only_the_newest_folders_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "AT_MOST", 3)
    root, now = folder / "lightning-deepr", time.time()
    for age in range(5):
        (root / f"0.0.{age}-0123456789abcdef").mkdir(parents=True)
        os.utime(root / f"0.0.{age}-0123456789abcdef", (now - 60 * age, now - 60 * age))
    storing(62)
    (own,) = {file.parent.name for file in files(folder)}
    assert {path.name for path in root.iterdir()} == {own, "0.0.0-0123456789abcdef", "0.0.1-0123456789abcdef"}


def test_sources_that_changed_since_they_were_imported_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "digest_of_sources", lambda: "changed")
    assert stored_by(storing(71)) == 71
    assert files(folder) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path, folder: Path, lines: Callable[[], list[str]]) -> None:
    folder.write_text("a file where the folder should be", encoding="utf-8")
    for value in (81, 82):
        kernel = storing(value)
        assert (hits(kernel), stored_by(kernel)) == (0, value)
    assert any(re.search("cannot keep compiled kernels in .*kept.*each process compiles them", line) for line in lines())
    assert len(lines()) <= 2  # one that the folder can't be read, and one that it can't be written


def test_no_home_folder(folder: Path, lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setattr(cache, "_user_cache", lambda: "~/.cache/lightning-deepr")  # no home folder
    monkeypatch.chdir(tmp_path)
    assert stored_by(storing(91)) == 91
    assert len(lines()) == 1
    assert "no folder to keep compiled kernels in" in lines()[0]
    assert list(tmp_path.iterdir()) == []


def started(
    folder: Path | None, program: str = TRAIN, setup: Callable[[], None] | None = None, **environment: str
) -> subprocess.Popen[str]:
    everything = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA_", "XDG_"))}
    own = {} if folder is None else {"NUMBA_CACHE_DIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**everything, **own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=setup,
    )


def ended(process: subprocess.Popen[str]) -> list[str]:
    """Return the lines about kernels on the stderr of a program that has to succeed."""
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    assert set(out.split()) == {"ok"}
    return [line for line in err.splitlines() if "kernel" in line and "compiles its CPU kernels" not in line]


def snapshot(folder: Path) -> set[Path]:
    """Return all files except those that Python itself writes at import. (pip removes these.)"""
    return {path for path in folder.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"}


@pytest.mark.slow
def test_nothing_is_written_into_the_package(tmp_path: Path) -> None:
    before = snapshot(PACKAGE)
    assert ended(started(None, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))) == []
    assert snapshot(PACKAGE) == before
    assert files(tmp_path), "the kernels are kept in the user's folder"


def without_rights() -> None:
    """Drop CAP_DAC_OVERRIDE, which lets root write everywhere, from this process and the program that it starts."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o555)
    yield home
    home.chmod(0o755)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes root's rights away as Linux does")
def test_a_read_only_home(read_only: Path) -> None:
    (line,) = ended(started(None, setup=without_rights, HOME=str(read_only)))
    assert "cannot keep compiled kernels in" in line
    assert "Permission denied" in line
    assert list(read_only.iterdir()) == []


def at_most_1000_bytes() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file may become larger, so writing fails half way


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as POSIX does")
def test_a_file_that_cannot_be_written_to_its_end(tmp_path: Path) -> None:
    (line,) = ended(started(tmp_path / "kept", STORE, setup=at_most_1000_bytes))
    assert "cannot keep compiled kernels in" in line
    assert files(tmp_path) == [], "no half file is left"


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        (line,) = ended(started(tmp_path / "kept", STORE))
        assert "No space left on device" in line
        assert all(file.read_bytes().startswith(cache.MAGIC) for file in files(tmp_path)), "what fitted is whole"
        assert not list(tmp_path.rglob("*.part"))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.slow
def test_two_processes_compile_at_once(tmp_path: Path) -> None:
    # Each process waits until all are ready to compile.
    meet = """
import pathlib, time
import lightning_deepr.kernels.cpu.native
here = pathlib.Path({folder!r})
(here / {name!r}).touch()
while len(list(here.glob("ready*"))) < 3:
    time.sleep(.001)
"""
    processes = [started(tmp_path / "kept", meet.format(folder=str(tmp_path), name=f"ready{i}") + STORE) for i in range(3)]
    assert [ended(process) for process in processes] == [[], [], []]
    kept = files(tmp_path / "kept")
    assert len(kept) == 3
    assert not [file for file in kept if file.suffix == ".part"]
    inodes = {file: file.stat().st_ino for file in kept}
    assert ended(started(tmp_path / "kept", STORE)) == []
    assert {file: file.stat().st_ino for file in files(tmp_path / "kept")} == inodes, "all were loaded"


@pytest.mark.slow
def test_another_cpu_has_kernels_of_its_own(tmp_path: Path) -> None:
    assert ended(started(tmp_path, STORE, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")) == []
    first = files(tmp_path)
    (line,) = ended(started(tmp_path, STORE))
    assert "another version, Python or CPU" in line
    assert len(files(tmp_path)) == 2 * len(first)
    assert len({file.parent for file in files(tmp_path)}) == 2
    assert ended(started(tmp_path, STORE)) == []


@pytest.mark.slow
def test_a_change_in_a_file_that_a_kernel_calls(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "source" / "lightning_deepr", ignore=shutil.ignore_patterns("__pycache__"))
    program = f"import sys\nsys.path.insert(0, {str(tmp_path / 'source')!r})\n" + STORE
    said = []
    for sign in ("positive", "negative"):
        if sign == "negative":
            (native,) = (tmp_path / "source").rglob("native.py")
            stat, text = native.stat(), native.read_text(encoding="utf-8")
            here = text.index("def store_float(")  # from here on, change it to store the negative value
            changed = text[:here] + text[here:].replace("builder.store(args[1],", "builder.store(builder.fneg(args[1]),", 1)
            assert len(changed) == len(text) + len("builder.fneg()")
            native.write_text(changed, encoding="utf-8")
            os.utime(native, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        out, err = started(tmp_path / "kept", program).communicate(timeout=1800)
        assert out == "ok\n", err
        said.append([line for line in err.splitlines() if line in ("positive", "negative")])
    assert said == [["positive"] * 3, ["negative"] * 3]
    assert len({file.parent for file in files(tmp_path / "kept")}) == 2


@pytest.mark.slow
def test_uninstalling_leaves_nothing(tmp_path: Path) -> None:
    """A folder that is left behind would hide a later editable install: Python takes it for a namespace package."""
    wheels, home, environment = tmp_path / "wheels", tmp_path / "venv", {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": ""}
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
        environment.pop(name, None)

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(wheels), str(REPOSITORY))
    run(sys.executable, "-m", "venv", "--without-pip", str(home))
    python = str(home / ("Scripts" if os.name == "nt" else "bin") / "python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # This file comes last, and without the .pth files that make an editable install of this checkout.
    (site / "zz_others.pth").write_text("\n".join(others))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", *map(str, wheels.glob("*.whl")))
    assert (site / "lightning_deepr").is_dir()
    used = "import lightning_deepr, pathlib; assert pathlib.Path(lightning_deepr.__file__).parent.parent.samefile({!r})\n"
    assert run(python, "-c", used.format(str(site)) + STORE).split() == ["ok"]
    run(python, "-m", "lightning_deepr.commands.main", "recipes")
    run(*pip, "uninstall", "--yes", "lightning-deepr")
    assert not (site / "lightning_deepr").exists(), sorted((site / "lightning_deepr").rglob("*"))
    assert not list(site.glob("lightning_deepr*"))
