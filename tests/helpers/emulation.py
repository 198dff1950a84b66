"""Small CUDA programs for the emulator, compiled and launched without the package."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from typing import Any

import numpy as np
import pytest
from emulator.compiler import compile_text, has_compiler

from epcomm.jit.source import cuda_src_dir

__all__ = ["Emulated", "needs_compiler"]

needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no g++")


@functools.cache
def _load(text: str, architecture: str) -> ctypes.CDLL:
    data = compile_text(text, "probe.cu", [f"-arch=sm_{architecture}", f"-I{cuda_src_dir()}"])
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(data)
        file.flush()
        return ctypes.CDLL(file.name)


class Emulated:
    """A program whose kernels take arrays, by their addresses, and ints, as ``int``."""

    def __init__(self, text: str, architecture: str = "90") -> None:
        self.library = _load(text, architecture)
        self.library.emulator_launch.argtypes = [
            *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32),
            *(ctypes.c_uint64, ctypes.c_void_p),
        ]

    def value(self, name: str, kind: Any = ctypes.c_uint32) -> Any:
        return kind.in_dll(self.library, name).value

    def launch(self, entry: str, blocks: int, threads: int, *arguments: Any, shared_bytes: int = 0) -> int:
        """0, or not if the launch has failed."""
        parameters = bytearray(self.value(f"{entry}_parameter_bytes", ctypes.c_size_t))
        count = self.value(f"{entry}_parameter_count")
        assert count == len(arguments)
        offsets = (ctypes.c_uint32 * (count + 1)).in_dll(self.library, f"{entry}_parameter_offsets")
        for offset, argument in zip(offsets, arguments, strict=False):
            data = np.uint64(argument.ctypes.data) if isinstance(argument, np.ndarray) else np.int32(argument)
            parameters[offset : offset + data.nbytes] = data.tobytes()
        memory = (ctypes.c_char * max(1, len(parameters))).from_buffer_copy(bytes(parameters) or b"\0")
        address = ctypes.cast(getattr(self.library, entry), ctypes.c_void_p)
        return int(self.library.emulator_launch(address, blocks, threads, shared_bytes, memory))

    def run(self, entry: str, blocks: int, threads: int, *arguments: Any, shared_bytes: int = 0) -> None:
        """Launch a kernel that works."""
        assert self.launch(entry, blocks, threads, *arguments, shared_bytes=shared_bytes) == 0
