"""The device that a thread works on."""

from __future__ import annotations

import threading

from emulated_gpu import device

from cupy.cuda import runtime

__all__ = ["Device", "is_available"]

_thread = threading.local()


def is_available() -> bool:
    return device.NUM_GPUS > 0


class Device:
    """One GPU; as a context manager, the current one inside."""

    def __init__(self, number: int | Device | None = None) -> None:
        self.id = runtime.getDevice() if number is None else int(number)

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __enter__(self) -> Device:
        _thread.__dict__.setdefault("stack", []).append(runtime.getDevice())
        runtime.setDevice(self.id)
        return self

    def __exit__(self, *details: object) -> None:
        runtime.setDevice(_thread.stack.pop())

    def use(self) -> None:
        runtime.setDevice(self.id)

    def synchronize(self) -> None:
        with self:
            runtime.deviceSynchronize()

    @property
    def compute_capability(self) -> str:
        return str(device.ARCHITECTURE)

    @property
    def attributes(self) -> dict[str, int]:
        return {"MultiProcessorCount": device.NUM_SMS}
