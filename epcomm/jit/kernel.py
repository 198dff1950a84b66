"""Loaded kernels: the only place that launches.

Through CuPy's thin driver calls, which take plain integers: 0.3 us a launch, where `cupy.RawKernel` takes several. Only
launches that overlap go through cuda-bindings, which has them.
"""

from __future__ import annotations

import threading
from array import array
from typing import Any

from epcomm.errors import CapacityError, CompileError
from epcomm.jit.device import current_device, load_cupy
from epcomm.jit.overlap import OverlappingLaunch, can_overlap

__all__ = ["Kernel"]

# CUfunction_attribute of cuda.h
_MAX_THREADS, _STATIC_SHARED, _LOCAL, _REGISTERS = 0, 1, 3, 4
_MAX_DYNAMIC_SHARED, _SHARED_CARVEOUT = 8, 9
_CARVEOUT_MAX_SHARED = 100

# (device, cubin) -> module. Never unloaded: that may wait for the GPU, where a kernel may wait for this thread.
_modules: dict[tuple[int, bytes], int] = {}
_loading = threading.Lock()


class Kernel:
    """An entry point of a cubin, on one device.

    Not for two threads at once: ranks that are threads have a Kernel each, and share the loaded code.
    All methods but the constructor expect that the device's primary context is current in the calling thread, as it
    is after ``cupy.cuda.Device(device).use()`` or any CuPy, torch or JAX work of that thread on that device.

    Args:
        cubin: from `cached_cubin` or `share_cubins`.
        entry: name of an ``extern "C" __global__`` function with one parameter, the struct of its arguments.
        device: CUDA device number. The code is loaded now, not at the first launch.
        overlaps: it begins with ``ptx::wait_for_earlier_kernels``; its launches overlap the end of the kernel before it
            in the stream, where GPU and driver can do that.

    Attributes:
        entry: its name.
        device: its device.
        module: the ``CUmodule`` that it is in, one for all kernels of a cubin on a device; never unloaded.
        max_threads: threads a block may have.
        registers: 32-bit registers a thread uses.
        static_shared_bytes: shared memory a block uses beside what `launch` asks for.
        local_bytes: memory a thread spills to; 0 if the registers suffice.

    Raises:
        MissingDependency: there is no CuPy.
        CompileError: the cubin has no such function, or the GPU cannot run it.
    """

    def __init__(self, cubin: bytes, entry: str, device: int, *, overlaps: bool = False) -> None:
        self._driver = driver = load_cupy().cuda.driver
        self.entry, self.device = entry, device
        with current_device(device):
            try:
                self.module = _module(driver, cubin, device)
                self._function = driver.moduleGetFunction(self.module, entry)
            except driver.CUDADriverError as error:
                raise CompileError(entry, got=str(error), wanted=f"a function that device {device} can run") from error
            # Asking for attributes loads the function even where the driver loads lazily.
            self.max_threads = self._attribute(_MAX_THREADS)
            self.registers = self._attribute(_REGISTERS)
            self.static_shared_bytes = self._attribute(_STATIC_SHARED)
            self.local_bytes = self._attribute(_LOCAL)
        # kernelParams, a void*[1]: `launch` writes the address of the arguments, the driver reads it there.
        self._parameters = array("Q", [0])
        self._parameters_address = self._parameters.buffer_info()[0]
        self._launch = driver.launchKernel
        self._overlapping = OverlappingLaunch(self._function) if overlaps and can_overlap(device) else None

    def __repr__(self) -> str:
        return f"Kernel({self.entry!r}, device={self.device}, registers={self.registers})"

    def allow_shared(self, num_bytes: int) -> None:
        """Let launches ask for up to `num_bytes` of dynamic shared memory.

        The SMs are asked to give all they can to shared memory: blocks of kernels that disagree about that cannot be
        on one SM together.

        Raises:
            CapacityError: the GPU has less.
        """
        driver = self._driver
        try:
            driver.funcSetAttribute(self._function, _MAX_DYNAMIC_SHARED, num_bytes)
        except driver.CUDADriverError as error:
            raise CapacityError(
                f"{self.entry}: shared memory",
                got=f"{num_bytes} bytes beside {self.static_shared_bytes} static ones",
                wanted=f"what one block may have on device {self.device} ({error})",
            ) from error
        driver.funcSetAttribute(self._function, _SHARED_CARVEOUT, _CARVEOUT_MAX_SHARED)

    def blocks_per_sm(self, threads: int, shared_bytes: int) -> int:
        """How many blocks with this many threads and bytes of dynamic shared memory fit one SM; 0: none."""
        return int(self._driver.occupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, shared_bytes))

    def launch(self, blocks: int, threads: int, shared_bytes: int, stream: int, arguments: int) -> None:
        """Launch a grid of `blocks` x 1 x 1. Not collective, does not block the host.

        Args:
            blocks: blocks of the grid.
            threads: threads of a block.
            shared_bytes: dynamic shared memory of a block; above 48 KiB `allow_shared` comes first.
            stream: a ``cudaStream_t`` of this device; 0 is the legacy default stream.
            arguments: host address of the kernel's argument struct, which is copied before this returns.

        Raises:
            CUDADriverError: CuPy's; the launch was refused, or an earlier kernel of this process has failed.
        """
        self._parameters[0] = arguments
        if self._overlapping is not None:
            self._overlapping.launch(blocks, threads, shared_bytes, stream, self._parameters_address)
            return
        self._launch(self._function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, self._parameters_address, 0)

    def _attribute(self, number: int) -> int:
        return int(self._driver.funcGetAttribute(number, self._function))


def _module(driver: Any, cubin: bytes, device: int) -> int:
    with _loading:
        if (device, cubin) not in _modules:
            _modules[device, cubin] = driver.moduleLoadData(cubin)
        return _modules[device, cubin]
