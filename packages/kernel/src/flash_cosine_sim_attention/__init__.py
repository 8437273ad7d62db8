"""Fused attention for l2-normalised queries and keys."""

from .attention import flash_cosine_sim_attention
from .normalize import l2norm_tensors
from .position_bias import AlibiBias, PositionBias, RelativeBias, T5Bias, alibi_slopes
from .reference import plain_cosine_sim_attention
from .report import available

__all__ = [
    "AlibiBias",
    "PositionBias",
    "RelativeBias",
    "T5Bias",
    "alibi_slopes",
    "available",
    "flash_cosine_sim_attention",
    "l2norm_tensors",
    "plain_cosine_sim_attention",
]
__version__ = "0.1.0"
