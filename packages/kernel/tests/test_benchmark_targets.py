"""The verdicts of the GPU benchmark on its figures to reach, from made-up records."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import benchmark
import normalizing
import presets
import targets


def records_for(cells, ours_ms=1.0, norms=("compiled",), **peers):
    """A record of ours and of each peer {name: ms} in every cell, all at an error of 1e-6 and 100 bytes."""
    common = {"status": "ok", "reason": "", "peak_bytes": 100}
    records = []
    for case, mode in cells:
        timed = [("ours", "fused", ours_ms), *((name, norm, ms) for name, ms in peers.items() for norm in norms)]
        for name, norm, ms in timed:
            names = {"mode": mode, "peer": name, "norm": norm, "ms": ms}
            records.append(presets.case_fields(case) | common | names | {"errors": {"out": 1e-6, "dq": 5e-7}})
    return records


def verdict_of(records, text):
    (verdict,) = [v for v in targets.judge(records) if text in v.target]
    return verdict


LONG = "1k-16k"


def test_target_holds_only_when_complete():
    cells = targets.cells("long16k", ("fwd",))
    assert len(cells) == 40
    records = records_for(cells, fa2=1.2)
    assert verdict_of(records, LONG).status == "holds"
    assert verdict_of(records, LONG).measured.endswith("mean 1.20x, 40 of 40 cells; 0 missing")
    assert verdict_of(records[2:], LONG).status == "incomplete"
    assert verdict_of([], LONG).status == "not measured"
    assert verdict_of(records_for(cells, cudnn=9.0), LONG).status == "not measured"


def test_target_fails_by_its_worst_cell():
    records = records_for(targets.cells("long16k", ("fwd",)), fa2=1.2)
    records[7]["ms"] = 1.05
    verdict = verdict_of(records, LONG)
    assert verdict.status == "does not hold"
    assert f"worst 1.05x ({presets.case_of(records[7])} fwd)" in verdict.measured


def test_target_fails_where_ours_fails():
    records = records_for(targets.cells("long16k", ("fwd",)), fa2=1.2)
    records[0] |= {"status": "oom", "reason": "no memory"}
    verdict = verdict_of(records, LONG)
    assert (verdict.status, verdict.measured.rpartition("; ")[2]) == ("does not hold", "ours failed in 1: no memory")


def test_target_of_the_best_peer_and_of_all_named():
    classic = targets.cells("classic", ("fwd",), seq_len=(512,))
    assert verdict_of(records_for(classic, fa2=3.0, cudnn=0.9), "n 512, fwd >=").status == "does not hold"
    assert verdict_of(records_for(classic, fa2=3.0, cudnn=1.1), "n 512, fwd >=").status == "holds"
    masked = targets.cells("mask", targets.BOTH)
    assert verdict_of(records_for(masked, cudnn=3.0), "key mask").status == "not measured"
    assert verdict_of(records_for(masked, cudnn=3.0, flex=2.0), "key mask").status == "holds"


def test_targets_of_memory_and_accuracy():
    memory = records_for(targets.cells("memory", ("fwd+bwd",)), fa2=1.0)
    assert verdict_of(memory, "memory").status == "holds"
    memory[0]["peak_bytes"] = 121
    assert verdict_of(memory, "memory").status == "does not hold"
    fp32 = records_for(targets.cells("fp32", targets.BOTH), efficient=2.6)
    assert {verdict_of(fp32, text).status for text in ("<= 2e-6", "2.5x SDPA efficient")} == {"holds"}
    fp32[0]["errors"]["dv"] = 3e-6
    assert verdict_of(fp32, "<= 2e-6").status == "does not hold"
    fp32[0]["errors"] = {}
    assert verdict_of(fp32, "<= 2e-6").status == "incomplete"


def test_each_target_is_covered_by_presets():
    """--preset all measures what every figure needs: its cells, ours and the peers by name."""
    options = benchmark.parse_arguments(["--device", "cpu", "--preset", "all"])
    planned = benchmark.Plan.of(benchmark.chosen_presets(options)).cells
    cells = [(case, mode) for case, mode, _ in planned]
    assert all(set(target.cells) <= set(cells) for target in targets.TARGETS)
    every_peer = dict.fromkeys(("fa2", "efficient", "cudnn", "flex"), 3.1)
    assert {v.status for v in targets.judge(records_for(cells, norms=normalizing.NORMS, **every_peer))} == {"holds"}
    assert all(a != b for a, b in pairwise(cells))
