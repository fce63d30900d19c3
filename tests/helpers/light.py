"""A program that runs in a light installation: torch, lightning, numpy, numba, safetensors and what these bring.

    python -m tests.helpers.light lightning    # or pytorch_lightning

It takes every other library away, does what has to work, and asks for what has to be refused. It prints one JSON object:
{"away": [libraries], "works": {name: "" or the error}, "refused": {name: the message}, "loaded": [those of "away" that were
imported in spite of that]}. It needs neither pytest nor the network.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

FIVE = ("torch", "lightning", "numpy", "numba", "safetensors")
LENET = "lenet300_100.deepr_1pct_mnist"
OURS = ("lightning_deepr", "lightning-deepr", "tests")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(*names: str) -> set[str]:
    """List the named distributions (default: the five) with those that they bring, which they need in turn."""
    from packaging.requirements import Requirement

    found: set[tuple[str, str]] = set()
    waiting = [(name, "") for name in names or FIVE]
    while waiting:
        name, extra = one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for text in importlib.metadata.requires(name) or []:
                need = Requirement(text)
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    waiting += [(_plain(need.name), more) for more in ("", *need.extras)]
    return {name for name, _ in found}


def take_away() -> list[str]:
    """Make every other installed library impossible to find, for imports and for questions about versions."""
    kept = closure()
    by_module = importlib.metadata.packages_distributions()
    away = {module for module, of in by_module.items() if module not in OURS and not kept & {_plain(one) for one in of}}
    names = {_plain(one) for module in away for one in by_module[module]} - kept

    class Without(PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
            return None if name.partition(".")[0] in away else super().find_spec(name, path, target)

    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
    ask = importlib.metadata.Distribution.from_name.__func__  # type: ignore[attr-defined]

    def from_name(cls: Any, name: str) -> Any:
        if _plain(name) in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return ask(cls, name)

    importlib.metadata.Distribution.from_name = classmethod(from_name)  # type: ignore[assignment,method-assign]
    loaded = sorted(module for module in away if module in sys.modules)
    assert not loaded, f"imported before it was taken away: {loaded}"
    return sorted(away)


# -- what works ---------------------------------------------------------------------------------------------------------------


_TRAINER = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


def network() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))


def batches(count: int = 12) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 16, 20, generator=generator)
    return [(one, one[:, :3] ** 2) for one in x]


def loader() -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]


def same(one: Any, other: Any) -> None:
    import torch

    for mine, yours in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, yours)


def trainer_of(package: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """Make a LightningModule and a Trainer that writes checkpoints."""
    import torch

    pl = importlib.import_module(_TRAINER[package])

    class Module(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Any:
            loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    trainer = pl.Trainer(
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    return Module(), trainer


def fit_and_resume(package: str, folder: Path) -> None:
    from lightning_deepr import DeepR, load_state_dict

    checkpoint = importlib.import_module(f"{_TRAINER[package]}.callbacks").ModelCheckpoint
    every = checkpoint(folder, "{epoch}", save_top_k=-1)
    whole, trainer = trainer_of(package, folder, max_epochs=4, callbacks=[DeepR(0.2, log_statistics="all"), every])
    trainer.fit(whole, loader())
    resumed, trainer = trainer_of(package, folder, max_epochs=4, callbacks=[DeepR(0.2)])
    trainer.fit(resumed, loader(), ckpt_path=folder / "epoch=1.ckpt")
    same(resumed.net, whole.net)
    fresh, _ = trainer_of(package, folder)
    same(load_state_dict(fresh, folder / "epoch=3.ckpt"), whole)


def plain_loop(package: str, folder: Path) -> None:
    import torch

    from lightning_deepr import DeepR, kernels, sparsify

    assert kernels.available(), "the compiled kernels are not used"

    def begin() -> Any:
        net = sparsify(network(), 0.2)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        return net, optimizer, DeepR().attach(net, optimizer, total_steps=12)

    def run(parts: Any, data: list[Any]) -> None:
        for x, y in data:
            parts[1].zero_grad()
            torch.nn.functional.mse_loss(parts[0](x), y).backward()
            parts[1].step()

    whole = begin()
    run(whole, batches()[:6])
    torch.save([part.state_dict() for part in whole], folder / "half.pt")
    run(whole, batches()[6:])
    resumed = begin()
    for part, state in zip(resumed, torch.load(folder / "half.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    run(resumed, batches()[6:])
    same(whole[0], resumed[0])


def every_method(package: str, folder: Path) -> None:
    import torch

    from lightning_deepr import methods

    for name in methods.METHODS:
        more = {"SoftDeepR": {"temperature": 1e-6}, "L1Shrinkage": {"l1": 1e-4}}.get(name, {})
        method = getattr(methods, name)(0.3, **more)
        net = method.prepare(network())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        method.attach(net, optimizer, total_steps=4)
        for x, y in batches(4):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()


def files(package: str, folder: Path) -> None:
    import torch

    from lightning_deepr import densify, load_state_dict, save_sparse, sparsify, zoo

    net = sparsify(network(), 0.2)
    file = save_sparse(net, folder / "net.safetensors")
    assert torch.equal(load_state_dict(network(), file)[0].weight + 0, net[0].weight + 0)
    assert torch.equal(zoo.load(file, module=network())[2].weight + 0, net[2].weight + 0)
    torch.save(net.state_dict(), folder / "net.pt")
    same(load_state_dict(network(), folder / "net.pt"), net)
    zoo.verify(LENET)
    assert LENET in zoo.list_models(task="image-classification") and zoo.info(LENET)["input"]["kind"] == "image"
    assert zoo.predict(LENET, torch.zeros(28, 28, dtype=torch.uint8).numpy()).label in "0123456789"
    network().load_state_dict(densify(net).state_dict())


def exports(package: str, folder: Path) -> None:
    import torch

    from lightning_deepr import sparsify
    from lightning_deepr.export import to_c, to_csr, to_dense_state_dict

    net, x = sparsify(network(), 0.2).eval(), batches()[0][0]
    network().load_state_dict(to_dense_state_dict(net))
    assert sum(matrix.values().numel() for matrix in to_csr(net).values()) == 294
    to_c(net, folder / "net.h")
    assert "float" in (folder / "net.h").read_text()
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x))


def reports(package: str, folder: Path) -> None:
    from lightning_deepr import connectivity_report, dead_units, prune_dead_units, sparsify

    net = sparsify(network(), 0.05)
    assert "0.weight" in str(connectivity_report(net)) and connectivity_report(net).to_dict()["active"] == 74
    assert dead_units(net)
    prune_dead_units(net)


def command_line(package: str, folder: Path) -> None:
    from lightning_deepr import save_sparse, sparsify
    from lightning_deepr.commands.main import main

    file = save_sparse(sparsify(network(), 0.2), folder / "net.safetensors")
    for arguments in (
        ["--version"], ["recipes"], ["zoo", "list"], ["zoo", "info", str(file)], ["zoo", "verify", LENET],
        ["report", str(file)], ["compare", str(file), str(file)],
        ["export", LENET, "--to", "c", "--out", str(folder / "lenet.h")],
    ):  # fmt: skip
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(arguments)
        assert out.getvalue().strip(), arguments


def environment_variable(package: str, folder: Path) -> None:
    from lightning_deepr._environment import connectivity

    assert connectivity("{fc1: 0.1}") == {"fc1": 0.1}


WORKS: dict[str, Callable[[str, Path], None]] = {
    one.__name__: one
    for one in (fit_and_resume, plain_loop, every_method, files, exports, reports, command_line, environment_variable)
}


# -- what is refused by name --------------------------------------------------------------------------------------------------


def wandb(folder: Path) -> None:
    from lightning_deepr.recipes.loggers import WandbLogger

    WandbLogger(save_dir=str(folder))


def pictures(folder: Path) -> None:
    from lightning_deepr import pictures, sparsify

    pictures.degrees(sparsify(network(), 0.2))


def animation(folder: Path) -> None:
    import numpy as np

    from lightning_deepr import pictures

    pictures.animation([np.eye(4)], folder / "a.gif")


def card_picture(folder: Path) -> None:
    from lightning_deepr import connections, sparsify
    from lightning_deepr.hub.pictures import draw

    draw(connections(sparsify(network(), 0.2)), folder / "a.png")


def hub_mixin(folder: Path) -> None:
    from lightning_deepr.hub import SparseHubMixin  # noqa: F401


def hub_load(folder: Path) -> None:
    from lightning_deepr import zoo

    zoo.load("someone/net", source="hub")


def hub_publish(folder: Path) -> None:
    from lightning_deepr import zoo

    zoo.publish(LENET, "someone/net")


def recipe(folder: Path) -> None:
    from lightning_deepr.commands.main import main

    main(["fit", "--config", "mnist_quickstart"])


def hub_command(folder: Path) -> None:
    from lightning_deepr.commands.main import main

    main(["zoo", "pull", "someone/net"])


def mnist(folder: Path) -> None:
    from lightning_deepr.recipes.digits import MNISTDataModule

    MNISTDataModule(str(folder)).prepare_data()


def cifar10(folder: Path) -> None:
    from lightning_deepr.recipes.cifar10 import CIFAR10DataModule

    CIFAR10DataModule(str(folder)).prepare_data()


def data_frame(folder: Path) -> None:
    from lightning_deepr import connectivity_report, sparsify

    connectivity_report(sparsify(network(), 0.2)).to_pandas()


def onnx(folder: Path) -> None:
    from lightning_deepr import sparsify
    from lightning_deepr.export import to_onnx

    to_onnx(sparsify(network(), 0.2), folder / "net.onnx", batches()[0][0])


def scipy(folder: Path) -> None:
    from lightning_deepr import sparsify
    from lightning_deepr.export import to_scipy

    to_scipy(sparsify(network(), 0.2))


def recording(folder: Path) -> None:
    import numpy as np

    from lightning_deepr import zoo

    zoo.load("timit_blstm.deepr_1pct_timit_sample").preprocess(np.zeros(16_000, np.int16))


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {  # what is refused, and the library that the message names
    "wandb": (wandb, "wandb"),
    "pictures": (pictures, "matplotlib"),
    "animation": (animation, "matplotlib"),
    "card_picture": (card_picture, "matplotlib"),
    "hub_mixin": (hub_mixin, "huggingface_hub"),
    "hub_load": (hub_load, "huggingface_hub"),
    "hub_publish": (hub_publish, "huggingface_hub"),
    "hub_command": (hub_command, "huggingface_hub"),
    "recipe": (recipe, "jsonargparse"),
    "mnist": (mnist, "torchvision"),
    "cifar10": (cifar10, "torchvision"),
    "data_frame": (data_frame, "pandas"),
    "onnx": (onnx, "onnx"),
    "scipy": (scipy, "scipy"),
    "recording": (recording, "kaldi"),
}


def main() -> None:
    package = sys.argv[1]
    os.environ["LIGHTNING_DEEPR_PACKAGE"] = package
    away = take_away()
    importlib.import_module(package)
    works, refused = {}, {}
    for name, check in WORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(package, Path(folder))
                works[name] = ""
            except BaseException:
                works[name] = traceback.format_exc()
    for name, (ask, _) in REFUSED.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                ask(Path(folder))
                refused[name] = "nothing was refused"
            except (ImportError, SystemExit) as error:
                refused[name] = str(error)
            except BaseException:
                refused[name] = traceback.format_exc()
    heavy = sorted(module for module in away if module in sys.modules)
    print(json.dumps({"away": away, "works": works, "refused": refused, "loaded": heavy}))


if __name__ == "__main__":
    main()
