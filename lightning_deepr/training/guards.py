"""Checks that refuse what a callback cannot handle. Every message says what was expected, what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from lightning_deepr import kernels
from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels import gate
from lightning_deepr.packages.messages import rank_zero_warn
from lightning_deepr.packages.names import is_a
from lightning_deepr.weights.find import Converted, converted_tensors, slots_of

if TYPE_CHECKING:
    from lightning_deepr.training.tracked import TrackedTensor

OPTIMIZER_TOO_EARLY = (
    "The optimizer holds none of the converted weights: it was made before the network was converted (optimizer made before "
    "sparsify). Expected an optimizer over the converted parameters: call sparsify(net, ...) first, then make the optimizer."
)


def unmatched(net: nn.Module, optimizers: Sequence[Optimizer], tensors: Sequence[TrackedTensor]) -> str:
    """Say why no optimizer holds any theta of a network.

    Args:
        net: the network.
        optimizers: those that train it.
        tensors: the converted tensors that a callback tracks.
    """
    if all(not tensor.theta.requires_grad for tensor in tensors):
        names = ", ".join(f"`{tensor.name}`" for tensor in tensors[:3]) + (", ..." if len(tensors) > 3 else "")
        return (
            f"All {len(tensors)} converted tensors ({names}) are frozen (requires_grad=False), and no optimizer holds them: "
            "nothing would be rewired. Expected at least one that is trained: unfreeze them (net.requires_grad_(True)) before "
            "the optimizer is made, or train without this callback. Frozen connections stay as they are."
        )
    for optimizer in optimizers:
        if any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(optimizer).__mro__):
            return (
                f"{type(optimizer).__name__} (DeepSpeed) holds flat buffers in place of the parameters, in which the K slots "
                "of theta can't be found. Expected the plain optimizer under DistributedDataParallel, ZeroRedundancyOptimizer "
                "(ZeRO 1), or FSDP with theta left out (docs/distributed.md)."
            )
    held = {id(p): p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    mine = {id(p) for p in net.parameters()}
    shapes = {tuple(tensor.weight.shape) for tensor in tensors}
    replaced = any(tuple(p.shape) in shapes for key, p in held.items() if key not in mine)  # the weights before the conversion
    others = len(mine & held.keys())
    if others and not replaced:
        return (
            f"The optimizer holds {others} parameters of the network, but none of its {len(tensors)} converted weights: "
            f"expected theta, which is named `{theta_name(tensors[0].name)}` and is a vector. A choice by the name `.weight` "
            "or by the number of dimensions leaves it out. Give `net.parameters()`, or the groups of "
            "`lightning_deepr.decay_groups(net, weight_decay)`."
        )
    return OPTIMIZER_TOO_EARLY


def theta_name(name: str) -> str:
    """Return the name of the parameter of a converted tensor."""
    prefix, _, tensor_name = name.rpartition(".")
    return f"{prefix}.parametrizations.{tensor_name}.original".removeprefix(".")


_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def refuse_sharding(strategy: Any) -> None:
    """Refuse strategies that shard parameters: rewiring needs all slots of a theta on one rank."""
    names = [kind.__name__ for kind in type(strategy).__mro__]
    for name in _SHARDING:
        if name in names:
            raise ValueError(
                f'DeepR expects whole parameters on every rank, found {names[0]}, which shards them. Use strategy="ddp": a '
                "converted weight holds only K values."
            )


_KNOWN = ("SingleDeviceStrategy", "DDPStrategy", "DataParallelStrategy", "XLAStrategy")


def is_unknown(strategy: Any) -> bool:
    """Whether a strategy of Lightning on several ranks is none of those whose behaviour is known."""
    if strategy is None or getattr(strategy, "world_size", 1) <= 1:
        return False
    return not any(kind.__name__ in _KNOWN for kind in type(strategy).__mro__)


def watch_unknown(strategy: Any, callback: Any) -> int:
    """Say that a strategy is not known, and return the number of steps between two comparisons of the ranks."""
    every: int = callback.log_every_n_steps
    rank_zero_warn(
        f"{type(strategy).__name__} is not known to {type(callback).__name__}: expected a strategy that keeps parameters whole "
        f"and averages gradients over all ranks, as DDPStrategy does. The ranks are compared every {every} steps "
        "(check_ranks_every_n_steps), and a difference stops the training."
    )
    return every


def refuse_earlier_averaging(trainer: Any, callback: Any) -> None:
    """Refuse an averaging callback that is set up first: it would copy the unconverted network."""
    for other in trainer.callbacks:
        if other is callback:
            return
        if hasattr(other, "_average_model"):
            name = type(other).__name__
            raise ValueError(
                f"{name} is listed before {type(callback).__name__}: it would copy the network before it is converted. "
                f"Expected callbacks=[{type(callback).__name__}(...), {name}(...)]."
            )


def warn_of_pruning(trainer: Any, callback: Any) -> None:
    """Say that Lightning's ``ModelPruning`` masks parameters of layers, of which converted weights are none.

    Raises:
        ValueError: it was set up first, and is going to mask weights that are converted by now.
    """
    method = type(callback).__name__
    for other in trainer.callbacks:
        if not is_a(other, "callbacks", "ModelPruning"):
            continue
        for module, name in other._parameters_to_prune:
            if slots_of(module, name) is not None:
                raise ValueError(
                    f"ModelPruning is listed before {method}, and asks for `{slots_of(module, name).name}`: expected one of "
                    "them for each weight. Leave one of them out, or give ModelPruning(parameters_to_prune=[...]) layers that "
                    "are not converted (exclude_modules)."
                )
        if any(is_parametrized(module) for module, _ in other._parameters_to_prune):
            rank_zero_warn(
                f"ModelPruning and {method} are both at work: ModelPruning does not see converted weights, and prunes what "
                "their layers have beside them (biases). Expected one of them, or ModelPruning(parameters_to_prune=[...]) "
                "with layers that are not converted."
            )


def refuse_spawn(trainer: Any, converted_now: int) -> None:
    """Refuse spawned processes: they return their weights to a process whose network is not converted, which loses them."""
    launcher = getattr(trainer.strategy, "launcher", None)
    if converted_now and type(launcher).__name__.startswith("_MultiProcessing"):
        raise ValueError(
            "A strategy that starts its processes with spawn or fork returns the weights to a process whose network is not "
            'converted. Expected strategy="ddp", which runs the script once per process; or a network that is converted before '
            "the fit, in `__init__`: `sparsify(self.net, connectivity)`, with the callback's connectivity=None. Then "
            '"ddp_fork" and "ddp_notebook" work, too.'
        )


def refuse_lost_conversions(module: nn.Module, expected: Sequence[Converted]) -> None:
    """Refuse layers that were replaced or re-initialized between the conversion and the start of the fit."""
    present = {converted.slots for converted in converted_tensors(module)}
    for converted in expected:
        if converted.slots not in present:
            raise RuntimeError(
                f"`{converted.name}` was converted in the callback's setup, but is not any more: the layer was made anew "
                "afterwards (in the module's `setup`, `configure_model` or `on_fit_start`?). Build the layers in `__init__`, "
                "or in a `configure_model` that returns at once if they exist."
            )
        negative = converted.slots.is_watched and converted.slots.overwritten(converted.theta.detach())
        if negative or converted.slots.was_written(converted.theta):
            raise RuntimeError(
                f"`{converted.name}` was written to after it was converted (re-initialized?). The new values are lost: they do "
                "not belong to the K connections. Initialize layers before the fit starts, in `__init__` or `configure_model`."
            )


def warn_of_free_signs(method: str, tensors: Sequence[TrackedTensor], fate: str) -> None:
    """Warn if a method with constant signs takes over connections with theta < 0, which its first step loses.

    Args:
        method: the method's name.
        tensors: the tensors that the method takes over.
        fate: what the first step does to the connections with theta < 0.
    """
    counts = [(t.name, int((t.slots.own(t.theta.detach()) < 0).sum()), t.slots.count) for t in tensors]
    found = ", ".join(f"`{name}` ({below} of {count})" for name, below, count in counts if below)
    if found:
        rank_zero_warn(
            f"{method}: theta < 0 in {found}, trained with free signs (SET, RigL, or no callback). Here the sign of a place is "
            f'constant: in the first step {fate}. To keep them, call densify(net) and convert it again with init="largest".'
        )


def refuse_unequal_ranks(trainer: Any, tensors: Sequence[TrackedTensor]) -> None:
    """Refuse ranks that start with different connections, under a strategy without a process group of torch (XLA).

    Args:
        trainer: the Trainer, or what has its ``world_size``, ``global_rank`` and ``strategy``.
        tensors: the converted tensors.
    """
    if trainer.world_size <= 1:
        return
    own = [
        (
            t.name,
            checksum(t.slots.active(t.theta)[0]),
            checksum(t.slots.exceptions),
            t.slots.sign_seed,
            _rules(t.slots),
        )
        for t in tensors
    ]
    first = trainer.strategy.broadcast(own, src=0)
    for mine, theirs in zip(own, first, strict=True):
        if tuple(mine) != tuple(theirs):
            raise RuntimeError(
                f"`{mine[0]}` has other connections on rank {trainer.global_rank} than on rank 0: expected the same seed and "
                'the same weights (for init="largest") on every rank. Load the weights before the fit, or call seed_everything.'
            )


def _rules(slots: Any) -> list[int]:
    """Hash where the connections of a tensor may be, and its table of signs."""
    records = [rule.record() for rule in (slots.allowed, slots.sign_table) if rule is not None]
    return [checksum(part) for numbers, items in records for part in (torch.tensor(numbers), items)]


def checksum(places: torch.Tensor) -> int:
    """Hash a list of places into one integer. The order of the places matters."""
    if places.numel() == 0:
        return 0
    position = torch.arange(places.numel(), device=places.device)
    return int(randomness.bits(randomness.key(0), places * 31 + position).sum())


def refuse_negative_rates(optimizer: Optimizer, matched: Sequence[tuple[TrackedTensor, int]]) -> None:
    """Stop before a step whose learning rate is below 0. (A rate in a tensor is not read: on a device, the host would wait.)

    Args:
        optimizer: the optimizer.
        matched: the tensors whose theta it holds, each with the index of its parameter group.
    """
    below = {i for i, group in enumerate(optimizer.param_groups) if type(lr := group.get("lr")) is float and lr < 0}
    for tensor, index in matched if below else ():
        if index in below:
            lr = optimizer.param_groups[index]["lr"]
            raise ValueError(
                f"`{tensor.name}`, step {tensor.step}: expected a learning rate of at least 0 in theta's parameter group, "
                f"found {lr:g}: L1 would let theta grow, and the noise has the root of the learning rate. For ascent give the "
                "optimizer maximize=True."
            )


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether GradScaler found infinities and the (fused) optimizer skipped its step."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def refuse_non_finite(tensors: Sequence[TrackedTensor], gradients: bool) -> None:
    """Stop before a step if a theta or a gradient is not finite. The message names the tensor and the step."""
    values: list[torch.Tensor] = []
    for t in tensors:  # what the kernels of the last step and of the backward pass have seen is not read again
        theta, slots = t.converted.theta, t.converted.slots
        if slots.finite_theta is None or not gate.is_finite_theta(slots, theta):
            values.append(theta)
        gradient = theta.grad if gradients else None
        if gradient is not None and (slots.finite_gradient is None or not gate.is_finite(slots, gradient)):
            values.append(gradient)
    if not values or kernels.all_finite(values):
        return
    looked = [("theta", t, t.slots.own(t.theta.detach())) for t in tensors]
    if gradients:
        looked += [("the gradient of theta", t, t.slots.own(t.theta.grad)) for t in tensors if t.theta.grad is not None]
    values = [value for _, _, value in looked if value.numel()]
    # check one number first: the sum of the largest magnitudes is not finite if any value is not
    norms = torch._foreach_norm(values, float("inf"))
    if bool(torch.isfinite(torch.stack([norm.float() for norm in norms]).sum())):
        return
    for what, tensor, value in looked:
        finite = torch.isfinite(value)
        if not bool(finite.all()):
            raise RuntimeError(
                f"`{tensor.name}`, step {tensor.step}: {what} is not finite at {int((~finite).sum())} of {value.numel()} "
                "connections. The step was not taken. Lower the learning rate, or clip gradients."
            )


def refuse_sharing(optimizer: Optimizer, others: Sequence[Optimizer], tensors: Sequence[Any]) -> None:
    """Refuse a shared theta that two optimizers hold, or that one optimizer holds twice."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    elsewhere = {id(p) for other in others for group in other.param_groups for p in group["params"]}
    for tensor in tensors:
        names = tensor.slots.shares
        if not names:
            continue
        times = sum(parameter is tensor.theta for parameter in held)
        if times > 1 or (times and id(tensor.theta) in elsewhere):
            found = f"it {times} times in one" if times > 1 else "it in two"
            raise ValueError(
                f'With scope="global" {", ".join(f"`{name}`" for name in names)} have one parameter, theta: expected it once '
                f"in one optimizer, found {found}. Make the optimizer from net.parameters(), which lists it once."
            )


def explain(message: str, module: nn.Module) -> str | None:
    """Explain an error of torch that a converted weight causes. None: it is another error, or nothing is converted.

    These are the errors of a parameter in several groups (the layers share one theta), and of pickling a converted network.
    """
    if message.startswith("Serialization of parametrized modules") and any(True for _ in converted_tensors(module)):
        return (
            "A strategy that starts its processes with spawn sends them the network by pickle, and the network has converted "
            'weights. Expected strategy="ddp", or in a notebook "ddp_notebook" or "ddp_fork", found a spawned process.'
        )
    if "more than one parameter group" not in message:
        return None
    for one in converted_tensors(module):
        names = one.slots.shares
        if names:
            return (
                f'With scope="global" {", ".join(f"`{name}`" for name in names)} have one parameter, theta of '
                f"K = {one.slots.wanted} slots: expected it in one parameter group, found it in several (or once per layer). "
                'Put it into one group, or use scope="layer".'
            )
    return None
