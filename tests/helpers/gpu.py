"""What tests on a GPU need of the machine."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import numpy as np
import pytest

from epcomm import env
from epcomm.bootstrap import mps

__all__ = ["MpsService", "busy", "device_of_rank", "emulated", "has_gpu", "jax_gpus", "need_gpu", "not_emulated"]


def need_gpu() -> Any:
    """The CuPy module. Skips the importing test module where there is no GPU, before any job of it is started."""
    cupy = pytest.importorskip("cupy", reason="optional package cupy is not installed (extra cuda12 or cuda13)")
    pytest.importorskip(
        "cuda.bindings.driver", reason="optional package cuda-bindings is not installed (extra cuda12 or cuda13)"
    )
    if not cupy.cuda.is_available():
        pytest.skip("no GPU", allow_module_level=True)
    return cupy


def emulated() -> bool:
    """Whether the GPU is that of tests/emulator, whose kernels run on the CPU: times mean nothing."""
    return bool(getattr(sys.modules.get("cupy"), "is_emulated", False))


def not_emulated(reason: str) -> Any:
    """Marks a test that only a real GPU can pass."""
    return pytest.mark.skipif(emulated(), reason=f"the GPU is emulated: {reason}")


def has_gpu(framework: str) -> bool:
    """Whether `framework` is there and can use a GPU; imports it, and skips the test where it is not."""
    if framework == "torch":
        return bool(pytest.importorskip("torch").cuda.is_available())
    if framework == "jax":
        pytest.importorskip("jax")
        return bool(jax_gpus())
    return True


def device_of_rank() -> int:
    """The GPU that a Buffer of this rank takes; where no launcher has numbered the ranks, the current one."""
    import cupy

    number = env.launcher_local_rank()
    return int(cupy.cuda.Device().id if number is None else number % cupy.cuda.runtime.getDeviceCount())


def jax_gpus() -> list[Any]:
    """The GPUs that JAX sees, none if it sees no GPU."""
    import cupy
    import jax

    current = cupy.cuda.Device()
    try:
        return [device for device in jax.devices() if device.platform == "gpu"]
    finally:
        current.use()  # JAX leaves another one


_BUSY = r"""
__device__ unsigned long long now_ns() {
    unsigned long long ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}
extern "C" __global__ void busy(unsigned long long ns) {
    const unsigned long long start = now_ns();
    while (now_ns() - start < ns) {}
}
"""


@functools.cache
def _busy_kernel() -> Any:
    import cupy

    return cupy.RawKernel(_BUSY, "busy")


def busy(milliseconds: float, stream: Any = None) -> None:
    """Keep a CuPy stream, the current one by default, busy for so long. Does not block the host."""
    import cupy

    with stream or cupy.cuda.get_current_stream():
        _busy_kernel()((1,), (1,), (np.uint64(milliseconds * 1e6),))


class MpsService:
    """The MPS daemon of the jobs whose ranks share a GPU: one for all of them, started when the first one needs it.

    A process that dies in a kernel may take the server along, and with it every other client: after a job that did not
    end well the next one gets a new daemon. A daemon that was there before is used and left alone.
    """

    def __init__(self) -> None:
        self._service = contextlib.ExitStack()
        self._changes: dict[str, str] | None = None

    def environment(self) -> dict[str, str]:
        """Changes to the environment of a job; none where MPS is not installed, and ranks take turns."""
        if self._changes is None:
            self._changes = self._service.enter_context(mps.running()) if mps.is_installed() else {}
        return self._changes

    def stop(self) -> None:
        """End the daemon, if it is ours."""
        self._service.close()
        self._changes = None
