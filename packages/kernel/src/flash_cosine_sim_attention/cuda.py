"""The fused CUDA kernels as implementations of the operators: which kernel serves a call, or why none does.

What the kernels cannot serve is refused with a reason: an automatic choice then warns once and runs the chunked path,
a forced backend raises ValueError. Nothing here reads the device or waits for it.

Kernels take a (b0, b1, heads, n, d) tensor by its strides if rows are contiguous and start on 16-byte boundaries; d is
a multiple of 8 and the same for v. Everything else is brought into that form by one copy (kernel_form.py).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import chunked, launchers
from ._build import BuildError
from .bias_plan import pair_on_sm90, sm90_bias_form
from .cuda_launch import Launcher, empty_backward, empty_forward, launch_backward, launch_forward
from .kernel_form import kernel_width
from .problem import Gradients, Outputs, Problem
from .variants import TABLE, Variant, find_variant, variant_for, why_none

BOUND_WINDOW = {torch.float16: 10.4, torch.bfloat16: 70.0}
"""The largest bound of the logits for a shift that is known in advance: exp(s - m) stays normal in the dtype that the
probabilities are multiplied in, at a cosine of -1 in all keys as well (fp16: e^-9.7 to e^11.09). float32 is
multiplied as halves, whose bits suffice only around each row's own maximum."""

FLOAT32_BOUND = 64.0
"""The largest bound of the logits that float32 is multiplied in split halves for: they keep 22 bits of unit q and k,
and an error of s is a relative error of P. Beyond it (16 groups at scale 8, say) eager float32 is twice as exact."""

_warned: set[str] = set()


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None for a device that is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(device)


def refusal(arch: str, capability: tuple[int, int] | None) -> str | None:
    """Why no kernel of `arch` runs on a device of this compute capability; None if they do."""
    if capability is None:
        return "the tensors are not on an NVIDIA GPU"
    if arch == "sm90" and capability != (9, 0):
        return f"the sm90 kernels need compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0 or more, this GPU has {capability[0]}.{capability[1]}"
    return None


class CudaKernels:
    """An `Implementation` (backends.py). `arch` forces one set of kernels; None chooses and falls back to chunked."""

    def __init__(self, arch: str | None) -> None:
        self.arch = arch
        self._launchers: dict[tuple, Launcher | str] = {}  # kind of call -> what serves it, or the reason of a refusal

    def forward(self, problem: Problem, outputs: Outputs) -> None:
        launcher = self.launcher("forward", problem)
        if launcher is None:
            chunked.forward(problem, outputs)
        elif problem.q.numel() == 0 or problem.k.numel() == 0:
            empty_forward(outputs)
        else:
            launch_forward(launcher, problem, outputs)

    def backward(
        self, problem: Problem, outputs: Outputs, dout: Tensor, dlse: Tensor | None, gradients: Gradients
    ) -> None:
        launcher = self.launcher("backward", problem)
        if launcher is None:
            chunked.backward(problem, outputs, dout, dlse, gradients)
        elif problem.q.numel() == 0 or problem.k.numel() == 0:
            empty_backward(gradients)
        else:
            launch_backward(launcher, problem, outputs, dout, dlse, gradients)

    def launcher(self, pass_name: str, problem: Problem) -> Launcher | None:
        """What serves the call; None: the chunked path, after a warning with the reason. Forced: ValueError with it."""
        q, feature = problem.q, _feature(pass_name, problem)
        dtype, has_bias = _kernel_dtype(q, pass_name), problem.bias is not None
        if self.arch is None and dtype == "float32" and FLOAT32_BOUND < problem.bound < math.inf:
            _warn_once(
                f"float32 logits up to {problem.bound:g}: above {FLOAT32_BOUND:g} the kernels' split products lose bits"
            )
            return None
        grouped_scale = problem.scale is not None and q.shape[2] != problem.k.shape[2]
        sizes = (q.shape[-1], problem.v.shape[-1], problem.groups)
        form = (sm90_bias_form(problem), pair_on_sm90(problem)) if pass_name == "forward" else None
        key = (pass_name, q.device, dtype, sizes, feature, has_bias, form, grouped_scale)
        found = self._launchers.get(key)
        if found is None:
            found = self._launchers[key] = self._resolve(pass_name, problem)
        if isinstance(found, Launcher):
            return found
        if self.arch is not None:
            raise ValueError(f"backend: {self.arch!r} cannot serve this call: {found}")
        _warn_once(found)
        return None

    def _resolve(self, pass_name: str, problem: Problem) -> Launcher | str:
        """What serves the call, compiled if need be; or why there is nothing: the reason of the last one tried."""
        capability = capability_of(problem.q.device)
        d, dv = problem.q.shape[-1], problem.v.shape[-1]
        width = kernel_width(d, dv, problem.groups) if d else 0
        dtype = _kernel_dtype(problem.q, pass_name)
        reason: str | None = None
        for arch in self._candidates(pass_name):
            feature = _feature(pass_name, problem, arch)
            reason = (
                refusal(arch, capability)
                or why_none(arch, pass_name, dtype, width, feature)
                or (_sm90_refusal(pass_name, problem, width) if arch == "sm90" else None)
                or (_sm90_drawback(pass_name, problem, width) if arch == "sm90" and self.arch is None else None)
            )
            if reason is None:
                assert capability is not None
                variant = variant_for(arch, pass_name, dtype, width, feature)
                also = self._needed_soon(problem, width) if pass_name == "forward" else ()
                try:
                    return Launcher(launchers.address(variant, capability, also), variant.head_dim, arch)
                except BuildError as error:
                    reason = str(error)
        assert reason is not None
        return reason

    def _candidates(self, pass_name: str) -> tuple[str, ...]:
        """Sets of kernels, the fastest first. A backward that sm90 has no kernel for runs on that of sm80."""
        if self.arch is None or (self.arch == "sm90" and pass_name == "backward"):
            return ("sm90", "sm80")
        return (self.arch,)

    def _needed_soon(self, problem: Problem, width: int) -> Sequence[Variant]:
        """The backward kernel of a forward call that will be differentiated: compiled in the same go."""
        inputs = (problem.q, problem.k, problem.v, problem.bias, problem.scale)
        if not any(x is not None and x.requires_grad for x in inputs):
            return ()
        dtype, feature = _kernel_dtype(problem.q, "backward"), _feature("backward", problem)
        capability = capability_of(problem.q.device)
        for arch in self._candidates("backward"):
            if refusal(arch, capability) or (arch == "sm90" and _sm90_refusal("backward", problem, width)):
                continue
            variant = find_variant(arch, "backward", dtype, width, feature)
            if variant is not None:
                return (variant,)
        return ()


AUTOMATIC = CudaKernels(None)
FORCED = {"sm80": CudaKernels("sm80"), "sm90": CudaKernels("sm90")}


def _sm90_refusal(pass_name: str, problem: Problem, width: int) -> str | None:
    """What the Hopper kernels do not serve of what their variants would; None if they do."""
    if pass_name == "forward":
        is_served = sm90_bias_form(problem) != "shared" or pair_on_sm90(problem) is not None
        return None if is_served else "the sm90 forward takes no bias shared by all keys"
    if width <= 32:
        return f"the sm90 backward has no tiles for head dim {width}"
    if problem.scale is not None and problem.q.shape[2] != problem.k.shape[2]:
        return "the sm90 backward takes no learned scale beside grouped kv heads"
    return None


def _sm90_drawback(pass_name: str, problem: Problem, width: int) -> str | None:
    """Why the sm80 kernels serve better a forward that the sm90 kernels would serve; None if they do not."""
    if pass_name == "forward" and pair_on_sm90(problem):
        return None
    form = sm90_bias_form(problem) if pass_name == "forward" else None
    if pass_name == "forward" and problem.bias is not None and width <= 32:
        return f"the sm90 forward has no tiles of its own for a bias and head dim {width}"
    if form == "copied":
        return "the sm90 forward would copy a bias that few rows share"
    return None


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"flash_cosine_sim_attention runs on its plain PyTorch path, without the fused CUDA kernels: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def _kernel_dtype(q: Tensor, pass_name: str) -> str:
    """The table's name of the arithmetic: that of the dtype, or "tf32" where torch's settings allow it in products and
    there is such a kernel."""
    if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32" if any(row.pass_name == pass_name and "tf32" in row.dtypes for row in TABLE) else "float32"
    return str(q.dtype).removeprefix("torch.")


def _feature(pass_name: str, problem: Problem, arch: str = "sm80") -> str:
    if pass_name == "backward":
        return "plain" if problem.bias is None else "toeplitz" if problem.toeplitz else "bias"
    if problem.toeplitz:
        return "toeplitz"
    if problem.bias is not None and arch == "sm90":
        return "bias" if pair_on_sm90(problem) is None else "pair"
    bounded = problem.bias is None and problem.bound <= BOUND_WINDOW.get(problem.q.dtype, -1.0)
    return "bounded" if bounded else "running_max"
