"""Memory-efficient attention in plain PyTorch, forward and backward, on any device. It serves every problem.

The scores exist one tile at a time (tiles.py). Extra memory, beside the outputs, is O(n): for one box of batch
elements at a time, wide copies of its keys and values and, in the backward, of their gradients; two tiles of scores
(with a `PositionBias` some three more); and a wide copy of a half-precision bias gradient that is summed over
something.

With a bounded score |s| <= B and no bias nothing is subtracted before exp (the fixed shift of math.md with m = 0):
    weighted_i = sum_j exp(s_ij) v_j,   total_i = sum_j exp(s_ij),   out_i = weighted_i / total_i
so tiles add up without a running maximum, and a masked key is a zero row of v that costs nothing. Otherwise a running
maximum is kept and everything is rescaled as it grows.

The backward recomputes P_ij = exp(s_ij - lse_i) from the saved log-sum-exp:
    dv_j    = sum_i P_ij dout_i
    dS_ij   = P_ij (dout_i . v_j - D_i),   D_i = dout_i . out_i - dlse_i      one product of [dout, -D] and [v, 1]
    dqn_i   = scale sum_j dS_ij kn_j,      dkn_j = scale sum_i dS_ij qn_i,    dbias_ij = dS_ij
    dscale  = sum_ij dS_ij (qn_i . kn_j)
With the fixed shift P = exp(s) exp(-lse), and the factor of row i goes onto [dout_i, -D_i] and out of the tiles.

Scores are held in units of log 2, s' = s log2(e), because exp2 is more than four times as fast as exp on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Gradients, Outputs, Problem
from .tiles import LN_2, LOG2_E, Box, KeyChunk, Pass, Tiles, backward_of_norm, broadcast_slice, rnorm
from .toeplitz import diagonal_sums


def forward(problem: Problem, outputs: Outputs) -> None:
    """Fill `outputs`."""
    this = Pass.of(problem, outputs)
    if problem.l2norm_qk:
        for rows in this.tiles.row_steps():
            outputs.q_rnorm[..., rows, :] = rnorm(problem.q[..., rows, :].to(problem.wide_dtype), problem.groups)
    for box in this.tiles.boxes():
        if problem.l2norm_qk:
            for keys in this.tiles.key_steps():
                outputs.k_rnorm[*box, keys] = rnorm(this.tiles.keys(problem.k, box, keys), problem.groups)
        chunks = this.key_chunks(box)
        for rows in this.tiles.row_steps():
            _forward_rows(this, box, rows, chunks)


def backward(problem: Problem, outputs: Outputs, dout: Tensor, dlse: Tensor | None, gradients: Gradients) -> None:
    """Fill those of `gradients` that are not None."""
    this = Pass.of(problem, outputs)
    sums = _Sums.of(this.tiles, gradients)
    for box in this.tiles.boxes():
        chunks = this.key_chunks(box)
        totals = [_KeyGradients.zeros(chunk, gradients) for chunk in chunks]
        for rows in this.tiles.row_steps():
            upstream = _upstream(this, dout, dlse, box, rows)
            _backward_rows(this, upstream, box, rows, chunks, totals, gradients, sums)
        for chunk, total in zip(chunks, totals, strict=True):
            _write_key_gradients(this, box, chunk, total, gradients)
    sums.write(gradients)


def _forward_rows(this: Pass, box: Box, rows: slice, chunks: list[KeyChunk]) -> None:
    unit = this.tiles.unit_queries(this.outputs, box, rows)
    queries = (unit * (this.tiles.scale_of(box) * LOG2_E)).flatten(3, 4).flatten(0, 2)
    sums = _Softmax.zeros(queries, this.tiles.problem.v.shape[-1])
    add = _add_bounded if this.is_bounded else _add_running
    for index in this.visible(rows, chunks):
        add(this, box, rows, chunks[index], queries, sums)
    out = torch.where(sums.total == 0, 0.0, sums.weighted / sums.total)
    lse = sums.total.log2() if this.is_bounded else sums.maximum + sums.total.log2()
    this.tiles.rows(this.outputs.out, box, rows).copy_(this.as_tile(out, box, rows))
    this.tiles.rows(this.outputs.lse, box, rows).copy_(this.as_tile(lse.mul_(LN_2).squeeze(-1), box, rows))


@dataclass(frozen=True, slots=True)
class _Softmax:
    """Sums over the keys that a step of queries has seen, updated in place."""

    weighted: Tensor  # (n, g * r, dv): sum_j exp(s_j - m) v_j
    total: Tensor  # (n, g * r, 1): sum_j exp(s_j - m)
    maximum: Tensor  # (n, g * r, 1): m, times log2(e); -inf if nothing was visible, or if it is not needed

    @classmethod
    def zeros(cls, queries: Tensor, dv: int) -> _Softmax:
        shape = queries.shape[:2]
        return cls(
            queries.new_zeros(*shape, dv), queries.new_zeros(*shape, 1), queries.new_full((*shape, 1), -math.inf)
        )


def _add_bounded(this: Pass, box: Box, rows: slice, chunk: KeyChunk, queries: Tensor, sums: _Softmax) -> None:
    """m = 0."""
    weights = this.bounded_weights(box, rows, chunk, queries)
    sums.weighted.baddbmm_(weights, chunk.values[..., :-1])
    visible = chunk.visible
    total = weights.sum(-1) if visible is None else torch.linalg.vecdot(weights, visible)
    sums.total.add_(total.unsqueeze(-1))


def _add_running(this: Pass, box: Box, rows: slice, chunk: KeyChunk, queries: Tensor, sums: _Softmax) -> None:
    """m is the maximum so far; what was summed is rescaled where it grows."""
    scores = this.scores(box, rows, chunk, queries)
    larger = torch.maximum(sums.maximum, scores.amax(-1, keepdim=True))
    shift = torch.where(larger == -math.inf, 0.0, larger)  # exp(-inf - -inf) is NaN
    rescale = (sums.maximum - shift).exp2_()
    weights = scores.sub_(shift).exp2_()
    sums.weighted.mul_(rescale).baddbmm_(weights, chunk.values[..., :-1])
    sums.total.mul_(rescale).add_(weights.sum(-1, keepdim=True))
    sums.maximum.copy_(larger)


@dataclass(frozen=True, slots=True)
class _Upstream:
    """What the backward knows of a step of queries before it sees a key; zero for rows that see none."""

    rows: Tensor  # (n, g * r, dv + 1): [dout, -D], times exp(-lse) if bounded
    lse: Tensor | None  # (n, g * r, 1), times log2(e), unless bounded; finite


def _upstream(this: Pass, dout: Tensor, dlse: Tensor | None, box: Box, rows: slice) -> _Upstream:
    wide = this.tiles.problem.wide_dtype
    d_out, out = (this.tiles.rows(x, box, rows).to(wide) for x in (dout, this.outputs.out))
    dots = torch.linalg.vecdot(d_out, out)
    if dlse is not None:
        dots -= this.tiles.rows(dlse, box, rows)
    lse = this.tiles.rows(this.outputs.lse, box, rows).unsqueeze(-1)
    is_empty = lse == -math.inf
    upstream = torch.cat([d_out, -dots.unsqueeze(-1)], dim=-1)
    upstream = torch.where(is_empty, 0.0, upstream * (-lse).exp() if this.is_bounded else upstream)
    finite_lse = None if this.is_bounded else torch.where(is_empty, 0.0, lse * LOG2_E).flatten(3, 4).flatten(0, 2)
    return _Upstream(upstream.flatten(3, 4).flatten(0, 2), finite_lse)


@dataclass(frozen=True, slots=True)
class _KeyGradients:
    """Sums over queries for one `KeyChunk`."""

    unit: Tensor | None  # (n, c, d)
    values: Tensor | None  # (n, c, dv)

    @classmethod
    def zeros(cls, chunk: KeyChunk, gradients: Gradients) -> _KeyGradients:
        values = chunk.values.shape[-1] - 1
        return cls(
            None if gradients.dk is None else torch.zeros_like(chunk.unit),
            None if gradients.dv is None else chunk.values.new_zeros(*chunk.values.shape[:2], values),
        )


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over tiles of all boxes, in the wide dtype."""

    dbias: Tensor | None  # (b0 | 1, b1 | 1, hk | 1, g | 1, i | 1, j | 1), or (..., 1, i + j - 1) if toeplitz
    dscale: Tensor | None  # (hk, g)

    @classmethod
    def of(cls, tiles: Tiles, gradients: Gradients) -> _Sums:
        q, k, dbias, dscale = tiles.problem.q, tiles.problem.k, gradients.dbias, gradients.dscale
        if dbias is not None:
            # Where nothing is summed each entry is written once, and rounded once, without a wide copy.
            is_sum = dbias.shape != (*q.shape[:4], k.shape[3])
            wide = tiles.problem.wide_dtype
            dbias = torch.zeros_like(dbias, dtype=wide) if is_sum and dbias.dtype != wide else dbias.zero_()
            dbias = tiles.bias_by_kv_head(dbias)
        kv_heads = k.shape[2]
        return cls(
            dbias, None if dscale is None else q.new_zeros(kv_heads, q.shape[2] // max(kv_heads, 1), dtype=dscale.dtype)
        )

    def add_dbias(self, tiles: Tiles, box: Box, rows: slice, keys: slice, d_scores: Tensor) -> None:
        """d_scores: of one tile, (x0, x1, y, g, r, c)."""
        assert self.dbias is not None
        if tiles.problem.toeplitz:
            target = broadcast_slice(self.dbias, (*box, slice(None), slice(None), tiles.diagonals(rows, keys)))
            shared = d_scores.sum_to_size(*target.shape[:4], *d_scores.shape[4:])
            target.add_(diagonal_sums(shared).unsqueeze(-2))
        else:
            target = broadcast_slice(self.dbias, (*box, slice(None), rows, keys))
            target.add_(d_scores.sum_to_size(target.shape))

    def write(self, gradients: Gradients) -> None:
        if gradients.dbias is not None and self.dbias is not None and self.dbias.dtype != gradients.dbias.dtype:
            gradients.dbias.copy_(self.dbias.view_as(gradients.dbias))
        if gradients.dscale is not None and self.dscale is not None:
            gradients.dscale.copy_(self.dscale.flatten())


def _backward_rows(
    this: Pass,
    upstream: _Upstream,
    box: Box,
    rows: slice,
    chunks: list[KeyChunk],
    totals: list[_KeyGradients],
    gradients: Gradients,
    sums: _Sums,
) -> None:
    """One step of queries against every key chunk: adds to `totals` and `sums`, writes gradients.dq."""
    unit, scale = this.tiles.unit_queries(this.outputs, box, rows), this.tiles.scale_of(box)
    queries = (unit * (scale * LOG2_E)).flatten(3, 4).flatten(0, 2)
    d_queries = torch.zeros_like(queries) if gradients.dq is not None or sums.dscale is not None else None
    for index in this.visible(rows, chunks):
        chunk, total = chunks[index], totals[index]
        if upstream.lse is None:
            weights = this.bounded_weights(box, rows, chunk, queries)
        else:
            weights = this.scores(box, rows, chunk, queries).sub_(upstream.lse).exp2_()
        if total.values is not None:
            total.values.baddbmm_(weights.mT, upstream.rows[..., :-1])
        if d_queries is None and total.unit is None and sums.dbias is None:
            continue
        d_scores = this.product(1, upstream.rows, chunk.values).mul_(weights)
        if sums.dbias is not None:
            sums.add_dbias(this.tiles, box, rows, chunk.keys, this.as_tile(d_scores, box, rows))
        if total.unit is not None:
            total.unit.baddbmm_(d_scores.mT, queries)
        if d_queries is not None:
            d_queries.baddbmm_(d_scores, chunk.unit)
    if d_queries is not None:
        _finish_queries(this, box, rows, this.as_tile(d_queries, box, rows), unit, gradients, sums)


def _finish_queries(
    this: Pass, box: Box, rows: slice, d_queries: Tensor, unit: Tensor, gradients: Gradients, sums: _Sums
) -> None:
    """d_queries: gradient of scale * qn, unit: qn, both (x0, x1, y, g, r, d)."""
    if sums.dscale is not None:
        sums.dscale[box[2]] += torch.linalg.vecdot(d_queries, unit).sum((0, 1, 4))
    if gradients.dq is not None:
        d_unit = d_queries * this.tiles.scale_of(box)
        if this.tiles.problem.l2norm_qk:
            d_unit = backward_of_norm(d_unit, unit, this.tiles.rows(this.outputs.q_rnorm, box, rows))
        this.tiles.rows(gradients.dq, box, rows).copy_(d_unit)


def _write_key_gradients(this: Pass, box: Box, chunk: KeyChunk, total: _KeyGradients, gradients: Gradients) -> None:
    at = (*box, chunk.keys)
    if gradients.dv is not None and total.values is not None:  # a masked key has a weight if nothing hid its scores
        target = gradients.dv[at]
        target.copy_(this.tiles.hide_keys(total.values.view(target.shape), box, chunk.keys))
    if gradients.dk is not None and total.unit is not None:
        target = gradients.dk[at]
        d_unit, unit = (total.unit * LN_2).view(target.shape), chunk.unit.view(target.shape)  # queries held log2(e)
        if this.tiles.problem.l2norm_qk:
            d_unit = backward_of_norm(d_unit, unit, this.outputs.k_rnorm[at])
        target.copy_(d_unit)
