"""The results of an experiment as one small JSON file: what goes into git, what a later run continues from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import RunConfig
from .data import Corpus
from .together import Job

GRADIENT = ("grad_norm", "grad_norm_max")
"""Before clipping; the second the largest since the row before."""

FIGURES = (
    "parameters",
    "val_bpb",
    "diverged_at",
    "fused_calls",
    "stock_calls",
    "learned_scales",
    "ms_per_step",
    "skipped_steps",
)

PLACE = ("data", "device", "seed")
"""Fields that name where a run's data and device are; which text it was, the corpus' sha256 says."""


class ResultsFile:
    """`runs` of finished jobs, each with its arm, what differs from the experiment's base, figures and curves."""

    def __init__(self, path: Path, base: RunConfig, corpus: Corpus, environment: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "corpus": {"name": corpus.name, "sha256": corpus.sha256},
            "environment": dict(environment),
            "base": _described(base),
            "runs": [],
        }
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            for part in ("corpus", "base"):
                if earlier[part] != self.content[part]:
                    raise ValueError(f"{path} is of another {part}: {earlier[part]}, now {self.content[part]}")
            self.content = earlier

    def has(self, job: Job) -> bool:
        return any(run["arm"] == job.arm and run["config"] == self._differences(job) for run in self.content["runs"])

    def add(self, job: Job, result: Mapping[str, Any]) -> None:
        """Notes a result, as `Trainer.result` gives it, and writes the file."""
        config = self._differences(job)
        figures = {name: result[name] for name in FIGURES if result.get(name) not in (None, [])}
        self.content["runs"].append({"arm": job.arm, "config": config, **figures, "curves": curves(result["rows"])})
        write_atomically(self.path, self.content)

    def _differences(self, job: Job) -> dict[str, Any]:
        base, mine = self.content["base"], {**_described(job.config), "seed": job.config.seed}
        return {name: value for name, value in mine.items() if name not in base or base[name] != value}


def _described(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in PLACE}


def read_runs(paths: list[Path]) -> dict[str, Any]:
    """The content of one or several files of the same experiment, their runs together."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for content, path in zip(contents, paths, strict=True):
        if (content["base"], content["corpus"]) != (contents[0]["base"], contents[0]["corpus"]):
            raise ValueError(f"{path} and {paths[0]} are of different experiments")
    return {**contents[0], "runs": [run for content in contents for run in content["runs"]]}


def config_of(content: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a run's configuration, the places aside."""
    known = {spec.name for spec in fields(RunConfig)}
    return {name: value for name, value in {**content["base"], **run["config"]}.items() if name in known}


def curves(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Rows -> columns, with five digits: step and the training's metrics; val_step and what validations found."""
    validated = [row for row in rows if "val_bpb" in row]
    return {
        "step": [row["step"] for row in rows],
        **{name: [_round(row[name]) for row in rows if name in row] for name in ("train_bpb", *GRADIENT)},
        "val_step": [row["step"] for row in validated],
        **{name: [_round(row[name]) for row in validated if name in row] for name in ("val_bpb", "max_logit")},
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}") if math.isfinite(value) else 1e30  # JSON knows no infinity


def write_atomically(path: Path, content: Mapping[str, Any]) -> None:
    """One run a line: a diff then shows which were added."""
    runs = ",\n".join("    " + json.dumps(run) for run in content["runs"])
    head = {name: value for name, value in content.items() if name != "runs"}
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "runs": [\n{runs}\n  ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
