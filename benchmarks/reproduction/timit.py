"""The TIMIT sample with a bidirectional LSTM: every method from dense to 1 % connectivity, over four rotated speaker splits.

    python benchmarks/reproduction/timit.py --root data/corpora/timit         # every training that is not in timit.csv
    python benchmarks/reproduction/timit.py --root data/corpora/timit --parts study --arms deepr dense
    python benchmarks/reproduction/timit.py --table                           # tables and figures from timit.csv

Parts: `tune` (eight settings per arm at 5 and at 10 % on the validation speakers of two splits, then the best three on all
four) and `study` (test speakers). The seed of a run is its split: 10 speakers for training, 2 for validation, 4 for test; the
test sets are disjoint.

All arms have 128 units per direction (186,368 weights, the last layer counted), chunks of 100 frames, 32 per batch, Adam with a
cosine to 0, gradients clipped at norm 1, noise on the inputs and a moving average of the weights, which is evaluated. Early
stopping: every 25 steps the script measures the validation speakers' frame error. The test error is that of the step with the
smallest validation error, among the steps in which the network has at most its number of connections (1.2 times that for
soft-DEEP R). A network that is pruned during training therefore does not count before it is sparse. The frame error is the
share of wrong frames among 39 classes, with the posteriors of 60 phones summed.

Each run is one line; the script can be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_deepr import LinearDecay, connectivity_report
from lightning_deepr.models import BLSTMClassifier
from lightning_deepr.recipes.sequences import SequenceBatches
from lightning_deepr.recipes.speech import disturbed, frame_errors, frame_loss
from lightning_deepr.recipes.timit_data import load_timit
from lightning_deepr.recipes.timit_phones import folding

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import axes
from grid import Job, Results, callback_of, figure, load, restore, steps_in_common, table

HERE = Path(__file__).parent
RESULTS = Results(HERE / "timit.csv", "frame_error", "val_error", "best_step", "connections", "per_layer", "curve")
TOTAL = 186_368  # 39,936 input weights, 131,072 recurrent weights, 15,360 in the last layer
CONNECTIVITIES = (0.01, 0.02, 0.05, 0.1, 0.2)
SPLITS = (0, 1, 2, 3)
FINALISTS = 3
EVERY = 25  # steps between evaluations
Settings = dict[str, Any]

ARMS: dict[str, str | None] = {
    "dense": None,
    "small_dense": None,  # a dense LSTM with the same number of weights
    "deepr": "DeepR",
    "soft_deepr": "SoftDeepR",
    "fixed_random": "FixedRandom",
    "pruning": "MagnitudePruning",
    "l1_shrinkage": "L1Shrinkage",
}
COMMON: Settings = {"steps": 1000, "lr": 0.04, "noise": 0.3, "offset": 0.5, "dropout": 0.0, "ema": 0.97}
SHARES = (0.15, 0.014, 0.1)  # relative connectivity of the input weights, the recurrent weights and the last layer
OWN: dict[str, Settings] = {
    "dense": {"lr": 0.01, "dropout": 0.5, "steps": 200, "noise": 0.5, "offset": 0.0},
    "small_dense": {},
    "deepr": {"l1": ["LinearDecay", 0.3, 0.0], "shares": SHARES},
    "soft_deepr": {"l1": 0.3, "temperature": 1e-3, "depth": 8, "shares": SHARES},
    "fixed_random": {"shares": SHARES},
    "pruning": {"lr": 0.01, "dropout": 0.2, "prune_from": 0.2, "prune_until": 0.5, "prunings": 8, "shares": SHARES},
    "l1_shrinkage": {"lr": 0.01, "l1": 0.3, "freeze_at": 0.5, "shares": SHARES},
}
DROPOUTS: dict[str, Settings] = {f"noise .5, dropout .{d}": {"noise": 0.5, "dropout": d / 10} for d in (2, 4)}
WIDER_LAST: dict[str, Settings] = {
    f"noise .5, dropout .{d}, last layer .2": {"noise": 0.5, "dropout": d / 10, "shares": (0.15, 0.014, 0.2)} for d in (2, 4)
}
# The trials at 5 and 10 % (dense: at 100 %); each arm has the same number.
TRIALS: dict[str, dict[str, Settings]] = {
    "dense": {
        "first": {},
        "offset .3": {"offset": 0.3},
        "offset .3, lr .005, 500 steps": {"offset": 0.3, "lr": 0.005, "steps": 500},
        "offset .5, noise .3, 500 steps": {"offset": 0.5, "noise": 0.3, "steps": 500},
        "lr .02": {"lr": 0.02},
        "dropout .7": {"dropout": 0.7},
        "noise .8": {"noise": 0.8},
        "dropout .3": {"dropout": 0.3},
    },
    "small_dense": {
        "first": {},
        "lr .02": {"lr": 0.02},
        "noise .5": {"noise": 0.5},
        "no offset": {"offset": 0.0},
        **DROPOUTS,
        **{f"{trial}, lr .02": {**changed, "lr": 0.02} for trial, changed in DROPOUTS.items()},
    },
    "deepr": {
        "first": {},
        "lr .02": {"lr": 0.02},
        "noise .5": {"noise": 0.5},
        "last layer .2": {"shares": (0.15, 0.014, 0.2)},
        **DROPOUTS,
        **{f"{trial}, l1 .1": {**changed, "l1": ["LinearDecay", 0.1, 0.0]} for trial, changed in WIDER_LAST.items()},
    },
    "soft_deepr": {
        "first": {},
        "depth 12": {"depth": 12},
        "noise .5": {"noise": 0.5},
        "last layer .2": {"shares": (0.15, 0.014, 0.2)},
        "T 2e-3, depth 5": {"temperature": 2e-3, "depth": 5},
        "l1 .1, T 3e-4, depth 10": {"l1": 0.1, "temperature": 3e-4, "depth": 10},
        **DROPOUTS,
    },
    "fixed_random": {
        "first": {},
        "lr .02": {"lr": 0.02},
        "noise .5": {"noise": 0.5},
        "last layer .2": {"shares": (0.15, 0.014, 0.2)},
        **DROPOUTS,
        **WIDER_LAST,
    },
    "pruning": {
        "first": {},
        "lr .02": {"lr": 0.02},
        "noise .5": {"noise": 0.5},
        "pruned later": {"prune_from": 0.3, "prune_until": 0.6},
        **DROPOUTS,
        **WIDER_LAST,
    },
    "l1_shrinkage": {
        "first": {},
        "l1 .1": {"l1": 0.1},
        "l1 1": {"l1": 1.0},
        "lr .02": {"lr": 0.02},
        **DROPOUTS,
        **WIDER_LAST,
    },
}


def allowed(arm: str) -> float:
    """Largest accepted number of connections, divided by the wanted number, which soft-DEEP R meets only approximately."""
    return 1.2 if arm == "soft_deepr" else 1.005


def tuned_at(arm: str, connectivity: float) -> float:
    """Return the connectivity of the trials whose settings are used at ``connectivity``."""
    return 1.0 if arm == "dense" else 0.05 if connectivity <= 0.05 else 0.1


def trial_errors(arm: str, connectivity: float, splits: Sequence[int]) -> dict[str, float]:
    """Mean validation error of each trial that ran on all these splits; infinite if a run ended with too many connections."""
    found: dict[str, dict[int, float]] = {}
    for row in RESULTS.read():
        if row["part"] == "tune" and row["arm"] == arm and row["connectivity"] == f"{connectivity:g}":
            fits = arm in ("dense", "small_dense") or int(row["connections"]) <= allowed(arm) * connectivity * TOTAL
            found.setdefault(row["trial"], {})[int(row["seed"])] = float(row["val_error"]) if fits else math.inf
    return {
        trial: statistics.mean(errors[split] for split in splits)
        for trial, errors in found.items()
        if set(splits) <= set(errors)
    }


def finalists(arm: str, connectivity: float) -> list[str]:
    """The trials with the smallest errors on the first two splits; none before all trials have run there."""
    errors = trial_errors(arm, connectivity, SPLITS[:2])
    return sorted(errors, key=lambda trial: errors[trial])[:FINALISTS] if set(TRIALS[arm]) <= set(errors) else []


def best_trial(arm: str, connectivity: float) -> str:
    """The finalist with the smallest validation error over all splits.

    Before the finals it is the best trial so far, and before any trial "first".
    """
    c = tuned_at(arm, connectivity)
    errors = trial_errors(arm, c, SPLITS) or trial_errors(arm, c, SPLITS[:2])
    return min(errors, key=lambda trial: errors[trial]) if errors else "first"


def settings_of(arm: str, connectivity: float) -> Settings:
    """Return the study's settings of an arm."""
    return {**COMMON, **OWN[arm], **TRIALS[arm][best_trial(arm, connectivity)]}


def budget(connectivity: float, shares: tuple[float, float, float], hidden: int = 128) -> dict[str, int]:
    """Share out the connections among input weights, recurrent weights and last layer, in proportion to ``shares``.

    A tensor whose share exceeds its size is full. ``connectivity`` is relative to the network with 128 units per direction,
    also for larger networks.
    """
    sizes = {"lstm.weight_ih*": 8 * hidden * 39, "lstm.weight_hh*": 8 * hidden * hidden, "head": 120 * hidden}
    left = round(connectivity * TOTAL)
    found: dict[str, int] = {}
    open_ = dict(zip(sizes, shares, strict=True))
    while open_:
        scale = left / sum(share * sizes[name] for name, share in open_.items())
        full = [name for name, share in open_.items() if scale * share >= 1]
        if not full:
            break
        for name in full:
            found[name] = sizes[name]
            left -= sizes[name]
            del open_[name]
    *first, last = open_
    for name in first:
        found[name] = round(scale * open_[name] * sizes[name])
    found[last] = round(connectivity * TOTAL) - sum(found.values())
    return found


def hidden_of(weights: int) -> int:
    """Units h per direction of a dense network with ``weights`` = 8 h (39 + h) + 120 h."""
    return round((math.sqrt(432**2 + 32 * weights) - 432) / 16)


def jobs(part: str, arms: list[str]) -> list[Job]:
    """List the trainings of a part; the first split of all arms comes first.

    The part "finals" has the remaining splits of the best trials of "tune".
    """
    found = []
    for arm in arms:
        if part == "study":
            for c in (1.0,) if arm == "dense" else CONNECTIVITIES:
                settings = json.dumps(settings_of(arm, c))
                found += [Job(part, arm, c, split, "", "test", settings) for split in SPLITS]
            continue
        for c in sorted({tuned_at(arm, c) for c in CONNECTIVITIES}):
            for trial in TRIALS[arm] if part == "tune" else finalists(arm, c):
                settings = json.dumps({**COMMON, **OWN[arm], **TRIALS[arm][trial]})
                splits = SPLITS[:2] if part == "tune" else SPLITS[2:]
                found += [Job("tune", arm, c, split, trial, "validation", settings) for split in splits]
    return sorted(found, key=lambda job: (job.seed, job.connectivity not in (0.05, 1.0)))


def error(net: nn.Module, frames: Any, matrix: Tensor) -> float:
    """Measure the frame error over whole utterances in percent."""
    net.eval()
    wrong, count = 0.0, 0
    with torch.no_grad():
        for x, y, lengths in SequenceBatches(frames, 16):
            found = frame_errors(net(x, lengths), y, matrix)
            wrong, count = wrong + float(found.sum()), count + len(found)
    net.train()
    return 100 * wrong / count


# By arm, split and settings: the state of a training at the last step that does not depend on the connectivity. Trainings with
# other connectivities continue from it.
_begun: dict[tuple[str, int, str], Settings] = {}


def run(job: Job, root: str, cache: str | None) -> Settings:
    """Train once, and return the test error at the step with the smallest validation error."""
    data = load_timit(root, rotation=job.seed, cache_dir=cache)
    settings = json.loads(job.settings)
    steps, lr, noise, offset, dropout, ema = (settings.pop(n) for n in ("steps", "lr", "noise", "offset", "dropout", "ema"))
    matrix = folding(60)
    torch.manual_seed(job.seed)
    hidden = hidden_of(round(job.connectivity * TOTAL)) if job.arm == "small_dense" else settings.pop("hidden", 128)
    net = BLSTMClassifier(hidden=hidden, dropout=dropout)
    kind, callback = ARMS[job.arm], None
    if kind is not None:
        counts = budget(job.connectivity, settings.pop("shares"), hidden)
        if isinstance(settings.get("l1"), list):
            settings["l1"] = LinearDecay(*settings["l1"][1:])
        if "depth" in settings:  # data keep many connections: theta_min must be lower than the theory without data says
            temperature, p = settings["temperature"], job.connectivity
            settings["theta_min"] = -settings.pop("depth") * temperature * (1 - p) / (settings["l1"] * p)
        init = {} if job.arm in ("pruning", "l1_shrinkage") else {"init": settings.pop("init", "deepr")}
        callback = callback_of(kind, counts, seed=job.seed, **init, **settings)
        callback.prepare(net)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(ema))
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    if callback is not None:
        callback.attach(net, optimizer, total_steps=steps)
    batches = SequenceBatches(data.train, 32, chunk_frames=100, shuffle=True, seed=job.seed)
    step, epoch, curve, best, started = 0, 0, [], (math.inf, 0.0, 0), time.perf_counter()
    share, key, fewest = allowed(job.arm) * job.connectivity * TOTAL, (job.arm, job.seed, job.settings), TOTAL
    in_common = steps_in_common(callback)
    begun = _begun.get(key)
    if begun is not None and begun["fewest"] > share:
        restore(begun, net, optimizer, callback)
        load(averaged, begun["averaged"])
        torch.set_rng_state(begun["random"])
        batches.load_state_dict(begun["batches"])
        step, epoch, curve, fewest = in_common, begun["batches"]["epoch"], list(begun["curve"]), begun["fewest"]
        if begun["batches"]["next"] == len(batches):
            epoch += 1
        started -= begun["seconds"]
    while step < steps:
        batches.set_epoch(epoch)
        epoch += 1
        for x, y, lengths in batches:
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            frame_loss(net(disturbed(x, noise, offset), lengths), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            averaged.update_parameters(net)
            step += 1
            if step % EVERY == 0 or step == steps:
                validation = error(averaged, data.val, matrix)
                curve.append(round(validation, 2))
                active = connectivity_report(net).active if callback is not None else 0
                fewest, sparse = min(fewest, active), active <= share
                if (sparse and validation < best[0]) or (step == steps and best[2] == 0):
                    best = (validation, error(averaged, data.test, matrix) if job.split == "test" else math.nan, step)
            if step == in_common:
                for other in [other for other in _begun if other[1] != job.seed]:
                    del _begun[other]
                _begun[key] = {
                    "net": copy.deepcopy(net.state_dict()),
                    "averaged": copy.deepcopy(averaged.state_dict()),
                    "optimizer": copy.deepcopy(optimizer.state_dict()),
                    "callback": callback.state_dict() if callback is not None else {},
                    "batches": batches.state_dict(),
                    "random": torch.get_rng_state(),
                    "curve": list(curve),
                    "fewest": fewest,
                    "seconds": time.perf_counter() - started,
                }
            if step == steps:
                break
    report = connectivity_report(net)
    weights = sum(p.numel() for name, p in net.named_parameters() if "bias" not in name)
    return {
        "frame_error": round(best[1], 2),
        "val_error": round(best[0], 2),
        "best_step": best[2],
        "connections": report.active if callback is not None else weights,
        "per_layer": " ".join(str(row["active"]) for row in report),
        "curve": " ".join(map(str, curve)),
        "seconds": round(time.perf_counter() - started),
    }


def tables() -> str:
    rows, lines = RESULTS.read(), []
    study = [row for row in rows if row["part"] == "study"]
    if study:
        lines += ["**study**: test frame error, % (splits)", ""]
        lines += [*table(study, list(ARMS), CONNECTIVITIES, TOTAL, "frame_error"), ""]
        dense = {row["seed"]: float(row["frame_error"]) for row in study if row["arm"] == "dense"}
        lines += ["Minus dense on the same split:", "", "| arm | connectivity | difference |", "|---|---|---|"]
        for arm in list(ARMS)[1:]:
            for c in CONNECTIVITIES:
                differences = [
                    float(row["frame_error"]) - dense[row["seed"]]
                    for row in study
                    if row["arm"] == arm and row["connectivity"] == f"{c:g}" and row["seed"] in dense
                ]
                if len(differences) > 1:
                    standard_error = statistics.stdev(differences) / math.sqrt(len(differences))
                    mean = statistics.mean(differences)
                    lines.append(f"| {arm.replace('_', ' ')} | {100 * c:g} % | {mean:+.2f} +- {standard_error:.2f} |")
        lines.append("")
    tune = [row for row in rows if row["part"] == "tune"]
    if tune:
        lines += ["**tune**: validation frame error, mean over two splits (of what came first there over all four)", ""]
        lines += ["| arm | trial | at 5 % (dense: 100 %) | at 10 % |", "|---|---|---|---|"]
        for arm, trials in TRIALS.items():
            for trial in trials:
                cells = []
                for c in sorted({tuned_at(arm, c) for c in CONNECTIVITIES}):
                    first, all_ = (trial_errors(arm, c, splits).get(trial) for splits in (SPLITS[:2], SPLITS))
                    cells.append(("-" if first is None else f"{first:.2f}") + ("" if all_ is None else f" ({all_:.2f})"))
                if set(cells) != {"-"}:
                    lines.append(f"| {arm.replace('_', ' ')} | {trial} | {' | '.join([*cells, '-'][:2])} |")
    return "\n".join(lines)


def over_time(study: list[dict[str, str]]) -> None:
    """Draw the validation error over the training, each arm at 5 %.

    In the paper the errors of dense training and l1-shrinkage fall suddenly.
    """
    drawing, (panel,) = axes(1, width=6, height=4.4)
    for number, arm in enumerate(ARMS):
        mine = [row for row in study if row["arm"] == arm and row["connectivity"] in ("1", "0.05")]
        curves = [[float(value) for value in row["curve"].split()] for row in mine]
        if not curves:
            continue
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        steps = [EVERY * (n + 1) for n in range(len(mean))]
        for curve in curves:
            panel.plot(steps, curve, color=f"C{number}", linewidth=0.6, alpha=0.3)
        panel.plot(steps, mean, color=f"C{number}", linewidth=1.6, label=arm.replace("_", " "))
    panel.set_title("TIMIT sample at 5 %: each split, and the mean of the four", fontsize=10)
    panel.set_xlabel("steps")
    panel.set_ylabel("validation frame error, %")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    drawing.savefig(HERE / "timit_over_time.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/corpora/timit", help="folder of the sample (dr1-fvmh0 and so on in it)")
    parser.add_argument("--cache", help="folder of the feature cache")
    parser.add_argument("--parts", nargs="*", default=["tune", "study"], choices=["tune", "study"])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--workers", type=int, default=2, help="number of trainings at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="only print the tables and draw the figures")
    options = parser.parse_args()
    if not options.table:
        for part in options.parts:
            for stage in ("tune", "finals") if part == "tune" else (part,):
                todo = jobs(stage, options.arms)
                if part == "study":
                    RESULTS.forget(todo)  # trainings whose settings were those of an earlier best trial
                RESULTS.train(todo, run, options.workers, options.root, options.cache)
    print(tables())
    study = [row for row in RESULTS.read() if row["part"] == "study"]
    if study:
        title = "TIMIT sample, bidirectional LSTM, four speaker splits"
        figure(study, list(ARMS), CONNECTIVITIES, TOTAL, "frame_error", title, "test frame error, %", HERE / "timit.png")
        over_time(study)


if __name__ == "__main__":
    main()
