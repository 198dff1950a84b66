"""Shared segments of the host backend: bytes that every rank of one host can map.

A segment is created by its owner, opened by its peers through its name, and then loses the name. Nothing is left
behind however the job ends. The memory lives until the last array over it is gone: there
is no close, no finalizer, and freeing can never pull memory from under a peer or from under the user.
"""

from __future__ import annotations

import mmap
import os
import secrets
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from epcomm.bootstrap import LocalGroup

__all__ = ["FileSegments", "LocalSegments", "SegmentStore"]

Bytes = NDArray[np.uint8]


class SegmentStore(Protocol):
    """Creates, opens and un-names segments."""

    def create(self, num_bytes: int) -> tuple[str, Bytes]:
        """A zeroed segment and the name for its peers. Raises OSError when there is no room."""

    def open(self, name: str, num_bytes: int) -> Bytes:
        """Map a peer's segment. Raises OSError when it cannot be found."""

    def unlink(self, name: str) -> None:
        """Take the name away; mappings stay valid. Unknown names are ignored."""


class FileSegments:
    """Segments between processes: files in a memory file system.

    Files rather than MPI windows, whose release is collective and can block. They are in no folder from the moment
    they are made: peers open them through the owner's descriptor in ``/proc``, so that even a rank that is killed in
    the middle of a call leaves nothing behind.

    Args:
        folder: usually ``/dev/shm``.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}  # of the segments that have a name

    def create(self, num_bytes: int) -> tuple[str, Bytes]:
        path = os.path.join(self._folder, f"epcomm-{secrets.token_hex(16)}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.unlink(path)
            # Reserves the pages now: a full /dev/shm is an OSError here instead of a SIGBUS at the first store.
            os.posix_fallocate(descriptor, 0, num_bytes)
            segment = self._map(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        name = f"/proc/{os.getpid()}/fd/{descriptor}:{_identity(descriptor)}"
        self._descriptors[name] = descriptor
        return name, segment

    def open(self, name: str, num_bytes: int) -> Bytes:
        path, _, identity = name.partition(":")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _identity(descriptor) != identity:  # a process of another container that has the same number
                raise FileNotFoundError(f"{path} is not the segment {identity}")
            return self._map(descriptor, num_bytes)
        finally:
            os.close(descriptor)

    def unlink(self, name: str) -> None:
        descriptor = self._descriptors.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    @staticmethod
    def _map(descriptor: int, num_bytes: int) -> Bytes:
        return np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)


def _identity(descriptor: int) -> str:
    """Which file it is, for every process of the host."""
    status = os.fstat(descriptor)
    return f"{status.st_dev}:{status.st_ino}"


class LocalSegments:
    """Segments between ranks that are threads of one process: plain arrays in the group's registry."""

    def __init__(self, group: LocalGroup) -> None:
        self._group = group

    def create(self, num_bytes: int) -> tuple[str, Bytes]:
        name = f"segment-{secrets.token_hex(16)}"
        base = np.zeros(num_bytes + mmap.PAGESIZE, np.uint8)
        start = -base.ctypes.data % mmap.PAGESIZE
        segment = base[start : start + num_bytes]
        with self._group.lock:
            self._group.shared[name] = segment
        return name, segment

    def open(self, name: str, num_bytes: int) -> Bytes:
        with self._group.lock:
            segment: Bytes | None = self._group.shared.get(name)
        if segment is None:
            raise FileNotFoundError(f"no segment {name} in this group")
        return segment[:num_bytes]

    def unlink(self, name: str) -> None:
        with self._group.lock:
            self._group.shared.pop(name, None)
