"""Launches that overlap the end of the kernel before them (programmatic dependent launch of CUDA).

The kernel is set up while the one before it in the stream still ends: some microseconds that a stream of short kernels
would otherwise lose. It must begin with ``ptx::wait_for_earlier_kernels``, which returns when that one is through and
its writes are visible; so nothing changes but the time.
"""

from __future__ import annotations

from typing import Any

from epcomm.jit.device import load_cupy

__all__ = ["OverlappingLaunch", "can_overlap"]

_MIN_CAPABILITY = 90
_MIN_DRIVER = 12030  # CUDA 12.3: before, graphs cannot hold such launches
_MAX_CONFIGS = 64


def can_overlap(device: int) -> bool:
    """Whether the GPU and the driver know such launches."""
    cupy = load_cupy()
    return (
        int(cupy.cuda.Device(device).compute_capability) >= _MIN_CAPABILITY
        and cupy.cuda.runtime.driverGetVersion() >= _MIN_DRIVER
    )


class OverlappingLaunch:
    """Launches of one function; for one thread at a time."""

    def __init__(self, function: int) -> None:
        from cuda.bindings import driver  # the Buffer has loaded it for its memory

        self._driver, self._function = driver, function
        self._attribute = driver.CUlaunchAttribute()
        self._attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self._attribute.value.programmaticStreamSerializationAllowed = 1
        self._configs: dict[tuple[int, int, int, int], Any] = {}

    def launch(self, blocks: int, threads: int, shared_bytes: int, stream: int, parameters: int) -> None:
        """As `Kernel.launch`; `parameters` is the host address of a ``void*[1]``."""
        key = (blocks, threads, shared_bytes, stream)
        config = self._configs.get(key) or self._make(key)
        (status,) = self._driver.cuLaunchKernelEx(config, self._function, parameters, 0)
        if status:
            raise load_cupy().cuda.driver.CUDADriverError(int(status))

    def _make(self, key: tuple[int, int, int, int]) -> Any:
        if len(self._configs) == _MAX_CONFIGS:
            self._configs.clear()
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.blockDimX, config.sharedMemBytes, config.hStream = key
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.attrs, config.numAttrs = [self._attribute], 1
        self._configs[key] = config
        return config
