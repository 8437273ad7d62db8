from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.shared.config import RunConfig
from experiments.shared.data import Corpus
from experiments.shared.results_file import ResultsFile, config_of, curves, read_runs
from experiments.shared.together import Job

Tiny = Callable[..., RunConfig]

RESULT: dict[str, Any] = {
    "val_bpb": 2.5,
    "parameters": 10,
    "fused_calls": 4,
    "stock_calls": 0,
    "rows": [
        {"step": 2, "train_bpb": 3.123456, "grad_norm": 1.0},
        {"step": 4, "train_bpb": 3.0, "grad_norm": math.inf, "val_bpb": 2.5},
    ],
}


def test_what_is_noted_is_found_and_says_what_differs(tiny: Tiny, corpus: Corpus, tmp_path: Path):
    base, path = tiny(), tmp_path / "results.json"
    jobs = [Job(arm, tiny(scale=scale, seed=seed)) for seed in (0, 1) for arm, scale in (("s8", 8.0), ("s1", 1.0))]
    for job in jobs[:3]:
        ResultsFile(path, base, corpus, {}).add(job, RESULT)
    again = ResultsFile(path, tiny(data="another place", device="cpu"), corpus, {})
    assert [again.has(job) for job in jobs] == [True, True, True, False]
    content = json.loads(path.read_text())
    assert [run["config"] for run in content["runs"]] == [{"seed": 0}, {"scale": 1.0, "seed": 0}, {"seed": 1}]
    assert config_of(content, content["runs"][1])["scale"] == 1.0
    assert content["runs"][0]["curves"]["val_bpb"] == [2.5]


def test_infinity_is_valid_json(tmp_path: Path):
    columns = curves(RESULT["rows"])
    assert columns["train_bpb"] == [3.1235, 3.0]
    assert "Infinity" not in json.dumps(columns)


def test_files_of_different_experiments_are_not_mixed(tiny: Tiny, corpus: Corpus, tmp_path: Path):
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    for path, dim in zip(paths, (32, 64), strict=True):
        config = tiny(dim=dim)
        ResultsFile(path, config, corpus, {}).add(Job("arm", config), RESULT)
    with pytest.raises(ValueError, match="are of different experiments"):
        read_runs(paths)
    other = Corpus("other", corpus.train, corpus.val, "another text")
    with pytest.raises(ValueError, match="is of another corpus"):
        ResultsFile(paths[0], tiny(), other, {})
