"""Memory and time of a training step of one sequence, by its length: the kernel, plain attention, torch's own.

    python -m experiments.long_context.bench                    n = 1024 to 32768 on a GPU
    python -m experiments.long_context.bench --lengths 64 --device cpu --dim 64 --heads 1
    python -m experiments.long_context.bench --report           table and plot of the results in git

The decoder of the trainings: forward, backward and AdamW as a captured step; what runs out of memory says so. Lengths
of one arm come one after the other, arms of one length too, so that each has the whole memory. Writes bench.json and
bench.png to --out, point by point.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..shared.captured import Batch, Lane, Pool, Schedule, use_device
from ..shared.config import DTYPES, RunConfig
from ..shared.decoder import Decoder, decoder_inits
from ..shared.ensemble import Members
from ..shared.environment import environment
from ..shared.memory import peak_memory_of
from ..shared.metrics import write_json
from .bench_report import summary, write_report

ARMS: dict[str, dict[str, Any]] = {
    "kernel": {"attention": "cosine"},
    "sdpa": {"attention": "native"},
    "regular": {"attention": "regular"},
    "chunked": {"attention": "cosine", "backend": "chunked"},
    "plain": {"attention": "cosine", "backend": "plain"},
}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
WARM_UP = 4  # steps: three as they are, then the capture
Record = dict[str, Any]
"""arm, length, status; of "ok": peak_bytes, ms, ms_min, ms_max, tokens_per_s and first loss; of "oom" the reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.report:
        print(write_report(options.out / "bench.json"))
        return 0
    use_device(options.device)
    limit_memory(options)
    options.out.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {"meta": describe(options), "records": []}
    full: set[str] = set()  # arms that ran out of memory: a longer sequence has no chance
    for length in options.lengths:
        for arm in options.arms:
            record = {"arm": arm, "length": length, "status": "oom", "reason": "as at a shorter length"}
            if arm not in full:
                record = measure(arm, length, options)
                print(record, flush=True)
            if record["status"] == "oom":
                full.add(arm)
            run["records"].append(record)
            write_json(options.out / "bench.json", run)
    print(write_report(options.out / "bench.json") if options.plot else summary(run))
    return 0


def describe(options: argparse.Namespace) -> dict[str, Any]:
    names = ("dim", "depth", "heads", "dtype", "memory_limit")
    return {**environment(), **{name: getattr(options, name) for name in names}}


def limit_memory(options: argparse.Namespace) -> None:
    """As on a smaller GPU: what this process may take."""
    if options.device.startswith("cuda") and options.memory_limit:
        total = torch.cuda.get_device_properties(options.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_limit * 2**30 / total))


def measure(arm: str, length: int, options: argparse.Namespace) -> Record:
    """One arm at one length, in memory of its own."""
    record: Record = {"arm": arm, "length": length}
    free()
    before = torch.cuda.memory_allocated() if options.device.startswith("cuda") else 0
    try:
        lane = build(ARMS[arm], length, options)
        record["peak_bytes"] = _peak_bytes(lane) - before
        record["loss"] = lane.mean_loss()[0]
        for _ in range(WARM_UP):
            lane.step()
        times = [_time_ms(lane, options.steps) for _ in range(options.rounds)]
        ms = statistics.median(times)
        record |= {"status": "ok", "ms": ms, "ms_min": min(times), "ms_max": max(times)}
        record["tokens_per_s"] = length * 1000 / ms
        del lane
    except torch.OutOfMemoryError as error:
        record |= {"status": "oom", "reason": str(error).splitlines()[0][:120]}
    free()
    return record


def build(arm: dict[str, Any], length: int, options: argparse.Namespace) -> Lane:
    """The step of `arm` on random bytes."""
    config = RunConfig(
        model="ensemble",
        scale=10.0,
        dim=options.dim,
        depth=options.depth,
        heads=options.heads,
        seq_len=length,
        batch_size=1,
        dtype=options.dtype,
        **arm,
    )
    members = Members(decoder_inits(config), [0], options.device)
    decoder = Decoder(config, options.device)

    def make(_: int) -> Batch:
        drawn = torch.randint(0, 256, (1, 1, 1, length + 1), generator=torch.Generator().manual_seed(0))
        return {"windows": drawn.to(torch.uint8).to(options.device)}

    pool = Pool(make, 1)
    schedule = Schedule(10_000, 1e-3, 10)
    return Lane(members, lambda w, b: decoder.losses(w, b["windows"]), schedule, pool, DTYPES[options.dtype])


def _peak_bytes(lane: Lane) -> int:
    """Of a step that is not captured, model, optimiser and all: a graph's memory is set aside once and for all."""
    stream, lane.stream = lane.stream, None
    lane.step()
    flat = lane.members.flat
    peak = peak_memory_of(lane.step, flat.device, lambda: [flat])
    if stream is not None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what one stream has freed another cannot use
    lane.stream = stream
    return peak


def _time_ms(lane: Lane, steps: int) -> float:
    """Of one step, the mean of several in a row."""
    if lane.stream is None:
        began = time.perf_counter()
        for _ in range(steps):
            lane.step()
        return (time.perf_counter() - began) * 1e3 / steps
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(lane.stream)
    for _ in range(steps):
        lane.step()
    end.record(lane.stream)
    end.synchronize()
    return start.elapsed_time(end) / steps


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.long_context.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="(default: all)")
    for name, default in {"dim": 512, "depth": 4, "heads": 8, "steps": 3, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--memory-limit", type=float, default=0.0, help="GiB: as on a smaller GPU (default: all of it)")
    parser.add_argument("--out", type=Path, default=Path("runs/long_context"), help="(default: runs/long_context)")
    parser.add_argument("--no-plot", dest="plot", action="store_false")
    parser.add_argument("--report", action="store_true", help="measure nothing: table and plot of --out/bench.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
