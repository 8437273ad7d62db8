"""The flow of the GPU benchmark on tiny CPU tensors: cells, failures, budget, files. No speed is judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import baselines
import benchmark
import clocks
import inputs
import measure
import presets
import report

CASE = presets.Case("fp32", batch=1, heads=2, seq_len=24, dim=16)
TINY = ["--device", "cpu", "--batch", "1", "--heads", "2", "--dims", "16", "--num-times", "2", "--norms", "eager"]


class Fake(baselines.Baseline):
    """A peer whose function is `attend`."""

    def __init__(self, name, attend):
        super().__init__(name, baselines.ALL, masks=True)
        self.attend = attend

    def make(self, inputs, scale):
        return self.attend


def out_of_memory(q, k, v):
    raise torch.OutOfMemoryError("tried to allocate 1 TiB")


def zeros(q, k, v):
    return 0 * (q + k + v)


def not_finite(q, k, v):
    return (q + k + v) * float("nan")


@pytest.fixture
def fakes(monkeypatch):
    for name, attend in {"full": out_of_memory, "zeros": zeros, "nan": not_finite}.items():
        monkeypatch.setitem(baselines.BASELINES, name, Fake(name, attend))


def run(tmp_path, *arguments):
    """(exit status, the run's JSON)"""
    status = benchmark.main([*TINY, *arguments, "--out", str(tmp_path), "--tag", "run"])
    return status, json.loads((tmp_path / "run.json").read_text())


def cell(case, mode, *names, norm="eager", num_times=3):
    variants = [
        measure.Variant(baselines.BASELINES[name], "fused" if name.startswith("ours") else norm) for name in names
    ]
    records = []
    settings = measure.Settings(clocks.CpuClock(), num_times)
    measure.measure_cell(inputs.CaseInputs(case, torch.device("cpu")), mode, variants, settings, records)
    return {record["peer"]: record for record in records}


def test_run(tmp_path, capsys, fakes):
    status, results = run(tmp_path, "--seqs", "16,24", "--dtype", "fp32", "--peers", "plain,full")
    assert status == 0
    assert [(r["seq_len"], r["mode"], r["peer"]) for r in results["records"]] == [
        (n, mode, peer) for n in (16, 24) for mode in ("fwd", "fwd+bwd") for peer in ("ours", "plain", "full")
    ]
    for record in results["records"]:
        if record["peer"] == "full":
            assert (record["status"], record["reason"]) == ("oom", "OutOfMemoryError: tried to allocate 1 TiB")
        else:
            assert record["status"] == "ok"
            assert record["rounds"] == 2
            assert 0 < record["ms_min"] <= record["ms"] <= record["ms_max"]
            assert max(record["errors"].values()) < 1e-5
    printed = capsys.readouterr().out
    assert printed.count("seq_len: 16") == 2
    assert "full oom" in printed
    assert "full/eager: oom in 4 cells" in printed
    assert "figures to reach" in (tmp_path / "run.txt").read_text()
    assert results["missing"] == []


def test_row():
    common = presets.case_fields(CASE) | {"mode": "fwd", "norm": "compiled"}
    ours = common | {"peer": "ours", "norm": "fused", "status": "ok", "ms": 2.0}
    plain, fa2 = (common | {"peer": peer, "status": "ok", "ms": ms} for peer, ms in (("plain", 8.0), ("fa2", 3.0)))
    row = "fp32 d16 full fwd\tseq_len: 24\tslower: 0.25x\tkernel: 2 ms\tbaseline: 8 ms\tfa2 1.50x"
    assert report.row([ours, plain, fa2]) == row
    full = plain | {"status": "oom"}
    assert "slower: oom" not in report.row([full | {"peer": "fa2"}, ours])
    assert "slower: -\tkernel: 2 ms\tbaseline: oom" in report.row([ours, full])
    assert "slower: oom\tkernel: oom\tbaseline: 8 ms" in report.row([ours | {"status": "oom"}, plain])


@pytest.mark.parametrize("mode", presets.PASSES)
@pytest.mark.parametrize("masks", [{}, {"causal": True}, {"mask_prob": 0.4}, {"mask_prob": 0.4, "causal": True}])
def test_peers_agree(mode, masks):
    case = presets.Case("fp32", 4, 2, 24, 16, padded=mode == "fwd" and "mask_prob" in masks, **masks)
    for norm in ("eager", "none"):
        for record in cell(case, mode, "ours", "ours:chunked", "plain", norm=norm).values():
            assert record["status"] == "ok", record["reason"]
            expected = {"fwd": ["out"], "bwd": ["dq", "dk", "dv"], "fwd+bwd": ["out", "dq", "dk", "dv"]}[mode]
            assert list(record["errors"]) == expected
            assert max(record["errors"].values()) < 1e-5


@pytest.mark.parametrize("position", ["alibi", "table"])
def test_biases_by_position_agree(position):
    case = presets.Case("fp32", 2, 2, 24, 16, causal=True, position=position)
    for record in cell(case, "fwd+bwd", "ours", "ours:dense", "plain").values():
        assert record["status"] == "ok", record["reason"]
        assert list(record["errors"]) == ["out", "dq", "dk", "dv", "dposition"]
        assert max(record["errors"].values()) < 1e-4
    assert cell(case, "fwd", "fa2")["fa2"]["status"] == "unsupported"


def test_wrong_answers_are_not_timed(fakes):
    records = cell(CASE, "fwd", "zeros", "nan", "ours")
    assert records["zeros"]["status"] == records["nan"]["status"] == "wrong"
    assert records["zeros"]["reason"].endswith("relative error of out is 1.0e+00")
    assert "ms" not in records["zeros"]
    assert records["ours"]["status"] == "ok"


def test_unsupported():
    records = cell(CASE, "fwd", "fa2", "fa4", "ours:sm80")
    assert records["fa2"]["reason"] == "Unsupported: no fp32, only fp16, bf16"
    assert {records["fa2"]["status"], records["fa4"]["status"]} == {"unsupported"}
    assert records["ours:sm80"]["status"] == "error"
    half = presets.Case("fp16", 1, 2, 24, 16, mask_prob=0.5)
    assert cell(half, "fwd", "fa2")["fa2"]["reason"] == "Unsupported: no key mask"


def test_variants_take_turns():
    order = []

    class Clock(clocks.CpuClock):
        def time_ms(self, repeats):
            order.append([repeat() for repeat in repeats])
            return [{"a": 1.0, "b": 2.0, "c": 30.0}[name] for name in order[-1]]

    record = presets.case_fields(CASE) | {"mode": "fwd"}
    prepared = [(record | {"peer": name}, lambda name=name: name) for name in "abc"]
    measure.take_turns(prepared, measure.Settings(Clock(), num_times=3))
    assert order == [list("abc"), list("abc"), list("bca"), list("cab")]  # the first warms up
    assert [r["ms"] for r, _ in prepared] == [1.0, 2.0, 30.0]
    assert prepared[1][0]["tflops"] == CASE.flops("fwd") / 2e-3 / 1e12


def test_budget(tmp_path, capsys):
    status, results = run(tmp_path, "--seqs", "16,24", "--dtype", "fp32", "--peers", "plain", "--budget", "0")
    assert (status, results["records"]) == (0, [])
    assert results["missing"] == [f"fp32 d16 full 1x2x{n} {mode}" for n in (16, 24) for mode in ("fwd", "fwd+bwd")]
    assert "the budget was used up; 4 cells are missing" in capsys.readouterr().out


def test_lost_device(tmp_path, capsys, fakes, monkeypatch):
    def recover(self):
        raise clocks.ContextLost("illegal address")

    monkeypatch.setattr(clocks.CpuClock, "recover", recover)
    status, results = run(tmp_path, "--seqs", "16", "--dtype", "fp32", "--peers", "plain,full")
    assert status == 1
    assert [r["status"] for r in results["records"]] == ["error", "error", "oom"]
    assert "the GPU did not answer after full/eager: illegal address; 2 cells are missing" in capsys.readouterr().out


def test_warnings_are_kept(tmp_path, capsys, monkeypatch):
    import warnings

    def attend(q, k, v):
        warnings.warn("a slower path serves this call")
        return q + k + v

    monkeypatch.setitem(baselines.BASELINES, "loud", Fake("loud", attend))
    results = run(tmp_path, "--seqs", "16", "--dtype", "fp32", "--peers", "loud")[1]
    assert results["warnings"] == ["UserWarning: a slower path serves this call"]
    assert "a slower path serves this call" in capsys.readouterr().out


def test_masked_and_single_passes(tmp_path):
    arguments = ("--seqs", "16", "--dtype", "bf16", "--peers", "plain", "--causal", "--mask-prob", "0.5")
    records = run(tmp_path, *arguments, "--only-backwards")[1]["records"]
    assert {(r["mode"], r["causal"], r["mask_prob"], r["padded"]) for r in records} == {("bwd", True, 0.5, False)}
    assert {r["status"] for r in records} == {"ok"}
    records = run(tmp_path, *arguments, "--only-forwards")[1]["records"]
    assert [list(r["errors"]) for r in records] == [["out"], ["out"]]


def test_norms():
    ours, plain = baselines.BASELINES["ours"], baselines.BASELINES["plain"]
    assert baselines.norms_for(plain, ("compiled", "none")) == ("compiled", "none")
    assert baselines.norms_for(ours, ("compiled", "none")) == ("fused", "none")
    assert baselines.norms_for(ours, ("compiled", "eager")) == ("fused",)
    assert baselines.norms_for(ours, ("none",)) == ("none",)


@pytest.mark.parametrize(
    "arguments",
    [["--device", "cpu", "--peers", "fa9"], ["--device", "cpu", "--preset", "all,x"], ["--dtype", "fp64"]],
)
def test_unknown_names(arguments, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(arguments)
    assert "expected some of" in capsys.readouterr().err


def test_overlapping_presets_share_cells():
    options = benchmark.parse_arguments(["--device", "cpu", "--preset", "long16k,memory"])
    cells = benchmark.Plan.of(benchmark.chosen_presets(options)).cells
    assert len({(case, mode) for case, mode, _ in cells}) == len(cells) == 80
    assert {case.batch * case.seq_len for case, _, _ in cells} == {presets.TOKENS}
    assert {case.heads * case.dim for case, _, _ in cells} == {presets.WIDTH}


def test_flops():
    case = presets.Case("bf16", 2, 3, 5, 7)
    assert case.flops("fwd") == 4 * 2 * 3 * 5 * 5 * 7
    assert case.flops("fwd") + case.flops("bwd") == case.flops("fwd+bwd") == 3.5 * case.flops("fwd")
    assert presets.Case("bf16", 2, 3, 5, 7, causal=True).flops("fwd") == case.flops("fwd") / 2


@pytest.mark.parametrize(
    ("gpu", "folder"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("NVIDIA GeForce RTX 4090", "rtx-4090")],
)
def test_folder_name(gpu, folder):
    assert benchmark.folder_name(gpu) == folder


def test_report_merges_runs(tmp_path, capsys):
    paths = []
    for seqs in ("16,24", "24,32"):
        run(tmp_path, "--seqs", seqs, "--dtype", "fp32", "--peers", "plain", "--only-forwards")
        paths.append((tmp_path / "run.json").rename(tmp_path / f"{seqs}.json"))
    merged = benchmark.merged(paths)
    assert [(r["seq_len"], r["peer"]) for r in merged["records"]] == [
        (n, peer) for n in (16, 24, 32) for peer in ("ours", "plain")
    ]
    last = json.loads(paths[1].read_text())["records"]
    assert merged["records"][2:4] == last[:2]
    capsys.readouterr()
    assert benchmark.main(["--report", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert all(f"fp32 d16 full 1x2x{n} fwd" in printed for n in (16, 24, 32))


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    run(tmp_path, "--seqs", "16,24", "--dtype", "fp32,bf16", "--peers", "plain", "--causal")
    for dtype in ("fp32", "bf16"):
        for kind in ("speed", "tflops"):
            assert (tmp_path / f"run-{dtype}-{kind}.png").stat().st_size > 10_000


GPU_RUN = ["--device", "cuda", "--seqs", "128", "--dtype", "fp16", "--dims", "64", "--num-times", "3"]


@pytest.mark.gpu
@pytest.mark.parametrize("timer", ["graph", "events"])
@pytest.mark.parametrize("single_pass", [[], ["--only-backwards"]])
def test_on_a_gpu(tmp_path, timer, single_pass):
    arguments = [*GPU_RUN, *single_pass, "--timer", timer, "--peers", "plain,efficient,fa2", "--norms", "eager,none"]
    status, results = run(tmp_path, *arguments)
    assert status == 0
    assert {(r["status"], r["reason"]) for r in results["records"]} == {("ok", "")}
    assert all(r["peak_bytes"] > 0 and r["ms"] > 0 for r in results["records"])
    assert results["ceilings"]["tflops"] > 0


@pytest.mark.gpu
def test_failed_capture_is_contained(tmp_path, monkeypatch):
    """A peer that waits for the device cannot be captured: its own reason is shown and the others are timed."""

    def attend(q, k, v):
        q.sum().item()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=8.0)

    monkeypatch.setitem(baselines.BASELINES, "waits", Fake("waits", attend))
    status, results = run(tmp_path, *GPU_RUN, "--peers", "waits,plain", "--norms", "eager")
    assert status == 0
    by_peer = {r["peer"]: r for r in results["records"] if r["mode"] == "fwd+bwd"}
    assert {peer: r["status"] for peer, r in by_peer.items()} == {"ours": "ok", "waits": "error", "plain": "ok"}
    assert "captur" in by_peer["waits"]["reason"]


@pytest.mark.gpu
def test_out_of_memory_is_contained(tmp_path, monkeypatch):
    def attend(q, k, v):
        return q + torch.empty(1 << 50, dtype=torch.uint8, device=q.device)

    monkeypatch.setitem(baselines.BASELINES, "full", Fake("full", attend))
    results = run(tmp_path, *GPU_RUN, "--peers", "full,plain")[1]
    assert [r["status"] for r in results["records"]] == ["ok", "oom", "ok"] * 2
