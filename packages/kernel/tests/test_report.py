"""available() and the report of `python -m flash_cosine_sim_attention`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from flash_cosine_sim_attention import available, cuda, report
from flash_cosine_sim_attention._build import BuildError
from flash_cosine_sim_attention.validation import FLOAT_DTYPES
from flash_cosine_sim_attention.variants import dtypes_of


def test_on_the_cpu():
    reasons = available("cpu")
    assert reasons["plain"] is reasons["chunked"] is reasons["sdpa"] is None
    assert reasons["sm80"] == "the tensors are not on an NVIDIA GPU"


def test_every_dtype_with_kernels_is_available(monkeypatch):
    monkeypatch.setattr(cuda, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(report, "_no_code", lambda capability: None)
    for arch in report.FUSED:
        for dtype in FLOAT_DTYPES:
            known = str(dtype).removeprefix("torch.") in dtypes_of(arch)
            assert (available("cuda", dtype)[arch] is None) == known


def test_a_gpu_without_a_compiler(monkeypatch):
    def fail():
        raise BuildError("no CUDA compiler")

    monkeypatch.setattr(cuda, "capability_of", lambda device: (8, 6))
    monkeypatch.setattr(report, "find_toolchain", fail)
    monkeypatch.setattr(report.launchers, "packaged", lambda: None)
    assert available("cuda")["sm80"] == "no CUDA compiler"
    monkeypatch.setattr(report.launchers, "packaged", lambda: {"archs": ["80+"], "sources": {}})
    assert available("cuda")["sm80"] is None
    assert available("cuda", torch.float64)["sm80"].startswith("there is no sm80 forward kernel for float64")


@pytest.mark.parametrize("variables", [{}, {"CXX": "no-such-compiler", "FLASH_COSINE_SIM_CACHE": "/proc/no"}])
def test_the_report_is_printed_whatever_is_missing(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "flash_cosine_sim_attention"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    for word in ("torch ", "compiler ", "cache ", "library ", "calls on cpu", "bfloat16"):
        assert word in text
    if variables:
        assert "none: no host compiler: no-such-compiler is not on PATH" in text
        assert "the cache folder cannot be made" in text
