"""What a run leaves in its loggers beside its curves: the recipe, the end result, pictures, a table, the sparse file."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_deepr.conversion.convert import connections
from lightning_deepr.conversion.report import ConnectivityReport, connectivity_report
from lightning_deepr.hub.pictures import draw
from lightning_deepr.packages.classes import Callback
from lightning_deepr.packages.messages import rank_zero_only
from lightning_deepr.packages.names import is_a
from lightning_deepr.recipes.callbacks import SparseCheckpoint
from lightning_deepr.training import run_config
from lightning_deepr.training.callback import SparseTraining
from lightning_deepr.training.guarded_loggers import tell

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_TABLE = ("name", "shape", "total", "active", "connectivity")


class RunLog(Callback):
    """Writes into every logger what tells a run from others. List it last; ``lightning-deepr fit`` adds it.

    - every logger: ``recipe`` in the hyperparameters (and, without a method's callback, method "dense" and the versions);
    - wandb, at the end: the summary (connectivity, connections, metrics; no statistics), the picture and the table as media,
      the sparse file as an Artifact whose input is the data, by its digest (offline: named in its metadata);
    - TensorBoard, at the end: the picture, and the table as text;
    - MLflow, at the end: the picture, the table (CSV) and the sparse file as artifacts of the run.

    A logger that fails is told of once; the training goes on.

    Args:
        recipe: the name of the recipe; "": none.
        folder: the run's folder, for the picture; None: the Trainer's ``default_root_dir``.
    """

    def __init__(self, recipe: str = "", folder: str | Path | None = None) -> None:
        self.recipe, self.folder = recipe, folder

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SparseCheckpoint):
                callback.recipe = self.recipe
        config: dict[str, Any] = {"recipe": self.recipe} if self.recipe else {}
        if not any(isinstance(one, SparseTraining) for one in trainer.callbacks):  # type: ignore[attr-defined]
            config |= {"sparsity": {"method": "dense", "density": 1.0}, "versions": run_config.versions()}
            if (digest := run_config.digest_of_data(trainer)) is not None:
                config["data_digest"] = digest
        for logger in trainer.loggers:
            if config:
                logger.log_hyperparams(config)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.loggers:
            return
        report = connectivity_report(pl_module)
        picture = self._draw(trainer, pl_module)
        written = (getattr(one, "written", None) for one in trainer.callbacks if isinstance(one, SparseCheckpoint))  # type: ignore[attr-defined]
        file = next((path for path in written if path is not None), None)
        for logger in trainer.loggers:
            if is_a(logger, "loggers.wandb", "WandbLogger"):
                _try(logger, lambda run: self._to_wandb(run, trainer, report, picture, file))
            elif is_a(logger, "loggers.tensorboard", "TensorBoardLogger"):
                _try(logger, lambda writer: _to_tensorboard(writer, trainer.global_step, report, picture))
            elif is_a(logger, "loggers.mlflow", "MLFlowLogger"):
                _try(logger, functools.partial(_to_mlflow, logger, report, picture, file))

    def _draw(self, trainer: Trainer, module: LightningModule) -> Path | None:
        """Draw the connections; None: there are none, or the picture can't be written."""
        found = connections(module)
        if not found:
            return None
        folder = Path(self.folder or trainer.default_root_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return draw(found, folder / "connections.png")
        except OSError as error:
            tell(self, error)
            return None

    def _to_wandb(
        self, run: Any, trainer: Trainer, report: ConnectivityReport, picture: Path | None, file: Path | None
    ) -> None:
        import wandb

        step = {"trainer/global_step": trainer.global_step}
        media: dict[str, Any] = {}
        if picture is not None:
            media["connections"] = wandb.Image(str(picture))
        if len(report):
            media["connectivity"] = wandb.Table(columns=list(_TABLE), data=_cells(report))
        if media:
            run.log({**media, **step})
        run.summary.update(summary_of(report, trainer))
        _without_statistics(run, trainer)
        if file is not None:
            self._artifacts(run, report, file)

    def _artifacts(self, run: Any, report: ConnectivityReport, file: Path) -> None:
        """Log the sparse file, with its lineage: the data that the run read is its input.

        wandb refuses inputs of offline runs. There the data is an artifact of the run, and the digest in the model's metadata
        tells which.
        """
        import wandb

        config = dict(run.config)
        digest = config.get("data_digest")
        lineage = {"recipe": self.recipe, "data_digest": digest, "sparsity": config.get("sparsity")}
        model = wandb.Artifact(f"{self.recipe or 'sparse'}-{run.id}", type="model", metadata={**lineage, **_sums(report)})
        model.add_file(str(file))
        if isinstance(digest, str):
            data = wandb.Artifact(f"data-{digest}", type="dataset", metadata={"digest": digest})
            with data.new_file("data.json") as stream:
                json.dump({"digest": digest}, stream)
            if getattr(run, "offline", False):
                run.log_artifact(data)
            else:
                run.use_artifact(data)
        run.log_artifact(model)


def summary_of(report: ConnectivityReport, trainer: Any) -> dict[str, float]:
    """Return the end result of a run: its connectivity, its connections, its steps and the metrics of the whole network."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" not in name}
    return {**_sums(report), "steps": trainer.global_step, **metrics}


def _sums(report: ConnectivityReport) -> dict[str, float]:
    return {"connectivity": report.active / report.total if report.total else 1.0, "connections": report.active}


def _cells(report: ConnectivityReport) -> list[list[Any]]:
    return [["x".join(map(str, row[key])) if key == "shape" else row[key] for key in _TABLE] for row in report]


def _try(logger: Any, call: Callable[[Any], None]) -> None:
    try:
        call(logger.experiment)
    except Exception as error:
        tell(logger, error)


def _without_statistics(run: Any, trainer: Any) -> None:
    """Take statistics out of wandb's summary, where they would hide the result; their curves stay.

    (A metric that is defined with ``summary="none"`` stays in the summary: Lightning's own definition of "*" comes first.)
    """
    methods = {f"{type(one).__name__.lower()}/" for one in trainer.callbacks if isinstance(one, SparseTraining)} | {"deepr/"}
    for key in list(run.summary.keys()):
        if key.startswith(tuple(methods)):
            del run.summary[key]


def _to_tensorboard(writer: Any, step: int, report: ConnectivityReport, picture: Path | None) -> None:
    if picture is not None:
        from matplotlib.image import imread

        writer.add_image("connections", imread(picture)[:, :, :3], step, dataformats="HWC")
    if len(report):
        lines = [" | ".join(map(str, cells)) for cells in _cells(report)]
        writer.add_text("connectivity", "\n".join([" | ".join(_TABLE), "|".join(["---"] * len(_TABLE)), *lines]), step)


def _to_mlflow(logger: Any, report: ConnectivityReport, picture: Path | None, file: Path | None, client: Any) -> None:
    run_id = logger.run_id
    for path in (picture, file):
        if path is not None:
            client.log_artifact(run_id, str(path))
    if len(report):
        lines = [",".join(map(str, cells)) for cells in _cells(report)]
        client.log_text(run_id, "\n".join([",".join(_TABLE), *lines]) + "\n", "connectivity.csv")


def names_of_run(recipe: str, part: Any) -> dict[str, Any]:
    """Name a run after its settings: name, tags and group, for wandb. Runs that differ in their seed alone are one group.

    Args:
        recipe: the name of the recipe; "": none.
        part: the configuration, as LightningCLI parsed it.
    """
    method, connectivity, seed = "dense", "100%", part.get("seed_everything")
    if part.get("sparsity"):
        method = part.sparsity.class_path.rpartition(".")[2]
        given = part.sparsity.init_args.get("connectivity")
        if isinstance(given, dict):
            connectivity = "connectivity by layer"
        elif given is None:
            connectivity = "as loaded"
        else:
            connectivity = f"{given:g}" if isinstance(given, float) else f"K{given}"
        own = part.sparsity.init_args.get("seed")
        seed = seed if own is None else own
    tags = [tag for tag in (recipe, method, connectivity) if tag]
    group = "-".join(tags).replace(" ", "_")
    return {"name": f"{group}-seed{seed}" if seed is not None else group, "tags": tags, "group": group}
