"""A converted layer of any kind: one table of layers, one list of invariants."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

import lightning_deepr.weights.k_slots  # noqa: F401 (a submodule must not hide a name)
from lightning_deepr import DeepR, connections, connectivity_report, densify, load_state_dict, sparsify
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers.classifier import Net, batches
from tests.helpers.layers import LAYERS, Layer, flat, loss_of, set_dense
from tests.helpers.state import assert_connected, slots_by_name, theta_of
from tests.helpers.trainer import trainer

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached")  # most of these tests use a layer without a callback
CONNECTIVITY = 0.3
table = pytest.mark.parametrize("layer", LAYERS, ids=str)


@pytest.fixture
def pair(layer: Layer) -> tuple[nn.Module, nn.Module]:
    """Make a converted layer and, as the oracle, the plain layer with the same weights."""
    plain = layer.build()
    sparse = sparsify(copy.deepcopy(plain), CONNECTIVITY, target_modules=layer.target)
    return sparse, set_dense(plain, sparse)


def step(layer: Layer, module: nn.Module) -> Tensor:
    """Run forward and backward. Returns the output."""
    module.zero_grad()
    output = module(*layer.feed())
    loss_of(output).backward()
    return flat(output)


def same_places(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = slots_by_name(one), slots_by_name(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n].places, theirs[n].places) for n in ours)


# -- parameters and connections -- --------------------------------------------------------------------------------------------


@table
def test_theta_of_k_slots_is_the_only_parameter_of_a_weight(layer: Layer, pair: tuple[nn.Module, nn.Module]) -> None:
    sparse, plain = pair
    found = connections(sparse)
    assert sorted(found) == sorted(layer.tensors)
    parameters = dict(sparse.named_parameters())
    dense = {name: p.shape for name, p in plain.named_parameters() if name not in layer.tensors}
    assert {name: p.shape for name, p in parameters.items() if ".original" not in f".{name}"} == dense  # biases, norms
    for name, (shape, places, values) in found.items():
        assert name not in parameters
        assert theta_of(sparse, name).shape == places.shape == values.shape
        assert places.dtype == torch.int64 and 0 < places.numel() < shape.numel()
    assert len(parameters) == len(dense) + len(layer.tensors)
    assert sum(p.numel() for n, p in parameters.items() if n not in dense) == connectivity_report(sparse).active
    assert_connected(sparse)


@table
def test_no_tensor_of_n_elements_is_kept(layer: Layer, pair: tuple[nn.Module, nn.Module]) -> None:
    sparse, _ = pair
    step(layer, sparse)
    sizes = {shape.numel() for shape, _, _ in connections(sparse).values()}
    seen: set[int] = set()

    def walk(thing: object, where: str) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            assert thing.numel() not in sizes, f"{where} holds {thing.numel()} elements"
            walk(thing.grad if thing.is_leaf else None, f"{where}.grad")
        elif isinstance(thing, nn.Module):
            walk(thing.__dict__, where)
        elif isinstance(thing, dict):
            for key, value in thing.items():
                walk(value, f"{where}.{key}")
        elif isinstance(thing, (list, tuple, set)):
            for value in thing:
                walk(value, where)

    walk(sparse, layer.name)
    for parameter in sparse.parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


@table
def test_conversion_leaves_the_global_generator_alone(layer: Layer) -> None:
    for init in ("module", "deepr", "largest"):
        module = layer.build()
        before = torch.get_rng_state()
        sparsify(module, CONNECTIVITY, target_modules=layer.target, init=init)
        assert torch.equal(before, torch.get_rng_state())


# -- forward and backward -- --------------------------------------------------------------------------------------------------


@table
def test_output_and_gradients_are_the_dense_layers(layer: Layer, pair: tuple[nn.Module, nn.Module]) -> None:
    sparse, plain = pair
    with torch.no_grad():  # the gradient must not vanish at theta = 0, where half of the slots are
        for name in layer.tensors:
            theta_of(sparse, name)[::2] = 0
    set_dense(plain, sparse)
    torch.testing.assert_close(step(layer, sparse), step(layer, plain))
    for name, (_, places, _) in connections(sparse).items():
        expected = plain.get_parameter(name).grad.view(-1)[places] * slots_by_name(sparse)[name].signs
        found = theta_of(sparse, name).grad
        torch.testing.assert_close(found, expected)
        assert bool((found[::2] != 0).any()), f"{name}: no gradient reaches theta = 0"
    for name, parameter in plain.named_parameters():
        if name not in layer.tensors:
            torch.testing.assert_close(sparse.get_parameter(name).grad, parameter.grad)


@table
def test_weight_reads_as_the_dense_tensor(layer: Layer, pair: tuple[nn.Module, nn.Module]) -> None:
    sparse, plain = pair
    for name in layer.tensors:
        owner, _, tensor = name.rpartition(".")
        weight = getattr(sparse.get_submodule(owner), tensor)
        assert torch.equal(weight, plain.get_parameter(name)) and weight.dtype == torch.float32
        dormant = torch.ones(weight.numel(), dtype=torch.bool)
        dormant[connections(sparse)[name][1]] = False
        assert bool((weight.reshape(-1)[dormant] == 0).all())


@table
def test_evaluation_mode_computes_the_same(layer: Layer, pair: tuple[nn.Module, nn.Module]) -> None:
    sparse, plain = pair  # an encoder layer takes another code path here, with all weights in one call
    with torch.no_grad():
        torch.testing.assert_close(flat(sparse.eval()(*layer.feed())), flat(plain.eval()(*layer.feed())))


@pytest.mark.parametrize("layer", [c for c in LAYERS if c.name in ("lstm", "gru", "rnn")], ids=str)
def test_recurrent_weights_are_built_once_per_forward(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    module_of_slots = sys.modules[KSlots.__module__]  # `lightning_deepr.connections` itself is the function
    sparse = sparsify(layer.build(), CONNECTIVITY, compute="dense")
    built = []
    build = module_of_slots.build_weight
    monkeypatch.setattr(module_of_slots, "build_weight", lambda *args: built.append(args[3]) or build(*args))
    for _ in range(2):
        built.clear()
        step(layer, sparse)
        assert sorted(built) == sorted(shape for shape, _, _ in connections(sparse).values())


# -- copying, moving, saving --------------------------------------------------------------------------------------------------


@table
@pytest.mark.parametrize("after_a_step", [False, True], ids=["fresh", "after_forward_and_backward"])
def test_a_deep_copy_computes_with_its_own_weights(layer: Layer, pair: tuple[nn.Module, nn.Module], after_a_step: bool) -> None:
    sparse, _ = pair
    if after_a_step:
        step(layer, sparse)
    replica = copy.deepcopy(sparse)
    expected = flat(sparse(*layer.feed())).detach()
    assert torch.equal(flat(replica(*layer.feed())), expected)
    with torch.no_grad():
        for name in layer.tensors:
            theta_of(replica, name).zero_()
            slots_by_name(replica)[name].places.copy_(torch.arange(slots_by_name(replica)[name].count))
    assert torch.equal(flat(sparse(*layer.feed())), expected)
    assert_connected(sparse)
    assert not torch.equal(flat(replica(*layer.feed())), expected)
    with torch.no_grad():
        theta_of(sparse, layer.tensors[0]).fill_(0.5)
    assert bool((theta_of(replica, layer.tensors[0]) == 0).all())


@table
def test_moving_to_another_precision_and_back_leaves_the_places(layer: Layer, pair: tuple[nn.Module, nn.Module]) -> None:
    sparse, plain = pair
    original = copy.deepcopy(sparse)
    sparse.to(torch.float64)
    assert same_places(sparse, original)
    torch.testing.assert_close(flat(sparse(*layer.feed(torch.float64))), flat(plain.double()(*layer.feed(torch.float64))))
    sparse.float()
    assert torch.equal(flat(sparse(*layer.feed())), flat(original(*layer.feed())))
    for moved in (sparse.half(), sparse.bfloat16(), sparse.to("cpu")):
        assert same_places(moved, original)
        for slots in slots_by_name(moved).values():
            assert slots.places.dtype == slots.born.dtype == torch.int64
            assert slots.signs.abs().eq(1).all()
    for name in layer.tensors:
        slots = slots_by_name(sparse)[name]
        assert theta_of(sparse, name).dtype == slots.signs.dtype == torch.float32  # bfloat16 would round its steps away
        assert slots.weight_dtype == torch.bfloat16


@table
def test_state_dict_restores_another_conversion_and_a_dense_layer(layer: Layer, pair: tuple[nn.Module, nn.Module]) -> None:
    sparse, _ = pair
    expected = flat(sparse(*layer.feed()))
    other = sparsify(layer.build(seed=5), CONNECTIVITY, target_modules=layer.target, seed=6)
    assert not same_places(other, sparse)
    other.load_state_dict(sparse.state_dict())
    dense = load_state_dict(layer.build(seed=5), sparse.state_dict())
    for restored in (other, dense):
        assert same_places(restored, sparse)
        assert torch.equal(flat(restored(*layer.feed())), expected)
        assert_connected(restored)
        for name, slots in slots_by_name(restored).items():  # the signs of all places, not only of the active ones
            everywhere = torch.arange(slots.total)
            assert torch.equal(slots.signs_at(everywhere), slots_by_name(sparse)[name].signs_at(everywhere))


@table
def test_state_dict_survives_pickle_and_a_file(layer: Layer, pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    sparse, _ = pair
    state = sparse.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    torch.save(state, tmp_path / "sparse.pt")
    for loaded in (
        pickle.loads(pickle.dumps(state)),
        torch.load(tmp_path / "sparse.pt", weights_only=True),
    ):
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)
    restored = load_state_dict(layer.build(seed=5), tmp_path / "sparse.pt")
    assert torch.equal(flat(restored(*layer.feed())), flat(sparse(*layer.feed())))


@table
def test_densify_gives_the_plain_layer_back(layer: Layer, pair: tuple[nn.Module, nn.Module]) -> None:
    sparse, plain = pair
    expected = step(layer, sparse).detach()
    dense = densify(sparse)
    assert dense is sparse
    assert [type(m) for m in dense.modules()] == [type(m) for m in plain.modules()]
    assert dense.state_dict().keys() == plain.state_dict().keys()
    shapes = [[(n, p.shape) for n, p in one.named_parameters()] for one in (dense, plain)]
    assert shapes[0] == shapes[1]  # in order, too: an optimizer's state_dict numbers its parameters
    # (sparse compute adds in a different order)
    torch.testing.assert_close(flat(dense(*layer.feed())), expected, rtol=1e-5, atol=1e-6)
    fresh = layer.build(seed=5)
    fresh.load_state_dict(dense.state_dict())
    assert torch.equal(flat(fresh(*layer.feed())), flat(plain(*layer.feed())))
    loss_of(dense(*layer.feed())).backward()  # the layer is ordinary again: it trains, copies and can be converted again
    assert all(p.grad is not None and p.grad.shape == p.shape for p in dense.parameters())
    again = sparsify(copy.deepcopy(dense), CONNECTIVITY, target_modules=layer.target)
    assert sorted(connections(again)) == sorted(layer.tensors)


@table
def test_converting_a_copy_further_or_back_leaves_the_original(layer: Layer) -> None:
    first, *others = layer.tensors
    module = sparsify(layer.build(), CONNECTIVITY, target_modules=[first])
    expected, keys = step(layer, module).detach(), module.state_dict().keys()
    replicas = [densify(copy.deepcopy(module))]
    if others:
        replicas.append(sparsify(copy.deepcopy(module), CONNECTIVITY, target_modules=others))
    for replica in replicas:
        step(layer, replica)
        assert replica.state_dict().keys() != keys
        assert module.state_dict().keys() == keys
        assert torch.equal(step(layer, module), expected)
    densify(module)
    assert sorted(connections(replicas[-1])) == (sorted(layer.tensors) if others else [])
    step(layer, replicas[-1])


# -- training -----------------------------------------------------------------------------------------------------------------


@table
def test_twenty_steps_of_deep_r(layer: Layer, pair: tuple[nn.Module, nn.Module]) -> None:
    sparse, _ = pair
    counts = {name: places.numel() for name, (_, places, _) in connections(sparse).items()}
    before = copy.deepcopy(sparse)
    optimizer = torch.optim.Adam(sparse.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a callback is at work: there is no warning that none is
        rewiring = DeepR(l1=0.1, check_invariants=True).attach(sparse, optimizer)
        for _ in range(20):
            step(layer, sparse)
            optimizer.step()
            assert_connected(sparse, counts)
    rewiring.remove()
    moved = {n: not torch.equal(slots.places, slots_by_name(before)[n].places) for n, slots in slots_by_name(sparse).items()}
    assert all(moved.values()), f"never rewired: {moved}"
    for name in layer.tensors:
        assert optimizer.state[theta_of(sparse, name)]["exp_avg"].shape == (counts[name],)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_follows_the_rewiring(backend: str) -> None:
    torch.manual_seed(0)
    net = sparsify(nn.Sequential(nn.Linear(14, 9), nn.ReLU(), nn.Linear(9, 4)), CONNECTIVITY)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    x = torch.randn(6, 14)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    DeepR(l1=0.1).attach(net, optimizer)
    for _ in range(4):
        places = connections(net)["0.weight"][1]
        optimizer.zero_grad()
        loss_of(compiled(x)).backward()
        optimizer.step()
        torch.testing.assert_close(compiled(x), net(x))
    assert not torch.equal(connections(net)["0.weight"][1], places)
    assert sorted(connections(compiled)) == ["0.weight", "2.weight"]


class Sequences(Net):
    """A recurrent classifier on the same batches, as sequences of four vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, bidirectional=True, batch_first=True)
        self.fc1 = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.lstm(x.view(len(x), 4, 3))[0][:, -1])


def test_a_second_fit_with_averaging_on_a_recurrent_network() -> None:
    net = Sequences()
    for _ in range(2):
        trainer(DeepR(0.3, check_invariants=True), WeightAveraging()).fit(net, batches(4), batches(2))
        assert_connected(net)
    assert len(net.losses) == 8
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0_reverse", "fc1.weight"} <= connections(net).keys()


def test_the_public_names() -> None:
    import lightning_deepr

    assert callable(lightning_deepr.connections)  # (a function, and no submodule of that name)
    assert all(getattr(lightning_deepr, name) is not None for name in lightning_deepr.__all__)
    linear = sparsify(nn.Linear(10, 10), 0.1)
    assert isinstance(next(converted_tensors(linear)).slots, KSlots)
