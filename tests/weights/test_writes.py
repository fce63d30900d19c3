"""Writes to the dense-shaped weight, which is built at each read, are refused by name; reads are ordinary tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from lightning_deepr import FixedRandom, MagnitudePruning, SoftDeepR, densify, sparsify
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.state import assert_equal_states, state_of


class Own(nn.Module):
    """A user's layer, which clamps its weight in its forward as EEGNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.limits = False

    def forward(self, x: Tensor) -> Tensor:
        if self.limits:
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
        return F.linear(x, self.weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv, self.one = nn.Linear(8, 6), nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3)
        self.lstm, self.embedding, self.own, self.cell = nn.LSTM(5, 4), nn.Embedding(9, 7), Own(), nn.GRUCell(4, 5)
        self.attention = nn.MultiheadAttention(8, 2)


NAMES = ["linear", "conv", "one", "lstm", "embedding", "own", "cell", "attention"]
MADE: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: sparsify(Net(), 0.3, target_modules=NAMES, compute="dense"),
    "sparse": lambda: sparsify(Net(), 0.3, target_modules=NAMES, compute="sparse"),
    "global": lambda: sparsify(Net(), 0.3, target_modules=NAMES, scope="global"),
    "soft": lambda: SoftDeepR(0.3, temperature=1e-3, l1=0.1, theta_min=-1e-3, target_modules=NAMES).prepare(Net()),
    "pruned": lambda: pruned(),
}


def pruned() -> nn.Module:
    net = MagnitudePruning(0.3, target_modules=NAMES).prepare(Net())
    for one in converted_tensors(net):
        one.slots.keep(one.theta.detach() > 0, one.theta.detach())  # type: ignore[attr-defined]
    return net


def assigned(weight: Tensor) -> None:
    weight.data = torch.zeros_like(weight)


def frozen(weight: Tensor) -> None:
    weight.requires_grad = False


def item(weight: Tensor) -> None:
    weight[0] = 0


def added(weight: Tensor) -> None:
    weight.data += torch.ones(weight.shape)


def of_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[...] = 0


def of_asarray(weight: Tensor) -> None:
    np.asarray(weight.detach())[...] = 0


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "data": assigned,
    "requires_grad": frozen,
    "requires_grad_": lambda w: w.requires_grad_(False),
    "setitem": item,
    "iadd": added,
    "numpy": of_numpy,
    "asarray": of_asarray,
    "uniform": nn.init.uniform_,
    "zeros": nn.init.zeros_,
    "xavier": lambda w: nn.init.xavier_uniform_(w.flatten(1)),
    "kaiming": lambda w: nn.init.kaiming_normal_(w),
    "orthogonal": nn.init.orthogonal_,
    "trunc_normal": nn.init.trunc_normal_,
    "clamp": lambda w: w.clamp_(0),
    "data.clamp": lambda w: w.data.clamp_(0),
    "copy": lambda w: w.copy_(torch.zeros_like(w)),
    "mul of a row": lambda w: w.detach()[0].mul_(2),
    "transposed": lambda w: w.transpose(0, 1).zero_(),
    "unbind": lambda w: w.unbind()[1].add_(1),
    "flat": lambda w: w.data.view(-1)[3:5].fill_(1),
    "foreach": lambda w: torch._foreach_mul_([torch.ones(1), w], 2.0),
    "out": lambda w: torch.mul(w.clone(), 2, out=w),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(w.numel()), [w]),
    "set": lambda w: w.data.set_(torch.zeros(1)),
    "masked_fill": lambda w: w.masked_fill_(w > 0, 0.0),
    "renorm": lambda w: w.data.renorm_(2, 0, 1.0),
    "parameter": lambda w: nn.Parameter(w),
}
GRAD = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])


def weights(net: nn.Module) -> list[tuple[str, nn.Module, str]]:
    return [(one.name, one.module, one.tensor_name) for one in converted_tensors(net)]


@GRAD
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("made", MADE)
def test_a_write_is_refused_by_name(made: str, write: str, grad: bool) -> None:
    net = MADE[made]()
    before = [p.clone() for p in net.parameters()]
    for name, module, tensor_name in weights(net):
        with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)) as found:
            WRITES[write](getattr(module, tensor_name))
        if write not in ("numpy", "asarray"):  # numpy's own words: assignment destination is read-only
            assert f"`{name}` was written to after it was converted" in str(found.value), str(found.value)
            assert "densify(module)" in str(found.value)
        else:
            assert "read-only" in str(found.value)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("made", MADE)
def test_a_reset_is_refused(made: str) -> None:
    net = MADE[made]()
    before = [p.clone() for p in net.parameters()]
    for name in ("linear", "conv", "one", "lstm", "embedding", "cell"):
        with pytest.raises(
            RuntimeError, match=rf"`{name}\.weight\w*` was written to after it was converted \(`reset_parameters"
        ):
            getattr(net, name).reset_parameters()
    with pytest.raises(RuntimeError, match=r"`attention.in_proj_weight` was written to"):
        net.attention._reset_parameters()  # type: ignore[operator, union-attr]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    densify(net)
    for name in ("linear", "conv", "one", "lstm", "embedding", "cell"):
        getattr(net, name).reset_parameters()
    nn.init.zeros_(net.linear.weight)  # type: ignore[union-attr, arg-type]
    assert not net.linear.weight.any()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_a_write_in_a_forward_is_refused(compute: str) -> None:
    net = sparsify(Own(), 0.3, target_modules=["weight"], compute=compute)
    net(torch.randn(2, 8))
    net.limits = True  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match=r"`weight` was written to after it was converted \(`\.data =`\)"):
        net(torch.randn(2, 8))


def test_before_the_mask_a_write_reaches_the_weight_itself() -> None:
    """MagnitudePruning starts with an ordinary weight: theta is the weight. Only what replaces its memory would be lost."""
    net = MagnitudePruning(0.3).prepare(nn.Linear(8, 6))
    with torch.no_grad():
        nn.init.constant_(net.weight, 2.0)  # type: ignore[arg-type]
        net.weight[0] = 3.0  # type: ignore[operator, index]
    assert net.weight[0].eq(3).all() and net.weight[1:].eq(2).all()  # type: ignore[index, operator]
    net.reset_parameters()  # type: ignore[operator]
    assert not net.weight.eq(2).any()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"`weight` was written to after it was converted \(`\.data =`\)"):
        net.weight.data = torch.zeros(6, 8)


class TwoLayers(nn.Sequential):
    """Layers of names that PEFT does not take for parts of a parametrization, which are numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)


# -- a LoRA merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("safe", [False, True])
def test_a_lora_merge_into_a_converted_base_is_refused(compute: str, safe: bool) -> None:
    peft = pytest.importorskip("peft")
    net = sparsify(TwoLayers(), 0.2, compute=compute)
    lora = peft.get_peft_model(net, peft.LoraConfig(target_modules=["up", "down"], r=4, init_lora_weights=False)).eval()
    x = torch.randn(5, 20)
    y = lora(x)
    with pytest.raises(RuntimeError, match=r"`up\.weight` was written to after it was converted .*densify"):
        lora.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(densify(lora).merge_and_unload(safe_merge=safe)(x), y, rtol=1e-4, atol=1e-5)


# -- reads --------------------------------------------------------------------------------------------------------------------


@GRAD
@pytest.mark.parametrize("made", MADE)
def test_reads_are_ordinary(made: str, grad: bool) -> None:
    net = MADE[made]()
    dense = densify(copy.deepcopy(net))
    for name, module, tensor_name in weights(net):
        expected = dense.get_parameter(name).detach()
        with torch.set_grad_enabled(grad):
            weight = getattr(module, tensor_name)
            assert isinstance(weight, Tensor) and (weight.requires_grad or not grad)
            assert type(weight.clone()) is Tensor and type(weight * 2) is Tensor and type(weight.sum()) is Tensor
            for found in (weight + 0, weight.detach(), weight.data, weight.view_as(weight), weight.to(torch.float32)):
                assert torch.equal(found, expected)
            x = torch.zeros_like(expected)
            x.copy_(weight.detach())
            x[0].mul_(weight.detach()[0])
            assert torch.equal(x[1:], expected[1:])
            assert np.array_equal(weight.detach().numpy(), expected.numpy()) and weight.tolist() == expected.tolist()
            assert f"{weight}" and f"{weight.mean():.3f}" and weight.shape == expected.shape
            kept = pickle.loads(pickle.dumps(weight.detach()))
            assert type(kept) is Tensor and torch.equal(kept, expected)
            buffer = io.BytesIO()
            torch.save({"weight": weight.detach()}, buffer)
            buffer.seek(0)
            assert type(torch.load(buffer, weights_only=True)["weight"]) is Tensor
            copied = copy.deepcopy(weight.detach())
            assert type(copied) is Tensor and torch.equal(copied.zero_() + expected, expected)
            mine = weight.detach().clone()
            mine.zero_()
            nn.Parameter(mine).data.fill_(1.0)


@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_gradients_through_a_read(compute: str) -> None:
    net = sparsify(nn.Linear(8, 6), 0.4, compute=compute)
    theta = net.parametrizations.weight.original  # type: ignore[union-attr, index]
    (net.weight.square().sum() + net.weight.T[2:].sum()).backward()  # type: ignore[operator, union-attr, index]
    dense = densify(copy.deepcopy(net))
    (dense.weight.square().sum() + dense.weight.T[2:].sum()).backward()  # type: ignore[operator, union-attr, index]
    slots = next(converted_tensors(net)).slots
    expected = dense.weight.grad.view(-1)[slots.places] * slots.signs  # type: ignore[union-attr, attr-defined]
    torch.testing.assert_close(theta.grad, expected)


def test_under_transforms_and_compilers() -> None:
    net = sparsify(Own(), 0.4, target_modules=["weight"], compute="dense")
    x = torch.randn(3, 8)
    expected = net(x)
    parameters = dict(net.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    expected.square().sum().backward()
    torch.testing.assert_close(found["parametrizations.weight.original"], next(net.parameters()).grad)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    torch.testing.assert_close(each["parametrizations.weight.original"].sum(0), next(net.parameters()).grad)
    traced = torch.jit.trace(net, (x,))
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x).dtype == torch.bfloat16


# -- dense checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("made", MADE)
def test_a_dense_checkpoint_is_refused_by_a_converted_module(made: str, strict: bool) -> None:
    net = MADE[made]()
    before = state_of(net) if made in ("dense", "sparse", "global") else [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError) as found:
        net.load_state_dict({name: value for name, value in Net().state_dict().items() if "bias" not in name}, strict=strict)
    for name, _, _ in weights(net):
        assert f"`{name}`: expected " in str(found.value) and "found a dense weight" in str(found.value)
    after = state_of(net) if made in ("dense", "sparse", "global") else [p.clone() for p in net.parameters()]
    assert_equal_states(before, after)
    part = {"linear.bias": torch.ones(6)}
    net.load_state_dict(part, strict=False)  # a part without converted weights is loaded as ever


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_save_pretrained_and_from_pretrained(library: str, tmp_path: Any) -> None:
    module = pytest.importorskip(library)
    torch.manual_seed(0)
    if library == "transformers":
        config = module.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
        )
        net, x = sparsify(module.BertModel(config), 0.2, init="largest").eval(), torch.randint(0, 100, (2, 7))
        expected = net(x).last_hidden_state
        net.save_pretrained(tmp_path)  # type: ignore[operator]
        again = module.BertModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(x).last_hidden_state, expected)
        # a converted network finds its connections, strictly or not
        from safetensors.torch import load_file

        other = sparsify(module.BertModel(config), 0.2, seed=7).eval()
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(other(x).last_hidden_state, expected)
        return

    lora = module.LoraConfig(target_modules=["up", "down"], r=4, init_lora_weights=False)
    x = torch.randn(5, 20)
    for number, convert in enumerate((lambda net: net, lambda net: sparsify(net, 0.3))):  # the adapters; the base, too
        net = module.get_peft_model(convert(TwoLayers()), lora)
        sparsify(net, 0.5, target_modules=["lora_A.default", "lora_B.default"]).eval()
        net.save_pretrained(tmp_path / str(number))
        again = module.PeftModel.from_pretrained(convert(TwoLayers()), tmp_path / str(number)).eval()
        torch.testing.assert_close(again(x), net(x))


def test_an_ordinary_state_dict_has_no_dense_weight() -> None:
    def save_pretrained() -> list[str]:  # of no known library
        return list(net.state_dict())

    net = FixedRandom(0.2).prepare(nn.Linear(8, 6))
    assert "weight" not in save_pretrained() and "weight" not in net.state_dict()


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize(("name", "tensor"), [("linear", "weight"), ("conv", "weight"), ("lstm", "weight_hh_l0")])
def test_a_mask_of_torchs_pruning_is_refused(name: str, tensor: str, made: str) -> None:
    net = MADE[made]()
    with pytest.raises(ValueError, match=rf"`{name}\.{tensor}`: expected no mask upon a converted weight"):
        nn.utils.prune.l1_unstructured(getattr(net, name), tensor, 0.5)
    nn.utils.prune.l1_unstructured(net.linear, "bias", 0.5)
