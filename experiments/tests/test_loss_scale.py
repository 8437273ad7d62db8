from __future__ import annotations

import pytest
import torch

from experiments.shared.captured import Lane, Pool, Schedule, train_lanes
from experiments.shared.ensemble import Init, Members
from experiments.shared.loss_scale import FIRST, GROWTH_INTERVAL, LossScale


def test_halves_where_it_was_not_finite_and_doubles_in_time():
    scale = LossScale(2, "cpu")
    gradient = torch.tensor([[1.0, 2.0], [float("inf"), 0.0]])
    unscaled, finite = scale.unscale(gradient * FIRST)
    assert finite.tolist() == [True, False]
    torch.testing.assert_close(unscaled, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    scale.update(finite)
    assert scale.factor.tolist() == [FIRST, FIRST / 2]
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(torch.tensor([True, True]))
    assert scale.factor.tolist() == [FIRST * 2, FIRST / 2]
    assert scale.skipped.tolist() == [0, 1]


def lane_of(dtype: torch.dtype, poison: bool, rates: tuple[float, ...] = ()) -> Lane:
    """Two members that learn x -> 2 x; the second may meet a number that is no number in its fourth step."""
    members = Members({"w": Init((4,), 1.0)}, [0, 1], "cpu")
    inputs = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0))
    if poison:
        inputs[3, 1] = float("nan")
    pool = Pool(lambda _: {"x": inputs}, 8)
    losses = lambda weights, batch: ((weights["w"].float() - 2) * batch["x"]).square().mean(1) * 1e-2  # noqa: E731
    lane = Lane(members, losses, Schedule(8, 1e-1, 0), pool, dtype, rates)
    assert train_lanes({"lane": lane}, pool, 8, lambda: False, lambda step, losses: None)
    return lane


def test_a_member_leaves_out_its_bad_step_alone():
    clean, poisoned = lane_of(torch.float16, False), lane_of(torch.float16, True)
    assert poisoned.skipped_steps() == [0, 1]
    assert torch.equal(clean.members.flat[0], poisoned.members.flat[0])
    assert poisoned.members.flat.isfinite().all()
    assert not torch.equal(clean.members.flat[1], poisoned.members.flat[1])
    assert lane_of(torch.float32, True).members.flat.isfinite().all(1).tolist() == [True, False]


def test_scaling_changes_nothing_else():
    half, single = lane_of(torch.float16, False), lane_of(torch.float32, False)
    torch.testing.assert_close(half.members.flat, single.members.flat, atol=1e-2, rtol=0)


def test_each_member_at_its_own_rate():
    mixed = lane_of(torch.float32, False, (1.0, 3.0))
    slow, fast = (lane_of(torch.float32, False, (rate, rate)) for rate in (1.0, 3.0))
    torch.testing.assert_close(mixed.members.flat[0], slow.members.flat[0])
    torch.testing.assert_close(mixed.members.flat[1], fast.members.flat[1])
    norms, largest = mixed.gradient_norms()
    assert all(0 < mean <= most for mean, most in zip(norms, largest, strict=True))
    assert mixed.gradient_norms() == ([0.0, 0.0], [0.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_lane_without_rates_has_one(dtype: torch.dtype):
    assert torch.equal(lane_of(dtype, False).members.flat, lane_of(dtype, False, (1.0, 1.0)).members.flat)
