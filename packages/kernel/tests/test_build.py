"""The builder: keys, the build file, locks, time-outs, publication, the reading of compiler logs."""

from __future__ import annotations

import multiprocessing
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from flash_cosine_sim_attention._build import (
    BuildError,
    cache,
    ninja,
    objects,
    spec,
    toolchain,
)
from flash_cosine_sim_attention._build.spec import Target, binding_target, variant_target
from flash_cosine_sim_attention.variants import variant_for

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


class TestObjects:
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
