"""What ``report`` and ``compare`` take: a run's folder, a sparse file, a checkpoint, a model of the zoo or of the Hub."""

from __future__ import annotations

import csv
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_deepr import zoo
from lightning_deepr.conversion.report import ConnectivityReport
from lightning_deepr.files import container
from lightning_deepr.files.checkpoint import report_of_checkpoint
from lightning_deepr.recipes import run_folders
from lightning_deepr.recipes.run_folders import Run
from lightning_deepr.zoo.topology import Topology

_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LISTED = ("method", "connectivity", "distribution", "init", "l1", "scope", "seed")  # of a run's settings


@dataclass
class Source:
    """A trained network, as far as its file and its run's folder tell without its class.

    Attributes:
        name: as the user named it.
        kind: "run" | "sparse file" | "checkpoint" | "model of the zoo" | "model of the Hub".
        file: the file that was read.
        report: its connectivity; without rows, the network is dense.
        places: {tensor: int64 [K]}; a checkpoint of soft-DEEP R or of a pruning has none.
        metrics: the end result.
        settings: what made it, as far as it is recorded.
        run: the run's folder; None: none is known.
    """

    name: str
    kind: str
    file: Path
    report: ConnectivityReport
    places: dict[str, Tensor]
    metrics: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    run: Run | None = None

    @property
    def bytes(self) -> int:
        """The size of the file."""
        return self.file.stat().st_size

    @property
    def connectivity(self) -> float | None:
        """K / N over the sparse tensors; None: nothing is sparse."""
        return self.report.active / self.report.total if self.report.total else None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in builtins, without the places."""
        return {
            "name": self.name,
            "kind": self.kind,
            "file": str(self.file),
            "bytes": self.bytes,
            **self.report.to_dict(),
            "connectivity": self.connectivity,
            "metrics": self.metrics,
            "settings": self.settings,
        }

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Read {metric: [(step, value)]} from the run's newest CSV log that has them; {} if there is none."""
        if self.run is None:
            return {}
        found: dict[str, list[tuple[float, float]]] = {}
        logs = sorted(self.run.folder.glob("csv/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        for path in logs:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    for name, text in row.items():
                        if name in ("step", "epoch", None) or not text or not row.get("step"):
                            continue
                        try:
                            found.setdefault(name, []).append((float(row["step"]), float(text)))
                        except ValueError:
                            continue
        return {name: sorted(dict(points).items()) for name, points in found.items()}


def open_source(name: str) -> Source:
    """Open what a user named.

    Raises:
        ValueError: it is damaged, of another version, or no trained network.
        FileNotFoundError: there is no such folder, file or model. The message has the nearest names.
        HubError: the Hub does not have it, or can't be reached.
    """
    path = Path(name)
    if path.is_dir():
        run = run_folders.find(path)
        if run is None or run.checkpoint is None:
            raise ValueError(
                f"{name}: expected the folder of a run, with {run_folders.SPARSE} or {run_folders.LAST} in it, found neither."
            )
        return _of_file(name, "run", run.checkpoint, run)
    if path.is_file():
        run = run_folders.find(path)
        return _of_file(name, "sparse file" if container.kind_of(path) == "sparse" else "checkpoint", path, run)
    if name not in zoo.list_models() and _HUB.fullmatch(name) and path.suffix not in (".ckpt", ".pt", ".pth", ".safetensors"):
        from lightning_deepr.hub import transfer

        return _of_file(name, "model of the Hub", transfer.download(name), None)
    if path.suffix in (".ckpt", ".pt", ".pth"):
        raise FileNotFoundError(f"no checkpoint at {name!r}.")
    return _of_file(name, "model of the zoo", zoo.path_of(name), None)


def _of_file(name: str, kind: str, file: Path, run: Run | None) -> Source:
    metrics: dict[str, float] = {}
    settings: dict[str, Any] = {}
    if container.kind_of(file) == "sparse":
        model = file if Path(name).exists() or name not in zoo.list_models() else name  # by its name: the registry's sha256
        info = zoo.info(model)
        connectivity = info["connectivity"]
        rows = [{"l1": None, "lr_scale": None, **row, "compute": "-"} for row in connectivity["rows"]]
        report = ConnectivityReport(rows, connectivity["left_out"])
        places = {tensor: places for tensor, (_, places, _) in zoo.connections_of(model).items()}
        metrics = _numbers(info.get("metrics"))
        settings = _recorded(info)
    else:
        report = report_of_checkpoint(file)
        try:
            places = Topology(file).starting_places()
        except ValueError:  # a theta for every place
            places = {}
        places = {row["name"]: places[row["name"]] for row in report if row["name"] in places}
    if run is not None:
        metrics = _numbers(run.record.get("metrics")) or metrics
        settings = _settings_of(run) or settings
    return Source(name, kind, file, report, places, metrics, settings, run)


def _numbers(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        return {}
    values = {name: one.get("value") if isinstance(one, Mapping) else one for name, one in metrics.items()}
    return {name: float(one) for name, one in values.items() if isinstance(one, (int, float)) and not isinstance(one, bool)}


def _recorded(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a sparse file records, under the names of a run's."""
    found: dict[str, Any] = {"method": info.get("algorithm")}
    for key in ("recipe", "data"):
        value = info.get(key)
        found[key] = value.get("name") if isinstance(value, Mapping) else value
    seeds = info.get("seeds")
    found["seed"] = seeds[0] if isinstance(seeds, list) and len(seeds) == 1 else seeds
    given = info.get("hyperparameters")
    found |= given if isinstance(given, Mapping) else {}
    return {key: value for key, value in found.items() if value is not None}


def _settings_of(run: Run) -> dict[str, Any]:
    """Return a run's recipe, method, settings and seed, from its configuration."""
    import yaml  # type: ignore[import-untyped]

    found: dict[str, Any] = {"recipe": run.record["recipe"]} if run.record.get("recipe") else {}
    if run.config is None:
        return found
    try:
        content = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{run.config}: expected a run's configuration, found a file that can't be read: {error}") from error
    content = content if isinstance(content, dict) else {}
    sparsity = content.get("sparsity")
    given = {"seed": content.get("seed_everything"), "method": "dense"}
    if isinstance(sparsity, dict):
        arguments = sparsity.get("init_args") or {}
        given |= {key: value for key, value in arguments.items() if key in _LISTED and value is not None}
        given["method"] = str(sparsity.get("class_path", "")).rpartition(".")[2]
    trainer, model = (part if isinstance(part := content.get(key), dict) else {} for key in ("trainer", "model"))
    found |= {key: given[key] for key in _LISTED if key in given}
    found |= {key: trainer[key] for key in ("max_epochs", "max_steps") if trainer.get(key) not in (None, -1)}
    return {**found, **{key: value for key, value in (model.get("init_args") or {}).items() if value is not None}}


def short(value: Any) -> str:
    """Write a setting in a few words.

    Example::

        >>> short({"class_path": "lightning_deepr.LinearDecay", "init_args": {"start": 2e-4, "end": 0.0}})
        'LinearDecay(start=0.0002, end=0)'
    """
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = ", ".join(f"{key}={short(one)}" for key, one in (value.get("init_args") or {}).items())
        return f"{str(value['class_path']).rpartition('.')[2]}({arguments})"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {short(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def lines_of(key: str, *cells: str, width: int) -> list[tuple[str, ...]]:
    """Break long cells into several rows of a table."""
    parts = [textwrap.wrap(cell, width, break_long_words=True) or [""] for cell in cells]
    most = max(map(len, parts))
    return [(key if i == 0 else "", *(part[i] if i < len(part) else "" for part in parts)) for i in range(most)]
