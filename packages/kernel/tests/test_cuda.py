"""The adapter of the CUDA kernels, without a GPU: operators and params are real, launchers run on host memory."""

from __future__ import annotations

import subprocess
import warnings
from dataclasses import replace

import pytest
import torch
from flash_cosine_sim_attention import cuda, flash_cosine_sim_attention, kernel_form, launchers
from flash_cosine_sim_attention._build import BuildError, toolchain
from flash_cosine_sim_attention._build.spec import CSRC
from flash_cosine_sim_attention.ops import empty_outputs
from flash_cosine_sim_attention.problem import Problem, canonicalize
from flash_cosine_sim_attention.testing import assert_close_to_reference, make_inputs, poisoned_gradients
from flash_cosine_sim_attention.variants import HEAD_DIMS, Variant, dtypes_of, find_variant

DTYPES = {
    name: getattr(torch, name)
    for name in dtypes_of("sm80")
    if hasattr(torch, name) and find_variant("sm80", "backward", name, HEAD_DIMS[0], "plain") is not None
}


@pytest.fixture(scope="module")
def host_library(tmp_path_factory, tools_with_binding):
    library = tmp_path_factory.mktemp("host") / "host_launcher.so"
    source = CSRC.parents[2] / "tests" / "host_launcher.cpp"
    includes = [f"-I{CSRC}", *(f"-isystem{folder}" for folder in toolchain.cuda_includes(tools_with_binding.nvcc))]
    command = [tools_with_binding.cxx, "-shared", "-fPIC", "-O2", "-std=c++17", *includes, source, "-o", library]
    subprocess.run(list(map(str, command)), check=True)
    return library


@pytest.fixture
def host_launchers(host_library, serve_on_the_cpu):
    """sm80 serves CPU tensors by launchers for host memory, with poisoned workspaces; -> the variants asked for."""
    asked: list[Variant] = []

    def address(variant, capability, also=()):
        asked.extend([variant, *also])
        return launchers.exported(host_library, f"{variant.pass_name}_{variant.dtype}_{variant.feature}")

    serve_on_the_cpu(address)
    return asked


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "mask": True, "nk": 40},
        {"causal": True, "nq": 40, "nk": 30},  # rows that see no key
        {"kv_heads": 1, "heads": 4},
        {"batch": (2, 3), "bias": "bhij", "kv_heads": 0},
        {"heads": 0, "batch": (4,), "bias": "bij"},
        {"bias": "hij", "mask": True},
        {"bias": "hj"},
        {"bias": "b"},
        {"scale": "head"},
        {"scale": "scalar", "bias": "hij"},
        {"scale": 80.0},
        {"groups": 2},
        {"groups": 4, "scale": "head", "l2norm_qk": False},
        {"l2norm_qk": False},
        {"d": 20, "dv": 20},  # rows that are no multiples of 16 bytes
        {"d": 12, "dv": 30},
        {"d": 24, "dv": 8},
        {"d": 12, "dv": 20, "groups": 3, "bias": "hij", "scale": "head"},
        {"d": 200, "nq": 5, "nk": 7},
        {"dv": 0},
    ],
)
def test_values_through_binding_and_params(host_launchers, dtype, options):
    options = {"nq": 19, "nk": 23, "d": 16} | options
    if find_variant("sm80", "backward", str(dtype).removeprefix("torch."), options["d"], "plain") is None:
        pytest.skip(f"no kernel for {dtype} at head dim {options['d']}")
    assert_close_to_reference(make_inputs(dtype=dtype, **options), backend="sm80", lse=True)
    assert {variant.pass_name for variant in host_launchers} == {"forward", "backward"}


LAYOUTS = {
    "heads behind n": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "aligned slice": lambda x: torch.cat([x, x, x], -1)[..., 16:32],
    "unaligned slice": lambda x: torch.cat([x, x, x], -1)[..., 3:19],
    "unaligned base": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "columns strided": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(host_launchers, dtype, layout):
    x = make_inputs(nq=19, nk=23, d=16, dtype=dtype)
    x = replace(x, **{name: LAYOUTS[layout](getattr(x, name)) for name in "qkv"})
    assert_close_to_reference(x, backend="sm80", lse=True)


@pytest.mark.parametrize("layout", ["heads behind n", "heads first", "aligned slice", "expanded"])
def test_rows_that_a_kernel_can_read_are_not_copied(layout, dtype):
    x = LAYOUTS[layout](torch.randn(2, 2, 19, 16, dtype=dtype))[:, None]
    assert kernel_form.readable(x, 1, 16) is x


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_bias_of_any_dtype_and_layout(host_launchers, dtype, bias_dtype):
    x = make_inputs(nq=19, nk=23, d=16, dtype=dtype, bias="hij", mask=True)
    bias = x.attn_bias.to(bias_dtype).transpose(-1, -2).contiguous().transpose(-1, -2)
    assert_close_to_reference(replace(x, attn_bias=bias), backend="sm80")
    assert_close_to_reference(replace(x, attn_bias=bias[:, :1].expand(bias.shape)), backend="sm80")


@pytest.mark.parametrize("wanted", range(1, 32))
def test_gradients_only_for_what_needs_them(host_launchers, wanted):
    needs = [bool(wanted >> index & 1) for index in range(5)]
    problem = make_inputs(nq=9, nk=11, d=16, dtype=torch.bfloat16, bias="hij", scale="head").problem()
    arguments = [getattr(problem, name) for name in problem.__dataclass_fields__]
    saved = torch.ops.flash_cosine_sim_attention.forward(*arguments, "sm80")
    dout, dlse = torch.randn_like(saved[0]), torch.randn_like(saved[1])
    every = torch.ops.flash_cosine_sim_attention.backward(dout, dlse, *saved, *arguments, "sm80", [True] * 5)
    some = torch.ops.flash_cosine_sim_attention.backward(dout, dlse, *saved, *arguments, "sm80", needs)
    for full, part, need in zip(every, some, needs, strict=True):
        assert torch.equal(part, full if need else part.new_empty(0))


def test_deterministic_mode_reaches_the_kernel(host_launchers):
    inputs = make_inputs(nq=9, nk=11, d=16, dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        assert_close_to_reference(inputs, backend="sm80")  # the host launcher checks that no accumulator came along
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("sizes", [{"nq": 0}, {"nk": 0}, {"batch": (0,)}])
def test_no_launch_for_empty_sizes(host_library, host_launchers, monkeypatch, sizes):
    monkeypatch.setattr(launchers, "address", lambda *_: launchers.exported(host_library, "failing"))
    sizes = {"nq": 5, "nk": 7} | sizes
    assert_close_to_reference(make_inputs(d=16, dtype=torch.bfloat16, **sizes), backend="sm80", lse=True)


def test_variant_of_a_call(host_launchers):
    def asked_for(**options):
        host_launchers.clear()
        cuda.FORCED["sm80"] = cuda.CudaKernels("sm80")
        x = make_inputs(nq=5, nk=7, dtype=torch.float16, **options)
        flash_cosine_sim_attention(**x.arguments(), backend="sm80")
        (variant,) = host_launchers
        return variant.head_dim, variant.feature

    assert asked_for(d=16) == (32, "bounded")
    assert asked_for(d=72, scale=11.0) == (96, "running_max")
    assert asked_for(d=64, groups=2) == (64, "running_max")  # the bound is scale * groups
    assert asked_for(d=64, scale="scalar") == (64, "running_max")
    assert asked_for(d=64, bias="hij") == (64, "running_max")
    assert asked_for(d=256) == (HEAD_DIMS[-1], "bounded")


def test_forward_and_backward_are_compiled_together(host_launchers):
    x = make_inputs(nq=5, nk=7, d=16, dtype=torch.bfloat16, bias="hij")
    x.v.requires_grad_()
    flash_cosine_sim_attention(**x.arguments(), backend="sm80")
    assert [(v.pass_name, v.feature) for v in host_launchers] == [("forward", "running_max"), ("backward", "bias")]


def test_hopper_takes_its_own_forward_where_there_is_one(host_launchers, monkeypatch):
    def served_by(capability, requires_grad=False, **options):
        monkeypatch.setattr(cuda, "capability_of", lambda device: capability)
        host_launchers.clear()
        x = make_inputs(nq=5, **({"nk": 7, "d": 64, "dtype": torch.bfloat16} | options))
        x.q.requires_grad_(requires_grad)
        problem = Problem(*canonicalize(x.q, x.k, x.v, x.mask, x.attn_bias, x.scale, False), 1, False, True)
        cuda.CudaKernels(None).forward(problem, empty_outputs(problem))
        return [(variant.arch, variant.pass_name, variant.head_dim) for variant in host_launchers]

    assert served_by((8, 6)) == [("sm80", "forward", 64)]
    assert served_by((12, 0)) == [("sm80", "forward", 64)]
    assert served_by((9, 0)) == [("sm90", "forward", 64)]
    assert served_by((9, 0), mask=True) == [("sm90", "forward", 64)]
    assert served_by((9, 0), scale="head") == [("sm90", "forward", 64)]
    assert served_by((9, 0), bias="hij", nk=8) == [("sm90", "forward", 64)]
    assert served_by((9, 0), bias="hj") == [("sm90", "forward", 64)]  # a small copy
    assert served_by((9, 0), bias="hij") == [("sm80", "forward", 64)]  # rows on no 16-byte boundaries
    assert served_by((9, 0), bias="hi") == [("sm80", "forward", 64)]
    assert served_by((9, 0), bias="hij", nk=8, d=32) == [("sm80", "forward", 32)]
    assert served_by((9, 0), d=32, requires_grad=True)[1:] == [("sm80", "backward", 32)]
    assert served_by((9, 0), dtype=torch.float32) == [("sm80", "forward", 64)]


def test_error_of_a_launcher_is_raised(host_library, host_launchers, monkeypatch):
    monkeypatch.setattr(launchers, "address", lambda *_: launchers.exported(host_library, "failing"))
    with pytest.raises(RuntimeError, match="forward: CUDA error 9"):
        flash_cosine_sim_attention(**make_inputs(d=16, dtype=torch.bfloat16).arguments(), backend="sm80")


class TestRefusals:
    """Forced: ValueError with the reason. Chosen: one warning with the reason, and the chunked path."""

    @pytest.mark.parametrize(
        ("capability", "arch", "options", "reason"),
        [
            (None, "sm80", {}, "not on an NVIDIA GPU"),
            ((7, 5), "sm80", {}, "compute capability 8.0 or more, this GPU has 7.5"),
            ((8, 0), "sm80", {"dtype": torch.float64}, "no sm80 forward kernel for float64"),
            ((8, 0), "sm80", {"d": 264}, "head dim 264"),
            ((8, 0), "sm80", {"d": 16, "dv": 300}, "head dim 304"),
            ((8, 0), "sm80", {"d": 0, "dv": 16}, "head dim 0"),
        ],
    )
    def test_reasons(self, monkeypatch, capability, arch, options, reason):
        monkeypatch.setattr(cuda, "capability_of", lambda device: capability)
        x = make_inputs(nq=3, nk=4, **({"dtype": torch.bfloat16, "d": 16} | options))
        with pytest.raises(ValueError, match=f"backend: '{arch}' cannot serve this call: .*{reason}"):
            cuda.CudaKernels(arch).forward(x.problem(), None)

    def test_a_failed_build_falls_back_with_one_warning(self, monkeypatch):
        def fail(*_):
            raise BuildError("no CUDA compiler: nvcc is nowhere")

        monkeypatch.setattr(launchers, "address", fail)
        monkeypatch.setattr(cuda, "capability_of", lambda device: (8, 0))
        monkeypatch.setattr(cuda, "_warned", set())
        kernels, problem = cuda.CudaKernels(None), make_inputs(nq=3, nk=4, d=16, dtype=torch.bfloat16).problem()
        outputs = empty_outputs(problem)
        with pytest.warns(RuntimeWarning, match="plain PyTorch path.*nvcc is nowhere"):
            kernels.forward(problem, outputs)
        assert bool(outputs.out.isfinite().all())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.forward(problem, outputs)
            kernels.backward(problem, outputs, torch.ones_like(outputs.out), None, poisoned_gradients(problem))

    def test_forced_sm90(self):
        x = make_inputs(nq=3, nk=4, d=16, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="'sm90' cannot serve this call"):
            flash_cosine_sim_attention(**x.arguments(), backend="sm90")


class TestOperatorArguments:
    """What a kernel could not bear is refused by the operator itself."""

    @pytest.fixture
    def call(self, host_library):
        address = launchers.exported(host_library, "forward_bfloat16_bounded")
        q = torch.randn(1, 1, 2, 5, 16).bfloat16()

        def call(**changed):
            a = {
                "launcher": address, "q": q, "k": q, "v": q, "mask": None, "bias": None, "scale": None,
                "scale_value": 8.0, "bound": 8.0, "groups": 1, "causal": False, "l2norm_qk": False,
                "toeplitz": False,
                "out": torch.empty_like(q), "lse": q.new_empty(1, 1, 2, 5, dtype=torch.float32), "q_rnorm": None,
                "k_rnorm": None, "q_unit": None, "k_unit": None, "v_split": None, "v_largest": None, "next_item": None,
                "packed_bias": None, "pair_kernels": False,
            }  # fmt: skip
            torch.ops.flash_cosine_sim_attention.launch_forward(**(a | changed))

        call()
        return call

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"launcher": 0}, "launcher: expected the address"),
            ({"q": torch.zeros(2, 5, 16).bfloat16()}, r"q: expected 5 dims .* got \(2, 5, 16\)"),
            ({"k": torch.zeros(1, 1, 2, 5, 24).bfloat16()}, r"k: expected shape \(1, 1, 2, 5, 16\)"),
            ({"v": torch.zeros(1, 1, 2, 5, 16)}, "v: expected dtype"),
            ({"k": torch.zeros(1, 1, 2, 5, 17).bfloat16()[..., 1:]}, "k: expected a contiguous last dim and rows"),
            ({"lse": torch.zeros(1, 1, 2, 5).bfloat16()}, "lse: expected dtype"),
            ({"lse": torch.zeros(1, 1, 5, 2).transpose(2, 3)}, "lse: expected a contiguous tensor"),
            ({"mask": torch.ones(1, 1, 4, dtype=torch.bool)}, "mask: expected a shape that broadcasts"),
            ({"bias": torch.ones(1, 1, 3, 1, 1)}, "bias: expected a shape that broadcasts"),
            ({"bias": torch.ones(1, 1, 1, 1, 1).half()}, "bias: expected dtype"),
            ({"bias": torch.ones(1, 1, 1, 1, 8), "toeplitz": True}, "bias: expected a shape that broadcasts"),
            ({"bias": torch.ones(1, 1, 1, 1, 9).half(), "toeplitz": True}, "bias: expected dtype"),
            ({"bias": torch.ones(1, 1, 1, 1, 18)[..., ::2], "toeplitz": True}, "bias: expected contiguous diagonals"),
            ({"scale": torch.ones(1)}, r"scale: expected shape \(2\)"),
            ({"groups": 3}, "groups: expected a divisor"),
            ({"q_rnorm": torch.ones(1, 1, 2, 5, 2)}, "q_rnorm: expected shape"),
        ],
    )
    def test_messages(self, call, changed, message):
        with pytest.raises(RuntimeError, match=message):
            call(**changed)


@pytest.mark.parametrize(("groups", "fused"), [(8, True), (16, False)])
def test_float32_beyond_the_split_halves_is_served_by_the_torch_path(host_launchers, monkeypatch, groups, fused):
    """Logits up to 128 would lose more bits than the error budget has; forced kernels do as they are told."""
    monkeypatch.setattr(cuda, "_warned", set())
    automatic = cuda.CudaKernels(None)
    problem = make_inputs(d=32, groups=groups, scale=8.0).problem()
    if fused:
        assert automatic.launcher("forward", problem) is not None
        return
    with pytest.warns(RuntimeWarning, match="float32 logits up to 128: above 64"):
        assert automatic.launcher("forward", problem) is None
    assert automatic.launcher("backward", problem) is None
    assert cuda.FORCED["sm80"].launcher("forward", problem) is not None
