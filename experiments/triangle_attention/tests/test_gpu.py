"""On a GPU: the module on the CUDA kernels, in float32 and in half precision, against float64."""

from __future__ import annotations

import copy

import pytest
import torch

from experiments.triangle_attention.bench import make_module
from experiments.triangle_attention.module import fused_attention, plain_attention
from experiments.triangle_attention.task import Task
from experiments.triangle_attention.training import Setting, Training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU of compute capability 8.0 or more"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("node", ["starting", "ending"])
@pytest.mark.parametrize("size", [64, 101])
def test_no_worse_than_plain_in_the_same_dtype(dtype, node, size):
    generator = torch.Generator().manual_seed(size)
    pair, upstream = (torch.randn(2, size, size, 128, generator=generator).to("cuda", dtype) for _ in range(2))
    mask = (torch.rand(2, size, size, generator=generator) < 0.8).cuda()
    mask[1, -5:] = mask[1, :, -5:] = False

    def run(attention, wide):
        module = make_module(attention, pair)
        module.node = node
        if wide:
            module = copy.deepcopy(module).double()
        leaf = (pair.double() if wide else pair).detach().requires_grad_()
        out = module(leaf, mask)
        named = dict(module.named_parameters())
        found = torch.autograd.grad(out, [leaf, *named.values()], upstream.to(out.dtype))
        return {"out": out.detach(), "pair": found[0]} | dict(zip(named, found[1:], strict=True))

    exact = run(plain_attention, wide=True)
    fused, plain = run(fused_attention, wide=False), run(plain_attention, wide=False)
    for name, wanted in exact.items():
        error, allowed = ((x[name].double() - wanted).norm() / wanted.norm() for x in (fused, plain))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps, f"{name}: {error:.1e}, plain {allowed:.1e}"


@pytest.mark.parametrize("arm", ["triangle, fused", "triangle, plain", "pointwise"])
def test_a_captured_step_trains_as_the_eager_one(arm, tmp_path):
    setting = Setting(Task(points=24, fewest=16), dim=32, depth=1, heads=2, steps=20, eval_every=5, eval_size=16)
    captured, eager, resumed = (Training(arm, setting, 0) for _ in range(3))
    eager._capturable = False
    captured.run_to_next_row()
    captured.save(tmp_path / "run.pt")
    resumed.load(tmp_path / "run.pt")
    eager.run_to_next_row()
    for training in (captured, eager, resumed):
        while not training.finished:
            training.run_to_next_row()
    assert captured._graph.captured
    assert resumed._graph.captured
    assert not eager._graph.captured
    for rows in (captured.rows, resumed.rows):
        assert [row["rmse"] for row in rows] == pytest.approx([row["rmse"] for row in eager.rows], abs=2e-3)
