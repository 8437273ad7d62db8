"""The tensors of one case, made once on the device and shared by all that is timed on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from flash_cosine_sim_attention import (
    AlibiBias,
    PositionBias,
    RelativeBias,
    alibi_slopes,
    plain_cosine_sim_attention,
)
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

    def bias(self) -> Tensor | None:
        """(batch | 1, heads | 1, seq_len | 1, seq_len | 1), a leaf whose gradient is wanted; None: no bias."""
        case = self.case
        if not case.bias:
            return None

        def make() -> Tensor:
            generator = torch.Generator(self.device).manual_seed(self.seed + 2)
            sizes = zip("bhij", (case.batch, case.heads, case.seq_len, case.seq_len), strict=True)
            shape = [size if dim in case.bias else 1 for dim, size in sizes]
            dtype = torch.float32 if case.bias.endswith("f") else TORCH_DTYPES[case.dtype]
            return torch.randn(shape, generator=generator, device=self.device).to(dtype).requires_grad_()

        return self._once("bias", make)

    def position_parameters(self) -> Tensor | None:
        """Slopes (heads,) or a table (heads, 2 seq_len - 1), a leaf; None: no bias by relative position."""
        case = self.case
        if not case.position:
            return None

        def make() -> Tensor:
            generator = torch.Generator(self.device).manual_seed(self.seed + 3)
            table = torch.randn(case.heads, 2 * case.seq_len - 1, generator=generator, device=self.device)
            slopes = alibi_slopes(case.heads).to(self.device)
            return (slopes if case.position == "alibi" else table).requires_grad_()

        return self._once("position", make)

    def position_bias(self, parameters: Tensor | None = None) -> PositionBias | None:
        """The descriptor of `parameters`, by default the case's own."""
        parameters = self.position_parameters() if parameters is None else parameters
        if parameters is None:
            return None
        return AlibiBias(parameters) if self.case.position == "alibi" else RelativeBias(parameters)

    def leaf_bias(self) -> dict[str, Tensor]:
        """The bias, or the parameters of one by position, by the name of the gradient; {} if there is none."""
        leaves = {"dbias": self.bias(), "dposition": self.position_parameters()}
        return {name: leaf for name, leaf in leaves.items() if leaf is not None}

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
        """out, dq, dk, dv of the last head of the last batch row in float64, (1, 1, seq_len, dim), and the last
        of dbias if there is a bias; of the inputs as they are, rounded to the case's dtype."""

        def make() -> dict[str, Tensor]:
            batch, heads = self.case.batch, self.case.heads
            results = self._definition(normalised, scale, batch - 1, heads - 1)
            if self.case.bias:
                results["dbias"] = self._bias_reference(normalised, scale)
            if self.case.position:
                parts = [self._definition(normalised, scale, row, heads - 1)["dposition"] for row in range(batch)]
                results["dposition"] = torch.stack(parts).sum(0)
            return results

        return self._once(("reference", normalised), make)

    def _definition(self, normalised: bool, scale: float, row: int, head: int) -> dict[str, Tensor]:
        """Results of one head of one batch row in float64; of dbias, (1, 1, n | 1, n | 1), its own share."""
        q, k, v, dout = (
            x[row : row + 1, head : head + 1].double().requires_grad_() for x in self.tensors("bhnd", normalised)
        )
        mask, whole = self.key_mask(), self.bias()
        options: dict[str, Any] = {"scale": scale, "causal": self.case.causal, "l2norm_qk": not normalised}
        options["mask"] = None if mask is None else mask[row : row + 1]
        leaves, names = [q, k, v], ["out", "dq", "dk", "dv"]
        parameters = self.position_parameters()
        if parameters is not None:
            leaves.append(parameters.detach()[head : head + 1].double().requires_grad_())
            names.append("dposition")
            options["attn_bias"] = self.position_bias(leaves[-1])
        if whole is not None:
            own = whole.detach()[row if whole.shape[0] > 1 else 0, head if whole.shape[1] > 1 else 0]
            options["attn_bias"] = own[None, None].double().requires_grad_()
            leaves.append(options["attn_bias"])
            names.append("dbias")
        out = plain_cosine_sim_attention(q, k, v, **options)
        assert isinstance(out, Tensor)
        gradients = torch.autograd.grad(out, leaves, dout.detach())
        return dict(zip(names, (out.detach(), *gradients), strict=True))

    def _bias_reference(self, normalised: bool, scale: float) -> Tensor:
        """The gradient of the bias of the last batch row and head, summed over all that share it."""
        case = self.case
        rows = [case.batch - 1] if "b" in case.bias else range(case.batch)
        heads = [case.heads - 1] if "h" in case.bias else range(case.heads)
        parts = (self._definition(normalised, scale, row, head)["dbias"] for row in rows for head in heads)
        total = next(parts)
        for part in parts:
            total += part
        return total

    def errors(self, results: dict[str, Tensor], layout: str, normalised: bool, scale: float) -> dict[str, float]:
        """Relative error ||x - reference|| / ||reference|| of each result; {} beyond CHECKED_LENGTH."""
        if self.case.seq_len > CHECKED_LENGTH:
            return {}
        reference, errors = self.reference(normalised, scale), {}
        for name, result in results.items():
            if name == "dposition":
                head = result[-1:].double()
            else:
                transposed = layout != "bhnd" and name != "dbias"
                head = (result.transpose(1, 2) if transposed else result)[-1:, -1:].double()
            errors[name] = float((head - reference[name]).norm() / reference[name].norm())
        return errors
