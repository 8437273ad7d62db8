"""Timing one cell: every variant of one case and pass is prepared, then all take turns in one loop.

Taking turns lets clocks, temperature and power limit meet all variants alike; the L2 cache is overwritten before each
run. On a GPU a variant is captured as a CUDA graph and its replays are timed with events: no launch gaps, no Python.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from baselines import Baseline, Unsupported, attention_with_norm
from clocks import Clock, Run, brief
from inputs import CaseInputs
from presets import case_fields, case_of
from torch import Tensor

Results = dict[str, Tensor]

WARM_UPS = 2
ERROR_LIMITS = {"fp16": 0.05, "bf16": 0.05, "fp32": 1e-3}
"""A relative error beyond this is a wrong answer, not rounding: such a variant is not timed."""

MAX_CELL_SECONDS, MIN_ROUNDS = 4.0, 5
"""A cell of long runs gets fewer rounds than asked for, but not fewer than these."""


class WrongResult(Exception):
    """The variant computes something else."""


@dataclass(frozen=True)
class Variant:
    """One column of the tables: a baseline, and how its q and k are normalised (normalizing.NORMS, or "fused")."""

    baseline: Baseline
    norm: str


Record = dict[str, Any]
"""One variant in one cell: the case's fields, mode, peer, norm, status; of "ok" ms, ms_min, ms_max, rounds, tflops,
errors, peak_bytes; of all else the reason."""


@dataclass(frozen=True)
class Settings:
    """What is the same in all cells."""

    clock: Clock
    num_times: int = 20
    scale: float = 8.0


def measure_cell(
    inputs: CaseInputs, mode: str, variants: list[Variant], settings: Settings, records: list[Record]
) -> None:
    """Append a record for each variant. ContextLost comes after the record of the variant that is to blame."""
    prepared = []
    with settings.clock.stream():
        for variant in variants:
            record = case_fields(inputs.case) | {"mode": mode, "peer": variant.baseline.name, "norm": variant.norm}
            record |= {"status": "error", "reason": "the cell did not come to its end"}
            records.append(record)
            repeat = attempt(variant, inputs, mode, settings, record)
            if repeat is not None:
                prepared.append((record, repeat))
        try:
            take_turns(prepared, settings)
        except Exception as error:  # the device runs behind the host: which of them it was is not known
            for record, _ in prepared:
                record |= {"status": status_of(error), "reason": f"while taking turns: {brief(error)}"}
            settings.clock.recover()


def attempt(variant: Variant, inputs: CaseInputs, mode: str, settings: Settings, record: Record) -> Run | None:
    """The repeatable run of a variant; None, and the reason in the record, if it fails."""
    try:
        measured, repeat = prepare(variant, inputs, mode, settings)
        record |= measured
        return repeat
    except Exception as error:  # whatever a peer raises is a result, and is shown as one
        record |= {"status": status_of(error), "reason": brief(error)}
    settings.clock.recover()
    return None


def prepare(variant: Variant, inputs: CaseInputs, mode: str, settings: Settings) -> tuple[Record, Run]:
    """Warm up (compiles), check against float64, measure memory -> ({errors, peak_bytes}, what is to be timed)."""
    baseline, clock, scale = variant.baseline, settings.clock, settings.scale
    baseline.check(inputs.case)
    with baseline.context():
        inner = make_run(variant, inputs, mode, scale)

    def run() -> Results:
        with baseline.context():
            return inner()

    for _ in range(WARM_UPS):
        results = run()
    errors = inputs.errors(results, baseline.layout, variant.norm == "none", scale)
    require_right(errors, results, inputs.case.dtype)
    del results
    peak = clock.peak_bytes(run)
    return {"errors": errors, "peak_bytes": peak}, clock.repeatable(run)


def make_run(variant: Variant, inputs: CaseInputs, mode: str, scale: float) -> Callable[[], Results]:
    """The pass as a function without arguments; that of "bwd" goes again and again over one forward."""
    attend = attention_with_norm(variant.baseline, variant.norm, inputs, scale)
    *qkv, dout = inputs.tensors(variant.baseline.layout, variant.norm == "none")
    leaves = [x.detach().requires_grad_() for x in qkv]
    biases = inputs.leaf_bias()
    names = ("dq", "dk", "dv", *biases)

    def forward() -> Results:
        with torch.no_grad():
            return {"out": attend(*qkv)}

    def gradients(out: Tensor, retain: bool) -> Results:
        wanted = [*leaves, *biases.values()]
        return dict(zip(names, torch.autograd.grad(out, wanted, dout, retain_graph=retain), strict=True))

    def forward_backward() -> Results:
        out = attend(*leaves)
        return {"out": out.detach()} | gradients(out, retain=False)

    if mode == "bwd":
        kept = attend(*leaves)
        return lambda: gradients(kept, retain=True)
    return forward if mode == "fwd" else forward_backward


def require_right(errors: dict[str, float], results: Results, dtype: str) -> None:
    """WrongResult for NaN, Inf, or an error that is no rounding."""
    for name, result in results.items():
        if not bool(result.isfinite().all()):
            raise WrongResult(f"{name} is not finite")
    for name, error in errors.items():
        if not error <= ERROR_LIMITS[dtype]:
            raise WrongResult(f"relative error of {name} is {error:.1e}")


def take_turns(prepared: list[tuple[Record, Run]], settings: Settings) -> None:
    """Round after round every variant runs once, each round starting with another one; medians go to the records."""
    if not prepared:
        return
    clock, repeats = settings.clock, [repeat for _, repeat in prepared]
    times: list[list[float]] = [[] for _ in repeats]
    start = time.monotonic()
    clock.time_ms(repeats)
    while time.monotonic() - start < clock.warm_up_seconds:
        clock.time_ms(repeats)
    start = time.monotonic()
    for turn in range(settings.num_times):
        order = [(turn + i) % len(repeats) for i in range(len(repeats))]
        for i, ms in zip(order, clock.time_ms([repeats[i] for i in order]), strict=True):
            times[i].append(ms)
        if turn + 1 >= MIN_ROUNDS and time.monotonic() - start > MAX_CELL_SECONDS:
            break
    for (record, _), measured in zip(prepared, times, strict=True):
        record |= {"ms": statistics.median(measured), "ms_min": min(measured), "ms_max": max(measured)}
        tflops = case_of(record).flops(record["mode"]) / record["ms"] / 1e9
        record |= {"status": "ok", "reason": "", "rounds": len(measured), "tflops": tflops}


def status_of(error: Exception) -> str:
    """ "oom", "unsupported", "wrong", or "error" for all else."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "oom"
    if isinstance(error, Unsupported) or "No available kernel" in str(error) or "No viable backend" in str(error):
        return "unsupported"
    return "wrong" if isinstance(error, WrongResult) else "error"


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan
