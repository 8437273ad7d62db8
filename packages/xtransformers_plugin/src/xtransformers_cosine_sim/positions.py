"""x-transformers' relative position biases without their (h, i, j) tensor: ALiBi, T5, dynamic.

`Attention.forward` would make that tensor before it calls `Attend`. Where nothing else joins the bias, the module is
taken out of its arguments and kept for the `Attend.forward` inside, which hands its O(n) or O(heads) parameters to
`flash_cosine_sim_attention`: the same bias, with the same gradients.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from flash_cosine_sim_attention import AlibiBias, PositionBias, RelativeBias, T5Bias
from torch import Tensor
from torch.nn.functional import pad
from x_transformers.x_transformers import (
    AlibiPositionalBias,
    Attention,
    DynamicPositionBias,
    RelativePositionBias,
)

SERVED = (AlibiPositionalBias, RelativePositionBias, DynamicPositionBias)

_under_way = threading.local()
"""`module`: taken out of the arguments of the Attention.forward that is under way in this thread."""


def takes_out(attention: Attention, given: Mapping[str, Any]) -> bool:
    """Whether the module in `rel_pos` is all that the layer's bias is made of: no other bias, pair mask or key."""
    if type(given.get("rel_pos")) not in SERVED:
        return False
    others = ("attn_bias", "attn_mask", "pos", "additional_key_values")
    biases = ("data_dependent_alibi", "rel_proj_pos_bias", "max_attend_past")
    return (
        all(given.get(name) is None for name in others)
        and all(getattr(attention, name, None) is None for name in biases)
        and attention.num_mem_kv == 0
        and not attention.attend.add_zero_kv
    )


def keep(module: Any) -> None:
    _under_way.module = module


def take() -> Any:
    """What was kept, once; None if nothing was."""
    module = getattr(_under_way, "module", None)
    _under_way.module = None
    return module


def descriptor(module: Any, num_keys: int) -> PositionBias:
    """The bias that module(i, num_keys) is, for i <= num_keys; module: one of SERVED."""
    if isinstance(module, AlibiPositionalBias):
        slopes = module.slopes.flatten()
        return AlibiBias(pad(slopes, (0, module.total_heads - slopes.shape[0])))
    if isinstance(module, RelativePositionBias):
        weight = module.relative_attention_bias.weight * module.scale
        return T5Bias(weight, bidirectional=not module.causal, max_distance=module.max_distance)
    distances = torch.arange(-num_keys + 1, num_keys, device=module.device).float().unsqueeze(-1)
    if module.log_distance:
        distances = distances.sign() * torch.log(distances.abs() + 1)
    values = distances
    for layer in module.mlp:
        values = layer(values)
    return RelativeBias(values.t().flip(-1))  # its distances are query - key


def is_over_keys(mask: Tensor | None) -> bool:
    """Whether a mask, broadcastable to (b, h, i, j), tells neither heads nor queries apart."""
    return mask is None or mask.ndim < 3 or mask.shape[-3:-1] == (1, 1)


def by_kv_head(bias: PositionBias, kv_heads: int, nq: int, nk: int) -> RelativeBias:
    """Heads (r, kvh) -> (kvh, r): the batch dim of kv heads and the query heads that read one (see arguments.py)."""
    n = max(nq, nk)
    table = bias.diagonals(n, n)
    if table.shape[0] == 1:
        return RelativeBias(table.unsqueeze(0))
    return RelativeBias(table.unflatten(0, (-1, kv_heads)).transpose(0, 1))
