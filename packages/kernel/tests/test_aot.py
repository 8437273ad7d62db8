"""The real compiler, the ahead-of-time library, the wheel's tag."""

from __future__ import annotations

import ctypes
import os

import pytest
from flash_cosine_sim_attention._build import BuildError, aot, cache, spec, toolchain, wheel
from flash_cosine_sim_attention._build.spec import Target, binding_target, variant_target
from flash_cosine_sim_attention.variants import VARIANTS

from .test_build import VARIANT, own_cache  # noqa: F401  a fixture


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
