"""How often each layer ran fused and how often stock, so that nobody measures the stock path by mistake."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn
from x_transformers.attend import Attend

COMPILED_CALLS = "cosine_sim_compiled_calls"
"""Non-persistent buffer (2,) int64 of an enabled attend module: [fused, stock] calls inside compiled graphs."""


@dataclass(frozen=True)
class LayerCounts:
    """Calls of one layer since `enable` or `reset`; `reasons` says why calls ran stock."""

    fused: int
    stock: int
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Counters:
    """Calls of all enabled layers. Recomputation by activation checkpointing counts again."""

    layers: dict[str, LayerCounts]

    @property
    def fused(self) -> int:
        return sum(layer.fused for layer in self.layers.values())

    @property
    def stock(self) -> int:
        return sum(layer.stock for layer in self.layers.values())

    def __str__(self) -> str:
        lines = [f"fused {self.fused}, stock {self.stock}"]
        for path, layer in self.layers.items():
            why = "".join(f"; {count} x {reason}" for reason, count in layer.reasons.items())
            lines.append(f"  {path or '(the module itself)'}: fused {layer.fused}, stock {layer.stock}{why}")
        return "\n".join(lines)


@dataclass
class Tally:
    """The counts of one layer, as it keeps them."""

    fused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def count(self, attend: Attend, stock_reason: str | None) -> None:
        """Compiled graphs count in a tensor: a Python int would be a constant of the graph, or recompile it."""
        if torch.compiler.is_compiling():
            getattr(attend, COMPILED_CALLS)[0 if stock_reason is None else 1].add_(1)
        elif stock_reason is None:
            self.fused += 1
        else:
            self.reasons[stock_reason] += 1


def _layer_counts(attend: Attend) -> LayerCounts:
    tally = attend.cosine_sim.tally
    compiled_fused, compiled_stock = getattr(attend, COMPILED_CALLS).tolist()
    reasons = dict(tally.reasons)
    if compiled_stock:
        reasons["stock inside a compiled graph"] = compiled_stock
    return LayerCounts(tally.fused + compiled_fused, sum(reasons.values()), reasons)


def enabled_layers(model: nn.Module) -> dict[str, Attend]:
    """Path of the Attention -> its attend module, for every layer that `enable` has taken, in order."""
    layers = {}
    for path, module in model.named_modules():
        attend = getattr(module, "attend", None)
        if isinstance(attend, nn.Module) and "cosine_sim" in vars(attend):
            layers[path] = attend
    return layers


def counters(model: nn.Module) -> Counters:
    """Calls per layer path; a model that was never enabled has no layers here, and zero fused calls."""
    return Counters({path: _layer_counts(attend) for path, attend in enabled_layers(model).items()})


def reset(model: nn.Module) -> None:
    """Set all counters of the model to zero."""
    for attend in enabled_layers(model).values():
        attend.cosine_sim.tally = Tally()
        getattr(attend, COMPILED_CALLS).zero_()
