"""The training-step benchmark runs on the CPU, proves that it measured fused attention, and its files are complete."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = ("bench_training_step", "training_arms", "training_timer", "training_report")
SIZE = {"dim": 32, "depth": 2, "heads": 2, "dim-head": 16, "vocab": 61, "tokens": 64, "rounds": 2}
SMALL = ["--device=cpu", *(f"--{name}={value}" for name, value in SIZE.items())]


@pytest.fixture
def bench(monkeypatch):
    """{name: module}: scripts of a folder, not of a package."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def test_every_arm_is_measured_and_the_plugin_only_fused(bench, tmp_path, capsys):
    assert bench["bench_training_step"].main([*SMALL, "--lengths", "16,32", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "training-step.json").read_text())["records"]
    arms = bench["training_arms"].ARMS
    assert [(r["seq_len"], r["batch"]) for r in records] == [(16, 4)] * len(arms) + [(32, 2)] * len(arms)
    for record in records:
        fused = 2 * (2 + 1 + 2) if record["arm"].startswith("plugin") else 0  # layers x (warm up, memory, rounds)
        assert (record["status"], record["fused_calls"], record["stock_calls"]) == ("ok", fused, 0)
        assert record["tokens_per_s"] == pytest.approx(64_000 / record["ms"])
    assert (tmp_path / "training-step.png").stat().st_size > 0
    assert "| plugin, convert | " in capsys.readouterr().out


def test_all_arms_of_a_function_have_equal_losses_and_the_others_do_not(bench):
    arms, size = bench["training_arms"].ARMS, bench["training_arms"].Size(32, 2, 2, 16, 61)
    step = bench["training_arms"].TrainingStep
    losses = {name: step(arm, size, 16, 2, "cpu", compiled=False).step().item() for name, arm in arms.items()}
    for function in ("cosine", "softmax", "none"):
        own = [loss for name, loss in losses.items() if arms[name].function == function]
        assert max(own) - min(own) < 2e-3
    assert losses["no attention"] != losses["softmax, plain"] != losses["qk-norm, plain"]


def test_learned_position_biases_which_stock_flash_does_not_take(bench, tmp_path):
    flags = [*SMALL, "--positions", "t5", "--lengths", "16", "--no-plot", "--out", str(tmp_path)]
    assert bench["bench_training_step"].main(flags) == 0
    status = {r["arm"]: r["status"] for r in json.loads((tmp_path / "training-step.json").read_text())["records"]}
    assert {arm for arm, found in status.items() if found == "unsupported"} == {"qk-norm, flash", "softmax, flash"}
    assert {status[arm] for arm in ("plugin, convert", "plugin, accelerate", "qk-norm, plain")} == {"ok"}


def test_another_function_is_an_error(bench):
    records = [
        {"arm": name, "seq_len": 16, "loss": loss} for name, loss in (("qk-norm, plain", 4.0), ("qk-norm, flash", 4.1))
    ]
    with pytest.raises(
        RuntimeError, match=r"cosine at 16 tokens: expected equal first losses, got qk-norm, plain 4\.0000"
    ):
        bench["bench_training_step"].require_equal_losses(records)


def test_out_of_memory_is_a_result(bench):
    def build():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 GiB")

    record = {"arm": "softmax, plain", "compiled": False, "seq_len": 16, "batch": 4}
    assert bench["training_timer"].measure_memory(record, build) is None
    assert record["status"] == "oom"
    run = {
        "meta": dict.fromkeys(
            ("device", "torch", "x_transformers", "model", "tokens", "dtype", "optimizer", "copy_tb_per_s"), ""
        )
    }
    assert "| softmax, plain | out of memory |" in bench["training_report"].table(run | {"records": [record]})
