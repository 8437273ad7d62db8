"""Trains every arm on distance completion, several seeds each; writes results.json, summary.md and rmse.png.

    python -m experiments.triangle_attention.train                              minutes on a GPU
    python -m experiments.triangle_attention.train --tiny --device cpu --dtype fp32     a minute on the CPU
    python -m experiments.triangle_attention.train --resume                     keeps the runs that are finished

The arms of a seed start from the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..shared.config import DTYPES, require_device, usage_errors
from ..shared.interrupt import INTERRUPTED, stop_requested
from ..shared.metrics import write_json
from .network import ARMS, PairNetwork
from .report import write_report
from .task import Batch, Task, constant_rmse, make_batch, triangle_bounds_rmse

RESULTS = Path(__file__).parent / "results"
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class Setting:
    """Everything that a result depends on but the arm and the seed."""

    task: Task = field(default_factory=Task)
    dim: int = 64
    depth: int = 3
    heads: int = 4
    dim_head: int = 16
    batch_size: int = 16
    steps: int = 1500
    lr: float = 2e-3  # peak; linear warmup over a twentieth of the steps, then linearly down to a tenth
    eval_every: int = 100
    eval_size: int = 256
    dtype: str = "bf16"  # autocast, or fp32
    device: str = "cuda"


TINY = Setting(Task(points=16, fewest=8), dim=32, depth=2, heads=2, batch_size=4, steps=60, eval_every=20, eval_size=16)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    with usage_errors(parser):
        require_device(options.device)
    setting = replace(TINY if options.tiny else Setting(), dtype=options.dtype, device=options.device)
    setting = replace(setting, steps=options.steps or setting.steps)
    with stop_requested() as asked:
        deadline = time.monotonic() + options.seconds
        finished = run_all(setting, options, lambda: asked() or time.monotonic() > deadline)
    if not finished:
        print(f"Stopped; finished runs are in {options.out}. The same command with --resume goes on.")
        return INTERRUPTED
    print(write_report(options.out, reference(setting)))
    return 0


def run_all(setting: Setting, options: argparse.Namespace, should_stop: Callable[[], bool]) -> bool:
    """One file for each (arm, seed) in out/runs; False if stopped before the last."""
    runs: Path = options.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.arms:
            path = runs / f"{name.replace(', ', '-')}-seed{seed}.json"
            if options.resume and path.exists() and json.loads(path.read_text())["setting"] == asdict(setting):
                continue
            result = train(name, setting, seed, should_stop)
            if result is None:
                return False
            write_json(path, result)
    return True


def train(name: str, setting: Setting, seed: int, should_stop: Callable[[], bool] = lambda: False) -> Any:
    """-> {arm, seed, setting, parameters, ms_per_step, rows: [{step, train_rmse, rmse}]}; None if stopped."""
    network = make_network(name, setting, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=setting.lr, weight_decay=0.01)
    generator = torch.Generator(setting.device).manual_seed(seed)
    held_out = held_out_batch(setting)
    rows: list[dict[str, float]] = []
    losses: list[Tensor] = []
    began, validating = time.perf_counter(), 0.0
    for step in tqdm(range(1, setting.steps + 1), desc=f"{name}, seed {seed}", mininterval=5, leave=False):
        if should_stop():
            return None
        optimizer.param_groups[0]["lr"] = learning_rate(setting, step)
        losses.append(_step(network, optimizer, make_batch(setting.task, setting.batch_size, generator), setting))
        if step % setting.eval_every == 0 or step == setting.steps:
            train_rmse = torch.stack(losses).mean().sqrt().item()  # waits for the device
            paused = time.perf_counter()
            rows.append({"step": step, "train_rmse": train_rmse, "rmse": evaluate(network, held_out, setting)})
            losses.clear()
            validating += time.perf_counter() - paused
    return {
        "arm": name,
        "seed": seed,
        "setting": asdict(setting),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "ms_per_step": (time.perf_counter() - began - validating) * 1000 / setting.steps,
        "rows": rows,
    }


def make_network(name: str, setting: Setting, seed: int) -> nn.Module:
    """Parameters that two arms share by name are equal: each layer has a seed of its own."""
    network = PairNetwork(ARMS[name], setting.dim, setting.depth, setting.heads, setting.dim_head)
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear) and bool(module.weight.any()):  # what starts at zero stays there
            torch.manual_seed(zlib.crc32(f"{path} {seed}".encode()))
            module.reset_parameters()
    return network.to(setting.device)


def learning_rate(setting: Setting, step: int) -> float:
    """step counts from 1."""
    warmup = max(1, setting.steps // 20)
    down = (step - warmup) / max(1, setting.steps - warmup)
    return setting.lr * (step / warmup if step < warmup else 1 - 0.9 * down)


def evaluate(network: nn.Module, held_out: Batch, setting: Setting) -> float:
    """Root mean square error over the missing pairs, in edges of the cube."""
    with torch.no_grad():
        parts = zip(*(x.split(setting.batch_size) for x in _tensors(held_out)), strict=True)
        errors = [_errors(network, Batch(*part), setting) for part in parts]
    return torch.cat(errors).square().mean().sqrt().item()


def held_out_batch(setting: Setting) -> Batch:
    generator = torch.Generator(setting.device).manual_seed(HELD_OUT_SEED)
    return make_batch(setting.task, setting.eval_size, generator)


def reference(setting: Setting) -> dict[str, float]:
    """RMSE without learning: of the best constant, and of the middle between the triangle inequality's bounds."""
    batch = held_out_batch(setting)
    return {"constant": constant_rmse(batch), "middle of the triangle bounds": triangle_bounds_rmse(batch)}


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, setting: Setting) -> Tensor:
    loss = _errors(network, batch, setting).square().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _errors(network: nn.Module, batch: Batch, setting: Setting) -> Tensor:
    device_type = torch.device(setting.device).type
    with torch.autocast(device_type, DTYPES[setting.dtype], enabled=setting.dtype != "fp32"):
        distance = network(batch.features, batch.mask)
    return (distance - batch.target)[batch.missing]


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return batch.features, batch.mask, batch.target, batch.missing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.triangle_attention.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help=f"(default: {Setting.steps})")
    parser.add_argument("--tiny", action="store_true", help="16 points, two small blocks: a minute on the CPU")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16: autocast")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so long, to go on with --resume"
    )
    parser.add_argument("--resume", action="store_true", help="keep the runs that are finished")
    parser.add_argument("--out", type=Path, default=Path("runs/triangle_attention"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
