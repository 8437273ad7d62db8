"""Host time of a call: microseconds until a forward, or a forward with its backward, has been handed to the GPU.

    python packages/kernel/benchmarks/bench_host_time.py [--profile]

With a GPU the calls are the real ones, on a problem so small that the GPU keeps up. Without one the kernels are
replaced by a launcher that does nothing and tensors lie in host memory: what is left is this package's own share.
--profile adds where the time goes, function by function.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flash_cosine_sim_attention import cuda, flash_cosine_sim_attention, launchers
from flash_cosine_sim_attention._build.toolchain import find_toolchain

CALLS, ROUNDS = 200, 15
SHAPE = (2, 8, 64, 64)
"""(b, h, n, d): the smallest that still runs every kernel of a call."""


def serve_with_nothing() -> None:
    """backend="sm80" takes tensors in host memory, and its launchers do nothing."""
    folder = Path(tempfile.mkdtemp())
    (folder / "nothing.cpp").write_text('extern "C" int nothing(const void*, void*) { return 0; }\n')
    command = [find_toolchain().cxx, "-shared", "-fPIC", folder / "nothing.cpp", "-o", folder / "nothing.so"]
    subprocess.run(list(map(str, command)), check=True)
    real = launchers.address

    def address(variant, capability, also=()):
        if launchers._binding is None:
            launchers.load_binding(_binding_library())
        return launchers.exported(folder / "nothing.so", "nothing")

    assert real is not address
    launchers.address = address
    cuda.capability_of = lambda device: (8, 0)


def _binding_library() -> Path:
    from flash_cosine_sim_attention._build import cache
    from flash_cosine_sim_attention._build.spec import binding_target

    target = binding_target()
    return cache.ensure([target], find_toolchain())[target.name]


def microseconds(timed: dict[str, Callable[[], object]], synchronize: Callable[[], None]) -> dict[str, list[float]]:
    """Of each round the time a call takes on the host, by name. They take turns: a busy moment meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for call in timed.values():
        for _ in range(20):
            call()
    for _ in range(ROUNDS):
        for name, call in timed.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    synchronize()
    return times


def calls(device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    q, k, v = (torch.randn(SHAPE, device=device, dtype=dtype) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    backend = None if device == "cuda" else "sm80"

    def forward() -> object:
        return flash_cosine_sim_attention(q, k, v, backend=backend)

    def with_graph() -> object:
        return flash_cosine_sim_attention(*leaves, backend=backend)

    def forward_backward() -> object:
        return torch.autograd.grad(flash_cosine_sim_attention(*leaves, backend=backend), leaves, dout)

    def peer() -> object:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def peer_with_graph() -> object:
        return torch.nn.functional.scaled_dot_product_attention(*leaves)

    def peer_backward() -> object:
        return torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*leaves), leaves, dout)

    ours = {"forward": forward, "forward with graph": with_graph, "forward + backward": forward_backward}
    if device == "cpu":
        return ours
    return ours | {"sdpa forward": peer, "sdpa with graph": peer_with_graph, "sdpa forward + backward": peer_backward}


def profile(call: Callable[[], object], lines: int) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(CALLS):
        call()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        serve_with_nothing()
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    where = torch.cuda.get_device_name() if device == "cuda" else "host memory, launchers that do nothing"
    print(f"us a call on the host, median and least of {ROUNDS} rounds; {where}; torch {torch.__version__}")
    timed = calls(device, torch.bfloat16)
    for name, times in microseconds(timed, synchronize).items():
        print(f"{name:26} {statistics.median(times):7.1f} {min(times):7.1f}")
    if options.profile:
        for name in ("forward", "forward + backward"):
            print(f"\n{name}:")
            profile(timed[name], 22)


if __name__ == "__main__":
    main()
