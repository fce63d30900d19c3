"""The gate in front of the kernels: whatever takes the place of a tensor, nothing is written where it does not belong.

Between steps, random exchanges of thetas, states, gradients, places, births and signs: views, other sizes, dtypes and strides,
shared storage, meta and fake tensors, subclasses. Every buffer lies between guard words. An exchange is either refused, or the
network goes on exactly like one without kernels.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_deepr import DeepR, kernels, sparsify
from lightning_deepr.kernels import gate
from tests.helpers.state import all_slots, theta_of, thetas

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*an int and means one single connection")

GUARD = 64  # entries before and after each buffer
CANARY = 91.0
TENSORS = ("0.weight", "2.weight")


class Guarded:
    """Buffers between guard words."""

    def __init__(self) -> None:
        self.whole: list[tuple[Tensor, int, int]] = []

    def buffer(self, value: Tensor, gap: int = 1) -> Tensor:
        """Return a copy of a vector in a buffer of its own, with every ``gap``-th entry."""
        count = value.numel()
        whole = torch.full((2 * GUARD + max(count * gap, 1),), CANARY).to(value.dtype)
        inner = whole[GUARD : GUARD + count * gap]
        self.whole.append((whole, count, gap))
        part = inner[::gap]
        with torch.no_grad():
            part.copy_(value)
        return part

    def check(self) -> None:
        for whole, count, gap in self.whole:
            outside = torch.ones(whole.numel(), dtype=torch.bool)
            outside[GUARD : GUARD + count * gap : gap] = False
            assert bool((whole[outside] == CANARY).all()), "a write outside of a buffer"


class Sub(Tensor):
    pass


def other_memory(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return guarded.buffer(value)


def shorter(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return guarded.buffer(value[: max(1, value.numel() - 1 - at % 7)])


def longer(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return guarded.buffer(torch.cat([value, value[: 1 + at % 5]]))


def one_entry(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return guarded.buffer(value[:1])


def empty(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return value[:0]


def strided(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return guarded.buffer(value, gap=2 + at % 2)


def expanded(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return guarded.buffer(value[:1]).expand(value.numel())


def other_dtype(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    kinds = [torch.float64, torch.bfloat16, torch.float32] if value.is_floating_point() else [torch.int32, torch.float64]
    return guarded.buffer(value.to(kinds[at % len(kinds)]))


def same_bits(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    """The same memory, under another dtype of that size."""
    twin = {torch.float32: torch.int32, torch.int64: torch.float64}[value.dtype] if value.dtype in _BITS else torch.uint8
    return guarded.buffer(value).view(twin)


_BITS = (torch.float32, torch.int64)


def in_two_dimensions(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return guarded.buffer(value).view(1, -1)


def meta(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return value.to("meta")


def fake(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return FakeTensorMode().from_tensor(value.detach().clone())


def subclass(value: Tensor, guarded: Guarded, at: int) -> Tensor:
    return guarded.buffer(value).as_subclass(Sub)


KINDS: list[Callable[..., Tensor]] = [other_memory, shorter, longer, one_entry, empty, strided, expanded, other_dtype]
KINDS += [same_bits, in_two_dimensions, meta, fake, subclass]
NAMED = re.compile(r"`(0|2)\.weight`")
AS_DENSE = re.compile("must have the same dtype|same device|not on the expected device")  # as a dense layer of that weight says


def is_refusal(error: Exception) -> bool:
    """Whether an error says which tensor does not fit; another one may come from anywhere."""
    found = NAMED.search(str(error)) or AS_DENSE.search(str(error))
    return isinstance(error, (RuntimeError, ValueError)) and found is not None


def _is_in_optimizer(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any("torch/optim/" in frame.filename.replace("\\", "/") for frame in frames) and not any(
        "lightning_deepr" in frame.filename for frame in frames
    )


class Network:
    """Equal arguments give equal networks."""

    def __init__(self, seed: int, options: dict[str, Any], compute: str, density: float) -> None:
        torch.manual_seed(seed)
        self.net = sparsify(
            nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)), density, compute=compute, seed=seed, init="deepr"
        )
        kinds: list[Callable[[Any], torch.optim.Optimizer]] = [
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
            lambda p: torch.optim.Adam(p, lr=0.02, foreach=False),
            lambda p: torch.optim.Adagrad(p, lr=0.05, foreach=False),
        ]
        self.optimizer = kinds[seed % 3](self.net.parameters())
        self.rewiring = DeepR(l1=0.1, temperature=0.0, seed=seed, **options).attach(self.net, self.optimizer)

    def backward(self, number: int) -> None:
        self.optimizer.zero_grad()
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(number))
        self.net(x).square().mean().backward()

    def step(self, number: int) -> None:
        self.backward(number)
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        found = [p.detach().clone() for p in self.net.parameters()]
        for slots in all_slots(self.net):
            found += [slots.places.clone(), slots.born.clone(), slots.signs.clone()]
        for p in self.net.parameters():
            found += [v.clone() for _, v in sorted(self.optimizer.state.get(p, {}).items()) if isinstance(v, Tensor)]
        return found


def exchange(one: Network, target: str, kind: Callable[..., Tensor], name: str, at: int, guarded: Guarded) -> bool:
    """Exchange a tensor of a network. Returns whether there was one to exchange, and torch allowed it."""
    theta = theta_of(one.net, name)
    slots = dict(zip(TENSORS, all_slots(one.net), strict=True))[name]
    try:
        if target == "theta":
            theta.data = kind(theta.detach(), guarded, at)
        elif target == "state":
            state = one.optimizer.state.get(theta, {})
            names = [word for word, value in sorted(state.items()) if isinstance(value, Tensor) and value.dim()]
            if not names:
                return False
            state[names[at % len(names)]] = kind(state[names[at % len(names)]], guarded, at)
        else:
            setattr(slots, target, kind(getattr(slots, target), guarded, at))
    except RuntimeError:
        return False  # torch refuses it
    return True


def share(one: Network, target: str, at: int) -> None:
    """Let two tensors of a network share memory."""
    first, second = thetas(one.net)
    count = min(first.numel(), second.numel())
    if target == "theta":
        second.data = first.data[: second.numel()] if first.numel() >= second.numel() else second.data
    elif target == "born":
        slots = all_slots(one.net)[at % 2]
        slots.born = slots.places
    else:
        slots = all_slots(one.net)[at % 2]
        both = torch.cat([slots.places, slots.places[:count]])
        slots.places, slots.born = both[: slots.count], both[3 : 3 + slots.count]


def connections_of(one: Network) -> list[Tensor]:
    """Return the bits of the places and births that are ordinary tensors."""
    found = [value for slots in all_slots(one.net) for value in (slots.places, slots.born)]
    return [value.reshape(-1).clone().view(torch.uint8) for value in found if gate.foreign(value) is None]


def one_trial(trial: int, without_kernels: Callable[[Callable[[], Any]], Any]) -> str:
    """Train two equal networks, exchange the same tensor of both, and go on: with kernels and without them."""
    draw = torch.Generator().manual_seed(trial)

    def pick(choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=draw))]

    options = pick([{}, {}, {"lr_scale": 1.0}, {"newborn": "start"} if "newborn" in DeepR.__dataclass_fields__ else {}])
    made = pick([("sparse", 0.2), ("dense", 0.2), ("dense", 0.7), ("auto", 0.4)])
    target, kind, name = pick(["theta", "theta", "theta", "state", "places", "born", "signs"]), pick(KINDS), pick(TENSORS)
    when, at, mode = (
        pick(["between", "between", "before the step"]),
        int(torch.randint(100, (1,), generator=draw)),
        pick(range(12)),
    )
    fast, plain = (Network(trial % 17, options, *made) for _ in range(2))
    guarded = Guarded()
    for number in range(2):
        fast.step(number)
        plain.step(number)
    pair = []
    for one in (fast, plain):
        if when == "before the step":
            one.backward(2)
        if mode == 0:
            share(one, target, at)
        elif not exchange(one, target, kind, name, at, guarded):
            return "not possible"
        pair.append(one)

    def go_on(one: Network) -> list[Tensor] | str:
        before = connections_of(one)
        try:
            for number in range(2 if when == "before the step" else 3, 5):
                if number > 2:
                    one.backward(number)
                before = connections_of(one)
                one.optimizer.step()
            return one.values()
        except Exception as error:
            # torch's own optimizers refuse some states and gradients before the step is over
            if not (is_refusal(error) or (target in ("state", "theta") and _is_in_optimizer(error))):
                raise
            assert all(map(torch.equal, before, connections_of(one))), "a step that was refused has written"
            return f"{type(error).__name__}: {error}"

    found = go_on(fast)
    guarded.check()
    if isinstance(found, str):
        return "refused"
    expected = without_kernels(lambda: go_on(plain))
    guarded.check()
    assert not isinstance(expected, str), (target, kind.__name__, name, when, mode, expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m: f"{target}, {kind.__name__}, {name}, {when}: {m}")
    return "right"


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "available", lambda: False)
            return function()

    return run


@pytest.mark.parametrize(
    ("first", "trials"),
    [(0, 100), pytest.param(150, 150, marks=pytest.mark.slow), pytest.param(1000, 10_000, marks=pytest.mark.slow)],
    ids=lambda value: str(value),
)
def test_random_exchanges(first: int, trials: int, without_kernels: Callable[[Callable[[], Any]], Any]) -> None:
    counts: dict[str, int] = {}
    for trial in range(first, first + trials):
        try:
            outcome = one_trial(trial, without_kernels)
        except BaseException as error:
            raise AssertionError(f"trial {trial}") from error
        counts[outcome] = counts.get(outcome, 0) + 1
    assert counts["right"] > trials // 20 and counts["refused"] > trials // 5, counts
