"""Stand-in for ``cupy.cuda.driver``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from emulated_gpu import modules
from emulated_gpu.status import GpuError, Status

P, R = ParamSpec("P"), TypeVar("R")


class CUDADriverError(RuntimeError):
    """CuPy's, with the number of the error."""

    def __init__(self, status: Status, text: str) -> None:
        self.status = int(status)
        super().__init__(f"CUDA_ERROR_{status.name}: {text}")


def raising(function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return function(*args, **keywords)
        except GpuError as error:
            raise CUDADriverError(error.status, error.text) from error

    return call


def ctxGetCurrent() -> int:
    """Every thread has a context: the primary one of its device."""
    return 1


@raising
def moduleLoadData(image: bytes) -> int:
    return modules.load(image)


@raising
def moduleGetFunction(module: int, name: str) -> int:
    return modules.function(module, name)


@raising
def funcGetAttribute(attribute: int, function: int) -> int:
    return modules.find(function).attribute(attribute)


@raising
def funcSetAttribute(function: int, attribute: int, value: int) -> None:
    modules.find(function).set_attribute(attribute, value)


@raising
def occupancyMaxActiveBlocksPerMultiprocessor(function: int, threads: int, shared_bytes: int) -> int:
    return modules.occupancy(function, threads, shared_bytes)


@raising
def launchKernel(
    function: int,
    grid_x: int,
    grid_y: int,
    grid_z: int,
    block_x: int,
    block_y: int,
    block_z: int,
    shared_bytes: int,
    stream: int,
    parameters: int,
    extra: int,
) -> None:
    """`parameters` is the address of a ``void*[1]``: the emulator's kernels have one parameter."""
    if (grid_y, grid_z, block_y, block_z, extra) != (1, 1, 1, 1, 0):
        raise NotImplementedError("only grids and blocks of one dimension are emulated")
    address = ctypes.c_void_p.from_address(parameters).value
    assert address is not None
    modules.launch(function, grid_x, block_x, shared_bytes, stream, address)
