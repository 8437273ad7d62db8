"""Small models, built alike for every test file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from x_transformers import Decoder, TransformerWrapper

TOKENS = 40


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU of compute capability 8.0 or more"))


def _language_model(stack: type = Decoder, wrapper: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 16, "verbose": False} | options
    return TransformerWrapper(num_tokens=TOKENS, max_seq_len=64, attn_layers=stack(**options), **(wrapper or {}))


@pytest.fixture
def language_model() -> Callable[..., nn.Module]:
    """(stack=Decoder, wrapper={}, **options of the stack) -> TransformerWrapper: width 32, depth 2, 4 heads of 16."""
    return _language_model


@pytest.fixture
def ids() -> torch.Tensor:
    """Tokens (2, 21)."""
    return torch.randint(0, TOKENS, (2, 21), generator=torch.Generator().manual_seed(1))
