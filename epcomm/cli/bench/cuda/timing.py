"""Time on the GPU by CUDA events, and Python's own time. All ranks together; every figure is of the slowest rank.

Two ways, as each has its error. *Calls*: a device barrier, an event, the call, an event. That gives a distribution, but
events between kernels slow down the front end of a GPU that processes share. *Chain*: the time of many [barrier,
call] in a row, less that of as many barriers, divided; no event inside. Before both, the queue is filled behind a delay
on the GPU, so that what is measured never waits for Python.

A call that blocks the host cannot be queued. It starts after a barrier of the hosts and one on the device, and its time
contains Python's; in a chain it has no barriers, as it waits for all ranks itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from epcomm.bootstrap import Communicator
from epcomm.buffer import Buffer

__all__ = ["Timer", "copy_speed"]

_WARMUP = 5
_CHAINS = 3  # of which the median counts
_MAX_CHAIN = 100  # calls; a launch queue holds 1024 entries, and a call takes a few
_DELAY_US = 150.0  # of GPU time for each call in the queue; longer than Python takes for it
_COPY_BYTES = 1 << 30
_SCRATCH_BYTES = 512 << 20


def copy_speed(cupy: Any, stream: Any) -> float:
    """Bytes a second, read and written, of a large copy within the GPU. Local, blocks the host."""
    free, _ = cupy.cuda.runtime.memGetInfo()
    num_bytes = min(_COPY_BYTES, free // 8)
    source, target = (cupy.zeros(num_bytes, np.uint8) for _ in range(2))
    source[...] = cupy.arange(num_bytes, dtype=np.uint8)  # zeros may be faster to move
    times_ms = []
    for _ in range(_WARMUP + 20):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        target.data.copy_from_device_async(source.data, num_bytes, stream)
        end.record(stream)
        end.synchronize()
        times_ms.append(cupy.cuda.get_elapsed_time(start, end))
    return float(2e3 * num_bytes / np.median(times_ms[_WARMUP:]))


class Timer:
    """Times calls on all ranks. Methods are collective and block the host.

    Args:
        cupy: the module.
        comm: the ranks.
        buffer: whose device barrier is used.
        stream: in which calls run; the current one of CuPy.
        bytes_per_s: `copy_speed`, for delays.
    """

    def __init__(self, cupy: Any, comm: Communicator, buffer: Buffer, stream: Any, bytes_per_s: float) -> None:
        self._cupy, self._comm, self._buffer, self._stream = cupy, comm, buffer, stream
        self._scratch = cupy.zeros(_SCRATCH_BYTES, np.uint8)
        self._copy_us = 1e6 * self._scratch.nbytes / bytes_per_s

    def calls_us(self, run: Callable[[], object], repeats: int, *, waits: bool, num_calls: int = 1) -> list[float]:
        """One time for each `run`, which makes `num_calls` calls of the Buffer."""
        events = [(self._cupy.cuda.Event(), self._cupy.cuda.Event()) for _ in range(_WARMUP + repeats)]
        for number, (start, end) in enumerate(events):
            if waits:
                self._comm.barrier()
            elif number % _MAX_CHAIN == 0:
                self._begin(num_calls * min(_MAX_CHAIN, len(events) - number))
            self._buffer.barrier(stream=self._stream)
            start.record(self._stream)
            run()
            end.record(self._stream)
        self._end()
        elapsed = [1e3 * self._cupy.cuda.get_elapsed_time(start, end) for start, end in events[_WARMUP:]]
        return list(np.max(self._comm.allgather(elapsed), axis=0).tolist())

    def chain_us(self, run: Callable[[], object], repeats: int, *, waits: bool) -> float:
        """The mean time of a call in a chain."""
        length = min(repeats, _MAX_CHAIN)
        times = []
        for _ in range(_CHAINS):
            if waits:
                times.append(self._waiting_chain(run, length) / length)
            else:
                times.append((self._chain(run, length) - self._chain(lambda: None, length)) / length)
        return float(np.median(times))

    def row_us(self, run: Callable[[], object], repeats: int, num_calls: int = 1) -> float:
        """The mean time of a `run` in a row of them with nothing between, which does not block the host."""
        length = min(repeats, _MAX_CHAIN)
        times = []
        for _ in range(_CHAINS):
            start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
            self._begin(num_calls * length)
            self._buffer.barrier(stream=self._stream)
            start.record(self._stream)
            for _ in range(length):
                run()
            times.append(self._elapsed(start, end) / length)
        return float(np.median(times))

    def halves_us(
        self, send: Callable[[], Callable[[], None]], repeats: int, num_calls: int = 1
    ) -> tuple[float, float]:
        """Medians of the two halves of a call: `send`, which makes `num_calls` of the Buffer, gives the other one."""
        events = [[self._cupy.cuda.Event() for _ in range(4)] for _ in range(_WARMUP + repeats)]
        for number, (send_start, send_end, receive_start, receive_end) in enumerate(events):
            if number % _MAX_CHAIN == 0:
                self._begin((num_calls + 1) * min(_MAX_CHAIN, len(events) - number))
            self._buffer.barrier(stream=self._stream)
            send_start.record(self._stream)
            receive = send()
            send_end.record(self._stream)
            self._buffer.barrier(stream=self._stream)
            receive_start.record(self._stream)
            receive()
            receive_end.record(self._stream)
        self._end()
        elapsed = self._cupy.cuda.get_elapsed_time
        halves = [[1e3 * elapsed(*four[:2]), 1e3 * elapsed(*four[2:])] for four in events[_WARMUP:]]
        send_us, receive_us = np.median(np.max(self._comm.allgather(halves), axis=0), axis=0).tolist()
        return send_us, receive_us

    def _waiting_chain(self, run: Callable[[], object], length: int) -> float:
        start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        self._comm.barrier()
        self._buffer.barrier(stream=self._stream)
        start.record(self._stream)
        for _ in range(length):
            run()
        return self._elapsed(start, end)

    def _chain(self, run: Callable[[], object], length: int) -> float:
        start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        self._begin(length)
        self._buffer.barrier(stream=self._stream)  # the delays end at different times
        start.record(self._stream)
        for _ in range(length):
            self._buffer.barrier(stream=self._stream)
            run()
        return self._elapsed(start, end)

    def _elapsed(self, start: Any, end: Any) -> float:
        end.record(self._stream)
        self._end()
        return float(max(self._comm.allgather(1e3 * self._cupy.cuda.get_elapsed_time(start, end))))

    def python_us(self, run: Callable[[], object], repeats: int, num_calls: int = 1) -> float:
        """The host's time of a `run`, median, in rows of them that find the GPU busy."""
        times_s = []
        for number in range(_WARMUP + repeats):
            if number % _MAX_CHAIN == 0:
                self._begin(num_calls * min(_MAX_CHAIN, _WARMUP + repeats - number))
            start = time.perf_counter()
            run()
            times_s.append(time.perf_counter() - start)
        self._end()
        return float(max(self._comm.allgather(1e6 * float(np.median(times_s[_WARMUP:])))))

    def _begin(self, num_calls: int) -> None:
        """Let the hosts meet, and keep the GPU busy until `num_calls` are queued behind."""
        self._stream.synchronize()
        self._comm.barrier()
        half = self._scratch.nbytes // 2
        for _ in range(int(num_calls * _DELAY_US / self._copy_us) + 1):
            self._scratch[half:].data.copy_from_device_async(self._scratch.data, half, self._stream)

    def _end(self) -> None:
        self._stream.synchronize()
        self._buffer.check()
