"""Probes of the CUDA backend itself: its kernels compile, and two ranks exchange tokens through them."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

from epcomm.cli.doctor import mpi
from epcomm.cli.doctor.findings import Finding
from epcomm.errors import CompileError, MissingDependency

__all__ = ["probe_kernels", "probe_smoke"]

_ANY_ARCHITECTURE = "90"  # where there is no GPU to compile for


def probe_kernels() -> list[Finding]:
    """Whether the run-time compiler accepts all kernels; on the way nothing is kept."""
    from epcomm.backends import cuda
    from epcomm.jit import device_architecture
    from epcomm.jit.compiler import compile_program
    from epcomm.kernels import PROGRAMS

    architecture = _ANY_ARCHITECTURE if cuda.why_not() else device_architecture(0)
    start = time.perf_counter()
    try:
        num_bytes = sum(len(compile_program(program, architecture)) for program in PROGRAMS)
    except MissingDependency as error:
        return [
            Finding("kernels", "missing", f"not compiled: {str(error).partition(';')[0]}", "look at the line nvrtc")
        ]
    except CompileError as error:
        advice = "run `epcomm doctor` where only one CUDA is installed; if it stays, report it with the lines above"
        return [Finding("kernels", "FAIL", str(error).splitlines()[0], advice)]
    elapsed = time.perf_counter() - start
    text = f"{len(PROGRAMS)} compiled for sm_{architecture} in {elapsed:.1f} s, {num_bytes >> 10} KiB"
    return [Finding("kernels", "ok", text)]


def probe_smoke() -> list[Finding]:
    """Two ranks on the GPUs of this machine, under MPS if there is one GPU: checked bitwise."""
    from epcomm.backends import cuda
    from epcomm.bootstrap import mps

    problem = cuda.why_not()
    if problem:
        return [Finding("gpu smoke test", "missing", f"not run: {problem}")]
    import cupy

    is_shared = cupy.cuda.runtime.getDeviceCount() < 2
    service: AbstractContextManager[dict[str, str]] = nullcontext({})
    if is_shared and mps.is_installed():
        service = mps.running()
    with service as changes:
        return [mpi.run_smoke("gpu smoke test", "cuda", changes)]
