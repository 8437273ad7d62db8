"""Compiles every variant, no GPU needed, and prints what each kernel uses. Fails on spills and wgmma remarks.

    python -m flash_cosine_sim_attention._build.compile_report [--arch 80 90a] [--only forward d64 ...] [--kernels]

A variant whose sources, flags and compiler are unchanged since its last report is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..variants import ALLOWED_SPILLS, VARIANTS, Variant
from . import BuildError, ninja
from .cache import build_timeout, cache_folder
from .ptxas import KernelUsage, kernel_names, parse, remarks
from .spec import Target, target_key, variant_target
from .toolchain import Toolchain, find_toolchain

DEFAULT_ARCHS = ("80", "90a")


@dataclass(frozen=True, slots=True)
class Report:
    variant: Variant
    log: str
    seconds: float
    compiled: bool  # False: the compiler gave up

    @property
    def kernels(self) -> list[KernelUsage]:
        return parse(self.log)

    def problems(self) -> list[str]:
        """What a maintainer has to mend; empty for a good variant."""
        if not self.compiled:
            return [f"{self.variant.name}: does not compile\n{ninja.excerpt(self.log.splitlines(keepends=True))}"]
        allowed = ALLOWED_SPILLS.get(self.variant.name, 0)
        names = kernel_names(kernel.symbol for kernel in self.kernels)
        found = [
            f"{self.variant.name}: {names[kernel.symbol]} for {kernel.arch} spills {kernel.spills} bytes, "
            f"allowed are {allowed} (variants.py)"
            for kernel in self.kernels
            if kernel.spills > allowed
        ]
        return found + [f"{self.variant.name}: {line}" for line in sorted(set(remarks(self.log)))]


def reports(
    variants: Sequence[Variant], archs: tuple[str, ...], toolchain: Toolchain, jobs: int | None = None
) -> list[Report]:
    """One report a variant, from the cache where nothing changed, else compiled now. A time-out raises BuildError."""
    targets = {variant: variant_target(variant, archs) for variant in variants}
    paths = {variant: _record_path(target, toolchain) for variant, target in targets.items()}
    missing = [variant for variant in variants if not paths[variant].exists()]
    failed: dict[Variant, Report] = {}
    if missing:
        for variant, report in _compile(missing, targets, toolchain, jobs).items():
            if report.compiled:
                _write_record(paths[variant], report)
            else:
                failed[variant] = report
    return [failed[variant] if variant in failed else _read_record(paths[variant], variant) for variant in variants]


def _record_path(target: Target, toolchain: Toolchain) -> Path:
    folder = cache_folder() / "reports"
    folder.mkdir(exist_ok=True)
    return folder / f"{target.name}-{target_key(target, toolchain)}.json"


def _write_record(path: Path, report: Report) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"log": report.log, "seconds": report.seconds}))
    os.replace(part, path)


def _read_record(path: Path, variant: Variant) -> Report:
    record = json.loads(path.read_text())
    return Report(variant, record["log"], record["seconds"], True)


def _compile(
    variants: Sequence[Variant], targets: dict[Variant, Target], toolchain: Toolchain, jobs: int | None
) -> dict[Variant, Report]:
    """Objects only: linking would tell nothing more."""
    folder = Path(tempfile.mkdtemp(prefix="report-", dir=cache_folder()))
    started = time.monotonic()
    bar = _ProgressBar()
    try:
        ninja.write_build(folder, [targets[variant] for variant in variants], toolchain, link=False)
        try:
            ninja.run(folder, toolchain, build_timeout(), bar.show, jobs, keep_going=True)
        except BuildError:
            if time.monotonic() - started > build_timeout():
                raise  # else: some do not compile, which their reports say
        seconds = ninja.durations(folder)
        return {variant: _report_of(variant, folder, seconds) for variant in variants}
    finally:
        bar.close()
        shutil.rmtree(folder, ignore_errors=True)


def _report_of(variant: Variant, folder: Path, seconds: dict[str, float]) -> Report:
    output = folder / f"{variant.name}.o"
    log = output.with_suffix(".o.log")
    text = log.read_text(errors="replace") if log.exists() else ""
    return Report(variant, text, seconds.get(output.name, 0.0), output.exists())


class _ProgressBar:
    """On stderr: in place on a terminal, else a line for every tenth."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.tenth = 0

    def show(self, finished: int, steps: int, name: str) -> None:
        elapsed = time.monotonic() - self.started
        filled = 30 * finished // steps
        line = f"[{'#' * filled}{'.' * (30 - filled)}] {finished}/{steps} {elapsed:4.0f} s  {name}"
        if self.terminal:
            sys.stderr.write(f"\r\033[K{line}")
        elif 10 * finished // steps > self.tenth:
            self.tenth = 10 * finished // steps
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self.terminal:
            sys.stderr.write("\n")


def table(found: Sequence[Report], all_kernels: bool) -> str:
    """A line a variant and architecture (its kernel with the most registers), or a line a kernel."""
    names = kernel_names(kernel.symbol for report in found for kernel in report.kernels)
    lines = [f"{'variant':46} {'arch':7} {'kernel':28} {'regs':>4} {'stack':>6} {'spills':>6} {'smem':>6} {'s':>6}"]
    for report in found:
        kernels = report.kernels if all_kernels else _heaviest(report.kernels)
        lines += [
            f"{report.variant.name:46} {k.arch:7} {names[k.symbol][:28]:28} {k.registers:4} {k.stack:6} {k.spills:6} "
            f"{k.shared:6} {report.seconds:6.1f}"
            for k in kernels
        ]
        if not report.compiled:
            lines.append(f"{report.variant.name:46} does not compile")
    return "\n".join(lines)


def _heaviest(kernels: Sequence[KernelUsage]) -> list[KernelUsage]:
    by_arch: dict[str, KernelUsage] = {}
    for kernel in kernels:
        best = by_arch.get(kernel.arch)
        if best is None or (kernel.spills, kernel.registers) > (best.spills, best.registers):
            by_arch[kernel.arch] = kernel
    return [by_arch[arch] for arch in sorted(by_arch)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", nargs="+", default=DEFAULT_ARCHS, help="compute capabilities, e.g. 80 90a")
    parser.add_argument("--only", nargs="+", default=(), help="variants whose names contain all of these")
    parser.add_argument("--kernels", action="store_true", help="a line for every kernel")
    parser.add_argument("--jobs", type=int, help="compilers at once")
    options = parser.parse_args(arguments)
    variants = [variant for variant in VARIANTS if all(part in variant.name for part in options.only)]
    if not variants:
        parser.error(f"--only {' '.join(options.only)}: no variant is called so")
    try:
        found = reports(variants, tuple(options.arch), find_toolchain(), options.jobs)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(found, options.kernels))
    problems = [problem for report in found for problem in report.problems()]
    for problem in problems:
        print(problem, file=sys.stderr)
    total = sum(report.seconds for report in found)
    print(f"{len(found)} variants, {total:.0f} compiler seconds, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
