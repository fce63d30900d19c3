"""Sparse compute of LSTMs and GRUs gives the numbers of torch's own layers, and dense compute takes the cases that it can't."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_deepr import DeepR, connections, connectivity_report, densify, kernels, sparsify
from lightning_deepr.compute import recurrent
from tests.helpers.layers import tensors_in
from tests.helpers.state import slots_by_name, theta_of

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:A backward pass reached", "ignore:dropout option adds dropout", "ignore:.*means one single connection"
    ),
    pytest.mark.skipif(not kernels.available(), reason="no kernels here"),
]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
both_layers = pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])


def layer_and_twin(cell: Any, connectivity: Any = 0.3, compute: str = "sparse", **options: Any) -> tuple[Any, Any]:
    """Make a converted layer and an ordinary one with the same weights."""
    torch.manual_seed(0)
    layer = sparsify(cell(**options), connectivity, compute=compute)
    return layer, densify(copy.deepcopy(layer))


@pytest.fixture
def sparse_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List the number of steps of each forward pass of the kernels, by layer and direction."""
    found: list[int] = []
    plain = recurrent._forward

    def counted(x: Tensor, *arguments: Any) -> Any:
        found.append(x.shape[0])
        return plain(x, *arguments)

    monkeypatch.setattr(recurrent, "_forward", counted)
    return found


def outcome(layer: nn.RNNBase, x: Tensor, states: Any) -> dict[str, Tensor]:
    """Compute outputs and all gradients; for converted weights, those at the places of their connections."""
    given = () if states is None else tensors_in(states)
    inputs = [one.detach().clone().requires_grad_() for one in (x, *given)]
    output = layer(inputs[0], None if states is None else tuple(inputs[1:]) if isinstance(states, tuple) else inputs[1])
    found = dict(zip(("y", "h", "c"), tensors_in(output), strict=False))
    torch.manual_seed(1)
    loss = sum((one.double() * torch.randn(one.shape, dtype=torch.float64)).sum() for one in found.values())
    layer.zero_grad()
    loss.backward()  # type: ignore[union-attr]
    found |= {f"d{name}": one.grad for name, one in zip(("x", "h0", "c0"), inputs, strict=False)}  # type: ignore[misc]
    slots = slots_by_name(layer)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("parametrizations."):
            name = name.split(".")[1]
            found[f"d{name}"] = parameter.grad * slots[name].signs
        else:
            found[f"d{name}"] = parameter.grad
    return found


def assert_same(layer: Any, twin: Any, x: Tensor, states: Any = None) -> None:
    torch.manual_seed(2)
    ours = outcome(layer, x, states)
    torch.manual_seed(2)
    expected = outcome(twin, x, states)
    for name, (_, places, _) in connections(layer).items():
        expected[f"d{name}"] = expected[f"d{name}"].reshape(-1)[places]
    assert ours.keys() == expected.keys()
    tolerance = TOLERANCE[x.dtype]
    for name, value in expected.items():
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype
        scale = max(1.0, float(value.detach().abs().max()))  # gradients that sum over many steps are large
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


def some_states(layer: nn.RNNBase, batch: int | None, dtype: torch.dtype) -> Any:
    """Make h and, for an LSTM, c in the form that the layer takes."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    shape = (count, layer.hidden_size) if batch is None else (count, batch, layer.hidden_size)
    h = torch.randn(shape, dtype=dtype)
    return (h, torch.randn(shape, dtype=dtype)) if isinstance(layer, nn.LSTM) else h


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "two layers": {"num_layers": 2, "bias": False},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


@both_layers
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_those_of_torch(kind: str, dtype: torch.dtype, cell: Any, sparse_layers: list[int]) -> None:
    layer, twin = layer_and_twin(cell, input_size=11, hidden_size=19, dtype=dtype, **KINDS[kind])
    runs = list(itertools.product((1, 3, 16, 17, 32, 70), (1, 7)))
    for number, (batch, steps) in enumerate(runs):
        x = torch.randn((batch, steps, 11) if layer.batch_first else (steps, batch, 11), dtype=dtype)
        assert_same(layer, twin, x, some_states(layer, batch, dtype) if number % 2 else None)
    assert len(sparse_layers) == len(runs) * layer.num_layers * (2 if layer.bidirectional else 1)


@both_layers
@pytest.mark.parametrize("threads", [1, 2])
def test_several_tiles_parts_and_threads(threads: int, cell: Any, sparse_layers: list[int]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer, twin = layer_and_twin(cell, 0.1, input_size=150, hidden_size=90, dtype=torch.float64)
        for batch in (20, 32, 130):
            assert_same(layer, twin, torch.randn(13, batch, 150, dtype=torch.float64), some_states(layer, batch, torch.float64))
    finally:
        torch.set_num_threads(before)
    assert len(sparse_layers) == 3


@both_layers
@pytest.mark.parametrize("connectivity", [{"weight_ih_l0": 1, "weight_hh_l0": 1}, 1.0], ids=["K = 1", "K = N"])
def test_one_connection_and_all(connectivity: Any, cell: Any) -> None:
    # all: more than one chunk of 256 connections in a row; one: many rows and columns without connections
    layer, twin = layer_and_twin(cell, connectivity, input_size=300, hidden_size=33, dtype=torch.float64)
    assert_same(layer, twin, torch.randn(4, 5, 300, dtype=torch.float64))


@both_layers
def test_a_sequence_without_a_batch(cell: Any, sparse_layers: list[int]) -> None:
    layer, twin = layer_and_twin(cell, input_size=11, hidden_size=19, bidirectional=True, batch_first=True)
    x = torch.randn(6, 11)
    assert_same(layer, twin, x)
    assert_same(layer, twin, x, some_states(layer, None, x.dtype))
    assert sparse_layers == [6] * 4


@both_layers
def test_only_the_gradients_asked_for(cell: Any) -> None:
    layer, _ = layer_and_twin(cell, input_size=11, hidden_size=19)
    x = torch.randn(5, 3, 11)
    expected = outcome(layer, x, None)
    names = [name for name, _ in layer.named_parameters()]
    for frozen in itertools.chain(([name] for name in names), [names]):
        x = x.detach().requires_grad_(frozen == names)
        for name, parameter in layer.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name not in frozen)
        torch.manual_seed(1)
        output = layer(x)
        sum(  # type: ignore[union-attr]
            (one.double() * torch.randn(one.shape, dtype=torch.float64)).sum() for one in tensors_in(output)
        ).backward()
        assert (x.grad is None) == (frozen != names)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, expected["dx"])
        for name, parameter in layer.named_parameters():
            assert (parameter.grad is None) == (name in frozen)
            if parameter.grad is not None and name.startswith("bias"):
                torch.testing.assert_close(parameter.grad, expected[f"d{name}"])


@both_layers
def test_output_is_the_same_without_gradients_and_in_validation(cell: Any) -> None:
    layer, _ = layer_and_twin(cell, input_size=11, hidden_size=19, num_layers=2, bidirectional=True, dropout=0.5)
    x = torch.randn(5, 3, 11)
    layer.eval()
    expected = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for ours, one in zip(tensors_in(layer(x)), tensors_in(expected), strict=True):
                assert torch.equal(ours, one)


@both_layers
def test_dropout_between_layers_is_that_of_torch(cell: Any) -> None:
    layer, twin = layer_and_twin(cell, input_size=11, hidden_size=19, num_layers=3, dropout=0.4, dtype=torch.float64)
    x = torch.randn(5, 3, 11, dtype=torch.float64)
    assert_same(layer, twin, x)
    assert not torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
def test_sigmoid_and_tanh_from_tiny_to_huge(dtype: torch.dtype) -> None:
    """One unit with x as its gates: the input gate is open and the cell's input is tanh(x); then the other way round."""
    layer = nn.LSTM(4, 1, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.weight_ih_l0.copy_(torch.eye(4))
    sparsify(layer, {"weight_ih_l0": 4, "weight_hh_l0": 4}, init="largest", compute="sparse")
    values = torch.cat([torch.logspace(-30, 30, 301, dtype=torch.float64), torch.linspace(0, 120, 1201, dtype=torch.float64)])
    values = torch.cat([values, -values, torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])]).to(dtype)
    open_gate, limit = torch.full_like(values, 1e4), 1.5e-6 if dtype == torch.float32 else 1e-14
    for column, function in ((0, torch.sigmoid), (2, torch.tanh), (3, torch.sigmoid)):
        x = torch.zeros(len(values), 4, dtype=dtype)
        x[:, 0] = x[:, 2] = x[:, 3] = open_gate
        x[:, column] = values
        # c = i tanh(g), h = o tanh(c): two of the three are 1
        found = layer(x.unsqueeze(0))[1][1 if column != 3 else 0].flatten()
        expected = function(values.double()) * (torch.tensor(1.0).double().tanh() if column == 3 else 1.0)
        number = ~expected.isnan()
        assert torch.equal(found.isnan(), ~number)
        apart = (found.double() - expected)[number].abs()
        smallest = torch.finfo(dtype).tiny * 1e2  # sigmoid of less than -83 in float32
        assert bool((apart <= limit * expected[number].abs() + smallest).all()), (column, float(apart.max()))


@both_layers
def test_a_second_derivative_and_a_rewired_graph_are_refused(cell: Any) -> None:
    layer, _ = layer_and_twin(cell, input_size=11, hidden_size=19)
    x = torch.randn(5, 3, 11, requires_grad=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    output = layer(x)[0].sum()
    output.backward(retain_graph=True)
    first, x.grad = x.grad, None
    output.backward(retain_graph=True)
    assert torch.equal(x.grad, first)  # type: ignore[arg-type]
    for name in ("weight_ih_l0", "weight_hh_l0"):
        output = layer(x)[0].sum()
        slots = slots_by_name(layer)[name]
        slots.places.copy_((slots.places + 1) % slots.total)
        slots.ordered()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


class TestDense:
    """The cases that sparse compute does not take run as torch's own layer, with the same numbers."""

    @both_layers
    def test_packed_sequences_projections_and_partly_converted_layers(self, cell: Any, sparse_layers: list[int]) -> None:
        layer, twin = layer_and_twin(cell, input_size=11, hidden_size=19)
        packed = pack_padded_sequence(torch.randn(5, 3, 11), torch.tensor([5, 4, 2]))
        torch.testing.assert_close(layer(packed)[0].data, twin(packed)[0].data)
        x = torch.randn(5, 3, 11)
        left: list[tuple[Any, dict[str, Any]]] = [
            ({"weight_hh_l0": 0.2}, {}),
            ({"weight_ih_l0": 0.2, "weight_hh_l0": 0.2}, {"num_layers": 2}),
        ]
        if cell is nn.LSTM:
            left.append((0.2, {"proj_size": 4}))
        for connectivity, options in left:
            other, other_twin = layer_and_twin(cell, connectivity, input_size=11, hidden_size=19, **options)
            torch.testing.assert_close(other(x)[0], other_twin(x)[0])
            other(x)[0].sum().backward()
            assert {row["compute"] for row in connectivity_report(other).to_dict()["rows"]} == {"dense"}
        assert sparse_layers == []
        layer(x)
        assert sparse_layers == [5]

    def test_other_kinds_of_layers(self, sparse_layers: list[int]) -> None:
        layer, twin = layer_and_twin(nn.RNN, 0.2, input_size=11, hidden_size=19)
        x = torch.randn(5, 3, 11)
        torch.testing.assert_close(layer(x)[0], twin(x)[0])
        assert sparse_layers == []

    @both_layers
    def test_a_forward_of_the_users_own_is_called(self, cell: Any, sparse_layers: list[int]) -> None:
        class Doubling(cell):
            def forward(self, input: Tensor, hx: Any = None) -> Any:
                y, state = super().forward(input, hx)
                return 2 * y, state

        layer, twin = layer_and_twin(Doubling, 0.2, input_size=11, hidden_size=19)
        x = torch.randn(5, 3, 11)
        y = layer(x)[0]
        torch.testing.assert_close(y, twin(x)[0])
        y.sum().backward()
        assert sparse_layers == []
        assert {row["compute"] for row in connectivity_report(layer).to_dict()["rows"]} == {"dense"}

    @both_layers
    def test_errors_are_those_of_torch(self, cell: Any) -> None:
        layer, twin = layer_and_twin(cell, input_size=11, hidden_size=19, dtype=torch.float64)
        x = torch.randn(5, 3, 11, dtype=torch.float64)
        state = torch.zeros(1, 3, 19, dtype=torch.float64)
        others: list[Any] = [state[:, :2], state.float()]
        if cell is nn.LSTM:
            others = [(one, one) for one in others]
        for arguments in ((x[..., :-1],), (x.float(),), (x.flatten(),), *((x, one) for one in others)):
            with pytest.raises((RuntimeError, ValueError)) as expected:
                twin(*arguments)
            with pytest.raises(expected.type) as found:
                layer(*arguments)
            assert str(found.value) == str(expected.value)

    @both_layers
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
    def test_tracing(self, cell: Any, sparse_layers: list[int]) -> None:
        layer, twin = layer_and_twin(cell, input_size=11, hidden_size=19)
        x = torch.randn(5, 3, 11)
        traced = torch.jit.trace(layer, x, check_trace=False)
        assert sparse_layers == []
        torch.testing.assert_close(traced(x)[0], twin(x)[0])

    @both_layers
    def test_autocast(self, cell: Any, sparse_layers: list[int]) -> None:
        layer, twin = layer_and_twin(cell, input_size=11, hidden_size=19)
        x = torch.randn(5, 3, 11)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            try:
                expected = twin(x)[0].float()
            except RuntimeError as error:  # oneDNN has no bf16 LSTM for every CPU
                with pytest.raises(RuntimeError):
                    layer(x)
                pytest.skip(f"PyTorch's own layer: {error}")
            assert torch.allclose(layer(x)[0].float(), expected, atol=0.02)
        assert sparse_layers == []

    @pytest.mark.parametrize(
        ("cell", "connectivity", "batch", "sizes", "sparse"),
        [
            (nn.LSTM, 0.05, 32, (30, 100), True),
            (nn.LSTM, 0.9, 32, (30, 100), False),
            (nn.LSTM, 0.3, 1, (30, 100), False),
            (nn.GRU, 0.05, 32, (30, 100), True),
            (nn.GRU, 0.3, 1, (30, 100), True),  # torch's GRU takes long for a step, even of few units
            (nn.GRU, 0.9, 1, (256, 400), False),
            (nn.GRU, 0.9, 32, (256, 400), False),
        ],
    )
    def test_auto_takes_what_is_expected_to_be_faster(
        self, cell: Any, connectivity: float, batch: int, sizes: tuple[int, int], sparse: bool, sparse_layers: list[int]
    ) -> None:
        layer, _ = layer_and_twin(cell, connectivity, "auto", input_size=sizes[0], hidden_size=sizes[1])
        layer(torch.randn(3, batch, sizes[0]))
        assert sparse_layers == [3] * sparse
        report = connectivity_report(layer).to_dict()["rows"]
        assert {row["compute"] for row in report} == {"sparse" if sparse else "dense"}


@both_layers
def test_rewiring_equals_that_of_dense_compute(cell: Any, sparse_layers: list[int]) -> None:
    def trained(compute: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        torch.manual_seed(0)
        layer = sparsify(cell(12, 20, bidirectional=True, dtype=torch.float64), 0.2, seed=3, compute=compute)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        DeepR(l1=0.5, seed=3).attach(layer, optimizer)
        states = []
        for step in range(20):
            torch.manual_seed(100 + step)
            optimizer.zero_grad()
            for _ in range(2):  # gradients of two micro-batches
                layer(torch.randn(6, 9, 12, dtype=torch.float64))[0].square().sum().backward()
            optimizer.step()
            states.append({name: slots.places.clone() for name, slots in slots_by_name(layer).items()})
        return layer, states

    dense, expected = trained("dense")
    assert sparse_layers == []
    sparse, found = trained("sparse")
    assert len(sparse_layers) == 20 * 2 * 2
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    for name in expected[0]:
        assert (expected[-1][name] != expected[0][name]).float().mean() > 0.2
        torch.testing.assert_close(theta_of(sparse, name), theta_of(dense, name), rtol=1e-9, atol=1e-9)


@both_layers
def test_copies_casts_and_densified_layers(cell: Any) -> None:
    layer, twin = layer_and_twin(cell, input_size=11, hidden_size=19)
    x = torch.randn(5, 3, 11)
    expected = twin(x)[0]
    replica = copy.deepcopy(layer)
    assert torch.equal(replica(x)[0], layer(x)[0])
    assert_same(replica.double(), twin.double(), x.double())
    torch.testing.assert_close(densify(layer)(x)[0], expected)


@both_layers
@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_parameters_of_the_layer_may_be_assigned(cell: Any, compute: str) -> None:
    """As ``load_state_dict(assign=True)`` does: torch keeps a list of the weights beside the parameters."""
    layer, twin = layer_and_twin(cell, compute=compute, input_size=6, hidden_size=8)
    other, _ = layer_and_twin(cell, compute=compute, input_size=6, hidden_size=8)
    with torch.no_grad():
        for p in (*layer.parameters(), *twin.parameters()):
            p.mul_(1.5)
    other.load_state_dict(layer.state_dict(), assign=True)
    bias = nn.Parameter(torch.full_like(layer.bias_hh_l0, 0.3))
    other.bias_hh_l0 = twin.bias_hh_l0 = bias
    x = torch.randn(5, 3, 6)
    for one in (other, copy.deepcopy(other)):
        torch.testing.assert_close(one(x)[0], twin(x)[0], rtol=1e-5, atol=1e-6)
