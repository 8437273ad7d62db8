"""Arms x seeds through the one train loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from .config import Arm, RunConfig, with_arm
from .data import Corpus
from .progress import Progress
from .run import run_one

Results = dict[str, list[dict[str, Any]]]  # arm -> one result a seed, see Trainer.result


def run_grid(
    base: RunConfig,
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    corpus: Corpus,
    out: Path,
    should_stop: Callable[[], bool],
    resume: bool = False,
) -> Results | None:
    """The results of all runs, or None if `should_stop` ended it early: `resume` then goes on where it stopped."""
    configs = {(name, seed): with_arm(base, arm, seed) for name, arm in arms.items() for seed in seeds}
    results: dict[tuple[str, int], dict[str, Any]] = {}
    with closing(Progress(sum(config.steps for config in configs.values()))) as progress:
        for name, seed in _order(list(arms), seeds):
            progress.label(f"{name}, seed {seed}")
            folder = out / f"{name}-seed{seed}"
            result = run_one(configs[name, seed], corpus, folder, should_stop, progress, resume)
            if result is None:
                return None
            results[name, seed] = result
    return {name: [results[name, seed] for seed in seeds] for name in arms}


def _order(arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Seed by seed, every other one backwards: a machine that slows down does not slow the same arm each time."""
    return [
        (arm, seed) for index, seed in enumerate(seeds) for arm in (arms if index % 2 == 0 else list(reversed(arms)))
    ]


def require_fused(results: Results) -> None:
    """RuntimeError if an arm that should run the fused attention ran another: its figures would mean nothing."""
    for arm, seeds in results.items():
        for result in seeds:
            if result["config"]["attention"] == "cosine" and (result["stock_calls"] or not result["fused_calls"]):
                raise RuntimeError(
                    f"{arm}: expected fused attention calls only, got {result['fused_calls']} fused "
                    f"and {result['stock_calls']} stock"
                )
