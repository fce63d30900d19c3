"""The methods of ``docs/extending.md``, run from the document's own text."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_deepr import DeepR, RigL
from lightning_deepr.weights.find import converted_tensors

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)


def load(name: str) -> Any:
    """Return a class that the document defines."""
    (block,) = [block for block in BLOCKS if f"class {name}(" in block]
    # a dataclass looks up its module in sys.modules
    scope: dict[str, Any] = {"__name__": __name__}
    exec(compile(block, str(DOCUMENT), "exec"), scope)
    return scope[name]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(20, 16, generator=generator), torch.randn(20, 8, generator=generator)) for _ in range(count)]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> list[float]:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ["SNFS", "NM"])
def test_it_is_short(name: str) -> None:
    (block,) = [block for block in BLOCKS if f"class {name}(" in block]
    own = block[block.index("@dataclass") :]
    own = re.sub(r'"""(.|\n)*?"""\n', "", own)
    assert len([line for line in own.splitlines() if line.strip()]) <= 40


@pytest.mark.parametrize("name", ["SNFS", "NM"])
def test_a_resumed_run_equals_an_uninterrupted_one(name: str) -> None:
    options: dict[str, Any] = {"seed": 3, "check_invariants": True}
    options |= {"connectivity": 0.3, "rewire_every_n_steps": 3, "rewire_until": None} if name == "SNFS" else {"l1": 0.05}
    method, data = load(name), batches(24)

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        callback = method(**options)
        net = callback.prepare(network())
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        return net, optimizer, callback.attach(net, optimizer, total_steps=len(data))

    net, optimizer, rewiring = begin()
    train(net, optimizer, data[:10])
    states = copy.deepcopy((net.state_dict(), optimizer.state_dict(), rewiring.state_dict()))
    rest = train(net, optimizer, data[10:])
    again, optimizer, rewiring = begin()
    for one, state in zip((again, optimizer, rewiring), states, strict=True):
        one.load_state_dict(state)
    assert train(again, optimizer, data[10:]) == rest
    for mine, theirs in zip(converted_tensors(net), converted_tensors(again), strict=True):
        assert torch.equal(mine.slots.places, theirs.slots.places) and torch.equal(mine.theta, theirs.theta)
        assert (mine.slots.born > 10).any()  # the resumed run has rewired


def test_snfs_grows_where_the_momentum_is_largest() -> None:
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    class Watched(load("SNFS")):  # type: ignore[misc]
        def rebirth(self, item: Any, slots: torch.Tensor, places: torch.Tensor | None = None) -> None:
            before = item.tensor.slots.places.clone()
            super().rebirth(item, slots, places)
            assert places is not None
            moment = self.moments[item.tensor.name].abs().reshape(-1).clone()
            kept = torch.ones(len(before), dtype=torch.bool)
            kept[slots] = False
            moment[before[kept]] = -1
            # (a connection that would be dropped and grown again stays, and is among the kept)
            assert set(places.tolist()) == set(moment.topk(len(places)).indices.tolist())
            seen.append((item.tensor.name, slots, places))

    callback = Watched(0.3, drop_fraction=0.4, rewire_every_n_steps=4, rewire_until=None, momentum=0.5)
    net = callback.prepare(network())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    callback.attach(net, optimizer, total_steps=16)
    data = batches(16)
    # compute the moment by hand from the gradients of a dense twin
    moment = torch.zeros(12, 16)
    for i, batch in enumerate(data):
        twin = network()
        with torch.no_grad():
            for layer in (0, 2):
                twin[layer].weight.copy_(net[layer].weight)  # type: ignore[index, union-attr, operator]
                twin[layer].bias.copy_(net[layer].bias)  # type: ignore[index, union-attr, operator]
        (twin(batch[0]) - batch[1]).square().mean().backward()
        moment.lerp_(twin[0].weight.grad, 0.5)  # type: ignore[index, union-attr, arg-type]
        train(net, optimizer, [batch])
        torch.testing.assert_close(callback.moments["0.weight"], moment, rtol=1e-4, atol=1e-6, msg=f"step {i}")
    assert {name for name, *_ in seen} == {"0.weight", "2.weight"}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 4)])
def test_exactly_n_of_m_at_every_step(n: int, m: int) -> None:
    callback = load("NM")(n=n, m=m, l1=0.05, seed=1, check_invariants=True)
    net = callback.prepare(network())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    callback.attach(net, optimizer)
    tried: dict[str, set[int]] = {}
    for batch in [*batches(40)]:
        for name, _, _, slots in converted_tensors(net):
            per_group = torch.bincount(slots.places // m, minlength=slots.total // m)
            assert bool((per_group == n).all())
            tried.setdefault(name, set()).update(slots.places.tolist())
        train(net, optimizer, [batch])
    assert all(len(places) > 1.3 * n / m * (192, 96)[i] or n == 3 for i, places in enumerate(tried.values()))
    with pytest.raises(ValueError, match="expected a multiple of m = 5"):
        load("NM")(n=1, m=5).prepare(network())


def test_places_are_uniform_within_their_group() -> None:
    method = load("NM")(n=1, m=4)
    groups = torch.arange(4000)
    drawn = method.shuffled(7, 0, groups, groups * 4 + 1)  # place 1 of each group is taken
    assert bool((drawn[:, -1] % 4 == 1).all())
    counts = torch.bincount(drawn[:, 0] % 4, minlength=4).tolist()
    assert counts[1] == 0 and all(1200 < counts[i] < 1470 for i in (0, 2, 3))  # 1333 +- 30


def test_a_state_of_another_method_is_refused() -> None:
    callback = load("SNFS")(0.3, rewire_until=None)
    net = callback.prepare(network())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewiring = callback.attach(net, optimizer)
    train(net, optimizer, batches(2))
    state = rewiring.state_dict()
    assert sorted(state["extra"]["moments"]) == ["0.weight", "2.weight"]
    rewiring.remove()
    other = RigL(rewire_until=None).attach(net, optimizer)
    with pytest.raises(ValueError, match="The checkpoint is of another method: RigL keeps no moments"):
        other.load_state_dict(state)
    assert "extra" not in DeepR().state_dict()
