"""Raw CUDA stream handles: which one a framework uses, what a caller means by one, and one waiting for another."""

from __future__ import annotations

import operator
import sys
import threading
from typing import Any, NamedTuple

from epcomm.errors import InputError

__all__ = [
    "LEGACY",
    "PER_THREAD",
    "StreamRef",
    "as_stream",
    "current_stream",
    "current_torch_stream",
    "dlpack_stream",
    "order",
]

# Handles that every runtime knows. 0 means one of them, in all but exotic builds the first.
LEGACY, PER_THREAD = 1, 2


class StreamRef(NamedTuple):
    """A stream to come back to later.

    Attributes:
        ptr: raw handle.
        keep: the object that destroys the stream when it goes, None if nothing does.
    """

    ptr: int
    keep: object


_NO_ORDER = -1  # DLPack: the consumer does the ordering
_DISABLE_TIMING = 2  # cudaEventDisableTiming

_local = threading.local()  # .events: device -> event


def current_stream(framework: str, device: int) -> int | None:
    """The stream in which `framework` queues this thread's work on `device`; None if it does not say (JAX, DLPack).

    Args:
        framework: as `framework_of` names it.
        device: CUDA device number.
    """
    if framework == "torch":
        return current_torch_stream(sys.modules["torch"], device)
    if framework == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr)
    return None


def current_torch_stream(torch: Any, device: int) -> int:
    """The raw handle of PyTorch's current stream; `torch` is the module."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # private, and 20 times as fast
    return int(raw(device) if raw is not None else torch.cuda.current_stream(device).cuda_stream)


def as_stream(stream: Any, name: str = "stream") -> int:
    """The raw handle of what a caller passed as a stream.

    The handle does not keep the stream alive.

    Args:
        stream: an int (0 and 1: the legacy default stream, 2: the one of the thread), an object with
            ``__cuda_stream__``, a PyTorch stream, a CuPy stream.
        name: what to call it in an error.

    Raises:
        InputError: something else.
    """
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr"):
        handle = getattr(stream, attribute, None)
        if handle is not None:
            return int(handle)
    try:
        handle = -1 if isinstance(stream, bool) else operator.index(stream)
    except TypeError:
        handle = -1
    if handle < 0:
        raise InputError(
            name,
            got=repr(stream),
            wanted="a CUDA stream: a handle (int), a PyTorch or CuPy stream, or an object with __cuda_stream__",
            do="leave it out to use the current stream of the input's framework",
        )
    return handle


def dlpack_stream(stream: object) -> int | None:
    """The handle that a DLPack consumer means by ``__dlpack__(stream=…)``, None if nothing is to be ordered.

    Raises:
        BufferError: no stream, as the DLPack protocol wants it.
    """
    if stream is None:
        return LEGACY
    try:
        handle = operator.index(stream)  # type: ignore[arg-type]
    except TypeError:
        raise BufferError(f"stream must be None or an int, not {stream!r}") from None
    if handle < _NO_ORDER:
        raise BufferError(f"stream must be -1 or the handle of a CUDA stream, not {handle}")
    return None if handle == _NO_ORDER else handle or LEGACY


def order(first: int, then: int, device: int) -> None:
    """Later work in the stream `then` waits for the work in `first` so far. Does not block the host.

    Args:
        first, then: raw handles of streams of `device`; nothing happens when both are the same.
        device: CUDA device number.
    """
    first, then = first or LEGACY, then or LEGACY
    if first == then:
        return
    import cupy

    runtime = cupy.cuda.runtime
    # A wait refers to what the event was recorded for at the time, so one event of a thread serves all calls.
    events: dict[int, int] = _local.__dict__.setdefault("events", {})
    event = events.get(device)
    if event is None:
        with cupy.cuda.Device(device):
            event = events[device] = int(runtime.eventCreateWithFlags(_DISABLE_TIMING))
    # A default stream is that of the current device, which JAX for one leaves at the last GPU.
    before = runtime.getDevice()
    if before != device:
        runtime.setDevice(device)
    try:
        runtime.eventRecord(event, first)
        runtime.streamWaitEvent(then, event, 0)
    finally:
        if before != device:
            runtime.setDevice(before)
