"""The module against AlphaFold's algorithms written as loops; fused against plain; mask, symmetry and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.triangle_attention.bench import sdpa_attention
from experiments.triangle_attention.module import ATTENTIONS, TriangleAttention

NODES = ["starting", "ending"]


def make_module(node: str = "starting", attention: object = "fused", **options: object) -> TriangleAttention:
    torch.manual_seed(0)
    module = TriangleAttention(12, 2, 8, node, attention=attention, **options).double()  # type: ignore[arg-type]
    for parameter in module.parameters():  # nothing stays at its start of zeros or ones
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def make_pair(size: int = 7) -> tuple[Tensor, Tensor]:
    """pair (2, n, n, 12) and mask (2, n, n), in which the second sample has one point less, and pairs are missing."""
    pair = torch.randn(2, size, size, 12, dtype=torch.float64)
    mask = torch.rand(2, size, size) < 0.7
    mask[1, -1] = mask[1, :, -1] = False
    return pair, mask


def by_loops(module: TriangleAttention, pair: Tensor, mask: Tensor, node: str) -> Tensor:
    """Algorithms 13 and 14, pair by pair, with cosines for dot products."""
    n, heads = pair.shape[1], module.heads
    z = module.norm(pair)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in module.to_qkv(z).chunk(3, dim=-1))
    bias, gate = None if module.to_bias is None else module.to_bias(z), module.to_gate(z).sigmoid()
    out = torch.zeros_like(v)
    for b in range(len(pair)):
        for i in range(n):
            for j in range(n):
                others = [(i, x) if node == "starting" else (x, j) for x in range(n)]
                seen = [x for x, at in enumerate(others) if mask[b][at]]
                if not seen:
                    continue
                keys = torch.stack([k[b][others[x]] for x in seen])  # (seen, h, d)
                logits = module.scale * F.cosine_similarity(q[b, i, j], keys, dim=-1)
                if bias is not None:
                    logits = logits + torch.stack(
                        [bias[b, j, x] if node == "starting" else bias[b, x, i] for x in seen]
                    )
                values = torch.stack([v[b][others[x]] for x in seen])
                out[b, i, j] = (logits.softmax(0)[..., None] * values).sum(0)
    return module.to_out(gate * out.flatten(-2))


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("attention", [*ATTENTIONS, sdpa_attention], ids=[*ATTENTIONS, "sdpa"])
@pytest.mark.parametrize("pair_bias", [True, False])
def test_equals_the_algorithm(node, attention, pair_bias):
    module = make_module(node, attention, pair_bias=pair_bias)
    pair, mask = make_pair()
    if attention is sdpa_attention:
        mask = torch.ones_like(mask)  # its rows without keys are not zero
    torch.testing.assert_close(module(pair, mask), by_loops(module, pair, mask, node), atol=1e-10, rtol=0)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("masked", [True, False])
def test_fused_and_plain_have_equal_gradients(node, masked):
    pair, mask = make_pair(9)
    upstream, gradients = torch.randn_like(pair), []
    for attention in ATTENTIONS:
        module, leaf = make_module(node, attention), pair.clone().requires_grad_()
        module(leaf, mask if masked else None).backward(upstream)
        found = {name: parameter.grad for name, parameter in module.named_parameters()}
        assert all(x is not None and bool(x.any()) for x in found.values())
        gradients.append(found | {"pair": leaf.grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-9, rtol=1e-9, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_what_is_masked_reaches_nothing():
    module = make_module()
    pair, mask = make_pair()
    expected = module(pair, mask)
    changed = torch.where(mask[..., None], pair, torch.randn_like(pair))
    same = mask & mask.new_ones(()).expand_as(mask)
    bias_kept = make_module(pair_bias=False)  # a masked pair is still the third edge of other triangles
    torch.testing.assert_close(bias_kept(changed, mask)[same], bias_kept(pair, mask)[same])
    assert not torch.equal(module(changed, mask)[same], expected[same])


def test_starts_as_no_update_with_open_gates():
    module = TriangleAttention(12, 2, 8)
    pair = torch.randn(1, 5, 5, 12)
    assert not module(pair).any()
    torch.testing.assert_close(module.to_gate(pair), torch.ones(1, 5, 5, 16))


def test_errors():
    with pytest.raises(ValueError, match="node: expected 'starting' or 'ending', got 'middle'"):
        TriangleAttention(12, 2, 8, "middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pair: expected \(b, n, n, dim\), got \(1, 4, 5, 12\)"):
        TriangleAttention(12, 2, 8)(torch.zeros(1, 4, 5, 12))
    with pytest.raises(ValueError, match=r"mask: expected bool \(1, 4, 4\), got torch.float32 \(1, 4, 4\)"):
        TriangleAttention(12, 2, 8)(torch.zeros(1, 4, 4, 12), torch.ones(1, 4, 4))
