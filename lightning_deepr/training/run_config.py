"""What makes a run: the settings that a callback writes into the configuration of every logger, so that runs can be told apart.

Values are numbers, texts and flags, under names that every logger takes: wandb, TensorBoard, MLflow and CSV.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from lightning_deepr._version import __version__
from lightning_deepr.packages.messages import rank_zero_warn

_MOST_BYTES = 2**30  # a second or two
_PACKAGES = ("torch", "lightning", "pytorch_lightning", "numpy", "numba")


def settings_of(callback: Any) -> dict[str, Any]:
    """Return the settings of a method, with the connectivity that they came to.

    Args:
        callback: a method's callback, after the conversion.

    Returns:
        method; every argument (connectivity, distribution, init, l1, seed, ...), a schedule as a dict with its name under
        "schedule" and its numbers; and of the network: K and N of all converted tensors, density (K / N), and K_by_tensor.

    Example::

        >>> import torch
        >>> from lightning_deepr import DeepR, LinearDecay
        >>> callback = DeepR(0.05, l1=LinearDecay(1e-4), seed=3)
        >>> settings = settings_of(callback)
        >>> settings["method"], settings["connectivity"], settings["seed"], settings["l1"]
        ('DeepR', 0.05, 3, {'schedule': 'LinearDecay', 'start': 0.0001, 'end': 0.0})
    """
    given = {entry.name: getattr(callback, entry.name) for entry in dataclasses.fields(callback) if entry.init}
    counts = {tensor.name: int(tensor.slots.count) for tensor in callback.tracked}
    total, active = sum(int(tensor.slots.total) for tensor in callback.tracked), sum(counts.values())
    return {
        "method": type(callback).__name__,
        **{name: plain(value) for name, value in given.items()},
        "K": active,
        "N": total,
        "density": active / total if total else 0.0,
        "K_by_tensor": counts,
    }


def plain(value: Any) -> Any:
    """Write a setting as a number, a text or a flag; a schedule as a dict of these.

    Example::

        >>> plain({"fc*": 0.1}), plain(("a", "b"))
        ('{"fc*": 0.1}', 'a, b')
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value).__module__.startswith("lightning_deepr."):  # LinearDecay, LrPower, TurnoverTarget
        names = list(inspect.signature(type(value)).parameters)
        if all(isinstance(getattr(value, name, None), (int, float, str)) for name in names):
            return {"schedule": type(value).__name__, **{name: getattr(value, name) for name in names}}
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):  # patterns have characters that MLflow does not take in a name
        return json.dumps({str(key): plain(one) for key, one in value.items()})
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(str(plain(one)) for one in value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    return text if " at 0x" not in text else type(value).__name__


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that compute."""
    found = {"python": platform.python_version(), "lightning_deepr": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def digest_of_data(trainer: Any) -> str | None:
    """Return a digest of the training data; None: nothing is known that can be read without drawing random numbers.

    A data module's own ``digest()`` decides; a ``TensorDataset`` of up to 1 GiB in the training loader is hashed (SHA-256, 16
    digits).
    """
    own = getattr(getattr(trainer, "datamodule", None), "digest", None)
    if callable(own):
        found = own()
        return None if found is None else str(found)
    source = getattr(getattr(trainer.fit_loop, "_data_source", None), "instance", None)
    dataset = getattr(source, "dataset", None)
    if not isinstance(dataset, torch.utils.data.TensorDataset):
        return None
    size = sum(tensor.numel() * tensor.element_size() for tensor in dataset.tensors)
    return digest_of(dataset.tensors) if size <= _MOST_BYTES else None


def digest_of(tensors: Any) -> str:
    """Hash tensors, with their shapes and types: 16 hexadecimal digits.

    Example::

        >>> digest_of([torch.arange(3)]) == digest_of([torch.arange(3)]) != digest_of([torch.arange(4)])
        True
    """
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def log_config(callback: Any, trainer: Any, module: Any) -> None:
    """Write the settings into the configuration of each logger, before Lightning writes the module's.

    TensorBoard keeps the first hyperparameters of a run only, so the module's own come with them.
    """
    if not trainer.loggers:
        return
    own = dict(module.hparams_initial) if getattr(module, "_log_hyperparams", False) else {}
    config: dict[str, Any] = {**own, "sparsity": settings_of(callback), "versions": versions()}
    try:
        digest = digest_of_data(trainer)
    except Exception as error:  # the user's own function
        digest = f"not known: {type(error).__name__}: {error}"
    if digest is not None:
        config["data_digest"] = digest
    for logger in trainer.loggers:
        logger.log_hyperparams(config)


def warn_of_watched(module: Any, converted: int) -> None:
    """Warn if ``wandb.watch`` has hooks on weights that the conversion has just replaced.

    Args:
        module: the LightningModule.
        converted: the number of tensors that were converted now.
    """
    hooks = (name for part in module.modules() for name in getattr(part, "_wandb_hook_names", ()))
    if converted and any(name.startswith("gradients/") for name in hooks):
        rank_zero_warn(
            f"wandb.watch was called before the conversion of {converted} weights: it would log no gradients of them. Watch "
            "after the conversion (`logger.experiment.unwatch(model)` and `logger.watch(model)` in on_fit_start), or convert "
            "first: `sparsify(model, connectivity)`, `logger.watch(model)`, and `DeepR()` as the callback."
        )
