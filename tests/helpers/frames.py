"""The NumPy arrays of the tests as arrays of another framework, and results as NumPy arrays again.

The bodies of the tests know NumPy only: what they pass to a Buffer goes `up`, what they get back comes `down`. On the
host backend both are the identity. Arrays keep their bits, their strides, and where they start within 16 bytes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from helpers.gpu import device_of_rank, jax_gpus
from numpy.typing import NDArray

from epcomm import Buffer

__all__ = ["CUPY", "JAX", "NUMPY", "TORCH", "Frames", "assign", "down", "frames_of", "up_all"]

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Frames:
    """A framework whose arrays a test passes to its Buffer.

    Attributes:
        up: the framework's copy of a NumPy array.
        synchronize: wait for all work on this rank's device, so that `Buffer.check` knows of it.
        is_immutable: arrays never change.
    """

    name: str
    up: Callable[[NDArray[Any]], Any]
    synchronize: Callable[[], None]
    is_immutable: bool = False


def _span(array: NDArray[Any]) -> tuple[NDArray[np.uint8], int]:
    """The bytes from a multiple of 16 to the last element, and at which of them the first element starts."""
    first, end = np.lib.array_utils.byte_bounds(array)
    skip = first % 16
    raw = np.zeros(skip + end - first, np.uint8)
    raw[skip:] = np.frombuffer((ctypes.c_uint8 * (end - first)).from_address(first), np.uint8)
    return raw, skip


def _to_cupy(array: NDArray[Any]) -> Any:
    import cupy

    if array.size == 0:
        # With memory, CuPy takes dtypes that it cannot allocate.
        return cupy.ndarray(array.shape, array.dtype, cupy.zeros(16, np.uint8).data)
    raw, skip = _span(array)
    memory = cupy.empty(len(raw), np.uint8)
    memory.set(raw)  # `asarray` would allocate pinned memory, for which other ranks of the process may have to wait
    return cupy.ndarray(array.shape, array.dtype, memory.data + skip, array.strides)


def _to_torch(array: NDArray[Any]) -> Any:
    import torch

    dtype = getattr(torch, array.dtype.name)
    if array.size == 0:
        return torch.empty(array.shape, dtype=dtype, device="cuda")
    raw, skip = _span(array)
    raw = np.pad(raw, (0, -len(raw) % array.itemsize))
    memory = torch.from_numpy(raw).cuda().view(dtype)
    return memory.as_strided(array.shape, [step // array.itemsize for step in array.strides], skip // array.itemsize)


def _to_jax(array: NDArray[Any]) -> Any:
    import jax

    number = device_of_rank()  # whichever JAX has left current
    return jax.device_put(np.ascontiguousarray(array), jax_gpus()[number])


def down(array: Any) -> Any:
    """A NumPy copy of an array of any framework; NumPy arrays, None and lists as they are, tuples by element."""
    if array is None or isinstance(array, np.ndarray | list):
        return array
    if isinstance(array, tuple):
        return tuple(down(part) for part in array)
    package = type(array).__module__.partition(".")[0]
    if package == "cupy":
        # A copy to pageable memory that waits for a kernel holds up the copies of other threads, for whose ranks the
        # kernel may be waiting.
        sys.modules["cupy"].cuda.get_current_stream().synchronize()
        # Its own copies know no 8-bit floats.
        words = type(array)(array.shape, _WORDS[array.itemsize], array.data, array.strides)
        return words.get().view(array.dtype)
    if package == "torch":
        torch = sys.modules["torch"]
        word = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[array.element_size()]
        name = str(array.dtype).removeprefix("torch.")
        return array.view(word).cpu().numpy().view(getattr(ml_dtypes, name, None) or np.dtype(name))
    return np.asarray(array)


def assign(to: Any, value: Any) -> None:
    """Overwrite `to`, contiguous, with `value` of the same framework, shape and dtype, in the current stream."""
    if type(to).__module__.partition(".")[0] == "cupy":
        to.data.copy_from_device_async(value.data, to.nbytes)  # its own kernels know no 8-bit floats
    else:
        to[...] = value


def _nothing() -> None:
    pass


def _synchronize() -> None:
    import cupy

    cupy.cuda.runtime.deviceSynchronize()


NUMPY = Frames("numpy", lambda array: array, _nothing)
CUPY = Frames("cupy", _to_cupy, _synchronize)
TORCH = Frames("torch", _to_torch, _synchronize)
JAX = Frames("jax", _to_jax, _synchronize, is_immutable=True)


def frames_of(buffer: Buffer) -> Frames:
    """What a test passes to this Buffer if it does not say."""
    return NUMPY if buffer.backend == "host" else CUPY


def up_all(frames: Frames, value: Any) -> Any:
    """`value` with every NumPy array brought up, also in tuples and dicts; all else as it is."""
    if type(value) is np.ndarray:
        return frames.up(value)
    if type(value) is tuple:
        return tuple(up_all(frames, part) for part in value)
    if type(value) is dict:
        return {name: up_all(frames, part) for name, part in value.items()}
    return value
