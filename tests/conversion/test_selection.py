"""The choice of tensors that become sparse, the number of connections of each, and the report."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Accuracy, Metric

from lightning_deepr import connections, connectivity_report, sparsify
from lightning_deepr.conversion.allocation import allocate, check_connectivity, share_out
from lightning_deepr.conversion.selection import candidates
from lightning_deepr.models import LeNet300100
from tests.helpers.layers import Scaled


def counts(module: nn.Module, connectivity: Any, **options: Any) -> dict[str, int]:
    """K of each tensor after a conversion."""
    return {name: places.numel() for name, (_, places, _) in connections(sparsify(module, connectivity, **options)).items()}


# -- how many -----------------------------------------------------------------------------------------------------------------


def falling(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    return {name: density / (i + 1) for i, name in enumerate(shapes)}


@pytest.mark.parametrize(
    ("connectivity", "distribution", "expected"),
    [
        (0.01, "deepr", (1764, 690, 228)),  # .0075 * 235,200, .023 * 30,000, .228 * 1,000
        (0.05, "deepr", (8820, 3450, 1000)),  # 22.8 * .05 is more than all
        (0.01, "uniform", (2352, 300, 10)),
        (0.0001, "uniform", (24, 3, 1)),  # at least 1
        (1.0, "uniform", (235200, 30000, 1000)),
        (0.01, "erdos_renyi", (1810, 668, 184)),
        (0.01, "erk", (1810, 668, 184)),
        (0.5, "erdos_renyi", (102100, 30000, 1000)),  # two full layers give to the first
        (1.0, "erdos_renyi", (235200, 30000, 1000)),
        (0.01, falling, (2352, 150, 3)),
        (2662, "deepr", (1751, 685, 226)),
        (2662, "uniform", (2352, 300, 10)),
        (2662, "erdos_renyi", (1810, 668, 184)),
        (2662, falling, (2499, 159, 4)),
        (3, "deepr", (1, 1, 1)),
        (266200, "deepr", (235200, 30000, 1000)),
        ({"fc1": 0.01, "fc3": 7}, "deepr", (2352, None, 7)),
        ({"fc*": 2662}, "uniform", (2352, 300, 10)),
        ({"*": 0.01, "fc3": 1.0}, "uniform", (2352, 300, 1000)),
    ],
)
def test_counts_on_lenet(connectivity: Any, distribution: Any, expected: tuple[int | None, ...]) -> None:
    found = counts(LeNet300100(), connectivity, distribution=distribution)
    assert tuple(found.get(f"fc{i}.weight") for i in (1, 2, 3)) == expected


def shapes_of(generator: random.Random) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(generator.randint(1, 6)):
        one, other = generator.randint(1, 60), generator.randint(1, 60)
        kind = generator.choice(["linear", "conv1d", "conv2d"])
        size = generator.randint(1, 5)
        layers.append(
            nn.Linear(one, other)
            if kind == "linear"
            else nn.Conv1d(one, other, size)
            if kind == "conv1d"
            else nn.Conv2d(one, other, (size, 3))
        )
    return layers


def exact_erdos_renyi(shapes: list[tuple[int, ...]], budget: int, kernel: bool) -> list[Fraction] | None:
    """Compute the shares from the definition: a common factor that uses the budget, with full layers set aside one by one.

    Returns None if a share is less than one connection: the implementation raises it to 1, which the definition does not.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [Fraction(sum(s if kernel else s[:2]), math.prod(s if kernel else s[:2])) for s in shapes]
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in full]
        if not rest:
            return [Fraction(n) for n in sizes]
        factor = (budget - sum(sizes[i] for i in full)) / sum(raw[i] * sizes[i] for i in rest)
        over = [i for i in rest if factor * raw[i] > 1]
        if not over:
            shares = [Fraction(n) if i in full else factor * raw[i] * n for i, n in enumerate(sizes)]
            return shares if min(shares) >= 1 else None
        full.add(max(over, key=lambda i: raw[i]))


def largest_remainder(shares: list[Fraction], budget: int) -> list[int]:
    whole = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (whole[i] - shares[i], i))
    for i in order[: budget - sum(whole)]:
        whole[i] += 1
    return whole


@pytest.mark.parametrize("distribution", ["erdos_renyi", "erk"])
def test_erdos_renyi_equals_its_definition(distribution: str) -> None:
    generator = random.Random(4)
    compared = full = 0
    while compared < 60:
        layers = nn.Sequential(*shapes_of(generator))
        found = candidates(layers)
        shapes, everything = [c.shape for c in found], sum(c.total for c in found)
        density = generator.choice([0.05, 0.2, 0.6, 0.95])
        for connectivity in (density, max(round(density * everything), len(shapes))):
            budget = round(density * everything) if isinstance(connectivity, float) else connectivity
            exact = exact_erdos_renyi(shapes, budget, kernel=distribution == "erk") if budget >= len(shapes) else None
            if exact is None:
                continue
            mine = list(allocate(found, connectivity, distribution).values())
            assert sum(mine) == budget
            expected = largest_remainder(exact, budget)
            # a tie of two remainders may fall either way in floating point
            assert all(abs(k - e) < 1 + 1e-9 for k, e in zip(mine, exact, strict=True)), (shapes, mine, expected)
            assert sum(abs(k - e) for k, e in zip(mine, expected, strict=True)) <= 2, (shapes, mine, expected)
            compared += 1
            full += any(k == c.total for k, c in zip(mine, found, strict=True))
    assert full > 10


def test_kernel_sizes_count_for_erk_only() -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(20, 20, 5), nn.Conv2d(20, 20, 1))

    # SET: both have (20 + 20) / (20 * 20), so equal densities. RigL: 50 / (20 * 20 * 5 * 5) against 42 / 400.
    assert counts(layers(), 0.05, distribution="erdos_renyi") == {"0.weight": 500, "1.weight": 20}
    assert counts(layers(), 0.05, distribution="erk") == {"0.weight": 283, "1.weight": 237}


def test_counts_of_random_networks_add_up() -> None:
    generator = random.Random(1)
    for _ in range(150):
        found = candidates(nn.Sequential(*shapes_of(generator)))
        totals = [c.total for c in found]
        for distribution in ("erdos_renyi", "erk", "uniform", falling):
            budget = generator.randint(len(totals), sum(totals))
            mine = list(allocate(found, budget, distribution).values())
            assert sum(mine) == budget, "an int is the total exactly"
            assert all(1 <= k <= n for k, n in zip(mine, totals, strict=True))
        density = generator.uniform(1e-4, 1)
        uniform = list(allocate(found, density, "uniform").values())
        assert uniform == [min(max(round(density * n), 1), n) for n in totals]
        if round(density * sum(totals)) >= len(totals):
            assert sum(allocate(found, density, "erdos_renyi").values()) == round(density * sum(totals))


def test_share_out_takes_the_largest_remainders() -> None:
    assert share_out(10, [1, 1, 1], [9, 9, 9], "x") == [4, 3, 3]
    assert share_out(10, [5.5, 2.4, 2.1], [9, 9, 9], "x") == [6, 2, 2]
    assert share_out(10, [100, 1, 1], [4, 9, 9], "x") == [4, 3, 3]  # the rest of a full tensor goes to the others in proportion
    assert share_out(10, [1e9, 1, 1], [10, 10, 10], "x") == [8, 1, 1]  # and every tensor gets at least one


# -- a dict -------------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A network with one of each case that selection distinguishes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 10)
        self.encoder = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 12))
        self.lstm = nn.LSTM(12, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.own = Scaled()
        self.frozen = nn.Linear(9, 9).requires_grad_(False)
        self.norm = nn.LayerNorm((8, 8))
        self.head = nn.Linear(8, 5)
        self.overhead = nn.Linear(8, 5)


LINEAR = {"encoder.0.weight", "encoder.2.weight", "head.weight", "overhead.weight", "attention.out_proj.weight"}
ALL = LINEAR | {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight"}


def test_dict_gives_a_value_per_tensor() -> None:
    found = counts(
        Network(),
        {
            "encoder.*": 30,
            "encoder.2.weight": 0.5,
            "lstm.weight_hh_l0": 9,
            "head.weight": 0.25,
            "embed": 0.1,
            "own": 3,
            "frozen": 2,
        },
        distribution="deepr",  # does not matter
    )
    assert found == {
        "encoder.0.weight": 30,  # `encoder.2.weight` is the longer key for the other
        "encoder.2.weight": 60,
        "lstm.weight_hh_l0": 9,
        "head.weight": 10,
        "embed.weight": 30,  # named, like the two below
        "own.weight": 3,
        "frozen.weight": 2,
    }


def test_dict_splits_an_int_over_the_tensors_of_its_key() -> None:
    assert counts(Network(), {"encoder.*": 33}) == {"encoder.0.weight": 15, "encoder.2.weight": 18}
    assert counts(Network(), {"encoder.*": 0.1}) == {"encoder.0.weight": 10, "encoder.2.weight": 12}
    assert counts(Network(), {"encoder.*": 0.1}, exclude_modules=["encoder.0"]) == {"encoder.2.weight": 12}


def test_two_keys_of_one_length_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"'encoder\.\?' and '\?ncoder\.0' both match `encoder\.0\.weight`"):
        sparsify(Network(), {"encoder.?": 0.1, "?ncoder.0": 0.2})


@pytest.mark.parametrize("connectivity", [1, {"head": 1}])
def test_one_connection_is_asked_about(connectivity: Any) -> None:
    with pytest.warns(UserWarning, match=r"int and means one single connection; write 1\.0"):
        assert (
            counts(nn.Sequential().append(Network().head) if connectivity == 1 else Network(), connectivity).popitem()[1] == 1
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_connectivity(1.0)
        check_connectivity(2)


# -- which --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        ("all", (), ALL),
        ("all-linear", (), LINEAR),
        (["head"], (), {"head.weight"}),  # a suffix ends at a dot: not `overhead`
        (["*head"], (), {"head.weight", "overhead.weight"}),
        (["encoder.*"], (), {"encoder.0.weight", "encoder.2.weight"}),
        (["0", "head.weight"], (), {"encoder.0.weight", "head.weight"}),
        (["lstm.weight_hh_l0"], (), {"lstm.weight_hh_l0"}),
        (["weight_ih_l?"], (), {"lstm.weight_ih_l0"}),
        (["lstm"], (), {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}),
        (["attention.*"], (), {"attention.out_proj.weight", "attention.in_proj_weight"}),
        (["embed", "own", "frozen"], (), {"embed.weight", "own.weight", "frozen.weight"}),
        (r"encoder\.\d+", (), {"encoder.0.weight", "encoder.2.weight"}),  # a single string is a regular expression
        (r".*head", (), {"head.weight", "overhead.weight"}),
        (r"lstm\.weight_.h_l0", (), {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}),
        (lambda name, module: isinstance(module, nn.Embedding) or name == "head", (), {"embed.weight", "head.weight"}),
        ("all", ["encoder.0", "lstm.weight_hh_l0"], ALL - {"encoder.0.weight", "lstm.weight_hh_l0"}),
        ("all", r".*head", ALL - {"head.weight", "overhead.weight"}),
        ("all", "all-linear", ALL - LINEAR),
        ("all", lambda name, module: name.startswith("lstm"), ALL - {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}),
    ],
)
def test_patterns(target: Any, exclude: Any, expected: set[str]) -> None:
    found = counts(Network(), 0.3, target_modules=target, exclude_modules=exclude, distribution="uniform")
    assert found.keys() == expected


class Distance(Metric):
    """A metric with a network of its own, which belongs to the metric and is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(8, 8)
        self.add_state("total", torch.zeros(3, 3))

    def update(self, x: Tensor) -> None:
        self.total += self.features(x).sum()

    def compute(self) -> Tensor:
        return self.total.sum()


def test_all_leaves_metrics_alone() -> None:
    net = nn.ModuleDict({"fc": nn.Linear(8, 8), "distance": Distance(), "accuracy": Accuracy(task="multiclass", num_classes=3)})
    assert counts(net, 0.5).keys() == {"fc.weight"}
    assert "torchmetrics.Metric" in connectivity_report(net).left_out["distance.features.weight"]


def test_all_leaves_what_is_parametrized_otherwise_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.utils.spectral_norm(nn.Linear(8, 8))
    )
    x = torch.randn(3, 8)
    before = net(x).detach()
    assert counts(net, 0.5).keys() == {"0.weight"}
    assert net(x).shape == before.shape
    left_out = connectivity_report(net).left_out
    assert "another parametrization" in left_out["1.weight"]
    assert "name the tensor" in left_out["2.weight_orig"]


def test_a_layer_used_twice_is_converted_once() -> None:
    shared = nn.Linear(8, 8)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    assert counts(net, 0.5) == {"0.weight": 32}
    assert net[0] is net[2]
    assert len(list(net.parameters())) == 2


# -- the report ---------------------------------------------------------------------------------------------------------------


def test_report_says_what_was_left_out_and_why() -> None:
    report = connectivity_report(sparsify(Network(), 0.25, exclude_modules=["head"], distribution="uniform"))
    assert {row["name"] for row in report} == ALL - {"head.weight"}
    assert report.left_out["embed.weight"] == "Embedding: converted only when named"
    assert report.left_out["frozen.weight"] == "requires_grad=False"
    assert "name the tensor" in report.left_out["own.weight"] and "name the tensor" in report.left_out["norm.weight"]
    assert report.left_out["head.weight"] == "not selected"
    assert len(report.left_out) == 5
    for name, why in report.left_out.items():
        assert f"left dense: {name} ({why})" in " ".join(str(report).split())  # long lines are wrapped


def test_report_prints_as_a_table() -> None:
    report = connectivity_report(sparsify(LeNet300100(), 0.01, distribution="deepr"))
    lines = str(report).splitlines()
    assert lines[0].split() == ["name", "shape", "total", "active", "connectivity", "compute"]
    assert [line.split() for line in lines[2:5]] == [
        ["fc1.weight", "300x784", "235,200", "1,764", "0.750%", "sparse"],
        ["fc2.weight", "100x300", "30,000", "690", "2.300%", "sparse"],
        ["fc3.weight", "10x100", "1,000", "228", "22.800%", "sparse"],
    ]
    assert lines[6].split() == ["total", "266,200", "2,682", "1.008%"]
    assert len({line.rindex("  ") for line in (lines[0], *lines[2:5])}) == 1, "the columns are aligned"
    assert repr(report) == str(report)


def test_report_as_data() -> None:
    report = connectivity_report(sparsify(LeNet300100(), 2662))
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["total"], data["active"], data["left_out"]) == (266200, 2662, {})
    assert data["connectivity"] == 2662 / 266200
    assert [row["active"] for row in data["rows"]] == [1810, 668, 184]
    assert [row["shape"] for row in data["rows"]] == [[300, 784], [100, 300], [10, 100]]
    assert len(report) == 3 and report[0]["name"] == "fc1.weight"
    empty = connectivity_report(nn.ReLU())
    assert empty.to_dict()["connectivity"] == 0.0 and "name" in str(empty)


def test_report_as_a_data_frame() -> None:
    report = connectivity_report(sparsify(LeNet300100(), 2662))
    if importlib.util.find_spec("pandas") is None:  # pandas is optional, and the error says so
        with pytest.raises(ImportError, match=r"to_pandas needs pandas, not installed here: pip install pandas$"):
            report.to_pandas()
        return
    frame = report.to_pandas()
    assert list(frame["active"]) == [1810, 668, 184] and list(frame.columns)[:3] == ["name", "shape", "total"]
