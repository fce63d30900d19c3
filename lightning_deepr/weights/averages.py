"""Averaged copies of a converted module follow its rewiring."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from lightning_deepr.algorithm.rewiring import start_anew

# Classes that hold an averaged copy of a network by their name: timm's ModelEmaV2 and V3, ema_pytorch's EMA, ...
_AVERAGING = re.compile(r"(EMA|Ema)(?![a-z])|Averag")


def follow(average: nn.Module) -> None:
    """Make the averaged copy of a converted module follow the module's rewiring.

    The average of a reborn slot starts again at 0, the newborn's theta, with the new place and sign. An ``AveragedModel`` (and
    so Lightning's ``WeightAveraging``) is found automatically.
    """
    for submodule in average.modules():
        if isinstance(submodule, parametrize.ParametrizationList):
            slots: Any = submodule[0]
            source: Any = slots.copied_from() if hasattr(slots, "copied_from") else None  # another parametrization has none
            if source is not None:
                link(submodule, slots, source)


def link(holder: parametrize.ParametrizationList, average: Any, source: Any) -> None:
    """Let one averaged tensor follow another tensor.

    Args:
        holder: the holder of the average's theta.
        average: the parametrization in it.
        source: the parametrization of the network that is trained.
    """
    source.averages.add(holder)
    average.followed, average.doubt = weakref.ref(source), None


def _follow_averaged_models(parent: nn.Module, name: str, submodule: nn.Module | None) -> None:
    # AveragedModel makes its copy with `self.module = deepcopy(model)`, timm's ModelEmaV3 too: torch calls this hook at that
    # assignment. (A copy whose source was rewired before does not follow by itself: its places differ already.)
    if submodule is None or isinstance(submodule, parametrize.ParametrizationList):
        return
    if (name == "module" and isinstance(parent, AveragedModel)) or _AVERAGING.search(type(parent).__name__):
        follow(submodule)
        if isinstance(parent, AveragedModel) and any(_upon_bases(submodule)):
            parent.update_parameters = ExactUpdate(parent)  # type: ignore[method-assign]


class ExactUpdate:
    """The ``update_parameters`` of an ``AveragedModel`` of an adapted network: frozen weights stay those of the network.

    decay * a + (1 - decay) * b (torch's ``get_ema_avg_fn``, and so Lightning's ``EMAWeightAveraging``) is not always a where
    b is a. The last bits of a frozen weight would drift, and the adapter would belong to other weights than the pretrained.
    """

    def __init__(self, average: AveragedModel) -> None:
        self.average = average

    def __call__(self, model: nn.Module) -> None:
        type(self.average).update_parameters(self.average, model)
        with torch.no_grad():
            for mine, theirs in zip(_upon_bases(self.average.module), _upon_bases(model), strict=True):
                mine.base.copy_(theirs.base)


def _upon_bases(net: nn.Module) -> Iterator[Any]:
    """Iterate over the parametrizations that have a frozen weight."""
    for module in net.modules():
        if isinstance(module, parametrize.ParametrizationList) and getattr(module[0], "adapts", False):
            yield module[0]


_registered: list[Any] = []


def watch_for_averaged_models() -> None:
    """Register a torch hook that reports every new ``AveragedModel``. The first conversion of a weight calls this."""
    if not _registered:
        _registered.append(nn.modules.module.register_module_module_registration_hook(_follow_averaged_models))


def restart_averages(slots: Any, reborn: Tensor) -> None:
    """Restart the averages of reborn slots (see :func:`follow`)."""
    for holder in slots.averages:
        _restart(holder, slots, reborn)


def realign_averages(slots: Any) -> None:
    """Align averages with loaded connections: an average whose slot has another place restarts at the loaded place."""
    for holder in slots.averages:
        average: Any = holder[0]
        average.sign_seed, average.exceptions = slots.sign_seed, slots.exceptions.to(average.places.device)
        average.take_rules(slots)
        elsewhere = (average.places.to(slots.places.device) != slots.places) | (average.signs.to(slots.signs) != slots.signs)
        _restart(holder, slots, elsewhere.nonzero().view(-1))


def _restart(holder: parametrize.ParametrizationList, slots: Any, reborn: Tensor) -> None:
    average: Any = holder[0]
    where = reborn.to(average.places.device)
    start_anew([(holder.original.detach(), 0.0)], where)
    for name in ("places", "signs", "born"):
        source = getattr(slots, name)[reborn].to(where.device, getattr(average, name).dtype)
        getattr(average, name).index_copy_(0, where, source)
    average.places_changed()
    restart_averages(average, reborn)  # an average of this average
