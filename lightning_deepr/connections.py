"""The K-slot parametrization: what a converted weight consists of.

``torch.nn.utils.parametrize`` keeps the parameter, theta, under ``<module>.parametrizations.<tensor>.original``; here it is a
vector of K slots, and so are its gradient, its optimizer state and its share of a checkpoint. :class:`KSlots` sits beside
it and knows where each slot's connection is (``places``) and what sign it has (``signs``).
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from lightning_deepr import kernels, recurrent
from lightning_deepr.compute import build_weight, choice, forwards
from lightning_deepr.compute.order import Order
from lightning_deepr.compute.weight import SparseWeight as _SparseWeight
from lightning_deepr.randomness import signs_of

FORMAT_VERSION = 1
# torch lists unexpected keys by name, and that is all a class that builds the dense model can show its user when it is given
# a sparse checkpoint. So the key that holds the version of the format says what to call.
FORMAT_KEY = "lightning_deepr.load_state_dict"
LARGEST_READ = 1 << 30  # bytes; a larger dense weight is not built by reading an attribute


_KERNEL_TYPES = (torch.float32, torch.float64)
_told: set[str] = set()


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
                "`DeepR().attach(net, optimizer)` in a loop of your own.",
                stacklevel=3,
            )


class KSlots(nn.Module):
    """The parametrization of one weight: theta of K slots in, the dense-shaped weight out.

    Places, births and signs are plain attributes and no buffers: averaging (``AveragedModel(use_buffers=True)``) would turn
    places into other places, and DDP would broadcast them in each forward. They follow ``.to`` through :meth:`_apply` and
    are in the module's ``state_dict``.

    Args:
        shape: the weight's shape, N potential connections.
        places: int64 [K], unique, 0 <= place < N.
        index: the tensor's place in the order of conversion.
        sign_seed: seed of the hashed signs.
        exceptions: int64 [E], sorted: places whose sign is the opposite of the hash (of a pretrained network).
        dtype: of theta.
        notice: shared by the tensors of one conversion.
    """

    def __init__(
        self,
        shape: torch.Size,
        places: Tensor,
        index: int,
        sign_seed: int,
        exceptions: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        notice: Notice | None = None,
    ) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self.total = self.shape.numel()
        self.index = index
        self.sign_seed = sign_seed
        self.places = places.contiguous()
        self.exceptions = torch.empty_like(self.places[:0]) if exceptions is None else exceptions
        self.born = torch.full_like(self.places, -1)
        self.signs = self.signs_at(self.places, dtype)
        self.notice = notice or Notice()
        self.rows, self.columns = self.shape[0], math.prod(self.shape[1:])  # as a matrix
        self.order: Order | None = None  # made when sparse compute needs it, and kept up to date
        self.policy = "dense"  # "auto" | "dense" | "sparse": what was asked for
        self.compute = "dense"  # what came of it
        # the last question of uses_sparse: nearly always the next one, too
        self._asked_size, self._asked_device, self._asked = -1, torch.device("cpu"), False
        self.l1_taken: float | str | None = None
        self.owner: Callable[[], Any] = _nobody  # weak reference to the callback at work
        self.copied_from: Callable[[], KSlots | None] = _nobody
        self.averages: weakref.WeakSet[parametrize.ParametrizationList] = weakref.WeakSet()
        self.watched: Tensor | None = None
        self.is_watched = False

    @property
    def count(self) -> int:
        """K."""
        return self.places.numel()

    def signs_at(self, places: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The constant sign of each place: the hash, except at the recorded places of a pretrained network."""
        signs = signs_of(self.sign_seed, places, dtype or self.signs.dtype)
        if self.exceptions.numel():
            found = torch.searchsorted(self.exceptions, places).clamp_(max=self.exceptions.numel() - 1)
            signs = torch.where(self.exceptions[found] == places, -signs, signs)
        return signs

    def forward(self, theta: Tensor) -> Tensor:
        if self.compute == "sparse" and not self.is_watched and not torch.compiler.is_dynamo_compiling():
            return _SparseWeight(theta, self)
        weight = self.dense(theta)
        if self.is_watched and not torch.compiler.is_dynamo_compiling():
            self._watch(theta, weight)
        return weight

    def dense(self, theta: Tensor) -> Tensor:
        """The dense-shaped weight.

        Raises:
            RuntimeError: it would take more than 1 GiB.
        """
        if not torch.compiler.is_dynamo_compiling() and self.total * theta.element_size() > LARGEST_READ:
            raise RuntimeError(
                f"Building this weight of shape {tuple(self.shape)} takes {self.total * theta.element_size() / 2**30:.1f} GiB "
                "(more than 1 GiB). `lightning_deepr.connections(module)` gives its places and values instead."
            )
        return build_weight(theta, self.signs, self.places, self.shape)

    # -- sparse compute ---------------------------------------------------------------------------------------------------

    def choose_compute(self, policy: str, capable: bool) -> None:
        """Take the ``compute`` argument for this tensor.

        Args:
            policy: "auto" | "dense" | "sparse".
            capable: whether the module multiplies with this tensor as a linear layer does.
        """
        self.policy = policy if capable else "dense"
        self._asked_size = -1
        sparse = self.policy == "sparse" or (self.policy == "auto" and self.prefers_sparse(choice.NOMINAL_BATCH, "cpu"))
        if self.policy == "auto" and self.total * self.signs.element_size() > LARGEST_READ:
            sparse = True  # there is no other way
            self.policy = "sparse"
        self.compute = "sparse" if sparse else "dense"
        if sparse and self.places.device.type == "cpu" and self.signs.dtype in _KERNEL_TYPES and kernels.available():
            self.refresh_order()

    def prefers_sparse(self, batch: int, device: str) -> bool:
        if not kernels.available():
            return False
        if len(self.shape) == 4:  # before it has seen an image
            return choice.prefers_sparse_conv_at_all(self.count / self.total)
        return choice.prefers_sparse(self.rows, self.columns, self.count, batch, self.signs.dtype, device)

    def uses_sparse(self, x: Tensor, prefers: Callable[[Tensor], bool] | None = None) -> bool:
        """Whether this forward pass shall be sparse.

        Args:
            x: the layer's input; under ``compute="auto"`` its size decides.
            prefers: the rule of a layer that is none of ``F.linear``'s.
        """
        if self.policy != "auto" or torch.compiler.is_dynamo_compiling():
            return self.compute == "sparse"
        size, device = x.numel(), x.device
        if size == self._asked_size and device == self._asked_device:
            return self._asked
        chosen = prefers(x) if prefers else self.prefers_sparse(size // max(self.columns, 1), device.type)
        self._asked_size, self._asked_device, self._asked = size, device, chosen
        if torch.is_grad_enabled():
            self.compute = "sparse" if chosen else "dense"
        return chosen

    def has_kernel(self, theta: Tensor) -> bool:
        """Whether a compiled kernel can compute with this theta; says once on which device or dtype it can't."""
        if torch.compiler.is_dynamo_compiling():
            return self.order is not None  # made when the tensor was converted, loaded or moved
        if theta.device.type == "cpu" and theta.dtype in _KERNEL_TYPES and kernels.available():
            return True
        kind = f"{theta.device.type}, {theta.dtype}"
        if kind not in _told:
            _told.add(kind)
            warnings.warn(
                f"Sparse compute has no kernel for {kind}: it runs in plain PyTorch, which is slower. Kernels are there for float32 and "
                'float64 on the CPU, where numba can be imported. compute="dense" is the alternative.',
                stacklevel=4,
            )
        return False

    def ordered(self) -> Order:
        """The connections by row and by column, up to date."""
        order = self.order
        if torch.compiler.is_dynamo_compiling():
            assert order is not None
            return order
        if order is None or order.is_stale(self.places):
            return self.refresh_order()
        return order

    def refresh_order(self) -> Order:
        """Put the connections in order anew; the buffer stays the same, for compiled graphs that hold it."""
        if self.order is None:
            self.order = Order(self.places, self.signs, self.shape)
        else:
            self.order.build(self.places, self.signs)
        return self.order

    def places_changed(self) -> None:
        """After somebody wrote places: what is kept about them follows (a compiled graph could not look)."""
        if self.order is not None:
            self.refresh_order()

    def right_inverse(self, value: Tensor) -> Tensor:
        # ParametrizationList ignores a NotImplementedError while it is constructed, and passes it on at an assignment.
        raise NotImplementedError(
            f"A converted weight (shape {tuple(self.shape)}, {self.count} connections) can't be assigned: expected a layer that "
            "keeps its connections, found a dense value. Initialize the layer before it is converted, or call "
            "`lightning_deepr.densify(module)`, assign, and convert again."
        )

    # -- re-initialization after conversion -------------------------------------------------------------------------------
    # `nn.init.xavier_uniform_(layer.weight)` writes into a transient weight and is lost. Between the conversion by a callback
    # and the start of the fit, where a LightningModule's own `setup` runs, the last weight that was read is kept to see that.

    def watch(self, watching: bool) -> None:
        self.is_watched, self.watched = watching, None

    def _watch(self, theta: Tensor, weight: Tensor) -> None:
        if not self.was_written(theta):
            self.watched = weight

    def was_written(self, theta: Tensor) -> bool:
        """Whether somebody wrote into the weight that was read last."""
        if self.watched is None:
            return False
        with torch.no_grad():
            return not torch.equal(self.watched, build_weight(theta, self.signs, self.places, self.shape))

    # -- moving, copying, saving ------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KSlots:
        super()._apply(fn, recurse)
        for name in ("places", "born", "signs", "exceptions"):
            setattr(self, name, fn(getattr(self, name)))
        self._asked_size = -1
        if self.order is not None:
            self.order = None
            if self.places.device.type == "cpu":
                self.refresh_order()
        if self.watched is not None:  # the Trainer moves the module between the conversion and the start of the fit
            self.watched = fn(self.watched.detach())
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> KSlots:
        replica = KSlots(self.shape, self.places.clone(), self.index, self.sign_seed, self.exceptions.clone(), self.signs.dtype)
        replica.born = self.born.clone()
        replica.compute, replica.l1_taken, replica.training = self.compute, self.l1_taken, self.training
        replica.policy = self.policy
        if self.order is not None:
            replica.refresh_order()
        replica.copied_from = weakref.ref(self)
        memo[id(self)] = replica
        return replica

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + FORMAT_KEY] = torch.tensor(FORMAT_VERSION)
        destination[prefix + "places"] = self.places
        destination[prefix + "born"] = self.born
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
        names = (FORMAT_KEY, "places", "born", "sign_exceptions", "sign_seed", "index", "shape")
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        if missing:
            missing_keys.extend(missing)
            return
        record = {name: state_dict[prefix + name] for name in names}
        problem = self._refusal(record)
        if problem is not None:
            error_msgs.append(f"`{prefix.removesuffix('.0.').replace('parametrizations.', '')}`: {problem}")
            return
        device = self.places.device
        self.sign_seed, self.index = int(record["sign_seed"]), int(record["index"])
        self.exceptions = record["sign_exceptions"].detach().to(device).clone()
        with torch.no_grad():
            self.places.copy_(record["places"])
            self.born.copy_(record["born"])
            self.signs.copy_(self.signs_at(self.places))
        self.places_changed()
        self.watched = None
        realign_averages(self)

    def _refusal(self, record: dict[str, Tensor]) -> str | None:
        """Why a recorded connectivity does not fit this tensor, or None."""
        version, shape, places = int(record[FORMAT_KEY]), tuple(record["shape"].tolist()), record["places"]
        if version > FORMAT_VERSION:
            return f"expected format {FORMAT_VERSION} or older, found {version}: update lightning-deepr."
        if shape != tuple(self.shape):
            return f"expected connections of a weight of shape {tuple(self.shape)}, found {shape}: another model's checkpoint."
        if places.numel() != self.count:
            return (
                f"expected K = {self.count} connections ({self.count / self.total:.3%}), found {places.numel()} "
                f"({places.numel() / self.total:.3%}): give the connectivity with which the checkpoint was made, or convert as "
                "recorded with `lightning_deepr.load_state_dict(module, checkpoint)`."
            )
        if places.numel() and (places.min() < 0 or places.max() >= self.total or places.unique().numel() != places.numel()):
            return f"expected {self.count} different places in 0 ... {self.total - 1}, found others: the file is damaged."
        return None

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, K={self.count} of N={self.total} ({self.count / self.total:.3%})"


def _nobody() -> None:
    return None


class Converted(NamedTuple):
    """A converted tensor within a module."""

    name: str  # "fc1.weight"
    module: nn.Module
    tensor_name: str
    slots: KSlots

    @property
    def theta(self) -> nn.Parameter:
        # (looked up directly: it is asked for several times in every step)
        return self.holder._parameters["original"]  # type: ignore[return-value]

    @property
    def holder(self) -> parametrize.ParametrizationList:
        return self.module._modules["parametrizations"]._modules[self.tensor_name]  # type: ignore[union-attr, return-value]


def slots_of(module: nn.Module, tensor_name: str) -> KSlots | None:
    """The K slots of a module's own tensor, or None where it is not converted."""
    if not parametrize.is_parametrized(module, tensor_name):
        return None
    first = module.parametrizations[tensor_name][0]  # type: ignore[index, union-attr]
    return first if isinstance(first, KSlots) else None


def converted_tensors(module: nn.Module) -> Iterator[Converted]:
    """All converted tensors of a module, in the order in which they were converted."""
    found = []
    for prefix, submodule in module.named_modules():
        if parametrize.is_parametrized(submodule):
            for tensor_name in submodule.parametrizations:  # type: ignore[union-attr]
                slots = slots_of(submodule, tensor_name)
                if slots is not None:
                    found.append(Converted(plain_name(prefix, tensor_name), submodule, tensor_name, slots))
    return iter(sorted(found, key=lambda converted: converted.slots.index))


def plain_name(prefix: str, tensor_name: str) -> str:
    """A tensor's name without what compilers, Fabric and DDP wrap around a module."""
    wrappers = {"_orig_mod", "_forward_module", "_original_module", ""}
    return ".".join([part for part in prefix.split(".") if part not in wrappers] + [tensor_name])


def install(module: nn.Module, tensor_name: str, theta: Tensor, slots: KSlots, name: str) -> None:
    """Replace a weight by K slots. theta becomes a *new* parameter: an optimizer that holds the old one is found out."""
    _own_class(module)
    old = module._parameters[tensor_name]
    requires_grad = True if old is None else old.requires_grad
    parameter = nn.Parameter(theta, requires_grad=requires_grad)
    module._parameters[tensor_name] = parameter
    # unsafe: torch checks dtype and shape by building the weight, which a layer too large to be dense could not afford
    parametrize.register_parametrization(module, tensor_name, slots, unsafe=True)
    if isinstance(module, nn.RNNBase):
        recurrent.take_over(module)
    elif tensor_name == "weight":
        forwards.take_over(module)
    type(module).register_parameter = _register_parameter  # type: ignore[method-assign]
    _warn_if_nobody_rewires(parameter, slots, name)


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """``layer.weight = nn.Parameter(...)`` is answered as the assignment of a tensor is, not by torch's KeyError."""
    slots = slots_of(self, name)
    if slots is not None and param is not None:
        slots.right_inverse(param)
    nn.Module.register_parameter(self, name, param)


def remove(converted: Converted) -> None:
    """Turn a converted weight back into an ordinary dense parameter, with zeros where nothing is connected."""
    with torch.no_grad():
        weight = build_weight(converted.theta.detach(), converted.slots.signs, converted.slots.places, converted.slots.shape)
    requires_grad = converted.theta.requires_grad
    _own_class(converted.module)
    parametrize.remove_parametrizations(converted.module, converted.tensor_name, leave_parametrized=False)
    converted.module._parameters[converted.tensor_name] = nn.Parameter(weight, requires_grad=requires_grad)
    forwards.give_back(converted.module)
    if isinstance(converted.module, nn.RNNBase):
        recurrent.give_back(converted.module)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch makes a class per parametrized module and puts the converted tensors' properties there, but a deep copy shares it:
    converting or densifying the copy would change the original as well.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        members = {name: value for name, value in shared.__dict__.items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, members)


def _warn_if_nobody_rewires(theta: nn.Parameter, slots: KSlots, name: str) -> None:
    slots_ref, theta_ref = weakref.ref(slots), weakref.ref(theta)

    def after_accumulation(_: Tensor) -> None:
        slots, theta = slots_ref(), theta_ref()
        if slots is not None and theta is not None and slots.owner() is None:
            slots.notice.untrained(name)

    trainable = theta.requires_grad
    theta.requires_grad_(True)  # torch wants this for a hook; a frozen theta may be unfrozen later
    theta.register_post_accumulate_grad_hook(after_accumulation)
    theta.requires_grad_(trainable)


def follow(average: nn.Module) -> None:
    """Let the averaged copy of a converted module follow its rewiring.

    The average of a reborn slot starts anew: when a slot is given another place, its average is set to the newborn's theta,
    0, and to the new place and sign. ``AveragedModel`` (and with it Lightning's ``WeightAveraging``) is found by itself.
    """
    for submodule in average.modules():
        if isinstance(submodule, parametrize.ParametrizationList) and isinstance(submodule[0], KSlots):
            source = submodule[0].copied_from()
            if source is not None:
                source.averages.add(submodule)


def _follow_averaged_models(parent: nn.Module, name: str, submodule: nn.Module | None) -> None:
    # AveragedModel takes its deep copy with `self.module = deepcopy(model)`: torch calls this hook just then.
    if name == "module" and isinstance(parent, AveragedModel) and submodule is not None:
        follow(submodule)


nn.modules.module.register_module_module_registration_hook(_follow_averaged_models)


def restart_averages(slots: KSlots, reborn: Tensor) -> None:
    """Start the averages of reborn slots anew (see :func:`follow`)."""
    for holder in slots.averages:
        _restart(holder, slots, reborn)


def realign_averages(slots: KSlots) -> None:
    """After other connections were loaded: an average that has a slot elsewhere starts anew there."""
    for holder in slots.averages:
        average: KSlots = holder[0]  # type: ignore[assignment]
        average.sign_seed, average.exceptions = slots.sign_seed, slots.exceptions.to(average.places.device)
        elsewhere = (average.places.to(slots.places.device) != slots.places) | (average.signs.to(slots.signs) != slots.signs)
        _restart(holder, slots, elsewhere.nonzero().view(-1))


def _restart(holder: parametrize.ParametrizationList, slots: KSlots, reborn: Tensor) -> None:
    average: KSlots = holder[0]  # type: ignore[assignment]
    where = reborn.to(average.places.device)
    holder.original.detach().index_fill_(0, where, 0.0)
    for name in ("places", "signs", "born"):
        source = getattr(slots, name)[reborn].to(where.device, getattr(average, name).dtype)
        getattr(average, name).index_copy_(0, where, source)
    average.places_changed()
