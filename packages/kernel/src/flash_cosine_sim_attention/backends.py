"""Which path computes a call: the choice is made here and nowhere else.

    plain    reference.py   the definition, O(n^2) memory; never chosen, only forced
    chunked  chunked.py     memory-efficient plain PyTorch, forward and backward; serves everything, on any device
    sdpa     sdpa.py        torch's own scaled_dot_product_attention behind the norm; CPU, where it serves the very same
    sm80     cuda/          fused CUDA kernels for compute capability 8.0 and up
    sm90     cuda/          fused CUDA kernels for Hopper

"plain" and "sdpa" are made of differentiable torch calls and chosen before the operator ("plain" by its name alone,
"sdpa" in `uses_sdpa`); the others are implementations of the operators in ops.py (`implementation`), chosen when the
call runs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from . import chunked, cuda, sdpa
from .problem import Gradients, Outputs, Problem


class Implementation(Protocol):
    """What ops.py calls: both fill the tensors that they are given."""

    def forward(self, problem: Problem, outputs: Outputs) -> None: ...

    def backward(
        self, problem: Problem, outputs: Outputs, dout: Tensor, dlse: Tensor | None, gradients: Gradients
    ) -> None: ...


def uses_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    return_lse: bool,
    toeplitz: bool,
    backend: str | None,
) -> bool:
    """Whether sdpa.py computes the call. Tensors as in `Problem`; backend None chooses.

    Raises ValueError if `backend` forces it and it cannot.
    """
    if backend not in (None, "sdpa"):
        return False
    reason = sdpa.why_not(q, k, v, mask, bias, causal, return_lse, toeplitz)
    if backend == "sdpa" and reason is not None:
        raise ValueError(f"backend: 'sdpa' cannot serve this call: {reason}")
    return reason is None and (backend == "sdpa" or sdpa.is_faster(q, k))


def implementation(problem: Problem, backend: str) -> Implementation:
    """The module that computes `problem`; backend "" chooses, any other name forces."""
    if backend in ("", "chunked"):
        return cuda.AUTOMATIC if backend == "" and problem.q.is_cuda else chunked
    if backend in cuda.FORCED:
        return cuda.FORCED[backend]
    raise ValueError(f"backend: {backend!r} cannot serve this call")
