"""Who is timed: our own function and its peers, one small class each, and the ways to normalise in front of a peer.

A baseline makes, for one case, a function (q, k, v) -> out on tensors in its own layout. What it cannot do it says
(`Unsupported`), so that the tables can show it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from flash_cosine_sim_attention import PositionBias, flash_cosine_sim_attention
from inputs import TORCH_DTYPES, CaseInputs
from normalizing import NORMALIZERS, compiled_once
from presets import Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
HALF, ALL = ("fp16", "bf16"), ("fp16", "bf16", "fp32")


class Unsupported(Exception):
    """This baseline does not serve this case, or is not installed."""


class Baseline:
    """One implementation of attention. layout: bhnd, or bnhd for those that want (batch, seq_len, heads, dim)."""

    layout = "bhnd"
    normalises = False

    biases = False
    positions = False

    def __init__(self, name: str, dtypes: tuple[str, ...] = HALF, masks: bool = False) -> None:
        self.name, self.dtypes, self.masks = name, dtypes, masks

    def check(self, case: Case) -> None:
        """Unsupported, with the reason, for what is known not to work; nothing is run."""
        if case.dtype not in self.dtypes:
            raise Unsupported(f"no {case.dtype}, only {', '.join(self.dtypes)}")
        if case.mask_prob and not self.masks:
            raise Unsupported("no key mask")
        if case.bias and not self.biases:
            raise Unsupported("no bias")
        if case.position and (not self.positions or case.mask_prob or case.bias):
            raise Unsupported("no bias by relative position, or not beside a mask or another bias")
        if case.bias and case.mask_prob and not self.normalises:
            raise Unsupported("bias and mask together are not compared")

    def context(self) -> AbstractContextManager[Any]:
        """Inside it the function of `make` is called."""
        return nullcontext()

    def make(self, inputs: CaseInputs, scale: float) -> Attention:
        raise NotImplementedError


class Ours(Baseline):
    """flash_cosine_sim_attention, the norm inside its one call; backend: force one of its paths."""

    normalises, biases, positions = True, True, True

    def __init__(self, name: str, backend: str | None = None) -> None:
        super().__init__(name, ALL, masks=True)
        self.backend = backend

    def bias(self, inputs: CaseInputs) -> Tensor | PositionBias | None:
        position = inputs.position_bias()
        return inputs.bias() if position is None else position

    def make(self, inputs: CaseInputs, scale: float, l2norm_qk: bool = True) -> Attention:
        options: dict[str, Any] = {"mask": inputs.key_mask(), "causal": inputs.case.causal, "scale": scale}
        options |= {"l2norm_qk": l2norm_qk, "backend": self.backend}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flash_cosine_sim_attention(q, k, v, attn_bias=self.bias(inputs), **options)
            assert isinstance(out, Tensor)
            return out

        return attend


class OursDense(Ours):
    """Ours with the (heads, n, n) tensor of a bias by relative position, made of its parameters in every call."""

    def bias(self, inputs: CaseInputs) -> Tensor | None:
        bias, n = inputs.position_bias(), inputs.case.seq_len
        return inputs.bias() if bias is None else bias.materialize(n, n, TORCH_DTYPES[inputs.case.dtype])


class Sdpa(Baseline):
    """One backend of torch's scaled_dot_product_attention."""

    biases = True

    def __init__(self, name: str, backend: SDPBackend, dtypes: tuple[str, ...] = HALF, masks: bool = False) -> None:
        super().__init__(name, dtypes, masks)
        self.backend = backend

    def context(self) -> AbstractContextManager[Any]:
        return sdpa_kernel(self.backend)

    def make(self, inputs: CaseInputs, scale: float) -> Attention:
        mask, causal, bias, case = inputs.key_mask(), inputs.case.causal, inputs.bias(), inputs.case
        if bias is not None:
            if causal or bias.dtype != TORCH_DTYPES[case.dtype]:
                raise Unsupported("a bias of another dtype, or a causal one")
            sizes = (case.batch, case.heads, case.seq_len, case.seq_len)
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(sizes), scale=scale)
        if mask is None:
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        visible = mask[:, None, None, :]
        if causal:  # torch takes either a mask or is_causal
            visible = visible & inputs.causal_mask()
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


@cache
def import_failure(module: str) -> str | None:
    """Why `module` cannot be imported, None if it can; tried once."""
    try:
        importlib.import_module(module)
    except Exception as error:  # what a broken installation raises is not foreseeable
        return f"cannot import {module}: {type(error).__name__}: {error}"
    return None


class Flash(Baseline):
    """A flash-attention package with (q, k, v, softmax_scale=, causal=) in bnhd."""

    layout = "bnhd"

    def __init__(self, name: str, module: str) -> None:
        super().__init__(name)
        self.module = module

    def check(self, case: Case) -> None:
        super().check(case)
        reason = import_failure(self.module)
        if reason is not None:
            raise Unsupported(reason)

    def make(self, inputs: CaseInputs, scale: float) -> Attention:
        function, causal = importlib.import_module(self.module).flash_attn_func, inputs.case.causal

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            returned = function(q, k, v, softmax_scale=scale, causal=causal)
            return returned[0] if isinstance(returned, tuple) else returned

        return attend


def flex_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, block_mask: Any, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    own = [size != 1 for size in bias.shape]

    def add(score: Tensor, *index: Tensor) -> Tensor:
        return score + bias[tuple(i if has else 0 for i, has in zip(index, own, strict=True))]

    return flex_attention(q, k, v, score_mod=add, block_mask=block_mask, scale=scale)


def flex_with_position(
    q: Tensor, k: Tensor, v: Tensor, parameters: Tensor, position: str, block_mask: Any, scale: float
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    last = q.shape[2] - 1

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - parameters[h] * (j - i).abs()

    def table(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + parameters[h, last + j - i]

    score_mod = alibi if position == "alibi" else table
    return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale)


class Flex(Baseline):
    """Compiled FlexAttention; its block mask is made beforehand and not timed. A bias is captured by its score_mod."""

    biases, positions = True, True

    def __init__(self, name: str) -> None:
        super().__init__(name, ALL, masks=True)

    def make(self, inputs: CaseInputs, scale: float) -> Attention:
        from torch.nn.attention.flex_attention import flex_attention

        block_mask, bias, parameters = inputs.block_mask(), inputs.bias(), inputs.position_parameters()
        if parameters is not None:
            with_position, position = compiled_once(flex_with_position), inputs.case.position
            return lambda q, k, v: with_position(q, k, v, parameters, position, block_mask, scale)
        if bias is not None:
            with_bias = compiled_once(flex_with_bias)
            return lambda q, k, v: with_bias(q, k, v, bias, block_mask, scale)
        compiled = compiled_once(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=block_mask, scale=scale)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hidden: Tensor | None, scale: float
) -> Tensor:
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
    return scores.softmax(dim=-1) @ v


def plain_with_position(
    q: Tensor, k: Tensor, v: Tensor, position: PositionBias, hidden: Tensor | None, scale: float
) -> Tensor:
    return plain_attention(q, k, v, position.materialize(q.shape[2], k.shape[2]), hidden, scale)


class Plain(Baseline):
    """Attention as one writes it: the n x n matrix in memory, in the dtype of the inputs."""

    biases, positions = True, True

    def __init__(self, name: str, compiled: bool = False) -> None:
        super().__init__(name, ALL, masks=True)
        self.compiled = compiled

    def make(self, inputs: CaseInputs, scale: float) -> Attention:
        hidden, bias, position = inputs.hidden(), inputs.bias(), inputs.position_bias()
        attend = compiled_once(plain_attention) if self.compiled else plain_attention
        if position is None:
            return lambda q, k, v: attend(q, k, v, bias, hidden, scale)
        with_position = compiled_once(plain_with_position) if self.compiled else plain_with_position
        return lambda q, k, v: with_position(q, k, v, position, hidden, scale)


class Cuequivariance(Baseline):
    """NVIDIA's triangle attention: a pair bias in float32, shared by all batch rows."""

    biases = True

    def __init__(self, name: str) -> None:
        super().__init__(name, ALL)

    def check(self, case: Case) -> None:
        super().check(case)
        if case.bias not in ("hij", "hijf") or case.causal:
            raise Unsupported("only a bias (heads, n, n), not causal")
        reason = import_failure("cuequivariance_ops_torch")
        if reason is not None:
            raise Unsupported(reason)

    def make(self, inputs: CaseInputs, scale: float) -> Attention:
        function = importlib.import_module("cuequivariance_ops_torch").triangle_attention
        bias = inputs.bias()
        assert bias is not None
        return lambda q, k, v: function(q[None], k[None], v[None], bias[None].float(), scale=scale)[0]


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Ours("ours"),
        Ours("ours:sm80", "sm80"),
        Ours("ours:sm90", "sm90"),
        Ours("ours:chunked", "chunked"),
        OursDense("ours:dense"),
        Sdpa("fa2", SDPBackend.FLASH_ATTENTION),
        Sdpa("cudnn", SDPBackend.CUDNN_ATTENTION, masks=True),
        Sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION, ALL, masks=True),
        Flash("fa3", "flash_attn_interface"),
        Flash("fa4", "flash_attn.cute"),
        Flex("flex"),
        Plain("plain"),
        Plain("compiled", compiled=True),
        Cuequivariance("cueq"),
    )
}


def norms_for(baseline: Baseline, norms: tuple[str, ...]) -> tuple[str, ...]:
    if not baseline.normalises:
        return norms
    inside = ("fused",) if set(norms) - {"none"} else ()
    return (*inside, "none") if "none" in norms else inside


def attention_with_norm(baseline: Baseline, norm: str, inputs: CaseInputs, scale: float) -> Attention:
    """(q, k, v) in the baseline's layout -> out, the normalisation that is to be timed included."""
    if isinstance(baseline, Ours):
        return baseline.make(inputs, scale, l2norm_qk=norm == "fused")
    attend = baseline.make(inputs, scale)
    if norm in ("none", "fused"):
        return attend
    normalize = NORMALIZERS[norm]
    return lambda q, k, v: attend(*normalize(q, k), v)
