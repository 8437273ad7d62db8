"""Reads what `ptxas -v` says of each kernel: registers, shared memory, stack, spills, remarks."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelUsage:
    """One kernel of one architecture; memory in bytes a thread, shared memory (static only) in bytes a block."""

    symbol: str
    arch: str  # e.g. "sm_90a"
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '([^']+)'")
_PROPERTIES = re.compile(r"Function properties for '?([^'\s]+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_REMARK = re.compile(r"\(C75\d\d\)")


def parse(log: str) -> list[KernelUsage]:
    """The kernels of one compiler log, in its order. Device functions that were not inlined are no kernels."""
    kernels: list[KernelUsage] = []
    symbol = arch = subject = ""
    stack = (0, 0, 0)
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            symbol, arch = match.groups()
        elif match := _PROPERTIES.search(line):
            subject = match[1]
        elif match := _STACK.search(line):
            if subject == symbol:
                stack = (int(match[1]), int(match[2]), int(match[3]))
        elif symbol and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            kernels.append(KernelUsage(symbol, arch, int(match[1]), *stack, int(shared[1]) if shared else 0))
            symbol, stack = "", (0, 0, 0)
    return kernels


def remarks(log: str) -> list[str]:
    """The C75xx lines: wgmma serialised, setmaxnreg ignored: each one costs most of a Hopper kernel's speed."""
    return [line.strip() for line in log.splitlines() if _REMARK.search(line)]


def kernel_names(symbols: Iterable[str]) -> dict[str, str]:
    """Mangled symbol -> the kernel's bare name, without namespaces, template arguments and parameters."""
    symbols = sorted(set(symbols))
    tool = shutil.which("c++filt")
    if tool is None or not symbols:
        return {symbol: symbol for symbol in symbols}
    result = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, timeout=60)
    return {symbol: _bare(text) for symbol, text in zip(symbols, result.stdout.splitlines(), strict=True)}


def _bare(demangled: str) -> str:
    without = re.sub(r"\(anonymous namespace\)::", "", demangled)
    while (shorter := re.sub(r"<[^<>]*>", "", without)) != without:
        without = shorter
    return without.partition("(")[0].split("::")[-1].split(" ")[-1]
