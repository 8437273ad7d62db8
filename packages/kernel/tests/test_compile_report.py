"""What compiling every variant reports: registers, spills and remarks read from the assembler's log."""

from __future__ import annotations

from pathlib import Path

import pytest
from flash_cosine_sim_attention import variants
from flash_cosine_sim_attention._build import compile_report
from flash_cosine_sim_attention._build.compile_report import Report
from flash_cosine_sim_attention._build.objects import Compiled
from flash_cosine_sim_attention._build.ptxas import kernel_names, parse, remarks
from flash_cosine_sim_attention._build.spec import variant_target
from flash_cosine_sim_attention.variants import variant_for

VARIANT = variant_for("sm80", "forward", "bfloat16", 64, "bounded")

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4fcsa14forward_kernelINS_6TraitsILi64EEEEEvNS_13ForwardParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN4fcsa14forward_kernelINS_6TraitsILi64EEEEEvNS_13ForwardParamsE
    88 bytes stack frame, 312 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for __internal_fmad
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 88 bytes cumulative stack size, 128 bytes smem
ptxas info    : Compile time = 3.0 ms
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in function 'f'
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


class TestCompileReport:
    def test_parse(self):
        first, second = parse(LOG)
        assert (first.arch, first.registers, first.stack, first.spills, first.shared) == ("sm_80", 255, 88, 320, 128)
        assert (second.symbol, second.arch, second.registers, second.spills) == ("other", "sm_90a", 40, 0)
        assert len(remarks(LOG)) == 1
        assert set(kernel_names(kernel.symbol for kernel in (first, second)).values()) == {"forward_kernel", "other"}

    def report(self, log, path=Path("x.o")):
        return Report(VARIANT, Compiled(variant_target(VARIANT, ("80",)), path, log, 1.5))

    def test_spills_and_remarks_are_problems(self, monkeypatch):
        monkeypatch.delitem(variants.ALLOWED_SPILLS, "sm80_forward_d64_bounded", raising=False)
        monkeypatch.setattr(variants, "ALLOWED_SPILLS", {})
        spill, remark = self.report(LOG).problems()
        assert "forward_kernel for sm_80 spills 320 bytes, allowed are 0" in spill
        assert "C7510" in remark
        assert compile_report.spills([self.report(LOG)]) == {"sm80_forward_d64_bounded": 320}
        monkeypatch.setitem(variants.ALLOWED_SPILLS, "sm80_forward_d64_bounded", 320)
        assert len(self.report(LOG).problems()) == 1

    def test_a_variant_that_does_not_compile_is_a_problem(self):
        (problem,) = self.report("a.cu(1): error: no\n", None).problems()
        assert "does not compile" in problem
        assert "a.cu(1): error: no" in problem

    def test_table_has_the_heaviest_kernel_of_each_architecture(self):
        lines = compile_report.table([self.report(LOG)], all_kernels=False).splitlines()
        assert len(lines) == 3
        assert lines[1].split() == [VARIANT.name, "sm_80", "forward_kernel", "255", "88", "320", "128", "1.5"]

    def test_only_known_variants(self, capsys):
        with pytest.raises(SystemExit):
            compile_report.main(["--only", "nothing like this"])
        assert "no variant is called so" in capsys.readouterr().err
