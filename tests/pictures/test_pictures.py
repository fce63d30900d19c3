"""Pictures: what they show is counted, and what has nothing to show is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn

from lightning_deepr import DeepR, connections, pictures, sparsify
from tests.helpers.optimizers import sgd
from tests.helpers.regression import Regression
from tests.helpers.trainer import trainer

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def image_net() -> nn.Module:
    torch.manual_seed(0)
    return sparsify(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.LSTM(5, 6, batch_first=True)), 0.3
    )


def test_the_input_map_counts_connections() -> None:
    net = sparsify(nn.Linear(48, 10), 0.2)
    _, places, _ = connections(net)["weight"]
    slow = np.zeros(48, int)
    for place in places.tolist():
        slow[place % 48] += 1
    assert np.array_equal(pictures.input_counts(net, grid=(6, 8)), slow.reshape(6, 8))
    assert np.array_equal(pictures.input_counts(net, "weight", (3, 4, 4)), slow.reshape(3, 4, 4).sum(0))
    assert np.array_equal(pictures.input_counts(net), slow.reshape(3, 4, 4).sum(0)), "a square of three colours"
    drawn = pictures.input_map(net, grid=(6, 8)).axes[0].images[0].get_array()
    assert np.array_equal(drawn, slow.reshape(6, 8))


def test_kernels_show_the_weights() -> None:
    net = image_net()
    drawn = pictures.kernels(net).axes[0].images[0].get_array().filled(np.nan)
    weight = net[0].weight.detach().numpy()  # type: ignore[index]
    for o in range(4):
        for i in range(3):
            tile = drawn[o * 4 + 1 : o * 4 + 4, i * 4 + 1 : i * 4 + 4]
            assert np.array_equal(np.nan_to_num(tile), weight[o, i])


def test_gates_and_degrees() -> None:
    net = image_net()
    made = pictures.gates(net, "4.weight_hh_l0")
    weight = net[4].weight_hh_l0.detach().numpy()  # type: ignore[index]
    panels = [axis.images[0].get_array() for axis in made.axes if axis.images]
    for number, panel in enumerate(panels[:4]):
        assert np.array_equal(panel > 0, weight[6 * number : 6 * number + 6] != 0)
    assert len(pictures.degrees(net).axes) == len(connections(net))


def test_curves_and_the_animation(tmp_path: Path) -> None:
    history = [(step, {"deepr/turnover": 1 / step, "deepr/alpha": step * 1e-4}) for step in (1, 2, 4)]
    for function, values in ((pictures.turnover, [1, 0.5, 0.25]), (pictures.alpha, [1e-4, 2e-4, 4e-4])):
        (line,) = function(history, path=tmp_path / "folder" / f"{function.__name__}.png").axes[0].lines
        assert list(line.get_xdata()) == [1, 2, 4] and np.allclose(line.get_ydata(), values)
    (line,) = pictures.survival({"deepr/survival/2": 0.4, "deepr/survival/1": 0.5}).axes[0].lines
    assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == [0.5, 0.4]
    assert len(pictures.accuracy({"a": [(0.01, 90.0)], "b": [(0.1, 91.0), (0.05, 92.0)]}).axes[0].lines) == 2
    path = pictures.animation([np.eye(5), np.ones((5, 5))], tmp_path / "map.gif")
    with Image.open(path) as moving:
        assert moving.n_frames == 2
    assert (tmp_path / "folder" / "alpha.png").read_bytes().startswith(b"\x89PNG")


class Media(Logger):
    """A logger that takes images, as wandb's does."""

    name, version = "media", 0

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.images: dict[str, list[str]] = {}
        self.fails = fails

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_image(self, key: str, images: list[str]) -> None:
        if self.fails:
            raise RuntimeError("no more room")
        self.images[key] = images


def test_the_callback_draws_to_files_and_to_media(tmp_path: Path) -> None:
    drawing = pictures.Pictures(tmp_path / "here", grid=(3, 4), every_n_steps=2, most_frames=3)
    logger = Media()
    trainer(DeepR(0.3, log_statistics="all"), drawing, logger=[logger, CSVLogger(tmp_path)], log_every_n_steps=2).fit(
        Regression(sgd, 12)
    )
    names = {path.stem for path in drawing.files}
    assert names == {"input_map", "degrees", "turnover", "alpha", "survival", "animation"}, "no convolution and no LSTM"
    assert all(path.is_file() for path in drawing.files)
    assert set(logger.images) == {f"pictures/{name}" for name in names}
    with Image.open(tmp_path / "here" / "animation.gif") as moving:
        assert 2 <= moving.n_frames <= 3


def test_tensorboard_gets_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    trainer(DeepR(0.3), pictures.Pictures(which=["degrees"]), logger=logger).fit(Regression(sgd, 3))
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["pictures/degrees"]


# -- bad input ----------------------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    net = sparsify(nn.Linear(39, 10), 0.2)
    with pytest.raises(ValueError, match=r"`weight` has 39 inputs, which make no square: expected grid=\(rows, columns\)"):
        pictures.input_map(net)
    with pytest.raises(ValueError, match="39 inputs, which make a grid of 6 x 6"):
        pictures.input_map(net, grid=(6, 6))
    with pytest.raises(ValueError, match="expected the weight of a linear layer, found 'head'"):
        pictures.input_map(net, "head")
    with pytest.raises(ValueError, match=r"expected the weight of a 2D convolution; Linear has `weight` \(10, 39\)"):
        pictures.kernels(net)
    with pytest.raises(ValueError, match="expected a weight of an LSTM, GRU or RNN"):
        pictures.gates(net)
    with pytest.raises(ValueError, match="found Linear without a converted tensor"):
        pictures.degrees(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="found 0 entries"):
        pictures.turnover([])
    with pytest.raises(ValueError, match="found no key of survival"):
        pictures.survival({"deepr/turnover": 0.1})
    with pytest.raises(ValueError, match=r"pairs \(connectivity in \(0, 1\], accuracy\)"):
        pictures.accuracy([(1.5, 90.0)])
    for frames, name, message in (
        ([], "a.gif", "found none"), ([np.eye(2), np.eye(3)], "a.gif", "of one shape"), ([np.eye(2)], "a.png", r"a \.gif"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pictures.animation(frames, tmp_path / name)
    with pytest.raises(ValueError, match=r"which: expected a list of input_map, .*found \['map'\]"):
        pictures.Pictures(which=["map"])
    with pytest.raises(ValueError, match="every_n_steps: expected a positive int"):
        pictures.Pictures(every_n_steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": ["kernels", "degrees"]}, "kernels: ValueError: kernels: expected the weight of a 2D convolution"),
        ({"which": ["input_map", "degrees"], "grid": (5, 5)}, "input_map: ValueError.*12 inputs, which make a grid of 5 x 5"),
    ],
)
def test_a_picture_without_a_layer_is_told_once(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    drawing = pictures.Pictures(str(tmp_path), **options)
    with pytest.warns(UserWarning, match=f"Pictures: {message}"):
        trainer(DeepR(0.3), drawing).fit(Regression(sgd, 3))
    assert [path.stem for path in drawing.files] == ["degrees"]


def test_a_folder_that_can_not_be_written_does_not_end_a_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    drawing, logger = pictures.Pictures(str(tmp_path / "file" / "here")), Media(fails=True)
    module = Regression(sgd, 3)
    with pytest.warns(UserWarning, match=r"Pictures: files: .*The training goes on") as told:
        trainer(DeepR(0.3), drawing, logger=logger).fit(module)
    assert sum("Pictures: files" in str(one.message) for one in told) == 1 and drawing.files == []
    drawing = pictures.Pictures(str(tmp_path / "there"), which=["degrees", "alpha"])
    with pytest.warns(UserWarning, match="Pictures: Media: RuntimeError: no more room"):
        trainer(DeepR(0.3), drawing, logger=logger).fit(Regression(sgd, 3))
    assert len(drawing.files) == 2


def test_without_matplotlib_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"A picture needs matplotlib\.figure, not installed here: pip install matplotlib$"):
        pictures.degrees(sparsify(nn.Linear(10, 10), 0.2))
