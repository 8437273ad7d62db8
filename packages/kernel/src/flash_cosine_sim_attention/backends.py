"""Which path computes a call: the choice is made here and nowhere else.

    plain    reference.py   the definition, O(n^2) memory; never chosen, only forced
    chunked  chunked.py     memory-efficient plain PyTorch, forward and backward; serves everything, on any device
    sdpa     sdpa.py        torch's own scaled_dot_product_attention behind the norm; CPU, where it serves the very same
    sm80     cuda/          fused CUDA kernels for compute capability 8.0 and up
    sm90     cuda/          fused CUDA kernels for Hopper

"plain" and "sdpa" are made of differentiable torch calls and chosen before the operator (`before_operator`); the others
are implementations of the operators in ops.py (`implementation`), chosen when the call runs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from . import chunked, cuda
from .problem import Gradients, Outputs, Problem


class Implementation(Protocol):
    """What ops.py calls: both fill the tensors that they are given."""

    def forward(self, problem: Problem, outputs: Outputs) -> None: ...

    def backward(
        self, problem: Problem, outputs: Outputs, dout: Tensor, dlse: Tensor | None, gradients: Gradients
    ) -> None: ...


def implementation(problem: Problem, backend: str) -> Implementation:
    """The module that computes `problem`; backend "" chooses, any other name forces."""
    if backend in ("", "chunked"):
        return cuda.AUTOMATIC if backend == "" and problem.q.is_cuda else chunked
    if backend in cuda.FORCED:
        return cuda.FORCED[backend]
    raise ValueError(f"backend: {backend!r} cannot serve this call")
