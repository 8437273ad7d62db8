"""Hopper's instructions by small kernels: one source for a GPU and for the emulator, whose definitions it proves."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable

import pytest
import torch
from flash_cosine_sim_attention._build.spec import CSRC
from torch import Tensor

from .emulator.build import HERE, build

SOURCE = HERE / "instructions_sm90.cu"


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    return request.param


@pytest.fixture(scope="module")
def library(device, tmp_path_factory, tools_with_binding):
    folder = tmp_path_factory.mktemp("instructions")
    if device == "cpu":
        return ctypes.CDLL(str(build(folder, [], tools_with_binding, [SOURCE])))
    target, options = (
        folder / "instructions.so",
        ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC", "-shared"],
    )
    subprocess.run([tools_with_binding.nvcc, *options, f"-I{CSRC}", SOURCE, "-o", target], check=True)
    return ctypes.CDLL(str(target))


def call(function: Callable[..., int], *arguments: int | Tensor) -> None:
    error = function(*(ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments))
    assert error == 0, f"CUDA error {error}"
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(
    ("n", "dtype"), [(n, torch.bfloat16) for n in (32, 64, 96, 128, 192, 256)] + [(64, torch.float16)]
)
def test_product_of_a_warpgroup(library, device, n, dtype, transposed):
    a = torch.randn((128, 64) if transposed[0] else (64, 128)).to(device, dtype)
    b = torch.randn((128, n) if transposed[1] else (n, 128)).to(device, dtype)
    d = torch.full((64, n), float("nan"), device=device)
    call(library.run_product, n, dtype == torch.float16, *transposed, a, b, d)
    close(d, (a.T if transposed[0] else a).double() @ (b if transposed[1] else b.T).double())


def test_product_and_row_sums(library, device):
    a, b = torch.randn(64, 128).to(device, torch.bfloat16), torch.randn(128, 64).to(device, torch.bfloat16)
    d = torch.full((64, 72), float("nan"), device=device)
    call(library.run_product_and_sums, a, b, d)
    close(d, torch.cat([a.double() @ b.double(), a.double().sum(1, keepdim=True).expand(64, 8)], 1))


@pytest.mark.parametrize("transposed", [False, True])
def test_result_as_operand_by_stmatrix(library, device, transposed):
    a, b = torch.randn(2, 64, 64).to(device, torch.bfloat16)
    d = torch.full((64, 32), float("nan"), device=device)
    call(library.run_chain, transposed, a, b, d)
    close(d, (a.double() @ b.T.double()) @ b[:, :32].double(), 2e-2)


@pytest.mark.parametrize("transposed", [False, True])
def test_product_of_tiles_with_short_rows(library, device, transposed):
    a = torch.randn(64, 64 if transposed else 32).to(device, torch.bfloat16)
    b = torch.randn(64 if transposed else 32, 32).to(device, torch.bfloat16)
    d = torch.full((64, 32), float("nan"), device=device)
    call(library.run_narrow, transposed, a, b, d)
    close(d, a.T.double() @ b.double() if transposed else a.double() @ b.T.double())


def test_bulk_load_and_reduction(library, device):
    x, sums = torch.randn(5 * 256, device=device), torch.randn(5 * 256, device=device)
    expected = sums.double() + 2 * x.double()
    call(library.run_reduce, sums, x, 5)
    close(sums, expected)
