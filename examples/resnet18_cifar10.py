"""ResNet-18 for CIFAR-10 with 5 % of its weights.

torchvision's ResNet-18, with the usual changes for images of 32 x 32: a first convolution of 3 x 3, and no pooling behind it.
One line makes it sparse. Its dense version has 11.2 million weights; here the first and the last layer stay dense.

    python examples/resnet18_cifar10.py --root data    # hours on a CPU: for a GPU
    python examples/resnet18_cifar10.py --short        # made-up images, some seconds
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18

from lightning_deepr import DeepR, connectivity_report

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images' channels


def images(root: str, train: bool) -> TensorDataset:
    """Read CIFAR-10 (downloaded if it is not there): float32 [images, 3, 32, 32], normalized, and labels."""
    data = CIFAR10(root, train=train, download=True)
    x = torch.from_numpy(data.data).permute(0, 3, 1, 2).float() / 255
    return TensorDataset((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), torch.tensor(data.targets))


def made_up(count: int, seed: int) -> TensorDataset:
    """Make images of 16 x 16: noise, and a bright square in one of ten places, which is the label."""
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(count, 3, 16, 16, generator=generator), torch.randint(10, (count,), generator=generator)
    for image, label in zip(x, labels.tolist(), strict=True):
        image[:, label // 4 * 5 : label // 4 * 5 + 4, label % 4 * 4 : label % 4 * 4 + 4] += 3
    return TensorDataset(x, labels)


def shifted(x: Tensor) -> Tensor:
    """Move a batch by up to 4 pixels, and flip half of it: the usual augmentation, for whole batches."""
    down, right = (int(n) for n in torch.randint(-4, 5, (2,)))
    flip = torch.rand(len(x), device=x.device) < 0.5
    return torch.where(flip[:, None, None, None], x.flip(3), x).roll((down, right), (2, 3))


class Classifier(lightning.LightningModule):
    def __init__(self, steps: int, augment: bool) -> None:
        super().__init__()
        self.net = resnet18(num_classes=10)
        self.net.conv1, self.net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        self.steps, self.augment = steps, augment

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x = shifted(batch[0]) if self.augment else batch[0]
        return nn.functional.cross_entropy(self.net(x), batch[1])

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, self.steps, pct_start=0.15)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of CIFAR-10")
    parser.add_argument("--connectivity", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="made-up images, 30 steps")
    given = parser.parse_args(arguments)
    lightning.seed_everything(given.seed, verbose=False)
    train, test = (made_up(240, 0), made_up(200, 1)) if given.short else (images(given.root, True), images(given.root, False))
    epochs, batch = (4, 16) if given.short else (given.epochs, 128)
    loader = DataLoader(train, batch, shuffle=True, drop_last=True)
    module = Classifier(epochs * len(loader), augment=not given.short)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        # every weight but the first convolution's and the classifier's; "erk" gives small layers a larger share
        callbacks=[DeepR(given.connectivity, target_modules=["net.layer*"], distribution="erk")],
        accelerator="cpu" if given.short else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=not given.short,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    (found,) = trainer.test(module, DataLoader(test, 200), verbose=False)
    print(connectivity_report(module))
    print(f"{found['accuracy']:.2%} of the test images")
    return dict(found)


if __name__ == "__main__":
    main()
