"""Biases that depend on the relative position of key and query alone, described by O(n) or O(heads) parameters.

An instance is what `attn_bias` of `flash_cosine_sim_attention` takes in place of an (h, i, j) tensor. The (i, j) matrix
of such a bias is a Toeplitz matrix: it has nq + nk - 1 diagonals, and on each of them it is constant. The fused paths
read those diagonals, one row of numbers a head, and never make the matrix; its gradient is summed over each diagonal,
and autograd carries it on to the parameters.

    rel_ij = j - (i + nk - nq)                 in -(nk - 1) .. nq - 1; the last query stands at the last key, as in
                                               causal attention and with a key-value cache
    bias_ij = values(rel_ij) = diagonals[nq - 1 + j - i]

A form of one's own is a subclass with `leading` and `values`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class PositionBias(ABC):
    """A bias bias_ij = values(rel_ij): see the module. Instances are immutable; all methods are differentiable."""

    @property
    @abstractmethod
    def leading(self) -> tuple[int, ...]:
        """The dims in front of positions: (h,) or (1,), or more that broadcast to (*batch, h)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """That of the parameters; has to be the device of q."""

    @abstractmethod
    def values(self, relative_position: Tensor, dtype: torch.dtype) -> Tensor:
        """relative_position: int64 of any shape, key minus query -> (*leading, *relative_position.shape) in dtype."""

    def check_lengths(self, nq: int, nk: int) -> None:  # noqa: B027
        """Raise ValueError if some relative position of nq queries and nk keys has no value. Nothing to check here."""

    def diagonals(self, nq: int, nk: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The distinct entries of `materialize`, (*leading, nq + nk - 1): that of pair (i, j) is nq - 1 + j - i."""
        self.check_lengths(nq, nk)
        return self.values(torch.arange(1 - nk, max(nq, 1 - nk), device=self.device), dtype).to(dtype)

    def materialize(self, nq: int, nk: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense bias (*leading, nq, nk): the definition, for the reference path and for checks. O(n^2) memory."""
        self.check_lengths(nq, nk)
        queries = torch.arange(nq, device=self.device) + (nk - nq)
        keys = torch.arange(nk, device=self.device)
        return self.values(keys - queries.unsqueeze(-1), dtype).to(dtype)


def _check_parameter(name: str, value: object, ndim: int, form: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape {form}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    if value.ndim < ndim:
        raise ValueError(f"{name}: expected {form}, got shape {tuple(value.shape)}")


@dataclass(frozen=True, eq=False)
class AlibiBias(PositionBias):
    """Attention with linear biases: bias_ij = -slope |rel_ij|.

    With `future_slopes` the two sides differ: -slope |rel_ij| where the key comes before the query,
    -future_slope |rel_ij| where it comes after; zeros there make the one-sided form. With causal attention nothing
    comes after.

    Args:
        slopes: (h,) or (1,), any floating dtype; (*batch | 1, h | 1) for slopes of their own for each batch element.
            `alibi_slopes(h)` gives the published ones. A gradient is computed if they require one.
        future_slopes: the same shape, dtype and device; None: equal to `slopes`.

    Raises:
        TypeError, ValueError: tensors of another type, dtype, shape or device.

    Source: Press et al., Train short, test long: attention with linear biases enables input length extrapolation
    (2022).

    Example:
        >>> bias = AlibiBias(alibi_slopes(8))
        >>> bias.materialize(2, 3)[0]
        tensor([[-0.5000,  0.0000, -0.5000],
                [-1.0000, -0.5000,  0.0000]])
    """

    slopes: Tensor
    future_slopes: Tensor | None = None

    def __post_init__(self) -> None:
        _check_parameter("slopes", self.slopes, 1, "(heads,) or (*batch, heads)")
        if self.future_slopes is None:
            return
        _check_parameter("future_slopes", self.future_slopes, 1, "that of slopes")
        for what in ("shape", "dtype", "device"):
            past, future = getattr(self.slopes, what), getattr(self.future_slopes, what)
            if past != future:
                raise ValueError(f"future_slopes: expected the {what} of slopes, {past}, got {future}")

    @property
    def leading(self) -> tuple[int, ...]:
        return tuple(self.slopes.shape)

    @property
    def device(self) -> torch.device:
        return self.slopes.device

    def values(self, relative_position: Tensor, dtype: torch.dtype) -> Tensor:
        def times(slopes: Tensor, distance: Tensor) -> Tensor:
            return slopes.to(dtype).reshape(*slopes.shape, *(1,) * distance.ndim) * distance

        if self.future_slopes is None:
            return times(self.slopes, -relative_position.abs())
        return times(self.slopes, relative_position.clamp_max(0)) - times(
            self.future_slopes, relative_position.clamp_min(0)
        )


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of Press et al. (2022), (heads,) float32: 2^(-8/heads), 2^(-16/heads), ...; where heads is no power of
    two, those of the power of two below it, then every other one of the power of two above it.
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads: expected a positive int, got {heads!r}")
    power = 1 << (heads.bit_length() - 1)
    exponents = [8 * (head + 1) / power for head in range(power)]
    exponents += [8 * (head + 1) / (2 * power) for head in range(0, 2 * power, 2)]
    return torch.tensor([2.0**-exponent for exponent in exponents[:heads]])


@dataclass(frozen=True, eq=False)
class T5Bias(PositionBias):
    """T5's relative position bias: bias_ij = weight[bucket(rel_ij), head].

    Near positions have a bucket each, from half of the buckets on they widen logarithmically up to `max_distance`, and
    the last one holds everything beyond. `bidirectional` gives keys after the query half of the buckets; otherwise all
    of them share bucket 0, as in T5's causal decoder. Buckets agree with those of T5's published implementations.

    Args:
        weight: (num_buckets, h) or (num_buckets, 1), any floating dtype: the layout of `torch.nn.Embedding.weight`.
            Where a model scales its bias, hand in `scale * weight`.
        bidirectional: False for the causal form.
        max_distance: from which on all positions share a bucket.

    Raises:
        TypeError, ValueError: a weight of another type, dtype or shape; fewer than 4 buckets (2 unless bidirectional);
            a max_distance that the exact buckets reach already.

    Source: Raffel et al., Exploring the limits of transfer learning with a unified text-to-text transformer (2020).

    Example:
        >>> embedding = torch.nn.Embedding(32, 8)
        >>> T5Bias(embedding.weight).materialize(128, 128).shape
        torch.Size([8, 128, 128])
    """

    weight: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        _check_parameter("weight", self.weight, 2, "(num_buckets, heads)")
        if self.weight.ndim != 2:
            raise ValueError(f"weight: expected (num_buckets, heads), got shape {tuple(self.weight.shape)}")
        smallest = 4 if self.bidirectional else 2
        if self.weight.shape[0] < smallest:
            raise ValueError(
                f"weight: expected at least {smallest} buckets with bidirectional={self.bidirectional}, "
                f"got shape {tuple(self.weight.shape)}"
            )
        if self.max_distance <= self._exact_buckets:
            raise ValueError(
                f"max_distance: expected more than the {self._exact_buckets} positions that have a bucket each, "
                f"got {self.max_distance}"
            )

    @property
    def _exact_buckets(self) -> int:
        return self.weight.shape[0] // (4 if self.bidirectional else 2)

    @property
    def leading(self) -> tuple[int, ...]:
        return (self.weight.shape[1],)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def buckets(self, relative_position: Tensor) -> Tensor:
        """Bucket of each relative position, int64, the same shape."""
        exact, num_buckets = self._exact_buckets, self.weight.shape[0] // (2 if self.bidirectional else 1)
        distance = relative_position.abs() if self.bidirectional else (-relative_position).clamp_min(0)
        octaves = torch.log(distance.clamp_min(1).float() / exact) / math.log(self.max_distance / exact)
        wide = (exact + (octaves * (num_buckets - exact)).long()).clamp_max(num_buckets - 1)
        bucket = torch.where(distance < exact, distance, wide)
        return bucket + (relative_position > 0) * num_buckets if self.bidirectional else bucket

    def values(self, relative_position: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(self.buckets(relative_position), self.weight.to(dtype)).movedim(-1, 0)


@dataclass(frozen=True, eq=False)
class RelativeBias(PositionBias):
    """A value for each relative position: bias_ij = table[..., length // 2 + rel_ij].

    The table may be a parameter, or come from a network over the distances (dynamic position bias): its gradient is
    O(n) in memory too.

    Args:
        table: (h, 2 n - 1) or (1, 2 n - 1) for relative positions -(n - 1) .. n - 1, any floating dtype;
            (*batch | 1, h | 1, 2 n - 1) for tables of their own for each batch element.
        clamp: what lies beyond the table takes the value at its end; otherwise that is an error.

    Raises:
        TypeError, ValueError: a table of another type, dtype or shape; in use, one that is too short for the lengths
            without `clamp`: n has to be at least max(nq, nk).

    Sources: Shaw et al., Self-attention with relative position representations (2018); Wang et al., CrossFormer (2022),
    for the dynamic form.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8))
        >>> distances = torch.arange(-127.0, 128.0)
        >>> bias = RelativeBias(mlp(distances[:, None]).T)  # for up to 128 queries and keys
    """

    table: Tensor
    clamp: bool = False

    def __post_init__(self) -> None:
        form = "(heads, 2 n - 1) or (*batch, heads, 2 n - 1)"
        _check_parameter("table", self.table, 2, form)
        if self.table.shape[-1] % 2 == 0:
            raise ValueError(f"table: expected {form}, an odd last dim, got shape {tuple(self.table.shape)}")

    @property
    def leading(self) -> tuple[int, ...]:
        return tuple(self.table.shape[:-1])

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def _middle(self) -> int:
        return self.table.shape[-1] // 2

    def check_lengths(self, nq: int, nk: int) -> None:
        if not self.clamp and max(nq, nk) > self._middle + 1:
            raise ValueError(
                f"table: expected a last dim of at least 2 * max(queries, keys) - 1 = {2 * max(nq, nk) - 1} for "
                f"{nq} queries and {nk} keys, got shape {tuple(self.table.shape)}; use clamp=True to extend its ends"
            )

    def values(self, relative_position: Tensor, dtype: torch.dtype) -> Tensor:
        index = relative_position + self._middle
        return self.table.to(dtype)[..., index.clamp(0, self.table.shape[-1] - 1) if self.clamp else index]

    def diagonals(self, nq: int, nk: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.clamp:
            return super().diagonals(nq, nk, dtype)
        self.check_lengths(nq, nk)
        return self.table[..., self._middle - nk + 1 : self._middle + nq].to(dtype)  # they lie side by side
