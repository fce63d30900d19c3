"""The arguments that the callbacks share, their checks and their documentation.

A callback is a dataclass. Each class declares the arguments that it adds, with a line in the ``Args:`` of its docstring, and
inherits those of its bases. ``help``, ``inspect.signature``, type checkers and LightningCLI see all of them.
"""

# no `from __future__ import annotations`: a dataclass with a base in another module needs types, not their names
import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_deepr.algorithm.candidates import Candidates
from lightning_deepr.algorithm.steering import TurnoverTarget
from lightning_deepr.conversion.allocation import DISTRIBUTIONS, check_connectivity
from lightning_deepr.conversion.connectivities import StartingPlaces
from lightning_deepr.conversion.convert import check_seed
from lightning_deepr.conversion.restrictions import check_candidates
from lightning_deepr.conversion.selection import check_modules
from lightning_deepr.conversion.start import INITS
from lightning_deepr.training.scaled_steps import check_lr_scale
from lightning_deepr.training.schedules import LinearDecay, LrPower, check_l1, check_temperature
from lightning_deepr.training.statistics import LEVELS
from lightning_deepr.training.stepping import Stepper

SCOPES = {"layer": '"layer" (K per tensor)', "global": '"global" (one K for the whole network)'}

Alpha = Literal["auto"] | float | LinearDecay | TurnoverTarget


@dataclass(kw_only=True, eq=False, repr=False)
class SharedArguments(Stepper):
    """The arguments of every method.

    Args:
        connectivity: float in (0, 1] | int | "nonzero" (the weights that are not 0) | Topology(path) | dict {pattern: float |
            int | "nonzero" | mask | places}; None: the network is converted already.
        target_modules: "all" | "all-linear" | list of patterns | regular expression | predicate(name, module).
        exclude_modules: the modules to leave out, in the same forms.
        distribution: "erdos_renyi" | "erk" | "uniform" | "deepr" (0.75, 2.3, 22.8 for three layers) | a function.
        init: the starting connections and values: "module" | "largest" | "deepr".
        candidates: where connections may be: a bool mask | Band | Blocks | NoSelf | Local | a function of (rows, columns) |
            several of them with & | dict {pattern: one of these}; None: everywhere.
        seed: the seed of places, signs and noise. None: that of ``seed_everything`` if it was called before the callback is
            made, or else before the conversion; 0 otherwise. A training that goes on from a checkpoint keeps the seed that it
            had.
        check_invariants: whether to check all invariants after every step; an error names the tensor and the step.
        log_every_n_steps: 50: the statistics are logged when the Trainer logs (its own ``log_every_n_steps``), and once at the
            end of a fit that was shorter. Another number is an interval of its own.
        log_statistics: "network": a few values for the network as a whole | "tensors": also those of each tensor | "all": also
            ages, survival, overlaps, degrees and theta | "none". :meth:`statistics` defines every key.
        check_ranks_every_n_steps: None: the ranks of a distributed run are compared once, at the start. n: also after every n
            steps, by 32 bytes per tensor; an error names rank, step and tensor. 0: never, for ranks that train networks of
            their own.
    """

    connectivity: int | float | str | StartingPlaces | dict[str, int | float | str | list[int]] | None = field(
        default=None, kw_only=False
    )
    target_modules: str | list[str] | Callable = "all"
    exclude_modules: str | Iterable[str] | Callable = ()
    distribution: str | Callable = "erdos_renyi"
    init: str = "module"
    candidates: Candidates | dict[str, Candidates] | Callable | None = None
    seed: int | None = None  # type: ignore[assignment]
    check_invariants: bool = False
    log_every_n_steps: int = 50
    log_statistics: str = "network"
    check_ranks_every_n_steps: int | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        complete_documentation(cls)

    def __post_init__(self) -> None:
        if self.connectivity is not None:
            check_connectivity(self.connectivity)
        check_candidates(self.candidates)
        check_modules(self.target_modules, "target_modules")
        check_modules(self.exclude_modules, "exclude_modules")
        check_start(self.distribution, self.init)
        if self.seed is not None:
            check_seed(self.seed)
        check_flag("check_invariants", self.check_invariants)
        check_count("log_every_n_steps", self.log_every_n_steps)
        check_word("log_statistics", self.log_statistics, LEVELS)
        if self.check_ranks_every_n_steps is not None:
            check_count("check_ranks_every_n_steps", self.check_ranks_every_n_steps, least=0)
        super().__post_init__()

    def __repr__(self) -> str:
        return shown(self)


@dataclass(kw_only=True, eq=False, repr=False)
class RewiringArguments(Stepper):
    """The arguments of the paper's two algorithms, DEEP R and soft-DEEP R.

    Args:
        l1: alpha; float | dict {pattern: float} | LinearDecay(start, end) | function of the progress; None: by the optimizer
            (1e-4 / (1 - momentum) under SGD, .03 under Adam's family and RMSprop); "auto" | TurnoverTarget(start, shape), also
            as a dict's value: alpha starts as under None, and is then steered so that the wanted share of the connections is
            reborn per step. This share falls to 0 over the training.
        temperature: T; float | dict {pattern: float} | LrPower(coefficient, power) | function of the learning rate.
        rewire_every_n_steps: the number of steps between rewirings. In the other steps theta < 0 becomes 0 (active, sign kept).
        rewire_until: a step (int) or a fraction of the training (float). Then the connectivity is frozen; L1 and noise
            continue.
    """

    l1: Alpha | dict[str, Alpha] | Callable | None = None
    temperature: float | LrPower | dict[str, float | LrPower] | Callable = 0.0
    rewire_every_n_steps: int = 1
    rewire_until: int | float | None = None

    def __post_init__(self) -> None:
        check_l1(self.l1)
        check_temperature(self.temperature)
        check_count("rewire_every_n_steps", self.rewire_every_n_steps)
        check_until(self.rewire_until)
        super().__post_init__()


@dataclass(kw_only=True, eq=False, repr=False)
class ScaledArguments(Stepper):
    """The arguments of the methods whose network is sparse throughout the training.

    Args:
        lr_scale: the factor of every step of theta; the effect is that of a learning rate of lr_scale times the parameter
            group's. float | dict {pattern: float or "auto"} | "auto": N / K under an optimizer that normalizes its gradients
            (Adam's family, RMSprop), (N / K) ** .5 under SGD. A probe of the optimizer finds out its kind. "auto" is at most
            500, and 1 at K = N. L1 and noise keep the group's learning rate.
    """

    lr_scale: float | dict[str, float | str] | str = 1.0

    def __post_init__(self) -> None:
        check_lr_scale(self.lr_scale)
        super().__post_init__()


# -- checks -----------------------------------------------------------------------------------------------------------------


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check an argument that is a count."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an int of at least {least}, found {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Check an argument that is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, found {value!r}.")


def check_word(name: str, value: Any, words: Any) -> None:
    """Check an argument that is one of the given words."""
    if value not in words:
        raise ValueError(f"{name}: expected one of {', '.join(words)}, found {value!r}.")


def check_fraction(name: str, value: Any) -> None:
    """Check an argument that is a fraction of the training."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a fraction of the training (float in [0, 1]), found {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a fraction of the training (float in [0, 1]), found {value}.")


def check_until(until: Any) -> None:
    """Check ``rewire_until``: a step or a fraction of the training."""
    if until is None:
        return
    number = isinstance(until, (int, float)) and not isinstance(until, bool)
    if not number or not until >= 0 or (isinstance(until, float) and until > 1):
        raise ValueError(f"rewire_until: expected a step (int) or a fraction of training (float in [0, 1]), found {until!r}.")


def check_start(distribution: Any, init: Any) -> None:
    """Check ``distribution`` and ``init``."""
    if not callable(distribution) and distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)} or a function, found {distribution!r}.")
    check_word("init", init, INITS)


# -- documentation ----------------------------------------------------------------------------------------------------------

_SECTION = re.compile(r"\n\n    Args:\n((?:        .*\n|\n(?=        ))+)")
_ENTRY = re.compile(r"        (\w+(?:, \w+)*):.*\n(?:            .*\n)*")


def complete_documentation(cls: type) -> None:
    """Add the inherited arguments of a class to the ``Args:`` of its docstring."""
    own = cls.__dict__.get("__doc__")
    if own is None:  # python -OO, or a class without a docstring
        return
    own = own if own.endswith("\n    ") else own + "\n    "
    section = _SECTION.search(own)
    entries = _ENTRY.findall(section[1]) if section else []
    documented = {name for names in entries for name in names.split(", ")}
    added = ""
    for base in cls.__mro__[1:]:
        if not dataclasses.is_dataclass(base) or not (found := _SECTION.search(base.__doc__ or "")):
            continue
        for entry in _ENTRY.finditer(found[1]):
            names = set(entry[1].split(", "))
            if not names & documented:
                documented |= names
                added += entry[0]
    if section:
        cls.__doc__ = own[: section.end(1)] + added + own[section.end(1) :]
    elif added:
        head, gap, rest = own.partition("\n\n    ")
        cls.__doc__ = f"{head}\n\n    Args:\n{added}" + (f"\n    {rest}" if gap else "    ")


def shown(callback: Any) -> str:
    """Format a callback as its class and the arguments that differ from their defaults."""
    given = []
    for one in dataclasses.fields(callback):
        value = getattr(callback, one.name)
        taken = one.name == "seed" and not getattr(callback, "_has_own_seed", True)  # seed_everything's, or 0
        if not (taken or value is one.default or value == one.default):
            given.append(f"{one.name}={value!r}")
    return f"{type(callback).__name__}({', '.join(given)})"
