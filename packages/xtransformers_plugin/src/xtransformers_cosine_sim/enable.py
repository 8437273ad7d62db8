"""enable, disable and the context manager: check every layer, then change all of them or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real

import torch
from torch import Tensor, nn
from x_transformers.attend import Attend
from x_transformers.x_transformers import Attention, AttentionLayers

from .attend import CosineSimAttend, Layer, check_site
from .counters import COMPILED_CALLS, enabled_layers
from .errors import Refusal, UnsupportedLayerError
from .options import Mode, detail, rows_in_use

LayerFilter = str | Iterable[str] | Callable[[str, Attention], bool] | None


def enable(
    model: nn.Module,
    *,
    mode: Mode = "accelerate",
    scale: float | Tensor | None = None,
    groups: int | None = None,
    strict: bool = True,
    fuse_norm: bool = True,
    layers: LayerFilter = None,
    backend: str | None = None,
) -> tuple[str, ...]:
    """Switch the attention layers of `model` to fused cosine-sim attention, all or none.

    Args:
        model: any module with x_transformers Attention inside, or one such Attention.
        mode: "accelerate": the model has attn_qk_norm=True and keeps its function. "convert": a regular model becomes
            the qk-norm model of the same weights; its state_dict keeps its keys.
        scale, groups: convert mode only, scale is required there; the bound of the logits is scale * groups.
            A tensor of one value or one per head is a learned scale: a parameter that you register with the model.
            In accelerate mode both come from the model.
        strict: raise for every layer and every call that is not served. False: leave a refused layer as it is, run a
            refused call on the stock path (of the same function), and count both.
        fuse_norm: accelerate mode: let the pass normalise instead of the model, where that is the same function and
            nothing can fall back to stock (strict). Until `disable`, kv caches hold keys before their norm.
        layers: which layers: glob pattern(s) of their paths, or a predicate (path, attention); all by default.
        backend: passed to flash_cosine_sim_attention.

    Returns:
        The paths of the layers that will run fused.

    Raises:
        UnsupportedLayerError: strict, and the table in options.py refuses something; lists layer, option and reason.
        ValueError, TypeError: no layer found, already enabled, or arguments that do not fit the mode.
    """
    check_arguments(mode, scale, groups)
    chosen = _choose(model, layers)
    options = (mode, scale, groups, strict, fuse_norm, backend)
    built = {path: _build(model, path, attention, *options) for path, attention in chosen}
    refusals = [refusal for _, found in built.values() for refusal in found]
    if strict and refusals:
        raise UnsupportedLayerError(refusals)
    for path, attention in chosen:
        _swap(attention, built[path][0])
    return tuple(path for path, (layer, _) in built.items() if layer.stock_reason is None)


def disable(model: nn.Module) -> tuple[str, ...]:
    """Put every enabled layer of `model` back to stock; a model without any is left alone. Returns their paths."""
    paths = tuple(enabled_layers(model))
    for path in paths:
        _restore(model.get_submodule(path))
    return paths


@contextmanager
def enabled(model: nn.Module, **options: object) -> Iterator[nn.Module]:
    """`enable(model, **options)` for a with block: the layers it took are stock again at its end."""
    before = set(enabled_layers(model))
    enable(model, **options)  # type: ignore[arg-type]
    taken = [path for path in enabled_layers(model) if path not in before]
    try:
        yield model
    finally:
        for path in taken:
            _restore(model.get_submodule(path))


def check_arguments(mode: str, scale: float | Tensor | None, groups: int | None) -> None:
    """What `enable` takes for each mode."""
    if mode not in ("accelerate", "convert"):
        raise ValueError(f"mode: expected 'accelerate' or 'convert', got {mode!r}")
    if mode == "accelerate":
        if scale is not None or groups is not None:
            raise TypeError("scale, groups: accelerate takes both from the model; they belong to mode='convert'")
        return
    if scale is None:
        raise TypeError("scale: mode='convert' needs it, say scale=10 (the bound of the logits is scale * groups)")
    if isinstance(scale, Tensor):
        if not scale.is_floating_point():
            raise TypeError(f"scale: expected a tensor of a floating dtype, got {scale.dtype}")
    elif isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise TypeError(f"scale: expected a finite number, got {scale!r}")
    if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int) or groups < 1):
        raise TypeError(f"groups: expected a positive int, got {groups!r}")


def _choose(model: nn.Module, layers: LayerFilter) -> list[tuple[str, Attention]]:
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Attention)]
    if not found:
        raise ValueError(f"model: expected x_transformers Attention layers, found none in {type(model).__name__}")
    chosen = [(path, attention) for path, attention in found if _matches(layers, path, attention)]
    if not chosen:
        raise ValueError(f"layers: {layers!r} matches none of {', '.join(path for path, _ in found)}")
    taken = [path for path, attention in chosen if "cosine_sim" in vars(attention.attend)]
    if taken:
        raise ValueError(f"already enabled, call disable(model) first: {', '.join(taken)}")
    return chosen


def _matches(layers: LayerFilter, path: str, attention: Attention) -> bool:
    if layers is None:
        return True
    if callable(layers):
        return bool(layers(path, attention))
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _build(
    model: nn.Module, path: str, attention: Attention, mode: Mode, scale: float | Tensor | None, groups: int | None,
    strict: bool, fuse_norm: bool, backend: str | None,
) -> tuple[Layer, list[Refusal]]:  # fmt: skip
    """The layer's new state and what speaks against it. Reads only."""
    verdicts = _judge(model, path, attention, mode)
    refusals = [verdict.refusal for verdict in verdicts if not verdict.unbounded]
    if mode == "convert":
        refusals += _check_groups(model, path, attention, groups or 1)
        if isinstance(scale, Tensor) and scale.numel() not in (1, attention.heads):
            expected = f"expected one value or one per head, {attention.heads}"
            refusals.append(Refusal(path, "scale", f"{expected}, got shape {tuple(scale.shape)}"))
    bounded = not any(verdict.unbounded for verdict in verdicts)
    layer = Layer(
        path=path,
        mode=mode,
        strict=strict,
        scale=scale if scale is None or isinstance(scale, Tensor) else float(scale),
        groups=attention.qk_norm_groups if mode == "accelerate" else groups or 1,
        bounded=bounded,
        fuses_norm=mode == "accelerate" and fuse_norm and strict and bounded and _commutes_with_rotation(attention),
        backend=backend,
        stock_reason="; ".join(f"{refusal.option}: {refusal.reason}" for refusal in refusals) or None,
    )
    return layer, refusals


@dataclass(frozen=True)
class _Finding:
    refusal: Refusal
    unbounded: bool


def _judge(model: nn.Module, path: str, attention: Attention, mode: Mode) -> list[_Finding]:
    findings = []
    rows = list(rows_in_use("layer", attention))
    for stack in _stacks_around(model, attention):
        rows += rows_in_use("stack", stack)
    for row in rows:
        verdict = row.verdict(mode)
        if verdict != "served":
            refusal = Refusal(path, row.option, detail(row, attention))
            findings.append(_Finding(refusal, unbounded=verdict == "unbounded"))
    return findings


def _stacks_around(model: nn.Module, attention: Attention) -> list[AttentionLayers]:
    stacks = (module for module in model.modules() if isinstance(module, AttentionLayers))
    return [stack for stack in stacks if any(module is attention for module in stack.modules())]


def _check_groups(model: nn.Module, path: str, attention: Attention, groups: int) -> list[Refusal]:
    """Rotations turn pairs of neighbouring channels, which must not straddle a group that is normalised after them."""
    dim_head = round(attention.scale**-2)
    if dim_head % groups:
        return [Refusal(path, "groups", f"expected a divisor of the head dim {dim_head}, got {groups}")]
    rotary = any(stack.rotary_pos_emb is not None for stack in _stacks_around(model, attention))
    if rotary and groups > 1 and (dim_head // groups) % 2:
        return [Refusal(path, "groups", f"rotary_pos_emb needs an even group size, got {dim_head} / {groups}")]
    return []


def _commutes_with_rotation(attention: Attention) -> bool:
    """Whether a norm over each group may come after a rotation of pairs of neighbouring channels, and not before it."""
    group = round(attention.scale**-2) // attention.qk_norm_groups
    return attention.qk_norm_groups == 1 or group % 2 == 0


def _swap(attention: Attention, layer: Layer) -> None:
    attend = attention.attend
    if type(attend) is Attend:  # another class was refused: it stays what it is, and check_site counts
        attend.__class__ = CosineSimAttend
    attend.cosine_sim = layer
    if layer.fuses_norm:
        attention.qk_norm = False  # read in Attention.forward alone
    device = next(attention.parameters()).device
    attend.register_buffer(COMPILED_CALLS, torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
    attention.register_forward_pre_hook(check_site, with_kwargs=True)


def _restore(attention: Attention) -> None:
    attend = attention.attend
    if type(attend) is CosineSimAttend:
        attend.__class__ = Attend
    if attend.cosine_sim.fuses_norm:
        attention.qk_norm = True
    del attend.cosine_sim
    delattr(attend, COMPILED_CALLS)
    for key, hook in list(attention._forward_pre_hooks.items()):  # by function: handles do not survive a deepcopy
        if hook is check_site:
            del attention._forward_pre_hooks[key]
            attention._forward_pre_hooks_with_kwargs.pop(key, None)
