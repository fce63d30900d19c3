"""Trainings that hypothesis makes up: sizes, densities, optimizers (also such that hold others), dtypes, methods.

In all of them the invariants hold after each step, theta's dtype is that of its weight or float32, and a copy of everything in
the middle of the training ends where the training ends.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

from lightning_deepr import SET, DeepR, FixedRandom, RigL, sparsify
from lightning_deepr.weights.precision import kept
from tests.helpers.state import all_slots, assert_connected, assert_equal_states, state_of, thetas
from tests.helpers.wrapping_optimizers import SAM, Forwarding, HookedLookahead, Lookahead, Nested, Twice

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

EXAMPLES = int(os.environ.get("LIGHTNING_DEEPR_EXAMPLES", "500"))

# (1e-8, the default eps, is 0 in float16: the biases would be NaN)
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=0.02, eps=1e-4),
    "adamw, amsgrad": lambda p: optim.AdamW(p, lr=0.02, amsgrad=True, eps=1e-4),
    "adam, one by one": lambda p: optim.Adam(p, lr=0.02, foreach=False, eps=1e-4),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, centered=True, eps=1e-4),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, eps=1e-4),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "twice": lambda p: Twice(p, lr=0.02, eps=1e-4),
    "nested": lambda p: Nested(p, lr=0.02),
    "forwarding": lambda p: Forwarding(optim.Adam(p, lr=0.02, eps=1e-4)),
    "lookahead": lambda p: Lookahead(optim.SGD(p, lr=0.1, momentum=0.5), "dict"),
    "lookahead with hooks": lambda p: HookedLookahead(optim.Adam(p, lr=0.02, eps=1e-4), "flat"),
    "sam": lambda p: SAM(list(p), lr=0.02),
}
WITHOUT_STATE = ("lookahead", "lookahead with hooks", "sam", "forwarding")  # their state_dict is not all that they keep
METHODS: dict[str, Callable[..., Any]] = {
    "DeepR": lambda **o: DeepR(**o),
    "SET": lambda l1, temperature, newborn, **o: SET(rewire_every_n_steps=2, **o),
    "RigL": lambda l1, temperature, newborn, **o: RigL(rewire_every_n_steps=2, **o),
    "FixedRandom": lambda l1, temperature, newborn, **o: FixedRandom(**o),
}


@st.composite
def trainings(draw: Any) -> dict[str, Any]:
    rows = st.integers(1, 24)
    sizes = draw(st.lists(rows, min_size=2, max_size=4))
    optimizer = draw(st.sampled_from(sorted(OPTIMIZERS)))
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    return {
        "sizes": sizes,
        "bias": draw(st.booleans()),
        "connectivity": draw(st.one_of(st.floats(0.01, 1.0), st.integers(len(sizes) - 1, 6))),
        "distribution": draw(st.sampled_from(["uniform", "erdos_renyi"])),
        "dtype": draw(st.sampled_from(dtypes[:3] if optimizer in ("sam", "nested") else dtypes)),
        "compute": draw(st.sampled_from(["dense", "sparse", "auto"])),
        "scope": draw(st.sampled_from(["layer", "layer", "global"])),
        "optimizer": optimizer,
        "method": draw(st.sampled_from(["DeepR", "DeepR", "DeepR", "SET", "RigL", "FixedRandom"])),
        "l1": draw(st.sampled_from([0.0, 0.05, 1.0, "auto", None])),
        "temperature": draw(st.sampled_from([0.0, 1e-4])),
        "newborn": draw(st.sampled_from(["start", "neutral"])),
        "lr_scale": draw(st.sampled_from([1.0, 2.5, "auto"])),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "steps": draw(st.integers(2, 7)),
    }


def network(given: dict[str, Any]) -> nn.Module:
    torch.manual_seed(given["seed"] % 1000)
    layers: list[nn.Module] = []
    for size_in, size_out in zip(given["sizes"], given["sizes"][1:], strict=False):
        layers += [nn.Linear(size_in, size_out, bias=given["bias"]), nn.Tanh()]
    net = nn.Sequential(*layers[:-1]).to(given["dtype"])
    options = {name: given[name] for name in ("distribution", "compute", "scope", "seed")}
    if given["method"] != "DeepR":
        options["scope"] = "layer"
    connectivity = given["connectivity"]
    if isinstance(connectivity, int):
        total = sum(a * b for a, b in zip(given["sizes"], given["sizes"][1:], strict=False))
        connectivity = min(connectivity, total)
    return sparsify(net, connectivity, **options)


def attached(given: dict[str, Any], net: nn.Module) -> tuple[Any, Any]:
    optimizer = OPTIMIZERS[given["optimizer"]](net.parameters())
    options = {name: given[name] for name in ("l1", "temperature", "newborn", "seed", "lr_scale")}
    if given["method"] == "DeepR":
        options |= {"scope": given["scope"], "least_per_layer": 0}
    method = METHODS[given["method"]](check_invariants=True, **options)
    return optimizer, method.attach(net, optimizer, total_steps=given["steps"])


def step(given: dict[str, Any], net: nn.Module, optimizer: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(3, given["sizes"][0], generator=generator).to(given["dtype"])
    y = torch.randn(3, given["sizes"][-1], generator=generator).to(given["dtype"])

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    if given["optimizer"] == "sam":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def check(given: dict[str, Any], net: nn.Module, counts: list[int]) -> None:
    found = [slots.count for slots in all_slots(net)]
    assert sum(found) == sum(counts) if given["scope"] == "global" and given["method"] == "DeepR" else found == counts
    assert all(theta.dtype == kept(given["dtype"]) for theta in thetas(net))
    if given["method"] in ("DeepR", "FixedRandom") and all(found) and not all_slots(net)[0].shares:
        assert_connected(net)
    for slots in all_slots(net):
        assert slots.places.unique().numel() == slots.count
        assert slots.weight_dtype == given["dtype"]
        assert torch.equal(slots.signs, slots.signs_at(slots.places))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.feature("Optimizers: 500 made-up trainings, also of optimizers that hold others")
@hypothesis.settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck), database=None
)
@hypothesis.given(trainings())
def test_any_training_keeps_its_invariants_and_resumes(given: dict[str, Any]) -> None:
    try:
        net = network(given)
    except ValueError as error:  # fewer connections than tensors
        hypothesis.assume("Expected at least one for each" not in str(error))
        raise
    counts = [slots.count for slots in all_slots(net)]
    optimizer, rewiring = attached(given, net)
    half = given["steps"] // 2
    kept_state: Any = None
    for number in range(given["steps"]):
        if number == half and given["optimizer"] not in WITHOUT_STATE:
            kept_state = copy.deepcopy((net.state_dict(), optimizer.state_dict(), rewiring.state_dict()))
        step(given, net, optimizer, number)
        check(given, net, counts)
    if kept_state is None:
        return
    again = network({**given, "seed": given["seed"] // 2 + 1})
    again.load_state_dict(kept_state[0])
    other, resumed = attached(given, again)
    other.load_state_dict(kept_state[1])
    resumed.load_state_dict(kept_state[2])
    for number in range(half, given["steps"]):
        step(given, again, other, number)
    assert_equal_states(state_of(again), state_of(net))
