"""Speed and memory of flash_cosine_sim_attention on a GPU, beside plain attention and the fast peers.

    benchmark.py                                the classic shapes: batch 4, heads 8, dim 64, lengths 128 to 8192, fp16
    benchmark.py --causal --mask-prob 0.25      the same, masked
    benchmark.py --preset long16k --budget 300  16384 tokens of width 2048: bf16, fp16, dims 64 and 128, full and causal
    benchmark.py --preset figures               what the figures to reach need; all: every preset
    benchmark.py --report results/h200/*.json   the tables of earlier runs, put together; nothing is run

A row: seq_len, slower (our time over that of plain attention), kernel (ours), baseline (plain), then the time of each
peer over ours (above 1x ours is faster). The norm of q and k is in all times: ours is one call, the peers have
F.normalize in front, compiled; --norms compiled,none adds attention alone on inputs of unit norm.
"""

from __future__ import annotations

import argparse
import json
import re
import site
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flash_cosine_sim_attention
import plot
import report
import torch
from baselines import BASELINES, norms_for
from clocks import Clock, ContextLost, CpuClock, CudaClock, brief, ceilings
from inputs import CaseInputs
from measure import Record, Settings, Variant, measure_cell
from normalizing import NORMS
from presets import DTYPES, GROUPS, PRESETS, Case, Preset, case_of

RESULTS = Path(__file__).parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(word) for word in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", type=words, default=("classic",), help=f"of {','.join([*GROUPS, *PRESETS])}; default classic")
    add("--causal", action="store_true", help="causal cases only")
    add("--mask-prob", type=float, help="hide each key with this probability (random key mask)")
    add("--only-forwards", action="store_true", help="time the forward only; default: forward, forward + backward")
    add("--only-backwards", action="store_true", help="time the backward only")
    add("--num-times", type=int, default=20, help="timed runs of each variant; the median counts (%(default)s)")
    add("--dtype", type=words, help=f"of {','.join(DTYPES)}; this and the next four override the preset")
    add("--dims", type=numbers, help="head dims, e.g. 64,128")
    add("--seqs", type=numbers, help="sequence lengths, e.g. 512,2048")
    add("--batch", type=int, help="batch size")
    add("--heads", type=int, help="number of heads")
    add("--peers", type=words, help=f"beside ours; of {','.join(BASELINES)}")
    add("--norms", type=words, help=f"of {','.join(NORMS)}; default: the preset's, mostly compiled")
    add("--biases", type=words, help="dims of an additive bias out of bhij, 'f' behind them for float32, e.g. hij,hj")
    add("--scale", type=float, default=8.0, help="of the cosine (%(default)s)")
    add("--timer", choices=("graph", "events"), default="graph", help="events: eager calls, launches included")
    add("--budget", type=float, default=float("inf"), help="seconds; no cell starts after them")
    add("--device", default="cuda", help="cpu tries the flow without a GPU (%(default)s)")
    add("--site", help="a folder of more Python packages with peers, added as a site directory")
    add("--out", type=Path, help="folder for JSON, text and plots; default results/<gpu> beside this file")
    add("--tag", help="name of these files; default: the presets")
    add("--report", type=Path, nargs="+", metavar="JSON", help="tables and plots of these runs; nothing is run")
    parsed = parser.parse_args(arguments)
    check_arguments(parser, parsed)
    return parsed


def check_arguments(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    known = {"preset": {**PRESETS, **GROUPS}, "dtype": DTYPES, "peers": BASELINES, "norms": NORMS}
    for option, allowed in known.items():
        unknown = sorted(set(getattr(parsed, option) or ()) - set(allowed))
        if unknown:
            parser.error(f"--{option}: expected some of {', '.join(allowed)}; got {', '.join(unknown)}")
    if parsed.only_forwards and parsed.only_backwards:
        parser.error("--only-forwards and --only-backwards: expected one of them")
    if parsed.device.startswith("cuda") and not parsed.report and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; --device cpu tries the flow")


def chosen_presets(options: argparse.Namespace) -> list[Preset]:
    """The presets with what the command line overrides."""
    given: dict[str, Any] = {"dtypes": options.dtype, "dims": options.dims, "seqs": options.seqs}
    given |= {"batch": options.batch, "heads": options.heads, "peers": options.peers}
    given |= {"norms": options.norms, "biases": options.biases}
    given["causal"] = (True,) if options.causal else None
    if options.only_forwards or options.only_backwards:
        given["modes"] = ("fwd",) if options.only_forwards else ("bwd",)
    if options.mask_prob is not None:
        given |= {"mask_prob": options.mask_prob, "padded": False}
    changes = {name: value for name, value in given.items() if value is not None}
    presets = [preset for name in options.preset for preset in GROUPS.get(name) or (PRESETS[name],)]
    return [replace(preset, **changes) for preset in presets]


@dataclass
class Plan:
    """The cells of a run, each once: (case, mode, variants)."""

    cells: list[tuple[Case, str, list[Variant]]] = field(default_factory=list)

    @classmethod
    def of(cls, presets: Iterable[Preset]) -> Plan:
        plan, seen = cls(), set()
        for preset in presets:
            names = dict.fromkeys(("ours", *preset.peers))
            variants = [Variant(BASELINES[n], norm) for n in names for norm in norms_for(BASELINES[n], preset.norms)]
            for case in preset.cases():
                new = [mode for mode in preset.modes if (case, mode) not in seen]
                plan.cells += [(case, mode, variants) for mode in new]
                seen |= {(case, mode) for mode in new}
        return plan


def run_plan(plan: Plan, settings: Settings, deadline: float, run: dict[str, Any], save: Callable[[], None]) -> bool:
    """Measure cell after cell into run["records"]; run["missing"] names those that did not start. False: GPU lost."""
    inputs, alive, progress = None, True, progress_bar(len(plan.cells))
    for i, (case, mode, variants) in enumerate(plan.cells):
        if time.monotonic() > deadline:
            run["missing"] = [f"{case} {mode}" for case, mode, _ in plan.cells[i:]]
            run["stopped"] = "the budget was used up"
            break
        if inputs is None or inputs.case != case:
            inputs = CaseInputs(case, settings.clock.device)
        first = len(run["records"])
        try:
            measure_cell(inputs, mode, variants, settings, run["records"])
            settings.clock.recover()
        except ContextLost as error:
            run["missing"] = [f"{case} {mode}" for case, mode, _ in plan.cells[i:]]
            run["stopped"] = f"the GPU did not answer after {report.column(run['records'][-1])}: {error}"
            alive = False
            break
        finally:
            save()  # also if this run is interrupted
        progress.write(report.row(run["records"][first:]))
        progress.update()
    progress.close()
    return alive


def progress_bar(total: int) -> Any:
    """tqdm's, on a terminal and where it is installed; otherwise rows are printed and nothing else."""
    try:
        from tqdm import tqdm
    except ImportError:
        return PlainProgress()
    return tqdm(total=total, unit="cell", disable=None)


class PlainProgress:
    def write(self, text: str) -> None:
        print(text, flush=True)

    def update(self) -> None: ...
    def close(self) -> None: ...


@contextmanager
def collected_warnings(messages: list[str]) -> Iterator[None]:
    """Each warning once, into `messages`: that ours fell back to a slower path must not drown in the output."""

    def keep(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = f"{category.__name__}: {str(message).strip().splitlines()[0][:200]}" if str(message).strip() else ""
        if text and text not in messages:
            messages.append(text)

    with warnings.catch_warnings():
        warnings.showwarning = keep
        yield


def describe_machine(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "package": flash_cosine_sim_attention.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def folder_name(gpu: str) -> str:
    """NVIDIA H200 -> h200, NVIDIA GeForce RTX 4090 -> rtx-4090."""
    words = re.sub(r"\b(nvidia|geforce|tesla|quadro)\b", " ", gpu.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "gpu"


def summary(run: dict[str, Any]) -> str:
    """Every table of a run, the figures to reach last."""
    records, norm, on_gpu = run["records"], ", ".join(run["meta"]["norms"]), run["meta"]["gpu"] != "cpu"
    parts = [f"== {run['meta']['gpu']}, torch {run['meta']['torch']}, {run['meta']['timer']}, norms: {norm}"]
    if run["ceilings"]:
        roof = run["ceilings"]
        parts.append(f"-- bf16 matrix product {roof['tflops']:.0f} TFLOP/s, copy {roof['tb_per_s']:.2f} TB/s")
    if records:
        values = ("errors", *(["memory"] if on_gpu else []), "ms", "tflops")
        parts += [report.table(records, value) for value in values]
        parts += [report.speedups(records), report.failures(records)]
    parts += [f"-- warnings\n{chr(10).join(run['warnings'])}"] if run["warnings"] else []
    if run.get("missing"):
        parts.append(
            f"-- {run['stopped']}; {len(run['missing'])} cells are missing: {'; '.join(run['missing'][:6])} ..."
        )
    return "\n\n".join([*parts, report.verdicts(records)])


def merged(paths: list[Path]) -> dict[str, Any]:
    """Several runs as one; a variant of a cell that is there twice counts as in the last file."""
    runs = [json.loads(path.read_text()) for path in paths]
    records: dict[tuple, Record] = {}
    for record in (record for run in runs for record in run["records"]):
        records[(case_of(record), record["mode"], record["peer"], record["norm"])] = record
    return runs[-1] | {"records": list(records.values()), "missing": []}


def write(run: dict[str, Any], folder: Path, name: str) -> None:
    """NAME.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.json.part"
    partial.write_text(json.dumps(run, indent=1))
    partial.replace(folder / f"{name}.json")


def finish(run: dict[str, Any], folder: Path, name: str) -> None:
    """Print the tables, write them as NAME.txt, draw."""
    text = summary(run)
    print(f"\n{text}", flush=True)
    (folder / f"{name}.txt").write_text(text + "\n")
    try:
        plot.draw(run, folder, name)
    except ImportError as error:
        print(f"no plots: {brief(error)}")


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if the GPU was lost on the way."""
    started, options = time.monotonic(), parse_arguments(arguments)
    if options.report:
        finish(merged(options.report), options.out or options.report[-1].parent, options.tag or "report")
        return 0
    if options.site:
        site.addsitedir(options.site)
    device = torch.device(options.device)
    clock: Clock = CudaClock(device, options.timer) if device.type == "cuda" else CpuClock()
    settings = Settings(clock, options.num_times, options.scale)
    presets = chosen_presets(options)
    norms = tuple(dict.fromkeys(norm for preset in presets for norm in preset.norms))
    meta = describe_machine(device) | {"timer": clock.name, "norms": norms, "scale": options.scale}
    run: dict[str, Any] = {"meta": meta, "ceilings": ceilings(clock), "records": [], "warnings": [], "missing": []}
    folder, name = options.out or RESULTS / folder_name(meta["gpu"]), options.tag or "-".join(options.preset)
    plan = Plan.of(presets)
    with collected_warnings(run["warnings"]):
        alive = run_plan(plan, settings, started + options.budget, run, lambda: write(run, folder, name))
    write(run, folder, name)
    finish(run, folder, name)
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
