"""A pretrained network made sparse: keep the largest 5 % of the weights, train them, move what does not help.

The dense network is LeNet-300-100, trained for a moment on the digits that come with the package. Any module with linear,
convolutional, recurrent or attention layers will do. `examples/notebooks/pretrained.ipynb` is the same as a notebook.

    python examples/pretrained.py            # a minute on a CPU
    python examples/pretrained.py --short    # a few seconds
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deepr import DeepR, connectivity_report, densify, sparsify
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import embedded_digits


class Classifier(lightning.LightningModule):
    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def fit(net: nn.Module, data: DataLoader[Any], epochs: int, callbacks: list[Any]) -> nn.Module:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(net.train(), lr=1e-3), data)
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((net.eval()(images).argmax(1) == labels).float().mean())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="of each of the three trainings")
    parser.add_argument("--connectivity", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="1,500 digits, 2 epochs")
    given = parser.parse_args(arguments)
    epochs, count = (2, 1500) if given.short else (given.epochs, 14_000)
    lightning.seed_everything(given.seed, verbose=False)
    images, labels, test_images, test_labels = embedded_digits()
    test = (test_images.float() / 255, test_labels)
    data = DataLoader(TensorDataset(images[:count].float() / 255, labels[:count]), batch_size=64, shuffle=True)

    pretrained = fit(LeNet300100(), data, epochs, [])
    found = {"dense": accuracy(pretrained, *test)}

    # 1. "largest": the connections begin where the largest weights are, with their values. Without training much is lost.
    net = sparsify(copy.deepcopy(pretrained), given.connectivity, init="largest")
    found["cut"] = accuracy(net, *test)

    # 2. Train what is left. The callback takes the connections as they are, and rewires from there.
    #    In one step, on the dense network: DeepR(0.05, init="largest").
    found["trained"] = accuracy(fit(net, data, epochs, [DeepR()]), *test)

    # 3. For comparison: as many connections, as long a training, but a random start.
    found["from_scratch"] = accuracy(fit(LeNet300100(), data, epochs, [DeepR(given.connectivity)]), *test)

    print(connectivity_report(net))
    print(f"dense {found['dense']:.1%}, cut {found['cut']:.1%}, trained {found['trained']:.1%}", end="")
    print(f"; from a random start {found['from_scratch']:.1%}")
    densify(net)  # ordinary layers with zeros: the state_dict loads without this package
    return found


if __name__ == "__main__":
    main()
