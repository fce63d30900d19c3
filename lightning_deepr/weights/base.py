"""The base of every parametrization of a converted weight.

``torch.nn.utils.parametrize`` keeps the parameter, theta, under ``<module>.parametrizations.<tensor>.original``. The
parametrization computes the weight from theta: :class:`lightning_deepr.weights.k_slots.KSlots` (theta of K slots) or a class of
:mod:`lightning_deepr.weights.dense_theta` (a theta for every potential connection).
"""

from __future__ import annotations

import math
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_deepr.algorithm.randomness import signs_of
from lightning_deepr.compute.layer import DENSE, LayerCompute

FORMAT_VERSION = 1
# If a sparse checkpoint is loaded into a dense model, torch's error lists the unexpected keys by name. So the key of the format
# version tells the user which function to call.
FORMAT_KEY = "lightning_deepr.load_state_dict"
SHARING_KEY = "pool"  # the checkpoint's record of a tensor that shares its theta with others, beside its connections
LARGEST_READ = 1 << 30  # bytes; reading an attribute does not build a larger dense weight


class Notice:
    """One warning for all tensors that were converted together."""

    def __init__(self) -> None:
        self.given = False

    def untrained(self, name: str) -> None:
        if not self.given:
            self.given = True
            warnings.warn(
                f"A backward pass reached `{name}`, a converted weight, but no callback rewires it: its connections stay where "
                "they are, and values may pass through zero and change sign. Use `Trainer(callbacks=[DeepR()])`, or "
                "`DeepR().attach(net, optimizer)` in your own loop.",
                stacklevel=3,
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
        notice: the warning that all tensors of one conversion share.
    """

    tensors: tuple[str, ...] = ("exceptions", "signs")  # attributes that follow ``.to``
    records: tuple[str, ...] = ()  # attributes in the state_dict, beside those of every parametrization

    signs: Tensor  # [K] or the weight's shape

    def __init__(
        self,
        shape: torch.Size,
        index: int,
        sign_seed: int,
        exceptions: Tensor,
        notice: Notice | None = None,
    ) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.total = self.shape.numel()
        self.rows, self.columns = self.shape[0], math.prod(self.shape[1:])  # as a matrix
        self.index = index
        self.sign_seed = sign_seed
        self.exceptions = exceptions
        self.notice = notice or Notice()
        self.policy = "dense"  # "auto" | "dense" | "sparse": the user's choice
        self.compute = "dense"  # the present choice, "dense" or "sparse"
        self.layer: LayerCompute = DENSE  # how the module computes, and how its own forward is restored
        self.l1_taken: float | str | None = None
        self.l1_rule: str | None = None  # for files: the target that steered alpha, and the last alpha
        self.lr_scale_taken: float | None = None
        self.owner: Callable[[], Any] = nobody  # weak reference to the callback at work
        self.copied_from: Callable[[], Any] = nobody
        self.averages: weakref.WeakSet[parametrize.ParametrizationList] = weakref.WeakSet()
        self.watched: Tensor | None = None
        self.is_watched = False

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

    def whole(self, theta: Tensor) -> Tensor:
        """Compute the dense-shaped weight without a limit on its size."""
        return self.dense(theta)

    def own(self, theta: Tensor) -> Tensor:
        """Return this tensor's part of the parameter: all of it, unless tensors share one theta."""
        return theta

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
        """Note the holder of theta and of this parametrization. It is called once both are installed."""

    def choose_compute(self, policy: str, capable: bool) -> None:
        """Apply the ``compute`` argument. A parametrization without K slots always computes densely."""

    def overwritten(self, theta: Tensor) -> bool:
        """Whether theta holds values that no conversion writes (``reset_parameters`` of an LSTM writes them)."""
        return bool((self.own(theta) < 0).any())

    def last_birth(self) -> int:
        """Return the last step that gave birth to a connection; -1 if there was none."""
        return -1

    def signs_at(self, places: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Compute the constant sign of each place: the hash, with the opposite sign at the recorded exceptions."""
        signs = signs_of(self.sign_seed, places, dtype or self.signs.dtype)
        if self.exceptions.numel():
            found = torch.searchsorted(self.exceptions, places).clamp_(max=self.exceptions.numel() - 1)
            signs = torch.where(self.exceptions[found] == places, -signs, signs)
        return signs

    def forward(self, theta: Tensor) -> Tensor:
        weight = self.dense(theta)
        if self.is_watched and not torch.compiler.is_dynamo_compiling():
            self._watch(theta, weight)
        return weight

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
        super()._apply(fn, recurse)
        for name in self.tensors:
            setattr(self, name, fn(getattr(self, name)))
        if self.watched is not None:  # the Trainer moves the module between the conversion and the start of the fit
            self.watched = fn(self.watched.detach())
        self.moved()
        return self

    def moved(self) -> None:
        """Update after ``.to`` moved the tensors."""

    def take_after(self, source: Parametrization, memo: dict[int, Any]) -> None:
        """Copy the common attributes of the source into this deep copy."""
        self.compute, self.training = source.compute, source.training
        self.l1_taken, self.l1_rule, self.lr_scale_taken = source.l1_taken, source.l1_rule, source.lr_scale_taken
        self.policy, self.layer = source.policy, source.layer
        self.copied_from = weakref.ref(source)
        memo[id(source)] = self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + FORMAT_KEY] = torch.tensor(FORMAT_VERSION)
        for name in self.records:
            value = getattr(self, name)
            destination[prefix + name] = value if isinstance(value, Tensor) else torch.tensor(value)
        destination[prefix + "sign_exceptions"] = self.exceptions
        destination[prefix + "sign_seed"] = torch.tensor(self.sign_seed)
        destination[prefix + "index"] = torch.tensor(self.index)
        destination[prefix + "shape"] = torch.tensor(self.shape)

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
        missing = [prefix + name for name in names if prefix + name not in state_dict]
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
        if prefix + SHARING_KEY in state_dict:
            record[SHARING_KEY] = state_dict[prefix + SHARING_KEY]
        problem = self._refusal(record)
        if problem is not None:
            error_msgs.append(f"`{prefix.removesuffix('.0.').replace('parametrizations.', '')}`: {problem}")
            return
        self.sign_seed, self.index = int(record["sign_seed"]), int(record["index"])
        self.exceptions = record["sign_exceptions"].detach().to(self.exceptions.device).clone()
        with torch.no_grad():
            self.take_over(record)
        self.watch(False)  # a loaded theta may have been trained with free signs: theta < 0 does not show a re-initialization

    @abstractmethod
    def take_over(self, record: dict[str, Tensor]) -> None:
        """Load the attributes that :attr:`records` names. Sign seed and exceptions are loaded already."""

    def _refusal(self, record: dict[str, Tensor]) -> str | None:
        """Say why a recorded connectivity does not fit this tensor, or return None."""
        version, shape = int(record[FORMAT_KEY]), tuple(record["shape"].tolist())
        if version > FORMAT_VERSION:
            return f"expected format {FORMAT_VERSION} or older, found {version}: update lightning-deepr."
        if shape != tuple(self.shape):
            return f"expected connections of a weight of shape {tuple(self.shape)}, found {shape}: another model's checkpoint."
        scopes = "K slots of its own", "one K for all layers"
        shared, recorded = bool(self.shares), SHARING_KEY in record
        if shared != recorded:
            return (
                f"expected {scopes[shared]}, found {scopes[recorded]}: give DeepR or sparsify the scope of the checkpoint "
                '("layer" or "global"), or convert as recorded with `lightning_deepr.load_state_dict(module, checkpoint)`.'
            )
        return None

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, K={self.count} of N={self.total} ({self.count / self.total:.3%})"


def nobody() -> None:
    """Return None, as the owner of a tensor on which no callback is at work."""
