"""The K-slot parametrization of a converted weight.

``torch.nn.utils.parametrize`` keeps the parameter, theta, under ``<module>.parametrizations.<tensor>.original``. Here theta is
a vector of K slots. Its gradient, its optimizer state and its part of a checkpoint have size K, too. :class:`KSlots` has the
place (``places``) and the sign (``signs``) of each slot's connection.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr import kernels
from lightning_deepr.algorithm.allowed import Allowed
from lightning_deepr.algorithm.signs import SignTable
from lightning_deepr.compute import build_weight, tuning
from lightning_deepr.compute.eager import is_jit_tracing, is_plain, is_recorded, needs_operators, transforms, unwatched
from lightning_deepr.compute.order import Order
from lightning_deepr.compute.stacked import is_stacked
from lightning_deepr.compute.upon_base import add_to_base
from lightning_deepr.compute.weight import SparseWeight as _SparseWeight
from lightning_deepr.kernels import gate
from lightning_deepr.weights import copies, overwritten, precision
from lightning_deepr.weights.averages import realign_averages
from lightning_deepr.weights.base import BASE_KEY, FINGERPRINT_KEY, FORMAT_KEY, LARGEST_READ, Notice, Parametrization

DENSEST_UPON_BASE = 0.2  # the connectivity up to which "auto" adds the connections' product to that of the base
_KERNEL_TYPES = (torch.float32, torch.float64)
_told: set[str] = set()


def _precision(x: Tensor) -> torch.dtype:
    """Return the dtype in which a layer computes this input."""
    kind = "cpu" if x.is_cpu else x.device.type  # (the Python object of a device takes a microsecond)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class KSlots(Parametrization):
    """The parametrization that computes the dense-shaped weight from a theta of K slots.

    It keeps K places and K signs. It keeps no tensor of size N, except for ``base``: the weight is then this frozen tensor,
    which was there before, plus the connections (:mod:`lightning_deepr.conversion.adapt`).

    Args:
        shape: the weight's shape, with N potential connections.
        places: int64 [K], unique, 0 <= place < N.
        index: the tensor's position in the order of conversion.
        sign_seed: the seed of the hashed signs.
        exceptions: int64 [E], sorted: the places of a pretrained network whose sign is the opposite of the hash.
        dtype: the weight's dtype. theta has float32 if it has fewer than 32 bits.
        notice: the warning that all tensors of one conversion share.
        allowed: the places where connections may be; None: everywhere.
        sign_table: the signs of the places; None: their hashes.
        base: the frozen weight to which the connections are added; None: 0.
    """

    tensors = ("places", "born", "signs", "exceptions")
    placing = ("places", "signs")
    records = ("places", "born")
    _in_order: tuple[Tensor, tuple[int, int], bool] | None = None  # the last answer of in_place_order
    base: nn.Parameter  # only if ``adapts``
    merged_over: Tensor | None = None  # the base's values at the K places, while the connections are merged into it

    def __init__(
        self,
        shape: torch.Size,
        places: Tensor,
        index: int,
        sign_seed: int,
        exceptions: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        notice: Notice | None = None,
        *,
        allowed: Allowed | None = None,
        sign_table: SignTable | None = None,
        base: nn.Parameter | None = None,
    ) -> None:
        exceptions = torch.empty_like(places[:0]) if exceptions is None else exceptions
        super().__init__(shape, index, sign_seed, exceptions, dtype, notice)
        self.allowed, self.sign_table = allowed, sign_table
        self.places = places.contiguous()
        self.born = torch.full_like(self.places, -1)
        self.signs = self.signs_at(self.places, precision.kept(dtype))
        self.notes: Any = None  # what is noted about births: :mod:`lightning_deepr.monitoring.record`
        self.order: Order | None = None  # made when sparse compute needs it, and kept up to date
        # the cached decision of uses_sparse, with the input's size, device and precision that it is for
        self._asked_size, self._asked_device, self._asked_on_cpu, self._asked = -1, torch.device("cpu"), True, False
        self._asked_precision: Any = None
        # receives the dense weight's gradient if a method needs it (RigL does in the steps that rewire)
        self.on_dense_gradient: Callable[[Tensor], None] | None = None
        if base is not None:
            self.put_upon(base)

    def put_upon(self, base: nn.Parameter) -> None:
        """Let the weight be a frozen tensor plus the connections. It stays the same object, in its own memory and dtype."""
        self.adapts = True
        self.register_parameter("base", base)

    @property
    def count(self) -> int:
        """K, the number of connections."""
        return self.places.numel()

    def check(self, theta: Tensor, name: str | None = None) -> bool:
        if self.adapts and (problem := self.base_problem()) is not None:
            raise RuntimeError(f"`{name or self.name}`: {problem}.")
        return gate.check(theta, self, name)

    def written(self, theta: Tensor, name: str) -> list[tuple[str, Tensor]]:
        return gate.slots_of_step(name, theta, self)

    def last_birth(self) -> int:
        return int(self.born.max()) if self.count else -1

    def active(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        if self.doubt is not None:
            copies.check(self)
        if self.last_step >= 0:
            overwritten.look(self)
        values = self.own(theta.detach()) * self.signs
        return self.places.clone(), (values if self.adapts else self.narrowed(values)).clone()

    def forward(self, theta: Tensor) -> Tensor:
        if self.doubt is not None and not torch.compiler.is_dynamo_compiling():
            copies.check(self)
        if not torch.compiler.is_dynamo_compiling() and not self.training and self.last_step >= 0:
            overwritten.look(self)
        sparse = self.compute == "sparse" and not self.is_watched and self.on_dense_gradient is None and not self.is_merged
        traced = torch.compiler.is_dynamo_compiling()
        if sparse and not traced and (self.is_large or not needs_operators()) and not is_stacked(theta, self):
            return _SparseWeight(self.own(theta), self)
        return super().forward(theta)

    def dense(self, theta: Tensor) -> Tensor:
        return self.weight_of(self.own(theta))

    def weight_of(self, part: Tensor) -> Tensor:
        """Compute the dense-shaped weight from this tensor's own theta [K]: the connections, and the base if there is one.

        Raises:
            RuntimeError: the weight would take more than 1 GiB.
        """
        if not torch.compiler.is_dynamo_compiling() and isinstance(part, Tensor):  # torch.fx records with proxies
            with unwatched():
                gate.check_values(part, self)
            gate.note_finite(self, None)  # lets go of the last gradient's memory
        size = self.total * (self.narrow or part.dtype).itemsize
        if not torch.compiler.is_dynamo_compiling() and size > LARGEST_READ:
            raise RuntimeError(
                f"Building this weight of shape {tuple(self.shape)} takes {size / 2**30:.1f} GiB "
                "(more than 1 GiB). `lightning_deepr.connections(module)` gives its places and values instead."
            )
        # (a tensor whose slots may move has to save its places: autograd then refuses a backward pass after a rewiring)
        if self.adapts:
            weight = self._upon_base(part)
        elif self.stays and self.narrow is None and not torch.compiler.is_dynamo_compiling() and self.in_place_order:
            weight = (part * self.signs).view(self.shape)
        else:
            weight = build_weight(part, self.signs, self.places, self.shape, self.narrow)
        if self.on_dense_gradient is not None and weight.requires_grad and not torch.compiler.is_dynamo_compiling():
            weight.register_hook(self.on_dense_gradient)
        return weight

    def whole(self, theta: Tensor) -> Tensor:
        if self.doubt is not None:
            copies.check(self)
        if self.last_step >= 0:
            overwritten.look(self)
        if self.adapts:
            return self._upon_base(self.own(theta)).clone()
        return build_weight(self.own(theta), self.signs, self.places, self.shape, self.narrow)

    def _upon_base(self, part: Tensor) -> Tensor:
        if self.is_merged:
            return self.base.detach()
        return add_to_base(self.base.detach(), part, self.signs, self.places)

    @property
    def may_sum(self) -> bool:
        """Whether a linear layer may compute with the sum of base and connections, if that is faster."""
        plain = self.on_dense_gradient is None and not self.is_watched and not self.is_merged and self.doubt is None
        return plain and self.policy != "sparse"

    @property
    def is_merged(self) -> bool:
        """Whether the connections are written into the base, so that the base alone is the weight."""
        return self.merged_over is not None

    @property
    def in_place_order(self) -> bool:
        """Whether K = N and the slots are in the order of their places, so that the weight is theta times the signs."""
        places = self.places
        if places.numel() != self.total or type(places) is not Tensor or places.is_meta:
            return False
        known = self._in_order
        mark = 0 if places.is_inference() else places._version, places.data_ptr()
        if known is None or known[0] is not places or known[1] != mark:
            with unwatched():
                found = torch.equal(places, torch.arange(self.total, device=places.device))
            known = places, mark, found
            vars(self)["_in_order"] = known
        return known[2]

    @property
    def is_simple_dense(self) -> bool:  # type: ignore[override]
        return not self.is_watched and self.on_dense_gradient is None and not self.adapts

    @property
    def is_large(self) -> bool:
        """Whether the dense weight would take more than 1 GiB."""
        return self.total * self.weight_dtype.itemsize > LARGEST_READ

    # -- sparse compute ---------------------------------------------------------------------------------------------------

    def choose_compute(self, policy: str, capable: bool) -> None:
        """Apply the ``compute`` argument to this tensor.

        Args:
            policy: "auto" | "dense" | "sparse" | "tune": as "auto", by times on this machine where a layer can be timed.
            capable: whether sparse compute supports this tensor.
        """
        self.tunes, policy = policy == "tune", "auto" if policy == "tune" else policy
        self.policy = policy if capable and (self.layer.adapts or not self.adapts) else "dense"
        self._asked_size = -1
        sparse = self.policy == "sparse" or (self.policy == "auto" and kernels.available() and self._guess())
        if self.policy == "auto" and self.is_large:
            sparse = True  # the dense weight is too large
            self.policy = "sparse"
        self.compute = "sparse" if sparse else "dense"
        if sparse and self.places.device.type == "cpu" and self.signs.dtype in _KERNEL_TYPES and kernels.available():
            self.refresh_order()

    def _guess(self) -> bool:
        # upon a base, sparse compute saves a copy of it and its dense gradient, at any batch size
        return self.count <= DENSEST_UPON_BASE * self.total if self.adapts else self.layer.guess(self)

    def uses_sparse(self, x: Tensor, module: nn.Module) -> bool:
        """Whether this forward pass computes sparsely.

        Args:
            x: the layer's input; under ``compute="auto"`` its size decides.
            module: the layer.
        """
        if self.doubt is not None and not torch.compiler.is_dynamo_compiling():
            copies.check(self)
        if not torch.compiler.is_dynamo_compiling() and not self.training and self.last_step >= 0:
            overwritten.look(self)
        if self.adapts:
            return self.compute == "sparse" and self.on_dense_gradient is None and not self.is_merged
        if self.policy != "auto" or torch.compiler.is_dynamo_compiling() or self.on_dense_gradient is not None:
            return self.compute == "sparse" and self.on_dense_gradient is None
        if type(x) is not Tensor or is_jit_tracing():
            return self.is_large  # no choice, and no record of one, from a pass that only looks at the operators
        size, on_cpu, precision = x.numel(), x.is_cpu, _precision(x)
        if (
            size == self._asked_size
            and on_cpu is self._asked_on_cpu
            and precision is self._asked_precision
            and (on_cpu or x.device == self._asked_device)
        ):
            return self._asked
        if transforms() is not None or is_recorded():
            return self.is_large
        chosen = kernels.available() and (self._tuned(module, x) if self.tunes else self.layer.prefers(self, module, x))
        self._note_asked(x, chosen)
        if torch.is_grad_enabled():
            self.compute = "sparse" if chosen else "dense"
        return chosen

    def _note_asked(self, x: Tensor, sparse: bool) -> None:
        self._asked_size, self._asked_device, self._asked_on_cpu, self._asked = x.numel(), x.device, x.is_cpu, sparse
        self._asked_precision = _precision(x)

    def _tuned(self, module: nn.Module, x: Tensor) -> bool:
        """Choose by times on this machine, or by the rule if the layer can't be timed."""
        if not self.layer.tunes or self.layer.runs_own(module) or x.numel() == 0 or not x.is_floating_point() or not x.is_cpu:
            return self.layer.prefers(self, module, x)

        def ask(sparse: bool) -> None:
            self._note_asked(x, sparse)

        try:
            found = tuning.times(self, module, x, ask)
        finally:
            self.ask_again()
            gate.note_finite(self, None)
        self.measured = found or self.measured
        return self.layer.prefers(self, module, x) if found is None else found.sparse < found.dense

    def has_kernel(self, theta: Tensor) -> bool:
        """Whether a compiled kernel can compute with this theta. It warns once per device and dtype without a kernel."""
        if torch.compiler.is_dynamo_compiling():
            return self.order is not None  # conversion, loading and moving make the order
        if theta.device.type == "cpu" and theta.dtype in _KERNEL_TYPES and kernels.available():
            if type(self.places) is not Tensor:  # made under FakeTensorMode
                gate.check_values(theta, self)
                return False
            return True
        kind = f"{theta.device.type}, {theta.dtype}"
        if kind not in _told:
            _told.add(kind)
            warnings.warn(
                f"Sparse compute has no kernel for {kind}: it runs in plain PyTorch, which is slower. Kernels exist for "
                "float32 and float64 on the CPU if numba can be imported, and for CUDA if Triton can be imported. "
                'compute="dense" is the alternative.',
                stacklevel=4,
            )
        return False

    def ordered(self) -> Order:
        """Return the up-to-date order of the connections by row and by column."""
        order = self.order
        if torch.compiler.is_dynamo_compiling():
            assert order is not None
            return order
        if order is None or order.is_stale(self.places):
            return self.refresh_order()
        return order

    def ask_again(self) -> None:
        """Forget the cached dense/sparse decision."""
        self._asked_size = -1

    def refresh_order(self) -> Order:
        """Rebuild the order of the connections. If K is the same, reuse the buffer, which compiled graphs may hold."""
        with unwatched():
            gate.check_places(self)  # the kernel writes where they point to
            if self.order is None or self.order.count != self.count:
                self.order = Order(self.places, self.signs, self.shape)
            else:
                self.order.build(self.places, self.signs)
        return self.order

    def places_changed(self) -> None:
        """Rebuild the order after a rewiring or a load. (A compiled graph cannot detect the change.)"""
        gate.note(self)
        if self.order is not None:
            self.refresh_order()

    # -- invariants -------------------------------------------------------------------------------------------------------

    def problem(
        self,
        theta: Tensor,
        born: Tensor,
        states: Iterable[tuple[str, Tensor, float]],
        *,
        least: int = 0,
        signed: bool = False,
    ) -> str | None:
        """Describe the first violated invariant of a step, or return None.

        Args:
            theta: the parameter, detached.
            born: int64, the slots of this tensor that were reborn in this step.
            states: the name, tensor and starting value of each tensor of theta's shape in the optimizer's state.
            least: the least number of connections of a layer that shares its theta; unshared slots ignore it.
            signed: whether theta may be negative.
        """
        mine, places = self.own(theta), self.places
        if mine.shape != places.shape:
            return f"expected {places.numel()} slots, found theta of shape {tuple(mine.shape)}"
        if not bool(torch.isfinite(mine).all()):
            return "theta is not finite"
        if not signed and bool((mine < 0).any()):
            return f"expected theta >= 0, found {float(mine.min())}"
        if self.adapts and (changed := self.base_problem()):
            return changed
        if bool(((places < 0) | (places >= self.total)).any()):
            return f"a place lies outside 0 ... {self.total - 1}"
        if places.unique().numel() != places.numel():
            return "two slots are at one place"
        if not torch.equal(self.signs, self.signs_at(places)):
            return "a sign is not that of its place"
        if self.allowed is not None:
            outside = ~self.allowed.contains(places)
            if bool(outside.any()):
                return f"place {int(places[outside][0])} is not among {self.allowed!r}"
            changed = self.allowed.changed(places)
            if changed is not None:
                return changed
        if bool((mine[born] != 0).any()):
            return "a reborn slot does not start at theta = 0"
        for name, value, start in states:
            if bool((self.own(value)[born] != start).any()):
                return f"the optimizer's {name} of a reborn slot is not at its start, {start}"
        return None

    def base_problem(self) -> str | None:
        """Say why the frozen base is not frozen any more, or return None."""
        if self.base.requires_grad:
            return (
                "its frozen weight has requires_grad=True: expected that only the difference to it is trained. Somebody has "
                "unfrozen it (`requires_grad_(True)`, a fine-tuning callback): leave out the parameters whose names end with "
                "`.base`"
            )
        if self.is_merged:
            return (
                "its connections are merged into the frozen weight: expected them apart for a training. Call "
                "`lightning_deepr.adapters.unmerge(net)` first"
            )
        return None

    # -- moving, copying, saving ------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KSlots:
        base = self._parameters.pop("base", None)  # it is cast like any other weight; theta and its signs may not be
        super()._apply(fn, recurse)
        if base is not None:
            held = nn.ParameterList([base])._apply(fn)
            self._parameters["base"] = held[0]
            if self.merged_over is not None:
                self.merged_over = fn(self.merged_over)
        return self

    def moved(self) -> None:
        self._asked_size = -1
        if self.places.device.type == "cpu" and type(self.places) is Tensor and self.places.is_shared():
            if self.compute == "sparse" and not self.is_large:  # the order of the connections is this process's own
                self.notice.shared(self.name)
            self.policy, self.compute, self.order = "dense", "dense", None
        if self.order is not None:
            self.order = None
            if self.places.device.type == "cpu":
                self.refresh_order()

    def __deepcopy__(self, memo: dict[int, Any]) -> KSlots:
        replica = KSlots(
            self.shape,
            self.places.clone(),
            self.index,
            self.sign_seed,
            self.exceptions.clone(),
            self.weight_dtype,
            allowed=self.allowed,
            sign_table=self.sign_table,
            base=copy.deepcopy(self.base, memo) if self.adapts else None,
        )
        replica.born = self.born.clone()
        replica.merged_over = None if self.merged_over is None else self.merged_over.clone()
        replica.take_after(self, memo)
        if self.order is not None:
            replica.refresh_order()
        return replica

    def take_over(self, record: dict[str, Tensor]) -> None:
        places = record["places"]
        moved = bool(self.copies or self.has_handed_out) and not torch.equal(self.places, places.to(self.places.device))
        self.places.copy_(places)
        self.born.copy_(record["born"])
        self.signs.copy_(self.signs_at(self.places))
        self.places_changed()
        realign_averages(self)
        self.note_load(places, moved)

    def _may_be_empty(self, state_dict: dict[str, Any], prefix: str, absent: list[str]) -> bool:
        if any(prefix + name in absent for name in self.records) and not self.shares:
            return False  # only a layer that shares its theta may have no connections
        return prefix + FINGERPRINT_KEY in state_dict and super()._may_be_empty(state_dict, prefix, absent)

    def restore_integers(self, record: dict[str, Tensor]) -> bool:
        averaged = super().restore_integers(record)
        if averaged and FINGERPRINT_KEY in record:
            mine = copies.fingerprint(self.places, self.exceptions, self.sign_seed)
            if copies.fits(record[FINGERPRINT_KEY], mine):  # equal connections, of which floats lost some digits
                record["places"], record["sign_exceptions"] = self.places.clone(), self.exceptions.clone()
                record["sign_seed"] = torch.tensor(self.sign_seed)
        return averaged

    def note_load(self, places: Tensor, moved: bool) -> None:
        """Note a load, for the copies of this tensor and for what it is a copy of.

        Args:
            places: the record.
            moved: whether this tensor had other places before.
        """
        copies.note_load(self, places)
        if moved and self.has_handed_out:
            copies.expire(self)
        if moved and self.copies:
            copies.doubt_copies([self], loaded=True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.doubt is not None:
            copies.check(self)
        if self.last_step >= 0:
            overwritten.look(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix + FORMAT_KEY not in destination:
            return  # only the dense weight is being saved
        if is_plain(self.places) and not self.places.is_meta:  # no tracer looks on, and the places have values
            found = copies.fingerprint(self.places, self.exceptions, self.sign_seed)
            destination[prefix + FINGERPRINT_KEY] = found
            copies.hand_out(self, destination[prefix + "places"], found)
        if self.adapts:
            base = self.base if keep_vars and not self.is_merged else self.unmerged().detach()
            destination[prefix + BASE_KEY] = base

    def unmerged(self) -> Tensor:
        """Return the base as it was before the connections were merged into it: itself if they are not."""
        if self.merged_over is None:
            return self.base
        flat = self.base.detach().reshape(-1)
        return flat.index_copy(0, self.places, self.merged_over).view(self.shape)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        recorded, errors = state_dict.get(prefix + BASE_KEY), len(error_msgs)
        problem = self._base_refusal(recorded) if prefix + FORMAT_KEY in state_dict else None
        if problem is not None:
            error_msgs.append(f"`{prefix.removesuffix('.0.').replace('parametrizations.', '')}`: {problem}")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip
        if recorded is None or len(error_msgs) > errors or prefix + FORMAT_KEY not in state_dict:
            return
        if self.base.is_meta:
            self._parameters["base"] = nn.Parameter(recorded.detach().clone(), requires_grad=False)
        else:
            with torch.no_grad():
                self.base.copy_(recorded)

    def _base_refusal(self, recorded: Tensor | None) -> str | None:
        """Say why the base in a checkpoint does not fit, or return None."""
        if self.adapts != (recorded is not None):
            forms = "connections alone", "connections upon a frozen weight"
            return (
                f"expected {forms[self.adapts]}, found {forms[not self.adapts]} in the checkpoint: convert as it records, "
                '`sparsify` or `adapt` (of="difference"), or load it into a dense network with `load_state_dict(module, path)`.'
            )
        if recorded is None:
            return None
        if recorded.shape != self.base.shape:
            return f"expected a frozen weight of shape {tuple(self.base.shape)}, found {tuple(recorded.shape)}."
        if self.is_merged:
            return "its connections are merged into the frozen weight: call `lightning_deepr.adapters.unmerge(net)`, then load."
        return None

    def _refusal(self, record: dict[str, Tensor]) -> str | None:
        problem = super()._refusal(record) or self._count_refusal(record)
        if problem is not None:
            return problem
        places = record["places"]
        if places.numel() and (places.min() < 0 or places.max() >= self.total or places.unique().numel() != places.numel()):
            return (
                f"expected {places.numel()} different places in 0 ... {self.total - 1}, found others: the file is damaged, or "
                "an average of networks with different connections."
            )
        if FINGERPRINT_KEY in record:
            if bool(record[FINGERPRINT_KEY].isnan().any()):
                return copies.STALE
            expected = copies.fingerprint(places, record["sign_exceptions"], int(record["sign_seed"]))
            if not copies.fits(record[FINGERPRINT_KEY], expected):
                return copies.MIXED
        return None

    def _count_refusal(self, record: dict[str, Tensor]) -> str | None:
        """Say why a recorded number of connections does not fit, or return None."""
        count = record["places"].numel()
        if count == self.count:
            return None
        return (
            f"expected K = {self.count} connections ({self.count / self.total:.3%}), found {count} "
            f"({count / self.total:.3%}): give the connectivity of the checkpoint, or convert as "
            "recorded with `lightning_deepr.load_state_dict(module, checkpoint)`."
        )
