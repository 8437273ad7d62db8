"""AdamW, its schedule, and the clock of a step."""

from __future__ import annotations

import math
import time
from statistics import median

import torch
from torch import Tensor, nn

from .config import RunConfig
from .model import LEARNED_SCALE

FINAL_LR = 0.1  # of the peak
BETAS = (0.9, 0.95)


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Weight decay for matrices, none for gains and biases. A group's `rate_factor` multiplies the learning rate.

    A learned scale starts at 8, say, where weights are of the order of 0.1, and AdamW moves both by the learning rate:
    its factor is its first value, so that a step changes it by the same share as a learned logarithm would change.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = [parameter for name, parameter in named if name.endswith(LEARNED_SCALE)]
    others = [parameter for name, parameter in named if not name.endswith(LEARNED_SCALE)]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay, "rate_factor": 1.0},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, "rate_factor": 1.0},
    ]
    if scales:
        groups.append({"params": scales, "weight_decay": 0.0, "rate_factor": config.scale})
    if not config.cuda_graph:
        return torch.optim.AdamW(groups, lr=config.lr, betas=BETAS)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=BETAS, capturable=True, fused=True)
    rates_on_device(optimizer, torch.device(config.device))
    return optimizer


def rates_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """The learning rates as tensors, which a captured step reads anew at each replay."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)


def set_rates(optimizer: torch.optim.Optimizer, rate: float | Tensor) -> None:
    """The learning rate of this step, in each group with its factor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(rate * group["rate_factor"])
        else:
            group["lr"] = rate * group["rate_factor"]


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warmup to config.lr, then a cosine down to a tenth of it at the last step. step counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.lr * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class StepTimer:
    """Wall time of steps, taken over the stretches between two rows of the metrics.

    The stream is synchronised at the ends of a stretch only, so that measuring does not slow what it measures.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = 0.0
        self._steps = 0
        self._ms_per_step: list[float] = []

    def start(self) -> None:
        """Begins a stretch; one that was not stopped is forgotten."""
        self._synchronize()
        self._steps, self._began = 0, time.perf_counter()

    def count_step(self) -> None:
        self._steps += 1

    def stop(self) -> None:
        self._synchronize()
        if self._steps:
            self._ms_per_step.append((time.perf_counter() - self._began) * 1000 / self._steps)

    def median_ms(self) -> float | None:
        """Milliseconds a step, the median over stretches; None if there was none."""
        return median(self._ms_per_step) if self._ms_per_step else None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
