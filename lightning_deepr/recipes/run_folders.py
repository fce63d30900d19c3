"""The folder of a run: what a recipe writes lies in it, and no other run writes there.

A folder belongs to a run as soon as it has the file ``run.json``, which is created in one indivisible step. So runs that start
at the same time get folders of their own: the first one takes the folder that was asked for, later ones ``run_2``, ``run_3``
and so on in it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_deepr._version import __version__

FORMAT = 1
RECORD, CONFIG, SPARSE, LAST = "run.json", "config.yaml", "sparse.safetensors", "checkpoints/last.ckpt"
VARIABLE = "LIGHTNING_DEEPR_RUN"  # rank 0 tells the folder to the ranks that it starts
_LEFT_BY_OLDER_VERSIONS = (SPARSE, "checkpoints", "csv", "wandb")  # they wrote no run.json
# keys of loggers and callbacks whose value is a path, for recipes that do not begin all paths with their default_root_dir
_PATH_KEYS = ("save_dir", "dir", "dirpath", "root_dir", "log_dir")


class Run(NamedTuple):
    """A run's folder and what it has.

    Attributes:
        folder: the folder.
        config: the configuration of the training, YAML; None: there is none.
        record: the content of ``run.json``; empty for a run of a version that wrote none.
    """

    folder: Path
    config: Path | None
    record: dict[str, Any]

    @property
    def checkpoint(self) -> Path | None:
        """What the run trained: its sparse file, or else its last checkpoint; None: there is neither."""
        return next((path for name in (SPARSE, LAST) if (path := self.folder / name).is_file()), None)


def claim(base: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Take a folder for a new run: ``base`` if no run has it, else the first free one of ``base/run_2``, ``base/run_3``, ...

    Args:
        base: the folder that was asked for. It may exist, and may have other files in it.
        record: what ``run.json`` says of the run.

    Returns:
        the folder, which exists and has a ``run.json``.

    Raises:
        ValueError: the folder can't be made or written.

    Example::

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     [str(claim(f"{place}/mnist", {}).relative_to(place)) for _ in range(3)]
        ['mnist', 'mnist/run_2', 'mnist/run_3']
    """
    base = Path(base)
    try:
        base.mkdir(parents=True, exist_ok=True)
        if not any((base / name).exists() for name in _LEFT_BY_OLDER_VERSIONS if not (base / RECORD).exists()):
            try:
                _create(base, record)
                return base
            except FileExistsError:
                pass
        number = 2
        while True:
            folder = base / f"run_{number}"
            try:
                folder.mkdir()
                _create(folder, record)
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ValueError(
            f"{base}: expected a folder that this run can write to, found {error}. Give another one with --out."
        ) from error


def _create(folder: Path, record: Mapping[str, Any]) -> None:
    with (folder / RECORD).open("x", encoding="utf-8") as file:
        file.write(_text({"format": FORMAT, "package_version": __version__, **record}))


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2, default=str) + "\n"


def release(folder: Path) -> None:
    """Give a folder back whose run did not begin. Files of others stay."""
    for name in (RECORD, CONFIG):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def update(folder: Path, **entries: Any) -> None:
    """Write entries into a run's record; a reader sees the old record or the new one."""
    record = read_record(folder)
    waiting = folder / f".{RECORD}.{os.getpid()}"
    waiting.write_text(_text({**record, **entries}), encoding="utf-8")
    waiting.replace(folder / RECORD)


def read_record(folder: Path) -> dict[str, Any]:
    """Read a run's record; {} if there is none.

    Raises:
        ValueError: it is damaged, or of a newer format.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the record of a run, found a file that can't be read: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise ValueError(f"{path}: expected the record of a run, with its `format`, found something else.")
    if record["format"] > FORMAT:
        raise ValueError(
            f"{path}: expected a run folder of format {FORMAT} or older, found {record['format']}, written by lightning-deepr "
            f"{record.get('package_version', '(unknown)')}. This is {__version__}: install the newer version."
        )
    return record


def find(path: str | os.PathLike[str]) -> Run | None:
    """Find the run that a path belongs to.

    Args:
        path: a run's folder, its sparse file or one of its checkpoints.

    Returns:
        the run; None: the path belongs to none.

    Raises:
        ValueError: the folder's record is damaged, or of a newer format.
    """
    path = Path(path)
    for folder in [path] if path.is_dir() else [path.parent, path.parent.parent]:
        record = read_record(folder)
        config = next((one for one in [folder / CONFIG, *_older_configs(folder)] if one.is_file()), None)
        if record or config is not None:
            return Run(folder, config, record)
    return None


def _older_configs(folder: Path) -> list[Path]:
    """List the configurations that LightningCLI left beside the CSV log, the newest first, as versions before run.json did."""
    return sorted(folder.glob("csv/version_*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)


def moved(value: Any, old: str, new: str, key: str = "") -> Any:
    """Replace the folder in each path of a configuration.

    Args:
        value: a configuration: dicts, lists and values; other mappings of jsonargparse are changed in place.
        old: the folder that the recipe names as ``default_root_dir``. Every text that is this path, or a path in it, moves.
            "": it names none; relative paths under keys that are known to name paths move.
        new: the folder of the run.

    Example::

        >>> moved({"save_dir": "runs/a", "filename": "runs/a/net.png", "name": "runs/ab"}, "runs/a", "out")
        {'save_dir': 'out', 'filename': 'out/net.png', 'name': 'runs/ab'}
        >>> moved({"save_dir": "logs", "monitor": "loss"}, "", "out")
        {'save_dir': 'out/logs', 'monitor': 'loss'}
    """
    if isinstance(value, list):
        return [moved(one, old, new, key) for one in value]
    if isinstance(value, dict):
        return {name: moved(one, old, new, name) for name, one in value.items()}
    if hasattr(value, "__dict__") and hasattr(value, "as_dict"):  # jsonargparse's Namespace
        for name, one in list(vars(value).items()):
            vars(value)[name] = moved(one, old, new, name)
        return value
    if not isinstance(value, str) or not value:
        return value
    if old:
        if os.path.normpath(value) == os.path.normpath(old):
            return new
        if "/" in value and os.path.normpath(value).startswith(os.path.join(os.path.normpath(old), "")):
            return os.path.join(new, os.path.relpath(value, old))
        return value
    return os.path.normpath(os.path.join(new, value)) if key in _PATH_KEYS and not os.path.isabs(value) else value
