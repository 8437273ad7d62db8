"""Time and memory of TriangleAttention, forward and backward, fused against plain and against torch's fused attention.

    python -m experiments.triangle_attention.bench                    N = 128, 256, 384, 512 in bf16 and fp32, on a GPU
    python -m experiments.triangle_attention.bench --sizes 16 --device cpu --dtypes fp32

AlphaFold's sizes: 128 channels, 4 heads of 32, one sample. All variants take turns, replayed as CUDA graphs. Writes
NAME.json, NAME.md and NAME.png to --out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..shared.metrics import write_json
from .bench_report import draw, summary
from .module import Attention, TriangleAttention, fused_attention, plain_attention

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECK_UP_TO = 256
"""The size to which errors are taken against float64, which stores what the plain form does, twice as wide."""

Record = dict[str, Any]
"""size, dtype, variant, status; of "ok": ms, ms_min, ms_max, peak_bytes, and errors (relative, root mean square)"""


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:  # fmt: skip
    """Eager norm, then scaled_dot_product_attention with the bias expanded over rows, as it wants it."""
    rows = (q.shape[0], q.shape[1], -1, -1, -1)
    bias = None if bias is None else bias.expand(rows).flatten(0, 1)
    if mask is not None:
        hidden = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~mask.flatten(0, 1)[:, None, None], -1e4)
        bias = hidden if bias is None else bias + hidden
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).unflatten(0, rows[:2])


def no_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:  # fmt: skip
    """What is left of the module without its attention."""
    return q + k + v


VARIANTS: dict[str, Attention] = {
    "fused": fused_attention,
    "sdpa": sdpa_attention,
    "plain": plain_attention,
    "plain, compiled": torch.compile(plain_attention, dynamic=False),
    "no attention": no_attention,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    run: dict[str, Any] = {"meta": describe(options), "records": []}
    cells = [(dtype, size) for dtype in options.dtypes for size in options.sizes]
    for dtype, size in tqdm(cells, desc="cells"):
        run["records"] += measure_cell(size, dtype, options)
        write_json(options.out / f"{options.name}.json", run)
    text = summary(run)
    (options.out / f"{options.name}.md").write_text(text + "\n")
    draw(run, options.out / f"{options.name}.png")
    print(text)
    return 0


def describe(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    return {
        "device": device,
        "torch": torch.__version__,
        "dim": 128,
        "heads": 4,
        "dim_head": 32,
        "batch": 1,
        "copy_tb_per_s": copy_rate() if options.device == "cuda" else None,
    }


def copy_rate() -> float:
    """TB/s, read + written, of a large copy: 4.2 on an H200 that nobody else uses."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms = statistics.median(_time_ms(lambda: target.copy_(source), "cuda") for _ in range(8))
    return 2 * source.numel() / ms / 1e9


def measure_cell(size: int, dtype: str, options: argparse.Namespace) -> list[Record]:
    """All variants of one size and dtype; one that runs out of memory, or fails, says so."""
    pair, upstream = (_random(size, seed).to(options.device, DTYPES[dtype]) for seed in (1, 2))
    torch._dynamo.reset()  # graphs of another size are of no use, and their number is limited
    exact = _exact(pair, upstream) if size <= CHECK_UP_TO else None
    records, replays = [], []
    stream = torch.cuda.Stream() if options.device == "cuda" else None
    for name in options.variants:
        record: Record = {"size": size, "dtype": dtype, "variant": name}
        records.append(record)
        try:
            run = _make_run(make_module(VARIANTS[name], pair), pair, upstream)
            if exact is not None and name != "no attention":
                record["errors"] = _errors(run(), exact)
            record["peak_bytes"] = _peak_bytes(run, options.device)
            replays.append((record, _captured(run, stream) if stream is not None else run))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            record |= {"status": "oom" if "out of memory" in str(error) else "error", "reason": str(error)[:200]}
    _take_turns(replays, options.rounds, options.device)
    return records


def make_module(attention: Attention, pair: Tensor) -> TriangleAttention:
    """The same weights for every variant; the last layer, which AlphaFold starts at zero, is drawn too."""
    torch.manual_seed(0)
    module = TriangleAttention(attention=attention)
    torch.nn.init.normal_(module.to_out.weight, std=0.1)
    assert module.to_bias is not None
    torch.nn.init.normal_(module.to_bias.weight, std=0.2)
    return module.to(pair.device, pair.dtype)


def _make_run(module: TriangleAttention, pair: Tensor, upstream: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Forward and backward -> out, and gradients of the input and of the weights of q, k, v and of the bias."""
    assert module.to_bias is not None
    leaf = pair.detach().requires_grad_()
    wanted = {"pair": leaf, "qkv": module.to_qkv.weight, "bias": module.to_bias.weight}

    def run() -> dict[str, Tensor]:
        out = module(leaf)
        others = [p for p in module.parameters() if all(p is not x for x in wanted.values())]
        found = torch.autograd.grad(out, [*wanted.values(), *others], upstream, allow_unused=True)
        return {"out": out.detach()} | {name: x for name, x in zip(wanted, found, strict=False) if x is not None}

    return run


def _exact(pair: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The plain form in float64, of the same rounded inputs and weights."""
    module = make_module(plain_attention, pair).double()
    return _make_run(module, pair.double(), upstream.double())()


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((found[name].double() - x).norm() / x.norm()).item() for name, x in exact.items()}


def _random(size: int, seed: int) -> Tensor:
    return torch.randn(1, size, size, 128, generator=torch.Generator().manual_seed(seed))


def _peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Above what is there before: outputs, saved tensors, workspaces."""
    run()
    if device != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _captured(run: Callable[[], object], stream: Any) -> Callable[[], object]:
    """The run as a CUDA graph: no launch gaps, no Python."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = run()

    def replay(_kept: object = kept) -> None:  # holds what the graph writes to
        graph.replay()

    return replay


def _take_turns(replays: Sequence[tuple[Record, Callable[[], object]]], rounds: int, device: str) -> None:
    times: list[list[float]] = [[] for _ in replays]
    for turn in range(rounds + 2):  # the first two warm up
        order = [(turn + i) % len(replays) for i in range(len(replays))]
        for i in order:
            times[i].append(_time_ms(replays[i][1], device))
    for (record, _), measured in zip(replays, times, strict=True):
        kept = measured[2:]
        record |= {"status": "ok", "ms": statistics.median(kept), "ms_min": min(kept), "ms_max": max(kept)}


def _time_ms(run: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.triangle_attention.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 384, 512])
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/triangle_attention"))
    parser.add_argument("--name", default="bench")
    return parser


if __name__ == "__main__":
    sys.exit(main())
