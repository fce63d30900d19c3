"""Several adapters on one network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike

from torch import Tensor, nn

from lightning_deepr.adapters.adapter import Adapter, adapter_of, average, check_number
from lightning_deepr.adapters.file import read_adapter
from lightning_deepr.adapters.installing import beside, detach, exchange, fit, write
from lightning_deepr.weights.find import converted_tensors


class Adapters:
    """Named adapters of one network, one of which is used at a time.

    The network keeps its frozen weights, which all of them share. An adapter takes O(K).

    Args:
        net: the network. If it is adapted already, :meth:`add` takes its present adapter.

    Example::

        >>> from lightning_deepr import adapt
        >>> bank = Adapters(adapt(nn.Linear(100, 10), 0.05))
        >>> bank.add("first")
        >>> bank.use("first", scale=0.5)
        >>> bank.average("mean", {"first": 1.0})
        >>> bank.use(None)  # the network by itself
        >>> bank.remove("first")
        >>> list(bank), bank.active, type(bank.net).__name__
        (['mean'], None, 'Linear')
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.active: str | None = None
        self.scale = 1.0
        self._adapters: dict[str, Adapter] = {}
        self._present: Adapter | None = None  # what the network got from this bank
        self._digests: dict[str, str] | None = None
        self._lost: set[str] = set()  # names of tensors whose own values are not known
        self._own: list[tuple[Tensor, Tensor]] = []  # what adapters have overwritten beside their differences

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise KeyError(f"no adapter {name!r}: the names are {', '.join(map(repr, self._adapters)) or 'none yet'}.")
        return self._adapters[name]

    def add(self, name: str, adapter: Adapter | str | PathLike[str] | None = None, *, overwrite: bool = False) -> None:
        """Add an adapter under a name. It is not used yet, unless it is the present one.

        Args:
            name: the name.
            adapter: an adapter, or the path of its file; None: the network's present one.
            overwrite: whether to replace an adapter of this name.

        Raises:
            TypeError: the name is no text.
            ValueError: there is an adapter of this name, the network has none, or the adapter belongs to other weights.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected a text, found {name!r}.")
        if name in self._adapters and not overwrite:
            raise ValueError(f"There is an adapter {name!r} already: expected another name, or overwrite=True.")
        if name == self.active and adapter is not None:
            raise ValueError(f"{name!r} is in use: call use(None), or use another one, before it is replaced.")
        if adapter is None:
            found = adapter_of(self.net)
            known = {id(tensor) for tensor, _ in self._own}
            self._lost |= {
                other for other, (mine, _) in zip(found.others, beside(self.net, found), strict=True) if id(mine) not in known
            }
            self.active, self.scale, self._present, self._digests = name, 1.0, found, found.digests
        else:
            found = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
            fit(self.net, found)
        self._adapters[name] = found

    def use(self, name: str | None, scale: float = 1.0) -> None:
        """Switch to an adapter.

        Args:
            name: its name; None: the network by itself.
            scale: a factor of the difference: 0 is the network by itself, values between 0 and 1 lie between.

        Raises:
            KeyError: there is no such adapter.
            TypeError, ValueError: the scale is no finite number.
            RuntimeError: the present adapter has been trained since it was added, a callback is at work on it, or the
                network's own values of what was trained beside an adapter are not known.
        """
        check_number("scale", scale)
        wanted = None if name is None else self[name]
        unknown = self._lost - (set() if wanted is None else wanted.others.keys())
        if unknown:
            raise RuntimeError(
                f"`{min(unknown)}` was trained beside an adapter before this bank was made, and its former value is not known. "
                "Make the bank of the pretrained network, and add the adapter by its file."
            )
        if any(one.slots.adapts for one in converted_tensors(self.net)):
            present = adapter_of(self.net, self._digests)
            if self._present is None or not present.is_same(self._present):
                raise RuntimeError(
                    "The network's present adapter is not among these, or was trained since it was added: it would be lost. "
                    f'Call add("a name") first{"" if self.active is None else f", or add({self.active!r}, overwrite=True)"}.'
                )
        if wanted is not None:
            wanted = wanted if scale == 1.0 else wanted.scaled(scale)
            self._keep(wanted)
            write(self.net, self._own)
            exchange(self.net, wanted, *fit(self.net, wanted, digests=False))  # :meth:`add` has compared them
            self._digests = wanted.digests
            self._present = adapter_of(self.net, wanted.digests)
        else:
            detach(self.net, missing_ok=True)
            write(self.net, self._own)
            self._present = None
        self.active, self.scale = name, scale

    def _keep(self, adapter: Adapter) -> None:
        """Keep the network's own values of what an adapter is going to write beside its difference."""
        known = {id(tensor) for tensor, _ in self._own}
        values = beside(self.net, adapter)
        self._own += [(tensor, tensor.detach().clone()) for tensor, _ in values if id(tensor) not in known]

    def average(self, name: str, weights: Mapping[str, float]) -> None:
        """Add the weighted sum of some adapters under a new name; see :func:`lightning_deepr.adapters.average`.

        Args:
            name: the new name.
            weights: {name: weight}.
        """
        found: dict[Adapter, float] = {}
        for one, weight in weights.items():
            check_number("average: weight", weight)
            found[self[one]] = found.get(self[one], 0) + weight  # two names may hold one adapter
        self.add(name, average(found))

    def remove(self, name: str) -> None:
        """Forget an adapter. If it is in use, the network goes on by itself."""
        self[name]  # raises
        if name == self.active:
            self.use(None)
        del self._adapters[name]
