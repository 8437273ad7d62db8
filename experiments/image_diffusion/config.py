"""What a run depends on. The arms, and what they differ in, are in arms.toml."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..shared.attend import AttentionArm

ARMS_FILE = Path(__file__).with_name("arms.toml")


@dataclass(frozen=True)
class ImageConfig:
    """The same for all arms. Sizes of the model as in DiT (Peebles and Xie 2023), scaled down; patches are pixels."""

    dim: int = 96
    depth: int = 3
    heads: int = 3
    batch_size: int = 64
    steps: int = 1800
    lr: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    noise_levels: int = 1000  # T of the training schedule
    sampling_steps: int = 50
    sample_seeds: int = 3
    eval_levels: int = 50  # noise levels of the held-out loss
    chunk: int = 100  # steps between two rows

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 8:
            raise ValueError(f"expected dim / heads to be a multiple of 8, got {self.dim} and {self.heads}")
        if self.steps % self.chunk:
            raise ValueError(f"steps: expected a multiple of chunk = {self.chunk}, got {self.steps}")
        for name in ("eval_levels", "sampling_steps"):
            if self.noise_levels % getattr(self, name):
                raise ValueError(f"{name}: expected a divisor of {self.noise_levels}, got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_arms() -> dict[str, AttentionArm]:
    """Each table of arms.toml: an arm's name and the fields of AttentionArm that it sets."""
    arms = tomllib.loads(ARMS_FILE.read_text("utf-8"))["arms"]
    return {name: AttentionArm(**fields) for name, fields in arms.items()}
