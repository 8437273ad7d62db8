"""Compiles every variant, no GPU needed, and prints what each kernel uses. Fails on spills and wgmma remarks.

    python -m flash_cosine_sim_attention._build.compile_report [--arch 80+ 90a] [--only forward d64] [--kernels]

A variant whose sources, flags and compiler are unchanged since its last report is not compiled again. The objects
serve the ahead-of-time library as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..variants import VARIANTS, Variant
from . import BuildError, ninja
from .objects import Compiled, compile_objects
from .ptxas import KernelUsage, kernel_names, parse, remarks
from .spec import DEFAULT_ARCHS, variant_target
from .toolchain import find_toolchain


@dataclass(frozen=True, slots=True)
class Report:
    variant: Variant
    compiled: Compiled

    @property
    def kernels(self) -> list[KernelUsage]:
        return parse(self.compiled.log)

    def problems(self) -> list[str]:
        """What a maintainer has to mend; empty for a good variant."""
        name, log = self.variant.name, self.compiled.log
        if self.compiled.path is None:
            return [f"{name}: does not compile\n{ninja.excerpt(log.splitlines(keepends=True))}"]
        allowed = self.variant.allowed_spills
        names = kernel_names(kernel.symbol for kernel in self.kernels)
        found = [
            f"{name}: {names[kernel.symbol]} for {kernel.arch} spills {kernel.spills} bytes, allowed are {allowed}"
            for kernel in self.kernels
            if kernel.spills > allowed
        ]
        return found + [f"{name}: {line}" for line in sorted(set(remarks(log)))]


def table(found: Sequence[Report], all_kernels: bool) -> str:
    """A line a variant and architecture (its kernel with the most registers), or a line a kernel."""
    names = kernel_names(kernel.symbol for report in found for kernel in report.kernels)
    lines = [f"{'variant':46} {'arch':7} {'kernel':28} {'regs':>4} {'stack':>6} {'spills':>6} {'smem':>6} {'s':>6}"]
    for report in found:
        kernels = report.kernels if all_kernels else _heaviest(report.kernels)
        lines += [
            f"{report.variant.name:46} {k.arch:7} {names[k.symbol][:28]:28} {k.registers:4} {k.stack:6} {k.spills:6} "
            f"{k.shared:6} {report.compiled.seconds:6.1f}"
            for k in kernels
        ]
        if report.compiled.path is None:
            lines.append(f"{report.variant.name:46} does not compile")
    return "\n".join(lines)


def _heaviest(kernels: Sequence[KernelUsage]) -> list[KernelUsage]:
    by_arch: dict[str, KernelUsage] = {}
    for kernel in kernels:
        best = by_arch.get(kernel.arch)
        if best is None or (kernel.spills, kernel.registers) > (best.spills, best.registers):
            by_arch[kernel.arch] = kernel
    return [by_arch[arch] for arch in sorted(by_arch)]


def spills(found: Sequence[Report]) -> dict[str, int]:
    """What ALLOWED_SPILLS of variants.py would have to hold for these reports to pass."""
    worst: dict[str, int] = {}
    for report in found:
        v, most = report.variant, max((kernel.spills for kernel in report.kernels), default=0)
        key = f"{v.arch}_{v.pass_name}_d{v.head_dim}_{v.feature}"
        worst[key] = max(worst.get(key, 0), most)
    return {key: most for key, most in worst.items() if most}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--arch",
        nargs="+",
        default=DEFAULT_ARCHS,
        help="compute capabilities, e.g. 80 90a; 80+ adds PTX for later GPUs",
    )
    parser.add_argument("--only", nargs="+", default=(), help="variants whose names contain all of these")
    parser.add_argument("--kernels", action="store_true", help="a line for every kernel")
    parser.add_argument("--spills", action="store_true", help="print what ALLOWED_SPILLS would have to hold, and stop")
    parser.add_argument("--jobs", type=int, help="compilers at once")
    options = parser.parse_args(arguments)
    variants = [variant for variant in VARIANTS if all(part in variant.name for part in options.only)]
    if not variants:
        parser.error(f"--only {' '.join(options.only)}: no variant is called so")
    try:
        targets = [variant_target(variant, tuple(options.arch)) for variant in variants]
        compiled = compile_objects(targets, find_toolchain(), options.jobs)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    found = [Report(*pair) for pair in zip(variants, compiled, strict=True)]
    if options.spills:
        print("".join(f'    "{key}": {most},\n' for key, most in spills(found).items()), end="")
        return 0
    print(table(found, options.kernels))
    problems = [problem for report in found for problem in report.problems()]
    for problem in problems:
        print(problem, file=sys.stderr)
    total = sum(report.compiled.seconds for report in found)
    print(f"{len(found)} variants, {total:.0f} compiler seconds, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
