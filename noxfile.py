"""Every task of the repository: `nox -l` lists them, `nox -s NAME -- ARGUMENTS` runs one.

The default is `tests`. Each session makes its own virtual environment with the versions of constraints.txt.
"""

from __future__ import annotations

from pathlib import Path

import nox

ROOT = Path(__file__).parent
KERNEL = "packages/kernel"
PLUGIN = "packages/xtransformers_plugin"
PYTHON_SOURCES = ("packages", "experiments", "tests", "noxfile.py")

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session, *packages: str) -> None:
    """Both distributions, editable, and `packages`, all at the versions of constraints.txt."""
    session.install("-c", "constraints.txt", *packages, "-e", KERNEL, "-e", PLUGIN)


@nox.session
def tests(session: nox.Session) -> None:
    """The CPU test suite of everything: `nox -s tests -- -k lengths` passes arguments to pytest."""
    packages = ("pytest-xdist", "hypothesis", "numpy", "rotary-embedding-torch", "matplotlib", "tqdm", "scikit-learn")
    install(session, "pytest", *packages)
    session.run("pytest", "-n", "auto", "-m", "not gpu", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
@nox.parametrize("version", ["2.20.0", "2.26.4", "2.31.10"])
def plugin_versions(session: nox.Session, version: str) -> None:
    """The plugin's tests with each version of x-transformers that it is said to work with."""
    install(session, "pytest", "matplotlib", "tqdm")
    session.install(f"x-transformers=={version}")  # after the one of constraints.txt
    session.run("pytest", "-m", "not gpu", f"{PLUGIN}/tests", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(venv_backend="none")
def gpu_tests(session: nox.Session) -> None:
    """The tests marked `gpu`, in the current environment (it has the torch that fits the driver)."""
    env = {"PYTHONPATH": f"{ROOT / KERNEL / 'src'}:{ROOT / PLUGIN / 'src'}"}
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs, env=env, external=True)


@nox.session(venv_backend="none")
def sanitize(session: nox.Session) -> None:
    """compute-sanitizer over a small set of calls, in the current environment; `-- racecheck` for one tool."""
    env = {"PYTHONPATH": str(ROOT / KERNEL / "src"), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in session.posargs or ("memcheck", "racecheck", "initcheck"):
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
        session.run(*command, "python", f"{KERNEL}/tests/sanitize.py", env=env, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff (lint and format) and mypy."""
    install(session, "ruff", "mypy", "tqdm", "numpy", "matplotlib", "pytest", "hypothesis", "nox")
    session.run("ruff", "check", *PYTHON_SOURCES)
    session.run("ruff", "format", "--check", *PYTHON_SOURCES)
    session.run("mypy", f"{KERNEL}/src", f"{PLUGIN}/src", "experiments")


@nox.session
def compile(session: nox.Session) -> None:
    """Every CUDA variant with nvcc, no GPU needed; fails on spills that variants.py does not allow, and the like."""
    install(session)
    session.run("python", "-m", "flash_cosine_sim_attention._build.compile_report", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """A wheel with all kernels compiled, in dist/: for every Python, and every torch from 2.10 on."""
    install(session)
    session.run("python", "-m", "flash_cosine_sim_attention._build.wheel", "--out", "dist", *session.posargs)


@nox.session
def compare(session: nox.Session) -> None:
    """The main job: train the same model with regular and with cosine-sim attention, three minutes on two CPU cores."""
    install(session, "tqdm", "numpy", "matplotlib")
    session.run("python", "-m", "experiments.compare", *session.posargs)


@nox.session(venv_backend="none")
def experiments(session: nox.Session) -> None:
    """A question's experiment, in the current environment: `nox -s experiments -- scale_and_groups --report`."""
    name, *arguments = session.posargs or ("compare", "--help")
    env = {"PYTHONPATH": f"{ROOT / KERNEL / 'src'}:{ROOT / PLUGIN / 'src'}"}
    session.run("python", "-m", f"experiments.{name}", *arguments, env=env, external=True)


@nox.session
def benchmark(session: nox.Session) -> None:
    """Speed and memory on the CPU against torch's attention. On a GPU: `nox -s gpu_benchmark`."""
    install(session, "tqdm", "numpy", "matplotlib")
    session.run("python", f"{KERNEL}/benchmarks/bench_cpu.py", *session.posargs)


@nox.session(venv_backend="none")
def gpu_benchmark(session: nox.Session) -> None:
    """Speed and memory on the GPU beside its peers, in the current environment: `-- --help` lists the options."""
    env = {"PYTHONPATH": f"{ROOT / KERNEL / 'src'}"}
    session.run("python", f"{KERNEL}/benchmarks/benchmark.py", *session.posargs, env=env, external=True)
