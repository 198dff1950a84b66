"""The GPUs of this process: how many, what they have, which one a thread works on, and whether a kernel has failed."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import uuid
from collections.abc import Callable

from emulated_gpu.status import GpuError, Status

__all__ = [
    "ARCHITECTURE",
    "ATTRIBUTES",
    "NAME",
    "NUM_GPUS",
    "NUM_SMS",
    "check",
    "current",
    "fail",
    "has_failed",
    "is_ending",
    "set_current",
    "uuid_of",
]

ARCHITECTURE = int(os.environ.get("EPCOMM_EMULATOR_ARCH", "90"))
NUM_SMS = int(os.environ.get("EPCOMM_EMULATOR_SMS", "16"))
NUM_GPUS = int(os.environ.get("EPCOMM_EMULATOR_GPUS", "1"))
NAME = f"emulated sm_{ARCHITECTURE}"

_KIB = 1024
# Numbers of cudaDeviceAttr; sizes of an H200.
ATTRIBUTES = {
    1: 1024,  # threads of a block
    8: 48 * _KIB,  # shared memory of a block
    10: 32,  # threads of a warp
    16: NUM_SMS,
    39: 2048,  # threads of an SM
    75: ARCHITECTURE // 10,
    76: ARCHITECTURE % 10,
    81: 228 * _KIB,  # shared memory of an SM
    97: 227 * _KIB,  # shared memory of a block that asks for more
    106: 32,  # blocks of an SM
    133: 1,  # MPS: kernels of several processes run at the same time
}

_thread = threading.local()
_failure: str | None = None
_ending = threading.Event()
atexit.register(_ending.set)

# Whether the interpreter ends: nothing is freed any more, as kernels may still run. Finalizers have it as a default
# argument, since modules may be empty by then.
is_ending: Callable[[], bool] = _ending.is_set


def uuid_of(device: int) -> bytes:
    """16 bytes, the same in every process."""
    return uuid.uuid5(uuid.NAMESPACE_DNS, f"emulated-gpu-{device}.epcomm").bytes


def current() -> int:
    """The device of the calling thread."""
    return getattr(_thread, "device", 0)


def set_current(device: int) -> None:
    if not 0 <= device < NUM_GPUS:
        raise GpuError(Status.INVALID_DEVICE, f"invalid device ordinal {device}")
    _thread.device = device


def fail(text: str) -> None:
    """A kernel has failed: every later call of this process does, too."""
    global _failure
    if _failure is None:
        _failure = text
        print(f"emulated GPU: {text}", file=sys.stderr, flush=True)


def has_failed() -> bool:
    return _failure is not None


def check() -> None:
    """Raise if a kernel has failed."""
    if _failure is not None:
        raise GpuError(Status.LAUNCH_FAILED, f"unspecified launch failure ({_failure})")
