"""CuPy, at first use, and the CUDA device that the calling thread works on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from epcomm.errors import MissingDependency

__all__ = ["current_device", "device_architecture", "device_uuid", "load_cupy", "max_shared_bytes", "num_sms"]

_NUM_SMS, _MAX_SHARED_BYTES = 16, 97  # cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin


@functools.cache
def load_cupy() -> Any:
    """The module ``cupy``, with ``cupy.cuda.driver`` and ``cupy.cuda.runtime``.

    Raises:
        MissingDependency: it cannot be imported.
    """
    try:
        import cupy
    except ImportError as error:
        raise MissingDependency(
            "cupy",
            got=str(error).strip().splitlines()[0],
            wanted="the package, for backend='cuda'",
            do="pip install 'epcomm[cuda13]', or 'epcomm[cuda12]' for a driver that is older than CUDA 13",
        ) from error
    return cupy


@contextlib.contextmanager
def current_device(device: int) -> Iterator[None]:
    """Inside, the primary context of CUDA device `device` is current in this thread; it is made if need be.

    That is the context in which CuPy, torch and JAX work too.
    """
    cupy = load_cupy()
    with cupy.cuda.Device(device):
        if not cupy.cuda.driver.ctxGetCurrent():  # the thread's first use of CUDA
            cupy.cuda.runtime.free(0)
        yield


def device_architecture(device: int) -> str:
    """Architecture to compile for: ``"90"`` for compute capability 9.0."""
    return str(load_cupy().cuda.Device(device).compute_capability)


def device_uuid(device: int) -> str:
    """32 hexadecimal digits that are equal exactly for the same GPU (or MIG instance), in any process."""
    uuid = bytes(load_cupy().cuda.runtime.getDeviceProperties(device)["uuid"])[:16]
    return uuid.ljust(16, b"\0").hex()  # CuPy takes it for a string, which a zero ends


def max_shared_bytes(device: int) -> int:
    """Shared memory that a block may have if it asks for it, static and dynamic."""
    return int(load_cupy().cuda.runtime.deviceGetAttribute(_MAX_SHARED_BYTES, device))


def num_sms(device: int) -> int:
    """SMs that this process may use; an MPS partition (CUDA_MPS_ACTIVE_THREAD_PERCENTAGE) is smaller than the GPU."""
    return int(load_cupy().cuda.runtime.deviceGetAttribute(_NUM_SMS, device))
