"""What is timed on a GPU: one case is one shape, one preset the grid of cases that answers a question."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

DTYPES = ("fp16", "bf16", "fp32")
PASSES = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}
"""What a cell times, and its matrix products relative to the two of the forward (the backward has five)."""

TOKENS, WIDTH = 16384, 2048
"""Of the presets with a constant amount of work per length: batch * seq_len, and heads * dim."""

AS_LONG = -1
"""A batch as large as the sequence is long: triangle attention over an n x n pair representation."""


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
    bias: str = ""
    """The dims that an additive bias has, out of "bhij" (the others have size 1), in the case's dtype; in float32 with
    "f" behind them. Its gradient is wanted. "": no bias."""
    position: str = ""
    """A bias by relative position: "alibi", slopes (heads,), or "table", (heads, 2 seq_len - 1); float32 parameters
    whose gradient is wanted. "": none."""

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
        bias = f" bias {self.bias}" if self.bias else ""
        position = f" {self.position}" if self.position else ""
        return f"{self.dtype} d{self.dim} {'causal' if self.causal else 'full'}{mask}{bias}{position}"

    def __str__(self) -> str:
        return f"{self.family()} {self.batch}x{self.heads}x{self.seq_len}"


def case_of(record: dict[str, Any]) -> Case:
    """The case that a record of results belongs to; older records lack the latest fields."""
    return Case(**{field.name: record[field.name] for field in fields(Case) if field.name in record})


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
    biases: tuple[str, ...] = ("",)
    positions: tuple[str, ...] = ("",)
    norms: tuple[str, ...] = ("compiled",)
    """How peers normalise, unless the command line says (normalizing.NORMS)."""

    def cases(self) -> list[Case]:
        """batch or heads None: as many as make TOKENS tokens of WIDTH; batch AS_LONG: seq_len."""
        grid = product(self.dtypes, self.dims, self.causal, self.biases, self.positions, self.seqs)
        return [
            Case(
                dtype,
                seq_len if self.batch == AS_LONG else self.batch or max(TOKENS // seq_len, 1),
                self.heads or max(WIDTH // dim, 1),
                *(seq_len, dim, causal, self.mask_prob, self.padded, bias, position),
            )
            for dtype, dim, causal, bias, position, seq_len in grid
        ]


FLASH_PEERS = ("fa2", "cudnn", "fa3", "fa4")
BIAS_PEERS = ("flex", "efficient", "cudnn", "compiled", "cueq")
PAIR = {"causal": (False,), "batch": AS_LONG, "heads": 4, "norms": ("none", "eager")}

PRESETS = {
    "classic": Preset(
        ("fp16",), (64,), (128, 256, 512, 1024, 2048, 4096, 8192), (*FLASH_PEERS, "efficient", "flex", "plain")
    ),
    "long16k": Preset(
        ("bf16", "fp16"), (64, 128), (1024, 2048, 4096, 8192, 16384), FLASH_PEERS, (False, True), batch=None, heads=None
    ),
    "fp32": Preset(("fp32",), (64,), (2048, 8192), ("efficient", "plain")),
    "mask": Preset(("fp16",), (64,), (2048,), ("cudnn", "efficient", "flex", "plain"), mask_prob=0.25, padded=True),
    "pair_bias": Preset(("bf16", "fp16", "fp32"), (32,), (128, 256, 384, 512), BIAS_PEERS, biases=("hij",), **PAIR),
    "pair_bias_forms": Preset(
        ("bf16",), (32,), (256,), ("flex",), biases=("hijf", "ij", "bhij", "bij", "hj", "bj", "hi"), **PAIR
    ),
    "dense_bias": Preset(
        ("bf16",), (64,), (1024, 2048, 4096), ("flex",), biases=("hij", "bhij"), norms=("compiled", "none")
    ),
    "position_bias": Preset(
        ("bf16",), (64,), (1024, 4096), ("ours:dense", "flex", "compiled"), (True,), positions=("alibi", "table")
    ),
    "memory": Preset(("bf16",), (64, 128), (16384,), ("fa2", "cudnn"), modes=("fwd+bwd",), batch=None, heads=None),
}

CLASSIC = PRESETS["classic"]

GROUPS = {
    "figures": (
        replace(CLASSIC, seqs=(512,)),
        PRESETS["fp32"],
        PRESETS["mask"],
        replace(PRESETS["dense_bias"], biases=("hij",)),
        PRESETS["memory"],
        PRESETS["long16k"],
        replace(
            CLASSIC, peers=tuple(peer for peer in CLASSIC.peers if peer != "flex")
        ),  # compiles for seconds a length
    ),
    "all": tuple(PRESETS.values()),
}
"""Several presets under one name: "figures" holds each figure to reach but those of pair biases, what needs most time
last, so that a budget cuts there."""
