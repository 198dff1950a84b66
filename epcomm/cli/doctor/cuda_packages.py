"""Probes of the pip packages of the CUDA backend: CuPy, NVRTC and nvJitLink, NVSHMEM."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

from epcomm.cli.doctor.findings import Finding
from epcomm.cli.doctor.gpu import driver_cuda_major
from epcomm.cli.doctor.packages import find_library, installed, newer_or_equal, pip_line
from epcomm.jit.nvshmem_wheel import MIN_VERSION

__all__ = ["probe_compilers", "probe_cupy", "probe_nvshmem"]

_CUPY = ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy")
_NVSHMEM = ("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13")


def probe_cupy() -> list[Finding]:
    """The CuPy distribution, whether there is only one, and whether it reaches a GPU."""
    found, driver_major = installed(*_CUPY), driver_cuda_major()
    if not found:
        return [Finding("cupy", "missing", "not installed", pip_line("cuda", driver_major))]
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) > 1:
        # They share one folder, so removing one breaks the other too.
        advice = f"pip uninstall -y {' '.join(found)}\n{pip_line('cuda', driver_major)}"
        return [Finding("cupy", "FAIL", f"several at once: {text}", advice)]
    built_for = next((major for major in (11, 12, 13) if f"cupy-cuda{major}x" in found), None)
    if built_for and driver_major and built_for > driver_major:
        advice = f"pip uninstall -y {' '.join(found)}\n{pip_line('cuda', driver_major)}"
        return [Finding("cupy", "FAIL", f"{text}, but the driver supports CUDA {driver_major} only", advice)]
    cupy = importlib.import_module("cupy")
    if cupy.cuda.is_available():
        return [Finding("cupy", "ok", f"{text}, GPU usable")]
    if driver_major:
        return [Finding("cupy", "warn", f"{text}, no usable GPU", "look at the lines driver and gpu")]
    return [Finding("cupy", "ok", f"{text} (no GPU here)")]


def probe_compilers() -> list[Finding]:
    """The run-time compiler and linker, by asking each library for its version."""
    return [
        _judge_compiler("nvrtc", _nvrtc_by_bindings, "libnvrtc.so.*", "nvrtcVersion"),
        _judge_compiler("nvjitlink", _nvjitlink_by_bindings, "libnvJitLink.so.*", "nvJitLinkVersion"),
    ]


def _nvrtc_by_bindings() -> tuple[int, int]:
    status, major, minor = importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()
    if int(status):
        raise RuntimeError(f"nvrtcVersion failed: {status}")
    return int(major), int(minor)


def _nvjitlink_by_bindings() -> tuple[int, int]:
    major, minor = importlib.import_module("cuda.bindings.nvjitlink").version()
    return int(major), int(minor)


def _judge_compiler(check: str, by_bindings: Callable[[], tuple[int, int]], pattern: str, function: str) -> Finding:
    """One library: through cuda.bindings, which is what epcomm compiles with; else the wheel's file alone."""
    driver_major = driver_cuda_major()
    advice = pip_line("cuda", driver_major)
    try:
        version = by_bindings()
    except Exception as error:  # cuda.bindings reports a missing library in a class of its own for each release
        bare = _version_in_wheel(pattern, function)
        if bare is None:
            return Finding(check, "missing", "not installed", advice)
        reason = "cuda-bindings is not installed" if isinstance(error, ImportError) else f"cuda.bindings: {error}"
        return Finding(check, "FAIL", f"{_dotted(bare)}, but {reason}".splitlines()[0], advice)
    text = (
        f"{_dotted(version)} (cuda-bindings {installed('cuda-bindings').get('cuda-bindings', 'of a system package')})"
    )
    if driver_major and version[0] > driver_major:
        return Finding(check, "FAIL", f"{text}, but the driver supports CUDA {driver_major} only", advice)
    return Finding(check, "ok", text)


def _version_in_wheel(pattern: str, function: str) -> tuple[int, int] | None:
    """Version of the library in an NVIDIA wheel, None when no wheel has it or it does not load."""
    for path in find_library(pattern):
        major, minor = ctypes.c_int(), ctypes.c_int()
        try:
            call: Any = getattr(ctypes.CDLL(str(path)), function)
        except (OSError, AttributeError):
            continue
        if call(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return major.value, minor.value
    return None


def probe_nvshmem() -> list[Finding]:
    """The NVSHMEM wheel: one of them, new enough, with the host library and the device archive."""
    found, advice = installed(*_NVSHMEM), pip_line("nvshmem", driver_cuda_major())
    if not found:
        return [Finding("nvshmem", "missing", "not installed (only jobs on several nodes need it)", advice)]
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(found) > 1:
        return [Finding("nvshmem", "FAIL", f"several at once: {text}", f"pip uninstall -y {' '.join(found)}\n{advice}")]
    if not newer_or_equal(next(iter(found.values())), MIN_VERSION):
        wanted = ".".join(map(str, MIN_VERSION))
        return [Finding("nvshmem", "FAIL", f"{text}; needs {wanted} or newer", advice)]
    wanted_files = {"host library": "libnvshmem_host.so.3", "device archive": "libnvshmem_device.a"}
    absent = [f"{role} {name}" for role, name in wanted_files.items() if not find_library(name)]
    if absent:
        advice = f"pip install --force-reinstall {' '.join(found)}"
        return [Finding("nvshmem", "FAIL", f"{text}, without its {' and '.join(absent)}", advice)]
    return [Finding("nvshmem", "ok", f"{text}, host library and device archive present")]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
