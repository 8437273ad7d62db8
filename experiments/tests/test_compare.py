from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from experiments import compare
from experiments.shared import run
from experiments.shared.grid import _order, require_fused
from experiments.shared.interrupt import INTERRUPTED
from experiments.shared.progress import Progress
from experiments.shared.report import _verdict

ALL_ARMS = ["--arms", "regular", "cosine", "native"]


def test_end_to_end(tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert compare.main([*tiny_flags, *ALL_ARMS]) == 0
    out = tmp_path / "out"
    summary = (out / "summary.md").read_text()
    assert summary in capsys.readouterr().out
    assert "unigram entropy" in summary
    assert "cosine - regular" in summary
    assert "native - regular" in summary
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert all(" >>> " in (out / f"sample-{arm}.txt").read_text() for arm in ("regular", "cosine", "native"))
    check_results(json.loads((out / "results.json").read_text()))
    check_csv(out / "metrics.csv")


def check_results(results: dict[str, Any]) -> None:
    arms = results["arms"]
    assert {arm: [result["config"]["seed"] for result in seeds] for arm, seeds in arms.items()} == {
        arm: [0, 1] for arm in ("regular", "cosine", "native")
    }
    for arm, seeds in arms.items():
        for result in seeds:
            assert (result["fused_calls"] > 0) == (arm == "cosine")
            assert result["stock_calls"] == 0
            assert result["peak_memory"] > 0
    for cosine, native in zip(arms["cosine"], arms["native"], strict=True):
        assert cosine["val_bpb"] == pytest.approx(native["val_bpb"], abs=1e-3)


def check_csv(path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["arm"], row["seed"]) for row in rows} == {
        (arm, seed) for arm in ("regular", "cosine", "native") for seed in "01"
    }
    assert all(float(row["train_bpb"]) > 0 for row in rows)


def test_interrupted_and_resumed(tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps = 0
    original = Progress.advance

    def interrupt_in_the_second_run(self: Progress, trainer: run.Trainer) -> None:
        nonlocal steps
        original(self, trainer)
        steps += 1
        if steps == 11:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "advance", interrupt_in_the_second_run)
    assert compare.main(tiny_flags) == INTERRUPTED
    assert not (tmp_path / "out" / "summary.md").exists()
    assert compare.main([*tiny_flags, "--resume"]) == 0
    assert steps == 4 * 8  # none twice: two arms, two seeds
    monkeypatch.setattr(run.Trainer, "run", None)  # nothing is left to train
    assert compare.main([*tiny_flags, "--resume"]) == 0


def test_one_seed_claims_no_spread(tiny_flags: list[str], tmp_path: Path):
    assert compare.main([*tiny_flags, "--seeds", "1", "--arms", "cosine", "native"]) == 0
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "One seed says nothing about the spread" in summary
    assert "+-" not in summary


@pytest.mark.parametrize("calls", [{"fused_calls": 10, "stock_calls": 1}, {"fused_calls": 0, "stock_calls": 0}])
def test_a_comparison_with_stock_attention_is_void(calls: dict[str, int]):
    result = {"config": {"attention": "cosine"}, **calls}
    with pytest.raises(RuntimeError, match="expected fused attention calls only"):
        require_fused({"cosine": [result]})


def test_arms_take_turns():
    assert _order(["a", "b"], [0, 1]) == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]


def test_the_verdict_follows_the_spread():
    assert "within twice" in _verdict(0.01, 0.02, seeds=4)
    assert "beyond twice" in _verdict(-0.05, 0.02, seeds=4)
    assert "hint" in _verdict(-0.05, 0.02, seeds=2)
    assert "hint" not in _verdict(-0.05, 0.02, seeds=5)


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        compare.main(["--help"])
    assert end.value.code == 0
    assert "--arms" in capsys.readouterr().out


def test_no_seed_is_a_usage_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        compare.main(["--seeds", "0"])
    assert "expected at least 1, got 0" in capsys.readouterr().err
