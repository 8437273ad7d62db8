from __future__ import annotations

import torch

from experiments.shared.memory import peak_memory_of

CPU = torch.device("cpu")
MEGABYTE = torch.empty(2**18)  # float32
SLACK = 10_000  # small change: constants, one-element tensors


def measure(steps: int) -> int:
    """`steps` temporaries one after the other, each freed before the next but one."""

    def step() -> None:
        value = MEGABYTE
        for _ in range(steps):
            value = value * 2

    return peak_memory_of(step, CPU, lambda: [MEGABYTE])


def test_the_peak_is_what_is_alive_at_one_time():
    assert abs(measure(1) - 2 * 2**20) < SLACK
    assert abs(measure(5) - 3 * 2**20) < SLACK


def test_it_is_the_same_again():
    assert measure(3) == measure(3)
