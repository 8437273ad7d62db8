"""Devices: a module that says `pytestmark = pytest.mark.usefixtures("each_device")` runs on the CPU and on the GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
from flash_cosine_sim_attention import common_call, cuda, cuda_launch, kernel_form, launchers
from flash_cosine_sim_attention._build import BuildError, cache, toolchain
from flash_cosine_sim_attention._build.spec import binding_target


def has_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def pytest_collection_modifyitems(items):
    if has_gpu():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU of compute capability 8.0 or more")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def each_device(request):
    """The device on which factories such as torch.randn and make_inputs create their tensors."""
    with torch.device(request.param) if request.param != "cpu" else contextlib.nullcontext():
        yield torch.device(request.param)


@pytest.fixture(params=["sm80", None], ids=["sm80", "automatic"])
def backend(request) -> str | None:
    """The kernels that always work, and those that are chosen: on Hopper, its own where they serve."""
    return request.param


@pytest.fixture(scope="session")
def tools_with_binding():
    """The compilers, the torch binding compiled and loaded; skips where there are none."""
    try:
        tools = toolchain.find_toolchain()
    except BuildError as error:
        pytest.skip(f"the binding cannot be compiled here: {error}")
    if launchers._binding is None:
        launchers.load_binding(cache.ensure([binding_target()], tools)["torch_binding"])
    return tools


@pytest.fixture
def serve_on_the_cpu(monkeypatch):
    """serve_on_the_cpu(address, arch): backend=arch serves CPU tensors by these launchers, with workspaces of NaN."""

    def poisoned(like, shape, dtype=torch.float32):
        return like.new_full(shape, float("nan"), dtype=dtype)

    def serve(address, arch="sm80"):
        monkeypatch.setattr(launchers, "address", address)
        monkeypatch.setattr(cuda, "capability_of", lambda device: (9, 0) if arch == "sm90" else (8, 0))
        common_call.forget()
        monkeypatch.setattr(cuda_launch, "workspace", poisoned)
        monkeypatch.setattr(kernel_form, "workspace", poisoned)
        monkeypatch.setitem(cuda.FORCED, arch, cuda.CudaKernels(arch))

    return serve
