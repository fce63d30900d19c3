"""Trains the zoo's models with the packaged recipes, and writes their files.

    # trains every missing model, seed by seed
    python -m lightning_deepr.zoo.make train --data.mnist data --workers 2
    # writes the files in zoo/ of the checkout, and prints the registry's entries
    python -m lightning_deepr.zoo.make collect --data.mnist data

Each training has its own folder, ``runs/zoo/NAME/seed_S``. An interrupted training continues from its last checkpoint. The
published file is always that of seed 0: no seed is chosen by its test result.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_deepr import methods, zoo
from lightning_deepr.recipes.running import has_root, quiet
from lightning_deepr.recipes.running import train as run_recipe
from lightning_deepr.zoo.inputs import known, recorded
from lightning_deepr.zoo.loading import folder_of_checkout
from lightning_deepr.zoo.verification import counting, evaluate

_RUNS = Path("runs/zoo")
TRAINED_WITH = "trained_with.json"
_SECONDS, _BEGAN = "cpu_seconds.txt", "began"


@dataclass(frozen=True)
class Plan:
    """The training of one model.

    Attributes:
        recipe: name of a packaged recipe.
        data: name of the data set: "mnist" | "cifar10" | "timit" | "shakespeare".
        overrides: settings that override the recipe's; the command line sets the folder of the data.
        description: text for the card.
        seeds: number of seeds to train.
        study: command of a study that trains the model with the recipe's settings and keeps it; "": no study, but the recipe.
        kept: name of the study's file in ``runs/zoo``.
    """

    recipe: str
    data: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    seeds: int = 3
    study: str = ""
    kept: str = ""

    def file(self, name: str, seed: int, runs: Path) -> Path:
        """Return the path of the trained network."""
        if self.study:
            return runs / self.kept.format(seed=seed)
        return runs / name / f"seed_{seed}" / "runs" / self.recipe / "sparse.safetensors"


@dataclass(frozen=True)
class DataSet:
    """A data set's name, split and metric, as a model's file records them.

    Attributes:
        name, split, metric: what the file records.
        further: a function from a network and test batches to more numbers, which are recorded with the metric.
    """

    name: str
    split: str
    metric: str
    further: Callable[[nn.Module, Iterable[Any]], dict[str, float]] | None = None


@torch.no_grad()
def _bits(net: nn.Module, data: Iterable[Any]) -> dict[str, float]:
    """Compute the mean loss over a text in bits per character."""
    total, count = 0.0, 0
    for x, y in data:
        total += float(cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="sum"))
        count += y.numel()
    return {"bits_per_character": round(total / count / math.log(2), 4)}


DATA_SETS = {
    "mnist": DataSet("MNIST", "test", "test_accuracy"),
    "cifar10": DataSet("CIFAR-10", "test", "test_accuracy"),
    "timit": DataSet("TIMIT sample", "test: 4 of 16 speakers (rotation 0)", "test_frame_accuracy"),
    "shakespeare": DataSet("Tiny Shakespeare", "test: the last 5 % of the text", "test_accuracy", _bits),
}
_MNIST_COUNTS = {"0p5": 1_331, "1": 2_662, "2": 5_324, "5": 13_310, "10": 26_620, "20": 53_240}  # of 266,200
# The percentages are of all 1,067,584 weights. They count conv1 and the output layer, whose 6,720 weights stay dense
# (benchmarks/reproduction/cifar10.py: budget).
CIFAR10_COUNTS = {
    "2": {"conv2": 5_663, "local3": 4_892, "local4": 4_077},
    "5": {"conv2": 18_057, "local3": 15_601, "local4": 13_001},
    "10": {"conv2": 38_714, "local3": 33_450, "local4": 27_874},
    "20": {"conv2": 80_030, "local3": 69_146, "local4": 57_621},
}
_CIFAR10_ALPHA = {"2": 3e-3, "5": 3e-3, "10": 1e-3, "20": 1e-3}  # cifar10_best's, smaller from 10 % on (the study's FROM_10)
_CIFAR10_STUDY = "python benchmarks/reproduction/cifar10.py --root data --parts study --arms deepr --keep runs/zoo"
# The percentages are of all 186,368 weights and count the last layer; benchmarks/reproduction/timit.py (budget) allocates them.
TIMIT_COUNTS = {
    "1": {"lstm.weight_ih*": 1_193, "lstm.weight_hh*": 365, "head": 306},
    "2": {"lstm.weight_ih*": 2_385, "lstm.weight_hh*": 731, "head": 611},
    "5": {"lstm.weight_ih*": 5_963, "lstm.weight_hh*": 1_826, "head": 1_529},
    "10": {"lstm.weight_ih*": 10_245, "lstm.weight_hh*": 3_138, "head": 5_254},
}
_TIMIT_AT_10 = {"model.dropout": 0.4, "sparsity.l1.init_args.start": 0.1}  # the study's best trial at 10 %
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
            "Soft-DEEP R has no fixed number of connections. "
            f"This network was trained with {aimed:,} as what to aim at, to end near {tag} %.",
        )
        for tag, aimed in (("1", 1_750), ("5", 11_000))
    },
    **{
        f"cifar10_cnn.deepr_{tag}pct_cifar10": Plan(
            "cifar10_best",
            "cifar10",
            {} if tag == "5" else {"sparsity.connectivity": counts, "sparsity.l1.init_args.start": _CIFAR10_ALPHA[tag]},
            "The percentage is of all 1,067,584 weights, the dense conv1 and output layer counted: "
            f"{sum(counts.values()) + 6_720:,} in all.",
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
    "char_transformer.deepr_10pct_shakespeare": Plan(
        "shakespeare",
        "shakespeare",
        description="It predicts the next character of a text. The percentage is of the 786,432 weights of its attention and "
        "feed-forward parts; the embeddings and the last layer are dense. DeepR's defaults: nothing of it is tuned.",
    ),
}


def command(plan: Plan, seed: int, root: str) -> list[str]:
    """Return the command-line arguments of one training."""
    where = [f"--data.root={root}"] if has_root(plan.recipe) else []
    overrides = [f"--{key}={_word(value)}" for key, value in plan.overrides.items()]
    return ["--config", plan.recipe, *where, *overrides, f"--seed_everything={seed}", "--trainer.logger=false"]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def train(name: str, seed: int, root: str, runs: Path) -> Path:
    """Run one training in its own process and its own folder. A finished training is not run again.

    Args:
        name: a key of ``PLANS``.
        seed: the seed to train.
        root: folder of the data.
        runs: folder of all trainings.

    Returns:
        path of the sparse file that the training writes.

    Raises:
        RuntimeError: the training failed (the message names its log), or the plan's study has not written its file.
        ValueError: the folder has a training with other settings.
    """
    plan, folder = PLANS[name], runs / name / f"seed_{seed}"
    written = plan.file(name, seed, runs)
    _refuse_other_settings(name, seed, runs)
    if written.is_file():
        return written
    if plan.study:
        raise RuntimeError(f"{name}, seed {seed}: expected {written}, which `{plan.study}` writes.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TRAINED_WITH).write_text(json.dumps(command(plan, seed, "")), encoding="utf-8")
    last = folder / "runs" / plan.recipe / "checkpoints" / "last.ckpt"
    if not last.is_file():  # a training that left no checkpoint begins again, in the same place
        shutil.rmtree(folder / "runs", ignore_errors=True)
    arguments = ["fit", *command(plan, seed, root), *(["--ckpt_path", str(last.resolve())] if last.is_file() else [])]
    program = (
        "from lightning_deepr.commands.main import main\n"
        "from lightning_deepr.zoo.make import counting_seconds\n"
        "with counting_seconds():\n    main()"
    )
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


@contextmanager
def counting_seconds() -> Iterator[None]:
    """Write the CPU seconds of this process and its children into a file of the current folder when the block ends."""

    def write(line: str) -> None:
        with open(_SECONDS, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    write(_BEGAN)
    try:
        yield
    finally:
        write(f"{sum(os.times()[:4]):.1f}")


def cpu_seconds(folder: Path) -> float | None:
    """Sum the CPU seconds of a training over its processes; None: not recorded, or a process was killed before it wrote."""
    file = folder / _SECONDS
    lines = file.read_text(encoding="utf-8").split() if file.is_file() else []
    numbers = [float(line) for line in lines if line != _BEGAN]
    return round(sum(numbers), 1) if numbers and 2 * len(numbers) == len(lines) else None


def _refuse_other_settings(name: str, seed: int, runs: Path) -> None:
    """Check that an existing training was run with the settings of the current plan.

    Raises:
        ValueError: the folder has a training with other settings.
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
    """Test the trained seeds and write seed 0's network with its record.

    Args:
        name: a key of ``PLANS``.
        root: folder of the data.
        runs: folder of all trainings.
        folder: folder to write the file to.

    Returns:
        path of the file.

    Raises:
        FileNotFoundError: seed 0 is not trained yet.
        ValueError: the folder of a seed has a training with other settings.
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
    if data_set.further is not None:
        metric |= data_set.further(zoo.load(files[0]), made.datamodule.test_dataloader())
    done = [
        {
            "seed": seed,
            "correct": found[seed][0],
            "examples": found[seed][1],
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            **({} if (spent := cpu_seconds(runs / name / f"seed_{seed}")) is None else {"cpu_seconds": spent}),
        }
        for seed, file in files.items()
    ]
    algorithm, hyperparameters = settings(made.config)
    return zoo.save(
        zoo.load(files[0]),
        folder / f"{name}.safetensors",
        description=plan.description,
        algorithm=algorithm,
        hyperparameters=hyperparameters,
        seeds=[0],
        runs=done,
        metrics={data_set.metric: metric},
        data={"name": data_set.name, "split": data_set.split, "sha256": checksum(made.datamodule)},
        recipe={"name": plan.recipe, "overrides": dict(plan.overrides), **({"command": plan.study} if plan.study else {})},
        license="Apache-2.0",
        input=None if (how := known(data_set.name)) is None else recorded(how),
    )


def settings(config: Any) -> tuple[str, dict[str, Any]]:
    """Return the algorithm's name and the hyperparameters of a training.

    The hyperparameters are the algorithm's settings that are not its defaults, the model's settings, the batch size and the
    number of epochs.
    """
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
    """Write a schedule as text with its name and numbers; return other values unchanged."""
    if isinstance(value, Mapping) and "class_path" in value:
        return f"{value['class_path'].rpartition('.')[2]}({', '.join(f'{k}={v}' for k, v in value['init_args'].items())})"
    return value


def checksum(data: Any) -> str:
    """Compute the sha256 of a test set: of torchvision's images and labels, or of TIMIT's sound and label files."""
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
    parser.add_argument("names", nargs="*", help="models (default: all)")
    parser.add_argument("--runs", type=Path, default=_RUNS, help="folder of the trainings")
    parser.add_argument("--folder", type=Path, help="folder for the files (default: zoo/ of the checkout)")
    parser.add_argument("--workers", type=int, default=1, help="number of trainings at a time, one thread each")
    parser.add_argument("--seeds", type=int, help="largest number of seeds to train per model")
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
