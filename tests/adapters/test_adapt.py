"""A difference to frozen weights: every kind of layer, every method, against the pretrained network and the dense sum."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import SET, DeepR, FixedRandom, RigL, adapt, connectivity_report, densify, load_state_dict, sparsify
from lightning_deepr.compute import sparse as sparse_compute
from lightning_deepr.weights.find import converted_tensors


class Tied(nn.Module):
    """A language model: the embedding is the output layer's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.inner(self.embedding(x)).relu())
        return found


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x)[0]
        return found


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(6, 5, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.rnn(x)[0]
        return found


def images() -> Tensor:
    return torch.randn(3, 4, 6, 6)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)), lambda: torch.randn(5, 20), {}),
    "linear 3-d": (lambda: nn.Sequential(nn.Linear(20, 16)), lambda: torch.randn(2, 5, 20), {}),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3, stride=2)), images, {}),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), images, {}),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3)), lambda: torch.randn(2, 4, 9), {}),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), images, {}),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 3)),
        lambda: torch.randint(0, 12, (3, 5)),
        {"target_modules": ["0", "1"]},
    ),
    "bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(12, 8, mode="max")),
        lambda: torch.randint(0, 12, (3, 5)),
        {"target_modules": ["0"]},
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(7, 3, 6), {}),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(7, 3, 6), {}),
    "attention": (Attention, lambda: torch.randn(2, 5, 8), {}),
    "tied": (Tied, lambda: torch.randint(0, 12, (3, 5)), {"target_modules": ["embedding", "inner"]}),
}


@pytest.mark.parametrize("compute", ["auto", "dense"])
@pytest.mark.parametrize("kind", list(NETWORKS))
def test_an_adapted_layer_is_the_pretrained_one_and_then_the_sum(kind: str, compute: str) -> None:
    make, draw, options = NETWORKS[kind]
    torch.manual_seed(0)
    net = make()
    x, pretrained = draw(), copy.deepcopy(net)
    memory = {name: one.data_ptr() for name, one in net.named_parameters()}
    before = net(x).detach()
    adapt(net, 0.15, compute=compute, seed=1, **options)
    assert torch.equal(net(x), before)  # bit for bit
    bases = {one.name: one.slots.base for one in converted_tensors(net)}  # type: ignore[attr-defined]
    assert all(base.data_ptr() == memory[name] and not base.requires_grad for name, base in bases.items())
    thetas = [one.theta for one in converted_tensors(net)]
    assert {id(p) for p in net.parameters() if p.requires_grad} == {id(theta) for theta in thetas}

    with torch.no_grad():
        for theta in thetas:
            theta.copy_(torch.rand_like(theta))
    twin = densify(copy.deepcopy(net))  # the oracle: torch's own layers with the sum, whose gradient is gathered
    assert type(twin) is type(pretrained)
    y, expected = net(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    sums = dict(twin.named_parameters())
    for one in converted_tensors(net):
        slots: Any = one.slots
        weight = sums[one.name]
        wanted = slots.base.detach().clone()
        wanted.view(-1)[slots.places] += one.theta.detach() * slots.signs
        torch.testing.assert_close(weight.detach(), wanted)
        gathered = weight.grad.reshape(-1)[slots.places] * slots.signs  # type: ignore[union-attr]
        torch.testing.assert_close(one.theta.grad, gathered, rtol=1e-4, atol=1e-5)
        assert slots.base.grad is None


def test_the_gradient_of_the_input_passes_through_both() -> None:
    layer = adapt(nn.Linear(20, 16), 0.15, compute="sparse")
    with torch.no_grad():
        layer.parametrizations.weight.original.uniform_()
    x = torch.randn(5, 20, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(F.linear(x, layer.weight + 0, layer.bias).square().sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_frozen_weight_keeps_its_dtype_and_theta_has_enough_bits(dtype: torch.dtype) -> None:
    net = nn.Linear(40, 30, dtype=dtype)
    x = torch.randn(4, 40).to(dtype)
    before = net(x)
    adapt(net, 0.1)
    theta, slots = net.parametrizations.weight.original, net.parametrizations.weight[0]
    assert torch.equal(net(x), before) and slots.base.dtype == dtype
    assert theta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    net(x).sum().backward()
    assert theta.grad.dtype == theta.dtype and bool(theta.grad.any())
    net.to(torch.float32)
    assert slots.base.dtype == torch.float32 and net(x.float()).dtype == torch.float32


def test_no_dense_tensor_is_made_under_sparse_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass forms neither the sum nor a gradient of N entries: autograd sees O(K) and activations."""
    rows, columns, batch = 64, 96, 3
    net = adapt(nn.Linear(columns, rows), 60, compute="sparse")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = net(torch.randn(batch, columns, requires_grad=True))
    base = net.parametrizations.weight[0].base
    assert all(one.numel() < rows * columns or one.data_ptr() == base.data_ptr() for one in kept)
    monkeypatch.setattr(sparse_compute, "torch_linear", lambda *_: pytest.fail("the backward pass built the weight"))
    y.sum().backward()
    assert base.grad is None


METHODS: dict[str, Callable[..., Any]] = {"DeepR": DeepR, "SET": SET, "RigL": RigL, "FixedRandom": FixedRandom}


@pytest.mark.parametrize(("name", "scope"), [*((name, "layer") for name in METHODS), ("DeepR", "global")])
def test_every_method_trains_the_difference_alone(name: str, scope: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.ReLU(), nn.Linear(30, 4))
    pretrained = copy.deepcopy(net)
    often = {} if name == "FixedRandom" else {"rewire_every_n_steps": 2}
    more: dict[str, Any] = {"scope": scope} if scope == "global" else {}
    callback = METHODS[name](0.1, of="difference", trainable=["biases"], check_invariants=True, seed=3, **often, **more)
    callback.prepare(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1)  # the frozen weights are in it, too
    handle = callback.attach(net, optimizer, total_steps=30)
    x, y = torch.randn(64, 20), torch.randint(0, 4, (64,))
    places = [one.slots.places.clone() for one in converted_tensors(net)]  # type: ignore[attr-defined]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    own = dict(pretrained.named_parameters())
    for one in converted_tensors(net):
        assert torch.equal(one.slots.base, own[one.name])  # type: ignore[attr-defined]
    moved = [
        not torch.equal(before, one.slots.places)  # type: ignore[attr-defined]
        for before, one in zip(places, converted_tensors(net), strict=True)
    ]
    assert any(moved) == (name != "FixedRandom")
    assert torch.equal(net[1].weight, own["1.weight"]) and not torch.equal(net[3].bias, own["3.bias"])  # type: ignore[arg-type]
    handle.remove()


def test_tied_layers_share_one_difference() -> None:
    net = Tied()
    adapt(net, 0.1)  # "all" takes the head's name; the embedding follows
    names = [one.name for one in converted_tensors(net)]
    assert len(names) == 2 and len(list(converted_tensors(net, every=True))) == 3
    assert net.head.parametrizations.weight.original is net.embedding.parametrizations.weight.original
    with torch.no_grad():
        net.head.parametrizations.weight.original.fill_(0.5)
    assert torch.equal(net.head.weight + 0, net.embedding.weight + 0)
    twin, x = copy.deepcopy(net), torch.randint(0, 12, (3, 5))
    assert twin.head.parametrizations.weight[0] is twin.embedding.parametrizations.weight[0]
    assert torch.equal(twin(x), net(x))
    again = load_state_dict(Tied(), net.state_dict())
    assert torch.equal(again(x), net(x)) and len(list(converted_tensors(again))) == 2
    dense = densify(net)
    assert dense.head.weight is dense.embedding.weight and type(dense.embedding) is nn.Embedding
    torch.testing.assert_close(dense(x), twin(x))


def test_what_is_trained_and_what_is_frozen() -> None:
    net = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 4))
    net[0].requires_grad_(False)  # a backbone that somebody froze is adapted all the same
    adapt(net, 0.1, trainable=["norms", "3"], target_modules="all")
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {"0.parametrizations.weight.original", "1.weight", "1.bias", "3.weight", "3.bias"}
    report = connectivity_report(net)
    assert report.adapted == {"adapted": 600, "frozen": 630, "trainable": 60 + 60 + 124}
    line = "adapted: 60 connections beside 600 frozen weights; frozen in all: 630; trainable: 244"
    assert line in " ".join(str(report).split())
    assert report.parameters == 600 + 30 + 60 + 124 and report.to_dict()["adapted"] == report.adapted


def test_a_state_dict_goes_on_bit_for_bit() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        net = adapt(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)), 0.1, trainable=["biases"])
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
        return net, optimizer, DeepR(seed=1).attach(net, optimizer, total_steps=20)

    torch.manual_seed(1)
    x, y = torch.randn(64, 20), torch.randint(0, 4, (64,))

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

    whole = start()
    train(whole[0], whole[1], 10)
    state = copy.deepcopy([one.state_dict() for one in whole])
    train(whole[0], whole[1], 10)
    again = start()
    for one, saved in zip(again, state, strict=True):
        one.load_state_dict(saved)
    train(again[0], again[1], 10)
    for (name, one), other in zip(whole[0].state_dict().items(), again[0].state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    plain = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    assert torch.equal(load_state_dict(plain, whole[0].state_dict())(x), whole[0](x))
    assert all(one.slots.adapts for one in converted_tensors(plain))


def test_an_average_of_an_adapted_network() -> None:
    net = adapt(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)), 0.1)
    with torch.no_grad():
        for one in converted_tensors(net):
            one.theta.uniform_()
    x = torch.randn(5, 20)
    for formula in (None, torch.optim.swa_utils.get_ema_avg_fn(0.9)):
        average = copy.deepcopy(torch.optim.swa_utils.AveragedModel(net, avg_fn=formula))
        for _ in range(20):
            average.update_parameters(net)
        torch.testing.assert_close(average(x), net(x))
        base = average.module[0].parametrizations.weight[0].base
        assert torch.equal(base, net[0].parametrizations.weight[0].base)
        assert average.n_averaged == 20 and average.update_parameters.average is average


@pytest.mark.slow
def test_a_whole_graph_is_compiled() -> None:
    net = adapt(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)), 0.1)
    with torch.no_grad():
        for one in converted_tensors(net):
            one.theta.uniform_()
    x = torch.randn(5, 20)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


# -- what is refused ----------------------------------------------------------------------------------------------------------


def quantized() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3))
    del net[0].weight
    net[0].register_buffer("weight", torch.zeros(3, 4, dtype=torch.int8))
    return net


def four_bits() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3))
    net[0].weight = PackedParameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes packs them
    return net


def named_otherwise() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3))
    del net[0].weight
    net[0].W_q = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)  # as HQQ names them
    return net


def recurrent() -> nn.Module:
    net = nn.Sequential(nn.LSTM(4, 3))
    return torch.ao.quantization.quantize_dynamic(net, {nn.LSTM}, dtype=torch.qint8)  # type: ignore[no-any-return]


class PackedParameter(nn.Parameter):
    pass


class Subclass(torch.Tensor):
    pass


def wrapped() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3))
    net[0].weight = nn.Parameter(torch.zeros(3, 4).as_subclass(Subclass))
    return net


def eight_bits() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3))
    net[0].weight = nn.Parameter(net[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return net


def sparse() -> nn.Module:
    return sparsify(nn.Sequential(nn.Linear(4, 3)), 3)


def adapted() -> nn.Module:
    return adapt(nn.Sequential(nn.Linear(4, 3)), 3)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "int8": (quantized, {}, r"`0.weight` is quantized \(torch.int8\)"),
    "int8, named": (quantized, {"target_modules": ["0"]}, r"`0.weight` is quantized"),
    "4 bits": (four_bits, {}, r"`0.weight` is quantized \(torch.uint8\)"),
    "4 bits, another name": (named_otherwise, {}, r"`0.W_q` is quantized \(torch.uint8\)"),
    "int8, recurrent": (recurrent, {}, r"`0` is quantized \(LSTM\)"),
    "8-bit floats": (eight_bits, {}, r"`0.weight`: expected a plain weight.*float8_e4m3fn"),
    "a subclass": (wrapped, {}, r"`0.weight`: expected a plain weight.*a Subclass"),
    "meta": (lambda: plain().to("meta"), {}, r"`0.weight` is on the meta device.*Load them first"),
    "sparse already": (sparse, {}, r"`0.weight` is converted already \(K = 3\)"),
    "adapted already": (adapted, {}, r"`0.weight` is adapted already \(K = 3\)"),
    "K above N": (plain, {"connectivity": 13}, r"13"),
    "another start": (plain, {"init": "deepr"}, r'init: expected "module" .*which starts at 0'),
    "an unknown name": (plain, {"trainable": ["heads"]}, r"trainable: 'heads' names nothing"),
    "a word": (plain, {"trainable": "biases"}, r"trainable: expected a list"),
    "both": (plain, {"trainable": ["0"], "target_modules": ["0"]}, r"target_modules and trainable both name it"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_can_not_be_adapted_is_refused_by_name(what: str) -> None:
    make, options, message = REFUSED[what]
    net = make()
    before = {name: (type(one), one.requires_grad) for name, one in net.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=message):
        adapt(net, **{"connectivity": 3, **options})
    assert before == {name: (type(one), one.requires_grad) for name, one in net.named_parameters()}


def test_the_callback_refuses_the_same() -> None:
    with pytest.raises(ValueError, match=r"`0.weight` is converted already"):
        DeepR(3, of="difference").prepare(sparse())
    with pytest.raises(ValueError, match="of: expected"):
        DeepR(3, of="weights")
    with pytest.raises(ValueError, match=r"trainable: expected with of=\"difference\""):
        DeepR(3, trainable=["biases"])


@pytest.mark.parametrize(("make", "name"), [(quantized, "1.0.weight"), (named_otherwise, "1.0.W_q"), (recurrent, "1.0")])
def test_some_quantized_layers_are_left_out_aloud(make: Callable[[], nn.Module], name: str) -> None:
    net = nn.Sequential(nn.Linear(5, 4), make())
    with pytest.warns(UserWarning, match=rf"Quantized layers are not adapted: `{name}` "):
        adapt(net, 3)
    assert [one.name for one in converted_tensors(net)] == ["0.weight"]


def test_a_weight_that_is_unfrozen_in_mid_training_is_refused() -> None:
    net = adapt(nn.Sequential(nn.Linear(20, 4)), 0.2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    DeepR().attach(net, optimizer)
    net(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    before = net[0].parametrizations.weight[0].base.detach().clone()
    net.requires_grad_(True)
    net(torch.randn(3, 20)).sum().backward()
    with pytest.raises(RuntimeError, match=r"`0.weight`: its frozen weight has requires_grad=True"):
        optimizer.step()
    assert torch.equal(net[0].parametrizations.weight[0].base, before)


def test_a_checkpoint_of_the_other_kind_is_refused() -> None:
    difference, weight = adapted(), sparse()
    for one, other in ((difference, weight), (weight, difference)):
        expected = r"`0.weight`: expected connections (upon|alone).*found connections (alone|upon)"
        with pytest.raises(RuntimeError, match=expected):
            one.load_state_dict(other.state_dict())


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = adapt(nn.Sequential(nn.Linear(20, 4)), 0.2)
        net(torch.randn(3, 20))
