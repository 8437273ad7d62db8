"""How long do the first call, the first call of a later process, and every call's host side take? On a GPU.

    python packages/kernel/benchmarks/bench_first_use.py [--dtype bfloat16] [--dim 64] [--calls 2000]

The first use compiles forward and backward into an empty cache; the second process finds them there. Host time is that
of a call on tensors so small that the GPU never falls behind: what a step pays for Python, dispatch and launches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch


def microseconds(function: Callable[[], object], calls: int) -> float:
    """The median over batches of 50 calls, each batch begun with an idle GPU."""
    batches = []
    for _ in range(max(1, calls // 50)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            function()
        batches.append((time.perf_counter() - start) / 50)
    return sorted(batches)[len(batches) // 2] * 1e6


def measure(dtype: str, dim: int, calls: int) -> dict[str, float]:
    """In this process: seconds of the first forward and backward, of loading alone, and host times in microseconds."""
    from flash_cosine_sim_attention import flash_cosine_sim_attention, launchers

    seconds = {"load": 0.0}
    load = launchers._load

    def timed_load(*arguments):
        start = time.perf_counter()
        load(*arguments)
        seconds["load"] += time.perf_counter() - start

    launchers._load = timed_load
    q, k, v = (torch.randn(1, 2, 128, dim, dtype=getattr(torch, dtype), device="cuda") for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)

    def train():
        torch.autograd.grad(flash_cosine_sim_attention(*leaves, backend="sm80"), leaves, dout)

    torch.cuda.synchronize()
    start = time.perf_counter()
    train()
    torch.cuda.synchronize()
    seconds["first forward + backward"] = time.perf_counter() - start
    for _ in range(50):
        train()
    return seconds | {
        "forward, us": microseconds(lambda: flash_cosine_sim_attention(q, k, v, backend="sm80"), calls),
        "forward with grad, us": microseconds(lambda: flash_cosine_sim_attention(*leaves, backend="sm80"), calls),
        "forward + backward, us": microseconds(train, calls),
    }


def in_new_process(arguments: argparse.Namespace, cache: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", "--dtype", arguments.dtype, "--dim", str(arguments.dim)]
    command += ["--calls", str(arguments.calls)]
    environment = {**os.environ, "FLASH_COSINE_SIM_CACHE": cache}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.dtype, arguments.dim, arguments.calls)))
        return
    with tempfile.TemporaryDirectory() as cache:
        for title in ("first use, empty cache", "a later process"):
            print(title)
            for name, value in in_new_process(arguments, cache).items():
                unit = "" if name.endswith("us") else " s"
                print(f"  {name:26} {value:10.3f}{unit}")


if __name__ == "__main__":
    main()
