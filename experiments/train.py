"""A single run.

    python -m experiments.train --attention cosine --steps 600
    python -m experiments.train --use-cuda-kernel --dtype bf16 --seq-len 8192 --dim 512 --heads 8 --batch-size 4
    python -m experiments.train --out runs/train --resume

Ctrl-C finishes the step, saves a checkpoint and leaves; --resume then goes on bit for bit as if it had not happened.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from .shared.checkpoint import load_checkpoint
from .shared.config import RunConfig, add_flags, from_dict, given, usage_errors
from .shared.data import load_corpus, unigram_entropy
from .shared.interrupt import INTERRUPTED, stop_requested
from .shared.plot import plot_losses
from .shared.progress import Progress
from .shared.run import CHECKPOINT, run_one


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    out: Path = options.out
    with usage_errors(parser):
        config = _config(options)
        corpus = load_corpus(config.data)
    print(corpus.describe())
    with stop_requested() as should_stop, closing(Progress(config.steps)) as progress:
        result = run_one(config, corpus, out, should_stop, progress, options.resume, options.checkpoint_every)
    if result is None:
        print(f"Stopped; saved in {out}. Go on with: python -m experiments.train --out {out} --resume")
        return INTERRUPTED
    plot_losses(out / "loss.png", {config.attention: [result["rows"]]}, corpus.name, unigram_entropy(corpus))
    print(f"\n{_summary(result)}\n\n{result['sample']}\nWritten to {out}")
    return 0


def _config(options: argparse.Namespace) -> RunConfig:
    """Of the flags, or the stopped run's own. ValueError if they contradict it or each other."""
    values = given(options)
    config = RunConfig(**values)
    if options.resume:
        config = from_dict(load_checkpoint(options.out / CHECKPOINT)["identity"])
    for name, value in values.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"--resume: the run in {options.out} has {name} = {getattr(config, name)!r}, not {value!r}"
            )
    if options.use_cuda_kernel and config.attention != "cosine":
        raise ValueError(f"--use-cuda-kernel: expected --attention cosine, got {config.attention}")
    return config


def _summary(result: dict[str, Any]) -> str:
    speed = (
        f", {result['ms_per_step']:.1f} ms a step, {result['tokens_per_s']:,.0f} bytes/s"
        if result["ms_per_step"]
        else ""
    )
    return (
        f"{result['val_bpb']:.3f} held-out bits per byte{speed}, peak memory {result['peak_memory'] / 1e6:.1f} MB, "
        f"fused calls {result['fused_calls']:,}, stock calls of enabled layers {result['stock_calls']:,}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.train",
        usage="%(prog)s [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="(default: runs/train)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--checkpoint-every", type=int, default=0, help="steps between checkpoints (default: 0, at the end only)"
    )
    add_flags(parser, skip=("model",))
    return parser


if __name__ == "__main__":
    sys.exit(main())
