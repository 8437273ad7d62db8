"""How sharply softmax can attend when its logits lie in [-B, B]: the best probability of one key among n.

Three ways for the other n - 1 keys to lie, seen from a query whose own key has cosine 1:

    opposite     all at cosine -1: p = 1 / (1 + (n - 1) exp(-2 B)). Possible where all distractors may be alike.
    orthogonal   all at cosine 0: p = e^B / (e^B + n - 1). The best, up to 1/n, where every key is some query's right
                 one: the mean cosine of n different unit vectors cannot be below -1 / (n - 1).
    random       in random directions of d dims: p = e^B / (e^B + (n - 1) E[e^(B cos)]). More keys than dims cannot all
                 be orthogonal (Welch 1974); E[e^(B cos)] = 0F1(; d/2; B^2/4).
"""

from __future__ import annotations

import math


def opposite(n: int, bound: float) -> float:
    return 1 / (1 + (n - 1) * math.exp(-2 * bound))


def orthogonal(n: int, bound: float) -> float:
    return 1 / (1 + (n - 1) * math.exp(-bound))


def random_directions(n: int, bound: float, dim: int) -> float:
    return 1 / (1 + (n - 1) * math.exp(-bound) * mean_exponential(bound, dim))


def mean_exponential(bound: float, dim: int) -> float:
    """E[exp(B cos)] of a random direction in `dim` dims: the series of 0F1(; dim/2; B^2/4), all terms positive."""
    total, term, k = 0.0, 1.0, 0
    while term > total * 1e-17:
        total += term
        k += 1
        term *= bound * bound / 4 / (k * (dim / 2 + k - 1))
    return total


def bound_for(n: int, probability: float) -> float:
    """The bound at which orthogonal distractors leave `probability`: log(n - 1) + log(p / (1 - p))."""
    return math.log(n - 1) + math.log(probability / (1 - probability))
