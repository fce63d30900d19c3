"""Networks that ``torch.nn.utils.prune`` has pruned: their weights become plain parameters, and their masks say the places."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import prune

_masks: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


class Pruned(NamedTuple):
    """A weight as ``prune`` keeps it."""

    module: nn.Module
    tensor_name: str
    mask: Tensor
    original: Tensor  # the weight with the values that the mask hides


def pruned_weights(root: nn.Module) -> list[Pruned]:
    """List the weights that ``torch.nn.utils.prune`` computes from ``<name>_orig`` and ``<name>_mask``."""
    found = []
    for module in root.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                original = module._parameters[f"{name}_orig"]
                assert original is not None
                found.append(Pruned(module, name, module._buffers[f"{name}_mask"], original.detach().clone()))  # type: ignore[arg-type]
    return found


@contextmanager
def made_plain(root: nn.Module, asked: bool) -> Iterator[None]:
    """Make pruned weights plain parameters (``prune.remove``) for a conversion that takes their places from their masks.

    After an exception they are pruned as before.

    Args:
        root: the network.
        asked: whether the conversion looks at the zeros of weights; otherwise nothing happens.
    """
    found = pruned_weights(root) if asked else []
    for one in found:
        prune.remove(one.module, one.tensor_name)
        _masks.setdefault(one.module, {})[one.tensor_name] = one.mask
    try:
        yield
    except Exception:
        for one in found:
            prune.custom_from_mask(one.module, one.tensor_name, one.mask)
            one.module._parameters[f"{one.tensor_name}_orig"].data.copy_(one.original)  # type: ignore[union-attr]
        raise
    finally:
        for one in found:
            _masks.pop(one.module, None)


def mask_of(module: nn.Module, tensor_name: str) -> Tensor | None:
    """Return the mask of a weight that was pruned when the conversion began."""
    return _masks.get(module, {}).get(tensor_name)
