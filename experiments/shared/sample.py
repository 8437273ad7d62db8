"""Text that a trained model writes, so that one sees what its bits per byte mean."""

from __future__ import annotations

import torch
from torch import Tensor
from x_transformers import AutoregressiveWrapper

from .train import Trainer

PROMPT_BYTES = 64
TEMPERATURE = 0.8


def sample_text(trainer: Trainer, length: int = 256) -> str:
    """The start of a held-out text, a mark, and what the model continues it with; at most its context in all."""
    seq_len = trainer.config.seq_len
    prompt = trainer.corpus.val[: max(1, min(PROMPT_BYTES, seq_len // 4))].long()
    length = min(length, seq_len - len(prompt))
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices), trainer.autocast():
        torch.manual_seed(trainer.config.seed)
        continuation = AutoregressiveWrapper(trainer.model).generate(
            prompt.to(trainer.device), length, temperature=TEMPERATURE
        )
    return f"{_decode(prompt)} >>> {_decode(continuation)}\n"


def _decode(text: Tensor) -> str:
    return bytes(text.tolist()).decode("utf-8", errors="replace")
