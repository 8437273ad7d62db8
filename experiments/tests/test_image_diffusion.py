"""The diffusion experiment: schedule, sampler, Frechet distance, and a tiny run of it all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.image_diffusion import __main__ as program
from experiments.image_diffusion import run
from experiments.image_diffusion.config import ImageConfig, load_arms
from experiments.image_diffusion.data import Digits, split
from experiments.image_diffusion.diffusion import add_noise, level_losses, sample, signal_shares
from experiments.image_diffusion.frechet import frechet_distance
from experiments.image_diffusion.model import DiT, dit_inits
from experiments.shared.attend import AttentionArm
from experiments.shared.ensemble import Members
from experiments.shared.interrupt import INTERRUPTED

TINY = ImageConfig(dim=16, depth=1, heads=2, batch_size=4, steps=8, chunk=2, warmup=2, sampling_steps=4, eval_levels=2)
FLAGS = [
    part
    for name in ("dim", "depth", "heads", "batch_size", "steps", "chunk", "warmup", "sampling_steps", "eval_levels")
    for part in ("--" + name.replace("_", "-"), str(getattr(TINY, name)))
]


@pytest.fixture
def digits() -> Digits:
    """Random ones of the real shapes: the real ones need scikit-learn."""
    return split(torch.randint(0, 17, (300, 64)) / 8 - 1.0, torch.randint(10, (300,)))


@pytest.fixture
def stand_in(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "load_digits", lambda: digits)


def test_noise_keeps_the_variance():
    shares = signal_shares(1000)
    assert shares[0] > 0.999
    assert shares[-1] < 1e-4
    assert (shares.diff() < 0).all()
    noised = add_noise(torch.randn(5000, 64), torch.randn(5000, 64), shares[500].float().expand(5000))
    assert noised.std().item() == pytest.approx(1, abs=0.01)


def test_sampling_with_the_true_noise_gives_the_image():
    """Where the image is known, the noise in x is known: the sampler must come to the image from any noise."""
    image = torch.rand(2, 5, 64) * 2 - 1
    shares = signal_shares(1000)

    def predict(x: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        share = shares[levels].float()[..., None]
        return (x - image * share.sqrt()) / (1 - share).sqrt()

    found = sample(predict, torch.randn(2, 5, 64), torch.zeros(2, 5, dtype=torch.int64), shares, 50)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-3)


def test_level_losses_are_of_the_noise():
    images, labels = torch.rand(20, 64) * 2 - 1, torch.zeros(20, dtype=torch.int64)
    losses = level_losses(lambda x, levels, labels: torch.zeros_like(x), images, labels, signal_shares(100), 5, 3)
    assert losses.shape == (3, 5)
    assert losses.flatten().tolist() == pytest.approx([1] * 15, abs=0.15)


def test_frechet_distance_of_gaussians():
    """Of N(0, 1) and N(m, s^2) in each of f dims: f (m^2 + (s - 1)^2); samples come close."""
    one, other = torch.randn(40_000, 8), 1.5 * torch.randn(40_000, 8) + 2
    assert frechet_distance(one, other) == pytest.approx(8 * (4 + 0.25), rel=0.03)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))


@pytest.mark.parametrize("arm", [AttentionArm(), AttentionArm("cosine", 8, 4), AttentionArm("cosine", 0)])
def test_model_starts_at_zero_and_every_weight_takes_part(arm):
    members = Members(dit_inits(TINY, arm), [0, 1], "cpu")
    model = DiT(TINY, arm, "cpu")
    images, levels, labels = torch.randn(2, 3, 64), torch.randint(1000, (2, 3)), torch.randint(10, (2, 3))
    assert (model(members.unpack(members.flat), images, levels, labels) == 0).all()
    flat = (members.flat + 0.1 * torch.randn_like(members.flat)).detach().requires_grad_()
    out = model(members.unpack(flat), images, levels, labels)
    assert out.shape == images.shape
    (out - torch.randn_like(out)).square().sum().backward()
    assert flat.grad is not None
    for name, gradient in members.unpack(flat.grad).items():
        assert gradient.abs().sum() > 0, name


def test_classes_and_levels_matter():
    members = Members(dit_inits(TINY, AttentionArm()), [0], "cpu")
    weights = members.unpack((members.flat + 0.1 * torch.randn_like(members.flat)).detach())
    model, images = DiT(TINY, AttentionArm(), "cpu"), torch.randn(1, 2, 64)
    out = model(weights, images, torch.tensor([[3, 900]]), torch.tensor([[1, 7]]))
    other_level = model(weights, images, torch.tensor([[4, 900]]), torch.tensor([[1, 7]]))
    other_class = model(weights, images, torch.tensor([[3, 900]]), torch.tensor([[1, 2]]))
    assert not torch.equal(out[:, 0], other_level[:, 0])
    assert torch.equal(out[:, 0], other_class[:, 0])
    assert not torch.equal(out[:, 1], other_class[:, 1])


def test_splits_are_disjoint(digits: Digits):
    assert (len(digits.train), len(digits.test)) == (240, 60)
    rows = {tuple(image.tolist()) for image in digits.train}
    assert not rows & {tuple(image.tolist()) for image in digits.test}


def test_arms_differ_in_attention_alone():
    arms = load_arms()
    assert next(iter(arms)) == "regular"
    for arm in arms.values():
        assert dit_inits(TINY, arm) == dit_inits(TINY, AttentionArm())


@pytest.mark.usefixtures("stand_in")
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    command = [*FLAGS, "--arms", "regular", "cosine-g8", "--sample-seeds", "2", "--out", str(tmp_path)]
    assert program.main([*command, "--seeds", "0"]) == 0
    assert program.main([*command, "--seeds", "0", "3"]) == 0
    assert "+-" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"quality.png", "levels.png", "samples.png"}
    result = json.loads((tmp_path / "cosine-g8-seed3.json").read_text())
    assert [row["step"] for row in result["rows"]] == [2, 4, 6, 8]
    assert [len(row["scores"]) for row in result["evaluations"]] == [1, 1, 2]
    assert all(math.isfinite(score["fd_test"]) for row in result["evaluations"] for score in row["scores"])
    monkeypatch.setattr(run, "Wave", None)  # all runs are there: nothing trains
    assert program.main([*command, "--seeds", "3", "0"]) == 0
    with pytest.raises(ValueError, match="another --out"):
        program.main([*command, "--lr", "0.1"])


@pytest.mark.usefixtures("stand_in")
def test_a_stopped_wave_leaves_nothing(tmp_path: Path):
    assert program.main([*FLAGS, "--seconds", "1e-9", "--out", str(tmp_path)]) == INTERRUPTED
    assert not list(tmp_path.glob("*"))


def test_real_digits():
    pytest.importorskip("sklearn")
    from experiments.image_diffusion.data import load_digits

    digits = load_digits()
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert (digits.train.min(), digits.train.max()) == (-1, 1)
