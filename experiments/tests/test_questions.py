from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from experiments.shared.answer import best_rate, finals, interval, paired
from experiments.shared.config import RunConfig
from experiments.shared.interrupt import INTERRUPTED
from experiments.shared.question import Question, load_question, main, report_of

EXPERIMENTS = Path(__file__).parents[1]
QUESTIONS = sorted(path.parent for path in EXPERIMENTS.glob("*/arms.toml"))
NAMES = ("kernel_vs_plain", "scale_and_groups", "norm_placement", "stability")
LANGUAGE = [folder for folder in QUESTIONS if folder.name in NAMES]

names = pytest.mark.parametrize("folder", LANGUAGE, ids=lambda folder: folder.name)


def flags(tiny_flags: list[str], *more: str) -> list[str]:
    """Tiny on the CPU, with a head dim of 16 that 16 groups divide."""
    return [*tiny_flags, "--seeds", "2", "--lr", "3e-3", "--dtype", "fp32", *more]


@names
def test_the_plugin_serves_every_arm_too(folder: Path, tiny_flags: list[str], tmp_path: Path):
    question = load_question(folder)
    command = flags(
        tiny_flags, "--model", "x-transformers", "--heads", "1", "--seeds", "1", "--arms", *list(question.arms)[-2:]
    )
    assert main(folder, lambda *_: "", command) == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["fused_calls"] > 0 for run in runs] == [
        {**question.base, **question.arms[run["arm"]]}["attention"] == "cosine" for run in runs
    ]


@names
def test_every_arm_is_a_valid_run(folder: Path):
    question = load_question(folder)
    assert len(question.jobs(RunConfig(**question.base), 2)) == 2 * len(question.arms) * max(1, len(question.rates))
    assert question.compare


@names
def test_trains_resumes_and_reports(folder: Path, tiny_flags: list[str], tmp_path: Path, capsys):
    report = importlib.import_module(f"experiments.{folder.name}.__main__").report
    question = load_question(folder)
    arms = ["--arms", *list(question.arms)[:3]]
    command = flags(tiny_flags, *arms, "--heads", "1", "--log-every", "4")
    assert main(folder, report, [*command, "--time-limit", "0"]) == INTERRUPTED
    assert main(folder, report, [*command, "--together", "2"]) == 0
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert len(results["runs"]) == 6
    assert all("seed" in run["config"] and run["val_bpb"] > 0 for run in results["runs"])
    assert any(out.glob("*.png"))
    assert main(folder, report, command) == 0  # nothing is left to train
    assert json.loads((out / "results.json").read_text()) == results
    assert next(iter(question.arms)) in capsys.readouterr().out


def test_shards_share_the_runs(tiny_flags: list[str], tmp_path: Path):
    folder = EXPERIMENTS / "norm_placement"
    seen: list[dict[str, Any]] = []

    def report(_question: Question, content: dict[str, Any], _out: Path) -> str:
        seen.append(content)
        return ""

    command = flags(tiny_flags, "--arms", "pre regular", "post cosine")
    for shard in ("1/2", "2/2"):
        assert main(folder, report, [*command, "--shard", shard, "--tag", shard[0]]) == 0
    assert [len(content["runs"]) for content in seen] == [2, 4]
    keys = [(run["arm"], run["config"]["seed"]) for run in seen[-1]["runs"]]
    assert len(set(keys)) == 4


def test_a_rate_of_the_sweep_alone(tiny_flags: list[str], tmp_path: Path):
    folder = EXPERIMENTS / "norm_placement"
    for rate in ("1e-3", "3e-3"):
        command = flags(tiny_flags, "--arms", "pre regular", "--seeds", "1", "--lr", rate)
        assert main(folder, lambda *_: "", command) == 0
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [run["config"].get("lr", 3e-3) for run in runs] == [1e-3, 3e-3]


def test_results_of_another_base_are_refused(tiny_flags: list[str], capsys: pytest.CaptureFixture[str]):
    folder = EXPERIMENTS / "norm_placement"
    command = flags(tiny_flags, "--arms", "pre regular", "--seeds", "1")
    assert main(folder, lambda *_: "", command) == 0
    with pytest.raises(SystemExit):
        main(folder, lambda *_: "", [*command, "--warmup", "3"])
    assert "is of another base" in capsys.readouterr().err


@names
def test_the_results_in_git_are_of_these_arms(folder: Path):
    for path in folder.glob("results*.json"):
        content, question = json.loads(path.read_text()), load_question(folder)
        assert set(finals(content)) <= set(question.arms)
        for run in content["runs"]:
            assert run.get("stock_calls", 0) == 0
            assert (run.get("val_bpb") is None) == ("diverged_at" in run)
            mine = {**content["base"], **run["config"]}
            assert all(mine[name] == value for name, value in question.arms[run["arm"]].items())


@names
def test_report_of_the_results_in_git(folder: Path, tmp_path: Path):
    report = importlib.import_module(f"experiments.{folder.name}.__main__").report
    for path in folder.glob("results*.json"):
        assert report_of(load_question(folder), [path], report, tmp_path).count("|") > 20


def test_intervals_and_pairs():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert paired({0: 1.0, 1: 2.0, 2: 5.0}, {1: 1.5, 0: 1.5}) == [-0.5, 0.5]
    assert best_rate({1.0: {0: 2.0}, 2.0: {0: 1.0}, 3.0: {0: float("nan")}}) == 2.0
