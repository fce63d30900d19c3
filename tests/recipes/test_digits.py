"""The data of the MNIST recipes: embedded digits, batches, shifts and the picture of the pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_deepr import connections
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes import digits
from lightning_deepr.recipes.batches import Batches
from lightning_deepr.recipes.callbacks import inputs_per_pixel
from tests.helpers.optional import needs
from tests.helpers.paths import ROOT

# -- command line -------------------------------------------------------------------------------------------------------------


@needs("torchvision")
def test_missing_mnist_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # no network
    with pytest.raises(RuntimeError, match=r"(?s)MNIST was not found.*MNIST/raw.*--data.root.*mnist_quickstart"):
        digits.MNISTDataModule(str(tmp_path)).prepare_data()


# -- data ---------------------------------------------------------------------------------------------------------------------


def test_embedded_digits() -> None:
    train_images, train_labels, test_images, test_labels = digits.embedded_digits()
    assert train_images.shape == (17_000, 28, 28)
    assert test_images.shape == (3_000, 28, 28)
    for labels in (train_labels, test_labels):
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.08  # MNIST's rarest digit has a share of 9 %
        assert shares.max() < 0.13
    size = (ROOT / "recipes" / digits.EMBEDDED).stat().st_size
    assert size <= 3_000_000


def test_damaged_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="damaged"):
        digits.embedded_digits()


def some_images(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 6, 5), dtype=torch.uint8, generator=generator), torch.arange(count)


def test_batches_cover_an_epoch_once_in_a_new_order_each_time() -> None:
    loader = Batches(*some_images(), batch_size=7, shuffle=True, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        orders.append(torch.cat([labels for _, labels in loader]))
    assert len(loader) == 6
    assert all(torch.equal(order.sort().values, torch.arange(40)) for order in orders)
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


def test_batches_go_on_in_the_middle_of_an_epoch() -> None:
    make = lambda: Batches(*some_images(), batch_size=7, shuffle=True, shift_probability=0.5)  # noqa: E731
    whole, first, second = list(make()), make(), make()
    stream = iter(first)
    for _ in range(3):
        next(stream)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == 3
    for (images, labels), (expected_images, expected_labels) in zip(rest, whole[3:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_shifts_are_the_nine_integer_shifts_with_their_probability() -> None:
    images, labels = some_images(2000)
    shifted, seen = Batches(images, labels, batch_size=2000, shift_probability=0.9), torch.zeros(9)
    (batch, _), *_ = shifted
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    versions = torch.stack([padded[:, y : y + 6, x : x + 5] for y in range(3) for x in range(3)], dim=1).div(255.0)
    equal = (versions == batch).all(dim=(2, 3))
    assert equal.any(dim=1).all()
    seen = equal.float().mean(0)
    expected = torch.full((9,), 0.1)
    expected[4] += 0.1
    assert (seen - expected).abs().max() < 0.03


def test_shifts_end() -> None:
    images, labels = some_images()
    loader = Batches(images, labels, batch_size=10, shift_probability=1.0, shift_epochs=1.5)
    unshifted = []
    for epoch in (0, 1, 2):
        loader.set_epoch(epoch)
        unshifted += [torch.equal(batch[:, 0], images[labels_].div(255.0)) for batch, labels_ in loader]
    assert unshifted == [False] * 6 + [True] * 6


def test_picture_counts_the_connections_of_each_pixel() -> None:
    from lightning_deepr import sparsify

    net = sparsify(LeNet300100(), 0.01)
    counts = inputs_per_pixel(net, "fc1.weight", (28, 28))
    _, places, _ = connections(net)["fc1.weight"]
    slow = torch.zeros(28, 28, dtype=torch.long)
    for place in places.tolist():
        slow[place % 784 // 28, place % 28] += 1
    assert torch.equal(counts, slow)
    with pytest.raises(ValueError, match="expected one of"):
        inputs_per_pixel(net, "fc9.weight", (28, 28))
