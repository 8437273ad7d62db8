"""Sequences whose answer is to be found at one place among n: made on the device, from a generator alone.

    copy       n/2 different tokens, then the same again: each is to be predicted from where it stood before
    recall     n/4 keys with a value each, then the keys in another order: name the value (multi-query associative
               recall, Arora et al. 2023, at its densest: the pairs grow with the length)
    induction  a passage of different tokens somewhere in n tokens of filler, and again at the end (Olsson et al. 2022):
               its tokens are never filler, so that distractors can be told from it

In `copy` and `recall` every key is the right one for some query and a distractor for the others; in `induction` all
distractors are alike. The bound of the logits means something else for the two (theory.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TARGETS = 16  # positions of a sequence whose prediction counts
PASSAGE = 17  # tokens: 16 predictions


@dataclass(frozen=True)
class Sequences:
    """tokens (rows, n), positions (rows, t) of those whose successor is to be predicted, answers (rows, t); int64."""

    tokens: Tensor
    positions: Tensor
    answers: Tensor


def copy(rows: int, length: int, vocabulary: int, generator: torch.Generator) -> Sequences:
    half = length // 2
    first = _different(rows, half, vocabulary, generator)
    positions = _places(rows, half, length - 1, generator)
    tokens = torch.cat([first, first], dim=1)
    return Sequences(tokens, positions, tokens.gather(1, positions + 1))


def recall(rows: int, length: int, vocabulary: int, generator: torch.Generator) -> Sequences:
    pairs = length // 4
    keys = _different(rows, pairs, vocabulary // 2, generator)
    values = _uniform(rows, pairs, vocabulary // 2, vocabulary, generator)
    order = _different(rows, pairs, pairs, generator)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], dim=2).flatten(1)
    tokens = torch.cat([torch.stack([keys, values], dim=2).flatten(1), asked], dim=1)
    positions = 2 * _places(rows, pairs, 2 * pairs, generator)
    return Sequences(tokens, positions, tokens.gather(1, positions + 1))


def induction(rows: int, length: int, vocabulary: int, generator: torch.Generator) -> Sequences:
    device = generator.device
    tokens = _uniform(rows, length, vocabulary // 2, vocabulary, generator)
    passage = _different(rows, PASSAGE, vocabulary // 2, generator)
    start = _uniform(rows, 1, 0, length - 2 * PASSAGE + 1, generator)
    tokens.scatter_(1, start + torch.arange(PASSAGE, device=device), passage)
    tokens[:, length - PASSAGE :] = passage
    positions = torch.arange(length - PASSAGE, length - 1, device=device).expand(rows, -1).contiguous()
    return Sequences(tokens, positions, passage[:, 1:].contiguous())


Task = Callable[[int, int, int, torch.Generator], Sequences]
TASKS: dict[str, Task] = {"copy": copy, "recall": recall, "induction": induction}


def _different(rows: int, count: int, below: int, generator: torch.Generator) -> Tensor:
    """(rows, count): no number twice in a row."""
    return torch.rand(rows, below, generator=generator, device=generator.device).argsort(1)[:, :count]


def _uniform(rows: int, count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, (rows, count), generator=generator, device=generator.device)


def _places(rows: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    return _uniform(rows, TARGETS, low, high, generator)
