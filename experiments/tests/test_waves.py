"""A JSON file a run, what is missing of them, and intervals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from experiments.shared.waves import by_arm, deadline, interval, is_done, paired, read_results, waves, write_result


def test_a_run_is_done_once_its_file_is_there(tmp_path: Path):
    assert not is_done(tmp_path, "one", {"config": 1})
    write_result(tmp_path, "one", {"config": 1, "loss": 0.5})
    assert is_done(tmp_path, "one", {"config": 1})
    assert read_results(tmp_path) == [{"config": 1, "loss": 0.5}]
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
    with pytest.raises(ValueError, match="expected config = 2, got 1"):
        is_done(tmp_path, "one", {"config": 2})


def test_waves_hold_arms_of_the_same_missing_seeds():
    missing = {"a": (0, 1), "b": (), "c": (1,), "d": (0, 1), "e": (0, 1)}
    assert waves(missing, together=2) == [(["a", "d"], (0, 1)), (["e"], (0, 1)), (["c"], (1,))]
    assert waves({"a": ()}, together=3) == []


def test_runs_by_arm_and_in_pairs():
    runs = [{"arm": arm, "seed": seed} for arm, seed in [("b", 2), ("a", 1), ("b", 0), ("a", 0)]]
    arms = by_arm(runs, ["a", "unused", "b"])
    assert {name: [run["seed"] for run in found] for name, found in arms.items()} == {"a": [0, 1], "b": [0, 2]}
    assert [(one["arm"], other["arm"], one["seed"]) for one, other in paired(arms["b"], arms["a"])] == [("b", "a", 0)]


@pytest.mark.parametrize("count", [3, 6])
def test_intervals_hold_the_mean_95_times_of_100(count):
    held, trials = 0, 4000
    for values in torch.randn(trials, count).tolist():
        middle, half = (float(part) for part in interval(values).split(" +- "))
        held += abs(middle) <= half
    assert held / trials == pytest.approx(0.95, abs=0.015)


def test_an_interval_of_one_is_its_value():
    assert interval([0.5]) == "0.500"
    assert interval([0.5], digits=1, sign=True) == "+0.5"


def test_deadlines():
    assert not deadline(0, lambda: False)()
    assert not deadline(1e6, lambda: False)()
    assert deadline(1e-9, lambda: False)()
    assert deadline(math.inf, lambda: True)()
