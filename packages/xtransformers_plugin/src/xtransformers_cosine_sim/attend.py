"""The hook: an `Attend` that overrides forward and nothing else, and what a layer remembers beside it."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

from flash_cosine_sim_attention import PositionBias, l2norm_tensors
from torch import Tensor
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import Attention

from . import positions
from .arguments import fused_attention
from .counters import Tally
from .errors import Refusal, UnsupportedCallError
from .intermediates import FusedIntermediates
from .options import Call, Mode, first_refused


@dataclass
class Layer:
    """How one attention layer runs. Set by `enable` as `attend.cosine_sim`: no parameter, not in the state_dict."""

    path: str
    mode: Mode
    strict: bool
    scale: float | Tensor | None  # convert mode; accelerate reads attend.scale at every call
    groups: int
    bounded: bool  # |q|, |k| per group is at most 1, so that |logit| <= |scale| * groups
    fuses_norm: bool  # accelerate mode: the model's own norm is switched off, the pass normalises
    backend: str | None
    stock_reason: str | None = None  # set: `enable` was refused and falls back
    tally: Tally = field(default_factory=Tally)


_FORWARD_NAMES = tuple(inspect.signature(Attention.forward).parameters)[1:]

_site = threading.local()
"""`reason` for stock, of the Attention.forward that is under way in this thread, for the `Attend.forward` inside it."""


class CosineSimAttend(Attend):
    """`Attend` with the fused pass. Instances are made by `enable`, by setting `__class__`."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, attn_bias: Tensor | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, Intermediates]:  # fmt: skip
        """q (b, h, i, d), k (b, kvh, j, d), v (b, kvh, j, dv) -> (b, h, i, dv) and intermediates without maps."""
        layer: Layer = self.cosine_sim
        relative = positions.take()
        if layer.stock_reason is not None:
            layer.tally.count(self, layer.stock_reason)
            return super().forward(q, k, v, mask=mask, attn_bias=attn_bias, **keywords)

        refused = first_refused("call", Call(self, keywords), layer.mode)
        reason = _take_site_reason() if refused is None else f"{refused.option}: {refused.reason}"
        if reason is not None and layer.strict:
            option, _, why = reason.partition(": ")
            raise UnsupportedCallError(Refusal(layer.path, option, why))
        layer.tally.count(self, reason)
        if reason is not None:
            q, k = _as_qk_norm(q, k, layer, self.scale)
            attn_bias = attn_bias if relative is None else relative(q.shape[-2], k.shape[-2])
            return super().forward(q, k, v, mask=mask, attn_bias=attn_bias, **keywords)

        causal = keywords.get("causal")
        causal = self.causal if causal is None else causal
        out = fused_attention(
            q, k, v, mask, attn_bias if relative is None else _bias_of(relative, q, k, mask),
            causal=bool(causal),  # aligned right, so that one query sees every key, as stock has it
            scale=_default_scale(self.scale if layer.mode == "accelerate" else layer.scale, q),
            groups=layer.groups,
            l2norm_qk=layer.mode == "convert" or layer.fuses_norm,
            bounded=layer.bounded,
            add_zero_kv=self.add_zero_kv,
            backend=layer.backend,
        )  # fmt: skip
        return out, FusedIntermediates(layer.path)


def _bias_of(relative: Any, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | PositionBias:
    if positions.is_over_keys(mask) and q.shape[-2] <= k.shape[-2]:
        return positions.descriptor(relative, k.shape[-2])
    return relative(q.shape[-2], k.shape[-2])


def _default_scale(scale: float | Tensor | None, q: Tensor) -> float | Tensor:
    if isinstance(scale, Tensor):
        return scale
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _as_qk_norm(q: Tensor, k: Tensor, layer: Layer, stock_scale: float | None) -> tuple[Tensor, Tensor]:
    """Convert mode on the stock path stays the same function: unit q and k, and the scale that stock does not know."""
    if layer.mode == "accelerate":
        return q, k
    q, k = l2norm_tensors(q, k, groups=layer.groups)
    scale = _default_scale(layer.scale, q)
    scale = scale.reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale
    return (q * (scale / _default_scale(stock_scale, q))).to(q.dtype), k


def check_site(
    attention: Attention, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of an enabled Attention: what changes q, k after their norm is not to be seen in `Attend`.

    A relative position bias is taken out of the arguments where `Attend` can do without its tensor (positions.py).
    """
    positions.keep(None)
    layer: Layer | None = vars(attention.attend).get("cosine_sim")
    if layer is None:
        return None
    if layer.stock_reason is not None:
        if not isinstance(attention.attend, CosineSimAttend):
            layer.tally.count(attention.attend, layer.stock_reason)
        return None
    given = dict(zip(_FORWARD_NAMES, args, strict=False)) | keywords
    row = first_refused("site", given, layer.mode)
    if row is not None and (layer.strict or row.verdict(layer.mode) == "always"):
        raise UnsupportedCallError(Refusal(layer.path, row.option, row.reason))
    _site.reason = None if row is None else f"{row.option}: {row.reason}"
    if row is not None or "rel_pos" not in keywords or not positions.takes_out(attention, given):
        return None
    positions.keep(keywords["rel_pos"])
    return args, keywords | {"rel_pos": None}


def _take_site_reason() -> str | None:
    reason = getattr(_site, "reason", None)
    _site.reason = None
    return reason
