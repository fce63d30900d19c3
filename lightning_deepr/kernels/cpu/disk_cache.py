"""The cache of compiled kernels: one file per kernel, in a cache folder of the user, never in the package.

numba's own cache does not serve here, for three reasons. It lies beside the source, and pip leaves it behind. It checks the
file of the kernel alone, not the other files that the kernel calls. And two processes that compile different kernels of one
file at the same time can write the code of one under the name of the other.

Here the name of a file says what its content depends on. A process writes the file under another name first, and the file
states its own checksum. If anything is wrong with a file, the kernel is compiled in memory and one log message says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import logging
import os
import pickle
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import llvmlite
import numba
from numba.core import config
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from lightning_deepr._version import __version__

log = logging.getLogger("lightning_deepr")

MAGIC = b"lightning_deepr kernel, format 1\n"
KEPT_FOR = 30 * 24 * 3600
"""The number of seconds after which an unused folder (of another version, Python or CPU) is removed."""
AT_MOST = 20
"""The number of folders that are kept. Every change of the sources makes a new one."""

_FOLDER = re.compile(r"[\w.+]+-[0-9a-f]{16}")
_OPTIONS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "ENABLE_AVX", "ENABLE_PROFILING")
_said: set[str] = set()
_gave_up = False


def root() -> Path | None:
    """Return the folder that holds one folder per version, Python and CPU, or None if the user has no cache folder.

    It is ``$NUMBA_CACHE_DIR/lightning-deepr`` if that variable is set, else ``kernels`` in the user's cache folder.
    """
    given = os.environ.get("NUMBA_CACHE_DIR") or getattr(config, "CACHE_DIR", "")
    if given:
        return Path(given).absolute() / "lightning-deepr"
    path = Path(_user_cache())
    return path / "kernels" if path.is_absolute() else None  # without a home folder the path begins with "~"


def _user_cache() -> str:
    """Return the package's folder among the user's caches, as ``platformdirs`` names it; that library may be missing."""
    try:
        from platformdirs import user_cache_dir
    except ImportError:  # a light installation: torch, lightning, numpy, numba and safetensors
        if sys.platform == "win32":
            caches = os.environ.get("LOCALAPPDATA") or os.path.join("~", "AppData", "Local")
            return os.path.join(os.path.expanduser(caches), "lightning-deepr", "Cache")
        caches = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
        return os.path.join(os.path.expanduser(caches), "lightning-deepr")
    return user_cache_dir("lightning-deepr", appauthor=False)


def digest_of_sources() -> str:
    """Return the digest of the files that kernels are compiled from, or "" if they are not there.

    The kernels are in this package, and they take constants from ``algorithm``.
    """
    folders = [importlib.resources.files(package) for package in (__package__, "lightning_deepr.algorithm")]
    found = [file for folder in folders for file in folder.iterdir() if file.name.endswith(".py")]
    sources = sorted(found, key=lambda file: (file.name, str(file)))
    digest = hashlib.sha256()
    for file in sources:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest() if sources else ""


_sources = digest_of_sources()  # taken at import: if a file changes later, its old code still runs here


def environment(codegen: Any) -> tuple[Any, ...]:
    """Return what all kernels of a process depend on: the sources, the compiler and the CPU that it compiles for."""
    python = (sys.implementation.cache_tag, getattr(sys, "abiflags", ""))
    options = tuple(getattr(config, name, None) for name in _OPTIONS)
    return (__version__, _sources, numba.__version__, llvmlite.__version__, python, options, codegen.magic_tuple())


def folder_name(codegen: Any) -> str:
    """Return the name of the folder for the kernels of this process."""
    return f"{__version__}-{_sha256(repr(environment(codegen)).encode()).hex()[:16]}"


class KernelCache:
    """The cache of one kernel. It loads and saves the kernel in place of numba's cache in a ``CFunc``.

    Args:
        function: the Python function of the kernel.
    """

    def __init__(self, function: Callable[[Any], None], missing: Callable[[], None] = lambda: None) -> None:
        self._function, self._missing = function, missing

    def load_overload(self, signature: Any, target_context: Any) -> CompileResult | None:
        """Return the compiled kernel, or None if it has to be compiled; ``missing`` is called then."""
        found = self._load(signature, target_context)
        if found is None:
            self._missing()
        return found

    def _load(self, signature: Any, target_context: Any) -> CompileResult | None:
        target_context.refresh()  # makes the context ready, as numba's own cache does
        path = None
        try:
            path, key = self._place(signature, target_context.codegen())
            if path is None:
                return None
            payload = _unpack(path.read_bytes(), key)
            compiled = CompileResult._rebuild(target_context, *pickle.loads(payload))
        except FileNotFoundError:
            if path is not None:
                _look_for_others(path.parent)
            return None
        except OSError as error:
            _say("read", f"lightning_deepr cannot read the compiled kernels in {_folder_of(path)} ({error}): it compiles them.")
            return None
        except Exception as error:  # a damaged file can raise any error
            if path is None:
                return None  # save_overload says why
            reason = f"{type(error).__name__}: {error}"
            _say("damaged", f"The compiled kernel {path} is damaged ({reason}): lightning_deepr compiles it anew.")
            return None
        _mark_as_used(path.parent)
        return compiled

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a compiled kernel, if there is a folder for it."""
        global _gave_up
        if _gave_up:
            return
        path = None
        try:
            path, key = self._place(signature, compiled.codegen)
            if path is None:
                _gave_up = True
                _say(
                    "save",
                    "lightning_deepr finds no folder to keep compiled kernels in: each process compiles them. " + _ADVICE,
                )
                return
            if compiled.library.has_dynamic_globals or not _sources or digest_of_sources() != _sources:
                return  # the code holds addresses of this process, or the sources have changed since the import
            _write(path, _pack(dumps(compiled._reduce()), key))
        except OSError as error:
            _gave_up = True
            _say(
                "save",
                f"lightning_deepr cannot keep compiled kernels in {_folder_of(path)} ({error}): "
                f"each process compiles them. {_ADVICE}",
            )
        except Exception as error:  # another version of numba may pack its results differently
            _gave_up = True
            _say(
                "save",
                f"lightning_deepr cannot keep compiled kernels ({type(error).__name__}: {error}): each process compiles them.",
            )

    def _place(self, signature: Any, codegen: Any) -> tuple[Path | None, bytes]:
        """Return the file of the kernel and the key that the file has to state."""
        folder = root()
        key = _sha256(repr((environment(codegen), str(signature), _facts(self._function))).encode())
        if folder is None:
            return None, key
        name = re.sub(r"[^\w.]", "", self._function.__qualname__.replace("<locals>.", ""))
        return folder / folder_name(codegen) / f"{name}-{key.hex()[:24]}", key


_ADVICE = "NUMBA_CACHE_DIR names another folder."


def said_why() -> bool:
    """Tell whether a log message has said that the kept kernels are of another version, Python or CPU."""
    return "others" in _said


def _look_for_others(own: Path) -> None:
    with contextlib.suppress(OSError):
        if not own.is_dir() and any(_FOLDER.fullmatch(entry.name) for entry in own.parent.iterdir()):
            _say(
                "others",
                f"The compiled kernels in {own.parent} are of another version, Python or CPU: "
                "lightning_deepr compiles its own (some seconds, once on this machine).",
            )


def _facts(value: Any) -> Any:
    """Return what compiled code takes from a value: code with its constants and closure, a type or a plain value.

    Raises:
        TypeError: if the value is of another kind.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, tuple):
        return tuple(_facts(item) for item in value)
    if isinstance(value, CodeType):
        return value.co_code.hex(), value.co_names, value.co_varnames, _facts(value.co_consts)
    if isinstance(value, type):
        return value.__module__, value.__qualname__
    function = getattr(value, "py_func", value)  # the Python function, if numba compiled the value
    if not isinstance(function, FunctionType):
        raise TypeError(f"it closes over a {type(value).__name__}")
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return function.__module__, function.__qualname__, _facts(function.__code__), _facts(tuple(cells))


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _pack(payload: bytes, key: bytes) -> bytes:
    return MAGIC + key + _sha256(payload) + payload


def _unpack(content: bytes, key: bytes) -> bytes:
    head, payload = content[: len(MAGIC) + 64], content[len(MAGIC) + 64 :]
    if len(head) < len(MAGIC) + 64 or head[: len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin like the file of a kernel")
    if head[len(MAGIC) : len(MAGIC) + 32] != key:
        raise ValueError("it is of another version, Python or CPU")
    if head[len(MAGIC) + 32 :] != _sha256(payload):
        raise ValueError("its checksum is wrong, as after an interrupted copy")
    return payload


def _write(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that no process ever sees a part of it."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_unused(path.parent)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")  # (only its owner could read a file of tempfile)
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if os.name == "nt" and isinstance(error, PermissionError) and path.exists():
            return  # another process has just written the file and reads it
        raise


def _mark_as_used(folder: Path) -> None:
    """Set the date of a folder, which says when it was last used. Once a day is enough."""
    with contextlib.suppress(OSError):
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            os.utime(folder)


def _remove_unused(own: Path) -> None:
    """Remove other folders that have not been used for KEPT_FOR seconds, and the oldest of more than AT_MOST folders."""
    with contextlib.suppress(OSError):
        folders = [one for one in own.parent.iterdir() if _FOLDER.fullmatch(one.name) and one.is_dir() and not one.is_symlink()]
        dates = {folder: folder.stat().st_mtime for folder in folders if folder != own}
        for count, folder in enumerate(sorted(dates, key=dates.__getitem__, reverse=True), start=2):
            if count > AT_MOST or time.time() - dates[folder] > KEPT_FOR:
                shutil.rmtree(folder, ignore_errors=True)


def _folder_of(path: Path | None) -> str:
    return "the cache folder" if path is None else str(path.parent)


def _say(subject: str, line: str) -> None:
    """Log a line, once per subject and process."""
    if subject not in _said:
        _said.add(subject)
        log.warning(line)
