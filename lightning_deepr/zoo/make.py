"""Trains the zoo's models with the packaged recipes, and writes their files.

    python -m lightning_deepr.zoo.make train --data.mnist data --workers 2       # whatever is not trained yet, seed by seed
    python -m lightning_deepr.zoo.make collect --data.mnist data                 # files in zoo/ of the checkout, and the registry's entries

A training runs in a folder of its own, ``runs/zoo/NAME/seed_S``; an interrupted one goes on from its last checkpoint. The file that is
published is seed 0's, whatever the others reach: a seed is never picked by its test result.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_deepr import methods, zoo
from lightning_deepr.recipes.running import has_root, quiet
from lightning_deepr.recipes.running import train as run_recipe
from lightning_deepr.zoo.loading import folder_of_checkout
from lightning_deepr.zoo.verification import counting, evaluate

_RUNS = Path("runs/zoo")
TRAINED_WITH = "trained_with.json"


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Attributes:
        recipe: a packaged one.
        data: which data set: "mnist" | "cifar10" | "timit".
        overrides: of the recipe; the folder of the data is the command line's.
        description: for the card.
        seeds: how many are trained.
        study: the command of a study that trains it with the recipe's settings, and keeps it, instead of the recipe.
        kept: under which name, in ``runs/zoo``.
    """

    recipe: str
    data: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    seeds: int = 3
    study: str = ""
    kept: str = ""

    def file(self, name: str, seed: int, runs: Path) -> Path:
        """Where the trained network is."""
        if self.study:
            return runs / self.kept.format(seed=seed)
        return runs / name / f"seed_{seed}" / "runs" / self.recipe / "sparse.safetensors"


@dataclass(frozen=True)
class DataSet:
    """A data set as a file names it."""

    name: str
    split: str
    metric: str


DATA_SETS = {
    "mnist": DataSet("MNIST", "test", "test_accuracy"),
    "cifar10": DataSet("CIFAR-10", "test", "test_accuracy"),
    "timit": DataSet("TIMIT sample", "test: 4 of 16 speakers (rotation 0)", "test_frame_accuracy"),
}
_MNIST_COUNTS = {"0p5": 1_331, "1": 2_662, "2": 5_324, "5": 13_310, "10": 26_620, "20": 53_240}  # of 266,200
# of all 1,067,584 weights; conv1 and the output layer, 6,720 weights, stay dense and are counted (benchmarks/reproduction/cifar10.py: budget)
CIFAR10_COUNTS = {
    "2": {"conv2": 5_663, "local3": 4_892, "local4": 4_077},
    "5": {"conv2": 18_057, "local3": 15_601, "local4": 13_001},
    "10": {"conv2": 38_714, "local3": 33_450, "local4": 27_874},
    "20": {"conv2": 80_030, "local3": 69_146, "local4": 57_621},
}
_CIFAR10_ALPHA = {"2": 3e-3, "5": 3e-3, "10": 1e-3, "20": 1e-3}  # cifar10_best's, and less from 10 % on (the study's FROM_10)
_CIFAR10_STUDY = "python benchmarks/reproduction/cifar10.py --root data --parts study --arms deepr --keep runs/zoo"
# of all 186,368 weights, the last layer counted, shared out as benchmarks/reproduction/timit.py does (budget)
TIMIT_COUNTS = {
    "1": {"lstm.weight_ih*": 1_193, "lstm.weight_hh*": 365, "head": 306},
    "2": {"lstm.weight_ih*": 2_385, "lstm.weight_hh*": 731, "head": 611},
    "5": {"lstm.weight_ih*": 5_963, "lstm.weight_hh*": 1_826, "head": 1_529},
    "10": {"lstm.weight_ih*": 10_245, "lstm.weight_hh*": 3_138, "head": 5_254},
}
_TIMIT_AT_10 = {"model.dropout": 0.4, "sparsity.l1.init_args.start": 0.1}  # the study's best trial there
_SOFT = {"sparsity": "SoftDeepR", "sparsity.l1": 5e-4, "sparsity.temperature": 1e-9}
PLANS: dict[str, Plan] = {
    **{
        f"lenet300_100.deepr_{tag}pct_mnist": Plan("mnist_best", "mnist", {"sparsity.connectivity": count})
        for tag, count in _MNIST_COUNTS.items()
    },
    **{
        f"lenet300_100.soft_deepr_{tag}pct_mnist": Plan(
            "mnist_best",
            "mnist",
            {**_SOFT, "sparsity.connectivity": aimed},
            f"Soft-DEEP R has no fixed number of connections. This network was trained with {aimed:,} as what to aim at, to end near {tag} %.",
        )
        for tag, aimed in (("1", 1_750), ("5", 11_000))
    },
    **{
        f"cifar10_cnn.deepr_{tag}pct_cifar10": Plan(
            "cifar10_best",
            "cifar10",
            {} if tag == "5" else {"sparsity.connectivity": counts, "sparsity.l1.init_args.start": _CIFAR10_ALPHA[tag]},
            f"The percentage is of all 1,067,584 weights, the dense conv1 and output layer counted: {sum(counts.values()) + 6_720:,} in all.",
            2 if tag == "5" else 1,
            _CIFAR10_STUDY,
            f"study_deepr_{int(tag) / 100:g}_{{seed}}.safetensors",
        )
        for tag, counts in CIFAR10_COUNTS.items()
    },
    **{
        f"timit_blstm.deepr_{tag}pct_timit_sample": Plan(
            "timit_sample",
            "timit",
            {"sparsity.connectivity": counts, **(_TIMIT_AT_10 if tag == "10" else {})},
            "Trained on the free sample of TIMIT, 10 of its 16 speakers, not on the corpus. "
            f"The percentage is of all 186,368 weights, the last layer counted: {sum(counts.values()):,} in all.",
        )
        for tag, counts in TIMIT_COUNTS.items()
    },
}


def command(plan: Plan, seed: int, root: str) -> list[str]:
    """The command line's arguments of one training."""
    where = [f"--data.root={root}"] if has_root(plan.recipe) else []
    overrides = [f"--{key}={_word(value)}" for key, value in plan.overrides.items()]
    return ["--config", plan.recipe, *where, *overrides, f"--seed_everything={seed}", "--trainer.logger=false"]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def train(name: str, seed: int, root: str, runs: Path) -> Path:
    """One training, as a process of its own, in a folder of its own.

    Returns:
        the sparse file that the recipe leaves.

    Raises:
        RuntimeError: the training failed; says where its log is.
    """
    plan, folder = PLANS[name], runs / name / f"seed_{seed}"
    written = plan.file(name, seed, runs)
    _refuse_other_settings(name, seed, runs)
    if written.is_file():
        return written
    if plan.study:
        raise RuntimeError(f"{name}, seed {seed}: expected {written}, which `{plan.study}` leaves.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINED_WITH).write_text(json.dumps(command(plan, seed, "")), encoding="utf-8")
    last = folder / "runs" / plan.recipe / "checkpoints" / "last.ckpt"
    arguments = ["fit", *command(plan, seed, root), *(["--ckpt_path", str(last.resolve())] if last.is_file() else [])]
    program = "from lightning_deepr.commands.main import main; main()"
    with (folder / "train.log").open("a", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
    if done.returncode or not written.is_file():
        raise RuntimeError(f"{name}, seed {seed}: the training ended with {done.returncode}; see {folder / 'train.log'}.")
    return written


def _refuse_other_settings(name: str, seed: int, runs: Path) -> None:
    """A plan that has changed since must not be written on what was trained before.

    Raises:
        ValueError: the training in this folder was another one.
    """
    folder = runs / name / f"seed_{seed}"
    planned = command(PLANS[name], seed, "")
    if PLANS[name].study or not folder.is_dir():
        return
    record = folder / TRAINED_WITH
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else "no record"
    if found != planned:
        raise ValueError(f"{folder}: expected a training with {planned}, found {found}. Remove the folder to train anew.")


def collect(name: str, root: str, runs: Path, folder: Path) -> Path:
    """Test the trained seeds and write seed 0's file with all that is known of it.

    Raises:
        FileNotFoundError: seed 0 is not trained yet.
    """
    plan, data_set = PLANS[name], DATA_SETS[PLANS[name].data]
    folder.mkdir(parents=True, exist_ok=True)
    files = {seed: file for seed in range(plan.seeds) if (file := plan.file(name, seed, runs)).is_file()}
    if 0 not in files:
        raise FileNotFoundError(f"{name}: expected its seed 0 trained, found none in {runs / name}. `make train` trains it.")
    for seed in files:
        _refuse_other_settings(name, seed, runs)
    with quiet():
        made = run_recipe(command(plan, 0, root), run=False)
    made.datamodule.prepare_data()
    made.datamodule.setup("test")
    count = counting(name.partition(".")[0])
    found = {seed: evaluate(zoo.load(file), made.datamodule.test_dataloader(), count) for seed, file in files.items()}
    shares = [correct / examples for correct, examples in found.values()]
    correct, examples = found[0]
    metric: dict[str, Any] = {"value": shares[0], "correct": correct, "examples": examples, "mean": statistics.mean(shares)}
    if len(shares) > 1:
        metric["std"] = statistics.stdev(shares)
    metric["seeds"] = list(found)
    algorithm, hyperparameters = settings(made.config)
    return zoo.save(
        zoo.load(files[0]),
        folder / f"{name}.safetensors",
        description=plan.description,
        algorithm=algorithm,
        hyperparameters=hyperparameters,
        seeds=[0],
        metrics={data_set.metric: metric},
        data={"name": data_set.name, "split": data_set.split, "sha256": checksum(made.datamodule)},
        recipe={"name": plan.recipe, "overrides": dict(plan.overrides), **({"command": plan.study} if plan.study else {})},
        license="Apache-2.0",
    )


def settings(config: Any) -> tuple[str, dict[str, Any]]:
    """The algorithm's name, and what was set: of the algorithm where it is not the default, of model, data and trainer what shapes the training."""
    name = config.sparsity.class_path.rpartition(".")[2]
    defaults = inspect.signature(getattr(methods, name)).parameters
    given = config.sparsity.init_args.as_dict()
    found = {key: _plain(value) for key, value in given.items() if value != defaults[key].default and value not in ([], ())}
    found.pop("seed", None)
    found |= {key: value for key, value in config.model.init_args.as_dict().items() if key != "seed" and value is not None}
    found["batch_size"] = config.data.init_args.batch_size
    found["epochs"] = config.trainer.max_epochs
    return name, found


def _plain(value: Any) -> Any:
    """A schedule as its name and numbers."""
    if isinstance(value, Mapping) and "class_path" in value:
        return f"{value['class_path'].rpartition('.')[2]}({', '.join(f'{k}={v}' for k, v in value['init_args'].items())})"
    return value


def checksum(data: Any) -> str:
    """sha256 of a test set: images and labels as torchvision gives them, or sound and label files."""
    digest = hashlib.sha256()
    for part in _test_set(data):
        digest.update(part.contiguous().numpy().tobytes() if isinstance(part, Tensor) else part)
    return digest.hexdigest()


def _test_set(data: Any) -> Sequence[Any]:
    from lightning_deepr.recipes.timit_data import TIMITDataModule

    if not isinstance(data, TIMITDataModule):
        return list(data.load()[2:])
    from lightning_deepr.recipes.timit_corpus import find_utterances
    from lightning_deepr.recipes.timit_splits import split

    utterances = find_utterances(data.root)
    chosen = [utterances[number] for number in split(utterances, rotation=data.rotation).test]
    return [file.read_bytes() for one in chosen for file in (one.audio, one.phones)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m lightning_deepr.zoo.make``."""
    parser = argparse.ArgumentParser(prog="python -m lightning_deepr.zoo.make", description="Train the zoo, write its files.")
    parser.add_argument("what", choices=["train", "collect"])
    parser.add_argument("names", nargs="*", help="models; none: all")
    parser.add_argument("--runs", type=Path, default=_RUNS, help="folder of the trainings")
    parser.add_argument("--folder", type=Path, help="where the files go (default: zoo/ of the checkout)")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--seeds", type=int, help="train so many at most")
    for data in DATA_SETS:
        parser.add_argument(f"--data.{data}", default="data", dest=data, help=f"folder of {data}")
    given = parser.parse_intermixed_args(arguments)
    unknown = sorted(set(given.names) - PLANS.keys())
    if unknown:
        parser.error(f"no plan for {', '.join(unknown)}. Plans: {', '.join(PLANS)}.")
    names = given.names or list(PLANS)
    roots = {name: str(Path(getattr(given, PLANS[name].data)).resolve()) for name in names}
    if given.what == "collect":
        try:
            folder = given.folder or folder_of_checkout("--folder")
        except ValueError as error:
            parser.error(str(error))
        for name in names:
            file = collect(name, roots[name], given.runs, folder)
            print(f'    Entry("{name}", "{hashlib.sha256(file.read_bytes()).hexdigest()}"),')
        return
    jobs = [(name, seed) for seed in range(10) for name in names if seed < min(PLANS[name].seeds, given.seeds or 10)]
    with ThreadPoolExecutor(given.workers) as pool:
        waiting = {pool.submit(train, name, seed, roots[name], given.runs.resolve()): (name, seed) for name, seed in jobs}
        for number, one in enumerate(as_completed(waiting), 1):
            print(f"{number}/{len(jobs)} {waiting[one][0]} seed {waiting[one][1]}: {one.result()}", flush=True)


if __name__ == "__main__":
    main()
