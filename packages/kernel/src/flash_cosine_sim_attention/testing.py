"""What tests, benchmarks and users' own checks share: input factories, the error budget, NaN poisoning.

The usual test is two lines:

    inputs = make_inputs(batch=(2,), heads=4, nq=65, nk=129, dtype=torch.bfloat16, bias="hij", mask=True, causal=True)
    assert_close_to_reference(inputs, backend="chunked")

It runs forward and backward with random upstream gradients and compares every output and gradient with the float64
definition. The budget of a tensor is twice the largest error that an eager PyTorch attention makes in the same dtype,
plus a floor of twice the rounding of the reference (see `error_budget`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .accuracy import Setting, assert_within_budget, error_budget, largest, largest_norm, rounding_floors, smallest_norm
from .attention import flash_cosine_sim_attention
from .ops import empty_gradients, empty_outputs
from .position_bias import AlibiBias, PositionBias, RelativeBias, T5Bias
from .problem import Gradients, Outputs, Problem, canonicalize
from .reference import plain_cosine_sim_attention
from .toeplitz import toeplitz_matrix

__all__ = [
    "Inputs",
    "assert_close_to_reference",
    "assert_within_budget",
    "eager_cosine_sim_attention",
    "error_budget",
    "evaluate",
    "make_inputs",
    "poison",
    "poisoned_gradients",
    "poisoned_outputs",
    "random_upstream",
]

AttentionFunction = Callable[..., "Tensor | tuple[Tensor, Tensor]"]

POSITION_BIASES: dict[str, Callable[[Tensor], PositionBias]] = {
    "alibi": AlibiBias,
    "t5": T5Bias,
    "t5_causal": partial(T5Bias, bidirectional=False),
    "relative": RelativeBias,
}
"""Forms of `make_inputs(bias=...)`: parameters -> the bias."""

DIFFERENTIABLE = ("q", "k", "v", "attn_bias", "scale")


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of `flash_cosine_sim_attention`, which documents their shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    attn_bias: Tensor | None = None
    scale: float | Tensor = 8.0
    groups: int = 1
    causal: bool = False
    l2norm_qk: bool = True
    attn_bias_batch_dim: bool = False
    position_bias: Callable[[Tensor], PositionBias] | None = None
    """If it is there, attn_bias holds the parameters, and this makes the argument of them."""

    def arguments(self) -> dict[str, Any]:
        arguments = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "position_bias"}
        if self.position_bias is not None and self.attn_bias is not None:
            arguments["attn_bias"] = self.position_bias(self.attn_bias)
        return arguments

    def to(self, dtype: torch.dtype) -> Inputs:
        """Every floating tensor in `dtype`, detached."""
        cast: dict[str, Any] = {name: x.detach().to(dtype) for name, x in self.tensors().items()}
        return replace(self, **cast)

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable arguments that are there, by name."""
        return {name: getattr(self, name) for name in DIFFERENTIABLE if isinstance(getattr(self, name), Tensor)}

    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v.shape[-1])

    def problem(self) -> Problem:
        """The canonical form, for calling a backend module directly."""
        x = replace(self, **{name: x.detach() for name, x in self.tensors().items()})  # type: ignore[arg-type]
        attn_bias = x.arguments()["attn_bias"]
        fields = canonicalize(x.q, x.k, x.v, x.mask, attn_bias, x.scale, x.attn_bias_batch_dim)
        toeplitz = isinstance(attn_bias, PositionBias)
        return Problem(*fields, self.groups, self.causal, self.l2norm_qk, toeplitz)


def make_inputs(
    batch: tuple[int, ...] = (2,),
    heads: int = 2,
    kv_heads: int | None = None,
    nq: int = 65,
    nk: int | None = None,
    d: int = 32,
    dv: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    mask: bool = False,
    bias: str | None = None,
    scale: float | str = 8.0,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    seed: int = 0,
) -> Inputs:
    """Random inputs: q (*batch, heads, nq, d), k (*batch, kv_heads, nk, d), v (*batch, kv_heads, nk, dv).

    Args:
        heads: 0 for the merged form: q (batch, nq, d), k (batch, nk, d), v (batch, nk, dv).
        kv_heads: None for as many as query heads, 0 for a single head without a dim of its own: k (*batch, nk, d).
        mask: attach a random key mask (*batch, nk), True with probability 0.7.
        bias: None, or the dims that the bias really has, out of "bhij": "hij" -> (heads, nq, nk), "bij" ->
            (b, nq, nk) with attn_bias_batch_dim, any other, such as "bhij", "hj" or "b": all dims, those not named of
            size 1. With several batch dims "b" is the first of them. Or a `PositionBias`: "alibi", "t5", "t5_causal" or
            "relative", with parameters of each head (of one for merged inputs).
        scale: a number; "scalar" or "head" for a learned tensor of one value or one a head, around 8.
        device: None for torch's default device. The numbers are the same on every device.
        l2norm_qk: with False q and k are of unit norm per group already (up to the rounding of dtype).
    """
    device = torch.get_default_device() if device is None else device
    generator = torch.Generator("cpu").manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    nk, dv = nq if nk is None else nk, d if dv is None else dv
    kv = batch if kv_heads == 0 else (*batch, heads if kv_heads is None else kv_heads)
    kv = batch if heads == 0 else kv
    rows = (*batch, heads) if heads else batch
    q, k, v = randn(*rows, nq, d), randn(*kv, nk, d), randn(*kv, nk, dv)
    if not l2norm_qk:
        q, k = (torch.nn.functional.normalize(x.unflatten(-1, (groups, -1)), dim=-1).flatten(-2) for x in (q, k))
    tensor_scale = 8.0 + randn(heads if scale == "head" and heads else 1) if isinstance(scale, str) else None
    attn_bias = None if bias is None else randn(*_bias_shape(bias, batch, heads, nq, nk))
    attn_bias = attn_bias.abs() / 4 if attn_bias is not None and bias == "alibi" else attn_bias
    keys = torch.rand(*batch, nk, generator=generator, device="cpu") < 0.7 if mask else None
    q, k, v = (x.to(device=device, dtype=dtype) for x in (q, k, v))
    return Inputs(
        *(q, k, v),
        mask=None if keys is None else keys.to(device),
        attn_bias=None if attn_bias is None else attn_bias.to(device=device, dtype=dtype),
        scale=float(scale) if tensor_scale is None else tensor_scale.to(device=device, dtype=dtype),
        groups=groups,
        causal=causal,
        l2norm_qk=l2norm_qk,
        attn_bias_batch_dim=bias == "bij",
        position_bias=None if bias is None else POSITION_BIASES.get(bias),
    )


def _bias_shape(dims: str, batch: tuple[int, ...], heads: int, nq: int, nk: int) -> tuple[int, ...]:
    if dims in POSITION_BIASES:
        forms = {"alibi": (heads or 1,), "relative": (heads or 1, 2 * max(nq, nk) - 1)}
        return forms.get(dims, (32, heads or 1))
    if dims == "hij":
        return heads, nq, nk
    if dims == "bij":
        return batch[0], nq, nk
    if heads == 0 and dims != "bij":
        raise ValueError(f"bias: expected None or 'bij' for merged inputs, got {dims!r}")
    sizes = {"b": batch[0], "h": heads, "i": nq, "j": nk}
    outer, *pairs = (sizes[name] if name in dims else 1 for name in "bhij")
    return (outer, *(1 for _ in batch[1:]), *pairs)


def eager_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | PositionBias | None = None,
    scale: float | Tensor = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What one writes in PyTorch without thinking of precision: normalize, matmul, softmax, all in the inputs' dtype.
    Its error is the yardstick of `error_budget`. The outputs are in the canonical form of problem.py.
    """
    q, k, v, mask, bias, scale_tensor, scale_value = canonicalize(q, k, v, mask, attn_bias, scale, attn_bias_batch_dim)
    nq, nk, repeats = q.shape[-2], k.shape[-2], q.shape[2] // k.shape[2] if k.shape[2] else 1
    if isinstance(attn_bias, PositionBias) and bias is not None:
        bias = toeplitz_matrix(bias.squeeze(-2), nk) if nq and nk else None
    if mask is not None:  # NaN in a masked key is no measure of anything
        k, v = torch.where(mask[:, :, None, :, None], k, 1), torch.where(mask[:, :, None, :, None], v, 0)
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    if l2norm_qk:
        q, k = (torch.nn.functional.normalize(x.unflatten(-1, (groups, -1)), dim=-1).flatten(-2) for x in (q, k))
    factor = scale_value if scale_tensor is None else scale_tensor.to(q.dtype)[:, None, None]
    scores = q @ k.transpose(-1, -2) * factor
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    visible = torch.ones(nq, nk, dtype=torch.bool, device=q.device)
    visible = visible.tril(nk - nq) if causal else visible
    visible = visible if mask is None else visible & mask[:, :, None, None, :]
    scores = torch.where(visible, scores, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.where(empty, 0, torch.where(empty, 0, scores).softmax(-1))
    if not return_lse:
        return weights @ v
    return weights @ v, scores.logsumexp(-1) if nk else scores.new_full(scores.shape[:-1], -math.inf)


def evaluate(
    function: AttentionFunction,
    inputs: Inputs,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    constants: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """Forward and backward of function(**inputs, **options): {"out", "lse" if dlse, "dq", "dk", "dv", ...}.

    dout: gradient of the output, any shape of its size (cast to its dtype). dlse: that of log-sum-exp; asks for it.
    constants: names of arguments that need no gradient, such as "attn_bias".
    """
    leaves: dict[str, Any] = {
        name: x.detach().requires_grad_() for name, x in inputs.tensors().items() if name not in constants
    }
    returned = function(**replace(inputs, **leaves).arguments(), return_lse=dlse is not None, **options)
    out, lse = returned if isinstance(returned, tuple) else (returned, None)
    total = (out * dout.to(out.dtype).view_as(out)).sum()
    results = {"out": out.detach()}
    if dlse is not None:
        assert lse is not None
        results["lse"] = lse.detach()
        total = total + torch.where(lse > -math.inf, lse * dlse.to(lse.dtype).view_as(lse), 0).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return results | {"d" + name: gradient for name, gradient in zip(leaves, gradients, strict=True)}


def assert_close_to_reference(
    inputs: Inputs,
    function: AttentionFunction = flash_cosine_sim_attention,
    *,
    lse: bool = False,
    seed: int = 1,
    constants: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, float]:
    """Compare outputs and all gradients of function(**inputs, **options) with the float64 definition.

    lse: also ask for log-sum-exp and send a random gradient through it. constants: names of arguments without gradient.
    Returns {tensor name: largest error / budget}; AssertionError names the tensor, its error and its budget.
    """
    dout, dlse = random_upstream(inputs, seed)
    upstream = (dout, dlse if lse else None)
    actual = evaluate(function, inputs, *upstream, constants=constants, **options)
    exact = evaluate(
        plain_cosine_sim_attention, inputs.to(torch.float64), dout, dlse if lse else torch.zeros_like(dlse)
    )
    baseline = evaluate(eager_cosine_sim_attention, inputs, *upstream)
    floors = rounding_floors(inputs.q.dtype, _setting(inputs), exact, *upstream)
    return {
        name: assert_within_budget(name, actual[name], exact[name], baseline[name], floors[name]) for name in actual
    }


def random_upstream(inputs: Inputs, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random gradients (of out, of lse), rounded to the dtype of q so that every arithmetic gets the same ones."""
    generator = torch.Generator("cpu").manual_seed(seed)
    dout = torch.randn(inputs.out_shape(), generator=generator, device="cpu")
    dlse = torch.randn(inputs.out_shape()[:-1], generator=generator, device="cpu")
    return dout.to(inputs.q.device, inputs.q.dtype), dlse.to(inputs.q.device, inputs.q.dtype)


def _setting(inputs: Inputs) -> Setting:
    """The magnitudes of `inputs` that rounding floors depend on."""
    norms = [1.0, 1.0]
    if inputs.l2norm_qk:
        norms = [smallest_norm(x, inputs.groups) for x in (inputs.q, inputs.k)]
    scale = float(inputs.scale.abs().max()) if isinstance(inputs.scale, Tensor) else abs(inputs.scale)
    nq, nk, numel, gain = inputs.q.shape[-2], inputs.k.shape[-2], 0, 1.0
    if inputs.attn_bias is not None:
        numel = inputs.attn_bias.numel()
        if inputs.position_bias is not None:  # linear in its parameters
            gain = largest(inputs.position_bias(torch.ones_like(inputs.attn_bias)).diagonals(nq, nk))
    return Setting(scale, norms[0], norms[1], largest_norm(inputs.v), nq, nk, numel, gain, inputs.groups)


def poison(*tensors: Tensor | None) -> None:
    """Fill with NaN, so that an element that a kernel forgets to write is seen."""
    for tensor in tensors:
        if tensor is not None:
            tensor.fill_(math.nan)


def poisoned_outputs(problem: Problem) -> Outputs:
    """What the forward of a backend module fills: all NaN before."""
    outputs = empty_outputs(problem)
    poison(outputs.out, outputs.lse, outputs.q_rnorm, outputs.k_rnorm)
    return outputs


def poisoned_gradients(problem: Problem, needs: list[bool] | None = None) -> Gradients:
    """What the backward of a backend module fills: all NaN before. needs: of q, k, v, bias, scale; None for all."""
    gradients = empty_gradients(problem, needs or [True] * 5)
    poison(gradients.dq, gradients.dk, gradients.dv, gradients.dbias, gradients.dscale)
    return gradients
