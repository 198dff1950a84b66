"""The stand-ins for CuPy and cuda-bindings behave as a GPU does where epcomm's tests rely on it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

cupy = pytest.importorskip("cupy", reason="tests/emulator/site is not on PYTHONPATH")
if not getattr(cupy, "is_emulated", False):
    pytest.skip("a real CuPy is on PYTHONPATH first", allow_module_level=True)

from cupy.cuda import runtime  # noqa: E402
from emulated_gpu import queues  # noqa: E402


class Gate:
    """An operation in a stream that does not end before `open`."""

    def __init__(self, stream) -> None:
        self._event = threading.Event()
        queues.find(stream.ptr).submit(lambda: self._event.wait(20) and None)

    def open(self) -> None:
        self._event.set()


def stream(non_blocking: bool = True):
    return cupy.cuda.Stream(non_blocking=non_blocking)


def status_of(call) -> str:
    with pytest.raises(runtime.CUDARuntimeError) as caught:
        call()
    return str(caught.value).partition(":")[0]


# -- streams and events -------------------------------------------------------------------------------------------


def test_the_host_runs_ahead():
    side, x = stream(), cupy.zeros(4, np.int32)
    runtime.deviceSynchronize()
    gate = Gate(side)
    with side:
        x += 1
        assert not side.done
    assert x.get().tolist() == [0] * 4
    gate.open()
    side.synchronize()
    assert x.get().tolist() == [1] * 4


def test_streams_overlap_and_events_order_them():
    first, second = stream(), stream()
    x = cupy.zeros(1, np.int32)
    runtime.deviceSynchronize()
    gate, event = Gate(first), cupy.cuda.Event()
    with first:
        x.fill(1)
    event.record(first)
    with second:
        free = cupy.ones(1, np.int32)
        assert int(free[0]) == 1
        second.wait_event(event)
        late = x + 1
    assert not event.done
    gate.open()
    second.synchronize()
    assert event.done
    assert int(late[0]) == 2


def test_a_wait_means_the_recording_of_its_time():
    first, second = stream(), stream()
    event = cupy.cuda.Event()
    event.record(first)
    first.synchronize()
    second.wait_event(event)
    gate = Gate(first)
    event.record(first)
    second.synchronize()
    assert not event.done
    gate.open()
    event.synchronize()


@pytest.mark.parametrize("non_blocking", [False, True])
def test_the_default_stream_waits_for_blocking_streams(non_blocking):
    side, x = stream(non_blocking), cupy.zeros(1, np.int32)
    runtime.deviceSynchronize()
    gate = Gate(side)
    with cupy.cuda.Stream.null:
        x.fill(1)
        event = cupy.cuda.Stream.null.record()
    time.sleep(0.05)
    assert event.done == non_blocking
    gate.open()
    runtime.deviceSynchronize()


def test_blocking_streams_wait_for_the_default_stream():
    gate, blocking, other = Gate(cupy.cuda.Stream.null), stream(False), stream()
    other.record().synchronize()
    event = blocking.record()
    time.sleep(0.05)
    assert not event.done
    gate.open()
    event.synchronize()


def test_elapsed_time():
    side = stream()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(side)
    queues.find(side.ptr).submit(lambda: time.sleep(0.02))
    end.record(side)
    assert status_of(lambda: cupy.cuda.get_elapsed_time(start, end)) == "cudaErrorNotReady"
    end.synchronize()
    assert 20 <= cupy.cuda.get_elapsed_time(start, end) < 1000


def test_a_stream_ends_with_its_object():
    handle = stream().ptr
    assert status_of(lambda: runtime.streamSynchronize(handle)) == "cudaErrorInvalidHandle"


# -- capture ------------------------------------------------------------------------------------------------------


def test_a_graph_is_replayed():
    side, x = stream(), cupy.zeros(2, np.int32)
    runtime.deviceSynchronize()
    with side:
        side.begin_capture()
        x += 1
        doubled = x * 2
        assert side.is_capturing()
        graph = side.end_capture()
        assert x.get().tolist() == [0, 0]
        for _ in range(3):
            graph.launch()
        assert doubled.get().tolist() == [6, 6]


def test_a_capture_spreads_over_events():
    first, second, x = stream(), stream(), cupy.zeros(1, np.int32)
    runtime.deviceSynchronize()
    first.begin_capture()
    second.wait_event(first.record())
    assert second.is_capturing()
    with second:
        x += 1
    first.wait_event(second.record())
    graph = first.end_capture()
    assert not second.is_capturing()
    graph.launch(first)
    first.synchronize()
    assert int(x[0]) == 1


def test_an_unjoined_stream():
    first, second = stream(), stream()
    first.begin_capture()
    second.wait_event(first.record())
    with second:
        cupy.zeros(1, np.int32)
    assert status_of(first.end_capture) == "cudaErrorStreamCaptureUnjoined"


@pytest.mark.parametrize("act", ["synchronize", "device", "isolation"])
def test_what_a_capture_forbids(act):
    side, other = stream(), stream()
    event = other.record()
    acts = {
        "synchronize": (side.synchronize, "cudaErrorStreamCaptureUnsupported"),
        "device": (runtime.deviceSynchronize, "cudaErrorStreamCaptureUnsupported"),
        "isolation": (lambda: side.wait_event(event), "cudaErrorStreamCaptureIsolation"),
    }
    call, status = acts[act]
    side.begin_capture()
    assert status_of(call) == status
    assert status_of(side.end_capture) == "cudaErrorStreamCaptureInvalidated"


def test_a_captured_event_cannot_be_asked():
    side = stream()
    side.begin_capture()
    event = side.record()
    assert status_of(lambda: event.done) == "cudaErrorCapturedEvent"
    side.end_capture()


def test_the_default_stream_beside_a_capture():
    blocking = stream(False)
    blocking.begin_capture()
    assert status_of(lambda: runtime.streamIsCapturing(queues.LEGACY)) == "cudaErrorStreamCaptureImplicit"
    assert status_of(blocking.end_capture) == "cudaErrorStreamCaptureInvalidated"
    side = stream()
    side.begin_capture()
    assert not runtime.streamIsCapturing(queues.LEGACY)
    side.end_capture()


# -- memory -------------------------------------------------------------------------------------------------------

CRASHES = {
    "behind_the_end": "x = cupy.zeros(512, np.uint8); ctypes.memset(x.data.ptr, 0, 513)",
    "after_the_end": """
x = cupy.zeros(512, np.uint8); ptr = x.data.ptr; del x
cupy.cuda.runtime.deviceSynchronize(); cupy.zeros(1).get(); ctypes.memset(ptr, 0, 1)
""",
    "before_access": """
from cuda.bindings import driver
ptr = driver.cuMemAddressReserve(2 << 20, 0, 0, 0)[1]; ctypes.memset(ptr, 0, 1)
""",
}


@pytest.mark.parametrize("program", CRASHES.values(), ids=CRASHES)
def test_what_is_not_there_cannot_be_used(program):
    prefix = "import ctypes, cupy; import numpy as np; cupy.cuda.runtime.deviceSynchronize(); print('here')\n"
    done = subprocess.run([sys.executable, "-c", prefix + program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-11, "here\n"), done.stderr


def test_memory_is_freed_behind_its_stream():
    side = stream()
    with side:
        x = cupy.ones(1 << 20, np.uint8)
        side.synchronize()
        free, _ = runtime.memGetInfo()
        gate = Gate(side)
        copied, ptr = cupy.zeros(16, np.uint8), x.data.ptr
        runtime.memcpyAsync(copied.data.ptr, ptr, 16, runtime.memcpyDeviceToDevice, side.ptr)
        del x
        gate.open()
        assert copied.get().tolist() == [1] * 16
        side.synchronize()
        assert runtime.memGetInfo()[0] > free


# -- arrays -------------------------------------------------------------------------------------------------------


def test_arrays_are_not_numpys():
    x = cupy.arange(6).reshape(2, 3)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(TypeError):
        x + np.arange(3)
    assert (2 * x[:, 1:] + np.int64(1)).get().tolist() == [[3, 5], [9, 11]]
    assert x.sum(axis=1, keepdims=True).get().tolist() == [[3], [12]]


def test_what_is_missing_is_missed():
    with pytest.raises(AttributeError):
        _ = cupy.fft
    with pytest.raises(ImportError, match="cuBLAS"):
        _ = cupy.ones((2, 2)) @ cupy.ones((2, 2))
