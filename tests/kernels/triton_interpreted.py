"""The Triton kernels in Triton's interpreter, on CPU tensors, give the same results as PyTorch.

The interpreter has to be chosen before Triton is imported. ``tests/kernels/test_triton.py`` therefore runs this file in a
process of its own:

    TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreted.py
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_deepr import DeepR, TurnoverTarget, kernels, sparsify
from lightning_deepr.kernels.cpu.fields import GPU_ROW_WORDS, MOST_STATES, GpuHeader, GpuRow, Row, StateRow
from lightning_deepr.kernels.gpu import gate
from tests.helpers.kernel_steps import (
    LR,
    OPTIMIZERS,
    SHARES,
    SIZES,
    Run,
    Size,
    let_die,
    network,
    pretrained,
    signs_by_place,
    step_separately,
)
from tests.helpers.regression import SEED, batches, loss_of, mlp
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas

assert os.environ.get("TRITON_INTERPRET") == "1", "Run tests/kernels/test_triton.py, or set TRITON_INTERPRET=1."
pytest.importorskip("triton")

from lightning_deepr.compute import gpu_check as linear_check  # noqa: E402
from lightning_deepr.compute import sparse_gpu  # noqa: E402
from lightning_deepr.kernels.gpu import rewire as triton_rewire  # noqa: E402
from lightning_deepr.kernels.gpu import step as triton_step  # noqa: E402
from lightning_deepr.training import gpu_check  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*an int and means one single connection"),
    pytest.mark.filterwarnings("ignore:A backward pass reached"),
]
ALPHA = 1 / 64  # LR * ALPHA is exact in every dtype
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat CPU tensors like CUDA tensors, as if the kernels had passed their check."""
    monkeypatch.setattr(gate, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(gate, "_verdicts", {("rewiring", CPU, dtype): True for dtype in DTYPES})
    gate._verdicts.update({("sparse linear layers", CPU, dtype): False for dtype in DTYPES})


@pytest.fixture
def pytorch(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs another one without any kernels."""

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(gate, "DEVICE_TYPES", set())
            patch.setattr(kernels, "available", lambda: False)
            return function()

    return run


def test_constants_are_those_of_the_lists() -> None:
    """The constants of the kernels are written out one by one: each must be the position of the word of its name."""
    words = {name: position for kind in (GpuHeader, Row, GpuRow, StateRow) for name, position in kind.__members__.items()}
    assert {name: getattr(triton_rewire, name).value for name in words} == words
    assert (triton_rewire.HEADER.value, triton_rewire.FIELDS.value) == (len(GpuHeader), GPU_ROW_WORDS)
    assert (triton_rewire.STATE_WORDS.value, triton_rewire.MOST_STATES.value) == (len(StateRow), MOST_STATES)


def test_places_by_rank(launches: list[int], pytorch: Run) -> None:
    """The draws of dense tensors go to their reborn slots by rank: by rejection up to three quarters, from a list above."""
    sizes: list[Size] = [(20, 30, 60), (20, 30, 350), (20, 30, 449), (20, 30, 500), (20, 30, 599)]
    fast, plain = network(sizes), network(sizes)
    steps = []
    for net in (fast, plain):
        for slots in all_slots(net):
            slots.ranked = True
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=0.0, lr_scale=1, newborn="start", seed=SEED).attach(net, optimizer)
        steps.append(optimizer.step)
    for step, share in enumerate((0.3, 1.0, 0.02)):
        for net in (fast, plain):
            let_die(net, share, step)
        steps[0]()
        pytorch(steps[1])
        assert_equal_states(state_of(fast), state_of(plain))


def direct(function: Callable[[], Any]) -> Any:
    return function()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the steps that the kernels take. There has to be at least one."""
    steps: list[int] = []
    step = triton_step.Table.step

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        steps.append(len(self.tensors))
        return step(self, *args, **options)

    monkeypatch.setattr(triton_step.Table, "step", counted)
    yield steps
    assert steps


def close(fast: nn.Module, plain: nn.Module, step: int, ulps: float) -> None:
    """Compare integers and signs exactly, and theta up to ``ulps`` units in the last place. Then give plain fast's thetas."""
    for a, b, theta, other in zip(all_slots(fast), all_slots(plain), thetas(fast), thetas(plain), strict=True):
        assert torch.equal(a.places, b.places) and torch.equal(a.born, b.born) and torch.equal(a.signs, b.signs)
        assert bool((theta >= 0).all()) and bool((theta[a.born == step] == 0).all())
        off = (theta.detach().double() - other.detach().double()).abs()
        assert bool((off <= ulps * torch.finfo(theta.dtype).eps * other.detach().double().abs().clamp(min=0.1)).all())
        other.data.copy_(theta.data)


def check_steps(
    sizes: Sequence[Size], dtype: torch.dtype, temperature: float, pytorch: Run, shares: Sequence[float] = SHARES
) -> None:
    nets = [network(sizes, dtype), network(sizes, dtype)]
    steps = []
    for net in nets:
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=ALPHA, temperature=temperature, seed=SEED).attach(net, optimizer)
        steps.append(optimizer.step)
    for step, share in enumerate(shares):
        for net in nets:
            let_die(net, share, step)
        steps[0]()
        pytorch(steps[1])
        close(*nets, step, ulps=4 if dtype is torch.bfloat16 else 2 if temperature else 0)


@pytest.mark.parametrize("temperature", [0.0, 1e-3], ids=["no noise", "noise"])
def test_a_step_equals_pytorchs(temperature: float, pytorch: Run, launches: list[int]) -> None:
    check_steps(SIZES["together"], torch.float32, temperature, pytorch, (0.3,) if temperature else (1.0,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "temperature"),
    # the interpreter truncates to bfloat16, but GPUs and PyTorch round: with noise another slot may cross zero
    [(dtype, t) for dtype in DTYPES for t in (0.0, 1e-3) if dtype != torch.bfloat16 or t == 0.0],
    ids=str,
)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_steps_of_any_network(
    sizes: Sequence[Size], dtype: torch.dtype, temperature: float, pytorch: Run, launches: list[int]
) -> None:
    check_steps(sizes, dtype, temperature, pytorch)


@pytest.mark.parametrize(
    ("sizes", "block"),
    [
        ([(20, 20, 190), (20, 20, 199)], 32),
        pytest.param([(100, 100, 4500)], 256, marks=pytest.mark.slow),
        pytest.param([(100, 100, 5000), (300, 300, 20_000)], 1024, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_order_of_the_programs_does_not_matter(
    sizes: Sequence[Size], block: int, pytorch: Run, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are nearly half full, and all slots are reborn: they draw again and again.

    A program that comes first then holds places that belong to the slots of other programs.
    """
    monkeypatch.setattr(triton_step, "BLOCK", block)
    made = triton_step.Table.__init__

    def shuffled(self: Any, *args: Any) -> None:
        made(self, *args)
        order = torch.randperm(len(self.pieces), generator=torch.Generator().manual_seed(0))
        assert len(order) > 10 and self.pieces[order][0, 1] > 0
        self.pieces = self.pieces[order].contiguous()

    monkeypatch.setattr(triton_step.Table, "__init__", shuffled)
    check_steps(sizes, torch.float32, 0.0, pytorch, (1.0, 0.5))


def test_a_connection_of_a_pretrained_network_comes_back_with_its_own_sign(pytorch: Run, launches: list[int]) -> None:
    nets = [pretrained(1), pretrained(1)]
    own = signs_by_place(nets[0])
    steps = []
    for net in nets:
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=0.0, seed=SEED, check_invariants=True).attach(net, optimizer)
        steps.append(optimizer.step)
    came_back = 0
    for step in range(3):
        for net in nets:
            let_die(net, 0.6, step)
        steps[0]()
        pytorch(steps[1])
        assert_equal_states(state_of(nets[0]), state_of(nets[1]))
        for slots, before in zip(all_slots(nets[0]), own, strict=True):
            exceptions = set(slots.exceptions.tolist())
            assert exceptions
            for slot in (slots.born == step).nonzero().view(-1).tolist():
                place = int(slots.places[slot])
                if place in before:
                    assert float(slots.signs[slot]) == before[place]
                    came_back += place in exceptions
    assert came_back > 20


QUICK = ("Adam", "Adagrad", "double state")
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=SLOW) for n in OPTIMIZERS])
def test_the_state_of_the_reborn_starts_anew(name: str, pytorch: Run, launches: list[int]) -> None:
    """The kernel resets the states. PyTorch does if they are too many, or if the kernel can't write them."""
    sizes = [(30, 20, 100), (20, 10, 120), (7, 5, 10)]
    nets = [network(sizes), network(sizes)]
    made = []
    for net in nets:
        made.append(OPTIMIZERS[name](net.parameters()))
        DeepR(l1=1.0, seed=SEED).attach(net, made[-1])
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(thetas(nets[0]), thetas(nets[1]), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        made[0].step()
        pytorch(made[1].step)
        assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
    assert sum(int((slots.born >= 0).sum()) for slots in all_slots(nets[0])) > 20


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
def test_a_step_that_is_made_longer(compiled: bool, pytorch: Run, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the kernels' step: by operations of PyTorch, as on a GPU, or by the CPU's kernel."""
    sizes = [(30, 20, 100), (20, 10, 120), (7, 5, 10)]
    nets = [network(sizes), network(sizes)]
    made = []
    for net in nets:
        made.append(optim.Adam(net.parameters(), lr=0.02))
        DeepR(l1=1.0, seed=SEED, lr_scale="auto").attach(net, made[-1])
    if not compiled:
        monkeypatch.setattr(kernels, "available", lambda: False)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(thetas(nets[0]), thetas(nets[1]), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        made[0].step()
        pytorch(made[1].step)
        assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
    assert sum(int((slots.born >= 0).sum()) for slots in all_slots(nets[0])) > 20


@pytest.mark.parametrize("options", [{"rewire_every_n_steps": 3}, {"rewire_until": 2}], ids=str)
def test_steps_that_do_not_rewire(options: dict[str, int], pytorch: Run, launches: list[int]) -> None:
    sizes = [(30, 20, 100), (20, 10, 190)]
    nets = [network(sizes), network(sizes)]
    steps = []
    for net in nets:
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=ALPHA, seed=SEED, **options).attach(net, optimizer)  # type: ignore[arg-type]
        steps.append(optimizer.step)
    for step in range(6):
        before = [slots.places.clone() for slots in all_slots(nets[0])]
        for net in nets:
            let_die(net, 0.3, step)
        steps[0]()
        pytorch(steps[1])
        assert_equal_states(state_of(nets[0]), state_of(nets[1]))
        rewires = (step + 1) % 3 == 0 if "rewire_every_n_steps" in options else step < 2
        for slots, old in zip(all_slots(nets[0]), before, strict=True):
            assert torch.equal(slots.places, old) != rewires


def test_tensors_that_do_not_always_step_together(pytorch: Run, launches: list[int]) -> None:
    """There are two optimizers, a tensor without a gradient and two dtypes."""
    step_separately(pytorch, ALPHA, 4)
    assert set(launches) == {1, 2}


@pytest.mark.parametrize(
    ("compute", "steps"), [("dense", 15), pytest.param("sparse", 60, marks=pytest.mark.slow)], ids=["dense", "sparse"]
)
def test_a_training_equals_pytorchs(compute: str, steps: int, pytorch: Run, launches: list[int]) -> None:
    """With Adam, dependent layers and a learning rate schedule, all states are equal bit for bit after each step."""
    nets = [mlp(0.3, compute=compute), mlp(0.3, compute=compute)]
    made, schedulers = [], []
    for net in nets:
        made.append(optim.Adam(net.parameters(), lr=0.05))
        schedulers.append(optim.lr_scheduler.ExponentialLR(made[-1], 0.99))
        DeepR(l1=0.6, seed=SEED).attach(net, made[-1])
    for step, batch in enumerate(batches(steps)):
        for net, optimizer, scheduler, run in zip(nets, made, schedulers, (direct, pytorch), strict=True):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            run(optimizer.step)
            scheduler.step()
        assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
        assert step or len(launches) == 1
    assert sum(int((slots.born >= 0).sum()) for slots in all_slots(nets[0])) > 20


# -- counts that the host does not wait for -----------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """A mode that notes the operations for which the host would wait on a GPU: it needs their result, or its size."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "masked_select",
        "_unique2",
        "unique_dim",
        "repeat_interleave",
        "is_nonzero",
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waited: list[str] = []
        self.seen = 0
        for name in ("tolist", "numpy"):  # these do not go through the dispatcher
            method = getattr(Tensor, name)
            monkeypatch.setattr(Tensor, name, lambda t, m=method, n=name: self.waited.append(n) or m(t))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in ("index", "index_put_") else []
        self.seen += 1
        if name in self.WAITING or masks:
            self.waited.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["Triton", "PyTorch"])
def test_the_host_waits_for_nothing(way: str, pytorch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host does not wait in an ordinary step. The version in PyTorch shows that the test would see it."""
    net = network([(30, 20, 100), (20, 10, 120)])
    optimizer = OPTIMIZERS["double state"](net.parameters())
    callback = DeepR(l1=ALPHA, temperature=1e-4, seed=SEED, lr_scale=1.0)
    callback.attach(net, optimizer)
    run = direct if way == "Triton" else pytorch
    let_die(net, 0.4, 0)
    run(optimizer.step)
    for hook in callback._runs.of(optimizer).hooks:
        hook.remove()
    for step in range(1, 4):
        let_die(net, 0.4, step)
        optimizer.step()
        with monkeypatch.context() as patch, Watch(patch) as watch:
            run(lambda: callback.on_after_optimizer_step(optimizer=optimizer))
        assert watch.seen > 5
        assert bool(watch.waited) == (way == "PyTorch"), watch.waited
    with monkeypatch.context() as patch, Watch(patch) as watch:
        assert callback.statistics()["deepr/0.weight/turnover"] > 0.1
    assert watch.waited  # the host reads when statistics are asked for


def test_the_statistics_are_those_of_pytorch(pytorch: Run, launches: list[int]) -> None:
    nets = [network([(30, 20, 100), (20, 10, 120)]), network([(30, 20, 100), (20, 10, 120)])]
    callbacks, steps = [DeepR(l1=0.0, seed=SEED, rewire_every_n_steps=2) for _ in nets], []
    for net, callback in zip(nets, callbacks, strict=True):
        optimizer = optim.SGD(net.parameters(), lr=LR)
        callback.attach(net, optimizer)
        steps.append(optimizer.step)
    for step in range(8):
        for net in nets:
            let_die(net, 0.4, step)
        steps[0]()
        pytorch(steps[1])
        if step == 4:
            states = [callback.state_dict()["tensors"] for callback in callbacks]
            assert states[0] == states[1] and states[0]["0.weight"]["reborn"] == 2 * 40 + 0
    found = [callback.statistics() for callback in callbacks]
    assert found[0] == found[1] and found[0]["deepr/0.weight/turnover"] == pytest.approx(0.2)
    later = callbacks[0].statistics()
    assert sum(found[0].values()) > 0 and {later[key] for key in later if key.endswith(("turnover", "deaths"))} == {0.0}


def test_alpha_follows_the_turnover_as_in_pytorch(pytorch: Run, launches: list[int]) -> None:
    """The host reads the counts at the ends of intervals and for statistics. The training is equal bit for bit."""
    sizes = [(30, 20, 100), (20, 10, 120)]
    nets, made, callbacks = [network(sizes), network(sizes)], [], []
    for net in nets:
        made.append(optim.SGD(net.parameters(), lr=LR))
        callbacks.append(DeepR(l1=TurnoverTarget(0.3, interval=4), seed=SEED, rewire_every_n_steps=2))
        callbacks[-1].attach(net, made[-1], total_steps=20)
    alphas = []
    for step in range(14):
        for net in nets:
            let_die(net, (0.7, 0.1)[step // 4 % 2], step)
        made[0].step()
        pytorch(made[1].step)
        assert_equal_states(state_of(nets[0]), state_of(nets[1]))
        alphas.append([callback.tracked[0].steering.alpha for callback in callbacks])  # type: ignore[union-attr]
        if step == 9:  # in the middle of an interval
            states = [callback.state_dict() for callback in callbacks]
            assert states[0] == states[1] and states[0]["tensors"]["0.weight"]["steering"]["reborn"] > 0
    assert all(one == other for one, other in alphas) and len({one for one, _ in alphas}) == 4
    assert callbacks[0].state_dict() == callbacks[1].state_dict()


def test_the_host_waits_at_the_end_of_an_interval_only(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network([(30, 20, 100), (20, 10, 120)])
    optimizer = optim.SGD(net.parameters(), lr=LR)
    callback = DeepR(l1=TurnoverTarget(0.3, interval=5), seed=SEED, lr_scale=1.0)
    callback.attach(net, optimizer, total_steps=20)
    for hook in callback._runs.of(optimizer).hooks:
        hook.remove()
    waited = []
    for step in range(15):
        let_die(net, 0.4, step)
        optimizer.step()
        with monkeypatch.context() as patch, Watch(patch) as watch:
            callback.on_after_optimizer_step(optimizer=optimizer)
        waited.append(watch.waited)
    assert waited == [["tolist"] if step % 5 == 0 else [] for step in range(1, 16)]


def test_a_collapse_is_told_when_the_counts_are_looked_at(launches: list[int]) -> None:
    net = network([(4, 5, 15), (20, 10, 120)])
    optimizer = optim.SGD(net.parameters(), lr=LR)
    callback = DeepR(l1=0.0, seed=SEED)
    callback.attach(net, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(101):
            let_die(net, 0.6, step)
            thetas(net)[1].grad.zero_()
            optimizer.step()
            assert bool(caught) == (step >= 99), step  # the callback looks every 50 steps
    (warning,) = caught
    assert "`0.weight` has collapsed" in str(warning.message)


def test_averages_follow(pytorch: Run, launches: list[int]) -> None:
    states = []
    for run in (direct, pytorch):
        net = mlp(0.3)
        average = AveragedModel(net)
        optimizer = optim.SGD(net.parameters(), lr=0.1)
        DeepR(l1=0.5, seed=SEED).attach(net, optimizer)
        for batch in batches(6):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            run(optimizer.step)
            average.update_parameters(net)
        assert all(bool((slots.born > 0).any()) for slots in all_slots(average.module))
        states.append(state_of(net) + state_of(average.module))
    assert_equal_states(*states)


def test_copies_and_other_addresses_are_followed(pytorch: Run, launches: list[int]) -> None:
    """The kernels' table holds addresses: they have to follow when tensors are loaded, copied or moved."""
    nets = [network([(30, 20, 100), (20, 10, 120)]), network([(30, 20, 100), (20, 10, 120)])]
    record = copy.deepcopy(nets[0].state_dict())
    made, callbacks = [], []
    for net in nets:
        made.append(optim.SGD(net.parameters(), lr=LR, momentum=0.5))
        callbacks.append(DeepR(l1=ALPHA, seed=SEED))
        callbacks[-1].attach(net, made[-1])
    for step in range(6):
        for net, optimizer in zip(nets, made, strict=True):
            let_die(net, 0.4, step)
            if step == 2:
                net.load_state_dict(record)
            if step == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                for theta, slots in zip(thetas(net), all_slots(net), strict=True):
                    theta.data = theta.data.clone()
                    slots.places, slots.born = slots.places.clone(), slots.born.clone()
        made[0].step()
        pytorch(made[1].step)
        assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
    twin = copy.deepcopy(callbacks[0])
    own = twin.statistics()  # a copy of a callback has no network, so it counts no units
    assert not list(twin._runs) and own and own.items() <= callbacks[0].statistics().items()


# -- sparse linear layers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Turn the CPU's kernels off, and count the products that Triton's kernels compute. There has to be at least one."""
    monkeypatch.setattr(kernels, "available", lambda: False)
    gate._verdicts.update({("sparse linear layers", CPU, dtype): True for dtype in DTYPES})
    batches_seen: list[int] = []
    multiply = sparse_gpu._multiply

    def counted(x: Tensor, *arguments: Any) -> Tensor:
        batches_seen.append(x.shape[1])
        return multiply(x, *arguments)

    monkeypatch.setattr(sparse_gpu, "_multiply", counted)
    yield batches_seen
    assert batches_seen


SHAPES: dict[str, tuple[Size, tuple[int, ...]]] = {
    "ordinary": ((20, 30, 90), (7,)),
    "leading dimensions": ((20, 30, 90), (2, 3)),
    "none": ((20, 30, 90), ()),
    "batch 0": ((20, 30, 90), (0,)),
    "batch 1": ((20, 30, 90), (1,)),
    "several tiles": ((5, 60, 200), (70,)),
    "K = 1": ((20, 30, 1), (7,)),
    "K = N": ((6, 7, 42), (7,)),
    "one row": ((1, 90, 40), (7,)),
    "one column": ((50, 1, 20), (7,)),
}
QUICK_SHAPES = ("leading dimensions", "batch 0", "K = 1", "several tiles")


@pytest.mark.parametrize(
    "dtype", [torch.float64, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES if d != torch.float64)]
)
@pytest.mark.parametrize("name", [n if n in QUICK_SHAPES else pytest.param(n, marks=SLOW) for n in SHAPES])
def test_a_sparse_layer_equals_the_dense_one(name: str, dtype: torch.dtype, products: list[int]) -> None:
    (rows, columns, count), leading = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    found = []
    x = torch.randn(*leading, columns, generator=generator).to(dtype)
    dy = torch.randn(*leading, rows, generator=generator).to(dtype)
    for compute in ("sparse", "dense"):
        torch.manual_seed(0)
        layer = sparsify(nn.Linear(columns, rows, dtype=dtype), count, compute=compute, seed=SEED)
        own = x.clone().requires_grad_()
        y = layer(own)
        before = len(products)
        y.backward(dy)
        assert (len(products) == before + 1) == (compute == "sparse")
        (theta,) = thetas(layer)
        found.append([y, own.grad, theta.grad, layer.bias.grad])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=20 * torch.finfo(dtype).eps, atol=60 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("steps", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_sparse_training_equals_the_dense_one(steps: int, products: list[int], launches: list[int]) -> None:
    """The order of the connections follows a rewiring, and the connectivity is equal at every step."""
    nets = [mlp(0.3, compute=compute).double() for compute in ("sparse", "dense")]
    made = []
    for net in nets:
        made.append(optim.Adam(net.parameters(), lr=0.05))
        DeepR(l1=0.6, seed=SEED).attach(net, made[-1])
    for step, batch in enumerate(batches(steps)):
        for net, optimizer in zip(nets, made, strict=True):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()
        for a, b, theta, other in zip(*map(all_slots, nets), *map(thetas, nets), strict=True):
            assert torch.equal(a.places, b.places), step
            torch.testing.assert_close(theta, other, rtol=0, atol=1e-9)
    assert sum(int((slots.born >= 0).sum()) for slots in all_slots(nets[0])) > 10


def test_what_a_sparse_layer_refuses(products: list[int]) -> None:
    net = mlp(0.3, compute="sparse")
    optimizer = optim.SGD(net.parameters(), lr=LR)
    DeepR(l1=0.0, seed=SEED).attach(net, optimizer)
    ((x, _),) = batches(1)
    y = net(x.requires_grad_())
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    let_die(net, 0.5, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- the check before the first use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [5, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])], ids=str)
def test_the_check_is_passed(dtype: torch.dtype, sizes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SIZES", gpu_check.SIZES[:sizes])
    monkeypatch.setattr(linear_check, "LAYERS", linear_check.LAYERS[: sizes - 4])
    monkeypatch.setattr(gate, "_verdicts", {})
    monkeypatch.setattr(triton_step, "BLOCK", 1024)
    net = network([(30, 20, 100)], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu_check.rewires(thetas(net)[0], all_slots(net)[0])
        assert linear_check.multiplies(thetas(net)[0], all_slots(net)[0])
    kept = thetas(net)[0].dtype  # float32 in a narrow network
    assert gate._verdicts == {("rewiring", CPU, kept): True, ("sparse linear layers", CPU, kept): True}


def broken(name: str, patch: pytest.MonkeyPatch) -> str:
    """Break the kernels in one way, and return the text that the warning must contain."""
    if name == "other draws":
        patch.setattr(triton_step, "_birth_stream", lambda seed, step: 1)
        return "places differ"
    if name == "other signs":
        patch.setattr(triton_step, "signed", lambda word: 5)
        return "differ"
    if name == "states forgotten":
        patch.setattr(triton_step, "_bits", lambda start, dtype: 1)
        return "the optimizer's state"
    if name == "noise forgotten":
        patch.setattr(triton_step, "_SCALE", triton_step._DECREMENT)
        return "theta differs"

    class DoesNotCompile:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("ptxas: unknown architecture")

    patch.setattr(triton_rewire, "claim", DoesNotCompile())
    return "RuntimeError: ptxas: unknown architecture"


@pytest.mark.parametrize(
    "name",
    [
        "other draws",
        pytest.param("other signs", marks=SLOW),
        "states forgotten",
        pytest.param("noise forgotten", marks=SLOW),
        "an error of the compiler",
    ],
)
def test_kernels_that_fail_their_check_are_not_used(name: str, pytorch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_verdicts", {})
    monkeypatch.setattr(triton_step, "BLOCK", 1024)
    monkeypatch.setattr(gpu_check, "SIZES", gpu_check.SIZES[:-1])
    said = broken(name, monkeypatch)
    nets = [network([(30, 20, 100), (20, 10, 90)]), network([(30, 20, 100), (20, 10, 90)])]
    made = []
    for net in nets:
        made.append(optim.Adam(net.parameters(), lr=LR))
        DeepR(l1=ALPHA, seed=SEED, temperature=1e-4).attach(net, made[-1])
    monkeypatch.setattr(kernels, "available", lambda: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            for net in nets:
                let_die(net, 0.4, step)
            made[0].step()
            pytorch(made[1].step)
            assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
    (warning,) = caught
    assert "did not pass their check on cpu, torch.float32" in str(warning.message) and re.search(said, str(warning.message))
    assert all(bool((slots.born == 2).any()) for slots in all_slots(nets[0]))


def test_what_the_kernels_do_not_take() -> None:
    net = network([(30, 20, 100)])
    (theta,), (slots,) = thetas(net), all_slots(net)
    assert gpu_check.rewires(theta, slots)
    assert not gpu_check.rewires(torch.zeros(200)[::2], slots) and not gpu_check.rewires(theta.detach().double(), slots)
    assert not gpu_check.rewires(torch.zeros(100, dtype=torch.float8_e4m3fn), slots)
    slots.born = Tensor(torch.zeros(200)).long()[::2]
    assert not gpu_check.rewires(theta, slots)
