"""Compiled programs are kept: in memory for this process, on disk for the next.

A cubin on disk is code that will run with this user's rights, so the folder must belong to the user alone. Entries
appear by an atomic rename and carry a digest: a reader sees a whole entry or none, and whatever is wrong with an
entry, or with the folder, only costs a compilation.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import stat
import tempfile
import time
import warnings
from pathlib import Path

from epcomm import env
from epcomm.jit.compiler import (
    Program,
    compile_program,
    compiler_options,
    header_folders,
    installed_nvshmem,
    nvrtc_version,
)
from epcomm.jit.linker import nvjitlink_version
from epcomm.jit.source import source_digest

__all__ = ["MAX_BYTES", "DiskCache", "cached_cubin", "hold", "held_cubin", "user_folder"]

# What all entries may take together; a kernel set takes about one MiB.
MAX_BYTES = 256 << 20

# Changes when entries or keys change their form.
_MAGIC = b"epcomm cubin 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
_SUFFIX, _UNFINISHED = ".cubin", ".unfinished"
_UNFINISHED_MAX_AGE_S = 3600.0

# Files that tell which CUDA headers a folder has: of the runtime, of libcu++.
_HEADER_MARKS = ("cuda_runtime_api.h", "cuda/std/__cccl/version.h", "cuda/std/__internal/version.h")

# Grows by the different programs of a process, which are few.
_held: dict[tuple[str, Program, str], bytes] = {}


def cached_cubin(program: Program, architecture: str, sources: str | None = None) -> bytes:
    """`compile_program`, unless this process or the disk cache has the cubin. Not collective, blocks the host.

    Args:
        program: what to compile.
        architecture: as for `compile_program`.
        sources: `source_digest`, if the caller has it.

    Raises:
        CompileError: NVRTC rejected the source.
        MissingDependency: the compiler or the CUDA sources are not installed.
    """
    sources = sources or source_digest()
    cubin = held_cubin(program, architecture, sources)
    if cubin is None:
        cubin = _from_disk(program, architecture, sources)
        hold(program, architecture, sources, cubin)
    return cubin


def held_cubin(program: Program, architecture: str, sources: str) -> bytes | None:
    """The cubin if this process has it already, made from sources with that digest; needs no compiler."""
    return _held.get((sources, program, architecture))


def hold(program: Program, architecture: str, sources: str, cubin: bytes) -> None:
    """Keep a cubin, which may come from another process, for `held_cubin` and `cached_cubin`."""
    _held[sources, program, architecture] = cubin


def _from_disk(program: Program, architecture: str, sources: str) -> bytes:
    folder = user_folder()
    if folder is None:
        return compile_program(program, architecture)
    cache, key = DiskCache(folder), _key(program, architecture, sources)
    cubin = cache.load(key)
    if cubin is None:
        cubin = compile_program(program, architecture)
        if source_digest() == sources:  # else somebody edits them, and this may be of either version
            cache.store(key, cubin)
    return cubin


def _key(program: Program, architecture: str, sources: str) -> str:
    """Digest of all that a cubin depends on. Folders of headers count with their path and age."""
    stamps = []
    for mark in (folder / name for folder in header_folders() for name in _HEADER_MARKS):
        with contextlib.suppress(OSError):
            status = mark.stat()
            stamps.append((str(mark), status.st_size, status.st_mtime_ns))
    options = compiler_options(architecture, program.defines, nvshmem=program.nvshmem)
    options = [option for option in options if not option.startswith("-I")]
    parts: list[object] = [_MAGIC.decode(), sources, program.source, options, stamps, nvrtc_version()]
    if program.nvshmem:
        parts += [nvjitlink_version(), _nvshmem_stamp()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _nvshmem_stamp() -> tuple[object, ...]:
    """Version of NVSHMEM, and which file is linked."""
    wheel = installed_nvshmem()
    status = wheel.device_library.stat()
    return wheel.version, str(wheel.device_library), status.st_size, status.st_mtime_ns


def user_folder() -> Path | None:
    """Folder of the disk cache: ``EPCOMM_CACHE_DIR``, else ``epcomm`` in the user's cache folder. None: there is none.

    A user without a home folder is none too.
    """
    if chosen := env.get("EPCOMM_CACHE_DIR"):
        return Path(chosen).absolute()
    caches = env.lookup("XDG_CACHE_HOME") or ""
    if not os.path.isabs(caches):  # the specification says to ignore it then
        caches = os.path.expanduser("~/.cache")
    return Path(caches) / "epcomm" if os.path.isabs(caches) else None


class DiskCache:
    """Named byte strings in a folder that other processes use at the same time. No method raises OSError.

    Args:
        folder: made at the first `store`.
        max_bytes: `store` removes the entries that were not used for longest while there is more than that.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def load(self, key: str) -> bytes | None:
        """The entry, None if there is none that is whole."""
        path = self._path(key)
        try:
            if not self._is_trusted():
                return None
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except OSError:
            return None
        head = len(_MAGIC) + _DIGEST_BYTES
        payload = data[head:]
        if not _is_private(status) or data[:head] != _MAGIC + _digest(key, payload):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # by which `store` knows what is in use; many file systems record no reads
        return payload

    def store(self, key: str, payload: bytes) -> None:
        """Add or replace an entry; does nothing where that is impossible."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self._is_trusted():
                return
            handle, name = tempfile.mkstemp(suffix=_UNFINISHED, dir=self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_MAGIC + _digest(key, payload) + payload)
                os.replace(name, self._path(key))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
            self._evict(key)
        except OSError:  # no such home, read-only, full: then it is compiled each time
            return

    def _path(self, key: str) -> Path:
        return self._folder / (key + _SUFFIX)

    def _is_trusted(self) -> bool:
        if _is_private(self._folder.stat()):
            return True
        _warn_once(self._folder)
        return False

    def _evict(self, newest: str) -> None:
        """Remove what was not used for longest, and what processes that died have left."""
        entries: list[tuple[float, int, str]] = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(OSError):  # another process removed it
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(_SUFFIX):
                    entries.append((status.st_mtime, status.st_size, entry.path))
                elif entry.name.endswith(_UNFINISHED) and time.time() - status.st_mtime > _UNFINISHED_MAX_AGE_S:
                    os.unlink(entry.path)
        num_bytes = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if num_bytes <= self._max_bytes:
                break
            if path != str(self._path(newest)):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                num_bytes -= size


def _digest(key: str, payload: bytes) -> bytes:
    """Of the key too, so that an entry under another's name is not one."""
    return hashlib.sha256(key.encode() + b"\0" + payload).digest()


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def _warn_once(folder: Path) -> None:
    warnings.warn(
        f"the cache of compiled kernels is not used: {folder} does not belong to this user, or others may write to "
        "it; correct that, or set EPCOMM_CACHE_DIR",
        RuntimeWarning,
        stacklevel=2,
    )
