"""A small set of calls for compute-sanitizer: `nox -s sanitize` runs it under memcheck, racecheck and initcheck.

Every kernel family of both architectures: plain, causal with grouped heads, key mask, bias with its gradient, groups,
running maximum, biases by position and of many rows, in each dtype;
lengths that leave parts of tiles empty, and more tiles than a pipeline has stages.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention
from flash_cosine_sim_attention.testing import make_inputs

OPTIONS: tuple[dict, ...] = (
    {},
    {"causal": True, "kv_heads": 1},
    {"mask": True},
    {"mask": True, "bias": "hij"},
    {"groups": 2},
    {"scale": "head"},
    {"nq": 129, "nk": 1100},
    {"bias": "alibi", "causal": True},
    {"bias": "hij", "batch": (6,), "d": 32, "nq": 65, "nk": 65},
    {"d": 128, "causal": True},
)


def run(backend: str | None, dtype: torch.dtype, options: dict) -> None:
    print(backend or "automatic", dtype, options, flush=True)
    sizes = {"batch": (1,), "heads": 2, "nq": 150, "nk": 140, "d": 64} | options
    inputs = make_inputs(dtype=dtype, device="cuda", **sizes)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors().items()}
    for _ in range(2):  # a later call of a signature goes a way of its own
        out = flash_cosine_sim_attention(**replace(inputs, **leaves).arguments(), backend=backend)
        assert isinstance(out, torch.Tensor)
        out.backward(torch.randn_like(out))


def main(backends: list[str]) -> None:
    """backends: "sm80", "automatic"; none for both."""
    warnings.simplefilter("error", RuntimeWarning)  # a call without the fused kernels checks nothing
    for name in backends or ("sm80", "automatic"):
        backend = None if name == "automatic" else name
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if backend is None and dtype == torch.float32:
                continue  # the same kernels
            for options in OPTIONS:
                run(backend, dtype, options)
                torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main(sys.argv[1:])
