"""How `chunked.py` cuts a problem into tiles, and what of q, k, v, mask and bias each tile reads.

A `Box` is a block of the batch dims (b0, b1, hk); all its query heads go together: the g = h / hk query heads of a kv
head are more rows of the same matrix products, so grouped and single-head keys are never expanded. A tile is `rows`
queries x `keys` keys of a box. Everything here is in the wide dtype (float32, float64 for float64).

    x0, x1, y   sizes of the box in b0, b1, hk          n = x0 * x1 * y
    g, r, c     query heads of a kv head, queries and keys of the tile
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .normalize import EPS, keep_rows
from .problem import Outputs, Problem
from .toeplitz import toeplitz_matrix

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)

MAX_FIXED_BOUND = {torch.float32: 60.0, torch.float64: 600.0}
"""The largest B that needs no maximum. float32 is normal from e^-87.3 to e^88.7 (float64: e^-708 to e^709), and
exp(s) lies in [e^-B, e^B]: at the worst case of all cosines at -1, or at 1, a factor of e^27 = 5e11 is left on either
side for the number of keys and the size of the values. A shift m > 0 would move that room, not add to it."""

Box = tuple[slice, slice, slice]  # of b0, b1, hk

TILE = 256
"""Rows (query heads of the group included) and keys of a tile on a CPU: 256 x 256 float32 is a quarter of a typical
1 MiB second-level cache, and measures as fast as 256 x 512 and 512 x 512, faster than 128 x 256."""

TILE_ACCELERATOR = 1024
"""The same elsewhere, where launches cost more than cache misses."""

BOX_ELEMENTS = 2**17
"""Scores held at a time per CPU thread: two tiles, 512 KiB. Short sequences fill it with more batch elements."""

BOX_ELEMENTS_ACCELERATOR = 2**24


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes that depend on the problem's shape alone, and bound the extra memory: see `chunked.py`."""

    box: tuple[int, int, int]  # of b0, b1, hk
    rows: int  # r
    keys: int  # c

    @classmethod
    def of(cls, problem: Problem) -> Tiling:
        on_cpu = problem.q.device.type == "cpu"
        tile = TILE if on_cpu else TILE_ACCELERATOR
        elements = BOX_ELEMENTS * torch.get_num_threads() if on_cpu else BOX_ELEMENTS_ACCELERATOR
        nq, nk, kv_heads = problem.q.shape[3], problem.k.shape[3], problem.k.shape[2]
        group = max(problem.q.shape[2] // max(kv_heads, 1), 1)
        rows, keys = max(min(nq, tile // group), 1), max(min(nk, tile), 1)
        capacity, box = max(elements // (group * rows * keys), 1), []
        for size in reversed(problem.k.shape[:3]):
            box.append(max(min(size, capacity), 1))
            capacity = max(capacity // box[-1], 1)
        x0, x1, y = reversed(box)
        return cls((x0, x1, y), min(rows * capacity, max(nq, 1)), keys)  # few batch elements: more rows at a time


def steps(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


@dataclass(frozen=True)
class Tiles:
    """The tensors of a problem with query heads split into (hk, g), and how to read a tile of them."""

    problem: Problem
    tiling: Tiling

    @classmethod
    def of(cls, problem: Problem) -> Tiles:
        return cls(problem, Tiling.of(problem))

    def boxes(self) -> Iterator[Box]:
        s0, s1, heads = (steps(n, step) for n, step in zip(self.problem.k.shape[:3], self.tiling.box, strict=True))
        return itertools.product(s0, s1, heads)

    def row_steps(self) -> list[slice]:
        return steps(self.problem.q.shape[3], self.tiling.rows)

    def key_steps(self) -> list[slice]:
        return steps(self.problem.k.shape[3], self.tiling.keys)

    def by_kv_head(self, x: Tensor) -> Tensor:
        """x (b0, b1, h, ...) -> (b0, b1, hk, g, ...), a view."""
        kv_heads = self.problem.k.shape[2]
        return x.unflatten(2, (kv_heads, x.shape[2] // kv_heads))

    def bias_by_kv_head(self, x: Tensor) -> Tensor:
        """x (b0 | 1, b1 | 1, h | 1, i | 1, j | 1) -> (b0 | 1, b1 | 1, hk | 1, g | 1, i | 1, j | 1), a view."""
        return x.unsqueeze(3) if x.shape[2] == 1 else self.by_kv_head(x)

    @cached_property
    def bias(self) -> Tensor | None:
        return None if self.problem.bias is None else self.bias_by_kv_head(self.problem.bias)

    def bias_tile(self, box: Box, rows: slice, keys: slice) -> Tensor | None:
        """(x0 | 1, x1 | 1, y | 1, g | 1, r | 1, c | 1)"""
        if self.bias is None:
            return None
        if self.problem.toeplitz:
            window = broadcast_slice(self.bias, (*box, slice(None), slice(None), self.diagonals(rows, keys)))
            return toeplitz_matrix(window.squeeze(-2), keys.stop - keys.start)
        return broadcast_slice(self.bias, (*box, slice(None), rows, keys))

    def diagonals(self, rows: slice, keys: slice) -> slice:
        """Those of all nq + nk - 1 that cross a tile."""
        last_query = self.problem.q.shape[3] - 1
        return slice(last_query + keys.start - (rows.stop - 1), last_query + keys.stop - rows.start)

    @cached_property
    def scale(self) -> Tensor | float:
        """A number, or (hk, g, 1, 1)."""
        scale, kv_heads = self.problem.scale, self.problem.k.shape[2]
        return self.problem.scale_value if scale is None else scale.view(kv_heads, -1, 1, 1)

    def scale_of(self, box: Box) -> Tensor | float:
        """A number, or (y, g, 1, 1)."""
        return self.scale[box[2]] if isinstance(self.scale, Tensor) else self.scale

    def rows(self, x: Tensor, box: Box, rows: slice) -> Tensor:
        """x (b0, b1, h, i, ...) -> (x0, x1, y, g, r, ...), a view."""
        return self.by_kv_head(x)[*box, :, rows]

    def unit_queries(self, outputs: Outputs, box: Box, rows: slice) -> Tensor:
        """Normalised queries (x0, x1, y, g, r, d), with the factors of `outputs.q_rnorm`."""
        q = self.rows(self.problem.q, box, rows).to(self.problem.wide_dtype)
        return times_rnorm(q, self.rows(outputs.q_rnorm, box, rows)) if self.problem.l2norm_qk else q

    def unit_keys(self, outputs: Outputs, box: Box, keys: slice) -> Tensor:
        """Normalised keys (n, c, d), with the factors of `outputs.k_rnorm`; masked ones are 0."""
        k = self.keys(self.problem.k, box, keys)
        return (times_rnorm(k, outputs.k_rnorm[*box, keys]) if self.problem.l2norm_qk else k).flatten(0, 2)

    def values(self, box: Box, keys: slice) -> Tensor:
        """[v, 1] (n, c, dv + 1), masked rows all 0: the last column carries D in the backward, and masks."""
        return self.hide_keys(
            torch.nn.functional.pad(self.problem.v[*box, keys].to(self.problem.wide_dtype), (0, 1), value=1.0),
            box,
            keys,
        ).flatten(0, 2)

    def keys(self, x: Tensor, box: Box, keys: slice) -> Tensor:
        """x (b0, b1, hk, j, d) -> (x0, x1, y, c, d); masked rows are 0, whatever they held."""
        return self.hide_keys(x[*box, keys].to(self.problem.wide_dtype), box, keys)

    def hide_keys(self, x: Tensor, box: Box, keys: slice) -> Tensor:
        """x (x0, x1, y, c, ...) with rows of masked keys set to 0."""
        if self.problem.mask is None:
            return x
        return keep_rows(x, broadcast_slice(self.problem.mask, (*box[:2], keys))[:, :, None, :, None])

    def hidden_by_mask(self, box: Box, keys: slice) -> Tensor | None:
        """bool (x0 | 1, x1 | 1, 1, 1, 1, c), True = hidden."""
        if self.problem.mask is None:
            return None
        return broadcast_slice(self.problem.mask, (*box[:2], keys)).logical_not()[:, :, None, None, None, :]

    def is_hidden(self, rows: slice, keys: slice) -> bool:
        """Whether causality hides the whole tile."""
        return self.problem.causal and keys.start > rows.stop - 1 + self.offset

    def last_visible(self, rows: slice, keys: slice) -> int | None:
        """The diagonal of the tile beyond which causality hides, as torch.tril counts; None if it hides nothing."""
        diagonal = rows.start + self.offset - keys.start
        return None if not self.problem.causal or diagonal >= keys.stop - keys.start - 1 else diagonal

    @property
    def offset(self) -> int:
        return self.problem.k.shape[3] - self.problem.q.shape[3]


@dataclass(frozen=True, slots=True)
class KeyChunk:
    """One step of keys of a box, in the wide dtype, read once and used for every step of queries."""

    keys: slice
    unit: Tensor  # (n, c, d) normalised; masked rows 0
    values: Tensor  # (n, c, dv + 1): [v, 1]; masked rows 0
    hidden: Tensor | None  # by the mask: bool (x0 | 1, x1 | 1, 1, 1, 1, c)
    visible: Tensor | None  # the same as 1 and 0 in the wide dtype, (n, 1, c)


@dataclass(frozen=True, slots=True)
class Pass:
    """What every tile of one forward or backward shares."""

    tiles: Tiles
    outputs: Outputs
    is_bounded: bool  # exp(s) cannot overflow or vanish: nothing is subtracted, and masked keys need no -inf
    buffers: tuple[Tensor, Tensor]  # for the scores of a tile and their gradient

    @classmethod
    def of(cls, problem: Problem, outputs: Outputs) -> Pass:
        tiles = Tiles.of(problem)
        x0, x1, y = tiles.tiling.box
        group = problem.q.shape[2] // max(problem.k.shape[2], 1)
        shape = (2, x0 * x1 * y * group * tiles.tiling.rows * tiles.tiling.keys)
        buffers = problem.q.new_empty(shape, dtype=problem.wide_dtype).unbind()
        is_bounded = problem.bias is None and _bound(problem) <= MAX_FIXED_BOUND[problem.wide_dtype]
        return cls(tiles, outputs, is_bounded, (buffers[0], buffers[1]))

    def key_chunks(self, box: Box) -> list[KeyChunk]:
        chunks = []
        for keys in self.tiles.key_steps():
            values, hidden = self.tiles.values(box, keys), self.tiles.hidden_by_mask(box, keys)
            visible = None if hidden is None else values[..., -1].unsqueeze(1).contiguous()
            chunks.append(KeyChunk(keys, self.tiles.unit_keys(self.outputs, box, keys), values, hidden, visible))
        return chunks

    def product(self, index: int, left: Tensor, right: Tensor) -> Tensor:
        """left (n, g * r, e) times right (n, c, e) transposed, into a buffer -> (n, g * r, c)"""
        shape = (*left.shape[:2], right.shape[1])
        return torch.bmm(left, right.mT, out=self.buffers[index][: math.prod(shape)].view(shape))

    def bounded_weights(self, box: Box, rows: slice, chunk: KeyChunk, queries: Tensor) -> Tensor:
        """queries (n, g * r, d), times scale log2(e) -> exp(s) (n, g * r, c), in a buffer; not 0 for masked keys."""
        weights = self.product(0, queries, chunk.unit).exp2_()
        diagonal = self.tiles.last_visible(rows, chunk.keys)
        if diagonal is not None:
            self.as_tile(weights, box, rows).tril_(diagonal)
        return weights

    def scores(self, box: Box, rows: slice, chunk: KeyChunk, queries: Tensor) -> Tensor:
        """queries (n, g * r, d), times scale log2(e) -> s' (n, g * r, c), in a buffer; -inf where hidden."""
        scores = self.product(0, queries, chunk.unit)
        tile = self.as_tile(scores, box, rows)
        bias = self.tiles.bias_tile(box, rows, chunk.keys)
        if bias is not None:
            tile.add_(bias, alpha=LOG2_E)
        if chunk.hidden is not None:
            tile.masked_fill_(chunk.hidden, -math.inf)
        diagonal = self.tiles.last_visible(rows, chunk.keys)
        if diagonal is not None:  # five times faster than masked_fill_; tril_ first, for NaN + -inf is NaN
            tile.tril_(diagonal).add_(tile.new_full(tile.shape[-2:], -math.inf).triu_(diagonal + 1))
        return scores

    def as_tile(self, x: Tensor, box: Box, rows: slice) -> Tensor:
        """x (n, g * r, ...) -> (x0, x1, y, g, r, ...), a view of a contiguous tensor."""
        sizes = (part.stop - part.start for part in box)
        group = self.tiles.problem.q.shape[2] // self.tiles.problem.k.shape[2]
        return x.view(*sizes, group, rows.stop - rows.start, *x.shape[2:])

    def visible(self, rows: slice, chunks: list[KeyChunk]) -> list[int]:
        """Indices of the chunks that causality does not hide from all the rows."""
        return [index for index, chunk in enumerate(chunks) if not self.tiles.is_hidden(rows, chunk.keys)]


def _bound(problem: Problem) -> float:
    """problem.bound, and on a CPU that of a learned scale too: reading it there waits for nothing."""
    if problem.scale is not None and problem.q.device.type == "cpu" and problem.scale.numel():
        return float(problem.scale.abs().max()) * problem.groups
    return problem.bound


def broadcast_slice(x: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """x[slices], where a dim of size 1 stands for any number."""
    return x[*(slice(None) if size == 1 else part for size, part in zip(x.shape, slices, strict=True))]


def rnorm(x: Tensor, groups: int) -> Tensor:
    """x (..., d) in the wide dtype -> 1 / max(|x|_group, eps) (..., groups)."""
    return torch.linalg.vector_norm(x.unflatten(-1, (groups, -1)), dim=-1).clamp_min_(EPS).reciprocal_()


def times_rnorm(x: Tensor, factors: Tensor) -> Tensor:
    """x (..., d) * factors (..., groups), each on its chunk of d."""
    return (x.unflatten(-1, (factors.shape[-1], -1)) * factors.unsqueeze(-1)).flatten(-2)


def backward_of_norm(dxn: Tensor, xn: Tensor, factors: Tensor) -> Tensor:
    """Gradient of x from that of xn = x / max(|x|, eps): (dxn - (dxn . xn) xn) / |x|, per group.

    Where |x| < eps the denominator is a constant, so nothing is projected out, as with `torch.nn.functional.normalize`.
    dxn, xn (..., d), factors (..., groups) -> (..., d)
    """
    dxn, xn = (t.unflatten(-1, (factors.shape[-1], -1)) for t in (dxn, xn))
    factors = factors.unsqueeze(-1)
    along = torch.linalg.vecdot(dxn, xn).unsqueeze(-1)
    along = torch.where(factors < 0.999 / EPS, along, 0.0)
    return ((dxn - along * xn) * factors).flatten(-2)
