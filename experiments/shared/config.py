"""One run's configuration, its command line flags, and the arms that an experiment compares.

An arm is a name and the fields in which it differs from the base configuration: nothing else may differ between two
arms, so that a comparison shows what it says it shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

Arm = Mapping[str, Any]

MODELS = ("x-transformers", "ensemble")
ATTENTIONS = ("regular", "cosine", "native")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORMS = ("pre", "post", "deepnet", "sandwich")

ARMS: dict[str, Arm] = {name: {"attention": name} for name in ATTENTIONS}


def _field(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run's result depends on. The defaults are sized for two CPU cores."""

    data: str = _field("stdlib", "stdlib, tinyshakespeare, enwik8, or the path of any file, .gz too")
    model: str = _field(
        "x-transformers",
        "x-transformers: its decoder, cosine attention by the plugin; ensemble: decoder.py, seeds of an arm as one",
        MODELS,
    )
    attention: str = _field(
        "cosine",
        "regular: softmax of scaled dot products; cosine: fused, through the plugin; "
        "native: cosine without this repository's kernels: x-transformers' own attn_qk_norm, decoder.py's F.normalize",
        ATTENTIONS,
    )
    plugin_mode: str = _field(
        "convert",
        "convert: a regular model, the plugin normalises; accelerate: an attn_qk_norm model, the plugin computes it",
        ("convert", "accelerate"),
    )
    backend: str = _field("", "force one backend of the attention package; empty chooses")
    scale: float = _field(8.0, "cosine and native: the logits are scale * cosine")
    learned_scale: bool = _field(False, "cosine: a scale for each head of each layer is learned, from `scale` on")
    groups: int = _field(1, "cosine and native: groups of the l2 norm within a head")
    norm: str = _field("pre", "where the layer norms sit; deepnet: post, residuals and initial weights scaled", NORMS)
    dim: int = _field(128, "model width")
    depth: int = _field(4, "layers")
    heads: int = _field(4, "attention heads; a head has dim / heads features")
    seq_len: int = _field(256, "bytes of context")
    batch_size: int = _field(4, "sequences a step")
    steps: int = _field(600, "optimiser steps")
    lr: float = _field(3e-3, "peak learning rate of AdamW; cosine decay to a tenth")
    warmup: int = _field(60, "steps of linear warmup")
    weight_decay: float = _field(0.1, "decoupled weight decay, of matrices only")
    grad_clip: float = _field(1.0, "largest norm of the gradient")
    dropout: float = _field(0.0, "dropout in the feed-forward layers")
    dtype: str = _field("fp32", "fp32, or autocast to bf16 or fp16 (fp16 with loss scaling)", tuple(DTYPES))
    device: str = _field("cpu", "cpu, cuda or cuda:N")
    cuda_graph: bool = _field(False, "capture the training step into a CUDA graph and replay it: for small models")
    seed: int = _field(0, "seeds weights, dropout and data order")
    eval_every: int = _field(100, "steps between two validations")
    eval_batches: int = _field(32, "batches of a validation")
    log_every: int = _field(20, "steps between two rows of the training metrics")

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, choices = getattr(self, spec.name), spec.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{spec.name}: expected one of {', '.join(choices)}, got {value!r}")
        for name in ("dim", "depth", "heads", "groups", "seq_len", "batch_size", "steps", "eval_every", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.log_every < 1 or self.warmup < 0:
            raise ValueError(f"expected log_every >= 1 and warmup >= 0, got {self.log_every} and {self.warmup}")
        if self.dim % self.heads:
            raise ValueError(f"dim: expected a multiple of heads = {self.heads}, got {self.dim}")
        if self.dim_head % self.groups:
            raise ValueError(f"groups: expected a divisor of dim / heads = {self.dim_head}, got {self.groups}")
        if self.learned_scale and (self.attention, self.plugin_mode) != ("cosine", "convert"):
            raise ValueError(
                f"learned_scale: expected attention cosine in mode convert, got {self.attention}, {self.plugin_mode}"
            )
        if self.cuda_graph and (not self.device.startswith("cuda") or self.dtype == "fp16"):
            raise ValueError(
                f"cuda_graph: expected a CUDA device and fp32 or bf16 (the loss scaling of fp16 reads the device), "
                f"got {self.device} and {self.dtype}"
            )

    @property
    def dim_head(self) -> int:
        return self.dim // self.heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_flags(parser: argparse.ArgumentParser, skip: tuple[str, ...] = ()) -> None:
    """One flag a field. A flag that is not given is absent from the namespace, see `given`."""
    for spec in fields(RunConfig):
        if spec.name in skip:
            continue
        text = f"{spec.metadata['help']} (default: {spec.default!r})"
        kind: dict[str, Any] = {"type": type(spec.default), "choices": spec.metadata["choices"]}
        if isinstance(spec.default, bool):
            kind = {"action": "store_true"}
        parser.add_argument("--" + spec.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument(
        "--use-cuda-kernel",
        action="store_true",
        help="insist on the fused CUDA kernel: device cuda, its backend forced, an error where there is none",
    )


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields that the command line sets."""
    known = {spec.name for spec in fields(RunConfig)}
    values = {name: value for name, value in vars(arguments).items() if name in known}
    if arguments.use_cuda_kernel:
        return require_cuda_kernel(values)
    require_device(values.get("device", "cpu"))
    return values


def require_device(device: str) -> None:
    """RuntimeError if this machine or this build of PyTorch has no such device."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise RuntimeError(f"--device: expected cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {device}: expected an NVIDIA GPU and a CUDA build of PyTorch, got none")


def require_cuda_kernel(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the CUDA device and the kernel of its architecture forced; RuntimeError where there is none."""
    device = values.get("device", "cuda")
    if torch.device(device).type != "cuda":
        raise RuntimeError(f"--use-cuda-kernel: expected --device cuda, got {device!r}")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "--use-cuda-kernel: expected an NVIDIA GPU and a CUDA build of PyTorch, got none "
            f"(PyTorch {torch.__version__}); without this flag the same model trains on the CPU"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(f"--use-cuda-kernel: expected compute capability 8.0 or more, got {major}.{minor}")
    return {**values, "device": device, "backend": values.get("backend") or ("sm90" if major == 9 else "sm80")}


@contextmanager
def usage_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What is wrong with the command line, or with what it names, ends the program with a sentence, not a traceback."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of `to_dict`; what is no field is left out, a field younger than `values` has its default."""
    return RunConfig(**{spec.name: values[spec.name] for spec in fields(RunConfig) if spec.name in values})


def with_arm(base: RunConfig, arm: Arm, seed: int) -> RunConfig:
    """The base configuration with an arm's differences and a seed."""
    unknown = set(arm) - {spec.name for spec in fields(RunConfig)}
    if unknown:
        raise ValueError(f"arm: expected fields of RunConfig, got {', '.join(sorted(unknown))}")
    return replace(base, **arm, seed=seed)
