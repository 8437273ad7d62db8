from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from experiments.shared.config import NORMS, RunConfig
from experiments.shared.model import attention_calls, build_model, next_byte_loss

ARMS = [
    {"attention": "regular"},
    {"attention": "cosine", "plugin_mode": "convert"},
    {"attention": "cosine", "plugin_mode": "accelerate"},
    {"attention": "native"},
]
COSINE = ARMS[1:]

Tiny = Callable[..., RunConfig]


@pytest.fixture
def batch() -> Tensor:
    return torch.randint(0, 256, (3, 33))


def loss_and_gradients(config: RunConfig, batch: Tensor) -> tuple[float, list[Tensor]]:
    model = build_model(config)
    spread_weights(model)
    loss = next_byte_loss(model, batch)
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def spread_weights(model: nn.Module) -> None:
    """Larger queries and keys than the initial ones: the attention is then far from uniform, and matters."""
    for name, parameter in model.named_parameters():
        if "to_q" in name or "to_k" in name:
            parameter.data *= 5


@pytest.mark.parametrize("norm", NORMS)
def test_every_arm_starts_from_the_same_weights(tiny: Tiny, norm: str):
    states = [build_model(tiny(norm=norm, seed=11, groups=2, **arm)).state_dict() for arm in ARMS]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_another_seed_starts_elsewhere(tiny: Tiny):
    first, second = (build_model(tiny(seed=seed)).state_dict() for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("norm", NORMS)
def test_the_plugin_computes_what_the_native_option_does(tiny: Tiny, batch: Tensor, norm: str, groups: int):
    (native, native_gradients), *others = (
        loss_and_gradients(tiny(norm=norm, groups=groups, **arm), batch) for arm in reversed(COSINE)
    )
    for loss, gradients in others:
        assert loss == pytest.approx(native, abs=1e-5)
        for mine, theirs in zip(gradients, native_gradients, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arm", COSINE)
def test_groups_reach_the_model(tiny: Tiny, batch: Tensor, arm: dict[str, str]):
    """At an equal bound too: groups are more than another scale."""
    losses = [
        loss_and_gradients(tiny(groups=groups, scale=scale, **arm), batch)[0]
        for groups, scale in ((1, 8.0), (4, 8.0), (4, 2.0))
    ]
    assert min(abs(a - b) for a, b in ((losses[0], losses[1]), (losses[0], losses[2]), (losses[1], losses[2]))) > 1e-4


@pytest.mark.parametrize("arm", COSINE)
def test_scale_reaches_the_model(tiny: Tiny, batch: Tensor, arm: dict[str, str]):
    losses = [loss_and_gradients(tiny(scale=scale, **arm), batch)[0] for scale in (1.0, 8.0)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_norm_placement_reaches_the_model(tiny: Tiny, batch: Tensor):
    losses = {norm: loss_and_gradients(tiny(norm=norm), batch)[0] for norm in NORMS}
    assert len({round(loss, 5) for loss in losses.values()}) == len(NORMS)


def test_fused_calls_are_counted_and_no_stock_call_hides(tiny: Tiny, batch: Tensor):
    for arm in ARMS:
        model = build_model(tiny(**arm))
        for _ in range(3):
            next_byte_loss(model, batch)
        calls = attention_calls(model)
        assert (calls.fused, calls.stock) == ((3 * 2, 0) if arm["attention"] == "cosine" else (0, 0))


@pytest.mark.parametrize("arm", ARMS)
def test_no_byte_sees_a_later_one(tiny: Tiny, batch: Tensor, arm: dict[str, str]):
    model = build_model(tiny(**arm)).eval()
    changed = batch[:, :32].clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 256
    with torch.no_grad():
        before, after = model(batch[:, :32]), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-5)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)
