from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from experiments.shared.config import NORMS, RunConfig
from experiments.shared.data import Corpus
from experiments.shared.decoder import Decoder, decoder_inits, start_deepnet
from experiments.shared.ensemble import Members
from experiments.shared.run_ensembles import _waves, run_ensembles
from experiments.shared.together import Job, Observer

Tiny = Callable[..., RunConfig]


def trained(jobs: list[Job], corpus: Corpus, together: int = 2) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    observer = Observer(lambda _: None, lambda job, result: results.update({job.name: result}))
    assert run_ensembles(jobs, corpus, together, lambda: False, observer)
    return results


def loss(config: RunConfig, windows: torch.Tensor, scaled: float = 3.0) -> torch.Tensor:
    """(s,) of first weights; queries and keys enlarged, so that attention matters."""
    members = Members(decoder_inits(config), [3, 4], "cpu")
    with torch.no_grad():
        for name, weight in members.unpack(members.flat).items():
            if name.endswith("qkv"):
                weight[..., : 2 * config.dim].mul_(scaled)
    return Decoder(config, "cpu").losses(members.unpack(members.flat), windows)


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 33), dtype=torch.uint8)


def test_a_member_learns_what_it_learns_alone(tiny: Tiny, corpus: Corpus):
    jobs = [Job("arm", tiny(model="ensemble", learned_scale=True, seed=seed)) for seed in (0, 1, 2)]
    together, alone = trained(jobs, corpus), trained(jobs[1:2], corpus)
    name = jobs[1].name
    assert together[name]["val_bpb"] == pytest.approx(alone[name]["val_bpb"], abs=1e-5)
    assert together[name]["learned_scales"][0] == pytest.approx(alone[name]["learned_scales"][0], abs=1e-3)
    assert len({round(result["val_bpb"], 6) for result in together.values()}) == 3


@pytest.mark.parametrize("attention", ["regular", "cosine"])
def test_it_learns(tiny: Tiny, corpus: Corpus, attention: str):
    jobs = [
        Job(norm, tiny(model="ensemble", attention=attention, norm=norm, steps=60, lr=1e-2, eval_every=60))
        for norm in NORMS
    ]
    for result in trained(jobs, corpus, together=4).values():
        assert result["val_bpb"] < 5.3
        assert result["diverged_at"] is None


def test_a_diverged_run_is_a_result(tiny: Tiny, corpus: Corpus):
    (result,) = trained([Job("wild", tiny(model="ensemble", lr=1e30, warmup=0))], corpus).values()
    assert result["val_bpb"] is None
    assert result["diverged_at"] == 8


def test_paths_agree_and_arms_differ(tiny: Tiny, windows: torch.Tensor):
    base = loss(tiny(model="ensemble"), windows)
    same: list[dict[str, Any]] = [{"backend": "plain"}, {"backend": "chunked"}, {"learned_scale": True}]
    others: list[dict[str, Any]] = [{"attention": "regular"}, {"scale": 1.0}, {"groups": 4}]
    for differences in same:
        assert torch.allclose(loss(tiny(model="ensemble", **differences), windows), base, atol=1e-5)
    for differences in [*others, *({"norm": norm} for norm in NORMS[1:])]:
        assert (loss(tiny(model="ensemble", **differences), windows) - base).abs().max() > 1e-4


@pytest.mark.parametrize("attention", ["regular", "cosine"])
def test_no_byte_sees_a_later_one_and_order_matters(tiny: Tiny, windows: torch.Tensor, attention: str):
    config = tiny(model="ensemble", attention=attention)
    members = Members(decoder_inits(config), [3, 4], "cpu")
    decoder, weights = Decoder(config, "cpu"), members.unpack(members.flat.detach())
    tokens = windows[:, :, :32].long()
    changed, swapped = tokens.clone(), tokens.clone()
    changed[..., 20:] = (changed[..., 20:] + 1) % 256
    swapped[..., 0], swapped[..., 1] = tokens[..., 1], tokens[..., 0]
    before = decoder(weights, tokens)
    assert torch.allclose(decoder(weights, changed)[:, :, :20], before[:, :, :20], atol=1e-5)
    assert not torch.allclose(decoder(weights, swapped)[:, :, 5:], before[:, :, 5:], atol=1e-4)


def test_deepnet_rescales_what_is_added(tiny: Tiny):
    config = tiny(model="ensemble", norm="deepnet")
    plain, scaled = (Members(decoder_inits(config), [0], "cpu") for _ in range(2))
    start_deepnet(scaled, config.depth)
    before, after = (members.unpack(members.flat.detach()) for members in (plain, scaled))
    beta = (8 * config.depth) ** -0.25
    for name in before:
        factor = 1.0 if name in ("table", "head") else beta
        if name.endswith("qkv"):
            expected = torch.cat([*before[name].chunk(3, -1)[:2], before[name].chunk(3, -1)[2] * beta], dim=-1)
        else:
            expected = before[name] * factor
        assert torch.allclose(after[name], expected)


def test_rotations_keep_the_norm_of_every_group_and_depend_on_distance_alone(tiny: Tiny):
    decoder = Decoder(tiny(model="ensemble", heads=1), "cpu")  # head dim 32
    x = torch.randn(1, 32).expand(32, 32)
    rotated = decoder._rotate(x)
    for groups in (1, 8, 16):
        before, after = (y.unflatten(-1, (groups, -1)).norm(dim=-1) for y in (x, rotated))
        assert torch.allclose(before, after, atol=1e-5)
    products = rotated @ rotated.T
    assert torch.allclose(products.diagonal(5), products[0, 5].expand(27), atol=1e-4)
    assert (products[0] - products[0, 0]).abs().max() > 1


def test_seeds_of_an_arm_are_one_ensemble(tiny: Tiny):
    rates = (1e-3, 2e-3)
    jobs = [
        Job(arm, tiny(lr=rate, scale=scale, seed=seed))
        for rate in rates
        for seed in (0, 1)
        for arm, scale in (("a", 1.0), ("b", 2.0))
    ]
    jobs.append(Job("long", tiny(steps=9)))
    found = _waves(jobs, together=3)
    assert [[(group[0].arm, group[0].config.lr, len(group)) for group in wave] for wave in found] == [
        [("a", 1e-3, 4), ("b", 1e-3, 4)],
        [("long", 3e-3, 1)],
    ]


def test_first_losses_are_near_chance(tiny: Tiny, windows: torch.Tensor):
    for norm in NORMS:
        assert float(loss(tiny(model="ensemble", norm=norm), windows, 1.0).detach().mean()) == pytest.approx(
            math.log(256), abs=0.6
        )
