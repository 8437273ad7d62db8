"""How large an error may be: the budget of testing.py, and the roundings that no O(n) attention avoids.

Against a float64 reference, max|error| <= 2 x the error of an eager PyTorch attention in the same dtype + 2 x the
rounding of the reference + floors. The floors bound what rounding does where the eager computation happens to be exact:
a row with one visible key has true gradients of 0, and one dominating key makes P exactly 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def error_budget(reference: Tensor, baseline: Tensor, floor: float = 0.0) -> float:
    """The largest absolute error that is allowed against a float64 reference.

    2 x the largest error of `baseline`, an eager computation in the dtype under test, + 2 x the rounding of the
    reference's largest value to that dtype, + `floor`. Entries that are not finite in the reference are left out.
    """
    finite = reference.isfinite()
    if not bool(finite.any()):
        return floor
    reference, own = reference[finite], baseline.view_as(reference)[finite]
    rounding = float(reference.abs().max()) * torch.finfo(baseline.dtype).eps / 2
    error = float((own.double() - reference.double()).abs().max())
    return 2 * (error if math.isfinite(error) else 0.0) + 2 * rounding + floor


def assert_within_budget(name: str, actual: Tensor, reference: Tensor, baseline: Tensor, floor: float = 0.0) -> float:
    """max|actual - reference| <= error_budget; infinities must agree, NaN never passes. -> largest error / budget."""
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    assert not bool(actual.isnan().any()), f"{name}: {int(actual.isnan().sum())} NaN of {actual.numel()} values"
    finite = reference.isfinite()
    infinities_agree = torch.equal(actual[~finite].double(), reference[~finite].double())
    assert infinities_agree, f"{name}: infinite values differ from those of the reference"
    if not bool(finite.any()):
        return 0.0
    error = float((actual.double() - reference.double())[finite].abs().max())
    budget = error_budget(reference, baseline, floor)
    assert error <= budget, f"{name}: max|error| {error:.3e} exceeds the budget {budget:.3e}"
    return error / budget if budget else 0.0


SUM_ROUNDINGS = 8.0
"""Rounding of a sum in units of its result: what an order of summation may lose against that of the eager product."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Magnitudes of a problem that its rounding depends on."""

    scale: float  # max |scale|
    q_norm: float  # smallest norm of a group of q, and of k: the backward through the norm divides by them
    k_norm: float
    v_norm: float  # largest norm of a value
    nq: int
    nk: int
    bias_numel: int
    bias_gain: float = 1.0  # largest derivative of a logit by a parameter of its bias
    groups: int = 1  # logits reach scale * groups


def rounding_floors(
    dtype: torch.dtype, setting: Setting, exact: dict[str, Tensor], dout: Tensor, dlse: Tensor | None
) -> dict[str, float]:
    """{name: floor} for the tensors of `exact`, the float64 results of `testing.evaluate`, which include "lse".

    Three sources, each counted twice: the exponent of P = exp(s - lse), the terms that cancel in dS, and the sums.
    """
    cancelled = _cancellation(dtype, setting, exact, dout, dlse)
    relative = _eps(dtype) * (largest(exact["lse"]) + setting.scale * setting.groups + SUM_ROUNDINGS)
    return {name: cancelled.get(name, 0.0) + relative * largest(x) for name, x in exact.items()}


def _cancellation(
    dtype: torch.dtype, setting: Setting, exact: dict[str, Tensor], dout: Tensor, dlse: Tensor | None
) -> dict[str, float]:
    """Rounding of dS_ij = P_ij (dout_i . v_j - D_i), D_i = dout_i . out_i - dlse_i, carried to the gradients.

    The products are rounded in the accumulator's dtype; out, as every O(n) backward reads it, was rounded in its own.
    """
    if not dout.numel():
        return {}
    terms = largest_norm(dout) * setting.v_norm + (0.0 if dlse is None else largest(dlse))
    stored = float((dout.double() * exact["out"]).abs().sum(-1).max()) * torch.finfo(dtype).eps
    rounding = _eps(dtype) * terms + stored
    rows = dout.numel() / dout.shape[-1]
    per_key = rounding * math.sqrt(max(setting.nq / max(setting.nk, 1), 1.0))  # weights of nq / nk together
    per_bias = rounding * math.sqrt(min(max(rows * setting.nk / max(setting.bias_numel, 1), 1.0), rows))
    return {
        "dq": rounding * setting.scale / setting.q_norm,
        "dk": per_key * setting.scale / setting.k_norm,
        "dattn_bias": per_bias * setting.bias_gain,
        "dscale": rounding * math.sqrt(rows),
    }


def _eps(dtype: torch.dtype) -> float:
    """Of the accumulator: float32 for the half types."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def largest(x: Tensor) -> float:
    """max|x| over the finite entries, 0 if there are none."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def largest_norm(x: Tensor) -> float:
    """Over the last dim, of the finite rows."""
    return largest(x.double().norm(dim=-1))


def smallest_norm(x: Tensor, groups: int) -> float:
    """The smallest norm of a group that is neither 0 nor infinite, 1 if there is none."""
    norms = x.double().unflatten(-1, (groups, -1)).norm(dim=-1)
    usable = norms[(norms > 0) & norms.isfinite()]
    return float(usable.min()) if usable.numel() else 1.0
