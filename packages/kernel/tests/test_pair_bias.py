"""A bias that many rows share (triangle attention over a pair representation), with its gradient, in every broadcast
form: the public function on the CPU and on the GPU, and the sm80 kernels' own sources on the emulator."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import pytest
import torch
from flash_cosine_sim_attention import bias_plan, flash_cosine_sim_attention
from flash_cosine_sim_attention.reference import plain_cosine_sim_attention
from flash_cosine_sim_attention.testing import (
    Inputs,
    assert_close_to_reference,
    assert_within_budget,
    eager_cosine_sim_attention,
    make_inputs,
)
from flash_cosine_sim_attention.variants import variant_for

from .emulator.build import build, launchers_of

FORMS = ["hij", "ij", "hj", "hi", "h", "", "bij", "bhij", "bj"]
HALF = [torch.bfloat16, torch.float16]


def extreme(inputs: Inputs, name: str) -> Inputs:
    """The same with biases that a shift has to follow, or that hide most keys."""
    assert inputs.attn_bias is not None
    bias = inputs.attn_bias.float()
    chosen = torch.rand(bias.shape, generator=torch.Generator().manual_seed(3), device="cpu").to(bias.device)
    bias = {
        "some 1e4": lambda: bias.masked_fill(chosen < 0.3, 1e4),
        "most -1e4": lambda: bias.masked_fill(chosen < 0.7, -1e4),
        "all -1e4": lambda: bias - 1e4,
        "most -inf": lambda: bias.masked_fill(chosen < 0.7, -math.inf),
        "rising": lambda: bias + 2.0 * torch.arange(bias.shape[-1], device=bias.device),
        "falling": lambda: bias - 2.0 * torch.arange(bias.shape[-1], device=bias.device),
        "float32": lambda: bias,
    }[name]()
    return replace(inputs, attn_bias=bias if name == "float32" else bias.to(inputs.attn_bias.dtype))


EXTREMES = ["some 1e4", "most -1e4", "all -1e4", "most -inf", "rising", "falling", "float32"]


@pytest.mark.usefixtures("each_device")
class TestEveryDevice:
    @pytest.mark.parametrize("dtype", [*HALF, torch.float32])
    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, form, dtype):
        shape = {"nq": 70, "nk": 101, "d": 32, "mask": True, "dtype": dtype, "bias": form}
        assert_close_to_reference(make_inputs((5,), 2, **shape))

    @pytest.mark.parametrize("batch", [(1, 6), (2, 5), (3, 1)])
    @pytest.mark.parametrize("d", [16, 24, 32, 64])
    def test_two_batch_dims(self, batch, d):
        """AlphaFold's own shapes: bias (batch, 1, heads, n, n)."""
        x = make_inputs(batch, 4, nq=65, nk=65, d=d, mask=True, dtype=torch.bfloat16, bias="bhij")
        assert x.attn_bias is not None
        assert_close_to_reference(replace(x, attn_bias=x.attn_bias[:, :1]))

    @pytest.mark.parametrize("name", EXTREMES)
    def test_extreme_biases(self, name):
        x = make_inputs((5,), 2, nq=65, nk=77, d=32, mask=True, dtype=torch.bfloat16, bias="hij")
        assert_close_to_reference(extreme(x, name))

    @pytest.mark.parametrize("constants", [("attn_bias",), ("q", "k", "v"), ("q", "v"), ("k",)], ids=str)
    def test_only_some_gradients(self, constants):
        x = make_inputs((6,), 2, nq=65, nk=77, d=32, mask=True, dtype=torch.bfloat16, bias="hij", scale="head")
        assert_close_to_reference(x, constants=constants)

    def test_bias_of_any_strides(self):
        x = make_inputs((5,), 2, nq=65, nk=77, d=32, dtype=torch.bfloat16, bias="hij")
        assert x.attn_bias is not None
        transposed = x.attn_bias.transpose(-1, -2).contiguous().transpose(-1, -2)
        wider = torch.zeros(2, 65, 83, dtype=torch.bfloat16, device=x.q.device)
        wider[..., 3:80] = x.attn_bias
        for bias in (transposed, wider[..., 3:80], x.attn_bias.expand(2, 65, 77)):
            assert_close_to_reference(replace(x, attn_bias=bias))

    def test_masked_keys_may_hold_nan(self):
        x = make_inputs((5,), 2, nq=65, nk=77, d=32, mask=True, dtype=torch.bfloat16, bias="hij")
        assert x.mask is not None
        x.mask[0] = False  # and a row without any key
        hidden = ~x.mask[:, None, :, None].expand_as(x.k)
        assert_close_to_reference(replace(x, k=x.k.masked_fill(hidden, math.nan), v=x.v.masked_fill(hidden, math.nan)))


@pytest.mark.gpu
class TestOnTheGpu:
    @pytest.mark.parametrize("dtype", [*HALF, torch.float32])
    @pytest.mark.parametrize("n", [31, 128, 129, 256, 300, 384, 500, 512, 513])
    def test_lengths(self, n, dtype):
        """Every number of warps of the kernels for short rows, and beyond."""
        x = make_inputs((6,), 4, nq=n, nk=n, d=32, mask=True, dtype=dtype, bias="hij", device="cuda")
        assert_close_to_reference(x)
        assert_close_to_reference(x, backend="sm80", lse=True)

    @pytest.mark.parametrize("dtype", [*HALF, torch.float32])
    def test_lengths_that_differ(self, dtype):
        for nq, nk in ((500, 60), (60, 500), (130, 390), (390, 130)):
            assert_close_to_reference(make_inputs((6,), 4, nq=nq, nk=nk, d=32, dtype=dtype, bias="hij", device="cuda"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_repeats_are_bit_equal(self, dtype):
        """The gradient of the bias; of short rows in half precision also those of q, k and v."""
        x = make_inputs((33,), 4, nq=200, nk=200, d=32, mask=True, dtype=dtype, bias="hij", device="cuda")
        leaves = {name: t.detach().requires_grad_() for name, t in x.tensors().items()}
        out = flash_cosine_sim_attention(**replace(x, **leaves).arguments())
        assert isinstance(out, torch.Tensor)
        upstream = torch.randn_like(out)
        names = ("attn_bias",) if dtype == torch.float32 else ("q", "k", "v", "attn_bias")
        wanted = [leaves[name] for name in names]
        first = torch.autograd.grad(out, wanted, upstream, retain_graph=True)
        for _ in range(100):
            again = torch.autograd.grad(out, wanted, upstream, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper")
    @pytest.mark.parametrize("name", ["as it is", *EXTREMES])
    @pytest.mark.parametrize("dtype", HALF)
    def test_forward_of_hopper(self, name, dtype):
        """Where it is not chosen, too."""
        for nq, nk in ((130, 31), (70, 200), (384, 384), (60, 512)):
            x = make_inputs((9,), 4, nq=nq, nk=nk, d=32, mask=True, dtype=dtype, bias="hij", device="cuda")
            if name != "float32" or nk <= 384:
                assert_forward_close(x if name == "as it is" else extreme(x, name))

    def test_memory_is_of_the_size_of_the_bias(self):
        """No n x n temporary per row: at n = 256 one would be 256 MiB."""
        n = 256
        q, k, v, bias = (
            torch.randn(n, 4, n, 32, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(4)
        )
        bias = torch.randn(4, n, n, device="cuda", dtype=torch.bfloat16).requires_grad_()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = flash_cosine_sim_attention(q, k, v, attn_bias=bias)
        assert isinstance(out, torch.Tensor)
        torch.autograd.grad(out.sum(), (q, k, v, bias))
        assert (
            torch.cuda.max_memory_allocated() - before < 150 * 2**20
        )  # six tensors of 16 MiB, and 32 for partial sums


EMULATED = [
    variant_for("sm80", pass_name, dtype, 32, feature)
    for dtype in ("bfloat16", "float16", "float32")
    for pass_name, feature in (("forward", "running_max"), ("backward", "bias"))
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory, tools_with_binding):
    return build(tmp_path_factory.mktemp("pair"), EMULATED, tools_with_binding)


class TestEmulated:
    @pytest.fixture(autouse=True, params=["Ampere", "Hopper"])
    def _kernels_on_the_cpu(self, request, emulated, serve_on_the_cpu, monkeypatch):
        """On a Hopper parts of the sm80 backward run by Hopper's own instructions."""
        monkeypatch.setattr(bias_plan, "MIN_SHARERS_GENERAL", 4)  # repacked for few rows too
        library = ctypes.CDLL(str(emulated))
        library.emulate_hopper(request.param == "Hopper")
        serve_on_the_cpu(launchers_of(emulated))
        yield
        library.emulate_hopper(False)

    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, form):
        x = make_inputs((5,), 2, nq=33, nk=50, d=32, mask=True, dtype=torch.bfloat16, bias=form, scale="head")
        assert_close_to_reference(x, backend="sm80")

    @pytest.mark.parametrize("dtype", [*HALF, torch.float32])
    @pytest.mark.parametrize(("nq", "nk", "d"), [(70, 140, 32), (140, 70, 24), (33, 300, 16)])
    def test_lengths(self, nq, nk, d, dtype):
        x = make_inputs((4,), 1, nq=nq, nk=nk, d=d, mask=True, dtype=dtype, bias="hij")
        assert_close_to_reference(x, backend="sm80")

    @pytest.mark.parametrize("name", EXTREMES)
    @pytest.mark.parametrize("dtype", HALF)
    def test_extreme_biases(self, name, dtype):
        x = make_inputs((5,), 1, nq=40, nk=90, d=32, mask=True, dtype=dtype, bias="hij")
        assert_close_to_reference(extreme(x, name), backend="sm80")

    @pytest.mark.parametrize("factor", [1e-2, 1e2])
    @pytest.mark.parametrize("dtype", HALF)
    def test_scaled_inputs(self, factor, dtype):
        x = make_inputs((5,), 1, nq=40, nk=90, d=32, dtype=dtype, bias="hij")
        x = replace(x, q=x.q * factor, k=x.k / factor, v=x.v * factor)
        assert_close_to_reference(x, backend="sm80")

    @pytest.mark.parametrize(
        "options", [{"causal": True}, {"kv_heads": 1}, {"groups": 2}, {"l2norm_qk": False}], ids=str
    )
    def test_what_the_kernels_for_short_rows_leave_to_the_general_ones(self, options):
        x = make_inputs((5,), 2, nq=40, nk=40, d=32, dtype=torch.bfloat16, bias="hij", **options)
        assert_close_to_reference(x, backend="sm80", lse="causal" in options)


def test_which_calls_the_kernels_for_short_rows_serve():
    def plan(pass_name="forward", **options):
        shape = {"batch": (32,), "heads": 2, "nq": 40, "d": 32, "dtype": torch.bfloat16, "bias": "hij"} | options
        return bias_plan.plan_bias(make_inputs(**shape).problem(), pass_name, 32 if shape["d"] <= 32 else 64)

    for pass_name in ("forward", "backward"):
        assert plan(pass_name).pair
        assert plan(pass_name).packed is not None
    for options in ({"causal": True}, {"kv_heads": 1}, {"groups": 2}, {"nq": 513}, {"d": 64}, {"dtype": torch.float32}):
        assert not plan(**options).pair
        assert plan(**options).packed is not None
    assert plan(batch=(4,)).pair
    assert plan("backward", d=64) == (None, False)  # read as it is
    assert plan("backward", d=64, nq=41).packed is not None
    for options in ({"bias": None}, {"bias": "bhij"}, {"batch": (3,)}, {"batch": (31,), "d": 64}):
        assert plan(**options) == (None, False)


HOPPER = [variant_for("sm90", "forward", dtype, 32, "pair") for dtype in ("bfloat16", "float16")]


@pytest.fixture(scope="module")
def emulated_hopper(tmp_path_factory, tools_with_binding):
    return build(tmp_path_factory.mktemp("pair_hopper"), HOPPER, tools_with_binding)


class TestEmulatedHopper:
    """The forward alone. Biases of 1e4 at masked keys and the like need the maxima that it finds only then."""

    @pytest.fixture(autouse=True)
    def _kernels_on_the_cpu(self, emulated_hopper, serve_on_the_cpu):
        serve_on_the_cpu(launchers_of(emulated_hopper), "sm90")

    @pytest.mark.parametrize("form", FORMS[:6])
    def test_forms(self, form):
        x = make_inputs((5,), 2, nq=33, nk=50, d=32, mask=True, dtype=torch.bfloat16, bias=form, scale="head")
        assert_forward_close(x)

    @pytest.mark.parametrize("batch", [(1, 6), (2, 5), (5, 1)])
    def test_two_batch_dims(self, batch):
        x = make_inputs(batch, 2, nq=65, nk=65, d=24, mask=True, dtype=torch.bfloat16, bias="bhij")
        assert x.attn_bias is not None
        assert_forward_close(replace(x, attn_bias=x.attn_bias[:, :1] if batch[1] > 1 else x.attn_bias[:1]))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(("nq", "nk", "d"), [(70, 140, 32), (140, 70, 24), (33, 300, 16), (20, 399, 32)])
    def test_lengths(self, nq, nk, d, dtype):
        assert_forward_close(make_inputs((4,), 1, nq=nq, nk=nk, d=d, mask=True, dtype=dtype, bias="hij"))

    @pytest.mark.parametrize("name", EXTREMES)
    @pytest.mark.parametrize("dtype", HALF)
    def test_extreme_biases(self, name, dtype):
        x = make_inputs((5,), 1, nq=40, nk=90, d=32, mask=True, dtype=dtype, bias="hij")
        assert_forward_close(extreme(x, name))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("height", [20.0, 200.0, 1e4])
    def test_largest_biases_at_masked_keys(self, height, dtype):
        """The bound of the logits is that of all keys."""
        x = make_inputs((5,), 2, nq=40, nk=90, d=32, mask=True, dtype=dtype, bias="hij")
        assert x.mask is not None
        assert x.attn_bias is not None
        x.mask[::2, 7] = False
        x.attn_bias[0, 10:, 7] = height
        assert_forward_close(x)

    @pytest.mark.parametrize("dtype", HALF)
    def test_float32_bias(self, dtype):
        for nk in (60, 200, 300):
            x = make_inputs((5,), 1, nq=70, nk=nk, d=32, dtype=dtype, bias="hij")
            assert_forward_close(extreme(x, "float32"))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("options", [{"l2norm_qk": False}, {"scale": 40.0}, {"scale": 1e-3}], ids=str)
    def test_shifts(self, options, dtype):
        x = make_inputs((5,), 1, nq=40, nk=90, d=32, dtype=dtype, bias="hij", **options)
        assert_forward_close(x if x.l2norm_qk else replace(x, q=x.q * 3))

    def test_masked_keys_may_hold_nan(self):
        x = make_inputs((5,), 2, nq=65, nk=77, d=32, mask=True, dtype=torch.bfloat16, bias="hij")
        assert x.mask is not None
        x.mask[0] = False  # and a row without any key
        hidden = ~x.mask[:, None, :, None].expand_as(x.k)
        nan = {"k": x.k.masked_fill(hidden, math.nan), "v": x.v.masked_fill(hidden, math.nan)}
        assert_forward_close(x, replace(x, **nan))

    def test_bias_of_any_strides(self):
        x = make_inputs((5,), 2, nq=65, nk=77, d=32, dtype=torch.bfloat16, bias="hij")
        assert x.attn_bias is not None
        wider = torch.zeros(2, 65, 83, dtype=torch.bfloat16)
        wider[..., 3:80] = x.attn_bias
        for bias in (x.attn_bias.mT.contiguous().mT, wider[..., 3:80], x.attn_bias[..., :1].expand(2, 65, 77)):
            assert_forward_close(replace(x, attn_bias=bias))


def assert_forward_close(x: Inputs, given: Inputs | None = None) -> None:
    actual = flash_cosine_sim_attention(**(given or x).arguments(), return_lse=True, backend="sm90")
    exact = plain_cosine_sim_attention(**x.to(torch.float64).arguments(), return_lse=True)
    baseline = eager_cosine_sim_attention(**x.arguments(), return_lse=True)
    for name, *three in zip(("out", "lse"), actual, exact, baseline, strict=True):
        assert_within_budget(name, *three)


def test_which_calls_the_forward_of_hopper_serves():
    def served(**options):
        shape = {"batch": (32,), "heads": 2, "nq": 40, "nk": 300, "d": 32, "dtype": torch.bfloat16, "bias": "hij"}
        return bias_plan.pair_on_sm90(make_inputs(**(shape | options)).problem())

    assert served()  # where it is the faster one
    assert served(dtype=torch.float16, nq=600)
    assert served(nk=500) is False  # serves, if asked for
    assert served(nk=200) is False
    for options in ({"causal": True}, {"kv_heads": 1}, {"groups": 2}, {"nk": 513}, {"d": 40}, {"dtype": torch.float32}):
        assert served(**options) is None
    for options in ({"bias": None}, {"bias": "bhij"}, {"batch": (3,)}):
        assert served(**options) is None
