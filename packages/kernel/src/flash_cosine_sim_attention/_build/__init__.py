"""Compiles the CUDA sources: on first use (`cache.ensure`), or ahead of time (`python -m ..._build`).

    spec       what: the targets (one launcher each, and the torch binding), their sources and flags
    toolchain  with what: nvcc, the host compiler, CUDA and torch headers
    ninja      how: the build file, and running it
    cache      where: keys, folder, locks, atomic publication
    aot        all at once, into the package; `wheel` packs that
    compile_report   every variant with its registers, shared memory and spills

Nothing here imports torch: the builder must work beside any torch, and cost nothing where no build is needed.

Environment variables (all optional):
    FLASH_COSINE_SIM_CACHE           folder of compiled kernels; default: flash_cosine_sim_attention in $XDG_CACHE_HOME
                                     or ~/.cache
    FLASH_COSINE_SIM_NVCC            path of nvcc; default: $CUDA_HOME/bin, PATH, /usr/local/cuda/bin, the nvidia wheels
    FLASH_COSINE_SIM_JOBS            compilers at once; default: the number of CPU cores
    FLASH_COSINE_SIM_BUILD_TIMEOUT   seconds that a build, or waiting for another process's, may take; default: 1200
    FLASH_COSINE_SIM_JIT             0: never compile on first use, only load what is compiled already
    CXX                              the host compiler; default: g++
"""

from __future__ import annotations


class BuildError(RuntimeError):
    """Something that is needed could not be found, compiled or loaded; the message says what, and what to do."""
