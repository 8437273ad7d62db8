"""A question: a folder with arms.toml (what differs between its arms, and nothing else), results.json and a README.

    python -m experiments.QUESTION                 train what results.json in --out lacks, then table and plots
    python -m experiments.QUESTION --report        table and plots of the results that came with the repository

arms.toml: seeds = N; compare = [[ONE, OTHER], ...] the pairs whose difference is the answer; [base] the fields of
RunConfig that all arms share; [arms.NAME] what an arm changes; [sweep] lr = [...], optional: each arm at each of them.
"""

from __future__ import annotations

import argparse
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .answer import described
from .config import Arm, RunConfig, add_flags, given, usage_errors, with_arm
from .data import load_corpus
from .environment import environment
from .grid import require_fused
from .interrupt import INTERRUPTED, stop_requested
from .progress import Progress
from .results_file import ResultsFile, read_runs
from .run_ensembles import run_ensembles
from .together import Job, Observer, run_together

Report = Callable[["Question", dict[str, Any], Path], str]  # (question, results, folder for plots) -> Markdown


@dataclass(frozen=True)
class Question:
    folder: Path
    base: dict[str, Any]
    arms: dict[str, Arm]
    rates: tuple[float, ...]
    seeds: int
    compare: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return self.folder.name

    def jobs(self, base: RunConfig, seeds: int) -> list[Job]:
        """Rate by rate, in each seed by seed over all arms: where time ends early, arms have equally many runs."""
        rates = self.rates or (base.lr,)
        return [
            Job(name, replace(with_arm(base, arm, seed), lr=rate))
            for rate in rates
            for seed in range(seeds)
            for name, arm in self.arms.items()
        ]


def load_question(folder: Path) -> Question:
    """Reads arms.toml; ValueError for a name that is not known."""
    content = tomllib.loads((folder / "arms.toml").read_text(encoding="utf-8"))
    unknown = set(content) - {"base", "arms", "sweep", "seeds", "compare"}
    pairs = tuple((one, other) for one, other in content.get("compare", []))
    missing = {name for pair in pairs for name in pair} - set(content["arms"])
    if unknown or missing:
        raise ValueError(f"{folder / 'arms.toml'}: unknown {', '.join(sorted(unknown | missing))}")
    rates = tuple(content.get("sweep", {}).get("lr", ()))
    return Question(folder, content["base"], content["arms"], rates, content.get("seeds", 3), pairs)


def main(folder: Path, report: Report, arguments: Sequence[str] | None = None) -> int:
    """The command line of a question."""
    question = load_question(folder)
    parser = _parser(question)
    options = parser.parse_args(arguments)
    if options.report:
        for path in sorted(folder.glob("results*.json")):
            print(report_of(question, [path], report, folder, path.stem.removeprefix("results")))
        return 0
    with usage_errors(parser):
        finished = _train(question, options)
    if not finished:
        print(f"Stopped; saved in {options.out}. The same command goes on.")
        return INTERRUPTED
    print(report_of(question, sorted(options.out.glob("results*.json")), report, options.out))
    return 0


def report_of(question: Question, paths: list[Path], report: Report, out: Path, suffix: str = "") -> str:
    """Markdown of the runs in `paths`; plots go to `out`, `suffix` at the end of their names."""
    content = {**read_runs(paths), "suffix": suffix}
    return f"{described(content)}\n\n{report(question, content, out)}"


def _train(question: Question, options: argparse.Namespace) -> bool:
    began = time.monotonic()
    values = given(options)
    rates = question.rates
    if rates and "lr" in values:  # one rate, not another base
        rates = (values.pop("lr"),)
    base = RunConfig(**{**question.base, **values})
    corpus = load_corpus(base.data)
    print(corpus.describe())
    arms = {name: question.arms[name] for name in options.arms or question.arms}
    shard, shards = options.shard
    jobs = _share(replace(question, arms=arms, rates=rates).jobs(base, options.seeds), shard, shards)
    path = options.out / (f"results-{options.tag}.json" if options.tag else "results.json")
    results = ResultsFile(path, base, corpus, environment())
    earlier = [ResultsFile(found, base, corpus, {}) for found in sorted(options.out.glob("results*.json"))]
    jobs = [job for job in jobs if not any(file.has(job) for file in earlier)]

    def note(job: Job, result: dict[str, Any]) -> None:
        if base.model != "ensemble":  # which raises where it would not be
            require_fused({job.name: [result]})
        results.add(job, result)

    with stop_requested() as asked, closing(Progress(sum(job.config.steps for job in jobs))) as progress:
        observer = Observer(progress.add, note)

        def should_stop() -> bool:
            return asked() or time.monotonic() - began > options.time_limit

        if base.model == "ensemble":
            return run_ensembles(jobs, corpus, options.together, should_stop, observer)
        return run_together(jobs, corpus, options.out / "checkpoints", options.together, should_stop, observer)


def _share(jobs: list[Job], shard: int, shards: int) -> list[Job]:
    """Every `shards`-th arm, with all its seeds and learning rates."""
    mine = list(dict.fromkeys(job.arm for job in jobs))[shard::shards]
    return [job for job in jobs if job.arm in mine]


def _parser(question: Question) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{question.name}", usage="%(prog)s [flags]")
    parser.add_argument("--report", action="store_true", help="train nothing: table and plots of the results in git")
    parser.add_argument("--arms", nargs="+", choices=list(question.arms), help="(default: all)")
    parser.add_argument("--seeds", type=int, default=question.seeds, help=f"runs an arm (default: {question.seeds})")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / question.name, help=f"(default: runs/{question.name})"
    )
    parser.add_argument(
        "--together", type=int, default=1, help="runs at a time, on a GPU with --cuda-graph (default: 1)"
    )
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds, then save and stop")
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="I/N: the I-th part of the arms, of N")
    parser.add_argument("--tag", help="write results-TAG.json: for processes that are at work at once, one TAG each")
    add_flags(parser, skip=("attention", "seed"))
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    shard, shards = int(index) - 1, int(count)
    if not 0 <= shard < shards:
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, got {text}")
    return shard, shards
