"""CUDA's driver API for this room: loaded at first use, errors raised, the caller's context put back.

Every call runs in the primary context of its device, the one that CuPy, PyTorch and JAX use. `in_context` pushes it
and pops it again, so that the device that is current in the calling thread stays what it was. A context is retained
once a process and never released: what a process still holds at its end, the driver frees.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from epcomm.errors import EpcommError, MissingDependency

__all__ = ["call", "fill_zero", "in_context", "load", "status_of", "write"]

PIP_LINE = "pip install 'epcomm[cuda13]' (or 'epcomm[cuda12]' for a driver of CUDA 12)"

_contexts: dict[int, Any] = {}
_lock = threading.Lock()


def load() -> Any:
    """The module ``cuda.bindings.driver``.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependency(
            "cuda.bindings", got=str(error), wanted="the Python bindings of the CUDA driver", do=PIP_LINE
        ) from error
    return driver


def status_of(name: str, *args: Any) -> tuple[str, tuple[Any, ...]]:
    """Call the driver function `name`; the name of its status (``"CUDA_SUCCESS"``), and what it returned."""
    status, *values = getattr(load(), name)(*args)
    return status.name, tuple(values)


def call(name: str, *args: Any) -> Any:
    """Call the driver function `name`; what it returned: None, one value, or a tuple.

    Raises:
        EpcommError: the driver refused; names the function and the status.
    """
    status, values = status_of(name, *args)
    if status != "CUDA_SUCCESS":
        raise EpcommError(f"CUDA driver, {name}", got=status, do="run `epcomm doctor` on this machine")
    return values[0] if len(values) == 1 else values or None


def fill_zero(ptr: int, num_bytes: int) -> None:
    """Fill memory of the current context's device with zero bytes; blocks the host until they are there."""
    with _own_stream() as stream:
        call("cuMemsetD8Async", ptr, 0, num_bytes, stream)


def write(ptr: int, data: bytes) -> None:
    """Copy `data` to memory of the current context's device; blocks the host until it is there."""
    with _own_stream() as stream:
        call("cuMemcpyHtoDAsync", ptr, data, len(data), stream)


@contextmanager
def _own_stream() -> Iterator[Any]:
    """A stream for the body, whose work is done when it ends.

    The legacy stream waits for kernels of other ones, which may wait for this rank.
    """
    stream = call("cuStreamCreate", int(load().CUstream_flags.CU_STREAM_NON_BLOCKING))
    try:
        yield stream
        call("cuStreamSynchronize", stream)
    finally:
        status_of("cuStreamDestroy", stream)


@contextmanager
def in_context(device: int) -> Iterator[None]:
    """The body runs with the primary context of `device` current in this thread."""
    call("cuCtxPushCurrent", _context_of(device))
    try:
        yield
    finally:
        call("cuCtxPopCurrent")


def _context_of(device: int) -> Any:
    context = _contexts.get(device)
    if context is None:
        with _lock:
            context = _contexts.get(device)
            if context is None:
                call("cuInit", 0)
                context = _contexts[device] = call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", device))
    return context
