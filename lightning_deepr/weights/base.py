"""The base of every parametrization of a converted weight.

``torch.nn.utils.parametrize`` keeps the parameter, theta, under ``<module>.parametrizations.<tensor>.original``. The
parametrization computes the weight from theta: :class:`lightning_deepr.weights.k_slots.KSlots` (theta of K slots) or a class of
:mod:`lightning_deepr.weights.dense_theta` (a theta for every potential connection).
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_deepr.algorithm.allowed import Allowed
from lightning_deepr.algorithm.randomness import signs_of
from lightning_deepr.algorithm.signs import SignTable
from lightning_deepr.compute import read_only
from lightning_deepr.compute.layer import DENSE, LayerCompute
from lightning_deepr.compute.stacked import is_stacked
from lightning_deepr.kernels import gate
from lightning_deepr.weights import copies, precision, pretrained, rules
from lightning_deepr.weights.moves import follow

FORMAT_VERSION = 1
STAYING_VERSION = 2  # of a tensor whose slots never move; an older version would move them
RANKED_VERSION = 3  # of a tensor whose newborns get their places by rank; an older version would give them by the draw
RESTING_VERSION = 4  # of a tensor that is never rewired; an older version would give slots with theta < 0 a new start
# If a sparse checkpoint is loaded into a dense model, torch's error lists the unexpected keys by name. So the key of the format
# version tells the user which function to call.
FORMAT_KEY = "lightning_deepr.load_state_dict"
SHARING_KEY = "pool"  # the checkpoint's record of a tensor that shares its theta with others, beside its connections
UPON_KEY = "further_parametrizations"  # the number of parametrizations of others upon a converted tensor, if there are any
DTYPE_KEY = "weight_dtype"  # a number of the weight's dtype, where theta has another one
BASE_KEY = "base"  # the frozen weight to which the connections are added, if there is one
FINGERPRINT_KEY = "fingerprint"  # of the connections; older checkpoints have none
INTEGER_KEYS = ("places", "born", "sign_exceptions", "sign_seed", "index", "shape", SHARING_KEY)
EMPTY_KEYS = ("places", "born", "sign_exceptions")  # entries of the checkpoint that may be empty tensors
LARGEST_READ = 1 << 30  # bytes; reading an attribute does not build a larger dense weight


class Notice:
    """One warning for all tensors that were converted together."""

    def __init__(self) -> None:
        self.given = False
        self.has_overwritten = self.has_shared = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Notice:
        return Notice()  # one for all tensors of the copy

    def shared(self, name: str) -> None:
        if not self.has_shared:
            self.has_shared = True
            warnings.warn(
                f"`{name}` lies in shared memory: the network computes densely from now on, since a rewiring in one process "
                "does not reach the order of the connections that sparse compute keeps in another.",
                stacklevel=4,
            )

    def overwritten(self, name: str, found: str) -> None:
        self.has_overwritten = True
        warnings.warn(
            f"The values of `{name}` were written by something else than a step: {found}. Its connections have moved in this "
            "training, and a slot of theta stands for another place than it did: values of an earlier step, or an average over "
            "steps (an EMA over `parameters()`), belong to other connections. Expected an average that follows: "
            "`ema = lightning_deepr.follow(copy.deepcopy(net), net)`, or AveragedModel; and `copy.deepcopy(net.state_dict())` "
            "for values to come back to. What changes each value by itself (clamp_, a factor, noise) does no harm.",
            stacklevel=4,
        )

    def untrained(self, name: str) -> None:
        if not self.given:
            self.given = True
            warnings.warn(
                f"A backward pass reached `{name}`, a converted weight, but no callback rewires it: its connections stay where "
                "they are, and values may pass through zero and change sign. Use `Trainer(callbacks=[DeepR()])`, or "
                "`DeepR().attach(net, optimizer)` in your own loop.",
                stacklevel=3,
            )

    def unseen(self, name: str, callback: str) -> None:
        if not self.given:
            self.given = True
            warnings.warn(
                f"theta of `{name}` changes from one backward pass to the next, but {callback} has seen no step of an "
                "optimizer: its connections are not rewired, and theta may stay below 0. Expected steps of an "
                f"optimizer that was given to {callback}, by its `step`, and found another one, or another function. Call "
                "attach(net, optimizer) with the optimizer that steps.",
                stacklevel=4,
            )


class Parametrization(nn.Module):
    """The parametrization of one weight: it computes the dense-shaped weight from theta.

    Places and signs are plain attributes, not buffers: averaging (``AveragedModel(use_buffers=True)``) would change the places,
    and DDP would broadcast them in each forward. They follow ``.to`` through :meth:`_apply`, and the module's ``state_dict``
    has them.

    Args:
        shape: the weight's shape, with N potential connections.
        index: the tensor's position in the order of conversion.
        sign_seed: the seed of the hashed signs.
        exceptions: int64 [E], sorted: the places of a pretrained network whose sign is the opposite of the hash.
        dtype: the weight's dtype. theta and the signs have float32 if it has fewer than 32 bits.
        notice: the warning that all tensors of one conversion share.
    """

    keeps_no_writes = True  # whether a write to the weight is lost
    tensors: tuple[str, ...] = ("exceptions", "signs")  # attributes that follow ``.to``
    placing: tuple[str, ...] = ("signs",)  # attributes with which the forward pass computes the weight from theta
    records: tuple[str, ...] = ()  # attributes in the state_dict, beside those of every parametrization
    stays = False  # whether no slot ever moves: a tensor that began with K = N and slots in the order of their places
    rests = False  # whether it is not rewired, either: such a tensor, unless it is older than this rule
    ranked = False  # whether newborns get their places by rank: a dense enough tensor that began in the order of its places
    is_simple_dense = False  # whether dense compute may leave out the parametrization, see compute/dense_linear.py
    adapts = False  # whether the connections are added to a frozen weight (conversion/adapt.py)
    is_tied = False  # whether several layers hold the weight, which each of them builds (conversion/tied.py)
    is_block = False  # whether it is a block of a layer whose blocks lie on several ranks (conversion/row_blocks.py)
    replicated: Any = None  # who averages theta's gradient over the ranks beside FSDP (weights/replicated.py)

    # torch.distributed.checkpoint looks up every name of a state_dict as a path of attributes: the rest of the names below
    lightning_deepr = SimpleNamespace(load_state_dict=FORMAT_VERSION)  # FORMAT_KEY
    fingerprint = further_parametrizations = None  # FINGERPRINT_KEY, UPON_KEY

    signs: Tensor  # [K] or the weight's shape
    allowed: Allowed | None = None  # the places where connections may be; None: everywhere
    sign_table: SignTable | None = None  # the signs of the places; None: their hashes
    passed: Any = None  # what the gate has compared, see kernels/gate.py
    trusted: Any = None  # the places that it knows to be valid
    finite_gradient: Any = None  # the gradient that a kernel found to be finite
    finite_theta: tuple[int, int, int] | None = None  # version, address and size of the theta that a kernel found to be finite

    def __init__(
        self,
        shape: torch.Size,
        index: int,
        sign_seed: int,
        exceptions: Tensor,
        dtype: torch.dtype,
        notice: Notice | None = None,
    ) -> None:
        super().__init__()
        # the weight's dtype where it has fewer bits than theta: :mod:`lightning_deepr.weights.precision`
        self.narrow = precision.narrow(dtype)
        self.shape = torch.Size(shape)
        self.total = self.shape.numel()
        self.rows, self.columns = self.shape[0], math.prod(self.shape[1:])  # as a matrix
        self.index = index
        self.sign_seed = sign_seed
        self.exceptions = exceptions
        self.notice = notice or Notice()
        self.policy = "dense"  # "auto" | "dense" | "sparse": the user's choice; that of "tune" is "auto"
        self.tunes = False  # whether "auto" decides by times on this machine
        self.measured: Any = None  # the last of these times (compute/tuning.py)
        self.compute = "dense"  # the present choice, "dense" or "sparse"
        self.used = ""  # what became of a weight that was read: "sparse" (``F.linear`` took it) or "dense" (it was built)
        self.layer: LayerCompute = DENSE  # how the module computes, and how its own forward is restored
        self.l1_taken: float | str | None = None
        self.l1_rule: str | None = None  # for files: the target that steered alpha, and the last alpha
        self.lr_scale_taken: float | None = None
        self.owner: Callable[[], Any] = nobody  # weak reference to the callback at work
        self.name = gate.UNNAMED  # in the network that was converted, for messages
        # copies: :mod:`lightning_deepr.weights.copies`; averages: :mod:`lightning_deepr.weights.averages`
        self.holder: Callable[[], parametrize.ParametrizationList | None] = nobody
        self.seen_version = -1  # theta's version after the last step that the callback saw, or at the last backward pass
        self.last_step = -2  # the number of the last step that a callback took; -2: none since the conversion or a load
        self.looked: tuple[int, int] | None = None  # that step, and how often weights/overwritten.py has been asked since
        self.unseen_changes = 0  # how often theta has changed since then, from one backward pass to the next
        self.copied_from: Callable[[], Any] = nobody
        self.has_handed_out = False  # whether a state_dict may hold theta and the present places
        self.copies: weakref.WeakSet[Parametrization] | None = None
        self.doubt: copies.Doubt | None = None
        self.followed: Callable[[], Any] = nobody  # the tensor that this one is an average of
        self.averages: weakref.WeakSet[parametrize.ParametrizationList] = weakref.WeakSet()
        self.watched: Tensor | None = None
        self.is_watched = False
        self.lost = False  # whether the tensors lost their values on the meta device, until a state_dict is loaded

    @property
    def sign_exceptions(self) -> Tensor:
        """The name of :attr:`exceptions` in the state_dict."""
        return self.exceptions

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of active connections (K)."""

    @property
    def wanted(self) -> int:
        """The requested number of connections."""
        return self.count

    @property
    def places_per_connection(self) -> float:
        """N / K, with the requested K, over all tensors that share this tensor's theta."""
        return self.total / self.wanted

    @abstractmethod
    def active(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the active connections: places (int64, flat indices) and values. It builds no dense tensor."""

    @abstractmethod
    def dense(self, theta: Tensor) -> Tensor:
        """Compute the dense-shaped weight, differentiable in theta."""

    @property
    def version(self) -> int:
        """The version of this tensor's entry in a ``state_dict``."""
        if self.ranked:
            return RANKED_VERSION
        return RESTING_VERSION if self.rests else STAYING_VERSION if self.stays else FORMAT_VERSION

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weight that the layer computes with."""
        return self.narrow or self.signs.dtype

    def narrowed(self, values: Tensor) -> Tensor:
        """Cast values of the weight to its dtype; where theta has the same one, this changes nothing."""
        return values if self.narrow is None else values.to(self.narrow)

    def whole(self, theta: Tensor) -> Tensor:
        """Compute the dense-shaped weight without a limit on its size."""
        return self.dense(theta)

    def own(self, theta: Tensor) -> Tensor:
        """Return this tensor's part of the parameter: all of it, unless tensors share one theta."""
        return theta

    @abstractmethod
    def check(self, theta: Tensor, name: str | None = None) -> bool:
        """Refuse a theta that does not fit this tensor (see :func:`lightning_deepr.kernels.gate.check`).

        Args:
            theta: this tensor's own part of theta, detached.
            name: the tensor's name, for the message.

        Returns:
            whether anything has changed since the last check.
        """

    @abstractmethod
    def written(self, theta: Tensor, name: str) -> list[tuple[str, Tensor]]:
        """Name the tensors that a step writes. Each needs memory of its own."""

    def shared_with(self) -> list[tuple[Parametrization, str]]:
        """List the tensors that share this theta, including this one, each with its name; empty if theta is not shared."""
        return []

    @property
    def shares(self) -> list[str]:
        """The names of the tensors that share this theta, including this one; empty if theta is not shared."""
        return [name for _, name in self.shared_with()]

    def may_have(self, count: int) -> bool:
        """Whether a checkpoint with this number of connections of the tensor can fit."""
        return count == self.wanted

    def uses_sparse(self, x: Tensor, module: nn.Module) -> bool:
        """Whether this forward pass computes sparsely."""
        return False

    def hold(self, holder: parametrize.ParametrizationList) -> None:
        """Keep a reference to the holder of theta and of this parametrization. It is called once both are installed.

        A reference to theta itself would become invalid after ``.to`` or a deep copy.
        """
        self.holder = weakref.ref(holder)

    def holder_of_theta(self) -> parametrize.ParametrizationList | None:
        """Return a holder of theta, or None if it is unknown or gone."""
        return self.holder()

    def choose_compute(self, policy: str, capable: bool) -> None:
        """Apply the ``compute`` argument. A parametrization without K slots always computes densely."""

    def overwritten(self, theta: Tensor) -> bool:
        """Whether theta holds values that no conversion writes (``reset_parameters`` of an LSTM writes them)."""
        return bool((self.own(theta) < 0).any())

    def last_birth(self) -> int:
        """Return the last step that gave birth to a connection; -1 if there was none."""
        return -1

    def signs_at(self, places: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Compute the constant sign of each place: the table's or the hash, the opposite one at the recorded exceptions."""
        dtype = dtype or self.signs.dtype
        table = self.sign_table
        signs = signs_of(self.sign_seed, places, dtype) if table is None else table.signs_of(places, dtype)
        if self.exceptions.numel():
            found = torch.searchsorted(self.exceptions, places).clamp_(max=self.exceptions.numel() - 1)
            signs = torch.where(self.exceptions[found] == places, -signs, signs)
        return signs

    def forward(self, theta: Tensor) -> Tensor:
        is_stacked(theta, self)  # it refuses theta of several networks with the places of one
        weight = self.dense(theta)
        if self.is_watched and not torch.compiler.is_dynamo_compiling():
            self._watch(theta, weight)
        return weight if torch.compiler.is_dynamo_compiling() else read_only.guard(weight, self)  # refuses writes

    # -- writes -----------------------------------------------------------------------------------------------------------

    def lost_write(self, operation: str) -> str:
        """Write the message for a write to the dense-shaped weight, which is built from theta at each read."""
        prefix, _, tensor_name = self.name.rpartition(".")
        theta = f"{prefix}.parametrizations.{tensor_name}.original".removeprefix(".")
        return (
            f"`{self.name}` was written to after it was converted (`{operation}`): expected a layer that keeps its "
            f"{self.wanted} connections, found a write to the dense-shaped weight of {tuple(self.shape)}, which is built from "
            "them at each read. The new values would be lost. Initialize or load a layer before it is converted: before the "
            "fit starts, in `__init__` or `configure_model`. Or call `lightning_deepr.densify(module)`, write, and convert "
            f'again (init="largest" keeps the largest weights). The values of the connections are the parameter `{theta}`. '
            "`weight.clone()` is a tensor of your own."
        )

    def right_inverse(self, value: Tensor) -> Tensor:
        # ParametrizationList ignores a NotImplementedError while it is constructed, and raises it at an assignment.
        raise NotImplementedError(
            f"A converted weight (shape {tuple(self.shape)}, {self.wanted} connections) can't be assigned: expected a layer "
            "that keeps its connections, found a dense value. Initialize the layer before it is converted, or call "
            "`lightning_deepr.densify(module)`, assign, and convert again."
        )

    # -- re-initialization after conversion -------------------------------------------------------------------------------
    # `nn.init.xavier_uniform_(layer.weight)` writes to a transient weight, and the values are lost. To detect this, the last
    # weight that was read is kept between the conversion by a callback and the start of the fit. A LightningModule's own
    # `setup` runs then.

    def watch(self, watching: bool) -> None:
        self.is_watched, self.watched = watching, None

    def _watch(self, theta: Tensor, weight: Tensor) -> None:
        if not self.was_written(theta):
            self.watched = weight

    def was_written(self, theta: Tensor) -> bool:
        """Whether the last weight that was read has been written to."""
        if self.watched is None:
            return False
        with torch.no_grad():
            return not torch.equal(self.watched, self.dense(theta))

    # -- moving, copying, saving ------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Parametrization:
        # a tensor of the weight's dtype shows what the function does to it; the signs go with theta
        cast = fn(torch.empty(0, dtype=self.weight_dtype, device=self.exceptions.device)).dtype
        keep = precision.keeping(fn, precision.kept(cast)) if cast.is_floating_point else fn
        super()._apply(keep, recurse)
        self.narrow = precision.narrow(cast)
        for name in self.tensors:
            value, is_lost = follow(getattr(self, name), keep)
            setattr(self, name, value)
            self.lost = self.lost or is_lost
        if self.watched is not None:  # the Trainer moves the module between the conversion and the start of the fit
            self.watched = fn(self.watched.detach())
        if self.doubt is not None:
            self.doubt.theta = keep(self.doubt.theta)
        self.moved()
        return self

    def moved(self) -> None:
        """Update after ``.to`` moved the tensors."""

    def take_after(self, source: Parametrization, memo: dict[int, Any]) -> None:
        """Copy the common attributes of the source into this deep copy."""
        self.compute, self.training = source.compute, source.training
        self.l1_taken, self.l1_rule, self.lr_scale_taken = source.l1_taken, source.l1_rule, source.lr_scale_taken
        self.policy, self.layer, self.used = source.policy, source.layer, source.used
        self.tunes, self.measured = source.tunes, source.measured
        self.copied_from = weakref.ref(source)
        self.name, self.notice = source.name, copy.deepcopy(source.notice, memo)
        self.take_rules(source)
        memo[id(source)] = self
        copies.note_copy(self, source, memo)

    def take_rules(self, source: Parametrization) -> None:
        """Take over where connections may be, and the table of signs. Neither ever changes, so both are shared."""
        self.allowed, self.sign_table = source.allowed, source.sign_table
        self.stays, self.rests, self.ranked = source.stays, source.rests, source.ranked

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # clones: whoever averages a state_dict in place can't reach the connections of the module
        destination[prefix + FORMAT_KEY] = torch.tensor(self.version)
        for name in self.records:
            value = getattr(self, name)
            destination[prefix + name] = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
        destination[prefix + "sign_exceptions"] = self.exceptions.detach().clone()
        destination[prefix + "sign_seed"] = torch.tensor(self.sign_seed)
        destination[prefix + "index"] = torch.tensor(self.index)
        destination[prefix + "shape"] = torch.tensor(self.shape)
        if self.narrow is not None:
            destination[prefix + DTYPE_KEY] = torch.ones((), dtype=self.narrow, device=self.exceptions.device)
        rules.save(self.allowed, self.sign_table, destination, prefix)
        pretrained.add_dense_weight(self, destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = (FORMAT_KEY, *self.records, "sign_exceptions", "sign_seed", "index", "shape")
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        if absent and self._may_be_empty(state_dict, prefix, absent):
            state_dict = {**state_dict, **dict.fromkeys(absent, self.exceptions[:0])}
        missing = [name for name in absent if name not in state_dict]
        found = [name for name in ("places", "wanted") if name not in self.records and prefix + name in state_dict]
        if missing and found:
            error_msgs.append(
                f"`{prefix.removesuffix('.0.').replace('parametrizations.', '')}`: expected what {type(self).__name__} "
                f"records, found a checkpoint of another kind (with `{found[0]}`). Load it into a dense model with "
                "`lightning_deepr.load_state_dict(module, checkpoint)`, or give the callback that trained it."
            )
        if missing:
            missing_keys.extend(missing)
            return
        record = {name: state_dict[prefix + name] for name in names}
        optional = (SHARING_KEY, FINGERPRINT_KEY, *rules.KEYS)
        record.update((key, state_dict[prefix + key]) for key in optional if prefix + key in state_dict)
        averaged = self.restore_integers(record)
        if averaged:
            rules.save(self.allowed, self.sign_table, record, "")  # floats have lost their digits
        problem = self._refusal(record)
        if problem is None and averaged and FINGERPRINT_KEY not in record:
            problem = copies.MIXED
        if problem is not None:
            error_msgs.append(f"`{prefix.removesuffix('.0.').replace('parametrizations.', '')}`: {problem}")
            return
        self.sign_seed, self.index = int(record["sign_seed"]), int(record["index"])
        version = int(record[FORMAT_KEY])
        self.stays, self.rests = version in (STAYING_VERSION, RESTING_VERSION), version == RESTING_VERSION
        self.ranked = version == RANKED_VERSION
        self.exceptions = record["sign_exceptions"].detach().to(self.exceptions.device).clone()
        allowed, self.sign_table = rules.of_record(record, self.total)
        if self.allowed is None:
            self.allowed = allowed  # else they are equal, and the present one can ask its functions
        with torch.no_grad():
            self.take_over(record)
        self.lost, self.last_step = False, -2
        self.watch(False)  # a loaded theta may have been trained with free signs: theta < 0 does not show a re-initialization

    def _may_be_empty(self, state_dict: dict[str, Any], prefix: str, absent: list[str]) -> bool:
        """Whether the entries that a checkpoint lacks were empty tensors.

        accelerate takes tensors at one address for one tensor and saves only one of them, and all empty tensors have the
        address 0. The fingerprint shows if an entry that was not empty is missing.
        """
        return prefix + FORMAT_KEY in state_dict and {prefix + name for name in EMPTY_KEYS}.issuperset(absent)

    def restore_integers(self, record: dict[str, Tensor]) -> bool:
        """Make integers of what an average of state_dicts has made floats, in place. Returns whether there is any."""
        return copies.restore_integers(record, (*INTEGER_KEYS, FORMAT_KEY))

    @abstractmethod
    def take_over(self, record: dict[str, Tensor]) -> None:
        """Load the attributes that :attr:`records` names. Sign seed and exceptions are loaded already."""

    def _refusal(self, record: dict[str, Tensor]) -> str | None:
        """Say why a recorded connectivity does not fit this tensor, or return None."""
        version, shape = int(record[FORMAT_KEY]), tuple(record["shape"].tolist())
        if version > RESTING_VERSION:
            return f"expected format {RESTING_VERSION} or older, found {version}: update lightning-deepr."
        if shape != tuple(self.shape):
            return f"expected connections of a weight of shape {tuple(self.shape)}, found {shape}: another model's checkpoint."
        scopes = "K slots of its own", "one K for all layers"
        shared, recorded = bool(self.shares), SHARING_KEY in record
        if shared != recorded:
            return (
                f"expected {scopes[shared]}, found {scopes[recorded]}: give DeepR or sparsify the scope of the checkpoint "
                '("layer" or "global"), or convert as recorded with `lightning_deepr.load_state_dict(module, checkpoint)`.'
            )
        return rules.problem(record, self.total, self.allowed, self.sign_table, record.get("places"))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, K={self.count} of N={self.total} ({self.count / self.total:.3%})"


def nobody() -> None:
    """Return None, as the owner of a tensor on which no callback is at work."""
