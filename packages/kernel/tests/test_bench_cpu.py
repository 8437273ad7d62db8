"""The CPU benchmark runs, its variants compute the same, and its files are complete."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """(bench_cpu, cpu_cases): scripts of a folder, not of a package."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("bench_cpu"), importlib.import_module("cpu_cases")
    for name in ("bench_cpu", "cpu_cases"):
        sys.modules.pop(name, None)


def test_writes_a_record_for_every_cell(modules, tmp_path, capsys):
    bench_cpu, cpu_cases = modules
    kinds, threads = ("causal", "bias gradient"), str(torch.get_num_threads())
    options = ["--lengths", "16,24", "--kinds", ",".join(kinds), "--rounds", "2", "--threads", threads]
    bench_cpu.main([*options, "--out", str(tmp_path), "--name", "small"])
    records = json.loads((tmp_path / "small.json").read_text())["records"]
    assert len(records) == len(kinds) * 2 * len(cpu_cases.PASSES) * len(cpu_cases.VARIANTS)
    assert all(len(record["times_ms"]) == 2 and record["peak_bytes"] > 0 for record in records)
    assert (tmp_path / "small.png").stat().st_size > 0
    assert "bias gradient" in capsys.readouterr().out


def test_all_variants_compute_the_same(modules):
    _, cpu_cases = modules
    for kind in cpu_cases.KINDS:
        inputs = cpu_cases.Inputs.of(cpu_cases.Case(48, kind))
        expected = cpu_cases.run_of(cpu_cases.plain, inputs, "forward + backward")()
        for name, attention in cpu_cases.VARIANTS.items():
            for actual, wanted in zip(
                cpu_cases.run_of(attention, inputs, "forward + backward")(), expected, strict=True
            ):
                torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4, msg=f"{kind}, {name}")


def test_ratio_is_the_median_of_the_rounds(modules):
    bench_cpu, _ = modules
    cell = [
        {"variant": "ours", "times_ms": [1.0, 9.0, 2.0], "peak_bytes": 1},
        {"variant": "plain", "times_ms": [2.0, 9.0, 4.0], "peak_bytes": 4},
    ]
    assert bench_cpu.ratio(cell, "ours", "plain", "time") == 0.5
    assert bench_cpu.ratio(cell, "ours", "plain", "memory") == 0.25
    assert bench_cpu.ratio(cell, "ours", "chunked", "time") is None


def test_unknown_names_are_refused(modules, capsys):
    bench_cpu, _ = modules
    with pytest.raises(SystemExit):
        bench_cpu.parse_arguments(["--kinds", "full,circular"])
    assert "got circular" in capsys.readouterr().err
