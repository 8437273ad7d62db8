"""The sharpness experiment: tasks, theory against measured numbers, and a tiny run of it all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments.shared.attend import AttentionArm
from experiments.shared.ensemble import Members
from experiments.shared.interrupt import INTERRUPTED
from experiments.sharpness import __main__ as program
from experiments.sharpness import run
from experiments.sharpness.config import SharpnessConfig, load_arms
from experiments.sharpness.model import Decoder, Probe, decoder_inits, start_mimetic
from experiments.sharpness.tasks import PASSAGE, TASKS
from experiments.sharpness.theory import bound_for, mean_exponential, opposite, orthogonal, random_directions

TINY = SharpnessConfig(
    dim=16, heads=2, vocabulary=256, train_length=64, longest=256, batch_size=2, eval_sequences=3, steps=6, chunk=4
)
FLAGS = [
    part
    for name in ("dim", "vocabulary", "train_length", "longest", "batch_size", "eval_sequences", "steps", "chunk")
    for part in ("--" + name.replace("_", "-"), str(getattr(TINY, name)))
]


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("length", [64, 256])
def test_the_answer_is_to_be_found(task, length):
    """What is to be predicted stands in the sequence, and behind the only earlier place of the asked token."""
    made = TASKS[task](5, length, 256, torch.Generator().manual_seed(length))
    assert made.tokens.shape == (5, length)
    assert 0 <= made.tokens.min() <= made.tokens.max() < 256
    for tokens, positions, answers in zip(made.tokens, made.positions, made.answers, strict=True):
        assert torch.equal(tokens[positions + 1], answers)
        for position, answer in zip(positions.tolist(), answers.tolist(), strict=True):
            earlier = (tokens[:position] == tokens[position]).nonzero().flatten().tolist()
            assert len(earlier) == 1
            assert tokens[earlier[0] + 1] == answer


def test_passages_are_never_filler():
    made = TASKS["induction"](5, 128, 256, torch.Generator().manual_seed(0))
    assert ((made.tokens < 128).sum(1) == 2 * PASSAGE).all()


def test_sequences_follow_from_the_generator():
    for task in TASKS.values():
        one, same = (task(2, 64, 256, torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(one.tokens, same.tokens)


@pytest.mark.parametrize(("n", "bound"), [(256, 1.0), (8192, 8.0), (8192, 16.0)])
def test_theory_is_the_softmax(n, bound):
    cosines = torch.full((n,), -1.0, dtype=torch.float64)
    cosines[3] = 1
    assert opposite(n, bound) == pytest.approx((bound * cosines).softmax(0)[3].item())
    cosines = torch.zeros(n, dtype=torch.float64)
    cosines[3] = 1
    assert orthogonal(n, bound) == pytest.approx((bound * cosines).softmax(0)[3].item())
    assert orthogonal(n, bound_for(n, 0.9)) == pytest.approx(0.9)


@pytest.mark.parametrize(("dim", "bound"), [(8, 2.0), (64, 8.0)])
def test_mean_exponential_is_the_mean(dim, bound):
    cosines = F.normalize(torch.randn(200_000, dim, dtype=torch.float64), dim=-1)[:, 0]
    assert mean_exponential(bound, dim) == pytest.approx((bound * cosines).exp().mean().item(), rel=0.03)
    assert random_directions(2, bound, dim) < orthogonal(2, bound) < opposite(2, bound)


def test_no_attention_is_sharper_than_its_bound():
    """Trained or not: scale 1 cannot give one of n keys more than opposite distractors would leave it."""
    arm = AttentionArm("cosine", 1)
    members = Members(decoder_inits(TINY, arm), [0, 1], "cpu")
    probe = Probe(sequences=2)
    tokens, positions = torch.randint(256, (2, 3, 128)), torch.randint(60, 128, (2, 3, 4))
    out = Decoder(TINY, arm)(members.unpack(3 * members.flat.detach()), tokens, positions, probe=probe)
    assert out.shape == (2, 3, 4, 256)
    assert [top.shape for top in probe.top] == [(2, 2, 2, 4)] * 2
    seen = positions[:, :2, None] + 1
    for top in probe.top:
        assert (top <= 1 / (1 + (seen - 1) * math.exp(-2)) + 1e-6).all()
        assert (top >= 1 / seen - 1e-6).all()


@pytest.mark.parametrize("arm", [AttentionArm(), AttentionArm("cosine", 0)], ids=lambda arm: arm.kind)
def test_every_weight_takes_part_and_the_future_does_not(arm):
    members = Members(decoder_inits(TINY, arm), [0, 1], "cpu")
    model, positions = Decoder(TINY, arm), torch.tensor([5, 9]).expand(2, 3, 2)
    tokens = torch.randint(256, (2, 3, 64))
    flat = (members.flat + 0.1 * torch.randn_like(members.flat)).detach().requires_grad_()
    out = model(members.unpack(flat), tokens, positions)
    (gradient,) = torch.autograd.grad(out.square().sum(), flat)
    for name, part in members.unpack(gradient).items():
        assert part.abs().sum() > 0, name
    changed = tokens.clone()
    changed[:, :, 10:] = torch.randint(256, (2, 3, 54))
    torch.testing.assert_close(model(members.unpack(flat), changed, positions), out)


@pytest.mark.parametrize("task", list(TASKS))
def test_starts_able_to_look_up(task):
    """The likeliest token but the asked one itself, which the residual stream still shows, is often the answer."""
    config = replace(TINY, dim=64)
    arm = AttentionArm("cosine", 16)
    members = start_mimetic(Members(decoder_inits(config, arm), [0, 1], "cpu"))
    made = TASKS[task](4, 64, 256, torch.Generator().manual_seed(0))
    tokens, positions, answers = (x.expand(2, -1, -1) for x in (made.tokens, made.positions, made.answers))
    out = Decoder(config, arm)(members.unpack(members.flat.detach()), tokens, positions)
    out = out.scatter(-1, tokens.gather(2, positions)[..., None], -math.inf)
    assert (out.argmax(-1) == answers).float().mean() > 0.5


def test_arms_start_from_the_same_weights():
    arms = load_arms()
    assert next(iter(arms)) == "regular"
    first = Members(decoder_inits(TINY, arms["regular"]), [0], "cpu").flat
    for arm in arms.values():
        assert torch.equal(Members(decoder_inits(TINY, arm), [0], "cpu").flat[:, : first.shape[1]], first)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    command = [*FLAGS, "--arms", "regular", "cosine-learned", "--out", str(tmp_path)]
    assert program.main([*command, "--seeds", "0", "--tasks", "recall"]) == 0
    assert program.main([*command, "--seeds", "0", "1", "2"]) == 0
    assert "+-" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"theory.png", "lengths.png"}
    assert len(list(tmp_path.glob("*.json"))) == 3 * 2 * 3
    result = json.loads((tmp_path / "recall-cosine-learned-seed1.json").read_text())
    assert [row["step"] for row in result["rows"]] == [4, 6]
    found = [(row["length"], row["scaling"]) for row in result["evaluations"]]
    assert found == [(64, "fixed"), (128, "fixed"), (128, "log n"), (256, "fixed"), (256, "log n")]
    assert all(0 < row["top"] <= 1 and 0 <= row["accuracy"] <= 1 for row in result["evaluations"])
    assert len(result["scales"]) == 2
    monkeypatch.setattr(run, "Wave", None)  # all runs are there: nothing trains
    assert program.main([*command, "--seeds", "2", "1"]) == 0


def test_a_stopped_task_leaves_nothing(tmp_path: Path):
    assert program.main([*FLAGS, "--seconds", "1e-9", "--out", str(tmp_path)]) == INTERRUPTED
    assert not list(tmp_path.glob("*"))
