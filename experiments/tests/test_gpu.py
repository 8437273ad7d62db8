from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.shared.config import RunConfig
from experiments.shared.data import Corpus
from experiments.shared.run_ensembles import run_ensembles
from experiments.shared.together import Job, Observer, run_together
from experiments.shared.train import Trainer

pytestmark = pytest.mark.gpu

ARMS: dict[str, dict[str, Any]] = {
    "regular": {"attention": "regular"},
    "cosine": {"attention": "cosine"},
    "learned": {"attention": "cosine", "learned_scale": True},
    "grouped": {"attention": "cosine", "groups": 8, "scale": 1.0},
    "chunked": {"attention": "cosine", "backend": "chunked"},
    "plain": {"attention": "cosine", "backend": "plain"},
    "deepnet": {"attention": "cosine", "norm": "deepnet"},
}

Tiny = Callable[..., RunConfig]


@pytest.fixture
def on_gpu(tiny: Tiny) -> Tiny:
    """At the head dim of the experiments, long enough for a capture to matter."""
    return lambda **differences: replace(tiny(dim=128, steps=24, seq_len=128, device="cuda"), **differences)


def trained(config: RunConfig, corpus: Corpus) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a capture that failed, a kernel that is missing
        trainer = Trainer(config, corpus)
        assert trainer.run()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [row[name] for row in trainer.rows for name in ("train_bpb", "val_bpb") if name in row]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_replayed_step_is_the_ordinary_step(on_gpu: Tiny, corpus: Corpus, arm: str, dtype: str):
    """The same losses, up to sums in another order; the same number of attention calls."""
    ordinary, graph = (
        trained(on_gpu(**ARMS[arm], dtype=dtype, cuda_graph=captured), corpus) for captured in (False, True)
    )
    assert losses(graph) == pytest.approx(losses(ordinary), abs=1e-3 if dtype == "fp32" else 3e-2)
    assert graph.attention_calls() == ordinary.attention_calls()
    assert [row["lr"] for row in graph.rows] == [row["lr"] for row in ordinary.rows]


def test_stopped_and_resumed_goes_on(on_gpu: Tiny, corpus: Corpus, tmp_path: Path):
    config = on_gpu(attention="cosine", cuda_graph=True)
    straight, first = trained(config, corpus), Trainer(config, corpus)
    assert not first.run(should_stop=lambda: first.step == 13)
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(config, corpus)
    second.load(tmp_path / "checkpoint.pt")
    assert second.run()
    assert losses(second) == pytest.approx(losses(straight), abs=1e-3)


def test_runs_that_share_the_gpu_do_not_disturb_each_other(on_gpu: Tiny, corpus: Corpus, tmp_path: Path):
    jobs = [Job(arm, on_gpu(cuda_graph=True, **ARMS[arm])) for arm in ("regular", "cosine", "learned", "grouped")]
    found: dict[str, dict[str, Any]] = {}
    observer = Observer(lambda _: None, lambda job, result: found.update({job.arm: result}))
    assert run_together(jobs, corpus, tmp_path, 3, lambda: False, observer)
    for job in jobs:
        alone = trained(job.config, corpus)
        assert found[job.arm]["val_bpb"] == pytest.approx(alone.rows[-1]["val_bpb"], abs=1e-3)
        assert (found[job.arm]["fused_calls"] > 0) == (job.arm != "regular")


def test_an_ensemble_learns_what_it_learns_on_the_cpu(on_gpu: Tiny, corpus: Corpus):
    """Captured steps, float32; the CPU runs them one by one."""
    found: dict[str, dict[str, dict[str, Any]]] = {"cpu": {}, "cuda": {}}
    norms = {"pre": "regular", "post": "cosine", "deepnet": "regular", "sandwich": "cosine"}
    for device, results in found.items():
        ordinary = [
            Job(norm, on_gpu(model="ensemble", device=device, norm=norm, attention=attention, seed=seed))
            for norm, attention in norms.items()
            for seed in (0, 1)
        ]
        learned = [
            Job("learned", on_gpu(model="ensemble", device=device, learned_scale=True, seed=seed)) for seed in (0, 1)
        ]
        observer = Observer(lambda _: None, lambda job, result, into=results: into.update({job.name: result}))  # type: ignore[misc]
        assert run_ensembles([*ordinary, *learned], corpus, 3, lambda: False, observer)
    for name, result in found["cpu"].items():
        assert found["cuda"][name]["val_bpb"] == pytest.approx(result["val_bpb"], abs=5e-3), name


@pytest.mark.parametrize("arm", ["regular", "cosine", "learned"])
def test_an_ensemble_in_float16_with_several_rates(on_gpu: Tiny, corpus: Corpus, arm: str):
    """Loss scaling inside a captured step; members of a rate learn what they learn without the others."""
    base = on_gpu(model="ensemble", dtype="fp16", steps=60, **ARMS[arm])
    jobs = [Job("", replace(base, seed=seed, lr=rate)) for rate in (1e-3, 4e-3) for seed in (0, 1)]
    results: dict[str, dict[str, Any]] = {}
    observer = Observer(lambda _: None, lambda job, result: results.update({job.name: result}))
    assert run_ensembles(jobs, corpus, 1, lambda: False, observer)
    together = dict(results)
    assert run_ensembles(jobs[:2], corpus, 1, lambda: False, observer)
    for job in jobs[:2]:
        assert together[job.name]["val_bpb"] == pytest.approx(results[job.name]["val_bpb"], abs=2e-2)
    assert all(result["val_bpb"] < 6 and result["skipped_steps"] < 10 for result in together.values())


@pytest.mark.parametrize("backend", ["", "plain", "chunked"])
def test_an_ensemble_in_bfloat16_on_every_path(on_gpu: Tiny, corpus: Corpus, backend: str):
    config = on_gpu(model="ensemble", backend=backend, dtype="bf16", steps=60)
    results: list[dict[str, Any]] = []
    observer = Observer(lambda _: None, lambda _, result: results.append(result))
    assert run_ensembles(
        [Job("", replace(config, seed=seed)) for seed in (0, 1, 2)], corpus, 1, lambda: False, observer
    )
    assert all(result["val_bpb"] < 6 for result in results)
