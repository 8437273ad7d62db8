"""What is timed on a GPU: one case is one shape, one preset the grid of cases that answers a question."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

DTYPES = ("fp16", "bf16", "fp32")
PASSES = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}
"""What a cell times, and its matrix products relative to the two of the forward (the backward has five)."""

TOKENS, WIDTH = 16384, 2048
"""Of the presets with a constant amount of work per length: batch * seq_len, and heads * dim."""


@dataclass(frozen=True)
class Case:
    """q, k, v (batch, heads, seq_len, dim) of one dtype; self attention."""

    dtype: str
    batch: int
    heads: int
    seq_len: int
    dim: int
    causal: bool = False
    mask_prob: float = 0.0
    """Share of the keys that a key mask hides; 0 for no mask at all."""
    padded: bool = False
    """Hidden keys are the last ones of each row (padding) instead of random ones."""

    def flops(self, mode: str) -> float:
        """Multiplications and additions of the matrix products; half for causal, a key mask is not discounted."""
        pairs = self.batch * self.heads * self.seq_len**2 * (0.5 if self.causal else 1.0)
        return 4 * pairs * self.dim * PASSES[mode]

    def min_bytes(self, mode: str) -> float:
        """Each input read once and each output written once: q, k, v, out; backward q, k, v, out, dout, dq, dk, dv."""
        tensors = {"fwd": 4, "bwd": 8, "fwd+bwd": 12}[mode]
        size = 4 if self.dtype == "fp32" else 2
        return tensors * size * self.batch * self.heads * self.seq_len * self.dim

    def family(self) -> str:
        """All but the length: bf16 4x8xnx64 causal."""
        mask = f" mask {self.mask_prob:.0%}{' padded' if self.padded else ''}" if self.mask_prob else ""
        return f"{self.dtype} d{self.dim} {'causal' if self.causal else 'full'}{mask}"

    def __str__(self) -> str:
        return f"{self.family()} {self.batch}x{self.heads}x{self.seq_len}"


def case_of(record: dict[str, Any]) -> Case:
    """The case that a record of results belongs to."""
    return Case(**{field.name: record[field.name] for field in fields(Case)})


def case_fields(case: Case) -> dict[str, Any]:
    return asdict(case)


@dataclass(frozen=True)
class Preset:
    """A grid of cases, what is timed of each and beside whom."""

    dtypes: tuple[str, ...]
    dims: tuple[int, ...]
    seqs: tuple[int, ...]
    peers: tuple[str, ...]
    causal: tuple[bool, ...] = (False,)
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")
    batch: int | None = 4
    heads: int | None = 8
    mask_prob: float = 0.0
    padded: bool = False

    def cases(self) -> list[Case]:
        """batch or heads None: as many as make TOKENS tokens of WIDTH."""
        return [
            Case(
                dtype,
                self.batch or max(TOKENS // seq_len, 1),
                self.heads or max(WIDTH // dim, 1),
                *(seq_len, dim, causal, self.mask_prob, self.padded),
            )
            for dtype, dim, causal, seq_len in product(self.dtypes, self.dims, self.causal, self.seqs)
        ]


FLASH_PEERS = ("fa2", "cudnn", "fa3", "fa4")

PRESETS = {
    "classic": Preset(
        ("fp16",), (64,), (128, 256, 512, 1024, 2048, 4096, 8192), (*FLASH_PEERS, "efficient", "flex", "plain")
    ),
    "long16k": Preset(
        ("bf16", "fp16"), (64, 128), (1024, 2048, 4096, 8192, 16384), FLASH_PEERS, (False, True), batch=None, heads=None
    ),
    "fp32": Preset(("fp32",), (64,), (2048, 8192), ("efficient", "plain")),
    "mask": Preset(("fp16",), (64,), (2048,), ("cudnn", "efficient", "flex", "plain"), mask_prob=0.25, padded=True),
    "memory": Preset(("bf16",), (64, 128), (16384,), ("fa2", "cudnn"), modes=("fwd+bwd",), batch=None, heads=None),
}
