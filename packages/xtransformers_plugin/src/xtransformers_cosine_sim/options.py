"""The one table of what is served, refused or left stock. The checks, the README and the tests read it.

accelerate: the model has `attn_qk_norm=True` already, the fused pass computes the same function.
convert:    the model is a regular one, the pass normalises; it becomes the qk-norm model of the same weights.

Verdicts:
    served      by the fused pass, with the bound scale * groups where no bias is given
    unbounded   by the fused pass with a running maximum: q and k have no known norm
    refused     strict raises; fallback leaves the layer or the call on the stock path and counts it
    always      raises in fallback too: stock would compute another function than this model
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from x_transformers.attend import Attend
from x_transformers.x_transformers import Attention

from . import seam

Mode = Literal["accelerate", "convert"]
Verdict = Literal["served", "unbounded", "refused", "always"]
Where = Literal["layer", "stack", "call", "site"]


@dataclass(frozen=True)
class Row:
    """One option. `applies` is None for what is always served; else it tells whether the option is in use.

    Its argument depends on `where`: layer: the Attention; stack: the AttentionLayers around it; call: `Call`;
    site: the keywords of Attention.forward.
    """

    option: str
    accelerate: Verdict
    convert: Verdict
    reason: str
    where: Where = "layer"
    applies: Callable[[Any], bool] | None = None

    def verdict(self, mode: Mode) -> Verdict:
        return self.accelerate if mode == "accelerate" else self.convert


@dataclass(frozen=True)
class Call:
    """One call of `Attend.forward`: the module and the keywords beside mask and attn_bias."""

    attend: Attend
    keywords: Mapping[str, Any]


def _served(option: str, reason: str = "", where: Where = "layer") -> Row:
    return Row(option, "served", "served", reason, where)


def _refused(option: str, reason: str, applies: Callable[[Any], bool], where: Where = "layer") -> Row:
    return Row(option, "refused", "refused", reason, where, applies)


def _switch(option: str, attribute: str, reason: str) -> Row:
    """An option that `Attend` keeps under `attribute`, as a boolean or as a module."""
    return _refused(option, reason, lambda m: _is_on(getattr(m.attend, attribute, None)))


def _is_on(value: object) -> bool:
    return value is not None and value is not False


def _is_not_softmax_over_keys(attention: Attention) -> bool:
    """The other functions leave no boolean behind: `attn_fn` itself is what tells them apart."""
    attn_fn = getattr(attention.attend, "attn_fn", None)
    if not isinstance(attn_fn, partial) or attn_fn.func is not F.softmax or attn_fn.args:
        return True
    keywords = dict(attn_fn.keywords)
    return keywords.pop("dim", None) != -1 or keywords.pop("dtype", None) not in (None, torch.float32) or bool(keywords)


def _has_unknown_scale(attention: Attention) -> bool:
    scale = getattr(attention.attend, "scale", None)
    return not (scale is None or isinstance(scale, Real))


def _dropout_is_active(call: Call) -> bool:
    attend = call.attend
    return (attend.training and attend.dropout > 0) or (attend.attn_dropout.training and attend.attn_dropout.p > 0)


def _has_unknown_keyword(call: Call) -> bool:
    return any(name not in seam.FORWARD_KEYWORDS and value is not None for name, value in call.keywords.items())


def _has_xpos_scale(keywords: Mapping[str, Any]) -> bool:
    pairs = (keywords.get("rotary_pos_emb"), keywords.get("context_rotary_pos_emb"))
    return any(pair is not None and isinstance(pair[1], torch.Tensor) for pair in pairs)


def _has_rmsnorm(attention: Attention) -> bool:
    return _is_on(attention.q_rmsnorm) or _is_on(attention.k_rmsnorm)


TABLE: tuple[Row, ...] = (
    # the mode itself
    Row("attn_qk_norm=True", "served", "refused", "q, k are normalised already: use mode='accelerate'",
        applies=lambda m: bool(m.qk_norm)),
    Row("attn_qk_norm=False", "refused", "served", "nothing to accelerate: use mode='convert' with a scale",
        applies=lambda m: not m.qk_norm),
    # norm and scale
    _served("attn_qk_norm_scale", "taken from the model; in convert mode from enable(scale=)"),
    _served("attn_qk_norm_groups", "taken from the model; in convert mode from enable(groups=)"),
    Row("attn_qk_norm_scale before x-transformers 2.26", "unbounded", "served",
        "q and k arrive with a factor of the scale each",
        applies=lambda m: bool(m.qk_norm) and not seam.queries_arrive_unit()),
    Row("attn_qk_norm_dim_scale", "unbounded", "refused", "a learned factor per channel changes the norm",
        applies=lambda m: bool(m.qk_norm and m.qk_norm_dim_scale)),
    Row("attn_qk_rmsnorm | attn_k_rmsnorm", "unbounded", "refused", "the rms norm would be lost in the l2 norm",
        applies=_has_rmsnorm),
    _refused("attend.scale", "expected a number or None: it is the bound",
             _has_unknown_scale),
    # heads, keys and values
    _served("attn_kv_heads", "x-transformers tiles kv heads: views put them into the grouped order"),
    _served("attn_one_kv_head"),
    _served("attn_value_dim_head"),
    _served("attn_num_mem_kv"),
    _served("attn_add_zero_kv", "a key and value of zeros are padded on the left"),
    _served("attn_gate_values | attn_gate_value_heads | attn_head_scale | attn_on_attn"),
    _served("attn_value_rmsnorm | attn_laser"),
    _served("attn_use_latent_q | attn_use_latent_kv"),
    _served("add_value_residual"),
    # positions
    _served("rotary_pos_emb", "rotations keep norms"),
    _served("alibi_pos_bias", "from its slopes: no (h, i, j) tensor, unless a pair mask or memory keys join in"),
    _served("rel_pos_bias", "T5, from its buckets in the same way, with gradients"),
    _served("dynamic_pos_bias", "from its table of distances in the same way, with gradients"),
    _served("attn_data_dependent_alibi", "with gradients"),
    _refused("rotary_xpos", "q, k are stretched with their position: no bound, and lost in a norm after it",
             lambda stack: stack.rotary_pos_emb is not None and stack.rotary_pos_emb.scale is not None, "stack"),
    _refused("polar_pos_emb", "q, k become magnitudes and phases: no unit norm",
             lambda stack: _is_on(getattr(stack, "polar_pos_emb", None)), "stack"),
    # masks
    _served("mask", "over keys, together with causal too", "call"),
    _served("attn_mask", "over (query, key) pairs: served as a bias of 0 and -inf", "call"),
    _served("row_mask", "arrives with every mask; only inverted attention reads it", "call"),
    _served("attn_max_attend_past", "as attn_mask"),
    _served("causal", "per call too, where stock flash ignores it; aligned right; off for one query", "call"),
    # length
    _served("cross_attend"),
    _served("cache", "cached generation", "call"),
    _served("mems", "XL memories", "call"),
    _served("attn_flash", "only says which stock path is replaced"),
    _served("pre_norm | sandwich_norm | pre_and_post_norm", "every norm placement"),
    # another function of the logits
    _refused("attn_sigmoid | attn_hard | attn_sparse_topk | attn_gumbel_softmax | attn_custom_attn_fn",
             "expected F.softmax over keys as attend.attn_fn", _is_not_softmax_over_keys),
    _switch("cross_attn_inverted_attention", "inverted_attention", "softmax over queries"),
    _switch("attn_pre_talking_heads", "pre_softmax_talking_heads", "heads are mixed before the softmax"),
    _switch("attn_post_talking_heads", "post_softmax_talking_heads", "heads are mixed after the softmax"),
    _switch("attn_pre_scale_post_talking_heads", "pre_scale_post_talking_heads", "heads are mixed before the softmax"),
    _switch("attn_selective", "selective", "logits depend on other logits"),
    _switch("attn_cog_signed", "cog_signed", "softmax of absolute logits"),
    _switch("attn_l2_distance", "l2_distance", "logits are distances"),
    _switch("attn_head_learned_sink", "head_learned_sink", "an extra logit per head"),
    _switch("attn_softclamp_logits", "softclamp_logits", "logits go through tanh"),
    _switch("attn_use_cope", "cope", "positions depend on logits"),
    _switch("attn_flash_pack_seq", "flash_pack_seq", "packed sequences"),
    _refused("residual_attn | cross_residual_attn", "logits of the layer before are added",
             lambda stack: bool(stack.residual_attn or stack.cross_residual_attn), "stack"),
    # unknown to this plugin: closed until it is taught
    _refused("a subclass of Attend", "expected x_transformers.attend.Attend itself",
             lambda m: type(m.attend) is not Attend),
    _refused("an unknown attribute of Attend", "expected only attributes of the versions that were read",
             lambda m: bool(seam.unknown_attributes(m.attend))),
    # per call
    _refused("attn_dropout", "active dropout of attention weights", _dropout_is_active, "call"),
    _refused("prev_attn", "logits are added", lambda call: call.keywords.get("prev_attn") is not None, "call"),
    _refused("attn_delta", "weights are added", lambda call: call.keywords.get("attn_delta") is not None, "call"),
    _refused("flash_pack_seq_kwargs", "packed sequences",
             lambda call: call.keywords.get("flash_pack_seq_kwargs") is not None, "call"),
    _refused("an unknown keyword", "expected only keywords of the versions that were read",
             _has_unknown_keyword, "call"),
    Row("rotary_pos_emb with an xpos scale", "refused", "always", "as rotary_xpos", "site", _has_xpos_scale),
    Row("polar_pos_emb=", "refused", "always", "as polar_pos_emb", "site",
        lambda keywords: keywords.get("polar_pos_emb") is not None),
    Row("additional_key_values", "refused", "always", "keys from outside have no known norm", "site",
        lambda keywords: keywords.get("additional_key_values") is not None),
)  # fmt: skip

ATTENTION_MAPS = "return_attn | return_attn_z_loss | attn_qk_clip_"
"""Not a row that can be checked before: whoever reads a map of a fused layer gets AttentionMapsError."""

_ROWS: dict[Where, tuple[Row, ...]] = {
    where: tuple(row for row in TABLE if row.where == where and row.applies is not None)
    for where in ("layer", "stack", "call", "site")
}


def rows_in_use(where: Where, subject: Any) -> Iterator[Row]:
    """The rows of one kind whose option `subject` uses (see `Row.applies`)."""
    return (row for row in _ROWS[where] if row.applies is not None and row.applies(subject))


def first_refused(where: Where, subject: Any, mode: Mode) -> Row | None:
    """The first row that speaks against the fused pass; a plain loop, since torch.compile traces it."""
    for row in _ROWS[where]:
        if row.applies is not None and row.applies(subject) and row.verdict(mode) in ("refused", "always"):
            return row
    return None


def detail(row: Row, attention: Attention) -> str:
    """The reason, with what was found where the row stands for several things."""
    attend = attention.attend
    if "attn_fn" in row.reason:
        return f"{row.reason}, got {_describe(getattr(attend, 'attn_fn', None))}"
    if "unknown attribute" in row.option:
        return f"{row.reason}, got {', '.join(sorted(seam.unknown_attributes(attend)))}"
    if "subclass" in row.option:
        return f"{row.reason}, got {type(attend).__module__}.{type(attend).__qualname__}"
    return row.reason


def _describe(attn_fn: Any) -> str:
    if isinstance(attn_fn, partial):
        keywords = "".join(f", {name}={value}" for name, value in attn_fn.keywords.items())
        return f"partial({_describe(attn_fn.func)}{keywords})"
    return getattr(attn_fn, "__name__", repr(attn_fn))


def table_markdown() -> str:
    """The table as it stands in the README."""
    lines = ["| option | accelerate | convert | |", "|---|---|---|---|"]
    for row in TABLE:
        names = " ".join(f"`{name}`" for name in row.option.split(" | "))
        lines.append(f"| {names} | {row.accelerate} | {row.convert} | {row.reason} |")
    names = " ".join(f"`{name}`" for name in ATTENTION_MAPS.split(" | "))
    lines.append(f"| {names} | named error | named error | a fused pass makes no attention maps |")
    return "\n".join(lines)
