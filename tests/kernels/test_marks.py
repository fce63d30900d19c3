"""The bitmap of places that dense tensors keep between steps: it follows whatever writes the places."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import optim

from lightning_deepr import kernels
from lightning_deepr.kernels import available
from tests.helpers.kernel_steps import LR, Size, let_die, network
from tests.helpers.optional import needs
from tests.helpers.plain import PlainDeepR as DeepR
from tests.helpers.regression import SEED
from tests.helpers.state import all_slots, assert_equal_states, state_of

pytestmark = pytest.mark.skipif(not available(), reason="no kernels here")

# one place in 17 (no bitmap), in 16, 10, 3; exactly half; more; all but one; all. N is no multiple of 64
SIZES: list[Size] = [
    (33, 51, 99), (32, 50, 100), (33, 51, 168), (33, 51, 561), (32, 51, 816), (33, 51, 1100), (33, 51, 1682), (33, 51, 1683),
]  # fmt: skip


@pytest.mark.parametrize("alone", [True, False], ids=["each alone", "together"])
def test_steps_with_and_without_the_kernels_in_turn(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes in [[size] for size in SIZES] if alone else [SIZES]:
        nets = [network(sizes), network(sizes), network(sizes)]
        steps = []
        for net in nets:
            optimizer = optim.SGD(net.parameters(), lr=LR)
            DeepR(l1=0.0, seed=SEED, check_invariants=True).attach(net, optimizer)
            steps.append(optimizer.step)
        for step, share in enumerate((0.05, 1e-9, 0.3, 1.0, 0.02)):
            for net in nets:
                let_die(net, share, step)
            for i, take in enumerate(steps):  # kernels; PyTorch; both in turn
                with monkeypatch.context() as patch:
                    if i == 1 or (i == 2 and step % 3 == 1):
                        patch.setattr(kernels, "available", lambda: False)
                    take()
            assert_equal_states(state_of(nets[0]), state_of(nets[1]))
            assert_equal_states(state_of(nets[0]), state_of(nets[2]))


def test_places_that_are_loaded_or_written_between_steps() -> None:
    for write in ("load_state_dict", "copy_", "data"):
        net = network(SIZES)
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=0.0, seed=SEED, check_invariants=True).attach(net, optimizer)
        start = copy.deepcopy(net.state_dict())
        for step in range(6):
            let_die(net, 0.3, step)
            optimizer.step()
            if step == 2 and write == "load_state_dict":
                net.load_state_dict(start)
            elif step == 2:
                for slots in all_slots(net):
                    moved = (slots.places + 1) % slots.total
                    if write == "copy_":
                        slots.places.copy_(moved)
                    else:
                        slots.places.data = moved
                    slots.signs.copy_(slots.signs_at(slots.places))
            for slots in all_slots(net):
                assert slots.places.unique().numel() == slots.count
                assert int(slots.places.min()) >= 0 and int(slots.places.max()) < slots.total


@needs("scipy")
@pytest.mark.parametrize("density", [0.1, 0.5, 0.55, 0.9])
def test_rebirth_is_uniform_over_all_dormant_places(density: float) -> None:
    """Counted over many steps with an L1 that keeps a tenth dying: a chi-square per place against a flat share."""
    from scipy import stats

    net = network([(20, 24, round(density * 480))])
    optimizer = optim.SGD(net.parameters(), lr=LR)
    DeepR(l1=0.0, seed=SEED).attach(net, optimizer)
    (slots,) = all_slots(net)
    for step in range(300):
        let_die(net, 1.0, step)
        optimizer.step()
    seen = torch.zeros(480)
    for step in range(300, 700):
        let_die(net, 1.0, step)  # all die: every place is dormant, and K of N are drawn
        optimizer.step()
        seen[slots.places] += 1
    statistic = float(((seen - 400 * density) ** 2).sum() / (400 * density * (1 - density))) * 479 / 480
    assert 1e-4 < stats.chi2.sf(statistic, 479) < 1 - 1e-4
