"""The rule that steers alpha by the turnover, against the oracle and at its limits."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from lightning_deepr import TurnoverTarget
from lightning_deepr.algorithm.steering import Steering
from tests.helpers.oracle_turnover import alpha_after

OPTIONS: list[dict[str, Any]] = [
    {"start": 0.05},
    {"start": 0.1, "shape": "linear", "interval": 7},
    {"start": 0.5, "shape": "constant", "interval": 1, "gain": 1.5, "limit": 0.7},
    {"start": 0.02, "interval": 3, "gain": 3.0, "limit": 2.0, "within": 4.0},
]


@pytest.mark.parametrize("total", [400, 150, None])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_alpha_is_the_oracles_whatever_is_counted(options: dict[str, Any], total: int | None) -> None:
    """Also trainings that run past their length."""
    draw = random.Random(1)
    counts: list[tuple[int, int] | None] = []
    steering, seen = Steering(TurnoverTarget(**options)), set()
    steering.begin(0.03)
    for step in range(1, 401):
        assert steering.alpha == pytest.approx(alpha_after(counts, 0.03, total, **options), rel=1e-9)
        seen.add(steering.alpha)
        share = draw.choice([0.0, 0.0, 0.001, 0.03, 0.2, 1.0])
        count = draw.choice([1, 10, 300])
        counts.append(draw.choice([None, (round(share * count), count), (round(share * count), count)]))
        if counts[-1] is not None:
            steering.add(*counts[-1])
        if step % options.get("interval", 50) == 0:
            steering.close(min(step / total, 1.0) if total else 0.0)
    assert len(seen) > 4
    assert all(0.03 / options.get("within", 1000) <= alpha <= 0.03 * options.get("within", 1000) for alpha in seen if alpha)


def test_the_shapes() -> None:
    found = {
        shape: [TurnoverTarget(0.1, shape).wanted(p) for p in (0.0, 0.25, 0.5, 1.0)]
        for shape in ("cosine", "linear", "constant")
    }
    assert found["cosine"] == pytest.approx([0.1, 0.1 * (2 + math.sqrt(2)) / 4, 0.05, 0.0], abs=1e-17)
    assert found["linear"] == pytest.approx([0.1, 0.075, 0.05, 0.0]) and found["constant"] == [0.1] * 4
    assert found["cosine"][-1] == found["linear"][-1] == 0.0


def closed(reborn: int, exposed: int, progress: float = 0.0, **options: Any) -> Steering:
    steering = Steering(TurnoverTarget(**options))
    steering.begin(1.0)
    steering.add(reborn, exposed)
    steering.close(progress)
    return steering


def test_what_an_interval_says() -> None:
    assert closed(100, 1000, start=0.1).alpha == 1.0
    assert closed(400, 1000, start=0.1).alpha == pytest.approx(math.exp(-0.3))
    assert closed(120, 1000, start=0.1).alpha == pytest.approx(math.sqrt(0.1 / 0.12))
    assert closed(0, 1000, start=0.1).alpha == pytest.approx(math.exp(0.3)), "nothing was reborn where 100 were wanted"
    assert closed(1, 1000, progress=1.0, start=0.1).alpha == pytest.approx(math.exp(-0.3)), "nothing is wanted any more"


def test_an_interval_that_cannot_tell_stays_open() -> None:
    """The target asks for less than one connection, and none was reborn. If the target is 0, no rebirth is right."""
    quiet = closed(0, 99, start=0.01)
    assert (quiet.alpha, quiet.reborn, quiet.exposed) == (1.0, 0, 99)
    quiet.add(0, 1)
    quiet.close(0.0)
    assert (quiet.alpha, quiet.reborn, quiet.exposed) == (pytest.approx(math.exp(0.3)), 0, 0)
    assert closed(1, 99, start=0.01).alpha == pytest.approx(math.sqrt(0.99)), "one tells"
    for progress in (0.0, 1.0):
        assert closed(0, 0, progress, start=0.5).alpha == 1.0, "no step has rewired"
    assert closed(0, 10**9, progress=1.0, start=0.5).alpha == 1.0


def test_alpha_is_bounded_on_both_sides() -> None:
    for reborn, bound in ((0, 20.0), (1000, 1 / 20)):
        steering = closed(reborn, 1000, start=0.1, within=20.0)
        for _ in range(30):
            steering.add(reborn, 1000)
            steering.close(0.0)
        assert steering.alpha == pytest.approx(bound)
        steering.add(1000 - reborn, 1000)
        steering.close(0.0)
        assert steering.alpha == pytest.approx(bound * math.exp(0.3 if bound < 1 else -0.3)), "it can leave again"


def test_the_state_is_complete() -> None:
    first = closed(70, 1000, start=0.1)
    first.add(3, 500)
    second = Steering(first.target)
    second.load(first.state())
    assert second == first and all(type(value) in (int, float) for value in first.state().values())
    first.rest()
    second.load(first.state())
    assert second == first and second.alpha is None and second.rests


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": 0}, ValueError, r"start: expected a share of the slots in \(0, 0\.5\], found 0"),
        ({"start": 0.0}, ValueError, "start: .* found 0.0"),
        ({"start": 0.51}, ValueError, r"start: .* found 0\.51"),
        ({"start": -0.1}, ValueError, r"start: .* found -0\.1"),
        ({"start": math.nan}, ValueError, "start: .* found nan"),
        ({"start": True}, TypeError, "start: .* found True"),
        ({"start": "0.1"}, TypeError, "start: .* found '0.1'"),
        ({"start": None}, TypeError, "start: .* found None"),
        ({"shape": "square"}, ValueError, "shape: expected one of cosine, linear, constant, found 'square'"),
        ({"shape": None}, ValueError, "shape: .* found None"),
        ({"shape": ["cosine"]}, ValueError, r"shape: .* found \['cosine'\]"),
        ({"interval": 0}, ValueError, "interval: expected an int of at least 1, found 0"),
        ({"interval": 50.0}, ValueError, "interval: .* found 50.0"),
        ({"interval": True}, ValueError, "interval: .* found True"),
        ({"gain": 0}, ValueError, "gain: expected a finite number above 0, found 0"),
        ({"gain": math.inf}, ValueError, "gain: .* found inf"),
        ({"limit": -0.3}, ValueError, r"limit: .* found -0\.3"),
        ({"limit": math.nan}, ValueError, "limit: .* found nan"),
        ({"limit": "0.3"}, TypeError, "limit: .* found '0.3'"),
        ({"within": 1}, ValueError, "within: expected a finite number above 1, found 1"),
        ({"within": math.inf}, ValueError, "within: .* found inf"),
    ],
    ids=str,
)
def test_what_a_target_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"TurnoverTarget: {message}"):
        TurnoverTarget(**options)


def test_a_target_is_what_it_says() -> None:
    one, other = TurnoverTarget(0.1, interval=20), TurnoverTarget(0.1, interval=20)
    assert one == other and hash(one) == hash(other) and one != TurnoverTarget(0.1) and one != 0.1
    assert repr(one) == "TurnoverTarget(start=0.1, shape='cosine', interval=20)"
    assert eval(repr(one)) == one and eval(repr(TurnoverTarget(within=3.0, gain=1.0, limit=0.1))) != TurnoverTarget()
