"""Ranks that start unequal are made equal or refused by name, and stay equal: DDP, uneven data, resume, the check on demand."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lightning_deepr import SET, DeepR, SoftDeepR, SparseLinear, _version, adapt, sparsify
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.processes import Processes
from tests.helpers.state import assert_connected

CPU = torch.device("cpu")


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def data(number: int, size: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 12, generator=torch.Generator().manual_seed(number))
    return x, x[:, :4].argmax(1)


def train(net: nn.Module, optimizer: Any, steps: Any, rank: int = 0) -> None:
    """Train; ``rank`` decides the data, and -1 that all ranks have the same."""
    for step in steps:
        x, y = data(1000 * step + rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name.replace("module.", ""): value.clone() for name, value in net.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")


# -- unequal starts ----------


def started(case: str, rank: int) -> tuple[nn.Module, Any]:
    """Build a network that differs between the ranks, and a callback."""
    if case == "SparseLinear":
        with torch.random.fork_rng():
            torch.manual_seed(rank)
            return nn.Sequential(SparseLinear(12, 16, 0.3), nn.ReLU(), SparseLinear(16, 4, 0.3)), DeepR(l1=0.02)
    if case == "largest":
        return sparsify(mlp(rank), 0.3, init="largest"), DeepR(l1=0.02)
    if case == "seed":
        return sparsify(mlp(), 0.3, seed=rank), DeepR(l1=0.02)
    if case == "seed of the callback":
        return sparsify(mlp(), 0.3), DeepR(l1=0.02, seed=rank)
    if case == "global":
        return sparsify(mlp(rank), 0.3, init="largest", scope="global"), DeepR(l1=0.02, scope="global")
    if case == "SET":
        return sparsify(mlp(), 0.3, seed=rank), SET(rewire_every_n_steps=2, seed=rank)
    if case == "difference":
        return adapt(mlp(rank), 0.3, seed=rank), DeepR(l1=0.02)
    callback = SoftDeepR(0.3, temperature=1e-5, l1=1e-3, seed=rank)
    return callback.prepare(mlp()), callback


CASES = ["SparseLinear", "largest", "seed", "seed of the callback", "global", "SET", "soft", "difference"]


def train_unequal(rank: int, case: str, attach_first: bool) -> Any:
    net, callback = started(case, rank)
    ddp = None if attach_first else DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    callback.check_ranks_every_n_steps = 5
    callback.check_invariants = True
    rewiring = callback.attach(net, optimizer, total_steps=20)
    ddp = ddp or DistributedDataParallel(net)
    first = state(net)
    train(ddp, optimizer, range(10), rank)
    out = net(data(77)[0]).detach()
    rewiring.remove()
    return first, state(net), out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.feature("Ranks: processes that start unequal under DDP take those of rank 0 (said)")
def test_ddp_takes_the_connections_of_rank_0(case: str, processes: Processes) -> None:
    (first, last, out), (first_1, last_1, out_1) = processes.run(train_unequal, case, False)
    assert_same(first, first_1)
    assert_same(last, last_1)
    assert torch.equal(out, out_1)
    assert any(not torch.equal(first[name], last[name]) for name in first if "places" in name or "original" in name)
    bases = [name for name in last if name.endswith(".base")]  # a frozen weight is rank 0's, and stays
    assert len(bases) == 2 * (case == "difference")
    assert all(torch.equal(last[name], mlp().get_parameter(name.replace("parametrizations.", "")[:-7])) for name in bases)
    told = [line for line in processes.said[0] if "all ranks take those of rank 0" in line]
    apart = 1 + (case in ("SET", "soft"))  # there the callback has another seed, too, and begins later
    assert len(told) == apart and ("seed" if case == "seed of the callback" else "`0.weight`") in told[0]
    assert not any("take those of rank 0" in line for line in processes.said[1])


@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:4])])
@pytest.mark.feature("Ranks: processes that start unequal, attached before DDP", refused=True)
def test_without_ddp_unequal_ranks_are_refused(case: str, processes: Processes) -> None:
    for error in processes.errors(train_unequal, case, True):
        assert re.search(r"other (connections|seed or length).* on rank 1 than on rank 0.*check_ranks_every_n_steps=0", error)


def forward_without_a_callback(rank: int) -> Tensor:
    net, _ = started("SparseLinear", rank)
    return DistributedDataParallel(net)(data(3)[0]).detach()


def test_without_a_callback_the_ranks_compute_alike(processes: Processes) -> None:
    one, other = processes.run(forward_without_a_callback)
    assert torch.equal(one, other)


def train_apart(rank: int) -> dict[str, Tensor]:
    net = sparsify(mlp(rank), 0.3, seed=rank)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=0.02, seed=rank, check_ranks_every_n_steps=0).attach(net, optimizer)
    train(net, optimizer, range(3 + rank), rank)  # an ensemble: nothing is communicated
    assert_connected(net)
    return state(net)


def test_ranks_that_train_networks_of_their_own(processes: Processes) -> None:
    one, other = processes.run(train_apart)
    assert not torch.equal(one["0.parametrizations.weight.0.places"], other["0.parametrizations.weight.0.places"])


def train_before_the_group(rank: int, case: str, meeting: str) -> Any:
    dist.destroy_process_group()  # the processes know nothing of each other while they convert and attach
    net, callback = started(case, rank)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    callback.check_ranks_every_n_steps = 5
    rewiring = callback.attach(net, optimizer, total_steps=20)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    ddp = DistributedDataParallel(net)
    first = state(net)
    train(ddp, optimizer, range(10), rank)
    rewiring.remove()
    return first, state(net), net(data(77)[0]).detach()


@pytest.mark.parametrize("case", ["SparseLinear", "seed", "difference"])
@pytest.mark.feature("Ranks: a process group that appears after the conversion")
def test_a_group_that_appears_after_the_conversion(case: str, processes: Processes, tmp_path: Path) -> None:
    (first, last, out), (first_1, last_1, out_1) = processes.run(train_before_the_group, case, str(tmp_path / "late"))
    assert_same(first, first_1)
    assert_same(last, last_1)
    assert torch.equal(out, out_1)
    assert any(not torch.equal(first[name], last[name]) for name in first if "places" in name)
    assert any("all ranks take those of rank 0" in line for line in processes.said[0])


# -- what can't be replaced ----------


def differ(rank: int, what: str) -> None:
    if what == "version" and rank == 1:
        _version.__version__, kept = "0.0.9", _version.__version__
        try:
            DistributedDataParallel(sparsify(mlp(), 0.3))
        finally:
            _version.__version__ = kept
    connectivity = 0.3 + 0.1 * rank if what == "connections" else 0.3
    names = ["0"] if what == "names" and rank else ["0", "2"]
    net = sparsify(mlp(), connectivity, target_modules=names)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options: dict[str, Any] = {"rewire_every_n_steps": 1 + rank} if what == "settings" else {}
    callback: Any = SET() if what == "class" and rank else DeepR(l1=0.02, **options)
    if what == "step":
        rewiring = callback.attach(net, optimizer, total_steps=20)
        entry = copy.deepcopy(rewiring.state_dict())
        for one in entry["tensors"].values():
            one["step"] += rank
        rewiring.load_state_dict(entry)
    elif what != "callback" or rank == 0:
        callback.check_ranks_every_n_steps = 0 if what == "callback" else None
        if what != "connections" and what != "names":
            callback.attach(net, optimizer, total_steps=20)
    DistributedDataParallel(net)


@pytest.mark.parametrize(("what", "words"), [
    ("version", r"Rank 1 runs lightning-deepr 0\.0\.9, rank 0"),
    ("connections", r"`0\.weight`: expected the same connections on every rank, found \d+ on rank 0 and \d+ on rank 1"),
    ("names", r"expected `0\.weight`, `2\.weight` as on rank 0, found `0\.weight` on rank 1"),
    ("settings", r"rewire_every_n_steps: expected the same on every rank, found 1 on rank 0 and 2 on rank 1"),
    ("class", r"class: expected the same on every rank, found DeepR on rank 0 and SET on rank 1"),
    ("step", r"steps: expected the same"),
    ("callback", r"1 callbacks are at work on the network of rank 0, 0 on that of rank 1"),
])  # fmt: skip
@pytest.mark.feature("Ranks: another architecture, K or version of the package on a rank", refused=True)
def test_what_cannot_be_replaced_is_refused_on_every_rank(what: str, words: str, processes: Processes) -> None:
    errors = processes.errors(differ, what)
    assert all(re.search(words, error) for error in errors), errors
    assert errors[0].partition("\n")[0] == errors[1].partition("\n")[0]  # the same words


# -- while they train ----------


def drift(rank: int, what: str) -> None:
    net, calls = sparsify(mlp(), 0.3), iter(range(100))
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=0.02, check_ranks_every_n_steps=4).attach(net, optimizer)
    train(ddp, optimizer, range(5), rank)
    if rank == 1:
        one = list(converted_tensors(net))[1]
        if what == "theta":
            with torch.no_grad():
                one.theta[0] += 1e-6
        else:  # a step that this rank leaves out for one tensor
            optimizer.register_step_pre_hook(lambda *_: setattr(one.theta, "grad", None) if next(calls) == 0 else None)
    train(ddp, optimizer, range(5, 10), rank)


@pytest.mark.parametrize("what", ["theta", "steps"])
@pytest.mark.feature("Ranks: check_ranks_every_n_steps finds drifting ranks", refused=True)
def test_the_check_names_rank_step_and_tensor(what: str, processes: Processes) -> None:
    for error in processes.errors(drift, what):
        if what == "theta":
            assert re.search(r"`2\.weight`, rank 1, step 8: its theta differs from rank 0's \(step 8\)", error), error
        else:
            assert re.search(r"`2\.weight`, rank 1, step 7: its steps differ from rank 0's \(step 8\)", error), error


def uneven(rank: int, optimizer_name: str, joined: bool) -> Any:
    net = sparsify(mlp(), 0.3)
    ddp = DistributedDataParallel(net)
    make = {"SGD": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), "Adam": lambda p: torch.optim.Adam(p, lr=0.02)}
    optimizer = make[optimizer_name](net.parameters())
    callback = DeepR(check_invariants=True)
    rewiring = callback.attach(net, optimizer, total_steps=60)
    for epoch in range(2):
        with Join([ddp]):  # each epoch rank 0 has 10 batches, rank 1 has 17
            train(ddp, optimizer, range(100 * epoch, 100 * epoch + 10 + 7 * rank), rank)
        middle = state(net)
    steps = [tensor.step for tensor in callback.tracked]
    kept = [
        {name: value.clone() for name, value in optimizer.state[one.theta].items() if isinstance(value, Tensor)}
        for one in converted_tensors(net)
    ]
    assert_connected(net)
    out = net(data(5)[0]).detach()
    rewiring.remove()
    return middle, out, steps, kept


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.feature("Ranks: uneven data under Join")
def test_uneven_data_under_join(optimizer: str, processes: Processes) -> None:
    (one, out, steps, kept), (other, out_1, steps_1, kept_1) = processes.run(uneven, optimizer, True)
    assert steps == steps_1 == [34, 34]
    for mine, theirs in zip(kept, kept_1, strict=True):
        assert_same(mine, theirs)
    assert {n: v.tolist() for n, v in one.items() if "places" in n} == {
        n: v.tolist() for n, v in other.items() if "places" in n
    }
    assert_same(one, other)
    assert torch.equal(out, out_1)


def unused(rank: int) -> dict[str, Tensor]:
    net = sparsify(mlp(), 0.3)

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = net, sparsify(nn.Linear(12, 4), 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if rank == 0 else self.other(x)

    module = Skipping()
    ddp = DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    DeepR(l1=0.02, check_ranks_every_n_steps=1).attach(module, optimizer)
    train(ddp, optimizer, range(6), rank)
    return state(module)


@pytest.mark.feature("Ranks: unused parameters (find_unused_parameters=True)")
def test_a_layer_that_one_rank_does_not_reach(processes: Processes) -> None:
    assert_same(*processes.run(unused))


# -- resume with another number of ranks ----------


def part(rank: int, steps: tuple[int, int], saved: Any) -> Any:
    """Train some steps with the same data on all ranks: the mean of equal gradients is exact, so one process is the oracle."""
    net = sparsify(mlp(), 0.3)
    if saved is not None:
        net.load_state_dict(saved[0])
    ddp = DistributedDataParallel(net) if dist.get_world_size() > 1 else net
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    rewiring = DeepR(temperature=1e-6, check_invariants=True).attach(net, optimizer, total_steps=30)
    if saved is not None:
        optimizer.load_state_dict(saved[1])
        rewiring.load_state_dict(saved[2])
    train(ddp, optimizer, range(*steps), -1)
    result = copy.deepcopy((state(net), optimizer.state_dict(), rewiring.state_dict()))
    rewiring.remove()
    return result


@pytest.mark.feature("Ranks: resumed on another number of processes, exactly")
def test_a_resume_with_another_number_of_ranks_is_exact(processes: Processes) -> None:
    whole = processes.run(part, (0, 30), None, ranks=1)[0]
    first = processes.run(part, (0, 10), None, ranks=2)[0]
    second = processes.run(part, (10, 20), first, ranks=1)[0]
    third = processes.run(part, (20, 30), second, ranks=2)
    for one in third:
        assert_same(whole[0], one[0])
        assert whole[2]["tensors"] == one[2]["tensors"]
