"""Every statistic equals a slow NumPy count over a recorded training."""

from __future__ import annotations

import io
import math
import pydoc
import re
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import nn

import lightning_deepr.kernels as kernels
from lightning_deepr import (
    SET,
    DeepR,
    FixedRandom,
    L1Shrinkage,
    MagnitudePruning,
    RigL,
    SoftDeepR,
    SparseLinear,
    adapt,
    connections,
    connectivity_report,
    sparsify,
)
from lightning_deepr.monitoring.record import stride_of
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.optimizers import sgd
from tests.helpers.paths import ROOT
from tests.helpers.regression import SEED, Regression
from tests.helpers.trainer import trainer

STEPS = 300
EDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3))


def step_of(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    (net(x).square().mean() + (net(x) - 1).abs().mean()).backward()
    optimizer.step()


class Recorded:
    """A training whose places, births and thetas are kept after each step."""

    def __init__(self, callback: Any, net: nn.Module, steps: int, looks: tuple[int, ...] = ()) -> None:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        rewiring = callback.attach(net, optimizer, total_steps=steps)
        self.net, self.tensors = net, list(converted_tensors(net))
        self.places: list[dict[str, np.ndarray]] = []
        self.born: list[dict[str, np.ndarray]] = []
        self.alphas: dict[str, float] = {}
        self.looks: dict[int, dict[str, float]] = {}
        self.keep()
        torch.manual_seed(1)
        for step in range(steps):
            self.alphas = {t.name: t.steering.alpha if t.steering else t.alpha for t in callback.tracked}
            step_of(net, optimizer, torch.randn(16, 30))
            self.keep()
            if step + 1 in looks:
                self.looks[step + 1] = callback.statistics("all")
        rewiring.remove()

    def keep(self) -> None:
        self.places.append({c.name: c.slots.places.numpy().copy() for c in self.tensors})
        self.born.append({c.name: c.slots.born.numpy().copy() for c in self.tensors})


def binned(values: np.ndarray) -> dict[int, int]:
    """Count values in the bins 0, 1, 2-3, 4-7, ..., by their lower ends, up to the last bin with any."""
    top = int(values.max())
    lower = [0, *(2**n for n in range(64) if 2**n <= top)]
    return {a: sum(1 for v in values if a <= v < (max(2 * a, 1) if a else 1)) for a in lower}


def slow_survival(lived: list[int], alive: list[int], steps: int) -> dict[int, float]:
    found, share, number = {}, 1.0, 0
    while 2**number <= steps:
        low = 2 ** (number - 1) if number else 0
        deaths = sum(1 for v in lived if low < v <= 2**number)
        risk = sum(1 for v in lived if v > low) + sum(1 for v in alive if v > low)
        if not risk:
            break
        share *= 1 - deaths / risk
        found[2**number] = share
        number += 1
    return found


def expected(recorded: Recorded, last: int, now: int) -> dict[str, float]:
    """Count everything slowly, for the steps after ``last`` up to ``now``."""
    found: dict[str, float] = {}
    everything: dict[str, list[Any]] = {"lived": [], "alive": [], "theta": [], "ages": []}
    reborn_of_all, births_of_all, tried_of_all, young_of_all, k_of_all, n_of_all = 0, 0, 0, 0, 0, 0
    overlaps = np.zeros(2)
    values = {name: v.numpy() for name, (_, _, v) in connections(recorded.net).items()}
    k_of_all = sum(c.slots.count for c in recorded.tensors)
    for c in recorded.tensors:
        name, places, born = c.name, [p[c.name] for p in recorded.places], [b[c.name] for b in recorded.born]
        deaths = newborn_deaths = 0
        tried, lived = set(places[0].tolist()), []
        for step in range(now):
            for slot in np.flatnonzero(born[step + 1] != born[step]):
                tried.add(int(places[step + 1][slot]))
                lived.append(step - int(born[step][slot]))
                if step >= last:
                    deaths += 1
                    newborn_deaths += born[step][slot] >= step - 1
        k, steps = len(places[0]), now - last
        ages = now - 1 - born[now]
        alive = ages.tolist()
        own = {
            "turnover": deaths / steps / k,
            "newborn_deaths": newborn_deaths / steps,
            "mature_deaths": (deaths - newborn_deaths) / steps,
            "births": deaths / steps,
            "explored": len(tried) / c.slots.total,
            "newborns": sum(1 for b in born[now] if b >= now - 1) / k,
            "age_mean": sum(alive) / k,
            "overlap_start": len(set(places[now].tolist()) & set(places[0].tolist())) / k,
            "overlap_last": len(set(places[now].tolist()) & set(places[last].tolist())) / k,
            "share": k / k_of_all,
            "zeros": sum(1 for v in values[name] if v == 0) / k,
            "alpha": recorded.alphas[name],
            **{f"ages/{a}": n / k for a, n in binned(ages).items()},
            **{f"survival/{a}": s for a, s in slow_survival(lived, alive, now).items()},
        }
        theta = [abs(float(v)) for v in values[name]]
        own |= {
            f"theta/{e:g}": sum(1 for v in theta if e <= v < h) / k for e, h in zip(EDGES, (*EDGES[1:], math.inf), strict=True)
        }
        rows, columns = places[now] // c.slots.columns, places[now] % c.slots.columns
        own |= {f"in_degrees/{a}": n for a, n in binned(np.bincount(rows, minlength=c.slots.rows)).items()}
        own |= {f"out_degrees/{a}": n for a, n in binned(np.bincount(columns, minlength=c.slots.columns)).items()}
        found |= {f"{name}/{key}": value for key, value in own.items()}
        everything["lived"] += lived
        everything["alive"] += alive
        everything["theta"] += theta
        reborn_of_all, births_of_all, tried_of_all = reborn_of_all + deaths, births_of_all + deaths, tried_of_all + len(tried)
        young_of_all += round(own["newborns"] * k)
        n_of_all += c.slots.total
        overlaps += np.array([own["overlap_start"], own["overlap_last"]]) * k
    theta = everything["theta"]
    found |= {
        "turnover": reborn_of_all / (now - last) / k_of_all,
        "births": births_of_all / (now - last),
        "explored": tried_of_all / n_of_all,
        "newborns": young_of_all / k_of_all,
        "age_mean": sum(everything["alive"]) / k_of_all,
        "overlap_start": overlaps[0] / k_of_all,
        "overlap_last": overlaps[1] / k_of_all,
        "zeros": sum(1 for v in theta if v == 0) / k_of_all,
        "alpha": sum(recorded.alphas[c.name] * c.slots.count for c in recorded.tensors) / k_of_all,
        **{f"ages/{a}": n / k_of_all for a, n in binned(np.array(everything["alive"])).items()},
        **{f"survival/{a}": s for a, s in slow_survival(everything["lived"], everything["alive"], now).items()},
        **{
            f"theta/{e:g}": sum(1 for v in theta if e <= v < h) / k_of_all
            for e, h in zip(EDGES, (*EDGES[1:], math.inf), strict=True)
        },
        **slow_units(recorded),
    }
    return {f"deepr/{key}": float(value) for key, value in found.items()}


def slow_units(recorded: Recorded) -> dict[str, int]:
    """Walk over the connections of the chain, unit by unit."""
    pairs = []
    for shape, places, _ in connections(recorded.net).values():
        pairs.append([(p // shape[1], p % shape[1]) for p in places.tolist()])
    sizes = [shape[0] for shape, _, _ in connections(recorded.net).values()]
    without_input = sum(size - len({r for r, _ in own}) for size, own in zip(sizes, pairs, strict=True))
    without_output = sum(size - len({c for _, c in later}) for size, later in zip(sizes[:-1], pairs[1:], strict=True))
    used, nowhere = set(range(sizes[-1])), 0
    for own in reversed(pairs):
        nowhere += sum(1 for r, _ in own if r not in used)
        used = {c for r, c in own if r in used}
    return {
        "units_without_input": without_input, "units_without_output": without_output, "connections_to_nowhere": nowhere
    }  # fmt: skip


def agree(found: dict[str, float], wanted: dict[str, float]) -> None:
    found = {key: value for key, value in found.items() if not key.endswith("/l1")}
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize("backend", ["compiled", "PyTorch"])
def test_every_statistic_equals_a_slow_count_over_a_recorded_training(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "PyTorch":
        monkeypatch.setattr(kernels, "suits", lambda theta: False)
    net = sparsify(network(), 0.1, seed=0)
    recorded = Recorded(DeepR(log_statistics="all", l1=0.05), net, STEPS, looks=(120, STEPS))
    agree(recorded.looks[STEPS], expected(recorded, 120, STEPS))


@pytest.mark.parametrize("method", ["DeepR", "SET"])
def test_the_same_for_a_difference_to_frozen_weights(method: str) -> None:
    """theta, ages and places are those of the difference; the frozen weights do not count."""
    if method == "DeepR":
        callback: Any = DeepR(log_statistics="all", l1=0.05)
    else:
        callback = SET(log_statistics="all", rewire_every_n_steps=5, rewire_until=None)
    recorded = Recorded(callback, adapt(network(), 0.1, seed=0), STEPS, looks=(120, STEPS))
    moved = [set(recorded.places[0][c.name].tolist()) - set(recorded.places[-1][c.name].tolist()) for c in recorded.tensors]
    assert all(moved)
    found = {f"deepr/{key.partition('/')[2]}": value for key, value in recorded.looks[STEPS].items()}
    wanted = expected(recorded, 120, STEPS)
    for key in ("units_without_input", "units_without_output", "connections_to_nowhere"):
        wanted[f"deepr/{key}"] = 0  # every unit has its frozen weights
    if method == "SET":  # it has no alpha, and a newborn is as old as the last update
        absent = {key for key in wanted if key.endswith("/alpha")}
        others = {key for key in wanted if key.rpartition("/")[2] in ("newborn_deaths", "mature_deaths", "newborns")}
        assert others <= found.keys()
        wanted, found = ({k: v for k, v in one.items() if k not in absent | others} for one in (wanted, found))
    agree(found, wanted)


def test_one_k_for_the_network() -> None:
    """Slots move from layer to layer: places, births and lifetimes are followed by (tensor, place)."""
    net = sparsify(network(), 0.1, seed=0, scope="global")
    callback = DeepR(log_statistics="all", scope="global", l1=0.05)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    callback.attach(net, optimizer, total_steps=100)
    tensors = list(converted_tensors(net))
    before = {c.name: dict(zip(c.slots.places.tolist(), c.slots.born.tolist(), strict=True)) for c in tensors}
    tried = {c.name: set(before[c.name]) for c in tensors}
    lived: dict[str, list[int]] = {c.name: [] for c in tensors}
    births = dict.fromkeys(before, 0)
    torch.manual_seed(1)
    for step in range(100):
        step_of(net, optimizer, torch.randn(16, 30))
        for c in tensors:
            now = dict(zip(c.slots.places.tolist(), c.slots.born.tolist(), strict=True))
            lived[c.name] += [step - born for place, born in before[c.name].items() if now.get(place) != born]
            births[c.name] += sum(1 for born in now.values() if born == step)
            tried[c.name] |= set(now)
            before[c.name] = now
    found = callback.statistics("all")
    for c in tensors:
        alive = [99 - born for born in before[c.name].values()]
        wanted = {f"survival/{n}": share for n, share in slow_survival(lived[c.name], alive, 100).items()}
        wanted |= {"explored": len(tried[c.name]) / c.slots.total, "births": births[c.name] / 100}
        wanted |= {"share": c.slots.count / sum(one.slots.count for one in tensors)}
        wanted |= {"connectivity": c.slots.count / c.slots.total}
        for key, value in wanted.items():
            assert found[f"deepr/{c.name}/{key}"] == pytest.approx(value, rel=1e-9), (c.name, key)


def test_a_large_tensor_is_watched_in_a_sample() -> None:
    assert stride_of(1 << 20, 1, 1024) == 1 and stride_of(64 * 10**7, 10**7, 1000) == 1
    stride = stride_of(10**12, 10**6, 10**6)
    assert 10**12 // stride <= 64 * 10**6 and math.gcd(stride, 10**6) == 1
    layer = SparseLinear(100_000, 20_000, 2_000, bias=False, seed=0)
    callback = DeepR(l1=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    callback.attach(layer, optimizer)
    (slots,) = [c.slots for c in converted_tensors(layer)]
    stride, tried = stride_of(slots.total, slots.count, slots.columns), set(slots.places.tolist())
    for _ in range(20):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tried |= set(slots.places.tolist())
    watched = -(-slots.total // stride)
    assert stride > 1 and len(tried) > 10_000
    assert callback.statistics()["deepr/explored"] == sum(1 for place in tried if place % stride == 0) / watched


METHODS: list[tuple[Any, str, set[str]]] = [
    (lambda: DeepR(l1=0.05), "deepr", set()),
    (lambda: SET(rewire_every_n_steps=2, rewire_until=None), "set", {"alpha"}),
    (lambda: RigL(rewire_every_n_steps=2, rewire_until=None), "rigl", {"alpha"}),
    (lambda: FixedRandom(), "fixed_random", {"alpha"}),
]


@pytest.mark.parametrize(("callback", "prefix", "absent"), METHODS)
def test_methods_log_under_their_own_names(callback: Any, prefix: str, absent: set[str]) -> None:
    net = sparsify(network(), 0.2, seed=0)
    method = callback()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    method.attach(net, optimizer, total_steps=20)
    tried = {c.name: set(c.slots.places.tolist()) for c in converted_tensors(net)}
    for _ in range(6):
        step_of(net, optimizer, torch.randn(16, 30))
        for c in converted_tensors(net):
            tried[c.name] |= set(c.slots.places.tolist())
    found = method.statistics("network")
    assert {key.partition("/")[0] for key in found} == {prefix}
    usual = {
        "turnover",
        "newborns",
        "alpha",
        "explored",
        "units_without_input",
        "units_without_output",
        "connections_to_nowhere",
    }
    assert {key.partition("/")[2] for key in found} == usual - absent, "few keys by default"
    total = sum(c.slots.total for c in converted_tensors(net))
    assert found[f"{prefix}/explored"] == pytest.approx(sum(map(len, tried.values())) / total)
    assert method.statistics()[f"{prefix}/0.weight/turnover"] == 0, "counts since the last call"


def test_pruning_and_soft_deep_r() -> None:
    for method, prefix in (
        (MagnitudePruning(0.2), "magnitude_pruning"),
        (L1Shrinkage(0.2, l1=1e-3), "l1_shrinkage"),
        (SoftDeepR(0.2, temperature=1e-6, l1=1e-3), "deepr"),
    ):
        net = method.prepare(network())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        method.attach(net, optimizer, total_steps=4)
        for _ in range(4):
            step_of(net, optimizer, torch.randn(16, 30))
        found = method.statistics("network")
        active, total = (sum(row[key] for row in connectivity_report(net)) for key in ("active", "total"))
        assert found[f"{prefix}/connectivity"] == active / total
        assert f"{prefix}/units_without_input" in found and f"{prefix}/turnover" not in found


def test_a_resumed_training_goes_on_counting() -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, DeepR]:
        net = sparsify(network(), 0.1, seed=0)
        return net, torch.optim.SGD(net.parameters(), lr=0.05), DeepR(l1=0.05, seed=0)

    data = torch.randn(20, 16, 30, generator=torch.Generator().manual_seed(0))
    net, optimizer, callback = begin()
    rewiring = callback.attach(net, optimizer)
    for x in data[:10]:
        step_of(net, optimizer, x)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict(), rewiring.state_dict()), file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    for x in data[10:]:
        step_of(net, optimizer, x)
    again, again_optimizer, other = begin()
    again.load_state_dict(kept[0])
    again_optimizer.load_state_dict(kept[1])
    other.attach(again, again_optimizer).load_state_dict(kept[2])
    for x in data[10:]:
        step_of(again, again_optimizer, x)
    assert other.statistics()["deepr/explored"] == callback.statistics()["deepr/explored"]


def test_every_key_is_defined_in_help_and_in_the_docs() -> None:
    net = sparsify(network(), 0.1, seed=0)
    callback = DeepR(log_statistics="all")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    callback.attach(net, optimizer, total_steps=4)
    step_of(net, optimizer, torch.randn(16, 30))
    names = {re.sub(r"/[\d.e-]+$", "", key).rpartition("/")[2] for key in callback.statistics("all")}
    names |= {"connectivity", "deaths"}
    assert len(names) > 20
    text = pydoc.render_doc(DeepR, renderer=pydoc.plaintext)
    page = (ROOT / "docs/statistics.md").read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"``{name}(/<\w+>)?``", text), name
        assert re.search(rf"`{name}(/<\w+>)?`", page), name


# -- under a Trainer ----------------------------------------------------------------------------------------------------------


class Kept(Logger):
    """A logger that keeps what it gets, and may fail."""

    name, version = "kept", 0

    def __init__(self, fails_from: int | None = None) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}
        self.fails_from, self.calls = fails_from, 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not any(key.startswith("deepr/") for key in metrics):
            return
        self.calls += 1
        if self.fails_from is not None and self.calls >= self.fails_from:
            raise OSError(28, "No space left on device")
        self.rows[step or 0] = dict(metrics)


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        (5, {}, [4, 9, 14, 19]),
        (100, {}, [19]),  # shorter than the interval
        (5, {"log_every_n_steps": 8}, [7, 15]),
        (5, {"log_statistics": "none"}, []),
    ],
)
def test_they_are_logged_at_the_trainers_interval(every: int, options: dict[str, Any], steps: list[int]) -> None:
    logger = Kept()
    trainer(DeepR(0.3, seed=SEED, **options), logger=[logger, Kept()], log_every_n_steps=every).fit(Regression(sgd, 20))
    assert sorted(logger.rows) == steps
    for row in logger.rows.values():
        assert "deepr/turnover" in row and not any("/net." in key for key in row), "few keys"


def test_the_values_of_each_tensor_on_request() -> None:
    for level, key in (("tensors", "deepr/net.0.weight/turnover"), ("all", "deepr/net.0.weight/survival/1")):
        logger = Kept()
        trainer(DeepR(0.3, log_statistics=level), logger=logger, log_every_n_steps=5).fit(Regression(sgd, 10))
        assert all(key in row for row in logger.rows.values()) and logger.rows


# -- bad input ----------------------------------------------------------------------------------------------------------------


def test_a_logger_that_raises_in_the_middle_does_not_end_a_training() -> None:
    broken, whole = Kept(fails_from=2), Kept()
    with pytest.warns(UserWarning, match=r"Kept failed \(OSError.*No space left.*said once") as told:
        trainer(DeepR(0.3), logger=[broken, whole], log_every_n_steps=5).fit(Regression(sgd, 20))
    assert sum("Kept failed" in str(one.message) for one in told) == 1
    assert len(whole.rows) == 4 and len(broken.rows) == 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="log_statistics: expected one of none, network, tensors, all, found 'some'"):
        DeepR(log_statistics="some")
    callback = DeepR()
    with pytest.raises(RuntimeError, match=r"statistics: expected a network, found none.*attach"):
        callback.statistics()
    net = sparsify(network(), 0.1)
    callback.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r'level "all".*log_statistics="all"\), found \'network\''):
        callback.statistics("all")
    with pytest.raises(ValueError, match="level: expected one of network, tensors, all, found 'none'"):
        callback.statistics("none")
    before = callback.statistics("network")
    assert "deepr/turnover" not in before and "deepr/alpha" not in before, "no step yet"
    assert before["deepr/explored"] == pytest.approx(0.1, rel=0.01)
