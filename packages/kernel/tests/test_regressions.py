"""Defects of the first public implementation of this idea. Each stays a test, so that none comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, l2norm_tensors, plain_cosine_sim_attention
from flash_cosine_sim_attention.testing import assert_close_to_reference, make_inputs

pytestmark = pytest.mark.usefixtures("each_device")


def test_groups_change_the_result_and_match_the_norm_by_hand():
    """Grouped norm was accepted and never reached the computation."""
    x = make_inputs(d=32)
    by_groups = [flash_cosine_sim_attention(x.q, x.k, x.v, groups=groups) for groups in (1, 2, 4)]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in pairwise(by_groups))
    q, k = l2norm_tensors(x.q, x.k, groups=4)
    by_hand = flash_cosine_sim_attention(q, k, x.v, groups=4, l2norm_qk=False)
    torch.testing.assert_close(by_groups[2], by_hand)


@pytest.mark.parametrize("n", [512, 513, 640, 1025])
def test_causal_beyond_512_keys(n):
    assert_close_to_reference(make_inputs((1,), 1, nq=n, causal=True))


def test_import_needs_no_extension_no_compiler_and_no_gpu():
    code = "import torch, flash_cosine_sim_attention as f; q = torch.ones(1, 4, 8); "
    code += "print(f.flash_cosine_sim_attention(q, q, q).shape)"
    env = {**os.environ, "PATH": "", "CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 4, 8])" in done.stdout


@pytest.mark.parametrize("training", [True, False])
def test_bias_gets_its_gradient(training):
    x = make_inputs(bias="hij")
    bias = x.attn_bias.requires_grad_()
    q = x.q.requires_grad_(training)
    flash_cosine_sim_attention(q, x.k, x.v, attn_bias=bias).square().sum().backward()
    assert float(bias.grad.abs().sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_heads_with_bias(dtype):
    assert_close_to_reference(make_inputs((6,), 0, nq=33, nk=40, bias="bij", dtype=dtype))


@pytest.mark.parametrize("value", [100.0, -100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_of_a_hundred(value, dtype):
    x = make_inputs(bias="hij", dtype=dtype)
    x.attn_bias.add_(value)
    assert_close_to_reference(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scale_of_a_hundred(dtype):
    assert_close_to_reference(make_inputs(scale=100.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sixteen_groups_at_scale_eight(dtype):
    """Logits up to 128: beyond every fixed shift."""
    x = make_inputs(d=32, groups=16, dtype=dtype)
    x.k.copy_(x.q)  # some cosines are 1 in every group
    assert_close_to_reference(x)


@pytest.mark.parametrize("kv_heads", [0, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_a_single_kv_head(kv_heads, causal):
    assert_close_to_reference(make_inputs((2,), 4, kv_heads, 70, 90, causal=causal, mask=True))


def test_default_scale_is_eight():
    x = make_inputs()
    torch.testing.assert_close(
        flash_cosine_sim_attention(x.q, x.k, x.v), plain_cosine_sim_attention(x.q, x.k, x.v, scale=8.0)
    )
