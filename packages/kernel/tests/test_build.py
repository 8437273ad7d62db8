"""The builder: keys, the build file, locks, time-outs, publication, the reading of compiler logs."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from flash_cosine_sim_attention import variants
from flash_cosine_sim_attention._build import (
    BuildError,
    aot,
    cache,
    compile_report,
    ninja,
    objects,
    spec,
    toolchain,
    wheel,
)
from flash_cosine_sim_attention._build.compile_report import Report
from flash_cosine_sim_attention._build.objects import Compiled
from flash_cosine_sim_attention._build.ptxas import kernel_names, parse, remarks
from flash_cosine_sim_attention._build.spec import Target, binding_target, variant_target
from flash_cosine_sim_attention.variants import VARIANTS, variant_for

VARIANT = variant_for("sm80", "forward", "bfloat16", 64, "bounded")


@pytest.fixture
def tools(tmp_path) -> toolchain.Toolchain:
    """A compiler that copies its source to its output, and to its log what it was called with; a linker likewise."""
    compiler = tmp_path / "bin" / "compiler"
    compiler.parent.mkdir()
    compiler.write_text(FAKE_COMPILER.format(python=sys.executable))
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return toolchain.Toolchain(compiler, "13.0.0", compiler, "g++ 12", tmp_path, "2.13.0", toolchain._find_ninja())


FAKE_COMPILER = """#!{python}
import sys, time, pathlib
arguments = sys.argv[1:]
if "--dryrun" in arguments:
    sys.exit(0)
name = arguments.pop(arguments.index("-o") + 1)
output = pathlib.Path(name).resolve()
text = "".join(pathlib.Path(a).read_text() for a in arguments if a.endswith((".cu", ".cpp", ".o")))
if "slow" in text:
    time.sleep(60)
if "broken" in text:
    print("ptxas info    : 0 bytes gmem")
    print("x.cu(3): error: expected a ;")
    sys.exit(1)
with open(output.parent.parent / "calls", "a") as file:
    file.write(output.name + chr(10))
output.write_text(text)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_COSINE_SIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stub(text: str = "text", name: str = "some") -> Target:
    return Target(name, "cuda", ("80",), stub=text)


class TestKeys:
    @pytest.fixture
    def csrc(self, tmp_path):
        (tmp_path / "csrc" / "deep").mkdir(parents=True)
        (tmp_path / "csrc" / "a.cuh").write_text('#include "deep/b.cuh"\n')
        (tmp_path / "csrc" / "deep" / "b.cuh").write_text(
            '#include "c.cuh"\n#include "../params.h"\n#include <vector>\n'
        )
        (tmp_path / "csrc" / "deep" / "c.cuh").write_text("int c;\n")
        (tmp_path / "csrc" / "params.h").write_text('#include "a.cuh"  // a cycle\n')
        (tmp_path / "csrc" / "other.cuh").write_text("")
        return tmp_path / "csrc"

    def test_the_hash_follows_includes(self, csrc):
        names = {path.name for path in spec.included_files('#include "a.cuh"', csrc, csrc)}
        assert names == {"a.cuh", "b.cuh", "c.cuh", "params.h"}

    @pytest.mark.parametrize(
        ("edited", "changes"), [("deep/c.cuh", True), ("params.h", True), ("a.cuh", True), ("other.cuh", False)]
    )
    def test_an_edited_source_has_another_hash(self, csrc, edited, changes):
        target = stub('#include "a.cuh"')
        before = spec.source_hash(target, csrc)
        assert spec.source_hash(target, csrc) == before
        (csrc / edited).write_text((csrc / edited).read_text() + "// edited\n")
        assert (spec.source_hash(target, csrc) != before) == changes

    def test_real_stubs_include_the_params(self):
        for variant in (VARIANT, variant_for("sm80", "backward", "float16", 64, "bias")):
            included = spec.included_files(variant.source, spec.CSRC, spec.CSRC)
            assert spec.CSRC / "params.h" in included
            assert spec.CSRC / f"sm80/{variant.pass_name}.cuh" in included

    def test_what_the_key_depends_on(self, tools, monkeypatch):
        keys = {
            spec.target_key(stub(), tools),
            spec.target_key(stub("other"), tools),
            spec.target_key(replace(stub(), archs=("90a",)), tools),
            spec.target_key(stub(), replace(tools, nvcc_version="13.0.1")),
            spec.target_key(stub(), replace(tools, cxx_version="g++ 13")),
        }
        monkeypatch.setattr(spec, "NVCC_FLAGS", (*spec.NVCC_FLAGS, "-O2"))
        keys.add(spec.target_key(stub(), tools))
        assert len(keys) == 6


class TestNinjaFile:
    def test_architectures(self):
        assert spec.arch_flags(("80+", "90a")) == (
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_80,code=compute_80",
            "-gencode=arch=compute_90a,code=sm_90a",
        )

    def test_hopper_kernels_are_compiled_for_hopper_only(self):
        assert variant_target(replace(VARIANT, arch="sm90"), ("80+", "90a")).archs == ("90a",)
        assert variant_target(VARIANT, ("80+", "90a")).archs == ("80+", "90a")

    def test_a_variant(self, tools):
        text = ninja.render([variant_target(VARIANT, ("80", "90a"))], tools)
        assert f"build {VARIANT.name}.o: compile {VARIANT.name}.cu\n" in text
        assert f"build {VARIANT.name}.so: link {VARIANT.name}.o\n" in text
        assert f"compiler = {tools.nvcc}\n" in text
        assert f"includes = -I{spec.CSRC}\n" in text
        flags = next(line for line in text.splitlines() if line.startswith("  flags"))
        for flag in ("-std=c++17", "-Xptxas=-v", "code=sm_80", "code=sm_90a", f"-ccbin={tools.cxx}"):
            assert flag in flags

    def test_objects_only(self, tools):
        assert ".so" not in ninja.render([stub()], tools, link=False)

    def test_the_binding_knows_the_oldest_torch_and_needs_no_cuda_library(self, tools):
        text = ninja.render([binding_target()], tools)
        assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in text
        assert "-Wl,--no-as-needed -ltorch" in text
        assert "cudart" not in text

    def test_one_library_of_all(self, tools):
        text = ninja.render_link("all.so", [Path("/x/a.o"), Path("/x/b.o")], tools)
        assert "build all.so: link /x/a.o /x/b.o\n" in text
        assert "-Xlinker=--no-as-needed -ltorch" in text
        assert text.count("-shared") == 1

    def test_special_characters_are_escaped(self, tools):
        assert ninja.escape("/a b:c$") == "/a$ b$:c$$"
        assert "compiler = '/a b/g++'\n" in ninja.render([binding_target()], replace(tools, cxx=Path("/a b/g++")))


class TestCache:
    def test_compiled_once(self, tools, own_cache, capsys):
        targets = [stub("one", "one"), stub("two", "two")]
        first = cache.ensure(targets, tools)
        assert [first[name].read_text() for name in ("one", "two")] == ["one", "two"]
        assert "compiling 2 files for sm_80 (first use; kept in" in capsys.readouterr().err
        assert cache.ensure(targets, tools) == first
        assert cache.ensure([stub("changed", "one")], tools)["one"] != first["one"]
        calls = (own_cache / "calls").read_text().split()
        assert sorted(calls) == ["one.o", "one.o", "one.so", "one.so", "two.o", "two.so"]
        assert not list(own_cache.glob("tmp-*"))

    def test_errors_of_the_compiler_are_told(self, tools, own_cache):
        with pytest.raises(BuildError, match=r"compiling failed:\n.*x.cu\(3\): error: expected a ;"):
            cache.ensure([stub("broken")], tools)
        assert not list(own_cache.glob("tmp-*")) + list(own_cache.glob("*.so"))

    def test_time_out_of_a_build(self, tools, monkeypatch):
        monkeypatch.setenv("FLASH_COSINE_SIM_BUILD_TIMEOUT", "0.5")
        with pytest.raises(BuildError, match="compiling took longer"):
            cache.ensure([stub("slow")], tools)

    def test_no_compiling_when_that_is_forbidden(self, tools, monkeypatch):
        cache.ensure([stub("there")], tools)
        monkeypatch.setenv("FLASH_COSINE_SIM_JIT", "0")
        cache.ensure([stub("there")], tools)
        with pytest.raises(BuildError, match="FLASH_COSINE_SIM_JIT=0: some"):
            cache.ensure([stub("new")], tools)

    def test_processes_build_once_together(self, tools, own_cache):
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=cache.ensure, args=([stub("shared")], tools)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0] * 4
        assert (own_cache / "calls").read_text().split() == ["some.o", "some.so"]

    def test_lock_time_out(self, tmp_path):
        with (
            cache.file_lock(tmp_path / "lock", 1.0),
            pytest.raises(BuildError, match="another process has been building the same"),
            cache.file_lock(tmp_path / "lock", 0.1),
        ):
            pytest.fail("two holders")
        with cache.file_lock(tmp_path / "lock", 0.1):
            pass

    def test_a_lock_is_passed_on(self, tmp_path):
        entered = threading.Event()

        def wait():
            with cache.file_lock(tmp_path / "lock", 10):
                entered.set()

        with cache.file_lock(tmp_path / "lock", 1.0):
            waiting = threading.Thread(target=wait)
            waiting.start()
            assert not entered.wait(0.2)
        waiting.join(10)
        assert entered.is_set()

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(cache.fcntl, "flock", refuse)
        with cache.file_lock(tmp_path / "lock", 0.1):
            pass

    def test_a_system_without_locks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cache, "fcntl", None)
        with cache.file_lock(tmp_path / "lock", 0.1), cache.file_lock(tmp_path / "lock", 0.1):
            pass

    def test_folder_that_cannot_be_made(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FLASH_COSINE_SIM_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(BuildError, match="set FLASH_COSINE_SIM_CACHE"):
            cache.cache_folder()

    @pytest.mark.parametrize("text", ["soon", "-1", "0"])
    def test_wrong_numbers_in_the_environment(self, monkeypatch, text):
        monkeypatch.setenv("FLASH_COSINE_SIM_BUILD_TIMEOUT", text)
        monkeypatch.setenv("FLASH_COSINE_SIM_JOBS", text)
        with pytest.raises(BuildError, match=f"expected seconds, got '{text}'"):
            cache.build_timeout()
        with pytest.raises(BuildError, match=f"expected a positive number, got '{text}'"):
            ninja.num_jobs()


class TestToolchain:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        toolchain.find_toolchain.cache_clear()
        yield
        toolchain.find_toolchain.cache_clear()

    def test_forced_nvcc_that_is_not_there(self, monkeypatch):
        monkeypatch.setenv("FLASH_COSINE_SIM_NVCC", "/nowhere/nvcc")
        with pytest.raises(BuildError, match="FLASH_COSINE_SIM_NVCC: expected the path of nvcc, got /nowhere/nvcc"):
            toolchain.find_toolchain()

    def test_no_nvcc_at_all(self, monkeypatch):
        monkeypatch.delenv("FLASH_COSINE_SIM_NVCC", raising=False)
        monkeypatch.setattr(toolchain, "_nvcc_candidates", lambda: iter(()))
        with pytest.raises(BuildError, match=r'no CUDA compiler: .* pip install "flash-cosine-sim-attention\[jit\]"'):
            toolchain.find_toolchain()

    def test_no_host_compiler(self, tools, monkeypatch):
        monkeypatch.setenv("FLASH_COSINE_SIM_NVCC", str(tools.nvcc))
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(BuildError, match="no host compiler: no-such-compiler is not on PATH"):
            toolchain.find_toolchain()

    @pytest.mark.parametrize(
        ("release", "message"), [("9.2, V9.2.88", "CUDA 12.0 or newer, got 9.2"), ("?", "expected a CUDA release")]
    )
    def test_nvcc_that_is_too_old_or_strange(self, tmp_path, monkeypatch, release, message):
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}'\n")
        nvcc.chmod(0o755)
        monkeypatch.setenv("FLASH_COSINE_SIM_NVCC", str(nvcc))
        with pytest.raises(BuildError, match=message):
            toolchain.find_toolchain()

    def test_torch_is_found_without_importing_it(self):
        import torch

        folder = toolchain._find_torch()
        assert folder == Path(torch.__file__).parent
        assert toolchain._torch_version(folder) == torch.__version__


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

    def test_objects_are_kept_and_failures_are_told_one_by_one(self, tools, own_cache):
        targets = [stub("good", "good"), stub("broken", "bad")]
        good, bad = objects.compile_objects(targets, tools)
        assert good.path is not None
        assert good.path.read_text() == "good"
        assert bad.path is None
        assert "x.cu(3): error" in bad.log
        again, _ = objects.compile_objects(targets, tools)
        assert again == good
        assert (own_cache / "calls").read_text().split() == ["good.o"]

    def test_only_known_variants(self, capsys):
        with pytest.raises(SystemExit):
            compile_report.main(["--only", "nothing like this"])
        assert "no variant is called so" in capsys.readouterr().err


def compiles_here() -> str | None:
    try:
        toolchain.find_toolchain()
    except BuildError as error:
        return str(error)
    return None


@pytest.mark.skipif(compiles_here() is not None, reason=f"nothing can be compiled here: {compiles_here()}")
def test_a_launcher_is_compiled_loaded_and_called():
    """By the real tools, without a kernel: the runtime that is linked in answers."""
    source = """
        #include "params.h"
        extern "C" __attribute__((visibility("default"))) int small() { return cudaGetLastError() == cudaSuccess; }
    """
    target = Target("small", "cuda", ("80",), stub=source)
    library = cache.ensure([target], toolchain.find_toolchain())["small"]
    assert isinstance(ctypes.CDLL(str(library)).small(), int)


@pytest.mark.skipif(compiles_here() is not None, reason=f"nothing can be compiled here: {compiles_here()}")
def test_the_ahead_of_time_library_records_what_it_holds(tmp_path, monkeypatch):
    from flash_cosine_sim_attention import launchers

    library = aot.build_library(("80",), (), tmp_path / "lib")  # the binding alone: kernels take long
    monkeypatch.setattr(launchers, "LIBRARY_FOLDER", tmp_path / "lib")
    assert library.exists()
    assert launchers.in_package(binding_target(), None)
    assert not launchers.in_package(variant_target(VARIANT, ("80",)), (8, 0))
    monkeypatch.setattr(launchers, "source_hash", lambda target: "edited")
    assert not launchers.in_package(binding_target(), None)
    aot.remove_library(tmp_path / "lib")
    assert launchers.packaged() is None


def test_a_gpu_is_covered_by_machine_code_of_its_generation_or_by_ptx():
    from flash_cosine_sim_attention.launchers import covers, jit_arch

    assert [c for c in ((8, 0), (8, 6), (9, 0), (12, 0)) if covers(["80"], c)] == [(8, 0), (8, 6)]
    assert [c for c in ((8, 0), (9, 0), (9, 1), (12, 0)) if covers(["90a"], c)] == [(9, 0)]
    assert all(covers(["80+", "90a"], c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 1)))
    assert not covers(["86"], (8, 0))
    assert [jit_arch(c) for c in ((8, 0), (8, 9), (9, 0), (12, 0))] == ["80", "89", "90a", "120"]


def test_platform_tag_of_the_wheel():
    assert wheel.platform_tag().startswith(("manylinux_", "linux_"))
    assert wheel.platform_tag().endswith(os.uname().machine)


def test_every_variant_names_sources_that_exist():
    for variant in VARIANTS:
        assert (spec.CSRC / variant.arch / f"{variant.pass_name}.cuh").exists(), variant.name
