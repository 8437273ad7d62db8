"""The ways to normalise q and k in front of a peer, and torch.compile as the benchmarks use it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_compiled: dict[Callable, Callable] = {}


def compiled_once(function: Callable) -> Callable:
    """torch.compile for static shapes: a new shape is compiled anew, in the warm-up."""
    if function not in _compiled:
        from torch._dynamo import config as dynamo
        from torch._functorch import config as functorch

        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 1024
        functorch.donated_buffer = False  # the backward alone runs over one graph again and again
        _compiled[function] = torch.compile(function, dynamic=False)
    return _compiled[function]


def normalize_pair(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1)


def normalize_compiled(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Over (rows, d), so that cases with as many rows share one compilation."""
    dim = q.shape[-1]
    qn, kn = compiled_once(normalize_pair)(q.view(-1, dim), k.view(-1, dim))
    return qn.view_as(q), kn.view_as(k)


NORMALIZERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "compiled": normalize_compiled,
    "eager": normalize_pair,
}
NORMS = ("compiled", "none", "eager")
"""How q and k are normalised: in front of a peer (compiled, eager), or beforehand, outside the timing (none). Our own
function, and any other that `normalises`, does it inside its call instead: "fused"."""
