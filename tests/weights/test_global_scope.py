"""``scope="global"``, one parameter for the whole network: gradients, copies, averages, Trainer, files and bad input."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_deepr import DeepR, connections, connectivity_report, densify, load_state_dict, sparsify
from lightning_deepr.conversion.sharing import join
from lightning_deepr.files.checkpoint import report_of_checkpoint, save_sparse
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.shared import SharedSlots
from tests.helpers.global_scope import NETWORKS, OPTIMIZERS, RULES, assert_sound, by_connection, counts, network, shared, small
from tests.helpers.regression import SEED, Regression, batches, loss_of, plain_mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of
from tests.helpers.trainer import trainer

# -- gradients ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_gradient_is_the_dense_weights(name: str, compute: str) -> None:
    net, make_input = network(name, compute=compute), NETWORKS[name][1]
    dense = NETWORKS[name][0]()
    dense.load_state_dict(densify(copy.deepcopy(net)).state_dict())
    theta, x = shared(net), make_input()
    for module in (net, dense):
        module(x).sin().sum().backward()
    gradients = []
    for converted in converted_tensors(net):
        prefix, _, tensor = converted.name.rpartition(".")
        gradient = getattr(dense.get_submodule(prefix), tensor).grad.reshape(-1)
        gradients.append(gradient[converted.slots.places] * converted.slots.signs)
    torch.testing.assert_close(theta.grad, torch.cat(gradients), rtol=1e-4, atol=1e-5)


def test_two_passes_and_layers_that_are_left_out() -> None:
    net = small()
    theta, (x, y) = shared(net), batches(1)[0]
    loss_of(net, (x, y)).backward()
    once = theta.grad.clone()  # type: ignore[union-attr]
    theta.grad = None
    for part in (slice(0, 4), slice(4, 8)):  # two micro-batches
        (loss_of(net, (x[part], y[part])) / 2).backward()
    torch.testing.assert_close(theta.grad, once)
    theta.grad = None
    first, second = loss_of(net, (x, y)) / 2, loss_of(net, (x, y)) / 2  # two passes before one backward
    (first + second).backward(retain_graph=True)
    torch.testing.assert_close(theta.grad, once)
    (first + second).backward()  # and again through the same graph
    torch.testing.assert_close(theta.grad, 2 * once)
    theta.grad = None
    net[0](x).sum().backward()  # type: ignore[operator, index]
    own = [slots.own(theta.grad) for slots in all_slots(net)]
    assert bool((own[0] != 0).any()) and bool((own[1] == 0).all())
    with torch.no_grad():
        net(x)
    with torch.inference_mode():
        net(x)
    theta.grad = None
    loss_of(net, (x, y)).backward()
    torch.testing.assert_close(theta.grad, once)


def test_one_split_serves_all_layers() -> None:
    net = small(compute="dense")
    x = batches(1)[0][0]
    names, nodes = Counter[str](), [net(x).sum().grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names[type(node).__name__] += 1
        nodes += [following for following, _ in node.next_functions]
    assert names["SplitWithSizesBackward0"] == 1 and names["AccumulateGrad"] == 3  # theta and two biases


def test_frozen_theta() -> None:
    net = small()
    theta, optimizer = shared(net), torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=0.5).attach(net, optimizer)
    theta.requires_grad_(False)
    before = theta.clone()
    train(net, optimizer, batches(3))
    assert torch.equal(theta, before)
    theta.requires_grad_(True)
    train(net, optimizer, batches(3))
    assert not torch.equal(theta, before)


@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_backward_through_the_connections_of_before_is_refused(compute: str) -> None:
    net = small(compute=compute)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=2.0).attach(net, optimizer)
    batch = batches(1)[0]
    loss = loss_of(net, batch)
    train(net, optimizer, [batch])
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm"])
def test_sparse_and_dense_compute_train_alike(name: str) -> None:
    ends = []
    for compute in ("dense", "sparse"):
        net = network(name, compute=compute).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        DeepR(scope="global", l1=0.3, seed=SEED).attach(net, optimizer)
        torch.manual_seed(3)
        for _ in range(8):
            optimizer.zero_grad()
            net(NETWORKS[name][1]().double()).square().mean().backward()
            optimizer.step()
        ends.append((counts(net), [s.places for s in all_slots(net)], shared(net).detach()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    torch.testing.assert_close(ends[0][2], ends[1][2])


def test_a_compiled_network_computes_the_same() -> None:
    net = small(compute="dense")
    compiled = torch.compile(net, backend="eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=1.0, seed=SEED).attach(net, optimizer)
    seen = set()
    for batch in batches(4):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        gradient = shared(net).grad.clone()  # type: ignore[union-attr]
        optimizer.zero_grad()
        loss_of(compiled, batch).backward()  # type: ignore[arg-type]
        torch.testing.assert_close(shared(net).grad, gradient)
        optimizer.step()
        seen.add(tuple(counts(net)))
    assert len(seen) > 1


# -- copies, averages ---------------------------------------------------------------------------------------------------------


def test_deepcopy_keeps_the_tie_and_nothing_else() -> None:
    net = small()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    DeepR(scope="global", l1=0.5, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(5))
    before = state_of(net)
    replica = copy.deepcopy(net)
    assert shared(replica) is not shared(net)
    assert_equal_states(state_of(replica), before)
    other = OPTIMIZERS["adam"](replica.parameters())
    DeepR(scope="global", l1=0.5, seed=SEED).attach(replica, other)
    train(replica, other, batches(5))
    assert_sound(replica, 54)
    assert_equal_states(state_of(net), before)
    assert not torch.equal(shared(replica), shared(net))


def test_moving_keeps_the_tie() -> None:
    net = small()
    x = batches(1)[0][0]
    expected = net(x)
    net.double()
    assert shared(net).dtype == torch.float64
    torch.testing.assert_close(net(x.double()).float(), expected)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=0.5, check_invariants=True).attach(net, optimizer)
    train(net, optimizer, batches(3))
    assert_sound(net, 54)


def test_a_network_from_meta_is_tied_again() -> None:
    net, source = small().to("meta").to_empty(device="cpu"), small()
    net.load_state_dict(source.state_dict())
    module = Regression(lambda p: torch.optim.SGD(p, lr=0.1), steps=3)
    module.net = net  # type: ignore[assignment]
    trainer(DeepR(scope="global", check_invariants=True)).fit(module)
    assert_sound(net, 54)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_follow_between_layers(use_buffers: bool) -> None:
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    DeepR(scope="global", l1=0.3, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(2))
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.9), use_buffers=use_buffers)
    expected: dict[tuple[int, int], float] = {}
    births: dict[tuple[int, int], int] = {}
    begun = False
    for batch in batches(15):
        train(net, optimizer, [batch])
        now = {c: v[0] for c, v in by_connection(net, *[]).items()}
        born = {
            (layer, place): b
            for layer, s in enumerate(all_slots(net))
            for place, b in zip(s.places.tolist(), s.born.tolist(), strict=True)
        }
        kept = {c: (expected.get(c, 0.0) if births.get(c) == born[c] else 0.0) for c in now}
        expected = {c: 0.9 * kept[c] + 0.1 * now[c] if begun else now[c] for c in now}
        births, begun = born, True
        average.update_parameters(net)
        assert counts(average.module) == counts(net)
        for mine, theirs in zip(all_slots(average.module), all_slots(net), strict=True):
            assert torch.equal(mine.places, theirs.places) and torch.equal(mine.signs, theirs.signs) and mine is not theirs
        found = {c: v[0] for c, v in by_connection(average.module).items()}
        np.testing.assert_allclose([found[c] for c in now], [expected[c] for c in now], rtol=1e-4, atol=1e-6)
    assert len({tuple(c) for c in births}) == 54


# -- Trainer, Fabric, resuming ------------------------------------------------------------------------------------------------


def callback(**options: Any) -> DeepR:
    return DeepR(0.3, scope="global", distribution="uniform", l1=0.3, seed=SEED, check_invariants=True, **options)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("averaging", [False, True])
def test_resume_under_the_trainer_is_exact(tmp_path: Path, kind: str, averaging: bool) -> None:
    def others() -> list[pl.Callback]:
        return [WeightAveraging(avg_fn=get_ema_avg_fn(0.9))] if averaging else []

    whole, second = (Regression(OPTIMIZERS[kind], steps=10) for _ in range(2))
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1)
    trainer(callback(), *others(), saves, max_epochs=2, enable_checkpointing=True).fit(whole)
    path = next(p for p in tmp_path.glob("*.ckpt") if "step=10" in p.name)
    trainer(callback(), *others(), max_epochs=2).fit(second, ckpt_path=path)
    assert_equal_states(state_of(second), state_of(whole))
    recorded = [row["active"] for row in report_of_checkpoint(path)]
    started = [36, 18]
    assert sum(recorded) == sum(started) and recorded != started, "the counts did not change: nothing was tested"


@pytest.mark.parametrize("rule", RULES)
def test_resume_in_a_plain_loop_is_exact(rule: str) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        net = small()
        optimizer = OPTIMIZERS["adam"](net.parameters())
        return net, optimizer, DeepR(scope="global", reactivation=rule, l1=0.5, seed=SEED).attach(net, optimizer)

    net, optimizer, _ = begin()
    train(net, optimizer, batches(20))
    other, its, rewiring = begin()
    train(other, its, batches(20)[:9])
    state = copy.deepcopy((other.state_dict(), its.state_dict(), rewiring.state_dict()))
    third, third_optimizer, third_rewiring = begin()
    for target, one in zip((third, third_optimizer, third_rewiring), state, strict=True):
        target.load_state_dict(one)
    assert counts(third) == counts(other)
    train(third, third_optimizer, batches(20)[9:])
    assert_equal_states(state_of(third, third_optimizer), state_of(net, optimizer))


@pytest.mark.feature('Loops: one K for the network (scope="global"), all three loops')
def test_trainer_fabric_and_plain_loop_agree() -> None:
    module = Regression(OPTIMIZERS["sgd"], steps=15)
    trainer(callback()).fit(module)

    plain = small()
    optimizer = OPTIMIZERS["sgd"](plain.parameters())
    DeepR(scope="global", l1=0.3, seed=SEED).attach(plain, optimizer)
    train(plain, optimizer, batches(15))
    assert_equal_states(state_of(plain), state_of(module))

    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[DeepR(scope="global", l1=0.3, seed=SEED)])
    net = small()
    net, its = fabric.setup(net, OPTIMIZERS["sgd"](net.parameters()))
    for batch in batches(15):
        its.zero_grad()
        fabric.backward(loss_of(net, batch))
        its.step()
    assert_equal_states(state_of(net), state_of(plain))


def test_setup_joins_what_is_converted_with_k_per_tensor() -> None:
    module = Regression(OPTIMIZERS["sgd"], steps=8)
    sparsify(module.net, 0.3, distribution="uniform", seed=SEED)
    trainer(DeepR(scope="global", l1=0.3, seed=SEED)).fit(module)
    assert_sound(module, 54)
    other = Regression(OPTIMIZERS["sgd"], steps=8)
    trainer(DeepR(0.3, scope="global", distribution="uniform", l1=0.3, seed=SEED)).fit(other)
    assert_equal_states(state_of(module), state_of(other))
    theta = shared(module)
    trainer(DeepR(scope="global", l1=0.3, seed=SEED)).fit(module)  # a second fit continues with the same theta
    assert shared(module) is theta
    assert_sound(module, 54)


def test_statistics_tell_where_the_connections_are() -> None:
    net = small()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    deepr = DeepR(scope="global", l1=0.5)
    deepr.attach(net, optimizer)
    train(net, optimizer, batches(5))
    found = deepr.statistics()
    for slots, name in zip(all_slots(net), ("0.weight", "2.weight"), strict=True):
        assert found[f"deepr/{name}/connectivity"] == slots.count / slots.total
        assert found[f"deepr/{name}/mature_deaths"] >= 0
    assert connectivity_report(net).active == 54


# -- checkpoints, densify -----------------------------------------------------------------------------------------------------


def trained(steps: int = 8) -> nn.Module:
    net = small()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    DeepR(scope="global", l1=0.5, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(steps))
    assert counts(net) != [36, 18]
    return net


def same(first: nn.Module, second: nn.Module) -> None:
    mine, theirs = connections(first), connections(second)
    assert list(mine) == list(theirs)
    for name in mine:
        assert torch.equal(mine[name][1], theirs[name][1]) and torch.equal(mine[name][2], theirs[name][2])
    x = batches(1)[0][0]
    torch.testing.assert_close(first(x), second(x))


def test_a_dense_model_is_converted_as_recorded(tmp_path: Path) -> None:
    net = trained()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert (tmp_path / "net.pt").stat().st_size < 20_000
    loaded = load_state_dict(plain_mlp(), tmp_path / "net.pt")
    same(loaded, net)
    assert_sound(loaded, 54)
    assert all_slots(loaded)[0].pool.budgets == [36, 18]  # type: ignore[union-attr]
    again = load_state_dict(small(), tmp_path / "net.pt")  # a network that is converted already, with other counts per layer
    same(again, net)


def test_loading_layer_by_layer() -> None:
    source, net = trained(), small()
    for i in (0, 2):
        net[i].load_state_dict(source[i].state_dict())  # type: ignore[index]
        if i == 0:
            with pytest.raises(RuntimeError, match=r"loaded in part: load `2\.weight`"):
                net(torch.zeros(1, 12))
    same(net, source)
    assert_sound(net, 54)


def test_save_sparse_writes_layers_of_their_own(tmp_path: Path) -> None:
    net = trained()
    path = save_sparse(net, tmp_path / "net.safetensors")
    loaded = load_state_dict(plain_mlp(), path)
    for name, (_, places, values) in connections(net).items():  # files store connections in the order of places
        order = places.argsort()
        assert torch.equal(connections(loaded)[name][1], places[order]) and torch.equal(
            connections(loaded)[name][2], values[order]
        )
    assert all(type(slots) is KSlots for slots in all_slots(loaded))
    assert len({id(c.theta) for c in converted_tensors(loaded)}) == 2


def test_loading_lets_averages_follow() -> None:
    net, source = small(), trained()
    average = AveragedModel(net)
    net.load_state_dict(source.state_dict())
    assert counts(average.module) == counts(net)
    assert [s.places.tolist() for s in all_slots(average.module)] == [s.places.tolist() for s in all_slots(net)]
    start = by_connection(small())
    for connection, (value,) in by_connection(average.module).items():
        assert value == start.get(connection, (0.0,))[0]


def test_densify() -> None:
    net = trained()
    x = batches(1)[0][0]
    expected = net(x)
    parameters = dict(densify(net).named_parameters())
    assert sorted(parameters) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    torch.testing.assert_close(net(x), expected)


# -- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reactivation": "random"}, "reactivation: expected one of budget, uniform, found 'random'"),
        ({"least_per_layer": -1}, "least_per_layer: expected an int of at least 0, found -1"),
        ({"least_per_layer": True}, "least_per_layer"),
        ({"scope": "both"}, "scope: expected .* found 'both'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepR(0.1, **{"scope": "global", **options})


def test_a_total_smaller_than_the_number_of_layers() -> None:
    with pytest.raises(ValueError, match="gives 2 connections to 3 tensors"):
        sparsify(plain_mlp((12, 10, 8, 6)), 2, scope="global")
    with pytest.raises(ValueError, match=r"0\.005 gives 1 connections to 3 tensors"):
        sparsify(plain_mlp((12, 10, 8, 6)), 0.005, scope="global")
    module = Regression(OPTIMIZERS["sgd"], steps=1)
    with pytest.raises(ValueError, match="least_per_layer = 40 needs 80 connections in 2 layers, found K = 54"):
        trainer(DeepR(0.3, scope="global", least_per_layer=40)).fit(module)
    with pytest.raises(ValueError, match="scope: expected"):
        sparsify(plain_mlp(), 0.3, scope="all")


def test_mixed_layers_are_refused_by_name() -> None:
    net = plain_mlp()
    net[2].double()
    with pytest.raises(ValueError, match=r"one dtype, found torch.float32 in `0\.weight` and torch.float64 in `2\.weight`"):
        sparsify(net, 0.3, scope="global")
    assert not list(converted_tensors(net))
    net = plain_mlp()
    net[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"one requires_grad, found True in `0\.weight` and False in `2\.weight`"):
        sparsify(net, 0.3, target_modules=["0", "2"], scope="global")
    assert not list(converted_tensors(net))


def test_scopes_that_do_not_fit() -> None:
    net = sparsify(plain_mlp(), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"a theta of its own in `0\.weight`, `2\.weight`: the optimizer holds them already"):
        DeepR(scope="global").attach(net, optimizer)
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'`0\.weight` shares one K with other layers \(scope="global"\)'):
        DeepR().attach(net, optimizer)
    with pytest.raises(ValueError, match=r"`net\.0\.weight` shares one theta .* with `2\.weight`"):
        trainer(DeepR(scope="global", target_modules=["net.0"])).fit(wrapped(net))
    with pytest.raises(ValueError, match="shares one theta"):
        densify(net[0])  # type: ignore[index]


def wrapped(net: nn.Module) -> Regression:
    module = Regression(OPTIMIZERS["sgd"], steps=1)
    module.net = net  # type: ignore[assignment]
    return module


def test_checkpoints_of_the_other_scope() -> None:
    with pytest.raises(RuntimeError, match="expected one K for all layers, found K slots of its own"):
        small().load_state_dict(sparsify(plain_mlp(), 0.3).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="expected K slots of its own, found one K for all layers"):
        sparsify(plain_mlp(), 0.3).load_state_dict(small().state_dict())
    with pytest.raises(RuntimeError, match="expected K = 54 connections in all, found 90"):
        small().load_state_dict(small(0.5).state_dict())


@pytest.mark.feature('Optimizers: scope="global" with a group or optimizer per layer', refused=True)
def test_parameter_groups_and_optimizers_are_refused_by_name() -> None:
    def groups(module: Any) -> Any:
        net = module.net
        return torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.01}], lr=0.1)

    module = Regression(lambda p: None, steps=1)
    module.configure_optimizers = lambda: groups(module)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"more than one parameter group.*`net\.0\.weight`, `net\.2\.weight` have one parameter"
    ):
        trainer(callback()).fit(module)

    net = small()
    optimizers = [torch.optim.SGD(net[i].parameters(), lr=0.1) for i in (0, 2)]  # type: ignore[index]
    deepr = DeepR(scope="global")
    deepr.attach(net, optimizers[0])
    with pytest.raises(ValueError, match=r"`0\.weight`, `2\.weight` have one parameter, theta: .* found it in two"):
        deepr.attach(net, optimizers[1])
    with pytest.warns(UserWarning, match="duplicate"):
        twice = torch.optim.SGD([*net[0].parameters(), *net[2].parameters()], lr=0.1)  # type: ignore[index]
    with pytest.raises(ValueError, match="found it 2 times in one"):
        DeepR(scope="global").attach(small_like(net), twice)


def small_like(net: nn.Module) -> nn.Module:
    for slots in all_slots(net):
        slots.owner = lambda: None
    return net


def test_join_itself() -> None:
    net = sparsify(plain_mlp(), 0.3, distribution="uniform", seed=SEED)
    x = batches(1)[0][0]
    expected = net(x)
    pool = join(list(converted_tensors(net)))
    assert torch.equal(net(x), expected) and pool.count == 54 and pool.budgets == [36, 18]
    assert join(list(converted_tensors(net))) is pool
    assert pool.members == all_slots(net) and all(isinstance(slots, SharedSlots) for slots in pool.members)
    with pytest.raises(ValueError, match=r"`0\.weight` shares one theta"):
        join(list(converted_tensors(net))[:1])
