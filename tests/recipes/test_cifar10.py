"""The CIFAR-10 benchmark: network and augmentation compared with slow versions of the tutorial's, files, interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import max_pool2d, pad

from lightning_deepr import DeepR, LinearDecay
from lightning_deepr.models import CIFAR10CNN, ResponseNorm
from lightning_deepr.recipes.callbacks import RampedEMA
from lightning_deepr.recipes.cifar10 import CIFAR10DataModule, wrong_files
from lightning_deepr.recipes.classifier import CIFAR10Classifier, is_decayed
from lightning_deepr.recipes.crops import Crops
from tests.helpers.crashes import Crash, CrashAt
from tests.helpers.optional import needs

# -- the network ------------------------------------------------------------------------------------------------------------


def test_response_norm_is_tensorflows() -> None:
    """Compute tf.nn.lrn(x, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75) channel by channel in NumPy."""
    x = torch.randn(2, 12, 3, 2, dtype=torch.float64) * 5
    image = x.numpy()
    squares = image**2
    slow = np.stack(
        [image[:, c] / (1 + 0.001 / 9 * squares[:, max(0, c - 4) : c + 5].sum(1)) ** 0.75 for c in range(12)],
        axis=1,
    )
    assert np.abs(ResponseNorm(12).double()(x).numpy() - slow).max() < 1e-7  # the band has the precision of float32
    with pytest.raises(ValueError, match="odd"):
        ResponseNorm(12, size=8)


def test_response_norm_is_torchs_with_its_gradient() -> None:
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    gradients = []
    for layer in (ResponseNorm(64).double(), nn.LocalResponseNorm(9, 1e-3, 0.75, 1.0)):
        (gradient,) = torch.autograd.grad((layer(x) * weight).sum(), x)
        gradients.append(gradient)
    assert torch.allclose(*gradients, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("size", "alpha", "k"), [(9, 1e-3, 1.0), (3, 2.0, 0.5)])
def test_gradient_of_response_norm(size: int, alpha: float, k: float) -> None:
    norm = ResponseNorm(12, size, alpha, k).double()
    x = torch.randn(2, 12, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)
    assert torch.autograd.gradgradcheck(norm, x)
    with torch.no_grad():
        plain = norm(x)
    assert torch.equal(norm(x), plain)
    assert norm(x).grad_fn.name().startswith("_Response")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_response_norm_in_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    exact = ResponseNorm(64)
    norm = ResponseNorm(64) if autocast else ResponseNorm(64).to(dtype)
    x = torch.randn(2, 64, 4, 4).requires_grad_()
    (expected,) = torch.autograd.grad(exact(x).sum(), x)
    rounded = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(rounded)
    (found,) = torch.autograd.grad(y.sum(), rounded)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, atol=0.05)


def test_response_norm_compiles() -> None:
    norm, x = ResponseNorm(8), torch.randn(2, 8, 3, 3, requires_grad=True)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(norm(x).sum(), x)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(torch.export.export(norm, (x,)).module()(x), norm(x))


def test_gradients_per_image_pass_response_norm() -> None:
    norm, x, weight = ResponseNorm(8), torch.randn(3, 8, 2, 2), torch.randn(3, 8, 2, 2)

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (norm(x[None]) * weight).sum()

    found = torch.func.vmap(torch.func.grad(loss))(x, weight)
    x.requires_grad_()
    (expected,) = torch.autograd.grad((norm(x) * weight).sum(), x, create_graph=True)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("pixels", [24, 12])
def test_pooling_is_tensorflows_same(pixels: int) -> None:
    """SAME pads (n / 2 - 1) * 2 + 3 - n = 1 pixel, on the right and below."""
    x = torch.randn(1, 2, pixels, pixels)
    slow = max_pool2d(pad(x, (0, 1, 0, 1), value=-float("inf")), 3, 2)
    assert torch.equal(CIFAR10CNN().pool(x), slow)


def test_the_tutorials_start() -> None:
    torch.manual_seed(0)
    net = CIFAR10CNN()
    for name, deviation, bias in (("conv2", 0.05, 0.1), ("local3", 0.04, 0.1), ("local4", 0.04, 0.1), ("output", 1 / 192, 0.0)):
        layer = net.get_submodule(name)
        assert layer.weight.abs().max() <= 2 * deviation
        # a normal distribution cut at two standard deviations has .8796 of its standard deviation
        assert layer.weight.std().item() == pytest.approx(0.8796 * deviation, rel=0.05)
        assert torch.equal(layer.bias, torch.full_like(layer.bias, bias))


def test_weight_decay_is_on_the_two_linear_layers_alone() -> None:
    module = CIFAR10Classifier()
    DeepR({"local3": 0.05, "conv2": 0.2}).prepare(module)
    decayed = {name for name, _ in module.named_parameters() if is_decayed(name)}
    assert decayed == {"net.local3.parametrizations.weight.original", "net.local4.weight"}
    (optimizer,), _ = module.configure_optimizers()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.004, 0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


# -- the images -------------------------------------------------------------------------------------------------------------


def some_images(count: int = 12, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator), torch.arange(count)


def standardized(image: np.ndarray) -> np.ndarray:
    """Compute tf.image.per_image_standardization."""
    return (image - image.mean()) / max(image.std(), image.size**-0.5)


def contrasted(image: np.ndarray, factor: float) -> np.ndarray:
    """Compute tf.image.adjust_contrast: change the contrast of each channel about its own mean."""
    mean = image.mean(axis=(1, 2), keepdims=True)
    return (image - mean) * factor + mean


def test_the_central_crop_for_testing() -> None:
    images, labels = some_images()
    (batch, seen), *_ = Crops(images, labels, 12)
    assert torch.equal(seen, labels)
    for image, crop in zip(images.double().numpy(), batch.numpy(), strict=True):
        assert np.abs(crop - standardized(image[:, 4:28, 4:28])).max() < 1e-5


def test_every_distorted_crop_is_one_of_the_tutorials() -> None:
    images, labels = some_images(6)
    batches = Crops(images, labels, 6, distort=True, size=28, contrast=(0.2, 1.8), seed=5)
    (batch, _), *_ = batches
    for image, crop in zip(images.double().numpy(), batch.numpy(), strict=True):
        found = False
        for top in range(5):
            for left in range(5):
                for flip in (False, True):
                    plain = image[:, top : top + 28, left : left + 28][:, :, :: -1 if flip else 1]
                    # The factor is the only unknown; the ratio of channel 0's deviation and the whole image's gives it.
                    for factor in np.linspace(0.2, 1.8, 9):
                        # Adding any number before changes nothing; therefore the crops leave the brightness out.
                        lighter = standardized(contrasted(plain + 63 * factor, factor))
                        assert np.allclose(lighter, standardized(contrasted(plain, factor)), atol=1e-9)
                        break
                    centred = plain - plain.mean(axis=(1, 2), keepdims=True)
                    own = crop - crop.mean(axis=(1, 2), keepdims=True)
                    ratio = (own * centred).sum() / (centred**2).sum()
                    if np.abs(own - ratio * centred).max() > 1e-4:
                        continue
                    between = plain.mean(axis=(1, 2)) - plain.mean()
                    # own = factor * centred / deviation; deviation^2 = factor^2 * within + between
                    within = (centred**2).mean()
                    factor = np.sqrt((between**2).mean() * ratio**2 / (1 - ratio**2 * within))
                    assert 0.19 < factor < 1.81
                    assert np.abs(crop - standardized(contrasted(plain, factor))).max() < 1e-3
                    found = True
        assert found


def test_crops_and_flips_are_drawn_evenly() -> None:
    """Each pixel encodes its place: all 81 corners and both directions occur, with equal frequencies up to chance."""
    ramp = torch.zeros(3, 32, 32, dtype=torch.uint8)
    ramp[0] = torch.arange(32, dtype=torch.uint8)[:, None]
    ramp[1] = torch.arange(32, dtype=torch.uint8)
    count = 16_200
    images = ramp.expand(count, -1, -1, -1)
    batches = Crops(images, torch.zeros(count, dtype=torch.int64), count, distort=True, contrast=(1, 1))
    (batch, _), *_ = batches
    flipped = batch[:, 1, 0, 0] > batch[:, 1, 0, 23]
    # Standardization scales all differences alike: the difference between two rows is the unit.
    step = (batch[:, 0, 1, 0] - batch[:, 0, 0, 0])[:, None]
    values = (batch[:, :, 0, :] - batch[:, 2:, 0, :]) / step[:, :, None]  # channel 2 is 0 everywhere
    top, left = values[:, 0, 0].round().long(), values[:, 1].min(1).values.round().long()
    corners = torch.bincount(top * 9 + left, minlength=81).double()
    assert len(corners) == 81
    assert ((corners - 200).square() / 200).sum() < 140  # chi-square of 80 degrees of freedom: p = 4e-5
    assert abs(flipped.double().mean() - 0.5) < 0.02


def test_an_even_image_stays_finite() -> None:
    even = torch.full((2, 3, 32, 32), 7, dtype=torch.uint8)
    (batch, _), *_ = Crops(even, torch.zeros(2, dtype=torch.int64), 2, distort=True)
    assert torch.equal(batch, torch.zeros(2, 3, 24, 24))


def test_crops_refuse_what_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"at least 24 x 24, found \[4, 3, 20, 20\]"):
        Crops(*some_images(4, 20), 2)


def test_an_epoch_goes_on_in_the_middle() -> None:
    make = lambda: Crops(*some_images(), batch_size=5, distort=True, shuffle=True, drop_last=True)  # noqa: E731
    whole, first, second = list(make()), make(), make()
    assert len(whole) == len(first) == 2
    next(iter(first))
    second.load_state_dict(first.state_dict())
    ((images, labels),) = second
    assert torch.equal(images, whole[1][0])
    assert torch.equal(labels, whole[1][1])


# -- the files --------------------------------------------------------------------------------------------------------------


@needs("torchvision")
def test_missing_and_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # no network
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_2").write_bytes(b"half of it")
    with pytest.raises(RuntimeError, match=r"(?s)Missing: data_batch_1, data_batch_3.*wrong md5: data_batch_2.*--data.root"):
        CIFAR10DataModule(str(tmp_path)).prepare_data()
    with pytest.raises(RuntimeError, match="With a wrong md5: data_batch_2"):
        CIFAR10DataModule(str(tmp_path)).setup("fit")
    assert "batches.meta" in wrong_files(folder)


@pytest.mark.parametrize(("arguments", "message"), [({"val_size": -1}, "found 128 and -1"), ({"contrast": (0, 1)}, "contrast")])
def test_bad_settings_of_the_data(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(**arguments)


# -- training ---------------------------------------------------------------------------------------------------------------


class MadeUp(CIFAR10DataModule):
    """Replace the files by random images."""

    def prepare_data(self) -> None:
        pass

    def load(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        images, numbers = some_images(24)
        return images, numbers % 10, images[:6], numbers[:6] % 10


def train(folder: Path, crash_at: int | None = None, resume: Path | None = None) -> CIFAR10Classifier:
    seed_everything(3, verbose=False)
    module = CIFAR10Classifier(lr=0.01, momentum=0.9, schedule="cosine", warmup_epochs=0.5)
    checkpoints = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1)
    callbacks: list[Callback] = [
        DeepR({"conv2": 0.1, "local3": 0.01, "local4": 0.1}, l1=LinearDecay(0.1), seed=3),
        RampedEMA(0.99),
        checkpoints,
    ]
    trainer = Trainer(
        callbacks=callbacks + ([CrashAt(crash_at)] if crash_at else []),
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = MadeUp(batch_size=6, seed=3)
    if crash_at:
        with pytest.raises(Crash):
            trainer.fit(module, data)
    else:
        trainer.fit(module, data, ckpt_path=resume)
        trainer.test(module, data, verbose=False)
    return module


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    train(tmp_path / "first", crash_at=6)  # in the middle of the second epoch
    resumed = train(tmp_path / "second", resume=tmp_path / "first" / "last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), name


def test_the_moving_average_is_tensorflows() -> None:
    """shadow -= (1 - min(decay, (1 + n) / (10 + n))) * (shadow - value), as ExponentialMovingAverage with num_updates."""
    average = RampedEMA(0.5)._kwargs["avg_fn"]
    shadow = slow = torch.tensor([1.0])
    for n in range(1, 30):
        value = torch.tensor([float(n)])
        shadow = average(shadow, value, torch.tensor(n))
        slow = slow - (1 - min(0.5, (1 + n) / (10 + n))) * (slow - value)
    assert torch.allclose(shadow, slow)
    with pytest.raises(ValueError, match="decay"):
        RampedEMA(1.0)
