"""The tensors of one case, made once on the device and shared by all that is timed on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from flash_cosine_sim_attention import plain_cosine_sim_attention
from presets import Case
from torch import Tensor

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CHECKED_LENGTH = 8192
"""Longest sequence whose results are compared with float64: one head of the n x n definition fits any GPU."""

PADDING_SHARES = (0.0, 1.0, 1.0, 2.0)
"""Padding of batch rows 0, 1, 2, 3 relative to mask_prob: ragged lengths as batches have them."""


class CaseInputs:
    """q, k, v, dout of a case, normal random numbers, and its masks. Everything made on demand and kept."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device, self.seed = case, device, seed
        self._kept: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def raw(self) -> tuple[Tensor, ...]:
        """q, k, v, dout (batch, heads, seq_len, dim) in the case's dtype."""

        def make() -> tuple[Tensor, ...]:
            case, generator = self.case, torch.Generator(self.device).manual_seed(self.seed)
            shape, dtype = (case.batch, case.heads, case.seq_len, case.dim), TORCH_DTYPES[case.dtype]
            return tuple(torch.randn(shape, generator=generator, device=self.device).to(dtype) for _ in range(4))

        return self._once("raw", make)

    def tensors(self, layout: str, normalised: bool) -> tuple[Tensor, ...]:
        """q, k, v, dout, contiguous in `layout`; q and k of unit norm if normalised."""

        def make() -> tuple[Tensor, ...]:
            q, k, v, dout = self.raw()
            if normalised:
                q, k = (F.normalize(x.float(), dim=-1).to(x.dtype) for x in (q, k))
            return tuple(x if layout == "bhnd" else x.transpose(1, 2).contiguous() for x in (q, k, v, dout))

        return self._once((layout, normalised), make)

    def key_mask(self) -> Tensor | None:
        """(batch, seq_len), True = attend; None for a case without."""
        case = self.case
        if not case.mask_prob:
            return None

        def make() -> Tensor:
            if not case.padded:
                generator = torch.Generator(self.device).manual_seed(self.seed + 1)
                shares = torch.rand(case.batch, case.seq_len, generator=generator, device=self.device)
                visible = shares >= case.mask_prob
                visible[:, 0] = True  # a row without any key is no task on which peers agree
                return visible
            shares = torch.tensor(PADDING_SHARES, device=self.device).repeat(case.batch)[: case.batch]
            lengths = (case.seq_len * (1 - case.mask_prob * shares)).long().clamp(min=1)
            return torch.arange(case.seq_len, device=self.device) < lengths[:, None]

        return self._once("key mask", make)

    def causal_mask(self) -> Tensor:
        """(seq_len, seq_len), True = attend."""
        n = self.case.seq_len
        return self._once("causal", lambda: torch.ones(n, n, dtype=torch.bool, device=self.device).tril())

    def hidden(self) -> Tensor | None:
        """True where a pair does not attend, broadcastable to (batch, heads, seq_len, seq_len); None if all do."""
        mask = self.key_mask()
        keys = None if mask is None else ~mask[:, None, None, :]
        if not self.case.causal:
            return keys
        return self._once("hidden", lambda: ~self.causal_mask() if keys is None else ~self.causal_mask() | keys)

    def block_mask(self) -> Any:
        """FlexAttention's form of the masks; None if there are none."""
        from torch.nn.attention.flex_attention import create_block_mask

        case, mask = self.case, self.key_mask()
        if mask is None and not case.causal:
            return None

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if mask is None:
                return i >= j
            return (i >= j) & mask[b, j] if case.causal else mask[b, j]

        batch = None if mask is None else case.batch
        sizes = (batch, None, case.seq_len, case.seq_len)
        return self._once("block mask", lambda: create_block_mask(visible, *sizes, device=str(self.device)))

    def reference(self, normalised: bool, scale: float) -> dict[str, Tensor]:
        """out, dq, dk, dv of the last head of the last batch row in float64, (1, 1, seq_len, dim); of the inputs as
        they are, rounded to the case's dtype."""

        def make() -> dict[str, Tensor]:
            q, k, v, dout = (x[-1:, -1:].double().requires_grad_() for x in self.tensors("bhnd", normalised))
            mask = self.key_mask()
            options: dict[str, Any] = {"scale": scale, "causal": self.case.causal, "l2norm_qk": not normalised}
            options["mask"] = None if mask is None else mask[-1:]
            out = plain_cosine_sim_attention(q, k, v, **options)
            assert isinstance(out, Tensor)
            gradients = torch.autograd.grad(out, (q, k, v), dout.detach())
            return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))

        return self._once(("reference", normalised), make)

    def errors(self, results: dict[str, Tensor], layout: str, normalised: bool, scale: float) -> dict[str, float]:
        """Relative error ||x - reference|| / ||reference|| of each result; {} beyond CHECKED_LENGTH."""
        if self.case.seq_len > CHECKED_LENGTH:
            return {}
        reference, errors = self.reference(normalised, scale), {}
        for name, result in results.items():
            head = (result if layout == "bhnd" else result.transpose(1, 2))[-1:, -1:].double()
            errors[name] = float((head - reference[name]).norm() / reference[name].norm())
        return errors
