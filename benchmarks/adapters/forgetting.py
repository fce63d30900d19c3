"""What an adapter makes a network forget: accuracy on the new and on the old digits with the difference scaled, and without it.

    python benchmarks/adapters/forgetting.py --root data

LeNet-300-100 and adapters as in digits.py, on 5,000 digits turned by 90 degrees, with the learning rates that digits.csv found,
AdamW, seed 1. A scale of 1 is the adapter as it was trained, 0 is the network without it, from which the adapter was removed.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from torch import nn

from lightning_deepr.adapters import Adapters, detach

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from digits import RANKS, STUDY, LoRA, accuracy, changed, images, pretrained, trained
from grid import quiet
from study import Cell, options

ARMS = ("deepr", "lora", "fixed")
SCALES = (1.0, 0.75, 0.5, 0.25, 0.0)
TASK = "rotated 5000"
FILE = Path(__file__).with_name("forgetting.csv")


def accuracies(net: nn.Module, root: str) -> tuple[float, float]:
    x, y = images(root)["test"]
    return accuracy(net, changed(x, TASK), y), accuracy(net, x, y)


def scaled(net: nn.Module, root: str) -> list[tuple[float, float, float]]:
    """Return (scale, accuracy on the new digits, on the old ones)."""
    found = []
    loras = [module for module in net.modules() if isinstance(module, LoRA)]
    if loras:
        whole = [module.b.detach().clone() for module in loras]
        for scale in SCALES:
            for module, b in zip(loras, whole, strict=True):
                module.b.data.copy_(scale * b)
            found.append((scale, *accuracies(net, root)))
        return found
    bank = Adapters(net)
    bank.add("mine")
    for scale in SCALES:
        bank.use("mine" if scale else None, scale or 1.0)
        found.append((scale, *accuracies(net, root)))
    detach(net, missing_ok=True)
    own = pretrained(root).state_dict()
    assert own.keys() == net.state_dict().keys() and all(bool((net.state_dict()[name] == own[name]).all()) for name in own)
    return found


def main() -> None:
    given = options(__doc__, (TASK,), ARMS, ("AdamW",))
    if not given.table:
        quiet()
        rows = []
        for count in RANKS.values():
            for arm in given.arms:
                cell = Cell(TASK, arm, "AdamW", count)
                net, _ = trained(cell.job(1, STUDY.best(cell), "test"), given.root)
                for scale, new, old in scaled(net, given.root):
                    rows.append({"arm": arm, "values": count, "scale": scale, "new": f"{new:.2f}", "old": f"{old:.2f}"})
                    print(*rows[-1].values(), flush=True)
        with FILE.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print("\n".join(table()))


def table() -> list[str]:
    """Make a table from the csv: new / old accuracy per scale."""
    if not FILE.is_file():
        return []
    with FILE.open() as file:
        rows = list(csv.DictReader(file))
    lines = [f"| arm | values |{''.join(f' {scale:g} |' for scale in SCALES)}", "|---" * (2 + len(SCALES)) + "|"]
    for arm, count in dict.fromkeys((row["arm"], row["values"]) for row in rows):
        mine = {float(row["scale"]): row for row in rows if (row["arm"], row["values"]) == (arm, count)}
        shown = [f"{float(mine[scale]['new']):.1f} / {float(mine[scale]['old']):.1f}" for scale in SCALES]
        lines.append(f"| {arm} | {int(count):,} | " + " | ".join(shown) + " |")
    return lines


if __name__ == "__main__":
    main()
