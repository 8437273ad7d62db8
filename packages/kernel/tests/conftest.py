"""Devices: a module that says `pytestmark = pytest.mark.usefixtures("each_device")` runs on the CPU and on the GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch


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
