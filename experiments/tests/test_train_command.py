from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from experiments import train
from experiments.shared import run
from experiments.shared.interrupt import INTERRUPTED
from experiments.shared.progress import Progress


def result_in(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_leaves_its_files(tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str):
    assert train.main([*tiny_flags, "--norm", "sandwich", "--groups", "2", "--dtype", dtype]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"checkpoint.pt", "result.json", "metrics.csv", "sample.txt", "loss.png"}
    assert "held-out bits per byte" in capsys.readouterr().out
    result = result_in(tmp_path / "out")
    assert (result["config"]["norm"], result["config"]["groups"], result["stock_calls"]) == ("sandwich", 2, 0)


def test_ctrl_c_saves_and_resume_continues_bit_for_bit(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    straight = [*tiny_flags, "--out", str(tmp_path / "straight"), "--dropout", "0.1"]
    assert train.main(straight) == 0

    original = Progress.advance

    def interrupt_after_three(self: Progress, trainer: run.Trainer) -> None:
        original(self, trainer)
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", interrupt_after_three)
        assert train.main([*tiny_flags, "--dropout", "0.1"]) == INTERRUPTED
    assert "--resume" in capsys.readouterr().out
    assert not (tmp_path / "out" / "result.json").exists()
    assert train.main(["--out", str(tmp_path / "out"), "--resume"]) == 0
    mine, theirs = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("out", "straight"))
    assert all(torch.equal(mine["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert mine["rows"] == theirs["rows"]
    assert (tmp_path / "out" / "sample.txt").read_text() == (tmp_path / "straight" / "sample.txt").read_text()


def test_a_flag_that_contradicts_the_stopped_run(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train.main(tiny_flags) == 0
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "out"), "--resume", "--lr", "1.0"])
    assert "has lr = 0.003, not 1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nothing.txt"], "--data: expected stdlib"),
        (["--dim", "33"], "dim: expected a multiple of heads = 2, got 33"),
        (["--device", "abacus"], "abacus"),
        (["--attention", "linear"], "invalid choice: 'linear'"),
        (["--resume", "--out", "nowhere"], "expected a checkpoint at nowhere"),
        pytest.param(
            ["--use-cuda-kernel"],
            "--use-cuda-kernel: expected an NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA"),
        ),
    ],
)
def test_wrong_flags_end_in_a_sentence(
    tiny_flags: list[str], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as end:
        train.main([*tiny_flags, *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--seq-len", "--use-cuda-kernel", "--attention", "--resume", "--norm"))


def test_checkpoints_on_the_way(tiny_flags: list[str], monkeypatch: pytest.MonkeyPatch):
    saved: list[int] = []
    monkeypatch.setattr(run.Trainer, "save", lambda self, path: saved.append(self.step))
    train.main([*tiny_flags, "--checkpoint-every", "3"])
    assert saved == [3, 6, 8]
