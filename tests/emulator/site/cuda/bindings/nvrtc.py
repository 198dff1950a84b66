"""Stand-in for ``cuda.bindings.nvrtc``: a "cubin" is a library of this machine's own code."""

from __future__ import annotations

import ctypes
import enum

from emulated_gpu.programs import compile_text


class nvrtcResult(enum.IntEnum):
    NVRTC_SUCCESS = 0
    NVRTC_ERROR_COMPILATION = 6


class _Program:
    def __init__(self, text: str, name: str) -> None:
        self.text, self.name, self.log, self.image = text, name, b"", b""


def nvrtcVersion() -> tuple[nvrtcResult, int, int]:
    return nvrtcResult.NVRTC_SUCCESS, 13, 0


def nvrtcCreateProgram(
    text: bytes, name: bytes, num_headers: int, headers: list[bytes], names: list[bytes]
) -> tuple[nvrtcResult, _Program]:
    assert num_headers == 0
    return nvrtcResult.NVRTC_SUCCESS, _Program(text.decode(), name.decode())


def nvrtcCompileProgram(program: _Program, num_options: int, options: list[bytes]) -> tuple[nvrtcResult]:
    try:
        program.image = compile_text(program.text, program.name, [option.decode() for option in options[:num_options]])
    except ValueError as error:
        program.log = str(error).encode()
        return (nvrtcResult.NVRTC_ERROR_COMPILATION,)
    return (nvrtcResult.NVRTC_SUCCESS,)


def nvrtcGetProgramLogSize(program: _Program) -> tuple[nvrtcResult, int]:
    return nvrtcResult.NVRTC_SUCCESS, len(program.log)


def nvrtcGetProgramLog(program: _Program, log: bytes) -> tuple[nvrtcResult]:
    ctypes.memmove(log, program.log, len(program.log))
    return (nvrtcResult.NVRTC_SUCCESS,)


def nvrtcGetCUBINSize(program: _Program) -> tuple[nvrtcResult, int]:
    return nvrtcResult.NVRTC_SUCCESS, len(program.image)


def nvrtcGetCUBIN(program: _Program, image: bytes) -> tuple[nvrtcResult]:
    ctypes.memmove(image, program.image, len(program.image))
    return (nvrtcResult.NVRTC_SUCCESS,)


def nvrtcDestroyProgram(program: _Program) -> tuple[nvrtcResult]:
    return (nvrtcResult.NVRTC_SUCCESS,)
