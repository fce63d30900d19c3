"""Export to C99 that trains: DEEP R on a microcontroller, in the memory of the active connections."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_deepr.algorithm.steering import TurnoverTarget
from lightning_deepr.export import c_source
from lightning_deepr.export.c_header import CHeader, to_c_header
from lightning_deepr.export.c_names import check_name
from lightning_deepr.export.c_plan import STACK_BYTES, Options, Plan
from lightning_deepr.export.trainable import read_trainable
from lightning_deepr.training.schedules import LinearDecay

L1 = float | str | TurnoverTarget | LinearDecay


@dataclass(frozen=True)
class CTraining:
    """The result of :func:`to_c` with ``train=True``."""

    header: Path
    source: Path
    connections: int  # K
    potential: int  # N of the sparse layers
    batch: int
    net_bytes: int  # RAM: the struct
    stack_bytes: int  # an upper bound
    constant_bytes: int  # flash: without the code
    state_bytes: int  # a saved state
    parts: dict[str, int]  # the bytes of the struct by what they hold
    layers: tuple[tuple[str, int, int], ...]  # name, stored weights, bytes of theta and places

    def __str__(self) -> str:
        return (
            f"{self.header} and {self.source.name}: training of {self.connections:,} of {self.potential:,} connections in "
            f"batches of {self.batch}; {self.net_bytes:,} bytes of RAM and at most {self.stack_bytes} of stack, "
            f"{self.constant_bytes:,} bytes of constants"
        )


def to_c(module: nn.Module, out: str | PathLike[str], *, train: bool = False, **options: Any) -> CHeader | CTraining:
    """Write a feed-forward network as C99: its inference, or its training by DEEP R.

    Args:
        module: linear layers and ReLU in one chain. With ``train=True`` at least one layer is converted to K slots.
        out: ``train=False``: the header to write. ``train=True``: the folder for ``deepr_net.h`` and ``deepr_net.c``.
        train: False: :func:`lightning_deepr.export.to_c_header` with these options. True: :func:`to_c_training`.
        options: those of the function that is called.

    Raises:
        ValueError, TypeError: as in these functions.

    Example::

        >>> import tempfile
        >>> from lightning_deepr import sparsify
        >>> net = sparsify(nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)), 0.05)
        >>> made = to_c(net, tempfile.mkdtemp(), train=True)
        >>> made.connections, made.net_bytes
        (275, 2384)
    """
    return to_c_training(module, out, **options) if train else to_c_header(module, out, **options)


def to_c_training(
    module: nn.Module,
    out: str | PathLike[str],
    *,
    prefix: str = "deepr",
    batch: int = 1,
    inputs: Literal["uint8", "float"] = "uint8",
    theta: Literal["float32", "int16"] = "float32",
    l1: L1 = "auto",
    temperature: float = 0.0,
    untrained: bool = False,
    ram: int | None = None,
) -> CTraining:
    """Write ``<prefix>_net.h`` and ``<prefix>_net.c``: a C99 program that trains the network by Algorithm 1 of the paper.

    The program allocates nothing and needs memcpy and memset alone. It keeps theta and the place of each connection, and the
    outputs of one batch. Its draws are the package's: with the same seed it takes the same places in every step as
    ``DeepR(l1=..., temperature=..., lr_scale=1)`` under SGD without momentum, as long as sums are rounded alike.
    ``docs/on-device.md`` describes it.

    Args:
        module: linear layers and ReLU in one chain, with K slots in at least one layer; other layers are trained dense. It is
            read and not changed.
        out: the folder, which is made if it is missing.
        prefix: begins all names in the files.
        batch: the samples of one step.
        inputs: "uint8" (read as x / 255) | "float".
        theta: "float32" | "int16": theta of sparse layers in steps of 2**-12 up to 8, with stochastic rounding.
        l1: alpha: "auto" (by turnover) | :class:`TurnoverTarget` | a number | :class:`LinearDecay`.
        temperature: T.
        untrained: False: the program continues where the network is. True: it starts from its seed, with the same layers and
            numbers of connections, as ``sparsify`` starts layers on the meta device; biases start at 0.
        ram: the bytes that the struct and its stack may take; None: any number.

    Returns:
        the paths, and bytes of RAM and flash.

    Raises:
        ValueError: a layer can't be trained in C, an option is invalid, or the network does not fit into ``ram``.
        TypeError: an option has another type.

    Source: Bellec, Kappel, Maass and Legenstein, "Deep Rewiring", ICLR 2018; on a microcontroller: Liu et al.,
    "Memory-efficient deep learning on a SpiNNaker 2 prototype", Frontiers in Neuroscience 2018.
    """
    check_name(prefix)
    for what, value, known in (("inputs", inputs, ("uint8", "float")), ("theta", theta, ("float32", "int16"))):
        if value not in known:
            raise ValueError(f'to_c: {what}: expected "{known[0]}" or "{known[1]}", found {value!r}.')
    _check_whole("batch", batch, 1, 65_535)
    target, values = _alpha(l1)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"to_c: temperature: expected a number, found {temperature!r}.")
    if not (temperature >= 0 and c_source.is_finite(temperature)):
        raise ValueError(f"to_c: temperature: expected a finite number of at least 0, found {temperature}.")
    layers = read_trainable(module)
    plan = Plan(
        layers,
        Options(
            prefix=prefix,
            batch=batch,
            floats=inputs == "float",
            narrow=theta == "int16",
            target=target,
            l1=values,
            temperature=float(temperature),
            untrained=untrained,
        ),
    )
    if ram is not None:
        _check_whole("ram", ram, 1, 1 << 40)
        _refuse_large(plan, ram)
    folder = Path(out)
    header, source = folder / f"{prefix}_net.h", folder / f"{prefix}_net.c"
    texts = c_source.header(plan), c_source.source(plan)
    folder.mkdir(parents=True, exist_ok=True)
    header.write_text(texts[0], encoding="utf-8")
    source.write_text(texts[1], encoding="utf-8")
    return CTraining(
        header=header,
        source=source,
        connections=sum(layers[i].count for i in plan.sparse),
        potential=sum(layers[i].total for i in plan.sparse),
        batch=batch,
        net_bytes=plan.net_bytes,
        stack_bytes=STACK_BYTES,
        constant_bytes=plan.constant_bytes,
        state_bytes=plan.state_bytes,
        parts=plan.parts,
        layers=tuple(c_source.sizes_of(plan)),
    )


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"to_c: {name}: expected a whole number, found {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"to_c: {name}: expected a number from {low} to {high:,}, found {value:,}.")


def _alpha(l1: object) -> tuple[TurnoverTarget | None, tuple[float, float]]:
    """Return the target of alpha, or alpha at progress 0 and 1."""
    if isinstance(l1, TurnoverTarget):
        return l1, (0.0, 0.0)
    if l1 == "auto":
        return TurnoverTarget(), (0.0, 0.0)
    if isinstance(l1, LinearDecay):
        values = float(l1.start), float(l1.end)
    elif isinstance(l1, (int, float)) and not isinstance(l1, bool):
        values = float(l1), float(l1)
    else:
        raise TypeError(f'to_c: l1: expected "auto", a TurnoverTarget, a number or a LinearDecay, found {l1!r}.')
    if not (min(values) >= 0 and c_source.is_finite(*values)):
        raise ValueError(f"to_c: l1: expected finite values of at least 0, found {l1}.")
    return None, values


def _refuse_large(plan: Plan, ram: int) -> None:
    needed = plan.net_bytes + STACK_BYTES
    if needed <= ram:
        return
    share = plan.fits(ram)
    sparse = [plan.layers[i] for i in plan.sparse]
    count, total = sum(layer.count for layer in sparse), sum(layer.total for layer in sparse)
    if share is None:
        advice = "No connectivity fits: the rest of the network is too large. Use smaller layers or a smaller batch."
    else:
        advice = f"At most {int(share * count):,} connections fit, a connectivity of {share * count / total:.3g}."
    raise ValueError(
        f"to_c: ram: the network needs {needed:,} bytes ({plan.net_bytes:,} and {STACK_BYTES} of stack) for {count:,} "
        f"connections ({count / total:.3%}), expected at most {ram:,}. {advice}"
    )
