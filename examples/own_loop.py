"""An own training loop: convert, make the optimizer, attach. Interrupt, resume, save, and load again.

LeNet-300-100 learns the digits that come with the package, with 2 % of its connections.

    python examples/own_loop.py            # half a minute on a CPU
    python examples/own_loop.py --short    # a few seconds
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr import DeepR, connectivity_report, load_state_dict, save_sparse, sparsify
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import embedded_digits


class Training:
    """Everything that a loop needs: the network, its optimizer, and the rewiring of the two."""

    def __init__(self, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.net: nn.Module = sparsify(LeNet300100(), 0.02, seed=seed)  # first: each weight becomes K slots
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)  # then: it holds the slots
        self.rewiring = DeepR(seed=seed).attach(self.net, self.optimizer, total_steps=steps)  # rewires after each step
        self.step = 0

    def run(self, images: Tensor, labels: Tensor, until: int) -> None:
        while self.step < until:
            chosen = torch.randint(len(labels), (64,), generator=torch.Generator().manual_seed(self.step))
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(images[chosen]), labels[chosen]).backward()
            self.optimizer.step()  # nothing else to call: a hook of the optimizer rewires
            self.step += 1

    # A checkpoint has three parts. Connections are in the network's state_dict, with their values.
    def state_dict(self) -> dict[str, Any]:
        parts = {"net": self.net, "optimizer": self.optimizer, "rewiring": self.rewiring}
        return {"step": self.step, **{name: part.state_dict() for name, part in parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rewiring.load_state_dict(state["rewiring"])
        self.step = state["step"]


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((net(images).argmax(1) == labels).float().mean())


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="200 steps")
    given = parser.parse_args(arguments)
    steps = 200 if given.short else given.steps
    images, labels, test_images, test_labels = embedded_digits()
    images, test_images = images.float() / 255, test_images.float() / 255

    with tempfile.TemporaryDirectory() as folder:
        first = Training(steps, given.seed)
        first.run(images, labels, steps // 2)  # ... and here the power fails
        torch.save(first.state_dict(), Path(folder) / "half.ckpt")
        first.run(images, labels, steps)  # (this time it did not: the uninterrupted run, to compare)

        resumed = Training(steps, given.seed)
        resumed.load_state_dict(torch.load(Path(folder) / "half.ckpt", weights_only=True))
        resumed.run(images, labels, steps)
        is_equal = torch.equal(first.net.fc1.weight + 0, resumed.net.fc1.weight + 0)  # type: ignore[operator, union-attr]

        file = save_sparse(resumed.net, Path(folder) / "net.safetensors")  # K values and K places: nothing else is needed
        loaded = load_state_dict(LeNet300100(), file)
        found = {
            "accuracy": accuracy(loaded, test_images, test_labels),
            "resumed_is_equal": is_equal,
            "bytes": file.stat().st_size,
        }
    print(connectivity_report(loaded))
    print(f"{found['accuracy']:.2%} of the test digits, from a file of {found['bytes']:,} bytes")
    print(f"the resumed run equals the uninterrupted one: {is_equal}")
    return found


if __name__ == "__main__":
    main()
