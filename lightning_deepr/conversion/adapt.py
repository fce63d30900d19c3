"""Adapt a pretrained network: a sparse difference to its frozen weights. Lightning is not needed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_deepr.algorithm.signs import check as check_signs
from lightning_deepr.conversion import adapting, connectivities, sharing
from lightning_deepr.conversion.allocation import check_connectivity, shares
from lightning_deepr.conversion.convert import convert, densify, nothing_to_convert
from lightning_deepr.conversion.restrictions import check_candidates
from lightning_deepr.conversion.selection import Connectivity, Distribution, Modules, candidates, select
from lightning_deepr.packages.seeds import seed_or_default
from lightning_deepr.weights.find import converted_tensors


def adapt(
    module: nn.Module,
    connectivity: Connectivity,
    *,
    target_modules: Modules = "all",
    exclude_modules: Modules = (),
    trainable: Sequence[str] = (),
    distribution: Distribution = "erdos_renyi",
    init: str = "module",
    seed: int | None = None,
    compute: str = "auto",
    scope: str = "layer",
    candidates: Any = None,
    signs: Any = "place",
) -> nn.Module:
    """Freeze a pretrained network, and give chosen weights a sparse difference that starts at 0, in place.

    The network computes what it did before. Call this before the optimizer is made, then
    ``DeepR().attach(module, optimizer)``; under a Trainer ``DeepR(connectivity, of="difference")`` does both. The optimizer
    then has K values of each weight. The frozen weights stay as they are in memory (bfloat16, float16, float32 or float64); the
    difference has float32, or float64 upon float64.

    Args:
        module: the pretrained network.
        connectivity: as for :func:`lightning_deepr.sparsify`; "nonzero" and places say where the difference starts.
        target_modules: as for ``sparsify``, except that "all" takes frozen and tied weights, too. A tied weight is adapted
            once, for all layers that hold it.
        exclude_modules: what is not adapted, in the same forms. It is frozen.
        trainable: what is trained beside the difference: "biases", "norms", names of layers or tensors (a new head, say), as a
            list. All other parameters are frozen. (Running statistics of batch norms follow ``module.train()``.)
        distribution: as for ``sparsify``.
        init: "module": random places. "largest": the places of the largest weights.
        seed, compute, scope, candidates, signs: as for ``sparsify``. "sparse" adds the connections' product to the frozen
            weight's. "auto" does so, too, except in linear layers where the sum of both is faster (large batches and many
            connections): it is built in memory that all layers share. Recurrent layers, other convolutions than ``nn.Conv2d``
            and ``nn.MultiheadAttention`` build the sum for each pass.

    Returns:
        the module itself.

    Raises:
        TypeError, ValueError: an argument is none of its forms, nothing matches, K is larger than N, or a weight is sparse
            already, quantized or on the meta device. Nothing is changed then.

    Example::

        >>> import torch
        >>> net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10))
        >>> x = torch.randn(5, 784)
        >>> before = net(x)
        >>> net = adapt(net, 0.01, trainable=["biases"])
        >>> torch.equal(net(x), before), sum(p.numel() for p in net.parameters() if p.requires_grad)
        (True, 2692)
    """
    connectivity = connectivities.as_mapping(connectivity)
    check_connectivity(connectivity)
    check_candidates(candidates)
    check_signs(signs)
    adapting.check_of("difference", init)
    adapting.check_trainable(trainable)
    if scope not in ("layer", "global"):
        raise ValueError(f'scope: expected "layer" (K per tensor) or "global" (one K for all of them), found {scope!r}.')
    chosen = _chosen(module, connectivity, target_modules, exclude_modules, trainable)
    counts = shares(chosen, connectivity, distribution)
    if scope == "global":
        sharing.check(chosen)
    new = convert(
        module, chosen, counts, init=init, seed=seed_or_default(seed), compute=compute, begin=adapting.difference_start,
        upon={one.name for one in chosen}, given=counts.given, restriction=candidates, signs=signs,
    )  # fmt: skip
    if scope == "global":
        sharing.join(new)
    adapting.freeze(module, trainable)
    return module


def merged_copy(module: nn.Module) -> nn.Module:
    """Return a copy whose adapted weights are plain ones, the sums; the module itself if none is adapted."""
    if any(one.slots.adapts for one in converted_tensors(module)):
        return densify(copy.deepcopy(module))
    return module


def _chosen(module: nn.Module, connectivity: Any, targets: Any, excluded: Any, trainable: Sequence[str]) -> list[Any]:
    found = adapting.adaptable(module, candidates(module), targets, trainable)
    chosen = select(found, targets, excluded, connectivity)
    adapting.refuse_sparse(chosen)
    adapting.refuse_trained(chosen)
    for one in chosen:
        if one.slots is not None:
            raise ValueError(
                f"`{one.name}` is adapted already (K = {one.slots.count}). Expected a plain weight: leave it out with "
                "exclude_modules, or call `lightning_deepr.adapters.detach(net)` first."
            )
    if not chosen:
        raise ValueError(nothing_to_convert(module))
    return adapting.once(chosen)
