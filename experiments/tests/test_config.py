from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from experiments.shared.config import ARMS, RunConfig, add_flags, from_dict, given, require_cuda_kernel, with_arm


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention": "linear"}, "attention: expected one of regular, cosine, native, got 'linear'"),
        ({"norm": "none"}, "norm: expected one of pre, post, deepnet, sandwich, got 'none'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"log_every": 0}, "log_every >= 1"),
        ({"dim": 130}, "dim: expected a multiple of heads = 4, got 130"),
        ({"groups": 5}, "groups: expected a divisor of dim / heads = 32, got 5"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RunConfig(**wrong)


def test_flags_set_what_they_name_and_nothing_else():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert given(parser.parse_args([])) == {}
    assert given(parser.parse_args(["--seq-len", "8192", "--scale", "10"])) == {"seq_len": 8192, "scale": 10.0}


def test_an_arm_changes_its_fields_alone():
    base = RunConfig(dim=64, heads=2)
    configs = [with_arm(base, arm, seed=5).to_dict() for arm in ARMS.values()]
    assert {name for name in configs[0] if len({str(config[name]) for config in configs}) > 1} == {"attention"}
    assert all(config["seed"] == 5 for config in configs)
    with pytest.raises(ValueError, match="arm: expected fields of RunConfig, got colour"):
        with_arm(base, {"colour": "red"}, seed=0)


def test_to_and_from_dict():
    config = RunConfig(attention="native", scale=10.0, groups=4)
    assert from_dict({**config.to_dict(), "corpus_sha256": "more"}) == config


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_the_cuda_kernel_needs_cuda():
    with pytest.raises(RuntimeError, match="--use-cuda-kernel: expected an NVIDIA GPU and a CUDA build of PyTorch"):
        require_cuda_kernel({})
    with pytest.raises(RuntimeError, match="--use-cuda-kernel: expected --device cuda, got 'cpu'"):
        require_cuda_kernel({"device": "cpu"})


def test_the_kernel_of_the_architecture_is_forced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, backend in (((8, 6), "sm80"), ((9, 0), "sm90"), ((12, 0), "sm80")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert require_cuda_kernel({"dim": 64}) == {"dim": 64, "device": "cuda", "backend": backend}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"expected compute capability 8\.0 or more, got 7\.5"):
        require_cuda_kernel({})
