"""What a run depends on. The arms, and what they differ in, are in arms.toml."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..shared.attend import AttentionArm

ARMS_FILE = Path(__file__).with_name("arms.toml")


@dataclass(frozen=True)
class SharpnessConfig:
    """The same for all arms and tasks: two layers, as many as it takes to look something up (Olsson et al. 2022)."""

    dim: int = 128
    depth: int = 2
    heads: int = 2
    vocabulary: int = 8192  # tokens, half of them keys or passage, half values or filler
    train_length: int = 256
    longest: int = 8192  # evaluated at train_length, twice that, and so on to this
    batch_size: int = 16
    eval_sequences: int = 32
    steps: int = 600
    lr: float = 2e-3
    warmup: int = 100
    chunk: int = 50  # steps between two rows

    def __post_init__(self) -> None:
        if self.dim % self.heads or (self.dim // self.heads) % 8:
            raise ValueError(f"expected dim / heads to be a multiple of 8, got {self.dim} and {self.heads}")
        if self.longest > self.vocabulary or self.train_length % 4:
            raise ValueError(
                f"expected longest <= vocabulary = {self.vocabulary} and train_length a multiple of 4, "
                f"got {self.longest} and {self.train_length}"
            )

    @property
    def lengths(self) -> list[int]:
        """train_length, doubled as long as `longest` allows."""
        lengths = [self.train_length]
        while lengths[-1] * 2 <= self.longest:
            lengths.append(lengths[-1] * 2)
        return lengths

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_arms() -> dict[str, AttentionArm]:
    """Each table of arms.toml: an arm's name and the fields of AttentionArm that it sets."""
    arms = tomllib.loads(ARMS_FILE.read_text("utf-8"))["arms"]
    return {name: AttentionArm(**fields) for name, fields in arms.items()}
