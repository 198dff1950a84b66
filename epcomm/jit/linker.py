"""Relocatable cubin in, linked cubin out: nvJitLink through cuda-bindings. Needs neither a GPU nor a driver.

Only programs that talk to other nodes pass through here; nothing else loads nvJitLink.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

from epcomm.errors import CompileError, MissingDependency
from epcomm.jit.nvshmem_wheel import NvshmemWheel

__all__ = ["link_with_nvshmem", "linked_architecture", "nvjitlink_version"]

# Architectures that the device library has no code for, and the older one of their family whose cubins they run.
_RUNS_AS = {"103": "100"}

# The device library for CUDA 12 has nothing for these but PTX, a megabyte of it to be assembled.
_SLOW_SINCE = {12: 100}

_UNDEFINED = re.compile(r"[Uu]ndefined reference to '([^']+)'")
_MAX_LINES = 12


def linked_architecture(architecture: str) -> str:
    """What to compile and link for instead of `architecture`, where the device library lacks it."""
    return _RUNS_AS.get(architecture, architecture)


def link_with_nvshmem(cubin: bytes, name: str, architecture: str, nvshmem: NvshmemWheel) -> bytes:
    """Link one relocatable cubin. Not collective, blocks the host: below a second, but a minute and more with CUDA 12
    for compute capability 10.0 and later.

    Args:
        cubin: of NVRTC with ``-rdc=true``.
        name: stands for it in messages.
        architecture: that of the cubin, as for `compile_program`.
        nvshmem: the wheel whose headers it was compiled with.

    Returns:
        The cubin, with NVSHMEM's device code and its state, which the host library fills.

    Raises:
        CompileError: nvJitLink refused, or symbols are undefined; names them, has the log.
        MissingDependency: cuda-bindings or the nvJitLink library is not installed.
    """
    major, minor = nvjitlink_version()
    if int(re.sub(r"\D", "", architecture)) >= _SLOW_SINCE.get(major, 1 << 30):
        warnings.warn(
            f"linking {name} for sm_{architecture} takes minutes with CUDA {major}, once: the disk cache keeps "
            "the result; with epcomm[cuda13,nvshmem13] it takes a second",
            RuntimeWarning,
            stacklevel=2,
        )
    nvjitlink = _nvjitlink()
    options = [f"-arch=sm_{architecture}"]
    linker = None
    try:
        linker = nvjitlink.create(len(options), options)
        # As CUBIN: taken for an OBJECT, it would leave without its kernels, and without an error.
        nvjitlink.add_data(linker, nvjitlink.InputType.CUBIN, cubin, len(cubin), name)
        nvjitlink.add_file(linker, nvjitlink.InputType.LIBRARY, str(nvshmem.device_library))
        nvjitlink.complete(linker)
        linked = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, linked)
        return bytes(linked)
    except nvjitlink.nvJitLinkError as error:
        log = "" if linker is None else _error_log(nvjitlink, linker)
        raise _refused(name, f"nvJitLink {major}.{minor} and {nvshmem}", options, log or str(error)) from error
    finally:
        if linker is not None:
            nvjitlink.destroy(linker)


@functools.cache
def nvjitlink_version() -> tuple[int, int]:
    """(major, minor) of the linker.

    Raises:
        MissingDependency: cuda-bindings or the nvJitLink library is not installed.
    """
    nvjitlink = _nvjitlink()
    try:
        major, minor = nvjitlink.version()  # the first call loads the library
    except Exception as error:  # of a class of its own in each release of cuda-bindings
        raise _missing("nvJitLink", str(error).strip().partition("\n")[0], "the library libnvJitLink") from error
    return int(major), int(minor)


def _nvjitlink() -> Any:
    try:
        from cuda.bindings import nvjitlink
    except ImportError as error:
        raise _missing("cuda-bindings", str(error), "the package, with its module nvjitlink") from error
    return nvjitlink


def _missing(what: str, got: str, wanted: str) -> MissingDependency:
    return MissingDependency(
        what, got=got, wanted=wanted, do="pip install 'epcomm[cuda13,nvshmem13]', or [cuda12,nvshmem12] for CUDA 12"
    )


def _error_log(nvjitlink: Any, linker: Any) -> str:
    try:
        log = bytearray(nvjitlink.get_error_log_size(linker))
        nvjitlink.get_error_log(linker, log)
    except nvjitlink.nvJitLinkError:  # then the status alone has to do
        return ""
    return log.decode(errors="replace").rstrip("\0\n ")


def _refused(name: str, tools: str, options: list[str], log: str) -> CompileError:
    undefined = list(dict.fromkeys(_UNDEFINED.findall(log)))
    lines = [line for line in log.splitlines() if line.strip()]
    shown = "\n".join(lines[:_MAX_LINES])
    got = f"undefined symbols {', '.join(undefined)}, from {tools}" if undefined else f"from {tools}:\n{shown}\n"
    return CompileError(f"{name}, linked", got=got, do=f"options were {' '.join(options)}", options=options, log=log)
