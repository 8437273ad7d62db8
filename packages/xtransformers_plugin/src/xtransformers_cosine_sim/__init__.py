"""Switches x-transformers models to fused cosine-sim attention: `enable(model)`, `disable(model)`."""

from .counters import Counters, LayerCounts, counters, reset
from .enable import disable, enable, enabled
from .errors import AttentionMapsError, Refusal, UnsupportedCallError, UnsupportedLayerError
from .flag import install_flag, uninstall_flag
from .options import TABLE, table_markdown

__all__ = [
    "TABLE",
    "AttentionMapsError",
    "Counters",
    "LayerCounts",
    "Refusal",
    "UnsupportedCallError",
    "UnsupportedLayerError",
    "counters",
    "disable",
    "enable",
    "enabled",
    "install_flag",
    "reset",
    "table_markdown",
    "uninstall_flag",
]
__version__ = "0.1.0"
