"""NVRTC through cuda-bindings, which needs no GPU: text in, cubin out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from epcomm.jit.source import cuda_src_dir

# CuPy's own compiler is no substitute: it flushes subnormals and ignores edited headers.
needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
    reason="optional package cuda-bindings is not installed (extra cuda12 or cuda13)",
)


def header_folders() -> list[Path]:
    """Include folders of the CUDA wheels: runtime headers, and libcu++ beside or below them."""
    import cuda.pathfinder

    folders = []
    for name in ("cudart", "cccl"):
        found = cuda.pathfinder.find_nvidia_header_directory(name)
        if found:
            folders += [Path(found), Path(found) / "cccl"]
    return [folder for folder in folders if folder.is_dir()]


def compile_cubin(source: str, architecture: str) -> bytes:
    """Compile for ``sm_<architecture>``; the compiler's own words on failure."""
    from cuda.bindings import nvrtc

    def check(result: tuple[object, ...]) -> object:
        error, *values = result
        assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, error
        return values[0] if values else None

    options = [
        f"-arch=sm_{architecture}",
        "-std=c++17",
        "-ftz=false",
        f"-I{cuda_src_dir()}",
        *(f"-I{folder}" for folder in header_folders()),
    ]
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"probe.cu", 0, [], []))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))  # type: ignore[operator]
        check(nvrtc.nvrtcGetProgramLog(program, log))
        raise AssertionError(log.decode())
    cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))  # type: ignore[operator]
    check(nvrtc.nvrtcGetCUBIN(program, cubin))
    return cubin
