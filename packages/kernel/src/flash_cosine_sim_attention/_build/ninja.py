"""How to compile: renders a ninja file for a list of targets, runs ninja and reports its progress."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import BuildError
from .spec import Target, compile_flags, include_flags, link_flags
from .toolchain import Toolchain

Progress = Callable[[int, int, str], None]
"""Called with (finished steps, all steps, what)."""


def escape(text: str | Path) -> str:
    """A path or flag in a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(text))


def _command(words: Sequence[str | Path]) -> str:
    """Words of a shell command inside a ninja variable."""
    quoted = (str(word) if re.fullmatch(r"[\w@%+=:,./\-]+", str(word)) else f"'{word}'" for word in words)
    return " ".join(quoted).replace("$", "$$")


_RULES = [
    "ninja_required_version = 1.5",
    "rule compile",
    "  command = touch $out.start; $compiler $flags $includes -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
    "  description = $name",
    "rule link",
    "  command = $linker $in -o $out $flags",
    "  description = $name",
]


def render(targets: Sequence[Target], toolchain: Toolchain, link: bool = True) -> str:
    """The build file: each target becomes <name>.o, and with `link` <name>.so.

    What the compiler says (registers, shared memory and spills of each kernel) stays beside, in <name>.o.log.
    """
    lines = list(_RULES)
    for target in targets:
        lines += _compile_edge(target, toolchain)
        if link:
            linker = toolchain.nvcc if target.language == "cuda" else toolchain.cxx
            lines += _link_edge(f"{target.name}.so", [f"{target.name}.o"], linker, link_flags(target, toolchain))
    return "\n".join(lines) + "\n"


def render_link(library: str, objects: Sequence[Path], toolchain: Toolchain) -> str:
    """The build file that makes one library of objects of both languages: nvcc links, it knows the CUDA runtime."""
    flags: list[str] = []
    for language in ("cuda", "c++"):
        for word in link_flags(Target("", language), toolchain):
            own = f"-Xlinker={word.removeprefix('-Wl,')}" if word.startswith("-Wl,") else word
            if own not in flags:
                flags.append(own)
    return "\n".join([*_RULES, *_link_edge(library, objects, toolchain.nvcc, flags)]) + "\n"


def _compile_edge(target: Target, toolchain: Toolchain) -> list[str]:
    compiler = toolchain.nvcc if target.language == "cuda" else toolchain.cxx
    source = target.source if target.source is not None else target.file_name
    return [
        f"build {escape(target.name)}.o: compile {escape(source)}",
        f"  name = {target.name}",
        f"  compiler = {_command([compiler])}",
        f"  flags = {_command(compile_flags(target, toolchain))}",
        f"  includes = {_command(include_flags(target, toolchain))}",
    ]


def _link_edge(output: str, objects: Sequence[str | Path], linker: Path, flags: Sequence[str]) -> list[str]:
    return [
        f"build {escape(output)}: link {' '.join(map(escape, objects))}",
        f"  name = {output}",
        f"  linker = {_command([linker])}",
        f"  flags = {_command(flags)}",
    ]


def write_build(folder: Path, targets: Sequence[Target], toolchain: Toolchain, link: bool = True) -> None:
    """The stubs and build.ninja."""
    for target in targets:
        if target.stub is not None:
            (folder / target.file_name).write_text(target.stub)
    (folder / "build.ninja").write_text(render(targets, toolchain, link))


def num_jobs() -> int:
    text = os.environ.get("FLASH_COSINE_SIM_JOBS", "")
    if not text:
        return os.cpu_count() or 1
    if not text.isdigit() or int(text) < 1:
        raise BuildError(f"FLASH_COSINE_SIM_JOBS: expected a positive number, got {text!r}")
    return int(text)


def run(
    folder: Path,
    toolchain: Toolchain,
    timeout: float,
    progress: Progress | None = None,
    jobs: int | None = None,
    keep_going: bool = False,
) -> None:
    """Builds all of build.ninja. Raises BuildError with the compiler's first errors, or after `timeout` seconds."""
    command = [str(toolchain.ninja), "-C", str(folder), "-j", str(jobs or num_jobs())]
    if keep_going:
        command += ["-k", "0"]
    # NINJA_STATUS makes the progress lines easy to tell from what the compilers say; nvcc's intermediate files are kept
    # out of a /tmp that others clean or, in containers with equal process ids, write under the same names
    environment = {**os.environ, "NINJA_STATUS": "@ %f %t ", "TERM": "dumb", "TMPDIR": str(folder)}
    output: list[str] = []
    with _process(command, environment, timeout) as (process, timed_out):
        assert process.stdout is not None
        for line in process.stdout:
            step = re.match(r"@ (\d+) (\d+) (.*)", line)
            if step is None:
                output.append(line)
            elif progress is not None:
                progress(int(step[1]), int(step[2]), step[3])
        code = process.wait()
    if timed_out.is_set():
        raise BuildError(f"compiling took longer than {timeout:.0f} s (FLASH_COSINE_SIM_BUILD_TIMEOUT)")
    if code != 0:
        raise BuildError(f"compiling failed:\n{excerpt(output)}")


@contextlib.contextmanager
def _process(
    command: list[str], environment: dict[str, str], timeout: float
) -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    """Runs it in a process group of its own, which is ended after `timeout` seconds or on any exception."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    timed_out = threading.Event()

    def end() -> None:
        timed_out.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield process, timed_out
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        raise
    finally:
        timer.cancel()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def excerpt(output: list[str], limit: int = 40) -> str:
    """The lines with errors and what follows them, not the ptxas statistics."""
    kept = [line for line in output if not line.startswith(("ptxas info", "ninja:", "    "))]
    telling = re.compile(r"error\s*:|fatal|undefined reference")
    first = next((index for index, line in enumerate(kept) if telling.search(line)), 0)
    return "".join(kept[first : first + limit]).rstrip()


def stderr_progress(what: str) -> Progress:
    """One line on stderr, rewritten in place on a terminal, else written at the start only."""
    terminal = sys.stderr.isatty()

    def show(finished: int, steps: int, name: str) -> None:
        if terminal:
            sys.stderr.write(f"\r\033[K{what}: {finished} of {steps} steps{' ' if finished < steps else chr(10)}")
            sys.stderr.flush()

    if not terminal:
        sys.stderr.write(f"{what}\n")
        sys.stderr.flush()
    return show
