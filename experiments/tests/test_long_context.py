from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.long_context import __main__ as room
from experiments.long_context import bench
from experiments.long_context.bench_report import summary, write_report
from experiments.shared.attend import AttentionArm
from experiments.shared.captured import Lane
from experiments.shared.config import RunConfig
from experiments.shared.logit_probe import LogitProbe
from experiments.shared.question import load_question, main, report_of

FOLDER = Path(room.__file__).parent
TINY = ["--device", "cpu", "--dim", "32", "--heads", "1", "--depth", "1", "--dtype", "fp32", "--rounds", "1"]


def test_every_arm_is_a_valid_run_and_reads_as_many_bytes():
    question = load_question(FOLDER)
    configs = [job.config for job in question.jobs(RunConfig(**question.base), 1)]
    assert len({config.steps * config.batch_size * config.seq_len for config in configs}) == 1
    assert {config.seq_len for config in configs} >= {8192, 32768}


def test_trains_and_reports(text_file: Path, tmp_path: Path):
    flags = ["--dim", "32", "--depth", "1", "--heads", "1", "--eval-batches", "1", "--dtype", "fp32", "--seeds", "2"]
    command = [*flags, "--arms", "n 1024", "--steps", "2", "--eval-every", "2", "--data", str(text_file)]
    assert main(FOLDER, room.report, [*command, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "loss.png").exists()


def test_bench_measures_every_arm(tmp_path: Path):
    assert bench.main([*TINY, "--lengths", "16", "32", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert [(record["arm"], record["length"]) for record in records] == [
        (arm, n) for n in (16, 32) for arm in bench.ARMS
    ]
    assert all(record["status"] == "ok" and record["peak_bytes"] > 0 for record in records)
    for length in (16, 32):
        losses = {record["arm"]: record["loss"] for record in records if record["length"] == length}
        cosine = [loss for arm, loss in losses.items() if arm != "regular"]
        assert cosine == pytest.approx([cosine[0]] * len(cosine), abs=1e-4)
    assert (tmp_path / "bench.png").exists()


def test_what_ran_out_of_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build = bench.build

    def full(arm: dict[str, Any], length: int, options: argparse.Namespace) -> Lane:
        if arm.get("backend") == "plain":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(arm, length, options)

    monkeypatch.setattr(bench, "build", full)
    command = [*TINY, "--lengths", "16", "32", "--arms", "kernel", "plain", "--out", str(tmp_path)]
    assert bench.main(command) == 0
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert [record["status"] for record in records] == ["ok", "oom"] * 2
    assert write_report(tmp_path / "bench.json").count("out of memory") == 2


def test_report_of_a_run_that_was_cut_off(tmp_path: Path):
    assert bench.main([*TINY, "--lengths", "16", "32", "--arms", "kernel", "plain", "--out", str(tmp_path)]) == 0
    run = json.loads((tmp_path / "bench.json").read_text())
    run["records"].pop()
    (tmp_path / "bench.json").write_text(json.dumps(run))
    assert "| -" in write_report(tmp_path / "bench.json")


@pytest.mark.parametrize("attention", ["regular", "cosine"])
def test_the_probe_finds_the_largest_visible_logit(attention: str):
    config = RunConfig(attention=attention, scale=10.0)
    q, k = (torch.randn(3, 1, 2, 300, 8) for _ in range(2))
    q[..., 250, :] = 30.0
    k[..., 200, :] = 30.0  # seen by query 250
    k[..., 280, :] = 300.0 * torch.tensor([1.0] * 7 + [-1.0])  # not seen by it
    q[..., 280:, :] *= 1e-3
    probe = LogitProbe(config)
    probe.watch(q, k, None)
    expected = 30.0 * 30.0 * 8 / 8**0.5 if attention == "regular" else AttentionArm("cosine", 10.0).bound
    assert probe.take() == pytest.approx([expected] * 3, rel=1e-4)


def test_report_of_the_results_in_git(tmp_path: Path):
    assert "this kernel" in summary(json.loads((FOLDER / "bench.json").read_text()))
    for path in FOLDER.glob("results*.json"):
        assert report_of(load_question(FOLDER), [path], room.report, tmp_path).count("|") > 10
