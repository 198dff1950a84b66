"""NVRTC, which needs no GPU: text in, cubin out."""

from __future__ import annotations

import importlib.util

import pytest

from epcomm.jit.compiler import compile_text, nvrtc_version

_HAS_BINDINGS = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
_NO_BINDINGS = "optional package cuda-bindings is not installed (extra cuda12 or cuda13)"

needs_nvrtc = pytest.mark.skipif(not _HAS_BINDINGS, reason=_NO_BINDINGS)
needs_offsetof = pytest.mark.skipif(
    not _HAS_BINDINGS or nvrtc_version() < (13, 0),
    reason="NVRTC before CUDA 13 has no offsetof" if _HAS_BINDINGS else _NO_BINDINGS,
)


def compile_cubin(source: str, architecture: str) -> bytes:
    """Compile for ``sm_<architecture>``; the compiler's own words on failure."""
    return compile_text(source, "probe.cu", architecture)
