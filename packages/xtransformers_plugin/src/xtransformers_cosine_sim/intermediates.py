"""What a fused layer hands back beside its output: everything that x-transformers stores there, without the maps."""

from __future__ import annotations

from typing import NoReturn

from x_transformers.attend import Intermediates

from .errors import AttentionMapsError


class FusedIntermediates(Intermediates):
    """Intermediates whose attention maps raise a named error when read, instead of being None.

    The other fields (values, cached_kv, ...) keep their class-level default of None until x-transformers sets them.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer

    @property
    def qk_similarities(self) -> NoReturn:
        raise AttentionMapsError(self.layer, "qk_similarities")

    @property
    def pre_softmax_attn(self) -> NoReturn:
        raise AttentionMapsError(self.layer, "pre_softmax_attn")

    @property
    def post_softmax_attn(self) -> NoReturn:
        raise AttentionMapsError(self.layer, "post_softmax_attn")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer={self.layer!r}, fields={sorted(vars(self))})"

    __eq__ = object.__eq__  # the dataclass's own would read the maps
    __hash__ = object.__hash__
