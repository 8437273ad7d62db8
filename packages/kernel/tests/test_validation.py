"""Every error of the public functions: its type, and that the message names what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, l2norm_tensors, plain_cosine_sim_attention


def qkv(h: int = 4, hk: int = 4, i: int = 5, j: int = 7, d: int = 16, **options: Any) -> dict[str, Any]:
    return {
        "q": torch.randn(2, h, i, d, **options),
        "k": torch.randn(2, hk, j, d, **options),
        "v": torch.randn(2, hk, j, d, **options),
    }


WRONG: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "q is no tensor": ({"q": [1.0]}, TypeError, ("q: expected a torch.Tensor", "got list")),
    "integer q": ({"q": torch.ones(2, 4, 5, 16).long()}, TypeError, ("q: expected a dtype of float16", "int64")),
    "complex v": ({"v": torch.ones(2, 4, 7, 16) + 0j}, TypeError, ("v: expected a dtype", "complex64")),
    "mixed dtypes": (
        {"k": torch.ones(2, 4, 7, 16).half()},
        TypeError,
        ("q, k, v: expected one dtype", "torch.float32, torch.float16, torch.float32", "autocast"),
    ),
    "mixed devices": ({"k": torch.ones(2, 4, 7, 16, device="meta")}, ValueError, ("expected one device", "cpu, meta")),
    "two dims": ({"q": torch.ones(5, 16)}, ValueError, ("q: expected (*batch, heads, n, d)", "(5, 16)")),
    "k against v": ({"v": torch.ones(2, 4, 8, 16)}, ValueError, ("k, v: expected the same shape", "(2, 4, 8, 16)")),
    "head dims": (
        {"k": torch.ones(2, 4, 7, 8), "v": torch.ones(2, 4, 7, 8)},
        ValueError,
        ("q, k: expected the same head dim", "(2, 4, 7, 8)"),
    ),
    "empty head dim": (
        {name: torch.ones(2, 4, 5, 0) for name in "qkv"},
        ValueError,
        ("head dim of at least 1", "(2, 4, 5, 0)"),
    ),
    "merged q alone": ({"q": torch.ones(8, 5, 16)}, ValueError, ("merged q", "expected k, v merged in the same way")),
    "batch": (
        {name: torch.ones(3, 4, 7, 16) for name in "kv"},
        ValueError,
        ("with the batch dims of q (2,)", "k (3, 4, 7, 16)"),
    ),
    "too many dims in k": (
        {name: torch.ones(2, 1, 4, 7, 16) for name in "kv"},
        ValueError,
        ("k, v: expected (*batch, kv_heads, n, d)", "(2, 1, 4, 7, 16)"),
    ),
    "kv heads": (
        {name: torch.ones(2, 3, 7, 16) for name in "kv"},
        ValueError,
        ("divides the 4 query heads", "k (2, 3, 7, 16)"),
    ),
    "float mask": ({"mask": torch.ones(2, 7)}, TypeError, ("mask: expected torch.bool with True = attend", "float32")),
    "mask is no tensor": ({"mask": [True]}, TypeError, ("mask: expected a torch.Tensor", "list")),
    "mask over pairs": (
        {"mask": torch.ones(5, 7).bool()},
        ValueError,
        ("broadcasts to (*batch, keys) = (2, 7)", "got (5, 7)", "attn_bias"),
    ),
    "mask on another device": (
        {"mask": torch.ones(2, 7, device="meta").bool()},
        ValueError,
        ("mask: expected the device of q, cpu", "meta"),
    ),
    "boolean bias": ({"attn_bias": torch.ones(4, 5, 7).bool()}, TypeError, ("attn_bias: expected a dtype", "mask")),
    "bias of two dims": ({"attn_bias": torch.ones(5, 7)}, ValueError, ("attn_bias: expected 3 dims", "(5, 7)")),
    "bias by heads": ({"attn_bias": torch.ones(2, 5, 7)}, ValueError, ("expected (heads, i, j) = (4, 5, 7)", "(2, 5")),
    "bias by batch": (
        {"attn_bias": torch.ones(4, 5, 7), "attn_bias_batch_dim": True},
        ValueError,
        ("expected (batch, i, j) = (2, 5, 7)", "got (4, 5, 7)"),
    ),
    "bias of four dims": ({"attn_bias": torch.ones(2, 3, 5, 7)}, ValueError, ("(2, 4, 5, 7)", "got (2, 3, 5, 7)")),
    "bias larger than the problem": ({"attn_bias": torch.ones(9, 2, 4, 5, 7)}, ValueError, ("got (9, 2, 4, 5, 7)",)),
    "bias on another device": (
        {"attn_bias": torch.ones(4, 5, 7, device="meta")},
        ValueError,
        ("attn_bias: expected the device of q",),
    ),
    "scale is a string": ({"scale": "8"}, TypeError, ("scale: expected a number or a tensor", "str")),
    "scale is a bool": ({"scale": True}, TypeError, ("scale: expected a number", "bool")),
    "scale is not finite": ({"scale": float("nan")}, ValueError, ("scale: expected a finite number", "nan")),
    "integer scale tensor": ({"scale": torch.tensor(8)}, TypeError, ("scale: expected a tensor of a floating dtype",)),
    "scale of three values": ({"scale": torch.ones(3)}, ValueError, ("one value or one per head (4 values)", "(3,)")),
    "scale on another device": (
        {"scale": torch.ones(1, device="meta")},
        ValueError,
        ("scale: expected the device of q",),
    ),
    "groups do not divide": ({"groups": 3}, ValueError, ("positive divisor of the head dim", "groups = 3", "16")),
    "no groups": ({"groups": 0}, ValueError, ("positive divisor", "groups = 0")),
    "groups is a float": ({"groups": 2.0}, TypeError, ("groups: expected an int", "float")),
    "unknown backend": ({"backend": "cuda"}, ValueError, ("backend: expected None or one of 'plain'", "got 'cuda'")),
}


@pytest.mark.parametrize("function", [flash_cosine_sim_attention, plain_cosine_sim_attention])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str, function):
    changes, error, parts = WRONG[case]
    with pytest.raises(error) as raised:
        function(**(qkv() | changes))
    for part in parts:
        assert part in str(raised.value)


def test_bias_by_batch_needs_one_batch_dim():
    q = torch.randn(2, 3, 4, 5, 16)
    with pytest.raises(ValueError, match="several batch dims"):
        flash_cosine_sim_attention(q, q, q, attn_bias=torch.randn(2, 5, 5), attn_bias_batch_dim=True)


def test_cuda_backends_are_refused_on_the_cpu():
    for backend in ("sm80", "sm90"):
        with pytest.raises(ValueError, match=backend):
            flash_cosine_sim_attention(**qkv(), backend=backend)


def test_plain_function_has_one_backend():
    with pytest.raises(ValueError, match="expected None or 'plain'"):
        plain_cosine_sim_attention(**qkv(), backend="chunked")


def test_l2norm_tensors_errors():
    with pytest.raises(ValueError, match=r"tensors\[1\].*\(2, 15\)"):
        l2norm_tensors(torch.randn(2, 16), torch.randn(2, 15), groups=2)
    with pytest.raises(TypeError, match=r"tensors\[0\]: expected a dtype"):
        l2norm_tensors(torch.ones(2, 16).long())
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got float"):
        l2norm_tensors(1.0)


class TestPromiseOfUnitNorm:
    """FLASH_COSINE_SIM_CHECK=1 verifies what l2norm_qk=False promises."""

    @pytest.fixture(autouse=True)
    def _check(self, monkeypatch):
        monkeypatch.setenv("FLASH_COSINE_SIM_CHECK", "1")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("groups", [1, 4])
    def test_normalised_inputs_pass(self, dtype, groups):
        tensors = qkv(dtype=dtype)
        tensors["q"], tensors["k"] = l2norm_tensors(tensors["q"], tensors["k"], groups=groups)
        tensors["q"][0, 0, 0] = 0  # a zero query has no direction, and breaks no bound
        flash_cosine_sim_attention(**tensors, groups=groups, l2norm_qk=False)

    @pytest.mark.parametrize("name", ["q", "k"])
    def test_broken_promise_is_named(self, name):
        tensors = qkv()
        tensors["q"], tensors["k"] = l2norm_tensors(tensors["q"], tensors["k"])
        tensors[name] = tensors[name] * 1.01
        with pytest.raises(ValueError, match=rf"{name}: l2norm_qk=False expects unit l2 norm .* got a norm of 1\.0"):
            flash_cosine_sim_attention(**tensors, l2norm_qk=False)

    def test_groups_are_part_of_the_promise(self):
        tensors = qkv()
        tensors["q"], tensors["k"] = l2norm_tensors(tensors["q"], tensors["k"], groups=1)
        with pytest.raises(ValueError, match="over each of 4 group"):
            flash_cosine_sim_attention(**tensors, groups=4, l2norm_qk=False)


def test_promise_is_not_checked_by_default(monkeypatch):
    monkeypatch.delenv("FLASH_COSINE_SIM_CHECK", raising=False)
    flash_cosine_sim_attention(**qkv(), l2norm_qk=False)
