"""Probes of the machine itself: Python, epcomm, NumPy, shared memory, the cache folder, the environment."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shlex
import stat
import sys
from pathlib import Path

import epcomm
from epcomm import env
from epcomm.cli.doctor.findings import Finding, Status
from epcomm.cli.doctor.packages import installed
from epcomm.errors import InputError, MissingDependency

__all__ = ["probe_cache", "probe_environment", "probe_epcomm", "probe_numpy", "probe_python", "probe_shared_memory"]

_MIN_PYTHON = (3, 11)
_MIN_SHM_BYTES = 256 << 20


def probe_python() -> list[Finding]:
    """Version, platform and environment of the interpreter."""
    version = platform.python_version()
    place = "no virtual environment," if sys.prefix == sys.base_prefix else "virtual environment"
    text = f"{version} on {platform.system()} {platform.machine()}, {place} {sys.prefix}"
    if sys.version_info < _MIN_PYTHON:
        wanted = ".".join(map(str, _MIN_PYTHON))
        return [Finding("python", "FAIL", text, f"use Python {wanted} or newer")]
    if sys.platform != "linux":
        return [Finding("python", "FAIL", text, "epcomm runs on Linux")]
    return [Finding("python", "ok", text)]


def probe_epcomm() -> list[Finding]:
    """Version and place of this package, its CUDA sources, and whether this release has a CUDA backend."""
    version = installed("epcomm").get("epcomm", "not installed, run from its tree")
    findings = [Finding("epcomm", "ok", f"{version} ({next(iter(epcomm.__path__))})"), _probe_cuda_sources()]
    backend = importlib.util.find_spec("epcomm.backends.cuda")
    if backend is None or backend.origin is None:  # no origin: an empty folder, which Python takes for a package
        return [*findings, Finding("cuda backend", "missing", "this release has the host backend only")]
    return [*findings, Finding("cuda backend", "ok", "part of this release")]


def _probe_cuda_sources() -> Finding:
    from epcomm.jit.source import cuda_src_dir

    try:
        folder = cuda_src_dir()
    except MissingDependency as error:
        advice = "unset EPCOMM_CUDA_SRC, or install again: pip install --force-reinstall --no-deps epcomm"
        return Finding("cuda sources", "FAIL", str(error), advice)
    num_sources = sum(1 for path in folder.rglob("*.cu*") if path.is_file())
    return Finding("cuda sources", "ok", f"{num_sources} files in {folder}")


def probe_numpy() -> list[Finding]:
    """Versions of NumPy and ml_dtypes, by importing both."""
    findings = []
    for check in ("numpy", "ml_dtypes"):
        try:
            version = importlib.import_module(check).__version__
        except ImportError as error:
            status: Status = "missing" if error.name == check else "FAIL"
            reason = str(error).strip().splitlines()[-1:]  # NumPy tells the cause last, after a page of advice
            advice = f"pip install --force-reinstall {check.replace('_', '-')}"
            findings.append(Finding(check, status, "".join(reason), advice))
        else:
            findings.append(Finding(check, "ok", version))
    return findings


def probe_shared_memory() -> list[Finding]:
    """Size and free space of the segments' folder. (Segments have no names, so dead jobs leave none there.)"""
    folder = Path(env.get("EPCOMM_SHM_DIR"))
    advice = "set EPCOMM_SHM_DIR to a folder in memory, or EPCOMM_HOST_TRANSPORT=messages"
    try:
        space = os.statvfs(folder)
    except OSError as error:
        return [Finding("shared memory", "FAIL", str(error), advice)]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Finding("shared memory", "FAIL", f"{folder} is not writable", advice)]
    free, size = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    text = f"{folder}: {_mib(free)} free of {_mib(size)}"
    if free < _MIN_SHM_BYTES:
        advice = "docker run --shm-size=8g ... (its default is 64 MiB); or set EPCOMM_HOST_TRANSPORT=messages"
        return [Finding("shared memory", "warn", text, advice)]
    return [Finding("shared memory", "ok", text)]


def probe_cache() -> list[Finding]:
    """The folder of compiled kernels: writable, and by nobody else, since its contents are run."""
    from epcomm.jit.cache import user_folder

    folder = user_folder()
    if folder is None:
        return [Finding("cache", "warn", "no home folder: every process compiles", "set EPCOMM_CACHE_DIR")]
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    other = "set EPCOMM_CACHE_DIR to a folder of your own"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return [Finding("cache", "warn", f"{folder}: {nearest} is not a writable folder", other)]
    if nearest != folder:
        return [Finding("cache", "ok", f"{folder} (will be made with the first compiled kernel)")]
    info = folder.stat()
    text = f"{folder}, uid {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o}"
    if info.st_uid != os.getuid():
        return [Finding("cache", "warn", f"{text}: it belongs to somebody else", other)]
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        advice = f"chmod go-w {shlex.quote(str(folder))}"
        return [Finding("cache", "warn", f"{text}: others can write kernels that you would run", advice)]
    return [Finding("cache", "ok", text)]


def probe_environment() -> list[Finding]:
    """One line for each variable of `epcomm.env.VARIABLES`, and one for every name that is none of them."""
    findings = []
    for name, variable in env.VARIABLES.items():
        if env.lookup(name) is None:
            findings.append(Finding(name, "ok", f"{variable.default!r}: {variable.meaning}"))
            continue
        try:
            findings.append(Finding(name, "ok", f"{env.get(name)!r} (set): {variable.meaning}"))
        except InputError as error:
            findings.append(Finding(name, "FAIL", str(error), f"unset {name}"))
    strangers = sorted(name for name in env.child_environment() if name.startswith("EPCOMM_"))
    for name in strangers:
        if name not in env.VARIABLES:
            findings.append(Finding(name, "warn", "set, but epcomm has no such variable", f"unset {name}"))
    return findings


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"
