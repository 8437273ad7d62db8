"""Every refusal names the layer, the option as the user wrote it, and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FALLBACK_HINT = "strict=False runs what is refused on the stock path and counts it; layers= leaves layers out"


@dataclass(frozen=True)
class Refusal:
    """One option of one layer that the fused path does not serve."""

    layer: str  # path in the model, "" for the model itself
    option: str  # keyword of x-transformers, or argument of the call
    reason: str

    def __str__(self) -> str:
        return f"{self.layer or '(the module itself)'}: {self.option}: {self.reason}"


class UnsupportedLayerError(ValueError):
    """`enable` found layers that it cannot serve; nothing has been changed. `refusals` lists all of them."""

    def __init__(self, refusals: Sequence[Refusal]) -> None:
        self.refusals = tuple(refusals)
        lines = "\n  ".join(map(str, self.refusals))
        super().__init__(f"cosine-sim attention cannot serve:\n  {lines}\n{FALLBACK_HINT}")

    def __reduce__(self):
        return type(self), (self.refusals,)


class UnsupportedCallError(ValueError):
    """An enabled layer was called with something that the fused path does not serve."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(f"cosine-sim attention cannot serve this call of {refusal}\n{FALLBACK_HINT}")

    def __reduce__(self):
        return type(self), (self.refusal,)


class AttentionMapsError(RuntimeError):
    """Someone read an attention map (logits or weights) of a layer whose pass is fused: it never existed."""

    def __init__(self, layer: str, name: str) -> None:
        self.layer, self.name = layer, name
        super().__init__(
            f"{layer or '(the module itself)'}: {name}: a fused pass makes no (queries x keys) matrix to return; "
            "call disable(model) for the calls that need attention maps (return_attn, return_attn_z_loss, "
            "attn_qk_clip_, residual attention)"
        )

    def __reduce__(self):
        return type(self), (self.layer, self.name)
