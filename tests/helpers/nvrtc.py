"""NVRTC, and what links its programs with NVSHMEM; neither needs a GPU: text in, cubin out."""

from __future__ import annotations

import importlib.util

import pytest

from epcomm.errors import CompileError, MissingDependency
from epcomm.jit.compiler import compile_text, installed_nvshmem, nvrtc_version

__all__ = ["NVSHMEM_ARCHITECTURES", "compile_cubin", "needs_nvrtc", "needs_nvshmem", "needs_offsetof"]

_HAS_BINDINGS = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
_NO_BINDINGS = "optional package cuda-bindings is not installed (extra cuda12 or cuda13)"


def _why_no_nvshmem() -> str:
    if not _HAS_BINDINGS:
        return _NO_BINDINGS
    try:
        installed_nvshmem()
    except MissingDependency as error:
        return f"optional package NVSHMEM is not installed (extra nvshmem12 or nvshmem13): {error}"
    return ""


def _has_offsetof() -> bool:
    if not _HAS_BINDINGS:
        return False
    try:
        compile_text("struct S { int a, b; }; static_assert(__builtin_offsetof(S, b) == 4);", "probe.cu", "90")
    except CompileError:
        return False
    return True


_NO_NVSHMEM = _why_no_nvshmem()

needs_nvrtc = pytest.mark.skipif(not _HAS_BINDINGS, reason=_NO_BINDINGS)
needs_nvshmem = pytest.mark.skipif(_NO_NVSHMEM != "", reason=_NO_NVSHMEM)
needs_offsetof = pytest.mark.skipif(
    not _has_offsetof(),
    reason="this NVRTC has no offsetof, as those of CUDA 12 and 13.0" if _HAS_BINDINGS else _NO_BINDINGS,
)

# For which programs are linked with NVSHMEM in tests: with CUDA 12 a link for sm_100 takes a minute and more.
NVSHMEM_ARCHITECTURES = ("80", "90") if not _NO_NVSHMEM and nvrtc_version() < (13, 0) else ("90", "100")


def compile_cubin(source: str, architecture: str, *, nvshmem: bool = False) -> bytes:
    """Compile for ``sm_<architecture>``; the compiler's own words on failure."""
    return compile_text(source, "probe.cu", architecture, nvshmem=nvshmem)
