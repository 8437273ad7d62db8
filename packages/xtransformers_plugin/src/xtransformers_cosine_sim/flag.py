"""A flag of the model itself: `Decoder(..., attn_qk_norm=True, attn_use_cosine_sim_kernel=True)`.

x-transformers hands every attn_* keyword to `Attention.__init__`, which knows no such one. `install_flag` wraps that
constructor, once per process and only when asked, to take its own keyword out and enable the layer it built.
"""

from __future__ import annotations

import functools
from typing import Any

from x_transformers.x_transformers import Attention

from .enable import enable

FLAG = "use_cosine_sim_kernel"
"""With the prefix attn_ (or cross_attn_) it goes into Decoder, Encoder, XTransformer, ..."""


def install_flag() -> None:
    """Let models take attn_use_cosine_sim_kernel: True, or the options of `enable` as a dict. Idempotent.

    A tuple with one entry per attention layer chooses layers, as for every other attn_* keyword.
    """
    original = Attention.__init__
    if hasattr(original, "_without_cosine_sim_flag"):
        return

    @functools.wraps(original)
    def init(self: Attention, *args: Any, **kwargs: Any) -> None:
        flag = kwargs.pop(FLAG, False)
        if not isinstance(flag, (bool, dict, type(None))):
            raise TypeError(f"attn_{FLAG}: expected True, False or a dict of options of enable, got {flag!r}")
        original(self, *args, **kwargs)
        if flag is not None and flag is not False:
            enable(self, **({} if flag is True else flag))

    init._without_cosine_sim_flag = original  # type: ignore[attr-defined]
    Attention.__init__ = init


def uninstall_flag() -> None:
    """Give `Attention.__init__` back as it was. Models that were built with the flag stay enabled."""
    original = getattr(Attention.__init__, "_without_cosine_sim_flag", None)
    if original is not None:
        Attention.__init__ = original
