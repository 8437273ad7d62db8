"""Members of an ensemble, the attention of the arms, and captured steps."""

from __future__ import annotations

import math

import pytest
import torch
from flash_cosine_sim_attention import plain_cosine_sim_attention
from torch import Tensor, nn

from experiments.shared.attend import AttentionArm, attend, logits
from experiments.shared.captured import Lane, Pool, Schedule, train_lanes
from experiments.shared.ensemble import Init, Members, Weights, clip_per_member, embed, linear, matrix, per_member

REGULAR = AttentionArm()
FIXED = AttentionArm("cosine", 8, 2)
LEARNED = AttentionArm("cosine", 0)
PLAIN = AttentionArm("cosine-torch", 8, 2)
STEPS = 12
INITS = {"table": Init((7, 16), 1.0), "qkv": matrix(16, 48), "log_scale": Init((2,), mean=2.0), "out": matrix(16, 1)}


def batch_of(seeds: list[int], chunk: int) -> dict[str, Tensor]:
    def one(seed: int) -> Tensor:
        return torch.randint(7, (4, 3, 5), generator=torch.Generator().manual_seed(1000 * chunk + seed))

    return {"tokens": torch.stack([one(seed) for seed in seeds], dim=1)}


def loss_of(arm: AttentionArm, weights: Weights, batch: dict[str, Tensor]) -> Tensor:
    qkv = linear(embed(batch["tokens"], weights["table"]), weights["qkv"])  # (s, 3, 5, 48)
    q, k, v = qkv.unflatten(-1, (3, 2, 8)).permute(3, 0, 1, 4, 2, 5)
    out = attend(arm, q, k, v, causal=True, log_scale=weights["log_scale"] if arm.learned else None)
    return per_member((linear(out.transpose(2, 3).flatten(-2), weights["out"])[..., 0] - 1).square())


def trained(arm: AttentionArm, seeds: list[int], device: str = "cpu", plainly: bool = False) -> Lane:
    pool = Pool(lambda chunk: {name: x.to(device) for name, x in batch_of(seeds, chunk).items()}, 4)
    schedule = Schedule(STEPS, lr=1e-2, warmup=3, ema=0.9)
    lane = Lane(Members(INITS, seeds, device), lambda w, b: loss_of(arm, w, b), schedule, pool, torch.float32)
    if plainly:
        lane.stream = None
    assert train_lanes({"lane": lane}, pool, STEPS, lambda: False, lambda step, losses: None)
    return lane


@pytest.mark.parametrize("arm", [REGULAR, FIXED, LEARNED, PLAIN], ids=lambda arm: f"{arm.kind}-{arm.scale}")
def test_a_member_learns_what_it_would_learn_alone(arm):
    together = trained(arm, [3, 5, 8])
    for member, seed in enumerate([3, 5, 8]):
        alone = trained(arm, [seed])
        torch.testing.assert_close(together.members.flat[member], alone.members.flat[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.average[member], alone.average[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(together.members.flat[0], together.members.flat[1])


@pytest.mark.gpu
@pytest.mark.parametrize("arm", [REGULAR, FIXED, LEARNED, PLAIN], ids=lambda arm: f"{arm.kind}-{arm.scale}")
def test_captured_steps_are_the_plain_ones(arm):
    captured, plain = trained(arm, [3, 5], "cuda"), trained(arm, [3, 5], "cuda", plainly=True)
    torch.testing.assert_close(captured.members.flat, plain.members.flat, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(captured.average, plain.average, rtol=1e-3, atol=1e-4)


def test_stops_between_chunks():
    pool = Pool(lambda chunk: batch_of([0], chunk), 4)
    lane = Lane(
        Members(INITS, [0], "cpu"), lambda w, b: loss_of(REGULAR, w, b), Schedule(8, 1e-2, 1), pool, torch.float32
    )
    seen: list[int] = []
    assert not train_lanes({"lane": lane}, pool, 8, lambda: bool(seen), lambda step, losses: seen.append(step))
    assert seen == [4]


def test_optimiser_is_torchs():
    """One member's trained weights against the same steps by nn.Parameter, AdamW and clip_grad_norm_."""
    lane = trained(REGULAR, [4])
    members = Members(INITS, [4], "cpu")
    weight = nn.Parameter(members.flat.detach())
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.95), weight_decay=0.0)
    schedule = Schedule(STEPS, lr=1e-2, warmup=3)
    for step, rate in enumerate(schedule.learning_rates().tolist()):
        optimizer.param_groups[0]["lr"] = rate
        batch = {"tokens": batch_of([4], step // 4)["tokens"][step % 4]}
        optimizer.zero_grad()
        loss_of(REGULAR, members.unpack(weight), batch).sum().backward()
        nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    torch.testing.assert_close(lane.members.flat.detach(), weight.detach(), rtol=1e-4, atol=1e-5)


def test_learning_rate_warms_up_and_decays():
    rates = Schedule(100, lr=2.0, warmup=10).learning_rates()
    assert rates[0] == pytest.approx(0.2)
    assert rates[10] == rates.max() == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)


def test_clips_each_member_by_itself():
    gradient = torch.randn(3, 50) * torch.tensor([[0.01], [1.0], [100.0]])
    clipped, norms = clip_per_member(gradient, 1.0)
    torch.testing.assert_close(clipped[0], gradient[0])
    assert clipped[1:].norm(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=1e-4)
    torch.testing.assert_close(norms, gradient.norm(dim=1))


@pytest.mark.parametrize("arm", [REGULAR, FIXED, LEARNED, PLAIN], ids=lambda arm: f"{arm.kind}-{arm.scale}")
@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_attention_is_the_softmax_of_the_logits(arm, factor):
    q, k, v = (torch.randn(2, 3, 2, 9, 8, dtype=torch.float64).float() for _ in range(3))
    log_scale = torch.rand(2, 2) * 3 if arm.learned else None
    found = attend(arm, q, k, v, causal=True, log_scale=log_scale, factor=factor)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    values = logits(arm, q, k, log_scale, factor).masked_fill(hidden, -math.inf)
    torch.testing.assert_close(found, values.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


def test_cosine_is_the_definition():
    q, k, v = (torch.randn(2, 3, 2, 9, 8) for _ in range(3))
    wide = [x.flatten(0, 1).double() for x in (q, k, v)]
    expected = plain_cosine_sim_attention(wide[0], wide[1], wide[2], scale=8, groups=2)
    for arm in (FIXED, PLAIN):
        torch.testing.assert_close(attend(arm, q, k, v).flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"kind": "other"}, {"scale": -1}, {"groups": 0}, {"kind": "cosine-torch", "scale": 0}]
)
def test_an_arm_that_is_none(fields):
    with pytest.raises(ValueError, match="expected"):
        AttentionArm(**fields)


def test_bounds():
    assert (REGULAR.bound, FIXED.bound, LEARNED.bound) == (math.inf, 16, 100)
