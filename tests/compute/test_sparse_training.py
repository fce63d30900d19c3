"""Training with sparse compute equals training with dense compute after every step, whatever happens in between."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader

from lightning_deepr import DeepR, densify, sparsify
from lightning_deepr import kernels as kernels_module
from lightning_deepr.compute.order import Order, addresses
from lightning_deepr.weights import k_slots
from tests.helpers.classifier import Net, batches
from tests.helpers.regression import SEED, plain_mlp
from tests.helpers.sparse_linear import WIDTHS, Trained, data, needs_kernels
from tests.helpers.state import all_slots, assert_equal_states, state_of, theta_of
from tests.helpers.trainer import trainer

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*an int and means one single connection")


class Pair:
    """Both kinds of compute, compared after every step."""

    def __init__(self) -> None:
        self.both = [Trained("sparse"), Trained("dense")]
        self.reborn = self.slots = 0

    @property
    def nets(self) -> list[nn.Module]:
        return [one.net for one in self.both]

    def train(self, steps: int, first: int = 0) -> None:
        for batch in data(steps, first):
            before = [slots.places.clone() for slots in all_slots(self.nets[0])]
            for one in self.both:
                one.step(batch)
            self.compare()
            for old, slots in zip(before, all_slots(self.nets[0]), strict=True):
                self.reborn += int((old != slots.places).sum())
                self.slots += slots.count

    def compare(self) -> None:
        sparse, dense = self.nets
        assert [s.compute for s in all_slots(sparse)] == ["sparse"] * 3 and [s.compute for s in all_slots(dense)] == [
            "dense"
        ] * 3
        for a, b in zip(all_slots(sparse), all_slots(dense), strict=True):
            assert torch.equal(a.places, b.places) and torch.equal(a.signs, b.signs) and torch.equal(a.born, b.born)
        for p, q in zip(sparse.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-8)

    def compare_outputs(self) -> None:
        (batch,) = data(1, 99)
        kind = next(self.nets[0].parameters()).dtype
        tolerance = 1e-9 if kind == torch.float64 else 1e-4
        first, second = (net(batch[0][0].to(kind)) for net in self.nets)
        torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


@pytest.mark.parametrize("path", ["kernels", "plain PyTorch"])
def test_sparse_and_dense_training_agree(path: str, request: pytest.FixtureRequest) -> None:
    if path == "plain PyTorch":
        request.getfixturevalue("without_kernels")
    pair = Pair()
    pair.train(200 if path == "kernels" else 50)
    assert pair.reborn / pair.slots >= 0.1, f"{pair.reborn / pair.slots:.1%} reborn per step: too few to test anything"


def test_kernels_and_plain_pytorch_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Trained("sparse"), Trained("sparse")
    for batch in data(60):
        one.step(batch)
        with monkeypatch.context() as patch:
            patch.setattr(kernels_module, "available", lambda: False)
            patch.setattr(k_slots, "_told", {"cpu, torch.float64"})
            other.step(batch)
        for a, b in zip(all_slots(one.net), all_slots(other.net), strict=True):
            assert torch.equal(a.places, b.places) and torch.equal(a.signs, b.signs) and torch.equal(a.born, b.born)
        for p, q in zip(one.net.parameters(), other.net.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-8)


def test_they_agree_after_load_state_dict() -> None:
    pair = Pair()
    pair.train(10)
    kept = [copy.deepcopy(net.state_dict()) for net in pair.nets]
    pair.train(10, 1)
    assert not torch.equal(all_slots(pair.nets[0])[0].places, kept[0]["0.parametrizations.weight.0.places"])
    pair.nets[0].load_state_dict(kept[1])  # crosswise: a state_dict knows no kind of compute
    pair.nets[1].load_state_dict(kept[0])
    pair.compare()
    pair.compare_outputs()
    pair.train(20, 2)


def test_they_agree_after_deepcopy() -> None:
    pair = Pair()
    pair.train(10)
    before = [state_of(net) for net in pair.nets]
    originals = [(one.net, one.optimizer, one.rewiring) for one in pair.both]
    for one in pair.both:
        one.net = copy.deepcopy(one.net)
        one.begin()
    pair.train(20, 1)
    for (net, _, _), state in zip(originals, before, strict=True):
        assert_equal_states(state_of(net), state)  # training the copy does not change the original
    for one, (net, optimizer, rewiring) in zip(pair.both, originals, strict=True):
        one.net, one.optimizer, one.rewiring = net, optimizer, rewiring
    pair.train(10, 2)


def test_they_agree_after_another_dtype_and_back() -> None:
    pair = Pair()
    pair.train(10)
    for net in pair.nets:
        net.to(torch.float32)
    pair.compare_outputs()
    for net in pair.nets:
        net.to(torch.float64)
    for one in pair.both:  # momentum of the former dtype does not fit
        one.optimizer.state.clear()
    pair.compare()
    pair.train(20, 1)


def test_they_agree_after_an_average_is_swapped_in_and_out() -> None:
    """The swap writes through ``.data.copy_``, which does not change the version counter."""
    pair = Pair()
    averages = [AveragedModel(net, avg_fn=get_ema_avg_fn(0.9)) for net in pair.nets]

    def swap() -> None:
        for net, average in zip(pair.nets, averages, strict=True):
            for p, q in zip(average.module.parameters(), net.parameters(), strict=True):
                kept = p.data.clone()
                p.data.copy_(q.data)
                q.data.copy_(kept)

    for part in range(3):
        for step in range(5):
            pair.train(1, 10 * part + step)
            for net, average in zip(pair.nets, averages, strict=True):
                average.update_parameters(net)
        (batch,) = data(1, 98)
        first, second = (average(batch[0][0]) for average in averages)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-9)
        before = pair.nets[0](batch[0][0])
        swap()
        torch.testing.assert_close(pair.nets[0](batch[0][0]), first, rtol=0, atol=1e-12)
        assert (before - first).abs().max() > 1e-6
        pair.compare_outputs()
        swap()
        torch.testing.assert_close(pair.nets[0](batch[0][0]), before, rtol=0, atol=1e-12)


def test_they_agree_under_lightnings_weight_averaging() -> None:
    def fit(compute: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        net = Net().double()
        callback = DeepR(connectivity=0.4, l1=0.05, compute=compute, seed=SEED)
        loader = DataLoader([(x.double(), y) for x, y in batches()], batch_size=None)  # type: ignore[arg-type]
        trainer(callback, EMAWeightAveraging(decay=0.8), max_epochs=3).fit(net, loader, loader)
        assert {slots.compute for slots in all_slots(net)} == {compute}
        return [slots.places for slots in all_slots(net)], dict(net.named_parameters())

    (sparse_places, sparse), (dense_places, dense) = fit("sparse"), fit("dense")
    assert_equal_states(sparse_places, dense_places)
    for name, value in sparse.items():
        torch.testing.assert_close(value, dense[name], rtol=0, atol=1e-9)


def test_they_agree_through_a_frozen_phase() -> None:
    pair = Pair()
    pair.train(10)
    frozen = [(theta_of(net, "2.weight"), all_slots(net)[1]) for net in pair.nets]
    before = frozen[0][0].detach().clone(), frozen[0][1].places.clone()
    for theta, _ in frozen:
        theta.requires_grad_(False)
    pair.train(10, 1)
    assert torch.equal(frozen[0][0], before[0]) and torch.equal(frozen[0][1].places, before[1])
    for theta, _ in frozen:
        theta.requires_grad_(True)
    pair.train(20, 2)
    assert not torch.equal(frozen[0][1].places, before[1])


def test_they_agree_after_remove_and_densify() -> None:
    pair = Pair()
    pair.train(10)
    places = [slots.places.clone() for slots in all_slots(pair.nets[0])]
    for one in pair.both:
        one.rewiring.remove()
    pair.train(10, 1)  # without a callback, connections stay and values change
    assert_equal_states(places, [slots.places for slots in all_slots(pair.nets[0])])
    pair.compare_outputs()
    for one in pair.both:
        one.begin()
    pair.train(10, 2)
    (batch,) = data(1, 97)
    expected = pair.nets[0](batch[0][0])
    for net in pair.nets:
        densify(net)
    for net in pair.nets:
        torch.testing.assert_close(net(batch[0][0]), expected, rtol=0, atol=1e-9)
    assert [type(m) for m in pair.nets[0]] == [type(m) for m in plain_mlp(WIDTHS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_resumed_training_is_the_same_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    def begin() -> Trained:
        one = Trained("sparse")
        one.rewiring.remove()
        one.net.to(dtype)
        one.begin()
        return one

    through = begin()
    for batch in data(15):
        through.step(batch)
    torch.save(
        {"net": through.net.state_dict(), "optimizer": through.optimizer.state_dict(), "deepr": through.rewiring.state_dict()},
        tmp_path / "state.pt",
    )
    resumed = Trained("sparse", connectivity=0.2)
    resumed.rewiring.remove()
    resumed.net.to(dtype)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.net.load_state_dict(saved["net"])
    resumed.begin()
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.rewiring.load_state_dict(saved["deepr"])
    for batch in data(30, 1):
        through.step(batch)
        resumed.step(batch)
        assert_equal_states(state_of(resumed.net, resumed.optimizer), state_of(through.net, through.optimizer))


@needs_kernels
@pytest.mark.parametrize("connectivity", [0.01, 0.2, 0.5, 0.8, 1.0])
def test_the_order_that_follows_is_the_order_built_anew(connectivity: float) -> None:
    """The order depends on the places alone, not on their history; otherwise a resumed training would differ."""
    torch.manual_seed(0)
    net = sparsify(nn.Linear(90, 70, bias=False), connectivity, compute="sparse", seed=SEED)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=0.3, temperature=0.01, seed=SEED).attach(net, optimizer)
    (slots,) = all_slots(net)
    order = slots.order
    reborn = 0
    for step in range(60):
        optimizer.zero_grad()
        net(torch.randn(8, 90)).square().mean().backward()
        optimizer.step()
        reborn += int((slots.born == step).sum())
        assert slots.order is order and not order.is_stale(slots.places)
        assert torch.equal(order.buffer, Order(slots.places, slots.signs, slots.shape).buffer), f"step {step}"
    assert reborn > 3 * slots.count if connectivity < 1 else reborn == 0

    # the contents of the order, without the code that builds it
    base = order.buffer.data_ptr()
    parts = [(a - base) // 4 for a in addresses(order.buffer, 70, 90, slots.count)]
    read = [
        order.buffer[p : p + n].numpy()
        for p, n in zip(parts, (71, slots.count, slots.count, 91, slots.count, slots.count), strict=True)
    ]
    for (start, across, slot), key in ((read[:3], lambda p: p), (read[3:], lambda p: p % 90 * 70 + p // 90)):
        width = 90 if len(start) == 71 else 70
        number = slot & 0x7FFFFFFF
        sorted_slots = np.argsort([key(p) for p in slots.places.tolist()])
        assert number.tolist() == sorted_slots.tolist()
        line = np.repeat(np.arange(len(start) - 1), np.diff(start))
        assert (line * width + across == np.array([key(p) for p in slots.places.tolist()])[sorted_slots]).all()
        assert ((slot < 0) == (slots.signs.numpy()[sorted_slots] < 0)).all()
