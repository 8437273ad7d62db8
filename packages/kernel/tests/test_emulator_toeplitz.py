"""A bias by its diagonals in the sources of the sm80 kernels, run on the CPU by the emulator (see test_emulator.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flash_cosine_sim_attention.testing import assert_close_to_reference, make_inputs
from flash_cosine_sim_attention.variants import variant_for

from .emulator.build import build, launchers_of

EMULATED = [
    variant_for("sm80", pass_name, dtype, head_dim, "toeplitz")
    for dtype, head_dim in (("float16", 64), ("bfloat16", 128), ("bfloat16", 192), ("float32", 32))
    for pass_name in ("forward", "backward")
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory, tools_with_binding):
    return build(tmp_path_factory.mktemp("emulator"), EMULATED, tools_with_binding)


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(emulated, serve_on_the_cpu):
    serve_on_the_cpu(launchers_of(emulated))


@pytest.mark.parametrize("form", ["alibi", "t5", "relative"])
@pytest.mark.parametrize(
    "options",
    [
        {"nq": 70, "nk": 140},
        {"nq": 140, "nk": 70, "mask": True},
        {"nq": 130, "nk": 130, "causal": True, "kv_heads": 1},
        {"nq": 1, "nk": 200, "causal": True},
        {"nq": 65, "nk": 1},
    ],
    ids=str,
)
def test_forms(form, options):
    assert_close_to_reference(make_inputs((2,), 2, d=64, dtype=torch.float16, bias=form, **options), backend="sm80")


@pytest.mark.parametrize(("d", "dtype"), [(128, torch.bfloat16), (160, torch.bfloat16), (32, torch.float32)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_tiles(d, dtype, causal):
    """With 64 keys and with 32 keys a tile of scores, in halves and in split float32."""
    x = make_inputs((1,), 2, nq=150, nk=170, d=d, dtype=dtype, bias="relative", causal=causal)
    assert_close_to_reference(x, backend="sm80", lse=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2)])
def test_gradient_is_summed_over_what_shares_the_bias(shape):
    x = make_inputs((2, 2), 2, nq=70, nk=90, d=64, dtype=torch.float16, bias="relative", scale="head")
    assert_close_to_reference(replace(x, attn_bias=torch.randn(*shape, 179, dtype=torch.float16)), backend="sm80")


def test_deterministic_mode_and_single_gradients():
    x = make_inputs((1,), 2, nq=70, nk=140, d=64, dtype=torch.float16, bias="t5", causal=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert_close_to_reference(x, backend="sm80")
        assert_close_to_reference(x, backend="sm80", constants=("q", "k", "v"))
        assert_close_to_reference(x, backend="sm80", constants=("attn_bias",))
    finally:
        torch.use_deterministic_algorithms(False)


def test_extreme_entries():
    x = make_inputs((1,), 2, nq=70, nk=140, d=64, dtype=torch.float16, bias="relative")
    x.attn_bias[:, ::3] = -torch.inf
    x.attn_bias[:, 1::3] *= 1e4
    assert_close_to_reference(x, backend="sm80")
