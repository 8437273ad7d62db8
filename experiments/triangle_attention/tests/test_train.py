"""Task, training and benchmark at tiny sizes on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from experiments.shared.interrupt import INTERRUPTED
from experiments.triangle_attention import bench, train, training
from experiments.triangle_attention.network import ARMS
from experiments.triangle_attention.task import Task, constant_rmse, make_batch, triangle_bounds_rmse

FLAGS = ["--tiny", "--device", "cpu", "--dtype", "fp32", "--steps", "4"]


def test_a_batch_hides_what_it_asks_for_and_obeys_the_triangle_inequality():
    batch = make_batch(Task(points=40, fewest=32), 3, torch.Generator().manual_seed(0))
    distance, known = batch.features.unbind(-1)
    assert not distance[batch.missing].any()
    assert not known[batch.missing].any()
    assert (batch.missing == batch.missing.mT).all()
    assert not batch.missing[~batch.mask].any()
    assert batch.mask.diagonal(dim1=1, dim2=2).sum(1).min() >= 32
    assert ((distance - batch.target)[known > 0].abs() < 0.1).all()
    assert (batch.target[:, :, :, None] <= batch.target[:, :, None] + batch.target[:, None] + 1e-5).all()
    assert 0 < triangle_bounds_rmse(batch) < constant_rmse(batch)


@pytest.mark.parametrize("name", ARMS)
def test_arms_share_weights_and_give_symmetric_distances(name):
    setting = replace(train.TINY, device="cpu")
    network = training.make_network(name, setting, seed=3)
    batch = make_batch(setting.task, 2, torch.Generator().manual_seed(0))
    distance = network(batch.features, batch.mask)
    torch.testing.assert_close(distance, distance.mT)
    same, other = (dict(training.make_network("triangle, fused", setting, seed).named_parameters()) for seed in (3, 4))
    assert all(torch.equal(x, same[key]) for key, x in network.named_parameters() if key in same)
    assert not torch.equal(network.get_parameter("embed.weight"), other["embed.weight"])


def test_fused_and_plain_train_alike_and_a_run_is_resumed(tmp_path, capsys):
    flags = [*FLAGS, "--seeds", "0", "1", "--out", str(tmp_path)]
    assert train.main([*flags, "--seconds", "0"]) == INTERRUPTED
    assert train.main(flags) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"].keys() == ARMS.keys()
    fused, plain = (
        [row["rmse"] for run in results["arms"][f"triangle, {x}"] for row in run["rows"]] for x in ("fused", "plain")
    )
    assert fused == pytest.approx(plain, abs=1e-4)
    assert (tmp_path / "rmse.png").stat().st_size > 0
    assert "Fused minus plain, same seed:" in capsys.readouterr().out
    before = (tmp_path / "runs" / "axial-seed1.json").stat().st_mtime_ns
    assert train.main([*flags, "--resume"]) == 0
    assert (tmp_path / "runs" / "axial-seed1.json").stat().st_mtime_ns == before


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    setting = replace(train.TINY, device="cpu", dtype="fp32", steps=6, eval_every=2)
    whole = training.Training("triangle, fused", setting, 0)
    while not whole.finished:
        whole.run_to_next_row()
    first, second = (training.Training("triangle, fused", setting, 0) for _ in range(2))
    first.run_to_next_row()
    first.save(tmp_path / "run.pt")
    second.load(tmp_path / "run.pt")
    while not second.finished:
        second.run_to_next_row()
    assert second.rows == whole.rows
    with pytest.raises(ValueError, match="expected a checkpoint of"):
        training.Training("axial", replace(setting, steps=7), 0).load(tmp_path / "run.pt")


def test_the_bench_checks_against_float64_and_writes_its_files(tmp_path, capsys):
    variants = [name for name in bench.VARIANTS if "compiled" not in name]
    flags = ["--sizes", "8", "--device", "cpu", "--dtypes", "fp32", "--rounds", "2", "--out", str(tmp_path)]
    assert bench.main([*flags, "--variants", *variants]) == 0
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert [record["variant"] for record in records] == variants
    for record in records:
        assert record["status"] == "ok"
        assert record["variant"] == "no attention" or max(record["errors"].values()) < 1e-5
    assert (tmp_path / "bench.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "bench.png").stat().st_size > 0
