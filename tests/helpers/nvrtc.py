"""NVRTC, which needs no GPU: text in, cubin out."""

from __future__ import annotations

import importlib.util

import pytest

from epcomm.jit.compiler import compile_text

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason="optional package cuda-bindings is not installed (extra cuda12 or cuda13)",
)


def compile_cubin(source: str, architecture: str) -> bytes:
    """Compile for ``sm_<architecture>``; the compiler's own words on failure."""
    return compile_text(source, "probe.cu", architecture)
