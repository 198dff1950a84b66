"""Kernels from text: CuPy's own way to compile and launch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from emulated_gpu import modules
from emulated_gpu.device import ARCHITECTURE
from emulated_gpu.programs import compile_text

from cupy.arrays import ndarray
from cupy.cuda import driver
from cupy.cuda.streams import get_current_stream

__all__ = ["ElementwiseKernel", "RawKernel", "RawModule"]

_CUDA_SRC = Path(__file__).parents[4] / "cuda_src"
_MAX_THREADS = 128

Extents = tuple[int, ...]
_TYPES = {
    "bool": "bool",
    "int32": "int",
    "int64": "long long",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "uint32": "unsigned int",
    "uint64": "unsigned long long",
    "float32": "float",
    "float64": "double",
}


@functools.cache
def _module(text: str) -> int:
    return driver.moduleLoadData(compile_text(text, "kernel.cu", [f"-arch=sm_{ARCHITECTURE}", f"-I{_CUDA_SRC}"]))


def _bytes_of(value: Any) -> bytes:
    """An argument: the address of an array, or a number."""
    return (np.uint64(value.data.ptr) if isinstance(value, ndarray) else np.asarray(value)[()]).tobytes()


class _Function:
    """A kernel; called with its grid, its block and its arguments."""

    def __init__(self, function: int) -> None:
        self._function = function

    @driver.raising
    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0
    ) -> None:
        if any(extent != 1 for extent in (*grid[1:], *block[1:])):
            raise NotImplementedError("only grids and blocks of one dimension are emulated")
        packed = modules.pack(self._function, [_bytes_of(value) for value in args])
        modules.launch(self._function, grid[0], block[0], shared_mem, get_current_stream().ptr, packed)


class RawModule:
    """A compiled program, from a file."""

    def __init__(self, *, path: str) -> None:
        self._module = driver.moduleLoadData(Path(path).read_bytes())

    def get_function(self, name: str) -> _Function:
        return _Function(driver.moduleGetFunction(self._module, name))


class RawKernel:
    """A kernel from text, compiled at the first call."""

    def __init__(self, code: str, name: str) -> None:
        self._code, self._name = code, name

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0
    ) -> None:
        _Function(driver.moduleGetFunction(_module(self._code), self._name))(grid, block, args, shared_mem)


class ElementwiseKernel:
    """A kernel that computes one element of its output in each thread.

    Args:
        in_params: ``"raw T a, int32 n"``; arrays that are not raw are not emulated.
        out_params: ``"T c"``.
        operation: assigns to the output's name; has ``i``.
        name: of the kernel.
    """

    def __init__(self, in_params: str, out_params: str, operation: str, name: str) -> None:
        self._inputs = [part.split() for part in in_params.split(",")]
        self._output_type, self._output = out_params.split()
        self._operation, self._name = operation, name

    def __call__(self, *values: Any) -> ndarray:
        *inputs, output = values
        types = {self._output_type: output.dtype.name}
        parameters, arguments = [], []
        for declared, value in zip(self._inputs, inputs, strict=True):
            kind, name = declared[-2:]
            if declared[0] == "raw":
                types[kind] = value.dtype.name
                parameters.append(f"const {kind}* {name}")
                arguments.append(value)
            else:
                parameters.append(f"{_TYPES[kind]} {name}")
                arguments.append(np.dtype(kind).type(value))
        names = "".join(f"using {kind} = {_TYPES[name]}; " for kind, name in types.items() if kind not in _TYPES)
        parameters += [f"{self._output_type}* output_", "long long size_"]
        text = (
            f"{names}\n"
            f'extern "C" __global__ void {self._name}({", ".join(parameters)}) {{\n'
            "for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < size_; "
            "i += (long long)gridDim.x * blockDim.x) {\n"
            f"{self._output_type}& {self._output} = output_[i];\n{self._operation}\n}}\n}}\n"
        )
        threads = max(1, min(output.size, _MAX_THREADS))
        RawKernel(text, self._name)((1,), (threads,), (*arguments, output, np.int64(output.size)))
        return output
